"""The part that ships to the target machine: numpy, a tokenizer, a template engine and one backend.

from qwen_export.runtimes import load
model = load("bundles/qwen")
for text in model.stream([{"role": "user", "content": "Hello"}], enable_thinking=False):
    print(text, end="")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_export.runtimes.model import Generation as Generation
    from qwen_export.runtimes.model import Model as Model
    from qwen_export.runtimes.model import load as load
    from qwen_export.runtimes.sampling.sampler import SamplingParams as SamplingParams

__all__ = ["Generation", "Model", "SamplingParams", "load"]


def __getattr__(name: str) -> Any:
    if name == "SamplingParams":
        from qwen_export.runtimes.sampling.sampler import SamplingParams

        return SamplingParams
    if name in __all__:
        from qwen_export.runtimes import model

        return getattr(model, name)
    raise AttributeError(f"module 'qwen_export.runtimes' has no attribute {name!r}")
