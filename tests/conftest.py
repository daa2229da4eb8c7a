"""Small things that many tests need: a tokenizer, models and cards, made in seconds, offline."""

import atexit
import hashlib
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

os.environ.update(
    HF_DATASETS_CACHE=tempfile.mkdtemp(prefix="codexhf-tests-"),  # not the user's
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
)

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from codexhf.execution import Executor, Result, SandboxUnavailable, launchers, run_tests
from codexhf.tokenizer import new_tokenizer

torch.set_num_threads(1)
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

# A runner in the background ignores these; processes that tests start would inherit that.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

CORPUS = ["def add(a, b):\n    return a + b\n", "Write a function that adds two numbers.", "x = 12"]
ADD = "def f(a, b):\n    return a + b"


class StopAt(TrainerCallback):
    """Raise in the middle of training, as a crash would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise RuntimeError("crash")


def turn(role, content):
    return {"role": role, "content": content}


def read(path, split="train"):
    """Return a card's rows."""
    from codexhf.cards import load_card
    from codexhf.data import read_card

    return read_card(load_card(path), split)


def json_rows(folder: Path, names) -> dict[str, list[dict]]:
    """Name -> rows of name.jsonl."""
    files = {name: (folder / f"{name}.jsonl").read_text(encoding="ascii") for name in names}
    return {name: [json.loads(line) for line in text.splitlines()] for name, text in files.items()}


def judge(program, tests, entry_point="f", **limits) -> Result:
    """Run one program with the module's own pool."""
    return run_tests([program], [tests], [entry_point], **limits)[0]


def weights_hash(folder: Path) -> str:
    """One sha256 over a folder's weights: two runs are the same when this is."""
    files = sorted(folder.glob("*.safetensors"))
    assert files, folder
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def packed(texts, tokenizer, max_length):
    """Documents as the rows that pretraining takes."""
    from datasets import Dataset
    from datasets.table import InMemoryTable

    from codexhf.data import Data
    from codexhf.tokens import Packer, document_encoder

    packer, (ids, lengths) = Packer(max_length), document_encoder(tokenizer)(texts)
    table = packer.rows(ids, np.array(lengths), sum(len(text.encode()) for text in texts))
    return Data(Dataset(InMemoryTable(table)), stats=packer.stats())


def tiny_config(tokenizer, **fields):
    return LlamaConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            **fields,
        }
    )


@pytest.fixture(scope="session")
def tokenizer():
    return new_tokenizer(CORPUS * 3, vocab_size=320)


@pytest.fixture
def policy(tokenizer):
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(tokenizer))


@pytest.fixture
def model_folder(policy, tokenizer, tmp_path):
    """A saved policy with its tokenizer, as a stage leaves it."""
    folder = tmp_path / "model"
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def write_card(tmp_path):
    """Write rows and a card for them; returns the card's path."""

    def write(rows, type, name="card", **front):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        own = {"type": type, "load": {"path": "json", "data_files": f"{name}.jsonl"}}
        own |= front.pop("codexhf", {})
        head = json.dumps({"license": "mit", **front, "codexhf": own})  # JSON is YAML
        card = tmp_path / f"{name}.md"
        card.write_text(
            f"---\n{head}\n---\n# {name}\n## Provenance\nMade here.\n## Known problems\nNone.\n"
        )
        return str(card)

    return write


@pytest.fixture
def problems():
    """Rows of one problem with two call tests."""
    tests = [{"args": "(1, 2)", "expected": "3"}, {"args": "(0, 0)", "expected": "0"}]
    return [
        {
            "id": f"p{i}",
            "prompt": f"Add a and b, number {i}.",
            "completion": ADD,
            "tests": tests,
            "entry_point": "f",
        }
        for i in range(6)
    ]


@pytest.fixture(scope="module", params=[name for name in launchers.LAUNCHERS if name != "docker"])
def executor(request):
    """A pool of two behind each launcher that this machine has."""
    try:
        with Executor(2, launcher=launchers.LAUNCHERS[request.param]()) as made:
            yield made
    except SandboxUnavailable as error:
        pytest.skip(str(error))
