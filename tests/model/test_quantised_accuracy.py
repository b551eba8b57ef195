"""What a quantised cache costs the shipped model: bounded by half a step, and measured.

`pytest -m "" tests/model/test_quantised_accuracy.py -s` prints the tables, which are kept in
`bench/results/quantised_cache.md`.
"""

import math
import re
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from combinations import long
from quantisation import half_a_step
from small_llama import EAGER
from torch import Tensor

from gqa_kernels.spec.cache import quantized
from llama2 import Llama2, checkpoint
from llama2.cache.kv_cache import CACHE_DTYPES, KVCache
from llama2.tokenizer import Tokenizer
from llama2.train.data import document_ids, stdlib_documents

QUANTISED = {name: dtype for name, dtype in CACHE_DTYPES.items() if dtype is not None}
LENGTH = 256  # tokens of each text, as many as the model takes


@pytest.fixture(scope="module")
def texts() -> tuple[Tensor, list[int]]:
    """What the model has not seen, the beginnings of files, `[num_texts, LENGTH]`, each from BOS;
    and their lengths in UTF-8."""
    tokenizer = Tokenizer(checkpoint.SHIPPED / "tokenizer.model")
    held_out = [document for document in stdlib_documents() if document.held_out]
    ids = [document_ids(document, tokenizer)[:LENGTH].tolist() for document in held_out]
    ids = [x for x in ids if len(x) == LENGTH]
    return torch.tensor(ids), [len(tokenizer.decode(x).encode()) for x in ids]


def shipped(ops=EAGER, dtype=torch.float32) -> Llama2:
    return checkpoint.load(checkpoint.SHIPPED, ops, device="cpu").to(dtype)


@torch.no_grad()
def log_probabilities(model: Llama2, tokens: Tensor, cache_dtype: torch.dtype) -> Tensor:
    """float64, with all keys but each text's first read from a cache."""
    cache = KVCache(model.config, *tokens.shape, dtype=cache_dtype, device="cpu")
    parts = [tokens[:, :1], *tokens[:, 1:].split(16, 1)]
    return torch.cat([model(part, cache).double().log_softmax(-1) for part in parts], 1)


@pytest.mark.parametrize(
    ("dtype", "num_texts"),
    ((torch.float32, 16), long(torch.float32, None), long(torch.bfloat16, None)),
    ids=str,
)
def test_held_out_text(dtype, num_texts, texts):
    tokens, num_bytes = texts[0][:num_texts], sum(texts[1][:num_texts])
    exact = log_probabilities(shipped(dtype=torch.float64), tokens, torch.float64)
    divergence = {}
    print(f"\n{tokens.numel()} tokens, {num_bytes} bytes")
    for name, cache_dtype in CACHE_DTYPES.items():
        found = log_probabilities(shipped(dtype=dtype), tokens, cache_dtype or dtype)
        bits = -found[:, :-1].gather(-1, tokens[:, 1:, None]).sum() / math.log(2)
        same = (found.argmax(-1) == exact.argmax(-1)).double().mean()
        divergence[name] = (exact.exp() * (exact - found)).sum(-1).mean().item()
        print(
            f"{dtype} {name:5}: {bits / num_bytes:.4f} bits per byte, KL {divergence[name]:.1e} "
            f"nats, likeliest token the same {100 * same:.1f} %"
        )
    # int8's step is 1/127 of the largest of a head, float8_e4m3fn's 1/8 to 1/16 of a value.
    assert 0 <= divergence["auto"] < divergence["int8"] < divergence["fp8"]


class Bounded:
    """The eager ops. Decoding is compared with attention to the exact keys and values.

    With h half a step of an entry, a score is off by at most ε = softmax_scale · Σ |q| h. So a
    weight p becomes at most p e^ε / Σ p e^−ε and at least p e^−ε / Σ p e^ε, and the output is off
    by at most Σ |p' − p| |v| + Σ p' h.

    Attributes:
        errors: of each layer, (error, bound, output), each `[batch, tokens, num_q_heads, head_dim]`
            of a call.
    """

    def __init__(self, num_layers: int) -> None:
        self.exact: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(num_layers)]
        self.errors: list[list[tuple[Tensor, ...]]] = [[] for _ in range(num_layers)]
        self.num_calls = 0
        ours = {"rope_append_kv": self.append, "decode_attention": self.decode}
        self.ops = SimpleNamespace(**vars(EAGER) | ours)

    def append(self, q, k, v, *others, **options):
        self.layer = self.num_calls % len(self.exact)
        self.num_calls += 1
        q, k = EAGER.rope_append_kv(q, k, v, *others, **options)
        self.exact[self.layer].append((k, v))
        return q, k

    def decode(self, q, k_cache, v_cache, seq_lens, *, k_scale, v_scale, block_table):
        assert block_table is None and q.dtype == torch.float64
        scales = {"k_scale": k_scale, "v_scale": v_scale}
        found = EAGER.decode_attention(q, k_cache, v_cache, seq_lens, **scales)
        k, v = (torch.cat(x, 1) for x in zip(*self.exact[self.layer], strict=True))
        length, group_size = k.shape[1], q.shape[2] // k.shape[2]
        half_k, half_v = (
            half_a_step(x[:, :length], scale[:, :length, :, None]).double()
            for x, scale in ((k_cache, k_scale), (v_cache, v_scale))
        )
        k, v, half_k, half_v = (
            x.repeat_interleave(group_size, 2).transpose(1, 2) for x in (k, v, half_k, half_v)
        )
        q = q.transpose(1, 2) * q.shape[-1] ** -0.5  # [batch, num_q_heads, tokens, head_dim]
        seen = torch.ones(q.shape[2], length, dtype=torch.bool).tril(length - q.shape[2])
        p = (q @ k.mT).masked_fill(~seen, -torch.inf).softmax(-1)
        off = q.abs() @ half_k.mT
        most = p * off.exp() / (p * (-off).exp()).sum(-1, keepdim=True)
        least = p * (-off).exp() / (p * off.exp()).sum(-1, keepdim=True)
        bound = torch.maximum(most - p, p - least) @ v.abs() + most @ half_v
        wanted = (p @ v).transpose(1, 2)
        self.errors[self.layer].append(((found - wanted).abs(), bound.transpose(1, 2), wanted))
        return found


@pytest.mark.parametrize("name", QUANTISED)
@torch.no_grad()
def test_decoding_stays_within_half_a_step(name, texts):
    """Of every key and value, in float64: what else rounds is nothing beside it."""
    tokens = texts[0][:8, :80]
    config = shipped().config
    bounded = Bounded(config.num_layers)
    model = shipped(bounded.ops, torch.float64)
    cache = KVCache(config, *tokens.shape, dtype=QUANTISED[name], device="cpu")
    for part in tokens.split(16, 1):
        model(part, cache)
    print()
    for layer, calls in enumerate(bounded.errors):
        assert len(calls) == 4
        error, bound, wanted = (torch.cat(x, 1) for x in zip(*calls, strict=True))
        assert (error <= bound).all()
        assert error.any()
        print(
            f"{name} layer {layer}: error {100 * error.norm() / wanted.norm():.2f} % of the output "
            f"in root mean square, at most {100 * (error / bound).max():.0f} % of its bound"
        )


def test_the_table_of_the_reference():
    """Errors of the output beside that of exact keys and values, as its docstring has them: pooled
    over 16 draws, as few tokens make most of the error where some are much larger than others."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    documented = re.sub(r"\s+", " ", EAGER.decode_attention.__doc__)
    kinds = list(product(QUANTISED.values(), (False, True)))
    lengths = torch.tensor([2048])
    print()
    for name, spread in (("normal numbers", 0.0), ("tokens of log-normal size", 0.5)):
        errors, outputs = dict.fromkeys(kinds, 0.0), 0.0
        for _ in range(16):
            q = draw(1, 1, 8, 128).double()
            k, v = (
                (draw(1, 2048, 2, 128) * (spread * draw(1, 2048, 1, 1)).exp()).bfloat16()
                for _ in range(2)
            )
            exact = EAGER.decode_attention(q, k.double(), v.double(), lengths)
            outputs += exact.square().sum()
            for dtype, per_token in kinds:
                stored = [quantized(x, dtype, per_token=per_token) for x in (k, v)]
                (k_code, k_scale), (v_code, v_scale) = (map(Tensor.double, x) for x in stored)
                scales = {"k_scale": k_scale, "v_scale": v_scale}
                out = EAGER.decode_attention(q, k_code, v_code, lengths, **scales)
                errors[dtype, per_token] += (out - exact).square().sum()
        row = " ".join(f"{100 * (error / outputs).sqrt():.1f} %" for error in errors.values())
        print(f"{name}, fp8 and int8, each per head and per token: {row}")
        assert row in documented
