"""Conversion of a trained model to fewer key/value heads: each group of heads becomes one head.

A conversion works on one attention layer at a time, from its weights and, for the methods that use
data, the second moment of its inputs. `low_rank` and `aligned` use transformations that do not
change a layer's output. With RoPE's pairs of features as complex numbers, head i's

- values may be transformed by any invertible A: v → A v, o → o A⁻¹;
- keys may be multiplied by any complex number c per pair: k → c k, q → q / c̄, as the score is
  Re(q · k̄) and RoPE multiplies q and k by phases.

Heads of a group that differ only by such transformations become one head without loss.
"""

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from llama2.model import Llama2

METHODS = ("low_rank", "aligned", "mean", "first", "random")
NEEDS_DATA = ("low_rank", "aligned")

# Least power of a feature, relative to the mean power of equally long features. Scaled to the power
# of the others, a weaker feature would be so long that its rounding to 16 bits would drown the
# features it is mixed with.
_HARDLY_SEEN = 2**-8
# Relative to the mean power: a direction with less power counts as unused and gets this power.
_NARROW, _UNSEEN = 2**-40, 2**-20
_ROUNDING = 1e-12  # likewise: far above float64's errors, far below the power of any input


class AttentionWeights(NamedTuple):
    """The projections of a layer, as `nn.Linear` stores them.

    q `[num_q_heads · head_dim, hidden_size]`, k and v `[num_kv_heads · head_dim, hidden_size]`,
    o `[hidden_size, num_q_heads · head_dim]`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor


class _Heads(NamedTuple):
    """The projections in float64, by groups that become one head; RoPE's pairs of q and k are
    complex.

    q `[groups, heads, queries, pairs, hidden_size]`, k `[groups, heads, pairs, hidden_size]`,
    v `[groups, heads, head_dim, hidden_size]`, o `[groups, heads, queries, hidden_size, head_dim]`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor


def convert_layer(
    weights: AttentionWeights,
    num_kv_heads: int,
    *,
    head_dim: int,
    method: str = "low_rank",
    interleaved: bool = False,
    second_moment: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> AttentionWeights:
    """Returns the projections of a layer with `num_kv_heads` key/value heads and as many query
    heads.

    Consecutive key/value heads form a group. The methods make one head of a group:

    - "low_rank": values: the products o · v of the group's query heads, stacked, are replaced by
      their best approximation of rank head_dim; keys: per RoPE pair, the keys of the group, each
      weighted by the power of its queries, are replaced by their best approximation of rank one
      over the complex numbers, whose coefficients go to the queries. Best means least mean square
      over the inputs.
    - "aligned": values are rotated onto the group's first head (orthogonal Procrustes), keys turned
      onto it by one angle per RoPE pair, which changes no output (see `aligned`); then the mean.
    - "mean": the mean of the heads (Ainslie et al. 2023, arXiv:2305.13245).
    - "first": the first head. "random": N(0, 0.02²), as a new model has: that paper's baselines.

    If the count is the layer's own, it returns the weights unchanged.

    Args:
        weights: any floating dtype; computed in float64, returned in the same dtypes.
        interleaved: RoPE rotates the pairs (2i, 2i + 1), not (i, i + head_dim / 2).
        second_moment: E[x xᵀ] of the layer's inputs, `[hidden_size, hidden_size]`, for "low_rank"
            and "aligned".
        generator: on the CPU, for "random".
    Raises:
        ValueError: the count does not divide the layer's, the method is not in `METHODS`,
            `second_moment` is missing or of another shape, or head_dim exceeds hidden_size for
            "low_rank".
    """
    old_count = weights.k.shape[0] // head_dim
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}; got {method!r}")
    if num_kv_heads < 1 or old_count % num_kv_heads:
        raise ValueError(f"num_kv_heads: expected a divisor of {old_count}; got {num_kv_heads}")
    hidden_size = weights.k.shape[1]
    if method in NEEDS_DATA and (
        second_moment is None or second_moment.shape != (hidden_size, hidden_size)
    ):
        got = None if second_moment is None else list(second_moment.shape)
        raise ValueError(
            f"second_moment: expected [{hidden_size}, {hidden_size}] for {method}; got {got}"
        )
    if num_kv_heads == old_count:
        return weights
    heads = _split(weights, num_kv_heads, old_count, head_dim, interleaved)
    if method == "low_rank":
        if head_dim > hidden_size:
            raise ValueError(
                f"head_dim: expected at most hidden_size ({hidden_size}) for low_rank; "
                f"got {head_dim}"
            )
        moment = _everywhere(second_moment.to(heads.v))
        heads = _share_values(_share_keys(heads, moment), moment)
    elif method == "random":
        shape = (num_kv_heads, 1, head_dim, hidden_size)
        drawn = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
        k, v = (0.02 * torch.randn(shape, **drawn).to(heads.v) for _ in range(2))
        heads = heads._replace(k=_pairs(k, interleaved), v=v)
    elif method == "first":
        heads = heads._replace(k=heads.k[:, :1], v=heads.v[:, :1])
    else:
        if method == "aligned":
            heads = _align(heads, _everywhere(second_moment.to(heads.v)))
        heads = heads._replace(k=heads.k.mean(1, keepdim=True), v=heads.v.mean(1, keepdim=True))
    return _join(heads, weights, interleaved)


def aligned(
    weights: AttentionWeights,
    num_kv_heads: int,
    *,
    head_dim: int,
    second_moment: Tensor,
    interleaved: bool = False,
) -> AttentionWeights:
    """Returns the aligned heads of which "aligned" takes the mean: as many heads and the same
    outputs as before.

    Value heads: A = U Wᵀ from the singular value decomposition v₁ E[x xᵀ] vᵢᵀ = U S Wᵀ. Keys: the
    phase of Σ k₁ k̄ᵢ per pair.
    """
    old_count = weights.k.shape[0] // head_dim
    heads = _split(weights, num_kv_heads, old_count, head_dim, interleaved)
    heads = _align(heads, _everywhere(second_moment.to(heads.v)))
    return _join(heads, weights, interleaved)


@torch.no_grad()
def convert(
    model: Llama2,
    num_kv_heads: int,
    ops: ModuleType,
    *,
    method: str = "low_rank",
    calibration: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Llama2:
    """Returns a copy of `model` with `num_kv_heads` key/value heads; see `convert_layer`.

    Args:
        ops: the new model's backend.
        calibration: int `[batch, seq_len]` tokens of the kind that the model will see, for
            "low_rank" and "aligned". A few times hidden_size tokens are enough.
    Raises:
        ValueError: as `convert_layer`; `calibration` is missing.
    """
    config = model.config
    moments: Iterator[Tensor | None] = iter([None] * config.num_layers)
    if method in NEEDS_DATA:
        if calibration is None:
            raise ValueError(f"calibration: expected tokens for {method}; got None")
        moments = iter(second_moments(model, calibration))
    state = model.state_dict()  # loading copies
    for layer in range(config.num_layers):
        names = [f"layers.{layer}.self_attn.{part}_proj.weight" for part in "qkvo"]
        converted = convert_layer(
            AttentionWeights(*(state[name] for name in names)),
            num_kv_heads,
            head_dim=config.head_dim,
            method=method,
            interleaved=config.rope_interleaved,
            second_moment=next(moments),
            generator=generator,
        )
        state |= dict(zip(names, converted, strict=True))
    with torch.device(model.lm_head.weight.device):
        result = Llama2(replace(config, num_kv_heads=num_kv_heads), ops)
    result.to(model.lm_head.weight.dtype)
    result.load_state_dict(state)
    return result.train(model.training)


@torch.no_grad()
def second_moments(model: Llama2, tokens: Tensor) -> list[Tensor]:
    """Returns E[x xᵀ] of the inputs of each layer's attention, float64, over int tokens `[batch,
    seq_len]`."""
    sums: list[Tensor] = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, inputs: sums.append(second_moment(inputs[0]))
        )
        for layer in model.layers
    ]
    try:
        model.hidden_states(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def second_moment(x: Tensor) -> Tensor:
    """Returns E[x xᵀ] over all rows of `[…, hidden_size]`, float64."""
    rows = x.flatten(0, -2).double()
    return rows.mT @ rows / len(rows)


# Heads as groups, and back.


def _pairs(x: Tensor, interleaved: bool) -> Tensor:
    """Returns `[…, head_dim, hidden_size]` as complex `[…, head_dim / 2, hidden_size]`."""
    if interleaved:
        return torch.complex(x[..., 0::2, :], x[..., 1::2, :])
    return torch.complex(*x.chunk(2, dim=-2))


def _features(x: Tensor, interleaved: bool) -> Tensor:
    """Returns the inverse of `_pairs`."""
    if interleaved:
        return torch.stack((x.real, x.imag), dim=-2).flatten(-3, -2)
    return torch.cat((x.real, x.imag), dim=-2)


def _split(
    weights: AttentionWeights, groups: int, old_count: int, head_dim: int, interleaved: bool
) -> _Heads:
    q, k, v, o = (weight.double() for weight in weights)
    heads = (groups, old_count // groups)
    q = q.unflatten(0, (*heads, -1, head_dim))
    k, v = (x.unflatten(0, (*heads, head_dim)) for x in (k, v))
    o = o.unflatten(1, (*heads, -1, head_dim)).permute(1, 2, 3, 0, 4)
    return _Heads(_pairs(q, interleaved), _pairs(k, interleaved), v, o)


def _join(heads: _Heads, like: AttentionWeights, interleaved: bool) -> AttentionWeights:
    q = _features(heads.q, interleaved).flatten(0, 3)
    k, v = (x.flatten(0, 2) for x in (_features(heads.k, interleaved), heads.v))
    o = heads.o.permute(3, 0, 1, 2, 4).flatten(1)
    return AttentionWeights(*(x.to(old) for x, old in zip((q, k, v, o), like, strict=True)))


# The methods that use data.


def _everywhere(moment: Tensor) -> Tensor:
    """Returns E[x xᵀ] with a little power in directions that the text does not use, so that what
    heads do there is kept as well as one head can."""
    power = moment.diagonal().mean() * torch.eye(
        len(moment), dtype=moment.dtype, device=moment.device
    )
    _, narrow = torch.linalg.cholesky_ex(moment - _NARROW * power)
    return moment + _UNSEEN * power if narrow else moment


def _align(heads: _Heads, moment: Tensor) -> _Heads:
    cross = heads.v[:, :1] @ moment @ heads.v.mT
    left, _, right = torch.linalg.svd(cross)
    turn = left @ right  # onto the first head; that of the first head is the identity
    phase = torch.sgn(_inner(heads.k[:, :1], heads.k, moment))[..., None]
    phase = phase.where(phase != 0, 1)  # a zero key stays
    return _Heads(
        q=heads.q * phase[:, :, None],
        k=heads.k * phase,
        v=turn @ heads.v,
        o=heads.o @ turn[:, :, None].mT,
    )


def _inner(a: Tensor, b: Tensor, moment: Tensor) -> Tensor:
    """Returns E[(a x) conj(b x)] per row of complex `[…, hidden_size]`."""
    return ((a @ moment.to(a.dtype)) * b.conj()).sum(-1)


def _power_and_length(x: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Returns E[|x ·|²] per row of `[…, hidden_size]`, and its value for isotropic inputs."""
    return _inner(x, x, moment).real, x.abs().square().sum(-1) * moment.diagonal().mean()


def _share_keys(heads: _Heads, moment: Tensor) -> _Heads:
    """Approximates keys at rank one per group and pair: kᵢ ≈ cᵢ κ; the queries of head i become c̄ᵢ
    q."""
    k = heads.k.transpose(1, 2)  # [groups, pairs, heads, hidden_size]
    power = _inner(heads.q, heads.q, moment).real.sum(2).mT  # [groups, pairs, heads]
    weight = power.clamp(min=0).sqrt()[..., None]
    weight = weight.where(weight.amax(2, keepdim=True) > 0, 1)  # no query uses this pair
    rows = weight * k
    gram = rows @ moment.to(k.dtype) @ rows.mH
    direction = torch.linalg.eigh(gram).eigenvectors[..., -1:]  # of the largest eigenvalue
    shared = direction.mH @ rows  # [groups, pairs, 1, hidden_size]
    # The mean power of the heads; without any power, no query uses the key.
    old = _inner(k, k, moment).real.mean(-1, keepdim=True)
    new, length = _power_and_length(shared, moment)
    seen = new > _ROUNDING * length
    scale = (old / new).sqrt().where(seen, 1)[..., None]
    # The projection onto the shared key: direction / weight, defined for heads of weight 0 too.
    coefficient = (_inner(k, shared, moment) / new).where(seen, 0)[..., None] / scale
    return heads._replace(
        q=heads.q * coefficient.transpose(1, 2).conj()[:, :, None],
        k=(shared * scale).transpose(1, 2),
    )


def _share_values(heads: _Heads, moment: Tensor) -> _Heads:
    """Approximates values at rank head_dim per group: [oₕ vₕ]ₕ ≈ [o′ₕ]ₕ v′."""
    groups, count, queries, _, head_dim = heads.o.shape
    # o = basis · r: the basis preserves distances, so approximating r is enough.
    basis, r = torch.linalg.qr(heads.o)
    rows = (r @ heads.v[:, :, None]).flatten(1, 3)  # [groups, count · queries · head_dim, hidden]
    directions = torch.linalg.eigh(rows @ moment @ rows.mT).eigenvectors[..., -head_dim:]
    shared = directions.mT @ rows
    # Rows with the heads' mean power, in the basis nearest to that of the first head.
    old, length = (of.mean((1, 2))[:, None, None] for of in _power_and_length(heads.v, moment))
    new, new_length = (of[..., None] for of in _power_and_length(shared, moment))
    seen = new > _HARDLY_SEEN * new_length
    old, new = old.where(seen, length), new.where(seen, new_length)
    scale = (old / new).sqrt().where(new > 0, 1)
    left, _, right = torch.linalg.svd(heads.v[:, 0] @ moment @ (scale * shared).mT)
    turn = left @ right
    coefficients = directions.mT / scale  # rows: the shared features
    o = (turn @ coefficients).mT.reshape(groups, count, queries, head_dim, head_dim)
    return heads._replace(v=(turn @ (scale * shared))[:, None], o=basis @ o)
