"""The vision tower of a bundle against the eager one, block by block, each from the same input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwen_export.bundle_contract import FEATURES, VISION, VISION_INPUTS, is_tower
from qwen_export.graphs.checkpoint.checkpoint_directory import Checkpoint
from qwen_export.graphs.layer_points import MIXER, OUTPUT, PRODUCT
from qwen_export.graphs.quantization.precision_plan import PrecisionPlan
from qwen_export.manifest import Manifest, TensorSpec, file_path
from qwen_export.runtimes.backends.open_graphs import OpenOptions, open_backend
from qwen_export.runtimes.backends.session import Session
from qwen_export.runtimes.memory.buffers import decode
from qwen_export.runtimes.vision.patch_positions import patch_positions
from qwen_export.runtimes.vision.tower_calls import filled_inputs, run_once
from qwen_export.verification.tower_check import small_pictures

if TYPE_CHECKING:
    import torch

    from qwen_export.graphs.models.vision_model import VisionModel

MERGER = "merger"
_SHORT = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TowerPart:
    """Of a block, or of the merger: `got` [T,W] is the bundle's, `own` the eager one's from the same input and `alone` that of the eager
    tower on the same picture. `reaches`: the largest |value| of the eager tower at each point."""

    name: str
    got: Floats
    own: Floats
    alone: Floats
    reaches: dict[str, float]


def tower_parts(
    bundle: Path, manifest: Manifest, source: Checkpoint, quantization: PrecisionPlan | None, device_id: int
) -> list[TowerPart]:
    """None for a bundle that reads text only."""
    import torch

    from qwen_export.graphs.models.load_model import load_tower

    if manifest.vision is None:
        return []
    tower = load_tower(source, quantization)
    picture = small_pictures(manifest.vision)[0]
    tokens = picture.grid.tokens(manifest.vision.merge_size)
    name, size = _graph_for(manifest, tokens)
    inputs = dict(patch_positions(picture.grid.rows, picture.grid.columns, manifest.vision))
    inputs[VISION_INPUTS[0]] = picture.rows(manifest.vision).reshape(1, tokens, manifest.vision.merge_size**2, -1)
    with _with_outputs(bundle, manifest, name) as (there, changed):
        session = open_backend(bundle, changed, OpenOptions(graphs=there, device_id=device_id))(name)
        got = _run(session, filled_inputs(inputs, size) if size else inputs)
        session.close()
    got = {key: values[: len(values) * tokens // size] for key, values in got.items()} if size else got
    with torch.no_grad():
        return list(_compared(tower, [torch.from_numpy(inputs[name]) for name in VISION_INPUTS], got))


def _graph_for(manifest: Manifest, tokens: int) -> tuple[str, int]:
    """The graph that reads a picture of so many tokens, and how many it is filled up to; 0 where it has any number."""
    if VISION in manifest.graphs:
        return VISION, 0
    sizes = {name: int(graph.outputs[0].shape[1]) for name, graph in manifest.graphs.items() if is_tower(name)}
    return min(((name, size) for name, size in sizes.items() if size >= tokens), key=lambda graph: graph[1])


@contextmanager
def _with_outputs(bundle: Path, manifest: Manifest, name: str) -> Iterator[tuple[Path, Manifest]]:
    """The tower's graph with the stream behind each block as an output."""
    spec = manifest.graphs[name]
    model = ir.load(file_path(bundle, spec.file))
    kind = ir.DataType.from_short_name(_SHORT[manifest.precision_plan["activations"]])
    outputs = []
    for value in [value for node in model.graph for value in node.outputs if (value.name or "").endswith(f".{OUTPUT}")]:
        sizes = tuple(d if isinstance(d, int) else "W" for d in value.shape) if value.shape is not None else ("W",)
        dims: tuple[int | str, ...] = sizes if name != VISION else ("B", "L", sizes[-1])
        value.type, value.shape = ir.TensorType(value.dtype or kind), ir.Shape(dims)
        model.graph.outputs.append(value)
        outputs.append(TensorSpec(str(value.name), (value.dtype or kind).name.lower(), dims))
    with TemporaryDirectory(prefix="qwen-export-tower-") as directory:
        there = Path(directory)
        ir.save(model, there / "vision.onnx")
        graph = replace(spec, file="vision.onnx", outputs=(*spec.outputs, *outputs))
        yield there, replace(manifest, graphs={name: graph})


def _run(session: Session, inputs: dict[str, npt.NDArray[np.generic]]) -> dict[str, Floats]:
    _, tokens, merged, _ = inputs[VISION_INPUTS[0]].shape
    rows = {tensor.name: tokens if tensor.name == FEATURES else tokens * merged for tensor in session.spec.outputs}
    made = run_once(session, inputs, {tensor.name: (1, rows[tensor.name], int(tensor.shape[-1])) for tensor in session.spec.outputs})
    return {name: decode(buffer.read(), buffer.dtype, buffer.shape)[0] for name, buffer in made.items()}


def _compared(tower: VisionModel, given: list[torch.Tensor], got: dict[str, Floats]) -> Iterator[TowerPart]:
    """`got`: f32[L,d] behind each block, and the features."""
    import torch

    rows, index, weight, cos, sin = given
    alone = theirs = tower.begin(rows, index, weight)
    for i, block in enumerate(tower.visual.blocks):
        reaches: dict[str, float] = {}
        watched = {MIXER: block.get_submodule("attn.proj"), PRODUCT: block.get_submodule("mlp.linear_fc2")}
        handles = [module.register_forward_pre_hook(_noted(reaches, point)) for point, module in watched.items()]
        alone = block(alone, cos, sin)
        for handle in handles:
            handle.remove()
        reaches[OUTPUT] = float(alone.abs().max())
        mine = got[f"visual.blocks.{i}.{OUTPUT}"]
        yield TowerPart(f"vision {i}", mine, block(theirs, cos, sin)[0].numpy(), alone[0].numpy(), reaches)
        theirs = torch.from_numpy(mine)[None]
    last = tower.end(alone)[0].numpy()
    yield TowerPart(f"vision {MERGER}", got[FEATURES], tower.end(theirs)[0].numpy(), last, {OUTPUT: float(np.abs(last).max())})


def _noted(reaches: dict[str, float], point: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
    def hook(_module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        reaches[point] = float(arguments[0].abs().max())

    return hook
