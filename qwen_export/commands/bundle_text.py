"""The report on a bundle for people."""

from __future__ import annotations

import importlib.util
from typing import Any

from qwen_export.commands.output import mixers, size
from qwen_export.commands.stage_text import stage_lines


def bundle_text(report: dict[str, Any]) -> str:
    """What `inspect_bundle` found, a line per subject, and what to ask next."""
    model, target = report["model"], report["target"]
    formats = [f"{name} {value}" for name, value in report["formats"].items()]
    lines = [
        f"This is a bundle for target {target['name']} on {target['device']} in {report['precision']}, made by {report['producer']}.",
        "",
        _line(
            "model",
            f"{report['architecture'] or 'unknown architecture'}, {model['kind']}, {mixers(model)}, "
            f"hidden {model['hidden_size']}, vocabulary {model['vocab_size']}",
        ),
        _line("context", f"{report['max_context']} tokens" + (f", rope {model['rope_scaling']}" if model["rope_scaling"] else "")),
        _line("memory", _memory(report["sequence"], report["max_context"])),
        _line("precision", "; ".join(formats) or report["precision"]),
        _line("needs", _needs(report)),
        _line("drafts", _drafts(report["speculation"])),
        _line("pictures", _pictures(report["pictures"])),
    ]
    width = max(map(len, report["graphs"]))
    for number, (name, graph) in enumerate(report["graphs"].items()):
        tokens = "any number of tokens" if graph["tokens"] is None else f"{graph['tokens']} token{'s' * (graph['tokens'] != 1)}"
        slots = f" over {graph['slots']} slots" if graph["slots"] else ""
        lines.append(_line("" if number else "graphs", f"{name:{width}}  {graph['file']}, {size(graph['bytes'])}: {tokens}{slots} a call"))
    lines += [_line("" if number else "stages", text) for number, text in enumerate(stage_lines(report["stages"]))]
    outside = report["outside"]
    lines += [
        _line(
            "files",
            f"{report['files']}, {size(report['bytes'])}"
            + (f", and {outside['files']} checkpoint files outside, {size(outside['bytes'])}" if outside["files"] else ""),
        ),
        _line("manifest", _digest(report["manifest"])),
        *(
            [_line("native", f"{', '.join(report['native_libraries'])}: code that runs in the process")]
            if report["native_libraries"]
            else []
        ),
        _line("verified", _verified(report["verification"])),
        "",
        f"Does it run here?              qwen-export check {report['path']}",
        f"Is it the checkpoint's model?  qwen-export verify {report['path']} --reference CHECKPOINT" + _where(),
    ]
    return "\n".join(lines)


def _where() -> str:
    """Where `verify` can run, if not here."""
    try:
        found = importlib.util.find_spec("torch") is not None
    except ImportError:
        found = False
    return "" if found else "\n                               (where the extra `export` is installed)"


def _line(name: str, text: str) -> str:
    return f"{name:10} {text}"


def _memory(sequence: dict[str, int], context: int) -> str:
    full = size(sequence["full_bytes"])
    if not sequence["token_bytes"]:
        return f"{full} for each sequence, from the start"
    state, token = size(sequence["state_bytes"]), f"{sequence['token_bytes'] / 1024:.1f} KiB"
    return f"{state} for each sequence and {token} per token: {full} at {context} tokens"


def _digest(manifest: dict[str, Any]) -> str:
    return f"sha256 {manifest['sha256']}" + (", signed (see check --key)" if manifest["signed"] else "")


def _needs(report: dict[str, Any]) -> str:
    target, engine = report["target"], report["engine"]
    if engine is None:
        platform = f" on {report['platform']}" if report["platform"] else ""
        return f"{target['backend']} {target['minimum_backend']} or newer{platform}"
    sms = ", ".join(engine["sms"]) + (" or newer" if engine["hardware_compatibility"] == "ampere+" else "")
    parts = [
        f"{target['backend']} {engine['version']}" + (" or newer" if engine["version_compatible"] else ""),
        f"a GPU of SM {sms}",
        f"a driver for CUDA {engine['minimum_cuda']}",
        f"engines with {engine['weights']} weights" + (" that can wait in host memory" if engine["weight_streaming"] else ""),
    ]
    if engine["plugins"]:
        parts[-1] += f" and our own kernel for {', '.join(engine['plugins'])}"
    return ", ".join(parts) + (
        "; for another GPU or version `qwen-export rebuild`" if engine["carries_onnx"] else "; no graphs to rebuild from"
    )


def _drafts(speculation: dict[str, int] | None) -> str:
    if speculation is None:
        return "none: it was built without speculation"
    vocabulary = speculation["draft_vocab"]
    by = (
        f"by its draft head, among the lowest {vocabulary} ids, or from the text"
        if vocabulary
        else "from the text (run --speculate lookup)"
    )
    return f"up to {speculation['max_draft']} a round, {by}"


def _pictures(pictures: dict[str, int] | None) -> str:
    if pictures is None:
        return "none: it reads text only"
    return f"a token per {pictures['pixels_per_token']} pixels, up to {pictures['most_tokens']} tokens each"


def _verified(verification: dict[str, Any]) -> str:
    if not verification:
        return "not yet"
    return f"{verification.get('when', '')}: {'passed' if verification.get('passed') else 'FAILED'}"
