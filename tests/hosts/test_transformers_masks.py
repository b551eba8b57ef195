"""What Transformers' masks become, and which of them are refused.

The truth is the matrix of pairs that Transformers makes for its own eager attention.
"""

import copy
import inspect

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from budget import assert_network
from tiny_transformers import double, make, on_kernels, rows
from transformers import masking_utils

from gqa_kernels import reference
from gqa_kernels.integrations import transformers as ours

NEW = transformers.__version__ >= "5"
LENGTH = 9
ours.register()


def config(**changes):
    config = transformers.LlamaConfig(num_hidden_layers=1, **changes)
    config._attn_implementation = ours.ATTENTION_NAME
    return config


def both(factory, cached=0, **arguments):
    """(ours, Transformers' for eager attention) of the last queries, behind `cached` keys."""
    arguments = {"attention_mask": None, "past_key_values": None} | arguments
    mask = arguments["attention_mask"]
    batch = 2 if mask is None else len(mask)
    length = LENGTH - cached
    if cached:
        cache = transformers.DynamicCache(config=config())
        keys = torch.zeros(batch, 1, cached, 8)
        cache.update(keys, keys, 0)
        arguments["past_key_values"] = cache
    embeddings = torch.zeros(batch, length, 8)
    if NEW:
        arguments["inputs_embeds"] = embeddings
    else:
        arguments |= {
            "input_embeds": embeddings,
            "cache_position": torch.arange(cached, LENGTH),
        }
    known = inspect.signature(factory).parameters
    if "cache" in known:  # from Transformers 5.24 on
        arguments["cache"] = arguments["past_key_values"]
    arguments = {name: value for name, value in arguments.items() if name in known}
    mine = config(sliding_window=4, attention_chunk_size=3)
    eager = copy.deepcopy(mine)
    eager._attn_implementation = "eager"
    return factory(mine, **arguments), factory(eager, **arguments)


def pairs(mask, batch, q_length, kv_length):
    """bool `[batch, q_length, kv_length]`: what flash attention makes of our mask."""
    keys = torch.arange(kv_length)
    causal = keys <= torch.arange(q_length)[:, None] + kv_length - q_length
    key_ranges, key_mask = ours._unpack(mask, q_length, kv_length)
    seen = causal.expand(batch, -1, -1)
    if key_ranges is not None:
        seen = (keys >= key_ranges[..., :1]) & (keys < key_ranges[..., 1:])
    return seen if key_mask is None else seen & key_mask[:, None].bool()


def assert_same_pairs(factory, **arguments):
    mask, eager = both(factory, **arguments)
    eager = eager[:, 0] == 0
    assert torch.equal(pairs(mask, *eager.shape), eager)


FACTORIES = (
    masking_utils.create_causal_mask,
    masking_utils.create_sliding_window_causal_mask,
    masking_utils.create_chunked_causal_mask,
)
PADDED = torch.ones(5, LENGTH, dtype=torch.bool)
PADDED[1, :3] = False
PADDED[2, 6:] = False
PADDED[3, 2:5] = False  # a prompt that was padded on the right and goes on
PADDED[4] = False


@pytest.mark.parametrize("chunk", (2**24, 1), ids=("together", "one by one"))
@pytest.mark.parametrize("cached", (0, 5, LENGTH - 1))
@pytest.mark.parametrize("attention_mask", (None, PADDED, PADDED[:1]), ids=("no", "padded", "ones"))
@pytest.mark.parametrize("factory", FACTORIES, ids=lambda factory: factory.__name__)
def test_pairs(factory, attention_mask, cached, chunk, monkeypatch):
    monkeypatch.setattr(ours, "_CHUNK", chunk)
    assert_same_pairs(factory, attention_mask=attention_mask, cached=cached)


@pytest.mark.parametrize("factory", FACTORIES[:2], ids=lambda factory: factory.__name__)
def test_packed_positions(factory):
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    assert_same_pairs(factory, position_ids=positions)


@pytest.mark.skipif(not NEW, reason="Transformers 4 has no such factory")
def test_bidirectional():
    assert_same_pairs(masking_utils.create_bidirectional_mask, attention_mask=PADDED)
    mask, _ = both(masking_utils.create_bidirectional_mask)
    assert pairs(mask, 2, LENGTH, LENGTH).all()


def test_no_mask_where_the_causal_one_is_all_there_is():
    mask, _ = both(masking_utils.create_causal_mask)
    assert mask is None
    flags, _ = both(masking_utils.create_causal_mask, attention_mask=PADDED)
    assert flags.shape == (5, 1, 1, LENGTH)


def block(batch, head, query, key):
    """Positions 2 to 5, as of an image, see each other."""
    return (query >= 2) & (query < 6) & (key >= 2) & (key < 6)


def far(batch, head, query, key):
    """The first query sees the last key, and the last the first, whatever is between."""
    return (query - key).abs() == LENGTH - 1


def every_second(batch, head, query, key):
    return (query - key) % 2 == 0


@pytest.mark.parametrize("factory", FACTORIES, ids=lambda factory: factory.__name__)
def test_a_custom_function_without_gaps(factory):
    assert_same_pairs(factory, or_mask_function=block, attention_mask=PADDED)
    assert_same_pairs(factory, and_mask_function=lambda b, h, q, k: k >= 2)


@pytest.mark.parametrize(
    ("factory", "functions"),
    (
        (masking_utils.create_sliding_window_causal_mask, {"or_mask_function": far}),
        (masking_utils.create_causal_mask, {"and_mask_function": every_second}),
    ),
    ids=("or", "and"),
)
def test_a_custom_function_with_gaps(factory, functions, monkeypatch):
    for chunk in (2**24, 1):
        monkeypatch.setattr(ours, "_CHUNK", chunk)
        with pytest.raises(NotImplementedError, match=r"mask_function: .* with gaps"):
            both(factory, **functions)


@pytest.mark.skipif(not NEW, reason="Transformers 4 knows no blocks")
@pytest.mark.parametrize("factory", FACTORIES[:2], ids=lambda factory: factory.__name__)
def test_blocks(factory):
    blocks = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, -1, -1], [0, 0, 1, 1, 1, 1, 1, 1, -1]])
    assert_same_pairs(factory, block_sequence_ids=blocks)
    blocks[0, 5:7] = 0  # one block in two places: between them is a gap
    with pytest.raises(NotImplementedError, match="with gaps"):
        both(factory, block_sequence_ids=blocks)


def test_a_custom_function_while_compiling():
    """Compiled code cannot raise our error: it asserts."""

    def make_mask(function):
        mask_function = masking_utils.or_masks(masking_utils.causal_mask_function, function)
        options = {"batch_size": 2, "kv_length": LENGTH, "mask_function": mask_function}
        if NEW:
            return ours.attention_mask(q_length=LENGTH, device="cpu", use_vmap=True, **options)
        queries = torch.arange(LENGTH)
        return ours.attention_mask(cache_position=queries, allow_is_causal_skip=False, **options)

    torch._dynamo.reset()
    compiled = torch.compile(make_mask, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(block), make_mask(block))
    with pytest.raises(RuntimeError, match="with gaps"):
        compiled(far)


def test_ready_made_masks_are_refused(device):
    model = on_kernels(make().to(device), "attention")
    mask = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool, device=device).tril()
    arguments, _ = rows("none")
    tokens = arguments["input_ids"].to(device)
    for ready_made in (mask, torch.zeros(mask.shape, device=device).masked_fill(~mask, -1e9)):
        with pytest.raises(NotImplementedError, match="attention_mask: expected none or one that"):
            model(tokens, attention_mask=ready_made)


def test_dropout_is_refused(device):
    model = on_kernels(make(attention_dropout=0.1).to(device), "attention")
    tokens = rows("none")[0]["input_ids"].to(device)
    model(tokens)  # none outside training
    with pytest.raises(NotImplementedError, match=r"dropout: expected 0\.0; got 0\.1"):
        model.train()(tokens)


@pytest.mark.parametrize("route", ("attention", "patch"))
def test_attention_weights_are_refused(route, device):
    model = on_kernels(make().to(device), route)
    tokens = rows("none")[0]["input_ids"].to(device)
    with pytest.raises(NotImplementedError, match="output_attentions: expected none"):
        model(tokens, output_attentions=True)


def test_bounds_beside_a_padding_mask_are_refused(device):
    model = on_kernels(make().to(device), "attention")
    tokens = rows("packed")[0]["input_ids"].to(device)
    bounds = torch.tensor([0, 4, LENGTH], dtype=torch.int32, device=device)
    arguments = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "use_cache": False}
    with pytest.raises(NotImplementedError, match="attention_mask: expected none with cu_seq"):
        model(tokens, attention_mask=torch.ones_like(tokens), **arguments)


@pytest.mark.parametrize("seq_len", (1, LENGTH))
def test_a_mask_of_ones_and_none_are_the_same(seq_len, device):
    model = on_kernels(make().to(device), "attention").train()
    tokens = rows("none")[0]["input_ids"][:1, :seq_len].to(device)
    without = model(tokens, use_cache=False).logits
    assert torch.equal(model(tokens, attention_mask=torch.ones_like(tokens)).logits, without)
    without.sum().backward()
    with torch.no_grad():  # a single query without a cache is decoded
        result = model(tokens, use_cache=False).logits
    plain = make().to(device)
    assert_network(
        result,
        plain,
        lambda model: model(tokens, use_cache=False).logits,
        lambda model: double(model)(lambda m: m(tokens, use_cache=False).logits),
    )


def test_only_the_values_have_a_gradient(device):
    """As where an adapter is trained on v_proj alone, at a single token."""
    model = on_kernels(make(num_hidden_layers=1).to(device), "attention").requires_grad_(False)
    weight = model.model.layers[0].self_attn.v_proj.weight.requires_grad_()
    model(torch.tensor([[5]], device=device), use_cache=False).logits.sum().backward()
    assert weight.grad.abs().max() > 0


def test_rows_that_are_wholly_padding_spoil_no_other(device):
    """Beside a row of tokens, not alone: PyTorch's products may sum in another order there."""
    model = on_kernels(make().to(device), "attention")
    tokens = rows("none")[0]["input_ids"].to(device)
    mask = torch.ones_like(tokens)
    beside_tokens = model(tokens, attention_mask=mask).logits
    mask[1] = 0
    logits = model(tokens, attention_mask=mask).logits
    assert torch.equal(logits[0], beside_tokens[0])
    assert logits.isfinite().all()


def test_a_prefix_in_the_cache(device):
    """Prompt tuning: keys and values that no token wrote, and a mask that is longer than the
    tokens."""
    model, (arguments, real) = make().to(device), rows("left")
    tokens = arguments["input_ids"].to(device)
    mask = torch.cat((torch.ones_like(tokens[:, :3]), arguments["attention_mask"].to(device)), 1)
    prefix = torch.randn(2, 2, 2, 2, 3, 8, device=device)  # layer, key or value, batch, head, …

    def run(model):
        cache = transformers.DynamicCache(config=model.config)
        for layer, (k, v) in enumerate(prefix.to(model.dtype)):
            cache.update(k, v, layer)
        return model(tokens, attention_mask=mask, past_key_values=cache).logits[real]

    with torch.no_grad():
        result = run(on_kernels(model, "attention"))
        assert_network(result, model, run, lambda model: double(model)(run))


def test_packed_rows_with_bounds(device):
    """As data collators hand them over: positions and cu_seq_lens, and no mask."""
    arguments, _ = rows("packed")
    arguments["cu_seq_lens_q"] = arguments["cu_seq_lens_k"] = torch.tensor([0, 3, 6, 9]).int()
    arguments |= {"max_length_q": 3, "max_length_k": 3}
    arguments = {k: v.to(device) if torch.is_tensor(v) else v for k, v in arguments.items()}
    for kind, changes in (("Llama", {}), ("Mistral", {"sliding_window": 2})):
        model = make(kind, **changes).to(device)

        def run(model):
            return model(**arguments, use_cache=False).logits

        result = on_kernels(model, "attention")(**arguments, use_cache=False).logits
        assert_network(result, model, run, lambda model: double(model)(run))
        without_positions = {k: v for k, v in arguments.items() if k != "position_ids"}
        out = on_kernels(model, "attention")(**without_positions, use_cache=False).logits
        assert not torch.equal(out, result)  # positions turn the keys, the bounds hide them


@pytest.mark.parametrize(
    "options", ({"num_beams": 2}, {"prompt_lookup_num_tokens": 2}), ids=("beams", "look-up")
)
def test_other_searches(options, device):
    model = make().to(device)
    arguments = {"input_ids": torch.tensor([[5, 7, 9, 5, 7]], device=device)}
    options = options | {"max_new_tokens": 4, "do_sample": False, "eos_token_id": 1}
    expected = model.generate(**arguments, **options)
    assert torch.equal(on_kernels(model, "attention").generate(**arguments, **options), expected)


def test_bounds_of_documents_stand_beside_other_ranges(device):
    """Windows and chunks hold within a document, whether positions tell of it or not."""
    bounds = torch.tensor([0, 5, 5, 14], dtype=torch.int32, device=device)
    ids = torch.arange(1, 15, device=device)[None]
    alone = [ids[:, :5], ids[:, 5:]]
    model = make("Mistral", sliding_window=4).to(device)
    plain = make("Mistral", sliding_window=4).to(device)
    model.set_attn_implementation(ours.ATTENTION_NAME)
    positions = torch.cat([torch.arange(part.shape[1], device=device) for part in alone])[None]
    result = model(ids, position_ids=positions, cu_seq_lens_q=bounds, use_cache=False).logits

    def logits(model):
        return torch.cat([model(part, use_cache=False).logits for part in alone], 1)

    assert_network(result, plain, logits, lambda model: double(model)(logits))
    q = torch.randn(1, 4, 14, 8, device=device)
    everything = torch.tensor([0, 14], dtype=torch.int32, device=device)
    chunk = torch.arange(14, device=device) // 3 * 3
    ranges = torch.stack((chunk, torch.arange(1, 15, device=device)))[None, None].int()
    module = torch.nn.Module()
    whole, _ = ours.attention_forward(module, q, q, q, ranges)
    packed, _ = ours.attention_forward(module, q, q, q, ranges, cu_seq_lens_q=everything)
    torch.testing.assert_close(packed, whole)
    cut, _ = ours.attention_forward(module, q, q, q, ranges, cu_seq_lens_q=bounds)
    assert not torch.allclose(cut[:, 5], whole[:, 5])
    torch.testing.assert_close(cut[:, :5], whole[:, :5])


@pytest.mark.parametrize("num_new", (1, 3))
@pytest.mark.parametrize("name", ("softcap", "s_aux", "sliding_window"))
def test_steps_with_caps_sinks_and_windows_are_decoded(name, num_new, device, monkeypatch):
    """Gemma 2's layers have soft caps, gpt-oss's sinks, Mistral's windows."""
    q, k, v = (torch.randn(2, heads, 9, 8, device=device) for heads in (4, 2, 2))
    q = q[:, :, :num_new]
    value = {"softcap": 1.5, "s_aux": torch.randn(4, device=device), "sliding_window": 4}[name]
    options = {
        "softcap": {"softcap": value},
        "s_aux": {"sinks": value},
        "sliding_window": {"window": (3, None)},
    }[name]
    decoded = []
    decode = ours.decode_attention
    monkeypatch.setattr(
        ours, "decode_attention", lambda *x, **y: decoded.append(y) or decode(*x, **y)
    )
    out, _ = ours.attention_forward(torch.nn.Module(), q, k, v, None, **{name: value})
    assert len(decoded) == 1
    inputs = [x.transpose(1, 2) for x in (q, k, v)]
    expected = reference.flash_attention(*inputs, causal=True, **options)
    torch.testing.assert_close(out, expected)
    assert not torch.allclose(out, reference.flash_attention(*inputs, causal=True))


def test_tensors_that_nobody_knows_are_refused(device):
    """Sparse attention says in an argument of its own which keys are left."""
    q = torch.randn(1, 2, 4, 8, device=device)
    with pytest.raises(NotImplementedError, match="block_indices: expected no such tensor"):
        ours.attention_forward(torch.nn.Module(), q, q, q, None, block_indices=torch.zeros(4))


@pytest.mark.parametrize("columns", (4, 10))
def test_masks_of_another_length_are_refused(columns, device):
    model = make("Llama").to(device)
    model.set_attn_implementation(ours.ATTENTION_NAME)
    ids = torch.ones(2, 6, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="attention_mask: expected"):
        model(ids, attention_mask=ids.new_ones(2, columns), use_cache=False)
    ready = torch.zeros(2, 1, 6, 6, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="attention_mask: expected"):
        model(ids, attention_mask=ready, use_cache=False)


class _Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, mask):
        return self.model(tokens, attention_mask=mask, use_cache=False).logits


@pytest.mark.skipif(not NEW, reason="Transformers 4 was not tried")
@torch.no_grad()
def test_a_model_is_exported_with_a_dynamic_length(device):
    model = _Logits(on_kernels(make("Llama").to(device), "attention").eval())
    length = torch.export.Dim("length", min=2, max=32)

    def batch(count):
        mask = torch.ones(2, count, dtype=torch.int64, device=device)
        mask[0, :2] = 0
        return torch.randint(50, (2, count), device=device), mask

    shapes = {"tokens": {1: length}, "mask": {1: length}}
    exported = torch.export.export(model, batch(9), dynamic_shapes=shapes, strict=False).module()
    for count in (9, 13):
        tokens, mask = batch(count)
        assert torch.equal(exported(tokens, mask)[mask.bool()], model(tokens, mask)[mask.bool()])
