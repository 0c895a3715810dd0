"""Examples under the help of a command. A test runs or parses each of them: tests/documents/."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "inspect": (
        ("qwen-export inspect Qwen3.5-0.8B", "a checkpoint: what each target makes of it"),
        ("qwen-export inspect bundles/qwen --json", "a bundle, as JSON"),
    ),
    "build": (
        ("qwen-export build Qwen3.5-0.8B -o bundles/qwen --precision int4", "for this machine's CPU, 4-bit weights"),
        ("qwen-export build Qwen3.5-0.8B -o bundles/cuda --device cuda --precision bf16", "for a GPU, by ONNX Runtime"),
        ("qwen-export build Qwen3.5-0.8B -o bundles/windows --target directml", "for any GPU under Windows"),
    ),
    "verify": (
        ("qwen-export verify bundles/qwen --reference Qwen3.5-0.8B", "logits against the checkpoint"),
        ("qwen-export verify bundles/qwen --reference Qwen3.5-0.8B --per-layer", "the error of each layer, to find where one starts"),
    ),
    "run": (
        ('qwen-export run bundles/qwen "def fibonacci(n):" --max-new-tokens 64', "continue a text"),
        ('qwen-export run bundles/qwen "Why is the sky blue?" --chat --no-thinking', "answer a question"),
        ("git diff | qwen-export run bundles/qwen - --chat --json", "a prompt from a pipe, the answer with its numbers"),
    ),
    "chat": (("qwen-export chat bundles/qwen", "a conversation; /help lists what can be typed"),),
    "serve": (
        ("qwen-export serve bundles/qwen", "on this machine only, with a page to chat at /"),
        ("qwen-export serve bundles/qwen --host 0.0.0.0 --api-key-file keys --slots 16", "for others, 16 answers at a time"),
    ),
    "batch": (("qwen-export batch bundles/qwen requests.jsonl -o answers.jsonl", "a file of requests, side by side"),),
    "bench": (
        ("qwen-export bench bundles/qwen", "load, prompts, steps, drafts, memory"),
        ("qwen-export bench bundles/qwen --plot speed.png", "the same, drawn"),
    ),
    "check": (("qwen-export check bundles/qwen", "on the machine that is to run it"),),
    "package": (
        ("qwen-export package bundles/qwen -o qwen-whole", "a bundle that needs no other files"),
        ("qwen-export package bundles/windows -o qwen.zip --windows", "a zip with runtime and start script for Windows"),
    ),
    "rebuild": (("qwen-export rebuild bundles/rtx", "after TensorRT or the GPU has changed"),),
    "completion": (('eval "$(qwen-export completion bash)"', "a line for ~/.bashrc"),),
}
"""Command -> its examples and what each is for, in the order of the help."""


def epilog(command: str) -> str:
    """The end of the help of `command`: its examples, as click prints them without wrapping."""
    lines = [f"  # {reason}\n  {line}" for line, reason in EXAMPLES[command]]
    return "\b\nExamples:\n" + "\n".join(lines)
