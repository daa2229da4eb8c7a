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
UNKNOWN = "see-sources"  # license_name where no one licence covers all sources
BASE = {"pretrain": "base", "sft": "m0", "reward_model": "m1", "ppo": "m1"}
# Speed, progress and the state of the optimizer: the manifest has them, no reader of a card asks.
NOT_RESULTS = re.compile(
    r".*(runtime|per_second|epoch|episode|grad_norm.*|learning_rate|total_flos)|eps|lr|time/.*"
)
USE = {
    "text-generation": "Research on training code models. It is small, it is wrong often, and "
    "what it writes is not checked for safety: run it only in a sandbox (`codexhf.execution`).",
    "text-classification": "Scoring answers of the model that it was trained from. A policy "
    "trained against it long enough finds answers that score high and are wrong.",
    None: "The stages of the lineage that follow this one.",
}
LOAD = {
    "pretrain": """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
prompt = tokenizer("def add(a, b):", return_tensors="pt", return_token_type_ids=False)
answer = model.generate(**prompt, max_new_tokens=32)
print(tokenizer.decode(answer[0], skip_special_tokens=True))""",
    "sft": """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Write a function that adds two numbers."}],
    add_generation_prompt=True, return_tensors="pt", return_dict=False,
)
answer = model.generate(prompt, max_new_tokens=64)
print(tokenizer.decode(answer[0, prompt.shape[1]:], skip_special_tokens=True))""",
    "reward_model": """import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForSequenceClassification.from_pretrained(name)
chat = tokenizer.apply_chat_template(
    [
        {"role": "user", "content": "Write a function that adds two numbers."},
        {"role": "assistant", "content": "def add(a, b):\\n    return a + b"},
    ],
    return_tensors="pt", return_dict=False,
)
with torch.no_grad():
    score = model(chat).logits[0, 0]
print(float(score - model.config.score_mean) / model.config.score_std)  # 0: as good as M1's mean""",
    "tokenizer": """from transformers import AutoTokenizer

print(AutoTokenizer.from_pretrained(name)("def add(a, b):")["input_ids"])""",
    "preferences": """from datasets import load_dataset

print(load_dataset(name)["train"][0])""",
    "evaluation": """import json

print(list(json.load(open(f"{name}/answers.json"))))  # in a downloaded folder""",
}
LOAD["ppo"] = LOAD["sft"]
TEMPLATE = """---
{{ card_data }}
---

# {{ name }}: {{ title }}

Written by codexhf; `manifest.json` in the same folder holds everything.

{{ use }}

## How to load it

```python
name = "{{ where }}"
{{ load }}
```

## Provenance

```
tokenizer -> M0 -> M1 -> pairs -> R
                   |              |
                   +--------------+-> M2
```

{% for line in made_from %}- {{ line }}
{% endfor %}
| data | for | licence | share of the mix | rows read | rows kept |
|---|---|---|---|---|---|
{% for row in data %}| {{ row | join(" | ") }} |
{% endfor %}
{% for line in seen %}{{ line }}

{% endfor %}
## Metrics

| metric | value |
|---|---|
{% for key, value in metrics %}| {{ key }} | {{ value }} |
{% endfor %}
{% if isolation %}{{ isolation }}

{% endif %}## Known problems

{{ limits }}

## Configuration

Settings that differ from the library's defaults, on {{ device }}:

```json
{{ config }}
```

## Citation

Cite codexhf and the sources named above; commit {{ commit }} of codexhf made this.
"""


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


def card_text(manifest: dict, where: str, license: str | None, results: Mapping | None = None):
    """Return the card as Markdown.

    Args:
        manifest: of the stage; its paths are shown as they stand there.
        where: folder or hub name that the loading example uses.
        license: of the whole; None where its sources agree on none.
        results: metrics of the evaluation stage, of which the model's own are shown.
    """
    stage = BY_NAME[manifest["stage"]]
    parents, config = manifest["parents"], manifest["config"]
    own = {}
    for key, value in (results or {}).items():
        model, _, metric = key.partition("/")
        if model == manifest["name"] and isinstance(value, int | float):
            own[metric] = value
    metrics = {
        key: value
        for key, value in {**manifest["metrics"], **own}.items()
        if isinstance(value, int | float) and not NOT_RESULTS.fullmatch(key)
    }
    return str(
        RepoCard.from_template(
            _front(manifest, license, own),
            template_str=TEMPLATE,
            name=manifest["name"],
            title=stage.title,
            use=USE[stage.task],
            where=where,
            load=LOAD[stage.name],
            made_from=[
                f"made from {role}: `{parent['path']}`{_digest(parent)}"
                for role, parent in parents.items()
            ]
            or ["made from data alone"],
            data=[
                [
                    name,
                    use,
                    card["license"],
                    card.get("share_realised", "all"),
                    card.get("rows_read", "?"),
                    card["rows"],
                ]
                for use, name, card in cards_of(manifest)
            ],
            seen=_seen(manifest),
            metrics=[(key, f"{value:.6g}") for key, value in sorted(metrics.items())],
            isolation=isolation_note(manifest["isolation"]),
            limits="It inherits what its parents and its data got wrong"
            + (
                ", also of a base model whose data codexhf has not seen"
                if "base" in parents
                else ""
            )
            + ". Nobody has checked it for any use outside this lineage.",
            device=manifest["environment"]["device"],
            config=json.dumps(config, indent=1, sort_keys=True),
            commit=manifest["environment"]["git_commit"] or "unknown",
        )
    )


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


def isolation_note(isolation: str | None) -> str | None:
    """What stood between model-written code and the machine while this was made."""
    if isolation is None:
        return None
    if isolation == "none":
        return (
            "**Generated code ran without isolation** (`--unsafe_exec` was given): its verdicts "
            "can have been faked by the code that they judge."
        )
    return f"Generated code ran behind: {isolation}."


def _seen(manifest: dict) -> list[str]:
    """How much of the data training has looked at; nothing where that is not steps times batch."""
    if manifest["stage"] not in ("pretrain", "sft", "reward_model"):
        return []
    config = manifest["config"]
    batch = config.get("per_device_train_batch_size", 8)
    batch *= config.get("gradient_accumulation_steps", 1) * manifest["environment"]["processes"]
    return [
        f"{manifest['steps']} steps of {batch} rows, from {manifest['data']['train']['rows']} "
        "training rows."
    ]


def _digest(parent: dict) -> str:
    first = next(iter(parent.get("sha256", {}).items()), None)
    return f" ({first[0]} sha256 {first[1][:12]}…)" if first else ""
