"""Checkpoints against those that transformers saves, synthetic ones of Meta's, and broken ones."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from gqa_kernels.backends import get_backend
from llama2 import PUBLISHED, KVCache, Llama2, ModelConfig
from llama2.checkpoint import CheckpointError, load, load_config, save_hf, save_meta
from llama2.checkpoint import hf as hf_checkpoint

OPS = get_backend("eager")
VOCAB, HIDDEN, FFN, LAYERS, Q_HEADS, SEQ_LEN = 96, 64, 176, 2, 8, 24
HEAD_DIM = HIDDEN // Q_HEADS
TOKENS = torch.randint(0, VOCAB, (2, SEQ_LEN), generator=torch.Generator().manual_seed(0))
Q, K = "layers.0.self_attn.q_proj.weight", "layers.0.self_attn.k_proj.weight"
HF_Q = f"model.{Q}"
META_Q = "layers.0.attention.wq.weight"


@torch.no_grad()
def randomized(model):
    """Draws weights large enough for attention, and so for RoPE, to weigh in the logits."""
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.normal_(std=0.25)
        else:
            weight.uniform_(0.5, 1.5)
    return model


def hf_model(num_kv_heads=2, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=Q_HEADS,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=64,
        **{"rms_norm_eps": 1e-5, **settings},
    )
    return randomized(LlamaForCausalLM(config).eval()).to(dtype)


def our_model(config=None, dtype=torch.float32, **changes):
    torch.manual_seed(1)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_layers": LAYERS,
        "num_q_heads": Q_HEADS,
        "num_kv_heads": 4,
        "head_dim": HEAD_DIM,
        "max_seq_len": 64,
    }
    return randomized(Llama2(config or ModelConfig(**{**sizes, **changes}), OPS)).to(dtype).eval()


@torch.no_grad()
def logits_of(model, tokens=TOKENS):
    out = model(tokens)
    return getattr(out, "logits", out)


def error_bound(exact):
    """γₙ = n · u of float32 for the longest chain of roundings, in units of the largest logit."""
    roundings = LAYERS * (2 * HIDDEN + FFN + SEQ_LEN) + HIDDEN
    return roundings * torch.finfo(torch.float32).eps / 2 * exact.abs().max()


def assert_equal_logits(path, theirs):
    """Ours is at most twice as far from the float64 model as theirs, plus one rounding."""
    exact = logits_of(load(path, OPS, dtype=torch.float64))
    ours = logits_of(load(path, OPS, dtype=torch.float32))
    assert (theirs - exact).abs().max() <= error_bound(exact)
    rounding = torch.finfo(torch.float32).eps / 2 * rms(exact)
    assert rms(ours - exact) <= 2 * rms(theirs - exact) + rounding


def rms(x):
    return x.square().mean().sqrt()


@torch.no_grad()
def greedy(model, prompt, num_tokens):
    cache = KVCache(model.config, len(prompt), 64, dtype=torch.float32, device="cpu")
    sequence, step = prompt, prompt
    for _ in range(num_tokens):
        step = model(step, cache)[:, -1:].argmax(-1)
        sequence = torch.cat([sequence, step], dim=1)
    return sequence


def assert_same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype, name
        assert torch.equal(first[name], second[name]), name


# --- Hugging Face's directories ---


@pytest.mark.parametrize(
    ("num_kv_heads", "dtype", "shard_size", "tied"),
    [
        (8, torch.float32, "5GB", False),
        (8, torch.bfloat16, "40KB", False),
        (4, torch.float32, "40KB", True),
        (2, torch.bfloat16, "5GB", False),
        (2, torch.float32, "100KB", False),
        (1, torch.float32, "5GB", True),
        (1, torch.bfloat16, "40KB", True),
    ],
)
def test_loads_what_transformers_saved(tmp_path, num_kv_heads, dtype, shard_size, tied):
    hf = hf_model(num_kv_heads, dtype, tie_word_embeddings=tied, rope_theta=5e4)
    hf.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors").exists() == (shard_size == "5GB")

    model = load(tmp_path, OPS)
    assert not model.training
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert model.config == load_config(tmp_path)
    assert (model.config.num_kv_heads, model.config.rope_theta) == (num_kv_heads, 5e4)
    for name, weight in model.state_dict().items():
        prefix = "" if name.startswith("lm_head") else "model."
        assert torch.equal(weight, hf.state_dict()[prefix + name]), name

    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert_equal_logits(tmp_path, logits_of(theirs))
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(
        TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=12, do_sample=False
    )
    ours = load(tmp_path, OPS, dtype=torch.float32)
    assert torch.equal(greedy(ours, TOKENS, 12), expected)


def test_the_bound_on_logits_sees_the_rope_layout(tmp_path):
    hf_model().save_pretrained(tmp_path)
    model = load(tmp_path, OPS)
    right = logits_of(model)
    for layer in model.layers:
        layer.self_attn.rope_interleaved = True
    assert (logits_of(model) - right).abs().max() > 1000 * error_bound(right)


@pytest.mark.parametrize("sharded", [False, True])
def test_loads_pytorch_bins_with_old_buffers(tmp_path, sharded):
    hf = hf_model()
    hf.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = hf.state_dict()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(HEAD_DIM // 2)
    if sharded:
        weight_map = {}
        for number in range(2):
            part = dict(list(state.items())[number::2])
            torch.save(part, tmp_path / f"pytorch_model-{number}.bin")
            weight_map |= dict.fromkeys(part, f"pytorch_model-{number}.bin")
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (tmp_path / "pytorch_model.bin.index.json").write_text(index, encoding="utf-8")
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    assert_equal_logits(tmp_path, logits_of(hf))


def test_rotary_table_is_real_float32_after_load(tmp_path):
    hf_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = load(tmp_path, OPS, max_seq_len=100)
    assert model.config.max_seq_len == 100
    expected = our_model(model.config).rope
    assert model.rope.cos.dtype == model.rope.sin.dtype == torch.float32
    assert model.rope.cos.shape == (100, HEAD_DIM // 2)
    assert torch.equal(model.rope.cos, expected.cos)
    assert torch.equal(model.rope.sin, expected.sin)


def test_the_model_does_not_alias_the_files(tmp_path):
    hf_model().save_pretrained(tmp_path)
    model = load(tmp_path, OPS)
    before = logits_of(model)
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(-HIDDEN * VOCAB, 2)
        stream.write(bytes(HIDDEN * VOCAB))
    assert torch.equal(logits_of(model), before)


def edit_json(file, **changes):
    """Sets keys, and removes those whose value is `...`."""
    settings = {**json.loads(file.read_text(encoding="utf-8")), **changes}
    file.write_text(
        json.dumps({key: value for key, value in settings.items() if value is not ...}),
        encoding="utf-8",
    )


def config_with(tmp_path, **changes):
    hf_model().config.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **{"architectures": ["LlamaForCausalLM"], **changes})
    return load_config(tmp_path)


def test_config_defaults_are_those_of_llama_config(tmp_path):
    optional = [
        "architectures",
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_parameters",
        "tie_word_embeddings",
    ]
    config_with(tmp_path)
    edit_json(tmp_path / "config.json", **dict.fromkeys(optional, ...))
    assert load_config(tmp_path) == ModelConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_layers=LAYERS,
        num_q_heads=Q_HEADS,
        num_kv_heads=Q_HEADS,
        head_dim=HEAD_DIM,
        max_seq_len=2048,
        norm_eps=1e-6,
        rope_theta=10000.0,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": ..., "rope_theta": 7e4, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 7e4, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 7e4}, "rope_theta": 1.0},
        {"rope_parameters": None, "rope_scaling": {"type": "default"}, "rope_theta": 70000},
    ],
)
def test_rope_theta_is_found_in_the_places_of_both_versions(tmp_path, changes):
    assert config_with(tmp_path, **changes).rope_theta == 7e4
    assert LlamaConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"] == 7e4


def test_head_dim_may_differ_from_the_quotient(tmp_path):
    config = config_with(tmp_path, head_dim=32)
    assert config.head_dim == 32
    assert config_with(tmp_path, head_dim=None).head_dim == HEAD_DIM


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", ["MistralForCausalLM"]),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("model_type", "mistral"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("quantization_config", {"quant_method": "gptq"}),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}),
        ("rope_parameters", {"full_attention": {"rope_type": "default", "rope_theta": 5e5}}),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("partial_rotary_factor", 0.5),
    ],
)
def test_other_maths_are_refused_by_key(tmp_path, key, value):
    with pytest.raises(NotImplementedError, match=key):
        config_with(tmp_path, **{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", ...),
        ("hidden_size", math.nan),
        ("vocab_size", "96"),
        ("num_hidden_layers", True),
        ("num_attention_heads", 0),
        ("num_attention_heads", 7),
        ("num_key_value_heads", 3),
        ("intermediate_size", 176.5),
        ("head_dim", 7),
        ("rms_norm_eps", math.nan),
        ("rms_norm_eps", "1e-5"),
        ("max_position_embeddings", -1),
        ("rope_theta", math.inf),
        ("rope_parameters", [1]),
        ("tie_word_embeddings", "yes"),
    ],
)
def test_malformed_config_is_refused_by_key(tmp_path, key, value):
    changes = {key: value}
    if key in ("rope_theta", "num_attention_heads"):
        changes |= {"rope_parameters": ..., "head_dim": ..., "num_key_value_heads": ...}
    # ModelConfig's own checks speak of our name
    named = {
        "num_attention_heads": "num_(attention|q)_heads",
        "num_key_value_heads": "num_kv_heads",
    }
    with pytest.raises(CheckpointError, match=f"config.json.*{named.get(key, key)}"):
        config_with(tmp_path, **changes)


# --- malformed weights of Hugging Face's ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories that transformers wrote: "single" and "sharded"."""
    path = tmp_path_factory.mktemp("saved")
    hf_model().save_pretrained(path / "single")
    hf_model().save_pretrained(path / "sharded", max_shard_size="100KB")
    return path


@pytest.fixture
def single(saved, tmp_path):
    return Path(shutil.copytree(saved / "single", tmp_path / "single"))


@pytest.fixture
def sharded(saved, tmp_path):
    return Path(shutil.copytree(saved / "sharded", tmp_path / "sharded"))


def edit_weights(file, **changes):
    state = {**load_file(file), **changes}
    state = {key: value for key, value in state.items() if value is not ...}
    save_file(state, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (HF_Q, ..., f"missing key {HF_Q}"),
        ("lm_head.weight", ..., "missing key lm_head.weight"),
        ("model.norm.bias", torch.ones(HIDDEN), "unexpected key model.norm.bias"),
        (HF_Q, torch.ones(HIDDEN, 32), rf"{HF_Q}: .*\(64, 64\); got \(64, 32\)"),
        (HF_Q, torch.ones(HIDDEN, HIDDEN, dtype=torch.int64), f"{HF_Q}: .*got I64"),
        (HF_Q, torch.ones(HIDDEN, HIDDEN).to(torch.float8_e4m3fn), f"{HF_Q}: .*got F8_E4M3"),
    ],
)
def test_malformed_tensors_are_refused_by_key(single, key, value, message):
    edit_weights(single / "model.safetensors", **{key: value})
    with pytest.raises(CheckpointError, match=message):
        load(single, OPS)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-8], lambda data: data[:20], lambda data: b"", bytes.upper]
)
def test_damaged_safetensors_are_refused_by_file(single, damage):
    file = single / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected a safetensors file"):
        load(single, OPS)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-64], lambda data: data[:20], lambda data: b"", bytes.upper]
)
def test_damaged_pickles_are_refused_by_file(single, damage):
    file = single / "pytorch_model.bin"
    torch.save(load_file(single / "model.safetensors"), file)
    (single / "model.safetensors").unlink()
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: expected a state dict"):
        load(single, OPS)


class Malice:
    def __reduce__(self):
        return (print, ("this code ran",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({HF_Q: Malice()}, "weights_only"),
        ([torch.ones(1)], "expected a dict of tensors; got list"),
        ({"model": {HF_Q: torch.ones(1)}}, "model: expected a name and a tensor; got a str"),
        ({7: torch.ones(1)}, "7: expected a name and a tensor; got a int"),
        ({HF_Q: torch.ones(1, dtype=torch.int32)}, rf"{HF_Q}: .*got torch\.int32"),
    ],
)
def test_pickles_of_other_things_are_refused(single, content, message, capsys):
    (single / "model.safetensors").unlink()
    torch.save(content, single / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=rf"(?s)pytorch_model\.bin: .*{message}"):
        load(single, OPS)
    assert "this code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "{", '["a"]', "\x00\xff", "7"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_damaged_json_is_refused_by_file(sharded, name, content):
    (sharded / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=f"{name}: expected"):
        load(sharded, OPS)


def test_directories_without_a_checkpoint_are_refused(single):
    shutil.copy(single / "config.json", single / "params.json")
    with pytest.raises(CheckpointError, match="got both"):
        load(single, OPS)
    (single / "params.json").unlink()
    (single / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors or pytorch_model\.bin"):
        load(single, OPS)
    (single / "config.json").unlink()
    for path in (single, single / "absent"):
        with pytest.raises(CheckpointError, match=f"{path}: .*got neither"):
            load_config(path)


def test_missing_shard_is_refused_by_file(sharded):
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{file.name}: missing shard"):
        load(sharded, OPS)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "", 7, ".."])
def test_index_stays_in_its_directory(sharded, name):
    shutil.copy(sorted(sharded.glob("*.safetensors"))[0], sharded.parent / "outside.safetensors")
    index = sharded / "model.safetensors.index.json"
    if name == "/outside.safetensors":
        name = str(sharded.parent / "outside.safetensors")
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    edit_json(index, weight_map={**weight_map, HF_Q: name})
    with pytest.raises(CheckpointError, match=f"({HF_Q}: expected the name|missing shard.*{HF_Q})"):
        load(sharded, OPS)


@pytest.mark.parametrize("weight_map", [..., [], {}])
def test_index_without_files_is_refused(sharded, weight_map):
    edit_json(sharded / "model.safetensors.index.json", weight_map=weight_map)
    with pytest.raises(CheckpointError, match=r"index\.json: weight_map"):
        load(sharded, OPS)


def test_index_and_shards_must_agree(sharded):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    right = weight_map[HF_Q]
    wrong = next(name for name in weight_map.values() if name != right)
    edit_json(index, weight_map={**weight_map, HF_Q: wrong})
    with pytest.raises(CheckpointError, match=f"{wrong}: missing key {HF_Q}|{right}: unexpected"):
        load(sharded, OPS)
    edit_weights(sharded / right, extra=torch.ones(1))
    edit_json(index, weight_map=weight_map)
    with pytest.raises(CheckpointError, match=f"{right}: unexpected key extra"):
        load(sharded, OPS)


def test_mixed_dtypes_need_a_declared_or_a_given_one(single):
    edit_weights(single / "model.safetensors", **{HF_Q: torch.ones(HIDDEN, HIDDEN).bfloat16()})
    for changes, expected in (
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": ..., "torch_dtype": "float16"}, torch.float16),
    ):
        edit_json(single / "config.json", **changes)
        assert {weight.dtype for weight in load(single, OPS).parameters()} == {expected}
    edit_json(single / "config.json", torch_dtype=...)
    with pytest.raises(CheckpointError, match=rf"dtype: .*torch\.bfloat16 \({HF_Q}\)"):
        load(single, OPS)
    assert load(single, OPS, dtype=torch.float32).norm.weight.dtype == torch.float32
    edit_json(single / "config.json", torch_dtype="int8")
    with pytest.raises(CheckpointError, match=r"config\.json: torch_dtype: .*got 'int8'"):
        load(single, OPS)


def test_tied_head_may_be_stored_if_it_is_the_embedding(single):
    edit_json(single / "config.json", tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: expected the values of"):
        load(single, OPS)
    embedding = load_file(single / "model.safetensors")["model.embed_tokens.weight"]
    edit_weights(single / "model.safetensors", **{"lm_head.weight": embedding.clone()})
    model = load(single, OPS)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, embedding)


def test_arguments_are_checked(single):
    with pytest.raises(ValueError, match=r"dtype: .*got torch\.int8"):
        load(single, OPS, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"max_seq_len: .*got 0"):
        load(single, OPS, max_seq_len=0)
    with pytest.raises(ValueError, match=r"dtype: .*got torch\.int8"):
        save_hf(our_model(), single, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"max_shard_bytes: .*got 0"):
        save_hf(our_model(), single, max_shard_bytes=0)
    with pytest.raises(ValueError, match=r"num_shards: .*num_kv_heads \(4\); got 8"):
        save_meta(our_model(), single, num_shards=8)
    with pytest.raises(ValueError, match=r"num_shards: .*got 0"):
        save_meta(our_model(), single, num_shards=0)
    with pytest.raises(ValueError, match=r"head_dim: .*\(64 / 8\); got 16"):
        save_meta(our_model(head_dim=16), single)


def test_missing_safetensors_says_what_to_install(single, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r'safetensors; .*: pip install "\.\[models\]"'):
        load(single, OPS)


# --- saving Hugging Face's ---


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 30_000])
def test_transformers_loads_what_we_save(tmp_path, interleaved, tied, max_shard_bytes):
    model = our_model(
        rope_interleaved=interleaved, tie_word_embeddings=tied, rope_theta=5e4, norm_eps=2e-5
    )
    save_hf(model, tmp_path, max_shard_bytes=max_shard_bytes)
    theirs, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_equal_logits(tmp_path, logits_of(theirs))
    reloaded = load(tmp_path, OPS)
    assert (logits_of(reloaded) - logits_of(model)).abs().max() <= error_bound(logits_of(model))
    if not interleaved:
        assert reloaded.config == model.config
        assert_same_weights(reloaded, model)


def test_save_hf_keeps_or_casts_the_dtype(tmp_path):
    model = our_model(dtype=torch.bfloat16)
    save_hf(model, tmp_path)
    assert_same_weights(load(tmp_path, OPS), model)
    save_hf(our_model(), tmp_path, dtype=torch.bfloat16)
    assert_same_weights(load(tmp_path, OPS), model)
    assert LlamaForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    model.norm.float()
    save_hf(model, tmp_path)
    assert_same_weights(load(tmp_path, OPS), model.float())


def test_saving_again_leaves_nothing_of_the_earlier_checkpoint(tmp_path):
    (tmp_path / "tokenizer.model").touch()
    for max_shard_bytes in (30_000, 10**9, 60_000):
        model = our_model(vocab_size=VOCAB + max_shard_bytes % 7)
        save_hf(model, tmp_path, max_shard_bytes=max_shard_bytes)
        assert_same_weights(load(tmp_path, OPS), model)
        single = (tmp_path / "model.safetensors").exists()
        assert single == (max_shard_bytes == 10**9)
        assert single != (tmp_path / "model.safetensors.index.json").exists()
    assert (tmp_path / "tokenizer.model").exists()


def test_a_full_disk_is_an_os_error(tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match=r"model\.safetensors: expected to write it; No space left"):
        save_hf(our_model(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failure_while_saving_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    old = our_model()
    save_hf(old, tmp_path, max_shard_bytes=60_000)
    before = sorted(tmp_path.iterdir())

    def fail(config, dtype):
        raise OSError("no space left")

    monkeypatch.setattr(hf_checkpoint, "config_json", fail)
    with pytest.raises(OSError, match="no space left"):
        save_hf(our_model(vocab_size=50), tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    assert_same_weights(load(tmp_path, OPS), old)


# --- Meta's directories ---

META_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
SPLIT_BY_ROWS = ("wq", "wk", "wv", "w1", "w3", "output")
SPLIT_BY_COLUMNS = ("wo", "w2")


def interleave(weight):
    """Rows i and i + head_dim / 2 of each head become rows 2i and 2i + 1."""
    out = torch.empty_like(weight)
    for head in range(0, len(weight), HEAD_DIM):
        for i in range(HEAD_DIM // 2):
            out[head + 2 * i] = weight[head + i]
            out[head + 2 * i + 1] = weight[head + HEAD_DIM // 2 + i]
    return out


def write_meta(path, hf, num_shards, embedding_axis=1, **params):
    """A Meta checkpoint of a Hugging Face model, written from the format's description."""
    path.mkdir(parents=True, exist_ok=True)
    shards = [{} for _ in range(num_shards)]
    for key, weight in hf.state_dict().items():
        if "q_proj" in key or "k_proj" in key:
            weight = interleave(weight)
        for theirs, metas in META_NAMES.items():
            key = key.replace(theirs, metas)
        key = key.removeprefix("model.")
        module = key.split(".")[-2]
        if module in SPLIT_BY_ROWS:
            parts = weight.chunk(num_shards, 0)
        elif module in SPLIT_BY_COLUMNS:
            parts = weight.chunk(num_shards, 1)
        elif module == "tok_embeddings":
            parts = weight.chunk(num_shards, embedding_axis)
        else:
            parts = [weight] * num_shards
        for shard, part in zip(shards, parts, strict=True):
            shard[key] = part.clone()
    for rank, shard in enumerate(shards):
        shard["rope.freqs"] = torch.ones(HEAD_DIM // 2)
        torch.save(shard, path / f"consolidated.{rank:02d}.pth")
    settings = {
        "dim": HIDDEN,
        "n_layers": LAYERS,
        "n_heads": Q_HEADS,
        "n_kv_heads": hf.config.num_key_value_heads,
        "vocab_size": -1,
        "multiple_of": 16,
        "norm_eps": hf.config.rms_norm_eps,
    }
    settings = {key: value for key, value in {**settings, **params}.items() if value is not ...}
    (path / "params.json").write_text(json.dumps(settings), encoding="utf-8")
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("embedding_axis", [0, 1])
def test_meta_shards_equal_one_file_and_transformers(tmp_path, embedding_axis, dtype):
    hf = hf_model(num_kv_heads=4, dtype=dtype)
    one = load(write_meta(tmp_path / "1", hf, 1), OPS)
    assert one.config.rope_interleaved
    assert (one.config.vocab_size, one.config.intermediate_size) == (VOCAB, FFN)
    assert (one.config.num_kv_heads, one.config.max_seq_len) == (4, 4096)
    assert not one.training
    for num_shards in (2, 4):
        path = write_meta(tmp_path / f"{num_shards}", hf, num_shards, embedding_axis)
        assert load_config(path) == one.config
        assert_same_weights(load(path, OPS), one)
    save_hf(one, tmp_path / "hf")
    for key, weight in load_file(tmp_path / "hf" / "model.safetensors").items():
        assert torch.equal(weight, hf.state_dict()[key]), key
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert_equal_logits(tmp_path / "4", logits_of(theirs))


def test_meta_without_kv_heads_is_mha(tmp_path):
    hf = hf_model(num_kv_heads=Q_HEADS, rope_theta=5e4)
    path = write_meta(
        tmp_path, hf, 2, n_kv_heads=..., rope_theta=5e4, vocab_size=VOCAB, use_scaled_rope=False
    )
    assert load_config(path).num_kv_heads == Q_HEADS
    assert_equal_logits(path, logits_of(hf))


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_save_meta_writes_the_format(tmp_path, num_shards):
    hf = hf_model(num_kv_heads=4)
    hf.save_pretrained(tmp_path / "hf")
    write_meta(tmp_path / "expected", hf, num_shards)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "consolidated.04.pth").touch()  # of an earlier checkpoint
    save_meta(load(tmp_path / "hf", OPS), tmp_path / "saved", num_shards)
    names = [f"consolidated.{rank:02d}.pth" for rank in range(num_shards)]
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == [*names, "params.json"]
    for name in names:
        expected = torch.load(tmp_path / "expected" / name)
        del expected["rope.freqs"]
        saved = torch.load(tmp_path / "saved" / name)
        assert saved.keys() == expected.keys()
        for key, part in saved.items():
            assert torch.equal(part, expected[key]), key
            assert part.untyped_storage().nbytes() == part.numel() * 4


@pytest.mark.parametrize("ffn", [100, 170, 172, 176, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_round_trip_is_exact(tmp_path, ffn, dtype):
    model = our_model(
        dtype=dtype, intermediate_size=ffn, rope_interleaved=True, rope_theta=3e4, norm_eps=1e-6
    )
    save_meta(model, tmp_path, num_shards=2)
    reloaded = load(tmp_path, OPS, max_seq_len=64)
    assert reloaded.config == model.config
    assert_same_weights(reloaded, model)
    # Meta's own formula must give the same FFN size
    params = json.loads((tmp_path / "params.json").read_text(encoding="utf-8"))
    size = int(2 * (4 * params["dim"]) / 3)
    if "ffn_dim_multiplier" in params:
        size = int(params["ffn_dim_multiplier"] * size)
    assert params["multiple_of"] * -(-size // params["multiple_of"]) == ffn


def test_save_meta_unties_the_head(tmp_path):
    model = our_model(tie_word_embeddings=True)
    save_meta(model, tmp_path, num_shards=2)
    reloaded = load(tmp_path, OPS, max_seq_len=64)
    assert not reloaded.config.tie_word_embeddings
    assert torch.equal(reloaded.lm_head.weight, model.embed_tokens.weight)
    difference = (logits_of(reloaded) - logits_of(model)).abs().max()
    assert difference <= error_bound(logits_of(model))


@pytest.fixture(scope="module")
def meta_saved(tmp_path_factory):
    return write_meta(tmp_path_factory.mktemp("meta"), hf_model(num_kv_heads=4), 2)


@pytest.fixture
def meta(meta_saved, tmp_path):
    return Path(shutil.copytree(meta_saved, tmp_path / "meta"))


@pytest.mark.parametrize("content", ["", "{", "[1]", '"dim"'])
def test_damaged_params_are_refused_by_file(meta, content):
    (meta / "params.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"params\.json: expected"):
        load(meta, OPS)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("dim", ..., "missing key dim"),
        ("dim", math.nan, "dim: .*got nan"),
        ("dim", 60, "dim: expected a multiple of n_heads"),
        ("n_layers", math.nan, "n_layers: .*got nan"),
        ("n_heads", "8", "n_heads: .*got '8'"),
        ("n_kv_heads", 0, "n_kv_heads: .*got 0"),
        ("vocab_size", math.nan, "vocab_size: .*got nan"),
        ("vocab_size", -2, "vocab_size: .*got -2"),
        ("norm_eps", math.nan, "norm_eps: .*got nan"),
    ],
)
def test_malformed_params_are_refused_by_key(meta, key, value, message):
    edit_json(meta / "params.json", **{key: value})
    with pytest.raises(CheckpointError, match=rf"params\.json: {message}"):
        load(meta, OPS)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("n_layers", 3, r"missing key layers\.2\..*and 8 more"),
        ("n_layers", 1, r"unexpected key layers\.1\..*and 8 more"),
        ("vocab_size", 95, r"consolidated\.00\.pth: .*weight: expected shape \(95, 64\); got"),
        ("n_kv_heads", 2, r"wk\.weight: expected shape \(16, 64\); got \(32, 64\)"),
    ],
)
def test_params_and_shards_must_agree(meta, key, value, message):
    edit_json(meta / "params.json", **{key: value})
    with pytest.raises(CheckpointError, match=message):
        load(meta, OPS)


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_scaled_rope", True), ("n_kv_heads", 1), ("sliding_window", 4096), ("moe", {"n": 8})],
)
def test_other_maths_in_params_are_refused_by_key(meta, key, value):
    edit_json(meta / "params.json", **{key: value})
    with pytest.raises(NotImplementedError, match=rf"params\.json: {key}: "):
        load(meta, OPS)


def test_missing_meta_shards_are_refused_by_file(meta):
    first, second = meta / "consolidated.00.pth", meta / "consolidated.01.pth"
    second.unlink()
    with pytest.raises(CheckpointError, match=r"expected 2 files consolidated\.NN\.pth.*got 1"):
        load(meta, OPS)
    first.rename(second)
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth: missing shard"):
        load(meta, OPS)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth: missing shard; found no"):
        load(meta, OPS)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (META_Q, ..., f"key {META_Q}"),
        ("tok_embeddings.weight", ..., r"key tok_embeddings\.weight"),
        ("layers.0.attention.wq.bias", torch.ones(32), r"key layers\.0\.attention\.wq\.bias"),
        (META_Q, torch.ones(32, 60), f"{META_Q}: "),
        ("norm.weight", torch.ones(HIDDEN, 1), r"norm\.weight: "),
        ("tok_embeddings.weight", torch.tensor(1.0), r"tok_embeddings\.weight: "),
        (META_Q, torch.ones(32, HIDDEN).half(), f"{META_Q}: .*float16"),
        (META_Q, torch.ones(32, HIDDEN, dtype=torch.int8), rf"{META_Q}: .*got torch\.int8"),
        (META_Q, torch.ones(32, HIDDEN).to(torch.float8_e5m2), f"{META_Q}: .*float8_e5m2"),
        (META_Q, [1.0], f"{META_Q}: expected a name and a tensor"),
    ],
)
def test_malformed_meta_tensors_are_refused_by_key(meta, rank, key, value, message):
    file = meta / f"consolidated.{rank:02d}.pth"
    state = {**torch.load(file), key: value}
    torch.save({key: value for key, value in state.items() if value is not ...}, file)
    with pytest.raises(CheckpointError, match=message):
        load(meta, OPS)


def test_damaged_or_malicious_meta_shards_are_refused_by_file(meta, capsys):
    file = meta / "consolidated.01.pth"
    torch.save({META_Q: Malice()}, file)
    with pytest.raises(CheckpointError, match=r"(?s)consolidated\.01\.pth: .*weights_only"):
        load(meta, OPS)
    assert "this code ran" not in capsys.readouterr().out
    file.write_bytes((meta / "consolidated.00.pth").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth: expected a state dict"):
        load(meta, OPS)


def test_mixed_dtypes_in_meta_need_a_given_one(meta):
    for file in meta.glob("*.pth"):
        state = torch.load(file)
        torch.save({**state, META_Q: state[META_Q].bfloat16()}, file)
    with pytest.raises(CheckpointError, match=rf"dtype: .*torch\.bfloat16 \({META_Q}\)"):
        load(meta, OPS)
    assert load(meta, OPS, dtype=torch.float16).norm.weight.dtype == torch.float16


# --- published sizes ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [("7B", 6_738_415_616), ("13B", 13_015_864_320), ("70B", 68_976_648_192)],
)
def test_published_parameter_counts(name, expected):
    with torch.device("meta"):
        model = Llama2(PUBLISHED[name], OPS)
    assert sum(weight.numel() for weight in model.parameters()) == expected
