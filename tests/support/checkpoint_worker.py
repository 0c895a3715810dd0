"""A process that reads checkpoints with changed files, as `inspect` and `build` do, and compares what it takes with transformers.

python -m tests.support.checkpoint_worker CHECKPOINT   # stdin: "KIND SEED" a line; stdout: a JSON line each
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open

from qwen_export.building.build_plan import plan_build
from qwen_export.building.text_assets import check_text_assets, copy_text_assets, stop_ids
from qwen_export.bundles.inspection import inspect_checkpoint
from qwen_export.errors import QwenExportError
from qwen_export.graphs.checkpoint.checkpoint_directory import open_checkpoint
from qwen_export.graphs.checkpoint.checkpoint_reader import CheckpointReader
from qwen_export.graphs.checkpoint.tensor_names import check_tensors, decoder_tensors, stored_name
from qwen_export.graphs.models.eager_sequence import EagerSequence
from qwen_export.graphs.models.load_model import load_decoder
from qwen_export.runtimes.text.text_files import TextFiles
from qwen_export.runtimes.text_check import check_text
from tests.support.checkpoint_mutations import FILES, changed

MORE_MEMORY = 2 << 30
"""Address space that cases may add to that of the process when it starts, in bytes."""
PROMPT = [3, 14, 15, 92, 65, 35, 89, 79]
QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]


def read_weights(directory: Path) -> str:
    """What `inspect` and the plan do; then every weight is what the safetensors library reads."""
    checkpoint = open_checkpoint(directory)
    check_tensors(checkpoint)
    plan_build(checkpoint)
    inspect_checkpoint(directory)
    with CheckpointReader(checkpoint) as reader:
        for name, shape in decoder_tensors(checkpoint.config.text):
            info = checkpoint.tensors[stored_name(checkpoint.config, name)]
            with safe_open(info.file, "pt") as file:
                expected = file.get_tensor(info.name).float().numpy()
            if not np.array_equal(reader.rows(name, 0, shape[0]), expected):
                return f"failure: other values of {name}"
    return "success"


def read_config(directory: Path) -> str:
    """The same for the configuration; then the logits are those of transformers."""
    read_weights(directory)
    ours = EagerSequence(load_decoder(open_checkpoint(directory)), len(PROMPT)).read(PROMPT)
    theirs = transformers_logits(directory)
    if theirs is None:
        return "success, and transformers refuses"
    difference = float(np.abs(ours - theirs).max())
    return "success" if difference < 1e-3 else f"failure: logits differ by {difference:.2g} from those of transformers"


def transformers_logits(directory: Path) -> Any:
    raw = json.loads((directory / "config.json").read_text())
    kind = getattr(transformers, (raw.get("architectures") or ["Qwen3_5ForConditionalGeneration"])[0])
    try:
        model, found = kind.from_pretrained(str(directory), dtype=torch.float32, local_files_only=True, output_loading_info=True)
        if found["missing_keys"] or found["mismatched_keys"]:
            return None
        with torch.no_grad():
            return model.eval()(torch.tensor([PROMPT])).logits[0].float().numpy()
    except Exception:
        return None


def read_text(directory: Path) -> str:
    """What a build takes, a run can use: files are copied and loaded, a chat is rendered and encoded."""
    check_text_assets(directory)
    stop_ids(directory, ())
    plan_build(open_checkpoint(directory))
    with tempfile.TemporaryDirectory(dir=directory.parent) as folder:
        bundle = Path(folder)
        names = copy_text_assets(directory, bundle)
        check_text(bundle, names)
        files = TextFiles(bundle, names)
        ids = files.tokenizer.encode(files.template.render(QUESTION))
        files.tokenizer.decode(ids)
    return "success"


READERS = {"config": read_config, "index": read_weights, "header": read_weights}


def outcome(kind: str, directory: Path) -> str:
    try:
        return READERS.get(kind, read_text)(directory)
    except QwenExportError as error:
        text = str(error)
        if "\n" in text or len(text) > 2000:
            return f"failure: not one line: {text[:300]!r}"
        return "error"
    except BaseException as error:
        where = error.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        place = f"{where.tb_frame.f_code.co_filename}:{where.tb_lineno}" if where is not None else ""
        return f"failure: {type(error).__name__}: {str(error)[:300]} ({place})"


def main(source: Path) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MORE_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        for line in sys.stdin:
            kind, number = line.split()
            directory = Path(folder) / "checkpoint"
            directory.mkdir()
            for path in source.iterdir():
                if path.name != FILES[kind]:
                    os.link(path, directory / path.name)
            (directory / FILES[kind]).write_bytes(changed(kind, source, int(number)))
            print(json.dumps({"case": line.strip(), "outcome": outcome(kind, directory)}), flush=True)
            for path in directory.iterdir():
                path.unlink()
            directory.rmdir()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
