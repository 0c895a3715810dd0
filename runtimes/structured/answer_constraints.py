"""From what a request wants of its answer to the constraint that holds it to that."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any

from qwen_export.errors import ParameterError
from qwen_export.runtimes.sampling.constraint import Constraint
from qwen_export.runtimes.structured.answer_grammar import AnswerGrammar, answer_grammar
from qwen_export.runtimes.structured.answer_options import AnswerOptions
from qwen_export.runtimes.structured.grammar_constraint import GrammarConstraint
from qwen_export.runtimes.structured.thinking_budget import ThinkingBudget
from qwen_export.runtimes.structured.token_table import TokenTable
from qwen_export.runtimes.text.text_tokenizer import TextTokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher


class AnswerConstraints:
    """Those of one bundle; any thread may ask."""

    def __init__(self, tokenizer: TextTokenizer, stop_ids: Collection[int]) -> None:
        self._tokenizer, self._stop_ids = tokenizer, stop_ids
        self._lock = Lock()

    @cached_property
    def _table(self) -> TokenTable:
        return TokenTable(self._tokenizer, self._stop_ids)

    def table(self) -> TokenTable:
        """Made at the first call."""
        with self._lock:
            return self._table

    def of(self, options: AnswerOptions, tools: Sequence[Mapping[str, Any]], *, thinking: bool) -> Callable[[], Constraint | None]:
        """What makes the constraint of each answer. `thinking`: answers begin inside their reasoning.

        Raises ParameterError for a form or tools that no grammar can hold, MissingExtra where `llguidance` is needed and absent."""
        inner = self._of_grammar(options, tools, thinking=thinking)
        budget = options.thinking_budget
        if budget is None or not thinking:
            return inner
        calls = bool(tools) and options.tool_choice != "none"
        return lambda: ThinkingBudget(budget, self._tokenizer, inner(), tools=calls)

    def _of_grammar(self, options: AnswerOptions, tools: Sequence[Mapping[str, Any]], *, thinking: bool) -> Callable[[], Constraint | None]:
        grammar = answer_grammar(options, tools, thinking=thinking)
        if grammar is None:
            return lambda: None
        for name in ("ignore_eos", "min_new_tokens"):
            if getattr(options, name):
                raise ParameterError(
                    "an answer of a given form ends with the form",
                    parameter=name,
                    got=getattr(options, name),
                    fix=f"Leave {{{name}}} out, or {{form}} and {{tool_choice}}.",
                )
        table = self.table()
        matcher = _compiled(table, grammar)
        return lambda: GrammarConstraint(matcher.deep_copy(), table)


def _compiled(table: TokenTable, grammar: AnswerGrammar) -> LLMatcher:
    if grammar.form is not None:
        table.matcher(grammar.form, "form")
    *exact, loosest = grammar.whole
    for source in exact:
        try:
            return table.matcher(source, "tools")
        except ParameterError:
            continue  # a tool whose schema is not known here, and that is not strict
    return table.matcher(loosest, "tools" if grammar.calls else "form")
