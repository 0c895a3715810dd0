"""Transactions on the CPU: the plugin's kernel against the eager op in float64, and graphs of both lowerings against plain reading."""

from __future__ import annotations

import dataclasses
import platform
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_export.building.pass_pipeline import run_passes
from qwen_export.graphs.capture import capture_decoder
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.checkpoint.checkpoint_reader import CheckpointReader
from qwen_export.graphs.config import TextConfig, parse_config
from qwen_export.graphs.models.eager_sequence import EagerSequence
from qwen_export.graphs.models.load_model import load_decoder
from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.graphs.weights.weight_writer import write_weights
from qwen_export.plugins.native import native_library as native
from qwen_export.plugins.onnxruntime.onnxruntime_choices import choose
from qwen_export.runtimes.backends.onnxruntime.onnxruntime_kernels import Kernels, installed
from qwen_export.targets import ONNXRUNTIME
from tests.support import cpu_delta_net as op
from tests.support.cpu_delta_net import Case, Shape, make_case
from tests.support.family import tiny_config
from tests.support.instruction_sets import check_in_instruction_set
from tests.support.kernel_families import lengths

ROOT = Path(__file__).parent.parent
SHORT = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The CPU plugin; built here where it is not, if there are headers to build it with."""
    found = native.find_library("cpu")
    if found is None:
        built = subprocess.run([ROOT / "plugins/native/cpu/build.sh"], capture_output=True, text=True)
        if built.returncode:
            pytest.skip(f"the CPU plugin does not build here: {built.stderr.strip().splitlines()[-1]}")
        found = native.find_library("cpu")
    assert found is not None
    return str(found)


# ---- the op


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape = Shape(
        Hk=draw(st.integers(1, 3)),
        ratio=draw(st.sampled_from([1, 2, 3, 4, 8])),
        Dk=draw(st.sampled_from([4, 16, 20, 32, 64])),
        Dv=draw(st.sampled_from([4, 16, 20, 32, 64])),
        K=draw(st.integers(2, 4)),
    )
    B, T, P = draw(st.integers(1, 3)), draw(st.integers(1, 9) | st.integers(20, 80)), draw(st.integers(0, 9))
    complete = draw(st.booleans())
    accepted = [draw(st.integers(0, P)) for _ in range(B)] if complete else None
    commit = [draw(st.sampled_from([0, T]) | st.integers(0, T)) for _ in range(B)] if complete else None
    return make_case(shape, B, T, P, accepted, commit, seed=draw(st.integers(0, 1000)), hard=draw(st.booleans()))


@SHORT
@given(case=cases())
def test_a_transaction_is_what_the_eager_op_says(library: str, case: Case) -> None:
    """In place too, with NaN in every pending row that was not accepted, and in y before the call."""
    op.check_case(library, case)


@pytest.mark.parametrize("shape", [Shape(), Shape(ratio=3, Dk=20, Dv=12, K=2), Shape(Hk=1, ratio=2, Dk=128, Dv=128)], ids=str)
def test_the_bits_of_a_token_do_not_depend_on_its_call(library: str, shape: Shape) -> None:
    op.check_bits(library, shape)


def test_a_long_verify_commits_nothing(library: str) -> None:
    """Pending tokens, then more new ones than are prepared at a time, none of which may enter the state."""
    check = make_case(Shape(ratio=2, Dk=32, Dv=32), 2, 75, 40, [40, 33], [0, 0])
    op.check_case(library, check)
    cut = op.call(library, check.replaced(qkvz=check.tensors["qkvz"][:, :1], ab=check.tensors["ab"][:, :1]))
    whole = op.call(library, check)
    for name in ("conv_history_out", "state_out"):
        assert np.array_equal(whole[name], cut[name]), name
    assert np.array_equal(whole["y"][:, :1], cut["y"])


def test_a_long_call_is_a_row_of_short_ones(library: str) -> None:
    """Bit for bit, wherever a prompt is split. Keys share a direction, betas are near 1, decays go from 1 to nothing."""
    T = 300
    case = make_case(Shape(Hk=1, ratio=2, Dk=128, Dv=128), 1, T, 0, None, None, seed=T, hard=True)
    wanted, got = op.expected(case), op.call(library, case)
    qkvz, ab, states = case.tensors["qkvz"], case.tensors["ab"], {name: case.tensors[name] for name in ("conv_history", "state")}
    rows = []
    for start in range(0, T, 37):
        part = op.call(library, case.replaced(qkvz=qkvz[:, start : start + 37], ab=ab[:, start : start + 37], **states))
        states = {"conv_history": part["conv_history_out"], "state": part["state_out"]}
        rows.append(part["y"])
    for name, parts in {
        "y": np.concatenate(rows, axis=1),
        "state_out": states["state"],
        "conv_history_out": states["conv_history"],
    }.items():
        assert np.array_equal(got[name], parts), name
        assert op.error(got[name], wanted[name]) < 3e-6, name


def test_what_follows_the_committed_tokens_of_a_long_call_leaves_no_trace(library: str) -> None:
    """A ragged batch: each sequence ends where it ends alone."""
    lengths = [100, 3, 57, 1]
    batch = make_case(Shape(ratio=2, Dk=32, Dv=32), len(lengths), 100, 0, [0] * len(lengths), lengths)
    for b, length in enumerate(lengths):
        batch.tensors["qkvz"][b, length:] = np.nan
        batch.tensors["ab"][b, length:] = np.nan
    together = op.call(library, batch)
    for b, length in enumerate(lengths):
        one = {name: batch.tensors[name][b : b + 1] for name in ("conv_history", "state")}
        alone = op.call(
            library,
            batch.replaced(
                qkvz=batch.tensors["qkvz"][b : b + 1, :length],
                ab=batch.tensors["ab"][b : b + 1, :length],
                **one,
                **dict.fromkeys(op.TRANSACTION),
            ),
        )
        assert np.array_equal(together["y"][b, :length], alone["y"][0])
        for name in ("conv_history_out", "state_out"):
            assert np.array_equal(together[name][b], alone[name][0])


def test_sequences_of_a_batch_do_not_see_each_other(library: str) -> None:
    """Each has counts of its own, and one is idle: the same bits as alone, and an idle state is unchanged."""
    accepted, commit = [4, 0, 2, 0, 1], [3, 0, 0, 3, 1]
    batch = make_case(Shape(ratio=2, Dk=32, Dv=32), 5, 3, 4, accepted, commit, seed=1)
    op.check_case(library, batch)
    together = op.call(library, batch)
    for b in range(5):
        rows = {name: batch.tensors[name][b : b + 1] for name in ("qkvz", "ab", "conv_history", "state", *op.TRANSACTION)}
        alone = op.call(library, batch.replaced(**rows))
        assert np.array_equal(together["y"][b, : commit[b] or None], alone["y"][0, : commit[b] or None]), b
        for name in ("conv_history_out", "state_out"):
            assert np.array_equal(together[name][b], alone[name][0]), (b, name)
    assert np.array_equal(together["state_out"][1], batch.tensors["state"][1])
    assert np.array_equal(together["conv_history_out"][1], batch.tensors["conv_history"][1])


@pytest.mark.parametrize(("T", "P", "accepted", "commit"), [(5, 4, 3, 2), (100, 0, 0, 100)])
def test_threads_do_not_change_bits(library: str, T: int, P: int, accepted: int, commit: int) -> None:
    case = make_case(Shape(ratio=3, Dk=32, Dv=32), 2, T, P, [accepted, 0], [commit, 0])
    for name, value in op.call(library, case, threads=1).items():
        assert np.array_equal(value, op.call(library, case, threads=2)[name]), name


@pytest.mark.parametrize("isa", ["base", "avx2"])
def test_other_instruction_sets(library: str, isa: str) -> None:
    """The best one of this machine is what the other tests run."""
    if platform.machine() != "x86_64":
        pytest.skip("one instruction set on this machine")
    check_in_instruction_set(op, library, isa)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"accepted": np.array([3, 0])}, "accepted must be in 0..P"),
        ({"commit": np.array([0, 4])}, "commit in 0..T"),
        ({"commit": np.array([-1, 0])}, "commit in 0..T"),
        ({"pending_ab": np.zeros((2, 1, 4), np.float32)}, "pending_ab is not"),
        ({"conv_history": np.zeros((2, 2, 96), np.float32)}, "conv_history is not"),
    ],
)
def test_counts_and_shapes_that_do_not_fit_are_refused(library: str, change: dict[str, Any], sentence: str) -> None:
    case = make_case(Shape(), 2, 3, 2, [0, 0], [0, 0]).replaced(**change)
    with pytest.raises(Exception, match=sentence):
        op.call(library, case)


# ---- the graphs


def kernels(*, plugin: bool) -> Kernels:
    probed = installed("cpu")
    assert probed is not None
    return native.with_native(probed) if plugin else probed


def lowered(config: TextConfig, *, plugin: bool, pending: bool) -> ir.Model:
    """The decoder for the CPU, with its pending tensors where `pending`."""
    choices, refused = choose(kernels(plugin=plugin), "fp32", config)
    assert not refused
    assert choices["gated_delta_net"].name == ("plugin_cpu" if plugin else "builtin_cpu")
    model = capture_decoder(config, "fp32")
    passes = tuple(step for step in ONNXRUNTIME.passes if not (pending and step.name == "fold_transaction"))
    run_passes(model, dataclasses.replace(ONNXRUNTIME, passes=passes), PassContext(config, "fp32", choices), None)
    return model


def names(values: Any) -> list[str]:
    return [value.name or "" for value in values]


@pytest.mark.parametrize("pending", [False, True])
def test_a_mixer_is_four_nodes(library: str, pending: bool) -> None:
    config = parse_config(tiny_config()).text
    graph = lowered(config, plugin=True, pending=pending).graph
    counts = Counter(f"{node.domain}.{node.op_type}" for node in graph)
    linear, full = 3, 1
    assert counts["qwen.native.DeltaNetTransaction"] == linear
    # q|k|v|z, a|b, out and down; q, gate, k, v, out and down of the attention layer; the head
    assert counts["qwen.native.Linear"] == 4 * linear + 6 * full + 1
    assert counts["qwen.native.SwiGlu"] == linear + full
    assert not counts.keys() & {".Split", ".Concat", ".Slice"}
    for node in graph:
        if node.op_type == "DeltaNetTransaction":
            assert len(node.inputs) == (12 if pending else 8)


def test_pending_tensors_of_the_packed_form(library: str) -> None:
    config = parse_config(tiny_config()).text
    graph = lowered(config, plugin=True, pending=True).graph
    layer = ["conv_history", "recurrent", "pending_qkvz", "pending_ab"]
    states = [f"layers.{i}.{key}" for i in range(3) for key in layer] + ["layers.3.k_cache", "layers.3.v_cache"]
    assert [name for name in names(graph.inputs) if name.startswith("layers.")] == states
    assert [name for name in names(graph.outputs) if name.startswith("layers.")] == [f"{name}.next" for name in states]
    assert {"accepted", "commit"} < set(names(graph.inputs))
    assert "hidden" in names(graph.outputs)
    shapes = {value.name: [d if isinstance(d, int) else d.value for d in value.shape or ()] for value in [*graph.inputs, *graph.outputs]}
    for key, width in (("pending_qkvz", config.conv_dim + config.value_dim), ("pending_ab", 2 * config.linear_num_value_heads)):
        assert shapes[f"layers.1.{key}"] == ["B", "P", width]
        assert shapes[f"layers.1.{key}.next"] == ["B", "T", width]


@dataclass
class Sequence:
    """Drives a lowered decoder with pending tokens as a speculative loop does, in numpy."""

    session: ort.InferenceSession
    tables: dict[str, np.ndarray]
    states: dict[str, np.ndarray] = field(default_factory=dict)
    length: int = 0
    accepted: int = 0

    def __post_init__(self) -> None:
        dims = {"B": 1, "S": self.tables["cos"].shape[0], "P": 0}
        for spec in self.session.get_inputs():
            if spec.name.startswith("layers."):
                self.states[spec.name] = np.zeros([dims.get(d, d) for d in spec.shape], np.float32)

    def call(self, ids: list[int], commit: int) -> np.ndarray:
        """Logits [T,V] of new tokens. `commit` of them enter the states, all others stay open."""
        T = len(ids)
        feeds = {
            "input_ids": np.array([ids]),
            **self.tables,
            **lengths(self.session, [self.length], T),
            "accepted": np.array([self.accepted]),
            "commit": np.array([commit]),
            "logit_rows": np.arange(T),
            **self.states,
        }
        outputs = [spec.name for spec in self.session.get_outputs()]
        made = dict(zip(outputs, self.session.run(None, feeds), strict=True))
        for name in self.states:
            self.states[name] = made[f"{name}.next"]
        self.length += commit
        self.accepted = 0
        return np.asarray(made["logits"])

    def accept(self, count: int) -> None:
        """After a call that committed nothing: keep `count` of its tokens. What is left open becomes garbage."""
        self.accepted = count
        self.length += count
        for name, value in self.states.items():
            if ".pending_" in name:
                value[:, count:] = np.nan


def opened(checkpoint: Path, directory: Path, *, plugin: str | None) -> ort.InferenceSession:
    source = open_checkpoint(checkpoint)
    model = lowered(source.config.text, plugin=plugin is not None, pending=True)
    with CheckpointReader(source) as reader:
        write_weights([model], reader, directory / "weights")
    for node in model.graph:
        model.opset_imports.setdefault(node.domain, 1)
    ir.save(model, directory / "graph.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if plugin:
        options.register_custom_ops_library(plugin)
    return ort.InferenceSession(directory / "graph.onnx", options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module", params=["plugin_cpu", "builtin_cpu"])
def decoder(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ort.InferenceSession:
    """The tiny decoder with pending tensors, in each of the lowerings."""
    plugin = request.getfixturevalue("library") if request.param == "plugin_cpu" else None
    return opened(tiny_checkpoint, tmp_path_factory.mktemp(request.param), plugin=plugin)


_CAPACITY = 64


@pytest.fixture(scope="module")
def eager(tiny_checkpoint: Path) -> Any:
    return load_decoder(open_checkpoint(tiny_checkpoint))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_reading_with_transactions_is_reading(decoder: ort.InferenceSession, eager: Any, data: st.DataObject) -> None:
    """Prompts, verifies with any number accepted, and steps between them: the logits are those of the tokens that were kept."""
    plain = EagerSequence(eager, _CAPACITY)
    sequence = Sequence(decoder, {"cos": plain.cos.numpy(), "sin": plain.sin.numpy()})
    rng = np.random.default_rng(data.draw(st.integers(0, 100)))
    kept: list[int] = []
    shown: list[np.ndarray] = []
    for _ in range(data.draw(st.integers(2, 6))):
        T = data.draw(st.integers(1, 9))
        ids = rng.integers(0, 512, T).tolist()
        verify = data.draw(st.booleans())
        logits = sequence.call(ids, 0 if verify else T)
        count = data.draw(st.integers(0, T)) if verify else T
        if verify:
            sequence.accept(count)
        kept += ids[:count]
        shown.append(logits[:count])
    if kept:
        wanted = plain.read(kept)
        assert np.abs(np.concatenate(shown) - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_a_commit_in_the_middle_of_a_call(decoder: ort.InferenceSession, eager: Any) -> None:
    """The states are those after the committed tokens, whatever follows them in the call."""
    plain = EagerSequence(eager, _CAPACITY)
    tables = {"cos": plain.cos.numpy(), "sin": plain.sin.numpy()}
    for commit in range(1, 7):
        whole, short = Sequence(decoder, tables), Sequence(decoder, tables)
        whole.call([5, 6, 7, 8, 9, 10], commit)
        short.call([5, 6, 7, 8, 9, 10][:commit], commit)
        for name in ("conv_history", "recurrent"):
            assert np.array_equal(whole.states[f"layers.0.{name}"], short.states[f"layers.0.{name}"]), commit
