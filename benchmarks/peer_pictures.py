"""A picture's time to the first token beside llama.cpp's multimodal server and OpenVINO GenAI, alternating in one run.

    PY -m pip install xllamacpp                                                # an environment of its own
    PY -m pip install optimum-intel==2.2.0 transformers==5.2.0 openvino-genai pillow   # another one
    python -m benchmarks.peer_pictures checkpoint DIR                          # 0.8B shape, tower of the release, random weights
    python -m benchmarks.peer_pictures llamacpp DIR PEER                       # text in Q4_0, tower in F16 and in F32
    python -m benchmarks.peer_pictures openvino DIR PEER                       # what OpenVINO's exporter reads; prints its command
    python -m benchmarks.peer_pictures compare BUNDLE PEER --kind llamacpp --peer-python PY [--sizes 512,1024] [--threads 1] [--rounds 3]

From the bytes of a JPEG to one token, every picture new to both. Processor seconds are of the whole process: with one thread they are what
the work takes, and other programs on the machine change them little. With more threads, both sides also count the time that threads wait
by spinning: read the wall then, on a quiet machine.
"""

from __future__ import annotations

import argparse
import base64
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.pictures import jpeg, request

_BLOCK = {
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.qkv": "attn_qkv",
    "attn.proj": "attn_out",
    "mlp.linear_fc1": "ffn_up",
    "mlp.linear_fc2": "ffn_down",
}
_OUTSIDE = {
    "pos_embed.weight": "v.position_embd.weight",
    "patch_embed.proj.bias": "v.patch_embd.bias",
    "merger.norm.weight": "v.post_ln.weight",
    "merger.norm.bias": "v.post_ln.bias",
    "merger.linear_fc1.weight": "mm.0.weight",
    "merger.linear_fc1.bias": "mm.0.bias",
    "merger.linear_fc2.weight": "mm.2.weight",
    "merger.linear_fc2.bias": "mm.2.bias",
}
_IMAGES = {"longest_edge": 16777216, "shortest_edge": 65536}
_VIDEOS = {"longest_edge": 25165824, "shortest_edge": 4096}
_PROCESSOR = {
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "processor_class": "Qwen3VLProcessor",
}
_TOKENIZER = {
    "tokenizer_class": "Qwen2Tokenizer",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}
_TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|>\
<|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def make_checkpoint(out: Path) -> None:
    from tests.support.family import FAMILY
    from tests.support.real_tokenizer import tokenizer_file
    from tests.support.synthesize import synthesize

    synthesize(FAMILY["0.8B"], out, with_mtp=False, tokenizer=tokenizer_file())
    (out / "tokenizer_config.json").write_text(json.dumps(_TOKENIZER))
    (out / "chat_template.jinja").write_text(_TEMPLATE)


def for_openvino(checkpoint: Path, out: Path) -> None:
    """The checkpoint without a draft head, with the processor files of the releases."""
    out.mkdir(parents=True, exist_ok=True)
    for file in checkpoint.iterdir():
        (out / file.name).unlink(missing_ok=True)
        (out / file.name).symlink_to(file.resolve())
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["mtp_num_hidden_layers"] = 0
    images = {"size": _IMAGES, **_PROCESSOR, "image_processor_type": "Qwen2VLImageProcessorFast"}
    videos = {"size": _VIDEOS, **_PROCESSOR, "video_processor_type": "Qwen3VLVideoProcessor"}
    for name, values in (("config", config), ("preprocessor_config", images), ("video_preprocessor_config", videos)):
        (out / f"{name}.json").unlink(missing_ok=True)
        (out / f"{name}.json").write_text(json.dumps(values))
    form = "--weight-format int4 --group-size 32 --sym --ratio 1.0"
    print(f"next: optimum-cli export openvino --model {out} --task image-text-to-text {form} PEER")


def for_llamacpp(checkpoint: Path, out: Path) -> None:
    import gguf
    from gguf.constants import GGMLQuantizationType as Kind

    from tests.support.gguf_files import checkpoint_tensors, matrices, write_gguf

    out.mkdir(parents=True, exist_ok=True)
    four, eight = matrices(Kind.Q4_0), matrices(Kind.Q8_0)

    def kind(name: str, shape: tuple[int, ...]) -> Kind:
        return (eight if name.startswith("token_embd") else four)(name, shape)

    tensors = checkpoint_tensors(checkpoint)
    tower = {name.removeprefix("visual."): tensors.pop(name) for name in list(tensors) if name.startswith("visual.")}
    write_gguf(checkpoint, out / "text.gguf", kind, stored=tensors)
    config = json.loads((checkpoint / "config.json").read_text())["vision_config"]
    for name, wide in (("f16", Kind.F16), ("f32", Kind.F32)):
        writer = gguf.GGUFWriter(out / f"tower-{name}.gguf", "clip")
        _tower_keys(writer, config)
        for stored, values in tower.items():
            for target, part in _tower_tensor(stored, values):
                chosen = wide if (part.ndim == 2 and "position" not in target) or "patch_embd.weight" in target else Kind.F32
                writer.add_tensor(target, gguf.quants.quantize(np.ascontiguousarray(part), chosen), raw_dtype=chosen)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _tower_keys(writer: Any, config: dict[str, Any]) -> None:
    """What llama.cpp reads of a tower without the connections of Qwen3-VL from its blocks to the text."""
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "qwen3vl_merger")
    writer.add_bool("clip.use_gelu", True)
    keys = {
        "image_size": int(config["num_position_embeddings"] ** 0.5) * config["patch_size"],
        "patch_size": config["patch_size"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "projection_dim": config["out_hidden_size"],
        "block_count": config["depth"],
        "attention.head_count": config["num_heads"],
        "spatial_merge_size": config["spatial_merge_size"],
    }
    for key, value in keys.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    writer.add_array("clip.vision.image_mean", [0.5] * 3)
    writer.add_array("clip.vision.image_std", [0.5] * 3)
    writer.add_array("clip.vision.is_deepstack_layers", [False] * config["depth"])


def _tower_tensor(name: str, values: Any) -> list[tuple[str, Any]]:
    if name == "patch_embed.proj.weight":  # two frames, two convolutions
        return [("v.patch_embd.weight", values[:, :, 0]), ("v.patch_embd.weight.1", values[:, :, 1])]
    if name in _OUTSIDE:
        return [(_OUTSIDE[name], values)]
    _, number, rest = name.split(".", 2)
    module, kind = rest.rsplit(".", 1)
    return [(f"v.blk.{number}.{_BLOCK[module]}.{kind}", values)]


_LOOP = """
def used():
    both = resource.getrusage(resource.RUSAGE_SELF)
    return both.ru_utime + both.ru_stime
print("ready", flush=True)
for line in sys.stdin:
    wall, began = time.perf_counter(), used()
    tokens, error = first_token(line.strip())
    print(json.dumps({"cpu": used() - began, "wall": time.perf_counter() - wall, "tokens": tokens, "error": error}), flush=True)
"""
_LLAMACPP = """
import json, resource, sys, time
import xllamacpp as x
folder, threads, tower = sys.argv[1], int(sys.argv[2]), sys.argv[3]
p = x.CommonParams()
p.model.path, p.mmproj.path = f"{folder}/text.gguf", f"{folder}/tower-{tower or 'f16'}.gguf"
p.n_ctx, p.n_parallel, p.warmup, p.mmproj_use_gpu = 4096, 1, False, False
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
server = x.Server(p)
def first_token(picture):
    image = {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + picture}}
    parts = [image, {"type": "text", "text": "What is in this picture?"}]
    made = server.handle_chat_completions({"messages": [{"role": "user", "content": parts}], "max_tokens": 1, "cache_prompt": False})
    made = json.loads(made) if isinstance(made, str) else made
    return made.get("usage", {}).get("prompt_tokens"), made.get("error")
"""
_OPENVINO = """
import base64, io, json, resource, sys, time
import numpy as np, openvino as ov, openvino_genai as genai
from PIL import Image
folder, threads, precision = sys.argv[1], int(sys.argv[2]), sys.argv[3]
options = {"INFERENCE_NUM_THREADS": threads} | ({"INFERENCE_PRECISION_HINT": precision} if precision else {})
pipe = genai.VLMPipeline(folder, "CPU", **options)
def first_token(picture):
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB"))
    made = pipe.generate("What is in this picture?", images=[ov.Tensor(pixels[None])], max_new_tokens=1, do_sample=False)
    return made.perf_metrics.get_num_input_tokens(), None
"""
PEERS = {"llamacpp": _LLAMACPP, "openvino": _OPENVINO}


class Peer:
    """A program in another environment that answers one picture after the other."""

    def __init__(self, kind: str, folder: Path, python: str, threads: int, precision: str) -> None:
        command = [python, "-c", PEERS[kind] + _LOOP, str(folder), str(threads), precision]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True)
        while (line := self._line()).strip() != "ready":
            print(line, end="", flush=True)

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise SystemExit(f"the peer ended:\n{self._errors.read()[-3000:]}")
        return line

    def first_token(self, data: bytes) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(base64.b64encode(data).decode() + "\n")
        self._process.stdin.flush()
        while not (line := self._line()).startswith('{"cpu"'):
            pass
        answer: dict[str, Any] = json.loads(line)
        if answer["error"]:
            raise SystemExit(f"the peer refused: {answer['error']}")
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def ours(bundle: Path, threads: int) -> Callable[[bytes], dict[str, Any]]:
    from qwen_export.runtimes import load
    from qwen_export.runtimes.decoding.generation import Statistics
    from qwen_export.runtimes.vision.picture import open_picture

    model = load(bundle, threads=threads, speculate="off", max_context=4096)
    sight = model.sight
    assert sight is not None

    def first_token(data: bytes) -> dict[str, Any]:
        wall, began = time.perf_counter(), time.process_time()
        asked, statistics = request(model, open_picture(data, sight.spec), 1), Statistics()
        for _ in model.generate(asked, statistics):
            pass
        return {"cpu": time.process_time() - began, "wall": time.perf_counter() - wall, "tokens": statistics.prompt_tokens}

    return first_token


def compare(given: argparse.Namespace) -> None:
    mine, peer = ours(given.bundle, given.threads), Peer(given.kind, given.peer, given.peer_python, given.threads, given.precision)
    print(f"size       seconds     ours  {given.kind:>10}  its / ours  tokens of the prompts")
    small = jpeg(256, 0)  # warms both up
    mine(small), peer.first_token(small)
    for side in (int(part) for part in given.sizes.split(",")):
        rounds = []
        for number in range(1, given.rounds + 1):
            data = jpeg(side, number)
            rounds.append((mine(data), peer.first_token(data)))
        for name in ("cpu", "wall"):
            a, b = ([pair[i][name] for pair in rounds] for i in (0, 1))
            ratio = median(y / x for x, y in zip(a, b, strict=True))
            lengths = f"{rounds[-1][0]['tokens']}, {rounds[-1][1]['tokens']}"
            print(f"{side}x{side:<6} {name:7} {median(a):8.2f}  {median(b):10.2f}  {ratio:10.2f}  {lengths}", flush=True)
    peer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("checkpoint").add_argument("out", type=Path)
    for kind in PEERS:
        prepare = commands.add_parser(kind)
        prepare.add_argument("checkpoint", type=Path)
        prepare.add_argument("out", type=Path)
    run = commands.add_parser("compare")
    run.add_argument("bundle", type=Path)
    run.add_argument("peer", type=Path)
    run.add_argument("--kind", choices=list(PEERS), required=True)
    run.add_argument("--peer-python", default=shutil.which("python3") or sys.executable)
    run.add_argument("--sizes", default="512,1024")
    run.add_argument("--rounds", type=int, default=3)
    run.add_argument("--threads", type=int, default=1)
    run.add_argument("--precision", default="", help="llama.cpp's tower: f16 or f32; OpenVINO's arithmetic: bf16 or f32")
    given = parser.parse_args()
    if given.what == "compare":
        compare(given)
    elif given.what == "checkpoint":
        make_checkpoint(given.out)
    else:
        {"llamacpp": for_llamacpp, "openvino": for_openvino}[given.what](given.checkpoint, given.out)


if __name__ == "__main__":
    main()
