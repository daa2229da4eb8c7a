"""Sampling, masks, layouts and scores: `pytest tests/test_ppo_rollout.py`."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

sys.path.insert(0, str(Path(__file__).parent))

import ppo_setup as setup  # noqa: E402
from codexhf.generation import native as native_engine  # noqa: E402
from codexhf.generation.engines import (  # noqa: E402
    ContinuousBatchingEngine,
    Generation,
    HFEngine,
    Sampling,
)
from codexhf.generation.native import (  # noqa: E402
    NativeEngine,
    obstacle,
    preallocated_cache,
    sample_tokens,
)
from codexhf.models import disable_dropout  # noqa: E402
from codexhf.ppo.model import PolicyAndCritic, has_linear_head  # noqa: E402
from codexhf.ppo.rollout import (  # noqa: E402
    PromptEncoder,
    demonstration_batch,
    mark,
    shape_scores,
)
from codexhf.ppo.schedule import Schedule  # noqa: E402
from codexhf.prompts import left_pad  # noqa: E402

TOKENIZER = setup.tokenizer()
VOCABULARY = len(TOKENIZER)
SAMPLING = Sampling(max_tokens=8, stop_ids=(2, 9, 10, 11), chunk=64)
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [6, 6]]


def policy():
    return setup.record.make_models(TOKENIZER)["model"].eval()


def answer(engine, model, seed=3, temperature=0.8) -> Generation:
    ids, mask = left_pad(PROMPTS * 4, torch.device("cpu"))
    return engine.generate(model, ids, mask, seed=seed, temperature=temperature)


def logprobs_alone(model, prompt, response, temperature) -> torch.Tensor:
    """Score one unpadded row with the model's own logits."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    scores = torch.log_softmax(logits.float() / temperature, -1)
    return scores.gather(1, torch.tensor(response)[:, None]).squeeze(1)


ENGINES = {
    "native": NativeEngine,
    "hf": HFEngine,
}
if setup.HAS_CONTINUOUS_BATCHING:
    ENGINES["continuous_batching"] = lambda sampling: ContinuousBatchingEngine(sampling, 32, 16)


@pytest.mark.parametrize("name", ENGINES)
def test_engine_logprobs_equal_those_of_a_forward_without_padding(name):
    model = policy()
    found = answer(ENGINES[name](SAMPLING), model)
    assert set(found.lengths.tolist()) != {8}, "some rows must end early"
    for i, prompt in enumerate(PROMPTS * 4):
        n = int(found.lengths[i])
        expected = logprobs_alone(model, prompt, found.responses[i, :n].tolist(), 0.8)
        assert torch.allclose(found.logprobs[i, :n], expected, atol=1e-5)
        assert not found.logprobs[i, n:].any() and not found.responses[i, n:].any()


@pytest.mark.parametrize("name", ENGINES)
def test_engine_ends_rows_at_their_first_stop_token(name):
    found = answer(ENGINES[name](SAMPLING), policy())
    for row, n in zip(found.responses.tolist(), found.lengths.tolist(), strict=True):
        assert not set(row[: n - 1]) & set(SAMPLING.stop_ids)
        assert n == 8 or row[n - 1] in SAMPLING.stop_ids


@pytest.mark.parametrize("name", ["native", "hf"])
def test_engine_is_a_function_of_its_seed_and_leaves_the_global_one(name):
    model, engine = policy(), ENGINES[name](SAMPLING)
    before = torch.random.get_rng_state()
    first, again, other = (answer(engine, model, seed=s).responses for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_native_engine_draws_what_generate_draws_when_it_keeps_ended_rows():
    model = policy()
    ours, theirs = (
        answer(NativeEngine(SAMPLING, drop_ended=False), model),
        answer(HFEngine(SAMPLING), model),
    )
    assert torch.equal(ours.responses, theirs.responses)
    assert torch.allclose(ours.logprobs, theirs.logprobs, atol=1e-6)


def test_native_engine_stops_computing_ended_rows():
    model, widths = policy(), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].size(0)), with_kwargs=True
    )
    found = answer(NativeEngine(SAMPLING), model)
    assert widths[0] == 16 and widths[-1] < 16
    assert len(widths) <= int(found.lengths.max())


@pytest.mark.parametrize("invert", [True, False])
def test_sampler_draws_from_the_distribution(invert):
    logits = torch.tensor([2.0, float("-inf"), 0.0, 1.0, -3.0, float("-inf")])
    generator = torch.Generator().manual_seed(0)
    tokens, logprobs = sample_tokens(logits.expand(20_000, -1), 0.5, generator, invert)
    expected = torch.log_softmax(logits / 0.5, -1)
    counts = torch.bincount(tokens, minlength=6) / 20_000
    assert torch.allclose(counts, expected.exp(), atol=0.01)
    assert counts[1] == counts[5] == 0
    assert torch.allclose(logprobs, expected[tokens])


def test_greedy_is_the_argmax_of_the_logits():
    model = policy()
    found = answer(NativeEngine(SAMPLING), model, temperature=0)
    assert torch.equal(found.responses, answer(HFEngine(SAMPLING), model, temperature=0).responses)


def test_generation_config_of_the_model_does_not_leak_and_is_kept():
    model = policy()
    plain = answer(HFEngine(SAMPLING), model).responses
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.top_k = 1
    assert torch.equal(answer(HFEngine(SAMPLING), model).responses, plain)
    assert model.generation_config.repetition_penalty == 5.0


@pytest.mark.skipif(not setup.HAS_CONTINUOUS_BATCHING, reason="transformers before 5.23")
def test_continuous_batching_answers_with_the_new_weights_after_an_update():
    model, engine = policy(), ENGINES["continuous_batching"](SAMPLING)
    answer(engine, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    found = answer(engine, model)
    n = int(found.lengths[2])
    expected = logprobs_alone(model, PROMPTS[2], found.responses[2, :n].tolist(), 0.8)
    assert torch.allclose(found.logprobs[2, :n], expected, atol=1e-5)
    engine.config.allow_block_sharing = True
    with pytest.raises(ValueError, match="allow_block_sharing"):
        answer(engine, model)


SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "intermediate_size": 24}
FAMILIES = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, **HEADS, num_key_value_heads=1)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **SIZES, **HEADS, num_key_value_heads=1, head_dim=8, sliding_window=4, pad_token_id=3
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, attn_pdrop=0.3)
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, **HEADS)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**SIZES, num_attention_heads=2, ffn_dim=24, word_embed_proj_dim=16, dropout=0.5)
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_score_as_they_sample_also_in_train_mode(family):
    torch.manual_seed(0)
    model = FAMILIES[family]()
    disable_dropout(model)
    found = answer(NativeEngine(SAMPLING), model.eval())
    ids, mask = left_pad(PROMPTS * 4, torch.device("cpu"))
    answers = marked(found, ids, mask)
    wrapper = PolicyAndCritic(model, setup.record.make_models(TOKENIZER)["value_model"])
    wrapper.train()
    assert has_linear_head(model) == (family != "gemma2")
    for trim in (True, False):
        scored = score_all(wrapper, answers, trim)
        assert torch.allclose(scored, found.logprobs, atol=2e-5)


# ------------------------------------------------------------------- steps of fixed shape
# On a GPU these are recorded and replayed; here the same code runs from Python.


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gemma2"])
def test_steps_of_fixed_shape_draw_what_the_plain_loop_draws(family, amp):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    disable_dropout(model)
    assert obstacle(model, preallocated_cache(model, 8)) is None
    with torch.autocast("cpu", torch.bfloat16, enabled=amp), warnings.catch_warnings():
        warnings.simplefilter("error")
        fixed = answer(NativeEngine(SAMPLING, drop_ended=False, fixed_shapes=True), model)
        plain = answer(NativeEngine(SAMPLING, drop_ended=False, fixed_shapes=False), model)
    assert torch.equal(fixed.responses, plain.responses)
    assert torch.equal(fixed.lengths, plain.lengths)
    assert torch.allclose(fixed.logprobs, plain.logprobs, atol=1e-2 if amp else 1e-6)


def test_steps_of_fixed_shape_survive_wider_steps_and_ended_rows(monkeypatch):
    monkeypatch.setattr(native_engine, "FIXED_TOKENS", 4)
    monkeypatch.setattr(native_engine, "WORTH_RECORDING", 0)
    monkeypatch.setattr(native_engine, "LOOK_EVERY", 3)
    model, shapes = policy(), []
    plain_forward = native_engine.forward

    def forward(policy, ids, mask, *rest):
        shapes.append((len(ids), mask.dim(), mask.size(-1)))
        return plain_forward(policy, ids, mask, *rest)

    monkeypatch.setattr(native_engine, "forward", forward)
    found = answer(NativeEngine(Sampling(24, (2, 9, 10, 11), 64), fixed_shapes=True), model)
    fixed = [(rows, width) for rows, dims, width in shapes if dims == 4]
    assert len({rows for rows, _ in fixed}) > 1 and len({width for _, width in fixed}) > 1
    assert fixed == sorted(fixed, key=lambda shape: (-shape[0], shape[1]))
    for i, prompt in enumerate(PROMPTS * 4):
        n = int(found.lengths[i])
        expected = logprobs_alone(model, prompt, found.responses[i, :n].tolist(), 0.8)
        assert torch.allclose(found.logprobs[i, :n], expected, atol=1e-5)
        assert not found.logprobs[i, n:].any() and not found.responses[i, n:].any()


class WithoutPrepared(Qwen2ForCausalLM):
    """Does not know masks of four dimensions."""

    def forward(self, *args, attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.dim() == 4:
            raise ValueError("expected a mask of two dimensions")
        return super().forward(*args, attention_mask=attention_mask, **kwargs)


class WithoutMask(Qwen2ForCausalLM):
    """Takes masks of four dimensions and attends to everything."""

    def forward(self, *args, attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.dim() == 4:
            attention_mask = torch.ones_like(attention_mask)
        return super().forward(*args, attention_mask=attention_mask, **kwargs)


@pytest.mark.parametrize("kind", [WithoutPrepared, WithoutMask])
def test_a_policy_that_cannot_be_fixed_says_so_and_answers_all_the_same(kind):
    torch.manual_seed(0)
    config = Qwen2Config(**SIZES, **HEADS, num_key_value_heads=1, initializer_range=0.5)
    model = kind(config).eval()
    engine = NativeEngine(SAMPLING, drop_ended=False, fixed_shapes=True)
    with pytest.warns(UserWarning, match="does not decode with fixed shapes"):
        first = answer(engine, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = answer(engine, model)
    plain = answer(NativeEngine(SAMPLING, drop_ended=False, fixed_shapes=False), model)
    for found in (first, again):
        assert torch.equal(found.responses, plain.responses)
        assert torch.equal(found.logprobs, plain.logprobs)


def test_obstacles_to_recording_a_step_are_named():
    def found(model):
        return obstacle(model, preallocated_cache(model, 8)) or "none"

    assert "sliding window" in found(FAMILIES["gemma2"]())
    model = FAMILIES["qwen2"]()
    model.gradient_checkpointing_enable()  # its hook on the embeddings does no harm
    assert model.model.embed_tokens._forward_hooks and found(model) == "none"
    handle = model.model.layers[0].register_forward_hook(lambda *args: None)
    assert "hooks" in found(model)
    handle.remove()
    model.set_attn_implementation("eager")
    assert "'eager'" in found(model)


def marked(generation, ids, mask, **options):
    args = setup.PPOConfig(output_dir="unused", **{**setup.SMALL, **options})
    return mark(generation, ids, mask, args, TOKENIZER, SAMPLING.stop_ids)


def score_all(wrapper, answers, trim) -> torch.Tensor:
    out = torch.zeros_like(answers.logprobs)
    for index, layout in answers.batches(3, trim):
        real = answers.response_mask[index]
        picked, _ = wrapper.logprobs(
            wrapper.policy,
            layout.input_ids,
            layout.attention_mask,
            layout.policy_at,
            answers.responses[index][real],
            0.8,
        )
        out[index] = out[index].masked_scatter(real, picked.detach())
    return out


def test_layout_flush_left_has_no_padding_before_or_beyond_the_longest_row():
    ids, mask = left_pad([[5, 6, 7], [8]], torch.device("cpu"))
    generation = Generation(
        torch.tensor([[11, 12, 0], [13, 14, 15]]), torch.tensor([2, 3]), torch.zeros(2, 3)
    )
    answers = marked(generation, ids, mask)
    layout = answers.layout(torch.tensor([0, 1]), trim=True)
    assert layout.input_ids.tolist() == [[5, 6, 7, 11, 12], [8, 13, 14, 15, 0]]
    assert layout.attention_mask is None
    assert layout.policy_at.int().tolist() == [[0, 0, 1, 1, 0], [1, 1, 1, 0, 0]]
    assert layout.last.tolist() == [4, 3]
    plain = answers.layout(torch.tensor([1]), trim=False)
    assert plain.input_ids.tolist() == [[0, 0, 8, 13, 14, 15]]
    assert plain.policy_at.int().tolist() == [[0, 0, 1, 1, 1, 0]]


def test_pad_equal_to_eos_keeps_real_tokens_real():
    """A pad id that is the end token, inside the prompt and at the end, is a token like others."""
    ids, mask = left_pad([[2, 5, 2, 6]], torch.device("cpu"))
    generation = Generation(torch.tensor([[7, 2]]), torch.tensor([2]), torch.zeros(1, 2))
    answers = marked(generation, ids, mask)
    assert answers.mask.all() and answers.ended.all() and answers.lengths.tolist() == [2]


def test_sampled_pad_token_ends_the_answer_only_by_trl_rule():
    ids, mask = left_pad([[5, 6]], torch.device("cpu"))
    generation = Generation(torch.tensor([[7, 3, 8]]), torch.tensor([3]), torch.zeros(1, 3))
    assert marked(generation, ids, mask).lengths.tolist() == [3]
    theirs = marked(generation, ids, mask, masks_from="pad_token", trim_padding=False)
    assert theirs.lengths.tolist() == [1]


def test_missing_eos_check_tells_stop_tokens_from_the_end_token():
    ids, mask = left_pad([[5]] * 2, torch.device("cpu"))
    generation = Generation(torch.tensor([[7, 9], [7, 8]]), torch.tensor([2, 2]), torch.zeros(2, 2))
    assert marked(generation, ids, mask).ended.tolist() == [True, False]
    theirs = marked(generation, ids, mask, missing_eos_check="eos_token")
    assert theirs.ended.tolist() == [False, False]


def test_value_mask_reaches_one_token_further_by_trl_rule():
    ids, mask = left_pad([[5]] * 2, torch.device("cpu"))
    generation = Generation(
        torch.tensor([[9, 0, 0], [7, 8, 7]]), torch.tensor([1, 3]), torch.zeros(2, 3)
    )
    ours = marked(generation, ids, mask)
    assert ours.value_mask.tolist() == ours.response_mask.tolist()
    theirs = marked(generation, ids, mask, reward_position="after_eos")
    assert theirs.value_mask.sum(1).tolist() == [2, 3]


def test_scores_are_clipped_and_penalised():
    ids, mask = left_pad([[5]] * 2, torch.device("cpu"))
    generation = Generation(torch.tensor([[9, 0], [7, 8]]), torch.tensor([1, 2]), torch.zeros(2, 2))
    answers = marked(generation, ids, mask)
    scores = torch.tensor([9.0, -9.0])

    def shaped(**options):
        args = setup.PPOConfig(output_dir="unused", **{**setup.SMALL, **options})
        return shape_scores(scores, answers, args).tolist()

    assert shaped() == [9.0, -9.0]
    assert shaped(score_clip=5.0) == [5.0, -5.0]
    assert shaped(missing_eos_penalty=1.0) == [9.0, -10.0]
    short = {"response_length": 2, "overlong_buffer": 1, "overlong_penalty": 3.0}
    assert shaped(**short) == [9.0, -12.0]


def test_prompts_come_from_ids_text_or_messages():
    encoder = PromptEncoder(TOKENIZER, room=4, limit=10)
    text = encoder.ids({"prompt": "abc"})
    assert encoder.ids({"input_ids": text}) == text == TOKENIZER("abc")["input_ids"]
    assert encoder.ids({"prompt": [{"role": "user", "content": "abc"}]}) == text
    with pytest.raises(ValueError, match="row 5.*columns.*expected `prompt`"):
        encoder.ids({"question": "abc"}, 5)
    with pytest.raises(ValueError, match="row 7.*7 tokens, expected at most 6"):
        encoder.ids({"prompt": "abcdefg"}, 7)
    with pytest.raises(ValueError, match="row 1.*without tokens"):
        encoder.ids({"prompt": ""}, 1)


def test_demonstrations_train_on_the_completion_and_its_end_token_alone():
    encoder = PromptEncoder(TOKENIZER, room=4, limit=None)
    rows = [
        {"prompt": "ab", "completion": "c"},
        {"prompt": [{"role": "user", "content": "ab"}], "completion": "c"},
        {
            "messages": [
                {"role": "user", "content": "ab"},
                {"role": "assistant", "content": "c"},
            ]
        },
    ]
    encoded = [encoder.encode_demonstration(row, i) for i, row in enumerate(rows)]
    assert encoded[0] == encoded[1] == encoded[2]
    batch = demonstration_batch([encoded[0], ([5, 6, 7, 2], 1)], 10, "cpu")
    end = TOKENIZER.eos_token_id
    assert batch["targets"].tolist() == [TOKENIZER.convert_tokens_to_ids("c"), end, 6, 7, end]
    assert batch["predict_at"].int().tolist() == [[0, 1, 1, 0], [1, 1, 1, 0]]
    assert len(demonstration_batch([encoded[0]], 3, "cpu")["targets"]) == 1


def schedule(**changes) -> Schedule:
    values = {
        "rollout_rows": 8,
        "micro_rows": 2,
        "micro_batches": 2,
        "minibatches": 2,
        "ppo_epochs": 3,
        "world_size": 2,
        "dataset_rows": 40,
        "rollouts": 5,
        "seed": 0,
        "shuffle": True,
    }
    return Schedule(**{**values, **changes})


def test_schedule_visits_every_prompt_once_per_pass():
    plan = schedule()
    assert plan.rollouts_per_pass == 2
    rows = [r for u in range(2) for rank in range(2) for r in plan.prompt_rows(u, rank)]
    assert len(set(rows)) == 32
    again = [r for u in range(2, 4) for rank in range(2) for r in plan.prompt_rows(u, rank)]
    assert len(set(again)) == 32 and again != rows
    assert schedule(shuffle=False).prompt_rows(1, 1) == list(range(24, 32))


def test_schedule_positions_follow_each_other():
    plan = schedule()
    seen = [plan.at(step) for step in range(plan.micro_batches_per_rollout + 1)]
    assert len(set(seen)) == len(seen) == 13
    assert [p.starts_rollout for p in seen] == [True, *[False] * 11, True]
    assert sum(p.starts_minibatch for p in seen[:-1]) == plan.updates_per_rollout


def test_schedule_seeds_differ_between_rollouts_processes_and_runs():
    plans = [schedule(), schedule(seed=1)]
    seeds = {plan.rollout_seed(u, r) for plan in plans for u in range(5) for r in range(2)}
    assert len(seeds) == 20


def test_schedule_deals_demonstrations_evenly():
    plan = schedule()
    dealt = [
        row
        for step in range(5)
        for rank in range(2)
        for row in plan.demonstration_rows(step, rank, rows=3, size=10)
    ]
    assert sorted(dealt) == sorted(list(range(10)) * 3)
