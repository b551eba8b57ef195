"""The shape of a Llama 2 model, and the published shapes."""

import sys
from dataclasses import dataclass

MAX_SIZE = 2**31 - 1  # a larger size is a mistake
MAX_SEQ_LEN = 2**20  # the longest table of RoPE angles


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of a Llama-style decoder.

    `rope_interleaved` says which pairs of features the q and k projections rotate: (2i, 2i + 1) as
    in Meta's checkpoints, or (i, i + head_dim / 2) as in Hugging Face's.

    Raises:
        ValueError: a size is not an int from 1 to MAX_SIZE, a constant is not a positive number, a
            flag is neither True nor False, num_q_heads is not a multiple of num_kv_heads, or
            head_dim is odd.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    max_seq_len: int = 4096
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_interleaved: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_q_heads",
            "num_kv_heads",
            "head_dim",
            "max_seq_len",
        ):
            most = MAX_SEQ_LEN if name == "max_seq_len" else MAX_SIZE
            if not is_size(value := getattr(self, name), most):
                raise ValueError(f"{name}: expected an int from 1 to {most}; got {value!r:.60}")
        for name in ("norm_eps", "rope_theta"):
            if not is_positive(value := getattr(self, name)):
                raise ValueError(f"{name}: expected a positive number; got {value!r:.60}")
        for name in ("rope_interleaved", "tie_word_embeddings"):
            if type(value := getattr(self, name)) is not bool:
                raise ValueError(f"{name}: expected True or False; got {value!r:.60}")
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"num_q_heads: expected a multiple of num_kv_heads ({self.num_kv_heads}); "
                f"got {self.num_q_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number for RoPE; got {self.head_dim}")


def is_size(value: object, most: int = MAX_SIZE) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def is_positive(value: object) -> bool:
    """Returns whether `value` is a positive number that a float can represent."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value <= sys.float_info.max


def _published(
    hidden_size: int, intermediate_size: int, num_layers: int, num_q_heads: int, num_kv_heads: int
) -> ModelConfig:
    return ModelConfig(
        vocab_size=32000,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=128,
    )


# Touvron et al. 2023, arXiv:2307.09288, table 1. The 34B model was never released; its intermediate
# size is that of Code Llama 34B.
PUBLISHED = {
    "7B": _published(4096, 11008, 32, 32, 32),
    "13B": _published(5120, 13824, 40, 40, 40),
    "34B": _published(8192, 22016, 48, 64, 8),
    "70B": _published(8192, 28672, 80, 64, 8),
}
