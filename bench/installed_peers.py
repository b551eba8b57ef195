"""Backends from other packages, imported when they are first used.

liger-kernel, fa3-fwd (FlashAttention 3, forward), xformers (its Triton split-K decode kernel),
flashinfer-python (its paged attention), fla-core and cut-cross-entropy. The comment above each
adapter names the version for which it was written.
"""

import functools
from typing import Any

import torch
from adapters import Backend, Lacks, plain_cache
from timing import Call
from torch import Tensor

EPS = 1e-5

# --- liger-kernel 0.8.5 ----------------------------------------------------------------------


def _liger() -> Any:
    import liger_kernel.ops as ops

    return ops


def _liger_rms_norm(inputs: dict[str, Any]) -> Call:
    function = _liger().LigerRMSNormFunction
    x, weight = inputs["x"], inputs["weight"]
    # in_place would overwrite the cotangent, which the next call needs, with dx.
    return lambda: function.apply(x, weight, EPS, 0.0, "llama", False, None)


def _liger_add_rms_norm(inputs: dict[str, Any]) -> Call:
    function = _liger().LigerFusedAddRMSNormFunction
    x, residual, weight = inputs["x"], inputs["residual"], inputs["weight"]
    return lambda: function.apply(x, residual, weight, EPS, 0.0, "llama", False)


def _liger_swiglu(inputs: dict[str, Any]) -> Call:
    function = _liger().LigerSiLUMulFunction
    gate, up = inputs["gate"], inputs["up"]
    return lambda: function.apply(gate, up)


def _liger_rope(inputs: dict[str, Any]) -> Call:
    """Rotates q and k in place, so a second call rotates them further: the same work on other
    values. The gate checks the first call."""
    if inputs["interleaved"] or inputs["positions"] is not None:
        raise Lacks("Liger's RoPE has neither interleaved pairs nor positions")
    function = _liger().LigerRopeFunction
    q, k = (inputs[name].transpose(1, 2) for name in ("q", "k"))
    seq_len = inputs["q"].shape[1]
    cos, sin = (inputs[name][:seq_len].repeat(1, 2)[None] for name in ("cos", "sin"))

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        q_out, k_out = function.apply(q, k, cos, sin)
        return q_out.transpose(1, 2), k_out.transpose(1, 2)

    return call


def _liger_linear_cross_entropy(
    inputs: dict[str, Any], accum_dtype: torch.dtype | None = None
) -> Call:
    """Computes gradients in the forward pass; sums that of the weight in `accum_dtype`, by default
    the weight's dtype."""
    function = _liger().LigerFusedLinearCrossEntropyFunction
    arguments = [inputs[name] for name in ("hidden", "weight", "targets")]
    options = [inputs[name] for name in ("reduction", "softcap")]
    # bias, class weights, ignore_index; label smoothing; whether to return the z-loss
    arguments += [None, None, -100, inputs["z_loss"], 0.0, *options, False, accum_dtype]
    return lambda: function.apply(*arguments)[0]


# --- fa3-fwd 0.0.3 ---------------------------------------------------------------------------


def _fa3() -> Any:
    import fa3_fwd_interface

    return fa3_fwd_interface


def _fa3_prefill(inputs: dict[str, Any]) -> Call:
    function = _fa3().flash_attn_func
    q, k, v, causal = (inputs[name] for name in ("q", "k", "v", "causal"))
    return lambda: function(q, k, v, causal=causal)


# The package built from the folder hopper/ of flash-attention, which has a backward pass: 3.0.0b1.
def _fa3_source() -> Any:
    import flash_attn_interface

    return flash_attn_interface


def _fa3_source_prefill(inputs: dict[str, Any]) -> Call:
    function = _fa3_source().flash_attn_func
    q, k, v, causal = (inputs[name] for name in ("q", "k", "v", "causal"))

    def call() -> Tensor:
        out = function(q, k, v, causal=causal)
        return out[0] if isinstance(out, tuple) else out  # some versions return lse too

    return call


def _fa3_packed(inputs: dict[str, Any]) -> Call:
    function = _fa3().flash_attn_varlen_func
    q, k, v, bounds = (inputs[name] for name in ("q", "k", "v", "cu_seqlens_q"))
    longest = int(bounds.diff().max())
    causal = inputs["causal"]
    return lambda: function(q, k, v, bounds, bounds, longest, longest, causal=causal)


def _fa3_decode(inputs: dict[str, Any]) -> Call:
    if "block_table" in inputs:
        raise Lacks("fa3-fwd is built without paged caches")
    plain_cache(inputs)
    function = _fa3().flash_attn_with_kvcache
    q, k, v, seq_lens = (inputs[name] for name in ("q", "k_cache", "v_cache", "seq_lens"))
    return lambda: function(q, k, v, cache_seqlens=seq_lens, causal=True)


# --- xformers 0.0.35 -------------------------------------------------------------------------


def _xformers() -> Any:
    from xformers.ops import fmha

    return fmha


def _xformers_decode(inputs: dict[str, Any]) -> Call:
    plain_cache(inputs)
    fmha = _xformers()
    q, k, v = inputs["q"], inputs["k_cache"], inputs["v_cache"]
    batch, seq_len_q, num_q_heads, head_dim = q.shape
    capacity, num_kv_heads = k.shape[1:3]
    group_size = num_q_heads // num_kv_heads
    bias = fmha.attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        q_seqlen=[seq_len_q] * batch,
        kv_padding=capacity,
        kv_seqlen=inputs["seq_lens"].tolist(),
        device=q.device,
    )
    # [1, tokens, kv heads, group, head_dim]: groups are expanded by strides, not in memory.
    flat_q = q.reshape(1, batch * seq_len_q, num_kv_heads, group_size, head_dim)
    flat_k, flat_v = (
        x.reshape(1, batch * capacity, num_kv_heads, 1, head_dim).expand(-1, -1, -1, group_size, -1)
        for x in (k, v)
    )
    if group_size == 1:
        flat_q, flat_k, flat_v = (x.squeeze(3) for x in (flat_q, flat_k, flat_v))

    def call() -> torch.Tensor:
        out = fmha.memory_efficient_attention_forward(
            flat_q, flat_k, flat_v, attn_bias=bias, op=fmha.triton_splitk.FwOp
        )
        return out.reshape(q.shape)

    return call


# --- flashinfer-python 0.6.6 -----------------------------------------------------------------

_FLASHINFER_WORKSPACE = 128 * 2**20  # bytes, as in its documentation
_FLASHINFER_PAGE = 16  # the page size for reading a contiguous cache


def _flashinfer() -> Any:
    import flashinfer

    return flashinfer


def _flashinfer_pages(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Returns the caches as pages, and what a plan takes of them: the bounds of the sequences'
    pages, the pages, and how full the last page of each sequence is."""
    if "k_scale" in inputs:
        raise Lacks("flashinfer has one scale for all heads and tokens of an 8-bit cache")
    k, v, seq_lens = (inputs[name] for name in ("k_cache", "v_cache", "seq_lens"))
    table = inputs.get("block_table")
    if table is None:
        batch, page_size = len(k), min(_FLASHINFER_PAGE, k.shape[1] & -k.shape[1])
        pages_each = k.shape[1] // page_size
        k, v = (x.view(batch * pages_each, page_size, *x.shape[2:]) for x in (k, v))
        table = torch.arange(batch * pages_each, device=k.device).view(batch, pages_each)
    page_size = k.shape[1]
    lengths = seq_lens.long()
    used = (lengths + page_size - 1) // page_size
    if int(used.min()) == 0:
        raise Lacks("flashinfer takes no empty sequence")
    indices = torch.cat([row[:count] for row, count in zip(table, used.tolist(), strict=True)])
    bounds = torch.cat([used.new_zeros(1), used.cumsum(0)])
    last = (lengths - 1) % page_size + 1
    return k, v, (bounds.int(), indices.int(), last.int())


def _flashinfer_decode(inputs: dict[str, Any]) -> Call:
    """Plans the split on the host, from lengths that it reads there, once and outside of the timed
    call; a serving engine does that per step."""
    k, v, pages = _flashinfer_pages(inputs)
    q = inputs["q"]
    _, seq_len_q, num_q_heads, head_dim = q.shape
    if seq_len_q != 1:
        raise Lacks("flashinfer decodes one token per sequence")
    workspace = torch.empty(_FLASHINFER_WORKSPACE, dtype=torch.uint8, device=q.device)
    # Its documentation recommends tensor cores if a group shares a key/value head.
    grouped = num_q_heads // k.shape[2] >= 4
    wrapper = _flashinfer().BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=grouped
    )
    wrapper.plan(
        *pages, num_q_heads, k.shape[2], head_dim, k.shape[1],
        q_data_type=q.dtype, kv_data_type=k.dtype,
    )  # fmt: skip
    queries = q.squeeze(1)
    return lambda: wrapper.run(queries, (k, v)).unsqueeze(1)


def _flashinfer_prefill(inputs: dict[str, Any]) -> Call:
    """Plans outside of the timed call, as `_flashinfer_decode` does."""
    k, v, pages = _flashinfer_pages(inputs)
    q = inputs["q"]
    _, num_q_heads, head_dim = q.shape
    workspace = torch.empty(_FLASHINFER_WORKSPACE, dtype=torch.uint8, device=q.device)
    wrapper = _flashinfer().BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(
        inputs["cu_seqlens_q"], *pages, num_q_heads, k.shape[2], head_dim, k.shape[1],
        causal=inputs["causal"], q_data_type=q.dtype, kv_data_type=k.dtype,
    )  # fmt: skip
    return lambda: wrapper.run(q, (k, v))


# --- fla-core 0.6.0 --------------------------------------------------------------------------


def _fla() -> Any:
    from fla.modules import activations, rotary
    from fla.modules.norm import layernorm

    return layernorm.rms_norm, activations.swiglu, rotary.rotary_embedding


def _fla_rms_norm(inputs: dict[str, Any]) -> Call:
    rms_norm, _, _ = _fla()
    x, weight = inputs["x"], inputs["weight"]
    return lambda: rms_norm(x, weight, None, eps=EPS)


def _fla_add_rms_norm(inputs: dict[str, Any]) -> Call:
    rms_norm, _, _ = _fla()
    x, residual, weight = inputs["x"], inputs["residual"], inputs["weight"]
    return lambda: rms_norm(x, weight, None, residual=residual, eps=EPS, prenorm=True)


def _fla_swiglu(inputs: dict[str, Any]) -> Call:
    _, swiglu, _ = _fla()
    gate, up = inputs["gate"], inputs["up"]
    return lambda: swiglu(gate, up)


def _fla_rope(inputs: dict[str, Any]) -> Call:
    if inputs["positions"] is not None:
        raise Lacks("fla's rotary takes offsets, not positions")
    q, k, cos, sin = (inputs[name] for name in ("q", "k", "cos", "sin"))
    if cos.dtype != q.dtype:
        raise Lacks(f"fla's rotary takes cos and sin rounded to {q.dtype}: another function")
    _, _, rotary = _fla()
    pairs = inputs["interleaved"]
    return lambda: (rotary(q, cos, sin, pairs), rotary(k, cos, sin, pairs))


# --- cut-cross-entropy, of its repository in 2025; 25.1.1 of PyPI has no presets -----------------


def _cce() -> Any:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


def _cce_presets() -> Any:
    import cut_cross_entropy.cce_utils as presets

    return presets


def _cce_linear_cross_entropy(inputs: dict[str, Any], impl: str = "cce") -> Call:
    """cut-cross-entropy; the preset "cce_exact" skips no blocks and accumulates in float32."""
    function = _cce()
    arguments = [inputs[name] for name in ("hidden", "weight", "targets")]
    options = {name: inputs[name] for name in ("reduction", "softcap")}
    return lambda: function(*arguments, ignore_index=-100, impl=impl, **options)


BACKENDS = (
    Backend(
        "liger",
        {
            "rms_norm": _liger_rms_norm,
            "add_rms_norm": _liger_add_rms_norm,
            "swiglu": _liger_swiglu,
            "apply_rope": _liger_rope,
            "linear_cross_entropy": _liger_linear_cross_entropy,
        },
        import_check=_liger,
        distribution="liger-kernel",
        coarse={"linear_cross_entropy": "rounds dweight to bfloat16 with every chunk of tokens"},
        writes_inputs=frozenset({"apply_rope"}),
    ),
    Backend(
        "liger_float32",
        {
            "linear_cross_entropy": functools.partial(
                _liger_linear_cross_entropy, accum_dtype=torch.float32
            )
        },
        import_check=_liger,
        distribution="liger-kernel",
    ),
    Backend(
        "cce",
        {"linear_cross_entropy": _cce_linear_cross_entropy},
        import_check=_cce,
        distribution="cut-cross-entropy",
        coarse={
            "linear_cross_entropy": "adds gradients up in bfloat16, without blocks that are nearly "
            "0; how many are depends on the probabilities, here of random logits"
        },
    ),
    Backend(
        "cce_exact",
        {"linear_cross_entropy": functools.partial(_cce_linear_cross_entropy, impl="cce_exact")},
        import_check=_cce_presets,
        distribution="cut-cross-entropy",
    ),
    Backend(
        "fa3",
        {
            "flash_attention": _fa3_prefill,
            "flash_attention_varlen": _fa3_packed,
            "decode_attention": _fa3_decode,
        },
        import_check=_fa3,
        distribution="fa3-fwd",
        forward_only={
            "flash_attention": "fa3-fwd has no backward pass",
            "flash_attention_varlen": "fa3-fwd has no backward pass",
            "decode_attention": "a cache has no gradient",
        },
    ),
    Backend(
        "fa3_source",
        {"flash_attention": _fa3_source_prefill},
        import_check=_fa3_source,
        distribution="flash_attn_3",
        on_request=True,
    ),
    Backend(
        "xformers",
        {"decode_attention": _xformers_decode},
        import_check=_xformers,
        distribution="xformers",
        forward_only={"decode_attention": "a cache has no gradient"},
    ),
    Backend(
        "flashinfer",
        {"decode_attention": _flashinfer_decode, "prefill_attention": _flashinfer_prefill},
        import_check=_flashinfer,
        distribution="flashinfer-python",
        forward_only=dict.fromkeys(
            ("decode_attention", "prefill_attention"), "a cache has no gradient"
        ),
    ),
    Backend(
        "fla",
        {
            "rms_norm": _fla_rms_norm,
            "add_rms_norm": _fla_add_rms_norm,
            "swiglu": _fla_swiglu,
            "apply_rope": _fla_rope,
        },
        import_check=_fla,
        distribution="fla-core",
    ),
)
