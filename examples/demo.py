"""What `make demo` runs: build the small model that comes with the project, prove the build, complete a function, answer a question, and
describe a picture if the model sees.

python examples/demo.py [CHECKPOINT] [BUNDLE]
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT, BUNDLE = ROOT / "examples" / "demo-vision", ROOT / "bundles" / "demo-vision"

FUNCTION = '''import os


def read_lines(path):
    """Return the lines of the file at path, without their line ends."""
'''
PICTURE = ROOT / "examples" / "picture.png"
QUESTION = "What does the function os.path.join do?"


def main() -> None:
    checkpoint = sys.argv[1] if len(sys.argv) > 1 else str(CHECKPOINT)
    bundle = sys.argv[2] if len(sys.argv) > 2 else str(BUNDLE)
    step("inspect", checkpoint)
    step("build", checkpoint, "-o", bundle, "--force")
    step("verify", bundle, "--reference", checkpoint)
    step("check", bundle)
    print(FUNCTION, end="", flush=True)
    step("run", bundle, FUNCTION, "--greedy", "--max-new-tokens", "64")
    step("run", bundle, QUESTION, "--no-thinking", "--greedy", "--max-new-tokens", "64")
    if "vision_config" in json.loads((Path(checkpoint) / "config.json").read_text()):
        step("run", bundle, "What do you see?", "--image", str(PICTURE), "--no-thinking", "--greedy", "--max-new-tokens", "64")


def step(*arguments: str) -> None:
    """One command of the command line, shown as a user would type it."""
    shown = [repr(a) if "\n" in a or " " in a else a for a in arguments]
    print(f"\n$ qwen-export {' '.join(shown)}", flush=True)
    subprocess.run([sys.executable, "-m", "qwen_export", *arguments], check=True)


if __name__ == "__main__":
    main()
