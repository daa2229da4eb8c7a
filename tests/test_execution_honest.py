"""Honest programs and tests of many kinds, each judged as plain Python judges it, in each launcher.

    pytest tests/test_execution_honest.py -s        # prints the figures

`ASSERTS`: (program, tests) where the entry point is `f` or the one class; `CALLS`: (body of f, args,
expected); `PROGRAMS`: (program, stdin, stdout). Plain Python passes all of them; that is checked
first, with the tests behind the program in one file.
"""

# ruff: noqa: E501  (one case a line is easier to read than a wrapped one)

import json
import re
import subprocess
import sys

import pytest

from codexhf.execution import Executor, SandboxUnavailable, check_tests, launchers, plain

ECHO = "def f(x): return x"
POINT = "from dataclasses import dataclass\n@dataclass(order=True)\nclass Point:\n    x: int\n    y: int = 0\n    def norm(self): return abs(self.x) + abs(self.y)\n"
VECTOR = "class Vector:\n    def __init__(s, x, y): s.x, s.y = x, y\n    def __add__(s, o): return Vector(s.x + o.x, s.y + o.y)\n    def __mul__(s, k): return Vector(s.x * k, s.y * k)\n    def __eq__(s, o): return (s.x, s.y) == (o.x, o.y)\n    def __hash__(s): return hash((s.x, s.y))\n    def __abs__(s): return (s.x ** 2 + s.y ** 2) ** 0.5\n    def __lt__(s, o): return abs(s) < abs(o)\n    def __repr__(s): return f'Vector({s.x}, {s.y})'\n    def __neg__(s): return Vector(-s.x, -s.y)\n    def __bool__(s): return bool(s.x or s.y)\n    def __iter__(s): return iter((s.x, s.y))\n    def __len__(s): return 2\n    def __getitem__(s, i): return (s.x, s.y)[i]\n    def __contains__(s, v): return v in (s.x, s.y)\n    def __sub__(s, o): return Vector(s.x - o.x, s.y - o.y)\n    def __call__(s, t): return s * t\n"
ASK = "def f():\n    name = input('Name? ')\n    print('Hello ' + name)\n    return name"
SAY = "def f(x):\n    print('x is', x)\n    return x"

ASSERTS = [
    # results
    ("def f(): return 10 ** 5000", "assert f() == 10 ** 5000"),
    ("def f(): return 'x' * 5_000_000", "assert f() == 'x' * 5_000_000"),
    ("def f(): return list(range(400_000))", "assert f() == list(range(400_000))"),
    ("def f(x): return sum(x)", "assert f(list(range(1_000_000))) == 499999500000"),
    ("def f(x): return len(x)", "assert f('a' * 6_000_000) == 6_000_000"),
    ("from fractions import Fraction\ndef f(): return Fraction(1, 3)", "from fractions import Fraction\nassert f() == Fraction(1, 3)"),
    ("from decimal import Decimal\ndef f(): return Decimal('1.10')", "from decimal import Decimal\nassert f() == Decimal('1.1')"),
    ("from array import array\ndef f(): return array('i', [1, 2])", "from array import array\nassert f() == array('i', [1, 2])"),
    (POINT + "def f(): return Point(1, 2)", "assert f() == Point(1, 2)"),
    (POINT + "def f(): return [Point(1), Point(2)]", "assert f() == [Point(1), Point(2)]"),
    (POINT + "def f(): return {'a': Point(1)}", "assert f()['a'] == Point(1) and f()['a'].x == 1"),
    (POINT + "def f(p): return p.norm()", "assert f(Point(-3, 4)) == 7"),
    (POINT + "def f(p): return max(p)", "assert f([Point(1), Point(3), Point(2)]) == Point(3)"),
    (POINT + "def f(p): return sorted(p)", "assert [p.x for p in f([Point(2), Point(1)])] == [1, 2]"),
    ("import enum\nclass Color(enum.Enum):\n    RED = 1\n    BLUE = 2\ndef f(): return Color.RED", "assert f() == Color.RED\nassert f() is Color.RED"),
    ("import enum\nclass Color(enum.Enum):\n    RED = 1\ndef f(c): return c.name", "assert f(Color.RED) == 'RED'"),
    ("import enum\nclass Level(enum.IntEnum):\n    LOW = 1\n    HIGH = 2\ndef f(): return Level.HIGH", "assert f() == 2 and f() > 1"),
    ("from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)", "assert f() == (1, 2) and f() == P(1, 2)"),
    ("x = object()\ndef f(): return x", "assert f() is f()"),
    ("def f(a): return a", "a = [1]\nassert f(a) is a"),
    ("def f(a): return a[:]", "a = [1]\nb = f(a)\nassert b == a and b is not a"),
    ("def f(a): return {'k': a}", "a = [1]\nassert f(a)['k'] is a"),
    ("from datetime import datetime\ndef f(): return datetime(2024, 1, 2)", "from datetime import datetime\nassert f() == datetime(2024, 1, 2)"),
    ("def f(n):\n    x = []\n    for _ in range(n): x = [x]\n    return x", "x = f(150)\nn = 0\nwhile x:\n    x = x[0]\n    n += 1\nassert n == 150"),
    ("def f(): return {(1, 2): {3}, 'k': [None, True, 1.5]}", "assert f() == {(1, 2): {3}, 'k': [None, True, 1.5]}"),
    ("def f(): return complex(1, 2)", "assert f() == 1 + 2j"),
    ("def f(): return b'ab'", "assert f() == b'ab'"),
    ("def f(): return frozenset([1])", "assert f() == frozenset([1]) and isinstance(f(), frozenset)"),
    ("def f(): return range(3)", "assert list(f()) == [0, 1, 2] and f() == range(3)"),
    ("def f(): return float('inf')", "assert f() == float('inf')"),
    ("def f():\n    yield 1\n    yield 2", "assert list(f()) == [1, 2]"),
    ("def f():\n    n = 0\n    while True:\n        n += 1\n        yield n", "g = f()\nassert [next(g) for _ in range(3)] == [1, 2, 3]"),
    ("def f(): return type", "assert f() is type"),
    ("def f(): return int", "assert f()('3') == 3"),
    ("def f(k): return lambda x: x + k", "g = f(2)\nassert g(3) == 5 and callable(g)"),
    ("import functools\ndef f(g, x): return functools.partial(g, x)", "assert f(max, 3)(2) == 3"),
    ("def f(): return memoryview(b'ab')", "assert bytes(f()) == b'ab'"),
    ("def f(): return zip([1], [2])", "assert list(f()) == [(1, 2)]"),
    ("def f(): return {1: 2}.items()", "assert list(f()) == [(1, 2)]"),
    ("def f(): return {1: 2}.keys()", "assert 1 in f() and list(f()) == [1]"),
    ("import re\ndef f(s): return re.match(r'(\\w+)', s)", "assert f('ab c').group(1) == 'ab'\nassert f('!') is None"),
    ("from collections import defaultdict\ndef f():\n    d = defaultdict(list)\n    d['a'].append(1)\n    return d", "assert f() == {'a': [1]}"),
    ("from collections import deque\ndef f(): return deque([1, 2])", "from collections import deque\nassert f() == deque([1, 2])"),
    ("class L(list): pass\ndef f(): return L([1])", "assert f() == [1]"),
    # arguments
    ("def f(a): a.append(4)", "a = [1]\nf(a)\nassert a == [1, 4]"),
    ("def f(a): a.sort()", "a = [3, 1, 2]\nf(a)\nassert a == [1, 2, 3]"),
    ("def f(a): a[0][0] = 9", "a = [[1], [2]]\ninner = a[0]\nf(a)\nassert a == [[9], [2]] and inner == [9]"),
    ("def f(d): d['k'] = 1", "d = {}\nf(d)\nassert d == {'k': 1}"),
    ("def f(d): d.pop('k')", "d = {'k': 1, 'l': 2}\nf(d)\nassert d == {'l': 2}"),
    ("def f(s): s.add(3)", "s = {1}\nf(s)\nassert s == {1, 3}"),
    ("def f(b): b[0] = 66", "b = bytearray(b'AB')\nf(b)\nassert b == b'BB'"),
    ("def f(a):\n    a.sort()\n    return a", "a = [2, 1]\nassert f(a) == [1, 2]\nassert a == [1, 2]"),
    ("def f(a): return sorted(a)", "a = [2, 1]\nassert f(a) == [1, 2]\nassert a == [2, 1]"),
    ("def f(a, b): a.extend(b)", "a = [1]\nf(a, a[:])\nassert a == [1, 1]"),
    ("def f(a, b):\n    a.append(1)\n    return b", "a = []\nassert f(a, a) == [1]"),
    ("def f(m):\n    for r in m: r.reverse()\n    m.reverse()", "m = [[1, 2], [3, 4]]\nf(m)\nassert m == [[4, 3], [2, 1]]"),
    ("def f(d): d['l'].append(2)", "d = {'l': [1]}\nf(d)\nassert d['l'] == [1, 2]"),
    ("def f(*a, **k): return a, k", "assert f(1, *[2], k=3) == ((1, 2), {'k': 3})"),
    ("def f(t, x): return isinstance(x, t)", "assert f(int, 3) and not f(str, 3)"),
    ("def f(t): return t.__name__", "assert f(dict) == 'dict'"),
    ("def f(it): return sum(it)", "assert f(x * x for x in range(4)) == 14"),
    ("def f(it): return next(iter(it))", "import itertools\nassert f(itertools.count(5)) == 5"),
    ("def f(it): return list(it)", "assert f(iter([1, 2])) == [1, 2] and f(map(str, [1])) == ['1']"),
    ("def f(g, n):\n    for _ in range(n): n = g(n)\n    return n", "assert f(lambda x: x + 1, 3) == 6"),
    ("def f(g):\n    try: g()\n    except ZeroDivisionError: return 'zero'", "assert f(lambda: 1 / 0) == 'zero'"),
    ("def f(xs, key): return sorted(xs, key=key)", "assert f(['bb', 'a'], key=len) == ['a', 'bb']"),
    ("def f(o): return o.x", "class T:\n    x = 4\nassert f(T()) == 4"),
    ("def f(o): return len(o)", "class T:\n    def __len__(self): return 3\nassert f(T()) == 3"),
    ("def f(node): return node.next.v", "class Node:\n    def __init__(self, v, next=None): self.v, self.next = v, next\nassert f(Node(1, Node(2))) == 2"),
    ("def f(r): return len(r)", "assert f(range(10)) == 10"),
    ("def f(x): return x", "assert f(f(3)) == 3"),
    ("import math\ndef f(x): return x", "assert f(2) < math.pi"),
    ("from math import isclose\ndef f(x): return x / 3", "assert isclose(f(1), 1 / 3)"),
    ("LIMIT = 5\ndef f(): return LIMIT", "assert f() == LIMIT"),
    ("seen = []\ndef f(x): seen.append(x)", "f(1)\nf(2)\nassert seen == [1, 2]"),
    ("def g(x): return x + 1\ndef f(x): return g(x)", "assert f(1) == 2 and g(1) == 2"),
    ("def helper(x): return x * 2\ndef f(x): return helper(x)", "assert f(3) == helper(3) == 6"),
    ("count = 0\ndef f():\n    global count\n    count += 1\n    return count", "assert f() == 1 and f() == 2"),
    # exceptions
    ("def f(x): raise ValueError('bad')", "try:\n    f(1)\n    assert False\nexcept ValueError as e:\n    assert str(e) == 'bad'"),
    ("class MyError(Exception):\n    def __init__(s, code): s.code = code\ndef f(): raise MyError(7)", "try:\n    f()\nexcept MyError as e:\n    assert e.code == 7\nelse:\n    assert False"),
    ("def f(): raise KeyError('k')", "try:\n    f()\n    assert False\nexcept KeyError as e:\n    assert e.args == ('k',) and str(e) == \"'k'\""),
    ("def f(): raise SystemExit(3)", "try:\n    f()\n    assert False\nexcept SystemExit as e:\n    assert e.code == 3"),
    ("import sys\ndef f(): sys.exit('no')", "import pytest\nwith pytest.raises(SystemExit):\n    f()"),
    ("f = 3", "try:\n    f(1)\n    assert False\nexcept TypeError:\n    pass"),
    ("def f(n): return f(n - 1) if n else 0", "assert f(900) == 0\ntry:\n    f(10 ** 6)\n    assert False\nexcept RecursionError:\n    pass"),
    ("def f(x): return x", "try:\n    f()\n    assert False\nexcept TypeError:\n    pass"),
    ("def f():\n    assert False, 'mine'", "try:\n    f()\nexcept AssertionError as e:\n    assert str(e) == 'mine'\nelse:\n    raise Exception"),
    ("def f(x): return 1 / x", "import pytest\nwith pytest.raises(ZeroDivisionError):\n    f(0)\nassert f(2) == 0.5"),
    ("def f(x):\n    raise ValueError('bad 3')", "import pytest\nwith pytest.raises(ValueError, match='bad .') as e:\n    f(0)\nassert 'bad' in str(e.value)"),
    ("class Low(Exception): pass\nclass Lower(Low): pass\ndef f(): raise Lower", "try:\n    f()\n    assert False\nexcept Low:\n    pass"),
    # the process: input, output, time, environment, files, warnings
    (ASK, "import builtins\nbuiltins.input = lambda *a: 'Ann'\nassert f() == 'Ann'"),
    (ASK, "from unittest.mock import patch\nwith patch('builtins.input', return_value='Bo'):\n    assert f() == 'Bo'"),
    (ASK, "from unittest.mock import patch\nimport io, contextlib\nout = io.StringIO()\nwith patch('builtins.input', return_value='Bo'), contextlib.redirect_stdout(out):\n    f()\nassert out.getvalue() == 'Hello Bo\\n'"),
    (ASK, "import sys, io\nsys.stdin = io.StringIO('Al\\n')\nassert f() == 'Al'"),
    (SAY, "import io, sys\nold, sys.stdout = sys.stdout, io.StringIO()\nf(3)\nout, sys.stdout = sys.stdout.getvalue(), old\nassert out == 'x is 3\\n'"),
    (SAY, "import io\nfrom contextlib import redirect_stdout\nb = io.StringIO()\nwith redirect_stdout(b):\n    f(4)\nassert b.getvalue().strip() == 'x is 4'"),
    ("import time\ndef f(): return time.time()", "import time\ntime.time = lambda: 5.0\nassert f() == 5.0"),
    ("import time\ndef f():\n    time.sleep(100)\n    return 1", "from unittest.mock import patch\nwith patch('time.sleep') as s:\n    assert f() == 1\n    s.assert_called_once_with(100)"),
    ("import os\ndef f(): return os.environ.get('KEY')", "import os\nos.environ['KEY'] = 'v'\nassert f() == 'v'"),
    ("import os\ndef f(): return os.getenv('KEY', 'none')", "import os\nfrom unittest.mock import patch\nwith patch.dict(os.environ, {'KEY': 'w'}):\n    assert f() == 'w'\nassert f() == 'none'"),
    ("import random\ndef f(): return random.randint(1, 6)", "import random\nrandom.seed(4)\na = f()\nrandom.seed(4)\nassert f() == a and 1 <= a <= 6"),
    ("import random\ndef f(xs): return random.choice(xs)", "assert f([3, 4]) in (3, 4)"),
    ("import warnings\ndef f(): warnings.warn('old', DeprecationWarning)", "import warnings\nwith warnings.catch_warnings(record=True) as w:\n    warnings.simplefilter('always')\n    f()\nassert len(w) == 1 and 'old' in str(w[0].message)"),
    ("import logging\ndef f(): logging.getLogger('p').warning('careful')", "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        with self.assertLogs('p') as c:\n            f()\n        self.assertIn('careful', c.output[0])"),
    ("def f(x):\n    '''Double x.'''\n    return 2 * x", "assert f.__doc__ == 'Double x.' and f.__name__ == 'f' and f(2) == 4"),
    ("import inspect\ndef f(a, b=2): return a + b", "import inspect\nassert list(inspect.signature(f).parameters) == ['a', 'b']\nassert f(1) == 3"),
    ("import asyncio\nasync def f(x):\n    await asyncio.sleep(0)\n    return x + 1", "import asyncio\nassert asyncio.run(f(1)) == 2"),
    ("def f(x): return x + 1", "total = 0\nfor i in range(100_000):\n    total += f(i)\nassert total == 5000050000"),
    ("def f(x): return x + 1", "for i in range(100_000):\n    assert f(i) == i + 1"),
    # classes
    (VECTOR, "assert Vector(1, 2) + Vector(3, 4) == Vector(4, 6)"),
    (VECTOR, "assert abs(Vector(3, 4)) == 5 and Vector(1, 0) < Vector(2, 0)"),
    (VECTOR, "assert abs(abs(Vector(1, 1)) - 1.41421) < 1e-3"),
    (VECTOR, "assert sorted([Vector(2, 0), Vector(1, 0)]) == [Vector(1, 0), Vector(2, 0)]"),
    (VECTOR, "assert len({Vector(1, 2), Vector(1, 2)}) == 1"),
    (VECTOR, "assert Vector(1, 2) in [Vector(1, 2)] and Vector(1, 2) not in []"),
    (VECTOR, "assert repr(Vector(1, 2)) == 'Vector(1, 2)' and f'{Vector(1, 2)}' == 'Vector(1, 2)'"),
    (VECTOR, "assert sum([Vector(1, 1), Vector(2, 2)], Vector(0, 0)) == Vector(3, 3)"),
    (VECTOR, "assert -Vector(1, 2) == Vector(-1, -2) and not Vector(0, 0) and Vector(1, 0)"),
    (VECTOR, "x, y = Vector(1, 2)\nassert (x, y) == (1, 2) and 2 in Vector(1, 2) and len(Vector(1, 2)) == 2"),
    (VECTOR, "assert Vector(1, 2) != Vector(2, 1)\nassert Vector(1, 2)(3) == Vector(3, 6)"),
    (VECTOR, "v = Vector(1, 2)\nv.x = 5\nassert v.x == 5 and v[0] == 5 and v == Vector(5, 2)"),
    (VECTOR, "d = {Vector(1, 2): 'a'}\nassert d[Vector(1, 2)] == 'a'"),
    (VECTOR, "v = Vector(1, 2)\nv += Vector(1, 1)\nassert v == Vector(2, 3)"),
    (VECTOR, "assert isinstance(Vector(1, 2), Vector) and hasattr(Vector, '__add__')"),
    (VECTOR, "assert max(Vector(1, 0), Vector(2, 0)).x == 2"),
    ("class Account:\n    def __init__(s): s.balance = 0\n    def deposit(s, n):\n        if n <= 0: raise ValueError('positive')\n        s.balance += n\n        return s\n", "a = Account()\na.deposit(5).deposit(2)\nassert a.balance == 7\ntry:\n    a.deposit(-1)\n    assert False\nexcept ValueError as e:\n    assert 'positive' in str(e)"),
    ("class Node:\n    def __init__(s, v, left=None, right=None): s.v, s.left, s.right = v, left, right\ndef f(n): return 0 if n is None else 1 + max(f(n.left), f(n.right))", "root = Node(1)\nroot.left = Node(2)\nroot.left.left = Node(3)\nassert f(root) == 3"),
    ("class Base:\n    def name(s): return 'base'\nclass Child(Base):\n    def name(s): return 'child ' + super().name()\n", "assert Child().name() == 'child base' and issubclass(Child, Base)"),
    ("class Counter2:\n    made = 0\n    def __init__(s): Counter2.made += 1\n    @classmethod\n    def count(c): return c.made\n    @staticmethod\n    def two(): return 2\n    @property\n    def three(s): return 3\n", "Counter2()\nCounter2()\nassert Counter2.made == 2 and Counter2.count() == 2 and Counter2.two() == 2 and Counter2().three == 3"),
    ("class Stack:\n    def __init__(s): s.i = []\n    def push(s, x): s.i.append(x)\n    def pop(s): return s.i.pop()\n    def __len__(s): return len(s.i)\n", "s = Stack()\nx = object()\ns.push(3)\nassert len(s) == 1 and s.pop() == 3\ntry:\n    s.pop()\n    assert False\nexcept IndexError:\n    pass"),
    ("class Matrix:\n    def __init__(s, r): s.r = r\n    def __matmul__(s, o): return Matrix([[sum(a * b for a, b in zip(x, y)) for y in zip(*o.r)] for x in s.r])\n    def __eq__(s, o): return s.r == o.r\n", "assert Matrix([[1, 2]]) @ Matrix([[3], [4]]) == Matrix([[11]])"),
    ("class Cached:\n    def __enter__(s):\n        s.open = True\n        return s\n    def __exit__(s, *e):\n        s.open = False\n        return True\n", "c = Cached()\nwith c as d:\n    assert d.open\n    raise ValueError\nassert not c.open"),
    ("class Temp:\n    def __init__(s, c): s.c = c\n    @property\n    def f(s): return s.c * 9 / 5 + 32\n    @f.setter\n    def f(s, v): s.c = (v - 32) * 5 / 9\n", "t = Temp(100)\nassert t.f == 212\nt.f = 32\nassert t.c == 0"),
    ("class Money:\n    def __init__(s, n): s.n = n\n    def __eq__(s, o): return s.n == (o.n if isinstance(o, Money) else o)\n    def __sub__(s, o): return Money(s.n - o)\n    def __float__(s): return float(s.n)\n", "assert Money(3) == 3 and Money(5) - 2 == Money(3) and float(Money(2)) == 2.0"),
    # unittest and pytest
    (ECHO, "import unittest\nclass T(unittest.TestCase):\n    def test_a(self): self.assertEqual(f(1), 1)\n    def test_b(self): self.assertTrue(f(True))\n    def test_c(self):\n        with self.assertRaises(TypeError): f()\n"),
    (ECHO, "import unittest\nclass T(unittest.TestCase):\n    def setUp(self): self.x = f(3)\n    def test_a(self): self.assertAlmostEqual(self.x, 3.0000000001)\n    def test_b(self): self.assertIn(self.x, [3])\n    def test_c(self): self.assertIsNone(f(None))\n    def test_d(self): self.assertGreater(f(2), 1)\n    def test_e(self): self.assertListEqual(f([1]), [1])\n    def test_f(self): self.assertIsInstance(f('a'), str)\n    def test_g(self): self.assertRaises(TypeError, f)\n    def test_h(self): self.assertFalse(f(0))\n"),
    (ECHO, "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        for x in (1, 2):\n            with self.subTest(x=x): self.assertEqual(f(x), x)\nif __name__ == '__main__':\n    unittest.main()"),
    (ECHO, "import pytest\n@pytest.mark.parametrize('a, b', [(1, 1), (2, 2)])\ndef test_f(a, b):\n    assert f(a) == b"),
    (ECHO, "import pytest\ndef test_f():\n    assert f(0.1 + 0.2) == pytest.approx(0.3)"),
    (ECHO, "def test_one():\n    assert f(1) == 1\ndef test_two():\n    assert f('a') == 'a'\ntest_one()\ntest_two()"),
    ("import threading\ndef f(n):\n    out = []\n    ts = [threading.Thread(target=out.append, args=(i,)) for i in range(n)]\n    [t.start() for t in ts]\n    [t.join() for t in ts]\n    return sorted(out)", "import threading\nassert f(4) == [0, 1, 2, 3]\nassert threading.active_count() == 1"),
    # forms of tests
    ("def check(x): return x > 0", "assert check(1) and not check(-1)"),
    (ECHO, "cases = [(1, 1), ([2], [2])]\nfor given, wanted in cases:\n    assert f(given) == wanted, f'{given}'"),
    (ECHO, "def check(candidate):\n    assert candidate(1) == 1\ncheck(f)"),
    (ECHO, "import math\ndef check(candidate):\n    assert math.isclose(candidate(0.1), 0.1)\n    assert all(candidate(i) == i for i in range(9))"),
    (ECHO, "assert (lambda y: f(y))(2) == 2\nassert [f(i) for i in range(3)] == [0, 1, 2]\nassert {f(1): 2} == {1: 2}"),
    (ECHO, "assert f(1) == 1 or f(2) == 3\nassert not f(0)\nassert f('abc').startswith('a')\nassert 1 in f([1])\nassert 0 <= f(5) <= 10"),
    (ECHO, "x = f([3, 1])\nx.sort()\nassert x == [1, 3]\nassert isinstance(x, list) and len(x) == 2"),
    (ECHO, "expected = [1, 2]\nassert f([1, 2]) == expected\nresult = f({'a': 1})\nassert result['a'] == 1 and set(result) == {'a'}"),
    ("def f(x): return -x", "assert f(1) == -1\nassert f(-2.5) == 2.5\nassert abs(f(3) + 3) < 1e-9"),
    ("def f(a, b): return a / b", "assert round(f(1, 3), 2) == 0.33\nassert str(f(1, 2)) == '0.5'\nassert int(f(5, 2)) == 2"),
    # limits as plain Python has them
    ("def f(n): return f(n - 1) + 1 if n else 0", "assert f(993) == 993"),
    ("import threading\ndef f(n):\n    out = []\n    ts = [threading.Thread(target=out.append, args=(i,)) for i in range(n)]\n    [t.start() for t in ts]\n    [t.join() for t in ts]\n    return sorted(out)", "assert f(8) == list(range(8))"),
    ("from concurrent.futures import ThreadPoolExecutor\ndef f(xs):\n    with ThreadPoolExecutor(4) as p: return list(p.map(abs, xs))", "assert f([-1, 2]) == [1, 2]"),
    ("import sys\nsys.setrecursionlimit(20000)\ndef f(n): return f(n - 1) + 1 if n else 0", "assert f(12000) == 12000"),
    ("def f(n):\n    x = None\n    for _ in range(n): x = (x,)\n    return x", "x = f(500)\nn = 0\nwhile x is not None:\n    x = x[0]\n    n += 1\nassert n == 500"),
    ("def f(n): return {i: str(i) for i in range(n)}", "assert f(200_000)[199_999] == '199999' and len(f(200_000)) == 200_000"),
    ("def f(x): return 3 ** x", "assert f(20_000) % 1_000_007 == pow(3, 20_000, 1_000_007)"),
    # tests that raise, loop and help themselves
    (ECHO, "if f(1) != 1:\n    raise ValueError('no')"),
    (ECHO, "for i in range(20_000):\n    if f(i) != i:\n        raise AssertionError(i)"),
    (ECHO, "if not f([1]):\n    raise SystemExit(1)"),
    (ECHO, "def same(a, b):\n    return abs(a - b) < 1e-9\nassert same(f(0.5), 0.5)\nassert same(f(2), 2)"),
    (ECHO, "import json\nfor case in json.loads('[[1, 1], [\"a\", \"a\"]]'):\n    assert f(case[0]) == case[1]"),
    (ECHO, "from collections import Counter\nassert Counter(f([1, 1, 2])) == Counter([1, 2, 1])"),
    (ECHO, "import copy\na = [[1], [2]]\nb = copy.deepcopy(a)\nassert f(a) == b\nassert a == b"),
    (ECHO, "import random\nfor _ in range(50):\n    x = [random.randint(0, 9) for _ in range(5)]\n    assert f(sorted(x)) == sorted(x)"),
    (ECHO, "import string, itertools\nassert f(string.digits) == ''.join(itertools.chain('01234', '56789'))"),
    (ECHO, "try:\n    f(1, 2)\nexcept TypeError as error:\n    assert 'positional' in str(error)\nelse:\n    raise AssertionError('no error')"),
    ("def f(x, *, strict=False):\n    if strict and x < 0: raise ValueError(f'negative: {x}')\n    return abs(x)", "assert f(-2) == 2\ntry:\n    f(-2, strict=True)\n    assert False, 'no error'\nexcept ValueError as e:\n    assert e.args[0] == 'negative: -2'"),
    ("def f(n):\n    while n: n -= 1\n    return 'done'", "import time\nbegan = time.perf_counter()\nassert f(1000) == 'done'\nassert time.perf_counter() - began < 60"),
    ("def f(s): return s.encode('utf-16')", "assert f('é').decode('utf-16') == 'é'"),
    ("def f(): return {'b': 1, 'a': [1, {'c': (2,)}]}", "import json\nassert json.dumps(f(), sort_keys=True) == '{\"a\": [1, {\"c\": [2]}], \"b\": 1}'"),
    ("def f(x): return x.upper()", "assert f('a') == 'A'; assert f('ß') == 'SS'\nassert [*map(f, 'ab')] == ['A', 'B']"),
    ("def f(grid):\n    for row in grid:\n        for i, v in enumerate(row): row[i] = v * 2\n    return grid", "g = [[1, 2], [3]]\nr = f(g)\nassert r is g and g == [[2, 4], [6]]"),
    ("from functools import lru_cache\n@lru_cache(None)\ndef f(n): return n if n < 2 else f(n - 1) + f(n - 2)", "assert f(80) == 23416728348467685\nassert f.cache_info().misses == 81"),
    ("def deco(g):\n    import functools\n    @functools.wraps(g)\n    def inner(*a):\n        inner.calls += 1\n        return g(*a)\n    inner.calls = 0\n    return inner\n@deco\ndef f(x): return x", "f(1)\nf(2)\nassert f.calls == 2 and f.__name__ == 'f'"),
    ("import re\ndef f(s): return re.compile(s)", "assert f('a+').match('aab').end() == 2 and f('a').pattern == 'a'"),
    ("import uuid\ndef f(): return uuid.UUID(int=5)", "import uuid\nassert f() == uuid.UUID(int=5) and f().int == 5"),
    ("import pathlib\ndef f(a, b): return pathlib.PurePosixPath(a) / b", "assert str(f('/a', 'b')) == '/a/b'"),
    ("from types import SimpleNamespace\ndef f(): return SimpleNamespace(a=1)", "assert f().a == 1 and f() == f()"),
    ("from typing import NamedTuple\nclass P(NamedTuple):\n    x: int\n    y: int = 0\ndef f(x): return P(x)", "assert f(1).x == 1 and f(1) == (1, 0) and f(1)._replace(y=3).y == 3"),
    # more of unittest and pytest
    (ECHO, "import unittest\nclass T(unittest.TestCase):\n    @classmethod\n    def setUpClass(cls): cls.n = f(2)\n    def tearDown(self): self.x = None\n    def test(self):\n        self.assertEqual(self.n, 2)\n        self.assertCountEqual(f([2, 1]), [1, 2])\n        self.assertDictEqual(f({1: 2}), {1: 2})\n        self.assertRegex(f('abc'), 'b')\n        self.assertNotEqual(f(1), 2)\n"),
    (SAY, "import unittest, io\nfrom unittest.mock import patch\nclass T(unittest.TestCase):\n    @patch('sys.stdout', new_callable=io.StringIO)\n    def test(self, out):\n        f(7)\n        self.assertEqual(out.getvalue(), 'x is 7\\n')\n"),
    ("import os\ndef f(p): return os.path.exists(p)", "from unittest.mock import patch\nwith patch('os.path.exists', return_value=True) as seen:\n    assert f('/nowhere') is True\n    seen.assert_called_once_with('/nowhere')"),
    ("import json\ndef f(p):\n    with open(p) as h: return json.load(h)", "from unittest.mock import patch, mock_open\nwith patch('builtins.open', mock_open(read_data='[1, 2]')):\n    assert f('x.json') == [1, 2]"),
    ("import random\ndef f(xs):\n    random.shuffle(xs)\n    return xs", "from unittest.mock import patch\nwith patch('random.shuffle', lambda x: x.reverse()):\n    assert f([1, 2, 3]) == [3, 2, 1]"),
    ("import datetime\ndef f(): return datetime.date.today().year", "import datetime\nclass D(datetime.date):\n    @classmethod\n    def today(cls): return cls(1999, 1, 1)\nold, datetime.date = datetime.date, D\nassert f() == 1999\ndatetime.date = old"),
    ("class Cart:\n    def __init__(s): s.items = {}\n    def add(s, name, n=1): s.items[name] = s.items.get(name, 0) + n\n    def total(s, prices): return sum(prices[k] * n for k, n in s.items.items())\n", "import unittest\nclass T(unittest.TestCase):\n    def setUp(self): self.c = Cart()\n    def test_total(self):\n        self.c.add('a', 2)\n        self.c.add('b')\n        self.assertEqual(self.c.total({'a': 3, 'b': 1}), 7)\n    def test_empty(self): self.assertEqual(self.c.items, {})\n    def test_unknown(self):\n        self.c.add('z')\n        with self.assertRaises(KeyError): self.c.total({})\n"),
    ("def f(x):\n    if x < 0: raise ValueError('negative')\n    return x ** 0.5", "import pytest\n@pytest.mark.parametrize('x,want', [(4, 2), (9, 3)])\ndef test_root(x, want):\n    assert f(x) == want\ndef test_error():\n    with pytest.raises(ValueError, match='neg'):\n        f(-1)\n"),
    ("class Queue2:\n    def __init__(s): s.q = []\n    def put(s, x): s.q.append(x)\n    def get(s): return s.q.pop(0)\n    def __iter__(s): return iter(s.q)\n    def __eq__(s, o): return isinstance(o, Queue2) and s.q == o.q\n", "a, b = Queue2(), Queue2()\nfor x in (1, 2):\n    a.put(x)\n    b.put(x)\nassert a == b and list(a) == [1, 2]\nassert a.get() == 1 and a != b"),
    ("class Angle:\n    def __init__(s, d): s.d = d % 360\n    def __add__(s, o): return Angle(s.d + o.d)\n    def __eq__(s, o): return s.d == o.d\n    def __format__(s, spec): return f'{s.d}°'\n", "assert Angle(350) + Angle(20) == Angle(10)\nassert f'{Angle(5)}' == '5°'"),
]  # fmt: skip

SETTINGS = [  # (program, tests with settings, entry point)
    ("def f(n): return f(n - 1) if n else 0", {"code": "assert f(5000) == 0", "recursion": 6000}, "f"),
    ("def f(n): return f(n - 1) if n else 0", {"cases": [{"args": "(5000,)", "expected": "0"}], "recursion": 6000}, "f"),
    ("def r(n): return r(n - 1) if n else 0\nprint(r(5000))", {"cases": [{"stdin": "", "stdout": "0"}], "recursion": 6000}, ""),
    ("def f(n): return len(bytearray(n))", {"cases": [{"args": "(900_000_000,)", "expected": "900000000"}], "memory_mb": 2000}, "f"),
    ("import time\ndef f():\n    t = time.process_time()\n    while time.process_time() < t + 0.3: pass\n    return 1", {"cases": [{"args": "()", "expected": "1"}], "timeout_s": 9}, "f"),
    ("class Solution:\n    def f(self, a, b): return a, b", [{"args": "(1, [2])", "expected": "[1, [2]]", "compare": "json"}], "f"),
    ("class Solution:\n    def __init__(self): self.seen = []\n    def f(self, x):\n        self.seen.append(x)\n        return self.seen", [{"args": f"({i},)", "expected": f"[{i}]"} for i in (1, 2)], "f"),
    ("def f(x): return x + 1", [{"args": "(1,)", "expected": "[2]", "compare": "json or first"}], "f"),
    ("def f(x): return [(x, {'k': (x,)})]", [{"args": "(1,)", "expected": "[[1, {'k': [1]}]]", "compare": "json"}], "f"),
    ("print(2, 5)", {"cases": [{"stdin": "7", "stdout": "3 4"}], "checker": "def check(stdin, stdout, expected):\n    return sum(map(int, stdout.split())) == int(stdin)"}, ""),
    ("print('b a')", {"cases": [{"stdin": "", "stdout": "a b"}], "checker": "from collections import Counter\ndef check(stdin, stdout, expected): return Counter(stdout.split()) == Counter(expected.split())"}, ""),
    ("print('0.30000000000000004', 'x')", {"cases": [{"stdin": "", "stdout": "0.3 x"}], "compare": "floats:1e-9"}, ""),
    ("print('x' * 3_000_000)", {"cases": [{"stdin": "", "stdout": "x" * 3_000_000}], "output_mb": 1}, ""),
    ("def f(x):\n    print('seen', x)\n    return x", {"code": "assert f(2) == 2", "process": "together"}, "f"),
]  # fmt: skip

PACKAGED = [  # these need numpy and pandas
    ("import numpy as np\ndef f(n): return np.arange(n)", "import numpy as np\nassert np.array_equal(f(3), np.array([0, 1, 2]))"),
    ("import numpy as np\ndef f(n): return np.arange(n)", "assert f(3).tolist() == [0, 1, 2] and f(3).shape == (3,)"),
    ("import numpy as np\ndef f(a): return a.mean()", "import numpy as np\nassert np.isclose(f(np.array([1.0, 2.0])), 1.5)"),
    ("import numpy as np\ndef f(a): return float(np.std(a))", "assert abs(f([1, 3]) - 1.0) < 1e-9"),
    ("import numpy as np\ndef f(m): return np.linalg.inv(m)", "import numpy as np\nnp.testing.assert_allclose(f([[2.0, 0], [0, 4]]), [[0.5, 0], [0, 0.25]])\nassert f([[1.0]])[0][0] == 1"),
    ("import numpy as np\ndef f(m): return (np.array(m) > 1).sum()", "assert f([[1, 2], [3, 0]]) == 2"),
    ("import numpy as np\ndef f(a):\n    a[0] = 9\n    return a", "import numpy as np\na = np.zeros(2)\nassert f(a) is a and a[0] == 9"),
    ("import pandas as pd\ndef f(d): return pd.DataFrame(d)", "import pandas as pd\npd.testing.assert_frame_equal(f({'a': [1]}), pd.DataFrame({'a': [1]}))\nassert list(f({'a': [1]}).columns) == ['a']"),
    ("import pandas as pd\ndef f(df): return df['a'].sum()", "import pandas as pd\nassert f(pd.DataFrame({'a': [1, 2]})) == 3"),
    ("import pandas as pd\ndef f(df): return df.groupby('k')['v'].mean().to_dict()", "import pandas as pd\nassert f(pd.DataFrame({'k': ['x', 'x', 'y'], 'v': [1, 3, 5]})) == {'x': 2.0, 'y': 5.0}"),
    ("import pandas as pd\ndef f(rows): return pd.DataFrame(rows).to_csv(index=False)", "assert f([{'a': 1, 'b': 2}]) == 'a,b\\n1,2\\n'"),
    ("import numpy as np, pandas as pd\ndef f(n, seed):\n    np.random.seed(seed)\n    return pd.DataFrame({'x': np.random.rand(n)})", "import unittest, pandas as pd\nclass TestCases(unittest.TestCase):\n    def test_shape(self):\n        df = f(5, 0)\n        self.assertIsInstance(df, pd.DataFrame)\n        self.assertEqual(df.shape, (5, 1))\n    def test_seed(self):\n        self.assertTrue(f(3, 1).equals(f(3, 1)))\n    def test_values(self):\n        self.assertAlmostEqual(f(1, 0)['x'][0], 0.5488135, places=5)\n"),
]  # fmt: skip

FILES = [  # these need a place to write in, which Landlock alone does not give
    ("def f(p):\n    with open(p) as h: return h.read()", "with open('a.txt', 'w') as h: h.write('hi')\nassert f('a.txt') == 'hi'"),
    ("def f(p, t):\n    with open(p, 'w') as h: h.write(t)", "f('b.txt', 'yes')\nassert open('b.txt').read() == 'yes'"),
    ("import csv\ndef f(p): return sum(int(r['n']) for r in csv.DictReader(open(p)))", "import tempfile, os\nd = tempfile.mkdtemp()\np = os.path.join(d, 'x.csv')\nwith open(p, 'w') as h: h.write('n\\n1\\n2\\n')\nassert f(p) == 3"),
    ("import json, pathlib\ndef f(p): return json.loads(pathlib.Path(p).read_text())", "import pathlib\npathlib.Path('c.json').write_text('{\"a\": 1}')\nassert f('c.json') == {'a': 1}"),
    ("import os\ndef f(d): return sorted(os.listdir(d))", "import os, tempfile, shutil\nd = tempfile.mkdtemp()\nopen(os.path.join(d, 'z'), 'w').close()\nassert f(d) == ['z']\nshutil.rmtree(d)"),
]  # fmt: skip

CALLS = [
    ("return 10 ** 5000", "()", str(10**4000) + "0" * 1000),
    ("return x * 5_000_000", "('a',)", repr("a" * 5_000_000)),
    ("return sum(x)", repr((list(range(100_000)),)), "4999950000"),
    ("return x", repr(([[[[[1]]]]],)), "[[[[[1]]]]]"),
    ("for _ in range(150): x = [x]\n    return x", "(1,)", "[" * 150 + "1" + "]" * 150),
    ("return __import__('fractions').Fraction(x, 2)", "(1,)", "0.5"),
    ("return __import__('decimal').Decimal(x)", "('3',)", "3"),
    ("return f(x - 1) if x else 0", "(990,)", "0"),
    ("return {x: {x}}", "(1,)", "{1: {1}}"),
    ("return float(x)", "('nan',)", "nan"),
    ("return x.encode()", "('é',)", repr("é".encode())),
    ("x.sort()\n    return x", "([2, 1],)", "[1, 2]"),
    ("return isinstance(x, bool)", "(True,)", "True"),
    ("print(x)\n    return x", "(3,)", "3"),
    ("import time\n    return time.time() > 0", "(3,)", "True"),
    ("return ' ' * x", "(3,)", "'   '"),
    ("return x + 1j", "(1,)", "1+1j"),
    ("return -x", "(0.0,)", "0"),
    ("return tuple(x)", "([1],)", "(1,)"),
    ("return (*x, None)", "('ab',)", "('a', 'b', None)"),
]

PROGRAMS = [
    ("print(int(input()) + 1)", "1\n", "2\n"),
    ("import threading\nt = threading.Thread(target=lambda: print('in'))\nt.start()\nt.join()\nprint('out')", "", "in\nout"),
    ("import threading, sys\nsys.setrecursionlimit(10**6)\nthreading.stack_size(64 << 20)\ndef r(n): return 0 if n == 0 else 1 + r(n - 1)\ndef main(): print(r(50000))\nt = threading.Thread(target=main)\nt.start()", "", "50000"),
    ("from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(2) as p: print(*p.map(abs, [-1, 2]))", "", "1 2"),
    ("print(open('/dev/stdin').read().strip())", "hey", "hey"),
    ("import pathlib\nprint(pathlib.Path('/dev/stdin').read_text())", "hey", "hey"),
    ("print(open(0).read().upper())", "ab", "AB"),
    ("import os\nprint(os.read(0, 9).decode())", "ab", "ab"),
    ("print(__file__.endswith('.py'), __name__)", "", "True __main__"),
    ("import os\nos.path.dirname(os.path.abspath(__file__))\nprint(1)", "", "1"),
    ("with open(1, 'w') as out: out.write('one')", "", "one"),
    ("out = open(1, 'w', closefd=False)\nout.write('left open')", "", "left open"),
    ("import sys, io\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer, 'utf-8', line_buffering=False)\nprint('wrapped')", "", "wrapped"),
    ("import sys, io\nsys.stdin = io.TextIOWrapper(sys.stdin.buffer, 'utf-8')\nprint(input())", "é", "é"),
    ("import sys\nsys.stdout.buffer.write(b'bytes')", "", "bytes"),
    ("import io, os\nos.write(1, io.BytesIO(os.read(0, 99)).readline())", "ab\n", "ab"),
    ("import atexit\natexit.register(print, 'bye')", "", "bye"),
    ("class D:\n    def __del__(s): print('gone')\nd = D()", "", "gone"),
    ("def r(n): return 0 if n == 0 else 1 + r(n - 1)\nprint(r(990))", "", "990"),
    ("def r(n): return 0 if n == 0 else 1 + r(n - 1)\ntry: r(2000)\nexcept RecursionError: print('deep')", "", "deep"),
    ("import sys\nsys.setrecursionlimit(20000)\ndef r(n): return 0 if n == 0 else 1 + r(n - 1)\nprint(r(15000))", "", "15000"),
    ("print(input())\nprint(input())", "a\r\nb\r\n", "a\nb"),
    ("import sys\nfor l in sys.stdin: print(l.strip())", "a\r\nb", "a\r\nb\r\n"),
    ("import sys\nsys.exit(0)", "", ""),
    ("raise SystemExit", "", ""),
    ("exit()", "", ""),
    ("print('x' * 20_000_000)", "", "x" * 20_000_000),
    ("import sys\nn = int(sys.stdin.readline())\nprint(sum(map(int, sys.stdin.read().split())))\n", "2\n" + "1 " * 100_000, "100000"),
    ("def main():\n    print('m')\nif __name__ == '__main__':\n    main()", "", "m"),
    ("import sys\ninput = sys.stdin.readline\nprint(input().rstrip()[::-1])", "abc\n", "cba"),
    ("try:\n    while True: print(input())\nexcept EOFError: pass", "1\n2", "1\n2"),
    ("import signal\nsignal.alarm(0)\nprint('a')", "", "a"),
    ("import sys\nprint('err', file=sys.stderr)\nprint('out')", "", "out"),
    ("import heapq, bisect, itertools, functools, collections, math, re, string\nprint(math.gcd(4, 6))", "", "2"),
    ("print(*[1, 2], sep=', ', end='!\\n')", "", "1, 2!"),
    ("import sys\nprint(len(sys.argv))", "", "1"),
]  # fmt: skip

COMPARED = [  # (program, stdin, stdout, how)
    ("print(0.1 + 0.2)", "", "0.3", "floats:1e-9"),
    ("print('Case', 1 / 3)", "", "Case 0.333333", "floats:1e-5"),
    ("print(1,   2)\nprint(3)", "", "1 2 3", "tokens"),
    ("print('b')\nprint('a')", "", "a\nb\n", "any order"),
    ("print('a ')", "", "a \n", "exact"),
]


def entry(program, tests):
    if re.search(r"^(async )?def f\(|^f =", program, re.MULTILINE):
        return "f"
    if program.startswith("def check"):
        return "check"
    return program.split("class ")[1].split(":")[0].split("(")[0]


def judged(executor, items, packages=(), **limits):
    """Return what was not judged a pass: (item, verdict, detail)."""
    programs, tests, names = zip(*items, strict=True)
    checked = [check_tests(t, n, packages) for t, n in zip(tests, names, strict=True)]
    assert checked == [None] * len(items)
    results = executor.run(programs, tests, names, timeout_s=5.0, **limits)
    return [
        (program[-200:], str(test)[:300], result.verdict, result.judged, result.detail)
        for program, test, result in zip(programs, tests, results, strict=True)
        if result.verdict != "pass"
    ]


def honest(isolation):
    """All of the table as (program, tests, entry point), but what needs packages."""
    files = [] if isolation == "landlock" else FILES
    items = [(p, t, entry(p, t)) for p, t in ASSERTS + files]
    items += [(f"def f(x=0):\n    {b}", [{"args": a, "expected": e}], "f") for b, a, e in CALLS]
    items += [(p, [{"stdin": i, "stdout": o}], "") for p, i, o in PROGRAMS]
    items += [(p, [{"stdin": i, "stdout": o, "compare": c}], "") for p, i, o, c in COMPARED]
    return items + SETTINGS


def test_honest_programs_are_judged_as_plain_python_judges_them(executor):
    items = honest(executor.isolation)
    wrong = judged(executor, items, memory_mb=1024)
    named = len(FILES) * (executor.isolation == "landlock")
    print(f"\n{executor.isolation}: {len(items) - len(wrong)} of {len(items)} pass, {named} named")
    assert wrong == []
    assert len(items) + len(PACKAGED) >= 250


def test_what_is_not_supported_is_named_before_it_runs():
    said = [check_tests(t, entry(p, t), (), "landlock") for p, t in FILES]
    assert all(text.startswith("not supported: the tests use files") for text in said)
    assert check_tests(PACKAGED[0][1], "f").startswith("not supported: the tests import 'numpy'")


@pytest.mark.parametrize("name", [name for name in launchers.LAUNCHERS if name != "docker"])
def test_honest_programs_with_packages_pass(name):
    for package in (packages := ("numpy", "pandas")):
        pytest.importorskip(package)
    try:
        with Executor(
            2, launcher=launchers.LAUNCHERS[name](packages=packages), packages=packages
        ) as made:
            assert judged(made, [(p, t, "f") for p, t in PACKAGED], packages) == []
    except SandboxUnavailable as error:
        pytest.skip(str(error))


RUNNER = """
import json, os, sys
def run(number, program, tests):
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    if "unittest" in tests or "pytest" in tests:
        import pytest
        path = f"{sys.argv[1]}/test_{number}.py"
        open(path, "w").write(program + "\\n" + tests)
        ended = pytest.main(["-q", "-p", "no:cacheprovider", "--noconftest", path])
        if ended != 5:  # no test found: they stand at the top
            return int(ended)
    os.chdir(sys.argv[1])
    exec(compile(program + "\\n" + tests, "one", "exec"), {"__name__": "one"})
    return 0
failed = []
for number, (program, tests) in enumerate(json.load(sys.stdin)):
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = run(number, program, tests)
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        failed.append(number)
print(json.dumps(failed))
"""


def test_plain_python_passes_the_honest_asserts(tmp_path):
    """All in one process that forks for each, so that the table above is known to be right."""
    table = ASSERTS + FILES + [(p, t["code"]) for p, t, _ in SETTINGS if "code" in t]
    table = [
        (p.replace("f(n - 1) if n else 0", "0"), t) if "f(5000)" in t else (p, t) for p, t in table
    ]
    asked = subprocess.run(
        [sys.executable, "-I", "-c", RUNNER, str(tmp_path)], input=json.dumps(table), capture_output=True, text=True, check=True
    )  # fmt: skip
    assert [table[number] for number in json.loads(asked.stdout.splitlines()[-1])] == []


def test_plain_python_prints_what_the_honest_programs_do(tmp_path):
    for program, stdin, stdout in PROGRAMS:
        (tmp_path / "program.py").write_text(program)
        ran = subprocess.run(
            [sys.executable, "-I", str(tmp_path / "program.py")], input=stdin.encode(), capture_output=True, check=False
        )  # fmt: skip
        assert ran.returncode == 0 and ran.stdout.decode().split() == stdout.split(), program


def test_plain_python_returns_what_the_honest_functions_do():
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + 500)  # pytest has taken some of it
    for body, args, expected in CALLS:
        names: dict = {}
        exec(f"def f(x=0):\n    {body}", names)
        result, wanted = names["f"](*plain.parse(args)), plain.parse(expected)
        assert result == wanted or result != result, body
    sys.setrecursionlimit(limit)
