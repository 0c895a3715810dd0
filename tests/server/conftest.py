"""One server for the tests that only ask it, on a bundle of the demo checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.live_server import LiveServer, live_server


@pytest.fixture(scope="session")
def server(demo_bundle: Path) -> Iterator[LiveServer]:
    with live_server(demo_bundle) as running:
        yield running
