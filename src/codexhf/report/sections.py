"""The report as data: what page.html.jinja and page.md.jinja write down, in the same order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from codexhf.lineage import BY_FOLDER
from codexhf.picture import Row, digest_of, picture
from codexhf.report.charts import CHARTS, Chart, charts_of
from codexhf.report.comparison import (
    Cell,
    Comparison,
    cell,
    group_rows,
    groupings,
    headline,
    rows_of,
    sampled,
    share_interval,
    written,
)
from codexhf.report.manifests import CARDS, STATS, Runs, folder_of, number, symbol

U = {"alpha_sft": "L_SFT", "beta_rlhf": "L_RLHF", "gamma_reg": "Ω"}


@dataclass(frozen=True)
class Table:
    """Rows of cells (text or Cell); a row that is a string heads those after it."""

    columns: Sequence[str]
    rows: Sequence
    folded: str = ""  # the title of a table that is shown on demand

    @property
    def numeric(self) -> list[bool]:
        rows = [row for row in self.rows if not isinstance(row, str)]
        return [any(isinstance(x, Cell) for x in column) for column in zip(*rows, strict=True)]


@dataclass(frozen=True)
class Section:
    """A part of the report; what it has is shown in this order."""

    title: str
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    samples: Sequence[tuple[str, list]] = ()  # prompt, [(who, verdict, text)]
    picture: Sequence[Row] = ()  # of the lineage


def report_of(runs: Runs) -> dict:
    """Title, finding, cautions and sections of the report."""
    c = Comparison(runs)
    finding, sure = headline(c)
    trained = [folder for folder in CHARTS if folder in runs.stages]
    sections = [
        comparison(runs, c) if c.models else Section("Comparison", notes=["No evaluation yet."]),
        *([where_from(c)] if groupings(c.tasks) else []),
        *([reward_model(runs)] if "rm" in trained else []),
        *([labellers(runs)] if runs.agreement else []),
        *(learning(runs, folder) for folder in reversed(trained)),
        samples(c),
        *([training(runs, trained)] if trained else []),
        data(runs),
        lineage(runs),
        environment(runs),
    ]
    bases = runs.bases()
    first = trained[0] if trained else ""
    base = runs.config("m0").get("model") if first == "m0" else bases.get(first)
    made = ", ".join(map(symbol, trained or runs.stages))
    seconds = sum(sum(m["wall_s"].values()) for m in runs.stages.values())
    times = sorted(map(when, runs.stages.values()))
    return {
        "title": f"{made}, from {base or 'random weights'}" if trained else made,
        "dateline": f"Finished {times[0]} to {times[-1]} UTC, {seconds / 60:,.1f} minutes of work.",
        "finding": finding,
        "sure": sure,
        "cautions": cautions(runs, bases),
        "sections": sections,
    }


def cautions(runs: Runs, bases: Mapping[str, str]) -> list[str]:
    """What a reader must know before believing the report: gaps, and stages that do not fit."""
    missing, out = runs.missing(), []
    if missing:
        out.append(f"Missing: {', '.join(missing)} (no manifest.json, so not finished).")
    without = [f for f in BY_FOLDER if f not in runs.stages and f not in missing]
    if without:
        made = [f"{folder} was made from {base}" for folder, base in bases.items()]
        out.append("; ".join([f"Not part of this lineage: {', '.join(without)}", *made]) + ".")
    for name, manifest in runs.stages.items():
        if manifest.get("isolation") == "none":
            out.append(f"{name} ran model-written code without isolation: it can fake verdicts.")
        for parent in manifest["parents"].values():
            if runs.same(parent) is False:
                out.append(
                    f"{name} was made from another {folder_of(parent)} than the one in "
                    "this folder: their sha256 differ. Run it again before comparing."
                )
    for name, labeller in runs.agreement.get("labellers", {}).items():
        if labeller.get("no_signal") and runs.learned_from_people():
            out.append(
                f"R was trained on labels of {name}, which carry no signal: shuffled, they agree "
                "with the others, the tests and R as often."
            )
    return out


def columns_of(c: Comparison) -> list[str]:
    return [*map(symbol, c.models), *(f"{symbol(m)} − {symbol(p)}" for p, m in c.pairs)]


def comparison(runs: Runs, c: Comparison) -> Section:
    reference = symbol(Path(str(c.config.get("reference"))).name)
    notes = [
        "↑ higher is better, ↓ lower is better. [95% intervals] in brackets. A bold difference "
        f"excludes zero, task by task. {written(c.task_count)} tasks; "
        f"{c.config.get('num_samples')} answers each; temperature {c.config.get('temperature')}; "
        f"code run behind {runs.stages['evaluation'].get('isolation')}; KL against {reference}; "
        "in wins a tie counts half. U = "
        + " + ".join(f"{c.config.get(weight)} {term}" for weight, term in U.items())
        + f", Ω being {c.config.get('kl_coef')} KL."
    ]
    for model in c.models:
        if (c.value(model, "kl") or 0) < 0:
            notes.append(
                f"The KL of {symbol(model)} is negative, which only its estimate from sampled "
                "answers can be. Near zero the two models hardly differ; an interval below zero "
                "says that the answers were not drawn from the distribution they were scored with."
            )
    return Section("Comparison", tables=[Table(["", *columns_of(c)], rows_of(c))], notes=notes)


def where_from(c: Comparison) -> Section:
    tables = [
        Table([f"By the {way}", "Tasks", *columns_of(c)], group_rows(c, groups))
        for way, groups in groupings(c.tasks).items()
    ]
    note = "pass@1, %, of each kind of task. A gain over all may come from one kind alone."
    return Section("Where the difference comes from", tables=tables, notes=[note])


def reward_model(runs: Runs) -> Section:
    metrics, pairs = runs.metrics("rm"), runs.metrics("prefs")
    test = runs.stages["rm"]["data"].get("test", {})
    accuracy, count = number(metrics.get("eval_accuracy")), number(test.get("rows"))
    ends = share_interval(accuracy, count) if accuracy is not None and count else None
    rows = [["accuracy on held-out pairs, % ↑", cell(accuracy, 1, 100, ends)]]
    for label, key in (
        ("margin, chosen minus rejected ↑", "eval_margin"),
        ("loss on held-out pairs ↓", "eval_loss"),
        ("mean score of M1's answers", "score_mean"),
        ("standard deviation of those scores", "score_std"),
    ):
        rows.append([label, cell(number(metrics.get(key)), 3)])
    notes = [f"Preference pairs: {plain(pairs)}."] if pairs else []
    return Section("Reward model", tables=[Table(["", "R"], rows)], notes=notes)


def labellers(runs: Runs) -> Section:
    """How far people agree: among each other, with the tests, with R; and whose labels say nothing.

    From labels/agreement.json as the last export wrote it; the page /agreement shows it live.
    """
    found = runs.agreement
    people = found["people"]

    def row(who: str, rate: Mapping, coefficient: str) -> list:
        share, *ends = rate["percent"] or [None]
        value, *bounds = rate[coefficient] or [None]
        cells = cell(share, 1, ends=ends or None), cell(value, 2, ends=bounds or None)
        return [who, cell(rate["pairs"]), cells[0], coefficient, cells[1]]

    rows = [row("all labellers", people, "alpha")]
    rows += [row(" and ".join(r["labellers"]), r, "kappa") for r in found["two_by_two"]]
    rows += [row(f"labellers and {name}", r, "kappa") for name, r in found["against"].items()]
    each = [
        [
            name,
            {None: "too few labels to tell", True: "none", False: "yes"}[r.get("no_signal")],
            cell(r["labels"]),
            cell(r["skipped"]),
            cell(r["seconds"], 1),
            cell(number(r.get("left_percent"))),
            str(r.get("compared_with") or "–"),
            cell(number(r.get("agrees_percent"))),
        ]
        for name, r in found["labellers"].items()
    ]
    notes = [
        f"{found['labels']} labels on {found['pairs']} pairs. Among labellers: {people['reading']}."
        " [95% intervals] over pairs; alpha is Krippendorff's, kappa Cohen's. No signal: the same "
        "labels, shuffled over the pairs, agree as often with the others, the tests and R.",
    ]
    if "rm" in runs.stages and not runs.learned_from_people():
        notes.append("R was not trained on these labels: labels/train.jsonl is not among its data.")
    columns = ["Labeller", "Signal", "Labels", "Skipped", "Seconds each", "Chose left, %"]
    tables = [
        Table(["Agreement", "Pairs", "Agree, %", "", "Coefficient"], rows),
        Table([*columns, "Agrees most with", "In, %"], each),
    ]
    return Section("Labels by people", tables=[t for t in tables if t.rows], notes=notes)


def learning(runs: Runs, folder: str) -> Section:
    charts = charts_of(folder, runs.stages[folder])
    notes = [] if charts else [f"{folder}/manifest.json holds no history to draw."]
    if any(chart.wide for chart in charts):
        notes.append(
            "A proxy that rises while gold falls is over-optimisation. The dotted line marks the "
            "weights that were kept."
        )
    return Section(f"Learning curves of {BY_FOLDER[folder].title}", charts, notes=notes)


def samples(c: Comparison) -> Section:
    if not c.tasks:
        return Section(
            "Samples", notes=["None: evaluation/answers.json is not there, or without tasks."]
        )
    seed = c.config.get("seed")
    chosen, kinds = sampled(c, c.config.get("samples_in_report", 6), seed)
    shown = []
    for i in chosen:
        parts = [("reference", "", str(c.tasks[i].get("reference") or "none is known"))]
        for model in c.models:
            raw = c.answers[model]
            parts.append((symbol(model), raw["verdicts"][i][0], raw["answers"][i][0]))
        shown.append((c.tasks[i]["prompt"], parts))
    counts = ", ".join(f"{kind} {len(members):,}" for kind, members in kinds.items())
    note = (
        f"First answers. From {' to '.join(map(symbol, c.models[-2:]))}, tasks went: {counts}. "
        f"These kinds take turns here, each in an order drawn with seed {seed}: the samples show "
        "every kind, not how frequent it is."
    )
    return Section("Samples", samples=shown, notes=[note])


def training(runs: Runs, trained: Sequence[str]) -> Section:
    """Size, steps, rows and tokens seen, and the settings of every model."""
    manifests = [runs.stages[folder] for folder in trained]
    rows = [["parameters", *(cell(runs.parameters(folder)) for folder in trained)]]
    rows += [
        [label, *(Cell(plain(value_of(m))) for m in manifests)]
        for label, value_of in (
            ("optimizer steps", lambda m: number(m.get("steps"))),
            ("rows trained on", rows_seen),
            ("tokens trained on", tokens_seen),
            ("learning rate", lambda m: m["config"].get("learning_rate")),
        )
    ]
    configs = [runs.config(folder) for folder in runs.stages]
    settings = [
        [key, *(plain(config.get(key, "–")) for config in configs)]
        for key in sorted({key for config in configs for key in config})
    ]
    columns = ["", *map(symbol, runs.stages)]
    folded = Table(columns, settings, "All settings that are not the library's defaults")
    note = (
        "A row counts each time it was trained on; PPO's rows are episodes and its tokens those "
        "of their answers."
    )
    return Section(
        "Training", tables=[Table(["", *map(symbol, trained)], rows), folded], notes=[note]
    )


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


def data(runs: Runs) -> Section:
    rows: list = []
    for name, manifest in runs.stages.items():
        unit = "characters" if name == "tokenizer" else "tokens"
        for part, record in sorted(manifest["data"].items()):
            if not record[CARDS]:
                continue
            head = f"{symbol(name)}, {part}: {written(number(record.get('rows')))} rows"
            seen = rows_seen(manifest) if part in ("train", "prompts") else None
            head += f" in the mix, {written(seen)} trained on" if seen else ""
            rows.append(f"{head}; {plain(record[STATS])}" if record[STATS] else head)
            for card, stats in sorted(record[CARDS].items()):
                shares = [number(stats.get(f"share_{k}")) for k in ("requested", "realised")]
                size = number(stats.get("tokens"))
                rows.append(
                    [
                        card,
                        *(cell(share, 1, 100) for share in shares),
                        "–" if size is None else f"{written(size)} {unit}",
                        *(cell(number(stats.get(k))) for k in ("rows_read", "rows")),
                        plain(stats.get("dropped", {})),
                        str(stats.get("license", "–")),
                    ]
                )
    columns = ["Card", "Wanted, %", "Got, %", "In the mix", "Read", "Kept", "Dropped", "Licence"]
    notes = [
        "Wanted is the share asked for, got the one of the mix, where documents are repeated or "
        "cut to fit. Read, kept and dropped count the source's rows."
    ]
    if metrics := runs.metrics("tokenizer"):
        notes.append(f"Tokenizer: {plain(metrics)}.")
    return Section("Data", tables=[Table(columns, rows)], notes=notes)


def lineage(runs: Runs) -> Section:
    rows = []
    for name, manifest in runs.stages.items():
        parents = [
            (symbol(folder_of(p)) if "stage" in p else p["path"])
            + {True: "\u00a0✓", False: "\u00a0✗ differs", None: ""}[runs.same(p)]
            for p in manifest["parents"].values()
        ]
        wall = [number(manifest["wall_s"].get(k)) for k in ("train_s", "evaluate_s", "work_s")]
        rows.append(
            [
                symbol(name),
                digest_of(manifest["files"]),
                ", ".join(parents) or "–",
                str(manifest.get("isolation") or "–"),
                *(cell(seconds, 1) for seconds in wall),
                cell(number(manifest.get("peak_memory_gib")), 2),
                when(manifest),
            ]
        )
    columns = ["Stage", "Weights", "Made from", "Isolation", "Train, s", "Evaluate, s"]
    columns += ["Work, s", "Memory, GiB", "Finished, UTC"]
    drawn = picture({name: m for name, m in runs.stages.items() if name != "evaluation"})
    note = (
        "Eight digits begin a sha256: of what the stage made, and of the rows that it read. "
        "✓ the parent is the one in this folder. Isolation: what stood between model-written code "
        "and the machine. Times count all starts of a resumed stage, without what a kill lost; "
        "memory is the main process's peak."
    )
    tables = [Table(columns, rows)]
    return Section("Lineage, time and memory", tables=tables, notes=[note], picture=drawn)


def environment(runs: Runs) -> Section:
    machines: dict[tuple, list[str]] = {}
    for name, manifest in runs.stages.items():
        found = manifest["environment"]
        threads = f"{found.get('processes')} × {found.get('threads')} threads"
        machine = f"{found.get('device')}, {threads}"
        key = machine, str(found.get("git_commit") or "unknown")[:8], plain(found["versions"])
        machines.setdefault(key, []).append(symbol(name))
    rows = [[", ".join(names), *key] for key, names in machines.items()]
    return Section("Environment", tables=[Table(["Stages", "Machine", "Commit", "Versions"], rows)])


def when(manifest: Mapping) -> str:
    return manifest["finished"][:16].replace("T", " ")


def plain(value) -> str:
    """A setting, or what was counted, on one line."""
    if isinstance(value, Mapping) and not value:
        return "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{str(k).replace('_', ' ')} {plain(v)}" for k, v in sorted(value.items()))
    if isinstance(value, list):
        return ", ".join(map(plain, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() else f"{value:.6g}"
    return "–" if value is None else f"{value:,}" if type(value) is int else str(value)
