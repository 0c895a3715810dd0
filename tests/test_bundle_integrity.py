"""Bundles that are damaged, hostile, newer, or not runnable here are refused by load, `check` and `run`, in one sentence each."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_export.commands.cli import main
from qwen_export.errors import BundleError
from qwen_export.manifest import DIGEST, MANIFEST, SCHEMA_VERSION, check_hash, load_manifest
from qwen_export.plugins.native.native_library import LIBRARIES, find_library
from qwen_export.runtimes import load
from qwen_export.runtimes.backends.integrity import ensure_whole, forget
from tests.support.manifests import edit_manifest, write_raw
from tests.support.source_tree import ROOT

TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
PLUGINS = (LIBRARIES["cpu"].file,) if find_library("cpu") else ()
FILES = ("model.weights", "decoder.onnx", "mtp.onnx", "vision.onnx", *TEXT_FILES, *PLUGINS)
Refused = Callable[..., None]


@pytest.fixture
def is_refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """load(), `check` and `run` all refuse the bundle with one line that has all of `mentions`."""

    def refused(bundle: Path, *mentions: str) -> None:
        with pytest.raises(BundleError) as raised:
            load(bundle)
        messages = {str(raised.value)}
        for arguments in (["check", str(bundle)], ["run", str(bundle), "Hello", "--max-new-tokens", "1"]):
            capsys.readouterr()
            with pytest.raises(SystemExit) as stopped:
                main(arguments)
            assert stopped.value.code == 1
            lines = capsys.readouterr().err.splitlines()
            assert len(lines) == 1 and lines[0].startswith("error: ")
            messages.add(lines[0].removeprefix("error: "))
        for message in messages:
            assert "\n" not in message and "Traceback" not in message
            for text in mentions:
                assert text in message

    return refused


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def put(manifest: dict[str, Any], path: str, value: object) -> None:
    """Set `a.b.0.c`; the value `...` removes it."""
    *parents, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    at: Any = manifest
    for parent in parents:
        at = at[parent]
    if value is ...:
        del at[last]
    else:
        at[last] = value


# Whole bundles


def test_the_bundle_lists_all_its_files_and_passes_check(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(load_manifest(tiny_bundle).files) == set(FILES)
    assert {path.name for path in tiny_bundle.iterdir()} == {*FILES, MANIFEST, DIGEST}
    main(["check", str(tiny_bundle)])
    assert "runnable   yes" in capsys.readouterr().out


def test_no_file_names_the_machine_that_built_it(tiny_bundle: Path) -> None:
    for file in tiny_bundle.iterdir():
        content = file.read_bytes()
        assert b"stack_trace" not in content and str(ROOT).encode() not in content, file.name


def test_the_bundle_runs_wherever_it_is_moved(bundle_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = bundle_copy.rename(tmp_path / "a moved bündle")
    link = tmp_path / "link"
    link.symlink_to(moved)
    for path in (moved, link):
        main(["run", str(path), "Licensed", "--greedy", "--max-new-tokens", "2"])
    assert capsys.readouterr().out.strip()


def test_a_file_that_is_not_listed_does_no_harm(bundle_copy: Path) -> None:
    (bundle_copy / "notes.txt").write_text("mine")
    load(bundle_copy)


def test_unknown_fields_of_the_manifest_do_no_harm(bundle_copy: Path) -> None:
    edit_manifest(bundle_copy, lambda m: (put(m, "later", 1), put(m, "graphs.decoder.later", 1), put(m, "target.later", [])))
    load(bundle_copy)


# Damage


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("at", [0, -1])
def test_a_flipped_bit_in_any_file(bundle_copy: Path, is_refused: Refused, name: str, at: int) -> None:
    load(bundle_copy)  # leaves a note that all is well
    flip(bundle_copy / name, at)
    is_refused(bundle_copy, name, "changed or damaged")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(bundle_copy: Path, is_refused: Refused, name: str) -> None:
    (bundle_copy / name).unlink()
    is_refused(bundle_copy, name, "missing")


def test_a_file_that_is_a_directory(bundle_copy: Path, is_refused: Refused) -> None:
    (bundle_copy / "tokenizer.json").unlink()
    (bundle_copy / "tokenizer.json").mkdir()
    is_refused(bundle_copy, "tokenizer.json", "missing")


def test_a_cut_and_a_longer_file(bundle_copy: Path, is_refused: Refused) -> None:
    weights = bundle_copy / "model.weights"
    size = weights.stat().st_size
    for wrong in (size - 4096, size + 1):
        os.truncate(weights, wrong)
        is_refused(bundle_copy, "model.weights", "wrong size", str(wrong), str(size))


def test_no_bundle_at_all(tmp_path: Path, tiny_checkpoint: Path, is_refused: Refused) -> None:
    is_refused(tmp_path / "nowhere", "not a bundle")
    is_refused(tiny_checkpoint, "not a bundle", "qwen-export build")


# What was found whole is remembered until it is written to


def hashed(bundle: Path) -> set[str]:
    """The files that a check reads again."""
    seen: set[str] = set()
    ensure_whole(bundle, load_manifest(bundle), lambda name, count: seen.add(name))
    return seen


def test_a_second_look_hashes_nothing(bundle_copy: Path) -> None:
    assert hashed(bundle_copy) == set(FILES)
    assert hashed(bundle_copy) == set()


def test_a_touched_file_is_hashed_again_and_passes(bundle_copy: Path) -> None:
    load(bundle_copy)
    (bundle_copy / "tokenizer.json").touch()
    assert hashed(bundle_copy) == {"tokenizer.json"}
    (bundle_copy / "decoder.onnx").write_bytes((bundle_copy / "decoder.onnx").read_bytes())
    assert hashed(bundle_copy) == {"decoder.onnx"}
    load(bundle_copy)


def test_a_write_that_keeps_size_and_time_is_noticed(bundle_copy: Path) -> None:
    weights = bundle_copy / "model.weights"
    load(bundle_copy)
    before = weights.stat()
    time.sleep(0.02)  # a tick of the file system's clock
    with weights.open("r+b") as file:
        file.seek(5000)
        file.write(b"\x01\x02\x03\x04")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (weights.stat().st_size, weights.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(BundleError, match="changed or damaged"):
        load(bundle_copy)


def test_a_rewritten_manifest_makes_everything_unknown(bundle_copy: Path) -> None:
    load(bundle_copy)
    edit_manifest(bundle_copy, lambda m: put(m, "producer", "somebody else"))
    assert hashed(bundle_copy) == set(FILES)


@pytest.mark.parametrize("note", ["", "{", "[]", '{"model.weights": 1}'])
def test_a_damaged_note_is_ignored(bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load(bundle_copy)
    for path in (tmp_path / "cache").rglob("*.json"):
        path.write_text(note)
    forget()
    assert hashed(bundle_copy) == set(FILES)


def test_no_place_for_the_note_is_no_error(bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert hashed(bundle_copy) == set(FILES)
    assert hashed(bundle_copy) == set(), "the process remembers what it has hashed"
    forget()
    assert hashed(bundle_copy) == set(FILES)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # a user without a home directory
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    forget()
    assert hashed(bundle_copy) == set(FILES)
    assert not (tmp_path / "~").exists()


def test_unreadable_file(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry, real = load_manifest(bundle_copy).files["decoder.onnx"], Path.open

    def broken(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "decoder.onnx":
            raise OSError(5, "Input/output error")
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", broken)
    with pytest.raises(BundleError, match=r"cannot be read.*decoder\.onnx.*Input/output error"):
        check_hash(bundle_copy, "decoder.onnx", entry)


# Paths that climb out


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "..\\secret", "C:secret", ""])
def test_a_listed_path_outside_the_bundle(bundle_copy: Path, is_refused: Refused, name: str) -> None:
    (bundle_copy.parent / "secret").write_bytes(b"")
    edit_manifest(bundle_copy, lambda m: put(m, "files", m["files"] | {name: {"size": 0, "sha256": "0" * 64}}))
    is_refused(bundle_copy, "outside the bundle")


def test_a_link_out_of_the_bundle(bundle_copy: Path, is_refused: Refused) -> None:
    tokenizer = bundle_copy / "tokenizer.json"
    tokenizer.rename(bundle_copy.parent / "elsewhere.json")
    tokenizer.symlink_to(bundle_copy.parent / "elsewhere.json")
    is_refused(bundle_copy, "tokenizer.json", "link to outside")


def test_a_linked_folder_out_of_the_bundle(bundle_copy: Path, is_refused: Refused) -> None:
    outside = bundle_copy.parent / "outside"
    outside.mkdir()
    (outside / "x").write_bytes(b"")
    (bundle_copy / "folder").symlink_to(outside)
    edit_manifest(bundle_copy, lambda m: put(m, "files", m["files"] | {"folder/x": {"size": 0, "sha256": "0" * 64}}))
    is_refused(bundle_copy, "folder/x", "link to outside")


def test_a_link_in_a_circle(bundle_copy: Path, is_refused: Refused) -> None:
    (bundle_copy / "tokenizer.json").unlink()
    (bundle_copy / "tokenizer.json").symlink_to("tokenizer.json")
    is_refused(bundle_copy, "tokenizer.json")


def test_a_link_inside_the_bundle_is_fine(bundle_copy: Path) -> None:
    (bundle_copy / "tokenizer.json").rename(bundle_copy / "real.json")
    (bundle_copy / "tokenizer.json").symlink_to("real.json")
    load(bundle_copy)


# Manifests


def test_a_newer_schema(bundle_copy: Path, is_refused: Refused) -> None:
    edit_manifest(bundle_copy, lambda m: put(m, "schema", SCHEMA_VERSION + 1))
    is_refused(bundle_copy, "newer qwen-export", f"schema {SCHEMA_VERSION + 1}", "Update")


def test_an_older_schema(bundle_copy: Path, is_refused: Refused) -> None:
    edit_manifest(bundle_copy, lambda m: put(m, "schema", 2))
    is_refused(bundle_copy, "older qwen-export", "schema 2", "Build it again")


@pytest.mark.parametrize("schema", [..., 0, -1, "1", 1.0, True, None, [1]])
def test_a_schema_that_is_none(bundle_copy: Path, is_refused: Refused, schema: object) -> None:
    edit_manifest(bundle_copy, lambda m: put(m, "schema", schema))
    is_refused(bundle_copy, "no schema version")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b'"manifest"', b"\xff\xfe", b"[" * 100_000, b'{"schema": 1}', b"\0" * 100])
def test_a_manifest_that_is_garbage(bundle_copy: Path, is_refused: Refused, text: bytes) -> None:
    write_raw(bundle_copy, text)
    is_refused(bundle_copy, "manifest")


@pytest.mark.parametrize(
    "path",
    [
        "model",
        "target",
        "max_context",
        "rotary",
        "graphs",
        "files",
        "graphs.decoder",
        "graphs.decoder.file",
        "graphs.decoder.inputs",
        "graphs.decoder.states.0.after",
        "target.operators",
        "target.device",
        "rotary.inv_freq",
        "files.model%weights.size",
        "files.model%weights.sha256",
        "files.decoder%onnx",
        "model.max_position_embeddings",
    ],
)
def test_a_manifest_with_a_missing_field(bundle_copy: Path, is_refused: Refused, path: str) -> None:
    raw = json.loads((bundle_copy / MANIFEST).read_text())
    *parents, last = [int(p) if p.isdigit() else p.replace("%", ".") for p in path.split(".")]
    at: Any = raw
    for parent in parents:
        at = at[parent]
    del at[last]
    write_raw(bundle_copy, json.dumps(raw))
    is_refused(bundle_copy, "missing or wrong fields", str(last))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("max_context", "4096"),
        ("max_context", -1),
        ("max_context", None),
        ("stop_ids", 480),
        ("stop_ids", ["480"]),
        ("rotary.scaling", "1"),
        ("rotary.inv_freq", {"0": 1.0}),
        ("target.operators", "com.microsoft.QuickGelu"),
        ("target.minimum_backend", 1.31),
        ("files", []),
        ("files.tokenizer", "x"),
        ("graphs", {}),
        ("graphs.decoder", []),
        ("graphs.decoder.file", "other.onnx"),
        ("graphs.decoder.inputs.0", "input_ids"),
        ("graphs.decoder.inputs.0.shape", [1.5]),
        ("graphs.decoder.inputs.0.shape", ["B", "X"]),
        ("graphs.decoder.inputs.0.shape", [-1]),
        ("graphs.decoder.states.0.name", "layers.9.recurrent"),
        ("graphs.decoder.states.0.grows", "no"),
        ("model.num_attention_heads", "4"),
        ("model.max_position_embeddings", 0),
        ("verification", []),
    ],
)
def test_a_manifest_with_a_wrong_field(bundle_copy: Path, is_refused: Refused, path: str, value: object) -> None:
    edit_manifest(bundle_copy, lambda m: put(m, path, value))
    is_refused(bundle_copy, "missing or wrong fields", MANIFEST)


# Machines that cannot run it


@pytest.mark.parametrize("operator", ["com.microsoft.NoSuchOp", "NoSuchOp", "no.such.domain.Op", ""])
def test_an_operator_that_the_backend_lacks(bundle_copy: Path, is_refused: Refused, operator: str) -> None:
    edit_manifest(bundle_copy, lambda m: m["target"]["operators"].append(operator))
    is_refused(bundle_copy, "lacks operators", operator)


@pytest.mark.parametrize(
    ("field", "value", "mentions"),
    [
        ("minimum_backend", "99.0.0", ("older than the bundle needs", "99.0.0")),
        ("backend", "tvm", ("backend", "tvm")),
        ("device", "tpu", ("device", "tpu", "cpu")),
        ("device", "cuda", ("cuda", "CUDAExecutionProvider")),
    ],
)
def test_another_machine(bundle_copy: Path, is_refused: Refused, field: str, value: str, mentions: tuple[str, ...]) -> None:
    edit_manifest(bundle_copy, lambda m: put(m, f"target.{field}", value))
    is_refused(bundle_copy, *mentions)


def test_an_element_type_that_the_runtime_does_not_know(bundle_copy: Path, is_refused: Refused) -> None:
    def narrow(manifest: dict[str, Any]) -> None:
        graph = manifest["graphs"]["decoder"]
        for tensors, name in (("states", "name"), ("inputs", "name"), ("outputs", "name")):
            for tensor in graph[tensors]:
                if tensor[name].startswith("layers.0.recurrent"):
                    tensor["dtype"] = "float4"

    edit_manifest(bundle_copy, narrow)
    is_refused(bundle_copy, "element types", "float4")


def test_no_onnxruntime(bundle_copy: Path, is_refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_export.runtimes.backends.compatibility.version", lambda: "")
    is_refused(bundle_copy, "ONNX Runtime is not installed", "pip install")
