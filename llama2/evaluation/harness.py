"""The interface to lm-eval: `Llama2LM`, which importing this module registers as the model
`llama2`.

It handles requests like lm-eval's own `hf` model, so that results are comparable: BOS before a
text, long texts truncated on the left, the same windows of a document. Gao et al.,
doi:10.5281/zenodo.12608602.
"""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import (
    get_rolling_token_windows,
    make_disjoint_window,
    simple_parse_args_string,
)
from tqdm import tqdm

from gqa_kernels import __version__
from llama2.cache.paged_kv_cache import PagedKVCache
from llama2.cache_size import fitting_pages
from llama2.chat_format import chat_turns
from llama2.checkpoint import load, load_config
from llama2.decoding.weights import fingerprint
from llama2.evaluation.scoring import Score, Window, scores
from llama2.placement import place
from llama2.requests import Request
from llama2.serving import serve
from llama2.stops import StopStrings, stop_ids
from llama2.taught_format import taught_format
from llama2.tokenizer import Tokenizer, check_fits

_DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}
_CHAT_FORMAT = "<s>[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{user} [/INST] {answer} </s><s>[INST] …"
# Between the turns of a rendered chat. No message contains [INST], so none can end a turn.
_NEXT_TURN = re.compile(r"</s><s>(?=\[INST\] )")
_PAGE_SIZE = 16
_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}
# Settings that have no effect: with these values, or without sampling.
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0}
_OF_DRAWS = {"top_k", "min_p", "typical_p", "seed"}

_log = logging.getLogger(f"lm_eval.{__name__}")


@register_model("llama2")
class Llama2LM(TemplateLM):
    """A checkpoint that this package can load, on any backend.

    Args:
        checkpoint: a directory with tokenizer.model.
        backend, device: as for `place`.
        dtype: float32, float16 or bfloat16; "auto" is the checkpoint's.
        batch_size: sequences per call.
        max_length: the longest context in tokens; None is the checkpoint's context length.
    Raises:
        OSError, ValueError, NotImplementedError, ImportError: as `place`, `checkpoint.load`,
            `Tokenizer` and `check_fits`; or the dtype is unknown, or a size is below 1.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        backend: str = "auto",
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        if dtype not in ("auto", *_DTYPES):
            raise ValueError(f"dtype: expected auto, {', '.join(_DTYPES)}; got {dtype!r}")
        self.batch_size = _size("batch_size", batch_size)
        max_length = None if max_length is None else _size("max_length", max_length)
        self.folder = Path(checkpoint)
        placement = place(backend, device)
        load_config(self.folder)  # so that the error is not about the tokenizer
        self.tokenizer = Tokenizer(self.folder / "tokenizer.model")
        if backend == "auto" or placement.interpreted:
            placement.announce()
        self.model = load(
            self.folder,
            placement.ops,
            dtype=_DTYPES.get(dtype),
            device=placement.device,
            max_seq_len=max_length,
        )
        check_fits(self.tokenizer, self.model.config.vocab_size, self.folder)
        self.backend_name, self._device = placement.backend, placement.device
        self.max_length = self.model.config.max_seq_len
        self.format = taught_format(self.folder)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "Llama2LM":
        """Makes a model from command-line options; --model_args overrides --batch_size and
        --device."""
        more = {k: v for k, v in (additional_config or {}).items() if v is not None}
        if more.get("device") == "cuda:0" and not torch.cuda.is_available():
            del more["device"]  # lm-eval's default, not the user's choice
        return cls(**{**more, **arg_dict})

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> "Llama2LM":
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        return self.tokenizer.bos_id if self.tokenizer.bos_id >= 0 else self.tokenizer.eos_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.folder.resolve()).replace("/", "__")

    def digest(self) -> str:
        """Returns a hexadecimal digest of the weights and of all else on which an answer
        depends."""
        dtype = self.model.lm_head.weight.dtype
        settings = (__version__, self.model.config, dtype, self.backend_name)
        parts = (
            repr(settings).encode(),
            (self.folder / "tokenizer.model").read_bytes(),
            fingerprint(self.model).cpu().numpy().tobytes(),
        )
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def get_model_info(self) -> dict[str, Any]:
        """Returns the information that lm-eval adds to its results."""
        weights = list(self.model.parameters())
        return {
            "checkpoint": str(self.folder),
            "backend": self.backend_name,
            "model_num_parameters": sum(weight.numel() for weight in weights),
            "model_dtype": str(weights[0].dtype).removeprefix("torch."),
            "max_length": self.max_length,
        }

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the only chat template, Llama 2's.

        Raises:
            ValueError: another template is requested by name, or the checkpoint was trained on
                another format.
        """
        if chat_template:
            self._check_format()
        if isinstance(chat_template, str):
            raise ValueError(
                "chat_template: expected no name, as Llama 2's is the only one; got "
                f"{chat_template!r}"
            )
        return _CHAT_FORMAT if chat_template else None

    def _check_format(self) -> None:
        if self.format != "chat":
            raise ValueError(
                "chat_template: expected a checkpoint trained on Llama 2's chat format; got "
                f"{self.folder} with the format {self.format}"
            )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns the text of a chat, which `tok_encode` encodes to the ids of
        `Tokenizer.encode_chat`.

        Args:
            add_generation_prompt: False means that the last message is the beginning of the answer.
        Raises:
            TypeError, ValueError: as `Tokenizer.encode_chat`; or the checkpoint was trained on
                another format.
        """
        self._check_format()  # lm-eval does not always call `chat_template` first
        answer = ""
        if not add_generation_prompt:
            *chat_history, begun = chat_history
            answer = f" {begun['content'].strip()}"
        return f"<s>{'</s><s>'.join(chat_turns(chat_history))}{answer}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Returns the ids after BOS, or without BOS if `add_special_tokens` is False. A leading <s>
        is that BOS; between the turns of a rendered chat, </s><s> is EOS and BOS."""
        if add_special_tokens is False:
            return self.tokenizer.encode(string, bos=False)
        if not string.startswith("<s>"):
            return self.tokenizer.encode(string)
        *finished, last = _NEXT_TURN.split(string.removeprefix("<s>"))
        ids = [token for turn in finished for token in self.tokenizer.encode(turn, eos=True)]
        return ids + self.tokenizer.encode(last)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: object,
    ) -> list[tuple[float, bool]]:
        windows, num_cut = [], 0
        for (_, text), context, continuation in requests:
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"continuation: expected at most max_length ({self.max_length}) tokens; got "
                    f"{len(continuation)} in {text!r:.60}"
                )
            inputs = (context + continuation)[:-1]
            num_cut += len(inputs) > self.max_length
            windows.append(Window(tuple(inputs[-self.max_length :]), continuation))
        self._say_what_was_cut(num_cut, len(requests))
        answers = [(0.0, True)] * len(windows)
        for index, losses, likeliest in self._scores(windows, disable_tqdm, greedy=True):
            answers[index] = -sum(losses), likeliest == windows[index].targets
            self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns log p of each text, in windows of max_length that predict every token once,
        including, as in `hf`, the BOS that `tok_encode` adds."""
        windows, request_of = [], []
        for number, request in enumerate(requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, pairs):
                windows.append(Window(tuple((context + continuation)[:-1]), continuation))
                request_of.append(number)
        totals, left = [0.0] * len(requests), Counter(request_of)
        for index, losses, _ in self._scores(windows, disable_tqdm, greedy=False):
            number = request_of[index]
            totals[number] -= sum(losses)
            left[number] -= 1
            if not left[number]:
                self.cache_hook.add_partial(
                    "loglikelihood_rolling", requests[number].args, totals[number]
                )
        return totals

    def _scores(
        self, windows: list[Window], disable_tqdm: bool, *, greedy: bool
    ) -> Iterator[Score]:
        sizes = {"batch_size": self.batch_size, "show_progress": not disable_tqdm}
        return scores(self.model, windows, greedy=greedy, **sizes)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generates as `hf` does: until a string of `until`, the end of the text or `max_gen_toks`
        tokens (default: 256); a context keeps its last max_length − max_gen_toks tokens.

        Raises:
            ValueError, NotImplementedError: about a setting.
            FloatingPointError: the model computes NaN or infinity.
        """
        stops = stop_ids(self.tokenizer, self.folder)
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        settings = [self._settings(request.args[1]) for request in requests]
        num_cut, prepared = 0, []
        for prompt, setting in zip(prompts, settings, strict=True):
            room = self.max_length - setting["max_gen_toks"]
            if room < 1:
                raise ValueError(
                    f"max_gen_toks: expected less than max_length ({self.max_length}); "
                    f"got {setting['max_gen_toks']}"
                )
            num_cut += len(prompt) > room
            drawn = {name: setting[name] for name in ("temperature", "top_p", "seed")}
            stop = StopStrings(self.tokenizer, setting["until"])
            limits = {"stop_ids": stops, "stop": stop}
            prepared.append(Request(prompt[-room:], setting["max_gen_toks"], **drawn, **limits))
        self._say_what_was_cut(num_cut, len(requests))
        answers = [""] * len(requests)
        # Sorted, so that the cache can reuse shared prefixes.
        order = sorted(range(len(requests)), key=lambda index: prepared[index].prompt)
        results = serve(
            self.model,
            (prepared[index] for index in order),
            cache=self._cache(prepared),
            vocab_size=self.tokenizer.vocab_size,
        )
        hidden = True if disable_tqdm else None
        for result in tqdm(results, total=len(order), desc="generation", disable=hidden):
            if result.error is not None:
                raise FloatingPointError(result.error)
            index = order[result.index]
            text, until = self.tokenizer.decode(result.tokens), settings[index]["until"]
            answers[index] = postprocess_generated_text(text, until, None)
            self.cache_hook.add_partial("generate_until", requests[index].args, answers[index])
        return answers

    def _settings(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Returns `until`, `max_gen_toks`, `temperature`, `top_p` and `seed` of a request."""
        given = dict(normalize_gen_kwargs(asked))
        temperature = given.get("temperature", 0.0) if given["do_sample"] else 0.0
        for name in sorted(given.keys() - _SETTINGS):
            if given[name] != _NEUTRAL.get(name) and (temperature or name not in _OF_DRAWS):
                raise NotImplementedError(
                    f"generation_kwargs: expected {', '.join(sorted(_SETTINGS))}; "
                    f"got {name}={given[name]!r:.60}"
                )
        # From torch's generator, which lm-eval seeds.
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu").item()
        top_p = given.get("top_p", 1.0)
        return {**given, "temperature": temperature, "top_p": top_p, "seed": seed}

    def _cache(self, requests: Sequence[Request]) -> PagedKVCache:
        config, dtype = self.model.cache_config, self.model.lm_head.weight.dtype
        pages = fitting_pages(
            config,
            [len(request.prompt) + request.max_new_tokens for request in requests],
            max_batch=self.batch_size,
            page_size=_PAGE_SIZE,
            dtype=dtype,
            device=self._device,
        )
        return PagedKVCache(
            config,
            num_pages=max(pages, 1),
            page_size=_PAGE_SIZE,
            max_batch=min(self.batch_size, max(len(requests), 1)),
            dtype=dtype,
            device=self._device,
        )

    def _say_what_was_cut(self, num_cut: int, num_requests: int) -> None:
        if num_cut:
            _log.warning(
                "%d of %d requests are longer than the %d tokens of max_length and were truncated "
                "on the left",
                num_cut,
                num_requests,
                self.max_length,
            )


def _size(name: str, value: int | str) -> int:
    """Returns an int of at least 1; accepts a string from a command line."""
    if not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"{name}: expected an int of at least 1; got {value!r}")
    return int(value)
