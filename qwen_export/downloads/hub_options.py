"""Names of models on a hub, and how to get them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

HUBS = ("huggingface", "modelscope")
_NAME = re.compile(r"(?P<model>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<file>[\w.-]+))?")


@dataclass(frozen=True)
class HubOptions:
    """`revision`: a branch, tag or commit, None for the newest; `offline`: only what is in the hub's cache. Cache, token and address of the
    hub are those of its own environment variables and login."""

    hub: str = "huggingface"
    revision: str | None = None
    offline: bool = False
    bars: bool = True
    """Progress on stderr, as the hub's own library shows it."""


ONLINE = HubOptions()


@dataclass(frozen=True)
class HubName:
    """`file`: of a repository with several GGUF models, a part of the name of one, such as Q8_0."""

    model: str
    file: str = ""

    def __str__(self) -> str:
        return f"{self.model}:{self.file}" if self.file else self.model


def hub_name(checkpoint: str | Path) -> HubName | None:
    """The model that a checkpoint names; None for a path. A file or directory of that name wins."""
    if Path(checkpoint).exists():
        return None
    text = checkpoint.as_posix() if isinstance(checkpoint, Path) else checkpoint
    found = _NAME.fullmatch(text)
    return HubName(found["model"], found["file"] or "") if found else None
