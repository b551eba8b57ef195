"""A decoder with a scalar at each token: a reward model, or the critic of PPO."""

from dataclasses import replace
from types import ModuleType
from typing import Self

import torch
from torch import Tensor, nn

from llama2.config import ModelConfig
from llama2.decoder import Decoder


class ScalarModel(Decoder):
    """A Llama 2 decoder with a scalar head: one number per token, s_t = w · h_t.

    The number at the last token depends on the whole sequence; for a reward model it is the logit
    of the reward, which is in (0, 1). The head's weights are drawn like the decoder's, from N(0,
    0.02²); the head is never tied to the embedding.

    Source: Touvron et al. 2023, arXiv:2307.09288, section 3.2.2. Parameters have the names of
    Transformers' LlamaForSequenceClassification without the leading `model.`.
    """

    def __init__(self, config: ModelConfig, ops: ModuleType) -> None:
        super().__init__(replace(config, tie_word_embeddings=False), ops)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self._keep_whole()
        self.reset_parameters()

    @classmethod
    def from_decoder(cls, decoder: Decoder, ops: ModuleType, *, seed: int) -> Self:
        """Returns a model with the weights of a decoder, in its dtype and on its device, in
        training mode.

        Args:
            seed: random seed of the head, which is drawn unless the decoder is a ScalarModel.
        """
        weight = decoder.embed_tokens.weight
        with torch.device("meta"):
            model = cls(decoder.config, ops)
        model.to(weight.dtype).to_empty(device=weight.device)
        generator = torch.Generator().manual_seed(seed)
        head = torch.empty(model.score.weight.shape, dtype=torch.float32, device="cpu")
        with torch.no_grad():
            model.score.weight.copy_(head.normal_(std=0.02, generator=generator))
        weights = decoder.state_dict()
        weights.pop("lm_head.weight", None)
        model.load_state_dict({"score.weight": model.score.weight} | weights)
        return model

    def forward(self, tokens: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """Returns the number at each token, float32 or wider `[batch, seq_len]`, of int tokens
        `[batch, seq_len]`; packed with `cu_seqlens` as for `hidden_states`, with the same errors.

        The head computes in float32: 16 bits are too coarse to decide which of two answers is
        better.
        """
        hidden = self.hidden_states(tokens, cu_seqlens=cu_seqlens)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.to(wide) @ self.score.weight[0].to(wide)
