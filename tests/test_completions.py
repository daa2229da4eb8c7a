"""The code in a completion, as a reader would find it.

python -m pytest tests/test_completions.py
"""

import time

import pytest

from codexhf.completions import code_of, fenced_blocks

F = "def f(x):\n    return x + 1\n"
G = "def g(x):\n    return f(x) * 2\n"
USE = "print(f(2))\n"
IMPORT = "import math\n"
CUT = "def f(x):\n    return (x +"
CRASHES = "f = 1 / 0\ndef f(x): pass\n"
SCRIPT = "n = int(input())\nprint(n + 1)\n"
DOCTEST = ">>> def f(x):\n...     return x + 1\n>>> f(1)\n2\n"
IN_DOCSTRING = 'def f(x):\n    """\n    ```\n    f()\n    ```\n    """\n    return x\n'


def fence(code, language="python", mark="```"):
    end = "" if code.endswith("\n") else "\n"
    return f"{mark}{language}\n{code}{end}{mark}"


def indent(text, by):
    return "".join(by + line for line in text.splitlines(keepends=True))


CASES = {
    # text that is code
    "nothing": ("", ""),
    "bare code": (F, F),
    "bare script": (SCRIPT, SCRIPT),
    "only a comment": ("# nothing\n", "# nothing\n"),
    "code with a fence in a docstring": (IN_DOCSTRING, IN_DOCSTRING),
    "code with a fence in a string": ('s = "```"\n', 's = "```"\n'),
    "bare code cut off": (CUT, CUT),
    "windows line ends": (F.replace("\n", "\r\n"), F.replace("\n", "\r\n")),
    # one block
    "block": (fence(F), F),
    "block without a language": (fence(F, ""), F),
    "block in py": (fence(F, "py"), F),
    "block in Python 3": (fence(F, "Python3"), F),
    "block with more behind the language": (fence(F, "python title=f.py"), F),
    "block of tildes": (fence(F, "py", "~~~"), F),
    "block of four backticks": (fence(F, "python", "````"), F),
    "prose before": (f"Here you are:\n\n{fence(F)}", F),
    "prose after": (f"{fence(F)}\n\nIt adds one.", F),
    "prose around": (f"Sure!\n{fence(F)}\nHope it helps.", F),
    "no newline behind the closing fence": (fence(F).rstrip(), F),
    "no newline before the closing fence": (f"```python\n{F.rstrip()}```", F),
    "closing fence and prose": (f"```python\n{F}``` This adds one.", F),
    "no closing fence": (f"Here:\n```python\n{F}", F),
    "cut off": (f"```python\n{CUT}", CUT),
    "empty block": ("```python\n```", ""),
    "block on one line": ("```python def f(x): return x + 1```", "def f(x): return x + 1\n"),
    "block on one line, no language": ("Use:\n```def f(x): return x```\n", "def f(x): return x\n"),
    "block with a docstring that has a fence": (fence(IN_DOCSTRING), IN_DOCSTRING),
    "indented block": (indent(fence(F), "  "), F),
    "block in a list": (f"1. The code:\n\n{indent(fence(F), '   ')}\n\n2. Done.", F),
    "block that begins a list item": (f"- {fence(F)[:9]}\n{indent(F, '  ')}  ```", F),
    "quoted block": (indent(fence(F) + "\n", "> "), F),
    "tabs before a block": (indent(fence("x = 1\n"), "\t"), "x = 1\n"),
    "Markdown block": ("````md\n```\nx\n```\n````", "```\nx\n```\n"),
    "blank lines in a block": (fence(f"{F}\n\n{G}"), f"{F}\n\n{G}"),
    # several blocks
    "imports, then the function": (f"{fence(IMPORT)}\nand\n{fence(F)}", f"{IMPORT}\n{F}"),
    "helper, then the function": (f"{fence(F)}\n{fence(G)}", f"{F}\n{G}"),
    "imports, helper, function": (
        f"{fence(IMPORT)}\n{fence(F)}\n{fence(G)}",
        f"{IMPORT}\n{F}\n{G}",
    ),
    "function, then its use": (f"{fence(F)}\nExample:\n{fence(USE)}", F),
    "use, then the function": (f"You can call\n{fence(USE)}\nwith\n{fence(F)}", F),
    "function, then asserts": (f"{fence(F)}\n{fence('assert f(1) == 2', '')}", F),
    "draft, then a better one": (f"{fence('def f(x): return 0')}\nNo:\n{fence(F)}", F),
    "draft that would crash": (f"{fence(CRASHES)}\nBetter:\n{fence(F)}", F),
    "shell block first": (f"{fence('pip install x', 'bash')}\n{fence(F)}", F),
    "shell block last": (f"{fence(F)}\nRun:\n{fence('python f.py', 'sh')}", F),
    "output block": (f"{fence(F)}\nOutput:\n{fence('3', 'text')}", F),
    "output block without a language": (f"{fence(F)}\nOutput:\n{fence('3', '')}", F),
    "JSON block": (f"{fence('{}', 'json')}\n{fence(F)}", F),
    "another language first": (f"{fence('int f;', 'c')}\n{fence(F)}", F),
    "block that is not Python, unlabelled": (f"{fence('$ make', '')}\n{fence(F, '')}", F),
    "two scripts": ("```\nx = 1\n```\nor\n```\ny = 2\n```", "x = 1\n"),
    "imports, then a script": (f"{fence(IMPORT)}\n{fence(SCRIPT)}", f"{IMPORT}\n{SCRIPT}"),
    "second block cut off": (f"{fence(F)}\nAlso:\n```python\n{CUT}", F),
    "forgotten closing fence": (f"```python\n{F}```python\n{G}```", f"{F}\n{G}"),
    "interpreter session after the function": (f"{fence(F)}\n{fence(DOCTEST, 'pycon')}", F),
    "interpreter session alone": (fence(DOCTEST), "def f(x):\n    return x + 1\nf(1)\n"),
    # thinking
    "draft in a think block": (f"<think>\n{fence('x = 1')}\n</think>\n{fence(F)}", F),
    "think block, bare code": (f"<think>Easy.</think>\n\n{F}", F),
    "only the end of the think block": (f"I add.\n</think>\n{F}", F),
    "think block cut off": (f"<think>\nMaybe {fence(F)}", ""),
    "think block spoken of": (f"The tag <think> is not code.\n{fence(F)}", F),
    # prose around code without a fence
    "prose, then code": (f"Here is the function:\n\n{F}", F),
    "prose directly above code": (f"Here is the function:\n{F}", F),
    "code, then prose": (f"{F}\nThis function adds one.\n", F),
    "prose around code": (f"Sure.\n\n{F}\nIt's simple, isn't it?", F),
    "prose around two functions": (f"Sure:\n\n{F}\n{G}\nThat's it, enjoy.", f"{F}\n{G}"),
    "prose and imports": (f"Sure:\n\n{IMPORT}\n{F}", f"{IMPORT}\n{F}"),
    "decorated function in prose": (f"So it's:\n\n@cache\n{F}", f"@cache\n{F}"),
    "indented code in prose": (f"Like so:\n\n{indent(F, '    ')}", F),
    "code that goes wrong further in": (f"{F}\n    junk (", f"{F}\n    junk ("),
    "prose alone": ("I cannot help with that, sorry.", "I cannot help with that, sorry."),
    "inline code": ("no `code` here", "no `code` here"),
}


def test_the_table_is_long_enough():
    assert len(CASES) >= 60


@pytest.mark.parametrize("name", CASES)
def test_code_of(name):
    completion, code = CASES[name]
    assert code_of(completion) == code


@pytest.mark.parametrize(
    "text",
    ["`" * 200_000, "~" * 200_000, "```\n" * 50_000, "> " * 100_000, "def f(\n\n" * 20_000,
     "- " * 100_000, "```x" * 50_000, "<think>" * 50_000, " \n" * 100_000 + "def f("],
)  # fmt: skip
def test_what_a_model_repeats_costs_no_more_than_its_length(text):
    start = time.process_time()
    assert isinstance(code_of(text), str)
    assert time.process_time() - start < 3


def test_fenced_blocks_names_the_language_of_each():
    text = f"{fence('ls', 'bash')}\n{fence(F)}"
    assert [block.language for block in fenced_blocks(text)] == ["bash", "python"]
