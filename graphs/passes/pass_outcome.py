"""What a pass did to a graph, and why it left candidates as they were."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import onnx_ir as ir


class Skipped(NamedTuple):
    """A candidate that a pass left as it was."""

    node: str
    reason: str


@dataclass
class Outcome:
    """`changed` places were rewritten. `idle`: why the pass has nothing to do in this build, "" when it has."""

    changed: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    idle: str = ""

    @classmethod
    def nothing(cls, why: str) -> Outcome:
        """The pass does not apply to this build."""
        return cls(idle=why)

    def skip(self, node: ir.Node, reason: str) -> None:
        """Note why a candidate does not match. `reason` continues the sentence "NODE was left, because ..."."""
        made = ", ".join(value.name or "?" for value in node.outputs)
        self.skipped.append(Skipped(f"{node.domain + '.' if node.domain else ''}{node.op_type} -> {made}", reason))

    def lines(self) -> list[str]:
        """The outcome for a reader: one line, and one per candidate that was left."""
        done = f"changed {self.changed}" if self.changed or not self.idle else f"nothing to do: {self.idle}"
        return [done, *(f"left {node}: {reason}" for node, reason in self.skipped)]
