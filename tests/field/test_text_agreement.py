"""`build`, `verify`, `check` and `run` find the same faults in tokenizer, template and plugin."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from qwen_export import build
from qwen_export.commands.cli import main
from qwen_export.errors import QwenExportError
from tests.support.manifests import edit_manifest

FAULTS: dict[str, tuple[str, bytes]] = {
    "no JSON": ("tokenizer.json", b"{"),
    "no tokenizer": ("tokenizer.json", b'{"version": "1.0"}'),
    "not UTF-8": ("chat_template.jinja", b"{{ messages }} \xff"),
    "no template": ("chat_template.jinja", b"{% for %}"),
    "a template that refuses": ("chat_template.jinja", b"{{ raise_exception('no') }}"),
    "a template that fails": ("chat_template.jinja", b"{{ nothing.at.all }}"),
    "no settings": ("generation_config.json", b"[]"),
    "a stop token that is none": ("generation_config.json", b'{"eos_token_id": "x"}'),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_all_commands_refuse_it(
    fault: str, checkpoint_copy: Path, bundle_copy: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    name, content = FAULTS[fault]
    (bundle_copy / name).write_bytes(content)
    size, sha256 = len(content), hashlib.sha256(content).hexdigest()
    edit_manifest(bundle_copy, lambda manifest: manifest["files"].update({name: {"size": size, "sha256": sha256}}))
    question = ["x", "--chat", "--max-new-tokens", "1"]
    arguments = (
        ["check", str(bundle_copy)],
        ["verify", str(bundle_copy), "--reference", str(checkpoint_copy)],
        ["run", str(bundle_copy), *question],
    )
    for words in arguments:
        with pytest.raises(SystemExit) as stopped:
            main(words)
        err = capsys.readouterr().err
        assert stopped.value.code == 1 and err.splitlines()[-1].startswith("error: "), (words, err)
    (checkpoint_copy / name).write_bytes(content)
    with pytest.raises(QwenExportError):
        build(checkpoint_copy, tmp_path / "built")
    assert not (tmp_path / "built").exists()


def test_check_loads_the_plugin(bundle_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A library with the right hash that the system cannot load."""
    name = "libqwen_export_cpu.so"
    if not (bundle_copy / name).exists():
        pytest.skip("the CPU plugin is not compiled")
    content = b"\x7fELF of another machine"
    (bundle_copy / name).write_bytes(content)
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(bundle_copy, lambda manifest: manifest["files"].update({name: entry}))
    for words in (["check", str(bundle_copy)], ["run", str(bundle_copy), "x"]):
        with pytest.raises(SystemExit):
            main(words)
        assert "cannot be loaded on this machine" in capsys.readouterr().err
