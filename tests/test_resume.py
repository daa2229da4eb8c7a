"""A run that knows what it is: changed, damaged, stopped, without room, in every stage.

The stages' real mains run on the tiny lineage of test_every_setting.

python -m pytest tests/test_resume.py
"""

import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from transformers import TrainerCallback

from codexhf import checkpoints, guards, identity, run
from codexhf.cards import load_card
from codexhf.data import read_card
from codexhf.launch import PREEMPTED, launch
from codexhf.run import load_manifest
from conftest import weights_hash
from kills import CHANGES, its_own_sandbox, kill_stage, whole
from test_every_setting import OWN, World, outcome
from test_run import StopAt, train

TRAINED = ("pretrain", "sft", "reward_model", "ppo")
TASKS = ("tokenizer", "preferences", "evaluation")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


class Crash(Exception):
    pass


@contextlib.contextmanager
def stopped_at(step, number=None):
    """Crash after a step, or have this process receive a signal during it."""
    real = guards.StopOnSignal.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step and number is None:
            raise Crash
        if state.global_step == step:
            os.kill(os.getpid(), number)
        return real(self, args, state, control, **kwargs)

    guards.StopOnSignal.on_step_end = on_step_end
    try:
        yield
    finally:
        guards.StopOnSignal.on_step_end = real


@pytest.fixture(scope="module")
def crashed(world):
    """stage -> a folder with the checkpoints of steps 2 and 4 of a run that crashed in step 5."""
    folders = {}

    def of(stage):
        if stage not in folders:
            folders[stage] = world.folder / f"crashed_{stage}"
            with stopped_at(5), pytest.raises(Crash):
                world.run(stage, CHANGES[stage], folders[stage])
            steps = [step for step, _ in checkpoints.step_folders(folders[stage])]
            assert steps == [4, 2]
        return folders[stage]

    return of


# -- stopped -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", TRAINED)
def test_signals_stop_and_the_resumed_run_is_the_one_that_was_never_stopped(
    stage, world, tmp_path, capsys
):
    for step, number in ((1, signal.SIGINT), (4, signal.SIGTERM), (7, signal.SIGHUP)):
        with stopped_at(step, number), pytest.raises(SystemExit) as stop:
            world.run(stage, CHANGES[stage], tmp_path / "m")
        assert stop.value.code == PREEMPTED
        assert f"stopped at step {step} of 8" in capsys.readouterr().out
    resumed = world.run(stage, CHANGES[stage], tmp_path / "m")
    # weights, metrics and history: train_loss, num_tokens, every loss between two logs
    assert outcome(resumed) == world.made(stage, CHANGES[stage])
    last = [e for e in load_manifest(resumed)["history"] if "train_runtime" in e][-1]
    assert last["train_runtime"] == load_manifest(resumed)["wall_s"]["train_s"]


def in_a_process(work):
    """Run something in a fork of this process; return its exit code and what it printed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        its_own_sandbox()
        os.dup2(write, 1)
        os.dup2(write, 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)  # pytest's are its own
        code = 1
        try:
            work()
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.stdout.flush()
            os._exit(code or 0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


@pytest.mark.parametrize("stage", TASKS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_stage_that_trains_nothing_leaves_at_once_and_begins_again(
    stage, number, world, tmp_path
):
    def work():
        def write_json(path, value, write=run.write_json):
            write(path, value)
            if path.name == "run.json":  # the work begins
                os.kill(os.getpid(), number)

        run.write_json = write_json
        for each in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        launch(lambda: world.run(stage, {}, tmp_path / "out"))

    code, text = in_a_process(work)
    assert code == (130 if number == signal.SIGINT else PREEMPTED), text
    assert "start the same command again" in text and "Traceback" not in text
    assert outcome(world.run(stage, {}, tmp_path / "out")) == world.made(stage, {})


def test_under_nohup_a_closed_terminal_is_not_heard(world, tmp_path):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopped_at(3, signal.SIGHUP):
            world.run("pretrain", CHANGES["pretrain"], tmp_path / "m")
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.parametrize("stage", OWN)
def test_a_stage_killed_at_random_moments_comes_to_the_same(stage, world):
    # python tests/kills.py: a hundred
    found = kill_stage(world, stage, "killed", 3, whole(world, stage), math.inf)
    assert found["kills"] >= 3 and found["finished"] >= 1
    assert not found["stuck"] and not found["different"], found


def test_killed_while_the_manifest_is_written_nothing_of_it_is_recorded(
    world, tmp_path, monkeypatch
):
    folder, replace = tmp_path / "m", os.replace

    def killed(source, target):
        if Path(target) == folder / checkpoints.MANIFEST:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            world.run("tokenizer", {}, folder)
    assert list(folder.glob("*.tmp"))
    world.run("tokenizer", {}, folder)
    assert outcome(folder) == world.made("tokenizer", {})
    world.run("tokenizer", {}, folder)  # finished, and as its manifest says


@pytest.mark.parametrize("stage", TRAINED)
def test_killed_behind_the_last_step_a_stage_trains_no_more(stage, world, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    made = world.made(stage, CHANGES[stage])
    with monkeypatch.context() as patch:
        patch.setattr(run, "_save", killed)
        with pytest.raises(Killed):
            world.run(stage, CHANGES[stage], tmp_path / "m")
    assert outcome(world.run(stage, CHANGES[stage], tmp_path / "m")) == made


# -- damaged -----------------------------------------------------------------------------------


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


FILE_FAULTS = {
    "deleted": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "flipped": flip,
    "empty": lambda path: path.write_bytes(b""),
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("/nowhere")),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def swap(a, b):
    keep = a.with_name("keep")
    a.rename(keep)
    b.rename(a)
    keep.rename(b)


FOLDER_FAULTS = {
    "empty": lambda c: [checkpoints.remove(p) for p in c.iterdir()],
    "a file": lambda c: (shutil.rmtree(c), c.write_text("x")),
    "a dangling link": lambda c: (shutil.rmtree(c), c.symlink_to("/nowhere")),
    "a link to the older one": lambda c: (shutil.rmtree(c), c.symlink_to("checkpoint-2")),
    "the older one": lambda c: (shutil.rmtree(c), shutil.copytree(c.with_name("checkpoint-2"), c)),
    "with a file of the older one": lambda c: shutil.copy(
        c.with_name("checkpoint-2") / "optimizer.pt", c
    ),
    "two files swapped": lambda c: swap(c / "optimizer.pt", c / "scheduler.pt"),
    "a file added": lambda c: (c / "model.safetensors.index.json").write_text("{}"),
    "the older one's manifest": lambda c: shutil.copy(
        c.with_name("checkpoint-2") / "manifest.json", c
    ),
    "a manifest of another shape": lambda c: (c / "manifest.json").write_text("[]"),
    "a manifest that is no JSON": lambda c: (c / "manifest.json").write_bytes(b"\xff{"),
    "a manifest without seal and files": lambda c: (c / "manifest.json").write_text("{}"),
}


@pytest.mark.parametrize("stage", TRAINED)
def test_any_fault_of_a_checkpoint_means_the_older_one(stage, crashed, tmp_path, capsys):
    names = [
        str(p.relative_to(crashed(stage) / "checkpoint-4"))
        for p in (crashed(stage) / "checkpoint-4").rglob("*")
        if p.is_file()
    ]
    assert {"optimizer.pt", "progress_0.json", "manifest.json"} <= {*names}
    faults = {
        f"{name} {what}": lambda c, n=name, d=damage: d(c / n)
        for name in names
        for what, damage in FILE_FAULTS.items()
    }
    for what, damage in {**faults, **FOLDER_FAULTS}.items():
        folder = tmp_path / "copy"
        shutil.copytree(crashed(stage), folder, symlinks=True)
        damage(folder / "checkpoint-4")
        assert checkpoints.last_good(folder) == folder / "checkpoint-2", what
        assert list(folder.glob("_broken-4-*")), what
        assert "checkpoint-4 is set aside" in capsys.readouterr().out, what
        shutil.rmtree(folder)
    print(f"{stage}: {len(faults) + len(FOLDER_FAULTS)} faults")


@pytest.mark.parametrize("stage", TRAINED)
def test_from_the_older_checkpoint_it_comes_to_the_same(stage, crashed, world, tmp_path):
    shutil.copytree(crashed(stage), tmp_path / "m")
    flip(tmp_path / "m/checkpoint-4/model.safetensors")
    (tmp_path / "m/run.json").unlink()  # each checkpoint knows of which run it is
    assert outcome(world.run(stage, CHANGES[stage], tmp_path / "m")) == world.made(
        stage, CHANGES[stage]
    )


@pytest.mark.parametrize("stage", TRAINED)
def test_a_checkpoint_of_another_run_is_refused(stage, crashed, world, tmp_path):
    shutil.copytree(crashed(stage) / "checkpoint-4", tmp_path / "m/checkpoint-4")
    with pytest.raises(ValueError, match=r"checkpoint-4 comes from .*config.seed: 42 -> 43"):
        flat(lambda: world.run(stage, {**CHANGES[stage], "seed": 43}, tmp_path / "m"))


def flat(work):
    """Run something; a message of several lines becomes one."""
    try:
        return work()
    except ValueError as error:
        raise ValueError(" ".join(str(error).split())) from None


def test_what_may_not_be_read_is_an_error_and_no_older_checkpoint(crashed, tmp_path):
    shutil.copytree(crashed("pretrain"), tmp_path / "m")
    for path in [tmp_path.parent, tmp_path, *tmp_path.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    (tmp_path / "m/checkpoint-4/optimizer.pt").chmod(0)

    def work():
        if os.geteuid() == 0:
            os.setuid(65534)
        try:
            checkpoints.last_good(Path("m"))
        except PermissionError as error:
            print(error)

    os.chdir(tmp_path)
    try:
        assert "Permission denied: 'm/checkpoint-4/optimizer.pt'" in in_a_process(work)[1]
    finally:
        os.chdir(Path(__file__).parent.parent)


BEST = {"load_best_model_at_end": True, "eval_steps": 2}
METRIC = {
    "pretrain": "eval_text_a_loss", "sft": "eval_loss", "reward_model": "eval_loss",
    "ppo": "eval_unit_tests",
}  # fmt: skip


@pytest.mark.parametrize("damage", [*FILE_FAULTS, "missing", "of another run"])
@pytest.mark.parametrize("stage", TRAINED)
def test_a_damaged_best_checkpoint_is_an_error(stage, damage, world, tmp_path):
    changes = {**CHANGES[stage], **BEST, "metric_for_best_model": METRIC[stage]}
    changes["greater_is_better"] = stage == "ppo"
    known = world.folder / f"best_{stage}"
    if not known.exists():
        with stopped_at(7), pytest.raises(Crash):
            world.run(stage, changes, known)
        # the best one is made an earlier one, as training would with other figures
        for folder in (known / "checkpoint-4", known / "checkpoint-6"):
            state = folder / "trainer_state.json"
            told = {**json.loads(state.read_text()), "best_global_step": 4, "best_metric": -1.0}
            told["best_model_checkpoint"] = f"elsewhere/best_{stage}/checkpoint-4"
            state.write_text(json.dumps(told))
            record = checkpoints.read_sealed(folder / "manifest.json")
            checkpoints.commit(folder, record)
    shutil.copytree(known, tmp_path / "m")
    best = tmp_path / "m/checkpoint-4"
    if damage == "missing":
        shutil.rmtree(best)
    elif damage == "of another run":
        record = checkpoints.read_sealed(best / "manifest.json")
        checkpoints.commit(best, {**record, "run": "another"})
    else:
        FILE_FAULTS[damage](best / "model.safetensors")
    with pytest.raises(ValueError, match="checkpoint-4: the best checkpoint cannot be used"):
        world.run(stage, changes, tmp_path / "m")


@pytest.mark.parametrize("stage", OWN)
def test_any_fault_of_a_finished_folder_is_named(stage, world, tmp_path):
    whole = world.run(stage, {}, world.folder / f"finished_{stage}")
    names = [*load_manifest(whole)["files"], "manifest.json"]
    for name in names:
        for what, damage in FILE_FAULTS.items():
            if name == "manifest.json" and what in ("deleted", "a dangling link", "a folder"):
                continue  # then it is not finished, and is made again
            shutil.copytree(whole, tmp_path / "copy")
            damage(tmp_path / "copy" / name)
            with pytest.raises(ValueError, match=f"{name} (is missing|has changed|is not as)"):
                identity.parent_record(str(tmp_path / "copy"))
            if name == "manifest.json":
                with pytest.raises(ValueError, match="is not as it was written. Restore it"):
                    world.run(stage, {}, tmp_path / "copy")
            shutil.rmtree(tmp_path / "copy")
    shutil.copytree(whole, tmp_path / "copy")
    (tmp_path / "copy/run.json").unlink()
    before = (tmp_path / "copy/README.md").read_text()
    world.run(stage, {}, tmp_path / "copy")  # nothing to do: the manifest knows what it is
    assert (tmp_path / "copy/README.md").read_text() == before
    (tmp_path / "copy/manifest.json").unlink()
    assert outcome(world.run(stage, {}, tmp_path / "copy")) == outcome(whole)


def test_the_pairs_of_a_finished_stage_are_verified_before_they_are_read(world, tmp_path):
    pairs = {"min_prompts": 12, "include_reference": True}
    folder = world.run("preferences", pairs, tmp_path / "prefs")
    file = folder / "prompts.jsonl"
    file.write_text(file.read_text().replace("Task", "Tusk"))
    with pytest.raises(ValueError, match="prompts.jsonl has changed since its stage finished"):
        world.run("ppo", {"prompt_cards": [str(folder / "prompts.md")]}, tmp_path / "m2")


PARENTS = {
    "pretrain": ("tokenizer", "tokenizer"), "sft": ("model", "m0"),
    "preferences": ("model", "m1"), "reward_model": ("model", "m1"),
    "ppo": ("reward_model", "rm"), "evaluation": ("models", "m1"),
}  # fmt: skip


def damaged_parents(stage, parent, world, copy, files, faults, capsys):
    """Damage a copy of a stage's parent, file by file, and see the stage refuse it by name."""
    field, name = PARENTS[stage]
    for file, what in itertools.product(files, faults):
        copy(world.folder / name, parent)
        FILE_FAULTS[what](parent / file)
        value = [str(parent)] if field == "models" else str(parent)
        with pytest.raises(SystemExit) as stop:
            world.run(stage, {field: value}, parent.with_name("m"))
        said = capsys.readouterr().err
        assert stop.value.code == 2 and "nothing was run" in said
        assert f"{field}: " in said and file in said and str(parent) in said
        assert not parent.with_name("m").exists()
        shutil.rmtree(parent)


@pytest.mark.parametrize("stage", PARENTS)
def test_a_damaged_parent_is_named_before_anything_is_loaded(stage, world, tmp_path, capsys):
    files = ("tokenizer.json",) if stage == "pretrain" else ("tokenizer.json", "model.safetensors")
    faults = "deleted", "truncated", "flipped", "empty"
    damaged_parents(stage, tmp_path / "parent", world, shutil.copytree, files, faults, capsys)


@pytest.mark.parametrize("stage", ["sft", "reward_model", "ppo", "evaluation"])
def test_a_damaged_model_from_outside_is_named_too(stage, world, tmp_path, capsys):
    files, faults = ("model.safetensors", "tokenizer.json", "config.json"), ("truncated", "empty")
    damaged_parents(stage, tmp_path / "parent", world, from_outside, files, faults, capsys)


def test_the_files_of_a_parent_are_hashed_once(world, monkeypatch):
    hashed = []
    real = checkpoints.sha256
    monkeypatch.setattr(checkpoints, "sha256", lambda path: hashed.append(path) or real(path))
    world.run("sft", {})
    assert hashed.count(world.folder / "m0/model.safetensors") == 1


# -- changed -----------------------------------------------------------------------------------


def from_outside(folder, to):
    """A stage's result as a model that nothing is recorded of."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("manifest.json", "run.json"))
    return to


def reworded(path, old, new):
    """Change a file of which size and time stay."""
    text, times = path.read_text(), path.stat()
    assert old in text and len(old) == len(new)
    path.write_text(text.replace(old, new))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def set_json(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def grown(path):
    path.write_text(path.read_text() + " ")


# stage, what is changed of what it was made from, and the difference that must be named
INPUTS = {
    ("pretrain", "tokenizer.json"): ("tokenizer", grown, "parents.tokenizer.tokenizer.json"),
    ("sft", "tokenizer.json"): ("model", grown, "parents.m0.tokenizer.json"),
    ("sft", "chat_template.jinja"): ("model", grown, "parents.m0.chat_template.jinja"),
    ("sft", "config.json"): ("model", grown, "parents.m0.config.json"),
    ("reward_model", "config.json"): ("model", grown, "parents.m1.config.json"),
    ("preferences", "chat_template.jinja"): ("model", grown, "parents.m1.chat_template.jinja"),
    ("evaluation", "config.json"): (
        "reward_model",
        lambda path: set_json(path, score_mean=1.5),
        "config.json",
    ),
    ("ppo", "config.json"): (
        "reward_model",
        lambda path: set_json(path, score_mean=1.5),
        "parents.rm.config.json",
    ),
}


@pytest.mark.parametrize(("stage", "file"), INPUTS)
def test_a_changed_parent_is_named_and_refused(stage, file, world, tmp_path):
    field, change, named = INPUTS[stage, file]
    parent = from_outside(world.settings[stage][field], tmp_path / "parent")
    changes = {**CHANGES.get(stage, {}), field: str(parent)}
    if stage in TRAINED:
        with stopped_at(3), pytest.raises(Crash):
            world.run(stage, changes, tmp_path / "m")
    else:
        world.run(stage, changes, tmp_path / "m")
    link = tmp_path / "link"
    link.symlink_to(parent)
    spelled = {**changes, field: f"{link}/"}
    change(parent / file)
    with pytest.raises(ValueError, match=rf"{named}: \w+… -> \w+…"):
        world.run(stage, spelled, tmp_path / "m")
    if stage in TRAINED:
        with pytest.raises(ValueError) as refused:  # settled at the first step
            world.run(stage, {**spelled, "allow_changed": [named]}, tmp_path / "m")
        assert "--allow_changed" not in str(refused.value)


DATA = {
    "tokenizer": ("text_a", "# text 0", "# text z", "data.train"),
    "pretrain": ("text_a", "# text 0", "# text z", "data.train"),
    "sft": ("demos", "Task 0", "Task x", "data.train"),
    "reward_model": ("pairs", "Task 0", "Task x", "data.train"),
    "preferences": ("tasks", "Task 0", "Task x", "data.prompts"),
    "ppo": ("tasks", "Task 0", "Task x", "data.prompts"),
    "evaluation": ("tasks", "Task 0", "Task x", "data.tasks"),
}


@pytest.mark.parametrize("stage", OWN)
def test_rows_changed_with_size_and_time_kept_are_named(stage, world, tmp_path):
    card, old, new, named = DATA[stage]
    path = world.folder / f"{card}.jsonl"
    before = path.read_bytes()
    changes = {**CHANGES.get(stage, {})}
    if stage == "evaluation":
        changes["heldout_cards"] = [world.tasks]
    world.run(stage, changes, tmp_path / "m")
    try:
        reworded(path, old, new)
        with pytest.raises(ValueError, match=rf"is finished and differs[^$]*{named}: "):
            world.run(stage, changes, tmp_path / "m")
    finally:
        path.write_bytes(before)
    world.run(stage, {**changes, "output_dir": f"{tmp_path}/./m/"})  # nothing to do


def test_a_card_that_reads_its_rows_otherwise_is_named(world, tmp_path):
    card = Path(world.card("own", "prompt-only", range(12)))
    changes = {"prompt_cards": [str(card)]}
    world.run("preferences", changes, tmp_path / "m")
    text = card.read_text()
    card.write_text(text.replace("None.", "Many."))  # what people read is not what is run
    world.run("preferences", changes, tmp_path / "m")
    card.write_text(text.replace('"type"', '"execution": {"timeout_s": 10}, "type"'))
    with pytest.raises(ValueError, match="cards.own: "):
        world.run("preferences", changes, tmp_path / "m")


REWARD = """
def length(prompts, completions, **columns):
    return [float(len(c)) for c in completions]
"""


def test_rules_and_the_source_of_rewards_belong_to_ppo(world, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    rules = Path(shutil.copy(world.pack, tmp_path / "rules.yaml"))
    changes = {**CHANGES["ppo"], "safety_rules": str(rules)}
    changes["rewards"] = ["reward_model", "safety", "my_rewards:length"]
    with stopped_at(5), pytest.raises(Crash):
        world.run("ppo", changes, tmp_path / "m")
    source = (tmp_path / "my_rewards.py").read_text()
    for path, old, new, named in (
        (rules, "penalty: 1.0", "penalty: 2.0", "files.safety_rules"),
        (tmp_path / "my_rewards.py", "float(len(c))", "1.0 + len(c)", "rewards.my_rewards:length"),
    ):
        text = path.read_text()
        path.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=rf"{named}: \w+… -> \w+…"):
            world.run("ppo", changes, tmp_path / "m")
        path.write_text(text)
    assert (tmp_path / "my_rewards.py").read_text() == source
    rules.write_text(rules.read_text().replace("penalty: 1.0", "penalty: 2.0"))
    folder = world.run("ppo", {**changes, "allow_changed": ["safety_rules"]}, tmp_path / "m")
    [allowed] = load_manifest(folder)["allowed_changes"]
    assert allowed["from_step"] == 4 and "files.safety_rules" in allowed["changes"][0]


MADE = {
    "codexhf": (
        identity.importlib.metadata,
        "version",
        lambda name, real=identity.importlib.metadata.version: (
            "9.9" if name == "codexhf" else real(name)
        ),
    ),
    "code": (identity, "code_hash", lambda: "another"),
    "python": (identity.sys, "version_info", (3, 99)),
    **{
        name: (identity, "versions", lambda n=name, real=identity.versions: {**real(), n: "9.9"})
        for name in identity.versions()
    },
    "precision": (None, "ACCELERATE_MIXED_PRECISION", "bf16"),
    "sharding": (None, "ACCELERATE_USE_FSDP", "true"),
    "processes": (identity, "processes", lambda: 2),
    "device": (identity, "_device", lambda training: "cuda"),
    "threads": (identity.torch, "get_num_threads", lambda: 99),
    "matmul": (identity.torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="tf32")),
}


def remade(monkeypatch, name):
    where, what, value = MADE[name]
    monkeypatch.setenv(what, value) if where is None else monkeypatch.setattr(where, what, value)


@pytest.mark.parametrize("name", MADE)
def test_what_a_run_is_made_with_is_compared_when_it_goes_on(
    name, tokenizer, tmp_path, monkeypatch, capsys
):
    with pytest.raises(RuntimeError, match="crash"):
        train(tokenizer, tmp_path / "m", StopAt(5))
    with monkeypatch.context() as patch:
        remade(patch, name)
        with pytest.raises(ValueError, match=rf"\n    made.{name}: \S+ -> \S+\n"):
            train(tokenizer, tmp_path / "m")
        if name in ("processes", "device"):  # threads, global_batch come with them
            with pytest.raises(ValueError, match="--allow_changed "):
                train(tokenizer, tmp_path / "m", own={"allow_changed": ["precision"]})
            return
        if name not in ("precision", "sharding"):
            shutil.copytree(tmp_path / "m", tmp_path / "allowed")
            manifest = train(tokenizer, tmp_path / "allowed", own={"allow_changed": [name]})
            [allowed] = manifest["allowed_changes"]
            assert allowed["from_step"] == 4
            assert [line.split(":")[0] for line in allowed["changes"]] == [f"made.{name}"]
    finished = train(tokenizer, tmp_path / "m")
    with monkeypatch.context() as patch:
        remade(patch, name)
        capsys.readouterr()
        again = train(tokenizer, tmp_path / "m", StopAt(1))  # not trained again
        assert again == finished
        assert f"    made.{name}: " in capsys.readouterr().out


@pytest.mark.parametrize("stage", OWN)
def test_every_stage_knows_what_it_is_made_with(stage, world):
    made = load_manifest(world.run(stage, {}))["identity"]["made"]
    assert {*MADE, "global_batch"} - {*made} == (set() if stage in TRAINED else {"global_batch"})


def test_variables_that_change_how_is_computed_are_compared(monkeypatch):
    def differ(**variables):
        before = identity._made(None)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return [*identity.leaves(before, identity._made(None))]

    equal = {  # accelerate launch without settings; where it runs; what nothing reads
        "ACCELERATE_USE_CPU": "False", "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_DYNAMO_MODE": "default",
        "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False", "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
        "ACCELERATE_CPU_AFFINITY": "1", "ACCELERATE_NUM_PROCESSES": "3",
        "ACCELERATE_DEBUG_RDV_FILE": "/a", "ACCELERATE_DEBUG_MODE": "true",
        "ACCELERATE_LOG_LEVEL": "info", "ACCELERATE_MAIN_PORT": "1", "MASTER_PORT": "2",
        "FSDP_VERSION": "1",
    }  # fmt: skip
    assert differ(**equal) == []
    compute = {
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "True",
        "NVIDIA_TF32_OVERRIDE": "0", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
    }  # fmt: skip
    assert differ(**compute) == sorted(compute)
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_USE_ORIG_PARAMS": "true", "FSDP_VERSION": "2"}
    assert differ(**fsdp) == ["FSDP_USE_ORIG_PARAMS", "FSDP_VERSION", "sharding"]


def test_a_variable_that_is_no_longer_set_can_be_allowed(tokenizer, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="crash"):
        patch.setenv("NVIDIA_TF32_OVERRIDE", "1")
        train(tokenizer, tmp_path / "m", StopAt(5))
    with pytest.raises(ValueError, match="--allow_changed NVIDIA_TF32_OVERRIDE"):
        train(tokenizer, tmp_path / "m")
    train(tokenizer, tmp_path / "m", own={"allow_changed": ["NVIDIA_TF32_OVERRIDE"]})


# -- allowed -----------------------------------------------------------------------------------


def test_an_unknown_name_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="got 'learning_rat', .* Did you mean 'learning_rate'"):
        train(tokenizer, tmp_path / "m", own={"allow_changed": ["learning_rat,save_steps"]})


def test_an_allowed_learning_rate_takes_effect_and_is_written_down(tokenizer, tmp_path, capsys):
    fixed = {"lr_scheduler_type": "constant"}
    train(tokenizer, tmp_path / "old", **fixed)
    with pytest.raises(RuntimeError, match="crash"):
        train(tokenizer, tmp_path / "m", StopAt(5), **fixed)
    new = {**fixed, "lr": 3e-2, "weight_decay": 0.1, "adam_beta1": 0.5}
    with pytest.raises(ValueError, match="--allow_changed adam_beta1,learning_rate,weight_decay"):
        train(tokenizer, tmp_path / "m", **new)

    seen = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            seen[state.global_step] = [
                {k: group[k] for k in ("lr", "weight_decay", "betas")}
                for group in optimizer.param_groups
            ]

    own = {"allow_changed": ["learning_rate,weight_decay", "adam_beta1"]}
    manifest = train(tokenizer, tmp_path / "m", Look(), own=own, **new)
    assert sorted(seen) == [5, 6, 7, 8]
    for groups in seen.values():
        assert [g["lr"] for g in groups] == [3e-2, 3e-2]
        assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
        assert all(tuple(g["betas"]) == (0.5, 0.999) for g in groups)
    rates = [e["learning_rate"] for e in manifest["history"] if "learning_rate" in e]
    assert rates == [1e-2] * 4 + [3e-2] * 4
    [allowed] = manifest["allowed_changes"]
    assert allowed == {
        "from_step": 4,
        "changes": [
            "config.adam_beta1: None -> 0.5",
            "config.learning_rate: 0.01 -> 0.03",
            "config.weight_decay: None -> 0.1",
        ],
    }
    assert manifest["config"]["learning_rate"] == 3e-2
    assert weights_hash(tmp_path / "m") != weights_hash(tmp_path / "old")
    capsys.readouterr()
    train(tokenizer, tmp_path / "m", **new)  # as it is written down, without allowing it again
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value", "steps"),
    [("max_steps", 6, 6), ("gradient_accumulation_steps", 2, 8)],
)
def test_other_allowed_settings_take_effect(name, value, steps, tokenizer, tmp_path):
    with pytest.raises(RuntimeError, match="crash"):
        train(tokenizer, tmp_path / "m", StopAt(5))
    with pytest.raises(ValueError, match=f"config.{name}: .* -> {value}"):
        train(tokenizer, tmp_path / "m", **{name: value})
    own = {"allow_changed": [name, "global_batch"]}
    manifest = train(tokenizer, tmp_path / "m", own=own, **{name: value})
    assert manifest["steps"] == steps and manifest["config"][name] == value


def test_a_kl_coefficient_that_was_allowed_takes_effect(crashed, world, tmp_path):
    shutil.copytree(crashed("ppo"), tmp_path / "m")
    changes = {**CHANGES["ppo"], "kl_coef": 0.9}
    with pytest.raises(ValueError, match=r"config.kl_coef: .* -> 0.9"):
        world.run("ppo", changes, tmp_path / "m")
    folder = world.run("ppo", {**changes, "allow_changed": ["kl_coef"]}, tmp_path / "m")
    assert weights_hash(folder) != weights_hash(world.run("ppo", CHANGES["ppo"]))


def test_what_is_settled_at_the_first_step_cannot_be_allowed(crashed, world, tmp_path):
    shutil.copytree(crashed("pretrain"), tmp_path / "m")
    changes = {**CHANGES["pretrain"], "seed": 43, "allow_changed": ["seed"]}
    with pytest.raises(ValueError, match="config.seed: 42 -> 43") as refused:
        world.run("pretrain", changes, tmp_path / "m")
    assert "--allow_changed" not in str(refused.value) and "--restart true" in str(refused.value)


def test_saving_at_other_steps_takes_effect_in_a_run_that_goes_on(tokenizer, tmp_path):
    with pytest.raises(RuntimeError, match="crash"):
        train(tokenizer, tmp_path / "m", StopAt(3))
    with pytest.raises(RuntimeError, match="crash"):
        train(tokenizer, tmp_path / "m", StopAt(8), save_steps=5)
    assert [step for step, _ in checkpoints.step_folders(tmp_path / "m")] == [5, 2]


def test_evaluating_at_other_steps_gives_a_model_with_dropout_the_same_weights(tokenizer, tmp_path):
    def dropped(folder, **more):
        train(tokenizer, folder, dropout=0.2, max_steps=40, eval_rows=4, **more)
        return weights_hash(folder)

    never = dropped(tmp_path / "a")
    assert dropped(tmp_path / "b", eval_strategy="steps", eval_steps=3) == never
    assert dropped(tmp_path / "c", eval_strategy="epoch") == never
    other = {"eval_on_start": True, "per_device_eval_batch_size": 3, "dataloader_num_workers": 1}
    assert dropped(tmp_path / "d", eval_strategy="steps", eval_steps=7, **other) == never


def test_another_asked_for_run_is_refused_where_one_is_finished(tokenizer, tmp_path):
    train(tokenizer, tmp_path / "m")
    before = weights_hash(tmp_path / "m")
    for own in ({}, {"allow_changed": ["learning_rate"]}):  # no step is left that it could change
        with pytest.raises(ValueError, match="is finished and differs[^$]*config.learning_rate"):
            train(tokenizer, tmp_path / "m", lr=2e-2, own=own)
    assert weights_hash(tmp_path / "m") == before and not list(tmp_path.glob("m/_previous*"))


# -- disks -------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """mount(size) -> a small disk of its own."""
    mounted = []

    def mount(size):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "x", folder]).returncode:
            pytest.skip("no right to mount a disk here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_finished_run_on_a_disk_that_is_only_read(tokenizer, disk, capsys):
    folder = disk("4m")  # the folder is the root of a disk
    with pytest.raises(RuntimeError, match="crash"):
        train(tokenizer, folder, StopAt(5))
    train(tokenizer, folder)
    train(tokenizer, folder, lr=2e-2, own={"redo_changed": True})
    assert (folder / "_previous-1/manifest.json").is_file() and folder.is_mount()
    within = folder / "m"
    train(tokenizer, within)
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    capsys.readouterr()
    for done, rate in ((folder, 2e-2), (within, 1e-2)):
        train(tokenizer, done, lr=rate)
        assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(OSError, match="Read-only file system"):
        train(tokenizer, folder / "new")
    subprocess.run(["mount", "-o", "remount,rw", folder], check=True)


def test_what_is_the_disks_own_stays_when_a_run_is_set_aside(disk, capsys):
    folder = disk("1m")
    for name in ("lost+found", "data", "mounted", "bound"):
        (folder / name).mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "x", folder / "mounted"], check=True)
    subprocess.run(["mount", "--bind", folder / "data", folder / "bound"], check=True)
    for n in (1, 2):
        for name in ("a", "run.json", "z"):
            (folder / name).write_text(str(n))
        run._set_aside(folder, [])
        kept = {p.name for p in folder.iterdir() if not p.name.startswith("_")}
        assert kept == {"lost+found", "mounted", "bound"}
        aside = folder / f"_previous-{n}"
        assert [(aside / name).read_text() for name in ("a", "run.json", "z")] == [str(n)] * 3
    assert capsys.readouterr().out.count("mounted is mounted there and stays") == 2


def test_a_full_disk_of_the_cache_says_what_it_needs_and_is_left_empty(
    disk, tmp_path, write_card, monkeypatch
):
    folder = disk("512k")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))
    rows = [{"text": f"x_{i} = {i}\n" * 200} for i in range(1000)]
    card = write_card(rows, "language-modeling")
    size = (tmp_path / "card.jsonl").stat().st_size / 2**20
    with pytest.raises(OSError, match=f"disk full: {folder}.* {size:.1f} MiB are needed"):
        read_card(load_card(card))
    assert {p.name for p in folder.rglob("*") if p.is_file()} == {"lock"}


def filled(folder, leave):
    """Fill a disk but for some bytes."""
    (folder / "filler").unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free
    (folder / "filler").write_bytes(b"\0" * max(free - leave, 0))


@pytest.mark.parametrize("stage", TRAINED)
def test_a_full_disk_stops_before_a_save_and_resumes(stage, world, disk, crashed, capsys):
    folder = disk("64m")
    shutil.copytree(crashed(stage), folder / "m")
    filled(folder, 100_000)
    code, text = in_a_process(
        lambda: launch(lambda: world.run(stage, CHANGES[stage], folder / "m"))
    )
    assert code == PREEMPTED, text
    assert f"stopped: disk full: {folder / 'm'} has 0.1 MiB free, " in text and "needed" in text
    assert "Traceback" not in text
    assert checkpoints.last_good(folder / "m").name == "checkpoint-4"
    (folder / "filler").unlink()
    assert outcome(world.run(stage, CHANGES[stage], folder / "m")) == world.made(
        stage, CHANGES[stage]
    )


@pytest.mark.parametrize("leave", [0, 20_000, 60_000, 120_000])
def test_a_disk_that_fills_in_the_middle_of_a_save(leave, tokenizer, disk, tmp_path, monkeypatch):
    train(tokenizer, tmp_path / "whole")
    folder = disk("16m")
    with pytest.raises(RuntimeError, match="crash"):
        train(tokenizer, folder / "m", StopAt(5))
    filled(folder, leave)
    monkeypatch.setattr(guards, "checkpoint_bytes", lambda trainer: 0)  # somebody else fills it

    def begin():
        launch(lambda: train(tokenizer, folder / "m"))

    code, text = in_a_process(begin)
    assert code == PREEMPTED and "stopped: disk full" in text and "Traceback" not in text, text
    assert checkpoints.last_good(folder / "m").name in ("checkpoint-4", "checkpoint-6")
    (folder / "filler").unlink()
    train(tokenizer, folder / "m")
    assert weights_hash(folder / "m") == weights_hash(tmp_path / "whole")


@pytest.mark.parametrize("stage", TASKS)
def test_a_full_disk_stops_a_stage_that_trains_nothing(stage, world, disk):
    folder = disk("8m")
    (folder / "m").mkdir()
    filled(folder, 8192)
    code, text = in_a_process(lambda: launch(lambda: world.run(stage, {}, folder / "m")))
    assert code == PREEMPTED and f"stopped: disk full: {folder}" in text, text
    assert "Traceback" not in text
    (folder / "filler").unlink()
    assert outcome(world.run(stage, {}, folder / "m")) == world.made(stage, {})


def test_of_large_models_one_checkpoint_is_kept(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "LARGE", 1000)
    for limit, kept in ((None, [6]), (3, [6, 4, 2])):
        with pytest.raises(RuntimeError, match="crash"):
            train(tokenizer, tmp_path / f"m{limit}", StopAt(7), save_total_limit=limit)
        found = checkpoints.step_folders(tmp_path / f"m{limit}")
        assert [step for step, _ in found] == kept


def test_room_is_made_of_what_is_broken_and_then_of_older_checkpoints(disk, capsys):
    folder = disk("4m")
    spare = [folder / name for name in ("_broken-4-1", "checkpoint-2", "checkpoint-4")]
    for each in spare:
        each.mkdir()
        (each / "weights").write_bytes(b"x" * 2**20)
    free = shutil.disk_usage(folder).free
    with pytest.raises(OSError, match=f"{folder} has 1.0 MiB free, 9.0 MiB are needed"):
        checkpoints.check_room(folder, 9 * 2**20, spare)
    assert all(each.exists() for each in spare)  # nothing is deleted for nothing
    checkpoints.check_room(folder, free + 3 * 2**19, spare)
    assert [each.exists() for each in spare] == [False, False, True]
    assert capsys.readouterr().out.count("is deleted") == 2
