"""What a study trains and asks, by name."""

from dataclasses import dataclass, replace

from llama2.config import ModelConfig
from llama2.train.pretrain import TrainConfig


@dataclass(frozen=True)
class Preset:
    """A study: MHA as the base, models with fewer key/value heads from scratch, and conversions.

    Attributes:
        model: of the base, with as many key/value heads as query heads.
        train: of every model from scratch.
        num_kv_heads: below the base's; each is trained with every matching.
        methods: of conversion, for every count.
        baseline_methods: that are tried for the last count only.
        alphas: for how long conversions and controls train afterwards, as shares of `train.steps`.
        uptrain_peak_lr: the highest learning rate of that, warmed up over a tenth of it.
        seeds: of the weights and of the data's order. Runs of one seed see the same batches.
        lookup_rows, copy_rows: of a batch; the other rows are text.
        held_out_characters: of each held-out file.
        recall_rows: of each task, to be scored.
        processes: that train side by side, one thread each; 1 means in this process.
    """

    name: str
    model: ModelConfig
    train: TrainConfig
    num_kv_heads: tuple[int, ...]
    methods: tuple[str, ...]
    baseline_methods: tuple[str, ...]
    alphas: tuple[float, ...]
    uptrain_peak_lr: float
    seeds: tuple[int, ...]
    lookup_rows: int
    copy_rows: int
    held_out_characters: int
    recall_rows: int
    processes: int

    def uptrain(self, alpha: float) -> TrainConfig:
        """The recipe of a share `alpha` of the steps; that of 0 has none to run."""
        steps = max(round(alpha * self.train.steps), 1)
        return replace(
            self.train,
            steps=steps,
            warmup_steps=max(steps // 10, 1),
            peak_lr=self.uptrain_peak_lr,
        )


_METHODS = ("low_rank", "aligned", "mean")
_ALPHAS = (0.0, 0.01, 0.05, 0.1)

PRESETS = {
    preset.name: preset
    for preset in (
        # Two cores, a quarter of an hour.
        Preset(
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
            train=TrainConfig(steps=700, batch_size=20, seq_len=96, peak_lr=5e-3, warmup_steps=50),
            num_kv_heads=(2, 1),
            methods=_METHODS,
            baseline_methods=("first", "random"),
            alphas=_ALPHAS,
            uptrain_peak_lr=1.25e-3,
            seeds=(0, 1, 2),
            lookup_rows=5,
            copy_rows=3,
            held_out_characters=3000,
            recall_rows=64,
            processes=2,
        ),
        # One GPU, an hour at most. Made for a corpus of one's own: the standard library would be
        # read many times.
        Preset(
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
            methods=_METHODS,
            baseline_methods=("first", "random"),
            alphas=_ALPHAS,
            uptrain_peak_lr=5e-4,
            seeds=(0, 1, 2),
            lookup_rows=8,
            copy_rows=4,
            held_out_characters=50_000,
            recall_rows=256,
            processes=1,
        ),
    )
}
