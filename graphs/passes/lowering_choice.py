"""One way to lower an op, and the kernels that it needs. The lists of ways are in `plugins`, per target.

Imports neither torch nor onnx.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from qwen_export.element_types import PLAIN
from qwen_export.graphs.config import TextConfig

ELEMENT = {kind.short: kind.manifest for kind in PLAIN}
"""Element types as ONNX Runtime's registries name them, by precision."""


class AvailableKernels(Protocol):
    """The kernels of an installed backend."""

    def has(self, domain: str, op: str, **wanted: str) -> bool:
        """Whether a registration of the op takes these element types, by type variable."""


@dataclass(frozen=True)
class Kernel:
    """A kernel that a lowering emits. `activation` names its type variables that carry the build's precision, `fp32` those that are
    fp32 whatever the precision."""

    op: str
    domain: str = "com.microsoft"
    activation: tuple[str, ...] = ("T",)
    fp32: tuple[str, ...] = ()

    def available(self, kernels: AvailableKernels, precision: str) -> bool:
        wanted = dict.fromkeys(self.activation, ELEMENT[precision]) | dict.fromkeys(self.fp32, "float")
        return kernels.has(self.domain, self.op, **wanted)

    def message(self, precision: str) -> str:
        return f"{self.domain or 'ai.onnx'}.{self.op} for {ELEMENT[precision] if self.activation else 'float'}"


@dataclass(frozen=True)
class Choice:
    """One way to lower one op; `name` is its key in the table of lowerings."""

    name: str
    kernels: tuple[Kernel, ...]
    limit: Callable[[TextConfig], str] = lambda config: ""
    """What the kernels cannot do with this model, "" when nothing: a limit that no registry has."""
    transaction: bool = True
    """Whether a state may have tokens pending, as speculation needs it."""
    columns: int = 1
    """Of a product: results whose width is no multiple of this are left to FusedMatMul."""
    tail: bool = False
    """Of a product: its quantized form takes rows that are not quantized behind those that are, in one call."""
    quantized_only: bool = False
    """Of the experts: the kernel takes quantized ones only."""
    caches: tuple[str, ...] = ()
    """Of attention: the formats of caches that the kernel takes beside that of its activations."""
    cache_heads: tuple[int, ...] = ()
    """With these formats, the values that a head may have; empty: any number."""
