"""Tool calls that a request requires or guards: every call that ends is one of its tools with arguments of its schema."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_export.errors import ParameterError
from qwen_export.runtimes import Generation, Model, SamplingParams, load
from qwen_export.runtimes.decoding.generation import Statistics
from qwen_export.runtimes.serving.engine import Engine
from qwen_export.runtimes.structured.answer_options import AnswerForm, AnswerOptions, ToolName
from qwen_export.runtimes.text.tool_calls import CallArguments, CallEnded, CallStarted, ToolCallParser
from qwen_export.runtimes.text.tool_values import read_tools
from tests.support.random_schemas import SCHEMAS

CHAT = [{"role": "user", "content": "What does the function os.path.join do?"}]
SAMPLED = SamplingParams(temperature=1.0, seed=3)


def tool(name: str, properties: dict[str, Any], required: Sequence[str] = (), **more: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


TOOLS = [
    tool(
        "write_file",
        {"path": {"type": "string", "maxLength": 12}, "mode": {"enum": ["w", "a"]}, "lines": {"type": "integer", "maximum": 99}},
        ["path", "mode"],
        strict=True,
    ),
    tool("now", {}),
]


@pytest.fixture(scope="module")
def models(demo_bundle: Path) -> dict[str, Model]:
    return {name: load(demo_bundle, threads=1, max_context=768, speculate=kind) for name, kind in (("plain", "off"), ("drafts", 3))}


@pytest.fixture(scope="module")
def engine(models: dict[str, Model]) -> Iterator[Engine]:
    with Engine.of(models["plain"], 8) as engine:
        yield engine


def calls(answer: Generation, tools: Sequence[dict[str, Any]]) -> list[tuple[str, Any]]:
    """Name and arguments of every call that ended; the answer has no other text."""
    parser = ToolCallParser(tools)
    events = [*parser.push(answer.content), *parser.flush(answer.statistics.finish == "stop")]
    names = [event.name for event in events if isinstance(event, CallStarted)]
    texts = ["".join(e.text for e in events if isinstance(e, CallArguments) and e.index == i) for i in range(len(names))]
    ended = {event.index for event in events if isinstance(event, CallEnded)}
    return [(name, json.loads(text)) for i, (name, text) in enumerate(zip(names, texts, strict=True)) if i in ended]


def validate(found: Sequence[tuple[str, Any]], tools: Sequence[dict[str, Any]]) -> None:
    schemas = {one["function"]["name"]: one["function"]["parameters"] for one in tools}
    for name, arguments in found:
        jsonschema.validate(arguments, schemas[name])


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("choice", ["required", ToolName("write_file"), ToolName("now")])
def test_a_call_that_is_required(models: dict[str, Model], thinking: bool, choice: Any) -> None:
    texts = set()
    for model in models.values():
        wanted = AnswerOptions(tool_choice=choice, parallel_tool_calls=False)
        answer = model.stream(CHAT, tools=TOOLS, enable_thinking=thinking, sampling=SAMPLED, max_new_tokens=200, answer=wanted)
        list(answer.events())
        [(name, arguments)] = calls(answer, TOOLS)
        validate([(name, arguments)], TOOLS)
        assert choice == "required" or name == choice.name
        assert answer.statistics.finish == "stop"
        texts.add(answer.content)
    assert len(texts) == 1


def is_one_kind(schema: dict[str, Any]) -> bool:
    """Whether a parameter is text or something else, not either: what is written for a mixture may read as another of its types."""
    types = read_tools([tool("x", {"x": schema})])["x"].parameters["x"]
    return "$defs" not in schema and ("string" not in types or (types == {"string"} and "anyOf" not in schema))


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    schemas=st.lists(st.lists(SCHEMAS.filter(is_one_kind), max_size=3), min_size=8, max_size=8),
    needed=st.integers(0, 3),
)
def test_arguments_of_strict_tools_validate(models: dict[str, Model], engine: Engine, schemas: list[list[Any]], needed: int) -> None:
    running = []
    for number, parameters in enumerate(schemas):
        names = ["path", "größe", "x-y"][: len(parameters)]
        tools = [tool("do_it", dict(zip(names, parameters, strict=True)), names[:needed], strict=True)]
        prepared = models["plain"].prepare_chat(
            [{"role": "user", "content": "Go"}],
            tools=tools,
            enable_thinking=False,
            sampling=SamplingParams(temperature=1.0, seed=number),
            max_new_tokens=80,
            answer=AnswerOptions(tool_choice="required"),
        )
        running.append((tools, engine.answer(prepared)))
    for tools, answer in running:
        list(answer.events())
        found = calls(answer, tools)
        assert found or answer.statistics.finish == "length"
        for _, arguments in found:
            schema = tools[0]["function"]["parameters"]
            jsonschema.validate(arguments, schema)


def test_many_parameters_and_schemas_that_no_grammar_holds(models: dict[str, Model]) -> None:
    many = tool("many", {f"p{i}": {"type": "boolean"} for i in range(9)}, [f"p{i}" for i in range(7)])
    odd = tool("odd", {"x": {"type": "int"}, "y": {"type": "array", "uniqueItems": True, "not": {}}, "z": {"$ref": "#/nowhere"}}, ["x"])
    for one in (many, odd):
        wanted = AnswerOptions(tool_choice="required", parallel_tool_calls=False)
        answer = models["plain"].stream(CHAT, tools=[one], enable_thinking=False, sampling=SAMPLED, max_new_tokens=400, answer=wanted)
        list(answer.events())
        [(_, arguments)] = calls(answer, [one])
        assert set(arguments) >= set(one["function"]["parameters"]["required"])
    with pytest.raises(ParameterError, match="tools"):
        strict = tool("odd", {"y": {"type": "array", "uniqueItems": True}}, strict=True)
        models["plain"].prepare_chat(CHAT, tools=[strict], answer=AnswerOptions(tool_choice="required"))


def test_calls_that_the_model_makes_by_itself_are_guarded(models: dict[str, Model]) -> None:
    """A bias makes it call at once."""
    model = models["drafts"]
    call = model.tokenizer.id_of("<tool_call>")
    for thinking in (False, True):
        wanted = AnswerOptions(logit_bias={call: 30.0}, parallel_tool_calls=False)
        answer = model.stream(CHAT, tools=TOOLS, enable_thinking=thinking, sampling=SAMPLED, max_new_tokens=200, answer=wanted)
        list(answer.events())
        found = calls(answer, TOOLS)
        assert len(found) == 1
        validate(found, TOOLS)


def test_no_call_where_none_is_wanted(models: dict[str, Model]) -> None:
    model = models["plain"]
    call = model.tokenizer.id_of("<tool_call>")
    wanted = AnswerOptions(tool_choice="none", logit_bias={call: 100.0})
    answer = model.stream(CHAT, tools=TOOLS, enable_thinking=False, sampling=SAMPLED, max_new_tokens=20, answer=wanted)
    list(answer.events())
    assert answer.tokens and call not in answer.tokens


def test_a_form_or_a_call(models: dict[str, Model]) -> None:
    model, form = models["plain"], AnswerForm("choice", ("yes", "no"))
    call = model.tokenizer.id_of("<tool_call>")
    for bias, calls_once in (({call: -100.0}, False), ({call: 100.0}, True)):
        wanted = AnswerOptions(form=form, logit_bias=bias, parallel_tool_calls=False)
        answer = model.stream(CHAT, tools=TOOLS, enable_thinking=False, sampling=SAMPLED, max_new_tokens=200, answer=wanted)
        list(answer.events())
        assert len(calls(answer, TOOLS)) == calls_once
        assert calls_once or answer.content in form.value


def test_an_answer_ends_behind_its_only_call(models: dict[str, Model]) -> None:
    """Without a grammar: the model writes two calls, and the first ends the answer."""
    model, tools = models["plain"], [TOOLS[1]]
    text = "I look.\n<tool_call>\n<function=now>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>"
    for parallel, count in ((True, 2), (False, 1)):
        options = AnswerOptions(parallel_tool_calls=parallel)
        prepared = model.prepare_chat(CHAT, tools=tools, enable_thinking=False, answer=options)
        tokens = (token for token in model.tokenizer.encode(text))
        answer = Generation(tokens, statistics := Statistics(), prepared)
        list(answer.events())
        assert statistics.finish == ("" if parallel else "stop")
        statistics.finish = "stop"
        assert len(calls(answer, tools)) == count


@pytest.mark.parametrize(("choice", "tools"), [("required", None), ("required", []), (ToolName("other"), TOOLS), (ToolName("now"), None)])
def test_choices_that_no_tool_fits(models: dict[str, Model], choice: Any, tools: Any) -> None:
    with pytest.raises(ParameterError, match="tool_choice"):
        models["plain"].prepare_chat(CHAT, tools=tools, answer=AnswerOptions(tool_choice=choice))
