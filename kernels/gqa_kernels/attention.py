"""Flash attention with grouped key/value heads: forward.

    out = softmax(softmax_scale · q kᵀ) v,  lse = log Σ exp(softmax_scale · q kᵀ)

Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691 (the loop over keys inside, the
division at the end); Shah et al. 2024, arXiv:2407.08608 (the product of the next tile under the
softmax of this one). Query head h reads key/value head h // GROUP_SIZE: K and V are never repeated.

One program owns BLOCK_M queries of one head. It walks the key tiles from the last to the first: the
tiles that need a mask, on the diagonal and at the end, come first and the long loop has none;
tiles above the diagonal are never visited.

The gradient is not implemented: asking for it raises.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx
from triton.tools.tensor_descriptor import TensorDescriptor

from gqa_kernels import checks, configs, layout, target
from gqa_kernels.tiles import LOG2_E, finish_softmax, load_rows, online_softmax_step


@triton.jit
def _load_keys(
    source,
    stride,
    batch,
    kv_head,
    tile,
    num_rows,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Tile `[BLOCK_N, BLOCK_D]` of K or V: from a 4-D descriptor, or from one head's pointer."""
    if USE_TMA:
        return source.load([batch, tile * BLOCK_N, kv_head, 0]).reshape([BLOCK_N, BLOCK_D])
    else:
        return load_rows(source, stride, tile * BLOCK_N, num_rows, HEAD_DIM, BLOCK_N, BLOCK_D)


@triton.jit
def _mask_scores(scores, queries, tile, diagonal, seq_len_kv, IS_CAUSAL, BLOCK_N: tl.constexpr):
    """−inf where a key does not exist or lies beyond its query's last one."""
    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    visible = keys < seq_len_kv
    if IS_CAUSAL:
        visible = visible & (keys <= queries[:, None] + diagonal)
    return tl.where(visible, scores, -float("inf"))


@triton.jit(do_not_specialize=["seq_len_q", "seq_len_kv"])
def _forward_kernel(
    q_ptr,
    k,
    v,
    out_ptr,
    lse_ptr,
    q_strides,
    k_strides,
    v_strides,
    seq_len_q,
    seq_len_kv,
    num_q_heads,
    softmax_scale,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    USE_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """One program attends from BLOCK_M queries of one head to all the keys that they see."""
    num_blocks = tl.cdiv(seq_len_q, BLOCK_M)
    program = tl.program_id(0)
    # Causal: the last queries see the most keys, so they start first.
    block = num_blocks - 1 - program % num_blocks
    head = (program // num_blocks) % num_q_heads
    batch = program // num_blocks // num_q_heads
    kv_head = head // GROUP_SIZE
    batch_64, head_64, kv_head_64 = batch.to(tl.int64), head.to(tl.int64), kv_head.to(tl.int64)

    q_ptr += batch_64 * q_strides[0] + head_64 * q_strides[2]
    if not USE_TMA:
        k += batch_64 * k_strides[0] + kv_head_64 * k_strides[2]
        v += batch_64 * v_strides[0] + kv_head_64 * v_strides[2]
    q = load_rows(q_ptr, q_strides[1], block * BLOCK_M, seq_len_q, HEAD_DIM, BLOCK_M, BLOCK_D)

    queries = block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    diagonal = seq_len_kv - seq_len_q  # query i sees keys up to i + diagonal
    last_key, first_hidden = seq_len_kv, seq_len_kv
    if IS_CAUSAL:
        last_key = tl.minimum(seq_len_kv, (block + 1) * BLOCK_M + diagonal)
        first_hidden = tl.minimum(seq_len_kv, block * BLOCK_M + diagonal + 1)
    # Tiles below num_free are seen whole by every query. At least one tile is visited, so that
    # queries that see no key come out of the same code: all their scores are −inf.
    num_tiles = tl.maximum(tl.cdiv(tl.maximum(last_key, 0), BLOCK_N), 1)
    num_free = tl.minimum(tl.maximum(first_hidden, 0) // BLOCK_N, num_tiles - 1)

    exponent_scale = softmax_scale * LOG2_E
    running_max = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    running_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)

    tile = num_tiles - 1
    key = _load_keys(
        k, k_strides[1], batch, kv_head, tile, seq_len_kv, HEAD_DIM, BLOCK_N, BLOCK_D, USE_TMA
    )
    scores = tl.dot(q, key.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    scores = _mask_scores(scores, queries, tile, diagonal, seq_len_kv, IS_CAUSAL, BLOCK_N)

    # Each step multiplies q by the next tile's keys before it needs the result, so that the tensor
    # cores work while this tile's softmax runs.
    if IS_CAUSAL:
        for step in tl.range(0, num_tiles - 1 - num_free, num_stages=NUM_STAGES):
            tile = num_tiles - 2 - step
            key = _load_keys(
                k, k_strides[1], batch, kv_head, tile, seq_len_kv,
                HEAD_DIM, BLOCK_N, BLOCK_D, USE_TMA,
            )  # fmt: skip
            next_scores = tl.dot(q, key.T, input_precision="ieee")
            weights, running_max, running_sum, accumulator = online_softmax_step(
                scores, running_max, running_sum, accumulator, exponent_scale
            )
            value = _load_keys(
                v, v_strides[1], batch, kv_head, tile + 1, seq_len_kv,
                HEAD_DIM, BLOCK_N, BLOCK_D, USE_TMA,
            )  # fmt: skip
            accumulator = tl.dot(
                weights.to(value.dtype), value, accumulator, input_precision="ieee"
            )
            scores = _mask_scores(
                next_scores, queries, tile, diagonal, seq_len_kv, IS_CAUSAL, BLOCK_N
            )
    for step in tl.range(0, num_free, num_stages=NUM_STAGES):
        tile = num_free - 1 - step
        key = _load_keys(
            k, k_strides[1], batch, kv_head, tile, seq_len_kv, HEAD_DIM, BLOCK_N, BLOCK_D, USE_TMA
        )
        next_scores = tl.dot(q, key.T, input_precision="ieee")
        weights, running_max, running_sum, accumulator = online_softmax_step(
            scores, running_max, running_sum, accumulator, exponent_scale
        )
        value = _load_keys(
            v, v_strides[1], batch, kv_head, tile + 1, seq_len_kv,
            HEAD_DIM, BLOCK_N, BLOCK_D, USE_TMA,
        )  # fmt: skip
        accumulator = tl.dot(weights.to(value.dtype), value, accumulator, input_precision="ieee")
        scores = next_scores
    weights, running_max, running_sum, accumulator = online_softmax_step(
        scores, running_max, running_sum, accumulator, exponent_scale
    )
    value = _load_keys(
        v, v_strides[1], batch, kv_head, 0, seq_len_kv, HEAD_DIM, BLOCK_N, BLOCK_D, USE_TMA
    )
    accumulator = tl.dot(weights.to(value.dtype), value, accumulator, input_precision="ieee")

    out, lse = finish_softmax(running_max, running_sum, accumulator, softmax_scale)
    rows = (batch_64 * seq_len_q + queries) * num_q_heads + head  # of out, [BLOCK_M]
    columns = tl.arange(0, BLOCK_D)[None, :]
    exists = queries < seq_len_q
    tl.store(
        out_ptr + rows[:, None] * HEAD_DIM + columns,
        out.to(out_ptr.dtype.element_ty),
        mask=exists[:, None] & (columns < HEAD_DIM),
    )
    if lse_ptr is not None:
        lse_ptr += (batch_64 * num_q_heads + head) * seq_len_q
        tl.store(lse_ptr + queries, lse, mask=exists)


def _descriptor(x: Tensor, block_n: int, block_d: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, block_n, 1, block_d])


def _fits_tma(x: Tensor) -> bool:
    """The bulk-copy engine addresses in units of 16 bytes."""
    strides = (stride * x.element_size() for stride in x.stride()[:3])
    return x.data_ptr() % 16 == 0 and all(stride > 0 and stride % 16 == 0 for stride in strides)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, softmax_scale: float, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    q, k, v = map(layout.contiguous_features, (q, k, v))
    batch, seq_len_q, num_q_heads, head_dim = q.shape
    seq_len_kv, num_kv_heads = k.shape[1:3]
    lse_shape = (batch, num_q_heads, seq_len_q)
    if batch == 0 or seq_len_q == 0 or seq_len_kv == 0:
        out, lse = q.new_zeros(q.shape), q.new_full(lse_shape, -torch.inf, dtype=torch.float32)
        return out, lse if need_lse else None
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(lse_shape, dtype=torch.float32, device=q.device) if need_lse else None
    block_d = max(16, triton.next_power_of_2(head_dim))
    with target.device_of(q):
        gpu = target.current()
        config = configs.attention_config(gpu.arch, q.element_size(), head_dim)
        use_tma = gpu.has_tma and _fits_tma(k) and _fits_tma(v)
        _forward_kernel[(triton.cdiv(seq_len_q, config.block_m) * num_q_heads * batch,)](
            q_ptr=q,
            k=_descriptor(k, config.block_n, block_d) if use_tma else k,
            v=_descriptor(v, config.block_n, block_d) if use_tma else v,
            out_ptr=out,
            lse_ptr=lse,
            q_strides=q.stride()[:3],
            k_strides=k.stride()[:3],
            v_strides=v.stride()[:3],
            seq_len_q=seq_len_q,
            seq_len_kv=seq_len_kv,
            num_q_heads=num_q_heads,
            softmax_scale=softmax_scale,
            GROUP_SIZE=num_q_heads // num_kv_heads,
            HEAD_DIM=head_dim,
            IS_CAUSAL=causal and seq_len_q > 1,  # one query, the last, sees every key
            USE_TMA=use_tma,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_D=block_d,
            NUM_STAGES=config.num_stages,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
    return out, lse


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        softmax_scale: float,
        need_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        return _forward(q, k, v, causal, softmax_scale, need_lse)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError(
            "flash_attention: its gradient is not implemented in the triton backend; train with "
            'get_backend("eager")'
        )


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(softmax_scale · q kᵀ) v with grouped heads; see `reference.flash_attention`.

    Args:
        q: float32, float16 or bfloat16 `[batch, seq_len_q, num_q_heads, head_dim]`; head_dim a
            multiple of 8 up to 256; any strides, without a copy where features are contiguous.
        k, v: the same dtype, `[batch, seq_len_kv, num_kv_heads, head_dim]`; num_q_heads is a
            multiple of num_kv_heads.
        causal: query i sees keys j ≤ i + seq_len_kv − seq_len_q.
        softmax_scale: positive; None means 1 / sqrt(head_dim).
        return_lse: also return the natural-log lse, float32 `[batch, num_q_heads, seq_len_q]`.
    Returns:
        out, contiguous, of q's shape and dtype; or (out, lse). A query that sees no key gives 0
        and −inf.
    Numerics: products accumulate in float32, float32 inputs multiply in float32 (not TF32); the
        softmax is float32, its weights are rounded to v's dtype before the second product.
    Raises:
        TypeError, ValueError: an argument of another kind, dtype, shape or device.
        NotImplementedError: another head_dim; in the backward pass, always.
        RuntimeError: q is not on a GPU that Triton drives.
    """
    checks.tensor("q", q, shape=("batch", "seq_len_q", "num_q_heads", "head_dim"))
    batch, _, num_q_heads, head_dim = q.shape
    checks.tensor("k", k, shape=(batch, "seq_len_kv", "num_kv_heads", head_dim), like=("q", q))
    checks.tensor("v", v, shape=tuple(k.shape), like=("q", q))
    checks.same_dtype("k", k, "q", q)
    checks.same_dtype("v", v, "q", q)
    checks.attention_heads(num_q_heads, k.shape[2], head_dim)
    softmax_scale = checks.softmax_scale(softmax_scale, head_dim)
    checks.flag("causal", causal)
    checks.flag("return_lse", return_lse)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
        out, lse = _FlashAttention.apply(q, k, v, causal, softmax_scale, return_lse)
    else:
        out, lse = _forward(q, k, v, causal, softmax_scale, return_lse)
    return (out, lse) if return_lse else out
