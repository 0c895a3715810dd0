"""A loaded bundle: prompts and chats in, text out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from qwen_export.errors import BundleError, ParameterError, QwenExportError
from qwen_export.manifest import CHAT_TEMPLATE, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, Manifest, load_manifest
from qwen_export.runtimes.backends.compatibility import check_limits, check_runnable, for_device
from qwen_export.runtimes.backends.integrity import ensure_whole
from qwen_export.runtimes.backends.native_libraries import check_native
from qwen_export.runtimes.backends.open_graphs import OpenOptions, open_graphs
from qwen_export.runtimes.backends.session import Session
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.dynamic_decoder import DynamicDecoder
from qwen_export.runtimes.decoding.generation import Finish, Request, Statistics, generate
from qwen_export.runtimes.decoding.prefix_reuse import PrefixReuse
from qwen_export.runtimes.decoding.static_decoder import StaticDecoder
from qwen_export.runtimes.decoding.static_graphs import HEAD_GRAPHS, HEAD_STEP, STEP, VERIFY, is_static
from qwen_export.runtimes.sampling.sampler import Sampler, SamplingParams
from qwen_export.runtimes.sampling.sampling_defaults import ModelFacts, recommended
from qwen_export.runtimes.speculation.draft_policy import AdaptiveLength, FixedLength, Policy
from qwen_export.runtimes.speculation.drafters import Drafter, HeadDrafter, LookupDrafter
from qwen_export.runtimes.speculation.rounds import Speculator
from qwen_export.runtimes.text.chat_template import ChatTemplate, Message, shield_messages, thinking_prefix
from qwen_export.runtimes.text.detokenizer import Detokenizer
from qwen_export.runtimes.text.reasoning import Content, Event, Reasoning, ReasoningSplitter
from qwen_export.runtimes.text.stopping import StopStrings, stop_ids
from qwen_export.runtimes.text.text_tokenizer import TextTokenizer
from qwen_export.runtimes.text_check import read_json_file, read_text_file

Speculate = str | int


def load(
    bundle: str | Path,
    *,
    max_context: int | None = None,
    threads: int | None = None,
    repack: bool = False,
    speculate: Speculate = "auto",
    device: str | None = None,
    device_id: int = 0,
    weight_budget: int | None = None,
    native: str | None = None,
) -> Model:
    """Open a bundle. `max_context` overrides the bundle's cache capacity in tokens, `threads` the number of CPU threads. `device` is where
    to run a bundle whose operators other devices have too, such as one for DirectML on the CPU; `device_id` tells several of them apart.

    By default CPU weights are mapped and used in place: loading takes no time, and processes share the memory. With `repack` ONNX
    Runtime copies them into its own order first: a slow load and a third more memory for steps that are a fifth faster. That is of use
    for bundles without the CPU plugin only, whose products read the mapped order at full speed.

    `speculate`: "auto" drafts as many tokens per round as pay, none included, where the bundle has a draft head; a number is the length of
    every draft; "lookup" drafts what followed the same words earlier in the text, with any bundle that was built for speculation; "off"
    reads token by token. The text is the same, but for near-ties between kernels.

    `weight_budget`: bytes of GPU memory for the weights of a bundle that was built with weight streaming; what does not fit waits in host
    memory and is copied in every call. None keeps all weights on the GPU.

    `native`: "refuse" loads no bundle that has a native library of its own, which is code that runs in this process; "allow" loads it
    silently; None loads it, with a logged warning where no build of this user made it.

    Raises BundleError, in one message, for a bundle that is damaged or cannot run here, and ParameterError for a parameter that the bundle
    does not have."""
    directory = Path(bundle)
    manifest = load_manifest(directory)
    manifest = for_device(manifest, device)
    ensure_whole(directory, manifest)
    check_runnable(manifest, device_id)
    check_limits(manifest, max_context, threads)
    check_native(directory, manifest, native)
    _check_speculate(speculate, manifest)
    _check_weight_budget(weight_budget, manifest)
    # ONNX Runtime multiplies with blocks of codes fast only in an order of its own.
    repack = repack or (is_static(manifest) and manifest.target.precision.startswith("int"))
    idle = HEAD_GRAPHS if speculate in ("off", "lookup") else ()
    options = OpenOptions(threads, repack, device_id, later=(VERIFY,) if speculate == "off" else (), weight_budget=weight_budget)
    sessions = open_graphs(directory, manifest, options, [name for name in manifest.graphs if name not in idle])
    return Model(directory, manifest, sessions, max_context, speculate)


def _check_speculate(value: Speculate, manifest: Manifest) -> None:
    longest = manifest.speculation.max_draft if manifest.speculation else 0
    if isinstance(value, int) and HEAD_STEP not in manifest.graphs:
        longest = 0
    if isinstance(value, int) and not 1 <= value <= longest:
        raise ParameterError(
            "the bundle cannot draft that many tokens" if longest else "the bundle was built without a draft head",
            parameter="speculate",
            got=value,
            expected=f"1 to {longest}, auto or off" if longest else "auto or off",
            fix="Choose one of these." if longest else "Build it again with {mtp}, from a checkpoint that has mtp.* tensors.",
        )
    if isinstance(value, str) and value not in ("auto", "off", "lookup"):
        raise ParameterError(
            "the way to speculate is not known",
            parameter="speculate",
            got=value,
            expected="auto, off, lookup or a number",
            fix="Choose one of these.",
        )
    if value == "lookup" and not longest:
        raise ParameterError(
            "the bundle was built without speculation", parameter="speculate", got="lookup", fix="Build it again with {lookup}."
        )


def _check_weight_budget(value: int | None, manifest: Manifest) -> None:
    streams = manifest.engine is not None and manifest.engine.options.get("weight_streaming")
    if value is not None and value < 0:
        raise ParameterError(
            "the memory for weights is negative",
            parameter="weight_budget",
            got=value,
            expected="at least 0 bytes",
            fix="Raise {weight_budget}.",
        )
    if value is not None and not streams:
        raise ParameterError(
            "the bundle's weights cannot wait in host memory",
            parameter="weight_budget",
            fix="Build it for TensorRT with {weight_streaming} and embedded {engine_weights}.",
        )


@dataclass
class _Running:
    """The answer that is being made."""

    tokens: Generator[int, None, None]
    request: Request
    statistics: Statistics


class Model:
    """One conversation at a time: a new answer ends the one before, whose `finish` is then "superseded". Threads may share a model; they
    take turns token by token. For several sequences, or a loop of your own, take `decoder()`.

    A model is a context manager; `close` gives its memory back at once."""

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        sessions: Mapping[str, Session],
        max_context: int | None,
        speculate: Speculate = "off",
    ) -> None:
        """`sessions`: the bundle's graphs by name; those of the draft head only where it is wanted."""
        self.directory, self.manifest, self._sessions, self._max_context = directory, manifest, dict(sessions), max_context
        self._speculate = speculate
        self._running: _Running | None = None
        self._turn = threading.RLock()
        self._closed = False

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise QwenExportError("a loaded model cannot be pickled or copied", fix="Load the bundle in each process, or share the model.")

    def close(self) -> None:
        """End the answer that is being made and release graphs, weights, states and caches. Every later call raises."""
        self._end_running("abandoned")
        with self._turn:
            self._closed = True
            for name in ("_conversation", "_lookup"):
                self.__dict__.pop(name, None)
            for session in self._sessions.values():
                session.close()
            self._sessions = {}

    def decoder(self, batch: int = 1, *, drafts: bool = False) -> Decoder:
        """A fresh decoder of `batch` slots with its own states and caches over the same weights; with `drafts` the bundle's draft head
        keeps up with it."""
        self._require_open()
        if is_static(self.manifest):
            return StaticDecoder(self._sessions, self.manifest, batch, self._max_context, drafts=drafts)
        head = self._sessions.get(HEAD_STEP) if drafts else None
        return DynamicDecoder(self._sessions[STEP], self.manifest, batch, self._max_context, head)

    def _require_open(self) -> None:
        if self._closed:
            raise QwenExportError("the model is closed", where=str(self.directory), fix="Load the bundle again.")

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        if TOKENIZER not in self.manifest.files:
            raise BundleError(
                "the bundle has no tokenizer", where=str(self.directory), fix="Build from a checkpoint that has tokenizer.json."
            )
        return TextTokenizer.from_file(self.directory / TOKENIZER)

    @cached_property
    def template(self) -> ChatTemplate:
        if CHAT_TEMPLATE not in self.manifest.files:
            raise BundleError("the bundle has no chat template", where=str(self.directory), fix="Give a plain prompt, without --chat.")
        special = {k: v for k, v in self._json(TOKENIZER_CONFIG).items() if k.endswith("_token") and isinstance(v, str)}
        return ChatTemplate(read_text_file(self.directory / CHAT_TEMPLATE), special)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        return stop_ids(self.tokenizer, self._json(GENERATION_CONFIG)) | frozenset(self.manifest.stop_ids)

    def recommended(self, thinking: bool) -> SamplingParams:
        """Sampling parameters for this model in one mode, when the caller names none."""
        facts = ModelFacts.from_template(self.template) if CHAT_TEMPLATE in self.manifest.files else ModelFacts(None, False)
        return recommended(facts, thinking, self._json(GENERATION_CONFIG))

    def stream(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        preserve_thinking: bool | None = None,
        sampling: SamplingParams | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> Generation:
        """Answer a chat. Iterate over the result for the text of the answer, or over its `events()` for reasoning as well.

        A prompt that continues the last one is not read again. `enable_thinking` and `preserve_thinking` None leave the choice to the
        checkpoint's template; `sampling` None takes the model card's values for the mode. `progress` is called while the prompt is read,
        with the tokens read so far and all of them."""
        safe = shield_messages(messages, self.tokenizer)
        options: dict[str, Any] = {"enable_thinking": enable_thinking, "preserve_thinking": preserve_thinking}
        prompt = self.template.render(safe, tools, **options)
        history = self.template.render(safe, tools, add_generation_prompt=False, **options)
        thinking = thinking_prefix(prompt)
        ids = self.tokenizer.encode(prompt)
        past = self.tokenizer.encode(history) if prompt.startswith(history) else []
        mark_at = len(past) if past and ids[: len(past)] == past else None
        splitter = ReasoningSplitter(thinking)
        return self._generation(ids, sampling or self.recommended(thinking), max_new_tokens, stop, splitter, mark_at, progress)

    def complete(
        self,
        prompt: str,
        *,
        sampling: SamplingParams | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> Generation:
        """Continue a text as it stands, without a template. Control tokens in it count as such."""
        ids = self.tokenizer.encode(prompt)
        return self._generation(ids, sampling or self.recommended(False), max_new_tokens, stop, None, None, progress)

    def _generation(
        self,
        ids: list[int],
        sampling: SamplingParams,
        max_new_tokens: int | None,
        stop: Sequence[str],
        splitter: ReasoningSplitter | None,
        mark_at: int | None,
        progress: Callable[[int, int], None] | None,
    ) -> Generation:
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ParameterError(
                "the number of new tokens is out of range",
                parameter="max_new_tokens",
                got=max_new_tokens,
                expected="at least 1",
                fix="Raise {max_new_tokens}, or leave it out.",
            )
        if not ids:
            raise QwenExportError("the prompt is empty", fix="Give some text.")
        sampler = Sampler(sampling, self.tokenizer.vocab_size)
        request = Request(ids, sampler, self.stop_ids, max_new_tokens, mark_at, progress=progress)
        statistics = Statistics()
        detokenizer = Detokenizer(self.tokenizer.tokenizer)
        return Generation(self.generate(request, statistics), statistics, request, detokenizer, StopStrings(stop), splitter)

    def generate(self, request: Request, statistics: Statistics) -> Generator[int, None, None]:
        """The tokens that follow a prompt of token ids, with drafts as chosen at `load`. Ends an answer that is being made; what the
        prompt shares with the last one is not read again."""
        self._require_open()
        self._end_running("superseded")
        with self._turn:
            reuse = self._conversation
            if self._policy is None:
                tokens = generate(reuse, request, statistics)
            else:
                head = reuse.decoder.head
                drafter: Drafter = HeadDrafter(head, reuse.slot) if head is not None else self._lookup
                tokens = Speculator(drafter, self._policy).generate(reuse, request, statistics)
            self._running = _Running(tokens, request, statistics)
        return self._in_turn(self._running)

    def _in_turn(self, running: _Running) -> Generator[int, None, None]:
        """The tokens of an answer, each made while no other thread uses the model."""
        try:
            while True:
                with self._turn:
                    token = next(running.tokens, None)
                if token is None:
                    return
                yield token
        finally:
            with self._turn:
                running.tokens.close()

    def _end_running(self, finish: Finish) -> None:
        """End the answer that is being made, if one is; a prompt that another thread reads ends between two of its parts."""
        running = self._running
        if running is None or running.statistics.finish:
            return
        running.request.reason = finish
        running.request.cancelled.set()
        with self._turn:
            running.statistics.finish = running.statistics.finish or finish
            running.tokens.close()

    def warm(self) -> None:
        """Do now what would otherwise happen once, in the first answers: on a GPU kernels are compiled and calls recorded. For programs
        that load a bundle before the first request."""
        self._require_open()
        with self._turn:
            self._conversation.decoder.warm()

    @property
    def speculates(self) -> bool:
        """Whether answers are made with drafts."""
        return self._policy is not None

    @cached_property
    def _policy(self) -> Policy | None:
        """Kept from answer to answer, with what it measured; None reads token by token."""
        if (
            self.manifest.speculation is None
            or self._speculate == "off"
            or (HEAD_STEP not in self._sessions and self._speculate != "lookup")
        ):
            return None
        longest = self.manifest.speculation.max_draft
        return FixedLength(self._speculate) if isinstance(self._speculate, int) else AdaptiveLength(longest)

    @cached_property
    def _lookup(self) -> LookupDrafter:
        """Kept from answer to answer, with its copy of the text."""
        return LookupDrafter(self._conversation.decoder, self._conversation.slot)

    @cached_property
    def _conversation(self) -> PrefixReuse:
        return PrefixReuse(self.decoder(drafts=self._speculate not in ("off", "lookup")))

    def _json(self, name: str) -> dict[str, Any]:
        if name not in self.manifest.files:
            return {}
        return read_json_file(self.directory / name)


class Generation:
    """One answer in the making: an iterator over its text. `tokens`, `content`, `reasoning` and `statistics` grow as it goes on."""

    def __init__(
        self,
        tokens: Generator[int, None, None],
        statistics: Statistics,
        request: Request,
        detokenizer: Detokenizer,
        stops: StopStrings,
        splitter: ReasoningSplitter | None,
    ) -> None:
        self.statistics = statistics
        self.tokens: list[int] = []
        self.content, self.reasoning = "", ""
        self._request, self._stops, self._splitter, self._detokenizer = request, stops, splitter, detokenizer
        self._tokens = tokens
        self._events = self._run()

    def __iter__(self) -> Iterator[str]:
        return (event.text for event in self._events if isinstance(event, Content))

    def events(self) -> Iterator[Event]:
        """Pieces of reasoning and answer, in order."""
        return self._events

    def cancel(self) -> None:
        """End after the token in progress; may be called from another thread."""
        self._request.cancelled.set()

    def _run(self) -> Iterator[Event]:
        for token in self._tokens:
            self.tokens.append(token)
            yield from self._emit(self._stops.push(self._detokenizer.push(token)))
            if self._stops.stopped:
                self.statistics.finish = "stop"
                self._tokens.close()
                break
        yield from self._emit(self._stops.push(self._detokenizer.flush()) + self._stops.flush())
        yield from self._record(self._splitter.flush() if self._splitter else [])

    def _emit(self, text: str) -> Iterator[Event]:
        if text:
            yield from self._record(self._splitter.push(text) if self._splitter else [Content(text)])

    def _record(self, events: Sequence[Event]) -> Iterator[Event]:
        for event in events:
            if isinstance(event, Reasoning):
                self.reasoning += event.text
            else:
                self.content += event.text
            yield event
