"""The tokens of one request on their way from the engine's thread to a reader: a thread, or a coroutine of an event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import NamedTuple

from qwen_export.runtimes.decoding.generation import Finish, Request, Statistics


class End(NamedTuple):
    """Nothing follows. `error` is raised where it is read."""

    error: BaseException | None = None


Item = list[int] | End
"""Tokens of one step, or the end."""


class ThreadInbox:
    """Read by threads."""

    loop = None

    def __init__(self) -> None:
        self._items: SimpleQueue[Item] = SimpleQueue()
        self.put = self._items.put
        self.get = self._items.get


class LoopInbox:
    """Read by one coroutine; `put` is called in the loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._items: deque[Item] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self.notify: Callable[[], None] | None = None
        """Called behind every `put`."""

    def put(self, item: Item) -> None:
        self._items.append(item)
        if self.notify is not None:
            self.notify()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> Item:
        while not self._items:
            self._waiter = self.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._items.popleft()

    def take(self) -> list[Item]:
        """What is there, without waiting."""
        items = list(self._items)
        self._items.clear()
        return items


Inbox = ThreadInbox | LoopInbox


class TokenStream:
    """An iterator over the new token ids of a request, without the stop token. It is `async` where the request was given a loop.

    `statistics` grow as the answer does; `statistics.finish` says why it ended. A stream that is closed or forgotten ends its request."""

    def __init__(self, request: Request, statistics: Statistics, inbox: Inbox) -> None:
        self.request, self.statistics = request, statistics
        self._inbox = inbox
        self._ready: deque[int] = deque()
        self._ended = False

    def cancel(self, reason: Finish = "cancelled") -> None:
        """End the answer after the step in progress; may be called from any thread."""
        if not self.request.cancelled.is_set():
            self.request.reason = reason
            self.request.cancelled.set()

    def close(self) -> None:
        """Take no more tokens."""
        if not self._ended:
            self._ended = True
            self.cancel("abandoned")

    def __del__(self) -> None:
        if not getattr(self, "_ended", True):
            self.close()

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> int:
        while not self._ready:
            if self._ended:
                raise StopIteration
            if isinstance(self._inbox, LoopInbox):
                raise TypeError("this stream belongs to an event loop: read it with `async for`")
            self._take(self._inbox.get())
        return self._ready.popleft()

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> int:
        while not self._ready:
            if self._ended:
                raise StopAsyncIteration
            if isinstance(self._inbox, ThreadInbox):
                raise TypeError("this stream belongs to a thread: submit the request with a loop to read it with `async for`")
            self._take(await self._inbox.get())
        return self._ready.popleft()

    def on_arrival(self, notify: Callable[[], None]) -> None:
        """Call `notify`, in the loop's thread, whenever tokens or the end have arrived: for one reader of several streams."""
        if isinstance(self._inbox, ThreadInbox):
            raise TypeError("this stream belongs to a thread: submit the request with a loop")
        self._inbox.notify = notify

    def arrived(self) -> list[int]:
        """The tokens that are there, without waiting; `ended` tells whether more will come. Raises what ended the request."""
        if isinstance(self._inbox, ThreadInbox):
            raise TypeError("this stream belongs to a thread: submit the request with a loop")
        for item in self._inbox.take():
            self._take(item)
        tokens = list(self._ready)
        self._ready.clear()
        return tokens

    @property
    def ended(self) -> bool:
        """Whether the end has arrived, or no more tokens are taken."""
        return self._ended

    def _take(self, item: Item) -> None:
        if isinstance(item, End):
            self._ended = True
            if item.error is not None:
                raise item.error
        else:
            self._ready.extend(item)


class Deliveries:
    """What a step has for its readers. Those of one event loop get theirs in one call: waking a loop costs more than a token."""

    def __init__(self) -> None:
        self._by_loop: dict[asyncio.AbstractEventLoop, list[tuple[LoopInbox, Item]]] = {}

    def put(self, inbox: Inbox, item: Item) -> None:
        if isinstance(inbox, ThreadInbox):
            inbox.put(item)
        else:
            self._by_loop.setdefault(inbox.loop, []).append((inbox, item))

    def send(self) -> list[LoopInbox]:
        """Returns inboxes whose loop has closed."""
        lost: list[LoopInbox] = []
        for loop, items in self._by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, items)
            except RuntimeError:
                lost += [inbox for inbox, _ in items]
        self._by_loop = {}
        return lost


def _deliver(items: list[tuple[LoopInbox, Item]]) -> None:
    for inbox, item in items:
        inbox.put(item)
