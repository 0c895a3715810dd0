"""Prefill of target onnx next to the same graph with the recurrence as an ONNX Scan over tokens, ONNX Runtime CPU, fp32, in one run.

    python -m benchmarks.portable_prefill CHECKPOINT [--tokens 2048] [--layers 24] [--rounds 2] [--threads 1]

Three comparisons, each in one process, in turns, with the same number of threads for both sides. `recurrence`: the delta rule of one layer
alone, from q, k, v, gates and state to outputs and state; the Scan has nothing else in its body. `mixer`: everything between a layer's
projections; the Scan has all of it in its body, as an exporter makes it of the step for one token. In both the recurrence in the Scan's
body is written once with matrix products (`scan`) and once with the products and sums that transformers writes (`scan_reference`).
`model`: the whole prompt, where both sides pay the same projections; the Scan is the first of `recurrence`, the rest is computed for all
tokens at once, and its graph reads the prompt in one call.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from qwen_export import build
from qwen_export.building.build_plan import plan_build
from qwen_export.building.lower_graphs import lower
from qwen_export.building.static_plan import PROMPT, StaticOptions
from qwen_export.graphs.call_sizes import DECODER, CallSizes, GraphPlan
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.checkpoint.checkpoint_reader import CheckpointReader
from qwen_export.graphs.config import TextConfig, parse_config
from qwen_export.graphs.ops.gated_delta_net_op import gated_delta_net
from qwen_export.graphs.passes.lowering_choice import Choice
from qwen_export.graphs.weights.expression import StoredWeight, add_weight
from qwen_export.graphs.weights.weight_writer import write_weights
from qwen_export.plugins.decompose.chunks_in_turn import in_chunks
from qwen_export.plugins.decompose.decompose_delta_net import DeltaNetSizes, emit_gated_delta_net
from qwen_export.plugins.decompose.delta_rule import DeltaRule, Recurrence, delta_rule
from qwen_export.plugins.emitter import Emitter
from qwen_export.plugins.rewrite import layer_prefix
from qwen_export.plugins.standard.standard_lowerings import LOWERINGS
from qwen_export.runtimes import load
from qwen_export.targets import ONNX
from tests.support.family import FAMILY
from tests.support.standard_graphs import emitted
from tests.support.synthesize import synthesize


def reference_rule(emit: Emitter, given: Recurrence) -> tuple[ir.Value, ir.Value]:
    """One token as transformers writes it, and torch.onnx translates it: products with broadcasting, and sums over them."""
    q, k, v, g, beta, state, *_ = given

    def total(x: ir.Value) -> ir.Value:
        return emit("", "ReduceSum", [x, emit.ints(2)], like=x, keepdims=1)[0]

    q_column, k_column = (emit.transpose(x, 0, 1, 3, 2) for x in (q, k))
    decayed = emit.mul(state, emit.exp(g))
    u = emit.mul(beta, emit.sub(v, total(emit.mul(decayed, k_column))))
    after = emit.add(decayed, emit.mul(k_column, u))
    return total(emit.mul(after, q_column)), after


def scanned(one_token: DeltaRule) -> DeltaRule:
    """The recurrence token by token in a Scan with this body: all tokens enter the state."""

    def rule(emit: Emitter, given: Recurrence) -> tuple[ir.Value, ir.Value]:
        names = ("state", "q", "k", "v", "g", "beta")
        inner = {name: ir.Value(name=f"{emit.prefix}.body.{name}", type=ir.TensorType(ir.DataType.FLOAT)) for name in names}
        body = ir.Graph(list(inner.values()), [], nodes=[], name=f"{emit.prefix}.body")
        step = Emitter(body, f"{emit.prefix}.body")
        out, after = one_token(step, Recurrence(**inner, length=1))
        body.extend(step.nodes)
        body.outputs.extend([after, out])
        # [1,H,L,D] -> [L,1,H,1,D]: slices along the first axis cost least.
        moved = [
            emit("", "Unsqueeze", [emit.transpose(x, 2, 0, 1, 3), emit.ints(3)], like=x)[0]
            for x in (given.q, given.k, given.v, given.g, given.beta)
        ]
        node = ir.Node(
            "",
            "Scan",
            [given.state, *moved],
            [ir.AttrGraph("body", body), ir.AttrInt64("num_scan_inputs", len(moved))],
            num_outputs=2,
            name=f"{emit.prefix}.scan",
        )
        state_after, stacked = node.outputs
        for value in node.outputs:
            value.type = ir.TensorType(ir.DataType.FLOAT)
        state_after.name, stacked.name = f"{emit.prefix}.scan.0", f"{emit.prefix}.scan.1"
        emit.nodes.append(node)
        (rows,) = emit("", "Squeeze", [stacked, emit.ints(3)], like=given.q)
        return emit.transpose(rows, 1, 2, 0, 3), state_after

    return rule


BODIES = {"scan": delta_rule, "scan_reference": reference_rule}
"""Of one token: with matrix products, and as transformers writes it."""


def _lower_scan(graph: ir.Graph, node: ir.Node, context: Any, shared: dict[str, ir.Value]) -> tuple[list[ir.Node], list[ir.Value]]:
    emit = Emitter(graph, f"{layer_prefix(node)}.linear_attn", shared)
    given = dict(zip(gated_delta_net.inputs, node.inputs, strict=False))
    sizes = DeltaNetSizes.of(context.config, context.static.T, context.static.P)
    results = emit_gated_delta_net(emit, given, sizes, node.attributes.get_float("eps"), context.activation, scanned(delta_rule))
    return emit.nodes, list(results)


def scan_model(checkpoint: Path, tokens: int, directory: Path) -> Path:
    """The model with a Scan, for one call over the whole prompt."""
    source = open_checkpoint(checkpoint)
    plan = plan_build(source, "onnx", max_context=tokens)
    LOWERINGS[("gated_delta_net", "scan")] = _lower_scan
    target = dataclasses.replace(plan.target, passes=plan.target.passes[:-1])  # the last one refuses control flow
    graphs = {PROMPT: GraphPlan(DECODER, CallSizes(tokens, 0, tokens, 0, padded=False))}
    plan = dataclasses.replace(plan, target=target, graphs=graphs, choices=plan.choices | {"gated_delta_net": Choice("scan", ())})
    model = lower(source, plan)[PROMPT]
    with CheckpointReader(source) as reader:
        write_weights([model], reader, directory / "scan.weights")
    path = directory / "scan.onnx"
    ir.save(model, path)
    return path


def options(threads: int) -> ort.SessionOptions:
    made = ort.SessionOptions()
    made.intra_op_num_threads = threads
    made.log_severity_level = 4
    made.add_session_config_entry("session.disable_prepacking", "1")  # as the runtime has it
    return made


def recurrence(tokens: int, heads: int, size: int, rounds: int, threads: int) -> dict[str, float]:
    """Seconds for one layer's recurrence over all tokens: in chunks, and as a Scan."""
    rng = np.random.default_rng(0)
    data = {n: rng.standard_normal((1, heads, tokens, size), np.float32) for n in "qkv"}
    data = {n: x / np.linalg.norm(x, axis=-1, keepdims=True) if n != "v" else x for n, x in data.items()}
    data |= {"g": -rng.random((1, heads, tokens, 1), np.float32), "beta": rng.random((1, heads, tokens, 1), np.float32)}

    def session(rule: DeltaRule, length: int) -> ort.InferenceSession:
        shapes = {n: (*x.shape[:2], length, *x.shape[3:]) for n, x in data.items()} | {"state": (1, heads, size, size)}
        inputs = {n: ir.Value(name=n, shape=ir.Shape(s), type=ir.TensorType(ir.DataType.FLOAT)) for n, s in shapes.items()}
        graph = ir.Graph(list(inputs.values()), [], nodes=[], name="rule", opset_imports={"": 21})
        emit = Emitter(graph, "rule")
        for i, value in enumerate(rule(emit, Recurrence(**inputs, length=length))):
            value.name = f"out{i}"
            graph.outputs.append(value)
        graph.extend(emit.nodes)
        return ort.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString(), options(threads))

    given = data | {"state": np.zeros((1, heads, size, size), np.float32)}
    rules = {"chunked": in_chunks(ONNX.delta_chunk)} | {name: scanned(body) for name, body in BODIES.items()}
    sessions = {name: session(rule, tokens) for name, rule in rules.items()}
    results: dict[str, Any] = {}

    def run(name: str) -> None:
        results[name] = sessions[name].run(None, given)[0]

    times = alternately(rounds, **{name: functools.partial(run, name) for name in sessions})
    return times | {f"max_abs_difference_{name}": float(np.abs(results[name] - results["chunked"]).max()) for name in BODIES}


class Mixer:
    """All of one DeltaNet mixer between its projections, over random weights."""

    def __init__(self, config: TextConfig, tokens: int, threads: int) -> None:
        rng, self.sizes = np.random.default_rng(0), DeltaNetSizes.of(config, 1, 0)
        H, self._threads = self.sizes.Hv, threads
        C = 2 * self.sizes.Hk * self.sizes.Dk + H * self.sizes.Dv
        widths = {"qkv": C, "z": H * self.sizes.Dv, "b": H, "a": H}
        self.rows = {n: rng.standard_normal((1, tokens, width), np.float32) for n, width in widths.items()}
        self.before = {
            "conv_history": np.zeros((1, self.sizes.K - 1, C), np.float32),
            "state": np.zeros((1, H, self.sizes.Dk, self.sizes.Dv), np.float32),
        }
        shapes = {"conv": (C, self.sizes.K), "a_log": (H,), "dt_bias": (H,), "norm": (self.sizes.Dv,)}
        self._weights = {n: rng.standard_normal(shape, np.float32) * np.float32(0.3) for n, shape in shapes.items()}

    def emit(self, emit: Emitter, values: dict[str, ir.Value], T: int, rule: Any) -> list[ir.Value]:
        """y, conv_history and state after T tokens."""
        known = {n: add_weight(emit.graph, n, StoredWeight(n, w.shape, ir.DataType.FLOAT)) for n, w in self._weights.items()}
        given: dict[str, ir.Value | None] = {**values, **known, "conv_weight": known["conv"]}
        return list(emit_gated_delta_net(emit, given, dataclasses.replace(self.sizes, T=T), 1e-6, ir.DataType.FLOAT, rule))

    def scan(self, rule: Any) -> Any:
        """A Scan over tokens with the whole mixer for one token in its body."""

        def build(emit: Emitter, values: dict[str, ir.Value]) -> list[ir.Value]:
            inner = {n: ir.Value(name=f"body.{n}", type=ir.TensorType(ir.DataType.FLOAT)) for n in (*self.before, *self.rows)}
            step = Emitter(emit.graph, "body")
            rows = {n: step("", "Unsqueeze", [inner[n], step.ints(0)], like=inner[n])[0] for n in self.rows}
            y, history, state = self.emit(step, {**{n: inner[n] for n in self.before}, **rows}, 1, rule)
            (row,) = step("", "Squeeze", [y, step.ints(0)], like=y)
            body = ir.Graph(list(inner.values()), [history, state, row], nodes=step.nodes, name="body")
            attributes = [
                ir.AttrGraph("body", body),
                ir.AttrInt64("num_scan_inputs", len(self.rows)),
                ir.AttrInt64s("scan_input_axes", [1] * len(self.rows)),
                ir.AttrInt64s("scan_output_axes", [1]),
            ]
            node = ir.Node("", "Scan", [values[n] for n in (*self.before, *self.rows)], attributes, num_outputs=3)
            for i, value in enumerate(node.outputs):
                value.name, value.type = f"scan.{i}", ir.TensorType(ir.DataType.FLOAT)
            emit.nodes.append(node)
            return [node.outputs[2], node.outputs[0], node.outputs[1]]

        return build

    def session(self, T: int, build: Any) -> ort.InferenceSession:
        shapes = {n: ((1, T, x.shape[-1]), ir.DataType.FLOAT) for n, x in self.rows.items()}
        shapes |= {n: (x.shape, ir.DataType.FLOAT) for n, x in self.before.items()}
        return ort.InferenceSession(emitted(shapes, build, self._weights).SerializeToString(), options(self._threads))


def mixer(tokens: int, config: TextConfig, rounds: int, threads: int, chunk: int) -> dict[str, float]:
    """Seconds for a whole mixer: in calls of `chunk` tokens, and as a Scan with the mixer for one token in its body, the recurrence in
    products (`scan`) and as transformers writes it (`scan_reference`)."""
    made = Mixer(config, tokens, threads)
    scans = {name: made.session(tokens, made.scan(body)) for name, body in BODIES.items()}
    calls = made.session(chunk, lambda emit, values: made.emit(emit, values, chunk, in_chunks(ONNX.delta_chunk)))
    results: dict[str, Any] = {}

    def run_chunked() -> None:
        states, outs = list(made.before.values()), []
        for start in range(0, tokens, chunk):
            part = {n: x[:, start : start + chunk] for n, x in made.rows.items()}
            y, *states = calls.run(None, part | dict(zip(made.before, states, strict=True)))
            outs.append(y)
        results["chunked"] = np.concatenate(outs, axis=1)

    def run_scan(name: str) -> None:
        results[name] = scans[name].run(None, made.rows | made.before)[0]

    times = alternately(rounds, chunked=run_chunked, **{name: functools.partial(run_scan, name) for name in scans})
    return times | {f"max_abs_difference_{name}": float(np.abs(results[name] - results["chunked"]).max()) for name in scans}


def alternately(rounds: int, **runs: Callable[[], None]) -> dict[str, float]:
    """Best seconds of each, taken in turns, in CPU time and by the clock on the wall (`_wall`). On a shared machine the clock measures the
    neighbors too; with several threads CPU time counts those that wait for work."""
    best = dict.fromkeys([*runs, *(f"{name}_wall" for name in runs)], float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - cpu)
            best[f"{name}_wall"] = min(best[f"{name}_wall"], time.perf_counter() - wall)
    return best


def whole_model(checkpoint: Path, tokens: int, rounds: int, threads: int, chunk: int, directory: Path) -> dict[str, float]:
    # Without the draft head, which the Scan has not: it reads prompts, too.
    bundle = build(checkpoint, directory / "bundle", target="onnx", max_context=tokens, options=StaticOptions(chunk), mtp=False)
    model = load(bundle, threads=threads)
    decoder = model.decoder()
    scan = ort.InferenceSession(str(scan_model(checkpoint, tokens, directory)), options(threads))
    ids = np.random.default_rng(0).integers(0, model.manifest.model["vocab_size"], tokens)
    rotary = model.manifest.rotary
    angles = np.arange(tokens, dtype=np.float32)[:, None] * np.asarray(rotary.inv_freq, np.float32)
    given = {"input_ids": ids[None], "cos": np.cos(angles), "sin": np.sin(angles), "length": np.zeros(1, np.int32)}
    last = [name for name in (output.name for output in scan.get_outputs()) if name.endswith("v_cache.next")][-1]
    for value in scan.get_inputs():
        if value.name not in given:
            given[value.name] = np.zeros(value.shape, {"tensor(float)": np.float32, "tensor(int32)": np.int32}[value.type])
    results: dict[str, Any] = {}

    def run_chunked() -> None:
        decoder.reset()
        decoder.prefill(ids.tolist())
        results["chunked"] = decoder._states[0].now(last.removesuffix(".next")).array()[:, :, :tokens]

    def run_scan() -> None:
        results["scan"] = scan.run([last], given)[0]

    native = build(checkpoint, directory / "plugin", target="onnxruntime", precision="fp32", max_context=tokens, mtp=False)
    plugin = load(native, threads=threads)
    own = plugin.decoder()

    def run_plugin() -> None:
        own.reset()
        own.prefill(ids.tolist())

    times = alternately(rounds, chunked=run_chunked, scan=run_scan, plugin=run_plugin)
    times["share_of_plugin"] = times["plugin"] / times["chunked"]
    return times | {"max_abs_difference": float(np.abs(results["chunked"] - results["scan"]).max())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, help="default: random weights of the 0.8B shape")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=24, help="of the random model")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=256, help="tokens per call of the prompt graph")
    parser.add_argument("--only", choices=["recurrence", "mixer", "model"])
    args = parser.parse_args()
    text = FAMILY["0.8B"]["text_config"]
    results = {"tokens": args.tokens, "threads": args.threads, "onnxruntime": ort.__version__}
    if args.only in (None, "recurrence"):
        results["recurrence"] = recurrence(
            args.tokens, text["linear_num_value_heads"], text["linear_key_head_dim"], args.rounds, args.threads
        )
    if args.only in (None, "mixer"):
        results["mixer"] = mixer(args.tokens, parse_config(FAMILY["0.8B"]).text, args.rounds, args.threads, args.chunk)
    if args.only in (None, "model"):
        with tempfile.TemporaryDirectory() as directory:
            checkpoint = args.checkpoint
            if checkpoint is None:
                layers = {"num_hidden_layers": args.layers, "layer_types": text["layer_types"][: args.layers]}
                config = FAMILY["0.8B"] | {"text_config": text | layers}
                checkpoint = synthesize(config, Path(directory) / "checkpoint", with_mtp=False)
            results["model"] = whole_model(checkpoint, args.tokens, args.rounds, args.threads, args.chunk, Path(directory))
    for part in ("recurrence", "mixer", "model"):
        times = results.get(part, {})
        for name in [name for name in BODIES if name in times]:
            times[f"{name}_ratio"] = times[name] / times["chunked"]
            times[f"{name}_wall_ratio"] = times[f"{name}_wall"] / times["chunked_wall"]
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
