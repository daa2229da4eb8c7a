"""PPOTrainer against TRL 1.12's, after every optimizer step.

pytest tests/test_ppo_parity.py             # against tests/traces/trl-1.12.safetensors
python tests/traces/record.py --check       # both trainers live; needs trl==1.12.*
"""

import sys
from pathlib import Path

import pytest
import safetensors.torch

sys.path.insert(0, str(Path(__file__).parent / "traces"))

import record  # noqa: E402

from codexhf.generation.engines import HFEngine  # noqa: E402

TRACE = safetensors.torch.load_file(record.TRACE)
TOLERANCE = 1e-6


def differences(case: str, run: dict) -> dict[str, float]:
    packed = record.pack(case, run)
    for name, tensor in packed.items():
        assert tensor.shape == TRACE[name].shape, name
    return {
        name.split("/")[1]: float((tensor.double() - TRACE[name].double()).abs().max())
        for name, tensor in packed.items()
    }


def test_trace_covers_every_case():
    assert {name.split("/")[0] for name in TRACE} == set(record.CASES)


@pytest.mark.parametrize("case", record.CASES)
def test_parameters_equal_trl_after_every_step(case):
    found = differences(case, record.run_ours(case))
    assert found["final"] < TOLERANCE
    assert found["projections"] < TOLERANCE
    assert found["logs"] < 2e-5


@pytest.mark.parametrize("case", ["accumulation", "tied_embeddings"])
def test_a_shift_of_any_tensor_after_one_step_is_found(case):
    """Each tensor has projections of its own; its first and its last parameter show in them."""
    run = record.run_ours(case)
    shifted = run["steps"][3]
    for parameter in shifted.values():
        for place in (0, -1):
            flat = parameter.view(-1)
            before = flat[place].item()
            flat[place] += 2e-6
            assert differences(case, run)["projections"] > TOLERANCE
            flat[place] = before
    assert differences(case, run)["projections"] < TOLERANCE


def test_parameters_equal_trl_with_the_hf_engine():
    found = differences("accumulation", record.run_ours("accumulation", HFEngine))
    assert found["final"] < TOLERANCE and found["projections"] < TOLERANCE


@pytest.mark.parametrize(
    "better",
    [
        {"reward_position": "eos"},
        {"loss_aggregation": "token"},
        {"missing_eos_check": "stop_token", "stop_token": None, "stop_token_id": 7},
        {"max_grad_norm": 0.1},
        {"lr_schedule": "step"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_each_deliberate_difference_changes_the_parameters(better):
    run = record.run_ours("eos_penalty", **better)
    packed = record.pack("eos_penalty", run)
    assert float((packed["eos_penalty/final"] - TRACE["eos_penalty/final"]).abs().max()) > 1e-4


@pytest.mark.parametrize("case", ["accumulation", "minibatches"])
def test_layout_without_padding_computes_the_same(case):
    packed = record.pack(case, record.run_ours(case, masks_from="lengths", trim_padding=True))
    # masks differ from TRL's where the policy samples the pad token, so compare with ourselves
    plain = record.pack(case, record.run_ours(case, masks_from="lengths", trim_padding=False))
    assert float((packed[f"{case}/final"] - plain[f"{case}/final"]).abs().max()) < 1e-5
