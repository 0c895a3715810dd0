"""Changed manifests: each gives the same output or one error, without a crash, a hang, or memory beyond a bound.

"damaged" manifests keep their digest; "forged" ones get a new one, as a hostile maker would give them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_export import build
from qwen_export.building.static_plan import StaticOptions
from tests.support.manifest_worker import answer
from tests.support.worker_outcomes import outcomes, seeds

# What a maker can choose freely: no other field has it, and the text of a model is the maker's in any case.
FREE = ("rotary.", "stop_ids", "weights.", "states.", "speculation", "model.")


@pytest.fixture(scope="module")
def static_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("static") / "bundle"
    return build(tiny_checkpoint, output, target="onnx", max_context=128, options=StaticOptions(16))


@pytest.mark.parametrize("numbers", seeds(60, 120))
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_changed_manifests_give_the_same_output_or_one_error(kind: str, numbers: range, tiny_bundle: Path, static_bundle: Path) -> None:
    bundle = tiny_bundle if kind == "dynamic" else static_bundle
    unchanged = answer(bundle)
    assert len(json.loads(unchanged)) == 6
    cases = [f"{'damaged' if seed % 4 == 3 else 'forged'} {seed}" for seed in numbers]
    wrong, same, refused = [], 0, 0
    for found in outcomes("tests.support.manifest_worker", bundle, cases):
        outcome = found["outcome"]
        same += outcome == unchanged
        refused += outcome == "error"
        free = found["case"].startswith("forged") and any(name in found.get("where", "") for name in FREE)
        if outcome.startswith("failure") or (outcome not in ("error", unchanged) and not free):
            wrong.append(found)
    assert not wrong, "\n".join(map(str, wrong[:20]))
    assert same and refused > len(cases) // 2
