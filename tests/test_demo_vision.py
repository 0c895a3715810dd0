"""The demo checkpoint that sees: its files, that transformers reads them, and that its bundles describe the picture of the README."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import Qwen3_5ForConditionalGeneration

from qwen_export import build
from qwen_export.runtimes import SamplingParams, load
from tests.support.source_tree import ROOT

CHECKPOINT, PICTURE = ROOT / "examples" / "demo-vision", ROOT / "examples" / "picture.png"
ANSWER = "A red star on the left and a blue circle on the right."


def test_files_match_their_checksums_and_the_size_limit() -> None:
    listed = dict(reversed(line.split()) for line in (CHECKPOINT / "SHA256SUMS").read_text().splitlines())
    files = {path.name: path for path in CHECKPOINT.iterdir() if path.name != "SHA256SUMS"}
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()} == listed
    assert sum(path.stat().st_size for path in files.values()) <= 21_000_000


def test_the_layout_is_that_of_the_releases() -> None:
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["model_type"] == "qwen3_5" and config["vision_config"]["out_hidden_size"] == config["text_config"]["hidden_size"]
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as stored:
        names = list(stored.keys())
        assert {stored.get_slice(name).get_dtype() for name in names} == {"BF16"}
    depth = config["vision_config"]["depth"]
    parts = Counter(name.removeprefix("model.").partition(".")[0] for name in names)
    assert parts == {"language_model": 6 * 14 + 2 * 11 + 2, "visual": 12 * depth + 9, "mtp": 15}


def test_transformers_reads_every_tensor() -> None:
    _, info = Qwen3_5ForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(name.startswith("mtp.") for name in info["unexpected_keys"])


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_bundles_describe_the_picture(precision: str, tmp_path: Path) -> None:
    """As the README shows it; and the same model completes code and calls a tool."""
    bundle = build(CHECKPOINT, tmp_path / "bundle", precision=precision)
    greedy = SamplingParams(greedy=True)
    with load(bundle, max_context=1024) as model:
        asked = [{"role": "user", "content": [{"type": "image", "image": str(PICTURE)}, {"type": "text", "text": "What do you see?"}]}]
        assert "".join(model.stream(asked, enable_thinking=False, sampling=greedy, max_new_tokens=48)).strip() == ANSWER
        begun = "class Point:\n    def __init__(self, x, y):\n        self.x = x\n"
        body = "".join(model.complete(begun, sampling=greedy, max_new_tokens=12))
        assert body.startswith("        self.y = y\n")


def test_the_readme_shows_this_answer() -> None:
    assert ANSWER in (ROOT / "README.md").read_text()
