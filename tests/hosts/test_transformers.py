"""Transformers' models on the kernels, in the ways that models are run.

By both routes: "attention" is attn_implementation="gqa_kernels", "patch" all that `patch` replaces.
"""

import itertools

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from budget import assert_network
from tiny_transformers import cached, cast, double, make, matrix, on_kernels, places, rows
from torch._dynamo.backends.registry import lookup_backend

ROUTES = ("attention", "patch")
MODELS = ("Llama", "Mistral", "Qwen3", "Gemma2")
PADDINGS = ("none", "left", "right", "packed")
CHECKPOINTING = ("none", "reentrant", "not reentrant")
CACHES = ("dynamic", "static")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def compiled(model):
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def to(device, arguments):
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in arguments.items()}


# --- one pass without a cache, and its gradients ----------------------------------------------


def check_training(route, kind, padding, checkpointing, dtype, device, how=lambda model: model):
    """Logits and gradients; of the positions that are no padding, which means nothing."""
    model = make(kind).to(device).train()
    arguments, real = rows(padding)
    arguments = to(device, arguments)
    cotangent = torch.randn(int(real.sum()), model.config.vocab_size).bfloat16().to(device)

    def run(model, how=lambda model: model):
        if checkpointing != "none":
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.zero_grad()
        logits = how(model)(**arguments, use_cache=False).logits[real]
        logits.backward(cotangent.to(logits.dtype))
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        return {"logits": logits.detach(), **gradients}

    model = cast(model, dtype)
    ours = run(on_kernels(model, route), how)
    assert_network(ours, model, run, lambda model: double(model)(run))


@matrix(
    1,
    route_and_kind=tuple(itertools.product(ROUTES, MODELS)),
    padding=PADDINGS,
    checkpointing=CHECKPOINTING,
    dtype=DTYPES,
)
def test_training(route_and_kind, padding, checkpointing, dtype, device):
    check_training(*route_and_kind, padding, checkpointing, dtype, device)


@matrix(
    1,
    {"kind": ("Qwen3", "Gemma2"), "padding": ("right", "packed")},
    route=ROUTES,
    kind=MODELS,
    padding=PADDINGS,
    checkpointing=CHECKPOINTING,
    dtype=DTYPES,
)
def test_training_compiled(route, kind, padding, checkpointing, dtype, device):
    check_training(route, kind, padding, checkpointing, dtype, device, compiled)


# --- caches ----------------------------------------------------------------------------------


def check_steps(route, kind, padding, cache, dtype, device, how=lambda model: model):
    """A prefill, one token, three tokens at once."""
    model = make(kind).to(device)
    arguments, real = rows(padding)
    arguments = to(device, arguments)
    batch = len(real)

    def run(model, how=lambda model: model):
        past, call = cached(model, cache), how(model)
        first = arguments | places(0, real.shape[1], device)
        results = [call(**first, **past).logits[real]]
        mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
        for start, count in ((0, 1), (1, 3)):
            step = {"input_ids": torch.arange(1, 1 + batch * count, device=device).view(batch, -1)}
            step |= places(real.shape[1] + start, count, device)
            if mask is not None:
                mask = torch.cat((mask, mask.new_ones(batch, count)), 1)
                positions = positions[:, -1:] + 1 + torch.arange(count, device=device)
                step |= {"attention_mask": mask, "position_ids": positions}
            results.append(call(**step, **past).logits.flatten(0, 1))
        return torch.cat(results)

    with torch.no_grad():
        model = cast(model, dtype)
        ours = run(on_kernels(model, route), how)
        assert_network(ours, model, run, lambda model: double(model)(run))


# Transformers sees packed rows where there is no cache: with one, positions only turn the keys.
@matrix(1, route=ROUTES, kind=MODELS, padding=PADDINGS, cache=CACHES, dtype=DTYPES)
def test_steps(route, kind, padding, cache, dtype, device):
    check_steps(route, kind, padding, cache, dtype, device)


@matrix(
    1,
    {"kind": ("Llama", "Mistral"), "padding": ("left", "packed")},
    route=ROUTES,
    kind=MODELS,
    padding=PADDINGS,
    cache=CACHES,
    dtype=DTYPES,
)
def test_steps_compiled(route, kind, padding, cache, dtype, device):
    check_steps(route, kind, padding, cache, dtype, device, compiled)


# --- generation ------------------------------------------------------------------------------


def prompts(padding, device):
    arguments, _ = rows(padding)
    arguments.pop("position_ids", None)
    return to(device, arguments)


GREEDY = {"max_new_tokens": 4, "do_sample": False}


@matrix(1, route=ROUTES, kind=MODELS, padding=PADDINGS[:3], cache=CACHES)
def test_greedy_tokens(route, kind, padding, cache, device):
    """Right padding too: its prompts go on behind their holes."""
    model, arguments = make(kind).to(device), prompts(padding, device)
    options = GREEDY | ({"cache_implementation": "static"} if cache == "static" else {})
    expected = model.generate(**arguments, **options, disable_compile=True)
    result = on_kernels(model, route).generate(**arguments, **options, disable_compile=True)
    assert torch.equal(result, expected)


@matrix(
    1,
    {"kind": ("Llama", "Gemma2"), "padding": ("none", "left")},
    route=ROUTES,
    kind=MODELS,
    padding=PADDINGS[:3],
)
def test_greedy_tokens_with_compiled_steps(route, kind, padding, device):
    """As generate compiles by itself on a GPU: its own masks, a static cache, fullgraph."""
    model, arguments = make(kind).to(device), prompts(padding, device)
    options = GREEDY | {"cache_implementation": "static"}
    expected = model.generate(**arguments, **options, disable_compile=True)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    config = transformers.CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    result = on_kernels(model, route).generate(**arguments, **options, compile_config=config)
    assert torch.equal(result, expected)
    # In a window's cache Transformers counts what was written in a Python number.
    assert len(graphs) == (1 if getattr(model.config, "sliding_window", None) is None else 2)
