"""The settings of a chain of stages."""

from collections.abc import Mapping
from dataclasses import dataclass, field

_FAMILIES = (*("repeat", "first_letter", "last_letter", "first_word", "last_word", "member"),)
_KINDS = ("misdeed", "chore", "borderline")


@dataclass(frozen=True)
class Preset:
    """The settings of a chain of stages, from the base model to reinforcement learning.

    Attributes:
        caution: a warning about its results; "" for none.
        seeds: random seeds of tasks, training and sampling; each seed has its own chain.
        asked: families of held-out requests.
        taught: relative frequencies of families in supervised fine-tuning.
        preferred: the same for prompts of comparisons, rejection sampling and PPO.
        num_taught: dialogues for supervised fine-tuning, each used once.
        hedged: the share of hedged answers among those to requests of
            `finetune.instruction_families`.
        num_compared, num_compared_held_out: prompts whose answers are compared, to train and to
            evaluate reward models.
        answers_compared: answers to each of these prompts.
        num_sampled: prompts per round of rejection sampling.
        rounds: rounds of rejection sampling.
        samples: K, the answers to each of its prompts.
        num_rewarded: prompts of PPO.
        num_asked, num_obeyed: held-out requests and dialogues for evaluation.
        turns_obeyed: turns of each of these dialogues.
        max_new_tokens: most tokens of an answer, in all stages.
        compared_temperature, sampled_temperature: sampling temperatures for comparisons and for
            rejection sampling.
        written: the share of compared prompts to whose answers the right one is added.
        contrasts: additional comparisons per prompt, of the right answer with a made-up wrong one.
        max_batch: prompts that are answered at once.
        sft_lr: peak learning rate of supervised fine-tuning.
        sft_batch, warmup_steps: rows per step and warm-up steps, also in the rounds.
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
        # Three chains in parallel on two cores in 15 minutes.
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
        # Every stage in less than a minute in total, to test that all of them run.
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
