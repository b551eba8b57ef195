"""Meta's directories: params.json and consolidated.NN.pth, one file per rank of tensor parallelism.

Source of the format: the keys, axes and formulas of github.com/meta-llama/llama. RoPE rotates q and
k in interleaved pairs, which are kept. params.json contains neither the FFN size (which follows
from dim, multiple_of and ffn_dim_multiplier) nor, for Llama 2, the vocabulary size (it is −1) nor
the context length. The first two are read from the weights' shapes, the last is Llama 2's.
"""

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from llama2.checkpoint.files import (
    Checkpoint,
    CheckpointError,
    Settings,
    StoredTensor,
    open_tensors,
)
from llama2.config import MAX_SEQ_LEN, ModelConfig
from llama2.model import Llama2
from llama2.storage import staged

CONFIG_FILE = "params.json"

# By our module's name: Meta's name and the axis that ranks split (None: every rank has a copy).
_MODULES = {
    "embed_tokens": ("tok_embeddings", 1),
    "input_layernorm": ("attention_norm", None),
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "post_attention_layernorm": ("ffn_norm", None),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "norm": ("norm", None),
    "lm_head": ("output", 0),
}
_AXES = dict(_MODULES.values())
_KNOWN_PARAMS = {
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "vocab_size",
    "multiple_of",
    "ffn_dim_multiplier",
    "norm_eps",
    "rope_theta",
    "max_seq_len",
}


def read_config(path: Path) -> ModelConfig:
    """Returns the configuration of a directory; reads params.json and the shapes of the weights.

    Raises:
        CheckpointError, NotImplementedError: as `read_checkpoint`.
    """
    return read_checkpoint(path).config


def read_checkpoint(path: Path) -> Checkpoint:
    """Returns the configuration and the stored tensors of a directory, its shards merged.

    Raises:
        CheckpointError: params.json or a shard is malformed, a shard is missing, or shards differ
            in their keys, shapes or dtypes.
        NotImplementedError: params.json has an unknown key that is neither null nor false; or there
            are more shards than key/value heads, so that shards hold copies of heads.
    """
    params = Settings.read(path / CONFIG_FILE)
    for key in sorted(params.keys() - _KNOWN_PARAMS):
        if params[key] is not False:
            raise NotImplementedError(f"{params.where}: {key}: unknown; got {params[key]!r:.60}")
    dim, num_q_heads = params.size("dim"), params.size("n_heads")
    num_kv_heads = params.size("n_kv_heads", num_q_heads)
    if dim % num_q_heads:
        raise CheckpointError(
            f"{params.where}: dim: expected a multiple of n_heads ({num_q_heads}); got {dim}"
        )
    shards = _open_shards(path)
    _check_count(path, shards, dim)
    if num_kv_heads % len(shards):
        raise NotImplementedError(
            f"{params.where}: n_kv_heads: expected a multiple of the number of shards "
            f"({len(shards)}), as otherwise shards hold copies of wk and wv; got {num_kv_heads}"
        )
    tensors = _merge(path, shards, dim)
    if params.get("vocab_size") == -1:
        del params["vocab_size"]
    config = params.model_config(
        vocab_size=params.size("vocab_size", _rows(tensors, "tok_embeddings.weight", path)),
        hidden_size=dim,
        intermediate_size=_rows(tensors, "layers.0.feed_forward.w1.weight", path),
        num_layers=params.size("n_layers"),
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=dim // num_q_heads,
        max_seq_len=params.size("max_seq_len", 4096, most=MAX_SEQ_LEN),
        norm_eps=params.number("norm_eps", 1e-5),
        rope_theta=params.number("rope_theta", 10000.0),
        rope_interleaved=True,
    )
    return Checkpoint(config, None, tensors, _key_of)


def _key_of(name: str) -> str:
    layer, module = _split(name)
    return f"{layer}{_MODULES[module][0]}.weight"


def _split(name: str) -> tuple[str, str]:
    """Splits "layers.3.attention.wq.weight" into ("layers.3.", "attention.wq"), in either
    naming."""
    layer = re.match(r"(layers\.\d+\.)?", name)[0]
    return layer, name.removeprefix(layer).removesuffix(".weight")


def _rows(tensors: dict[str, StoredTensor], key: str, where: Path) -> int:
    if key not in tensors:
        raise CheckpointError(f"{where}: missing key {key}")
    stored = tensors[key]
    if len(stored.shape) != 2:
        raise CheckpointError(f"{stored.file}: {key}: expected a matrix; got shape {stored.shape}")
    return stored.shape[0]


def _shard_name(rank: int) -> str:
    return f"consolidated.{rank:02d}.pth"


def _open_shards(path: Path) -> list[dict[str, StoredTensor]]:
    names = {file.name for file in path.glob("consolidated.*.pth")}
    shards = []
    for number in range(max(len(names), 1)):
        name = _shard_name(number)
        if name not in names:
            found = ", ".join(sorted(names)) or "no consolidated.NN.pth"
            raise CheckpointError(f"{path / name}: missing shard; found {found}")
        shard = open_tensors(path / name)
        shard.pop("rope.freqs", None)  # a buffer; the config determines it
        shards.append(shard)
    return shards


def _check_count(path: Path, shards: list[dict[str, StoredTensor]], dim: int) -> None:
    """Checks the number of shards against the share of the queries' rows in the first one."""
    rows = _rows(shards[0], "layers.0.attention.wq.weight", path)
    if rows and dim % rows == 0 and dim // rows != len(shards):
        raise CheckpointError(
            f"{path}: expected {dim // rows} files consolidated.NN.pth, as the first has {rows} of "
            f"the {dim} rows of layers.0.attention.wq.weight; got {len(shards)}"
        )


def _merge(path: Path, shards: list[dict[str, StoredTensor]], dim: int) -> dict[str, StoredTensor]:
    first = shards[0]
    for rank, shard in enumerate(shards):
        if differing := first.keys() ^ shard.keys():
            key = min(differing)
            kind = "missing" if key in first else "unexpected"
            raise CheckpointError(
                f"{path / _shard_name(rank)}: {kind} key {key}: expected the keys of "
                f"{_shard_name(0)}"
            )
    return {key: _merge_key(key, [shard[key] for shard in shards], dim) for key in first}


def _merge_key(key: str, parts: list[StoredTensor], dim: int) -> StoredTensor:
    first = parts[0]
    for part in parts[1:]:
        if (part.shape, part.dtype) != (first.shape, first.dtype):
            raise CheckpointError(
                f"{part.file}: {key}: expected {first.dtype} {first.shape} as in "
                f"{first.file.name}; got {part.dtype} {part.shape}"
            )
    axis = _AXES.get(_split(key)[1])
    if key == "tok_embeddings.weight" and first.shape[1:] == (dim,):
        axis = 0  # Llama 3 splits the vocabulary; Llama 2 the features
    if axis is None or len(first.shape) != 2 or len(parts) == 1:
        return first
    shape = tuple(size * (len(parts) if i == axis else 1) for i, size in enumerate(first.shape))
    return StoredTensor(
        first.file, shape, first.dtype, lambda: torch.cat([part.read() for part in parts], axis)
    )


def save_meta(model: Llama2, path: str | Path, num_shards: int = 1) -> None:
    """Writes params.json and `num_shards` files consolidated.NN.pth, split as Llama 2's are.

    Files appear under their names only once all are complete; an earlier checkpoint's shards in
    `path` are replaced. Half-split q and k are permuted to Meta's interleaved pairs. A tied head is
    written as a separate tensor. The format does not record the context length: pass `max_seq_len`
    to `load` if it is not 4096.

    Raises:
        ValueError: `num_shards` does not divide every split size, or head_dim is not hidden_size /
            num_q_heads, which the format assumes.
    """
    config = model.config
    for name in ("num_q_heads", "num_kv_heads", "intermediate_size", "vocab_size", "hidden_size"):
        if num_shards < 1 or getattr(config, name) % num_shards:
            raise ValueError(
                f"num_shards: expected a divisor of {name} ({getattr(config, name)}); "
                f"got {num_shards}"
            )
    if config.head_dim * config.num_q_heads != config.hidden_size:
        raise ValueError(
            f"head_dim: expected hidden_size / num_q_heads ({config.hidden_size} / "
            f"{config.num_q_heads}); got {config.head_dim}"
        )
    names = dict(model.named_parameters(remove_duplicate=False))
    obsolete = r"consolidated\.\d+\.pth"
    with staged(Path(path), obsolete, last=(CONFIG_FILE,)) as folder:
        for rank in range(num_shards):
            shard = {_key_of(name): _part(model, name, rank, num_shards) for name in names}
            torch.save(shard, folder / _shard_name(rank))
        (folder / CONFIG_FILE).write_text(
            json.dumps(_params_json(config), indent=2), encoding="utf-8"
        )


def _part(model: Llama2, name: str, rank: int, num_shards: int) -> Tensor:
    """Returns a copy of a rank's part of a parameter: torch.save would write the whole base of a
    view."""
    config, weight = model.config, model.get_parameter(name).detach()
    module = _split(name)[1]
    if not config.rope_interleaved and module in ("self_attn.q_proj", "self_attn.k_proj"):
        # rows of a head: (member of the pair, pair) → (pair, member)
        halves = weight.unflatten(0, (-1, 2, config.head_dim // 2))
        weight = halves.transpose(1, 2).flatten(0, 2)
    axis = _MODULES[module][1]
    part = weight if axis is None else weight.chunk(num_shards, axis)[rank]
    return part.to("cpu", copy=True, memory_format=torch.contiguous_format)


def _params_json(config: ModelConfig) -> dict[str, int | float]:
    # Meta computes the FFN size as ⌊8/3 · dim⌋ times ffn_dim_multiplier, rounded up to a multiple
    # of multiple_of. With multiple_of equal to the size, any product up to the size gives the size.
    base = int(8 * config.hidden_size / 3)
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_layers,
        "n_heads": config.num_q_heads,
        "n_kv_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": config.intermediate_size,
        "norm_eps": config.norm_eps,
    }
    if base > config.intermediate_size:
        params["ffn_dim_multiplier"] = config.intermediate_size / base
    if config.rope_theta != 10000.0:  # Llama 2's original code lacks this parameter
        params["rope_theta"] = config.rope_theta
    return params
