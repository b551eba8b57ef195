"""Failures with files that users of such software reported, each with the right value."""

import contextlib
import json
import os
import re
import threading

import pytest
import safetensors.torch
import torch
from small_llama import EAGER, lively, random_tokens, small_config, twin

from llama2 import checkpoint, cli
from llama2.accounting import kv_bytes_per_token
from llama2.checkpoint import SHIPPED, CheckpointError
from llama2.checkpoint.hf import save_hf
from llama2.stops import stop_ids
from llama2.storage import finish_staged, staged
from llama2.tokenizer import Tokenizer

# --- outputs ---------------------------------------------------------------------------------


@pytest.fixture
def offline(tmp_path):
    """`serve-offline` of two prompts into an output."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "def f"}\n{"prompt": "class A"}\n', encoding="utf-8")
    options = ["--backend", "eager", "--device", "cpu", "--max-new-tokens", "3"]

    def run(out):
        files = ["--prompts", str(prompts), "--out", str(out)]
        return cli.main(["serve-offline", *files, *options])

    return run


FOREIGN = (
    '{"id": 1, "prompt": "def f"}\n',
    '{"id": 1, "prompt": "def f"}',
    '{"id": "a", "note": "mine',
    '{"id": 7}\n{"id": ',
    "# notes\n",
)


@pytest.mark.parametrize("content", FOREIGN)
def test_a_foreign_file_is_neither_cut_nor_taken_for_results(offline, content, tmp_path, capsys):
    out = tmp_path / "out"
    out.write_text(content, encoding="utf-8")
    assert offline(out) == 2
    assert "--out: expected results of this command" in capsys.readouterr().err
    assert out.read_text(encoding="utf-8") == content


@pytest.mark.parametrize(
    "cut", ["", '{"id": ', '{"id": 1', '{"id": 1, "te', '{"id": 1, "text": "x']
)
def test_what_a_killed_run_left_is_gone_on_with(offline, cut, tmp_path, capsys):
    out = tmp_path / "out"
    out.write_text(cut, encoding="utf-8")
    assert offline(out) == 0
    assert len(out.read_text(encoding="utf-8").splitlines()) == 2


def test_results_go_to_stdout_and_pipes(offline, tmp_path, capsys):
    assert offline("-") == 0
    assert sorted(json.loads(x)["id"] for x in capsys.readouterr().out.splitlines()) == [1, 2]
    assert not os.path.exists("-")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    read = []
    reader = threading.Thread(target=lambda: read.append(fifo.read_text(encoding="utf-8")))
    reader.start()
    assert offline(fifo) == 0
    reader.join()
    assert len(read[0].splitlines()) == 2
    assert offline("/dev/full") == 2 and offline(tmp_path) == 2


def test_a_prompt_that_is_too_long_for_the_memory_stops_no_other(tmp_path, monkeypatch, capsys):
    model = checkpoint.load(SHIPPED, EAGER)
    page = kv_bytes_per_token(model.config) * 16
    for module in ("cache_size", "commands.caches"):
        monkeypatch.setattr(f"llama2.{module}.free_bytes", lambda device: 5 * page)
    prompts, out = tmp_path / "prompts", tmp_path / "out"
    long = json.dumps({"prompt": "x = 1\n" * 20})
    prompts.write_text(f'{{"prompt": "a"}}\n{long}\n{{"prompt": "b"}}\n', encoding="utf-8")
    options = ["--backend", "eager", "--device", "cpu", "--max-new-tokens", "3"]
    assert cli.main(["serve-offline", "--prompts", str(prompts), "--out", str(out), *options]) == 1
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert sorted(line["id"] for line in lines) == [1, 3]
    assert f"{prompts}:2: num_pages: expected at least" in capsys.readouterr().err


# --- writing that is interrupted -------------------------------------------------------------


class Killed(BaseException):
    """No code of a run catches it."""


@pytest.mark.parametrize("after", range(8))
def test_a_checkpoint_is_whole_or_finished_whenever_its_writer_is_killed(
    after, tmp_path, monkeypatch
):
    """Killed between any two changes of the directory, from one checkpoint to another."""
    old, new = lively(small_config(), "cpu"), lively(small_config(), "cpu")
    save_hf(old, tmp_path, max_shard_bytes=20_000)
    left = after

    def counting(name, change):
        def counted(*args, **kwargs):
            nonlocal left
            if str(tmp_path) in str(args[0]) and ".partial" not in str(args[0]):
                if left == 0:
                    raise Killed
                left -= 1
            return change(*args, **kwargs)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counting("replace", os.replace))
        patch.setattr(type(tmp_path), "unlink", counting("unlink", type(tmp_path).unlink))
        with contextlib.suppress(Killed):
            save_hf(new, tmp_path)
    finish_staged(tmp_path)
    assert not list(tmp_path.glob(".saving*"))
    tokens = random_tokens("cpu", 1, 5)
    found = checkpoint.load(tmp_path, EAGER)(tokens)
    assert torch.equal(found, new(tokens)) or torch.equal(found, old(tokens))


def test_two_writers_of_one_directory(tmp_path):
    with staged(tmp_path, "x"), pytest.raises(ValueError, match="expected no other run there"):
        save_hf(lively(small_config(), "cpu"), tmp_path)


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "precious.txt",
            "mine",
            r"\.saving: expected files of an interrupted write .*precious",
        ),
        (".complete", "{", r"\.complete: expected JSON"),
        (".complete", "{}", r"\.complete: expected the plan of an interrupted write .*KeyError"),
        (".complete", "[]", r"\.complete: expected the plan of an interrupted write .*TypeError"),
        (".complete", '{"names": [], "last": [], "obsolete": "("}', r"\.complete: .*unterminated"),
        (".complete", '{"names": ["../x"], "last": [], "obsolete": ""}', r"'\.\./x' is not a file"),
        (".complete", '{"names": [], "last": [".."], "obsolete": ""}', r"'\.\.' is not a file"),
        (".complete", '{"names": [], "last": [], "obsolete": "", "request": 1}', "request is 1"),
    ],
)
def test_a_strangers_folder_of_that_name_is_kept(name, content, message, tmp_path):
    (tmp_path / ".saving").mkdir()
    (tmp_path / ".saving" / name).write_text(content, encoding="utf-8")
    (tmp_path / ".saving-mine").mkdir()
    (tmp_path / ".saving-mine" / "a").touch()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message):
        save_hf(lively(small_config(), "cpu"), tmp_path)
    assert contents(tmp_path) == before


# --- sizes from files ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**7),
        ("max_position_embeddings", 10**7),
        ("hidden_size", 10**30),
        ("vocab_size", 2**40),
    ],
)
def test_absurd_sizes_in_a_configuration_are_refused_at_once(key, value, tmp_path):
    save_hf(twin(lively(small_config(), "cpu")), tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | {key: value}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        checkpoint.load(tmp_path, EAGER)


@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps"])
def test_numbers_that_no_float_holds_are_refused(key, tmp_path):
    save_hf(twin(lively(small_config(), "cpu")), tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | {key: 10**400}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"{key}: expected a positive number; got 1000"):
        checkpoint.load_config(tmp_path)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a": ' * 100_000, "1" * 5000, "\xff", "{"])
def test_a_configuration_that_is_no_json_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json: expected"):
        checkpoint.load_config(tmp_path)


@pytest.mark.parametrize("text", ["[]", "7", '"a"', "null"])
def test_a_configuration_of_another_kind_is_refused_as_such(text, tmp_path):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    expected = f"{tmp_path / 'config.json'}: expected a JSON object; got "
    with pytest.raises(CheckpointError, match=f"^{re.escape(expected)}"):
        checkpoint.load_config(tmp_path)


# --- files of other kinds --------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    model = lively(small_config(), "cpu")
    save_hf(model, tmp_path / "small")
    return model, tmp_path / "small"


def test_pickles_of_before_pytorch_1_6(small):
    model, folder = small
    state = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    old = {"_use_new_zipfile_serialization": False}
    torch.save(state, folder / "pytorch_model.bin", **old)
    tokens = random_tokens("cpu", 1, 5)
    assert torch.equal(checkpoint.load(folder, EAGER)(tokens), model(tokens))


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (torch.Tensor.to_sparse, "torch.sparse_coo on cpu"),
        (torch.Tensor.to_sparse_csr, "torch.sparse_csr on cpu"),
        (lambda tensor: tensor.to("meta"), "torch.strided on meta"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_tensors_without_plain_values_are_named(spoil, kind, small):
    _, folder = small
    state = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    state["lm_head.weight"] = spoil(state["lm_head.weight"])
    torch.save(state, folder / "pytorch_model.bin")
    message = rf"model\.bin: lm_head\.weight: expected a dense tensor with values; .*{kind}"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(folder, EAGER)


@pytest.mark.parametrize("named", [True, False])
def test_a_rotary_buffer_is_named_or_stored_or_both(named, small):
    """And a tied head may be named by the index alone."""
    model, folder = small
    state = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = dict.fromkeys(state, "a.safetensors")
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    if named:
        weight_map[buffer] = "a.safetensors"
    else:
        state[buffer] = torch.zeros(8)
    safetensors.torch.save_file(state, folder / "a.safetensors")
    index = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    tokens = random_tokens("cpu", 1, 5)
    assert torch.equal(checkpoint.load(folder, EAGER)(tokens), model(tokens))


def test_what_is_no_checkpoint_says_what_it_is(small, tmp_path):
    _, folder = small
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "model.safetensors").write_text(pointer, encoding="utf-8")
    with pytest.raises(CheckpointError, match="a Git LFS pointer"):
        checkpoint.load(folder, EAGER)
    with pytest.raises(CheckpointError, match="a name on a hub, download it first"):
        checkpoint.load("meta-llama/Llama-2-7b-hf", EAGER)
    for name, message in (("model.gguf", "got GGUF"), ("adapter_config.json", "got an adapter")):
        other = tmp_path / name.partition(".")[0]
        other.mkdir()
        (other / name).touch()
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(other, EAGER)


def test_the_tokenizer_is_opened_before_the_weights(small, capsys):
    _, folder = small
    (folder / "model.safetensors").write_bytes(b"broken")
    assert cli.main(["generate", "--checkpoint", str(folder), "--prompt", "a"]) == 2
    assert "tokenizer.model" in capsys.readouterr().err


def test_a_checkpoints_own_stop_ids(small):
    _, folder = small
    tokenizer = Tokenizer(SHIPPED / "tokenizer.model")
    assert stop_ids(tokenizer, folder) == [1, 2]
    file = folder / "generation_config.json"
    for content, expected in (("[2, 7]", [1, 2, 7]), ("9", [1, 2, 9]), ("[99999]", [1, 2])):
        file.write_text(f'{{"eos_token_id": {content}}}', encoding="utf-8")
        assert stop_ids(tokenizer, folder) == expected
    file.write_text('{"eos_token_id": "x"}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="eos_token_id: expected ids"):
        stop_ids(tokenizer, folder)
