"""Samples in the trackers of `report_to`, next to the metrics that Trainer sends there."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROWS = 8
"""Samples sent at a time."""


def tracked(args: Any) -> bool:
    """Whether any tracker is on, for what would be made for it alone."""
    return bool({"tensorboard", "trackio", "wandb"} & {*args.report_to})


def log_samples(args: Any, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Send samples (dicts with the same keys) to every tracker that is on; call on one process.

    TensorBoard has no tables and gets Markdown, in a file of its own that is closed at once.
    """
    rows = [{key: str(value) for key, value in row.items()} for row in rows[:ROWS]]
    if not rows:
        return
    columns = list(rows[0])
    if "tensorboard" in args.report_to:
        from torch.utils.tensorboard import SummaryWriter

        folder = os.getenv("TENSORBOARD_LOGGING_DIR") or Path(args.output_dir, "runs", "samples")
        with SummaryWriter(str(folder)) as writer:
            writer.add_text("samples", _markdown(columns, rows), step)
    if "wandb" in args.report_to:
        import wandb

        if wandb.run is not None:
            data = [list(row.values()) for row in rows]
            wandb.run.log({"samples": wandb.Table(columns=columns, data=data)})
    if "trackio" in args.report_to:
        import pandas
        import trackio

        if trackio.context_vars.current_run.get() is not None:
            trackio.log({"samples": trackio.Table(dataframe=pandas.DataFrame(rows))})


def _markdown(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> str:
    parts = []
    for number, row in enumerate(rows, 1):
        parts.append(f"## {number}")
        parts += [f"**{name}**\n\n    " + row[name].replace("\n", "\n    ") for name in columns]
    return "\n\n".join(parts)
