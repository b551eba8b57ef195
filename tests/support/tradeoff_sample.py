"""An invented result of a trade-off study for tests: nothing was trained, numbers are random."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from llama2.config import ModelConfig
from llama2.train.pretrain import TrainConfig

BASE = ModelConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=352,
    num_layers=4,
    num_q_heads=8,
    num_kv_heads=8,
    head_dim=16,
    max_seq_len=256,
)
_FILES = [{"path": f"synthetic/file_{i:02}.py", "bytes": 1000 + 731 * i} for i in range(12)]
_WORSE_AT_CONVERSION = {"low_rank": 1.2, "aligned": 1.5, "mean": 3.0, "first": 2.5, "random": 3.6}


def synthetic_result(
    *,
    seeds: Sequence[int] = (0, 1, 2),
    kv_heads: Sequence[int] = (4, 2, 1),
    matchings: Sequence[str] = ("same_ffn", "exact", "paper"),
    methods: Sequence[str] = ("low_rank", "aligned", "mean", "first", "random"),
    alphas: Sequence[float] = (0.0, 0.01, 0.05, 0.1),
    controls: bool = True,
) -> dict[str, Any]:
    """A result file of a study as a dict; any of its parts may be left out."""
    num_bytes = np.array([file["bytes"] for file in _FILES])
    random = np.random.default_rng(20)
    steps = 1000

    def run(seed: int, origin: str, kv: int, level: float, **fields: Any) -> dict[str, Any]:
        per_file = level + 0.02 * random.standard_normal(len(_FILES))
        bits = per_file * num_bytes
        lost = 1 - kv / BASE.num_q_heads
        return {
            "seed": seed,
            "origin": origin,
            "num_kv_heads": kv,
            "matching": "same_ffn",
            "method": None,
            "alpha": None,
            "intermediate_size": 352,
            "parameters": 900_000 - int(100_000 * lost),
            "flops_per_token": 2_000_000 - int(200_000 * lost),
            "steps": steps,
            "tokens": steps * 2048,
            "final_train_loss": 1.3,
            "bits_per_byte": float(bits.sum() / num_bytes.sum()),
            "bits": bits.tolist(),
            "recall": {
                "lookup": float(np.clip(0.95 - 0.4 * lost**4 - (level - 1.9) / 4, 0, 1)),
                "copy": float(np.clip(0.99 - (level - 1.9) / 5, 0, 1)),
            },
            "seconds": 60.0,
        } | fields

    runs = []
    for seed in seeds:
        level = 1.95 + 0.008 * random.standard_normal()
        runs.append(run(seed, "scratch", BASE.num_q_heads, level))
        for alpha in alphas if controls else ():
            fields = {"alpha": alpha, "steps": round(alpha * steps)}
            runs.append(run(seed, "control", BASE.num_q_heads, level - 0.2 * alpha, **fields))
        for kv in kv_heads:
            lost = 1 - kv / BASE.num_q_heads
            for matching in matchings:
                width = {"same_ffn": 352, "exact": 416, "paper": 464}[matching]
                gain = {"same_ffn": 0.0, "exact": 0.02, "paper": 0.035}[matching]
                fields = {"matching": matching, "intermediate_size": width}
                runs.append(run(seed, "scratch", kv, level + (0.05 - gain) * lost, **fields))
            for method in methods:
                for alpha in alphas:
                    worse = _WORSE_AT_CONVERSION[method] * lost * np.exp(-40 * alpha) + 0.05 * lost
                    fields = {"method": method, "alpha": alpha, "steps": round(alpha * steps)}
                    runs.append(run(seed, "converted", kv, level + worse, **fields))
    return {
        "kind": "study",
        "preset": "synthetic",
        "command": "synthetic numbers for a test: nothing was trained",
        "date": "2000-01-01",
        "seconds": 60.0 * len(runs),
        "environment": {
            "python": "3.0.0",
            "torch": "0.0.0",
            "device": "none",
            "processes": 1,
            "commit": None,
        },
        "corpus": {
            "name": "synthetic text",
            "train": {"documents": 10, "bytes": 10**6, "tokens": 4 * 10**5, "sha256": "0" * 64},
            "held_out": {
                "bytes": int(num_bytes.sum()),
                "tokens": 2 * 10**4,
                "sha256": "1" * 64,
                "files": [dict(file) for file in _FILES],
            },
        },
        "base": asdict(BASE),
        "train_config": asdict(TrainConfig(steps=steps, batch_size=8, seq_len=256)),
        "uptrain_peak_lr": 5e-4,
        "epochs": 1.3,
        "alphas": list(alphas),
        "seeds": list(seeds),
        "runs": runs,
        "recall_chance": {"lookup": 0.03, "copy": 0.03},
    }
