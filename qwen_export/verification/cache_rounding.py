"""What attention caches in a format of their own mean for a comparison with eager modules, which keep caches in the same format."""

from __future__ import annotations

from qwen_export.cache_formats import CACHE_FORMATS, CacheFormat
from qwen_export.manifest import Manifest

# Root mean square of what the rounding of caches changes in logits, in standard deviations. Measured on the demo checkpoints: 0.0002
# (fp16), 0.007 (int8), 0.03 (fp8).
CACHE_CHANGE = {"fp16": 0.01, "int8": 0.05, "fp8": 0.2}
# Both sides round the same values, which differ in their last bits, so that some become neighbors on the grid: largest difference of a
# logit by that, in the same unit. Measured: 0.0007 (fp16), 0.00004 (int8), 0.00001 (fp8); a step of int8 or fp8 is larger, but rarer.
_NEIGHBORS = {"fp16": 0.01, "int8": 0.02, "fp8": 0.1}


def caches_of(manifest: Manifest) -> CacheFormat | None:
    """The format of a bundle's caches where that is not the precision of its activations."""
    name = manifest.precision_plan.get("attention cache", "")
    return CACHE_FORMATS[name] if name in CACHE_FORMATS and name != manifest.precision_plan["activations"] else None


def with_caches(tolerance: float, caches: CacheFormat | None) -> float:
    """A tolerance of logits for a bundle with such caches."""
    return tolerance if caches is None else max(tolerance, _NEIGHBORS[caches.name])
