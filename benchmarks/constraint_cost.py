"""What a grammar costs per token, with the family's vocabulary: `python benchmarks/constraint_cost.py TOKENIZER_JSON`.

Each line follows one text of its form, token by token. A mask is made while the device works; beside it stands what is left for the thread
that chooses: looking a finished mask up, and a choice among 64 candidates under it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from qwen_export.runtimes import SamplingParams
from qwen_export.runtimes.decoding.logit_rows import Row, Rows, Top
from qwen_export.runtimes.sampling.sampler import Sampler
from qwen_export.runtimes.sampling.token_history import TokenHistory
from qwen_export.runtimes.structured.answer_constraints import AnswerConstraints
from qwen_export.runtimes.structured.answer_options import AnswerForm, AnswerOptions
from qwen_export.runtimes.text.text_tokenizer import TextTokenizer

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array", "items": {"type": "string"}}},
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "write_file",
        "parameters": {
            "type": "object",
            "properties": {"path": {"type": "string"}, "text": {"type": "string"}},
            "required": ["path", "text"],
        },
    },
}
REASONING = "The user wants a person. I should think of <b>one</b> with a name, an age and {tags}.\nLet me do that now.\n" * 4
CALL = (
    "<tool_call>\n<function=write_file>\n<parameter=path>\nsrc/main.py\n</parameter>\n"
    "<parameter=text>\n{text}\n</parameter>\n</function>\n</tool_call>"
)
TEXTS = {
    "schema": (AnswerOptions(form=AnswerForm("json_schema", PERSON)), '{"name": "Ada Lovelace", "age": 36, "tags": ["first", "programs"]}'),
    "reasoning, then schema": (
        AnswerOptions(form=AnswerForm("json_schema", PERSON)),
        REASONING + '\n</think>\n\n{"name": "Ada", "age": 36, "tags": []}',
    ),
    "any JSON object": (AnswerOptions(form=AnswerForm("json_object")), '{"a": [1, 2.5, true, null, {"b": "text of some words"}], "c": ""}'),
    "tool call": (AnswerOptions(tool_choice="required"), CALL.format(text="for i in range(3):\n    print(i)\n" * 12)),
}


def main() -> None:
    tokenizer = TextTokenizer.from_file(sys.argv[1])
    stops = [tokenizer.id_of("<|im_end|>"), tokenizer.id_of("<|endoftext|>")]
    constraints = AnswerConstraints(tokenizer, stops)
    _, seconds = _timed(constraints.table)
    print(f"token table of {tokenizer.vocab_size} tokens: {seconds:.2f} s, once")
    print("form                      tokens  compile ms   mask us: median  p90  max   look up us  choice us")
    for name, (options, text) in TEXTS.items():
        tools = [TOOL] if options.tool_choice == "required" else []
        make, compiled = _timed(partial(constraints.of, options, tools, thinking="</think>" in text))
        sampler = Sampler(SamplingParams(temperature=1.0, top_k=20, seed=0), tokenizer.vocab_size, stops, make())
        ids = np.array(tokenizer.encode(text))
        masks, looks, choices = _follow(sampler, ids, _row(tokenizer.vocab_size))
        spread = f"{np.median(masks):15.0f} {np.quantile(masks, 0.9):4.0f} {masks.max():4.0f}"
        print(f"{name:25} {len(ids):6} {1e3 * compiled:11.1f} {spread} {np.median(looks):12.1f} {np.median(choices):10.0f}")


def _follow(sampler: Sampler, ids: Any, row: Row) -> Any:
    """Microseconds [3, n]: masks made, masks looked up, and choices, by token."""
    times, history, constraint = [], TokenHistory([0]), sampler.constraint
    assert constraint is not None
    for place, token in enumerate(ids.tolist()):
        before = ids[:place]
        made = _timed(constraint.allowed, before)[1]
        times.append((made, _timed(constraint.allowed, before)[1], _timed(sampler.distribution, row, history)[1]))
        history.push(token)
    return 1e6 * np.array(times).T


def _row(vocabulary: int) -> Row:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal(vocabulary).astype(np.float32)
    ids = np.argsort(-logits)[:64].astype(np.int32)
    top = Top(memoryview(logits[ids]), memoryview(ids))
    return Rows(lambda: logits[None], lambda: top, 64)[0]


def _timed(call: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    began = time.perf_counter()
    made = call(*arguments)
    return made, time.perf_counter() - began


if __name__ == "__main__":
    main()
