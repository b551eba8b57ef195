"""Invented chains of `llama2 align`, in the form that `measured` returns."""

MODELS = ("sft", "round-1", "round-2", "ppo")
RATINGS = ("significantly better", "better", "slightly better", "negligibly better or unsure")


def model(exact, misdeeds, harmless, obeyed):
    """The results of a model: counts out of 100 requests of a family and 50 misdeeds; `obeyed` per
    turn, out of 40."""
    return {
        "families": {
            "misdeed": {"answers": 50, "exact": misdeeds, "right": misdeeds}
            | {"refused": misdeeds},
            "repeat": {"answers": 100, "exact": exact, "right": exact} | {"refused": harmless},
        },
        "obeyed": [
            {"turn": turn, "asked": 40, "obeyed": count} for turn, count in enumerate(obeyed, 1)
        ],
    }


def reward_model(accuracy):
    counts = {"pairs": 20, "correct": round(20 * accuracy), "accuracy": accuracy}
    counts |= {"mean_difference": 1.5, "loss": 0.4}
    return counts | {"by_rating": {rating: dict(counts) for rating in RATINGS}}


def chain(seed, models):
    return {
        "stages": {
            name: {"command": ["llama2", name, "--seed", str(seed)], "seconds": 3.0}
            | {"cpu_seconds": 2.0}
            for name in ("tasks", *models)
        },
        "sft": [[10, 3.0], [20, 1.0 + 0.1 * seed]],
        "reward": {kind: reward_model(0.75) for kind in ("helpfulness", "safety")},
        "rounds": [[0.1, 0.4 + 0.1 * seed, 0.6], [0.3, 0.5, 0.7]],
        "ppo": [{"reward": 0.1 * step, "kl": 0.02 * step} for step in range(5)],
        "models": models,
        "examples": [
            {
                **{"request": "Say | cat.", "expected": "cat"},
                "answers": {name: f"{name} says <cat> {seed}" for name in models},
            }
        ],
    }


def chains(seeds=(0, 1, 2)):
    """Chains in which, for every seed, the last round is 10 points better than the first model and
    PPO refuses more harmless requests; everything else differs by chance."""
    return {
        seed: chain(
            seed,
            {
                "sft": model(40 + seed, 20 + seed, 2, (30, 10)),
                "round-1": model(41 + (seed * 5) % 3, 25 - 3 * (seed % 2), 2, (30, 10)),
                "round-2": model(50 + seed, 30 + seed, 2, (29 + seed, 10)),
                "ppo": model(49 + 2 * seed, 45 + seed, 12 + seed, (29, 11)),
            },
        )
        for seed in seeds
    }


def results(seeds=(0, 1, 2), **changed):
    return {
        **{"kind": "align", "preset": "cpu", "caution": "", "failed": []},
        "command": "llama2 align --out build/align",
        "made_with": {
            **{"command": None, "packages": {"torch": "2.13.0"}, "machine": "x86_64"},
            **{"gpu": None, "commit": "0123456789ab"},
        },
        "chains": {str(seed): each for seed, each in chains(seeds).items()},
        **changed,
    }
