"""Saved states of runs on several processes, which a run on any number of processes can load.

A folder holds `step-N`, a directory of `torch.distributed.checkpoint`, for the last state saved.
Its `.metadata` is a pickle, which can run code when it is read: load only states that you saved
yourself.
"""

import json
import os
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from llama2.storage import read_json
from llama2.train.state import Identity, check_identity

_STATE = re.compile(r"step-(\d+)")
_IDENTITY = "identity.json"
# The optimizer's state by parameter, as its groups depend on the mesh that writes it.
_BY_PARAMETER = StateDictOptions(flatten_optimizer_state_dict=True)


def save_sharded_state(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    identity: Identity,
) -> None:
    """Writes the state after `step` steps; every rank calls it.

    The folder always has a complete state: the old one is removed once the new one is complete.

    Args:
        identity: of the run, from `pretrain.run_identity`.
    Raises:
        ValueError: the folder has a state after as many steps or more.
    """
    newest = max(_states(folder), default=-1)
    if newest >= step:
        raise ValueError(f"step: expected one after the {newest} saved in {folder}; got {step}")
    partial = folder / f"step-{step}.partial"
    if _first_rank():
        shutil.rmtree(partial, ignore_errors=True)  # of a killed run
        folder.mkdir(parents=True, exist_ok=True)
    _wait()
    weights, moments = get_state_dict(model, optimizer, options=_BY_PARAMETER)
    state = {"model": weights, "optimizer": moments}
    dcp.save(state, checkpoint_id=partial)
    _wait()
    if _first_rank():
        (partial / _IDENTITY).write_text(json.dumps(identity, indent=2), encoding="utf-8")
        old = _states(folder)
        os.replace(partial, folder / f"step-{step}")
        for path in old.values():
            shutil.rmtree(path)
    _wait()


def load_sharded_state(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    identity: Identity | None = None,
) -> int:
    """Restores the newest state of a folder on the present number of processes; every rank calls
    it.

    Args:
        optimizer: None reads only the weights.
        identity: of the run to resume; None accepts the state of any run.
    Returns:
        The number of steps done; 0 if the folder has no state, and nothing changes.
    Raises:
        ValueError: the state is of another run; names the first difference.
        torch.distributed.checkpoint.CheckpointException: the state is of a model with other shapes.
    """
    states = _states(folder)
    if not states:
        return 0
    step = max(states)
    if identity is not None:
        check_identity(
            states[step],
            read_json(states[step] / _IDENTITY),
            identity,
        )
    if optimizer is None:
        state = {"model": get_model_state_dict(model)}
    else:
        weights, moments = get_state_dict(model, optimizer, options=_BY_PARAMETER)
        state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=states[step])
    if optimizer is None:
        set_model_state_dict(model, state["model"])
    else:
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=_BY_PARAMETER,
        )
    return step


def _states(folder: Path) -> dict[int, Path]:
    """Returns the complete states of a folder by their steps."""
    if not folder.is_dir():
        return {}
    found = {path: _STATE.fullmatch(path.name) for path in folder.iterdir()}
    return {int(match[1]): path for path, match in found.items() if match}


def _first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()
