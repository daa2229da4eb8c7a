"""Model cards, written from the manifest when a stage ends."""

from pathlib import Path

import yaml

TITLES = {
    "tokenizer": "tokenizer",
    "pretrain": "M0, the pretrained model",
    "sft": "M1, after supervised fine-tuning",
    "preferences": "preference pairs",
    "reward_model": "R, the reward model",
    "ppo": "M2, after PPO",
    "evaluation": "evaluation",
}


def isolation_note(isolation: str | None) -> list[str]:
    """What stood between model-written code and the machine while this was made."""
    if isolation is None:
        return []
    if isolation == "none":
        return [
            "**Generated code ran without isolation** (`--unsafe_exec` was given): its verdicts "
            "can have been faked by the code that they judge.",
            "",
        ]
    return [f"Generated code ran behind: {isolation}.", ""]


def write_card(folder: Path, manifest: dict) -> None:
    """Write README.md: what it is, what it was made from, its data, metrics and config.

    The preferences stage's card is a data card as well (`cards.py` reads it), so that the reward
    model names the folder like any other data set.
    """
    stage = manifest["stage"]
    licenses = sorted(
        {
            card["license"]
            for part in manifest["data"].values()
            for card in part["cards"].values()
            if isinstance(card, dict) and card.get("license")
        }
    )
    front: dict = {"tags": ["codexhf", stage], "license": "other"}
    front["license_name"] = "see-datasets"
    if stage in ("pretrain", "sft", "reward_model", "ppo"):
        front |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
        if stage == "reward_model":
            front["pipeline_tag"] = "text-classification"
    if stage == "preferences":
        front["codexhf"] = {
            "type": "preference",
            "load": {"path": "json", "data_files": "train.jsonl"},
        }
    metrics = {k: v for k, v in manifest["metrics"].items() if isinstance(v, int | float)}
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=True).strip(),
        "---",
        "",
        f"# {manifest['name']}: {TITLES[stage]}",
        "",
        "Written by codexhf when the stage ended; `manifest.json` beside it holds everything.",
        "",
        "## Provenance",
        "",
        *(f"- made from {name}: `{facts['path']}`" for name, facts in manifest["parents"].items()),
        *(
            f"- data ({name}): {card_name}, licence {card.get('license')}, {card.get('rows')} rows"
            for name, part in manifest["data"].items()
            for card_name, card in part["cards"].items()
            if isinstance(card, dict)
        ),
        f"- licences of the data: {', '.join(licenses) or 'none named'}",
        "",
        "## Metrics",
        "",
        "| metric | value |",
        "|---|---|",
        *(f"| {k} | {v:.6g} |" for k, v in sorted(metrics.items())),
        "",
        *isolation_note(manifest["isolation"]),
        "## Known problems",
        "",
        "Trained on the data above and on nothing else; its answers are not checked for safety. "
        "Run generated code in a sandbox only (`codexhf.execution`).",
        "",
        "## Configuration",
        "",
        "```yaml",
        yaml.safe_dump(manifest["config"], sort_keys=True).strip(),
        "```",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
