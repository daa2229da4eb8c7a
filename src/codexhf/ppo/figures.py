"""What PPOTrainer logs: sums and counts, kept on the device until a log asks for them."""

import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor


class Figures:
    """Means over tokens, answers, steps and processes, each a sum over a count.

    Every process must add the same names; how often and how much may differ.
    """

    def __init__(self) -> None:
        self._sums: dict[str, list] = defaultdict(lambda: [0.0, 0.0])

    @torch.no_grad()
    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add a sum over `count` things to a figure; nothing waits for the device."""
        figure = self._sums[name]
        for i, x in enumerate((total, count)):
            figure[i] = figure[i] + (x.detach().double() if torch.is_tensor(x) else x)

    def collect(self, over_processes: Callable[[Tensor], Tensor], device) -> dict[str, float]:
        """Return the mean of every figure that has a count, and start anew."""
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
        """Book the time since the last lap under `name`."""
        now = self._now()
        self.laps[name] = now - self.start
        self.start = now
