"""One process with DirectML for all tests. Needs tests/directml/set_up.sh, root, and about 10 GB of memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.directml.wine_server import WineServer


@pytest.fixture(scope="module")
def server() -> Iterator[WineServer]:
    running = WineServer()
    yield running
    running.close()
