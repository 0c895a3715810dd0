"""Which sampling parameters are used when the caller names none.

Temperature, top_p and top_k, first match wins; values that the caller gives replace single ones of the result (`dataclasses.replace`):

1. generation_config.json, if its temperature, top_p and top_k are not those the family ships: they were chosen for this checkpoint.
   They hold for both modes. `do_sample: false` means greedy.
2. `RECOMMENDED`, the model cards' table. The cards give two settings, with and without thinking, and the shipped file can hold but one:
   it is the thinking one, so for a model of the family the table is the better source in both modes. The file is also absent from the
   4B and 9B repositories.
3. generation_config.json as it is, for a model that the table does not know.
4. `FALLBACK`.

All other values of generation_config.json (min_p, penalties, rules) hold in any case: the family's file has none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qwen_export.runtimes.sampling.generation_config import GenerationDefaults, read_generation_config
from qwen_export.runtimes.sampling.sampler import SamplingParams
from qwen_export.runtimes.text.chat_template import ChatTemplate


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the choice depends on. `generation`: "3.5", "3.6", "3.8" or None; `small`: 0.8B or 2B, which do not think by default."""

    generation: str | None
    small: bool

    @classmethod
    def from_template(cls, template: ChatTemplate) -> ModelFacts:
        """Read off the chat template: config.json does not tell the generations apart, and names of fine-tuned models say anything.

        3.5 knows `enable_thinking`, 3.6 adds `preserve_thinking`, 3.8 adds `reasoning_effort`.
        """
        if "enable_thinking" not in template.variables:
            return cls(generation=None, small=False)
        if "preserve_thinking" not in template.variables:
            return cls(generation="3.5", small=not template.thinks_by_default())
        return cls(generation="3.8" if "reasoning_effort" in template.variables else "3.6", small=False)


# (generation, small, thinking): the row "general" of the model card. min_p is 0 and the repetition penalty 1 everywhere.
RECOMMENDED: Mapping[tuple[str, bool, bool], SamplingParams] = {
    ("3.5", True, False): SamplingParams(temperature=1.0, top_p=1.0, top_k=20, presence_penalty=2.0),
    ("3.5", True, True): SamplingParams(temperature=1.0, top_p=0.95, top_k=20, presence_penalty=1.5),
    ("3.5", False, False): SamplingParams(temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5),
    ("3.5", False, True): SamplingParams(temperature=1.0, top_p=0.95, top_k=20, presence_penalty=1.5),
    ("3.6", False, False): SamplingParams(temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5),
    ("3.6", False, True): SamplingParams(temperature=1.0, top_p=0.95, top_k=20, presence_penalty=0.0),
    ("3.8", False, False): SamplingParams(temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5),
    ("3.8", False, True): SamplingParams(temperature=1.0, top_p=0.95, top_k=20, presence_penalty=0.0),
}

FALLBACK = SamplingParams(temperature=0.7, top_p=0.8, top_k=20)

# (temperature, top_p, top_k) in generation_config.json of the family: thinking in general, thinking about code.
_SHIPPED = ((1.0, 0.95, 20), (0.6, 0.95, 20))


def recommended(facts: ModelFacts, thinking: bool, defaults: GenerationDefaults | Mapping[str, Any] | None = None) -> SamplingParams:
    """The parameters for one mode of a model; `defaults` is generation_config.json, read or as it is. Raises QwenExportError for a value
    of it that is out of range."""
    given = defaults if isinstance(defaults, GenerationDefaults) else read_generation_config(defaults or {})
    table = RECOMMENDED.get((facts.generation or "", facts.small, thinking))
    if given.greedy:
        return SamplingParams(greedy=True, **given.others)
    if given.choice is None:
        base = table or FALLBACK
    elif table is not None and tuple(given.choice[name] for name in ("temperature", "top_p", "top_k")) in _SHIPPED:
        base = table
    else:
        base = SamplingParams(**given.choice)
    return replace(base, **given.others)
