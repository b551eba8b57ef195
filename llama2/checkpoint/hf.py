"""Hugging Face's directories: config.json and model.safetensors or pytorch_model.bin, or shards.

Source of the format: transformers' LlamaConfig, LlamaForCausalLM and, of a `ScalarModel`,
LlamaForSequenceClassification with one label, versions 4 and 5. Parameters have the names of
`Decoder` with a leading `model.`, plus those of a head; RoPE rotates q and k in half-split pairs.
"""

import json
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama2.checkpoint.files import (
    FLOATS,
    Checkpoint,
    CheckpointError,
    Settings,
    StoredTensor,
    open_tensors,
)
from llama2.checkpoint.weight_shards import (
    INDEX_FILE,
    MAX_SHARD_BYTES,
    WEIGHT_FILES,
    plan_shards,
    write_shards,
)
from llama2.config import MAX_SEQ_LEN, ModelConfig
from llama2.decoder import Decoder
from llama2.scalar_model import ScalarModel
from llama2.storage import staged

CONFIG_FILE = "config.json"
LAST_FILES = (INDEX_FILE, CONFIG_FILE)
LANGUAGE, SCALAR = "LlamaForCausalLM", "LlamaForSequenceClassification"
_HEADS = ("lm_head.weight", "score.weight")
# One number for a text, at its last token that is not padding. The pad id is 0, the id of unknown
# pieces, with which no text ends.
_ONE_LABEL = {
    "architectures": [SCALAR],
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
    "pad_token_id": 0,
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS.values()}


def read_config(path: Path, architecture: str = LANGUAGE) -> ModelConfig:
    """Returns the config.json of a directory, with LlamaConfig's defaults for optional keys.

    Args:
        architecture: the expected architecture, if the file names one.
    Raises:
        CheckpointError: a key is missing or malformed.
        NotImplementedError: a key describes a model that differs from Llama 2.
    """
    return _config(Settings.read(path / CONFIG_FILE), architecture)


def read_architecture(path: Path) -> str:
    """Returns the architecture that the config.json of a directory names; LANGUAGE if it names
    none.

    Raises:
        CheckpointError: the file is malformed.
    """
    found = Settings.read(path / CONFIG_FILE).get("architectures", [LANGUAGE])
    return found[0] if isinstance(found, list) and len(found) == 1 else str(found)


def read_checkpoint(path: Path, architecture: str = LANGUAGE) -> Checkpoint:
    """Returns the configuration and the stored tensors of a directory.

    Raises:
        CheckpointError, NotImplementedError: as `read_config`; or the weight files or their index
            are malformed.
    """
    settings = Settings.read(path / CONFIG_FILE)
    config = _config(settings, architecture)
    tensors = {
        key: stored
        for key, stored in _open_weights(path).items()
        # a buffer that early versions stored; the config determines it
        if not key.endswith("rotary_emb.inv_freq")
    }
    if config.tie_word_embeddings:
        _drop_tied_head(tensors)
    return Checkpoint(config, _declared_dtype(settings), tensors, key_of)


def key_of(name: str) -> str:
    return name if name in _HEADS else f"model.{name}"


def _config(settings: Settings, architecture: str) -> ModelConfig:
    _refuse_other_maths(settings, architecture)
    hidden_size = settings.size("hidden_size")
    num_q_heads = settings.size("num_attention_heads")
    if "head_dim" not in settings and hidden_size % num_q_heads:
        raise CheckpointError(
            f"{settings.where}: hidden_size: expected a multiple of num_attention_heads "
            f"({num_q_heads}) if head_dim is not given; got {hidden_size}"
        )
    return settings.model_config(
        vocab_size=settings.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=settings.size("intermediate_size"),
        num_layers=settings.size("num_hidden_layers"),
        num_q_heads=num_q_heads,
        num_kv_heads=settings.size("num_key_value_heads", num_q_heads),
        head_dim=settings.size("head_dim", hidden_size // num_q_heads),
        max_seq_len=settings.size("max_position_embeddings", 2048, most=MAX_SEQ_LEN),
        norm_eps=settings.number("rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(settings),
        tie_word_embeddings=settings.flag("tie_word_embeddings"),
    )


def _refuse_other_maths(settings: Settings, architecture: str) -> None:
    expected = {
        "architectures": [architecture],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "partial_rotary_factor": 1.0,
    }
    for key, value in expected.items():
        if settings.get(key, value) != value:
            raise NotImplementedError(
                f"{settings.where}: {key}: expected {value!r}; got {settings[key]!r}"
            )
    if "quantization_config" in settings:
        raise NotImplementedError(
            f"{settings.where}: quantization_config: expected an unquantised model; got "
            f"{settings['quantization_config']!r:.80}"
        )


def _rope_theta(settings: Settings) -> float:
    theta = settings.number("rope_theta", 10000.0)
    for key in ("rope_parameters", "rope_scaling"):  # the names of version 5 and of version 4
        rope = settings.section(key)
        kind = rope.get("rope_type", rope.get("type", "default"))
        per_layer_type = any(isinstance(value, dict) for value in rope.values())
        if kind != "default" or per_layer_type or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise NotImplementedError(f"{rope.where}: expected the default RoPE; got {rope!r}")
        theta = rope.number("rope_theta", theta)
    return theta


def _declared_dtype(settings: Settings) -> torch.dtype | None:
    for key in ("dtype", "torch_dtype"):  # the names of version 5 and of version 4
        if key in settings:
            name = settings[key]
            if not isinstance(name, str) or name not in _DTYPES:
                raise CheckpointError(
                    f"{settings.where}: {key}: expected one of {', '.join(_DTYPES)}; got {name!r}"
                )
            return _DTYPES[name]
    return None


def _open_weights(path: Path) -> dict[str, StoredTensor]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return open_tensors(path / name)
        if (path / f"{name}.index.json").is_file():
            return _open_shards(path / f"{name}.index.json")
    raise CheckpointError(
        f"{path}: expected model.safetensors or pytorch_model.bin, or one's .index.json; got none"
    )


def _open_shards(index: Path) -> dict[str, StoredTensor]:
    weight_map = Settings.read(index).section("weight_map")
    if not weight_map:
        raise CheckpointError(f"{index}: weight_map: expected files by key; got none")
    keys_in: dict[Path, set[str]] = {}
    for key, name in weight_map.items():
        # A name with a folder would let a downloaded index open any file of the machine.
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(
                f"{index}: {key}: expected the name of a file in the same directory; got {name!r}"
            )
        if not (index.parent / name).is_file():
            raise CheckpointError(
                f"{index.parent / name}: missing shard: {index.name} lists {key} in it"
            )
        keys_in.setdefault(index.parent / name, set()).add(key)
    tensors = {}
    for file, keys in keys_in.items():
        shard = open_tensors(file)
        # Keys that may be either listed or stored: a buffer that the config determines, and a tied
        # head.
        free = {key for key in keys ^ shard.keys() if key.endswith("rotary_emb.inv_freq")}
        for kind, differing in (
            ("missing", keys - shard.keys() - free - {"lm_head.weight"}),
            ("unexpected", shard.keys() - keys - free),
        ):
            if differing:
                raise CheckpointError(
                    f"{file}: {kind} key {min(differing)}: expected those of {index.name}"
                )
        tensors.update(shard)
    return tensors


def _drop_tied_head(tensors: dict[str, StoredTensor]) -> None:
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if head is None or embedding is None:
        return
    same_kind = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    if not same_kind or not torch.equal(head.read(), embedding.read()):
        raise CheckpointError(
            f"{head.file}: lm_head.weight: expected the values of model.embed_tokens.weight, as "
            "tie_word_embeddings is true; got different values"
        )
    del tensors["lm_head.weight"]


def save_hf(
    model: Decoder,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a directory that `transformers.LlamaForCausalLM.from_pretrained` and `load` read; for
    a `ScalarModel`, one for `LlamaForSequenceClassification.from_pretrained` and `load_scalar`.

    Files appear under their names only once all are complete; an earlier checkpoint's safetensors
    in `path` are replaced. Interleaved q and k are permuted to Hugging Face's half-split pairs.

    Args:
        path: a directory, created if missing.
        dtype: of the stored tensors; None means the model's, or the widest if it has several.
        max_shard_bytes: size above which the tensors are spread over several files; one tensor is
            never split.
    Raises:
        ValueError: `dtype` is not a dtype of weights, or `max_shard_bytes` is not positive.
    """
    if dtype is None:
        dtype = reduce(torch.promote_types, (weight.dtype for weight in model.parameters()))
    if dtype not in FLOATS.values():
        raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}; got {dtype}")
    weights = dict(model.named_parameters())
    sizes = {key_of(name): weight.numel() * dtype.itemsize for name, weight in weights.items()}
    shards = plan_shards(sizes, max_shard_bytes)
    exported = (
        (key_of(name), half_split(weight.detach(), name, model.config).to("cpu", dtype))
        for name, weight in weights.items()
    )
    with staged(Path(path), WEIGHT_FILES, last=LAST_FILES) as folder:
        write_shards(folder, shards, exported)
        settings = config_json(model.config, dtype)
        write_config(folder, settings | (_ONE_LABEL if isinstance(model, ScalarModel) else {}))


def half_split(weight: Tensor, name: str, config: ModelConfig) -> Tensor:
    """Returns a parameter of a `Decoder` as Hugging Face stores it, contiguous."""
    if config.rope_interleaved and name.endswith(("q_proj.weight", "k_proj.weight")):
        # rows of a head: (pair, member of the pair) → (member, pair)
        pairs = weight.unflatten(0, (-1, config.head_dim // 2, 2))
        return pairs.transpose(1, 2).flatten(0, 2)
    return weight.contiguous()


def write_config(folder: Path, settings: dict[str, Any]) -> None:
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2), encoding="utf-8")


def config_json(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "architectures": [LANGUAGE],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_q_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
