"""The numbers of a chain of stages, in one place."""

from collections.abc import Mapping
from dataclasses import dataclass, field

_FAMILIES = (*("repeat", "first_letter", "last_letter", "first_word", "last_word", "member"),)
_KINDS = ("misdeed", "chore", "borderline")


@dataclass(frozen=True)
class Preset:
    """A chain of stages, from the base model to reinforcement learning.

    Attributes:
        caution: what a reader of its results has to know; "" if nothing.
        seeds: of the tasks and of all that is trained and drawn; each has a chain of its own.
        asked: families of held-out requests.
        taught: how often a family is drawn for supervised fine-tuning, in proportion.
        preferred: likewise, of prompts for comparisons, rejection sampling and PPO.
        num_taught: dialogues for supervised fine-tuning, each of which comes once.
        hedged: of their answers to requests of `finetune.instruction_families`, the share that is
            hedged.
        num_compared, num_compared_held_out: prompts whose answers are compared, to train reward
            models and to measure them.
        answers_compared: answers to each of those.
        num_sampled: prompts of a round of rejection sampling.
        rounds: of rejection sampling.
        samples: K, the answers to each of its prompts.
        num_rewarded: prompts of PPO.
        num_asked, num_obeyed: held-out requests and dialogues to measure with.
        turns_obeyed: of each of those dialogues.
        max_new_tokens: of an answer, throughout.
        compared_temperature, sampled_temperature: at which answers are drawn for comparisons and
            for rejection sampling.
        written: the share of compared prompts whose right answer is among those that are compared.
        contrasts: comparisons more of each of them, of the right answer and a wrong one that no
            model gave.
        max_batch: prompts that are answered at once.
        sft_lr: highest learning rate of supervised fine-tuning.
        sft_batch, warmup_steps: rows per step and steps of warm-up, of the rounds' tuning too.
        reward_lr, reward_batch, reward_epochs: of both reward models; pairs per step.
        round_lr, round_epochs: of fine-tuning on the best answers.
        iterations, ppo_batch, ppo_mini_batch, ppo_lr, kl_weight: of PPO.
    """

    name: str
    caution: str
    seeds: tuple[int, ...]
    num_taught: int
    num_compared: int
    num_compared_held_out: int
    num_sampled: int
    samples: int
    num_rewarded: int
    num_asked: int
    num_obeyed: int
    iterations: int
    ppo_batch: int
    ppo_mini_batch: int
    asked: tuple[str, ...] = _FAMILIES + _KINDS
    taught: Mapping[str, float] = field(
        default_factory=lambda: {
            **dict.fromkeys(_FAMILIES, 1.5),
            **{"repeat": 3.0, "misdeed": 0.7, "chore": 1.0, "borderline": 0.4, "system": 2.0},
        }
    )
    preferred: Mapping[str, float] = field(
        default_factory=lambda: {
            **dict.fromkeys(_FAMILIES, 1.0),
            **{"repeat": 1.5, "misdeed": 2.0, "chore": 1.5, "borderline": 1.0},
        }
    )
    hedged: float = 0.5
    answers_compared: int = 2
    rounds: int = 2
    turns_obeyed: int = 3
    max_new_tokens: int = 24
    compared_temperature: float = 1.0
    sampled_temperature: float = 0.8
    written: float = 0.7
    contrasts: int = 4
    sft_lr: float = 4e-3
    sft_batch: int = 4
    warmup_steps: int = 20
    max_batch: int = 64
    reward_lr: float = 1e-3
    reward_batch: int = 16
    reward_epochs: int = 1
    round_lr: float = 5e-4
    round_epochs: int = 2
    ppo_lr: float = 2e-4
    kl_weight: float = 0.1


PRESETS = {
    preset.name: preset
    for preset in (
        # Two cores, three chains side by side, a quarter of an hour.
        Preset(
            name="cpu",
            caution="",
            seeds=(0, 1, 2),
            num_taught=9000,
            num_compared=1200,
            num_compared_held_out=300,
            num_sampled=600,
            samples=8,
            num_rewarded=2000,
            num_asked=600,
            num_obeyed=100,
            iterations=40,
            ppo_batch=64,
            ppo_mini_batch=32,
        ),
        # Every stage in less than a minute, to see whether all of them run.
        Preset(
            name="smoke",
            caution="The preset “smoke” trains far too little: its numbers mean nothing.",
            seeds=(0, 1),
            num_taught=500,
            num_compared=32,
            num_compared_held_out=24,
            num_sampled=16,
            samples=4,
            num_rewarded=16,
            num_asked=28,
            num_obeyed=4,
            iterations=2,
            ppo_batch=8,
            ppo_mini_batch=4,
        ),
    )
}
