"""Where checkpoints keep their chat templates and special tokens: read as transformers reads them, and the same from the bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_export.building.text_assets import check_text_assets, copy_text_assets
from qwen_export.errors import BundleError, CheckpointError, TemplateError
from qwen_export.runtimes.text.text_files import TextFiles
from tests.support.text_files import copy_text_files, edit_json

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "go"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
TEXT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ eos_token }}\n{% endfor %}{{ image_token }}"
TOKEN = {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
IMAGE = TOKEN | {"content": "<|image_pad|>"}


def write_templates(path: Path, file: str = "", named: Any = None, folder: dict[str, str] | None = None, legacy: str = "") -> None:
    (path / "chat_template.jinja").unlink()
    if file:
        (path / "chat_template.jinja").write_text(file)
    edit_json(path / "tokenizer_config.json", lambda c: c.pop("chat_template", None) if named is None else c.update(chat_template=named))
    for name, source in (folder or {}).items():
        (path / "additional_chat_templates").mkdir(exist_ok=True)
        (path / "additional_chat_templates" / f"{name}.jinja").write_text(source)
    if legacy:
        (path / "chat_template.json").write_text(json.dumps({"chat_template": legacy}))


LIST = [{"name": "default", "template": "D" + TEXT}, {"name": "tool_use", "template": "T" + TEXT}, {"name": "rag", "template": "R"}]
PLACES: dict[str, dict[str, Any]] = {
    "file": {"file": TEXT},
    "text in the config": {"named": TEXT},
    "file and config": {"file": "F" + TEXT, "named": LIST},
    "list": {"named": LIST},
    "list without tool_use": {"named": LIST[:1]},
    "file and folder": {"file": "F" + TEXT, "folder": {"tool_use": "X" + TEXT}},
    "folder and config": {"folder": {"default": "X" + TEXT, "rag": "R"}, "named": LIST},
}


@pytest.mark.parametrize("place", PLACES)
def test_templates_of_every_place_render_as_in_transformers(tmp_path: Path, place: str) -> None:
    transformers = pytest.importorskip("transformers")
    path = copy_text_files(tmp_path / "checkpoint")
    write_templates(path, **PLACES[place])
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    check_text_assets(path)
    names = copy_text_assets(path, bundle)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    for tools in (None, TOOLS, []):
        expected = tokenizer.apply_chat_template(MESSAGES, tools=tools, tokenize=False)
        for files in (TextFiles(path), TextFiles(bundle, names)):
            assert files.template.render(MESSAGES, tools, add_generation_prompt=False) == expected


def test_the_file_of_older_processors_is_read_last(tmp_path: Path) -> None:
    path = copy_text_files(tmp_path / "checkpoint")
    write_templates(path, legacy="L" + TEXT)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    names = copy_text_assets(path, bundle)
    assert TextFiles(bundle, names).template.render(MESSAGES).startswith("L")
    edit_json(path / "tokenizer_config.json", lambda c: c.update(chat_template="C" + TEXT))
    assert TextFiles(path).template.render(MESSAGES).startswith("C")


def test_a_set_without_a_default_says_which_there_are(tmp_path: Path) -> None:
    path = copy_text_files(tmp_path / "checkpoint")
    write_templates(path, named=LIST[1:])
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    files = TextFiles(bundle, copy_text_assets(path, bundle))
    assert files.template.render(MESSAGES, TOOLS).startswith("T")
    with pytest.raises(TemplateError, match=r"none of the chat templates.*rag, tool_use"):
        files.template.render(MESSAGES)


def without_decoder(**tokens: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        del config["added_tokens_decoder"]
        config.update(tokens)

    return change


SPECIAL: dict[str, tuple[Callable[[dict[str, Any]], Any], dict[str, Any] | None]] = {
    "object": (lambda c: c.update(eos_token=TOKEN), None),
    "mapping": (lambda c: c.update(extra_special_tokens={"image_token": "<|image_pad|>"}), None),
    "mapping of objects": (lambda c: c.update(extra_special_tokens={"image_token": IMAGE}), None),
    "list": (lambda c: c.update(extra_special_tokens=["<|image_pad|>"]), None),
    "key of its own": (lambda c: c.update(image_token="<|image_pad|>"), None),
    "map": (without_decoder(eos_token="<|im_start|>"), {"eos_token": {k: v for k, v in TOKEN.items() if k != "__type"}}),
    "map with a mapping": (without_decoder(), {"extra_special_tokens": {"image_token": "<|image_pad|>"}}),
    "map that is not read": (lambda c: c.update(eos_token="<|im_start|>"), {"eos_token": "<|im_end|>"}),
    "none": (lambda c: c.update(eos_token=None), None),
    "of the class": (lambda c: (c.pop("eos_token"), c.update(tokenizer_class="Qwen2Tokenizer")), None),
}


@pytest.mark.parametrize("form", SPECIAL)
def test_special_tokens_of_every_form_are_those_of_transformers(tmp_path: Path, form: str) -> None:
    transformers = pytest.importorskip("transformers")
    path = copy_text_files(tmp_path / "checkpoint")
    write_templates(path, file=TEXT)
    change, stored = SPECIAL[form]
    edit_json(path / "tokenizer_config.json", change)
    if stored is not None:
        (path / "special_tokens_map.json").write_text(json.dumps(stored))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    files = TextFiles(bundle, copy_text_assets(path, bundle))
    assert files.special_tokens == tokenizer.special_tokens_map
    assert files.template.render(MESSAGES) == tokenizer.apply_chat_template(MESSAGES, tokenize=False)


def test_a_special_token_of_the_config_alone_is_shielded(tmp_path: Path) -> None:
    path = copy_text_files(tmp_path)
    edit_json(path / "tokenizer.json", lambda t: [a.update(special=False) for a in t["added_tokens"]])
    edit_json(path / "tokenizer_config.json", lambda c: c.update(extra_special_tokens=["<|video_pad|>"], eos_token=TOKEN))
    (path / "chat_template.jinja").write_text("{{ messages }}")
    assert {"<|video_pad|>", "<|im_end|>", "<think>"} <= TextFiles(path).tokenizer.control


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "template that is not UTF-8": ("chat_template.jinja", b"\xff\xfe{{", "not UTF-8"),
    "template that is not Jinja": ("chat_template.jinja", b"a\n{% if %}", "not valid Jinja.*line 2"),
    "template that is too long": ("chat_template.jinja", b"a" * (1 << 21), "too long"),
    "template that is nested too deep": ("chat_template.jinja", b"{{ " + b"(" * 5000 + b"1" + b")" * 5000 + b" }}", "not valid Jinja"),
    "tokenizer that is not UTF-8": ("tokenizer.json", b"\xff\xfe", "the tokenizer cannot be read"),
    "tokenizer that is none": ("tokenizer.json", b"{}", "the tokenizer cannot be read"),
    "config that is not UTF-8": ("tokenizer_config.json", b"\xff", "not UTF-8"),
    "config that is not JSON": ("tokenizer_config.json", b"{", "not valid JSON"),
    "config that is a list": ("tokenizer_config.json", b"[]", "not a JSON object"),
    "templates that are no texts": ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}', "template cannot be read"),
    "templates that are a number": ("tokenizer_config.json", b'{"chat_template": 7}', "template cannot be read"),
    "token with another id": ("tokenizer_config.json", b'{"added_tokens_decoder": {"3": {"content": "<think>"}}}', "do not agree"),
    "token that is missing": ("tokenizer_config.json", b'{"added_tokens_decoder": {"9000": {"content": "<new>"}}}', "do not agree"),
    "settings that are not UTF-8": ("generation_config.json", b"\xff", "not UTF-8"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_files_that_cannot_be_used_are_refused_before_a_build(tmp_path: Path, case: str) -> None:
    name, content, message = BROKEN[case]
    path = copy_text_files(tmp_path)
    if b"chat_template" in content:
        (path / "chat_template.jinja").unlink()
    (path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        check_text_assets(path)
    assert caught.value.fix and "\n" not in str(caught.value)


def test_a_bundle_with_such_a_file_is_an_error_of_the_bundle(tmp_path: Path) -> None:
    path = copy_text_files(tmp_path)
    (path / "chat_template.jinja").write_bytes(b"\xff")
    files = TextFiles(path, ["chat_template.jinja"])
    with pytest.raises(BundleError, match="not UTF-8"):
        _ = files.template
    with pytest.raises(BundleError, match="there is no tokenizer"):
        _ = TextFiles(path, []).tokenizer
    with pytest.raises(BundleError, match="there is no chat template"):
        _ = TextFiles(path, []).template
