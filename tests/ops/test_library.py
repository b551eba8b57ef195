"""The ops as compilers, dispatch modes and transforms see them."""

import functools
import shutil
import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from gqa_kernels.ops import norm
from gqa_kernels.runtime.library import Op
from gqa_kernels.spec import IN_PLACE_OPS, OPS, Case

LIBRARY = torch.ops.gqa_kernels

# Arguments of the schemas that the table leaves to their defaults.
DEFAULTS = {"eps": 1e-5, "softmax_scale": None, "window_right": 0, "ignore_index": -100}
DEFAULTS |= {"need_mean": False, "need_dhidden": False, "need_dweight": False}
DEFAULTS |= dict.fromkeys(
    (
        "cu_seqlens_q",
        "cu_seqlens_kv",
        "sinks",
        "alibi_slopes",
        "block_table",
        "k_scale",
        "v_scale",
        "key_ranges",
        "key_mask",
        "window_left",
        "softcap",
    )
)
# A function whose op has another name: packed sequences are attention with bounds.
OP_NAMES = {
    "flash_attention_varlen": "flash_attention",
    "flash_attention_varlen_backward": "flash_attention_backward",
}

SPECS = {spec.name: spec for spec in (*OPS, *IN_PLACE_OPS)}
IN_PLACE = {spec.name for spec in IN_PLACE_OPS}
EVERY_OP = pytest.mark.parametrize("name", SPECS)
DIFFERENTIABLE = pytest.mark.parametrize("name", [n for n in SPECS if SPECS[n].wrt])
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


@pytest.fixture
def make(device, generator):
    """Small inputs by name, the differentiable ones as leaves where asked for."""

    def make(name, dtype=torch.float32, length=None, grad=False):
        spec = SPECS[name]
        inputs = spec.make_inputs(spec.tiny_case(length), dtype, device, generator)
        for wrt in spec.wrt if grad else ():
            inputs[wrt].requires_grad_()
        return inputs

    return make


def strided(x):
    """The same values and requirement of a gradient, every second row of another tensor."""
    if not torch.is_tensor(x) or x.dim() == 0:
        return x
    view = x.detach().repeat_interleave(2, dim=0)[::2]
    return view.requires_grad_(x.requires_grad)


def op_name(name):
    return OP_NAMES.get(name, name)


def overload(name):
    return getattr(LIBRARY, op_name(name)).default


def arguments(name, inputs):
    """The op's positional arguments."""
    given = DEFAULTS | inputs
    given |= {"need_residue": "q" in inputs and inputs["q"].dtype != torch.float32}
    if "hidden" in inputs:
        given["need_dhidden"] = inputs["hidden"].requires_grad
        given["need_dweight"] = inputs["weight"].requires_grad
    return tuple(given[x.name] for x in overload(name)._schema.arguments)


def outputs_of(name, inputs, function=None):
    outputs = (function or SPECS[name].kernel)(**inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def grads_of(name, inputs, outputs, **kwargs):
    leaves = [inputs[wrt] for wrt in SPECS[name].wrt]
    cotangents = [torch.full_like(output, 0.5) for output in outputs]
    return torch.autograd.grad(outputs, leaves, cotangents, **kwargs)


def assert_same_bits(first, second):
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


class Watch(TorchDispatchMode):
    """Notes the names of this package's ops."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "gqa_kernels":
            self.seen.append(op.name().removeprefix("gqa_kernels::"))
        return op(*args, **(kwargs or {}))


# --- the ops of the library ------------------------------------------------------------------


@pytest.mark.covering(2)
@DTYPES
@EVERY_OP
@pytest.mark.parametrize("layout", (lambda x: x, strided), ids=("dense", "strided"))
def test_opcheck(name, dtype, layout, make):
    """Schema, autograd registration, fake implementation and tracing agree with the op."""
    inputs = {k: layout(v) for k, v in make(name, dtype, grad=True).items()}
    torch.library.opcheck(overload(name), arguments(name, inputs))


def _norm_backward(make, dtype):
    inputs = make("add_rms_norm", dtype)
    _, h, rstd = LIBRARY.add_rms_norm(*arguments("add_rms_norm", inputs))
    return torch.ones_like(h), h.neg(), h, inputs["weight"], rstd


def _swiglu_backward(make, dtype):
    inputs = make("swiglu", dtype)
    return torch.ones_like(inputs["up"]), inputs["gate"], inputs["up"]


def _rope_backward(make, dtype):
    inputs = make("apply_rope", dtype)
    return tuple(inputs[k] for k in ("q", "k", "cos", "sin", "positions", "interleaved"))


def _attention_backward(name, make, dtype):
    inputs = make(name, dtype)
    if name == "flash_attention":
        inputs["sinks"] = torch.zeros_like(inputs["q"][0, 0, :, 0])
    q, k, v, *rest, need_residue = arguments(name, inputs)
    out, lse, residue = overload(name)(q, k, v, *rest, need_residue)
    residue = residue if need_residue else None
    return torch.ones_like(out), torch.ones_like(lse), q, k, v, out, lse, residue, *rest


def _loss_backward(make, dtype):
    inputs = make("linear_cross_entropy", dtype)
    dweight = torch.ones_like(inputs["weight"], dtype=torch.float32)
    return torch.tensor(0.5), inputs["hidden"], dweight, dtype


def _log_probs_backward(make, dtype):
    inputs = make("token_log_probs", dtype) | {"need_mean": True}
    args = arguments("token_log_probs", inputs)
    maximum, log_sum, score, mean = LIBRARY.token_log_probs(*args)
    return (*(-score,) * 3, *args[:3], maximum, log_sum, mean, *args[3:6])


BACKWARD = {
    "linear_cross_entropy_backward": (
        _loss_backward,
        (
            lambda *args: args,
            lambda dsum, dhidden, _, dtype: (dsum, dhidden, None, dtype),
            lambda dsum, _, dweight, dtype: (dsum, None, dweight, dtype),
        ),
    ),
    "token_log_probs_backward": (
        _log_probs_backward,
        (
            lambda *args: (*args, True, True),
            lambda dlog_sum, _, dmean, *rest: (dlog_sum, None, dmean, *rest, True, False),
            lambda dlog_sum, dscore, _, *rest: (None, dscore, None, *rest, False, True),
        ),
    ),
    "flash_attention_backward": (
        functools.partial(_attention_backward, "flash_attention"),
        (
            lambda *args: (*args, True, True, True),
            lambda dout, _, *rest: (dout, None, *rest, True, False, False),
            lambda *args: (*args, False, True, False),
        ),
    ),
    "flash_attention_varlen_backward": (
        functools.partial(_attention_backward, "flash_attention_varlen"),
        (
            lambda *args: (*args, True, True, False),
            lambda dout, _, *rest: (dout, None, *rest, True, False, False),
            lambda *args: (*args, False, True, False),
        ),
    ),
    "rms_norm_backward": (
        _norm_backward,
        (
            lambda dy, dh, *rest: (dy, dh, *rest, True, True),
            lambda dy, dh, *rest: (dy, None, *rest, True, False),
            lambda dy, dh, *rest: (dy, None, *rest, False, True),
        ),
    ),
    "swiglu_backward": (
        _swiglu_backward,
        (
            lambda *args: (*args, True, True),
            lambda *args: (*args, True, False),
            lambda *args: (*args, False, True),
        ),
    ),
    "apply_rope_backward": (
        _rope_backward,
        (
            lambda dq, dk, *rest: (dq, dk, *rest),
            lambda dq, dk, *rest: (dq, None, *rest),
            lambda dq, dk, *rest: (None, dk, *rest),
        ),
    ),
}


@pytest.mark.covering(2)
@DTYPES
@pytest.mark.parametrize("variant", range(3))
@pytest.mark.parametrize("name", BACKWARD)
def test_opcheck_backward(name, variant, dtype, make):
    arguments_of, variants = BACKWARD[name]
    args = variants[variant](*arguments_of(make, dtype))
    torch.library.opcheck(overload(name), args)
    torch.library.opcheck(overload(name), tuple(map(strided, args)), test_utils="test_schema")


@pytest.mark.parametrize("name", ([n for n in SPECS if n not in IN_PLACE] + list(BACKWARD)))
def test_schemas_are_functional(name):
    schema = overload(name)._schema
    assert not schema.is_mutable
    assert all(x.alias_info is None for x in (*schema.arguments, *schema.returns))


def test_the_schema_of_an_op_in_place_names_what_it_writes():
    schema = overload("rope_append_kv")._schema
    written = {x.name for x in schema.arguments if x.alias_info is not None}
    assert written == {"k_cache", "v_cache", "k_scale", "v_scale"}
    assert all(x.alias_info.is_write for x in schema.arguments if x.name in written)
    assert all(x.alias_info is None for x in schema.returns)


@EVERY_OP
def test_both_paths_give_the_same_bits(name, make):
    inputs = make(name)
    direct = outputs_of(name, inputs)
    with Watch() as watch:
        dispatched = outputs_of(name, inputs)
    assert watch.seen == [op_name(name)]
    assert_same_bits(direct, dispatched)


@DIFFERENTIABLE
def test_a_mode_sees_the_backward_op(name, make):
    inputs = make(name, grad=True)
    direct = grads_of(name, inputs, outputs_of(name, inputs))
    with Watch() as watch:
        dispatched = grads_of(name, inputs, outputs_of(name, inputs))
    op = op_name(name)
    assert watch.seen == [op, f"{op.removeprefix('add_')}_backward"]
    assert_same_bits(direct, dispatched)


@EVERY_OP
def test_eager_calls_bypass_the_dispatcher(name, make, monkeypatch):
    def refuse(*_):
        raise AssertionError("dispatched")

    for op in vars(sys.modules[SPECS[name].kernel.__module__]).values():
        if isinstance(op, Op):
            monkeypatch.setattr(op, "dispatched", refuse)
    inputs = make(name, grad=True)
    outputs = outputs_of(name, inputs)
    if SPECS[name].wrt:
        grads_of(name, inputs, outputs)


@EVERY_OP
def test_fake_tensors(name, make):
    inputs = make(name)
    outputs = outputs_of(name, inputs)
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(v) if torch.is_tensor(v) else v for k, v in inputs.items()}
        fakes = outputs_of(name, fake)
    for real, other in zip(outputs, fakes, strict=True):
        assert (real.shape, real.stride(), real.dtype) == (other.shape, other.stride(), other.dtype)


CACHES = {
    "plain": {},
    "int8, per head": {"cache_dtype": torch.int8, "scale_per_head": True},
    "int8, per token": {"cache_dtype": torch.int8},
    "float8, per token": {"cache_dtype": torch.float8_e4m3fn},
}


@pytest.fixture(params=CACHES)
def append(request, device, generator):
    """Arguments of rope_append_kv, with caches that are one layer of many."""
    spec = SPECS["rope_append_kv"]
    case = Case(spec.tiny | CACHES[request.param], "small")
    inputs = spec.make_inputs(case, torch.bfloat16, device, generator)
    for name in ("k_cache", "v_cache"):
        layers = torch.zeros(3, *inputs[name].shape, device=device).to(inputs[name].dtype)
        inputs[name] = layers[1]
    return inputs


def test_opcheck_of_every_cache(append):
    inputs = {"k_scale": None, "v_scale": None} | append
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if inputs["k_cache"].dtype != torch.float8_e4m3fn:  # whose values that check cannot compare
        checks.append("test_schema")
    args = arguments("rope_append_kv", inputs)
    torch.library.opcheck(overload("rope_append_kv"), args, test_utils=checks)


# --- compilers -------------------------------------------------------------------------------


@pytest.mark.covering(1)
@pytest.mark.parametrize("dynamic", (False, True))
def test_a_compiled_step_writes_the_cache(append, dynamic):
    """And reads after it what it wrote, outputs and caches being what they are without a compiler,
    in every call, whatever else lies in the memory of a cache."""
    written = [name for name in ("k_cache", "v_cache", "k_scale", "v_scale") if name in append]

    def step(inputs):
        before = [inputs[name].clone() for name in written]
        q, k = SPECS["rope_append_kv"].kernel(**inputs)
        return q * 2, k * 2, *before, *(inputs[name] + 0 for name in written[-2:])

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    eager = dict(append)
    for name in written:  # the same views of other memory
        base = append[name]._base if append[name]._is_view() else append[name]
        copy = base.clone()
        eager[name] = copy[1] if append[name]._is_view() else copy
    for turn in range(2):
        for inputs in (append, eager):
            inputs["v"] = inputs["v"] + turn
            inputs["slots"] = (inputs["slots"] + turn) % 12
        for a, b in zip(compiled(append), step(eager), strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for name in written:
            a, b = (x[name]._base if x[name]._is_view() else x[name] for x in (append, eager))
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


@pytest.mark.covering(1)
@DTYPES
@EVERY_OP
def test_compiled_gives_the_same_bits(name, dtype, make):
    inputs = make(name, dtype, grad=True)
    compiled = torch.compile(SPECS[name].kernel, fullgraph=True, backend="aot_eager", dynamic=True)
    eager, traced = outputs_of(name, inputs), outputs_of(name, inputs, compiled)
    assert_same_bits(eager, traced)
    if SPECS[name].wrt:
        assert_same_bits(grads_of(name, inputs, eager), grads_of(name, inputs, traced))


@EVERY_OP
def test_one_compilation_serves_all_lengths(name, make):
    """The second length makes its dimension dynamic; from then on nothing is compiled."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(SPECS[name].kernel, fullgraph=True, backend=counter)
    for length in (3, 5):
        outputs_of(name, make(name, length=length, grad=True), compiled)
    assert counter.frame_count == 2
    for length in (4, 7, 2):
        inputs = make(name, length=length, grad=True)
        outputs = outputs_of(name, inputs, compiled)
        assert_same_bits(outputs, outputs_of(name, inputs))
        if SPECS[name].wrt:
            grads_of(name, inputs, outputs)
    assert counter.frame_count == 2


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(24))
        self.eps = 1e-6

    def forward(self, x, residual):
        y, h = SPECS["add_rms_norm"].kernel(x, residual, self.weight, self.eps)
        return SPECS["swiglu"].kernel(y, h * 2)


@pytest.mark.skipif(
    not torch.cuda.is_available() and not (shutil.which("g++") or shutil.which("clang++")),
    reason="inductor needs a C++ compiler",
)
def test_inductor(make):
    """The default backend, which fuses what stands around the ops."""
    inputs = make("rms_norm", grad=True)

    def function(x, weight):
        return norm.rms_norm(x, weight) * 2

    eager = function(**inputs)
    compiled = torch.compile(function, fullgraph=True, backend="inductor")(**inputs)
    assert_same_bits([eager], [compiled])
    assert_same_bits(
        grads_of("rms_norm", inputs, [eager]), grads_of("rms_norm", inputs, [compiled])
    )


def test_export(make, device):
    block = Block().to(device)
    inputs = make("add_rms_norm")
    length = torch.export.Dim("length", min=2)
    exported = torch.export.export(
        block, (inputs["x"], inputs["residual"]), dynamic_shapes=({0: length}, {0: length})
    )
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert {"gqa_kernels.add_rms_norm.default", "gqa_kernels.swiglu.default"} <= called
    for x in (inputs["x"], inputs["x"].repeat(5, 1)):
        assert torch.equal(exported.module()(x, x), block(x, x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@EVERY_OP
def test_jit_trace(name, make):
    """The graph holds the op, with its gradient, and is right for another length."""
    inputs, other = make(name, grad=True), make(name, length=5, grad=True)
    tensors = [key for key, value in inputs.items() if torch.is_tensor(value)]

    def function(*values):
        return SPECS[name].kernel(**inputs | dict(zip(tensors, values, strict=True)))

    traced = torch.jit.trace(function, tuple(inputs[k] for k in tensors), check_trace=False)
    assert f"gqa_kernels::{op_name(name)}" in str(traced.graph)
    outputs = traced(*(other[key] for key in tensors))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    expected = outputs_of(name, other)
    assert_same_bits(outputs, expected)
    if SPECS[name].wrt:
        assert_same_bits(grads_of(name, other, outputs), grads_of(name, other, expected))


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    (
        ("rms_norm", {"weight": (23,)}, r"weight: expected shape \[24\]; got \[23\]"),
        ("rms_norm", {"x": (2, 16385), "weight": (16385,)}, "x: expected a last dimension of 1 to"),
        ("add_rms_norm", {"residual": (1, 24)}, r"residual: expected shape \[.*\]; got \[1, 24\]"),
        ("swiglu", {"up": (24,)}, r"up: expected shape \[.*\]; got \[24\]"),
        ("apply_rope", {"cos": (3, 4)}, r"sin: expected shape \[3, 4\]"),
        ("decode_attention", {"q": (2, 17, 4, 8)}, "q: expected a seq_len_q of 1 to 16; got 17"),
    ),
)
@pytest.mark.parametrize("fullgraph", (True, False))
def test_wrong_arguments_under_a_compiler(name, wrong, message, fullgraph, make, device):
    inputs = make(name) | {k: torch.zeros(v, device=device) for k, v in wrong.items()}
    compiled = torch.compile(SPECS[name].kernel, fullgraph=fullgraph, backend="aot_eager")
    with pytest.raises(Exception, match=message):
        compiled(**inputs)


def test_an_eps_that_changes(make):
    """A compiler makes a symbol of the second value."""
    inputs = make("rms_norm")
    compiled = torch.compile(SPECS["rms_norm"].kernel, fullgraph=True, backend="aot_eager")
    for eps in (1e-5, 1e-6, 0.25, 1):
        assert torch.equal(compiled(**inputs, eps=eps), norm.rms_norm(**inputs, eps=eps))


# --- what is not supported -------------------------------------------------------------------


@EVERY_OP
def test_vmap_is_refused(name, make):
    inputs = make(name)
    first = arguments(name, inputs)[0]
    batch = torch.stack([first, first])
    first_name = next(iter(inputs))
    with pytest.raises(NotImplementedError, match=f"{first_name}: expected a tensor outside"):
        torch.func.vmap(lambda x: SPECS[name].kernel(**inputs | {first_name: x}))(batch)
    with pytest.raises(
        NotImplementedError, match=rf"{op_name(name)}: expected no torch\.func\.vmap"
    ):
        torch.func.vmap(lambda x: overload(name)(x, *arguments(name, inputs)[1:]))(batch)


@DIFFERENTIABLE
def test_batched_gradients_are_refused(name, make):
    inputs = make(name, grad=True)
    output = outputs_of(name, inputs)[0]
    leaf = inputs[SPECS[name].wrt[0]]
    batch = torch.stack([output, output])
    with pytest.raises(NotImplementedError, match="grad_outputs: expected a tensor outside"):
        torch.autograd.grad(output, leaf, batch, is_grads_batched=True, retain_graph=True)
    with pytest.raises(NotImplementedError, match="grad_outputs: expected a tensor outside"):
        torch.func.vmap(lambda grad: torch.autograd.grad(output, leaf, grad))(batch)


@pytest.mark.covering(1)
@pytest.mark.parametrize("where", ("eager", "mode", "op", "compiler"))
@pytest.mark.parametrize("name", ("decode_attention", "prefill_attention"))
def test_attention_over_a_cache_has_no_gradient(name, where, make):
    inputs = make(name)
    inputs["q"].requires_grad_()
    kernel = SPECS[name].kernel
    calls = {
        "eager": kernel,
        "mode": kernel,
        "op": lambda **given: overload(name)(*arguments(name, given)),
        "compiler": torch.compile(kernel, backend="aot_eager"),
    }
    with Watch() if where == "mode" else nullcontext():
        with pytest.raises(NotImplementedError, match="q: expected inputs without a gradient"):
            calls[where](**inputs)
        with torch.no_grad():
            out = calls[where](**inputs)
            assert not (out[0] if where == "op" else out).requires_grad


@pytest.mark.parametrize("where", ("eager", "mode", "compiler"))
def test_rope_append_kv_has_no_gradient(where, make):
    inputs = make("rope_append_kv")
    inputs["k"].requires_grad_()
    before = inputs["v_cache"].clone()
    kernel = SPECS["rope_append_kv"].kernel
    kernel = torch.compile(kernel, backend="aot_eager") if where == "compiler" else kernel
    with Watch() if where == "mode" else nullcontext():
        with pytest.raises(NotImplementedError, match="q: expected inputs without a gradient"):
            kernel(**inputs)
        assert torch.equal(inputs["v_cache"], before)
        with torch.no_grad():
            assert not any(output.requires_grad for output in kernel(**inputs))


@DIFFERENTIABLE
def test_second_derivatives_are_refused(name, make):
    """Also where only the forward pass was dispatched."""
    inputs = make(name, grad=True)
    with Watch():
        outputs = outputs_of(name, inputs)
    cotangents = [torch.ones_like(output, requires_grad=True) for output in outputs]
    leaves = [inputs[wrt] for wrt in SPECS[name].wrt]
    grads = torch.autograd.grad(outputs, leaves, cotangents, create_graph=True)
    for grad in grads:
        with pytest.raises(NotImplementedError, match="first derivatives only"):
            grad.sum().backward(retain_graph=True)


# --- modes around the ops --------------------------------------------------------------------


@pytest.mark.parametrize("dispatched", (False, True))
@EVERY_OP
def test_autocast_leaves_dtypes(name, dispatched, make, device):
    inputs = make(name)
    function = partial(overload(name), *arguments(name, inputs)) if dispatched else None
    with torch.autocast(device.type, dtype=torch.bfloat16):
        outputs = function() if dispatched else outputs_of(name, inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    dtypes = {output.dtype for output in outputs if output is not None}
    assert dtypes <= {torch.float32, torch.int64}  # tokens


@DIFFERENTIABLE
def test_selective_activation_checkpointing(name, make):
    """A policy that saves these ops' outputs has them computed once."""
    inputs = make(name, grad=True)
    leaves = [inputs[wrt] for wrt in SPECS[name].wrt]
    rest = {k: v for k, v in inputs.items() if k not in SPECS[name].wrt}
    decided = []

    def policy(ctx, op, *args, **kwargs):
        if op is not overload(name):
            return CheckpointPolicy.PREFER_RECOMPUTE
        decided.append(ctx.is_recompute)
        return CheckpointPolicy.MUST_SAVE

    def function(*tensors):
        outputs = SPECS[name].kernel(**dict(zip(SPECS[name].wrt, tensors, strict=True)), **rest)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    plain = grads_of(name, inputs, function(*leaves))
    outputs = checkpoint(
        function,
        *leaves,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, policy),
    )
    assert decided == [False]
    assert_same_bits(plain, grads_of(name, inputs, outputs))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@EVERY_OP
def test_cuda_graph(name, make):
    inputs = make(name)
    outputs_of(name, inputs)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outputs_of(name, inputs)
    other = make(name)
    for key, value in other.items():
        if torch.is_tensor(value):
            inputs[key].copy_(value)
    graph.replay()
    assert_same_bits(captured, outputs_of(name, other))
