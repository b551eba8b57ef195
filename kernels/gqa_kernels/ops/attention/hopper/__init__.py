"""Attention for Hopper (sm_90), in Gluon: off by default, as it has not run on a GPU yet.

`forward.py`: the forward kernel; `softmax.py`: its softmax; `pipeline.py`: rings of tiles, turns;
`tiles.py`: the order of tiles, masks.
`triton.experimental` may change in every version of Triton, so these are imported only when a call
runs them:
`ops/attention/launch.py` chooses by the rows of `configs.HOPPER_FORWARD`, all of which say
`measured=False`, and `flash_attention` below asks for such a row.
"""

from torch import Tensor

from gqa_kernels.ops.attention.call import Call, check, prepared
from gqa_kernels.ops.attention.launch import hopper_config, launch_forward
from gqa_kernels.runtime import checks, target


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`gqa_kernels.flash_attention` by the kernel for Hopper, measured or not; no gradient.

    For benchmarks and tests. Numerics are those of the portable kernel; bits differ.

    Args:
        q: float16 or bfloat16 `[batch, seq_len_q, num_q_heads, head_dim]`; head_dim 64, 128 or 256;
            any strides, without a copy where TMA can address them (`layout.fits_tma`).
        k, v: `[batch, seq_len_kv, num_kv_heads, head_dim]`, likewise.
        causal, softmax_scale, return_lse: as in `gqa_kernels.flash_attention`.
    Returns:
        out; or (out, lse) as `gqa_kernels.flash_attention` returns them.
    Raises:
        TypeError, ValueError: as `gqa_kernels.flash_attention`.
        NotImplementedError: another architecture, dtype or head_dim.
    """
    causal = checks.flag("causal", causal)
    call = Call(
        q, k, v, *[None] * 6,
        checks.optional_number("softmax_scale", softmax_scale), None, 0 if causal else None, None,
    )  # fmt: skip
    check(*call)
    target.check_device("q", q)
    call = prepared(call)
    with target.device_of(q):
        if hopper_config(call, unmeasured=True) is None:
            dtype = str(q.dtype).removeprefix("torch.")
            raise NotImplementedError(
                "q: expected float16 or bfloat16, head_dim 64, 128 or 256, on sm_90; "
                f"got {dtype}, head_dim {q.shape[-1]}, on {target.current().arch}"
            )
    out, lse, _ = launch_forward(call, need_lse=return_lse, need_residue=False, unmeasured=True)
    return (out, lse * call.score_unit) if return_lse else out
