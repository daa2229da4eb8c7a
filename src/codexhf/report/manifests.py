"""Read what stages and labellers left: manifests, answers, agreement; checked before use."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from codexhf.checkpoints import file_stats, read_sealed
from codexhf.hub import hub_name
from codexhf.lineage import BY_FOLDER, BY_NAME

# Names that run.py and evaluation.py write.
CARDS, STATS = "cards", "stats"  # of one part of a stage's data
TASKS = "tasks"  # the evaluation's metric: how many held-out tasks it ran

KEYS = {"stage", "finished", "config", "parents", "data", "metrics", "history", "wall_s",
        "environment", "files"}  # fmt: skip


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
        digest = file_stats(path)["sha256"] if path.is_file() else None
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


def read_runs(folder: Path) -> Runs:
    """Read the manifests, the answers and the agreement under `folder`, as they were written.

    Raises:
        ReportError: nothing is there, or files have changed; every one of them is named.
    """
    errors: list[str] = []

    def read(path: Path, keys: set[str]) -> dict:
        try:
            value = read_sealed(path) if path.is_file() else {}
            if path.is_file() and (lacking := keys - value.keys()):
                raise ValueError(f"{path}: {', '.join(sorted(lacking))} is missing")
        except (ValueError, RecursionError) as error:
            named = str(error) if str(path) in str(error) else f"{path}: {error}"
            errors.append(f"{named}. Run the stage again.")
            return {}
        return value

    stages = {name: read(folder / name / "manifest.json", KEYS) for name in BY_FOLDER}
    stages = {name: manifest for name, manifest in stages.items() if manifest}
    agreement = read(folder / "labels" / "agreement.json", {"people", "labellers"})
    if not stages and not errors:
        errors.append(
            f"{folder}: got no <stage>/manifest.json, expected one of {', '.join(BY_FOLDER)}. "
            "Train a stage first (make pipeline) or give the folder that holds the stages."
        )
    path, answers = folder / "evaluation" / "answers.json", {}
    if "evaluation" in stages and path.is_file():
        listed = stages["evaluation"]["files"].get("answers.json", {}).get("sha256")
        if listed == file_stats(path)["sha256"]:
            answers = json.loads(path.read_text(encoding="utf-8"))
        else:
            errors.append(
                f"{path}: is not the file whose sha256 evaluation/manifest.json lists. "
                "Run the evaluation again."
            )
    if errors:
        raise ReportError("\n".join(errors))
    return Runs(stages, answers, folder, agreement)
