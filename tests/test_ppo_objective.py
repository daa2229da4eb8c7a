"""The mathematics of PPO against numbers by hand: `pytest tests/test_ppo_objective.py`."""

import ast
import math
from pathlib import Path

import pytest
import torch

from codexhf.ppo import objective

MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_objective_imports_torch_alone():
    tree = ast.parse(Path(objective.__file__).read_text())
    names = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    names += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    assert {name.split(".")[0] for name in names} <= {
        "torch",
        "collections",
        "dataclasses",
        "functools",
    }


def test_whiten_gives_mean_zero_and_variance_one():
    x = torch.tensor([[1.0, 2.0, 99.0], [6.0, 99.0, 99.0]])
    white = objective.whiten(x, MASK)[MASK]
    assert white.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert white.var().item() == pytest.approx(1.0, abs=1e-5)  # Bessel-corrected
    assert objective.whiten(x, MASK, shift_mean=False)[MASK].mean().item() == pytest.approx(3.0)


@pytest.mark.parametrize("count", [0, 1])
def test_whiten_of_one_or_no_token_is_finite(count):
    mask = torch.arange(3)[None] < count
    white = objective.whiten(torch.tensor([[5.0, 1.0, 2.0]]), mask)
    assert torch.isfinite(white).all()
    assert white[mask].abs().sum().item() == 0.0


def test_whiten_with_reduce_uses_the_sums_of_all_processes():
    parts = torch.randn(2, 4, 5).unbind()
    masks = [torch.ones(4, 5, dtype=torch.bool)] * 2
    whole = objective.whiten(torch.cat(parts), torch.cat(masks))
    seen = []

    def reduce(x):  # what the other process would add: its own sums, in the same order of calls
        seen.append(x)
        if x.numel() == 2:
            return x + torch.stack([parts[1].sum(), torch.tensor(20.0)])
        mean = torch.cat(parts).mean()
        return x + ((parts[1] - mean) ** 2).sum()

    assert torch.allclose(objective.whiten(parts[0], masks[0], reduce=reduce), whole[:4], atol=1e-6)
    assert len(seen) == 2


def test_kl_estimators_of_equal_policies_are_zero_and_k3_is_never_negative():
    logprobs = torch.randn(3, 4)
    for estimator in ("k1", "k2", "k3"):
        assert objective.kl_estimate(logprobs, logprobs, estimator).abs().max() == 0
    assert (objective.kl_estimate(logprobs, torch.randn(3, 4), "k3") >= 0).all()


def test_kl_estimators_by_hand():
    logprobs, reference = torch.tensor([[-1.0]]), torch.tensor([[-1.5]])
    assert objective.kl_estimate(logprobs, reference, "k1").item() == pytest.approx(0.5)
    assert objective.kl_estimate(logprobs, reference, "k2").item() == pytest.approx(0.125)
    expected = math.exp(-0.5) - 1 + 0.5
    assert objective.kl_estimate(logprobs, reference, "k3").item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="k4"):
        objective.kl_estimate(logprobs, reference, "k4")


def test_token_rewards_put_the_score_on_the_end_token():
    kl = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]])
    rewards = objective.token_rewards(kl, 0.1, torch.tensor([5.0, -1.0]), torch.tensor([1, 0]))
    assert torch.allclose(rewards, torch.tensor([[-0.1, 4.8, 0.0], [-1.3, 0.0, 0.0]]))


def test_overlong_penalty_grows_over_the_buffer():
    penalty = objective.overlong_penalty(
        torch.tensor([5, 8, 9, 10]), limit=10, buffer=4, penalty=2.0
    )
    assert penalty.tolist() == [0.0, -1.0, -1.5, -2.0]


def test_advantages_by_hand():
    rewards = torch.tensor([[0.0, 1.0, 0.0]])
    values = torch.tensor([[0.5, 0.25, 0.0]])  # the answer has two tokens
    found, returns = objective.generalized_advantages(rewards, values, gamma=0.9, lam=0.5)
    last = 1.0 - 0.25
    first = 0.0 + 0.9 * 0.25 - 0.5 + 0.9 * 0.5 * last
    assert torch.allclose(found, torch.tensor([[first, last, 0.0]]))
    assert torch.allclose(returns, found + values)


def test_advantages_with_lambda_one_are_returns_minus_values():
    rewards, values = torch.randn(4, 6), torch.randn(4, 6)
    found, _ = objective.generalized_advantages(rewards, values, gamma=1.0, lam=1.0)
    togo = rewards.flip(1).cumsum(1).flip(1)
    assert torch.allclose(found, togo - values, atol=1e-5)


def loss_of(ratio: float, advantage: float, **options):
    logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    losses, _, clipped = objective.policy_losses(
        logprobs, torch.zeros(1), torch.tensor([advantage]), **options
    )
    losses.sum().backward()
    return losses.item(), logprobs.grad.item(), bool(clipped)


def test_policy_loss_is_minus_the_advantage_at_ratio_one():
    loss, gradient, clipped = loss_of(1.0, 2.0)
    assert loss == pytest.approx(-2.0) and gradient == pytest.approx(-2.0) and not clipped


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "moves"),
    [
        (1.5, 1.0, -1.2, False),
        (0.5, 1.0, -0.5, True),
        (1.5, -1.0, 1.5, True),
        (0.5, -1.0, 0.8, False),
    ],
)
def test_policy_loss_is_clipped_on_the_pessimistic_side(ratio, advantage, loss, moves):
    found, gradient, clipped = loss_of(ratio, advantage)
    assert found == pytest.approx(loss)
    assert (gradient != 0.0) == moves and clipped != moves


def test_clip_high_lets_good_tokens_rise_further():
    assert loss_of(1.25, 1.0, clip_low=0.2)[1] == 0.0
    assert loss_of(1.25, 1.0, clip_low=0.2, clip_high=0.28)[1] != 0.0


def test_dual_clip_caps_only_negative_advantages():
    assert loss_of(10.0, -1.0) == (pytest.approx(10.0), pytest.approx(10.0), False)
    assert loss_of(10.0, -1.0, dual_clip=3.0) == (pytest.approx(3.0), 0.0, True)
    assert loss_of(0.5, 1.0, dual_clip=3.0)[0] == pytest.approx(-0.5)


def test_value_loss_is_clipped_around_the_old_value():
    old, returns = torch.tensor([0.0, 0.0]), torch.tensor([1.0, -1.0])
    values = torch.tensor([0.5, 0.5], requires_grad=True)
    losses, clipped = objective.value_losses(values, old, returns, cliprange=0.2)
    assert torch.allclose(losses, torch.tensor([0.5 * 0.64, 0.5 * 2.25]))
    assert clipped.tolist() == [True, False]
    losses.sum().backward()
    assert values.grad.tolist() == [0.0, pytest.approx(1.5)]


def test_truncated_importance_weights_are_capped_and_carry_no_gradient():
    logprobs = torch.tensor([0.0, 5.0], requires_grad=True)
    weights = objective.truncated_importance_weights(logprobs, torch.tensor([1.0, 0.0]), cap=2.0)
    assert weights.tolist() == [pytest.approx(math.exp(-1.0)), 2.0]
    assert not weights.requires_grad


def test_adaptive_kl_moves_towards_its_target_at_most_twenty_percent():
    control = objective.AdaptiveKL(coef=0.1, target=4.0, horizon=100)
    control.update(40.0, episodes=10)
    assert control.coef == pytest.approx(0.1 * 1.02)
    control.update(0.0, episodes=10)
    assert control.coef == pytest.approx(0.1 * 1.02 * 0.98)
    control.update(4.0, episodes=10)
    assert control.coef == pytest.approx(0.1 * 1.02 * 0.98)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("block", [3, 7, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_logprobs_equal_those_of_whole_logits(block, keep, bias):
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64).float().requires_grad_()
    weight = torch.randn(11, 5).requires_grad_()
    offset = torch.randn(11).requires_grad_() if bias else None
    targets, upstream = torch.randint(11, (7,)), torch.randn(2, 7)
    inputs = [hidden, weight, *([offset] if bias else [])]

    def gradients(pair):
        total = (pair[0] * upstream[0]).sum() + (pair[1] * upstream[1]).sum()
        return torch.autograd.grad(total, inputs)

    found = objective.linear_logprobs(hidden, weight, offset, targets, 0.7, block=block, keep=keep)
    logits = torch.nn.functional.linear(hidden, weight, offset)
    expected = objective.logits_logprobs(logits, targets, 0.7)
    reference = torch.log_softmax(logits / 0.7, -1)
    assert torch.allclose(expected[0], reference.gather(1, targets[:, None]).squeeze(1), atol=1e-6)
    assert torch.allclose(expected[1], -(reference.exp() * reference).sum(1), atol=1e-6)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    for ours, theirs in zip(gradients(found), gradients(expected), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_linear_logprobs_of_frozen_weights_and_of_no_tokens():
    weight = torch.randn(11, 5)
    hidden = torch.randn(4, 5, requires_grad=True)
    logprobs, _ = objective.linear_logprobs(
        hidden, weight, None, torch.zeros(4).long(), 1.0, block=2, keep=True
    )
    logprobs.sum().backward()
    assert hidden.grad.abs().sum() > 0 and weight.grad is None
    empty, _ = objective.linear_logprobs(
        hidden[:0], weight, None, torch.zeros(0).long(), 1.0, block=2, keep=True
    )
    assert empty.shape == (0,)


def test_linear_logprobs_hold_one_block_of_logits():
    """Tensors with a vocabulary dimension are at most a block long, forward and backward."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if torch.is_tensor(out) and out.dim() == 2 and out.size(1) == 1009:
                sizes.append(out.size(0))
            return out

    hidden = torch.randn(64, 4, requires_grad=True)
    weight = torch.randn(1009, 4, requires_grad=True)
    with Watch():
        targets = torch.zeros(64).long()
        logprobs, _ = objective.linear_logprobs(
            hidden, weight, None, targets, 1.0, block=8, keep=False
        )
        logprobs.sum().backward()
    assert sizes and max(sizes) == 8
