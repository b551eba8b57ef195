"""The whole models that are timed, and the minimum cost of one call."""

import dataclasses
from dataclasses import dataclass

from grid import DTYPE, TIERS

from gqa_kernels.spec import Cost
from llama2 import PUBLISHED, ModelConfig
from llama2.accounting import attention_flops_per_pair, kv_bytes_per_token, layers_parameters


@dataclass(frozen=True)
class ModelWorkload:
    op: str  # "prefill", "decode_step", "decode_step_graph" or "train_step"
    model: str
    config: ModelConfig
    batch: int
    tokens: int  # of the prompt, of the context, or of the training sequence
    tier: str

    @property
    def pass_(self) -> str:
        return "bwd" if self.op == "train_step" else "fwd"

    @property
    def shape(self) -> str:
        return f"{self.model}-B{self.batch}-S{self.tokens}"

    @property
    def group(self) -> str:
        return f"{self.op}|{self.pass_}|{self.shape}"

    @property
    def backends(self) -> list[str]:
        # Decoding is timed with this package's cache, which Hugging Face's model does not support.
        return ["triton", "eager"] + ([] if self.decodes else ["hf"])

    @property
    def decodes(self) -> bool:
        return self.op.startswith("decode_step")

    @property
    def cost(self) -> Cost:
        return model_cost(self)


def model_cost(work: ModelWorkload) -> Cost:
    """The minimum cost of one call.

    Every weight except the embedding is read once. Flops: 2 per weight and token (in prefill, the
    head for the last token only), and 4 · num_q_heads · head_dim per layer and visible pair of
    query and key. Prefill writes the keys and values, decoding reads them. A training step has 3 ×
    the products of a forward pass, 3.5 × its attention, and reads or writes weights and gradients 3
    ×.
    """
    config, size = work.config, DTYPE.itemsize
    head = config.vocab_size * config.hidden_size
    body = layers_parameters(config)
    kv_bytes = work.batch * work.tokens * kv_bytes_per_token(config, size)
    pair_flops = work.batch * attention_flops_per_pair(config)
    weights = (body + head) * size
    if work.decodes:
        flops = 2 * (body + head) * work.batch + pair_flops * work.tokens
        return Cost(weights + kv_bytes, 0, flops)
    pairs = pair_flops * work.tokens * (work.tokens + 1) // 2
    products = 2 * body * work.batch * work.tokens
    if work.op == "prefill":
        return Cost(weights, kv_bytes, products + 2 * head * work.batch + pairs)
    products += 2 * head * work.batch * work.tokens
    return Cost(2 * weights, weights, 3 * products + 7 * pairs // 2)


def _grid() -> tuple[ModelWorkload, ...]:
    seven, seventy = PUBLISHED["7B"], PUBLISHED["70B"]
    # 70B leaves no memory for a second backend, so eight of its eighty layers are used.
    slice_70 = dataclasses.replace(seventy, num_layers=8)
    two_layers = dataclasses.replace(seven, num_layers=2)
    return (
        ModelWorkload("decode_step_graph", "7B", seven, 1, 2048, "core"),
        ModelWorkload("decode_step", "7B", seven, 1, 2048, "core"),
        ModelWorkload("prefill", "7B", seven, 1, 2048, "core"),
        ModelWorkload("decode_step_graph", "7B", seven, 8, 4080, "full"),
        ModelWorkload("decode_step_graph", "70B_8layers", slice_70, 1, 2048, "full"),
        ModelWorkload("prefill", "70B_8layers", slice_70, 1, 2048, "full"),
        ModelWorkload("train_step", "7B_2layers", two_layers, 1, 4095, "full"),
    )


GRID = _grid()
_TINY_CONFIG = ModelConfig(97, 48, 64, 2, 4, 2, 16, max_seq_len=64)
TINY = tuple(
    ModelWorkload(op, "tiny", _TINY_CONFIG, 2, 24, "smoke")
    for op in ("prefill", "decode_step_graph", "train_step")
)


def select(tier: str) -> tuple[ModelWorkload, ...]:
    wanted = TIERS[: TIERS.index(tier) + 1]
    return tuple(work for work in GRID if work.tier in wanted)
