"""What report.jinja shows in tables and takes more than a line to find."""

from collections.abc import Mapping, Sequence

from codexhf.report.comparison import Cell, cell, share_interval
from codexhf.report.manifests import Runs, folder_of, number, symbol


def numeric(rows: Sequence, column: int) -> bool:
    """Whether a column holds numbers; a row that is a string heads those after it."""
    return any(isinstance(row[column], Cell) for row in rows if not isinstance(row, str))


def plain(value) -> str:
    """A setting, or what was counted, on one line."""
    if isinstance(value, Mapping):
        parts = [f"{str(k).replace('_', ' ')} {plain(v)}" for k, v in sorted(value.items())]
        return ", ".join(parts) or "none"
    if isinstance(value, list):
        return ", ".join(map(plain, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() else f"{value:.6g}"
    return "–" if value is None else f"{value:,}" if type(value) is int else str(value)


def when(manifest: Mapping) -> str:
    return manifest["finished"][:16].replace("T", " ")


def accuracy(runs: Runs) -> Cell:
    """R's accuracy on held-out pairs, in percent."""
    share = number(runs.metrics("rm").get("eval_accuracy"))
    count = number(runs.stages["rm"]["data"].get("test", {}).get("rows"))
    ends = share_interval(share, count) if share is not None and count else None
    return cell(share, 1, 100, ends)


def agreement_rows(found: Mapping) -> list[list]:
    """Who, pairs, agreement in percent, coefficient and its value."""
    rates = [("all labellers", "alpha", found["people"])]
    rates += [(" and ".join(rate["labellers"]), "kappa", rate) for rate in found["two_by_two"]]
    rates += [(f"labellers and {who}", "kappa", rate) for who, rate in found["against"].items()]
    rows = []
    for who, name, rate in rates:
        (share, *ends), (value, *bounds) = (rate[k] or [None] for k in ("percent", name))
        cells = cell(rate["pairs"]), cell(share, 1, ends=ends), name, cell(value, 2, ends=bounds)
        rows.append([who, *cells])
    return rows


def training_rows(runs: Runs, trained: Sequence[str]) -> list[list]:
    """Size, steps, rows and tokens seen of every model."""
    kinds = {
        "optimizer steps": lambda m: number(m.get("steps")),
        "rows trained on": rows_seen,
        "tokens trained on": tokens_seen,
        "learning rate": lambda m: m["config"].get("learning_rate"),
    }
    rows = [["parameters", *(cell(runs.parameters(folder)) for folder in trained)]]
    for label, value in kinds.items():
        rows.append([label, *(Cell(plain(value(runs.stages[folder]))) for folder in trained)])
    return rows


def settings_rows(runs: Runs) -> list[list]:
    configs = [runs.config(folder) for folder in runs.stages]
    keys = sorted({key for config in configs for key in config})
    return [[key, *(plain(config.get(key, "–")) for config in configs)] for key in keys]


def rows_seen(manifest: Mapping) -> float | None:
    """Rows that went through training, from the trainer's summary (rate times seconds)."""
    metrics = manifest["metrics"]
    rate, seconds = (number(metrics.get(f"train_{k}")) for k in ("samples_per_second", "runtime"))
    return None if rate is None or seconds is None else round(rate * seconds)


def tokens_seen(manifest: Mapping) -> float | None:
    """Tokens as the trainer counted them; else rows times their length (packed) or mean length."""
    rows, metrics = rows_seen(manifest), manifest["metrics"]
    lengths = [x for row in manifest["history"] if (x := number(row.get("response/length")))]
    if manifest["stage"] == "pretrain":
        lengths = [number(manifest["config"].get("max_length")) or 0]
    mean = round(rows * sum(lengths) / len(lengths)) if rows and lengths else None
    return number(metrics.get("num_tokens", mean))


def made_from(runs: Runs, manifest: Mapping) -> str:
    """A stage's parents, and whether each is the one in this folder."""
    mark = {True: "\u00a0✓", False: "\u00a0✗ differs", None: ""}
    parents = [
        (symbol(folder_of(parent)) if "stage" in parent else parent["path"])
        + mark[runs.same(parent)]
        for parent in manifest["parents"].values()
    ]
    return ", ".join(parents) or "–"


def environment_rows(runs: Runs) -> list[list]:
    """Stages that ran on the same machine, commit and versions, in one row."""
    machines: dict[tuple, list[str]] = {}
    for name, manifest in runs.stages.items():
        found = manifest["environment"]
        threads = f"{found.get('processes')} × {found.get('threads')} threads"
        commit = str(found.get("git_commit") or "unknown")[:8]
        key = f"{found.get('device')}, {threads}", commit, plain(found["versions"])
        machines.setdefault(key, []).append(symbol(name))
    return [[", ".join(names), *key] for key, names in machines.items()]
