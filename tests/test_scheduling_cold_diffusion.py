r"""Properties of cold diffusion: DDIM where the degradation is noise, and closed forms where it is linear."""

import doctest
import json
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

import annealers
from annealers import ColdDiffusionScheduler, GuidedDiffusionPipeline, PredictorCorrectorScheduler
from annealers.schedulers.degradations import Degradation
from annealers.single_file import single_file

T = 20
SMALL = {"num_train_timesteps": T, "blur_sigma_max": 6.0}
COLD = ["blur", "downsample", "mask"]
SAMPLERS = ["naive", "improved"]
PATHS = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "geometric", "sigma_min": 0.02, "sigma_max": 40.0},
]
PREDICTION_TYPES = ["epsilon", "sample", "v_prediction", "score"]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def images(*shape, seed=0):
    return torch.rand(*shape, generator=seeded(seed), dtype=torch.float64) * 2 - 1


def walk(scheduler, network, x, **step):
    """The whole schedule; all states, (N + 1, B, *)."""
    states = [x]
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, **step).prev_sample
        states.append(x)
    return torch.stack(states)


def wrong_restorer(x_t, t):
    """A guess that is far from the truth, and from linear."""
    return torch.tanh(3 * x_t.roll(1, dims=-1)) - 0.3 * torch.cos(t + x_t)


# ---- noise: the sampler is DDIM -------------------------------------------------------------------------------------


def network_of_two_points(path, prediction_type):
    """The exact network of data that is -1 or 1 in each coordinate, x̂_0 = tanh(alpha x / sigma^2)."""

    def network(x, t):
        alpha, sigma = (float(c) for c in path.signal_and_noise(int(t)))
        x_0 = torch.tanh(alpha * x / sigma**2)
        eps = (x - alpha * x_0) / sigma
        outputs = {"epsilon": eps, "sample": x_0, "v_prediction": alpha * eps - sigma * x_0, "score": -eps / sigma}
        return outputs[prediction_type]

    return network


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path["beta_schedule"])
def test_with_noise_that_is_estimated_cold_diffusion_is_ddim(path, prediction_type):
    """Over whole chains, respaced or not, with either sampler."""
    settings = {**path, "num_train_timesteps": 200, "prediction_type": prediction_type, "timestep_spacing": "trailing"}
    ddim = PredictorCorrectorScheduler(predictor="ddim", corrector_steps=0, clip_sample=False, **settings)
    network = network_of_two_points(ddim, prediction_type)
    x = torch.randn(8, 3, generator=seeded(0), dtype=torch.float64)
    for N in (200, 20, 7):
        ddim.set_timesteps(N)
        expected = walk(ddim, network, x)
        assert (expected[-1] - x).abs().max() > 0.5  # and not because nothing happened
        for sampler in SAMPLERS:
            cold = ColdDiffusionScheduler(degradation="noise", sampler=sampler, **settings)
            cold.set_timesteps(N)
            assert torch.equal(cold.timesteps, ddim.timesteps)
            torch.testing.assert_close(walk(cold, network, x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("N", [100, 20])
def test_with_noise_the_states_are_those_of_diffusers_ddim(schedule, prediction_type, N):
    ddim = DDIMScheduler(
        num_train_timesteps=100,
        beta_schedule=schedule,
        prediction_type=prediction_type,
        clip_sample=False,
        timestep_spacing="leading",
    )
    cold = ColdDiffusionScheduler.from_config(ddim.config, degradation="noise", timestep_spacing="leading")
    assert (cold.config.prediction_type, cold.config.num_train_timesteps) == (prediction_type, 100)
    # Diffusers takes the product of the betas on its own; what is compared is the step
    ddim.alphas_cumprod = cold.degradation.path.signal_and_noise(torch.arange(100))[0] ** 2
    ddim.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    cold.set_timesteps(N)
    ddim.set_timesteps(N)
    x = torch.randn(2, 3, 4, 4, generator=seeded(0), dtype=torch.float64)
    ours, theirs = (walk(scheduler, wrong_restorer, x) for scheduler in (cold, ddim))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# ---- the two samplers -----------------------------------------------------------------------------------------------


class Drift(Degradation):
    """D(x_0, t) = x_0 + (t + 1) e, the case in which the improved sampler cannot go wrong (Sec. 3.3)."""

    def __init__(self, e):
        super().__init__(T)
        self.e = e

    def __call__(self, original_samples, timesteps, noise=None):
        return original_samples + (timesteps + 1) * self.e


def test_where_degradation_is_a_drift_the_improved_sampler_is_exact_whatever_the_network_says():
    x_0, e = images(2, 1, 4, 4), images(2, 1, 4, 4, seed=1)
    ends = {}
    for sampler in SAMPLERS:
        scheduler = ColdDiffusionScheduler(sampler=sampler, **SMALL)
        scheduler.degradation = Drift(e)
        scheduler.set_timesteps(7)
        levels = [*scheduler.timesteps.tolist(), -1]
        truth = torch.stack([x_0 + (t + 1) * e for t in levels])
        ends[sampler] = (walk(scheduler, wrong_restorer, truth[0]) - truth).abs().amax((1, 2, 3, 4))
    assert ends["improved"].max() < 1e-13
    assert ends["naive"][1:].min() > 0.5


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("degradation", COLD)
def test_a_perfect_restorer_walks_back_through_the_degraded_images(degradation, sampler):
    scheduler, x_0 = ColdDiffusionScheduler(degradation=degradation, sampler=sampler, **SMALL), images(3, 2, 8, 8)
    for N in (T, 6, 1):
        scheduler.set_timesteps(N)
        truth = torch.stack([scheduler.add_noise(x_0, None, t) for t in [*scheduler.timesteps.tolist(), -1]])
        states = walk(scheduler, lambda x, t: x_0, truth[0])
        torch.testing.assert_close(states, truth, rtol=0, atol=1e-13)


@pytest.mark.parametrize("degradation", COLD)
def test_the_error_of_a_step_is_what_the_degradation_makes_of_the_network_s(degradation):
    """D is linear: naive has all of D(x̂_0 - x_0, s), improved the change of D from t to s."""
    x_0, guess = images(2, 1, 8, 8), images(2, 1, 8, 8, seed=1)
    for t, s in ((T - 1, T - 2), (T - 1, 3), (4, 3), (0, -1)):
        expected = {}
        D = ColdDiffusionScheduler(degradation=degradation, **SMALL).degradation
        expected["naive"] = D(guess - x_0, s)
        expected["improved"] = D(guess - x_0, s) - D(guess - x_0, t)
        for sampler in SAMPLERS:
            scheduler = ColdDiffusionScheduler(degradation=degradation, sampler=sampler, **SMALL)
            scheduler.set_timesteps(timesteps=[t, s] if s >= 0 else [t])
            step = scheduler.step(guess, t, D(x_0, t))
            torch.testing.assert_close(step.prev_sample - D(x_0, s), expected[sampler], rtol=0, atol=1e-13)
            assert torch.equal(step.pred_original_sample, guess)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(sampler):
    for degradation in (*COLD, "noise"):
        scheduler = ColdDiffusionScheduler(degradation=degradation, sampler=sampler, **SMALL)
        scheduler.set_timesteps(5)
        x = images(3, 1, 8, 8)
        together = walk(scheduler, wrong_restorer, x)[-1]
        alone = torch.cat([walk(scheduler, wrong_restorer, x[i : i + 1])[-1] for i in range(3)])
        torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("degradation", [*COLD, "noise"])
def test_half_precision_is_computed_in_single(degradation):
    scheduler = ColdDiffusionScheduler(degradation=degradation, **SMALL)
    scheduler.set_timesteps(4)
    x, guess = images(2, 1, 8, 8).half(), images(2, 1, 8, 8, seed=1).half()
    half, single = (scheduler.step(g, 9, state) for g, state in ((guess, x), (guess.float(), x.float())))
    for name in ("prev_sample", "pred_original_sample"):
        assert half[name].dtype is torch.float16
        assert torch.equal(half[name], single[name].half())


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("degradation", [*COLD, "noise"])
def test_gradients_flow_from_the_image_to_the_guess_and_the_state(degradation, sampler):
    settings = {**SMALL, "downsample_factor": 4}
    scheduler = ColdDiffusionScheduler(degradation=degradation, sampler=sampler, **settings)
    scheduler.set_timesteps(3)
    x, guess = images(1, 1, 4, 4).requires_grad_(), images(1, 1, 4, 4, seed=1).requires_grad_()
    t = scheduler.timesteps[1]
    assert torch.autograd.gradcheck(lambda guess, x: scheduler.step(guess, t, x).prev_sample, (guess, x))


# ---- the forward process --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degradation", COLD)
def test_adding_noise_degrades_and_looks_at_no_noise(degradation):
    scheduler, x_0 = ColdDiffusionScheduler(degradation=degradation, **SMALL), images(3, 1, 8, 8)
    timesteps = torch.tensor([T - 1, -1, 4])
    x_t = scheduler.add_noise(x_0, torch.randn(3, 1, 8, 8), timesteps)
    assert torch.equal(x_t, scheduler.add_noise(x_0, None, timesteps))
    assert torch.equal(x_t, scheduler.degradation(x_0, timesteps))
    assert torch.equal(scheduler.scale_model_input(x_t, 3), x_t)


def test_noise_is_added_as_ddpm_adds_it():
    scheduler = ColdDiffusionScheduler(degradation="noise", beta_schedule="squaredcos_cap_v2", **SMALL)
    x_0, z = images(2, 3), images(2, 3, seed=1)
    alpha = scheduler.degradation.path.alphas_cumprod[7].double().sqrt()
    expected = alpha * x_0 + (1 - alpha**2).sqrt() * z
    torch.testing.assert_close(scheduler.add_noise(x_0, z, torch.tensor([7])), expected, rtol=0, atol=1e-7)


# ---- the schedule ---------------------------------------------------------------------------------------------------


def test_timesteps_are_spaced_as_lin_et_al_name_it():
    spaced = {"trailing": [19, 14, 9, 4], "leading": [15, 10, 5, 0], "linspace": [19, 13, 6, 0]}
    for spacing, expected in spaced.items():
        scheduler = ColdDiffusionScheduler(timestep_spacing=spacing, **SMALL)
        assert scheduler.timesteps.tolist() == list(range(T))[::-1]
        scheduler.set_timesteps(4)
        assert scheduler.timesteps.tolist() == expected
    shifted = ColdDiffusionScheduler(timestep_spacing="leading", steps_offset=1, **SMALL)
    shifted.set_timesteps(4)
    assert shifted.timesteps.tolist() == [16, 11, 6, 1]


@pytest.mark.parametrize("given", [[12, 5, 0], torch.tensor([12, 5, 0]), np.array([12.0, 5.0, 0.0])])
def test_timesteps_can_be_given(given):
    scheduler = ColdDiffusionScheduler(**SMALL)
    scheduler.set_timesteps(timesteps=given)
    assert scheduler.timesteps.tolist() == [12, 5, 0] and scheduler.timesteps.dtype is torch.int64
    assert (scheduler.num_inference_steps, len(scheduler), scheduler.order) == (3, T, 1)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "exactly one"),
        ({"num_inference_steps": 3, "timesteps": [2]}, "exactly one"),
        ({"num_inference_steps": 0}, f"1 .. {T}, got 0"),
        ({"num_inference_steps": T + 1}, f"got {T + 1}"),
        ({"num_inference_steps": 2.0}, "got 2.0"),
        ({"num_inference_steps": True}, "got True"),
        ({"timesteps": []}, "non-empty"),
        ({"timesteps": [3.5]}, "integers"),
        ({"timesteps": [[3]]}, "non-empty list"),
        ({"timesteps": [3, 3]}, "decrease strictly"),
        ({"timesteps": [T]}, f"{T - 1} .. 0"),
        ({"timesteps": [-1]}, r"got \[-1\]"),
    ],
)
def test_a_schedule_out_of_range_is_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        ColdDiffusionScheduler(**SMALL).set_timesteps(**arguments)


def test_a_step_finds_its_timestep_however_it_is_given():
    scheduler, x = ColdDiffusionScheduler(**SMALL), images(1, 1, 8, 8)
    scheduler.set_timesteps(4)  # 19, 14, 9, 4
    guess = wrong_restorer(x, torch.tensor(1))
    expected = x - scheduler.degradation(guess, 9) + scheduler.degradation(guess, 4)
    ways = [9, torch.tensor(9), torch.tensor([9]), np.int64(9), scheduler.timesteps[2], scheduler.timesteps[1:][1]]
    for timestep in ways:
        assert torch.equal(scheduler.step(guess, timestep, x).prev_sample, expected)
        assert scheduler.step_index == 3
    prev_sample, x_0 = scheduler.step(guess, 9, x, return_dict=False)
    assert torch.equal(prev_sample, expected) and torch.equal(x_0, guess)
    scheduler.set_begin_index(2)
    assert scheduler.begin_index == 2
    scheduler.set_timesteps(4)
    assert scheduler.step_index is None and scheduler.begin_index is None


def test_a_step_that_does_not_fit_is_refused():
    scheduler, x = ColdDiffusionScheduler(**SMALL), images(2, 1, 8, 8)
    with pytest.raises(ValueError, match="call set_timesteps first"):
        scheduler.step(x, 9, x)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="timestep 3 is not one of the 4 of the schedule, 19 .. 4"):
        scheduler.step(x, 3, x)
    with pytest.raises(ValueError, match="timestep 9.5 is not one of the 4"):
        scheduler.step(x, 9.5, x)
    with pytest.raises(ValueError, match="one timestep for the whole batch, got 2"):
        scheduler.step(x, torch.tensor([9, 9]), x)
    with pytest.raises(ValueError, match=r"shape of the sample, \(2, 1, 8, 8\), got \(2, 2, 8, 8\)"):
        scheduler.step(torch.cat([x, x], dim=1), 9, x)


def test_a_prediction_that_needs_signal_is_refused_where_there_is_none():
    settings = {"degradation": "noise", "rescale_betas_zero_snr": True, **SMALL}
    with pytest.raises(ValueError, match=f"timestep {T - 1} has no signal"):
        ColdDiffusionScheduler(**settings).set_timesteps(4)
    scheduler, x = ColdDiffusionScheduler(prediction_type="sample", **settings), images(2, 3)
    scheduler.set_timesteps(4)
    assert walk(scheduler, wrong_restorer, x).isfinite().all()


def test_loops_of_diffusers_may_pass_a_generator():
    scheduler, x = ColdDiffusionScheduler(**SMALL), images(2, 1, 8, 8)
    scheduler.set_timesteps(4)
    step = scheduler.step(x, 9, x, generator=seeded(0))
    assert torch.equal(step.prev_sample, scheduler.step(x, 9, x).prev_sample)


# ---- the law of fully degraded images -------------------------------------------------------------------------------


def correlated_images(N, seed=0):
    """Images whose fully degraded ones have means and covariances of their own in each coordinate."""
    x = images(N, 2, 8, 8, seed=seed)
    return 0.2 + 0.3 * x + 0.5 * x.mean((2, 3), keepdim=True).flip(1) * 4 + 0.1 * torch.linspace(-1, 1, 8)


@pytest.mark.parametrize("degradation", COLD)
def test_terminal_samples_have_the_mean_and_covariance_of_degraded_images(degradation):
    """No sampling error: a sample is mean + z F, and F^T F is the covariance."""
    settings = {**SMALL, "mask_sigma_max": 1.0}  # which leaves more than the corners
    scheduler = ColdDiffusionScheduler(degradation=degradation, terminal_noise=0.0, **settings)
    x_0 = correlated_images(200)
    scheduler.fit_terminal(x_0)
    D = scheduler.degradation
    x_T = D.terminal_coordinates(D(x_0, T - 1))
    assert x_T.shape[1] > 1
    mean, factor = (torch.tensor(scheduler.config[f"terminal_{part}"]).double() for part in ("mean", "factor"))
    torch.testing.assert_close(mean, x_T.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(factor.T @ factor, torch.cov(x_T.T), rtol=0, atol=1e-6)
    samples = scheduler.terminal_sample((500, 2, 8, 8), seeded(0), dtype=torch.float64)
    generator = seeded(0)
    torch.randn(500, 2, 8, 8, generator=generator, dtype=torch.float64)  # the noise beside the law, here times 0
    z = torch.randn(500, len(factor), generator=generator, dtype=torch.float64)
    torch.testing.assert_close(samples, D.terminal_image(mean + z @ factor, samples.shape), rtol=0, atol=1e-6)


def test_terminal_samples_move_a_little_off_the_law():
    plain, noisy = (ColdDiffusionScheduler(terminal_noise=noise, **SMALL) for noise in (0.0, 0.25))
    for scheduler in (plain, noisy):
        scheduler.fit_terminal(correlated_images(50))
    shape = (3, 2, 8, 8)
    difference = noisy.terminal_sample(shape, seeded(3)) - plain.terminal_sample(shape, seeded(3))
    torch.testing.assert_close(difference, 0.25 * torch.randn(shape, generator=seeded(3)), rtol=0, atol=1e-6)


def test_terminal_samples_of_their_own_generators_are_drawn_one_by_one():
    scheduler = ColdDiffusionScheduler(**SMALL)
    scheduler.fit_terminal(correlated_images(50))
    together = scheduler.terminal_sample((3, 2, 8, 8), [seeded(i) for i in range(3)])
    for i in range(3):
        alone = scheduler.terminal_sample((1, 2, 8, 8), seeded(i))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-6)
    assert scheduler.terminal_sample((1, 2, 8, 8), seeded(0), dtype=torch.float16).dtype is torch.float16


def test_with_noise_the_start_is_unit_noise():
    scheduler = ColdDiffusionScheduler(degradation="noise")
    scheduler.fit_terminal(correlated_images(3))
    assert scheduler.config.terminal_mean is None
    expected = torch.randn(2, 3, 5, 7, generator=seeded(0))
    assert torch.equal(scheduler.terminal_sample((2, 3, 5, 7), seeded(0)), expected)


def test_a_mask_that_leaves_nothing_starts_from_grey():
    scheduler = ColdDiffusionScheduler(50, "mask", mask_sigma_max=40.0, terminal_noise=0.0)
    scheduler.fit_terminal(correlated_images(3))
    assert scheduler.config.terminal_mean == []
    assert torch.equal(scheduler.terminal_sample((2, 2, 8, 8)), torch.zeros(2, 2, 8, 8))


def test_a_law_that_is_missing_or_of_other_images_is_refused():
    scheduler = ColdDiffusionScheduler(**SMALL)
    with pytest.raises(ValueError, match="fit_terminal"):
        scheduler.terminal_sample((1, 2, 8, 8))
    scheduler.fit_terminal(correlated_images(3))
    with pytest.raises(ValueError, match=r"\[2, 8, 8\], got \[2, 8, 4\]"):
        scheduler.terminal_sample((1, 2, 8, 4))
    with pytest.raises(ValueError, match="two images"):
        scheduler.fit_terminal(correlated_images(1))
    for nothing in (torch.full((2, 1, 8, 8), torch.nan), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="finite numbers"):
            scheduler.fit_terminal(nothing)
    slight = ColdDiffusionScheduler(blur_sigma_max=0.6)
    with pytest.raises(ValueError, match="2048 coordinates .* more than 1024"):
        slight.fit_terminal(images(2, 2, 32, 32))


# ---- with Diffusers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degradation", [*COLD, "noise"])
def test_what_is_saved_comes_back(degradation, tmp_path):
    settings = {**SMALL, "mask_center": (1.0, 2.0), "mask_sigma_max": 3.0, "downsample_factor": 4}
    scheduler = ColdDiffusionScheduler(degradation=degradation, sampler="naive", **settings)
    scheduler.fit_terminal(correlated_images(20))
    scheduler.save_pretrained(tmp_path)
    loaded = ColdDiffusionScheduler.from_pretrained(tmp_path)
    x_0, z = images(2, 2, 8, 8), images(2, 2, 8, 8, seed=1)
    assert torch.equal(loaded.add_noise(x_0, z, 11), scheduler.add_noise(x_0, z, 11))
    shape = (2, 2, 8, 8)
    assert torch.equal(loaded.terminal_sample(shape, seeded(0)), scheduler.terminal_sample(shape, seeded(0)))
    assert loaded.config.sampler == "naive"
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == "ColdDiffusionScheduler"


def test_a_config_passes_through_another_and_back():
    scheduler = ColdDiffusionScheduler(degradation="mask", mask_sigma_max=3.0, **SMALL)
    back = ColdDiffusionScheduler.from_config(DDIMScheduler.from_config(scheduler.config).config)
    x_0 = images(1, 1, 8, 8)
    assert torch.equal(back.add_noise(x_0, None, 5), scheduler.add_noise(x_0, None, 5))
    assert (back.config.prediction_type, back.config.degradation) == ("sample", "mask")


def test_another_sampler_takes_over_what_was_fitted_and_what_was_given_by_position():
    scheduler = ColdDiffusionScheduler(T, "downsample", downsample_factor=4)
    scheduler.fit_terminal(correlated_images(20))
    other = ColdDiffusionScheduler.from_config(scheduler.config, sampler="naive")
    assert (len(other), other.config.degradation, other.config.sampler) == (T, "downsample", "naive")
    shape = (2, 2, 8, 8)
    assert torch.equal(other.terminal_sample(shape, seeded(0)), scheduler.terminal_sample(shape, seeded(0)))


RESTORED = images(2, 1, 8, 8).float()


@pytest.fixture
def pipeline():
    """With a network that nobody trained."""
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (32,)}
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, **blocks)
    pipeline = GuidedDiffusionPipeline(unet, ColdDiffusionScheduler(**SMALL))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_pipeline_restores_the_degraded_images_that_it_is_given_as_latents(pipeline, monkeypatch):
    x_0 = RESTORED
    monkeypatch.setattr(pipeline.unet, "forward", lambda x, t, class_labels, return_dict: (x_0,))
    for start in (T - 1, 7):
        x_t = pipeline.scheduler.add_noise(x_0, None, start)
        levels = list(range(start, -1, -2))
        output = pipeline(latents=x_t, timesteps=levels, output_type="latent", return_trajectory=True)
        torch.testing.assert_close(output.images, x_0, rtol=0, atol=1e-6)
        expected = torch.stack([pipeline.scheduler.add_noise(x_0, None, t) for t in [*levels, -1]])
        torch.testing.assert_close(output.trajectory.samples, expected, rtol=0, atol=1e-6)


def test_a_pipeline_starts_from_terminal_samples(pipeline):
    pipeline.scheduler.fit_terminal(RESTORED)
    latents = pipeline.scheduler.terminal_sample((2, 1, 8, 8), seeded(0))
    given = pipeline(latents=latents, num_inference_steps=3, output_type="latent").images
    drawn = pipeline(batch_size=2, num_inference_steps=3, output_type="latent", generator=seeded(0)).images
    assert torch.equal(drawn, given)


def test_a_pipeline_does_not_start_from_noise_where_no_terminal_law_is_known(pipeline):
    with pytest.raises(ValueError, match="call fit_terminal"):
        pipeline(batch_size=2, num_inference_steps=3)


def test_a_pipeline_with_the_scheduler_is_saved_under_its_public_name(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == [
        "annealers",
        "ColdDiffusionScheduler",
    ]
    loaded = GuidedDiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is annealers.ColdDiffusionScheduler


def test_the_scheduler_can_be_exported_as_one_file(monkeypatch):
    """Run where annealers has nothing, so that the copy stands on its own."""
    source = single_file("ColdDiffusionScheduler")
    monkeypatch.setitem(sys.modules, "annealers", type(annealers)("annealers"))
    names = {"__name__": "exported"}
    exec(compile(source, "exported.py", "exec"), names)
    copy = names["ColdDiffusionScheduler"](degradation="downsample", **SMALL)
    assert type(copy) is not ColdDiffusionScheduler
    x_0 = images(1, 1, 8, 8)
    ours = ColdDiffusionScheduler(degradation="downsample", **SMALL)
    assert torch.equal(copy.add_noise(x_0, None, 5), ours.add_noise(x_0, None, 5))


def test_the_example_of_the_documentation_is_right():
    (example,) = doctest.DocTestFinder(recurse=False).find(ColdDiffusionScheduler, "ColdDiffusionScheduler", globs={})
    runner = doctest.DocTestRunner()
    runner.run(example)
    assert runner.failures == 0 and runner.tries > 0


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"degradation": "melt"}, "degradation must be one of .*'melt'"),
        ({"sampler": "best"}, "sampler must be one of .*'best'"),
        ({"timestep_spacing": "karras"}, "timestep_spacing must be one of .*'karras'"),
        ({"prediction_type": "epsilon"}, r"one of \['sample'\] for the degradation 'blur', got 'epsilon'"),
        ({"degradation": "noise", "prediction_type": "flow_prediction"}, "'noise', got 'flow_prediction'"),
        ({"terminal_noise": -0.1}, "terminal_noise must not be negative, got -0.1"),
        ({"num_train_timesteps": 0}, "positive integer, got 0"),
        ({"blur_sigma_max": 0.1}, "sigma_max=0.1"),
        ({"degradation": "downsample", "downsample_factor": 3}, "got 3"),
        ({"degradation": "mask", "mask_sigma_min": -1.0}, "sigma_min=-1.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        ColdDiffusionScheduler(**settings)


def test_the_settings_of_each_degradation_reach_it():
    x_0 = images(1, 1, 16, 16)
    for degradation, changes in {
        "blur": [{"blur_sigma_min": 0.3}, {"blur_sigma_max": 9.0}],
        "downsample": [{"downsample_factor": 4}],
        "mask": [{"mask_sigma_min": 0.4}, {"mask_sigma_max": 2.0}, {"mask_center": (3.0, 1.0)}],
        "noise": [
            *({"beta_start": 0.01}, {"beta_end": 0.3}, {"beta_schedule": "sigmoid"}, {"trained_betas": [0.1] * T}),
            {"rescale_betas_zero_snr": True, "prediction_type": "sample"},
            {"beta_schedule": "geometric", "sigma_min": 0.1, "sigma_max": 3.0},
            {"beta_schedule": "geometric", "sigma_min": 0.1, "sigma_max": 5.0},
        ],
    }.items():
        states = [
            ColdDiffusionScheduler(**{**SMALL, "degradation": degradation, **change}).add_noise(x_0, x_0.flip(3), 12)
            for change in [{}, *changes]
        ]
        for i, a in enumerate(states):
            assert all((a - b).abs().max() > 1e-4 for b in states[:i]), (degradation, i)
