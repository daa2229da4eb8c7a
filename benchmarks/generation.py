"""Tokens per second of sampling: our decoding loop, plain, recorded and with fused kernels.

    python benchmarks/generation.py                 # 0.5B Qwen2 shape, 64 x (128 + 256), one GPU
    python benchmarks/generation.py --uneven        # up to 1,024 tokens, 300 on average
    python benchmarks/generation.py --profile       # and the kernels of the last way
    python benchmarks/generation.py --tiny          # seconds on a CPU: does it run?

Every way samples with the same seeds from the same random model. A step's limit is the time in
which its weights, keys and values can be read. Results belong in benchmarks/README.md.
"""

import argparse
import json
import time
from statistics import median

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.integrations.liger import apply_liger_kernel

from codexhf.generation import Sampling, engine_for, native
from ppo import GPU, TINY, WORK, end_once_in, kernels

BYTES_PER_S = 3.35e12  # of an H100's memory
WAYS = ("hf", "plain", "recorded in two", "recorded", "liger")


def main() -> None:
    """Measure every way in turn and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--times", type=int, default=3, help="that are counted")
    parser.add_argument("--uneven", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    options = parser.parse_args()
    options.device = "cpu" if options.tiny else "cuda"
    shape = TINY if options.tiny else GPU
    width = shape["response"] * (4 if options.uneven else 1)
    sizes = {k: v for k, v in shape.items() if k not in WORK}
    torch.manual_seed(0)
    with torch.device(options.device):
        policy = Qwen2ForCausalLM(Qwen2Config(**sizes, bos_token_id=None, eos_token_id=1))
        policy = policy.to(torch.float32 if options.tiny else torch.bfloat16).eval()
        ids = torch.randint(3, shape["vocab_size"], (options.rows, shape["prompt"]))
    if options.uneven:
        end_once_in(300, policy)
    print(json.dumps(limit(policy, options.rows, shape["prompt"] + width // 2)), flush=True)
    for way in WAYS:
        if way in options.ways:
            profiled = options.profile and way == options.ways[-1]
            print(json.dumps(measured(way, policy, ids, width, options, profiled)), flush=True)


def limit(policy, rows: int, tokens: int) -> dict:
    """Return the milliseconds of a step that do nothing but read weights, keys and values."""
    config = policy.config
    size = 2 * config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    cache = rows * tokens * size * config.num_hidden_layers * policy.dtype.itemsize
    weights = sum(p.numel() * p.element_size() for p in policy.parameters())
    return {"limit ms/step": round(1e3 * (weights + cache) / BYTES_PER_S, 3)}


def measured(way: str, policy, ids, width: int, options, profiled: bool) -> dict:
    """Sample some times; return the median of seconds, tokens per second, and milliseconds."""
    native.FIXED_TOKENS = 256 if way == "recorded in two" else 512
    if way == "liger":
        apply_liger_kernel(policy, {"fused_linear_cross_entropy": False})
    sampling = Sampling(width, (1,) if options.uneven else (), len(ids), None)
    engine = engine_for(policy, sampling, "hf" if way == "hf" else "native", way != "plain")
    mask, seconds, tokens = torch.ones_like(ids, dtype=torch.bool), [], []
    for number in range(options.times + 1):  # the first warms up
        start = time.perf_counter()
        found = engine.generate(policy, ids, mask, seed=number, temperature=1.0)
        tokens.append(int(found.lengths.sum()))  # waits for the GPU
        seconds.append(time.perf_counter() - start)
    if profiled:
        with kernels(options):
            engine.generate(policy, ids, mask, seed=0, temperature=1.0)
    counted = list(zip(seconds, tokens, strict=False))[1:]
    return {
        "way": way,
        "s": round(median(s for s, _ in counted), 3),
        "tokens/s": round(median(n / s for s, n in counted)),
        "ms/step": round(1e3 * median(s for s, _ in counted) / found.responses.size(1), 2),
        "first s": round(seconds[0], 2),
    }


if __name__ == "__main__":
    main()
