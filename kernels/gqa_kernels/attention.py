"""Flash attention with grouped key/value heads: the public functions and their gradient.

The kernels, with the formulas and what one program owns, are in `attention_forward.py` and
`attention_backward.py`; windows, soft cap, ALiBi and masks in `scores.py`; packed sequences in
`sequences.py`. Saved for backward: the inputs, out and lse.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from gqa_kernels import attention_backward, attention_forward, checks, layout, library


def _arguments(
    q: Tensor,
    cu_seqlens: tuple[Tensor | None, Tensor | None],
    constants: tuple[Tensor | None, Tensor | None],
    key_ranges: Tensor | None,
    key_mask: Tensor | None,
    softmax_scale: float | None,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
) -> tuple:
    """What both passes hand to their kernels after the tensors of `[batch, …]`."""
    cu_seqlens_q, cu_seqlens_kv, sinks, alibi_slopes = (
        None if x is None else x.contiguous() for x in (*cu_seqlens, *constants)
    )
    softmax_scale = checks.softmax_scale(softmax_scale, q.shape[-1])
    if cu_seqlens_q is None and q.shape[1] == 1:
        window_right = None  # one query, the last: no key lies to its right
    # Nothing is as far away as 2³⁰ rows, and sums of two such distances fit 32 bits.
    window = (None if side is None else min(side, 2**30) for side in (window_left, window_right))
    softcap = None if softcap is None else float(softcap)
    return (
        cu_seqlens_q, cu_seqlens_kv, sinks, alibi_slopes, key_ranges, layout.key_mask(key_mask),
        softmax_scale, *window, softcap,
    )  # fmt: skip


def _batched(packed: bool, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Packed tensors as one batch entry."""
    return tuple(x if x is None or not packed else x.unsqueeze(0) for x in tensors)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_kv: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    key_ranges: Tensor | None,
    key_mask: Tensor | None,
    softmax_scale: float | None,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    return _forward(
        q, k, v, cu_seqlens_q, cu_seqlens_kv, sinks, alibi_slopes, key_ranges, key_mask,
        softmax_scale, window_left, window_right, softcap, need_lse=True,
    )  # fmt: skip


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_kv: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    key_ranges: Tensor | None,
    key_mask: Tensor | None,
    *scores: float | None,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    packed = cu_seqlens_q is not None
    out, lse = attention_forward.forward(
        *_batched(packed, q, k, v),
        *_arguments(
            q, (cu_seqlens_q, cu_seqlens_kv), (sinks, alibi_slopes), key_ranges, key_mask, *scores
        ),
        need_lse=need_lse,
    )
    if packed:  # in place: a view could not be written to by the caller
        out.squeeze_(0)
        if need_lse:
            lse.squeeze_(0)
    return out, lse


def _fake(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, *_: object
) -> tuple[Tensor, Tensor]:
    if cu_seqlens_q is None:
        lse_shape = (q.shape[0], q.shape[2], q.shape[1])
    else:
        lse_shape = (q.shape[1], q.shape[0])
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


def _backward_launch(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_kv: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    key_ranges: Tensor | None,
    key_mask: Tensor | None,
    softmax_scale: float | None,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    need_dq: bool,
    need_dkdv: bool,
    need_dsinks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    packed = cu_seqlens_q is not None
    *grads, dsinks = attention_backward.backward(
        *_batched(packed, dout, dlse, q, k, v, out, lse),
        *_arguments(
            q, (cu_seqlens_q, cu_seqlens_kv), (sinks, alibi_slopes), key_ranges, key_mask,
            softmax_scale, window_left, window_right, softcap,
        ),
        need_dq=need_dq,
        need_dkdv=need_dkdv,
        need_dsinks=need_dsinks,
    )  # fmt: skip
    grads = (
        library.or_empty(None if grad is None else grad.view(x.shape), q)
        for grad, x in zip(grads, (q, k, v), strict=True)
    )
    return *grads, library.or_empty(dsinks, q)


def _backward_fake(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_kv: Tensor | None,
    sinks: Tensor | None,
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, need_dq, need_dkdv, need_dsinks = rest
    needs = ((q, need_dq), (k, need_dkdv), (v, need_dkdv))
    dsinks = sinks.new_empty(sinks.shape) if need_dsinks else q.new_empty(0)
    return *(x.new_empty(x.shape if need else 0) for x, need in needs), dsinks


_BACKWARD = library.Op("flash_attention_backward", _backward_launch, _backward_fake)


def _setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *constants, ctx.softmax_scale, ctx.left, ctx.right, ctx.softcap = inputs
    ctx.save_for_backward(q, k, v, *output, *constants)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: FunctionCtx, dout: Tensor | None, dlse: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *constants = ctx.saved_tensors
    need_dq, need_dk, need_dv, _, _, need_dsinks, *_ = ctx.needs_input_grad
    if dout is None and dlse is None:
        return (None,) * 13
    dq, dk, dv, dsinks = _BACKWARD(
        torch.zeros_like(out) if dout is None else dout, dlse, q, k, v, out, lse,
        *constants, ctx.softmax_scale, ctx.left, ctx.right, ctx.softcap,
        need_dq, need_dk or need_dv, need_dsinks,
    )  # fmt: skip
    return (
        dq if need_dq else None,
        dk if need_dk else None,
        dv if need_dv else None,
        None,
        None,
        dsinks if need_dsinks else None,
        *(None,) * 7,
    )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_kv: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    key_ranges: Tensor | None,
    key_mask: Tensor | None,
    softmax_scale: float | None,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
) -> None:
    if cu_seqlens_q is None:
        checks.tensor("q", q, shape=("batch", "seq_len_q", "num_q_heads", "head_dim"))
        kv_shape = (q.shape[0], "seq_len_kv", "num_kv_heads", q.shape[-1])
        num_sequences = q.shape[0]
    else:
        checks.tensor("q", q, shape=("total_q", "num_q_heads", "head_dim"))
        kv_shape = ("total_kv", "num_kv_heads", q.shape[-1])
        bounds = ("num_sequences + 1",)
        checks.tensor("cu_seqlens_q", cu_seqlens_q, dtypes=checks.INTS, shape=bounds, like=("q", q))
        num_sequences = cu_seqlens_q.shape[0] - 1
        if num_sequences < 1:
            raise ValueError("cu_seqlens_q: expected the bounds of one sequence or more; got none")
        checks.tensor(
            "cu_seqlens_kv",
            cu_seqlens_kv,
            dtypes=checks.INTS,
            shape=(num_sequences + 1,),
            like=("q", q),
        )
    checks.tensor("k", k, shape=kv_shape, like=("q", q))
    checks.tensor("v", v, shape=tuple(k.shape), like=("q", q))
    checks.same_dtype("k", k, "q", q)
    checks.same_dtype("v", v, "q", q)
    num_q_heads, head_dim = q.shape[-2:]
    checks.attention_heads(num_q_heads, k.shape[-2], head_dim)
    checks.softcap(softcap, checks.softmax_scale(softmax_scale, head_dim))
    checks.window((window_left, window_right))
    if sinks is not None:
        checks.tensor("sinks", sinks, shape=(num_q_heads,), like=("q", q))
    if alibi_slopes is not None:
        checks.tensor("alibi_slopes", alibi_slopes, dtypes=(torch.float32,), like=("q", q))
        shape = (num_sequences, num_q_heads) if alibi_slopes.dim() == 2 else (num_q_heads,)
        checks.tensor("alibi_slopes", alibi_slopes, dtypes=(torch.float32,), shape=shape)
    if cu_seqlens_q is not None and (key_ranges is not None or key_mask is not None):
        raise ValueError("key_ranges, key_mask: expected None with cu_seqlens_q; got one of them")
    checks.key_limits(key_ranges, key_mask, (num_sequences, q.shape[1], k.shape[1]), like=("q", q))


def _setup_after_checking_constants(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
    if ctx.needs_input_grad[6]:
        raise NotImplementedError("alibi_slopes: expected a constant; got one that requires grad")
    _setup_context(ctx, inputs, output)


_OP = library.Op(
    "flash_attention",
    _launch,
    _fake,
    check=_check,
    setup_context=_setup_after_checking_constants,
    backward=_backward,
)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_kv: Tensor | None,
    causal: bool,
    softmax_scale: float | None,
    window: tuple[int | None, int | None] | None,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    key_ranges: Tensor | None,
    key_mask: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    checks.flag("causal", causal)
    checks.flag("return_lse", return_lse)
    window_left, window_right = checks.window(window)
    if causal:
        window_right = 0
    tensors = (q, k, v, cu_seqlens_q, cu_seqlens_kv, sinks, alibi_slopes, key_ranges, key_mask)
    scores = (softmax_scale, window_left, window_right, softcap)
    if library.is_traced(*tensors):
        out, lse = _OP.dispatched(*tensors, *scores)
    else:
        _check(*tensors, *scores)
        if library.needs_graph(q, k, v, sinks, alibi_slopes):
            out, lse = _OP.function.apply(*tensors, *scores)
        else:
            out, lse = _forward(*tensors, *scores, need_lse=return_lse)
    return (out, lse) if return_lse else out


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    key_ranges: Tensor | None = None,
    key_mask: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention with grouped heads; formula and sources: `reference.flash_attention`.

    Args:
        q: float32, float16 or bfloat16 `[batch, seq_len_q, num_q_heads, head_dim]`; head_dim a
            multiple of 8 up to 256; any strides, without a copy where features are contiguous.
        k, v: the same dtype, `[batch, seq_len_kv, num_kv_heads, head_dim]`; num_q_heads is a
            multiple of num_kv_heads.
        causal: query i sees keys j ≤ p = i + seq_len_kv − seq_len_q.
        softmax_scale: positive; None means 1 / sqrt(head_dim).
        window: (left, right): query i sees keys p − left ≤ j ≤ p + right; None does not limit a
            side. Causal attention sees no key to the right.
        softcap: positive; scores become softcap · tanh(score / softcap).
        sinks: float32, float16 or bfloat16 `[num_q_heads]`: the score of one more key per head,
            whose value is 0; finite, or −inf for none. Differentiable.
        alibi_slopes: float32 `[num_q_heads]` or `[batch, num_q_heads]`; scores become
            score − slope · |p − j|. A constant.
        key_ranges: int32 or int64 `[batch, seq_len_q, 2]`, any strides: (first, end) of the keys
            that each query may see, first ≤ j < end, beside all else. Ranges may be empty and may
            reach beyond the keys. Read on the device; tiles outside all ranges are not visited.
        key_mask: bool, uint8, int32 or int64 `[batch, seq_len_kv]`; a key with 0 is hidden from
            every query. Hidden keys and values must be finite: 0 · NaN is NaN.
        return_lse: also return the natural-log lse, float32 `[batch, num_q_heads, seq_len_q]`.
            Differentiable.
    Returns:
        out, contiguous, of q's shape and dtype; or (out, lse). A query that sees no key gives 0,
        and −inf or its sink; its gradients are 0.
    Numerics: products accumulate in float32, float32 inputs multiply in float32 (not TF32); the
        softmax is float32; weights and the gradients of scores are rounded to the inputs' dtype
        before they are multiplied. The backward pass computes weights again from lse, with a
        relative error that grows as |lse| · 2⁻²⁴. Gradients have the same bits in every run.
    Raises:
        TypeError, ValueError: an argument of another kind, dtype, shape or device.
        NotImplementedError: another head_dim; alibi_slopes that require a gradient.
        RuntimeError: q is not on a GPU that Triton drives.
    """
    return _attend(
        q, k, v, None, None,
        causal, softmax_scale, window, softcap, sinks, alibi_slopes, key_ranges, key_mask,
        return_lse,
    )  # fmt: skip


def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attention` of packed sequences; see `reference.flash_attention_varlen`.

    Bounds are read on the device, so that no longest length has to be known. Bounds beyond the
    rows count as the number of rows; decreasing ones give rows without meaning.

    Args:
        q: float32, float16 or bfloat16 `[total_q, num_q_heads, head_dim]`, any strides.
        k, v: the same dtype, `[total_kv, num_kv_heads, head_dim]`.
        cu_seqlens_q, cu_seqlens_kv: int32 or int64 `[num_sequences + 1]`, num_sequences ≥ 1, from
            0 and never decreasing; sequences may be empty. Rows after the last sequence see no
            key, and no query sees them.
        alibi_slopes: float32 `[num_q_heads]` or `[num_sequences, num_q_heads]`.
        All else as in `flash_attention`.
    Returns:
        out `[total_q, num_q_heads, head_dim]`; or (out, lse), lse float32 `[num_q_heads, total_q]`.
    Raises:
        As `flash_attention`.
    """
    for name, bounds in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_kv", cu_seqlens_kv)):
        if not isinstance(bounds, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor; got {type(bounds).__name__}")
    return _attend(
        q, k, v, cu_seqlens_q, cu_seqlens_kv,
        causal, softmax_scale, window, softcap, sinks, alibi_slopes, None, None, return_lse,
    )  # fmt: skip
