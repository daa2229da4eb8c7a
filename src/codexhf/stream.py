"""A corpus that is read while it is trained on: checked, tokenised and packed, never on the disk.

The rows are a function of the cards, the tokenizer and the seed alone, so a resumed run reads from
the beginning, skips what it has trained on, and goes on with the same rows.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import IterableDataset

BUFFER = 1000  # rows among which the next one is drawn, since corpora come sorted


class PackedStream(IterableDataset):
    """Endless rows of input_ids, position_ids and labels, from cards that are begun again.

    Args:
        parts: one function a card, which reads it from the beginning.
        weights: share of the rows wanted from each; None to read one card after the other.
    """

    def __init__(
        self,
        parts: Sequence[Callable[[], Iterator[dict]]],
        weights: Sequence[float] | None,
        seed: int,
    ):
        self.parts, self.weights, self.seed = parts, weights, seed

    def __iter__(self) -> Iterator[dict]:
        draw = np.random.default_rng(self.seed)
        buffer: list[dict] = []
        for row in self._mixed(draw):
            if len(buffer) < BUFFER:
                buffer.append(row)
                continue
            place = draw.integers(BUFFER)
            yield buffer[place]
            buffer[place] = row

    def _mixed(self, draw: np.random.Generator) -> Iterator[dict]:
        if self.weights is None:
            for part in itertools.cycle(self.parts):
                yield from part()
        shares = np.array(self.weights) / np.sum(self.weights)
        rows = [part() for part in self.parts]
        while True:
            place = draw.choice(len(rows), p=shares)
            row = next(rows[place], None)
            if row is None:  # the card begins again
                rows[place] = self.parts[place]()
                row = next(rows[place])
            yield row
