"""Sharding rules of the ops for DTensor, `torch.distributed.tensor`.

    from gqa_kernels import sharding
    sharding.register()

After that, the public functions accept DTensors, forward and backward. Per dimension of the device
mesh, the tensors of a call are either all replicated or sharded on one of

    rms_norm, add_rms_norm    any dimension but the last; the weight is replicated, its gradient is
                              a partial sum
    swiglu                    any dimension
    apply_rope                the batch; the sequence, where positions are given; the heads; cos and
                              sin are replicated
    rope_append_kv            the heads
    flash_attention, decode_attention
                              the batch; the heads
    flash_attention_varlen, prefill_attention
                              the heads; packed sequences cannot be sharded
    linear_cross_entropy      any dimension of the targets; the loss is a partial sum, and so is the
                              weight's gradient
    token_log_probs           any dimension of the targets
    sample_tokens             the rows; adamw_update has no rule and takes local tensors

If a weight is sharded over the vocabulary, on a mesh of one dimension, `linear_cross_entropy` and
`token_log_probs` use the shards as they are and gather the hidden states.

Heads of attention can be sharded if the key/value heads divide evenly, so that a query head is on
the rank of the head that it reads; a single key/value head is replicated. Sinks, slopes and a
cache's scales are sharded like the heads. If the batch is sharded, a paged cache is replicated.

A tensor with any other placement is redistributed, as usual in DTensor: attention gathers a sharded
sequence. These raise: a sharded sequence without positions, heads that the mesh does not divide,
and a cache whose placement differs from that of what is written to it.
"""

import importlib
from collections.abc import Callable, Iterator
from functools import cache
from math import prod
from typing import Any, TypeAlias

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Placement

# A rule needs this class to say on which of an op's arguments it depends; it has no public name.
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo  # isort: skip

from gqa_kernels.runtime import library

# A tensor argument of a rule: shape, ndim, placements and mesh, without values.
Spec: TypeAlias = Any
# One way to shard a call on one dimension of a mesh: the placements of the outputs, and those of
# the arguments by name. An argument that is not named is replicated.
Sharding: TypeAlias = tuple[list[Placement], dict[str, Placement]]
Rule: TypeAlias = Callable[..., Iterator[Sharding]]

_BATCH, _SEQUENCE, _HEADS = 0, 1, 2  # of [batch, seq_len, num_heads, head_dim]


def _where_needed(needed: bool, placement: Placement) -> Placement:
    """The placement of an output, or of the empty tensor in its place if it is not needed."""
    return placement if needed else Replicate()


def _rms_norm(x: Spec, weight: Spec, eps: float) -> Iterator[Sharding]:
    for dim in range(x.ndim - 1):
        rows = Shard(dim)
        yield [rows, rows], {"x": rows}


def _add_rms_norm(x: Spec, residual: Spec, weight: Spec, eps: float) -> Iterator[Sharding]:
    for dim in range(x.ndim - 1):
        rows = Shard(dim)
        yield [rows, rows, rows], {"x": rows, "residual": rows}


def _rms_norm_backward(h: Spec, need_dx: bool, need_dweight: bool, **_: Any) -> Iterator[Sharding]:
    for dim in range(h.ndim - 1):
        rows = Shard(dim)
        outputs = [_where_needed(need_dx, rows), _where_needed(need_dweight, Partial())]
        yield outputs, dict.fromkeys(("dy", "dh", "h", "rstd"), rows)


def _swiglu(gate: Spec, up: Spec) -> Iterator[Sharding]:
    for dim in range(gate.ndim):
        yield [Shard(dim)], {"gate": Shard(dim), "up": Shard(dim)}


def _swiglu_backward(
    dy: Spec, gate: Spec, up: Spec, need_dgate: bool, need_dup: bool
) -> Iterator[Sharding]:
    for dim in range(gate.ndim):
        same = Shard(dim)
        outputs = [_where_needed(need_dgate, same), _where_needed(need_dup, same)]
        yield outputs, {"dy": same, "gate": same, "up": same}


def _sample_tokens(**arguments: Spec) -> Iterator[Sharding]:
    yield [Shard(0)], dict.fromkeys(arguments, Shard(0))


def _apply_rope(
    q: Spec, k: Spec, cos: Spec, sin: Spec, positions: Spec | None, interleaved: bool
) -> Iterator[Sharding]:
    if positions is None and _num_shards((q, _SEQUENCE), (k, _SEQUENCE)) > 1:
        raise NotImplementedError(
            "positions: expected a tensor for q and k that are sharded on the sequence; got None"
        )
    yield from _rotations("q", "k", True, True, positions)


def _apply_rope_backward(
    dq: Spec | None, dk: Spec | None, positions: Spec | None, **_: Any
) -> Iterator[Sharding]:
    yield from _rotations("dq", "dk", dq is not None, dk is not None, positions)


def _rotations(
    q: str, k: str, has_q: bool, has_k: bool, positions: Spec | None
) -> Iterator[Sharding]:
    tokens = (_BATCH,) if positions is None else (_BATCH, _SEQUENCE)
    for dim in tokens:
        same = Shard(dim)
        outputs = [_where_needed(has_q, same), _where_needed(has_k, same)]
        yield outputs, {q: same, k: same, "positions": same}
    heads = Shard(_HEADS)
    q_heads = _where_needed(has_q, heads)
    yield [q_heads, _where_needed(has_k, heads)], {q: heads, k: heads}
    # A single key/value head cannot be sharded, the query heads can.
    yield [q_heads, Replicate()], {q: heads}


def _rope_append_kv(
    q: Spec,
    k: Spec,
    v: Spec,
    k_cache: Spec,
    v_cache: Spec,
    k_scale: Spec | None,
    v_scale: Spec | None,
    **_: Any,
) -> Iterator[Sharding]:
    """Raises if DTensor would have to move a cache, because the op would then write to a copy."""
    per_token = k_scale is not None and k_scale.ndim == 3
    beside = {"v": v, "k_cache": k_cache, "v_cache": v_cache}
    beside |= {"k_scale": k_scale, "v_scale": v_scale} if per_token else {}
    beside |= {"q": q} if k.shape[_HEADS] > 1 else {}
    for name, x in beside.items():
        if tuple(x.placements) != tuple(k.placements):
            raise NotImplementedError(
                f"{name}: expected k's placements {tuple(k.placements)}, since a cache is written "
                f"in place; got {tuple(x.placements)}"
            )
    heads = Shard(_HEADS)
    for name, x in (("k", k), ("q", q)):
        if any(placement not in (Replicate(), heads) for placement in x.placements):
            raise NotImplementedError(
                f"{name}: expected replicated tensors or sharded heads, since slots index "
                f"the whole cache; got placements {tuple(x.placements)}"
            )
    kv_heads = _kv_heads(_HEADS, q, k, v)
    if kv_heads is not None:
        placed = dict.fromkeys(("k", "v", "k_cache", "v_cache"), kv_heads) | {"q": heads}
        if kv_heads == heads:
            scales = heads if per_token else Shard(0)
            placed |= {"k_scale": scales, "v_scale": scales}
        yield [heads, kv_heads], placed


def _flash_attention(
    q: Spec,
    k: Spec,
    v: Spec,
    cu_seqlens_q: Spec | None,
    sinks: Spec | None,
    alibi_slopes: Spec | None,
    need_residue: bool,
    **_: Any,
) -> Iterator[Sharding]:
    for layout in _attention_layouts(q, k, v, cu_seqlens_q, alibi_slopes):
        residue = _where_needed(need_residue, layout["out"])
        yield [layout["out"], layout["lse"], residue], layout


def _flash_attention_backward(
    q: Spec,
    k: Spec,
    v: Spec,
    cu_seqlens_q: Spec | None,
    sinks: Spec | None,
    alibi_slopes: Spec | None,
    residue: Spec | None,
    need_dq: bool,
    need_dkdv: bool,
    need_dsinks: bool,
    **_: Any,
) -> Iterator[Sharding]:
    for layout in _attention_layouts(q, k, v, cu_seqlens_q, alibi_slopes):
        if residue is None or residue.ndim != q.ndim:
            layout.pop("residue")  # an empty tensor
        # A tensor that several shards read gets a gradient from each of them.
        dk = dv = Partial() if layout["k"] == Replicate() else layout["k"]
        dsinks = Partial() if layout["sinks"] == Replicate() else layout["sinks"]
        outputs = [
            _where_needed(need_dq, layout["q"]),
            _where_needed(need_dkdv, dk),
            _where_needed(need_dkdv, dv),
            _where_needed(need_dsinks, dsinks),
        ]
        yield outputs, layout


def _attention_layouts(
    q: Spec, k: Spec, v: Spec, cu_seqlens_q: Spec | None, alibi_slopes: Spec | None
) -> Iterator[dict[str, Placement]]:
    """Yields every way to shard attention, as placements of all tensors of both passes."""
    packed = cu_seqlens_q is not None
    per_sequence_slopes = alibi_slopes is not None and alibi_slopes.ndim == 2
    if not packed:  # q, k and v are [batch, …], lse is [batch, num_q_heads, seq_len_q]
        names = ("q", "k", "v", "out", "lse", "residue", "dout", "dlse")
        names += ("key_ranges", "key_mask")
        layout = dict.fromkeys(names, Shard(_BATCH))
        layout["alibi_slopes"] = Shard(0) if per_sequence_slopes else Replicate()
        layout["sinks"] = Replicate()
        yield layout
    head_dim = 1 if packed else _HEADS
    kv_heads = _kv_heads(head_dim, q, k, v)
    if kv_heads is not None:
        layout = dict.fromkeys(("q", "out", "residue", "dout"), Shard(head_dim))
        layout |= dict.fromkeys(("k", "v"), kv_heads)
        layout |= dict.fromkeys(("lse", "dlse"), Shard(0 if packed else 1))
        layout["sinks"] = Shard(0)
        layout["alibi_slopes"] = Shard(1 if per_sequence_slopes else 0)
        yield layout


def _decode_attention(
    block_table: Spec | None, k_scale: Spec | None, alibi_slopes: Spec | None, **others: Spec | None
) -> Iterator[Sharding]:
    batch, of_sequences = Shard(_BATCH), ["q", "seq_lens", "block_table", "key_ranges", "key_mask"]
    if alibi_slopes is not None and alibi_slopes.ndim == 2:
        of_sequences.append("alibi_slopes")
    if block_table is None:  # pages belong to all sequences
        of_sequences += ["k_cache", "v_cache"]
        if k_scale is not None and k_scale.ndim == 3:
            of_sequences += ["k_scale", "v_scale"]
    yield [batch, batch], dict.fromkeys(of_sequences, batch)
    for layout in _heads_over_cache(_HEADS, k_scale=k_scale, alibi_slopes=alibi_slopes, **others):
        yield [layout["q"], Shard(1)], layout


def _prefill_attention(**arguments: Spec | None) -> Iterator[Sharding]:
    for layout in _heads_over_cache(1, **arguments):
        yield [layout["q"], Shard(0)], layout


def _heads_over_cache(
    dim: int,
    q: Spec,
    k_cache: Spec,
    v_cache: Spec,
    k_scale: Spec | None,
    alibi_slopes: Spec | None,
    **_: Any,
) -> Iterator[dict[str, Placement]]:
    """Yields how to shard attention over a cache by heads, of which `dim` is q's dimension."""
    kv_heads = _kv_heads(_HEADS, q, k_cache, v_cache, q_dim=dim)
    if kv_heads is not None:
        slopes_dim = 0 if alibi_slopes is None else alibi_slopes.ndim - 1
        layout = {"q": Shard(dim), "sinks": Shard(0), "alibi_slopes": Shard(slopes_dim)}
        if kv_heads == Shard(_HEADS):
            per_token = k_scale is not None and k_scale.ndim == 3
            layout |= dict.fromkeys(("k_scale", "v_scale"), Shard(_HEADS if per_token else 0))
        yield layout | {"k_cache": kv_heads, "v_cache": kv_heads}


def _linear_cross_entropy(
    hidden: Spec, need_dhidden: bool, need_dweight: bool, **_: Any
) -> Iterator[Sharding]:
    for dim in range(hidden.ndim - 1):
        rows = Shard(dim)
        gradients = [_where_needed(need_dhidden, rows), _where_needed(need_dweight, Partial())]
        yield [Partial(), *gradients], {"hidden": rows, "targets": rows}


def _linear_cross_entropy_backward(
    dsum: Spec, dhidden: Spec | None, dweight: Spec | None, **_: Any
) -> Iterator[Sharding]:
    for dim in range(1 if dhidden is None else dhidden.ndim - 1):
        placed = {"dhidden": Shard(dim), "dweight": Partial()}
        given = {"dhidden": dhidden is not None, "dweight": dweight is not None}
        yield [_where_needed(given[name], placed[name]) for name in placed], placed


def _token_log_probs(hidden: Spec, need_mean: bool, **_: Any) -> Iterator[Sharding]:
    for dim in range(hidden.ndim - 1):
        rows = Shard(dim)
        yield [rows, rows, rows, _where_needed(need_mean, rows)], {"hidden": rows, "targets": rows}


def _token_log_probs_backward(
    hidden: Spec, need_dhidden: bool, need_dweight: bool, **_: Any
) -> Iterator[Sharding]:
    names = ("dlog_sum", "dscore", "dmean", "hidden", "targets", "maximum", "log_sum", "mean")
    for dim in range(hidden.ndim - 1):
        outputs = [_where_needed(need_dhidden, Shard(dim)), _where_needed(need_dweight, Partial())]
        yield outputs, dict.fromkeys(names, Shard(dim))


def _num_shards(*tensors: tuple[Spec, int]) -> int:
    """Into how many shards the mesh divides a dimension of any of these tensors."""
    sizes = tensors[0][0].mesh.shape
    return prod(
        size
        for i, size in enumerate(sizes)
        if any(x.placements[i].is_shard(dim) for x, dim in tensors)
    )


def _kv_heads(dim: int, q: Spec, k: Spec, v: Spec, q_dim: int | None = None) -> Placement | None:
    """The placement of the key/value heads, dimension `dim`, for query heads that are sharded on
    `q_dim`, None for `dim`; None if the heads cannot be sharded.

    Query head h reads key/value head h // group_size, in every shard only if all shards have
    equally many key/value heads, whichever mesh dimensions shard them: a rule does not know which.

    Raises:
        NotImplementedError: the heads are already sharded and cannot be.
    """
    num_kv_heads, mesh = k.shape[dim], tuple(k.mesh.shape)
    if num_kv_heads == 1:
        return Replicate()
    divisors = {1}
    for size in mesh:
        divisors |= {divisor * size for divisor in divisors}
    even = all(num_kv_heads % divisor == 0 for divisor in divisors if divisor <= num_kv_heads)
    num_shards = _num_shards((q, dim if q_dim is None else q_dim), (k, dim), (v, dim))
    if num_shards > 1 and (not even or num_kv_heads % num_shards):
        raise NotImplementedError(
            f"k: expected a number of heads that the dimensions of the mesh {mesh} divide, as the "
            f"heads are sharded; got {num_kv_heads}. Shard the batch, or replicate the tensors"
        )
    return Shard(dim) if even else None


RULES: dict[str, Rule] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "swiglu": _swiglu,
    "swiglu_backward": _swiglu_backward,
    "apply_rope": _apply_rope,
    "apply_rope_backward": _apply_rope_backward,
    "rope_append_kv": _rope_append_kv,
    "flash_attention": _flash_attention,
    "flash_attention_backward": _flash_attention_backward,
    "decode_attention": _decode_attention,
    "prefill_attention": _prefill_attention,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_cross_entropy_backward": _linear_cross_entropy_backward,
    "token_log_probs": _token_log_probs,
    "token_log_probs_backward": _token_log_probs_backward,
    "sample_tokens": _sample_tokens,
}


@cache
def register() -> None:
    """Registers the rules with DTensor for the whole process; further calls are no-ops."""
    importlib.import_module("gqa_kernels.fused")  # registers the ops with PyTorch
    propagator = DTensor._op_dispatcher.sharding_propagator
    for name, rule in RULES.items():
        op = getattr(getattr(torch.ops, library.NAMESPACE), name).default
        register_sharding(op)(_strategy(op, rule))
        # By default, DTensor caches by the tensors of a call and the arguments from the first int
        # on. The rules and outputs depend on more: which tensors are None, which are needed.
        propagator.op_to_schema_info[op] = RuntimeSchemaInfo(static_argnum=0)


def _strategy(op: torch._ops.OpOverload, rule: Rule) -> Callable[..., list]:
    names = [argument.name for argument in op._schema.arguments]
    num_outputs = len(op._schema.returns)

    def strategy(*values: Any) -> list[tuple[list[Placement], list[Placement | None]]]:
        arguments = dict(zip(names, values, strict=True))

        def placements(named: dict[str, Placement]) -> list[Placement | None]:
            return [
                named.get(name, Replicate()) if hasattr(value, "placements") else None
                for name, value in arguments.items()
            ]

        replicated = [Replicate()] * num_outputs, placements({})
        return [replicated, *((outs, placements(named)) for outs, named in rule(**arguments))]

    return strategy
