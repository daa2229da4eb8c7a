"""Tokenizer, policy and reward model: new, loaded, refused.

python -m pytest tests/test_models.py
"""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainingArguments

import model_kinds
from codexhf import models, prompts, reward_model
from codexhf import tokenizer as tok
from codexhf.models import to_device
from conftest import CORPUS, tiny_config
from tokenizer_kinds import every_kind

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def test_new_tokenizer_gives_back_every_text(tokenizer):
    for text in ("def f(x):\n\treturn 'ä€𝄞' * 12\r\n", "  two  spaces ", "\x00\x7f"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_new_tokenizer_has_distinct_special_tokens(tokenizer):
    ids = [tokenizer.convert_tokens_to_ids(t) for t in (tok.PAD, tok.END, tok.USER)]
    assert tokenizer.pad_token_id == ids[0] != ids[1] == tokenizer.eos_token_id
    assert len(set(ids)) == 3


def test_new_tokenizer_spells_numbers_digit_by_digit(tokenizer):
    assert len(tokenizer("1212")["input_ids"]) == 4


def test_new_tokenizer_is_the_same_for_the_same_texts():
    one, two = (tok.new_tokenizer(CORPUS, 300).backend_tokenizer.to_str() for _ in range(2))
    assert one == two


def test_chat_template_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = tok.load_tokenizer(str(tmp_path))
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x = 1"}]
    text = loaded.apply_chat_template(messages, tokenize=False)
    assert text == "<|user|>hi<|assistant|>x = 1<|end|>"
    prompt = loaded.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)


@pytest.mark.parametrize("missing", ["pad_token", "eos_token"])
def test_load_tokenizer_finds_a_pad_token_and_asks_for_an_end(tokenizer, tmp_path, missing, capsys):
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop(missing)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if missing == "eos_token":
        with pytest.raises(ValueError, match="has no eos_token"):
            tok.load_tokenizer(str(tmp_path))
        return
    assert tok.load_tokenizer(str(tmp_path)).pad_token == "<|pad|>"  # special, and nobody's
    assert "no pad token; '<|pad|>' pads" in capsys.readouterr().out


def test_new_policy_takes_its_vocabulary_from_the_tokenizer(tokenizer):
    model = models.new_policy(LLAMA, tokenizer, 64, seed=1)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.max_position_embeddings == 64
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_new_policy_is_the_same_for_the_same_seed(tokenizer):
    a, b, c = (models.new_policy(LLAMA, tokenizer, 64, seed=s) for s in (1, 1, 2))
    assert torch.equal(a.lm_head.weight, b.lm_head.weight)
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)


def test_new_policy_lies_in_memory_as_asked(tokenizer):
    plain = models.new_policy(LLAMA, tokenizer, 64, seed=1)
    same = models.new_policy(LLAMA, tokenizer, 64, seed=1, dtype=torch.float32)
    assert torch.equal(plain.lm_head.weight, same.lm_head.weight)
    asked = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    other = models.new_policy(LLAMA, tokenizer, 64, seed=1, **asked)
    assert other.dtype == torch.bfloat16 and other.config._attn_implementation == "eager"


def test_new_policy_refuses_unknown_fields(tokenizer):
    with pytest.raises(ValueError, match="Did you mean 'hidden_size'"):
        models.new_policy({**LLAMA, "hiden_size": 8}, tokenizer, 64, seed=1)


def test_load_policy_refuses_nan(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    model.save_pretrained(model_folder)
    with pytest.raises(ValueError, match="lm_head.weight holds NaN"):
        models.load_policy(str(model_folder))


def test_load_policy_refuses_a_foreign_tokenizer(model_folder):
    big = tok.new_tokenizer([f"word{i} {'abcdefgh'[i % 8] * i}" for i in range(60)], 400)
    with pytest.raises(ValueError, match="Use the tokenizer that the model was trained with"):
        models.load_policy(str(model_folder), big)


def test_load_reward_model_refuses_a_missing_head(model_folder):
    with pytest.raises(ValueError, match="score.weight are missing, so this is not a trained"):
        reward_model.load_reward_model(str(model_folder))


def test_a_new_head_is_the_same_for_the_same_seed_and_loads_again(model_folder, tmp_path):
    one, two = (
        reward_model.load_reward_model(str(model_folder), new_head=True, seed=s).score.weight
        for s in (3, 3)
    )
    assert torch.equal(one, two) and one.std() < 0.5
    model = reward_model.load_reward_model(str(model_folder), new_head=True, seed=3)
    model.save_pretrained(tmp_path / "rm")
    assert torch.equal(reward_model.load_reward_model(str(tmp_path / "rm")).score.weight, one)


def test_load_model_reward_refuses_unknown_scale(model_folder, tokenizer, tmp_path):
    model = reward_model.load_reward_model(str(model_folder), new_head=True)
    model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    with pytest.raises(ValueError, match="has no score_mean"):
        reward_model.load_model_reward(str(tmp_path / "rm"))


def test_context_checks(model_folder):
    path = str(model_folder)
    assert models.within_context(path, 128) == 128
    assert models.room_for(path, 28) == 100
    with pytest.raises(ValueError, match="was built for 128"):
        models.within_context(path, 129)
    with pytest.raises(ValueError, match="leave no room"):
        models.room_for(path, 128)


@pytest.mark.parametrize("name", ["no pad", "pad is eos", "chatml", "sentencepiece chat"])
def test_training_classifier_reward_and_ppo_read_one_score(name, tmp_path):
    """The class's own forward, which RewardTrainer trains, the text reward and the id reward."""
    tokenizer = every_kind()[name]
    if name == "chatml":
        tokenizer.pad_token = tokenizer.eos_token = "<|im_end|>"
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(tokenizer, vocab_size=len(tokenizer))).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tokenizer = tok.load_tokenizer(str(tmp_path))
    model = reward_model.load_reward_model(str(tmp_path), tokenizer, new_head=True).eval()
    prompt, answer = prompts.in_form("Add two numbers.", tokenizer), "return a + b"
    ids, _ = prompts.answered_ids(prompt, answer, tokenizer)
    batch = tokenizer.pad({"input_ids": [ids, ids[:-3]]}, return_tensors="pt")
    trained = model(**batch).logits[0, 0].item()
    text = reward_model.ModelReward(model, tokenizer)([prompt], [answer])[0]
    reader = reward_model.IdReward(model, "r", normalize=False)
    row = torch.tensor([ids])
    layout = SimpleNamespace(input_ids=row, attention_mask=None, last=torch.tensor([len(ids) - 1]))
    reader.read(1, [(torch.tensor([0]), layout)])
    assert trained == pytest.approx(text, abs=1e-6) == reader.scores[0]


@pytest.mark.parametrize("family", ["granite", "olmoe", "mamba", "cohere2", "recurrent_gemma"])
def test_families_without_a_classifier_get_one_that_saves_and_loads(family, tokenizer, tmp_path):
    torch.manual_seed(0)
    config = model_kinds.tiny_config(family, tokenizer)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    made = reward_model.load_reward_model(str(tmp_path / "m"), new_head=True).eval()
    made.save_pretrained(tmp_path / "r")
    again = reward_model.load_reward_model(str(tmp_path / "r")).eval()
    ids = torch.tensor([[5, 6, 7, 1], [5, 6, 1, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    with torch.no_grad():
        scores = made(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(scores, again(input_ids=ids, attention_mask=mask).logits)
        assert scores[1] == pytest.approx(made(input_ids=ids[1:, :3]).logits[0].tolist(), abs=1e-5)


def test_models_go_where_the_process_computes(policy, tmp_path, monkeypatch):
    state = PartialState()
    monkeypatch.setitem(PartialState._shared_state, "device", torch.device("meta"))
    assert state.device.type == "meta"  # any device but the CPU: what a GPU is elsewhere
    moved = to_device(copy.deepcopy(policy).train())
    assert moved.device.type == "meta" and not moved.training
    assert TrainingArguments(output_dir=str(tmp_path), use_cpu=True).device.type == "cpu"
    assert to_device(policy).device.type == "cpu"
