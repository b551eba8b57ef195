"""Flash attention with grouped key/value heads: the public functions and their gradient.

`forward.py` and `backward.py` contain the kernels, the formulas and what one program owns;
`hopper/`: kernels for Hopper; `launch.py`: which kernel a call gets; `scores.py`: windows, soft
cap, ALiBi and masks; `sequences.py`: packed sequences. Saved for backward: the inputs, out, lse
and, for 16-bit inputs, the residue of out, one byte per element.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils.flop_counter import register_flop_formula

from gqa_kernels.ops.attention.backward import launch_backward
from gqa_kernels.ops.attention.call import Call, batched, check, prepared
from gqa_kernels.ops.attention.launch import launch_forward
from gqa_kernels.runtime import checks, library


def _takes(arguments: dict[str, Any], result: Any) -> Callable[[Callable], Callable]:
    """Gives a function of `*args` the signature from which PyTorch infers the op's schema."""

    def decorate(function: Callable) -> Callable:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        function.__signature__ = inspect.Signature(
            [inspect.Parameter(name, kind, annotation=arguments[name]) for name in arguments],
            return_annotation=result,
        )
        return function

    return decorate


@_takes({**Call.__annotations__, "need_residue": bool}, tuple[Tensor, Tensor, Tensor])
def _forward(*arguments: Any, need_lse: bool = True) -> tuple[Tensor | None, ...]:
    *arguments, need_residue = arguments
    call = Call(*arguments)
    results = launch_forward(prepared(call), need_lse=need_lse, need_residue=need_residue)
    if call.packed:
        for result in results:
            if result is not None:
                result.squeeze_(0)  # in place: callers could not write to a view
    return results


def _fake(*arguments: Any) -> tuple[Tensor | None, ...]:
    *arguments, need_residue = arguments
    q = Call(*arguments).q
    lse_shape = (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])
    residue = q.new_empty(q.shape, dtype=torch.int8) if need_residue else None
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32), residue


def _check(*arguments: Any) -> None:
    *arguments, need_residue = arguments
    check(*arguments)
    if need_residue and arguments[0].dtype == torch.float32:
        raise ValueError("need_residue: expected False for float32 tensors; got True")


def outputs(call: Call, *, need_residue: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out, natural lse, residue) of a call, for callers that record the gradient themselves."""
    with torch.no_grad():
        out, lse, residue = _OP(*call, need_residue and call.q.dtype != torch.float32)
    return out, lse * call.score_unit, residue


def gradients(
    call: Call,
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    residue: Tensor | None,
    *,
    need_dq: bool,
    need_dkdv: bool,
    need_dsinks: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Returns (dq, dk, dv, dsinks), each None unless needed.

    Args:
        dout, dlse: the gradients of out and, unless None, of lse.
        out, lse, residue: what the call returned; lse in score units. If the residue is None or
            empty, the forward pass runs again to compute it.
    """
    if residue is not None and residue.shape != out.shape:
        residue = None
    *grads, dsinks = launch_backward(
        prepared(call),
        *batched(call.packed, dout, dlse, out, lse, residue),
        need_dq=need_dq,
        need_dkdv=need_dkdv,
        need_dsinks=need_dsinks,
    )
    if call.packed:
        grads = [None if grad is None else grad.squeeze(0) for grad in grads]
    return *grads, dsinks


def _split(arguments: tuple) -> tuple[Call, tuple, tuple]:
    """(call, (dout, dlse, out, lse, residue), (need_dq, need_dkdv, need_dsinks))."""
    dout, dlse, q, k, v, out, lse, residue, *rest = arguments
    constants, needs = rest[:-3], rest[-3:]
    return Call(q, k, v, *constants), (dout, dlse, out, lse, residue), tuple(needs)


_CALL = list(Call.__annotations__.items())


@_takes(
    {
        "dout": Tensor,
        "dlse": Tensor | None,
        **dict(_CALL[:3]),
        "out": Tensor,
        "lse": Tensor,
        "residue": Tensor | None,
        **dict(_CALL[3:]),
        "need_dq": bool,
        "need_dkdv": bool,
        "need_dsinks": bool,
    },
    tuple[Tensor, Tensor, Tensor, Tensor],
)
def _backward(*arguments: Any) -> tuple[Tensor | None, ...]:
    call, tensors, (need_dq, need_dkdv, need_dsinks) = _split(arguments)
    return gradients(call, *tensors, need_dq=need_dq, need_dkdv=need_dkdv, need_dsinks=need_dsinks)


def _backward_fake(*arguments: Any) -> tuple[Tensor | None, ...]:
    call, _, (need_dq, need_dkdv, need_dsinks) = _split(arguments)
    needs = ((call.q, need_dq), (call.k, need_dkdv), (call.v, need_dkdv), (call.sinks, need_dsinks))
    return tuple(x.new_empty(x.shape) if need else None for x, need in needs)


_BACKWARD = library.Op("flash_attention_backward", _backward, _backward_fake)


def _setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor | None, ...]) -> None:
    call = Call(*inputs[:-1])
    if ctx.needs_input_grad[Call._fields.index("alibi_slopes")]:
        raise NotImplementedError("alibi_slopes: expected a constant; got one that requires grad")
    ctx.save_for_backward(*call[:9], *output)
    ctx.numbers = call[9:]
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: FunctionCtx, dout: Tensor | None, dlse: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    grads = dict.fromkeys((*Call._fields, "need_residue"))
    if dout is None and dlse is None:
        return tuple(grads.values())
    *tensors, out, lse, residue = ctx.saved_tensors
    call = Call(*tensors, *ctx.numbers)
    needed = dict(zip(grads, ctx.needs_input_grad, strict=True))
    values = _BACKWARD(
        torch.zeros_like(out) if dout is None else dout, dlse, *call[:3], out, lse, residue,
        *call[3:],
        needed["q"], needed["k"] or needed["v"], needed["sinks"],
    )  # fmt: skip
    for name, value in zip(("q", "k", "v", "sinks"), values, strict=True):
        grads[name] = value if needed[name] else None
    return tuple(grads.values())


_OP = library.Op(
    "flash_attention",
    _forward,
    _fake,
    check=_check,
    setup_context=_setup_context,
    backward=_differentiate,
)


def _num_pairs(call: Call) -> int:
    """Queries × keys, including masked ones, as PyTorch counts them for its own attention."""
    if not call.packed:
        return call.q.shape[0] * call.q.shape[1] * call.k.shape[1]
    lengths = (bounds.diff().tolist() for bounds in (call.cu_seqlens_q, call.cu_seqlens_kv))
    return sum(q * k for q, k in zip(*lengths, strict=True))


@register_flop_formula(_OP.dispatched.overloadpacket, get_raw=True)
def _flops(*arguments: Any, out_val: Any = None, **_: Any) -> int:
    """Two products of 2 · head_dim flops per pair of query and key."""
    call = Call(*arguments[:-1])
    return 4 * _num_pairs(call) * call.q.shape[-2] * call.q.shape[-1]


@register_flop_formula(_BACKWARD.dispatched.overloadpacket, get_raw=True)
def _backward_flops(*arguments: Any, out_val: Any = None, **_: Any) -> int:
    """Five products of 2 · head_dim flops per pair of query and key."""
    call, _, _ = _split(arguments)
    return 10 * _num_pairs(call) * call.q.shape[-2] * call.q.shape[-1]


def _attend(
    call: Call,
    *,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Runs the call with the window given by `causal` and `window`."""
    causal, return_lse = checks.flag("causal", causal), checks.flag("return_lse", return_lse)
    window_left, window_right = checks.window(window)
    call = Call(
        *call[:9],
        softmax_scale=checks.optional_number("softmax_scale", call.softmax_scale),
        window_left=window_left,
        window_right=0 if causal else window_right,
        softcap=checks.optional_number("softcap", call.softcap),
    )
    q = call.q
    rounds = isinstance(q, Tensor) and q.dtype != torch.float32
    need_residue = rounds and library.keeps_for_gradient(*call)
    out, lse, _ = _OP(*call, need_residue, need_lse=return_lse)
    return (out, lse * call.score_unit) if return_lse else out


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
            that each query may see, first ≤ j < end, in addition to all other masks. Ranges may be
            empty and may reach beyond the keys. The kernel reads them on the device and skips tiles
            outside all ranges.
        key_mask: bool, uint8, int32 or int64 `[batch, seq_len_kv]`; a key with 0 is hidden from
            every query. Hidden keys and values must be finite: 0 · NaN is NaN.
        return_lse: also return the natural-log lse, float32 `[batch, num_q_heads, seq_len_q]`.
            Differentiable.
    Returns:
        out, contiguous, of q's shape and dtype; or (out, lse). For a query that sees no key, out is
        0, lse is −inf or its sink, and the gradients are 0.
    Numerics: products accumulate in float32, float32 inputs multiply in float32 (not TF32); the
        softmax is float32; weights and the gradients of scores are rounded to the inputs' dtype
        before they are multiplied. The backward pass recomputes the weights from lse, with a
        relative error that grows as |lse| · 2⁻²⁴, like that of eager code. For 16-bit inputs, the
        forward pass saves 8 more bits of each element of out (`backward.py`). Gradients have the
        same bits in every run.
    Raises:
        TypeError, ValueError: an argument of another kind, dtype, shape or device.
        NotImplementedError: another head_dim; alibi_slopes requires a gradient.
        RuntimeError: q is not on a GPU that Triton drives.
    """
    call = Call(
        q, k, v, None, None, sinks, alibi_slopes, key_ranges, key_mask,
        softmax_scale, None, None, softcap,
    )  # fmt: skip
    return _attend(call, causal=causal, window=window, return_lse=return_lse)


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

    The kernel reads the bounds on the device, so the caller needs to know no maximum length. Bounds
    beyond the rows count as the number of rows; decreasing bounds give undefined rows.

    Args:
        q: float32, float16 or bfloat16 `[total_q, num_q_heads, head_dim]`, any strides.
        k, v: the same dtype, `[total_kv, num_kv_heads, head_dim]`.
        cu_seqlens_q, cu_seqlens_kv: int32 or int64 `[num_sequences + 1]`, num_sequences ≥ 1, from
            0 and never decreasing; sequences may be empty. Queries after the last sequence see no
            key, and no query sees keys after it.
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
    call = Call(
        q, k, v, cu_seqlens_q, cu_seqlens_kv, sinks, alibi_slopes, None, None,
        softmax_scale, None, None, softcap,
    )  # fmt: skip
    return _attend(call, causal=causal, window=window, return_lse=return_lse)
