"""What quantization costs: held-out perplexity and KL of the demo checkpoint per precision plan, and per group of matrices.

    .venv/bin/python benchmarks/quantization_table.py [--checkpoint examples/demo-dense] [--windows 16] [--plot docs/quantization.png]

Every row is a bundle, built and run as users do. The text is Python that no package of the training corpus holds: the training scripts of
this repository, cut into windows that are read from an empty state. KL is that of the row's distribution from the fp32 bundle's, mean over
tokens. The interval of the perplexity change is one standard error over windows, of the paired difference.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_export import build
from qwen_export.graphs.quantization.precision_plan import GROUPS
from qwen_export.manifest import WEIGHTS, load_manifest
from qwen_export.runtimes import load

ROOT = Path(__file__).resolve().parent.parent
TEXT = [*sorted((ROOT / "examples" / "train_demo").glob("*.py")), ROOT / "tests" / "data" / "held_out.py.txt"]

Logits = npt.NDArray[np.float64]
Overrides = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One bundle. `change` and `error` are of the perplexity, in per cent of that in fp32; `weights` are bytes."""

    name: str
    weights: int
    perplexity: float
    change: float
    error: float
    kl: float
    same_token: float


def log_softmax(logits: npt.NDArray[np.float32]) -> Logits:
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def held_out(bundle: Path, windows: int, length: int) -> list[list[int]]:
    """Windows of the text."""
    tokenizer = load(bundle, threads=2).tokenizer
    ids = tokenizer.encode("\n".join(path.read_text(encoding="utf-8") for path in TEXT))
    return [ids[start : start + length] for start in np.linspace(0, len(ids) - length, windows).astype(int)]


class Held:
    """Windows of tokens, and what the fp32 bundle says of them."""

    def __init__(self, bundle: Path, windows: list[list[int]]) -> None:
        self.windows, self.bundle = windows, bundle

    def measure(self, name: str, bundle: Path) -> Row:
        """Both bundles over all windows."""
        ours, reference = (load(path, threads=2, max_context=len(self.windows[0])).decoder() for path in (bundle, self.bundle))
        losses, base, kl, same = [], [], [], []
        for ids in self.windows:
            rows = []
            for decoder in (ours, reference):
                decoder.reset()
                rows.append(log_softmax(decoder.read(ids).copy()[:-1]))
            p, q = rows[1], rows[0]
            target = np.arange(len(ids) - 1), ids[1:]
            losses.append(-q[target].mean())
            base.append(-p[target].mean())
            kl.append((np.exp(p) * (p - q)).sum(axis=1).mean())
            same.append((p.argmax(axis=1) == q.argmax(axis=1)).mean())
        difference = np.array(losses) - np.array(base)
        weights = load_manifest(bundle).files[WEIGHTS].size
        change, error = np.expm1(difference.mean()), difference.std(ddof=1) / len(difference) ** 0.5
        return Row(name, weights, float(np.exp(np.mean(losses))), 100 * change, 100 * error, float(np.mean(kl)), float(np.mean(same)))


def stored_but(groups: dict[str, dict[str, Any]]) -> Overrides:
    """Everything as the checkpoint stores it, except these groups."""
    return {group: groups.get(group, {"format": "stored"}) for group in GROUPS if group != "router"}


def plans(moe: bool) -> dict[str, tuple[str, Overrides]]:
    """Name -> --precision and the overrides of the plan file."""
    everything = [group for group in GROUPS if group not in ("router", "in_proj_ab")]
    four = {"format": "int4", "block": 32, "method": "search"}
    rows: dict[str, tuple[str, Overrides]] = {
        "int8 (default)": ("int8", {}),
        "int8, block 128": ("int8", {group: {"block": 128} for group in everything}),
        "int4 (default)": ("int4", {}),
        "int4, rounding to nearest": ("int4", {group: {"method": "rtn"} for group in everything}),
        "int4, block 64": ("int4", {group: {"block": 64} for group in everything if group not in ("embedding", "lm_head")}),
        "int4, block 128": ("int4", {group: {"block": 128} for group in everything if group not in ("embedding", "lm_head")}),
        "int4, zeros": ("int4", {group: {"zeros": True} for group in everything if group not in ("embedding", "lm_head")}),
        "int4, embedding and head too": ("int4", dict.fromkeys(("embedding", "lm_head"), four)),
        "int4, in_proj_ab too": ("int4", {"in_proj_ab": four}),
        "int4, down_proj in int8": ("int4", {"matrices": {"*.down_proj": {"format": "int8"}}}),
    }
    for group in (*everything, "in_proj_ab"):
        single = {"embedding": four, "lm_head": four} if group in ("embedding", "lm_head") else {group: four}
        rows[f"only {'embedding = head' if group == 'embedding' else group} in int4"] = ("int4", stored_but(single))
    absent = {"lm_head", "mtp"} | ({"mlp"} if moe else {"experts", "shared_expert"})
    return {name: row for name, row in rows.items() if name.removeprefix("only ").removesuffix(" in int4") not in absent}


def as_toml(overrides: Overrides) -> str:
    def value(given: Any) -> str:
        if isinstance(given, dict):
            return "{ " + ", ".join(f"{k} = {value(v)}" for k, v in given.items()) + " }"
        return json.dumps(given)

    lines = []
    for group, keys in overrides.items():
        lines += [f"[{group}]", *(f"{json.dumps(key)} = {value(given)}" for key, given in keys.items())]
    return "\n".join(lines)


def print_table(rows: list[Row]) -> None:
    print(f"| {'plan':30} | weights MB | perplexity | change %       | KL        | same token % |")
    print(f"| {'-' * 30} | ---------- | ---------- | -------------- | --------- | ------------ |")
    for row in rows:
        change, same = f"{row.change:+.2f} ± {row.error:.2f}", 100 * row.same_token
        print(f"| {row.name:30} | {row.weights / 1e6:10.2f} | {row.perplexity:10.3f} | {change:14} | {row.kl:9.2e} | {same:12.1f} |")


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5))
    for row in rows:
        only = row.name.startswith("only")
        axis.errorbar(row.weights / 1e6, row.change, yerr=row.error, fmt="s" if only else "o", color="tab:gray" if only else "tab:blue")
        axis.annotate(row.name, (row.weights / 1e6, row.change), xytext=(5, 4), textcoords="offset points", fontsize=7)
    axis.set_xlabel("weights, MB")
    axis.set_ylabel("change of the held-out perplexity, %")
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "examples" / "demo-dense")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--only", help="rows whose name contains this")
    parser.add_argument("--plot", type=Path, help="write the picture here")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()

    moe = "num_experts" in json.loads((options.checkpoint / "config.json").read_text())
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        bundle = build(options.checkpoint, work / "fp32", mtp=False)
        held = Held(bundle, held_out(bundle, options.windows, options.length))
        rows = [held.measure("fp32", work / "fp32")]
        for number, (title, (precision, overrides)) in enumerate(plans(moe).items()):
            if options.only and options.only not in title:
                continue
            file = work / f"{number}.toml"
            file.write_text(as_toml(overrides))
            bundle = build(options.checkpoint, work / str(number), precision=precision, plan_file=file, mtp=False)
            rows.append(held.measure(title, bundle))
    print(f"{options.checkpoint.name}: {options.windows} windows of {options.length} tokens\n")
    print_table(rows)
    if options.plot:
        plot(rows, options.plot)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
