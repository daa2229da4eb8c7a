"""Model cards: what a stage's folder says of itself, written from its manifest.

run.py writes one when a stage ends, with the names that this machine knows; hub.py renders it
again with the names of the hub. Front matter and template go through huggingface_hub.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData, RepoCard

from codexhf.hub import hub_name, resolve
from codexhf.lineage import BY_NAME

# Every licence here permits what the ones before it permit, under more conditions.
PERMISSIVE = ("cc0-1.0", "unlicense", "0bsd", "mit", "bsd-2-clause", "bsd-3-clause", "psf-2.0")
PERMISSIVE += ("apache-2.0", "cc-by-4.0")
TEMPLATE = Path(__file__).with_name("model_card.jinja")
UNKNOWN = "see-sources"  # license_name where no one licence covers all sources
BASE = {"pretrain": "base", "sft": "m0", "reward_model": "m1", "ppo": "m1"}
# Speed, progress and the state of the optimizer: the manifest has them, no reader of a card asks.
NOT_RESULTS = re.compile(
    r".*(runtime|per_second|epoch|episode|grad_norm.*|learning_rate|total_flos)|eps|lr"
    r"|(time|loss|policy|val)/.*"
)


def write_card(folder: Path, manifest: dict) -> None:
    """Write README.md of a stage that has just ended; settle the licences in its manifest.

    The preferences stage's card is a data card as well (`cards.py` reads it), so that the reward
    model names the folder like any other data set.
    """
    for _, _, card in cards_of(manifest):
        card["license"] = _license_of(card)
    parents = [resolve(parent["path"]) for parent in manifest["parents"].values()]
    licenses = {card["license"] for _, _, card in cards_of(manifest)}
    licenses |= {license_in(parent / "README.md") for parent in parents}
    text = card_text(manifest, ".", strictest(licenses))
    (folder / "README.md").write_text(text, encoding="utf-8")


def card_text(
    manifest: dict, where: str, license: str | None, results: Mapping | None = None
) -> str:
    """Return the card as Markdown.

    Args:
        manifest: of the stage; its paths are shown as they stand there.
        where: folder or hub name that the loading example uses.
        license: of the whole; None where its sources agree on none.
        results: metrics of the evaluation stage, of which the model's own are shown.
    """
    stage = BY_NAME[manifest["stage"]]
    own = {
        key.removeprefix(f"{manifest['name']}/"): value
        for key, value in (results or {}).items()
        if key.startswith(f"{manifest['name']}/") and isinstance(value, int | float)
    }
    metrics = {
        key: value
        for key, value in {**manifest["metrics"], **own}.items()
        if isinstance(value, int | float) and not NOT_RESULTS.fullmatch(key)
    }
    fields = {**manifest, "metrics": metrics, "where": where, "cards": cards_of(manifest)}
    fields |= {"title": stage.title, "task": stage.task, "seen": _seen(manifest)}
    fields["config"] = json.dumps(manifest["config"], indent=1, sort_keys=True)
    front = _front(manifest, license, own)
    return str(RepoCard.from_template(front, template_path=str(TEMPLATE), **fields)) + "\n"


def _front(manifest: dict, license: str | None, results: Mapping) -> ModelCardData:
    """The part that the hub reads."""
    stage, parents = BY_NAME[manifest["stage"]], manifest["parents"]
    front: dict = {"tags": ["codexhf", stage.name]}
    if license in (None, "psf-2.0"):
        front |= {"license": "other", "license_name": license or UNKNOWN}
    else:
        front["license"] = license
    if stage.task is not None:
        adapter = "adapter_config.json" in manifest.get("files", {})
        front["library_name"] = "peft" if adapter else "transformers"
        front["pipeline_tag"] = stage.task
        base = hub_repo(parents.get(BASE[stage.name], {}).get("path", ""))
        if base:
            front["base_model"] = base
            front["base_model_relation"] = "adapter" if adapter else "finetune"
    if stage.name == "preferences":
        files = [{"split": s, "path": f"{s}.jsonl"} for s in ("train", "test")]
        front["configs"] = [{"config_name": "default", "data_files": files}]
        front["configs"] += [{"config_name": "prompts", "data_files": "prompts.jsonl"}]
        load = {"path": "json", "data_files": "train.jsonl"}
        front["codexhf"] = {"type": "preference", "load": load}
    elif stage.name == "evaluation":
        front["configs"] = [{"config_name": "default", "data_files": "answers.json"}]
    elif datasets := [repo for _, _, c in cards_of(manifest) if (repo := hub_repo(c["card"]))]:
        front["datasets"] = sorted(set(datasets))
    if results:
        front["model_name"] = manifest["name"]
        front["eval_results"] = [
            EvalResult(
                task_type=stage.task or "other",
                dataset_type="held-out",
                dataset_name="held-out tasks",
                metric_type=metric,
                metric_value=value,
            )
            for metric, value in sorted(results.items())
        ]
    return ModelCardData(**front)


def cards_of(manifest: dict) -> list[tuple[str, str, dict]]:
    """(use, name, stats) of every data card that went into a stage."""
    return [
        (use, name, card)
        for use, part in manifest["data"].items()
        for name, card in part["cards"].items()
        if isinstance(card, dict)
    ]


def hub_repo(path: str) -> str | None:
    """`org/name` of a pinned hub name, None of a path."""
    match = hub_name(path)
    return match[1] if match and match[2] else None


def strictest(licenses: Iterable[str]) -> str | None:
    """The licence under which all sources may be passed on, or None where none is known to fit.

    Of permissive licences the one with most conditions; one other licence wins over permissive
    ones; two others may contradict each other, which no table settles.
    """
    licenses = set(licenses)
    others = sorted(licenses.difference(PERMISSIVE))
    if not others:
        return max(licenses, key=PERMISSIVE.index) if licenses else None
    return others[0] if len(others) == 1 and others != ["other"] else None


def license_in(readme: Path) -> str:
    """The licence that a card's front matter names, `other` where it names none."""
    if not readme.is_file():
        return "other"
    front = RepoCard.load(readme).data
    name = front.get("license") or "other"
    return str(front.get("license_name") or name) if name == "other" else str(name)


def _license_of(card: dict) -> str:
    """A card's licence; one that a stage wrote without naming any has that of the stage."""
    if card["license"] != "other":
        return card["license"]
    return license_in(resolve(card["card"], "dataset").parent / "README.md")


def _seen(manifest: dict) -> str | None:
    """How much of the data training has looked at; None where that is not steps times batch."""
    if manifest["stage"] not in ("pretrain", "sft", "reward_model"):
        return None
    config = manifest["config"]
    batch = config.get("per_device_train_batch_size", 8)
    batch *= config.get("gradient_accumulation_steps", 1) * manifest["environment"]["processes"]
    rows = manifest["data"]["train"]["rows"]
    return f"trained for {manifest['steps']} steps of {batch} rows, out of {rows} rows"
