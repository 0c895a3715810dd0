"""Measure a trained model on the held-out files.

    python evaluate.py prompts --work build/corpus                                   # once: writes prompts.json, the ten fixed prompts
    python evaluate.py measure --model demo-dense --run build/run --tokens build/tokens --tokenizer build/tokenizer

`measure` writes results.json beside the weights: loss and bits per byte of each stream, per-position acceptance of greedy drafts, and
completions.

Acceptance of position j is conditional: the share of rounds in which draft j equals the main model's greedy token, among the rounds in
which drafts 1..j-1 did. Tokens per round at k drafts = 1 + a1 + a1*a2 + ... (the 1 is the token that the main model contributes itself).
"""

from __future__ import annotations

import argparse
import ast
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from layers import load_config
from model import Qwen
from tokenizer import read_jsonl
from tokenizers import Tokenizer
from torch import Tensor

DRAFTS = 3
PROMPTS = Path(__file__).parent / "prompts.json"


def write_prompts(work: Path) -> None:
    """From the first ten held-out files (in file order) that hold one: a top-level function with a docstring, cut after the docstring."""
    prompts = []
    for row in read_jsonl(work / "code.heldout.jsonl"):
        if "test" in row["path"]:
            continue
        lines = row["text"].split("\n")
        for node in ast.parse(row["text"]).body:
            if isinstance(node, ast.FunctionDef) and len(ast.get_docstring(node) or "") > 20 and len(node.body) > 2:
                text = "\n".join(lines[node.lineno - 1 : node.body[0].end_lineno]) + "\n"
                if len(text) < 800:
                    prompts.append({"source": row["source"], "path": row["path"], "prompt": text})
                    break
        if len(prompts) == 10:
            break
    PROMPTS.write_text(json.dumps(prompts, indent=1) + "\n")


@torch.no_grad()
def stream_loss(net: Qwen, ids: np.ndarray, text_bytes: int, length: int = 2048, rows: int = 16) -> dict[str, float]:
    """Mean loss in nats per token over consecutive windows of the whole stream, and bits per byte of its text."""
    device = net.model.embed_tokens.weight.device
    count = (len(ids) - 1) // length
    windows = torch.from_numpy(ids[: count * length + 1].astype(np.int64))
    total = 0.0
    for first in range(0, count, rows):
        last = min(first + rows, count)
        chunk = windows[first * length : last * length + 1].to(device)
        logits = net.logits(net.hidden(chunk[:-1].view(last - first, length))[1])
        total += float(F.cross_entropy(logits.float().flatten(0, 1), chunk[1:], reduction="sum"))
    loss = total / (count * length)
    return {"nats_per_token": loss, "bits_per_byte": loss * len(ids) / math.log(2) / text_bytes, "tokens": len(ids), "bytes": text_bytes}


@torch.no_grad()
def greedy(net: Qwen, ids: Tensor, lengths: Tensor, count: int) -> Tensor:
    """Append `count` greedy tokens to right-padded prompts. ids [B,T] with T >= max(lengths) + count; recomputes the prefix each step."""
    ids = ids.clone()
    row = torch.arange(len(ids), device=ids.device)
    for step in range(count):
        hidden = net.hidden(ids)[1][row, lengths + step - 1]
        ids[row, lengths + step] = net.logits(hidden).argmax(-1)
    return ids


def matches(net: Qwen, ids: Tensor, post_norm: bool) -> Tensor:
    """For chains from every slot i of ids [B,T]: does draft j equal token i+1+j? bool [B,N,DRAFTS], N = T - DRAFTS - 1."""
    pre, post, _ = net.hidden(ids)
    n = ids.shape[1] - DRAFTS - 1
    embeddings = [net.model.embed_tokens(ids[:, 1 + s : 1 + s + n]) for s in range(DRAFTS)]
    outputs = net.mtp.chain(embeddings, (post if post_norm else pre)[:, :n], post_norm)
    return torch.stack([net.logits(out).argmax(-1) == ids[:, 2 + s : 2 + s + n] for s, out in enumerate(outputs)], -1)


def rates(matched: Tensor) -> dict[str, Any]:
    """matched bool [R,DRAFTS], one row per round."""
    prefix = matched.cumprod(-1).float().mean(0).tolist()
    conditional = [b / a if a else 0.0 for a, b in zip([1.0, *prefix[:-1]], prefix, strict=True)]
    return {"acceptance": conditional, "all_accepted_up_to": prefix, "tokens_per_round": 1 + sum(prefix), "rounds": len(matched)}


@torch.no_grad()
def acceptance_on_text(
    net: Qwen, ids: np.ndarray, post_norm: bool, windows: int = 2048, length: int = 320, rows: int = 128
) -> dict[str, Any]:
    """One round at the end of each of `windows` held-out prefixes: the main model continues greedily, the head drafts from the prefix."""
    device = net.model.embed_tokens.weight.device
    starts = np.linspace(0, len(ids) - length - 1, windows).astype(int)
    results = []
    for first in range(0, windows, rows):
        batch = np.stack([ids[s : s + length] for s in starts[first : first + rows]]).astype(np.int64)
        padded = F.pad(torch.from_numpy(batch).to(device), (0, DRAFTS + 1))
        lengths = torch.full((len(batch),), length, device=device)
        results.append(matches(net, greedy(net, padded, lengths, DRAFTS + 1), post_norm)[:, -1])
    return rates(torch.cat(results))


@torch.no_grad()
def acceptance_decoding(net: Qwen, ids: np.ndarray, prompts: int = 64, length: int = 192, count: int = 128) -> dict[str, Any]:
    """Whole greedy decodes: rounds follow each other as at run time, each starting after the tokens of the last."""
    device = net.model.embed_tokens.weight.device
    starts = np.linspace(0, len(ids) - length - 1, prompts).astype(int)
    batch = torch.from_numpy(np.stack([ids[s : s + length] for s in starts]).astype(np.int64)).to(device)
    full = greedy(net, F.pad(batch, (0, count)), torch.full((prompts,), length, device=device), count)
    matched = matches(net, full, True).cpu()
    rounds = []
    for row in matched:
        slot = length - 1
        while slot < len(row):
            rounds.append(row[slot])
            slot += 1 + int(row[slot].cumprod(0).sum())
    return rates(torch.stack(rounds))


@torch.no_grad()
def complete(net: Qwen, tokenizer: Tokenizer, count: int = 96) -> list[dict[str, str]]:
    device = net.model.embed_tokens.weight.device
    prompts = json.loads(PROMPTS.read_text())
    encoded = [tokenizer.encode(p["prompt"], add_special_tokens=False).ids for p in prompts]
    width = max(map(len, encoded)) + count
    ids = torch.tensor([e + [0] * (width - len(e)) for e in encoded], device=device)
    lengths = torch.tensor([len(e) for e in encoded], device=device)
    out = greedy(net, ids, lengths, count).tolist()
    stop = tokenizer.token_to_id("<|endoftext|>")
    completions = []
    for prompt, row, length in zip(prompts, out, lengths.tolist(), strict=True):
        new = row[length : length + count]
        new = new[: new.index(stop)] if stop in new else new
        completions.append({**prompt, "completion": tokenizer.decode(new, skip_special_tokens=False)})
    return completions


def load(run: Path, model: str, name: str, device: str) -> Qwen:
    net = Qwen(load_config(model))
    state = torch.load(run / model / f"{name}.pt", map_location="cpu")
    net.load_state_dict({k: v.float() for k, v in state.items()})
    return net.to(device).eval()


def measure(args: argparse.Namespace) -> None:
    net = load(args.run, args.model, "mtp", args.device)
    sizes = json.loads((args.tokens / "sizes.json").read_text())
    heldout = {name: np.load(args.tokens / f"{name}.heldout.npy") for name in ("code", "docs", "chat")}
    results: dict[str, Any] = {"loss": {n: stream_loss(net, ids, sizes[f"{n}.heldout"]["bytes"]) for n, ids in heldout.items()}}
    results["acceptance"] = {
        "held-out code": acceptance_on_text(net, heldout["code"], True, args.windows),
        "held-out code, greedy decoding": acceptance_decoding(net, heldout["code"]),
        "held-out code, same head fed the pre-norm hidden": acceptance_on_text(net, heldout["code"], False, args.windows),
    }
    for label, name in (("short run, head fed the post-norm hidden", "mtp-short"), ("short run, head fed the pre-norm hidden", "mtp-pre")):
        if (args.run / args.model / f"{name}.pt").exists():
            variant = load(args.run, args.model, name, args.device)
            results["acceptance"][label] = acceptance_on_text(variant, heldout["code"], name != "mtp-pre", args.windows)
    results["completions"] = complete(net, Tokenizer.from_file(str(args.tokenizer / "tokenizer.json")))
    (args.run / args.model / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for name, row in results["loss"].items():
        print(f"{args.model} {name}: {row['nats_per_token']:.4f} nats/token, {row['bits_per_byte']:.4f} bits/byte")
    for name, row in results["acceptance"].items():
        shown = " ".join(f"{100 * a:.1f}" for a in row["acceptance"])
        print(f"{args.model} {name}: acceptance {shown} %, {row['tokens_per_round']:.2f} tokens per round")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["prompts", "measure"])
    parser.add_argument("--work", type=Path, default=Path("build/corpus"))
    parser.add_argument("--model", choices=["demo-dense", "demo-moe"], default="demo-dense")
    parser.add_argument("--run", type=Path, default=Path("build/run"))
    parser.add_argument("--tokens", type=Path, default=Path("build/tokens"))
    parser.add_argument("--tokenizer", type=Path, default=Path("build/tokenizer"))
    parser.add_argument("--windows", type=int, default=2048)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.step == "prompts":
        write_prompts(args.work)
    else:
        measure(args)


if __name__ == "__main__":
    main()
