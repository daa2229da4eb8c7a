"""What PPOTrainer logs: sums and counts, kept on the device until a log asks for them."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from codexhf.ppo.rollout import Completions, MicroBatch


class Metrics:
    """Means over tokens, completions, steps and processes, each a sum over a count.

    Every process must add the same names; how often and how much may differ.
    """

    def __init__(self) -> None:
        self._sums: dict[str, list] = defaultdict(lambda: [0.0, 0.0])

    @torch.no_grad()
    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add a sum over `count` things to a metric; nothing waits for the device."""
        metric = self._sums[name]
        for i, x in enumerate((total, count)):
            metric[i] = metric[i] + (x.detach().double() if torch.is_tensor(x) else x)

    def collect(self, over_processes: Callable[[Tensor], Tensor], device) -> dict[str, float]:
        """Return the mean of every metric that has a count, and start anew."""
        names = sorted(self._sums)
        if not names:
            return {}
        pairs = [[float(x) for x in self._sums[name]] for name in names]
        table = over_processes(torch.tensor(pairs, dtype=torch.float64, device=device)).cpu()
        self._sums.clear()
        found = {name: float(s / c) for name, (s, c) in zip(names, table, strict=True) if c > 0}
        if "val/ratio_square" in found:
            found["val/ratio_var"] = found.pop("val/ratio_square") - found["val/ratio"] ** 2
        return found

    def state(self) -> dict[str, list[float]]:
        """Return what was added since the last log, for a checkpoint."""
        return {name: [float(x) for x in metric] for name, metric in self._sums.items()}

    def restore(self, state: Mapping[str, list[float]]) -> None:
        """Go on from what `state` returned."""
        self._sums.clear()
        self._sums.update({name: list(metric) for name, metric in state.items()})

    @torch.no_grad()
    def add_surrogate(
        self, logprobs: Tensor, entropy: Tensor, ratio: Tensor, clipped: Tensor, batch: MicroBatch
    ) -> Tensor:
        """Add what an update says of the policy; return the summed approximate KL.

        Args:
            logprobs, entropy, ratio, clipped: (N,) of the completions' tokens.
        """
        count = len(logprobs)
        squares = 0.5 * ((logprobs - batch.logprobs) ** 2).sum()
        self.add("policy/approxkl_avg", squares, count)
        self.add("policy/clipfrac_avg", clipped.sum(), count)
        self.add("policy/entropy_avg", entropy.sum(), count)
        self.add("val/ratio", ratio.sum(), count)
        self.add("val/ratio_square", (ratio**2).sum(), count)
        return squares

    def add_rollout(
        self,
        completions: Completions,
        scores: Tensor,
        rewards: Mapping[str, Sequence[float | None]],
        logprobs: Tensor,
        kl: Tensor,
        kl_in_reward: float,
    ) -> None:
        """Add a rollout under TRL's names, and each reward under its own.

        Args:
            scores: (B,) shaped scores.
            rewards: values of each reward, before its weight.
            logprobs: (B, R) of the sampling policy.
            kl: (B, R).
            kl_in_reward: the coefficient with which the KL was taken from the rewards.
        """
        rows, real = len(completions.lengths), completions.response_mask
        kl_sum, score_sum = kl.sum(), scores.sum()
        self.add("objective/kl", kl_sum, rows)
        self.add("objective/entropy", -(logprobs * real).sum(), rows)
        self.add("objective/non_score_reward", -kl_in_reward * kl_sum, rows)
        self.add("objective/rlhf_reward", score_sum - kl_in_reward * kl_sum, rows)
        self.add("objective/scores", score_sum, rows)
        self.add("response/length", completions.lengths.sum(), rows)
        self.add("response/ended", completions.ended.sum(), rows)
        for name, values in rewards.items():
            known = [value for value in values if value is not None]
            self.add(f"rewards/{name}", float(sum(known)), len(known))

    def add_grad_norms(self, model: nn.Module, weighted: Mapping[str, Tensor]) -> None:
        """Add the norm of each weighted term's own gradient on this micro batch."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        for name, term in weighted.items():
            norm = torch.zeros((), device=term.device)
            if term.requires_grad:
                grads = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
                norms = [g.float().norm() for g in grads if g is not None]
                norm = torch.stack(norms).norm() if norms else norm
            self.add(f"grad_norm/{name}", norm, 1)


class Clock:
    """Seconds of the phases of a rollout; waits for the device at each lap."""

    def __init__(self, device: torch.device):
        self.device, self.laps = device, {}
        self.start = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the time since the last lap to that of `name`."""
        now = self._now()
        self.laps[name] = self.laps.get(name, 0.0) + now - self.start
        self.start = now
