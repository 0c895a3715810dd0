"""DirectML in Wine as the machine under ONNX Runtime's Python module: the runtime loads a bundle and runs it as it does on Windows."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from qwen_export.runtimes import Model, load
from tests.directml.wine_server import STRICT, WineServer, WineTensor
from tests.support.directml_binding import DirectmlBinding


class WineSession:
    """A session and its bindings, of which each combination of values has one, as in the runtime."""

    def __init__(self, server: WineServer, path: Path, entries: Mapping[str, str]) -> None:
        self.server, self.graph, self.calls = server, path.stem, 0
        self.name = server.open(path, {**entries, **STRICT})
        self._bindings: dict[tuple[str, ...], str] = {}

    def run(self, inputs: Mapping[str, WineTensor], outputs: Mapping[str, WineTensor]) -> None:
        key = tuple(f"{name}={tensor.name}" for group in (inputs, outputs) for name, tensor in group.items())
        if key not in self._bindings:
            call = self._bindings[key] = self.server.name("call")
            self.server.ask("bind", call, self.name)
            for direction, tensors in (("input", inputs), ("output", outputs)):
                for name, tensor in tensors.items():
                    self.server.ask(direction, call, name, tensor.name)
        self.server.ask("run", self._bindings[key])
        self.calls += 1

    def close(self) -> None:
        for call in self._bindings.values():
            self.server.ask("unbind", call)
        self.server.ask("close", self.name)


class WineMachine:
    """A Machine of tests/support/directml_binding.py. No session may fall back to the CPU."""

    def __init__(self, server: WineServer) -> None:
        self.server, self.sessions = server, list[WineSession]()

    def tensor(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> WineTensor:
        return self.server.tensor(dtype, shape)

    def open(self, path: Path, entries: Mapping[str, str]) -> WineSession:
        session = WineSession(self.server, path, entries)
        self.sessions.append(session)
        return session

    def run(self, session: WineSession, inputs: Mapping[str, WineTensor], outputs: Mapping[str, WineTensor]) -> None:
        session.run(inputs, outputs)

    def close(self, session: WineSession) -> None:
        self.sessions.remove(session)
        session.close()

    def calls(self) -> dict[str, int]:
        """Calls of each graph of the open sessions."""
        return {session.graph: session.calls for session in self.sessions}


@contextmanager
def on_directml(machine: WineMachine, bundle: Path, **options: object) -> Iterator[Model]:
    """The model on DirectML; within it the runtime sees onnxruntime-directml."""
    with DirectmlBinding(machine).installed():
        model = load(bundle, **options)  # type: ignore[arg-type]
        try:
            yield model
        finally:
            model.close()
            del model
            gc.collect()
