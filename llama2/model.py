"""The whole Llama 2 network: a decoder and its projection onto the vocabulary.

Reference: Touvron et al. 2023, arXiv:2307.09288.
"""

from types import ModuleType

import torch
from torch import Tensor, nn

from llama2.cache.kv_cache import Cache
from llama2.config import ModelConfig
from llama2.decoder import Decoder
from llama2.head import check_head, check_targets, head_log_probs, head_loss
from llama2.targets import check_ids, divisor, targets_of


class Llama2(Decoder):
    """A Llama 2 model whose ops are a backend, such as `get_backend("triton")`; attributes and
    initial weights as for `Decoder`."""

    def __init__(self, config: ModelConfig, ops: ModuleType) -> None:
        super().__init__(config, ops)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.linear_cross_entropy = ops.linear_cross_entropy
        self.token_log_probs = ops.token_log_probs
        self.sample_tokens = ops.sample_tokens
        self._keep_whole()
        self.reset_parameters()

    def _keep_whole(self) -> None:
        """Also ties head and embedding again, if the config ties them and one of them has been
        replaced."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        super()._keep_whole()

    def _after_loading(self) -> None:
        """Raises ValueError if the head differs from the embedding it is tied to."""
        embedding = self.embed_tokens.weight
        head = self.lm_head.weight if self.config.tie_word_embeddings else embedding
        if head is not embedding and not head.is_meta and not torch.equal(head, embedding):
            raise ValueError(
                "lm_head.weight: expected the values of embed_tokens.weight, as "
                "tie_word_embeddings is true; got different values"
            )
        super()._after_loading()

    def forward(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        num_valid: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        targets: Tensor | None = None,
        reduction: str = "none",
    ) -> Tensor:
        """Returns logits `[batch, seq_len, vocab_size]`; see `hidden_states` for the arguments.

        With targets, int `[batch, seq_len]`, ids or IGNORED, it returns the loss of
        `linear_cross_entropy` with `reduction` instead. Raises ValueError for targets of the wrong
        shape, or a reduction without targets; NotImplementedError for an `lm_head` that is not a
        plain `nn.Linear` without a bias.
        """
        check_targets(self.lm_head, tokens, targets, reduction)
        hidden = self.hidden_states(tokens, cache, num_valid, cu_seqlens=cu_seqlens)
        if targets is None:
            return self.lm_head(hidden)
        op, weight = self.linear_cross_entropy, self.lm_head.weight
        return head_loss(op, hidden, weight, targets, reduction)

    def loss(
        self,
        tokens: Tensor,
        *,
        num_valid: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        num_predictions: Tensor | None = None,
    ) -> Tensor:
        """Returns the mean next-token cross-entropy in nats over int tokens `[batch, seq_len + 1]`.

        Every token except the first of its sequence is predicted once; all predictions have the
        same weight:

        - padded: only the first `num_valid` tokens of each row count, int `[batch]`, each in [0,
          seq_len + 1]. The padding on the right may be any ids of the vocabulary; it changes
          neither the loss nor a gradient.
        - packed: tokens `[1, total]` with `cu_seqlens`, as `hidden_states` takes them. The first
          token of a sequence is not predicted, nor is any token after the last sequence.

        Without any prediction the loss is NaN. With `num_predictions`, a scalar, the loss is the
        sum over the predictions divided by it: losses of parts of a batch, with
        `targets.count_predictions` of the whole batch, add up to the loss of the whole.

        Raises:
            ValueError: tokens with fewer than two columns, an argument of the wrong shape, or both
                `num_valid` and `cu_seqlens`.
            TypeError: as `hidden_states`.
        """
        targets = targets_of(tokens, num_valid, cu_seqlens)
        check_ids(tokens, self.config.vocab_size)
        count = divisor(targets, num_predictions)
        # Causal attention hides the padding on the right from all tokens before it.
        total = self(tokens[:, :-1], cu_seqlens=cu_seqlens, targets=targets, reduction="sum")
        return total / count

    def token_losses(
        self, tokens: Tensor, targets: Tensor, *, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Returns −log p(target) in nats at each token, `[batch, seq_len]`, in float32 or wider; 0
        where the target is IGNORED.

        Args:
            tokens: int `[batch, seq_len]`; packed with `cu_seqlens`, as `hidden_states` takes them.
            targets: int64 `[batch, seq_len]`, ids or IGNORED.
        """
        return self(tokens, cu_seqlens=cu_seqlens, targets=targets)

    def log_probs_at(
        self,
        tokens: Tensor,
        places: Tensor,
        targets: Tensor,
        *,
        cu_seqlens: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Returns (log p(target), entropy of p) in nats at some of the tokens, `[num_places]` each
        in float32 or wider, both with gradients, where p = softmax(logits / temperature). Other
        tokens are not projected onto the vocabulary.

        Args:
            tokens: int `[1, total]`, packed with `cu_seqlens`, as `hidden_states` takes them.
            places: int64 `[num_places]` in [0, total), each at most once.
            targets: int64 `[num_places]`, ids.
            temperature: positive.
        Raises:
            NotImplementedError: `lm_head` is not a plain `nn.Linear` without a bias.
        """
        check_head(self.lm_head)
        hidden = self.hidden_states(tokens, cu_seqlens=cu_seqlens)[0].index_select(0, places)
        op, weight = self.token_log_probs, self.lm_head.weight
        return head_log_probs(op, hidden, weight, targets, temperature)
