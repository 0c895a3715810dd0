"""The graphs of a bundle that also give out what passes between and inside their layers: the same nodes and weights, more outputs.

They are written to a temporary directory; the weights stay in place. For a target that compiles its graphs while the bundle is built
they are compiled once more, from the ONNX that the bundle carries.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir

from qwen_export.engine_options import BOUND, EngineOptions
from qwen_export.errors import VerifyError
from qwen_export.graphs.config import TextConfig
from qwen_export.graphs.layer_points import OUTPUT, point_name, point_widths
from qwen_export.manifest import GraphSpec, Manifest, TensorSpec, file_path, hash_file
from qwen_export.plugins.onnxruntime.chain_steps import expand_chains, join_chains
from qwen_export.runtimes.decoding.static_graphs import DECODER_GRAPHS, STEP
from qwen_export.stages import stage_groups

_INPUT = "input_ids"


@contextmanager
def layer_graphs(bundle: Path, manifest: Manifest, config: TextConfig) -> Iterator[tuple[Path, Manifest]]:
    """The directory of those graphs, and the bundle's manifest with them instead of its own; both end with the context. There is no
    draft head among them.

    Raises VerifyError for a bundle whose graphs do not name their layers, or that has no graphs to compile."""
    names = [name for name in DECODER_GRAPHS if name in manifest.graphs]
    if not names:
        raise VerifyError(
            "the layers of a bundle in stages cannot be compared one by one",
            where=str(bundle),
            got=f"{len(stage_groups(manifest.graphs)[STEP])} stages",
            fix="Verify it without {per_layer}, or build it again without {stages}.",
        )
    with TemporaryDirectory(prefix="qwen-export-layers-") as directory:
        there = Path(directory)
        changed = replace(manifest, graphs={name: _with_points(bundle, manifest, name, config, there) for name in names})
        yield there, changed if manifest.engine is None else _compiled(bundle, changed, there)


def _with_points(bundle: Path, manifest: Manifest, name: str, config: TextConfig, there: Path) -> GraphSpec:
    """Write graph `name` with its points as outputs."""
    model, spec = ir.load(_onnx(bundle, manifest, name)), manifest.graphs[name]
    widths = point_widths(config)
    chains = expand_chains(model.graph)  # their points have to leave them
    values = {value.name: value for node in model.graph for value in node.outputs if value.name in widths}
    # The last layer's output is left out of a graph without logits.
    if point_name(0, OUTPUT) not in values:
        raise VerifyError(
            "the graphs of this bundle do not name where their layers end: an older version has built it",
            where=spec.file,
            fix="Build it again, or verify it without {per_layer}.",
        )
    tokens = next(tensor.shape for tensor in spec.inputs if tensor.name == _INPUT)
    outputs = []
    for point, width in widths.items():
        value = values.get(point)
        if value is None or value.is_graph_output():
            continue
        kind = value.dtype or ir.DataType.from_short_name(_SHORT[manifest.precision_plan["activations"]])
        value.type, value.shape = ir.TensorType(kind), ir.Shape([*tokens, width])
        model.graph.outputs.append(value)
        outputs.append(TensorSpec(point, kind.name.lower(), (*tokens, width)))
    if chains:
        join_chains(model.graph)
    ir.save(model, there / f"{name}.onnx")
    return replace(spec, file=f"{name}.onnx", outputs=(*spec.outputs, *outputs))


_SHORT = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}


def _onnx(bundle: Path, manifest: Manifest, name: str) -> Path:
    engine = manifest.engine
    if engine is None:
        return file_path(bundle, manifest.graphs[name].file)
    if name not in engine.onnx:
        raise VerifyError(
            "the layers of an engine show only if it is compiled again, and the bundle does not carry its graphs",
            where=str(bundle),
            fix="Build it with {carry_onnx}.",
        )
    from qwen_export.building.engines import onnx_file

    return file_path(bundle, onnx_file(name))


def _compiled(bundle: Path, manifest: Manifest, there: Path) -> Manifest:
    """The manifest with engines of the graphs in `there`, for this machine, with the options that the bundle was built with."""
    from qwen_export.building.engines import compile_graph, engine_file, for_this_machine, mapped, ready_library, weight_places

    assert manifest.engine is not None
    options = for_this_machine(EngineOptions(**manifest.engine.options, plugins=manifest.engine.plugins))
    library = ready_library(manifest.target.backend, options)
    graphs, files = {}, dict(manifest.files)
    for name, graph in manifest.graphs.items():
        graphs[name] = replace(graph, file=engine_file(name))
        with mapped(weight_places(bundle, manifest, graph)) as weights:
            held = weights if options.weights != BOUND else {}
            compile_graph(library, name, (there / graph.file).read_bytes(), there / engine_file(name), options, held)
        files[engine_file(name)] = hash_file(there / engine_file(name))
    return replace(manifest, graphs=graphs, files=files)
