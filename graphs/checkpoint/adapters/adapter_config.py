"""adapter_config.json of PEFT: which adapters can be merged, and how strong a module's matrices are.

Facts: `LoraConfig` and `LoraLayer` of PEFT 0.21. A key that is not known may change what is merged, and is refused unless it is off.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qwen_export.errors import CheckpointError, ConfigError, UnsupportedError
from qwen_export.graphs.config_fields import Fields, shown
from qwen_export.graphs.json_file import read_json_object

ADAPTER = "adapter_config.json"

_READ = frozenset(
    {
        *("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "target_parameters"),
        *("init_lora_weights", "ensure_weight_tying", "base_model_name_or_path"),
    }
)
# How modules were chosen and trained; what was trained is in the file of weights.
_TRAINING = frozenset(
    {
        *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "lora_dropout", "bias"),
        *("task_type", "inference_mode", "revision", "auto_mapping", "peft_version", "megatron_config", "megatron_core", "runtime_config"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "parent_library", "unsloth_version"),
    }
)
# These begin with other base weights than those of the checkpoint.
_CHANGED_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
_CONVERT = "Save it as plain LoRA with PEFT (save_pretrained with path_initial_model_for_weight_conversion), or merge it with PEFT."


@dataclass(frozen=True)
class AdapterConfig:
    """`alpha` without a pattern; `tied`: embedding and head were trained as one."""

    alpha: float
    alpha_pattern: Mapping[str, float]
    rank_stabilized: bool
    dora: bool
    tied: bool

    def scaling(self, module: str, rank: int) -> float:
        """The factor of B A of a module, given by its name in the adapter."""
        found = (value for pattern, value in self.alpha_pattern.items() if re.match(rf"(.*\.)?({pattern})$", module))
        alpha = next(found, self.alpha)
        return alpha / math.sqrt(rank) if self.rank_stabilized else alpha / rank


def read_adapter_config(directory: Path) -> AdapterConfig:
    """Raises CheckpointError where there is no adapter, ConfigError for a wrong value, UnsupportedError for a kind that is not merged."""
    path = directory / ADAPTER
    if not path.exists():
        raise CheckpointError(
            "this is not the directory of an adapter",
            where=str(directory),
            expected=ADAPTER,
            fix="Give the directory that PEFT's save_pretrained wrote as {lora}.",
        )
    values = read_json_object(path, "adapter configuration", ConfigError)
    if values.get("peft_type") != "LORA":
        raise _refused(path, "adapters of this kind are not merged", shown(values.get("peft_type")), "'LORA'")
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise _refused(path, "the adapter belongs to base weights that its training has changed", shown(start), fix=_CONVERT)
    unknown = [key for key, value in values.items() if key not in _READ | _TRAINING and value not in (None, False, [], {}, "")]
    if unknown:
        raise _refused(path, "the adapter has settings that are not implemented", ", ".join(shown(key) for key in unknown[:8]))
    fields = Fields(values, str(path))
    fields.integer("r", minimum=1)
    return AdapterConfig(
        fields.number("lora_alpha"),
        _pattern(fields),
        fields.boolean("use_rslora", False),
        fields.boolean("use_dora", False),
        fields.boolean("ensure_weight_tying", False),
    )


def _pattern(fields: Fields) -> dict[str, float]:
    """alpha_pattern; the ranks of rank_pattern are those of the stored matrices."""
    given = fields.data.get("alpha_pattern") or {}
    if not isinstance(given, dict) or not all(isinstance(value, (int, float)) for value in given.values()):
        raise fields.wrong("alpha_pattern", given, "numbers by name of the module")
    for pattern in given:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise fields.wrong("alpha_pattern", pattern, "names or regular expressions") from error
    return {str(pattern): float(value) for pattern, value in given.items()}


def _refused(path: Path, what: str, got: str, expected: str = "", fix: str = "Merge it with PEFT (merge_and_unload).") -> UnsupportedError:
    return UnsupportedError(what, where=str(path), got=got, expected=expected, fix=fix)
