"""PPO with torch_compile: compiled layers and log-probabilities, and the numbers of a plain run."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from codexhf.generation.native import NativeEngine, Sampling, sample, sample_compiled
from codexhf.models import compile_layers
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


@pytest.mark.slow  # a minute of compiling
def test_a_compiled_decoding_step_draws_the_same_tokens():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    model, sampling = Qwen2ForCausalLM(config).eval(), Sampling(40, (2, 3, 4), 64)
    ids = torch.randint(5, 500, (8, 16))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[2, :5] = False
    found = []
    for compiled in (False, True):
        if compiled:
            compile_layers(model)
        engine = NativeEngine(sampling, fixed_shapes=True, compiled=compiled)
        found.append(engine.generate(model, ids, mask, seed=1, temperature=1.0))
    assert engine.fixed_shapes  # the step was not given up
    assert torch.equal(found[0].responses, found[1].responses)
    torch.testing.assert_close(found[1].logprobs, found[0].logprobs, rtol=0, atol=1e-4)
    assert model.config._attn_implementation == "sdpa"


def test_compiled_sampling_draws_what_plain_sampling_draws():
    torch.manual_seed(0)
    logits = torch.randn(64, 300) * 2
    for temperature in (1.0, 0.7):
        seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
        plain = sample(logits, temperature, seeds[0], invert=False)
        compiled = sample_compiled(logits, temperature, seeds[1])
        assert torch.equal(plain[0], compiled[0])
        torch.testing.assert_close(plain[1], compiled[1])
