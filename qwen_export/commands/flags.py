"""Flags of the command line for the parameters of the Python API, as error messages print them."""

from __future__ import annotations

# Parameters whose flag is not their name with dashes.
_OTHER = {
    "mtp": "--no-mtp",
    "enable_thinking": "--thinking/--no-thinking",
    "template_kwargs": "--template-kwarg",
    "plan_file": "--plan",
    "hardware_compatibility": "--hardware-compat",
    "version_compatible": "--version-compat",
    "sms": "--sm",
    "hosts": "--media-host",
    "tiling": "--tiling-level",
    "plugins": "--plugin",
    "native": "--native",
    "form": "--json-schema, --json-object, --regex, --choice, --grammar",
    "stop_token_ids": "--stop-token-id",
    "n": "-n",
    "output": "-o",
    "prompt": "PROMPT",
    "messages": "PROMPT",
    "bundle": "BUNDLE",
    "checkpoint": "CHECKPOINT",
}


def flag(parameter: str) -> str:
    """The flag of a parameter, such as --max-context of max_context."""
    return _OTHER.get(parameter, "--" + parameter.replace("_", "-"))
