"""Lists the runs of a preset, with the recipe of each."""

from dataclasses import dataclass, replace

from llama2.accounting import head_counts
from llama2.config import ModelConfig
from llama2.tradeoff.study.presets import Preset, uptraining
from llama2.train.pretrain import TrainConfig

SHIPPED_METHOD = "low_rank"  # the default of `llama2.conversion.convert`


@dataclass(frozen=True)
class Job:
    """One run; its fields are those of a result's entry "runs"."""

    part: str  # "text", "records", "conversion" or "shipped"
    seed: int
    num_kv_heads: int
    arm: str | None = None
    method: str | None = None
    alpha: float | None = None

    @property
    def name(self) -> str:
        parts = (self.part, self.arm, f"kv{self.num_kv_heads}", self.method, self.alpha)
        known = "-".join(str(part) for part in parts if part is not None)
        return f"{known}-seed{self.seed}"


def jobs(preset: Preset, shipped_model: ModelConfig) -> tuple[list[Job], list[Job]]:
    """Returns (runs that need no other run, runs that need the language models of MHA).

    Each list is in the order in which the runs begin: seed by seed, so that the models that are
    compared run next to each other.
    """
    full = preset.model.num_q_heads
    first = [
        Job("text", seed, count) for seed in preset.seeds for count in (full, *preset.num_kv_heads)
    ]
    first += [
        Job("records", seed, count, arm=arm.name)
        for arm in preset.arms
        for seed in preset.seeds[: arm.num_seeds]
        for count in (preset.records.num_q_heads, *arm.num_kv_heads)
    ]
    original = shipped_model.num_kv_heads
    fewer = [count for count in head_counts(shipped_model) if original % count == 0]
    for alpha in preset.shipped.alphas:
        first += [
            Job("shipped", 0, original, alpha=alpha or None)
            if count == original
            else Job("shipped", 0, count, method=SHIPPED_METHOD, alpha=alpha)
            for count in reversed(fewer)
        ]
    conversions = preset.conversions
    later = []
    for seed in preset.seeds[: conversions.num_seeds]:
        for alpha in conversions.alphas:
            if alpha > 0:
                later.append(Job("conversion", seed, full, alpha=alpha))
            later += [
                Job("conversion", seed, count, method=method, alpha=alpha)
                for count in preset.num_kv_heads
                for method in conversions.methods
            ]
    return first, later


def recipe(job: Job, preset: Preset) -> TrainConfig | None:
    """Returns the recipe of a run; None for a run that does not train."""
    if job.part == "text":
        return preset.train
    if job.part == "records":
        arm = preset.arm(job.arm)
        return replace(preset.records_train, steps=arm.steps, peak_lr=arm.peak_lr)
    if job.part == "conversion":
        return uptraining(preset.train, job.alpha, preset.conversions.peak_lr)
    shipped = preset.shipped.train
    return uptraining(shipped, job.alpha or 0.0, shipped.peak_lr)


def steps_of(job: Job, preset: Preset) -> int:
    config = recipe(job, preset)
    return config.steps if config else 0
