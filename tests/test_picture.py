"""The picture of the lineage: who was made from whom, by name and by content.

python -m pytest tests/test_picture.py
"""

from codexhf.picture import as_text, picture


def manifest(stage, weights, parents=(), data=None, **files):
    """A manifest with what a picture reads; parents as (path, sha256 of their weights)."""
    return {
        "stage": stage,
        "files": {
            name: {"sha256": digest}
            for name, digest in {"model.safetensors": weights, **files}.items()
        },
        "parents": {
            f"p{i}": {"path": path, "sha256": {"model.safetensors": digest}}
            for i, (path, digest) in enumerate(parents)
        },
        "data": data or {},
    }


def used(card, rows, sha256, fingerprint):
    cards = {card: {"card": f"cards/{card}.md", "rows": rows, "sha256": sha256}}
    return {"fingerprint": fingerprint * 8, "cards": cards}


def whole():
    text = used("text", 1200, {}, "11")
    pairs = {"train.jsonl": "p" * 64}
    return {
        "tokenizer": manifest("tokenizer", "aaaaaaaa0", data={"train": text}),
        "m0": manifest("pretrain", "bbbbbbbb0", [("runs/tokenizer", "aaaaaaaa0")], {"train": text}),
        "m1": manifest("sft", "cccccccc0", [("runs/m0", "bbbbbbbb0")]),
        "prefs": manifest(
            "preferences", "dddddddd0", [("runs/m1", "cccccccc0")], **{"train.jsonl": "p" * 64}
        ),
        "rm": manifest(
            "reward_model", "eeeeeeee0", [("runs/m1", "cccccccc0")],
            {"train": used("prefs", 31, pairs, "22")},
        ),
        "m2": manifest("ppo", "ffffffff0", [("runs/m1", "cccccccc0"), ("runs/rm", "eeeeeeee0")]),
    }  # fmt: skip


def test_every_stage_is_joined_to_what_it_was_made_from():
    assert as_text(picture(whole())) == (
        "●     tokenizer  aaaaaaaa\n"
        "│       train: text 1,200 rows  11111111\n"
        "●     M0  bbbbbbbb\n"
        "│       train: text 1,200 rows  11111111\n"
        "●     M1  cccccccc\n"
        "├─●   pairs  dddddddd\n"
        "├─●   R  eeeeeeee\n"
        "│ │     train: pairs 31 rows  22222222\n"
        "●─┘   M2  ffffffff"
    )


def test_a_lane_that_is_passed_is_not_cut():
    runs = whole()
    runs["m2"]["data"] = {"prompts": used("prompts", 7, {"train.jsonl": "p" * 64}, "33")}
    lines = as_text(picture(runs)).split("\n")
    assert lines[5:7] == ["├─●     pairs  dddddddd", "├─┼─●   R  eeeeeeee"]
    assert lines[8] == "●─┴─┘   M2  ffffffff"


def test_a_parent_from_elsewhere_is_a_root_of_its_own():
    runs = {"m1": manifest("sft", "cccccccc0", [("org/base@" + "0" * 40, "99999999")])}
    assert as_text(picture(runs)) == "●   org/base  99999999\n●   M1  cccccccc"
    stale = whole()
    stale["m1"]["parents"]["p0"]["sha256"] = {"model.safetensors": "77777777"}
    assert "runs/m0  77777777" in as_text(picture(stale))  # it is not the M0 of this folder


def test_names_of_a_hub_are_shown_without_commit_and_nothing_that_is_no_ancestor():
    at = "@" + "1" * 40
    runs = {f"org/x-{name}{at}": m for name, m in whole().items()}
    text = as_text(picture(runs, of=f"org/x-m1{at}"))
    assert [line.split("  ")[-2].strip("●│ ") for line in text.split("\n") if "●" in line] == [
        "tokenizer org/x-tokenizer", "M0 org/x-m0", "M1 org/x-m1",
    ]  # fmt: skip


def test_what_a_foreign_manifest_lacks_is_not_drawn():
    bare = {"stage": "of mine", "files": {}, "parents": {"base": {"path": "a/b/c"}}, "data": {}}
    assert as_text(picture({"m9": bare})).split("\n") == ["●   a/b/c  –", "●   of mine m9  –"]
