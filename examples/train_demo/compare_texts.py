"""What learning to see cost the text: loss on held-out text and acceptance of drafts, of two checkpoints side by side.

python compare_texts.py ../demo-dense ../demo-vision --tokens build/tokens
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from evaluate import acceptance_on_text, stream_loss
from layers import load_config
from model import Qwen
from train_sight import start_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--tokens", type=Path, default=Path("build/tokens"))
    parser.add_argument("--windows", type=int, default=512, help="prefixes after which drafts are made")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    sizes = json.loads((args.tokens / "sizes.json").read_text())
    rows: dict[str, list[str]] = {}
    for directory in args.checkpoints:
        net = Qwen(load_config("demo-dense")).to(args.device).eval()
        net.load_state_dict(start_of(directory))
        for name in ("code", "docs", "chat"):
            ids = np.load(args.tokens / f"{name}.heldout.npy")
            length = min(2048, len(ids) - 1)
            loss = stream_loss(net, ids, sizes[f"{name}.heldout"]["bytes"], length, 4)
            rows.setdefault(f"{name}, nats per token ({len(ids)} tokens)", []).append(f"{loss['nats_per_token']:.3f}")
        ids = np.load(args.tokens / "code.heldout.npy")
        drafts = acceptance_on_text(net, ids, True, args.windows, rows=32)
        for j, rate in enumerate(drafts["acceptance"], 1):
            rows.setdefault(f"draft {j} accepted, percent", []).append(f"{100 * rate:.1f}")
        rows.setdefault("tokens per round at k = 3", []).append(f"{drafts['tokens_per_round']:.2f}")
    print("| held out | " + " | ".join(directory.name for directory in args.checkpoints) + " |")
    print("|---|" + "---|" * len(args.checkpoints))
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(values) + " |")


if __name__ == "__main__":
    main()
