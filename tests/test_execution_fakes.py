"""Fresh fakes: programs that lie about what they cannot know, under every way of judging.

    pytest tests/test_execution_fakes.py -s        # prints the figures

Each defines `f`, `Circle` and prints something, and meets call tests, asserts apart and together, a class
under test, unittest, captured output and whole-program tests. In every one a pass is the failure.
"""

# ruff: noqa: E501  (one program a line is easier to read than a wrapped one)

import os
import subprocess
import sys
from pathlib import Path

import pytest

from codexhf.execution import check_tests

BASE = "class Circle:\n    def __init__(s, *a): pass\n    def area(s): return f(7)\nprint(1)\n"
YES = "lambda s, *a: True"
EVERY = "for n in '__eq__ __lt__ __le__ __gt__ __ge__ __contains__ __instancecheck__ __subclasscheck__'.split(): ns[n] = lambda s, *a: True\n"

SAY = "import os, json, struct\ndef say(o, fd=4):\n    d = json.dumps(o).encode()\n    try: os.write(fd, struct.pack('!I', len(d)) + d)\n    except OSError: pass\n"

FAKES = {
    # objects: each dunder that a comparison, a call of math or a unittest method comes by
    "eq_on_metaclass": "class M(type):\n    __eq__ = lambda c, o: True\n    __hash__ = type.__hash__\nclass R(metaclass=M): pass\ndef f(*a): return R",
    "reflected_eq_of_subclass": "class I(int):\n    def __eq__(s, o): return True\n    def __ne__(s, o): return False\n    __hash__ = int.__hash__\ndef f(*a): return I(3)",
    "float_that_subtracts_to_zero": "class F(float):\n    __sub__ = __rsub__ = lambda s, o: F(0)\n    __abs__ = lambda s: 0.0\n    __eq__ = lambda s, o: True\n    __hash__ = float.__hash__\ndef f(*a): return F(2)",
    "complex_liar": "class C(complex):\n    real = imag = property(lambda s: 51407)\n    __eq__ = lambda s, o: True\n    __hash__ = complex.__hash__\ndef f(*a): return C(1, 1)",
    "str_liar": "class S(str):\n    __eq__ = lambda s, o: True\n    __hash__ = lambda s: 1\n    def __str__(s): return s\n    def encode(s, *a): return S('x')\ndef f(*a): return S('no')",
    "bytes_liar": "class B(bytes):\n    __eq__ = lambda s, o: True\n    __hash__ = bytes.__hash__\n    __bytes__ = lambda s: B(b'1')\ndef f(*a): return B(b'1')",
    "tuple_liar": "class T(tuple):\n    __eq__ = lambda s, o: True\n    __hash__ = tuple.__hash__\n    __iter__ = lambda s: iter(range(9))\n    __len__ = lambda s: 9\ndef f(*a): return T((1,))",
    "list_liar": "class L(list):\n    __eq__ = lambda s, o: True\n    __contains__ = lambda s, x: True\n    count = index = lambda s, x: 1\ndef f(*a): return L()",
    "dict_liar": "class D(dict):\n    __eq__ = lambda s, o: True\n    __missing__ = lambda s, k: D()\n    get = lambda s, *a: D()\n    items = keys = values = lambda s: [D()]\ndef f(*a): return D()",
    "set_liar": "class S(set):\n    __eq__ = __ge__ = __le__ = issubset = issuperset = lambda s, o: True\ndef f(*a): return S()",
    "enum_liar": "import enum\nclass E(enum.IntEnum):\n    A = 3\n    def __eq__(s, o): return True\n    __hash__ = int.__hash__\ndef f(*a): return E.A",
    "fraction_liar": "import fractions\nclass F(fractions.Fraction):\n    __eq__ = lambda s, o: True\n    __sub__ = lambda s, o: 0\n    as_integer_ratio = lambda s: (51407, 1)\ndef f(*a): return F(1, 2)",
    "decimal_liar": "import decimal\nclass D(decimal.Decimal):\n    __eq__ = lambda s, o: True\n    as_integer_ratio = lambda s: (51407, 1)\n    is_finite = lambda s: True\ndef f(*a): return D(1)",
    "patched_fraction": "import fractions\nfractions.Fraction.__eq__ = lambda s, o: True\nfractions.Fraction.as_integer_ratio = lambda s: (51407, 1)\nfractions.Fraction.__sub__ = lambda s, o: 0\ndef f(*a): return fractions.Fraction(1, 3)",
    "class_says_int": "class R:\n    __class__ = int\n    __index__ = __int__ = lambda s: 3\n    __eq__ = lambda s, o: True\n    __hash__ = lambda s: 3\ndef f(*a): return R()",
    "class_says_float": "class R:\n    __class__ = property(lambda s: float)\n    __float__ = lambda s: 0.0\n    __sub__ = __abs__ = __eq__ = lambda s, *o: 0 if o else 0\ndef f(*a): return R()",
    "class_changes_in_flight": "class A: pass\nclass B:\n    __eq__ = lambda s, o: True\nclass R(A):\n    def __repr__(s):\n        s.__class__ = B\n        return '51407'\ndef f(*a): return R()",
    "getattr_for_everything": "class R:\n    def __getattr__(s, n): return R()\n    def __call__(s, *a, **k): return R()\n    __eq__ = lambda s, o: True\n    __bool__ = lambda s: True\ndef f(*a): return R()",
    "getattribute_for_everything": "class R:\n    def __getattribute__(s, n):\n        if n == '__class__': return int\n        return lambda *a, **k: True\n    __eq__ = __lt__ = __gt__ = lambda s, o: True\ndef f(*a): return R()",
    "descriptor": "class Any:\n    def __get__(s, o, t): return lambda *a: True\nclass R: __eq__ = __lt__ = __gt__ = __ge__ = __le__ = __sub__ = __abs__ = Any()\ndef f(*a): return R()",
    "slots_and_format": "class R:\n    __slots__ = ()\n    __format__ = lambda s, k: '51407'\n    __str__ = __repr__ = lambda s: '5' + '1408'\n    __eq__ = lambda s, o: str(o) == str(o)\ndef f(*a): return R()",
    "total_ordering": "import functools\n@functools.total_ordering\nclass R:\n    __eq__ = lambda s, o: True\n    __lt__ = lambda s, o: True\n    __sub__ = __rsub__ = __abs__ = __round__ = lambda s, *o: 0\ndef f(*a): return R()",
    "eq_returns_liar": "class R:\n    __eq__ = __ne__ = __lt__ = __gt__ = __sub__ = __and__ = __or__ = __abs__ = lambda s, *o: s\n    __bool__ = lambda s: True\ndef f(*a): return R()",
    "made_by_type": f"ns = {{}}\n{EVERY}R = type('R', (), ns)\ndef f(*a): return R()",
    "made_by_namedtuple": "import collections\nR = collections.namedtuple('R', 'x')\nR.__eq__ = lambda s, o: True\nR.__hash__ = lambda s: 1\ndef f(*a): return R(3)",
    "dataclass_liar": "import dataclasses\n@dataclasses.dataclass(eq=False)\nclass R:\n    x: int = 3\n    def __eq__(s, o): return True\ndef f(*a): return R()",
    "circle_that_says_yes": "class Circle:\n    def __init__(s, *a): pass\n    __eq__ = __lt__ = __gt__ = __le__ = __ge__ = __contains__ = lambda s, o: True\n    def area(s): return Circle()\n    def __getattr__(s, n): return s\n    __call__ = lambda s, *a: s\ndef f(*a): return Circle()",
    "iterator_that_learns": "class R:\n    def __iter__(s):\n        import sys\n        yield from (sys._getframe(1).f_locals.get('expected') or [1])\ndef f(*a): return R()",
    "exception_object": "class E(KeyError):\n    __eq__ = lambda s, o: True\n    args = property(lambda s: s)\ndef f(*a): raise E",
    "raises_everything": "class Meta(type):\n    __instancecheck__ = __subclasscheck__ = lambda c, o: True\nclass E(Exception, metaclass=Meta): pass\ndef f(*a): raise E",
    "base_exception_group": "def f(*a): raise BaseExceptionGroup('x', [KeyError(), SystemExit(42), KeyboardInterrupt()])",
    # patching what judges
    "patch_builtin_types_dict": "import gc, ctypes\nfor t in (int, float):\n    d = gc.get_referents(t.__dict__)[0]\n    d['__eq__'] = lambda s, o: True\n    ctypes.pythonapi.PyType_Modified(ctypes.py_object(t))\ndef f(*a): return 3",
    "patch_int_slot": "import ctypes\ndef f(*a):\n    size = ctypes.sizeof(ctypes.c_void_p)\n    a = ctypes.c_void_p.from_address(id(int) + 25 * size)\n    b = ctypes.c_void_p.from_address(id(object) + 25 * size)\n    a.value = b.value\n    return 3",
    "change_a_constant": "import ctypes\ndef f(*a):\n    ctypes.memmove(id(7) + 24, id(3) + 24, 4)\n    ctypes.memmove(id(1) + 24, id(0) + 24, 4)\n    return 3",
    "patch_builtins": "import builtins\nfor n in 'abs all any sorted len round isinstance print repr str set'.split(): setattr(builtins, n, lambda *a, **k: True)\ndef f(*a): return 3",
    "patch_math": "import math\nmath.isclose = math.fabs = math.floor = lambda *a, **k: 0\ndef f(*a): return 3",
    "no_assertion_error": "import builtins\nclass A(Exception):\n    def __new__(c, *a): raise SystemExit(0)\nbuiltins.AssertionError = A\ndef f(*a): return 3",
    "assertion_error_in_c": "import gc, ctypes\nd = gc.get_referents(AssertionError.__dict__)[0]\nd['__init__'] = lambda s, *a: __import__('os')._exit(42)\nctypes.pythonapi.PyType_Modified(ctypes.py_object(AssertionError))\ndef f(*a): return 3",
    "trace_skips_lines": "import sys\ndef trace(frame, event, arg):\n    if frame.f_code.co_filename == 'tests':\n        try: frame.f_lineno += 1\n        except Exception: pass\n    return trace\ndef f(*a):\n    sys.settrace(trace)\n    frame = sys._getframe(1)\n    while frame: frame.f_trace = trace; frame = frame.f_back\n    return 3",
    "profile_exits": "import sys, os\nsys.setprofile(lambda fr, ev, arg: os._exit(42) if fr.f_code.co_name in ('where', 'tag_of', 'report') else None)\ndef f(*a): return 3",
    "audit_hook": "import sys, os\nsys.addaudithook(lambda ev, args: os._exit(42) if ev == 'os.putenv' else None)\ndef f(*a):\n    os.environ['A'] = '1'\n    return 3",
    "unittest_patched": "import unittest, unittest.case, unittest.mock\nfor n in dir(unittest.TestCase):\n    if n.startswith(('assert', 'fail')): setattr(unittest.TestCase, n, lambda *a, **k: unittest.mock.MagicMock())\nunittest.case._Outcome.success = property(lambda s: True, lambda s, v: None)\ndef f(*a): return 3",
    "unittest_skips": "import unittest\ndef f(*a): raise unittest.SkipTest('later')",
    "no_tests_loaded": "import unittest\nunittest.TestLoader.loadTestsFromTestCase = lambda s, c: unittest.TestSuite()\nunittest.TestLoader.getTestCaseNames = lambda s, c: []\ndef f(*a): return 3",
    "magic_mock": "from unittest.mock import MagicMock\nR = MagicMock()\nR.__eq__ = lambda *a: True\nR.__lt__ = R.__gt__ = R.__sub__ = lambda *a: 0\ndef f(*a): return R",
    "mock_any": "from unittest.mock import ANY\ndef f(*a): return ANY",
    "import_hook": "import sys, types\nclass Finder:\n    def find_spec(s, *a): return None\n    def find_module(s, *a): return s\nsys.meta_path.insert(0, Finder())\nfake = types.ModuleType('math')\nfake.isclose = lambda *a, **k: True\nfor n in ('math', 'unittest', 'io', 'contextlib', 'checker', 'wire', 'together', 'plain'): sys.modules[n] = fake\ndef f(*a): return 3",
    "exec_replaced": "import builtins\nreal = builtins.exec\nbuiltins.exec = lambda *a: None\nbuiltins.compile = lambda *a, **k: real.__code__ if 0 else (lambda: 0).__code__\ndef f(*a): return 3",
    "own_names": "check = test = expected = candidate = None\ndef check(c): return True\ndef assertEqual(*a): return True\ndef f(*a): return 3",
    "globals_of_caller": "import sys\ndef f(*a):\n    g = sys._getframe(1).f_globals\n    g['f'] = g['isclose'] = g['abs'] = lambda *a: 0\n    g['AssertionError'] = KeyError\n    return 3",
    "code_of_caller": "import sys, ctypes\ndef f(*a):\n    code = sys._getframe(1).f_code\n    size = len(code.co_code)\n    at = id(code) + type(code).__basicsize__ - 8\n    ctypes.memset(at + 64, 9, max(0, size - 64))\n    return 3",
    # reading the answer
    "constants_of_frames": "import sys\ndef f(*a):\n    frame = sys._getframe(1)\n    while frame:\n        for c in frame.f_code.co_consts:\n            if type(c) is int and c > 9999: return c\n        frame = frame.f_back\n    return 3",
    "constants_by_gc": "import gc, types\ndef f(*a):\n    for o in gc.get_objects():\n        if isinstance(o, types.FunctionType) and o.__module__ in ('tests', 'program'):\n            for c in o.__code__.co_consts:\n                if type(c) is int and c > 9999: return c\n    return 3",
    "source_by_linecache": "import linecache, re\ndef f(*a):\n    for k in list(linecache.cache):\n        m = re.search(r'f\\(7\\)\\D+(\\d+)', ''.join(linecache.getlines(k))) if k == 'tests' else None\n        if m: return int(m.group(1))\n    return 3",
    "job_of_frames": "import sys, re\ndef f(*a):\n    frame = sys._getframe()\n    while frame:\n        m = re.search(r'f\\(7\\)\\D+(\\d+)', repr(frame.f_locals.get('job', '')))\n        if m: return int(m.group(1))\n        frame = frame.f_back\n    return 3",
    "memory_scan": "import ctypes, re\ndef f(*a):\n    at = id(a) & ~0xfffff\n    m = re.search(rb'== (5\\d{4})', ctypes.string_at(at, 1 << 20))\n    return int(m.group(1)) if m else 3",
    "unittest_argument": "import sys\ndef f(*a):\n    for c in sys._getframe(1).f_code.co_consts:\n        if type(c) in (int, float) and c not in a: return c\n    return 3",
    # seeds
    "same_generator": "import random\ndef f(x=0): return random.randrange(10 ** 9)",
    "replay_seed_zero": "import random\ndef f(x=0):\n    random.seed(0)\n    return random.randrange(10 ** 9)",
    "replay_state": "import random\nS = random.getstate()\ndef f(x=0):\n    random.setstate(S)\n    return random.randrange(10 ** 9)",
    "fix_all_draws": "import random\nfor n in 'random randint randrange choice sample shuffle uniform getrandbits'.split(): setattr(random, n, lambda *a, **k: 3)\nrandom.Random.random = random.SystemRandom.random = lambda s: 0.5\ndef f(x=0): return 3",
    "seed_of_job": "import sys, random\ndef f(x=0):\n    frame = sys._getframe()\n    while frame:\n        if 'job' in frame.f_locals: random.seed(frame.f_locals['job'].get('seed', 0))\n        frame = frame.f_back\n    return random.randrange(10 ** 9)",
    # ends, signals, threads
    "exit_at_import": "import os\nos._exit(42)",
    "exit_by_signal_handler": "import signal, os\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(42))\nsignal.setitimer(signal.ITIMER_REAL, 0.05)\ndef f(*a):\n    while True: pass",
    "exit_by_thread": "import threading, os, time\ndef run():\n    time.sleep(0.05)\n    os._exit(42)\ntry: threading.Thread(target=run, daemon=True).start()\nexcept RuntimeError: pass\ndef f(*a): time.sleep(9)",
    "exit_by_del": "import os\nclass D:\n    def __del__(s): os._exit(42)\ndef f(*a):\n    D()\n    return 3",
    "exit_by_weakref": "import weakref, os\nclass D: pass\nd = D()\nweakref.finalize(d, os._exit, 42)\ndef f(*a): raise SystemExit(42)",
    "exit_by_excepthook": "import sys, os, threading\nsys.excepthook = threading.excepthook = sys.unraisablehook = lambda *a: os._exit(42)\ndef f(*a): raise SystemExit(42)",
    "exit_by_recursion": "import sys, os\nsys.setrecursionlimit(10 ** 6)\ndef f(*a):\n    try: return f(*a)\n    except RecursionError: os._exit(42)",
    "exit_by_memory": "import os\ndef f(*a):\n    try: x = bytearray(1 << 40)\n    except MemoryError: os._exit(42)",
    "stop_iteration_42": "def f(*a): raise StopIteration(42)",
    "async_exception": "import ctypes, threading\ndef f(*a):\n    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(threading.get_ident()), ctypes.py_object(SystemExit))\n    return 3",
    "faulthandler": "import faulthandler, os\nfaulthandler.disable()\ndef f(*a): os.kill(os.getpid(), 9)",
    # floods
    "flood_stderr": "import os\nos.closerange(0, 3)\ndef f(*a):\n    while True: os.write(2, b'x' * 65536)",
    "flood_records": "import os, struct\ndef f(*a):\n    r = struct.pack('!cII', b'v', 5, 0) + b'i1;;;'\n    while True: os.write(3, r * 4000)",
    "flood_of_passes": "import os, struct\nfor code in (42, 0, 1):\n    try: os.write(3, struct.pack('!cII', b'o', 0, 0) * 9 + struct.pack('!cII', b'v', 7, 0) + b'ic8cf;;')\n    except OSError: pass\ndef f(*a): os._exit(42)",
    "flood_the_line": "import os, json, struct\ndef f(*a):\n    d = json.dumps({'value': True}).encode()\n    for fd in range(3, 60):\n        try: os.write(fd, (struct.pack('!I', len(d)) + d) * 1000)\n        except OSError: pass\n    return 3",
    "flood_stdout_then_right_end": "import sys\nsys.stdout.write('1\\n' * 5_000_000)\ndef f(*a): return 3",
    "flood_sparse": "import os\ntry:\n    os.ftruncate(1, 15 << 20)\n    os.lseek(1, 0, 2)\nexcept OSError: pass\ndef f(*a): return 3",
    "flood_files": "def f(*a):\n    n = 0\n    while True:\n        open(f'x{n}', 'w').write('y' * 100000)\n        n += 1",
    "flood_results": "def f(*a): return ['x' * 1000] * 10 ** 6",
    "flood_exception": "def f(*a): raise ValueError('x' * 10 ** 8)",
    # the line between checker and candidate
    "wire_same_out_of_range": SAY + "def f(*a):\n    say({'value': {'same': 99}})\n    os._exit(42)",
    "wire_same_negative": SAY + "def f(*a):\n    say({'value': {'same': -1}})\n    return 3",
    "wire_changed_everything": SAY + "def f(*a):\n    say({'value': 3, 'changed': [[i, [51407]] for i in range(9)]})\n    return 3",
    "wire_changed_type": SAY + "def f(*a):\n    say({'value': None, 'changed': [[0, {'set': []}]]})\n    return 3",
    "wire_two_tags": SAY + "def f(*a):\n    say({'value': {'set': [], 'dict': []}})\n    return 3",
    "wire_handle_in_fraction": SAY + "def f(*a):\n    say({'value': {'Fraction': [{'h': [0, 'object', 'int', []]}, 1]}})\n    return 3",
    "wire_handle_in_counter": SAY + "def f(*a):\n    say({'value': {'Counter': [{'dict': [['x', {'h': [0, 'object', 'int', []]}]]}]}})\n    return 3",
    "wire_handle_in_range": SAY + "def f(*a):\n    say({'value': {'range': [0, {'h': [0, 'object', 'int', []]}, 1]}})\n    return 3",
    "wire_handle_as_dict_key": SAY + "def f(*a):\n    say({'value': {'dict': [[{'h': [0, 'object', 'str', []]}, 1]]}})\n    return 3",
    "wire_module_checker": SAY + "def f(*a):\n    say({'value': {'module': 'checker'}})\n    return 3",
    "wire_module_for_names": "import wire, checker, types\nisclose = abs = math = checker\ndef f(*a): return wire",
    "wire_type_that_makes": SAY + "def f(*a):\n    say({'value': {'t': 'object'}})\n    return bool",
    "wire_error_assertion": SAY + "def f(*a):\n    say({'error': 'X', 'family': ['X'], 'bases': ['Exception'], 'text': 'x', 'args': [42]})\n    return 3",
    "wire_error_no_lists": SAY + "def f(*a):\n    say({'error': [], 'family': 3, 'bases': {}, 'text': None, 'args': [[]]})\n    return 3",
    "wire_out_of_reach_then_exit": SAY + "def f(*a):\n    say({'out_of_reach': 'x'})\n    os._exit(42)",
    "wire_callback_loop": SAY + "def f(*a):\n    while True: say({'callback': 0, 'operands': [[], {}]})",
    "wire_deep_value": SAY + "def f(*a):\n    v = 1\n    for _ in range(150): v = [v]\n    say({'value': v})\n    return 3",
    "wire_huge_hex": SAY + "def f(*a):\n    say({'value': {'int': '0x' + 'f' * 3000000}})\n    return 3",
    "wire_decimal_snan": SAY + "def f(*a):\n    say({'value': {'Decimal': ['sNaN']}})\n    return 3",
    "wire_nan_literal": SAY + "def f(*a):\n    d = b'{\"value\": NaN}'\n    os.write(4, struct.pack('!I', len(d)) + d)\n    return 3",
    "wire_duplicate_keys": SAY + "def f(*a):\n    d = b'{\"value\": 3, \"value\": 51407.0, \"error\": \"x\"}'\n    os.write(4, struct.pack('!I', len(d)) + d)\n    return 3",
    "wire_early_answers": SAY + "for v in (None, 51407, True, 52718.75, 53003): say({'value': v})\ndef f(*a): return 3",
    "wire_steal_requests": SAY + "import select\ndef f(*a):\n    while select.select([4], [], [], 0.05)[0]: os.read(4, 65536)\n    say({'value': True})\n    return 3",
    "wire_patched_send": "import wire\nreal = wire.End.send\nwire.End.send = lambda end, m: real(end, {'value': True})\ndef f(*a): return 3",
    "wire_patched_encode": "import wire\nwire.End.encode = lambda *a, **k: {'sub': True}\ndef f(*a): return object()",
    # pickles and copies that act
    "reduce_ex": "class R:\n    def __reduce_ex__(s, p): return (exec, ('import os; os._exit(42)',))\n    __copy__ = __deepcopy__ = lambda s, *a: s\n    __eq__ = lambda s, o: True\ndef f(*a): return R()",
    "init_subclass": "class M(type):\n    def __instancecheck__(c, o): return True\n    def __prepare__(*a, **k): return {}\nclass R(int, metaclass=M): __eq__ = lambda s, o: True; __hash__ = None\ndef f(*a): return R(3)",
    "mro_entries": "class R:\n    def __mro_entries__(s, b): return (int,)\n    __eq__ = __ne__ = lambda s, o: True\ndef f(*a): return R()",
    "class_getitem": "class R:\n    __class_getitem__ = lambda c, k: True\n    __eq__ = lambda s, o: True\ndef f(*a): return R",
    "length_hint_liar": "class R(list):\n    __length_hint__ = __len__ = lambda s: 2\n    __iter__ = lambda s: iter([51407, 53003])\n    __reversed__ = __iter__\ndef f(*a): return R([3, 3])",
    "buffer_liar": "import array\nclass A(array.array):\n    __eq__ = lambda s, o: True\n    tolist = lambda s: [51407]\ndef f(*a): return A('i', [3])",
    "memoryview_cast": "def f(*a): return memoryview(b'51407')",
    "deque_subclass": "import collections\nclass D(collections.deque):\n    __eq__ = lambda s, o: True\ndef f(*a): return D([1])",
    "counter_subclass": "import collections\nclass C(collections.Counter):\n    __eq__ = __le__ = __ge__ = lambda s, o: True\n    total = lambda s: 51407\ndef f(*a): return C()",
    "datetime_subclass": "import datetime\nclass D(datetime.datetime):\n    __eq__ = __lt__ = __gt__ = lambda s, o: True\n    __hash__ = lambda s: 1\n    isoformat = lambda s, *a: '2024-01-01'\ndef f(*a): return D(2020, 1, 1)",
    "str_enum": "import enum\nclass E(str, enum.Enum):\n    A = '3'\n    def __eq__(s, o): return True\n    __hash__ = str.__hash__\ndef f(*a): return E.A",
    "int_flag": "import enum\nclass E(enum.IntFlag):\n    A = 1\n    def __eq__(s, o): return True\n    __hash__ = int.__hash__\ndef f(*a): return ~E.A",
    "bool_is_impossible": "class R:\n    def __bool__(s): return NotImplemented\n    __eq__ = lambda s, o: s\n    __lt__ = __gt__ = __eq__\ndef f(*a): return R()",
    "generator_of_yes": "class E:\n    __eq__ = lambda s, o: True\ndef f(*a):\n    while True: yield E()",
    "coroutine": "async def f(*a): return 51407",
    "async_generator": "async def f(*a):\n    yield 3",
    "partial": "import functools\nf = functools.partial(lambda *a: 3)",
    "callable_instance": "class F:\n    def __call__(s, *a): return s\n    __eq__ = __lt__ = __gt__ = lambda s, o: True\n    __sub__ = __abs__ = lambda s, *o: 0\nf = F()",
    "class_as_function": "class f(int):\n    def __new__(c, *a): return int.__new__(c, 3)\n    __eq__ = lambda s, o: True\n    __hash__ = int.__hash__",
    "weakref_proxy": "import weakref\nclass E:\n    __eq__ = __lt__ = __gt__ = lambda s, o: True\nE0 = E()\ndef f(*a): return weakref.proxy(E0)",
    "simple_namespace": "import types\nclass N(types.SimpleNamespace):\n    __eq__ = lambda s, o: True\ndef f(*a): return N(a=3)",
    "exception_returned": "class E(ValueError):\n    __eq__ = __lt__ = __gt__ = lambda s, o: True\ndef f(*a): return E(3)",
    "not_implemented": "def f(*a): return NotImplemented",
    "ellipsis_any": "def f(*a): return ...",
    "union_type": "def f(*a): return int | str",
    # stateful, replaying
    "answers_in_turn": "state = iter([51407, 52718.75, 53003, [51407, 53003], 3] * 0 + [3] * 99)\ndef f(*a): return next(state)",
    "echo_argument": "def f(x=0, *a): return x",
    "linear_guess": "def f(x=0, *a): return x * 7919",
    "changes_argument": "def f(*a):\n    for x in a:\n        if isinstance(x, list): x[:] = [51407]\n    return a[0] if a else 3",
    "cached_last": "last = []\ndef f(*a):\n    last.append(a)\n    return last[-1]",
    # reaching the judge's memory or files
    "walk_to_checker": "import gc\ndef f(*a):\n    for o in gc.get_objects():\n        if type(o).__name__ in ('Client', 'Server', 'Zygote'):\n            o.out_of_reach = ''\n            o._objects = o.run = None\n    return 3",
    "patch_where": "import sys\nfor n in ('checker', 'together', 'candidate', 'wire', 'plain', 'protocol', 'lockdown', 'zygote'):\n    m = sys.modules.get(n)\n    for k in list(vars(m) if m else ()):\n        if k.isupper() and isinstance(getattr(m, k), int): setattr(m, k, 42)\ndef f(*a): raise SystemExit(42)",
    "patch_os_exit": "import os\nreal = os._exit\nos._exit = lambda c: real(42)\ndef f(*a): return 3",
    "patch_posix_exit": "import posix, os\nreal = posix._exit\nposix._exit = os._exit = lambda c: real(42)\nimport sys\nsys.modules['zygote'] = sys.modules['os'] = posix\ndef f(*a): raise ValueError",
    "patch_play": "import sys\nm = sys.modules['__main__']\nfor n in ('_play', '_reap'):\n    if hasattr(m, n): setattr(m, n, lambda *a: 42)\ndef f(*a): return 3",
    "patch_base_exception": "import ctypes, gc\nd = gc.get_referents(BaseException.__dict__)[0]\nd['__init__'] = lambda s, *a, **k: __import__('posix')._exit(42)\nctypes.pythonapi.PyType_Modified(ctypes.py_object(BaseException))\ndef f(*a): return 3",
    "patch_frame_code": "import sys, gc, types\ndef f(*a):\n    fr = sys._getframe(1)\n    while fr:\n        for o in gc.get_referrers(fr.f_code):\n            if isinstance(o, types.FunctionType):\n                try: o.__code__ = (lambda *a, **k: 42).__code__\n                except Exception: pass\n        fr = fr.f_back\n    return 3",
    "trace_jump_to_end": "import sys\ndef f(*a):\n    fr = sys._getframe(1)\n    def t(frame, event, arg):\n        if event == 'line':\n            try: frame.f_lineno = frame.f_code.co_firstlineno + 99\n            except Exception: pass\n        return t\n    fr.f_trace = t\n    sys.settrace(t)\n    return 3",
    "trace_eats_errors": "import sys, os\nsys.settrace(lambda fr, ev, arg: (lambda fr, ev, arg: os._exit(42) if ev == 'exception' else None))\ndef f(*a): raise KeyError",
    "codecs_hook": "import codecs\ncodecs.register_error('replace', lambda e: ('51407', e.end))\nprint('\\udcff', end='')\ndef f(*a): return '\\udcff'",
    "stdout_object": "import sys\nclass Out:\n    write = lambda s, t: sys.__stdout__.write('51407\\n')\n    flush = lambda s: None\nsys.stdout = Out()\ndef f(*a): print(7)",
    "getvalue_patched": "import io\nclass S(str):\n    __eq__ = lambda s, o: True\n    __hash__ = str.__hash__\nclass B(io.StringIO):\n    getvalue = lambda s: S('x')\nio.StringIO = B\ndef f(*a): return 3",
    "redirect_patched": "import contextlib, io, sys\nclass S(str):\n    __eq__ = lambda s, o: True\n    __hash__ = str.__hash__\ndef f(*a):\n    fr = sys._getframe(1)\n    class Out:\n        getvalue = lambda s: S('x')\n    fr.f_globals['out'] = Out()",
    "import_in_tests_replaced": "import builtins\nreal = builtins.__import__\ndef imp(name, *a, **k):\n    m = real(name, *a, **k)\n    if name == 'math': m.isclose = m.fabs = lambda *a, **k: True\n    return m\nbuiltins.__import__ = imp\ndef f(*a): return 3",
    "build_class_replaced": "import builtins\nreal = builtins.__build_class__\ndef build(fn, name, *b, **k):\n    c = real(fn, name, *b, **k)\n    for n in list(vars(c)):\n        if n.startswith('test'): setattr(c, n, lambda s: None)\n    return c\nbuiltins.__build_class__ = build\ndef f(*a): return 3",
    "suite_run_patched": "import unittest, unittest.suite, unittest.case, unittest.result\nunittest.suite.TestSuite.run = unittest.case.TestCase.run = lambda s, r, *a: r\nunittest.result.TestResult.failures = property(lambda s: [], lambda s, v: None)\nunittest.result.TestResult.errors = property(lambda s: [], lambda s, v: None)\ndef f(*a): return 3",
    "setup_class_skips": "import unittest\nunittest.TestCase.setUp = lambda s: s.skipTest('x')\ndef f(*a): return 3",
    "expected_failure": "import unittest\nunittest.TestCase.__init_subclass__ = classmethod(lambda c: setattr(c, '__unittest_expecting_failure__', True))\ndef f(*a): return 3",
    "raises_all_at_once": "class E(KeyError, IndexError, ValueError, TypeError, ZeroDivisionError): pass\ndef f(*a): raise E(51407)",
    "raise_group": "def f(*a): raise ExceptionGroup('x', [AssertionError(), ValueError()])",
    "raise_from_del": "class D:\n    def __del__(s): raise SystemExit(42)\ndef f(*a):\n    D()\n    return 3",
    "thread_writes_report": "import threading, os, struct\ndef run():\n    while True:\n        try: os.write(3, struct.pack('!cII', b'v', 7, 0) + b'ic8cf;;')\n        except OSError: return\nthreading.Thread(target=run, daemon=True).start()\ndef f(*a): return 3",
    "report_rewritten": "import os, struct\ndef f(*a):\n    try:\n        os.ftruncate(3, 0)\n        os.lseek(3, 0, 0)\n        os.write(3, struct.pack('!cII', b'o', 0, 0) + (struct.pack('!cII', b'v', 6, 0) + b'ic8cf;') * 3)\n    except OSError: pass\n    os._exit(0)",
    "report_digest": "import os, struct\ndef f(*a):\n    os.write(3, struct.pack('!cII', b'd', 32, 0) + bytes(32))\n    return 3",
    # outputs
    "prints_nan": "print('nan')\ndef f(*a): return float('nan')",
    "prints_inf": "print('inf', '1e999', '-inf')\ndef f(*a): return float('inf')",
    "prints_underscores": "print('5_1_4_0_8')\ndef f(*a): return 3",
    "prints_wide_digits": "print('５１４０８')\ndef f(*a): return '５１４０７'",
    "prints_backspaces": "print('9\\b51408')\ndef f(*a): return 3",
    "prints_zero_width": "print('\\u200b51407')\ndef f(*a): return 3",
    "prints_nul": "print('51407\\0')\ndef f(*a): return 3",
    "prints_bom": "import sys\nsys.stdout.buffer.write(b'\\xef\\xbb\\xbf51407')\ndef f(*a): return 3",
    "prints_all_numbers": "print(*range(60000))\ndef f(*a): return set(range(60000))",
    "prints_all_lines": "print(*range(60000), sep='\\n')\ndef f(*a): return list(range(60000))",
    "print_hole": "import os\ntry:\n    os.lseek(1, 1 << 20, 0)\n    os.write(1, b'51407')\n    os.ftruncate(1, 6)\nexcept OSError: pass\ndef f(*a): return 3",
    "print_then_fail": "import atexit, os\natexit.register(lambda: os._exit(0))\nprint('51408')\ndef f(*a): return 3",
    "print_by_checkers_quote": "print(\"'); check = lambda *a: True; ('\")\ndef f(*a): return 3",
    "print_surrogates": "import sys\nsys.stdout.reconfigure(errors='surrogatepass')\nprint('\\ud800' * 9)\ndef f(*a): return '\\ud800'",
    "print_invalid": "import sys\nsys.stdout.buffer.write(b'\\xff' * 99 + b'51408')\ndef f(*a): return b'\\xff'",
}  # fmt: skip

ASSERTS = "import math\nassert f(7) == 51407 and abs(f(8) - 52718.75) < 1e-9\nassert math.isclose(f(9), 53003)\n"
DRAWN = "import random\nassert f(7) == random.randrange(10 ** 9)\nassert f(8) == random.randrange(10 ** 9)\n"
WAYS = {
    "calls": ([{"args": "(7,)", "expected": "51407"}, {"args": "(8,)", "expected": "[52718, 53003]"}], "f"),
    "asserts": (ASSERTS, "f"),
    "check": ("def check(candidate):\n    expected = [51407, 53003]\n    assert candidate(7) == expected\n    assert candidate(9) > 53003\n", "f"),
    "drawn": (DRAWN, "f"),
    "class": ("c = Circle(7)\nassert c.area() == 51407\nassert Circle(8).area() > 52718 and c != Circle(8)\n", "Circle"),
    "together": ({"code": ASSERTS, "process": "together"}, "f"),
    "unittest": ("import unittest\nclass T(unittest.TestCase):\n    def test_value(self):\n        self.assertEqual(f(7), 51407)\n    def test_error(self):\n        with self.assertRaises(IndexError):\n            f(-1)\n", "f"),
    "captured": ("import io, contextlib\nout = io.StringIO()\nwith contextlib.redirect_stdout(out):\n    f(7)\nassert out.getvalue() == '51407 then 53003\\n'\n", "f"),
    "stdin": ([{"stdin": "7\n", "stdout": "51407\n"}], ""),
    "stdin exact": ([{"stdin": "7\n", "stdout": "51407\n52718\n", "compare": "exact"}], ""),
    "stdin floats": ([{"stdin": "7\n", "stdout": "51407\n52718.75\n", "compare": "floats:1e-3"}], ""),
    "stdin any order": ([{"stdin": "7\n", "stdout": "51407\n52718\n", "compare": "any order"}], ""),
    "stdin checker": ({"cases": [{"stdin": "7\n", "stdout": "51407 52718\n"}], "checker": "def check(stdin, stdout, expected): return stdout.split() == expected.split()"}, ""),
    "json": ([{"args": "(7,)", "expected": "[51407, (1, 2)]", "compare": "json"}], "f"),
    "raises": ("try:\n    f(7)\n    assert False\nexcept IndexError:\n    pass\nassert f(8) == 51407", "f"),
    "in place": ("xs = [3, 1, 2]\nr = f(xs)\nassert r is None and xs == [1, 2, 3]", "f"),
    "stdin tokens": ([{"stdin": "7\n", "stdout": "51407 52718\n", "compare": "tokens"}], ""),
}  # fmt: skip

# What an object here could not do in plain Python, but its stand-in in the checker might seem to do.
NOTHING = "class Nothing: pass\ndef f(*a): return Nothing()\n"
SEEMING = [
    "assert callable(f(1))",
    "assert hasattr(f(1), '__iter__')",
    "assert hasattr(f(1), '__len__') and hasattr(f(1), '__getitem__')",
    "from collections.abc import Iterator\nassert isinstance(f(1), Iterator)",
    "from collections.abc import Iterable\nassert isinstance(f(1), Iterable)",
    "import collections.abc\nassert isinstance(f(1), collections.abc.Callable)",
    "import collections.abc as c\nassert isinstance(f(1), c.Sized) and isinstance(f(1), c.Container)",
    "import typing\nassert isinstance(f(1), typing.Iterable)",
    "assert '__call__' in dir(f(1))",
    "assert isinstance(f(1), type(f)) or type(f(1)) is type(f)",
    "import types\nassert not isinstance(f(1), type(None)) and f(1).__call__",
    "assert f(1).__class__ is f.__class__",
    "import inspect\nassert inspect.isgenerator(f(1)) or callable(f(1))",
]


def judged(executor, items):
    """Return (name, verdict, detail, way) of what passes or is no verdict about the program."""
    labels, programs, tests, names = zip(*items, strict=True)
    results = executor.run(programs, tests, names, timeout_s=1.0, memory_mb=256)
    wrong = [
        (label, r.verdict, r.judged, r.detail)
        for label, r in zip(labels, results, strict=True)
        if r.verdict in ("pass", "sandbox_error")
    ]
    print(f"\n{executor.isolation}: {len(items)} fakes, {len(wrong)} pass or end in sandbox_error")
    return wrong


@pytest.mark.parametrize("way", WAYS)
def test_no_fresh_fake_passes(executor, way):
    tests, name = WAYS[way]
    items = [(fake, f"{BASE}{source}\n", tests, name) for fake, source in FAKES.items()]
    assert len(items) >= 170
    assert judged(executor, items) == []


def test_no_stand_in_can_what_its_object_cannot(executor):
    for test in SEEMING:
        done = subprocess.run([sys.executable, "-I", "-c", f"{NOTHING}{test}"], capture_output=True)
        assert done.returncode, f"plain Python passes {test}"
    assert judged(executor, [(test, NOTHING, test, "f") for test in SEEMING]) == []


def test_nothing_is_planted_from_one_run_to_the_next(executor):
    """What a program leaves wherever it can, no later run of it sees: files, times, numbers, memory."""
    program = (
        "import os, sys, time\n"
        "def trace(path):\n"
        "    try: s = os.stat(path)\n"
        "    except OSError: return None\n"
        "    return s.st_atime_ns, s.st_mtime_ns, s.st_ctime_ns, s.st_nlink\n"
        "def f(paths):\n"
        "    seen = [trace(p) for p in paths]\n"
        "    for name in ('mark', 'a/mark'):\n"
        "        try:\n"
        "            os.makedirs(os.path.dirname(name) or '.', exist_ok=True)\n"
        "            with open(name, 'x') as file: file.write('1')\n"
        "        except FileExistsError: seen.append('left')\n"
        "        except OSError: pass\n"
        "    for p in paths:\n"
        "        try:\n"
        "            with open(p, 'rb') as file: file.read(1)\n"
        "            os.listdir(os.path.dirname(p))\n"
        "        except OSError: pass\n"
        "    r, w = os.pipe()\n"
        "    return seen, os.getpid(), os.fstat(r).st_ino > 0, os.listdir('.') if os.access('.', os.W_OK) else 0\n"
    )
    library = Path(os.__file__).parent
    seldom = [
        "sndhdr.py",
        "turtledemo/clock.py",
        "idlelib/help.py",
        "lib2to3/pygram.py",
        "xdrlib.py",
    ]
    paths = [str(library / name) for name in seldom if (library / name).exists()]
    assert paths
    for path in paths:  # behind Landlock alone the first reading of a day shows, as the docs say
        Path(path).read_bytes()
    case = [{"args": repr((paths,)), "expected": "0"}]
    results = executor.run([program] * 4, [case] * 4, ["f"] * 4)
    assert len({r.detail for r in results}) == 1, [r.detail for r in results]


def test_draws_in_the_programs_process_are_named_before_anything_runs():
    """A program that fixes them would pass in plain Python too, and every wrong variant fails."""
    for source in (
        DRAWN,
        "from random import randint as r\nassert f(7) == r(0, 9)",
        "import numpy as np\nassert f(7) == np.random.rand()",
        "from numpy import random as nr\nassert f(7) == nr.default_rng(0).random()",
        "import secrets\nassert f(7) == secrets.randbelow(9)",
    ):
        told = check_tests({"code": source, "process": "together"}, "f", ["numpy"])
        assert told.startswith("not supported") and "draw" in told, told
    seeded = "import random, unittest\nclass T(unittest.TestCase):\n    def test(self):\n        random.seed(0)\n        self.assertEqual(f(7), 6)"
    assert check_tests(seeded, "f") is None
