"""How many kernels a layer launches, in our model and in a patched Transformers model; and that
results which a patched layer computes for the next one are used only while they are valid."""

import copy
import io
import pickle
import weakref

import pytest
import torch
from launch_counts import per_layer

import gqa_kernels
from gqa_kernels import get_backend
from llama2 import KVCache, Llama2, ModelConfig

transformers = pytest.importorskip("transformers")

TOKENS = torch.tensor([[1, 5, 9, 33, 7], [1, 7, 8, 60, 2]])


def our_model(num_layers, device):
    torch.manual_seed(0)
    config = ModelConfig(64, 48, 80, num_layers, 6, 2, 8, max_seq_len=32)
    return Llama2(config, get_backend("triton")).to(device, torch.bfloat16)


def patched(num_layers, device, ops=gqa_kernels.patching.DEFAULT_OPS):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        vocab_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    model = transformers.LlamaForCausalLM(config).to(device, torch.bfloat16).eval()
    gqa_kernels.patch(model, ops, strict=True)
    return model


def without_gradients(call):
    def wrapped():
        with torch.no_grad():
            return call()

    return wrapped


def test_a_decode_layer_of_ours(device):
    """12 launches if each projection is a product of its own."""

    def make(num_layers):
        model = our_model(num_layers, device)
        model.fuse_projections()
        cache = KVCache(model.cache_config, 1, 16, dtype=torch.bfloat16, device=device)
        with torch.no_grad():
            model(TOKENS[:1, :2].to(device), cache)
        return without_gradients(lambda: model(TOKENS[:1, :1].to(device), cache))

    found = per_layer(make)
    assert found == {
        "mm": 4,
        "add_rms_norm": 2,
        "rope_append_kv": 1,
        "decode_attention": 1,
        "swiglu": 1,
    }


def test_a_layer_of_ours_without_a_cache(device):
    def make(num_layers):
        model = our_model(num_layers, device)
        return without_gradients(lambda: model(TOKENS[:1, :2].to(device)))

    found = per_layer(make)
    assert found == {
        "mm": 7,
        "add_rms_norm": 2,
        "apply_rope": 1,
        "flash_attention": 1,
        "swiglu": 1,
    }


@pytest.mark.parametrize(
    ("cache_of", "of_the_cache"),
    (
        (lambda model: transformers.DynamicCache(config=model.config), {"cat": 2}),
        (
            lambda model: transformers.StaticCache(config=model.config, max_cache_len=16),
            {"arange": 1, "add": 1, "add_": 1, "index_copy_": 2},
        ),
    ),
    ids=("dynamic", "static"),
)
def test_a_decode_layer_of_a_patched_model(cache_of, of_the_cache, device):
    """12 launches, without those of Transformers' cache."""

    def make(num_layers):
        model = patched(num_layers, device)
        cache = cache_of(model)
        with torch.no_grad():
            model(TOKENS[:1, :2].to(device), past_key_values=cache, use_cache=True)
        one = TOKENS[:1, :1].to(device)
        return without_gradients(lambda: model(one, past_key_values=cache, use_cache=True))

    found = per_layer(make)
    ops = {"mm": 7, "add_rms_norm": 2, "apply_rope": 1, "decode_attention": 1, "swiglu": 1}
    if transformers.__version__ < "5":
        of_the_cache = {name: n for name, n in found.items() if name not in ops}
        assert sum(of_the_cache.values()) <= 5
    assert found == ops | of_the_cache


# --- what is noted for the next module ------------------------------------------------------------


def logits(model, device, **options):
    return model(TOKENS.to(device), use_cache=False, **options).logits


@pytest.fixture
def model(device, monkeypatch):
    """Patched with the reference's ops, which are faster here and call the same modules."""
    triton, eager = get_backend("triton"), get_backend("eager")
    for name in ("rms_norm", "add_rms_norm", "swiglu", "apply_rope"):
        monkeypatch.setattr(triton, name, getattr(eager, name))
    return patched(3, device, ("rms_norm", "swiglu", "rope"))


@pytest.fixture
def apart(model, device):
    """Logits with gradients, where layers compute nothing for each other."""
    return lambda **options: logits(model, device, **options).detach()


def test_the_same_bits_with_and_without_gradients(model, apart, device):
    with torch.no_grad():
        ahead = logits(model, device)
    assert ahead.equal(apart())
    with torch.inference_mode():
        assert logits(model, device).equal(ahead)


def test_hidden_states_are_those_of_the_layers(model, device):
    def states():
        outputs = model(TOKENS.to(device), use_cache=False, output_hidden_states=True)
        return [x.detach() for x in outputs.hidden_states]

    expected = states()
    with torch.no_grad():
        assert all(x.equal(y) for x, y in zip(states(), expected, strict=True))


def in_place(module, inputs, output):
    output.mul_(1.5)


def in_another(module, inputs, output):
    return output * 1.5


@pytest.mark.parametrize("hook", (in_place, in_another))
def test_a_hook_may_change_what_a_layer_gives(hook, model, apart, device):
    with torch.no_grad():
        before = logits(model, device)
    model.model.layers[0].register_forward_hook(in_another)
    expected = apart()
    model.model.layers[0]._forward_hooks.clear()
    model.model.layers[0].register_forward_hook(hook)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert logits(model, device).equal(expected)
    assert not before.equal(expected)


def test_another_order_of_layers(model, apart, device):
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList([layers[2], layers[0]])
    expected = apart()
    with torch.no_grad():
        assert logits(model, device).equal(expected)


def test_a_norm_with_a_hook_of_its_own(model, apart, device):
    model.model.layers[1].input_layernorm.register_forward_hook(lambda m, i, out: out + 1)
    model.model.norm.register_forward_pre_hook(lambda m, i: (i[0] * 2,))
    expected = apart()
    with torch.no_grad():
        assert logits(model, device).equal(expected)


def test_unpatched_layers_between(model, apart, device):
    """A layer that is not patched neither reads nor makes notes."""
    gqa_kernels.unpatch(model.model.layers[1])
    expected = apart()
    with torch.no_grad():
        assert logits(model, device).equal(expected)


def test_copies_look_at_their_own_norms(model, device):
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for layer in other.model.layers:
                layer.input_layernorm.weight.mul_(2)
            ahead = logits(other, device)
        assert ahead.equal(logits(other, device).detach())
        with torch.no_grad():
            assert not ahead.equal(logits(model, device))


def test_angles_that_are_written_to_are_read_again(model, device):
    attention = model.model.layers[0].self_attn
    x = torch.randn(1, 5, 48, device=device).to(torch.bfloat16)
    angle = torch.randn(1, 5, 8, device=device).to(torch.bfloat16)
    with torch.no_grad():
        cos, sin = angle.cos(), angle.sin()

        def call(*angles):
            return attention(x, position_embeddings=angles, attention_mask=None)[0]

        first = call(cos, sin)
        assert call(cos, sin).equal(first)
        cos.copy_(sin)
        assert call(cos, sin).equal(call(cos.clone(), sin.clone()))
        assert not call(cos, sin).equal(first)


def test_a_norm_outside_of_no_grad_has_a_gradient(model, device):
    """Layers that are frozen, under a norm that is trained."""

    def gradient(norm):
        angles = model.model.rotary_emb(x, torch.arange(5, device=device)[None])
        with torch.no_grad():
            states = model.model.layers[-1](x, position_embeddings=angles, attention_mask=None)
        return torch.autograd.grad(norm(states).float().square().sum(), norm.weight)[0]

    x = torch.randn(1, 5, 48, device=device).to(torch.bfloat16)
    norm = model.model.norm
    expected = gradient(copy.deepcopy(norm))  # of which no layer knows
    assert gradient(norm).equal(expected) and expected.any()


def test_a_tensor_is_saved_without_its_note(model, device):
    """What a hook keeps of a run that ends there, before the next norm took its note."""
    kept = []

    def keep(module, inputs, output):
        kept.append(output)
        raise StopIteration

    model.model.layers[0].register_forward_hook(keep)
    with torch.no_grad(), pytest.raises(StopIteration):
        logits(model, device)
    file = io.BytesIO()
    torch.save(kept, file)
    file.seek(0)
    (loaded,) = torch.load(file, weights_only=True)
    assert loaded.equal(kept[0]) and not vars(kept[0])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("context", (torch.no_grad, torch.enable_grad))
def test_what_was_noted_ends_with_its_tensor(context, dtype, model, device):
    model, noted = model.to(dtype), []
    model.model.rotary_emb.register_forward_hook(
        lambda module, inputs, output: noted.extend(map(weakref.ref, output))
    )
    with context():
        logits(model, device)
    assert len(noted) == 2 and all(angles() is None for angles in noted)
