"""`patch(model, {"linear_cross_entropy"})`: the loss of a Transformers model without its logits."""

import copy
import inspect
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

import transformers
from budget import SEED, assert_network
from tiny_transformers import SIZES, VOCABULARY, cast, double, make, matrix
from torch import nn
from torch.profiler import profile
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from gqa_kernels import patch, unpatch
from gqa_kernels.patching import DEFAULT_OPS, OPS

OP = ("linear_cross_entropy",)


@pytest.fixture
def tokens(device):
    generator = torch.Generator().manual_seed(SEED + 1)
    return torch.randint(1, VOCABULARY, (3, 20), generator=generator).to(device)


@pytest.fixture
def call(tokens):
    """Arguments with labels of which some are ignored, in two sequences that end in padding."""
    mask = torch.ones_like(tokens)
    mask[1, 15:] = mask[2, 9:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def pair(kind="Llama", device="cpu", dtype=torch.float32, **changes):
    """(a patched model, the same as it was)"""
    plain = cast(make(kind, num_hidden_layers=1, **changes), dtype).to(device)
    model = copy.deepcopy(plain)
    patch(model, OP, strict=True)
    return model, plain


def loss_of(model, call):
    return model(use_cache=False, **call).loss


def exact_loss(model, call):
    """The same by its formula; ForCausalLMLoss would round to float32."""
    call = dict(call)
    labels, ignored = call.pop("labels"), call.pop("ignore_index", -100)
    count, shifted = call.pop("num_items_in_batch", None), call.pop("shift_labels", None)
    if shifted is None:
        shifted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], ignored)], 1)
    logits = model(use_cache=False, **call).logits
    real = shifted != ignored
    losses = F.cross_entropy(logits[real], shifted[real], reduction="sum")
    return losses / (real.sum() if count is None else count)


def gradients(model, loss):
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))


def assert_as_before(model, plain, call, loss_of=loss_of):
    """Loss and gradients are within the budget of the model as it was."""
    loss = loss_of(model, call)

    def exact(wide):
        return exact_loss(wide, call)

    # Apart: of one number many draws are made.
    with torch.no_grad():
        assert_network(loss, plain, lambda m: loss_of(m, call), lambda m: double(m)(exact))
    assert_network(
        gradients(model, loss),
        plain,
        lambda m: gradients(m, loss_of(m, call)),
        lambda m: double(m)(lambda wide: gradients(wide, exact(wide))),
    )


KINDS = {
    "llama": ("Llama", {}),
    "gemma2": ("Gemma2", {"final_logit_softcapping": 2.0}),
    "qwen2": ("Qwen2", {}),
    "mistral": ("Mistral", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "granite": ("Granite", {"logits_scaling": 8.0}),
}


@matrix(1, kind=tuple(KINDS), dtype=(torch.float32, torch.bfloat16))
def test_loss_and_gradients(kind, dtype, device, call):
    kind, changes = KINDS[kind]
    assert_as_before(*pair(kind, device, dtype, **changes), call)


def test_arguments_of_the_loss(device, call):
    """Those that Trainer, its context parallelism and padding-free collators pass."""
    labels = call["labels"]
    elsewhere = {"shift_labels": labels.flip(1)}
    packed = {name: call[name][:1] for name in ("input_ids", "labels")}
    calls = [
        call | {"num_items_in_batch": 7},
        call | {"num_items_in_batch": torch.tensor(9)},
        call | elsewhere,
        call | elsewhere | {"num_items_in_batch": 5},
        call | {"labels": labels.masked_fill(labels == -100, 5), "ignore_index": 5},
        packed | {"position_ids": torch.arange(20, device=device)[None] % 8},
    ]

    def losses(model, function):
        return torch.stack([function(model, arguments) for arguments in calls])

    model, plain = pair(device=device)
    with torch.no_grad():
        assert_network(
            losses(model, loss_of),
            plain,
            lambda m: losses(m, loss_of),
            lambda m: double(m)(lambda wide: losses(wide, exact_loss)),
        )
    call["num_items_in_batch"] = torch.tensor([7], device=device)
    assert model(**call).loss.shape == plain(**call).loss.shape == (1,)
    assert model(**call).loss == model(**calls[0]).loss


def test_all_labels_ignored(device, call):
    model, plain = pair(device=device)
    call["labels"] = torch.full_like(call["labels"], -100)
    assert model(**call).loss.isnan() and plain(**call).loss.isnan()
    loss = loss_of(model, call | {"num_items_in_batch": 3})
    assert not loss and not any(x.any() for x in gradients(model, loss).values())


def test_logits_to_keep(device, call):
    model, plain = pair(device=device)
    kept = torch.tensor([2, 7, 11], device=device)
    shifted = call["labels"][:, kept].contiguous()
    for which in (3, kept):
        torch.testing.assert_close(
            model(**call, shift_labels=shifted, logits_to_keep=which).loss,
            plain(**call, shift_labels=shifted, logits_to_keep=which).loss,
        )
    with pytest.raises(ValueError, match="labels: expected one for each"):
        model(**call, logits_to_keep=3)


def test_logits_only_without_labels(device, tokens, call):
    model, plain = pair(device=device)
    inputs = {"input_ids": tokens}
    output, expected = model(**call), plain(**call)
    assert type(output) is type(expected) and output.logits is None
    assert list(output) == [name for name in expected if name != "logits"]
    for options in ({}, {"logits_to_keep": 2}, {"shift_labels": call["labels"]}):
        assert torch.equal(model(**inputs, **options).logits, plain(**inputs, **options).logits)
    by_position = model(tokens, None, None, None, None, call["labels"], return_dict=False)
    assert isinstance(by_position, tuple) and len(by_position) == 2
    generated = [m.generate(tokens, max_new_tokens=4, do_sample=False) for m in (model, plain)]
    assert torch.equal(*generated)
    assert model._supports_logits_to_keep()
    names = [list(inspect.signature(m.forward).parameters) for m in (model, plain)]
    assert names[0] == names[1]
    with pytest.raises(TypeError, match="input_ids: expected one"):
        model(tokens, input_ids=tokens)


def test_autocast(device, call):
    """Hidden states and the head's weight are cast as a projection's are, whatever they are."""
    model, plain = pair(device=device)

    def under_autocast(m, call):
        with torch.autocast(device.type, torch.bfloat16):
            return loss_of(m, call)

    assert_as_before(model, plain, call, under_autocast)
    model.lm_head.bfloat16()
    with torch.autocast(device.type, torch.bfloat16):
        model(**call).loss.backward()
    assert model.lm_head.weight.grad.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="weight: expected hidden's dtype"):
        model(**call)


def largest_allocation(function, device):
    """Of all memory that is asked for, within ops too, in bytes."""
    with profile(profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("training", (True, False))
def test_nothing_of_the_size_of_the_logits(training, device):
    model, plain = pair(device=device, vocab_size=600)
    tokens = torch.randint(600, (8, 20), device=device)
    most = tokens.numel() * 600 * 4

    def run(model):
        with torch.set_grad_enabled(training):
            loss = model.train(training)(tokens, labels=tokens, use_cache=False).loss
        if training:
            loss.backward()

    assert largest_allocation(lambda: run(plain), device) >= most
    assert largest_allocation(lambda: run(model), device) < most / 2


@pytest.mark.parametrize("reentrant", (True, False))
def test_gradient_checkpointing(reentrant, device, call):
    model, plain = pair(device=device)
    model.train()
    expected = gradients(model, loss_of(model, call))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss = model(use_cache=False, **call).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=0)
    again = checkpoint(lambda: plain.eval() and model(**call).loss, use_reentrant=False)
    assert torch.equal(again, loss)


def test_compiled(device, call):
    model, _ = pair(device=device)
    call["num_items_in_batch"] = torch.tensor(9, device=device)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    output = compiled(use_cache=False, **call)
    assert output.logits is None
    expected = loss_of(model, call)
    torch.testing.assert_close(output.loss, expected, rtol=0, atol=0)
    actual, expected = gradients(model, output.loss), gradients(model, expected)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_is_asked_for_by_name_and_undone(device, call):
    assert "linear_cross_entropy" in OPS and "linear_cross_entropy" not in DEFAULT_OPS
    plain = make(num_hidden_layers=1).to(device)
    model = copy.deepcopy(plain)
    patch(model)
    assert "forward" not in vars(model) and model(**call).logits is not None
    unpatch(model)
    before = dict(vars(model))
    report = patch(model, OP)
    assert report.replaced == [("", "linear_cross_entropy")] and not report.not_replaced
    assert "linear_cross_entropy: the model itself" in str(report)
    unpatch(model)
    assert vars(model) == before and torch.equal(model(**call).logits, plain(**call).logits)
    patch(model)
    with patch(model, OP):  # beside the others
        assert model(**call).logits is None
        assert patch(model, OP).replaced == report.replaced
    assert model(**call).logits is not None
    assert plain(**call).logits is not None


def test_copies_and_pickles_are_patched(device, call):
    model, _ = pair("Gemma2", device)
    expected = model(**call).loss
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(twin(**call).loss, expected)
            twin.lm_head.weight.mul_(2.0)  # its own
            assert not torch.equal(twin(**call).loss, expected)
        assert twin(**call).logits is None
        unpatch(twin)
        assert twin(**call).logits is not None
    assert torch.equal(model(**call).loss, expected)


# --- Refused --------------------------------------------------------------------------------------


class LoRA(nn.Linear):
    """In place of an adapter's class."""


def _bias(model):
    model.lm_head = nn.Linear(SIZES["hidden_size"], VOCABULARY)


def _adapter(model):
    model.lm_head = LoRA(SIZES["hidden_size"], VOCABULARY, bias=False)


def _hook(model):
    model.lm_head.register_forward_pre_hook(lambda *_: None)


def _quantised(model):
    weight = model.lm_head.weight.detach()
    model.lm_head.weight = nn.Parameter(TwoTensor(weight, weight))


def _own_forward(model):
    model.lm_head.forward = model.lm_head.forward


def _loss_type(model):
    model.loss_type = "ForMaskedLM"


def _weighted(model):
    model.loss_function = partial(F.cross_entropy, weight=torch.ones(VOCABULARY))


CHANGES = {
    _bias: "lm_head: expected a torch.nn.Linear without a bias; got one with a bias",
    _adapter: "lm_head: expected a torch.nn.Linear, not another class; got .*LoRA",
    _hook: "lm_head: expected a torch.nn.Linear without hooks, .*; got one with hooks",
    _own_forward: "lm_head: expected a torch.nn.Linear without hooks, .*; got one with hooks",
    _quantised: "lm_head: expected a torch.nn.Linear with a plain weight; got a TwoTensor",
    _loss_type: "loss_function: expected Transformers' ForCausalLMLoss; got ForMaskedLMLoss",
    _weighted: r"loss_function: expected Transformers' ForCausalLMLoss; got functools.partial",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_refused(change, device, call):
    """When patching, and in a call with labels if it came about later."""
    model = make()
    change(model)
    before = dict(vars(model))
    with pytest.raises(ValueError, match=CHANGES[change]):
        patch(model, OP)
    assert vars(model) == before

    model = make()
    patch(model, OP)
    change(model)
    model.to(device)
    with pytest.raises(NotImplementedError, match=CHANGES[change]):
        model(**call)
    call.pop("labels")
    assert model(**call).logits is not None


class Squared(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        output = super().forward(input_ids, labels=labels, **kwargs)
        output.logits = output.logits.square()
        return output


class Penalised(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        output = super().forward(input_ids, labels=labels, **kwargs)
        if labels is not None:
            output.loss = output.loss + 1e-3 * output.logits.logsumexp(-1).square().mean()
        return output


def test_other_maths_is_refused():
    config = transformers.LlamaConfig(**SIZES)
    for family, reason in ((Squared, "its logits are not what its head"), (Penalised, "its steps")):
        with pytest.raises(ValueError, match=reason):
            patch(family(config), OP)
    with pytest.raises(ValueError, match=r"power of two; got a factor 0\.1666"):
        patch(make("Granite", logits_scaling=6.0), OP)
    for other in (transformers.LlamaModel, transformers.LlamaForSequenceClassification):
        with pytest.raises(ValueError, match="has no module of its kind"):
            patch(other(config), OP)


def test_an_auxiliary_loss_is_refused(device, call):
    model, plain = pair("Mixtral", device, num_local_experts=2)
    output, expected = model(**call), plain(**call)
    assert type(output) is type(expected) and output.aux_loss is None
    torch.testing.assert_close(output.loss, expected.loss)
    with pytest.raises(NotImplementedError, match="output_router_logits: expected False"):
        model(**call, output_router_logits=True)
    model.config.output_router_logits = True
    with pytest.raises(NotImplementedError, match="output_router_logits: expected False"):
        model(**call)
    model(**call, output_router_logits=False)
