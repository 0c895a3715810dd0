"""One line on how an answer went: tokens, speed, why it ended, and how its drafts did."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen_export.runtimes.decoding.generation import SpeculationStatistics, Statistics

CONTEXT_FULL = "context full"
FINISH = {"overflow": CONTEXT_FULL, "cancelled": "interrupted"}
"""How `Statistics.finish` is shown, where that is not the word itself."""


def shown_finish(finish: str) -> str:
    """Why an answer ended, in words for people."""
    return FINISH.get(finish, finish)


def answer_summary(s: Statistics, ended: str = "") -> str:
    """`ended`: why the answer ended, where the statistics do not have it."""
    read = f"{s.prompt_tokens} prompt tokens" + (f" ({s.reused_tokens} reused)" if s.reused_tokens else "")
    return (
        f"{read}, first token after {s.first_token_s:.3f} s ({s.prefill_tok_per_s:.0f} tok/s), "
        f"{s.new_tokens} new tokens at {s.decode_tok_per_s:.1f} tok/s, {ended or shown_finish(s.finish)}{_drafts(s.speculation)}"
    )


def _drafts(s: SpeculationStatistics) -> str:
    if not sum(s.drafted):
        return ""
    shares = " / ".join(f"{share:.0%}" for share in s.acceptance)
    return (
        f"\n{s.rounds} rounds of {s.tokens_per_round:.2f} tokens, drafts kept {shares}; "
        f"draft {s.draft_s:.2f} s, verify {s.verify_s:.2f} s, host {s.host_s:.2f} s"
    )
