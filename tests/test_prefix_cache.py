"""The store of earlier prompts: the longest beginning is found, memory stays bounded, what a conversation needs next is evicted last."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_export.runtimes.decoding.sequence import Media, Prompt
from qwen_export.runtimes.decoding.snapshot import Mark, Snapshot
from qwen_export.runtimes.serving.prefix_cache import PrefixCache

STATE = 1000
WIDTH = 10


def store(cache: PrefixCache, prompt: Prompt, *, keep: bool = False) -> bool:
    """As the engine does: rows that the cache has are not copied again."""
    earlier, start = cache.base(prompt)
    start = max(0, start - 1)
    rows = np.asarray(prompt.ids[start:], np.uint8).repeat(WIDTH).reshape(1, -1, WIDTH)
    mark = Mark(prompt.ids, {"state": np.full(STATE, prompt.ids[-1] % 256, np.uint8)}, media=prompt.media)
    return cache.add(Snapshot(mark, {"k": rows}, start, earlier), keep=keep)


def rows_of(snapshot: Snapshot) -> list[int]:
    """The cache rows of a snapshot, as its pieces are written one after the other."""
    rows = np.full(len(snapshot.mark.tokens), 255)
    for piece in snapshot.pieces:
        own = piece.rows["k"][0, :, 0]
        rows[piece.start : piece.start + len(own)] = own[: len(rows) - piece.start]
    return rows.tolist()


TEXT = st.lists(st.integers(0, 2), min_size=1, max_size=30).map(tuple)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(TEXT, st.booleans(), st.booleans()), min_size=1, max_size=25), st.integers(0, 8000))
def test_the_longest_beginning_is_found_within_memory(actions: list[tuple[tuple[int, ...], bool, bool]], limit: int) -> None:
    cache = PrefixCache(limit)
    texts = [ids for ids, _, _ in actions]
    for ids, stores, keep in actions:
        prompt = Prompt(ids)
        if stores:
            assert store(cache, prompt, keep=keep) == cache.has(prompt)
        best = max(
            (len(text) for text in texts if len(text) < len(ids) and ids[: len(text)] == text and cache.has(Prompt(text))), default=0
        )
        found = cache.find(prompt)
        assert (len(found.mark.tokens) if found else 0) == best
        if found:
            assert rows_of(found) == list(ids[:best])
        assert 0 <= cache.statistics.bytes <= limit
    cache.clear()
    assert cache.statistics.bytes == 0


def test_a_turn_adds_its_own_rows_only() -> None:
    cache = PrefixCache(10**6)
    store(cache, Prompt(tuple([1] * 1000)))
    before = cache.statistics.bytes
    store(cache, Prompt(tuple([1] * 1010)))
    assert cache.statistics.bytes - before < STATE + 20 * WIDTH + 4 * 1010 + 1


def test_the_last_user_turn_is_evicted_last() -> None:
    """The calls of a tool loop behind it need memory; the next user turn goes back to it."""
    user = tuple([1] * 50)
    cache = PrefixCache(6 * STATE)
    store(cache, Prompt(user), keep=True)
    for step in range(1, 12):
        store(cache, Prompt((*user, *[2] * step, *[3] * (20 * step))))
    found = cache.find(Prompt((*user, 9, 9)))
    assert found is not None
    assert found.mark.tokens == user
    assert cache.statistics.evictions > 0


def test_a_later_user_turn_takes_the_place_of_an_earlier_one() -> None:
    cache = PrefixCache(int(3.5 * STATE))
    first, second = tuple([1] * 30), (*[1] * 30, *[2] * 30)
    store(cache, Prompt(first), keep=True)
    store(cache, Prompt(second), keep=True)
    for other in range(4, 8):
        store(cache, Prompt((other, other)))
    assert cache.has(Prompt(second))
    assert not cache.has(Prompt(first))


def test_equal_ids_with_other_pictures_are_other_prompts() -> None:
    cache = PrefixCache(10**6)
    ids = (1, 7, 7, 7, 2)
    store(cache, Prompt(ids, (Media(1, 3, b"a"),)))
    assert cache.find(Prompt((*ids, 3), (Media(1, 3, b"b"),))) is None
    assert cache.find(Prompt((*ids, 3), (Media(1, 3, b"a"),))) is not None
    assert cache.parting(Prompt((*ids, 3), (Media(1, 3, b"b"),))) == 1


def test_where_prompts_parted() -> None:
    cache = PrefixCache(10**6)
    store(cache, Prompt((1, 2, 3, 4)))
    assert cache.parting(Prompt((1, 2, 9, 9, 9))) == 2
    assert PrefixCache(0).parting(Prompt((1, 2, 9, 9, 9)), [(np.array([1, 2, 9, 8], np.int32), Prompt((1, 2, 9, 8)))]) == 3
    assert cache.parting(Prompt((5,))) == 0
    assert cache.parting(Prompt((5, 6))) == 1, "of a prompt that was not stored"


def test_statistics_tell_what_more_memory_would_save() -> None:
    cache = PrefixCache(2 * STATE)
    for text in ((1,) * 40, (2,) * 40, (3,) * 40):
        store(cache, Prompt(text))
    assert cache.find(Prompt((1,) * 41)) is None
    numbers = cache.statistics
    assert (numbers.hits, numbers.evicted_tokens) == (0, 40)
    assert cache.find(Prompt((3,) * 41)) is not None
    assert (numbers.prompts, numbers.hits, numbers.reused_tokens, numbers.read_tokens) == (2, 1, 40, 42)


def test_a_point_larger_than_the_cache_is_not_stored() -> None:
    cache = PrefixCache(STATE // 2)
    assert not store(cache, Prompt((1, 2)))
    assert cache.statistics.bytes == 0


@pytest.mark.parametrize("length", [1, 5])
def test_one_token_is_left_to_read(length: int) -> None:
    cache = PrefixCache(10**6)
    store(cache, Prompt((1,) * length))
    assert cache.find(Prompt((1,) * length)) is None
    assert cache.find(Prompt((1,) * (length + 1))) is not None
