"""What makes a run this run: equal identity, equal result.

It has two halves. What was asked for: settings, rows, cards, parents, rules, rewards, by content,
so that a path may be written in any way. And `made`, what it is made with: codexhf and its code,
libraries, Python, device, precision, processes. A run goes on only where both are equal, or each
difference is allowed by name; a finished one stands as it is while what was asked for is equal,
since a newer library is no reason to train it again. Logging and saving do not count, unless the
best checkpoint becomes the result. docs/runs.md says it for users.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch

from codexhf.arguments import KINDS, PATH_CHECKS
from codexhf.cards import load_card
from codexhf.checkpoints import MANIFEST, file_stats, read_sealed, wrong_file
from codexhf.hub import hub_name, resolve
from codexhf.knobs import default_of
from codexhf.launch import processes
from codexhf.refusals import nearest

IDENTITY = "run.json"

LIBRARIES = (
    "torch", "transformers", "trl", "accelerate", "peft", "datasets", "tokenizers", "numpy",
    "bitsandbytes", "liger-kernel", "deepspeed", "flash-attn",
)  # fmt: skip
"""Packages whose version can change weights, where they are installed."""

COMPUTING = re.compile(
    r"(ACCELERATE|FSDP)_(?!USE_(CPU|FSDP|DEEPSPEED)|MIXED_|STATE_|TORCH_DEVICE|CPU_AFF|LOG_|DEBUG_)"
    r"(?!\w*(PORT|RANK|HOST|ADDR|PATH|PROCESSES|RICH)$)\w+|(NVIDIA|TORCH_ALLOW)_TF32_\w*OVERRIDE"
)
"""Variables that can change weights, without what says where, how loudly, or is in `made`."""

NEUTRAL = {
    "dry_run", "restart", "redo_changed", "allow_changed", "output_dir", "logging_dir", "run_name",
    "disable_tqdm", "report_to", "log_level", "log_level_replica", "log_on_each_node",
    "logging_steps", "logging_strategy", "logging_first_step", "logging_nan_inf_filter",
    "include_num_input_tokens_seen", "skip_memory_metrics", "torch_empty_cache_steps",
    "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
    "local_rank", "ddp_timeout", "num_proc", "dataset_num_proc", "dataloader_num_workers",
    "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "resume_from_checkpoint", "save_total_limit",
    "save_on_each_node", "enable_jit_checkpoint", "push_to_hub", "hub_token", "hub_model_id",
    "hub_private_repo", "hub_strategy", "hub_always_push", "hub_revision", "use_cpu",
    "deepspeed_plugin", "distributed_state",
}  # fmt: skip
"""Fields that say where or how loudly, not what: changing them does not make another run."""

NEUTRAL_WITHOUT_BEST = {
    "save_steps", "save_strategy", "eval_steps", "eval_strategy", "do_eval", "eval_on_start",
    "eval_delay", "per_device_eval_batch_size", "eval_accumulation_steps", "batch_eval_metrics",
    "eval_do_concat_batches", "eval_use_gather_object", "include_for_metrics",
    "metric_for_best_model", "greater_is_better",
}  # fmt: skip
"""Neutral too, unless evaluations decide."""

EFFECTIVE = {
    "learning_rate", "critic_learning_rate", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
    "max_steps", "num_train_epochs", "total_episodes", "per_device_train_batch_size",
    "gradient_accumulation_steps", "bf16", "fp16", "gradient_checkpointing",
    "activation_checkpointing", "auto_find_batch_size", *NEUTRAL_WITHOUT_BEST, "eval_tasks",
    "eval_max_new_tokens", "timeout_s", "unsafe_exec", "alpha_sft", "beta_rlhf", "gamma_reg",
    "kl_coef", "entropy_coef", "vf_coef", "cliprange", "cliprange_value", "temperature",
    "reward_weights", "reward_clip", "missing_eos_penalty",
} - {"metric_for_best_model", "greater_is_better"}  # fmt: skip
"""Settings that a run which goes on reads anew; any other is settled at its first step.

So is by what the best checkpoint is chosen: the best one so far was found by it.
"""

FILES = ("safety_rules", "chat_template_path")
"""Fields that name a file of which the content counts."""

NOT_READ = {"README.md", MANIFEST, IDENTITY}
"""Files of a parent from which no stage reads anything that could change its weights."""

TRAINS_NOTHING = (
    "label", "report", "project", "__main__.py", "push.py", "help.py", "model_card.py",
    "label_words.py",
)  # fmt: skip
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
    skipped = paths if evaluation_decides(training) else paths | NEUTRAL_WITHOUT_BEST
    files = {name: config[name] for name in FILES if config.get(name)}
    named = [config[name] for name in sorted(paths) if config.get(name)]
    named = [n for value in named for n in ([value] if isinstance(value, str) else value)]
    return {
        "config": {k: v for k, v in config.items() if k not in {*skipped, *files}},
        "data": {name: part.fingerprint for name, part in data.items()} | dict(compared),
        "cards": {name: sha for part in data.values() for name, sha in _card_records(part)},
        "parents": {
            name: record["sha256"] | ({"base": record["base"]} if "base" in record else {})
            for name, record in parents.items()
        },
        "files": {name: file_stats(Path(path))["sha256"] for name, path in files.items()},
        "rewards": _sources(getattr(stage, "rewards", [])),
        "hub": [name for name in named if hub_name(name)],  # with commit; see arguments.pin
        "made": _made(training),
    }


def evaluation_decides(training: Any) -> bool:
    """Whether evaluations change the result: the best weights are it, or the rate follows them."""
    plateau = getattr(training, "lr_scheduler_type", None) == "reduce_lr_on_plateau"
    return plateau or getattr(training, "load_best_model_at_end", False)


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
    own = [name for name in rewards if ":" in name]
    files = {n: getattr(sys.modules.get(n.partition(":")[0]), "__file__", None) for n in own}
    return {name: file_stats(Path(file))["sha256"] for name, file in files.items() if file}


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
        "matmul": torch.backends.cuda.matmul.fp32_precision,
        **_computing(),
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
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def _sharding() -> str:
    used = [n for n in ("FSDP", "DEEPSPEED") if os.environ.get(f"ACCELERATE_USE_{n}") == "true"]
    pieces = os.environ.get("FSDP_STATE_DICT_TYPE") == "SHARDED_STATE_DICT" and "FSDP" in used
    return (used[0].lower() if used else "no") + (", checkpoints in pieces" if pieces else "")


def _computing() -> dict[str, str]:
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    said = {n: v.lower() for n, v in sorted(os.environ.items()) if COMPUTING.fullmatch(n)}
    nothing = ("", "no", "false", "default")  # as `accelerate launch` says it without settings
    return {n: v for n, v in said.items() if (fsdp if n[:4] == "FSDP" else v not in nothing)}


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


_verified: dict[Path, dict] = {}
"""Folder -> record of what the command line names, until its run asks: files are hashed once."""


def verify_parents(stage: Any) -> list[str]:
    """Return what is wrong with the models and tokenizers that a stage names, none yet loaded."""
    _verified.clear()
    errors = []
    for field in dataclasses.fields(stage):
        value = getattr(stage, field.name)
        if value and KINDS.get(field.metadata["check"]) == "model":
            for path in [value] if isinstance(value, str) else value:
                try:
                    folder = resolve(path).resolve()
                    _verified[folder] = _verified.get(folder) or parent_record(path)
                except (ValueError, OSError) as error:
                    errors.append(f"{field.name}: {error}")
    return errors


def verified_record(path: str) -> dict:
    """Return the `parent_record` of a path; that of `verify_parents` once, where it made one."""
    record = _verified.pop(resolve(path).resolve(), None)
    return parent_record(path) if record is None else {**record, "path": str(path)}


def parent_record(path: str) -> dict:
    """Return what a run must know of a folder or Hub id that it was made from.

    Of an adapter's folder also the files of its base.

    Raises:
        ValueError: a file of a finished stage is not as that stage wrote it, or one of another
            model cannot be read.
    """
    folder, record = resolve(path), {"path": str(path)}
    if not folder.is_dir():
        return {**record, "sha256": {"id": str(path)}}
    known = {}  # hashed already
    if manifest := _check_finished(folder):
        record["stage"], known = manifest.get("stage"), manifest.get("files", {})
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name not in NOT_READ]
    read = [p for p in files if not p.name.startswith((".", "_"))]
    for file in (p for p in read if p.name not in known):
        _check_whole(file)
    stats = {p.name: known.get(p.name) or file_stats(p) for p in read}
    record["sha256"] = {name: stats[name]["sha256"] for name in stats}
    if "adapter_config.json" in stats:
        from codexhf.models import adapter_base  # late: it loads transformers

        record["base"] = parent_record(str(adapter_base(folder)))["sha256"]
    return record


def _check_whole(file: Path) -> None:
    """Refuse weights or settings that end too early, as after a copy that was cut off."""
    try:
        if file.suffix == ".safetensors":
            with safetensors.safe_open(file, "pt"):
                pass  # its header says how long the file is
        elif file.suffix == ".json":
            json.loads(file.read_bytes())
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{file}: {error}. Copy or download the file again.") from None


def _check_finished(folder: Path) -> dict | None:
    """Return a finished stage's manifest, None of another folder; refuse one that has changed."""
    if not (folder / MANIFEST).is_file():
        return None
    manifest = load_manifest(folder)
    if wrong := wrong_file(folder, manifest.get("files", {})):
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
        settled = [k for k in self.all if not (can_change(k) and named(k) & names)]
        halves = ({k: found[k] for k in found if k in settled} for found in (self.asked, self.made))
        return Changes(*halves)

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


def unknown_names(allowed: Iterable[str], *identities: Mapping) -> list[str]:
    """One sentence for each name of `--allow_changed` that no identity has, then or now."""
    known = {*EFFECTIVE}
    for identity in identities:
        empty = {k: {} for k, v in identity.items() if isinstance(v, Mapping)}
        known |= {name for key in leaves(empty, identity) for name in named(key)}
    return [
        f"allow_changed: got {name!r}, expected the name of a difference.{nearest(name, known)}"
        for name in allowed
        if name not in known
    ]
