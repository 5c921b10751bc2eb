"""The solver against closed forms; its order is measured, and no sample sees another."""

import math

import pytest
import torch
from diffusers.utils.logging import disable_progress_bar, enable_progress_bar

from annealers.ode import _dormand_prince, solve_each

RATES = torch.tensor([0.3, 1.0, 2.0, 4.0], dtype=torch.float64)
START = torch.tensor([[1.0, -2.0], [0.3, 4.0], [2.0, 1.0], [-1.0, 0.5]], dtype=torch.float64)


def relaxation(time, state, rows):
    """y' = -k cos(t) y, with a rate for each sample: y = y_0 exp(-k sin t)."""
    return -RATES[rows, None] * torch.cos(time)[:, None] * state


def relaxed(time):
    return START * torch.exp(-RATES * math.sin(time))[:, None]


def pulse(time, state, rows):
    """y' = w / (w^2 + (t - 1/2)^2), nearly nothing but for a pulse of width w: y = arctan((t - 1/2) / w)."""
    width = 1e-3
    return (width / (width**2 + (time - 0.5) ** 2))[:, None].expand_as(state)


@pytest.mark.parametrize("tolerance", [1e-4, 1e-7, 1e-10])
def test_the_error_follows_the_tolerance(tolerance):
    end, _ = solve_each(relaxation, START, 0.0, 3.0, tolerance, tolerance)
    error = (end - relaxed(3.0)).abs().max().item()
    assert tolerance / 1e4 < error < 30 * tolerance


def test_a_tighter_tolerance_costs_what_a_method_of_order_five_costs():
    _, few = solve_each(relaxation, START, 0.0, 3.0, 1e-6, 1e-6)
    _, many = solve_each(relaxation, START, 0.0, 3.0, 1e-11, 1e-11)
    ratio = many.double() / few  # 10^(5/5) asymptotically; an estimate of order four would need 10^(5/4) = 17.8
    assert (ratio > 6).all() and (ratio < 13).all()


def test_a_step_is_of_order_five_and_its_error_estimate_of_order_four():
    """y' = y + exp(t), y = (1 + t) exp(t): local errors fall by 2^6 and 2^5 when the step is halved."""
    rows, time = torch.arange(2), torch.tensor([0.0, 0.7], dtype=torch.float64)

    def derivative(time, state, rows):
        return state + time.exp()[:, None]

    def solution(time):
        return ((1 + time) * time.exp())[:, None]

    errors, estimates = [], []
    for h in (0.2, 0.1):
        step, state = torch.full_like(time, h), solution(time)
        after, estimate, slope_after = _dormand_prince(
            derivative, time, state, rows, step, derivative(time, state, rows)
        )
        errors.append((after - solution(time + step)).abs())
        estimates.append(estimate.abs())
        torch.testing.assert_close(slope_after, derivative(time + step, after, rows))  # first stage of the next step
    assert (torch.log2(errors[0] / errors[1]) - 6).abs().max() < 0.3
    assert (torch.log2(estimates[0] / estimates[1]) - 5).abs().max() < 0.3


def test_a_step_that_meets_a_sudden_change_is_taken_again():
    visited = []

    def watched(time, state, rows):
        visited.append(time.max().item())
        return pulse(time, state, rows)

    end, _ = solve_each(watched, torch.zeros(1, 1, dtype=torch.float64), 0.0, 1.0, 1e-7, 1e-7)
    assert end.item() == pytest.approx(2 * math.atan(500), abs=1e-5)
    assert any(later < earlier - 1e-3 for earlier, later in zip(visited, visited[1:], strict=False))


def test_there_and_back_again():
    there, _ = solve_each(relaxation, START, 0.0, 1.0, 1e-10, 1e-10)
    back, _ = solve_each(relaxation, there, 1.0, 0.0, 1e-10, 1e-10)
    torch.testing.assert_close(back, START, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(there, relaxed(1.0), rtol=1e-7, atol=1e-7)


def test_a_sample_does_not_depend_on_its_neighbours():
    together, calls = solve_each(relaxation, START, 0.0, 3.0, 1e-6, 1e-6)
    assert len(calls.unique()) == 4  # each has steps of its own
    for i in range(4):
        alone, its_calls = solve_each(
            lambda t, y, rows, i=i: relaxation(t, y, rows + i), START[i : i + 1], 0.0, 3.0, 1e-6, 1e-6
        )
        assert torch.equal(alone[0], together[i]) and its_calls.item() == calls[i]


def test_calls_count_how_often_the_derivative_of_a_sample_was_computed():
    counted = torch.zeros(4, dtype=torch.int64)

    def counting(time, state, rows):
        assert time.shape == rows.shape == state.shape[:1] and len(rows.unique()) == len(rows)
        counted[rows] += 1
        return relaxation(time, state, rows)

    _, calls = solve_each(counting, START, 0.0, 3.0)
    assert torch.equal(calls, counted)


def test_the_largest_coordinate_decides():
    """Easy coordinates beside one that is hard to follow do not make its steps longer."""

    def both(time, state, rows):
        return torch.cat([pulse(time, state[:, :1], rows), torch.zeros_like(state[:, 1:])], dim=1)

    _, alone = solve_each(pulse, torch.zeros(1, 1, dtype=torch.float64), 0.0, 1.0, 1e-6, 1e-6)
    end, calls = solve_each(both, torch.zeros(1, 5, dtype=torch.float64), 0.0, 1.0, 1e-6, 1e-6)
    assert calls.item() == alone.item() and end[0, 1:].tolist() == [0, 0, 0, 0]


def test_tolerances_are_of_the_size_of_the_state_and_of_nothing_smaller():
    """With a relative tolerance alone, y and 1000 y have the same steps; an absolute one spares a small y."""
    start = torch.tensor([[1e-3], [1.0]], dtype=torch.float64)

    def decay(time, state, rows):
        return -torch.cos(5 * time)[:, None] * state

    _, relative = solve_each(decay, start, 0.0, 3.0, 1e-8, 1e-30)
    _, absolute = solve_each(decay, start, 0.0, 3.0, 1e-30, 1e-8)
    assert relative[0] == relative[1] and absolute[0] < absolute[1]


def test_float32_states_stay_float32():
    end, _ = solve_each(lambda t, y, rows: -y, START.float(), 0.0, 1.0)
    assert end.dtype == torch.float32
    torch.testing.assert_close(end, START.float() * math.exp(-1), rtol=1e-4, atol=1e-4)


def test_an_empty_batch_arrives_at_once():
    end, calls = solve_each(relaxation, START[:0], 0.0, 1.0)
    assert end.shape == (0, 2) and calls.shape == (0,)


def test_progress_bars_can_be_switched_off():
    disable_progress_bar()
    try:
        solve_each(relaxation, START, 0.0, 0.1)
    finally:
        enable_progress_bar()


# ---- what cannot be solved ------------------------------------------------------------------------------------------


def test_a_derivative_that_is_not_finite_is_reported_with_its_sample():
    def broken(time, state, rows):
        return torch.where(((rows == 2) & (time > 0.5))[:, None], torch.nan, relaxation(time, state, rows))

    with pytest.raises(
        RuntimeError, match=r"1 of 4 samples did not arrive .* sample 2 stands at 0\.[45]\d* of 0 \.\. 1"
    ):
        solve_each(broken, START, 0.0, 1.0)
    with pytest.raises(RuntimeError, match="4 of 4 samples"):
        solve_each(lambda t, y, rows: y * torch.nan, START, 0.0, 1.0)


def test_a_solution_that_does_not_exist_to_the_end_is_reported():
    with pytest.raises(RuntimeError, match=r"stands at (1|0\.999\d*) of 0 \.\. 2"):  # 1 / (1 - t)
        solve_each(lambda t, y, rows: y**2, torch.ones(1, 1, dtype=torch.float64), 0.0, 2.0)


def test_the_number_of_steps_is_limited():
    with pytest.raises(RuntimeError, match="in 3 steps"):
        solve_each(relaxation, START, 0.0, 3.0, max_steps=3)


@pytest.mark.parametrize("tolerances", [(0.0, 1e-5), (1e-5, 0.0), (-1.0, 1e-5), (math.nan, 1e-5)])
def test_tolerances_must_be_positive(tolerances):
    with pytest.raises(ValueError, match="tolerances must be positive"):
        solve_each(relaxation, START, 0.0, 1.0, *tolerances)


def test_the_interval_must_not_be_empty():
    with pytest.raises(ValueError, match="empty: start = end = 1.0"):
        solve_each(relaxation, START, 1.0, 1.0)
