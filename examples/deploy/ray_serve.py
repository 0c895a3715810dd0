"""`qwen-export serve` on a cluster: a Ray Serve application around the same ASGI application.

    pip install 'ray[serve]' and qwen-export with the extras `serve` and one backend, on every machine; the bundle under the same path
    RAY_DISABLE_USAGE_STATS=1 serve run ray_serve.yaml          # or, for a first look: serve run ray_serve:application bundle=PATH

A replica is one engine with its own memory: one per GPU, or one per group of cores. Ray spreads requests by load, scales the number of
replicas between two bounds, replaces a replica whose check fails, and lets one that has to go finish its answers. Ray's own ports are open
to everyone who reaches the machine, without a key: keep them in a network of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field
from ray import serve
from ray.serve import Application

from qwen_export.runtimes import load
from qwen_export.runtimes.server.application import create_app
from qwen_export.runtimes.server.server_settings import ServerSettings
from qwen_export.runtimes.server.service import Service
from qwen_export.runtimes.serving.engine import Engine

QUEUE_PER_SLOT = 4


class Options(BaseModel):
    """What `args` of the configuration holds."""

    bundle: str
    name: str = Field("", description="the model's name in requests; default that of the bundle's directory")
    slots: int = Field(8, description="answers that a replica makes at once")
    max_context: int | None = None
    threads: int | None = Field(None, description="CPU threads of a replica; set it, and `cpus`, where several share a machine")
    api_key_file: str = ""
    cpus: float = Field(1, description="cores that Ray reserves for a replica")
    gpus: float = 0
    min_replicas: int = 1
    max_replicas: int = 1
    drain_s: float = Field(60, description="seconds for the answers of a replica that has to go")


@serve.deployment
@serve.ingress()
class QwenServer:
    """One replica."""

    def __init__(self, options: Options) -> None:
        keys = Path(options.api_key_file).read_text().split() if options.api_key_file else ()
        names = (options.name,) if options.name else ()
        self._service = Service(ServerSettings(names=names, api_keys=tuple(keys), max_queue=QUEUE_PER_SLOT * options.slots))
        model = load(options.bundle, max_context=options.max_context, threads=options.threads)
        self._engine = Engine.of(model, options.slots)
        self._service.prepare(model, self._engine)
        self._service.start(model, self._engine)

    def __serve_build_asgi_app__(self) -> Any:
        return create_app(self._service)

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises three times."""
        if self._service.trouble:
            raise RuntimeError(self._service.trouble)

    def __del__(self) -> None:
        """Behind the last answer, or at the end of `drain_s`."""
        if hasattr(self, "_engine"):
            self._service.stop()
            self._engine.close()


def application(options: Options | dict[str, Any]) -> Application:
    """The application of `serve run`. A replica refuses what its queue has no room for, with 429 and Retry-After; Ray lets so many requests
    through, and starts another replica before the slots of all are in use."""
    options = Options.model_validate(options)
    scaling = {
        "min_replicas": options.min_replicas,
        "max_replicas": options.max_replicas,
        "target_ongoing_requests": max(1, round(options.slots * 0.75)),
        "upscale_delay_s": 10,
        "downscale_delay_s": 300,
    }
    deployment = QwenServer.options(
        max_ongoing_requests=options.slots * (1 + QUEUE_PER_SLOT) + 8,
        autoscaling_config=scaling,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        health_check_period_s=5,
        health_check_timeout_s=20,
        graceful_shutdown_wait_loop_s=1,
        graceful_shutdown_timeout_s=options.drain_s,
    )
    return deployment.bind(options)
