"""`parse()`, which every recipe calls first: YAML and command line -> filled dataclasses.

A recipe's YAML lies next to it and is its default configuration; `--config other.yaml` replaces it
and `--field value` overrides one field. Each value is converted once, by the type that its
dataclass declares, and everything that is wrong is said at once. Imports nothing heavy.
"""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from codexhf import knobs, workers
from codexhf.arguments import StageArguments, pin
from codexhf.launch import (
    batch_size_errors,
    disable_zero3_init,
    launch_errors,
    processes,
    rank,
)
from codexhf.refusals import nearest, refuse
from codexhf.strict_yaml import load_yaml

# Bounds of library fields that the libraries take at any value.
BOUNDS: dict[str, dict[str, float]] = {
    "learning_rate": {"low": 0, "high": 10},
    "max_length": {"low": 8},
    "max_steps": {"low": -1},
    "num_train_epochs": {"above": 0},
    "per_device_train_batch_size": {"low": 1},
    "per_device_eval_batch_size": {"low": 1},
    "gradient_accumulation_steps": {"low": 1},
    "max_grad_norm": {"low": 0},
    "weight_decay": {"low": 0},
    "seed": {"low": 0, "high": 2**32 - 1},
}

_PUSH = (
    "refused while training: Trainer pushes publicly, in the background, with the optimizer and "
    "the token in training_args.bin. Push the finished run instead: make push HUB=org/prefix"
)
# Library fields that a stage does not use, or that it would use against the user.
REFUSED = {
    "push_to_hub": _PUSH,
    "hub_token": _PUSH,
    "resume_from_checkpoint": "refused: a stage started again resumes by itself, from the last "
    "whole checkpoint in output_dir. Copy the checkpoint there",
    "model_init_kwargs": "refused: stages load their models themselves, in float32. Use bf16 for "
    "speed",
    "save_only_model": "refused: a stopped run could not resume from such checkpoints. Use "
    "save_total_limit to save space",
}


def parse(types: Sequence[type], recipe: str, argv: Sequence[str] | None = None) -> tuple:
    """Return one filled instance per dataclass, or exit with code 2 and every error found.

    Order of precedence: command line, `--config` (default: the YAML next to the recipe), defaults.
    bf16 is switched on where the device has it, use_cpu where there is no other device, unless the
    user says otherwise. `workers.num_proc` is set for the whole process.

    Args:
        types: dataclasses; ours first, the library's config second where there is one.
        recipe: the recipe's `__file__`; its docstring heads `--help`.
        argv: arguments without the program's name; default `sys.argv[1:]`.
    Raises:
        SystemExit: code 2 after printing the errors to stderr; code 0 after `--help`.
    """
    settings = {  # name -> type hint
        field.name: hints[field.name]
        for owner in types
        for hints in [typing.get_type_hints(owner)]
        for field in dataclasses.fields(owner)
        if field.init
    }
    errors: list[str] = []
    flags = read_flags(sys.argv[1:] if argv is None else argv, settings, errors)
    config = (flags.pop("config", None) or [str(Path(recipe).with_suffix(".yaml"))])[0]
    show = flags.pop("help", None)
    values = _from_yaml(config, settings, errors)
    if show is not None:
        from codexhf.help import help_text  # only where somebody asks

        print(help_text(types, recipe, config, values, everything=show == ["all"]))
        raise SystemExit(0)
    in_yaml = dict(values)
    values |= _from_flags(flags, settings, errors)
    values |= _for_device(settings, values)
    instances = tuple(_construct(owner, values, errors) for owner in types)
    if not errors and isinstance(instances[0], StageArguments):
        # the library's config comes second and has the folder; other stages have their own
        errors += pin(instances[0], instances[-1].output_dir)
    if errors:
        refuse(list(dict.fromkeys(errors)), f"{Path(recipe).name} with {config}")
    if isinstance(instances[0], StageArguments):
        from codexhf.identity import verify_parents  # late: a misspelt setting is told at once

        if errors := verify_parents(instances[0]):
            refuse(errors, Path(recipe).name)
    _say_batch(in_yaml, instances[-1])
    disable_zero3_init()
    workers.num_proc = getattr(instances[0], "num_proc", None)
    return instances


def _say_batch(in_yaml: dict[str, Any], config: Any) -> None:
    """Say where several processes make another batch of the settings than one made of the YAML."""
    count = processes()
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    if count == 1 or not hasattr(config, names[0]):
        return
    rows, micro_batches = (getattr(config, name) for name in names)
    defaults = {name: type(config).__dataclass_fields__[name].default for name in names}
    meant = math.prod(in_yaml.get(name, defaults[name]) for name in names)
    found = rows * micro_batches * count
    if found != meant and rank() == 0:
        print(
            f"warning: a batch is {rows} rows per device x {micro_batches} accumulated x "
            f"{count} processes = {found} rows; on one process the YAML makes {meant}. For the "
            f"same learning curve divide {' or '.join(names)} by {count} (docs/multi_gpu.md).",
            file=sys.stderr,
            flush=True,
        )


# ------------------------------------------------------------------------------ one value

WORDS = dict.fromkeys(("true", "yes", "on", "1"), True)
WORDS |= dict.fromkeys(("false", "no", "off", "0"), False)


def convert(value: Any, hint: Any) -> Any:
    """Return a value of YAML, or a word of the command line, as its type hint has it.

    Text becomes what the type says (YAML reads `1e-6` as text), text where a list is expected is a
    list of one, and null is legal where the type has None.

    Raises:
        ValueError: what was expected, as a sentence.
    """
    members = [member for member in knobs.alternatives(hint) if member is not type(None)]
    if value is None or value == "null":
        if type(None) in knobs.alternatives(hint):
            return None
        raise ValueError(_expected(hint))
    if any(_is_enum(member) for member in members):
        members = [member for member in members if member is not str]  # str is the enum's spelling
    # Text fits str, and as a list of one a list; what says more about it comes first.
    for member in sorted(members, key=lambda m: (m is str) + 2 * (typing.get_origin(m) is list)):
        with contextlib.suppress(ValueError, TypeError, KeyError, IndexError):
            return _as(value, member)
    raise ValueError(_expected(hint) + nearest(value, knobs.choices_of(hint)))


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _as(value: Any, kind: Any) -> Any:
    """Return the value as one type that is not a union, or raise one of the errors above."""
    origin = typing.get_origin(kind) or kind
    if origin is Literal or _is_enum(kind):
        spelled = None if type(value) is bool else str(value)
        same = [c for c in knobs.choices_of(kind) if c is value or str(c) == spelled][0]
        return same if origin is Literal else kind(same)
    if origin is list:
        (element,) = typing.get_args(kind) or (Any,)
        return [convert(item, element) for item in (value if isinstance(value, list) else [value])]
    if origin is dict:
        value = json.loads(value) if isinstance(value, str) else value
        return _with_numbers({**value})
    if kind is Any:
        return value
    if isinstance(value, list | dict):
        raise ValueError
    if kind is bool:
        return WORDS[str(value).lower()]
    if isinstance(value, bool):
        raise ValueError
    if kind is str:
        return str(value)
    if kind is int:
        return int(str(value))
    if kind is float and not math.isnan(float(value)):
        return float(value)
    raise ValueError  # a class that no text makes


def _with_numbers(value: Any) -> Any:
    """Return a mapping of untyped values in which `1e-6`, text to YAML, is a number."""
    if isinstance(value, dict):
        return {key: _with_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_numbers(item) for item in value]
    scientific = isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)
    return float(value) if scientific else value


def _expected(hint: Any) -> str:
    choices = ", ".join(map(str, knobs.choices_of(hint)))
    return f"expected {f'one of {choices}' if choices else knobs.type_name(hint)}."


# -------------------------------------------------------------------------- where values come from


def _from_yaml(config: str, settings: dict[str, Any], errors: list[str]) -> dict[str, Any]:
    """Return what a YAML file sets, converted; add what is wrong with it to the errors."""
    try:
        loaded = load_yaml(config) or {}
        if not isinstance(loaded, dict):
            raise ValueError(f"{config}: got {type(loaded).__name__}, expected `key: value` lines.")
    except ValueError as error:
        errors.append(str(error))
        return {}
    values = {}
    for key, value in loaded.items():
        if key not in settings:
            errors.append(f"{config}: unknown key {key!r}.{nearest(key, settings)}")
            continue
        try:
            values[key] = convert(value, settings[key])
        except ValueError as error:
            got, fix = "null" if value is None else repr(value), ""
            if isinstance(value, bool):  # a bare yes, no, on or off
                fix = f' Quote it: {key}: "{"yes" if value else "no"}".'
            errors.append(f"{config}: {key}: got {got}, {error}{fix}")
    return values


def read_flags(
    argv: Iterable[str], settings: dict[str, Any], errors: list[str]
) -> dict[str, list[str]]:
    """Return each flag's words: `--name value`, `--name=value`, `--name` alone, `--no_name`.

    A word that begins with `--` is a flag, so that a value may be -1. Abbreviations are refused:
    `--learning_rat 3` would otherwise set learning_rate.
    """
    flags: dict[str, list[str]] = {}
    words: list[str] | None = None
    for word in argv:
        if not word.startswith("--") and word != "-h":
            if words is None:
                errors.append(f"unexpected argument {word!r}, expected --name value.")
            else:
                words.append(word)
            continue
        flag, equals, value = word.partition("=")
        name, words = flag.lstrip("-").replace("-", "_"), [value] if equals else []
        name = {"h": "help"}.get(name, name)
        off = name.removeprefix("no_")
        if name not in settings and not words and bool in knobs.alternatives(settings.get(off)):
            name, words = off, ["false"]
        if name not in settings and name not in ("config", "help"):
            known = [f"--{known}" for known in settings]
            errors.append(f"unknown argument {flag!r}.{nearest(f'--{name}', known)}")
        elif name in flags:
            errors.append(f"--{name}: given twice, expected it once.")
        else:
            flags[name] = words
    if flags.get("config") is not None and len(flags["config"]) != 1:
        errors.append(f"--config: got {len(flags['config'])} values, expected one file.")
    return flags


def _from_flags(
    flags: dict[str, list[str]], settings: dict[str, Any], errors: list[str]
) -> dict[str, Any]:
    values = {}
    for name, words in flags.items():
        kinds = knobs.alternatives(settings[name])
        try:
            if len(words) > 1 and not any(typing.get_origin(kind) is list for kind in kinds):
                raise ValueError("expected one value.")
            if not words and bool not in kinds:
                raise ValueError(_expected(settings[name]))
            values[name] = convert(words if len(words) > 1 else [*words, "true"][0], settings[name])
        except ValueError as error:
            got = repr(" ".join(words)) if words else "nothing"
            errors.append(f"--{name}: got {got}, {error}")
    return values


def _for_device(settings: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return defaults that depend on the machine, for library configs, of what was not said."""
    found: dict[str, Any] = {}
    if "bf16" not in settings:
        return found
    import torch  # the library's config has loaded it already

    if "use_cpu" not in values:
        # Unsaid, accelerate takes two processes on a CPU for two lone ones, in the same folder.
        found["use_cpu"] = not torch.accelerator.is_available()
    if "padding_free" in settings and "padding_free" not in values and torch.cuda.is_available():
        found["padding_free"] = None  # TRL's own says no; see codexhf.faster
    if "logging_nan_inf_filter" not in values and torch.cuda.is_available():
        found["logging_nan_inf_filter"] = False  # it waits in every step; StopOnNaN looks itself
    if not {"bf16", "fp16"} & set(values):
        if _launched_in() in PRECISIONS:  # what was trained in is what is recorded
            return found | {_launched_in(): True}
        gpu = not values.get("use_cpu") and torch.cuda.is_available()
        found["bf16"] = gpu and torch.cuda.is_bf16_supported()
    return found


PRECISIONS = ("bf16", "fp16")


def _launched_in() -> str:
    """Return the mixed precision that `accelerate launch` was given; "no" where none was."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def _precision_errors(config: Any) -> Iterator[str]:
    if not hasattr(config, "bf16"):
        return
    launched = _launched_in()
    if launched not in ("no", *PRECISIONS):
        yield f"accelerate's mixed precision: got {launched}, expected no, bf16 or fp16."
    for name in PRECISIONS:
        value = getattr(config, name)
        if launched in PRECISIONS and value != (name == launched):
            yield (
                f"{name}: got {value}, but accelerate was started with mixed precision {launched}. "
                f"Say it in one place, or as {launched}: true."
            )
    if config.use_cpu and (config.fp16 or launched == "fp16"):
        yield "fp16: got fp16 on a CPU, which trains in bf16 or float32 alone."


# ------------------------------------------------------------------------------ whole dataclasses


def _construct(owner: type, values: dict[str, Any], errors: list[str]) -> Any:
    """Return the filled dataclass and add its errors; None where its own check refuses it."""
    names = {field.name for field in dataclasses.fields(owner) if field.init}
    mine = {name: value for name, value in values.items() if name in names}
    if issubclass(owner, StageArguments):
        stage = owner(**mine)
        errors += stage.errors()
        return stage
    errors += [*_library_errors(owner, mine), *launch_errors()]
    if "activation_checkpointing" in names and "gradient_checkpointing" in mine:
        # its name from transformers 5.23 on, which warns of the old one
        mine.setdefault("activation_checkpointing", mine.pop("gradient_checkpointing"))
    checkpointing = {"gradient_checkpointing", "activation_checkpointing"} & names
    said = any(mine.get(name) is not None for name in checkpointing)
    try:
        config = owner(**mine)
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        _, *several = str(error).split("\n- ")  # PPOConfig's list
        errors += [" ".join(text.split()) for text in several or [str(error)]]
        return None
    errors += [*_missing_packages(config), *_precision_errors(config), *_process_errors(config)]
    if checkpointing and config.auto_find_batch_size:
        errors += batch_size_errors(config)
        if not said:  # codexhf.memory finds it
            vars(config).update(dict.fromkeys(checkpointing))
    return config


def _library_errors(owner: type, values: dict[str, Any]) -> Iterator[str]:
    for name, why in REFUSED.items():
        if values.get(name):
            yield f"{name}: got {'it' if 'token' in name else repr(values[name])}, {why}."
    for name, limits in BOUNDS.items():
        if name in values and (values[name] is None or not knobs.within(values[name], **limits)):
            got = "null" if values[name] is None else values[name]
            yield f"{name}: got {got}, expected {knobs.bounds(**limits)}."
    if values.get("max_steps") == 0:
        yield "max_steps: got 0, expected at least 1, or -1 to count in num_train_epochs."


def _process_errors(config: Any) -> list[str]:
    if processes() == 1 or getattr(config.accelerator_config, "even_batches", True):
        return []
    return [
        "accelerator_config.even_batches: got false with several processes, expected true. A "
        "process without rows left would leave the others waiting."
    ]


def _missing_packages(config: Any) -> Iterator[str]:
    if not hasattr(config, "report_to"):
        return  # what trains nothing
    for tracker in config.report_to:
        from transformers.integrations import get_reporting_integration_callbacks

        try:
            for callback in get_reporting_integration_callbacks([tracker]):
                callback()
        except (ImportError, RuntimeError, ValueError) as error:
            yield f"report_to: got {tracker!r}: {error} (pip install {tracker})"
    if config.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        yield (
            "use_liger_kernel: got true, but liger-kernel is not installed. Install it with `pip "
            "install 'codexhf[liger]'`, or leave this out."
        )
    elif config.use_liger_kernel and config.use_cpu:
        yield "use_liger_kernel: got true on a CPU, whose kernels need a GPU. Leave it out."
    if config.optim != type(config).__dataclass_fields__["optim"].default:
        from transformers import Trainer

        try:
            Trainer.get_optimizer_cls_and_kwargs(config)
        except (ImportError, RuntimeError, ValueError) as error:
            if "install" in str(error) or "import" in str(error):  # others ask for the model
                yield f"optim: got {config.optim.value!r}: {error}"
