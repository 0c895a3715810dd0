"""Serves the page beside this file, and a bundle below /bundle/: `python serve.py BUNDLE [--port 8000] [--host 127.0.0.1]`.

Any server will do that sends the same headers. A page may use threads only when the first two isolate it from other sites; without them it
runs on one thread.
"""

from __future__ import annotations

import argparse
import contextlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    # ONNX Runtime compiles WebAssembly, and starts its threads from a blob.
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'wasm-unsafe-eval' blob:; worker-src 'self' blob:; img-src data:",
    "X-Content-Type-Options": "nosniff",
    # Kept by the browser, and asked for again each time: an unchanged file is answered with 304.
    "Cache-Control": "no-cache",
}


TYPES = {".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm"}


class Pages(SimpleHTTPRequestHandler):
    """Files of this folder, and of the bundle."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | TYPES

    def __init__(self, *arguments: object, bundle: Path, quiet: bool = False) -> None:
        self._bundle, self._quiet = bundle, quiet
        super().__init__(*arguments, directory=str(Path(__file__).parent))  # type: ignore[arg-type]

    def translate_path(self, path: str) -> str:
        if path.startswith("/bundle/"):
            return str(self._bundle / Path(path.split("?")[0]).name)
        return super().translate_path(path)

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        if not self._quiet:
            super().log_message(format, *arguments)


def server(bundle: Path, host: str = "127.0.0.1", port: int = 0, *, quiet: bool = False) -> ThreadingHTTPServer:
    """A server that is ready to `serve_forever`; port 0 takes a free one."""
    return ThreadingHTTPServer((host, port), partial(Pages, bundle=bundle, quiet=quiet))


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve the page and a bundle.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--host", default="127.0.0.1", help="browsers give threads to https and to localhost only")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    if not (options.bundle / "manifest.json").is_file():
        parser.error(f"{options.bundle} is not a bundle: it has no manifest.json")
    if not (Path(__file__).parent / "node_modules").is_dir():
        parser.error("the packages are not there: run `npm install --ignore-scripts` in this folder first")
    with server(options.bundle, options.host, options.port) as made:
        print(f"http://{options.host}:{made.server_port}/", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            made.serve_forever()


if __name__ == "__main__":
    main()
