"""The report: what it claims, what it refuses, and that no text becomes markup.

python -m pytest tests/test_report.py
"""

import base64
import copy
import hashlib
import html
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from codexhf.report.__main__ import main
from codexhf.report.blocks import COLOURS, Num, Table, visible, written
from codexhf.report.comparison import (
    compare,
    comparison_blocks,
    headline,
    paired_difference,
    share_interval,
)
from codexhf.report.curves import LABEL, POINTS_DRAWN, best_step, curve, ppo_figures
from codexhf.report.manifests import STAGES, Runs, named, read_runs
from codexhf.report.page import CHARACTERS_SHOWN, cut, to_markdown
from codexhf.report.sections import build, lineage_blocks

HOSTILE = (
    "<script>alert(1)</script></style></pre><img src=x onerror=alert(1)>&lt;b&gt;&#60;\x00\x1b[31m"
    "\x85\ud800\u202egnp.exe\ufffe\r\n```\n~~~~\n| a | b |\n[x](javascript:alert(1)) ${body} $title"
)

CARD = {"card": "data_cards/c.md", "license": "apache-2.0", "type": "language-modeling"}


def make_manifest(name, stage, minute, parents=(), **changes):
    """A manifest as a finished stage leaves it."""
    weights = {
        "model.safetensors": {"sha256": hashlib.sha256(name.encode()).hexdigest(), "size": 9}
    }
    manifest = {
        "stage": stage,
        "name": name,
        "finished": f"2026-03-01T10:{minute:02d}:00+00:00",
        "config": {"seed": 7},
        "parents": {
            p: {
                "path": f"runs/{p}",
                "stage": "?",
                "sha256": {"model.safetensors": hashlib.sha256(p.encode()).hexdigest()},
            }
            for p in parents
        },
        "data": {},
        "metrics": {},
        "history": [],
        "steps": None,
        "wall_s": {"work_s": 12.5},
        "peak_memory_gib": 1.25,
        "environment": {
            "versions": {"python": "3.11.7", "torch": "2.13.0"},
            "git_commit": "0123456789abcdef",
            "device": "x86_64 CPU",
            "threads": 2,
            "processes": 1,
        },
        "files": weights,
    }
    return manifest | changes


def make_runs():
    """All seven manifests and the answers of a plausible run, as dictionaries."""
    noise = random.Random(0)
    cards = {
        "python_stdlib": CARD
        | {"rows_read": 659, "rows": 632, "dropped": {"exact duplicate": 2, "empty text": 25}}
        | {"tokens": 1_828_352, "share_requested": 0.85, "share_realised": 0.8516},
        "python_topics": CARD
        | {"rows_read": 91, "rows": 86, "dropped": {}}
        | {"tokens": 318_720, "share_requested": 0.15, "share_realised": 0.1484},
    }
    mix = {"train": {"fingerprint": "f" * 64, "rows": 8387, "cards": cards}}
    mix["train"]["notes"] = {"dropped_as_too_long": 3}
    pretraining = [
        {"step": s, "loss": 2.1 + 4.5 * math.exp(-s / 60) + noise.gauss(0, 0.05), "grad_norm": 0.7}
        for s in range(10, 610, 10)
    ]
    for s in range(100, 700, 100):
        pretraining += [
            {
                "step": s,
                f"eval_{c}_loss": x + 3 * math.exp(-s / 90),
                f"eval_{c}_bits_per_byte": (x + 3 * math.exp(-s / 90)) / 1.4,
            }
            for c, x in (("python_stdlib", 2.2), ("python_topics", 2.6))
        ]
    pretraining.append({"step": 600, "train_runtime": 99.0, "train_loss": 2.5})
    sft = [{"step": s, "loss": 0.1 + 2 * math.exp(-s / 50)} for s in range(5, 305, 5)]
    sft += [
        {"step": s, "eval_loss": 0.12 + 2 * math.exp(-s / 50), "eval_pass@1": 0.55 * s / (s + 60)}
        for s in range(50, 350, 50)
    ]
    sft.append({"step": 300, "train_runtime": 60.0})
    reward = [
        {"step": s, "accuracy": 0.9 - 0.4 * math.exp(-s / 40), "margin": s / 60, "loss": 0.4}
        for s in range(5, 155, 5)
    ]
    reward += [
        {"step": s, "eval_accuracy": 0.89 - 0.35 * math.exp(-s / 40), "eval_margin": s / 70}
        for s in (50, 100, 150)
    ]
    reward.append({"step": 150, "train_runtime": 20.0})
    ppo = [
        {
            "step": 8 * r,
            "episode": 256 * r,
            "loss": 0.3,
            "objective/kl": 0.12 * r + noise.gauss(0, 0.1),
            "objective/scores": -0.2 + r / 9 + noise.gauss(0, 0.1),
            "rewards/reward_model": 0.05 * r + noise.gauss(0, 0.08),
            "rewards/unit_tests": 0.52 + 0.26 * math.sin(r / 11) + noise.gauss(0, 0.03),
            "rewards/safety": -0.01,
            "loss/policy_avg": noise.gauss(-0.003, 0.002),
            "loss/value_avg": 0.05 + math.exp(-r / 4),
            "loss/sft_avg": 0.12 + noise.gauss(0, 0.01),
            "grad_norm": 0.9 + noise.gauss(0, 0.1),
            "grad_norm/policy": 0.4 + noise.gauss(0, 0.05),
            "grad_norm/value": 0.8 + 4 * math.exp(-r / 4),
            "grad_norm/sft": 0.09,
        }
        for r in range(1, 25)
    ]
    ppo += [
        {
            "step": 8 * r,
            "eval_reward_model": 0.05 * r,
            "eval_unit_tests": 0.52 + 0.24 * math.sin(r / 11),
            "eval_kl": 0.12 * r,
        }
        for r in range(4, 28, 4)
    ]
    ppo += [{"step": 192, "train_runtime": 170.0}, {"step": 192, "eval_unit_tests": 0.999}]
    keep = {"load_best_model_at_end": True, "metric_for_best_model": "eval_unit_tests"}
    trained = {"train_s": 160.25, "evaluate_s": 4.5}
    runs = {
        "tokenizer": make_manifest(
            "tokenizer", "tokenizer", 0, data=mix, metrics={"vocab_size": 4096},
            files={"tokenizer.json": {"sha256": "ab" * 32, "size": 9}},
        ),
        "m0": make_manifest(
            "m0", "pretrain", 4, data=mix, history=pretraining, steps=600, wall_s=trained,
            config={
                "max_length": 256,
                "architecture": {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 192},
            },
        ),
        "m1": make_manifest("m1", "sft", 6, ["m0"], history=sft, steps=300, wall_s=trained),
        "prefs": make_manifest(
            "prefs", "preferences", 7, ["m1"],
            metrics={
                "train_pairs": 1100, "test_pairs": 200, "samples": 4000, "prompts": 1000,
                "distinct_pass_share": 0.46, "prompts_without_pair": {"all pass": 80},
            },
        ),
        "rm": make_manifest(
            "rm", "reward_model", 8, ["m1"], history=reward, steps=150, wall_s=trained,
            metrics={"eval_accuracy": 0.885, "eval_margin": 2.1, "score_mean": 0.3},
        ),
        "m2": make_manifest(
            "m2", "ppo", 12, ["m1", "rm"], history=ppo, steps=192, wall_s=trained, config=keep
        ),
    }  # fmt: skip
    runs["evaluation"], runs["answers"] = make_evaluation({"m0": 0.0, "m1": 0.52, "m2": 0.712})
    return json.loads(json.dumps(runs))  # above, stages share dictionaries


def make_evaluation(rates, problems=400, seed=3):
    """The evaluation's manifest and answers, for pass rates of each model."""
    draw = random.Random(seed)
    hardness = [draw.random() for _ in range(problems)]
    metrics = {"isolation": "bubblewrap+landlock", "problems": problems}
    raw = {}
    for i, (name, rate) in enumerate(rates.items()):
        verdicts = [
            ["pass" if draw.random() < rate + (h - 0.5) * rate else "fail" for _ in range(4)]
            for h in hardness
        ]
        raw[name] = {
            "verdicts": verdicts,
            "rewards": [[i + draw.gauss(0, 0.3) for _ in g] for g in verdicts],
        }
        rate = sum(v == "pass" for g in verdicts for v in g) / (4 * problems)
        half = 2 * math.sqrt(rate * (1 - rate) / problems)
        found = {
            "pass@1": rate, "pass@1_low": rate - half, "pass@1_high": rate + half,
            "pass@4": min(1, 1.2 * rate), "pass@4_low": rate, "pass@4_high": min(1, 1.4 * rate),
            "pass@1_greedy": rate, "L_SFT": 1.5 - 0.6 * i, "reward": float(i), "L_RLHF": -float(i),
            "kl": 4 * abs(i - 1) / 3, "kl_low": 1.1 * abs(i - 1), "kl_high": 1.6 * abs(i - 1),
            "bits_per_byte_python_stdlib": 1.8125 + i / 100, "answer_tokens": 22.5,
            "violation_rate": 0.0025, "parses": 0.975, "U": 1.25 - i,
            "verdicts": {"pass": int(1600 * rate), "fail": 1600 - int(1600 * rate)},
        }  # fmt: skip
        if i:
            found |= {"win_rate": 0.8, "win_rate_tests": 0.625}
        metrics |= {f"{name}/{key}": value for key, value in found.items()}
    names = list(rates)
    reference = "def f(values):\n    out = []\n    for x in values:\n        if x % 2 == 0:\n" + (
        "            out.append(x * x)\n    return sorted(out)"
    )
    samples = [
        {
            "prompt": f"Write a function f(values) that returns the squares of its even members "
            f"in rising order, problem {i}.",
            "reference": reference,
            "answers": {
                n: reference if n == "m2" else "def f(values):\n    return [x * x for x in values]"
                for n in names
            },
            "verdicts": {n: "pass" if n == "m2" else "fail" for n in names},
        }
        for i in range(6)
    ]
    config = {
        "models": [f"runs/{n}" for n in names], "reference": "runs/m1", "num_samples": 4,
        "temperature": 1.0, "alpha_sft": 0.1, "beta_rlhf": 1.0, "gamma_reg": 0.05, "seed": 42,
    }  # fmt: skip
    manifest = make_manifest("evaluation", "evaluation", 15, names, config=config, metrics=metrics)
    return manifest, {"samples": samples, "all": raw}


def write_runs(folder, runs):
    """Write manifests, and the answers with the hash that the evaluation lists."""
    runs = copy.deepcopy(runs)
    answers = runs.pop("answers", None)
    if answers is not None and "evaluation" in runs:
        (folder / "evaluation").mkdir(parents=True, exist_ok=True)
        text = json.dumps(answers)
        (folder / "evaluation" / "answers.json").write_text(text)
        runs["evaluation"]["files"]["answers.json"] = {
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "size": len(text),
        }
    for name, manifest in runs.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """(HTML, Markdown) of a whole run."""
    folder = write_runs(tmp_path_factory.mktemp("runs"), make_runs())
    assert main([str(folder)]) == 0
    return (folder / "report.html").read_text(), (folder / "report.md").read_text()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """(folder, HTML, Markdown) of a run in which every text is hostile."""
    runs = make_runs()
    for manifest in (runs[name] for name in STAGES):
        manifest["environment"] |= {"device": HOSTILE, "git_commit": HOSTILE, "threads": HOSTILE}
        manifest["environment"]["versions"][HOSTILE] = HOSTILE
        manifest["parents"][HOSTILE] = {"path": HOSTILE, "sha256": {HOSTILE: HOSTILE}}
        manifest["config"]["seed"] = HOSTILE
        for part in manifest["data"].values():
            facts = dict(
                part["cards"]["python_stdlib"], license=HOSTILE, dropped={HOSTILE: HOSTILE}
            )
            part |= {"cards": {HOSTILE: facts}, "notes": {HOSTILE: HOSTILE}}
    runs["m0"]["config"]["architecture"]["model_type"] = HOSTILE
    runs["m0"]["history"].insert(5, {"step": 60, f"eval_{HOSTILE}_bits_per_byte": 2.0})
    runs["m2"]["history"].insert(5, {"step": 48, f"rewards/{HOSTILE}": 2.0, "episode": 256 * 6})
    runs["m2"]["config"]["model"] = HOSTILE
    runs["evaluation"]["metrics"] |= {
        "isolation": HOSTILE,
        f"m1/{HOSTILE}": HOSTILE,
        "m1/verdicts": {HOSTILE: 3},
        HOSTILE: HOSTILE,
    }
    long_line = "x" * 100_000
    samples = runs["answers"]["samples"]
    samples[0] |= {"prompt": HOSTILE, "reference": HOSTILE}
    samples[0]["answers"] = {"m0": HOSTILE, "m1": long_line, "m2": "\n" * 100_000, HOSTILE: HOSTILE}
    samples[0]["verdicts"] = {"m0": HOSTILE, "m1": "timeout", "m2": "pass"}
    samples[1]["answers"]["m1"] = "`" * 5000 + "\n" + HOSTILE
    folder = write_runs(tmp_path_factory.mktemp("hostile"), runs)
    assert main([str(folder)]) == 0
    return folder, (folder / "report.html").read_text(), (folder / "report.md").read_text()


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser's tokenizer sees them."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.texts, self.open = set(), [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        self.open.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


def comparison_of(rates, problems=400, seed=3, answers=True):
    evaluation, raw = make_evaluation(rates, problems, seed)
    return compare(Runs({"evaluation": evaluation}, raw if answers else {}))


def with_rates(c, **values):
    """The comparison with pass rates and intervals written over: m1=(rate, low, high)."""
    for name, (rate, low, high) in values.items():
        c.found[name] |= {"pass@1": rate, "pass@1_low": low, "pass@1_high": high}
    return c


# -- what it claims ----------------------------------------------------------------------------


def test_headline_says_that_m2_is_better():
    c = with_rates(
        comparison_of({"m0": 0.0, "m1": 0.5, "m2": 0.7}),
        m0=(0, 0, 0), m1=(0.52, 0.47, 0.57), m2=(0.712, 0.67, 0.75),
    )  # fmt: skip
    c.differences = {("m2", "pass@1"): (0.192, 0.1504, 0.2336)}
    sentence, sure = headline(c)
    assert sentence == (
        "M2 passes 71.2% of 400 held-out problems, M1 52.0% (+19.2 points), M0 0.0%."
    )
    assert sure == [
        "Problem by problem the difference is +15.0 to +23.4 points (95% interval), which excludes "
        "zero."
    ]


def test_headline_says_that_m2_is_worse():
    c = with_rates(
        comparison_of({"m0": 0.0, "m1": 0.5, "m2": 0.4}),
        m1=(0.52, 0.47, 0.57), m2=(0.4, 0.36, 0.44),
    )  # fmt: skip
    c.differences = {
        ("m2", "pass@1"): (-0.12, -0.16, -0.08),
        ("m2", "reward"): (0.5, 0.4, 0.6),
    }
    sentence, sure = headline(c)
    assert sentence.startswith("M2 is worse than M1: M2 passes 40.0%")
    assert "M1 52.0% (−12.0 points)" in sentence
    assert "−16.0 to −8.0 points (95% interval), which excludes zero" in sure[0]
    assert "over-optimised" in sure[1] and "+0.50" in sure[1]


def test_headline_says_that_a_difference_may_be_chance():
    c = with_rates(
        comparison_of({"m0": 0.0, "m1": 0.5, "m2": 0.5}),
        m1=(0.52, 0.47, 0.57), m2=(0.54, 0.49, 0.59),
    )  # fmt: skip
    c.differences = {("m2", "pass@1"): (0.02, -0.01, 0.05)}
    assert headline(c)[1] == [
        "The 95% intervals of M2 and M1 overlap; problem by problem the difference is −1.0 to +5.0 "
        "points (95% interval), which includes zero: it may be chance."
    ]
    c.differences = {}
    assert headline(c)[1] == [
        "The 95% intervals of M2 and M1 overlap, so the difference may be chance."
    ]


def test_headline_without_answers_compares_intervals():
    c = with_rates(
        comparison_of({"m0": 0.0, "m1": 0.5, "m2": 0.7}, answers=False),
        m1=(0.52, 0.47, 0.57), m2=(0.712, 0.67, 0.75),
    )  # fmt: skip
    assert headline(c)[1] == ["The 95% intervals of M2 and M1 do not overlap."]
    del c.found["m1"]["pass@1_low"]
    assert "unknown" in headline(c)[1][0]


def test_headline_claims_nothing_without_numbers():
    assert "no evaluation" in headline(compare(Runs({})))[0]
    zero = headline(comparison_of({"m0": 0.0, "m1": 0.0, "m2": 0.0}))
    assert "(no difference)" in zero[0] and "compares nothing" in zero[1][0]
    assert "no other model" in headline(comparison_of({"m1": 0.4}))[0]


def test_paired_difference_by_hand():
    before, after = [[0, 1], [1, 1], [0, 0], [0, 0]], [[1, 1], [1, 1], [0, 1], [0, 0]]
    # gaps .5 0 .5 0: mean .25, deviation sqrt(1/12), half 1.96 sqrt(1/12) / 2
    half = 1.96 * math.sqrt(1 / 12) / 2
    assert paired_difference(before, after) == pytest.approx((0.25, 0.25 - half, 0.25 + half))
    assert paired_difference(before, after[:3]) is None
    assert paired_difference([], []) is None
    assert paired_difference([[0.0], [math.inf]], [[1.0], [1.0]]) is None


def test_share_interval_known_values():
    # Wilson's score interval: 0 of 10 is 0 to 0.2775, 4 of 4 is 0.5101 to 1.
    assert share_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert share_interval(1.0, 4) == pytest.approx((0.5101, 1.0), abs=1e-4)


def test_differences_are_those_of_the_answers():
    c = comparison_of({"m0": 0.1, "m1": 0.5, "m2": 0.7})
    gap = c.differences["m2", "pass@1"]
    assert gap[0] == pytest.approx(c.value("m2", "pass@1") - c.value("m1", "pass@1"))
    assert gap[1] < gap[0] < gap[2]
    assert {key for key, _ in c.differences} == {"m1", "m2"}


def test_bold_marks_only_differences_that_exclude_zero():
    c = comparison_of({"m0": 0.1, "m1": 0.5, "m2": 0.5})
    c.differences = {("m1", "pass@1"): (0.4, 0.3, 0.5), ("m2", "pass@1"): (0.0, -0.1, 0.1)}
    (table,) = (b for b in comparison_blocks(Runs({}), c) if isinstance(b, Table))
    row = next(row for row in table.rows if row[0] == "pass@1\u00a0↑")
    assert [cell.strong for cell in row[-2:]] == [True, False]
    assert row[-2].interval == pytest.approx((30.0, 50.0))


def test_every_metric_is_shown():
    evaluation, answers = make_evaluation({"m0": 0.1, "m1": 0.5, "m2": 0.7})
    metrics = evaluation["metrics"]
    not_shown = {"L_RLHF", "verdicts"}  # as the term beta L_RLHF, as shares: other tests
    metrics |= {"m1/invented": 0.5, "m1/as_text": "of a kind", "invented_total": 31337}
    ours = [k for k in sorted(metrics) if "/" in k and k.split("/")[1] not in not_shown]
    for i, key in enumerate(ours):  # values that can be told apart in every format
        metrics[key] = 40.5 + i if isinstance(metrics[key], float) else metrics[key]
    runs = Runs({"evaluation": evaluation}, answers)
    text = to_markdown("", comparison_blocks(runs, compare(runs)))
    assert len(ours) > 50
    for key in ours:
        value = metrics[key]
        formats = [value] if isinstance(value, str) else [f"{value:.1f}", f"{100 * value:,.1f}"]
        assert any(re.search(rf"(?<![\d,.]){re.escape(f)}", text) for f in formats), key
    assert "invented_total 31337" in text and "bubblewrap+landlock" in text


def test_terms_of_u_add_up():
    evaluation, _ = make_evaluation({"m0": 0.1, "m1": 0.5})
    found = {"L_SFT": 2.0, "reward": 0.5, "L_RLHF": -0.5, "kl": 3.0, "U": 0.2 - 0.5 + 0.15}
    evaluation["metrics"] = {f"m1/{key}": value for key, value in found.items()}
    c = compare(Runs({"evaluation": evaluation}))
    terms = [c.value("m1", weight) for weight in ("alpha_sft", "beta_rlhf", "gamma_reg")]
    assert terms == pytest.approx([0.2, -0.5, 0.15])
    assert sum(terms) == pytest.approx(c.value("m1", "U"))
    text = to_markdown("", comparison_blocks(Runs({"evaluation": evaluation}), c))
    assert "| 0.1 · L_SFT |" in text and "| L_RLHF |" not in text


def test_verdicts_are_shares_of_each_model():
    evaluation, _ = make_evaluation({"m0": 0.1, "m1": 0.5})
    evaluation["metrics"] |= {"m0/verdicts": {"fail": 3, "timeout": 1}, "m1/verdicts": {"pass": 2}}
    runs = Runs({"evaluation": evaluation})
    text = to_markdown("", comparison_blocks(runs, compare(runs)))
    assert (
        "| pass | 0.0 | 100.0 | +100.0 |\n| fail | 75.0 | 0.0 | −75.0 |\n| timeout | 25.0" in text
    )


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(-0.05, 0.01, "hardly differ"), (-0.9, -0.2, "not drawn from the distribution")],
)
def test_negative_kl_is_explained(low, high, said):
    evaluation, answers = make_evaluation({"m1": 0.5, "m2": 0.7})
    evaluation["metrics"] |= {"m2/kl": (low + high) / 2, "m2/kl_low": low, "m2/kl_high": high}
    runs = Runs({"evaluation": evaluation}, answers)
    text = to_markdown("", comparison_blocks(runs, compare(runs)))
    assert "The KL of M2 is negative" in text and said in text
    evaluation["metrics"]["m2/kl"] = 0.3
    assert "is negative" not in to_markdown("", comparison_blocks(runs, compare(runs)))


def test_numbers_are_written_for_people():
    assert written(-1.25, 2) == "−1.25"
    assert written(-0.04, 1) == "0.0" and written(0.04, 1, sign=True) == "0.0"
    assert written(1234567.0, 0) == "1,234,567"
    assert written(float("-inf"), 3) == "−inf"
    assert Num(None, 2).text() == "–"


def test_not_a_number_is_shown(tmp_path):
    evaluation, answers = make_evaluation({"m1": 0.5, "m2": 0.7}, problems=20)
    evaluation["metrics"]["m2/L_SFT"] = "nan"
    runs = Runs({"evaluation": evaluation}, answers)
    assert "| nan |" in to_markdown("", comparison_blocks(runs, compare(runs)))


# -- curves ------------------------------------------------------------------------------------


def test_curve_ends_where_training_ended():
    history = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.0, "eval_loss": "nan"},
        {"step": 2, "train_runtime": 5.0, "loss": 7.0},
        {"step": 2, "eval_loss": 9.0},
    ]
    assert curve(history, "loss") == [(1.0, 2.0), (2.0, 1.0)]
    assert [x for x, _ in curve(history, "eval_loss")] == [2.0]
    assert len(curve(history, "eval_loss")) == 1 and math.isnan(curve(history, "eval_loss")[0][1])


def test_numbers_without_end_are_gaps():
    history = [{"step": s, "grad_norm": x} for s, x in enumerate((1.0, "inf", 1e300, 10**400, 2.0))]
    assert [math.isnan(y) for _, y in curve(history, "grad_norm")] == [
        False,
        True,
        True,
        True,
        False,
    ]
    for row in history:
        row["grad_norm/policy"] = row["grad_norm"]
    (figure,) = ppo_figures(make_manifest("m2", "ppo", 1, history=history))
    assert figure.svg.startswith("<svg")


def test_curve_of_a_long_run_is_thinned_to_means():
    history = [{"step": s, "loss": float(s)} for s in range(4 * POINTS_DRAWN)]
    points = curve(history, "loss")
    assert len(points) == POINTS_DRAWN and points[0] == (1.5, 1.5)


def test_ppo_drawing_marks_the_kept_weights_in_episodes():
    manifest = make_runs()["m2"]
    kept = ("step", "episode", "train_runtime", "eval_unit_tests", "eval_kl")
    manifest["history"] = [{k: r[k] for k in kept if k in r} for r in manifest["history"]]
    (figure,) = ppo_figures(manifest)  # what was not logged is not drawn
    assert "KL" in figure.name and "dotted line" in figure.caption
    assert ">episodes<" in figure.svg and ">6,000<" in figure.svg
    assert figure.svg.count('stroke-dasharray="0.9') == 2
    manifest["config"] = {}
    for row in manifest["history"]:
        row.pop("episode", None)
    (figure,) = ppo_figures(manifest)
    assert "dotted line" not in figure.caption and ">steps<" in figure.svg
    assert 'stroke-dasharray="0.9' not in figure.svg


def test_kept_weights_are_the_first_of_the_best():
    rows = [{"step": s, "eval_loss": x, "eval_passed": y} for s, x, y in
            ((1, 3.0, 0.5), (2, 1.0, 0.9), (3, 1.0, 0.9), (4, 2.0, 0.1))]  # fmt: skip
    history = [*rows, {"step": 4, "train_runtime": 1.0}, {"step": 4, "eval_passed": 1.0}]
    for metric, more, best in (
        ("loss", {}, 2), ("eval_passed", {}, 2), ("passed", {"greater_is_better": False}, 4),
    ):  # fmt: skip
        config = {"load_best_model_at_end": True, "metric_for_best_model": metric} | more
        assert best_step({"config": config, "history": history}) == best
        assert best_step({"config": config, "history": []}) is None
    assert best_step({"config": {}, "history": history}) is None


def test_stage_without_history_says_so(tmp_path):
    manifest = make_manifest("m2", "ppo", 1)
    text = to_markdown(*build(Runs({"m2": manifest})))
    assert "m2/manifest.json holds no history" in text


# -- what it refuses ---------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_missing_stage_is_named(stage, tmp_path, capsys):
    runs = make_runs()
    for manifest in runs.values():
        if "history" in manifest:
            manifest["history"] = []  # nothing to draw: this is about words
    del runs[stage]
    assert main([str(write_runs(tmp_path, runs))]) == 0
    text = (tmp_path / "report.md").read_text()
    assert f"Missing: {stage} (no manifest.json" in text
    sections = {"m0": 1, "m1": 1, "rm": 2, "m2": 1, "evaluation": 1}.get(stage, 0)
    assert text.count(f"{named(stage)} is missing") == sections
    assert (tmp_path / "report.html").is_file()


def test_a_single_stage_is_enough(tmp_path):
    write_runs(tmp_path, {"tokenizer": make_runs()["tokenizer"]})
    assert main([str(tmp_path)]) == 0
    assert "There is no evaluation yet" in (tmp_path / "report.md").read_text()


def test_missing_answers_are_named(tmp_path):
    runs = make_runs()
    del runs["answers"]
    text = to_markdown(*build(read_runs(write_runs(tmp_path, {"evaluation": runs["evaluation"]}))))
    assert "No samples: no evaluation/answers.json" in text


def test_empty_folder_is_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "manifest.json" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2


BROKEN = {
    "cut short": lambda m: json.dumps(m)[:200],
    "not an object": lambda m: "[1, 2]",
    "null": lambda m: "null",
    "nested too deep": lambda m: "[" * 200_000,
    "key missing": lambda m: json.dumps({k: v for k, v in m.items() if k != "metrics"}),
    "key of another type": lambda m: json.dumps(m | {"history": {}}),
    "row of another type": lambda m: json.dumps(m | {"history": [1]}),
    "card of another type": lambda m: json.dumps(m | {"data": {"train": {"cards": {"a": 1}}}}),
    "data of another type": lambda m: json.dumps(m | {"data": {"train": []}}),
    "time of another type": lambda m: json.dumps(m | {"wall_s": {"train_s": "long"}}),
    "versions missing": lambda m: json.dumps(m | {"environment": {}}),
    "no date": lambda m: json.dumps(m | {"finished": "yesterday"}),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_manifest_is_refused_by_name(how, tmp_path, capsys):
    runs = make_runs()
    write_runs(tmp_path, {"m0": runs["m0"], "m1": runs["m1"]})
    (tmp_path / "m1" / "manifest.json").write_text(BROKEN[how](runs["m1"]))
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "m1" / "manifest.json") in error and "m0" not in error
    assert not (tmp_path / "report.html").exists() and not (tmp_path / "report.md").exists()


@pytest.mark.parametrize(
    "answers",
    [
        [],
        {"samples": [{"prompt": "p"}]},
        {"samples": [], "all": {"m1": {"verdicts": [[]]}}},
        {"samples": [], "all": {"m1": {"verdicts": [["pass"]], "rewards": [["high"]]}}},
        {"samples": [], "all": {"m1": {"verdicts": [["pass"]], "rewards": [[]]}}},
        {"samples": [{"prompt": 1, "reference": "", "answers": {}, "verdicts": {}}]},
    ],
)
def test_broken_answers_are_refused_by_name(answers, tmp_path, capsys):
    evaluation = make_runs()["evaluation"]
    write_runs(tmp_path, {"evaluation": evaluation, "answers": answers})
    assert main([str(tmp_path)]) == 2
    assert str(tmp_path / "evaluation" / "answers.json") in capsys.readouterr().err


def test_answers_of_another_evaluation_are_refused(tmp_path, capsys):
    runs = make_runs()
    write_runs(tmp_path, {k: runs[k] for k in ("evaluation", "answers")})
    (tmp_path / "evaluation" / "answers.json").write_text(json.dumps({"samples": []}))
    assert main([str(tmp_path)]) == 2
    assert "sha256" in capsys.readouterr().err


def test_parents_that_do_not_fit_are_pointed_out():
    runs = make_runs()
    runs.pop("answers")
    assert "differ" not in to_markdown("", lineage_blocks(Runs(runs)))
    runs["m1"]["files"]["model.safetensors"]["sha256"] = "0" * 64
    for manifest in runs.values():
        manifest["history"] = []
    text = to_markdown(*build(Runs(runs)))
    assert "m2 was made from another m1 than the one in this folder" in text
    assert "✗ differs" in text


# -- text stays text ---------------------------------------------------------------------------


def test_page_holds_no_foreign_markup(rendered, hostile):
    clean, dirty = Page(rendered[0]), Page(hostile[1])
    assert dirty.tags == clean.tags
    assert not dirty.tags & {"script", "img", "iframe", "object", "link", "a", "form", "base"}
    assert len(dirty.attributes) > 1000
    for tag, name, value in dirty.attributes:
        assert not name.startswith("on") and name not in ("style", "src"), (tag, name)
        if name in ("href", "xlink:href"):
            assert value.startswith("#")
    assert any(visible(HOSTILE)[:40] in text for text in dirty.texts)


def test_page_holds_no_character_that_is_obeyed(hostile):
    for text in hostile[1:]:
        left = set(text) & {
            *map(chr, range(0x20)),
            *map(chr, range(0x7F, 0xA0)),
            "\u202e",
            "\ufffe",
        }
        assert left <= {"\n", "\t"}
    assert "␀␛[31m" in hostile[1] and "␍" in hostile[1]


def test_visible_keeps_what_is_harmless():
    text = "def f(x):\n\treturn 'é 漢 🙂 a\u00a0b'"
    assert visible(text) == text


def test_long_answers_are_cut_and_say_so(hostile):
    assert cut("short\n") == "short\n"
    assert cut("x" * 100_000).endswith(f"… {100_000 - CHARACTERS_SHOWN:,} more characters")
    assert cut("\n" * 100_000).count("\n") < 50
    assert len(hostile[1].encode()) < 1_500_000 and "x" * CHARACTERS_SHOWN in hostile[1]
    assert "x" * (CHARACTERS_SHOWN + 1) not in hostile[1] + hostile[2]
    assert max(map(len, hostile[2].splitlines())) < 20_000
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", hostile[1])
    assert len(labels) > 100 and max(len(html.unescape(label)) for label in labels) <= LABEL


def test_page_policy_allows_its_style_sheet_alone(rendered):
    page = rendered[0]
    sheet = re.search(r"<style>(.*?)</style>", page, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page).group(1)
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'")
    assert "unsafe" not in policy and page.count("<style") == 1
    assert not re.search(r"https?://(?!www\.w3\.org/)", page)


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
                assert "<" not in line and "`" not in line.replace("\\`", "")
            else:
                width = 0
                assert "<" not in line, line[:200]
        assert fence is None and tables == 5


def test_markdown_holds_the_pages_numbers(rendered):
    page, text = "".join(Page(rendered[0]).texts), rendered[1]
    numbers = set(re.findall(r"[\d,]+\.\d{3}\b", text))
    assert len(numbers) > 20 and all(number in page for number in numbers)


def test_models_have_their_colour_in_tables_and_drawings(rendered):
    for name, colour in COLOURS.items():
        assert f"--{name}: {colour};" in rendered[0]
        assert f'stroke="{colour}"' in rendered[0]


# -- the page as a whole -----------------------------------------------------------------------


def test_sections_come_in_order(rendered):
    heads = re.findall(r"<h2>(.*?)</h2>", rendered[0])
    assert heads == [
        "Comparison", "Reward model", "Curves", "Samples", "Data", "Time and memory", "Lineage",
    ]  # fmt: skip
    assert rendered[0].index('class="headline"') < rendered[0].index("<h2>")
    assert rendered[0].count("<svg") == 13 and len(rendered[0]) < 400_000


def test_data_shares_and_drops_are_listed(rendered):
    row = (
        "| python_stdlib | 85.0 | 85.2 | 1,828,352 | 659 | 632 | 25 empty text; 2 exact duplicate |"
    )
    assert row in rendered[1]
    assert "M0 (pretraining), train, 8,387 rows used; dropped as too long 3" in rendered[1]


def test_times_are_added_up(rendered):
    # m0, m1, rm and m2 train 160.25 s and evaluate 4.5 s; the other three work 12.5 s.
    assert "| together | 641.0 | 18.0 | 37.5 | 696.5 |" in rendered[1]
    assert "11.6 minutes" in rendered[1]


def test_same_manifests_same_bytes(rendered, tmp_path):
    write_runs(tmp_path / "elsewhere", make_runs())
    assert main([str(tmp_path / "elsewhere"), "--output_dir", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.html").read_text() == rendered[0]
    assert (tmp_path / "out" / "report.md").read_text() == rendered[1]
    assert sorted(p.name for p in (tmp_path / "elsewhere").iterdir()) == sorted(STAGES)


def python(*words, **environment):
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=os.environ | environment
    )


@pytest.mark.slow
def test_command_gives_the_same_bytes_and_loads_no_training_code(rendered, tmp_path):
    write_runs(tmp_path, make_runs())
    for seed in ("1", "2"):
        done = python("-m", "codexhf.report", str(tmp_path), PYTHONHASHSEED=seed)
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
