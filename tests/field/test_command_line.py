"""What people do with the command line: prompts from everywhere, wrong values, interrupts, readers that go, devices that are full."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qwen_export import build
from qwen_export.commands.progress import LINE_EVERY_S, line_reports
from qwen_export.commands.speed_plot import readable_labels
from qwen_export.errors import ParameterError
from qwen_export.manifest import load_manifest
from qwen_export.runtimes import load
from qwen_export.runtimes.backends.compatibility import check_limits, needed_memory
from qwen_export.runtimes.backends.integrity import forget
from tests.support.command_line import caller

GREEDY = ("--greedy", "--max-new-tokens", "4")


@pytest.fixture
def run(capfdbinary: pytest.CaptureFixture[bytes]) -> Any:
    """Run a command; returns exit code, stdout, stderr."""
    return caller(capfdbinary, "replace")


def process(*arguments: str | Path, module: str = "qwen_export", **options: Any) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.Popen(words, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}, stderr=subprocess.PIPE, **options)


# Prompts


def test_prompts_come_from_everywhere(run: Any, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Licensed ünder\nthe"
    file = tmp_path / "prompt.txt"
    file.write_text(text, encoding="utf-8")
    expected = run("run", tiny_bundle, text, *GREEDY)
    assert expected[0] == 0
    assert run("run", tiny_bundle, f"@{file}", *GREEDY)[1] == expected[1]
    assert run("run", tiny_bundle, "--prompt-file", file, *GREEDY)[1] == expected[1]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert run("run", tiny_bundle, "-", *GREEDY)[1] == expected[1]


@pytest.mark.parametrize("content", [b"abc \xff", b"\xff\xfea\0", None])
def test_a_prompt_that_is_not_utf_8(run: Any, tiny_bundle: Path, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "prompt.txt"
    if content is not None:
        file.write_bytes(content)
    for arguments in ((f"@{file}",), ("--prompt-file", file)):
        code, _, err = run("run", tiny_bundle, *arguments)
        assert code == 1 and err.count("\n") == 1 and str(file) in err
    code, _, err = run("bench", tiny_bundle, "--text", file)
    assert code == 1 and err.count("\n") == 1 and "--text" in err


def test_no_prompt_and_two_prompts_are_wrong_usage(run: Any, tiny_bundle: Path) -> None:
    assert run("run", tiny_bundle)[0] == 2
    assert run("run", tiny_bundle, "x", "--prompt-file", "y")[0] == 2


def test_json_has_the_answer_and_the_figures(run: Any, tiny_bundle: Path) -> None:
    code, out, _ = run("run", tiny_bundle, "Licensed", *GREEDY, "--json")
    result = json.loads(out)
    assert code == 0 and len(result["tokens"]) == 4 and result["finish"] == "length"
    assert result["statistics"]["new_tokens"] == 4
    assert run("run", tiny_bundle, "Licensed", *GREEDY)[1] == result["text"] + "\n"
    code, out, _ = run("check", tiny_bundle, "--json")
    assert code == 0 and json.loads(out)["runnable"] and json.loads(out)["memory"]["needed"] > 0
    code, out, err = run("check", tiny_bundle, "--json", "--device", "cuda")
    assert code == 1 and not json.loads(out)["runnable"] and json.loads(out)["error"] in err


def test_quiet_prints_the_result_only(run: Any, tiny_bundle: Path) -> None:
    assert run("run", tiny_bundle, "Licensed", *GREEDY, "--quiet")[2] == ""
    assert "new tokens" in run("run", tiny_bundle, "Licensed", *GREEDY)[2]


# Values


@pytest.mark.parametrize(
    "arguments",
    [
        ("build", "C", "-o", "x", "--max-memory", "nan"),
        ("build", "C", "-o", "x", "--max-memory", "inf"),
        ("build", "C", "-o", "x", "--max-memory", "-1"),
        ("build", "C", "-o", "x", "--max-memory", "1e300"),
        ("build", "C", "-o", "x", "--max-context", "0"),
        ("build", "C", "-o", "x", "--jobs", "1000000"),
        ("build", "C", "-o", "x", "--target", "tensorrt", "--workspace", "nan"),
        ("run", "B", "x", "--weight-budget", "nan"),
        ("run", "B", "x", "--temperature", "nan"),
        ("run", "B", "x", "--top-p", "inf"),
        ("run", "B", "x", "--threads", "100000"),
        ("run", "B", "x", "--threads", "0"),
        ("run", "B", "x", "--threads", "-1"),
        ("run", "B", "x", "--max-context", "0"),
        ("run", "B", "x", "--max-context", "-5"),
        ("run", "B", "x", "--device-id", "-1"),
        ("run", "B", "x", "--speculate", "9" * 30),
        ("run", "B", "x", "--template-kwarg", "no value"),
        ("bench", "B", "--plot", "x.xyz"),
        ("bench", "B", "--plot", "nowhere/x.png"),
        ("bench", "B", "--threads", "100000"),
        ("bench", "B", "--prompt-tokens", "0"),
    ],
)
def test_a_value_out_of_range_is_refused_before_work(
    run: Any, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [{"B": str(tiny_bundle), "C": str(tiny_checkpoint)}.get(word, word) for word in arguments]
    code, out, err = run(*words)
    assert code in (1, 2) and not out and "Traceback" not in err and arguments[-2] in err
    assert not list(tmp_path.iterdir())


def test_limits_of_the_machine(tiny_bundle: Path) -> None:
    manifest = load_manifest(tiny_bundle)
    for values in ({"threads": 0}, {"threads": 10**9}, {"max_context": 0}):
        with pytest.raises(ParameterError) as raised:
            load(tiny_bundle, **values)  # type: ignore[arg-type]
        assert raised.value.parameter == next(iter(values))
    check_limits(manifest, 4096, 2)


def test_weights_count_once_in_what_a_run_needs(tiny_bundle: Path) -> None:
    manifest = load_manifest(tiny_bundle)
    files = sum(manifest.files[name].size for name in ("model.weights", "decoder.onnx", "mtp.onnx", "vision.onnx"))
    caches = 2 * 2 * 64 * 4 * manifest.max_context * 2  # k and v, heads, head size, fp32; decoder and draft head
    assert files + caches * 0.95 < needed_memory(manifest) < (files + caches) * 1.1


# Ends


def test_a_full_context_is_a_normal_end(run: Any, tiny_bundle: Path) -> None:
    code, out, err = run("run", tiny_bundle, "x", "--greedy", "--max-context", "12", "--speculate", "off")
    assert code == 0 and out and "context full" in err
    code, _, err = run("run", tiny_bundle, "x" * 200, "--greedy", "--max-context", "12")
    assert code == 1 and err.startswith("error: ") and "context full" not in err


def test_a_reader_that_goes(tiny_bundle: Path) -> None:
    with process("run", tiny_bundle, "x", "--greedy", "--max-new-tokens", "2000", stdout=subprocess.PIPE) as running:
        assert running.stdout and running.stderr
        running.stdout.read(1)
        running.stdout.close()
        err = running.stderr.read().decode()
        assert running.wait() == 141
    assert "context full" not in err and "Traceback" not in err and "error" not in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_device(tiny_bundle: Path) -> None:
    with open("/dev/full", "wb") as full, process("run", tiny_bundle, "x", *GREEDY, stdout=full) as running:
        assert running.stderr
        err = running.stderr.read().decode()
        assert running.wait() == 1
    assert "device is full" in err and "context full" not in err and "Traceback" not in err


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c(tiny_bundle: Path) -> None:
    with process("run", tiny_bundle, "x", "--temperature", "1", "--seed", "3", stdout=subprocess.PIPE) as running:
        assert running.stdout and running.stderr
        running.stdout.read(1)
        running.send_signal(signal.SIGINT)
        running.stdout.read()
        err = running.stderr.read().decode()
        code = running.wait()
    # The answer may have ended by itself before the signal came.
    assert (code, "interrupted" in err) in ((130, True), (0, False)) and "Traceback" not in err
    assert code == 0 or "context full" not in err


def test_next_advises_what_can_run_here(run: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    code, _, err = run("build", tiny_checkpoint, "-o", tmp_path / "cpu bundle")
    assert code == 0 and f"next: qwen-export verify '{tmp_path}/cpu bundle' --reference" in err
    code, _, err = run("build", tiny_checkpoint, "-o", tmp_path / "dml", "--target", "directml", "--max-context", "128", "--chunk", "16")
    assert code == 0 and "next, on a machine that can run the bundle: qwen-export verify" in err


# Progress and hashing


def test_progress_in_a_pipe_is_a_line_every_few_seconds() -> None:
    clock, lines = [0.0], list[str]()
    report = line_reports("tokens", lines.append, lambda: clock[0])
    for step in range(100):
        clock[0] += LINE_EVERY_S / 10
        report("reading the prompt", step, 100)
    assert lines[0] == "reading the prompt: 9 of 100 tokens" and len(lines) in (9, 10)


def test_a_run_hashes_once_where_the_cache_cannot_be_written(
    run: Any, bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qwen_export.runtimes.backends.integrity as integrity

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    hashed: list[str] = []
    real = integrity.check_hash

    def counted(bundle: Path, name: str, *arguments: Any) -> None:
        hashed.append(name)
        real(bundle, name, *arguments)

    monkeypatch.setattr(integrity, "check_hash", counted)
    forget()
    assert run("run", bundle_copy, "x", *GREEDY)[0] == 0
    assert sorted(hashed) == sorted(load_manifest(bundle_copy).files)


def test_labels_of_a_plot_do_not_overlap() -> None:
    assert readable_labels([128, 512, 2048]) == [128, 512, 2048]
    shown = readable_labels([100, 101, 102, 512, 2000, 2048])
    assert shown[-1] == 2048 and 2000 not in shown and len([n for n in shown if n < 110]) == 1
    assert readable_labels([7]) == [7]


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_an_interrupted_build_says_what_it_keeps(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out, partial = tmp_path / "bundle", tmp_path / ".bundle.partial"
    with process("after", "build", tiny_checkpoint, "-o", out, module="tests.support.weights_only", stdout=subprocess.PIPE) as running:
        assert running.stderr
        while not ((partial / "journal").exists() and (partial / "journal").stat().st_size):
            assert running.poll() is None, running.stderr.read()
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        err, code = running.stderr.read().decode(), running.wait()
    assert code == 130 and "Traceback" not in err
    assert str(partial) in err and "same command goes on" in err and "remove that directory" in err


@pytest.mark.parametrize("values", [{"weights": "refer"}, {"jobs": 0}, {"jobs": 10**9}, {"max_memory": float("nan")}, {"max_memory": 0}])
def test_a_wrong_argument_of_build_is_named(tiny_checkpoint: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    with pytest.raises(ParameterError) as raised:
        build(tiny_checkpoint, tmp_path / "bundle", **values)
    assert raised.value.parameter == next(iter(values)) and not list(tmp_path.iterdir())
