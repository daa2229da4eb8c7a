"""Compare the safety rules with bandit and detect-secrets: hits, false hits, misses, texts/s.

    pip install bandit detect-secrets
    git show 1b7660f:src/codexhf/safety_rules.yaml > /tmp/old/safety_rules.yaml   # 326 vectors
    git show 1b7660f:src/codexhf/safety.py > /tmp/old/safety.py
    python benchmarks/safety.py /tmp/old

docs/safety.md has the table. A vector is hit where any rule or test hits it, not its own alone.
"""

import importlib.util
import json
import operator
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import yaml

from codexhf import safety

TASKS = Path(__file__).parents[1] / "data_cards" / "python_tasks"
Scanner = Callable[[Sequence[str]], list[bool]]


def rules_of(module) -> Scanner:
    """Return the scanner of a version of codexhf.safety."""
    rules = module.default_rules()
    return lambda texts: [bool(module.violations(text, rules)) for text in texts]


def files_of(texts: Sequence[str], folder: str) -> list[str]:
    """Write one file per text and return the paths."""
    paths = [f"{folder}/{number}.py" for number in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        Path(path).write_text(text, encoding="utf-8", errors="surrogatepass")
    return paths


def bandit(texts: Sequence[str], least: str = "LOW") -> list[bool]:
    """All tests of bandit, with its own settings, at a severity and above."""
    from bandit.core.config import BanditConfig
    from bandit.core.manager import BanditManager

    with tempfile.TemporaryDirectory() as folder:
        manager = BanditManager(BanditConfig(), "file", quiet=True)
        paths = files_of(texts, folder)
        manager.discover_files(paths)
        manager.run_tests()
        hit = {issue.fname for issue in manager.get_issue_list(sev_level=least)}
        return [path in hit for path in paths]


def detect_secrets(texts: Sequence[str]) -> list[bool]:
    """All plugins and filters of detect-secrets, with its own settings."""
    from detect_secrets.core.scan import scan_file
    from detect_secrets.settings import default_settings

    with tempfile.TemporaryDirectory() as folder, default_settings():
        return [any(True for _ in scan_file(path)) for path in files_of(texts, folder)]


def strings(value) -> Iterator[str]:
    """Yield every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def main(folder: str) -> None:
    """Print one row of the table per scanner."""
    spec = importlib.util.spec_from_file_location("old_safety", f"{folder}/safety.py")
    old = sys.modules["old_safety"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(old)
    pack = yaml.safe_load(Path(f"{folder}/safety_rules.yaml").read_text(encoding="utf-8"))
    bad = [code for rule in pack["rules"] for code in rule["violates"]]
    good = [code for rule in pack["rules"] for code in rule["allows"]]
    lines = [line for path in sorted(TASKS.glob("*.jsonl")) for line in path.open()]
    texts = [text for line in lines for text in strings(json.loads(line))]
    distinct = list(dict.fromkeys(texts))
    evals = {text for text in distinct if "eval(" in text}
    print(f"{len(bad)} + {len(good)} vectors, {len(texts)} task texts, {len(distinct)} distinct")
    scanners: dict[str, Scanner] = {
        "before": rules_of(old),
        "now": rules_of(safety),
        "bandit": bandit,
        "bandit, medium and high": lambda texts: bandit(texts, "MEDIUM"),
        "detect-secrets": detect_secrets,
        "both": lambda texts: list(map(operator.or_, bandit(texts), detect_secrets(texts))),
    }
    for name, scan in scanners.items():
        hits, false = sum(scan(bad)), sum(scan(good))
        start = time.process_time()
        found = {text for text, hit in zip(distinct, scan(distinct), strict=True) if hit}
        speed = len(distinct) / (time.process_time() - start)
        on_tasks = f"{len(found & evals)} of {len(evals)} | {len(found - evals)}"
        row = f"| {name} | {hits} | {len(bad) - hits} | {false} | {on_tasks} | {speed:,.0f} |"
        print(row, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
