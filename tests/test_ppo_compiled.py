"""PPO with torch_compile: compiled layers and log-probabilities, and the numbers of a plain run."""

import pytest
import torch

from codexhf.ppo.objective import linear_logprobs
from ppo_setup import new_trainer

TERMS = {"kl_in": "loss", "kl_estimator": "k3", "entropy_coef": 0.01, "total_episodes": 16}


@pytest.mark.slow  # half a minute of compiling
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_change_no_number(tmp_path, checkpointing):
    trained = {}
    for compiled in (False, True):
        config = {**TERMS, "torch_compile": compiled, "gradient_checkpointing": checkpointing}
        trainer = new_trainer(tmp_path / str(compiled), config=config)
        start = {name: w.clone() for name, w in trainer.model.state_dict().items()}
        layer = trainer.policy_model.base_model.layers[0]
        assert (layer._compiled_call_impl is not None) == compiled
        trainer.train()
        trained[compiled] = trainer.model.state_dict()
    for name, weight in trained[False].items():
        torch.testing.assert_close(trained[True][name], weight, rtol=0, atol=2e-5)
    assert sum((weight != start[name]).sum() for name, weight in trained[False].items()) > 100


@pytest.mark.parametrize("has_bias", [False, True])
def test_compiled_logprobs_have_the_same_values_and_gradients(has_bias):
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 16), torch.randn(300, 16)
    given = [hidden, weight, torch.randn(300)] if has_bias else [hidden, weight]
    given = [x.requires_grad_() for x in given]
    targets, found = torch.randint(0, 300, (50,)), []
    for compiled in (False, True):
        logprobs, entropy = linear_logprobs(
            *given,
            *[None] * (3 - len(given)),
            targets,
            0.7,
            block=16,
            keep=False,
            compiled=compiled,
        )
        loss = (logprobs * torch.arange(50)).sum() + (entropy**2).sum()
        found.append([logprobs, entropy, *torch.autograd.grad(loss, given)])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)
