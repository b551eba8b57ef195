"""The modules beside transformers' Llama and beside each other, in both lineages of checkpoints."""

import copy
import io
import pickle

import pytest
import torch
from budget import assert_network
from processes import fresh
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from gqa_kernels.nn import Attention, RMSNorm, SwiGLU, packed_positions, rope_table

HIDDEN, HEAD_DIM, MAX_SEQ_LEN = 48, 16, 64
HEADS = pytest.mark.parametrize(
    ("num_q_heads", "num_kv_heads"), ((4, 4), (4, 2), (4, 1)), ids=("mha", "gqa", "mqa")
)
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
META_NAMES = {
    "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo",
    "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3",
}  # fmt: skip


def hf_config(num_q_heads=4, num_kv_heads=2, bias=False, implementation="sdpa"):
    return LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=88,
        num_attention_heads=num_q_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        attention_bias=bias,
        mlp_bias=bias,
        attn_implementation=implementation,
    )


def lively(module: nn.Module) -> nn.Module:
    """Attention far from uniform; scores of some units, since the errors of a gradient that flash
    attention computes from lse grow with it."""
    for name, parameter in module.named_parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
        elif name.endswith("bias"):
            nn.init.uniform_(parameter, -0.3, 0.3)
        else:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return module


def in_meta_layout(state_dict: dict) -> dict:
    """The weights of a Hugging Face layer as Meta's checkpoints hold them."""
    result = {}
    for name, value in state_dict.items():
        module, kind = name.split(".")
        if module in ("q_proj", "k_proj"):  # rows of a head: (member of a pair, pair) → (pair, …)
            value = value.unflatten(0, (-1, 2, HEAD_DIM // 2)).transpose(1, 2).flatten(0, 2)
        result[f"{META_NAMES[module]}.{kind}"] = value
    return result


def attention(device, **options) -> Attention:
    options = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": HEAD_DIM, **options}
    return Attention(HIDDEN, **options, device=device)


def run(function, module, x):
    """Output and gradients, of x and of the parameters by name."""
    x = x.detach().requires_grad_()
    out = function(module, x)
    names = [name for name, _ in module.named_parameters()]
    grads = torch.autograd.grad(
        out,
        (x, *module.parameters()),
        torch.sin(torch.arange(out.numel())).bfloat16().view_as(out).to(out),
    )
    return {"out": out, **dict(zip(("x", *names), grads, strict=True))}


def assert_as(ours, theirs, x):
    """Output and gradients of modules of x alone."""

    def of(module, x):
        return run(lambda module, x: module(x), module, x)

    assert_network(
        of(ours, x),
        theirs,
        lambda theirs: of(theirs, x),
        lambda theirs: of(copy.deepcopy(theirs).double(), x.double()),
    )


def assert_is_attention(out, module, sequences, table, **options):
    """`out` has the rows of all sequences, one after another, by the module's weights."""

    def like(module, dtype):
        names = "meta" if hasattr(module, "wq") else "hf"
        options_of_both = {"checkpoint_format": names, "backend": "eager", "dtype": dtype}
        twin = attention(out.device, **options_of_both, **options)
        twin.load_state_dict(module.state_dict())
        return twin

    def plain(module):
        return torch.cat([module(x, *table) for x in sequences], dim=1)

    def exact(module):
        module, angles = like(module, torch.float64), exact_table(out.device)
        return torch.cat([module(x.double(), *angles) for x in sequences], dim=1)

    assert_network(out, like(module, torch.float32), plain, exact)


@pytest.fixture
def table(device):
    return rope_table(HEAD_DIM, MAX_SEQ_LEN, device=device)


@pytest.fixture
def x(device, generator):
    return torch.randn(2, 21, HIDDEN, generator=generator).to(device)


def hf_attention(cos, sin, causal=True):
    """LlamaAttention as a function of (module, x) under the angles of the first positions."""

    def function(module, x):
        angles = [t[: x.shape[1]].repeat(1, 2)[None].to(x.dtype) for t in (cos, sin)]
        mask = None
        if module.config._attn_implementation == "eager":  # which knows no causal mask of its own
            mask = torch.full((x.shape[1],) * 2, -torch.inf, dtype=x.dtype, device=x.device)
            mask = mask.triu(1)[None, None]
        return module(x, position_embeddings=angles, attention_mask=mask)[0]

    return function


def exact_table(device):
    feature = torch.arange(0, HEAD_DIM, 2, dtype=torch.float64, device=device)
    position = torch.arange(MAX_SEQ_LEN, dtype=torch.float64, device=device)
    angle = position[:, None] / 10000 ** (feature / HEAD_DIM)
    return angle.cos(), angle.sin()


@pytest.mark.covering(1)
@HEADS
@DTYPES
@pytest.mark.parametrize("bias", (False, True), ids=("plain", "bias"))
def test_attention_is_llamas(num_q_heads, num_kv_heads, dtype, bias, x, table, device):
    theirs = LlamaAttention(hf_config(num_q_heads, num_kv_heads, bias, "eager"), layer_idx=0)
    theirs = lively(theirs).to(device, dtype)
    heads = {"num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads}
    ours = attention(device, **heads, bias=bias, dtype=dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = x.to(dtype)

    def exact(theirs):
        wide = LlamaAttention(hf_config(num_q_heads, num_kv_heads, bias), layer_idx=0)
        wide = wide.to(device, torch.float64)
        wide.load_state_dict(theirs.state_dict())
        return run(hf_attention(*exact_table(device)), wide, x.double())

    assert_network(
        run(lambda module, x: module(x, *table), ours, x),
        theirs,
        lambda theirs: run(hf_attention(*table), theirs, x),
        exact,
    )


@DTYPES
@pytest.mark.parametrize("bias", (False, True), ids=("plain", "bias"))
def test_swiglu_is_llamas(dtype, bias, x, device):
    theirs = lively(LlamaMLP(hf_config(bias=bias))).to(device, dtype)
    ours = SwiGLU(HIDDEN, 88, bias=bias, device=device, dtype=dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_as(ours, theirs, x.to(dtype))


@DTYPES
def test_rms_norm_is_llamas(dtype, x, device):
    theirs = lively(LlamaRMSNorm(HIDDEN, eps=1e-5)).to(device, dtype)
    ours = RMSNorm(HIDDEN, device=device, dtype=dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    plain = RMSNorm(HIDDEN, device=device, dtype=dtype, backend="eager")
    plain.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(plain(x.to(dtype)), theirs(x.to(dtype)))
    assert_as(ours, plain, x.to(dtype))
    residual = x.flip(0).to(dtype)
    y, h = ours(x.to(dtype), residual)
    assert torch.equal(h, x.to(dtype) + residual)
    assert torch.equal(y, ours(h))


def test_both_lineages_give_the_same(x, table, device):
    hf = lively(attention(device))
    meta = attention(device, checkpoint_format="meta")
    meta.load_state_dict(in_meta_layout(hf.state_dict()), strict=True)
    assert not torch.equal(meta.wq.weight, hf.q_proj.weight)
    # The same products, summed over the features of a head in another order.
    for module in (meta, hf):
        assert_is_attention(module(x, *table), hf, [x], table)

    hf = lively(SwiGLU(HIDDEN, 88, device=device))
    meta = SwiGLU(HIDDEN, 88, checkpoint_format="meta", device=device)
    meta.load_state_dict(in_meta_layout(hf.state_dict()), strict=True)
    assert torch.equal(meta(x), hf(x))


def test_names_of_the_checkpoints(device):
    """As they stand in the files, under a layer's prefix, and no other."""
    q, kv = [4 * HEAD_DIM, HIDDEN], [2 * HEAD_DIM, HIDDEN]
    for checkpoint_format, attention_names, mlp_names in (
        ("hf", ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")),
        ("meta", ("wq", "wk", "wv", "wo"), ("w1", "w3", "w2")),
    ):
        state = attention(device, checkpoint_format=checkpoint_format).state_dict()
        shapes = (q, kv, kv, q[::-1])
        assert {name: list(value.shape) for name, value in state.items()} == {
            f"{name}.weight": shape for name, shape in zip(attention_names, shapes, strict=True)
        }
        state = SwiGLU(HIDDEN, 88, checkpoint_format=checkpoint_format, device=device).state_dict()
        assert list(state) == [f"{name}.weight" for name in mlp_names]
    assert list(RMSNorm(8, device=device).state_dict()) == ["weight"]


def test_a_buffer_of_early_checkpoints_is_no_surprise(device):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn = attention(device)

    state = {**Layer().state_dict(), "self_attn.rotary_emb.inv_freq": torch.ones(HEAD_DIM // 2)}
    Layer().load_state_dict(state, strict=True)
    assert "self_attn.rotary_emb.inv_freq" in state
    with pytest.raises(RuntimeError, match="Unexpected key"):
        Layer().load_state_dict({**state, "self_attn.other": torch.ones(1)}, strict=True)


@pytest.mark.parametrize("checkpoint_format", ("hf", "meta"))
def test_packed_sequences_are_the_sequences(checkpoint_format, table, device, generator):
    module = lively(attention(device, checkpoint_format=checkpoint_format))
    documents = [torch.randn(1, n, HIDDEN, generator=generator).to(device) for n in (9, 1, 6)]
    bounds = torch.tensor([0, 9, 9, 10, 16], device=device, dtype=torch.int32)  # one is empty
    packed = torch.cat(documents, dim=1)
    positions = packed_positions(bounds, 16)
    assert positions.tolist() == [[*range(9), 0, *range(6)]]
    for given in (None, positions):
        out = module(packed, *table, cu_seqlens=bounds, positions=given)
        assert_is_attention(out, module, documents, table)


@pytest.mark.covering(1)
@torch.no_grad()
@pytest.mark.parametrize("backend", ("triton", "eager"))
@pytest.mark.parametrize("checkpoint_format", ("hf", "meta"))
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_a_cache_continues_sequences(backend, checkpoint_format, dtype, table, device, generator):
    """Ragged sequences: a prefill that is padded on the right, then 1 and 3 tokens more."""
    module = lively(attention(device, checkpoint_format=checkpoint_format, backend=backend))
    lengths = torch.tensor([18, 5], device=device, dtype=dtype)
    whole = torch.randn(2, 22, HIDDEN, generator=generator).to(device)
    cache = tuple(
        torch.full((2, 24, 2, HEAD_DIM), torch.nan, device=device) for _ in ("keys", "values")
    )
    pieces = [module(whole[:, :18], *table, kv_cache=cache)]
    seq_lens = lengths
    for count in (1, 3):
        seq_lens = seq_lens + count
        new = torch.stack([whole[b, n - count : n] for b, n in enumerate(seq_lens.tolist())])
        pieces.append(module(new, *table, kv_cache=cache, seq_lens=seq_lens))
    for b, length in enumerate(lengths.tolist()):
        out = torch.cat([pieces[0][b, :length], pieces[1][b], pieces[2][b]])[None]
        assert_is_attention(out, module, [whole[b : b + 1, : length + 4]], table)
    for tensor in cache:
        assert tensor[:, 22:].isnan().all()
        assert not tensor[0, :22].isnan().any()


@torch.no_grad()
def test_a_short_prefill_through_seq_lens(x, table, device):
    module = lively(attention(device))
    x = x[:, :16]
    cache = tuple(torch.full((2, 24, 2, HEAD_DIM), torch.nan, device=device) for _ in "kv")
    seq_lens = torch.full((2,), 16, device=device)
    out = module(x, *table, kv_cache=cache, seq_lens=seq_lens)
    assert_is_attention(out, module, [x], table)


def test_window_and_no_mask(x, table, device):
    for options in ({"causal": False}, {"window": (4, None)}, {"causal": False, "window": (3, 2)}):
        module = lively(attention(device, **options))
        assert_is_attention(module(x, *table), module, [x], table, **options)
        assert not torch.allclose(module(x, *table), attention_like(module, x, table))


def attention_like(module, x, table):
    plain = attention(x.device)
    plain.load_state_dict(module.state_dict())
    return plain(x, *table)


def test_positions_turn_q_and_k(x, table, device):
    module = lively(attention(device))
    positions = torch.arange(21, device=device).expand(2, -1)
    assert torch.equal(module(x, *table), module(x, *table, positions=positions))
    moved = module(x, *table, positions=positions * 2)
    assert not torch.allclose(module(x, *table), moved)


def test_rope_table(device):
    cos, sin = rope_table(8, 5, 500.0, device=device)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (5, 4)
    for position in range(5):
        for pair in range(4):
            angle = torch.tensor(position * 500.0 ** (-pair / 4), dtype=torch.float64)
            assert cos[position, pair].item() == angle.cos().float().item()
            assert sin[position, pair].item() == angle.sin().float().item()


MODULES = pytest.mark.parametrize(
    "make",
    (
        lambda **options: RMSNorm(HIDDEN, **options),
        lambda **options: SwiGLU(HIDDEN, 40, **options),
        lambda **options: Attention(HIDDEN, 4, 2, HEAD_DIM, **options),
        lambda **options: Attention(HIDDEN, 4, 2, HEAD_DIM, checkpoint_format="meta", **options),
    ),
    ids=("norm", "swiglu", "hf", "meta"),
)


def call(module, x, table):
    return module(x, *table) if isinstance(module, Attention) else module(x)


@MODULES
def test_copies_and_pickles(make, x, table, device):
    module = lively(make(device=device))
    expected = call(module, x, table)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(saved, weights_only=False),
    ):
        assert torch.equal(call(other, x, table), expected)
        assert other.state_dict().keys() == module.state_dict().keys()


@MODULES
def test_from_the_meta_device(make, x, table, device):
    module = lively(make(device=device))
    other = make(device="meta")
    assert all(parameter.is_meta for parameter in other.parameters())
    other.to_empty(device=device).load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(call(other, x, table), call(module, x, table))
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in make().parameters())


@MODULES
def test_compiles_whole(make, x, table, device):
    module = lively(make(device=device))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    arguments = table if isinstance(module, Attention) else ()
    ours = run(lambda _, x: compiled(x, *arguments), module, x)
    eager = run(lambda _, x: module(x, *arguments), module, x)
    for name in eager:
        assert torch.equal(ours[name], eager[name]), name


@torch.no_grad()
def test_a_cached_step_compiles_whole(table, device, generator):
    module = lively(attention(device))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, HIDDEN, generator=generator).to(device)
    caches = [tuple(torch.zeros(2, 24, 2, HEAD_DIM, device=device) for _ in "kv") for _ in range(2)]
    outs = []
    for function, cache in zip((module, compiled), caches, strict=True):
        first = function(x, *table, kv_cache=cache)
        seq_lens = torch.tensor([4, 6], device=device)
        outs.append((first, function(x, *table, kv_cache=cache, seq_lens=seq_lens)))
    for eager, traced in zip((*outs[0], *caches[0]), (*outs[1], *caches[1]), strict=True):
        assert torch.equal(eager, traced)


def test_backends_agree_where_both_run(x, table, device):
    ours = lively(attention(device))
    assert_is_attention(ours(x, *table), ours, [x], table)


def test_the_eager_backend_needs_no_triton():
    fresh(
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from gqa_kernels.nn import Attention, RMSNorm, SwiGLU, rope_table\n"
        "x = torch.zeros(1, 3, 16)\n"
        "RMSNorm(16, backend='eager')(x, x)\n"
        "SwiGLU(16, 8, backend='eager')(x)\n"
        "Attention(16, 2, 1, backend='eager')(x, *rope_table(8, 4))\n"
        "try: RMSNorm(16)\n"
        "except ImportError: pass\n"
        "else: raise AssertionError"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda: RMSNorm(0), "hidden_size: expected a positive int; got 0"),
        (
            lambda: RMSNorm(8, backend="cuda"),
            "backend: expected one of eager, torch, triton; got 'cuda'",
        ),
        (lambda: SwiGLU(8, -1), "intermediate_size: expected a positive int; got -1"),
        (lambda: SwiGLU(8, 2.0), r"intermediate_size: expected a positive int; got 2.0"),
        (
            lambda: SwiGLU(8, 8, checkpoint_format="gguf"),
            "checkpoint_format: expected one of hf, meta; got 'gguf'",
        ),
        (
            lambda: Attention(8, 2, 1, checkpoint_format=None),
            "checkpoint_format: expected one of hf, meta; got None",
        ),
        (
            lambda: Attention(48, 4, 3),
            r"num_q_heads: expected a multiple of num_kv_heads \(3\); got 4",
        ),
        (lambda: Attention(48, 4, 8), "num_q_heads: expected a multiple"),
        (lambda: Attention(48, 4, True), "num_kv_heads: expected a positive int; got True"),
        (lambda: Attention(50, 4, 2), r"head_dim: expected a number, as hidden_size \(50\)"),
        (lambda: Attention(48, 4, 2, 15), "head_dim: expected an even number; got 15"),
        (lambda: rope_table(7, 4), "head_dim: expected an even number; got 7"),
        (lambda: rope_table(8, 0), "max_seq_len: expected a positive int; got 0"),
        (lambda: packed_positions(torch.tensor([0]), 3), "cu_seqlens: expected the bounds"),
        (lambda: packed_positions(torch.zeros(2, 2).long(), 3), "cu_seqlens: expected shape"),
    ),
)
def test_bad_sizes(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        (
            {"x": torch.zeros(21, HIDDEN)},
            ValueError,
            rf"x: expected shape \[batch, seq_len, {HIDDEN}\]; got \[21, {HIDDEN}\]",
        ),
        ({"x": torch.zeros(2, 21, 8)}, ValueError, "x: expected shape"),
        ({"x": None}, TypeError, "x: expected a torch.Tensor; got NoneType"),
        (
            {"cu_seqlens": torch.tensor([0, 21])},
            ValueError,
            rf"x: expected shape \[1, total, {HIDDEN}\]; got \[2, 21, {HIDDEN}\]",
        ),
        (
            {"x": torch.zeros(1, 21, HIDDEN), "cu_seqlens": torch.tensor([0.0, 21.0])},
            TypeError,
            "cu_seqlens: expected dtype int32, int64; got torch.float32",
        ),
        ({"seq_lens": torch.tensor([1, 1])}, ValueError, "seq_lens: expected None without"),
        ({"positions": torch.zeros(2, 20).long()}, ValueError, "positions: expected shape"),
        ({"cos": torch.zeros(20, 8), "sin": torch.zeros(20, 8)}, ValueError, "q: expected seq_len"),
        ({"cos": torch.zeros(64, 4)}, ValueError, r"cos: expected shape \[max_seq_len, 8\]"),
    ),
)
def test_bad_arguments(options, error, message, x, table, device):
    arguments = {"x": x, "cos": table[0], "sin": table[1], **options}
    arguments = {k: v.to(device) if v is not None else v for k, v in arguments.items()}
    module = attention(device)
    with pytest.raises(error, match=f"^{message}"):
        module(**arguments)


CACHE = (2, 24, 2, HEAD_DIM)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        ({"positions": torch.zeros(2, 3).long()}, ValueError, "positions: expected None with kv_"),
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, "cu_seqlens: expected None with kv_ca"),
        (
            {"seq_lens": torch.tensor([3])},
            ValueError,
            r"seq_lens: expected shape \[2\]; got \[1\]",
        ),
        ({"seq_lens": torch.ones(2)}, TypeError, "seq_lens: expected dtype int32, int64; got"),
        ({"seq_lens": 3}, TypeError, "seq_lens: expected a torch.Tensor; got int"),
        ({"kv_cache": torch.zeros(CACHE)}, TypeError, r"kv_cache: expected \(k_cache, v_cache\)"),
        (
            {"kv_cache": (torch.zeros(1, 24, 2, 16), torch.zeros(CACHE))},
            ValueError,
            r"k_cache: expected shape \[2, capacity, 2, 16\]; got \[1, 24, 2, 16\]",
        ),
        (
            {"kv_cache": (torch.zeros(CACHE), torch.zeros(2, 20, 2, 16))},
            ValueError,
            r"v_cache: expected shape \[2, 24, 2, 16\]; got \[2, 20, 2, 16\]",
        ),
        (
            {"kv_cache": (torch.zeros(CACHE), torch.zeros(CACHE).half())},
            TypeError,
            "v_cache: expected the new keys' dtype torch.float32; got torch.float16",
        ),
        (
            {"kv_cache": (torch.zeros(CACHE), torch.zeros(CACHE, device="meta"))},
            ValueError,
            "v_cache: expected x's device",
        ),
        (
            {"x": torch.zeros(2, 17, HIDDEN), "seq_lens": torch.tensor([17, 17])},
            NotImplementedError,
            "x: expected a seq_len of 1 to 16 with seq_lens; got 17",
        ),
        ({"x": torch.zeros(2, 25, HIDDEN)}, ValueError, "x: expected seq_len up to the cache's 24"),
        ({"window": (8, None)}, NotImplementedError, "kv_cache: expected causal attention without"),
        ({"causal": False}, NotImplementedError, "kv_cache: expected causal attention without"),
    ),
)
@pytest.mark.parametrize("backend", ("triton", "eager"))
def test_bad_caches_are_not_written_to(backend, options, error, message, table, device):
    def move(value):
        if isinstance(value, tuple) and isinstance(value[0], torch.Tensor):
            return tuple(map(move, value))
        keep = not isinstance(value, torch.Tensor) or value.is_meta
        return value if keep else value.to(device)

    arguments = {"x": torch.zeros(2, 3, HIDDEN), "kv_cache": (torch.zeros(CACHE),) * 2}
    arguments = {name: move(value) for name, value in (arguments | options).items()}
    mask = {name: arguments.pop(name) for name in ("window", "causal") if name in arguments}
    module = lively(attention(device, backend=backend, bias=True, **mask))
    with torch.no_grad(), pytest.raises(error, match=f"^{message}"):
        module(**arguments, cos=table[0], sin=table[1])
    for cache in arguments["kv_cache"]:
        assert cache.is_meta or not cache.any()


@pytest.mark.parametrize("backend", ("triton", "eager"))
def test_a_cache_has_no_gradient(backend, x, table, device):
    module = attention(device, backend=backend)
    cache = tuple(torch.zeros(CACHE, device=device) for _ in "kv")
    with pytest.raises(NotImplementedError, match=r"^kv_cache: expected a call without a gradient"):
        module(x, *table, kv_cache=cache)
    assert not cache[0].any()
    module.requires_grad_(False)(x, *table, kv_cache=cache)
    assert cache[0].any()


def test_what_a_print_shows(device):
    assert repr(RMSNorm(8, 1e-6, device=device)) == "RMSNorm(8, eps=1e-06)"
    shown = repr(attention(device, checkpoint_format="meta"))
    assert "num_q_heads=4, num_kv_heads=2, head_dim=16, rope_interleaved=True" in shown


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_cache_that_cannot_be_written_rightly_is_left_alone(backend, draw, device):
    module = Attention(32, 4, 2, backend=backend, device=device)
    caches = [torch.zeros(2, 9, 2, 8, device=device) for _ in range(2)]
    x, table = draw(2, 6, 32), rope_table(8, 16, device=device)
    with pytest.raises(ValueError, match=r"x: expected seq_len up to cos's 4 rows; got 6"):
        module(x, *rope_table(8, 4, device=device), kv_cache=caches)
    shared = caches[0][:1].expand(2, -1, -1, -1)
    with pytest.raises(ValueError, match="k_cache: expected entries that share no memory"):
        module(x, *table, kv_cache=(shared, caches[1]))
    elsewhere = torch.tensor([6, 6], device="meta")
    with pytest.raises(ValueError, match="seq_lens: expected x's device"):
        module(x, *table, kv_cache=caches, seq_lens=elsewhere)
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="without a gradient"):
        module.requires_grad_(False)(x, table[0].requires_grad_(), table[1], kv_cache=caches)
    assert not any(cache.any() for cache in caches)
