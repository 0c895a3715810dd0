"""What each weight of a bundle takes, known from the headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple

from qwen_export.graphs.checkpoint.checkpoint_directory import Checkpoint
from qwen_export.graphs.checkpoint.tensor_names import stored_dtypes
from qwen_export.graphs.passes.lowering_choice import Choice
from qwen_export.graphs.quantization.packing import part_bytes
from qwen_export.graphs.quantization.precision_plan import FP8, FP8_BLOCK, PrecisionPlan, group_of

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
"""Bytes of a value, by precision."""


class WeightSize(NamedTuple):
    """Parameters of a weight, and bytes in the bundle."""

    parameters: int
    nbytes: int


def weight_sizes(
    checkpoint: Checkpoint,
    precision: str,
    choices: dict[str, Choice],
    quantization: PrecisionPlan | None,
    tensors: Sequence[tuple[str, tuple[int, ...]]],
    *,
    standard: bool,
) -> dict[str, WeightSize]:
    """The weights by name. Matrices that are not quantized stay BF16 where graphs.passes.keep_stored_bf16 leaves them so."""
    stored, sizes = stored_dtypes(checkpoint), dict[str, WeightSize]()
    native = {op for op, choice in choices.items() if choice.name in ("native_linear", "native_moe")} if precision == "fp32" else set()
    for name, shape in tensors:
        format = quantization.of(name).quant if quantization else None
        if format is None and quantization is not None and quantization.of(name).format == FP8:
            scales = 0 if standard else 4 * prod(shape[:-2]) * prod(-(-size // FP8_BLOCK) for size in shape[-2:])
            nbytes = prod(shape) + scales
        elif format is not None and standard:
            # An embedding that is also the head is stored for both: rows to gather, and blocks along what the product sums.
            copies = 2 if name == "embed_tokens.weight" and checkpoint.config.text.tie_word_embeddings else 1
            zero_bits = 8 if ".mlp.experts." in name else format.bits
            nbytes = copies * part_bytes(format, prod(shape[:-1]), shape[-1], BYTES[precision], zero_bits)
        elif format is not None:
            panels, width = format.packed_shape(prod(shape[:-1]), shape[-1])
            nbytes = panels * width
        else:
            read_by = "moe" if ".mlp.experts." in name else "linear" if len(shape) in (2, 5) else ""
            keeps = read_by in native and stored[name] == "BF16"
            nbytes = prod(shape) * BYTES["bf16" if keeps else precision]
        sizes[name] = WeightSize(prod(shape), nbytes)
    return sizes


def group_sizes(sizes: Mapping[str, WeightSize]) -> dict[str, tuple[int, int]]:
    """Parameters and bytes of each group of the precision plan, and under "" of everything else."""
    groups: dict[str, tuple[int, int]] = {}
    for name, size in sizes.items():
        parameters, total = groups.get(group_of(name), (0, 0))
        groups[group_of(name)] = (parameters + size.parameters, total + size.nbytes)
    return groups
