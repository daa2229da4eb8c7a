"""SmolLM2-135M-Instruct, M1, R and M2: the table of docs/pretrained.md by one command.

    make model-smollm2 && python benchmarks/smollm2.py                  # one GPU of 80 GB
    python benchmarks/smollm2.py --seeds 42 43 44 --rejection           # and what else one would do
    python benchmarks/smollm2.py --configs recipes/pretrained/lora --runs runs/smollm2-lora
    python benchmarks/smollm2.py --benchmarks data_cards/benchmarks/humaneval.md
    python benchmarks/smollm2.py --configs recipes --model runs/m0 --runs runs/compared \
        --demonstrations data_cards/python_tasks_references.md --rejection --seeds 42 43 44 \
        --at_once 1 --benchmarks                   # the laptop's lineage, without flaws to unlearn
    ... --demonstrations 'card.md#train[:750]' --prompts 'other.md#train[750:]' \
        --ppo "--learning_rate 1e-4"               # parts of data sets, other settings of PPO

Stages that are finished are skipped, so a run that was stopped goes on; `--until ppo` stops after a
stage. What runs at once is spread over the GPUs that CUDA_VISIBLE_DEVICES shows. MBPP is left out,
with a line that says so, where its file is not next to its card.

--rejection: for each seed as many completions of the same prompts as PPO's rollouts have, drawn
from M1 (rejection.py); M1 trained further on those that pass, for as long as PPO took in all: that
time less the sampling, at M1's seconds per step, at least one epoch and at most four.
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch

ROWS = {
    "pass@1": "held-out tasks, pass@1 %",
    "pass@1_greedy": "greedy, %",
    "benchmark_": "",
    "reward": "mean normalised reward of R",
    "kl": "KL to M1, nats per completion",
    "answer_tokens": "tokens per completion",
    "ended": "ended by themselves, %",
}
FULL = "recipes/pretrained/full"
MBPP = "data_cards/benchmarks/mbpp_file.md"
PERCENT = ("pass@", "benchmark_", "ended")


def main() -> int:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="models/smollm2")
    parser.add_argument("--configs", default=FULL)
    parser.add_argument("--runs", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[42], help="of PPO")
    parser.add_argument("--at_once", type=int, default=4, help="processes that share the devices")
    parser.add_argument("--rejection", action="store_true", help="compare with it")
    parser.add_argument("--demonstrations", help="card, instead of the recipes'")
    parser.add_argument("--prompts", nargs="+", help="cards of preferences and PPO, likewise")
    parser.add_argument("--sft", default="", metavar="'--flag value'", help="more flags of SFT")
    parser.add_argument("--ppo", default="", metavar="'--flag value'", help="more flags of PPO")
    parser.add_argument("--until", choices=["sft", "preferences", "reward_model", "ppo"])
    parser.add_argument(
        "--benchmarks",
        nargs="*",
        default=["data_cards/benchmarks/humaneval.md", MBPP],
    )
    parser.add_argument(
        "--samples", default="4", help="per problem of a benchmark; 0: greedy alone"
    )
    options = parser.parse_args()
    if MBPP in options.benchmarks and not Path(MBPP).with_name("mbpp.jsonl").is_file():
        print(f"{MBPP}: mbpp.jsonl is not next to it, so MBPP is left out", flush=True)
        options.benchmarks.remove(MBPP)
    runs = options.runs
    m1, prefs, rm = (str(runs / name) for name in ("m1", "prefs", "rm"))
    m2s = {seed: str(runs / f"m2-{seed}") for seed in options.seeds}
    card = options.demonstrations
    steps = {
        "sft": [
            stage(
                options, "sft", m1, "--model", options.model,
                *(["--train_cards", card] if card else []), *shlex.split(options.sft),
            )
        ],
        "preferences": [
            stage(
                options, "preferences", prefs, "--model", m1,
                *(["--prompt_cards", *options.prompts] if options.prompts else []),
            )
        ],
        "reward_model": [
            stage(
                options, "reward_model", rm, "--model", m1,
                "--train_cards", prefs, "--eval_cards", f"{prefs}/test.md",
            )
        ],
        "ppo": [
            stage(
                options, "ppo", m2, "--model", m1, "--reward_model", rm,
                "--prompt_cards", f"{prefs}/prompts.md", "--seed", str(seed),
                *(["--sft_cards", card] if card else []), *shlex.split(options.ppo),
            )
            for seed, m2 in m2s.items()
        ],
    }  # fmt: skip
    for name, commands in steps.items():
        run(commands, options.at_once)
        if name == options.until:
            return 0
    models = [options.model, m1, *m2s.values()]
    if options.rejection:
        models += reject(options, m1, prefs, m2s)
    run([evaluation(options, model, m1, rm) for model in models], options.at_once)
    print(table(runs, models))
    return 0


def stage(options: argparse.Namespace, name: str, output: str, *more: str) -> list[str]:
    """Return the command of a stage."""
    command = [f"recipes/{name}.py", "--config", f"{options.configs}/{name}.yaml"]
    if name in ("sft", "reward_model", "ppo"):  # what is free now another run may want next
        more += ("--auto_find_batch_size", "false")
    if name in ("sft", "reward_model"):
        more += ("--gradient_checkpointing", "false")  # 135M leave room for activations
    if name == "ppo" and options.configs == FULL:
        # so small a model takes longer to launch than to compute
        more += ("--per_device_train_batch_size", "128", "--gradient_accumulation_steps", "4")
    return [*command, "--output_dir", output, *more]


def evaluation(options: argparse.Namespace, model: str, m1: str, rm: str) -> list[str]:
    """Return the command that evaluates one model: each apart, for a device holds several."""
    return stage(
        options, "evaluation", str(evaluated(options.runs, model)), "--models", model,
        "--reference", m1, "--reward_model", rm, "--benchmark_samples", options.samples,
        "--batch_size", str(batch_size(options)),
        *(["--benchmark_cards", *options.benchmarks] if options.benchmarks else []),
    )  # fmt: skip


def evaluated(runs: Path, model: str) -> Path:
    return runs / f"evaluation-{Path(model).name}"


def reject(options: argparse.Namespace, m1: str, prefs: str, m2s: dict[int, str]) -> list[str]:
    """Train M1 on its own passing samples, once for each seed; return the folders."""
    found = {seed: options.runs / f"passing-{seed}" for seed in m2s}
    configs = {seed: manifest(m2)["config"] for seed, m2 in m2s.items()}
    drawing = [
        [
            "benchmarks/rejection.py", "--model", m1, "--prompts", f"{prefs}/prompts.md",
            "--completions", str(configs[seed]["total_episodes"]), "--seed", str(seed),
            "--max_new_tokens", str(configs[seed]["response_length"]), "--output", str(folder),
            "--batch_size", str(batch_size(options)),
        ]
        for seed, folder in found.items()
        if not (folder / "counts.json").is_file()
    ]  # fmt: skip
    run(drawing, options.at_once)
    trained = {seed: str(options.runs / f"rejection-{seed}") for seed in m2s}
    commands = []
    for seed, folder in found.items():
        counts, first = json.loads((folder / "counts.json").read_text()), manifest(m1)
        if not counts["rows"]:
            raise SystemExit(f"rejection, seed {seed}: none of M1's completions passes its tests")
        config = first["config"]  # without what is the library's default
        rows = config.get("per_device_train_batch_size", 8) * config.get(
            "gradient_accumulation_steps", 1
        )
        left = manifest(m2s[seed])["wall_s"]["train_s"] - counts["seconds"]
        epoch = max(1, counts["rows"] // rows)
        steps = round(left * first["steps"] / first["wall_s"]["train_s"])
        steps = min(max(steps, epoch), 4 * epoch)
        print(f"rejection, seed {seed}: {counts}, {steps} steps of {rows} rows", flush=True)
        every = str(max(1, steps // 4))
        commands.append(
            stage(
                options, "sft", trained[seed], "--model", m1, "--train_cards", str(folder),
                "--max_steps", str(steps), "--eval_strategy", "steps", "--eval_steps", every,
                "--save_strategy", "steps", "--save_steps", every,
                "--load_best_model_at_end", "true", "--metric_for_best_model", "eval_pass@1",
                "--seed", str(seed),
            )
        )  # fmt: skip
    run(commands, options.at_once)
    return [*trained.values()]


def devices() -> list[str]:
    """Return the GPUs that may be used."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return shown.split(",") if shown else [str(i) for i in range(torch.cuda.device_count())]


def batch_size(options: argparse.Namespace) -> int:
    """Return the rows that one process samples at once."""
    return 512 // math.ceil(options.at_once / max(1, len(devices())))


def run(commands: list[list[str]], at_once: int) -> None:
    """Run commands to their ends, some at once, each on the next GPU; one that fails ends it."""
    gpus = devices() or [""]
    for start in range(0, len(commands), at_once):
        begun = [
            subprocess.Popen(
                [sys.executable, *command],
                env={**os.environ, "CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]},
            )
            for number, command in enumerate(commands[start : start + at_once])
        ]
        if code := max([abs(process.wait()) for process in begun]):
            raise SystemExit(code)


def manifest(folder: Path | str) -> dict:
    return json.loads((Path(folder) / "manifest.json").read_text())


def table(runs: Path, models: list[str]) -> str:
    """Return the evaluation, R's accuracy and the seconds of each stage as Markdown."""
    names = [Path(model).name for model in models]
    metrics: dict = {}
    for model in models:
        metrics |= manifest(evaluated(runs, model))["metrics"]
    keys = {key.partition("/")[2] for key in metrics if "/" in key}
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for start_of, label in ROWS.items():
        for key in sorted(keys):
            whole = key == start_of or start_of == "benchmark_" and key.startswith(start_of)
            if not whole or key.endswith(("_low", "_high")):
                continue
            factor = 100 if key.startswith(PERCENT) else 1
            cells = [cell(metrics, f"{name}/{key}", factor) for name in names]
            lines.append(f"| {label or key.removeprefix(start_of) + ', %'} | {' | '.join(cells)} |")
    stages = {path.parent.name: manifest(path.parent) for path in runs.glob("*/manifest.json")}
    seconds = {n: sum(m["wall_s"].values()) for n, m in sorted(stages.items()) if m["wall_s"]}
    counted = {p.parent.name: json.loads(p.read_text()) for p in runs.glob("*/counts.json")}
    seconds |= {name: counts["seconds"] for name, counts in sorted(counted.items())}
    accuracy, environment = stages["rm"]["metrics"]["eval_accuracy"], stages["m1"]["environment"]
    lines += [
        "",
        f"R on held-out pairs: {100 * accuracy:.1f}%. Seconds: "
        + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()),
        f"{environment['device']}; {environment['versions']}; {stages['m1']['finished'][:10]}",
    ]
    return "\n".join(lines)


def cell(metrics: dict, key: str, factor: float) -> str:
    """Return a number with its interval, where it has one."""
    if metrics.get(key) is None:
        return "–"
    ends = [metrics.get(f"{key}_{end}") for end in ("low", "high")]
    interval = "" if None in ends else f" [{factor * ends[0]:.1f}, {factor * ends[1]:.1f}]"
    return f"{factor * metrics[key]:.{1 if factor == 100 else 2}f}{interval}"


if __name__ == "__main__":
    sys.exit(main())
