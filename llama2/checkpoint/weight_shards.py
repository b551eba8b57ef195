"""Writes tensors as a Hugging Face directory's model.safetensors, or as shards with an index."""

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from torch import Tensor

from llama2.checkpoint.files import require

WEIGHT_FILES = r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9


def plan_shards(sizes: dict[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Returns the keys of each shard, in order, from the bytes of each tensor by its key.

    Tensors are never split: one larger than `max_shard_bytes` is alone in its shard.

    Raises:
        ValueError: `max_shard_bytes` is not positive.
    """
    if not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: expected a positive int; got {max_shard_bytes!r}")
    shards, free = [], -1
    for key, size in sizes.items():
        if size > free:
            shards.append([])
            free = max_shard_bytes
        shards[-1].append(key)
        free -= size
    return shards


def write_shards(
    folder: Path, shards: list[list[str]], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Writes the files of `plan_shards`, whose names match WEIGHT_FILES; holds one shard in memory.

    Args:
        tensors: keys and contiguous tensors on the CPU, in the order of `shards`.
    Raises:
        OSError: a file cannot be written, for example because the disk is full.
    """
    save_file = require("safetensors.torch").save_file
    write_error = require("safetensors").SafetensorError
    remaining = iter(tensors)
    weight_map, total_size = {}, 0
    for number, keys in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = dict(islice(remaining, len(keys)))
        try:
            save_file(shard, folder / file, metadata={"format": "pt"})
        except write_error as error:
            raise OSError(f"{folder / file}: expected to write it; {error}") from error
        weight_map |= dict.fromkeys(shard, file)
        total_size += sum(tensor.nbytes for tensor in shard.values())
        del shard  # before the next shard is loaded
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")
