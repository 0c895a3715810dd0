"""The text half of a checkpoint or bundle, read from its files: tokenizer, chat templates, special tokens, generation settings.

Both hold the same files, so that what a build looks at is what a run reads. Precedence is that of transformers:

    templates        chat_template.jinja and additional_chat_templates/*.jinja; without them `chat_template` of tokenizer_config.json,
                     a text or a list of {name, template}; without that chat_template.json, which older processors wrote. A bundle holds
                     the template `default` as chat_template.jinja, and others in chat_templates.json, {name: template}.
    special tokens   tokenizer_config.json: keys that end in _token, as texts or as AddedToken objects, and `extra_special_tokens` as a
                     mapping; in files without `added_tokens_decoder` also special_tokens_map.json
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from qwen_export.errors import BundleError, QwenExportError
from qwen_export.manifest import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG
from qwen_export.runtimes.text.chat_template import DEFAULT, ChatTemplate
from qwen_export.runtimes.text.text_tokenizer import TextTokenizer

SPECIAL_TOKENS_MAP = "special_tokens_map.json"
TEMPLATE_SET = "chat_templates.json"
"""Of a bundle: {name: template}, where a checkpoint has other templates than `default`."""
TEMPLATE_DIRECTORY = "additional_chat_templates"
LEGACY_TEMPLATE = "chat_template.json"


class TextFiles:
    """Reads the files of one directory, each when it is first asked for. `error`: the kind that is raised for a file that is unusable."""

    def __init__(self, directory: Path, listed: Collection[str] | None = None, error: type[QwenExportError] = BundleError) -> None:
        """`listed`: names of the files that count, as the manifest of a bundle has them; None for what the directory holds."""
        self.directory, self._listed, self._error = directory, listed, error

    def has(self, name: str) -> bool:
        return name in self._listed if self._listed is not None else (self.directory / name).exists()

    def text(self, name: str) -> str:
        try:
            return (self.directory / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = "bytes that are not UTF-8" if isinstance(error, UnicodeDecodeError) else error
            raise self._error("a file cannot be read", where=str(self.directory / name), got=reason, fix=_AGAIN) from error

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object; empty where there is no such file."""
        if not self.has(name):
            return {}
        try:
            value = json.loads(self.text(name))
        except (ValueError, RecursionError) as error:
            raise self._error("a file is not valid JSON", where=str(self.directory / name), got=error, fix=_AGAIN) from error
        if not isinstance(value, dict):
            raise self._error("a file is not a JSON object", where=str(self.directory / name), got=type(value).__name__, fix=_AGAIN)
        return value

    @cached_property
    def config(self) -> dict[str, Any]:
        return self.json(TOKENIZER_CONFIG)

    @cached_property
    def templates(self) -> dict[str, str]:
        """Sources of the chat templates by name; empty where there is none."""
        found = {DEFAULT: self.text(CHAT_TEMPLATE)} if self.has(CHAT_TEMPLATE) else {}
        if self._listed is None and (self.directory / TEMPLATE_DIRECTORY).is_dir():
            for path in sorted((self.directory / TEMPLATE_DIRECTORY).glob("*.jinja")):
                found[path.name.removesuffix(".jinja")] = self.text(f"{TEMPLATE_DIRECTORY}/{path.name}")
        found |= self._named(self.json(TEMPLATE_SET), TEMPLATE_SET) if self._listed is not None else {}
        if found:
            return found
        for name, config in ((TOKENIZER_CONFIG, self.config), (LEGACY_TEMPLATE, self.json(LEGACY_TEMPLATE))):
            value = config.get("chat_template")
            if value:
                return self._named(value, f"{name}, chat_template")
        return {}

    def _named(self, value: Any, where: str) -> dict[str, str]:
        if isinstance(value, str):
            return {DEFAULT: value}
        if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
            value = {entry.get("name"): entry.get("template") for entry in value}
        if not isinstance(value, dict) or not all(isinstance(part, str) for pair in value.items() for part in pair):
            raise self._error(
                "the chat template cannot be read",
                where=f"{self.directory}, {where}",
                got=type(value).__name__,
                expected="a text, or a list of {name, template}",
                fix=_AGAIN,
            )
        return value

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """Named special tokens, which are variables of the template."""
        tokens: dict[str, Any] = dict(_CLASS_TOKENS) if str(self.config.get("tokenizer_class", "Qwen")).startswith("Qwen") else {}
        tokens |= {key: value for key, value in self.config.items() if key.endswith("_token")}
        for key in ("extra_special_tokens", "model_specific_special_tokens"):
            extra = self.config.get(key)
            tokens |= extra if isinstance(extra, dict) else {}
        if "added_tokens_decoder" not in self.config:
            stored = self.json(SPECIAL_TOKENS_MAP)
            named = stored.get("extra_special_tokens")
            tokens |= {key: value for key, value in stored.items() if key.endswith("_token")} | (named if isinstance(named, dict) else {})
        return {name: text for name, token in tokens.items() if (text := _content(token)) is not None}

    @cached_property
    def _special(self) -> set[str]:
        """All tokens that tokenizer_config.json marks as special, by any of its ways."""
        marked = set(self.special_tokens.values())
        for key in ("extra_special_tokens", "additional_special_tokens"):
            value = self.config.get(key)
            marked |= {text for token in (value if isinstance(value, list) else ()) if (text := _content(token)) is not None}
        decoder = self.config.get("added_tokens_decoder")
        for token in decoder.values() if isinstance(decoder, dict) else ():
            if isinstance(token, dict) and token.get("special") is True and isinstance(token.get("content"), str):
                marked.add(token["content"])
        return marked

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """Raises the kind of error of this object for a file that is missing or is not a tokenizer."""
        where = str(self.directory)
        if not self.has(TOKENIZER):
            raise self._error("there is no tokenizer", where=where, fix="Add tokenizer.json to the checkpoint and build again.")
        try:
            found = Tokenizer.from_file(str(self.directory / TOKENIZER))
        except Exception as error:  # tokenizers raises bare Exception
            raise self._error("the tokenizer cannot be read", where=str(self.directory / TOKENIZER), got=error, fix=_AGAIN) from error
        self._check_added_tokens(found)
        return TextTokenizer(found, "\n".join(self.templates.values()), self._special)

    def _check_added_tokens(self, tokenizer: Tokenizer) -> None:
        """tokenizer_config.json may name tokens that tokenizer.json does not have, or has with other ids."""
        decoder = self.config.get("added_tokens_decoder")
        for key, token in decoder.items() if isinstance(decoder, dict) else ():
            content = token.get("content") if isinstance(token, dict) else None
            if isinstance(content, str) and str(tokenizer.token_to_id(content)) != key:
                raise self._error(
                    "tokenizer.json and tokenizer_config.json do not agree",
                    where=str(self.directory),
                    got=f"token {content!r} with id {tokenizer.token_to_id(content)}",
                    expected=f"id {key}, as in added_tokens_decoder",
                    fix="Save the tokenizer again with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...).",
                )

    @cached_property
    def template(self) -> ChatTemplate:
        """Raises TemplateError for a template that is not valid, and the kind of error of this object where there is none."""
        if not self.templates:
            raise self._error(
                "there is no chat template",
                where=str(self.directory),
                fix="Continue a plain prompt, without a chat, or add chat_template.jinja to the checkpoint and build again.",
            )
        return ChatTemplate(self.templates, self.special_tokens)


# Of transformers' tokenizer classes for the family, where the file names none.
_CLASS_TOKENS = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}

_AGAIN = "Copy the file from the checkpoint's source again."


def _content(token: Any) -> str | None:
    """The text of a token that is stored as a text or as an AddedToken object."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None
