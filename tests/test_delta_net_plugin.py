"""Our plugin for TensorRT: what its graphs compute, engines that have it, and the forms of both flavours. Its kernel runs in
test_delta_net_plugin_gpu.py."""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qwen_export.building import engines
from qwen_export.building.build_plan import plan_build
from qwen_export.building.compiler import build
from qwen_export.building.engines import rebuild
from qwen_export.building.static_plan import StaticOptions
from qwen_export.bundles.bundle_summary import inspect_bundle
from qwen_export.commands.bundle_text import bundle_text
from qwen_export.engine_options import EngineOptions
from qwen_export.errors import BuildError, UnsupportedError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.manifest import load_manifest
from qwen_export.plugins.tensorrt import probe_plugins, step_plugin
from qwen_export.plugins.tensorrt import tensorrt_lowerings as lowerings
from qwen_export.plugins.tensorrt.build_engine import build_engine
from qwen_export.plugins.tensorrt.library_name import MACHINES, alias, ensure_plain_name
from qwen_export.plugins.tensorrt.step_plugin import LONGEST
from qwen_export.runtimes.backends.tensorrt import delta_net_plugin
from qwen_export.runtimes.backends.tensorrt.delta_net_plugin import NAMESPACE, STEP, THREADS, VERIFY, StepFields, pack_ptx, unpack_ptx
from qwen_export.runtimes.backends.tensorrt.tensorrt_library import load_library
from qwen_export.runtimes.memory import cuda_driver
from qwen_export.runtimes.memory.cuda_stream import Stream
from qwen_export.verification.layer_graphs import layer_graphs
from tests.support.fake_driver import FakeDriver
from tests.support.family import tiny_config
from tests.support.synthesize import synthesize
from tests.support.tensorrt_graphs import bundle_on_cpu, error_of_calls

PLUGIN = EngineOptions(("89", "120"), plugins=("gated_delta_net",))
SIZES = StaticOptions(chunk=128, step_tokens=4)
PTX = b"// Cuda compilation tools, release 13.4, V13.4.1\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(vision=False, linear_key_head_dim=64, linear_value_head_dim=64)
    return synthesize(config, tmp_path_factory.mktemp("plugin") / "heads-of-64")


@pytest.fixture
def compiled_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PTX is not read by a build, so that these tests need no nvcc."""
    (tmp_path / "kernel.ptx").write_bytes(PTX)
    monkeypatch.setattr(step_plugin, "find_ptx", lambda element: tmp_path / "kernel.ptx")


@pytest.mark.parametrize(
    ("chunk", "width", "plugged"),
    [(128, 4, {"decoder", "verify"}), (8, 4, {"decoder", "verify"}), (128, 12, {"decoder"})],
    ids=["usual", "short prompt calls", "long verifies"],
)
def test_one_product_feeds_the_step_and_stays_pending(
    chunk: int, width: int, plugged: set[str], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs around the plugin are those of the eager model, through prompts, steps and a verify of which two tokens are kept. Calls
    that the kernel has no form for are native layers, over the same states and weights."""
    sizes = []

    def standard(*given: Any) -> list[ir.Value]:
        """The plugin's node as standard operators, on the same inputs."""
        sizes.append(given[-1].static)
        return lowerings.packed_native_layers(*given)

    monkeypatch.setattr(lowerings, "emit_plugin", standard)
    bundle = bundle_on_cpu(checkpoint, tmp_path / "b", options=StaticOptions(chunk, width), max_context=256, engine=PLUGIN)
    assert {"decoder" if size.T == 1 else "verify" if size.P else "prefill" for size in sizes} == plugged
    graphs = load_manifest(bundle).graphs
    projections = [{(w.name, w.offset) for w in graphs[name].weights if ".in_proj_" in w.name} for name in ("decoder", "verify", "prefill")]
    assert projections[0] and projections[0] == projections[1] == projections[2], "one matrix for all graphs"
    assert {state.name.split(".")[2] for state in graphs["verify"].states if "pending" in state.name} == {"pending"}
    assert error_of_calls(checkpoint, bundle, 480) <= 1e-4


@pytest.mark.usefixtures("compiled_kernel")
def test_the_nodes_carry_their_kernel(checkpoint: Path, tmp_path: Path) -> None:
    bundle = bundle_on_cpu(checkpoint, tmp_path / "b", "fp16", SIZES, max_context=256, engine=PLUGIN)
    sizes = open_checkpoint(checkpoint).config.text
    heads = (sizes.linear_num_key_heads, sizes.linear_num_value_heads)
    for graph, kind, inputs, tokens in (("decoder", STEP, 7, 1), ("verify", VERIFY, 10, 4)):
        nodes = [node for node in onnx.load(bundle / f"{graph}.onnx", load_external_data=False).graph.node if node.domain == NAMESPACE]
        assert [node.op_type for node in nodes] == [kind] * sizes.layer_types.count("linear_attention")
        for node in nodes:
            values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert len(node.input) == inputs and len(node.output) == 3
            assert (values["tokens"], values["key_heads"], values["value_heads"], values["head_size"]) == (tokens, *heads, 64)
            assert np.int32(values["eps"]).view(np.float32) == np.float32(sizes.rms_norm_eps)
            assert values["kernel"].decode() == f"qwen_delta_net_{'verify' if kind == VERIFY else 'step'}_64"
            assert unpack_ptx(values["ptx"].decode()) == PTX
    assert not any(node.domain for node in onnx.load(bundle / "prefill.onnx", load_external_data=False).graph.node)
    graphs = load_manifest(bundle).graphs
    assert [state.name for state in graphs["verify"].states if "pending" in state.name] == [
        f"layers.{i}.pending" for i, kind in enumerate(sizes.layer_types) if kind == "linear_attention"
    ]
    stacked = [{(w.file, w.offset) for w in graphs[name].weights if ".in_proj_" in w.name} for name in ("decoder", "verify", "prefill")]
    assert stacked[0] and stacked[0] == stacked[1] == stacked[2], "steps and prompts read the same matrix"


@pytest.mark.parametrize("precision", ["fp16", pytest.param("int4", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("compiled_kernel")
def test_engines_for_rtx(precision: str, checkpoint: Path, tmp_path: Path) -> None:
    """TensorRT-RTX builds engines with the plugin, and builds them again from the bundle alone."""
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    engine = EngineOptions(("89", "120"), plugins=PLUGIN.plugins, carry_onnx=True)
    made = {"target": "tensorrt-rtx", "device": "cuda", "precision": precision, "max_context": 256, "options": SIZES}
    bundle = build(checkpoint, tmp_path / "b", **made, engine=engine, mtp=False, lookup=True)  # type: ignore[arg-type]
    spec = load_manifest(bundle).engine
    assert spec is not None and spec.plugins == ("gated_delta_net",)
    assert spec.minimum_cuda == "13.4", "the driver must take the PTX"
    assert "and our own kernel for gated_delta_net" in bundle_text(inspect_bundle(bundle))
    stacked = {w.name.rpartition(".in_proj_")[2] for w in load_manifest(bundle).graphs["decoder"].weights if ".in_proj_" in w.name}
    assert stacked == {"fp16": {"qkv_z_a_b"}, "int4": {"qkv_z.codes", "qkv_z.scales", "a_b"}}[precision], "gates are never quantized"
    before = {graph: (bundle / f"{graph}.engine").read_bytes() for graph in ("decoder", "verify", "prefill")}
    packed = pack_ptx(PTX).encode()
    assert {graph: packed in data for graph, data in before.items()} == {"decoder": True, "verify": True, "prefill": False}
    again = rebuild(bundle, EngineOptions(("89",)))
    assert again.engine is not None and (again.engine.sms, again.engine.plugins) == (("89",), spec.plugins)
    assert again.engine.minimum_cuda == "13.4"
    assert packed in (bundle / "decoder.engine").read_bytes()


@pytest.mark.usefixtures("compiled_kernel")
def test_layers_of_engines_with_the_plugin_show(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`verify --per-layer` compiles the graphs again, plugin and all, in a process that has built nothing."""
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    monkeypatch.setattr(engines, "current_sm", lambda: "89")
    engine, known = EngineOptions(("89",), plugins=PLUGIN.plugins, carry_onnx=True), []
    bundle = build(checkpoint, tmp_path / "b", target="tensorrt-rtx", device="cuda", max_context=256, mtp=False, engine=engine)
    monkeypatch.setattr(engines, "make_known", known.append)
    with layer_graphs(bundle, load_manifest(bundle), open_checkpoint(checkpoint).config.text) as (there, manifest):
        assert pack_ptx(PTX).encode() in (there / manifest.graphs["decoder"].file).read_bytes()
    assert len(known) == 1


def test_refusals(checkpoint: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: Path, *sms: str) -> str:
        with pytest.raises(UnsupportedError) as caught:
            plan_build(open_checkpoint(source), "tensorrt-rtx", "cuda", "fp16", engine=EngineOptions(sms, plugins=PLUGIN.plugins))
        return str(caught.value)

    assert "our plugin takes heads of 64 or 128 keys and as many values, and 4 taps" in refused(tiny_checkpoint, "89")
    with pytest.raises(UnsupportedError, match="no plugin for moe, only for gated_delta_net"):
        plan_build(open_checkpoint(checkpoint), "tensorrt-rtx", "cuda", "fp16", engine=EngineOptions(("89",), plugins=("moe",)))
    assert "our plugin is compiled for SM 80 and newer" in refused(checkpoint, "75", "89")
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    made: dict[str, Any] = {"target": "tensorrt-rtx", "device": "cuda", "precision": "fp16", "max_context": 256, "options": SIZES}
    monkeypatch.setattr(step_plugin, "find_ptx", lambda element: None)
    with pytest.raises(UnsupportedError, match=r"has not been compiled.*build_ptx\.sh"):
        build(checkpoint, tmp_path / "b", **made, engine=PLUGIN)
    monkeypatch.setattr(probe_plugins, "parses", lambda library: False)
    with pytest.raises(UnsupportedError, match=r"takes plugins of others since 1\.7"):
        build(checkpoint, tmp_path / "b", **made, engine=PLUGIN)
    assert not (tmp_path / "b").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="an ELF file")
def test_an_alias_finds_what_the_real_library_has(tmp_path: Path) -> None:
    path = tmp_path / "libqwen_alias.so"
    path.write_bytes(alias(path.name, "libc.so.6", MACHINES[os.uname().machine]))
    library = ctypes.CDLL(str(path))
    assert library.getpid() == os.getpid()
    assert ctypes.CDLL(path.name)._handle == library._handle, "it is known by its name from then on"


@pytest.mark.skipif(sys.platform != "linux", reason="an ELF file")
def test_where_no_alias_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object, **named: object) -> None:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(UnsupportedError, match=r"the parser needs libtensorrt_rtx\.so.*LD_LIBRARY_PATH"):
        ensure_plain_name.__wrapped__()


def test_a_parser_that_knows_no_plugin_of_ours(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Unheard", ["x"], ["y"], domain=NAMESPACE)], "g", [x], [y])
    opsets = [onnx.helper.make_opsetid("", 24), onnx.helper.make_opsetid(NAMESPACE, 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets).SerializeToString()
    with pytest.raises(BuildError, match=r"cannot read the graph.*1\.7 or newer, or leave out plugins"):
        build_engine(load_library("tensorrt-rtx"), model, tmp_path / "e", PLUGIN)


def test_what_python_says_of_the_kernel_is_what_its_sources_say() -> None:
    native = Path(step_plugin.__file__).parents[1] / "native"
    for file, constant, value in (("delta_net.cuh", "kFewTokens", LONGEST), ("few_tokens.cuh", "kHeadThreads", THREADS)):
        assert f"constexpr int {constant} = {value};" in (native / file).read_text(encoding="utf-8")


def test_fields_of_a_plugin() -> None:
    given = StepFields("kernel", pack_ptx(PTX), 4, 3, 16, 32, 128, 7)
    assert unpack_ptx(given.ptx) == PTX
    assert (given.numbers, given.width) == ((4, 3, 16, 32, 7), 4096)


def test_a_plugin_of_rtx_is_made_from_its_fields() -> None:
    """As an engine is loaded: the fields that a plugin gave away are what the registry's creator makes the next one of."""
    api = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    library = load_library("tensorrt-rtx")
    for _ in range(2):
        delta_net_plugin.register(library)
    gc.collect()
    creator = api.get_plugin_registry().get_creator(VERIFY, delta_net_plugin.VERSION, NAMESPACE)
    given = StepFields("kernel", pack_ptx(PTX), 4, 3, 16, 32, 128, 7)
    made = delta_net_plugin.step_plugin(api, VERIFY, given).clone()
    again = creator.create_plugin("layer", made.get_fields_to_serialize(), api.TensorRTPhase.RUNTIME)
    del made
    gc.collect()
    assert delta_net_plugin.read_fields(again.get_fields_to_serialize()) == given
    assert (again.plugin_name, again.num_outputs) == (VERIFY, 3)


def test_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel gets addresses of inputs, numbers, addresses of outputs; its PTX is loaded once."""
    driver = FakeDriver()
    monkeypatch.setattr(cuda_driver, "driver", lambda: driver)
    for name, arguments in cuda_driver.FUNCTIONS.items():
        getattr(driver, name).argtypes = arguments
    given, stream, seen = StepFields("a_launch", pack_ptx(PTX), 4, 3, 16, 32, 128, 7), Stream(), []
    kinds = [ctypes.c_uint64] * 10 + [ctypes.c_int] * 5 + [ctypes.c_uint64] * 3

    def read(parameters: Any) -> list[int]:
        return [ctypes.cast(address, ctypes.POINTER(kind))[0] for kind, address in zip(kinds, parameters, strict=True)]

    monkeypatch.setattr(driver, "queue", lambda stream, work: (work(), seen.append(read(driver.kernels[-1][2]))))
    for _ in range(2):
        delta_net_plugin.launch(given, range(1000, 1010), range(2000, 2003), stream.handle)
    assert [kernel[:2] for kernel in driver.kernels] == [(b"a_launch", (32, 1, 1, 512, 1, 1))] * 2
    assert seen == [[*range(1000, 1010), 4, 3, 16, 32, 7, *range(2000, 2003)]] * 2
    assert list(driver.modules.values()) == [PTX + b"\0"]


def test_each_gpu_has_a_kernel_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several bundles in a process may be on several GPUs."""
    cuda_driver.forget_driver()
    driver = FakeDriver(devices=2)
    monkeypatch.setattr(cuda_driver, "driver", lambda: driver)
    for name, arguments in cuda_driver.FUNCTIONS.items():
        getattr(driver, name).argtypes = arguments
    given = StepFields("on_two_gpus", pack_ptx(PTX), 1, 0, 1, 1, 64, 7)
    for device in (0, 1, 0):
        stream = Stream(device)
        delta_net_plugin.launch(given, range(7), range(3), stream.handle)
    cuda_driver.use_device(0)
    assert len(driver.modules) == 2


_QUICK = """
import numpy as np, tensorrt, sys
from types import SimpleNamespace as Some
from qwen_export.plugins.tensorrt import quick_plugin
from qwen_export.runtimes.backends.tensorrt.delta_net_plugin import TENSORS, StepFields, pack_ptx
import tensorrt.plugin as plugin
from tensorrt.plugin import _lib, _plugin_class

_lib._register_plugin_creator = lambda name, namespace, types: None  # the registry is part of what cannot be had
quick_plugin.register(Some(api=tensorrt))
given = StepFields("kernel", pack_ptx(b"ptx"), 4, 4, 2, 4, 64, 7)
types = tensorrt.DataType
for kind, count in {kind: len(tensors) for kind, tensors in TENSORS.items()}.items():
    definition = _lib.QDP_REGISTRY[f"qwen::{kind}"]
    assert list(definition.input_attrs) == [*vars(given)] and definition.num_outputs == 3 and len(definition.input_tensor_names) == count
    tensors = [plugin.TensorDesc() for _ in range(count)]
    shapes = [(1, 4, 776), (512, 4), (4,), (4,), (64,), (1, 3, 512), (1, 4, 64, 64), (1, 4, 776), (1,), (1,)]
    for tensor, shape in zip(tensors, shapes):
        tensor.dtype, tensor.format, tensor.scale = types.HALF, tensorrt.TensorFormat.LINEAR, 1.0
        tensor.shape_expr = plugin.ShapeExprs.from_tuple(shape)
    y, history, state = definition.register_func(*tensors, *vars(given).values())
    combinations = definition.autotune_func(*tensors, *vars(given).values(), (y, history, state))
    made = [one.types for c in combinations for one in c._get_combinations()]
    assert len(made) == 3 and all(len(one) == count + 3 and one[2] == one[6] == one[-1] == types.FLOAT for one in made), made
    assert [one[0] for one in made] == [types.FLOAT, types.HALF, types.BF16] and all(one[0] == one[-3] == one[-2] for one in made)
    name, ptx, parameters, numbers = definition.aot_impl_func(*tensors, *vars(given).values(), (y, history, state), 0)
    assert (name, ptx, len(numbers)) == ("kernel", b"ptx", 5)
    assert isinstance(parameters, plugin.KernelLaunchParams) and all(isinstance(n, plugin.SymInt32) for n in numbers)
print("described")
"""


def test_quick_deployable_form(tmp_path: Path) -> None:
    """tensorrt.plugin, of the real bindings, takes our definitions. TensorRT itself is replaced by libraries without content."""
    bindings = pytest.importorskip("importlib.util").find_spec("tensorrt_bindings")
    if bindings is None or shutil.which("gcc") is None:
        pytest.skip("needs the bindings of the full TensorRT, and gcc")
    functions = ("createInferBuilder", "createInferRefitter", "createInferRuntime", "createNvOnnxParserRefitter", "createNvOnnxParser")
    names = [f"{name}_INTERNAL" for name in functions] + ["getBuilderPluginRegistry", "getPluginRegistry", "initLibNvInferPlugins"]
    source = tmp_path / "empty.c"
    source.write_text(
        "".join(f"void* {name}(void) {{ return 0; }}\n" for name in names) + "int getNvOnnxParserVersion(void) { return 0; }\n"
    )
    for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        name = f"lib{library}.so.11"
        subprocess.run(["gcc", "-shared", "-fPIC", str(source), f"-Wl,-soname,{name}", "-o", str(tmp_path / name)], check=True)
    (tmp_path / "tensorrt").symlink_to(Path(str(bindings.origin)).parent)
    paths = {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", _QUICK], env=os.environ | paths, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip().endswith("described"), done.stderr[-3000:]
