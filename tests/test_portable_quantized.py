"""int4 and int8 on the targets with standard operators: the layouts, and bundles that compute what their plan says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.helper
import onnx_ir as ir
import pytest

from qwen_export import build
from qwen_export.building.build_plan import plan_build
from qwen_export.building.lower_graphs import lower
from qwen_export.building.static_plan import StaticOptions
from qwen_export.errors import ConfigError, UnsupportedError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.quantization.packing import QuantFormat, dequantize
from qwen_export.graphs.quantization.scale_search import quantize
from qwen_export.graphs.quantization.standard_blocks import BlockCodes, BlockScales, BlockZeros, NBitsCodes, NBitsZeros
from qwen_export.graphs.weights.expression import StoredWeight, Weight
from qwen_export.manifest import load_manifest
from qwen_export.plugins.standard.nbits_function import nbits_function
from qwen_export.runtimes import load
from qwen_export.runtimes.backends.onnxruntime import onnxruntime_library
from qwen_export.runtimes.backends.onnxruntime.onnxruntime_library import packing_library
from tests.support.standard_graphs import Weights, session
from tests.support.static_bundles import reference_logits, unoptimized

N, K = 24, 192


def unpacked(weight: Weight, source: Weights) -> npt.NDArray[Any]:
    """The elements of a part, one each."""
    data = np.concatenate([weight.rows(source, *span) for span in weight.spans()])
    if weight.dtype.bitwidth == 4:
        pairs = np.stack([data & 15, data >> 4], axis=-1).reshape(weight.shape).astype(np.int64)
        data = np.where(pairs > 7, pairs - 16, pairs) if weight.dtype == ir.DataType.INT4 else pairs
    data = np.asarray(data).reshape(weight.shape)
    return data.astype(np.int64) if data.dtype.kind in "iu" else data


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_codes_scales_and_zeros_apart_are_the_quantized_matrix(bits: int, zeros: bool, turned: bool) -> None:
    matrix = np.random.default_rng(bits).standard_normal((N, K)).astype(np.float32)
    source, of, format = Weights({"w": matrix}), StoredWeight("w", (N, K), ir.DataType.FLOAT), QuantFormat(bits, 32, zeros)
    expected = dequantize(format, *quantize(format, matrix, "search"))
    codes, scales = (unpacked(part(of, format, "search", turned), source) for part in (BlockCodes, BlockScales))
    zero = unpacked(BlockZeros(of, format, "search", turned), source) if zeros else np.zeros((1, 1))
    if turned:
        codes, scales, zero = codes.T, scales.T, zero.T
    got = np.repeat(scales, 32, axis=1) * (codes - (np.repeat(zero, 32, axis=1) if zeros else 0))
    np.testing.assert_array_equal(got.astype(np.float32), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_nbits_parts_are_the_quantized_matrix(bits: int) -> None:
    matrix = np.random.default_rng(bits).standard_normal((N, K)).astype(np.float32)
    source, of, format = Weights({"w": matrix}), StoredWeight("w", (N, K), ir.DataType.FLOAT), QuantFormat(bits, 64, zeros=True)
    codes, _, zeros = quantize(format, matrix, "rtn")
    assert zeros is not None
    made, point = (unpacked(part(of, format, "rtn"), source) for part in (NBitsCodes, NBitsZeros))
    if bits == 4:
        made = np.stack([made & 15, made >> 4], axis=-1)
        point = np.stack([point & 15, point >> 4], axis=-1).reshape(N, -1)[:, : K // 64]
    assert np.array_equal(made.reshape(N, K), codes) and np.array_equal(point, zeros)


@pytest.fixture(scope="module", params=["onnx", "directml"])
def bundle(request: pytest.FixtureRequest, demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output, device = tmp_path_factory.mktemp("quantized") / request.param, {"onnx": "cpu", "directml": "dml"}[request.param]
    options = StaticOptions(16)
    return build(demo_checkpoint, output, target=request.param, device=device, precision="int4", max_context=128, options=options)


def test_logits_are_near_those_of_the_whole_weights(bundle: Path, demo_checkpoint: Path) -> None:
    decoder = load(bundle, threads=1, device="cpu").decoder()
    ids = np.random.default_rng(0).integers(0, 400, 40).tolist()
    expected, got = reference_logits(demo_checkpoint)(ids), decoder.prefill(ids)
    assert np.corrcoef(got, expected[-1])[0, 1] > 0.97
    assert np.corrcoef(decoder.step([7])[0], reference_logits(demo_checkpoint)([*ids, 7])[-1])[0, 1] > 0.97


def test_packed_products_give_the_tokens_of_the_nodes_as_they_are(bundle: Path) -> None:
    """Packed products round activations to 8 bits: near-ties aside, it is the same model."""
    decoder = load(bundle, threads=1, device="cpu").decoder()
    ids = np.random.default_rng(1).integers(0, 400, 20).tolist()
    exact = unoptimized(bundle).greedy(ids, 1)
    logits = decoder.prefill(ids)
    assert logits.max() - logits[exact[0]] < 0.1 * logits.std()


def test_matrices_are_stored_once_for_all_graphs_and_as_the_plan_says(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    assert all("MatMulNBits" in {node.op_type for node in ir.load(bundle / graph.file).graph} for graph in manifest.graphs.values())
    first, *others = ({w.name: (w.offset, w.dtype) for w in manifest.graphs[name].weights} for name in ("decoder", "verify", "prefill"))
    # Prompts convolve with kernels of a layout of their own.
    assert all(first[name] == place for places in others for name, place in places.items() if not name.endswith(".kernels"))
    assert {dtype for name, (_, dtype) in first.items() if "in_proj_a" in name} <= {"float", "float16"}, "gates keep their precision"
    assert manifest.precision_plan["mlp"].startswith("int4")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_the_function_of_standard_operators_is_the_kernel(bits: int, zeros: bool) -> None:
    """A runtime without com.microsoft.MatMulNBits has the function's body: here ONNX Runtime, under a name that it has no kernel for."""
    rng, block = np.random.default_rng(0), 32
    given = {
        "A": rng.standard_normal((2, 96)).astype(np.float32),
        "B": rng.integers(0, 256, (6, 3, block * bits // 8), np.uint8),
        "scales": rng.random((6, 3), np.float32),
    } | ({"zero_points": rng.integers(0, 256, (6, -(-3 * bits // 8)), np.uint8)} if zeros else {})
    results = []
    for domain in ("com.microsoft", "without.kernel"):
        function = ir.to_proto(nbits_function(21))
        function.domain = domain
        node = onnx.helper.make_node("MatMulNBits", list(given), ["Y"], domain=domain, K=96, N=6, bits=bits, block_size=block)
        inputs = [onnx.helper.make_tensor_value_info("A", onnx.TensorProto.FLOAT, [2, 96])]
        outputs = [onnx.helper.make_tensor_value_info("Y", onnx.TensorProto.FLOAT, [2, 6])]
        constants = [onnx.numpy_helper.from_array(array, name) for name, array in given.items() if name != "A"]
        graph = onnx.helper.make_graph([node], "product", inputs, outputs, constants)
        opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid(domain, 1)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=[function])
        onnx.checker.check_model(model)
        results.append(session(model).run(None, {"A": given["A"]})[0])
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(packing_library() is None, reason="the installed ONNX Runtime does not share what it packs")
def test_sessions_of_one_bundle_share_what_they_pack(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same texts as with sessions that each have their own, and after closing the memory is free for the next."""
    ids = np.random.default_rng(2).integers(0, 400, 20).tolist()

    def logits() -> npt.NDArray[Any]:
        with load(bundle, threads=1, device="cpu") as model:
            decoder = model.decoder()
            decoder.prefill(ids)
            return np.stack([decoder.step([token])[0].copy() for token in (5, 6)])

    shared = [logits(), logits()]
    monkeypatch.setattr(onnxruntime_library, "packing_library", lambda: None)
    np.testing.assert_array_equal(shared[0], shared[1])
    np.testing.assert_array_equal(shared[0], logits())


def test_rows_that_are_not_whole_blocks_are_refused(demo_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text("[mlp]\nblock = 128\n")
    source = open_checkpoint(demo_checkpoint)
    if source.config.text.intermediate_size % 128:
        plan = plan_build(source, "onnx", precision="int4", plan_file=file, max_context=64, options=StaticOptions(16))
        with pytest.raises(ConfigError, match=r"whole blocks.*down_proj"):
            lower(source, plan)


def test_quantized_blocks_need_their_opset(demo_checkpoint: Path) -> None:
    source = open_checkpoint(demo_checkpoint)
    with pytest.raises(UnsupportedError, match="since opset 21, not in 20"):
        plan_build(source, "directml", "dml", "int4", options=StaticOptions(opset=20))
    assert plan_build(source, "directml", "dml", "int4").opset == 21
