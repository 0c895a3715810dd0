"""The traces that builds of the tests share (tests/support/shared_captures.py) are those that each build would make."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest

from qwen_export.building import lower_graphs as shared
from qwen_export.building.pass_pipeline import print_graph
from qwen_export.graphs import capture
from qwen_export.graphs.config import TextConfig, parse_config
from tests.support.family import tiny_config
from tests.support.shared_captures import through_a_file

OTHER: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.25},
    "max_position_embeddings": 777,
    "eos_token_id": 5,
    "mtp_num_hidden_layers": 1,
}


@pytest.fixture(scope="module")
def config() -> TextConfig:
    """Of the same architecture, with other values of everything that no trace depends on."""
    return parse_config(tiny_config(vision=False, layers=6, vocab_size=300, **OTHER)).text


def as_text(model: ir.Model) -> list[str]:
    """The graph, and the sizes of everything in it."""
    read = through_a_file(model)
    values = [*read.graph.inputs, *read.graph.initializers.values(), *(value for node in read.graph for value in node.outputs)]
    return [print_graph(read.graph), *(f"{value.name}: {value.type}{value.shape}" for value in values)]


def test_one_trace_for_both(config: TextConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = parse_config(tiny_config()).text
    shared.capture_decoder(tiny, "fp32")
    shared.capture_mtp(tiny, "fp32", 512)
    monkeypatch.setattr("torch.export.export", lambda *arguments, **options: pytest.fail("this was traced already"))
    shared.capture_decoder(config, "fp32")
    shared.capture_mtp(config, "fp32", 33)


def test_the_decoder(config: TextConfig) -> None:
    assert as_text(shared.capture_decoder(config, "fp32")) == as_text(capture.capture_decoder(config, "fp32"))


def test_the_draft_head(config: TextConfig) -> None:
    assert as_text(shared.capture_mtp(config, "fp32", 33)) == as_text(capture.capture_mtp(config, "fp32", 33))
