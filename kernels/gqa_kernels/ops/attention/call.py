"""The arguments of an attention call, checked and converted to what the kernels take."""

from typing import Any, NamedTuple

from torch import Tensor

from gqa_kernels.runtime import checks, configs, layout, target


class Call(NamedTuple):
    """The arguments of `attention.flash_attention` or, with cu_seqlens, of its varlen form."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor | None
    cu_seqlens_kv: Tensor | None
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    key_ranges: Tensor | None
    key_mask: Tensor | None
    softmax_scale: float | None
    window_left: int | None
    window_right: int | None
    softcap: float | None

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def num_sequences(self) -> int | None:
        """The number of packed sequences; None where sequences are not packed."""
        return self.cu_seqlens_q.shape[0] - 1 if self.packed else None

    @property
    def score_unit(self) -> float:
        """The unit of scores in the kernels (`scores.py`)."""
        if self.softcap is not None:
            return float(self.softcap)
        return checks.softmax_scale(self.softmax_scale, self.q.shape[-1])


def check(*arguments: Any) -> None:
    """Raises unless the kernels can take these arguments of a `Call`."""
    call = Call(*arguments)
    q, k, v = call.q, call.k, call.v
    if not call.packed:
        if call.cu_seqlens_kv is not None:
            raise ValueError("cu_seqlens_kv: expected None without cu_seqlens_q; got a tensor")
        checks.tensor("q", q, shape=("batch", "seq_len_q", "num_q_heads", "head_dim"))
        num_sequences, seq_len_q, num_q_heads, head_dim = q.shape
        kv_shape = (num_sequences, "seq_len_kv", "num_kv_heads", head_dim)
    else:
        checks.tensor("q", q, shape=("total_q", "num_q_heads", "head_dim"))
        seq_len_q, num_q_heads, head_dim = q.shape
        kv_shape = ("total_kv", "num_kv_heads", head_dim)
        num_sequences = _check_bounds(call)
    checks.tensor("k", k, shape=kv_shape, like=("q", q))
    kv_shape = k.shape
    checks.tensor("v", v, shape=kv_shape, like=("q", q))
    checks.same_dtype("k", k, "q", q)
    checks.same_dtype("v", v, "q", q)
    seq_len_kv, num_kv_heads, _ = kv_shape[-3:]
    checks.attention_heads(num_q_heads, num_kv_heads, head_dim)
    checks.softcap(call.softcap, checks.softmax_scale(call.softmax_scale, head_dim))
    checks.window((call.window_left, call.window_right))
    checks.head_terms(call.sinks, call.alibi_slopes, num_sequences, num_q_heads, like=("q", q))
    key_ranges, key_mask = call.key_ranges, call.key_mask
    if call.packed and (key_ranges is not None or key_mask is not None):
        raise ValueError("key_ranges, key_mask: expected None with cu_seqlens_q; got one of them")
    checks.key_limits(key_ranges, key_mask, (num_sequences, seq_len_q, seq_len_kv), like=("q", q))


def _check_bounds(call: Call) -> int:
    """The number of packed sequences."""
    like = ("q", call.q)
    shape = ("num_sequences + 1",)
    checks.tensor("cu_seqlens_q", call.cu_seqlens_q, dtypes=checks.INTS, shape=shape, like=like)
    if call.num_sequences < 1:
        raise ValueError("cu_seqlens_q: expected the bounds of one sequence or more; got none")
    shape = (call.num_sequences + 1,)
    checks.tensor("cu_seqlens_kv", call.cu_seqlens_kv, dtypes=checks.INTS, shape=shape, like=like)
    return call.num_sequences


def prepared(call: Call) -> Call:
    """Returns the call as the kernels take it: packed sequences as one batch entry, contiguous
    features, a value for every number."""
    q, k, v = call.q, call.k, call.v
    if call.packed:
        q, k, v = batched(True, q, k, v)
    q, k, v = map(layout.contiguous_features, (q, k, v))
    window_left, window_right = call.window_left, call.window_right
    if not call.packed and q.shape[1] == 1:
        window_right = None  # the only query is the last one: no key lies to its right
    # 2³⁰ exceeds every distance between rows, and the sum of two such numbers fits 32 bits.
    return Call(
        q,
        k,
        v,
        *[None if x is None else x.contiguous() for x in call[3:7]],
        call.key_ranges,
        layout.key_mask(call.key_mask),
        checks.softmax_scale(call.softmax_scale, q.shape[-1]),
        None if window_left is None else min(window_left, 2**30),
        None if window_right is None else min(window_right, 2**30),
        None if call.softcap is None else float(call.softcap),
    )


def batched(packed: bool, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Returns packed tensors as one batch entry."""
    return tuple(x if x is None or not packed else x.unsqueeze(0) for x in tensors)


def block_d(head_dim: int) -> int:
    """The width of a tile that holds a head's features."""
    return max(16, layout.power_of_2(head_dim))


def kernel_arguments(call: Call) -> dict[str, Any]:
    """The arguments from a prepared call that all kernels take, without pointers to q, k and v."""
    q, k = call.q, call.k
    _, seq_len_q, num_q_heads, head_dim = q.shape
    _, seq_len_kv, num_kv_heads, _ = k.shape
    return {
        "cu_seqlens_q_ptr": call.cu_seqlens_q,
        "cu_seqlens_kv_ptr": call.cu_seqlens_kv,
        "alibi_slopes_ptr": call.alibi_slopes,
        "key_ranges_ptr": call.key_ranges,
        "key_mask_ptr": call.key_mask,
        "q_strides": q.stride()[:3],
        "k_strides": k.stride()[:3],
        "v_strides": call.v.stride()[:3],
        "alibi_stride": layout.sequence_stride(call.alibi_slopes),
        "key_ranges_strides": None if call.key_ranges is None else call.key_ranges.stride(),
        "key_mask_stride": None if call.key_mask is None else call.key_mask.stride(0),
        "num_sequences": call.num_sequences,
        "seq_len_q": seq_len_q,
        "seq_len_kv": seq_len_kv,
        "window_left": call.window_left,
        "window_right": call.window_right,
        "score_unit": call.score_unit,
        "cap_scale": None if call.softcap is None else call.softmax_scale / call.softcap,
        "GROUP_SIZE": num_q_heads // num_kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d(head_dim),
    }


def tile_arguments(config: configs.AttentionConfig) -> dict[str, int | None]:
    """The launch arguments of a configuration."""
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "NUM_STAGES": config.num_stages,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "maxnreg": config.max_registers,
    }


def choose(call: Call, table: tuple[configs.AttentionConfig, ...]) -> configs.AttentionConfig:
    """The configuration from a table for this call on the current GPU."""
    q = call.q
    return configs.attention_config(table, target.current().arch, q.element_size(), q.shape[3])
