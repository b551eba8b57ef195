"""Rejection sampling: several answers per prompt, of which the one with the highest reward is kept.

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
    """Yields, as they finish, each prompt with its sampled answers, or with the error that
    prevented them: no room in the context, or logits that are not finite.

    The first answer is that of `answer_last` with the same settings.
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
    """Returns the place that determines a sample's random numbers; the first is that of a single
    answer."""
    place = place_numbers(prompt.file, prompt.line)
    return (*place, number) if number else place


class Earlier(NamedTuple):
    """An answer of an earlier round; `place` is FILE:LINE."""

    place: str
    text: str


def earlier_answers(rounds: Iterable[Dialogue]) -> dict[tuple[tuple[str, str], ...], list[Earlier]]:
    """Returns the last answers of dialogues, by `asked_of` the preceding messages."""
    answers = defaultdict(list)
    for dialogue in rounds:
        place = f"{printable_name(dialogue.file)}:{dialogue.line}"
        text = dialogue.messages[-1]["content"].strip()
        answers[asked_of(dialogue.messages[:-1])].append(Earlier(place, text))
    return dict(answers)


def asked_of(messages: Sequence[Message]) -> tuple[tuple[str, str], ...]:
    """Returns messages as a key that is equal if they are the same for a model: contents are
    stripped."""
    return tuple((message["role"], message["content"].strip()) for message in messages)


@dataclass(frozen=True)
class Judged:
    """Answers to a prompt with their rewards.

    Attributes:
        prompt: the prompt.
        answers: those of this round, in the order of samples.
        earlier: those of earlier rounds.
        faults: why an answer of this round cannot be trained on: it is "empty", "cut", or "long",
            with its prompt longer than a reward model's context. None for an answer without a
            fault.
        rewards: of `answers`; None for one with a fault.
        earlier_rewards: of `earlier`; None for one that is too long.
    """

    prompt: TaggedPrompt
    answers: Sequence[Answer]
    earlier: Sequence[Earlier]
    faults: Sequence[str | None]
    rewards: Sequence[float | None]
    earlier_rewards: Sequence[float | None]

    @property
    def best(self) -> int | None:
        """The index of the answer with the highest reward in `answers` followed by `earlier`; the
        first if there are several. None if no answer has a reward."""
        rewards = [*self.rewards, *self.earlier_rewards]
        usable = [number for number, reward in enumerate(rewards) if reward is not None]
        return max(usable, key=lambda number: rewards[number], default=None)


class Judge:
    """Computes rewards of answers with one or two reward models (see `combined`).

    It scores the whole dialogue, in the format of sampling and with EOS at its end. All answers to
    a prompt are scored in one call, so that rewards are bit-identical whatever the other prompts
    are, also in a resumed run.

    Args:
        form: one of `chat_format.FORMATS`.
        max_tokens: the context of the reward models.
        safety: None to use only `helpful`.
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
        """Scores the answers that are neither empty nor cut.

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
        """Returns the rewards, by text, of the answers that fit in the context."""
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
    """Returns a prompt with an answer; only the answer has a loss."""
    num_given = sum(message["role"] == "assistant" for message in prompt.messages)
    return Dialogue(
        (*prompt.messages, {"role": "assistant", "content": answer}),
        (False,) * num_given + (True,),
        prompt.source,
        prompt.file,
        prompt.line,
    )


def best_of(rewards: Iterable[Sequence[float | None]], num_samples: int) -> list[float]:
    """Returns the means over prompts of the highest reward among the first 1, 2, …, `num_samples`
    answers with a reward; if a prompt has fewer, among all of them.

    Args:
        rewards: of each prompt's answers; prompts without any reward do not count.
    Returns:
        `num_samples` non-decreasing numbers; an empty list if no answer has a reward.
    """
    usable = [[reward for reward in each if reward is not None] for each in rewards]
    usable = [each for each in usable if each]
    if not usable:
        return []
    return [fmean(max(each[:count]) for each in usable) for count in range(1, num_samples + 1)]
