"""The ops on DTensors: what they give on two and four ranks, and what it costs in collectives."""

from collections.abc import Callable
from functools import partial

import pytest
import ranks
import torch
from budget import assert_results
from processes import fresh
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

WHOLE = Replicate()
BATCH, SEQUENCE, HEADS = Shard(0), Shard(1), Shard(2)
SUM = Partial()

# The placements of a tensor on every dimension of the mesh.
Placements = tuple[Placement, ...]


def line() -> DeviceMesh:
    return init_device_mesh("cpu", (torch.distributed.get_world_size(),))


def square() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2))


def spread(inputs: dict, placed: dict[str, Placements], mesh: DeviceMesh, wrt=()) -> dict:
    """The tensors of inputs as DTensors: replicated, unless placed."""
    whole = (WHOLE,) * mesh.ndim
    return {
        name: distribute_tensor(value, mesh, placed.get(name, whole)).requires_grad_(name in wrt)
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }


def check(
    op: str,
    make_inputs: Callable[[], dict],
    placed: dict[str, Placements],
    outputs: list[Placements],
    wrt: dict[str, Placements],
    *,
    mesh: Callable[[], DeviceMesh] = line,
    cotangents: Placements | None = None,
    collectives: int = 0,
    same_bits: bool = True,
) -> None:
    """An op and its gradients on DTensors, against the op on one process and against the truth.

    Args:
        placed: of the inputs; replicated if absent.
        outputs: expected of them.
        wrt: expected of the gradients, of these inputs and no others.
        cotangents: of all outputs; as the outputs are, if None.
        collectives: how many the call and its backward pass may start.
        same_bits: of what is no sum over ranks, as on one process.
    """
    import gqa_kernels
    from gqa_kernels import accuracy, reference, sharding

    sharding.register()
    kernel, eager = getattr(gqa_kernels, op), getattr(reference, op)
    inputs, mesh = make_inputs(), mesh()
    arguments = spread(inputs, placed, mesh, wrt)
    drawn = accuracy.cotangents(accuracy.run(eager, inputs, ()))  # as accuracy.run draws them
    directions = [
        distribute_tensor(x, mesh, cotangents or placement)
        for x, placement in zip(drawn, outputs, strict=True)
    ]
    with CommDebugMode() as communication:
        results = kernel(**arguments)
        results = results if isinstance(results, tuple) else (results,)
        grads = ()
        if wrt:
            grads = torch.autograd.grad(results, [arguments[name] for name in wrt], directions)
    assert communication.get_total_counts() == collectives, communication.get_comm_counts()
    assert (found := [x.placements for x in results]) == outputs, found
    found = {name: x.placements for name, x in zip(wrt, grads, strict=True)}
    assert found == wrt, found

    actual = {f"output {i}": x.full_tensor() for i, x in enumerate(results)}
    actual |= {f"d {name}": x.full_tensor() for name, x in zip(wrt, grads, strict=True)}
    alone = accuracy.run(kernel, inputs, tuple(wrt))
    sums = {f"d {name}" for name, placement in wrt.items() if SUM in placement}
    assert actual.keys() == alone.keys()
    assert_results(actual, lambda given: accuracy.run(eager, given, tuple(wrt)), inputs)
    for what, value in actual.items():
        assert not same_bits or what in sums or torch.equal(value, alone[what]), what


def check_append(
    inputs: dict, placed: dict[str, Placements], outputs: list[Placements], **on_mesh
) -> None:
    """What `rope_append_kv` writes is written to the shards themselves."""
    import gqa_kernels
    from gqa_kernels import sharding

    sharding.register()
    mesh = on_mesh.get("mesh", line)()
    arguments = spread({name: x.clone() for name, x in inputs.items()}, placed, mesh)
    before = {name: x.to_local().data_ptr() for name, x in arguments.items()}
    with CommDebugMode() as communication:
        results = gqa_kernels.rope_append_kv(**arguments)
    assert communication.get_total_counts() == 0, communication.get_comm_counts()
    assert (found := [x.placements for x in results]) == outputs, found
    for wanted, x in zip(gqa_kernels.rope_append_kv(**inputs), results, strict=True):
        assert torch.equal(x.full_tensor(), wanted)
    for name, x in arguments.items():
        assert x.to_local().data_ptr() == before[name]
        whole, wanted = x.full_tensor().contiguous(), inputs[name].contiguous()
        assert torch.equal(whole.view(torch.uint8), wanted.view(torch.uint8)), name


# Inputs, and placements by name. What is sharded is uneven, but for the heads of attention.


def norm_inputs(*shape: int, residual: bool = False) -> dict:
    x = {"x": torch.randn(shape), "weight": torch.rand(shape[-1]) + 0.5}
    return x | {"residual": torch.randn(shape)} if residual else x


def loss_inputs(*rows: int, vocab_size: int = 11, **options) -> dict:
    targets = torch.randint(vocab_size, rows)
    targets[0] = -100
    return {
        "hidden": torch.randn(*rows, 6),
        "weight": torch.randn(11, 6),
        "targets": targets,
    } | options


def log_prob_inputs() -> dict:
    inputs = loss_inputs(5, temperature=0.7, return_entropy=True)
    return inputs | {"targets": inputs["targets"].clamp(min=0)}


def swiglu_inputs() -> dict:
    return {"gate": torch.randn(3, 5, 9), "up": torch.randn(3, 5, 9)}


def sample_inputs() -> dict:
    settings = {"temperature": torch.rand(4), "top_p": torch.rand(4), "uniform": torch.rand(4)}
    return {"logits": torch.randn(4, 33)} | settings


def rope_inputs(*, positions: bool, q: int = 5, kv: int = 3) -> dict:
    angle = torch.randn(16, 4)
    inputs = {"q": torch.randn(3, 5, q, 8), "k": torch.randn(3, 5, kv, 8)}
    inputs |= {"cos": angle.cos(), "sin": angle.sin()}
    return inputs | {"positions": torch.randint(16, (3, 5))} if positions else inputs


def append_inputs(scales: str = "", *, q: int = 4, kv: int = 2) -> dict:
    angle, cache = torch.randn(16, 4), (4, 4, kv)
    inputs = {"q": torch.randn(3, 2, q, 8), "k": torch.randn(3, 2, kv, 8)}
    inputs |= {"v": torch.randn(3, 2, kv, 8), "cos": angle.cos(), "sin": angle.sin()}
    dtype = torch.int8 if scales else torch.float32
    inputs |= {name: torch.zeros(*cache, 8, dtype=dtype) for name in ("k_cache", "v_cache")}
    if scales:
        shape = cache if scales == "per token" else (kv,)
        inputs |= {name: torch.rand(shape) for name in ("k_scale", "v_scale")}
    slots = torch.randperm(16)[:6].view(3, 2)
    return inputs | {"positions": torch.randint(16, (3, 2)), "slots": slots}


def append(scales: str, placed: dict, outputs: list, *, q: int = 4, kv: int = 2, **rest) -> None:
    check_append(append_inputs(scales, q=q, kv=kv), placed, outputs, **rest)


def constants(names: str, num_heads: int, num_sequences: int) -> dict:
    """Those of attention that are asked for."""
    every = {
        "sinks": torch.randn(num_heads),
        "alibi_slopes": torch.rand(num_heads),
        "alibi_slopes of each": torch.rand(num_sequences, num_heads),
    }
    return {name.split()[0]: every[name] for name in filter(None, names.split(", "))}


def attention_inputs(more: str = "", *, batch: int = 3, q: int = 4, kv: int = 2) -> dict:
    tensors = {
        "q": torch.randn(batch, 5, q, 8),
        "k": torch.randn(batch, 7, kv, 8),
        "v": torch.randn(batch, 7, kv, 8),
    }
    return tensors | constants(more, q, batch) | {"causal": True, "return_lse": True}


def key_limits(num_queries: int, num_keys: int) -> dict:
    """For three sequences; none of them alike."""
    first = torch.randint(num_keys, (3, num_queries))
    ranges = torch.stack([first, first + torch.randint(num_keys, (3, num_queries))], -1)
    return {"key_ranges": ranges.int(), "key_mask": torch.rand(3, num_keys) < 0.7}


def limited_attention_inputs() -> dict:
    return attention_inputs() | key_limits(5, 7)


def packed_inputs(more: str = "") -> dict:
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    tensors = {"q": torch.randn(9, 4, 8), "k": torch.randn(9, 2, 8), "v": torch.randn(9, 2, 8)}
    tensors |= {"cu_seqlens_q": bounds, "cu_seqlens_kv": bounds}
    return tensors | constants(more, 4, 2) | {"causal": True, "return_lse": True}


def decode_inputs(more: str = "", *, q: int = 4, kv: int = 2, limits: bool = False) -> dict:
    options = {"window": (3, None), "softcap": 2.0} if more else {}
    options |= constants(more, q, 3)
    return (
        (key_limits(2, 6) if limits else {})
        | options
        | {
            "q": torch.randn(3, 2, q, 8),
            "k_cache": torch.randn(3, 6, kv, 8),
            "v_cache": torch.randn(3, 6, kv, 8),
            "seq_lens": torch.tensor([6, 3, 2], dtype=torch.int32),
        }
    )


def prefill_inputs(more: str = "", *, q: int = 4, kv: int = 2) -> dict:
    """Two sequences and a row after the last."""
    options = {"window": (3, None), "softcap": 2.0, "return_lse": True} if more else {}
    return (
        options
        | constants(more, q, 2)
        | {
            "q": torch.randn(6, q, 8),
            "k_cache": torch.randn(2, 6, kv, 8),
            "v_cache": torch.randn(2, 6, kv, 8),
            "cu_seqlens_q": torch.tensor([0, 2, 5], dtype=torch.int32),
            "seq_lens": torch.tensor([6, 3], dtype=torch.int32),
        }
    )


def paged_inputs(*, per_token: bool) -> dict:
    """An int8 cache of four pages of two tokens."""
    shape = (4, 2, 2) if per_token else (2,)
    caches = {f"{x}_cache": torch.randint(-127, 128, (4, 2, 2, 8), dtype=torch.int8) for x in "kv"}
    scales = {f"{x}_scale": 0.01 + torch.rand(shape) / 100 for x in "kv"}
    table = torch.tensor([[3, 0], [1, 2], [2, 9]], dtype=torch.int32)
    seq_lens = torch.tensor([4, 3, 2], dtype=torch.int32)
    return {
        "q": torch.randn(3, 2, 4, 8),
        "seq_lens": seq_lens,
        "block_table": table,
        **caches,
        **scales,
    }


def on(names: str, *placements: Placement) -> dict[str, Placements]:
    return dict.fromkeys(names.split(), placements)


def refuse(op: str, make_inputs: Callable[[], dict], placed: dict, message: str, mesh=line) -> None:
    import gqa_kernels
    from gqa_kernels import sharding

    sharding.register()
    with pytest.raises(NotImplementedError, match=message):
        getattr(gqa_kernels, op)(**spread(make_inputs(), placed, mesh()))


def before_registration() -> None:
    """The rules are the caller's choice; before it, DTensor says that there is none."""
    import gqa_kernels

    with pytest.raises(NotImplementedError, match="does not have a sharding strategy"):
        gqa_kernels.swiglu(**spread(swiglu_inputs(), on("gate up", BATCH), line()))


def beside_plain_tensors() -> None:
    """A plain tensor is not taken for a replicated one."""
    import gqa_kernels
    from gqa_kernels import sharding

    sharding.register()
    inputs = norm_inputs(4, 16)
    x = spread(inputs, on("x", BATCH), line())["x"]
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        gqa_kernels.rms_norm(x, inputs["weight"])


def what_is_needed_is_not_mixed_up() -> None:
    """Calls that differ only in which tensors are given and which gradients are wanted."""
    import gqa_kernels
    from gqa_kernels import sharding

    sharding.register()
    mesh = line()
    rope = partial(rope_inputs, positions=False, q=4, kv=4)  # q and k look alike
    for wrt in ("q", "k", "q k", "k"):
        arguments = spread(rope(), on("q k", BATCH), mesh, wrt.split())
        q, k = gqa_kernels.apply_rope(**arguments)
        (q.sum() + k.sum()).backward()
        for name in "qk":
            grad = arguments[name].grad
            assert (grad is not None) == (name in wrt)
            assert grad is None or grad.shape == (3, 5, 4, 8)
    for wrt in ("x", "weight", "x weight", "x"):
        arguments = spread(norm_inputs(3, 16), on("x", BATCH), mesh, wrt.split())
        gqa_kernels.rms_norm(**arguments).sum().backward()
        for name, shape in (("x", (3, 16)), ("weight", (16,))):
            grad = arguments[name].grad
            assert (grad is not None) == (name in wrt)
            assert grad is None or (grad.shape, grad.full_tensor().shape) == (shape, shape)
    sinks_or_slopes = ("sinks", "alibi_slopes", "sinks, alibi_slopes", "")
    results = []
    for more in sinks_or_slopes:  # a sum of the sinks' gradient on the batch, none of the slopes'
        arguments = spread(attention_inputs(more), on("q k v", BATCH), mesh, ("q", "sinks"))
        out, _ = gqa_kernels.flash_attention(**arguments)
        out.sum().backward()
        assert arguments["q"].grad.placements == (BATCH,)
        if "sinks" in more:
            assert arguments["sinks"].grad.placements == (SUM,)
        results.append(out)
    assert len({x.full_tensor().sum().item() for x in results}) == len(results)


def one_output_unused() -> None:
    import gqa_kernels
    from gqa_kernels import sharding

    sharding.register()
    for used in (0, 1):
        inputs = norm_inputs(3, 5, 16, residual=True)
        arguments = spread(inputs, on("x residual", SEQUENCE), line(), inputs)
        along = distribute_tensor(torch.randn(3, 5, 16), line(), (SEQUENCE,))
        with CommDebugMode() as communication:
            gqa_kernels.add_rms_norm(**arguments)[used].backward(along)
        assert communication.get_total_counts() == 0
        assert arguments["x"].grad.placements == (SEQUENCE,)
        plain = {name: value.requires_grad_() for name, value in inputs.items()}
        gqa_kernels.add_rms_norm(**plain)[used].backward(along.full_tensor())
        assert torch.equal(arguments["x"].grad.full_tensor(), plain["x"].grad)


def a_sharded_sequence() -> None:
    """Attention has no rule for it: DTensor gathers, to what is up to its costs."""
    import gqa_kernels
    from gqa_kernels import sharding

    sharding.register()
    inputs = attention_inputs()
    results = gqa_kernels.flash_attention(**spread(inputs, on("q k v", SEQUENCE), line()))
    for ours, alone in zip(results, gqa_kernels.flash_attention(**inputs), strict=True):
        assert torch.equal(ours.full_tensor(), alone)


def registering_twice() -> None:
    from gqa_kernels import sharding

    sharding.register()
    sharding.register()
    check("swiglu", swiglu_inputs, on("gate up", BATCH), [(BATCH,)], on("gate up", BATCH))


norm = partial(norm_inputs, 3, 5, 16)
add_norm = partial(norm_inputs, 3, 5, 16, residual=True)
every_constant = partial(attention_inputs, "sinks, alibi_slopes of each")

ON_TWO_RANKS = {
    "before registration": before_registration,
    "beside plain tensors": beside_plain_tensors,
    "registering twice": registering_twice,
    "what is needed is not mixed up": what_is_needed_is_not_mixed_up,
    "one output unused": one_output_unused,
    **{
        f"rms_norm, {rows}": partial(
            check, "rms_norm", norm, on("x", rows), [(rows,)], on("x", rows) | on("weight", SUM)
        )
        for rows in (BATCH, SEQUENCE)
    },
    **{
        f"add_rms_norm, {rows}": partial(
            check, "add_rms_norm", add_norm, on("x residual", rows), [(rows,)] * 2,
            on("x residual", rows) | on("weight", SUM),
        )
        for rows in (BATCH, SEQUENCE)
    },
    "sample_tokens, rows": partial(
        check, "sample_tokens", sample_inputs, on("logits temperature top_p uniform", BATCH),
        [(BATCH,)], {},
    ),
    "rms_norm, replicated": partial(
        check, "rms_norm", norm, {}, [(WHOLE,)], on("x weight", WHOLE)
    ),
    "rms_norm, sharded features": partial(
        check, "rms_norm", norm, on("x", Shard(2)), [(WHOLE,)], {}, collectives=1
    ),
    "rms_norm, cotangent sharded": partial(
        check, "rms_norm", norm, {}, [(WHOLE,)], on("x", SEQUENCE) | on("weight", SUM),
        cotangents=(SEQUENCE,),
    ),
    **{
        f"swiglu, {same}": partial(
            check, "swiglu", swiglu_inputs, on("gate up", same), [(same,)], on("gate up", same)
        )
        for same in (BATCH, SEQUENCE, Shard(2), WHOLE)
    },
    **{
        f"apply_rope, {same}, positions {positions}": partial(
            check, "apply_rope", partial(rope_inputs, positions=positions),
            on("q k", same) | (on("positions", same) if positions and same != HEADS else {}),
            [(same,)] * 2, on("q k", same),
        )
        for same in (BATCH, SEQUENCE, HEADS)
        for positions in (False, True)
        if positions or same != SEQUENCE
    },
    "apply_rope, one key/value head": partial(
        check, "apply_rope", partial(rope_inputs, positions=False, kv=1), on("q", HEADS),
        [(HEADS,), (WHOLE,)], on("q", HEADS) | on("k", WHOLE),
    ),
    # Each rank would take its first token for the first of the sequence.
    "apply_rope, cotangents on the sequence, without positions": partial(
        check, "apply_rope", partial(rope_inputs, positions=False), {}, [(WHOLE,)] * 2,
        on("q k", WHOLE), cotangents=(SEQUENCE,), collectives=2,
    ),
    "apply_rope, a sequence without positions": partial(
        refuse, "apply_rope", partial(rope_inputs, positions=False), on("q k", SEQUENCE),
        "positions: expected a tensor for q and k that are sharded on the sequence; got None",
    ),
    "flash_attention, batch": partial(
        check, "flash_attention", attention_inputs, on("q k v", BATCH), [(BATCH,), (BATCH,)],
        on("q k v", BATCH),
    ),
    "flash_attention, batch, constants": partial(
        check, "flash_attention", every_constant, on("q k v alibi_slopes", BATCH),
        [(BATCH,), (BATCH,)], on("q k v", BATCH) | on("sinks", SUM),
    ),
    "flash_attention, heads": partial(
        check, "flash_attention", attention_inputs, on("q k v", HEADS), [(HEADS,), (Shard(1),)],
        on("q k v", HEADS),
    ),
    "flash_attention, heads, constants": partial(
        check, "flash_attention", every_constant,
        on("q k v", HEADS) | on("alibi_slopes", Shard(1)) | on("sinks", Shard(0)),
        [(HEADS,), (Shard(1),)], on("q k v", HEADS) | on("sinks", Shard(0)),
    ),
    "flash_attention, heads, slopes of the heads alone": partial(
        check, "flash_attention", partial(attention_inputs, "alibi_slopes"),
        on("q k v", HEADS) | on("alibi_slopes", Shard(0)),
        [(HEADS,), (Shard(1),)], on("q k v", HEADS),
    ),
    "flash_attention, batch, key limits": partial(
        check, "flash_attention", limited_attention_inputs,
        on("q k v key_ranges key_mask", BATCH), [(BATCH,), (BATCH,)], on("q k v", BATCH),
    ),
    "flash_attention, heads, key limits": partial(
        check, "flash_attention", limited_attention_inputs, on("q k v", HEADS),
        [(HEADS,), (Shard(1),)], on("q k v", HEADS),
    ),
    # Replicated constants are cut without a collective.
    "flash_attention, heads, whole constants": partial(
        check, "flash_attention", every_constant, on("q k v", HEADS),
        [(HEADS,), (Shard(1),)], on("q k v", HEADS) | on("sinks", Shard(0)),
    ),
    "flash_attention, one key/value head": partial(
        check, "flash_attention", partial(attention_inputs, "sinks", q=5, kv=1),
        on("q", HEADS) | on("sinks", Shard(0)), [(HEADS,), (Shard(1),)],
        on("q", HEADS) | on("k v", SUM) | on("sinks", Shard(0)),
    ),
    "flash_attention, replicated": partial(
        check, "flash_attention", every_constant, {}, [(WHOLE,), (WHOLE,)],
        on("q k v sinks", WHOLE),
    ),
    "flash_attention, a sharded sequence": a_sharded_sequence,
    "flash_attention, heads that two do not divide": partial(
        refuse, "flash_attention", partial(attention_inputs, q=6, kv=3), on("q k v", HEADS),
        r"k: expected a number of heads that the dimensions of the mesh \(2,\) divide.* got 3",
    ),
    "packed, heads": partial(
        check, "flash_attention_varlen", partial(packed_inputs, "sinks, alibi_slopes of each"),
        on("q k v alibi_slopes", Shard(1)) | on("sinks", Shard(0)), [(Shard(1),), (Shard(0),)],
        on("q k v", Shard(1)) | on("sinks", Shard(0)),
    ),
    "packed, replicated": partial(
        check, "flash_attention_varlen", packed_inputs, {}, [(WHOLE,), (WHOLE,)],
        on("q k v", WHOLE),
    ),
    # A sum over ranks of the losses, and one of the weight's gradient.
    "linear_cross_entropy, batch": partial(
        check, "linear_cross_entropy", partial(loss_inputs, 3, 5, reduction="sum"),
        on("hidden targets", BATCH), [(SUM,)], on("hidden", BATCH) | on("weight", SUM),
        cotangents=(WHOLE,), same_bits=False,
    ),
    "linear_cross_entropy, a loss per token": partial(
        check, "linear_cross_entropy", partial(loss_inputs, 3, 5, reduction="none"),
        on("hidden targets", SEQUENCE), [(SEQUENCE,)], on("hidden", SEQUENCE) | on("weight", SUM),
    ),
    "linear_cross_entropy, replicated": partial(
        check, "linear_cross_entropy", partial(loss_inputs, 5), {}, [(WHOLE,)],
        on("hidden weight", WHOLE),
    ),
    "token_log_probs, batch": partial(
        check, "token_log_probs", log_prob_inputs, on("hidden targets", BATCH), [(BATCH,)] * 2,
        on("hidden", BATCH) | on("weight", SUM),
    ),
    "rope_append_kv, heads": partial(
        append, "", on("q k v k_cache v_cache", HEADS), [(HEADS,)] * 2,
    ),
    "rope_append_kv, heads and scales per head": partial(
        append, "per head",
        on("q k v k_cache v_cache", HEADS) | on("k_scale v_scale", Shard(0)), [(HEADS,)] * 2,
    ),
    "rope_append_kv, heads and scales per token": partial(
        append, "per token", on("q k v k_cache v_cache k_scale v_scale", HEADS), [(HEADS,)] * 2,
    ),
    "rope_append_kv, one key/value head": partial(
        append, "per token", on("q", HEADS), [(HEADS,), (WHOLE,)], kv=1,
    ),
    "rope_append_kv, replicated": partial(append, "", {}, [(WHOLE,)] * 2),
    "rope_append_kv, a whole cache beside shards of heads": partial(
        refuse, "rope_append_kv", append_inputs, on("q k v", HEADS),
        r"k_cache: expected k's placements \(Shard\(dim=2\),\), .* got \(Replicate\(\),\)",
    ),
    "rope_append_kv, shards of queries alone": partial(
        refuse, "rope_append_kv", append_inputs, on("q", HEADS), "q: expected k's placements",
    ),
    "rope_append_kv, shards of scales alone": partial(
        refuse, "rope_append_kv", partial(append_inputs, "per token"),
        on("k_scale v_scale", HEADS), "k_scale: expected k's placements",
    ),
    "rope_append_kv, batch": partial(
        refuse, "rope_append_kv", append_inputs, on("q k v k_cache v_cache", BATCH),
        "k: expected replicated tensors or sharded heads",
    ),
    "rope_append_kv, heads that two do not divide": partial(
        refuse, "rope_append_kv", partial(append_inputs, q=6, kv=3),
        on("q k v k_cache v_cache", HEADS), r"k: .* the mesh \(2,\) divide.* got 3",
    ),
    "decode_attention, batch": partial(
        check, "decode_attention", partial(decode_inputs, limits=True),
        on("q k_cache v_cache seq_lens key_ranges key_mask", BATCH), [(BATCH,)], {},
    ),
    "decode_attention, heads": partial(
        check, "decode_attention", partial(decode_inputs, limits=True),
        on("q k_cache v_cache", HEADS), [(HEADS,)], {},
    ),
    "decode_attention, batch, slopes of each": partial(
        check, "decode_attention", partial(decode_inputs, "sinks, alibi_slopes of each"),
        on("q k_cache v_cache seq_lens alibi_slopes", BATCH), [(BATCH,)], {},
    ),
    "decode_attention, heads, slopes of each": partial(
        check, "decode_attention", partial(decode_inputs, "sinks, alibi_slopes of each"),
        on("q k_cache v_cache", HEADS) | on("sinks", Shard(0)) | on("alibi_slopes", Shard(1)),
        [(HEADS,)], {},
    ),
    "decode_attention, heads, slopes": partial(
        check, "decode_attention", partial(decode_inputs, "alibi_slopes"),
        on("q k_cache v_cache", HEADS) | on("alibi_slopes", Shard(0)), [(HEADS,)], {},
    ),
    "decode_attention, one key/value head": partial(
        check, "decode_attention", partial(decode_inputs, kv=1), on("q", HEADS), [(HEADS,)], {},
        same_bits=False,  # the queries of a group share a tile, and their number is another
    ),
    "decode_attention, batch, pages": partial(
        check, "decode_attention", partial(paged_inputs, per_token=True),
        on("q seq_lens block_table", BATCH), [(BATCH,)], {},
    ),
    "decode_attention, heads, scales per head": partial(
        check, "decode_attention", partial(paged_inputs, per_token=False),
        on("q k_cache v_cache", HEADS) | on("k_scale v_scale", Shard(0)), [(HEADS,)], {},
    ),
    "decode_attention, heads, scales per token": partial(
        check, "decode_attention", partial(paged_inputs, per_token=True),
        on("q k_cache v_cache k_scale v_scale", HEADS), [(HEADS,)], {},
    ),
    "decode_attention, heads that two do not divide": partial(
        refuse, "decode_attention", partial(decode_inputs, q=6, kv=3),
        on("q k_cache v_cache", HEADS), r"k: .* the mesh \(2,\) divide.* got 3",
    ),
    "prefill_attention, heads": partial(
        check, "prefill_attention", prefill_inputs,
        on("q", Shard(1)) | on("k_cache v_cache", HEADS), [(Shard(1),)], {},
    ),
    "prefill_attention, heads, slopes of each": partial(
        check, "prefill_attention", partial(prefill_inputs, "sinks, alibi_slopes of each"),
        on("q alibi_slopes", Shard(1)) | on("k_cache v_cache", HEADS) | on("sinks", Shard(0)),
        [(Shard(1),), (Shard(0),)], {},
    ),
    "prefill_attention, one key/value head": partial(
        check, "prefill_attention", partial(prefill_inputs, kv=1),
        on("q", Shard(1)), [(Shard(1),)], {},
        same_bits=False,  # the queries of a group share a tile, and their number is another
    ),
    "prefill_attention, heads that two do not divide": partial(
        refuse, "prefill_attention", partial(prefill_inputs, q=6, kv=3),
        on("q", Shard(1)), r"k: .* the mesh \(2,\) divide.* got 3",
    ),
}  # fmt: skip

ON_FOUR_RANKS = {
    "norm, batch and sequence": partial(
        check, "add_rms_norm", partial(norm_inputs, 3, 5, 16, residual=True),
        on("x residual", BATCH, SEQUENCE), [(BATCH, SEQUENCE)] * 2,
        on("x residual", BATCH, SEQUENCE) | on("weight", SUM, SUM), mesh=square,
    ),
    "attention, batch and heads": partial(
        check, "flash_attention", partial(attention_inputs, "sinks"),
        on("q k v", BATCH, HEADS) | on("sinks", WHOLE, Shard(0)),
        [(BATCH, HEADS), (BATCH, Shard(1))],
        on("q k v", BATCH, HEADS) | on("sinks", SUM, Shard(0)), mesh=square,
    ),
    "attention, heads on both": partial(
        check, "flash_attention", partial(attention_inputs, batch=1, q=4, kv=4),
        on("q k v", HEADS, HEADS), [(HEADS, HEADS), (Shard(1), Shard(1))],
        on("q k v", HEADS, HEADS), mesh=square,
    ),
    "attention, heads that both dimensions of the mesh do not divide": partial(
        refuse, "flash_attention", partial(attention_inputs, q=12, kv=6),
        on("q k v", HEADS, HEADS), r"k: .* the mesh \(2, 2\) divide", mesh=square,
    ),
    "attention, heads on one dimension of a mesh that could not divide them": partial(
        refuse, "flash_attention", partial(attention_inputs, q=12, kv=6),
        on("q k v", HEADS, WHOLE), r"k: .* the mesh \(2, 2\) divide", mesh=square,
    ),
    "attention, fewer heads than ranks": partial(
        refuse, "flash_attention", attention_inputs, on("q", HEADS) | on("k v", WHOLE),
        r"k: .* the mesh \(4,\) divide.* got 2",
    ),
    "rope_append_kv, heads on one dimension": partial(
        append, "per token",
        on("q k v k_cache v_cache k_scale v_scale", WHOLE, HEADS), [(WHOLE, HEADS)] * 2,
        q=8, kv=4, mesh=square,
    ),
    "rope_append_kv, heads on both": partial(
        append, "", on("q k v k_cache v_cache", HEADS, HEADS), [(HEADS, HEADS)] * 2,
        q=8, kv=4, mesh=square,
    ),
    # Two of four ranks have no row, one of them not even a shard of one.
    "norm, fewer rows than pairs of ranks": partial(
        check, "rms_norm", partial(norm_inputs, 5, 16), on("x", BATCH), [(BATCH,)],
        on("x", BATCH) | on("weight", SUM),
    ),
}  # fmt: skip


def test_on_two_ranks():
    ranks.run(ON_TWO_RANKS, 2)


def test_on_four_ranks():
    ranks.run(ON_FOUR_RANKS, 4)


def test_every_op_has_a_rule():
    from gqa_kernels import fused, sharding  # noqa: F401, fused defines the ops

    names = torch._C._dispatch_get_all_op_names()
    ops = {name.removeprefix("gqa_kernels::") for name in names if name.startswith("gqa_kernels::")}
    assert ops == {*sharding.RULES, "adamw_update"}  # which takes local tensors


def test_the_rules_are_registered_before_any_op_was_used():
    code = "from gqa_kernels import sharding; sharding.register()"
    fresh(code, TRITON_INTERPRET="1")
