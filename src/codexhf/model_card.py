"""Model cards: what a stage's folder says of itself, written from its manifest.

run.py writes one when a stage ends; push.py renders it again with the names of the hub. The text is
model_card.jinja; front matter and template go through huggingface_hub.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData, RepoCard

from codexhf.checkpoints import MANIFEST
from codexhf.hub import hub_name, published, resolve
from codexhf.lineage import BY_NAME
from codexhf.picture import as_text, picture

TEMPLATE = Path(__file__).with_name("model_card.jinja")
# Each of these has the conditions of those before it, and more.
PERMISSIVE = ("cc0-1.0", "unlicense", "mit", "bsd-2-clause", "bsd-3-clause", "psf-2.0")
PERMISSIVE += ("apache-2.0", "cc-by-4.0")
BASE = {"pretrain": "base", "sft": "m0", "reward_model": "m1", "ppo": "m1"}  # role of the parent
# Speed, progress and the inside of training: for the manifest and the report.
NOT_RESULTS = re.compile(
    r".*(runtime|per_second|epoch|episode|grad_norm.*|learning_rate|total_flos)|eps|lr"
    r"|(time|loss|policy|val)/.*"
)


def write_card(folder: Path, manifest: dict) -> None:
    """Write README.md of a stage that has just ended; settle the licences in its manifest.

    The preferences stage's card is a data card as well (`cards.py` reads it), so that the reward
    model names the folder like any other data set.
    """
    licenses = [
        license_in(resolve(parent["path"]) / "README.md") for parent in manifest["parents"].values()
    ]
    for _, _, card in cards_of(manifest):
        if card["license"] == "other":  # a stage wrote the card: its own licence counts
            beside = resolve(card["card"], "dataset").parent / "README.md"
            card["license"] = license_in(beside)
        licenses.append(card["license"])
    text = card_text(manifest, ".", strictest(licenses), {}, ancestry(manifest))
    (folder / "README.md").write_text(text, encoding="utf-8")


def card_text(
    manifest: dict,
    where: str,
    license: str,
    results: Mapping,
    lineage: Mapping,
) -> str:
    """Return the card as Markdown.

    Args:
        manifest: of the stage; its paths are shown as they stand there.
        where: folder or hub name that the loading example uses.
        license: of the whole; `other` where none is known to fit.
        results: metrics of the evaluation stage, of which the model's own are shown.
        lineage: name -> manifest of the stages before it, in the order in which they ran.
    """
    stage, own = BY_NAME[manifest["stage"]], f"{manifest['name']}/"
    name = manifest["name"] if where == "." else where
    whole = {**lineage, name: {"files": {}, **manifest}}
    results = numbers({k.removeprefix(own): v for k, v in results.items() if own in k})
    fields = {
        **manifest,
        "title": stage.title,
        "task": stage.task,
        "where": where,
        "run": list(lineage),
    }
    fields["adapter"] = "adapter_config.json" in manifest.get("files", {})
    fields["picture"] = as_text(picture(whole, of=name))
    fields["cards"] = cards_of(manifest)
    fields["metrics"] = numbers({**manifest["metrics"], **results})
    fields["config"] = json.dumps(manifest["config"], indent=1, sort_keys=True)
    if stage.name in ("pretrain", "sft", "reward_model"):  # a step is a batch of rows
        config, of = manifest["config"], manifest["data"]["train"]["rows"]
        batch = config.get("per_device_train_batch_size", 8) * manifest["environment"]["processes"]
        batch *= config.get("gradient_accumulation_steps", 1)
        fields["seen"] = f"trained for {manifest['steps']} steps of {batch} rows, out of {of} rows"
    front = ModelCardData(**_front(manifest, license, results))
    return f"{RepoCard.from_template(front, template_path=str(TEMPLATE), **fields)}\n"


def ancestry(manifest: Mapping, found: dict | None = None) -> dict[str, dict]:
    """Name -> manifest of the stages on this disk that one was made from, roots first.

    What is on a hub ends there: a card is not worth a download.
    """
    found = {} if found is None else found
    names = [parent["path"] for parent in manifest["parents"].values()]
    names += [card["card"] for _, _, card in cards_of(manifest)]
    for name in names:
        folder = Path(name) if Path(name).is_dir() else Path(name).parent
        if str(folder) not in found and (folder / MANIFEST).is_file():
            before = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            ancestry(before, found)
            found[str(folder)] = before
    return found


def numbers(metrics: Mapping) -> dict:
    return {
        key: value
        for key, value in metrics.items()
        if isinstance(value, int | float) and not NOT_RESULTS.fullmatch(key)
    }


def _front(manifest: dict, license: str, results: Mapping) -> dict:
    """The part that the hub reads."""
    stage = BY_NAME[manifest["stage"]]
    front: dict = {"tags": ["codexhf", stage.name], "license": license}
    if license == "psf-2.0":  # which the hub's list lacks
        front |= {"license": "other", "license_name": license}
    if stage.task is not None:
        adapter = "adapter_config.json" in manifest.get("files", {})
        front |= {"pipeline_tag": stage.task, "library_name": "peft" if adapter else "transformers"}
        path = manifest["parents"].get(BASE[stage.name], {}).get("path", "")
        base = hub_name(published(path) or path)
        if base:
            relation = "adapter" if adapter else "finetune"
            front |= {"base_model": base[1], "base_model_relation": relation}
        data = {match[1] for _, _, c in cards_of(manifest) if (match := hub_name(c["card"]))}
        front["datasets"] = sorted(data) or None
    elif stage.name == "preferences":
        there = [s for s in ("train", "test", "unlabelled") if f"{s}.jsonl" in manifest["files"]]
        pairs = [s for s in there if s != "unlabelled"] or there  # which have other columns
        files = [{"split": s, "path": f"{s}.jsonl"} for s in pairs]
        front["configs"] = [{"config_name": "default", "data_files": files}]
        if "train" in there:
            load = {"path": "json", "data_files": "train.jsonl"}
            front["codexhf"] = {"type": "preference", "load": load}
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
    return front


def cards_of(manifest: dict) -> list[tuple[str, str, dict]]:
    """(use, name, stats) of every data card that went into a stage."""
    return [
        (use, name, card)
        for use, part in manifest["data"].items()
        for name, card in part["cards"].items()
    ]


def strictest(licenses: Iterable[str]) -> str:
    """The licence under which all sources may be passed on; `other` where none is known to fit.

    Of permissive licences the one with most conditions; one other licence wins over permissive
    ones; two others may contradict each other, which no table settles.
    """
    licenses = set(licenses)
    others = licenses.difference(PERMISSIVE)
    if len(others) > 1 or not licenses:
        return "other"
    return others.pop() if others else max(licenses, key=PERMISSIVE.index)


def license_in(readme: Path) -> str:
    """The licence that a card's front matter names, `other` where it names none."""
    front = RepoCard.load(readme).data if readme.is_file() else {}
    return str(front.get("license_name") or front.get("license") or "other")
