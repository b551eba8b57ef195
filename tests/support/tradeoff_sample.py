"""An invented result of a trade-off study for tests: nothing was trained, numbers are random."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from llama2.accounting import matched, mean_flops_per_token, num_parameters
from llama2.checkpoint import SHIPPED, load_config
from llama2.tradeoff.study.jobs import Job, jobs, recipe
from llama2.tradeoff.study.presets import (
    PRESETS,
    Arm,
    Conversions,
    Preset,
    Primary,
    described,
)

_FILES = [{"path": f"synthetic/file_{i:02}.py", "bytes": 1000 + 731 * i} for i in range(12)]
_WORSE_AT_CONVERSION = {"low_rank": 0.6, "mean": 1.5}
_ARMS = (
    Arm("main", "the primary setting", 3, 400, 2.5e-3, (4, 2, 1), 6),
    Arm("higher_lr", "twice the learning rate", 3, 400, 5e-3, (2, 1), 4),
    Arm("longer", "twice the steps", 3, 800, 2.5e-3, (2, 1), 4),
    Arm("two_fields", "a control that needs one match only", 2, 400, 2.5e-3, (1,), 3),
)


def synthetic_preset(
    *,
    seeds: Sequence[int] = (10, 11, 12, 13, 14, 15),
    kv_heads: Sequence[int] = (2, 1),
    arms: Sequence[Arm] = _ARMS,
    methods: Sequence[str] = ("low_rank", "mean"),
    alphas: Sequence[float] = (0.0, 0.05),
) -> Preset:
    """The preset "cpu" in small; any of its parts may be left out."""
    primary = [Primary("text", None, count) for count in kv_heads if count == 1]
    primary += [
        Primary("records", arm.name, count)
        for arm in arms
        if arm.name == "main"
        for count in arm.num_kv_heads
        if count < 4
    ]
    return replace(
        PRESETS["cpu"],
        name="synthetic",
        seeds=tuple(seeds),
        num_kv_heads=tuple(kv_heads),
        arms=tuple(arms),
        conversions=Conversions(tuple(methods), tuple(alphas), 7.5e-4, 4),
        primary=tuple(primary),
    )


def synthetic_result(
    *, controls: bool = True, shipped: bool = True, **parts: Any
) -> dict[str, Any]:
    """A result file of a study as a dict.

    Text: MQA is resolved from MHA, GQA (2) is not. "records": the gap grows with fewer heads, is
    larger in the arm "higher_lr" and not resolved in "longer" and "two_fields".

    Args:
        controls, shipped: whether there are runs of conversion's controls, of the shipped model.
        parts: as `synthetic_preset` takes them.
    """
    preset = synthetic_preset(**parts)
    shipped_model = load_config(SHIPPED)
    random = np.random.default_rng(20)
    level = {seed: 2.37 + 0.01 * random.standard_normal() for seed in preset.seeds}
    runs = [
        _run(job, preset, shipped_model, level, random)
        for phase in jobs(preset, shipped_model)
        for job in phase
        if (controls or job.part != "conversion" or job.method)
        and (shipped or job.part != "shipped")
    ]
    num_bytes = sum(file["bytes"] for file in _FILES)
    results = {
        "kind": "study",
        "preset": "synthetic",
        "command": "synthetic numbers for a test: nothing was trained",
        "date": "2000-01-01",
        "seconds": 20.0 * len(runs),
        "cpu_seconds": sum(run["cpu_seconds"] for run in runs),
        "environment": {
            "python": "3.0.0",
            "torch": "0.0.0",
            "device": "none",
            "processes": 1,
            "commit": None,
            "source": "2" * 64,
        },
        "corpus": {
            "name": "synthetic text",
            "train": {"documents": 10, "bytes": 10**6, "tokens": 4 * 10**5, "sha256": "0" * 64},
            "held_out": {
                "bytes": num_bytes,
                "tokens": 2 * 10**4,
                "sha256": "1" * 64,
                "files": [dict(file) for file in _FILES],
            },
        },
        **described(preset, shipped_model),
        "runs": runs,
    }
    results["text"]["epochs"] = 0.12
    return results


def _run(
    job: Job,
    preset: Preset,
    shipped_model: Any,
    level: dict[int, float],
    random: np.random.Generator,
) -> dict[str, Any]:
    config = recipe(job, preset)
    steps = config.steps if config else 0
    base = {"records": preset.records.config(2), "shipped": shipped_model}.get(
        job.part, preset.model
    )
    matching = "exact" if job.part in ("text", "records") else "same_ffn"
    shape = matched(base, job.num_kv_heads, matching)
    run = {
        "part": job.part,
        "arm": job.arm,
        "seed": job.seed,
        "num_kv_heads": job.num_kv_heads,
        "method": job.method,
        "alpha": job.alpha,
        "intermediate_size": shape.intermediate_size,
        "parameters": num_parameters(shape),
        "steps": steps,
        "peak_lr": config.peak_lr if config else None,
        "final_train_loss": 1.3 if config else None,
        "loss_curve": np.linspace(6.0, 1.3, min(steps, 20)).tolist(),
        "seconds": 30.0,
        "cpu_seconds": 20.0,
    }
    if job.part == "records":
        return run | _recalled(job, preset, random)
    lost = 1 - job.num_kv_heads / base.num_kv_heads
    worse = 0.004 * random.standard_normal() * (lost > 0)
    if job.part == "text":
        worse += {2: 0.002, 1: 0.02}.get(job.num_kv_heads, 0.0) if lost else 0.0
    elif job.method:
        worse += _WORSE_AT_CONVERSION[job.method] * lost * np.exp(-20 * job.alpha) + 0.05 * lost
    worse -= 0.2 * (job.alpha or 0)
    start = 1.53 if job.part == "shipped" else level[job.seed]
    num_bytes = np.array([file["bytes"] for file in _FILES])
    noise = np.random.default_rng(job.seed).standard_normal(len(_FILES))  # of the seed's files
    noise = 0.02 * noise + 0.002 * random.standard_normal(len(_FILES))
    bits = (start + worse + noise) * num_bytes
    return run | {
        "tokens": steps * config.batch_size * config.seq_len if config else 0,
        "flops_per_token": mean_flops_per_token(shape, preset.train.seq_len),
        "bits_per_byte": float(bits.sum() / num_bytes.sum()),
        "bits": bits.tolist(),
    }


def _recalled(job: Job, preset: Preset, random: np.random.Generator) -> dict[str, Any]:
    gaps = {
        "main": {4: 0.04, 2: 0.11, 1: 0.22},
        "higher_lr": {2: 0.33, 1: 0.50},
    }.get(job.arm, {})
    top = {"main": 0.92, "higher_lr": 0.97}.get(job.arm, 0.98)
    mean = top - gaps.get(job.num_kv_heads, 0.0) + 0.015 * random.standard_normal()
    shares = {
        str(items): float(np.clip(mean - 0.01 * (items - 5), 0, 1))
        for items in preset.records.items_scored
    }
    accuracy = sum(shares.values()) / len(shares)
    return {
        "accuracy": accuracy,
        "accuracy_by_items": shares,
        "bits_per_answer": 3 * (1 - accuracy),
    }
