"""What makes a run this run: equal identity, equal result.

It has two halves. What was asked for: settings, rows, cards, parents, rules, rewards, by content,
so that a path may be written in any way. And `made`, what it is made with: codexhf and its code,
libraries, Python, device, precision, processes. A run goes on only where both are equal, or each
difference is allowed by name; a finished one stands as it is while what was asked for is equal,
since a newer library is no reason to train it again. Logging and saving do not count, unless the
best checkpoint becomes the result. docs/runs.md says it for users.
"""

import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from codexhf.arguments import PATH_CHECKS
from codexhf.cards import load_card
from codexhf.checkpoints import MANIFEST, file_stats, read_sealed, wrong_file
from codexhf.hub import hub_name, resolve
from codexhf.knobs import default_of
from codexhf.launch import processes
from codexhf.refusals import nearest

IDENTITY = "run.json"

LIBRARIES = (
    "torch", "transformers", "trl", "accelerate", "peft", "datasets", "tokenizers", "numpy",
)  # fmt: skip
"""Packages whose version can change weights."""

NEUTRAL = {
    "dry_run", "restart", "redo_changed", "allow_changed", "output_dir", "logging_dir", "run_name",
    "disable_tqdm", "report_to", "log_level", "logging_steps", "logging_strategy",
    "logging_first_step", "local_rank", "dataloader_num_workers", "resume_from_checkpoint",
    "save_total_limit", "num_proc", "hub_token", "project", "use_cpu", "deepspeed_plugin",
    "distributed_state",
}  # fmt: skip
"""Fields that say where or how loudly, not what: changing them does not make another run."""

NEUTRAL_WITHOUT_BEST = {"save_steps", "save_strategy", "eval_steps", "eval_strategy"}
"""Neutral too, where the last weights are the result and not the best of those that were saved."""

EFFECTIVE = {
    "learning_rate", "critic_learning_rate", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
    "max_steps", "num_train_epochs", "total_episodes", "per_device_train_batch_size",
    "gradient_accumulation_steps", "per_device_eval_batch_size", "bf16", "fp16",
    "gradient_checkpointing", "activation_checkpointing", *NEUTRAL_WITHOUT_BEST, "eval_tasks",
    "eval_max_new_tokens",
    "metric_for_best_model", "timeout_s", "unsafe_exec", "alpha_sft", "beta_rlhf", "gamma_reg",
    "kl_coef", "entropy_coef", "vf_coef", "cliprange", "cliprange_value", "temperature",
    "reward_weights", "reward_clip", "missing_eos_penalty",
}  # fmt: skip
"""Settings that a run which goes on reads anew; any other is settled at its first step."""

FILES = ("safety_rules", "chat_template_path")
"""Fields that name a file of which the content counts."""

NOT_READ = {"README.md", MANIFEST, IDENTITY}
"""Files of a parent from which no stage reads anything that could change its weights."""

TRAINS_NOTHING = ("label", "report", "push.py", "help.py", "model_card.py", "label_words.py")
"""Parts of codexhf whose code no weight depends on."""


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
            if f.name not in NEUTRAL and getattr(training, f.name) != default_of(f)
        }
    return json.loads(json.dumps(config, default=str))


def run_identity(
    stage: Any, training: Any, data: Mapping[str, Any], parents: dict, compared: Mapping
) -> dict:
    """Return the identity of a run.

    Args:
        data: name -> `data.Data`.
        parents: name -> what `parent_record` found.
        compared: name -> fingerprint of rows that only choose the best checkpoint.
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
        "data": {name: part.fingerprint for name, part in data.items()} | dict(compared),
        "cards": {name: sha for part in data.values() for name, sha in _card_records(part)},
        "parents": {name: record["sha256"] for name, record in parents.items()},
        "files": {name: file_stats(Path(path))["sha256"] for name, path in files.items()},
        "rewards": _sources(getattr(stage, "rewards", [])),
        "hub": [name for name in named if hub_name(name)],  # with commit; see arguments.pin
        "made": _made(training),
    }


def _card_records(part: Any) -> Iterable[tuple[str, str]]:
    """Name and sha256 of what is read of each card besides its rows.

    Raises:
        ValueError: a card of a finished stage that is not as that stage wrote it.
    """
    for name, stats in part.cards.items():
        card = load_card(stats["card"])
        _check_finished(card.path.parent)
        read = [card.type, card.columns, card.where, card.heldout]
        read.append(dataclasses.asdict(card.execution))
        yield name, hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


def _sources(rewards: Sequence[str]) -> dict[str, str]:
    """`module:function` -> sha256 of the module's source; codexhf's own are in its code."""
    out = {}
    for name in rewards:
        module = sys.modules.get(name.partition(":")[0])
        file = getattr(module, "__file__", None)
        if ":" in name and file is not None:
            out[name] = file_stats(Path(file))["sha256"]
    return out


def _made(training: Any) -> dict:
    made = {
        "codexhf": importlib.metadata.version("codexhf"),
        "code": code_hash(),
        # The patch release changes no program; the minor one changes the language they are in.
        "python": "{}.{}".format(*sys.version_info),
        **versions(),
        "device": _device(training),
        "precision": os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        "processes": processes(),
        "sharding": _sharding(),
    }
    if made["device"] == "cpu":
        made["threads"] = torch.get_num_threads()  # they share out sums, which rounds otherwise
    if training is not None:
        steps = training.per_device_train_batch_size * training.gradient_accumulation_steps
        made["global_batch"] = steps * made["processes"]
    return made


def _device(training: Any) -> str:
    cpu = getattr(training, "use_cpu", False) or not torch.accelerator.is_available()
    return "cpu" if cpu else torch.accelerator.current_accelerator().type


def versions() -> dict[str, str]:
    """Version of each of LIBRARIES that is installed."""
    installed = {}
    for name in LIBRARIES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def _sharding() -> str:
    used = [n for n in ("FSDP", "DEEPSPEED") if os.environ.get(f"ACCELERATE_USE_{n}") == "true"]
    pieces = os.environ.get("FSDP_STATE_DICT_TYPE") == "SHARDED_STATE_DICT" and "FSDP" in used
    return (used[0].lower() if used else "no") + (", checkpoints in pieces" if pieces else "")


@functools.cache
def code_hash() -> str:
    """sha256 over the code and data files of codexhf that train, and over the recipe's."""
    package = Path(__file__).parent
    files = [p for p in package.rglob("*") if p.suffix in (".py", ".yaml", ".jinja")]
    files = [p for p in files if p.relative_to(package).parts[0] not in TRAINS_NOTHING]
    recipe = getattr(sys.modules["__main__"], "__file__", None)
    recipes = [Path(recipe)] if recipe and Path(recipe).parent.name == "recipes" else []
    lines = [f"{p.name} {file_stats(p)['sha256']}" for p in [*sorted(files), *recipes]]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def parent_record(path: str) -> dict:
    """Return what a run must know of a folder or Hub id that it was made from.

    Raises:
        ValueError: a file of a finished stage is not as that stage wrote it.
    """
    folder, record = resolve(path), {"path": str(path), "sha256": {}}
    if not folder.is_dir():
        return {**record, "sha256": {"id": str(path)}}
    manifest = _check_finished(folder)
    if manifest is not None:
        record["stage"] = manifest.get("stage")
    record["sha256"] = {
        p.name: file_stats(p)["sha256"]
        for p in sorted(folder.iterdir())
        if p.is_file() and p.name not in NOT_READ and not p.name.startswith((".", "_"))
    }
    return record


def _check_finished(folder: Path) -> dict | None:
    """Return a finished stage's manifest, None of another folder; refuse one that has changed."""
    if not (folder / MANIFEST).is_file():
        return None
    manifest = load_manifest(folder)
    wrong = wrong_file(folder, manifest.get("files", {}))
    if wrong is not None:
        raise ValueError(
            f"{folder}: {wrong} since its stage finished. Restore the file, or run that stage "
            "again with --restart true."
        )
    return manifest


def load_manifest(folder: Path | str) -> dict:
    """Read a finished stage's manifest.

    Raises:
        ValueError: it is not as the stage wrote it.
    """
    try:
        return read_sealed(Path(folder) / MANIFEST)
    except ValueError as error:
        raise ValueError(f"{error}. Restore it, or give --restart true to that stage.") from None


def leaves(before: Mapping, now: Mapping, prefix: str = "") -> dict[str, str]:
    """Key -> `old -> new` of every leaf that differs."""
    out = {}
    for key in sorted({*before, *now}):
        a, b = before.get(key), now.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out |= leaves(a, b, f"{prefix}{key}.")
        elif a != b:
            short = [str(x)[:12] + "…" if len(str(x)) > 40 else str(x) for x in (a, b)]
            out[f"{prefix}{key}"] = f"{short[0]} -> {short[1]}"
    return out


@dataclasses.dataclass
class Changes:
    """How a run that is started differs from what its folder holds; key -> `old -> new`."""

    asked: dict[str, str]
    made: dict[str, str]

    @classmethod
    def between(cls, before: Mapping, now: Mapping) -> "Changes":
        """Compare two identities; what an older version did not write down is not compared."""
        asked = {k: v for k, v in now.items() if k in before and k not in ("made", "hub")}
        old = {k: before[k] for k in asked}
        return cls(leaves(old, asked), leaves(before.get("made", {}), now["made"], "made."))

    @property
    def all(self) -> dict[str, str]:
        return self.asked | self.made

    def without(self, allowed: Iterable[str]) -> "Changes":
        """Leave out what is allowed by name and can take effect in a run that goes on."""
        names = {*allowed}

        def left(found: dict[str, str]) -> dict[str, str]:
            return {k: v for k, v in found.items() if not (can_change(k) and named(k) & names)}

        return Changes(left(self.asked), left(self.made))

    def lines(self) -> list[str]:
        return [f"{key}: {change}" for key, change in self.all.items()]


def named(key: str) -> set[str]:
    """The names under which `--allow_changed` takes a difference: `made.torch` is torch too."""
    return {key, key.partition(".")[2]}


def can_change(key: str) -> bool:
    """Whether a run that goes on would read the new value."""
    section, _, name = key.partition(".")
    if section == "config":
        return name in EFFECTIVE
    return section in ("made", "data", "cards", "rewards") or key == "files.safety_rules"


def unknown_names(allowed: Iterable[str], identity: Mapping) -> list[str]:
    """One sentence for each name of `--allow_changed` that nothing has."""
    empty = {k: {} for k, v in identity.items() if isinstance(v, Mapping)}
    known = {name for key in leaves(empty, identity) for name in named(key)} | EFFECTIVE
    return [
        f"allow_changed: got {name!r}, expected the name of a difference.{nearest(name, known)}"
        for name in allowed
        if name not in known
    ]
