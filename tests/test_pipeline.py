"""The whole lineage through make, with the smoke configurations: the main job on real input.

python -m pytest tests/test_pipeline.py
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from codexhf.run import load_manifest
from conftest import weights_hash
from hub_server import TOKEN, HubServer

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
        assert model.config.use_cache and model.generation_config.use_cache  # off while training
        assert tokenizer.model_max_length == model.config.max_position_embeddings == 256
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


def commands_of_the_docs():
    """The lines that docs/hub.md prints under "from the hub alone"."""
    text = (ROOT / "docs/hub.md").read_text().partition("from the hub alone")[2]
    return text.partition("```\n")[2].partition("\n```")[0].split("\n")


def repeated_from_the_hub(runs, work, server):
    """Run these lines in `work`, with `runs` as the runs folder.

    Returns:
        manifest of the evaluation and the report, before and after.
    """
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "recipes", "data_cards"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, work / name)
    (work / "installed").touch()
    env = {
        **ENV, "HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(work / "home"),
        "LAUNCH": sys.executable, "RUNS": str(runs), "CONFIGS": "recipes/smoke",
        "MAKEFLAGS": f"BIN={Path(sys.executable).parent} ENV={work}/installed",
    }  # fmt: skip
    before = load_manifest(runs / "evaluation"), (runs / "report.md").read_text()
    lines = commands_of_the_docs()
    assert lines[1] == "rm -r runs" and lines[-1] == "make pipeline"
    for line in lines:
        line = re.sub(r"\bruns\b", str(runs), line.replace("python ", f"{sys.executable} "))
        done = subprocess.run(
            line, shell=True, cwd=work, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}"
        assert TOKEN not in done.stdout
    recipes = set(re.findall(r"recipes/(\w+)\.py", done.stdout))
    assert recipes == {"evaluation"}, done.stdout[-3000:]
    return before, (load_manifest(runs / "evaluation"), (runs / "report.md").read_text())


def same_report(text):
    """The report without what has to differ: when it was made, how long it took, on what."""
    text = text[: text.index("## Lineage, time and memory")]
    return [line for line in text.split("\n") if not line.startswith("Finished ")]


@pytest.mark.slow
def test_the_run_is_repeated_from_the_hub_alone(killed_twice, tmp_path):
    runs, kept = killed_twice, tmp_path / "kept"  # for the other tests
    runs.rename(kept)
    shutil.copytree(kept, runs)
    try:
        with HubServer() as server:
            (before, report), (after, again) = repeated_from_the_hub(runs, tmp_path, server)
    finally:
        shutil.rmtree(runs, ignore_errors=True)
        kept.rename(runs)
    assert before["metrics"] == after["metrics"]
    assert same_report(report) == same_report(again)


def planned(*argv, path=os.environ["PATH"]):
    """What `make` would run."""
    argv = ["make", "-n", "--no-print-directory", *argv, f"ENV={os.devnull}"]
    env = {k: v for k, v in ENV.items() if k not in ("MAKEFLAGS", "MODEL", "RUNS", "CONFIGS")}
    return subprocess.run(argv, cwd=ROOT, env=env | {"PATH": path}, capture_output=True, text=True)


@pytest.mark.parametrize(
    "argv, model",
    [
        ((), "runs/m2"),
        (("CONFIGS=recipes/pretrained/cpu", "RUNS=runs/smollm2"), "runs/smollm2/m2"),
        (("MODEL=org/name", "RUNS=runs/name"), "runs/name/m2"),
        (("MODEL=runs/m1",), "runs/m1"),
        (("MODEL=runs/m1", "CHAT=--temperature 0"), "runs/m1 --temperature 0"),
    ],
)
def test_chat_talks_to_what_the_pipeline_made(argv, model):
    assert planned("chat", *argv).stdout.strip().endswith(f"codexhf.chat {model}")


def test_a_model_that_exists_gets_the_recipes_made_for_one(tmp_path):
    driver = tmp_path / "nvidia-smi"
    given = "pipeline", "MODEL=models/x", f"RUNS={tmp_path}"
    for exit_code, configs in ((0, "recipes/pretrained/lora"), (9, "recipes/pretrained/cpu")):
        driver.write_text(f"#!/bin/sh\n[ {exit_code} = 0 ] && echo GPU 0; exit {exit_code}\n")
        driver.chmod(0o755)
        plan = planned(*given, path=f"{tmp_path}:{os.environ['PATH']}").stdout
        assert set(re.findall(r"--config (.*)/\w+\.yaml", plan)) == {configs}
        assert "--model models/x" in plan and "recipes/pretrain.py" not in plan
    assert "--config recipes/smoke/sft.yaml" in planned(*given, "CONFIGS=recipes/smoke").stdout
    plan = planned("pipeline", f"RUNS={tmp_path}").stdout  # the laptop's lineage begins with M0
    assert "recipes/pretrain.py --config recipes/pretrain.yaml" in plan


@pytest.mark.slow
def test_a_lineage_may_begin_with_a_model_that_exists(killed_twice, tmp_path):
    runs, base = tmp_path / "runs", tmp_path / "base"
    own = shutil.ignore_patterns("manifest.json", "run.json")
    shutil.copytree(killed_twice / "m0", base, ignore=own)
    out = make(runs, f"MODEL={base}")
    assert "recipes/tokenizer.py" not in out and "recipes/pretrain.py" not in out
    assert {path.parent.name for path in runs.glob("*/manifest.json")} == set(STAGES[2:])
    assert weights_hash(runs / "m1") == weights_hash(killed_twice / "m1")
    metrics = load_manifest(runs / "evaluation")["metrics"]
    assert "m2/pass@1" in metrics and "m0/pass@1" not in metrics
    report = (runs / "report.md").read_text()
    assert report.startswith("# M1, R, M2, from") and "Not part of this lineage" not in report


@pytest.mark.slow
def test_same_seed_gives_the_same_final_weights(killed_twice, tmp_path):
    make(tmp_path / "runs")
    for name in ("tokenizer", "m0", "m1", "rm", "m2"):
        ours, theirs = (
            json.dumps(load_manifest(r / name)["files"].get("model.safetensors", {}))
            for r in (killed_twice, tmp_path / "runs")
        )
        assert ours == theirs, name
