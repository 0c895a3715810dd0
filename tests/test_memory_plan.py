"""How the memory of an engine is divided, on a decoder that is nothing but sizes."""

from __future__ import annotations

from typing import cast

import pytest

from qwen_export.errors import ParameterError
from qwen_export.runtimes.decoding.decoder import Decoder
from qwen_export.runtimes.serving.memory_plan import PREFIX_MEMORY, plan_memory


class Sizes:
    """Four slots of 100 bytes each and 10 bytes a token, in steps of 8 tokens; drafts of up to 3."""

    batch, capacity, widest_verify, fixed_bytes = 4, 64, 4, 400

    def __init__(self, free: int | None = None) -> None:
        self.free_bytes = free

    @staticmethod
    def growing_bytes(length: int) -> int:
        return 80 * -(-length // 8)


def decoder(free: int | None = None) -> Decoder:
    return cast(Decoder, Sizes(free))


WHOLE = Sizes.growing_bytes(68)


def test_without_a_limit_all_slots_have_room_for_a_whole_context() -> None:
    plan = plan_memory(decoder(), None, None, prefix_apart=False)
    assert plan == (4 * WHOLE, PREFIX_MEMORY, 400 + 4 * WHOLE + PREFIX_MEMORY, 64)
    assert plan_memory(decoder(), None, 0, prefix_apart=True).limit == 400 + 4 * WHOLE


def test_a_gpu_with_little_memory_shortens_the_longest_text() -> None:
    plan = plan_memory(decoder(1000), None, 0, prefix_apart=True)
    assert plan.growing == 850 and plan.longest == 64
    plan = plan_memory(decoder(500), None, None, prefix_apart=True)
    assert Sizes.growing_bytes(plan.longest + 4) <= plan.growing == 425 < Sizes.growing_bytes(plan.longest + 5)


def test_a_limit_is_shared() -> None:
    limit = 400 + WHOLE + 1000
    assert plan_memory(decoder(), limit, 600, prefix_apart=False) == (WHOLE + 400, 600, limit, 64)
    assert plan_memory(decoder(), limit, None, prefix_apart=False).prefix == 500
    assert plan_memory(decoder(), limit, 600, prefix_apart=True) == (WHOLE + 1000, 600, limit, 64)


@pytest.mark.parametrize(
    ("limit", "prefix", "named"), [(399 + WHOLE, 0, "cache_memory"), (500 + WHOLE, 101, "prefix_memory"), (None, -1, "prefix_memory")]
)
def test_what_cannot_be_is_refused(limit: int | None, prefix: int, named: str) -> None:
    with pytest.raises(ParameterError) as error:
        plan_memory(decoder(), limit, prefix, prefix_apart=False)
    assert error.value.parameter == named
