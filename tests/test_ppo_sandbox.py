"""Unit tests that run while the models do, as on a GPU: `pytest tests/test_ppo_sandbox.py`."""

import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

sys.path.insert(0, str(Path(__file__).parent))

import ppo_setup as setup  # noqa: E402
from codexhf.execution import executor, run_tests  # noqa: E402
from codexhf.rewards import RewardError, UnitTestsReward  # noqa: E402
from ppo_setup import logs, models, new_trainer, same, state  # noqa: E402

QUIET = [{"stdin": "", "stdout": ""}]  # a program that runs, and prints nothing
PATIENCE_S = 60


@pytest.fixture(autouse=True)
def digits(monkeypatch):
    """Let the policy write expressions: some are Python."""
    monkeypatch.setattr(setup.record, "LETTERS", "1230+-()")


def trainer_of(folder, beside=True, rewards=("unit_tests",), tests=QUIET, **kwargs):
    rows = [{"prompt": "(1+2)0"[: 2 + i % 4], "tests": tests, "entry_point": ""} for i in range(20)]
    data = Dataset.from_list(rows)
    trainer = new_trainer(folder, train_dataset=data, reward_funcs=list(rewards), **kwargs)
    if beside:  # what a GPU decides
        trainer._running_tests = trainer.scorer.running_tests
    return trainer


@pytest.fixture
def beside(monkeypatch):
    """Watch the thread's run_tests, which waits for `go`: when it began, and when it was done."""
    seen = SimpleNamespace(go=threading.Event(), began=threading.Event(), done=threading.Event())

    def watched(*args, **kwargs):
        seen.began.set()
        seen.go.wait(PATIENCE_S)
        try:
            return run_tests(*args, **kwargs)
        finally:
            seen.done.set()

    monkeypatch.setattr(executor, "run_tests", watched)
    return seen


def test_rollouts_are_the_same_bit_for_bit(tmp_path, beside):
    beside.go.set()
    weights, rollouts, logged = [], [], []
    for apart in (False, True):
        made = models()
        trainer = trainer_of(
            tmp_path,
            beside=apart,
            models=made,
            reward_model=made["reward_model"],
            rewards=["unit_tests", "unit_tests_partial", "parses", "safety", setup.length],
        )
        assert not beside.began.is_set()
        trainer.train()
        weights.append(state(trainer))
        rollouts.append(trainer._rollout.tensors())
        logged.append([{n: x for n, x in log.items() if "time/" not in n} for log in logs(trainer)])
        for log in logged[-1]:
            del log["eps"]
    assert beside.done.is_set()
    assert any(0 < log["rewards/unit_tests"] < 1 for log in logged[0]), "else scores say nothing"
    assert same(*weights) and same(*rollouts) and logged[0] == logged[1]


def test_unit_tests_run_while_the_models_do(tmp_path, beside):
    trainer, looked = trainer_of(tmp_path, config={"total_episodes": 8}), []

    def look(*args):
        if not looked:  # the tests wait for the models, and these for the tests
            looked.append(beside.done.is_set())
            beside.go.set()
            looked.append(beside.done.wait(PATIENCE_S))

    trainer.value_model.register_forward_hook(look)
    trainer.value_model.model.register_forward_hook(look)
    trainer.train()
    assert looked == [False, True]
    assert {f"time/{name}_s" for name in ("generate", "score", "forward")} <= logs(trainer)[
        0
    ].keys()


def test_users_functions_run_in_the_main_thread_with_the_models_done(tmp_path, beside):
    beside.go.set()
    seen, trainer = [], None

    def own(prompts, completions, **columns):
        seen.append((threading.current_thread(), trainer._values_made))
        return [0.0] * len(completions)

    trainer = trainer_of(tmp_path, rewards=["unit_tests", own], config={"total_episodes": 8})
    values = trainer._values

    def noted(completions):
        found = values(completions)
        trainer._values_made = True
        return found

    trainer._values = noted
    trainer.train()
    assert beside.done.is_set() and seen == [(threading.main_thread(), True)]


def test_the_error_of_a_reward_arrives_as_without_a_thread(tmp_path, beside):
    beside.go.set()
    said = []
    for apart in (False, True):
        trainer = trainer_of(tmp_path, beside=apart, tests="assert (")
        with pytest.raises(RewardError, match="'unit_tests', row 0: got no verdict") as error:
            trainer.train()
        said.append(str(error.value))
    assert beside.done.is_set() and said[0] == said[1]


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_the_error_of_a_model_arrives_and_leaves_nothing_behind(tmp_path, beside, kind):
    reward = UnitTestsReward()
    trainer = trainer_of(tmp_path, rewards=[reward])

    def fail(*args):
        assert beside.began.wait(PATIENCE_S)
        beside.go.set()
        raise kind("of the model")

    hook = trainer.value_model.model.register_forward_hook(fail)
    with pytest.raises(kind, match="of the model"):
        trainer.train()
    assert beside.done.is_set(), "the thread is still at work"
    columns = {"tests": [QUIET], "entry_point": [""]}
    assert reward([""], ["1"], **columns) == [1.0] and reward([""], ["("], **columns) == [0.0]
    hook.remove()
    trainer.train()  # the thread serves the next one


def test_models_and_tests_share_no_cores(tmp_path, beside):
    trainer = trainer_of(tmp_path, beside=False, config={"total_episodes": 8})
    trainer.train()
    assert not beside.began.is_set()
    trainer.args = SimpleNamespace(device=torch.device("cuda"))
    assert not isinstance(trainer._running_tests([], None), nullcontext)


def test_rewards_without_unit_tests_start_no_thread(tmp_path, beside):
    trainer = trainer_of(tmp_path, rewards=["parses"], config={"total_episodes": 8})
    trainer.train()
    assert not beside.began.is_set()
