"""People's agreement in the report: read as the export wrote it, a labeller without signal named.

python -m pytest tests/test_report_labels.py
"""

import hashlib
import json
import os

import numpy as np
import pytest

pytest.importorskip("starlette", reason="needs the extra `label`")

from codexhf.label.export import export
from codexhf.label.store import Store
from codexhf.report.__main__ import main, render
from label_server import pair

MANIFEST = {
    "stage": "reward_model", "finished": "2026-01-01T00:00:00+00:00", "config": {"seed": 42},
    "parents": {}, "metrics": {"eval_accuracy": 0.9}, "history": [], "wall_s": {"train_s": 1.0},
    "environment": {"versions": {}}, "files": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A runs folder: 120 pairs labelled by three people, one of whom throws dice; and R."""
    runs = tmp_path_factory.mktemp("labelled")
    store = Store(runs / "labels" / "labels.sqlite")
    draw = np.random.default_rng(0)
    rows = [pair(i, tests_label="ab"[draw.integers(2)], reward_a=draw.normal()) for i in range(120)]
    store.load(rows)
    for who, wrong in (("ann", 0.05), ("ben", 0.1), ("dice", 0.5)):
        for key, row in store.pairs().items():
            other = {"a": "b", "b": "a"}[row["tests_label"]]
            choice = other if draw.random() < wrong else row["tests_label"]
            store.label(os.urandom(8).hex(), key, who, choice, version=0,
                        left=store.left(key, who), seconds=2.0)  # fmt: skip
    export(store, runs / "labels", "mit", {"from": "runs/prefs", "seed": 42})
    store.close()
    digest = hashlib.sha256((runs / "labels/train.jsonl").read_bytes()).hexdigest()
    card = {"card": "runs/labels", "sha256": {"train.jsonl": digest}, "license": "mit"}
    data = {"train": {"cards": {"labels": card}, "stats": {}, "rows": 90},
            "test": {"cards": {}, "stats": {}, "rows": 100}}  # fmt: skip
    (runs / "rm").mkdir()
    (runs / "rm/manifest.json").write_text(json.dumps(MANIFEST | {"data": data}))
    return runs


def cells(text, label):
    line = next(x for x in text.splitlines() if x.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_report_shows_agreement_with_intervals_and_names_who_says_nothing(labelled):
    files = render(labelled)
    page, text = files["report.html"], files["report.md"]
    found = json.loads((labelled / "labels/agreement.json").read_text())
    for label, rate, name in (
        ("all labellers", found["people"], "alpha"),
        ("ann and ben", found["two_by_two"][0], "kappa"),
        ("labellers and tests", found["against"]["tests"], "kappa"),
        ("labellers and R", found["against"]["R"], "kappa"),
    ):
        pairs, percent, kind, coefficient = cells(text, label)
        assert (int(pairs), kind) == (rate["pairs"], name)
        for cell, (value, low, high), digits in (
            (percent, rate["percent"], 1), (coefficient, rate[name], 2),
        ):  # fmt: skip
            written = f"{value:.{digits}f} \\[{low:.{digits}f}, {high:.{digits}f}\\]"
            assert cell == written.replace("-", "−")
    assert cells(text, "dice")[0] == "none" and cells(text, "ann")[0] == "yes"
    assert "trained on labels of dice, which carry no signal" in page
    assert "trained on labels of ann" not in page
    assert "Labels by people" in page and found["people"]["reading"] in page
    assert cells(text, "accuracy on held-out pairs, % ↑") == ["90.0 \\[82.6, 94.5\\]"]


def test_labels_that_taught_r_nothing_are_said_to_be_others(labelled, tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "rm").mkdir()
    for name in ("labels/agreement.json", "rm/manifest.json"):
        (tmp_path / name).write_bytes((labelled / name).read_bytes())
    (tmp_path / "labels/train.jsonl").write_text("a newer export\n")
    text = render(tmp_path)["report.md"]
    assert "R was not trained on these labels" in text
    assert "no signal:" not in text.split("##")[0]


def test_a_last_word_without_any_label_is_reported_too(labelled, tmp_path):
    (tmp_path / "rm").mkdir()
    (tmp_path / "rm/manifest.json").write_bytes((labelled / "rm/manifest.json").read_bytes())
    store = Store(tmp_path / "labels" / "labels.sqlite")
    store.load([pair(1)])
    (key,) = store.pairs()
    store.label("settled-1", key, "owner", "a", version=0, left=store.left(key, "owner"),
                adjudicates=True)  # fmt: skip
    export(store, tmp_path / "labels", "mit", {"from": "runs/prefs", "seed": 42})
    store.close()
    assert cells(render(tmp_path)["report.md"], "all labellers") == ["0", "–", "alpha", "–"]


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f["people"].update(alpha=[0.5]),
        lambda f: f["against"]["R"].update(kappa=0.5),
        lambda f: f.pop("labellers"),
        lambda f: f["labellers"]["ann"].update(seconds="2"),
    ],
)
def test_broken_agreement_is_refused_by_name(labelled, tmp_path, capsys, change):
    found = json.loads((labelled / "labels/agreement.json").read_text())
    change(found)
    (tmp_path / "labels").mkdir()
    (tmp_path / "rm").mkdir()
    (tmp_path / "labels/agreement.json").write_text(json.dumps(found))
    (tmp_path / "rm/manifest.json").write_bytes((labelled / "rm/manifest.json").read_bytes())
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])
    error = capsys.readouterr().err
    assert f"{tmp_path / 'labels/agreement.json'} is not as it was written" in error
