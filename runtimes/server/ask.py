"""What a request of any protocol asks of the engine, and how it gets there: prepared in a thread, queued, and read by one coroutine."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from qwen_export.errors import ContextOverflow
from qwen_export.runtimes.answer import Prepared
from qwen_export.runtimes.model import Model
from qwen_export.runtimes.server.message_media import check_media, has_media
from qwen_export.runtimes.server.server_settings import ServerSettings
from qwen_export.runtimes.structured.answer_options import AnswerOptions
from qwen_export.runtimes.vision.chat_media import MediaOptions

_LARGE = 100_000
"""Characters of a text that is not worth a look."""
_SHRINK = 4
"""How much shorter the tokenizer's normalization may make a text, with room."""
Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Ask:
    """`messages` of a chat, or `prompts` as they stand. `sampling`: values that replace those which the model recommends. `max_tokens`
    None: up to the end of the context. `template`: `enable_thinking` and so on, as `Model.prepare_chat` has them. `n`: answers to each
    prompt."""

    messages: list[dict[str, Any]] | None = None
    prompts: Sequence[Prompt] = ()
    tools: list[dict[str, Any]] | None = None
    template: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    stop: list[str] | None = None
    n: int = 1
    options: AnswerOptions = field(default_factory=AnswerOptions)

    @property
    def limited_options(self) -> AnswerOptions:
        """The options of a chat. Where the answer must have a form, at most half of its tokens are reasoning, unless the request has a
        budget: an answer that is cut off inside its form is of no use."""
        options = self.options
        forced = options.form is not None or options.tool_choice not in ("auto", "none")
        if not forced or self.max_tokens is None or options.thinking_budget is not None:
            return options
        return replace(options, thinking_budget=self.max_tokens // 2)

    @cached_property
    def sees(self) -> bool:
        """Whether there is something to fetch or decode, which may take seconds."""
        return has_media(self.messages or ())

    @property
    def count(self) -> int:
        """Answers in all."""
        return self.n * max(1, len(self.prompts))


def prepare(model: Model, ask: Ask, longest: int, settings: ServerSettings) -> list[list[Prepared]]:
    """For each prompt its answers. `longest`: tokens of a sequence. Raises QwenExportError for what cannot be answered."""
    _check_size(model, ask, longest)
    media = settings.media
    # What does not fit the context is refused before all of it is decoded.
    media = replace(media, max_media_tokens=min(longest, media.max_media_tokens or longest))
    return [[_fitted(prepared, longest, settings) for prepared in _answers(model, ask, prompt, media)] for prompt in ask.prompts or [""]]


def _check_size(model: Model, ask: Ask, longest: int) -> None:
    """Refuse a text that has too many tokens in any case, without reading it: that would take seconds."""
    texts = [message.get("content") for message in ask.messages or ()] + list(ask.prompts)
    size = max((len(text) for text in texts if isinstance(text, str)), default=0)
    if size > _LARGE and size > _SHRINK * longest * model.tokenizer.longest_token:
        raise ContextOverflow(
            "the prompt is longer than the context",
            got=f"{size} characters",
            expected=f"at most {longest} tokens",
            fix="Shorten the messages.",
        )


def _answers(model: Model, ask: Ask, prompt: Prompt, media: MediaOptions) -> list[Prepared]:
    if ask.messages is None:
        first = model.prepare_text(prompt, sampling=ask.sampling, max_new_tokens=ask.max_tokens, stop=ask.stop, answer=ask.options)
    else:
        check_media(ask.messages, media.access)
        known = {name: value for name, value in ask.variables.items() if name in model.template.variables}
        first = model.prepare_chat(
            ask.messages,
            tools=ask.tools,
            sampling=ask.sampling,
            max_new_tokens=ask.max_tokens,
            stop=ask.stop,
            answer=ask.limited_options,
            template_kwargs=known or None,
            media=media,
            **ask.template,
        )
    return first.several(ask.n)


def _fitted(prepared: Prepared, longest: int, settings: ServerSettings) -> Prepared:
    """The limits of the context and of time: agents ask for many thousand tokens without counting those of the prompt."""
    request = prepared.request
    if len(request.ids) > longest:
        raise ContextOverflow(
            "the prompt is longer than the context",
            got=f"{len(request.ids)} tokens",
            expected=f"at most {longest}",
            fix="Shorten the messages.",
        )
    room = max(1, longest - len(request.ids))
    request.max_new_tokens = room if request.max_new_tokens is None else min(request.max_new_tokens, room)
    if settings.answer_timeout_s is not None:
        request.deadline = time.monotonic() + settings.answer_timeout_s
    return prepared
