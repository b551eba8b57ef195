"""Softmax, loss and gradient of a chunk of logits: one program owns one row.

x = unit · cap(logit)                          scores; cap(z) = tanh(cap_scale · z), or z
c = max x,  s = log Σ exp(x − c),  t = x[target] − c,  μ = Σ p · (x − c)
p = exp(x − c − s)
dx = p · (ds + dμ · (1 + x − c − μ)) + dt · [v = target]
dlogit = dx · slope · (1 − cap²)               slope · (1 − cap²) = dx / dlogit
"""

import triton
import triton.language as tl

from gqa_kernels.ops.linear_cross_entropy.products import named_rows, num_left
from gqa_kernels.primitives.scores import cap, cap_derivative


@triton.jit
def _load(ptr, row, absent):
    value = absent
    if ptr is not None:
        value = tl.load(ptr + row)
    return value


@triton.jit(do_not_specialize=("first", "num_rows"))
def softmax_kernel(
    logits_ptr,
    targets_ptr,
    order_ptr,
    count_ptr,
    loss_ptr,
    maximum_ptr,
    log_sum_ptr,
    score_ptr,
    mean_ptr,
    dlog_sum_ptr,
    dscore_ptr,
    dmean_ptr,
    first,
    num_rows,
    logits_stride,
    cap_scale,
    unit,
    slope,
    z_loss,
    VOCAB: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    KNOWN: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """One program processes one row: it writes the requested vectors and, with GRADIENT, replaces
    the logits by their gradient.

    loss_ptr: for −log p(target) + z_loss · lse²; unless None, the gradient is that of this loss.
    WIDTH: of the row in memory; the padding behind the vocabulary is 0 and remains 0.
    KNOWN: maximum, log_sum and mean are read, not computed.
    """
    chunk_row = tl.program_id(0)
    if chunk_row >= num_left(count_ptr, first, num_rows):
        return
    row = named_rows(order_ptr, first, chunk_row, chunk_row < num_rows)
    logits_ptr += chunk_row.to(tl.int64) * logits_stride
    target = tl.load(targets_ptr + row)
    known = (target >= 0) & (target < VOCAB)
    if KNOWN:
        maximum, log_sum = tl.load(maximum_ptr + row), tl.load(log_sum_ptr + row)
        mean = _load(mean_ptr, row, 0.0)
    else:
        # Loaded before the first reduction, before any thread overwrites it with a gradient.
        logit = tl.load(logits_ptr + tl.where(known, target, 0)).to(tl.float32)
        maximum, total, weighted = -float("inf"), 0.0, 0.0
        for start in range(0, VOCAB, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            logits = tl.load(logits_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
            x = tl.where(columns < VOCAB, unit * cap(logits, cap_scale), -float("inf"))
            new_maximum = tl.maximum(maximum, tl.max(x))
            # If all logits so far are −inf, there is nothing to subtract.
            origin = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)
            scale = tl.exp(maximum - origin)
            powers = tl.exp(x - origin)
            if mean_ptr is not None:
                # Converts Σ exp(x − c) · (x − c) to the new c.
                moved = total * tl.where(total > 0.0, maximum - origin, 0.0)
                terms = powers * tl.where(columns < VOCAB, x - origin, 0.0)
                weighted = (weighted + moved) * scale + tl.sum(terms)
            total = total * scale + tl.sum(powers)
            maximum = new_maximum
        log_sum, mean = tl.log(total), weighted / total
        score = tl.where(known, unit * cap(logit, cap_scale) - maximum, 0.0)
        if maximum_ptr is not None:
            tl.store(maximum_ptr + row, maximum)
            tl.store(log_sum_ptr + row, log_sum)
            tl.store(score_ptr + row, score)
        if mean_ptr is not None:
            tl.store(mean_ptr + row, mean)
        if loss_ptr is not None:
            log_sum = tl.where(known, log_sum, float("nan"))
            lse = maximum + log_sum
            tl.store(loss_ptr + row, log_sum - score + z_loss * lse * lse)
    if GRADIENT:
        if loss_ptr is not None:
            dlog_sum, dscore = 1.0 + 2.0 * z_loss * (maximum + log_sum), -1.0
        else:
            dlog_sum = _load(dlog_sum_ptr, row, 0.0)
            dscore = _load(dscore_ptr, row, 0.0)
        for start in range(0, VOCAB, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            mask = columns < WIDTH
            logits = tl.load(logits_ptr + columns, mask=mask, other=0.0).to(tl.float32)
            capped = cap(logits, cap_scale)
            x = unit * capped - maximum
            upstream = dlog_sum
            if dmean_ptr is not None:
                upstream += tl.load(dmean_ptr + row) * (1.0 + (x - mean))
            dx = tl.exp(x - log_sum) * upstream
            dx += tl.where(columns == target, dscore, 0.0)
            dlogits = tl.where(columns < VOCAB, dx * slope, 0.0)
            if cap_scale is not None:
                dlogits *= cap_derivative(capped)
            tl.store(logits_ptr + columns, dlogits.to(logits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def scale_kernel(x_ptr, factor_ptr, y_ptr, num_elements, BLOCK: tl.constexpr):
    """y = x · factor, rounded once; one program computes BLOCK elements. Zeros, such as gradients
    of ignored rows, stay 0 for every factor."""
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = elements < num_elements
    x = tl.load(x_ptr + elements, mask=mask, other=0.0).to(tl.float32)
    y = tl.where(x == 0.0, 0.0, x * tl.load(factor_ptr))
    tl.store(y_ptr + elements, y.to(y_ptr.dtype.element_ty), mask=mask)
