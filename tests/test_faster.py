"""Models that skip padding say of real tokens what they said before, and PPO trains to the same."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerState,
    TrainingArguments,
)

from codexhf import faster
from codexhf.models import compiled_layers, position_ids
from ppo_setup import new_trainer

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {"initializer_range": 0.2}  # so that attention matters
MASK = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [0] * 3 + [1] * 6])


def qwen2(**more):
    config = Qwen2Config(**SIZES, intermediate_size=48, num_key_value_heads=2, **WIDE, **more)
    return Qwen2ForCausalLM(config).eval()


FAMILIES = {
    "qwen2": qwen2,
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, **WIDE)
    ).eval(),
    "gpt_neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**SIZES, intermediate_size=48, **WIDE)
    ).eval(),
}


def changed(model):
    """What skip_padding does on a GPU; on a CPU attention goes document by document."""
    assert faster._may_skip(model)
    faster._wrap(model)
    assert faster._computes_the_same(model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_real_tokens_get_the_logits_they_had(family):
    torch.manual_seed(0)
    model, ids, real = FAMILIES[family](), torch.randint(0, 50, MASK.shape), MASK.bool()
    given = {"input_ids": ids, "attention_mask": MASK, "position_ids": position_ids(MASK)}
    before = model(**given, use_cache=False).logits
    changed(model)
    after = model(**given, use_cache=False).logits
    torch.testing.assert_close(after[real], before[real], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after[~real], before[~real])  # nothing was computed there


def test_packed_documents_see_themselves_alone():
    torch.manual_seed(0)
    model, ids = qwen2(), torch.randint(0, 50, (2, 8))
    starts = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7]])
    before = model(input_ids=ids, position_ids=starts, use_cache=False).logits
    plain = model(input_ids=ids, use_cache=False).logits
    changed(model)
    after = model(input_ids=ids, position_ids=starts, use_cache=False).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after[0], plain[0])
    again = model(input_ids=ids, use_cache=False).logits  # neither mask nor positions: untouched
    assert torch.equal(again, plain)


def test_gradients_are_those_of_padded_rows():
    torch.manual_seed(0)
    model, ids = qwen2(), torch.randint(0, 50, MASK.shape)
    first = position_ids(MASK) == 0  # nothing is predicted from padding
    labels = ids.masked_fill((MASK == 0) | first, -100)
    given = {"input_ids": ids, "attention_mask": MASK, "position_ids": position_ids(MASK)}
    found = []
    for _ in range(2):
        model.zero_grad()
        model(**given, labels=labels, use_cache=False).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
        if len(found) == 1:
            changed(model)
    for before, after in zip(*found, strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)


def test_a_cache_is_left_alone():
    model, ids = qwen2(), torch.randint(0, 50, (2, 6))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    before = model(**given, use_cache=True)
    changed(model)
    after = model(**given, use_cache=True)
    assert torch.equal(after.logits, before.logits)
    assert after.past_key_values.get_seq_length() == 6


def test_windows_and_other_attention_are_refused():
    window = MistralForCausalLM(
        MistralConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, sliding_window=4)
    )
    assert not faster._may_skip(window)
    assert not faster._may_skip(qwen2(attn_implementation="eager"))
    once = changed(qwen2())
    assert not faster._may_skip(once)  # nor is it changed twice


def test_a_model_that_computes_something_else_is_left_alone(monkeypatch):
    model = qwen2()
    layer = model.model.layers[0].self_attn

    def deaf(*args, cu_seq_lens_q=None, attention=layer.forward, **kwargs):
        if cu_seq_lens_q is not None:  # would look beyond a document
            cu_seq_lens_q = torch.tensor([0, cu_seq_lens_q[-1]], dtype=torch.int32)
            kwargs["cu_seq_lens_q"] = cu_seq_lens_q
        return attention(*args, **kwargs)

    monkeypatch.setattr(layer, "forward", deaf)
    faster._wrap(model)
    assert not faster._computes_the_same(model)


def test_ppo_trains_to_the_same_weights(tmp_path):
    terms = {"kl_in": "loss", "kl_estimator": "k3", "entropy_coef": 0.01, "total_episodes": 16}
    trained = []
    for skips in (False, True):
        trainer = new_trainer(tmp_path / str(skips), config=terms)
        if skips:
            for model in (trainer.policy_model, trainer.value_model, trainer.ref_model):
                changed(model)
        trainer.train()
        trained.append(trainer.model.state_dict())
    for name, weight in trained[0].items():
        torch.testing.assert_close(trained[1][name], weight, rtol=0, atol=2e-5)


def test_long_runs_on_a_gpu_compile_unless_told_otherwise():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert faster.worth_compiling(None, 1000, gpu)
    assert not faster.worth_compiling(None, 999, gpu)
    assert not faster.worth_compiling(None, 10**6, cpu)
    assert faster.worth_compiling(True, 1, cpu) and not faster.worth_compiling(False, 10**6, gpu)


@pytest.mark.parametrize("asked", [None, True])
def test_a_trainer_gets_compiled_layers_and_its_loss_alone(asked, tmp_path):
    model = qwen2()
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    faster.Faster(asked, loss_alone=True).on_train_begin(
        args, TrainerState(max_steps=5000), None, model=model
    )
    assert len(compiled_layers(model)) == (2 if asked else 0)
    assert not faster.skips_padding(model)  # on a CPU nothing is faster for it
    ids = torch.randint(0, 50, (2, 6))
    with torch.compiler.set_stance("force_eager"):
        found = model.train()(input_ids=ids, labels=ids)
        assert (found.logits is None) == bool(asked) and found.loss > 0
        assert model.eval()(input_ids=ids, labels=ids).logits is not None
