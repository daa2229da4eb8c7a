"""Two processes on CPU (gloo, through torchrun) against one, under DDP, FSDP2 and ZeRO-3.

python -m pytest tests/test_ppo_ddp.py; ZeRO-3 is slow and where deepspeed is installed.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).parent))

import ppo_ddp_worker as worker  # noqa: E402

KINDS = ["full"] + (["lora"] if importlib.util.find_spec("peft") else [])
CASES = [f"{kind}-{what}" for kind in KINDS for what in ("gradients", "resume")]
CASES.append("full-adaptive")


PIECES = pytest.param("pieces", marks=pytest.mark.slow)
NO_ZERO = not importlib.util.find_spec("deepspeed")
ZERO3 = pytest.param(
    "zero3", marks=[pytest.mark.slow, pytest.mark.skipif(NO_ZERO, reason="without deepspeed")]
)


@pytest.fixture(scope="module", params=["ddp", "fsdp2", PIECES, ZERO3])
def two(request, tmp_path_factory) -> Path:
    """The folder in which two processes have worked on every case; one launch for all."""
    folder = tmp_path_factory.mktemp(request.param)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CI": "1"}
    # a process that waits for a collective which the other never joins would wait for ever
    done = subprocess.run(
        [*launcher, worker.__file__, str(folder), request.param, *CASES],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_two_processes_equal_those_of_one(tmp_path, two, kind):
    """Answers of uneven length on the two processes, demonstrations, KL and entropy in the loss."""
    case = f"{kind}-gradients"
    worker.work(case, tmp_path)
    one, both = torch.load(tmp_path / "result.pt"), torch.load(two / case / "result.pt")
    assert any(name.startswith("value_model.") for name in one["gradients"])
    if not both["gradients"]:  # DeepSpeed has used them up
        assert both["zero3"]
        one["gradients"] = {}
    assert one["gradients"].keys() == both["gradients"].keys()
    for name, gradient in one["gradients"].items():
        assert gradient.abs().sum() > 0 or "lora_A" in name, name
        assert torch.allclose(both["gradients"][name], gradient, atol=2e-6), name
    for name, value in one["logs"].items():
        if not name.startswith("grad_norm/"):  # of the last micro batch of each process
            assert both["logs"][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.fixture(scope="module")
def adaptive(tmp_path_factory, two) -> list[dict]:
    """What one process found in the adaptive case, and what each of two did."""
    alone = tmp_path_factory.mktemp("one")
    worker.work("full-adaptive", alone)
    files = [alone / "adaptive_0.json"]
    files += [two / "full-adaptive" / f"adaptive_{rank}.json" for rank in (0, 1)]
    return [json.loads(file.read_text()) for file in files]


def test_two_processes_adapt_the_kl_coefficient_like_one(adaptive):
    one, *both = adaptive
    errors = [kl / worker.KL_TARGET - 1.0 for kl in one["kls"]]
    # cut off at 0.2, the error would hide whose KL it is
    assert len(errors) == 5 and sum(0.05 < abs(error) < 0.19 for error in errors) == 2
    assert both[0]["coefs"] == both[1]["coefs"]
    assert both[0]["coefs"] == pytest.approx(one["coefs"], rel=1e-3)
    assert both[0]["logged"] == pytest.approx(one["logged"], rel=1e-3)
    assert one["logged"][0] == 0.05 and one["logged"][1:] == one["coefs"][:-1]


def test_two_processes_evaluate_like_one(adaptive):
    """Over 5 rows, one of which is answered twice for want of a sixth."""
    one, *both = (found["metrics"] for found in adaptive)
    assert {"eval_length", "eval_score", "eval_kl", "eval_response_length"} <= one.keys()
    for found in both:
        assert found == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_agree_resume_and_save(two, kind):
    folder = two / f"{kind}-resume"
    digests = [json.loads((folder / f"digests_{rank}.json").read_text()) for rank in (0, 1)]
    assert digests[0] == digests[1]
    for rank in (0, 1):  # the updates had stopped early at the second step that is resumed at
        state = json.loads((folder / f"out/checkpoint-6/ppo_state_{rank}.json").read_text())
        assert state["stopped"] and state["open_rollout"]
    assert digests[0].pop("frozen", "refused") in ("True", "refused")  # while the critic warms up
    assert len(digests[0]) == 3 and len(set(digests[0].values())) == 1
    AutoModelForSequenceClassification.from_pretrained(folder / "saved" / "value_model")
    if kind == "full":
        AutoModelForCausalLM.from_pretrained(folder / "saved")
    else:
        assert (folder / "saved" / "adapter_model.safetensors").exists()
