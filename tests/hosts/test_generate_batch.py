"""Transformers' continuous batching on the kernels: its own manager, scheduler and cache."""

import copy
import pickle
import sys

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from budget import SEED, assert_network
from tiny_transformers import VOCABULARY, cast, double, make, matrix
from torch.nn.utils.rnn import pad_sequence

from gqa_kernels import patch, unpatch
from gqa_kernels.integrations import transformers as adapter

try:
    from gqa_kernels.integrations import transformers_paged as paged
except ImportError:
    paged = None
supported = pytest.mark.skipif(paged is None, reason="Transformers 5.20 or newer is needed")

NEW_TOKENS = 3
LENGTHS = (13, 5)
# Settings of each kind of model that make its window, scale, cap and sinks matter.
KINDS = {
    "Llama": {},
    "Mistral": {},
    "Gemma2": {"attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 2},
    "GptOss": {
        "sliding_window": 6,
        "layer_types": ["full_attention", "sliding_attention"],
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
}
# By default prompts are split into chunks, and a chunk is in one batch with decode steps.
BATCHES = {
    "chunks": {},
    "few pages": {"num_blocks": 5, "max_requests_per_batch": 2},
    "no block table": {"max_blocks_per_request": 0, "max_batch_tokens": 64},
    "padded": {"max_requests_per_batch": 4},
}


def model_of(kind):
    model = make(kind, **KINDS[kind])
    if kind == "GptOss":  # its default product of experts has no float64
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.normal_(std=0.2)
    return model


def prompts(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(SEED + 1)
    return [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def greedy(model, rows):
    """What `generate` adds to each row by itself."""
    device, expected = model.device, []
    for row in rows:
        ids = torch.tensor([row], device=device)
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        expected.append(tokens[0, len(row) :].tolist())
    return expected


def batched(model, rows, *, num_return_sequences=1, **changes):
    """[(tokens, log-probabilities)] of `generate_batch`."""
    sizes = {"page_size": 4, "num_blocks": 32, "max_batch_tokens": 10, "return_logprobs": True}
    config = transformers.ContinuousBatchingConfig(
        **sizes | {"auto_switch_to_flash": False} | changes
    )
    generation = transformers.GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1
    )
    generation.num_return_sequences = num_return_sequences  # greedy: only the manager takes it
    outputs = model.generate_batch(rows, generation, config).values()
    assert [output.error for output in outputs] == [None] * len(rows) * num_return_sequences
    return [(output.generated_tokens, output.logprobs) for output in outputs]


@pytest.fixture
def processors(monkeypatch):
    """The processors of the managers, whose caches begin with NaN in every page."""
    made = []
    create = paged.Manager._create_batch_processor

    def create_poisoned(manager):
        processor = create(manager)
        if processor not in made:
            made.append(processor)
            processor.cache.cache_tensor.view(manager.model.dtype).fill_(float("nan"))
        return processor

    monkeypatch.setattr(paged.Manager, "_create_batch_processor", create_poisoned)
    return made


@pytest.fixture
def calls(monkeypatch):
    """The names of the attention functions that were called."""
    called = set()

    def record(name):
        function = getattr(paged, name)

        def recorded(*args, **options):
            called.add(name)
            return function(*args, **options)

        monkeypatch.setattr(paged, name, recorded)

    for name in ("flash_attention_varlen", "prefill_attention", "decode_attention"):
        record(name)
    return called


def padding(monkeypatch):
    """Pads the rows and the indices of every batch, as for CUDA graphs."""
    create = paged.Manager._create_batch_processor

    def create_padding(manager):
        processor = create(manager)
        processor.model_runner.pad_inputs = True
        return processor

    monkeypatch.setattr(paged.Manager, "_create_batch_processor", create_padding)


@supported
@matrix(1, kind=KINDS, dtype=(torch.float32, torch.bfloat16), batch=BATCHES)
def test_tokens_and_log_probabilities(kind, dtype, batch, device, processors, calls, monkeypatch):
    model, rows = cast(model_of(kind), dtype).to(device), prompts()
    if batch == "padded":
        padding(monkeypatch)
        rows += prompts((2,))  # three requests are padded to four
    ours = copy.deepcopy(model)
    patch(ours, {"attention"})
    results = batched(ours, rows, **BATCHES[batch])
    tokens = [tokens for tokens, _ in results]
    if dtype == torch.float32:
        assert tokens == greedy(model, rows)
    if kind != "Mistral":  # all of whose layers have a window
        assert calls & {"prefill_attention", "decode_attention"}
    # Padding on the right is seen by no other token.
    whole = [torch.tensor(row + new) for row, new in zip(rows, tokens, strict=True)]
    ids = pad_sequence(whole, batch_first=True).to(device)

    def log_probabilities(model):
        scores = model(ids, use_cache=False).logits
        scores = scores if scores.dtype == torch.float64 else scores.float()
        found = scores[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        places = (slice(len(row) - 1, len(row) - 1 + NEW_TOKENS) for row in rows)
        return torch.cat([x[place] for x, place in zip(found, places, strict=True)])

    result = torch.tensor([x for _, found in results for x in found], device=device)
    with torch.no_grad():
        oracle = lambda model: double(model)(log_probabilities)  # noqa: E731
        assert_network(result, model, log_probabilities, oracle)


@supported
def test_pages_are_shared_copied_and_never_gathered(device, processors, monkeypatch):
    """Requests with one prefix share its pages; a second answer to a prompt copies the last one."""
    from transformers.generation.continuous_batching import cache_allocators

    allocator, read, shared = cache_allocators.FullAttentionCacheAllocator, [], []
    update, search = allocator.update, paged.Cache.search_prefix_match

    def update_recorded(self, key, value, layer_idx, read_index, write_index):
        read.append(read_index.numel())
        return update(self, key, value, layer_idx, read_index, write_index)

    def search_recorded(*args):
        shared.append(search(*args))
        return shared[-1]

    model = model_of("Llama").to(device)
    prefix = prompts((9,))[0]
    rows = [[*prefix, 3], [*prefix, 5, 5, 5]]
    expected = greedy(model, rows)
    assert [tokens for tokens, _ in batched(model, rows)] == expected  # Transformers' own
    monkeypatch.setattr(allocator, "update", update_recorded)
    monkeypatch.setattr(paged.Cache, "search_prefix_match", search_recorded)
    patch(model)
    results = batched(model, rows, num_return_sequences=2)
    assert [tokens for tokens, _ in results] == [row for row in expected for _ in range(2)]
    assert max(shared) == 8  # two pages
    assert processors[-1].cache.max_decode_fast_path_length  # block tables in decode steps
    assert read
    assert not any(read)


@supported
def test_a_copy_batches_its_own_model(device):
    model = model_of("Llama").to(device)
    patch(model, {"attention"})
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert vars(twin)["init_continuous_batching"].args == (twin,)
        unpatch(twin)
        assert "init_continuous_batching" not in vars(twin)


@supported
def test_a_model_in_use_refuses_other_calls_until_its_manager_stops(device):
    model = model_of("Llama").to(device)
    ids = torch.tensor(prompts((5,)), device=device)
    adapter.register()
    model.set_attn_implementation(adapter.ATTENTION_NAME)
    patch(model, {"attention"})
    expected = model(ids).logits
    config = transformers.ContinuousBatchingConfig(page_size=4, num_blocks=8, max_batch_tokens=8)
    generation = transformers.GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1)
    manager = model.init_continuous_batching(generation, config)
    with pytest.raises(ValueError, match="write_index: expected continuous batching's arguments"):
        model(ids)
    manager.stop()  # it was never started
    assert torch.equal(model(ids).logits, expected)
    tokens = greedy(model, ids.tolist())[0][:2]
    for _ in range(2):  # a manager may be started again
        manager.start()
        manager.add_request(ids[0].tolist(), request_id="one")
        assert manager.get_result("one", timeout=60).generated_tokens == tokens
        manager.stop()
        assert torch.equal(model(ids).logits, expected)
    assert config.max_blocks_per_request is None  # the caller's is not changed


@supported
@pytest.mark.parametrize("change", [unpatch, lambda model: model.set_attn_implementation("sdpa")])
def test_a_kept_manager_keeps_its_attention(change, device):
    model = model_of("Llama").to(device)
    patch(model, {"attention"})
    ids = torch.tensor(prompts((5,)), device=device)
    expected = greedy(model, ids.tolist())
    generation = transformers.GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1)
    config = transformers.ContinuousBatchingConfig(
        page_size=4, num_blocks=8, max_batch_tokens=8, auto_switch_to_flash=False
    )

    def tokens():
        results = model.generate_batch(ids.tolist(), generation, config, persistent_manager=True)
        return [result.generated_tokens for result in results.values()]

    assert tokens() == expected
    change(model)
    name, logits = model.config._attn_implementation, model(ids).logits
    assert tokens() == expected
    assert model.config._attn_implementation == name and torch.equal(model(ids).logits, logits)


@supported
def test_an_attention_that_is_set_while_a_manager_is_in_use_fails_its_requests(device):
    model = model_of("Llama").to(device)
    patch(model, {"attention"})
    generation = transformers.GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1)
    config = transformers.ContinuousBatchingConfig(page_size=4, num_blocks=8, max_batch_tokens=8)
    manager = model.init_continuous_batching(generation, config)
    unpatch(model)
    manager.add_request(prompts((5,))[0], request_id="one")
    manager.start()
    error = manager.get_result("one", timeout=60).error
    manager.stop()
    assert "model: expected the attention gqa_kernels_paged_flash while" in str(error)
    assert model.config._attn_implementation == "eager"


@supported
def test_refused_settings_leave_the_model_as_it_was(device, monkeypatch):
    model = model_of("Llama").to(device)
    patch(model, {"attention"})
    with pytest.raises(NotImplementedError, match="a page_size that is a power of two; got 6"):
        batched(model, prompts(), page_size=6)
    assert model.config._attn_implementation == adapter.ATTENTION_NAME

    def fail(manager):
        raise MemoryError

    monkeypatch.setattr(paged.Manager, "_create_batch_processor", fail)
    with pytest.raises(MemoryError):
        batched(model, prompts())
    assert model.config._attn_implementation == adapter.ATTENTION_NAME


@supported
def test_an_attention_that_was_set_later_keeps_its_manager(device):
    model = model_of("Llama").to(device)
    patch(model, {"attention"})
    model.set_attn_implementation("sdpa")
    manager = model.init_continuous_batching(transformers.GenerationConfig(eos_token_id=-1))
    assert type(manager) is transformers.ContinuousBatchingManager
    assert model.config._attn_implementation == "sdpa"


def test_other_versions_of_transformers_are_named(device, monkeypatch):
    model = make("Llama").to(device)
    patch(model, {"attention"})
    monkeypatch.setitem(sys.modules, "gqa_kernels.integrations.transformers_paged", None)
    monkeypatch.delattr("gqa_kernels.integrations.transformers_paged", raising=False)
    with pytest.raises(RuntimeError, match=r"transformers: expected 5\.20 or newer .* got "):
        model.generate_batch(prompts())
