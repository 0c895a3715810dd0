"""Seeded changes of a manifest: of its fields, and of its bytes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

_NUMBERS = (0, 1, 2, 3, 7, -1, 63, 64, 4095, 4096, 2**31 - 1, 2**31, 2**32, 2**62, 2**63, 10**18, 10**40, 0.5, 1e308, -0.0)
_TEXTS = (
    "",
    "x",
    "../x",
    "/etc/passwd",
    "a\0b",
    "\x1b[2J",
    "\ud800",
    "B",
    "T",
    "S",
    "P",
    "N",
    "float",
    "float16",
    "int64",
    "uint8",
    "é" * 300,
)
_OTHERS = (None, True, False, [], {}, [[]], {"a": 1}, [1, 2, 3], "1", float("nan"))


def mutated(manifest: dict[str, Any], seed: int) -> tuple[str, bytes]:
    """One to three changes of fields; returns the paths that were changed, and the bytes of the result."""
    rng, result = random.Random(seed), copy.deepcopy(manifest)
    paths = [_change(result, rng) for _ in range(rng.choice((1, 1, 1, 1, 2, 3)))]
    text = json.dumps(result, indent=1)
    return " ".join(paths), text.encode("utf-8", "surrogatepass")


def damaged(data: bytes, seed: int) -> bytes:
    """A few bytes changed, removed, doubled, or the end cut off."""
    rng, raw = random.Random(seed), bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(raw))
        match rng.randrange(5):
            case 0:
                raw[at] ^= 1 << rng.randrange(8)
            case 1:
                raw[at] = rng.choice(b"0123456789")
            case 2:
                del raw[at : at + rng.randrange(1, 40)]
            case 3:
                raw[at:at] = raw[at : at + rng.randrange(1, 40)]
            case 4:
                raw = raw[: max(1, at)]
    return bytes(raw)


def _change(root: dict[str, Any], rng: random.Random) -> str:
    """Change one place of the tree; every field is as likely as the others of its depth."""
    parent: Any = root
    path: list[str] = []
    while True:
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        if not keys:
            return ".".join(path)
        key = rng.choice(keys)
        path.append(str(key))
        if isinstance(parent[key], dict | list) and parent[key] and rng.random() < 0.9:
            parent = parent[key]
            continue
        break
    value = parent[key]
    match rng.randrange(8):
        case 0:
            del parent[key]
        case 1:
            parent[key] = rng.choice(_NUMBERS)
        case 2 if isinstance(value, int | float) and not isinstance(value, bool):
            parent[key] = rng.choice((value + 1, value - 1, value * 2, -value, value + 64, value + 4096, value // 2))
        case 2 | 3:
            parent[key] = rng.choice(_TEXTS)
        case 4:
            parent[key] = rng.choice(_OTHERS)
        case 5:
            parent[key] = copy.deepcopy(rng.choice(list(_values(root, type(value)))))
        case 6:
            other = rng.choice(keys)
            parent[key], parent[other] = parent[other], parent[key]
        case 7:
            if isinstance(parent, list):
                parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(value))
            else:
                parent[f"{key}2"] = copy.deepcopy(value)
    return ".".join(path)


def _values(node: Any, kind: type) -> Iterator[Any]:
    """All values of one type in the tree."""
    if type(node) is kind:
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _values(child, kind)
