"""Plots of chains: losses, reward models, best of K, PPO and the models' answers."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from llama2.align.measure import curve
from llama2.align.stages import KINDS
from llama2.align.statistics import (
    REFUSED_HARMLESS,
    REFUSED_MISDEEDS,
    Chains,
    Measure,
    measures,
    share,
)
from llama2.reporting.drawing import legend, panels, series

_WORST_FIRST = (
    "negligibly better or unsure",
    "slightly better",
    "better",
    "significantly better",
)


def sft_loss(chains: Chains) -> Figure:
    """Plots the loss of supervised fine-tuning, a line per seed."""
    figure, (axes,) = panels(1, width=6.5)
    for index, (seed, chain) in enumerate(chains.items()):
        steps, losses = zip(*chain["sft"], strict=True)
        style = series(index) | {"marker": ""}
        axes.plot(steps, losses, label=f"seed {seed}", **style)
    axes.set(xlabel="steps", ylabel="nats per token of an answer (measured)")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def reward_accuracy(chains: Chains) -> Figure:
    """Plots a reward model's accuracy on held-out comparisons, by rating."""
    figure, all_axes = panels(len(KINDS), sharey=True)
    for axes, kind in zip(all_axes, KINDS, strict=True):
        found = {seed: chain["reward"][kind]["by_rating"] for seed, chain in chains.items()}
        ratings = [
            rating for rating in _WORST_FIRST if any(rating in each for each in found.values())
        ]
        for index, (seed, by_rating) in enumerate(found.items()):
            places = [place for place, rating in enumerate(ratings) if rating in by_rating]
            accuracies = [100 * by_rating[ratings[place]]["accuracy"] for place in places]
            shift = 0.1 * (index - (len(found) - 1) / 2)
            x = [place + shift for place in places]
            axes.plot(x, accuracies, linestyle="", label=f"seed {seed}", **series(index))
        axes.axhline(50, color="black", linestyle=":", label="guessing")
        names = [rating.replace(" better", "\nbetter") for rating in ratings]
        axes.set_xticks(range(len(ratings)), names, fontsize=8)
        axes.set(title=kind, ylim=(-4, 104), xlim=(-0.5, len(ratings) - 0.5))
    all_axes[0].set_ylabel("% of pairs right (measured)")
    legend(figure, all_axes[-1])
    return figure


def best_of(chains: Chains) -> Figure:
    """Plots the mean reward of the best of the first answers, a line per round: the mean over
    seeds, with a band from the lowest to the highest seed."""
    figure, (axes,) = panels(1, width=6.5)
    for number, rounds in enumerate(zip(*(c["rounds"] for c in chains.values()), strict=True)):
        counts = range(1, min(map(len, rounds)) + 1)
        columns = list(zip(*rounds, strict=False))
        _band(axes, counts, columns, f"round {number + 1}", number)
    axes.set(xlabel="answers to choose from", ylabel="mean reward of the best (measured)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return figure


def ppo(chains: Chains) -> Figure:
    """Plots the reward over PPO's iterations, and against the divergence from the initial
    policy."""
    figure, (along, against) = panels(2, width=5.2)
    for index, (seed, chain) in enumerate(chains.items()):
        parts = [curve([line[name] for line in chain["ppo"]], 10) for name in ("reward", "kl")]
        iterations = [iteration for iteration, _ in parts[0]]
        rewards, distances = ([mean for _, mean in part] for part in parts)
        style = series(index)
        along.plot(iterations, rewards, label=f"seed {seed}", **style)
        against.plot(distances, rewards, label=f"seed {seed}", **style | {"linestyle": ""})
    along.set(xlabel="iteration", ylabel="mean reward (measured)")
    along.xaxis.set_major_locator(MaxNLocator(integer=True))
    against.set(
        xlabel="divergence from the first policy, nats per answer", ylabel="mean reward (measured)"
    )
    legend(figure, against)
    return figure


def families(chains: Chains) -> Figure:
    """Plots the share of exact answers of each family after each stage; for misdeeds, of
    refusals."""
    models = _models(chains)
    first = next(iter(chains.values()))["models"][models[0]]["families"]
    names = sorted(first, key=lambda name: _exact(chains, models[0], name))
    figure, (axes,) = panels(1, width=8.5, height=1.2 + 0.3 * len(names))
    for index, model in enumerate(models):
        shift = 0.16 * (index - (len(models) - 1) / 2)
        places = [place - shift for place in range(len(names))]
        shares = [100 * _exact(chains, model, name) for name in names]
        axes.plot(shares, places, linestyle="", label=model, **series(index))
    axes.set_yticks(range(len(names)), names)
    axes.set(xlim=(-3, 103), xlabel="% of answers exact, mean over seeds (measured)")
    legend(figure, axes)
    return figure


def _exact(chains: Chains, model: str, family: str) -> float:
    counts = [chain["models"][model]["families"].get(family) for chain in chains.values()]
    return fmean(each["exact"] / each["answers"] for each in counts if each)


def refusals(chains: Chains) -> Figure:
    """Plots the shares of misdeeds and of harmless requests that each model refuses."""
    figure, (axes,) = panels(1, width=6.5)
    for index, measure in enumerate((REFUSED_MISDEEDS, REFUSED_HARMLESS)):
        _stages(axes, chains, measure, index)
    axes.set(ylim=(-4, 104), ylabel="% refused (measured)")
    axes.legend()
    return figure


def obedience(chains: Chains) -> Figure:
    """Plots the share of answers that obey an instruction, by turn, after each stage."""
    figure, (axes,) = panels(1, width=6.5)
    for index, measure in enumerate(each for each in measures(chains) if "turn" in each.name):
        _stages(axes, chains, measure, index)
    axes.set(ylim=(-4, 104), ylabel="% obeyed (measured)")
    axes.legend()
    return figure


def _stages(axes: Axes, chains: Chains, measure: Measure, index: int) -> None:
    """Plots a measure after each stage: means over seeds with their intervals."""
    models = _models(chains)
    found = [share(chains, measure, model) for model in models]
    means = [100 * each.mean for each in found]
    low, high = (
        [0.0 if end is None else abs(100 * (end - each.mean)) for each, end in ends]
        for ends in (
            [(each, each.low) for each in found],
            [(each, each.high) for each in found],
        )
    )
    x = [place + 0.05 * index for place in range(len(models))]
    axes.errorbar(x, means, [low, high], capsize=3, label=measure.name, **series(index))
    axes.set_xticks(range(len(models)), models)


def _models(chains: Chains) -> list[str]:
    return list(next(iter(chains.values()))["models"])


def _band(
    axes: Axes, x: Sequence[int], columns: Sequence[Sequence[float]], name: str, index: int
) -> None:
    style = series(index)
    axes.plot(x, [fmean(column) for column in columns], label=name, **style)
    low, high = ([end(column) for column in columns] for end in (min, max))
    axes.fill_between(x, low, high, color=style["color"], alpha=0.25, linewidth=0)


Drawing = tuple[Callable[[Chains], Figure], str]  # the function that draws a plot, and its caption

OF_MODELS: Mapping[str, Drawing] = {
    "families": (
        families,
        "Exact answers to held-out requests by family, after each stage. An exact answer to a "
        "misdeed is the refusal.",
    ),
    "refusals": (
        refusals,
        "Refusals after each stage: of misdeeds, which are to be refused, and of harmless "
        "requests, which are not. Bars are 95 % intervals over seeds.",
    ),
    "obedience": (
        obedience,
        "Held-out dialogues under an instruction before the first turn: answers that obey it, by "
        "turn, after each stage. Bars are 95 % intervals over seeds.",
    ),
}
OF_TRAINING: Mapping[str, Drawing] = {
    "sft_loss": (sft_loss, "Loss in supervised fine-tuning; a point is the mean of some steps."),
    "reward_accuracy": (
        reward_accuracy,
        "Reward models on held-out comparisons, by how much better the chosen answer is.",
    ),
    "best_of": (
        best_of,
        "Rejection sampling: the mean reward of the best of the first answers to a prompt. Bands "
        "reach from the lowest to the highest seed.",
    ),
    "ppo": (
        ppo,
        "PPO: mean reward over the iterations, left, and against the divergence from the policy "
        "that PPO began with, right. A point is the mean of a tenth of the iterations, which draw "
        "different prompts.",
    ),
}


def drawn(name: str, chains: Chains) -> tuple[Callable[[], Figure], str]:
    """Returns the function that draws a plot of these chains, and its caption."""
    draw, caption = (OF_MODELS | OF_TRAINING)[name]
    return lambda: draw(chains), caption
