"""A deployment, and the rule that chooses a number of key/value heads for it."""

from dataclasses import dataclass

from llama2 import accounting
from llama2.config import PUBLISHED, ModelConfig
from llama2.tradeoff.roofline import CACHE_FORMATS, CacheFormat, Deployment, Gpu

KEEP = 0.8
# The smallest share of heads for which there is evidence of quality below MHA's but above MQA's:
# Llama 2 70B ships 8 of 64, the GQA paper converts T5 XXL to 8 of 64, the study trains 1 of 8.
LEAST_SHARE = 1 / 8


@dataclass(frozen=True)
class Question:
    """A deployment, and the two numbers of the rule in `llama2.tradeoff.recommend`.

    Attributes:
        context: tokens that a sequence is expected to have while it decodes.
        batch: sequences that decode together; None takes each count's largest batch, which is the
            question of throughput alone.
        tp: GPUs that share the model.
        cache: how keys and values are stored.
        keep: the share of the best speed that must be kept, in (0, 1].
        least_share: key/value heads over query heads, in [0, 1]: fewer are not recommended.
    Raises:
        ValueError: a number out of range, or tp does not divide num_q_heads.
    """

    config: ModelConfig
    gpu: Gpu
    context: int
    batch: int | None = None
    tp: int = 1
    cache: CacheFormat = CACHE_FORMATS["auto"]
    keep: float = KEEP
    least_share: float = LEAST_SHARE

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep: expected a number in (0, 1]; got {self.keep}")
        if not 0 <= self.least_share <= 1:
            raise ValueError(f"least_share: expected a number in [0, 1]; got {self.least_share}")
        if self.batch is not None and self.batch < 1:
            raise ValueError(
                f"batch: expected at least 1, or None for the largest; got {self.batch}"
            )
        if self.context < 1:
            raise ValueError(f"context: expected at least 1; got {self.context}")
        if self.tp < 1 or self.config.num_q_heads % self.tp:
            raise ValueError(
                f"tp: expected a divisor of num_q_heads ({self.config.num_q_heads}); got {self.tp}"
            )

    def deployment(self, num_kv_heads: int) -> Deployment:
        """Returns the deployment with that many heads; the feed-forward layers are unchanged."""
        shape = accounting.matched(self.config, num_kv_heads, "same_ffn")
        return Deployment(shape, self.gpu, self.tp, cache=self.cache)

    def deployments(self) -> dict[int, Deployment]:
        """Returns a deployment per number of heads that `tp` GPUs can share, from many to few."""
        return {
            count: self.deployment(count)
            for count in reversed(accounting.head_counts(self.config))
            if shares(count, self.tp)
        }

    @property
    def published_name(self) -> str | None:
        """The name of the published shape, if only key/value heads and length differ from it."""
        same = ("hidden_size", "intermediate_size", "num_layers", "num_q_heads", "vocab_size")
        for name, shape in PUBLISHED.items():
            if all(getattr(shape, field) == getattr(self.config, field) for field in same):
                return name
        return None

    @property
    def shape_name(self) -> str:
        if self.published_name:
            return f"the {self.published_name} shape"
        layers, width = self.config.num_layers, self.config.hidden_size
        size = accounting.num_parameters(self.config)
        return f"a model of {layers} layers of width {width} ({parameters_name(size)})"

    @property
    def batch_name(self) -> str:
        return f"batch {self.batch:,}" if self.batch else "the largest batch that fits"

    @property
    def gpus_name(self) -> str:
        return f"{self.tp} × {self.gpu.name}" if self.tp > 1 else self.gpu.name

    @property
    def setting(self) -> str:
        """The deployment in words."""
        return (
            f"{self.shape_name} on {self.gpus_name} with {self.context:,} tokens per sequence, "
            f"{self.batch_name} and a cache in {self.cache.name}"
        )


def shares(num_kv_heads: int, tp: int) -> bool:
    """Returns whether `tp` ranks can share that many heads evenly, or duplicate them evenly."""
    return num_kv_heads % tp == 0 or tp % num_kv_heads == 0


def parameters_name(num_parameters: int) -> str:
    billions = num_parameters >= 1e9
    return f"{num_parameters / 1e9:.2f} B" if billions else f"{num_parameters / 1e6:.2f} M"
