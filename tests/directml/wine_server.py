"""ONNX Runtime with DirectML in Wine, driven from here, in the Debian system that set_up.sh made."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

ENTER = Path(__file__).with_name("enter.sh")
ROOT = Path(os.environ.get("DIRECTML_ROOT", Path(__file__).parents[2] / "build" / "directml"))
WORK = ROOT / "directml"
"""The folder that both sides see: models and values."""

# Nothing may end on the CPU unseen; the rest is as the runtime's sessions have it.
STRICT = {"session.disable_cpu_ep_fallback": "1", "session.disable_prepacking": "1"}

_ENVIRONMENT = {
    "WINEPREFIX": "/wine",
    "WINEDEBUG": "-all",
    "WINEDLLOVERRIDES": "mscoree,mshtml,winedbg.exe=;d3d12,d3d12core=n",
    "VKD3D_DEBUG": "none",
}
_ELEMENTS = {
    np.dtype(helper.tensor_dtype_to_np_dtype(code)): code
    for code in (
        TensorProto.FLOAT,
        TensorProto.FLOAT16,
        TensorProto.INT32,
        TensorProto.INT64,
        TensorProto.UINT8,
        TensorProto.INT8,
        TensorProto.BOOL,
    )
}


class ServerError(Exception):
    """ONNX Runtime's message, or that the process has ended."""


class WineServer:
    """One process with one DirectML device; its sessions, values and bindings go by names."""

    def __init__(self) -> None:
        assert (ROOT / ".ready").exists(), f"{ROOT} is not set up: run tests/directml/set_up.sh {ROOT}"
        for code in _ELEMENTS.values():
            onnx.save(_identity(code), WORK / f"identity{code}.onnx")
        names = [f"{key}={value}" for key, value in _ENVIRONMENT.items()]
        command = [str(ENTER), str(ROOT), "env", *names, "sh", "-c", "cd /directml && exec xvfb-run -a wine onnxruntime_server.exe"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self._names = itertools.count()
        self.folder = Path(tempfile.mkdtemp(dir=WORK))
        self.exchange = self.folder / "exchange"
        self.version = self._answer("starting")

    def ask(self, *fields: object) -> str:
        stdin = self._process.stdin
        assert stdin is not None
        if stdin.closed:  # what is collected after the end was released with the process
            return ""
        try:
            stdin.write("\t".join(map(str, fields)) + "\n")
            stdin.flush()
        except BrokenPipeError:
            pass  # the answer says so
        return self._answer(" ".join(map(str, fields[:3])))

    def _answer(self, command: str) -> str:
        stdout = self._process.stdout
        assert stdout is not None
        for line in stdout:
            word, _, rest = line.rstrip("\n").partition(" ")
            if word == "ok":
                return rest
            if word == "error":
                raise ServerError(rest)
        raise ServerError(f"the process ended with {self._process.wait()} at: {command}")

    def name(self, kind: str) -> str:
        return f"{kind}{next(self._names)}"

    def open(self, model: Path, entries: Mapping[str, str] = STRICT, *, optimization: int = 99) -> str:
        """A session for a file below WORK. Returns its name."""
        name = self.name("session")
        self.ask("open", name, model.relative_to(WORK), optimization, *(f"{key}={value}" for key, value in entries.items()))
        return name

    def tensor(self, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> WineTensor:
        return WineTensor(self, np.dtype(dtype), shape)

    def run(self, model: onnx.ModelProto, feeds: Mapping[str, npt.NDArray[Any]], entries: Mapping[str, str] = STRICT) -> dict[str, Any]:
        """All outputs of a model with static shapes, in one call."""
        path = self.folder / "model.onnx"
        onnx.save(model, path)
        session, call = self.open(path, entries), self.name("call")
        self.ask("bind", call, session)
        inputs = {name: self.tensor(array.dtype, array.shape) for name, array in feeds.items()}
        outputs = {}
        for value in model.graph.output:
            kind = value.type.tensor_type
            outputs[value.name] = self.tensor(helper.tensor_dtype_to_np_dtype(kind.elem_type), tuple(d.dim_value for d in kind.shape.dim))
        try:
            for name, tensor in inputs.items():
                tensor.write(feeds[name])
                self.ask("input", call, name, tensor.name)
            for name, tensor in outputs.items():
                self.ask("output", call, name, tensor.name)
            self.ask("run", call)
            return {name: tensor.read() for name, tensor in outputs.items()}
        finally:
            self.ask("unbind", call)
            self.ask("close", session)
            for tensor in (*inputs.values(), *outputs.values()):
                tensor.drop()

    def memory(self) -> int:
        """Bytes of memory that the process holds; those of the software adapter are among them."""
        return int(self.ask("memory"))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        shutil.rmtree(self.folder)


class WineTensor:
    """Memory of DirectML's allocator."""

    def __init__(self, server: WineServer, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self.server, self.dtype, self.shape, self.name = server, dtype, shape, server.name("value")
        server.ask("tensor", self.name, _ELEMENTS[dtype], ",".join(map(str, shape)) or "-")

    def write(self, array: npt.NDArray[Any]) -> None:
        assert array.dtype == self.dtype and array.shape == self.shape, (array.dtype, array.shape, self.dtype, self.shape)
        self.server.exchange.write_bytes(array.tobytes())
        self.server.ask("write", self.name, self.server.exchange.relative_to(WORK))

    def read(self) -> npt.NDArray[Any]:
        self.server.ask("read", self.name, self.server.exchange.relative_to(WORK))
        return np.fromfile(self.server.exchange, self.dtype).reshape(self.shape)

    def drop(self) -> None:
        self.server.ask("drop", self.name)


def shared_copy(folder: Path) -> Path:
    """A folder of files where the Windows side sees it, as hard links where that can be."""
    copy = WORK / folder.name
    if not copy.exists():
        shutil.copytree(folder, copy, copy_function=_link)
    return copy


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _identity(code: int) -> onnx.ModelProto:
    signature = [helper.make_tensor_value_info(name, code, None) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", signature[:1], signature[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
