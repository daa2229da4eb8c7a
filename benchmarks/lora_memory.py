"""Peak memory of one PPO update: LoRA on one shared base against full training.

    python benchmarks/lora_memory.py                    # one GPU, 0.5B and 1.5B Qwen2 shapes
    python benchmarks/lora_memory.py --ways lora qlora  # qlora needs bitsandbytes
    python benchmarks/lora_memory.py --tiny             # seconds on a CPU: does it run?

Policy, reference, critic and reward model of one shape, randomly initialised; 128 + 128 tokens,
`--rows` per forward, activations recomputed, bfloat16 autocast. full: float32 weights, all of
them trained. lora: a bfloat16 base that the four share, rank 16. qlora: that base in 4 bits, read
from a folder. Each way runs in a process of its own. Results belong in benchmarks/README.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

SHAPES = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    | {"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
    | {"num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151_936},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    | {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 500},
}
TOKENS = 128


def main() -> int:
    """Measure every way at every shape and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.5B", "1.5B"])
    parser.add_argument("--ways", nargs="+", default=["full", "lora"])
    parser.add_argument("--rows", type=int, default=16, help="rows per forward with gradient")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(*options.worker, options.rows)))
        return 0
    lines = ["| shape | way | peak GiB | held before training GiB | seconds of two rollouts |"]
    lines.append("|---|---|---|---|---|")
    for shape in ["tiny"] if options.tiny else options.shapes:
        for way in options.ways:
            command = [sys.executable, __file__, "--rows", str(options.rows)]
            done = subprocess.run(
                [*command, "--worker", shape, way], capture_output=True, text=True
            )
            if done.returncode:
                lines.append(f"| {shape} | {way} | {done.stderr.strip().splitlines()[-1]} | | |")
                continue
            found = json.loads(done.stdout.strip().splitlines()[-1])
            cells = [f"{found[key]:.2f}" for key in ("peak", "held")]
            lines.append(f"| {shape} | {way} | {' | '.join(cells)} | {found['seconds']:.1f} |")
            print(f"{shape} {way}: {found}", file=sys.stderr, flush=True)
    print(*[f"{name} {version(name)}" for name in ("torch", "transformers", "peft")], sep=", ")
    print("\n".join(lines))
    return 0


def measure(shape: str, way: str, rows: int) -> dict:
    """Train two rollouts and return the peak memory of the device in GiB."""
    import time

    import torch

    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        trainer = new_trainer(shape, way, rows, Path(folder), "cuda" if cuda else "cpu")
        held = torch.cuda.memory_allocated() if cuda else 0
        start = time.perf_counter()
        trainer.train()
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return {
        "peak": peak / 2**30,
        "held": held / 2**30,
        "seconds": time.perf_counter() - start,
        "trained": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "device": torch.cuda.get_device_name() if cuda else "CPU",
    }


def new_trainer(shape: str, way: str, rows: int, folder: Path, device: str):
    """Return a trainer of models of one shape, as recipes/ppo.py makes it."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    from codexhf.adapters import loading, with_lora
    from codexhf.arguments import PPOArguments
    from codexhf.models import load_policy
    from codexhf.ppo import PPOConfig, PPOTrainer
    from codexhf.reward_model import load_reward_model

    size = SHAPES[shape]["vocab_size"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            models.WordLevel({f"<{i}>": i for i in range(size)}, unk_token="<0>")
        ),
        eos_token="<1>",
        pad_token="<2>",
        padding_side="left",
    )
    config = Qwen2Config(
        **SHAPES[shape], pad_token_id=2, eos_token_id=1, bos_token_id=None, tie_word_embeddings=True
    )
    with torch.device(device):
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base")
    torch.cuda.empty_cache()
    stage = PPOArguments(
        dtype="float32" if way == "full" else "bfloat16",
        use_peft=way != "full",
        load_in_4bit=way == "qlora",
    )
    if errors := [error for error in stage.errors() if "bit" in error]:
        raise SystemExit(errors[0])
    base, options = str(folder / "base"), loading(stage)
    reader = load_reward_model(base, new_head=True, seed=1, **options)
    critic = load_reward_model(base, new_head=True, seed=2, **options)
    accumulation = 64 // rows if device == "cuda" else 1
    many = 3 * rows * accumulation
    ids = [[3 + (7 * i + j) % (size - 3) for j in range(TOKENS)] for i in range(many)]
    args = PPOConfig(
        output_dir=str(folder / "run"), per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation, num_ppo_epochs=1, response_length=TOKENS,
        total_episodes=2 * rows * accumulation, local_rollout_forward_batch_size=64,
        temperature=1.0, report_to="none", save_strategy="no", num_sample_generations=0,
        disable_tqdm=True, gradient_checkpointing=True, use_cpu=device == "cpu", logging_steps=1,
    )  # fmt: skip
    return PPOTrainer(
        args,
        tokenizer,
        model=with_lora(load_policy(base, **options), stage, 0),
        ref_model=None,
        reward_model=with_lora(reader, stage, 1, task="SEQ_CLS"),
        value_model=with_lora(critic, stage, 2, task="SEQ_CLS"),
        train_dataset=Dataset.from_list([{"input_ids": row} for row in ids]),
    )


if __name__ == "__main__":
    sys.exit(main())
