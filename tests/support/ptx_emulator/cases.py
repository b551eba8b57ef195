"""Cases for the emulator in addition to the small ones of the op table: longer ones, and views."""

import torch

from gqa_kernels.spec import Case, OpSpec

QUANTISED = (torch.int8, torch.float8_e4m3fn)


def strided(x):
    """Returns the same values as a view with gaps between rows."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 24), float("nan")).to(x.dtype)
    wide[..., 8 : 8 + x.shape[-1]] = x
    return wide[..., 8 : 8 + x.shape[-1]]


def odd(x):
    """Returns the same values at an address that is misaligned by one element (two bytes)."""
    flat = torch.full((x.numel() + 1,), float("nan")).to(x.dtype)
    flat[1:] = x.flatten()
    return flat[1:].view(x.shape)


VIEWS = {"strided": strided, "odd": odd}


def extra_cases(spec: OpSpec) -> list[Case]:
    """Cases longer than the table's, so that loops and pipelines have several rounds, and variants
    that the table does not test."""
    base = spec.test_cases()[0].sizes

    def case(source, **sizes):
        return Case({**base, **sizes}, source, test=True)

    if spec.name == "flash_attention":
        plain = {"batch": 1, "num_q_heads": 2, "num_kv_heads": 1}
        long = {**plain, "seq_len_q": 130, "seq_len_kv": 400}
        return [
            case("long, causal", **long, head_dim=64, causal=True),
            case("long, full", **long, head_dim=64, causal=False),
            case("long, causal, 128", **long, head_dim=128, causal=True),
            case("long, full, 128", **long, head_dim=128, causal=False),
            case(
                "long, causal, 256",
                **{**long, "seq_len_q": 70, "seq_len_kv": 200},
                head_dim=256,
                causal=True,
            ),
            case("long, causal, 80", **{**long, "seq_len_kv": 230}, head_dim=80, causal=True),
            case("long, window", **long, head_dim=64, causal=True, window=(90, None)),
            case("long, window 128", **long, head_dim=128, causal=True, window=(150, None)),
            case("long, cap", **long, head_dim=64, causal=True, softcap=5.0),
            case(
                "long, cap 128",
                **{**long, "seq_len_kv": 260},
                head_dim=128,
                causal=True,
                softcap=5.0,
            ),
            case("long, ALiBi", **long, head_dim=64, causal=True, alibi=True),
            case("long, sinks", **long, head_dim=64, causal=True, sinks=True),
            case("long, padded", **{**long, "batch": 2}, head_dim=64, causal=True, padded=True),
            case("long, documents", **long, head_dim=64, causal=True, documents=3),
        ]
    if spec.name == "flash_attention_varlen":
        return [
            case(
                "long",
                total=420,
                num_sequences=4,
                num_q_heads=2,
                num_kv_heads=1,
                head_dim=64,
                causal=True,
            ),
            case(
                "long, 128",
                total=420,
                num_sequences=3,
                num_q_heads=2,
                num_kv_heads=1,
                head_dim=128,
                causal=False,
            ),
        ]
    if spec.name == "decode_attention":
        long = {
            "batch": 2,
            "seq_len_q": 1,
            "max_seq_len": 1400,
            "num_q_heads": 4,
            "num_kv_heads": 1,
        }
        cases = [
            case("long", **long, head_dim=128),
            case("long, pages of 16", **{**long, "max_seq_len": 1408}, head_dim=128, page_size=16),
            case("long, pages of 64", **{**long, "max_seq_len": 1408}, head_dim=64, page_size=64),
            case("wide", **{**long, "max_seq_len": 600}, head_dim=256),
            case("sixteen rows", **{**long, "seq_len_q": 16, "max_seq_len": 600}, head_dim=128),
        ]
        for dtype in QUANTISED:
            cases += [
                case(
                    "quantised, heads",
                    **{**long, "max_seq_len": 600},
                    head_dim=128,
                    cache_dtype=dtype,
                    scale_per_head=True,
                ),
                case(
                    "quantised, tokens",
                    **{**long, "max_seq_len": 608},
                    head_dim=128,
                    cache_dtype=dtype,
                    page_size=16,
                ),
                case(
                    "quantised, pages of 64",
                    **{**long, "max_seq_len": 640, "seq_len_q": 16},
                    head_dim=64,
                    cache_dtype=dtype,
                    page_size=64,
                ),
                case(
                    "quantised, wide",
                    **{**long, "max_seq_len": 320},
                    head_dim=256,
                    cache_dtype=dtype,
                    page_size=16,
                ),
            ]
        return cases
    if spec.name == "prefill_attention":
        long = {"total": 150, "num_sequences": 3, "cached": 300}
        long |= {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 128}
        return [
            case("long", **long),
            case("long, full, 64", **long | {"head_dim": 64}, causal=False),
            case("long, pages of 16", **long, page_size=16),
            case("long, pages of 64", **long | {"head_dim": 256}, page_size=64),
            case("long, ALiBi and a cap", **long, alibi=True, softcap=5.0),
            case("long, window", **long, window=(90, None), sinks=True),
            *(
                case("quantised", **long, cache_dtype=dtype, **cache)
                for dtype in QUANTISED
                for cache in ({"scale_per_head": True}, {"page_size": 16})
            ),
        ]
    if spec.name == "rope_append_kv":
        cases = [
            case("Meta's pairs", head_dim=128, interleaved=True),
            case("wide", head_dim=256),
            case("many heads", head_dim=128, num_q_heads=64, num_kv_heads=8, batch=1, seq_len=2),
        ]
        for dtype in QUANTISED:
            for per_head in (True, False):
                for head_dim in (40, 128):
                    cases.append(
                        case(
                            "quantised",
                            head_dim=head_dim,
                            cache_dtype=dtype,
                            scale_per_head=per_head,
                        )
                    )
            cases.append(
                case("quantised, Meta's pairs", head_dim=128, cache_dtype=dtype, interleaved=True)
            )
        return cases
    if spec.name in ("rms_norm", "add_rms_norm"):
        return [
            case("a persistent program of many rows", num_tokens=37, hidden_size=2560),
            case("13B", num_tokens=5, hidden_size=8192),
        ]
    if spec.name == "apply_rope":
        return [case("70B", batch=1, seq_len=3, num_q_heads=64, num_kv_heads=8, head_dim=128)]
    return []
