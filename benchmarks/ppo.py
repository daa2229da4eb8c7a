"""Time and memory of one PPO update, ours and TRL 1.12's class on the same work.

    python benchmarks/ppo.py                        # one GPU, 0.5B Qwen2 shape, bfloat16
    python benchmarks/ppo.py --device cpu           # 50k vocabulary, float32, a minute or two
    python benchmarks/ppo.py --device cpu --tiny    # seconds: does it run?
    python benchmarks/ppo.py --set rollout_engine=hf gradient_checkpointing=true
    python benchmarks/ppo.py --uneven               # answers of up to 1,024 tokens, 300 on average
    python benchmarks/ppo.py --arms                 # ours with each feature of ARMS in turn
    python benchmarks/ppo.py --arms compiled liger --profile    # and the kernels of an update

Each trainer runs in a process of its own, on randomly initialised models that never end an answer
early, so both compute the same number of tokens. With --uneven the policy's head has a bias that
makes the end token as likely at every step: lengths are geometric. Figures are medians; the first
update warms up and is not counted. TRL's class is left out where trl 1.12 cannot be imported.
Results belong in benchmarks/README.md.
"""

import argparse
import contextlib
import functools
import gc
import importlib.util
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from statistics import median

QWEN = {  # 0.5B
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
GPU = {
    **QWEN,
    "prompt": 128,
    "response": 256,
    "rows": 8,
    "accumulation": 8,
    "epochs": 4,
}
CPU = {
    "vocab_size": 50_257,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "prompt": 32,
    "response": 64,
    "rows": 16,
    "accumulation": 4,
    "epochs": 1,
}
TINY = {**CPU, "vocab_size": 500, "hidden_size": 32, "intermediate_size": 64, "response": 8}
TINY |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "rows": 2}
UNEVEN = {"response": 1024, "mean": 300}
WORK = ("mean", "prompt", "response", "rows", "accumulation", "epochs")

PADDED = {"padding_free": False}
COMPILED = {**PADDED, "torch_compile": True, "gradient_checkpointing": True, "forwards": 1}
ARMS = {  # settings of PPOConfig; `forwards`: micro batches that make a minibatch
    "plain": PADDED,
    "compiled": COMPILED,
    "liger": {**COMPILED, "use_liger_kernel": True},
    "kept": {**COMPILED, "gradient_checkpointing": False, "forwards": 2},
    "sampler": {**COMPILED, "old_logprobs": "sampler"},  # its log-probabilities, as TRL
    "padding_free": {**COMPILED, "padding_free": True},
    "unsaid": {**COMPILED, "padding_free": None},
    "4 forwards": {**COMPILED, "forwards": 4},  # rows of like length share one
    "all": {**COMPILED, "use_liger_kernel": True, "padding_free": True},
}
EVEN_ARMS = ("compiled", "liger", "kept", "sampler")
UNEVEN_ARMS = ("4 forwards", "padding_free", "all")


def main(argv: list[str] | None = None) -> int:
    """Run the trainers one after the other and print a table."""
    options = parse(argv)
    if options.worker:
        for name in chosen_arms(options):
            print(json.dumps({name: measure(options, name)}), flush=True)
        return 0
    trainers = ["ours"]
    if importlib.util.find_spec("trl") and version("trl").startswith("1.12"):
        trainers.append("trl")
    else:
        print("trl 1.12 is not installed: only ours is measured")
    results = {}
    for name in options.only or trainers:
        results |= in_process(name, argv or sys.argv[1:])
    print(table(results))
    return 0


def chosen_arms(options: argparse.Namespace) -> list[str]:
    """Return what a worker measures, in turn."""
    if options.worker == "trl" or options.arms is None:
        return [options.worker]
    arms = options.arms or (UNEVEN_ARMS if options.uneven else EVEN_ARMS)
    return sorted(arms, key=lambda arm: "use_liger_kernel" in ARMS[arm])  # it changes what follows


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a smoke test")
    parser.add_argument("--uneven", action="store_true", help="answers end at geometric lengths")
    parser.add_argument("--episodes", type=int, help="per update; TRL keeps all scores of them")
    parser.add_argument("--updates", type=int, default=3, help="rollouts that are counted")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--set", nargs="*", default=[], help="NAME=VALUE for our PPOConfig")
    parser.add_argument("--arms", nargs="*", choices=ARMS, help="none named: those that fit")
    parser.add_argument("--profile", action="store_true", help="print the kernels of an update")
    parser.add_argument("--only", nargs="+", choices=("ours", "trl"))
    parser.add_argument("--worker", choices=("ours", "trl"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def in_process(name: str, argv: list[str]) -> dict:
    """Measure one trainer in a fresh process; what it finds is printed as it comes."""
    command = [sys.executable, __file__, *argv, "--worker", name]
    environment = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHONUNBUFFERED": "1"}
    found = {}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as child,
    ):
        for line in child.stdout:
            print(line, end="", flush=True)
            if line.startswith('{"'):
                found |= json.loads(line)
        if child.wait():
            errors.seek(0)
            print(f"{name} failed:\n{errors.read()[-4000:]}", flush=True)
    return found


def measure(options: argparse.Namespace, arm: str) -> dict:
    """Train with one class and return seconds per update by phase, and the peak memory."""
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    gc.collect()
    torch._dynamo.reset()  # an arm must not run into what an earlier one compiled
    if options.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    shape = TINY if options.tiny else GPU if options.device == "cuda" else CPU
    if options.uneven:
        shape = {**shape, **({"mean": 3} if options.tiny else UNEVEN)}
    if options.episodes:
        shape = {**shape, "accumulation": options.episodes // shape["rows"]}
    run = functools.partial(run_ours, arm) if options.worker == "ours" else run_trl
    laps = run(options, shape, *parts(options, shape))
    first, laps = laps[0], laps[1:]  # the first update warms up
    phases = {name: median(lap[name] for lap in laps) for name in laps[0]}
    if options.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        where = torch.cuda.get_device_name()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        where = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    episodes = shape["rows"] * shape["accumulation"]
    versions = {name: version(name) for name in ("torch", "transformers")}
    return {
        "phases": phases,
        "first": first["total"],
        "all": time.perf_counter() - started,
        "peak": peak,
        "episodes": episodes,
        "tokens": episodes * shape.get("mean", shape["response"]),
        "where": where,
        "versions": versions,
    }


def parts(options: argparse.Namespace, shape: dict) -> tuple:
    """Return tokenizer, models and prompts."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen2ForSequenceClassification,
    )

    vocab = {f"<{i}>": i for i in range(shape["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<0>")),
        eos_token="<1>",
        pad_token="<2>",
        padding_side="left",
    )
    sizes = {k: v for k, v in shape.items() if k not in WORK}
    config = Qwen2Config(**sizes, pad_token_id=2, eos_token_id=1, bos_token_id=None)
    scorer = Qwen2Config(**sizes, num_labels=1, pad_token_id=2, eos_token_id=1, bos_token_id=None)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(options.device):
        made = {
            "model": Qwen2ForCausalLM(config).to(dtype),
            "ref_model": Qwen2ForCausalLM(config).to(dtype),
            "reward_model": Qwen2ForSequenceClassification(scorer).to(dtype),
            "value_model": Qwen2ForSequenceClassification(scorer).to(dtype),
        }
    if options.uneven:
        end_once_in(shape["mean"], made["model"], made["ref_model"])
    rows = shape["rows"] * shape["accumulation"] * (options.updates + 3)
    size = shape["vocab_size"]
    ids = [[3 + (7 * i + j) % (size - 3) for j in range(shape["prompt"])] for i in range(rows)]
    return tokenizer, made, Dataset.from_list([{"input_ids": row} for row in ids])


def end_once_in(mean: int, *models) -> None:
    """Give the heads a bias under which the end token comes once in `mean` tokens."""
    import math

    import torch

    for model in models:
        head, vocabulary = model.lm_head, model.config.vocab_size
        head.bias = torch.nn.Parameter(torch.zeros_like(head.weight[:, 0]))
        head.bias.data[1] = math.log(vocabulary / (mean - 1))


def settings(options: argparse.Namespace, shape: dict, folder: str) -> dict:
    """Return the arguments both classes get."""
    rows = shape["rows"] * shape["accumulation"]
    return {
        "output_dir": folder,
        "per_device_train_batch_size": shape["rows"],
        "gradient_accumulation_steps": shape["accumulation"],
        "num_ppo_epochs": shape["epochs"],
        "total_episodes": rows * (options.updates + 1),
        "response_length": shape["response"],
        "local_rollout_forward_batch_size": rows,
        "temperature": 1.0,
        "report_to": "none",
        "save_strategy": "no",
        "num_sample_generations": 0,
        "disable_tqdm": True,
        "bf16": False,  # the weights are bfloat16 themselves
        "gradient_checkpointing": False,  # TRL's class ignores it
        "use_cpu": options.device == "cpu",
        "logging_steps": 1,
        "stop_token": "eos" if options.uneven else None,
    }


def run_ours(arm, options, shape, tokenizer, models, prompts) -> list[dict]:
    """Train with codexhf's class."""
    from codexhf.ppo import PPOConfig, PPOTrainer

    chosen = dict(pair.split("=", 1) for pair in options.set)
    chosen = {name: parse_value(value) for name, value in chosen.items()}
    chosen = {**ARMS.get(arm, {}), **chosen}
    if forwards := chosen.pop("forwards", None):
        rows = shape["rows"] * shape["accumulation"]
        chosen |= {"per_device_train_batch_size": rows // forwards}
        chosen |= {"gradient_accumulation_steps": forwards}
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(**{**settings(options, shape, folder), "log_grad_norms": False, **chosen})
        trainer = PPOTrainer(args, tokenizer, train_dataset=prompts, **models)
        make, laps, starts = trainer._make_rollout, [], []

        def timed(number):
            starts.append(now(options))
            return make(number)

        trainer._make_rollout = timed
        with kernels(options):
            trainer.train()
        starts.append(now(options))
    logs = [log for log in trainer.state.log_history if "time/generate_s" in log]
    losses = [round(log["loss/value_avg"], 4) for log in logs]
    print(f"{arm}: value losses {losses}, entropies {[log['objective/entropy'] for log in logs]}")
    for log, start, end in zip(logs, starts, starts[1:], strict=False):
        names = ("generate", "score", "forward")
        lap = {name: log[f"time/{name}_s"] for name in names}
        laps.append({**lap, "update": end - start - sum(lap.values()), "total": end - start})
    return laps


@contextlib.contextmanager
def kernels(options):
    """Print which kernels took the time, with --profile."""
    if not options.profile:
        yield
        return
    from torch.profiler import ProfilerActivity, profile

    gpu = options.device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as found:
        yield
    by = "self_device_time_total" if gpu else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=70))


def run_trl(options, shape, tokenizer, models, prompts) -> list[dict]:
    """Train with TRL 1.12's class, its phases told apart by what it calls."""
    import numpy as np
    import trl.experimental.ppo.ppo_trainer as module
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    marks: list[tuple[str, float]] = []
    generate, shuffle = module.batch_generation, np.random.permutation

    def timed_generation(*args, **kwargs):
        marks.append(("start", now(options)))
        result = generate(*args, **kwargs)
        marks.append(("generated", now(options)))
        return result

    def timed_shuffle(rows):
        if marks[-1][0] == "generated":
            marks.append(("rolled out", now(options)))
        return shuffle(rows)

    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(**settings(options, shape, folder))
        trainer = PPOTrainer(args, tokenizer, train_dataset=prompts, **models)
        module.batch_generation, np.random.permutation = timed_generation, timed_shuffle
        try:
            trainer.train()
        finally:
            module.batch_generation, np.random.permutation = generate, shuffle
    marks.append(("start", now(options)))
    laps = []
    for i in range(0, len(marks) - 1, 3):
        start, generated, rolled, end = (when for _, when in marks[i : i + 4])
        laps.append(
            {
                "generate": generated - start,
                "score": 0.0,  # TRL scores and forwards in one loop
                "forward": rolled - generated,
                "update": end - rolled,
                "total": end - start,
            }
        )
    return laps


def parse_value(text: str):
    """Read a value of --set as JSON where it is that, else as text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def now(options: argparse.Namespace) -> float:
    """Return the time once the device has finished its work."""
    if options.device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def table(results: dict[str, dict]) -> str:
    """Return the results as a Markdown table."""
    if not results:
        return "nothing was measured"
    first = next(iter(results.values()))
    names = list(first["phases"])
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    lines = [
        f"{first['where']}, {versions}, {first['episodes']} episodes per update",
        "",
        f"| | {' | '.join(f'{n} s' for n in names)} | episodes/s | generated tokens/s | peak GiB "
        "| first update s | all s |",
        f"|---|{'---|' * (len(names) + 5)}",
    ]
    for trainer, found in results.items():
        phases = found["phases"]
        cells = [f"{phases[name]:.2f}" for name in names]
        cells.append(f"{found['episodes'] / phases['total']:.2f}")
        cells.append(f"{found['tokens'] / phases['generate']:.0f}")
        cells += [f"{found['peak']:.2f}", f"{found['first']:.1f}", f"{found['all']:.1f}"]
        lines.append(f"| {trainer} | {' | '.join(cells)} |")
    trl = results.get("trl")
    for arm, found in results.items():
        if trl and found is not trl:
            speed = trl["phases"]["total"] / found["phases"]["total"]
            memory = found["peak"] / trl["peak"]
            lines.append(f"\n{arm}: {speed:.2f}x the speed of TRL, {memory:.2f}x the memory")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
