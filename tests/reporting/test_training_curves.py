"""`llama2 plot`: curves from training logs, whatever state a run is in."""

import json
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import tiny_ppo
from matplotlib.backends.backend_agg import FigureCanvasAgg

from llama2.cli import main
from llama2.reporting.training_curves import Run, curves, draw
from llama2.rlhf.ppo import train

SVG = "{http://www.w3.org/2000/svg}svg"


def record(step, **more):
    return {
        "step": step,
        "loss": 8.0 - step,
        "tokens": 100 * (step + 1),
        "seconds": 0.5 * (step + 1),
    } | more


def write_run(folder, count=5, end="", **more):
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(record(step, **more)) + "\n" for step in range(count))
    (folder / "log.jsonl").write_text(lines + end, encoding="utf-8")
    return folder


@pytest.fixture
def plot(capfd):
    def run(*arguments):
        status = main(["plot", *map(str, arguments)])
        return status, *capfd.readouterr()

    return run


def test_points_are_means_over_steps_and_bands_their_range():
    records = [record(step, seconds=seconds) for step, seconds in enumerate((1, 2, 4, 5, 6))]
    found = curves(Run("a", records), 2)
    loss = found["loss (nats)"]
    assert loss.steps.tolist() == [0.5, 2.5, 4] and loss.values.tolist() == [7.5, 5.5, 4]
    assert loss.low.tolist() == [7, 5, 4] and loss.high.tolist() == [8, 6, 4]
    speed = found["tokens per second"]
    assert speed.steps.tolist() == [1, 3, 4]
    assert speed.values.tolist() == [200 / 2, 200 / 3, 100 / 1]
    assert list(found) == ["loss (nats)", "tokens per second"]


def test_seconds_per_step_where_no_tokens_are_counted():
    records = [{"step": step, "loss": 1.0, "seconds": 2.0 * step + 3} for step in range(3)]
    found = curves(Run("a", records), 1)
    assert found["seconds per step"].values.tolist() == [3, 2, 2]


def test_only_finite_numbers_are_drawn():
    """A field may be null, for example the value loss of a run without a critic."""
    values = (1.0, None, float("nan"), "text", 5.0)
    records = [record(n, value_loss=None, own=value) for n, value in enumerate(values)]
    found = curves(Run("a", records), 1)
    assert found["own"].steps.tolist() == [0, 4] and found["own"].values.tolist() == [1, 5]
    assert "value loss" not in found


def test_steps_within_a_millisecond_have_no_speed():
    records = [record(step, seconds=seconds) for step, seconds in enumerate((0.0, 0.001, 0.001))]
    speed = curves(Run("a", records), 1)["tokens per second"]
    assert speed.steps.tolist() == [1] and speed.values.tolist() == [100 / 0.001]


def test_runs_share_panels_and_the_legend_covers_no_data():
    long = Run("long", [record(step, lr=0.1) for step in range(1000)])
    short = Run("short", [record(step, own=1.0) for step in range(3)], {"loss": [(0, 2.0), (3, 1)]})
    figure = draw([long, short])
    found = {axes.get_title(): len(axes.lines) for axes in figure.axes}
    assert found == {
        "loss (nats)": 2,
        "learning rate": 1,
        "tokens per second": 2,
        "own": 1,
        "held-out loss": 1,
    }
    assert all(len(line.get_xdata()) <= 200 for axes in figure.axes for line in axes.lines)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["long", "short"]
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    box = legend.get_window_extent(renderer)
    assert not any(box.overlaps(axes.get_tightbbox(renderer)) for axes in figure.axes)


def test_a_run_that_is_being_written(plot, tmp_path):
    """Or was killed while it wrote its last line."""
    folder = write_run(tmp_path / "run", count=5, end='{"step": 5, "loss": 1')
    status, out, err = plot(folder)
    assert (status, err) == (0, "")
    assert out == f"{folder / 'log.svg'}: {folder} (5 steps)\n"
    assert ET.parse(folder / "log.svg").getroot().tag == SVG
    assert {file.name for file in folder.iterdir()} == {"log.jsonl", "log.svg"}


def test_bad_lines_are_named_and_the_others_drawn(plot, tmp_path):
    folder = write_run(tmp_path / "run", count=2, end='nonsense\n{"loss": 1}\n')
    status, out, err = plot(folder)
    assert status == 0 and "(2 steps)" in out
    lines = err.splitlines()
    assert len(lines) == 2 and all("expected a record of a step" in line for line in lines)
    assert lines[0].startswith(f"{folder / 'log.jsonl'}:3: ")


def test_several_runs_in_one_image(plot, tmp_path):
    runs = [write_run(tmp_path / name) for name in ("one", "two $x$", "three\x01")]
    out = tmp_path / "new" / "runs.PNG"
    assert plot(*runs, "--out", out)[0] == 0
    assert out.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    out = tmp_path / "runs.svg"
    assert plot(*runs, "--out", out)[0] == 0
    assert ET.parse(out).getroot().tag == SVG


@pytest.mark.parametrize(
    "line",
    [
        '{"step": "1", "seconds": 1}',
        '{"step": true, "seconds": 1}',
        '{"step": 1, "seconds": null}',
        "[" * 100_000,
        "{" + '"step": 1, "seconds": 1',
    ],
    ids=["text", "bool", "null", "deep", "open"],
)
def test_a_line_that_is_no_record_stops_nothing(line, plot, tmp_path):
    status, out, err = plot(write_run(tmp_path / "run", count=2, end=line + "\n"))
    assert status == 0 and "(2 steps)" in out
    (said,) = err.splitlines()
    assert "log.jsonl:3: expected a record of a step" in said and len(said) < 400


def test_numbers_beyond_a_plot_are_left_out(plot, tmp_path):
    folder = write_run(tmp_path / "run", own=10**400, loss=-1.7e308, step_name=1e99)
    assert plot(folder)[::2] == (0, "")
    from llama2.commands.plot import _read

    assert curves(_read(folder), 1).keys() == {"step_name", "tokens per second"}


def test_a_log_without_a_number_is_a_users_error(plot, tmp_path):
    folder = write_run(tmp_path / "run", loss=float("nan"), seconds=0)
    status, _, err = plot(folder)
    assert (status, err) == (2, "llama2: runs: expected a finite number in a log; got none\n")


def test_names_that_no_font_has(plot, tmp_path):
    status, _, err = plot(write_run(tmp_path / "run", **{"\ud800": 1.0, "$x_{$": 2.0, "\0": 3.0}))
    assert (status, err.count("\n")) == (0, 0)


def test_a_legend_of_many_runs_leaves_room_for_the_panels(plot, tmp_path):
    folder = write_run(tmp_path / "run")
    assert plot(*[folder] * 30)[::2] == (0, "")


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"held_out": {"loss_before": 1, "loss": 2}}',
        '{"held_out": {"other": 1}, "train_config": {"steps": 3}}',
        '{"held_out": {"bits_per_byte": "x"}, "train_config": {"steps": 3}}',
    ],
)
def test_a_record_of_another_form_is_named(text, plot, tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "training.json").write_text(text, encoding="utf-8")
    status, _, err = plot(folder)
    assert status == 2 and err.count("\n") == 1
    assert f"{folder / 'training.json'}: expected the record of a training run; " in err


@pytest.mark.parametrize(
    ("held_out", "expected"),
    [
        (None, {}),
        ({"bits_per_byte": 2.5, "bytes": 9}, {"held-out bits per byte": ([4], [2.5])}),
        ({"loss_before": 3.0, "loss": 2.0}, {"held-out loss": ([0, 4], [3, 2])}),
        (
            {"before": {"loss": 3.0, "accuracy": 0.5}, "after": {"loss": 2.0, "accuracy": 0.75}},
            {"held-out loss": ([0, 4], [3, 2]), "held-out accuracy": ([0, 4], [0.5, 0.75])},
        ),
    ],
    ids=["none", "pretrain", "sft", "reward"],
)
def test_what_a_run_measured_on_held_out_data(held_out, expected, tmp_path):
    from llama2.commands.plot import _read

    folder = write_run(tmp_path / "run", count=4)
    about = {"train_config": {"steps": 4}, "held_out": held_out}
    (folder / "training.json").write_text(json.dumps(about), encoding="utf-8")
    found = {
        title: (curve.steps.tolist(), curve.values.tolist())
        for title, curve in curves(_read(folder), 1).items()
        if title.startswith("held-out")
    }
    assert found == expected


def test_the_logs_of_ppo_have_a_title_for_every_field(tmp_path):
    config = tiny_ppo.CONFIG
    models, prompts = tiny_ppo.actors(config), tiny_ppo.questions(config)
    log = train(models, prompts, tiny_ppo.sampler(config), config, tmp_path)
    found = curves(Run("a", log), 1)
    assert not found.keys() & log[0].keys() - {"objective", "entropy"}
    assert {"combined reward (logit)", "clip fraction", "value loss"} <= found.keys()
    assert all(np.isfinite(curve.values).all() for curve in found.values())


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        ("nothing", (), "run: expected the --work directory of a training run, which holds"),
        ("file", (), "no directory"),
        ("folder", (), "a directory without it"),
        ("empty", (), "log.jsonl: expected a record of at least one step; got none"),
        ("run", ("--out", "a.pdf"), "out: expected a file named *.svg or *.png; got a.pdf"),
        ("run", ("--out", "a"), "out: expected a file named *.svg or *.png; got a"),
    ],
)
def test_a_users_error_is_one_line(made, options, message, plot, tmp_path):
    folder = tmp_path / "run"
    if made == "file":
        folder.touch()
    if made in ("folder", "empty"):
        folder.mkdir()
    if made == "empty":
        (folder / "log.jsonl").touch()
    if made == "run":
        write_run(folder)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    status, out, err = plot(folder, *options)
    assert (status, out) == (2, "") and err.startswith("llama2: ") and err.count("\n") == 1
    assert message in err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_missing_matplotlib_names_the_extra(plot, monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.startswith("llama2.reporting")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "llama2.commands.plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = plot(write_run(tmp_path / "run"))
    assert (status, err) == (
        2,
        "llama2: llama2 plot needs matplotlib; from a clone of gqa-kernels: "
        'pip install ".[plot]"\n',
    )
