"""Tiny models, prompts and trainers for the tests of `codexhf.ppo`."""

import sys
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from packaging.version import Version

sys.path.insert(0, str(Path(__file__).parent / "traces"))

import record  # noqa: E402

from codexhf import sharding  # noqa: E402
from codexhf.ppo import PPOConfig, PPOTrainer  # noqa: E402

HAS_CONTINUOUS_BATCHING = Version(transformers.__version__) >= Version("5.23")
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}"
)
SMALL = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "num_mini_batches": 2,
    "num_ppo_epochs": 2,
    "total_episodes": 24,
    "response_length": 8,
    "stop_token": "eos",
    "temperature": 1.0,
    "learning_rate": 1e-2,
    "report_to": "none",
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "num_sample_generations": 0,
}


def count_a(prompts, completions, **columns):
    """Reward every a."""
    return [float(text.count("a")) for text in completions]


def length(prompts, completions, **columns):
    """Reward the length; as the name of a metric."""
    return [float(len(text)) for text in completions]


def tokenizer():
    """Return the traces' tokenizer with a chat template."""
    made = record.make_tokenizer()
    made.chat_template = TEMPLATE
    return made


def prompts(rows: int = 20) -> Dataset:
    """Return text prompts of uneven length, each with a column of its own."""
    texts = ["abcdefgh"[: 2 + i % 6] for i in range(rows)]
    return Dataset.from_list([{"prompt": text, "wanted": text[-1]} for text in texts])


def demonstrations(rows: int = 7) -> Dataset:
    """Return demonstrations of uneven length."""
    return Dataset.from_list(
        [{"prompt": "ab" * (1 + i % 3), "completion": "cba"[: 1 + i % 3]} for i in range(rows)]
    )


def new_trainer(folder, *, models=None, config=None, **kwargs) -> PPOTrainer:
    """Return a trainer on tiny models; `config` overrides SMALL, `kwargs` the other arguments."""
    made = record.make_models(tokenizer()) if models is None else models
    given = {
        "model": made["model"],
        "ref_model": None,
        "reward_model": None,
        "train_dataset": prompts(),
        "reward_funcs": [count_a],
        **kwargs,
    }
    args = PPOConfig(output_dir=str(folder), **{**SMALL, **(config or {})})
    return PPOTrainer(args, tokenizer(), **given)


def state(trainer) -> dict[str, torch.Tensor]:
    """Return copies of all weights, policy and critic."""
    if any(hasattr(p, "ds_id") for p in trainer.model.parameters()):
        return sharding.whole_state(trainer.model, True)
    return {name: whole(tensor) for name, tensor in trainer.model.state_dict().items()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy, of a sharded tensor all of it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def same(a: dict, b: dict) -> bool:
    """Return whether two sets of weights are equal, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logs(trainer) -> list[dict]:
    """Return the training logs."""
    return [log for log in trainer.state.log_history if "loss" in log]
