"""qwen-export serve"""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import click

from qwen_export.commands.hashing import hash_with_progress
from qwen_export.commands.load_options import load_options
from qwen_export.commands.media_flags import server_media_options
from qwen_export.commands.output import notice, verbosity_options
from qwen_export.commands.param_types import Gigabytes
from qwen_export.errors import ParameterError
from qwen_export.extras import needed_for

_KEY_VARIABLE = "QWEN_EXPORT_API_KEY"
_SECONDS = click.FloatRange(0, min_open=True)
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@click.command("serve")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="0.0.0.0 for all of this machine.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option(
    "--fd", type=click.IntRange(0), metavar="N", help="Listen on this inherited socket; one of systemd (LISTEN_FDS) is taken by itself."
)
@click.option("--slots", default=8, show_default=True, type=click.IntRange(1), help="Answers that are made at once.")
@click.option(
    "--engines",
    type=click.IntRange(1),
    metavar="N",
    help="Batches that take turns on a model in stages; default one per GPU that it is on.",
)
@click.option("--max-queue", type=click.IntRange(0), metavar="N", help="Answers that may wait; default four per slot.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help=f"Keys, one a line, of which clients must send one. The variable {_KEY_VARIABLE} has one, too.",
)
@click.option("--served-model-name", multiple=True, metavar="NAME", help="Model names of requests; default the name of BUNDLE.")
@click.option("--cors-origin", multiple=True, metavar="URL", help="Web pages from there may read answers.")
@click.option(
    "--allowed-host", multiple=True, metavar="NAME", help="Names of this server in requests; default any, on a loopback address its own."
)
@click.option("--root-path", default="", metavar="PATH", help="The beginning of addresses that a proxy in front removes.")
@click.option("--max-context", type=int, metavar="N", help="Overrides the bundle's cache capacity.")
@click.option("--cache-memory", type=Gigabytes(), metavar="GB", help="Memory for states, caches and shared beginnings.")
@click.option("--prefix-memory", type=Gigabytes(), metavar="GB", help="The part of it for beginnings that prompts share; default 1.")
@click.option("--max-body", type=click.FloatRange(0, min_open=True), default=32, show_default=True, metavar="MB", help="Of a request.")
@click.option(
    "--body-timeout", type=click.FloatRange(0, min_open=True), default=60, show_default=True, metavar="S", help="For a body to arrive."
)
@click.option("--queue-timeout", type=_SECONDS, metavar="S", help="Until a request has a slot; default no limit.")
@click.option("--answer-timeout", type=_SECONDS, metavar="S", help="For a whole answer; default no limit.")
@click.option(
    "--write-timeout",
    type=click.FloatRange(0, min_open=True),
    default=60,
    show_default=True,
    metavar="S",
    help="Until a client takes bytes.",
)
@click.option(
    "--drain", default=30.0, show_default=True, type=click.FloatRange(0), metavar="S", help="For answers in progress when it stops."
)
@server_media_options
@click.option("--page/--no-page", default=True, show_default=True, help="A page to chat at /.")
@load_options()
@verbosity_options
def command(
    bundle: Path,
    host: str,
    port: int,
    fd: int | None,
    slots: int,
    engines: int | None,
    max_context: int | None,
    cache_memory: int | None,
    prefix_memory: int | None,
    drain: float,
    loading: dict[str, Any],
    **options: Any,
) -> None:
    """Answer requests over HTTP in the protocols of OpenAI and Anthropic.

    SIGTERM or Ctrl-C takes no more requests and ends behind the answers in progress; a second one ends at once."""
    with needed_for("serve"):
        from qwen_export.runtimes.model import load
        from qwen_export.runtimes.server.application import create_app
        from qwen_export.runtimes.server.http_server import HttpServer, address_of, listening_socket
        from qwen_export.runtimes.server.http_server import drain as wait_for_answers
        from qwen_export.runtimes.server.inherited_socket import inherited_socket, is_loopback
        from qwen_export.runtimes.server.service import Service
        from qwen_export.runtimes.serving.engine_group import EngineGroup
    stop, hurry = threading.Event(), threading.Event()
    with inherited_socket(fd) or listening_socket(host, port) as listening:
        settings = _settings(is_loopback(listening), options)
        service = Service(settings)
        server = HttpServer(create_app(service), listening, settings)
        address = address_of(listening)
        if not is_loopback(listening) and not settings.api_keys:
            notice("warning: whoever reaches this address may use the model; set keys with --api-key-file")
        notice(f"{address} listens; loading {bundle}")
        hash_with_progress(bundle)
        model = load(bundle, max_context=max_context, **loading)
        with model, EngineGroup.of(model, slots, engines=engines, cache_memory=cache_memory, prefix_memory=prefix_memory) as engine:
            service.prepare(model, engine, lambda text: notice(f"{text} ..."))
            _on_signals(stop, hurry)
            service.start(model, engine)
            notice(f"ready: {address}/v1 serves {', '.join(service.names)} with {slots} slots")
            _tell_systemd("READY=1")
            while not stop.wait(1):
                pass
            _tell_systemd("STOPPING=1")
            notice(f"stopping behind {service.open_answers} answers")
            left = wait_for_answers(service, drain, hurry)
            if left:
                notice(f"{left} answers were cut off")
            engine.close()
            server.close()


def _settings(loopback: bool, options: dict[str, Any]) -> Any:
    from qwen_export.runtimes.server.server_settings import ServerSettings

    hosts = options["allowed_host"] or (_LOOPBACK if loopback else ())
    return ServerSettings(
        names=options["served_model_name"],
        api_keys=_keys(options["api_key_file"]),
        cors_origins=options["cors_origin"],
        allowed_hosts=() if "*" in hosts else hosts,
        root_path=options["root_path"].rstrip("/"),
        max_body=int(options["max_body"] * 1e6),
        max_queue=options["max_queue"],
        body_timeout_s=options["body_timeout"],
        queue_timeout_s=options["queue_timeout"],
        answer_timeout_s=options["answer_timeout"],
        write_timeout_s=options["write_timeout"],
        page=options["page"],
        media=options["media"],
    )


def _keys(file: Path | None) -> tuple[str, ...]:
    lines = file.read_text(encoding="utf-8").splitlines() if file is not None else []
    keys = [key for line in [*lines, os.environ.get(_KEY_VARIABLE, "")] if (key := line.strip())]
    if file is not None and not any(line.strip() for line in lines):
        raise ParameterError("the file has no key", parameter="api_key_file", got=str(file), fix="Write one key on each line.")
    return tuple(keys)


def _on_signals(stop: threading.Event, hurry: threading.Event) -> None:
    def caught(*_: Any) -> None:
        if stop.is_set():
            hurry.set()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, caught)


def _tell_systemd(state: str) -> None:
    """A service of Type=notify waits for this."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.connect("\0" + path[1:] if path.startswith("@") else path)
            channel.sendall(state.encode())
