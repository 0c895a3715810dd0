"""What an op of domain `qwen` is: a torch custom op and the ONNX node that stands for it, both made from one declaration.

The body is ordinary PyTorch and is what runs eagerly; `torch.export` sees only the op. The ONNX form has the op's tensors as inputs, in
order, and its scalars as attributes of the same names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

DOMAIN = "qwen"
OPSET_VERSION = 1


@dataclass(frozen=True)
class Op:
    """One op: its tensor arguments, its scalar arguments with their type ("int" or "float"), both in the body's order, and its results."""

    name: str
    inputs: tuple[str, ...]
    attributes: dict[str, str]
    outputs: tuple[str, ...]
    torch_op: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.torch_op(*args, **kwargs)

    @property
    def overload(self) -> Any:
        """The OpOverload that stands in an exported graph."""
        return getattr(getattr(torch.ops, DOMAIN), self.name).default


def define(name: str, outputs: tuple[str, ...], body: Callable[..., Any], fake: Callable[..., Any]) -> Op:
    """Register `body` as torch op `qwen::name`; inputs and attributes are read off its annotations."""
    torch_op = torch.library.custom_op(f"{DOMAIN}::{name}", body, mutates_args=())
    torch_op.register_fake(fake)
    kinds = {k: v for k, v in body.__annotations__.items() if k != "return"}
    inputs = tuple(k for k, v in kinds.items() if v == "Tensor")
    attributes = {k: v for k, v in kinds.items() if v != "Tensor"}
    if tuple(kinds) != (*inputs, *attributes):
        raise TypeError(f"op {name}: tensors come before scalars in the signature, got {tuple(kinds)}")
    return Op(name, inputs, attributes, outputs, torch_op)
