"""Runs the application of examples/deploy with Ray's Python. Each line of stdin is MIN MAX, the bounds of replicas; "deployed MIN MAX"
follows as soon as MIN of them answer.

PYTHONPATH=.:examples/deploy ray_driver.py BUNDLE PORT
"""

from __future__ import annotations

import sys
import time

import ray
import ray_serve
from ray import serve


def running() -> int:
    """Replicas that answer."""
    found = serve.status().applications["qwen"].deployments["QwenServer"]
    return found.replica_states.get("RUNNING", 0) if len(found.replica_states) == 1 else -1


def main(bundle: str, port: int) -> None:
    ray.init(num_cpus=8, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    for line in sys.stdin:
        least, most = map(int, line.split())
        options = ray_serve.Options(
            bundle=bundle, slots=4, max_context=2048, threads=1, cpus=1, min_replicas=least, max_replicas=most, drain_s=60
        )
        serve.run(ray_serve.application(options), name="qwen", blocking=False)
        while not least <= running() <= most:
            time.sleep(0.5)
        print(f"deployed {least} {most}", flush=True)
    serve.shutdown()
    ray.shutdown()


main(sys.argv[1], int(sys.argv[2]))
