"""Whether an installed wheel has kernels that ONNX Runtime loads. Run by cibuildwheel where the extra `onnxruntime` alone is installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import onnxruntime

import qwen_export

ABSENT = ("torch", "onnx", "onnx_ir", "safetensors")


def main() -> None:
    found = [name for name in ABSENT if importlib.util.find_spec(name)]
    if found:
        sys.exit(f"the environment is to hold the runtime only, and has {', '.join(found)}")
    library = Path(qwen_export.__file__).parent / "plugins" / "native" / "libqwen_export_cpu.so"
    if not library.is_file():
        sys.exit(f"the wheel has no {library.name}")
    onnxruntime.SessionOptions().register_custom_ops_library(str(library))
    print(f"qwen-export {qwen_export.__version__}: {library.name}, {library.stat().st_size} bytes, is loaded by ONNX Runtime")


if __name__ == "__main__":
    main()
