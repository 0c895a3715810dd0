"""Teach a trained text model to see, and keep its text as it is.

    python train_sight.py joint --start ../demo-dense --tokens build/tokens --run build/run/demo-vision --seconds 240
    python train_sight.py mtp   --tokens build/tokens --run build/run/demo-vision --seconds 60

`joint` starts from a text checkpoint and a tower (train_tower.py). Each step learns the answers of conversations about drawn pictures, and
every `--text-every` steps the distribution that the starting checkpoint gives on text windows: it can only drift where that costs nothing.
`mtp` then trains the draft head on the frozen result, on texts and on conversations.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from model import Qwen
from optim import make_optimizers, set_schedule, update
from picture_chats import PictureBatch, PictureBatches, open_writer
from picture_marks import EVERYTHING, HELD_OUT, ONE_SHAPE, Subjects, family_config
from safetensors.torch import load_file
from seeing import SeeingQwen
from torch import Tensor, nn
from train import Batches, mtp_loss
from train_tower import TOKENIZER, Drawn, MarkHead, in_workers

MARKS = 0.1
"""Weight of the tower's own labels beside the answers: keeps it from forgetting what no question of a batch asks for."""


def moved(batch: PictureBatch, device: torch.device) -> PictureBatch:
    drawn = Drawn(batch.drawn.size, *(tensor.to(device, non_blocking=True) for tensor in batch.drawn[1:]))
    return PictureBatch(*(tensor.to(device, non_blocking=True) for tensor in batch[:3]), drawn)


def answer_loss(net: SeeingQwen, batch: PictureBatch, head: MarkHead | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of what the assistant writes, and of the marks; the share of turns' tokens that are the most likely ones."""
    features = net.features(batch.drawn)
    hidden = net.hidden_of(*net.seen(batch, features))[1]
    wanted = batch.learned[:, 1:]
    logits, targets = net.logits(hidden[:, :-1][wanted]).float(), batch.ids[:, 1:][wanted]
    answers = F.cross_entropy(logits, targets)
    right = (logits.argmax(-1) == targets).float().mean()
    if head is None:
        return answers, {"answers": answers.detach(), "right": right}
    marks, rates = head.loss(features, batch.drawn)
    return answers + MARKS * marks, {
        "answers": answers.detach(),
        "right": right,
        "marks": marks.detach(),
        "characters": rates["characters"],
    }


def text_loss(net: Qwen, teacher: Qwen, ids: Tensor) -> Tensor:
    """Divergence of the teacher's next-token distributions from the model's, in nats per token. ids [B,T]."""
    with torch.no_grad():
        wanted = teacher.logits(teacher.hidden(ids)[1]).float().log_softmax(-1)
    given = net.logits(net.hidden(ids)[1]).float().log_softmax(-1)
    return F.kl_div(given.flatten(0, 1), wanted.flatten(0, 1), log_target=True, reduction="batchmean")


@torch.no_grad()
def held_out(net: SeeingQwen, batches: list[PictureBatch]) -> dict[str, float]:
    results = [answer_loss(net, batch, None)[1] for batch in batches]
    return {name: float(torch.stack([one[name] for one in results]).mean()) for name in results[0]}


class Log:
    """Rows of one CSV file, shown as they are written."""

    def __init__(self, path: Path) -> None:
        self.path, self.start, self.names = path, time.time(), list[str]()

    def write(self, step: int, values: dict[str, Any]) -> None:
        row = {"step": step, "seconds": round(time.time() - self.start, 1), **{name: round(float(v), 4) for name, v in values.items()}}
        with self.path.open("a" if self.names else "w", newline="") as handle:
            writer = csv.DictWriter(handle, self.names or list(row), extrasaction="ignore")
            if not self.names:
                self.names = list(row)
                writer.writeheader()
            writer.writerow(row)
        print(f"{self.path.stem} " + " ".join(f"{name} {value}" for name, value in row.items()), flush=True)


def start_of(directory: Path) -> dict[str, Tensor]:
    """The text model and head of a checkpoint, with the names of Qwen."""
    stored = {name: value.float() for file in sorted(directory.glob("*.safetensors")) for name, value in load_file(file).items()}
    return {name.replace("model.language_model.", "model."): value for name, value in stored.items() if ".visual." not in name}


def save(path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").rename(path)


def rounded(net: nn.Module) -> dict[str, Tensor]:
    """The exported weights are bf16; what follows is trained and measured on those."""
    return {name: value.to(torch.bfloat16).to(value.dtype) for name, value in net.state_dict().items()}


def train_joint(args: argparse.Namespace, device: torch.device) -> None:
    net = SeeingQwen(family_config())
    head = MarkHead(family_config()["text_config"]["hidden_size"])
    teacher = Qwen(family_config()["text_config"])
    teacher.load_state_dict(start_of(args.teacher))
    net.load_state_dict(start_of(args.start), strict=False)
    tower = torch.load(args.run / "tower.pt", map_location="cpu")
    net.visual.load_state_dict({name.removeprefix("tower."): value for name, value in tower.items() if name.startswith("tower.")})
    head.load_state_dict({name.removeprefix("head."): value for name, value in tower.items() if name.startswith("head.")})
    net, head, teacher = net.to(device), head.to(device), teacher.to(device).requires_grad_(False)
    net.mtp.requires_grad_(False)
    optimizers = make_optimizers(net.model, args.muon_lr, args.adam_lr)
    optimizers += make_optimizers(nn.ModuleDict({"visual": net.visual, "head": head}), args.tower_muon_lr, args.tower_adam_lr)
    pictures, texts = picture_batches(args), iter(Batches(args.tokens, args.length, args.text_rows, device, seed=0))
    drawer = PictureBatches(TOKENIZER, args.rows, subjects(args))
    writer = open_writer(TOKENIZER)
    measured = [moved(drawer.made(HELD_OUT // args.rows + i, writer), device) for i in range(args.held_out)]
    log, step, progress, last = Log(args.run / "joint.csv"), 0, 0.0, time.time()
    text = torch.zeros((), device=device)
    while progress < 1:
        set_schedule(optimizers, step, progress, args.warmup)
        with torch.autocast(device.type, torch.bfloat16):
            loss, values = answer_loss(net, moved(next(pictures), device), head)
            if step % args.text_every == 0:
                text = text_loss(net, teacher, next(texts))
                loss = loss + args.text_weight * text
        update(loss, [*net.parameters(), *head.parameters()], optimizers)
        step += 1
        progress = (time.time() - log.start) / args.seconds
        if step % args.log_every == 0 or progress >= 1:
            with torch.autocast(device.type, torch.bfloat16):
                new = {f"new_{name}": value for name, value in held_out(net, measured).items()}
            log.write(step, {**values, **new, "text": text.detach()})
            progress = (time.time() - log.start) / args.seconds
        if time.time() - last > args.save_every or progress >= 1:
            save(args.run / "joint.pt", rounded(net))
            last = time.time()


def subjects(args: argparse.Namespace) -> Subjects:
    return ONE_SHAPE if args.one_shape else EVERYTHING


def picture_batches(args: argparse.Namespace) -> Iterator[PictureBatch]:
    return in_workers(PictureBatches(TOKENIZER, args.rows, subjects(args), first=1), args.workers)


def train_mtp(args: argparse.Namespace, device: torch.device) -> None:
    net = SeeingQwen(family_config())
    net.load_state_dict(torch.load(args.run / "joint.pt", map_location="cpu"))
    net = net.to(device).requires_grad_(False)
    net.mtp.requires_grad_(True)
    optimizers = make_optimizers(net.mtp, args.muon_lr, args.adam_lr)
    pictures, texts = picture_batches(args), iter(Batches(args.tokens, args.length, args.text_rows, device, seed=1))
    log, step, progress = Log(args.run / "mtp.csv"), 0, 0.0
    while progress < 1:
        set_schedule(optimizers, step, progress, args.warmup)
        with torch.autocast(device.type, torch.bfloat16):
            loss, values = mtp_loss(net, next(texts), True)
            batch = moved(next(pictures), device)
            with torch.no_grad():
                seen = net.seen(batch, net.features(batch.drawn))
            answers, agreed = mtp_loss(net, batch.ids, True, seen=seen, rows=batch.learned)
        update(loss + 0.25 * answers, net.mtp.parameters(), optimizers)
        step += 1
        progress = (time.time() - log.start) / args.seconds
        if step % args.log_every == 0 or progress >= 1:
            log.write(step, {**values, **{f"pictures_{name}": value for name, value in agreed.items()}})
    save(args.run / "mtp.pt", rounded(net))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=["joint", "mtp"])
    parser.add_argument("--start", type=Path, default=TOKENIZER.parent, help="the text model to begin with; its tower is not read")
    parser.add_argument("--teacher", type=Path, default=TOKENIZER.parent, help="the text model whose distributions are kept")
    parser.add_argument("--tokens", type=Path, default=Path("build/tokens"))
    parser.add_argument("--run", type=Path, default=Path("build/run/demo-vision"))
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--one-shape", action="store_true", help="draw one shape in small pictures: to try a change on a CPU")
    parser.add_argument("--rows", type=int, default=256, help="conversations of a step")
    parser.add_argument("--text-rows", type=int, default=16, help="windows of a text batch")
    parser.add_argument("--length", type=int, default=1028, help="tokens of a window")
    parser.add_argument("--text-every", type=int, default=2)
    parser.add_argument("--text-weight", type=float, default=1.0)
    parser.add_argument("--muon-lr", type=float, default=0.003)
    parser.add_argument("--adam-lr", type=float, default=0.0004)
    parser.add_argument("--tower-muon-lr", type=float, default=0.002)
    parser.add_argument("--tower-adam-lr", type=float, default=0.0003)
    parser.add_argument("--warmup", type=int, default=100, help="steps; fewer for a run of some hundred steps")
    parser.add_argument("--held-out", type=int, default=6, help="batches measured at every row of the log")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--save-every", type=float, default=60.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    {"joint": train_joint, "mtp": train_mtp}[args.phase](args, torch.device(args.device))


if __name__ == "__main__":
    main()
