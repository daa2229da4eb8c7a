"""Push, pull, verify and model cards: the real hub client against an HTTP server of our own.

python -m pytest tests/test_hub.py

The runs are made by run_stage and run_task. Uploads take the git-lfs way (HF_HUB_DISABLE_XET): the
server speaks no Xet.
"""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from codexhf import checkpoints, hub, launch, run
from codexhf.adapters import lora_config, merge_adapters
from codexhf.arguments import (
    PPOArguments,
    PreferencesArguments,
    PretrainArguments,
    PushArguments,
    RewardModelArguments,
    SFTArguments,
    TokenizerArguments,
)
from codexhf.cards import load_card
from codexhf.data import load_split
from codexhf.identity import load_manifest
from codexhf.label.export import export
from codexhf.label.store import Store
from codexhf.model_card import strictest
from codexhf.models import context_length, load_policy
from codexhf.parsing import parse
from codexhf.preferences import write_card as write_pairs_card
from codexhf.push import push
from codexhf.reward_model import load_model_reward, load_reward_model
from codexhf.tokenizer import load_tokenizer
from conftest import tiny_config, weights_hash
from hub_server import TOKEN, HubServer, Repo

ROOT = Path(__file__).parent.parent
PROMPT = "Write a function that adds two numbers."
STAGES = "--hub org/x --stages tokenizer m0".split()
ANSWER = "def add(a, b):\n    return a + b"


# -- a finished run and a hub ------------------------------------------------------------------


def finish(folder, model, tokenizer, stage, parents, data, end=None):
    """One step of training of `model`, ended by run_stage."""
    rows = tokenizer(["x = 1", "y = 2"])["input_ids"]
    row = {"input_ids": [ids[:3] for ids in rows]}
    scalar = isinstance(model, LlamaForSequenceClassification)
    row["labels"] = [0.5, 1.0] if scalar else row["input_ids"]
    training = TrainingArguments(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=2, use_cpu=True,
        report_to="none", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=training, train_dataset=Dataset.from_dict(row), processing_class=tokenizer
    )
    run.run_stage(trainer, stage, training, data=data, parents=parents, finish=end)


@pytest.fixture(scope="module")
def finished(tokenizer, tmp_path_factory):
    """Folder with runs/ of every stage up to M2, and the cards that these were made from."""
    root = tmp_path_factory.mktemp("finished")
    before = Path.cwd()
    os.chdir(root)  # manifests record relative paths, as those of `make pipeline` do
    try:
        Path("cards").mkdir()
        for name, type, rows in (
            ("corpus", "language-modeling", [{"text": f"x{i} = {i}"} for i in range(9)]),
            ("chats", "prompt-completion", [{"prompt": PROMPT, "completion": ANSWER}]),
        ):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            Path(f"cards/{name}.jsonl").write_text(text)
            load = {"path": "json", "data_files": f"{name}.jsonl"}
            front = {"license": "mit", "codexhf": {"type": type, "load": load}}
            body = "## Provenance\nHere.\n## Known problems\nNone.\n"
            Path(f"cards/{name}.md").write_text(f"---\n{json.dumps(front)}\n---\n{body}")
        corpus = load_split(["cards/corpus.md"], "language-modeling")
        chats = load_split(["cards/chats.md"], "prompt-completion")
        run.run_task(
            TokenizerArguments(output_dir="runs/tokenizer", train_cards=["cards/corpus.md"]),
            lambda folder: bool(tokenizer.save_pretrained(folder)) and {"vocab_size": 320},
            data={"train": corpus}, parents={},
        )  # fmt: skip
        torch.manual_seed(0)
        policy = LlamaForCausalLM(tiny_config(tokenizer))
        finish("runs/m0", policy, tokenizer, PretrainArguments(tokenizer="runs/tokenizer"),
               {"tokenizer": "runs/tokenizer"}, {"train": corpus})  # fmt: skip
        finish("runs/m1", policy, tokenizer, SFTArguments(model="runs/m0"), {"m0": "runs/m0"},
               {"train": chats})  # fmt: skip

        def pairs(folder):
            row = {"prompt": PROMPT, "chosen": ANSWER, "rejected": "pass"}
            for name in ("train", "test", "prompts"):
                (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
            (folder / ".env").write_text("never to be sent")  # and recorded in the manifest
            write_pairs_card(folder / "test.md", type="preference", title="t", problems="p")
            return {"train_pairs": 1, "test_pairs": 1}

        chosen = PreferencesArguments(output_dir="runs/prefs", exclude_cards=["/home/me/a.md"])
        run.run_task(chosen, pairs,
                     data={"prompts": chats}, parents={"m1": "runs/m1"})  # fmt: skip
        reward = LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=1))
        reward.config.score_mean, reward.config.score_std = 0.25, 2.0
        finish("runs/rm", reward, tokenizer, RewardModelArguments(model="runs/m1"),
               {"m1": "runs/m1"},
               {"train": load_split(["runs/prefs"], "preference"),
                "test": load_split(["runs/prefs/test.md"], "preference")})  # fmt: skip
        finish("runs/m2", policy, tokenizer, PPOArguments(model="runs/m1", reward_model="runs/rm"),
               {"m1": "runs/m1", "rm": "runs/rm"}, {"demonstrations": chats})  # fmt: skip
    finally:
        os.chdir(before)
    return root


@pytest.fixture
def here(finished, tmp_path, monkeypatch):
    """A copy of the finished run as working directory, with things that must never leave it."""
    shutil.copytree(finished, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    for name in (".env", "optimizer.pt", "training_args.bin", "notes.txt", "model.pkl"):
        Path("runs/m1", name).write_text("never to be sent")
    return tmp_path / "work"


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A hub, and this process as its client."""
    constants = huggingface_hub.constants
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        url = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        hub._fetch.cache_clear()
        yield server
    hub._fetch.cache_clear()


def pushed(**fields):
    return push(PushArguments(**{"hub": "org/x", **fields}))


def commits(server):
    return sum(request.startswith("POST") and "/commit/" in request for request in server.requests)


def environment(server, **more):
    return {
        **os.environ, "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN, "PYTHONPATH": str(ROOT / "src"), **more,
    }  # fmt: skip


# -- push --------------------------------------------------------------------------------------


def test_a_run_is_pushed_privately_once_and_nothing_else_with_it(here, server):
    names = pushed()
    assert list(names) == [
        "cards/corpus.md", "cards/chats.md", "runs/tokenizer", "runs/m0", "runs/m1", "runs/prefs",
        "runs/rm", "runs/m2",
    ]  # fmt: skip
    assert all(repo.private and len(repo.commits) == 2 for repo in server.repos.values())
    assert set(server.files("org/x-m1")) == {
        "README.md", "manifest.json", "model.safetensors", "config.json", "tokenizer.json",
        "generation_config.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert not [body for body in server.sent if b"never to be sent" in body]
    assert not [body for body in server.sent if TOKEN.encode() in body]
    before = commits(server)
    assert pushed() == names
    assert commits(server) == before
    assert all(len(repo.commits) == 2 for repo in server.repos.values())


def test_what_changed_is_one_commit_and_what_is_gone_is_deleted(here, server):
    names = pushed(stages=["tokenizer"])
    repo = server.repos["model", "org/x-tokenizer"]
    repo.commit({**repo.commits[-1][1], "special_tokens_map.json": b"{}", "README.md": b"old"})
    again = pushed(stages=["tokenizer"])
    assert len(repo.commits) == 4 and again != names
    assert "special_tokens_map.json" not in repo.commits[-1][1]
    assert repo.commits[-1][1] == repo.commits[1][1]


def test_a_stage_alone_needs_its_parents_there(here, server):
    for hub_, there in (("org/x", "org/x-tokenizer"), ("./out/x", "out/x-tokenizer")):
        with pytest.raises(ValueError, match=f"{there}: not there|{there}: not pushed"):
            pushed(stages=["m0"], hub=hub_)
        pushed(stages=["tokenizer"], hub=hub_)
        names = pushed(stages=["m0"], hub=hub_)
    manifest = json.loads(server.files("org/x-m0")["manifest.json"])
    tokenizer = server.repos["model", "org/x-tokenizer"].commits[-1][0]
    assert manifest["parents"]["tokenizer"]["path"] == f"org/x-tokenizer@{tokenizer}"
    assert "runs/m1" not in names


def test_dry_run_shows_files_bytes_and_visibility_and_asks_nobody(here, server, capsys):
    assert pushed(dry_run=True) == {} and not server.requests
    out = capsys.readouterr().out
    size = Path("runs/m1/model.safetensors").stat().st_size
    assert f"{size:,}  model.safetensors" in out and "org/x-m1  (model, private, 8 files" in out
    assert ".env" not in out


@pytest.mark.parametrize(
    "run, parents, stage",
    [("here", ["tokenizer"], "m0"), ("adapters", ["tokenizer", "m0"], "m1")],
    ids=["model", "adapter"],
)
def test_a_fault_at_any_request_leaves_the_old_state_or_the_new(
    run, parents, stage, request, server
):
    request.getfixturevalue(run)
    pushed(stages=parents)
    begin = len(server.requests)
    pushed(stages=[stage])
    repository = "model", f"org/x-{stage}"
    requests = list(enumerate(server.requests[begin:], 1))
    wanted = server.repos[repository].commits[-1][1]
    faults = [
        (kind, number)
        for kind in (500, "drop", "lose", "flip")
        for number, sent in requests
        if kind != "flip" or sent.startswith("PUT")
    ]
    assert len(faults) > 30
    stopped = 0
    for kind, at in faults:
        del server.repos[repository]
        server.objects.clear(), server.requests.clear()
        server.fault = lambda number, _, kind=kind, at=at: kind if number == at else None
        try:
            pushed(stages=[stage])
        except ValueError as error:
            stopped += 1
            assert "\n" not in str(error)
        repo = server.repos.get(repository)
        assert repo is None or len(repo.commits) == 1 or repo.commits[1][1] == wanted
        server.fault = lambda number, request: None
        pushed(stages=[stage])
        assert [files for _, files in server.repos[repository].commits[1:]] == [wanted]
    assert stopped < 3  # nearly all are overcome without a second start


def test_kill_in_the_middle_of_a_push(here, server):
    argv = [sys.executable, str(ROOT / "recipes/push.py"), *STAGES]
    process = subprocess.Popen(argv, env=environment(server), stdout=subprocess.DEVNULL)

    def kill(number, request):
        if request.startswith("POST /api/models/org/x-m0/commit"):
            process.send_signal(signal.SIGKILL)
            process.wait()
            return "drop"
        return None

    server.fault = kill
    assert process.wait(60) == -signal.SIGKILL
    assert server.files("org/x-m0") == {}
    server.fault = lambda number, request: None
    pushed(stages=["tokenizer", "m0"])
    assert "model.safetensors" in server.files("org/x-m0")


def test_a_commit_of_somebody_else_is_not_overwritten(here, server):
    pushed(stages=["tokenizer"])
    repo = server.repos["model", "org/x-tokenizer"]
    theirs = {**repo.commits[-1][1], "README.md": b"theirs"}
    card = Path("runs/tokenizer/README.md")
    card.write_text(card.read_text().replace("license: mit", "license: apache-2.0"))
    manifest = json.loads(Path("runs/tokenizer/manifest.json").read_text())
    manifest["files"]["README.md"]["sha256"] = checkpoints.sha256(card)
    Path("runs/tokenizer/manifest.json").write_text(json.dumps(manifest))

    def race(number, request):
        if "x-tokenizer/commit/" in request and len(repo.commits) == 2:
            repo.commit(theirs)
        return None

    server.fault = race
    with pytest.raises(ValueError, match="somebody else changed it meanwhile. Push again."):
        pushed(stages=["tokenizer"])
    assert repo.commits[-1][1] == theirs
    pushed(stages=["tokenizer"])
    assert b"license: apache-2.0" in server.files("org/x-tokenizer")["README.md"]


def spoil_weights():
    data = bytearray(Path("runs/m1/model.safetensors").read_bytes())
    data[-1] ^= 1
    Path("runs/m1/model.safetensors").write_bytes(data)


def other_parent():
    manifest = json.loads(Path("runs/m1/manifest.json").read_text())
    manifest["parents"]["m0"]["sha256"]["model.safetensors"] = "0" * 64
    Path("runs/m1/manifest.json").write_text(json.dumps(manifest))


def write_secret():
    with open("cards/chats.md", "a") as file:
        file.write(f"\nlogin with {'hf_' + 'a' * 34}\n")


def change_data():
    Path("cards/chats.jsonl").write_text("{}\n")


def unknown_license():
    card = Path("runs/m1/README.md")
    card.write_text(card.read_text().replace("license: mit", "license: other"))
    manifest = json.loads(Path("runs/m1/manifest.json").read_text())
    manifest["files"]["README.md"]["sha256"] = checkpoints.sha256(card)
    Path("runs/m1/manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("spoil", "fields", "said"),
    [
        (spoil_weights, {}, r"runs/m1 \(asked for\): model.safetensors has changed"),
        (
            other_parent,
            {},
            r"runs/m0 \(m0 of runs/m1\): model.safetensors has changed",
        ),
        (write_secret, {}, r"cards/chats.md: README.md:\d+ holds what looks like a key or token"),
        (
            change_data,
            {},
            r"cards/chats.md \(train data of runs/m1\): chats.jsonl has changed",
        ),
        (unknown_license, {}, "runs/m1: no licence is known to fit all sources"),
        (lambda: None, {"hub": "m1"}, "hub: got 'm1', expected org/prefix"),
        (lambda: None, {"stages": ["rms"]}, "stages: unknown 'rms'. Did you mean 'rm'"),
        (lambda: None, {"stages": ["evaluation"]}, "runs/evaluation: not finished"),
        (lambda: None, {"runs": "elsewhere"}, "no finished stage in elsewhere"),
    ],
)
def test_what_must_not_be_pushed_is_refused_before_anything_is_sent(
    here, server, spoil, fields, said, capsys
):
    spoil()
    with pytest.raises(SystemExit) as stop:
        pushed(**fields)
    assert stop.value.code == 2 and re.search(said, capsys.readouterr().err)
    assert not server.requests


def test_a_public_or_foreign_repository_is_refused(here, server):
    pushed(stages=["tokenizer"], public=True)
    server.repos["model", "org/x-tokenizer"].private = False
    with pytest.raises(ValueError, match="org/x-corpus: is public already"):
        pushed(stages=["tokenizer"])
    server.repos["model", "org/y-m0"] = Repo(True)
    server.repos["model", "org/y-m0"].commit({"pytorch_model.bin": b"x"})
    with pytest.raises(ValueError, match="org/y-m0: holds pytorch_model.bin, which"):
        pushed(stages=["tokenizer", "m0"], hub="org/y")
    assert server.files("org/y-m0") == {"pytorch_model.bin": b"x"}


@pytest.mark.parametrize(
    ("lacking", "said"), [("token", "Set HF_TOKEN"), ("network", "org/x-corpus: not pushed, Conn")]
)
def test_without_token_or_network_it_is_one_sentence_and_exit_code_2(
    here, server, lacking, said, capsys, monkeypatch
):
    token = "hf_" + "w" * 34
    monkeypatch.setattr(launch, "begun", False)  # the stages of this process are over
    monkeypatch.setenv("HF_TOKEN", token)
    if lacking == "network":
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SystemExit) as stop:
        launch.launch(pushed)
    out = "".join(capsys.readouterr())
    assert stop.value.code == 2 and said in out and "Nothing is lost" in out
    assert token not in out and "Traceback" not in out and not server.repos


def test_a_local_folder_of_the_same_shape(here, tmp_path, capsys):
    pushed(hub="./out/x")
    assert "pushed" in capsys.readouterr().out
    assert weights_hash(here / "out/x-m2") == weights_hash(here / "runs/m2")
    text = Path("out/x-m2/manifest.json").read_text() + Path("out/x-m2/README.md").read_text()
    assert "runs/" not in text and str(here) not in text
    assert not Path("out/x-m1/.env").exists()
    pushed(hub="./out/x")
    assert ": pushed" not in capsys.readouterr().out
    shutil.rmtree("runs"), shutil.rmtree("cards"), Path("out").rename("moved")
    assert len(hub.verify("moved/x-m2")) == 11


# -- people's labels -----------------------------------------------------------------------------


@pytest.fixture
def labelled(here, tokenizer):
    """Two pairs labelled and one answer written on the page, exported, and R made from them."""
    store = Store(Path("runs/labels/labels.sqlite"))
    prompts = [f"{PROMPT} ({i})" for i in range(2)]
    pair = {"response_a": ANSWER, "response_b": "pass"}
    rows = [
        {"id": p, "prompt": p, "split": s, **pair}
        for p, s in zip(prompts, ("train", "test"), strict=True)
    ]
    store.load(rows)
    for i in range(2):
        chosen = store.assign("ann", "t")
        left = store.left(chosen, "ann")
        store.label(f"request-{i}", chosen, "ann", "a", version=0, left=left)
    written = {"completion": ANSWER, "started_from": "nothing", "verdict": None, "seconds": 1.0}
    store.demonstrate("request-3", chosen, "ann", **written)
    Path("runs/labels/tokens.json").write_text(json.dumps({"ann": "never to be sent"}))
    source = {"from": "runs/prefs", "revision": None, "seed": store.seed}
    export(store, Path("runs/labels"), "cc-by-4.0", source)
    store.close()
    return here


def test_what_people_said_goes_out_and_comes_back_as_one_data_set(
    labelled, server, tokenizer, tmp_path
):
    shutil.rmtree("runs/rm"), shutil.rmtree("runs/m2")
    data = {
        "train": load_split(["runs/labels"], "preference"),
        "test": load_split(["runs/labels/test.md"], "preference"),
    }
    reward = LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=1))
    finish("runs/rm", reward, tokenizer, RewardModelArguments(), {"m1": "runs/m1"}, data)
    names = pushed()
    assert names["runs/labels"].startswith("org/x-labels@")
    assert set(server.files("org/x-labels", "dataset")) == {
        "README.md", "train.jsonl", "test.md", "test.jsonl", "demonstrations.md",
        "demonstrations.jsonl", "history.jsonl", "agreement.json",
    }  # fmt: skip
    assert not [body for body in server.sent if b"never to be sent" in body]
    front = huggingface_hub.ModelCard(server.files("org/x-rm")["README.md"].decode()).data
    assert (front.license, front.datasets) == ("cc-by-4.0", ["org/x-labels"])
    shutil.rmtree("runs")
    links = hub.verify("org/x-rm")
    used = [link for link in links if "data of org/x-rm" in link]
    assert {link.partition(" (")[0] for link in used} == {
        names["runs/labels"], f"{names['runs/labels']}/test.md",
    }  # fmt: skip
    written = load_split([f"{names['runs/labels']}/demonstrations.md"], "prompt-completion")
    assert written.dataset[0]["completion"] == ANSWER
    hub.pull("org/x", Path("again"))
    assert len(load_split(["again/labels"], "preference").dataset) == 1
    again = pushed(runs="again")
    assert again["again/labels"] == names["runs/labels"]  # nothing to change


def test_two_cards_of_one_name_are_not_one_repository(here, server, capsys, tokenizer):
    shutil.copytree("cards", "more")
    Path("more/corpus.jsonl").write_text('{"text": "another"}\n')
    shutil.rmtree("runs/m0")
    data = {"train": load_split(["more/corpus.md"], "language-modeling")}
    policy = LlamaForCausalLM(tiny_config(tokenizer))
    stage = PretrainArguments(tokenizer="runs/tokenizer")
    finish("runs/m0", policy, tokenizer, stage, {"tokenizer": "runs/tokenizer"}, data)
    with pytest.raises(SystemExit):
        pushed(stages=["tokenizer", "m0"])
    said = "more/corpus.md: would go to the repository of cards/corpus.md, as both are called"
    assert said in capsys.readouterr().err and not server.requests


def test_pairs_that_wait_for_people_go_out_as_well(here, server):
    def queue(folder):
        (folder / "unlabelled.jsonl").write_text(json.dumps({"id": "1", "prompt": PROMPT}) + "\n")
        (folder / "prompts.jsonl").write_text("{}\n")
        return {"pairs_to_label": 1}

    stage = PreferencesArguments(output_dir="runs/prefs", label_by="people", restart=True)
    chats = load_split(["cards/chats.md"], "prompt-completion")
    run.run_task(stage, queue, data={"prompts": chats}, parents={"m1": "runs/m1"})
    pushed(stages=["tokenizer", "m0", "m1", "prefs"])
    files = server.files("org/x-prefs", "dataset")
    assert "unlabelled.jsonl" in files
    front = huggingface_hub.DatasetCard(files["README.md"].decode()).data
    assert front["configs"][0]["data_files"] == [
        {"split": "unlabelled", "path": "unlabelled.jsonl"}
    ]
    assert "codexhf" not in front.to_dict()  # nothing to train on yet


# -- LoRA --------------------------------------------------------------------------------------


def with_adapter(folder, base, tokenizer, stage, seed):
    """A stage's folder as recipes/sft.py and ppo.py leave it with --use_peft."""
    torch.manual_seed(seed)
    model = get_peft_model(load_policy(base), lora_config(stage))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.05)
    parents = {("m0" if isinstance(stage, SFTArguments) else "m1"): base}
    data = {"train": load_split(["cards/chats.md"], "prompt-completion")}
    finish(folder, model, tokenizer, stage, parents, data, merge_adapters)


@pytest.fixture(scope="module")
def lora(finished, tokenizer, tmp_path_factory):
    """A run whose M1 is a LoRA stage, and R was made from it."""
    root = tmp_path_factory.mktemp("lora") / "work"
    shutil.copytree(finished, root)
    with contextlib.chdir(root):
        for name in ("m1", "prefs", "rm", "m2"):
            shutil.rmtree(f"runs/{name}")
        stage = SFTArguments(model="runs/m0", use_peft=True, lora_r=4)
        with_adapter("runs/m1", "runs/m0", tokenizer, stage, 1)
        reward = load_reward_model("runs/m1", new_head=True)
        data = {"train": load_split(["cards/chats.md"], "prompt-completion")}
        finish("runs/rm", reward, tokenizer, RewardModelArguments(), {"m1": "runs/m1"}, data)
    return root


@pytest.fixture
def adapters(lora, tmp_path, monkeypatch):
    shutil.copytree(lora, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")


def test_a_lora_stage_goes_out_as_an_adapter_and_comes_back(
    adapters, server, tokenizer, tmp_path, capsys
):
    names = pushed()
    assert "org/x-m1  (model, adapter, private, 9 files" in capsys.readouterr().out
    files = server.files("org/x-m1")
    assert set(files) == {
        "README.md", "manifest.json", "adapter_model.safetensors", "adapter_config.json",
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip
    config = json.loads(files["adapter_config.json"])
    base, _, commit = names["runs/m0"].partition("@")
    assert (config["base_model_name_or_path"], config["revision"]) == (base, commit)
    card = huggingface_hub.ModelCard(files["README.md"].decode())
    card.validate()
    assert (card.data.base_model, card.data.base_model_relation) == ("org/x-m0", "adapter")
    assert card.data.library_name == "peft"
    weights = LlamaForCausalLM.from_pretrained("runs/m1").state_dict()
    score = load_reward_model("runs/m1", new_head=True).state_dict()
    shutil.rmtree("runs")
    for name in ("org/x-m1", names["runs/m1"]):
        loaded = load_policy(name, load_tokenizer(name))
        assert all(torch.equal(weights[key], w) for key, w in loaded.state_dict().items())
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    assert context_length("org/x-m1") == 128
    again = load_reward_model("org/x-m1", new_head=True).state_dict()
    assert all(torch.equal(score[key], again[key]) for key in score)
    code = snippet(files["README.md"].decode())
    code += "print(type(model).__name__, model.base_model.model.name_or_path)"
    env = environment(server, HF_HOME=str(tmp_path / "home"))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "PeftModelForCausalLM org/x-m0" in done.stdout
    links = [link.partition(" ")[0] for link in hub.verify("org/x-rm")]
    assert links[:3] == ["org/x-rm", names["runs/m1"], names["runs/m0"]]


def test_a_stage_goes_on_from_a_pulled_adapter(adapters, server, tokenizer):
    expected = LlamaForCausalLM.from_pretrained("runs/m1").state_dict()
    pushed()
    shutil.rmtree("runs")
    hub.pull("org/x", Path("again"))
    loaded = load_policy("again/m1").state_dict()
    assert all(torch.equal(expected[key], loaded[key]) for key in expected)
    stage = PPOArguments(model="again/m1", reward_model="again/rm")
    parents = {"m1": "again/m1", "rm": "again/rm"}
    finish("again/m2", load_policy("again/m1"), tokenizer, stage, parents, {})
    assert [link.partition(" ")[0] for link in hub.verify("again/m2")][:2] == [
        "again/m2", "again/m1",
    ]  # fmt: skip
    front = huggingface_hub.ModelCard.load("again/m2/README.md").data
    assert (front.base_model, front.base_model_relation) == ("org/x-m1", "finetune")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_byte_flipped_in_an_adapter_is_seen(adapters, server, file):
    pushed()
    repo = server.repos["model", "org/x-m1"]
    data = bytearray(repo.commits[-1][1][file])
    data[len(data) // 2] ^= 1
    repo.commits[-1][1][file] = bytes(data)
    with pytest.raises(ValueError, match=f"{file} has changed"):
        hub.verify("org/x-rm")


def test_a_lora_stage_goes_out_merged_on_request(adapters, server, capsys):
    pushed(merged=True)
    assert "org/x-m1  (model, merged, private" in capsys.readouterr().out
    files = server.files("org/x-m1")
    assert files["model.safetensors"] == Path("runs/m1/model.safetensors").read_bytes()
    assert not [name for name in files if "adapter" in name]
    front = huggingface_hub.ModelCard(files["README.md"].decode()).data
    assert (front.base_model_relation, front.library_name) == ("finetune", "transformers")
    assert len(hub.verify("org/x-rm")) == 8
    pushed()  # now as an adapter: whole models are gone
    assert "model.safetensors" not in server.files("org/x-m1")


def test_an_adapter_on_an_adapter_stands_on_merged_weights(adapters, server, tokenizer, capsys):
    stage = PPOArguments(model="runs/m1", use_peft=True, lora_r=4)
    with_adapter("runs/m2", "runs/m1", tokenizer, stage, 2)
    expected = LlamaForCausalLM.from_pretrained("runs/m2").state_dict()
    pushed()
    out = capsys.readouterr().out
    assert "org/x-m1  (model, merged, since the adapter of m2 stands on it, private" in out
    assert "org/x-m2  (model, adapter, private" in out
    shutil.rmtree("runs")
    found = load_policy("org/x-m2").state_dict()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_an_adapter_needs_a_base_that_others_can_find(adapters, server, tokenizer, capsys):
    LlamaForCausalLM.from_pretrained("runs/m0").save_pretrained("mine")
    tokenizer.save_pretrained("mine")
    shutil.rmtree("runs")
    stage = SFTArguments(model="mine", use_peft=True, lora_r=4)
    with_adapter("runs/m1", "mine", tokenizer, stage, 1)
    with pytest.raises(SystemExit):
        pushed(license="mit")
    said = "runs/m1: its adapter stands on mine, which has no hub name. Push it"
    assert said in capsys.readouterr().err and not server.requests
    pushed(license="mit", merged=True)
    hub.publish(Path("mine"), "org/base@main")
    pushed(license="mit")
    config = json.loads(server.files("org/x-m1")["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "main")


# -- pull --------------------------------------------------------------------------------------


def test_every_loader_takes_a_hub_name(here, server, tokenizer):
    names = pushed()
    weights = LlamaForCausalLM.from_pretrained("runs/m1").state_dict()
    score = load_model_reward("runs/rm")([PROMPT], [ANSWER])
    shutil.rmtree("runs")
    for name in ("org/x-m1", names["runs/m1"], "org/x-m1@main"):
        loaded = load_policy(name, load_tokenizer(name)).state_dict()
        assert all(torch.equal(weights[key], loaded[key]) for key in weights)
    assert load_model_reward("org/x-rm")([PROMPT], [ANSWER]) == score
    card = load_card(names["runs/prefs"])
    assert (card.name, card.type, card.source) == ("x-prefs", "preference", names["runs/prefs"])
    for name in (names["runs/prefs"], f"{names['runs/prefs']}/test.md"):
        data = load_split([name], "preference")
        assert len(data.dataset) == 1
    assert (hub.short_name("org/x-m1"), hub.short_name("runs/m1")) == ("m1", "runs/m1")


def test_a_stage_goes_on_from_the_hub_and_its_lineage_can_be_walked(here, server, tokenizer):
    names = pushed()
    shutil.rmtree("runs"), shutil.rmtree("cards")
    model = load_policy(names["runs/m0"])
    data = {"train": load_split([names["cards/chats.md"]], "prompt-completion")}
    stage = SFTArguments(model=names["runs/m0"])
    finish("runs/m1", model, tokenizer, stage, {"m0": names["runs/m0"]}, data)
    manifest = load_manifest("runs/m1")
    assert manifest["parents"]["m0"]["path"] == names["runs/m0"]
    assert manifest["data"]["train"]["cards"]["x-chats"]["card"] == names["cards/chats.md"]
    front = huggingface_hub.ModelCard.load("runs/m1/README.md").data
    assert (front.base_model, front.base_model_relation) == ("org/x-m0", "finetune")
    assert front.datasets == ["org/x-chats"] and front.license == "mit"
    links = hub.verify("runs/m1")
    assert [link.split(" ")[0] for link in links][:3] == [
        "runs/m1", names["runs/m0"], names["runs/tokenizer"],
    ]  # fmt: skip


def test_a_whole_run_is_pulled_and_verified(here, server):
    pushed()
    hub.pull("org/x", Path("again"))
    for stage in ("m0", "m1", "rm", "m2"):
        assert weights_hash(here / "again" / stage) == weights_hash(here / "runs" / stage)
        assert hub.fault(Path("again", stage)) is None
    assert not [p for p in Path("again").rglob("*") if p.is_symlink()]
    times = [Path("again", s, "manifest.json").stat().st_mtime_ns for s in ("m0", "m1", "rm", "m2")]
    assert times == sorted(times)  # so that make finds nothing to do
    with pytest.raises(ValueError, match="again: there already"):
        hub.pull("org/x", Path("again"))
    with pytest.raises(ValueError, match="hub: got 'org/x@main', expected org/prefix"):
        hub.pull("org/x@main", Path("z"))
    with pytest.raises(ValueError, match="no org/z-m0"):
        hub.pull("org/z", Path("z"))


def test_a_byte_flipped_on_the_way_is_seen(here, server, tmp_path):
    name = pushed()["runs/m0"]
    weights, seen = "x-m0/resolve", []

    def flip(number, request, times):
        if request.startswith("GET") and weights in request and request.endswith(".safetensors"):
            seen.append(request)
            return "flip" if len(seen) <= times else None
        return None

    server.fault = lambda number, request: flip(number, request, 1)
    assert hub.fault(hub.resolve(name)) is None and len(seen) == 2  # fetched anew
    shutil.rmtree(tmp_path / "cache"), hub._fetch.cache_clear(), seen.clear()
    server.fault = lambda number, request: flip(number, request, 9)
    with pytest.raises(ValueError, match="model.safetensors has changed, .* second download"):
        load_policy(name)


def test_a_model_from_outside_is_checked_against_the_hub(here, server, model_folder, tmp_path):
    files = {p.name: p.read_bytes() for p in model_folder.iterdir()}
    server.repos["model", "org/base"] = repo = Repo(False)
    sha = repo.commit({**files, "evil.py": b"raise SystemExit", "pytorch_model.bin": b"pickle"})
    assert hub.pin("org/base") == f"org/base@{sha}"
    held = {path.name for path in hub.resolve("org/base").iterdir()}
    assert held == set(files)
    shutil.rmtree(tmp_path / "cache"), hub._fetch.cache_clear()
    server.fault = lambda n, request: (
        "flip" if request.startswith("GET") and request.endswith(".safetensors") else None
    )
    with pytest.raises(ValueError, match="model.safetensors is not what the hub has"):
        load_policy("org/base")


def test_a_private_repository_needs_the_token(here, server, monkeypatch):
    pushed(stages=["tokenizer"])
    monkeypatch.setenv("HF_TOKEN", "hf_" + "w" * 34)
    with pytest.raises(ValueError, match="org/x-tokenizer@main: no such path here, and the hub"):
        load_tokenizer("org/x-tokenizer")


def test_a_revision_is_resolved_once(here, server, tokenizer):
    names = pushed(stages=["tokenizer", "m0"])

    def model(*more):
        hub._fetch.cache_clear()
        (stage, _) = parse((SFTArguments, TrainingArguments), str(ROOT / "recipes/sft.py"), more)
        return stage

    argv = ["--config", "sft.yaml", "--output_dir", "runs/new", "--train_cards", "cards/chats.md"]
    Path("sft.yaml").write_text("model: org/x-m0\n")
    stage = model(*argv)
    assert stage.model == names["runs/m0"]
    data = {"train": load_split(["cards/chats.md"], "prompt-completion")}
    finish("runs/new", load_policy(stage.model), tokenizer, stage, {"m0": stage.model}, data)
    repo = server.repos["model", "org/x-m0"]
    newer = repo.commit({**repo.commits[-1][1], "README.md": b"newer"})
    manifest = json.loads(repo.commits[-1][1]["manifest.json"])
    manifest["files"].pop("README.md")
    newest = repo.commit({**repo.commits[-1][1], "manifest.json": json.dumps(manifest).encode()})
    assert newer != newest
    assert model(*argv).model == names["runs/m0"]  # the run that was begun goes on
    assert model(*argv, "--restart", "true").model == f"org/x-m0@{newest}"
    assert model(*argv, "--model", "org/x-m0@main").model == f"org/x-m0@{newest}"
    assert model(*argv, "--model", names["runs/m0"]).model == names["runs/m0"]


@pytest.mark.parametrize(
    ("name", "is_hub"),
    [
        ("org/m1", True), ("org/m1@main", True), ("org/m1@main/test.md", True),
        ("runs/m9", False), ("cards/typo", False), ("org/typo.md", False), ("./org/m1", False),
        ("/org/m1", False), ("m1", False), ("org/../m1", False), ("a/b/c", False),
    ],
)  # fmt: skip
def test_what_is_a_hub_name(here, name, is_hub):
    assert (hub.hub_name(name) is not None) == is_hub


# -- verify ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("runs/m0/model.safetensors", r"^runs/m0 \(m0 of runs/m1\): model.safetensors has changed"),
        ("runs/m2/tokenizer.json", r"^runs/m2 \(asked for\): tokenizer.json has changed"),
        ("runs/tokenizer/tokenizer.json", r"^runs/tokenizer \(tokenizer of runs/m0\): tokenizer"),
        (
            "cards/chats.jsonl",
            r"^cards/chats.md \(train data of runs/m1\): chats.jsonl has",
        ),
        (
            "runs/prefs/test.jsonl",
            r"^runs/prefs/test.md \(test data of runs/rm\): test.jsonl has",
        ),
    ],
)
def test_verify_names_the_first_link_that_does_not_hold(here, file, said, capsys):
    assert len(hub.verify("runs/m2")) == 11
    data = bytearray(Path(file).read_bytes())
    data[len(data) // 2] ^= 1
    Path(file).write_bytes(data)
    with pytest.raises(ValueError, match=said):
        hub.verify("runs/m2")
    with pytest.raises(SystemExit) as stop:
        hub.main(["verify", "runs/m2"])
    assert stop.value.code == 2 and file.rpartition("/")[2] in capsys.readouterr().err


# -- cards -------------------------------------------------------------------------------------


def snippet(card):
    return re.search(r"```python\n(.*?)```", card, re.S)[1]


def printed(code):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    return out.getvalue()


@pytest.mark.parametrize("stage", ["tokenizer", "m0", "m1", "rm", "m2", "prefs"])
def test_the_card_shows_how_to_load_and_that_runs(here, stage, monkeypatch):
    score = load_model_reward("runs/rm")([[{"role": "user", "content": PROMPT}]], [ANSWER])[0]
    monkeypatch.chdir(here / "runs" / stage)
    out = printed(snippet(Path("README.md").read_text()))
    if stage == "rm":
        assert float(out) == pytest.approx(score, abs=1e-4)
    assert out.strip()


def test_the_pushed_snippets_run_against_the_hub(here, server, tmp_path):
    pushed()
    code = "".join(
        snippet(server.files(f"org/x-{name}", kind)["README.md"].decode()) + "\n"
        for name, kind in (("m2", "model"), ("rm", "model"), ("prefs", "dataset"))
    )
    code += "from datasets import load_dataset\n"
    code += "print(load_dataset('org/x-prefs')['test'][0]['chosen'])\n"
    env = environment(server, HF_HOME=str(tmp_path / "home"))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ANSWER in done.stdout and "/x-prefs/" in done.stdout.replace("--", "/")


def test_the_pushed_card_names_lineage_data_licence_and_results(here, server):
    names = pushed()
    text = server.files("org/x-m2")["README.md"].decode()
    front = huggingface_hub.ModelCard(text).data
    assert (front.base_model, front.base_model_relation) == ("org/x-m1", "finetune")
    assert (front.license, front.datasets) == ("mit", ["org/x-chats"])
    assert (front.pipeline_tag, front.library_name) == ("text-generation", "transformers")
    assert f"made from rm: `{names['runs/rm']}`" in text
    assert "| chats | demonstrations | mit | 1.0 | 1 | 1 |" in text
    assert "runs/" not in text and str(here) not in text
    for absent in ("total_flos", "| eps", "train_runtime", "on nothing else"):
        assert absent not in text
    for stage in ("tokenizer", "m0", "m1", "prefs", "rm"):
        assert f"same run: `{names[f'runs/{stage}']}`" in text
    manifest = json.loads(server.files("org/x-m2")["manifest.json"])
    assert manifest["config"]["model"] == names["runs/m1"]
    data = server.files("org/x-prefs", "dataset")
    assert json.loads(data["manifest.json"])["config"]["exclude_cards"] == ["a.md"]
    assert "train_pairs | 1" in data["README.md"].decode()


def test_results_of_the_evaluation_become_the_model_index(here, server, tokenizer):
    from codexhf.arguments import EvaluationArguments

    def work(folder):
        (folder / "answers.json").write_text("{}")
        return {"m1/pass@1": 0.25, "m2/pass@1": 0.5, "m2/verdicts": {"pass": 1}}

    run.run_task(EvaluationArguments(output_dir="runs/evaluation"), work, data={}, parents={})
    pushed(license="mit")
    front = huggingface_hub.ModelCard(server.files("org/x-m2")["README.md"].decode()).data
    assert [(r.metric_type, r.metric_value) for r in front.eval_results] == [("pass@1", 0.5)]


@pytest.mark.parametrize(
    ("isolation", "said"),
    [
        ("none", "**Generated code ran without isolation**"),
        ("landlock", "ran behind: landlock"),
        (None, None),
    ],
)
def test_the_card_says_how_generated_code_was_isolated(here, isolation, said):
    from codexhf.model_card import card_text

    text = card_text({**load_manifest("runs/m2"), "isolation": isolation}, ".", "mit", {}, {})
    assert said in text if said else "Generated code ran" not in text


def test_the_preferences_folder_is_a_data_card(here):
    card = load_card("runs/prefs")
    assert card.type == "preference" and card.load["data_files"] == "train.jsonl"


@pytest.mark.parametrize(
    ("sources", "license"),
    [
        ({"mit", "apache-2.0", "psf-2.0"}, "apache-2.0"),
        ({"mit", "gpl-3.0"}, "gpl-3.0"),
        ({"cc-by-sa-4.0", "gpl-3.0"}, "other"),
        ({"mit", "other"}, "other"),
        (set(), "other"),
    ],
)
def test_the_licence_is_the_strictest_of_the_sources_or_none(sources, license):
    assert strictest(sources) == license
