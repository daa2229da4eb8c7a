"""Every kind of tokenizer through SFT, reward model, PPO and evaluation, on one rendering.

python -m pytest tests/test_tokenizer_stages.py
"""

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from codexhf import prompts
from codexhf.data import load_demonstrations, load_pairs
from codexhf.evaluation import answer_logprobs
from codexhf.generation import sample_ids
from codexhf.models import load_policy
from codexhf.ppo import PPOConfig, PPOTrainer
from codexhf.reward_model import ModelReward, load_reward_model
from codexhf.tokenizer import load_tokenizer
from tokenizer_kinds import every_kind

KINDS = every_kind()
ASKED = [f"Write a function that adds {n}.\n" for n in ("one", "two", "three", "four")]
ANSWER = "def add(a, b):\n    return a + b"
COMMON = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
          "save_strategy": "no", "logging_steps": 1}  # fmt: skip


@pytest.fixture(params=list(KINDS))
def folder(request, tmp_path):
    """A tiny model with 8 more embeddings than its tokenizer, of each kind, has tokens."""
    tokenizer = KINDS[request.param]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 8, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    return tmp_path


def test_a_tokenizer_goes_through_every_stage(folder, write_card):
    path = str(folder / "m")
    tokenizer = load_tokenizer(path)
    rows = [{"prompt": prompt, "completion": ANSWER} for prompt in ASKED]
    pairs = [{"prompt": prompt, "chosen": ANSWER, "rejected": "no"} for prompt in ASKED]
    asked = [prompts.in_form(prompt, tokenizer) for prompt in ASKED]
    whole = [prompts.answered_ids(prompt, ANSWER, tokenizer) for prompt in asked]

    # SFT learns the completion and its end, behind the context of sampling
    data = load_demonstrations([write_card(rows, "prompt-completion", "demos")], tokenizer, 200)
    for row, (ids, start) in zip(data.ids, whole, strict=True):
        assert row["input_ids"] == ids
        assert row["labels"] == [-100] * start + ids[start:]
    sft = SFTTrainer(
        model=load_policy(path, tokenizer),
        args=SFTConfig(output_dir=str(folder / "sft"), max_steps=1, max_length=None, **COMMON),
        train_dataset=data.ids,
        processing_class=tokenizer,
    )
    assert sft.train_dataset[0]["input_ids"] == whole[0][0]
    sft.train()

    # the reward model reads the same ids, and training, text and PPO read one score
    reader = load_reward_model(path, tokenizer, new_head=True)
    pairs = load_pairs([write_card(pairs, "preference", "pairs")], tokenizer, 200)
    assert pairs.ids[0]["chosen_ids"] == whole[0][0]
    rm = RewardTrainer(
        model=reader,
        args=RewardConfig(output_dir=str(folder / "rm"), max_steps=1, max_length=200, **COMMON),
        train_dataset=pairs.ids,
        processing_class=tokenizer,
    )
    rm.train()
    score = ModelReward(rm.model.eval(), tokenizer)([asked[0]], [ANSWER])[0]
    with torch.no_grad():
        own = rm.model(
            input_ids=torch.tensor([whole[0][0]]),
            attention_mask=torch.ones(1, len(whole[0][0]), dtype=torch.long),
        ).logits.item()
    assert score == pytest.approx(own, abs=1e-5)

    # PPO samples behind the same context, with a ratio of 1 before the first step
    tokenizer.padding_side = "left"
    ppo = PPOTrainer(
        args=PPOConfig(
            output_dir=str(folder / "ppo"), response_length=6, total_episodes=4, stop_token="eos",
            per_device_train_batch_size=2, gradient_accumulation_steps=2, num_ppo_epochs=1,
            temperature=1.0, **COMMON,
        ),
        processing_class=tokenizer,
        model=load_policy(path, tokenizer),
        ref_model=None,
        reward_model=rm.model,
        train_dataset=Dataset.from_dict({"prompt": asked}),
    )  # fmt: skip
    assert ppo.encoder.ids({"prompt": asked[0]}) == whole[0][0][: whole[0][1]]
    ppo.train()
    logged = next(entry for entry in ppo.state.log_history if "val/ratio" in entry)
    assert logged["val/ratio"] == pytest.approx(1, abs=1e-5)

    # evaluation scores what SFT learned, and samples tokens alone
    model = load_policy(path, tokenizer)
    _, counts = answer_logprobs(model, tokenizer, asked, [ANSWER] * len(asked))
    assert counts.tolist() == [len(ids) - start for ids, start in whole]
    sampled = sample_ids(model, tokenizer, asked, n=2, max_new_tokens=6)
    assert max(token for group in sampled for row in group for token in row) < len(tokenizer)
