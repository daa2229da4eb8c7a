"""The sections of the page in their order, and those that are not comparison or curves."""

from collections.abc import Callable, Mapping
from pathlib import Path

from codexhf.report.blocks import Block, Heading, Num, Paragraph, Sample, Table, written
from codexhf.report.comparison import compare, comparison_blocks, headline, reward_model_blocks
from codexhf.report.curves import curve_blocks
from codexhf.report.manifests import STAGES, Runs, named, number, same_files, symbol, when

SAMPLES_SHOWN = 12


def sample_blocks(runs: Runs) -> list[Block]:
    samples = runs.answers.get("samples", [])
    if not samples:
        why = "evaluation/answers.json holds none" if runs.answers else "no evaluation/answers.json"
        return [Paragraph(f"No samples: {why}.", "note")]
    left = len(samples) - SAMPLES_SHOWN
    text = "The first problems of the held-out set and the first answer of each model, not picked."
    text += f" {left} more are in evaluation/answers.json." if left > 0 else ""
    blocks: list[Block] = [Paragraph(text, "note")]
    for row in samples[:SAMPLES_SHOWN]:
        parts = [("reference", "", "", row["reference"])]
        parts += [
            (symbol(name), name, str(row["verdicts"].get(name, "")), answer)
            for name, answer in row["answers"].items()
        ]
        blocks.append(Sample(row["prompt"], parts))
    return blocks


def data_blocks(runs: Runs) -> list[Block]:
    rows: list = []
    for name, manifest in runs.stages.items():
        for part, data in sorted(manifest["data"].items()):
            used = number(data.get("rows"))
            shown = "" if used is None else f", {used:,.0f} rows used"
            rows.append(f"{named(name)}, {part}{shown}{_notes(data)}")
            rows += [[c, *_card_cells(facts)] for c, facts in sorted(data["cards"].items())]
    columns = ["Card", "Wanted, %", "Got, %", "Tokens", "Read", "Kept", "Dropped", "Licence"]
    text = (
        "Wanted is the share of training tokens asked for, got the share that the mix holds; "
        "tokens are those in the mix, documents repeated or cut to fit the shares."
    )
    blocks: list[Block] = [Table(columns, rows), Paragraph(text, "note")]
    sentence = _tokenizer_sentence(runs)
    return blocks + ([Paragraph(sentence, "note")] if sentence else [])


def _notes(data: Mapping) -> str:
    notes = data.get("notes")
    if not isinstance(notes, dict) or not notes:
        return ""
    return "; " + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in sorted(notes.items()))


def _card_cells(facts: Mapping) -> list[str | Num | None]:
    def share(key):
        value = number(facts.get(key))
        return Num(None if value is None else 100 * value, 1)

    dropped = facts.get("dropped")
    dropped = dropped if isinstance(dropped, dict) else {}
    return [
        share("share_requested"),
        share("share_realised"),
        *(Num(number(facts.get(key))) for key in ("tokens", "rows_read", "rows")),
        "; ".join(f"{n:,} {why}" if isinstance(n, int) else f"{n} {why}"
                  for why, n in sorted(dropped.items())) or "none",
        str(facts.get("license", "–")),
    ]  # fmt: skip


def _tokenizer_sentence(runs: Runs) -> str:
    metrics = runs.metrics("tokenizer")
    size = number(metrics.get("vocab_size"))
    if size is None:
        return ""
    rates = [
        f"{written(value, 2)} bytes per token on {key[16:]}"
        for key, raw in sorted(metrics.items())
        if key.startswith("bytes_per_token_") and (value := number(raw)) is not None
    ]
    return f"Tokenizer: {'; '.join([f'{size:,.0f} tokens', *rates])}."


def time_blocks(runs: Runs) -> list[Block]:
    kinds = ("train_s", "evaluate_s", "work_s")
    rows: list = []
    totals = {}
    for name, manifest in runs.stages.items():
        wall = {k: number(v) for k, v in manifest["wall_s"].items()}
        totals[name] = sum(wall.values())
        rows.append(
            [
                named(name),
                *(Num(wall.get(kind), 1) for kind in kinds),
                Num(totals[name], 1),
                Num(number(manifest.get("steps"))),
                Num(number(manifest.get("peak_memory_gib")), 2),
            ]
        )
    peaks = [number(m.get("peak_memory_gib")) for m in runs.stages.values()]
    sums = [
        sum(number(m["wall_s"].get(kind)) or 0.0 for m in runs.stages.values()) for kind in kinds
    ]
    whole = sum(totals.values())
    top = max((p for p in peaks if p is not None), default=None)
    rows.append(["together", *(Num(s, 1) for s in sums), Num(whole, 1), None, Num(top, 2)])
    columns = ["Stage", "Train, s", "Evaluate, s", "Work, s", "Total, s", "Steps", "Memory, GiB"]
    text = (
        f"Together {duration(whole)}. The training of a stage that was resumed counts all its "
        "starts, without what a kill lost; memory is the main process's peak in the last one, and "
        "that of all stages the highest of theirs."
    )
    return [Table(columns, rows), Paragraph(text, "note")]


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    minutes = seconds / 60
    return f"{minutes:.1f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"


def lineage_blocks(runs: Runs) -> list[Block]:
    rows = []
    for name, manifest in runs.stages.items():
        environment, config = manifest["environment"], manifest["config"]
        processes, threads = (environment.get(k, "?") for k in ("processes", "threads"))
        device = f"{environment.get('device', '?')}, {processes} × {threads}\u00a0threads"
        rows.append(
            [
                named(name),
                _short(_weights(manifest)),
                "; ".join(_parent_text(runs, n, p) for n, p in manifest["parents"].items())
                or "none",
                _short(str(environment.get("git_commit") or "unknown")),
                str(config.get("seed", "default")),
                device,
                str(manifest["metrics"].get("isolation", "–")),
                when(manifest),
            ]
        )
    columns = ["Stage", "Weights", "Made from", "Commit", "Seed", "Device", "Isolation", "Finished"]
    versions: dict[str, list[str]] = {}
    for name, manifest in runs.stages.items():
        text = ", ".join(f"{k} {v}" for k, v in sorted(manifest["environment"]["versions"].items()))
        versions.setdefault(text, []).append(symbol(name))
    return [
        Table(columns, rows, kind="prose"),
        Paragraph("✓ by its sha256 the parent is the one in this folder.", "note"),
        *(Paragraph(f"{', '.join(names)}: {text}.", "note") for text, names in versions.items()),
    ]


def _weights(manifest: Mapping) -> str:
    """sha256 of the stage's result: its weights, or else its first data file."""
    files = manifest["files"]
    for suffix in (".safetensors", "tokenizer.json", ".jsonl", "answers.json"):
        for name in sorted(files):
            if name.endswith(suffix) and "/" not in name:
                return str(files[name].get("sha256", "–"))
    return "–"


def _short(digest: str) -> str:
    return digest[:8]


def _parent_text(runs: Runs, name: str, parent: Mapping) -> str:
    path = str(parent.get("path", name))
    stage = Path(path).name
    hashes = parent.get("sha256")
    if not isinstance(hashes, dict) or not hashes:
        return f"{path} (no hash)"
    first = _short(str(next(iter(hashes.values()))))
    mark = {True: "\u00a0✓", False: "\u00a0✗ differs", None: ""}[same_files(runs, stage, hashes)]
    return f"{symbol(stage)}\u00a0{first}{mark}"


def cautions(runs: Runs) -> list[str]:
    """What a reader must know before believing the page: gaps, and stages that do not fit."""
    out = []
    if runs.missing:
        out.append(f"Missing: {', '.join(runs.missing)} (no manifest.json, so not finished).")
    for name, manifest in runs.stages.items():
        for parent in manifest["parents"].values():
            stage, hashes = Path(str(parent.get("path", ""))).name, parent.get("sha256")
            if isinstance(hashes, dict) and hashes and same_files(runs, stage, hashes) is False:
                out.append(
                    f"{name} was made from another {stage} than the one in this folder: their "
                    "sha256 differ. Run it again before comparing."
                )
    return out


def title_of(runs: Runs) -> tuple[str, str]:
    """What was trained, and when, on what."""
    config = runs.config("m0")
    shape = config.get("architecture")
    trained = [STAGES[s] for s in ("m0", "m1", "rm", "m2") if s in runs.stages]
    what = str(config.get("model") or shape or "codexhf")
    size = []
    if not config.get("model") and isinstance(shape, dict):
        what = str(shape.get("model_type", "model")).capitalize()
        size = [
            f"{shape[key]:,} {name}"
            for key, name in (("num_hidden_layers", "layers"), ("hidden_size", "wide"))
            if isinstance(shape.get(key), int)
        ]
    vocabulary = number(runs.metrics("tokenizer").get("vocab_size"))
    size += [f"vocabulary {vocabulary:,.0f}"] if vocabulary else []
    context = number(config.get("max_length"))
    size += [f"context {context:,.0f}"] if context else []
    title = f"{what}: {', '.join(trained)}" if trained else what
    times = sorted(when(m) for m in runs.stages.values())
    devices = sorted({str(m["environment"].get("device", "?")) for m in runs.stages.values()})
    span = times[0] if times[0] == times[-1] else f"{times[0]} to {times[-1]}"
    if times[0][:10] == times[-1][:10] and times[0] != times[-1]:
        span = f"{times[0]} to {times[-1][11:]}"
    dates = f"Finished {span} UTC on {', '.join(devices)}."
    return title, (f"{', '.join(size).capitalize()}. " if size else "") + dates


def build(runs: Runs) -> tuple[str, list[Block]]:
    """The page's title and its blocks, in order."""
    title, dateline = title_of(runs)
    c = compare(runs)
    finding, sure = headline(c)
    blocks: list[Block] = [Paragraph(dateline, "dateline"), Paragraph(finding, "headline")]
    blocks += [Paragraph(text) for text in sure]
    blocks += [Paragraph(text, "caution") for text in cautions(runs)]
    sections: tuple[tuple[str, Callable[[], list[Block]]], ...] = (
        ("Comparison", lambda: comparison_blocks(runs, c)),
        ("Reward model", lambda: reward_model_blocks(runs)),
        ("Curves", lambda: curve_blocks(runs)),
        ("Samples", lambda: sample_blocks(runs)),
        ("Data", lambda: data_blocks(runs)),
        ("Time and memory", lambda: time_blocks(runs)),
        ("Lineage", lambda: lineage_blocks(runs)),
    )
    for name, section in sections:
        blocks += [Heading(name), *section()]
    return title, blocks
