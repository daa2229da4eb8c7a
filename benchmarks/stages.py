"""Speed and losses of a stage: a library's trainer at its defaults, and each feature of ours.

    python benchmarks/stages.py pretrain            # 124M Llama, 32 x 1024; against a plain loop
    python benchmarks/stages.py sft                 # 0.5B, lengths 50 to 2,000; against SFTTrainer
    python benchmarks/stages.py reward_model        # the same, against RewardTrainer
    python benchmarks/stages.py sft --lengths tasks # rows as long as those of the task set
    python benchmarks/stages.py sft --tiny          # on a CPU: does it run, are the losses equal?

All sides run in one process, one after the other, on models of the same random weights and the same
rows in the same order. Steps that warm up and compile are not counted. A side of ours is the
library's trainer with settings, and what `run_stage` makes of them. The first side is the peer.
Results belong in benchmarks/README.md.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest import mock

from ppo import QWEN

LLAMA = {  # 124M
    "vocab_size": 50_304,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "tie_word_embeddings": True,
}
TINY = {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
PEAK = 989e12  # FLOP/s of an H100 in bfloat16

LIGER_LOSS = {
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": False, "rms_norm": False, "swiglu": False},
}
COMPILED = {"torch_compile": True, "gradient_checkpointing": False}
FREE = {**COMPILED, "padding_free": True}
UNSAID = {**COMPILED, "padding_free": None}
GROUPED = {**COMPILED, "train_sampling_strategy": "group_by_length"}
FLEX = {**FREE, "attention": "flex_attention"}
SIDES = {  # "whole": compiled as a whole, as Trainer does it; else layer by layer
    "pretrain": {
        "plain loop": {"loop": "whole"},
        "plain loop, layers": {"loop": "layers"},
        "Trainer, compiled": {"torch_compile": True, "whole": True},
        "compiled": COMPILED,
        "padding_free": FREE,
        "padding_free, logits returned": {**FREE, "logits": True},
        "padding_free, waiting": {**FREE, "logging_nan_inf_filter": True},
        "padding_free, liger": {**FREE, **LIGER_LOSS},
        "flex": {**COMPILED, "attention": "flex_attention"},
    },
    "sft": {
        "TRL's defaults": {},
        "plain": {"gradient_checkpointing": False},
        "compiled": COMPILED,
        "padding_free": FREE,
        "unsaid": UNSAID,
        "grouped": GROUPED,
        "flex": FLEX,
    },
    "reward_model": {
        "TRL's defaults": {},
        "compiled": COMPILED,
        "padding_free": FREE,
        "unsaid": UNSAID,
    },
}


def main() -> int:
    """Measure the sides one after the other and print a table."""
    os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    options, found = parse(), {}
    for side in options.sides or SIDES[options.stage]:
        try:
            found[side] = measure(options, SIDES[options.stage][side])
        except Exception:  # the others are still worth their time
            print(f"{side} failed:\n{traceback.format_exc()[-3000:]}", flush=True)
            continue
        print(json.dumps({side: found[side]}), flush=True)
    print(table(found))
    return 0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=SIDES)
    parser.add_argument("--lengths", choices=("mixed", "tasks"), default="mixed")
    parser.add_argument("--steps", type=int, default=20, help="that are counted")
    parser.add_argument("--warm", type=int, default=10, help="steps before them")
    parser.add_argument("--tiny", action="store_true", help="a smoke test on a CPU")
    parser.add_argument("--sides", nargs="+", help="only these")
    return parser.parse_args()


def measure(options: argparse.Namespace, chosen: dict) -> dict:
    """Train one side; return seconds, tokens, memory and losses."""
    import torch
    from transformers import set_seed

    set_seed(0)
    gc.collect()
    torch._dynamo.reset()  # a side must not run into what an earlier one compiled
    gpu, started = torch.cuda.is_available() and not options.tiny, time.perf_counter()
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    clock = plain_loop(options, chosen["loop"]) if "loop" in chosen else trained(options, chosen)
    seconds = clock.seconds()
    warm, counted = seconds[: options.warm], seconds[options.warm :]
    tokens = sum(clock.tokens[options.warm : options.warm + len(counted)]) / sum(counted)
    return {
        "tokens/s": round(tokens),
        "ms/step": round(1e3 * median(counted), 1),
        "warm-up s": round(sum(warm), 1),
        "peak GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2) if gpu else None,
        "of peak": f"{flops_per_token(options) * tokens / PEAK:.0%}",
        "all s": round(time.perf_counter() - started, 1),
        "losses": [round(loss, 4) for loss in clock.losses],
    }


def flops_per_token(options: argparse.Namespace) -> float:
    """Return 6 FLOP per parameter, the head's included; attention left out."""
    sizes = shape(options)
    shared = 1 + sizes["num_key_value_heads"] / sizes["num_attention_heads"]
    layer = 2 * sizes["hidden_size"] ** 2 * shared
    layer += 3 * sizes["hidden_size"] * sizes["intermediate_size"]
    head = 0 if options.stage == "reward_model" else sizes["vocab_size"] * sizes["hidden_size"]
    return 6 * (sizes["num_hidden_layers"] * layer + head)


def shape(options: argparse.Namespace) -> dict:
    """Return the sizes of the model."""
    return TINY if options.tiny else LLAMA if options.stage == "pretrain" else QWEN


def model(options: argparse.Namespace, attention: str = "sdpa"):
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
    common |= {"use_cache": False, "attn_implementation": attention}
    torch.manual_seed(0)
    with torch.device("cpu" if options.tiny else "cuda"):
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
            starts = draw.random(width) < 1 / (20 if options.tiny else 400)
            starts[0] = True
            where = np.maximum.accumulate(np.where(starts, np.arange(width), 0))
            row = ids(width)
            labels = [-100 if start else token for token, start in zip(row, starts, strict=True)]
            positions = (np.arange(width) - where).tolist()
            made.append({"input_ids": row, "position_ids": positions, "labels": labels})
        return Dataset.from_list(made).with_format("numpy")  # as Data.arrays
    low, high = (60, 190) if options.lengths == "tasks" else (50, 2000)
    low, high = (5, 40) if options.tiny else (low, high)
    lengths = np.exp(draw.uniform(np.log(low), np.log(high), count)).astype(int)
    if options.stage == "sft":
        made = [{"input_ids": row, "labels": row} for row in map(ids, lengths)]
    else:
        made = [{"chosen_ids": ids(n), "rejected_ids": ids(max(4, n - 3))} for n in lengths]
    return Dataset.from_list(made)


class Clock:
    """When each step ended by the device's own clock, its real tokens, and losses, ten by ten."""

    def __init__(self, gpu: bool):
        self.gpu, self.ends, self.tokens, self.losses = gpu, [], [], []
        self.end()

    def end(self) -> None:
        """Note the end of a step without waiting for it."""
        import torch

        if self.gpu:
            self.ends.append(torch.cuda.Event(enable_timing=True))
            self.ends[-1].record()
        else:
            self.ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the seconds of each step, the first with all that came before it."""
        import torch

        if self.gpu:
            torch.cuda.synchronize()
            pairs = zip(self.ends, self.ends[1:], strict=False)
            return [start.elapsed_time(end) / 1e3 for start, end in pairs]
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]


def plain_loop(options: argparse.Namespace, how: str) -> Clock:
    """Train by hand, with causal attention over whole rows: the floor."""
    import torch
    import torch.nn.functional as F

    from codexhf.models import compile_layers

    kind = "cpu" if options.tiny else "cuda"
    policy, data = model(options), rows(options)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, fused=kind == "cuda")

    def loss_from(states, labels):
        logits = F.linear(states, policy.lm_head.weight).float()
        labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)

    def loss_of(ids, labels):
        return loss_from(policy.model(input_ids=ids).last_hidden_state, labels)

    if options.tiny:
        pass
    elif how == "whole":
        loss_of = torch.compile(loss_of)
    else:
        loss_from = torch.compile(loss_from)
        compile_layers(policy, dynamic=None)
    clock, size, losses = Clock(kind == "cuda"), 2 if options.tiny else 32, []
    for step in range(options.steps + options.warm):
        part = data[step * size : (step + 1) * size]
        ids, labels = (torch.tensor(part[name]).to(kind) for name in ("input_ids", "labels"))
        with torch.autocast(kind, torch.bfloat16):
            loss = loss_of(ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        clock.tokens.append(ids.numel())
        clock.end()
    clock.losses = torch.stack(losses).view(-1, 10).mean(1).tolist()
    return clock


def trained(options: argparse.Namespace, chosen: dict) -> Clock:
    """Train with a library's Trainer, with its defaults but for what was chosen."""
    from transformers import TrainerCallback

    from codexhf import faster, guards

    clock = Clock(not options.tiny)

    class Timed(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.end()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                clock.losses.append(float(logs["loss"]))

    ours = bool(chosen) and not chosen.get("whole")
    if ours:  # as a recipe on a GPU has it
        chosen = {"logging_nan_inf_filter": False, **chosen}
    chosen = dict(chosen)
    _, logits = (chosen.pop(name, False) for name in ("whole", "logits"))
    if options.tiny:
        chosen.pop("torch_compile", None)
        chosen.pop("use_liger_kernel", None)
    with tempfile.TemporaryDirectory() as folder:
        trainer, asked = made(options, chosen, folder)
        collate = trainer.data_collator

        def counted(batch):
            out = collate(batch)
            mask = out.get("attention_mask")
            clock.tokens.append(int(out["input_ids"].numel() if mask is None else mask.sum()))
            return out

        trainer.data_collator = counted
        trainer.add_callback(Timed())
        if ours:
            trainer.add_callback(guards.StopOnNaN())
            alone = (lambda trainer: False) if logits else faster.wants_loss_alone
            with mock.patch.object(faster, "wants_loss_alone", alone):
                faster.speed_up(trainer, asked)
        trainer.train()
    return clock


def made(options: argparse.Namespace, chosen: dict, folder: str) -> tuple:
    """Return the stage's trainer, at its own defaults but for what must be equal, and the stage."""
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
        "logging_steps": 10,
        "disable_tqdm": True,
        "bf16": not options.tiny,
        "use_cpu": options.tiny,
    }
    policy = model(options, chosen.pop("attention", "sdpa"))
    free = chosen.get("padding_free", False)
    if options.stage != "sft":
        chosen.pop("padding_free", None)
    data, asked = rows(options), SimpleNamespace(padding_free=free)
    if options.stage == "pretrain":
        common |= {"per_device_train_batch_size": 2 if options.tiny else 32}
        args = TrainingArguments(**common, train_sampling_strategy="sequential", **chosen)
        return Trainer(policy, args, train_dataset=data, data_collator=packed_collator), asked
    config, kind = (
        (SFTConfig, SFTTrainer) if options.stage == "sft" else (RewardConfig, RewardTrainer)
    )
    args = config(**common, per_device_train_batch_size=8, max_length=None, **chosen)
    trainer = kind(policy, args, train_dataset=data, processing_class=tokenizer())
    if policy.config._attn_implementation != "sdpa":  # transformers' own way with documents
        trainer.args.padding_free = asked.padding_free = False
    return trainer, asked


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
    """Return the results as a Markdown table, with the ratio to the first side."""
    names = [name for name in next(iter(found.values()), {}) if name != "losses"]
    lines = [f"| | {' | '.join(names)} | x the first | losses, means of ten steps |"]
    lines.append(f"|---|{'---|' * (len(names) + 2)}")
    first = next(iter(found.values()), {}).get("tokens/s")
    for side, values in found.items():
        cells = [str(values[name]) for name in names]
        cells += [f"{values['tokens/s'] / first:.2f}", str(values["losses"])]
        lines.append(f"| {side} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
    sys.exit(main())
