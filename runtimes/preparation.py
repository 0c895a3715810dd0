"""From the ids of a prompt to the request of an answer: limits, ends, sampler, and what makes text of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qwen_export.errors import ParameterError
from qwen_export.runtimes.answer import Prepared
from qwen_export.runtimes.decoding.generation import Request
from qwen_export.runtimes.decoding.prompt_pictures import PromptPictures
from qwen_export.runtimes.sampling.constraint import Constraint
from qwen_export.runtimes.sampling.generation_config import GenerationDefaults
from qwen_export.runtimes.sampling.logprobs import LogprobRecorder, PromptRecorder
from qwen_export.runtimes.sampling.sampler import Sampler, SamplingParams
from qwen_export.runtimes.structured.answer_constraints import AnswerConstraints
from qwen_export.runtimes.structured.answer_options import AnswerOptions
from qwen_export.runtimes.text.detokenizer import Detokenizer
from qwen_export.runtimes.text.reasoning import ReasoningSplitter
from qwen_export.runtimes.text.stopping import StopStrings
from qwen_export.runtimes.text.text_tokenizer import TextTokenizer
from qwen_export.runtimes.text.tool_calls import ToolCallParser

_CALL = "<tool_call>"


@dataclass(frozen=True)
class Wanted:
    """What the caller wants of the answer to a prompt of token ids. `thinking`: it begins inside its reasoning; None for the continuation
    of a text, which has none. `constraint`: one of the caller's own."""

    ids: Sequence[int]
    sampling: SamplingParams
    options: AnswerOptions
    max_new_tokens: int | None = None
    stop: Sequence[str] | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    thinking: bool | None = None
    constraint: Constraint | None = None
    mark_at: int | None = None
    user_turn: bool = True
    progress: Callable[[int, int], None] | None = None
    pictures: PromptPictures | None = None

    @property
    def may_call(self) -> bool:
        """Whether calls are read out of the answer."""
        return bool(self.tools) and self.options.tool_choice != "none"


class Preparation:
    """What a bundle sets for all answers: its tokenizer, the tokens that end one, and generation_config.json."""

    def __init__(self, tokenizer: TextTokenizer, stop_ids: frozenset[int], defaults: GenerationDefaults) -> None:
        self._tokenizer, self._stop_ids, self._defaults = tokenizer, stop_ids, defaults
        self._constraints = AnswerConstraints(tokenizer, stop_ids)

    def prepare(self, wanted: Wanted) -> Prepared:
        """Raises ParameterError for what cannot be used."""
        if not wanted.ids:
            raise ParameterError("the prompt is empty", parameter="prompt", fix="Give some text.")
        wanted.options.check_ids(self._tokenizer.vocab_size)
        return self._answer(wanted, self._constraint(wanted), 0)

    def _constraint(self, wanted: Wanted) -> Callable[[], Constraint | None]:
        """What makes the constraint of each answer."""
        made = self._constraints.of(wanted.options, wanted.tools, thinking=bool(wanted.thinking))
        if wanted.constraint is None:
            return made
        if made() is not None:
            raise ParameterError(
                "the answer has two constraints",
                parameter="constraint",
                fix="Leave {constraint} out, or what {answer} requires of the form and of tools.",
            )
        return lambda: wanted.constraint

    def _answer(self, wanted: Wanted, constraint: Callable[[], Constraint | None], index: int) -> Prepared:
        """Answer number `index`: the seed of the first is the caller's, and each other one has the next."""
        options, tokenizer = wanted.options, self._tokenizer
        named = frozenset(options.stop_token_ids)
        ends = named if options.ignore_eos else self._stop_ids | named
        request = Request(
            wanted.ids,
            self._sampler(wanted, constraint(), ends, index),
            ends,
            self._limit(wanted),
            mark_at=wanted.mark_at,
            progress=wanted.progress,
            user_turn=wanted.user_turn,
            named_stop_ids=named - self._stop_ids,
            pictures=wanted.pictures,
            media=wanted.pictures.media if wanted.pictures is not None else (),
            prompt_recorder=None if options.prompt_logprobs is None else PromptRecorder(options.prompt_logprobs, tokenizer.vocab_size),
        )
        return Prepared(
            request,
            Detokenizer(tokenizer.tokenizer),
            StopStrings(self._defaults.stop_strings if wanted.stop is None else wanted.stop, include=options.include_stop),
            None if wanted.thinking is None else ReasoningSplitter(wanted.thinking, tool_calls=wanted.may_call),
            ToolCallParser(wanted.tools) if wanted.may_call and not options.parallel_tool_calls else None,
            options,
            lambda other: self._answer(wanted, constraint, other),
        )

    def _limit(self, wanted: Wanted) -> int | None:
        """New tokens at most. An answer that is wanted for its prompt's log probabilities may have none."""
        none = wanted.max_new_tokens == 0 and wanted.options.prompt_logprobs is not None
        return 0 if none else self._defaults.new_tokens(len(wanted.ids), wanted.max_new_tokens)

    def _sampler(self, wanted: Wanted, constraint: Constraint | None, ends: frozenset[int], index: int) -> Sampler:
        options, sampling, limit = wanted.options, wanted.sampling, self._tokenizer.vocab_size
        if options.min_new_tokens:
            sampling = replace(sampling, min_new_tokens=options.min_new_tokens)
        if sampling.seed is not None and index:
            sampling = replace(sampling, seed=sampling.seed + index)
        call = self._tokenizer.find(_CALL)
        if wanted.tools and options.tool_choice == "none" and call is not None:
            sampling = replace(sampling, suppress_tokens=(*sampling.suppress_tokens, call))
        recorder = None if options.logprobs is None else LogprobRecorder(options.logprobs, limit)
        return Sampler(sampling, limit, ends, constraint, options.logit_bias, recorder)
