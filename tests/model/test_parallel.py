"""The model on several processes against the model on one, in float64 to the last digits."""

import dataclasses
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from budget import SEED, assert_network
from small_llama import (
    EAGER,
    lively,
    packed,
    random_tokens,
    small_config,
    twin,
)
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from llama2 import Llama2, ModelConfig, checkpoint, parallel
from llama2.generate import generate
from llama2.targets import count_predictions
from llama2.tokenizer import Tokenizer
from llama2.train import distributed, pretrain, update
from llama2.train.data import RandomWindows
from llama2.train.pretrain import TrainConfig, make_optimizer
from llama2.train.sharded_state import load_sharded_state, save_sharded_state
from llama2.train.state import read_log

MESHES = {"tp": ((2,), ("tp",)), "dp": ((2,), ("dp",)), "dp, tp": ((2, 2), ("dp", "tp"))}
TRAINING = TrainConfig(steps=2, batch_size=4, seq_len=11, peak_lr=1e-2, adam_eps=1e-8)
RUN = {"train_config": {"seed": 3}}  # what tells one run from another
close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


def make_mesh(name: str) -> DeviceMesh:
    sizes, names = MESHES[name]
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def config(**changes) -> ModelConfig:
    """Its vocabulary is odd."""
    return dataclasses.replace(small_config(), **{"intermediate_size": 112} | changes)


def make_model(seed: int = 0, **changes) -> Llama2:
    """The same in every rank."""
    torch.manual_seed(SEED + seed)
    return lively(config(**changes), "cpu")


def float64_model(**changes) -> Llama2:
    return twin(make_model(**changes), dtype=torch.float64)


def batches(form: str, mesh: DeviceMesh) -> list[dict]:
    """The arguments of the loss in every rank of dp."""
    num_parts = mesh["dp"].size() if "dp" in mesh.mesh_dim_names else 1
    torch.manual_seed(SEED + 1)
    if form == "packed":
        lengths = [(5, 1, 7), (2, 9, 0)]
        documents = [[random_tokens("cpu", n) for n in part] for part in lengths[:num_parts]]
        parts = [packed(part, after=2) for part in documents]
        return [{"tokens": tokens, "cu_seqlens": bounds} for tokens, bounds in parts]
    parts = [{"tokens": tokens} for tokens in random_tokens("cpu", 4, 12).chunk(num_parts)]
    if form == "padded":  # on two parts, the second has nothing to predict
        num_valid = torch.tensor([12, 7, 1, 0]).chunk(num_parts)
        return [part | {"num_valid": n} for part, n in zip(parts, num_valid, strict=True)]
    return parts


def own(parts: list[dict], mesh: DeviceMesh) -> dict:
    return parts[mesh["dp"].get_local_rank() if "dp" in mesh.mesh_dim_names else 0]


def whole_loss(model: Llama2, parts: list[dict]) -> torch.Tensor:
    count = sum(count_predictions(**part) for part in parts)
    return sum(model.loss(**part, num_predictions=count) for part in parts)


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def same_gradients(model: Llama2, alone: Llama2) -> None:
    expected = dict(alone.named_parameters())
    assert {name for name, _ in model.named_parameters()} == set(expected)
    for name, parameter in model.named_parameters():
        close(whole(parameter.grad), expected[name].grad, msg=lambda m, name=name: f"{name}: {m}")


def gradients(name: str, form: str, *, tied: bool = False, **options) -> None:
    mesh = make_mesh(name)
    alone = float64_model(tie_word_embeddings=tied)
    model = parallel.parallelize(float64_model(tie_word_embeddings=tied), mesh, **options)
    parts = batches(form, mesh)
    loss = parallel.loss(model, **own(parts, mesh), mesh=mesh)
    loss.backward()
    expected = whole_loss(alone, parts)
    expected.backward()
    close(parallel.mean(loss, mesh), expected.detach())
    same_gradients(model, alone)


def training(name: str) -> None:
    """Steps of AdamW after a clip that bites, across sharded and plain parameters."""
    mesh = make_mesh(name)
    alone = float64_model()
    model = parallel.parallelize(float64_model(), mesh)
    optimizers = [make_optimizer(m, TRAINING) for m in (model, alone)]
    parts = batches("plain", mesh)
    for _ in range(TRAINING.steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        parallel.loss(model, **own(parts, mesh), mesh=mesh).backward()
        whole_loss(alone, parts).backward()
        norm = parallel.grad_norm(parameter.grad for parameter in model.parameters())
        expected = update.grad_norm(parameter.grad for parameter in alone.parameters())
        assert type(norm) is torch.Tensor and expected > 0.1
        close(norm, expected)
        same_gradients(model, alone)
        for optimizer in optimizers:
            update.step_fused(optimizer, update.clipping_scale(norm, 0.1))
    expected = dict(alone.named_parameters())
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(whole(parameter), expected[key], rtol=1e-8, atol=1e-8)


def logits(name: str) -> None:
    mesh = make_mesh(name)
    tokens = batches("plain", mesh)[0]["tokens"]
    close(parallel.parallelize(float64_model(), mesh)(tokens), float64_model()(tokens))


def two_sums_per_layer() -> None:
    """And as many for the gradients; the embedding costs one, the loss three numbers per token and
    the gradient of the hidden states, and no logits travel."""
    model = parallel.parallelize(float64_model(), make_mesh("tp"))
    with CommDebugMode() as communication:
        model.loss(random_tokens("cpu", 2, 9)).backward()
    counts = {op.__name__: n for op, n in communication.get_comm_counts().items()}
    sums = 4 * len(model.layers) + 1
    assert counts == {"all_reduce": sums, "allreduce_": 4}, counts


def generation() -> None:
    """Ranks draw the same tokens, each with a cache of its own heads."""
    model = parallel.parallelize(float64_model(num_q_heads=4, num_kv_heads=2), make_mesh("tp"))
    assert model.cache_config.num_kv_heads == 1 and model.config.num_kv_heads == 2
    prompts = [[1, 5, 9], [1, 7]]
    for temperature in (0.0, 1.0):
        options = {"max_new_tokens": 5, "temperature": temperature, "seed": 3}
        assert generate(model, prompts, **options) == generate(float64_model(), prompts, **options)


def no_generation_from_sharded_parameters() -> None:
    model = parallel.parallelize(float64_model(), make_mesh("dp"))
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        generate(model, [[1, 2]], max_new_tokens=1)


def a_cache_of_all_heads() -> None:
    """One head would be written to both."""
    from llama2.cache.kv_cache import KVCache

    model = parallel.parallelize(float64_model(), make_mesh("tp"))
    cache = KVCache(model.config, 1, 8, dtype=torch.float64, device="cpu")
    with pytest.raises(ValueError, match=r"cache: expected 1 key/value heads.*got 2"):
        model(random_tokens("cpu", 1, 4), cache)


def triton(name: str) -> None:
    """The kernels on the heads of a rank, and on gathered parameters."""
    from gqa_kernels import get_backend

    mesh = make_mesh(name)
    plain = make_model()
    model = parallel.parallelize(twin(plain, get_backend("triton")), mesh)
    parts = batches("padded", mesh)
    parallel.loss(model, **own(parts, mesh), mesh=mesh).backward()
    ours = torch.cat([whole(p.grad).flatten() for p in model.parameters()])

    def gradient(model: Llama2) -> torch.Tensor:
        grads = torch.autograd.grad(whole_loss(model, parts), tuple(model.parameters()))
        return torch.cat([grad.flatten() for grad in grads])

    assert_network(ours, plain, gradient, lambda m: gradient(twin(m, dtype=torch.float64)))


def layers_in_bfloat16() -> None:
    """Layers compute in bfloat16; parameters and gradients stay float32."""
    mesh = make_mesh("dp")
    plain = make_model()
    model = parallel.parallelize(twin(plain), mesh, param_dtype=torch.bfloat16)
    seen = []
    model.layers[1].mlp.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    parts = batches("plain", mesh)
    parallel.loss(model, **own(parts, mesh), mesh=mesh).backward()
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    whole_loss(plain, parts).backward()
    ours, theirs = (
        torch.cat([whole(p.grad).flatten() for p in m.parameters()]) for m in (model, plain)
    )
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.99


def recomputed_layers_run_twice() -> None:
    model = parallel.parallelize(float64_model(), make_mesh("tp"), recompute_layers=True)
    calls = []
    model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    model.loss(random_tokens("cpu", 2, 6)).backward()
    assert len(calls) == 2


def refused() -> None:
    for size, names in (((2,), None), ((2,), ("x",)), ((1, 2), ("tp", "dp"))):
        mesh = init_device_mesh("cpu", size, mesh_dim_names=names)
        with pytest.raises(ValueError, match="mesh: expected dimensions"):
            parallel.parallelize(float64_model(), mesh)
    tp = make_mesh("tp")
    for name, value in (("num_q_heads", 3), ("num_kv_heads", 1), ("intermediate_size", 111)):
        heads = {"num_kv_heads": 3} if name == "num_q_heads" else {}
        model = Llama2(config(**heads, **{name: value}), EAGER)
        message = rf"{name}: expected a multiple of tp \(2\); got {value}"
        with pytest.raises(ValueError, match=message):
            parallel.parallelize(model, tp)
    with pytest.raises(ValueError, match="param_dtype: expected None without 'dp'"):
        parallel.parallelize(float64_model(), tp, param_dtype=torch.bfloat16)
    with torch.device("meta"):
        tied = Llama2(config(tie_word_embeddings=True), EAGER)
    with pytest.raises(ValueError, match="model: expected tied word embeddings on a real device"):
        parallel.parallelize(tied, tp)
    with pytest.raises(ValueError, match="model: expected the same weights on every rank"):
        parallel.parallelize(make_model(seed=dist.get_rank()), tp)


def trained(mesh: DeviceMesh | None, seed: int = 0) -> tuple[Llama2, torch.optim.Optimizer]:
    """After a step of AdamW, from whole tokens, so that it has moments."""
    model = make_model(seed).double()
    if mesh is not None:
        parallel.parallelize(model, mesh)
    optimizer = make_optimizer(model, TRAINING)
    model.loss(torch.arange(24).view(2, 12)).backward()
    optimizer.step()
    return model, optimizer


def contents(model: Llama2, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = whole(parameter.detach()).clone()
        for key, value in optimizer.state[parameter].items():
            found[f"{name}.{key}"] = whole(value).clone()
    return found


def same_contents(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        close(value, b[key], msg=lambda m, key=key: f"{key}: {m}")


def resharding(folder: str, name: str) -> None:
    """A state of one process is that of a mesh, and back."""
    mesh = make_mesh(name)
    from_one, to_one = Path(folder, "from one"), Path(folder, f"from {name}")
    model, optimizer = trained(mesh, seed=1)
    before = contents(model, optimizer)
    assert load_sharded_state(from_one, model, optimizer) == 7
    after = contents(model, optimizer)
    same_contents(after, torch.load(Path(folder, "contents of one.pt")))
    assert not after["norm.weight"].equal(before["norm.weight"])
    model, optimizer = trained(mesh, seed=2)
    save_sharded_state(to_one, model, optimizer, 3, {})
    expected = contents(model, optimizer)
    if dist.get_rank() == 0:
        torch.save(expected, Path(folder, f"contents of {name}.pt"))
    # As the optimiser goes on from the loaded state, so it would have from its own.
    again, other = trained(mesh, seed=1)
    assert load_sharded_state(to_one, again, other) == 3
    for m, o in ((model, optimizer), (again, other)):
        o.zero_grad()
        m.loss(torch.arange(24).view(2, 12)).backward()
        o.step()
    same_contents(contents(again, other), contents(model, optimizer))


def killed_and_resumed(folder: str, start: str, end: str) -> None:
    """A run that is killed on one mesh and goes on on another has the losses of a whole one."""
    training = dataclasses.replace(TRAINING, steps=5)
    data = RandomWindows(torch.randint(97, (200,)).numpy(), training)

    def run(name: str, work: str, save_every: int) -> list[float]:
        mesh = make_mesh(name)
        model = parallel.parallelize(make_model().double(), mesh)
        log = distributed.train(
            model, data, mesh, training, Path(folder, work), save_every=save_every
        )
        assert [record["step"] for record in log] == [0, 1, 2, 3, 4]
        return [record["loss"] for record in log]

    losses = run(start, f"whole, {start}", 5)
    step = pretrain.train_step

    def killed(*args) -> tuple[float, float]:
        if args[3] == 3:
            raise KeyboardInterrupt
        return step(*args)

    pretrain.train_step = killed
    try:
        with pytest.raises(KeyboardInterrupt):
            run(start, f"killed, {start}", 2)
    finally:
        pretrain.train_step = step
    close(torch.tensor(run(end, f"killed, {start}", 2)), torch.tensor(losses), rtol=1e-9)


def weights_alone(folder: str, name: str) -> None:
    """Into a model that has no memory before it is sharded."""
    with torch.device("meta"):
        model = Llama2(config(), EAGER).double()
    parallel.parallelize(model, make_mesh(name)).to_empty(device="cpu")
    assert load_sharded_state(Path(folder, "from one"), model) == 7
    expected = torch.load(Path(folder, "contents of one.pt"))
    for key, parameter in model.named_parameters():
        close(whole(parameter.detach()), expected[key])
    alone = make_model().double()
    load_sharded_state(Path(folder, "from one"), alone)
    tokens = random_tokens("cpu", 2, 9)
    close(model(tokens), alone(tokens))


FORMS = ("plain", "padded", "packed")
ON_TWO_RANKS = {
    "refused": refused,
    **{f"logits, {name}": partial(logits, name) for name in ("tp", "dp")},
    **{
        f"gradients, {name}, {form}": partial(gradients, name, form)
        for name in ("tp", "dp")
        for form in FORMS
    },
    **{
        f"gradients, {name}, tied": partial(gradients, name, "plain", tied=True)
        for name in ("tp", "dp")
    },
    **{
        f"gradients, {name}, recomputed": partial(gradients, name, "packed", recompute_layers=True)
        for name in ("tp", "dp")
    },
    "gradients, dp, parameters kept": partial(
        gradients, "dp", "plain", reshard_after_forward=False
    ),
    "recomputed layers run twice": recomputed_layers_run_twice,
    **{f"training, {name}": partial(training, name) for name in ("tp", "dp")},
    "layers in bfloat16": layers_in_bfloat16,
    "two sums per layer": two_sums_per_layer,
    "generation": generation,
    "no generation from sharded parameters": no_generation_from_sharded_parameters,
    "a cache of all heads": a_cache_of_all_heads,
    **{f"triton, {name}": partial(triton, name) for name in ("tp", "dp")},
}
ON_FOUR_RANKS = {
    **{f"gradients, {form}": partial(gradients, "dp, tp", form) for form in FORMS},
    "gradients, tied": partial(gradients, "dp, tp", "plain", tied=True),
    "gradients, recomputed": partial(gradients, "dp, tp", "packed", recompute_layers=True),
    "training": partial(training, "dp, tp"),
}


STATES_ON_TWO_RANKS = {
    "resharding, tp": partial(resharding, name="tp"),
    "resharding, dp": partial(resharding, name="dp"),
    "weights alone, tp": partial(weights_alone, name="tp"),
    "weights alone, dp": partial(weights_alone, name="dp"),
    "killed and resumed": partial(killed_and_resumed, start="dp", end="tp"),
}
STATES_ON_FOUR_RANKS = {"resharding, dp, tp": partial(resharding, name="dp, tp")}


def one_process_saves(folder: Path) -> None:
    model, optimizer = trained(None)
    save_sharded_state(folder / "from one", model, optimizer, 7, RUN)
    torch.save(contents(model, optimizer), folder / "contents of one.pt")


def one_process_reads(folder: Path, name: str) -> None:
    model, optimizer = trained(None, seed=1)
    assert load_sharded_state(folder / f"from {name}", model, optimizer) == 3
    same_contents(contents(model, optimizer), torch.load(folder / f"contents of {name}.pt"))


def in_folder(folder: Path, cases: dict) -> dict:
    return {name: partial(case, str(folder)) for name, case in cases.items()}


def test_on_two_ranks(tmp_path):
    one_process_saves(tmp_path)
    ranks.run(ON_TWO_RANKS | in_folder(tmp_path, STATES_ON_TWO_RANKS), 2)
    one_process_reads(tmp_path, "tp")
    one_process_reads(tmp_path, "dp")


def test_on_four_ranks(tmp_path):
    one_process_saves(tmp_path)
    ranks.run(ON_FOUR_RANKS | in_folder(tmp_path, STATES_ON_FOUR_RANKS), 4)
    one_process_reads(tmp_path, "dp, tp")


def test_a_killed_save_loses_nothing(tmp_path, monkeypatch):
    model, optimizer = trained(None)
    save_sharded_state(tmp_path, model, optimizer, 1, RUN)
    expected = contents(model, optimizer)
    other, other_optimizer = trained(None, seed=1)

    def killed(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("llama2.train.sharded_state.os.replace", killed)
        save_sharded_state(tmp_path, other, other_optimizer, 2, RUN)
    assert (tmp_path / "step-2.partial").is_dir()
    assert load_sharded_state(tmp_path, other, other_optimizer) == 1
    same_contents(contents(other, other_optimizer), expected)
    (tmp_path / "step-2.partial" / "junk").touch()
    save_sharded_state(tmp_path, other, other_optimizer, 2, RUN)
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]
    assert not (tmp_path / "step-2" / "junk").exists()


def test_states_that_are_not_there_or_not_fit(tmp_path):
    model, optimizer = trained(None)
    assert load_sharded_state(tmp_path / "none", model, optimizer, RUN) == 0
    save_sharded_state(tmp_path, model, optimizer, 5, RUN)
    with pytest.raises(ValueError, match=r"step: expected one after the 5 saved in .*; got 5"):
        save_sharded_state(tmp_path, model, optimizer, 5, RUN)
    before = contents(model, optimizer)
    with pytest.raises(ValueError, match=r"step-5: .* a run with train_config seed=4; got 3"):
        load_sharded_state(tmp_path, model, optimizer, {"train_config": {"seed": 4}})
    same_contents(contents(model, optimizer), before)
    wider = Llama2(config(vocab_size=99), EAGER).double()
    with pytest.raises(CheckpointException, match=r"embed_tokens\.weight"):
        load_sharded_state(tmp_path, wider)


def torchrun(*arguments: object) -> subprocess.CompletedProcess:
    # Standalone: on a port that is free.
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return subprocess.run(
        [sys.executable, *command, "-m", "llama2.train.distributed", *map(str, arguments)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_the_command_trains(tmp_path):
    sizes = ("--batch-size", 4, "--seq-len", 64, "--warmup-steps", 1, "--work", tmp_path / "work")
    result = torchrun("--tp", 2, "--steps", 6, *sizes, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "{'tp': 2}, torch backend" in result.stdout
    log = read_log(tmp_path / "work" / "log.jsonl")
    assert [record["step"] for record in log] == [0, 1, 2, 3, 4, 5]
    assert log[5]["loss"] < log[0]["loss"] - 0.1
    files = {path.name for path in (tmp_path / "work").iterdir()}
    assert files == {"step-6", "log.jsonl", "start.json"}
    model = checkpoint.load(tmp_path / "out", EAGER, dtype=torch.float32)
    trained = Llama2(model.config, EAGER)
    load_sharded_state(tmp_path / "work", trained)
    for name, parameter in trained.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter.bfloat16().float()), name
    assert Tokenizer(tmp_path / "out" / "tokenizer.model").vocab_size == model.config.vocab_size
