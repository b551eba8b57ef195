"""The command `llama2 align`: runs every stage of making a chat model and reports what each one
changes."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from llama2.align.chain import folder_of, log_of, num_done, run_chains
from llama2.align.measure import measured
from llama2.align.recipe import PRESETS, Preset
from llama2.align.report.page import RESULTS, check_folder, findings, write_page
from llama2.align.stages import stages
from llama2.checkout import made_with
from llama2.storage import locked, read_json, write_text
from llama2.train.state import check_identity

_PRESET = "preset.json"  # the preset of a folder's chains


def run(args: argparse.Namespace) -> int:
    """Runs the missing stages of each seed's chain and writes the page of all finished chains.

    Returns:
        0; 1 if a chain failed.
    Raises:
        OSError, ValueError: about the user's input.
    """
    preset = PRESETS[args.preset]
    seeds = preset.seeds if args.seeds is None else tuple(args.seeds)
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds: expected distinct ints of at least 0; got {list(seeds)}")
    check_folder(args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    with locked(args.out):
        _claim(args.out, preset)
        failed = _run_all(preset, seeds, args.out)
        finished = [seed for seed in seeds if seed not in failed]
        for seed in failed:
            print(f"seed {seed} failed; see {log_of(args.out, seed)}", file=sys.stderr)
        if finished:
            _write(args, preset, finished, failed)
    return 1 if failed else 0


def _claim(out: Path, preset: Preset) -> None:
    """Records the preset in `out`; raises ValueError if `out` has chains of another preset."""
    identity = {"preset": json.loads(json.dumps(asdict(preset) | {"seeds": None}))}
    file = out / _PRESET
    if file.exists():
        check_identity(file, read_json(file), identity)
    else:
        write_text(file, json.dumps(identity, indent=1) + "\n")


def _run_all(preset: Preset, seeds: Sequence[int], out: Path) -> list[int]:
    total = sum(len(stages(preset, seed, folder_of(out, seed))) for seed in seeds)
    done = sum(num_done(preset, out, seed) for seed in seeds)
    with tqdm(total=total, initial=done, desc="align", unit="stage") as bar:

        def progress(count: int) -> None:
            bar.update(count - bar.n)

        try:
            return run_chains(preset, seeds, out, progress)
        except KeyboardInterrupt:
            bar.close()
            print("interrupted; the same command resumes", file=sys.stderr)
            raise


def _write(
    args: argparse.Namespace, preset: Preset, finished: Sequence[int], failed: Sequence[int]
) -> None:
    chains = {seed: measured(preset, seed, args.out) for seed in finished}
    results = {
        "kind": "align",
        "preset": preset.name,
        "caution": preset.caution,
        "command": args.command_line,
        "made_with": made_with(args, ["matplotlib"]),
        "settings": asdict(preset),
        "failed": list(failed),
        "chains": chains,
    }
    write_text(args.out / RESULTS, json.dumps(results, indent=1) + "\n")
    page = write_page(results, args.out)
    if preset.caution:
        print(preset.caution)
    for found in findings(chains):
        print(f"- {found.text}")
    print(f"wrote {page} and {page.with_suffix('.md').name}")
