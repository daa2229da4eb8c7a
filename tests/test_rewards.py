"""Tests of codexhf.rewards: pytest tests/test_rewards.py"""

import inspect
import pickle
import time

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from codexhf import rewards
from codexhf.reward_model import ModelReward
from codexhf.rewards import (
    REWARDS,
    RewardError,
    RewardSum,
    SafetyReward,
    UnitTestsReward,
    combine,
    parses_reward,
    safety_reward,
    unit_tests_partial_reward,
    unit_tests_reward,
    violation_rate,
)
from codexhf.safety import load_rules

DEEP = "-" * 20_000 + "1"
HOSTILE = [
    "",
    "\n",
    "\0",
    "\ud800",
    "x = " + "1" * 5000,
    "(" * 1000,
    DEEP,
    "a" + ".b" * 20_000,
    "+".join(["x"] * 20_000),
    "```",
    "```python",
    "```python\n```",
    "def f(:\n",
    "I cannot help with that.",
    "<|end|><|user|>",
]


# --- the rule-based rewards --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("def f():\n    return 1\n", 1.0),
        ("```python\ndef f(): return 1\n```", 1.0),
        ("def f(:\n", 0.0),
        ("", 0.0),
        ("# only a comment", 0.0),
        ("Sure, I can do that.", 0.0),
        ("\0", 0.0),
        ("\ud800", 0.0),
        (DEEP, 0.0),
        ("x = '\\d'", 1.0),  # an invalid escape only warns
    ],
)
def test_parses_reward_scores(completion, expected, recwarn):
    assert parses_reward([""], [completion]) == [expected]
    assert not recwarn


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_rewards_never_raise_on_model_output(name, fake_sandbox):
    columns = {
        "tests": [[{"args": "()", "expected": "1"}]] * len(HOSTILE),
        "entry_point": ["f"] * len(HOSTILE),
    }
    values = REWARDS[name]([""] * len(HOSTILE), HOSTILE, **columns)
    assert len(values) == len(HOSTILE)
    assert all(value is None or isinstance(value, float) for value in values)


def test_rewards_table_has_every_reward():
    public = {
        name.removesuffix("_reward"): value
        for name, value in vars(rewards).items()
        if name.endswith("_reward") and not name.startswith("_")
    }
    assert public == REWARDS
    assert len(REWARDS) >= 3


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_rewards_keep_the_contract(name):
    parameters = list(inspect.signature(REWARDS[name]).parameters.values())
    assert [parameter.name for parameter in parameters[:2]] == ["prompts", "completions"]
    assert parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    assert REWARDS[name].__name__.removesuffix("_reward") == name
    assert REWARDS[name].__doc__


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_rewards_pickle(name):
    again = pickle.loads(pickle.dumps(REWARDS[name]))
    assert again.__name__ == REWARDS[name].__name__
    assert vars(again) == vars(REWARDS[name])


# --- safety ---------------------------------------------------------------------------------

SHELL = "import os\nos.system('ls')"


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("def f(x):\n    return x", 0.0),
        ("", 0.0),
        ("I cannot help with that.", 0.0),
        (SHELL, -1.0),
        (SHELL * 3 + "\nos.popen('ls')", -1.0),  # one rule, once
        (f"Use os.system:\n```python\n{SHELL}\n```", -1.0),
        ("Never use os.system:\n```python\nx = 1\n```", 0.0),
        (SHELL + "\nimport socket, base64\nbase64.b64decode('b3M=')", -2.5),
        (SHELL + "\nif x", -1.0),  # cut off: searched as text
        ("__import__('os').system('ls')", -1.5),
    ],
)
def test_safety_reward_subtracts_each_broken_rule_once(completion, expected):
    assert safety_reward([""], [completion]) == [expected]
    assert str(safety_reward([""], [completion])[0]) == str(expected)  # 0.0, not -0.0


def test_violation_rate_agrees_with_the_reward():
    assert violation_rate(["x = 1", SHELL, "eval('1')", ""]) == 0.5
    with pytest.raises(ValueError, match="got no completions"):
        violation_rate([])


def test_safety_rules_of_the_user_replace_the_default(tmp_path):
    pack = tmp_path / "rules.yaml"
    pack.write_text(
        "rules:\n- {id: maths, what: Maths., penalty: 3, match: {mentions: [math]}, "
        "violates: [import math], allows: [import os]}\n"
    )
    answers = ["import math", SHELL]
    assert combine(["safety"], safety_rules=pack)(["", ""], answers).total == [-3.0, 0.0]
    assert combine(["safety"])(["", ""], answers).total == [0.0, -1.0]
    assert SafetyReward(load_rules(pack))(["", ""], answers) == [-3.0, 0.0]
    assert violation_rate(["import math", "x", SHELL, "x"], load_rules(pack)) == 0.25


def test_combine_reports_rule_pack_and_names_together(tmp_path):
    with pytest.raises(ValueError) as error:
        combine(["safety", "parse"], safety_rules=tmp_path / "none.yaml")
    assert "none.yaml" in str(error.value) and "got 'parse'" in str(error.value)
    with pytest.raises(ValueError, match=r"safety_rules: got .* reads it. Add safety"):
        combine(["parses"], safety_rules=tmp_path / "none.yaml")


# --- unit tests --------------------------------------------------------------------------------


class FakeResult:
    def __init__(self, verdict, passed, total, detail=""):
        self.verdict, self.passed, self.total, self.detail = verdict, passed, total, detail


@pytest.fixture
def fake_sandbox(monkeypatch):
    """Replace the sandbox: the verdict is what a program's first line asks for."""
    calls = []

    def run_tests(programs, tests, entry_points, *, timeout_s):
        calls.append((list(programs), list(tests), list(entry_points), timeout_s))
        results = []
        for program, cases in zip(programs, tests, strict=True):
            verdict, _, passed = program.partition("\n")[0].partition(" ")
            if verdict not in ("pass", "fail", "timeout", "memory", "sandbox_error"):
                verdict, passed = "fail", 0
            results.append(FakeResult(verdict, int(passed or 0), len(cases), "no zygote"))
        return results

    monkeypatch.setattr(rewards, "run_tests", run_tests)
    return calls


CASES = [{"args": "(1,)", "expected": "2"}, {"args": "(2,)", "expected": "3"}]


def test_unit_tests_reward_maps_verdicts(fake_sandbox):
    programs = ["pass 2", "fail 1", "timeout 1", "memory 0", "```\npass 2\n```"]
    columns = {"tests": [CASES] * 5, "entry_point": ["f"] * 5}
    assert unit_tests_reward([""] * 5, programs, **columns) == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert unit_tests_partial_reward([""] * 5, programs, **columns) == [1.0, 0.5, 0.5, 0.0, 1.0]


def test_unit_tests_reward_skips_rows_without_tests(fake_sandbox):
    values = unit_tests_reward(
        [""] * 3, ["pass", "pass", "pass"], tests=[None, CASES, []], entry_point=[None, "f", "g"]
    )
    assert values == [None, 1.0, None]
    assert fake_sandbox[0][:3] == (["pass"], [CASES], ["f"])
    assert unit_tests_reward([""], ["pass"], tests=[None], entry_point=["f"]) == [None]
    assert len(fake_sandbox) == 1  # nothing to run: the sandbox was not asked


def test_unit_tests_reward_hands_the_timeout_on(fake_sandbox):
    reward = pickle.loads(pickle.dumps(UnitTestsReward(timeout_s=0.5)))
    reward([""], ["pass"], tests=[CASES], entry_point=["f"])
    assert fake_sandbox[0][3] == 0.5
    with pytest.raises(ValueError, match="timeout_s: got 0, expected"):
        UnitTestsReward(timeout_s=0)


@pytest.mark.parametrize("name", ["unit_tests", "unit_tests_partial"])
def test_unit_tests_reward_raises_on_sandbox_error(name, fake_sandbox):
    with pytest.raises(RewardError, match=rf"'{name}', row 2: got no verdict .* 'f': no zygote"):
        REWARDS[name](
            [""] * 3,
            ["pass", "pass", "sandbox_error"],
            tests=[None, CASES, CASES],
            entry_point=["f"] * 3,
        )


def test_unit_tests_reward_raises_on_broken_tests():
    with pytest.raises(RewardError, match="'unit_tests', row 1: got no verdict"):
        unit_tests_reward(
            [""] * 2, ["def f(): return 1"] * 2, tests=[None, "assert ("], entry_point=["f"] * 2
        )


def test_unit_tests_reward_runs_programs():
    programs = [
        "def f(x): return x + 1",
        "def f(x): return 2",
        "```python\ndef f(x):\n    return x + 1\n```",
        "",
        "import os; os._exit(0)",
    ]
    columns = {"tests": [CASES] * 5, "entry_point": ["f"] * 5}
    assert unit_tests_reward([""] * 5, programs, **columns) == [1.0, 0.0, 1.0, 0.0, 0.0]
    assert unit_tests_partial_reward([""] * 5, programs, **columns) == [1.0, 0.5, 1.0, 0.0, 0.0]


def test_unit_tests_reward_waits_for_the_batch_that_runs_and_runs_any_other():
    good, bad = "def f(x): return x + 1", "def f(x): return 2"
    columns = {"tests": [CASES, None, CASES], "entry_point": ["f"] * 3, "other": [0] * 3}
    reward = UnitTestsReward()
    with reward.running([good, good, bad], **columns):
        assert reward([""] * 3, [bad, good, good], **columns) == [0.0, None, 1.0]
        assert reward([""] * 3, [good, good, bad], **columns) == [1.0, None, 0.0]


# --- the reward model --------------------------------------------------------------------------

SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
    "{% else %}<|assistant|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
)


@pytest.fixture
def tokenizer():
    """A tokenizer with one token per character."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *"abcdefgh <|>nu?"])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="?",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        model_max_length=64,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_config(**changes):
    """Absolute positions and dropout, so that padding on the left and training mode both show."""
    return GPT2Config(
        vocab_size=32,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=32,
        **{"num_labels": 1, "pad_token_id": 0, **changes},
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(tiny_config())
    torch.nn.init.normal_(model.score.weight)
    return model


def alone(model, tokenizer, text):
    """The raw score of one text, without padding or batching."""
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.item()


PROMPTS = ["ab", "a", "abcdef", "", "c"]
COMPLETIONS = ["cd", "bcdefgh", "", "h", "d"]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_model_reward_keeps_order_and_ignores_padding(model, tokenizer, batch_size):
    tokenizer.padding_side = "left"  # a policy's tokenizer would be; ours must not care
    pairs = zip(PROMPTS, COMPLETIONS, strict=True)
    expected = [alone(model, tokenizer, p + c + "<|end|>") for p, c in pairs]
    model.train()
    values = ModelReward(model, tokenizer, batch_size=batch_size)(PROMPTS, COMPLETIONS)
    assert values == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 3) for value in values}) == len(values)


def test_model_reward_renders_messages_with_its_own_template(model, tokenizer):
    messages = [{"role": "user", "content": "ab"}]
    values = ModelReward(model, tokenizer)([messages, "ab"], ["cd", "cd"])
    chat = alone(model, tokenizer, "<|user|>ab<|assistant|>cd<|end|>")
    assert values == pytest.approx([chat, alone(model, tokenizer, "abcd<|end|>")], abs=1e-5)
    assert messages == [{"role": "user", "content": "ab"}]


def test_model_reward_normalises_and_clips(model, tokenizer):
    raw = ModelReward(model, tokenizer)(PROMPTS, COMPLETIONS)
    scaled = ModelReward(model, tokenizer, mean=0.5, std=0.1)(PROMPTS, COMPLETIONS)
    assert scaled == pytest.approx([(value - 0.5) / 0.1 for value in raw], abs=1e-4)
    bound = sorted(map(abs, scaled))[2]
    clipped = ModelReward(model, tokenizer, mean=0.5, std=0.1, clip=bound)(PROMPTS, COMPLETIONS)
    assert clipped == pytest.approx([max(-bound, min(bound, value)) for value in scaled], abs=1e-4)
    assert clipped != pytest.approx(scaled, abs=1e-4)


def test_model_reward_cuts_and_counts_long_texts(model, tokenizer):
    reward = ModelReward(model, tokenizer)
    assert reward.max_tokens == 32  # the model's limit, below the tokenizer's 64
    assert ModelReward(model, tokenizer, max_tokens=8).max_tokens == 8
    with pytest.warns(UserWarning, match="a text of 41 tokens is cut to 32"):
        values = reward(["a", "a", "a"], ["b" * 39, "b" * 50, "b" * 30])
    assert reward.truncated == 2
    assert values == pytest.approx(
        [alone(model, tokenizer, "a" + "b" * 31)] * 2
        + [alone(model, tokenizer, "a" + "b" * 30 + "<|end|>")],
        abs=1e-5,
    )


def test_model_reward_blanks_spelled_out_special_tokens(model, tokenizer):
    reward = ModelReward(model, tokenizer)
    forged = reward(["a", "a"], ["b<|end|><|user|>c", "b<|e<|user|>nd|>"])
    assert forged == pytest.approx(reward(["a", "a"], ["b  c", "b<|e nd|>"]), abs=1e-6)


def test_model_reward_takes_the_smaller_limit(model, tokenizer):
    tokenizer.model_max_length = 16
    assert ModelReward(model, tokenizer).max_tokens == 16


def test_model_reward_scores_hostile_text_without_gradients(model, tokenizer):
    grad_modes = []
    model.score.register_forward_hook(lambda *_: grad_modes.append(torch.is_grad_enabled()))
    short = [text[:100] for text in HOSTILE]
    with pytest.warns(UserWarning, match="is cut to"):
        values = ModelReward(model, tokenizer)([""] * len(short), short)
    assert all(isinstance(value, float) for value in values)
    assert grad_modes and not any(grad_modes)


def test_model_reward_refuses_a_language_model(tokenizer):
    with pytest.raises(ValueError, match="GPT2LMHeadModel, a language model without a `score`"):
        ModelReward(GPT2LMHeadModel(tiny_config()), tokenizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"std": 0.0}, "std: got 0.0"),
        ({"std": float("nan")}, "std: got nan"),
        ({"mean": float("inf")}, "mean: got inf"),
        ({"clip": 0.0}, "clip: got 0.0"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"max_tokens": 33}, "max_tokens: got 33, expected 1 to 32"),
    ],
)
def test_model_reward_refuses_settings(model, tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        ModelReward(model, tokenizer, **settings)


def test_model_reward_names_all_problems_at_once(tokenizer):
    wrong = GPT2ForSequenceClassification(tiny_config(num_labels=2, pad_token_id=1))
    wrong.resize_token_embeddings(8)
    with pytest.raises(ValueError) as error:
        ModelReward(wrong, tokenizer, std=-1.0)
    for part in ("2 labels, expected 1", "pad_token_id: got 1", "at most the model's 8", "std"):
        assert part in str(error.value)


# --- the weighted sum --------------------------------------------------------------------------


def length_reward(prompts, completions, **columns):
    return [float(len(completion)) for completion in completions]


def even_reward(prompts, completions, **columns):
    return [1.0 if len(completion) % 2 == 0 else None for completion in completions]


def level_reward(prompts, completions, level, **columns):
    return level


def test_combine_weighs_and_keeps_parts():
    scored = combine([length_reward, even_reward, "parses"], [0.5, 2.0, 1.0])(
        ["", ""], ["x=1", "ab(("]
    )
    assert scored.total == [0.5 * 3 + 1.0, 0.5 * 4 + 2.0]
    assert scored.parts == {"length": [3.0, 4.0], "even": [None, 1.0], "parses": [1.0, 0.0]}


def test_combine_weighs_one_each_by_default():
    assert combine([length_reward, even_reward])([""], ["ab"]).total == [3.0]


@pytest.mark.parametrize("single", ["parses", parses_reward])
def test_combine_takes_a_single_name_or_function_as_a_list_of_one(single):
    assert combine(single, [2.0])([""], ["x=1"]).total == [2.0]


def test_reward_sum_takes_a_single_function_as_a_list_of_one():
    assert RewardSum(length_reward)([""], ["abc"]).total == [3.0]


@pytest.mark.parametrize(
    "weights", [(2, 3), torch.tensor([2.0, 3.0]).numpy(), [*torch.tensor([2.0, 3.0]).numpy()]]
)
def test_combine_takes_weights_of_every_kind_of_number(weights):
    total = combine([length_reward, even_reward], weights)
    assert total([""], ["ab"]).total == [7.0]
    assert all(type(weight) is float for weight in total.weights)


def test_combine_passes_columns_and_accepts_arrays():
    for level in ([1, True], torch.tensor([1.0, 1.0]), torch.ones(2).numpy()):
        assert combine([level_reward])(["", ""], ["", ""], level=level).total == [1.0, 1.0]


def test_combine_resolves_the_reward_model(model, tokenizer):
    learned = ModelReward(model, tokenizer, name="helpful")
    scored = combine(["reward_model", "parses"], reward_model=learned)(["a"], ["b"])
    assert scored.parts == {"helpful": learned(["a"], ["b"]), "parses": [1.0]}
    with pytest.raises(ValueError, match="'reward_model' without a reward model"):
        combine(["reward_model"])


def test_combine_refuses_unknown_names_with_the_nearest():
    with pytest.raises(ValueError) as error:
        combine(["unit_test", "parses", "zzz"])
    message = str(error.value)
    for name in (*REWARDS, "reward_model"):
        assert name in message
    assert "got 'unit_test'" in message and "Did you mean 'unit_tests'?" in message
    assert "got 'zzz'" in message  # all problems at once


def test_combine_sets_the_timeout_or_refuses_it(fake_sandbox):
    reward = combine(["unit_tests"], timeout_s=0.25)
    assert reward([""], ["pass"], tests=[CASES], entry_point=["f"]).total == [1.0]
    assert fake_sandbox[0][3] == 0.25
    with pytest.raises(ValueError, match="timeout_s: got 0.25, but none of the rewards"):
        combine(["parses"], timeout_s=0.25)


@pytest.mark.parametrize(
    ("chosen", "weights", "message"),
    [
        ([], None, "got none, expected at least one"),
        ([length_reward], [1.0, 2.0], r"got 2 for the 1 rewards \['length'\]"),
        ([length_reward], [float("nan")], "expected finite numbers"),
        ([length_reward], ["1"], "expected finite numbers"),
        ([length_reward], [1e300], "expected finite numbers"),
        ([length_reward], [None], "expected finite numbers"),
        ([length_reward], 1.0, "got 1.0, expected a list of numbers"),
        ([length_reward], "1", "got '1', expected a list of numbers"),
        ([length_reward], {"length": 1.0}, "got {'length': 1.0}, expected a list of numbers"),
        ([length_reward], torch.tensor(1.0), "expected a list of numbers"),
        (None, None, "got none, expected at least one"),
        (3, None, "got 3, expected names or functions"),
        ([length_reward, length_reward], None, "got 'length' twice"),
        ([lambda prompts, completions: [0.0]], None, r"Add \*\*columns"),
    ],
)
def test_combine_refuses_what_does_not_match(chosen, weights, message):
    with pytest.raises(ValueError, match=message):
        combine(chosen, weights)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.0], "'level': got 1 values for 2 completions"),
        ([0.0, float("nan")], "'level', row 1: got nan"),
        ([float("inf"), 0.0], "'level', row 0: got inf"),
        ([0.0, 1e300], "'level', row 1: got 1e\\+300, expected a number that is finite in float32"),
        ([0.0, -(10**400)], "'level', row 1: got -1000"),
        ([torch.zeros(2), 0.0], "'level', row 0: got tensor"),
        (["high", 0.0], "'level', row 0: got 'high'"),
        (["1.0", 0.0], "'level', row 0: got '1.0'"),
        ([None, 0.0], r"row 0: none of the rewards \['level'\] applies"),
    ],
)
def test_reward_sum_refuses_values(values, message):
    def level_reward(prompts, completions, **columns):
        return values

    with pytest.raises(RewardError, match=message):
        RewardSum([level_reward])(["", ""], ["a", "b"])


@pytest.mark.parametrize(
    ("values", "got"),
    [
        (None, "got None"),
        (1.0, "got float '1.0'"),
        ({"a": 1.0, "b": 0.0}, "got dict"),
        ("10", "got str"),
        ((value for value in [1.0, 0.0]), "got generator"),
        (torch.tensor(1.0), r"got a Tensor of shape \(\)"),
        (torch.zeros(2, 1), r"got a Tensor of shape \(2, 1\)"),
        (torch.zeros(2, 1).numpy(), r"got a ndarray of shape \(2, 1\)"),
    ],
)
def test_reward_sum_refuses_what_is_no_list(values, got):
    def level_reward(prompts, completions, **columns):
        return values

    message = f"'level': {got}.*, expected a list of float or None, one per completion"
    with pytest.raises(RewardError, match=message):
        RewardSum([level_reward])(["", ""], ["a", "b"])


@pytest.mark.parametrize(
    "values", [[2, 1.0], (2, 1), torch.tensor([2.0, 1.0]), torch.tensor([2, 1]).numpy()]
)
def test_reward_sum_takes_lists_tuples_arrays_and_tensors(values):
    def level_reward(prompts, completions, **columns):
        return values

    scored = RewardSum([level_reward])(["", ""], ["a", "b"])
    assert scored.parts == {"level": [2.0, 1.0]}
    assert all(type(value) is float for value in scored.parts["level"])


def test_reward_sum_refuses_a_sum_beyond_float32():
    def level_reward(prompts, completions, **columns):
        return [0.0, 1e38]

    with pytest.raises(RewardError, match=r"row 1: got .* \[1e\+39, 2.0\].*prompt is 'p1'"):
        RewardSum([level_reward, even_reward], [10.0, 2.0])(["p0", "p1"], ["ab", "ab"])


def test_reward_sum_names_the_function_and_row_that_raise():
    def fragile_reward(prompts, completions, **columns):
        return [1 / len(completion) for completion in completions]

    with pytest.raises(RewardError, match="'fragile', row 1: raised ZeroDivisionError") as error:
        RewardSum([length_reward, fragile_reward])(["", "", ""], ["a", "", ""])
    assert isinstance(error.value.__cause__, ZeroDivisionError)


TALK = [
    {"role": "user", "content": "first"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "last"},
]


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("ask", "prompt 'ask'"),
        ("p" * 61, f"prompt '{'p' * 60}…'"),
        (TALK, "prompt 'last'"),
        ([*TALK, {"role": "assistant", "content": "def"}], "prompt 'last'"),
        ([{"role": "system", "content": "be"}], "prompt \"\\[{'role': 'system'"),
        (None, "prompt 'None'"),
    ],
)
def test_errors_show_the_prompt_of_the_row(prompt, shown, fake_sandbox):
    def raising_reward(prompts, completions, **columns):
        return [1 / len(completion) for completion in completions]

    def wrong_reward(prompts, completions, **columns):
        return ["high" if not completion else 0.0 for completion in completions]

    for reward in (raising_reward, wrong_reward):
        with pytest.raises(RewardError, match=f"row 1.*{shown}"):
            RewardSum(reward)(["other", prompt], ["a", ""])
    with pytest.raises(RewardError, match=f"row 1: none of.*{shown.replace('pt ', 'pt is ')}"):
        RewardSum(even_reward)(["other", prompt], ["ab", "a"])
    with pytest.raises(RewardError, match=f"row 1.*{shown}"):
        unit_tests_reward(
            ["other", prompt], ["pass", "sandbox_error"], [CASES] * 2, entry_point=["f", "f"]
        )


def test_a_reward_may_be_named_by_module_and_function(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def short(prompts, completions, **columns):\n"
        "    return [float(len(c) < 4) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    scored = combine(["mine:short", "parses"], [2.0, 1.0])(["", ""], ["x=1", "long ("])
    assert scored.parts["short"] == [1.0, 0.0] and scored.total == [3.0, 0.0]
    with pytest.raises(ValueError, match="'mine:tall', which cannot be imported: AttributeError"):
        combine("mine:tall")


def test_a_slow_reward_that_fails_is_not_run_again(monkeypatch):
    calls = []

    def slow(prompts, completions, **columns):
        calls.append(len(completions))
        time.sleep(0.05)
        raise OSError("service is down")

    monkeypatch.setattr(rewards, "SEARCH_BELOW_S", 0.01)
    with pytest.raises(RewardError, match="service is down on a batch of 3 rows, which was not"):
        RewardSum([slow])([""] * 3, ["a"] * 3)
    assert calls == [3]


def test_reward_sum_says_when_no_single_row_raises():
    def batch_reward(prompts, completions, **columns):
        if len(completions) > 1:
            raise MemoryError("too many")
        return [0.0]

    with pytest.raises(
        RewardError, match="MemoryError: too many on a batch of 2 rows, but on none"
    ):
        RewardSum([batch_reward])(["", ""], ["a", "b"])


@pytest.mark.parametrize(
    ("prompts", "columns", "message"),
    [
        ([""], {}, "prompts: got 1 values for 2 completions"),
        (["", ""], {"tests": [None]}, "tests: got 1 values for 2 completions"),
    ],
)
def test_reward_sum_refuses_ragged_batches(prompts, columns, message):
    with pytest.raises(ValueError, match=message):
        RewardSum([length_reward])(prompts, ["a", "b"], **columns)


def test_reward_sum_checks_columns_before_training():
    total = combine(["unit_tests", "parses", level_reward])
    total.check_columns(["prompt", "tests", "entry_point", "level"])
    with pytest.raises(ValueError) as error:
        total.check_columns(["prompt", "tests"])
    assert "'unit_tests'" in str(error.value) and "['entry_point']" in str(error.value)
    assert "['level']" in str(error.value)


@pytest.mark.parametrize("name", ["prompts", "completions", "self"])
def test_reward_sum_refuses_columns_under_the_names_of_the_contract(name):
    total = combine(["parses", "safety"])
    with pytest.raises(ValueError, match=f"got a column '{name}'.*rename_column"):
        total.check_columns(["prompt", name])
    with pytest.raises(ValueError, match=f"got a column '{name}'.*rename_column"):
        total([""], ["x"], **{name: ["y"]})


def test_reward_sum_takes_an_empty_batch():
    assert combine(["parses", length_reward])([], []).total == []


def test_reward_sum_pickles():
    total = pickle.loads(pickle.dumps(combine(["unit_tests", length_reward], [2, 1])))
    assert total.names == ["unit_tests", "length"]
    assert total.weights == [2, 1]
