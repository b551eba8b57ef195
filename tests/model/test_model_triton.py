"""The model on the Triton kernels against the same model on the eager ops.

Where there is no GPU the kernels run in Triton's interpreter.
"""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from budget import assert_network
from combinations import long
from largest import LargestTensor
from small_llama import (
    gradients,
    lively,
    loss_alone,
    packed,
    prefill_and_decode,
    random_documents,
    random_tokens,
    right_padded,
    small_config,
    twin,
)
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from gqa_kernels import get_backend
from llama2 import Llama2
from llama2.generate import generate
from llama2.train.pretrain import TrainConfig, make_optimizer, make_worker, train_step

TRITON = get_backend("triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_triton_logits_within_budget_of_eager(dtype, device):
    eager = lively(small_config(), device).to(dtype)
    triton = twin(eager, TRITON)
    tokens = random_tokens(device, 2, 45)

    assert_network(
        prefill_and_decode(triton, tokens),
        eager,
        lambda eager: prefill_and_decode(eager, tokens),
        lambda eager: prefill_and_decode(twin(eager, dtype=torch.float64), tokens),
    )


@torch.no_grad()
def test_triton_greedy_tokens_are_eagers(device):
    eager = lively(small_config(), device)
    triton = twin(eager, TRITON)
    prompts = [random_tokens(device, length).tolist() for length in (9, 4)]
    assert generate(triton, prompts, max_new_tokens=6) == generate(eager, prompts, max_new_tokens=6)


@torch.no_grad()
def test_triton_bfloat16_greedy_tokens_are_the_likeliest_within_budget(device):
    """Logits within a budget of the exact ones pick a token within twice that of the best."""
    eager = lively(small_config(), device).bfloat16()
    triton = twin(eager, TRITON)
    prompts = [random_tokens(device, length).tolist() for length in (9, 4)]
    for prompt, new in zip(prompts, generate(triton, prompts, max_new_tokens=6), strict=True):
        tokens = torch.tensor([prompt + new[:-1]], device=device)
        exact = twin(eager, dtype=torch.float64)(tokens)[0, len(prompt) - 1 :]
        error = (eager(tokens)[0, len(prompt) - 1 :].double() - exact).abs().max()
        budget = 2 * error + torch.finfo(torch.bfloat16).eps / 2 * exact.abs().max()
        chosen = exact.gather(1, torch.tensor(new, device=device)[:, None])[:, 0]
        assert (exact.amax(1) - chosen).max() <= 2 * budget


# --- training: plain batches, packed documents, right-padded documents --------------------------

DTYPES = [torch.float32, torch.bfloat16]
FORMS = ["plain", "packed", "padded"]
RECIPE = TrainConfig(steps=3, batch_size=2, seq_len=11, peak_lr=3e-3, warmup_steps=1)


def batch_of(form: str, device) -> tuple[list[Tensor], dict[str, Tensor]]:
    """(documents, what `Llama2.loss` takes for all of them at once)."""
    if form == "plain":
        tokens = random_tokens(device, 2, 12)
        return list(tokens), {"tokens": tokens}
    documents = random_documents(device)
    if form == "packed":
        tokens, cu_seqlens = packed(documents, after=3)
        return documents, {"tokens": tokens, "cu_seqlens": cu_seqlens}
    tokens, num_valid = right_padded(documents)
    return documents, {"tokens": tokens, "num_valid": num_valid}


def loss_and_gradients(model: Llama2, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    loss = model.loss(**batch)
    return {"loss": loss.detach(), **gradients(model, loss)}


def shallow(device) -> Llama2:
    """One layer, where bits are compared and depth adds only time."""
    return lively(replace(small_config(), num_layers=1), device, TRITON)


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not ours[name].equal(theirs[name])] == []


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_triton_gradients_within_budget_of_eager(form, dtype, device):
    """Of every parameter. Truth and eager run every document alone: batched, eager could be wrong
    where triton is, since both run the model's code."""
    eager = lively(small_config(), device).to(dtype)
    documents, batch = batch_of(form, device)
    triton = twin(eager, TRITON)
    ours = gradients(triton, triton.loss(**batch))

    def alone(model: Llama2) -> dict[str, Tensor]:
        return gradients(model, loss_alone(model, documents))

    assert ours["embed_tokens.weight"].dtype == dtype
    assert all(gradient.abs().max() > 0 for gradient in alone(eager).values())
    assert_network(ours, eager, alone, lambda eager: alone(twin(eager, dtype=torch.float64)))


def test_what_pads_a_row_changes_no_bit(device):
    model = shallow(device)
    _, batch = batch_of("padded", device)
    clean = loss_and_gradients(model, batch)
    tokens, num_valid = batch["tokens"], batch["num_valid"]
    padding = torch.arange(tokens.shape[1], device=device) >= num_valid[:, None]
    garbage = torch.where(padding, random_tokens(device, *tokens.shape), tokens)
    assert not garbage.equal(tokens)
    assert_same_bits(loss_and_gradients(model, {**batch, "tokens": garbage}), clean)


def test_what_follows_the_last_document_changes_no_bit(device):
    model = shallow(device)
    _, batch = batch_of("packed", device)
    clean = loss_and_gradients(model, batch)
    garbage = batch["tokens"].clone()
    garbage[:, -3:] = (garbage[:, -3:] + 1) % 97
    assert_same_bits(loss_and_gradients(model, {**batch, "tokens": garbage}), clean)


@pytest.mark.parametrize("bf16", [False, True])
def test_triton_train_step_within_budget_of_eager(bf16, device):
    eager = lively(small_config(), device)
    tokens = random_tokens(device, 2, 12)

    def step(model: Llama2, recipe: TrainConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(gradients, weights) after one step of a copy."""
        model = copy.deepcopy(model)
        optimizer, worker = make_optimizer(model, recipe), make_worker(model, recipe)
        train_step(model, optimizer, tokens, 0, recipe, worker)
        weights = {name: weight.detach() for name, weight in model.named_parameters()}
        for name, weight in worker.named_parameters():  # as new as the model's
            assert weight.equal(weights[name].to(weight.dtype)), name
        return {name: weight.grad for name, weight in worker.named_parameters()}, weights

    recipe = replace(RECIPE, bf16=bf16, max_grad_norm=math.inf)

    def exact_step(eager: Llama2) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        exact = twin(eager, dtype=torch.float64)
        if bf16:  # at the weights as the pass rounds them
            with torch.no_grad():
                for weight in exact.parameters():
                    weight.copy_(weight.bfloat16())
        return step(exact, replace(recipe, bf16=False))

    ours = step(twin(eager, TRITON), recipe)
    for name in ours[0]:
        assert ours[0][name].dtype == (torch.bfloat16 if bf16 else torch.float32)
        assert ours[1][name].dtype == torch.float32
        assert ours[1][name].isfinite().all(), name
    for i in range(1 if bf16 else 2):
        assert_network(
            ours[i], eager, lambda m, i=i: step(m, recipe)[i], lambda m, i=i: exact_step(m)[i]
        )


def test_triton_training_lowers_the_loss(device):
    model = shallow(device)
    optimizer = make_optimizer(model, RECIPE)
    tokens = random_tokens(device, 2, 12)
    losses = [train_step(model, optimizer, tokens, step, RECIPE)[0] for step in range(3)]
    assert losses[0] - 0.1 > losses[1] > losses[2] + 0.1


def test_checkpointed_layers_give_the_same_bits(device):
    model = shallow(device)
    _, batch = batch_of("packed", device)
    expected = loss_and_gradients(model, batch)
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    assert_same_bits(loss_and_gradients(model, batch), expected)


@pytest.mark.parametrize("form", [long("plain"), "packed"])
def test_compiled_loss_gives_the_same_bits(form, device):
    """In one graph."""
    model = shallow(device)
    _, batch = batch_of(form, device)
    expected = loss_and_gradients(model, batch)
    torch._dynamo.reset()
    loss = torch.compile(model.loss, fullgraph=True, backend="aot_eager")(**batch)
    assert_same_bits({"loss": loss.detach(), **gradients(model, loss)}, expected)


@pytest.mark.parametrize("form", FORMS)
def test_training_reads_no_value_on_the_device(form, device):
    """Fake tensors have none: whoever asks for one raises."""
    _, batch = batch_of(form, device)
    with FakeTensorMode() as mode:
        with device:
            model = Llama2(small_config(), TRITON)
        batch = {name: mode.from_tensor(x) for name, x in batch.items()}
        loss = model.loss(**batch)
        assert loss.shape == () and loss.dtype == torch.float32
        for name, gradient in gradients(model, loss).items():
            assert gradient.shape == model.get_parameter(name).shape
        with pytest.raises(DataDependentOutputException):
            loss.item()


def test_a_training_step_makes_no_logits(device):
    """Nor anything else of their size."""
    config = replace(small_config(), vocab_size=600)
    tokens = random_tokens(device, 1, 67) % config.vocab_size
    sizes = {}
    for name in ("eager", "triton"):
        torch.manual_seed(0)
        model = Llama2(config, get_backend(name)).to(device)
        with LargestTensor() as largest:
            model.loss(tokens).backward()
        sizes[name] = largest.numel
    most = max(x.numel() for x in model.parameters())
    assert sizes["eager"] >= 66 * config.vocab_size > most >= sizes["triton"]


def test_the_loss_under_autocast_is_that_of_its_head(device):
    """In autocast's dtype, as the projection that it stands for."""
    model = Llama2(small_config(), get_backend("eager")).to(device)
    tokens = random_tokens(device, 1, 9)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        hidden = model.hidden_states(tokens)
        losses = model(tokens, targets=tokens)
        with torch.autocast(device.type, enabled=False):
            expected = TRITON.linear_cross_entropy(
                hidden.bfloat16(), model.lm_head.weight.bfloat16(), tokens, reduction="none"
            )
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=2**-8, atol=2**-8)
