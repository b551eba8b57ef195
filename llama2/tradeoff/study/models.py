"""Builds the model that a run starts with, and scores the trained model."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama2.accounting import matched, mean_flops_per_token
from llama2.checkpoint import SHIPPED, load
from llama2.conversion import convert
from llama2.evaluation.bits import bits_per_document
from llama2.model import Llama2
from llama2.placement import Placement
from llama2.tradeoff.study import records
from llama2.tradeoff.study.data import CALIBRATION, Corpus, TextBatches
from llama2.tradeoff.study.jobs import Job
from llama2.tradeoff.study.pairing import share_start
from llama2.tradeoff.study.presets import Preset
from llama2.tradeoff.study.records import RecordsModel
from llama2.train.execution import STATE
from llama2.train.pretrain import TrainConfig
from llama2.train.state import read_state


def language_model(job: Job, preset: Preset, placement: Placement) -> Llama2:
    """Returns a language model from scratch, which starts from the MHA weights of its seed."""
    torch.manual_seed(job.seed)
    base = Llama2(preset.model, placement.ops)
    shape = matched(preset.model, job.num_kv_heads, "exact")
    if shape == preset.model:
        return base.to(placement.device)
    model = Llama2(shape, placement.ops)
    share_start(model, base, preset.model.head_dim)
    return model.to(placement.device)


def records_model(job: Job, preset: Preset, placement: Placement) -> RecordsModel:
    """Returns a model for "records", which starts from the MHA weights of its seed."""
    shape, fields = preset.records, preset.arm(job.arm).fields
    full = shape.config(fields)
    torch.manual_seed(job.seed)
    base = RecordsModel(full, shape.values, placement.ops)
    records.compose_items(base, shape, fields)
    config = matched(full, job.num_kv_heads, "exact")
    if config == full:
        return base.to(placement.device)
    model = RecordsModel(config, shape.values, placement.ops)
    share_start(model, base, shape.head_dim)
    return model.to(placement.device)


def trained(folder: Path, preset: Preset, placement: Placement) -> Llama2:
    """Loads the language model of MHA that a run saved in its folder.

    Raises:
        ValueError: the state there is damaged or of another shape; the message names the file.
    """
    model = Llama2(preset.model, placement.ops)
    file = folder / STATE
    try:
        model.load_state_dict(read_state(file)["model"])
    except RuntimeError as error:
        raise ValueError(f"{file}: expected the weights of {folder.name}; {error}") from error
    return model.to(placement.device)


def shipped_model(placement: Placement) -> Llama2:
    """Loads the checkpoint that this package ships, in float32, the dtype of training."""
    return load(SHIPPED, placement.ops, dtype=torch.float32, device=placement.device)


def converted(
    model: Llama2,
    job: Job,
    windows: TrainConfig,
    num_tokens: int,
    corpus: Corpus,
    placement: Placement,
) -> Llama2:
    """Converts `model`; calibrates on at least `num_tokens` of training text in batches of
    `windows`."""
    batches = TextBatches(corpus, windows, job.seed, CALIBRATION)
    steps = -(-num_tokens // (windows.batch_size * windows.seq_len))
    tokens: Tensor = torch.cat([batches.batch(step)[:, :-1] for step in range(steps)])
    return convert(
        model,
        job.num_kv_heads,
        placement.ops,
        method=job.method,
        calibration=tokens.to(placement.device),
    )


def text_scores(model: Llama2, corpus: Corpus, seq_len: int) -> dict[str, Any]:
    """Evaluates a language model: the entries of `result_form.PARTS["text"]` but "tokens"."""
    bits = bits_per_document(model, corpus.held_out, seq_len)
    num_bytes = sum(file["bytes"] for file in corpus.record["held_out"]["files"])
    return {
        "flops_per_token": mean_flops_per_token(model.config, seq_len),
        "bits_per_byte": sum(bits) / num_bytes,
        "bits": bits,
    }


def records_scores(model: RecordsModel, preset: Preset, fields: int) -> dict[str, Any]:
    """Evaluates a model of "records": the entries of `result_form.PARTS["records"]`."""
    shares, bits = records.score(model, preset.records, fields)
    return {
        "accuracy": sum(shares.values()) / len(shares),
        "accuracy_by_items": shares,
        "bits_per_answer": bits,
    }
