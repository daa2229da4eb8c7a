"""A setting that says its type, default, bounds and help once, and the one loop that checks them.

Used by arguments.py for the stages' own fields and by ppo/config.py for PPO's. Imports nothing
heavy.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from enum import Enum
from typing import Any, Literal

from codexhf.refusals import nearest


def knob(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    least: int = 0,
    check: Callable[[Any], str] | None = None,
    each: str | None = None,
    needs: str | None = None,
) -> Any:
    """Declare a dataclass field; a mutable default is copied for each instance.

    What is said of a value holds for each element where the setting is a list.

    Args:
        default: None where the setting may be left out.
        help: what `--help` and the documentation say.
        low: smallest legal number.
        high: largest legal number.
        above: the number must be larger than this.
        least: fewest elements of a list.
        check: returns what is wrong with a value, "" if nothing: "which does not exist. Run ...".
        each: name of a list field of which this list has one value for each element.
        needs: name of the field without which this one changes nothing, and is refused when given.
    """
    metadata = {"help": help, "low": low, "high": high, "above": above, "least": least}
    metadata |= {"check": check, "each": each, "needs": needs}
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
    """Return one sentence for each value of a dataclass instance that its knob does not allow.

    Fields that were not declared by `knob` are left alone, and None is legal where the type has it.
    """
    hints = typing.get_type_hints(type(instance))
    out = []
    for field in dataclasses.fields(instance):
        if "above" in field.metadata:
            out += _field_errors(instance, field, hints[field.name])
    return out


def read_mapping(kind: type, mapping: dict[str, Any]) -> tuple[Any, list[str]]:
    """Return an instance of a dataclass of knobs made from a mapping, and what is wrong with it."""
    hints, taken, errors = typing.get_type_hints(kind), {}, []
    for name, value in mapping.items():
        if name not in hints:
            errors.append(f"{name}: unknown key.{nearest(name, hints)}")
        elif not any(_is_a(value, member) for member in alternatives(hints[name])):
            errors.append(f"{name}: got {value!r}, expected {type_name(hints[name])}.")
        else:
            taken[name] = value
    instance = kind(**taken)
    return instance, errors + knob_errors(instance)


def _is_a(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is list:
        inner = typing.get_args(hint)[0]
        return isinstance(value, list) and all(_is_a(item, inner) for item in value)
    if typing.get_origin(hint) is Literal:
        return value is not None  # the choices are checked with the bounds
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


def given(instance: Any, name: str) -> bool:
    """Return whether a field asks for something: it is neither its default nor null."""
    field, value = type(instance).__dataclass_fields__[name], getattr(instance, name)
    return value is not None and value != default_of(field)


def default_of(field: dataclasses.Field) -> Any:
    """Return a field's default; a new one where it is mutable.

    Not from a second instance: one of Trainer's arguments would reset accelerate's global state.
    """
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _field_errors(instance: Any, field: dataclasses.Field, hint: Any) -> list[str]:
    name, value, rule = field.name, getattr(instance, field.name), field.metadata
    expected = limits(field, hint) or type_name(hint)
    if value is None:
        optional = type(None) in alternatives(hint)
        return [] if optional else [f"{name}: got null, expected {expected}."]
    out = []
    items = value if isinstance(value, list) else [value]
    if len(items) < rule["least"]:
        out.append(f"{name}: got an empty list, expected at least {rule['least']}: {rule['help']}")
    if rule["each"] and len(items) != len(getattr(instance, rule["each"])):
        one_each = f"one for each of the {len(getattr(instance, rule['each']))} {rule['each']}"
        out.append(f"{name}: got {len(items)} values, expected {one_each}.")
    for item in items:
        if not _legal(item, rule, hint):
            near = nearest(item, choices_of(hint))
            out.append(f"{name}: got {item!r}, expected {expected}.{near}")
        elif rule["check"] and (wrong := rule["check"](item)):
            out.append(f"{name}: got {item!r}, {wrong}")
    if rule["needs"] and not out and given(instance, name) and not getattr(instance, rule["needs"]):
        out.append(unused(instance, name, rule["needs"]))
    return out


def unused(instance: Any, name: str, reader: str) -> str:
    """Return the sentence that refuses a setting which nothing would read."""
    value = getattr(instance, name)
    return (
        f"{name}: got {value!r}, which changes nothing without {reader}. Leave {name} out, or give "
        f"{reader}."
    )


def choices_of(hint: Any) -> tuple:
    """Return the values that a Literal or an Enum in a type hint allows, or an empty tuple."""
    for member in alternatives(hint):
        if typing.get_origin(member) is Literal:
            return typing.get_args(member)
        if isinstance(member, type) and issubclass(member, Enum):
            return tuple(item.value for item in member)
    return ()


def limits(field: dataclasses.Field, hint: Any) -> str:
    """Return a field's choices or bounds in words, an empty string where it has neither."""
    if choices := choices_of(hint):
        null = " or null" if type(None) in alternatives(hint) else ""
        return f"one of {', '.join(map(str, choices))}{null}"
    return bounds(**{name: field.metadata.get(name) for name in ("low", "high", "above")})


def bounds(low: float | None = None, high: float | None = None, above: float | None = None) -> str:
    """Return bounds in words, an empty string where there are none."""
    if above is not None:
        return f"more than {above}" + (f" and at most {high}" if high is not None else "")
    if low is not None and high is not None:
        return f"between {low} and {high}"
    if low is not None:
        return f"at least {low}"
    return f"at most {high}" if high is not None else ""


def type_name(hint: Any) -> str:
    """Return a type hint in words: "a whole number", "a list of text"."""
    simple = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    words = []
    for member in alternatives(hint):
        origin = typing.get_origin(member) or member
        if origin is list:
            words.append(f"a list of {type_name((typing.get_args(member) or (Any,))[0])}")
        elif origin is dict:
            words.append("a mapping (JSON on the command line)")
        elif member in simple:
            words.append(simple[member])
    return " or ".join(words) or "a value"


def alternatives(hint: Any) -> tuple:
    """Return the members of a union type; another type is its own only member."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def within(
    value: float, low: float | None = None, high: float | None = None, above: float | None = None
) -> bool:
    """Return whether a number is finite and within the bounds that are given."""
    return (
        math.isfinite(value)
        and (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
    )


def _legal(value: Any, rule: Any, hint: Any) -> bool:
    if choices := choices_of(hint):
        return value in choices
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    return within(value, rule["low"], rule["high"], rule["above"])
