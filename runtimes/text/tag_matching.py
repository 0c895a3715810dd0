"""Tags in text that is still growing: found, not there, or not certain yet."""

from __future__ import annotations

FUNCTION, CALL = "<function=", "<tool_call>"


def matches(text: str, at: int, tag: str) -> bool | None:
    """Whether `tag` stands at `at`; None while more text could complete it."""
    if text.startswith(tag, at):
        return True
    return None if tag.startswith(text[at : at + len(tag)]) else False


def skip_space(text: str, at: int) -> int:
    """The position of the first character that is not white space."""
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def one_of(text: str, at: int, tags: tuple[str, ...]) -> bool | None:
    """Whether one of `tags` is the first thing behind white space; None while that is open."""
    at = skip_space(text, at)
    found = [matches(text, at, tag) for tag in tags]
    return True if True in found else None if None in found else False


def opens_call(text: str, at: int, behind: tuple[str, ...] = (FUNCTION,)) -> bool | None:
    """Whether `<tool_call>` stands at `at`, with one of `behind` behind it."""
    found = matches(text, at, CALL)
    return one_of(text, at + len(CALL), behind) if found else found
