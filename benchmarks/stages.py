"""Speed and losses of a stage: a library's trainer at its defaults, and ours, on the same rows.

    python benchmarks/stages.py pretrain            # 124M Llama, 32 x 1024; against a plain loop
    python benchmarks/stages.py sft                 # 0.5B, lengths 50 to 2,000; against SFTTrainer
    python benchmarks/stages.py reward_model        # the same, against RewardTrainer
    python benchmarks/stages.py sft --lengths tasks # rows as long as those of the task set
    python benchmarks/stages.py sft --tiny          # seconds on a CPU: does it run?

Each side runs in a process of its own, on models of the same random weights and rows of the same
random ids, in the same order. Steps that warm up and compile are not counted. Ours is what
`run_stage` does to a recipe's trainer. Results belong in benchmarks/README.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LLAMA = {  # 124M
    "vocab_size": 50_304,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "tie_word_embeddings": True,
}
QWEN = {  # 0.5B
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
TINY = {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
PEAK = 989e12  # FLOP/s of an H100 in bfloat16
SIDES = {
    "pretrain": ("plain loop", "trainer", "ours"),
    "sft": ("trl", "ours"),
    "reward_model": ("trl", "ours"),
}


def main() -> int:
    """Run the sides one after the other and print a table."""
    options = parse()
    if options.side:
        print(json.dumps(measure(options)))
        return 0
    found = {}
    for side in options.sides or SIDES[options.stage]:
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            print(f"{side} failed:\n{done.stderr[-3000:]}", flush=True)
            continue
        found[side] = json.loads(done.stdout.strip().splitlines()[-1])
        print(side, found[side], flush=True)
    print(table(found))
    return 0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=SIDES)
    parser.add_argument("--lengths", choices=("mixed", "tasks"), default="mixed")
    parser.add_argument("--steps", type=int, default=30, help="that are counted")
    parser.add_argument("--warm", type=int, default=8, help="steps before them")
    parser.add_argument("--tiny", action="store_true", help="a smoke test on a CPU")
    parser.add_argument("--sides", nargs="+", help="only these")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict:
    """Train one side; return seconds, tokens, memory and losses of the counted steps."""
    import torch
    from transformers import set_seed

    set_seed(0)
    started = time.perf_counter()
    steps = plain_loop(options) if options.side == "plain loop" else trained(options)
    warm, counted = steps[: options.warm], steps[options.warm :]
    seconds = sum(step["seconds"] for step in counted)
    tokens = sum(step["tokens"] for step in counted)
    gpu = torch.cuda.is_available()
    sizes = shape(options)
    # 6 FLOP per parameter and token, the head's included; attention left out
    layer = (
        2
        * sizes["hidden_size"] ** 2
        * (1 + sizes["num_key_value_heads"] / sizes["num_attention_heads"])
        + 3 * sizes["hidden_size"] * sizes["intermediate_size"]
    )
    head = 0 if options.stage == "reward_model" else sizes["vocab_size"] * sizes["hidden_size"]
    flops = 6 * (sizes["num_hidden_layers"] * layer + head) * tokens / seconds
    return {
        "tokens/s": round(tokens / seconds),
        "ms/step": round(1e3 * seconds / len(counted), 1),
        "warm-up s": round(sum(step["seconds"] for step in warm), 1),
        "peak GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2) if gpu else None,
        "of peak": f"{flops / PEAK:.0%}",
        "losses": [round(step["loss"], 4) for step in (steps[0], *steps[9::10], steps[-1])],
        "all s": round(time.perf_counter() - started, 1),
    }


def shape(options: argparse.Namespace) -> dict:
    """Return the sizes of the model."""
    return TINY if options.tiny else LLAMA if options.stage == "pretrain" else QWEN


def model(options: argparse.Namespace):
    """Return the model, float32 as stages load theirs, trained under autocast."""
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen2ForSequenceClassification,
    )

    common = {**shape(options), "pad_token_id": 2, "eos_token_id": 1, "bos_token_id": None}
    common |= {"use_cache": False}
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        if options.stage == "pretrain":
            return LlamaForCausalLM(LlamaConfig(**common))
        if options.stage == "sft":
            return Qwen2ForCausalLM(Qwen2Config(**common))
        return Qwen2ForSequenceClassification(Qwen2Config(**common, num_labels=1))


def rows(options: argparse.Namespace):
    """Return the data set: random ids, of lengths that are drawn once."""
    import numpy as np
    from datasets import Dataset

    draw, size = np.random.default_rng(0), shape(options)["vocab_size"]
    width, batch = (64, 2) if options.tiny else (1024, 32)
    count = (batch if options.stage == "pretrain" else 8) * (options.steps + options.warm)

    def ids(length: int) -> list[int]:
        return draw.integers(3, size, length).tolist()

    if options.stage == "pretrain":  # documents of 400 tokens on average, cut into rows
        made = []
        for _ in range(count):
            starts = draw.random(width) < 1 / 400
            starts[0] = True
            where = np.maximum.accumulate(np.where(starts, np.arange(width), 0))
            row = ids(width)
            labels = [-100 if start else token for token, start in zip(row, starts, strict=True)]
            positions = (np.arange(width) - where).tolist()
            made.append({"input_ids": row, "position_ids": positions, "labels": labels})
        return Dataset.from_list(made)
    low, high = (60, 190) if options.lengths == "tasks" else (50, 2000)
    low, high = (5, 40) if options.tiny else (low, high)
    lengths = np.exp(draw.uniform(np.log(low), np.log(high), count)).astype(int)
    if options.stage == "sft":
        made = [{"input_ids": row, "labels": row} for row in map(ids, lengths)]
    else:
        made = [{"chosen_ids": ids(n), "rejected_ids": ids(max(4, n - 3))} for n in lengths]
    return Dataset.from_list(made)


class Clock:
    """Seconds, real tokens and loss of each step, as a callback that waits for the GPU."""

    def __init__(self):
        self.steps, self.start, self.tokens = [], None, 0

    def begin(self) -> None:
        self.start = now()

    def end(self, tokens: int, loss: float = float("nan")) -> None:
        self.steps.append({"seconds": now() - self.start, "tokens": tokens, "loss": loss})


def now() -> float:
    """Return the time once the device has finished."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def plain_loop(options: argparse.Namespace) -> list[dict]:
    """Train by hand, compiled as a whole, causal attention over whole rows: the floor."""
    import torch
    import torch.nn.functional as F

    policy, data, kind = (
        model(options),
        rows(options),
        "cuda" if torch.cuda.is_available() else "cpu",
    )
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, fused=kind == "cuda")

    @torch.compile
    def loss_of(ids, labels):
        states = policy.model(input_ids=ids).last_hidden_state
        logits = F.linear(states, policy.lm_head.weight).float()
        labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)

    clock, size = Clock(), 2 if options.tiny else 32
    for step in range(options.steps + options.warm):
        part = data[step * size : (step + 1) * size]
        ids, labels = (torch.tensor(part[name]).to(kind) for name in ("input_ids", "labels"))
        clock.begin()
        with torch.autocast(kind, torch.bfloat16):
            loss = loss_of(ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.end(ids.numel(), 0.0)
        clock.steps[-1]["loss"] = loss.item()
    return clock.steps


def trained(options: argparse.Namespace) -> list[dict]:
    """Train with a Trainer: its defaults, and for "ours" what run_stage adds."""
    from transformers import Trainer, TrainerCallback

    ours, clock = options.side == "ours", Clock()

    class Timed(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            clock.begin()

        def on_step_end(self, args, state, control, **kwargs):
            clock.end(clock.tokens)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                clock.steps[state.global_step - 1]["loss"] = float(logs["loss"])

    with tempfile.TemporaryDirectory() as folder:
        trainer = made(options, ours, folder)
        collate = trainer.data_collator

        def counted(batch):
            out = collate(batch)
            mask = out.get("attention_mask")
            clock.tokens = int(out["input_ids"].numel() if mask is None else mask.sum())
            return out

        trainer.data_collator = counted
        trainer.add_callback(Timed())
        if ours:
            from codexhf.faster import Faster

            alone = type(trainer).compute_loss is Trainer.compute_loss
            trainer.add_callback(Faster(not options.tiny, alone))
        trainer.train()
    return clock.steps


def made(options: argparse.Namespace, ours: bool, folder: str):
    """Return the stage's trainer, at its own defaults but for what must be equal."""
    from transformers import Trainer, TrainingArguments
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    from codexhf.tokens import packed_collator

    common = {
        "output_dir": folder,
        "max_steps": options.steps + options.warm,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "bf16": True,
        "use_cpu": options.tiny,
    }
    if options.stage == "pretrain":
        rows_per_step = 2 if options.tiny else 32
        args = TrainingArguments(
            **common,
            per_device_train_batch_size=rows_per_step,
            torch_compile=not ours,
            train_sampling_strategy="sequential",
        )
        return Trainer(
            model=model(options), args=args, train_dataset=rows(options),
            data_collator=packed_collator,
        )  # fmt: skip
    config, kind = (
        (SFTConfig, SFTTrainer) if options.stage == "sft" else (RewardConfig, RewardTrainer)
    )
    # what our recipes say; the peer has TRL's defaults, which recompute activations
    chosen = {"gradient_checkpointing": False} if ours else {}
    args = config(**common, per_device_train_batch_size=8, max_length=None, **chosen)
    return kind(
        model=model(options), args=args, train_dataset=rows(options), processing_class=tokenizer()
    )


def tokenizer():
    """Return a tokenizer that is never asked for anything but its special tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {f"<{i}>": i for i in range(500)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<0>")),
        eos_token="<1>",
        pad_token="<2>",
    )


def table(found: dict[str, dict]) -> str:
    """Return the results as a Markdown table, and the ratio to the first side."""
    names = [name for name in next(iter(found.values()), {}) if name != "losses"]
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for side, values in found.items():
        lines.append(f"| {side} | {' | '.join(str(values[name]) for name in names)} |")
    lines += ["", *(f"{side}: losses {values['losses']}" for side, values in found.items())]
    if "ours" in found:
        for side in found.keys() - {"ours"}:
            ratio = found["ours"]["tokens/s"] / found[side]["tokens/s"]
            lines.append(f"ours: {ratio:.2f}x the tokens per second of {side}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
    sys.exit(main())
