"""What README, CONTRIBUTING and the Makefile say exists.

python -m pytest tests/test_readme.py
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PATH = re.compile(
    r"(?<![\w/.-])((?:recipes|src|tests|docs|data_cards|benchmarks)/[\w./*<>-]*[\w*>/])"
)


@pytest.mark.parametrize("text", TEXTS, ids=lambda p: p.name)
def test_every_path_that_is_named_exists(text):
    found = 0
    for path in PATH.findall(text.read_text()):
        if "<" in path or "tests/test_ppo_*" in path:
            continue
        found += 1
        assert list(ROOT.glob(path.rstrip("/."))), f"{text.name} names {path}"
    assert found > 0


def test_every_make_target_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.M))
    named = set()
    for text in TEXTS:
        named |= set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", text.read_text(), re.M))
    assert {"pipeline", "test", "smoke", "check", "test-all"} <= named
    assert named <= targets


def test_every_stage_in_the_makefile_is_a_recipe():
    named = re.findall(r"recipes/(\w+)\.py", (ROOT / "Makefile").read_text())
    assert len(set(named)) == 8
    for name in named:
        assert (ROOT / f"recipes/{name}.py").is_file() and (ROOT / f"recipes/{name}.yaml").is_file()


def test_ci_runs_what_the_readme_says():
    assert "make test\n" in (ROOT / ".ci/run").read_text()


def test_the_tree_has_a_line_for_every_module():
    tree = (ROOT / "README.md").read_text().partition("## The tree")[2]
    named, folder = set(), ""
    for indent, name, says in re.findall(r"^(  |    )(\w+(?:\.py|/))(?: +(.+))?$", tree, re.M):
        folder = name if name.endswith("/") else folder if indent == "    " else ""
        if name != folder:
            assert says and f"{folder}{name}" not in named, name
            named.add(f"{folder}{name}")
    source = ROOT / "src/codexhf"
    files = {str(f.relative_to(source)) for f in source.rglob("*.py") if f.name != "__init__.py"}
    assert named == files
