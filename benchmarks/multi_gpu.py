"""Every stage on one GPU, two under DDP and two under FSDP2: losses, memory, speed.

    python benchmarks/multi_gpu.py                      # two GPUs, under nine minutes
    python benchmarks/multi_gpu.py --only losses        # or scaling, cap, gather
    python benchmarks/multi_gpu.py --fits               # the table of docs/multi_gpu.md, computed
    python benchmarks/multi_gpu.py --tiny               # two processes on a CPU: does it run?

Losses: the recipes with a few of the laptop's steps and the same global batch. Memory and scaling:
random models of 0.5B parameters and the same batch per GPU. Cap: so little memory that
one GPU fails. Gather: sampling under FSDP2 with weights gathered once, and with every layer
gathered for every token. Each leg is a process group of its own with a time limit; what it has
printed counts even then. Results belong in benchmarks/README.md.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ppo import QWEN

ROOT = Path(__file__).resolve().parent.parent
WAYS = ("one", "ddp", "fsdp2")
CONFIG = {"one": "single_gpu", "ddp": "multi_gpu", "fsdp2": "fsdp2"}
SMALL = {**QWEN, "vocab_size": 500, "hidden_size": 32, "intermediate_size": 64}
SMALL |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
START = time.monotonic()


def main() -> int:
    """Run the legs that were asked for and print their tables."""
    options = parse()
    if options.fits:
        print(fits())
        return 0
    if options.leg:
        from codexhf.launch import launch

        launch(lambda: leg(options))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        runs, found = Path(folder), {}
        for part, work in PARTS.items():
            if options.only in (None, part):
                found[part] = work(options, runs, found)
        text = "\n\n".join(table for tables in found.values() for table in tables["tables"])
    print(f"\n{text}\n\n{time.monotonic() - START:.0f} s in all")
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        (Path(options.out) / "multi_gpu.md").write_text(text + "\n")
        (Path(options.out) / "multi_gpu.json").write_text(json.dumps(found, indent=1))
    return 0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--out", default=os.environ.get("OUT"), help="folder for the results")
    parser.add_argument("--budget", type=float, default=525, help="seconds for everything")
    parser.add_argument("--tiny", action="store_true", help="two processes on a CPU")
    parser.add_argument("--fits", action="store_true", help="which model needs how many GPUs")
    parser.add_argument("--leg", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--cap-gib", type=float, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


# ------------------------------------------------------------------------------ processes


def free_port() -> str:
    """Return a port on which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return str(listener.getsockname()[1])


def launched(way: str, command: list[str], log: Path, limit_s: float, options) -> dict:
    """Run a script under one of `WAYS`; return its JSON lines merged, and why it ended."""
    processes = 1 if way == "one" else 2
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    port, environment = free_port(), {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "CODEXHF_DEBUG": "1"}
    if options.tiny:
        head = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        head += ["--master_port", port]
        if way == "fsdp2":
            head += [str(ROOT / "tests" / "fsdp_on_cpu.py")]
        environment |= {"OMP_NUM_THREADS": "1"}
    else:
        config = ROOT / "recipes" / "accelerate" / f"{CONFIG[way]}.yaml"
        head = ["-m", "accelerate.commands.launch", "--config_file", str(config)]
        head += ["--num_processes", str(processes), "--main_process_port", port]
        if way == "one":
            environment["CUDA_VISIBLE_DEVICES"] = "0"
    left = options.budget - (time.monotonic() - START)
    limit_s = limit_s * 6 if options.tiny else limit_s  # on a laptop, several legs at once
    started, found = time.monotonic(), {}
    log.parent.mkdir(parents=True, exist_ok=True)
    if left < 10:
        return {"ended": "no time was left"}
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, *head, *command],
            cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(min(limit_s, left))
            found["ended"] = "well" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            found["ended"] = f"stopped after {min(limit_s, left):.0f} s"
            os.killpg(process.pid, 9)
            process.wait()
    text = log.read_text(errors="replace")
    for line in text.splitlines():
        if line.startswith("RESULT "):
            found |= json.loads(line.removeprefix("RESULT "))
    found["out_of_memory"] = "OutOfMemoryError" in text
    found["seconds"] = round(time.monotonic() - started, 1)
    print(f"[{time.monotonic() - START:4.0f} s] {log.stem}: {found}", flush=True)
    if found["ended"] != "well" and not found["out_of_memory"]:
        print("\n".join(text.splitlines()[-40:]), flush=True)
    return found


def table(head: list[str], rows: list[list]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


# ------------------------------------------------------------------------------ losses


def losses(options, runs: Path, found: dict) -> dict:
    """Run the recipes; what one GPU makes is what all legs of the next stage start from."""
    made, results, errors = runs / "one", {}, []
    steps = {"m0": 120, "m1": 400} if not options.tiny else {"m0": 4, "m1": 4}
    every = {"m0": "25", "m1": "50"} if not options.tiny else {"m0": "2", "m1": "2"}
    few = ["--save_strategy", "no", "--eval_strategy", "no"]
    base = "recipes/smoke" if options.tiny else "recipes"

    def run(name: str, way: str, recipe: str, *arguments: str) -> None:
        command = [f"recipes/{recipe}.py", "--config", f"{base}/{recipe}.yaml", *arguments]
        command += ["--output_dir", str(runs / way / name)]
        if options.tiny and recipe not in ("tokenizer", "preferences"):
            command += ["--use_cpu", "true"]
        done = launched(way, command, runs / f"{way}-{name}.log", 130, options)
        manifest = runs / way / name / "manifest.json"
        if manifest.exists():
            done["history"] = json.loads(manifest.read_text())["history"]
        else:
            errors.append(f"{name} {way}: {done['ended']}")
        results[f"{name}-{way}"] = done

    def each(pool, name: str, recipe: str, rows: str, size: int, *arguments: str) -> list:
        """Start a stage's three legs; wait for the one on which the next stage depends."""
        jobs = []
        for way in WAYS:
            share = [f"--{rows}", str(size if way == "one" else size // 2)]
            jobs.append(pool.submit(run, name, way, recipe, *share, *arguments))
        jobs[0].result()
        return jobs

    per_device = "per_device_train_batch_size"
    with ThreadPoolExecutor(16) as pool:
        run("tokenizer", "one", "tokenizer")
        tokenizer = ["--tokenizer", str(made / "tokenizer")]
        m0 = ["--max_steps", str(steps["m0"]), "--logging_steps", every["m0"], *few]
        each(pool, "m0", "pretrain", per_device, 8, *m0, *tokenizer)
        m1 = ["--max_steps", str(steps["m1"]), "--logging_steps", every["m1"], *few]
        each(pool, "m1", "sft", per_device, 8, *m1, "--model", str(made / "m0"))
        model = ["--model", str(made / "m1")]
        run("prefs", "one", "preferences", *model)
        pairs = ["--train_cards", str(made / "prefs")]
        pairs += ["--eval_cards", str(made / "prefs" / "test.md"), "--logging_steps", "20", *few]
        each(pool, "rm", "reward_model", per_device, 16, *model, *pairs)
        ppo = ["--reward_model", str(made / "rm"), "--load_best_model_at_end", "false", *few]
        ppo += ["--prompt_cards", str(made / "prefs" / "prompts.md"), "--eval_tasks", "20"]
        if not options.tiny:
            ppo += ["--total_episodes", "768"]
        size = 32 if not options.tiny else 4
        each(pool, "m2", "ppo", "gradient_accumulation_steps", size, *model, *ppo)
    return {"results": results, "tables": [losses_table(results), *errors]}


def losses_table(results: dict) -> str:
    """Return the losses of each stage at the same steps, one column for each way."""
    rows = []
    names = {"m0": "pretrain", "m1": "sft", "rm": "reward_model", "m2": "ppo"}
    for name, title in names.items():
        key = "rewards/unit_tests" if name == "m2" else "loss"
        cells = []
        for way in WAYS:
            history = results.get(f"{name}-{way}", {}).get("history", [])
            logged = [entry[key] for entry in history if key in entry]
            shown = logged if name == "m2" else [*logged[:3], *logged[3:][-1:]]
            told = [f"{value:.4f}" for value in shown]
            cells.append(" / ".join(told) or results.get(f"{name}-{way}", {}).get("ended", "–"))
        rows.append([f"{title}, {key}", *cells])
    return table(["stage", "one GPU", "two, DDP", "two, FSDP2"], rows)


# ------------------------------------------------------------------------------ scaling, memory


def scaling(options, runs: Path, found: dict) -> dict:
    """Measure tokens per second and peak memory at 0.5B, one leg after the other."""
    results = {}
    for way in WAYS:
        for stages in (("pretrain", "sft", "reward_model"), ("ppo",)):
            log = runs / f"{way}-{stages[0]}.log"
            command = [__file__, "--leg", *stages, *(["--tiny"] if options.tiny else [])]
            done = launched(way, command, log, 90, options)
            results |= {f"{stage}-{way}": done.get(stage) or done["ended"] for stage in stages}
    rows = []
    for stage in ("pretrain", "sft", "reward_model", "ppo"):
        cells, one = [], results[f"{stage}-one"]
        for way in WAYS:
            it = results[f"{stage}-{way}"]
            if isinstance(it, str):
                cells += [it, "–"]
                continue
            times = f" ({it['speed'] / one['speed']:.2f}×)" if isinstance(one, dict) else ""
            cells += [f"{it['speed']:,.0f}{times if way != 'one' else ''}", f"{it['peak']:.1f}"]
        rows.append([stage, *cells])
    head = ["0.5B", "one: tokens/s", "GiB", "DDP: tokens/s", "GiB a GPU", "FSDP2: tokens/s"]
    return {"results": results, "tables": [table([*head, "GiB a GPU"], rows)]}


def cap(options, runs: Path, found: dict) -> dict:
    """Show a model for which one GPU has too little memory and two have enough."""
    limits = {"pretrain": 8.5, "ppo": 18.0}  # GiB: 16 bytes a parameter are 7.4 and 14.7
    jobs, results = {}, {}
    with ThreadPoolExecutor(4) as pool:
        for stage, limit in limits.items():
            for way in ("one", "fsdp2"):
                command = [__file__, "--leg", stage, "--cap-gib", str(limit)]
                command += ["--tiny"] if options.tiny else []
                log = runs / f"cap-{stage}-{way}.log"
                jobs[stage, way] = pool.submit(launched, way, command, log, 90, options)
    rows = []
    for (stage, way), job in jobs.items():
        done = results[f"{stage}-{way}"] = job.result()
        ended = f"{done[stage]['peak']:.1f} GiB" if stage in done else done["ended"]
        ended = "out of memory" if done.get("out_of_memory") else ended
        rows.append([stage, f"{limits[stage]:.1f} GiB", way, ended])
    return {"results": results, "tables": [table(["stage", "cap", "way", "ended"], rows)]}


def leg(options) -> None:
    """Train the stages of one leg in this process and print what was seen."""
    import torch

    if options.cap_gib and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        index = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_per_process_memory_fraction(options.cap_gib / total, index)
    watchdog = threading.Timer(300, lambda: os._exit(3))
    watchdog.daemon = True
    watchdog.start()
    for stage in options.leg:
        with tempfile.TemporaryDirectory() as folder:
            seen = {"ppo": ppo_leg, "gather": gather_leg}.get(stage, supervised_leg)(
                stage, folder, options.tiny, bool(options.cap_gib)
            )
        if int(os.environ.get("RANK", "0")) == 0:
            print("RESULT " + json.dumps({stage: seen}), flush=True)


def gather(options, runs: Path, found: dict) -> dict:
    """Compare the two ways of sampling from a model that FSDP2 has sharded."""
    command = [__file__, "--leg", "gather", *(["--tiny"] if options.tiny else [])]
    done = launched("fsdp2", command, runs / "gather.log", 120, options)
    seen = done.get("gather", {})
    rows = [[way, *map("{:.2f}".format, times)] for way, times in seen.items()] or [[done["ended"]]]
    return {"results": done, "tables": [table(["weights are gathered", "seconds", "again"], rows)]}


def gather_leg(stage: str, folder: str, tiny: bool, capped: bool) -> dict:
    """Sample from a sharded model, every process the same number of tokens."""
    from contextlib import nullcontext

    import torch
    from accelerate import Accelerator
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from codexhf.generation import Sampling, make_engine
    from codexhf.sharding import gathered, shard

    accelerator = Accelerator(cpu=tiny)
    torch.manual_seed(0)
    shape = {**SMALL, "hidden_size": 256, "num_hidden_layers": 8} if tiny else QWEN
    model = Qwen2ForCausalLM(Qwen2Config(**shape)).eval()
    model = shard(model.to(accelerator.device), accelerator)
    rows, tokens = (4, 64) if tiny else (64, 256)
    engine = make_engine("native", Sampling(tokens, (), rows, shape["vocab_size"]), not tiny)
    prompts = torch.full((rows, 8), 5, device=accelerator.device)
    seen: dict[str, list[float]] = {"once": [], "at every layer of every token": []}
    for way, times in list(seen.items()) * 3:
        accelerator.wait_for_everyone()
        start = time.monotonic()
        with torch.no_grad(), gathered(model) if way == "once" else nullcontext():
            engine.generate(model, prompts, prompts > 0, seed=0, temperature=1.0)
        times.append(round(time.monotonic() - start, 3))
    return {way: times[1:] for way, times in seen.items()}


PARTS = {"losses": losses, "scaling": scaling, "cap": cap, "gather": gather}


# ------------------------------------------------------------------------------ what fits

SIZES = {  # of Qwen2.5: billions of parameters, layers, width, vocabulary, cached values a token
    "0.5B": (0.49, 24, 896, 151_936, 2 * 24 * 128),
    "1.5B": (1.54, 28, 1536, 151_936, 2 * 28 * 256),
    "3B": (3.09, 36, 2048, 151_936, 2 * 36 * 256),
    "7B": (7.62, 28, 3584, 152_064, 2 * 28 * 512),
    "14B": (14.8, 48, 5120, 152_064, 2 * 48 * 1024),
    "32B": (32.8, 64, 5120, 152_064, 2 * 64 * 1024),
    "72B": (72.7, 80, 8192, 152_064, 2 * 80 * 1024),
}
ROWS, LENGTH, COMPLETIONS = 1, 2048, 16
"""Rows and tokens of a micro batch; completions that a GPU samples at a time."""


def memory(stage: str, size: str, gpus: int, lora: bool = False) -> float:
    """Return the bytes that a stage needs on each of some GPUs, at its fullest moment.

    float32 weights, gradients and Adam's two moments are 16 bytes a trained parameter and 4 a
    frozen one, in equal parts on each GPU; forward and backward hold two layers and the embeddings
    whole, in bfloat16 with float32 gradients. Activations are recomputed: the input of each layer
    is kept, and one layer's own (34 numbers of its width a token). What samples or scores is held
    whole in bfloat16 meanwhile, one model at a time; next to R, M1 samples in float32.
    """
    billions, layers, width, vocabulary, cached = SIZES[size]
    model, head = billions * 1e9, vocabulary * width
    layer = (model - head) / layers
    trained, frozen = (0.02 * model, model) if lora else (model, 0)
    state = (16 * trained + 4 * frozen) / gpus
    whole = (2 * (2 * layer + head) + (0 if lora else 4 * (layer + head))) if gpus > 1 else 0
    tokens = ROWS * LENGTH
    kept = 2 * tokens * width * (layers + 34)
    logits = 0 if stage == "reward_model" else 10 * tokens * vocabulary
    if stage != "ppo":
        held = {"pretrain": 0, "sft": 2 * (gpus > 1), "reward_model": 4}[stage]
        answers = 2 * cached * LENGTH * COMPLETIONS * (stage != "pretrain")
        return state + max(whole + kept + logits, held * model + answers)
    critic, scorers = 16 * model / gpus, 4 * model * (1 if lora else 2) / gpus
    rollout = 2 * model * (gpus > 1) + 2 * cached * LENGTH * COMPLETIONS
    return state + critic + scorers + max(whole + 2 * kept + logits / 4, rollout)


def fits() -> str:
    """Return the least number of GPUs of 80 GB for each size and stage, one tenth left free."""
    rows = []
    for size in SIZES:
        cells = []
        for stage, lora in (
            ("pretrain", False), ("sft", False), ("sft", True), ("reward_model", False),
            ("ppo", False), ("ppo", True),
        ):  # fmt: skip
            enough = (n for n in (1, 2, 4, 8, 16, 32, 64) if memory(stage, size, n, lora) < 72e9)
            n = next(enough, None)
            told = (
                "more than 64"
                if n is None
                else f"{n} ({memory(stage, size, n, lora) / 1e9:.0f} GB)"
            )
            cells.append(told)
        rows.append([size, *cells])
    head = ["model", "pretrain", "SFT", "SFT, LoRA", "reward model", "PPO", "PPO, policy LoRA"]
    return table(head, rows)


# ------------------------------------------------------------------------------ the work of a leg


def tokenizer_of(size: int):
    """Return a tokenizer that has a word for every id."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(size)}, unk_token="<0>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<1>", pad_token="<2>", padding_side="left"
    )


def new_model(shape: dict, scorer: bool = False):
    """Return a random model on the CPU; a GPU draws its weights, which takes a moment there."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

    kind = Qwen2ForSequenceClassification if scorer else Qwen2ForCausalLM
    labels = {"num_labels": 1} if scorer else {}
    config = Qwen2Config(**shape, **labels, pad_token_id=2, eos_token_id=1, bos_token_id=None)
    torch.manual_seed(0)
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        return kind(config).to("cpu")


def supervised_leg(stage: str, folder: str, tiny: bool, capped: bool) -> dict:
    """Train a model of 0.5B for a few steps with the class of a stage."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments, default_data_collator
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    from codexhf.sharding import keep_float32

    shape, length, rows = (SMALL, 16, 2) if tiny else (QWEN, 1024, 1 if capped else 8)
    steps, width = 12, shape["vocab_size"] - 3
    ids = [[3 + (7 * i + j) % width for j in range(length)] for i in range(2 * rows * steps)]
    shared = {
        "output_dir": folder, "per_device_train_batch_size": rows, "max_steps": steps,
        "bf16": not tiny, "use_cpu": tiny, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "logging_steps": 100, "learning_rate": 1e-5,
        "gradient_checkpointing": False, "ddp_find_unused_parameters": False,
    }  # fmt: skip
    tokens = rows * length
    if stage == "pretrain":
        data = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])
        trainer = Trainer(
            new_model(shape), TrainingArguments(**shared), default_data_collator, data
        )
    elif stage == "sft":
        data = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])
        config = SFTConfig(**shared, max_length=length, packing=False)
        tokenizer = tokenizer_of(shape["vocab_size"])
        trainer = SFTTrainer(new_model(shape), config, None, data, processing_class=tokenizer)
    else:
        data = [{"chosen_ids": row, "rejected_ids": row[::-1]} for row in ids]
        config = RewardConfig(**{**shared, "per_device_train_batch_size": rows // 2})
        config.max_length = length
        trainer = RewardTrainer(
            new_model(shape, scorer=True),
            config,
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer_of(shape["vocab_size"]),
        )
    keep_float32(trainer.accelerator)
    watch = watcher(trainer, first=4)
    trainer.train()
    return watch.seen(tokens * trainer.args.world_size)


def ppo_leg(stage: str, folder: str, tiny: bool, capped: bool) -> dict:
    """Train policy and critic of 0.5B each for three rollouts, with R and a reference."""
    from datasets import Dataset

    from codexhf.ppo import PPOConfig, PPOTrainer

    shape, prompt, response, rows = (
        (SMALL, 8, 8, 2) if tiny else (QWEN, 128, 256, 4 if capped else 32)
    )
    accumulated, width, rollouts = 2, shape["vocab_size"] - 3, 3
    world = int(os.environ.get("WORLD_SIZE", "1"))
    episodes = rows * accumulated * world
    data = Dataset.from_list(
        [
            {"input_ids": [3 + (7 * i + j) % width for j in range(prompt)]}
            for i in range(episodes * rollouts)
        ]
    )
    args = PPOConfig(
        output_dir=folder, per_device_train_batch_size=rows, num_ppo_epochs=2,
        gradient_accumulation_steps=accumulated, total_episodes=episodes * rollouts,
        response_length=response, local_rollout_forward_batch_size=rows * accumulated,
        temperature=1.0, report_to="none", save_strategy="no", num_sample_generations=0,
        disable_tqdm=True, bf16=not tiny, use_cpu=tiny, gradient_checkpointing=not tiny,
        log_grad_norms=False, logging_steps=1, learning_rate=1e-6,
    )  # fmt: skip
    trainer = PPOTrainer(
        args,
        tokenizer_of(shape["vocab_size"]),
        model=new_model(shape),
        ref_model=new_model(shape),
        reward_model=new_model(shape, scorer=True),
        value_model=new_model(shape, scorer=True),
        train_dataset=data,
    )
    watch = watcher(trainer, first=trainer.schedule.updates_per_rollout)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "time/generate_s" in log][1:]
    phases = {n: sum(log[f"time/{n}_s"] for log in logs) / len(logs) for n in ("generate", "score")}
    found = watch.seen(episodes * response / trainer.schedule.updates_per_rollout)
    return found | {f"{name}_s": round(value, 2) for name, value in phases.items()}


def watcher(trainer, first: int):
    """Return a callback that times the steps after the first few and sees the peak memory."""
    import torch
    from transformers import TrainerCallback

    cuda = torch.cuda.is_available()

    class Watch(TrainerCallback):
        times: list[float] = []

        def on_train_begin(self, args, state, control, **kwargs):
            if cuda:  # what loading took is over
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()

        def on_step_end(self, args, state, control, **kwargs):
            if cuda:
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())

        def seen(self, tokens_per_step: float) -> dict:
            took = self.times[-1] - self.times[first - 1]
            peak = torch.tensor(torch.cuda.max_memory_allocated() if cuda else 0.0)
            peak = trainer.accelerator.gather(peak.to(trainer.args.device)).max()
            speed = tokens_per_step * (len(self.times) - first) / took
            return {"speed": speed, "peak": float(peak) / 2**30}

    watch = Watch()
    watch.times = []
    trainer.add_callback(watch)
    return watch


if __name__ == "__main__":
    sys.exit(main())
