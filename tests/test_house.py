"""The house: who imports whom, what stays cheap, how long things are.

python -m pytest tests/test_house.py
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"
FILES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (SOURCE / "codexhf").rglob("*.py")
}
CHEAP = [
    "arguments", "cards", "completions", "execution", "help", "knobs", "launch", "lineage",
    "parsing", "refusals", "rewards", "strict_yaml",
]  # fmt: skip
"""Modules that a refusal, a card or a rule needs: they import no torch."""

NEIGHBOURS = ("ppo", "preferences", "evaluation")
"""Side by side above generation: none knows another."""


def below(node: ast.AST) -> Iterator[ast.AST]:
    """A module's nodes, lazy imports too, but not what only a command or a type checker runs."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        guard = ast.unparse(node.test) if isinstance(node, ast.If) else ""
        if guard not in ("TYPE_CHECKING", "__name__ == '__main__'"):
            yield node
            waiting += ast.iter_child_nodes(node)


@cache
def imports(name: str) -> set[str]:
    """The modules of ours that a module imports, in its functions too."""
    found = set()
    for node in below(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {inner[n] if inner[n] in FILES else node.module for n in inner}
    return found & FILES.keys() - {name}


def test_no_circle_of_imports():
    assert len(FILES) > 40
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in imports(name):
                visit(other, (*path, name))
            done.add(name)

    for name in FILES:
        visit(name, ())


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_generation_lies_below_ppo_preferences_and_evaluation():
    used = {(room(name), room(other)) for name in FILES for other in imports(name)}
    assert ("ppo", "generation") in used and ("evaluation", "generation") in used
    for lower in ("generation", "prompts", "models", "reward_model", "rewards", "data"):
        assert not {upper for upper in NEIGHBOURS if (lower, upper) in used}, lower
    for one in NEIGHBOURS:
        assert not {other for other in NEIGHBOURS if one != other and (one, other) in used}, one


@pytest.mark.parametrize("name", CHEAP)
def test_a_cheap_module_stays_cheap(name):
    code = (
        f"import sys, codexhf.{name}; print(*{{'torch', 'transformers', 'trl'}} & {{*sys.modules}})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout.strip(), done.stdout + done.stderr


def test_functions_fit_on_a_page():
    lengths = {
        (name, node.name): node.end_lineno - node.lineno + 1
        for name, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert len(lengths) > 500
    assert not {where: n for where, n in lengths.items() if n > 60}


def test_recipes_fit_on_a_page_without_branches_and_never_import_each_other():
    recipes = [*(ROOT / "recipes").glob("*.py")]
    assert len(recipes) == 8
    branches = ast.If | ast.For | ast.While | ast.IfExp | ast.Try
    for recipe in recipes:
        text = recipe.read_text()
        tree = ast.parse(text)
        inside = [n for node in tree.body[:-1] for n in ast.walk(node)]  # the last is the guard
        assert not [n for n in inside if isinstance(n, branches)], recipe
        assert not [n for n in inside if getattr(n, "module", "").startswith("recipes")], recipe
        assert len(text.splitlines()) <= 60, recipe
        assert ast.get_docstring(tree).count("accelerate launch") >= 2, recipe
