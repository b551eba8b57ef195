"""Parameters, flops and bytes of a model shape, and shapes with other numbers of key/value heads.

Every number is computed from a `ModelConfig`; none is measured.
"""

from dataclasses import replace

from llama2.config import ModelConfig

# Whether and how a model with fewer key/value heads gets the lost parameters back; see `matched`.
MATCHINGS = ("same_ffn", "exact")

_MOST_HEADS = 4096  # `head_counts` tries all divisors


def num_parameters(config: ModelConfig) -> int:
    """Returns the number of parameters of `Llama2(config)`, norms included, tied embeddings counted
    once.

    Per layer: hidden · head_dim · (2 num_q_heads + 2 num_kv_heads) + 3 hidden · intermediate + 2
    hidden; plus the embedding, the head and the last norm.
    """
    norms = (2 * config.num_layers + 1) * config.hidden_size
    embeddings = 1 if config.tie_word_embeddings else 2
    embedding = config.vocab_size * config.hidden_size
    return layers_parameters(config) + norms + embeddings * embedding


def kv_parameters(config: ModelConfig) -> int:
    """Returns the number of parameters of all projections to keys and values, which num_kv_heads
    determines."""
    return 2 * config.num_layers * config.hidden_size * config.num_kv_heads * config.head_dim


def layers_parameters(config: ModelConfig) -> int:
    """Returns the number of parameters of all projections of all layers, without the norms."""
    q_and_o = 2 * config.hidden_size * config.num_q_heads * config.head_dim
    ffn = 3 * config.hidden_size * config.intermediate_size
    return config.num_layers * (q_and_o + ffn) + kv_parameters(config)


def product_flops_per_token(config: ModelConfig, *, head: bool = True) -> int:
    """Returns the forward flops of one token in the projections: 2 per weight. An embedding lookup
    counts none."""
    weights = layers_parameters(config)
    return 2 * (weights + config.vocab_size * config.hidden_size * head)


def attention_flops_per_pair(config: ModelConfig) -> int:
    """Returns the forward flops of one query attending to one key, in all layers: 2 · head_dim per
    query head for q·k and as many for the sum of values, whatever the number of key/value heads."""
    return 4 * config.num_layers * config.num_q_heads * config.head_dim


def flops_per_token(config: ModelConfig, context: int) -> int:
    """Returns the forward flops of one token that attends to `context` keys, including its own.

    Counts matrix products, the head's too, at 2 flops per multiply-add; softmax, norms, rotary
    embeddings and SwiGLU are not counted.
    """
    _check_positive("context", context)
    return product_flops_per_token(config) + attention_flops_per_pair(config) * context


def mean_flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Returns `flops_per_token` averaged over a causal sequence, whose tokens attend to (seq_len +
    1) / 2 keys on average. Training costs about three times as many flops per token."""
    _check_positive("seq_len", seq_len)
    # Exact: the flops per pair are a multiple of four.
    return product_flops_per_token(config) + attention_flops_per_pair(config) * (seq_len + 1) // 2


def kv_bytes_per_token(
    config: ModelConfig, bytes_per_value: int = 2, bytes_per_scale: int = 0
) -> int:
    """Returns the bytes per token of a key/value cache over all layers; 2 bytes per value in
    bfloat16. A quantised cache also has a scale for the keys and one for the values of each head.
    """
    _check_positive("bytes_per_value", bytes_per_value)
    per_head = config.head_dim * bytes_per_value + bytes_per_scale
    return 2 * config.num_layers * config.num_kv_heads * per_head


def head_counts(config: ModelConfig) -> tuple[int, ...]:
    """Returns every possible num_kv_heads, from MQA (1) to MHA (num_q_heads).

    Raises:
        ValueError: num_q_heads is larger than that of any real model.
    """
    if config.num_q_heads > _MOST_HEADS:
        raise ValueError(f"num_q_heads: expected at most {_MOST_HEADS}; got {config.num_q_heads}")
    return tuple(k for k in range(1, config.num_q_heads + 1) if config.num_q_heads % k == 0)


def matched(config: ModelConfig, num_kv_heads: int, matching: str) -> ModelConfig:
    """Returns `config` with another number of key/value heads, and feed-forward layers as
    `matching` says.

    - "same_ffn": nothing else changes; a model with fewer heads is smaller.
    - "exact": the feed-forward layers get the parameters that the projections lose:
      intermediate_size + 2 · head_dim · (old − new num_kv_heads) / 3, rounded to the nearest
      integer; `unmatched_parameters` returns the remainder. Widths are not rounded to multiples
      that suit a GPU.

    With the same count it returns `config` unchanged.

    Raises:
        ValueError: `matching` is unknown; num_kv_heads does not divide num_q_heads; "exact"
            would remove the feed-forward layers.
    """
    if matching not in MATCHINGS:
        raise ValueError(f"matching: expected one of {', '.join(MATCHINGS)}; got {matching!r}")
    _check_divisor(config, num_kv_heads)
    if num_kv_heads == config.num_kv_heads:
        return config
    width = config.intermediate_size
    if matching == "exact":
        freed = 2 * config.head_dim * (config.num_kv_heads - num_kv_heads)
        width += (freed + 1) // 3  # round to nearest: a third is never halfway
        if width < 1:
            raise ValueError(
                f"num_kv_heads: expected an intermediate_size above {-freed} / 3; got "
                f"{config.intermediate_size}"
            )
    return replace(config, num_kv_heads=num_kv_heads, intermediate_size=width)


def unmatched_parameters(config: ModelConfig, num_kv_heads: int, matching: str) -> int:
    """Returns how many more parameters `matched` has than `config`; negative if it has fewer."""
    return num_parameters(matched(config, num_kv_heads, matching)) - num_parameters(config)


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}: expected at least 1; got {value}")


def _check_divisor(config: ModelConfig, num_kv_heads: int) -> None:
    if num_kv_heads not in head_counts(config):
        raise ValueError(
            f"num_kv_heads: expected a divisor of num_q_heads ({config.num_q_heads}); "
            f"got {num_kv_heads}"
        )
