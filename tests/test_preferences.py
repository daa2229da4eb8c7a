"""Pairs: what is compared, which side is which, which problems are held out.

python -m pytest tests/test_preferences.py
"""

import json

import numpy as np
import pytest

from codexhf.arguments import PreferencesArguments
from codexhf.cards import CardError
from codexhf.data import load_split, load_tasks
from codexhf.execution import Result
from codexhf.preferences import (
    in_test,
    make_pairs,
    outcome,
    pair_up,
    pairs_to_label,
    telling,
    write_mixed,
)
from codexhf.prompts import text_of
from conftest import ADD


def result(verdict, passed=0):
    return Result(verdict, passed, 4, "", 0.0, "none")


ROW = {"id": "p1", "prompt": [{"role": "user", "content": "q"}]}
RESULTS = [result("pass", 4), result("fail", 2), result("timeout"), result("fail", 2)]
ANSWERS = ["right", "half", "slow", "half too"]


def test_pairs_rank_a_pass_first_then_the_share_of_tests():
    ordered = sorted(RESULTS, key=outcome, reverse=True)
    assert [(r.verdict, r.passed) for r in ordered[:2]] == [("pass", 4), ("fail", 2)]
    assert outcome(result("timeout")) < outcome(result("fail", 1))


def test_pair_up_prefers_a_pass_against_a_fail_and_spreads():
    pairs = pair_up(ROW, ANSWERS, RESULTS, 3, np.random.default_rng(0))
    losers = set()
    for pair in pairs:
        sides = {"a": pair["response_a"], "b": pair["response_b"]}
        assert sides.pop(pair["label"]) == "right"
        losers |= set(sides.values())
    assert losers == {"half", "slow", "half too"}


def test_pair_up_never_pairs_answers_of_equal_outcome():
    assert pair_up(ROW, ["x", "y"], [result("fail", 1)] * 2, 3, np.random.default_rng(0)) == []


def test_pair_up_draws_the_side_from_the_seed():
    labels = [
        pair_up(ROW, ANSWERS, RESULTS, 1, np.random.default_rng(seed))[0]["label"]
        for seed in range(40)
    ]
    assert 8 < labels.count("a") < 32


def test_pair_up_says_who_labelled_and_why():
    (pair,) = pair_up(ROW, ["right", "half"], RESULTS[:2], 3, np.random.default_rng(0))
    assert pair["labeler"] == "unit_tests"
    assert "pass, 4 of 4 tests" in pair["reason"] and "fail, 2 of 4 tests" in pair["reason"]


def test_in_test_depends_on_the_prompt_alone():
    share = np.mean([in_test([{"role": "user", "content": str(i)}], 0.3) for i in range(500)])
    assert 0.2 < share < 0.4
    assert in_test("x", 0.5) == in_test("x", 0.5)


def stage(folder, **fields):
    return PreferencesArguments(
        output_dir=str(folder),
        samples_per_prompt=2,
        max_new_tokens=4,
        include_reference=True,
        test_share=0.4,
        **fields,
    )


def test_make_pairs_writes_both_splits_and_their_cards(
    policy, tokenizer, tmp_path, write_card, problems
):
    rows = [dict(p, id=f"p{i}", prompt=f"Add {i}.") for i in range(4) for p in problems[:1]]
    rows += [dict(rows[0], id=f"q{i}", prompt=f"Sum {i}.") for i in range(10)]
    data = load_tasks([write_card(rows, "prompt-only")], tokenizer)
    metrics = make_pairs(policy, tokenizer, data.dataset, stage(tmp_path), tmp_path)
    train, test = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()]
        for name in ("train", "test")
    )
    assert (metrics["train_pairs"], metrics["test_pairs"]) == (len(train), len(test))
    assert not {text_of(r["prompt"]) for r in train} & {text_of(r["prompt"]) for r in test}
    for row in train + test:
        assert row[f"response_{row['label']}"] == ADD
    pairs = load_split([str(tmp_path / "test.md")], "preference").dataset
    assert set(pairs["chosen"]) == {ADD}


def test_make_pairs_stops_when_nothing_can_be_compared(
    policy, tokenizer, tmp_path, write_card, problems
):
    data = load_tasks([write_card(problems, "prompt-only")], tokenizer)
    settings = stage(tmp_path)
    settings.include_reference = False
    with pytest.raises(RuntimeError, match="pairs: 6 prompts gave .*all equally wrong"):
        make_pairs(policy, tokenizer, data.dataset, settings, tmp_path)


def test_mixed_outcome_prompts_are_those_with_both_outcomes(tmp_path, write_card, problems):
    from datasets import Dataset

    rows = Dataset.from_list(problems[:3])
    groups = [["x", "y"], ["x", "y"], ["x", "y", "wild"]]
    good, bad = result("pass", 4), result("fail", 1)
    results = [[good, bad], [bad, bad], [good, good, bad]]
    first = [{"x", "y"}] * 3  # the third problem's failure came from another temperature
    assert write_mixed(rows, groups, results, first, 1, tmp_path) == (1, 1)
    assert [r["id"] for r in map(json.loads, (tmp_path / "prompts.jsonl").open())] == ["p0"]
    assert write_mixed(rows, groups, results, first, 2, tmp_path) == (1, 2)
    kept = load_split([str(tmp_path / "prompts.md")], "prompt-only").dataset
    assert kept["id"] == ["p0", "p1"] and kept["entry_point"] == ["f", "f"]


# -- pairs for people --------------------------------------------------------------------------


def test_telling_grows_with_what_differs_and_with_how_unsure_the_reward_model_is():
    assert telling("return a", "return a", None) == 0 == telling("", "", None)
    assert telling("return a", "return b", None) < telling("return a", "print(x, y)", None) <= 1
    gaps = [telling("a b", "c d", gap) for gap in (0.0, 1.0, -1.0, 5.0, 1e9)]
    assert gaps[0] == 1.0 and gaps[1] == pytest.approx(gaps[2])
    # 4 p (1 - p) with p = 1 / (1 + e^-1)
    assert gaps[1] == pytest.approx(0.7864, abs=1e-4)
    assert gaps[3] < gaps[1] and gaps[4] == 0


def test_pairs_to_label_prefers_what_tests_cannot_tell_and_uses_no_answer_twice(tmp_path):
    settings = stage(tmp_path, label_by="people")
    row = {**ROW, "completion": "right"}
    pairs = pairs_to_label(row, ANSWERS, RESULTS, None, settings, np.random.default_rng(0))
    open_ = [p for p in pairs if p["tests_label"] is None]
    (tied,), decided = open_, [p for p in pairs if p["tests_label"]]
    assert {tied["response_a"], tied["response_b"]} == {"half", "half too"}
    (second,) = (p for p in decided if "right" in (p["response_a"], p["response_b"]))
    assert second[f"response_{second['tests_label']}"] == "right"
    assert second[f"model_{second['tests_label']}"] == "the card's reference"
    assert "pass, 4 of 4" in second[f"tests_{second['tests_label']}"]
    shown = [p[f"response_{side}"] for p in decided for side in "ab"]
    assert len(shown) == len(set(shown)) == 4
    assert "label" not in second
    scores = [9.0, 0.0, 0.1, -9.0]  # R is sure of all but half against slow
    (first, *_) = pairs_to_label(
        {**ROW, "completion": ""}, ANSWERS, [], scores, settings, np.random.default_rng(0)
    )
    assert {first["response_a"], first["response_b"]} == {"half", "slow"}
    assert first["tests_label"] is None and first["tests_a"] is None


def queue_of(policy, tokenizer, rows, settings, folder, need_tests=False):
    folder.mkdir(exist_ok=True)
    data = load_tasks(rows, tokenizer, runs_tests=need_tests)
    metrics = make_pairs(policy, tokenizer, data.dataset, settings, folder)
    return metrics, [json.loads(line) for line in (folder / "unlabelled.jsonl").open()]


def test_prompts_without_tests_are_sampled_for_people(policy, tokenizer, tmp_path, write_card):
    card = write_card([{"id": f"e{i}", "prompt": f"Explain {i}."} for i in range(8)], "prompt-only")
    settings = stage(tmp_path, label_by="people", pairs_to_label=6)
    settings.include_reference = False
    metrics, queue = queue_of(policy, tokenizer, [card], settings, tmp_path / "a")
    assert metrics["pairs_to_label"] == len(queue) == 6
    assert metrics["pairs_not_queued"] == 2 and metrics["distinct_pass_share"] is None
    assert not (tmp_path / "a" / "train.jsonl").exists()
    assert [p["telling"] for p in queue] == sorted((p["telling"] for p in queue), reverse=True)
    assert all(p["response_a"] != p["response_b"] and p["order_seed"] == 42 for p in queue)
    assert queue_of(policy, tokenizer, [card], settings, tmp_path / "b")[1] == queue
    with pytest.raises(CardError, match="no column 'tests'"):
        load_tasks([card], tokenizer)


def test_both_labels_by_tests_and_queues_every_fifth_pair_for_a_check(
    policy, tokenizer, tmp_path, write_card, problems
):
    rows = [dict(problems[0], id=f"p{i}", prompt=f"Add {i}.") for i in range(14)]
    settings = stage(tmp_path, label_by="both", pairs_per_prompt=2)
    settings.samples_per_prompt = 4
    metrics, queue = queue_of(policy, tokenizer, [write_card(rows, "prompt-only")], settings,
                              tmp_path / "a")  # fmt: skip
    assert metrics["train_pairs"] > 0 and (tmp_path / "a" / "train.jsonl").exists()
    decided = [p["tests_label"] is not None for p in queue]
    assert decided[:15] == [False, False, False, False, True] * 3
    tests = {p["id"].split("/")[0] for p in queue if p["split"] == "test"}
    assert not tests & {p["id"].split("/")[0] for p in queue if p["split"] == "train"}
