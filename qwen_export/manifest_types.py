"""The fields of a bundle's manifest. `manifest.py` reads and writes them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA_VERSION = 3
OLDEST_SCHEMA = 3
"""Before it a graph had logits [B,N,V], `logit_rows` counted within a sequence, and manifests had no digest."""
DIMS = ("B", "T", "S", "N", "P", "K")
"""Dynamic dims of a graph: sequences or slices, new tokens, cache slots, rows of logits, pending tokens, tokens of pictures."""
MODEL_SIZES = ("max_position_embeddings", "num_attention_heads", "vocab_size")
"""Values of the model configuration that runtimes read."""
ROPE_SCALING = "rope_scaling"
"""Key of `source`: the scaling that the build was given, where that is not the one of config.json."""
ADAPTERS = "adapters"
"""Key of `source`: path, scale and hashes of each adapter that was merged into the weights."""


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (hex) of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph: `shape` has ints and the dynamic dims of DIMS."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


READ_AGAIN = ".read"
"""What the name of an input has behind that of a state whose memory it is, too: for what a call reads of it and does not write."""


@dataclass(frozen=True)
class StateSpec:
    """A tensor that one call leaves for the next: output `after` of a call is input `name` of the next. Zero at the start.

    `grows` is true for attention caches, whose dim S is the capacity and which are written in place. `pending` ones, with a dim P, are
    raw inputs of a speculative call: the next call takes the first `accepted` of them into the recurrent states. `in_place`: output and
    input may be one buffer."""

    name: str
    after: str
    dtype: str
    shape: tuple[int | str, ...]
    grows: bool
    in_place: bool = True

    @property
    def pending(self) -> bool:
        return "P" in self.shape or ".pending_" in self.name


@dataclass(frozen=True)
class WeightSpec:
    """Where a weight of a graph is stored: bytes from `offset` of `file`, row-major. Graphs may share weights."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Reference:
    """A file outside the bundle that has weights of it: where it is on this machine, its size in bytes, and when it was last changed, in
    nanoseconds."""

    path: str
    size: int
    modified_ns: int


@dataclass(frozen=True)
class GraphSpec:
    """One compiled graph: its file, its inputs and outputs in order, and its states."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[StateSpec, ...]
    weights: tuple[WeightSpec, ...] = ()
    bound: tuple[str, ...] = ()
    """Names of weights that are inputs of the graph, beyond `inputs`: the runtime binds them, and a GPU may read them from host memory."""


@dataclass(frozen=True)
class SpeculationSpec:
    """At most `max_draft` tokens per call may stay pending. `draft_vocab`: the draft head, graph `mtp`, drafts among the lowest that many
    ids; 0 where there is no head."""

    max_draft: int
    draft_vocab: int


@dataclass(frozen=True)
class RotarySpec:
    """Angle of frequency i at position p is p * inv_freq[i]; cos and sin are multiplied by `scaling`. A token of a picture has three
    positions (time, height, width), and `axes` says which of them turns frequency i; empty where all tokens have one position."""

    inv_freq: tuple[float, ...]
    scaling: float
    axes: tuple[int, ...] = ()


@dataclass(frozen=True)
class VisionSpec:
    """How the bundle sees. A picture is cut into patches of `patch_size` pixels, a video into those of `temporal_patch_size` frames;
    merge_size^2 patches become one token. Pixels are brought to (level / 255 - mean) / std. `grid` is the side of the tower's table of
    positions, `head_dim` the width of its attention heads, of which the whole rotates.

    Pictures have `min_pixels` to `max_pixels`, videos `video_min_pixels` to `video_max_pixels` in all frames, which are taken at `fps`, of
    them `min_frames` to `max_frames`. The rest are token ids: what stands for a patch of a picture, of a video, and what is around them."""

    image_token: int
    video_token: int
    start_token: int
    end_token: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    grid: int
    head_dim: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    min_pixels: int = 65536
    max_pixels: int = 16777216
    video_min_pixels: int = 4096
    video_max_pixels: int = 25165824
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768

    @property
    def factor(self) -> int:
        """Sides of pictures are multiples of so many pixels, one token each way."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True)
class TargetSpec:
    """What the bundle was compiled for. `operators` are the non-standard ones that the backend must have, as "domain.Op"; `platform` is the
    system and processor that its plugins are machine code for, "" where there are none."""

    name: str
    device: str
    precision: str
    backend: str
    minimum_backend: str
    operators: tuple[str, ...]
    platform: str = ""


@dataclass(frozen=True)
class EngineSpec:
    """What TensorRT compiled the graphs for: its version, the compute capabilities ("89"), how far beyond these the engines run ("none",
    "ampere+" or "same-sm"), whether later versions of the library run them, and the oldest CUDA that the driver must serve ("13.0").

    `weights`: "bound", the weights of each graph are inputs of its engine, under their names; "embedded", engines have theirs; "stripped",
    they are given to the engine when it is loaded. `onnx`: graphs that the bundle also has as ONNX, in NAME.onnx, for compiling them again
    with `options`. `plugins`: ops that are a plugin of ours in the engines."""

    version: str
    sms: tuple[str, ...]
    hardware_compatibility: str = "none"
    version_compatible: bool = False
    minimum_cuda: str = ""
    weights: str = "bound"
    onnx: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json."""

    schema: int
    producer: str
    model: dict[str, Any]
    target: TargetSpec
    max_context: int
    rotary: RotarySpec
    graphs: dict[str, GraphSpec]
    files: dict[str, FileEntry]
    references: dict[str, Reference] = field(default_factory=dict)
    """Files outside the bundle, by the name of the note that the bundle has instead of each."""
    plugins: tuple[str, ...] = ()
    """Libraries among the files, with kernels that the graphs use: the runtime loads them into the process."""
    stop_ids: tuple[int, ...] = ()
    precision_plan: dict[str, str] = field(default_factory=dict)
    speculation: SpeculationSpec | None = None
    engine: EngineSpec | None = None
    """Where the graphs are engines of TensorRT."""
    vision: VisionSpec | None = None
    """Where the bundle reads pictures."""
    verification: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)
