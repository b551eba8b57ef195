"""The kernel of dk and dv whose warps Triton specialises: when it runs, what it computes, in the
interpreter, and what it compiles to."""

import itertools
import json
from importlib.metadata import version

import pytest
import torch
from budget import assert_call
from hopper_forward import SHARED_BYTES
from processes import SUPPORT, compiling
from test_compile import BENCH, count

from gqa_kernels import reference
from gqa_kernels.ops.attention import backward, dkdv_specialized, specialized
from gqa_kernels.ops.attention.call import Call, prepared
from gqa_kernels.runtime import hopper_configs, target

SM_90 = target.Target("sm_90", 132, True, 32)


@pytest.fixture
def on_sm_90(monkeypatch):
    if not target._IS_INTERPRETED:
        pytest.skip("the interpreter stands in for sm_90")
    monkeypatch.setattr(target, "current", lambda: SM_90)


def draw(shape, dtype=torch.bfloat16, mean=0.0):
    batch, seq_len_q, seq_len_kv, num_q_heads, num_kv_heads, head_dim = shape
    q = torch.randn(batch, seq_len_q, num_q_heads, head_dim)
    k = torch.randn(batch, seq_len_kv, num_kv_heads, head_dim) + mean
    v = torch.randn(batch, seq_len_kv, num_kv_heads, head_dim) + mean
    return {name: x.to(dtype) for name, x in (("q", q), ("k", k), ("v", v))}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("shape", "dtype", "mean"),
    [
        ((1, 130, 70, 2, 1, 64), torch.bfloat16, 0.0),  # queries without keys
        ((2, 65, 140, 2, 2, 128), torch.float16, 3.0),
    ],
)
def test_gradients(on_sm_90, shape, dtype, mean, causal):
    torch.manual_seed(0)
    inputs = draw(shape, dtype, mean) | {"causal": causal, "softmax_scale": 0.1}
    assert_call(specialized.flash_attention, reference.flash_attention, inputs, ("q", "k", "v"))


def test_strides_and_one_gradient(on_sm_90):
    """The gradient of k alone, from rows that TMA can and cannot address."""
    torch.manual_seed(0)
    plain = draw((1, 70, 70, 2, 2, 64))
    for width in (72, 65):
        inputs = {
            name: torch.zeros(*x.shape[:3], width, dtype=x.dtype)[..., :64].copy_(x)
            for name, x in plain.items()
        }
        found = []
        for given in (plain, inputs):
            k = given["k"].detach().requires_grad_()
            specialized.flash_attention(given["q"], k, given["v"], causal=True).sum().backward()
            found.append(k.grad)
        assert torch.equal(*found) and found[0].abs().sum() > 0


@pytest.mark.parametrize("sizes", [(0, 8, 8), (1, 0, 8), (1, 8, 0)])
def test_nothing_to_compute(on_sm_90, sizes):
    """No batch entries, queries or keys: gradients are 0."""
    inputs = draw((*sizes, 2, 1, 64))
    tensors = [x.requires_grad_() for x in inputs.values()]
    out = specialized.flash_attention(*tensors, causal=True)
    gradients = torch.autograd.grad(out.sum(), tensors)
    assert out.shape == inputs["q"].shape and not out.any()
    for gradient, x in zip(gradients, tensors, strict=True):
        assert gradient.shape == x.shape and not gradient.any()


def test_it_runs_only_where_it_is_asked_for(on_sm_90, monkeypatch):
    ran = []
    for name, module in (("specialised", dkdv_specialized), ("portable", backward)):
        monkeypatch.setattr(
            module,
            "key_value_gradients",
            lambda call, *_, name=name: ran.append(name) or (call.k, call.v),
        )
    monkeypatch.setattr(backward, "_prepare", lambda call, dout, dlse, out, lse, residue: lse)
    q = torch.zeros(1, 8, 2, 64, dtype=torch.bfloat16)
    call = prepared(Call(q, q, q, *[None] * 8, 0, None))

    def run(call, **options):
        ran.clear()
        backward.launch_backward(
            call, call.q, None, call.q, torch.zeros(1, 2, 8), torch.zeros_like(q, dtype=torch.int8),
            need_dq=False, need_dkdv=True, need_dsinks=False, **options,
        )  # fmt: skip
        return ran

    assert not any(row.measured for row in hopper_configs.SPECIALIZED_DKDV)
    assert run(call) == ["portable"]
    assert run(call, specialize=True) == ["specialised"]
    for change in ({"softcap": 2.0}, {"window_left": 3}, {"window_right": 1}):
        assert run(call._replace(**change), specialize=True) == ["portable"]
    measured = tuple(row._replace(measured=True) for row in hopper_configs.SPECIALIZED_DKDV)
    monkeypatch.setattr(dkdv_specialized, "SPECIALIZED_DKDV", measured)
    assert run(call) == ["specialised"]
    monkeypatch.setattr(target, "current", lambda: SM_90._replace(arch="sm_100"))
    assert run(call, specialize=True) == ["portable"]


def test_what_it_does_not_cover_is_refused(on_sm_90):
    q = torch.zeros(1, 8, 2, 96, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match=r"head_dim 64 or 128.*bfloat16, head_dim 96"):
        specialized.flash_attention(q, q, q)


def test_the_caller_keeps_its_allocator(on_sm_90, monkeypatch):
    from triton.runtime import _allocation

    def launch(grid, **arguments):
        seen.append(_allocation._allocator.get()(256, 128, None).numel())

    seen, before = [], _allocation._allocator.get()
    monkeypatch.setattr(dkdv_specialized, "_launch", launch)
    inputs = draw((1, 70, 70, 2, 2, 64))
    call = prepared(Call(*inputs.values(), *[None] * 8, 0, None))
    statistics = torch.zeros(1, 2, 70)
    row = hopper_configs.SPECIALIZED_DKDV[0]
    dkdv_specialized.key_value_gradients(call, call.q, statistics, statistics, row)
    assert seen == [256] and _allocation._allocator.get() is before


def complaints(entry):
    """What is wrong with one binary: Triton ignores the request without a word in other forms."""
    row, loops = entry["row"], [loop["mix"] for loop in entry["loops"]]
    products = (2 * row["head_dim"] + 2 * row["block_m"]) // 16
    tight = row["head_dim"] == 128 and entry["causal"]
    in_loop = 1 if tight and version("triton").startswith(("3.6.", "3.8.")) else 0
    most_local = 64 if tight else 0  # the scalars of a program, outside the loops
    expected = {
        "specialised": (entry["specialised"], True),
        "threads": (entry["threads"], 384),
        "registers fit": (entry["threads"] * entry["max_registers"] <= 65536, True),
        "shared memory fits": (entry["shared"] <= SHARED_BYTES, True),
        "serialised products": (entry["serialized"], []),
        "consumers": (len(loops), 2),
        "products": ([count(loop, "HGMMA") for loop in loops], [products] * 2),
        "exponentials": ([count(loop, "MUFU.EX2") for loop in loops], [row["block_m"] // 2] * 2),
        "local memory in loops": ([count(loop, "LDL", "STL") for loop in loops], [in_loop] * 2),
        "much local memory": (entry["local"] > most_local, False),
        "copies in": (count(entry["mix"], "UTMALDG") > 0, True),
    }
    where = f"head_dim {row['head_dim']}, causal {entry['causal']}"
    return [
        f"{where}: {what}: expected {wanted}, got {got}"
        for what, (got, wanted) in expected.items()
        if got != wanted
    ]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--fewer",), id="fewer"),
        pytest.param((), id="all", marks=pytest.mark.machine_code),
    ],
)
def test_binaries(options):
    done = compiling(str(SUPPORT / "specialized_binaries.py"), *options, folder=BENCH)
    assert done.returncode == 0, done.stderr[-4000:]
    entries = json.loads(done.stdout)
    assert len(entries) == (1 if options else 4)
    assert not list(itertools.chain.from_iterable(map(complaints, entries)))
