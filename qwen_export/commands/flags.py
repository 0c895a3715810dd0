"""Flags of the command line for the parameters of the Python API, as error messages print them."""

from __future__ import annotations

# Parameters whose flag is not their name with dashes.
_OTHER = {"mtp": "--no-mtp", "enable_thinking": "--thinking/--no-thinking", "max_new_tokens": "--max-new-tokens"}


def flag(parameter: str) -> str:
    """The flag of a parameter, such as --max-context of max_context."""
    return _OTHER.get(parameter, "--" + parameter.replace("_", "-"))
