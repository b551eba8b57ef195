"""The gradients of keys and values by specialised warps: off by default, not measured on a GPU.

The sums of `dkdv.py`, in the one form that Triton divides among warps on Hopper: a loop without
branches over tiles that descriptors load, so every tile is masked. One warp copies tiles of queries
and dout by TMA, and two groups of four warps own 64 keys each. Triton cannot split a tile of a
descriptor that the host makes, so programs make those of keys and values, in scratch memory.

`backward.py` runs it where a row of `SPECIALIZED_DKDV` says `measured=True`, which none does yet,
or where a caller asks for it, as `specialized.flash_attention` does.
"""

import contextvars

import torch
import triton
import triton.language as tl
from torch import Tensor

from gqa_kernels.ops.attention import sequences
from gqa_kernels.ops.attention.call import Call, block_d
from gqa_kernels.ops.attention.launch import hopper_config
from gqa_kernels.ops.attention.sequences import locate
from gqa_kernels.primitives.tiles import LOG2_E, Rows, load_tile, store_rows
from gqa_kernels.runtime import launch, layout
from gqa_kernels.runtime.hopper_configs import SPECIALIZED_DKDV, SpecializedConfig


@triton.jit(do_not_specialize=["seq_len_q", "seq_len_kv", "section"])
def _dkdv_kernel(
    q,
    k_ptr,
    v_ptr,
    dout,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    k_strides,
    v_strides,
    seq_len_q,
    seq_len_kv,
    num_kv_heads,
    section,
    softmax_scale,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """One program sums the gradients of BLOCK_N keys and values over all heads of a group."""
    work = locate(None, None, None, num_kv_heads, seq_len_kv, seq_len_q, section, BLOCK_N)
    batch, kv_head = work.batch, work.head
    start_n = work.block * BLOCK_N
    batch_64, kv_head_64 = batch.to(tl.int64), kv_head.to(tl.int64)
    k_ptr += batch_64 * k_strides[0] + kv_head_64 * k_strides[2]
    v_ptr += batch_64 * v_strides[0] + kv_head_64 * v_strides[2]
    k = tl.make_tensor_descriptor(
        k_ptr, [seq_len_kv, HEAD_DIM], [k_strides[1], 1], [BLOCK_N, BLOCK_D]
    )
    v = tl.make_tensor_descriptor(
        v_ptr, [seq_len_kv, HEAD_DIM], [v_strides[1], 1], [BLOCK_N, BLOCK_D]
    )
    key, value = k.load([start_n, 0]), v.load([start_n, 0])
    first_head = kv_head * GROUP_SIZE
    row = (batch * num_kv_heads * GROUP_SIZE).to(tl.int64) * seq_len_q
    keys = start_n + tl.arange(0, BLOCK_N)[:, None]
    diagonal = seq_len_kv - seq_len_q  # query i is aligned with key i + diagonal
    first_tile = 0
    if CAUSAL:
        first_tile = tl.maximum(start_n - diagonal, 0) // BLOCK_M
    num_tiles = tl.maximum(tl.cdiv(seq_len_q, BLOCK_M) - first_tile, 0)
    exponent_scale = softmax_scale * LOG2_E
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    head, tile = first_head, first_tile
    for _ in tl.range(0, num_tiles * GROUP_SIZE, num_stages=NUM_STAGES, warp_specialize=True):
        start_m = tile * BLOCK_M
        queries = start_m + tl.arange(0, BLOCK_M)
        query = load_tile(
            Rows(q, None, batch, head, seq_len_q), start_m, HEAD_DIM, BLOCK_M, BLOCK_D, True
        )
        d_out = load_tile(
            Rows(dout, None, batch, head, seq_len_q), start_m, HEAD_DIM, BLOCK_M, BLOCK_D, True
        )
        statistics = row + head.to(tl.int64) * seq_len_q
        exists = queries < seq_len_q
        # Queries that see no key, whose lse is −∞, get weights of ∞, which the mask makes 0.
        lse = tl.load(lse_ptr + statistics + queries, mask=exists, other=float("inf"))
        delta = tl.load(delta_ptr + statistics + queries, mask=exists, other=0.0)
        scores = tl.dot(key, query.T) - lse[None, :]  # [BLOCK_N, BLOCK_M]
        weights = tl.math.exp2(scores * exponent_scale)
        if CAUSAL:
            weights = tl.where(keys <= (queries + diagonal)[None, :], weights, 0.0)
        dv = tl.dot(weights.to(d_out.dtype), d_out, dv)
        d_weights = tl.dot(value, d_out.T)
        d_scores = weights * (d_weights - delta[None, :])
        dk = tl.dot(d_scores.to(query.dtype), query, dk)
        ends = tile + 1 == first_tile + num_tiles  # a division would take longer
        tile = tl.where(ends, first_tile, tile + 1)
        head = tl.where(ends, head + 1, head)
    offset = (batch_64 * seq_len_kv * num_kv_heads + kv_head_64) * HEAD_DIM
    stride = num_kv_heads * HEAD_DIM
    store_rows(
        dk_ptr + offset, stride, start_n, seq_len_kv, dk * softmax_scale, HEAD_DIM, BLOCK_N, BLOCK_D
    )
    store_rows(dv_ptr + offset, stride, start_n, seq_len_kv, dv, HEAD_DIM, BLOCK_N, BLOCK_D)


_launch = launch.launcher(_dkdv_kernel)


def config_of(call: Call, *, unmeasured: bool) -> SpecializedConfig | None:
    """The configuration for a prepared call; None if it is not covered, or empty.

    Args:
        unmeasured: also take a row that was never measured on a GPU.
    """
    if call.q.numel() == 0 or call.k.numel() == 0:
        return None
    return hopper_config(call, SPECIALIZED_DKDV, unmeasured=unmeasured)


def key_value_gradients(
    call: Call, dout: Tensor, lse: Tensor, delta: Tensor, config: SpecializedConfig
) -> tuple[Tensor, Tensor]:
    """(dk, dv) of a prepared call that `config_of` covers.

    Args:
        call: has q, k and v, a scale, and window_right None (full) or 0 (causal).
        dout: of q's shape.
        lse, delta: float32 `[batch, num_q_heads, seq_len_q]`; lse in score units.
    """
    q, k, v, dout = map(layout.aligned, (call.q, call.k, call.v, dout))
    batch, seq_len_kv, num_kv_heads, head_dim = k.shape
    dk = torch.empty_like(k, memory_format=torch.contiguous_format)
    dv = torch.empty_like(k, memory_format=torch.contiguous_format)
    block = (config.block_m, block_d(head_dim))
    arguments = {
        "q": layout.descriptor(q, *block),
        "k_ptr": k,
        "v_ptr": v,
        "dout": layout.descriptor(dout, *block),
        "lse_ptr": lse,
        "delta_ptr": delta,
        "dk_ptr": dk,
        "dv_ptr": dv,
        "k_strides": k.stride()[:3],
        "v_strides": v.stride()[:3],
        "seq_len_q": q.shape[1],
        "seq_len_kv": seq_len_kv,
        "num_kv_heads": num_kv_heads,
        "section": sequences.section_of_keys(call),
        "softmax_scale": call.score_unit,
        "GROUP_SIZE": q.shape[2] // num_kv_heads,
        "HEAD_DIM": head_dim,
        "CAUSAL": call.window_right is not None,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": block[1],
        "NUM_STAGES": config.num_stages,
        "num_warps": 4,  # with more, Triton does not specialise
        "num_stages": config.num_stages,
    }
    grid = (layout.cdiv(seq_len_kv, config.block_n) * num_kv_heads * batch,)

    def launch_with_scratch() -> None:
        triton.set_allocator(
            lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=q.device)
        )
        _launch(grid, **arguments)

    contextvars.copy_context().run(launch_with_scratch)  # the caller keeps its allocator
    return dk, dv
