"""Whether a bundle will read pictures, and with what. Imports neither torch nor onnx."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qwen_export.bundle_contract import tower_name
from qwen_export.graphs.call_sizes import TOWER, CallSizes, GraphPlan
from qwen_export.graphs.checkpoint.checkpoint_directory import Checkpoint
from qwen_export.graphs.checkpoint.tensor_names import no_tower, vision_tensors
from qwen_export.graphs.passes.lowering_choice import Choice
from qwen_export.graphs.vision_config import VisionConfig, parse_vision, vision_spec
from qwen_export.manifest import VisionSpec
from qwen_export.plugins.onnxruntime.onnxruntime_choices import choose_vision
from qwen_export.plugins.standard.standard_choices import choose_standard_vision
from qwen_export.runtimes.backends.onnxruntime.onnxruntime_kernels import Kernels
from qwen_export.targets import Target

_MOST_TOKENS = 16384
"""Of the largest picture that the family's processor makes."""


@dataclass(frozen=True)
class VisionPlan:
    """`spec`: how the bundle sees, None where it reads text only; `reason` is why, for a checkpoint that has a tower. `sizes`: tokens of
    the pictures that the graphs of a target with fixed shapes are for."""

    config: VisionConfig | None = None
    spec: VisionSpec | None = None
    choices: dict[str, Choice] = field(default_factory=dict)
    reason: str = ""
    sizes: tuple[int, ...] = ()

    @property
    def graphs(self) -> dict[str, GraphPlan]:
        if self.spec is None:
            return {}
        fixed = {tower_name(K): GraphPlan(TOWER, CallSizes(K, 0, 0, 0, padded=True)) for K in self.sizes}
        return fixed or {TOWER: GraphPlan(TOWER)}

    def tensors(self) -> Sequence[tuple[str, tuple[int, ...]]]:
        """Name, in the names of the modules, and shape of every tensor that is read for it."""
        return list(vision_tensors(self.config)) if self.config is not None else []


def plan_vision(
    checkpoint: Checkpoint, target: Target, kernels: Kernels | None, precision: str, wanted: bool | None, sizes: Sequence[int] = ()
) -> tuple[VisionPlan, list[str]]:
    """The plan, and a message for each reason against it where pictures are `wanted`; None: where the target can. `kernels` are those of
    the device, None where the target has no vision, or standard operators. `sizes`: tokens of the largest slice of each graph, on targets
    with fixed shapes. Raises ConfigError for a tower that is of another form than the family's."""
    if wanted is False:
        return VisionPlan(reason="built without it on request (vision)"), []
    missing = no_tower(checkpoint)
    if missing:
        return VisionPlan(), [f"pictures: {missing}"] if wanted else []
    if not target.vision_passes or (kernels is None and not target.static):
        return _left_out(f"target {target.name} has no lowering of the vision tower yet", wanted)
    if wanted is None and not target.vision_unasked:
        return _left_out(f"target {target.name} has it on request only (vision)", wanted)
    choices, refused = choose_vision(kernels, precision) if kernels is not None else (choose_standard_vision(), list[str]())
    if refused:
        return _left_out("; ".join(refused), wanted)
    if not checkpoint.config.text.rope.mrope_section:
        return _left_out("config.json has no mrope_section, by which pictures have positions", wanted)
    config = parse_vision(checkpoint.config.vision or {}, checkpoint.config.text.hidden_size, str(checkpoint.path / "config.json"))
    spec, vocabulary = vision_spec(config, checkpoint.config.raw, checkpoint.path), checkpoint.config.text.vocab_size
    outside = [token for token in (spec.image_token, spec.video_token, spec.start_token, spec.end_token) if token >= vocabulary]
    if outside:
        return _left_out(f"config.json has tokens of pictures that are not among the {vocabulary} of the vocabulary: {outside}", wanted)
    if not target.static:
        return VisionPlan(config, spec, choices), []
    least = -(-spec.min_pixels // spec.factor**2)
    if not sizes or list(sizes) != sorted({*sizes}) or not 1 <= sizes[0] <= sizes[-1] <= _MOST_TOKENS or sizes[-1] < least:
        given = ", ".join(map(str, sizes)) or "none"
        wrong = f"picture_tokens are sizes up to {_MOST_TOKENS} tokens, ascending, the last at least {least}, and not {given}"
        return VisionPlan(reason=wrong), [f"pictures: {wrong}"]
    return VisionPlan(config, spec, choices, sizes=tuple(sizes)), []


def _left_out(reason: str, wanted: bool | None) -> tuple[VisionPlan, list[str]]:
    return VisionPlan(reason=reason), [f"pictures: {reason}"] if wanted else []
