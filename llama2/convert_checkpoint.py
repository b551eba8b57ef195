"""Conversion of a checkpoint directory to fewer key/value heads, layer by layer, without the whole
model in memory."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gqa_kernels import get_backend
from llama2.checkpoint import hf, open_checkpoint
from llama2.checkpoint.files import Checkpoint, require
from llama2.checkpoint.weight_shards import MAX_SHARD_BYTES, WEIGHT_FILES, plan_shards, write_shards
from llama2.config import ModelConfig
from llama2.conversion import METHODS, NEEDS_DATA, AttentionWeights, convert_layer, second_moment
from llama2.layers import DecoderLayer, RotaryTable
from llama2.model import Llama2
from llama2.storage import finish_staged, is_unfinished, staged

# Files that do not depend on the heads. The model card and measurements do, and are not copied.
_KEPT_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
_BATCH_TOKENS = 4096  # tokens that go through a layer at once


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    num_kv_heads: int,
    *,
    method: str = "low_rank",
    calibration: Tensor | None = None,
    generator: torch.Generator | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    device: torch.device | str = "cpu",
) -> None:
    """Writes `source` with `num_kv_heads` key/value heads to `target`, in Hugging Face's layout.

    `conversion.convert_layer` makes the heads, from the float32 inputs of each layer of the
    original model. Tensors keep their dtypes; those that the conversion does not change keep their
    bits, with the same count all of them. In config.json only num_key_value_heads changes; the
    files of the tokenizer, generation_config.json and licences are copied. Meta's interleaved q and
    k are permuted to Hugging Face's half-split pairs. Files appear in `target` once all are
    complete; if a call is killed while they are moved there, the same call finishes.

    Memory holds at most one layer, its conversion in float64, the hidden states of the calibration
    and one shard. The embedding and the head count as a layer each.

    Args:
        source: a directory that `checkpoint.load` reads.
        target: a directory, new or without files.
        method, generator: as `conversion.convert_layer`.
        calibration: int `[batch, seq_len]` tokens of the kind that the model will see, for
            "low_rank" and "aligned". A few times hidden_size tokens are enough.
        max_shard_bytes: as `checkpoint.save_hf`.
        device: where layers are computed.
    Raises:
        CheckpointError, NotImplementedError: as `checkpoint.load`.
        ValueError: as `check_conversion`; `calibration` is missing or not tokens of the model;
            `max_shard_bytes` is not positive; `target` has files of an interrupted call with other
            arguments, or unknown files in its staging folder.
        FloatingPointError: a weight or hidden state of the source is not finite and heads are
            converted.
    """
    source, target = Path(source), Path(target)
    checkpoint, model = open_checkpoint(source, get_backend("eager"))
    config = model.config
    if not is_unfinished(target):
        check_conversion(config, num_kv_heads, method, target)
    needs_data = method in NEEDS_DATA and num_kv_heads != config.num_kv_heads
    if needs_data:
        _check_calibration(calibration, config, method)
    tokens = _digest(calibration.cpu().numpy().tobytes()) if needs_data else None
    request = {
        "source": str(source.resolve()),
        "num_kv_heads": num_kv_heads,
        "method": method,
        "max_shard_bytes": max_shard_bytes,
        "weights (hash of names, sizes and times)": _digest(*_versions(checkpoint)),
        "calibration (hash of tokens)": tokens,
        "seed (hash of the generator)": _state(generator) if method == "random" else None,
    }
    if finish_staged(target, request=request):
        return
    conversion = _Conversion(checkpoint, model, num_kv_heads, method, generator, device)
    shards = plan_shards(conversion.sizes(), max_shard_bytes)
    with staged(target, WEIGHT_FILES, last=hf.LAST_FILES, request=request) as folder:
        check_conversion(config, num_kv_heads, method, target)  # again, now that `target` is locked
        write_shards(folder, shards, conversion.tensors(calibration if needs_data else None))
        hf.write_config(folder, conversion.settings(source))
        for pattern in _KEPT_FILES:
            for file in filter(Path.is_file, source.glob(pattern)):
                shutil.copyfile(file, folder / file.name)


def check_conversion(config: ModelConfig, num_kv_heads: int, method: str, target: Path) -> None:
    """Checks the arguments of `convert_checkpoint` that can be checked before it reads a weight.

    Raises:
        ValueError: the method is not in `METHODS`, the count does not divide the model's, or
            `target` has files, which are never overwritten.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}; got {method!r}")
    if num_kv_heads < 1 or config.num_kv_heads % num_kv_heads:
        raise ValueError(
            f"num_kv_heads: expected a divisor of the checkpoint's {config.num_kv_heads}; got "
            f"{num_kv_heads}"
        )
    if target.exists() and not target.is_dir():
        raise ValueError(f"target: expected a directory; got a file, {target}")
    # Hidden files are those of a killed run.
    if target.is_dir() and (
        found := sorted(file.name for file in target.iterdir() if file.name[0] != ".")
    ):
        raise ValueError(
            f"target: expected a new directory or one without files; got {target} with {found[0]}"
        )


def _digest(*parts: bytes) -> str:
    """Returns the beginning of a SHA-256, which distinguishes requests."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _versions(checkpoint: Checkpoint) -> Iterator[bytes]:
    """Yields names, sizes and modification times of the files that hold the tensors."""
    for file in sorted({stored.file for stored in checkpoint.tensors.values()}):
        found = file.stat()
        yield f"{file.name}\0{found.st_size}\0{found.st_mtime_ns}\0".encode(
            errors="surrogateescape"
        )


def _state(generator: torch.Generator | None) -> str | None:
    return generator and _digest(generator.get_state().numpy().tobytes())


def _check_calibration(tokens: Tensor | None, config: ModelConfig, method: str) -> None:
    if tokens is None:
        raise ValueError(f"calibration: expected tokens for {method}; got None")
    if tokens.dtype not in (torch.int32, torch.int64) or tokens.dim() != 2 or not tokens.numel():
        raise ValueError(
            f"calibration: expected int [batch, seq_len]; got {tokens.dtype} {list(tokens.shape)}"
        )
    if tokens.shape[1] > config.max_seq_len:
        raise ValueError(
            f"calibration: expected at most max_seq_len ({config.max_seq_len}) tokens per "
            f"sequence; got {tokens.shape[1]}"
        )
    low, high = tokens.min().item(), tokens.max().item()
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"calibration: expected ids from 0 to {config.vocab_size - 1}; got {low} to {high}"
        )


class _Calibration:
    """The hidden states of the calibration tokens, advanced layer by layer."""

    @torch.inference_mode()
    def __init__(
        self, tokens: Tensor, embedding: Tensor, config: ModelConfig, device: torch.device | str
    ) -> None:
        self._hidden = F.embedding(tokens.cpu(), embedding).to(device, torch.float32)
        self._rope = RotaryTable(replace(config, max_seq_len=tokens.shape[1])).to(device)

    @torch.inference_mode()
    def advance(self, layer: DecoderLayer) -> Tensor:
        """Returns E[x xᵀ] of the inputs of the layer's attention and replaces the states by the
        layer's outputs."""
        moment = torch.zeros((), dtype=torch.float64, device=self._hidden.device)
        batch, seq_len = self._hidden.shape[:2]
        for rows in self._hidden.split(max(_BATCH_TOKENS // seq_len, 1)):
            x, _ = layer.input_layernorm(rows, None)
            moment = moment + second_moment(x) * (len(rows) / batch)
            torch.add(*layer(rows, None, self._rope, None, None), out=rows)
            if not rows.isfinite().all():
                raise FloatingPointError(
                    "hidden states: expected finite numbers; got NaN or infinity"
                )
        return moment


@dataclass(frozen=True)
class _Conversion:
    """A checkpoint with another number of heads, whose tensors are computed on request.

    `model` is the original model on the meta device, except for the layer that is being run.
    """

    checkpoint: Checkpoint
    model: Llama2
    num_kv_heads: int
    method: str
    generator: torch.Generator | None
    device: torch.device | str

    @property
    def _config(self) -> ModelConfig:
        return replace(self.model.config, num_kv_heads=self.num_kv_heads)

    def sizes(self) -> dict[str, int]:
        """Returns the bytes of each tensor by its key, in the order of `tensors`."""
        with torch.device("meta"):
            converted = Llama2(self._config, get_backend("eager"))
        return {
            hf.key_of(name): weight.numel() * self._dtype(name).itemsize
            for name, weight in converted.named_parameters()
        }

    def settings(self, source: Path) -> dict[str, Any]:
        """Returns the content of config.json, based on the source's if it has one."""
        file = source / hf.CONFIG_FILE
        if file.is_file():
            return json.loads(file.read_bytes()) | {"num_key_value_heads": self.num_kv_heads}
        dtypes = (stored.dtype for stored in self.checkpoint.tensors.values())
        return hf.config_json(self._config, reduce(torch.promote_types, dtypes))

    def tensors(self, calibration: Tensor | None) -> Iterator[tuple[str, Tensor]]:
        """Yields keys and tensors, layer by layer; the layers' second moments come from
        `calibration`."""
        embedding = self._read("embed_tokens.weight")
        states = None
        if calibration is not None:
            states = _Calibration(calibration, embedding, self.model.config, self.device)
        yield hf.key_of("embed_tokens.weight"), embedding
        del embedding
        layers = range(self.model.config.num_layers)
        # disable=None: shown on a terminal only
        for index in require("tqdm").tqdm(layers, desc="converting", unit="layer", disable=None):
            yield from self._layer(index, states).items()
        for name, _ in self.model.named_parameters():
            if not name.startswith(("embed_tokens.", "layers.")):
                yield hf.key_of(name), self._read(name)

    def _layer(self, index: int, states: _Calibration | None) -> dict[str, Tensor]:
        layer, config = self.model.layers[index], self.model.config
        prefix = f"layers.{index}."
        weights = {name: self._read(prefix + name) for name, _ in layer.named_parameters()}
        moment = None
        if states is not None:
            wide = {name: weight.to(self.device, torch.float32) for name, weight in weights.items()}
            layer.load_state_dict(wide, assign=True)
            del wide
            moment = states.advance(layer)
            layer.to_empty(device="meta")
        if self.num_kv_heads != config.num_kv_heads:
            names = [f"self_attn.{part}_proj.weight" for part in "qkvo"]
            converted = convert_layer(
                AttentionWeights(*(weights[name].to(self.device) for name in names)),
                self.num_kv_heads,
                head_dim=config.head_dim,
                method=self.method,
                interleaved=config.rope_interleaved,
                second_moment=moment,
                generator=self.generator,
            )
            weights |= zip(names, (weight.cpu() for weight in converted), strict=True)
            for name in names:
                self._check_finite(prefix + name, weights[name])
        return {
            hf.key_of(prefix + name): hf.half_split(weight, name, config)
            for name, weight in weights.items()
        }

    def _dtype(self, name: str) -> torch.dtype:
        return self.checkpoint.tensors[self.checkpoint.key_of(name)].dtype

    def _read(self, name: str) -> Tensor:
        """Reads a tensor into its own memory: tensors of a pickle may share memory, those of a
        shard must not."""
        stored = self.checkpoint.tensors[self.checkpoint.key_of(name)].read()
        weight = stored.clone(memory_format=torch.contiguous_format)
        if self.num_kv_heads != self.model.config.num_kv_heads:
            self._check_finite(name, weight)
        return weight

    def _check_finite(self, name: str, weight: Tensor) -> None:
        if not weight.isfinite().all():
            raise FloatingPointError(
                f"{self.checkpoint.key_of(name)}: expected finite numbers; got NaN or infinity"
            )
