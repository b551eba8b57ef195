"""Checkpoints: `load` reads Hugging Face's and Meta's directories, `save_hf` and `save_meta` write;
`load_scalar` reads Hugging Face's of a reward model.

The configuration file tells the layouts apart: config.json or params.json.
"""

import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from llama2.checkpoint import hf, meta
from llama2.checkpoint.files import FLOATS, Checkpoint, CheckpointError, require
from llama2.checkpoint.hf import save_hf
from llama2.checkpoint.meta import save_meta
from llama2.config import ModelConfig
from llama2.decoder import AnyDecoder, Decoder
from llama2.model import Llama2
from llama2.scalar_model import ScalarModel
from llama2.storage import is_unfinished

__all__ = [
    "SHIPPED",
    "SHIPPED_CHAT",
    "CheckpointError",
    "is_scalar",
    "load",
    "load_config",
    "load_dtype",
    "load_scalar",
    "save_hf",
    "save_meta",
    "weights_crc32",
]

# The small models that come with this package: of Python source, and one trained to answer.
SHIPPED = Path(__file__).parents[1] / "checkpoints" / "stdlib"
SHIPPED_CHAT = SHIPPED.with_name("chat")
_QUIET_BYTES = 2**30  # read in about a second, so without a progress bar
_CHUNK = 2**24  # bytes read at once for a checksum


def load_config(path: str | Path) -> ModelConfig:
    """Returns the configuration of a checkpoint directory.

    Hugging Face's config.json is complete; Meta's params.json is read together with the shapes of
    the weights, which must be present.

    Raises:
        CheckpointError: the checkpoint is malformed; the message names the file and the key.
        NotImplementedError: a key describes a model that differs from Llama 2; the message names
            it.
    """
    folder = Path(path)
    return _format(folder).read_config(folder)


def load_dtype(path: str | Path) -> torch.dtype:
    """Returns the dtype that `load` gives the parameters of a checkpoint directory by default.

    Raises:
        CheckpointError, NotImplementedError, ImportError: as `load`.
    """
    folder = Path(path)
    return _common_dtype(_format(folder).read_checkpoint(folder))


def load(
    path: str | Path,
    ops: ModuleType,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    max_seq_len: int | None = None,
) -> Llama2:
    """Returns the model of a checkpoint directory, in eval mode.

    It memory-maps the files, checks all keys, shapes and dtypes before it allocates memory, and
    copies tensors one by one: peak memory is the model and its largest tensor. Meta's q and k stay
    interleaved, with `rope_interleaved` in the model's config.

    Args:
        path: a directory with config.json and model.safetensors or pytorch_model.bin, or their
            shards with an index; or with params.json and consolidated.NN.pth.
        ops: the backend, such as `get_backend("triton")`.
        dtype: of the parameters; None means the one that config.json declares, otherwise that of
            the tensors, which must be the same for all.
        max_seq_len: length of the rotary table; None means the checkpoint's context length; for
            Meta's directories, which do not record it, Llama 2's 4096.
    Raises:
        CheckpointError: the checkpoint is malformed; the message names the file and the key.
        NotImplementedError: a key describes a model that differs from Llama 2; the message names
            it.
        ValueError: `dtype` is not a dtype of weights, or `max_seq_len` is not positive.
        ImportError: a package of the extra `models` is missing.
    """
    _check_dtype(dtype)
    return _filled(*open_checkpoint(path, ops, max_seq_len=max_seq_len), dtype, device)


def is_scalar(path: str | Path) -> bool:
    """Returns whether a checkpoint directory is a reward model, which `load_scalar` loads.

    Raises:
        CheckpointError: as `load_config`.
    """
    folder = Path(path)
    return _format(folder) is hf and hf.read_architecture(folder) == hf.SCALAR


def load_scalar(
    path: str | Path,
    ops: ModuleType,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> ScalarModel:
    """Returns the reward model of a directory of `LlamaForSequenceClassification` with one label.

    Arguments and errors are those of `load`; raises NotImplementedError for another architecture.
    """
    _check_dtype(dtype)
    folder = Path(path)
    if _format(folder) is meta:
        raise NotImplementedError(
            f"{folder}: expected Hugging Face's files of {hf.SCALAR}; got Meta's"
        )
    checkpoint = hf.read_checkpoint(folder, hf.SCALAR)
    return _filled(checkpoint, _built(folder, checkpoint, ScalarModel, ops), dtype, device)


def weights_crc32(path: str | Path) -> str:
    """Returns the CRC-32 of a checkpoint directory's weight files, 8 hexadecimal digits, to detect
    changed weights. Reads all bytes.

    Raises:
        CheckpointError: it is not a checkpoint directory.
    """
    folder, digest = Path(path), 0
    _format(folder)
    files = (file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".pth"))
    for file in sorted(files):
        with file.open("rb") as opened:
            while part := opened.read(_CHUNK):
                digest = zlib.crc32(part, digest)
    return f"{digest:08x}"


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in FLOATS.values():
        raise ValueError(
            f"dtype: expected one of {', '.join(map(str, FLOATS.values()))}; got {dtype}"
        )


def _filled(
    checkpoint: Checkpoint, model: AnyDecoder, dtype: torch.dtype | None, device: torch.device | str
) -> AnyDecoder:
    """Allocates memory for a model on the meta device, loads the stored tensors and returns it."""
    model.to(_common_dtype(checkpoint) if dtype is None else dtype).to_empty(device=device)
    _copy(checkpoint, model)
    return model.eval()


def open_checkpoint(
    path: str | Path, ops: ModuleType, *, max_seq_len: int | None = None
) -> tuple[Checkpoint, Llama2]:
    """Returns the stored tensors of a directory, once all are checked, and their model without
    memory.

    The model is on the meta device. `Checkpoint.key_of` maps its parameters' names to the tensors'
    keys. Arguments and errors are those of `load`.
    """
    folder = Path(path)
    checkpoint = _format(folder).read_checkpoint(folder)
    config = checkpoint.config
    if max_seq_len is not None:
        config = replace(config, max_seq_len=max_seq_len)
    checkpoint = replace(checkpoint, config=config)
    return checkpoint, _built(folder, checkpoint, Llama2, ops)


def _built(
    folder: Path,
    checkpoint: Checkpoint,
    kind: Callable[[ModelConfig, ModuleType], AnyDecoder],
    ops: ModuleType,
) -> AnyDecoder:
    """Returns the model of a checkpoint, without memory, once all its tensors are checked."""
    config = checkpoint.config
    if config.num_layers > len(checkpoint.tensors):  # before that many layers are built
        raise CheckpointError(
            f"{folder}: expected tensors for the {config.num_layers} layers of its configuration; "
            f"got {len(checkpoint.tensors)} tensors"
        )
    with torch.device("meta"):
        model = kind(config, ops)
    parameters = {checkpoint.key_of(name): value for name, value in model.named_parameters()}
    _check(folder, checkpoint, parameters)
    return model


def _format(folder: Path) -> ModuleType:
    found = [module for module in (hf, meta) if (folder / module.CONFIG_FILE).is_file()]
    if is_unfinished(folder):
        raise CheckpointError(
            f"{folder}: expected a complete checkpoint; got one whose writing was interrupted. The "
            "command that wrote it can finish it"
        )
    if not found and (kind := _other_kind(folder)):
        raise CheckpointError(f"{folder}: {kind}")
    if len(found) != 1:
        raise CheckpointError(
            f"{folder}: expected a directory with either config.json (Hugging Face) or params.json "
            f"(Meta); got {'both' if found else 'neither'}"
        )
    return found[0]


def _other_kind(folder: Path) -> str | None:
    """Returns a message for common paths that are not checkpoints of these formats, with advice;
    otherwise None."""
    if not folder.exists() and len(folder.parts) == 2:
        return (
            "expected a directory; got none. If it is a name on a hub, download it first, for "
            "example by `hf download NAME --local-dir DIR`"
        )
    if folder.suffix == ".gguf" or (folder.is_dir() and any(folder.glob("*.gguf"))):
        return (
            "expected safetensors, .bin or .pth; got GGUF, which is not supported: use the original"
        )
    if (folder / "adapter_config.json").is_file():
        return (
            "expected a whole model; got an adapter. Merge it into its base model first, for "
            "example by peft's merge_and_unload"
        )
    return None


def _check(folder: Path, checkpoint: Checkpoint, expected: dict[str, nn.Parameter]) -> None:
    tensors = checkpoint.tensors
    for kind, keys in (
        ("missing", expected.keys() - tensors.keys()),
        ("unexpected", tensors.keys() - expected.keys()),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise CheckpointError(f"{folder}: {kind} key {min(keys)}{more}")
    for key, parameter in expected.items():
        if tensors[key].shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{tensors[key].file}: {key}: expected shape {tuple(parameter.shape)}; "
                f"got {tensors[key].shape}"
            )


def _common_dtype(checkpoint: Checkpoint) -> torch.dtype:
    if checkpoint.dtype is not None:
        return checkpoint.dtype
    examples = {stored.dtype: key for key, stored in checkpoint.tensors.items()}
    if len(examples) > 1:
        kinds = " and ".join(f"{dtype} ({key})" for dtype, key in examples.items())
        raise CheckpointError(
            "dtype: expected an explicit dtype, as the checkpoint declares none and mixes "
            f"{kinds}; got None"
        )
    return next(iter(examples))


@torch.no_grad()
def _copy(checkpoint: Checkpoint, model: Decoder) -> None:
    total = sum(stored.num_bytes for stored in checkpoint.tensors.values())
    bar = require("tqdm").tqdm(
        desc="loading",
        total=total,
        unit="B",
        unit_scale=True,
        disable=True if total < _QUIET_BYTES else None,  # None: shown on a terminal only
    )
    with bar:
        for name, parameter in model.named_parameters():
            stored = checkpoint.tensors[checkpoint.key_of(name)]
            parameter.copy_(stored.read())
            bar.update(stored.num_bytes)
