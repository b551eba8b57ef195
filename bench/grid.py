"""The shapes that are timed: Llama 2's layers, swept over tokens, sequence lengths and contexts.

A workload is one (op, pass, shape). Tiers: "smoke" is a handful of shapes to try the setup, "core"
the shapes for which results are quoted, "full" all sweeps. Each tier contains the previous ones.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
from adapters import STEPS

from gqa_kernels.spec import IN_PLACE_OPS, OPS, Case, Cost, OpSpec
from gqa_kernels.spec.cache import decode_inputs
from gqa_kernels.spec.prefill import prefill_inputs

TIERS = ("smoke", "core", "full")
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Model:
    """The widths of one model's layers; `heads` is (query, key/value)."""

    name: str
    hidden_size: int
    intermediate_size: int
    heads: tuple[int, int]


MODELS = (
    Model("7B", 4096, 11008, (32, 32)),
    Model("13B", 5120, 13824, (40, 40)),
    Model("34B", 8192, 22016, (64, 8)),
    Model("70B", 8192, 28672, (64, 8)),
)
_7B, _13B, _34B, _70B = MODELS


@dataclass(frozen=True)
class Workload:
    spec: OpSpec
    pass_: str  # "fwd", "bwd" or "step", which is both in one call
    shape: str  # as in test ids: "7B-T8192"
    case: Case
    tier: str

    @property
    def op(self) -> str:
        return self.spec.name

    @property
    def group(self) -> str:
        return f"{self.op}|{self.pass_}|{self.shape}"

    @property
    def cost(self) -> Cost:
        forward = self.spec.cost(self.case, DTYPE)
        if self.pass_ == "fwd":
            return forward
        backward = self.spec.backward_cost(self.case, DTYPE)
        if self.pass_ == "bwd":
            return backward
        return Cost(
            forward.read_bytes,  # once
            forward.write_bytes + backward.write_bytes,
            forward.flops + backward.flops,
        )

    @property
    def input_bytes(self) -> int:
        return self.spec.cost(self.case, DTYPE).read_bytes


_OPS = {spec.name: spec for spec in (*OPS, *IN_PLACE_OPS)}
# Entries beyond a length are finite here, because some peers multiply them by a weight of zero.
_DECODE = dataclasses.replace(
    _OPS["decode_attention"], make_inputs=functools.partial(decode_inputs, spoil=False)
)
_PREFILL = dataclasses.replace(
    _OPS["prefill_attention"], make_inputs=functools.partial(prefill_inputs, spoil=False)
)


# --- The grid --------------------------------------------------------------------------------


def _row_ops() -> list[Workload]:
    found = []

    def add(op: str, model: Model, tokens: int, tier: str, width: int | None = None) -> None:
        if op == "apply_rope":
            sizes = {
                "batch": 1,
                "seq_len": tokens,
                "num_q_heads": model.heads[0],
                "num_kv_heads": model.heads[1],
                "head_dim": 128,
                "interleaved": False,
                "positions": False,
            }
        elif op == "swiglu":
            sizes = {"num_tokens": tokens, "intermediate_size": width or model.intermediate_size}
        else:
            sizes = {"num_tokens": tokens, "hidden_size": width or model.hidden_size}
        name = model.name if width is None else f"W{width}"
        shape, case = f"{name}-T{tokens}", Case(sizes, name)
        for pass_ in ("fwd", "bwd"):
            if pass_ == "fwd" or tokens >= 1024:  # training uses more tokens
                found.append(Workload(_OPS[op], pass_, shape, case, tier))

    for op in ("rms_norm", "add_rms_norm", "swiglu", "apply_rope"):
        # 34B and 70B share their hidden size and their heads.
        models = MODELS if op == "swiglu" else (_7B, _13B, _70B)
        add(op, _7B, 8192, "smoke")
        for model in models[1:]:
            add(op, model, 8192, "core")
        for tokens in (1, 128):
            add(op, _7B, tokens, "core")
            add(op, _70B, tokens, "core")
        for tokens in (16, 1024, 4096, 8191, 16384):
            add(op, _70B, tokens, "full")
        if op != "apply_rope":
            for width in (1024, 2048, 16384):
                add(op, _7B, 4096, "full", width)
    return found


def _attention() -> list[Workload]:
    found = []

    def add(
        name: str,
        heads: tuple[int, int],
        seq_lens: tuple[int, int],
        tier: str,
        *,
        causal: bool = True,
        batch: int | None = None,
        head_dim: int = 128,
        backward: bool = True,
    ) -> None:
        seq_len_q, seq_len_kv = seq_lens
        batch = max(1, 16384 // seq_len_q) if batch is None else batch
        sizes = {
            "batch": batch,
            "seq_len_q": seq_len_q,
            "seq_len_kv": seq_len_kv,
            "num_q_heads": heads[0],
            "num_kv_heads": heads[1],
            "head_dim": head_dim,
            "causal": causal,
        }
        length = f"S{seq_len_q}" + (f"x{seq_len_kv}" if seq_len_q != seq_len_kv else "")
        mask = "causal" if causal else "full"
        shape, case = f"{name}-B{batch}-{length}-{mask}", Case(sizes, name)
        for pass_ in ("fwd", "bwd") if backward else ("fwd",):
            found.append(Workload(_OPS["flash_attention"], pass_, shape, case, tier))

    core = {"7B": (1024, 4096, 16384), "70B": (512, 2048, 8192, 16384)}
    for model in (_70B, _7B, _13B):
        for seq_len in (512, 1024, 2048, 4096, 8192, 16384):
            tier = "core" if seq_len in core.get(model.name, ()) else "full"
            if (model.name, seq_len) == ("70B", 4096):
                tier = "smoke"
            add(model.name, model.heads, (seq_len, seq_len), tier)
            tier = "core" if (model.name, seq_len) in (("70B", 4096), ("7B", 4096)) else "full"
            add(model.name, model.heads, (seq_len, seq_len), tier, causal=False, backward=False)
    for seq_len in (2048, 4096, 8192, 32768):
        add("70B", _70B.heads, (seq_len, seq_len), "full", batch=1, backward=False)
    for seq_len in (4095, 8191):
        add("7B", _7B.heads, (seq_len, seq_len), "full", batch=2, backward=False)
    add("7B", _7B.heads, (512, 8192), "core", batch=4, backward=False)  # a chunk of a prefill
    add("D64", (32, 32), (4096, 4096), "full", head_dim=64)
    return found


def _packed() -> list[Workload]:
    """Documents packed to 16384 tokens, a fifth of them empty, with the lengths of
    `spec.attention.packed_lengths`."""
    found = []
    for model in (_70B, _7B):
        for num_sequences in (8, 64):
            sizes = {
                "total": 16384,
                "num_sequences": num_sequences,
                "num_q_heads": model.heads[0],
                "num_kv_heads": model.heads[1],
                "head_dim": 128,
                "causal": True,
            }
            tier = "core" if model is _70B else "full"
            shape = f"{model.name}-N{num_sequences}-T16384-causal"
            for pass_ in ("fwd", "bwd"):
                spec = _OPS["flash_attention_varlen"]
                found.append(Workload(spec, pass_, shape, Case(sizes, model.name), tier))
    return found


def _decode() -> list[Workload]:
    found = []
    heads = {"7B": (32, 32), "13B": (40, 40), "70B": (64, 8), "MQA": (64, 1)}
    points = (
        (1, 1024), (1, 4096), (1, 32768), (1, 131072), (16, 4096), (32, 4096), (64, 4096),
        (64, 8192), (128, 2048), (256, 1024),
    )  # fmt: skip

    def add(
        name: str,
        batch: int,
        context: int,
        tier: str,
        what: str = "",
        *,
        ragged: bool = False,
        **cache: Any,
    ) -> None:
        sizes = {
            "batch": batch,
            "seq_len_q": 1,
            "max_seq_len": context,
            "num_q_heads": heads[name][0],
            "num_kv_heads": heads[name][1],
            "head_dim": 128,
            "ragged": ragged,
            **cache,
        }
        shape = f"{name}-B{batch}-L{context}{what}"
        found.append(Workload(_DECODE, "fwd", shape, Case(sizes, name), tier))

    for name in ("70B", "7B", "13B", "MQA"):
        for batch, context in points:
            tier = "full" if name in ("13B", "MQA") or batch > 64 else "core"
            tier = "smoke" if (name, batch, context) == ("70B", 16, 4096) else tier
            add(name, batch, context, tier)
    float8 = {"cache_dtype": torch.float8_e4m3fn}
    for name in ("70B", "7B"):
        tier = "core" if name == "70B" else "full"
        add(name, 64, 4096, tier, "-ragged", ragged=True)
        for page_size in (16, 64, 128):
            what = f"-page{page_size}"
            add(name, 64, 4096, tier if page_size == 16 else "full", what, page_size=page_size)
        add(name, 64, 4096, "full", "-ragged-page16", ragged=True, page_size=16)
        add(name, 64, 4096, tier, "-fp8", scale_per_head=True, **float8)
        add(name, 64, 4096, "full", "-fp8-tokens-page16", page_size=16, **float8)
    for page_size in (16, 64):
        add("70B", 1, 32768, "full", f"-page{page_size}", page_size=page_size)
    return found


def _prefill() -> list[Workload]:
    """A chunk of 2048 tokens: the fourth of a prompt, and one batched with 63 decode steps. A chunk
    of 512 tokens with 7 decode steps, and questions of few tokens, over long caches."""
    found = []
    for name, heads in (("70B", (64, 8)), ("7B", (32, 32))):
        for what, total, batch, cached, cache in (
            ("chunk", 2048, 1, 6144, {}),
            ("chunk-page16", 2048, 1, 6144, {"page_size": 16}),
            ("mixed-page16", 2048, 64, 4096, {"page_size": 16, "mixed": True}),
            ("mixed-page16", 519, 8, 32768, {"page_size": 16, "mixed": True}),
            ("question-page16", 30, 1, 32768, {"page_size": 16}),
            ("drafts-page16", 8, 1, 32768, {"page_size": 16}),
        ):
            sizes = {
                "total": total,
                "num_sequences": batch,
                "cached": cached,
                "num_q_heads": heads[0],
                "num_kv_heads": heads[1],
                "head_dim": 128,
                "causal": True,
                **cache,
            }
            tier = "core" if name == "70B" else "full"
            shape = f"{name}-B{batch}-T{total}-L{cached}-{what}"
            found.append(Workload(_PREFILL, "fwd", shape, Case(sizes, name), tier))
    return found


def _append() -> list[Workload]:
    """Appends of the tokens of a decode step and of a prompt to pages of 16."""
    float8 = {"cache_dtype": torch.float8_e4m3fn}
    found = []
    for name, heads in (("70B", (64, 8)), ("7B", (32, 32))):
        for batch, seq_len, what, cache in (
            (1, 1, "", {}),
            (64, 1, "", {}),
            (256, 1, "", {}),
            (1, 4096, "", {}),
            (64, 1, "-fp8-tokens", float8),
            (64, 1, "-fp8", float8 | {"scale_per_head": True}),
            (64, 1, "-int8-tokens", {"cache_dtype": torch.int8}),
        ):
            sizes = {
                "batch": batch,
                "seq_len": seq_len,
                "num_q_heads": heads[0],
                "num_kv_heads": heads[1],
                "head_dim": 128,
                "page_size": 16,
                "interleaved": False,
                **cache,
            }
            tier = "core" if name == "70B" and batch * seq_len in (1, 64) else "full"
            shape = f"{name}-B{batch}-T{seq_len}{what}"
            found.append(Workload(_OPS["rope_append_kv"], "fwd", shape, Case(sizes, name), tier))
    return found


def _losses() -> list[Workload]:
    """Losses of 8192 tokens; in "half", every second token is ignored, like those of prompts."""
    loss = {"reduction": "mean", "softcap": None, "z_loss": 0.0}
    found = []
    for name, vocab_size in (("7B", 32000), ("Llama3-8B", 128256)):
        shape = f"{name}-T8192"
        sizes = {"num_tokens": 8192, "hidden_size": 4096, "vocab_size": vocab_size}
        for what, ignored_every, tier in (
            ("", None, "core"),
            ("-half", 2, "full" if name == "7B" else "core"),
        ):
            spec = _OPS["linear_cross_entropy"]
            case = Case(sizes | loss | {"ignored_every": ignored_every}, name)
            found += [Workload(spec, p, shape + what, case, tier) for p in _passes(spec)]
        case = Case(sizes | {"temperature": 1.0, "return_entropy": False}, name)
        found.append(Workload(_OPS["token_log_probs"], "fwd", shape, case, "core"))
    return found


def _others(swept: set[str]) -> list[Workload]:
    """Ops without a sweep, at the op table's shapes of real models."""
    return [
        Workload(spec, pass_, f"{case.source}: {case}", case, "core")
        for name, spec in _OPS.items()
        for case in spec.cases
        for pass_ in _passes(spec)
        if name not in swept and not case.test
    ]


def _passes(spec: OpSpec) -> tuple[str, ...]:
    if not spec.wrt:
        return ("fwd",)
    return ("fwd", "step" if spec.name in STEPS else "bwd")


def _grid() -> tuple[Workload, ...]:
    found = _row_ops() + _attention() + _packed() + _decode() + _prefill() + _append() + _losses()
    found += _others({work.op for work in found})
    return tuple(sorted(found, key=lambda work: TIERS.index(work.tier)))


GRID = _grid()


def select(tier: str, ops: tuple[str, ...]) -> tuple[Workload, ...]:
    """The workloads of these ops up to a tier, the most important first."""
    wanted = TIERS[: TIERS.index(tier) + 1]
    return tuple(work for work in GRID if work.tier in wanted and work.op in ops)


# Sizes that peers support too.
_TINY_SIZES = {"flash_attention": {"seq_len_q": 9}, "decode_attention": {"ragged": False}}
# A workload of each op that the interpreter runs quickly, for the dry run.
TINY = tuple(
    Workload(spec, pass_, "tiny", Case(spec.tiny | _TINY_SIZES.get(name, {}), "dry run"), "smoke")
    for name, spec in (_OPS | {"decode_attention": _DECODE, "prefill_attention": _PREFILL}).items()
    for pass_ in _passes(spec)
)
