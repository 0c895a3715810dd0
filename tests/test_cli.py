"""The command line, as processes would call it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_export.bundles.bundle_summary import inspect_bundle
from qwen_export.commands.bundle_text import bundle_text
from qwen_export.runtimes import load
from tests.support.command_line import caller
from tests.support.manifests import write_raw


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Any:
    """Run a command; returns exit code, stdout, stderr."""
    return caller(capfd)


def test_inspect_says_what_can_be_built(run: Any, tiny_checkpoint: Path) -> None:
    code, out, _ = run("inspect", tiny_checkpoint, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["parts"].keys() == {"text", "mtp", "vision"}
    entries = {(t["device"], t["precision"]): t for t in report["targets"] if t["target"] == "onnxruntime"}
    assert entries["cpu", "fp32"]["supported"] and entries["cpu", "fp32"]["bundle_bytes"] > 0
    assert not entries["cpu", "fp16"]["supported"] and "FusedMatMul" in entries["cpu", "fp16"]["why"]
    code, out, _ = run("inspect", tiny_checkpoint)
    assert code == 0 and "yes  onnxruntime cpu fp32" in out


def test_inspect_explains_a_refusal(run: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    code, out, _ = run("inspect", tiny_checkpoint)
    assert code == 0 and "no   onnxruntime cpu fp16" in out
    code, _, err = run("build", tiny_checkpoint, "-o", tmp_path / "nothing", "--precision", "fp16")
    assert code == 1 and err.count("\n") == 1 and "for this device build in fp32" in err
    assert not (tmp_path / "nothing").exists()


def test_inspect_and_build_say_why_there_is_no_draft_head(run: Any, make_checkpoint: Any, tmp_path: Path) -> None:
    bare = make_checkpoint(with_mtp=False)
    _, out, _ = run("inspect", bare)
    assert "no tensor mtp.* is stored" in out
    _, out, _ = run("inspect", bare, "--json")
    assert not any(entry["draft_head"] for entry in json.loads(out)["targets"] if entry["supported"])
    code, _, err = run("build", bare, "-o", tmp_path / "bundle")
    assert code == 0 and "no draft head: config.json sets mtp_num_hidden_layers to 1, but no tensor mtp.* is stored" in err


def test_inspect_counts_the_parameters_that_a_token_uses(run: Any, demo_moe_checkpoint: Path) -> None:
    code, out, _ = run("inspect", demo_moe_checkpoint, "--json")
    model = json.loads(out)["model"]
    experts = 8 * 24 * 3 * 256 * 32
    assert code == 0 and model["parameters"] - model["active_parameters"] == experts * 20 // 24
    code, out, _ = run("inspect", demo_moe_checkpoint)
    assert "4 of 24 experts" in out and "yes  onnxruntime cpu fp32" in out


def test_estimated_bundle_size_is_right(run: Any, demo_checkpoint: Path, demo_bundle: Path) -> None:
    _, out, _ = run("inspect", demo_checkpoint, "--json")
    estimate = next(t for t in json.loads(out)["targets"] if (t["device"], t["precision"]) == ("cpu", "fp32"))["bundle_bytes"]
    real = (demo_bundle / "model.weights").stat().st_size
    assert abs(estimate / real - 1) < 0.02


def test_inspect_says_what_a_sequence_takes(run: Any, demo_bundle: Path) -> None:
    code, out, _ = run("inspect", demo_bundle, "--json")
    sequence = json.loads(out)["sequence"]
    with load(demo_bundle) as model:
        decoder, drafting = model.decoder(), model.decoder(drafts=True)
    assert code == 0 and sequence["state_bytes"] == decoder.sequence_bytes(0)
    assert sequence["token_bytes"] * 512 == drafting.sequence_bytes(512) - drafting.sequence_bytes(0)
    assert (sequence["token_bytes"] - sequence["draft_token_bytes"]) * 512 == decoder.sequence_bytes(512) - decoder.sequence_bytes(0)
    assert sequence["full_bytes"] == sequence["state_bytes"] + 8192 * sequence["token_bytes"]
    assert "KiB per token" in run("inspect", demo_bundle)[1]


def test_verify_reports_each_check_and_records_the_result(run: Any, demo_checkpoint: Path, demo_bundle_copy: Path) -> None:
    code, out, _ = run("verify", demo_bundle_copy, "--reference", demo_checkpoint, "--json")
    result = json.loads(out)
    assert code == 0 and result["passed"]
    errors = {(c["name"], c["against"]): c["max_abs_error"] for c in result["checks"]}
    assert errors["prefill", "transformers"] <= 1e-4
    assert errors["decode", "eager"] <= 1e-4 and errors["chunked prefill", "eager"] <= 1e-4
    assert errors["snapshot, restore, rewind", "itself"] == 0
    code, out, _ = run("check", demo_bundle_copy)
    assert code == 0 and "passed" in out and "runnable   yes" in out


def test_verify_refuses_another_checkpoint(run: Any, tiny_checkpoint: Path, demo_bundle: Path) -> None:
    code, _, err = run("verify", demo_bundle, "--reference", tiny_checkpoint)
    assert code == 1 and err.startswith("error: ") and "not the checkpoint" in err


def test_verify_finds_a_wrong_weight(run: Any, demo_checkpoint: Path, demo_bundle_copy: Path) -> None:
    """A bundle whose hashes match but whose numbers do not: the builder itself was wrong."""
    import numpy as np

    from qwen_export.manifest import hash_file

    weights = demo_bundle_copy / "model.weights"
    data = np.fromfile(weights, np.float32)
    data[len(data) // 2 :] *= 1.01
    data.tofile(weights)
    manifest = json.loads((demo_bundle_copy / "manifest.json").read_text())
    manifest["files"]["model.weights"]["sha256"] = hash_file(weights).sha256
    write_raw(demo_bundle_copy, json.dumps(manifest))
    code, out, err = run("verify", demo_bundle_copy, "--reference", demo_checkpoint)
    assert code == 1 and "FAIL" in out and "not the same model" in err


def test_run_streams_to_stdout_and_reports_to_stderr(run: Any, demo_bundle: Path) -> None:
    code, out, err = run("run", demo_bundle, "def f(x):\n", "--greedy", "--max-new-tokens", "8")
    assert code == 0 and out.strip()
    assert "tok/s" in err and "8 new tokens" in err and "first token" in err
    again = run("run", demo_bundle, "def f(x):\n", "--greedy", "--max-new-tokens", "8")
    assert again[1] == out


def test_run_with_a_seed_is_reproducible(run: Any, demo_bundle: Path) -> None:
    flags = (
        "--temperature",
        "1.2",
        "--top-k",
        "40",
        "--top-p",
        "0.99",
        "--min-p",
        "0.01",
        "--presence-penalty",
        "0.5",
        "--max-new-tokens",
        "16",
    )
    first = run("run", demo_bundle, "def f(x):\n", *flags, "--seed", "7")
    assert first[0] == 0 and first[1] == run("run", demo_bundle, "def f(x):\n", *flags, "--seed", "7")[1]


def test_run_chats_with_and_without_thinking(run: Any, demo_bundle: Path) -> None:
    question = "What does the function os.path.join do?"
    plain = run("run", demo_bundle, question, "--chat", "--no-thinking", "--greedy", "--max-new-tokens", "30", "--system", "Be short.")
    thinking = run("run", demo_bundle, question, "--chat", "--thinking", "--greedy", "--max-new-tokens", "30", "--preserve-thinking")
    assert plain[0] == thinking[0] == 0 and plain[1] != thinking[1]


def test_an_option_of_chats_asks_a_chat(run: Any, demo_bundle: Path) -> None:
    arguments = ("run", demo_bundle, "What is os.path?", "--greedy", "--max-new-tokens", "8", "--preserve-thinking")
    assert run(*arguments)[1] == run(*arguments, "--chat")[1]


@pytest.mark.parametrize(("flag", "value"), [("--top-p", "1.5"), ("--temperature", "-1"), ("--max-new-tokens", "0")])
def test_a_flag_out_of_range_is_one_sentence(run: Any, demo_bundle: Path, flag: str, value: str) -> None:
    code, out, err = run("run", demo_bundle, "x", flag, value)
    assert code == 1 and not out and err.startswith("error: ") and err.count("\n") == 1


def test_bench_prints_the_figures_and_draws_them(run: Any, demo_bundle: Path, tmp_path: Path) -> None:
    plot = tmp_path / "speed.png"
    code, out, _ = run("bench", demo_bundle, "--prompt-tokens", "16,32", "--new-tokens", "6", "--json", "--plot", plot)
    result = json.loads(out)
    assert code == 0 and [row["tokens"] for row in result["prefill"]] == [16, 32]
    assert result["decode_tok_per_s"] > 0 and result["load_s"] > 0 and result["peak_rss_mb"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_bench_beyond_the_context_is_refused(run: Any, demo_bundle: Path) -> None:
    code, _, err = run("bench", demo_bundle, "--prompt-tokens", "100000")
    assert code == 1 and "does not fit" in err


def test_unknown_commands_and_options_exit_with_two(run: Any) -> None:
    assert run("fly")[0] == 2
    assert run("build", "x")[0] == 2


@pytest.mark.parametrize(
    ("speculation", "said"),
    [
        (None, "none: it was built without speculation"),
        ({"max_draft": 3, "draft_vocab": 0}, "up to 3 a round, from the text (run --speculate lookup)"),
        ({"max_draft": 3, "draft_vocab": 99}, "up to 3 a round, by its draft head, among the lowest 99 ids, or from the text"),
    ],
)
def test_inspect_says_who_drafts(speculation: dict[str, int] | None, said: str, tiny_bundle: Path) -> None:
    report = inspect_bundle(tiny_bundle) | {"speculation": speculation}
    assert f"drafts     {said}" in bundle_text(report).splitlines()


def test_inspect_says_what_a_bundle_is(run: Any, tiny_bundle: Path) -> None:
    code, out, _ = run("inspect", tiny_bundle)
    assert code == 0 and out.startswith("This is a bundle for target onnxruntime on cpu in fp32, made by qwen-export")
    for text in (
        "4 layers (3 DeltaNet, 1 attention)",
        "recurrent state fp32",
        "any number of tokens a call",
        "onnxruntime 1.31.0 or newer",
    ):
        assert text in out
    assert f"qwen-export check {tiny_bundle}" in out and f"qwen-export verify {tiny_bundle} --reference CHECKPOINT" in out
    code, out, _ = run("inspect", tiny_bundle, "--json")
    report = json.loads(out)
    assert report["target"]["device"] == "cpu" and report["graphs"]["decoder"]["tokens"] is None and report["engine"] is None


def test_inspect_of_a_bundle_hashes_nothing(run: Any, bundle_copy: Path) -> None:
    (bundle_copy / "model.weights").unlink()
    code, out, _ = run("inspect", bundle_copy)
    assert code == 0 and "bundle" in out


def test_a_bundle_is_no_checkpoint(run: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    code, _, err = run("build", tiny_bundle, "-o", tmp_path / "b")
    assert code == 1 and "this is a bundle, not a checkpoint" in err and "qwen-export check" in err
    code, _, err = run("inspect", tiny_bundle, "--target", "tensorrt")
    assert code == 2 and "are for checkpoints" in err


def test_inspect_refuses_at_plan_time_what_a_gpu_lacks(run: Any, tiny_checkpoint: Path) -> None:
    code, out, _ = run("inspect", tiny_checkpoint, "--target", "tensorrt", "--sm", "8.6,120")
    assert code == 0 and "onnxruntime" not in out
    assert "no   tensorrt cuda fp8" in out and "fp8 weights need SM 89 or newer, and SM 86 is among the targets" in out
    assert "yes  tensorrt cuda int4" in out
    _, out, _ = run("inspect", tiny_checkpoint, "--target", "tensorrt", "--sm", "89", "--json")
    assert {entry["target"] for entry in json.loads(out)["targets"]} == {"tensorrt"}
    assert all(entry["supported"] for entry in json.loads(out)["targets"])
