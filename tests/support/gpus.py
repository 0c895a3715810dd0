"""How many GPUs this machine has."""

from __future__ import annotations

from qwen_export.errors import BundleError
from qwen_export.runtimes.memory.cuda_driver import device_name


def gpu_count() -> int:
    count = 0
    while True:
        try:
            device_name(count)
        except BundleError:
            return count
        count += 1
