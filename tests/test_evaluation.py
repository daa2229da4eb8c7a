"""pass@k, likelihoods, sampling and the suite, against numbers computed another way.

python -m pytest tests/test_evaluation.py
"""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset

from codexhf import completions, evaluation
from codexhf.data import Data, load_tasks
from codexhf.evaluation import answer_logprobs, bits_per_byte, win_rate
from codexhf.generation import sample, sample_ids
from codexhf.pass_metric import PassAtK
from codexhf.passes import pass_at_k, pass_interval
from conftest import ADD

WRONG = "def f(a, b):\n    return a - b"


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 4), (7, 1, 7)])
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(n, c, k):
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_k_refuses_more_draws_than_samples():
    with pytest.raises(ValueError, match="1 <= k <= n"):
        pass_at_k(3, 1, 4)


def test_interval_holds_the_mean_and_shrinks_with_problems():
    values = [0.0, 1.0] * 10
    low, high = evaluation.interval(values)
    wide = high - low
    assert low < 0.5 < high
    low, high = evaluation.interval(values * 16)
    assert (high - low) == pytest.approx(wide / 4, rel=0.2)


def test_no_pass_among_few_problems_is_no_certainty():
    low, high = pass_interval([0.0] * 20)
    assert low == 0 and (1 - high) ** 20 == pytest.approx(0.025)  # still as likely as that
    assert pass_interval([1.0] * 20) == pytest.approx((1 - high, 1))
    assert pass_interval([0.0, 1.0]) == evaluation.interval([0.0, 1.0])


def test_metric_runs_the_code_in_the_sandbox(problems):
    references = [
        {"tests": json.dumps(p["tests"]), "entry_point": p["entry_point"]} for p in problems[:2]
    ]
    out = PassAtK().compute(predictions=[[ADD, WRONG], [WRONG, "while True: x ="]],
                            references=references, k=[1, 2])  # fmt: skip
    assert out["pass@1"] == 0.25 and out["pass@2"] == 0.5
    assert out["verdicts"] == {"fail": 3, "pass": 1}
    assert out["pass@1_low"] <= 0.25 <= out["pass@1_high"]


def test_answer_logprobs_match_a_row_by_row_sum(policy, tokenizer):
    prompts, answers = ["add a", "x"], ["return a + b", "12"]
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
    sums, counts = answer_logprobs(policy, tokenizer, asked, answers, batch_size=2)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        head = tokenizer(f"<|user|>{prompt}<|assistant|>")["input_ids"]
        tail = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        logits = policy(torch.tensor([head + tail])).logits[0].double()
        logp = logits.log_softmax(-1)
        want = sum(logp[len(head) - 1 + j, t].item() for j, t in enumerate(tail))
        assert sums[i] == pytest.approx(want, abs=1e-4)
        assert counts[i] == len(tail)


def test_logits_are_made_of_as_many_rows_as_there_is_room_for(policy, tokenizer, monkeypatch):
    asked = [[{"role": "user", "content": p}] for p in ("add a", "x", "more", "a longer one")]
    whole, _ = answer_logprobs(policy, tokenizer, asked, ["return a + b"] * 4, batch_size=4)
    rows = []
    policy.register_forward_hook(lambda *call: rows.append(len(call[-1].logits)))
    longest = max(len(tokenizer(p[0]["content"])["input_ids"]) for p in asked) + 20
    monkeypatch.setattr(evaluation, "LOGITS_BYTES", 4 * longest * len(tokenizer) * 2)
    sums, _ = answer_logprobs(policy, tokenizer, asked, ["return a + b"] * 4, batch_size=4)
    assert max(rows) < 4 and sum(rows) == 4
    assert sums == pytest.approx(whole, abs=1e-4)


def test_bits_per_byte_counts_every_token_once(policy, tokenizer):
    texts = ["def add(a, b): return a + b", "x = 1"]
    whole = bits_per_byte(policy, tokenizer, texts, max_length=128)
    nats = 0.0
    for text in texts:
        ids = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
        logp = policy(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        nats -= logp.gather(-1, torch.tensor(ids[1:])[:, None]).sum().item()
    size = sum(len(t.encode()) for t in texts)
    assert whole == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    # in pieces every token is still predicted once, with less context
    assert bits_per_byte(policy, tokenizer, texts, max_length=6) == pytest.approx(whole, rel=0.2)


def test_win_rate_counts_ties_half():
    assert win_rate([[1.0, 0.0], [2.0, 2.0]], [[0.0, 0.0], [3.0, 1.0]]) == pytest.approx(2.5 / 4)


def test_sample_is_the_same_for_the_same_seed_and_leaves_the_rng_alone(policy, tokenizer):
    options = dict(n=3, max_new_tokens=8, seed=5)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = sample(policy, tokenizer, ["add", "x = 12 + 3", "y"], **options)
    assert torch.equal(before, torch.get_rng_state())
    assert one == sample(policy, tokenizer, ["add", "x = 12 + 3", "y"], **options)
    assert one != sample(policy, tokenizer, ["add", "x = 12 + 3", "y"], **{**options, "seed": 6})
    assert [len(group) for group in one] == [3, 3, 3]
    assert len(set(one[0])) > 1


def test_sample_ignores_the_models_own_generation_defaults(policy, tokenizer):
    free = sample_ids(policy, tokenizer, ["add"], n=4, max_new_tokens=6)
    policy.generation_config.top_k = 1
    policy.generation_config.repetition_penalty = 5.0
    assert sample_ids(policy, tokenizer, ["add"], n=4, max_new_tokens=6) == free
    assert policy.generation_config.top_k == 1


def test_sample_does_not_depend_on_what_shares_the_batch(policy, tokenizer):
    short, long = "x", "add a and b and return what comes out"
    alone = sample(policy, tokenizer, [short], temperature=0, max_new_tokens=6)
    both = sample(policy, tokenizer, [long, short], temperature=0, max_new_tokens=6)
    assert both[1] == alone[0]


def test_evaluate_models_writes_the_suite(model_folder, tokenizer, tmp_path, write_card, problems):
    from codexhf.arguments import EvaluationArguments

    data = load_tasks([write_card(problems, "prompt-only")], tokenizer)
    other = tmp_path / "other"
    import shutil

    shutil.copytree(model_folder, other)
    from safetensors.torch import load_file, save_file

    weights = load_file(other / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    weights = {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in weights.items()}
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    stage = EvaluationArguments(
        models=[str(model_folder), str(other)],
        reference=str(model_folder),
        reward_model=None,
        num_samples=2,
        k=[1, 2],
        max_new_tokens=6,
        max_length=32,
    )
    corpora = {"code": Data(Dataset.from_dict({"text": ["x = 1\n" * 5]}))}
    metrics = evaluation.evaluate_models(stage, data, corpora, {}, tmp_path)
    assert metrics["model/kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["other/kl"] > 0
    assert metrics["model/pass@1"] == 0.0 and metrics["model/verdicts"] == {"fail": 12}
    assert metrics["other/win_rate_tests"] == 0.5
    assert metrics["model/bits_per_byte_code"] != metrics["other/bits_per_byte_code"]
    assert metrics["model/L_SFT"] == pytest.approx(math.log(len(tokenizer)), rel=0.1)
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert len(answers["all"]["other"]["answers"]) == 6
    assert np.shape(answers["all"]["other"]["verdicts"]) == (6, 2)


def test_models_of_different_tokenizers_answer_what_fits_them_all(
    tokenizer, tmp_path, write_card, problems
):
    """GPT-2 has no position after its last. To the second tokenizer each letter is a token."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from codexhf.arguments import EvaluationArguments

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(kinds.BPE({c: i for i, c in enumerate(["<|end|>", *letters])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    spelling = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
    for name, reads in (("a", tokenizer), ("b", spelling)):
        config = GPT2Config(vocab_size=len(reads), n_positions=48, n_embd=16, n_layer=1, n_head=2)
        config.bos_token_id, config.eos_token_id = None, reads.eos_token_id
        GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
        reads.save_pretrained(tmp_path / name)
    problems[0]["prompt"] = "Write a function that adds two numbers."  # 39 letters, few tokens
    data = load_tasks([write_card(problems, "prompt-only")], tokenizer)
    stage = EvaluationArguments(
        models=[str(tmp_path / "a"), str(tmp_path / "b")],
        reference=str(tmp_path / "a"),
        reward_model=None,
        num_samples=1,
        k=[1],
        max_new_tokens=12,
        max_length=512,
    )
    corpora = {"code": Data(Dataset.from_dict({"text": ["x = 1\n" * 50]}))}
    metrics = evaluation.evaluate_models(stage, data, corpora, {}, tmp_path)
    assert metrics["tasks"] == 5 and metrics["tasks_too_long"] == 1
    assert "a/kl" in metrics and "b/kl" not in metrics  # other ids, other texts (T6)
    assert metrics["b/bits_per_byte_code"] > 0
    stage.max_new_tokens = 47
    with pytest.raises(ValueError, match="leaves no room for any of 6 prompts"):
        evaluation.evaluate_models(stage, data, corpora, {}, tmp_path)


def test_the_sandbox_failing_is_no_verdict(monkeypatch, problems):
    from codexhf.execution import Result

    broken = Result("sandbox_error", 0, 1, "worker lost", 0.0, "none")
    monkeypatch.setattr(
        completions, "run_tests", lambda programs, *a, **k: [broken] * len(programs)
    )
    with pytest.raises(RuntimeError, match="worker lost"):
        completions.judge([[ADD]], [problems[0]["tests"]], ["f"])
