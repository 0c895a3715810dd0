"""A call that has been launched and is waited for later."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial

from qwen_export.runtimes.decoding.logit_rows import Rows


class Flight:
    """At most one call of `Decoder.launch` under way. What its launch raises is raised when its rows are wanted: the tokens that are there
    are given out first."""

    def __init__(self) -> None:
        self._landing: Callable[[], Rows] | None = None

    @property
    def flies(self) -> bool:
        """Whether a call has been launched and not waited for."""
        return self._landing is not None

    def launch(self, launching: Callable[[], Callable[[], Rows]]) -> None:
        """`launching` does it, and returns what waits for the rows."""
        try:
            self._landing = launching()
        except Exception as error:
            self._landing = partial(_raise, error)

    def land(self) -> Rows:
        """Wait for the rows of what was launched. Raises what the launch or the call did."""
        landing, self._landing = self._landing, None
        if landing is None:
            raise AssertionError("nothing was launched")
        return landing()

    def abandon(self) -> None:
        """Wait for what may have been launched, whatever comes of it."""
        if self.flies:
            with suppress(Exception):
                self.land()


def _raise(error: Exception) -> Rows:
    raise error
