"""Score answers: every reward function, the reward model as one of them, and their weighted sum.

`combine` is what recipes/ppo.py calls; preferences.py and evaluation.py use the functions directly.

One contract. A reward is `f(prompts, completions, **columns) -> list[float | None]`: prompts are
strings or lists of {"role", "content"} messages, completions are strings, columns are the data
set's other columns, one element per row. `None` says "not applicable to this row". What a model
wrote never makes a reward raise: malformed answers are the normal case and are scored.
"""

from __future__ import annotations

import importlib
import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from codexhf.completions import code_of, parse_python
from codexhf.execution import Result, run_tests, running_tests
from codexhf.refusals import nearest, raise_all
from codexhf.safety import Rule, default_rules, load_rules, violations

if TYPE_CHECKING:  # what names a reward should not cost the import of torch
    from codexhf.prompts import Prompt

REWARD_MODEL = "reward_model"
"""The name under which `rewards:` asks for the learned one."""

Reward = Callable[..., list[float | None]]

SEARCH_BELOW_S = 1.0
"""A reward that failed within this time is run again row by row, to name the row at fault."""

# Scores, advantages and losses are float32: what is larger would be infinite there, then NaN.
_FLOAT32_MAX = 3.4028234663852886e38

# Parameters of every reward; `self` is one where the reward is an object.
_OWN_NAMES = ("prompts", "completions", "self")


class RewardError(RuntimeError):
    """A reward could not be computed; the message names the reward and the row."""


class UnitTestsReward:
    """1.0 where the answer's code passes every unit test of its row, else 0.0.

    Args:
        partial: give the share of test cases that passed instead, in [0, 1].
        timeout_s: wall clock of one run of the answer, as run_tests takes it.

    A row without tests gets None. A failing sandbox or broken tests say nothing about the answer,
    so they are never a reward: run_tests retries, and what is left raises RewardError here.
    """

    _running: tuple[Sequence[str], Callable[[], list[Result]]] | None = None

    def __init__(self, *, partial: bool = False, timeout_s: float = 3.0) -> None:
        if not timeout_s > 0:
            raise ValueError(
                f"unit_tests timeout_s: got {timeout_s!r}, expected seconds above 0. "
                "A few seconds are enough for small functions."
            )
        self.partial = partial
        self.timeout_s = timeout_s
        self.__name__ = "unit_tests_partial" if partial else "unit_tests"

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        tests: Sequence[Any],
        entry_point: Sequence[str],
        **columns: Any,
    ) -> list[float | None]:
        rows = [row for row, row_tests in enumerate(tests) if row_tests]
        rewards: list[float | None] = [None] * len(completions)
        if not rows:
            return rewards
        if self._running is not None and self._running[0] == completions:  # not another batch
            results = self._running[1]()
        else:
            programs = _programs(completions, tests, entry_point)
            results = run_tests(*programs, timeout_s=self.timeout_s)
        for row, result in zip(rows, results, strict=True):
            if result.verdict == "sandbox_error":
                raise RewardError(
                    f"reward {self.__name__!r}, row {row}: got no verdict on the completion of "
                    f"prompt {_prompt_excerpt(prompts[row])} for entry point {entry_point[row]!r}: "
                    f"{result.detail}. The run stops instead of learning from it; fix the row's "
                    "tests or the sandbox, then resume."
                )
            rewards[row] = float(result.verdict == "pass")
            if self.partial and not rewards[row]:
                rewards[row] = result.passed / max(result.total, 1)
        return rewards

    @contextmanager
    def running(
        self,
        completions: Sequence[str],
        tests: Sequence[Any],
        entry_point: Sequence[str],
        **columns: Any,
    ) -> Iterator[None]:
        """Run the tests while the body does something else; a call there waits for the results.

        Another thread gets only what the sandbox does. Code is read in this one: that sets
        Python's filters of warnings, which all threads share.
        """
        programs = _programs(completions, tests, entry_point)
        with running_tests(*programs, timeout_s=self.timeout_s) as results:
            self._running = completions, results
            try:
                yield
            finally:
                self._running = None


def _programs(
    completions: Sequence[str], tests: Sequence[Any], entry_point: Sequence[str]
) -> tuple[list[str], list[Any], list[str]]:
    """Return what run_tests takes, of the rows that have tests."""
    rows = [row for row, row_tests in enumerate(tests) if row_tests]
    return (
        [code_of(completions[row]) for row in rows],
        [tests[row] for row in rows],
        [entry_point[row] for row in rows],
    )


unit_tests_reward = UnitTestsReward()
unit_tests_partial_reward = UnitTestsReward(partial=True)


def parses_reward(
    prompts: Sequence[Prompt], completions: Sequence[str], **columns: Any
) -> list[float | None]:
    """1.0 where the answer's code is Python with at least one statement, else 0.0.

    An empty completion parses too; paying for it would teach silence.
    """
    trees = (parse_python(code_of(completion)) for completion in completions)
    return [float(tree is not None and bool(tree.body)) for tree in trees]


class SafetyReward:
    """Minus the penalties of the safety rules that the answer's code breaks; 0.0 if it is clean.

    A rule counts once per answer, however often it is broken, so the worst reward is the sum of
    all penalties and a long answer is not worse for its length. Code that does not parse is
    searched as text (codexhf.safety.violations), so that breaking it is no way out.

    Args:
        rules: from codexhf.safety.load_rules; None takes the rules that ship with codexhf.
    """

    __name__ = "safety"

    def __init__(self, rules: Sequence[Rule] | None = None) -> None:
        self.rules = rules

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Any
    ) -> list[float | None]:
        rules = default_rules() if self.rules is None else self.rules
        penalties = {rule.id: rule.penalty for rule in rules}
        broken = (
            {found.rule for found in violations(code_of(completion), rules)}
            for completion in completions
        )
        return [0.0 - math.fsum(penalties[rule] for rule in answer) for answer in broken]


safety_reward = SafetyReward()


def violation_rate(completions: Sequence[str], rules: Sequence[Rule] | None = None) -> float:
    """Return the share of answers whose code breaks a safety rule, in [0, 1].

    Args:
        completions: answers, at least one.
        rules: as for SafetyReward, of which this is the metric.
    """
    if not completions:
        raise ValueError("violation_rate: got no completions, expected at least one. Sample some.")
    rewards = SafetyReward(rules)([""] * len(completions), completions)
    return sum(reward < 0 for reward in rewards) / len(completions)


class Scored(NamedTuple):
    """What a RewardSum gives for a batch."""

    total: list[float]  # weighted sum per row, over the rewards that apply to it
    parts: dict[str, list[float | None]]  # every reward by name, before its weight


class RewardSum:
    """Several rewards, weighted and added; each one's values are kept under its name.

    Where a reward returns None it takes no part in the sum of that row; a row to which none
    applies is refused, since 0.0 would be an opinion that nobody has.

    Args:
        rewards: callables under the contract of this module, or one of them; `__name__` without a
            final "_reward" is the name.
        weights: one per reward, finite; None weighs all of them 1.
    """

    def __init__(
        self, rewards: Reward | Sequence[Reward], weights: Sequence[float] | None = None
    ) -> None:
        rewards = as_list(rewards)
        names = [_name_of(reward) for reward in rewards]
        given = [1.0] * len(rewards) if weights is None else _listed(weights)
        if given is None:
            raise ValueError(
                f"reward_weights: got {weights!r}, expected a list of numbers, one for each "
                "reward. Put a single weight into a list, or leave them out: all then weigh 1."
            )
        weights = [_number(weight) for weight in given]
        errors = [] if rewards else ["rewards: got none, expected at least one."]
        if len(weights) != len(rewards):
            errors.append(
                f"reward_weights: got {len(weights)} for the {len(rewards)} rewards {names}, "
                "expected one each. Give as many, in the same order, or none at all."
            )
        if any(map(math.isnan, weights)):
            errors.append(
                f"reward_weights: got {given}, expected finite numbers. "
                "Give one number for each reward."
            )
        errors += [
            f"rewards: got {name!r} twice, expected each name once. Rename one (`__name__`, "
            "or ModelReward's `name`)."
            for name in sorted({name for name in names if names.count(name) > 1})
        ]
        errors += [
            f"reward {name!r}: got the signature {inspect.signature(reward)}, expected "
            "f(prompts, completions, **columns). Add **columns: all columns are passed."
            for name, reward in zip(names, rewards, strict=True)
            if all(p.kind is not p.VAR_KEYWORD for p in _parameters(reward))
        ]
        raise_all(errors)
        self.names, self.rewards, self.weights = names, rewards, weights

    def check_columns(self, available: Iterable[str]) -> None:
        """Raise ValueError unless every column that a reward needs is among `available`.

        Columns under a name that the contract itself uses are refused too. A trainer calls this
        at construction, so that neither is a surprise of the first rollout.
        """
        available = sorted(available)
        errors = _name_errors(available)
        for name, reward in zip(self.names, self.rewards, strict=True):
            missing = [
                p.name
                for p in _parameters(reward)
                if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
                and p.default is p.empty
                and p.name not in ("prompts", "completions", *available)
            ]
            if missing:
                errors.append(
                    f"reward {name!r}: got a data set with the columns {available}, expected also "
                    f"{missing}. Use a data card that has them, or leave the reward out."
                )
        raise_all(errors)

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str], /, **columns: Sequence[Any]
    ) -> Scored:
        """Return the total and the parts for a batch.

        Raises:
            ValueError: prompts or a column are not as many as the completions, or a column has a
                name that the contract itself uses.
            RewardError: a reward raised, gave the wrong number of values or a value that is no
                finite number, or no reward applies to a row; the message names reward and row.
        """
        raise_all(_name_errors(columns))
        for what, column in {"prompts": prompts, **columns}.items():
            if len(column) != len(completions):
                raise ValueError(
                    f"{what}: got {len(column)} values for {len(completions)} completions, "
                    "expected one each. Repeat the row's value for each of its completions."
                )
        parts = {}
        for name, reward in zip(self.names, self.rewards, strict=True):
            values = _call(name, reward, prompts, completions, columns)
            parts[name] = _checked(name, values, prompts, completions)
        total = []
        for row, values in enumerate(zip(*parts.values(), strict=True)):
            pairs = zip(self.weights, values, strict=True)
            weighted = [weight * value for weight, value in pairs if value is not None]
            if not weighted:
                raise RewardError(
                    f"row {row}: none of the rewards {self.names} applies to it (all None), so it "
                    "has no reward. Give the row what they need, or add one that always applies. "
                    f"Its prompt is {_prompt_excerpt(prompts[row])}."
                )
            total.append(_number(math.fsum(weighted)))
            if math.isnan(total[-1]):
                raise RewardError(
                    f"row {row}: got the weighted rewards {weighted}, expected a sum that is "
                    "finite in float32. Lower reward_weights, or bound the rewards. "
                    f"The prompt is {_prompt_excerpt(prompts[row])}."
                )
        return Scored(total, parts)


def combine(
    rewards: str | Reward | Sequence[str | Reward],
    weights: Sequence[float] | None = None,
    *,
    reward_model: Reward | None = None,
    safety_rules: str | Path | None = None,
    timeout_s: float | None = None,
) -> RewardSum:
    """Build the weighted sum that `rewards:` and `reward_weights:` of a recipe name.

    Args:
        rewards: names from REWARDS, "reward_model" for the learned one, "module:function" for one
            of your own, or callables; a single one is a list of one.
        weights: one per reward; None weighs all of them 1.
        reward_model: what "reward_model" stands for, usually a ModelReward.
        safety_rules: path of the rule pack that "safety" reads; None keeps codexhf's own.
        timeout_s: of the rewards by unit tests; None keeps their default.
    Raises:
        ValueError: all errors in names, weights and settings at once.
    """
    rewards = as_list(rewards)
    table: dict[str, Reward] = dict(REWARDS)
    if reward_model is not None:
        table[REWARD_MODEL] = reward_model
    errors = [
        f"{setting}: got {value!r}, but none of the rewards {rewards} reads it. "
        f"Add {' or '.join(readers)} to them, or remove {setting}."
        for setting, value, readers in (
            ("safety_rules", safety_rules, ["safety"]),
            ("timeout_s", timeout_s, ["unit_tests", "unit_tests_partial"]),
        )
        if value is not None and not set(readers) & {r for r in rewards if isinstance(r, str)}
    ]
    chosen: list[Reward] = []
    try:
        if safety_rules is not None:
            table["safety"] = SafetyReward(load_rules(safety_rules))
        if timeout_s is not None:
            table["unit_tests"] = UnitTestsReward(timeout_s=timeout_s)
            table["unit_tests_partial"] = UnitTestsReward(partial=True, timeout_s=timeout_s)
    except ValueError as error:
        errors.append(str(error))
    for reward in rewards:
        try:
            chosen.append(reward if callable(reward) else reward_of_name(reward, table))
        except ValueError as error:
            errors.append(str(error))
    raise_all(errors)
    return RewardSum(chosen, weights)


def reward_of_name(name: str, table: Mapping[str, Reward] | None = None) -> Reward:
    """Return the reward of a name in `table` (default: REWARDS), or of "module:function".

    Raises:
        ValueError: no such reward, with the nearest name, or what importing it raised.
    """
    if name in (table or REWARDS):
        return (table or REWARDS)[name]
    if name == REWARD_MODEL:
        raise ValueError(
            "rewards: got 'reward_model' without a reward model. Give its folder or model id, "
            "or remove it from the list."
        )
    module, colon, function = str(name).partition(":")
    if not colon:
        names = [REWARD_MODEL, *REWARDS]
        raise ValueError(
            f"rewards: got {name!r}, expected one of {', '.join(names)}, or module:function."
            f"{nearest(name, names)}"
        )
    try:
        return getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the user's module raises
        raise ValueError(
            f"rewards: got {name!r}, which cannot be imported: {type(error).__name__}: {error}. "
            "The module must be importable where the recipe runs (PYTHONPATH)."
        ) from error


def as_list(rewards: str | Reward | Iterable[str | Reward] | None) -> list[str | Reward]:
    """Return rewards as a list: a single name or callable is a list of one, None an empty one."""
    if rewards is None:
        return []
    if isinstance(rewards, str) or callable(rewards):
        return [rewards]
    if not isinstance(rewards, Iterable):
        raise ValueError(
            f"rewards: got {rewards!r}, expected names or functions. "
            f"Names are {', '.join(sorted(REWARDS))}."
        )
    return list(rewards)


def _parameters(reward: Reward) -> list[inspect.Parameter]:
    return list(inspect.signature(reward).parameters.values())


def _name_errors(columns: Iterable[str]) -> list[str]:
    """Return an error for each column that has the name of prompts or completions."""
    return [
        f"data set: got a column {name!r}, expected another name: rewards are called as "
        f"f(prompts, completions, **columns). Rename it: dataset.rename_column({name!r}, ...)."
        for name in _OWN_NAMES
        if name in columns
    ]


def _name_of(reward: Reward) -> str:
    """Return what a reward is called in logs: its `__name__` without a final "_reward"."""
    if not hasattr(reward, "__name__"):
        raise ValueError(
            f"rewards: got {reward!r} without a `__name__`, expected a function or a callable "
            "object that has one. Set `__name__`: it names the reward in logs."
        )
    return reward.__name__.removesuffix("_reward")


def _call(
    name: str,
    reward: Reward,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> Any:
    """Return what a reward gives for the batch; where it fails quickly, find the row at fault."""
    start = time.monotonic()
    try:
        return reward(prompts=prompts, completions=completions, **columns)
    except RewardError:
        raise
    except Exception as error:
        alone = time.monotonic() - start < SEARCH_BELOW_S
        for row, completion in enumerate(completions if alone else []):
            single = {column: [values[row]] for column, values in columns.items()}
            try:
                reward(prompts=[prompts[row]], completions=[completion], **single)
            except Exception as row_error:
                raise RewardError(
                    f"reward {name!r}, row {row}: raised {type(row_error).__name__}: {row_error} "
                    f"on the completion {_excerpt(completion)} to the prompt "
                    f"{_prompt_excerpt(prompts[row])}. A reward must score whatever a model "
                    "writes: catch this case in it."
                ) from row_error
        which = "but on none of them alone" if alone else "which was not run again row by row"
        raise RewardError(
            f"reward {name!r}: raised {type(error).__name__}: {error} on a batch of "
            f"{len(completions)} rows, {which}."
        ) from error


def _checked(
    name: str, values: Any, prompts: Sequence[Prompt], completions: Sequence[str]
) -> list[float | None]:
    """Return the values of a reward as finite floats or None, one per completion."""
    given, values = values, _listed(values)
    if values is None:
        got = "None" if given is None else f"{type(given).__name__} {_excerpt(repr(given))}"
        if hasattr(given, "shape"):
            got = f"a {type(given).__name__} of shape {tuple(given.shape)}"
        raise RewardError(
            f"reward {name!r}: got {got}, expected a list of float or None, one per completion. "
            "Return a list, or a tensor or array of one dimension."
        )
    if len(values) != len(completions):
        raise RewardError(
            f"reward {name!r}: got {len(values)} values for {len(completions)} completions, "
            "expected one each. Return None for a row that it does not apply to."
        )
    checked: list[float | None] = []
    for row, value in enumerate(values):
        number = None if value is None else _number(value)
        if number is not None and math.isnan(number):
            raise RewardError(
                f"reward {name!r}, row {row}: got {value!r}, expected a number that is finite in "
                f"float32, or None, on the completion {_excerpt(completions[row])} to the prompt "
                f"{_prompt_excerpt(prompts[row])}. Bound what the reward returns."
            )
        checked.append(number)
    return checked


def _listed(values: Any) -> list[Any] | None:
    """Return a sequence, or an array or tensor of one dimension, as a list; None of all else."""
    if isinstance(values, Sequence) and not isinstance(values, str | bytes):
        return list(values)
    return values.tolist() if len(getattr(values, "shape", ())) == 1 else None


def _number(value: Any) -> float:
    """Return a value as a float; nan where it is not a number or not finite in float32."""
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last for tensors of many
        number = math.nan
    return number if abs(number) <= _FLOAT32_MAX else math.nan


def _prompt_excerpt(prompt: Prompt) -> str:
    """Return the beginning of a prompt, or of its last question, to find the row in a data set.

    A batch is shuffled, so that the number of a row in it finds nothing.
    """
    if isinstance(prompt, str):
        return _excerpt(prompt, 60)
    try:
        asked = [message["content"] for message in prompt if message["role"] == "user"]
        return _excerpt(str(asked[-1]), 60)
    except (TypeError, KeyError, IndexError):  # no conversation; an error is being told already
        return _excerpt(str(prompt), 60)


def _excerpt(text: str, length: int = 80) -> str:
    return repr(text if len(text) <= length else text[:length] + "…")


REWARDS: dict[str, Reward] = {
    "unit_tests": unit_tests_reward,
    "unit_tests_partial": unit_tests_partial_reward,
    "safety": safety_reward,
    "parses": parses_reward,
}
