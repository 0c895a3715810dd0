"""Checkpoints of random weights in the released layout, for tests and benchmarks.

The values are chosen so that a mistake shows in the logits:

* every matrix has standard deviation 0.64 / sqrt(fan in), the 0.02 of a fresh model of hidden size 1024, so logits have a deviation of
  about 0.6 at every width;
* the causal convolution has deviation 1.5, which drives its SiLU out of the linear range: keys and queries of a head then correlate
  (cosine about 0.25), as trained ones do. With uncorrelated ones the gated norm amplifies the rounding of outputs that nearly cancel: the
  chunked and the recurrent form of transformers, both fp32, then differ by 6e-5 in the logits of the 0.8B after 24 tokens, else by 1e-5;
* norm weights are off their initial value by noise of deviation 0.1 (a missing 1+w would otherwise hide behind w = 0);
* the decay is drawn as Mamba2 initializes it, A in [1, 16] and time step in [0.001, 0.1], so the heads remember from one to a thousand
  tokens (with dt_bias = 1, as transformers initializes, the state is forgotten at once and a wrong state shows nowhere).

Tensors of up to 2^20 elements are drawn one by one. Larger ones are read from a ring of 4 194 301 normals, each from a start of its own:
the length is prime, so no two rows of a tensor are equal, and writing a 0.8B checkpoint takes seconds. Values depend on the seed and the
tensor's name only, not on the number of shards.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any
from zlib import crc32

import ml_dtypes
import numpy as np

from qwen_export.errors import CheckpointError
from qwen_export.graphs.checkpoint.tensor_table import Layout, TensorEntry, tensor_table

RING_LENGTH = 4_194_301  # prime, near 2^22
DRAWN_ELEMENTS = 1 << 20
MATRIX_GAIN = 0.64
CONV_STD = 1.5
NORM_NOISE = 0.1

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
_NUMPY = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "merges.txt", "special_tokens_map.json")


def synthesize(
    config: dict[str, Any],
    out: Path,
    *,
    seed: int = 0,
    dtype: str = "bf16",
    shards: int = 1,
    with_mtp: bool = True,
    with_vision: bool = True,
    fp32_decay: bool = True,
    fused_experts: bool = True,
    fused_mtp_experts: bool = False,
    grouped_inputs: bool = False,
    tokenizer: Path | None = None,
    perturb: bool = True,
    generation_config: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a checkpoint directory for `config` (a `config.json` dict, conditional or flat) and return it.

    `dtype` is bf16, fp16 or fp32; for `fp32_decay`, `fused_experts`, `fused_mtp_experts` and `grouped_inputs` see `Layout`. `tokenizer` is
    a tokenizer.json or a directory that has one, whose chat template and settings are then copied too. `perturb=False` leaves norms,
    biases and dt_bias as a fresh model has them. `progress` is called with bytes written and bytes in all. Memory stays below about 200 MB
    for any size of model. Files already in `out` are overwritten, others left.
    """
    if dtype not in DTYPES:
        raise CheckpointError("Unknown dtype for a synthetic checkpoint", got=dtype, expected=" | ".join(DTYPES))
    layout = Layout(DTYPES[dtype], with_mtp, with_vision, fp32_decay, fused_experts, fused_mtp_experts, grouped_inputs)
    table = list(tensor_table(config, layout))
    total = sum(map(_byte_size, table))
    out.mkdir(parents=True, exist_ok=True)

    weights, done = _Weights(seed, perturb=perturb), 0
    groups = _split(table, shards)
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        name = f"model.safetensors-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map |= {entry.name: name for entry in group}
        with (out / name).open("wb") as file:
            for written in _write_shard(file, group, weights):
                done += written
                if progress:
                    progress(done, total)

    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(out / "model.safetensors.index.json", index)
    _write_json(out / "config.json", config)
    if generation_config:
        _write_json(out / "generation_config.json", _generation_config(config))
    if tokenizer is not None:
        _copy_tokenizer(tokenizer, out)
    return out


class _Weights:
    """The values of each tensor, as bytes in pieces."""

    def __init__(self, seed: int, *, perturb: bool) -> None:
        self._seed, self._perturb = seed, perturb
        self._ring = self._generator("ring").standard_normal(RING_LENGTH, dtype=np.float32)
        self._scaled: dict[tuple[float, np.dtype[Any]], memoryview] = {}

    def pieces(self, entry: TensorEntry) -> Iterator[memoryview]:
        dtype = _NUMPY[entry.dtype]
        elements = math.prod(entry.shape)
        if elements > DRAWN_ELEMENTS:
            yield from self._from_ring(entry, elements, dtype)
        else:
            yield _as_bytes(self._small(entry).astype(dtype))

    def _generator(self, name: str) -> np.random.Generator:
        return np.random.Generator(np.random.SFC64([self._seed, crc32(name.encode())]))

    def _from_ring(self, entry: TensorEntry, elements: int, dtype: np.dtype[Any]) -> Iterator[memoryview]:
        std = _matrix_std(entry)
        if (std, dtype) not in self._scaled:
            if len(self._scaled) == 8:
                self._scaled.clear()
            self._scaled[std, dtype] = _as_bytes((self._ring * np.float32(std)).astype(dtype))
        ring = self._scaled[std, dtype]
        start = int(self._generator(entry.name).integers(RING_LENGTH)) * dtype.itemsize
        left = elements * dtype.itemsize
        while left:
            piece = ring[start : start + left]
            yield piece
            left, start = left - len(piece), 0

    def _small(self, entry: TensorEntry) -> np.ndarray[Any, np.dtype[np.float32]]:
        generator, name, shape = self._generator(entry.name), entry.name, entry.shape

        def noise(std: float) -> np.ndarray[Any, np.dtype[np.float32]]:
            return generator.standard_normal(shape, dtype=np.float32) * np.float32(std if self._perturb else 0)

        if name.endswith(".A_log"):
            return np.log(generator.uniform(1, 16, shape)).astype(np.float32)
        if name.endswith(".dt_bias"):
            if not self._perturb:
                return np.ones(shape, np.float32)
            step = np.exp(generator.uniform(math.log(1e-3), math.log(0.1), shape))
            return (step + np.log(-np.expm1(-step))).astype(np.float32)  # inverse of softplus
        if name.endswith(".bias"):
            return noise(0.02)
        if len(shape) == 1:
            return np.float32(_initial_norm(name)) + noise(NORM_NOISE)
        return generator.standard_normal(shape, dtype=np.float32) * np.float32(_matrix_std(entry))


def _initial_norm(name: str) -> float:
    """1 where the weight multiplies (GDN output norm, LayerNorm of the vision tower), 0 where 1 + weight does."""
    return 1.0 if name.endswith(".linear_attn.norm.weight") or name.startswith("model.visual.") else 0.0


def _matrix_std(entry: TensorEntry) -> float:
    """The last dimension is the fan in, also of experts [E, out, in]; a patch embedding sums over all dimensions but the first."""
    if entry.name.endswith(".conv1d.weight"):
        return CONV_STD
    fan_in = math.prod(entry.shape[1:]) if len(entry.shape) > 3 else entry.shape[-1]
    return MATRIX_GAIN / math.sqrt(fan_in)


def _byte_size(entry: TensorEntry) -> int:
    return math.prod(entry.shape) * _NUMPY[entry.dtype].itemsize


def _split(table: list[TensorEntry], shards: int) -> list[list[TensorEntry]]:
    """Consecutive groups of about equal bytes; fewer than asked for where single tensors are larger than a share."""
    share, filled = sum(map(_byte_size, table)) / shards, 0
    groups: list[list[TensorEntry]] = [[]]
    for entry in table:
        if filled >= share * len(groups):
            groups.append([])
        groups[-1].append(entry)
        filled += _byte_size(entry)
    return groups


def _write_shard(file: IO[bytes], entries: list[TensorEntry], weights: _Weights) -> Iterator[int]:
    """Write one safetensors file (8 bytes of header length, the header as JSON, the data without gaps), yielding each tensor's bytes."""
    # Wider types first keeps every tensor aligned.
    entries = sorted(entries, key=lambda entry: (-_NUMPY[entry.dtype].itemsize, entry.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + _byte_size(entry)
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for entry in entries:
        for piece in weights.pieces(entry):
            file.write(piece)
        yield _byte_size(entry)


def _as_bytes(array: np.ndarray[Any, Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _generation_config(config: dict[str, Any]) -> dict[str, Any]:
    """The stop ids are `<|im_end|>` and `<|endoftext|>`; config.json names one of them: the second, the first in Qwen3-Next."""
    text = config.get("text_config", config)
    endoftext = text["eos_token_id"] - (2 if text["model_type"] == "qwen3_next" else 0)
    return {
        "bos_token_id": endoftext,
        "do_sample": True,
        "eos_token_id": [endoftext + 2, endoftext],
        "pad_token_id": endoftext,
        "temperature": 1.0,
        "top_k": 20,
        "top_p": 0.95,
    }


def _copy_tokenizer(source: Path, out: Path) -> None:
    if source.is_file():
        shutil.copyfile(source, out / "tokenizer.json")
        return
    if not (source / "tokenizer.json").is_file():
        raise CheckpointError("No tokenizer.json to copy", where=str(source), fix="Give a tokenizer.json or a directory that has one")
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
