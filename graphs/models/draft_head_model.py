"""The multi-token-prediction head: one decoder layer that drafts the token after the next one.

    x_i    = fc(norm_e(embedding of token i+1) | norm_h(hidden of token i))        hidden: the decoder's, after its final norm
    out_i  = norm(layer(x)_i)         logits of token i+2 = lm_head(out_i)

(Qwen3.5 release, tensors `mtp.*`; embedding and LM head are the decoder's.) Row i lives in slot i of the head's own cache, and turns by
the angles of slot i. To draft further the head reads its own draft and its own `out` instead of the decoder's hidden state.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from qwen_export.graphs.config import FULL, TextConfig
from qwen_export.graphs.models.model_state import State
from qwen_export.graphs.models.norm_layer import ZeroCenteredRmsNorm
from qwen_export.graphs.models.text_model import DecoderLayer
from qwen_export.graphs.ops.place_features_op import place_features


class _Head(nn.Module):
    """The head's own parameters, named as in the checkpoint."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        H, eps = config.hidden_size, config.rms_norm_eps
        self.pre_fc_norm_embedding = ZeroCenteredRmsNorm(H, eps)
        self.pre_fc_norm_hidden = ZeroCenteredRmsNorm(H, eps)
        self.fc = nn.Linear(2 * H, H, bias=False)
        self.layers = nn.ModuleList([DecoderLayer(config, FULL)])
        self.norm = ZeroCenteredRmsNorm(H, eps)


class MtpHead(nn.Module):
    """`draft_vocab`: drafts are among the lowest that many token ids. `draft_head` is these rows of the decoder's LM head."""

    def __init__(self, config: TextConfig, draft_vocab: int) -> None:
        super().__init__()
        self.config = mtp_config(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.mtp = _Head(config)
        self.draft_head = nn.Linear(config.hidden_size, draft_vocab, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        length: Tensor,
        logit_rows: Tensor,
        state: State,
        features: Tensor | None = None,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, State]:
        """input_ids i64[B,T], the token after each row's; hidden [B,T,H]; cos, sin f32[S,R/2]; length i64[B], rows read before;
        logit_rows i64[N], features [K,H] and places i64[K] as in the decoder -> logits [N,draft_vocab], hidden [B,T,H], next state."""
        mtp = self.mtp
        embedded = self.embed_tokens(input_ids)
        if features is not None:
            embedded = place_features(embedded, features, places)
        x = torch.cat([mtp.pre_fc_norm_embedding(embedded), mtp.pre_fc_norm_hidden(hidden)], dim=-1)
        x, after = mtp.layers[0](mtp.fc(x), state[0], cos, sin, length)
        out = mtp.norm(x)
        return self.draft_head(out.flatten(0, 1).index_select(0, logit_rows)), out, [after]


def mtp_config(config: TextConfig) -> TextConfig:
    """The head as a decoder of one attention layer, as far as states and lowerings go."""
    return replace(config, layer_types=(FULL,))
