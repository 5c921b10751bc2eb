r"""Score networks fed the unscaled y and its level, as noise-prediction networks of the variance-preserving ladder.

Oracles: exact laws, whose score of y the network inside is replaced by; and Diffusers' own ScoreSdeVeScheduler, whose
chain ours is, noise for noise.
"""

import json
import logging

import pytest
import torch
from diffusers import DDPMPipeline, ScoreSdeVeScheduler, UNet2DModel
from diffusers.utils import logging as diffusers_logging

import annealers
from annealers import (
    AnnealedLangevinScheduler,
    DDPMAncestralScheduler,
    GuidedDiffusionPipeline,
    PredictorCorrectorScheduler,
    ScoreUNetModel,
    exact,
    load_score_sde_ve,
)
from annealers.hub import export
from annealers.single_file import single_file

TINY = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "time_embedding_type": "fourier",
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}
LADDER = {"sigma_min": 0.02, "sigma_max": 40.0, "num_train_timesteps": 9}
RANGES = ["minus_one_to_one", "zero_to_one"]


def tiny_unet(seed=0, **settings):
    torch.manual_seed(seed)
    return UNet2DModel(**(TINY | settings)).eval()


def tiny_model(**settings):
    torch.manual_seed(0)
    return ScoreUNetModel(TINY, **(LADDER | settings)).eval()


def ladder(kind=DDPMAncestralScheduler, **settings):
    return kind(beta_schedule="geometric", clip_sample=False, **(LADDER | settings))


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class ExactScore(torch.nn.Module):
    """In the place of the UNet: the score of y = x_0 + s eps for a law of x_0, and what it was asked."""

    dtype = torch.float64

    def __init__(self, law, config):
        super().__init__()
        self.law, self.config = law, config

    def forward(self, y, s, class_labels=None, return_dict=True):
        self.asked = y, s, class_labels
        return (self.law.score(y, 1.0, s),)


# ---- from the score of y to the noise in x_t ------------------------------------------------------------------------


@pytest.mark.parametrize("data_range", RANGES)
def test_the_exact_score_of_y_is_the_exact_noise_in_x(data_range):
    scheduler, model = ladder(), tiny_model(data_range=data_range)
    mean, variance = 0.3 * draw(3, 8, 8, seed=1), 0.2 + draw(3, 8, 8, seed=2) ** 2
    law = exact.Gaussian(mean, variance)
    inside = exact.Gaussian((mean + 1) / 2, variance / 4) if data_range == "zero_to_one" else law
    model.network = ExactScore(inside, model.network.config)
    timesteps = torch.arange(9)
    x_t = scheduler.add_noise(law.sample(9), draw(9, 3, 8, 8), timesteps)
    alpha, sigma = scheduler.signal_and_noise(timesteps)
    noise = model(x_t, timesteps).sample
    torch.testing.assert_close(noise, law.noise(x_t, alpha, sigma), rtol=1e-10, atol=1e-12)
    y, s, _ = model.network.asked
    torch.testing.assert_close(s * (2 if data_range == "zero_to_one" else 1), sigma / alpha, rtol=1e-12, atol=0)
    unscaled = x_t / alpha[:, None, None, None]
    torch.testing.assert_close(y, (unscaled + 1) / 2 if data_range == "zero_to_one" else unscaled)


def test_the_network_is_fed_the_unscaled_state_and_its_level_and_its_score_is_made_noise():
    model, unet = tiny_model(sigma_max=32.0, sigma_min=2.0, num_train_timesteps=5), tiny_unet()
    model.network.load_state_dict(unet.state_dict())
    x = draw(2, 3, 8, 8).float()
    with torch.no_grad():
        for t, s in enumerate([2.0, 4.0, 8.0, 16.0, 32.0]):
            expected = -s * unet(x * (1 + s**2) ** 0.5, torch.tensor(s)).sample
            torch.testing.assert_close(model(x, t).sample, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("T", [1, 9, 1000])
def test_the_levels_are_those_of_the_ladder_of_the_schedulers(T):
    model, scheduler = tiny_model(num_train_timesteps=T), ladder(num_train_timesteps=T)
    alpha, sigma = scheduler.signal_and_noise(torch.arange(T))
    torch.testing.assert_close(model.noise_levels(torch.arange(T)), sigma / alpha, rtol=1e-10, atol=0)


def test_levels_between_timesteps_are_even_in_the_logarithm():
    model = tiny_model()
    t = torch.tensor([[2.0, 2.25], [2.5, 3.0]], dtype=torch.float64)
    s = model.noise_levels(t).log()
    assert s.shape == t.shape
    torch.testing.assert_close((s - s[0, 0]) / (s[1, 1] - s[0, 0]), t - 2)


def test_every_form_of_a_timestep_says_the_same():
    model, x = tiny_model(), draw(3, 3, 8, 8).float()
    with torch.no_grad():
        expected = model(x, torch.tensor([4, 4, 4])).sample
        for timestep in (4, 4.0, torch.tensor(4), torch.tensor([4]), torch.tensor([4.0, 4.0, 4.0])):
            assert torch.equal(model(x, timestep).sample, expected)
        assert torch.equal(model(x, 4, return_dict=False)[0], expected)


def test_each_sample_has_its_own_timestep():
    model, x = tiny_model(), draw(3, 3, 8, 8).float()
    timesteps = torch.tensor([0, 8, 3])
    with torch.no_grad():
        together = model(x, timesteps).sample
        for i in range(3):
            torch.testing.assert_close(together[i : i + 1], model(x[i : i + 1], timesteps[i]).sample)


def test_class_labels_reach_the_unet():
    torch.manual_seed(0)
    model = ScoreUNetModel(TINY | {"num_class_embeds": 4}, **LADDER).eval()
    x, labels = draw(2, 3, 8, 8).float(), torch.tensor([0, 3])
    with torch.no_grad():
        s = model.noise_levels(5, torch.float32)
        expected = -s * model.network((1 + s**2).sqrt() * x, s, labels).sample
        torch.testing.assert_close(model(x, 5, class_labels=labels).sample, expected)
        assert not torch.allclose(model(x, 5, class_labels=labels.flip(0)).sample, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_what_is_large_in_single_precision(dtype):
    # at the published sigma_max of 2 x 1348 the unscaled state and the score are beyond half precision's digits
    model = tiny_model(sigma_max=2696.0, data_range="zero_to_one")
    law = exact.Gaussian(torch.zeros(3, 8, 8, dtype=torch.float64), 1.0)
    inside = exact.Gaussian(torch.full((3, 8, 8), 0.5, dtype=torch.float64), 0.25)
    model.network = ExactScore(inside, model.network.config)
    x = draw(4, 3, 8, 8).to(dtype)
    alpha, sigma = ladder(sigma_max=2696.0).signal_and_noise(8)
    noise = model(x, 8).sample
    assert noise.dtype is dtype
    torch.testing.assert_close(
        noise.double(), law.noise(x.double(), alpha, sigma), rtol=torch.finfo(dtype).eps, atol=0
    )
    half = tiny_model().to(dtype)
    with torch.no_grad():
        assert half(x, 8).sample.dtype is dtype
        assert half(x.float(), 8).sample.dtype is torch.float32  # a UNet alone would fail on the mixture


def test_gradients_reach_the_weights_and_the_state():
    model, x = tiny_model(), draw(2, 3, 8, 8).float().requires_grad_()
    model(x, torch.tensor([0, 8])).sample.square().mean().backward()
    assert all(p.grad is not None for p in model.network.parameters() if p.requires_grad)
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("timestep", "message"),
    [
        (-1, r"timesteps must lie in 0 \.\. 8, got -1 \.\. -1"),
        (torch.tensor([1, 9]), r"timesteps must lie in 0 \.\. 8, got 1 \.\. 9"),
        (float("nan"), "got nan"),
        (torch.tensor([1, 2, 3]), "one timestep or one per sample, 2, got 3"),
    ],
)
def test_timesteps_that_do_not_fit_are_refused(timestep, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(torch.zeros(2, 3, 8, 8), timestep)


@pytest.mark.parametrize(
    ("settings", "unet", "message"),
    [
        ({"sigma_min": 0.0}, {}, r"0 < sigma_min < sigma_max, got 0\.0 and 40\.0"),
        ({"sigma_min": 40.0}, {}, r"0 < sigma_min < sigma_max, got 40\.0 and 40\.0"),
        ({"num_train_timesteps": 0}, {}, "num_train_timesteps must be a positive integer, got 0"),
        ({"num_train_timesteps": True}, {}, "num_train_timesteps must be a positive integer, got True"),
        ({"num_train_timesteps": 2.5}, {}, "num_train_timesteps must be a positive integer, got 2.5"),
        ({"data_range": "pixels"}, {}, "data_range must be one of .*'zero_to_one'.*, got 'pixels'"),
        ({}, {"time_embedding_type": "positional"}, "time_embedding_type='fourier', got 'positional'"),
        ({}, {"out_channels": 6}, "out_channels=6 and in_channels=3"),
    ],
)
def test_settings_that_make_no_score_network_are_refused(settings, unet, message):
    with pytest.raises(ValueError, match=message):
        ScoreUNetModel(TINY | unet, **(LADDER | settings))


# ---- config, saving and pipelines -----------------------------------------------------------------------------------


@pytest.fixture
def warnings_of_diffusers(caplog):
    diffusers_logging.enable_propagation()
    caplog.set_level(logging.WARNING)
    yield caplog
    diffusers_logging.disable_propagation()


def test_the_config_shows_what_pipelines_read_off_a_network():
    config = tiny_model().config
    assert (config.sample_size, config.in_channels, config.out_channels) == (8, 3, 3)
    assert config.get("num_class_embeds", "absent") is None
    assert (config.sigma_min, config["sigma_max"], config.num_train_timesteps) == (0.02, 40.0, 9)
    assert ScoreUNetModel(TINY | {"num_class_embeds": 7}, **LADDER).config.num_class_embeds == 7


def test_a_model_is_made_again_from_its_config_without_a_warning(warnings_of_diffusers):
    model = tiny_model(data_range="zero_to_one")
    for config in (model.config, ScoreUNetModel.from_unet(model.network, 0.02, 40.0, 9, "zero_to_one").config):
        assert ScoreUNetModel.from_config(config).config.sigma_max == 40.0
    again = ScoreUNetModel.from_config(model.config)
    assert again.to_json_string() == model.to_json_string()
    assert again.network.config.block_out_channels == (8, 8)
    assert not warnings_of_diffusers.records


def test_saving_and_loading_is_lossless_and_silent(tmp_path, warnings_of_diffusers):
    model = tiny_model(data_range="zero_to_one")
    model.save_pretrained(tmp_path)
    loaded = ScoreUNetModel.from_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert set(saved) - {"_class_name", "_diffusers_version"} == {"unet", "data_range", *LADDER}
    x = draw(2, 3, 8, 8).float()
    with torch.no_grad():
        assert torch.equal(loaded(x, 5).sample, model(x, 5).sample)
    assert not warnings_of_diffusers.records


def test_a_wrapped_unet_is_shared_and_its_config_is_kept(tmp_path):
    unet = tiny_unet()
    state = torch.get_rng_state()
    model = ScoreUNetModel.from_unet(unet, **LADDER)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.network is unet
    assert not model.training and not any(p.is_meta for p in model.parameters())
    assert not any(name.startswith("_") for name in model.config.unet)
    model.save_pretrained(tmp_path)
    loaded = ScoreUNetModel.from_pretrained(tmp_path)
    x = draw(2, 3, 8, 8).float()
    with torch.no_grad():
        assert torch.equal(loaded(x, 5).sample, model(x, 5).sample)
    assert ScoreUNetModel.from_unet(unet.train(), **LADDER).training


@pytest.mark.parametrize("kind", [DDPMAncestralScheduler, PredictorCorrectorScheduler, AnnealedLangevinScheduler])
def test_it_takes_the_place_of_a_network_in_our_pipeline_and_in_that_of_diffusers(kind, recwarn):
    model, scheduler = tiny_model(), ladder(kind)
    ours = quiet(GuidedDiffusionPipeline(model, scheduler))
    theirs = quiet(DDPMPipeline(model, scheduler))
    images = ours(generator=torch.Generator().manual_seed(0), num_inference_steps=5, output_type="np").images
    expected = theirs(generator=torch.Generator().manual_seed(0), num_inference_steps=5, output_type="np").images
    assert images.shape == (1, 8, 8, 3)
    torch.testing.assert_close(torch.from_numpy(images), torch.from_numpy(expected), rtol=0, atol=1e-6)


def test_a_class_conditional_score_network_is_guided(tmp_path):
    torch.manual_seed(0)
    model = ScoreUNetModel(TINY | {"num_class_embeds": 3}, **LADDER).eval()
    pipeline = GuidedDiffusionPipeline(model, ladder(), id2label={0: "cat", 1: "dog"}, null_label=2)
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["unet"] == ["annealers", "ScoreUNetModel"]
    outputs = [
        quiet(p)(
            class_labels="dog",
            guidance_scale=2.0,
            num_inference_steps=3,
            generator=torch.Generator(),
            output_type="np",
        ).images
        for p in (pipeline, GuidedDiffusionPipeline.from_pretrained(tmp_path))
    ]
    assert abs(outputs[0] - outputs[1]).max() < 1e-4  # kernels round as their memory is aligned


def test_it_is_exported_with_its_code(tmp_path):
    export(GuidedDiffusionPipeline(tiny_model(), ladder()), tmp_path)
    module, name = json.loads((tmp_path / "model_index.json").read_text())["unet"]
    assert name == "ScoreUNetModel" and (tmp_path / "unet" / f"{module}.py").is_file()
    assert isinstance(GuidedDiffusionPipeline.from_pretrained(tmp_path).unet, ScoreUNetModel)


def test_its_code_stands_alone():
    source = single_file("ScoreUNetModel").split("# Where annealers is installed")[0]
    assert "annealers." not in "".join(line for line in source.splitlines() if line.startswith(("import", "from")))
    alone = {"__name__": "alone"}
    exec(compile(source, "alone", "exec"), alone)  # noqa: S102
    model = alone["ScoreUNetModel"](TINY, **LADDER)
    assert model(torch.zeros(1, 3, 8, 8), 3).sample.shape == (1, 3, 8, 8)
    assert type(model) is not annealers.ScoreUNetModel


# ---- published checkpoints ------------------------------------------------------------------------------------------

PUBLISHED = {"num_train_timesteps": 9, "sigma_min": 0.01, "sigma_max": 50.0, "snr": 0.15, "correct_steps": 1}


@pytest.fixture
def published(tmp_path):
    """Writes what `ScoreSdeVePipeline.save_pretrained` writes."""

    def write(**settings):
        tiny_unet().save_pretrained(tmp_path / "unet")
        ScoreSdeVeScheduler(**(PUBLISHED | settings)).save_pretrained(tmp_path / "scheduler")
        index = {"_class_name": "ScoreSdeVePipeline", "unet": ["diffusers", "UNet2DModel"]}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        return tmp_path

    return write


def published_chain(unet, scheduler, N, y, generator):
    """The loop of Diffusers' ScoreSdeVePipeline, with its own steps; every state, and the last mean, in [0, 1]."""
    scheduler.set_timesteps(N)
    scheduler.set_sigmas(N)
    states = []
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i] * torch.ones(len(y))
        for _ in range(scheduler.config.correct_steps):
            y = scheduler.step_correct(unet(y, sigma).sample, y, generator=generator).prev_sample
            states.append(y)
        output = scheduler.step_pred(unet(y, sigma).sample, t, y, generator=generator)
        y, mean = output.prev_sample, output.prev_sample_mean
        states.append(y)
    return [*states[:-1], mean]


@pytest.mark.parametrize(("N", "corrections"), [(9, 1), (9, 2), (5, 1), (3, 0)])
@pytest.mark.parametrize(("sampling_eps", "tolerance"), [(0.0, 2e-5), (1e-5, 1e-3)])
def test_the_chain_is_that_of_diffusers_noise_for_noise(published, N, corrections, sampling_eps, tolerance):
    # sampling_eps = 0 tells their network its level exactly, as we do; N - 1 is a power of two, because in theirs the
    # index of a level is float32 rounded down
    folder = published(correct_steps=corrections, sampling_eps=sampling_eps)
    pipeline = quiet(load_score_sde_ve(folder))
    pipeline.scheduler = PredictorCorrectorScheduler.from_config(
        pipeline.scheduler.config, step_size_rule="batch_norm"
    )
    start = 50.0 * draw(3, 3, 8, 8, seed=5).float()
    theirs = ScoreSdeVeScheduler.from_pretrained(folder, subfolder="scheduler")
    with torch.no_grad():
        expected = published_chain(tiny_unet(), theirs, N, start, torch.Generator().manual_seed(3))

    alpha = (1 + 100.0**2) ** -0.5
    trajectory = pipeline(
        num_inference_steps=N,
        latents=alpha * (2 * start - 1),
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        return_trajectory=True,
    ).trajectory
    assert trajectory.timesteps.tolist() == [t for i in range(N) for t in [8 - i * 8 // (N - 1)] * (corrections + 1)]
    levels = [*trajectory.timesteps[1:].tolist(), -1]  # the state after a call is on the level of the next
    alphas = pipeline.scheduler.signal_and_noise(torch.tensor(levels), torch.float32)[0]
    states = (trajectory.samples[1:] / alphas[:, None, None, None, None] + 1) / 2
    assert len(states) == len(expected)
    for state, other in zip(states, expected, strict=True):
        assert (state - other).abs().max() <= tolerance * other.abs().max()


def test_the_ladder_is_the_published_one_in_units_of_minus_one_to_one(published):
    pipeline = load_score_sde_ve(published(num_train_timesteps=2000, sigma_max=1348.0))
    theirs = ScoreSdeVeScheduler(2000, sigma_max=1348.0)
    alpha, sigma = pipeline.scheduler.signal_and_noise(torch.arange(2000))
    torch.testing.assert_close(sigma / alpha / 2, theirs.discrete_sigmas.double(), rtol=3e-6, atol=0)
    torch.testing.assert_close(pipeline.unet.noise_levels(torch.arange(2000)), sigma / alpha, rtol=1e-9, atol=0)


def test_the_published_settings_are_kept(published):
    pipeline = load_score_sde_ve(str(published(snr=0.2, correct_steps=3)))
    config = pipeline.scheduler.config
    assert isinstance(pipeline, GuidedDiffusionPipeline)
    assert isinstance(pipeline.scheduler, PredictorCorrectorScheduler)
    assert (config.snr, config.corrector_steps, config.predictor, config.layout) == (
        0.2,
        3,
        "reverse_diffusion",
        "full",
    )
    assert (config.step_size_rule, config.clip_sample, config.prediction_type) == ("sigma", False, "epsilon")
    assert pipeline.unet.config.data_range == "zero_to_one" and not pipeline.unet.training


def test_a_sample_of_a_published_network_does_not_depend_on_its_batch(published):
    pipeline = quiet(load_score_sde_ve(published()))
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    together = pipeline(generator=generators, num_inference_steps=9, output_type="pt").images
    alone = pipeline(generator=[torch.Generator().manual_seed(1)], num_inference_steps=9, output_type="pt").images
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [DDPMAncestralScheduler, AnnealedLangevinScheduler])
def test_a_published_network_samples_with_other_schedulers_and_is_saved(published, tmp_path, kind, recwarn):
    pipeline = load_score_sde_ve(published())
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "saved")
    images = [
        quiet(p)(generator=torch.Generator().manual_seed(0), num_inference_steps=4, output_type="np").images
        for p in (pipeline, GuidedDiffusionPipeline.from_pretrained(tmp_path / "saved"))
    ]
    assert images[0].shape == (1, 8, 8, 3)
    assert abs(images[0] - images[1]).max() < 1e-4  # kernels round as their memory is aligned


def test_no_code_of_a_published_folder_is_run(published):
    folder = published()
    for place in (folder, folder / "unet", folder / "scheduler"):
        (place / "ncsnpp.py").write_text("raise SystemExit('this file was run')")
    load_score_sde_ve(folder)


def test_a_folder_without_a_scheduler_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} .* has no scheduler/scheduler_config.json"):
        load_score_sde_ve(tmp_path)


def test_a_name_that_is_neither_folder_nor_hub_id_is_refused():
    with pytest.raises(FileNotFoundError, match="neither a folder on this machine nor a Hub id"):
        load_score_sde_ve("no/such/folder/here")


def test_only_the_network_and_the_scheduler_of_a_hub_repository_are_fetched(published, monkeypatch):
    folder, asked = published(), {}

    def download(name, **options):
        asked.update(name=name, **options)
        return str(folder)

    monkeypatch.setattr("annealers.score_sde.snapshot_download", download)
    assert isinstance(load_score_sde_ve("user/ncsnpp", revision="main"), GuidedDiffusionPipeline)
    assert asked == {"name": "user/ncsnpp", "revision": "main", "allow_patterns": ["unet/*", "scheduler/*"]}


def test_another_scheduler_and_missing_settings_are_refused(published):
    folder = published()
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    del config["snr"], config["sigma_min"]
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not say sigma_min, snr"):
        load_score_sde_ve(folder)
    file.write_text(json.dumps(config | {"_class_name": "DDPMScheduler"}))
    with pytest.raises(ValueError, match="has a DDPMScheduler, not a ScoreSdeVeScheduler"):
        load_score_sde_ve(folder)
