"""From the ids of a prompt to the request of an answer: limits, ends, sampler, and what makes text of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qwen_export.errors import ParameterError
from qwen_export.runtimes.answer import Prepared
from qwen_export.runtimes.decoding.generation import Request
from qwen_export.runtimes.sampling.constraint import Constraint
from qwen_export.runtimes.sampling.generation_config import GenerationDefaults
from qwen_export.runtimes.sampling.logprobs import LogprobRecorder
from qwen_export.runtimes.sampling.sampler import Sampler, SamplingParams
from qwen_export.runtimes.structured.answer_options import AnswerOptions
from qwen_export.runtimes.text.detokenizer import Detokenizer
from qwen_export.runtimes.text.reasoning import ReasoningSplitter
from qwen_export.runtimes.text.stopping import StopStrings
from qwen_export.runtimes.text.text_tokenizer import TextTokenizer


@dataclass(frozen=True)
class Wanted:
    """What the caller wants of the answer to a prompt of token ids. `splitter` and `constraint` make one for each answer to it."""

    ids: Sequence[int]
    sampling: SamplingParams
    options: AnswerOptions
    max_new_tokens: int | None = None
    stop: Sequence[str] | None = None
    splitter: Callable[[], ReasoningSplitter | None] = lambda: None
    constraint: Callable[[], Constraint | None] = lambda: None
    mark_at: int | None = None
    user_turn: bool = True
    progress: Callable[[int, int], None] | None = None


class Preparation:
    """What a bundle sets for all answers: its tokenizer, the tokens that end one, and generation_config.json."""

    def __init__(self, tokenizer: TextTokenizer, stop_ids: frozenset[int], defaults: GenerationDefaults) -> None:
        self._tokenizer, self._stop_ids, self._defaults = tokenizer, stop_ids, defaults

    def prepare(self, wanted: Wanted, index: int = 0) -> Prepared:
        """Answer number `index` to a prompt: the seed of the first is the caller's, and each other one has the next. Raises ParameterError
        for what cannot be used."""
        if not wanted.ids:
            raise ParameterError("the prompt is empty", parameter="prompt", fix="Give some text.")
        options, sampling, tokenizer = wanted.options, wanted.sampling, self._tokenizer
        options.check_ids(tokenizer.vocab_size)
        _refuse_unsupported(options)
        limit = self._defaults.new_tokens(len(wanted.ids), wanted.max_new_tokens)
        named = frozenset(options.stop_token_ids)
        ends = named if options.ignore_eos else self._stop_ids | named
        if options.min_new_tokens:
            sampling = replace(sampling, min_new_tokens=options.min_new_tokens)
        if sampling.seed is not None and index:
            sampling = replace(sampling, seed=sampling.seed + index)
        recorder = None if options.logprobs is None else LogprobRecorder(options.logprobs, tokenizer.vocab_size)
        sampler = Sampler(sampling, tokenizer.vocab_size, ends, wanted.constraint(), options.logit_bias, recorder)
        request = Request(wanted.ids, sampler, ends, limit, mark_at=wanted.mark_at, named_stop_ids=named - self._stop_ids)
        request.user_turn, request.progress = wanted.user_turn, wanted.progress
        stops = StopStrings(self._defaults.stop_strings if wanted.stop is None else wanted.stop, include=options.include_stop)
        detokenizer = Detokenizer(tokenizer.tokenizer)
        return Prepared(request, detokenizer, stops, wanted.splitter(), options, lambda other: self.prepare(wanted, other))


def _refuse_unsupported(options: AnswerOptions) -> None:
    defaults = AnswerOptions()
    for name in ("form", "tool_choice", "parallel_tool_calls", "thinking_budget", "prompt_logprobs"):
        if getattr(options, name) != getattr(defaults, name):
            raise ParameterError(
                "this is not supported yet", parameter=name, got=repr(getattr(options, name))[:80], fix=f"Leave {{{name}}} out."
            )
