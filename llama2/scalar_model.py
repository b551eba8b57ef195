"""A decoder with a scalar at each token: a reward model, or the critic of PPO."""

from dataclasses import replace
from types import ModuleType
from typing import Self

import torch
from torch import Tensor, nn

from llama2.config import ModelConfig
from llama2.decoder import Decoder


class ScalarModel(Decoder):
    """A Llama 2 decoder whose head gives one number for each token, s_t = w · h_t.

    Of a sequence the number at its last token has seen all of it. For a reward model that is the
    logit of the reward, which lies in (0, 1). The head is drawn as the decoder's weights are, from
    N(0, 0.02²); it is never tied to the embedding.

    Source: Touvron et al. 2023, arXiv:2307.09288, section 3.2.2. Parameters carry the names of
    Transformers' LlamaForSequenceClassification without the leading `model.`.
    """

    def __init__(self, config: ModelConfig, ops: ModuleType) -> None:
        super().__init__(replace(config, tie_word_embeddings=False), ops)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self._keep_whole()
        self.reset_parameters()

    @classmethod
    def from_decoder(cls, decoder: Decoder, ops: ModuleType, *, seed: int) -> Self:
        """Returns a model that begins with the weights of a decoder, in its dtype and on its
        device, in training mode.

        Args:
            seed: of the head, which is drawn unless the decoder has one, as a ScalarModel has.
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
        `[batch, seq_len]`; packed with `cu_seqlens`, as `hidden_states` takes them, whose errors it
        raises.

        The head computes in float32: neighbouring numbers of 16 bits are too far apart to tell
        which of two answers is better.
        """
        hidden = self.hidden_states(tokens, cu_seqlens=cu_seqlens)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.to(wide) @ self.score.weight[0].to(wide)
