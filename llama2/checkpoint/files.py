"""The files of a checkpoint: JSON, safetensors and pickles, opened without reading their tensors.

`hf` and `meta` interpret the tensors.
"""

import importlib
import json
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from llama2.config import MAX_SIZE, ModelConfig, is_positive, is_size
from llama2.extras import how_to_install

FLOATS = {  # by their names in safetensors
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class CheckpointError(ValueError):
    """A checkpoint is malformed; the message names the file and, where there is one, the key."""


@dataclass(frozen=True)
class StoredTensor:
    """A floating-point tensor in a file; `read` loads it."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """The stored tensors of a directory by their keys in the files, as a format's reader finds
    them.

    `dtype` is the one that the configuration declares; `key_of` gives the key of a parameter of
    a `Decoder` by its name.
    """

    config: ModelConfig
    dtype: torch.dtype | None
    tensors: dict[str, StoredTensor]
    key_of: Callable[[str], str]


class Settings(dict[str, Any]):
    """A JSON object whose errors name the file and the key.

    An absent key and null both mean the default.
    """

    def __init__(self, where: str, content: Any) -> None:
        if not isinstance(content, dict):
            raise CheckpointError(f"{where}: expected a JSON object; got {content!r:.60}")
        super().__init__((key, value) for key, value in content.items() if value is not None)
        self.where = where

    @classmethod
    def read(cls, file: Path) -> "Settings":
        try:
            content = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:  # also for a number of thousands of digits
            raise CheckpointError(f"{file}: expected JSON; {error}") from error
        return cls(str(file), content)

    def section(self, key: str) -> "Settings":
        """Returns the object under a key, empty if absent."""
        return Settings(f"{self.where}: {key}", self.get(key, {}))

    def size(self, key: str, default: int | None = None, *, most: int = MAX_SIZE) -> int:
        value = self._get(key, default)
        if not is_size(value, most):
            raise CheckpointError(
                f"{self.where}: {key}: expected an int from 1 to {most}; got {value!r:.60}"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if not is_positive(value):
            raise CheckpointError(
                f"{self.where}: {key}: expected a positive number; got {value!r:.60}"
            )
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.get(key, False)
        if type(value) is not bool:
            raise CheckpointError(f"{self.where}: {key}: expected true or false; got {value!r:.60}")
        return value

    def model_config(self, **sizes: Any) -> ModelConfig:
        try:
            return ModelConfig(**sizes)
        except ValueError as error:
            raise CheckpointError(f"{self.where}: {error}") from error

    def _get(self, key: str, default: float | None) -> Any:
        if key not in self and default is None:
            raise CheckpointError(f"{self.where}: missing key {key}")
        return self.get(key, default)


def require(module: str) -> ModuleType:
    """Imports an optional dependency and returns it.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"checkpoints need {module.partition('.')[0]}; {how_to_install('models')}"
        ) from error


def open_tensors(file: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a safetensors file or of a `torch.save`d state dict, memory-mapped.

    Pickles are opened with `weights_only=True`, which refuses files that run other code.

    Raises:
        CheckpointError: the file is truncated, corrupt or not a state dict, or contains a tensor
            whose dtype is not in FLOATS.
    """
    _refuse_pointer(file)
    return _open_safetensors(file) if file.suffix == ".safetensors" else _open_pickle(file)


def _open_safetensors(file: Path) -> dict[str, StoredTensor]:
    safetensors = require("safetensors")
    try:
        handle = safetensors.safe_open(file, framework="pt")
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{file}: expected a safetensors file; {error}") from error
    tensors = {}
    for key in handle.keys():  # noqa: SIM118, the handle is not a mapping
        header = handle.get_slice(key)
        dtype = FLOATS.get(header.get_dtype())
        if dtype is None:
            raise _wrong_dtype(file, key, header.get_dtype())
        tensors[key] = StoredTensor(
            file, tuple(header.get_shape()), dtype, lambda key=key: handle.get_tensor(key)
        )
    return tensors


def _refuse_pointer(file: Path) -> None:
    with file.open("rb") as opened:
        if opened.read(40).startswith(b"version https://git-lfs.github.com"):
            raise CheckpointError(
                f"{file}: expected weights; got a Git LFS pointer. `git lfs pull` downloads them"
            )


def _open_pickle(file: Path) -> dict[str, StoredTensor]:
    mmap = zipfile.is_zipfile(file)  # PyTorch before 1.6 wrote another format
    try:
        state = torch.load(file, map_location="cpu", mmap=mmap, weights_only=True)
    except Exception as error:  # damaged bytes can fail anywhere in zip, pickle and torch
        raise CheckpointError(
            f"{file}: expected a state dict that loads with weights_only=True; "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{file}: expected a dict of tensors; got {type(state).__name__}")
    tensors = {}
    for key, tensor in state.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{file}: {key}: expected a name and a tensor; got a {type(key).__name__} and a "
                f"{type(tensor).__name__}"
            )
        if tensor.dtype not in FLOATS.values():
            raise _wrong_dtype(file, key, tensor.dtype)
        if tensor.layout is not torch.strided or tensor.device.type != "cpu":
            raise CheckpointError(
                f"{file}: {key}: expected a dense tensor with values; got one of {tensor.layout} "
                f"on {tensor.device}"
            )
        tensors[key] = StoredTensor(
            file, tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor
        )
    return tensors


def _wrong_dtype(file: Path, key: str, dtype: object) -> CheckpointError:
    return CheckpointError(f"{file}: {key}: expected one of {', '.join(FLOATS)}; got {dtype}")
