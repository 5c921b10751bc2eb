r"""Properties of the example scripts and of the mode-weights measurement, run with few steps and chains.

What rests on exact scores is right however few the training steps are, and is checked against laws in closed form; the
learnt parts only have to be there and to have become better than nothing.
"""

import json
import math
import runpy
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
from diffusers.utils import logging

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def without_progress_bars():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def run(script, *arguments):
    before, threads = sys.argv, torch.get_num_threads()
    sys.argv = [script, *map(str, arguments)]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.argv = before
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def score_fields(tmp_path_factory):
    """The folder of a short run, and its numbers."""
    folder = tmp_path_factory.mktemp("score_fields")
    run("examples/score_fields.py", "--output-dir", folder, "--steps", 60, "--chains", 400)
    return folder, json.loads((folder / "score_fields.json").read_text())


def test_each_figure_is_written_and_small_enough_for_a_page(score_fields):
    folder, _ = score_fields
    pictures = sorted(folder.glob("*.png"))
    assert [p.stem for p in pictures] == [f"score_fields_{n}" for n in ("attractors", "learnt", "paths", "unsmoothed")]
    for picture in pictures:
        assert picture.stat().st_size < 200_000
        colours = PIL.Image.open(picture).convert("RGB").getcolors(maxcolors=2**24)
        assert len(colours) > 100  # something is drawn


def test_with_little_noise_the_attractors_are_the_stored_points_with_much_the_one_is_near_the_mean(score_fields):
    script = runpy.run_path(str(ROOT / "examples/score_fields.py"), run_name="read")
    stored, numbers = script["STORED"].double(), score_fields[1]["attractors"]
    found = {name: torch.tensor(points, dtype=torch.float64) for name, points in numbers["attractors"].items()}
    few, some, one = found["σ = 0.3"], found["σ = 0.75"], found["σ = 2"]
    assert len(few) == numbers["stored points"] == len(stored)
    assert (
        torch.cdist(few, stored).amin(dim=1).max() < 1e-3
        and torch.cdist(few, stored).argmin(dim=1).unique().numel() == 7
    )
    assert 1 < len(some) < 7
    assert len(one) == 1 and (one - stored.mean(dim=0)).norm() < 0.2
    # an attractor is a weighted mean of the points, with the weights that it gives itself
    for noise_level, points in ((0.3, few), (0.75, some), (2.0, one)):
        weights = torch.softmax(-(torch.cdist(points, stored) ** 2) / (2 * noise_level**2), dim=1)
        torch.testing.assert_close(points, weights @ stored, rtol=0, atol=1e-3)
    assert all(0 <= rate < 1 for rate in numbers["slowest rate at an attractor"].values())


def test_the_linear_denoiser_keeps_a_line_and_none_of_the_stored_points(score_fields):
    numbers = score_fields[1]["attractors"]["linear"]
    assert numbers["rate at the stored points"] == pytest.approx(1)
    assert numbers["stored points that stay"] == 0
    assert numbers["largest distance of an end from the line"] < 1e-9


def test_annealed_paths_find_the_weights_that_plain_ones_miss(score_fields):
    shares = score_fields[1]["paths"]["share of the larger mode"]
    standard_error = math.sqrt(0.8 * 0.2 / 400)
    assert abs(shares["annealed"] - 0.8) < 0.02 + 4 * standard_error  # .02: what 600 calls leave, see the benchmark
    assert shares["plain"] < 0.8 - 8 * standard_error


def test_the_learnt_score_is_better_than_none_and_best_at_much_noise(score_fields):
    errors = {float(level): error for level, error in score_fields[1]["learnt"].items()}
    assert max(errors.values()) < 1.05  # 1 is that of no score at all
    assert errors[max(errors)] < 0.3


# ---- mode weights ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mode_weights(tmp_path_factory):
    """Records by sampler of a short run, 2,000 chains and 300 calls; the standard error of a share is .009."""
    folder = tmp_path_factory.mktemp("mode_weights")
    run("benchmarks/mode_weights.py", "--out", folder, "--calls", 300, "--chains", 1000, "--seeds", 2)
    records = json.loads((folder / "mode_weights.json").read_text())["records"]
    return folder, {record["sampler"]: record for record in records}


def test_annealed_langevin_recovers_the_mode_weights_and_plain_langevin_does_not(mode_weights):
    share = {name: record["share"][0] for name, record in mode_weights[1].items()}
    standard_error = math.sqrt(0.8 * 0.2 / 2000)
    assert abs(share["exact samples"] - 0.8) < 4 * standard_error
    assert abs(share["DDPM chain on the same ladder"] - 0.8) < 0.02 + 4 * standard_error
    assert abs(share["annealed Langevin"] - 0.8) < 0.03 + 4 * standard_error  # .03: what 300 calls leave
    assert abs(share["DDPM chain on the same ladder, from the exact law at its top"] - 0.8) < 4 * standard_error
    plain = [value for name, value in share.items() if name.startswith("plain Langevin")]
    assert len(plain) == 3
    for value in plain:  # half of the start is nearer to either mode, and there it stays
        assert abs(value - 0.5) < 5 * math.sqrt(0.25 / 2000)
        assert value < 0.8 - 15 * standard_error


def test_within_the_modes_plain_langevin_is_right_but_for_its_step(mode_weights):
    """The variance of x <- x - delta x + sqrt(2 delta) z is 1 / (1 - delta / 2)."""
    variance = {name: record["variance"][0] for name, record in mode_weights[1].items()}
    tolerance = 5 * math.sqrt(2 / 4000)  # of the variance of 4,000 normal coordinates
    assert variance["exact samples"] == pytest.approx(1, abs=tolerance)
    assert variance["plain Langevin"] == pytest.approx(1 / (1 - 0.05 / 2), abs=tolerance)
    assert variance["plain Langevin, ten times the step"] == pytest.approx(1 / (1 - 0.5 / 2), abs=1.4 * tolerance)


def test_calls_are_counted_and_equal_but_for_what_does_not_fit(mode_weights):
    calls = {name: record["calls"] for name, record in mode_weights[1].items()}
    assert calls.pop("exact samples") == 0
    assert calls.pop("annealed Langevin") == 291  # 29 levels of ten, and the denoising
    assert set(calls.values()) == {300}


def test_the_table_and_the_figure_are_written(mode_weights):
    folder, records = mode_weights
    table = (folder / "mode_weights.md").read_text()
    assert all(name in table for name in records)
    assert "{:.3f} ± {:.3f}".format(*records["annealed Langevin"]["share"]) in table
    assert (folder / "mode_weights.png").stat().st_size < 200_000
