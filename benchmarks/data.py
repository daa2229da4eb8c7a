"""Source files -> packed rows, and rows of prompts and answers -> ids: speed and memory.

    python benchmarks/data.py                                     # 0.1 GB and 1 GB of source
    python benchmarks/data.py --gb 0.1 10 --num_proc 32 --folder /scratch --rows 0
    python benchmarks/data.py --gb --rows 1000000 --pairs 500000  # demonstrations and pairs

The corpus is made once, in the folder, of the sources of the installed packages: as many copies as
it takes, in each of which other names are changed, so that no two files are equal. Each line of the
table is a process of its own, which calls what the recipes call with their settings, held-out cards
included; its parent measures it with all the processes that it starts. "again" is the same
command a second time, as a stage that goes on or the next one that reads the same cards.
"""

import argparse
import io
import json
import keyword
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
TAR_BYTES = 64 * 10**6
HELD_OUT = [str(ROOT / f"data_cards/python_tasks_{n}.md") for n in ("validation", "heldout")]
WORD = re.compile(r"[A-Za-z_]\w{4,}")
CARD = """---
license: mit
codexhf:
  type: {type}
  load: {load}
---
## Provenance
Made by benchmarks/data.py.
## Known problems
Names are changed at random.
"""


# -- what is read ------------------------------------------------------------------------------


def sources() -> list[Path]:
    """Return the source files of the standard library and of the installed packages."""
    folders = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    files = {file for folder in folders for file in Path(folder).rglob("*.py")}
    files |= {file for folder in sys.path if folder.endswith("-packages")
              for file in Path(folder).rglob("*.py")}  # fmt: skip
    return sorted(file for file in files if 200 < file.stat().st_size < 500_000)


def renamed(text: str, copy: int) -> str:
    """Return a text in which a quarter of the names end in something else."""
    if not copy:
        return text
    draw, names = random.Random(copy), {}
    for name in dict.fromkeys(WORD.findall(text)):
        if draw.random() < 0.25 and not keyword.iskeyword(name):
            names[name] = f"{name}_{draw.choice('abcdefgh')}{draw.choice('nmklpqrst')}"
    return WORD.sub(lambda match: names.get(match[0], match[0]), text) + f"\n# {copy}\n"


def write_tar(file: Path, copy: int, members: list[Path]) -> int:
    size = 0
    with tarfile.open(file, "w") as tar:
        for number, member in enumerate(members):
            text = renamed(member.read_text(encoding="utf-8", errors="ignore"), copy)
            raw = text.replace("\0", "").encode()
            info = tarfile.TarInfo(f"{copy}/{number}/{member.name}")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
            size += len(raw)
    return size


def corpus(folder: Path, gb: float) -> tuple[Path, int]:
    """Return the card of a corpus of so many GB, and its bytes; it is made where it is not."""
    tars, card = folder / f"corpus-{gb:g}", folder / f"corpus-{gb:g}.md"
    if not card.is_file():
        tars.mkdir(parents=True, exist_ok=True)
        files = sources()
        random.Random(0).shuffle(files)
        jobs, part, size, total, copy = [], [], 0, 0, 0
        while total < gb * 10**9:
            for file in files:
                part.append(file)
                size += file.stat().st_size
                if size > min(TAR_BYTES, gb * 10**9 / 8) or total + size > gb * 10**9:
                    jobs.append((tars / f"{len(jobs):05}.tar", copy, part))
                    total, part, size = total + size, [], 0
                if total >= gb * 10**9:
                    break
            copy += 1
        with ProcessPoolExecutor() as pool:
            made = sum(pool.map(write_tar, *zip(*jobs, strict=True)))
        (folder / f"corpus-{gb:g}.bytes").write_text(str(made))
        load = f"{{builder: source_files, files: [{tars.name}], suffixes: [.py]}}"
        card.write_text(CARD.format(type="language-modeling", load=load))
    return card, int((folder / f"corpus-{gb:g}.bytes").read_text())


def rows(folder: Path, kind: str, count: int) -> tuple[Path, int]:
    """Return the card of so many rows of prompts and answers, and their bytes."""
    file, card = folder / f"{kind}-{count}.jsonl", folder / f"{kind}-{count}.md"
    if not card.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        texts = (f.read_text(encoding="utf-8", errors="ignore") for f in sources())
        pieces = [t[i : i + 500] for t in texts for i in range(0, len(t) - 500, 500)][:200_000]
        draw = random.Random(1)
        with open(file, "w", encoding="utf-8") as out:
            for number in range(count):
                prompt = f"Number {number}. What comes behind this?\n" + draw.choice(pieces)[:300]
                answers = [draw.choice(pieces)[: draw.randrange(100, 500)] for _ in range(2)]
                row = {"prompt": prompt, "completion": answers[0] + "\n"}
                if kind == "preference":
                    row = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1] + "."}
                out.write(json.dumps(row) + "\n")
        load = f"{{path: json, data_files: {file.name}}}"
        card.write_text(CARD.format(type=kind, load=load))
    return card, file.stat().st_size


# -- what is measured --------------------------------------------------------------------------


def tokenizer(folder: Path) -> Path:
    """Return the folder of a tokenizer of 16,384 tokens, trained where there is none."""
    made = folder / "tokenizer"
    if not (made / "tokenizer.json").is_file():
        from codexhf.tokenizer import new_tokenizer

        draw = random.Random(2).sample(sources(), 2000)
        texts = (file.read_text(encoding="utf-8", errors="ignore") for file in draw)
        new_tokenizer(texts, 16_384).save_pretrained(made)
    return made


def work(kind: str, card: str, made: str, num_proc: int) -> None:
    """In a process of its own: do what a recipe does before its model is loaded."""
    from codexhf import data, workers
    from codexhf.tokenizer import load_tokenizer

    workers.num_proc, used = num_proc, load_tokenizer(made)
    begin = time.monotonic()
    if kind == "language-modeling":
        found = data.load_packed([card], used, 1024, exclude=HELD_OUT)
    elif kind == "prompt-completion":
        found = data.load_demonstrations([card], used, 2048, exclude=HELD_OUT)
    else:
        found = data.load_pairs([card], used, 2048)
    ready = time.monotonic()
    digest = found.fingerprint
    cpu = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({
        "seconds": ready - begin, "identity_s": time.monotonic() - ready, "rows": found.rows,
        "cpu_s": sum(c.ru_utime + c.ru_stime for c in cpu), "fingerprint": digest,
        "dropped": next(iter(found.cards.values()))["dropped"],
    }))  # fmt: skip


def memory(root: int) -> tuple[int, int]:
    """Return the KiB that a process and all below it take: of their own, and with mapped files."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    own, whole, left = 0, 0, [root]
    while left:
        pid = left.pop()
        left += children.get(pid, [])
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        sizes = {m[0]: int(m[1]) for m in re.findall(r"^(\w+): +(\d+) kB", text, re.M)}
        own += sizes.get("Pss_Anon", 0) + sizes.get("Pss_Shmem", 0)
        whole += sizes.get("Pss", 0)
    return own, whole


def measured(folder: Path, kind: str, card: Path, num_proc: int) -> dict:
    """Run `work` in a process and return what it prints, with the most memory it took."""
    environment = os.environ | {
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path[1:]]),
    }
    command = [sys.executable, __file__, "--work", kind, str(card), str(folder / "tokenizer")]
    process = subprocess.Popen(
        [*command, str(num_proc)], env=environment, stdout=subprocess.PIPE, text=True
    )
    own = whole = 0
    while process.poll() is None:
        now = memory(process.pid)
        own, whole = max(own, now[0]), max(whole, now[1])
        time.sleep(0.2)
    if process.returncode:
        sys.exit(process.returncode)
    printed = process.stdout.read().splitlines()
    print(*printed[:-1], sep="\n", file=sys.stderr)
    return json.loads(printed[-1]) | {"own": own / 2**20, "whole": whole / 2**20}


HEADS = ("what", "processes", "rows", "MB", "seconds", "MB/s", "CPU s", "MB per CPU s x 2",
         "GiB", "GiB with mapped files", "again, s")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, nargs="*", default=[0.1, 1.0], help="sizes of corpora")
    parser.add_argument("--rows", type=int, default=0, help="demonstrations")
    parser.add_argument("--pairs", type=int, default=0, help="preference pairs")
    parser.add_argument("--num_proc", type=int, nargs="+", default=[os.cpu_count()])
    parser.add_argument("--folder", type=Path, default=Path("build/data_benchmark"))
    parser.add_argument("--build", action="store_true", help="only make what would be read")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        kind, card, made, num_proc = given.work
        return work(kind, card, made, int(num_proc))
    given.folder = given.folder.resolve()
    tokenizer(given.folder)
    cases = [("language-modeling", *corpus(given.folder, gb)) for gb in given.gb]
    for kind, count in (("prompt-completion", given.rows), ("preference", given.pairs)):
        cases += [(kind, *rows(given.folder, kind, count))] if count else []
    if given.build:
        return
    print("| " + " | ".join(HEADS) + " |\n" + "|---" * len(HEADS) + "|", flush=True)
    for kind, card, size in cases:
        for num_proc in given.num_proc:
            shutil.rmtree(given.folder / "cache", ignore_errors=True)
            first, again = (measured(given.folder, kind, card, num_proc) for _ in range(2))
            assert first["fingerprint"] == again["fingerprint"], (first, again)
            mb, s, cpu = size / 10**6, first["seconds"], first["cpu_s"]
            cells = [card.stem, num_proc, f"{first['rows']:,}", f"{mb:,.0f}", f"{s:.1f}",
                     f"{mb / s:.1f}", f"{cpu:.0f}", f"{2 * mb / cpu:.1f}", f"{first['own']:.2f}",
                     f"{first['whole']:.2f}", f"{again['seconds']:.1f}"]  # fmt: skip
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
            print({k: first[k] for k in ("dropped", "identity_s", "fingerprint")}, file=sys.stderr)


if __name__ == "__main__":
    main()
