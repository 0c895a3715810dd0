"""Random JSON schemas whose texts are short."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

NAMES = st.sampled_from(["a", "name", "größe", "tags", "x-y"])
TEXTS = st.sampled_from(["on", "off", "", 'q"\\', "a b", "ä\n", "</think>"])

_LEAVES = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 6)),
    st.builds(lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size}, st.integers(-20, 300), st.integers(0, 50)),
    st.builds(lambda values: {"enum": values}, st.lists(st.one_of(TEXTS, st.integers(-3, 99), st.none()), min_size=1, max_size=4)),
    st.builds(lambda value: {"const": value}, TEXTS),
    st.sampled_from([{"type": "string", "pattern": "^[a-c]{1,3}$"}, {"type": "string", "format": "date"}, {"type": ["boolean", "null"]}]),
    st.just({"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25}),
)


def _objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def made(properties: dict[str, Any], needed: int) -> dict[str, Any]:
        required = sorted(properties)[:needed]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    return st.builds(made, st.dictionaries(NAMES, inner, max_size=3), st.integers(0, 3))


def _arrays(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, inner, st.integers(0, 3))


_ANY: st.SearchStrategy[dict[str, Any]] = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(_objects(inner), _arrays(inner), st.builds(lambda one, other: {"anyOf": [one, other]}, inner, inner)),
    max_leaves=5,
)

SCHEMAS = st.one_of(_ANY, st.builds(lambda one: {"$defs": {"R": one}, "$ref": "#/$defs/R"}, _ANY))
