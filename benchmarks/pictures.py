"""Pictures on one machine: where the time to the first token goes, what others notice of it, and memory.

python benchmarks/pictures.py time BUNDLE --sizes 512,1024 --threads 1      # preparation, tower, prompt, first token: processor time
python benchmarks/pictures.py beside BUNDLE --size 1024 --streams 1,4       # time between tokens of others meanwhile
python benchmarks/pictures.py ahead BUNDLE --size 512 --text 2000          # the picture encoded while the text before it is read
python benchmarks/pictures.py memory BUNDLE --size 4096                     # peak memory of one picture, in a fresh process
python -m benchmarks.pictures parity BUNDLE --checkpoint CHECKPOINT         # the tower of an fp32 bundle beside transformers
"""

from __future__ import annotations

import argparse
import io
import resource
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from qwen_export.runtimes import Model, SamplingParams, load
from qwen_export.runtimes.decoding.generation import Request
from qwen_export.runtimes.sampling.sampler import Sampler
from qwen_export.runtimes.serving.engine import Engine
from qwen_export.runtimes.vision.picture import Picture, open_picture
from qwen_export.runtimes.vision.picture_size import Bounds
from qwen_export.runtimes.vision.prompt_expansion import Medium, expand_prompt

GREEDY = SamplingParams(greedy=True)
TEXT = 16


def jpeg(side: int, seed: int) -> bytes:
    """A smooth picture with some noise, as photos are."""
    chance = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    waves = [np.sin(2 * np.pi * (f * x + g * y + p)) for f, g, p in chance.uniform(0, 5, (3, 3))]
    pixels = np.stack(waves, -1) * 90 + 128 + chance.normal(0, 8, (side, side, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def request(model: Model, picture: Picture, new: int | None, before: int = TEXT) -> Request:
    """Text, the picture, and text."""
    assert model.sight is not None
    spec = model.sight.spec
    ids = [*range(100, 100 + before), spec.start_token, spec.image_token, spec.end_token, *range(200, 200 + TEXT)]
    seen = expand_prompt(ids, None, [Medium(picture, "")], spec, model.sight.encoder.features, lambda text: [])
    return Request(seen.ids, Sampler(GREEDY), (), new, media=seen.pictures.media, pictures=seen.pictures)


def first_token(model: Model, data: bytes) -> dict[str, float]:
    """Processor seconds of the parts of one answer."""
    assert model.sight is not None
    encoder = model.sight.encoder
    began = time.process_time()
    picture = open_picture(data, model.sight.spec)
    opened = time.process_time()
    picture.rows(model.sight.spec)
    rows_s = time.process_time() - opened
    encoder.features(picture)
    encoded = time.process_time()
    for _ in model.generate(request(model, picture, 1), statistics := _statistics()):
        break
    ended = time.process_time()
    # Rows were made twice: once to be timed, once for the tower.
    prepared, tower, total = opened - began + rows_s, encoded - opened - 2 * rows_s, ended - began - rows_s
    return {"prepare": prepared, "tower": tower, "prompt": total - prepared - tower, "first": total, "tokens": statistics.prompt_tokens}


def peak_rss_mb() -> float:
    """Of this process so far, in 2^20 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _statistics() -> Any:
    from qwen_export.runtimes.decoding.generation import Statistics

    return Statistics()


def times(model: Model, sizes: list[int], rounds: int) -> None:
    print("milliseconds   tokens   prepare     tower    prompt  first token   prepare's share")
    for side in sizes:
        runs = [first_token(model, jpeg(side, seed)) for seed in range(rounds + 1)][1:]
        mean = {name: median(run[name] for run in runs) for name in runs[0]}
        shown = [f"{1000 * mean[name]:8.0f}" for name in ("prepare", "tower", "prompt", "first")]
        print(f"{side}x{side:<6} {mean['tokens']:6.0f} ", "  ".join(shown), f" {mean['prepare'] / mean['first']:7.1%}")


def beside(model: Model, side: int, streams: int) -> tuple[float, float, float, float]:
    """Seconds between two tokens of an answer among `streams`: alone, and the median and 95th percentile while a picture is encoded; and
    the seconds that it takes to its first token."""
    assert model.sight is not None
    picture = open_picture(jpeg(side, 99 + streams), model.sight.spec)
    chance = np.random.default_rng(streams)
    with Engine.of(model, streams + 1, prefix_memory=0) as engine:
        answers = [engine.submit(Request(chance.integers(0, 1000, 16).tolist(), Sampler(GREEDY), (), None)) for _ in range(streams)]
        marks = []
        for _ in range(60):
            next(answers[0])
            marks.append(time.perf_counter())
        alone = float(np.median(np.diff(marks[10:])))
        late = engine.submit(request(model, picture, 1))
        marks = [time.perf_counter()]
        encoded = model.sight.encoder.encoded
        while model.sight.encoder.encoded == encoded:
            next(answers[0])
            marks.append(time.perf_counter())
        while not late.statistics.finish:
            next(answers[0])
        for answer in answers:
            answer.cancel()
    gaps = np.diff(marks)
    return alone, float(np.median(gaps)), float(np.percentile(gaps, 95)), late.statistics.first_token_s


def ahead(model: Model, side: int, text: int, rounds: int) -> None:
    """Seconds in an engine to the first token of a text, of a picture with little text, and of the picture behind the text."""
    assert model.sight is not None
    print("first token, s: text alone  picture alone  picture behind the text  of the sum")
    with Engine.of(model, 2, prefix_memory=0) as engine:

        def first(asked: Request) -> float:
            answer = engine.submit(asked)
            for _ in answer:
                pass
            return answer.statistics.first_token_s

        first(Request([*range(100, 200)], Sampler(GREEDY), (), 1))  # warms up
        for number in range(1, rounds + 1):
            alone = first(Request([*range(100, 100 + text)], Sampler(GREEDY), (), 1))
            seen = [open_picture(jpeg(side, 10 * number + i), model.sight.spec) for i in range(2)]
            picture = first(request(model, seen[0], 1))
            both = first(request(model, seen[1], 1, text))
            print(f"{alone:26.2f}  {picture:13.2f}  {both:23.2f}  {both / (alone + picture):10.2f}", flush=True)


def parity(model: Model, checkpoint: Path, sizes: list[int]) -> None:
    """Largest error of a feature, as a share of the largest feature, on noise of the exact size; wide pictures, too."""
    import torch

    from tests.support.references import reference_model

    assert model.sight is not None
    spec, tower = model.sight.spec, reference_model(checkpoint).model.visual
    for side in sizes:
        for height, width in ((side, side), (side // 2, 2 * side)):
            pixels = np.random.default_rng(side).integers(0, 256, (height, width, 3), dtype=np.uint8)
            picture = open_picture(pixels, spec, bounds=Bounds(1, height * width))
            rows = torch.from_numpy(picture.rows(spec)[0])
            with torch.no_grad():
                grid = torch.tensor([[1, picture.grid.rows, picture.grid.columns]])
                expected = tower(rows, grid_thw=grid).pooler_output.numpy()
            got = model.sight.encoder.features(picture).view(np.float32)
            print(f"{width}x{height}: {np.abs(got - expected).max() / np.abs(expected).max():.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["time", "beside", "ahead", "memory", "parity"])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--sizes", default="512,1024")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--text", type=int, default=2000)
    parser.add_argument("--streams", default="1,4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    model = load(given.bundle, threads=given.threads, speculate="off", max_context=32768)
    if given.what == "time":
        times(model, [int(part) for part in given.sizes.split(",")], given.rounds)
    elif given.what == "beside":
        print("streams  between tokens, ms  while a picture is encoded: median, 95th percentile  first token of the picture, s")
        for streams in (int(part) for part in given.streams.split(",")):
            alone, middle, high, first = beside(model, given.size, streams)
            print(f"{streams:7}  {1000 * alone:18.1f}  {middle / alone:40.2f} x, {high / alone:.2f} x  {first:30.1f}")
    elif given.what == "ahead":
        ahead(model, given.size, given.text, given.rounds)
    elif given.what == "parity":
        parity(model, given.checkpoint, [int(part) for part in given.sizes.split(",")])
    else:
        assert model.sight is not None
        picture = open_picture(np.zeros((given.size, given.size, 3), np.uint8), model.sight.spec)
        before = peak_rss_mb()
        began = time.perf_counter()
        model.sight.encoder.features(picture)
        print(f"{given.size}x{given.size}: {peak_rss_mb() - before:.0f} MB above the loaded model, {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
