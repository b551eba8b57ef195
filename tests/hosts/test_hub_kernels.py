"""The layer that Hugging Face's `kernels` package exchanges for Transformers' norms."""

import pytest
import torch

# A module of that package: a folder named `kernels` alone is not it.
pytest.importorskip("kernels.layer", reason="Hugging Face's kernels package is not installed")

from budget import assert_network
from tiny_transformers import cast, double, make, rows
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import kernels
from gqa_kernels.integrations import hub_kernels


def on_kernels(model, mapping):
    mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
    device = next(model.parameters()).device.type
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        return kernels.kernelize(model, device=device, mode=mode)


@pytest.fixture(autouse=True)
def _named(monkeypatch):
    """As Transformers names its norms where it takes the installed release of `kernels`."""
    if not hasattr(LlamaRMSNorm, "kernel_layer_name"):
        monkeypatch.setattr(LlamaRMSNorm, "kernel_layer_name", "RMSNorm", raising=False)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_norms_are_exchanged_and_given_back(dtype, device, monkeypatch):
    model = make("Llama").to(device)
    arguments, _ = rows("none")
    ids = arguments["input_ids"].to(device)

    def run(model):
        logits = model(ids, use_cache=False).logits
        gradients = torch.autograd.grad(logits.double().square().sum(), model.model.norm.weight)
        return logits.detach(), gradients[0]

    model = cast(model, dtype)
    eager = run(model)
    calls = []
    rms_norm = hub_kernels.rms_norm
    monkeypatch.setattr(hub_kernels, "rms_norm", lambda *a: calls.append(a) or rms_norm(*a))
    ours = run(on_kernels(model, hub_kernels.mapping()))
    assert len(calls) == 5  # two in each of two layers, and the last
    again = run(on_kernels(model, {}))
    assert len(calls) == 5
    assert all(torch.equal(a, b) for a, b in zip(again, eager, strict=True))
    assert_network(ours, model, run, lambda model: double(model)(run))
