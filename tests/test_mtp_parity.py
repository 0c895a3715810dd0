"""The draft head, eager and compiled, against transformers' generic MTP layer: in one pass, and chained over its own output."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3_5TextConfig
from transformers.modeling_layers import MtpLayer
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer, Qwen3_5RMSNorm, Qwen3_5TextRotaryEmbedding

from qwen_export import build
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.models.eager_sequence import EagerSequence
from qwen_export.graphs.models.load_model import load_decoder, load_mtp
from qwen_export.graphs.models.model_state import empty_state
from qwen_export.runtimes import load

TOKENS = 14
NAMES = {"fc": "eh_proj", "pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm", "norm": "post_norm", "layers.0": "mtp_block"}
Logits = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def ids(demo_checkpoint: Path) -> list[int]:
    vocabulary = open_checkpoint(demo_checkpoint).config.text.vocab_size
    return np.random.default_rng(3).integers(0, vocabulary, TOKENS).tolist()


def stored(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: t.float() for shard in checkpoint.glob("*.safetensors") for name, t in load_file(shard).items()}


def reference(checkpoint: Path, ids: list[int], drafts: list[int], hidden: torch.Tensor) -> Logits:
    """Logits of the last pair (ids[-1], hidden of ids[-2]) and of every draft after it, f32[1+len(drafts),V]."""
    config = json.loads((checkpoint / "config.json").read_text())
    config = Qwen3_5TextConfig(**config.get("text_config", config))
    config.layer_types, config.num_hidden_layers = ["full_attention"], 1
    config._attn_implementation = "eager"
    tensors = stored(checkpoint)
    layer = MtpLayer(config, Qwen3_5DecoderLayer, Qwen3_5RMSNorm, 0).eval()
    own = {name.removeprefix("mtp."): t for name, t in tensors.items() if name.startswith("mtp.")}
    renamed = {}
    for name, tensor in own.items():
        start = next(start for start in NAMES if name.startswith(start + "."))
        renamed[NAMES[start] + name.removeprefix(start)] = tensor
    layer.load_state_dict(renamed, strict=True)
    table = next(t for name, t in tensors.items() if name.endswith("embed_tokens.weight"))
    head = tensors.get("lm_head.weight", table)
    rows, states, out = ids[1:], hidden[:, :-1], []
    with torch.no_grad():
        for draft in [*drafts, None]:
            T = len(rows)
            positions = torch.arange(T)[None]
            angles = Qwen3_5TextRotaryEmbedding(config)(states, positions[None].expand(3, 1, T))
            mask = torch.full((T, T), float("-inf")).triu(1)[None, None]
            made = layer(table[torch.tensor([rows])], states, angles, mask, positions, None)
            out.append(head @ made[0, -1])
            if draft is not None:
                rows, states = [*rows, draft], torch.cat([states, made[:, -1:]], dim=1)
    return torch.stack(out).numpy()


def eager_hidden(checkpoint: Path, ids: list[int]) -> torch.Tensor:
    """The decoder's states after its final norm, [1,T,H]."""
    model = load_decoder(open_checkpoint(checkpoint))
    sequence = EagerSequence(model, TOKENS)
    count = torch.tensor([len(ids)])
    zero = torch.tensor([0])
    with torch.no_grad():
        return model(torch.tensor([ids]), sequence.cos, sequence.sin, zero, zero, count, torch.arange(len(ids)), sequence.state)[1]


def test_the_eager_head_is_that_of_transformers(demo_checkpoint: Path, ids: list[int]) -> None:
    source = open_checkpoint(demo_checkpoint)
    decoder = load_decoder(source)
    head = load_mtp(source, decoder, source.config.text.vocab_size)
    hidden = eager_hidden(demo_checkpoint, ids)
    sequence = EagerSequence(decoder, TOKENS)
    state = empty_state(head.config, 1, TOKENS)
    with torch.no_grad():
        logits = head(
            torch.tensor([ids[1:]]), hidden[:, :-1], sequence.cos, sequence.sin, torch.tensor([0]), torch.tensor([TOKENS - 2]), state
        )[0]
    assert np.abs(logits[0].numpy() - reference(demo_checkpoint, ids, [], hidden)[0]).max() < 1e-4


@pytest.mark.parametrize("chunk", [512, 5, 1])
def test_the_compiled_head_is_that_of_transformers(demo_checkpoint: Path, demo_bundle: Path, ids: list[int], chunk: int) -> None:
    """Behind a prompt read in chunks: the first draft, and two more over its own output."""
    decoder = load(demo_bundle, threads=2).decoder(drafts=True)
    assert decoder.head is not None
    decoder.chunk = chunk
    decoder.prefill(ids[:-1])
    head = decoder.head
    got = [head.first({0: ids[-1]})[0].array.copy(), head.following({0: 5}, 1)[0].array.copy(), head.following({0: 9}, 2)[0].array.copy()]
    expected = reference(demo_checkpoint, ids, [5, 9], eager_hidden(demo_checkpoint, ids))
    assert np.abs(np.stack(got) - expected).max() < 1e-4


def test_the_cache_of_the_head_is_right_after_accepting_and_rolling_back(demo_bundle: Path, ids: list[int]) -> None:
    model = load(demo_bundle, threads=2)
    first, second = model.decoder(drafts=True), model.decoder(drafts=True)
    assert first.head is not None and second.head is not None
    first.prefill(ids[:6])
    first.head.first({0: ids[6]})[0]
    first.head.following({0: 100}, 1)[0]
    first.verify([*ids[6:9], 100, 100])
    first.accept(3)
    mark = first.mark()
    first.head.first({0: 50})[0]
    first.verify([50, 60])
    first.accept(2)
    first.rewind(mark)
    first.step([ids[9]])
    second.prefill(ids[:10])
    assert np.abs(first.head.first({0: ids[10]})[0].array - second.head.first({0: ids[10]})[0].array).max() < 1e-4


def test_a_head_of_random_weights_of_the_released_shape_compiles(tiny_bundle: Path) -> None:
    decoder = load(tiny_bundle, threads=2).decoder(drafts=True)
    assert decoder.head is not None
    decoder.prefill([1, 2, 3])
    assert np.isfinite(decoder.head.first({0: 4})[0].array).all()


def test_build_reads_no_more_of_the_head_than_it_needs(demo_checkpoint: Path, tmp_path: Path) -> None:
    whole, narrow = build(demo_checkpoint, tmp_path / "a"), build(demo_checkpoint, tmp_path / "b", draft_vocab=64)
    assert (whole / "model.weights").stat().st_size == (narrow / "model.weights").stat().st_size
