"""Write a model that sees as a checkpoint in the released layout, and check it against transformers.

    python export_sight.py --run build/run/demo-vision --tokenizer ../demo-dense --out ../demo-vision

The text model is `model.language_model.*`, the tower `model.visual.*` and the head `mtp.*`; beside them are the files that say how pictures
and videos are prepared. `--state joint.pt` exports before the head is trained.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from export import write_checksums, write_small_files, write_weights
from picture_chats import PictureBatch, PictureBatches, open_writer
from picture_marks import CONFIGS, HELD_OUT, family_config, seeing
from seeing import SeeingQwen
from torch import Tensor

NAME = "demo-vision"
PROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json")


def released_name(name: str) -> str:
    part, _, rest = name.partition(".")
    return {"model": f"model.language_model.{rest}", "visual": f"model.visual.{rest}"}.get(part, name)


def check(out: Path, net: SeeingQwen, batch: PictureBatch) -> float:
    """Largest difference of fp32 logits between transformers, which reads the written files, and the training module."""
    from transformers import Qwen3_5ForConditionalGeneration

    reference = Qwen3_5ForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    spec = seeing()
    kinds = (batch.ids == spec.image_token).long() + 2 * (batch.ids == spec.video_token).long()
    patches = [side // spec.patch_size for side in batch.drawn.size]
    rows = (batch.drawn.levels.float() - 127.5) / 127.5
    slices = len(rows) // len(batch.ids)
    grid = torch.tensor([[slices, *patches]] * len(batch.ids))
    names = ("pixel_values", "image_grid_thw") if slices == 1 else ("pixel_values_videos", "video_grid_thw")
    given = dict(zip(names, (rows.flatten(0, 1), grid), strict=True))
    with torch.no_grad():
        wanted = reference(batch.ids, attention_mask=torch.ones_like(batch.ids), mm_token_type_ids=kinds, **given).logits
        made = net.logits(net.hidden_of(*net.seen(batch, net.features(batch.drawn)))[1])
    return float((wanted - made)[batch.learned].abs().max())


def write(state: dict[str, Tensor], tokenizer: Path, out: Path) -> SeeingQwen:
    """All files of the checkpoint. Returns the training module with the weights as they are stored."""
    out.mkdir(parents=True, exist_ok=True)
    stored = {name: value.to(torch.bfloat16).contiguous() for name, value in state.items()}
    write_weights({released_name(name): value for name, value in stored.items()}, out, 1)
    write_small_files(NAME, tokenizer, out)
    for name in PROCESSORS:
        shutil.copy(CONFIGS / name, out / name)
    write_checksums(out)
    net = SeeingQwen(family_config()).eval()
    net.load_state_dict({name: value.float() for name, value in stored.items()})
    return net


def still_and_video(tokenizer: Path) -> list[PictureBatch]:
    drawer, writer = PictureBatches(tokenizer, 2), open_writer(tokenizer)
    found: dict[bool, PictureBatch] = {}
    seed = HELD_OUT
    while len(found) < 2:
        batch = drawer.made(seed, writer)
        found[bool((batch.ids == seeing().video_token).any())] = batch
        seed += 1
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("build/run") / NAME)
    parser.add_argument("--state", default="mtp.pt")
    parser.add_argument("--tokenizer", type=Path, default=Path(__file__).parent.parent / "demo-dense")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    net = write(torch.load(args.run / args.state, map_location="cpu"), args.tokenizer, args.out)
    difference = max(check(args.out, net, batch) for batch in still_and_video(args.tokenizer / "tokenizer.json"))
    size = sum(p.stat().st_size for p in args.out.iterdir()) / 1e6
    count = sum(value.numel() for value in net.state_dict().values()) / 1e6
    print(f"{args.out}: {count:.2f} M parameters, {size:.2f} MB, logits differ by {difference:.1e}")
    if difference > 1e-3:
        raise SystemExit("the exported checkpoint does not compute what was trained")


if __name__ == "__main__":
    main()
