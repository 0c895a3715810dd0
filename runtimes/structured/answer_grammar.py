"""The grammar of a whole answer, from its first token: reasoning, then text, a form or tool calls.

It is JSON text for `llguidance`: the main grammar in Lark, and the form that the caller gave as a grammar of its own, which the main one
names `@form`. One grammar holds the reasoning too, so there is no border at which another part would have to take over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qwen_export.extras import needed_for
from qwen_export.runtimes.structured.answer_options import AnswerForm, AnswerOptions, ToolName
from qwen_export.runtimes.structured.json_grammar import json_grammar
from qwen_export.runtimes.structured.lark_text import literal, without
from qwen_export.runtimes.structured.tool_functions import tool_functions
from qwen_export.runtimes.structured.tool_grammar import call_rules


class AnswerGrammar(NamedTuple):
    """Texts for `TokenTable.matcher`: `whole` of the whole answer, the first one that compiles; `form` of the form alone, whose errors are
    those of the caller's form. `calls`: the answer may hold calls."""

    whole: list[str]
    form: str | None
    calls: bool


def answer_grammar(options: AnswerOptions, tools: Sequence[Mapping[str, Any]], *, thinking: bool) -> AnswerGrammar | None:
    """The grammar that an answer needs, None where no part of it is given. `thinking`: the answer begins inside its reasoning.

    Raises ParameterError for a form that is no JSON, and where a tool must be called that there is not."""
    functions = tool_functions(tools)
    options.check_tools([function.name for function in functions])
    choice = options.tool_choice
    must_call = choice == "required" or isinstance(choice, ToolName)
    if isinstance(choice, ToolName):
        functions = [function for function in functions if function.name == choice.name]
    guarded = choice == "auto" and (options.form is not None or any(function.strict for function in functions))
    if not (must_call or guarded):
        functions = []
    if not functions and options.form is None:
        return None
    form = _form(options.form) if options.form is not None and not must_call else None
    whole = []
    for exact in (True, False) if any(not function.strict for function in functions) else (True,):
        rules = _start(thinking, bool(functions), form is not None, must_call)
        rules += call_rules(functions, parallel=options.parallel_tool_calls, exact=exact) if functions else []
        named = [{"name": "form", **form}] if form is not None else []
        whole.append(json.dumps({"grammars": [{"lark_grammar": "\n".join(rules)}, *named]}))
    return AnswerGrammar(whole, json.dumps({"grammars": [form]}) if form is not None else None, bool(functions))


def _start(thinking: bool, calls: bool, form: bool, must_call: bool) -> list[str]:
    """Rules for all but the calls and the form. Text must not hold the letters of tags: they would be read as tags."""
    inside = ["</think>", "<tool_call>"] if calls else ["</think>"]
    rules = [f"REASONING: {without(inside)}", f"TEXT: {without(['<tool_call>', '<function='])}"]
    if must_call:
        return [f"start: {_closed(thinking)} calls", *rules[:1]] if thinking else ["start: calls"]
    if not calls:
        return [f"start: {_closed(thinking)} @form", *rules[:1]] if thinking else ["start: @form"]
    answer = "(@form | calls)" if form else "TEXT calls?"
    if not thinking:
        return [f"start: {answer}", *([] if form else rules[1:])]
    # A model may call without closing its reasoning.
    space = r'"\n\n" ' if form else ""
    return [f"start: REASONING (</think> {space}{answer} | calls)", *(rules[:1] if form else rules)]


def _closed(thinking: bool) -> str:
    return r'REASONING </think> "\n\n"' if thinking else ""


def _form(form: AnswerForm) -> dict[str, Any]:
    """The form as one of llguidance's grammars."""
    match form.kind:
        case "json_object":
            return {"json_schema": json_grammar({"type": "object"}, strict=True)}
        case "json_schema":
            return {"json_schema": json_grammar(form.value, strict=form.strict)}
        case "regex":
            with needed_for("an answer of a given form"):
                from llguidance import LLMatcher
            (found,) = json.loads(LLMatcher.grammar_from_regex(form.value))["grammars"]
            return {"lark_grammar": found["lark_grammar"]}
        case "choice":
            return {"lark_grammar": "start: " + " | ".join(map(literal, form.value))}
        case "grammar":
            return {"lark_grammar": form.value}
