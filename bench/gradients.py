"""Measures errors of attention's gradients when keys and values have a non-zero mean.

    python bench/gradients.py [--results bench/results/gradients.json] [--plot]

Compares, in bfloat16 against float64 and over the size of a common offset of keys and values, the
gradients of this package's attention, of the same maths in eager code, of PyTorch's fused attention
and, if it is installed and there is a GPU, of FlashAttention. Then trains one attention layer whose
projections have biases of that size. Also measures the error that 8-bit keys and values cause in
the output of a decode step. Writes the figures as JSON and plots them as SVG; `--plot` plots an
existing file without measuring. Measures no speed. Without a GPU, the kernels run in Triton's
interpreter.
"""

# ruff: noqa: E402  (what makes the rest importable comes first)

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import importable

importable.make_importable()  # without a GPU, in Triton's interpreter

import torch
import torch.nn.functional as F
from ceilings import environment
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from torch import Tensor, nn
from tqdm import tqdm

import gqa_kernels
from gqa_kernels import reference
from gqa_kernels.spec.cache import quantized
from gqa_kernels.spec.case import standard_normal
from llama2.reporting import drawing
from llama2.storage import read_json, write_text

OFFSETS = (0.0, 0.5, 1.0, 2.0, 4.0, 10.0)  # in standard deviations
SEEDS = (0, 1, 2)
NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, SEQ_LEN = 2, 1, 64, 192
TRAINED_OFFSET, STEPS, VOCAB_SIZE, DISTANCE = 30.0, 150, 16, 3
OURS, EAGER, FUSED, FLASH = "gqa_kernels", "eager", "PyTorch, fused", "FlashAttention"
FLOAT32 = "eager, float32"

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # of [batch, seq_len, heads, head_dim]


def _fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


def implementations(device: torch.device) -> dict[str, Attention]:
    found: dict[str, Attention] = {
        OURS: lambda q, k, v: gqa_kernels.flash_attention(q, k, v, causal=True),
        EAGER: lambda q, k, v: reference.flash_attention(q, k, v, causal=True),
        FUSED: _fused,
    }
    if device.type == "cuda":
        try:
            from flash_attn import flash_attn_func
        except ImportError:
            return found
        found[FLASH] = lambda q, k, v: flash_attn_func(q, k, v, causal=True)
    return found


def _inputs(offset: float, seed: int, device: torch.device) -> list[Tensor]:
    """q, k, v and the gradient of the output, in bfloat16."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int, mean: float) -> Tensor:
        x = standard_normal((1, SEQ_LEN, heads, HEAD_DIM), generator)
        return x + mean * standard_normal((heads, HEAD_DIM), generator)

    drawn = [draw(NUM_Q_HEADS, 0.0), draw(NUM_KV_HEADS, offset), draw(NUM_KV_HEADS, offset)]
    return [x.to(device, torch.bfloat16) for x in (*drawn, draw(NUM_Q_HEADS, 0.0))]


def _gradients(attention: Attention, inputs: list[Tensor]) -> list[Tensor]:
    *leaves, dout = (x.detach() for x in inputs)
    leaves = [x.requires_grad_() for x in leaves]
    return [grad.double() for grad in torch.autograd.grad(attention(*leaves), leaves, dout)]


def errors(device: torch.device) -> dict[str, dict[str, list[float]]]:
    """The norm of the error over the norm of the gradient, averaged over seeds, for each offset."""
    attentions = implementations(device)
    found = {name: {grad: [] for grad in ("dq", "dk", "dv")} for name in attentions}
    for offset in tqdm(OFFSETS, unit="offset", file=sys.stderr):
        sums = {name: [0.0, 0.0, 0.0] for name in attentions}
        for seed in SEEDS:
            inputs = _inputs(offset, seed, device)
            truth = _gradients(attentions[EAGER], [x.double() for x in inputs])
            for name, attention in attentions.items():
                for i, (grad, true) in enumerate(
                    zip(_gradients(attention, inputs), truth, strict=True)
                ):
                    sums[name][i] += ((grad - true).norm() / true.norm()).item() / len(SEEDS)
        for name, values in sums.items():
            for grad, value in zip(("dq", "dk", "dv"), values, strict=True):
                found[name][grad].append(value)
    return found


def cache_errors(device: torch.device) -> dict[str, list[float]]:
    """The norm of the error over the norm of the output of decode steps with 8-bit caches and a
    scale per head and token, for each offset of the keys."""
    found: dict[str, list[float]] = {"bfloat16": [], "int8": [], "float8_e4m3fn": []}
    lengths = torch.tensor([SEQ_LEN], dtype=torch.int32, device=device)
    for offset in OFFSETS:
        q, k, _, v = _inputs(offset, 0, device)  # the gradient, which has no offset, serves as v
        q, v = q[:, :1], v[:, :, :NUM_KV_HEADS]
        truth = reference.decode_attention(q.double(), k.double(), v.double(), lengths)
        for name, errors in found.items():
            caches, scales = (k, v), {}
            if name != "bfloat16":
                pairs = [quantized(x, getattr(torch, name), per_token=True) for x in caches]
                caches = [cache for cache, _ in pairs]
                scales = dict(zip(("k_scale", "v_scale"), (s for _, s in pairs), strict=True))
            out = gqa_kernels.decode_attention(q, *caches, lengths, **scales).double()
            errors.append(((out - truth).norm() / truth.norm()).item())
    return found


class _Layer(nn.Module):
    """An embedding, one attention layer whose keys and values have biases of `offset` standard
    deviations, and a head. It learns to predict the token DISTANCE places before."""

    def __init__(self, attention: Attention, dtype: torch.dtype, offset: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int, scale: float) -> nn.Parameter:
            return nn.Parameter(scale * standard_normal(shape, generator))

        width = NUM_Q_HEADS * HEAD_DIM
        self.tokens = parameter(VOCAB_SIZE, width, scale=1.0)
        self.places = parameter(64, width, scale=1.0)
        self.q = parameter(width, width, scale=width**-0.5)
        self.k, self.v = (parameter(HEAD_DIM, width, scale=width**-0.5) for _ in range(2))
        self.k_bias, self.v_bias = (parameter(HEAD_DIM, scale=offset) for _ in range(2))
        self.head = parameter(VOCAB_SIZE, width, scale=width**-0.5)
        self.head_bias = nn.Parameter(-(self.head @ self.v_bias.repeat(NUM_Q_HEADS)).detach())
        self.attention, self.dtype = attention, dtype

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens[tokens] + self.places[: tokens.shape[1]]
        q = F.linear(x, self.q)
        k, v = F.linear(x, self.k, self.k_bias), F.linear(x, self.v, self.v_bias)
        heads = (y.unflatten(2, (-1, HEAD_DIM)).to(self.dtype) for y in (q, k, v))
        out = self.attention(*heads).flatten(2).float()
        return F.linear(out, self.head, self.head_bias)


def train(attention: Attention, dtype: torch.dtype, device: torch.device, name: str) -> list[float]:
    """The loss at each step of AdamW."""
    layer = _Layer(attention, dtype, TRAINED_OFFSET).to(device)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in tqdm(range(STEPS), desc=name, unit="step", file=sys.stderr):
        tokens = torch.randint(VOCAB_SIZE, (4, 64), generator=generator).to(device)
        logits = layer(tokens)[:, DISTANCE:]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, :-DISTANCE].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def measure(device: torch.device) -> dict[str, Any]:
    attentions = implementations(device)
    runs = {FLOAT32: (attentions[EAGER], torch.float32)}
    runs |= {name: (attention, torch.bfloat16) for name, attention in attentions.items()}
    return {
        "environment": environment(),
        "offsets": OFFSETS,
        "trained_offset": TRAINED_OFFSET,
        "errors": errors(device),
        "cache_errors": cache_errors(device),
        "losses": {name: train(*run, device, name) for name, run in runs.items()},
    }


# How each line is drawn, in order; what is not named gets the next colour.
_LOOKS = {
    OURS: {"color": "#0072B2", "marker": "o", "linewidth": 2.4, "zorder": 3},
    FUSED: {"color": "#D55E00", "marker": "s"},
    EAGER: {"color": "#777777", "marker": "D"},
    FLASH: {"color": "#CC79A7", "marker": "^"},
    FLOAT32: {"color": "black", "linestyle": "--", "linewidth": 1.2, "zorder": 4},
}


def plot(content: dict[str, Any]) -> str:
    """The figure as SVG text, readable when it is 700 pixels wide."""

    def draw() -> Figure:
        figure, (left, right) = drawing.panels(2, width=4.4, height=3.9)
        for name, grads in content["errors"].items():
            percent = [100 * error for error in grads["dq"]]
            left.plot(content["offsets"], percent, label=name, **_LOOKS[name])
        left.set(xlabel="mean of keys and values,\nin standard deviations")
        left.set(ylabel="relative error of dq", title="Gradient of the queries, bfloat16")
        left.set(yscale="log", ylim=(0.1, 100))
        left.yaxis.set_major_formatter(StrMethodFormatter("{x:g} %"))
        for name, losses in content["losses"].items():
            right.plot(losses, label=name, **{**_LOOKS[name], "marker": ""})
        right.set(yscale="log", xlabel="training step", ylabel="loss")
        right.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        bias = content["trained_offset"]
        right.set(title=f"Training a layer with biases of {bias:g}")
        # Every name once, in the order of _LOOKS, under both panels.
        known = {}
        for axes in (right, left):
            known |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        names = [name for name in _LOOKS if name in known]
        figure.legend(
            [known[name] for name in names], names, loc="outside lower center", ncols=len(names)
        )
        return figure

    return drawing.svg(draw)


def table(content: dict[str, Any]) -> str:
    """Errors as markdown."""
    offsets = content["offsets"]
    rows = {
        f"{name}, {grad}": values
        for name, grads in content["errors"].items()
        for grad, values in grads.items()
    }
    rows |= {f"decode, {name} cache": x for name, x in content["cache_errors"].items()}
    lines = ["| mean | " + " | ".join(f"{x:g}" for x in offsets) + " |"]
    lines.append("|---|" + "---|" * len(offsets))
    for name, values in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{100 * x:.2f} %" for x in values) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = importable.ROOT / "bench" / "results" / "gradients.json"
    parser.add_argument("--results", type=Path, default=default, metavar="FILE")
    parser.add_argument("--plot", action="store_true", help="plot FILE without measuring")
    options = parser.parse_args(arguments)
    if options.plot:
        content = read_json(options.results)
    else:
        content = measure(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        write_text(options.results, json.dumps(content, indent=1) + "\n")
    write_text(options.results.with_suffix(".svg"), plot(content))
    print(table(content))


if __name__ == "__main__":
    main()
