"""Train one demo checkpoint: first the language model, then the MTP head on the frozen language model.

    python train.py lm  --model demo-dense --tokens build/tokens --run build/run --seconds 300
    python train.py mtp --model demo-dense --tokens build/tokens --run build/run --seconds 120

The budget is wall-clock time after compilation, and the learning rate follows the share of it that is used up. The state is saved every
`--save-every` seconds and a command that was stopped continues from there when it is run again.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from layers import load_config
from model import Qwen
from optim import make_optimizers, set_schedule, update
from torch import Tensor

ROWS_OF_EIGHT = {"code": 6, "docs": 1, "chat": 1}  # share of each stream in a batch


class TokenStream:
    """Non-overlapping windows of a token file in random order; every epoch starts at another offset."""

    def __init__(self, path: Path, length: int, device: torch.device, seed: int) -> None:
        self.ids = torch.from_numpy(np.load(path).astype(np.int32)).to(device)
        self.length, self.generator = length, torch.Generator().manual_seed(seed)
        self.starts: Tensor = torch.empty(0, dtype=torch.long)
        self.epochs = 0.0

    def rows(self, count: int) -> Tensor:
        """[count, length] int64."""
        while len(self.starts) < count:
            shift = int(torch.randint(self.length, (1,), generator=self.generator))
            starts = torch.arange(shift, len(self.ids) - self.length, self.length)
            self.starts = torch.cat((self.starts, starts[torch.randperm(len(starts), generator=self.generator)]))
        chosen, self.starts = self.starts[:count].to(self.ids.device), self.starts[count:]
        self.epochs += count * self.length / len(self.ids)
        return self.ids[chosen[:, None] + torch.arange(self.length, device=self.ids.device)].long()


class Batches:
    def __init__(self, tokens: Path, length: int, rows: int, device: torch.device, seed: int) -> None:
        self.counts = {name: rows * share // 8 for name, share in ROWS_OF_EIGHT.items()}
        self.streams = {name: TokenStream(tokens / f"{name}.train.npy", length, device, seed) for name in ROWS_OF_EIGHT}

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield torch.cat([self.streams[name].rows(count) for name, count in self.counts.items() if count])


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float().flatten(0, 1), targets.flatten())


def language_model_loss(net: Qwen, batch: Tensor, balance_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    _, hidden, balance = net.hidden(batch[:, :-1])
    loss = cross_entropy(hidden, net.model.embed_tokens.weight, batch[:, 1:])
    return loss + balance_weight * balance, {"loss": loss.detach(), "balance": balance.detach()}


def draft_loss(student: Tensor, weight: Tensor, teacher: Tensor, row_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Half cross-entropy with the teacher's argmax, half with its distribution, weighted per row; also the rate of equal argmax."""
    logits = F.linear(student, weight).float()
    log_q = logits.log_softmax(-1)
    best = teacher.argmax(-1)
    hard = -log_q.gather(-1, best[..., None])[..., 0]
    soft = -(teacher.float().softmax(-1) * log_q).sum(-1)
    agree = (logits.argmax(-1) == best).float()
    norm = row_weight.sum()
    return ((0.5 * hard + 0.5 * soft) * row_weight).sum() / norm, (agree * row_weight).sum() / norm


def mtp_loss(
    net: Qwen, batch: Tensor, post_norm: bool, steps: int = 3, seen: tuple[Tensor, Tensor, Tensor] | None = None, rows: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Distil the main model's next-token choices into the head, for `steps` chained drafts from every slot.

    `seen`: what stands for the tokens of a batch with pictures, and its angles (seeing.py). `rows` [B,T]: slots that count.

    A chain only ever continues the main model's own greedy text at run time, so a row whose tokens all equal the greedy ones counts four
    times as much as one that left the greedy path.
    """
    with torch.no_grad():
        x = net.model.embed_tokens(batch) if seen is None else seen[0]
        pre, post, _ = net.hidden(batch) if seen is None else net.hidden_of(*seen)
        teacher = net.logits(post)
        greedy = teacher.argmax(-1)
        n = batch.shape[1] - steps - 1
        embeddings = [x[:, 1 + s : 1 + s + n] for s in range(steps)]
        on_path = torch.ones_like(batch[:, :n], dtype=torch.bool)
        weight = torch.ones_like(batch[:, :n], dtype=torch.float32) if rows is None else rows[:, :n].float()
    outputs = net.mtp.chain(embeddings, (post if post_norm else pre)[:, :n], post_norm, None if seen is None else seen[1:])
    total = torch.zeros((), device=batch.device)
    logs: dict[str, Tensor] = {}
    for s, output in enumerate(outputs):
        on_path = on_path & (batch[:, 1 + s : 1 + s + n] == greedy[:, s : s + n])
        loss, agree = draft_loss(
            output, net.model.embed_tokens.weight, teacher[:, 1 + s : 1 + s + n], weight * (0.25 + 0.75 * on_path.float())
        )
        total = total + loss / steps
        logs[f"agree{s + 1}"] = agree.detach()
    return total, {"loss": total.detach(), **logs}


def run(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    name = args.name or args.phase
    directory: Path = args.run / args.model
    directory.mkdir(parents=True, exist_ok=True)
    state_path, final_path = directory / f"{name}.state.pt", directory / f"{name}.pt"
    if final_path.exists():
        print(f"{final_path} exists, nothing to do")
        return

    net = Qwen(load_config(args.model)).to(device)
    if args.phase == "mtp":
        net.load_state_dict(torch.load(directory / "lm.pt", map_location=device))
        net.requires_grad_(False)
        net.mtp.start_from(net.model.layers[-1], net.model.norm)
        net.mtp.requires_grad_(True)
        trained: torch.nn.Module = net.mtp
    else:
        net.mtp.requires_grad_(False)
        trained = net
    optimizers = make_optimizers(trained, args.muon_lr, args.adam_lr)
    saved: dict[str, Any] = {"elapsed": 0.0, "step": 0, "tokens": 0}
    if state_path.exists():
        saved = torch.load(state_path, map_location=device)
        net.load_state_dict(saved["net"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        print(f"continuing at step {saved['step']}, {saved['elapsed']:.0f} s")
    if args.compile:
        compile_parts(net)

    batches = iter(Batches(args.tokens, args.length + (args.phase == "lm"), args.rows, device, seed=saved["step"]))

    def forward(batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            if args.phase == "lm":
                return language_model_loss(net, batch, 0.01 if "num_experts" in net.config else 0.0)
            return mtp_loss(net, batch, args.hidden == "post")

    began = time.time()
    for _ in range(2):  # compilation and kernel tuning stay outside the budget
        forward(next(batches))[0].backward()
        trained.zero_grad(set_to_none=True)
    synchronize(device)
    print(f"warm-up {time.time() - began:.1f} s", flush=True)

    step, tokens, elapsed = saved["step"], saved["tokens"], saved["elapsed"]
    start = time.time() - elapsed
    last_save, last_log, progress = time.time(), (elapsed, tokens), elapsed / args.seconds
    log_path = directory / f"{name}.csv"
    with log_path.open("a" if step else "w", newline="") as handle:
        log = csv.writer(handle)
        while progress < 1.0 and (args.max_steps is None or step < args.max_steps):
            set_schedule(optimizers, step, progress)
            loss, logs = forward(next(batches))
            update(loss, trained.parameters(), optimizers)
            step += 1
            tokens += args.rows * args.length
            if step % args.log_every == 0:
                values = {k: float(v) for k, v in logs.items()}  # waits for the GPU, so the clock below is honest
                elapsed = time.time() - start
                progress = elapsed / args.seconds
                speed = (tokens - last_log[1]) / max(elapsed - last_log[0], 1e-9)
                last_log = (elapsed, tokens)
                if step == args.log_every and handle.tell() == 0:
                    log.writerow(["step", "tokens", "seconds", *values])
                log.writerow([step, tokens, f"{elapsed:.2f}", *(f"{v:.4f}" for v in values.values())])
                if step % (args.log_every * 5) == 0 or progress >= 1.0:
                    shown = " ".join(f"{k} {v:.4f}" for k, v in values.items())
                    print(
                        f"{name} step {step} {tokens / 1e6:.1f} M tokens {elapsed:.0f} s {speed / 1e3:.0f} k tokens/s {shown}", flush=True
                    )
                if time.time() - last_save > args.save_every:
                    handle.flush()
                    save_state(state_path, net, optimizers, elapsed, step, tokens)
                    last_save = time.time()
    # The exported weights are bf16; rounding here makes the head train against the model that is shipped.
    rounded = {k: v.to(torch.bfloat16).to(v.dtype) for k, v in net.state_dict().items()}
    torch.save(rounded, final_path)
    state_path.unlink(missing_ok=True)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    print(f"{name} done: {step} steps, {tokens / 1e6:.1f} M tokens, {time.time() - start:.0f} s, {peak:.1f} GiB", flush=True)


def compile_parts(net: Qwen) -> None:
    """Compile layer by layer: all layers of a kind share one graph."""
    for layer in net.model.layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False)
    net.mtp.chain = torch.compile(net.mtp.chain, dynamic=False)  # type: ignore[method-assign]
    for name in ("cross_entropy", "draft_loss"):
        globals()[name] = torch.compile(globals()[name], dynamic=False)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def save_state(path: Path, net: Qwen, optimizers: list[torch.optim.Optimizer], elapsed: float, step: int, tokens: int) -> None:
    """Written beside and renamed, so that a command killed while saving leaves the previous state."""
    state = {
        "net": net.state_dict(),
        "optimizers": [o.state_dict() for o in optimizers],
        "elapsed": elapsed,
        "step": step,
        "tokens": tokens,
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=["lm", "mtp"])
    parser.add_argument("--model", required=True, choices=["demo-dense", "demo-moe"])
    parser.add_argument("--tokens", type=Path, default=Path("build/tokens"))
    parser.add_argument("--run", type=Path, default=Path("build/run"))
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.004)
    parser.add_argument("--hidden", choices=["post", "pre"], default="post", help="which main-model hidden state the MTP head is fed")
    parser.add_argument("--name", help="name of the run's files; the phase unless given")
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--save-every", type=float, default=60.0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.length = args.length or (2048 if args.phase == "lm" else 1028)  # 1028: chains start at 1024 slots
    run(args)


if __name__ == "__main__":
    main()
