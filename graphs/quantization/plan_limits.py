"""Formats in a precision plan that the kernels of a target do not have, decided from names and shapes before any work."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from qwen_export.errors import ConfigError
from qwen_export.graphs.quantization.precision_plan import INT4, GroupFormat, PrecisionPlan, parameter_of

_CHANGE = 'give it another block, or format = "stored", in a precision plan'


def standard_reasons(plan: PrecisionPlan, tensors: Iterable[tuple[str, tuple[int, ...]]], *, engines: bool) -> list[str]:
    """Why matrices cannot be quantized as the plan says on targets with standard operators, which take whole blocks; with `engines` an
    even number of rows too. `tensors` are names and shapes of the stored matrices."""
    reasons = []
    for name, shape in tensors:
        chosen = plan.of(name)
        if chosen.quant is None or len(shape) not in (2, 3):
            continue
        if shape[-1] % chosen.block:
            reasons.append(f"{name} has rows of {shape[-1]} values, which are not whole blocks of {chosen.block}: {_CHANGE}")
        elif engines and chosen.format == INT4 and shape[0] % 2:
            reasons.append(f"{name} has {shape[0]} rows, and engines need an even number in int4: {_CHANGE}")
        elif not engines and name == "embed_tokens.weight" and chosen.format == INT4:
            reasons.append(
                'the embedding cannot have 4 bits with standard operators: set format = "int8" for [embedding] in a precision plan'
            )
    return reasons[:4] + ([f"{len(reasons) - 4} more matrices"] if len(reasons) > 4 else [])


def check_one_format(plan: PrecisionPlan, names: Iterable[str]) -> None:
    """Raise ConfigError where the stored matrices of one parameter, which are those of single experts, have different formats."""
    members: dict[str, dict[GroupFormat, str]] = defaultdict(dict)
    for name in names:
        members[parameter_of(name)].setdefault(plan.of(name), name)
    for parameter, formats in members.items():
        if len(formats) > 1:
            raise ConfigError(
                "a precision plan must give all parts of one matrix the same format",
                where=parameter,
                got="; ".join(f"{name}: {chosen}" for chosen, name in formats.items()),
                fix="Widen the pattern in [matrices] of {plan_file}, so that it names all of them.",
            )
