"""A process that runs bundles with changed manifests, so that a crash or a hang of native code ends this process only.

python -m tests.support.manifest_worker BUNDLE   # stdin: "forged SEED" or "damaged SEED" a line; stdout: a JSON line each
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import resource
import sys
import tempfile
from pathlib import Path

from qwen_export.errors import QwenExportError
from qwen_export.manifest import DIGEST, MANIFEST
from qwen_export.runtimes import SamplingParams, load
from tests.support.manifest_mutations import damaged, mutated

MEMORY = 6 << 30
"""Address space of the process, in bytes. A run of a tiny bundle needs less than one gigabyte."""


def answer(bundle: Path) -> str:
    """Tokens of a short greedy run that reads a prompt, takes steps and drafts; or the error."""
    try:
        model = load(bundle, threads=1, native="allow")
        generation = model.complete("Licensed under the", sampling=SamplingParams(greedy=True), max_new_tokens=6)
        "".join(generation)
        return json.dumps(generation.tokens)
    except QwenExportError as error:
        text = str(error)
        return "error" if "\n" not in text else f"failure: more than one line: {text!r}"
    except BaseException as error:
        return f"failure: {type(error).__name__}: {error}"


def main(source: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.WARNING)
    data = (source / MANIFEST).read_bytes()
    manifest = json.loads(data)
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        bundle = Path(folder) / "bundle"
        bundle.mkdir()
        for path in source.iterdir():
            if path.name not in (MANIFEST, DIGEST):
                os.link(path, bundle / path.name)
        for line in sys.stdin:
            kind, number = line.split()
            if kind == "forged":
                where, changed = mutated(manifest, int(number))
                digest = hashlib.sha256(changed).hexdigest()
            else:
                where, changed = "", damaged(data, int(number))
                digest = hashlib.sha256(data).hexdigest()
            (bundle / MANIFEST).write_bytes(changed)
            (bundle / DIGEST).write_text(f"{digest}  {MANIFEST}\n")
            print(json.dumps({"case": line.strip(), "where": where, "outcome": answer(bundle)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
