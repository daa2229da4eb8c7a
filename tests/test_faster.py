"""Models that skip padding or are compiled say what they said before, and train to the same.

python -m pytest tests/test_faster.py
"""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from codexhf import faster
from codexhf.arguments import PretrainArguments, RewardModelArguments, SFTArguments
from codexhf.models import compile_layers, position_ids
from codexhf.run import run_stage
from codexhf.tokens import packed_collator
from ppo_setup import new_trainer, tokenizer

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {"initializer_range": 0.2, "use_cache": False}  # so that attention matters
MASK = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [0] * 3 + [1] * 6])
QUIET = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
QUIET |= {"max_steps": 3, "learning_rate": 1e-2, "bf16": False, "logging_steps": 1}


def qwen2(kind=Qwen2ForCausalLM, **more):
    torch.manual_seed(0)
    config = Qwen2Config(
        **SIZES, intermediate_size=48, num_key_value_heads=2, **WIDE, pad_token_id=0, **more
    )
    return kind(config).eval()


FAMILIES = {
    "qwen2": qwen2,
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, **WIDE)
    ).eval(),
    "gpt_neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**SIZES, intermediate_size=48, **WIDE)
    ).eval(),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_real_tokens_get_the_logits_and_gradients_they_had(family):
    model, ids, real = FAMILIES[family](), torch.randint(0, 50, MASK.shape), MASK.bool()
    given = {"input_ids": ids, "attention_mask": MASK, "position_ids": position_ids(MASK)}
    labels = ids.masked_fill(position_ids(MASK) == 0, -100)
    labels = labels.masked_fill(~real, -100)
    found = []
    for _ in range(2):
        model.zero_grad()
        out = model(**given, labels=labels)
        out.loss.backward()
        found.append((out.logits.detach(), [p.grad.clone() for p in model.parameters()]))
        if len(found) == 1:
            faster.skip_padding(model)
    (before, gradients), (after, others) = found
    torch.testing.assert_close(after[real], before[real], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after[~real], before[~real])  # nothing was computed there
    for old, new in zip(gradients, others, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-6)


def test_packed_documents_see_themselves_alone():
    model, ids = qwen2(), torch.randint(0, 50, (2, 8))
    starts = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7]])
    before = model(input_ids=ids, position_ids=starts).logits
    plain = model(input_ids=ids).logits
    faster.skip_padding(model)
    after = model(input_ids=ids, position_ids=starts).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after[0], plain[0])
    assert torch.equal(model(input_ids=ids).logits, plain)  # neither mask nor positions: untouched


def test_every_row_begins_a_document_whatever_its_positions():
    counted = torch.arange(9).expand(3, 9)
    at, positions, bounds = faster._documents(MASK, counted)
    assert bounds.tolist() == [0, 9, 14, 20] and positions.tolist() == (counted[MASK > 0]).tolist()
    assert faster._documents(None, counted + 1)[2].tolist() == [0, 9, 18, 27]


def test_a_cache_is_left_alone():
    model, ids = qwen2(), torch.randint(0, 50, (2, 6))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": True}
    before = model(**given)
    faster.skip_padding(model)
    after = model(**given)
    assert torch.equal(after.logits, before.logits)
    assert after.past_key_values.get_seq_length() == 6


def test_windows_and_other_attention_are_refused():
    window = MistralForCausalLM(
        MistralConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, sliding_window=4)
    )
    for model, said in ((window, "sliding_window"), (qwen2(attn_implementation="eager"), "eager")):
        with pytest.raises(ValueError, match=f"padding_free: got a model with .*{said}"):
            faster.skip_padding(model)


def test_a_family_that_reads_its_mask_itself_is_found_out():
    config = NemotronConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, **WIDE)
    model = NemotronForCausalLM(config)
    with pytest.raises(ValueError, match="got a model with layers that need their padding"):
        faster.skip_padding(model)


def test_layers_that_mix_the_rows_of_a_batch_are_found_out():
    model = qwen2()

    def mix(layer, inputs, output):  # a convolution over time, as state-space layers have one
        return output + 0.3 * output.roll(1, 1)

    assert faster.obstacle(model) is None
    model.model.layers[0].mlp.register_forward_hook(mix)
    assert faster.obstacle(model) == "layers that see other rows of a batch"
    assert faster.obstacle(qwen2().to(torch.bfloat16)) is None
    assert faster.obstacle(model.to(torch.bfloat16)) == "layers that see other rows of a batch"
    broken = qwen2()
    broken.model.norm.weight.data.fill_(float("nan"))
    assert faster.obstacle(broken) is None  # which is told in training, by its name


def test_unsaid_padding_is_skipped_on_a_gpu_in_16_bits(monkeypatch):
    def skips(asked=None, device="cuda", bf16=True, model=None):
        args = SimpleNamespace(device=torch.device(device), bf16=bf16, fp16=False)
        return faster.skips_padding(asked, args, model or qwen2())

    assert not skips()  # the model is not there
    monkeypatch.setattr(Qwen2ForCausalLM, "device", torch.device("cuda"))
    assert skips() and skips(bf16=False, model=qwen2().to(torch.bfloat16))
    assert not skips(device="cpu") and not skips(bf16=False) and not skips(False)
    assert not skips(model=qwen2(attn_implementation="eager"))
    assert skips(True, device="cpu")


def test_bounds_come_with_a_batch_of_documents_and_are_taken():
    starts = [[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]]
    rows = [
        {"input_ids": torch.randint(3, 50, (6,)).tolist()} | {"position_ids": s} for s in starts
    ]
    batch = faster.WithBounds(packed_collator)([row | {"labels": row["input_ids"]} for row in rows])
    assert batch["document_bounds"].tolist() == [0, 3, 5, 6, 8, 12]
    padded = {"position_ids": torch.tensor(starts), "attention_mask": torch.ones(2, 6)}
    assert "document_bounds" not in faster.WithBounds(lambda rows: dict(padded))([])
    model = qwen2()
    faster.skip_padding(model)
    bounds = batch.pop("document_bounds")
    counted = model(**batch).loss
    assert torch.equal(model(**batch, document_bounds=bounds).loss, counted)
    others = torch.tensor([0, 6, 12], dtype=torch.int32)  # what is given is not counted again
    assert not torch.equal(model(**batch, document_bounds=others).loss, counted)
    with_cache = {**batch, "use_cache": True, "document_bounds": bounds}
    assert torch.isfinite(model(**with_cache).loss)  # read as it was, without bounds


@pytest.mark.parametrize("stage", ("pretrain", "sft"))
def test_a_step_on_a_gpu_waits_for_no_batch(stage, tmp_path):
    make, asked = STAGES[stage]
    own = {"padding_free": True} if stage == "sft" else {}
    trainer = make(tmp_path, **own)
    trainer.args.dataloader_pin_memory = True
    trainer.train_dataset = Dataset.from_list(list(trainer.train_dataset))
    faster.speed_up(trainer, asked)
    loader = trainer.get_train_dataloader()
    assert loader._non_blocking
    assert "document_bounds" in next(iter(loader))


def test_a_compiled_layer_is_given_no_epsilon():
    # as an input it would be converted on the CPU in every call
    model, given = qwen2(), []
    compile_layers(model)
    norm = model.model.layers[0].input_layernorm

    def backend(graph, inputs):
        given.extend(inputs)
        return graph.forward

    torch.compile(norm, dynamic=True, backend=backend)(torch.rand(2, 3, 32))
    assert given and all(torch.is_tensor(x) and x.dim() or type(x) is torch.SymInt for x in given)


def packed_trainer(folder, **chosen):
    rows, starts = torch.randint(3, 50, (12, 16)).tolist(), [0, 1, 2, 3, 4, *range(11)]
    rows = [{"input_ids": row, "labels": row, "position_ids": starts} for row in rows]
    args = TrainingArguments(str(folder), **QUIET, per_device_train_batch_size=4, **chosen)
    return Trainer(qwen2(), args, train_dataset=rows, data_collator=packed_collator)


def uneven(names):
    rows = [torch.randint(3, 50, (n,)).tolist() for n in (3, 9, 4, 12, 7, 5, 8, 6)]
    return Dataset.from_list([dict.fromkeys(names, row) for row in rows])


def sft_trainer(folder, **chosen):
    args = SFTConfig(str(folder), **QUIET, per_device_train_batch_size=4, max_length=16, **chosen)
    return SFTTrainer(
        qwen2(),
        faster.cut_already(args),
        train_dataset=uneven(["input_ids", "labels"]),
        processing_class=tokenizer(),
    )


def reward_trainer(folder, **chosen):
    args = RewardConfig(str(folder), **QUIET, per_device_train_batch_size=4, **chosen)
    rows = uneven(["chosen_ids", "rejected_ids"])
    rows = rows.map(lambda row: {"rejected_ids": row["chosen_ids"][:-1]})
    model = qwen2(Qwen2ForSequenceClassification, num_labels=1)
    return RewardTrainer(model, args, train_dataset=rows, processing_class=tokenizer())


STAGES = {
    "pretrain": (packed_trainer, PretrainArguments(padding_free=True)),
    "sft": (sft_trainer, SFTArguments()),
    "reward_model": (reward_trainer, RewardModelArguments(padding_free=True)),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_without_padding_has_the_losses_it_had(stage, tmp_path, monkeypatch):
    make, asked = STAGES[stage]
    found, seen = [], []

    def watched(*args, document_bounds=None, **given):
        seen.append(document_bounds)
        return faster.attend(*args, document_bounds=document_bounds, **given)

    monkeypatch.setitem(faster.ALL_ATTENTION_FUNCTIONS, "sdpa", watched)
    for skips in (False, True):
        torch.manual_seed(1)
        own = {"padding_free": True} if skips and stage == "sft" else {}
        trainer = make(tmp_path / str(skips), **own)
        if skips:
            faster.speed_up(trainer, asked)
            seen.clear()  # it tries the model
        trainer.train()
        assert all((bounds is not None) == skips for bounds in seen) and seen
        seen.clear()
        found.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert len(found[0]) == 3 and found[0][0] != found[0][2]
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_sft_takes_trls_batches_of_one_row_where_it_skips_padding_by_itself(tmp_path, monkeypatch):
    widths, found = [], []
    for skips in (False, True):
        torch.manual_seed(1)
        trainer = sft_trainer(tmp_path / str(skips))
        trainer.args.padding_free = None  # what parse() leaves open on a GPU
        monkeypatch.setattr(faster, "skips_padding", lambda *given, skips=skips: skips)
        faster.speed_up(trainer, SFTArguments())
        batch = next(iter(trainer.get_train_dataloader()))
        widths.append(batch["input_ids"].shape[0])
        trainer.train()
        found.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert widths == [4, 1]
    assert found[1] == pytest.approx(found[0], rel=1e-4) and len(found[0]) == 3


def test_pretraining_returns_its_loss_alone_and_logits_to_whoever_else_asks(tmp_path):
    found, returned = [], []
    for compiled in (False, True):
        torch.manual_seed(1)
        trainer = packed_trainer(tmp_path / str(compiled), torch_compile=compiled)
        faster.speed_up(trainer, None)
        trainer.model.register_forward_hook(lambda model, args, out: returned.append(out.logits))
        with torch.compiler.set_stance("force_eager"):
            trainer.train()
        found.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        assert len(returned) == 3 and all((logits is None) == compiled for logits in returned)
        returned.clear()
    assert found[0] == pytest.approx(found[1], rel=1e-6) and len(found[0]) == 3
    model, ids = trainer.model, torch.randint(3, 50, (2, 6))
    with torch.no_grad():
        assert model(input_ids=ids).logits.shape == (2, 6, 50)  # in training too, without labels
        assert model.eval()(input_ids=ids, labels=ids).logits.shape == (2, 6, 50)


def test_a_loss_of_its_own_sees_the_logits(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.pow(2).mean()

    trainer = packed_trainer(tmp_path, torch_compile=True)
    trainer.compute_loss_func = loss
    faster.speed_up(trainer, None)
    with torch.compiler.set_stance("force_eager"):
        assert trainer.train().training_loss > 0
    assert not faster.wants_loss_alone(sft_trainer(tmp_path))


@pytest.mark.parametrize("stage", STAGES)
def test_torch_compile_compiles_layers_and_no_model(stage, tmp_path):
    trainer = STAGES[stage][0](tmp_path, torch_compile=True)
    faster.speed_up(trainer, None)
    assert [module._compiled_call_impl is not None for module in trainer.model.model.layers] == [
        True,
        True,
    ]
    with torch.compiler.set_stance("force_eager"):
        trainer.train()
    assert type(trainer.model_wrapped) is type(trainer.model)


def test_a_stage_refuses_before_it_begins(tmp_path):
    trainer = packed_trainer(tmp_path / "m0")
    trainer.model.config._attn_implementation = "eager"
    stage = PretrainArguments(padding_free=True, dry_run=True)
    with pytest.raises(ValueError, match="padding_free: got a model with attention by 'eager'"):
        run_stage(trainer, stage, trainer.args, data={}, parents={})


def test_ppo_trains_to_the_same_weights(tmp_path):
    terms = {"kl_in": "loss", "kl_estimator": "k3", "entropy_coef": 0.01, "total_episodes": 16}
    trained = []
    for skips in (False, True):
        config = {**terms, "padding_free": skips}
        trainer = new_trainer(tmp_path / str(skips), config=config)
        trainer.train()
        trained.append(trainer.model.state_dict())
        assert ("forward" in vars(trainer.value_model.base_model)) == skips
    for name, weight in trained[0].items():
        torch.testing.assert_close(trained[1][name], weight, rtol=0, atol=2e-5)
