"""The settings of a PPO run; defaults are the paper's where it gives them.

Source: Touvron et al. 2023, arXiv:2307.09288, section 3.2.3 and appendix A.3.
"""

import math
from dataclasses import dataclass

from llama2.train.pretrain import TrainConfig


@dataclass(frozen=True)
class PPOConfig:
    """The settings of a run. Defaults are the paper's for its 7B and 13B models, where it gives
    them.

    Attributes:
        iterations: 200 to 400 in the paper. A resumed run may have more.
        batch_size: answers per iteration.
        mini_batch_size: answers per gradient step.
        micro_batch_size: answers per forward pass; None means all of a process's answers of a step.
        clip_range: ε of both losses.
        kl_weight: β; 0.005 in the paper for 34B and 70B.
        discount, trace_decay: γ and λ.
        group_size: answers per prompt without a critic; 0 means PPO with a critic.
        bf16, seed, activation_checkpointing: as for `TrainConfig`.

    Raises:
        ValueError: as `TrainConfig`; or a number is out of range or not a divisor where it must be.
    """

    iterations: int = 200
    batch_size: int = 512
    mini_batch_size: int = 64
    micro_batch_size: int | None = None
    lr: float = 1e-6
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    clip_range: float = 0.2
    kl_weight: float = 0.01
    discount: float = 1.0
    trace_decay: float = 0.95
    max_new_tokens: int = 256
    temperature: float = 1.0
    group_size: int = 0
    bf16: bool = False
    seed: int = 0
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", "mini_batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1; got {getattr(self, name)}")
        if self.group_size < 0 or self.group_size == 1:
            raise ValueError(f"group_size: expected 0 or at least 2; got {self.group_size}")
        sizes = {"mini_batch_size": self.mini_batch_size, "group_size": self.samples}
        for name, divisor in sizes.items():
            if self.batch_size % divisor:
                raise ValueError(
                    f"{name}: expected a divisor of batch_size ({self.batch_size}); got {divisor}"
                )
        micro = self.micro_batch_size
        if micro is not None and (micro < 1 or self.mini_batch_size % micro):
            raise ValueError(
                "micro_batch_size: expected a divisor of mini_batch_size "
                f"({self.mini_batch_size}); got {micro}"
            )
        if self.iterations * self.batch_size >= 2**31:
            raise ValueError(
                f"iterations: expected fewer than 2^31 answers in all; got {self.iterations} "
                f"of {self.batch_size}"
            )
        for name in ("lr", "temperature", "clip_range", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number; got {getattr(self, name)}")
        if not 0 <= self.kl_weight < math.inf:
            raise ValueError(f"kl_weight: expected at least 0; got {self.kl_weight}")
        for name in ("discount", "trace_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected from 0 to 1; got {getattr(self, name)}")
        self.step_config(1)  # checks the other settings

    @property
    def samples(self) -> int:
        """Answers per prompt."""
        return self.group_size or 1

    def step_config(self, seq_len: int) -> TrainConfig:
        """Returns the recipe of a gradient step of either model on rows of at most `seq_len`
        tokens."""
        return TrainConfig(
            steps=self.iterations * (self.batch_size // self.mini_batch_size),
            batch_size=self.mini_batch_size,
            seq_len=seq_len,
            micro_batch_size=self.micro_batch_size,
            peak_lr=self.lr,
            final_lr_fraction=1.0,
            warmup_steps=0,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            bf16=self.bf16,
            seed=self.seed,
            activation_checkpointing=self.activation_checkpointing,
        )
