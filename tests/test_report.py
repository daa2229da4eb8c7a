"""The report: what it claims, what it refuses, and that no text becomes markup.

Built on the manifests of a real run: every recipe with its smoke settings on a few rows.

python -m pytest tests/test_report.py
"""

import copy
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from codexhf.checkpoints import sealed
from codexhf.execution import executor
from codexhf.lineage import BY_FOLDER, STAGES
from codexhf.report import charts, comparison
from codexhf.report.__main__ import CHARACTERS_SHOWN, cut, main, render, visible
from codexhf.report.comparison import (
    Comparison,
    groupings,
    headline,
    paired,
    sampled,
    share_interval,
    written,
)
from codexhf.report.manifests import CARDS, STATS, TASKS, ReportError, Runs
from codexhf.report.sections import rows_seen

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "data_cards/python_tasks"
HOSTILE = (
    "<script>alert(1)</script></style></pre><img src=x onerror=alert(1)>&lt;b&gt;&#60;\x00\x1b[31m"
    "\x85\ud800\u202egnp.exe\ufffe\r\n```\n~~~~\n| a | b |\n[x](javascript:alert(1)) {{ 7*7 }} $x"
)


# -- a real run --------------------------------------------------------------------------------


def write_card(folder, name, type, rows, **own):
    """Write a card of the rows (or of so many of the shipped ones); returns its path."""
    if isinstance(rows, int):
        rows = [json.loads(x) for x in (ROWS / f"{name}.jsonl").read_text().splitlines()[:rows]]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    load = {"path": "json", "data_files": f"{name}.jsonl"}
    head = {"license": "mit", "codexhf": {"type": type, "load": load, **own}}
    body = f"# {name}\n## Provenance\nMade here.\n## Known problems\nNone.\n"
    (folder / f"{name}.md").write_text(f"---\n{json.dumps(head)}\n---\n{body}")
    return folder / f"{name}.md"


def run_stages(folder):
    """Run every recipe in this process: smoke settings, 48 demonstrations, 24 held-out tasks."""
    text = [{"text": p.read_text()[:6000]} for p in sorted(Path(json.__file__).parent.glob("*.py"))]
    texts = [{"text": f"# {i}\n{row['text']}"} for i, row in enumerate(text * 6)]
    corpus = write_card(folder, "corpus", "language-modeling", texts, heldout=0.2)
    demonstrations = write_card(folder, "demonstrations", "prompt-completion", 48)
    prompts = write_card(folder, "prompts", "prompt-only", 32)
    validation = write_card(folder, "validation", "prompt-only", 8)
    columns = {c: c for c in ("id", "prompt", "completion", "tests", "entry_point")}
    heldout = write_card(folder, "heldout", "prompt-only", 24, columns=columns | {"group": "tier"})
    runs = folder / "runs"
    corpora = ["--train_cards", corpus, "--weights", "1.0"]
    exclude = ["--exclude_cards", validation, heldout]
    argv = {
        "tokenizer": [*corpora, "--chat_cards", demonstrations, *exclude],
        "pretrain": ["--tokenizer", runs / "tokenizer", *corpora, *exclude],
        "sft": ["--model", runs / "m0", "--train_cards", demonstrations, "--eval_cards", validation]
        + exclude,
        "preferences": ["--model", runs / "m1", "--prompt_cards", prompts, *exclude],
        "reward_model": ["--model", runs / "m1", "--train_cards", runs / "prefs"]
        + ["--eval_cards", runs / "prefs/test.md"],
        "ppo": ["--model", runs / "m1", "--reward_model", runs / "rm"]
        + ["--prompt_cards", runs / "prefs/prompts.md", "--sft_cards", demonstrations]
        + ["--eval_cards", validation, *exclude],
        "evaluation": ["--models", *(runs / m for m in ("m0", "m1", "m2")), "--text_cards", corpus]
        + ["--reference", runs / "m1", "--reward_model", runs / "rm", "--heldout_cards", heldout],
    }
    executor._default = None  # else a stage that runs no code reports what other tests ran behind
    for stage in STAGES:
        path = ROOT / f"recipes/{stage.name}.py"
        spec = importlib.util.spec_from_file_location(f"recipe_{stage.name}", path)
        recipe = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(recipe)
        words = ["--config", path.parent / f"smoke/{stage.name}.yaml", *argv[stage.name]]
        recipe.main([*map(str, words), "--output_dir", str(runs / stage.folder)])
    return runs


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """The folder of a real run of all stages."""
    return run_stages(tmp_path_factory.mktemp("report"))


def test_evaluation_writes_the_tasks(real):
    rows = map(json.loads, (real.parent / "heldout.jsonl").read_text().splitlines())
    written = json.loads((real / "evaluation/answers.json").read_text())["tasks"]
    assert [(task["prompt"], task["reference"]) for task in written] == [
        (row["prompt"], row["completion"]) for row in rows
    ]
    assert all(task["group"] for task in written)


@pytest.fixture(scope="session")
def records(real):
    """Its manifests by folder, and the answers, as they were written."""
    found = {s.folder: json.loads((real / s.folder / "manifest.json").read_text()) for s in STAGES}
    return found | {"answers": json.loads((real / "evaluation/answers.json").read_text())}


@pytest.fixture
def runs(records):
    """A copy of the real records to change; pass rates as a better run would have them."""
    changed = copy.deepcopy(records)
    with_rates(changed, {"m0": 0.0, "m1": 0.4, "m2": 0.8})
    return changed


def with_rates(records, rates, seed=3):
    """Draw the verdicts of every model anew, and put the metrics in line with them."""
    draw = random.Random(seed)
    metrics = records["evaluation"]["metrics"]
    for name, rate in rates.items():
        groups = records["answers"]["all"][name]["verdicts"]
        groups[:] = [["pass" if draw.random() < rate else "fail" for _ in g] for g in groups]
        flat = [v for g in groups for v in g]
        share = flat.count("pass") / len(flat)
        metrics |= {f"{name}/pass@1": share, f"{name}/pass@1_low": max(0, share - 0.1)}
        metrics |= {f"{name}/pass@1_high": min(1, share + 0.1)}
        metrics[f"{name}/verdicts"] = {v: flat.count(v) for v in set(flat)}


def save(folder, records):
    """Write records as stages do, and the answers' sha256 where the evaluation lists it."""
    records = copy.deepcopy(records)
    if "answers" in records:
        text = json.dumps(records.pop("answers"))
        (folder / "evaluation").mkdir(parents=True, exist_ok=True)
        (folder / "evaluation/answers.json").write_text(text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        records["evaluation"]["files"]["answers.json"]["sha256"] = digest
    for name, manifest in records.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "manifest.json").write_text(json.dumps(sealed(manifest)))
    return folder


def report(folder, records):
    """(HTML, Markdown) of some records, without charts: they take two seconds."""
    plain = {k: v | {"history": []} if k in BY_FOLDER else v for k, v in records.items()}
    files = render(save(folder, plain))
    return files["report.html"], files["report.md"]


def compared(records):
    manifests = {name: records[name] for name in BY_FOLDER if name in records}
    return Comparison(Runs(manifests, records.get("answers", {})))


def row_of(text, label, head=""):
    """Cells of a table's row in the Markdown, the label left out; after a heading if given."""
    line = next(x for x in text[text.index(head) :].splitlines() if x.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


@pytest.fixture(scope="session")
def rendered(real):
    """(HTML, Markdown) of the real run, by the command."""
    assert main([str(real)]) is None
    return (real / "report.html").read_text(), (real / "report.md").read_text()


# -- what it claims ----------------------------------------------------------------------------


def differing(monkeypatch, **gaps):
    """Let the paired differences of M1 and M2 be these."""
    monkeypatch.setattr(
        Comparison,
        "gap",
        lambda self, parent, model, key="pass@1", members=None: (
            None if members is not None else gaps.get(key.replace("@", ""))
        ),
    )


def with_metrics(records, **rates):
    metrics = {f"{model}/pass@1": rate for model, rate in rates.items()}
    config = {"models": [f"runs/{model}" for model in rates]}
    records["evaluation"] |= {"metrics": metrics | {TASKS: 400}, "config": config}
    return compared(records)


def test_headline_says_that_m2_is_better(runs, monkeypatch):
    differing(monkeypatch, pass1=(0.192, 0.1504, 0.2336))
    assert headline(with_metrics(runs, m0=0.0, m1=0.52, m2=0.712)) == (
        "M2 passes 71.2% of 400 held-out tasks, M1 52.0% (+19.2 points), M0 0.0%.",
        [
            "Task by task the difference is +15.0 to +23.4 points (95% interval), which excludes "
            "zero."
        ],
    )


def test_headline_says_that_m2_is_worse(runs, monkeypatch):
    differing(monkeypatch, pass1=(-0.12, -0.16, -0.08), reward=(0.5, 0.4, 0.6))
    sentence, sure = headline(with_metrics(runs, m0=0.0, m1=0.52, m2=0.4))
    assert sentence.startswith("M2 is worse than M1: M2 passes 40.0%")
    assert "M1 52.0% (−12.0 points)" in sentence
    assert "−16.0 to −8.0 points (95% interval), which excludes zero" in sure[0]
    assert "over-optimised" in sure[1] and "+0.50" in sure[1]


def test_headline_says_that_a_difference_may_be_chance(runs, monkeypatch):
    differing(monkeypatch, pass1=(0.02, -0.01, 0.05))
    assert headline(with_metrics(runs, m1=0.52, m2=0.54))[1] == [
        "Task by task the difference is −1.0 to +5.0 points (95% interval), which includes zero: "
        "it may be chance."
    ]


def test_headline_claims_nothing_without_numbers(runs):
    del runs["answers"]
    assert "may be chance" in headline(compared(runs))[1][0]
    zero = headline(with_metrics(runs, m0=0.0, m1=0.0, m2=0.0))
    assert "(no difference)" in zero[0] and "compares nothing" in zero[1][0]
    assert "no other model" in headline(with_metrics(runs, m1=0.4))[0]
    del runs["evaluation"]
    assert "no evaluation" in headline(compared(runs))[0]


def test_models_of_one_name_are_told_apart(runs, records, tmp_path):
    models = ["runs/seed-42/m1", "runs/seed-43/m1"]
    names = [path.removeprefix("runs/") for path in models]
    found = {k[3:]: v for k, v in runs["evaluation"]["metrics"].items() if k.startswith("m1/")}
    runs["evaluation"]["metrics"] = {f"{n}/{k}": v for n in names for k, v in found.items()}
    runs["evaluation"]["config"]["models"] = models
    runs["answers"]["all"] = {n: runs["answers"]["all"]["m1"] for n in names}
    for task in runs["answers"]["tasks"]:
        task["reference"] = None
    assert compared(runs).models == names
    text = report(tmp_path, runs)[1]
    assert "seed-43/m1 passes" in text and "none is known" in text
    assert (
        f"of {records['evaluation']['metrics'][TASKS]} held-out" in headline(compared(records))[0]
    )


def test_paired_difference_by_hand():
    before, after = [[0, 1], [1, 1], [0, 0], [0, 0]], [[1, 1], [1, 1], [0, 1], [0, 0]]
    # gaps .5 0 .5 0: mean .25, deviation sqrt(1/12), half 1.96 sqrt(1/12) / 2
    half = 1.96 * math.sqrt(1 / 12) / 2
    assert paired(before, after) == pytest.approx((0.25, 0.25 - half, 0.25 + half))
    assert paired(before, after[:3]) is None
    assert paired([], []) is None
    assert paired([[0.0], [math.inf]], [[1.0], [1.0]]) is None


def test_share_interval_known_values():
    # Wilson's score interval: 0 of 10 is 0 to 0.2775, 4 of 4 is 0.5101 to 1.
    assert share_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert share_interval(1.0, 4) == pytest.approx((0.5101, 1.0), abs=1e-4)


def test_differences_are_those_of_the_answers(runs):
    c = compared(runs)
    gap = c.gap("m1", "m2")
    assert gap[0] == pytest.approx(c.value("m2", "pass@1") - c.value("m1", "pass@1"))
    assert gap[1] < gap[0] < gap[2]
    raw = runs["answers"]["all"]
    mean = [sum(sum(g) for g in raw[m]["rewards"]) / 48 for m in ("m1", "m2")]
    assert c.gap("m1", "m2", "reward")[0] == pytest.approx(mean[1] - mean[0])
    assert c.gap("m1", "m2", "kl") is None


def test_bold_marks_only_differences_that_exclude_zero(runs, tmp_path):
    with_rates(runs, {"m0": 0.1, "m1": 0.5, "m2": 0.5})
    c = compared(runs)
    assert c.gap("m0", "m1")[1] > 0 and c.gap("m1", "m2")[1] < 0 < c.gap("m1", "m2")[2]
    page, text = report(tmp_path, runs)
    cells = row_of(text, "pass@1 ↑")
    assert cells[3].startswith("**+") and not cells[4].startswith("**")
    assert page.count("<strong>") > 0


def test_every_metric_is_shown(runs, tmp_path):
    metrics = runs["evaluation"]["metrics"]
    metrics |= {f"m{i}/invented": 0.5 for i in range(3)}
    ours = [k for k in metrics if "/" in k and not k.endswith("/verdicts")]
    for i, key in enumerate(ours):  # values that can be told apart in every format
        metrics[key] = 40.5 + i
    text = report(tmp_path, runs)[1]
    assert len(ours) > 50
    for key in ours:
        formats = [f"{metrics[key]:.1f}", f"{100 * metrics[key]:,.1f}"]
        assert any(re.search(rf"(?<![\d,.]){re.escape(f)}", text) for f in formats), key
    assert "code run behind " + runs["evaluation"]["isolation"] in text
    assert "U = 0.1 L_SFT + 1.0 L_RLHF + 1.0 Ω, Ω being 0.03 KL" in text


def test_verdicts_are_shares_of_each_model(runs, tmp_path):
    metrics = runs["evaluation"]["metrics"]
    metrics |= {"m0/verdicts": {"fail": 3, "timeout": 1}, "m1/verdicts": {"pass": 2}}
    metrics |= {"m2/verdicts": {"pass": 1, "fail": 1}}
    text = report(tmp_path, runs)[1]
    head = "Verdicts on sampled"
    assert row_of(text, "pass", head) == ["0.0", "100.0", "50.0", "+100.0", "−50.0"]
    assert row_of(text, "fail", head) == ["75.0", "0.0", "50.0", "−75.0", "+50.0"]
    assert row_of(text, "timeout", head)[0] == "25.0"


def test_negative_kl_is_explained(runs, tmp_path):
    runs["evaluation"]["metrics"] |= {"m1/kl": 0.0, "m2/kl": -0.02}
    assert "The KL of M2 is negative" in report(tmp_path, runs)[1]
    runs["evaluation"]["metrics"]["m2/kl"] = 0.3
    assert "is negative" not in report(tmp_path, runs)[1]


def test_numbers_are_written_for_people():
    assert written(-1.25, 2) == "−1.25"
    assert written(-0.04, 1) == "0.0" and written(0.04, 1, sign=True) == "0.0"
    assert written(1234567.0, 0) == "1,234,567"
    assert written(float("-inf"), 3) == "−inf"
    assert written(None, 2) == "–"


def test_not_a_number_is_shown(runs, tmp_path):
    runs["evaluation"]["metrics"]["m2/L_SFT"] = "nan"
    assert "nan" in row_of(report(tmp_path, runs)[1], "L_SFT, nats per token of the references ↓")


# -- where the difference comes from -----------------------------------------------------------


def test_tasks_are_grouped_by_the_data_and_by_the_first_word():
    prompts = ["Implement f", "In f", "Implement g", "Write f"] * 10 + ["Say hello"]
    tasks = [{"prompt": p, "group": "loop" if i % 2 else "list"} for i, p in enumerate(prompts)]
    found = groupings(tasks)
    assert {g: len(m) for g, m in found["group in the data"].items()} == {"list": 21, "loop": 20}
    sizes = {g: len(m) for g, m in found["first word of the prompt"].items()}
    assert sizes == {"Implement": 20, "In": 10, "Write": 10, "others": 1}
    assert groupings([{"prompt": "Write f"}] * 9) == {} and groupings([]) == {}


def test_a_group_can_name_several_ways():
    forms, topics = ["fix", "explain"] * 12, ["lists", "texts", "texts"] * 8
    rows = zip(forms, topics, strict=True)
    tasks = [{"prompt": "Write f", "group": f"form: {f}; topic: {t}"} for f, t in rows]
    found = {way: {g: len(m) for g, m in gs.items()} for way, gs in groupings(tasks).items()}
    assert found == {
        "form in the data": {"fix": 12, "explain": 12},
        "topic in the data": {"texts": 16, "lists": 8},
    }
    tasks[3]["group"] = "form: fix"  # not every task says both: each text is a group
    assert set(groupings(tasks)) == {"group in the data"}


def test_a_gain_of_one_kind_of_task_is_said_beside_it(runs, tmp_path):
    gaining = [t["prompt"].startswith(("Implement", "In ")) for t in runs["answers"]["tasks"]]
    assert 0 < sum(gaining) < 24
    for name, kinds in {"m1": (False, True), "m2": (True, True)}.items():
        verdicts = runs["answers"]["all"][name]["verdicts"]
        verdicts[:] = [["pass" if kinds[not g] else "fail"] * 2 for g in gaining]
    page, text = report(tmp_path, runs)
    assert "The difference is uneven. By the first word of the prompt: +100.0 for" in text
    assert text.index("The difference is uneven") < text.index("## Comparison")
    assert "The difference is uneven" in page
    rows = {row[0]: row for row in comparison.group_rows(compared(runs), groupings(
        runs["answers"]["tasks"])["first word of the prompt"])}  # fmt: skip
    assert [x.text for x in rows["Implement"][3:5]] == ["0.0", "100.0"]
    assert [x.text for x in rows["Write"][3:5]] == ["100.0", "100.0"]
    assert rows["Implement"][-1].text == "+100.0" and rows["Write"][-1].text == "0.0"


def test_an_even_gain_is_not_called_uneven(runs, tmp_path):
    for name, verdict in {"m1": "fail", "m2": "pass"}.items():
        runs["answers"]["all"][name]["verdicts"] = [[verdict, verdict]] * 24
    text = report(tmp_path, runs)[1]
    assert "uneven" not in text and "## Where the difference comes from" in text


# -- samples -----------------------------------------------------------------------------------


def test_samples_show_every_kind_of_change(runs, tmp_path):
    raw = runs["answers"]["all"]
    raw["m1"]["verdicts"] = [["pass", "fail"]] * 20 + [["fail", "pass"]] * 4
    raw["m2"]["verdicts"] = [["pass", "pass"]] * 18 + [["fail", "pass"]] * 3 + [["pass", "x"]] * 3
    chosen, kinds = sampled(compared(runs), 4, 7)
    assert {kind: len(members) for kind, members in kinds.items()} == {
        "pass → pass": 18, "pass → fail": 2, "fail → fail": 1, "fail → pass": 3,
    }  # fmt: skip
    assert len(chosen) == 4
    assert {next(k for k, members in kinds.items() if i in members) for i in chosen} == set(kinds)
    assert sampled(compared(runs), 4, 7)[0] == chosen != sampled(compared(runs), 4, 8)[0]
    assert sorted(sampled(compared(runs), 99, 7)[0]) == list(range(24))
    runs["evaluation"]["config"]["samples_in_report"] = 4
    text = report(tmp_path, runs)[1]
    assert text.count("**Task ") == 4
    assert "fail → fail 1, fail → pass 3, pass → fail 2, pass → pass 18" in text
    assert "drawn with seed 42" in text
    assert text.count("M2: pass\n") == 2 and text.count("M2: fail\n") == 2


# -- curves ------------------------------------------------------------------------------------


def test_curve_ends_where_training_ended():
    history = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.0, "eval_loss": "nan"},
        {"step": 2, "train_runtime": 5.0, "loss": 7.0},
        {"step": 2, "eval_loss": 9.0},
    ]
    assert charts.curve(history, "loss") == [(1.0, 2.0), (2.0, 1.0)]
    ((step, value),) = charts.curve(history, "eval_loss")
    assert step == 2.0 and math.isnan(value)


def test_numbers_without_end_are_gaps(runs):
    history = [{"step": s, "grad_norm": x} for s, x in enumerate((1.0, "inf", 1e300, 10**400, 2.0))]
    gaps = [math.isnan(y) for _, y in charts.curve(history, "grad_norm")]
    assert gaps == [False, True, True, True, False]
    (chart,) = charts.charts_of("m2", runs["m2"] | {"history": history})
    assert chart.svg.startswith("<svg")


def test_curve_of_a_long_run_is_thinned_to_means():
    history = [{"step": s, "loss": float(s)} for s in range(4 * charts.POINTS)]
    points = charts.curve(history, "loss")
    assert len(points) == charts.POINTS and points[0] == (1.5, 1.5)


def test_over_optimisation_is_drawn_in_episodes_with_the_kept_weights(runs, monkeypatch):
    monkeypatch.setitem(charts.CHARTS, "m2", charts.CHARTS["m2"][:1])
    (chart,) = charts.charts_of("m2", runs["m2"])
    assert chart.wide
    for text in ("Proxy: the score of R", "Gold: answers that pass, %", "Price: KL", ">episodes<"):
        assert text in chart.svg
    assert chart.svg.count("stroke-dasharray: 0.9") == 3
    for row in runs["m2"]["history"]:
        row.pop("episode", None)
    (chart,) = charts.charts_of("m2", runs["m2"] | {"config": {}})
    assert ">steps<" in chart.svg and "stroke-dasharray: 0.9" not in chart.svg


def test_kept_weights_are_the_first_of_the_best():
    rows = [{"step": s, "eval_loss": x, "eval_passed": y} for s, x, y in
            ((1, 3.0, 0.5), (2, 1.0, 0.9), (3, 1.0, 0.9), (4, 2.0, 0.1))]  # fmt: skip
    history = [*rows, {"step": 4, "train_runtime": 1.0}, {"step": 4, "eval_passed": 1.0}]
    for metric, more, best in (
        ("loss", {}, 2), ("eval_passed", {}, 2), ("passed", {"greater_is_better": False}, 4),
    ):  # fmt: skip
        config = {"load_best_model_at_end": True, "metric_for_best_model": metric} | more
        assert charts.best_step({"config": config, "history": history}) == best
        assert charts.best_step({"config": config, "history": []}) is None
    assert charts.best_step({"config": {}, "history": history}) is None


def test_every_curve_is_drawn_from_a_real_history(rendered):
    # KL is a penalty on the reward in the smoke settings too, but no term of the loss
    titles = {t for listed in charts.CHARTS.values() for panels in listed for t in panels}
    missing = {title for title in titles if f">{title}<" not in rendered[0]}
    assert missing == {"Ω in the loss"} and len(titles) == 17


def test_every_colour_of_a_chart_has_a_dark_one(rendered):
    drawn = {c for x in re.findall(r"<svg.*?</svg>", rendered[0], re.DOTALL)
             for c in re.findall(r"(?:stroke|fill): (#\w+)", x)}  # fmt: skip
    assert len(drawn) > 8 and drawn - set(charts.DARK) <= {"#56b4e9"}  # which is light and dark
    dark = rendered[0].split("@media (prefers-color-scheme: dark)")[1].split("@media")[0]
    for light, shade in charts.DARK.items():
        assert f'[style*="stroke: {light}"] {{ stroke: {shade} !important; }}' in dark
        assert f'[style*="fill: {light}"] {{ fill: {shade} !important; }}' in dark


def test_stage_without_history_says_so(runs, tmp_path):
    assert "m2/manifest.json holds no history" in report(tmp_path, runs)[1]


# -- training, data, lineage -------------------------------------------------------------------


def test_training_shows_size_rows_tokens_and_settings(records, rendered):
    text = rendered[1]
    # 12 steps of 8 rows of 256 tokens; 16 of 16; one epoch; 64 episodes
    assert row_of(text, "rows trained on")[:2] == ["96", "256"]
    assert row_of(text, "rows trained on")[3] == "64"
    assert row_of(text, "rows trained on")[2] == str(records["rm"]["data"]["train"]["rows"])
    assert row_of(text, "tokens trained on")[0] == f"{96 * 256:,}"
    assert row_of(text, "tokens trained on")[1] == f"{records['m1']['metrics']['num_tokens']:,.0f}"
    assert row_of(text, "learning rate") == ["0.003", "0.0015", "0.0005", "0.0002"]
    assert row_of(text, "optimizer steps") == [str(records[m]["steps"]) for m in charts.CHARTS]
    assert ">critic_learning_rate<" in rendered[0] and "<details>" in rendered[0]
    assert rows_seen(records["tokenizer"]) is None


def test_parameters_are_those_of_the_saved_weights(real, runs, rendered, tmp_path):
    def saved(name):  # by the format's definition: 8 bytes of length, then JSON
        with (real / name / "model.safetensors").open("rb") as file:
            head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return sum(math.prod(t["shape"]) for k, t in head.items() if k != "__metadata__")

    assert row_of(rendered[1], "parameters") == [f"{saved(m):,}" for m in charts.CHARTS]
    assert row_of(report(tmp_path, runs)[1], "parameters") == ["–"] * 4  # no weights there
    (tmp_path / "m1/model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ReportError, match="m1/model.safetensors: .*Run the stage again"):
        render(tmp_path)


def test_data_counts_say_what_they_count(records, rendered):
    text = rendered[1]
    rows = records["m0"]["data"]["train"]["rows"]
    assert f"M0, train: {rows:,} rows in the mix, 96 trained on" in text
    sizes = [records[m]["data"]["train"][CARDS]["corpus"]["tokens"] for m in ("tokenizer", "m0")]
    assert row_of(text, "corpus", "tokenizer, train")[2] == f"{sizes[0]:,} characters"
    assert row_of(text, "corpus", "M0, train")[2] == f"{sizes[1]:,} tokens"
    assert row_of(text, "corpus", "M0, train")[:2] == ["100.0", "100.0"]
    assert "in the other split" in row_of(text, "corpus", "M0, train")[5]
    stats = records["m1"]["data"]["train"][STATS]
    assert stats and f"longest tokens {stats['longest_tokens']}" in text


def test_isolation_is_the_manifests(records, rendered):
    assert records["m2"]["isolation"] and records["m0"]["isolation"] is None
    for name, manifest in records.items():
        if name != "answers":
            isolation = row_of(rendered[1], BY_FOLDER[name].symbol, "## Lineage")[2]
            assert isolation == (manifest["isolation"] or "–")


def test_running_without_isolation_is_pointed_out(runs, tmp_path):
    runs["m2"]["isolation"] = "none"
    assert "m2 ran model-written code without isolation" in report(tmp_path, runs)[1]


def test_parents_that_do_not_fit_are_pointed_out(runs, rendered, tmp_path):
    assert "differ." not in rendered[1] and "✗ differs" not in rendered[1]
    assert row_of(rendered[1], "M2", "## Lineage")[1] == "M1 ✓, R ✓"
    runs["m1"]["files"]["model.safetensors"]["sha256"] = "0" * 64
    text = report(tmp_path, runs)[1]
    assert "m2 was made from another m1 than the one in this folder" in text
    assert row_of(text, "M2", "## Lineage")[1] == "M1 ✗ differs, R ✓"


def test_times_are_added_up(records, rendered):
    total = sum(x for n in BY_FOLDER for x in records[n]["wall_s"].values())
    assert f"{total / 60:.1f} minutes of work" in rendered[1]
    shown = row_of(rendered[1], "M0", "## Lineage")[3:5]
    assert shown == [f"{records['m0']['wall_s'][k]:.1f}" for k in ("train_s", "evaluate_s")]


# -- what is missing, what is broken -----------------------------------------------------------


@pytest.mark.parametrize("stage", BY_FOLDER)
def test_missing_stage_is_named(stage, runs, tmp_path):
    del runs[stage]
    if stage == "evaluation":
        del runs["answers"]
    page, text = report(tmp_path, runs)
    assert f"Missing: {stage} (no manifest.json" in text and f"Missing: {stage} (no" in page
    assert "Not part of this lineage" not in text


def test_a_lineage_that_begins_with_an_outside_model(runs, tmp_path):
    """sft on `model: org/name`: what run.py then writes is a parent with a path alone."""
    for name in ("tokenizer", "m0"):
        del runs[name]
    runs["m1"]["parents"] = {"m0": {"path": "org/name-1.5B"}}
    runs["evaluation"]["parents"] = {
        k: p for k, p in runs["evaluation"]["parents"].items() if not p["path"].endswith("m0")
    }
    text = report(tmp_path, runs)[1]
    assert "Not part of this lineage: tokenizer, m0; m1 was made from org/name-1.5B." in text
    assert "Missing" not in text and "not finished" not in text
    assert text.startswith("# M1, R, M2, from org/name-1.5B")
    assert row_of(text, "M1", "## Lineage")[1] == "org/name-1.5B"


def test_title_names_what_was_trained(runs, rendered, tmp_path):
    assert rendered[1].startswith("# M0, M1, R, M2, from random weights\n")
    runs["m0"]["config"]["model"] = "org/name"  # pretraining went on from it
    runs["rm"]["parents"] = {"m1": {"path": "org/another"}}  # no base of the others
    assert report(tmp_path, runs)[1].startswith("# M0, M1, R, M2, from org/name\n")


@pytest.mark.parametrize("stage", BY_FOLDER)
def test_a_single_stage_is_enough(stage, runs, tmp_path):
    text = report(tmp_path, {stage: runs[stage]})[1]
    assert ("There is no evaluation yet" in text) == (stage != "evaluation")


def test_missing_answers_are_named(runs, tmp_path):
    del runs["answers"]
    assert "None: evaluation/answers.json is not there" in report(tmp_path, runs)[1]


def test_empty_folder_is_refused(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SystemExit, match="2"):
            main([str(folder)])
        assert "manifest.json" in capsys.readouterr().err


BROKEN = {
    "cut short": lambda m: json.dumps(m)[:200],
    "not an object": lambda m: "[1, 2]",
    "null": lambda m: "null",
    "empty": lambda m: "{}",
    "nested too deep": lambda m: "[" * 200_000,
    "key missing": lambda m: json.dumps({k: v for k, v in m.items() if k != "metrics"}),
    "key of another type": lambda m: json.dumps(m | {"history": {}}),
    "row of another type": lambda m: json.dumps(m | {"history": [1]}),
    "card of another type": lambda m: json.dumps(m | {"data": {"train": {CARDS: {"a": 1}}}}),
    "data of another type": lambda m: json.dumps(m | {"data": {"train": []}}),
    "time of another type": lambda m: json.dumps(m | {"wall_s": {"train_s": "long"}}),
    "versions missing": lambda m: json.dumps(m | {"environment": {}}),
    "no date": lambda m: json.dumps(m | {"finished": None}),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_manifest_is_refused_by_name(how, runs, tmp_path, capsys):
    save(tmp_path, {"m0": runs["m0"], "m1": runs["m1"]})
    (tmp_path / "m1/manifest.json").write_text(BROKEN[how](runs["m1"]))
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])
    error = capsys.readouterr().err
    assert str(tmp_path / "m1/manifest.json") in error and "m0/" not in error
    assert not list(tmp_path.glob("report.*"))


def test_all_errors_are_named_at_once(runs, tmp_path, capsys):
    save(tmp_path, {name: runs[name] for name in ("m0", "m1", "rm")})
    (tmp_path / "m0/manifest.json").write_text(json.dumps(sealed(runs["m0"]) | {"metrics": 1}))
    (tmp_path / "m1/manifest.json").write_text("{")
    del runs["rm"]["files"], runs["rm"]["sealed"]  # as an older version would have written it
    (tmp_path / "rm/manifest.json").write_text(json.dumps(runs["rm"]))
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])
    error = capsys.readouterr().err
    for said in (
        "m0/manifest.json is not as it was written",
        "m1/manifest.json is not as it was written",
        "rm/manifest.json: files is missing",
    ):
        assert said in error


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.pop("all"),
        lambda a: a["all"]["m1"]["verdicts"].pop(),
        lambda a: a["all"]["m1"]["verdicts"][3].clear(),
        lambda a: a["all"]["m1"].pop("answers"),
        lambda a: a["all"]["m1"]["answers"].__setitem__(0, [1]),
        lambda a: a["tasks"].pop(),
        lambda a: a["tasks"][0].pop("prompt"),
    ],
)
def test_broken_answers_are_refused_by_name(change, runs, tmp_path, capsys):
    save(tmp_path, {k: runs[k] for k in ("evaluation", "answers")})
    change(runs["answers"])
    (tmp_path / "evaluation/answers.json").write_text(json.dumps(runs["answers"]))
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])
    assert str(tmp_path / "evaluation/answers.json") in capsys.readouterr().err


def test_answers_of_another_evaluation_are_refused(runs, tmp_path, capsys):
    save(tmp_path, {k: runs[k] for k in ("evaluation", "answers")})
    runs["answers"]["tasks"][0]["prompt"] += " "
    (tmp_path / "evaluation/answers.json").write_text(json.dumps(runs["answers"]))
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])
    assert "sha256" in capsys.readouterr().err


# -- text stays text ---------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser's tokenizer sees them."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.texts = set(), [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="session")
def hostile(records, tmp_path_factory):
    """(folder, HTML, Markdown) of the run with every text hostile that a stage may write."""
    runs = copy.deepcopy(records)
    for manifest in (runs[name] for name in BY_FOLDER):
        manifest["environment"] |= {"device": HOSTILE, "git_commit": HOSTILE, "threads": HOSTILE}
        manifest["environment"]["versions"][HOSTILE] = HOSTILE
        manifest["parents"][HOSTILE] = {"path": HOSTILE, "sha256": {HOSTILE: HOSTILE}}
        manifest["config"] |= {"gamma_reg": HOSTILE, HOSTILE: [HOSTILE]}
        manifest["isolation"] = HOSTILE
        for part in manifest["data"].values():
            stats = dict(next(iter(part[CARDS].values())), license=HOSTILE, dropped={HOSTILE: 1})
            part |= {CARDS: {HOSTILE: stats}, STATS: {HOSTILE: HOSTILE}}
    runs["m0"]["history"].insert(0, {"step": 1, f"eval_{HOSTILE}_bits_per_byte": 2.0})
    runs["m2"]["history"].insert(0, {"step": 1, f"rewards/{HOSTILE}": 2.0})
    runs["prefs"]["metrics"][HOSTILE] = HOSTILE
    metrics = runs["evaluation"]["metrics"]
    metrics |= {"isolation": HOSTILE, f"m1/{HOSTILE}": 1.0, HOSTILE: HOSTILE}
    metrics["m1/verdicts"] = {HOSTILE: 3}
    runs["evaluation"]["config"] |= {"samples_in_report": 24, "temperature": HOSTILE}
    runs["evaluation"]["config"]["models"].append(HOSTILE.replace("/", ""))
    metrics[f"{HOSTILE.replace('/', '')}/pass@1"] = 0.5
    tasks, raw = runs["answers"]["tasks"], runs["answers"]["all"]
    raw[HOSTILE.replace("/", "")] = copy.deepcopy(raw["m1"])
    for task in tasks:
        task |= {"prompt": HOSTILE, "reference": HOSTILE, "group": HOSTILE}
    tasks[0]["prompt"] = "x" * 100_000
    raw["m0"]["answers"] = [[HOSTILE, HOSTILE]] * 24
    raw["m1"]["answers"] = [["x" * 100_000, "\n" * 100_000]] * 24
    raw["m2"]["answers"] = [["`" * 1000 + "\n" + HOSTILE, "\n" * 100_000]] * 24
    raw["m2"]["verdicts"] = [[HOSTILE, "pass"]] * 24
    folder = save(tmp_path_factory.mktemp("hostile"), runs)
    main([str(folder)])
    return folder, (folder / "report.html").read_text(), (folder / "report.md").read_text()


def test_page_holds_no_foreign_markup(rendered, hostile):
    clean, dirty = Page(rendered[0]), Page(hostile[1])
    assert dirty.tags <= clean.tags | {"strong"}
    assert not dirty.tags & {"script", "img", "iframe", "object", "link", "a", "form", "base"}
    assert len(dirty.attributes) > 1000
    for tag, name, value in dirty.attributes:
        assert not name.startswith("on") and name != "src", (tag, name)
        if name in ("href", "xlink:href"):
            assert value.startswith("#")
        if name == "style" and tag == "div":
            assert re.fullmatch(r"border-color: (#\w{6}|var\(--line\))|width: \d+px", value)
    assert any(visible(HOSTILE)[:40] in text for text in dirty.texts)


def test_page_holds_no_character_that_is_obeyed(hostile):
    for text in hostile[1:]:
        assert set(text) & {*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0))} <= {"\n", "\t"}
        assert not set(text) & set("\u202e\ufffe")
        assert "{{ 7*7 }}" in text or "{{ 7\\*7 }}" in text
    assert "\\x00\\x1b[31m\\x85\\ud800\\u202egnp.exe" in hostile[1]


def test_visible_keeps_what_is_harmless():
    text = "def f(x):\n\treturn 'é 漢 🙂 a\u00a0b'"
    assert visible(text) == text


def test_long_texts_are_cut_and_say_so(hostile):
    assert cut("short\n") == "short\n"
    assert cut("x" * 100_000).endswith(f"… {100_000 - CHARACTERS_SHOWN:,} more characters")
    assert cut("\n" * 100_000).count("\n") < 50
    assert "x" * CHARACTERS_SHOWN in hostile[1]
    assert "x" * (CHARACTERS_SHOWN + 1) not in hostile[1] + hostile[2]
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", hostile[1])
    assert len(labels) > 100 and max(map(len, labels)) <= 12 * charts.LABEL


def test_page_may_load_and_run_nothing(rendered):
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', rendered[0]).group(1)
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline';")
    assert not re.search(r"https?://(?!www\.w3\.org/)", rendered[0])


def test_markdown_tables_keep_their_columns(hostile, rendered):
    for text in (hostile[2], rendered[1]):
        lines, fence, width, tables = text.splitlines(), None, 0, 0
        for line in lines:
            mark = re.match(r"^(`{3,})", line)
            if fence is not None:
                fence = None if line == fence else fence
            elif mark:
                fence = mark.group(1)
            elif line.startswith("|"):
                cells = len(re.findall(r"(?<!\\)\|", line)) - 1
                tables += not width
                width = width or cells
                assert cells == width, line[:200]
            else:
                width = 0
            if fence is None and not mark:
                assert not re.search(r"(?<!\\)[<`]", line), line[:200]
        assert fence is None and tables in (7, 8)


def test_markdown_holds_the_pages_numbers(rendered):
    page, text = "".join(Page(rendered[0]).texts), rendered[1]
    numbers = set(re.findall(r"[\d,]+\.\d{3}\b", text))
    assert len(numbers) > 20 and all(number in page for number in numbers)


# -- the page as a whole -----------------------------------------------------------------------


def test_sections_come_in_order(rendered):
    heads = re.findall(r"<h2>(.*?)</h2>", rendered[0])
    assert heads == [
        "Comparison",
        "Where the difference comes from",
        "Reward model",
        *(f"Learning curves of {BY_FOLDER[m].title}" for m in ("m2", "rm", "m1", "m0")),
        "Samples",
        "Training",
        "Data",
        "Lineage, time and memory",
        "Environment",
    ]
    assert [f"## {head}" in rendered[1] for head in heads] == [True] * len(heads)
    assert rendered[0].index('class="finding"') < rendered[0].index("<h2>")
    charts = rendered[0].count("<svg") - 2 * rendered[0].count('class="rail"')  # of the lineage
    assert charts == 14 and len(rendered[0]) < 400_000


def test_same_manifests_same_bytes(real, rendered, tmp_path):
    assert main([str(real), "--output_dir", str(tmp_path / "out")]) is None
    assert (tmp_path / "out/report.html").read_text() == rendered[0]
    assert (tmp_path / "out/report.md").read_text() == rendered[1]


def python(*words, **environment):
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=os.environ | environment
    )


@pytest.mark.slow
def test_command_gives_the_same_bytes_and_loads_no_training_code(real, rendered, tmp_path):
    for seed in ("1", "2"):
        words = ("-m", "codexhf.report", str(real), "--output_dir", str(tmp_path))
        done = python(*words, PYTHONHASHSEED=seed)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "report.html").read_text() == rendered[0]
    heavy = "{'torch', 'transformers', 'trl', 'datasets', 'markdown'} & set(sys.modules)"
    code = f"import sys, codexhf.report.__main__; print({heavy})"
    assert python("-c", code).stdout.strip() == "set()"


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium to render the page with")
def test_browser_renders_the_hostile_page_without_a_complaint(hostile, tmp_path):
    def browse(*words):
        return subprocess.run(
            [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
             f"--user-data-dir={tmp_path}", *words, f"file://{hostile[0]}/report.html"],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    page = browse("--dump-dom")
    assert not re.search("CONSOLE|Content Security Policy", page.stderr)
    assert Page(page.stdout).tags - {"tbody"} == Page(hostile[1]).tags - {"tbody"}
    picture = tmp_path / "page.png"
    browse(f"--screenshot={picture}", "--window-size=1100,3000")
    assert picture.stat().st_size > 100_000
