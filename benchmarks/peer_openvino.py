"""A bundle of target onnx on OpenVINO beside what OpenVINO's own exporter makes of the same checkpoint, in turns in one process.

    PY -m pip install optimum-intel==2.2.0 transformers==5.2.0 nncf            # an environment of its own
    python -m benchmarks.peer_pictures openvino CHECKPOINT DIR                 # the folder that the exporter reads, and its command
    python -m benchmarks.peer_openvino BUNDLE PEER [--hint f32] [--tokens 512] [--steps 16] [--rounds 3] [--threads 1]

PEER is the exporter's folder in fp16, or compressed (`--weight-format int8`). It runs without its pipeline: embeddings and language model,
with logits of the last token only, as the pipeline has them. No text is read twice and nothing is kept between texts. `--hint` is the
arithmetic of the peer, by default ours; its own default is bf16 where the processor has it. Processor seconds of the process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np

from qwen_export.manifest import load_manifest
from qwen_export.runtimes import load
from qwen_export.runtimes.backends.openvino.openvino_options import openvino_options


class Side(Protocol):
    def prompt(self, ids: Sequence[int]) -> Any: ...
    def step(self, token: int) -> Any: ...


class Ours:
    def __init__(self, bundle: Path, threads: int) -> None:
        self._model = load(bundle, threads=threads, runtime="openvino", speculate="off")
        self._decoder = self._model.decoder()
        self.vocabulary = int(self._model.manifest.model["vocab_size"])

    def prompt(self, ids: Sequence[int]) -> Any:
        self._decoder.reset()
        return self._decoder.prefill(list(ids))

    def step(self, token: int) -> Any:
        return self._decoder.step([token])


class Exported:
    """The exporter's models of one checkpoint."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        import openvino as ov

        core = ov.Core()
        model = core.read_model(folder / "openvino_language_model.xml")
        _last_row(model)
        self._embeddings = core.compile_model(folder / "openvino_text_embeddings_model.xml", "CPU", options).create_infer_request()
        self._language = core.compile_model(model, "CPU", options).create_infer_request()
        self._read = 0

    def prompt(self, ids: Sequence[int]) -> Any:
        self._language.reset_state()
        self._read = 0
        return self._run(ids)

    def step(self, token: int) -> Any:
        return self._run([token])

    def _run(self, ids: Sequence[int]) -> Any:
        T = len(ids)
        rows = next(iter(self._embeddings.infer([np.array([ids], np.int64)]).values()))
        positions = np.arange(self._read, self._read + T, dtype=np.int64)
        self._read += T
        given = {
            "inputs_embeds": rows,
            "attention_mask": np.ones((1, self._read), np.int64),
            "position_ids": np.broadcast_to(positions, (4, 1, T)).copy(),
            "beam_idx": np.zeros(1, np.int32),
        }
        return next(iter(self._language.infer(given).values())).copy()


def _last_row(model: Any) -> None:
    """Logits of the last token only: a Gather before the product with the LM head, as OpenVINO GenAI does it."""
    from openvino import opset13 as ops

    node = model.outputs[0].get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    rows = node.input_value(0)
    node.input(0).replace_source_output(ops.gather(rows, np.array([-1], np.int64), np.array(1, np.int64)).output(0))
    model.validate_nodes_and_infer_types()


def measured(side: Side, ids: Sequence[int], steps: int) -> tuple[dict[str, float], Any]:
    """Seconds of a prompt and of a step behind it, and the logits of the last token."""
    read = len(ids) - steps
    times = [time.process_time()]
    side.prompt(ids[:read])
    for token in ids[read:]:
        times.append(time.process_time())
        row = np.array(side.step(token), np.float32).reshape(-1)
    return {"prompt": times[1] - times[0], "step": float(median(np.diff(times[1:])))}, row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("peer", type=Path)
    parser.add_argument("--hint", help="INFERENCE_PRECISION_HINT of the peer: f32, f16 or bf16")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    options = openvino_options(load_manifest(given.bundle), given.threads)
    theirs = options | ({"INFERENCE_PRECISION_HINT": given.hint} if given.hint else {})
    ours = Ours(given.bundle, given.threads)
    sides: dict[str, Side] = {"ours": ours, "peer": Exported(given.peer, theirs)}
    rng = np.random.default_rng(0)
    times: dict[str, dict[str, list[float]]] = {name: {"prompt": [], "step": []} for name in sides}
    rows: dict[str, Any] = {}
    for number in range(given.rounds + 1):
        ids = rng.integers(0, ours.vocabulary, given.tokens + given.steps).tolist()
        for name, side in sides.items():
            found, rows[name] = measured(side, ids, given.steps)
            if number:  # the first warms up
                for what, value in found.items():
                    times[name][what].append(value)
    distance = float(np.sqrt(np.mean((rows["ours"] - rows["peer"]) ** 2)) / rows["peer"].std())
    arithmetic = [each["INFERENCE_PRECISION_HINT"] for each in (options, theirs)]
    print("arithmetic: ours {}, peer {}; logits apart, rms: {:.4f} of their deviation".format(*arithmetic, distance))
    print("| | ours, s | peer, s | peer / ours |\n|---|---|---|---|")
    for what in ("prompt", "step"):
        a, b = times["ours"][what], times["peer"][what]
        ratio = median(y / x for x, y in zip(a, b, strict=True))
        print(f"| {what} | {median(a):.3f} | {median(b):.3f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
