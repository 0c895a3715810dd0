"""One trace for all builds of one architecture in a run of the tests.

What `qwen_export.graphs.capture` returns depends on its arguments only, and no weight is read. Traces take most of the time of a build of
a tiny checkpoint, and most builds of the tests differ in what comes after: weights, passes, targets. The first build that needs a trace
makes it and leaves it in a folder, which all workers read, and later runs while nothing changes that a trace depends on. Tests of the
tracing itself call `graphs.capture`, which is left alone.

Checkpoints of tests also differ in what no trace depends on (angles, the longest context, how many layers there are), and in the size of
the vocabulary, which is nothing but a size of two matrices and of the logits. Traces are made for one vocabulary, of a size that nothing
else in a graph has, and get the real one when they are read. tests/test_shared_traces.py compares them with traces of their own.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qwen_export.building import lower_graphs
from qwen_export.cache_formats import CacheFormat
from qwen_export.graphs.capture import capture_kinds, with_all_layers
from qwen_export.graphs.config import TextConfig
from qwen_export.graphs.rope_config import RopeConfig
from qwen_export.graphs.weights.expression import FirstRows, StoredWeight, Weight, WeightTensor
from tests.support.source_tree import ROOT, sources

_STAND_IN = np.zeros(1, np.float32)
_TRACERS = ("torch", "onnx", "onnx-ir", "onnxscript")
# Primes: no product of other sizes is one.
_VOCABULARY, _DRAFTS = 499_979, 499_969
_A_DAY = 24 * 3600


def share_captures(patch: Callable[[Any, str, Any], None], folder: Path) -> None:
    """Builds of this process take their traces from `folder`, and leave there those that are missing. `patch` is a `setattr`."""
    current = folder / _digest()
    current.mkdir(exist_ok=True)
    os.utime(current)
    for other in folder.iterdir():  # of other sources; a run beside this one may read them
        if other.stat().st_mtime < current.stat().st_mtime - _A_DAY:
            shutil.rmtree(other, ignore_errors=True)
    captures = SharedCaptures(current)
    for name in ("capture_decoder", "capture_mtp", "capture_vision"):
        patch(lower_graphs, name, getattr(captures, name))
    _keep_translations(patch)


def _keep_translations(patch: Callable[[Any, str, Any], None]) -> None:
    """torch.onnx makes the table of its thousand translations anew for each trace, which takes a quarter of it. Here it is made once.
    This is no public function of torch: where it is not found, traces take as long as they do elsewhere."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        made = functools.cache(ONNXRegistry.from_torchlib)
    except (ImportError, AttributeError):
        return

    def table(**options: object) -> ONNXRegistry:
        registry = copy.copy(made(**options))
        registry.functions = {target: [*functions] for target, functions in registry.functions.items()}
        return registry

    patch(ONNXRegistry, "from_torchlib", staticmethod(table))


def _digest() -> str:
    """What traces depend on: the packages that make them and the sources of `graphs`, which imports itself and the ground modules only."""
    paths = [*sources("graphs"), *sorted((ROOT / "qwen_export").glob("*.py")), Path(__file__)]
    texts = [*(version(name) for name in _TRACERS), *(path.read_text(encoding="utf-8") for path in paths)]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


class SharedCaptures:
    """The functions of `graphs.capture` that builds call, over the traces in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loaded: dict[str, ir.Model] = {}
        self._capture_vision, self._capture_mtp = lower_graphs.capture_vision, lower_graphs.capture_mtp

    def capture_decoder(self, config: TextConfig, precision: str, *, features: bool = False, caches: CacheFormat | None = None) -> ir.Model:
        kinds = replace(_traced(config), layer_types=tuple(dict.fromkeys(config.layer_types)))
        model = self._shared(capture_kinds, kinds, precision, features=features, caches=caches)
        _resize(model, {_VOCABULARY: config.vocab_size})
        return with_all_layers(model, config)

    def capture_mtp(
        self, config: TextConfig, precision: str, draft_vocab: int, *, features: bool = False, caches: CacheFormat | None = None
    ) -> ir.Model:
        no_linear = {"linear_num_key_heads": 1, "linear_num_value_heads": 1, "linear_key_head_dim": 1, "linear_value_head_dim": 1}
        head = replace(_traced(config), layer_types=(), **no_linear)
        model = self._shared(self._capture_mtp, head, precision, _DRAFTS, features=features, caches=caches)
        _resize(model, {_VOCABULARY: config.vocab_size, _DRAFTS: draft_vocab})
        return model

    def capture_vision(self, *arguments: object) -> ir.Model:
        return self._shared(self._capture_vision, *arguments)

    def _shared(self, capture: Callable[..., ir.Model], *arguments: object, **options: object) -> ir.Model:
        # The arguments are frozen dataclasses, texts and numbers: their repr has every field.
        key = f"{capture.__name__}{arguments}{sorted(options.items())}"
        path = self._folder / hashlib.sha256(key.encode()).hexdigest()
        if key not in self._loaded:
            if not path.exists():
                _write(capture(*arguments, **options), path)
            self._loaded[key] = _from_bytes(path.read_bytes())
        return self._loaded[key].clone()


def _traced(config: TextConfig) -> TextConfig:
    """The configuration with one value for everything that no trace depends on."""
    rope = RopeConfig(theta=1e4, partial_rotary_factor=config.rope.partial_rotary_factor)
    return replace(
        config, vocab_size=_VOCABULARY, rope=rope, max_position_embeddings=1, eos_token_ids=(), mtp_num_hidden_layers=0, model_type=""
    )


def _resize(model: ir.Model, sizes: Mapping[int, int]) -> None:
    """Sizes of values and weights, in place."""
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([sizes.get(size, size) if isinstance(size, int) else size for size in value.shape])
    for name, value in graph.initializers.items():
        if isinstance(value.const_value, WeightTensor):
            value.const_value = WeightTensor(_resized(value.const_value.weight, sizes), name)


def _resized(weight: Weight, sizes: Mapping[int, int]) -> Weight:
    if isinstance(weight, FirstRows):
        return FirstRows(_resized(weight.of, sizes), sizes.get(weight.count, weight.count))
    assert isinstance(weight, StoredWeight), weight
    return replace(weight, shape=tuple(sizes.get(size, size) for size in weight.shape))


def through_a_file(model: ir.Model) -> ir.Model:
    """The model as it comes back from the folder: with other objects for the same values. Takes the weights of `model`."""
    return _from_bytes(_to_bytes(model))


def _write(model: ir.Model, path: Path) -> None:
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_bytes(_to_bytes(model))
    unfinished.replace(path)


def _to_bytes(model: ir.Model) -> bytes:
    """The graph as a model of ONNX, and its lazy weights by name."""
    weights = {}
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, WeightTensor):
            weights[name] = value.const_value.weight
            value.const_value = ir.tensor(_STAND_IN, name=name)
    return pickle.dumps((ir.to_proto(model).SerializeToString(), weights))


def _from_bytes(content: bytes) -> ir.Model:
    import onnx

    proto, weights = pickle.loads(content)
    model = ir.from_proto(onnx.ModelProto.FromString(proto))
    for name, weight in weights.items():
        value, tensor = model.graph.initializers[name], WeightTensor(weight, name)
        value.const_value, value.shape, value.type = tensor, tensor.shape, ir.TensorType(weight.dtype)
    return model
