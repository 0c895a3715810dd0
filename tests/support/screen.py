"""A program in a terminal, and what a person sees there: a pseudo terminal behind a terminal emulator."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import TracebackType

import pexpect
import pyte

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60


class Terminal:
    """Runs `qwen-export ARGUMENTS` on a screen of `rows` lines. A context manager: the program is gone afterwards."""

    def __init__(self, *arguments: str | Path, rows: int = 24, columns: int = 160, **environment: str) -> None:
        self._screen = pyte.HistoryScreen(columns, rows, history=2000)
        self._stream = pyte.ByteStream(self._screen)
        # The program asks where the cursor is, and a terminal answers.
        self._screen.write_process_input = lambda data: self.press(data)  # type: ignore[method-assign]
        self.process = pexpect.spawn(
            sys.executable,
            ["-m", "qwen_export", *map(str, arguments)],
            dimensions=(rows, columns),
            env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"} | environment,
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.close(force=True)

    def press(self, keys: str) -> None:
        self.process.send(keys)

    def text(self) -> str:
        """Everything that was shown, what has been scrolled out of sight included."""
        above = ["".join(line[x].data for x in range(self._screen.columns)) for line in self._screen.history.top]
        return "\n".join(line.rstrip() for line in [*above, *self._screen.display]).rstrip()

    def until(self, *texts: str, count: int = 1) -> str:
        """Wait until each of the texts was shown `count` times; returns everything shown."""
        for _ in range(PATIENCE_S * 20):
            shown = self.text()
            if all(shown.count(text) >= count for text in texts):
                return shown
            if not self._read():
                break
        shown = self.text()
        assert all(shown.count(text) >= count for text in texts), f"{texts} not in:\n{shown}"
        return shown

    def leaves(self) -> int:
        """Press Ctrl-D, as `ends`: again where it came before the program read keys, which a terminal drops."""
        for _ in range(PATIENCE_S):
            self.press("\x04")
            if not all(self._read() for _ in range(20)):
                break
        return self.ends()

    def ends(self) -> int:
        """Wait until the program has ended; returns its exit code, or minus the signal."""
        for _ in range(PATIENCE_S * 20):
            if not self._read():
                break
        else:
            raise AssertionError(f"the program goes on after {PATIENCE_S} s:\n{self.text()}")
        self.process.wait()
        self.process.close()
        return self.process.exitstatus if self.process.exitstatus is not None else -self.process.signalstatus

    def _read(self) -> bool:
        try:
            self._stream.feed(self.process.read_nonblocking(4096, timeout=0.05))
        except pexpect.TIMEOUT:
            time.sleep(0)
        except pexpect.EOF:
            return False
        return True
