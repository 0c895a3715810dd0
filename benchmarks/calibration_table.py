"""What a calibration text brings: int4 with codes that the weights alone decide, against codes that the built-in text decides.

    .venv/bin/python benchmarks/calibration_table.py [--only demo-dense] [--windows 16]

Three models: the demo checkpoints, over the held-out text of quantization_table.py, and a random one (correlated_model.py) over texts that
its fp32 bundle wrote, at temperature 1. The calibration text is that of the package: neither model was trained on it, and no window is of
it. Rows as in quantization_table.py; "build s" is the processor time of the build.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from correlated_model import write_model
from quantization_table import ROOT, Held, as_toml, held_out, print_table

from qwen_export import build
from qwen_export.runtimes import load

BODY = ("deltanet", "attention", "mlp", "experts", "shared_expert")
PLANS: dict[str, dict[str, Any]] = {
    "int4": {},
    "int4, zeros": {"zeros": True},
    "int4, block 128": {"block": 128},
}


def written(bundle: Path, windows: int, length: int) -> list[list[int]]:
    """Texts of the model itself."""
    decoder, rng, texts = load(bundle, threads=2, max_context=length).decoder(), np.random.default_rng(0), []
    for _ in range(windows):
        decoder.reset()
        ids = [int(rng.integers(decoder.prefill([0]).size))]
        decoder.reset()
        row = decoder.prefill(ids)
        while len(ids) < length:
            p = np.exp(row.astype(np.float64) - row.max())
            ids.append(int(rng.choice(len(p), p=p / p.sum())))
            row = np.array(decoder.step([ids[-1]])[0])
        texts.append(ids)
    return texts


def table(name: str, checkpoint: Path, work: Path, windows: int, length: int) -> None:
    bundle = build(checkpoint, work / "fp32", mtp=False)
    random = name == "correlated"
    held = Held(bundle, written(bundle, windows, length // 2) if random else held_out(bundle, windows, length))
    rows, seconds = [held.measure("fp32", bundle)], {}
    for title, keys in PLANS.items():
        file = work / "plan.toml"
        file.write_text(as_toml(dict.fromkeys(BODY, keys) if keys else {}))
        for calibrate in (None, "built-in"):
            full, started = title + (", calibrated" if calibrate else ""), time.process_time()
            made = build(checkpoint, work / "row", precision="int4", plan_file=file, mtp=False, calibrate=calibrate, force=True)
            seconds[full] = time.process_time() - started
            rows.append(held.measure(full, made))
    print(f"\n{name}: {windows} windows of {len(held.windows[0])} tokens\n")
    print_table(rows)
    print("\nbuild s: " + "; ".join(f"{title} {value:.0f}" for title, value in seconds.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("demo-dense", "demo-moe", "correlated"))
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    for name in ("demo-dense", "demo-moe", "correlated"):
        if options.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                work = Path(folder)
                checkpoint = write_model(work / "model") if name == "correlated" else ROOT / "examples" / name
                table(name, checkpoint, work, options.windows, options.length)


if __name__ == "__main__":
    main()
