"""Which reads share a call of the graph, and that each gets what it gets alone, bit for bit.

Our attention kernel takes several tokens of several sequences behind pasts of their own; GroupQueryAttention does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pytest

from qwen_export import build
from qwen_export.runtimes import Model, load
from qwen_export.runtimes.decoding.call_plan import Sharing, plan_calls
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.read import Read
from tests.support.family import tiny_config
from tests.support.kernel_families import needs_plugin
from tests.support.synthesize import synthesize

CONTEXT, VOCABULARY = 64, 64


@pytest.fixture(scope="module", params=[pytest.param("plugin", marks=needs_plugin), "builtin"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(family: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    directory = tmp_path_factory.mktemp("shared")
    checkpoint = synthesize(tiny_config(vision=False, vocab_size=VOCABULARY, eos_token_id=VOCABULARY - 1), directory / "checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        if family == "builtin":
            patch.setenv("QWEN_EXPORT_CPU_PLUGIN", "")
        bundle = build(checkpoint, directory / "bundle")
    with load(bundle, threads=1, max_context=CONTEXT) as model:
        yield model


def ids(slot: int, count: int, start: int = 0) -> list[int]:
    return [(11 * slot + 5 * i + 3) % VOCABULARY for i in range(start, start + count)]


class Beside:
    """A decoder of several slots and one of a single slot for each, which read the same."""

    def __init__(self, model: Model, slots: int) -> None:
        self.together, self.alone = model.decoder(slots, drafts=True), [model.decoder(drafts=True) for _ in range(slots)]
        self.exact = model.manifest.plugins != ()
        self.calls = 0
        self.together.observer = self._count

    def _count(self, *_: object) -> None:
        self.calls += 1

    def run(self, reads: Sequence[Read]) -> int:
        """Read; returns the calls that it took."""
        self.calls = 0
        for read, rows in zip(reads, self.together.run(reads), strict=True):
            [own] = self.alone[read.slot].run([Read(0, read.ids, commit=read.commit, logits=read.logits)])
            self.same(rows.array[: read.logits], own.array[: read.logits])
            if rows.top(0) is not None and read.logits:
                top = rows.top(read.logits - 1)
                assert top is not None and top.ids[0] == int(own.array[read.logits - 1].argmax())
        return self.calls

    def accept(self, counts: dict[int, int]) -> None:
        for slot, count in counts.items():
            self.together.accept(count, slot)
            self.alone[slot].accept(count)

    def same(self, left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> None:
        assert np.array_equal(left, right) if self.exact else np.allclose(left, right, atol=5e-5)

    def step_all(self) -> None:
        """A committed token of every slot, which takes in what is pending."""
        self.run([Read(slot, ids(slot, 1, 40)) for slot in range(self.together.batch)])


@pytest.fixture
def beside(model: Model) -> Beside:
    made = Beside(model, 4)
    made.run([Read(slot, ids(slot, 3 + 2 * slot), logits=0) for slot in range(4)])
    return made


def test_verifies_of_all_rows_are_one_call(beside: Beside, family: str) -> None:
    """Each with drafts of its own number, and its own count accepted, round after round."""
    for drafts, kept in ([3, 1, 2, 3], [3, 0, 1, 2]), ([2, 2, 2, 2], [1, 2, 2, 0]), ([1, 4, 2, 1], [1, 4, 0, 1]):
        calls = beside.run([Read(slot, ids(slot, n), commit=False, logits=n) for slot, n in enumerate(drafts)])
        assert calls == (1 if family == "plugin" else 4)
        beside.accept(dict(enumerate(kept)))
    beside.step_all()


def test_open_tokens_survive_calls_of_others(beside: Beside) -> None:
    """What is pending of a slot stays what it is while others verify alone and together, with other numbers of tokens."""
    beside.run([Read(3, ids(3, 4), commit=False, logits=4)])
    beside.accept({3: 4})
    for count in (2, 3, 1):
        beside.run([Read(slot, ids(slot, count), commit=False, logits=count) for slot in range(3)])
        beside.accept({0: count, 1: 0, 2: 1})
    beside.run([Read(slot, ids(slot, 2), commit=False, logits=2) for slot in (1, 2, 3)])
    beside.accept({1: 2, 2: 1, 3: 0})
    beside.run([Read(0, ids(0, 4), commit=False, logits=4)])
    beside.accept({0: 3})
    beside.step_all()


def test_a_verify_alone_between_verifies_of_all(beside: Beside) -> None:
    """The same call of one slot, where the tokens of all lie differently far apart."""
    for before in (2, 4, 1):
        for count in (before, 3):
            beside.run([Read(slot, ids(slot, count), commit=False, logits=count) for slot in range(4)])
            beside.accept(dict.fromkeys(range(4), 1))
        beside.run([Read(2, ids(2, 1), commit=False)])
        beside.accept({2: 1})
        beside.step_all()


def test_a_mark_has_what_is_pending(beside: Beside) -> None:
    """Taken where several slots lie close together, and gone back to in another layout; a snapshot fits any slot."""
    beside.run([Read(slot, ids(slot, 2), commit=False, logits=2) for slot in range(4)])
    beside.accept(dict.fromkeys(range(4), 2))
    marks = [beside.together.mark(slot) for slot in range(4)], [single.mark() for single in beside.alone]
    snapshot = beside.together.snapshot(1)
    beside.run([Read(slot, ids(slot, 4), commit=False, logits=4) for slot in range(4)])
    beside.accept(dict.fromkeys(range(4), 3))
    for slot in (0, 3):
        beside.together.rewind(marks[0][slot], slot)
        beside.alone[slot].rewind(marks[1][slot])
    beside.together.restore(snapshot, 2)
    beside.alone[2].restore(beside.alone[1].snapshot())
    beside.alone[2].rewind(marks[1][1])
    beside.step_all()


def test_prompts_behind_pasts_share_a_call(beside: Beside, family: str) -> None:
    """As long, or nearly so; what follows a shorter one's tokens in the call leaves no trace."""
    assert beside.run([Read(slot, ids(slot, 6)) for slot in range(4)]) == (1 if family == "plugin" else 4)
    assert beside.run([Read(slot, ids(slot, n), logits=n % 2) for slot, n in enumerate((6, 5, 6, 4))]) == (1 if family == "plugin" else 4)
    assert beside.run([Read(slot, ids(slot, n)) for slot, n in enumerate((20, 2, 20, 2))]) > 1
    beside.step_all()


def test_no_padding_beyond_the_context(beside: Beside) -> None:
    """A slot whose text nearly fills its room takes part with as many tokens as fit, alone."""
    room = CONTEXT - beside.together.lengths[1]
    beside.run([Read(1, ids(1, room - 2), logits=0)])
    for _ in range(2):
        beside.run([Read(slot, ids(slot, 1 if slot == 1 else 3), commit=False, logits=1) for slot in range(4)])
        beside.accept(dict.fromkeys(range(4), 1))
    assert beside.together.lengths[1] == CONTEXT


def test_drafts_of_all_rows(model: Model, beside: Beside) -> None:
    """The head reads what a round accepted, of each its own count, and drafts what it drafts for each alone."""
    together = beside.together
    for kept in ([1, 1, 1, 1], [3, 1, 2, 1], [2, 2, 2, 2]):
        for slots in ([0, 1, 2, 3], [0, 3], [1, 2]):
            marks = [together.mark(slot) for slot in range(4)]
            drafts(together, beside.alone, slots, beside)
            for slot in range(4):
                together.rewind(marks[slot], slot)
        beside.run([Read(slot, ids(slot, 3), commit=False, logits=3) for slot in range(4)])
        beside.accept(dict(enumerate(kept)))


def drafts(together: Decoder, alone: Sequence[Decoder], slots: Sequence[int], beside: Beside) -> None:
    assert together.head is not None
    first = {slot: row.array.copy() for slot, row in together.head.first({slot: 7 + slot for slot in slots}).items()}
    second = {slot: row.array.copy() for slot, row in together.head.following(dict.fromkeys(slots, 9), 1).items()}
    third = {slot: row.array.copy() for slot, row in together.head.following({slots[-1]: 4}, 2).items()}
    assert list(first) == list(second) == list(slots)
    for slot in slots:
        single, mark = alone[slot], alone[slot].mark()
        assert single.head is not None
        beside.same(first[slot], single.head.first({0: 7 + slot})[0].array)
        beside.same(second[slot], single.head.following({0: 9}, 1)[0].array)
        if slot in third:
            beside.same(third[slot], single.head.following({0: 4}, 2)[0].array)
        single.rewind(mark)


def plan(counts: Sequence[int], sharing: Sharing, lengths: Sequence[int], *, capacity: int = 100, commit: bool = True) -> list[list[int]]:
    reads = [Read(slot, [1] * count, commit=commit) for slot, count in enumerate(counts) if count]
    return plan_calls(reads, sharing, lengths, lambda slot: False, capacity)


def test_what_a_graph_can_share_follows_from_its_inputs() -> None:
    lengths, old = {"length", "accepted", "commit"}, {"last_slot", "total_length", "commit"}
    assert Sharing.of(lengths, 3, 96, recurrent=True) == Sharing(True, True, 3, 96)
    assert Sharing.of({"length"}, 3, 96, recurrent=True) == Sharing(True, False, 3, 96), "no count is held back"
    assert Sharing.of({"length"}, 3, 96, recurrent=False) == Sharing(True, True, 3, 96), "a draft head"
    assert Sharing.of(old, 3, 96, recurrent=True) == Sharing(False, False, 3, 96)


def test_calls_are_planned_by_padding_and_size() -> None:
    ours = Sharing(True, True, 3, 32)
    assert plan([4, 3, 4, 2], ours, [9] * 4) == [[0, 1, 2, 3]]
    assert plan([12, 3, 4, 2], ours, [9] * 4) == [[0], [1, 2, 3]], "more padding than a call costs"
    assert plan([12, 12, 12], ours, [9] * 3) == [[0, 1], [2]], "as many tokens as a call has"
    assert plan([4, 0, 4], ours, [9] * 3) == [[0], [1]], "slots that are no neighbors"
    assert plan([4, 4], ours, [9, 97]) == [[0], [1]] and plan([4, 4], ours, [9, 96]) == [[0, 1]], "room"
    assert plan([4, 3], Sharing(True, False, 3, 32), [9] * 2) == [[0], [1]], "padding would enter the states"
    theirs = Sharing(False, False, 3, 32)
    assert plan([4, 4], theirs, [9, 0]) == [[0], [1]] and plan([4, 4], theirs, [0, 0]) == [[0, 1]]
    assert plan([1, 1, 1], theirs, [9, 0, 5]) == [[0, 1, 2]]
