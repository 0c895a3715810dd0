"""Limits of a chat template: a template is a program that came with a checkpoint, and rendering cannot be stopped from outside.

`LimitedEnvironment` is Jinja's immutable sandbox, in which a render also has a budget of steps and every text and list a largest size. What
the sandbox cannot intercept (loops, `~`, slices, comparisons, list literals) is sent through filters of our own by a rewrite of the parsed
template. An operation that could make something large in one go is checked before it runs; all others are charged by the size of what
they read and return. The result of a render that stays within the limits is the sandbox's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context, LoopContext, Namespace, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import pass_environment, pass_eval_context
from jinja2.visitor import NodeTransformer

# A few seconds of loops at most; a prompt of a million tokens spends some ten thousand.
MAX_STEPS = 1_000_000
# Characters of one text, the prompt included: several times what a context of a million tokens holds.
MAX_CHARS = 16_000_000
# Items of one list, and of everything that a nested one holds.
MAX_ITEMS = 1_000_000
# Bits of one integer.
MAX_BITS = 4096
# Widths, counts and precisions given to functions that pad, indent or repeat.
MAX_WIDTH = 1_000_000
_CHARS_PER_STEP, _ITEMS_PER_STEP = 4096, 64
_PADDING_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes"})
_PADDING_FILTERS = frozenset({"center", "indent", "batch", "slice", "round", "truncate", "wordwrap"})
_DIGITS = re.compile(r"\d{7,}")


class LimitReached(jinja2.TemplateRuntimeError):
    """A template went beyond a limit."""


class _Budget:
    def __init__(self) -> None:
        self.left = MAX_STEPS

    def spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise LimitReached(f"more than {MAX_STEPS} steps")


_budget: ContextVar[_Budget] = ContextVar("budget of a render")


@contextmanager
def limited_render() -> Iterator[None]:
    """What is rendered inside has one fresh budget."""
    before = _budget.set(_Budget())
    try:
        yield
    finally:
        _budget.reset(before)


def _spend(steps: int) -> None:
    budget = _budget.get(None)
    if budget is not None:  # constants are folded before there is one
        budget.spend(steps)


def charge(value: Any) -> Any:
    """Pay for reading or making `value`, and return it."""
    if isinstance(value, (str, bytes)):
        _allow_text(len(value))
    elif isinstance(value, (list, tuple, dict, range)):
        _allow_items(len(value))
    return value


def _allow_text(length: int) -> None:
    if length > MAX_CHARS:
        raise LimitReached(f"a text of {length} characters")
    _spend(1 + length // _CHARS_PER_STEP)


def _allow_items(count: int) -> None:
    if count > MAX_ITEMS:
        raise LimitReached(f"a list of {count} items")
    _spend(1 + count // _ITEMS_PER_STEP)


def whole_size(value: Any, seen: dict[int, int] | None = None) -> int:
    """Items of a nested list or mapping as if each were written out; parts that occur twice count twice, but are looked at once."""
    if not isinstance(value, (list, tuple, dict, Namespace)):
        return 1 + len(value) // 16 if isinstance(value, str) else 1
    seen = {} if seen is None else seen
    known = seen.get(id(value))
    if known is None:
        items = value._Namespace__attrs if isinstance(value, Namespace) else value
        parts = [*items, *items.values()] if isinstance(items, dict) else items
        known = seen[id(value)] = 1 + sum(whole_size(part, seen) for part in parts)
        if known > MAX_ITEMS:
            raise LimitReached("a nested list that is too large")
    return known


class _Counted:
    """An iterable whose items cost a step each."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            _spend(1)
            yield item

    def __len__(self) -> int:
        return len(self._items)


def _checked(value: Any) -> Any:
    _spend(1 + whole_size(value) // _ITEMS_PER_STEP)
    return value


@pass_eval_context
def _concat(eval_ctx: nodes.EvalContext, parts: list[Any]) -> str:
    _allow_text(sum(len(part) for part in parts if isinstance(part, str)))
    for part in parts:
        if not isinstance(part, str):
            _checked(part)
    return (markup_join if eval_ctx.autoescape else str_join)(parts)


# Names that no template can write.
_EACH, _CHARGE, _CHECKED, _CONCAT = "each item", "charge", "checked", "concat"
_OWN_FILTERS: Mapping[str, Callable[..., Any]] = {_EACH: _Counted, _CHARGE: charge, _CHECKED: _checked, _CONCAT: _concat}


class _Rewrite(NodeTransformer):  # jinja2 calls its methods by the names of nodes
    """Sends what the sandbox does not see through our filters."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.iter = _filtered(cast(nodes.Expr, node.iter), _EACH)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), _CONCAT)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, _CHARGE) if isinstance(node.arg, nodes.Slice) else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        parts: list[nodes.Compare | nodes.Operand] = [node, *node.ops]
        for part in parts:
            if not isinstance(part.expr, nodes.Const):
                part.expr = _filtered(part.expr, _CHARGE)
        return node

    def visit_List(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        stores = getattr(node, "ctx", "load") != "load"
        constant = all(isinstance(child, nodes.Const) for child in node.iter_child_nodes())
        return node if stores or constant else _filtered(node, _CHECKED)

    visit_Tuple = visit_Dict = visit_List  # noqa: N815


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with the limits of this file; `limited_render` starts the budget of a render."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.globals.pop("lipsum")
        self.filters = {name: _limited_filter(name, function) for name, function in self.filters.items()} | dict(_OWN_FILTERS)
        self.filters["sum"] = _limited_sum
        self.tests = {name: _limited_test(cast(Callable[..., Any], function)) for name, function in self.tests.items()}

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        self.filters[name] = _limited_filter(name, function)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Rewrite().visit(super()._parse(source, name, filename))
        return tree

    def concat(self, pieces: Any) -> str:
        """Join the output of a template, macro or block."""
        kept, length = [], 0
        for piece in pieces:
            length += len(piece)
            if length > MAX_CHARS:
                raise LimitReached(f"an output of more than {MAX_CHARS} characters")
            kept.append(piece)
        _spend(1 + length // _CHARS_PER_STEP)
        return "".join(kept)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_operator(operator, left, right)
        result = super().call_binop(context, operator, left, right)
        return _checked(result) if isinstance(result, (list, tuple)) else charge(result)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as jinja2 has it
        _spend(1)
        if isinstance(__obj, LoopContext):  # a recursive loop
            args = (_Counted(args[0]), *args[1:]) if args else args
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, (str, bytes, int, list, tuple, dict)):
            charge(owner)
            args = _check_method(__obj.__name__, owner, args, kwargs)
        for value in args:
            charge(value)
        result = super().call(__context, __obj, *args, **kwargs)
        return _checked(result) if isinstance(result, Namespace) or __obj is dict else charge(result)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        method = super().wrap_str_format(value)
        if method is None:
            return None
        text, inner = value.__self__, method

        @wraps(method)
        def limited(*args: Any, **kwargs: Any) -> str:
            if _DIGITS.search(text) or re.search(r":[^{}]*\{", text):
                raise LimitReached("a format with a width that is too large or computed")
            for part in (*args, *kwargs.values()):
                _checked(part)
            _allow_text((text.count("{") + 1) * max((len(p) for p in (*args, *kwargs.values()) if isinstance(p, str)), default=0))
            result: str = charge(inner(*args, **kwargs))
            return result

        return limited


def _check_operator(operator: str, left: Any, right: Any) -> None:
    if operator == "%" and isinstance(left, (str, bytes)):
        _check_percent(left, right)
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        if abs(left) > 1 and left.bit_length() * right > MAX_BITS:
            raise LimitReached(f"{operator} with a result that is too large")
    elif operator == "*":
        for one, other in ((left, right), (right, left)):
            if isinstance(one, int) and isinstance(other, (str, bytes)):
                _allow_text(one * len(other))
            elif isinstance(one, int) and isinstance(other, (list, tuple)):
                _allow_items(one * len(other))
            elif isinstance(one, int) and isinstance(other, int) and one.bit_length() + other.bit_length() > MAX_BITS:
                raise LimitReached(f"{operator} with a result that is too large")
    elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
        (_allow_text if isinstance(left, (str, bytes)) else _allow_items)(len(left) + len(right))


def _check_percent(text: str | bytes, values: Any) -> None:
    pattern = text.decode("latin-1") if isinstance(text, bytes) else text
    if _DIGITS.search(pattern) or "*" in pattern:
        raise LimitReached("a format with a width that is too large or computed")
    parts = values if isinstance(values, tuple) else (values,)
    _checked(parts)
    _allow_text(sum(len(part) for part in parts if isinstance(part, str)) * (1 if isinstance(values, tuple) else pattern.count("%") or 1))


def _check_width(name: str, values: Any) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_WIDTH:
            raise LimitReached(f"{name} with {value}")


def _check_method(name: str, owner: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Look at a method of a builtin before it is called; returns the arguments to call it with."""
    if name in _PADDING_METHODS:
        _check_width(name, (*args, *kwargs.values()))
        if name == "expandtabs":
            tab = next((value for value in (*args, *kwargs.values()) if isinstance(value, int)), 8)
            _allow_text(len(owner) + owner.count("\t" if isinstance(owner, str) else b"\t") * abs(tab))
    elif name == "join" and args:
        items = list(_Counted(args[0]))
        _allow_join(owner, items)
        return (items, *args[1:])
    elif name == "replace" and len(args) > 1:
        _allow_replace(owner, args[0], args[1])
    elif name == "translate" and args and isinstance(args[0], dict):
        _allow_text(len(owner) * max((len(value) for value in args[0].values() if isinstance(value, str)), default=1))
    return args


def _allow_join(separator: Any, items: list[Any]) -> None:
    _allow_text(len(separator) * len(items) + sum(len(item) if isinstance(item, (str, bytes)) else 8 * whole_size(item) for item in items))


def _allow_replace(text: Any, old: Any, new: Any) -> None:
    if all(isinstance(value, str) for value in (text, old, new)) or all(isinstance(value, bytes) for value in (text, old, new)):
        _allow_text(len(text) + text.count(old) * len(new))


def _limited_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    takes = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def limited(*given: Any, **kwargs: Any) -> Any:
        head, args = given[:takes], given[takes:]
        for value in (*args, *kwargs.values()):
            charge(value)
        if name in _PADDING_FILTERS:
            _check_width(name, (*args[1:], *kwargs.values()))
        if name == "indent" and isinstance(args[0], str):
            width = args[1] if len(args) > 1 else kwargs.get("width", 4)
            _allow_text(len(args[0]) + (args[0].count("\n") + 1) * (width if isinstance(width, int) else len(width)))
        elif name == "replace" and len(args) > 2:
            _allow_replace(str(args[0]), str(args[1]), str(args[2]))
        elif name == "format":
            _check_percent(str(args[0]), args[1:] or (kwargs,))
        elif name == "join" and args and not isinstance(args[0], str):
            items = list(_Counted(args[0]))
            separator = args[1] if len(args) > 1 else kwargs.get("d", "")
            _allow_join(str(separator), items)
            args = (items, *args[1:])
        elif name in ("string", "pprint", "tojson", "urlize", "xmlattr", "urlencode") and args:
            _checked(args[0])
        return charge(function(*head, *args, **kwargs))

    return limited


def _limited_test(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        for value in args:
            charge(value)
        return function(*args, **kwargs)

    return limited


@pass_environment
def _limited_sum(environment: LimitedEnvironment, iterable: Any, attribute: str | int | None = None, start: Any = 0) -> Any:
    """Jinja's `sum`, with every addition checked: a sum of lists copies them again and again."""
    pick = jinja2.filters.make_attrgetter(environment, attribute) if attribute is not None else None
    total = start
    for item in _Counted(iterable):
        value = item if pick is None else pick(item)
        _check_operator("+", total, value)
        total = charge(total + value)
    return total
