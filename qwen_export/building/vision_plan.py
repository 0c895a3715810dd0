"""Whether a bundle will read pictures, and with what. Imports neither torch nor onnx."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qwen_export.graphs.call_sizes import TOWER, GraphPlan
from qwen_export.graphs.checkpoint.checkpoint_directory import Checkpoint
from qwen_export.graphs.checkpoint.tensor_names import no_tower, vision_tensors
from qwen_export.graphs.passes.lowering_choice import Choice
from qwen_export.graphs.vision_config import VisionConfig, parse_vision, vision_spec
from qwen_export.manifest import VisionSpec
from qwen_export.plugins.onnxruntime.onnxruntime_choices import choose_vision
from qwen_export.runtimes.backends.onnxruntime.onnxruntime_kernels import Kernels
from qwen_export.targets import Target

ON_REQUEST = ("cuda",)
"""Devices whose builds have no tower unless it is asked for: no GPU has run these graphs yet."""


@dataclass(frozen=True)
class VisionPlan:
    """`spec`: how the bundle sees, None where it reads text only; `reason` is why, for a checkpoint that has a tower."""

    config: VisionConfig | None = None
    spec: VisionSpec | None = None
    choices: dict[str, Choice] = field(default_factory=dict)
    reason: str = ""

    @property
    def graphs(self) -> dict[str, GraphPlan]:
        return {TOWER: GraphPlan(TOWER)} if self.spec is not None else {}

    def tensors(self) -> Sequence[tuple[str, tuple[int, ...]]]:
        """Name, in the names of the modules, and shape of every tensor that is read for it."""
        return list(vision_tensors(self.config)) if self.config is not None else []


def plan_vision(
    checkpoint: Checkpoint, target: Target, kernels: Kernels | None, precision: str, wanted: bool | None
) -> tuple[VisionPlan, list[str]]:
    """The plan, and a message for each reason against it where pictures are `wanted`; None: where the target can. `kernels` are those of
    the device, None where the target has no vision. Raises ConfigError for a tower that is of another form than the family's."""
    if wanted is False:
        return VisionPlan(reason="built without it on request (vision)"), []
    missing = no_tower(checkpoint)
    if missing:
        return VisionPlan(), [f"pictures: {missing}"] if wanted else []
    if kernels is None or not target.vision_passes:
        return _left_out(f"target {target.name} has no lowering of the vision tower yet", wanted)
    if kernels.device in ON_REQUEST and not wanted:
        return _left_out(f"on {kernels.device} they are new, and built on request (vision) only", wanted)
    choices, refused = choose_vision(kernels, precision)
    if refused:
        return _left_out("; ".join(refused), wanted)
    if not checkpoint.config.text.rope.mrope_section:
        return _left_out("config.json has no mrope_section, by which pictures have positions", wanted)
    config = parse_vision(checkpoint.config.vision or {}, checkpoint.config.text.hidden_size, str(checkpoint.path / "config.json"))
    spec, vocabulary = vision_spec(config, checkpoint.config.raw, checkpoint.path), checkpoint.config.text.vocab_size
    outside = [token for token in (spec.image_token, spec.video_token, spec.start_token, spec.end_token) if token >= vocabulary]
    if outside:
        return _left_out(f"config.json has tokens of pictures that are not among the {vocabulary} of the vocabulary: {outside}", wanted)
    return VisionPlan(config, spec, choices), []


def _left_out(reason: str, wanted: bool | None) -> tuple[VisionPlan, list[str]]:
    return VisionPlan(reason=reason), [f"pictures: {reason}"] if wanted else []
