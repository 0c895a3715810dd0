"""Draw the loss curves and the acceptance curves of finished runs: python plot.py --run build/run --out curves.png"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read(path: Path) -> dict[str, np.ndarray]:
    with path.open() as handle:
        rows = list(csv.DictReader(handle))
    return {key: np.array([float(row[key]) for row in rows]) for key in rows[0]}


def smooth(values: np.ndarray, width: int = 9) -> np.ndarray:
    padded = np.concatenate((np.full(width // 2, values[0]), values, np.full(width // 2, values[-1])))
    return np.convolve(padded, np.ones(width) / width, "valid")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("build/run"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "curves.png")
    args = parser.parse_args()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for color, model in (("tab:blue", "demo-dense"), ("tab:orange", "demo-moe")):
        lm, mtp = read(args.run / model / "lm.csv"), read(args.run / model / "mtp.csv")
        left.plot(lm["tokens"] / 1e6, smooth(lm["loss"]), color=color, label=model)
        for step, style in ((1, "-"), (2, "--"), (3, ":")):
            right.plot(mtp["tokens"] / 1e6, 100 * smooth(mtp[f"agree{step}"]), style, color=color, label=f"{model}, draft {step}")
    left.set(xlabel="million tokens", ylabel="training loss, nats per token", ylim=(1.0, 4.0), title="Language model")
    right.set(xlabel="million tokens", ylabel="drafts equal to the main model's choice, %", title="MTP head (training text, weighted rows)")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
