"""Launching a step as soon as its tokens are known: the rest of a step's work on the host (texts, histories, readers, plans) is then done
while the GPU works on the next one.

That is right where the next step is the same but for its tokens: every running call goes on, and none enters, leaves, drafts, has a
constraint, or waits for something. All other steps are planned first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.flight import Flight
from qwen_export.runtimes.decoding.logit_rows import Row, Rows
from qwen_export.runtimes.serving.served_call import ServedCall

_FILLER_TOKENS = 64
"""Tokens that a free slot reads before it is cleared: a short text costs attention next to nothing."""
Member = ServedCall | int
"""One row of a step: a call, or a free slot that fills it."""


class StepAhead:
    """`same(count)` tells whether a step that is planned now would have the rows of the one before, which had so many calls. None: no step
    is launched ahead."""

    def __init__(self, decoder: Decoder, same: Callable[[int], bool] | None) -> None:
        self._decoder, self._same = decoder, same
        self._flight = Flight()
        self.group: Sequence[Member] = ()
        self.calls: Sequence[ServedCall] = ()
        self._places: Sequence[int] = ()
        self.began = 0.0
        """When the step was launched, with what was bound or recorded first taken off."""

    @property
    def flies(self) -> bool:
        """Whether a step has been launched and not waited for."""
        return self._flight.flies

    def launch(self, group: Sequence[Member], calls: Sequence[ServedCall], tokens: Sequence[int | Exception]) -> None:
        """Launch the step behind a step of `group`, which has made `tokens` for its calls, if it is the same but for these."""
        if self._same is None or not self._same(len(calls)) or not all(map(_goes_on, calls, tokens)):
            return
        made = iter(tokens)
        ids = [0 if isinstance(one, int) else next(made) for one in group]
        foremost = group[0]
        first = foremost if isinstance(foremost, int) else foremost.slot
        self.began, bound = time.perf_counter(), self._decoder.binding_s

        def launching() -> Callable[[], Rows]:
            self.clear(group)
            return self._decoder.launch([token for token in ids if isinstance(token, int)], first)

        self._flight.launch(launching)
        self.began += self._decoder.binding_s - bound
        self.group, self.calls = group, calls
        self._places = [place for place, one in enumerate(group) if not isinstance(one, int)]

    def clear(self, group: Sequence[Member]) -> None:
        """Forget what free slots of a group have read, before it is long."""
        for slot in group:
            if isinstance(slot, int):
                sequence = self._decoder.sequences[slot]
                if not sequence.settled or sequence.length >= min(_FILLER_TOKENS, self._decoder.capacity):
                    self._decoder.reset(slot)

    def land(self) -> list[Row]:
        """Wait for the step; a row for each of `calls`. Raises what the decoder does."""
        rows = self._flight.land()
        return [rows[place] for place in self._places]

    def abandon(self) -> None:
        """Wait for the step, whatever comes of it."""
        self._flight.abandon()


def _goes_on(call: ServedCall, token: int | Exception) -> bool:
    """Whether a call's next step is known to be one more row, whatever else is done with the token."""
    request, room = call.request, call.room
    return (
        isinstance(token, int)
        and token not in request.stop_ids
        and (room is None or room > 1)
        and not (request.cancelled.is_set() or request.media or call.points)
        and request.sampler.constraint is None
        and (request.deadline is None or time.monotonic() < request.deadline)
    )
