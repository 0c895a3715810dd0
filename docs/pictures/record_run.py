"""Draws docs/pictures/run.svg: the commands of the quick start, with what they print, on the demo checkpoint.

python docs/pictures/record_run.py
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[2]
OUTPUT = Path(__file__).with_name("run.svg")
WIDTH = 112
COMMANDS = (
    ("build", "Qwen3.5-0.8B", "-o", "bundles/qwen"),
    ("verify", "bundles/qwen", "--reference", "Qwen3.5-0.8B"),
    ("check", "bundles/qwen"),
    ("run", "bundles/qwen", "def read_lines(path):", "--greedy", "--max-new-tokens", "48"),
)


def main() -> None:
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "demo-dense").symlink_to(ROOT / "examples" / "demo-dense")
        for command in COMMANDS:
            arguments = [word.replace("Qwen3.5-0.8B", "demo-dense") for word in command]
            shown = " ".join(f'"{word}"' if " " in word else word for word in arguments)
            console.print(Text.assemble(("$ ", "bold green"), (f"qwen-export {shown}", "bold")))
            done = subprocess.run([sys.executable, "-m", "qwen_export", *arguments], cwd=folder, capture_output=True, text=True, check=True)
            printed = done.stdout if command[0] != "build" else done.stderr.splitlines()[-2]
            console.print(Text(printed.rstrip("\n") + "\n"))
    # The template names fonts on a server; a picture in a document must not ask for anything.
    drawing = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="qwen-export"), flags=re.S)
    OUTPUT.write_text(drawing, encoding="utf-8")


if __name__ == "__main__":
    main()
