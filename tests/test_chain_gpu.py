"""A Chain on a device beside the nodes that it stands for, and bundles that are made of chains."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qwen_export import build
from qwen_export.plugins.native.native_library import find_library
from qwen_export.plugins.onnxruntime.chain_steps import join_chains
from qwen_export.runtimes import SamplingParams, load
from qwen_export.runtimes.memory.buffers import ELEMENTS, as_bytes, decode
from qwen_export.runtimes.memory.cuda_buffer import CudaBuffer
from qwen_export.verification.layer_check import verify_layers
from qwen_export.verification.logit_check import verify
from tests.support.chains import LayerNodes
from tests.support.cuda_ops import LIMIT, device, error
from tests.support.family import tiny_config
from tests.support.synthesize import synthesize
from tests.support.tiny_tokenizer import write_tiny_tokenizer

pytestmark = pytest.mark.gpu
Array = npt.NDArray[Any]
KINDS = pytest.mark.parametrize(("dtype", "kind"), [("float16", "int4"), ("float16", "plain"), ("bfloat16", "plain")], ids=lambda x: x)
HIDDEN = pytest.mark.parametrize("hidden", [128, 1024, 2048])
FEW = [(1, 1), (1, 2), (1, 3), (2, 1), (1, 4), (1, 8), (4, 2), (8, 1)]
STATES = {"history.next": "history", "state.next": "state"}
# Each of five products rounds its result, and a chain sums in another order.
ROUNDINGS = 4
_graphs = count(1 << 20)


class Nodes:
    """A graph of `LayerNodes` bound to device buffers: as separate nodes, or as a chain."""

    def __init__(self, nodes: LayerNodes, dtype: str, shapes: dict[str, tuple[int, ...]], *, joined: bool, in_place: bool = False) -> None:
        import onnxruntime as ort

        ort.preload_dlls()
        model = nodes.model()
        if joined:
            assert join_chains(model.graph) == 1 and len(model.graph) == 1
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.register_custom_ops_library(str(find_library("cuda")))
        providers = [("CUDAExecutionProvider", {"enable_cuda_graph": "1"}), "CPUExecutionProvider"]
        self._session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=providers)
        self._binding, self._options = self._session.io_binding(), ort.RunOptions()
        self.inputs = {name: device(*given) for name, given in nodes.values.items()}
        self.outputs = {
            name: self.inputs[STATES[name]]
            if in_place and name in STATES
            else CudaBuffer("float" if name == "state.next" else dtype, shape)
            for name, shape in shapes.items()
        }
        for name, buffer in self.inputs.items():
            self._binding.bind_input(name, "cuda", 0, ELEMENTS[buffer.dtype][1], buffer.shape, buffer.address)
        for name, buffer in self.outputs.items():
            self._binding.bind_output(name, "cuda", 0, ELEMENTS[buffer.dtype][1], buffer.shape, buffer.address)
        self.graph("-1")

    def graph(self, number: str) -> None:
        """Which recorded graph the next calls are; "-1": none."""
        self._options.add_run_config_entry("gpu_graph_id", number)

    def launch(self) -> None:
        self._session.run_with_iobinding(self._binding, self._options)

    def run(self) -> dict[str, Array]:
        self.launch()
        return {name: decode(b.read(), b.dtype, b.shape).astype(np.float64) for name, b in self.outputs.items()}


def both(dtype: str, kind: str, B: int, T: int, P: int | None, *, in_place: bool = False, hidden: int = 128, seed: int = 0) -> list[Nodes]:
    """The separate nodes, and the chain."""
    made = []
    for joined in (False, True):
        nodes = LayerNodes(dtype, kind, B, T, P, hidden=hidden, seed=seed)
        made.append(Nodes(nodes, dtype, nodes.shapes(B, T), joined=joined, in_place=in_place))
    return made


def assert_close(got: dict[str, Array], wanted: dict[str, Array], dtype: str, what: object) -> None:
    for name, value in wanted.items():
        assert np.isfinite(value).all(), (what, name)
        assert error(got[name], value) < ROUNDINGS * LIMIT[dtype], (what, name)


@KINDS
@HIDDEN
@pytest.mark.parametrize("P", [None, 0, 7])
def test_few_rows(dtype: str, kind: str, hidden: int, P: int | None) -> None:
    for B, T in FEW:
        separate, chain = both(dtype, kind, B, T, P, hidden=hidden)
        wanted = separate.run()
        for call in range(3):
            assert_close(chain.run(), wanted, dtype, (B, T, call))


@KINDS
@pytest.mark.parametrize("P", [None, 7])
def test_prompts_have_the_bits_of_separate_nodes(dtype: str, kind: str, P: int | None) -> None:
    for B, T in ((1, 9), (3, 4), (1, 40), (2, 300)):
        separate, chain = both(dtype, kind, B, T, P, hidden=2048)
        wanted, got = separate.run(), chain.run()
        for name, value in wanted.items():
            np.testing.assert_array_equal(got[name], value, err_msg=f"{B} {T} {name}")


def test_formats_that_no_launch_takes_have_the_bits_of_separate_nodes() -> None:
    separate, chain = both("float16", "int8", 1, 2, 3, hidden=2048)
    wanted, got = separate.run(), chain.run()
    for name, value in wanted.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@KINDS
@HIDDEN
@pytest.mark.parametrize("recorded", [False, True])
def test_states_in_place(dtype: str, kind: str, hidden: int, recorded: bool) -> None:
    """States of one call are read by the next, as a decoder has them, in calls and in recorded ones."""
    for B, T in ((1, 1), (1, 2), (2, 1)):
        separate, chain = both(dtype, kind, B, T, 3, in_place=True, hidden=hidden)
        if recorded:
            chain.graph(str(next(_graphs)))
            states = {name: chain.inputs[name].read() for name in STATES.values()}
            chain.launch()  # recording runs it more than once, and each run goes on from the states of the one before
            for name, state in states.items():
                chain.inputs[name].write(state)
        for call in range(5):
            wanted = separate.run()
            assert_close(chain.run(), wanted, dtype, (B, T, call))


@KINDS
def test_controls_are_read_by_the_device(dtype: str, kind: str) -> None:
    separate, chain = both(dtype, kind, 1, 2, 4, hidden=2048)
    chain.graph(str(next(_graphs)))
    chain.run(), chain.run()
    for accepted, commit in ((0, 0), (4, 2), (1, 1)):
        for nodes in (separate, chain):
            nodes.inputs["accepted"].write(as_bytes(np.array([accepted])))
            nodes.inputs["commit"].write(as_bytes(np.array([commit])))
        got, wanted = chain.run(), separate.run()
        if commit == 1:  # outputs behind a commit in the middle are unspecified
            got, wanted = ({name: v[:, :1] if name in ("output", "after") else v for name, v in seen.items()} for seen in (got, wanted))
        assert_close(got, wanted, dtype, (accepted, commit))


@KINDS
def test_two_chains_at_once(dtype: str, kind: str) -> None:
    """Sessions of two threads share the device."""
    pairs = [both(dtype, kind, 1, 1, None, hidden=2048, seed=seed) for seed in (1, 2)]
    firsts = [chain.run() for _, chain in pairs]
    for (separate, _), first in zip(pairs, firsts, strict=True):
        assert_close(first, separate.run(), dtype, "alone")

    def many(chain: Nodes) -> None:
        for _ in range(200):
            chain.launch()

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(many, [chain for _, chain in pairs]))
    for (_, chain), first in zip(pairs, firsts, strict=True):
        for name, value in chain.run().items():
            np.testing.assert_array_equal(value, first[name], err_msg=name)


# ---- bundles ----


@pytest.mark.parametrize("precision", ["int4", "bf16"])
def test_a_bundle_is_right_layer_by_layer(precision: str, tmp_path: Path) -> None:
    """As wide as models whose steps and verifies have chains in few launches; the check reads values inside of them."""
    sizes = {"hidden_size": 2048, "intermediate_size": 1024, "linear_key_head_dim": 64, "linear_value_head_dim": 64}
    checkpoint = synthesize(tiny_config(vision=False, **sizes), tmp_path / "c", tokenizer=write_tiny_tokenizer(tmp_path / "tokenizer"))
    bundle = build(checkpoint, tmp_path / "bundle", device="cuda", precision=precision, max_context=128)
    result = verify(bundle, checkpoint)
    assert result["passed"], "\n".join(map(str, result["checks"]))
    layers = verify_layers(bundle, checkpoint)
    assert layers["passed"], layers["layers"]


@pytest.mark.parametrize("precision", ["int4", "fp16"])
def test_drafts_change_no_token(demo_checkpoint: Path, tmp_path: Path, precision: str) -> None:
    bundle = build(demo_checkpoint, tmp_path / "bundle", device="cuda", precision=precision, max_context=256)
    texts = []
    for speculate in ("off", 1, 3):
        with load(bundle, speculate=speculate) as model:
            texts.append("".join(model.complete("import os\n\n\ndef read(", sampling=SamplingParams(temperature=0), max_new_tokens=48)))
    assert texts == texts[:1] * 3
