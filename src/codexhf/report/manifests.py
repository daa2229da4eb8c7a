"""Read what the stages left behind: manifests and the evaluation's answers, checked before use."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

STAGES = {
    "tokenizer": "tokenizer",
    "m0": "pretraining",
    "m1": "SFT",
    "prefs": "preferences",
    "rm": "reward model",
    "m2": "PPO",
    "evaluation": "evaluation",
}
SYMBOLS = {"m0": "M0", "m1": "M1", "m2": "M2", "rm": "R"}


class ReportError(ValueError):
    """Something that the report reads is broken; one line per problem."""


@dataclass
class Runs:
    """Manifests of the finished stages of a runs folder, and the evaluation's answers."""

    stages: dict[str, dict]
    answers: dict = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        return [name for name in STAGES if name not in self.stages]

    def metrics(self, stage: str) -> dict:
        return self.stages.get(stage, {}).get("metrics", {})

    def config(self, stage: str) -> dict:
        return self.stages.get(stage, {}).get("config", {})


def read_runs(folder: Path) -> Runs:
    """Read the manifests and the answers under `folder`.

    Raises:
        ReportError: nothing is there, or a file is broken; every broken file is named.
    """
    problems: list[str] = []
    stages, answers = {}, {}
    for name in STAGES:
        path = folder / name / "manifest.json"
        if path.is_file():
            stages[name] = _read(path, manifest_faults, problems)
    if not stages:
        raise ReportError(
            f"{folder}: got no <stage>/manifest.json, expected one of {', '.join(STAGES)}. "
            "Train a stage first (make pipeline) or give the folder that holds the stages."
        )
    path = folder / "evaluation" / "answers.json"
    if stages.get("evaluation") and path.is_file():
        answers = _read(path, answers_faults, problems)
        listed = stages["evaluation"]["files"].get("answers.json", {}).get("sha256")
        if listed != hashlib.sha256(path.read_bytes()).hexdigest():
            problems.append(
                f"{path}: is not the file whose sha256 evaluation/manifest.json lists. "
                "Run the evaluation again."
            )
    if problems:
        raise ReportError("\n".join(problems))
    return Runs(stages, answers)


def _read(path: Path, faults_of: Callable[[object], list[str]], problems: list[str]) -> dict:
    """The file's object; an empty one, and its faults among the problems, if it is broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        faults = [f"is not JSON ({error}). Run the stage again."]
    else:
        faults = faults_of(value)
    problems += [f"{path}: {fault}" for fault in faults]
    return {} if faults else value


SHAPE = {
    "stage": str,
    "name": str,
    "finished": str,
    "config": dict,
    "parents": dict,
    "data": dict,
    "metrics": dict,
    "history": list,
    "wall_s": dict,
    "environment": dict,
    "files": dict,
}


def manifest_faults(manifest) -> list[str]:
    """What keeps a manifest from being read; empty if nothing does."""
    if not isinstance(manifest, dict):
        return [f"got a {type(manifest).__name__}, expected an object"]
    out = [
        f"{key}: got {type(manifest.get(key)).__name__}, expected {kind.__name__}"
        for key, kind in SHAPE.items()
        if not isinstance(manifest.get(key), kind)
    ]
    if out:
        return out
    try:
        datetime.fromisoformat(manifest["finished"])
    except ValueError:
        out.append(f"finished: got {manifest['finished']!r}, expected an ISO date")
    for key in ("data", "parents", "files"):
        out += [
            f"{key}.{name}: got {type(value).__name__}, expected dict"
            for name, value in manifest[key].items()
            if not isinstance(value, dict)
        ]
    for name, part in manifest["data"].items():
        cards = part.get("cards") if isinstance(part, dict) else {}
        if not (isinstance(cards, dict) and all(isinstance(c, dict) for c in cards.values())):
            out.append(f"data.{name}.cards: expected an object of objects")
    if not all(isinstance(row, dict) for row in manifest["history"]):
        out.append("history: expected a list of objects")
    if not all(number(v) is not None for v in manifest["wall_s"].values()):
        out.append("wall_s: expected numbers")
    if not isinstance(manifest["environment"].get("versions"), dict):
        out.append("environment.versions: expected an object")
    models = manifest["config"].get("models")
    if manifest["stage"] == "evaluation" and not isinstance(models, list):
        out.append(f"config.models: got {type(models).__name__}, expected list")
    return out


def answers_faults(answers) -> list[str]:
    """What keeps answers.json from being read; empty if nothing does."""
    try:
        samples = answers.get("samples", [])
        texts = [t for s in samples for t in (s["prompt"], s["reference"], *s["answers"].values())]
        verdicts = [s["verdicts"].items() for s in samples]
        raw = answers.get("all", {}).values()
        groups = [g for model in raw for g in model["verdicts"]]
        texts += [v for pairs in verdicts for _, v in pairs] + [v for g in groups for v in g]
        rewards = [g for model in raw for g in model.get("rewards", [])]
        scores = [x for g in rewards for x in g]
    except (AttributeError, KeyError, TypeError) as error:
        return [f"has not the expected shape ({type(error).__name__}: {error})"]
    if not all(isinstance(t, str) for t in texts) or not all(groups):
        return ["expected texts and verdicts as strings, at least one verdict per problem"]
    if not all(rewards) or not all(number(x) is not None for x in scores):
        return ["rewards: expected numbers, at least one per problem"]
    return []


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


def symbol(name: str) -> str:
    """M1 for m1; any other name as it is."""
    return SYMBOLS.get(name, name)


def named(stage: str) -> str:
    """A stage for people: `M1 (SFT)`, `preferences`."""
    return f"{SYMBOLS[stage]} ({STAGES[stage]})" if stage in SYMBOLS else STAGES[stage]


def same_files(runs: Runs, stage: str, hashes: Mapping) -> bool | None:
    """Whether a stage's files are the ones that its child was made from; None when not known."""
    if stage not in runs.stages:
        return None
    files = runs.stages[stage]["files"]
    return all(files.get(f, {}).get("sha256") == digest for f, digest in hashes.items())


def absent(stage: str) -> str:
    return f"{named(stage)} is missing: there is no {stage}/manifest.json."


def when(manifest: Mapping) -> str:
    return datetime.fromisoformat(manifest["finished"]).astimezone(UTC).strftime("%Y-%m-%d %H:%M")
