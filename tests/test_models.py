"""Tokenizer, policy and reward model: new, loaded, refused.

python -m pytest tests/test_models.py
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from codexhf import models, reward_model
from conftest import CORPUS

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
    ids = [tokenizer.convert_tokens_to_ids(t) for t in (models.PAD, models.END, models.USER)]
    assert tokenizer.pad_token_id == ids[0] != ids[1] == tokenizer.eos_token_id
    assert len(set(ids)) == 3


def test_new_tokenizer_spells_numbers_digit_by_digit(tokenizer):
    assert len(tokenizer("1212")["input_ids"]) == 4


def test_new_tokenizer_is_the_same_for_the_same_texts():
    one, two = (models.new_tokenizer(CORPUS, 300).backend_tokenizer.to_str() for _ in range(2))
    assert one == two


def test_chat_template_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = models.load_tokenizer(str(tmp_path))
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x = 1"}]
    text = loaded.apply_chat_template(messages, tokenize=False)
    assert text == "<|user|>hi<|assistant|>x = 1<|end|>"
    prompt = loaded.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)


def test_load_tokenizer_refuses_one_without_pad(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no pad_token"):
        models.load_tokenizer(str(tmp_path))


def test_new_policy_takes_its_vocabulary_from_the_tokenizer(tokenizer):
    model = models.new_policy(LLAMA, tokenizer, 64, seed=1)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.max_position_embeddings == 64
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_new_policy_is_the_same_for_the_same_seed(tokenizer):
    a, b, c = (models.new_policy(LLAMA, tokenizer, 64, seed=s) for s in (1, 1, 2))
    assert torch.equal(a.lm_head.weight, b.lm_head.weight)
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)


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
    big = models.new_tokenizer([f"word{i} {'abcdefgh'[i % 8] * i}" for i in range(60)], 400)
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
