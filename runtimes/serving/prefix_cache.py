"""What was read of earlier prompts, for later ones that begin alike.

A recurrent state cannot be cut back, so a prompt can go on only from a point whose state was kept: a *node*. Nodes form a tree. Each has
the rows of the attention caches from its parent's end on, which a turn adds, and a state of constant size. A node whose state was evicted
may stay for the rows that its children need.

What is evicted first: states and rows used longest ago; the point before a conversation's last user turn only when nothing else is left.
Templates drop the reasoning of earlier turns when a new user turn comes, so the next prompt often goes back exactly to that point.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from qwen_export.runtimes.decoding.sequence import Prompt
from qwen_export.runtimes.decoding.snapshot import CachePiece, Mark, Snapshot

_REMEMBERED = 4096
"""Evicted points that are remembered, to count what they would have saved."""
_SEEN = 64
"""Prompts that are remembered without their states: where a later one parts from them, a point is worth keeping."""
_LONG_AGO = 64
"""Prompts after which a conversation that did not go on counts as left."""

Ids = npt.NDArray[np.int32]


@dataclass
class PrefixStatistics:
    """The use of the cache. `read_tokens` and `reused_tokens` are of prompts that looked for a beginning. `evicted_tokens` were read
    again although they had been stored: with more memory they would have been reused."""

    prompts: int = 0
    hits: int = 0
    read_tokens: int = 0
    reused_tokens: int = 0
    evicted_tokens: int = 0
    evictions: int = 0
    failures: int = 0
    """Points that could not be copied."""
    points: int = 0
    bytes: int = 0
    limit: int = 0


@dataclass(eq=False)
class _Node:
    prompt: Prompt
    ids: Ids
    digest: bytes
    parent: _Node | None
    piece: CachePiece
    mark: Mark | None
    keep: bool = False
    used: int = 0
    children: list[_Node] = field(default_factory=list)

    @property
    def state_bytes(self) -> int:
        if self.mark is None:
            return 0
        return sum(x.nbytes for table in (self.mark.states, self.mark.pending) for x in table.values()) + self.mark.waiting.nbytes

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self.piece.rows.values()) + self.state_bytes + self.ids.nbytes

    def line(self) -> Iterator[_Node]:
        """From the root to this node."""
        if self.parent is not None:
            yield from self.parent.line()
        yield self


class PrefixCache:
    """At most `limit` bytes. Belongs to one thread."""

    def __init__(self, limit: int) -> None:
        self.statistics = PrefixStatistics(limit=limit)
        self._nodes: dict[tuple[int, bytes], _Node] = {}
        self._lengths: dict[int, int] = {}
        self._recent: OrderedDict[int, _Node] = OrderedDict()
        self._seen: deque[tuple[Ids, Prompt]] = deque(maxlen=_SEEN)
        self._evicted: OrderedDict[tuple[int, bytes], None] = OrderedDict()

    # ---- finding ----

    def find(self, prompt: Prompt) -> Snapshot | None:
        """The longest stored beginning of a prompt that leaves at least one token to read."""
        digests = _digests(prompt, self._lengths.keys() | {n for n, _ in self._evicted}, len(prompt.ids) - 1)
        numbers = self.statistics
        numbers.prompts += 1
        found: _Node | None = None
        lost = 0
        for length, digest in reversed(digests):
            node = self._nodes.get((length, digest))
            if node is not None and node.mark is not None:
                found = node
                break
            lost = lost or (length if (length, digest) in self._evicted else 0)
        reused = len(found.ids) if found is not None else 0
        numbers.hits += found is not None
        numbers.reused_tokens += reused
        numbers.read_tokens += len(prompt.ids) - reused
        numbers.evicted_tokens += max(0, lost - reused)
        if found is None or found.mark is None:
            return None
        self._use(found)
        *before, last = (node.piece for node in found.line())
        return Snapshot(found.mark, last.rows, last.start, tuple(before))

    def parting(self, prompt: Prompt, others: Iterable[tuple[Ids, Prompt]] = ()) -> int:
        """Tokens that a prompt shares with the stored text, an earlier prompt, or one of `others` (ids i32[n] and prompt), from which it
        parts last."""
        ids = np.asarray(prompt.ids, np.int32)
        longest = 0
        for text, whose in ((node.ids, node.prompt) for node in self._nodes.values() if not node.children):
            longest = max(longest, _shared(ids, text, prompt, whose, longest))
        for text, whose in (*self._seen, *others):
            longest = max(longest, _shared(ids, text, prompt, whose, longest))
        self._seen.append((ids, prompt))
        return longest

    # ---- keeping ----

    def base(self, prompt: Prompt) -> tuple[tuple[CachePiece, ...], int]:
        """What is stored of a text's caches already, for `Decoder.snapshot`: pieces, and the token that they end before."""
        node = self._parent(prompt)
        return (tuple(one.piece for one in node.line()), len(node.ids)) if node is not None else ((), 0)

    def add(self, snapshot: Snapshot, *, keep: bool = False) -> bool:
        """Store a point, whose caches begin where `base` said. With `keep` it is that before a conversation's last user turn. False where
        it does not fit."""
        prompt = snapshot.mark.prompt
        key = (len(prompt.ids), _digests(prompt, {len(prompt.ids)}, len(prompt.ids))[0][1])
        node = self._nodes.get(key)
        if node is None:
            parent = self._parent(prompt) if snapshot.earlier else None
            piece = CachePiece(snapshot.start, snapshot.caches)
            node = _Node(prompt, np.asarray(prompt.ids, np.int32), key[1], parent, piece, None)
            if parent is not None:
                parent.children.append(node)
            self._nodes[key] = node
            self._lengths[key[0]] = self._lengths.get(key[0], 0) + 1
            self.statistics.bytes += node.nbytes
        if node.mark is None:
            node.mark = snapshot.mark
            self.statistics.bytes += node.state_bytes
            self.statistics.points += 1
        if keep:  # it takes the place of earlier last user turns
            for one in node.line():
                one.keep = one is node
        self._use(node)
        if not self._trim(node):
            self._evict(node)
            return False
        self._evicted.pop(key, None)
        return True

    def has(self, prompt: Prompt) -> bool:
        """Whether exactly this text is stored, with its state."""
        n = len(prompt.ids)
        node = self._nodes.get((n, _digests(prompt, {n}, n)[0][1])) if n in self._lengths else None
        return node is not None and node.mark is not None

    def clear(self) -> None:
        self._nodes.clear()
        self._lengths.clear()
        self._recent.clear()
        self.statistics.bytes = self.statistics.points = 0

    def _parent(self, prompt: Prompt) -> _Node | None:
        for key in reversed(_digests(prompt, self._lengths.keys(), len(prompt.ids) - 1)):
            if key in self._nodes:
                return self._nodes[key]
        return None

    def _use(self, node: _Node) -> None:
        for one in node.line():
            one.used = self.statistics.prompts
            self._recent[id(one)] = one
            self._recent.move_to_end(id(one))

    # ---- evicting ----

    def _trim(self, new: _Node) -> bool:
        """Come back to the limit without what `new` needs; False where that is not enough."""
        held = set(map(id, new.line()))
        while self.statistics.bytes > self.statistics.limit:
            candidates = [node for node in self._recent.values() if id(node) not in held and (node.mark is not None or not node.children)]
            # Another conversation's last user turn is worth more than a point of less use, unless it has not been used for long.
            old = next((n for n in candidates if new.keep or n.used < self.statistics.prompts - _LONG_AGO), None)
            node = next((n for n in candidates if not n.keep), old)
            if node is None:
                return False
            self._evict(node)
        return True

    def _evict(self, node: _Node) -> None:
        """Its state, and its rows where no other point needs them."""
        key = (len(node.ids), node.digest)
        if node.mark is not None:
            self.statistics.evictions += 1
            self.statistics.points -= 1
            self.statistics.bytes -= node.state_bytes
            self._evicted[key] = None
            if len(self._evicted) > _REMEMBERED:
                self._evicted.popitem(last=False)
            node.mark, node.keep = None, False
        if node.children:
            return
        self.statistics.bytes -= node.nbytes
        del self._nodes[key], self._recent[id(node)]
        self._lengths[key[0]] -= 1
        if not self._lengths[key[0]]:
            del self._lengths[key[0]]
        if node.parent is not None:
            node.parent.children.remove(node)
            if node.parent.mark is None:
                self._evict(node.parent)


def _digests(prompt: Prompt, lengths: Iterable[int], longest: int) -> list[tuple[int, bytes]]:
    """Lengths, ascending, and a digest of so many first tokens with their media."""
    data, hasher, start, made = np.asarray(prompt.ids, np.int32).tobytes(), blake2b(digest_size=16), 0, []
    for length in sorted(lengths):
        if length > longest:
            break
        hasher.update(data[4 * start : 4 * length])
        start, whole = length, hasher
        media = [m for m in prompt.media if m.start < length]
        if media:
            whole = hasher.copy()
            for m in media:
                whole.update(b"%d,%d," % (m.start, m.count) + m.digest)
        made.append((length, whole.digest()))
    return made


def _shared(left: Ids, right: Ids, mine: Prompt, theirs: Prompt, known: int) -> int:
    """Tokens at the beginning of both; 0 where they are not more than `known`."""
    count = min(len(left), len(right))
    if count <= known or left[known] != right[known]:
        return 0
    differing = left[:count] != right[:count]
    shared = int(differing.argmax()) if differing.any() else count
    return _with_media(shared, mine, theirs) if mine.media or theirs.media else shared


def _with_media(shared: int, left: Prompt, right: Prompt) -> int:
    """Tokens that two prompts share when those with equal ids may stand for other pictures; no picture is cut."""
    for mine, theirs in zip(left.media, right.media, strict=False):
        if mine != theirs:
            return min(shared, mine.start, theirs.start)
    for m in (*left.media, *right.media):
        if m.start < shared < m.start + m.count:
            return m.start
    return shared
