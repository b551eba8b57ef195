"""What a killed run leaves behind and a resumed run picks up: a state and a log."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn


def save_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    identity: dict[str, Any],
) -> None:
    """Writes all that resuming after `step` steps needs; `path` holds the old state or the new one,
    never half of one."""
    state = {
        **identity,
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: dict[str, Any]
) -> int:
    """Restores what `save_state` wrote and returns the number of steps done.

    Raises:
        ValueError: the state is of another model, recipe or stream; names the first difference.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    check_identity(path, state, identity)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def check_identity(path: Path, found: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raises a ValueError that names the first difference between two runs, if there is one."""
    for kind, expected in identity.items():
        for name, value in expected.items():
            if found[kind].get(name) != value:
                raise ValueError(
                    f"{path}: expected the state of a run with {kind} {name}={value!r}; "
                    f"got {found[kind].get(name)!r}"
                )


def read_log(path: Path) -> list[dict[str, float]]:
    """The records of a JSON-lines log."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def cut_log(path: Path, count: int) -> float:
    """Keeps the first `count` lines and returns the seconds that the last of them says: a killed
    run may have logged steps that it never saved."""
    lines = path.read_text().splitlines(keepends=True)[:count] if path.exists() else []
    path.write_text("".join(lines))
    return json.loads(lines[-1])["seconds"] if lines else 0.0
