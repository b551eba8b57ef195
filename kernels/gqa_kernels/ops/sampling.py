"""Draws a token per row from softmax(logits / temperature), cut to its nucleus, without a sort.

Tokens are ordered by decreasing logit, ties by id. Let w(x) = exp((x − max) / temperature), and let
A(x) be the sum of w over all logits of the row that are greater than x. A decreases in x. A draw
needs two thresholds:

- the nucleus ends at the smallest logit x with A(x) < top_p · Σw;
- the drawn token has the smallest logit x of the nucleus with A(x) ≤ uniform · (sum of w over the
  nucleus).

Both are found by bisection over keys, int32 numbers in the order of the float32 logits. Every step
of a bisection sets one bound to the key of a logit of the row. Equal logits have equal w, so a
division tells which token among equal ones is drawn.

One program draws for one row and sums w in a fixed order, so the batch does not change the result.
Holtzman et al. 2020, arXiv:1904.09751.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gqa_kernels.runtime import checks, configs, launch, layout, library, target

_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_LOWEST = tl.constexpr(-(2**31))
_HIGHEST = tl.constexpr(2**31 - 1)


@triton.jit
def _flip(bits):
    """The int32 key of a float32 given as its bits; keys have the order of the floats. The function
    is its own inverse."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _load(row_ptr, start, vocab_size, BLOCK: tl.constexpr):
    """Loads a block of ids and logits: −infinity beyond the row, 0 for −0, infinity for NaN."""
    ids = start + tl.arange(0, BLOCK)
    x = tl.load(row_ptr + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
    x = tl.where(x == 0.0, 0.0, x)
    return ids, tl.where(x == x, x, float("inf"))


@triton.jit
def _weight(x, highest, temperature):
    return tl.exp((x - highest) / temperature)


@triton.jit
def _above(row_ptr, vocab_size, bound, highest, temperature, BLOCK: tl.constexpr):
    """Returns, for the logits with keys above `bound`, the sum of w and the least key; for the
    others, the greatest key; and the number of keys equal to `bound`."""
    total = tl.zeros([BLOCK], tl.float32)
    least = tl.full([BLOCK], _HIGHEST, tl.int32)
    greatest = tl.full([BLOCK], _LOWEST, tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab_size, BLOCK):
        ids, x = _load(row_ptr, start, vocab_size, BLOCK)
        key = _flip(x.to(tl.int32, bitcast=True))
        is_above, is_token = key > bound, ids < vocab_size
        total += tl.where(is_above, _weight(x, highest, temperature), 0.0)
        least = tl.minimum(least, tl.where(is_above, key, _HIGHEST))
        greatest = tl.maximum(greatest, tl.where(is_above, _LOWEST, key))
        equal += ((key == bound) & is_token).to(tl.int32)
    return tl.sum(total), tl.min(least), tl.max(greatest), tl.sum(equal)


@triton.jit
def _crossing(
    row_ptr, vocab_size, low, high, limit, INCLUSIVE: tl.constexpr, highest, temperature,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Returns the least key between `low` and `high` with A < limit (INCLUSIVE: A ≤ limit).

    `low` and `high` are keys of the row, and `high` meets the condition.
    """
    while low < high:
        # The mean of low and high, rounded down, without overflow.
        middle = (low & high) + ((low ^ high) >> 1)
        total, least, greatest, _ = _above(row_ptr, vocab_size, middle, highest, temperature, BLOCK)
        holds = total <= limit if INCLUSIVE else total < limit
        high = tl.where(holds, greatest, high)
        low = tl.where(holds, low, least)
    return low


@triton.jit
def _kernel(
    logits_ptr,
    temperature_ptr,
    top_p_ptr,
    uniform_ptr,
    tokens_ptr,
    logits_stride,
    temperature_stride,
    top_p_stride,
    uniform_stride,
    vocab_size,
    BLOCK: tl.constexpr,
):
    """One program draws the token of one row."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    temperature = tl.load(temperature_ptr + row * temperature_stride)

    most = tl.full([BLOCK], float("-inf"), tl.float32)
    fewest = tl.full([BLOCK], float("inf"), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        ids, x = _load(row_ptr, start, vocab_size, BLOCK)
        most = tl.maximum(most, x)
        fewest = tl.minimum(fewest, tl.where(ids < vocab_size, x, float("inf")))
    highest, lowest = tl.max(most), tl.min(fewest)
    is_finite = tl.abs(highest) < float("inf")
    top = _flip(highest.to(tl.int32, bitcast=True))
    chosen, nth = top, 0  # the likeliest token; among equals, the first
    if is_finite & (temperature > 0.0):
        temperature = tl.maximum(temperature, _TINY)
        top_p = tl.load(top_p_ptr + row * top_p_stride)
        uniform = tl.load(uniform_ptr + row * uniform_stride)
        bottom = _flip(lowest.to(tl.int32, bitcast=True))
        # Σw equals A at a key below all others.
        total, _, _, _ = _above(
            row_ptr, vocab_size, tl.full([], _LOWEST, tl.int32), highest, temperature, BLOCK
        )
        limit = top_p * total
        last = _crossing(
            row_ptr, vocab_size, bottom, top, limit, False, highest, temperature, BLOCK
        )
        above, _, _, count = _above(row_ptr, vocab_size, last, highest, temperature, BLOCK)
        weight = _weight(_flip(last).to(tl.float32, bitcast=True), highest, temperature)
        # Of the tokens with the last logit of the nucleus, only those needed to reach the limit.
        needed = tl.ceil((limit - above) / tl.maximum(weight, _TINY))
        num_last = tl.maximum(tl.minimum(needed, count.to(tl.float32)), 1.0)
        goal = uniform * (above + num_last * weight)
        chosen = _crossing(row_ptr, vocab_size, last, top, goal, True, highest, temperature, BLOCK)
        above, _, _, count = _above(row_ptr, vocab_size, chosen, highest, temperature, BLOCK)
        weight = _weight(_flip(chosen).to(tl.float32, bitcast=True), highest, temperature)
        num_equal = tl.where(chosen == last, num_last, count.to(tl.float32))
        at = tl.floor((goal - above) / tl.maximum(weight, _TINY))
        nth = tl.maximum(tl.minimum(at, num_equal - 1.0), 0.0).to(tl.int32)

    token, num_before = tl.full([], -1, tl.int32), 0
    for start in range(0, vocab_size, BLOCK):
        ids, x = _load(row_ptr, start, vocab_size, BLOCK)
        equal = (_flip(x.to(tl.int32, bitcast=True)) == chosen) & (ids < vocab_size)
        order = num_before + tl.cumsum(equal.to(tl.int32), 0) - 1
        token = tl.maximum(token, tl.max(tl.where(equal & (order == nth), ids, -1)))
        num_before += tl.sum(equal.to(tl.int32))
    tl.store(tokens_ptr + row, tl.where(is_finite, token, -1).to(tl.int64))


_launch_kernel = launch.launcher(_kernel)


def _launch(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    rows = layout.rows(logits)
    batch, vocab_size = rows.shape
    tokens = torch.empty(batch, dtype=torch.int64, device=logits.device)
    with target.device_of(logits):
        _launch_kernel(
            (batch,),
            logits_ptr=rows,
            temperature_ptr=temperature,
            top_p_ptr=top_p,
            uniform_ptr=uniform,
            tokens_ptr=tokens,
            logits_stride=rows.stride(0),
            temperature_stride=temperature.stride(0),
            top_p_stride=top_p.stride(0),
            uniform_stride=uniform.stride(0),
            vocab_size=vocab_size,
            BLOCK=min(configs.SAMPLING_BLOCK, layout.power_of_2(vocab_size)),
            num_warps=configs.SAMPLING_NUM_WARPS,
        )
    return tokens


def _check(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> None:
    checks.tensor("logits", logits, shape=("batch", "vocab_size"))
    if logits.shape[1] == 0:
        raise ValueError(f"logits: expected a vocab_size of 1 or more; got {list(logits.shape)}")
    for name, x in (("temperature", temperature), ("top_p", top_p), ("uniform", uniform)):
        shape = (logits.shape[0],)
        checks.tensor(name, x, dtypes=(torch.float32,), shape=shape, like=("logits", logits))


def _fake(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[:1], dtype=torch.int64)


_SAMPLE = library.Op(
    "sample_tokens",
    _launch,
    _fake,
    check=_check,
    refuse=library.refuse_gradient("sample", "logits"),
)


def sample_tokens(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """Draws a token per row; see `reference.sample_tokens`. One launch.

    The token differs from the reference's only where `uniform` is so close to the border between
    two tokens that the rounding of the cumulative sums decides.

    Args:
        logits: float32, float16 or bfloat16 `[batch, vocab_size]`, any strides.
        temperature, top_p, uniform: float32 `[batch]`.
    Returns:
        int64 `[batch]`; −1 for a row with NaN, with +infinity, or with −infinity only.
    Raises:
        TypeError, ValueError: an argument of another kind, dtype, shape or device.
        NotImplementedError: an argument requires a gradient; sampling has none.
        RuntimeError: logits is not on a GPU that Triton drives.
    """
    return _SAMPLE(logits, temperature, top_p, uniform)
