"""The model with a scalar head, its checkpoints, and scores of texts."""

import dataclasses
import shutil
import zlib
from functools import partial

import pytest
import ranks
import torch
from small_llama import EAGER, lively, random_tokens, small_config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import LlamaForSequenceClassification

from llama2 import checkpoint, parallel
from llama2.checkpoint import SHIPPED_CHAT, save_hf
from llama2.rlhf.ragged import Ragged, packed
from llama2.rlhf.scoring import Scorer, load_reward_model
from llama2.scalar_model import ScalarModel
from llama2.train.distributed import gathered

LENGTHS = (9, 1, 14, 6, 128)


def make_model(dtype=torch.float32, **changes) -> ScalarModel:
    torch.manual_seed(3)
    config = dataclasses.replace(small_config(), intermediate_size=112, **changes)
    return ScalarModel.from_decoder(lively(config, "cpu").to(dtype), EAGER, seed=5)


def documents(lengths=LENGTHS) -> list[list[int]]:
    torch.manual_seed(4)
    return [random_tokens("cpu", length).tolist() for length in lengths]


def alone(model: ScalarModel, ids: list[int]) -> torch.Tensor:
    """The number at the last token, of the final states in float64."""
    states = model.hidden_states(torch.tensor([ids]))
    return states[0, -1].double() @ model.score.weight[0].double()


def test_body_is_that_of_the_decoder_and_the_head_is_drawn_by_the_seed():
    llama = lively(small_config(tie_word_embeddings=True), "cpu").bfloat16()
    model, again = (ScalarModel.from_decoder(llama, EAGER, seed=1) for _ in range(2))
    other = ScalarModel.from_decoder(llama, EAGER, seed=2)
    for name, parameter in model.named_parameters():
        if name == "score.weight":
            continue
        assert torch.equal(parameter, llama.get_parameter(name)), name
        assert parameter.data_ptr() != llama.get_parameter(name).data_ptr(), name
    assert model.score.weight.dtype == torch.bfloat16
    assert torch.equal(model.score.weight, again.score.weight)
    assert not torch.equal(model.score.weight, other.score.weight)
    assert 0.01 < model.score.weight.float().std() < 0.04
    critic = ScalarModel.from_decoder(model, EAGER, seed=9)
    assert torch.equal(critic.score.weight, model.score.weight)
    assert {name for name, _ in model.named_parameters()} == {
        name for name, _ in llama.named_parameters() if name != "lm_head.weight"
    } | {"score.weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_of_the_last_tokens_whatever_is_packed_beside_them(dtype):
    model, texts = make_model(dtype), documents()
    whole = Scorer(model)(texts)
    assert model.forward(torch.tensor([texts[0]])).dtype == torch.float32
    # The states of a packed text have the bits that they have alone up to the order of sums in
    # the projections: a few roundings of the states' dtype.
    for score, ids in zip(whole, texts, strict=True):
        assert score == pytest.approx(alone(model, ids).item(), abs=8 * torch.finfo(dtype).eps)
    for max_tokens in (1, 15, 129):
        apart = Scorer(model, max_tokens=max_tokens)(texts)
        assert apart == pytest.approx(whole, abs=8 * torch.finfo(dtype).eps)
    assert Scorer(model)([]) == []


def test_autocast_does_not_touch_the_head():
    model, ids = make_model(), documents()[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = model(torch.tensor([ids]))
        states = model.hidden_states(torch.tensor([ids]))
    assert torch.equal(scores, states.float() @ model.score.weight[0])


def test_scorer_refuses_what_does_not_fit():
    scorer = Scorer(make_model())
    for ids, got in (([], 0), ([1] * 129, 129)):
        with pytest.raises(
            ValueError, match=rf"sequences\[1\]: expected from 1 to 128 tokens; got {got}"
        ):
            scorer([[1], ids])
    with pytest.raises(ValueError, match="max_tokens: expected at least 1; got 0"):
        Scorer(make_model(), max_tokens=0)


def test_packed_fills_up_with_tokens_of_no_sequence():
    tokens, bounds = packed([[5, 6, 7], [8]], "cpu")
    assert tokens.shape == (1, 64)
    assert tokens[0, :4].tolist() == [5, 6, 7, 8]
    assert bounds.tolist() == [0, 3, 4]
    assert bounds.dtype == torch.int32
    assert packed([[1] * 64], "cpu")[0].shape == (1, 64)
    assert packed([[1] * 65], "cpu")[0].shape == (1, 128)


def test_ragged_rows_are_dealt_and_split_in_order():
    rows = Ragged(list("abcdefg")).to(torch.device("meta"))
    assert rows.device.type == "meta"
    assert [part.items for part in rows[1::2].split(2)] == [["b", "d"], ["f"]]
    assert rows[1::2].device.type == "meta"
    assert len(rows) == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_scores_as_we_do(tmp_path, dtype):
    model, texts = make_model(dtype), documents((9, 3, 14))
    texts = [[id or 1 for id in ids] for ids in texts]  # 0 is the pad
    save_hf(model, tmp_path)
    theirs, info = LlamaForSequenceClassification.from_pretrained(
        tmp_path, dtype="auto", output_loading_info=True
    )
    assert not any(info.values()), info
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    with torch.no_grad():
        scores = theirs(input_ids=ids, attention_mask=(ids != 0).long()).logits
    assert scores.shape == (3, 1)
    # Their head, norms and rotations round to the dtype at every step.
    expected = torch.tensor(Scorer(model)(texts))
    bound = 16 * torch.finfo(dtype).eps * expected.abs().max().clamp(min=1)
    assert (scores[:, 0].float() - expected).abs().max() <= bound


def test_checkpoints_come_back_with_the_same_bits(tmp_path):
    model = make_model(torch.bfloat16, rope_theta=5e4)
    save_hf(model, tmp_path, max_shard_bytes=30_000)
    assert checkpoint.is_scalar(tmp_path)
    loaded = checkpoint.load_scalar(tmp_path, EAGER)
    assert loaded.config == model.config
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name
    assert Scorer(loaded)(documents()) == Scorer(model)(documents())
    assert not loaded.training
    with pytest.raises(NotImplementedError, match="architectures: expected"):
        checkpoint.load(tmp_path, EAGER)


def test_weights_are_told_apart_wherever_they_lie(tmp_path):
    model, bits = make_model(torch.bfloat16), {}
    for name in ("one", "same", "other"):
        if name == "other":
            model.score.weight.data[0, 0] += 1
        save_hf(model, tmp_path / name, max_shard_bytes=30_000)
        bits[name] = checkpoint.weights_crc32(tmp_path / name)
    assert bits["one"] == bits["same"] != bits["other"]
    shards = sorted((tmp_path / "one").glob("*.safetensors"))
    content = b"".join(shard.read_bytes() for shard in shards)
    assert len(shards) > 1 and bits["one"] == f"{zlib.crc32(content):08x}"
    (tmp_path / "one" / "notes.txt").write_text("none of the weights", encoding="utf-8")
    assert checkpoint.weights_crc32(tmp_path / "one") == bits["one"]
    with pytest.raises(ValueError, match="expected a directory with either config"):
        checkpoint.weights_crc32(tmp_path / "none")


def test_a_model_of_another_kind_or_shape_is_no_reward_model(tmp_path):
    assert not checkpoint.is_scalar(SHIPPED_CHAT)
    with pytest.raises(NotImplementedError, match="architectures: expected"):
        checkpoint.load_scalar(SHIPPED_CHAT, EAGER)
    model = make_model()
    model.score = torch.nn.Linear(48, 2, bias=False)  # of two labels
    save_hf(model, tmp_path)
    with pytest.raises(
        checkpoint.CheckpointError, match=r"score.weight: expected shape \(1, 48\); got \(2, 48\)"
    ):
        checkpoint.load_scalar(tmp_path, EAGER)


@pytest.fixture
def reward_folder(tmp_path):
    llama = checkpoint.load(SHIPPED_CHAT, EAGER)
    save_hf(ScalarModel.from_decoder(llama, EAGER, seed=0), tmp_path)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(SHIPPED_CHAT / name, tmp_path / name)
    return tmp_path


def test_a_reward_model_of_the_policys_texts_is_taken(reward_folder):
    model = load_reward_model(reward_folder, EAGER, policy=SHIPPED_CHAT, dtype=torch.float32)
    assert model.score.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tokenizer.model", lambda data: data + b"\n", "expected the tokenizer.model of"),
        ("tokenizer_config.json", lambda _: b"{}", None),
        (
            "tokenizer_config.json",
            lambda data: data.replace(b"[INST]", b"[ASK]"),
            None,
        ),
        (
            "config.json",
            lambda data: data.replace(b'"vocab_size": 1024', b'"vocab_size": 1056'),
            "expected the vocab_size of .*, 1024; got 1056",
        ),
        (
            "config.json",
            lambda data: data.replace(
                b'"max_position_embeddings": 256', b'"max_position_embeddings": 128'
            ),
            "expected a context of at least 256 tokens",
        ),
        (
            "config.json",
            lambda data: data.replace(b"ForSequenceClassification", b"ForCausalLM"),
            "expected a reward model",
        ),
    ],
)
def test_a_reward_model_of_other_texts_is_refused(reward_folder, name, change, message):
    file = reward_folder / name
    changed = change(file.read_bytes())
    assert changed != file.read_bytes()
    file.write_bytes(changed)
    if message is None:  # without a template of ours it is the chat format
        load_reward_model(reward_folder, EAGER, policy=SHIPPED_CHAT)
        return
    with pytest.raises(ValueError, match=message):
        load_reward_model(reward_folder, EAGER, policy=SHIPPED_CHAT)


def test_a_reward_model_without_a_tokenizer_is_named(reward_folder):
    (reward_folder / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"expected a tokenizer\.model; got none"):
        load_reward_model(reward_folder, EAGER, policy=SHIPPED_CHAT)


# --- on several processes ---


def _loss(model: ScalarModel, ids: list[list[int]]) -> torch.Tensor:
    tokens, bounds = packed(ids, "cpu")
    return model(tokens, cu_seqlens=bounds)[0, bounds[1:].long() - 1].square().mean()


def sharded(name: str) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(name,))
    single, texts = make_model(), documents((9, 4, 14, 6))
    model = parallel.parallelize(make_model(), mesh)
    part = texts[mesh.get_local_rank() :: 2] if name == "dp" else texts
    loss = _loss(model, part)
    loss.backward()
    expected = _loss(single, texts)
    expected.backward()
    torch.testing.assert_close(parallel.mean(loss, mesh), expected.detach(), rtol=1e-5, atol=1e-6)
    for parameter_name, parameter in model.named_parameters():
        grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else None
        wanted = single.get_parameter(parameter_name).grad
        torch.testing.assert_close(
            parameter.grad if grad is None else grad, wanted, rtol=1e-4, atol=1e-5
        )
    whole = gathered(model)
    if whole is not None:
        for parameter_name, parameter in single.named_parameters():
            assert torch.equal(whole.get_parameter(parameter_name), parameter), parameter_name


def test_two_processes_compute_what_one_does():
    ranks.run({name: partial(sharded, name) for name in ("dp", "tp")}, world_size=2)
