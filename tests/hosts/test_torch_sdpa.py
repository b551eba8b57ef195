"""Our kernels in the place of aten's flash attention.

Without a GPU the functions are registered for CPU tensors, for which aten has none of its own;
F.scaled_dot_product_attention does not call it there, so these tests call it directly.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from budget import assert_call, assert_results
from combinations import long
from processes import fresh
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen

import gqa_kernels
from gqa_kernels import reference
from gqa_kernels.integrations import torch_sdpa

pytestmark = pytest.mark.skipif(
    not hasattr(torch_attention, "restore_flash_attention_impl"),
    reason="this PyTorch keeps no register of flash attentions",
)
FLASH = torch.ops.aten._scaled_dot_product_flash_attention
NAMES = ("query", "key", "value")
KEY = "CUDA" if torch.cuda.is_available() else "CPU"
HEADS = pytest.mark.parametrize("num_kv_heads", (4, 2, 1), ids=("mha", "gqa", "mqa"))
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))


@pytest.fixture
def ours():
    kernels = torch_sdpa._Kernels(KEY)
    yield
    kernels.remove()


@pytest.fixture
def draw(device, generator):
    def make(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    return make


def qkv(draw, layout, num_kv_heads=2, seq_len_q=21, seq_len_kv=21, dtype=torch.float32):
    """query, key and value `[2, heads, seq_len, 16]` as models lay them out."""
    if layout == "heads first":
        return tuple(
            draw(2, heads, seq_len, 16, dtype=dtype)
            for heads, seq_len in ((4, seq_len_q), *((num_kv_heads, seq_len_kv),) * 2)
        )
    if layout == "projections":  # views of [batch, seq_len, heads · head_dim]
        return tuple(
            draw(2, seq_len, heads * 16, dtype=dtype).unflatten(2, (heads, 16)).transpose(1, 2)
            for heads, seq_len in ((4, seq_len_q), *((num_kv_heads, seq_len_kv),) * 2)
        )
    assert layout == "fused", "one projection, as in nanoGPT"
    packed = draw(2, seq_len_q, (4 + 2 * num_kv_heads) * 16, dtype=dtype)
    parts = packed.split([4 * 16, num_kv_heads * 16, num_kv_heads * 16], dim=2)
    return tuple(x.unflatten(2, (-1, 16)).transpose(1, 2) for x in parts)


def strides(x):
    """Those that matter: of dimensions that hold more than one."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def maths(query, key, value, bias=None, scale=None, is_causal=False):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(
            query, key, value, bias, is_causal=is_causal, scale=scale, enable_gqa=True
        )


def with_gradients(function, *inputs):
    out = function(*inputs)
    grad = torch.sin(torch.arange(out.numel())).view_as(out).to(out)
    return out, *torch.autograd.grad(out, inputs, grad)


def heads_last(query, key, value, **options):
    """The reference of our own ops: attention that runs over its keys has the errors of its maths,
    not of torch's softmax, which is exact where a query sees one key."""
    inputs = (x.transpose(1, 2) for x in (query, key, value))
    return reference.flash_attention(*inputs, **options).transpose(1, 2)


def assert_with_gradients(function, torchs, eager, inputs):
    """Output and gradients are torch's, within the budget of `eager`."""

    def named(function):
        return lambda query, key, value: function(query, key, value)

    assert_call(
        *map(named, (function, eager)),
        dict(zip(NAMES, inputs, strict=True)),
        NAMES,
        oracle=named(torchs),
    )


@pytest.mark.covering(2)
@HEADS
@DTYPES
@pytest.mark.parametrize("layout", ("heads first", "projections", "fused"))
def test_it_is_torchs_attention(layout, dtype, num_kv_heads, ours, draw):
    inputs = qkv(draw, layout, num_kv_heads, dtype=dtype)

    def function(*inputs):
        return FLASH(*inputs, 0.0, True)[0]

    torchs = partial(maths, is_causal=True)
    assert_with_gradients(function, torchs, partial(heads_last, causal=True), inputs)
    results = with_gradients(function, *inputs)
    # Compilers rely on the strides that torch's fake implementation promises.
    for result, like in zip(results, (inputs[0], *inputs), strict=True):
        assert strides(result) == strides(torch.empty_like(like))


@pytest.mark.parametrize("is_causal", (True, False))
@pytest.mark.parametrize("lengths", ((1, 9), (7, 21), (21, 7)))
def test_other_lengths(is_causal, lengths, ours, draw):
    """aten's mask ends in the bottom right corner; a query that sees no key gives 0."""
    inputs = qkv(draw, "heads first", seq_len_q=lengths[0], seq_len_kv=lengths[1])
    visible = torch.ones(lengths, dtype=torch.bool, device=inputs[0].device)
    if is_causal:
        visible = visible.tril(lengths[1] - lengths[0])
    blind = ~visible.any(1)

    def torchs(*inputs):
        # Without a key, softmax would be NaN, of the gradients too.
        out = maths(*inputs, visible | blind[:, None])
        return out.masked_fill(blind[:, None], 0.0)

    eager = partial(heads_last, causal=is_causal)
    assert_with_gradients(lambda *x: FLASH(*x, 0.0, is_causal)[0], torchs, eager, inputs)


def test_scale_and_results(ours, draw):
    inputs = qkv(draw, "projections")
    assert_with_gradients(
        lambda *inputs: FLASH(*inputs, scale=0.3)[0],
        partial(maths, scale=0.3),
        partial(heads_last, softmax_scale=0.3),
        inputs,
    )
    out, lse, cum_seq_q, cum_seq_k, max_q, max_k, rng_state, unused, debug_mask = FLASH(*inputs)
    fake = FLASH(*(x.detach().to("meta") for x in inputs))
    assert (cum_seq_q, cum_seq_k, max_q, max_k) == (None, None, 21, 21)
    for mine, torchs in zip(
        (out, lse, rng_state, unused, debug_mask), (*fake[:2], *fake[6:]), strict=True
    ):
        assert (mine.shape, mine.dtype, mine.stride()) == (
            torchs.shape,
            torchs.dtype,
            torchs.stride(),
        )

    def lse_of(inputs):
        query, key, _ = inputs
        scores = query @ key.repeat_interleave(2, dim=1).mT / 4
        return {"lse": scores.logsumexp(-1)}

    assert_results({"lse": lse}, lse_of, [x.detach() for x in inputs])
    assert not lse.requires_grad
    # aten records the call, so ours must not, or all would be saved twice.
    assert not torch_sdpa._scaled_dot_product_flash_attention(*inputs)[0].requires_grad


def test_bits_are_those_of_flash_attention(ours, draw):
    inputs = qkv(draw, "heads first")
    out, *grads = with_gradients(lambda *x: FLASH(*x, 0.0, True)[0], *inputs)

    def direct(*inputs):
        q, k, v = (x.transpose(1, 2) for x in inputs)
        return gqa_kernels.flash_attention(q, k, v, causal=True).transpose(1, 2)

    for mine, expected in zip((out, *grads), with_gradients(direct, *inputs), strict=True):
        assert torch.equal(mine, expected)


def test_torch_finds_the_ops_well_formed(ours, draw):
    inputs = qkv(draw, "fused")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(FLASH.default, (*inputs, 0.0, True), test_utils=checks)
    q, k, v = (x.transpose(1, 2) for x in inputs)
    dense = (q, k, v, None, None, 21, 21, 0.0, True, False)
    op = torch.ops.aten._flash_attention_forward.default
    torch.library.opcheck(op, dense, {"window_size_left": 5}, test_utils=checks)
    op = torch.ops.aten._flash_attention_forward_no_dropout_inplace.default
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in dense]
    torch.library.opcheck(op, (torch.empty_like(q), *arguments), test_utils=("test_schema",))


@pytest.mark.parametrize("backend", ("aot_eager", long("inductor")))
def test_compilers_call_it(backend, ours, draw):
    inputs = qkv(draw, "fused")

    def function(*inputs):  # doubling is exact
        return FLASH(*inputs, 0.0, True)[0].transpose(1, 2).flatten(2) * 2.0

    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for mine, eager in zip(
        with_gradients(compiled, *inputs), with_gradients(function, *inputs), strict=True
    ):
        assert torch.equal(mine, eager)


@pytest.mark.parametrize("window", ((-1, -1), (-1, 0), (4, 0), (3, 2)))
def test_varlen_attn(window, ours, draw, device):
    total = 20
    inputs = draw(total, 4, 16), draw(total, 2, 16), draw(total, 2, 16)
    bounds = torch.tensor([0, 9, 9, 20], device=device, dtype=torch.int32)
    sequence = torch.searchsorted(bounds, torch.arange(total, device=device), right=True)
    distance = torch.arange(total, device=device)[:, None] - torch.arange(total, device=device)
    visible = sequence[:, None] == sequence[None]
    if window[0] >= 0:
        visible = visible & (distance <= window[0])
    if window[1] >= 0:
        visible = visible & (-distance <= window[1])

    def function(*inputs):
        return varlen.varlen_attn(
            *inputs, bounds, bounds, 11, 11, window_size=window, enable_gqa=True
        )

    def torchs(*inputs):
        return maths(*(x.transpose(0, 1)[None] for x in inputs), visible)[0].transpose(0, 1)

    def eager(*inputs):
        sides = tuple(None if side < 0 else side for side in window)
        return reference.flash_attention_varlen(*inputs, bounds, bounds, window=sides)

    assert_with_gradients(function, torchs, eager, inputs)
    options = {"window_size": window, "enable_gqa": True}
    with torch.no_grad():
        arguments = (*inputs, bounds, bounds, 11, 11)
        out, lse = varlen.varlen_attn(*arguments, **options, return_aux=varlen.AuxRequest(lse=True))
        assert lse.shape == (4, total)
        into = torch.empty_like(inputs[0])
        varlen.varlen_attn_out(into, *arguments, **options)
        assert torch.equal(into, out)


@pytest.mark.parametrize("window", ((-1, 0), (4, 2)))
@pytest.mark.parametrize("page_size", (None, 4, 6))
def test_varlen_attn_over_a_cache(page_size, window, ours, draw, device):
    """Keys in pages, and packed keys of which only the first count; NaN where no key is."""
    bounds_q = torch.tensor([0, 5, 5, 24], device=device, dtype=torch.int32)
    used, room = torch.tensor([7, 3, 21], device=device, dtype=torch.int32), 24
    rows = [draw(room, 2, 16, dtype=torch.bfloat16).detach() for _ in "kv" for _ in used]
    for row, count in zip(rows, used.tolist() * 2, strict=True):
        row[count:] = torch.nan
    own = torch.tensor([10, room, room], device=device, dtype=torch.int32)
    if page_size is None:
        rows = [row[:length] for row, length in zip(rows, own.tolist() * 2, strict=True)]
        k, v = torch.cat(rows[:3]), torch.cat(rows[3:])
        options, bounds_k = {}, torch.cat([own.new_zeros(1), own.cumsum(0, dtype=torch.int32)])
    else:
        pages, order = room // page_size, torch.randperm(3 * room // page_size)
        k, v = (torch.cat(x).view(-1, page_size, 2, 16)[order] for x in (rows[:3], rows[3:]))
        table = order.argsort().view(3, pages).int()
        options, bounds_k = {"block_table": table.to(device)}, None
    options |= {"seqused_k": used, "window_size": window, "enable_gqa": True}
    counts = used.tolist()
    keys, values = (
        torch.cat([row[:count] for row, count in zip(x, counts, strict=True)])
        for x in (rows[:3], rows[3:])
    )
    ends = torch.cat([used.new_zeros(1), used.cumsum(0)])

    def function(q, keys, values):
        aux = varlen.AuxRequest(lse=True)
        return varlen.varlen_attn(q, k, v, bounds_q, bounds_k, 19, room, return_aux=aux, **options)

    def eager(q, keys, values):
        sides = tuple(None if side < 0 else side for side in window)
        return reference.flash_attention_varlen(
            q, keys, values, bounds_q, ends, window=sides, return_lse=True
        )

    inputs = {"q": draw(24, 4, 16, dtype=torch.bfloat16).detach(), "keys": keys, "values": values}
    assert_call(function, eager, inputs)
    if page_size is None:  # no sequence has keys of the next one
        k.nan_to_num_(1.0), v.nan_to_num_(2.0)
        options["seqused_k"] = own
        whole = function(**inputs)
        options["seqused_k"] = own + 9
        assert all(map(torch.equal, function(**inputs), whole))
    with pytest.raises(RuntimeError, match="seqused_k is an inference-only parameter"):
        function(inputs["q"].requires_grad_(), None, None)


def test_a_cache_of_unknown_lengths(ours, draw, device):
    q, k = draw(3, 4, 16).detach(), draw(2, 4, 4, 16).detach()
    bounds = torch.tensor([0, 3], device=device, dtype=torch.int32)
    table = torch.zeros(1, 2, device=device, dtype=torch.int32)
    with pytest.raises(ValueError, match="seqused_k: expected a tensor with block_table"):
        varlen.varlen_attn(q, k, k, bounds, None, 3, 8, block_table=table)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"dropout_p": 0.1}, "dropout_p: expected 0.0; got 0.1. torch.nn.attention.restore_flash"),
        ({"return_debug_mask": True}, "return_debug_mask: expected False; got True"),
    ),
)
def test_what_is_not_supported_says_so(options, message, ours, draw):
    inputs = qkv(draw, "fused")
    with pytest.raises(NotImplementedError, match=f"^{message}"):
        FLASH(*inputs, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"alibi_slopes": torch.ones(4)}, "alibi_slopes: expected None; got a tensor"),
        ({"num_splits": 2}, "num_splits: expected None; got 2"),
    ),
)
def test_what_packed_sequences_do_not_support(options, message, ours, draw, device):
    q, k, v = draw(9, 4, 16), draw(9, 2, 16), draw(9, 2, 16)
    bounds = torch.tensor([0, 4, 4, 9], device=device, dtype=torch.int32)
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    op = torch.ops.aten._flash_attention_forward
    with pytest.raises(NotImplementedError, match=f"^{message}"):
        op(q, k, v, bounds, bounds, 5, 5, 0.0, True, False, **options)
    op(q, k, v, bounds, bounds, 5, 5, 0.0, True, False, num_splits=1)
    with pytest.raises(TypeError, match=r"^cu_seqlens_kv: expected a torch\.Tensor; got NoneType"):
        op(q, k, v, bounds, None, 5, 5, 0.0, True, False)


def test_another_head_dim_raises(ours, draw):
    """F.scaled_dot_product_attention pads to a multiple of 8 before."""
    with pytest.raises(NotImplementedError, match="head_dim that is a multiple of 8 up to 256"):
        FLASH(*(draw(1, 2, 5, 12) for _ in "qkv"))


def test_removing_them_restores_what_was(draw):
    inputs = qkv(draw, "fused")
    name = "aten::_scaled_dot_product_flash_attention"

    def registered():
        return torch._C._dispatch_dump(name)

    before = registered()
    kernels = torch_sdpa._Kernels(KEY)
    assert registered() != before
    FLASH(*inputs)
    kernels.remove()
    assert registered() == before
    if KEY == "CPU":
        with pytest.raises(NotImplementedError, match="Could not run 'aten::_scaled_dot_product"):
            FLASH(*inputs)


def has_kernel(op):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{op}", "CUDA")


def test_torchs_register():
    torch_sdpa.register()
    assert "gqa_kernels" in torch_attention.list_flash_attention_impls()
    assert torch_attention.current_flash_attention_impl() is None
    ops = (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_backward",
        "_flash_attention_forward",
        "_flash_attention_forward_no_dropout_inplace",
        "_flash_attention_backward",
    )
    before = [has_kernel(op) for op in ops]
    dumps = [torch._C._dispatch_dump(f"aten::{op}") for op in ops]
    torch_attention.activate_flash_attention_impl("gqa_kernels")
    try:
        assert torch_attention.current_flash_attention_impl() == "gqa_kernels"
        assert all(map(has_kernel, ops))
    finally:
        torch_attention.restore_flash_attention_impl()
    assert torch_attention.current_flash_attention_impl() is None
    assert [has_kernel(op) for op in ops] == before
    with torch_sdpa.activated():
        assert torch_attention.current_flash_attention_impl() == "gqa_kernels"
    assert [torch._C._dispatch_dump(f"aten::{op}") for op in ops] == dumps


def test_the_implementation_before_comes_back():
    class Other:
        def remove(self):
            pass

    torch_attention.register_flash_attention_impl("other", register_fn=Other)
    torch_attention.activate_flash_attention_impl("other")
    try:
        with pytest.raises(ZeroDivisionError), torch_sdpa.activated():
            assert torch_attention.current_flash_attention_impl() == "gqa_kernels"
            raise ZeroDivisionError
        assert torch_attention.current_flash_attention_impl() == "other"
    finally:
        torch_attention.restore_flash_attention_impl()
        torch_attention._registry._FLASH_ATTENTION_IMPLS.pop("other")


def test_an_older_torch_imports_and_says_what_is_needed():
    fresh(
        "import torch.nn.attention as a\n"
        "for name in ('register', 'activate', 'restore'):\n"
        "    delattr(a, f'{name}_flash_attention_impl')\n"
        "from gqa_kernels.integrations import torch_sdpa\n"
        "try: torch_sdpa.register()\n"
        "except RuntimeError as error: message = str(error)\n"
        "assert message.startswith('torch: expected 2.13 or newer'), message\n"
    )


def test_importing_it_replaces_nothing():
    fresh(
        "import torch, torch.nn.attention as a\n"
        "before = torch._C._dispatch_dump('aten::_flash_attention_forward')\n"
        "names = a.list_flash_attention_impls()\n"
        "from gqa_kernels.integrations import torch_sdpa\n"
        "assert a.list_flash_attention_impls() == names\n"
        "assert torch._C._dispatch_dump('aten::_flash_attention_forward') == before\n"
    )


@pytest.mark.skipif(KEY == "CPU", reason="torch gives nothing to flash attention without a GPU")
@pytest.mark.parametrize("head_dim", (64, 20))
def test_torchs_own_function_calls_it(head_dim, draw):
    inputs = [draw(2, heads, 33, head_dim, dtype=torch.bfloat16) for heads in (4, 2, 2)]

    def function(*inputs):
        return F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)

    torchs = partial(maths, is_causal=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch_sdpa.activated():
        assert_with_gradients(function, torchs, partial(heads_last, causal=True), inputs)
        out = function(*inputs)
        with pytest.raises(NotImplementedError, match=r"^dropout_p: expected 0\.0; got 0\.5"):
            F.scaled_dot_product_attention(*inputs, dropout_p=0.5, enable_gqa=True)
    if head_dim % 8 == 0:
        ours = gqa_kernels.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
        assert torch.equal(out, ours)
