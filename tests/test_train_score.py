"""Score training: the losses are what they say, agree, find the exact score, and ignore how a run is split."""

import json
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image
from safetensors.torch import load_file
from scipy.spatial.distance import pdist
from two_processes import train_on_two_processes

from annealers import (
    AnnealedLangevinScheduler,
    DDPMAncestralScheduler,
    GuidedDiffusionPipeline,
    ModifiedEulerMaruyamaScheduler,
    PointScoreModel,
    PredictorCorrectorScheduler,
    ScoreUNetModel,
)
from annealers.configuration import parse_config
from annealers.data import load_data, toy_law
from annealers.randomness import PositionalRandomness
from annealers.training.train_score import ScoreConfig, ScoreTask, main

# With Adam's usual epsilon the first steps are the gradient's signs, which turn rounding into steps of full size.
QUICK = [
    *("--report_to", "none", "--batch_size", "16", "--validation_samples", "20", "--num_inference_steps", "2"),
    *("--adam_epsilon", "0.01", "--learning_rate", "0.01", "--lr_scheduler", "constant", "--log_every", "2"),
    *("--max_steps", "6", "--checkpoint_every", "3"),
]
POINTS = [*QUICK, "--dataset", "toy:ring", "--num_train_timesteps", "4"]
DIGITS = [*QUICK, "--max_steps", "1", "--block_out_channels", "32", "32", "--sample_columns", "1"]
SPLIT = {  # each loss, and each rule for timesteps
    "dsm": [],
    "ism": ["--loss", "ism"],
    "ism_probes": ["--loss", "ism", "--probes", "2", "--timestep_sampling", "loss_second_moment"],
    "sliced": ["--loss", "sliced", "--probe_kind", "gaussian"],
    "stratified": ["--timestep_sampling", "stratified"],
    "second_moment": ["--timestep_sampling", "loss_second_moment"],
}


def points(folder, *more):
    return [*POINTS, "--output_dir", str(folder), *map(str, more)]


def digits(folder, *more):
    return [*DIGITS, "--output_dir", str(folder), *map(str, more)]


def task_of(*arguments):
    config = parse_config(ScoreConfig, list(map(str, arguments)))
    return ScoreTask(config, load_data(config), PositionalRandomness(config.seed))


def live_weights(folder):
    return load_file(folder / "checkpoints" / "checkpoint-00000006" / "model.safetensors")


def saved_weights(folder):
    return load_file(folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scheduler_config(folder):
    return json.loads((folder / "pipeline" / "scheduler" / "scheduler_config.json").read_text())


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Each loss and each rule for timesteps."""
    root = tmp_path_factory.mktemp("one")
    for name, options in SPLIT.items():
        main(points(root / name, *options))
    return root


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The same on two processes, whole and resumed at the middle, and one with accumulation."""
    root = tmp_path_factory.mktemp("two")
    runs = [points(root / "accumulated", *SPLIT["ism_probes"], "--gradient_accumulation_steps", 2)]
    for name, options in SPLIT.items():
        middle = root / name / "checkpoints" / "checkpoint-00000003"
        runs.append(points(root / name, *options))
        runs.append(points(root / f"{name}_resumed", *options, "--resume", middle))
    train_on_two_processes("train_score", runs)
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Short trainings on two far modes by denoising and by implicit score matching."""
    root = tmp_path_factory.mktemp("trained")
    common = [
        *("--dataset", "toy:two_modes", "--max_steps", "200", "--batch_size", "256", "--learning_rate", "4e-3"),
        *("--num_train_timesteps", "100", "--sigma_min", "0.3", "--timestep_sampling", "stratified"),
        *("--validation_samples", "512", "--validate_every", "0", "--sample_every", "0", "--report_to", "none"),
        *("--num_inference_steps", "10"),
    ]
    for loss in ("dsm", "ism"):
        main([*common, "--loss", loss, "--output_dir", str(root / loss)])
    return root


# ---- exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPLIT)
def test_two_processes_train_the_weights_of_one(one_process, two_processes, name):
    assert largest_difference(live_weights(one_process / name), live_weights(two_processes / name)) < 1e-5
    assert largest_difference(saved_weights(one_process / name), saved_weights(two_processes / name)) < 1e-5


def test_accumulation_trains_the_weights_of_whole_batches(one_process, two_processes):
    whole, accumulated = live_weights(one_process / "ism_probes"), live_weights(two_processes / "accumulated")
    assert largest_difference(whole, accumulated) < 1e-5


@pytest.mark.parametrize("name", SPLIT)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(two_processes, name):
    whole, resumed = two_processes / name, two_processes / f"{name}_resumed"
    assert largest_difference(live_weights(whole), live_weights(resumed)) == 0
    assert largest_difference(saved_weights(whole), saved_weights(resumed)) == 0


def test_one_process_resumes_bit_for_bit_with_probes_and_learnt_probabilities(one_process, tmp_path):
    middle = one_process / "ism_probes" / "checkpoints" / "checkpoint-00000003"
    main(points(tmp_path, *SPLIT["ism_probes"], "--resume", middle))
    assert largest_difference(live_weights(one_process / "ism_probes"), live_weights(tmp_path)) == 0


def test_each_way_of_training_leads_to_other_weights(one_process):
    """So that the comparisons above can fail: an option that is not read would pass them all."""
    for a, b in pairwise(SPLIT):
        assert largest_difference(saved_weights(one_process / a), saved_weights(one_process / b)) > 1e-3


@pytest.mark.parametrize("name", ["ism_probes", "second_moment"])
def test_the_learnt_probabilities_of_timesteps_were_in_use(one_process, name):
    state = load_file(one_process / name / "checkpoints" / "checkpoint-00000003" / "model.safetensors")
    assert (state["timestep_sampler.observed"] >= 10).all()  # a full history at half of the run


@pytest.mark.parametrize("name", SPLIT)
def test_validation_and_losses_are_the_same_on_two_processes(one_process, two_processes, name):
    for ours, theirs in zip(metrics(one_process / name), metrics(two_processes / name), strict=True):
        assert ours.keys() == theirs.keys()
        for entry in ours.keys() - {"seconds"}:
            assert ours[entry] == pytest.approx(theirs[entry], rel=1e-4, abs=1e-6), entry


def test_what_is_random_about_an_image_depends_on_its_position_alone():
    task = task_of("--loss", "ism", "--probes", 2, "--timestep_sampling", "stratified", "--batch_size", 8)
    images, labels = torch.zeros(8, 1, 8, 8), torch.arange(8)
    whole = task.draws({"images": images, "labels": labels, "first_position": 16})
    halves = [
        task.draws({"images": images[half], "labels": labels[half], "first_position": 16 + half.start})
        for half in (slice(0, 4), slice(4, 8))
    ]
    assert whole.keys() == {"images", "noise", "timesteps", "timestep_weights", "probes", "class_labels"}
    for name, value in whole.items():
        torch.testing.assert_close(torch.cat([half[name] for half in halves]), value, rtol=0, atol=0)
    for name in ("noise", "probes"):
        assert len(whole[name].flatten(1).unique(dim=0)) == 8, name


# ---- the losses -----------------------------------------------------------------------------------------------------


class Linear(torch.nn.Module):
    """eps-hat = c x."""

    def __init__(self, c):
        super().__init__()
        self.c = torch.nn.Parameter(torch.tensor(c))

    def forward(self, x, timesteps, class_labels=None):
        return UNet2DOutput(self.c * x)


def losses_of_a_linear_network(c, *options):
    """The loss of eps-hat = c x and what it is made of, as float64: x_t, eps, sigma, SNR, and the options' probes."""
    task = task_of("--dataset", "toy:moons", "--num_train_timesteps", 50, *options)
    objective = task.build()
    objective.network = Linear(c)
    images = torch.randn(7, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    batch = {"images": images, "first_position": 32}
    draws = task.draws(batch)
    draws["timesteps"] = torch.tensor([0, 1, 7, 20, 30, 48, 49])
    draws["timestep_weights"] = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.5, 1.0, 3.0])
    with torch.no_grad():
        loss = objective(**draws)["loss"].double()
    alphas_cumprod = objective.scheduler.signal_and_noise(torch.arange(50))[0] ** 2
    sigma = (1 - alphas_cumprod[draws["timesteps"]]).sqrt()
    snr = alphas_cumprod / (1 - alphas_cumprod)
    eps = draws["noise"].double().flatten(1)
    x_t = alphas_cumprod[draws["timesteps"]].sqrt()[:, None] * images.double().flatten(1)
    return {
        "loss": loss / draws["timestep_weights"].double(),
        "x": x_t + sigma[:, None] * eps,
        "eps": eps,
        "sigma": sigma,
        "snr": snr,
        "timesteps": draws["timesteps"],
        "probes": draws["probes"].double().flatten(2) if "probes" in draws else None,
    }


def test_denoising_with_weight_sigma_squared_is_the_error_of_the_noise():
    found = losses_of_a_linear_network(0.7)
    assert found["probes"] is None
    expected = (0.7 * found["x"] - found["eps"]).square().mean(1)
    torch.testing.assert_close(found["loss"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [[], ["--probes", 3], ["--probes", 0]], ids=["exact", "probes", "zero"])
def test_implicit_matching_of_a_linear_network_is_known(options):
    """sigma^2 (|s|^2 + 2 div s) / d + 1 with s = -c x / sigma: random signs see a multiple of I without error."""
    c = 0.7
    found = losses_of_a_linear_network(c, "--loss", "ism", *options)
    assert (found["probes"] is None) == (options != ["--probes", 3])
    expected = c**2 * found["x"].square().mean(1) - 2 * c * found["sigma"] + 1
    torch.testing.assert_close(found["loss"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_sliced_matching_of_a_linear_network_is_known(kind):
    c = 0.7
    found = losses_of_a_linear_network(c, "--loss", "sliced", "--probes", 3, "--probe_kind", kind)
    v = found["probes"]  # (B, K, 2)
    assert v.shape == (7, 3, 2) and bool((v.abs() == 1).all()) == (kind == "rademacher")
    projection = (v * found["x"][:, None]).sum(2).square() / 2
    curvature = found["sigma"][:, None] * v.square().sum(2) / 2
    expected = (c**2 * projection - 2 * c * curvature).mean(1) + 1
    torch.testing.assert_close(found["loss"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss", ["dsm", "ism", "sliced"])
def test_weights_multiply_the_mismatch_of_a_level(loss):
    def ratio(*options):
        plain, weighted = (losses_of_a_linear_network(0.7, "--loss", loss, *more) for more in ([], options))
        return weighted["loss"] / plain["loss"], plain["snr"], plain["timesteps"]

    weights, snr, t = ratio("--weighting", "min_snr", "--min_snr_gamma", 3.0)
    torch.testing.assert_close(weights, (3.0 / snr[t]).clamp(max=1), rtol=1e-4, atol=1e-6)
    weights, snr, t = ratio("--weighting", "likelihood")
    torch.testing.assert_close(weights[1:], snr[t[1:] - 1] / snr[t[1:]] - 1, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [["--loss", "ism"], ["--loss", "ism", "--probes", 1], ["--loss", "sliced"]])
def test_all_losses_have_the_mean_of_denoising(options):
    """At the exact score of a mixture, by the difference on the same noisy points."""
    n, means = 4000, []
    for more in ([], options):
        task = task_of("--dataset", "toy:moons", "--num_train_timesteps", 50, *more)
        objective = task.build()
        objective.network = DifferentiableLaw(task.law, objective.scheduler)
        images = task.law.sample(n, generator=torch.Generator().manual_seed(1))
        draws = task.draws({"images": images, "first_position": 0})
        means.append(objective(**draws | {"timesteps": torch.full((n,), 30)})["loss"].detach().double())
    difference = means[0] - means[1]
    standard_error = difference.std().item() / n**0.5
    assert abs(difference.mean().item()) < 4 * standard_error and standard_error < 0.03
    assert means[0].mean() > 0.15  # two losses that lacked the +1 or a factor would differ by more than that


class DifferentiableLaw(torch.nn.Module):
    """The exact noise of a law by autograd of its log-density, so that it can be differentiated again."""

    def __init__(self, law, scheduler):
        super().__init__()
        self.law, self.scheduler = law, scheduler

    def forward(self, x, timesteps, class_labels=None):
        alpha, sigma = self.scheduler.signal_and_noise(timesteps)
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            log_density = self.law.log_prob(x.double(), alpha, sigma).sum()
            (score,) = torch.autograd.grad(log_density, x, create_graph=True)
        return UNet2DOutput(-sigma.reshape(-1, 1, 1, 1).float() * score)


# ---- what is learnt -------------------------------------------------------------------------------------------------


def test_denoising_and_implicit_matching_reach_the_exact_score_and_each_other(trained):
    """Zero has the error 1, and the best multiple of x_t at each level about 0.5."""
    for loss in ("dsm", "ism"):
        assert metrics(trained / loss)[-1]["validation/score_error"] < 0.03
    dsm, ism = (GuidedDiffusionPipeline.from_pretrained(trained / loss / "pipeline") for loss in ("dsm", "ism"))
    law = toy_law("toy:two_modes")
    for t in (5, 30, 60, 95):
        alpha, sigma = map(float, dsm.scheduler.signal_and_noise(t))
        x = law.sample(1000, alpha, sigma, generator=torch.Generator().manual_seed(t))
        exact = law.noise(x, alpha, sigma)
        with torch.no_grad():
            difference = dsm.unet(x, t).sample - ism.unet(x, t).sample
        assert difference.square().sum() < 0.05 * exact.square().sum(), t


SAMPLERS = {
    "saved": lambda config: PredictorCorrectorScheduler.from_config(config),
    "langevin": lambda config: AnnealedLangevinScheduler.from_config(config),
    "corrected": lambda config: PredictorCorrectorScheduler.from_config(config, predictor="ddpm", corrector_steps=1),
    "ancestral": lambda config: DDPMAncestralScheduler.from_config(config),
    "modified": lambda config: ModifiedEulerMaruyamaScheduler.from_config(config),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_trained_pipeline_samples_with_every_scheduler(trained, name):
    pipeline = GuidedDiffusionPipeline.from_pretrained(trained / "dsm" / "pipeline")
    path = pipeline.scheduler.alphas_cumprod
    pipeline.scheduler = SAMPLERS[name](pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    assert torch.equal(pipeline.scheduler.alphas_cumprod, path)
    count = 400
    samples = pipeline(
        batch_size=count,
        num_inference_steps=20,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images.flatten(1)
    centres = torch.tensor([[5.0, 5.0], [-5.0, -5.0]])
    distance, mode = torch.cdist(samples, centres).min(1)
    assert (distance < 3.5).float().mean() > 0.95  # of the law itself, 99.8 %
    assert abs((mode == 0).float().mean().item() - 0.8) < 0.1  # five standard errors
    assert 0.7 < (samples - centres[mode]).std(0).mean() < 1.3  # of the law itself, 1


@pytest.mark.parametrize(("answer", "error"), [("exact", 0.0), ("zero", 1.0)])
def test_validation_measures_the_error_of_the_score_and_the_loss_by_quarter(answer, error):
    levels = ["--num_train_timesteps", 8, "--num_inference_steps", 8]
    task = task_of("--dataset", "toy:ring", "--validation_samples", 300, *levels)
    objective = task.build()
    scheduler = objective.scheduler
    if answer == "exact":
        objective.network = task.law.as_model(scheduler)
    else:
        objective.network = Linear(0.0)
    with torch.no_grad():
        values = task.validate(objective, Accelerator())
    for name in ("score_error", *(f"score_error_quarter_{i}" for i in (1, 2, 3, 4))):
        assert values[name] == pytest.approx(error, abs=1e-9), name
    assert values["images"] == 300
    for i in range(4):  # two levels in each quarter
        levels = torch.arange(2 * i, 2 * i + 2)
        alpha, sigma = scheduler.signal_and_noise(levels.repeat_interleave(5000))
        x_t = task.law.sample(10_000, alpha, sigma, generator=torch.Generator().manual_seed(2))
        explained = task.law.noise(x_t, alpha, sigma).double().square().mean().item()  # |eps|^2 = |eps*|^2 + the rest
        expected = 1.0 if answer == "zero" else 1 - explained
        # 600 points of two coordinates; the squared noise has variance 2
        assert abs(values[f"loss_quarter_{i + 1}"] - expected) < 5 * (2 / 1200) ** 0.5, i


# ---- the noise levels -----------------------------------------------------------------------------------------------


def test_sigma_max_is_the_largest_distance_in_the_data_and_goes_into_the_scheduler(tmp_path):
    main(digits(tmp_path, "--max_train_samples", 20))
    data = load_data(parse_config(ScoreConfig, ["--max_train_samples", "20"]))
    rows = torch.stack([data.train[i]["image"] for i in range(len(data.train))]).double() / 127.5 - 1
    config = scheduler_config(tmp_path)
    assert config["sigma_max"] == pytest.approx(pdist(rows.flatten(1).numpy()).max(), rel=1e-5)
    assert (config["sigma_min"], config["beta_schedule"], config["clip_sample"]) == (0.01, "geometric", True)


def test_a_sigma_max_that_is_given_is_taken(tmp_path):
    main(points(tmp_path, "--max_steps", 1, "--sigma_max", 7.5, "--sigma_min", 0.2))
    config = scheduler_config(tmp_path)
    assert (config["sigma_max"], config["sigma_min"], config["clip_sample"]) == (7.5, 0.2, False)


@pytest.mark.parametrize("process", ["vp", "sub_vp"])
def test_the_other_processes_have_beta_from_a_tenth_to_twenty(process):
    T = 200
    scheduler = task_of("--dataset", "toy:ring", "--process", process, "--num_train_timesteps", T).build().scheduler
    alpha, sigma = scheduler.signal_and_noise(torch.arange(T))
    if process == "vp":
        betas = torch.linspace(0.1, 20, T, dtype=torch.float64) / T  # Song et al. 2021, App. B
        remaining = (1 - betas).cumprod(0)
        noise = (1 - remaining).sqrt()
    else:
        t = torch.arange(1, T + 1, dtype=torch.float64) / T
        remaining = (-(0.1 * t + 0.5 * 19.9 * t**2)).exp()  # the integral of beta
        noise = 1 - remaining
    torch.testing.assert_close(alpha / sigma, remaining.sqrt() / noise, rtol=1e-3, atol=0)


# ---- what a run leaves ----------------------------------------------------------------------------------------------


def test_a_run_on_points_leaves_a_picture_metrics_and_a_card(one_process):
    folder = one_process / "dsm"
    assert Image.open(folder / "samples.png").width > 800
    last = metrics(folder)[-1]
    assert {f"validation/score_error_quarter_{i}" for i in (1, 2, 3, 4)} < last.keys()
    card = (folder / "pipeline" / "README.md").read_text()
    assert "score-matching" in card and "score_error" in card and "pipeline(batch_size=4)" in card
    assert isinstance(GuidedDiffusionPipeline.from_pretrained(folder / "pipeline").unet, PointScoreModel)


@pytest.mark.parametrize("conditioning", ["positional", "fourier"])
def test_a_narrow_unet_knows_the_level_and_the_class(conditioning):
    """With one channel in each group the normalisation takes out what is the same at all pixels."""
    task = task_of("--conditioning", conditioning, "--block_out_channels", 32, 32, "--sigma_max", 9.0)
    network = task.build().network.eval()
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        by_class = [network(x, 500, class_labels=torch.tensor([label])).sample for label in (3, 4)]
        by_level = [network(x, t, class_labels=torch.tensor([3])).sample for t in (499, 500)]
    for a, b in (by_class, by_level):
        assert (a - b).abs().max() > 1e-3


def test_a_run_on_images_draws_classes_by_name(tmp_path):
    main(digits(tmp_path, "--loss", "ism"))  # second derivatives of the UNet, by one probe
    pipeline = GuidedDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    images = pipeline(class_labels=["3", "7"], num_inference_steps=2, guidance_scale=2.0).images
    assert [image.size for image in images] == [(8, 8), (8, 8)]
    assert Image.open(tmp_path / "samples.png").height > 10 * 48
    assert "validation/score_error" not in metrics(tmp_path)[-1]


def test_fourier_conditioning_trains_the_score_of_y_and_samples_alike(tmp_path):
    main(digits(tmp_path, "--conditioning", "fourier", "--sigma_max", 9.0, "--num_train_timesteps", 50))
    pipeline = GuidedDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    network = pipeline.unet
    assert isinstance(network, ScoreUNetModel)
    alpha, sigma = pipeline.scheduler.signal_and_noise(torch.arange(50))
    torch.testing.assert_close(network.noise_levels(torch.arange(50)), sigma / alpha, rtol=1e-6, atol=0)
    pipeline.scheduler = AnnealedLangevinScheduler.from_config(pipeline.scheduler.config)
    assert len(pipeline(class_labels=["3"], num_inference_steps=20).images) == 1


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--process", "vp", "--sigma_max", "3"], "sigma_max=3.0 is of the process 've', not of 'vp'"),
        (["--process", "sub_vp", "--conditioning", "fourier"], "'fourier' is for the levels of 've'"),
        (["--dataset", "toy:ring", "--conditioning", "fourier"], "'fourier' is for a UNet on images"),
        (["--probes", "2"], "probes are for 'ism'"),
        (["--loss", "sliced", "--probes", "0"], "probes are for 'ism'"),
        (["--loss", "ism", "--probes", "-1"], "probes are for 'ism'"),
        (["--loss", "ism", "--compile"], "second derivatives"),
        (["--condition_dropout", "1.5"], "condition_dropout must lie in"),
    ],
)
def test_choices_that_do_not_go_together_end_with_a_usage_message(tmp_path, options, named, capsys):
    with pytest.raises(SystemExit):
        main([*options, "--output_dir", str(tmp_path)])
    assert named in capsys.readouterr().err


def test_a_ladder_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
        main(points(tmp_path, "--sigma_min", 5.0, "--sigma_max", 1.0))
