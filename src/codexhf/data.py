"""Card -> Dataset with the columns of its type: rows checked, counted, mixed, and as token ids.

The way of a row: `sources.py` reads it, `rows.py` gives it the columns of the card's type,
`reading.py` checks it, here it is mixed, and `tokens.py` makes ids of it. Nothing is dropped
without a count: what is left out is said when a stage starts, and in the stats that end up in the
manifest.

    python -m codexhf.data check CARD...    # what would be read, and what not (check.py)
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from datasets.fingerprint import generate_random_fingerprint
from datasets.table import InMemoryTable

from codexhf.cache import fingerprint
from codexhf.cards import Card, CardError, load_card
from codexhf.execution import NOT_SUPPORTED, check_isolation
from codexhf.overlap import HeldOut, hash_of
from codexhf.prompts import text_of
from codexhf.reading import Packing, Reading, read_once
from codexhf.references import reference_errors
from codexhf.rows import COLUMNS, EXTRA, called_name, one_form, wrap
from codexhf.sources import Passing
from codexhf.stream import PackedStream
from codexhf.tokens import (
    answered_rows,
    learned_tokens,
    longest_of,
    prompt_lengths,
    table_of,
    tokenizer_key,
)

STRATEGIES = {"stop": "first_exhausted", "repeat": "all_exhausted"}
"""What a mix does where a card runs out, and what `datasets` calls it."""
TOO_LONG_SHARE = 0.01
WRONG_SHARE = 0.05


@dataclass
class Data:
    """A dataset and what is known of how it came to be.

    Attributes:
        ids: the same rows as token ids, in the columns that TRL's trainers take.
        cards: card name -> rows read, dropped and why, licence, shares.
        stats: what is known of the rows of all cards together.
        known: the fingerprint, where it was taken when the rows were made.
        part: number of the card that each row is from.
        lengths: of each row, in tokens or what `unit` says; `limit` is the most that they may be.
        reused: of each card, whether its rows were made before.
    """

    dataset: Dataset | PackedStream
    cards: dict = field(default_factory=dict)
    stats: dict = field(default_factory=dict)
    ids: Dataset | None = None
    known: str | None = None
    part: np.ndarray | None = None
    lengths: np.ndarray | None = None
    limit: int | None = None
    unit: str = "tokens"
    reused: tuple[bool, ...] = ()

    @property
    def fingerprint(self) -> str:
        """sha256 of the rows' content: equal data, equal fingerprint, on any machine.

        Of a stream it is that of what its rows are made from.
        """
        return self.known or fingerprint(self.dataset)

    @property
    def rows(self) -> int | None:
        """Return how many rows there are; None for a stream."""
        return None if isinstance(self.dataset, PackedStream) else len(self.dataset)

    @property
    def arrays(self) -> Dataset | PackedStream:
        """Return packed rows for a Trainer, which reads arrays in a fifth of the time of lists."""
        rows = self.dataset
        return rows if isinstance(rows, PackedStream) else rows.with_format("numpy")

    def select(self, keep: Sequence[int]) -> "Data":
        """Return the rows of these numbers, with the same cards and stats."""
        ids = None if self.ids is None else self.ids.select(keep)
        part, lengths = (a if a is None else a[keep] for a in (self.part, self.lengths))
        rows = self.dataset.select(keep)
        return replace(self, dataset=rows, ids=ids, known=None, part=part, lengths=lengths)


def _dataset(table: pa.Table) -> Dataset:
    # Without a fingerprint `datasets` pickles the whole table to take one, 2 GB for a million rows.
    return Dataset(InMemoryTable(table), fingerprint=generate_random_fingerprint())


# -- reading cards -----------------------------------------------------------------------------


def read_card(card: Card, split: str = "train") -> Data:
    """Load one card's rows, checked against its type.

    Args:
        card: a validated card.
        split: "train", "heldout" (the share that the card holds out), or "all".
    Returns:
        the rows; the stats are rows_read, dropped (reason -> rows) and rows.
    Raises:
        CardError: the source is missing, broken, empty, or lacks a column; names file and line.
    """
    made, _ = read_once(card, split, None)
    return Data(made.rows, stats=made.stats, known=made.fingerprint)


def read_cards(
    cards: Sequence[str],
    type: str,
    *,
    split: str = "train",
    exclude: Sequence[str] = (),
    packing: Packing | None = None,
    max_rows: int | None = None,
    max_characters: int | None = None,
) -> list[Data]:
    """Read cards of one type, each on its own; a row of an earlier card is left out of a later one.

    Args:
        packing: for corpora that become packed ids. These stand for themselves: the cards of a mix
            are packed one by one.
        max_rows, max_characters: read of a card that streams.
    Raises:
        CardError: a card of another type, or one of which nothing is left.
    """
    heldout, earlier, out = _heldout(exclude), [], []
    for path in cards:
        card = load_card(path)
        if card.type != type:
            raise CardError(f"{card.path}: type is {card.type}, expected {type} here.")
        others, most = () if packing else earlier, (max_rows, max_characters)
        made, digests = read_once(card, split, heldout, others, packing, *most)
        if not card.streaming:
            earlier.append(made)
        if not len(made.rows):
            raise CardError(f"{card.path}: {_nothing_left(made.stats, split, packing)}")
        about = {"card": card.source, "license": card.license, "type": card.type}
        about |= {"sha256": digests, "compared_with": [*exclude], **made.stats}
        known, reused = made.fingerprint, (made.reused,)
        out.append(Data(made.rows, {card.name: about}, known=known, reused=reused))
    return out


def _nothing_left(stats: dict, split: str, packing: Packing | None) -> str:
    if "tokens_read" not in stats:
        return f"no rows left of {stats}."
    return (
        f"{stats['tokens_read']} tokens in split {split!r}, fewer than one sequence of max_length "
        f"{packing.max_length}. Lower max_length or add documents."
    )


def _heldout(cards: Sequence[str]) -> HeldOut | None:
    def rows(card: Card) -> Iterable[dict]:
        if not card.streaming:
            return read_card(card, "all").dataset
        tables = Reading(card, "all", None, None).tables(Passing(card))
        return (row for table in tables for row in table.to_pylist())

    return HeldOut(rows(load_card(path)) for path in cards) if cards else None


# -- mixing ------------------------------------------------------------------------------------


def load_split(
    cards: Sequence[str],
    type: str,
    *,
    split: str = "train",
    exclude: Sequence[str] = (),
    weights: Sequence[float] | None = None,
    count: Callable[[dict], int] | None = None,
    max_rows: int | None = None,
    max_characters: int | None = None,
    when_exhausted: str = "stop",
    seed: int = 42,
) -> Data:
    """Load cards of one type into one dataset.

    With `weights`, rows are interleaved (`datasets.interleave_datasets`; `mix` says what happens
    when a card runs out) so that each card's share of `count` (rows when not given) is as wanted;
    requested and realised shares are in the cards' stats. Without, all rows are concatenated. A
    card that streams is read up to `max_rows` or `max_characters`, into memory.

    Raises:
        CardError: a card of another type, or nothing left after the rows were checked.
    """
    if not cards:
        return Data(Dataset.from_dict({}))
    most = {"max_rows": max_rows, "max_characters": max_characters}
    parts = read_cards(cards, type, split=split, exclude=exclude, **most)
    sizes = [np.fromiter(map(count, p.dataset), np.int64) for p in parts] if count else None
    parts = [_with_bytes(part, type) for part in parts]
    return _capped(mix(parts, weights, sizes, seed, when_exhausted), max_rows, seed)


def _with_bytes(data: Data, type: str) -> Data:
    """Return the rows with the bytes of each, where they are text; no text is read for it."""
    table = table_of(data.dataset.select_columns(COLUMNS[type]))
    if any(field.type != pa.string() for field in table.schema):
        return data
    bytes = sum(pc.binary_length(column).to_numpy() for column in table.columns)
    return replace(data, lengths=bytes, unit="bytes")


def _named(parts: Sequence[Data]) -> dict[str, dict]:
    """Return the stats of all cards by name; cards of one name are told apart by their folder."""
    out: dict[str, dict] = {}
    for name, about in (item for part in parts for item in part.cards.items()):
        unique = name if name not in out else f"{Path(about['card']).resolve().parent.name}/{name}"
        out[unique if unique not in out else about["card"]] = about
    return out


def mix(
    parts: Sequence[Data],
    weights: Sequence[float] | None,
    sizes: Sequence[np.ndarray] | None,
    seed: int,
    when_exhausted: str = "stop",
) -> Data:
    """Put cards together, interleaved by share of `sizes`; the shares go into the cards' stats.

    Args:
        sizes: what each row counts, e.g. tokens; 1 when not given.
        when_exhausted: "stop" where the first card runs out, so that nothing is read twice; or
            "repeat" cards until each was read to its end.
    """
    unit = "units" if sizes is None else "tokens"
    if sizes is None:
        sizes = [np.ones(len(part.dataset), np.int64) for part in parts]
    starts = np.cumsum([0, *map(len, sizes)])
    if weights is None or len(parts) == 1:
        order = np.arange(starts[-1])
    else:
        # Row numbers are mixed in the place of rows, so that no text is moved.
        rates = np.array(weights) / np.array([size.mean() for size in sizes])
        numbers = [
            Dataset.from_dict({"row": np.arange(a, b)}).shuffle(seed=seed + i)
            for i, (a, b) in enumerate(zip(starts, starts[1:], strict=False))
        ]
        mixed = datasets.interleave_datasets(
            numbers,
            probabilities=(rates / rates.sum()).tolist(),
            seed=seed,
            stopping_strategy=STRATEGIES[when_exhausted],
        )
        order = mixed.with_format("numpy")[:]["row"]
    of_part = np.searchsorted(starts, order, "right") - 1
    realised = np.bincount(of_part, np.concatenate(sizes)[order], len(parts))
    wanted = None if weights is None else np.array(weights) / np.sum(weights)
    cards = _named(parts)
    for i, about in enumerate(cards.values()):
        about[unit] = int(realised[i])
        about["share_requested"] = None if wanted is None else round(float(wanted[i]), 4)
        about["share_realised"] = round(float(realised[i] / realised.sum()), 4)
        if wanted is not None:
            about["epochs"] = round(float((of_part == i).sum() / len(parts[i].dataset)), 4)
    known = parts[0].known if len(parts) == 1 else None
    whole = Data(_joined([part.dataset for part in parts]), cards, known=known)
    if all(part.lengths is not None for part in parts):
        whole.lengths, whole.unit = np.concatenate([p.lengths for p in parts]), parts[0].unit
    whole.part = np.repeat(np.arange(len(parts), dtype=np.int16), np.diff(starts))
    whole.reused = tuple(chain.from_iterable(part.reused for part in parts))
    if parts[0].ids is not None:
        whole.ids = datasets.concatenate_datasets([part.ids for part in parts])
    return whole if weights is None or len(parts) == 1 else whole.select(order)


def _joined(parts: Sequence[Dataset]) -> Dataset:
    """Concatenate; columns that differ get one form, and what a card lacks is null in its rows."""
    if len(parts) == 1:
        return parts[0]
    if all(part.features == parts[0].features for part in parts):
        return datasets.concatenate_datasets(list(parts))
    return _dataset(one_form([table_of(part) for part in parts]))


def _capped(data: Data, max_rows: int | None, seed: int) -> Data:
    if max_rows is None or len(data.dataset) <= max_rows:
        return data
    order = np.random.default_rng(seed).permutation(len(data.dataset))[:max_rows]
    return data.select(sorted(order.tolist()))


# -- corpora ----------------------------------------------------------------------------------


def load_packed(
    cards: Sequence[str],
    tokenizer,
    max_length: int,
    *,
    split: str = "train",
    exclude: Sequence[str] = (),
    weights: Sequence[float] | None = None,
    max_rows: int | None = None,
    when_exhausted: str = "stop",
    num_workers: int = 0,
    seed: int = 42,
) -> Data:
    """Load corpora as sequences of exactly `max_length` tokens; no padding.

    Each card is packed on its own and the equal-sized sequences are mixed, so a share of rows is a
    share of tokens. `tokens.Packer` keeps documents apart. Where a card streams, all are read while
    training, again and again, and the dataset is a `stream.PackedStream`; `num_workers` are those
    of the DataLoader.
    """
    packing = Packing(tokenizer, max_length)
    if any(load_card(path).streaming for path in cards):
        if num_workers > 1:
            raise CardError(
                f"dataloader_num_workers: got {num_workers}, expected at most 1 with a card that "
                "streams, which each of them would read as a whole. num_proc makes it faster."
            )
        if weights is not None and when_exhausted == "stop":
            raise CardError(
                "when_exhausted: got stop, but nobody knows where a card that streams ends. Set "
                "when_exhausted: repeat; a card that runs out begins again."
            )
        return _streamed(cards, packing, split, _heldout(exclude), weights, max_rows, seed)
    parts = read_cards(cards, "language-modeling", split=split, exclude=exclude, packing=packing)
    sizes = [np.full(len(part.dataset), max_length) for part in parts]
    mixed = mix(parts, weights, sizes, seed, when_exhausted)
    if max_rows is None:
        return mixed
    order = np.random.default_rng(seed).permutation(len(mixed.dataset))
    return mixed.select(order[:max_rows])


def _streamed(
    cards: Sequence[str],
    packing: Packing,
    split: str,
    heldout: HeldOut | None,
    weights: Sequence[float] | None,
    max_rows: int | None,
    seed: int,
) -> Data:
    """Do `load_packed` for cards that stream; with `max_rows` read that many rows now."""
    loaded = [load_card(path) for path in cards]

    def read(card: Card) -> Iterator[dict]:
        reading, count = Reading(card, split, heldout, packing), 0
        for table in reading.tables(Passing(card)):
            count += len(table)
            yield from table.to_pylist()
        said = f"{count} packed rows of {reading.stats()}"
        if not count:
            raise CardError(f"{card.path}: {said}.")
        print(f"{card.name}: read to its end: {said}", flush=True)

    about = [
        {"card": c.source, "license": c.license, "type": c.type, "streaming": True} for c in loaded
    ]
    named = _named([Data(None, {c.name: a}) for c, a in zip(loaded, about, strict=True)])
    if max_rows is not None:
        rows = list(islice(chain.from_iterable(map(read, loaded)), max_rows))
        size = sum(len(packing.tokenizer.decode(row["input_ids"]).encode()) for row in rows)
        about[0]["bytes_per_token"] = size / (len(rows) * packing.max_length)
        return Data(Dataset.from_list(rows), named)
    known = [[repr(c), c.digests()] for c in loaded] + [packing.max_length, split, weights, seed]
    key = [known, heldout and heldout.key, tokenizer_key(packing.tokenizer)]
    digest = sha256(json.dumps(key, default=str).encode()).hexdigest()
    for card in loaded:  # what is wrong with a card is said now, and not while training
        next(read(card))
    parts = [partial(read, card) for card in loaded]
    return Data(PackedStream(parts, weights, seed), named, known=digest)


def load_packed_each(cards: Sequence[str], tokenizer, max_length: int, max_rows: int) -> dict:
    """Card name -> Data of its held-out documents, packed; only cards that hold documents out."""
    parts = [
        load_packed([path], tokenizer, max_length, split="heldout", max_rows=max_rows)
        for path in holding_out(cards)
    ]
    return dict(zip(_named(parts), parts, strict=True))


def holding_out(cards: Sequence[str]) -> list[str]:
    """Return those of the cards that hold documents out of training."""
    return [path for path in cards if load_card(path).heldout]


def load_heldout_texts(cards: Sequence[str], max_rows: int | None = None) -> dict[str, Data]:
    """Card name -> Data of its held-out documents.

    Raises:
        CardError: a card that holds none out.
    """
    for path in cards:
        if not load_card(path).heldout:
            raise CardError(
                f"{path}: holds no documents out of training. Add `heldout: 0.05` under codexhf, "
                "before anything is trained on it."
            )
    parts = [
        load_split([path], "language-modeling", split="heldout", max_rows=max_rows)
        for path in cards
    ]
    return dict(zip(_named(parts), parts, strict=True))


# -- rows of prompts and answers ----------------------------------------------------------------


def load_demonstrations(
    cards: Sequence[str],
    tokenizer,
    max_length: int,
    *,
    exclude: Sequence[str] = (),
    weights: Sequence[float] | None = None,
    completion_only: bool | None = True,
    when_exhausted: str = "stop",
    seed: int = 42,
) -> Data:
    """Load prompt-completion rows, none longer than `max_length` tokens.

    Args:
        weights: wanted share of each card in the tokens that are learned.
        completion_only: False to learn the prompts as well.
    Returns:
        rows of prompt and completion, as messages where the tokenizer has a chat template; the
        `ids` are input_ids and labels, which SFTTrainer trains on as they are.
    """
    if not cards:
        return Data(Dataset.from_dict({}))
    columns = COLUMNS["prompt-completion"]
    parts = [
        _answered(part, tokenizer, columns, completion_only is False)
        for part in read_cards(cards, "prompt-completion", exclude=exclude)
    ]
    sizes = [learned_tokens(part.ids) for part in parts]
    data = mix(parts, weights, sizes, seed, when_exhausted)
    return drop_long(data, longest_of(data.ids), max_length)


def load_pairs(
    cards: Sequence[str], tokenizer, max_length: int, *, exclude: Sequence[str] = ()
) -> Data:
    """Load preference pairs, neither side longer than `max_length` tokens.

    Args:
        exclude: cards whose prompts must not be trained on, e.g. the pairs of the evaluation.
    Returns:
        rows of prompt, chosen and rejected, as messages where the tokenizer has a chat template;
        the `ids` are chosen_ids and rejected_ids, and margin where a card has it.
    """
    parts = [
        _answered(part, tokenizer, COLUMNS["preference"], also=["margin"])
        for part in read_cards(cards, "preference", exclude=exclude)
    ]
    data = mix(parts, None, None, 0)
    if "margin" in data.dataset.column_names:
        margins = table_of(data.dataset)["margin"].fill_null(0.0)
        data.ids = _dataset(table_of(data.ids).append_column("margin", margins))
    return drop_long(data, longest_of(data.ids), max_length)


def _answered(
    part: Data,
    tokenizer,
    columns: Sequence[str],
    learn_prompts: bool = False,
    also: Sequence[str] = (),
) -> Data:
    """Return the rows of a card with their ids, in messages where the tokenizer has a template."""
    part = in_messages(part, tokenizer, columns)
    names = [*columns, *(name for name in also if name in part.dataset.column_names)]
    part = replace(part, dataset=part.dataset.select_columns(names), known=None)
    if "completion" in columns and not tokenizer.chat_template:
        _check_separated(part)
    ids = answered_rows(
        part.dataset, tokenizer, columns[1:], learn_prompts=learn_prompts, source=card_names(part)
    )
    return replace(part, ids=ids)


def load_tasks(
    cards: Sequence[str],
    tokenizer,
    *,
    exclude: Sequence[str] = (),
    max_rows: int | None = None,
    max_prompt_tokens: int | None = None,
    runs_tests: bool = True,
    seed: int = 42,
) -> Data:
    """Load tasks: prompts, with tests and a reference where the card has them.

    The prompt is messages where the tokenizer has a chat template, the reference is text. A name
    that tests call stands for a missing entry_point, a hash of the prompt for a missing id.

    Args:
        tokenizer: None for rows as they are, of any length.
        runs_tests: whether something runs the tests. Rows without tests are left out then, and
            rows whose reference fails them: no answer could be judged by such tests.
    Raises:
        CardError: tests are needed, and no row has them, or many are wrong; the tokenizer's chat
            template refuses a row.
    """
    if not cards:
        return Data(Dataset.from_dict({}))
    parts = [_task_rows(p, runs_tests) for p in read_cards(cards, "prompt-only", exclude=exclude)]
    data = _capped(mix(parts, None, None, seed), max_rows, seed)
    if runs_tests:
        packages = [name for path in cards for name in load_card(path).execution.packages]
        if packages:
            check_isolation(packages=packages)
        data = drop_wrong(data, reference_errors(data.dataset))
    if tokenizer is None:
        return _with_bytes(data, "prompt-only")
    data = in_messages(data, tokenizer, ("prompt",))
    lengths = prompt_lengths(data.dataset, tokenizer, card_names(data))
    if max_prompt_tokens is None:
        return replace(data, lengths=lengths)
    return drop_long(data, lengths, max_prompt_tokens)


def _task_rows(part: Data, runs_tests: bool) -> Data:
    """Fill in what can be known of tasks, and leave out rows of which something is missing."""
    (about,) = part.cards.values()
    table = table_of(part.dataset)
    if runs_tests and "tests" not in table.column_names:
        raise CardError(
            f"{about['card']}: rows have no column 'tests', and without tests no answer can be "
            "run. Map it under codexhf.columns."
        )

    def column(name: str) -> list:
        found = name in table.column_names
        return list(part.dataset[name]) if found else [None] * len(part.dataset)

    tests, references = column("tests"), column("completion")
    names = [n or called_name(t) for n, t in zip(column("entry_point"), tests, strict=True)]
    keep, dropped = [], Counter(about["dropped"])
    answered = any(references)
    for i, reference in enumerate(references):
        reason = _missing(tests[i], names[i]) if runs_tests else None
        if reason is None and answered and not reference:
            reason = "no completion"
        if reason is None:
            keep.append(i)
        else:
            dropped[reason] += 1
    about["dropped"], about["rows"] = dict(dropped), len(keep)
    if not keep:
        raise CardError(f"{about['card']}: no rows left of {about}.")
    made = {name: table[name] for name in table.column_names}
    ids = zip(column("id"), part.dataset["prompt"], strict=True)
    made["id"] = pa.array([i or f"{hash_of(text_of(prompt)):016x}" for i, prompt in ids])
    if "tests" in made:
        made["entry_point"] = pa.array(names, pa.string())
    if not answered:
        made.pop("completion", None)
    order = dict.fromkeys((*COLUMNS["prompt-only"], *EXTRA, *made))
    rows = _dataset(pa.table({name: made[name] for name in order if name in made}))
    return Data(rows.select(keep), part.cards, reused=part.reused)


def _missing(tests: str | list | dict | None, name: str | None) -> str | None:
    """Return what a task lacks to be run, or None."""
    if not tests:
        return "no tests"
    cases = tests.get("cases") if isinstance(tests, dict) else tests
    whole = isinstance(cases, list) and cases[0].get("stdin") is not None
    return None if name or whole else "no entry_point"


def in_messages(data: Data, tokenizer, columns: Sequence[str]) -> Data:
    """Turn text into the messages that the tokenizer's chat template renders.

    Raises:
        CardError: there are messages and no chat template.
    """
    features = data.dataset.features
    text = [c for c in columns if features[c] == datasets.Value("string")]
    if not tokenizer.chat_template:
        if len(text) < len(columns):
            raise CardError(
                f"{card_names(data)}: rows are messages, but the tokenizer has no chat template. "
                "Set one (tokenizer.chat_template = ...; tokenizer.save_pretrained(...)), or join "
                "the turns with a template under codexhf.columns."
            )
        return data
    if not text:
        return data
    table = table_of(data.dataset)
    for name in text:
        table = wrap(table, name)
    return replace(data, dataset=_dataset(table), known=None)


def _check_separated(data: Data) -> None:
    """Refuse prompts in text that run into their answers: "Add a and b.def add".

    Raises:
        CardError: no white space where prompt and answer meet, in more than 1% of the rows.
    """
    rows = zip(data.dataset["prompt"], data.dataset["completion"], strict=True)
    ends = [prompt[-1:] + answer[:1] for prompt, answer in rows]
    glued = [i for i, end in enumerate(ends) if not any(map(str.isspace, end))]
    if len(glued) > TOO_LONG_SHARE * len(ends):
        row = data.dataset[glued[0]]
        raise CardError(
            f"{card_names(data)}: nothing separates prompt and answer in {len(glued)} of "
            f"{len(ends)} rows ({(row['prompt'][-20:] + row['completion'][:20])!r}): the tokenizer "
            "has no chat template, and there is no white space where they meet. Give sft one "
            "(--chat_template plain, or --chat_template_path with a file), or end the prompts of "
            'every card in a line break (codexhf.columns: {prompt: "{{ prompt }}\\n"}).'
        )


def card_names(data: Data) -> str:
    """Return the paths of the cards that rows are from, as an error names them."""
    return ", ".join(about["card"] for about in data.cards.values())


def drop_long(data: Data, lengths: np.ndarray, max_length: int) -> Data:
    """Remove rows of more than `max_length` tokens, as a model reads them; counted in the stats.

    Raises:
        CardError: more than 1% of the rows would go, which is a setting and not an outlier.
    """
    data = replace(data, lengths=lengths, limit=max_length)
    keep = np.flatnonzero(lengths <= max_length)
    dropped = len(lengths) - len(keep)
    if dropped > TOO_LONG_SHARE * len(lengths):
        raise CardError(
            f"{card_names(data)}: {dropped} of {len(lengths)} rows are longer than {max_length} "
            f"tokens (longest: {lengths.max()}). Raise max_length or the model's context, or "
            "shorten the data."
        )
    kept = data.select(keep) if dropped else data
    longest = int(lengths.max())
    kept.stats = {**data.stats, "dropped_as_too_long": dropped, "longest_tokens": longest}
    return kept


def drop_wrong(data: Data, errors: Sequence[str | None]) -> Data:
    """Remove tasks whose tests cannot be run or fail their own reference; counted in the stats.

    Raises:
        CardError: more than 5% of the rows are wrong, or none is left.
    """
    left_out = [i for i, error in enumerate(errors) if error]
    if not left_out:
        return data
    wrong = [i for i in left_out if not errors[i].startswith(NOT_SUPPORTED)]
    ids = data.dataset["id"]
    shown = "\n".join(f"  {ids[i]}: {errors[i][:200]}" for i in (wrong + left_out)[:3])
    text = (
        f"{card_names(data)}: tests or references of {len(wrong)} of {len(errors)} tasks are wrong"
    )
    unsupported = len(left_out) - len(wrong)
    if unsupported:
        text += f", those of {unsupported} are not supported by the sandbox"
    if len(wrong) > WRONG_SHARE * len(errors) or len(left_out) == len(errors):
        raise CardError(
            f"{text}:\n{shown}\nA reference is a whole program that passes its own tests. Correct "
            "the rows, join what belongs together under codexhf.columns, or leave them out with "
            "`where`."
        )
    print(f"{text}; they are left out:\n{shown}", flush=True)
    kept = data.select([i for i, error in enumerate(errors) if not error])
    counts = {"dropped_as_wrong": len(wrong), "dropped_as_not_supported": unsupported}
    kept.stats = data.stats | {name: count for name, count in counts.items() if count}
    return kept


if __name__ == "__main__":
    from codexhf.check import main  # which imports this module under its own name

    main()
