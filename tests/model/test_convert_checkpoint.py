"""A checkpoint directory with fewer key/value heads, held to transformers and to `convert`."""

import gc
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_llama import EAGER, lively, random_tokens, small_config
from transformers import LlamaConfig, LlamaForCausalLM

from llama2 import checkpoint, cli, convert_checkpoint
from llama2.checkpoint.files import StoredTensor
from llama2.commands import convert as convert_command
from llama2.conversion import (
    METHODS,
    NEEDS_DATA,
    AttentionWeights,
    convert,
    convert_layer,
    second_moments,
)
from llama2.convert_checkpoint import convert_checkpoint as run
from llama2.tokenizer import Tokenizer
from llama2.train.data import Document

VOCAB, HIDDEN, FFN, LAYERS, Q_HEADS, HEAD_DIM, SEQ_LEN = 97, 48, 111, 2, 4, 16, 24
SHARD_BYTES = 30_000  # several to a model
UNIT = torch.finfo(torch.float32).eps / 2


@pytest.fixture
def tokens():
    return random_tokens("cpu", 4, SEQ_LEN)


def source_of(path, num_kv_heads=Q_HEADS, dtype=torch.float32, *, bins=None, tied=False, **keys):
    """A directory that transformers saved, in shards; `bins`: pickles instead, so many."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=Q_HEADS,
        num_key_value_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        **keys,
    )
    model = LlamaForCausalLM(config)
    lively_weights = lively(small_config(Q_HEADS, num_kv_heads), "cpu").state_dict()
    for name, weight in lively_weights.items():
        prefix = "" if name.startswith("lm_head") else "model."
        model.get_parameter(prefix + name).data.copy_(weight)
    model.to(dtype).save_pretrained(path, max_shard_size=SHARD_BYTES)
    assert len(list(path.glob("*.safetensors"))) > 2
    if bins:
        for file in path.glob("model*"):
            file.unlink()
        state = {key: value for key, value in model.state_dict().items()}
        if tied:  # as old versions did: two keys of one memory
            assert (
                state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
            )
        if bins == 1:
            torch.save(state, path / "pytorch_model.bin")
        else:
            weight_map = {}
            for number in range(bins):
                part = dict(list(state.items())[number::bins])
                torch.save(part, path / f"pytorch_model-{number}.bin")
                weight_map |= dict.fromkeys(part, f"pytorch_model-{number}.bin")
            index = json.dumps({"metadata": {}, "weight_map": weight_map})
            (path / "pytorch_model.bin.index.json").write_text(index, encoding="utf-8")
    return path


def tensors_of(path):
    """Of safetensors files, by key."""
    return {key: x for file in path.glob("*.safetensors") for key, x in load_file(file).items()}


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        assert found[key].dtype == weight.dtype, key
        assert torch.equal(found[key].view(torch.uint8), weight.view(torch.uint8)), key


def hf_state(model):
    return {
        name if name == "lm_head.weight" else f"model.{name}": weight.detach()
        for name, weight in model.named_parameters()
    }


def visible(path):
    return sorted(file.name for file in path.iterdir() if file.name[0] != ".")


def seeded():
    return torch.Generator().manual_seed(3)


@torch.no_grad()
def assert_transformers_runs_it(path, num_kv_heads, tokens):
    """Its logits are ours but for γₙ = n · u of the longest chain of roundings, for either side."""
    ours = checkpoint.load(path, EAGER, dtype=torch.float32)
    theirs, info = LlamaForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    assert theirs.config.num_key_value_heads == ours.config.num_kv_heads == num_kv_heads
    expected, found = ours(tokens), theirs(tokens).logits
    chain = LAYERS * (3 * HIDDEN + FFN + SEQ_LEN) + HIDDEN
    assert (found - expected).abs().max() <= 2 * chain * UNIT * expected.abs().max()
    new = theirs.generate(tokens[:1, :5], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert new.shape == (1, 9)


# What comes out.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [10**9, SHARD_BYTES])
@pytest.mark.parametrize("method", ["low_rank", "random"])
def test_the_same_count_keeps_every_bit(tmp_path, dtype, max_shard_bytes, method):
    source = source_of(tmp_path / "a", 2, dtype)
    file = sorted(source.glob("*.safetensors"))[0]
    first = load_file(file)
    key = min(first)
    save_file(first | {key: first[key].double()}, file, metadata={"format": "pt"})
    run(source, tmp_path / "b", 2, method=method, max_shard_bytes=max_shard_bytes)
    assert_same_bits(tensors_of(tmp_path / "b"), tensors_of(source))
    assert json.loads((tmp_path / "b" / "config.json").read_text(encoding="utf-8")) == json.loads(
        (source / "config.json").read_text(encoding="utf-8")
    )
    single = max_shard_bytes == 10**9
    assert (tmp_path / "b" / "model.safetensors").exists() == single
    shards = [load_file(file) for file in sorted((tmp_path / "b").glob("*.safetensors"))]
    sizes = [sum(weight.nbytes for weight in shard.values()) for shard in shards]
    assert all(len(x) == 1 or n <= max_shard_bytes for x, n in zip(shards, sizes, strict=True))
    if not single:
        index = json.loads(
            (tmp_path / "b" / "model.safetensors.index.json").read_text(encoding="utf-8")
        )
        assert index["metadata"]["total_size"] == sum(sizes)


@pytest.mark.parametrize("bins", [None, 1, 2])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("count", [2, 1])
def test_transformers_loads_what_convert_makes(tmp_path, tokens, bins, tied, count):
    source = source_of(tmp_path / "a", bins=bins, tied=tied)
    target = tmp_path / "new" / "b"
    run(source, target, count, calibration=tokens, max_shard_bytes=SHARD_BYTES)
    expected = convert(checkpoint.load(source, EAGER), count, EAGER, calibration=tokens)
    assert_same_bits(tensors_of(target), hf_state(expected))
    assert_transformers_runs_it(target, count, tokens)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_from_grouped_heads(tmp_path, tokens, method):
    source = source_of(tmp_path / "a", num_kv_heads=2)
    options = {"method": method, "calibration": tokens if method in NEEDS_DATA else None}
    run(source, tmp_path / "b", 1, generator=seeded(), **options)
    model = checkpoint.load(source, EAGER)
    expected = convert(model, 1, EAGER, generator=seeded(), **options)
    assert_same_bits(tensors_of(tmp_path / "b"), hf_state(expected))


def test_sixteen_bits_are_rounded_once(tmp_path, tokens):
    """From float64, not by way of the float32 in which the calibration runs."""
    source = source_of(tmp_path / "a", dtype=torch.bfloat16)
    run(source, tmp_path / "b", 2, calibration=tokens)
    old, new = tensors_of(source), tensors_of(tmp_path / "b")
    moments = second_moments(checkpoint.load(source, EAGER, dtype=torch.float32), tokens)
    for layer, moment in enumerate(moments):
        keys = [f"model.layers.{layer}.self_attn.{part}_proj.weight" for part in "qkvo"]
        weights = AttentionWeights(*(old[key] for key in keys))
        expected = convert_layer(weights, 2, head_dim=HEAD_DIM, second_moment=moment)
        for key, weight in zip(keys, expected, strict=True):
            assert torch.equal(new[key], weight), key
            del old[key], new[key]
    assert_same_bits(new, old)


def test_batches_change_only_roundings(tmp_path, tokens, monkeypatch):
    source = source_of(tmp_path / "a")

    def moments(target):
        seen = []

        def recorded(*args, second_moment, **options):
            seen.append(second_moment)
            return convert_layer(*args, second_moment=second_moment, **options)

        monkeypatch.setattr(convert_checkpoint, "convert_layer", recorded)
        run(source, tmp_path / target, 2, calibration=tokens)
        return seen

    whole = moments("b")
    monkeypatch.setattr(convert_checkpoint, "_BATCH_TOKENS", 3 * SEQ_LEN)  # 3 rows, then 1
    chain = LAYERS * (3 * HIDDEN + FFN + SEQ_LEN)
    for a, b in zip(whole, moments("c"), strict=True):
        assert (a - b).abs().max() <= 2 * chain * UNIT * a.abs().max()


@pytest.mark.parametrize("num_shards", [1, 2])
def test_meta_becomes_hugging_face(tmp_path, tokens, num_shards):
    config = small_config(4, 4, head_dim=12, rope_interleaved=True, rope_theta=5e4)
    config = replace(config, vocab_size=98, intermediate_size=112)  # what two shards divide
    model = lively(config, "cpu")
    checkpoint.save_meta(model, tmp_path / "meta", num_shards)
    checkpoint.save_hf(convert(model, 2, EAGER, calibration=tokens), tmp_path / "expected")
    run(tmp_path / "meta", tmp_path / "b", 2, calibration=tokens)
    assert_same_bits(tensors_of(tmp_path / "b"), tensors_of(tmp_path / "expected"))
    settings, expected = (
        json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))
        for name in ("b", "expected")
    )
    # Meta's files do not record the context length
    assert settings == expected | {"max_position_embeddings": 4096}
    assert_transformers_runs_it(tmp_path / "b", 2, tokens)
    run(tmp_path / "meta", tmp_path / "same", 4)
    checkpoint.save_hf(model, tmp_path / "saved")
    assert_same_bits(tensors_of(tmp_path / "same"), tensors_of(tmp_path / "saved"))


@pytest.mark.parametrize("transposed", [False, True])
def test_tensors_of_a_pickle_may_share_memory_and_lie_in_any_order(tmp_path, transposed):
    source = source_of(tmp_path / "a", bins=1)
    state = torch.load(source / "pytorch_model.bin")
    head = state["model.embed_tokens.weight"]
    head = head.T.contiguous().T if transposed else head
    state |= {"lm_head.weight": head, "model.embed_tokens.weight": head}  # untied, all the same
    torch.save(state, source / "pytorch_model.bin")
    run(source, tmp_path / "b", 4)
    assert_same_bits(tensors_of(tmp_path / "b"), {k: x.contiguous() for k, x in state.items()})


def test_only_the_heads_change_in_the_configuration(tmp_path):
    source = source_of(tmp_path / "a")
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    settings |= {"x_ours": {"é": [1, None, 1e-05]}, "use_cache": None, "transformers_version": "0"}
    (source / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    run(source, tmp_path / "b", 1, method="mean")
    found = json.loads((tmp_path / "b" / "config.json").read_text(encoding="utf-8"))
    assert found == settings | {"num_key_value_heads": 1}
    assert list(found) == list(settings)


def test_mha_without_the_key_gets_it(tmp_path):
    source = source_of(tmp_path / "a")
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    del settings["num_key_value_heads"]
    (source / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    run(source, tmp_path / "b", 2, method="first")
    assert checkpoint.load(tmp_path / "b", EAGER).config.num_kv_heads == 2


def test_what_belongs_to_the_tokenizer_comes_along(tmp_path):
    source = source_of(tmp_path / "a")
    kept = [
        "LICENSE.txt",
        "USE_POLICY.md",
        "added_tokens.json",
        "chat_template.jinja",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    for name in [*kept, "README.md", "training.json", "pytorch_model.bin"]:
        (source / name).write_bytes(name.encode())
    (source / "tokenizer").mkdir()
    run(source, tmp_path / "b", 1, method="mean")
    assert visible(tmp_path / "b") == sorted([*kept, "config.json", "model.safetensors"])
    assert all((tmp_path / "b" / name).read_text(encoding="utf-8") == name for name in kept)


# What is in memory.


def test_one_layer_is_in_memory_at_a_time(tmp_path, monkeypatch):
    model = lively(replace(small_config(4, 4), num_layers=4), "cpu").bfloat16()
    checkpoint.save_hf(model, tmp_path / "a")
    layer = sum(weight.nbytes for weight in model.layers[0].parameters())
    attention = sum(weight.nbytes for weight in model.layers[0].self_attn.parameters())
    smallest = min(weight.nbytes for weight in model.layers[0].parameters() if weight.dim() == 2)
    del model
    calibration = random_tokens("cpu", 2, 8)
    peaks = {}

    def live_bytes():
        """Of all tensors that Python holds, but for those that were there before."""
        storages = {}
        for found in gc.get_objects():
            if type(found) in (torch.Tensor, torch.nn.Parameter) and found.device.type == "cpu":
                storage = found.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def watch(name, function):
        def watched(*args, **options):
            result = function(*args, **options)
            peaks[name] = max(peaks.get(name, 0), live_bytes())
            return result

        return watched

    opened = convert_checkpoint.open_checkpoint

    def open_watched(*args):
        found, model = opened(*args)
        for key, stored in found.tensors.items():
            name = "read" if ".layers." in key else "other"
            read = watch(name, lambda stored=stored: stored.read().clone())
            found.tensors[key] = StoredTensor(stored.file, stored.shape, stored.dtype, read)
        return found, model

    monkeypatch.setattr(convert_checkpoint, "open_checkpoint", open_watched)
    for name in ("second_moment", "convert_layer"):
        function = watch(name, getattr(convert_checkpoint, name))
        monkeypatch.setattr(convert_checkpoint, name, function)
    gc.collect()
    gc.freeze()
    try:  # a shard for each tensor
        run(tmp_path / "a", tmp_path / "b", 2, calibration=calibration, max_shard_bytes=1)
    finally:
        gc.unfreeze()
    moment, hidden = HIDDEN**2 * 8, calibration.numel() * HIDDEN * 4
    rope = 8 * HEAD_DIM * 4
    allowed = {
        "read": layer + hidden + rope,
        "second_moment": 3 * layer + 2 * hidden + rope + moment,  # stored and in float32
        "convert_layer": layer + attention + hidden + rope + moment,
    }
    for name, limit in allowed.items():
        assert layer < peaks[name] < limit + smallest / 2, name


# What is refused, and what a failure leaves.


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path, monkeypatch, error):
    source, target = source_of(tmp_path / "a"), tmp_path / "b"
    before = tensors_of(source)

    calls = []

    def fail(*args, **options):
        calls.append(args)
        if len(calls) == LAYERS:
            raise error("in the middle")
        return convert_layer(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(convert_checkpoint, "convert_layer", fail)
        with pytest.raises(error, match="in the middle"):
            run(source, target, 2, method="mean", max_shard_bytes=1)
    assert list(target.iterdir()) == []
    assert_same_bits(tensors_of(source), before)
    run(source, target, 2, method="mean")
    assert checkpoint.load(target, EAGER).config.num_kv_heads == 2


def test_a_kill_leaves_no_file_under_its_name(tmp_path):
    source, target = source_of(tmp_path / "a"), tmp_path / "b"
    program = (
        "import os, sys\n"
        "from llama2 import convert_checkpoint as module\n"
        "layers = iter(range(2))\n"
        "real = module.convert_layer\n"
        "def fatal(*args, **options):\n"
        "    if next(layers) == 1: os.kill(os.getpid(), 9)\n"
        "    return real(*args, **options)\n"
        "module.convert_layer = fatal\n"
        "module.convert_checkpoint(*sys.argv[1:], 2, method='mean', max_shard_bytes=1)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, source, target], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert visible(target) == [] and list(target.glob(".saving/model-*"))
    run(source, target, 2, method="mean")
    assert checkpoint.load(target, EAGER).config.num_kv_heads == 2


def test_files_are_never_overwritten(tmp_path):
    source = source_of(tmp_path / "a")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine", encoding="utf-8")
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    for target, name in (
        (source, "config"),
        (tmp_path / "link", "config"),
        (tmp_path / "other", "n"),
    ):
        with pytest.raises(
            ValueError, match=f"target: expected a new .*; got {target} with {name}"
        ):
            run(source, target, 2, method="mean")
    with pytest.raises(ValueError, match=r"target: expected a directory; got a file, .*notes.txt"):
        run(source, tmp_path / "other" / "notes.txt", 2, method="mean")
    run(source, source / "inside", 2, method="mean")
    assert before == {file.name: file.read_bytes() for file in source.iterdir() if file.is_file()}
    assert checkpoint.load(source / "inside", EAGER).config.num_kv_heads == 2


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (0, {}, "num_kv_heads: expected a divisor of the checkpoint's 4; got 0"),
        (3, {}, "num_kv_heads: expected a divisor of the checkpoint's 4; got 3"),
        (8, {}, "num_kv_heads: .*; got 8"),
        (2, {"method": "median"}, "method: expected one of low_rank, .*; got 'median'"),
        (2, {"calibration": None}, "calibration: expected tokens for low_rank; got None"),
        (2, {"calibration": torch.zeros(2, 3)}, r"calibration: expected int \[.*float32 \[2, 3\]"),
        (2, {"calibration": torch.zeros(3).long()}, r"calibration: .*int64 \[3\]"),
        (2, {"calibration": torch.zeros(0, 3).long()}, r"calibration: .*int64 \[0, 3\]"),
        (2, {"calibration": torch.zeros(1, 65).long()}, r"max_seq_len \(64\).*; got 65"),
        (2, {"calibration": torch.tensor([[0, VOCAB]])}, "ids from 0 to 96; got 0 to 97"),
        (2, {"calibration": torch.tensor([[-1, 1]])}, "ids from 0 to 96; got -1 to 1"),
        (2, {"max_shard_bytes": 0}, "max_shard_bytes: expected a positive int; got 0"),
    ],
)
def test_bad_requests_touch_nothing(tmp_path, tokens, count, options, message):
    source = source_of(tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "b", count, **{"calibration": tokens, **options})
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("method", ["low_rank", "mean"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("key", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_weights_that_are_not_finite_are_refused(tmp_path, tokens, key, value, method):
    source = source_of(tmp_path / "a")
    fill(source, key, value)
    with pytest.raises(FloatingPointError, match=f"{key}: expected finite numbers; got NaN"):
        run(source, tmp_path / "b", 2, method=method, calibration=tokens)
    assert visible(tmp_path / "b") == []
    run(source, tmp_path / "b", Q_HEADS, method=method)  # which copies
    assert_same_bits(tensors_of(tmp_path / "b"), tensors_of(source))


def fill(source, key, value):
    (file,) = (file for file in source.glob("*.safetensors") if key in load_file(file))
    state = load_file(file)
    state[key][:] = value
    save_file(state, file, metadata={"format": "pt"})


def test_hidden_states_that_are_not_finite_are_refused(tmp_path, tokens):
    source = source_of(tmp_path / "a")
    fill(source, "model.layers.1.mlp.up_proj.weight", 3e38)
    with pytest.raises(FloatingPointError, match="hidden states: expected finite numbers"):
        run(source, tmp_path / "b", 2, calibration=tokens)
    assert visible(tmp_path / "b") == []


class Killed(BaseException):
    """No code of a run catches it."""


def killer_of(target, after):
    """`os.replace`, which ends the writer of `target` once `after` of its files have moved."""
    move, moved = os.replace, []

    def replace_file(old, new):
        if str(old).startswith(str(target / ".saving")) and not str(old).endswith(".partial"):
            moved.append(new)
            if len(moved) > after:
                raise Killed
        move(old, new)

    return replace_file


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """A source, and a directory whose writer was killed between the first two of its moves."""
    source, target = source_of(tmp_path / "a"), tmp_path / "b"
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(os, "replace", killer_of(target, 1))
        run(source, target, 2, method="random", generator=seeded(), max_shard_bytes=SHARD_BYTES)
    assert visible(target) and (target / ".saving" / ".complete").is_file()
    return source, target


REQUEST = {"method": "random", "max_shard_bytes": SHARD_BYTES}


def test_the_same_call_finishes_an_interrupted_one(interrupted, tmp_path):
    source, target = interrupted
    run(source, target, 2, generator=seeded(), **REQUEST)
    run(source, tmp_path / "whole", 2, generator=seeded(), **REQUEST)
    assert visible(target) == visible(tmp_path / "whole")
    assert_same_bits(tensors_of(target), tensors_of(tmp_path / "whole"))
    assert not (target / ".saving").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "mean"}, "method: expected 'random', to finish .*; got 'mean'"),
        (
            {"generator": torch.Generator().manual_seed(4)},
            r"seed \(hash of the generator\): expected '",
        ),
        ({"num_kv_heads": 1}, "num_kv_heads: expected 2, to finish .*; got 1"),
        ({"max_shard_bytes": 10**9}, f"max_shard_bytes: expected {SHARD_BYTES}, to finish"),
        ({"source": None}, "source: expected '.*/a', to finish .*; got '.*/other'"),
        ({"method": "low_rank"}, "method: expected 'random', to finish"),
    ],
)
def test_another_call_does_not_finish_an_interrupted_one(
    interrupted, tokens, change, message, tmp_path
):
    source, target = interrupted
    before = {file: file.read_bytes() for file in target.rglob("*") if file.is_file()}
    if "source" in change:
        source = Path(shutil.copytree(source, tmp_path / "other"))
    asked = {"num_kv_heads": 2, "generator": seeded(), "calibration": tokens, **REQUEST}
    with pytest.raises(ValueError, match=message):
        run(target=target, **{**asked, **change, "source": source})
    assert before == {file: file.read_bytes() for file in target.rglob("*") if file.is_file()}


def test_weights_that_changed_since_do_not_finish_an_interrupted_call(interrupted):
    source, target = interrupted
    fill(source, "model.norm.weight", 2.0)
    with pytest.raises(ValueError, match=r"weights .*: expected '.*', to finish"):
        run(source, target, 2, generator=seeded(), **REQUEST)


def test_what_another_command_has_not_finished_is_left_to_it(interrupted):
    source, target = interrupted
    file = target / ".saving" / ".complete"
    plan = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(plan | {"request": None}), encoding="utf-8")
    with pytest.raises(
        ValueError, match=f"{target}: expected an interrupted write of this command"
    ):
        run(source, target, 2, generator=seeded(), **REQUEST)


def test_a_damaged_source_is_refused_by_key(tmp_path, tokens):
    source = source_of(tmp_path / "a", bins=1)
    state = torch.load(source / "pytorch_model.bin")
    del state["model.norm.weight"]
    torch.save(state, source / "pytorch_model.bin")
    with pytest.raises(checkpoint.CheckpointError, match=r"missing key model\.norm\.weight"):
        run(source, tmp_path / "b", 2, calibration=tokens)
    assert not (tmp_path / "b").exists()


# The command.


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.py"
    file.write_text("def read(self, size=-1):\n    return self.buffer\n" * 40, encoding="utf-8")
    return file


@pytest.fixture
def llama2(tmp_path, capfd):
    """Runs `llama2 convert` on the shipped checkpoint: (status, stdout, stderr)."""

    def command(*options, source=checkpoint.SHIPPED, heads="1"):
        arguments = ["convert", str(source), str(tmp_path / "out"), "--num-kv-heads", heads]
        status = cli.main([*arguments, "--device", "cpu", *map(str, options)])
        return status, *capfd.readouterr()

    return command


def test_the_command_says_what_became_smaller_and_how_to_go_on(llama2, tmp_path, text):
    status, out, err = llama2("--text", text, "--calibration-tokens", 300, "--seq-len", 100)
    assert (status, err) == (0, "")
    words = out.split()
    model, shipped = (checkpoint.load(x, EAGER) for x in (tmp_path / "out", checkpoint.SHIPPED))
    assert model.config.num_kv_heads == 1
    for before, after in (
        (2, 1),
        *[[sum(x.numel() for x in m.parameters()) for m in (shipped, model)]],
        (6 * 2 * 2 * 32 * 2, 6 * 2 * 1 * 32 * 2),
    ):
        place = words.index(f"{after:,}")
        assert words[place - 2 : place] == [f"{before:,}", "→"]
    assert (
        f"llama2 pretrain --init {tmp_path / 'out'} --text TEXTS --alpha 0.05 --of-steps N" in out
    )


def test_the_command_calibrates_on_windows_of_the_training_part(llama2, text, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        convert_command, "convert_checkpoint", lambda *args, **options: seen.update(options)
    )
    documents = [Document("a", "import os\n" * 90, False), Document("b", "=" * 900, True)]
    asked = []
    monkeypatch.setattr(
        "llama2.train.data.corpus_documents", lambda path: asked.append(path) or documents
    )
    options = ("--calibration-tokens", 299, "--seq-len", 20)

    def calibration(*more):
        assert llama2(*options, *more)[0] == 0
        return seen["calibration"]

    first = calibration()
    assert first.shape == (14, 20) and first.dtype == torch.int64
    assert asked == [None]
    ids = Tokenizer(checkpoint.SHIPPED / "tokenizer.model").encode(documents[0].text, eos=True)
    windows = [ids[i : i + 20] for i in range(len(ids) - 19)]
    assert all(row in windows for row in first.tolist())
    assert torch.equal(first, calibration()) and not torch.equal(first, calibration("--seed", 1))
    assert calibration("--text", text) is not None and asked[-1] == text
    for nothing in (llama2("--method", "mean"), llama2(heads="2")):  # to convert, or with a text
        assert nothing[0] == 0 and seen["calibration"] is None


@pytest.mark.parametrize(
    ("options", "heads", "message"),
    [
        (
            ["--method", "mean", "--text", "a"],
            "1",
            "--text: expected it only with a --method",
        ),
        (["--method", "random", "--seq-len", 5], "1", "--seq-len: .*; got 5 with random to 1"),
        (["--method", "first", "--seed", 0], "1", "--seed: .*; got 0 with first to 1"),
        (["--calibration-tokens", 99], "2", "--calibration-tokens: .* with low_rank to 2"),
        (["--method", "random", "--seed", 1], "2", "--seed: .*; got 1 with random to 2"),
    ],
)
def test_options_that_change_nothing_are_refused(llama2, tmp_path, options, heads, message):
    status, out, err = llama2(*options, heads=heads)
    assert (status, out) == (2, "") and re.search(message, err)
    assert not (tmp_path / "out").exists()


def test_the_command_finishes_what_it_was_asked_for_alone(llama2, tmp_path, monkeypatch):
    asked = ("--method", "random", "--seed", 7)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(os, "replace", killer_of(tmp_path / "out", 0))
        llama2(*asked)
    status, _, err = llama2("--method", "random", "--seed", 8)
    assert status == 2 and "seed (hash of the generator): expected '" in err
    status, out, _ = llama2(*asked)
    assert status == 0 and "finished what an interrupted run had converted" in out
    assert llama2(*asked)[0] == 2  # as there are files now


def test_the_seed_makes_random_heads(llama2, tmp_path):
    found = []
    for seed in (1, 1, 2):
        assert llama2("--method", "random", "--seed", seed)[0] == 0
        found.append(tensors_of(tmp_path / "out")["model.layers.0.self_attn.k_proj.weight"])
        shutil.rmtree(tmp_path / "out")
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seq-len", 257], "--seq-len: expected from 1 to the model's 256; got 257"),
        (["--seq-len", 0], "--seq-len: expected from 1 to the model's 256; got 0"),
        (["--seed", -1], "--seed: expected at least 0; got -1"),
        (
            ["--calibration-tokens", 99],
            "--calibration-tokens: expected at least one sequence of 256",
        ),
        (["--text", "SHORT"], "--text: expected more than --seq-len (256) tokens; got 3"),
        (["--text", "/nowhere"], "/nowhere: expected a text file or a directory"),
        (["--device", "nonsense"], "device: expected one that is there"),
        (["--max-shard-bytes", 0], "max_shard_bytes: expected a positive int"),
        (["--method", "random", "--seed", -1], "--seed: expected at least 0; got -1"),
    ],
    ids=str,
)
def test_a_users_error_is_one_line(llama2, tmp_path, text, options, message):
    short = tmp_path / "short.py"
    short.write_text("a", encoding="utf-8")
    options = [str(short) if option == "SHORT" else option for option in options]
    if "--text" not in options and "random" not in options:
        options += ["--text", text]
    status, out, err = llama2(*options)
    assert (status, out) == (2, "")
    *notes, last = err.splitlines()
    assert last.startswith("llama2: ") and message in last
    assert all("held out" in note for note in notes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", 2**64], "--seed: expected an int from -9223372036854775807 to"),
        (["--seq-len", "9" * 5000], "--seq-len: expected an int from -9223372036854775807 to"),
        (["--text", ""], "--text: expected a path; got ''"),
    ],
)
def test_options_that_are_no_paths_or_numbers_are_refused(llama2, capfd, options, message):
    with pytest.raises(SystemExit, match="2"):
        llama2(*options)
    assert message in capfd.readouterr().err.splitlines()[-1]


def test_an_empty_path_is_not_the_present_directory(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for source, target in ((checkpoint.SHIPPED, ""), ("", "out")):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["convert", str(source), target, "--num-kv-heads", "1"])
        assert "expected a path; got ''" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("vocab_size", "eos_id", "message"),
    [
        (1025, 2, "expected a tokenizer with at most the model's 1024 ids; got 1025"),
        (1024, -1, "expected a tokenizer with an EOS token; got one without"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_named(
    llama2, text, vocab_size, eos_id, message, monkeypatch
):
    found = SimpleNamespace(vocab_size=vocab_size, eos_id=eos_id)
    monkeypatch.setattr(convert_command, "Tokenizer", lambda file: found)
    status, _, err = llama2("--text", text)
    assert status == 2 and f"{checkpoint.SHIPPED / 'tokenizer.model'}: {message}" in err


def test_what_the_checkpoint_lacks_is_said(llama2, tmp_path, text):
    status, _, err = llama2("--text", text, heads="4")
    assert status == 2 and "a divisor of the checkpoint's 2; got 4" in err
    source = Path(shutil.copytree(checkpoint.SHIPPED, tmp_path / "a"))
    (source / "tokenizer.model").rename(source / "tokenizer.json")
    status, _, err = llama2("--text", text, source=source)
    assert status == 2 and f"{source / 'tokenizer.model'}: expected a SentencePiece model" in err
    assert "--method mean" in err and not (tmp_path / "out").exists()
    assert llama2("--method", "mean", source=source)[0] == 0
