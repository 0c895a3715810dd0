"""The precision plan: in which format each group of matrices is stored.

`precision` "int8", "int4" and "fp8" name a plan; a TOML file overrides it per group, or per matrix:

    [mlp]
    format = "int4"         # int4, int8, fp8 (on CUDA: onnxruntime, tensorrt), or stored: as the checkpoint has it
    block = 64              # values of a row that share a scale: 32, 64, 128
    method = "search"       # rtn: rounding to nearest; search: the scale with the least squared error of each block; gptq: calibrated
    zeros = true            # a zero per block beside the scale
    keep = false            # also quantize again what the checkpoint stores as codes that could be kept (kept_grids.py)

    [matrices]
    "layers.0.mlp.*" = { format = "int8" }      # names of the modules, with * and ?

Norms, convolutions, decays and states are never quantized. Imports neither torch nor onnx.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_export.errors import ConfigError
from qwen_export.graphs.config_fields import shown
from qwen_export.graphs.quantization.packing import BLOCKS, QuantFormat
from qwen_export.graphs.quantization.scale_search import METHODS, NUMPY_SEARCH, ScaleSearch

if TYPE_CHECKING:
    from qwen_export.graphs.quantization.calibrated_codes import CalibratedCodes
    from qwen_export.graphs.weights.expression import Weight

STORED, INT8, INT4, FP8 = "stored", "int8", "int4", "fp8"
FORMATS = {STORED: 0, INT8: 8, INT4: 4, FP8: 8}
"""Bits of each format; 0: what the checkpoint stores."""

FP8_BLOCK, FP8_ROW = 128, 0
"""`GroupFormat.block` of fp8: so many rows and columns share a scale, or the values of a row."""

QUANTIZED = (INT8, INT4, FP8)
"""The values of `precision` that name a plan."""

GROUPS: dict[str, tuple[str, ...]] = {
    "in_proj_ab": ("*.linear_attn.in_proj_a.weight", "*.linear_attn.in_proj_b.weight", "*.linear_attn.in_proj_ba.weight"),
    "deltanet": ("*.linear_attn.in_proj_*.weight", "*.linear_attn.out_proj.weight"),
    "attention": ("*.self_attn.?_proj.weight",),
    "router": ("*.mlp.gate.weight", "*.mlp.shared_expert_gate.weight"),
    "shared_expert": ("*.mlp.shared_expert.*_proj.weight",),
    "experts": ("*.mlp.experts.*",),
    "mlp": ("*.mlp.gate_proj.weight", "*.mlp.up_proj.weight", "*.mlp.down_proj.weight"),
    "embedding": ("embed_tokens.weight",),
    "lm_head": ("lm_head.weight",),
    "mtp": ("mtp.*_proj.weight", "mtp.fc.weight", "mtp.*.mlp.experts.*"),
    "vision": ("visual.blocks.*.attn.*.weight", "visual.*.linear_fc?.weight"),
}
"""The groups, and the parameters of each: the first group that matches has it."""

GPTQ = "gptq"
"""The method whose codes are chosen with a text (gptq_codes.py)."""
CALIBRATED_GROUPS = ("in_proj_ab", "deltanet", "attention", "shared_expert", "experts", "mlp", "lm_head", "mtp")
"""The groups that may have it: products of activations that a text has."""

_MATRICES, _SET, KEPT = "matrices", "set ", "kept"
_EXPERT, _HALVES = re.compile(r"\.experts\.\d+\."), re.compile(r"\.(gate|up)_proj\.weight$")
_STORED_QUANTIZED = "stored quantized"
_HIGH = ("in_proj_ab", "router", "vision")
_SEE = "Correct the file that {plan_file} names; docs/quantization.md has an example."
_NEVER = {"router": "a changed choice of experts costs more than its bytes save"}


@dataclass(frozen=True)
class GroupFormat:
    """The format of a group. The other fields have no meaning where it is "stored". `keep`: matrices that the checkpoint stores as codes
    of no more bits stay as they are. The method "kept" is that of such a matrix; only these have `wide_scales`, which are fp32, and
    `scale_rows`: how many rows of fp8 codes share a scale."""

    format: str = STORED
    block: int = 32
    method: str = "rtn"
    zeros: bool = False
    keep: bool = True
    wide_scales: bool = False
    scale_rows: int = FP8_BLOCK
    search: ScaleSearch = field(default=NUMPY_SEARCH, compare=False, repr=False)
    """Who searches the scales, with the method "search"."""

    @property
    def quantized(self) -> bool:
        """Whether the matrix becomes codes of some kind."""
        return self.format != STORED

    @property
    def quant(self) -> QuantFormat | None:
        """Codes and scales of blocks, None for matrices that have none: they stay as they are, or are fp8."""
        return QuantFormat(FORMATS[self.format], self.block, self.zeros, self.wide_scales) if self.format in (INT8, INT4) else None

    @property
    def searcher(self) -> ScaleSearch:
        """Who searches, for the weight's expression: one name for all where nothing is searched."""
        return self.search if self.method in ("search", GPTQ) else NUMPY_SEARCH

    @property
    def given(self) -> bool:
        """Whether codes, scales and zeros are given with the weights: those of the checkpoint, or of a calibration."""
        return self.method in (KEPT, GPTQ)

    def with_keys(self, keys: Mapping[str, Any]) -> GroupFormat:
        """This format with some values replaced. Another number of bits brings the method that suits it, unless one is given."""
        base = self
        if keys.get("format", self.format) != self.format:
            base = replace(self, method="search" if keys["format"] == INT4 else "rtn")
        return replace(base, **keys)

    def __str__(self) -> str:
        again = "" if self.keep else " again"
        if self.quant is None:
            return f"{FP8} {FP8_BLOCK}x{FP8_BLOCK}{again}" if self.format == FP8 and self.block == FP8_BLOCK else self.format
        return f"{self.format} block {self.block} {self.method}{' zeros' if self.zeros else ''}{again}"

    @staticmethod
    def parse(text: str) -> GroupFormat:
        """The inverse of str()."""
        words = text.split()
        keep = not {"again", "anew"} & set(words)
        if words[0] == FP8:
            return GroupFormat(FP8, FP8_BLOCK if len(words) > 1 else FP8_ROW, keep=keep)
        if len(words) == 1:
            return GroupFormat(words[0])
        return GroupFormat(words[0], int(words[2]), words[3], "zeros" in words, keep)


@dataclass(frozen=True)
class PrecisionPlan:
    """The format of each group, and of single matrices by pattern."""

    groups: Mapping[str, GroupFormat]
    matrices: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What differs from the group, per pattern."""
    kept: Mapping[str, GroupFormat] = field(default_factory=dict)
    """Stored matrices that stay on the checkpoint's own grid (kept_grids.py)."""
    fp8_block: int = FP8_BLOCK
    """What shares a scale of an fp8 matrix: FP8_BLOCK or FP8_ROW, as the target has it."""
    outcome: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """For people: per group what becomes of the matrices that the checkpoint stores quantized, and of how many."""
    search: ScaleSearch = field(default=NUMPY_SEARCH, compare=False, repr=False)
    """Who searches the scales of the methods "search" and "gptq"."""
    codes: CalibratedCodes | None = field(default=None, compare=False, repr=False)
    """Those of the method "gptq", once there are any."""

    def of(self, name: str) -> GroupFormat:
        """The format of one stored matrix."""
        chosen = self.kept.get(name) or self._planned(name)
        return chosen if chosen.search is self.search else replace(chosen, search=self.search)

    def of_weight(self, weight: Weight) -> GroupFormat:
        """The format of a matrix of the graph, which is made of one or more stored ones.

        Raises ConfigError where these have different formats: a kernel reads the matrix in one."""
        formats = {self.of(name): name for name in weight.stored()}
        if len(formats) > 1:
            raise ConfigError(
                "a precision plan must give all parts of one matrix the same format",
                where=weight.parameter or ", ".join(sorted(set(formats.values()))[:4]),
                got="; ".join(f"{name}: {chosen}" for chosen, name in formats.items()),
                fix="Widen the pattern in [matrices] of {plan_file}, so that it names all of them.",
            )
        return next(iter(formats), GroupFormat())

    def _planned(self, name: str) -> GroupFormat:
        """The format of the parameter `name`; of several patterns that match, the last one counts."""
        group = group_of(name)
        if not group or group in _NEVER:
            return GroupFormat()
        chosen, called = self.groups[group], (name, parameter_of(name))
        for pattern, keys in self.matrices.items():
            if any(fnmatchcase(other, pattern) or fnmatchcase(other, f"{pattern}.weight") for other in called):
                chosen = self.groups[group].with_keys(keys)
        if chosen.format == FP8:
            return replace(chosen, block=self.fp8_block, method="rtn", zeros=False)
        if chosen.method == GPTQ and group not in CALIBRATED_GROUPS:
            return replace(chosen, method="search")
        return chosen

    @property
    def formats(self) -> set[str]:
        """The formats that groups or matrices have."""
        return {chosen.format for chosen in self.groups.values()} | {str(keys.get("format", STORED)) for keys in self.matrices.values()}

    def calibrated(self) -> PrecisionPlan:
        """This plan, in which a text chooses the codes of 4 bits that would be searched without one."""

        def changed(keys: Mapping[str, Any]) -> Mapping[str, Any]:
            return {**keys, "method": GPTQ} if keys.get("format") == INT4 and keys.get("method", "search") == "search" else keys

        groups = {
            name: replace(chosen, method=GPTQ)
            if name in CALIBRATED_GROUPS and chosen.format == INT4 and chosen.method == "search"
            else chosen
            for name, chosen in self.groups.items()
        }
        return replace(self, groups=groups, matrices={pattern: changed(keys) for pattern, keys in self.matrices.items()})

    def to_json(self) -> dict[str, str]:
        """For the manifest."""
        matrices = {pattern: f"{_SET}{json.dumps(dict(keys))}" for pattern, keys in self.matrices.items()}
        outcomes = {
            f"{group} {_STORED_QUANTIZED}": "; ".join(f"{count} {what}" for what, count in counts.items())
            for group, counts in self.outcome.items()
        }
        return {name: str(chosen) for name, chosen in self.groups.items()} | matrices | outcomes

    @staticmethod
    def keeps(entries: Mapping[str, str]) -> bool:
        """Whether the plan that `to_json` wrote keeps what checkpoints store."""
        return any(name.endswith(_STORED_QUANTIZED) and KEPT in text for name, text in entries.items())

    @staticmethod
    def from_json(entries: Mapping[str, str]) -> PrecisionPlan:
        """The inverse of `to_json`, but for what is kept; entries of other things are left out."""
        groups = {name: GroupFormat.parse(text) for name, text in entries.items() if name in GROUPS}
        matrices = {name: json.loads(text.removeprefix(_SET)) for name, text in entries.items() if text.startswith(_SET)}
        return PrecisionPlan(groups, matrices)


def group_of(name: str) -> str:
    """The group of a parameter, "" for one that is never quantized."""
    return _group_of(parameter_of(name))


def parameter_of(name: str) -> str:
    """The parameter that a stored matrix is part of: experts.7.up_proj.weight belongs to experts.gate_up_proj."""
    if ".experts." not in name:
        return name
    return _HALVES.sub(".gate_up_proj", _EXPERT.sub(".experts.", name)).removesuffix(".weight")


@cache
def _group_of(name: str) -> str:
    patterns = {group: GROUPS[group] for group in ("router", "mtp")} if name.startswith("mtp.") else GROUPS
    return next((group for group, globs in patterns.items() if any(fnmatchcase(name, glob) for glob in globs)), "")


def default_plan(precision: str) -> PrecisionPlan:
    """The plan that a value of --precision names. int4 leaves embedding and head, whose errors reach the logits directly, at 8 bits."""
    eight = GroupFormat(INT8, 32, "rtn")
    usual = {INT8: eight, INT4: GroupFormat(INT4, 32, "search"), FP8: GroupFormat(FP8, FP8_BLOCK)}[precision]
    ends = eight if precision != FP8 else usual
    high = dict.fromkeys(_HIGH, GroupFormat()) | dict.fromkeys(("embedding", "lm_head"), ends)
    return PrecisionPlan({group: high.get(group, usual) for group in GROUPS})


def load_plan(
    precision: str,
    file: Path | None,
    *,
    tied: bool,
    stored: Collection[str] = (),
    calibrated: bool = False,
    fp8_block: int = FP8_BLOCK,
) -> PrecisionPlan:
    """The named plan with the overrides of a TOML file. `tied`: the head is the embedding, and has its format. `stored`: groups that stay
    as they are unless the file has them. `calibrated`: with a text. `fp8_block`: what shares a scale of an fp8 matrix.

    Raises ConfigError with the key that is wrong."""
    plan = default_plan(precision)
    plan = replace(plan, groups={**plan.groups, **dict.fromkeys(stored, GroupFormat())})
    given = _read(file) if file is not None else {}
    plan = _overridden(plan, given, str(file))
    if tied and "lm_head" in given and plan.groups["lm_head"] != plan.groups["embedding"]:
        raise ConfigError(
            "the head of this checkpoint is its embedding, and a plan cannot give them two formats",
            where=str(file),
            got=str(plan.groups["lm_head"]),
            expected=str(plan.groups["embedding"]),
            fix="Set [embedding] alone.",
        )
    plan = plan.calibrated() if calibrated else plan
    groups = {name: replace(chosen, block=fp8_block) if chosen.format == FP8 else chosen for name, chosen in plan.groups.items()}
    return replace(plan, groups=groups | ({"lm_head": groups["embedding"]} if tied else {}), fp8_block=fp8_block)


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("the precision plan cannot be read", where=str(file), got=error.strerror, fix="Correct {plan_file}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("the precision plan is not TOML", where=str(file), got=str(error)[:200], fix=_SEE) from error


def _overridden(plan: PrecisionPlan, given: dict[str, Any], where: str) -> PrecisionPlan:
    groups, matrices = dict(plan.groups), dict(plan.matrices)
    for name, keys in given.items():
        if name == _MATRICES:
            for pattern, single in _table(keys, name, where).items():
                matrices[pattern] = _checked(_table(single, pattern, where), pattern, where)
        elif name in GROUPS:
            groups[name] = groups[name].with_keys(_checked(_table(keys, name, where), name, where))
        else:
            raise ConfigError(
                "the precision plan names no such group", where=where, got=shown(name), expected=", ".join([*GROUPS, _MATRICES]), fix=_SEE
            )
    for name in groups.keys() - {*CALIBRATED_GROUPS}:
        if groups[name].method == GPTQ:
            raise ConfigError(
                f"[{name}] cannot be calibrated",
                where=where,
                got=GPTQ,
                expected=", ".join(METHODS),
                fix="Set another method in {plan_file}.",
            )
    for name, reason in _NEVER.items():
        if groups[name].format != STORED:
            raise ConfigError(
                f"[{name}] is never quantized: {reason}",
                where=where,
                got=groups[name].format,
                expected=STORED,
                fix=f"Remove [{name}] from {{plan_file}}.",
            )
    return PrecisionPlan(groups, matrices)


def _table(value: Any, name: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"[{name}] of the precision plan is not a table", where=where, got=shown(value), fix=_SEE)
    return value


def _checked(keys: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    allowed: dict[str, Iterable[Any]] = {
        "format": FORMATS,
        "block": BLOCKS,
        "method": (*METHODS, GPTQ),
        "zeros": (True, False),
        "keep": (True, False),
    }
    for key, value in keys.items():
        if key not in allowed or not any(type(value) is type(option) and value == option for option in allowed[key]):
            expected = ", ".join(map(str, allowed.get(key, allowed)))
            raise ConfigError(
                f"[{name}] {key} of the precision plan cannot be used", where=where, got=shown(value), expected=expected, fix=_SEE
            )
    return keys


def as_table(plan: PrecisionPlan, sizes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Lines for people. `sizes`: per group parameters and bytes; groups that the model does not have are left out."""
    lines = [f"{'group':16} {'format':24} {'parameters':>14} {'MB':>9}"]
    for group, chosen in plan.groups.items():
        parameters, nbytes = sizes.get(group, (0, 0))
        if parameters:
            lines.append(f"{group:16} {chosen!s:24} {parameters:14,} {nbytes / 1e6:9.1f}")
            lines += [f"{'':16} of the checkpoint's: {count} {what}" for what, count in plan.outcome.get(group, {}).items()]
    lines += [f"{pattern}: {json.dumps(dict(keys))}" for pattern, keys in plan.matrices.items()]
    return lines
