"""The study: models with all, some and one of the key/value heads, trained and converted.

Every run leaves a file in the working folder, so that a killed study goes on where it was.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from llama2.accounting import MATCHINGS, matched, mean_flops_per_token, num_parameters
from llama2.conversion import convert
from llama2.evaluation.bits import bits_per_document
from llama2.evaluation.recall import recall
from llama2.model import Llama2
from llama2.placement import Placement, place
from llama2.storage import locked, read_json, write_text
from llama2.tradeoff.study.data import (
    BASE,
    CALIBRATION,
    UPTRAIN,
    Corpus,
    StudyBatches,
    Texts,
    prepare,
)
from llama2.tradeoff.study.presets import Preset
from llama2.tradeoff.study.result_form import RUN, read_entry
from llama2.train.execution import STATE
from llama2.train.pretrain import train
from llama2.train.state import check_identity, read_state

_CALIBRATION_BATCHES = 8
_CURVE_POINTS = 20
_RECALL_SEED = 1  # the same questions for every model
_LAST_STEPS = 20  # whose mean is called the final loss


@dataclass(frozen=True)
class Job:
    """One run; its fields are those of a result's entry "runs"."""

    seed: int
    origin: str  # "scratch", "control" or "converted"
    num_kv_heads: int
    matching: str = "same_ffn"
    method: str | None = None
    alpha: float | None = None

    @property
    def name(self) -> str:
        parts = (self.origin, self.num_kv_heads, self.matching, self.method, self.alpha)
        known = "-".join(str(part) for part in parts if part is not None)
        return f"{known}-seed{self.seed}"


def jobs(preset: Preset) -> tuple[list[Job], list[Job]]:
    """(from scratch, what needs the bases), each in the order in which it is begun."""
    full, seeds = preset.model.num_q_heads, preset.seeds
    scratch = [Job(seed, "scratch", full) for seed in seeds]
    scratch += [
        Job(seed, "scratch", count, matching)
        for count in preset.num_kv_heads
        for matching in MATCHINGS
        for seed in seeds
    ]
    conversions = [(count, method) for count in preset.num_kv_heads for method in preset.methods]
    conversions += [(preset.num_kv_heads[-1], method) for method in preset.baseline_methods]
    later = [
        Job(seed, "control", full, alpha=alpha)
        for alpha in preset.alphas
        if alpha > 0
        for seed in seeds
    ]
    later += [
        Job(seed, "converted", count, method=method, alpha=alpha)
        for alpha in preset.alphas
        for count, method in conversions
        for seed in seeds
    ]
    return scratch, later


def steps_of(job: Job, preset: Preset) -> int:
    if job.alpha is None:
        return preset.train.steps
    return preset.uptrain(job.alpha).steps if job.alpha > 0 else 0


def run_study(
    preset: Preset,
    texts: Texts,
    work: Path,
    tokenizer_file: Path,
    *,
    backend: str = "auto",
    device: str | None = None,
) -> tuple[Corpus, list[dict[str, Any]]]:
    """Trains, converts and asks everything that `preset` names; goes on from what `work` has.

    Returns:
        the texts as they were trained on, and the entries "runs" of a result, in the order of
        `jobs`.
    Raises:
        OSError, ValueError: as `prepare`; `work` is of another study, or another process runs in
            it: then nothing there changes. A file of its is damaged.
        FloatingPointError: a run diverged.
    """
    work.mkdir(parents=True, exist_ok=True)
    with locked(work):
        _claim(work, preset, texts)
        corpus = prepare(work / "corpus", texts, tokenizer_file, preset)
        return corpus, _run_all(preset, work, backend, device)


def _run_all(preset: Preset, work: Path, backend: str, device: str | None) -> list[dict[str, Any]]:
    phases = jobs(preset)
    todo = [[job for job in phase if not _result_file(work, job).exists()] for phase in phases]
    steps = {job: steps_of(job, preset) for phase in phases for job in phase}
    done = sum(steps.values()) - sum(steps[job] for phase in todo for job in phase)
    with tqdm(total=sum(steps.values()), initial=done, desc="study", unit="step") as bar:
        for phase in todo:
            for job in _finished(phase, preset, work, backend, device):
                bar.update(steps[job])
                bar.set_postfix_str(job.name)
    return [read_entry(_result_file(work, job), RUN) for phase in phases for job in phase]


def _claim(work: Path, preset: Preset, texts: Texts) -> None:
    """Says in `work` which study is in it, and refuses another one there."""
    identity = {
        "preset": json.loads(json.dumps(asdict(preset) | {"processes": None})),
        "corpus": {part: texts.record[part]["sha256"] for part in ("train", "held_out")},
    }
    file = work / "study.json"
    if file.exists():
        check_identity(file, read_json(file), identity)
        return
    write_text(file, json.dumps(identity))


def _result_file(work: Path, job: Job) -> Path:
    return work / "runs" / f"{job.name}.json"


def _finished(
    todo: list[Job], preset: Preset, work: Path, backend: str, device: str | None
) -> Iterator[Job]:
    """The jobs as they end, on as many processes as the preset has."""
    if preset.processes == 1:
        for job in todo:
            run_job(job, preset, work, backend, device)
            yield job
        return
    # Not forked: threads of PyTorch that hold a lock would hold it for ever in the child.
    pool = ProcessPoolExecutor(preset.processes, get_context("spawn"), _begin_worker)
    try:
        futures = {pool.submit(run_job, job, preset, work, backend, device): job for job in todo}
        for future in as_completed(futures):
            future.result()
            yield futures[future]
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    torch.set_num_threads(1)
    # Their progress bars would cross.
    sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def run_job(job: Job, preset: Preset, work: Path, backend: str, device: str | None) -> None:
    """Runs one job and writes its entry, with the text's bits by file, to the working folder."""
    started = time.perf_counter()
    placement = place(backend, device)
    corpus = Corpus.load(work / "corpus")
    config = preset.train if job.alpha is None else preset.uptrain(job.alpha)
    if job.origin == "scratch":
        shape = matched(preset.model, job.num_kv_heads, job.matching)
        torch.manual_seed(job.seed)
        model = Llama2(shape, placement.ops).to(placement.device)
        data = StudyBatches(corpus, preset, job.seed, BASE)
    else:
        model = _base(job.seed, preset, work, placement)
        data = StudyBatches(corpus, preset, job.seed, UPTRAIN)
        if job.origin == "converted":
            model = _converted(model, job, preset, corpus, placement)
    log = []
    if steps := steps_of(job, preset):
        log = train(model, data, config, work / "training" / job.name, save_every=steps)
    model.eval()
    bits = bits_per_document(model, corpus.held_out, preset.train.seq_len)
    num_bytes = sum(file["bytes"] for file in corpus.record["held_out"]["files"])
    entry = {
        **asdict(job),
        "intermediate_size": model.config.intermediate_size,
        "parameters": num_parameters(model.config),
        "flops_per_token": mean_flops_per_token(model.config, preset.train.seq_len),
        "steps": steps,
        "tokens": steps * config.batch_size * config.seq_len,
        "final_train_loss": fmean(step["loss"] for step in log[-_LAST_STEPS:]) if log else None,
        "loss_curve": _curve(log),
        "bits_per_byte": sum(bits) / num_bytes,
        "bits": bits,
        "recall": recall(
            model,
            seq_len=preset.train.seq_len,
            num_rows=preset.recall_rows,
            seed=_RECALL_SEED,
        ),
        "seconds": time.perf_counter() - started,
    }
    file = _result_file(work, job)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(entry))


def _base(seed: int, preset: Preset, work: Path, placement: Placement) -> Llama2:
    """The trained base of a seed."""
    job = Job(seed, "scratch", preset.model.num_q_heads)
    model = Llama2(preset.model, placement.ops)
    file = work / "training" / job.name / STATE
    try:
        model.load_state_dict(read_state(file)["model"])
    except RuntimeError as error:
        raise ValueError(f"{file}: expected the weights of {job.name}; {error}") from error
    return model.to(placement.device)


def _converted(
    model: Llama2, job: Job, preset: Preset, corpus: Corpus, placement: Placement
) -> Llama2:
    batches = StudyBatches(corpus, preset, job.seed, CALIBRATION)
    tokens = torch.cat([batches.batch(step)[:, :-1] for step in range(_CALIBRATION_BATCHES)])
    return convert(
        model,
        job.num_kv_heads,
        placement.ops,
        method=job.method,
        calibration=tokens.to(placement.device),
        generator=torch.Generator().manual_seed(job.seed),
    )


def _curve(log: list[dict[str, float]]) -> list[float]:
    """Mean losses of twentieths of the training, for the record."""
    losses = [step["loss"] for step in log]
    points = min(_CURVE_POINTS, len(losses))
    bounds = [len(losses) * point // points for point in range(points + 1)] if points else []
    return [round(fmean(losses[a:b]), 4) for a, b in pairwise(bounds)]
