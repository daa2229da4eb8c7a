"""Serve the labelling page of one preferences stage, or export what was labelled.

    python -m codexhf.label runs/prefs
    python -m codexhf.label runs/prefs --labellers ann ben --overlap 2
    python -m codexhf.label runs/prefs --export --license cc-by-4.0

Reads   runs/prefs/unlabelled.jsonl.
Writes  runs/labels: labels.sqlite, tokens.json; with --export the data sets (see export.py).
"""

import argparse
import ipaddress
import json
import os
import re
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from codexhf.label_words import UNLABELLED
from codexhf.refusals import refuse

TAKEN = ("owner", "tests", "R")
"""Names that the page gives to others than labellers."""

REMOTE = """host: got {host}, which other machines can reach, without --public_url. Labels and
    tokens would cross the network in clear. Leave --host out and let people in with
    `ssh -L {port}:127.0.0.1:{port}`, or put a server with TLS in front, for example
    `caddy reverse-proxy --from label.example.org --to :{port}`, and give its address:
    --public_url https://label.example.org."""


def main(argv: Sequence[str] | None = None) -> int:
    """Serve or export; 0, or exit code 2 with everything that is wrong."""
    args = _parse(argv)
    errors = _errors(args)
    if errors:
        refuse(errors, "codexhf.label")
    from codexhf.label.store import Store

    output_dir = args.output_dir or args.prefs.parent / "labels"
    rows = [json.loads(line) for line in (args.prefs / UNLABELLED).read_text("utf-8").splitlines()]
    store = Store(output_dir / "labels.sqlite", args.seed)
    if args.export:
        from codexhf.label.export import export

        source = {"from": str(args.prefs), "seed": store.seed}
        try:
            counts = export(store, output_dir, args.license, source)
        except ValueError as error:
            refuse([str(error)], "codexhf.label")
        print(f"label: {json.dumps(counts)}\nlabel: --train_cards {output_dir} "
              f"--eval_cards {output_dir}/test.md")  # fmt: skip
        return 0
    _revise(rows, args.prefs)
    if args.reward_model:
        _score(rows, args.reward_model)
    store.load(rows)
    _serve(args, store, output_dir)
    return 0


def _parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m codexhf.label", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("prefs", type=Path, help=f"folder of the preferences stage, with {UNLABELLED}")
    add("--output_dir", type=Path, help="where labels are kept; default: labels next to PREFS")
    add("--labellers", nargs="*", default=[], help="names besides owner; each gets an address")
    add("--overlap", type=int, default=1, help="people that each pair is shown to (default 1)")
    add("--reveal", choices=("after", "never"), default="after",
        help="show verdict and score once a label is stored (default after)")  # fmt: skip
    add("--instructions", type=Path, help="Markdown for labellers; default: ours")
    add("--reward_model", help="R, whose scores are compared with the labels")
    add("--timeout_s", type=float, default=3.0, help="seconds a demonstration's tests may take")
    add("--unsafe_exec", help="as in recipes/preferences.py")
    add("--seed", type=int, default=42, help="which answer stands left; the first start keeps it")
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    add("--port", type=int, default=8014, help="default 8014")
    add("--public_url", help="https address of the server with TLS that stands in front")
    add("--export", action="store_true", help="write the data sets and stop")
    add("--license", help="of the exported data, such as cc-by-4.0")
    return parser.parse_args(argv)


def _errors(args: argparse.Namespace) -> list[str]:
    errors = []
    if not (args.prefs / UNLABELLED).is_file():
        errors.append(
            f"prefs: got {str(args.prefs)!r}, a folder without {UNLABELLED}. Run "
            "recipes/preferences.py with `label_by: people` or `both` first."
        )
    if args.overlap < 1:
        errors.append(f"overlap: got {args.overlap}, expected at least 1.")
    if not 1 <= args.port <= 65535:
        errors.append(f"port: got {args.port}, expected between 1 and 65535.")
    for name in args.labellers:
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,32}", name) or name in TAKEN:
            taken = ", ".join(TAKEN)
            errors.append(f"labellers: got {name!r}, expected letters, digits, _ . -, not {taken}.")
    if args.instructions and not args.instructions.is_file():
        errors.append(f"instructions: got {str(args.instructions)!r}, which does not exist.")
    if args.public_url and urlsplit(args.public_url)[:1] != ("https",):
        errors.append(f"public_url: got {args.public_url!r}, expected https://...")
    if not _loopback(args.host) and not args.public_url:
        errors.append(REMOTE.format(host=args.host, port=args.port))
    if args.export and not args.license:
        errors.append("license: missing. Say under what licence the labels are, as cc-by-4.0.")
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        errors.append(f"the package {error.name} is missing. pip install 'codexhf[label]'")
    return errors


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _tokens(path: Path, names: Sequence[str]) -> dict[str, str]:
    """name -> token, kept in a file of its own so that the database can be given away."""
    tokens = json.loads(path.read_text()) if path.is_file() else {}
    tokens = {n: tokens.get(n) or secrets.token_urlsafe(24) for n in (*tokens, "owner", *names)}
    temporary = path.with_name(".tokens.new")
    with open(os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:
        json.dump(tokens, file, indent=1)
    os.replace(temporary, path)
    return tokens


def _revise(rows: list[dict], prefs: Path) -> None:
    """Put the hash of the weights that wrote each answer into the rows, from the manifest."""
    try:
        parents = json.loads((prefs / "manifest.json").read_text("utf-8"))["parents"].values()
    except FileNotFoundError:
        return
    revisions = {
        parent["path"]: "+".join(
            f"sha256:{digest}"
            for name, digest in sorted(parent["sha256"].items())
            if name.endswith(".safetensors")
        )
        for parent in parents
    }
    for row in rows:
        for side in "ab":
            row[f"revision_{side}"] = revisions.get(row[f"model_{side}"])


def _score(rows: list[dict], reward_model: str) -> None:
    from codexhf.reward_model import load_model_reward

    reward = load_model_reward(reward_model)
    prompts = [row["prompt"] for row in rows]
    for side in ("a", "b"):
        scores = reward(prompts, [row[f"response_{side}"] for row in rows])
        for row, score in zip(rows, scores, strict=True):
            row[f"reward_{side}"] = score


def _serve(args: argparse.Namespace, store, output_dir: Path) -> None:
    import uvicorn

    from codexhf.execution import SandboxUnavailable, check_isolation
    from codexhf.label.app import HERE, Page, Settings, sandbox_check

    check = None
    try:
        check_isolation(args.unsafe_exec)
        check = sandbox_check(args.timeout_s)
    except (SandboxUnavailable, ValueError) as error:
        print(f"label: demonstrations are not tested: {error}", file=sys.stderr)
    names = [f"[{args.host}]" if ":" in args.host else args.host, "127.0.0.1", "localhost"]
    local = dict.fromkeys(
        f"http://{name}:{args.port}" for name in names if _loopback(name.strip("[]"))
    )
    public = args.public_url.rstrip("/") if args.public_url else None
    origins = tuple([public] if public else []) + tuple(local)
    tokens = _tokens(output_dir / "tokens.json", args.labellers)
    settings = Settings(
        tokens={token: name for name, token in tokens.items()},
        origins=origins,
        overlap=args.overlap,
        reveal=args.reveal == "after",
        instructions=(args.instructions or HERE / "instructions.md").read_text("utf-8"),
        check=check,
    )
    for name, token in tokens.items():
        print(f"label: {name}: {origins[0]}/?token={token}", flush=True)
    uvicorn.run(
        Page(store, settings).app(),
        host=args.host,
        port=args.port,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=64,
        timeout_keep_alive=10,
    )


if __name__ == "__main__":
    sys.exit(main())
