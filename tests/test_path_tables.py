r"""The levels that a schedule visits: flow paths, spacings in the noise-to-signal ratio, and levels given as sigmas;
and the sub-VP path.

Oracles: Diffusers' FlowMatchEulerDiscreteScheduler and UniPC, the shift of Esser et al. 2024 as a translation of the
log-ratio, log(sigma / (1 - sigma)) -> log(sigma / (1 - sigma)) + log(shift), and evenness in the scale that names a
spacing. Those of the sub-VP path are the moments of its SDE, integrated by scipy, exact Gaussian laws, and the same
path as a list of betas.
"""

import math

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from scipy.integrate import solve_ivp

from annealers import (
    AnnealedLangevinScheduler,
    DDPMAncestralScheduler,
    ModifiedEulerMaruyamaScheduler,
    PredictorCorrectorScheduler,
)
from annealers.exact import Gaussian
from annealers.schedulers.path_tables import karras_ratios, shifted, spaced_flow_sigmas, stretched_to_terminal

LADDER = {"beta_schedule": "geometric", "sigma_min": 0.02, "sigma_max": 40.0}
SUB_VP = {"beta_schedule": "sub_vp"}
TABLES = [{"beta_schedule": name} for name in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")]
TABLES += [LADDER, SUB_VP]
DYNAMIC = {"use_dynamic_shifting": True}


def flow(**config):
    return DDPMAncestralScheduler(prediction_type="flow_prediction", clip_sample=False, **config)


def log_ratios(scheduler):
    alpha, sigma = scheduler.signal_and_noise(scheduler.timesteps)
    return (sigma / alpha).log()


# ---- the flow path --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 10, 1000])
def test_the_flow_path_is_the_straight_line_from_data_to_noise(T):
    scheduler = flow(num_train_timesteps=T)
    assert len(scheduler) == T
    assert scheduler.train_timesteps.tolist() == list(range(1, T + 1))
    assert scheduler.timesteps.tolist() == list(range(T, 0, -1))
    assert scheduler.timesteps.dtype is torch.float32
    timesteps = torch.tensor([0, 0.25, 0.5, 1.0], dtype=torch.float64) * T
    alpha, sigma = scheduler.signal_and_noise(timesteps)
    assert alpha.tolist() == [1, 0.75, 0.5, 0]
    assert sigma.tolist() == [0, 0.25, 0.5, 1]


def test_the_tables_that_diffusers_names_are_those_of_the_flow_path_too():
    scheduler = flow(num_train_timesteps=10)
    signal = 1 - np.arange(1, 11) / 10
    np.testing.assert_allclose(scheduler.alphas_cumprod, signal**2, atol=1e-7)
    # beta is the fraction of signal-to-noise-and-signal that a step of one timestep loses
    alphas_cumprod = np.append(1.0, signal**2 / (signal**2 + (1 - signal) ** 2))
    np.testing.assert_allclose(scheduler.betas, 1 - alphas_cumprod[1:] / alphas_cumprod[:-1], atol=1e-6)
    torch.testing.assert_close(scheduler.alphas, 1 - scheduler.betas)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_coefficients_of_the_flow_path_are_rounded_once(dtype):
    # 1 - 0.9995 has few digits where the noise is rounded first
    alpha, sigma = flow().signal_and_noise(torch.tensor([999.5, 500.0, 0.5], dtype=torch.float64), dtype=dtype)
    assert alpha.dtype is sigma.dtype is dtype
    working = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for values, exact in ((alpha, [0.0005, 0.5, 0.9995]), (sigma, [0.9995, 0.5, 0.0005])):
        np.testing.assert_allclose(values.double(), exact, rtol=torch.finfo(dtype).eps, atol=working)


@pytest.mark.parametrize("timesteps", [-0.5, 1000.5, float("nan"), torch.tensor([3.0, 1001.0]), -1])
def test_times_off_the_flow_path_are_refused(timesteps):
    with pytest.raises(ValueError, match=r"timesteps must lie in 0 \.\. 1000, got"):
        flow().signal_and_noise(timesteps)
    with pytest.raises(ValueError, match="timesteps must be integers"):
        flow().signal_and_noise(torch.tensor([1j]))


# ---- its schedules are those of Diffusers ---------------------------------------------------------------------------


def levels(scheduler):
    """What the network is told and what the step believes, both in units of sigma."""
    return scheduler.timesteps.numpy() / scheduler.config.num_train_timesteps, scheduler.sigmas.numpy()


CALLS = {
    "N": lambda N: {"num_inference_steps": N},
    "Flux": lambda N: {"sigmas": np.linspace(1.0, 1 / N, N)},
    "a list": lambda N: {"sigmas": np.geomspace(1.0, 0.01, N).tolist()},
    "from the middle": lambda N: {"sigmas": np.linspace(0.6, 0.05, N)},
}


@pytest.mark.parametrize("terminal", [None, 0.1])
@pytest.mark.parametrize(
    ("config", "mu"),
    [
        ({}, None),
        ({}, 1.15),  # the Flux pipelines pass mu whether it has a use or not
        ({"shift": 3.0}, None),
        ({"shift": 0.3}, None),
        ({"shift": 3.0, "num_train_timesteps": 250}, None),
        (DYNAMIC, 1.15),
        (DYNAMIC, -0.4),
        (DYNAMIC | {"shift": 3.0}, 0.5),  # dynamic shifting replaces the shift
        (DYNAMIC | {"time_shift_type": "linear"}, 1.15),
        (DYNAMIC | {"time_shift_type": "linear"}, 4.0),
    ],
)
@pytest.mark.parametrize("call", CALLS)
def test_the_levels_of_a_flow_path_are_those_of_the_flow_matching_euler_scheduler(call, config, mu, terminal):
    config = config | {"shift_terminal": terminal}
    ours, theirs = flow(**config), FlowMatchEulerDiscreteScheduler(**config)
    for N in (2, 4, 28, 50):
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(**CALLS[call](N), mu=mu)
        assert ours.timesteps.shape == theirs.timesteps.shape == (N,)
        assert ours.timesteps.dtype is theirs.timesteps.dtype
        for mine, other in zip(levels(ours), levels(theirs), strict=True):
            np.testing.assert_allclose(mine, other, rtol=0, atol=5e-7)
        assert ours.num_inference_steps == N


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_spacings_of_tables_that_end_on_the_first_level_are_that_of_the_euler_scheduler_on_a_flow(shift):
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(10)
    for spacing in ("leading", "linspace"):
        ours = flow(shift=shift, timestep_spacing=spacing)
        ours.set_timesteps(10)
        torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=0, atol=5e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("N", [1, 2, 7, 28])
def test_trailing_spacing_of_a_flow_path_is_what_the_flux_pipelines_ask_for(N, shift):
    spaced, asked = flow(shift=shift, timestep_spacing="trailing"), flow(shift=shift)
    spaced.set_timesteps(N)
    asked.set_timesteps(sigmas=np.linspace(1.0, 1 / N, N))
    torch.testing.assert_close(spaced.timesteps, asked.timesteps, rtol=0, atol=0)
    assert spaced.timesteps[0] == 1000


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_levels_of_unipc_differ_only_in_where_they_end_and_in_rounding(shift):
    # UniPC: one more interval, so that the last level is one step from 1 / T; timesteps cut to integers; sigma < 1
    N, ours = 20, flow(shift=shift)
    theirs = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    theirs.set_timesteps(N)
    ours.set_timesteps(sigmas=np.linspace(1, 1 / 1000, N + 1)[:-1])
    np.testing.assert_allclose(ours.sigmas, theirs.sigmas, rtol=0, atol=1.2e-6)
    difference = ours.timesteps - theirs.timesteps
    assert (difference > -0.01).all() and (difference <= 1.01).all()
    given = np.linspace(1, 0.05, N)  # and those that are given are the same
    theirs.set_timesteps(sigmas=given)
    ours.set_timesteps(sigmas=given)
    np.testing.assert_allclose(ours.sigmas, theirs.sigmas, rtol=0, atol=1.2e-6)


def test_the_heun_flow_scheduler_visits_the_same_levels():
    theirs, ours = FlowMatchHeunDiscreteScheduler(), flow()
    theirs.set_timesteps(10)
    ours.set_timesteps(10)
    torch.testing.assert_close(theirs.timesteps[::2], ours.timesteps, rtol=0, atol=5e-4)


@pytest.mark.parametrize("shift", [0.2, 1.0, 3.0, 12.0])
def test_a_shift_is_a_translation_of_the_log_ratio(shift):
    sigmas = np.linspace(0.99, 0.01, 30)
    moved = shifted(sigmas, shift)
    np.testing.assert_allclose(np.log(moved / (1 - moved)) - np.log(sigmas / (1 - sigmas)), math.log(shift))
    np.testing.assert_allclose(shifted(shifted(sigmas, shift), 1 / shift), sigmas)
    np.testing.assert_allclose(shifted(np.array([0.0, 1.0]), shift), [0, 1], rtol=1e-15)


def test_dynamic_shifting_is_a_shift_by_mu_or_its_exponential():
    for kind, shift in (("exponential", math.exp(0.8)), ("linear", 0.8)):
        dynamic, static = flow(**DYNAMIC, time_shift_type=kind), flow(shift=shift)
        dynamic.set_timesteps(sigmas=[1.0, 0.7, 0.2], mu=0.8)
        static.set_timesteps(sigmas=[1.0, 0.7, 0.2])
        torch.testing.assert_close(dynamic.timesteps, static.timesteps)


def test_stretching_ends_at_the_terminal_level_and_keeps_pure_noise_and_proportions():
    sigmas = np.array([1.0, 0.8, 0.3, 0.1])
    stretched = stretched_to_terminal(sigmas, 0.25)
    assert (stretched[0], stretched[-1]) == pytest.approx((1, 0.25))
    np.testing.assert_allclose((1 - stretched)[1:] / (1 - sigmas)[1:], (1 - 0.25) / (1 - 0.1))


@pytest.mark.parametrize("config", [{}, {"shift_terminal": 0.1}, {"shift": 3.0}, {"timestep_spacing": "trailing"}])
def test_one_step_of_a_flow_starts_from_pure_noise(config):
    scheduler = flow(**config)
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [1000]
    scheduler.set_timesteps(sigmas=[1.0])
    assert scheduler.timesteps.tolist() == [1000]


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", "karras", "geometric"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_every_schedule_of_a_flow_is_strictly_decreasing_on_the_path(spacing, shift):
    scheduler = flow(num_train_timesteps=40, timestep_spacing=spacing, shift=shift)
    for N in range(1, 41):
        scheduler.set_timesteps(N)
        timesteps = scheduler.timesteps.numpy()
        assert len(timesteps) == N
        assert 39 <= timesteps[0] <= 40
        assert timesteps[-1] > 0
        assert (np.diff(timesteps) < 0).all()


def test_the_levels_of_a_flow_are_the_times_that_its_network_is_told():
    scheduler = flow(shift=3.0)
    scheduler.set_timesteps(13)
    for visit, t in zip(scheduler._schedule, scheduler.timesteps, strict=True):
        assert (visit.here.timestep, visit.here.sigma) == (t.item(), t.item() / 1000)
        assert visit.here.alpha == 1 - visit.here.sigma
    assert [visit.there.timestep for visit in scheduler._schedule[:-1]] == scheduler.timesteps[1:].tolist()
    assert (scheduler._schedule[-1].there.alpha, scheduler._schedule[-1].there.sigma) == (1, 0)
    torch.testing.assert_close(scheduler.sigmas, torch.cat([scheduler.timesteps / 1000, torch.zeros(1)]))


# ---- spacings in the noise-to-signal ratio --------------------------------------------------------------------------


def test_geometric_spacing_of_a_flow_is_even_in_the_logarithm_of_the_ratio_and_karras_in_its_seventh_root():
    for spacing, scale in (("geometric", lambda r: r), ("karras", lambda r: (r / 7).exp())):
        scheduler = flow(timestep_spacing=spacing)
        scheduler.set_timesteps(12)
        ratios = log_ratios(scheduler).double()
        assert ratios.exp()[[0, -1]].tolist() == pytest.approx([999, 1 / 999], rel=1e-3)  # float32 times
        gaps = scale(ratios).diff()
        torch.testing.assert_close(gaps, gaps.mean().expand(11), rtol=2e-3, atol=0)


@pytest.mark.parametrize("path", TABLES)
def test_geometric_spacing_of_a_table_is_within_half_a_timestep_of_even_in_log_ratio(path):
    scheduler = DDPMAncestralScheduler(timestep_spacing="geometric", **path)
    for N in (1, 2, 5, 12):
        scheduler.set_timesteps(N)
        alpha, sigma = scheduler.signal_and_noise(torch.arange(1000))
        table = (sigma / alpha).log().numpy()
        wanted = np.linspace(table[-1], table[0], N) if N > 1 else table[-1:]
        places = np.interp(wanted, table, np.arange(1000))
        moved = np.abs(scheduler.timesteps.numpy() - places) > 0.5 + 1e-9
        # only where two would coincide, as at the noisy end of a cosine path
        assert not moved.any() or path["beta_schedule"] == "squaredcos_cap_v2"
        assert scheduler.timesteps[0] == 999


def test_geometric_spacing_of_a_geometric_ladder_is_linear_in_the_timestep():
    scheduler = DDPMAncestralScheduler(timestep_spacing="geometric", **LADDER)
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == np.linspace(999, 0, 10).round().tolist()


def test_karras_ratios_are_those_of_diffusers():
    theirs = EulerDiscreteScheduler(use_karras_sigmas=True)
    theirs.set_timesteps(10)
    largest, smallest = theirs.sigmas[0].item(), theirs.sigmas[-2].item()
    np.testing.assert_allclose(karras_ratios(largest, smallest, 10), theirs.sigmas[:-1], rtol=1e-5)


def test_spaced_flow_sigmas_start_at_pure_noise():
    np.testing.assert_allclose(spaced_flow_sigmas("trailing", 4, 0.001), [1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(spaced_flow_sigmas("linspace", 4, 0.1), [1, 0.7, 0.4, 0.1])


# ---- levels given as sigmas -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
@pytest.mark.parametrize("path", TABLES)
def test_sigmas_of_a_table_are_the_timesteps_with_the_nearest_ratios(path, kind):
    scheduler = DDPMAncestralScheduler(**path)
    alpha, sigma = scheduler.signal_and_noise(torch.arange(1000))
    ratios = (sigma / alpha).numpy()
    wanted = [700, 333, 20, 1]
    scheduler.set_timesteps(sigmas=kind((ratios[wanted] * 1.0001).tolist()))
    assert scheduler.timesteps.tolist() == wanted
    assert scheduler.num_inference_steps == 4
    for above, below in ((700, 699), (21, 20)):  # to the nearer one, by the logarithm
        middle = math.sqrt(ratios[above] * ratios[below])
        scheduler.set_timesteps(sigmas=[middle * 1.0001])
        assert scheduler.timesteps.tolist() == [above]
        scheduler.set_timesteps(sigmas=[middle / 1.0001])
        assert scheduler.timesteps.tolist() == [below]


def test_sigmas_beyond_the_table_are_its_ends():
    scheduler = DDPMAncestralScheduler()
    scheduler.set_timesteps(sigmas=[1e6, 1e-6])
    assert scheduler.timesteps.tolist() == [999, 0]
    scheduler = DDPMAncestralScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    scheduler.set_timesteps(sigmas=[1e6, 1.0])
    assert scheduler.timesteps[0] == 998  # pure noise has no ratio
    scheduler = DDPMAncestralScheduler()
    scheduler.set_timesteps(sigmas=[1e-5, 1e-6])
    assert scheduler.timesteps.tolist() == [1, 0]  # levels that coincide move apart


def test_the_sigmas_of_a_solver_of_diffusers_give_its_timesteps():
    theirs = DPMSolverMultistepScheduler(use_karras_sigmas=True, timestep_spacing="trailing")
    theirs.set_timesteps(12)
    ours = DDPMAncestralScheduler()
    ours.set_timesteps(sigmas=theirs.sigmas[:-1])
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "arguments", "message"),
    [
        (DDPMAncestralScheduler(), {"num_inference_steps": 5, "mu": 0.5}, "mu=0.5 but no flow_prediction"),
        (DDPMAncestralScheduler(), {"num_inference_steps": 5, "sigmas": [1.0]}, "exactly one"),
        (DDPMAncestralScheduler(), {"timesteps": [5], "sigmas": [1.0]}, "exactly one"),
        (DDPMAncestralScheduler(), {"sigmas": [1.0, 2.0]}, r"strictly decreasing, got \[1\.0, 2\.0\]"),
        (DDPMAncestralScheduler(), {"sigmas": [2.0, 2.0]}, "strictly decreasing"),
        (DDPMAncestralScheduler(), {"sigmas": [1.0, 0.0]}, "sigmas must be positive"),
        (DDPMAncestralScheduler(), {"sigmas": []}, "sigmas must be positive"),
        (DDPMAncestralScheduler(), {"sigmas": [float("nan")]}, "sigmas must be positive"),
        (DDPMAncestralScheduler(), {"sigmas": [[2.0, 1.0]]}, "sigmas must be positive"),
        (DDPMAncestralScheduler(), {"timesteps": [500.5, 3.0]}, r"list of integers, got \[500\.5, 3\.0\]"),
        (flow(), {"num_inference_steps": 5, "sigmas": [1.0]}, "exactly one"),
        (flow(), {"sigmas": [1.2, 0.5]}, r"sigmas of a flow path must lie in 0 \.\. 1, got 1\.2"),
        (flow(), {"sigmas": [0.5, 0.6]}, r"strictly decreasing, got \[0\.5, 0\.6\]"),
        (flow(), {"sigmas": [0.5, 0.0]}, "sigmas must be positive"),
        (flow(), {"timesteps": [1000.5, 3]}, r"0 \.\. 1000, got 3\.0 \.\. 1000\.5"),
        (flow(), {"timesteps": [5.5, 0.0]}, r"0 \.\. 1000, got 0\.0 \.\. 5\.5"),
        (flow(), {"timesteps": [5.5, -1.0]}, r"0 \.\. 1000, got -1\.0 \.\. 5\.5"),
        (flow(), {"timesteps": [5.5, 5.5]}, r"strictly decreasing, got \[5\.5, 5\.5\]"),
        (flow(), {"timesteps": [500.00001, 500.0]}, "strictly decreasing"),  # they are one in float32
        (flow(), {"timesteps": []}, r"list of numbers, got \[\]"),
        (flow(), {"timesteps": [5.5, float("nan")]}, r"got .*nan"),
        (flow(), {"num_inference_steps": 1001}, r"1 \.\. 1000 .* got 1001"),
        (flow(**DYNAMIC), {"num_inference_steps": 5}, "use_dynamic_shifting=True needs mu"),
        (flow(**DYNAMIC), {"sigmas": [1.0, 0.5]}, "use_dynamic_shifting=True needs mu"),
        (flow(**DYNAMIC), {"num_inference_steps": 5, "mu": float("nan")}, "positive shift, got mu=nan"),
        (flow(**DYNAMIC), {"num_inference_steps": 5, "mu": 1000.0}, "positive shift, got mu=1000.0"),
        (flow(**DYNAMIC, time_shift_type="linear"), {"num_inference_steps": 5, "mu": 0.0}, "positive shift, got mu=0"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_levels_that_cannot_be_visited_are_refused_with_the_value(scheduler, arguments, message):
    before = scheduler.timesteps.clone()
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**arguments)
    assert torch.equal(scheduler.timesteps, before)  # nothing was changed


@pytest.mark.parametrize("spacing", ["karras", "geometric"])
def test_spacings_in_the_ratio_need_signal_on_every_level_of_a_table(spacing):
    scheduler = DDPMAncestralScheduler(
        timestep_spacing=spacing, rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    with pytest.raises(ValueError, match=f"timestep_spacing='{spacing}', which spaces log SNR, needs some"):
        scheduler.set_timesteps(10)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"shift": 0.0}, "shift must be positive, got 0.0"),
        ({"shift": float("nan")}, "shift must be positive, got nan"),
        ({"time_shift_type": "cosine"}, "time_shift_type must be one of .* got 'cosine'"),
        ({"num_train_timesteps": 0}, "positive integer, got 0"),
        ({"mean_squared_noise": [0.5]}, "mean_squared_noise needs one value per train timestep, 1000, got 1"),
        ({"denoising_error": [0.5]}, "denoising_error needs one value per train timestep, 1000, got 1"),
    ],
)
def test_a_flow_path_that_cannot_be_built_is_refused_with_the_value(config, message):
    with pytest.raises(ValueError, match=message):
        flow(**config)


# ---- the sub-VP path ------------------------------------------------------------------------------------------------


def moments_of_the_sde(beta_0, beta_1, times):
    """Mean per x_0 and variance at given times of dx = -beta x / 2 dt + sqrt(beta (1 - e^{-2 int beta})) dw."""

    def rates(t, state):
        mean, variance = state
        beta, integral = beta_0 + t * (beta_1 - beta_0), beta_0 * t + 0.5 * t**2 * (beta_1 - beta_0)
        return -0.5 * beta * mean, -beta * variance + beta * -np.expm1(-2 * integral)

    solution = solve_ivp(rates, (0, 1), (1.0, 0.0), method="DOP853", t_eval=times, rtol=1e-12, atol=1e-22)
    return solution.y


@pytest.mark.parametrize(("T", "beta_start", "beta_end"), [(1000, 1e-4, 0.02), (50, 0.002, 0.4), (7, 0.3, 0.1)])
def test_the_sub_vp_path_has_the_moments_of_its_sde_up_to_scale(T, beta_start, beta_end):
    scheduler = DDPMAncestralScheduler(T, beta_start, beta_end, "sub_vp")
    alpha, sigma = scheduler.signal_and_noise(torch.arange(T))
    mean, variance = moments_of_the_sde(T * beta_start, T * beta_end, np.arange(1, T + 1) / T)
    np.testing.assert_allclose(sigma / alpha, np.sqrt(variance) / mean, rtol=1e-7)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-14)
    # alpha-bar = mean^2 is the same as on the variance-preserving path, whose deviation is sqrt(1 - alpha-bar)
    np.testing.assert_allclose((alpha / sigma) ** 2, mean**2 / (1 - mean**2) ** 2, rtol=1e-7)


def test_the_sub_vp_path_has_the_signal_of_the_linear_schedule_and_less_noise():
    def ratio(schedule):
        alpha, sigma = DDPMAncestralScheduler(beta_schedule=schedule).signal_and_noise(torch.arange(1000))
        return sigma / alpha

    sub_vp, linear = ratio("sub_vp"), ratio("linear")
    signal_linear = 1 / (1 + linear**2)  # alpha-bar; the sum of betas is the integral up to half a step
    # r = (1 - alpha-bar) / sqrt(alpha-bar), where the linear path has the root of the numerator
    torch.testing.assert_close(sub_vp, (1 - signal_linear) / signal_linear.sqrt(), rtol=0.12, atol=0)
    assert (sub_vp[1:] < linear[1:]).all()


def test_the_first_sub_vp_levels_keep_their_digits():
    scheduler = DDPMAncestralScheduler(beta_schedule="sub_vp")
    alpha, sigma = scheduler.signal_and_noise(torch.arange(3))
    # 1 - e^{-B} and e^{-B / 2} by their series, B = 1e-4 n + 0.0199 n^2 / 2000
    B = np.array([1e-4 * n + 0.0199 * n**2 / 2000 for n in (1, 2, 3)])
    exact_ratio = (B - B**2 / 2 + B**3 / 6) * (1 + B / 2 + B**2 / 8)
    np.testing.assert_allclose(sigma / alpha, exact_ratio, rtol=1e-10)
    snr = exact_ratio[:2] ** -2
    np.testing.assert_allclose(
        scheduler.betas[:2], [1 / (1 + snr[0]), 1 - (1 + 1 / snr[0]) / (1 + 1 / snr[1])], rtol=1e-5
    )


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (DDPMAncestralScheduler, {}),
        (ModifiedEulerMaruyamaScheduler, {}),
        (AnnealedLangevinScheduler, {"levels": "path"}),
        *[
            (PredictorCorrectorScheduler, {"predictor": predictor})
            for predictor in ("ddim", "euler_maruyama", "reverse_diffusion", "probability_flow")
        ],
    ],
)
@pytest.mark.filterwarnings("ignore:.* Langevin steps")
def test_every_step_of_a_sub_vp_path_is_that_of_the_same_path_as_a_list_of_betas(kind, settings):
    few = {"num_train_timesteps": 6, "clip_sample": False, "timestep_spacing": "trailing"} | settings
    ours = kind(beta_start=0.1, beta_end=0.5, beta_schedule="sub_vp", **few)
    same = kind(trained_betas=ours.betas.tolist(), **few)
    eps, x = (torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    for scheduler in (ours, same):
        scheduler.set_timesteps(3)
    assert ours.timesteps.tolist() == same.timesteps.tolist()
    for t in ours.timesteps:
        steps = [
            scheduler.step(eps, t.item(), x, generator=torch.Generator().manual_seed(2)) for scheduler in (ours, same)
        ]
        torch.testing.assert_close(steps[0].prev_sample, steps[1].prev_sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("m", "v"), [(0.0, 1.0), (0.7, 0.09)])
def test_sampling_a_gaussian_on_a_sub_vp_path_with_the_optimal_variance_is_exact(m, v):
    law, path = Gaussian(m, v), {"num_train_timesteps": 40, "beta_start": 0.002, "beta_end": 0.4} | SUB_VP
    alpha, sigma = DDPMAncestralScheduler(**path).signal_and_noise(torch.arange(40))
    scheduler = DDPMAncestralScheduler(
        **path,
        variance_type="optimal",
        mean_squared_noise=(sigma**2 / (alpha**2 * v + sigma**2)).tolist(),  # of the exact prediction
        last_step_noise=True,
        clip_sample=False,
        timestep_spacing="trailing",
    )
    network = law.as_model(scheduler)
    scheduler.set_timesteps(8)
    mean, variance = alpha[39] * m, alpha[39] ** 2 * v + sigma[39] ** 2  # of x_T
    for t in scheduler.timesteps:
        # a step is out = gain x + shift + deviation z, which three probes tell apart
        def out(x, seed, t=int(t)):
            x = torch.full((1, 1, 1, 1), x, dtype=torch.float64)
            return scheduler.step(network(x, t).sample, t, x, generator=torch.Generator().manual_seed(seed))[0].item()

        z = [torch.randn(1, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
        deviation = (out(0.0, 0) - out(0.0, 1)) / (z[0] - z[1]).item()
        shift = out(0.0, 0) - deviation * z[0].item()
        gain = out(1.0, 0) - out(0.0, 0)
        mean, variance = gain * mean + shift, gain**2 * variance + deviation**2
    assert float(mean) == pytest.approx(m, abs=1e-9)
    assert float(variance) == pytest.approx(v, rel=1e-9)


@pytest.mark.parametrize(
    "kind",
    [
        DDPMAncestralScheduler,
        ModifiedEulerMaruyamaScheduler,
        AnnealedLangevinScheduler,
        PredictorCorrectorScheduler,
    ],
)
def test_a_sub_vp_path_survives_saving_and_a_change_of_scheduler(tmp_path, kind):
    first = DDPMAncestralScheduler(num_train_timesteps=100, beta_start=0.001, beta_end=0.3, **SUB_VP)
    scheduler = kind.from_config(first.config)
    scheduler.save_pretrained(tmp_path)
    timesteps = torch.arange(100)
    for other in (scheduler, kind.from_pretrained(tmp_path), DDPMAncestralScheduler.from_config(scheduler.config)):
        for one, expected in zip(other.signal_and_noise(timesteps), first.signal_and_noise(timesteps), strict=True):
            assert torch.equal(one, expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_start": 0.0}, r"beta_start and beta_end must lie in \(0, 1\], got 0\.0 and 0\.02"),
        ({"beta_end": -0.1}, r"got 0\.0001 and -0\.1"),
        ({"beta_end": 1.5}, r"got 0\.0001 and 1\.5"),
        ({"beta_start": float("nan")}, "got nan and 0.02"),
        ({"rescale_betas_zero_snr": True}, "a sub_vp path ends where beta_end says"),
        ({"num_train_timesteps": 10_000, "beta_end": 1.0}, "10000 timesteps of beta up to 1.0 leave no signal"),
    ],
)
def test_a_sub_vp_path_that_cannot_be_built_is_refused_with_the_value(config, message):
    with pytest.raises(ValueError, match=message):
        DDPMAncestralScheduler(**(SUB_VP | config))
