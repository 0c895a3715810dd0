"""A process that runs bundles with changed graphs. The manifest has the new hash, as a hostile maker would write it.

python -m tests.support.graph_worker BUNDLE   # stdin: "forged SEED" a line; stdout: a JSON line each
"""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

from qwen_export.manifest import DIGEST, MANIFEST
from tests.support.graph_mutations import changed_graph
from tests.support.manifest_worker import MEMORY, answer
from tests.support.manifests import edit_manifest


def main(source: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.WARNING)
    graph = json.loads((source / MANIFEST).read_text())["graphs"]["decoder"]["file"]
    data = (source / graph).read_bytes()
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        bundle = Path(folder) / "bundle"
        bundle.mkdir()
        for path in source.iterdir():
            if path.name not in (MANIFEST, DIGEST, graph):
                os.link(path, bundle / path.name)
        for line in sys.stdin:
            content = changed_graph(data, int(line.split()[1]))
            (bundle / graph).write_bytes(content)
            entry = {"size": len(content), "sha256": sha256(content).hexdigest()}
            for name in (MANIFEST, DIGEST):
                shutil.copyfile(source / name, bundle / name)
            edit_manifest(bundle, lambda manifest, entry=entry: manifest["files"].update({graph: entry}))
            print(json.dumps({"case": line.strip(), "outcome": answer(bundle)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
