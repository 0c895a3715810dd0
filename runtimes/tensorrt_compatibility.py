"""Can TensorRT run the bundle on this machine? Library, version, driver and GPU are compared before an engine is read."""

from __future__ import annotations

from qwen_export.errors import BundleError
from qwen_export.manifest import EngineSpec, Manifest
from qwen_export.runtimes import cuda_driver
from qwen_export.runtimes.tensorrt_library import Library, load_library, numbers

_REBUILD = "Run `qwen-export rebuild` on the bundle, here or with --sm {sm} elsewhere."
_AMPERE = 80


def check_tensorrt(manifest: Manifest, device_id: int = 0) -> str:
    """Raise an error with the exact mismatch; returns what was found."""
    spec = manifest.engine
    if spec is None:
        raise BundleError("the bundle does not say what its engines were compiled for", fix="Build it again.")
    if manifest.target.device != "cuda":
        raise BundleError("engines of TensorRT run on an NVIDIA GPU", got=manifest.target.device, fix="Load the bundle without a device.")
    library = load_library(manifest.target.backend)
    _check_version(library, spec)
    have = cuda_driver.driver_version()
    if have < numbers(spec.minimum_cuda):
        raise BundleError(
            "the NVIDIA driver is too old for the bundle's engines",
            got=f"a driver for CUDA {have[0]}.{have[1]}",
            expected=f"at least CUDA {spec.minimum_cuda}",
            fix="Update the driver.",
        )
    major, minor = cuda_driver.compute_capability(device_id)
    sm, name = f"{major}{minor}", cuda_driver.device_name(device_id)
    if not runs_on(spec, sm):
        raise BundleError(
            "the bundle's engines were compiled for other GPUs",
            got=f"{name}, SM {sm}",
            expected="SM " + ", ".join(spec.sms) + (" or newer" if spec.hardware_compatibility == "ampere+" else ""),
            fix=_REBUILD.format(sm=sm),
        )
    return f"{library.flavour.name} {library.version}, CUDA {have[0]}.{have[1]}, {name} (SM {sm})"


def runs_on(spec: EngineSpec, sm: str) -> bool:
    """Whether engines run on a GPU of this compute capability."""
    return sm in spec.sms or (spec.hardware_compatibility == "ampere+" and int(sm) >= _AMPERE)


def _check_version(library: Library, spec: EngineSpec) -> None:
    have, built = numbers(library.version), numbers(spec.version)
    if have == built or (spec.version_compatible and have[0] == built[0] and have > built):
        return
    raise BundleError(
        f"the bundle's engines were compiled by another version of {library.flavour.name}",
        got=library.version,
        expected=spec.version + (" or newer" if spec.version_compatible else ""),
        fix="Install that version, or run `qwen-export rebuild` on the bundle.",
    )
