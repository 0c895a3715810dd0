"""The body of /v1/completions, as a request to the engine."""

from __future__ import annotations

from qwen_export.runtimes.server.ask import Ask, Prompt
from qwen_export.runtimes.server.sampling_body import SamplingBody, wrong
from qwen_export.runtimes.server.wire_errors import HttpError
from qwen_export.runtimes.structured.answer_options import AnswerOptions

TOKENS = 16
"""Tokens of an answer without max_tokens, as in OpenAI's protocol."""
MOST_LOGPROBS = 20


class CompletionBody(SamplingBody):
    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool = False
    logprobs: int | None = None
    suffix: str | None = None

    @property
    def least_tokens(self) -> int:
        return 0 if self.echo else 1

    @property
    def only_prompt(self) -> bool:
        """Whether nothing but the prompt is wanted, with its log probabilities."""
        return self.echo and self.max_tokens == 0


def completion_ask(body: CompletionBody) -> Ask:
    """Raises HttpError and ParameterError for fields that cannot be used."""
    if body.suffix:
        raise HttpError("a suffix is not supported", code="unsupported_field", field="suffix", fix="Leave suffix out.")
    body.check_shared()
    if body.logprobs is not None and not 0 <= body.logprobs <= MOST_LOGPROBS:
        raise wrong("logprobs", body.logprobs, f"0 to {MOST_LOGPROBS}")
    prompts = prompt_list(body.prompt)
    if not prompts or not all(prompts):
        raise HttpError("a prompt is empty", code="invalid_value", field="prompt", fix="Give some text.")
    least = 0 if body.echo and body.logprobs is not None else 1
    options = AnswerOptions(**body.answer_options(), logprobs=body.logprobs, prompt_logprobs=body.logprobs if body.echo else None)
    return Ask(
        prompts=prompts,
        sampling=body.sampling(),
        max_tokens=TOKENS if body.max_tokens is None else max(least, body.max_tokens),
        stop=body.stops,
        n=body.n,
        options=options,
    )


def prompt_list(prompt: str | list[str] | list[int] | list[list[int]]) -> list[Prompt]:
    """One text, several, the ids of one, or of several."""
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [[i for i in prompt if isinstance(i, int)]]
    return [one for one in prompt if not isinstance(one, int)]
