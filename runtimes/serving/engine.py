"""Many requests on one decoder. One thread owns it and runs step after step; requests enter and leave between two steps.

    engine = Engine.of(model, slots=8)
    for token in engine.submit(request): ...              # from any thread
    async for token in engine.submit(request, loop=loop): ...

What a request gets does not depend on the others: only the time it takes does.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from itertools import count
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

from qwen_export.errors import ContextOverflow, OverloadedError, ParameterError, QwenExportError
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.generation import Finish, Request, Statistics
from qwen_export.runtimes.decoding.prompt_sizes import read_every_size
from qwen_export.runtimes.serving.answering import Answering
from qwen_export.runtimes.serving.batch_drafts import DraftCounts
from qwen_export.runtimes.serving.chunk_budget import STALL
from qwen_export.runtimes.serving.engine_statistics import EngineStatistics
from qwen_export.runtimes.serving.memory_plan import plan_memory
from qwen_export.runtimes.serving.picture_thread import PictureThread
from qwen_export.runtimes.serving.prefix_cache import PrefixCache
from qwen_export.runtimes.serving.scheduler import Scheduler
from qwen_export.runtimes.serving.served_call import ServedCall
from qwen_export.runtimes.serving.shared_prompts import SharedPrompts
from qwen_export.runtimes.serving.slot_table import SlotTable
from qwen_export.runtimes.serving.step_runner import StepRunner, ended_by
from qwen_export.runtimes.serving.token_stream import Deliveries, End, LoopInbox, ThreadInbox, TokenStream
from qwen_export.runtimes.speculation.round_times import make_ready

if TYPE_CHECKING:
    from qwen_export.runtimes.model import Model

_LOOK_EVERY = 8
"""Steps between two looks at requests that wait."""
RESERVE = 64
"""Tokens of an answer that must fit beside the prompt when a request enters: with fewer it may soon have to leave again."""


class _Memory(NamedTuple):
    """What the caller of an engine said of memory; see Engine."""

    cache: int | None
    prefix: int | None
    prefix_on_device: bool
    share: float


class Engine(Answering):
    """Owns the decoder that `make_decoder` returns, which is made and used in the engine's thread alone.

    `cache_memory`: bytes for states, caches and beginnings of prompts together, at least those of one whole context; None for what all
    slots may need, or the GPU has left. `prefix_memory`: the part of them for beginnings of prompts, 0 for none; None for 1 GiB, or half
    of what one context leaves. On a GPU that part is in host memory and apart, or with `prefix_on_device` in the GPU's. `drafts`: "auto"
    as many as pay, a number, or "off". `share`: the part of a GPU's free memory that is this engine's. `max_waiting`: requests that may
    wait before `submit` raises OverloadedError. `reserve`: tokens of an answer that must fit in memory beside the prompt when a request
    enters. `stall`: the longest time between two tokens of an answer while prompts are read, in times without one; inf reads prompts as
    fast as it goes."""

    def __init__(
        self,
        make_decoder: Callable[[], Decoder],
        *,
        cache_memory: int | None = None,
        prefix_memory: int | None = None,
        prefix_on_device: bool = False,
        drafts: int | str = "auto",
        share: float = 1.0,
        max_waiting: int | None = None,
        reserve: int = RESERVE,
        stall: float = STALL,
    ) -> None:
        self._arrivals: SimpleQueue[ServedCall | None] = SimpleQueue()
        self._keys, self._max_waiting, self._reserve, self._stall = count(), max_waiting, reserve, stall
        self._lock = threading.RLock()
        self._unfinished = 0
        self._closing: Finish | None = None
        self._error: Exception | None = None
        self._calls: dict[int, ServedCall] = {}
        self._stays = False
        self._deliveries, self._shared, self._pictures = Deliveries(), SharedPrompts(), PictureThread()
        self.statistics = EngineStatistics()
        ready: SimpleQueue[Exception | None] = SimpleQueue()
        self._thread = threading.Thread(
            target=self._main,
            args=(make_decoder, _Memory(cache_memory, prefix_memory, prefix_on_device, share), drafts, ready),
            name="engine",
            daemon=True,
        )
        self._thread.start()
        failed = ready.get()
        if failed is not None:
            raise failed

    @classmethod
    def of(
        cls,
        model: Model,
        slots: int = 8,
        *,
        cache_memory: int | None = None,
        prefix_memory: int | None = None,
        prefix_on_device: bool = False,
        share: float = 1.0,
        max_waiting: int | None = None,
        reserve: int = RESERVE,
        stall: float = STALL,
    ) -> Engine:
        """An engine on a loaded bundle, with drafts as chosen at `load`."""
        drafts = model.drafts
        return cls(
            lambda: model.decoder(slots, drafts=drafts not in ("off", "lookup")),
            cache_memory=cache_memory,
            prefix_memory=prefix_memory,
            prefix_on_device=prefix_on_device,
            drafts=drafts,
            share=share,
            max_waiting=max_waiting,
            reserve=reserve,
            stall=stall,
        )

    # ---- for any thread ----

    def submit(
        self, request: Request, statistics: Statistics | None = None, *, loop: asyncio.AbstractEventLoop | None = None
    ) -> TokenStream:
        if not len(request.ids):
            raise ParameterError("the prompt is empty", parameter="prompt", fix="Give some text.")
        if len(request.ids) > self._longest:
            fix = "Shorten the prompt, or load with a larger {max_context} and more {cache_memory}."
            got, expected = f"{len(request.ids)} tokens", f"at most {self._longest}"
            raise ContextOverflow("the prompt is longer than the context", got=got, expected=expected, fix=fix)
        statistics = statistics or Statistics()
        inbox = ThreadInbox() if loop is None else LoopInbox(loop)
        with self._lock:
            self._require_open()
            if self._max_waiting is not None and self._unfinished >= self._slots + self._max_waiting:
                raise OverloadedError(
                    "too many requests wait",
                    got=self._unfinished - self._slots,
                    expected=f"at most {self._max_waiting}",
                    fix="Send the request again later, or raise {max_waiting}.",
                )
            self._unfinished += 1
            call = ServedCall(next(self._keys), request, statistics, inbox)
            self._arrivals.put(call)
        return TokenStream(request, statistics, inbox)

    def close(self, *, drain: bool = False) -> None:
        with self._lock:
            if self._closing is None:
                self._closing = "" if drain else "abandoned"
                self._arrivals.put(None)
            elif not drain:
                self._closing = "abandoned"
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def engines(self) -> tuple[Engine, ...]:
        return (self,)

    @property
    def figures(self) -> tuple[EngineStatistics, ...]:
        return (self.statistics,)

    @property
    def slots(self) -> int:
        return self._slots

    @property
    def longest(self) -> int:
        return self._longest

    @property
    def unfinished(self) -> int:
        """Requests that run and wait."""
        return self._unfinished

    @property
    def closed(self) -> bool:
        return self._closing is not None or self._error is not None

    def _require_open(self) -> None:
        if self._error is not None:
            raise QwenExportError("the engine has stopped after an error", got=str(self._error), fix="Make a new engine.") from self._error
        if self._closing is not None:
            raise QwenExportError("the engine is closed", fix="Make a new engine.")

    # ---- the thread ----

    def _main(
        self,
        make_decoder: Callable[[], Decoder],
        memory: _Memory,
        drafts: int | str,
        ready: SimpleQueue[Exception | None],
    ) -> None:
        try:
            decoder = make_decoder()
            self._set_up(decoder, memory, drafts)
        except Exception as error:
            ready.put(error)
            return
        ready.put(None)
        try:
            while self._take_arrivals():
                self._step()
        except Exception as error:
            with self._lock:
                self._error = error
        self._runner.ahead.abandon()
        for call in list(self._calls.values()):
            self._end(call, self._closing or "error", self._error and ended_by(self._error))
        with self._lock:  # what arrived meanwhile
            while not self._arrivals.empty():
                if (call_left := self._arrivals.get()) is not None:
                    self._end(call_left, self._closing or "error", self._error and ended_by(self._error))
        self._pictures.close()
        self._deliveries.send()

    def _set_up(self, decoder: Decoder, memory: _Memory, drafts: int | str) -> None:
        self._decoder, self._slots = decoder, decoder.batch
        apart = decoder.on_gpu and not memory.prefix_on_device
        plan = plan_memory(decoder, memory.cache, memory.prefix, prefix_apart=apart, share=memory.share)
        self._longest, ahead = plan.longest, max(1, decoder.widest_verify)
        self._scheduler = Scheduler(decoder.batch, plan.growing, decoder.growing_bytes, decoder.chunk, ahead)
        cache = PrefixCache(plan.prefix) if plan.prefix else None
        self._table = SlotTable(decoder, cache, releases=memory.cache is not None or decoder.on_gpu, on_device=memory.prefix_on_device)
        counts = None
        if drafts != "off" and decoder.widest_verify and (decoder.head is not None or drafts == "lookup"):
            counts = DraftCounts(decoder, drafts if isinstance(drafts, int) else None)
        same = self._same if decoder.launches else None
        self._runner = StepRunner(decoder, counts, self._chosen, self._failed, self._moved, self._stall, same)
        make_ready(decoder, counts.longest if counts is not None else 0, counts.time_of if counts is not None and counts.adapts else None)
        read_every_size(decoder)
        numbers = self.statistics
        numbers.slots = decoder.batch
        numbers.cache_limit, numbers.state_bytes, numbers.prefix_apart = plan.limit, decoder.fixed_bytes, apart
        numbers.measure = lambda: {slot: decoder.held_bytes(slot) for slot in list(self._table.calls)}
        numbers.prefix = cache.statistics if cache is not None else numbers.prefix

    def _take_arrivals(self) -> bool:
        """Queue what has arrived, waiting for it while there is nothing to do. False when the thread should end."""
        while not self._calls or not self._arrivals.empty():
            if self._closing is not None and self._arrivals.empty() and not self._calls:
                return False
            call = self._arrivals.get()
            if call is None:
                continue
            self._calls[call.key] = call
            if self._table.cache is None or not self._shared.holds(call):
                self._enqueue(call)
        return self._closing != "abandoned"

    def _enqueue(self, call: ServedCall) -> None:
        try:
            room = call.room
            self._scheduler.add(call.key, len(call.text), min(self._reserve, room) if room is not None else self._reserve)
        except QwenExportError as error:
            del self._calls[call.key]
            self._end(call, "overflow", error, queued=False)
            self._deliveries.send()

    def _step(self) -> None:
        began, busy, binding = time.perf_counter(), self._decoder.busy_s, self._decoder.binding_s
        self.statistics.step_began = time.monotonic()
        rows, parts = self._runner.land() if self._runner.ahead.flies else self._planned()
        scheduler, sequences, numbers = self._scheduler, self._decoder.sequences, self.statistics
        for call in (*rows, *parts):
            if call.statistics.finish:
                self._end(call, call.statistics.finish)
            else:
                scheduler.has(call.key, sequences[call.slot].length, len(call.text))
        self._stays = scheduler.stays
        numbers.rows += len(rows)
        for inbox in self._deliveries.send():
            self._forget_reader(inbox)
        numbers.step_began = 0.0
        spent = time.perf_counter() - began
        numbers.steps += 1
        numbers.step_s += spent
        numbers.host_s += spent - (self._decoder.busy_s - busy) - (self._decoder.binding_s - binding)
        numbers.running, numbers.waiting = len(scheduler.running), scheduler.waiting

    def _planned(self) -> tuple[Sequence[ServedCall], Sequence[ServedCall]]:
        """Run the step that is next: the calls with a row, and those of which a part of the text was read."""
        self._drop_unwanted()
        for call in self._shared.released():
            self._enqueue(call)
        self._change_slots()
        for failed, error in self._pictures.release(self._scheduler):
            self._end(failed, "error", ended_by(error))
        scheduler, calls = self._scheduler, self._calls
        if not scheduler.running:
            return (), ()
        texts = [calls[job.key] for job in scheduler.texts]
        longest = max((len(call.text) - call.statistics.reused_tokens for call in texts), default=0)
        step = scheduler.plan(*self._runner.budget.tokens(len(scheduler.rows), longest))
        rows, parts = [calls[key] for key in step.rows], [(calls[key], size) for key, size in step.parts]
        self._runner.occupied = frozenset(self._table.calls)
        self._runner.run(rows, parts)
        return rows, [call for call, _ in parts]

    def _same(self, count: int) -> bool:
        """Whether the next step has the same rows as one of so many, whatever their tokens; see StepAhead. Memory was looked at before."""
        running, waiting = len(self._scheduler.running), self._scheduler.waiting
        if count != running or count + waiting != len(self._calls) or not self._stays or self._closing is not None:
            return False
        if waiting and (running < self._slots or (self.statistics.steps + 1) % _LOOK_EVERY == 0):
            return False
        return self._arrivals.empty() and all(len(call.text) < self._longest for call in self._table.calls.values())

    def _drop_unwanted(self) -> None:
        """End what was cancelled, is late, or has no room for its next token."""
        now = time.monotonic()
        # A long queue is looked through now and then only.
        every = self.statistics.steps % _LOOK_EVERY == 0 or not self._table.calls
        for call in list((self._calls if every else self._table.calls).values()):
            request = call.request
            if request.cancelled.is_set():
                self._end(call, request.reason)
            elif request.deadline is not None and now > request.deadline:
                self._end(call, "deadline")
            elif len(call.text) > self._longest:
                self._end(call, "overflow", self._overflow(call))

    def _overflow(self, call: ServedCall) -> ContextOverflow:
        got, expected = f"{len(call.text) - 1} tokens read and 1 more", f"at most {self._longest}"
        fix = "Shorten the input, or load with a larger {max_context}."
        return ContextOverflow("the context is full", got=got, expected=expected, fix=fix)

    def _change_slots(self) -> None:
        changes = self._scheduler.admit()
        for key in changes.leave:
            self.statistics.preemptions += 1
            self._pictures.leave(self._calls[key])
            try:
                self._table.save(self._calls[key])
            except Exception as error:
                self._end(self._calls[key], "error", ended_by(error))
        for key, slot in changes.enter:
            call = self._calls[key]
            others = [other for other in self._table.calls.values() if other is not call]
            try:
                read, cuts = self._table.enter(call, slot, others)
            except Exception as error:
                self._end(call, "error", ended_by(error))
                continue
            call.statistics.queued_s = call.statistics.queued_s or time.perf_counter() - call.started
            self._scheduler.entered(key, read, cuts)
            self._pictures.enter(call, read, self._scheduler)

    # ---- what steps report ----

    def _chosen(self, call: ServedCall, tokens: list[int]) -> None:
        given = call.give(tokens, self._runner.now)
        if given:
            self._deliveries.put(call.inbox, given)

    def _moved(self, call: ServedCall) -> None:
        try:
            self._table.moved(call)
            if call.request.progress is not None:
                call.request.progress(self._decoder.sequences[call.slot].length, len(call.ids))
        except Exception as error:
            self._failed(call, error)

    def _failed(self, call: ServedCall, error: Exception) -> None:
        """A step could not go on with a call. It ends behind the step."""
        call.statistics.finish = "overflow" if isinstance(error, ContextOverflow) else "error"
        call.error = ended_by(error)

    def _end(self, call: ServedCall, finish: Finish, error: BaseException | None = None, *, queued: bool = True) -> None:
        call.statistics.finish = call.statistics.finish or finish
        self._pictures.leave(call)
        if queued and self._calls.pop(call.key, None) is not None:
            if call.slot >= 0:
                self._table.drop(call)
            if not self._shared.forget(call):
                self._scheduler.remove(call.key)
        self._deliveries.put(call.inbox, End(error or call.error))
        with self._lock:
            self._unfinished -= 1

    def _forget_reader(self, inbox: LoopInbox) -> None:
        """The event loop of a reader has closed."""
        for call in list(self._calls.values()):
            if call.inbox is inbox and not call.request.cancelled.is_set():
                call.request.reason = "abandoned"
                call.request.cancelled.set()
