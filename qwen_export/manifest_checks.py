"""Whether the fields of a manifest fit together: each against every other that says something of the same thing.

What the types leave open is decided here, before a field reaches an allocation or a native library: sizes and offsets within files,
shapes as the model and the other graphs have them, names that a runtime knows. All functions raise ValueError.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from qwen_export.element_types import BY_MANIFEST, stored_bytes
from qwen_export.engine_options import ENGINE_WEIGHTS, HARDWARE_COMPATIBILITY, TILING, EngineOptions
from qwen_export.manifest_graph_checks import check_graphs
from qwen_export.manifest_types import ADAPTERS, MODEL_SIZES, Manifest, WeightSpec

_SHA256 = re.compile(r"[0-9a-f]{64}")
_LARGEST_CONTEXT = 2**31 - 1  # positions are int32
_LONGEST_DRAFT = 1024
_NEAR = 1e-4  # frequencies are rounded to fp32
_PAGE = 4096  # weights of a bundle's own files begin at whole pages
_OWN_FILES = ("manifest.json", "manifest.sha256", "manifest.sig")
_COUNTS = ("hidden_size", "num_key_value_heads", "head_dim", "num_experts")


def check(manifest: Manifest) -> None:
    """Raise ValueError where two fields do not fit."""
    _check_model(manifest)
    _check_files(manifest)
    _check_sizes(manifest)
    check_graphs(manifest)
    _check_weights(manifest)
    _check_engine(manifest)
    _check_facts(manifest)


def _check_model(manifest: Manifest) -> None:
    model = manifest.model
    for name in MODEL_SIZES:
        if type(model.get(name)) is not int or not 1 <= model[name] <= _LARGEST_CONTEXT:
            raise ValueError(f"model.{name} is not a positive number")
    for name in _COUNTS:
        if name in model and (type(model[name]) is not int or not 0 <= model[name] <= _LARGEST_CONTEXT):
            raise ValueError(f"model.{name} is not a number")
    kinds = model.get("layer_types", [])
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise ValueError("model.layer_types is not a list of names")
    for name in ("model_type",):
        if not isinstance(model.get(name, ""), str):
            raise ValueError(f"model.{name} is not a text")


def _check_files(manifest: Manifest) -> None:
    for name, entry in manifest.files.items():
        if not _SHA256.fullmatch(entry.sha256):
            raise ValueError(f"files.{name}.sha256 is not a SHA-256")
        if name in _OWN_FILES:
            raise ValueError(f"files lists {name}")
    for name in manifest.references:
        if name not in manifest.files:
            raise ValueError(f"the note of a reference is not listed: {name}")
    for name in manifest.plugins:
        if name not in manifest.files:
            raise ValueError(f"the plugin is not listed: {name}")
    if manifest.plugins and not manifest.target.platform:
        raise ValueError("target.platform is empty, and there are plugins")


def _check_sizes(manifest: Manifest) -> None:
    model, speculation, rotary = manifest.model, manifest.speculation, manifest.rotary
    if not 1 <= manifest.max_context <= model["max_position_embeddings"]:
        raise ValueError(f"max_context is outside 1 to {model['max_position_embeddings']}, the model's max_position_embeddings")
    if not rotary.inv_freq or not all(0 < frequency <= 1 for frequency in rotary.inv_freq):
        raise ValueError("rotary.inv_freq has no frequencies, or one outside 0 to 1")
    if not 0 < rotary.scaling <= 1000:
        raise ValueError("rotary.scaling is outside 0 to 1000")
    _check_default_rope(manifest)
    if speculation is not None:
        if not 1 <= speculation.max_draft <= _LONGEST_DRAFT:
            raise ValueError(f"speculation.max_draft is outside 1 to {_LONGEST_DRAFT}")
        if speculation.draft_vocab > model["vocab_size"]:
            raise ValueError("speculation.draft_vocab is larger than model.vocab_size")
    if (speculation is not None and speculation.draft_vocab > 0) != ("mtp" in manifest.graphs):
        raise ValueError("speculation.draft_vocab and the graph mtp do not fit: each needs the other")


def _check_default_rope(manifest: Manifest) -> None:
    """Without scaling the frequencies follow from theta: theta^(-2i/D) for the D dims that rotate."""
    rope = manifest.model.get("rope")
    if not isinstance(rope, dict) or rope.get("kind") != "default":
        return
    theta, frequencies = rope.get("theta"), manifest.rotary.inv_freq
    if not isinstance(theta, float | int) or theta <= 1:
        raise ValueError("model.rope.theta is not a number above 1")
    expected = [theta ** (-i / len(frequencies)) for i in range(len(frequencies))]
    if manifest.rotary.scaling != 1 or any(abs(a - b) > _NEAR * b for a, b in zip(frequencies, expected, strict=True)):
        raise ValueError("rotary does not fit model.rope")


def _check_weights(manifest: Manifest) -> None:
    """Every weight within its file; two of one file apart, or with one beginning or end; the same name for one thing in all graphs."""
    places: dict[str, dict[int, int]] = {}
    for name, graph in manifest.graphs.items():
        seen = set()
        for weight in graph.weights:
            where = f"graph {name}, weight {weight.name}"
            if weight.name in seen:
                raise ValueError(f"{where}: listed twice")
            seen.add(weight.name)
            end = weight.offset + _bytes(manifest, weight, where)
            file = places.setdefault(weight.file, {})
            file[weight.offset] = max(end, file.get(weight.offset, 0))
        if not set(graph.bound) <= seen or set(graph.bound) & {tensor.name for tensor in graph.inputs}:
            raise ValueError(f"graph {name} binds what is no weight of it")
    for name, file in places.items():
        last = 0
        for begin in sorted(file):
            if begin < last and file[begin] != last:
                raise ValueError(f"two weights overlap in {name} at byte {begin}")
            last = file[begin]


def _bytes(manifest: Manifest, weight: WeightSpec, where: str) -> int:
    if weight.file not in manifest.files:
        raise ValueError(f"{where}: its file is not listed: {weight.file}")
    if weight.dtype not in BY_MANIFEST:
        raise ValueError(f"{where}: the element type {weight.dtype} is not known")
    if not all(weight.shape):
        raise ValueError(f"{where}: a dim is 0")
    if len(weight.shape) > 8:
        raise ValueError(f"{where}: it has {len(weight.shape)} dims")
    referred = weight.file in manifest.references
    size = manifest.references[weight.file].size if referred else manifest.files[weight.file].size
    nbytes = stored_bytes(weight.dtype, weight.shape)
    if weight.offset + nbytes > size:
        raise ValueError(f"{where}: it ends behind {weight.file}")
    if weight.offset % (max(1, BY_MANIFEST[weight.dtype].bits // 8) if referred else _PAGE):
        raise ValueError(f"{where}: its offset is not aligned")
    return nbytes


def _check_engine(manifest: Manifest) -> None:
    engine = manifest.engine
    if (engine is not None) != manifest.target.backend.startswith("tensorrt"):
        raise ValueError("engine and target.backend do not fit")
    if engine is None:
        return
    for name in engine.onnx:
        if name not in manifest.graphs or f"{name}.onnx" not in manifest.files:
            raise ValueError(f"the ONNX of graph {name} is not listed")
    if engine.weights not in ENGINE_WEIGHTS or engine.hardware_compatibility not in HARDWARE_COMPATIBILITY:
        raise ValueError("engine.weights or engine.hardware_compatibility is not known")
    if not all(sm.isascii() and sm.isdigit() and len(sm) <= 4 for sm in engine.sms):
        raise ValueError("engine.sms has something that is no compute capability")
    usual, known = EngineOptions(), {field.name for field in fields(EngineOptions)}
    for name, value in engine.options.items():
        if name not in known:
            raise ValueError(f"engine.options.{name} is not known")
        if not _fits(value, getattr(usual, name)):
            raise ValueError(f"engine.options.{name} has a wrong type")
    if engine.options.get("tiling", "none") not in TILING:
        raise ValueError("engine.options.tiling is not known")


def _fits(value: Any, usual: Any) -> bool:
    """Whether an option has the type of its default. Options without a default are numbers."""
    if usual is None:
        return value is None or (type(value) is int and value >= 0)
    return type(value) is type(usual)


def _check_facts(manifest: Manifest) -> None:
    """What is only shown: texts are texts."""
    verification, source = manifest.verification, manifest.source
    for name, where in _texts(verification, "verification", ("when", "precision")) | _texts(
        source, "source", ("architecture", "rope_scaling")
    ):
        raise ValueError(f"{where}.{name} is not a text")
    if not isinstance(source.get(ADAPTERS, []), list):
        raise ValueError("source.adapters is not a list")
    if not isinstance(verification.get("passed", True), bool):
        raise ValueError("verification.passed is not true or false")


def _texts(facts: Mapping[str, Any], where: str, names: tuple[str, ...]) -> set[tuple[str, str]]:
    return {(name, where) for name in names if not isinstance(facts.get(name, ""), str)}
