"""The command `llama2 tradeoff`: runs the study, measures on a GPU if there is one, and writes the
page."""

import argparse
import json
import platform
import time
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from llama2.accounting import head_counts
from llama2.checkout import commit_of, source_sha256
from llama2.checkpoint import SHIPPED, load_config
from llama2.commands.options import shape_named
from llama2.commands.tradeoff_options import NO_STUDY
from llama2.config import PUBLISHED, ModelConfig
from llama2.placement import place
from llama2.storage import read_json, write_text
from llama2.tradeoff import study
from llama2.tradeoff.measured import measure_decode
from llama2.tradeoff.question import Question
from llama2.tradeoff.recommend import recommend
from llama2.tradeoff.report.deployment_tables import check_measured
from llama2.tradeoff.report.folder import check_folder
from llama2.tradeoff.report.page import write_page
from llama2.tradeoff.report.wording import heads_name
from llama2.tradeoff.roofline import CACHE_FORMATS, GIB, GPUS, Gpu
from llama2.tradeoff.study.data import read_texts
from llama2.tradeoff.study.presets import PRESETS, Preset, described
from llama2.tradeoff.study.runs import check
from llama2.tradeoff.study.training import run_study

_RESULT, _MEASURED, _LOG = "results.json", "measured.json", "log.jsonl"
_LEAST, _MOST = 1e-6, 1e9  # range of a GPU's numbers; beyond it, computed speeds overflow
_MEASURED_SHAPES = ("7B", "70B")
_MEASURED_BATCHES, _MEASURED_CONTEXTS = (1, 8, 32, 128), (1024, 4096, 16384)


def run(args: argparse.Namespace) -> int:
    """Runs the study, measures on a GPU if there is one, writes the page and returns 0.

    Raises:
        OSError, ValueError, NotImplementedError: about the user's input.
        FloatingPointError: a run diverged.
    """
    _check_use(args)
    check_folder(args.out)
    # Checked before the study, so that an error does not come after it.
    question = _question(args)
    recommendation = recommend(question)
    measured = None if args.measured is None else _read_measured(args.measured)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.results is not None:
        results = _read(args.results)
    elif args.preset == NO_STUDY:
        results = None
    else:
        results = _study(args, _preset(args))
    page = write_page(
        results,
        args.out,
        question,
        measured_rows=_measured(args) if measured is None else measured,
        command=args.command_line,
    )
    if args.json:
        print(json.dumps(page | {"recommendation": asdict(recommendation)}, indent=1))
        return 0
    heads = heads_name(recommendation.num_kv_heads, question.config.num_q_heads)
    print(f"{heads} for {question.setting} (predicted)")
    for reason in recommendation.reasons:
        print(f"  - {reason}")
    print(f"{args.out / 'report.html'}, and the same as report.md")
    return 0


def _question(args: argparse.Namespace) -> Question:
    return Question(
        config=shape_named(args.shape),
        gpu=_gpu(args.gpu),
        context=args.context,
        batch=args.batch,
        tp=args.tp,
        cache=CACHE_FORMATS[args.kv_cache_dtype],
        keep=args.keep,
        least_share=args.least_share,
    )


def _read_measured(file: Path) -> list[dict[str, Any]]:
    """Returns the rows of an earlier run on a GPU."""
    rows = read_json(file)
    try:
        check_measured(rows)
    except ValueError as error:
        raise ValueError(f"{file}: expected the measured.json of a page; {error}") from error
    return rows


def _check_use(args: argparse.Namespace) -> None:
    """Raises ValueError for study options if no study is run."""
    if args.results is None and args.preset != NO_STUDY:
        return
    reason = "--preset none" if args.results is None else f"--results {args.results}"
    for name in ("text", "held_out", "seeds", "steps", "processes", "work", "device"):
        if (value := getattr(args, name)) is not None:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option}: expected a study to run; got {value} with {reason}")
    if args.backend != "auto":
        raise ValueError(f"--backend: expected a study to run; got {args.backend} with {reason}")
    if args.results is not None and args.preset is not None:
        raise ValueError(f"--preset: expected a study to run; got {args.preset} with {reason}")


def _read(file: Path) -> dict[str, Any]:
    """Reads the result of an earlier study and checks it before anything is measured."""
    results = read_json(file)
    try:
        check(results)
    except ValueError as error:
        raise ValueError(f"{file}: no result of a study: {error}") from error
    return results


def _gpu(name: str) -> Gpu:
    if name in GPUS:
        return GPUS[name]
    try:
        memory, bandwidth, flops = (float(part) for part in name.split(","))
    except ValueError as error:
        raise ValueError(
            f"gpu: expected one of {', '.join(GPUS)}, or MEMORY_GIB,TB_PER_S,TFLOPS; "
            f"got {name!r:.60}"
        ) from error
    if not all(_LEAST <= number <= _MOST for number in (memory, bandwidth, flops)):
        raise ValueError(
            f"gpu: expected positive numbers, from {_LEAST:g} to {_MOST:g}; got {name!r:.60}"
        )
    name = f"a GPU of {memory:g} GiB, {bandwidth:g} TB/s and {flops:g} TFLOP/s"
    return Gpu(name, int(memory * GIB), bandwidth * 1e12, flops * 1e12, "the command line")


def _preset(args: argparse.Namespace) -> Preset:
    preset = PRESETS[args.preset or "cpu"]
    if args.steps is not None:
        preset = replace(preset, train=replace(preset.train, steps=args.steps))
    if args.seeds is not None:
        if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
            raise ValueError(f"seeds: expected different ints of at least 0; got {args.seeds}")
        preset = replace(preset, seeds=tuple(args.seeds))
    if args.processes is not None:
        if args.processes < 1:
            raise ValueError(f"processes: expected at least 1; got {args.processes}")
        preset = replace(preset, processes=args.processes)
    return preset


def _study(args: argparse.Namespace, preset: Preset) -> dict[str, Any]:
    started = time.perf_counter()
    # Of the code that runs: files may change before the study ends.
    sources = {
        "commit": commit_of(Path(__file__)),
        "source": source_sha256(Path(study.__file__).parent),
    }
    placement = place(args.backend, args.device)
    if preset.name == "gpu" and placement.device.type == "cpu" and args.device is None:
        raise ValueError("preset: expected a GPU for gpu; got the CPU (--device cpu insists)")
    placement.announce()
    work = args.work or Path("build") / f"tradeoff-{preset.name}"
    texts = read_texts(args.text, args.held_out, preset)
    placing = {"backend": args.backend, "device": args.device}
    corpus, runs = run_study(preset, texts, work, SHIPPED / "tokenizer.model", **placing)
    lines = (json.dumps({k: v for k, v in entry.items() if k != "bits"}) for entry in runs)
    write_text(args.out / _LOG, "".join(f"{line}\n" for line in lines))
    results = {
        "kind": "study",
        "preset": preset.name,
        "command": args.command_line,
        "date": date.today().isoformat(),
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(sum(entry["cpu_seconds"] for entry in runs), 1),
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": _device_name(placement.device),
            "processes": preset.processes,
            **sources,
        },
        "corpus": corpus.record,
        **described(preset, load_config(SHIPPED)),
        "runs": runs,
    }
    read = preset.train.steps * preset.train.batch_size * preset.train.seq_len
    results["text"]["epochs"] = read / len(corpus.stream)
    write_text(args.out / _RESULT, json.dumps(results, indent=1) + "\n")
    return results


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _measured(args: argparse.Namespace) -> list[dict[str, Any]] | None:
    """Times decode steps of published layer shapes on a GPU; returns None without one."""
    if args.no_measure or not torch.cuda.is_available():
        return None
    rows = []
    for shape in _MEASURED_SHAPES:
        config = PUBLISHED[shape]
        found = measure_decode(
            config, _measured_counts(config), _MEASURED_BATCHES, _MEASURED_CONTEXTS
        )
        rows += [row | {"shape": shape, "num_q_heads": config.num_q_heads} for row in found]
    write_text(args.out / _MEASURED, json.dumps(rows, indent=1) + "\n")
    return rows


def _measured_counts(config: ModelConfig) -> list[int]:
    """Returns the head counts of MHA, of the GQA paper (8) and of MQA."""
    return [count for count in head_counts(config) if count in (config.num_q_heads, 8, 1)]
