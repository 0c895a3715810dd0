"""Calls in slots: what a sequence begins with when it enters one, what is kept when it leaves, and the points that the prefix cache takes
on the way."""

from __future__ import annotations

from collections.abc import Iterable

from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.sequence import Prompt
from qwen_export.runtimes.decoding.snapshot import CachePiece
from qwen_export.runtimes.serving.prefix_cache import PrefixCache
from qwen_export.runtimes.serving.served_call import ServedCall

_SHORTEST = 64
"""Tokens beyond the last point that two prompts must share for a point of their own, and that an answer must have for one at its end."""


class SlotTable:
    """The slots of a decoder and the calls in them. `cache` None keeps nothing."""

    def __init__(self, decoder: Decoder, cache: PrefixCache | None, *, releases: bool = False, on_device: bool = False) -> None:
        """`releases`: the memory of a slot is given back when it is left. `on_device`: what the cache has is in memory of the GPU."""
        self.decoder, self.cache, self._releases, self._on_device = decoder, cache, releases, on_device
        self.calls: dict[int, ServedCall] = {}
        """By slot."""

    def enter(self, call: ServedCall, slot: int, others: Iterable[ServedCall]) -> tuple[int, list[int]]:
        """Bring a slot to the longest beginning of the call's text that is stored. Returns its tokens, and positions where reading must
        stop for a point. `others` may share a beginning that is not stored yet."""
        call.slot, self.calls[slot], call.lookup = slot, call, None
        decoder = self.decoder
        text = Prompt(tuple(call.text), call.request.media)
        snapshot, call.snapshot = call.snapshot, None
        if snapshot is None and self.cache is not None and call.request.prompt_recorder is None:
            snapshot = self.cache.find(text)
        if snapshot is None:
            decoder.reset(slot)
        else:
            decoder.restore(snapshot, slot)
        read = decoder.sequences[slot].length
        if not call.entered:
            call.entered, call.statistics.reused_tokens = True, read
        if self.cache is not None:
            call.points = {point for point in self._points(call, read, others) if read < point < len(call.ids)}
        return read, sorted(call.points)

    def _points(self, call: ServedCall, read: int, others: Iterable[ServedCall]) -> list[int]:
        assert self.cache is not None
        mark = call.request.mark_at
        points = [mark] if mark is not None else []
        if call.request.group is not None:  # the others of the group begin here
            points.append(len(call.ids) - 1)
        parted = self.cache.parting(call.prompt, ((other.ids, other.prompt) for other in others))
        parted = min(parted, len(call.ids) - 1)
        # A mark behind the parting is of no use to others, one just before it is as good.
        if parted - max(read, mark if mark is not None and mark <= parted else 0) >= _SHORTEST:
            points.append(parted)
        return points

    def moved(self, call: ServedCall) -> None:
        """A part of a call's text has been read: store the point, if it is one."""
        length = self.decoder.sequences[call.slot].length
        if length in call.points:
            self._store(call.slot, keep=length == call.request.mark_at and call.request.user_turn)
        call.points = {point for point in call.points if point > length}

    def save(self, call: ServedCall) -> None:
        """The call leaves its slot and will come back."""
        earlier, start = self._base(call.slot)
        call.snapshot = self.decoder.snapshot(call.slot, earlier, start)
        self._leave(call)

    def drop(self, call: ServedCall) -> None:
        """The call has ended. The text of a chat is kept: in a loop over tools the next prompt begins with it."""
        sequence = self.decoder.sequences[call.slot]
        wanted = call.request.mark_at is not None and call.statistics.finish in ("stop", "length")
        if wanted and self.cache is not None and sequence.settled and sequence.length >= len(call.ids) + _SHORTEST:
            self._store(call.slot, keep=False)
        self._leave(call)

    def _leave(self, call: ServedCall) -> None:
        del self.calls[call.slot]
        if self._releases and self.decoder.held_bytes(call.slot):
            self.decoder.release(call.slot)
        call.slot = -1

    def _store(self, slot: int, *, keep: bool) -> None:
        assert self.cache is not None
        earlier, start = self._base(slot)
        try:
            snapshot = self.decoder.snapshot(slot, earlier, start, on_device=self._on_device)
        except Exception:  # out of memory perhaps: later prompts are read in full, and no answer changes
            self.cache.statistics.failures += 1
        else:
            self.cache.add(snapshot, keep=keep)

    def _base(self, slot: int) -> tuple[tuple[CachePiece, ...], int]:
        return self.cache.base(self.decoder.sequences[slot].prompt()) if self.cache is not None else ((), 0)
