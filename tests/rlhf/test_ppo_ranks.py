"""PPO on two processes against one, in float64, where roundings change no draw."""

import contextlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import ranks
import tiny_ppo
import torch
import torch.distributed as dist
from combinations import long
from small_llama import EAGER, twin
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from llama2 import parallel
from llama2.rlhf import ppo, rollouts
from llama2.rlhf.ppo import Actors
from llama2.rlhf.rollouts import Judge
from llama2.rlhf.scoring import Scorer
from llama2.scalar_model import ScalarModel
from llama2.train.distributed import Sharded, make_mesh
from llama2.train.execution import OneProcess
from llama2.train.state import read_log

CONFIG = replace(tiny_ppo.CONFIG, micro_batch_size=2)
SAME = ("reward", "kl", "entropy", "explained_variance", "clip_fraction", "approx_kl", "grad_norm")


def policy():
    return twin(tiny_ppo.policy(), dtype=torch.float64)


def scalar():
    """A reward model and a critic that read the text: the policy's body, in float64."""
    model = ScalarModel.from_decoder(policy(), EAGER, seed=3)
    model.rope.cos, model.rope.sin = policy().rope.cos, policy().rope.sin
    return model


def train(folder, mesh=None, **changes):
    """The log, and the whole weights that were trained."""
    config = replace(CONFIG, **changes)
    execution = OneProcess() if mesh is None else Sharded(mesh)

    def placed(model):
        return model if mesh is None else parallel.parallelize(model, mesh)

    most = CONFIG.batch_size * tiny_ppo.SHAPE.max_seq_len
    actors = Actors(
        placed(policy()),
        None if config.group_size else placed(scalar()),
        placed(policy().requires_grad_(False)),
        Judge(Scorer(placed(scalar().requires_grad_(False)), max_tokens=most)),
    )
    sampler = replace(tiny_ppo.sampler(config, execution), dtype=torch.float64)
    log = ppo.train(
        actors,
        tiny_ppo.questions(config),
        sampler,
        config,
        folder,
        save_every=1,
        execution=execution,
    )
    models = [actors.policy] if config.group_size else [actors.policy, actors.critic]
    weights = [weight.detach() for model in models for weight in model.parameters()]
    return log, [x.full_tensor() if isinstance(x, DTensor) else x for x in weights]


def mesh_of(name: str) -> DeviceMesh:
    return init_device_mesh("cpu", (2,), mesh_dim_names=(name,))


@contextlib.contextmanager
def counted_gathers():
    """Calls of what gathers the whole weights."""
    calls, gather = [], rollouts.replica
    rollouts.replica = lambda *args: calls.append(None) or gather(*args)
    try:
        yield calls
    finally:
        rollouts.replica = gather


def is_that_of_one_process(first: str, then: str, folder: Path, group_size: int) -> None:
    """Killed after the first iteration, and gone on with from its state, on another mesh too."""
    state = folder / f"{first} {then}"
    with counted_gathers() as gathers:
        train(state, mesh_of(first), iterations=1, group_size=group_size)
        log, weights = train(state, mesh_of(then), group_size=group_size)
    assert len(gathers) == 2 and [line["gathers"] for line in log] == [1, 1]
    expected = read_log(folder / "one" / "log.jsonl")
    for line, other in zip(log, expected, strict=True):
        assert line["first_ratio_deviation"] == 0.0
        for key in SAME:
            if other[key] is not None:
                assert abs(line[key] - other[key]) < 1e-6, (key, line[key], other[key])
    for weight, other in zip(
        weights, torch.load(folder / "one.pt", weights_only=True), strict=True
    ):
        torch.testing.assert_close(weight, other, rtol=1e-6, atol=1e-6)


def items_come_back_in_their_order() -> None:
    execution = Sharded(make_mesh("cpu", 1))
    items = list("abcde")
    found = execution.spread(items, lambda share: [(each, dist.get_rank()) for each in share])
    assert found == [("a", 0), ("b", 1), ("c", 0), ("d", 1), ("e", 0)]
    assert execution.spread(["a"], list) == ["a"]  # one process has nothing to do
    own = execution.own_rows(items)
    assert own == (["b", "d"] if dist.get_rank() else ["a", "c", "e"])
    assert execution.collected(own) == items


MESHES = {0: (("dp", "tp"), ("tp", "dp"), ("tp", "tp")), 4: (("dp", "dp"),)}


@pytest.mark.parametrize(
    "meshes", ({0: MESHES[0][:1], 4: MESHES[4]}, long(MESHES)), ids=("few", "all")
)
def test_two_processes_do_what_one_does(meshes, tmp_path):
    cases = {"order": items_come_back_in_their_order}
    for group_size, pairs in meshes.items():
        folder = tmp_path / str(group_size)
        log, weights = train(folder / "one", group_size=group_size)
        assert len(log) == 2 and log[1]["kl"] > 0
        torch.save(weights, folder / "one.pt")
        for pair in pairs:
            same = partial(is_that_of_one_process, *pair, folder, group_size)
            cases[f"{pair} {group_size}"] = same
    ranks.run(cases, 2)
