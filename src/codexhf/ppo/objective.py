"""The mathematics of PPO as pure tensor functions; imports torch and nothing else.

Used by rollout.py (rewards, advantages) and trainer.py (losses).
Shapes: B sequences, R response tokens, N selected tokens, H hidden size, V vocabulary.
Every mask is bool and True marks a real token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes; the identity on one process."""


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of `x` where `mask` is True."""
    return (x * mask).sum()


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, reduce: Reduce | None = None):
    """Scale the masked entries of `x` to variance 1, and to mean 0 if `shift_mean`.

    The variance is Bessel-corrected, as in TRL. With one entry or none there is nothing to scale
    by, and `x` comes back centred only.

    Args:
        x: (B, R) float.
        mask: (B, R).
        shift_mean: False keeps the mean.
        reduce: sums over processes, to whiten the global batch; None whitens this process's rows.
    Returns:
        (B, R); entries outside the mask hold no meaning.
    """
    total = reduce or (lambda t: t)
    sums = total(torch.stack([masked_sum(x, mask), mask.sum().to(x.dtype)]))
    mean, count = sums[0] / sums[1].clamp(min=1), sums[1]
    squares = total(masked_sum((x - mean) ** 2, mask))
    variance = squares / count.clamp(min=1) * (count / (count - 1).clamp(min=1))
    scale = torch.where(count > 1, torch.rsqrt(variance + 1e-8), torch.ones_like(variance))
    whitened = (x - mean) * scale
    return whitened if shift_mean else whitened + mean


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Estimate KL(policy || reference) per token from the log-probabilities of sampled tokens.

    Args:
        logprobs: (B, R) of the policy.
        ref_logprobs: (B, R) of the reference.
        estimator: "k1" unbiased and signed, "k2" half the square, "k3" unbiased and non-negative.
    Returns:
        (B, R).
    Source: http://joschu.net/blog/kl-approx.html
    """
    log_ratio = ref_logprobs - logprobs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio**2
    if estimator == "k3":
        return (log_ratio.exp() - 1) - log_ratio
    raise ValueError(f"kl_estimator: got {estimator!r}, expected 'k1', 'k2' or 'k3'.")


def token_rewards(kl: Tensor, kl_coef: float, scores: Tensor, end: Tensor) -> Tensor:
    """Return -kl_coef * kl per token, with each row's score added at its end position.

    Args:
        kl: (B, R), zero outside the response.
        kl_coef: 0 leaves the KL out.
        scores: (B,).
        end: (B,) index of the token that receives the score.
    Returns:
        (B, R).
    """
    rewards = -kl_coef * kl
    rows = torch.arange(rewards.size(0), device=rewards.device)
    rewards[rows, end] += scores
    return rewards


def overlong_penalty(lengths: Tensor, limit: int, buffer: int, penalty: float) -> Tensor:
    """Return a penalty that grows linearly over the last `buffer` tokens before `limit`.

    Args:
        lengths: (B,) response lengths.
        limit: the longest possible response.
        buffer: tokens before the limit at which the penalty starts.
        penalty: its value at the limit, positive.
    Returns:
        (B,) float32, at most 0.
    Source: Yu et al. 2025, eq. 13 (arXiv:2503.14476).
    """
    over = (lengths - (limit - buffer)).clamp(min=0, max=buffer).float()
    return -penalty * over / buffer


def generalized_advantages(
    rewards: Tensor, values: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns by generalised advantage estimation.

    The end of a response needs no special case: rewards and values after it are 0, so the
    recursion, which runs from the right, arrives there with 0.

    Args:
        rewards: (B, R) float32 per token, 0 after the end.
        values: (B, R) float32, 0 after the end.
        gamma: discount per token, in [0, 1].
        lam: trace decay, in [0, 1].
    Returns:
        advantages: (B, R).
        returns: (B, R), advantages + values.
    Source: Schulman et al. 2016, eq. 16 (arXiv:1506.02438).
    """
    width = rewards.size(1)
    advantages = torch.zeros_like(rewards)
    carried = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(width)):
        next_value = values[:, t + 1] if t + 1 < width else 0.0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        carried = delta + gamma * lam * carried
        advantages[:, t] = carried
    return advantages, advantages + values


def policy_losses(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the clipped surrogate loss per token.

    Args:
        logprobs: (B, R) of the policy being trained.
        old_logprobs: (B, R) at sampling time.
        advantages: (B, R).
        clip_low: the ratio is clipped from below at 1 - clip_low.
        clip_high: and from above at 1 + clip_high; None means clip_low ("clip-higher",
            arXiv:2503.14476, eq. 10, when it is larger).
        dual_clip: caps the loss of a negative advantage at -dual_clip * advantage
            (arXiv:1912.09729, eq. 5); None leaves it open.
    Returns:
        losses: (B, R).
        ratio: (B, R).
        clipped: (B, R) bool, True where clipping decided the loss.
    Source: Schulman et al. 2017, eq. 7 (arXiv:1707.06347).
    """
    ratio = (logprobs - old_logprobs).exp()
    high = clip_low if clip_high is None else clip_high
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + high)
    losses, clipped = torch.max(plain, bounded), bounded > plain
    if dual_clip is not None:
        cap = -advantages * dual_clip
        capped = (advantages < 0) & (cap < losses)
        losses, clipped = torch.where(capped, cap, losses), clipped | capped
    return losses, ratio, clipped


def value_losses(
    values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float
) -> tuple[Tensor, Tensor]:
    """Return the clipped squared error of the critic per token, halved.

    Args:
        values: (B, R) of the critic being trained.
        old_values: (B, R) at sampling time.
        returns: (B, R) targets.
        cliprange: how far a value may move from old_values in one rollout.
    Returns:
        losses: (B, R).
        clipped: (B, R) bool.
    """
    near = torch.clamp(values, old_values - cliprange, old_values + cliprange)
    plain, bounded = (values - returns) ** 2, (near - returns) ** 2
    return 0.5 * torch.max(plain, bounded), bounded > plain


def truncated_importance_weights(logprobs: Tensor, sampling_logprobs: Tensor, cap: float) -> Tensor:
    """Return min(p_train / p_engine, cap) per token, for an engine that rounds differently.

    Args:
        logprobs: (B, R) recomputed by the training forward before any update.
        sampling_logprobs: (B, R) reported by the generation engine.
        cap: upper bound of a weight.
    Returns:
        (B, R), without gradient.
    Source: Espeholt et al. 2018, eq. 1 (arXiv:1802.01561), applied to engine mismatch.
    """
    return (logprobs - sampling_logprobs).detach().exp().clamp(max=cap)


MAX_KL_ERROR = 0.2
"""Relative distance from the target beyond which AdaptiveKL does not react more strongly."""


@dataclass
class AdaptiveKL:
    """Proportional controller that keeps the KL per response near a target.

    Source: Ziegler et al. 2019, section 2.2 (arXiv:1909.08593).
    """

    coef: float
    target: float
    horizon: int

    def check(self, episodes: int) -> None:
        """Refuse a horizon so short that one rollout could turn the coefficient's sign."""
        if MAX_KL_ERROR * episodes >= self.horizon:
            raise ValueError(
                f"kl_horizon: got {self.horizon} episodes with {episodes} in a rollout, expected "
                f"more than {MAX_KL_ERROR * episodes:g}: the coefficient would fall below 0."
            )

    def update(self, kl: float, episodes: int) -> None:
        """Move the coefficient after a rollout of `episodes` with mean KL `kl`."""
        error = min(max(kl / self.target - 1.0, -MAX_KL_ERROR), MAX_KL_ERROR)
        self.coef *= 1.0 + error * episodes / self.horizon


def logits_logprobs(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of `targets` and the entropies, in float32, from whole logits.

    Args:
        logits: (N, V), any float dtype.
        targets: (N,) token ids.
        temperature: divides the logits.
    Returns:
        logprobs: (N,) float32.
        entropy: (N,) float32, without gradient unless the logits have one.
    """
    scaled = logits.float() / temperature
    normaliser = torch.logsumexp(scaled, -1)
    logprobs = scaled.gather(-1, targets[:, None]).squeeze(-1) - normaliser
    entropy = normaliser - (torch.softmax(scaled, -1) * scaled).sum(-1)
    return logprobs, entropy


class _LinearLogprobs(torch.autograd.Function):
    """`logits_logprobs(hidden @ weight.T + bias)`, a block of rows at a time.

    Log-probabilities (N, V) are kept for the backward pass where `keep` says so, else computed
    again there. Besides them two tensors (block, V) exist at a time.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, block, keep, dtype):
        logprobs = torch.empty(hidden.size(0), dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        kept = None
        if keep and any(ctx.needs_input_grad[:3]):
            kept = logprobs.new_empty(hidden.size(0), weight.size(0))
        for rows in _blocks(hidden.size(0), block):
            logits = _scaled_logits(hidden[rows], weight, bias, temperature, dtype)
            logp, probs = _log_softmax(logits)
            logprobs[rows] = logp.gather(-1, targets[rows, None]).squeeze(-1)
            # einsum: the product (n, V) is never written; autocast would round it to bfloat16
            with torch.autocast(hidden.device.type, enabled=False):
                entropy[rows] = -torch.einsum("nv,nv->n", probs, logp)
            if kept is not None:
                kept[rows] = logp
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, kept)
        ctx.temperature, ctx.block, ctx.dtype = temperature, block, dtype
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, logprobs_grad, entropy_grad):
        hidden, weight, bias, targets, entropy, kept = ctx.saved_tensors
        if logprobs_grad is None and entropy_grad is None:
            return (None,) * 8
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # many blocks would round many times in bfloat16: they are summed in float32
        sum_dtype = torch.float32 if hidden.size(0) > ctx.block else ctx.dtype
        weight_grad = bias_grad = None
        if ctx.needs_input_grad[1]:
            weight_grad = torch.zeros_like(weight, dtype=sum_dtype)
        if bias is not None and ctx.needs_input_grad[2]:
            bias_grad = torch.zeros_like(bias, dtype=torch.float32)
        for rows in _blocks(hidden.size(0), ctx.block):
            if kept is None:
                logits = _scaled_logits(hidden[rows], weight, bias, ctx.temperature, ctx.dtype)
                logp, probs = _log_softmax(logits)
            else:
                logp, probs = kept[rows], kept[rows].exp()
            upstream = [None if g is None else g[rows, None] for g in (logprobs_grad, entropy_grad)]
            grad = _logits_grad(logp, probs, targets[rows], entropy[rows, None], *upstream)
            grad = grad.div_(ctx.temperature).to(ctx.dtype)  # (n, V)
            if hidden_grad is not None:
                hidden_grad[rows] = (grad @ weight.to(ctx.dtype)).to(hidden.dtype)
            if weight_grad is not None:
                _add_product(weight_grad, grad.T, hidden[rows].to(ctx.dtype))
            if bias_grad is not None:
                bias_grad += grad.float().sum(0)
        weight_grad = None if weight_grad is None else weight_grad.to(weight.dtype)
        bias_grad = None if bias_grad is None else bias_grad.to(bias.dtype)
        return hidden_grad, weight_grad, bias_grad, None, None, None, None, None


class _CompiledLogprobs(torch.autograd.Function):
    """`_LinearLogprobs` with compiled kernels, which read logits in the dtype they are made in.

    Nothing of the size (N, V) is kept, nor ever made in float32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, block, dtype):
        found = [
            _compiled(_block_terms)(logits, targets[rows], temperature)
            for rows in _blocks(hidden.size(0), block)
            for logits in [_logits(hidden[rows], weight, bias, dtype)]
        ]
        logprobs, entropy, normaliser = (torch.cat(parts) for parts in zip(*found, strict=True))
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, normaliser)
        ctx.temperature, ctx.block, ctx.dtype = temperature, block, dtype
        return logprobs, entropy

    @staticmethod
    def backward(ctx, logprobs_grad, entropy_grad):
        hidden, weight, bias, targets, entropy, normaliser = ctx.saved_tensors
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        bias_grad = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        weight = weight.to(ctx.dtype)
        for rows in _blocks(hidden.size(0), ctx.block):
            logits = _logits(hidden[rows], weight, bias, ctx.dtype)
            given = (x[rows] for x in (targets, normaliser, entropy, logprobs_grad, entropy_grad))
            grad = _compiled(_block_grad)(logits, *given, ctx.temperature)  # (n, V)
            hidden_grad[rows] = (grad @ weight).to(hidden.dtype)
            weight_grad += grad.T @ hidden[rows].to(ctx.dtype)
            if bias is not None:
                bias_grad += grad.float().sum(0)
        bias_grad = None if bias is None else bias_grad.to(bias.dtype)
        return hidden_grad, weight_grad.to(ctx.saved_tensors[1].dtype), bias_grad, *(None,) * 4


@cache
def _compiled(function: Callable) -> Callable:
    # the number of rows varies; a vocabulary that might would cost a division for every logit
    return torch.compile(function, dynamic=None)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return logits (n, V) in `dtype`."""
    logits = hidden.to(dtype) @ weight.to(dtype).T
    return logits if bias is None else logits.add_(bias.to(dtype))


def _block_terms(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """Return log-probabilities of `targets`, entropies and normalisers (n,), all float32."""
    scaled = logits.float() / temperature
    normaliser = torch.logsumexp(scaled, -1)
    logp = scaled - normaliser[:, None]
    entropy = -(logp.exp() * logp).sum(-1)
    return scaled.gather(-1, targets[:, None]).squeeze(-1) - normaliser, entropy, normaliser


def _block_grad(
    logits, targets, normaliser, entropy, logprobs_grad, entropy_grad, temperature
) -> Tensor:
    """Return the gradient (n, V) by the logits: what `_logits_grad` says, in their dtype."""
    logp = logits.float() / temperature - normaliser[:, None]
    slope = logprobs_grad[:, None] + entropy_grad[:, None] * (logp + entropy[:, None])
    hit = torch.arange(logits.size(1), device=logits.device) == targets[:, None]
    grad = logprobs_grad[:, None] * hit - logp.exp() * slope
    return (grad / temperature).to(logits.dtype)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    *,
    block: int,
    keep: bool,
    dtype: torch.dtype | None = None,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of `targets` and entropies straight from hidden states.

    Equal to `logits_logprobs` on the logits, in values and gradients, without whole logits.

    Args:
        hidden: (N, H).
        weight: (V, H) of the output embedding.
        bias: (V,) or None.
        targets: (N,).
        temperature: divides the logits.
        block: rows of logits made at a time, at least 1.
        keep: keep float32 log-probabilities (N, V) for the backward pass instead of making them
            again there: faster, where they fit.
        dtype: of the matrix products; None takes that of `hidden`.
        compiled: with kernels of torch.compile, which never keep anything: made for a GPU.
    Returns:
        logprobs: (N,) float32.
        entropy: (N,) float32; both carry gradients to hidden, weight and bias.
    """
    dtype = dtype or hidden.dtype
    if compiled:
        return _CompiledLogprobs.apply(hidden, weight, bias, targets, temperature, block, dtype)
    return _LinearLogprobs.apply(hidden, weight, bias, targets, temperature, block, keep, dtype)


def _blocks(length: int, size: int) -> list[slice]:
    """Cut range(length) into slices of at most `size`."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _scaled_logits(hidden, weight, bias, temperature, dtype) -> Tensor:
    """Return float32 logits (n, V) over the temperature."""
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits += bias.to(dtype)
    return logits.float().div_(temperature)


def _log_softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities, in the place of `logits` (n, V), and probabilities."""
    logits -= logits.amax(-1, keepdim=True)
    probs = logits.exp()
    total = probs.sum(-1, keepdim=True)
    logits -= total.log()
    return logits, probs.div_(total)


def _logits_grad(logp, probs, targets, entropy, logprobs_grad, entropy_grad) -> Tensor:
    """Return the gradient (n, V) by the scaled logits, g (1[target] - p) - e p (log p + H).

    It takes the place of `probs`; `logp` stays, as it may be needed for another backward pass.
    """
    if entropy_grad is None:
        grad = probs.mul_(-logprobs_grad)
    else:
        slope = (logp + entropy).mul_(-entropy_grad)
        grad = probs.mul_(slope if logprobs_grad is None else slope.sub_(logprobs_grad))
    if logprobs_grad is not None:
        grad.scatter_add_(-1, targets[:, None], logprobs_grad)
    return grad


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`, in one go where the dtypes agree."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += (a @ b).to(total.dtype)
