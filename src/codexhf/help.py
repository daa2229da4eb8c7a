"""The text of `--help`: what the stage can be told, with the values of its YAML as defaults."""

import ast
import dataclasses
import os
import re
import textwrap
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from codexhf import knobs

WIDTH = 100
MEANINGS = {
    "auto_find_batch_size": "Find how many of an optimizer step's rows fit into the GPU at once, "
    "and unless said whether to recompute them. The step stays as it is.",
}
"""What fields of a library mean here, where that is something else."""


def help_text(
    types: Sequence[type],
    recipe: str,
    config: str,
    values: Mapping[str, Any],
    *,
    everything: bool = False,
) -> str:
    """Return the help: ours first, then what the YAML sets of the library's fields.

    Args:
        values: what the YAML sets.
        everything: the library's other fields as well.
    """
    config = min(config, os.path.relpath(config), key=len)
    script = f"{Path(recipe).parent.name}/{Path(recipe).name}"
    head = ast.get_docstring(ast.parse(Path(recipe).read_text())) if Path(recipe).is_file() else ""
    how = (
        f"Settings stand in {config}; --config FILE names another, --name value overrides one, and "
        "a list is --name 1 2. In brackets: the value without a flag, and what is legal."
    )
    parts, left = [head or script, textwrap.fill(how, WIDTH)], 0
    for number, owner in enumerate(types):
        fields = [field for field in dataclasses.fields(owner) if field.init]
        shown = [f for f in fields if number == 0 or everything or f.name in values]
        left += len(fields) - len(shown)
        what = "Settings of the stage" if number == 0 else f"Settings of {owner.__name__}"
        if number and not everything:
            what += f" that {Path(config).name} sets"
        hints = typing.get_type_hints(owner)
        lines = [_entry(f, hints[f.name], values, brief=not everything) for f in shown]
        parts.append(f"{what}:\n\n" + "\n".join(lines))
    if left:
        parts.append(f"{left} more settings of {types[-1].__name__}: {script} --help all")
    return "\n\n".join(parts)


def _entry(field: dataclasses.Field, hint: Any, values: Mapping[str, Any], brief: bool) -> str:
    """Return one setting: its flag, and what it means, indented under it."""
    flag = f"  --{field.name}"
    text = field.metadata.get("help", "")
    text = MEANINGS.get(field.name, " ".join(text.replace("`", "").split()))
    if brief and "above" not in field.metadata:  # a library's; ours are short
        text = re.split(r"(?<!Eq)\. ", text)[0].rstrip(".") + "."
    legal = [_written(values.get(field.name, knobs.default_of(field)))]
    if words := knobs.limits(field, hint):
        legal.append(words)
    whole = {"break_long_words": False, "break_on_hyphens": False}
    lines = textwrap.wrap(f"{text} [{'; '.join(legal)}]", WIDTH - 28, **whole)
    text = textwrap.indent("\n".join(lines), " " * 28)
    return f"{flag:<27} {text.lstrip()}" if len(flag) < 28 else f"{flag}\n{text}"


def _written(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " ".join(map(_written, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value.value if isinstance(value, Enum) else value)
