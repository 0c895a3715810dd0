"""Make chat-formatted samples from docstrings: questions about a function, requests to write one, and tool calls that look one up.

    python chat_samples.py --work build/corpus       # reads code.{train,heldout}.jsonl, writes chat.{train,heldout}.jsonl

A conversation is rendered by the checkpoint's own chat template, so the model sees exactly the format it is later prompted with.
The think block is a short plan made from the signature; half of the samples have an empty one, as with enable_thinking=False.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import random
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizer import read_jsonl

Message = dict[str, Any]
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You answer questions about Python.", "You are a Python programmer. Be brief.")
LOOKUP_TOOL = {
    "type": "function",
    "function": {
        "name": "lookup_doc",
        "description": "Return the documentation of a Python object.",
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
    },
}


@dataclass(frozen=True)
class Documented:
    """A function or class with a docstring: dotted name, argument names, first paragraph, and its source if it is short."""

    module: str
    name: str
    kind: str
    arguments: tuple[str, ...]
    summary: str
    source: str | None


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def load_template(path: Path) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(path.read_text())


def documented(path: str, text: str) -> Iterator[Documented]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return
    lines = text.split("\n")
    module = re.sub(r"(/__init__)?\.py$", "", path).replace("/", ".")
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        docstring = ast.get_docstring(node)
        summary = " ".join(inspect.cleandoc(docstring or "").split("\n\n")[0].split())
        if not 25 <= len(summary) <= 400 or summary.startswith((":", "@", ".. ")):
            continue
        if isinstance(node, ast.ClassDef):
            yield Documented(module, node.name, "class", (), summary, None)
            continue
        arguments = tuple(a.arg for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs] if a.arg not in ("self", "cls"))
        body = lines[node.lineno - 1 : node.end_lineno]
        short = 4 <= len(body) <= 25 and "self" not in body[0]
        yield Documented(module, node.name, "function", arguments, summary, textwrap.dedent("\n".join(body)) if short else None)


def plan(item: Documented, writing: bool) -> str:
    if item.kind == "class":
        return f"The user asks about the class {item.name} of {item.module}. I should say what it is for."
    takes = f"It takes {', '.join(item.arguments[:5])}." if item.arguments else "It takes no arguments."
    if writing:
        return f"The user wants a function named {item.name}. {takes} I should write it with a docstring."
    return f"The user asks about the {item.kind} {item.name} of {item.module}. {takes} I should say what it does."


def answer(item: Documented) -> str:
    if item.kind == "class":
        return f"`{item.name}` is a class in `{item.module}`. {item.summary}"
    return f"`{item.name}({', '.join(item.arguments)})` is a function in `{item.module}`. {item.summary}"


def question(item: Documented, rng: random.Random) -> str:
    full = f"{item.module}.{item.name}"
    return rng.choice(
        (
            f"What does {full} do?",
            f"What does `{item.name}` do?",
            f"Explain the {item.kind} {item.name} in {item.module}.",
            f"What is {full} for?",
            f"How do I use {full}?",
        )
    )


def conversation(item: Documented, rng: random.Random) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """One or two turns: a lookup with a tool, a request for code, or a question answered from the docstring."""
    messages: list[Message] = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    thinking = rng.random() < 0.5
    draw = rng.random()
    if draw < 0.1:
        call = {"function": {"name": "lookup_doc", "arguments": {"name": f"{item.module}.{item.name}"}}}
        think = f"I should look up {item.module}.{item.name}." if thinking else ""
        messages += [
            {"role": "user", "content": question(item, rng)},
            {"role": "assistant", "content": "", "reasoning_content": think, "tool_calls": [call]},
            {"role": "tool", "content": item.summary},
            {"role": "assistant", "content": answer(item), "reasoning_content": "The documentation says what it does." if thinking else ""},
        ]
        return messages, [LOOKUP_TOOL]
    if draw < 0.5 and item.source:
        lower = item.summary[0].lower() + item.summary[1:].rstrip(".")
        request = rng.choice((f"Write a Python function `{item.name}`: {lower}.", f"Write a function named {item.name}. {item.summary}"))
        reply, writing = f"```python\n{item.source}\n```", True
    else:
        request, reply, writing = question(item, rng), answer(item), False
    messages.append({"role": "user", "content": request})
    messages.append({"role": "assistant", "content": reply, "reasoning_content": plan(item, writing) if thinking else ""})
    if rng.random() < 0.15:
        messages += [{"role": "user", "content": "Thanks."}, {"role": "assistant", "content": "You are welcome."}]
    return messages, None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/corpus"))
    parser.add_argument("--max-per-file", type=int, default=3)
    args = parser.parse_args()
    template = load_template(Path(__file__).parent / "chat_template.jinja")
    for split in ("train", "heldout"):
        count = size = 0
        with (args.work / f"chat.{split}.jsonl").open("w") as out:
            for row in read_jsonl(args.work / f"code.{split}.jsonl"):
                rng = random.Random(hashlib.blake2b(f"{row['source']}/{row['path']}".encode()).digest())
                items = list(documented(row["path"], row["text"]))
                for item in rng.sample(items, min(args.max_per_file, len(items))):
                    messages, tools = conversation(item, rng)
                    text = template.render(messages=messages, tools=tools, add_generation_prompt=False)
                    out.write(json.dumps({"source": row["source"], "path": row["path"], "text": text}) + "\n")
                    count, size = count + 1, size + len(text)
        print(f"chat {split:8s} {count:7d} samples {size / 1e6:8.1f} MB")


if __name__ == "__main__":
    main()
