"""Failures that users of other kernels reported, each with a test that it does not happen here.

Those that have a test where their subject is tested:

- Logits are silently wrong under padding, packing or a static cache, because an attention function
  was registered without its masks: test_transformers.py::test_training, ::test_steps
- Bounds of packed documents are ignored: test_transformers_masks.py::test_packed_rows_with_bounds
- The mask that an attention function cannot read is dropped:
  test_transformers_masks.py::test_ready_made_masks_are_refused
- A patch changes the class, its module or torch.nn for the process:
  test_patching.py::test_another_model_of_the_class_and_the_class_itself_stay_as_they_are
- A patch cannot be undone: test_patching.py::test_unpatch_gives_back_every_attribute
- A patch of a model that exists leaves its norms: test_patching.py::test_logits_and_gradients
- A patch that found only some modules says nothing:
  test_patching.py::test_strict_leaves_the_model_as_it_was, ::test_what_is_not_there_is_reported
- A patched MLP reads the weight that an adapter or shards stand for:
  test_patching.py::test_adapters, ::test_fully_sharded
- A backward pass overwrites its gradient or what was saved, and a second one returns garbage:
  test_autograd.py::test_repeated_backward_gives_the_same_bits_and_spoils_nothing
- Two consumers of one output share such a gradient: test_autograd.py::test_two_consumers_add_up
- Recomputed activations differ: test_autograd.py::test_activation_checkpointing_gives_the_same_bits
- A norm gives its weight no gradient: test_ops.py::test_within_budget
- Rope ignores the positions it is given: test_rope.py::test_positions
- Operators break a compiler's graph, or compile to other values:
  test_library.py::test_compiled_gives_the_same_bits, test_transformers.py::test_training_compiled
- A launch is compiled anew for every number of tokens:
  test_compile.py::test_one_binary_serves_every_number_of_tokens
- A sequence's bits depend on its batch: test_norm.py::test_a_row_does_not_depend_on_the_batch,
  test_attention.py::test_a_sequence_does_not_depend_on_the_batch,
  test_attention_backward.py::test_the_same_bits_in_every_run_and_any_batch,
  test_decode.py::test_a_sequence_does_not_depend_on_the_batch
- Offsets overflow 32 bits: test_attention.py::test_offsets_beyond_32_bits,
  test_attention_backward.py::test_offsets_beyond_32_bits,
  test_decode.py::test_offsets_beyond_32_bits
- Sharded tensors are gathered, or refused: test_sharding.py::test_on_two_ranks
- The gradient of a loss per token takes one upstream number for all:
  test_ops.py::test_within_budget
- A loss without logits overwrites in its backward pass what a second one needs:
  test_linear_cross_entropy.py::test_two_consumers_and_a_kept_graph
- It makes the logits after all where it is compiled:
  test_library.py::test_compiled_gives_the_same_bits
- It projects the tokens that it then ignores:
  test_linear_cross_entropy.py::test_ignored_rows_are_not_read
"""

import re
from pathlib import Path

import pytest
import torch
from combinations import long
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from gqa_kernels import (
    add_rms_norm,
    apply_rope,
    get_backend,
    linear_cross_entropy,
    rms_norm,
    swiglu,
)

pytest.importorskip("transformers")

from tiny_transformers import cached, make, on_kernels, places, rows
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from gqa_kernels.integrations import transformers as adapter

ROUTES = pytest.mark.parametrize("route", ("attention", "patch"))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


@pytest.fixture
def tokens(device):
    return rows("none")[0]["input_ids"].to(device)


def test_the_tests_named_above_are_there():
    file = None
    for name, test in re.findall(r"(\w+\.py)?::(\w+)", __doc__):
        file = name or file
        (path,) = Path(__file__).parents[1].rglob(file)
        assert f"\ndef {test}(" in path.read_text(encoding="utf-8"), (file, test)


# --- patching --------------------------------------------------------------------------------


@ROUTES
def test_a_teacher_changes_with_its_student(route, tokens, device):
    teacher, student = make().to(device), make().to(device)
    before = teacher(tokens).logits
    student = on_kernels(student, route)
    assert not torch.equal(student(tokens).logits, before)
    assert torch.equal(teacher(tokens).logits, before)
    assert torch.equal(make().to(device)(tokens).logits, before)  # one that is made afterwards


@pytest.mark.covering(1)
@pytest.mark.parametrize("reentrant", (True, False), ids=("reentrant", "not reentrant"))
@ROUTES
def test_a_checkpointed_layer_is_recomputed_by_other_code(
    route, reentrant, tokens, device, monkeypatch
):
    """As where a mode chose the kernels and has been left when the backward pass comes."""
    calls, flash_attention = [], adapter.flash_attention
    monkeypatch.setattr(
        adapter, "flash_attention", lambda *a, **k: calls.append(1) or flash_attention(*a, **k)
    )
    model = on_kernels(make().to(device).train(), route)

    def gradients():
        calls.clear()
        model.zero_grad()
        model(tokens, use_cache=False).logits.sum().backward()
        return [p.grad for p in model.parameters()], len(calls)

    expected, count = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    result, count_again = gradients()
    assert (count, count_again) == (2, 4)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


# --- kernels ---------------------------------------------------------------------------------


def rope_table(length, device, dim=16):
    angle = torch.arange(1.0, length + 1, device=device)[:, None] / torch.arange(
        1, dim // 2 + 1
    ).to(device)
    return angle.cos(), angle.sin()


def test_rope_leaves_a_single_head_as_it_is(draw, device):
    """Transposed and contiguous are the same memory then."""
    q, k = draw(2, 1, 5, 16).transpose(1, 2), draw(2, 1, 5, 16).transpose(1, 2)
    before, table = (q.clone(), k.clone()), rope_table(5, device)
    rotated = apply_rope(q, k, *table)
    eager = get_backend("eager").apply_rope(q, k, *table)
    for x, y, z, old in zip(rotated, eager, (q, k), before, strict=True):
        torch.testing.assert_close(x, y)
        assert not torch.equal(x, old) and torch.equal(z, old)


def test_rope_writes_into_its_callers_memory(draw, device):
    """Into queries, keys, or the gradient that it is handed, all of them views of one buffer."""
    table = rope_table(5, device)
    packed, cotangents = draw(2, 5, 8, 16).requires_grad_(), draw(2, 5, 8, 16)
    kept = packed.detach().clone(), cotangents.clone()
    q, k, _ = packed.split((4, 2, 2), dim=2)
    dq, dk, _ = cotangents.split((4, 2, 2), dim=2)
    outputs = apply_rope(q, k, *table)
    first = torch.autograd.grad(outputs, packed, (dq, dk), retain_graph=True)
    second = torch.autograd.grad(outputs, packed, (dq, dk))
    assert torch.equal(*first, *second)
    assert torch.equal(packed, kept[0]) and torch.equal(cotangents, kept[1])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_a_norm_rounds_unlike_llamas(dtype, draw, device):
    theirs = LlamaRMSNorm(96, eps=1e-5).to(device, dtype)
    torch.nn.init.uniform_(theirs.weight, 0.5, 1.5)
    x = draw(64, 96).to(dtype)
    expected = theirs(x)
    assert torch.equal(rms_norm(x, theirs.weight, 1e-5), expected)
    assert not torch.equal(torch.nn.functional.rms_norm(x, (96,), theirs.weight, 1e-5), expected)


def test_a_row_depends_on_the_rows_beside_it(draw, device):
    """For a row of one call and for the same among many, both passes."""
    table, weight = rope_table(3, device), draw(64)

    def rope(x):
        return torch.cat(apply_rope(x.view(-1, 3, 4, 16), x.view(-1, 3, 4, 16), *table), -1)

    for op, width in (
        (lambda x: swiglu(x, x.sin()), 64),
        (lambda x: torch.cat(add_rms_norm(x, x.cos(), weight), -1), 64),
        (rope, 3 * 64),
    ):
        many = draw(37, width).requires_grad_()
        alone = many.detach()[5:6].clone().requires_grad_()
        outputs = op(many), op(alone)
        assert torch.equal(outputs[0][5:6], outputs[1])
        for y in outputs:
            (
                y * torch.linspace(-1, 1, y[0].numel(), device=device).view(y[0].shape)
            ).sum().backward()
        assert torch.equal(many.grad[5:6], alone.grad)


# --- compilers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "train", "masked"), (("attention", False, True), long("patch", True, False))
)
def test_every_length_is_compiled_anew(route, train, masked, device):
    """One graph for the first length, one for all others."""
    model = on_kernels(make(num_hidden_layers=1).to(device), route)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in (9, 17, 12):
        tokens = torch.arange(1, 1 + 2 * length, device=device).view(2, length)
        mask = (tokens != 1).long() if masked else None
        with torch.set_grad_enabled(train):
            logits = compiled(tokens, attention_mask=mask, use_cache=False).logits
            expected = model(tokens, attention_mask=mask, use_cache=False).logits
        assert torch.equal(logits, expected)
        assert counter.frame_count <= 2


@pytest.mark.parametrize("route", ("attention", long("patch")))
def test_compiled_code_computes_in_float64(route, tokens, device):
    """Where an eps or a scale is a Python number that a compiler takes for a tensor."""
    seen = set()

    def watch(graph, _):
        values = [node.meta.get("val") for node in graph.graph.nodes]
        flat = torch.utils._pytree.tree_leaves(values)
        # Numbers of Transformers' own come as tensors without dimensions.
        seen.update(x.dtype for x in flat if torch.is_tensor(x) and x.dim() > 0)
        return make_boxed_func(graph.forward)

    model = on_kernels(make(num_hidden_layers=1).to(device), route)
    backend = aot_autograd(fw_compiler=watch, bw_compiler=watch)
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    logits, expected = (m(tokens, use_cache=False).logits for m in (compiled, model))
    assert torch.equal(logits, expected)
    gradients = [torch.autograd.grad(x.sum(), model.parameters()) for x in (logits, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert torch.float32 in seen and torch.float64 not in seen


@ROUTES
def test_a_compiled_step_repeats_the_keys_for_every_query_head(route, tokens, device):
    """The cache is read as it is: two heads, of which each serves two queries."""
    model = on_kernels(make().to(device), route)
    past, shapes, ops = cached(model, "static"), set(), set()

    def watch(graph, _):
        for node in graph.graph.nodes:
            ops.add(str(node.target))
            value = node.meta.get("val")
            if torch.is_tensor(value) and 32 in value.shape:  # as long as the cache
                shapes.add(tuple(value.shape))
        return make_boxed_func(graph.forward)

    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=watch))
    with torch.no_grad():
        model(tokens, **past)
        compiled(tokens[:, :1], **past, **places(tokens.shape[1], 1, device))
    assert "gqa_kernels.decode_attention.default" in ops
    keys = {shape for shape in shapes if len(shape) == 4 and shape[-1] == 8}
    assert keys == {(2, 2, 32, 8), (2, 32, 2, 8)}


# --- losses ----------------------------------------------------------------------------------


def test_the_gradient_of_the_vocabulary_is_rounded_once(draw, device):
    """Not after every chunk, which loses most of what many tokens add up to."""
    hidden, weight = draw(640, 16, dtype=torch.bfloat16), 0.3 * draw(24, 16, dtype=torch.bfloat16)
    targets = torch.arange(640, device=device) % 24
    leaf = weight.clone().requires_grad_()
    linear_cross_entropy(hidden, leaf, targets, reduction="sum").backward()
    truth = weight.double().requires_grad_()
    torch.nn.functional.cross_entropy(
        hidden.double() @ truth.T, targets, reduction="sum"
    ).backward()
    chunks = torch.zeros_like(weight)
    for part, of in zip(hidden.split(32), targets.split(32), strict=True):
        alone = weight.clone().requires_grad_()
        linear_cross_entropy(part, alone, of, reduction="sum").backward()
        chunks += alone.grad
    ours, theirs = ((x.double() - truth.grad).square().mean() for x in (leaf.grad, chunks))
    assert 2.0 * ours < theirs


def test_small_probabilities_have_gradients(device):
    """None is left out for being small: a token of a rare id would never be learnt."""
    hidden = torch.ones(8, 16, device=device)
    weight = torch.zeros(24, 16, device=device)
    weight[0] = 0.75  # exp 12 times as likely as any other
    leaf = weight.clone().requires_grad_()
    targets = torch.zeros(8, dtype=torch.int64, device=device)
    linear_cross_entropy(hidden, leaf, targets, reduction="sum").backward()
    probability = torch.softmax(weight.double().sum(-1), 0)[1:, None]
    assert probability.max() < 2**-12
    torch.testing.assert_close(leaf.grad[1:].double(), (8.0 * probability).expand(-1, 16))


def test_a_scaled_loss_keeps_small_gradients_in_float16(draw, device):
    """Of a mean over many tokens: divided by their number before the loss is scaled, they would
    be 0 in float16."""
    hidden, weight = draw(8, 16, dtype=torch.float16), draw(24, 16, dtype=torch.float16)
    leaf = hidden.clone().requires_grad_()
    targets = torch.arange(8, device=device)
    loss = linear_cross_entropy(leaf, weight, targets, num_predictions=2.0**28)
    (loss * 2.0**28).backward()
    alone = hidden.clone().requires_grad_()
    linear_cross_entropy(alone, weight, targets, reduction="sum").backward()
    assert torch.equal(leaf.grad, alone.grad)
