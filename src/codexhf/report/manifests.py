"""Read what stages and labellers left: manifests, answers, agreement; checked before use."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from codexhf.hub import hub_name
from codexhf.lineage import BY_FOLDER, BY_NAME

# Names that run.py and evaluation.py write.
CARDS, STATS = "cards", "stats"  # of one part of a stage's data
TASKS = "tasks"  # the evaluation's metric: how many held-out tasks it ran

# A shape is a type, [the shape of each], {key: shape} or {str: the shape of every value}.
MANIFEST = {
    "stage": str,
    "finished": str,
    "config": dict,
    "parents": {str: {"path": str}},
    "data": {str: {CARDS: {str: dict}, STATS: dict}},
    "metrics": dict,
    "history": [dict],
    "wall_s": {str: float},
    "environment": {"versions": dict},
    "files": {str: {"sha256": str}},
}
RATE = {"pairs": int}
AGREEMENT = {
    "labels": int,
    "pairs": int,
    "people": {**RATE, "reading": str},
    "two_by_two": [{**RATE, "labellers": [str]}],
    "against": {str: RATE},
    "labellers": {str: {"labels": int, "skipped": int, "seconds": float}},
}
ANSWERS = {"tasks": [{"prompt": str}], "all": {str: {"answers": [[str]], "verdicts": [[str]]}}}


class ReportError(ValueError):
    """Something that the report reads is broken; one line per error."""


@dataclass
class Runs:
    """Manifests of the finished stages, by folder in the order of the lineage, and the answers.

    Attributes:
        agreement: what labels/agreement.json holds (`codexhf.label.agreement.summarise`), or {}.
    """

    stages: dict[str, dict]
    answers: dict
    folder: Path = Path()
    agreement: dict = field(default_factory=dict)

    def metrics(self, folder: str) -> dict:
        return self.stages.get(folder, {}).get("metrics", {})

    def config(self, folder: str) -> dict:
        return self.stages.get(folder, {}).get("config", {})

    def bases(self) -> dict[str, str]:
        """Stage -> the model from outside the lineage that it was made from."""
        return {
            folder: parent["path"]
            for folder, manifest in self.stages.items()
            for parent in manifest["parents"].values()
            if "stage" not in parent and folder != "evaluation"
        }

    def learned_from_people(self) -> bool:
        """Whether R was trained on the labels that lie in this folder, by content."""
        path = self.folder / "labels" / "train.jsonl"
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        cards = self.stages.get("rm", {}).get("data", {}).get("train", {}).get(CARDS, {}).values()
        return any(digest in (card.get("sha256") or {}).values() for card in cards)

    def parameters(self, stage: str) -> int | None:
        """Parameters in a stage's saved weights (tied ones once); None where there are none."""
        sizes = []
        for path in (self.folder / stage).glob("*.safetensors"):
            try:
                with safe_open(path, "numpy") as weights:
                    sizes += [math.prod(weights.get_slice(k).get_shape()) for k in weights.keys()]
            except SafetensorError as error:
                raise ReportError(f"{path}: {error}. Run the stage again.") from None
        return sum(sizes) or None

    def missing(self) -> list[str]:
        """Stages to run: sources of finished ones, and all that come after the last one.

        Any other has no part in this lineage, which began with a model from elsewhere or took its
        pairs from there.
        """
        order = list(BY_FOLDER)
        last = max(map(order.index, self.stages))
        sources = {
            folder_of(parent)
            for manifest in self.stages.values()
            for parent in manifest["parents"].values()
            if "stage" in parent
        } | {
            Path(str(card.get("card"))).parent.name
            for manifest in self.stages.values()
            for part in manifest["data"].values()
            for card in part[CARDS].values()
        }
        absent = [folder for folder in order if folder not in self.stages]
        return [f for f in absent if f in sources or order.index(f) > last]

    def same(self, parent: Mapping) -> bool | None:
        """Whether a parent's files are those of the stage in this folder; None where not known."""
        files = self.stages.get(folder_of(parent), {}).get("files", {})
        hashes = parent.get("sha256")
        if not files or not isinstance(hashes, dict):
            return None
        return all(files.get(f, {}).get("sha256") == digest for f, digest in hashes.items())


def number(value) -> float | None:
    """A number as the manifests hold it (NaN and infinity as text), or None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and value not in ("nan", "inf", "-inf"):
        return None
    try:
        return float(value)
    except OverflowError:  # JSON's integers have no end
        return math.inf if value > 0 else -math.inf


def folder_of(parent: Mapping) -> str:
    """What a run calls the folder of a parent; on a hub its name has a prefix."""
    if hub_name(parent["path"]) and parent.get("stage") in BY_NAME:
        return BY_NAME[parent["stage"]].folder
    return Path(parent["path"]).name


def symbol(folder: str) -> str:
    """M1 for m1; any other name as it is."""
    return BY_FOLDER[folder].symbol if folder in BY_FOLDER else folder


def errors_of(value, shape, at: str = "") -> list[str]:
    """Where a value is not of a shape: `key.key[0]: got X, expected Y`."""
    kind = shape if isinstance(shape, type) else type(shape)
    if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
        return [f"{at}: got {type(value).__name__}, expected {kind.__name__}".removeprefix(": ")]
    if isinstance(shape, list):
        inside = [(f"{at}[{i}]", each, shape[0]) for i, each in enumerate(value)]
    elif isinstance(shape, dict):
        keys = {k: shape[str] for k in value} if str in shape else shape
        inside = [(f"{at}.{k}".strip("."), value.get(k), each) for k, each in keys.items()]
    else:
        inside = []
    return [error for where, part, each in inside for error in errors_of(part, each, where)]


def manifest_errors(manifest) -> list[str]:
    errors = errors_of(manifest, MANIFEST)
    if not errors and manifest["stage"] == "evaluation":
        errors = errors_of(manifest["config"], {"models": [str]}, "config")
    return errors


def answers_errors(answers) -> list[str]:
    """Also: each model has something of each kind for each of the tasks."""
    errors = errors_of(answers, ANSWERS)
    if errors:
        return errors
    counts = [len(answers["tasks"])]
    counts += [len(raw["verdicts"]) for raw in answers["all"].values()]
    return [
        f"all.{model}.{key}: expected at least one for each of {counts[0]} tasks"
        for model, raw in answers["all"].items()
        for key, groups in raw.items()
        if len(groups) != counts[0] or not (all(groups) or key == "greedy")
    ]


def agreement_errors(found) -> list[str]:
    """Also: each share and coefficient is null, or its value with a low and a high end."""
    errors = errors_of(found, AGREEMENT)
    if errors:
        return errors
    rates = [(found["people"], "alpha")]
    rates += [(rate, "kappa") for rate in (*found["two_by_two"], *found["against"].values())]
    for rate, coefficient in rates:
        for key in ("percent", coefficient):
            value = rate.get(key, ())
            if value is not None and (errors_of(value, [float]) or len(value) != 3):
                errors.append(f"{key}: got {value}, expected [value, low, high] or null")
    return errors


def read_runs(folder: Path) -> Runs:
    """Read the manifests and the answers under `folder`.

    Raises:
        ReportError: nothing is there, or files are broken; every broken file is named.
    """
    errors: list[str] = []

    def read(path: Path, errors_in) -> dict:
        value, found = {}, []
        if path.is_file():
            try:
                value = json.loads(path.read_text(encoding="utf-8"))
                found = errors_in(value)
            except (ValueError, RecursionError) as error:
                found = [f"is not JSON ({error}). Run the stage again."]
        more = [f"and {len(found) - 5} more errors"] if len(found) > 5 else []
        errors.extend(f"{path}: {error}" for error in found[:5] + more)
        return value

    stages = {name: read(folder / name / "manifest.json", manifest_errors) for name in BY_FOLDER}
    stages = {name: manifest for name, manifest in stages.items() if manifest}
    path = folder / "evaluation" / "answers.json"
    answers = read(path, answers_errors) if "evaluation" in stages else {}
    agreement = read(folder / "labels" / "agreement.json", agreement_errors)
    if not stages and not errors:
        errors.append(
            f"{folder}: got no <stage>/manifest.json, expected one of {', '.join(BY_FOLDER)}. "
            "Train a stage first (make pipeline) or give the folder that holds the stages."
        )
    if answers and not errors:
        listed = stages["evaluation"]["files"].get("answers.json", {}).get("sha256")
        if listed != hashlib.sha256(path.read_bytes()).hexdigest():
            errors.append(
                f"{path}: is not the file whose sha256 evaluation/manifest.json lists. "
                "Run the evaluation again."
            )
    if errors:
        raise ReportError("\n".join(errors))
    return Runs(stages, answers, folder, agreement)
