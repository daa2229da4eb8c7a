"""Record what TRL 1.12's PPOTrainer does, step by step, for tests/test_ppo_parity.py.

    python tests/traces/record.py          # writes trl-1.12.safetensors next to this file
    python tests/traces/record.py --check  # runs TRL's class and ours side by side, writes nothing

Both commands need trl==1.12.*. The trainers get the same models, prompts in the same order, the
seed 1001 + u before rollout u samples and the permutations of RandomState(2001 + u). A trace holds
all parameters after the last optimizer step and, to stay small, two sums over every tensor, in
float64, after each step. Ours agree with them to 2e-7, which is rounding, and the test allows
1e-6: it finds a shift of 2e-6 of one parameter, but neither shifts of several parameters that
cancel in both sums nor which parameter it was. Every parameter after every step is what --check
compares. Adam's epsilon is 1e-5, so that rounding of the last digit is not blown up to the size of
a learning rate where gradients are almost zero.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

TRACE = Path(__file__).with_name("trl-1.12.safetensors")
LETTERS = "abcdefghijklmnopqrstuvwxyz "

BASE = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_mini_batches": 1,
    "num_ppo_epochs": 2,
    "total_episodes": 24,
    "response_length": 8,
    "stop_token": "eos",
    "temperature": 0.7,
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-5,
    "local_rollout_forward_batch_size": 4,
    "seed": 0,
}
CASES: dict[str, dict] = {
    "accumulation": {"num_ppo_epochs": 3},
    "minibatches": {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_mini_batches": 2,
    },
    "four_minibatches": {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_mini_batches": 4,
        "num_ppo_epochs": 1,
    },
    "k3": {"kl_estimator": "k3", "kl_coef": 0.2},
    "whitening": {"whiten_rewards": True, "gamma": 0.99, "lam": 0.9},
    "eos_penalty": {"missing_eos_penalty": 1.0},
    "everything": {
        "kl_estimator": "k3",
        "whiten_rewards": True,
        "missing_eos_penalty": 1.0,
        "gamma": 0.99,
        "lam": 0.9,
        "kl_coef": 0.2,
        "cliprange": 0.002,
        "cliprange_value": 0.002,
        "vf_coef": 0.5,
    },
    "no_stop_token": {"stop_token": None},
    "tied_embeddings": {"_model": {"tie_word_embeddings": True, "attention_bias": True}},
    "warmup": {"warmup_steps": 2, "lr_scheduler_type": "cosine", "weight_decay": 0.1},
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per letter, padding on the left."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "<pad>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
    )


def make_config(tokenizer: PreTrainedTokenizerFast, **kwargs) -> LlamaConfig:
    """Return the configuration of a model of about 3,000 parameters."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
        **kwargs,
    )


def make_models(tokenizer: PreTrainedTokenizerFast, **kwargs) -> dict:
    """Return policy, reference, critic and reward model with weights from a fixed stream."""
    config = make_config(tokenizer, **kwargs)
    scorer = make_config(tokenizer, num_labels=1, **kwargs)
    found = {
        "model": LlamaForCausalLM(config),
        "ref_model": LlamaForCausalLM(config),
        "value_model": LlamaForSequenceClassification(scorer),
        "reward_model": LlamaForSequenceClassification(scorer),
    }
    for number, name in enumerate(("model", "value_model", "reward_model")):
        # not the model's own initialisation: that may change with the version of a library
        stream = np.random.RandomState(number)
        for parameter in found[name].parameters():
            draws = stream.standard_normal(parameter.shape) * 0.2
            parameter.data = torch.tensor(draws, dtype=torch.float32)
    found["ref_model"].load_state_dict(found["model"].state_dict())
    return found


def make_prompts(tokenizer: PreTrainedTokenizerFast, rows: int = 64) -> Dataset:
    """Return prompts of three to nine letters as input_ids."""
    stream = np.random.RandomState(7)
    texts = ["".join(stream.choice(list(LETTERS), stream.randint(3, 10))) for _ in range(rows)]
    return Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in texts])


def settings(case: str, folder: str) -> dict:
    """Return the arguments that both trainers get for a case."""
    fixed = {
        "output_dir": folder,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "num_sample_generations": 0,
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
    }
    return {**fixed, **BASE, **{k: v for k, v in CASES[case].items() if k != "_model"}}


def permutation(rollout: int, ppo_epoch: int, rows: int) -> np.ndarray:
    """Return the permutation that both trainers use in a pass over a rollout."""
    stream = np.random.RandomState(2001 + rollout)
    for _ in range(ppo_epoch):
        stream.permutation(rows)
    return stream.permutation(rows)


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of all parameters, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def projections(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return two projections (T, 2) of every tensor, in the order of names, in float64."""
    rows = []
    for name in sorted(parameters):
        flat = parameters[name].double().flatten()
        signs = torch.arange(len(flat)).mul(2654435761).bitwise_and(1 << 12).eq(0).double() * 2 - 1
        rows.append([flat.sum().item(), (flat * signs).sum().item()])
    return torch.tensor(rows, dtype=torch.float64)


def run_trl(case: str) -> dict:
    """Train with TRL 1.12's class; return parameters after every step and its logs."""
    import trl.experimental.ppo.ppo_trainer as module
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = make_tokenizer()
    prompts = make_prompts(tokenizer)
    parts = make_models(tokenizer, **CASES[case].get("_model", {}))
    count = {"rollout": -1, "epoch": 0}
    generate, shuffle = module.batch_generation, np.random.permutation

    def seeded_generation(*args, **kwargs):
        count["rollout"], count["epoch"] = count["rollout"] + 1, 0
        torch.manual_seed(1001 + count["rollout"])
        return generate(*args, **kwargs)

    def seeded_permutation(rows):
        count["epoch"] += 1
        return permutation(count["rollout"], count["epoch"] - 1, rows)

    steps: list[dict[str, torch.Tensor]] = []
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(**settings(case, folder))
        trainer = PPOTrainer(args, tokenizer, train_dataset=prompts, **parts)
        trainer.dataloader = torch.utils.data.DataLoader(
            prompts,
            batch_size=trainer.args.local_batch_size,
            collate_fn=DataCollatorWithPadding(tokenizer),
            drop_last=True,
        )
        optimizer = trainer.optimizer.optimizer
        step = optimizer.step

        def recorded_step(*args, **kwargs):
            result = step(*args, **kwargs)
            steps.append(snapshot(trainer.model))
            return result

        optimizer.step = recorded_step
        module.batch_generation, np.random.permutation = seeded_generation, seeded_permutation
        try:
            trainer.train()
        finally:
            module.batch_generation, np.random.permutation = generate, shuffle
    return {"steps": steps, "logs": [log for log in trainer.state.log_history if "lr" in log]}


def run_ours(case: str, make_engine: Callable | None = None, **overrides) -> dict:
    """Train with our class at TRL's values; return parameters after every step and its logs."""
    from transformers import TrainerCallback

    from codexhf.ppo import PPOConfig, PPOTrainer
    from codexhf.ppo.schedule import Schedule

    class TraceSchedule(Schedule):
        def rollout_seed(self, rollout, rank):
            return 1001 + rollout

        def permutation(self, rollout, ppo_epoch, rank):
            return torch.from_numpy(permutation(rollout, ppo_epoch, self.rollout_rows))

    steps: list[dict[str, torch.Tensor]] = []

    class Recorder(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            steps.append(snapshot(trainer.model))

    tokenizer = make_tokenizer()
    prompts = make_prompts(tokenizer)
    parts = make_models(tokenizer, **CASES[case].get("_model", {}))
    with tempfile.TemporaryDirectory() as folder:
        given = {**settings(case, folder), "shuffle_dataset": False, "log_grad_norms": False}
        given["temperature"] += 1e-7  # TRL adds it
        args = PPOConfig.like_trl(**{**given, **overrides})
        trainer = PPOTrainer(
            args, tokenizer, train_dataset=prompts, callbacks=[Recorder()], **parts
        )
        trainer.schedule = TraceSchedule(**vars(trainer.schedule))
        sampling = trainer.engine.sampling
        trainer.engine = (make_engine or _every_row)(sampling)
        trainer.train()
    return {"steps": steps, "logs": [log for log in trainer.state.log_history if "lr" in log]}


def _every_row(sampling):
    """Return our engine, drawing for ended rows too, as TRL does."""
    from codexhf.generation.native import NativeEngine

    return NativeEngine(sampling, drop_ended=False)


LOGGED = ("objective/kl", "objective/scores", "objective/entropy", "objective/non_score_reward")


def pack(case: str, run: dict) -> dict[str, torch.Tensor]:
    """Return what of a run goes into the trace."""
    logs = [[float(log[name]) for name in LOGGED] for log in run["logs"]]
    last = run["steps"][-1]
    return {
        f"{case}/projections": torch.stack([projections(step) for step in run["steps"]]),
        f"{case}/logs": torch.tensor(logs, dtype=torch.float64),
        f"{case}/final": torch.cat([last[name].flatten() for name in sorted(last)]),
    }


def largest_difference(ours: list[dict], theirs: list[dict]) -> float:
    """Return the largest difference of any parameter after any optimizer step."""
    if len(ours) != len(theirs):
        raise ValueError(f"optimizer steps: got {len(ours)}, expected {len(theirs)}.")
    return max(
        float((a[name] - b[name]).abs().max())
        for a, b in zip(ours, theirs, strict=True)
        for name in a
    )


def main(argv: list[str] | None = None) -> int:
    """Write the trace, or compare both trainers live."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args(argv).check
    torch.set_num_threads(1)
    found: dict[str, torch.Tensor] = {}
    worst = 0.0
    for case in CASES:
        theirs = run_trl(case)
        if check:
            ours = run_ours(case)
            difference = largest_difference(ours["steps"], theirs["steps"])
            worst = max(worst, difference)
            print(f"{case:18} {len(ours['steps']):3} steps  max |difference| {difference:.1e}")
        found |= pack(case, theirs)
    if check:
        return int(worst > 1e-6)
    safetensors.torch.save_file(found, TRACE, metadata={"cases": json.dumps(CASES)})
    print(f"{TRACE.name}: {TRACE.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
