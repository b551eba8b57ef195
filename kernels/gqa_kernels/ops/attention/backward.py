"""The backward pass of flash attention.

With P = exp(scores − lse), dP = dO Vᵀ and delta = rowsum(dO ∘ O) − dlse,

    dS = P ∘ (dP − delta)      with respect to the scores; times 1 − tanh² under a soft cap
    dV = Pᵀ dO        dK = softmax_scale · dSᵀ Q        dQ = softmax_scale · dS K
    dsinks = −Σ over queries of exp(sink − lse) · delta

Dao 2023, arXiv:2307.08691, in two kernels (`dkdv.py`, `dq.py`) with seven products. One program
sums each gradient in its registers, in one order, so gradients have the same bits in every run. A
kernel that runs first prepares delta. The kernels subtract lse and delta after a product: Triton
would let an addition start the product's sum at them, and every step would then round at their
size.

delta is computed from O before rounding; the forward pass saves the difference in the residue. An
error of delta, times the mean of the keys that a query sees, is an error of dQ. If delta is
computed from the rounded O, as is usual, dQ loses most of its digits where keys and values have a
mean (see "How accurate is it" in kernels/README.md).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gqa_kernels.ops.attention import dkdv_specialized
from gqa_kernels.ops.attention.call import Call, block_d, kernel_arguments
from gqa_kernels.ops.attention.dkdv import key_value_gradients
from gqa_kernels.ops.attention.dq import query_gradient
from gqa_kernels.ops.attention.forward import launch_forward
from gqa_kernels.ops.attention.launch import hopper_config
from gqa_kernels.primitives.residue import restore
from gqa_kernels.primitives.tiles import load_rows
from gqa_kernels.runtime import configs, hopper_configs, launch, layout, target


@triton.jit(do_not_specialize=["seq_len_q"])
def _prepare_kernel(
    out_ptr,
    residue_ptr,
    dout_ptr,
    dlse_ptr,
    delta_ptr,
    dout_strides,
    seq_len_q,
    num_heads,
    score_unit,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program computes the delta of BLOCK_M queries of one head."""
    num_blocks = tl.cdiv(seq_len_q, BLOCK_M)
    start = tl.program_id(0) % num_blocks * BLOCK_M
    head = (tl.program_id(0) // num_blocks % num_heads).to(tl.int64)
    batch = (tl.program_id(0) // num_blocks // num_heads).to(tl.int64)
    offset, stride = (batch * seq_len_q * num_heads + head) * HEAD_DIM, num_heads * HEAD_DIM
    dout_ptr += batch * dout_strides[0] + head * dout_strides[2]
    out = load_rows(out_ptr + offset, stride, start, seq_len_q, HEAD_DIM, BLOCK_M, BLOCK_D)
    if residue_ptr is not None:
        residue_ptr += offset
        residue = load_rows(residue_ptr, stride, start, seq_len_q, HEAD_DIM, BLOCK_M, BLOCK_D)
        out = restore(out, residue)
    dout = load_rows(dout_ptr, dout_strides[1], start, seq_len_q, HEAD_DIM, BLOCK_M, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)  # [BLOCK_M]
    queries = start + tl.arange(0, BLOCK_M)
    exists = queries < seq_len_q
    offsets = (batch * num_heads + head) * seq_len_q + queries
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + offsets, mask=exists, other=0.0) / score_unit
    tl.store(delta_ptr + offsets, delta, mask=exists)


_launch_prepare = launch.launcher(_prepare_kernel)


def launch_backward(
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
    unmeasured: bool = False,
    specialize: bool = False,
    deterministic: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dq, dk, dv, dsinks) of a prepared call, each None unless needed.

    Args:
        dout, out: of the call's q's shape.
        dlse, lse: `[batch, num_q_heads, seq_len_q]`, in score units.
        residue: that of the forward pass; if it is None for a 16-bit out, the forward pass runs
            again.
        unmeasured: also take kernels that were never measured on a GPU, if they cover the call.
        specialize: take `dkdv_specialized.py`, measured or not, if it covers the call, and the
            portable kernel of dq.
        deterministic: False: the kernel for Hopper that adds to dq in any order takes a call that
            it covers, if all gradients are needed.
    """
    dout = layout.contiguous_features(dout)
    out, lse = out.contiguous(), lse.contiguous()  # as the forward pass returns them
    if residue is None and out.dtype != torch.float32:
        residue = launch_forward(call, need_lse=False, need_residue=True)[2]
    dq = dk = dv = dsinks = None
    with target.device_of(call.q):
        delta = _prepare(call, dout, dlse, out, lse, residue)
        config = hopper_config(call, hopper_configs.HOPPER_BACKWARD, unmeasured=unmeasured)
        if specialize:
            config = None
        if config is None or out.numel() == 0 or call.k.numel() == 0:
            given = {
                "dout_ptr": dout,
                "dout_strides": dout.stride()[:3],
                "lse_ptr": lse,
                "delta_ptr": delta,
                "softmax_scale": call.softmax_scale,
                **kernel_arguments(call),
            }
            if need_dkdv:
                row = dkdv_specialized.config_of(call, unmeasured=specialize)
                if row is None:
                    dk, dv = key_value_gradients(call, given)
                else:
                    dk, dv = dkdv_specialized.key_value_gradients(call, dout, lse, delta, row)
            if need_dq:
                dq = query_gradient(call, given)
        else:
            # Late: whatever becomes of `triton.experimental`, the others can be imported.
            from gqa_kernels.ops.attention.hopper import dkdv as hopper_dkdv
            from gqa_kernels.ops.attention.hopper import dq as hopper_dq
            from gqa_kernels.ops.attention.hopper import fused

            if not deterministic and need_dq and need_dkdv:
                dq, dk, dv = fused.gradients(call, dout, lse, delta, config)
                need_dq = need_dkdv = False
            if need_dkdv:
                dk, dv = hopper_dkdv.key_value_gradients(call, dout, lse, delta, config)
            if need_dq:
                dq = hopper_dq.query_gradient(call, dout, lse, delta, config)
    if need_dsinks:
        sinks = call.sinks
        weights = torch.exp(
            sinks.float()[:, None] - lse * call.score_unit
        )  # [batch, num_q_heads, seq_len_q]
        weights = weights.masked_fill(lse == -torch.inf, 0.0)
        dsinks = -(weights * delta).sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, dsinks


def _prepare(
    call: Call,
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    residue: Tensor | None,
) -> Tensor:
    """delta `[batch, num_q_heads, seq_len_q]`."""
    batch, seq_len_q, num_q_heads, head_dim = call.q.shape
    delta = torch.empty_like(lse)
    if out.numel() > 0:
        block_m = configs.ATTENTION_PREPARE_BLOCK
        _launch_prepare(
            (layout.cdiv(seq_len_q, block_m) * num_q_heads * batch,),
            out_ptr=out,
            residue_ptr=residue,
            dout_ptr=dout,
            dlse_ptr=None if dlse is None else dlse.contiguous(),
            delta_ptr=delta,
            dout_strides=dout.stride()[:3],
            seq_len_q=seq_len_q,
            num_heads=num_q_heads,
            score_unit=call.score_unit,
            HEAD_DIM=head_dim,
            BLOCK_M=block_m,
            BLOCK_D=block_d(head_dim),
            num_warps=configs.ATTENTION_PREPARE_NUM_WARPS,
        )
    return delta
