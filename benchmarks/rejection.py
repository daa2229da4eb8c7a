"""Rejection sampling, which PPO is compared with: completions that pass become demonstrations.

    python benchmarks/rejection.py --model runs/smollm2/m1 --prompts runs/smollm2/prefs/prompts.md \
        --completions 6144 --max_new_tokens 192 --output runs/smollm2/passing-42

Draws as many completions of the same prompts as PPO does, at the same temperature, keeps each one
that passes and differs from those before it, and writes them with a card that SFT reads.
"""

import argparse
import json
import math
import time
from pathlib import Path

CARD = """---
license: other
codexhf:
  type: prompt-completion
  load: {path: json, data_files: passing.jsonl}
---

# Completions that pass their tests

## Provenance

Drawn by benchmarks/rejection.py from a model's own answers.

## Known problems

What passes can still be wrong where the tests do not look.
"""


def main() -> None:
    """Sample, judge, write `passing.jsonl`, its card README.md, and counts.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True, help="card of tasks")
    parser.add_argument("--completions", type=int, required=True)
    parser.add_argument("--max_new_tokens", type=int, required=True)
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    import torch

    from codexhf.completions import judge
    from codexhf.data import load_tasks
    from codexhf.generation import sample
    from codexhf.models import load_policy, room_for, to_device
    from codexhf.prompts import text_of
    from codexhf.tokenizer import load_tokenizer

    started = time.time()
    tokenizer = load_tokenizer(options.model)
    room = room_for(options.model, options.max_new_tokens)
    tasks = load_tasks([options.prompts], tokenizer, max_prompt_tokens=room).dataset
    each = math.ceil(options.completions / len(tasks))
    tasks = tasks.select(range(min(len(tasks), math.ceil(options.completions / each))))
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = to_device(load_policy(options.model, tokenizer, dtype=dtype))
    drawn = sample(
        model, tokenizer, tasks["prompt"], n=each, temperature=1.0, seed=options.seed,
        max_new_tokens=options.max_new_tokens, batch_size=options.batch_size, progress="sampling",
    )  # fmt: skip
    verdicts = judge(drawn, tasks["tests"], tasks["entry_point"])
    rows = []
    for prompt, answers, found in zip(tasks["prompt"], drawn, verdicts, strict=True):
        passing = [a for a, v in zip(answers, found, strict=True) if v == "pass"]
        rows += [{"prompt": text_of(prompt), "completion": a} for a in dict.fromkeys(passing)]
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "passing.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    (options.output / "README.md").write_text(CARD)
    counts = {
        "completions": sum(map(len, drawn)),
        "passing": sum(v == "pass" for found in verdicts for v in found),
        "rows": len(rows),
        "solved_prompts": sum("pass" in found for found in verdicts),
        "prompts": len(tasks),
        "seconds": time.time() - started,
    }
    (options.output / "counts.json").write_text(json.dumps(counts))
    print(counts, flush=True)


if __name__ == "__main__":
    main()
