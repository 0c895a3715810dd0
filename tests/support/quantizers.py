"""Quantized checkpoints, written from the public descriptions of the formats with torch and loops, apart from the code that reads them.

Each quantizer turns one matrix into its stored tensors and says what they stand for: the fp32 matrix that a reader must get.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensor = torch.Tensor
Quantizer = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]
"""Module name and fp32 matrix [O, I] to the stored tensors and the dequantized matrix."""

# What the FP8 releases quantize.
PROJECTIONS = re.compile(
    r"(self_attn\.[qkvo]_proj|linear_attn\.(in_proj_qkv|in_proj_z|out_proj)|mlp\.(experts\.\d+\.|shared_expert\.)?(gate|up|down)_proj)\.weight$"
)


@dataclass(frozen=True)
class QuantizedCheckpoint:
    path: Path
    plain: Path
    """A checkpoint of the dequantized weights, in fp32."""
    values: dict[str, Tensor]
    """The dequantized weights by name."""
    stored: dict[str, Tensor]


def quantize_checkpoint(
    source: Path, out: Path, quantizer: Quantizer, config: dict[str, Any], chosen: re.Pattern[str] = PROJECTIONS
) -> QuantizedCheckpoint:
    """Write `source` with its projections quantized to `out`/quantized, and the same model dequantized to `out`/plain."""
    stored: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for shard in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            if chosen.search(name):
                parts, values[name] = quantizer(name.removesuffix(".weight"), tensor.float())
                stored |= parts
            else:
                stored[name] = tensor
                values[name] = tensor.float()
    quantized, plain = out / "quantized", out / "plain"
    for directory, tensors, change in ((quantized, stored, {"quantization_config": config}), (plain, values, {"dtype": "float32"})):
        directory.mkdir(parents=True)
        for path in source.iterdir():
            if path.suffix != ".safetensors" and "index" not in path.name:
                shutil.copyfile(path, directory / path.name)
        settings = json.loads((source / "config.json").read_text()) | change
        (directory / "config.json").write_text(json.dumps(settings))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    return QuantizedCheckpoint(quantized, plain, values, stored)


def blocks_of(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Largest magnitude of each block; blocks at the edges may be smaller."""
    O, I = matrix.shape  # noqa: E741
    padded = torch.nn.functional.pad(matrix.abs(), (0, -I % columns, 0, -O % rows))
    return padded.reshape(-(-O // rows), rows, -(-I // columns), columns).amax((1, 3))


def spread(grid: Tensor, rows: int, columns: int, shape: torch.Size) -> Tensor:
    return grid.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]


def block_fp8(scale_dtype: torch.dtype = torch.bfloat16, block: int = 128) -> Quantizer:
    def quantize(module: str, matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale = (blocks_of(matrix, block, block) / 448).to(scale_dtype)
        each = spread(scale.float(), block, block, matrix.shape)
        codes = (matrix / each).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {f"{module}.weight": codes, f"{module}.weight_scale_inv": scale}, codes.float() * each

    return quantize


def scaled(element: torch.dtype, per: str) -> Quantizer:
    """FP8 or INT8, a scale per "tensor", "scalar", "channel" or "block", under the name `weight_scale`."""
    largest = 448.0 if element == torch.float8_e4m3fn else 127.0

    def quantize(module: str, matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        O, I = matrix.shape  # noqa: E741
        rows, columns = {"tensor": (O, I), "scalar": (O, I), "channel": (1, I), "block": (128, 128)}[per]
        scale = blocks_of(matrix, rows, columns) / largest
        each = spread(scale, rows, columns, matrix.shape)
        codes = (matrix / each).clamp(-largest, largest)
        codes = (codes.round() if element == torch.int8 else codes).to(element)
        stored = scale.reshape({"tensor": (1,), "scalar": ()}.get(per, scale.shape))
        return {f"{module}.weight": codes, f"{module}.weight_scale": stored}, codes.float() * each

    return quantize


def integer_grid(matrix: Tensor, group: int, symmetric: bool, dtype: torch.dtype, bits: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [O, I] of 4 or 8 bits, scales [O, G] and zero points [O, G] by rounding to nearest. Group -1: a whole row."""
    last, middle = (1 << bits) - 1, 1 << (bits - 1)
    grouped = matrix.reshape(matrix.shape[0], -1, matrix.shape[1] if group == -1 else group)
    if symmetric:
        scale = (grouped.abs().amax(-1) / (middle - 1)).to(dtype)
        zero = torch.full_like(scale, middle, dtype=torch.int64)
    else:
        low, high = grouped.amin(-1).clamp(max=-1e-6), grouped.amax(-1).clamp(min=1e-6)
        scale = ((high - low) / last).to(dtype)
        zero = (-low / scale.float()).round().clamp(1, last).to(torch.int64)
    codes = (grouped / scale.float()[..., None]).round() + zero[..., None]
    return codes.clamp(0, last).to(torch.int64).reshape(matrix.shape), scale, zero


def dequantized(codes: Tensor, scale: Tensor, zero: Tensor, order: Tensor) -> Tensor:
    """`order` is the group of each input."""
    return (codes - zero[:, order]).float() * scale.float()[:, order]


def packed_words(codes: Tensor, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7), bits: int = 4) -> Tensor:
    """Neighbors of the last axis to one i32; `order[j]` is the neighbor in place j. The last word of a row may have unused places."""
    count = 32 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % count))
    words = torch.zeros(*padded.shape[:-1], padded.shape[-1] // count, dtype=torch.int64)
    for place, neighbor in enumerate(order[:count]):
        words |= padded[..., neighbor::count] << (bits * place)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def gptq(group: int, *, symmetric: bool = True, v2: bool = False, act_order: bool = False, g_idx: bool = True, bits: int = 4) -> Quantizer:
    def quantize(module: str, matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        I = matrix.shape[1]  # noqa: E741
        place = torch.randperm(I, generator=torch.Generator().manual_seed(I)) if act_order else torch.arange(I)
        in_groups, scale, zero = integer_grid(matrix[:, place], group, symmetric, torch.float16, bits)
        codes, order = torch.empty_like(in_groups), torch.empty(I, dtype=torch.int64)
        codes[:, place], order[place] = in_groups, torch.arange(I) // (I if group == -1 else group)
        parts = {
            f"{module}.qweight": packed_words(codes, bits=bits).T,
            f"{module}.qzeros": packed_words((zero if v2 else (zero - 1) & ((1 << bits) - 1)).T, bits=bits),
            f"{module}.scales": scale.T,
        }
        if g_idx:
            parts[f"{module}.g_idx"] = order.to(torch.int32)
        return parts, dequantized(codes, scale, zero, order)

    return quantize


def awq(group: int, *, symmetric: bool = False, with_zeros: bool = True) -> Quantizer:
    def quantize(module: str, matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes, scale, zero = integer_grid(matrix, group, symmetric, torch.float16)
        interleaved = (0, 2, 4, 6, 1, 3, 5, 7)
        parts = {f"{module}.qweight": packed_words(codes.T, interleaved), f"{module}.scales": scale.T}
        if with_zeros:
            parts[f"{module}.qzeros"] = packed_words(zero.T, interleaved)
        return parts, dequantized(codes, scale, zero, torch.arange(matrix.shape[1]) // group)

    return quantize


def pack_quantized(group: int, *, symmetric: bool = True, bits: int = 4, with_shape: bool = True) -> Quantizer:
    """compressed-tensors integers. Group -1: a scale per row."""

    def quantize(module: str, matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes, scale, zero = integer_grid(matrix, group, symmetric, torch.bfloat16, bits)
        parts = {
            f"{module}.weight_packed": packed_words(codes, bits=bits),
            f"{module}.weight_scale": scale,
        }
        if with_shape:
            parts[f"{module}.weight_shape"] = torch.tensor(matrix.shape)
        if not symmetric:
            parts[f"{module}.weight_zero_point"] = packed_words(zero.T, bits=bits).T
        return parts, dequantized(codes, scale, zero, torch.arange(matrix.shape[1]) // (matrix.shape[1] if group == -1 else group))

    return quantize


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def nvfp4(*, modelopt: bool) -> Quantizer:
    def quantize(module: str, matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        tensor_scale = matrix.abs().max() / (6 * 448)
        grouped = matrix.reshape(matrix.shape[0], -1, 16)
        scale = (grouped.abs().amax(-1) / 6 / tensor_scale).to(torch.float8_e4m3fn)
        if modelopt:
            parts, each = {f"{module}.weight_scale_2": tensor_scale}, scale.float() * tensor_scale
        else:
            divisor = (1 / tensor_scale).reshape(1)
            parts, each = {f"{module}.weight_global_scale": divisor}, scale.float() / divisor
        ratio = grouped / each[..., None]
        nearest = (ratio.abs()[..., None] - E2M1).abs().argmin(-1)
        codes = (nearest + 8 * (ratio < 0)).reshape(matrix.shape)
        parts[f"{module}.weight" if modelopt else f"{module}.weight_packed"] = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
        parts[f"{module}.weight_scale"] = scale
        parts[f"{module}.input_scale" if modelopt else f"{module}.input_global_scale"] = torch.ones(1)
        return parts, (E2M1[nearest] * ratio.sign() * each[..., None]).reshape(matrix.shape)

    return quantize


def flat_fp8(per: str) -> Quantizer:
    """AutoRound's FP8: the scales of a tensor, of rows or of groups of 32 inputs as one flat tensor."""

    def quantize(module: str, matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        O, I = matrix.shape  # noqa: E741
        rows, columns = {"tensor": (O, I), "channel": (1, I), "group": (1, 32)}[per]
        scale = (blocks_of(matrix, rows, columns) / 448).to(torch.bfloat16)
        each = spread(scale.float(), rows, columns, matrix.shape)
        codes = (matrix / each).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {f"{module}.weight": codes, f"{module}.weight_scale": scale.reshape(-1)}, codes.float() * each

    return quantize


def mxfp4(module: str, matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Powers of two per 32 inputs, stored as u8 with a bias of 127."""
    grouped = matrix.reshape(matrix.shape[0], -1, 32)
    exponent = torch.floor(torch.log2(grouped.abs().amax(-1).clamp(min=1e-30))) - 2
    ratio = grouped / torch.exp2(exponent)[..., None]
    nearest = (ratio.abs()[..., None] - E2M1).abs().argmin(-1)
    codes = (nearest + 8 * (ratio < 0)).reshape(matrix.shape)
    parts = {
        f"{module}.weight_packed": (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8),
        f"{module}.weight_scale": (exponent + 127).to(torch.uint8),
    }
    return parts, (E2M1[nearest] * ratio.sign() * torch.exp2(exponent)[..., None]).reshape(matrix.shape)


def by_module(*rules: tuple[str, Quantizer]) -> Quantizer:
    """The first quantizer whose pattern is found in the name of the module."""

    def quantize(module: str, matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return next(chosen for pattern, chosen in rules if re.search(pattern, module))(module, matrix)

    return quantize
