"""The presets of a study: what it trains and measures, and its primary comparisons."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from llama2.config import ModelConfig
from llama2.tradeoff.study.records import RecordsShape
from llama2.train.pretrain import TrainConfig


@dataclass(frozen=True)
class Arm:
    """One setting in which models learn the task "records".

    Attributes:
        name: of the arm; primary comparisons use the arm "main".
        purpose: a phrase for readers.
        fields: attributes of an item, from 2 on.
        steps, peak_lr: of the training.
        num_kv_heads: counts that are compared to MHA, which runs too.
        num_seeds: how many of the preset's seeds run, from the first.
    """

    name: str
    purpose: str
    fields: int
    steps: int
    peak_lr: float
    num_kv_heads: tuple[int, ...]
    num_seeds: int


@dataclass(frozen=True)
class Primary:
    """A comparison to MHA that is named before the first run.

    Attributes:
        measure: "text" (bits per byte) or "records" (accuracy).
        arm: of "records"; None for "text".
        num_kv_heads: of the model that is compared to MHA.
    """

    measure: str
    arm: str | None
    num_kv_heads: int


@dataclass(frozen=True)
class Conversions:
    """Conversions of trained MHA models, and controls that train on without one.

    Attributes:
        methods: of `llama2.conversion`, for every number of heads.
        alphas: how long conversions and controls train afterwards, as shares of the base's steps.
        peak_lr: of that training; the warm-up is a tenth of it.
        num_seeds: how many of the preset's seeds run, from the first.
    """

    methods: tuple[str, ...]
    alphas: tuple[float, ...]
    peak_lr: float
    num_seeds: int


@dataclass(frozen=True)
class ShippedConversion:
    """The conversion of the checkpoint that this package ships, by the default method.

    Attributes:
        train: the recipe of the checkpoint, but for `peak_lr`, which is that of the uptraining.
        alphas: as in `Conversions`, shares of `train.steps`.
    """

    train: TrainConfig
    alphas: tuple[float, ...]


@dataclass(frozen=True)
class Preset:
    """A study: language models of text, models that learn "records", and conversions.

    All models from scratch with fewer key/value heads have as many parameters as MHA (the matching
    "exact" of `llama2.accounting.matched`) and start from the MHA weights of their seed
    (`pairing`).

    Attributes:
        model: MHA, for text; the vocabulary is that of the shipped tokenizer.
        train: of every language model.
        num_kv_heads: below MHA's, of language models and of conversions.
        seeds: of the weights and of the data's order. Runs of one seed see the same batches.
        records: the task and the shape of the models that learn it.
        records_train: the recipe of these models; each arm sets its steps and learning rate.
        calibration_tokens: of training text, for methods of conversion that look at data.
        held_out_characters: of each held-out file.
        processes: that train side by side, one thread each; 1 means in this process.
    """

    name: str
    model: ModelConfig
    train: TrainConfig
    num_kv_heads: tuple[int, ...]
    seeds: tuple[int, ...]
    records: RecordsShape
    records_train: TrainConfig
    arms: tuple[Arm, ...]
    conversions: Conversions
    shipped: ShippedConversion
    primary: tuple[Primary, ...]
    calibration_tokens: int
    held_out_characters: int
    processes: int

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


def uptraining(train: TrainConfig, alpha: float, peak_lr: float) -> TrainConfig | None:
    """Returns the recipe of a share `alpha` of the steps of `train`, at least one step; None for a
    share of 0, which does not train."""
    if alpha == 0:
        return None
    steps = max(round(alpha * train.steps), 1)
    return replace(train, steps=steps, warmup_steps=max(steps // 10, 1), peak_lr=peak_lr)


def described(preset: Preset, shipped_model: ModelConfig) -> dict[str, Any]:
    """Returns the entries of a result that describe the plan, "text", "records", "conversion",
    "shipped" and "primary", as `result_form` documents them.

    Args:
        shipped_model: the configuration of the checkpoint that this package ships.
    """
    full = preset.model.num_q_heads
    shape, conversions = preset.records, preset.conversions
    return {
        "text": {
            "base": asdict(preset.model),
            "train_config": asdict(preset.train),
            "seeds": list(preset.seeds),
            "num_kv_heads": [full, *preset.num_kv_heads],
        },
        "records": {
            "shape": asdict(shape),
            "train_config": asdict(preset.records_train),
            "chance": 1 / shape.values,
            "arms": [
                asdict(arm)
                | {
                    "num_kv_heads": [shape.num_q_heads, *arm.num_kv_heads],
                    "seeds": list(preset.seeds[: arm.num_seeds]),
                }
                for arm in preset.arms
            ],
        },
        "conversion": {
            "methods": list(conversions.methods),
            "alphas": list(conversions.alphas),
            "peak_lr": conversions.peak_lr,
            "seeds": list(preset.seeds[: conversions.num_seeds]),
            "num_kv_heads": list(preset.num_kv_heads),
        },
        "shipped": {
            "model": asdict(shipped_model),
            "train_config": asdict(preset.shipped.train),
            "alphas": list(preset.shipped.alphas),
        },
        "primary": [asdict(primary) for primary in preset.primary],
    }


_CPU = Preset(
    name="cpu",
    model=ModelConfig(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=176,
        num_layers=2,
        num_q_heads=8,
        num_kv_heads=8,
        head_dim=8,
        max_seq_len=96,
    ),
    train=TrainConfig(steps=400, batch_size=12, seq_len=96, peak_lr=3e-3, warmup_steps=50),
    num_kv_heads=(2, 1),
    seeds=tuple(range(10, 24)),  # those of the pilot, which chose the recipe, were below 10
    records=RecordsShape(),
    # The tokens of the longest rows; `steps` and `peak_lr` are those of the arm "main".
    records_train=TrainConfig(
        steps=400,
        batch_size=21,
        seq_len=33,
        peak_lr=2.5e-3,
        warmup_steps=30,
        final_lr_fraction=0.05,
    ),
    arms=(
        Arm("main", "the primary setting", 3, 400, 2.5e-3, (4, 2, 1), 8),
        Arm("higher_lr", "twice the learning rate", 3, 400, 5e-3, (4, 2, 1), 4),
        Arm("longer", "twice the steps", 3, 800, 2.5e-3, (2, 1), 5),
        Arm("two_fields", "a control that needs one match only", 2, 400, 2.5e-3, (1,), 4),
    ),
    conversions=Conversions(("low_rank", "mean"), (0.0, 0.05), 7.5e-4, 4),
    shipped=ShippedConversion(
        TrainConfig(steps=5000, batch_size=4, seq_len=256, peak_lr=6.25e-4, warmup_steps=200),
        (0.0, 0.05),
    ),
    primary=(
        Primary("text", None, 1),
        Primary("records", "main", 1),
        Primary("records", "main", 2),
    ),
    calibration_tokens=16_384,
    held_out_characters=3000,
    processes=2,
)

PRESETS = {
    preset.name: preset
    for preset in (
        # Two cores, a quarter of an hour.
        _CPU,
        # One GPU, an hour at most; only the language models are larger. It is meant for a large
        # text: this one would read the standard library many times.
        replace(
            _CPU,
            name="gpu",
            model=ModelConfig(
                vocab_size=1024,
                hidden_size=512,
                intermediate_size=1408,
                num_layers=6,
                num_q_heads=8,
                num_kv_heads=8,
                head_dim=64,
                max_seq_len=512,
            ),
            train=TrainConfig(
                steps=1200,
                batch_size=64,
                seq_len=512,
                peak_lr=2e-3,
                warmup_steps=100,
                bf16=True,
            ),
            num_kv_heads=(4, 2, 1),
            seeds=tuple(range(10, 18)),
            conversions=Conversions(("low_rank", "mean"), (0.0, 0.05), 5e-4, 4),
            held_out_characters=50_000,
            processes=1,
        ),
        # Seconds: every part runs, with models that learn next to nothing.
        replace(
            _CPU,
            name="smoke",
            model=replace(_CPU.model, hidden_size=16, intermediate_size=24, head_dim=2),
            train=replace(_CPU.train, steps=4, batch_size=2, seq_len=32, warmup_steps=1),
            num_kv_heads=(2,),
            seeds=(10, 11),
            records=RecordsShape(hidden_size=16, intermediate_size=24, head_dim=2, rows_scored=4),
            records_train=replace(_CPU.records_train, batch_size=2, warmup_steps=1),
            arms=(
                Arm("main", "the primary setting", 2, 4, 2.5e-3, (2,), 2),
                Arm("longer", "twice the steps", 2, 8, 2.5e-3, (2,), 1),
            ),
            conversions=Conversions(("low_rank", "mean"), (0.0, 0.5), 7.5e-4, 1),
            shipped=ShippedConversion(
                TrainConfig(steps=40, batch_size=1, seq_len=32, peak_lr=6.25e-4), (0.0, 0.05)
            ),
            primary=(Primary("text", None, 2), Primary("records", "main", 2)),
            calibration_tokens=512,
            held_out_characters=300,
            processes=1,
        ),
    )
}
