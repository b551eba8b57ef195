"""The correctness gate: checks the result of the same callable on the same inputs that are timed.

The error budget is the package's own (`gqa_kernels.accuracy`), from one draw of eager code on this
machine: the largest of hundreds of errors in bfloat16 depends neither on chance nor on the order of
float32 sums. Row ops are checked completely. Attention is checked where its reference fits into
memory: for the last sequence of the batch and its last key/value head, forward at the first, middle
and last 64 queries, backward at all queries. A loss is a single number whose error may be 0 by
chance, so its budget comes from the losses of its tokens.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from grid import DTYPE, Workload
from torch import Tensor

from gqa_kernels import reference
from gqa_kernels.accuracy import Measured, compare, widen

SAMPLED_QUERIES = 64
_QUERIES_AT_ONCE = 512
_CHUNKS = 64  # the most of all peers: PyTorch's loss at 8192 tokens and Llama 3's vocabulary
_ORDERS = 32

Results = tuple[Tensor, ...]


class GateError(AssertionError):
    """A result is outside its budget."""


def check(
    workload: Workload,
    inputs: dict[str, Any],
    cotangents: Results,
    actual: Results,
    *,
    coarse: bool = False,
) -> list[Measured]:
    """Returns every output (fwd) or gradient (bwd) with its error and budget.

    Args:
        inputs: the arguments of the call, unchanged except for a cache that the op writes to.
        cotangents: one per output; ignored for a forward pass.
        actual: the outputs, the gradients of `workload.spec.wrt` in that order, or both in a step.
        coarse: whether the peer rounds its sums after every chunk of tokens.
    Raises:
        GateError: an error exceeds its budget; the message gives both.
    """
    expected = {
        ("flash_attention", "fwd"): _attention_forward,
        ("flash_attention", "bwd"): _attention_backward,
        ("decode_attention", "fwd"): _decode,
        ("prefill_attention", "fwd"): _prefill,
        ("rope_append_kv", "fwd"): _append,
        ("linear_cross_entropy", "fwd"): functools.partial(_loss, coarse=coarse),
        ("linear_cross_entropy", "step"): functools.partial(_loss, coarse=coarse),
    }.get((workload.op, workload.pass_), _whole)
    measured = [compare(*arguments) for arguments in expected(workload, inputs, cotangents, actual)]
    wrong = [m for m in measured if not m.ok]
    if wrong:
        raise GateError("; ".join(map(str, wrong)))
    return measured


def spoil(workload: Workload, inputs: dict[str, Any]) -> None:
    """Overwrites a cache to which the op writes, so that another backend's result does not
    remain."""
    if workload.op == "rope_append_kv":
        for cache in (inputs["k_cache"], inputs["v_cache"]):
            cache.fill_(-128 if cache.dtype == torch.int8 else float("nan"))


Comparison = list[tuple[Any, ...]]  # (what, actual, eager, oracle), then more (eager, oracle) pairs


def _both(function: Callable[..., Results], *arguments: Any) -> tuple[Results, Results]:
    """(eager in the inputs' dtype, the float64 oracle)."""
    wide = [widen({"x": argument})["x"] for argument in arguments]
    return function(*arguments), function(*wide)


def _tuple(value: Any) -> Results:
    return value if isinstance(value, tuple) else (value,)


def gradients(outputs: Results, leaves: list[Tensor], cotangents: Results) -> Results:
    return torch.autograd.grad(
        outputs, leaves, [c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)]
    )


def _whole(
    workload: Workload, inputs: dict[str, Any], cotangents: Results, actual: Results
) -> Comparison:
    wrt = () if workload.pass_ == "fwd" else workload.spec.wrt
    inputs = {name: x for name, x in inputs.items() if name != "return_lse"}  # never requested

    def run(given: dict[str, Any]) -> Results:
        leaves = {n: x.detach().requires_grad_() if n in wrt else x for n, x in given.items()}
        with torch.set_grad_enabled(bool(wrt)):
            outputs = _tuple(workload.spec.reference(**leaves))
        if not wrt:
            return outputs
        found = gradients(outputs, [leaves[n] for n in wrt], cotangents)
        return found if workload.pass_ == "bwd" else (*(x.detach() for x in outputs), *found)

    eager, oracle = run(inputs), run(widen(inputs))
    names = [f"output {i}" for i in range(len(oracle) - len(wrt))] + [f"d {name}" for name in wrt]
    return list(zip(names, actual, eager, oracle, strict=True))


def _loss(
    workload: Workload,
    inputs: dict[str, Any],
    cotangents: Results,
    actual: Results,
    *,
    coarse: bool,
) -> Comparison:
    """Compares a loss. The error of a mean is at most the root mean square of the errors of its
    terms. If a peer's loss is not float32, eager's is rounded to the same dtype."""
    (what, loss, eager, oracle), *rest = _whole(workload, inputs, cotangents, actual)
    by_token, counted = inputs | {"reduction": "none"}, inputs["targets"] != -100
    terms = tuple(
        workload.spec.reference(**given)[counted] for given in (by_token, widen(by_token))
    )
    further = [terms]
    if coarse:
        further += [(mean, oracle) for mean in _rounded_sums(terms[0], loss.dtype)]
    if coarse and rest:
        dhidden, dweight = rest
        rest = [dhidden, (*dweight, (_dweight_by_chunks(workload, inputs), dweight[-1]))]
    return [(what, loss, eager.to(loss.dtype), oracle, *further), *rest]


def _rounded_sums(terms: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The mean of some terms, summed by chunks in `dtype` in several orders, because the error in a
    single order depends on chance."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(_ORDERS):
        order = torch.randperm(len(terms), generator=generator).to(terms.device)
        total = terms.new_zeros((), dtype=dtype)
        for chunk in terms[order].chunk(_CHUNKS):
            total += chunk.sum() / len(terms)
        found.append(total)
    return found


def _dweight_by_chunks(workload: Workload, inputs: dict[str, Any]) -> Tensor:
    """Eager's gradient of the weight, summed by chunks of tokens in the weight's dtype."""
    hidden, weight, targets = (inputs[name] for name in ("hidden", "weight", "targets"))
    size, count = -(-len(targets) // _CHUNKS), (targets != -100).sum()
    weight = weight.detach().requires_grad_()
    total = torch.zeros_like(weight, requires_grad=False)
    for some, ids in zip(hidden.split(size), targets.split(size), strict=True):
        given = inputs | {"hidden": some, "weight": weight, "targets": ids}
        with torch.enable_grad():
            part = workload.spec.reference(**given, num_predictions=count)
        total += torch.autograd.grad(part, weight)[0]
    return total


def _last_head(inputs: dict[str, Any]) -> tuple[slice, slice, slice]:
    """Slices for the last sequence, its last key/value head, and the query heads that read it."""
    q, k = inputs["q"], inputs.get("k", inputs.get("k_cache"))
    group_size = q.shape[2] // k.shape[2]
    return slice(-1, None), slice(-1, None), slice(-group_size, None)


def _attention_forward(
    workload: Workload, inputs: dict[str, Any], cotangents: Results, actual: Results
) -> Comparison:
    batch, kv_head, q_heads = _last_head(inputs)
    q = inputs["q"][batch, :, q_heads]
    k, v = (inputs[name][batch, :, kv_head] for name in ("k", "v"))
    out = actual[0][batch, :, q_heads]
    seq_len, causal = q.shape[1], inputs["causal"]
    count = min(SAMPLED_QUERIES, seq_len)
    compared = []
    for start in sorted({0, (seq_len - count) // 2, seq_len - count}):
        rows = slice(start, start + count)
        attend = functools.partial(_attend_rows, causal=causal, rows=rows, seq_len_q=seq_len)
        eager, oracle = _both(attend, q, k, v)
        compared.append((f"queries from {start}", out[:, rows], eager[0], oracle[0]))
    return compared


def _attend_rows(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, rows: slice, seq_len_q: int
) -> Results:
    """Attention of some queries. The keys are cut behind the last key that the last of them sees,
    so the reference's alignment (the last query sees every key) matches that of the whole."""
    if causal:
        end = max(0, rows.stop + k.shape[1] - seq_len_q)
        k, v = k[:, :end], v[:, :end]
    return (reference.flash_attention(q[:, rows], k, v, causal=causal),)


def _attention_backward(
    workload: Workload, inputs: dict[str, Any], cotangents: Results, actual: Results
) -> Comparison:
    batch, kv_head, q_heads = _last_head(inputs)
    q = inputs["q"][batch, :, q_heads]
    k, v = (inputs[name][batch, :, kv_head] for name in ("k", "v"))
    dout = cotangents[0][batch, :, q_heads]
    seq_len, causal = q.shape[1], inputs["causal"]

    def run(*given: Tensor) -> Results:
        """Gradients summed over blocks of queries, in float32 or wider, and rounded once."""
        leaves = [x.detach().requires_grad_() for x in given]
        wide = torch.promote_types(given[0].dtype, torch.float32)
        total = [torch.zeros_like(x, dtype=wide) for x in given]
        for start in range(0, seq_len, _QUERIES_AT_ONCE):
            rows = slice(start, min(start + _QUERIES_AT_ONCE, seq_len))
            with torch.enable_grad():
                out = _attend_rows(*leaves, causal=causal, rows=rows, seq_len_q=seq_len)
            for sum_, grad in zip(total, gradients(out, leaves, (dout[:, rows],)), strict=True):
                sum_ += grad
        return tuple(x.to(given[0].dtype) for x in total)

    eager, oracle = _both(run, q, k, v)
    heads = (q_heads, kv_head, kv_head)
    return [
        (f"d {name}", grad[batch, :, head], expected, truth)
        for name, grad, head, expected, truth in zip(
            "qkv", actual, heads, eager, oracle, strict=True
        )
    ]


def _decode(
    workload: Workload, inputs: dict[str, Any], cotangents: Results, actual: Results
) -> Comparison:
    batch, kv_head, q_heads = _last_head(inputs)

    k, v = inputs["k_cache"], inputs["v_cache"]
    # The last sequence of the batch; for a paged cache, only the block table is cut.
    table = inputs["block_table"][batch] if "block_table" in inputs else None
    rows = slice(None) if "block_table" in inputs else batch
    scales = []
    if "k_scale" in inputs:
        of_head = (rows, slice(None), kv_head) if inputs["k_scale"].dim() == 3 else (kv_head,)
        scales = [inputs[name][of_head] for name in ("k_scale", "v_scale")]

    def run(q: Tensor, k: Tensor, v: Tensor, *scales: Tensor) -> Results:
        given = dict(zip(("k_scale", "v_scale"), scales, strict=False))
        lengths = inputs["seq_lens"][batch]
        return (reference.decode_attention(q, k, v, lengths, block_table=table, **given),)

    heads = (k[rows, :, kv_head], v[rows, :, kv_head])
    eager, oracle = _both(run, inputs["q"][batch, :, q_heads], *heads, *scales)
    return [("last sequence", actual[0][batch, :, q_heads], eager[0], oracle[0])]


def _prefill(
    workload: Workload, inputs: dict[str, Any], cotangents: Results, actual: Results
) -> Comparison:
    """The last key/value head of all sequences, and the query heads that read it."""
    num_kv_heads = inputs["k_cache"].shape[2]
    q_heads = slice(-(inputs["q"].shape[1] // num_kv_heads), None)
    kept = {
        "q": inputs["q"][:, q_heads],
        "k_cache": inputs["k_cache"][:, :, -1:],
        "v_cache": inputs["v_cache"][:, :, -1:],
    }

    def run(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Results:
        given = inputs | {"q": q, "k_cache": k_cache, "v_cache": v_cache}
        return (reference.prefill_attention(**given),)

    eager, oracle = _both(run, *kept.values())
    return [("last head", actual[0][:, q_heads], eager[0], oracle[0])]


def _append(
    workload: Workload, inputs: dict[str, Any], cotangents: Results, actual: Results
) -> Comparison:
    """Compares the rotated q and k and the content of the caches at the tokens' slots."""
    written = ("k_cache", "v_cache", "k_scale", "v_scale")
    own = {name: inputs[name].clone() for name in written if name in inputs}
    rotated = reference.rope_append_kv(**inputs | own)

    def stored(caches: dict[str, Any]) -> Results:
        scales = [caches.get(name) for name in written[2:]]
        return tuple(
            reference.dequantized(caches[name], scale, DTYPE).flatten(0, 1)[inputs["slots"]]
            for name, scale in zip(written[:2], scales, strict=True)
        )

    exact = widen({name: inputs[name] for name in ("q", "k", "v", "cos", "sin")})
    angles = {name: inputs[name] for name in ("positions", "interleaved")}
    v = exact.pop("v")
    oracle = reference.apply_rope(**exact, **angles)
    names = ("q", "k", "k stored", "v stored")
    mine, eager = (*actual, *stored(inputs)), (*rotated, *stored(own))
    return list(zip(names, mine, eager, (*oracle, oracle[1], v), strict=True))
