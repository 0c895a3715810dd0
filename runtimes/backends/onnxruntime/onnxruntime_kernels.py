"""Which kernels an ONNX Runtime has: probed from the installed one, not assumed from its version."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cache

from qwen_export.errors import UnsupportedError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "dml": "DmlExecutionProvider"}


@dataclass(frozen=True)
class Kernels:
    """The kernels of one execution provider. `types` maps (domain, op) to the element types that each registration takes, per type
    variable: one dict per registration, values like "float", "float16"."""

    device: str
    source: str
    types: dict[tuple[str, str], list[dict[str, frozenset[str]]]]

    def has(self, domain: str, op: str, **wanted: str) -> bool:
        """Whether some registration of the op takes these element types, e.g. has("com.microsoft", "MatMulNBits", T1="float")."""
        return any(
            all(kind in registration.get(variable, frozenset({kind})) for variable, kind in wanted.items())
            for registration in self.types.get((domain, op), [])
        )


def version() -> str:
    """Version of the ONNX Runtime that is imported here, "" when there is none."""
    try:
        import onnxruntime
    except ImportError:
        return ""
    return str(onnxruntime.__version__)


@cache
def installed(device: str) -> Kernels | None:
    """Kernels of the installed ONNX Runtime for "cpu" or "cuda"; None where this build of it lacks the provider or does not list them."""
    try:
        from onnxruntime.capi import onnxruntime_pybind11_state as native
    except ImportError as error:
        raise UnsupportedError(
            "ONNX Runtime is not installed",
            fix="Install one of the extras: pip install 'qwen-export[onnxruntime]' (CPU) or '[onnxruntime-gpu]'.",
        ) from error
    import onnxruntime

    if "TensorrtExecutionProvider" in onnxruntime.get_available_providers():
        return None  # asking would load TensorRT, and end the process where it is not installed
    types: dict[tuple[str, str], list[dict[str, frozenset[str]]]] = defaultdict(list)
    for kernel in native.get_all_opkernel_def():
        if kernel.provider == PROVIDERS[device]:
            constraints = {
                variable: frozenset(t.removeprefix("tensor(").removesuffix(")") for t in allowed)
                for variable, allowed in kernel.type_constraints.items()
            }
            types[(kernel.domain, kernel.op_name)].append(constraints)
    return Kernels(device, f"onnxruntime {version()}", dict(types)) if types else None


def has_provider(device: str) -> bool:
    """Whether the ONNX Runtime that is imported here was built with the provider of `device`."""
    try:
        import onnxruntime
    except ImportError:
        return False
    return PROVIDERS[device] in onnxruntime.get_available_providers()
