"""Write a trained model as a checkpoint in the released Hugging Face layout, and check it against transformers.

    python export.py --model demo-dense --run build/run --tokenizer build/tokenizer --out ../demo-dense

All tensors are bf16. `model.*` and `mtp.*` keep their names; the tied head has no tensor of its own. demo-moe is written as two shards with
an index, demo-dense as one file, so that loaders meet both forms.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import torch
from layers import load_config
from model import Qwen
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

SHARDS = {"demo-dense": 1, "demo-moe": 2}


def split(tensors: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Cut the name-ordered tensors into `count` shards of similar size."""
    total = sum(t.nbytes for t in tensors.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(count)]
    done = 0
    for name in sorted(tensors):
        shards[min(count - 1, done * count // total)][name] = tensors[name]
        done += tensors[name].nbytes
    return shards


def write_weights(tensors: dict[str, Tensor], out: Path, count: int) -> None:
    if count == 1:
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i, shard in enumerate(split(tensors, count), 1):
        file = f"model-{i:05d}-of-{count:05d}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": dict(sorted(weight_map.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_small_files(model: str, tokenizer: Path, out: Path) -> None:
    shutil.copy(Path(__file__).parent / "configs" / f"{model}.json", out / "config.json")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / file, out / file)
    ids = {t["content"]: int(i) for i, t in json.loads((tokenizer / "tokenizer_config.json").read_text())["added_tokens_decoder"].items()}
    generation = {
        "bos_token_id": None,
        "do_sample": True,
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "pad_token_id": ids["<|endoftext|>"],
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "transformers_version": "5.17.0",
    }
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def write_checksums(out: Path) -> None:
    files = sorted(p for p in out.iterdir() if p.name != "SHA256SUMS" and p.is_file())
    (out / "SHA256SUMS").write_text("".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in files))


def check(out: Path, net: Qwen) -> float:
    """Largest difference of fp32 logits between transformers (which reads the written files) and the training module on a text."""
    reference = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    text = "def mean(values):\n    return sum(values) / len(values)\n" * 6
    ids = AutoTokenizer.from_pretrained(out)(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return float((reference(ids).logits - net.logits(net.hidden(ids)[1])).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, choices=sorted(SHARDS))
    parser.add_argument("--run", type=Path, default=Path("build/run"))
    parser.add_argument("--tokenizer", type=Path, default=Path("build/tokenizer"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    state = torch.load(args.run / args.model / "mtp.pt", map_location="cpu")
    tensors = {name: value.to(torch.bfloat16).contiguous() for name, value in state.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    write_weights(tensors, args.out, SHARDS[args.model])
    write_small_files(args.model, args.tokenizer, args.out)
    write_checksums(args.out)
    net = Qwen(load_config(args.model)).eval()
    net.load_state_dict({name: value.float() for name, value in tensors.items()})
    difference = check(args.out, net)
    size = sum(p.stat().st_size for p in args.out.iterdir()) / 1e6
    print(
        f"{args.out}: {sum(t.numel() for t in tensors.values()) / 1e6:.2f} M parameters, {size:.2f} MB, logits differ by {difference:.1e}"
    )
    if difference > 1e-3:
        raise SystemExit("the exported checkpoint does not compute what was trained")


if __name__ == "__main__":
    main()
