"""llama.cpp's Q4_0 beside an int4 bundle: decode in turns, on the same CPUs. Needs a quiet machine: its threads wait by spinning.

    PY -m pip install xllamacpp                    # in an environment of its own; wheels with llama.cpp inside
    .venv/bin/python benchmarks/peer_llamacpp.py convert LLAMA_CPP CHECKPOINT OUT.gguf     # LLAMA_CPP: its source tree, for the converter
    .venv/bin/python benchmarks/peer_llamacpp.py compare BUNDLE OUT.gguf --peer-python PY [--rounds 5] [--threads 2]

Matrices are Q4_0, embedding and head Q8_0, as the int4 bundle has them in 4 and 8 bits. The checkpoint may have no tokenizer: the
file gets placeholder tokens, and prompts are token ids.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from measured_process import run_measured

NEW_TOKENS, PROMPT = 48, [*range(100, 116)]


def convert(llama_cpp: Path, checkpoint: Path, out: Path) -> None:
    """Run a copy of llama.cpp's converter that takes Q4_0 in the place of Q8_0 for everything but the embedding."""
    work = Path(tempfile.mkdtemp())
    for name in ("conversion", "gguf-py"):
        shutil.copytree(llama_cpp / name, work / name)
    shutil.copy(llama_cpp / "convert_hf_to_gguf.py", work)
    base = work / "conversion" / "base.py"
    text, line = base.read_text(), "data_qtype = gguf.GGMLQuantizationType.Q8_0\n"
    if text.count(line) != 1:
        raise SystemExit(f"{base} is not the converter that this script knows")
    four = 'data_qtype = gguf.GGMLQuantizationType.Q8_0 if "token_embd" in new_name else gguf.GGMLQuantizationType.Q4_0\n'
    base.write_text(text.replace(line, four))
    sys.path[:0] = [str(work), str(work / "gguf-py")]
    import convert_hf_to_gguf  # type: ignore[import-not-found]
    import gguf  # type: ignore[import-not-found]
    from conversion import get_model_class  # type: ignore[import-not-found]
    from conversion.base import ModelBase  # type: ignore[import-not-found]

    config = json.loads((checkpoint / "config.json").read_text())
    size = config.get("text_config", config)["vocab_size"]
    kind = get_model_class(config["architectures"][0])

    def set_vocab(self: Any) -> None:
        writer = self.gguf_writer
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list([f"t{i}" for i in range(size)])
        writer.add_token_types([gguf.TokenType.NORMAL] * size)
        writer.add_token_merges(["t 0"])
        writer.add_eos_token_id(size - 1)

    for part in kind.__mro__:
        if "set_vocab" in vars(part) and part is not ModelBase:
            part.set_vocab = set_vocab
    sys.argv = ["convert", str(checkpoint), "--outfile", str(out), "--outtype", "q8_0"]
    convert_hf_to_gguf.main()
    shutil.rmtree(work)


PEER = """
import json, sys, xllamacpp
path, threads, count, prompt = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
p = xllamacpp.CommonParams()
p.model.path, p.n_ctx, p.n_parallel = path, 1024, 1
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(p)
for _ in range(2):  # the first call warms up
    result = server.handle_completions({"prompt": prompt, "n_predict": count, "ignore_eos": True, "temperature": 0, "cache_prompt": False})
result = json.loads(result) if isinstance(result, str) else result
print(json.dumps(result["timings"]["predicted_per_second"]))
"""


def compare(bundle: Path, model: Path, peer_python: str, rounds: int, threads: int) -> None:
    ours, theirs = [], []
    for number in range(1, rounds + 1):
        command = [Path(sys.executable).with_name("qwen-export"), "bench", bundle, "--prompt-tokens", len(PROMPT), "--speculate", "off"]
        result = run_measured([*command, "--new-tokens", NEW_TOKENS, "--threads", threads, "--json"], cpus=threads)
        ours.append(json.loads(result.stdout)["decode_tok_per_s"])
        peer = run_measured([peer_python, "-c", PEER, model, threads, NEW_TOKENS, json.dumps(PROMPT)], cpus=threads)
        theirs.append(float(peer.stdout.strip().splitlines()[-1]))
        print(f"round {number}: {ours[-1]:.1f} / {theirs[-1]:.1f} tok/s", flush=True)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    print(f"decode: {statistics.median(ours):.1f} and {statistics.median(theirs):.1f} tok/s, median ratio {ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    converting = commands.add_parser("convert")
    for name in ("llama_cpp", "checkpoint", "out"):
        converting.add_argument(name, type=Path)
    comparing = commands.add_parser("compare")
    comparing.add_argument("bundle", type=Path)
    comparing.add_argument("model", type=Path)
    comparing.add_argument("--peer-python", required=True)
    comparing.add_argument("--rounds", type=int, default=5)
    comparing.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.command == "convert":
        convert(arguments.llama_cpp, arguments.checkpoint, arguments.out)
    else:
        compare(arguments.bundle, arguments.model, arguments.peer_python, arguments.rounds, arguments.threads)


if __name__ == "__main__":
    main()
