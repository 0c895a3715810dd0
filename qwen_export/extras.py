"""The optional parts of an installation: which modules belong to which extra of pyproject.toml, and how to install one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qwen_export.errors import QwenExportError

EXTRAS: dict[str, tuple[str, ...]] = {
    "export": ("torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "ml_dtypes", "polygraphy"),
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
    "serve": ("fastapi", "starlette", "uvicorn", "httptools", "prometheus_client", "llguidance", "pydantic"),
    "chat": ("prompt_toolkit",),
    "plot": ("matplotlib",),
    "sign": ("cryptography",),
    "vision": ("PIL",),
    "video": ("av",),
    "gguf": ("gguf",),
    "hub": ("huggingface_hub",),
    "modelscope": ("modelscope",),
}
"""Modules by extra."""
_COMPILER = ("qwen_export.graphs", "qwen_export.plugins", "qwen_export.building", "qwen_export.verification")
_REQUIRED = ("numpy", "tokenizers", "jinja2", "rich", "psutil", "platformdirs")


class MissingExtra(QwenExportError):
    """A command or call needs a part that is not installed."""


def install_line(extra: str) -> str:
    """How to install an extra. qwen-export is on no package index: the line is for a checkout."""
    return f"In a checkout of qwen-export: pip install '.[{extra}]'."


def missing_extra(error: ModuleNotFoundError, purpose: str = "this") -> MissingExtra | None:
    """The message for a module that is not installed; None where the module belongs to no extra, which is a fault of ours.

    `purpose`: what needs the module."""
    name = error.name or ""
    top = name.split(".")[0]
    if any(name == package or name.startswith(f"{package}.") for package in _COMPILER):
        return MissingExtra(
            f"{purpose} needs the compiler, and this installation holds the runtime only",
            got=f"no module {name}",
            fix=f"Use a full installation. {install_line('export')}",
        )
    for extra, modules in EXTRAS.items():
        if top in modules:
            return MissingExtra(f"{purpose} needs the extra `{extra}`", got=f"no module {top}", fix=install_line(extra))
    if top in _REQUIRED:
        return MissingExtra(f"{purpose} needs a package that is not installed", got=f"no module {top}", fix=f"pip install {top}.")
    return None


@contextmanager
def needed_for(purpose: str) -> Iterator[None]:
    """Around imports: MissingExtra instead of ModuleNotFoundError."""
    try:
        yield
    except ModuleNotFoundError as error:
        message = missing_extra(error, purpose)
        if message is None:
            raise
        raise message from error
