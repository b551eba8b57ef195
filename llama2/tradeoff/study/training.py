"""Runs a study. Each run writes a file to the working folder, from which a killed study resumes."""

import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from llama2.checkout import source_sha256
from llama2.checkpoint import SHIPPED, load_config
from llama2.model import Llama2
from llama2.placement import Placement, place
from llama2.storage import locked, read_json, write_text
from llama2.tradeoff.study import models, records
from llama2.tradeoff.study.data import BASE, UPTRAIN, Corpus, TextBatches, Texts, prepare
from llama2.tradeoff.study.jobs import Job, jobs, recipe, steps_of
from llama2.tradeoff.study.presets import Preset
from llama2.tradeoff.study.result_form import read_run
from llama2.train.pretrain import Batches, TrainConfig, train
from llama2.train.state import check_identity

_CURVE_POINTS = 20
_LAST_STEPS = 20  # whose mean is called the final loss


def run_study(
    preset: Preset,
    texts: Texts,
    work: Path,
    tokenizer_file: Path,
    *,
    backend: str = "auto",
    device: str | None = None,
) -> tuple[Corpus, list[dict[str, Any]]]:
    """Does the runs of `preset` that `work` does not have yet.

    Returns:
        the corpus, and the entries "runs" of a result in the order of `jobs`.
    Raises:
        OSError, ValueError: as `prepare`; `work` is of another study or of another version of this
            package's study, or another process runs in it: then nothing there changes. A file there
            is damaged.
        FloatingPointError: a run diverged.
    """
    work.mkdir(parents=True, exist_ok=True)
    with locked(work):
        _claim(work, preset, texts)
        corpus = prepare(work / "corpus", texts, tokenizer_file, preset)
        return corpus, _run_all(preset, work, backend, device)


def _run_all(preset: Preset, work: Path, backend: str, device: str | None) -> list[dict[str, Any]]:
    phases = jobs(preset, load_config(SHIPPED))
    todo = [[job for job in phase if not _result_file(work, job).exists()] for phase in phases]
    steps = {job: steps_of(job, preset) for phase in phases for job in phase}
    done = sum(steps.values()) - sum(steps[job] for phase in todo for job in phase)
    with tqdm(total=sum(steps.values()), initial=done, desc="study", unit="step") as bar:
        for phase in todo:
            for job in _finished(phase, preset, work, backend, device):
                bar.update(steps[job])
                bar.set_postfix_str(job.name)
    return [read_run(_result_file(work, job)) for phase in phases for job in phase]


def _claim(work: Path, preset: Preset, texts: Texts) -> None:
    """Records in `work` which study it holds, with its primary comparisons, before the first run;
    refuses a folder of another study."""
    identity = {
        "preset": json.loads(json.dumps(asdict(preset) | {"processes": None})),
        "corpus": {part: texts.record[part]["sha256"] for part in ("train", "held_out")},
        # The result names one source of all runs.
        "source": {"sha256": source_sha256(Path(__file__).parent)},
    }
    file = work / "study.json"
    if file.exists():
        check_identity(file, read_json(file), identity)
        return
    write_text(file, json.dumps(identity))


def _result_file(work: Path, job: Job) -> Path:
    return work / "runs" / f"{job.name}.json"


def _training_folder(work: Path, job: Job) -> Path:
    return work / "training" / job.name


def _finished(
    todo: list[Job], preset: Preset, work: Path, backend: str, device: str | None
) -> Iterator[Job]:
    """Runs the jobs on as many processes as the preset has; yields each when it ends."""
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
    """Runs one job and writes its entry to the working folder."""
    started, cpu_started = time.perf_counter(), time.process_time()
    placement = place(backend, device)
    corpus = Corpus.load(work / "corpus")
    folder, config = _training_folder(work, job), recipe(job, preset)
    if job.part == "records":
        arm = preset.arm(job.arm)
        model = models.records_model(job, preset, placement)
        data = records.RecordsBatches(preset.records, arm.fields, job.seed, config.batch_size)
        objective = partial(records.loss, questions=preset.records.questions)
        log = _train(model, data, config, folder, objective=objective, counts_tokens=False)
        scores = models.records_scores(model.eval(), preset, arm.fields)
    else:
        windows = preset.shipped.train if job.part == "shipped" else preset.train
        model = _language_model(job, preset, work, windows, corpus, placement)
        purpose = BASE if job.part == "text" else UPTRAIN
        data = TextBatches(corpus, windows, job.seed, purpose)
        log = _train(model, data, config, folder)
        scores = models.text_scores(model.eval(), corpus, windows.seq_len)
        scores["tokens"] = len(log) * windows.batch_size * windows.seq_len
    entry = {
        **asdict(job),
        "intermediate_size": model.config.intermediate_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": len(log),
        "peak_lr": config.peak_lr if config else None,
        **scores,
        "final_train_loss": fmean(step["loss"] for step in log[-_LAST_STEPS:]) if log else None,
        "loss_curve": _curve(log),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
    }
    file = _result_file(work, job)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(entry))


def _language_model(
    job: Job,
    preset: Preset,
    work: Path,
    windows: TrainConfig,
    corpus: Corpus,
    placement: Placement,
) -> Llama2:
    if job.part == "text":
        return models.language_model(job, preset, placement)
    if job.part == "conversion":
        base = Job("text", job.seed, preset.model.num_q_heads)
        model = models.trained(_training_folder(work, base), preset, placement)
    else:
        model = models.shipped_model(placement)
    if job.method is None:
        return model
    return models.converted(model, job, windows, preset.calibration_tokens, corpus, placement)


def _train(
    model: nn.Module, data: Batches, config: TrainConfig | None, folder: Path, **options: Any
) -> list[dict[str, float]]:
    """Trains and returns the log of the steps; without a recipe it is empty."""
    if config is None:
        return []
    return train(model, data, config, folder, save_every=config.steps, **options)


def _curve(log: list[dict[str, float]]) -> list[float]:
    """Returns the mean loss of each twentieth of the training."""
    losses = [step["loss"] for step in log]
    points = min(_CURVE_POINTS, len(losses))
    bounds = [len(losses) * point // points for point in range(points + 1)] if points else []
    return [round(fmean(losses[a:b]), 4) for a, b in pairwise(bounds)]
