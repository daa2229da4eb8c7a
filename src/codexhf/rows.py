"""Rows as they were published -> the columns of a card's type: column map, `where`, shapes.

Text stays text; everything else that speaks becomes messages of role and content. A row that
cannot be understood is counted under its reason, a card that cannot is refused.
"""

import ast
import builtins
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import jinja2
import jinja2.meta
import pyarrow as pa
from jinja2.sandbox import ImmutableSandboxedEnvironment

from codexhf.cards import Card
from codexhf.execution.items import Settings
from codexhf.execution.testcode import entry_point_in
from codexhf.label_words import read_label, read_winner
from codexhf.prompts import ROLES, content_text, text_of
from codexhf.refusals import nearest
from codexhf.sources import UNREADABLE, Row, values_of

COLUMNS = {
    "language-modeling": ("text",),
    "prompt-completion": ("prompt", "completion"),
    "preference": ("prompt", "chosen", "rejected"),
    "prompt-only": ("prompt",),
}
EXTRA = ("id", "completion", "tests", "entry_point", "margin", "group")
"""Columns that later stages read, of whatever type the card is."""
CONTEXT = ("system", "system_prompt", "input", "tools", "functions", "history")
"""Columns that change what a prompt asks for; one with text in it is never left out silently."""
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
WINNERS = ("winner_model_a", "winner_model_b")
CALLS = ("tool_calls", "function_call", "tool_call_id")
TURN = re.compile(r"\n\n(Human|Assistant):")


class RowFault(ValueError):
    """Why one row is left out; the reason under which it is counted."""


class RowError(ValueError):
    """Why a card cannot be used because of one row."""


class Reader:
    """Reads one card's rows as the columns of its type.

    Attributes:
        columns: of what `read` returns.
        label: column of the source that says which answer is better, if there is one.

    Raises:
        RowError: a column that is missing or unread, a broken template or expression.
    """

    def __init__(self, card: Card, names: Sequence[str]):
        self.card, self.names = card, names
        compile = partial(ENVIRONMENT.compile_expression, undefined_to_none=False)
        self.where = _compiled(compile, card.where) if card.where else None
        mapped = {ours: theirs for ours, theirs in card.columns.items() if theirs}
        # A mapped column takes the place of a source's own one of that name.
        own = [n for n in names if n not in card.columns and n not in mapped.values()]
        getters = {name: itemgetter(name) for name in own}
        getters |= {ours: self._getter(theirs) for ours, theirs in mapped.items()}
        self.needs, self.shape = self._shape(getters)
        if "system" in getters and card.type != "language-modeling":
            self.needs = (*self.needs, "system")
        self.kept = [n for n in (*EXTRA, *mapped) if n in getters and n not in self.needs]
        also = ["license"] if card.filter and card.filter.licenses is not None else []
        if not {*also} <= {*getters}:
            raise RowError("rows have no column 'license'. Map it under codexhf.columns.")
        self.getters = {name: getters[name] for name in (*self.needs, *self.kept, *also)}
        order = dict.fromkeys((*COLUMNS[card.type], *EXTRA, *card.columns))
        self.columns = [n for n in order if n in COLUMNS[card.type] or n in self.kept]
        self.label = mapped.get("label", "label") if "label" in self.needs else None
        read = {*self.needs, *card.columns, *_variables(card)}
        text = card.type == "language-modeling"
        self.unread = [n for n in CONTEXT if n in names and n not in read and not text]
        extra = {name: _text for name in ("id", "entry_point", "group", "license")}
        extra |= {"margin": _margin, "completion": _reference}
        extra |= {"tests": partial(read_tests, settings=card.execution)}
        self.extra = {name: extra.get(name, _same) for name in (*self.kept, *also)}

    def read(self, rows: Iterable[Row], start: int) -> Iterator[tuple[Row, str | None]]:
        """Yield the columns of each row, the first of which is row `start`, and its fault."""
        for number, row in enumerate(rows, start):
            try:
                yield self._read(row), None
            except RowFault as fault:
                yield {}, str(fault)
            except RowError as error:
                if self.card.streaming:  # nobody would be there to mend the card
                    yield {}, UNREADABLE
                else:
                    raise RowError(f"row {number}: {error}") from None

    def _read(self, row: Row) -> Row:
        row = {name: row.get(name) for name in self.names}
        try:
            wanted = self.where is None or self.where(row)
            cells = {name: get(row) for name, get in self.getters.items()} if wanted else {}
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise RowError(f"columns or where: {type(error).__name__}: {error}") from None
        if not wanted:
            raise RowFault("where is false")
        if row.get("unreadable"):
            raise RowFault(row["unreadable"])
        for name in self.unread:
            if row[name] and str(row[name]).strip():
                raise RowError(
                    f"`{name}` is not empty and nothing reads it. Join it under codexhf.columns "
                    f'(prompt: "{{{{ prompt }}}} {{{{ {name} }}}}"), or write `{name}: null` there '
                    "to leave it out."
                )
        shaped = self.shape(_with_system({name: cells[name] for name in self.needs}))
        return {name: read(cells[name]) for name, read in self.extra.items()} | shaped

    def table(self, rows: Sequence[Row]) -> pa.Table:
        """Return what `read` yielded of rows, as it is kept."""
        return pa.table({n: _array(n, [row.get(n) for row in rows]) for n in self.columns})

    def _getter(self, theirs: str) -> Callable[[Row], Any]:
        if theirs in self.names:
            return itemgetter(theirs)
        if "{{" in theirs or "{%" in theirs:
            return _compiled(ENVIRONMENT.from_string, theirs).render
        head, *path = theirs.split(".")
        if not path or head not in self.names:
            raise RowError(
                f"codexhf.columns names {theirs!r}, but the rows have "
                f"{', '.join(self.names)}.{nearest(head, self.names)}"
            )
        return lambda row: _reach(row[head], path)

    def _shape(self, getters: Mapping) -> tuple[tuple[str, ...], Callable[[Row], Row]]:
        shapes = SHAPES[self.card.type]
        for needs, shape in shapes:
            if set(needs) <= set(getters):
                return needs, shape
        first, *others = (needs for needs, _ in shapes)
        missing = ", ".join(n for n in first if n not in getters)
        raise RowError(
            f"rows have the columns {', '.join(self.names)}, but type {self.card.type} needs "
            f"{missing}{''.join('; or ' + ', '.join(needs) for needs in others)}. "
            "Map them under codexhf.columns."
        )


class _Environment(ImmutableSandboxedEnvironment):
    """Templates over rows: what one row's mapping lacks is null, since another's may have it."""

    def getitem(self, obj: Any, argument: Any) -> Any:
        return obj.get(argument) if isinstance(obj, Mapping) else super().getitem(obj, argument)

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, Mapping) and attribute not in obj and not hasattr(obj, attribute):
            return None
        return super().getattr(obj, attribute)


ENVIRONMENT = _Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)


def _compiled(compile: Callable[[str], Any], text: str) -> Any:
    try:
        return compile(text)
    except jinja2.TemplateError as error:
        raise RowError(f"codexhf: {text!r}: {error}") from None


def _variables(card: Card) -> set[str]:
    """Return the names that a card's templates and condition read."""
    templates = [theirs for theirs in card.columns.values() if theirs]
    templates += [f"{{{{ {card.where} }}}}"] if card.where else []
    used = {theirs.split(".")[0] for theirs in templates}
    for text in templates:
        try:
            used |= jinja2.meta.find_undeclared_variables(ENVIRONMENT.parse(text))
        except jinja2.TemplateError:
            pass  # said where it is compiled
    return used


def _reach(value: Any, path: Sequence[str]) -> Any:
    for step in path:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                return None
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list) and re.fullmatch(r"-?\d+", step):
            value = value[int(step)] if -len(value) <= int(step) < len(value) else None
        else:
            return None
    return value


# -- shapes: what was published -> the type's columns ------------------------------------------


def _as_it_is(row: Row) -> Row:
    return {name: spoken(name, value) for name, value in row.items()}


def _with_system(row: Row) -> Row:
    system = row.pop("system", None)
    if system is None or not str(system).strip():
        return row
    turns = [{"role": "system", "content": spoken("system", system)}]
    start = next(n for n in ("prompt", "messages", "chosen") if n in row)
    row[start] = turns + _turns(spoken(start, row[start]), "user")
    if start == "chosen":
        row["rejected"] = turns + _turns(spoken("rejected", row["rejected"]), "user")
    return row


def _demonstration(row: Row) -> Row:
    prompt, completion = spoken("prompt", row["prompt"]), spoken("completion", row["completion"])
    if isinstance(completion, list) and completion and completion[0]["role"] != "assistant":
        turns = _turns(prompt, "user")
        ends = range(len(turns), len(completion))
        end = next((i for i in ends if completion[i - len(turns) : i] == turns), None)
        if end is None:
            raise RowFault("completion begins with another turn than the prompt's")
        prompt, completion = completion[:end], completion[end:]
    return {"prompt": prompt, "completion": completion}


def _conversation(row: Row) -> Row:
    """Take the last assistant turn as the completion of what comes before it."""
    turns = _messages(row)
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    if last == 0:
        raise RowFault("messages has no assistant turn behind a prompt")
    return {"prompt": turns[:last], "completion": turns[last : last + 1]}


def _prompt_of_conversation(row: Row) -> Row:
    turns = _messages(row)
    return {"prompt": turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns}


def _messages(row: Row) -> list:
    turns = spoken("messages", row["messages"], transcript=True)
    if not isinstance(turns, list):
        raise RowFault("messages is no conversation")
    return turns


def _pair(row: Row) -> Row:
    prompt = spoken("prompt", row["prompt"])
    chosen, rejected = (spoken(n, row[n]) for n in ("chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list) and chosen and rejected:
        if chosen[0]["role"] != "assistant":
            start = _common(chosen, rejected)
            turns = _turns(prompt, "user") if prompt else []
            if turns and chosen[start - len(turns) : start] != turns:
                raise RowFault("chosen begins with another turn than the prompt's")
            prompt, chosen, rejected = chosen[:start], chosen[start:], rejected[start:]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _implicit_pair(row: Row) -> Row:
    chosen, rejected = (spoken(n, row[n], transcript=True) for n in ("chosen", "rejected"))
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise RowFault("no prompt, and chosen and rejected are no conversations")
    return _pair({"prompt": None, "chosen": chosen, "rejected": rejected})


def _native_pair(row: Row) -> Row:
    try:
        label = read_label(row["label"]) if "label" in row else read_winner(*map(row.get, WINNERS))
    except ValueError as error:
        raise RowError(str(error)) from None
    if label == "tie":
        raise RowFault("tie")
    chosen, rejected = ("response_a", "response_b")[:: 1 if label == "a" else -1]
    return _pair({"prompt": row["prompt"], "chosen": row[chosen], "rejected": row[rejected]})


def _common(chosen: list, rejected: list) -> int:
    """Return how many turns two conversations share before the answers in which they differ."""
    most = min(len(chosen), len(rejected)) - 1
    same = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    while same and (chosen[same]["role"], rejected[same]["role"]) != ("assistant", "assistant"):
        same -= 1
    if same == 0:
        raise RowFault("chosen and rejected share no beginning that an assistant answers")
    return same


SHAPES: dict[str, list[tuple[tuple[str, ...], Callable[[Row], Row]]]] = {
    "language-modeling": [(("text",), _as_it_is)],
    "prompt-completion": [
        (("prompt", "completion"), _demonstration),
        (("messages",), _conversation),
    ],
    "preference": [
        (("prompt", "chosen", "rejected"), _pair),
        (("prompt", "response_a", "response_b", "label"), _native_pair),
        (("prompt", "response_a", "response_b", *WINNERS), _native_pair),
        (("chosen", "rejected"), _implicit_pair),
    ],
    "prompt-only": [(("prompt",), _as_it_is), (("messages",), _prompt_of_conversation)],
}


# -- values ------------------------------------------------------------------------------------


def spoken(name: str, value: Any, transcript: bool = False) -> Any:
    """Return a text as it is, messages with role and content alone, and None for anything else.

    Args:
        transcript: read a text as Anthropic's "\\n\\nHuman: ... \\n\\nAssistant: ...".
    Raises:
        RowFault: messages that hold more than text.
    """
    if isinstance(value, str):
        if transcript and TURN.match(value):
            _, *parts = TURN.split(value)
            roles = {"Human": "user", "Assistant": "assistant"}
            pairs = zip(parts[::2], parts[1::2], strict=True)
            return [{"role": roles[who], "content": text.strip()} for who, text in pairs]
        return value
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        return None
    return [_turn(name, turn) for turn in value]


def _turn(name: str, turn: Mapping) -> dict[str, str]:
    if call := next((key for key in CALLS if turn.get(key)), None):
        raise RowFault(f"{name} has {call}, which no stage can train on")
    role = turn.get("role") or turn.get("from")
    if not isinstance(role, str):
        raise RowFault(f"{name} has a turn without a role")
    content = turn.get("content") if "content" in turn else turn.get("value")
    try:
        return {"role": SHAREGPT.get(role, role), "content": content_text(content)}
    except ValueError as error:
        raise RowFault(f"{name}: {error}") from None


def _turns(value: Any, role: str) -> list:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _array(name: str, values: list) -> pa.Array:
    """Return a column in the form in which it is kept, whatever the other rows of a card say."""
    if name == "tests":
        return json_unless_alike(values)
    if name == "margin":
        return pa.array(values, pa.float64())
    if name in ("id", "entry_point", "group"):
        return pa.array(values, pa.string())
    if name in ROLES or name == "text":
        return _speech(name, values)
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        return _json(values)


def _speech(name: str, values: list) -> pa.Array:
    """Return texts, or messages where one value is messages; what is neither is null."""
    if any(_is_messages(value) for value in values):
        role = ROLES.get(name, "user")
        turns = [_turns(v, role) if isinstance(v, str) or _is_messages(v) else None for v in values]
        return pa.array(turns, MESSAGES)
    return pa.array([v if isinstance(v, str) else None for v in values], pa.string())


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(turn, dict) and "role" in turn for turn in value
    )


def _same(value: Any) -> Any:
    return value


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _reference(value: Any) -> str | None:
    value = text_of(spoken("completion", value)) if value is not None else ""
    if value is None:
        raise RowFault("completion is not text")
    return value or None


def _margin(value: Any) -> float:
    try:
        number = float(0.0 if value is None else value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RowFault("margin is no number")
    return number


# -- tests -------------------------------------------------------------------------------------


def _row_settings(settings: Settings) -> dict:
    """Return what a card says of each of its rows' tests; packages are the whole run's."""
    named = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {n: v for n, v in named.items() if v is not None and n != "packages"}


NO_SETTINGS = Settings()


def read_tests(value: Any, settings: Settings = NO_SETTINGS) -> str | list[dict] | dict | None:
    """Return tests in a form that `execution.run_tests` takes; see the docstring of cards.py.

    Args:
        settings: the card's; what the tests say of themselves comes first.
    Raises:
        RowFault: another form, or assert code that is not Python.
    """
    own = _row_settings(settings)
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except ValueError:
            pass  # Python, then
    if isinstance(value, Mapping) and {"code", "cases"} & set(value):
        said = {k: v for k, v in value.items() if v is not None}
        value = said.pop("code", None) or said.pop("cases", None)
        own |= {k: v for k, v in said.items() if k not in ("code", "cases")}
    compare = own.pop("compare", None)
    tests = _read_form(value, compare)
    if not own or tests is None:
        return tests
    return {"code" if isinstance(tests, str) else "cases": tests, **own}


def _read_form(value: Any, compare: str | None) -> str | list[dict] | None:
    if isinstance(value, list) and value and all(isinstance(line, str) for line in value):
        value = "\n".join(value)
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            ast.parse(value)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise RowFault("tests are not Python") from None
        return value
    if value is None or value == []:
        return None
    if isinstance(value, Mapping):
        return _read_columns(value, compare)
    if isinstance(value, list) and all(isinstance(case, Mapping) for case in value):
        return [_read_case(case, compare) for case in value]
    raise RowFault("tests are in no known form")


def json_unless_alike(values: list) -> pa.Array:
    """Return tests in Arrow's own types where all have one form, else as JSON."""
    forms = {tuple(v[0]) if isinstance(v, list) else type(v) for v in values if v is not None}
    if len(forms) > 1 or dict in forms:
        return _json(values)
    return pa.array(values)


def _json(values: list) -> pa.Array:
    texts = [None if value is None else json.dumps(value, default=str) for value in values]
    return pa.array(texts, pa.json_())


def _read_case(case: Mapping, compare: str | None) -> dict:
    case = {key: cell for key, cell in case.items() if cell is not None}
    if case.get("testtype") == "functional":
        return _read_call(str(case.get("input", "")), str(case.get("output", "")))
    for ours, theirs in (
        (("args", "expected"), ("args", "expected")),
        (("stdin", "stdout"), ("stdin", "stdout")),
        (("stdin", "stdout"), ("input", "output")),
    ):
        if set(theirs) <= set(case):
            if case.get("testtype", "stdin") != "stdin":
                raise RowFault(f"tests of the type {case['testtype']} are not supported")
            if not all(isinstance(case[name], str) for name in theirs):
                raise RowFault(f"tests: {' or '.join(theirs)} is not text")
            out = dict(zip(ours, (case[name] for name in theirs), strict=True))
            how = str(case.get("compare") or compare or "")
            return out | ({"compare": how} if how else {})
    raise RowFault("tests are in no known form")


def _read_call(arguments: str, result: str) -> dict:
    """Read LiveCodeBench's form of a call: a line of JSON for each argument, and the result's."""
    try:
        args = tuple(json.loads(line) for line in arguments.splitlines() if line.strip())
        expected = json.loads(result)
    except ValueError:
        raise RowFault("tests of a function: not lines of JSON") from None
    return {"args": repr(args), "expected": repr(expected), "compare": "json"}


def _read_columns(value: Mapping, compare: str | None) -> list[dict] | None:
    """Read APPS's and CodeContests' form: inputs and outputs, each a list."""
    inputs = value.get("inputs", value.get("input"))
    outputs = value.get("outputs", value.get("output"))
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise RowFault("tests are in no known form")
    if value.get("fn_name"):
        if not all(isinstance(args, list) for args in inputs):
            raise RowFault("tests of a function: inputs are not lists of arguments")
        cases = [
            {"args": repr(tuple(args)), "expected": repr(expected), "compare": "json or first"}
            for args, expected in zip(inputs, outputs, strict=True)
        ]
        return cases or None
    cells = [["\n".join(c) if isinstance(c, list) else c for c in x] for x in (inputs, outputs)]
    pairs = zip(*cells, strict=True)
    return [_read_case({"stdin": i, "stdout": o}, compare) for i, o in pairs] or None


def called_name(tests: Any) -> str | None:
    """Return the name of the function that assert code calls, or None."""
    if isinstance(tests, dict):
        tests = tests.get("code")
    if not isinstance(tests, str):
        return None
    called = [
        node.func.id
        for statement in ast.parse(tests).body
        if isinstance(statement, ast.Assert)
        for node in ast.walk(statement.test)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    # MBPP has functions that are called like a builtin: these come last
    found = min(called, key=lambda name: hasattr(builtins, name), default=None)
    return found or entry_point_in(tests)


# -- tables ------------------------------------------------------------------------------------


def one_form(tables: Sequence[pa.Table]) -> pa.Table:
    """Concatenate batches; a column with messages in one of them has messages in all.

    A column whose types differ in another way becomes JSON, one that a batch lacks is null in it.
    """
    types: dict[str, set] = {}
    for field in (field for table in tables for field in table.schema):
        types.setdefault(field.name, set()).add(field.type)
    for name in [name for name, found in types.items() if MESSAGES in found]:
        tables = [wrap(table, name) for table in tables]
        types.pop(name)
    try:
        return pa.concat_tables(tables, promote_options="default")
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        mixed = [name for name, found in types.items() if len(found - {pa.null()}) > 1]
        return pa.concat_tables((_as_json(t, mixed) for t in tables), promote_options="default")


def _as_json(table: pa.Table, names: Sequence[str]) -> pa.Table:
    columns = {name: table[name] for name in table.column_names}
    columns |= {name: _json(values_of(columns[name])) for name in names if name in columns}
    return pa.table(columns)


def wrap(table: pa.Table, name: str) -> pa.Table:
    """Wrap a column of text in messages of the column's role; leave one of messages as it is."""
    if name not in table.column_names or table[name].type == MESSAGES:
        return table
    role = ROLES.get(name, "user")
    wrapped = []
    for chunk in table[name].cast(pa.string()).chunks:
        roles = pa.array([role] * len(chunk), pa.string())
        turns = pa.StructArray.from_arrays([roles, chunk], fields=list(MESSAGES.value_type))
        offsets = pa.array(range(len(chunk) + 1), pa.int32())
        wrapped.append(pa.ListArray.from_arrays(offsets, turns, MESSAGES, mask=chunk.is_null()))
    column = pa.chunked_array(wrapped, MESSAGES)
    return table.set_column(table.column_names.index(name), name, column)
