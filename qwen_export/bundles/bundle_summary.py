"""What a bundle is, from its manifest alone: nothing is hashed, and no backend is loaded. Imports neither torch nor onnx."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen_export.bundle_contract import STEP, is_tower
from qwen_export.manifest import MANIFEST, ROPE_SCALING, SIGNATURE, GraphSpec, Manifest, load_manifest, manifest_digest
from qwen_export.runtimes.backends.compatibility import state_bytes
from qwen_export.runtimes.backends.stage_memory import GPU_WORKSPACE, needed_by_stage
from qwen_export.runtimes.memory.mapped_weights import weight_bytes
from qwen_export.stages import stage_groups

_FORMATS = ("weights", "calibration", "activations", "recurrent state", "attention cache")


def is_bundle(path: Path) -> bool:
    """Whether a directory is a bundle, whole or not, and no checkpoint."""
    return (path / MANIFEST).is_file() and not (path / "config.json").exists()


def inspect_bundle(path: str | Path) -> dict[str, Any]:
    """A JSON-able report: `model`, `target`, `precision` (the types of weights, activations and states), `sequence` (memory), `graphs` with
    the tokens of a call (None: any number) and the slots of the caches, `files`, `speculation`, `engine`, `pictures` and `verification` as
    in the manifest. Raises BundleError where the manifest cannot be read."""
    directory = Path(path)
    manifest = load_manifest(directory)
    model, target = manifest.model, manifest.target
    kinds = model.get("layer_types", [])
    return {
        "path": str(directory),
        "producer": manifest.producer,
        "architecture": manifest.source.get("architecture", ""),
        "model": {
            "kind": "mixture of experts" if model.get("num_experts") else "dense",
            "layers": len(kinds),
            "attention_layers": sum(kind == "full_attention" for kind in kinds),
            "hidden_size": model.get("hidden_size"),
            "vocab_size": model["vocab_size"],
            "max_context": model["max_position_embeddings"],
            "rope_scaling": manifest.source.get(ROPE_SCALING, ""),
        },
        "target": {"name": target.name, "device": target.device, "backend": target.backend, "minimum_backend": target.minimum_backend},
        "platform": target.platform,
        "precision": target.precision,
        "formats": {name: manifest.precision_plan[name] for name in _FORMATS if name in manifest.precision_plan},
        "max_context": manifest.max_context,
        "stages": _stages(manifest),
        "graphs": {name: _graph(manifest, graph) for name, graph in manifest.graphs.items()},
        "manifest": {
            "schema": manifest.schema,
            "sha256": manifest_digest(directory),
            "signed": (directory / SIGNATURE).is_file(),
        },
        "native_libraries": list(manifest.plugins),
        "files": len(manifest.files),
        "bytes": sum(entry.size for entry in manifest.files.values()),
        "outside": {"files": len(manifest.references), "bytes": sum(entry.size for entry in manifest.references.values())},
        "sequence": _sequence(manifest),
        "speculation": _speculation(manifest),
        "engine": _engine(manifest),
        "pictures": _pictures(manifest),
        "verification": {key: manifest.verification[key] for key in ("when", "passed") if key in manifest.verification},
    }


def _stages(manifest: Manifest) -> list[dict[str, int]]:
    """Layers and bytes of each stage of the decoder, those on a GPU with a full context; of one stage where it is not cut."""
    names, found, first = stage_groups(manifest.graphs).get(STEP, []), [], 0
    for name, need in zip(names, needed_by_stage(manifest) if names else [], strict=True):
        graph = manifest.graphs[name]
        layers = len({state.name.split(".")[1] for state in graph.states})
        weights = sum({(weight.file, weight.offset): weight_bytes(weight) for weight in graph.weights}.values())
        found.append({"first_layer": first, "last_layer": first + layers - 1, "weight_bytes": weights, "gpu_bytes": need + GPU_WORKSPACE})
        first += layers
    return found


def _graph(manifest: Manifest, graph: GraphSpec) -> dict[str, Any]:
    tokens = next((t.shape[1] for t in graph.inputs if t.name == "input_ids"), None)
    slots = next((state.shape[2] for state in graph.states if state.grows), None)
    return {
        "file": graph.file,
        "bytes": manifest.files[graph.file].size if graph.file in manifest.files else 0,
        "tokens": tokens if isinstance(tokens, int) else None,
        "slots": slots if isinstance(slots, int) else None,
        "weights": len(graph.weights),
    }


def _sequence(manifest: Manifest) -> dict[str, int]:
    """Bytes of one running sequence: of its states, of the cache rows of a token, the part of these that the draft head has, and of all
    with a full context. A bundle of fixed sizes has its caches from the start."""
    context = manifest.max_context
    states, full = state_bytes(manifest, 0), state_bytes(manifest, context)
    undrafted = state_bytes(manifest, context, drafts=False) - state_bytes(manifest, 0, drafts=False)
    token = (full - states) // context
    return {"state_bytes": states, "token_bytes": token, "draft_token_bytes": token - undrafted // context, "full_bytes": full}


def _speculation(manifest: Manifest) -> dict[str, int] | None:
    if manifest.speculation is None:
        return None
    return {"max_draft": manifest.speculation.max_draft, "draft_vocab": manifest.speculation.draft_vocab}


def _pictures(manifest: Manifest) -> dict[str, int] | None:
    """How large pictures are seen, None where the bundle reads text only."""
    spec = manifest.vision
    if spec is None:
        return None
    per_token = spec.factor**2
    towers = [graph.outputs[0].shape[1] for name, graph in manifest.graphs.items() if is_tower(name)]
    most = min([spec.max_pixels // per_token, max((size for size in towers if isinstance(size, int)), default=spec.max_pixels)])
    return {
        "min_pixels": spec.min_pixels,
        "max_pixels": min(spec.max_pixels, most * per_token),
        "pixels_per_token": per_token,
        "most_tokens": most,
    }


def _engine(manifest: Manifest) -> dict[str, Any] | None:
    spec = manifest.engine
    if spec is None:
        return None
    return {
        "version": spec.version,
        "sms": list(spec.sms),
        "hardware_compatibility": spec.hardware_compatibility,
        "version_compatible": spec.version_compatible,
        "minimum_cuda": spec.minimum_cuda,
        "weights": spec.weights,
        "weight_streaming": bool(spec.options.get("weight_streaming")),
        "plugins": list(spec.plugins),
        "carries_onnx": bool(spec.onnx),
    }
