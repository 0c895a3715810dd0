"""Several sequences in one decoder: each gets what it gets alone, whatever the others do, on every backend of the CPU.

Schedules are random: reads of any length, drafts that are accepted in part, marks, sequences that leave and join. Nothing of a schedule is
checked against a formula; the same reads go to a decoder of one slot.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_export import build
from qwen_export.errors import ContextOverflow, ParameterError, QwenExportError
from qwen_export.runtimes import Model, load
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.decoding.read import Read
from qwen_export.runtimes.decoding.snapshot import Mark, Snapshot
from tests.support.family import tiny_config
from tests.support.kernel_families import TOLERANCE, family_cases, needs_plugin
from tests.support.synthesize import synthesize

Array = npt.NDArray[np.float32]
CONTEXT, VOCABULARY = 96, 64
BACKENDS = family_cases()


@pytest.fixture(scope="module")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    directory = tmp_path_factory.mktemp("sequences")
    checkpoint = synthesize(tiny_config(vision=False, vocab_size=VOCABULARY, eos_token_id=VOCABULARY - 1), directory / "checkpoint")
    models: dict[str, Model] = {}

    def make(backend: str) -> Model:
        if backend not in models:
            with pytest.MonkeyPatch.context() as patch:
                if backend != "plugin":
                    patch.setenv("QWEN_EXPORT_CPU_PLUGIN", "")
                options = {"target": "onnx", "max_context": CONTEXT} if backend == "onnx" else {}
                bundle = build(checkpoint, directory / backend, **options)  # type: ignore[arg-type]
            models[backend] = load(bundle, threads=1, max_context=CONTEXT)
        return models[backend]

    return make


class Alone:
    """One sequence in a decoder of its own, and what it may go back to."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.marks: tuple[Mark, Mark] | None = None

    def read(self, ids: list[int], *, commit: bool, logits: int) -> Array:
        [rows] = self.decoder.run([Read(0, ids, commit=commit, logits=logits)])
        return rows.array[:logits].copy()


def differ(left: Array, right: Array) -> float:
    return float(np.abs(left - right).max()) if left.size else 0.0


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_a_row_gets_what_it_gets_alone(make_model: Callable[[str], Model], backend: str, drafts: bool, data: st.DataObject) -> None:
    model = make_model(backend)
    B = data.draw(st.integers(1, 5), "B")
    together = model.decoder(B, drafts=drafts)
    alone = [Alone(model.decoder(drafts=drafts)) for _ in range(B)]
    marks: list[tuple[Mark, Mark] | None] = [None] * B
    stored: list[tuple[Snapshot, Snapshot]] = []
    token = st.integers(0, VOCABULARY - 1)
    for _ in range(data.draw(st.integers(3, 9), "rounds")):
        reads, expected = [], []
        for slot in data.draw(st.permutations(range(B)), "slots")[: data.draw(st.integers(1, B), "count")]:
            kind = data.draw(st.sampled_from(["step", "step", "prompt", "verify"]), "kind")
            widest = {"step": 1, "prompt": 12, "verify": together.widest_verify}[kind]
            ids = data.draw(st.lists(token, min_size=1, max_size=widest), "ids")
            if together.sequences[slot].length + len(ids) + together.widest_verify > CONTEXT:
                together.reset(slot)
                alone[slot].decoder.reset()
                marks[slot] = None
            commit = kind != "verify"
            logits = len(ids) if not commit else data.draw(st.sampled_from([0, 1]), "logits") if len(ids) <= together.widest_verify else 0
            reads.append(Read(slot, ids, commit=commit, logits=logits))
            expected.append(alone[slot].read(ids, commit=commit, logits=logits))
        for read, rows, wanted in zip(reads, together.run(reads), expected, strict=True):
            assert differ(rows.array[: read.logits], wanted) <= TOLERANCE[backend], (read, [r.slot for r in reads])
        for read in reads:
            if not read.commit:
                kept = data.draw(st.integers(0, len(read.ids)), "kept")
                together.accept(kept, read.slot)
                alone[read.slot].decoder.accept(kept)
        slot = data.draw(st.integers(0, B - 1), "slot")
        match data.draw(st.sampled_from(["", "", "mark", "rewind", "leave", "store", "join"]), "then"):
            case "mark":
                marks[slot] = together.mark(slot), alone[slot].decoder.mark()
            case "rewind" if marks[slot] is not None:
                ours, theirs = marks[slot]  # type: ignore[misc]
                if together.sequences[slot].prompt().begins_with(ours.prompt):
                    together.rewind(ours, slot)
                    alone[slot].decoder.rewind(theirs)
            case "leave":
                together.reset(slot)
                alone[slot].decoder.reset()
                marks[slot] = None
            case "store":
                stored.append((together.snapshot(slot), alone[slot].decoder.snapshot()))
            case "join" if stored:
                ours, theirs = data.draw(st.sampled_from(stored), "snapshot")  # type: ignore[assignment]
                together.restore(ours, slot)  # type: ignore[arg-type]
                alone[slot].decoder.restore(theirs)  # type: ignore[arg-type]
                marks[slot] = None
        assert together.lengths == [single.decoder.lengths[0] for single in alone]
    if drafts and together.head is not None:
        tokens = {slot: 5 + slot for slot in range(B) if together.lengths[slot]}
        rows = {slot: row.array.copy() for slot, row in together.head.first(tokens).items()}
        more = {slot: row.array.copy() for slot, row in together.head.following(dict.fromkeys(tokens, 9), 1).items()}
        for slot in tokens:
            single = alone[slot]
            assert single.decoder.head is not None
            assert differ(rows[slot], single.decoder.head.first({0: 5 + slot})[0].array) <= TOLERANCE[backend]
            assert differ(more[slot], single.decoder.head.following({0: 9}, 1)[0].array) <= TOLERANCE[backend]


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_reads_are_refused_before_anything_changes(make_model: Callable[[str], Model], backend: str) -> None:
    model = make_model(backend)
    decoder, untouched = model.decoder(2), model.decoder(2)
    for machine in (decoder, untouched):
        machine.run([Read(0, [1, 2, 3]), Read(1, [4])])
    wrong: list[tuple[list[Read], type[QwenExportError], str]] = [
        ([], ParameterError, "nothing to read"),
        ([Read(0, [])], ParameterError, "nothing to read"),
        ([Read(0, [5]), Read(2, [6])], ParameterError, "no such slot"),
        ([Read(0, [5]), Read(-1, [6])], ParameterError, "no such slot"),
        ([Read(0, [5]), Read(0, [6])], ParameterError, "read twice"),
        ([Read(0, [5]), Read(1, [VOCABULARY])], ParameterError, "not in the vocabulary"),
        ([Read(0, [5]), Read(1, [-1])], ParameterError, "not in the vocabulary"),
        ([Read(0, [5]), Read(1, [6], logits=2)], ParameterError, "more rows of logits"),
        ([Read(0, [5]), Read(1, [6], logits=-1)], ParameterError, "more rows of logits"),
        ([Read(0, [5]), Read(1, [6] * 99, commit=False, logits=0)], ParameterError, "too long"),
        ([Read(0, [5]), Read(1, [6], positions=[1, 2])], ParameterError, "one position per token"),
        ([Read(0, [5] * 94, logits=0), Read(1, [6])], ContextOverflow, "context is full"),
        ([Read(0, [5]), Read(1, [6], features=np.zeros((1, 64), np.float32))], ParameterError, "one feature per place"),
    ]
    for reads, kind, message in wrong:
        if kind is ContextOverflow and decoder.chunk < 94:
            continue
        with pytest.raises(kind, match=message):
            decoder.run(reads)
        assert decoder.lengths == [3, 1]
    for call in (
        lambda: decoder.step([1]),
        lambda: decoder.step([1, 2, 3]),
        lambda: decoder.prefill([5], 0, -1),
        lambda: decoder.accept(1),
    ):
        with pytest.raises(ParameterError):
            call()
    with pytest.raises(ParameterError):
        decoder.accept(-1)
    expected = untouched.step([7, 8]).copy()
    np.testing.assert_array_equal(decoder.step([7, 8]), expected)


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_to_advance_is_to_read_one_token_each(make_model: Callable[[str], Model], backend: str, drafts: bool) -> None:
    """For some neighboring slots, with tokens that a verify left open, and with a sequence that has positions of its own."""
    model = make_model(backend)
    left, right = model.decoder(4, drafts=drafts), model.decoder(4, drafts=drafts)
    for decoder in (left, right):
        for slot in range(4):
            decoder.prefill([5 + slot, 6, 7][: 1 + slot % 3], slot, want_logits=False)
    if left.widest_verify:
        for decoder in (left, right):
            decoder.run([Read(2, [9, 10], commit=False, logits=2)])
            decoder.accept(1, 2)
    for first, tokens in ((1, [11, 12, 13]), (0, [1, 2, 3, 4]), (3, [8]), (1, [7, 6])):
        advanced = left.advance(tokens, first)
        got = [advanced[place].array.copy() for place in range(len(tokens))]
        read = right.run([Read(first + place, [token]) for place, token in enumerate(tokens)])
        for row, rows in zip(got, read, strict=True):
            assert differ(row, rows.array[0]) <= TOLERANCE[backend]
        assert left.lengths == right.lengths
    lengths = left.lengths
    for first, tokens in ((2, [1, 2, 3]), (-1, [1, 2]), (0, [1, VOCABULARY * 1000]), (0, [-1])):
        with pytest.raises(ParameterError):
            left.advance(tokens, first)
        assert left.lengths == lengths
    left.run([Read(0, [5], positions=[30])])
    right.run([Read(0, [5], positions=[30])])
    advanced = left.advance([1, 2, 3, 4])
    got = [advanced[slot].array.copy() for slot in range(4)]
    for row, rows in zip(got, right.run([Read(slot, [1 + slot]) for slot in range(4)]), strict=True):
        assert differ(row, rows.array[0]) <= TOLERANCE[backend]


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_belong_to_the_sequence(make_model: Callable[[str], Model], backend: str) -> None:
    """Rotation depends on differences of positions only: a text that begins elsewhere has the same logits. Beside it another sequence has
    the positions of text, and a third one a gap."""
    model, ids = make_model(backend), [5, 6, 7, 8, 9, 10]
    decoder, plain = model.decoder(3), model.decoder()
    shifted = Read(0, ids[:5], logits=0, positions=range(20, 25))
    decoder.run([shifted, Read(1, ids[:5], logits=0), Read(2, ids[:5], logits=0, positions=[0, 1, 2, 30, 31])])
    plain.prefill(ids[:5], want_logits=False)
    expected = plain.step(ids[5:])[0].copy()
    marks = [decoder.mark(slot) for slot in range(3)]
    first = [rows.array[0].copy() for rows in decoder.run([Read(slot, ids[5:]) for slot in range(3)])]
    assert differ(first[0], expected) < 1e-4 and differ(first[1], expected) <= TOLERANCE[backend] and differ(first[2], expected) > 1e-4
    snapshots = [decoder.snapshot(slot) for slot in range(3)]
    for slot in range(3):
        decoder.rewind(marks[slot], slot)
    again = [rows.array[0].copy() for rows in decoder.run([Read(slot, ids[5:]) for slot in range(3)])]
    assert all(differ(a, b) <= TOLERANCE[backend] for a, b in zip(first, again, strict=True))
    following = [rows.array[0].copy() for rows in decoder.run([Read(slot, [3]) for slot in range(3)])]
    other = model.decoder(3)
    for slot in range(3):
        other.restore(snapshots[slot], 2 - slot)
    moved = [rows.array[0].copy() for rows in other.run([Read(2 - slot, [3]) for slot in range(3)])]
    assert all(differ(a, b) <= TOLERANCE[backend] for a, b in zip(following, moved, strict=True))


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_first_prompts_as_long_share_a_call(make_model: Callable[[str], Model], backend: str, drafts: bool) -> None:
    """Beginnings of several texts in one call, with gaps between slots and other lengths beside: as each alone, and what follows too."""
    model = make_model(backend)
    together, alone = model.decoder(6, drafts=drafts), model.decoder(drafts=drafts)
    texts = {0: 7, 1: 7, 2: 5, 4: 7, 5: 7}
    ids = {slot: [(slot + 3 * i) % VOCABULARY for i in range(count)] for slot, count in texts.items()}
    logits = 0 if backend == "onnx" else 1
    first = together.run([Read(slot, ids[slot], logits=logits) for slot in texts])
    got = {slot: rows.array[:logits].copy() for slot, rows in zip(texts, first, strict=True)}
    then = together.run([Read(slot, (slot,)) for slot in texts])
    after = {slot: rows.array[0].copy() for slot, rows in zip(texts, then, strict=True)}
    for slot in texts:
        alone.reset()
        [rows] = alone.run([Read(0, ids[slot], logits=logits)])
        assert differ(rows.array[:logits], got[slot]) <= TOLERANCE[backend]
        [rows] = alone.run([Read(0, (slot,))])
        assert differ(rows.array[0], after[slot]) <= 2 * TOLERANCE[backend]


@needs_plugin
def test_a_token_with_positions_shares_no_call(make_model: Callable[[str], Model]) -> None:
    """The positions of one sequence are not those of its neighbors."""
    model = make_model("plugin")
    decoder, plain = model.decoder(3), model.decoder()
    for slot in range(3):
        decoder.prefill([5, 6, 7], slot, want_logits=False)
    rows = decoder.run([Read(0, (8,), positions=[40]), Read(1, (8,)), Read(2, (8,))])
    got = [row.array[0].copy() for row in rows]
    plain.prefill([5, 6, 7], want_logits=False)
    expected = plain.step([8])[0]
    assert differ(got[0], expected) > 1e-4
    assert differ(got[1], expected) == differ(got[2], expected) == 0
