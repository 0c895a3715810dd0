"""What a quantization method is to the reader: a way to find its weights among the tensors of a checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from qwen_export.errors import CheckpointError, UnsupportedError
from qwen_export.graphs.checkpoint.formats.logical_tensor import LogicalTensor, Tensors
from qwen_export.graphs.checkpoint.safetensors_header import TensorInfo


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
        """The quantized weight whose codes are `info`; None for any other tensor."""

    def refuse(self, key: str, expected: str) -> UnsupportedError:
        return UnsupportedError(
            f"this variant of {self.method} quantization is not supported",
            where=f"quantization_config {key!r}",
            got=repr(self.settings.get(key)),
            expected=expected,
        )

    def only(self, key: str, *allowed: Any) -> Any:
        """The setting, which must be one of `allowed`; the first where it is missing."""
        value = self.settings.get(key, allowed[0])
        if value not in allowed:
            raise self.refuse(key, " or ".join(map(repr, allowed)))
        return value


def unpacked_sizes(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """The two sizes of a packed matrix."""
    if len(shape) != 2:
        raise CheckpointError("a quantized weight is not a matrix", where=name, got=shape)
    return shape[0], shape[1]
