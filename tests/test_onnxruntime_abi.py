"""plugins/native/onnxruntime_abi.h against ONNX Runtime's own headers, and libraries that need none of them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from qwen_export.runtimes.backends.onnxruntime.onnxruntime_library import FUNCTIONS

NATIVE = Path(__file__).parents[1] / "plugins" / "native"
COMPILER = shutil.which("c++")
SYSTEM = ("/usr/include/onnxruntime", "/usr/local/include/onnxruntime")

# Declared twice, so one of the two is put into a namespace; both are plain C.
COMPARISON = """
#include <cstddef>
#include <cstdint>
namespace own {
#include "onnxruntime_abi.h"
}
#include <onnxruntime_c_api.h>
#define SAME(type, field) static_assert(offsetof(own::type, field) == offsetof(::type, field), #type "." #field)
SAME(OrtApi, CreateStatus); SAME(OrtApi, GetErrorMessage); SAME(OrtApi, CreateCustomOpDomain); SAME(OrtApi, CustomOpDomain_Add);
SAME(OrtApi, AddCustomOpDomain); SAME(OrtApi, GetTensorMutableData); SAME(OrtApi, GetDimensionsCount); SAME(OrtApi, GetDimensions);
SAME(OrtApi, GetTensorTypeAndShape); SAME(OrtApi, CreateMemoryInfo); SAME(OrtApi, KernelInfoGetAttribute_float);
SAME(OrtApi, KernelInfoGetAttribute_int64); SAME(OrtApi, KernelInfoGetAttribute_string);
SAME(OrtApi, KernelContext_GetInputCount); SAME(OrtApi, KernelContext_GetInput);
SAME(OrtApi, KernelContext_GetOutput); SAME(OrtApi, ReleaseStatus); SAME(OrtApi, ReleaseMemoryInfo);
SAME(OrtApi, ReleaseTensorTypeAndShapeInfo); SAME(OrtApi, ReleaseAllocator); SAME(OrtApi, KernelContext_GetGPUComputeStream);
SAME(OrtApi, KernelContext_GetAllocator); SAME(OrtApi, KernelContext_GetResource); SAME(OrtApi, KernelContext_ParallelFor);
SAME(OrtApi, KernelContext_GetScratchBuffer);
SAME(OrtApiBase, GetApi); SAME(OrtAllocator, Alloc); SAME(OrtAllocator, Free);
SAME(OrtCustomOp, version); SAME(OrtCustomOp, CreateKernel); SAME(OrtCustomOp, GetName); SAME(OrtCustomOp, GetExecutionProviderType);
SAME(OrtCustomOp, GetInputType); SAME(OrtCustomOp, GetInputTypeCount); SAME(OrtCustomOp, GetOutputType);
SAME(OrtCustomOp, GetOutputTypeCount); SAME(OrtCustomOp, KernelCompute); SAME(OrtCustomOp, KernelDestroy);
SAME(OrtCustomOp, GetInputCharacteristic); SAME(OrtCustomOp, GetOutputCharacteristic); SAME(OrtCustomOp, GetInputMemoryType);
SAME(OrtCustomOp, GetVariadicInputMinArity); SAME(OrtCustomOp, GetVariadicInputHomogeneity); SAME(OrtCustomOp, GetVariadicOutputMinArity);
SAME(OrtCustomOp, GetVariadicOutputHomogeneity); SAME(OrtCustomOp, CreateKernelV2); SAME(OrtCustomOp, KernelComputeV2);
SAME(OrtCustomOp, InferOutputShapeFn); SAME(OrtCustomOp, GetStartVersion); SAME(OrtCustomOp, GetEndVersion);
SAME(OrtCustomOp, GetMayInplace); SAME(OrtCustomOp, ReleaseMayInplace); SAME(OrtCustomOp, GetAliasMap); SAME(OrtCustomOp, ReleaseAliasMap);
#define EQUAL(a, b) static_assert(int(a) == int(b), #b)
EQUAL(own::OrtElement::kFloat, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT); EQUAL(own::OrtElement::kUint8, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8);
EQUAL(own::OrtElement::kInt8, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8); EQUAL(own::OrtElement::kInt32, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32);
EQUAL(own::OrtElement::kInt64, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
EQUAL(own::OrtElement::kFloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
EQUAL(own::OrtElement::kBfloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16);
EQUAL(own::OrtError::kFail, ORT_FAIL); EQUAL(own::OrtAllocatorKind::kDevice, OrtDeviceAllocator);
EQUAL(own::OrtMemoryKind::kDefault, OrtMemTypeDefault); EQUAL(own::OrtCharacteristic::kRequired, INPUT_OUTPUT_REQUIRED);
EQUAL(own::OrtCharacteristic::kOptional, INPUT_OUTPUT_OPTIONAL);
int main() {}
"""


def _headers() -> list[str]:
    """The folders that have ONNX Runtime's headers."""
    folders = [
        folder for folder in (os.environ.get("ORT_INCLUDE_DIR"), *SYSTEM) if folder and Path(folder, "onnxruntime_c_api.h").is_file()
    ]
    if not folders:
        pytest.skip("ONNX Runtime's headers are not installed (Debian: libonnxruntime-dev), and ORT_INCLUDE_DIR names none")
    return folders


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_the_declarations_are_those_of_the_installed_headers(tmp_path: Path) -> None:
    folders = _headers()
    source = tmp_path / "comparison.cc"
    source.write_text(COMPARISON)
    command = [str(COMPILER), "-std=c++17", "-fsyntax-only", f"-I{NATIVE}", f"-I{folders[0]}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_the_functions_that_the_runtime_calls_are_at_their_places(tmp_path: Path) -> None:
    folders = _headers()
    source = tmp_path / "places.cc"
    asserts = "".join(
        f'static_assert(offsetof(OrtApi, {name}) == {place} * sizeof(void*), "{name}");\n' for name, (place, _) in FUNCTIONS.items()
    )
    source.write_text(f"#include <cstddef>\n#include <onnxruntime_c_api.h>\n{asserts}int main() {{}}\n")
    command = [str(COMPILER), "-std=c++17", "-fsyntax-only", f"-I{folders[0]}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_an_op_compiles_without_headers_of_others(tmp_path: Path) -> None:
    """Whole: what it includes is in this repository or belongs to the compiler."""
    files, source = tmp_path / "files", NATIVE / "cpu" / "top_logits_op.cc"
    command = [str(COMPILER), "-std=c++17", "-fsyntax-only", "-MMD", "-MF", str(files), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    included = [Path(name) for name in files.read_text().split() if "onnxruntime" in Path(name).name]
    assert [path.name for path in included] == ["onnxruntime_abi.h"]
