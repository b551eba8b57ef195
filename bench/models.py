"""End to end: prefill, one decode step and one training step with Llama 2 shapes, random weights.

Times include the host: calls run back to back, without a flush (the weights exceed any cache).
"decode_step_graph" is the same step replayed from a CUDA graph. The gate compares logits, or a
gradient, with the same model in float32.
"""

from collections.abc import Callable

import torch
from ceilings import version
from floors import Floor
from gate import GateError
from grid import DTYPE
from model_grid import ModelWorkload
from runner import Prepared, check_first_call
from timing import Device
from torch import Tensor, nn

from gqa_kernels import get_backend
from gqa_kernels.accuracy import Measured, compare
from llama2 import KVCache, Llama2
from llama2.tradeoff.measured import random_model

SPARE_TOKENS = 16
Step = Callable[[], Tensor]


class ModelContest:
    """The backends of one model with the same weights, tokens and cache."""

    dtype = str(DTYPE).removeprefix("torch.")

    def __init__(self, work: ModelWorkload, device: torch.device, clock_device: Device) -> None:
        self.work, self.device, self.clock_device = work, device, clock_device
        self.op, self.pass_, self.shape, self.model = work.op, work.pass_, work.shape, work.model
        self.cost = work.cost
        self.sizes = {"batch": work.batch, "tokens": work.tokens}
        self._eager: Llama2 | None = None
        self._expected: tuple[Tensor, Tensor] | None = None

    def method(self, bound: Floor) -> str:
        return "end to end"

    def missing(self, backend: str) -> str | None:
        if backend == "hf" and version("transformers") is None:
            return "transformers not installed"
        return None

    def version(self, backend: str) -> str | None:
        names = {"hf": "transformers", "eager": "torch"}
        return version(names.get(backend, "gqa-kernels"))

    def note(self, backend: str) -> str | None:
        return None

    def rate(self, seconds: float) -> dict[str, float]:
        tokens = 1 if self.work.decodes else self.work.tokens
        return {"tokens_per_s": self.work.batch * tokens / seconds}

    def close(self) -> None:
        self._eager = self._expected = None

    def prepare(self, backend: str, method: str) -> Prepared:
        step = self._step(self._model(backend), DTYPE, self.work.batch)
        prepared = check_first_call(backend, step, self._check, self.device)
        if self.op == "decode_step_graph":
            prepared.call = self.clock_device.capture(step)
        return prepared

    def _weights(self) -> Llama2:
        """The model with the weights; the models of other backends share its parameters."""
        if self._eager is None:
            torch.manual_seed(0)
            model = random_model(self.work.config, get_backend("eager"), self.device, DTYPE)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(self.op == "train_step" and "norm" not in name)
            # The gate checks this gradient, which depends on the backward pass of the whole
            # network.
            model.layers[0].input_layernorm.weight.requires_grad_(self.op == "train_step")
            self._eager = model
        return self._eager

    def _model(self, name: str) -> nn.Module:
        eager = self._weights()
        if name == "eager":
            return eager
        if name == "hf":
            return self._hugging_face(eager)
        with torch.device("meta"):
            model = Llama2(self.work.config, get_backend(name))
        model.load_state_dict(eager.state_dict(keep_vars=True), assign=True)
        model.rope = eager.rope
        return model

    def _hugging_face(self, eager: Llama2) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        ours = self.work.config
        config = LlamaConfig(
            vocab_size=ours.vocab_size,
            hidden_size=ours.hidden_size,
            intermediate_size=ours.intermediate_size,
            num_hidden_layers=ours.num_layers,
            num_attention_heads=ours.num_q_heads,
            num_key_value_heads=ours.num_kv_heads,
            head_dim=ours.head_dim,
            max_position_embeddings=ours.max_seq_len,
            rms_norm_eps=ours.norm_eps,
            attn_implementation="sdpa",
        )
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        state = eager.state_dict(keep_vars=True)
        renamed = {n if n.startswith("lm_head") else f"model.{n}": x for n, x in state.items()}
        model.load_state_dict(renamed, assign=True)
        # Its inverse frequencies are a buffer that is not in the state dict.
        with torch.device(self.device):
            model.model.rotary_emb = type(model.model.rotary_emb)(config)
        return model

    # --- one step of a model, as a call ------------------------------------------------------

    def _step(self, model: nn.Module, dtype: torch.dtype, batch: int) -> Step:
        if self.work.decodes:
            return self._decode(model, dtype, batch)
        make = self._prefill if self.op == "prefill" else self._train
        return make(model, dtype, batch)

    def _tokens(self, count: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(2)
        shape = (self.work.batch, count)
        vocab_size = self.work.config.vocab_size
        return torch.randint(vocab_size, shape, generator=generator, device=self.device)

    def _cache(self, dtype: torch.dtype, batch: int, fill: int) -> KVCache:
        """A cache whose first `fill` entries have the same random values in every dtype."""
        capacity = min(self.work.tokens + SPARE_TOKENS, self.work.config.max_seq_len)
        cache = KVCache(self.work.config, batch, capacity, dtype=dtype, device=self.device)
        for layer in range(self.work.config.num_layers if fill else 0):
            for index, part in enumerate((cache.keys, cache.values)):
                for row in range(batch):
                    seed = (layer * 2 + index) * self.work.batch + row
                    generator = torch.Generator(self.device).manual_seed(seed)
                    drawn = torch.randn(part.shape[2:], generator=generator, device=self.device)
                    part[layer, row] = drawn.to(DTYPE)
        return cache

    def _prefill(self, model: nn.Module, dtype: torch.dtype, batch: int) -> Step:
        tokens = self._tokens(self.work.tokens)[:batch]
        if not isinstance(model, Llama2):
            return lambda: model(tokens, use_cache=True, logits_to_keep=1).logits[:, -1]
        cache = self._cache(dtype, batch, 0)

        def step() -> Tensor:
            cache.num_written = 0
            cache.seq_lens.zero_()
            return model.lm_head(model.hidden_states(tokens, cache)[:, -1])

        return step

    def _decode(self, model: nn.Module, dtype: torch.dtype, batch: int) -> Step:
        context = self.work.tokens
        tokens, cache = self._tokens(1)[:batch], self._cache(dtype, batch, context)

        def step() -> Tensor:
            cache.num_written = context
            cache.seq_lens.fill_(context)
            return model.lm_head(model.hidden_states(tokens, cache)[:, -1])

        return step

    def _train(self, model: nn.Module, dtype: torch.dtype, batch: int) -> Step:
        tokens = self._tokens(self.work.tokens + 1)[:batch]
        ours = isinstance(model, Llama2)
        watched = (model if ours else model.model).layers[0].input_layernorm.weight
        parameters = [p for p in model.parameters() if p.requires_grad]
        position = next(i for i, p in enumerate(parameters) if p is watched)

        def step() -> Tensor:
            with torch.enable_grad():
                if ours:
                    loss = model.loss(tokens)
                else:  # it shifts the labels itself, while ours takes no last token
                    logits = model(tokens[:, :-1], use_cache=False).logits
                    loss = nn.functional.cross_entropy(
                        logits.flatten(0, 1).float(), tokens[:, 1:].flatten()
                    )
                return torch.autograd.grad(loss, parameters)[position]

        return step

    # --- the gate ----------------------------------------------------------------------------

    def _check(self, actual: Tensor) -> list[Measured]:
        eager, oracle = self._truth()
        # Sequences are independent, so one is enough and saves a large float32 cache.
        measured = compare(self.op, actual[: len(oracle)], eager, oracle)
        if not measured.ok:
            raise GateError(str(measured))
        return [measured]

    def _truth(self) -> tuple[Tensor, Tensor]:
        """(eager in bfloat16, the same model in float32) for the first sequence."""
        if self._expected is None:
            batch = self.work.batch if self.op == "train_step" else 1
            model = self._weights()
            eager = self._step(model, DTYPE, batch)().detach()
            with torch.device("meta"):
                wide = Llama2(self.work.config, get_backend("eager"))
            wide.load_state_dict(
                {name: x.float() for name, x in model.state_dict().items()}, assign=True
            )
            wide.rope = model.rope
            for mine, theirs in zip(wide.parameters(), model.parameters(), strict=True):
                mine.requires_grad_(theirs.requires_grad)
            oracle = self._step(wide, torch.float32, batch)().detach().double()
            self._expected = eager, oracle
        return self._expected
