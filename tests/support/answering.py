"""A stand-in for `serve` in code that uses a chat model: a function gives the answers."""

from collections.abc import Callable

from llama2 import checkpoint
from llama2.requests import Request, Result, check_request
from llama2.tokenizer import Tokenizer

TOKENIZER = Tokenizer(checkpoint.SHIPPED / "tokenizer.model")


class Answering:
    """Answers each request with a text, cut at max_new_tokens.

    Args:
        answer: returns the answer to the text of a prompt without control tokens.
    Attributes:
        prompts: the texts of all requests so far.
        request: the request that is being answered.
        kill_after: the number of answers after which KeyboardInterrupt is raised.
        backwards: whether the last request finishes first.
    """

    def __init__(self, answer: Callable[[str], str]) -> None:
        self.answer = answer
        self.prompts: list[str] = []
        self.request: Request | None = None
        self.kill_after: int | None = None
        self.backwards = False

    def serve(self, model, requests, *, cache, vocab_size):
        results = self._results(model, requests, cache, vocab_size)
        yield from reversed(list(results)) if self.backwards else results

    def _results(self, model, requests, cache, vocab_size):
        assert vocab_size == TOKENIZER.vocab_size
        for index, request in enumerate(requests):
            if self.kill_after is not None and len(self.prompts) >= self.kill_after:
                raise KeyboardInterrupt
            check_request(model, cache, request)
            self.request = request
            self.prompts.append(TOKENIZER.decode(request.prompt))
            ids = TOKENIZER.encode(self.answer(self.prompts[-1]), bos=False, eos=True)
            yield Result(index, request, ids[: request.max_new_tokens])


def turns_of(text: str) -> list[str]:
    """The questions in the text of a prompt in the chat format, including a system message."""
    return [part.split("[/INST]")[0].strip() for part in text.split("[INST]")[1:]]


def dialogue(*contents: str, system: str | None = None, **beside) -> dict:
    """The record of a line: a user's content, an answer, and so on."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for index, content in enumerate(contents):
        messages.append({"role": ("user", "assistant")[index % 2], "content": content})
    return {"messages": messages, **beside}


def replace_weights(monkeypatch, *modules) -> dict[str, str]:
    """Replaces the CRC-32 of checkpoints that do not exist, in the given modules, by values of the
    returned dict, by name; zeros at first."""
    found: dict[str, str] = {}
    for module in modules:
        monkeypatch.setattr(module, "weights_crc32", lambda path: found.get(path.name, "00000000"))
    return found
