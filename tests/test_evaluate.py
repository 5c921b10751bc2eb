"""Evaluation gives the numbers of the library, for any pipeline, batch size and number of processes."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, LDMPipeline, UNet2DModel, VQModel
from two_processes import TORCHRUN, launch

from annealers import DDPMAncestralScheduler, GuidedDiffusionPipeline, NoisyClassifierModel
from annealers.configuration import parse_config
from annealers.data import DataConfig, load_data, validation_batches
from annealers.data.config import DataError
from annealers.likelihood import chain_scheduler, probability_flow_bits, variational_bounds
from annealers.randomness import PositionalRandomness
from annealers.training.evaluate import EvaluateConfig, Evaluation, main

ROOT = Path(__file__).parents[1]
T = 30
NAMES = {i: str(i) for i in range(10)}


def unet(out_channels=1, in_channels=1, size=8, classes=None, seed=0):
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=size,
        in_channels=in_channels,
        out_channels=out_channels,
        block_out_channels=(32,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        num_class_embeds=classes,
        norm_num_groups=8,  # a group of one channel would take out what the embedding has put in
    ).eval()


def scheduler(**more):
    return DDPMAncestralScheduler(num_train_timesteps=T, beta_end=0.3, **more)


@pytest.fixture(scope="module")
def two_headed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_headed")
    GuidedDiffusionPipeline(unet(2), scheduler(variance_type="learned_range")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    """Its class ids are those of the data backwards."""
    folder = tmp_path_factory.mktemp("conditional")
    backwards = {i: NAMES[9 - i] for i in range(10)}
    GuidedDiffusionPipeline(unet(classes=11), scheduler(), backwards, null_label=10).save_pretrained(folder)
    return folder


def arguments(pipeline, output, *more):
    fast = ["--samples", 6, "--batch_size", 4, "--calibration_samples", 8, "--calibration_timesteps", 6]
    return ["--bits-per-dim", "--pipeline", *map(str, [pipeline, "--output", output, *fast, *more])]


def results(pipeline, folder, *more):
    main(arguments(pipeline, folder / "results.json", *more))
    return json.loads((folder / "results.json").read_text())["results"]


def row(found, **settings):
    (result,) = [r for r in found if all(r.get(name) == value for name, value in settings.items())]
    return result


EVERYTHING = [
    *("--likelihoods", "vlb", "ode", "--steps", 4, T, "--spacings", "linspace", "optimal"),
    *(
        "--variance-types",
        "fixed_large",
        "learned_range",
        "optimal",
        "--evaluated-steps",
        5,
        "--tolerances",
        0.01,
        0.1,
    ),
]


@pytest.fixture(scope="module")
def everything(two_headed, tmp_path_factory):
    return results(two_headed, tmp_path_factory.mktemp("one"), *EVERYTHING)


def held_out(samples, resolution=None):
    data = load_data(DataConfig(label_column="none", resolution=resolution))
    return next(validation_batches(data, samples, max_samples=samples))


def generators(rows, purpose):
    return [torch.Generator().manual_seed(PositionalRandomness(0).step_seed(int(i), purpose)) for i in rows]


# ---- the numbers ----------------------------------------------------------------------------------------------------


def test_each_setting_has_a_row_with_its_kind_and_error(everything):
    bounds = [r for r in everything if r["likelihood"] == "vlb"]
    assert len(bounds) == 3 * (1 + 2) and len(everything) == len(bounds) + 2
    assert {r["spacing"] for r in bounds if r["steps"] == T} == {"all"}
    for result in everything:
        values = torch.tensor(result["values"], dtype=torch.float64)
        assert result["n"] == len(values) == len(result["rows"]) == 6 and result["metric"] == "bits_per_dim"
        assert result["mean"] == pytest.approx(values.mean().item())
        assert result["standard_error"] == pytest.approx(values.std().item() / 6**0.5)
    for result in bounds:
        assert result["prior"] + result["divergences"] + result["decoder"] == pytest.approx(result["mean"])
    assert "estimated by" in row(everything, steps=T, variance_type="optimal")["kind"]
    assert row(everything, steps=4, spacing="optimal", variance_type="fixed_large")["kind"].endswith("4 steps")
    assert "1 rademacher probe" in row(everything, tolerance=0.1)["kind"]


def test_differences_are_taken_image_by_image_to_the_longest_chain_of_the_same_variance(everything):
    for variance in ("fixed_large", "learned_range", "optimal"):
        whole = row(everything, steps=T, variance_type=variance)
        assert "difference" not in whole
        for spacing in ("linspace", "optimal"):
            short = row(everything, steps=4, spacing=spacing, variance_type=variance)
            values = torch.tensor(short["values"]) - torch.tensor(whole["values"])
            assert short["difference"]["to_steps"] == T
            assert short["difference"]["mean"] == pytest.approx(values.mean().item(), abs=1e-4)
            assert short["difference"]["standard_error"] == pytest.approx(values.std().item() / 6**0.5, rel=1e-3)


def test_the_numbers_are_those_of_the_library(two_headed, tmp_path):
    found = results(two_headed, tmp_path, "--likelihoods", "vlb", "ode", "--tolerances", 0.1, "--probes", 2)
    pipeline, batch = GuidedDiffusionPipeline.from_pretrained(two_headed), held_out(6)
    (bound,) = variational_bounds(
        pipeline.unet, [chain_scheduler(pipeline.scheduler)], batch["images"], generator=generators(batch["rows"], 0)
    )
    flow = probability_flow_bits(
        pipeline.unet,
        pipeline.scheduler,
        batch["images"],
        2,
        relative_tolerance=0.1,
        absolute_tolerance=0.1,
        generator=generators(batch["rows"], 1),
    )
    vlb, ode = row(found, likelihood="vlb"), row(found, likelihood="ode")
    assert vlb["rows"] == batch["rows"].tolist() and vlb["variance_type"] == "learned_range"
    assert vlb["values"] == pytest.approx(bound.values.tolist(), rel=1e-4)
    assert ode["values"] == pytest.approx(flow.values.tolist(), rel=1e-3)
    assert ode["calls"] == pytest.approx(flow.calls.double().mean().item())


def test_numbers_of_an_image_do_not_depend_on_the_batch_size_and_on_how_many_images_there_are(two_headed, tmp_path):
    one = results(two_headed, tmp_path, "--steps", 4)[0]
    other = results(two_headed, tmp_path, "--steps", 4, "--batch_size", 3, "--samples", 40)[0]
    values = dict(zip(other["rows"], other["values"], strict=True))
    assert len(values) == 40
    assert [values[i] for i in one["rows"]] == pytest.approx(one["values"], rel=1e-4)
    assert results(two_headed, tmp_path, "--steps", 4, "--seed", 1)[0]["values"] != one["values"]


def test_several_processes_give_the_numbers_of_one(two_headed, everything, tmp_path):
    """Three, of which the last has no images."""
    options = arguments(two_headed, tmp_path / "three.json", *EVERYTHING)
    done = launch(*TORCHRUN, 3, ROOT / "training" / "evaluate.py", *options)
    found = json.loads((tmp_path / "three.json").read_text())["results"]
    for one, other in zip(found, everything, strict=True):
        assert [one[name] for name in ("kind", "rows", "n")] == [other[name] for name in ("kind", "rows", "n")]
        assert one["values"] == pytest.approx(other["values"], rel=1e-5 if one["likelihood"] == "vlb" else 1e-3)
    assert done.stdout.count("bits_per_dim") == len(everything)  # once, by the main process


def test_what_the_processes_found_is_put_in_the_order_of_the_rows(two_headed, tmp_path):
    evaluation = Evaluation(parse_config(EvaluateConfig, arguments(two_headed, tmp_path)))
    batches = [torch.tensor([[0.5, 0.2], [50.0, 20.0]]), torch.tensor([[0.3], [30.0]])]  # (metrics, images)
    rows, values = evaluation.gathered([5, 2, 3], batches)
    assert rows == [2, 3, 5]
    torch.testing.assert_close(values.float(), torch.tensor([[0.2, 0.3, 0.5], [20.0, 30.0, 50.0]]))


def test_what_the_config_knows_is_not_measured_again(tmp_path):
    known = {"mean_squared_noise": [0.9] * T, "denoising_error": [0.1] * T}
    for name, more in (("known", known), ("unknown", {})):
        GuidedDiffusionPipeline(unet(), scheduler(**more)).save_pretrained(tmp_path / name)
    options = ["--variance-types", "optimal", "--spacings", "optimal", "--steps", 4]
    known_bound, measured_bound = (results(tmp_path / n, tmp_path, *options)[0] for n in ("known", "unknown"))
    pipeline, batch = GuidedDiffusionPipeline.from_pretrained(tmp_path / "known"), held_out(6)
    chain = chain_scheduler(pipeline.scheduler, "optimal", "optimal")
    chain.set_timesteps(4)
    expected = variational_bounds(pipeline.unet, [chain], batch["images"], None, generators(batch["rows"], 0))[0]
    assert known_bound["values"] == pytest.approx(expected.values.tolist(), rel=1e-4)
    assert measured_bound["values"] != known_bound["values"]


# ---- every kind of pipeline and data --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pipeline_class", "theirs"), [(DDPMPipeline, DDPMScheduler), (DDIMPipeline, DDIMScheduler)], ids=["ddpm", "ddim"]
)
def test_pipelines_of_diffusers_have_the_numbers_of_ours(pipeline_class, theirs, tmp_path):
    config = {"num_train_timesteps": T, "beta_end": 0.3}
    pipeline_class(unet(), theirs(**config)).save_pretrained(tmp_path / "theirs")
    GuidedDiffusionPipeline(unet(), scheduler()).save_pretrained(tmp_path / "ours")
    options = ["--likelihoods", "vlb", "ode", "--steps", 4, "--tolerances", 0.05]
    for one, other in zip(*(results(tmp_path / n, tmp_path, *options) for n in ("theirs", "ours")), strict=True):
        assert one == other


def test_a_classifier_beside_the_network_changes_nothing(two_headed, tmp_path):
    pipeline = GuidedDiffusionPipeline.from_pretrained(two_headed)
    pipeline.classifier = NoisyClassifierModel(
        sample_size=8,
        in_channels=1,
        num_classes=10,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        norm_num_groups=4,
    )
    pipeline.save_pretrained(tmp_path / "with")
    (alone,), (beside,) = (
        results(two_headed, tmp_path, "--steps", 3),
        results(tmp_path / "with", tmp_path, "--steps", 3),
    )
    assert beside["values"] == alone["values"]


def test_images_are_resized_for_the_network(tmp_path):
    GuidedDiffusionPipeline(unet(size=16), scheduler()).save_pretrained(tmp_path / "larger")
    found = results(tmp_path / "larger", tmp_path, "--steps", 3)[0]
    pipeline, batch = GuidedDiffusionPipeline.from_pretrained(tmp_path / "larger"), held_out(6, resolution=16)
    chain = chain_scheduler(pipeline.scheduler, timestep_spacing="linspace")
    chain.set_timesteps(3)
    expected = variational_bounds(pipeline.unet, [chain], batch["images"], None, generators(batch["rows"], 0))[0]
    assert found["values"] == pytest.approx(expected.values.tolist(), rel=1e-4)
    with pytest.raises(DataError, match="of size 16, those of 'digits' 8"):
        results(tmp_path / "larger", tmp_path, "--resolution", 8)


def test_a_conditional_network_is_told_the_class_by_its_name(conditional, tmp_path):
    evaluation = Evaluation(parse_config(EvaluateConfig, arguments(conditional, tmp_path)))
    batch = next(validation_batches(evaluation.data, 6, max_samples=6))
    images = next(evaluation.held_out())
    assert images.conditions["class_labels"].tolist() == [9 - label for label in batch["labels"].tolist()[:4]]
    assert len(batch["labels"].unique()) > 1
    null = Evaluation(parse_config(EvaluateConfig, arguments(conditional, tmp_path, "--class_labels", "null")))
    assert next(null.held_out()).conditions["class_labels"].tolist() == [10] * 4

    told, untold = (
        results(conditional, tmp_path, "--steps", 3, *more)[0] for more in ((), ("--class_labels", "null"))
    )
    assert told["values"] != untold["values"]


def test_labels_that_cannot_be_had_are_an_error(conditional, tmp_path):
    with pytest.raises(ValueError, match="'digits' has no labels: give --label_column"):
        results(conditional, tmp_path, "--label_column", "none")
    GuidedDiffusionPipeline(unet(classes=10), scheduler()).save_pretrained(tmp_path / "no_null")
    with pytest.raises(ValueError, match="no null label"):
        results(tmp_path / "no_null", tmp_path, "--class_labels", "null")
    GuidedDiffusionPipeline(unet(classes=2), scheduler(), {0: "cat", 1: "dog"}).save_pretrained(tmp_path / "pets")
    with pytest.raises(ValueError, match="is not one of the network's: cat, dog"):
        results(tmp_path / "pets", tmp_path)
    GuidedDiffusionPipeline(unet(classes=2), scheduler()).save_pretrained(tmp_path / "nameless")
    with pytest.raises(ValueError, match=r"is not one of the network's, which are 0 \.\. 1"):
        results(tmp_path / "nameless", tmp_path)


# ---- errors ---------------------------------------------------------------------------------------------------------


def usage_error(capsys, *options):
    with pytest.raises(SystemExit) as stopped:
        main([str(option) for option in options])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_without_a_metric_the_usage_lists_them(capsys):
    assert "no metric is asked for; there are: --bits-per-dim" in usage_error(capsys, "--pipeline", "somewhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pipeline"], "expected one argument"),
        ([], "--pipeline is required"),
        (["--pipeline", "p", "--likelihoods", "iwae"], "likelihoods must be among vlb, ode, got iwae"),
        (["--pipeline", "p", "--spacings", "even"], "spacings must be among leading, .*, got even"),
        (["--pipeline", "p", "--variance-types", "small"], "variance_types must be among .*, got small"),
        (["--pipeline", "p", "--probe-kind", "signs"], "probe_kind must be one of rademacher, gaussian, got signs"),
        (["--pipeline", "p", "--samples", "1"], "samples must be at least 2, got 1"),
        (["--pipeline", "p", "--probes", "-1"], "probes must not be negative, got -1"),
        (["--pipeline", "p", "--dataset", "toy:ring"], "images of 256 levels, and toy:ring has points"),
        (["--pipeline", "p", "--frechet"], "unrecognized arguments|not used by the HfArgumentParser"),
    ],
)
def test_options_that_do_not_fit_are_usage_errors(options, message, capsys):
    assert re.search(message, usage_error(capsys, "--bits-per-dim", *options))


def test_a_learned_variance_needs_the_network_that_learnt_it(two_headed, conditional, tmp_path):
    with pytest.raises(ValueError, match="'learned_range' needs a network with 2 output channels, this one has 1"):
        results(conditional, tmp_path, "--variance-types", "learned_range")
    with pytest.raises(
        ValueError, match="'learned' is not what the network was trained for, which is 'learned_range'"
    ):
        results(two_headed, tmp_path, "--variance-types", "learned")


def test_data_and_networks_that_do_not_fit_are_refused(tmp_path):
    GuidedDiffusionPipeline(unet(3, in_channels=3), scheduler()).save_pretrained(tmp_path / "colour")
    with pytest.raises(DataError, match="3 channels, those of 'digits' 1: set --channels 3"):
        results(tmp_path / "colour", tmp_path)
    assert results(tmp_path / "colour", tmp_path, "--channels", 3, "--steps", 2)[0]["n"] == 6
    with pytest.raises(FileNotFoundError, match="not a saved pipeline"):
        results(tmp_path, tmp_path)


def test_a_pipeline_that_does_not_see_pixels_is_refused(tmp_path):
    LDMPipeline(vqvae=VQModel(), unet=unet(), scheduler=DDIMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'unet' that sees pixels and a 'scheduler', .* LDMPipeline with .*vqvae"):
        results(tmp_path, tmp_path)
