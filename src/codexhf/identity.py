"""What makes a run this run: equal identity, equal result.

`run.py` writes it into run.json when a stage begins and compares it when the stage is started
again. Parents, data, rule packs and templates count by content, so that a path may be written in
any way. Logging, saving and evaluating do not count, unless the best checkpoint becomes the result.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from codexhf.arguments import PATH_CHECKS
from codexhf.checkpoints import MANIFEST, file_stats, wrong_file
from codexhf.hub import hub_name, resolve

IDENTITY = "run.json"

NEUTRAL = {
    "dry_run", "restart", "output_dir", "logging_dir", "run_name", "disable_tqdm", "report_to",
    "log_level", "logging_steps", "logging_strategy", "logging_first_step", "local_rank",
    "dataloader_num_workers", "resume_from_checkpoint", "save_total_limit", "hub_token",
    "project", "use_cpu", "deepspeed_plugin", "distributed_state",
}  # fmt: skip
"""Fields that say where or how loudly, not what: changing them does not make another run."""

NEUTRAL_WITHOUT_BEST = {"save_steps", "save_strategy", "eval_steps", "eval_strategy"}
"""Neutral too, where the last weights are the result and not the best of those that were saved."""

FILES = ("safety_rules", "chat_template_path")
"""Fields that name a file of which the content counts."""

NOT_READ = {"README.md", MANIFEST, IDENTITY}
"""Files of a parent from which no stage reads anything that could change its weights."""


def configuration(stage: Any, training: Any) -> dict:
    """Return the settings of a run as text and numbers: ours, and the library's that were changed.

    Args:
        stage: our arguments.
        training: the library's arguments, or None for a stage that trains nothing.
    """
    config = {k: v for k, v in dataclasses.asdict(stage).items() if k not in NEUTRAL}
    if training is not None:
        config["seed"] = training.seed  # also when it is the default: it belongs to the record
        config |= {
            f.name: getattr(training, f.name)
            for f in dataclasses.fields(training)
            if f.name not in NEUTRAL and getattr(training, f.name) != _default(f)
        }
    return json.loads(json.dumps(config, default=str))


def run_identity(stage: Any, training: Any, data: Mapping[str, Any], parents: dict) -> dict:
    """Return the identity of a run.

    Args:
        data: name -> `data.Data`.
        parents: name -> what `parent_record` found.
    """
    config = configuration(stage, training)
    paths = {f.name for f in dataclasses.fields(stage) if f.metadata.get("check") in PATH_CHECKS}
    best = getattr(training, "load_best_model_at_end", False)
    skipped = paths if best else paths | NEUTRAL_WITHOUT_BEST
    files = {name: config[name] for name in FILES if config.get(name)}
    named = [config[name] for name in sorted(paths) if config.get(name)]
    named = [n for value in named for n in ([value] if isinstance(value, str) else value)]
    return {
        "config": {k: v for k, v in config.items() if k not in {*skipped, *files}},
        "data": {name: part.fingerprint for name, part in data.items()},
        "parents": {name: record["sha256"] for name, record in parents.items()},
        "files": {name: file_stats(Path(path))["sha256"] for name, path in files.items()},
        "hub": [name for name in named if hub_name(name)],  # with commit; see arguments.pin
        "machine": {
            **_sharding(),
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
            "precision": os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
            "device": "cpu" if getattr(training, "use_cpu", True) else _accelerator(),
        },
    }


def parent_record(path: str) -> dict:
    """Return what a run must know of a folder or Hub id that it was made from.

    Raises:
        ValueError: a file of a finished stage is not as that stage wrote it.
    """
    folder, record = resolve(path), {"path": str(path), "sha256": {}}
    if not folder.is_dir():
        return {**record, "sha256": {"id": str(path)}}
    if (folder / MANIFEST).is_file():
        manifest = load_manifest(folder)
        record["stage"] = manifest.get("stage")
        wrong = wrong_file(folder, manifest.get("files", {}))
        if wrong is not None:
            raise ValueError(
                f"{folder}: {wrong} since its stage finished. Restore the file, or run that stage "
                "again with --restart true."
            )
    record["sha256"] = {
        p.name: file_stats(p)["sha256"]
        for p in sorted(folder.iterdir())
        if p.is_file() and p.name not in NOT_READ and not p.name.startswith((".", "_"))
    }
    return record


def load_manifest(folder: Path | str) -> dict:
    """Read a finished stage's manifest."""
    return json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))


def differences(before: Mapping, now: Mapping, prefix: str = "") -> list[str]:
    """Return `key: old -> new` for every leaf that differs."""
    out = []
    for key in sorted({*before, *now}):
        a, b = before.get(key), now.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            short = [str(x)[:12] + "…" if len(str(x)) > 40 else str(x) for x in (a, b)]
            out.append(f"{prefix}{key}: {short[0]} -> {short[1]}")
    return out


def _default(field: dataclasses.Field) -> Any:
    # Not from a second instance of the arguments: that would reset accelerate's global state.
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _sharding() -> dict[str, str]:
    """How checkpoints are cut; nothing where they are not."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return {}
    return {"sharding": os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")}


def _accelerator() -> str:
    found = torch.accelerator.current_accelerator()
    return "cpu" if found is None else found.type
