"""A corpus that is read while it is trained on: checked, tokenised and packed, never on the disk.

The rows are a function of the cards, the tokenizer and the seed alone, so a resumed run reads from
the beginning, skips what it has trained on, and goes on with the same rows.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
from torch.utils.data import IterableDataset, get_worker_info

BUFFER = 1000  # rows among which the next one is drawn, since corpora come sorted


class PackedStream(IterableDataset):
    """Endless rows of input_ids, position_ids and labels, from cards that are begun again.

    Args:
        parts: one function a card, which reads it from the beginning.
        weights: share of the rows wanted from each; None to read one card after the other.
        key: what stands for the rows in the identity of a run.
    """

    def __init__(
        self,
        parts: Sequence[Callable[[], Iterator[dict]]],
        weights: Sequence[float] | None,
        seed: int,
        key: str,
    ):
        self.parts, self.weights, self.seed, self.key = parts, weights, seed, key

    def __iter__(self) -> Iterator[dict]:
        if (info := get_worker_info()) is not None and info.num_workers > 1:
            raise ValueError(
                f"dataloader_num_workers: got {info.num_workers}, expected at most 1 with a card "
                "that streams, which each of them would read as a whole. num_proc makes it faster."
            )
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


def numbered(tables: Iterator[pa.Table], size: int = 200) -> Iterator[tuple[int, pa.Table]]:
    """Yield batches of one form, that of the first, with the number of their first row."""
    start, names = 0, None
    for table in tables:
        names = names or table.column_names
        lacking = [name for name in names if name not in table.column_names]
        for name in lacking:
            table = table.append_column(name, pa.nulls(table.num_rows))
        table = table.select(names)
        for place in range(0, table.num_rows, size):
            # take() so that a process is sent the rows and not the whole table
            part = table.slice(place, size)
            yield start + place, part.take(pa.array(range(part.num_rows)))
        start += table.num_rows
