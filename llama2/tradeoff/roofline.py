"""A model on paper: what a GPU's data sheet allows decoding and prefill at most.

    seconds = max(bytes / bandwidth, flops / peak)

Every number here is computed from nominal values, none is measured; a real kernel stays below. Not
modelled: launches, activations, sampling, and what tensor parallelism communicates (two sums over
the ranks per layer), so that a deployment on several GPUs looks better here than it is.
"""

from dataclasses import dataclass
from functools import cached_property

from llama2 import accounting
from llama2.config import ModelConfig

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """Nominal values of a GPU; flops are dense bfloat16 ones."""

    name: str
    memory_bytes: int
    bytes_per_s: float
    flops_per_s: float
    source: str


def _gpu(name: str, memory_gb: int, tb_per_s: float, tflops: float, source: str) -> Gpu:
    return Gpu(name, memory_gb * GIB, tb_per_s * 1e12, tflops * 1e12, source)


# Data sheets print flops with 2:4 sparsity for most NVIDIA cards: these are half of that. Their GB
# of memory are counted as GiB; drivers report some per cent less, for which
# `Deployment.reserved_bytes` has room.
GPUS = {
    "H200": _gpu("H200 SXM", 141, 4.8, 989.5, "NVIDIA H200 Tensor Core GPU, data sheet"),
    "H100": _gpu("H100 SXM", 80, 3.35, 989.5, "NVIDIA H100 Tensor Core GPU, data sheet"),
    "A100": _gpu("A100 80GB SXM", 80, 2.039, 312, "NVIDIA A100 Tensor Core GPU, data sheet"),
    "L40S": _gpu("L40S", 48, 0.864, 362.05, "NVIDIA L40S, data sheet"),
    "RTX 4090": _gpu(
        "RTX 4090", 24, 1.008, 165.2, "NVIDIA Ada GPU architecture, white paper, appendix A"
    ),
    "B200": _gpu(
        "B200 SXM", 180, 8.0, 2250, "NVIDIA HGX B200 and DGX B200, data sheets, an eighth"
    ),
    "MI300X": _gpu("MI300X", 192, 5.3, 1307.4, "AMD Instinct MI300X Accelerator, data sheet"),
}


@dataclass(frozen=True)
class CacheFormat:
    """How a cache stores keys and values. A quantised cache has a scale for the keys and one for
    the values of each head and token, of `bytes_per_scale` each."""

    name: str
    bytes_per_value: int
    bytes_per_scale: int = 0


CACHE_FORMATS = {  # of `llama2.cache.kv_cache.KVCache`, by its names; scales are float32
    "auto": CacheFormat("16 bits", 2),
    "fp8": CacheFormat("fp8", 1, 4),
    "int8": CacheFormat("int8", 1, 4),
}


@dataclass(frozen=True)
class Deployment:
    """A model on `tp` GPUs of a kind, which share its heads, its columns and its vocabulary.

    A rank holds `kv_heads_per_rank` key/value heads: num_kv_heads / tp, but never less than one, so
    that heads are duplicated where there are fewer than ranks, with their projections.

    Raises:
        ValueError: tp does not divide num_q_heads; num_kv_heads neither divides nor is divided by
            it; a size is not positive, or the reserve is negative.
    """

    config: ModelConfig
    gpu: Gpu
    tp: int = 1
    weight_bytes_per_value: float = 2  # 1 and 0.5 for weights quantised to 8 and 4 bits
    cache: CacheFormat = CACHE_FORMATS["auto"]
    reserved_bytes: int = 4 * GIB  # activations, and what driver and allocator keep

    def __post_init__(self) -> None:
        for name in ("tp", "weight_bytes_per_value"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number; got {getattr(self, name)}")
        if self.reserved_bytes < 0:
            raise ValueError(f"reserved_bytes: expected at least 0; got {self.reserved_bytes}")
        heads = self.config.num_kv_heads
        if self.config.num_q_heads % self.tp:
            raise ValueError(
                f"tp: expected a divisor of num_q_heads ({self.config.num_q_heads}); got {self.tp}"
            )
        if heads % self.tp and self.tp % heads:
            raise ValueError(
                f"tp: expected a multiple or a divisor of num_kv_heads ({heads}); got {self.tp}"
            )

    @property
    def kv_heads_per_rank(self) -> int:
        return -(-self.config.num_kv_heads // self.tp)

    def _part_of_a_rank(self, whole: int, kv_projections: int) -> float:
        """1 / tp of `whole`, but for what the projections to keys and values have of it: that
        goes by heads, as duplicated ones have theirs on every rank."""
        per_head = kv_projections // self.config.num_kv_heads
        return (whole - kv_projections) / self.tp + per_head * self.kv_heads_per_rank

    @cached_property
    def weight_bytes_per_rank(self) -> float:
        """All parameters, dealt out evenly, and the projections of duplicated heads. Norms count
        as dealt out, though every rank has them: a few hundred thousand values."""
        parameters = accounting.num_parameters(self.config)
        part = self._part_of_a_rank(parameters, accounting.kv_parameters(self.config))
        return part * self.weight_bytes_per_value

    @property
    def kv_bytes_per_token_per_rank(self) -> int:
        """Bytes of one token's keys and values in one rank's cache."""
        whole = accounting.kv_bytes_per_token(
            self.config, self.cache.bytes_per_value, self.cache.bytes_per_scale
        )
        return whole // self.config.num_kv_heads * self.kv_heads_per_rank

    @property
    def cache_bytes_per_rank(self) -> float:
        """Memory that is left for the cache; negative where the weights do not fit."""
        return self.gpu.memory_bytes - self.reserved_bytes - self.weight_bytes_per_rank

    def largest_batch(self, context: int) -> int:
        """Sequences of `context` tokens whose keys and values fit; 0 where none does.

        A context beyond max_seq_len is taken as it is: the shape, not a checkpoint, is asked.
        """
        _check(context=context)
        sequence = self.kv_bytes_per_token_per_rank * context
        return max(0, int(self.cache_bytes_per_rank // sequence))

    def largest_context(self, batch: int) -> int:
        """Tokens per sequence that fit for a batch; 0 where not even one does."""
        _check(batch=batch)
        return max(0, int(self.cache_bytes_per_rank // (self.kv_bytes_per_token_per_rank * batch)))

    def decode_bytes(self, batch: int, context: int) -> float:
        """Bytes that a rank reads in one step: its weights once, and all keys and values.

        The embedding counts with the weights, though only a row per sequence is read: 2 % too much
        for the published 7B.
        """
        _check(batch=batch, context=context)
        return self.weight_bytes_per_rank + batch * context * self.kv_bytes_per_token_per_rank

    def decode_flops(self, batch: int, context: int) -> float:
        """Flops of a rank in one step."""
        _check(batch=batch, context=context)
        flops = accounting.flops_per_token(self.config, context)
        return batch * self._part_of_a_rank(flops, 2 * accounting.kv_parameters(self.config))

    def decode_seconds(self, batch: int, context: int) -> float:
        """One step, a token for each of `batch` sequences that attend to `context` keys each.
        Whether they fit is another question: `largest_batch`."""
        memory, compute = self._decode_bounds(batch, context)
        return max(memory, compute)

    def decode_tokens_per_s(self, batch: int, context: int) -> float:
        """Tokens of all sequences together, on all `tp` GPUs together."""
        return batch / self.decode_seconds(batch, context)

    def bound(self, batch: int, context: int) -> str:
        """What `decode_seconds` waits for: "bandwidth" or "compute"."""
        memory, compute = self._decode_bounds(batch, context)
        return "bandwidth" if memory >= compute else "compute"

    def _decode_bounds(self, batch: int, context: int) -> tuple[float, float]:
        memory = self.decode_bytes(batch, context) / self.gpu.bytes_per_s
        return memory, self.decode_flops(batch, context) / self.gpu.flops_per_s

    def crossover_batch(self, context: int) -> int:
        """The smallest batch whose keys and values are at least as many bytes as the weights:
        from there on, the number of key/value heads decides the speed of decoding."""
        _check(context=context)
        return _ceil(self.weight_bytes_per_rank / (self.kv_bytes_per_token_per_rank * context))

    def crossover_context(self, batch: int) -> int:
        """The shortest context from which on a batch's keys and values outweigh the weights."""
        _check(batch=batch)
        return _ceil(self.weight_bytes_per_rank / (self.kv_bytes_per_token_per_rank * batch))

    def prefill_seconds(self, context: int, batch: int = 1) -> float:
        """The first token after prompts of `context` tokens; only their last goes through the head.

        Causal attention: context · (context + 1) / 2 pairs. Bytes: the weights once, the cache
        written.
        """
        _check(context=context, batch=batch)
        products = accounting.product_flops_per_token(self.config, head=False) * context
        head = 2 * self.config.vocab_size * self.config.hidden_size
        pairs = accounting.attention_flops_per_pair(self.config) * context * (context + 1) // 2
        kv_projections = 2 * accounting.kv_parameters(self.config) * context
        flops = batch * self._part_of_a_rank(products + head + pairs, kv_projections)
        return max(
            self.decode_bytes(batch, context) / self.gpu.bytes_per_s, flops / self.gpu.flops_per_s
        )


def _ceil(x: float) -> int:
    return -int(-x // 1)


def _check(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1; got {value}")
