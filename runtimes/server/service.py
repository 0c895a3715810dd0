"""What the routes of one application share: the model and its engine once they are there, and who is let in."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from qwen_export.errors import OverloadedError, ParameterError, QwenExportError
from qwen_export.runtimes.model import Model
from qwen_export.runtimes.server.answer_choices import Choice, Choices
from qwen_export.runtimes.server.ask import Ask, prepare
from qwen_export.runtimes.server.server_settings import ServerSettings
from qwen_export.runtimes.server.serving_metrics import ServingMetrics
from qwen_export.runtimes.server.wire_errors import HttpError, Refusal, refusal_of, starting, stopping
from qwen_export.runtimes.serving.answering import Answering
from qwen_export.runtimes.structured.answer_options import AnswerForm, AnswerOptions
from qwen_export.runtimes.text.tool_calls import ToolCallParser

Phase = Literal["starting", "ready", "stopping"]

_WARM_TOKENS = 4
_QUEUE_PER_SLOT = 4
_MEDIA_THREADS = 4
_LONGEST_RETRY_S = 60


class Service:
    """An application may listen before `start`: until then it answers 503."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.phase: Phase = "starting"
        self.progress = ""
        """What is being done before it is ready."""
        self.metrics = ServingMetrics()
        self.names: tuple[str, ...] = settings.names
        self.created = int(time.time())
        self._model: Model | None = None
        self._engine: Answering | None = None
        self._open = 0
        """Answers that were let in and have not ended."""
        self._seconds = 1.0
        """What an answer took lately."""
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="prepare")
        self._media_threads = ThreadPoolExecutor(_MEDIA_THREADS, thread_name_prefix="media")
        """Texts do not wait for hosts that send pictures, and for large files."""

    def prepare(self, model: Model, engine: Answering, report: Callable[[str], None] = lambda text: None) -> None:
        """Do now what would otherwise make the first requests slow."""
        for what, done in (
            ("reading the tokenizer", lambda: (model.tokenizer, model.stop_ids, model.recommended(False))),
            ("warming the engine", lambda: self._warm(model, engine)),
        ):
            self.progress = what
            report(what)
            done()
        self.progress = ""
        # Seconds for a large vocabulary, and only forms need it: nothing waits.
        self._threads.submit(_make_forms_ready, model)

    def _warm(self, model: Model, engine: Answering) -> None:
        for one in engine.engines:
            for _ in one.answer(model.prepare_text("a", max_new_tokens=_WARM_TOKENS)):
                pass

    def start(self, model: Model, engine: Answering) -> None:
        """Begin to answer. The service does not own the engine: who made it closes it."""
        self._model, self._engine = model, engine
        self.names = self.settings.names or (model.directory.resolve().name,)
        self.metrics.watch(engine, self.names[0])
        self.phase = "ready"

    def stop(self) -> None:
        """Take no more requests."""
        self.phase = "stopping"

    @property
    def open_answers(self) -> int:
        return self._open

    @property
    def model(self) -> Model:
        if self._model is None:
            raise starting()
        return self._model

    @property
    def engine(self) -> Answering:
        if self._engine is None:
            raise starting()
        return self._engine

    @property
    def trouble(self) -> str:
        """Why /health fails; "" while all is well."""
        if self.phase != "ready" or self._engine is None:
            return self.progress or self.phase
        if self._engine.closed:
            return "the engine has stopped"
        began = [numbers.step_began for numbers in self._engine.figures]
        if any(one and time.monotonic() - one > self.settings.stalled_s for one in began):
            return "a step of the engine does not end"
        return ""

    def check_open(self) -> None:
        """Raises HttpError 503 where no request can be answered."""
        if self.phase == "stopping":
            raise stopping()
        if self.engine.closed:
            raise HttpError("the engine has stopped after an error", status=503, code="engine_stopped", fix="Start the server again.")

    def served_name(self, asked: str) -> str:
        """The name of the model that a request gives, or the first one. Raises HttpError 404."""
        if asked and asked not in self.names:
            raise HttpError(
                "there is no such model",
                status=404,
                code="model_not_found",
                field="model",
                got=repr(asked)[:100],
                expected=", ".join(self.names),
                fix="Take one of these names, or leave model out.",
            )
        return asked or self.names[0]

    @property
    def limit(self) -> int:
        """Answers that may run and wait."""
        slots = self.engine.slots
        return slots + (self.settings.max_queue if self.settings.max_queue is not None else _QUEUE_PER_SLOT * slots)

    @property
    def retry_after(self) -> int:
        """Seconds after which there may be room in the queue."""
        return min(_LONGEST_RETRY_S, max(1, math.ceil(self._seconds)))

    def refusal(self, error: BaseException) -> Refusal:
        return refusal_of(error, self.retry_after)

    async def submit(self, ask: Ask) -> Choices:
        """Queue a request. Raises QwenExportError for what cannot be answered, before anything runs. `finished` follows once for the
        result."""
        self.check_open()
        count = ask.count
        # A request for more answers than that is let in alone.
        if self._open and self._open + count > self.limit:
            self.metrics.rejected("queue_full")
            raise OverloadedError(
                "too many requests wait",
                got=self._open,
                expected=f"at most {self.limit} at once",
                fix="Send the request again later.",
            )
        self._open += count
        self.metrics.asked(ask.n)
        choices: list[Choice] = []
        try:
            loop = asyncio.get_running_loop()
            threads = self._media_threads if ask.sees else self._threads
            prepared = await loop.run_in_executor(threads, prepare, self.model, ask, self.engine.longest, self.settings)
            self.check_open()
            for number, answers in enumerate(prepared):
                for one in answers:
                    stream = self.engine.submit(one.request, loop=loop)
                    choices.append(Choice(len(choices), number, stream, one, _parser(ask)))
        except BaseException as error:
            for choice in choices:
                choice.stream.close()
            self._open -= count
            if isinstance(error, ParameterError) and error.parameter == "cache_memory":
                raise HttpError("the request needs more memory than sequences have", fix="Shorten the prompt.") from error
            if isinstance(error, QwenExportError):
                self.metrics.rejected("invalid")
            raise
        return Choices(choices, self.metrics)

    async def prompt_ids(self, ask: Ask) -> list[int]:
        """The tokens of a prompt, which is not answered."""
        loop = asyncio.get_running_loop()
        threads = self._media_threads if ask.sees else self._threads
        [[prepared]] = await loop.run_in_executor(threads, prepare, self.model, ask, 1 << 62, self.settings)
        return list(prepared.request.ids)

    def finished(self, choices: Choices) -> None:
        """The answers of a request have ended, or their reader has gone."""
        self._open -= len(choices.all)
        seconds = [choice.statistics.total_s for choice in choices.all if choice.statistics.total_s]
        if seconds:
            self._seconds += 0.1 * (max(seconds) - self._seconds)


def _make_forms_ready(model: Model) -> None:
    """Make the table of tokens that forms are compiled with."""
    with contextlib.suppress(QwenExportError):  # without llguidance requests with forms say so
        model.prepare_text("a", answer=AnswerOptions(form=AnswerForm("choice", ("a",))))


def _parser(ask: Ask) -> ToolCallParser | None:
    return ToolCallParser(ask.tools) if ask.tools and ask.options.tool_choice != "none" else None
