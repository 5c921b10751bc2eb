r"""Properties of a Gaussian path: its table, its schedules, its laws, and the bookkeeping of positions.

Oracles: Diffusers' own tables, exact rational arithmetic for the spacings, Karras et al. 2022, Eq. 5, and Bayes' rule
on densities from torch.distributions, which holds for every x_s:

    q(x_s | x_t, x_0) q(x_t | x_0) = q(x_t | x_s) q(x_s | x_0)
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from torch.distributions import Normal

from annealers.schedulers import ColdDiffusionScheduler, DDPMAncestralScheduler
from annealers.schedulers.gaussian_path import DATA, Level, Visit, transition

BETA_SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"]
LADDER = {"beta_schedule": "geometric", "sigma_min": 0.02, "sigma_max": 40.0}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
PATHS = [{"beta_schedule": name} for name in BETA_SCHEDULES] + [LADDER, ZERO_SNR]
FLOW = {"prediction_type": "flow_prediction"}
SPACINGS = ["leading", "linspace", "trailing", "karras", "geometric"]
PREDICTION_TYPES = ["epsilon", "sample", "v_prediction", "score"]
SHAPES = [(6,), (6, 3), (6, 2, 5), (6, 1, 4, 4), (6, 2, 3, 4, 4)]  # the first axis is the batch


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole_table(scheduler):
    return scheduler.signal_and_noise(torch.arange(len(scheduler)))


def like(coefficient, sample):
    return coefficient.reshape(-1, *[1] * (sample.ndim - 1))


# ---- the table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 50, 1000])
@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_the_float32_tables_are_bit_equal_to_those_that_diffusers_trains_on(schedule, T):
    ours = DDPMAncestralScheduler(num_train_timesteps=T, beta_schedule=schedule)
    theirs = DDPMScheduler(num_train_timesteps=T, beta_schedule=schedule)
    for name in ("betas", "alphas", "alphas_cumprod"):
        assert getattr(ours, name).dtype is torch.float32
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    alpha, sigma = whole_table(ours)
    torch.testing.assert_close(alpha**2, theirs.alphas_cumprod.double(), rtol=1e-14, atol=0)
    torch.testing.assert_close(sigma**2, 1 - theirs.alphas_cumprod.double(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("path", PATHS)
def test_the_table_does_not_depend_on_the_default_dtype(path):
    expected = DDPMAncestralScheduler(num_train_timesteps=20, **path)
    torch.set_default_dtype(torch.float64)
    try:
        scheduler = DDPMAncestralScheduler(num_train_timesteps=20, **path)
    finally:
        torch.set_default_dtype(torch.float32)
    for name in ("betas", "alphas", "alphas_cumprod", "_alphas", "_sigmas"):
        assert getattr(scheduler, name).dtype is getattr(expected, name).dtype
        assert torch.equal(getattr(scheduler, name), getattr(expected, name)), name


@pytest.mark.parametrize(
    ("path", "beta"),
    [
        ({"beta_schedule": "linear"}, lambda u: 1e-4 + (0.02 - 1e-4) * u),
        (
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
            lambda u: (math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * u) ** 2,
        ),
        ({"beta_schedule": "sigmoid"}, lambda u: 1e-4 + (0.02 - 1e-4) / (1 + np.exp(6 - 12 * u))),
    ],
)
def test_beta_schedules_are_their_closed_forms_up_to_float32(path, beta):
    scheduler = DDPMAncestralScheduler(**path)
    alphas_cumprod = np.cumprod(1 - beta(np.linspace(0, 1, 1000)))
    np.testing.assert_allclose(whole_table(scheduler)[0] ** 2, alphas_cumprod, rtol=3e-5)


def test_stable_diffusions_schedule_ends_at_its_published_signal():
    path = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    alpha, _ = DDPMAncestralScheduler(**path).signal_and_noise(999)
    assert float(alpha) ** 2 == pytest.approx(4.66e-3, rel=1e-3)


def test_the_cosine_schedule_is_the_squared_cosine_of_nichol_and_dhariwal():
    alpha, _ = whole_table(DDPMAncestralScheduler(beta_schedule="squaredcos_cap_v2"))
    f = np.cos(((np.arange(1001) / 1000 + 0.008) / 1.008) * np.pi / 2) ** 2
    np.testing.assert_allclose(alpha[:-1] ** 2, (f / f[0])[1:-1], rtol=2e-4)
    assert float(alpha[-1] / alpha[-2]) ** 2 == pytest.approx(0.001, rel=1e-4)  # the last beta is capped at 0.999


def test_the_ladder_is_geometric_from_sigma_min_to_sigma_max():
    alpha, sigma = whole_table(DDPMAncestralScheduler(num_train_timesteps=232, **LADDER))
    np.testing.assert_allclose(sigma / alpha, np.geomspace(0.02, 40.0, 232), rtol=1e-13)


@pytest.mark.parametrize("path", PATHS)
def test_every_path_is_variance_preserving_and_loses_signal_at_every_timestep(path):
    alpha, sigma = whole_table(DDPMAncestralScheduler(**path))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000, dtype=torch.float64), rtol=1e-15, atol=1e-15)
    assert (alpha.diff() < 0).all()
    assert 0 <= alpha[-1] < alpha[0] < 1


@pytest.mark.parametrize("path", PATHS)
def test_betas_and_alphas_say_what_the_table_says(path):
    scheduler = DDPMAncestralScheduler(**path)
    alpha = torch.cat([torch.ones(1, dtype=torch.float64), whole_table(scheduler)[0]])
    torch.testing.assert_close(scheduler.betas.double(), 1 - (alpha[1:] / alpha[:-1]) ** 2, rtol=0, atol=3e-7)
    torch.testing.assert_close(scheduler.alphas, 1 - scheduler.betas, rtol=0, atol=0)


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_rescaling_ends_in_pure_noise_and_keeps_the_first_level(schedule):
    plain, _ = whole_table(DDPMAncestralScheduler(beta_schedule=schedule))
    rescaled = DDPMAncestralScheduler(beta_schedule=schedule, rescale_betas_zero_snr=True)
    alpha, sigma = whole_table(rescaled)
    assert (alpha[-1], sigma[-1]) == (0, 1)
    assert float(alpha[0]) == pytest.approx(float(plain[0]), abs=1e-7)
    # in between alpha is moved by one affine map (Lin et al. 2023, Algorithm 1)
    np.testing.assert_allclose(
        (alpha - alpha[500]) / (alpha[0] - alpha[500]), (plain - plain[500]) / (plain[0] - plain[500]), atol=2e-6
    )
    theirs = DDPMScheduler(beta_schedule=schedule, rescale_betas_zero_snr=True)
    torch.testing.assert_close(rescaled.alphas_cumprod, theirs.alphas_cumprod, rtol=0, atol=1e-6)
    torch.testing.assert_close(rescaled.betas, theirs.betas, rtol=0, atol=1e-6)


def test_rescaled_trained_betas_are_the_betas_of_the_rescaled_path():
    scheduler = DDPMAncestralScheduler(trained_betas=[0.1, 0.2, 0.3], rescale_betas_zero_snr=True)
    theirs = DDPMScheduler(trained_betas=[0.1, 0.2, 0.3], rescale_betas_zero_snr=True)
    torch.testing.assert_close(scheduler.betas, theirs.betas)
    assert scheduler.betas[-1] == 1


@pytest.mark.parametrize("betas", [[0.1, 0.3], (0.1, 0.3), np.array([0.1, 0.3])])
def test_trained_betas_are_the_path_whatever_num_train_timesteps_says(betas):
    scheduler = DDPMAncestralScheduler(trained_betas=betas, beta_schedule="unknown to us")
    assert len(scheduler) == 2
    assert scheduler.betas.tolist() == torch.tensor([0.1, 0.3]).tolist()
    np.testing.assert_allclose(whole_table(scheduler)[0] ** 2, [0.9, 0.9 * 0.7], rtol=1e-7)
    assert scheduler.timesteps.tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"1 \.\. 2"):
        scheduler.set_timesteps(3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_schedule": "laplace"}, r"beta_schedule must be one of .* got 'laplace'"),
        ({"timestep_spacing": "even"}, r"timestep_spacing must be one of .* got 'even'"),
        ({"prediction_type": "noise"}, r"prediction_type must be one of .* got 'noise'"),
        ({"num_train_timesteps": 0}, r"positive integer, got 0"),
        ({"num_train_timesteps": 0, **LADDER}, r"positive integer, got 0"),
        ({"num_train_timesteps": 10.0}, r"positive integer, got 10\.0"),
        ({"num_train_timesteps": True}, r"positive integer, got True"),
        ({"beta_start": 0.0}, r"\(0, 1\]"),
        ({"beta_end": 2.0}, r"\(0, 1\]"),
        ({"trained_betas": [0.1, -0.1]}, r"\(0, 1\], got tensor\(\[ 0\.1000, -0\.1000"),
        ({"trained_betas": [0.1, float("nan")]}, r"\(0, 1\]"),
        ({"trained_betas": []}, r"\(0, 1\]"),
        ({"trained_betas": [[0.1, 0.2]]}, r"\(0, 1\]"),
        ({"trained_betas": [1e-9, 0.1]}, r"must lose signal.* 9\.99\d*e-10 to 0\.1"),
        ({"trained_betas": [0.1, 1.0, 0.1]}, r"must lose signal"),
        ({"beta_start": 0.01, "beta_end": 0.2}, r"must lose signal"),
        ({"num_train_timesteps": 1, "rescale_betas_zero_snr": True}, r"must lose signal"),
        ({"beta_schedule": "geometric"}, r"0 < sigma_min < sigma_max.*sigma_min=None"),
        ({"beta_schedule": "geometric", "sigma_min": 1.0, "sigma_max": 1.0}, r"sigma_min=1\.0 and sigma_max=1\.0"),
        ({"beta_schedule": "geometric", "sigma_min": 0.0, "sigma_max": 1.0}, r"sigma_min=0\.0"),
        ({"rescale_betas_zero_snr": True, **LADDER}, r"rescale_betas_zero_snr is for products of betas"),
    ],
)
def test_a_path_that_cannot_be_built_is_refused_with_the_value(config, message):
    with pytest.raises(ValueError, match=message):
        DDPMAncestralScheduler(**config)


@pytest.mark.parametrize("timesteps", [7, np.int64(7), torch.tensor(7), torch.tensor([7]), torch.tensor([[7, 7, 7]])])
def test_signal_and_noise_have_the_shape_of_the_timesteps(timesteps):
    scheduler = DDPMAncestralScheduler()
    alpha, sigma = scheduler.signal_and_noise(timesteps)
    assert alpha.shape == sigma.shape == torch.as_tensor(timesteps).shape
    assert alpha.dtype is sigma.dtype is torch.float64
    assert (alpha**2).unique().item() == pytest.approx(scheduler.alphas_cumprod[7].item(), rel=1e-14)


def test_timestep_minus_one_is_the_data():
    alpha, sigma = DDPMAncestralScheduler().signal_and_noise(torch.tensor([-1, 0]))
    assert (alpha[0], sigma[0]) == (1, 0)
    assert alpha[1] < 1


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        (torch.tensor([1.0]), "integers, got torch.float32"),
        (0.5, "integers, got torch.float32"),
        (torch.tensor([0, 1000]), r"0 \.\. 999, got 0 \.\. 1000"),
        (-2, r"0 \.\. 999, got -2 \.\. -2"),
    ],
)
def test_timesteps_off_the_path_are_refused(timesteps, message):
    with pytest.raises(ValueError, match=message):
        DDPMAncestralScheduler().signal_and_noise(timesteps)


# ---- the schedule ---------------------------------------------------------------------------------------------------


def schedule(N, T=1000, **config):
    scheduler = DDPMAncestralScheduler(num_train_timesteps=T, **config)
    scheduler.set_timesteps(N)
    return scheduler.timesteps.tolist()


def test_a_new_scheduler_walks_the_whole_chain():
    scheduler = DDPMAncestralScheduler(num_train_timesteps=5)
    assert scheduler.timesteps.tolist() == [4, 3, 2, 1, 0]
    assert scheduler.timesteps.dtype is torch.int64
    assert scheduler.num_inference_steps is None
    assert len(scheduler) == 5


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_spacings_are_those_of_diffusers(spacing):
    ours = DDPMAncestralScheduler(timestep_spacing=spacing)
    theirs = DDPMScheduler(timestep_spacing=spacing)
    compared = 0
    for N in range(2, 1001):
        ours.set_timesteps(N)
        theirs.set_timesteps(N)
        if len(theirs.timesteps) == N:  # theirs may end at -1, one entry too many, under "trailing" (N = 61 for one)
            assert torch.equal(ours.timesteps, theirs.timesteps), N
            compared += 1
    assert compared > 900


@pytest.mark.parametrize("N", [1, 7, 16, 48, 61, 333, 1000])
def test_trailing_timesteps_are_nearest_to_even_parts_counted_from_the_end(N):
    timesteps = schedule(N, timestep_spacing="trailing")
    assert len(timesteps) == N
    assert timesteps[0] == 999
    for i, t in enumerate(timesteps):
        assert abs(t + 1 - (1000 - i * Fraction(1000, N))) <= Fraction(1, 2)


@pytest.mark.parametrize("N", [2, 7, 16, 48, 61, 333, 1000])
def test_linspace_timesteps_are_nearest_to_even_parts_with_both_ends(N):
    timesteps = schedule(N, timestep_spacing="linspace")
    assert (timesteps[0], timesteps[-1]) == (999, 0)
    for i, t in enumerate(timesteps):
        assert abs(t - 999 * Fraction(N - 1 - i, N - 1)) <= Fraction(1, 2)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("N", [1, 7, 30, 333])
def test_leading_timesteps_are_multiples_of_the_integer_ratio_plus_the_offset(N, offset):
    expected = [i * (1000 // N) + offset for i in reversed(range(N))]
    assert schedule(N, timestep_spacing="leading", steps_offset=offset) == expected


@pytest.mark.parametrize(
    ("path", "T", "N"),
    [
        *[(path, T, N) for path in PATHS[:5] for T, N in [(1000, 2), (1000, 10), (1000, 40), (25, 4)]],
        # where the nearest timestep in log SNR is not the nearest in the ratio itself
        ({"beta_schedule": "scaled_linear"}, 25, 9),
        ({"beta_schedule": "sigmoid"}, 25, 10),
    ],
)
def test_karras_levels_lie_within_half_a_timestep_of_their_equation_5(path, T, N):
    scheduler = DDPMAncestralScheduler(timestep_spacing="karras", num_train_timesteps=T, **path)
    scheduler.set_timesteps(N)
    alpha, sigma = whole_table(scheduler)
    log_ratio = (sigma / alpha).log()
    smallest, largest = (sigma / alpha)[[0, -1]] ** (1 / 7)
    middles = (log_ratio[1:] + log_ratio[:-1]) / 2  # between timestep t and t + 1
    lower, upper = torch.cat([log_ratio[:1], middles]), torch.cat([middles, log_ratio[-1:]])
    timesteps = scheduler.timesteps.tolist()
    assert (timesteps[0], timesteps[-1]) == (T - 1, 0)
    moved = []
    for i, t in enumerate(timesteps):
        wanted = 7 * (largest + i / (N - 1) * (smallest - largest)).log()
        if not lower[t] - 1e-9 <= wanted <= upper[t] + 1e-9:
            moved.append(t)
    # a level may move only where two would coincide, as at the noisy end of a cosine path, and it then has a neighbour
    assert all(t + 1 in timesteps or t - 1 in timesteps for t in moved)
    assert not moved or path["beta_schedule"] == "squaredcos_cap_v2"


@pytest.mark.parametrize("T", [1, 2, 50])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_as_many_steps_as_train_timesteps_are_the_whole_chain(spacing, T):
    assert schedule(T, T, timestep_spacing=spacing) == list(reversed(range(T)))


@pytest.mark.parametrize("spacing", ["linspace", "trailing", "karras", "geometric"])
def test_one_step_starts_from_pure_noise(spacing):
    assert schedule(1, timestep_spacing=spacing) == [999]


def test_one_leading_step_is_at_the_offset():
    assert schedule(1, timestep_spacing="leading") == [0]
    assert schedule(1, timestep_spacing="leading", steps_offset=1) == [1]


def test_an_offset_that_overshoots_is_cut_to_the_chain():
    # Stable Diffusion's config with 1000 steps asks for timestep 1000
    assert schedule(1000, timestep_spacing="leading", steps_offset=1) == list(reversed(range(1000)))
    assert schedule(4, timestep_spacing="leading", steps_offset=300) == [999, 800, 550, 300]
    assert schedule(4, timestep_spacing="leading", steps_offset=-300) == [450, 200, 1, 0]


@pytest.mark.parametrize("offset", [0, 1, 9])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_schedule_is_strictly_decreasing_on_the_chain(spacing, offset):
    for N in range(1, 41):
        timesteps = schedule(N, 40, timestep_spacing=spacing, steps_offset=offset)
        assert len(timesteps) == N
        assert timesteps[0] <= 39
        assert timesteps[-1] >= 0
        assert (np.diff(timesteps) < 0).all()


def test_levels_that_coincide_inside_the_chain_move_apart():
    betas = [0.01] * 10 + [0.999] + [0.01] * 10  # hardly a level between the two halves, where Eq. 5 wants most
    for N in range(1, 22):
        timesteps = schedule(N, timestep_spacing="karras", trained_betas=betas)
        assert len(timesteps) == N
        assert (np.diff(timesteps) < 0).all()


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_explicit_timesteps_are_taken_as_they_are(kind):
    scheduler = DDPMAncestralScheduler()
    scheduler.set_timesteps(timesteps=kind([999, 500, 3]))
    assert scheduler.timesteps.tolist() == [999, 500, 3]
    assert scheduler.timesteps.dtype is torch.int64
    assert scheduler.num_inference_steps == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"num_inference_steps": 2, "timesteps": [5, 3]}, "exactly one"),
        ({"num_inference_steps": 0}, r"1 \.\. 1000 .* got 0"),
        ({"num_inference_steps": 1001}, r"1 \.\. 1000 .* got 1001"),
        ({"num_inference_steps": 10.0}, r"got 10\.0"),
        ({"num_inference_steps": True}, "got True"),
        ({"timesteps": []}, r"non-empty list of integers, got \[\]"),
        ({"timesteps": 5}, "non-empty list of integers, got 5"),
        ({"timesteps": [[5, 3]]}, "non-empty list of integers"),
        ({"timesteps": [5.5, 3]}, r"integers, got \[5\.5, 3\]"),
        ({"timesteps": [1000, 3]}, r"0 \.\. 999, got 3 \.\. 1000"),
        ({"timesteps": [3, -1]}, r"0 \.\. 999, got -1 \.\. 3"),
        ({"timesteps": [3, 5]}, r"strictly decreasing, got \[3, 5\]"),
        ({"timesteps": [5, 5]}, r"strictly decreasing, got \[5, 5\]"),
    ],
)
def test_a_schedule_that_cannot_be_walked_is_refused_with_the_value(arguments, message):
    scheduler = DDPMAncestralScheduler()
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**arguments)
    assert len(scheduler.timesteps) == scheduler.num_inference_steps == 10  # nothing was changed


@pytest.mark.parametrize("prediction_type", ["epsilon", "score"])
def test_pure_noise_is_refused_where_the_prediction_cannot_tell_the_data(prediction_type):
    scheduler = DDPMAncestralScheduler(
        rescale_betas_zero_snr=True, prediction_type=prediction_type, timestep_spacing="trailing"
    )
    message = f"timestep 999 has no signal .* prediction_type='{prediction_type}', unlike 'v_prediction'"
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match=message):  # the whole chain of a new scheduler starts there too
        scheduler.step(torch.zeros(1, 2), 999, torch.zeros(1, 2))
    scheduler.set_timesteps(timesteps=[998, 500])  # the level before it has signal
    assert scheduler.step(torch.zeros(1, 2), 998, torch.zeros(1, 2)).prev_sample.isfinite().all()


def test_karras_spacing_of_a_path_that_ends_in_pure_noise_is_refused():
    for prediction_type in PREDICTION_TYPES:
        scheduler = DDPMAncestralScheduler(
            timestep_spacing="karras", rescale_betas_zero_snr=True, prediction_type=prediction_type
        )
        with pytest.raises(ValueError, match="timestep_spacing='karras', which spaces log SNR, needs some"):
            scheduler.set_timesteps(10)


# ---- the position in the schedule -----------------------------------------------------------------------------------


def run(scheduler, timesteps, x):
    """One trajectory with a network that is the hyperbolic tangent; also the positions after each step."""
    positions, generator = [], torch.Generator().manual_seed(0)
    for t in timesteps:
        x = scheduler.step(torch.tanh(x), t, x, generator=generator).prev_sample
        positions.append(scheduler.step_index)
    return x, positions


FORMS_OF_A_TIMESTEP = {
    "view": lambda t: t,
    "view (1,)": lambda t: t[None],
    "clone": lambda t: t.clone(),
    "int": int,
    "float": float,
    "numpy": lambda t: np.int64(int(t)),
    "float tensor": lambda t: t.to(torch.float32),
    "int32 tensor": lambda t: t.to(torch.int32),
}


@pytest.mark.parametrize("begin", [None, 0])
@pytest.mark.parametrize("form", FORMS_OF_A_TIMESTEP)
def test_every_form_of_a_timestep_finds_the_same_position(form, begin):
    scheduler = DDPMAncestralScheduler(clip_sample=False)
    scheduler.set_timesteps(8)
    expected, _ = run(scheduler, scheduler.timesteps, draw(2, 3))
    scheduler.set_timesteps(8)
    assert (scheduler.step_index, scheduler.begin_index) == (None, None)
    if begin is not None:
        scheduler.set_begin_index(begin)
        assert scheduler.begin_index == begin
    result, positions = run(scheduler, map(FORMS_OF_A_TIMESTEP[form], scheduler.timesteps), draw(2, 3))
    assert positions == list(range(1, 9))
    assert torch.equal(result, expected)


@pytest.mark.parametrize("form", FORMS_OF_A_TIMESTEP)
@pytest.mark.parametrize("begin", [None, 5])
def test_a_run_may_start_in_the_middle_of_the_schedule(form, begin):
    scheduler = DDPMAncestralScheduler(clip_sample=False)
    scheduler.set_timesteps(8)
    expected, _ = run(scheduler, scheduler.timesteps[5:].tolist(), draw(2, 3))
    scheduler.set_timesteps(8)
    if begin is not None:
        scheduler.set_begin_index(begin)
    result, positions = run(scheduler, map(FORMS_OF_A_TIMESTEP[form], scheduler.timesteps[5:]), draw(2, 3))
    assert positions == [6, 7, 8]
    assert torch.equal(result, expected)


@pytest.mark.parametrize("form", FORMS_OF_A_TIMESTEP)
def test_a_run_may_be_repeated_or_broken_off_without_setting_the_timesteps_again(form):
    scheduler = DDPMAncestralScheduler(clip_sample=False)
    scheduler.set_timesteps(8)
    expected, _ = run(scheduler, scheduler.timesteps, draw(2, 3))
    for length in (8, 3, 8):
        timesteps = map(FORMS_OF_A_TIMESTEP[form], scheduler.timesteps[:length])
        result, positions = run(scheduler, timesteps, draw(2, 3))
        assert positions == list(range(1, length + 1))
    assert torch.equal(result, expected)


def test_a_step_leaves_from_the_level_it_is_given_in_any_order():
    scheduler = DDPMAncestralScheduler(clip_sample=False)
    scheduler.set_timesteps(8)
    x = draw(2, 3)
    expected = {int(t): run(scheduler, [t], x)[0] for t in scheduler.timesteps}
    for t in [500, 0, 875, 875, 125]:
        assert torch.equal(run(scheduler, [t], x)[0], expected[t])


@pytest.mark.parametrize("timestep", [874, 875.5, -1, "875", None, torch.tensor(874), torch.tensor(875.5)])
def test_a_timestep_that_is_not_in_the_schedule_is_refused(timestep):
    scheduler = DDPMAncestralScheduler()
    scheduler.set_timesteps(8)
    value = timestep.item() if isinstance(timestep, torch.Tensor) else timestep
    with pytest.raises(ValueError, match=rf"timestep {value} is not one of the 8 of the schedule, 875 \.\. 0"):
        scheduler.step(torch.zeros(1, 2), timestep, torch.zeros(1, 2))
    assert scheduler.step_index is None


def test_one_timestep_per_sample_is_refused():
    scheduler = DDPMAncestralScheduler()
    with pytest.raises(ValueError, match="one timestep for the whole batch, got 2"):
        scheduler.step(torch.zeros(2, 2), torch.tensor([5, 5]), torch.zeros(2, 2))


def test_setting_the_timesteps_forgets_the_position():
    scheduler = DDPMAncestralScheduler()
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(3)
    run(scheduler, scheduler.timesteps[3:5], draw(2, 3))
    scheduler.set_timesteps(4)
    assert (scheduler.step_index, scheduler.begin_index) == (None, None)


def test_a_timestep_on_another_device_is_the_one_that_is_due_and_is_not_read():
    # a meta tensor has no value to read
    scheduler, unreadable, x = DDPMAncestralScheduler(clip_sample=False), torch.empty((), device="meta"), draw(2, 3)
    scheduler.set_timesteps(8)
    expected, _ = run(scheduler, scheduler.timesteps[5:], x)
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(5)
    result, positions = run(scheduler, [unreadable] * 3, x)
    assert positions == [6, 7, 8]
    assert torch.equal(result, expected)
    with pytest.raises(ValueError, match="all 8 steps are taken; call set_timesteps"):
        run(scheduler, [unreadable], x)


def test_a_stale_view_of_an_earlier_schedule_is_matched_by_value():
    scheduler = DDPMAncestralScheduler(clip_sample=False)
    scheduler.set_timesteps(4)
    stale = scheduler.timesteps[2]  # 250, which the next schedule has at another position
    scheduler.set_timesteps(8)
    run(scheduler, [stale], draw(2, 3))
    assert scheduler.step_index == 1 + scheduler.timesteps.tolist().index(250)


@pytest.mark.parametrize("begin", [None, 0])
@pytest.mark.parametrize("form", ["view", "view (1,)", "clone", "float"])
def test_every_form_of_a_time_finds_the_same_position_on_a_flow_path(form, begin):
    scheduler = DDPMAncestralScheduler(clip_sample=False, shift=3.0, **FLOW)
    scheduler.set_timesteps(7)
    expected, _ = run(scheduler, scheduler.timesteps, draw(2, 3))
    for start in (0, 4):
        scheduler.set_timesteps(7)
        if begin is not None:
            scheduler.set_begin_index(start)
        forms = [FORMS_OF_A_TIMESTEP[form](t) for t in scheduler.timesteps[start:]]
        result, positions = run(scheduler, forms, draw(2, 3))
        assert positions == list(range(start + 1, 8))
        assert start or torch.equal(result, expected)
    with pytest.raises(ValueError, match=r"timestep 500\.25 is not one of the 7 of the schedule, 1000\.0 \.\. "):
        run(scheduler, [500.25], draw(2, 3))


class TwoCalls(DDPMAncestralScheduler):
    """Calls its network twice on each level: the first call of a level stays on it."""

    _entries_per_level = 2

    def _visits(self, levels):
        visits = super()._visits(levels)
        return [each for visit in visits for each in (Visit(visit.here, visit.here), visit)]

    def step(self, model_output, timestep, sample, **kwargs):
        position = self._position(timestep)
        self._step_index = position + 1
        return self._schedule[position]


def visited(scheduler, timesteps):
    """(level, does the step stay on it) of each call."""
    steps = [scheduler.step(None, t, None) for t in timesteps]
    return [(here.timestep, here == there) for here, there in steps]


@pytest.mark.parametrize("form", FORMS_OF_A_TIMESTEP)
@pytest.mark.parametrize("begin", [None, 0])
@pytest.mark.parametrize("first", [0, 2, 6])
def test_repeated_timesteps_are_told_apart_in_every_form_and_from_any_level_on(first, begin, form):
    scheduler = TwoCalls()
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [750, 750, 500, 500, 250, 250, 0, 0]
    if begin is not None:
        scheduler.set_begin_index(first)
    part = scheduler.timesteps[first:]  # as img2img and the SDXL refiner cut it
    expected = [(t, stays) for t in (750, 500, 250, 0) for stays in (True, False)][first:]
    for _ in range(2):  # and once more without setting them again
        assert visited(scheduler, map(FORMS_OF_A_TIMESTEP[form], part)) == expected
        assert scheduler.step_index == 8


def test_repeated_timesteps_by_value_go_on_with_the_call_that_is_due():
    scheduler = TwoCalls()
    scheduler.set_timesteps(4)
    assert visited(scheduler, [500, 500, 250]) == [(500, True), (500, False), (250, True)]
    assert visited(scheduler, [750]) == [(750, True)]  # another level begins anew
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(3)
    assert visited(scheduler, [500, 250]) == [(500, False), (250, True)]


@pytest.mark.parametrize("view", [lambda t: t[2:], lambda t: t[2:8][0:], lambda t: t[1:][1:], lambda t: t[-6:]])
def test_a_view_of_a_slice_is_its_own_position(view):
    scheduler = TwoCalls()
    scheduler.set_timesteps(4)
    cut = view(scheduler.timesteps)
    assert visited(scheduler, cut[3:4])[0] == (250, False)
    assert scheduler.step_index == 6
    assert visited(scheduler, cut[::2]) == [(500, True), (250, True), (0, True)]


def test_a_visit_leads_to_the_next_level_and_the_last_to_the_data():
    scheduler = DDPMAncestralScheduler(num_train_timesteps=20)
    scheduler.set_timesteps(3)
    alpha, sigma = whole_table(scheduler)
    levels = [Level(t, alpha[t].item(), sigma[t].item()) for t in scheduler.timesteps.tolist()]
    assert scheduler._schedule == [Visit(*pair) for pair in zip(levels, [*levels[1:], DATA], strict=True)]
    assert DATA == (-1, 1, 0)


# ---- forward: data to noise -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("path", PATHS)
def test_noise_velocity_and_targets_are_the_two_coefficients_of_each_sample(path, shape):
    scheduler = DDPMAncestralScheduler(**path)
    x_0, eps, timesteps = draw(*shape, seed=1), draw(*shape, seed=2), torch.tensor([0, 1, 250, 499, 998, 999])
    alpha, sigma = (like(c, x_0) for c in scheduler.signal_and_noise(timesteps))
    torch.testing.assert_close(scheduler.add_noise(x_0, eps, timesteps), alpha * x_0 + sigma * eps, rtol=0, atol=0)
    torch.testing.assert_close(scheduler.get_velocity(x_0, eps, timesteps), alpha * eps - sigma * x_0, rtol=0, atol=0)
    expected = {
        "epsilon": eps,
        "sample": x_0,
        "v_prediction": alpha * eps - sigma * x_0,
        "score": Normal(alpha * x_0, sigma),  # its gradient at x_t, below
    }
    for prediction_type in PREDICTION_TYPES:
        scheduler.register_to_config(prediction_type=prediction_type)
        target = scheduler.training_target(x_0, eps, timesteps)
        if prediction_type == "score":
            x_t = (alpha * x_0 + sigma * eps).requires_grad_()
            (score,) = torch.autograd.grad(expected["score"].log_prob(x_t).sum(), x_t)
            torch.testing.assert_close(target, score, rtol=1e-9, atol=1e-9)
        else:
            torch.testing.assert_close(target, expected[prediction_type], rtol=0, atol=0)


@pytest.mark.parametrize("timesteps", [321, torch.tensor(321), torch.tensor([321]), [321]])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_timestep_serves_the_whole_batch(shape, timesteps):
    scheduler = DDPMAncestralScheduler(prediction_type="v_prediction")
    x_0, eps, per_sample = draw(*shape, seed=1), draw(*shape, seed=2), torch.full((6,), 321)
    for method in (scheduler.add_noise, scheduler.get_velocity, scheduler.training_target, scheduler.original_sample):
        assert torch.equal(method(x_0, eps, timesteps), method(x_0, eps, per_sample))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_forward_keeps_the_dtype_and_computes_in_float32_at_least(dtype):
    # 1 - alpha_t^2 = 1e-4 at t = 0 is below the resolution of half precision around 1
    scheduler = DDPMAncestralScheduler(prediction_type="score")
    x_0, eps, t = draw(6, 4, seed=1).to(dtype), draw(6, 4, seed=2).to(dtype), torch.zeros(6, dtype=torch.long)
    alpha, sigma = scheduler.signal_and_noise(0)
    working = torch.promote_types(dtype, torch.float32)
    results = {
        "add_noise": (scheduler.add_noise(x_0, eps, t), alpha * x_0.double() + sigma * eps.double()),
        "get_velocity": (scheduler.get_velocity(x_0, eps, t), alpha * eps.double() - sigma * x_0.double()),
        "training_target": (scheduler.training_target(x_0, eps, t), -eps.double() / sigma),
    }
    for name, (result, exact) in results.items():
        assert result.dtype is dtype, name
        error = (result.double() - exact).abs().max() / exact.abs().max()
        assert error <= torch.finfo(dtype).eps + 4 * torch.finfo(working).eps, name


@pytest.mark.parametrize("method", ["add_noise", "get_velocity", "training_target", "original_sample"])
def test_timesteps_that_do_not_fit_the_batch_are_refused(method):
    scheduler = DDPMAncestralScheduler(prediction_type="v_prediction")
    for batch in (4, 1):
        with pytest.raises(ValueError, match=f"one per sample, {batch}, got 3"):
            getattr(scheduler, method)(torch.zeros(batch, 2), torch.zeros(batch, 2), torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
def test_data_that_are_not_floating_point_are_refused(method):
    with pytest.raises(ValueError, match="floating-point tensors, got torch.uint8"):
        getattr(DDPMAncestralScheduler(), method)(torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 3), 5)


def test_scale_model_input_changes_nothing():
    x = draw(2, 3)
    scheduler = DDPMAncestralScheduler(**LADDER)
    assert scheduler.scale_model_input(x, 999) is x
    assert scheduler.scale_model_input(x) is x
    assert (scheduler.init_noise_sigma, scheduler.order) == (1, 1)


# ---- forward on a flow path -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_flow_path_mixes_data_and_noise_and_its_target_is_their_difference(shape, dtype):
    scheduler = DDPMAncestralScheduler(**FLOW, shift=3.0)  # the shift moves the schedule, not the path
    x_0, eps = draw(*shape, seed=1).to(dtype), draw(*shape, seed=2).to(dtype)
    timesteps = torch.tensor([1000.0, 999.5, 640.25, 20.0, 0.125, 0.0])
    t = like(timesteps.double() / 1000, x_0)
    rounding = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4e-7 if dtype is not torch.float64 else 4e-8}
    x_t = scheduler.add_noise(x_0, eps, timesteps)
    assert x_t.dtype is dtype
    torch.testing.assert_close(x_t.double(), (1 - t) * x_0.double() + t * eps.double(), **rounding)
    assert torch.equal(scheduler.scale_noise(x_0, timesteps, eps), x_t)
    target = scheduler.training_target(x_0, eps, timesteps)
    assert torch.equal(target, eps - x_0)
    velocity = scheduler.get_velocity(x_0, eps, timesteps)
    torch.testing.assert_close(velocity.double(), (1 - t) * eps.double() - t * x_0.double(), **rounding)
    restored = scheduler.original_sample(target, x_t, timesteps)
    assert restored.dtype is torch.promote_types(dtype, torch.float32)
    lost = 8 * torch.finfo(dtype).eps * float(eps.double().abs().max() + x_0.double().abs().max())
    torch.testing.assert_close(restored.double(), x_0.double(), rtol=0, atol=max(lost, 4e-7))


def test_the_forward_process_of_a_flow_is_that_of_the_flow_matching_scheduler():
    ours, theirs = DDPMAncestralScheduler(**FLOW, shift=3.0), FlowMatchEulerDiscreteScheduler(shift=3.0)
    x_0, eps = draw(2, 3, seed=1), draw(2, 3, seed=2)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    for i in range(10):
        t = theirs.timesteps[i : i + 1].repeat(2)
        expected = theirs.scale_noise(x_0, t, eps)
        torch.testing.assert_close(ours.scale_noise(x_0, ours.timesteps[i : i + 1], eps), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("timestep", [321, 321.0, torch.tensor(321.0), torch.tensor([321.0]), torch.tensor(321)])
def test_one_time_serves_the_whole_batch_on_a_flow_path(timestep):
    scheduler, x_0, eps = DDPMAncestralScheduler(**FLOW), draw(6, 2, seed=1), draw(6, 2, seed=2)
    for method in (scheduler.add_noise, scheduler.get_velocity, scheduler.training_target, scheduler.original_sample):
        assert torch.equal(method(x_0, eps, timestep), method(x_0, eps, torch.full((6,), 321)))


PAIRS_OF_TIMES = [(1000.0, 400.5), (999.0, 998.0), (500.25, 499.75), (20.0, 0.5)]


@pytest.mark.parametrize(("t", "s"), PAIRS_OF_TIMES)
def test_the_law_between_two_levels_of_a_flow_obeys_bayes_rule(t, s):
    scheduler = DDPMAncestralScheduler(**FLOW)
    (alpha_t, alpha_s), (sigma_t, sigma_s) = scheduler.signal_and_noise(torch.tensor([t, s]))
    x_0, x_t, x_s = draw(4, 1, seed=1), draw(4, 1, seed=2), draw(4, 7, seed=3)
    mean, variance = scheduler.posterior(x_0, x_t, torch.full((4,), t), torch.full((4,), s))
    a = alpha_t / alpha_s
    step = Normal(a * x_s, (sigma_t**2 - a**2 * sigma_s**2).sqrt())
    right = step.log_prob(x_t) + Normal(alpha_s * x_0, sigma_s).log_prob(x_s)
    left = Normal(mean, variance.sqrt()).log_prob(x_s) + Normal(alpha_t * x_0, sigma_t).log_prob(x_t)
    torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


def test_the_posterior_of_a_flow_at_the_data_is_the_data():
    x_0, x_t = draw(3, 2, seed=1), draw(3, 2, seed=2)
    scheduler = DDPMAncestralScheduler(**FLOW)
    for arguments in [(torch.ones(3),), (torch.tensor([0.5, 90.0, 1000.0]), torch.zeros(3))]:
        mean, variance = scheduler.posterior(x_0, x_t, *arguments)
        torch.testing.assert_close(mean, x_0)
        assert (variance == 0).all()


# ---- the two predictions of a network -------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(
    ("path", "timestep"),
    [
        *[({"prediction_type": each}, t) for each in PREDICTION_TYPES for t in (0, 500, 999)],
        *[(ZERO_SNR | {"prediction_type": each}, 999) for each in ("sample", "v_prediction")],
        *[(FLOW, t) for t in (1000.0, 500.5, 0.5)],
    ],
)
def test_noise_and_data_are_predicted_from_the_training_target_and_fit_the_state(path, timestep, clip):
    scheduler = DDPMAncestralScheduler(clip_sample=clip, clip_sample_range=0.5, **path)
    x_0, eps, level = draw(4, 3, seed=1), draw(4, 3, seed=2), scheduler._level(timestep)
    x_t = scheduler.add_noise(x_0, eps, timestep)
    target = scheduler.training_target(x_0, eps, timestep)
    noise, data = scheduler._noise_and_original(target, x_t, level)
    expected = x_0.clamp(-0.5, 0.5) if clip else x_0
    torch.testing.assert_close(data, expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(level.alpha * data + level.sigma * noise, x_t, rtol=1e-9, atol=1e-9)
    if not clip:
        torch.testing.assert_close(noise, eps, rtol=1e-7, atol=1e-7)


def test_thresholding_restricts_both_predictions():
    scheduler = DDPMAncestralScheduler(thresholding=True, prediction_type="sample", sample_max_value=3.0)
    x_t, level = draw(2, 50), scheduler._level(500)
    noise, data = scheduler._noise_and_original(4 * draw(2, 50, seed=1), x_t, level)
    assert data.abs().max() == 1
    torch.testing.assert_close(level.alpha * data + level.sigma * noise, x_t)


@pytest.mark.parametrize("prediction_type", [*PREDICTION_TYPES, "flow_prediction"])
def test_close_to_the_data_the_noise_keeps_its_digits_in_single_precision(prediction_type):
    scheduler = DDPMAncestralScheduler(clip_sample=False, prediction_type=prediction_type)
    level, x_0, eps = scheduler._level(1), draw(500, seed=1), draw(500, seed=2)
    x_t = scheduler.add_noise(x_0, eps, torch.ones(500, dtype=torch.long))
    target = scheduler.training_target(x_0, eps, 1)
    noise, _ = scheduler._noise_and_original(target.float(), x_t.float(), level)
    # x̂_0 itself as the output is the exception: its rounding is divided by sigma
    assert (noise - eps).abs().max() < (5e-7 / level.sigma if prediction_type == "sample" else 2e-6)


def test_outputs_of_another_shape_are_refused():
    scheduler = DDPMAncestralScheduler()
    scheduler._check_shape(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"shape of the sample, \(2, 3\), got \(2, 4\)"):
        scheduler._check_shape(torch.zeros(2, 4), torch.zeros(2, 3))


# ---- between two levels ---------------------------------------------------------------------------------------------

PAIRS = [(999, 998), (999, 400), (500, 499), (20, 3), (1, 0), (999, 0)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_the_law_between_two_levels_obeys_bayes_rule(path, t, s):
    scheduler = DDPMAncestralScheduler(**path)
    (alpha_t, alpha_s), (sigma_t, sigma_s) = scheduler.signal_and_noise(torch.tensor([t, s]))
    x_0, x_t, x_s = draw(4, 1, seed=1), draw(4, 1, seed=2), draw(4, 7, seed=3)
    mean, variance = scheduler.posterior(x_0, x_t, torch.full((4,), t), torch.full((4,), s))
    # q(x_t | x_s) is the only Gaussian that leads from the marginal of level s to that of level t
    a = alpha_t / alpha_s
    step = Normal(a * x_s, (sigma_t**2 - a**2 * sigma_s**2).sqrt())
    right = step.log_prob(x_t) + Normal(alpha_s * x_0, sigma_s).log_prob(x_s)
    left = Normal(mean, variance.sqrt()).log_prob(x_s) + Normal(alpha_t * x_0, sigma_t).log_prob(x_t)
    torch.testing.assert_close(left, right, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("path", PATHS)
def test_two_small_steps_of_the_forward_chain_are_one_long_one(path):
    scheduler = DDPMAncestralScheduler(**path)
    alpha, sigma = (table.tolist() for table in whole_table(scheduler))
    for r, s, t in [(-1, 0, 1), (3, 20, 90), (400, 500, 998)]:
        point = [(1.0, 0.0) if i < 0 else (alpha[i], sigma[i]) for i in (r, s, t)]
        first = transition(*point[1], *point[0]).forward_variance
        second = transition(*point[2], *point[1]).forward_variance
        long = transition(*point[2], *point[0]).forward_variance
        assert long == pytest.approx((point[2][0] / point[1][0]) ** 2 * first + second, rel=1e-9)


def test_the_posterior_tables_are_those_of_guided_diffusion():
    betas = np.linspace(1e-4, 0.02, 1000)
    cumulative = np.cumprod(1 - betas)
    previous = np.append(1.0, cumulative[:-1])
    scheduler, timesteps = DDPMAncestralScheduler(), torch.arange(1000)
    one, zero = torch.ones(1000, dtype=torch.float64), torch.zeros(1000, dtype=torch.float64)
    original_weight, variance = scheduler.posterior(one, zero, timesteps)
    sample_weight, _ = scheduler.posterior(zero, one, timesteps)
    float32_table = {"rtol": 3e-3, "atol": 1e-7}  # 1 - beta keeps three digits of the smallest beta in float32
    np.testing.assert_allclose(original_weight, betas * np.sqrt(previous) / (1 - cumulative), **float32_table)
    np.testing.assert_allclose(sample_weight, (1 - previous) * np.sqrt(1 - betas) / (1 - cumulative), **float32_table)
    np.testing.assert_allclose(variance, betas * (1 - previous) / (1 - cumulative), **float32_table)


@pytest.mark.parametrize("path", PATHS[:5])
@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_the_posterior_is_that_of_variational_diffusion_models_in_log_snr(path, t, s):
    scheduler = DDPMAncestralScheduler(**path)
    (alpha_t, alpha_s), (sigma_t, sigma_s) = scheduler.signal_and_noise(torch.tensor([t, s]))
    shrink = -torch.expm1(2 * (alpha_t / sigma_t / (alpha_s / sigma_s)).log())  # 1 - SNR_t / SNR_s
    x_0, x_t = draw(2, 3, seed=1), draw(2, 3, seed=2)
    mean, variance = scheduler.posterior(x_0, x_t, torch.full((2,), t), torch.full((2,), s))
    torch.testing.assert_close(variance, (sigma_s**2 * shrink).expand(2, 1), rtol=1e-8, atol=0)
    expected = alpha_s * (x_t / alpha_t * (1 - shrink) + shrink * x_0)
    torch.testing.assert_close(mean, expected, rtol=1e-8, atol=1e-10)


def test_the_posterior_at_the_data_is_the_data():
    x_0, x_t = draw(3, 2, seed=1), draw(3, 2, seed=2)
    scheduler = DDPMAncestralScheduler()
    for arguments in [(torch.zeros(3, dtype=torch.long),), (torch.tensor([0, 9, 999]), torch.full((3,), -1))]:
        mean, variance = scheduler.posterior(x_0, x_t, *arguments)
        torch.testing.assert_close(mean, x_0)
        assert variance.shape == (3, 1)
        assert (variance == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_posterior_takes_any_shape_and_each_sample_its_own_pair_of_levels(shape):
    scheduler = DDPMAncestralScheduler()
    x_0, x_t = draw(*shape, seed=1), draw(*shape, seed=2)
    t, s = torch.tensor([999, 999, 500, 20, 1, 0]), torch.tensor([998, 400, 499, 3, 0, -1])
    mean, variance = scheduler.posterior(x_0, x_t, t, s)
    assert mean.shape == shape
    assert variance.shape == (6,) + (1,) * (len(shape) - 1)
    for i in range(6):
        alone = scheduler.posterior(x_0[i : i + 1], x_t[i : i + 1], t[i : i + 1], s[i : i + 1])
        torch.testing.assert_close((mean[i : i + 1], variance[i : i + 1]), alone, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_posterior_of_low_precision_is_computed_in_float32(dtype):
    scheduler, timesteps = DDPMAncestralScheduler(), torch.tensor([999, 998, 500, 20, 1, 0])
    x_0, x_t = draw(6, 4, seed=1).to(dtype), draw(6, 4, seed=2).to(dtype)
    exact = scheduler.posterior(x_0.double(), x_t.double(), timesteps)
    for result, expected in zip(scheduler.posterior(x_0, x_t, timesteps), exact, strict=True):
        assert result.dtype is torch.float32
        torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-6)


# ---- from the output of the network to x_0 --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("path", PATHS[:5])
def test_the_training_target_gives_back_the_data(path, prediction_type, shape):
    scheduler = DDPMAncestralScheduler(**path | {"prediction_type": prediction_type})
    x_0, eps, timesteps = draw(*shape, seed=1), draw(*shape, seed=2), torch.tensor([0, 1, 250, 499, 998, 999])
    x_t = scheduler.add_noise(x_0, eps, timesteps)
    target = scheduler.training_target(x_0, eps, timesteps)
    torch.testing.assert_close(scheduler.original_sample(target, x_t, timesteps), x_0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_the_training_target_gives_back_the_data_from_pure_noise(prediction_type):
    scheduler = DDPMAncestralScheduler(rescale_betas_zero_snr=True, prediction_type=prediction_type)
    x_0, eps = draw(2, 3, seed=1), draw(2, 3, seed=2)
    assert torch.equal(scheduler.add_noise(x_0, eps, 999), eps)
    torch.testing.assert_close(scheduler.original_sample(scheduler.training_target(x_0, eps, 999), eps, 999), x_0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_half_precision_outputs_are_converted_in_float32(prediction_type):
    scheduler = DDPMAncestralScheduler(prediction_type=prediction_type)
    output, x_t = draw(3, 4, seed=1).half(), draw(3, 4, seed=2).half()
    result = scheduler.original_sample(output, x_t, 5)
    assert result.dtype is torch.float32
    torch.testing.assert_close(result, scheduler.original_sample(output.double(), x_t.double(), 5).float())


# ---- nothing waits for a device -------------------------------------------------------------------------------------


def test_forward_and_laws_read_no_value_of_a_device():
    # a meta tensor has no values: reading one raises
    scheduler = DDPMAncestralScheduler(prediction_type="v_prediction")
    x = torch.empty(4, 3, device="meta")
    for timesteps in (
        torch.empty(4, dtype=torch.long, device="meta"),
        torch.empty((), dtype=torch.long, device="meta"),
    ):
        assert scheduler.add_noise(x, x, timesteps).shape == x.shape
        assert scheduler.get_velocity(x, x, timesteps).shape == x.shape
        assert scheduler.original_sample(x, x, timesteps).shape == x.shape
        assert scheduler.posterior(x, x, timesteps)[0].shape == x.shape
        assert scheduler.reverse_law(x, x, timesteps)[0].shape == x.shape
    assert scheduler.add_noise(x, x, torch.tensor([7])).device.type == "meta"  # as inpainting calls it
    flow, times = DDPMAncestralScheduler(**FLOW), torch.empty(4, device="meta")
    for method in (flow.add_noise, flow.get_velocity, flow.original_sample, flow.training_target):
        assert method(x, x, times).device.type == "meta"
    assert flow.reverse_law(x, x, times)[0].shape == x.shape
    with pytest.raises(RuntimeError):
        x.sum().item()


@pytest.mark.parametrize(
    ("theirs", "named"),
    [
        (ColdDiffusionScheduler(degradation="mask"), "degradation='mask'"),
        (EDMEulerScheduler(), "sigma_max=80.0"),
    ],
)
def test_a_config_of_another_kind_of_process_is_refused(theirs, named):
    with pytest.raises(ValueError, match=named):
        DDPMAncestralScheduler.from_config(theirs.config)
