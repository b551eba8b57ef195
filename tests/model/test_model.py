"""The model against transformers' Llama, and against itself in other shapes of call."""

import copy
import dataclasses
import pickle

import pytest
import torch
from budget import assert_network
from small_llama import (
    EAGER,
    gradients,
    lively,
    loss_alone,
    packed,
    random_documents,
    random_tokens,
    right_padded,
    small_config,
    twin,
)
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gqa_kernels.positions import packed_positions, rope_table
from llama2 import PUBLISHED, KVCache, Llama2
from llama2.generate import generate

# (query heads, key/value heads, head_dim): MHA, GQA by 2 and by 3, MQA; an odd width.
HEADS = [(4, 4, 16), (4, 2, 16), (6, 2, 8), (4, 1, 16), (2, 1, 80)]


def hugging_face(model: Llama2) -> LlamaForCausalLM:
    config = model.config
    hf = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_q_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            attn_implementation="eager",
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    weights = {
        name if name.startswith("lm_head") else f"model.{name}": weight
        for name, weight in model.state_dict().items()
    }
    hf.load_state_dict(weights)
    return hf.to(model.lm_head.weight.device).eval()


def assert_is_hugging_faces(model: Llama2, tokens: Tensor) -> None:
    assert_network(
        model(tokens),
        model,
        lambda model: hugging_face(model)(tokens).logits,
        lambda model: twin(model, dtype=torch.float64)(tokens),
    )


@pytest.mark.parametrize("heads", HEADS, ids=str)
@torch.no_grad()
def test_logits_are_hugging_faces(heads, device):
    model = lively(small_config(*heads), device)
    tokens = random_tokens(device, 2, 63)
    assert_is_hugging_faces(model, tokens)


@pytest.mark.parametrize("changes", [{"rope_theta": 1e6}, {"norm_eps": 1e-2}], ids=str)
@torch.no_grad()
def test_constants_reach_the_network(changes, device):
    model = lively(small_config(**changes), device)
    tokens = random_tokens(device, 1, 40)
    assert_is_hugging_faces(model, tokens)
    oracle = twin(model, dtype=torch.float64)(tokens)
    default = Llama2(small_config(), EAGER).to(device)
    default.load_state_dict(model.state_dict())
    assert (default(tokens) - oracle).abs().max() > 1e-2


@pytest.mark.parametrize("heads", HEADS[:4], ids=str)
@torch.no_grad()
def test_ragged_prefill_is_hugging_faces_left_padding(heads, device):
    model = lively(small_config(*heads), device)
    prompts = [random_tokens(device, length) for length in (5, 17, 1)]
    tokens, num_valid = right_padded(prompts)
    mask = torch.arange(17, device=device) >= 17 - num_valid[:, None]
    left = torch.zeros_like(tokens)
    left[mask] = torch.cat(prompts)
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def theirs(model: Llama2) -> Tensor:
        hf = hugging_face(model)
        return hf(left, attention_mask=mask.long(), position_ids=positions).logits[:, -1]

    def last_logits(model: Llama2) -> Tensor:
        cache = KVCache(model.config, 3, 17, dtype=model.lm_head.weight.dtype, device=tokens.device)
        logits = model(tokens, cache, num_valid)
        assert cache.seq_lens.tolist() == [5, 17, 1]
        return logits[torch.arange(3, device=device), num_valid - 1]

    def oracle(model: Llama2) -> Tensor:
        return last_logits(twin(model, dtype=torch.float64))

    assert_network(last_logits(model), model, theirs, oracle)


@pytest.mark.parametrize("heads", HEADS[:4], ids=str)
def test_greedy_tokens_are_hugging_faces(heads, device):
    model = lively(small_config(*heads), device)
    prompts = [random_tokens(device, length) for length in (5, 17, 1)]
    mask = torch.arange(17, device=device) >= torch.tensor([[12], [0], [16]], device=device)
    left = torch.zeros(3, 17, dtype=torch.long, device=device)
    left[mask] = torch.cat(prompts)
    theirs = hugging_face(model).generate(
        left, attention_mask=mask.long(), max_new_tokens=24, do_sample=False, pad_token_id=0
    )
    ours = generate(model, [p.tolist() for p in prompts], max_new_tokens=24)
    assert ours == theirs[:, 17:].tolist()


def assert_is_one_forward(logits: Tensor, model: Llama2, tokens: Tensor) -> None:
    """Logits of the last tokens are those of a forward pass over all."""

    def last(model: Llama2) -> Tensor:
        return model(tokens)[:, -logits.shape[1] :]

    assert_network(logits, model, last, lambda model: last(twin(model, dtype=torch.float64)))


@pytest.mark.parametrize("chunk", [1, 3, 16])
@torch.no_grad()
def test_prefill_and_decode_are_one_forward(chunk, device):
    model = lively(small_config(), device)
    tokens = random_tokens(device, 2, 40)
    cache = KVCache(model.config, 2, 40, dtype=torch.float32, device=device)
    parts = [tokens[:, :8], *tokens[:, 8:].split(chunk, dim=1)]
    cached = torch.cat([model(part, cache) for part in parts], dim=1)
    assert cache.seq_lens.tolist() == [40, 40]
    assert_is_one_forward(cached, model, tokens)


@torch.no_grad()
def test_ragged_rows_decode_as_if_alone(device):
    model = lively(small_config(), device)
    prompts = [random_tokens(device, length) for length in (3, 11, 7)]
    later = random_tokens(device, 3, 10)
    tokens, num_valid = right_padded(prompts)
    cache = KVCache(model.config, 3, 21, dtype=torch.float32, device=device)
    # What lies beyond a sequence's length must not matter, be it NaN.
    cache.keys.fill_(float("nan"))
    cache.values.fill_(float("nan"))
    model(tokens, cache, num_valid)
    steps = torch.cat([model(later[:, i : i + 2], cache) for i in range(0, 10, 2)], dim=1)
    for row, prompt in enumerate(prompts):
        assert_is_one_forward(steps[row : row + 1], model, torch.cat([prompt, later[row]])[None])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_packed_positions_restart(dtype, device):
    tokens, cu_seqlens = packed(random_documents(device), after=3, dtype=dtype)
    positions = packed_positions(cu_seqlens, tokens.shape[1])
    assert positions.dtype == dtype
    assert positions.tolist() == [[*range(9), 0, *range(6), 0, 0, 0]]
    beyond = torch.tensor([0, 2, 50, 60], dtype=dtype, device=device)
    assert packed_positions(beyond, tokens.shape[1]).tolist() == [[0, 1, *range(17)]]


@pytest.mark.parametrize("after", [0, 3])
@torch.no_grad()
def test_packed_states_are_those_of_documents_alone(after, device):
    model = twin(lively(small_config(), device), dtype=torch.float64)
    documents = random_documents(device)
    tokens, cu_seqlens = packed(documents, after)
    states = model.hidden_states(tokens, cu_seqlens=cu_seqlens)
    alone = torch.cat([model.hidden_states(x[None]) for x in documents], dim=1)
    assert (states[:, :16] - alone).norm() <= 1e-12 * alone.norm()
    assert states.shape[1] == 16 + after and states.isfinite().all()
    assert model(tokens, cu_seqlens=cu_seqlens).equal(model.lm_head(states))


@pytest.mark.parametrize("after", [0, 3])
def test_packed_loss_is_the_mean_over_documents_alone(after, device):
    model = twin(lively(small_config(), device), dtype=torch.float64)
    documents = random_documents(device)
    tokens, cu_seqlens = packed(documents, after)
    loss, alone = model.loss(tokens, cu_seqlens=cu_seqlens), loss_alone(model, documents)
    assert_same_loss_and_gradients(model, loss, alone)


def test_padded_loss_is_the_mean_over_documents_alone(device):
    model = twin(lively(small_config(), device), dtype=torch.float64)
    documents = random_documents(device)
    tokens, num_valid = right_padded(documents)
    loss, alone = model.loss(tokens, num_valid=num_valid), loss_alone(model, documents)
    assert_same_loss_and_gradients(model, loss, alone)


def assert_same_loss_and_gradients(model: Llama2, loss: Tensor, expected: Tensor) -> None:
    assert abs(loss - expected) <= 1e-12 * expected
    ours, theirs = gradients(model, loss), gradients(model, expected)
    for name, gradient in theirs.items():
        assert gradient.abs().max() > 0, name
        assert (ours[name] - gradient).norm() <= 1e-12 * gradient.norm(), name


def test_padded_loss_without_padding_is_the_plain_loss(device):
    model = lively(small_config(), device)
    tokens = random_tokens(device, 2, 12)
    full = torch.tensor([12, 12], device=device)
    assert model.loss(tokens, num_valid=full).equal(model.loss(tokens))


def test_packed_tokens_may_be_more_than_max_seq_len(device):
    model = twin(lively(small_config(), device), dtype=torch.float64)
    documents = [random_tokens(device, length) for length in (128, 60)]
    tokens, cu_seqlens = packed(documents)
    loss, alone = model.loss(tokens, cu_seqlens=cu_seqlens), loss_alone(model, documents)
    assert abs(loss - alone) <= 1e-12 * alone
    # No error can be raised for a document that is too long: its states say it.
    tokens, cu_seqlens = packed([random_tokens(device, 10), random_tokens(device, 129)])
    states = model.hidden_states(tokens, cu_seqlens=cu_seqlens)
    assert states[:, :10].isfinite().all() and states[:, -1].isnan().all()


def test_many_tokens_after_the_last_document_have_a_position(device):
    model = lively(small_config(), device)
    tokens, cu_seqlens = packed(random_documents(device), after=130)
    loss = model.loss(tokens, cu_seqlens=cu_seqlens)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(model, loss).values())


def test_nothing_to_predict_is_nan(device):
    model = lively(small_config(), device)
    tokens, cu_seqlens = packed([random_tokens(device, 1) for _ in range(3)])
    assert model.loss(tokens, cu_seqlens=cu_seqlens).isnan()
    assert model.loss(tokens, num_valid=torch.tensor([1], device=device)).isnan()


@torch.no_grad()
def test_impossible_packed_or_padded_calls_are_refused(device):
    model = Llama2(small_config(), EAGER).to(device)
    tokens, cu_seqlens = packed(random_documents(device))
    cache = KVCache(model.config, 1, 40, dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match="cu_seqlens: expected packed sequences without a cache"):
        model(tokens, cache, cu_seqlens=cu_seqlens)
    assert cache.num_written == 0
    for call in (model, model.loss):
        with pytest.raises(ValueError, match=r"tokens: expected \[1, total\] .* got \[2, 16\]"):
            call(tokens.expand(2, -1), cu_seqlens=cu_seqlens)
        with pytest.raises(
            TypeError, match=r"cu_seqlens: expected dtype int32, int64; got .*float32"
        ):
            call(tokens, cu_seqlens=cu_seqlens.float())
        for wrong in (cu_seqlens[:1], cu_seqlens[None]):
            with pytest.raises(ValueError, match=r"cu_seqlens: expected (shape|the bounds of one)"):
                call(tokens, cu_seqlens=wrong)
    with pytest.raises(ValueError, match="num_valid: expected none with cu_seqlens; got both"):
        model.loss(tokens, num_valid=cu_seqlens[:1], cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match=r"num_valid: expected shape \[1\]; got \[5\]"):
        model.loss(tokens, num_valid=cu_seqlens)


@torch.no_grad()
def test_interleaved_rope_is_a_permutation_of_the_weights(device):
    half = lively(small_config(), device)
    interleaved = Llama2(dataclasses.replace(half.config, rope_interleaved=True), EAGER).to(device)
    interleaved.load_state_dict(half.state_dict())
    for layer in interleaved.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            weight = projection.weight  # feature i of a half goes to 2i, of the other to 2i + 1
            weight.copy_(weight.view(-1, 2, 8, 48).transpose(1, 2).reshape(weight.shape))
    tokens = random_tokens(device, 2, 50)
    assert_is_one_forward(interleaved(tokens), half, tokens)


def test_reset_weights_owe_nothing_to_what_memory_held():
    models = []
    for held in (float("nan"), 7.0):
        model = Llama2(small_config(4, 2), EAGER)
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, held)
        torch.manual_seed(0)
        model.reset_parameters()
        models.append(dict(model.named_parameters()))
    for name, parameter in models[0].items():
        assert parameter.equal(models[1][name]), name
        assert ("norm" in name) == bool((parameter == 1).all()), name


def test_training_reduces_the_loss(device):
    model = Llama2(small_config(), EAGER).to(device)
    tokens = random_tokens(device, 4, 33)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model.loss(tokens)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # An untrained model knows nothing: log(vocab_size) nats.
    assert abs(losses[0] - torch.tensor(97.0).log().item()) < 0.1
    assert losses[-1] < losses[0] - 0.5


def test_every_parameter_gets_a_gradient(device):
    model = lively(small_config(), device)
    model.loss(random_tokens(device, 2, 20)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_cast_model_keeps_its_float32_rope_table(dtype, device):
    model = Llama2(small_config(), EAGER).to(device).to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    config = model.config
    cos, sin = rope_table(config.head_dim, config.max_seq_len, config.rope_theta, device=device)
    assert model.rope.cos.dtype == model.rope.sin.dtype == torch.float32
    assert model.rope.cos.device.type == device.type
    assert torch.equal(model.rope.cos, cos) and torch.equal(model.rope.sin, sin)
    assert not any(name.startswith("rope") for name in model.state_dict())


@torch.no_grad()
def test_a_model_can_be_copied_and_pickled(device):
    model = lively(small_config(), device)
    tokens = random_tokens(device, 1, 5)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(tokens), model(tokens))
        assert other.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()


@torch.no_grad()
def test_no_sequences_and_no_tokens(device):
    model = Llama2(small_config(), EAGER).to(device)
    for shape in ((0, 5), (2, 0)):
        tokens = torch.zeros(shape, dtype=torch.long, device=device)
        assert model(tokens).shape == (*shape, model.config.vocab_size)


@torch.no_grad()
def test_a_cache_of_another_batch_or_dtype_is_refused(device):
    model = Llama2(small_config(), EAGER).to(device)
    tokens = random_tokens(device, 1, 5)
    cache = KVCache(model.config, 3, 10, dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match="tokens: expected the cache's batch of 3; got 1"):
        model(tokens, cache)
    with pytest.raises(TypeError, match=r"cache: expected the model.s dtype torch\.float32"):
        model(tokens, KVCache(model.config, 1, 10, dtype=torch.bfloat16, device=device))
    assert cache.num_written == 0


@torch.no_grad()
def test_wrong_shapes_are_refused(device):
    model = Llama2(small_config(), EAGER).to(device)
    tokens = random_tokens(device, 2, 20)
    cache = KVCache(model.config, 2, 40, dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match=r"tokens: expected \[batch, seq_len\]; got \[20\]"):
        model(tokens[0])
    with pytest.raises(ValueError, match=r"num_valid: expected shape \[2\]; got \[1\]"):
        model(tokens, cache, torch.tensor([3], device=device))
    with pytest.raises(ValueError, match="num_valid: expected only with an empty cache"):
        model(tokens, None, torch.tensor([3, 4], device=device))
    with pytest.raises(ValueError, match=r"tokens: expected .* seq_len ≥ 1"):
        model.loss(tokens[:, :1])


def test_tied_embeddings_are_one_parameter(device):
    model = Llama2(small_config(tie_word_embeddings=True), EAGER).to(device)
    assert model.lm_head.weight is model.embed_tokens.weight
    names = [name for name, _ in model.named_parameters()]
    assert "embed_tokens.weight" in names and "lm_head.weight" not in names


@pytest.mark.parametrize(
    ("name", "parameters"),
    # 7B, 13B and 70B as released; 34B from Code Llama's shape.
    [("7B", 6738415616), ("13B", 13015864320), ("34B", 33743970304), ("70B", 68976648192)],
)
def test_published_parameter_counts(name, parameters):
    with torch.device("meta"):
        assert torch.empty(1).is_meta, "or the model would be built in memory"
        model = Llama2(PUBLISHED[name], EAGER)
    assert sum(p.numel() for p in model.parameters()) == parameters


@torch.no_grad()
def test_too_many_tokens_are_refused(device):
    model = Llama2(small_config(), EAGER).to(device)
    with pytest.raises(ValueError, match=r"tokens: expected at most max_seq_len \(128\).* got 129"):
        model(random_tokens(device, 1, 129))
    cache = KVCache(model.config, 1, 10, dtype=torch.float32, device=device)
    model(random_tokens(device, 1, 7), cache)
    with pytest.raises(ValueError, match=r"tokens: expected at most 3 more .* got 4"):
        model(random_tokens(device, 1, 4), cache)
    assert cache.seq_lens.tolist() == [7] and cache.num_written == 7
    with pytest.raises(ValueError, match="capacity: expected from 1 to max_seq_len"):
        KVCache(model.config, 1, 129, dtype=torch.float32, device=device)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, r"num_q_heads: expected a multiple of num_kv_heads \(3\); got 4"),
        ({"head_dim": 15}, "head_dim: expected an even number"),
        ({"num_layers": 0}, "num_layers: expected an int from 1 to 2147483647; got 0"),
        ({"vocab_size": 32.0}, "vocab_size: expected an int from 1 to 2147483647; got 32.0"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(small_config(), **changes)
