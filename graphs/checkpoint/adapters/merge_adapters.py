"""Adapters and a checkpoint's weights: which update belongs to which stored weight.

Modules have the names of transformers, and the checkpoint may store them otherwise: the experts of a layer are one parameter there, and one
matrix per expert in some checkpoints, or the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwen_export.errors import CheckpointError, ParameterError, UnsupportedError
from qwen_export.graphs.checkpoint.adapters.adapter_config import AdapterConfig, read_adapter_config
from qwen_export.graphs.checkpoint.adapters.adapter_tensors import AdapterTensors, Update, read_adapter_tensors
from qwen_export.graphs.checkpoint.adapters.low_rank import Place
from qwen_export.graphs.checkpoint.adapters.merged_tensor import MergedTensor
from qwen_export.graphs.checkpoint.formats.logical_tensor import LogicalTensor
from qwen_export.graphs.checkpoint.formats.plain_tensor import plain
from qwen_export.graphs.checkpoint.stored_prefixes import MTP_PREFIX
from qwen_export.graphs.config import CheckpointConfig

Weights = Mapping[str, LogicalTensor]
_EXPERT = re.compile(r"(.*\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight")
_STACK = re.compile(r"(.*\.mlp\.experts)\.weight")
_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"
_SHOWN = 4


@dataclass(frozen=True)
class AdapterSource:
    """An adapter's directory, and how strong it is merged."""

    path: Path
    scale: float = 1.0


def adapter_source(text: str | Path | AdapterSource) -> AdapterSource:
    """An adapter as DIR or DIR:SCALE. Raises ParameterError for a scale that is not finite."""
    if isinstance(text, AdapterSource):
        return text
    path, colon, number = str(text).rpartition(":")
    if not colon or Path(text).exists():
        return AdapterSource(Path(text))
    try:
        scale = float(number)
    except ValueError:
        return AdapterSource(Path(text))
    if not abs(scale) < 1e6:
        raise ParameterError(
            "the scale of an adapter is not a usable number",
            parameter="lora",
            got=number,
            expected="a finite number",
            fix="Correct {lora}.",
        )
    return AdapterSource(Path(path), scale)


def merged(
    weights: Weights, config: CheckpointConfig, adapters: Sequence[AdapterSource]
) -> tuple[dict[str, LogicalTensor], CheckpointConfig, list[str]]:
    """The weights with all adapters in order, the configuration that they have then, and notes. Nothing of a weight is read.

    Raises QwenExportError for an adapter that cannot be merged, and for one of another model."""
    result, notes = dict(weights), []
    for adapter in adapters:
        settings = read_adapter_config(adapter.path)
        tensors = read_adapter_tensors(adapter.path, config.text_prefix)
        if config.text.tie_word_embeddings and not settings.tied and _touches_ends(config, tensors):
            result[_HEAD] = replace(result[config.text_prefix + _EMBEDDING], name=_HEAD)
            config = replace(config, text=replace(config.text, tie_word_embeddings=False))
            notes.append(f"{adapter.path.name} changes one of embedding and LM head, which were one: the bundle has both")
        changed = _Merge(result, config, adapter, settings)
        for name, info in tensors.replaced.items():
            changed.replace(name, plain(info))
        for update in tensors.updates:
            if not (update.name == _HEAD and config.text.tie_word_embeddings):  # that of the embedding again
                changed.update(update)
        result = changed.weights
        notes += changed.notes()
    if any(name.startswith(MTP_PREFIX) for name in weights):
        notes.append("the draft head is that of the base model: drafts may fit less often")
    return result, config, notes


def _touches_ends(config: CheckpointConfig, tensors: AdapterTensors) -> bool:
    names = {*tensors.replaced, *(update.name for update in tensors.updates)}
    return bool(names & {_HEAD, config.text_prefix + _EMBEDDING})


class _Merge:
    """One adapter on weights that may have others already."""

    def __init__(
        self, weights: dict[str, LogicalTensor], config: CheckpointConfig, adapter: AdapterSource, settings: AdapterConfig
    ) -> None:
        self.weights = dict(weights)
        self._config, self._adapter, self._settings = config, adapter, settings
        self._changed: set[str] = set()

    def notes(self) -> list[str]:
        scale = f" at {self._adapter.scale:g} of its strength" if self._adapter.scale != 1 else ""
        quantized = sum(self.weights[name].quantized for name in self._changed)
        note = f"{self._adapter.path.name} is merged into {len(self._changed)} weights{scale}"
        return [note + (f", of which {quantized} are stored quantized and become fp32 first" if quantized else "")]

    def replace(self, name: str, weight: LogicalTensor) -> None:
        """A whole weight of the adapter, which its strength does not change."""
        base = self.weights.get(name)
        if base is None:
            raise self._foreign(name)
        if base.shape != weight.shape:
            fix = "Train the adapter without new tokens, or resize the embedding of the base model with transformers, and give that."
            raise UnsupportedError(
                "the adapter replaces a weight by one of another shape",
                where=f"{self._adapter.path}, {name}",
                got=weight.shape,
                expected=base.shape,
                fix=fix,
            )
        self.weights[name] = weight
        self._changed.add(name)

    def update(self, update: Update) -> None:
        expert, stack = _EXPERT.fullmatch(update.name), _STACK.fullmatch(update.name)
        if stack is not None:
            self._stack(update, stack[1])
        elif expert is not None and update.name not in self.weights:
            self._expert_in_stack(update, expert[1].removesuffix("."), int(expert[2]), expert[3])
        else:
            weight = self.weights.get(update.name)
            if weight is None or len(weight.shape) != 2:
                raise self._foreign(update.name)
            rows, columns = weight.shape
            given = (update.a.shape[1], update.b.shape[0])
            self._check(update, given, (rows, columns) if update.embedding else (columns, rows))
            self._place(update.name, Place(update.low_rank(self._settings, self._adapter.scale, rows)))

    def _stack(self, update: Update, experts: str) -> None:
        """An update of all experts, of the parameter whose sizes fit it."""
        H, inner, E = self._config.text.hidden_size, self._config.text.moe_intermediate_size, self._config.text.num_experts
        sizes = (update.a.shape[1], update.b.shape[0])
        if not E or update.a.shape[0] % E or sizes not in ((H, 2 * inner), (inner, H)):
            raise self._misfit(update, sizes, f"{(H, 2 * inner)} or {(inner, H)}, for {E} experts")
        gate_up = sizes == (H, 2 * inner)
        low_rank = update.low_rank(self._settings, self._adapter.scale, sizes[1], E)
        name = f"{experts}.{'gate_up_proj' if gate_up else 'down_proj'}"
        if name in self.weights:
            self._place(name, Place(low_rank, None))
            return
        for e in range(E):
            for part, shift in (("gate", 0), ("up", inner)) if gate_up else (("down", 0),):
                self._place(f"{experts}.{e}.{part}_proj.weight", Place(low_rank, e, shift))

    def _expert_in_stack(self, update: Update, experts: str, expert: int, part: str) -> None:
        """An update of one expert's matrix, where the checkpoint has one tensor for all."""
        H, inner = self._config.text.hidden_size, self._config.text.moe_intermediate_size
        self._check(update, (update.a.shape[1], update.b.shape[0]), (inner, H) if part == "down" else (H, inner))
        if expert >= self._config.text.num_experts:
            raise self._foreign(update.name)
        low_rank = update.low_rank(self._settings, self._adapter.scale, H if part == "down" else inner)
        shift = -inner if part == "up" else 0
        self._place(f"{experts}.{'down_proj' if part == 'down' else 'gate_up_proj'}", Place(low_rank, 0, shift, expert))

    def _place(self, name: str, place: Place) -> None:
        base = self.weights.get(name)
        if base is None:
            raise self._foreign(name)
        if place.update.embedding and place.update.magnitude is not None:
            raise UnsupportedError(
                "DoRA on an embedding is not merged", where=f"{self._adapter.path}, {name}", fix="Merge the adapter with PEFT."
            )
        earlier = base if isinstance(base, MergedTensor) else MergedTensor(name, base.shape, base, ())
        self.weights[name] = replace(earlier, places=(*earlier.places, place))
        self._changed.add(name)

    def _check(self, update: Update, got: tuple[int, int], expected: tuple[int, int]) -> None:
        if got != expected:
            raise self._misfit(update, got, str(expected))

    def _misfit(self, update: Update, got: tuple[int, int], expected: str) -> CheckpointError:
        return CheckpointError(
            "the adapter's matrices do not fit the checkpoint",
            where=f"{self._adapter.path}, {update.module}",
            got=f"{got[0]} inputs and {got[1]} outputs",
            expected=expected,
            fix="Give the base model that the adapter was trained on.",
        )

    def _foreign(self, name: str) -> CheckpointError:
        return CheckpointError(
            "the adapter changes a module that the checkpoint does not have",
            where=f"{self._adapter.path}, {name}",
            fix="Give the base model that the adapter was trained on.",
        )
