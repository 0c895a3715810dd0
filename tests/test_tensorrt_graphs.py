"""The graphs that TensorRT compiles are standard ONNX: their numbers, on ONNX Runtime's CPU provider, are those of the eager model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qwen_export.building.build_plan import plan_build
from qwen_export.building.static_plan import StaticOptions
from qwen_export.engine_options import EngineOptions
from qwen_export.errors import UnsupportedError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.models.eager_sequence import EagerSequence
from qwen_export.graphs.models.load_model import load_decoder
from qwen_export.graphs.quantization.fp8 import Fp8Codes, Fp8Scales, rounded
from qwen_export.graphs.weights.expression import Reshaped, StoredWeight, add_weight
from qwen_export.plugins.decompose.decompose_delta_net import DeltaNetSizes, emit_gated_delta_net
from qwen_export.plugins.decompose.decompose_experts import ExpertSizes
from qwen_export.plugins.decompose.delta_rule import delta_rule
from qwen_export.plugins.decompose.split_product import SplitEmitter
from qwen_export.plugins.decompose.summed_product import SummedEmitter
from qwen_export.plugins.emitter import Emitter
from qwen_export.plugins.tensorrt import tensorrt_experts as experts
from qwen_export.runtimes import SamplingParams, load
from qwen_export.runtimes.decoding.generation import Request, Statistics
from qwen_export.runtimes.sampling.sampler import Sampler
from tests.support.family import tiny_config
from tests.support.standard_graphs import Weights, emitted, session
from tests.support.synthesize import synthesize
from tests.support.tensorrt_graphs import bundle_on_cpu, error_of_calls

Array = npt.NDArray[Any]
FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
SIZES = StaticOptions(chunk=128, step_tokens=4)


@pytest.fixture(scope="module", params=["dense", "moe"])
def demo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "moe":
        return Path(request.getfixturevalue("demo_moe_checkpoint"))
    return Path(request.getfixturevalue("demo_checkpoint"))


@pytest.fixture(scope="module")
def demo_on_cpu(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_on_cpu(demo, tmp_path_factory.mktemp("tensorrt") / "demo", options=SIZES, max_context=512)


def test_logits_are_the_eager_ones(demo: Path, demo_on_cpu: Path) -> None:
    """A prompt of several chunks, steps, a verify of which two tokens are kept, and steps behind it, within 1e-4 in fp32."""
    vocabulary = open_checkpoint(demo).config.text.vocab_size
    assert error_of_calls(demo, demo_on_cpu, vocabulary) <= 1e-4


def test_drafts_change_nothing(demo_on_cpu: Path) -> None:
    texts = set()
    for how in ("off", "lookup", 3):
        model = load(demo_on_cpu, threads=1, speculate=how)
        request = Request(model.tokenizer.encode("def f(a, b):\n    return a + b\n\ndef f(a"), Sampler(SamplingParams(greedy=True)), (), 32)
        texts.add(tuple(model.generate(request, Statistics())))
    assert len(texts) == 1


def test_fp16_with_the_attention_layer(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = bundle_on_cpu(tiny_checkpoint, tmp_path / "b", "fp16", SIZES, max_context=256, engine=EngineOptions(("89",)), mtp=False)
    decoder = load(bundle, threads=1).decoder()
    ids = np.random.default_rng(1).integers(0, 512, 100).tolist()
    got = [decoder.prefill(ids[:99]).copy(), decoder.step(ids[99:])[0].copy()]
    expected = EagerSequence(load_decoder(open_checkpoint(tiny_checkpoint)), 128).read(ids)[98:]
    assert np.abs(np.stack(got) - expected).max() <= 0.08 * expected.std()


def test_the_layer_is_used_where_it_has_kernels(tiny_checkpoint: Path) -> None:
    source = open_checkpoint(tiny_checkpoint)

    def attention(precision: str, *sms: str, target: str = "tensorrt-rtx") -> str:
        return plan_build(source, target, "cuda", precision, 256, engine=EngineOptions(sms)).choices["gated_attention"].name

    assert attention("fp16", "89", "120") == "native"
    assert attention("fp16", "89", "90") == "decomposed", "TensorRT-RTX has no attention kernels for SM 90"
    assert attention("bf16", "90", target="tensorrt") == "native"
    assert attention("fp32", "89") == "decomposed", "no attention kernels take fp32"


@pytest.mark.parametrize(("T", "P"), [(1, 0), (4, 4), (5, 3)])
def test_sums_are_the_transaction(T: int, P: int) -> None:
    """The verify's form of the whole op is that of the products, for every number of accepted and committed tokens."""
    Hk, Hv, D, K = 2, 4, 16, 4
    C = (2 * Hk + Hv) * D
    rng = np.random.default_rng(T)
    shapes: dict[str, tuple[int, ...]] = {
        "qkv": (1, T, C),
        "z": (1, T, Hv * D),
        "b": (1, T, Hv),
        "a": (1, T, Hv),
        "conv_history": (1, K - 1, C),
    }
    shapes["state"] = (1, Hv, D, D)
    if P:
        shapes |= {"pending_qkv": (1, P, C), "pending_b": (1, P, Hv), "pending_a": (1, P, Hv)}
    data = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    weights = {"conv": rng.standard_normal((C, K)), "a_log": rng.standard_normal(Hv), "dt": rng.standard_normal(Hv), "norm": np.ones(D)}
    counts = ("accepted", "commit") if P else ()

    def graph(kind: type[Emitter]) -> Any:
        def build(emit: Emitter, values: dict[str, ir.Value]) -> list[ir.Value]:
            inner = kind(emit.graph, "inner")
            inner.nodes = emit.nodes
            given: dict[str, ir.Value | None] = dict(values)
            for name, stored, shape in (("a_log", "a_log", (Hv,)), ("dt_bias", "dt", (Hv,)), ("norm", "norm", (D,))):
                given[name] = add_weight(emit.graph, stored, StoredWeight(stored, shape, FLOAT))
            given["conv_weight"] = add_weight(emit.graph, "conv.view", Reshaped(StoredWeight("conv", (C, K), FLOAT), (C, K)))
            return list(emit_gated_delta_net(inner, given, DeltaNetSizes(T, P, Hk, Hv, D, D, K), 1e-6, FLOAT, delta_rule))

        inputs = {name: (x.shape, FLOAT) for name, x in data.items()} | dict.fromkeys(counts, ((1,), ir.DataType.INT32))
        return session(emitted(inputs, build, {name: x.astype(np.float32) for name, x in weights.items()}))

    sums, products = graph(SummedEmitter), graph(Emitter)
    for accepted in range(P + 1):
        for commit in range(T + 1) if P else (T,):
            feeds = data | {name: np.array([value], np.int32) for name, value in zip(counts, (accepted, commit), strict=False)}
            for got, expected in zip(sums.run(None, feeds), products.run(None, feeds), strict=True):
                assert np.abs(got - expected).max() < 2e-5


@pytest.mark.parametrize(("T", "E", "K"), [(1, 8, 2), (5, 8, 4), (64, 8, 2), (96, 4, 4), (40, 16, 1)])
def test_every_pair_reaches_its_expert(T: int, E: int, K: int) -> None:
    """Few pairs one by one, many in blocks; uneven loads, experts without tokens."""
    H, width = 16, 8
    rng = np.random.default_rng([T, E])
    sizes = ExpertSizes(T, H, E, K, width, experts.ROWS_OF_A_GATHER)
    assert (sizes.block > 1) == (T > 1)
    shapes = {"x": (1, T, H), "logits": (1, T, E), "gate_up": (E, 2 * width, H), "down": (E, H, width)}
    data = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    data["logits"][0, :, 0] += 3
    data["logits"][0, :, E - 1] -= 9
    model = emitted({n: (s, FLOAT) for n, s in shapes.items()}, lambda emit, v: [experts.emit_experts(emit, *v.values(), sizes)])
    (y,) = session(model).run(None, data)
    p = np.exp(data["logits"][0].astype(np.float64))
    for t in range(T):
        chosen = np.argsort(-p[t])[:K]
        total = np.zeros(H)
        for e in chosen:
            gate, up = np.split(data["gate_up"][e].astype(np.float64) @ data["x"][0, t], 2)
            total += p[t, e] / p[t, chosen].sum() * (data["down"][e] @ (gate / (1 + np.exp(-gate)) * up))
        assert np.abs(y[0, t] - total).max() < 1e-4


def test_products_in_two_parts_lose_nothing_to_tf32() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((6, 64), (64, 5)))
    shapes = {"a": (a.shape, FLOAT), "b": (b.shape, FLOAT)}

    def rounded(x: Array) -> Array:
        """To 11 bits, as tensor cores take fp32."""
        bits = x.view(np.uint32).astype(np.uint64) + 0x1000
        return (bits.astype(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)

    model = emitted(shapes, _split)
    feeds = {"a": a, "b": b}
    inner = ir.from_proto(model)
    inner.graph.outputs.extend(value for node in inner.graph if node.op_type == "MatMul" for value in node.inputs if value is not None)
    exact, left, right = session(ir.to_proto(inner)).run(None, feeds)
    blocks = (rounded(left).astype(np.float64) @ rounded(right)).reshape(2, 6, 2, 5).sum(axis=(0, 2))
    wanted = a.astype(np.float64) @ b
    assert np.abs(exact - wanted).max() < 1e-5
    assert np.abs(blocks - wanted).max() < 1e-5
    assert np.abs(rounded(a).astype(np.float64) @ rounded(b) - wanted).max() > 1e-4


def _split(emit: Emitter, x: dict[str, ir.Value]) -> list[ir.Value]:
    exact = SplitEmitter(emit.graph, "split")
    exact.nodes = emit.nodes
    return [exact.matmul(x["a"], x["b"])]


def test_fp8_rows() -> None:
    w = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    source, stored = Weights({"w": w}), StoredWeight("w", (4, 32), FLOAT)
    values = Fp8Codes(stored).evaluate(source).astype(np.float32) * Fp8Scales(stored, HALF).evaluate(source).astype(np.float32)[:, None]
    assert np.abs(values - w).max() <= 0.07 * np.abs(w).max()
    assert np.array_equal(values, rounded(w))


def test_refusals(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_checkpoint)
    with pytest.raises(UnsupportedError, match="fp8 weights need SM 89 or newer, and SM 86 is among the targets"):
        plan_build(source, "tensorrt-rtx", "cuda", "fp8", engine=EngineOptions(("86", "120")))
    with pytest.raises(UnsupportedError, match="no products with fp8 weights on cpu, only on cuda"):
        plan_build(source, "onnxruntime", "cpu", "fp8")
    with pytest.raises(UnsupportedError, match="not a multiple of 64"):
        plan_build(source, "tensorrt", "cuda", "fp16", options=StaticOptions(chunk=100))
    moe = open_checkpoint(synthesize(tiny_config(moe=True, shared_expert_intermediate_size=64), tmp_path / "moe"))
    plan = tmp_path / "plan.toml"
    plan.write_text('[experts]\nformat = "int4"\n')
    with pytest.raises(UnsupportedError, match="must leave \\[experts\\] stored"):
        plan_build(moe, "tensorrt-rtx", "cuda", "int4", plan_file=plan)
    assert plan_build(moe, "tensorrt-rtx", "cuda", "int4").quantization is not None
