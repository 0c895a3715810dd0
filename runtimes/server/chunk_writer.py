"""How streams of chunks end: the same in /v1/chat/completions and /v1/completions."""

from __future__ import annotations

from qwen_export.runtimes.server.answer_choices import Choices
from qwen_export.runtimes.server.wire_errors import Refusal
from qwen_export.runtimes.server.wire_json import DONE, data_line, dump


class ChunkWriter:
    """`_head`: how every chunk begins; with `_usage` a last chunk has the tokens of all choices."""

    _choices: Choices
    _head: str
    _usage: bool

    def end(self) -> bytes:
        if not self._usage:
            return DONE
        return f'{self._head}"choices": [], "usage": {dump(self._choices.usage.openai())}}}\n\n'.encode() + DONE

    def error(self, refusal: Refusal) -> bytes:
        return data_line(refusal.openai()) + DONE
