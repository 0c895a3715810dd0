"""A loaded bundle: prompts and chats in, text out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Unpack

from qwen_export.bundle_contract import is_tower
from qwen_export.errors import BundleError, QwenExportError
from qwen_export.long_paths import reachable
from qwen_export.manifest import GENERATION_CONFIG, Manifest
from qwen_export.runtimes.answer import Generation as Generation
from qwen_export.runtimes.answer import Prepared
from qwen_export.runtimes.backends.open_graphs import OpenOptions
from qwen_export.runtimes.backends.session import Session
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.dynamic_decoder import DynamicDecoder
from qwen_export.runtimes.decoding.generation import Finish, Request, Statistics, generate
from qwen_export.runtimes.decoding.prefix_reuse import PrefixReuse
from qwen_export.runtimes.decoding.prompt_sizes import read_every_size
from qwen_export.runtimes.decoding.static_decoder import StaticDecoder
from qwen_export.runtimes.decoding.static_graphs import HEAD_STEP, STEP, is_static
from qwen_export.runtimes.memory.device import Device
from qwen_export.runtimes.open_bundle import Speculate, open_bundle
from qwen_export.runtimes.preparation import Preparation, Wanted
from qwen_export.runtimes.sampling.constraint import Constraint
from qwen_export.runtimes.sampling.generation_config import GenerationDefaults, read_generation_config
from qwen_export.runtimes.sampling.sampler import SamplingParams
from qwen_export.runtimes.sampling.sampling_defaults import ModelFacts, recommended
from qwen_export.runtimes.speculation.draft_policy import AdaptiveLength, FixedLength, Policy
from qwen_export.runtimes.speculation.drafters import Drafter, HeadDrafter, LookupDrafter
from qwen_export.runtimes.speculation.round_times import make_ready
from qwen_export.runtimes.speculation.rounds import Speculator
from qwen_export.runtimes.structured.answer_options import AnswerOptions
from qwen_export.runtimes.text.chat_messages import Message
from qwen_export.runtimes.text.chat_prompt import TemplateOptions, chat_prompt
from qwen_export.runtimes.text.chat_template import ChatTemplate
from qwen_export.runtimes.text.stopping import stop_ids
from qwen_export.runtimes.text.text_files import TextFiles
from qwen_export.runtimes.text.text_tokenizer import TextTokenizer
from qwen_export.runtimes.vision.chat_media import MediaOptions
from qwen_export.runtimes.vision.sight import Sight

_NO_OPTIONS = AnswerOptions()


def load(
    bundle: str | Path,
    *,
    max_context: int | None = None,
    threads: int | None = None,
    repack: bool = False,
    speculate: Speculate = "auto",
    device: str | None = None,
    runtime: str | None = None,
    device_id: int = 0,
    devices: Sequence[int] = (),
    weight_budget: int | None = None,
    native: str | None = None,
) -> Model:
    """Open a bundle. `max_context` overrides the bundle's cache capacity in tokens, `threads` the number of CPU threads. `device` is where
    to run a bundle whose operators other devices have too, such as one for DirectML on the CPU; `device_id` tells several of them apart.
    `devices`: their numbers for the stages of a bundle that has several (`build`, stages); stages are spread evenly over them, in order.

    By default CPU weights are mapped and used in place: loading takes no time, and processes share the memory. With `repack` ONNX
    Runtime copies them into its own order first: a slow load and a third more memory for steps that are a fifth faster. That is of use
    for bundles without the CPU plugin only, whose products read the mapped order at full speed.

    `speculate`: "auto" drafts as many tokens per round as pay, none included, where the bundle has a draft head; a number is the length of
    every draft; "lookup" drafts what followed the same words earlier in the text, with any bundle that was built for speculation; "off"
    reads token by token. The text is the same, but for near-ties between kernels.

    `weight_budget`: bytes of GPU memory for the weights of a bundle that was built with weight streaming or host experts; the GPU reads the
    rest from host memory in every call. None keeps all weights on the GPU, or of host experts what fits beside one full context.

    `runtime`: "openvino" runs the graphs of a bundle of target `onnx` on OpenVINO instead of ONNX Runtime.

    `native`: "refuse" loads no bundle that has a native library of its own, which is code that runs in this process; "allow" loads it
    silently; None loads it, with a logged warning where no build of this user made it.

    Raises BundleError, in one message, for a bundle that is damaged or cannot run here, and ParameterError for a parameter that the bundle
    does not have."""
    directory = reachable(Path(bundle))
    options = OpenOptions(threads, repack, device_id, tuple(devices), weight_budget=weight_budget)
    manifest, sessions = open_bundle(directory, options, max_context, speculate, device, runtime, native)
    return Model(directory, manifest, sessions, max_context, speculate)


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
        self, directory: Path, manifest: Manifest, sessions: Mapping[str, Session], max_context: int | None, speculate: Speculate = "off"
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

    @property
    def max_context(self) -> int:
        """Tokens of prompt and answer together that a sequence may have."""
        return self.manifest.max_context if self._max_context is None else self._max_context

    @cached_property
    def text_files(self) -> TextFiles:
        """Tokenizer, chat templates and special tokens of the bundle."""
        return TextFiles(self.directory, self.manifest.files)

    @property
    def devices(self) -> tuple[Device, ...]:
        """Each device that has a part of the model, once."""
        return tuple(dict.fromkeys(device for session in self._sessions.values() for device in session.devices))

    @property
    def tokenizer(self) -> TextTokenizer:
        return self.text_files.tokenizer

    @property
    def template(self) -> ChatTemplate:
        return self.text_files.template

    @cached_property
    def generation_defaults(self) -> GenerationDefaults:
        """What the checkpoint's generation_config.json sets."""
        return read_generation_config(self.text_files.json(GENERATION_CONFIG), BundleError, str(self.directory / GENERATION_CONFIG))

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        own = stop_ids(self.tokenizer, self.text_files.special_tokens.get("eos_token"))
        return own | frozenset(self.generation_defaults.stop_ids) | frozenset(self.manifest.stop_ids)

    @cached_property
    def sight(self) -> Sight | None:
        """What pictures are read with, None where the bundle reads text only."""
        spec = self.manifest.vision
        towers = [session for name, session in self._sessions.items() if is_tower(name)]
        return Sight(towers, spec, lambda text: self.tokenizer.encode_plain(text)) if spec is not None else None

    def recommended(self, thinking: bool) -> SamplingParams:
        """Sampling parameters for this model in one mode, when the caller names none."""
        facts = ModelFacts.from_template(self.template) if self.text_files.templates else ModelFacts(None, False)
        return recommended(facts, thinking, self.generation_defaults)

    def _sampling(self, given: SamplingParams | Mapping[str, Any] | None, thinking: bool) -> SamplingParams:
        return given if isinstance(given, SamplingParams) else replace(self.recommended(thinking), **(given or {}))

    @cached_property
    def _preparation(self) -> Preparation:
        return Preparation(self.tokenizer, self.stop_ids, self.generation_defaults)

    def stream(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        sampling: SamplingParams | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        answer: AnswerOptions = _NO_OPTIONS,
        progress: Callable[[int, int], None] | None = None,
        media: MediaOptions | None = None,
        **template: Unpack[TemplateOptions],
    ) -> Generation:
        """Answer a chat. Iterate over the result for the text of the answer, or over its `events()` for reasoning as well.

        `messages`: `{"role", "content"[, "reasoning_content", "tool_calls", "tool_call_id"]}` each (see `chat_messages.py`), with pictures
        where the bundle sees (`media_parts.py`); `media` are limits for these. `tools`: JSON schemas of functions. A prompt that continues
        the last one is not read again.

        `template`: `enable_thinking` and `preserve_thinking`, which None leaves to the checkpoint's template; `template_kwargs` are its
        other variables (`reasoning_effort`). `continue_final_message`: go on inside the last message, behind its content or the field that
        is named; None does so where the last message is the assistant's and has no tool calls.

        `sampling`, `max_new_tokens`, `stop` None take what generation_config.json sets, and for `sampling` the model card's values for
        the mode (`recommended`). `answer`: what the answer must be, and what is wanted beside its text. `progress` is called while the
        prompt is read, with the tokens read so far and all of them.

        Raises ParameterError for values that cannot be used and TemplateError where the template refuses."""
        return self._generation(
            self.prepare_chat(
                messages,
                tools=tools,
                sampling=sampling,
                max_new_tokens=max_new_tokens,
                stop=stop,
                answer=answer,
                progress=progress,
                media=media,
                **template,
            )
        )

    def prepare_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        sampling: SamplingParams | Mapping[str, Any] | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        answer: AnswerOptions = _NO_OPTIONS,
        progress: Callable[[int, int], None] | None = None,
        constraint: Constraint | None = None,
        media: MediaOptions | None = None,
        **template: Unpack[TemplateOptions],
    ) -> Prepared:
        """What answering a chat takes, for an engine: the parameters of `stream`. `constraint`: what the answer must obey, instead of the
        `form` of `answer`. A mapping as `sampling` replaces single values of `recommended`."""
        prompt = chat_prompt(messages, self.template, self.tokenizer, tools=tools, sees=self.sight is not None, **template)
        seen = self.sight.see(prompt, media) if self.sight is not None and prompt.media else None
        wanted = Wanted(
            seen.ids if seen else prompt.ids,
            self._sampling(sampling, prompt.thinking),
            answer,
            max_new_tokens,
            stop,
            tools or (),
            prompt.thinking,
            constraint,
            seen.mark_at if seen else prompt.mark_at,
            bool(messages) and messages[-1].get("role") == "user",
            progress,
            seen.pictures if seen else None,
        )
        return self._preparation.prepare(wanted)

    def complete(
        self,
        prompt: str,
        *,
        sampling: SamplingParams | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        answer: AnswerOptions = _NO_OPTIONS,
        progress: Callable[[int, int], None] | None = None,
    ) -> Generation:
        """Continue a text as it stands, without a template. Control tokens in it count as such."""
        prepared = self.prepare_text(prompt, sampling=sampling, max_new_tokens=max_new_tokens, stop=stop, answer=answer, progress=progress)
        return self._generation(prepared)

    def prepare_text(
        self,
        prompt: str | Sequence[int],
        *,
        sampling: SamplingParams | Mapping[str, Any] | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        answer: AnswerOptions = _NO_OPTIONS,
        progress: Callable[[int, int], None] | None = None,
        constraint: Constraint | None = None,
    ) -> Prepared:
        """What continuing a text, or token ids, takes, for an engine: the parameters of `complete`; for `sampling` see `prepare_chat`."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else self.tokenizer.checked_ids(prompt)
        wanted = Wanted(ids, self._sampling(sampling, False), answer, max_new_tokens, stop, constraint=constraint, progress=progress)
        return self._preparation.prepare(wanted)

    def _generation(self, prepared: Prepared) -> Generation:
        statistics = Statistics()
        return Generation(self.generate(prepared.request, statistics), statistics, prepared)

    def generate(self, request: Request, statistics: Statistics) -> Generator[int, None, None]:
        """The tokens that follow a prompt of token ids, with drafts as chosen at `load`. Ends an answer that is being made; what the
        prompt shares with the last one is not read again."""
        self._end_running("superseded")
        with self._turn:
            self._end_running("superseded")  # that of another thread which was faster
            self._require_open()
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
        """Do now what would otherwise happen once, in the first answers: on a GPU kernels are loaded or compiled, calls recorded and
        prompts of every size read. For programs that load a bundle before the first request; nothing while an answer is being made."""
        self._require_open()
        with self._turn:
            if self._running is None or self._running.statistics.finish:  # else its next step may be under way
                self._conversation.decoder.warm(self.longest_draft)
                read_every_size(self._conversation.decoder)

    @property
    def drafts(self) -> Speculate:
        """How answers are drafted, as chosen at `load`: "off" where the bundle cannot."""
        return self._speculate if self.speculates else "off"

    @property
    def speculates(self) -> bool:
        """Whether answers are made with drafts."""
        return self._policy is not None

    @cached_property
    def _policy(self) -> Policy | None:
        """Kept from answer to answer, with what it measured; None reads token by token."""
        headless = HEAD_STEP not in self._sessions and self._speculate != "lookup"
        if self.manifest.speculation is None or self._speculate == "off" or headless:
            return None
        longest = self.manifest.speculation.max_draft
        return FixedLength(self._speculate) if isinstance(self._speculate, int) else AdaptiveLength(longest)

    @cached_property
    def _lookup(self) -> LookupDrafter:
        """Kept from answer to answer, with its copy of the text."""
        return LookupDrafter(self._conversation.decoder, self._conversation.slot)

    @property
    def longest_draft(self) -> int:
        """The most tokens that a round drafts."""
        if self._policy is None or self.manifest.speculation is None:
            return 0
        return self._speculate if isinstance(self._speculate, int) else self.manifest.speculation.max_draft

    @cached_property
    def _conversation(self) -> PrefixReuse:
        decoder = self.decoder(drafts=self._speculate not in ("off", "lookup"))
        make_ready(decoder, self.longest_draft, self._policy.time_of if isinstance(self._policy, AdaptiveLength) else None)
        return PrefixReuse(decoder)
