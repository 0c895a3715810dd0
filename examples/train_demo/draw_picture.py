"""Draw the picture that `make demo` shows, at three times the size at which the model sees it.

python draw_picture.py ../picture.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from scenes import COLORS, Canvas

ANSWER = "A red star on the left and a blue circle on the right."
"""What the model is to say about it."""


def draw(path: Path) -> None:
    canvas = Canvas(96, 96, (255, 255, 255))
    canvas.shape("star", COLORS["red"], (25, 44), 13)
    canvas.shape("circle", COLORS["blue"], (71, 52), 12)
    canvas.image.quantize(32).save(path, optimize=True)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
