"""Our plugin for TensorRT on a GPU: its kernel alone, as the plugin launches it, and engines that have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qwen_export.engine_options import EngineOptions
from qwen_export.errors import UnsupportedError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.models.eager_sequence import EagerSequence
from qwen_export.graphs.models.load_model import load_decoder
from qwen_export.plugins.native.native_library import find_ptx
from qwen_export.runtimes import SamplingParams, load
from qwen_export.runtimes.backends.tensorrt.delta_net_plugin import STEP, VERIFY, StepFields, launch, pack_ptx, step_plugin
from qwen_export.runtimes.decoding.generation import Request, Statistics
from qwen_export.runtimes.memory.buffers import decode
from qwen_export.runtimes.memory.cuda_buffer import CudaBuffer
from qwen_export.runtimes.memory.cuda_stream import Stream
from qwen_export.runtimes.sampling.sampler import Sampler
from qwen_export.verification.logit_check import TOLERANCE
from tests.conftest import EXAMPLES
from tests.support.cuda_ops import device
from tests.support.family import tiny_config
from tests.support.synthesize import synthesize
from tests.test_native_plugin import DTYPES, TRANSACTIONS, Given, check_transaction, delta_net_inputs, with_transaction
from tests.test_tensorrt_gpu import CAPACITY, Subject, compiled, prompt, same_but_for_ties

pytestmark = pytest.mark.gpu
Array = npt.NDArray[Any]
HEADS = pytest.mark.parametrize(("Hk", "Hv", "D"), [(2, 2, 128), (1, 3, 128), (16, 32, 128), (2, 4, 64), (16, 48, 64)])
SHORT = [(T, P, accepted[:1], commit[:1]) for T, P, accepted, commit in TRANSACTIONS if P > 0 and T <= 9]


class Call:
    """One launch on buffers of its own."""

    def __init__(self, given: Given, Hk: int) -> None:
        (packed, dtype), (state, _) = given["packed"], given["state"]
        _, self.T, _ = packed.shape
        _, Hv, D, _ = state.shape
        self.P = given["pending"][0].shape[1] if "pending" in given else 0
        path = find_ptx(dtype)
        if path is None:
            pytest.skip("plugins/native/build_ptx.sh was not run")
        kernel = f"qwen_delta_net_{'verify' if self.P else 'step'}_{D}"
        eps = int(np.float32(1e-6).view(np.int32))
        self.fields = StepFields(kernel, pack_ptx(path.read_bytes()), self.T, self.P, Hk, Hv, D, eps)
        counts = {"int64": "int32"}
        values = {n: x for n, (x, _) in given.items()}
        self.inputs = {n: device(x, counts.get(given[n][1], given[n][1])) for n, x in values.items() if n not in ("accepted", "commit")}
        for name in ("accepted", "commit"):
            if name in given:
                self.inputs[name] = CudaBuffer("int32", (1,))
                self.inputs[name].write_ints([int(given[name][0][0])])
        history = given["history"][0].shape
        self.outputs = {
            "y": CudaBuffer(dtype, (1, self.T, Hv * D)),
            "history_out": CudaBuffer(dtype, history),
            "state_out": CudaBuffer("float", (1, Hv, D, D)),
        }
        for buffer in self.outputs.values():
            buffer.write(np.full(buffer.nbytes, 0xFF, np.uint8))

    @property
    def addresses(self) -> tuple[list[int], list[int]]:
        return [b.address for b in self.inputs.values()], [b.address for b in self.outputs.values()]

    def results(self) -> dict[str, Array]:
        return {name: decode(b.read(), b.dtype, b.shape).astype(np.float64) for name, b in self.outputs.items()}


def whole(given: Given) -> Given:
    """A plain step as the transaction that it is."""
    packed, dtype = given["packed"]
    none = np.zeros((1, 0, packed.shape[2]))
    return given | {"pending": (none, dtype), "accepted": (np.array([0]), "int64"), "commit": (np.array([packed.shape[1]]), "int64")}


@pytest.mark.parametrize("dtype", ["float", "float16", "bfloat16"])
@HEADS
@pytest.mark.parametrize("T", [1, 2, 9])
def test_a_step(dtype: str, Hk: int, Hv: int, D: int, T: int) -> None:
    given = delta_net_inputs(np.random.default_rng([T, Hv]), dtype, 1, T, Hk, Hv, D)
    call, stream = Call(given, Hk), Stream()
    launch(call.fields, *call.addresses, stream.handle)
    stream.synchronize()
    check_transaction(call.results(), whole(given), Hk, T)


@DTYPES
@HEADS
@pytest.mark.parametrize(("T", "P", "accepted", "commit"), SHORT)
def test_a_verify(dtype: str, Hk: int, Hv: int, D: int, T: int, P: int, accepted: list[int], commit: list[int]) -> None:
    rng = np.random.default_rng([T, P, Hv])
    given = with_transaction(rng, delta_net_inputs(rng, dtype, 1, T, Hk, Hv, D), P, accepted, commit)
    call, stream = Call(given, Hk), Stream()
    launch(call.fields, *call.addresses, stream.handle)
    stream.synchronize()
    check_transaction(call.results(), given, Hk, (T, P))


def test_the_plugin_queues_it_in_a_recording() -> None:
    """enqueue of the IPluginV3 itself, recorded and replayed."""
    api = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    given = delta_net_inputs(np.random.default_rng(0), "float16", 1, 4, 2, 4, 64)
    for kind, values in ((STEP, given), (VERIFY, with_transaction(np.random.default_rng(1), given, 3, [2], [1]))):
        call, stream = Call(values, 2), Stream()
        plugin = step_plugin(api, kind, call.fields).attach_to_context(None)
        recording = stream.record(lambda p=plugin, c=call, s=stream: p.enqueue([], [], *c.addresses, 0, s.handle))  # type: ignore[misc]
        assert np.isnan(call.results()["y"]).all(), "nothing has run yet"
        recording.launch()
        stream.synchronize()
        check_transaction(call.results(), values if kind == VERIFY else whole(values), 2, kind)


# Engines

CHECKPOINTS = {
    "heads-of-64": lambda path: synthesize(tiny_config(value_ratio=2, tied=True, linear_key_head_dim=64, linear_value_head_dim=64), path),
    "demo-dense": lambda path: EXAMPLES / "demo-dense",
}


@pytest.fixture(scope="module", params=list(CHECKPOINTS))
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    directory = tmp_path_factory.mktemp("plugin")
    checkpoint = CHECKPOINTS[request.param](directory / "checkpoint")
    eager = load_decoder(open_checkpoint(checkpoint))
    scale = float(EagerSequence(eager, CAPACITY).read(prompt(eager, 40)).std())
    try:
        bundle = compiled(checkpoint, directory / "bundle", "fp16", engine=EngineOptions(plugins=("gated_delta_net",)))
    except UnsupportedError as error:
        pytest.skip(str(error))
    return Subject(checkpoint, bundle, eager, TOLERANCE["fp16"] * scale)


def test_prompts_steps_and_rollbacks(subject: Subject) -> None:
    ids = prompt(subject.eager, 120)
    decoder = subject.decoder()
    rows, places = [decoder.prefill(ids[:100]).copy()], [99]
    for at in range(100, 108):
        rows.append(decoder.step([ids[at]])[0].copy())
        places.append(at)
    for at, kept in ((108, 2), (110, 0), (110, 4), (114, 1)):
        rows += list(decoder.verify(ids[at : at + 4]).copy())
        places += range(at, at + 4)
        decoder.accept(kept)
    rows.append(decoder.step([ids[115]])[0].copy())
    subject.compare(np.stack(rows), subject.expected(ids)[[*places, 115]])


def test_drafts_change_nothing(subject: Subject) -> None:
    ids, texts = prompt(subject.eager, 40, 3), []
    for how in ("off", 3):
        model = load(subject.bundle, speculate=how)
        texts.append(list(model.generate(Request(ids, Sampler(SamplingParams(greedy=True)), (), 64), Statistics())))
    same_but_for_ties(subject, ids, texts[1], texts[0])


def test_long_texts_stay_near(subject: Subject) -> None:
    """Recorded steps, past the end of a chunk of the prompt form, and a prompt behind them."""
    ids = prompt(subject.eager, 180, 5)
    expected, decoder = subject.expected(ids), subject.decoder()
    rows = [decoder.prefill(ids[:20]).copy(), *(decoder.step([token])[0].copy() for token in ids[20:110])]
    rows.append(decoder.prefill(ids[110:]).copy())
    subject.compare(np.stack(rows), expected[[*range(19, 110), 179]])


def test_the_kernel_is_in_the_engine(subject: Subject) -> None:
    path = find_ptx("float16")
    assert path is not None and pack_ptx(path.read_bytes()).encode() in Path(subject.bundle / "decoder.engine").read_bytes()
