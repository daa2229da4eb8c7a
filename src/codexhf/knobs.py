"""A setting that says its default, bounds and help once, and the one loop that checks them.

Used by arguments.py for the stages' own fields and by ppo/config.py for PPO's.
"""

import dataclasses
import types
import typing
from typing import Any, Literal


def knob(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> Any:
    """Declare a dataclass field; a mutable default is copied for each instance.

    Args:
        default: None where the setting may be left out.
        help: what `--help` and the documentation say.
        low: smallest legal number, of each element where the setting is a list.
        high: largest legal number.
        above: the number must be larger than this.
    """
    metadata = {"help": help, "low": low, "high": high, "above": above}
    if isinstance(default, list | dict):
        copy = type(default)
        return dataclasses.field(default_factory=lambda: copy(default), metadata=_Rule(metadata))
    return dataclasses.field(default=default, metadata=_Rule(metadata))


class _Rule(dict):
    """A knob's metadata. Only `help` is listed: HfArgumentParser gives all that is to argparse."""

    def keys(self):
        return {"help": None}.keys()

    def copy(self) -> dict:  # TRL's parser asks for one
        return dict(help=self["help"])


def knob_errors(instance: Any) -> list[str]:
    """Return one sentence for each knob of a dataclass instance that is out of its bounds.

    Fields that were not declared by `knob` are left alone, and so is None where the type has it.
    """
    hints = typing.get_type_hints(type(instance))
    out = []
    for field in dataclasses.fields(instance):
        if "above" not in field.metadata:
            continue
        value, hint = getattr(instance, field.name), hints[field.name]
        if value is None:
            if type(None) not in _alternatives(hint):
                out.append(f"{field.name}: got nothing, expected {describe(field, hint)}.")
            continue
        out += [
            f"{field.name}: got {item!r}, expected {describe(field, hint)}."
            for item in (value if isinstance(value, list) else [value])
            if not _legal(item, field.metadata, hint)
        ]
    return out


def choices_of(hint: Any) -> tuple:
    """Return the values of the Literal in a type hint, or an empty tuple."""
    found = [h for h in _alternatives(hint) if typing.get_origin(h) is Literal]
    return typing.get_args(found[0]) if found else ()


def describe(field: dataclasses.Field, hint: Any) -> str:
    """Return what a field expects, in words: "at least 1", "between 0 and 1", "one of a, b"."""
    if choices := choices_of(hint):
        return f"one of {', '.join(map(str, choices))}"
    low, high, above = (field.metadata.get(name) for name in ("low", "high", "above"))
    if above is not None:
        return f"more than {above}" + (f" and at most {high}" if high is not None else "")
    if low is not None and high is not None:
        return f"between {low} and {high}"
    if low is not None:
        return f"at least {low}"
    return f"at most {high}" if high is not None else "a value"


def _alternatives(hint: Any) -> tuple:
    """Return the members of a union type; a type that is none is its only member."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _legal(value: Any, bounds: Any, hint: Any) -> bool:
    if choices := choices_of(hint):
        return value in choices
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    return (
        (bounds["low"] is None or value >= bounds["low"])
        and (bounds["high"] is None or value <= bounds["high"])
        and (bounds["above"] is None or value > bounds["above"])
    )
