"""Pretraining, SFT and the reward model on two processes (gloo) against one: DDP, FSDP2, ZeRO-3.

python -m pytest tests/test_sharding.py. PPO's part is in tests/test_ppo_ddp.py.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).parent))

import sharded_worker as worker  # noqa: E402
from codexhf.checkpoints import fault  # noqa: E402
from conftest import weights_hash  # noqa: E402

CASES = ["pretrain-full", "sft-full", "sft-lora", "rm-full", "rm-lora"]
ROOT = Path(__file__).parent.parent
SLOW = pytest.mark.slow
NO_ZERO = not importlib.util.find_spec("deepspeed")
HOWS = ["fsdp2", pytest.param("ddp", marks=SLOW), pytest.param("pieces", marks=SLOW)]
HOWS += [
    pytest.param("zero3", marks=[SLOW, pytest.mark.skipif(NO_ZERO, reason="without deepspeed")])
]


def launched(*arguments: str | Path) -> subprocess.CompletedProcess:
    """Run the worker in two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*launcher, worker.__file__, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.fixture(scope="module", params=HOWS)
def two(request, tmp_path_factory) -> Path:
    """The folder in which two processes have worked on every case; one launch for all."""
    folder = tmp_path_factory.mktemp(request.param)
    done = launched(folder, request.param, *CASES)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module", params=CASES)
def one(request, tmp_path_factory) -> tuple[str, dict]:
    """A case, and what one process found."""
    folder = tmp_path_factory.mktemp("one")
    worker.stage(request.param, folder)
    return request.param, torch.load(folder / "result.pt")


def test_two_processes_learn_what_one_does(one, two):
    case, alone = one
    both = torch.load(two / case / "whole" / "result.pt")
    gradients = alone["gradients"]
    if not both["gradients"]:  # DeepSpeed has used them up
        assert both["zero3"]
        gradients = {}
    assert gradients.keys() == both["gradients"].keys()
    for name, gradient in gradients.items():
        assert torch.allclose(both["gradients"][name], gradient, atol=2e-6), name
    losses = [[e["loss"] for e in found["history"] if "loss" in e] for found in (alone, both)]
    assert len(losses[0]) == worker.STEPS and losses[0][0] != losses[0][-1]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    if case.startswith("sft"):  # the first process answered, and told the other
        assert all("eval_pass@1" in e for e in both["history"] if "eval_loss" in e)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_resume_to_the_same_weights_and_one_loads_them(two, case):
    folders = [two / case / name / "out" for name in ("whole", "cut")]
    assert len({weights_hash(folder) for folder in folders}) == 1
    kind = AutoModelForSequenceClassification if case.startswith("rm") else AutoModelForCausalLM
    kind.from_pretrained(folders[0])


SRUN = """#!/bin/bash
shift
SLURM_NODEID=1 "$@" & SLURM_NODEID=0 "$@" && wait $!
"""


@pytest.mark.slow
def test_slurm_file_and_yaml_start_two_hosts_of_one_process(tmp_path):
    """Slurm is made of two lines here; the file, accelerate's launch and the YAML are real."""
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/bash\necho 127.0.0.1\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    with socket.socket() as listener:
        listener.bind(("", 0))
        port = str(listener.getsockname()[1])
    paths = [str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]]
    done = subprocess.run(
        ["bash", str(ROOT / "recipes/accelerate/slurm.sh"), worker.__file__, str(tmp_path / "two"),
         "pieces", "pretrain-full"],
        cwd=ROOT,
        env={**os.environ, "PATH": os.pathsep.join(paths), "PORT": port, "GPUS": "1",
             "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "here", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    folders = [tmp_path / "two" / "pretrain-full" / name / "out" for name in ("whole", "cut")]
    assert len({weights_hash(folder) for folder in folders}) == 1
    assert json.loads((folders[0] / "manifest.json").read_text())["environment"]["processes"] == 2


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("raises", "ZeroDivisionError: this reward divides by nothing"),
        pytest.param("dies", "SIGKILL", marks=SLOW),
    ],
)
def test_a_process_that_fails_ends_the_run_with_its_error(tmp_path, case, said):
    done = launched(tmp_path, "fail", case)
    assert time.time() - float((tmp_path / "failed_at").read_text()) < 60
    cause = done.stderr[done.stderr.index("Root Cause") :]
    assert done.returncode == 1 and "rank      : 1" in cause and said in cause, done.stderr[-3000:]
    if case == "raises":
        assert "process 1 failed:" in done.stderr
    assert fault(tmp_path / "out" / "checkpoint-2") is None
