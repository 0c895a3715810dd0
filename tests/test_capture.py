"""Capture and lowering without weights: every size of the family, the graphs as text, and what is refused."""

from __future__ import annotations

import re
import resource
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextRotaryEmbedding

from qwen_export.building.build_plan import plan_build
from qwen_export.building.pass_pipeline import print_graph, run_passes
from qwen_export.errors import UnsupportedError
from qwen_export.graphs.capture import capture_decoder
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.config import FULL, LINEAR, parse_config
from qwen_export.graphs.passes.pass_context import PassContext
from qwen_export.graphs.rotary import rotary_frequencies
from qwen_export.graphs.weights.expression import weight_of
from qwen_export.plugins.onnxruntime.onnxruntime_choices import CHOICES, OPTIONAL, choose
from qwen_export.plugins.onnxruntime.recorded_kernels import recorded
from qwen_export.runtimes.backends.onnxruntime.onnxruntime_kernels import installed
from qwen_export.targets import ONNXRUNTIME
from tests.support.family import FAMILY, tiny_config

GOLDEN = Path(__file__).parent / "data" / "golden"
DENSE = ("0.8B", "2B", "4B", "9B", "27B")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}

Lowered = Callable[..., ir.Model]


def lower(raw: dict[str, Any], device: str, precision: str, dump: Path | None = None) -> ir.Model:
    """The target graph of a configuration on ONNX Runtime's own kernels, for CUDA the recorded ones."""
    config = parse_config(raw).text
    kernels = installed(device) if device == "cpu" else recorded(device)
    assert kernels is not None
    choices, refused = choose(kernels, precision, config)
    assert not refused
    model = capture_decoder(config, precision)
    run_passes(model, ONNXRUNTIME, PassContext(config, precision, choices), dump)
    return model


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phases of the tiny decoder on its way to the CPU; filled by `lowered`."""
    return tmp_path_factory.mktemp("dump") / "ir"


@pytest.fixture(scope="module")
def lowered(dump: Path) -> Lowered:
    """`lower` of `tiny_config(**options)`, each once."""
    made: dict[str, ir.Model] = {"('cpu', 'fp32', [])": lower(tiny_config(), "cpu", "fp32", dump)}

    def get(device: str = "cpu", precision: str = "fp32", **options: Any) -> ir.Model:
        key = repr((device, precision, sorted(options.items())))
        if key not in made:
            made[key] = lower(tiny_config(**options), device, precision)
        return made[key]

    return get


def op_counts(model: ir.Model) -> Counter[str]:
    return Counter(f"{node.domain}.{node.op_type}".removeprefix(".") for node in model.graph)


def producer(value: ir.Value | None) -> ir.Node:
    node = value.producer() if value is not None else None
    assert node is not None
    return node


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers were traced, for each call of torch.export."""
    real = torch.export.export
    counts: list[int] = []

    def export(module: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
        counts.append(sum(name.count(".") == 1 and name.startswith("layers.") for name, _ in module.named_modules()))
        return real(module, *arguments, **options)

    monkeypatch.setattr(torch.export, "export", export)
    return counts


# ---- every size

# Nodes of one layer, MLP and norms included, and of what stands around the layers.
LAYER_NODES = {"cpu": {LINEAR: 21, FULL: 21}, "cuda": {LINEAR: 20, FULL: 13}}
OUTER_NODES = {"cpu": 5, "cuda": 6}
LIMIT = {LINEAR: 27, FULL: 26}


@pytest.mark.parametrize(
    ("size", "device", "precision"),
    [
        ("0.8B", "cpu", "fp32"),
        pytest.param("2B", "cuda", "fp16", marks=pytest.mark.slow),
        ("4B", "cuda", "bf16"),
        pytest.param("9B", "cpu", "fp32", marks=pytest.mark.slow),
        pytest.param("27B", "cuda", "fp16", marks=pytest.mark.slow),
    ],
)
def test_every_dense_size_lowers_without_weights(size: str, device: str, precision: str, traced: list[int]) -> None:
    before = peak_bytes()
    model = lower(FAMILY[size], device, precision)
    assert traced == [2], "one layer of each kind, whatever the size"
    assert peak_bytes() - before < 600 << 20
    weights = [weight_of(value) for value in model.graph.initializers.values()]
    assert sum(weight.nbytes for weight in weights if weight is not None) > 1e9
    held = [value for value in model.graph.initializers.values() if weight_of(value) is None]
    assert sum(value.const_value.nbytes for value in held if value.const_value is not None) < 4096
    assert not [node.op_type for node in model.graph if node.domain == "qwen"]
    kinds = Counter(parse_config(FAMILY[size]).text.layer_types)
    assert len(model.graph) == OUTER_NODES[device] + sum(count * LAYER_NODES[device][kind] for kind, count in kinds.items())


def test_the_sizes_above_are_all_there_are() -> None:
    assert [name for name, raw in FAMILY.items() if not parse_config(raw).text.is_moe] == [*DENSE, "3.6-27B"]
    # The 3.6 release differs in what it says about itself, not in what is computed.
    assert parse_config(FAMILY["3.6-27B"]).text == parse_config(FAMILY["27B"]).text


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# ---- op counts

MLP = {"com.microsoft.FusedMatMul": 3, "com.microsoft.QuickGelu": 1, "Mul": 1}
NORMS = {"com.microsoft.SkipSimplifiedLayerNormalization": 2}
# Embedding, first norm, the choice of rows (2 nodes), the head.
OUTSIDE = {
    "Gather": 2,
    "SimplifiedLayerNormalization": 1,
    "Reshape": 1,
    "com.microsoft.FusedMatMul": 1,
}
LAYERS: dict[tuple[str, str], dict[str, int]] = {
    ("cpu", LINEAR): {
        "com.microsoft.FusedMatMul": 5,
        "com.microsoft.CausalConvWithState": 1,
        "Split": 2,
        "Reshape": 2,
        "SimplifiedLayerNormalization": 1,
        "com.microsoft.LinearAttentionGate": 1,
        "com.microsoft.LinearAttention": 1,
        "com.microsoft.GatedRMSNorm": 1,
    },
    ("cpu", FULL): {
        "com.microsoft.FusedMatMul": 5,
        "Reshape": 4,
        "SimplifiedLayerNormalization": 2,
        "com.microsoft.GroupQueryAttention": 1,
        "Sigmoid": 1,
        "Mul": 1,
    },
    ("cuda", LINEAR): {
        "com.microsoft.FusedMatMul": 2,
        "com.microsoft.CausalConvWithState": 1,
        "Split": 3,
        "Cast": 1,
        "Reshape": 4,
        "com.microsoft.GatedDeltaNet": 1,
        "com.microsoft.GatedRMSNorm": 1,
    },
    ("cuda", FULL): {"com.microsoft.FusedMatMul": 3, "com.microsoft.GroupQueryAttention": 1, "Sigmoid": 1, "Mul": 1},
}


@pytest.mark.parametrize(("device", "precision"), [("cpu", "fp32"), ("cuda", "fp16")])
def test_nodes_of_a_layer(device: str, precision: str, lowered: Lowered) -> None:
    """Linear, linear, linear, full against linear, full: the difference is two linear layers, and what is left beside a layer of each kind
    stands outside the layers."""
    four, two = op_counts(lowered(device, precision)), op_counts(lowered(device, precision, layers=2, layer_types=[LINEAR, FULL]))
    layer = {kind: Counter(LAYERS[device, kind]) + Counter(MLP) + Counter(NORMS) for kind in (LINEAR, FULL)}
    outside = Counter(OUTSIDE) + Counter({"Cast": precision != "fp32"})
    assert four == two + layer[LINEAR] + layer[LINEAR]
    assert two == outside + layer[LINEAR] + layer[FULL]
    assert outside.total() == OUTER_NODES[device]
    for kind in (LINEAR, FULL):
        assert layer[kind].total() == LAYER_NODES[device][kind] <= LIMIT[kind]


def test_the_kernels_of_each_choice_are_what_the_graph_is_made_of(lowered: Lowered) -> None:
    """With ONNX Runtime's own kernels. test_native_plugin_build.py has those of this project, test_moe.py experts."""
    for device, precision, options in GOLDENS.values():
        choices, _ = choose(recorded(device), precision, parse_config(tiny_config(**options)).text)
        assert choices.keys() == CHOICES[device].keys() - {"moe", *OPTIONAL}
        found = {(node.domain, node.op_type) for node in lowered(device, precision, **options).graph}
        for choice in choices.values():
            assert {(kernel.domain, kernel.op) for kernel in choice.kernels} <= found


# ---- goldens

GOLDENS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "cpu_fp32": ("cpu", "fp32", {}),
    "cuda_fp16": ("cuda", "fp16", {}),
    "cuda_bf16_tied": ("cuda", "bf16", {"tied": True}),
}


@pytest.mark.parametrize("name", GOLDENS)
def test_the_graph_is_the_golden_one(name: str, lowered: Lowered, update_golden: bool) -> None:
    device, precision, options = GOLDENS[name]
    check_golden(name, lowered(device, precision, **options), update_golden)


def test_the_captured_graph_is_the_golden_one(update_golden: bool, captured: ir.Model) -> None:
    check_golden("captured_fp32", captured, update_golden)


def check_golden(name: str, model: ir.Model, update: bool) -> None:
    path, text = GOLDEN / f"{name}.txt", numbered(model.graph)
    if update:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), "when the change is meant: pytest tests/test_capture.py --update-golden"


def numbered(graph: ir.Graph) -> str:
    """The graph as text. Values that torch named are numbered instead: their names change with its version."""
    given = {value.name for value in graph.outputs}
    made = [value.name or "" for node in graph for value in node.outputs]
    torchs = [name for name in made if name and name not in given and not name.startswith("layers.")]
    numbers = {name: f"%{i}" for i, name in enumerate(torchs)}
    return re.sub(r"(?<![=\w.])[\w.]+", lambda word: numbers.get(word[0], word[0]), print_graph(graph))


def test_dump_writes_one_file_per_phase(dump: Path, lowered: Lowered) -> None:
    phases = ["captured", *(step.name for step in ONNXRUNTIME.passes)]
    assert sorted(file.name for file in dump.iterdir()) == [*(f"{i:02d}_{name}.txt" for i, name in enumerate(phases)), "passes.txt"]
    assert (dump / f"{len(phases) - 1:02d}_{phases[-1]}.txt").read_text() == print_graph(lowered().graph)
    texts = [(dump / f"{i:02d}_{name}.txt").read_text() for i, name in enumerate(phases)]
    changed = {name for name, before, after in zip(phases[1:], texts, texts[1:], strict=False) if before != after}
    assert {"fold_transaction", "recognize_linear", "lower_mixers", "fuse_residual_norm", "lower_simple_ops"} <= changed


# ---- the shape of the graph


@pytest.fixture(scope="module")
def captured() -> ir.Model:
    """The tiny decoder before any pass."""
    return capture_decoder(parse_config(tiny_config()).text, "fp32")


def names(values: Sequence[ir.Value]) -> list[str]:
    return [value.name or "" for value in values]


def test_pending_inputs_are_captured_and_folded_away(captured: ir.Model, lowered: Lowered) -> None:
    transaction = {"accepted", "commit", "layers.0.pending_qkv", "layers.2.pending_b", "layers.2.pending_a"}
    assert transaction <= set(names(captured.graph.inputs))
    assert {"hidden", "layers.0.pending_qkv.next"} <= set(names(captured.graph.outputs))
    assert Counter(node.op_type for node in captured.graph if node.domain == "qwen") == {
        "rms_norm": 9,
        "gated_delta_net": 3,
        "gated_attention": 1,
    }
    for device, precision in (("cpu", "fp32"), ("cuda", "fp16")):
        graph = lowered(device, precision).graph
        everything = [*names(graph.inputs), *names(graph.outputs)]
        assert not [name for name in everything if "pending" in name or name in ("accepted", "commit", "hidden", "length")]
        states = [name.removesuffix(".next") for name in names(graph.outputs) if name.endswith(".next")]
        assert states == [name for name in names(graph.inputs) if name.startswith("layers.")]


@pytest.mark.parametrize(("name", "dtype"), [("cpu_fp32", "FLOAT"), ("cuda_fp16", "FLOAT16"), ("cuda_bf16_tied", "BFLOAT16")])
def test_dtypes_of_the_signature(name: str, dtype: str, lowered: Lowered) -> None:
    device, precision, options = GOLDENS[name]
    graph = lowered(device, precision, **options).graph
    for value in [*graph.inputs, *graph.outputs]:
        name = (value.name or "").removesuffix(".next").rsplit(".", 1)[-1]
        if name in ("recurrent", "logits"):
            assert value.dtype == ir.DataType.FLOAT
        elif name in ("conv_history", "k_cache", "v_cache", "cos", "sin"):
            assert value.dtype == ir.DataType[dtype]
    decay = [value for name, value in graph.initializers.items() if "A_log" in name or "dt_bias" in name]
    assert len(decay) == 6
    assert {value.dtype for value in decay} == {ir.DataType.FLOAT}


@pytest.mark.parametrize("name", GOLDENS)
def test_only_wanted_rows_reach_the_head(name: str, lowered: Lowered) -> None:
    device, precision, options = GOLDENS[name]
    graph, tied = lowered(device, precision, **options).graph, bool(options)
    logits = graph.outputs[0]
    assert logits.name == "logits"
    assert [str(d.value) if isinstance(d, ir.SymbolicDim) else d for d in logits.shape or ()] == ["N", 512]
    head = producer(logits)
    head = producer(head.inputs[0]) if head.op_type == "Cast" else head
    weight = head.inputs[1]
    assert head.op_type == "FusedMatMul"
    assert weight is not None
    assert weight.name == ("embed_tokens.weight" if tied else "lm_head.weight")
    assert ("lm_head.weight" in graph.initializers) is not tied
    gather = producer(head.inputs[0])
    assert gather.op_type == "Gather"
    assert gather.attributes.get_int("axis") == 0
    assert producer(gather.inputs[0]).op_type == "Reshape"
    assert "logit_rows" in names(sources(gather.inputs[1]))


def sources(value: ir.Value | None) -> list[ir.Value]:
    """The graph inputs that a value is made from."""
    if value is None:
        return []
    node = value.producer()
    if node is None:
        return [value]
    return [source for inner in node.inputs for source in sources(inner)]


def test_rope_scaling_changes_tables_not_graphs(lowered: Lowered) -> None:
    """YaRN, the flat layout and the default rope share one graph: the frequencies travel in the manifest."""
    config = tiny_config(vision=False)
    config["rope_parameters"] = {**config["rope_parameters"], **YARN}
    assert print_graph(lower(config, "cpu", "fp32").graph) == print_graph(lowered().graph)


# ---- rotary tables


TUNED = {**YARN, "truncate": False, "beta_fast": 24.0, "attention_factor": 1.25}


@pytest.mark.parametrize("scaling", [{}, YARN, TUNED], ids=["default", "yarn", "tuned"])
@pytest.mark.parametrize("make", [lambda: FAMILY["0.8B"]["text_config"], lambda: tiny_config(vision=False)], ids=["0.8B", "tiny"])
def test_rotary_tables_equal_those_of_transformers(make: Callable[[], dict[str, Any]], scaling: dict[str, Any]) -> None:
    raw = {**make(), "architectures": ["Qwen3_5ForCausalLM"], "max_position_embeddings": 262144}
    raw["rope_parameters"] = {**raw["rope_parameters"], **scaling}
    config = parse_config(raw).text
    inv_freq, factor = rotary_frequencies(config)
    frequencies = np.asarray(inv_freq, np.float32)
    theirs = Qwen3_5TextRotaryEmbedding(Qwen3_5TextConfig(**{k: v for k, v in raw.items() if k != "architectures"}))
    # Equal bit for bit where torch's power function is correctly rounded; it need not be on every processor.
    np.testing.assert_array_max_ulp(frequencies, theirs.inv_freq.numpy(), maxulp=1)
    assert factor == pytest.approx(theirs.attention_scaling, rel=1e-12)

    positions = np.unique([*range(64), 4095, 32768, 262143, 262144, 299999, 300000, *np.random.default_rng(0).integers(0, 300000, 500)])
    cos, sin = theirs(torch.zeros(1), torch.from_numpy(positions)[None, None].expand(3, 1, -1))
    angles = positions.astype(np.float32)[:, None] * frequencies
    half = config.rotary_dim // 2
    # A last bit of a frequency is up to 0.02 radians at position 300000.
    slack = 1e-6 + 3 * positions[:, None] * np.abs(frequencies - theirs.inv_freq.numpy())
    for mine, expected in ((np.cos(angles), cos), (np.sin(angles), sin)):
        assert (np.abs(mine.astype(np.float64) * factor - expected[0, :, :half].numpy()) <= slack).all()
        np.testing.assert_array_equal(expected[0, :, :half], expected[0, :, half:])


# ---- refusals

Checkpoints = Callable[..., Path]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_on_the_cpu_is_refused_with_every_missing_kernel(precision: str, tiny_checkpoint: Path) -> None:
    with pytest.raises(UnsupportedError) as refusal:
        plan_build(open_checkpoint(tiny_checkpoint), precision=precision)
    text = str(refusal.value)
    assert "has no cpu kernel of" in text
    assert f"com.microsoft.FusedMatMul for {'float16' if precision == 'fp16' else 'bfloat16'}" in text
    assert "for this device build in fp32" in text


def test_a_rotary_width_that_the_kernel_cannot_turn_is_refused(make_checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_EXPORT_CPU_PLUGIN", "")
    rope = {**tiny_config(vision=False)["rope_parameters"], "mrope_section": [2, 1, 1]}
    checkpoint = make_checkpoint(tiny_config(vision=False, head_dim=32, rope_parameters=rope))
    with pytest.raises(UnsupportedError, match="GroupQueryAttention rotates a multiple of 16 dimensions, and this model has 8"):
        plan_build(open_checkpoint(checkpoint))


def test_all_reasons_come_at_once(make_checkpoint: Checkpoints) -> None:
    checkpoint = make_checkpoint(tiny_config(moe=True))
    with pytest.raises(UnsupportedError) as refusal:
        plan_build(open_checkpoint(checkpoint), precision="fp16", max_context=10**9)
    for reason in ("kernel of", "moe:", "outside 1..4096"):
        assert reason in str(refusal.value)
