"""A quantization method as the reader sees it: a way to find its weights among the tensors of a checkpoint.

Bits, groups and scales of a weight are decided per module, by the shapes of the parts that are stored for it. The settings in config.json
decide what does not follow from shapes, and are looked up per module too.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, ClassVar

from qwen_export.errors import CheckpointError, UnsupportedError
from qwen_export.graphs.checkpoint.formats.logical_tensor import LogicalTensor, Tensors
from qwen_export.graphs.checkpoint.safetensors_header import TensorInfo
from qwen_export.graphs.checkpoint.stored_prefixes import split_name
from qwen_export.graphs.config_fields import shown

_PREFIXES = ("model.", "model.language_model.", "language_model.model.", "")
_LONGEST_PATTERN = 1000
OTHER_RELEASE = "Give the BF16 release of the same model."


class Format(ABC):
    """One quantization method with the settings of a checkpoint."""

    method: ClassVar[str]
    part_suffixes: ClassVar[tuple[str, ...]]
    """Endings of tensors that only make sense as a part of a weight."""
    activation_suffixes: ClassVar[tuple[str, ...]] = ()
    """Endings of tensors that quantize activations or the attention cache; the weights do not depend on them."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """`settings` is quantization_config. Raises UnsupportedError for a variant that is not implemented."""
        self.settings = settings

    @abstractmethod
    def weight(self, info: TensorInfo, tensors: Tensors) -> LogicalTensor | None:
        """The quantized weight whose codes are `info`; None for any other tensor. Raises CheckpointError or UnsupportedError with the
        module in `where`."""

    def refuse(self, key: str, expected: str) -> UnsupportedError:
        return UnsupportedError(
            f"this variant of {self.method} quantization is not supported",
            where=f"quantization_config {key!r}",
            got=shown(self.settings.get(key)),
            expected=expected,
            fix=OTHER_RELEASE,
        )

    def only(self, key: str, *allowed: Any) -> Any:
        """The setting, which must be one of `allowed`; the first where it is missing."""
        value = self.settings.get(key, allowed[0])
        if value not in allowed:
            raise self.refuse(key, " or ".join(map(repr, allowed)))
        return value


def refuse_module(method: str, module: str, got: object, expected: str) -> UnsupportedError:
    """An error about one module whose form is not implemented."""
    return UnsupportedError(
        f"this form of {method} quantization is not supported", where=module, got=got, expected=expected, fix=OTHER_RELEASE
    )


def unpacked_sizes(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """The two sizes of a packed matrix."""
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError("a quantized weight is not a matrix", where=name, got=shape, fix=OTHER_RELEASE)
    return shape[0], shape[1]


def group_of_parts(method: str, module: str, inputs: int, groups: int, configured: object = None) -> int:
    """Inputs that share a scale, from the number of scales that are stored for a row. `configured` is the group of the settings."""
    group = inputs // groups if groups > 0 and inputs % groups == 0 else 0
    # Groups of unequal size also have such a number of scales: 192 inputs in groups of 128 have 2.
    if group not in (0, inputs, configured) and group & (group - 1):
        group = 0
    if not group:
        raise CheckpointError(
            "the scales of a quantized weight do not divide its inputs",
            where=module,
            got=f"{groups} scales for a row of {inputs} inputs",
            expected=f"groups of equal size ({method})",
            fix="Is config.json from another model? Else give the BF16 release.",
        )
    return group


def module_names(info: TensorInfo, module: str) -> Iterator[str]:
    """The names by which settings may call a module: as it is stored, as the releases have it, and with each prefix of the family."""
    suffix = info.name.removeprefix(module)
    yield (info.stored_name or info.name).removesuffix(suffix)
    yield module
    inner = split_name(module)[1]
    for prefix in _PREFIXES:
        yield prefix + inner


def matches(pattern: str, name: str, *, whole: bool = False) -> bool:
    """Whether a regular expression matches the front of a name, or all of it. False for a pattern that is none."""
    compiled = _compiled(pattern)
    if compiled is None:
        return False
    return (compiled.fullmatch(name) if whole else compiled.match(name)) is not None


@cache
def _compiled(pattern: str) -> re.Pattern[str] | None:
    try:
        # Repetitions of repetitions take exponential time on names that do not match.
        nested = re.search(r"[+*}]\)[+*{]", pattern)
        return None if len(pattern) > _LONGEST_PATTERN or nested else re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return None
