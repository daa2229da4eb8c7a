"""The wheel: what it brings without a checkout, and that a stage runs with it.

python -m pytest tests/test_wheel.py
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from codexhf.__main__ import PROJECT, main

ROOT = Path(__file__).parent.parent


def files(folder):
    found = (p.relative_to(folder) for p in Path(folder).rglob("*") if p.is_file())
    return {str(p) for p in found if "__pycache__" not in p.parts}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which the wheel is installed, alone."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("pyproject.toml", "README.md", "LICENSE", "Makefile", "constraints.txt"):
        shutil.copy(ROOT / name, source)
    shutil.copy(ROOT / "CONTRIBUTING.md", source)
    for name in ("src", "recipes", "data_cards", "docs", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(source / "out")]
    subprocess.run([*built, str(source)], check=True, capture_output=True)
    (wheel,) = (source / "out").glob("*.whl")
    installed = [*pip, "install", "-q", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(installed, check=True, capture_output=True)
    return site


def test_the_wheel_brings_a_project_in_which_make_runs_a_stage(site, tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    env |= {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    run = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True}
    project = tmp_path / "mine"
    done = subprocess.run([str(site / "bin/codexhf"), "init", "mine"], **run)
    assert done.returncode == 0 and "make smoke" in done.stdout, done.stderr
    for name in os.listdir(PROJECT):
        if (ROOT / name).is_dir():
            assert files(project / name) == files(ROOT / name)
        else:
            assert (project / name).read_bytes() == (ROOT / name).read_bytes()
    made = "runs/smoke/tokenizer/manifest.json"
    chosen = "CONFIGS=recipes/smoke", "RUNS=runs/smoke", f"PYTHON={sys.executable}"
    done = subprocess.run(["make", made, *chosen], **(run | {"cwd": project}))
    assert done.returncode == 0 and (project / made).is_file(), done.stdout + done.stderr
    assert "pip" not in done.stdout
    done = subprocess.run(["make", "-n", "clean", chosen[-1]], **(run | {"cwd": project}))
    assert "rm" not in done.stdout  # the environment is not this folder's
    again = subprocess.run([str(site / "bin/codexhf"), "init", "mine"], **run)
    assert again.returncode == 2 and "mine: is there and not empty" in again.stderr


def test_init_takes_an_empty_folder_and_no_file(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    main(["init", str(tmp_path / "empty")])
    assert (tmp_path / "empty/recipes/sft.yaml").is_file()
    with pytest.raises(SystemExit) as stop:
        main(["init", str(tmp_path / "file")])
    assert stop.value.code == 2 and "Name a new folder" in capsys.readouterr().err
