"""Two processes on CPU (gloo, through torchrun) against one: `pytest tests/test_ppo_ddp.py`."""

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


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The folder in which two processes have worked on every case; one launch for all."""
    folder = tmp_path_factory.mktemp("two")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CI": "1"}
    # a process that waits for a collective which the other never joins would wait for ever
    done = subprocess.run(
        [*launcher, worker.__file__, str(folder), *CASES],
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
    assert one["gradients"].keys() == both["gradients"].keys()
    assert any(name.startswith("value_model.") for name in one["gradients"])
    for name, gradient in one["gradients"].items():
        assert gradient.abs().sum() > 0 or "lora_A" in name, name
        assert torch.allclose(both["gradients"][name], gradient, atol=2e-6), name
    for name, value in one["logs"].items():
        if not name.startswith("grad_norm/"):  # of the last micro batch of each process
            assert both["logs"][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_agree_resume_and_save(two, kind):
    folder = two / f"{kind}-resume"
    digests = [json.loads((folder / f"digests_{rank}.json").read_text()) for rank in (0, 1)]
    assert digests[0] == digests[1]
    assert digests[0].pop("frozen") == "True"  # the policy, while the critic warms up
    assert len(digests[0]) == 3 and len(set(digests[0].values())) == 1
    AutoModelForSequenceClassification.from_pretrained(folder / "saved" / "value_model")
    if kind == "full":
        AutoModelForCausalLM.from_pretrained(folder / "saved")
    else:
        assert (folder / "saved" / "adapter_model.safetensors").exists()
