"""What a bundle holds for its draft head, and what a checkpoint must have for one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qwen_export import build
from qwen_export.errors import CheckpointError, QwenExportError
from qwen_export.manifest import load_manifest
from qwen_export.runtimes import Model, load
from tests.support.answers import GREEDY, drafted, plain
from tests.support.family import tiny_config
from tests.support.synthesize import synthesize


@pytest.fixture(scope="module")
def model(demo_bundle: Path) -> Model:
    return load(demo_bundle, threads=2)


def test_the_head_shares_embedding_and_lm_head_with_the_decoder(demo_bundle: Path) -> None:
    graphs = load_manifest(demo_bundle).graphs
    places = {name: {(w.file, w.offset): w for w in graph.weights} for name, graph in graphs.items()}
    shared = places["decoder"].keys() & places["mtp"].keys()
    vocabulary = load_manifest(demo_bundle).model["vocab_size"]
    assert any(places["mtp"][at].shape[0] == vocabulary for at in shared)
    own = {w.name for at, w in places["mtp"].items() if at not in shared}
    assert own and all(name.startswith(("mtp.", "layers.0.")) for name in own)


def test_the_draft_vocabulary_is_the_front_of_the_lm_head(demo_checkpoint: Path, model: Model, tmp_path: Path) -> None:
    bundle = build(demo_checkpoint, tmp_path / "narrow", draft_vocab=512)
    manifest = load_manifest(bundle)
    head = next(w for w in manifest.graphs["mtp"].weights if w.name == "draft_head.weight")
    whole = next(w for w in manifest.graphs["decoder"].weights if w.name == "embed_tokens.weight")
    assert head.offset == whole.offset and head.shape[0] == 512 < whole.shape[0]
    narrow = load(bundle, threads=2)
    ids = model.tokenizer.encode("def read_lines(path):\n")
    assert drafted(narrow.decoder(drafts=True), ids, 40, 3)[0] == plain(model.decoder(), ids, 40)


def test_a_build_may_leave_the_head_out(demo_checkpoint: Path, tmp_path: Path) -> None:
    bundle = build(demo_checkpoint, tmp_path / "plain", mtp=False)
    manifest = load_manifest(bundle)
    assert list(manifest.graphs) == ["decoder"] and manifest.speculation is None
    assert not any(state.pending for state in manifest.graphs["decoder"].states)
    assert "".join(load(bundle, threads=2).complete("import os", sampling=GREEDY, max_new_tokens=4))
    with pytest.raises(QwenExportError, match=r"without a draft head.*with mtp"):
        load(bundle, speculate=2)


def test_an_incomplete_head_is_an_error(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    index = checkpoint / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = checkpoint / content["weight_map"].pop("mtp.fc.weight")
    index.write_text(json.dumps(content))
    save_file({name: tensor for name, tensor in load_file(shard).items() if name != "mtp.fc.weight"}, shard)
    with pytest.raises(CheckpointError, match=r"without mtp\.fc\.weight.*mtp"):
        build(checkpoint, tmp_path / "bundle")
    assert build(checkpoint, tmp_path / "bundle", mtp=False)


def test_the_second_graph_adds_only_its_own_layer_to_memory(tmp_path: Path) -> None:
    """Resident memory of a run with and without the head, beside an embedding that dwarfs everything else."""
    config = tiny_config(vision=False, vocab_size=200_000)
    bundle = build(synthesize(config, tmp_path / "checkpoint"), tmp_path / "bundle")
    code = """
import sys
from qwen_export.runtimes import load
from qwen_export.runtimes.benchmark import peak_rss_mb
model = load(sys.argv[1], max_context=64, speculate=sys.argv[2], threads=1)
decoder = model.decoder(drafts=sys.argv[2] != "off")
decoder.prefill(list(range(32)))
if decoder.head: decoder.head.first({0: 5})[0]; decoder.head.following({0: 6}, 1)[0]
print(peak_rss_mb())
"""
    alone, both = (
        float(subprocess.run([sys.executable, "-c", code, str(bundle), mode], check=True, capture_output=True, text=True).stdout)
        for mode in ("off", "auto")
    )
    embedding = max(w.shape[0] * w.shape[1] * 2 for w in load_manifest(bundle).graphs["mtp"].weights if len(w.shape) == 2) / 2**20
    assert embedding > 20
    assert both - alone < 0.6 * embedding
