"""Can TensorRT run the bundle on this machine? Library, version, driver and GPU are compared before an engine is read."""

from __future__ import annotations

from qwen_export.errors import BundleError
from qwen_export.manifest import EngineSpec, Manifest
from qwen_export.runtimes.backends.tensorrt.tensorrt_library import Library, load_library, numbers
from qwen_export.runtimes.memory import cuda_driver

_REBUILD = "Run `qwen-export rebuild` on the bundle, here or with --sm {sm} elsewhere."
_AMPERE = 80


def check_tensorrt(manifest: Manifest, device_id: int = 0) -> str:
    """Raise an error with the exact mismatch; returns what was found."""
    spec = manifest.engine
    if spec is None:
        raise BundleError("the bundle does not record what its engines were compiled for", fix="Build it again.")
    if manifest.target.device != "cuda":
        raise BundleError("engines of TensorRT run on an NVIDIA GPU", got=manifest.target.device, fix="Load the bundle without a device.")
    library = load_library(manifest.target.backend)
    cuda = cuda_driver.driver_version()
    major, minor = cuda_driver.compute_capability(device_id)
    name, sm = cuda_driver.device_name(device_id), f"{major}{minor}"
    found = (_version(library, spec), _driver(cuda, spec), _gpu(name, sm, spec))
    wrong = [error for error in found if error is not None]
    if len(wrong) == 1:
        raise wrong[0]
    if wrong:
        raise BundleError(
            "the bundle's engines are not for this machine",
            got="; ".join(f"{error.what} ({error.got}, and they need {error.expected})" for error in wrong),
            fix=" ".join(dict.fromkeys(error.fix for error in wrong)),
        )
    return f"{library.flavour.name} {library.version}, CUDA {cuda[0]}.{cuda[1]}, {name} (SM {sm})"


def runs_on(spec: EngineSpec, sm: str) -> bool:
    """Whether engines run on a GPU of this compute capability."""
    return sm in spec.sms or (spec.hardware_compatibility == "ampere+" and int(sm) >= _AMPERE)


def _version(library: Library, spec: EngineSpec) -> BundleError | None:
    have, built = numbers(library.version), numbers(spec.version)
    if have == built or (spec.version_compatible and have[0] == built[0] and have > built):
        return None
    return BundleError(
        f"the bundle's engines were compiled by another version of {library.flavour.name}",
        got=library.version,
        expected=spec.version + (" or newer" if spec.version_compatible else ""),
        fix="Install that version, or run `qwen-export rebuild` on the bundle.",
    )


def _driver(cuda: tuple[int, int], spec: EngineSpec) -> BundleError | None:
    if cuda >= numbers(spec.minimum_cuda):
        return None
    return BundleError(
        "the NVIDIA driver is too old for the bundle's engines",
        got=f"a driver for CUDA {cuda[0]}.{cuda[1]}",
        expected=f"at least CUDA {spec.minimum_cuda}",
        fix="Update the driver.",
    )


def _gpu(name: str, sm: str, spec: EngineSpec) -> BundleError | None:
    if runs_on(spec, sm):
        return None
    return BundleError(
        "the bundle's engines were compiled for other GPUs",
        got=f"{name}, SM {sm}",
        expected="SM " + ", ".join(spec.sms) + (" or newer" if spec.hardware_compatibility == "ampere+" else ""),
        fix=_REBUILD.format(sm=sm),
    )
