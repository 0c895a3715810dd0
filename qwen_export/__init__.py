"""qwen-export: compile Qwen3.5 / Qwen3.6 checkpoints into bundles that run without PyTorch.

    from qwen_export import build
    build("checkpoints/qwen", "bundles/qwen")

    from qwen_export.runtimes import load
    model = load("bundles/qwen")
    for text in model.stream([{"role": "user", "content": "Hello"}]):
        print(text, end="")

Importing this package is cheap: nothing heavier than the standard library is loaded until a name is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_export.version import __version__

if TYPE_CHECKING:
    from qwen_export.building.compiler import build as build

__all__ = ["__version__", "build"]

# A checkout without symbolic links (git on Windows): the links beside this file are text files there, and the folders are found here.
_root = Path(__file__).resolve().parent.parent
if not (_root / "qwen_export" / "graphs").is_dir() and (_root / "graphs" / "__init__.py").exists() and (_root / "pyproject.toml").exists():
    __path__.append(str(_root))


def __getattr__(name: str) -> Any:
    # No module of this package may be called like a function here: importing it would put the module in the function's place.
    if name == "build":
        from qwen_export.extras import needed_for

        with needed_for("qwen_export.build"):
            from qwen_export.building.compiler import build

        return build
    raise AttributeError(f"module 'qwen_export' has no attribute {name!r}")
