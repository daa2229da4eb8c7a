"""The whole lineage through make, with the smoke configurations: the main job on real input.

python -m pytest tests/test_pipeline.py
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from codexhf.run import load_manifest
from conftest import weights_hash

ROOT = Path(__file__).parent.parent
STAGES = ("tokenizer", "m0", "m1", "prefs", "rm", "m2", "evaluation")
ENV = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}


def make(runs, *more, start=False):
    """Run `make pipeline` with the smoke configurations in this test's own environment."""
    (runs.parent / "installed").touch()  # newer than constraints.txt: nothing is installed again
    variables = {
        "CONFIGS": "recipes/smoke",
        "RUNS": runs,
        "LAUNCH": sys.executable,
        "BIN": Path(sys.executable).parent,
        "ENV": runs.parent / "installed",
    }
    argv = ["make", "pipeline", *(f"{k}={v}" for k, v in variables.items()), *more]
    process = subprocess.Popen(
        argv,
        cwd=ROOT,
        env=ENV,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    if start:
        return process
    out = process.communicate()[0]
    assert process.returncode == 0, out[-4000:]
    return out


def kill_when(process, condition, timeout=900):
    """kill -9 the whole process group once `condition()` holds."""
    end = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < end
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def killed_twice(tmp_path_factory):
    """A finished pipeline that was killed in pretraining and in PPO and started again."""
    runs = tmp_path_factory.mktemp("pipeline") / "runs"
    for stage in ("m0", "m2"):
        process = make(runs, start=True)
        kill_when(process, lambda s=stage: list((runs / s).glob("checkpoint-*/manifest.json")))
        assert not (runs / stage / "manifest.json").exists()
    out = make(runs)
    assert "resuming from" in out
    return runs


def test_killed_pipeline_finishes_every_stage(killed_twice):
    for name in STAGES:
        manifest = load_manifest(killed_twice / name)
        assert manifest["metrics"], name
        for file, facts in manifest["files"].items():
            assert (killed_twice / name / file).stat().st_size == facts["size"]
    assert not list(killed_twice.glob("*/checkpoint-*"))


def test_second_make_does_nothing(killed_twice):
    before = {p: p.stat().st_mtime_ns for p in killed_twice.glob("*/manifest.json")}
    out = make(killed_twice)
    assert before == {p: p.stat().st_mtime_ns for p in killed_twice.glob("*/manifest.json")}
    assert "recipes/" not in out


def test_lineage_is_recorded_down_to_the_weights(killed_twice):
    m1, m2 = (load_manifest(killed_twice / name) for name in ("m1", "m2"))
    weights = m1["files"]["model.safetensors"]["sha256"]
    assert m2["parents"]["m1"]["sha256"]["model.safetensors"] == weights
    assert m2["parents"]["m1"]["stage"] == "sft"
    assert m2["parents"]["rm"]["stage"] == "reward_model"
    assert re.fullmatch("[0-9a-f]{64}", m2["data"]["prompts"]["fingerprint"])


def test_models_load_as_plain_checkpoints(killed_twice):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    for name in ("m0", "m1", "m2"):
        model, info = AutoModelForCausalLM.from_pretrained(
            killed_twice / name, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        tokenizer = AutoTokenizer.from_pretrained(killed_twice / name)
        assert tokenizer.chat_template and len(tokenizer) == model.config.vocab_size
    rm = AutoModelForSequenceClassification.from_pretrained(killed_twice / "rm")
    assert rm.config.score_std > 0
    assert len({weights_hash(killed_twice / n) for n in ("m0", "m1", "m2")}) == 3


def test_training_learns_something_even_in_seconds(killed_twice):
    for name in ("m0", "m1"):
        losses = [e["loss"] for e in load_manifest(killed_twice / name)["history"] if "loss" in e]
        assert losses[-1] < losses[0]


def test_evaluation_compares_all_models(killed_twice):
    metrics = load_manifest(killed_twice / "evaluation")["metrics"]
    for name in ("m0", "m1", "m2"):
        for key in ("pass@1", "pass@1_low", "L_SFT", "kl", "reward", "U", "violation_rate"):
            assert f"{name}/{key}" in metrics
        stage = load_manifest(killed_twice / "evaluation")["config"]
        u = (
            stage["alpha_sft"] * metrics[f"{name}/L_SFT"]
            + stage["beta_rlhf"] * metrics[f"{name}/L_RLHF"]
            + stage["gamma_reg"] * stage["kl_coef"] * metrics[f"{name}/kl"]
        )
        assert abs(u - metrics[f"{name}/U"]) < 1e-9
    assert abs(metrics["m1/kl"]) < 1e-4
    assert load_manifest(killed_twice / "evaluation")["isolation"] != "none"


def test_report_is_written(killed_twice):
    page = (killed_twice / "report.html").read_text()
    text = (killed_twice / "report.md").read_text()
    for part in ("M0", "M1", "M2", "pass@1"):
        assert part in page and part in text
    assert "<script" not in page


def test_a_change_upstream_rebuilds_what_depends_on_it(killed_twice):
    manifest = load_manifest(killed_twice / "prefs")
    os.utime(killed_twice / "m1/manifest.json")
    out = make(killed_twice)
    # m1 is newer but its content is not: the stages after it look, find nothing changed, and say so
    assert out.count("nothing changed; nothing to do") == 4
    assert load_manifest(killed_twice / "prefs") == manifest
    assert "recipes/sft.py" not in out


@pytest.mark.slow
def test_same_seed_gives_the_same_final_weights(killed_twice, tmp_path):
    make(tmp_path / "runs")
    for name in ("tokenizer", "m0", "m1", "rm", "m2"):
        ours, theirs = (
            json.dumps(load_manifest(r / name)["files"].get("model.safetensors", {}))
            for r in (killed_twice, tmp_path / "runs")
        )
        assert ours == theirs, name
