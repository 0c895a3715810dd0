"""Names that builds write into a bundle and that runtimes look for. Imports nothing.

The graphs of a bundle with fixed shapes; a bundle with dynamic shapes has `decoder` and, with a draft head, `mtp`:

    decoder      one token that is committed, with logits          mtp           one row of the draft head, with logits
    verify       W tokens whose fate may be open, all logits       mtp_verify    up to W rows, the logits of one
    prefill      T tokens of a prompt, no logits                   mtp_prefill   up to T rows, no logits

`verify` is there with speculation, the right column with a draft head.
"""

from __future__ import annotations

STEP, VERIFY, PROMPT = "decoder", "verify", "prefill"
HEAD_STEP, HEAD_VERIFY, HEAD_PROMPT = "mtp", "mtp_verify", "mtp_prefill"
DECODER_GRAPHS, HEAD_GRAPHS = (STEP, VERIFY, PROMPT), (HEAD_STEP, HEAD_VERIFY, HEAD_PROMPT)

INPUT_IDS, LOGIT_ROWS = "input_ids", "logit_rows"
"""Inputs of every graph: token ids i64[B,T], and which of the B*T rows get logits, i64[N]."""

TABLES = ("cos", "sin")
"""Inputs with the rotary tables, a row per cache slot."""

LENGTH, LAST_SLOT, TOTAL_LENGTH = "length", "last_slot", "total_length"
"""Tokens read before, per sequence; on GroupQueryAttention the last two instead: length + T - 1 of each sequence, and their maximum + 1. A
graph with dynamic shapes that has the first takes several tokens of several sequences, each behind its own past, in one call."""

ACCEPTED, COMMIT = "accepted", "commit"
"""How many pending tokens of a sequence enter its state before the new ones, and how many of the new ones do."""

LOGITS, HIDDEN, HIDDEN_OUT = "logits", "hidden", "hidden_out"
"""Outputs: logits f32[N,V] of the chosen rows; hidden states [B,T,H], which are an input of the draft head, whose own are `hidden_out`."""

TOP_LOGITS, TOP_IDS = "top_logits", "top_ids"
"""Outputs with the largest entries of each row of logits: f32 and i32 [N,K], larger first, of equal ones the lower id first."""

TOP_COUNT = 64
"""K, where the vocabulary has as many: twice and more what samplers keep (top-k 20), and as many as the CUDA kernel sorts at once."""

VISION = "vision"
"""The graph of the tower, in bundles that read pictures. A call has B slices of one size, of K tokens of M patches each. A bundle with
fixed shapes has a graph for each of some K, which reads one slice of at most so many tokens."""
VISION_INPUTS = ("rows", "index", "weight", "patch_cos", "patch_sin")
"""Its inputs: patches f32[B,K,M,W]; rows of the table of positions i64[K,M,4] and their weights f32[K,M,4]; cos and sin of the angles of
each patch f32[K,M,D/2]."""

REAL_TOKENS = "real_tokens"
"""Input of a tower with fixed shapes: how many of its K tokens the slice has, i32[1]."""

FEATURES, PLACES = "features", "places"
"""What the tower made, [B,K,H]; decoder and draft head of such a bundle read [K,H] of it for K of their B*T tokens, at rows i64[K]. With
fixed shapes they read [T,H], a row for each token, and i32[T]: 1 for the tokens whose row counts."""

RUNTIMES = ("onnxruntime", "openvino")
"""Backends that run the graphs of the portable target."""

NEXT = ".next"
"""What the name of a state's output adds to that of its input."""


def tower_name(tokens: int) -> str:
    """The graph of a tower with fixed shapes."""
    return f"{VISION}_{tokens}"


def is_tower(graph: str) -> bool:
    return graph == VISION or graph.startswith(f"{VISION}_")
