"""Train the vision tower alone: from the features of each token, tell what is drawn there.

    python train_tower.py --run build/run --seconds 600

The labels come with the drawing (picture_marks.py), so a picture costs no text and no decoder. The head that reads the features is kept for
the next phase and is not exported.
"""

from __future__ import annotations

import argparse
import csv
import pickle
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from optim import make_optimizers, set_schedule, update
from picture_marks import (
    EVERYTHING,
    HELD_OUT,
    ONE_SHAPE,
    SLOTS,
    VIDEO_SIZE,
    Labels,
    Subjects,
    Words,
    draw_still,
    draw_video,
    family_config,
    labels_of,
    levels_of,
    prepared,
    seeing,
    words_of,
)
from safetensors.torch import load_file
from scenes import COLORS, DIRECTIONS, KINDS
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from vision_tower import Places, VisionTower

TOKENIZER = Path(__file__).parent.parent / "demo-dense" / "tokenizer.json"
Batch = TypeVar("Batch")


class Drawn(NamedTuple):
    """Pictures of one size: `levels` u8[S,n,columns]; labels of their tokens, [S,K,...]."""

    size: tuple[int, int]
    levels: Tensor
    kinds: Tensor
    colors: Tensor
    motions: Tensor
    offsets: Tensor


class MarkHead(nn.Module):
    """Features of a token to its marks, slot by slot."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.parts = (1 + len(KINDS), 1 + len(COLORS), 1 + len(DIRECTIONS), 4)
        self.out = nn.Linear(width, SLOTS * sum(self.parts))

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        return self.out(features).unflatten(-1, (SLOTS, -1)).split(self.parts, -1)

    def loss(self, features: Tensor, drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        kinds, colors, motions, offsets = self(features)
        there = drawn.kinds > 0
        # Most slots are empty: as one mean, the marks would hardly count.
        losses = [F.cross_entropy(kinds[slots].float(), drawn.kinds[slots]) for slots in (there, ~there)]
        for logits, wanted in ((colors, drawn.colors), (motions, drawn.motions)):
            losses.append(0.3 * F.cross_entropy(logits[there].float(), wanted[there]))
        losses.append(2.0 * (offsets[there].float() - drawn.offsets[there]).pow(2).mean())
        with torch.no_grad():
            character = drawn.kinds > len(KINDS) - 36
            right = kinds.argmax(-1) == drawn.kinds
            rates = {
                "shapes": right[there & ~character].float().mean(),
                "characters": right[character].float().mean(),
                "colors": (colors.argmax(-1) == drawn.colors)[there].float().mean(),
                "motions": (motions.argmax(-1) == drawn.motions)[drawn.motions > 0].float().mean(),
            }
        total = torch.stack(losses).sum()
        return total, {"loss": total.detach(), **rates}


def drawn(seed: int, count: int, words: Words, subjects: Subjects) -> Drawn:
    """A batch of stills of one size, or of videos."""
    rng = random.Random(seed)
    if rng.random() < subjects.videos:
        size, scenes = VIDEO_SIZE, [draw_video(seed * count + i) for i in range(count // 2)]
    else:
        size = rng.choice(subjects.sizes)
        scenes = [draw_still(seed * count + i, size, words, subjects.topics) for i in range(count)]
    labels = [labels_of(scene.marks, *size) for scene in scenes]

    def joined(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(one, name) for one in labels]))

    levels = torch.from_numpy(np.concatenate([levels_of(prepared(scene)) for scene in scenes]))
    return Drawn(size, levels, *(joined(name) for name in Labels.__dataclass_fields__))


class DrawnBatches(IterableDataset[Drawn]):
    """Each worker draws every so many-th batch."""

    def __init__(self, rows: int, subjects: Subjects) -> None:
        self.rows, self.subjects = rows, subjects
        self.words = words_of(list(Tokenizer.from_file(str(TOKENIZER)).get_vocab()))

    def __iter__(self) -> Iterator[Drawn]:
        worker = torch.utils.data.get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        torch.set_num_threads(1)
        seed = number
        while True:
            yield drawn(seed, self.rows, self.words, self.subjects)
            seed += count


def in_workers(batches: IterableDataset[Batch], workers: int) -> Iterator[Batch]:
    """Draw in so many processes, or in this one for 0."""
    ahead = 4 if workers else None
    # As bytes through a pipe: tensors would travel in shared memory, of which containers often have 64 MB.
    loader = DataLoader(batches, batch_size=None, num_workers=workers, prefetch_factor=ahead, collate_fn=pickle.dumps)
    return map(pickle.loads, loader)


def tower_of(directory: Path) -> dict[str, Tensor]:
    """The tower of a checkpoint, with the names of VisionTower."""
    stored = {name: value.float() for file in sorted(directory.glob("*.safetensors")) for name, value in load_file(file).items()}
    return {name.removeprefix("model.visual."): value for name, value in stored.items() if name.startswith("model.visual.")}


def places_of(size: tuple[int, int], device: torch.device, known: dict[tuple[int, int], Places]) -> Places:
    if size not in known:
        known[size] = Places(size[0] // seeing().patch_size, size[1] // seeing().patch_size, seeing(), device)
    return known[size]


def run(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    torch.manual_seed(0)
    args.run.mkdir(parents=True, exist_ok=True)
    tower = VisionTower(family_config()["vision_config"]).to(device)
    head = MarkHead(family_config()["text_config"]["hidden_size"]).to(device)
    both = nn.ModuleDict({"tower": tower, "head": head})
    if args.start:
        tower.load_state_dict(tower_of(args.start))
    optimizers = make_optimizers(both, args.muon_lr, args.adam_lr)
    source = DrawnBatches(args.rows, ONE_SHAPE if args.one_shape else EVERYTHING)
    batches = in_workers(source, args.workers)
    held_out = [drawn(HELD_OUT // args.rows + i, args.rows, source.words, source.subjects) for i in range(8)]
    known: dict[tuple[int, int], Places] = {}

    def measured(batch: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        batch = Drawn(batch.size, *(tensor.to(device, non_blocking=True) for tensor in batch[1:]))
        with torch.autocast(device.type, torch.bfloat16):
            return head.loss(tower(batch.levels, places_of(batch.size, device, known)), batch)

    start, step, progress, last = time.time(), 0, 0.0, time.time()
    with (args.run / "tower.csv").open("w", newline="") as handle:
        log = csv.writer(handle)
        log.writerow(["step", "pictures", "seconds", "loss", "held_out_loss", "shapes", "characters", "colors", "motions"])
        while progress < 1:
            set_schedule(optimizers, step, progress)
            loss, logs = measured(next(batches))
            update(loss, both.parameters(), optimizers)
            step += 1
            progress = (time.time() - start) / args.seconds
            if step % args.log_every == 0 or progress >= 1:
                with torch.no_grad():
                    rates = [measured(batch)[1] for batch in held_out]
                mean = {name: float(torch.stack([one[name] for one in rates]).nanmean()) for name in rates[0]}
                seconds = time.time() - start
                values = [float(logs["loss"]), mean["loss"], mean["shapes"], mean["characters"], mean["colors"], mean["motions"]]
                log.writerow([step, step * args.rows, f"{seconds:.1f}", *(f"{value:.4f}" for value in values)])
                handle.flush()
                print(f"tower step {step} {seconds:.0f} s " + " ".join(f"{name} {value:.3f}" for name, value in mean.items()), flush=True)
            if time.time() - last > args.save_every or progress >= 1:
                torch.save(both.state_dict(), args.run / "tower.partial")
                (args.run / "tower.partial").rename(args.run / "tower.pt")
                last = time.time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("build/run/demo-vision"))
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--one-shape", action="store_true", help="draw one shape in small pictures: to try a change on a CPU")
    parser.add_argument("--start", type=Path, help="a checkpoint whose tower is trained further; the head is new")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.003)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--save-every", type=float, default=60.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
