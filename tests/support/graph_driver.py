"""Greedy decoding over a static bundle's graphs with any runtime: states go in and come out as arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_export.manifest import load_manifest
from qwen_export.runtimes.decoding.static_graphs import PROMPT, STEP

Arrays = dict[str, npt.NDArray[Any]]
Run = Callable[[str, Arrays], Mapping[str, npt.NDArray[Any]]]
"""Runs the graph of that name on named inputs; named outputs."""

_NUMPY = {"float": np.float32, "float16": np.float16, "int32": np.int32, "int64": np.int64}


class GraphDriver:
    def __init__(self, bundle: Path, run: Run) -> None:
        self.manifest, self._run = load_manifest(bundle), run
        self._graphs = self.manifest.graphs
        shapes = {t.name: t for graph in self._graphs.values() for t in graph.inputs}
        self._states: Arrays = {
            s.name: np.zeros([int(d) for d in s.shape], _NUMPY[s.dtype]) for graph in self._graphs.values() for s in graph.states
        }
        rotary = self.manifest.rotary
        angles = np.arange(int(shapes["cos"].shape[0]), dtype=np.float32)[:, None] * np.asarray(rotary.inv_freq, np.float32)
        self._tables = {"cos": np.cos(angles) * np.float32(rotary.scaling), "sin": np.sin(angles) * np.float32(rotary.scaling)}
        self._length = 0

    def _call(self, name: str, ids: Sequence[int]) -> Mapping[str, npt.NDArray[Any]]:
        graph = self._graphs[name]
        names = {t.name: t for t in graph.inputs}
        padded = np.zeros((1, int(names["input_ids"].shape[1])), np.int64)
        padded[0, : len(ids)] = ids
        values = self._tables | self._states
        values |= {"input_ids": padded, "length": np.array([self._length], np.int32), "accepted": np.zeros(1, np.int32)}
        values["commit"] = np.array([len(ids)], np.int32)
        results = self._run(name, {key: values[key] for key in names})
        for state in graph.states:
            self._states[state.name] = np.asarray(results[state.after]).copy()
        self._length += len(ids)
        return results

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        chunk = int(next(t.shape[1] for t in self._graphs[PROMPT].inputs if t.name == "input_ids"))
        for start in range(0, len(prompt) - 1, chunk):
            self._call(PROMPT, prompt[start : min(start + chunk, len(prompt) - 1)])
        tokens = [prompt[-1]]
        for _ in range(count):
            logits = self._call(STEP, tokens[-1:])["logits"][0]
            tokens.append(int(logits.argmax()))
        return tokens[1:]
