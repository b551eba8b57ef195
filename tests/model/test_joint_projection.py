"""In steps on a cache, q, k and v are one product, and gate and up another."""

import copy
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from gqa_kernels import get_backend
from llama2 import Generator, KVCache, Llama2, ModelConfig, PagedKVCache, Request, generate, serve
from llama2.decoding import paged_decode
from llama2.decoding.weights import addresses
from llama2.parallel import parallelize

CONFIG = ModelConfig(97, 48, 80, 2, 6, 2, 8, max_seq_len=32)
TOKENS = torch.tensor([[1, 5, 9, 33], [1, 7, 8, 90]])
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def make_model(dtype=torch.float64):
    torch.manual_seed(0)
    return Llama2(CONFIG, get_backend("eager")).to(dtype)


class CountProducts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op in PRODUCTS
        return op(*args, **(kwargs or {}))


@torch.no_grad()
def cached_logits(model):
    weight = model.lm_head.weight
    cache = KVCache(model.cache_config, 2, 8, dtype=weight.dtype, device=weight.device)
    return torch.cat([model(TOKENS[:, :3], cache), model(TOKENS[:, 3:], cache)], dim=1)


def num_products(model):
    with CountProducts() as counted:
        cached_logits(model)
    return counted.count


JOINT, APART = 2 * (2 * 4 + 1), 2 * (2 * 7 + 1)  # two steps of two layers and a head


def assert_same_logits(model, other):
    torch.testing.assert_close(cached_logits(model), cached_logits(other), rtol=1e-12, atol=1e-12)


def test_two_products_in_place_of_five():
    model = make_model()
    assert num_products(model) == APART
    model.fuse_projections()
    assert num_products(model) == JOINT
    assert_same_logits(model, make_model())


def test_parameters_stay(tmp_path):
    model, plain = make_model(), make_model()
    before = dict(model.named_parameters())
    model.fuse_projections()
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(after[name] is before[name] for name in after)
    expected = plain.state_dict()
    assert all(weight.equal(expected[name]) for name, weight in model.state_dict().items())
    places = [weight.data_ptr() for weight in after.values()]
    model.fuse_projections()  # moves nothing a second time
    assert [weight.data_ptr() for weight in after.values()] == places
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    loaded = load_file(tmp_path / "weights.safetensors")
    pickled = torch.load(tmp_path / "weights.pt", weights_only=True)
    for name, weight in expected.items():
        assert loaded[name].equal(weight) and pickled[name].equal(weight)


def test_gradients_take_the_products_apart():
    model, plain = make_model(), make_model()
    model.fuse_projections()
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, plain)]
    for each, optimizer in zip((model, plain), optimizers, strict=True):
        each.loss(TOKENS).backward()
        optimizer.step()
    for weight, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert weight.grad.equal(expected.grad) and weight.equal(expected)
    assert num_products(model) == JOINT  # with the new weights
    assert_same_logits(model, plain)


def moved(model):
    return model.to(torch.float32).to(torch.float64)


def sliced(model):
    """One head fewer of each kind, in views of the same memory."""
    for attention in (layer.self_attn for layer in model.layers):
        attention.num_q_heads, attention.num_kv_heads = 3, 1
        for name, rows in (("q_proj", 24), ("k_proj", 8), ("v_proj", 8)):
            linear = getattr(attention, name)
            linear.weight = nn.Parameter(linear.weight[:rows])
        attention.o_proj.weight = nn.Parameter(attention.o_proj.weight[:, :24])
    return model


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def replaced(model):
    """As adapters do."""
    for layer in model.layers:
        for owner, name in ((layer.self_attn, "v_proj"), (layer.mlp, "up_proj")):
            weight = getattr(owner, name).weight
            other = Twice(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
            other.weight = weight
            setattr(owner, name, other)
    return model


def hooked(model):
    for layer in model.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda module, inputs, out: out + 1)
        layer.mlp.gate_proj.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    return model


def overwritten(model):
    for layer in model.layers:
        layer.self_attn.q_proj.weight = nn.Parameter(layer.self_attn.q_proj.weight * 2)
        layer.mlp.up_proj.forward = lambda x, weight=layer.mlp.up_proj.weight: x @ weight.T * 3
    return model


def copied(model):
    return copy.deepcopy(model)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("change", (moved, sliced, replaced, hooked, overwritten, copied, pickled))
@pytest.mark.parametrize("again", (False, True))
def test_what_was_fused_is_never_stale(change, again):
    model, plain = make_model(), change(make_model())
    model.fuse_projections()
    model = change(model)
    assert num_products(model) > JOINT
    if again:
        model.fuse_projections()
    assert_same_logits(model, plain)
    if again and change in (moved, sliced, copied, pickled):
        assert num_products(model) == JOINT


def test_a_compiled_model_takes_them_apart():
    model = make_model()
    model.fuse_projections()
    compiled = torch.compile(model, backend="aot_eager")
    assert_same_logits(compiled, model)


def given(model):
    """Another model of the same weights."""
    other = make_model()
    other.load_state_dict(model.state_dict(), assign=True)
    return other


@pytest.mark.parametrize("hold", (given, Llama2.state_dict), ids=("a model", "a state dict"))
def test_memory_that_others_refer_to_stays(hold):
    model = make_model()
    held = hold(model)
    model.fuse_projections()
    assert num_products(model) == APART
    with torch.no_grad():
        model.layers[0].self_attn.q_proj.weight.mul_(2)
    weights = held if isinstance(held, dict) else held.state_dict()
    assert all(x.equal(weights[name]) for name, x in model.state_dict().items())
    del held, weights
    model.fuse_projections()
    assert num_products(model) == JOINT


def test_memory_that_processes_share_stays():
    model = make_model()
    model.share_memory()
    model.fuse_projections()
    assert all(weight.is_shared() for weight in model.parameters())
    assert num_products(model) == APART


def generated(model, max_new_tokens):
    return Generator(model).generate(TOKENS.tolist(), max_new_tokens=max_new_tokens)


def served(model, max_new_tokens):
    cache = PagedKVCache(
        model.cache_config,
        num_pages=8,
        page_size=4,
        max_batch=2,
        dtype=torch.float32,
        device="cpu",
    )
    requests = (Request(prompt, max_new_tokens) for prompt in TOKENS.tolist())
    return [result.tokens for result in serve(model, requests, cache=cache)]


@pytest.mark.parametrize("decode", (generated, served))
def test_decoding_fuses_on_a_gpu_and_training_goes_on(decode, monkeypatch):
    model, plain = make_model(torch.float32), make_model(torch.float32)
    expected_tokens = decode(plain, 5)
    assert num_products(plain) == APART
    for user in (generate, paged_decode):
        monkeypatch.setattr(user, "on_gpu", lambda model: True)
    assert decode(model, 5) == expected_tokens
    assert num_products(model) == JOINT
    model.loss(TOKENS).backward()
    plain.loss(TOKENS).backward()
    for weight, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert not weight.is_inference() and weight.grad.equal(expected.grad)


def moved_in(model):
    return model.to(torch.float32)


def assigned(model):
    model.load_state_dict({k: x.clone() for k, x in model.state_dict().items()}, assign=True)
    return model


@pytest.mark.parametrize("leave", (moved_in, assigned))
def test_memory_that_weights_have_left_is_let_go(leave):
    model = make_model()
    model.fuse_projections()
    left = [weakref.ref(layer.mlp._joint._weight) for layer in model.layers]
    left += [weakref.ref(layer.self_attn._joint._weight) for layer in model.layers]
    leave(model)
    assert all(memory() is None for memory in left)


def flattened(model):
    """As optimisers do that keep all weights in one tensor."""
    weights = list(model.parameters())
    flat = torch.cat([x.detach().flatten() for x in weights])
    for weight, part in zip(weights, flat.split([x.numel() for x in weights]), strict=True):
        weight.data = part.view_as(weight)
    return model


def tied(model):
    """Both layers, and what one input is multiplied by."""
    first, second = model.layers
    first.self_attn.v_proj.weight = first.self_attn.k_proj.weight
    first.mlp.up_proj.weight = first.mlp.gate_proj.weight
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(second.self_attn, name).weight = getattr(first.self_attn, name).weight
    return model


@pytest.mark.parametrize("change", (flattened, tied))
def test_weights_that_have_their_place_for_a_reason_stay(change):
    model, plain = change(make_model()), change(make_model())
    model.fuse_projections()
    places = addresses(model)
    model.fuse_projections()
    assert addresses(model) == places
    if change is flattened:
        assert num_products(model) == APART
    assert_same_logits(model, plain)


def test_weights_that_fsdp_gathers_stay(tmp_path):
    """Moved, they would not be gathered again after a step."""
    model, plain = make_model(), make_model()
    dist.init_process_group("gloo", f"file://{tmp_path}/peers", rank=0, world_size=1)
    try:
        parallelize(model, init_device_mesh("cpu", (1,), mesh_dim_names=("dp",)))
        model(TOKENS)
        model.fuse_projections()
        model.unshard()
        for layer in model.layers:
            layer.unshard()
        model.fuse_projections()
        for each in (model, plain):
            each.loss(TOKENS).backward()
            torch.optim.SGD(each.parameters(), lr=0.1).step()
        torch.testing.assert_close(model(TOKENS), plain(TOKENS), rtol=1e-12, atol=1e-12)
    finally:
        dist.destroy_process_group()
