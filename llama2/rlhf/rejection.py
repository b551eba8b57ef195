"""Rejection sampling: several answers to each prompt, of which the best by a reward is learnt.

Source: Touvron et al. 2023, arXiv:2307.09288, section 3.2.3.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from llama2.chat_format import Message
from llama2.finetune.conversations import place_numbers
from llama2.finetune.dialogues import Dialogue, printable_name
from llama2.finetune.encoding import encode_dialogue
from llama2.finetune.sampling import Answer, Prompt, Sampler
from llama2.rlhf.prompts import TaggedPrompt
from llama2.rlhf.rewards import combined
from llama2.rlhf.scoring import Scorer
from llama2.tokenizer import Tokenizer


def sample_answers(
    sampler: Sampler, prompts: Iterable[TaggedPrompt], num_samples: int
) -> Iterator[tuple[TaggedPrompt, list[Answer] | ValueError]]:
    """Each prompt with all answers that were sampled to it, or why there are none: no room in the
    context, or logits that are not finite. As they finish.

    The first answer is the one that `answer_last` gives with the same settings.
    """
    asked = []
    for prompt in prompts:
        try:
            asked.append((prompt, sampler.encode(prompt.messages)))
        except ValueError as error:
            yield prompt, error
    requests = (
        Prompt(ids, _place(prompt, number))
        for prompt, ids in asked
        for number in range(num_samples)
    )
    found: defaultdict[int, dict[int, Answer]] = defaultdict(dict)  # by prompt, by sample
    for index, answer in sampler.answers(requests):
        which, number = divmod(index, num_samples)
        found[which][number] = answer
        if len(found[which]) == num_samples:
            by_number = found.pop(which)
            answers = [by_number[number] for number in range(num_samples)]
            errors = [answer.error for answer in answers if answer.error is not None]
            yield asked[which][0], ValueError(errors[0]) if errors else answers


def _place(prompt: TaggedPrompt, number: int) -> tuple[int, ...]:
    """By which a sample is drawn: the first as an only answer."""
    place = place_numbers(prompt.file, prompt.line)
    return (*place, number) if number else place


class Earlier(NamedTuple):
    """An answer of an earlier round; `place` is its FILE:LINE."""

    place: str
    text: str


def earlier_answers(rounds: Iterable[Dialogue]) -> dict[tuple[tuple[str, str], ...], list[Earlier]]:
    """Returns the last answers of dialogues, by what stands before them as `asked_of` gives it."""
    answers = defaultdict(list)
    for dialogue in rounds:
        place = f"{printable_name(dialogue.file)}:{dialogue.line}"
        text = dialogue.messages[-1]["content"].strip()
        answers[asked_of(dialogue.messages[:-1])].append(Earlier(place, text))
    return dict(answers)


def asked_of(messages: Sequence[Message]) -> tuple[tuple[str, str], ...]:
    """Messages as what is the same for a model: without the blanks around contents."""
    return tuple((message["role"], message["content"].strip()) for message in messages)


@dataclass(frozen=True)
class Judged:
    """Answers to a prompt with their rewards.

    Attributes:
        prompt: the prompt.
        answers: those of this round, in the order of samples.
        earlier: those of earlier rounds.
        faults: what forbids learning from an answer of this round: it is "empty", "cut", or "long":
            with its prompt longer than a reward model's context. None where nothing does.
        rewards: of `answers`; None where there is a fault.
        earlier_rewards: of `earlier`; None where it is too long.
    """

    prompt: TaggedPrompt
    answers: Sequence[Answer]
    earlier: Sequence[Earlier]
    faults: Sequence[str | None]
    rewards: Sequence[float | None]
    earlier_rewards: Sequence[float | None]

    @property
    def best(self) -> int | None:
        """The number of the answer with the highest reward, the first of equals, those of `earlier`
        counted on after those of this round; None if none has a reward."""
        rewards = [*self.rewards, *self.earlier_rewards]
        usable = [number for number, reward in enumerate(rewards) if reward is not None]
        return max(usable, key=lambda number: rewards[number], default=None)


class Judge:
    """Rewards of answers, of one reward model or of two (see `combined`).

    An answer is scored as a whole dialogue in the format that it was sampled in, with the EOS at
    its end. The answers to one prompt are scored by one call, so that the same answers get the same
    bits whatever other prompts there are, in a run that goes on after a kill, too.

    Args:
        form: one of `chat_format.FORMATS`.
        max_tokens: the context of the reward models.
        safety: None to judge by `helpful` alone.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        form: str,
        max_tokens: int,
        helpful: Scorer,
        safety: Scorer | None = None,
    ) -> None:
        self.tokenizer, self.form, self.max_tokens = tokenizer, form, max_tokens
        self.helpful, self.safety = helpful, safety

    def __call__(
        self, prompt: TaggedPrompt, answers: Sequence[Answer], earlier: Sequence[Earlier] = ()
    ) -> Judged:
        """Scores the answers that are not empty or cut.

        Raises:
            ValueError: a reward is not finite.
        """
        faults = [answer.fault for answer in answers]
        texts = [answer.text for answer in answers if answer.fault is None]
        texts += [answer.text for answer in earlier]
        rewards = self._rewards(prompt, list(dict.fromkeys(texts)))
        faults = [
            "long" if fault is None and answer.text not in rewards else fault
            for answer, fault in zip(answers, faults, strict=True)
        ]
        return Judged(
            prompt,
            answers,
            earlier,
            faults,
            [
                None if fault is not None else rewards[answer.text]
                for answer, fault in zip(answers, faults, strict=True)
            ],
            [rewards.get(answer.text) for answer in earlier],
        )

    def _rewards(self, prompt: TaggedPrompt, texts: Sequence[str]) -> Mapping[str, float]:
        """Of those that fit in the context."""
        encoded = {
            text: encode_dialogue(self.tokenizer, dialogue_of(prompt, text), self.form).ids.tolist()
            for text in texts
        }
        encoded = {text: ids for text, ids in encoded.items() if len(ids) <= self.max_tokens}
        if not encoded:
            return {}
        sequences = list(encoded.values())
        helpful = self.helpful(sequences)
        safety = [None] * len(sequences) if self.safety is None else self.safety(sequences)
        return {
            text: combined(*both, prompt.is_safety)
            for text, both in zip(encoded, zip(helpful, safety, strict=True), strict=True)
        }


def dialogue_of(prompt: TaggedPrompt, answer: str) -> Dialogue:
    """Returns a prompt with an answer, which alone bears a loss."""
    num_given = sum(message["role"] == "assistant" for message in prompt.messages)
    return Dialogue(
        (*prompt.messages, {"role": "assistant", "content": answer}),
        (False,) * num_given + (True,),
        prompt.source,
        prompt.file,
        prompt.line,
    )


def best_of(rewards: Iterable[Sequence[float | None]], num_samples: int) -> list[float]:
    """Returns the mean over prompts of the highest reward among the first 1, 2, …, `num_samples`
    answers to each that have a reward; where fewer have one, among all of them.

    Args:
        rewards: of each prompt's answers; prompts of which no answer has one do not count.
    Returns:
        `num_samples` numbers, of which none is less than the one before it; none at all if no
        answer has a reward.
    """
    usable = [[reward for reward in each if reward is not None] for each in rewards]
    usable = [each for each in usable if each]
    if not usable:
        return []
    return [fmean(max(each[:count]) for each in usable) for count in range(1, num_samples + 1)]
