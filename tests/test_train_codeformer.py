"""The restorer's script: its losses and their ways, what it measures, and that nothing depends on the processes."""

import json
from functools import cache

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image, ImageChops
from safetensors.torch import load_file
from two_processes import train_on_two_processes

from annealers import CodeFormerPipeline, GANDiscriminator, NoisyClassifierModel, VQVAEModel, VQVAEPriorPipeline
from annealers.data import load_data, validation_batches
from annealers.feature_loss import FeatureLoss
from annealers.image_degradations import DegradationRanges, degrade
from annealers.randomness import PositionalRandomness
from annealers.training.train_codeformer import CodeFormerConfig, CodeFormerTask, main

TINY = [
    *("--hidden_size", "16", "--num_layers", "1", "--num_heads", "2", "--batch_size", "16", "--dropout", "0"),
    *("--validation_samples", "20", "--sample_columns", "3", "--report_to", "none", "--log_every", "2"),
    # With Adam's usual epsilon the first steps are the gradient's signs, which turn rounding into steps of full size.
    *("--adam_epsilon", "0.01", "--learning_rate", "0.01", "--lr_scheduler", "constant", "--lr_warmup_steps", "0"),
]
GAME = ["--adversarial_weight", "0.8", "--adversarial_start", "1", "--discriminator_channels", "8", "16"]


def vqvae_of(channels=1):
    torch.manual_seed(0)
    return VQVAEModel(
        in_channels=channels,
        sample_size=8,
        block_out_channels=(8, 16),
        latent_channels=8,
        norm_num_groups=4,
        num_vq_embeddings=12,
        mid_block_add_attention=False,
    ).eval()


@pytest.fixture(scope="module")
def vqvae(tmp_path_factory):
    """Folder of a VQ-VAE of digits, untrained."""
    folder = tmp_path_factory.mktemp("vqvae")
    VQVAEPriorPipeline(vqvae_of()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Folder with a classifier of digits, untrained."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(1)
    NoisyClassifierModel(8, 1, 10, block_out_channels=(8, 8), norm_num_groups=4).save_pretrained(folder / "classifier")
    return folder


def arguments(folder, vqvae, *more):
    run = ["--vqvae", str(vqvae), "--output_dir", str(folder), "--max_steps", "4", "--checkpoint_every", "2"]
    return [*TINY, *run, *map(str, more)]


def weights(folder, part=None):
    if part == "pipeline":
        return load_file(folder / "pipeline" / "code_former" / "diffusion_pytorch_model.safetensors")
    return load_file(folder / "checkpoints" / "checkpoint-00000004" / f"{part or 'model'}.safetensors")


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@cache
def digits():
    return load_data(CodeFormerConfig())


def task(vqvae, **options):
    small = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.0, "validation_samples": 20}
    config = CodeFormerConfig(vqvae=str(vqvae), **{**small, **options})
    torch.manual_seed(0)
    return CodeFormerTask(config, digits(), PositionalRandomness(0))


def speaking(objective):
    """With feature transformations that do something, as trained ones do."""
    torch.manual_seed(3)
    for parameter in objective.network.fusions.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return objective


def images_of(*shape, seed=2):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---- the run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, vqvae, features):
    folder = tmp_path_factory.mktemp("one")
    main(arguments(folder, vqvae, *GAME, "--feature_network", features))
    return folder


def test_two_processes_with_accumulation_train_measure_and_picture_as_one_does(one_process, vqvae, features, tmp_path):
    options = [*GAME, "--feature_network", features, "--gradient_accumulation_steps", 2]
    train_on_two_processes("train_codeformer", [arguments(tmp_path, vqvae, *options)])
    assert largest_difference(weights(one_process), weights(tmp_path)) < 1e-5
    for ours, theirs in zip(metrics(one_process), metrics(tmp_path), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"seconds"}:
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=1e-6), name
    pictures = [Image.open(folder / "samples.png") for folder in (one_process, tmp_path)]
    assert ImageChops.difference(*pictures).getextrema()[1] <= 2


def test_a_stopped_and_resumed_run_is_the_uninterrupted_one_bit_for_bit(one_process, vqvae, features, tmp_path):
    options = [*GAME, "--feature_network", features]
    main(arguments(tmp_path, vqvae, *options, "--resume", one_process / "checkpoints" / "checkpoint-00000002"))
    assert largest_difference(weights(one_process), weights(tmp_path)) == 0
    assert largest_difference(weights(one_process, "pipeline"), weights(tmp_path, "pipeline")) == 0


def test_what_is_frozen_is_saved_as_it_was_given_and_all_else_has_moved(one_process, vqvae):
    given, saved = vqvae_of().state_dict(), weights(one_process, "pipeline")
    assert all(torch.equal(saved[f"vqvae.{name}"], value) for name, value in given.items())
    learnt = {name: value for name, value in saved.items() if name.startswith(("encoder.", "quant_conv."))}
    assert all((value != given[name]).any() for name, value in learnt.items()) and learnt
    assert all(value.abs().max() > 0 for name, value in saved.items() if name.startswith("fusions."))
    averaged = weights(one_process, "ema")
    assert all(torch.equal(value, averaged[f"network.{name}"]) for name, value in saved.items())


def test_the_run_leaves_a_pipeline_a_card_and_the_discriminator_beside_them(one_process):
    pipeline = CodeFormerPipeline.from_pretrained(one_process / "pipeline")
    assert [image.size for image in pipeline(images_of(2, 1, 8, 8)).images] == [(8, 8)] * 2
    card = (one_process / "pipeline" / "README.md").read_text()
    assert "psnr_w_0.5" in card and "pipeline_tag: image-to-image" in card
    (example,) = [line for line in card.splitlines() if line.startswith("images = ")]

    class Opened:
        open = staticmethod(lambda _: Image.new("L", (16, 16)))

    exec(example, names := {"pipeline": pipeline, "Image": Opened})
    assert names["images"][0].size == (8, 8)
    discriminator = GANDiscriminator.from_pretrained(one_process / "discriminator")
    state = weights(one_process, "ema")
    assert all(torch.equal(value, state[f"discriminator.{n}"]) for n, value in discriminator.state_dict().items())


def test_a_picture_has_a_row_for_the_bad_images_each_weight_and_the_good_ones(one_process):
    size = 8 * 6  # enlarged to be seen
    assert Image.open(one_process / "samples.png").size == (3 * size + 2 * 2, 5 * size + 4 * 2)


def test_stage_three_goes_on_from_stage_two(vqvae, tmp_path):
    main(arguments(tmp_path, vqvae, "--stage", 2, "--max_steps", 2))
    saved = weights(tmp_path, "pipeline")
    heads = [value for name, value in saved.items() if ".2." in name and name.startswith("fusions.")]
    assert all(value.abs().max() == 0 for value in heads) and heads  # of which stage 2 knows nothing
    assert "grad_norm_fusion" not in metrics(tmp_path)[0] and "grad_norm_codes" in metrics(tmp_path)[0]
    objective = task("no such folder", stage2=str(tmp_path / "pipeline"), hidden_size=32).build()
    assert largest_difference(objective.network.state_dict(), saved) == 0
    trained = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    assert trained == {f"network.{name}" for name in dict(objective.network.named_parameters()) if "vqvae" not in name}


def test_images_of_two_channels_and_no_held_out_split_train_and_are_pictured(tmp_path):
    generator, folder = np.random.default_rng(0), tmp_path / "data"
    arrays = list(generator.integers(0, 256, (20, 8, 8, 2), dtype=np.uint8))
    kind = datasets.Features({"image": datasets.Array3D((8, 8, 2), "uint8")})
    folder.mkdir()
    datasets.Dataset.from_dict({"image": arrays}, features=kind).to_parquet(folder / "train-00000-of-00001.parquet")
    VQVAEPriorPipeline(vqvae_of(channels=2)).save_pretrained(tmp_path / "vqvae")
    main(arguments(tmp_path / "run", tmp_path / "vqvae", "--dataset", folder, "--holdout", 0, "--max_steps", 1))
    assert Image.open(tmp_path / "run" / "samples.png").size == (3 * 2 * 48 + 2 * 2, 5 * 48 + 4 * 2)


# ---- the losses -----------------------------------------------------------------------------------------------------


def test_the_loss_is_the_weighted_sum_of_the_codes_and_the_images(vqvae, features):
    options = {"token_weight": 0.7, "distance_weight": 1.5, "feature_weight": 2.0, "feature_network": str(features)}
    objective = speaking(task(vqvae, **options).build()).eval()
    good, bad = images_of(4, 1, 8, 8), images_of(4, 1, 8, 8, seed=3)
    terms, output = objective(good, bad), objective.network(bad, good, fidelity_weight=1.0)
    error = (output.sample - good).abs().mean((1, 2, 3))
    classifier = NoisyClassifierModel.from_pretrained(features, subfolder="classifier")
    seen = FeatureLoss(classifier)(output.sample, good)
    torch.testing.assert_close(terms["loss"], 0.7 * output.token + 1.5 * output.distance + error + 2.0 * seen)
    torch.testing.assert_close(terms["error"], error)
    assert terms.keys() == {"loss", "token", "distance", "accuracy", "error", "features"}
    assert all(term.shape == (4,) for term in terms.values())


def test_stage_two_is_of_the_codes_alone(vqvae):
    objective = task(vqvae, stage=2).build()
    good, bad = images_of(4, 1, 8, 8), images_of(4, 1, 8, 8, seed=3)
    decoded = []
    objective.network.vqvae.decoder.conv_in.register_forward_hook(lambda *_: decoded.append(True))
    terms = objective(good, bad)
    assert decoded == []
    torch.testing.assert_close(terms["loss"], 0.5 * terms["token"] + terms["distance"])
    assert terms.keys() == {"loss", "token", "distance", "accuracy"}
    assert not any(p.requires_grad for p in objective.network.fusions.parameters())


def gradients_of(objective, **options):
    """The gradients of one step, by the part of the objective they are of."""
    objective.zero_grad()
    good, bad = images_of(8, 1, 8, 8), images_of(8, 1, 8, 8, seed=3)
    objective(good, bad, **options)["loss"].mean().backward()
    by_part = {}
    for name, parameter in objective.named_parameters():
        if parameter.grad is not None:
            part = next(p for p in ("fusions", "discriminator", "encoder", "quant_conv", "transformer") if p in name)
            by_part.setdefault("codes" if part in ("encoder", "quant_conv", "transformer") else part, {})[name] = (
                parameter.grad.clone()
            )
    return by_part


def test_the_codes_learn_in_stage_three_what_they_learn_in_stage_two(vqvae, features):
    """Whatever is asked of the image; so one stage needs no other before it."""
    second = gradients_of(task(vqvae, stage=2).build())
    options = {"feature_network": str(features), "adversarial_weight": 0.8}
    third = gradients_of(speaking(task(vqvae, **options).build()), adversarial_weight=0.8)
    assert second.keys() == {"codes"} and third.keys() == {"codes", "fusions", "discriminator"}
    assert largest_difference(second["codes"], third["codes"]) == 0


def test_each_player_learns_from_its_own_loss(vqvae):
    objective = speaking(task(vqvae, adversarial_weight=0.8).build())
    objective.adaptive_weight.value.fill_(3.0)
    good, bad = images_of(8, 1, 8, 8), images_of(8, 1, 8, 8, seed=3)
    restored = objective.network(bad, good, fidelity_weight=1.0).sample
    fusions = dict(objective.network.fusions.named_parameters(prefix="network.fusions"))
    players = dict(objective.discriminator.named_parameters(prefix="discriminator"))

    generator = (restored - good).abs().mean() - 0.8 * 3.0 * objective.discriminator(restored).logits.mean()
    expected = torch.autograd.grad(generator, list(fusions.values()), retain_graph=True)
    real, fake = objective.discriminator(good).logits, objective.discriminator(restored.detach()).logits
    discriminator = (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
    theirs = torch.autograd.grad(discriminator, list(players.values()))

    found = gradients_of(objective, adversarial_weight=0.8)
    for name, value in zip(fusions, expected, strict=True):
        torch.testing.assert_close(found["fusions"][name], value, rtol=1e-3, atol=1e-6)
    for name, value in zip(players, theirs, strict=True):
        torch.testing.assert_close(found["discriminator"][name], value, rtol=1e-3, atol=1e-6)


def test_before_its_first_step_the_adversary_changes_nothing(vqvae):
    without = gradients_of(speaking(task(vqvae).build()))
    objective = speaking(task(vqvae, adversarial_weight=0.8).build())
    objective.adaptive_weight.value.fill_(3.0)
    waiting = gradients_of(objective, adversarial_weight=0.0)
    assert largest_difference(without["fusions"], waiting["fusions"]) == 0
    assert all(value.abs().max() == 0 for value in waiting["discriminator"].values())


def test_the_adversary_begins_at_its_step_and_is_weighed_against_the_error(vqvae, one_process):
    codeformer = task(vqvae, adversarial_weight=0.8, adversarial_start=2, batch_size=4)
    begun = [
        codeformer.draws({"images": images_of(4, 1, 8, 8), "first_position": first})["adversarial_weight"]
        for first in (0, 4, 8, 12)
    ]
    assert begun == [0.0, 0.0, 0.8, 0.8]
    objective = speaking(codeformer.build())
    good, bad = images_of(8, 1, 8, 8), images_of(8, 1, 8, 8, seed=3)
    terms = objective(good, bad, adversarial_weight=0.8)
    last = objective.network.last_layer
    norms = [
        torch.autograd.grad(terms[name].mean(), last, retain_graph=True)[0].norm() for name in ("error", "generator")
    ]
    terms["loss"].mean().backward()
    codeformer.after_step(0, [terms], Accelerator())
    assert objective.adaptive_weight.value.item() == pytest.approx((norms[0] / (norms[1] + 1e-4)).item(), rel=1e-4)
    assert metrics(one_process)[0]["adaptive_weight"] > 0


def test_every_trained_weight_is_in_one_group_and_none_of_the_frozen(vqvae, features):
    options = {"adversarial_weight": 0.8, "discriminator_learning_rate": 0.3, "feature_network": str(features)}
    codeformer = task(vqvae, **options)
    objective = codeformer.build()
    groups = codeformer.parameter_groups(objective)
    assert [group["name"] for group in groups] == ["codes", "fusion", "discriminator"]
    assert groups[2]["lr"] == 0.3
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in objective.parameters() if parameter.requires_grad}


# ---- what is drawn --------------------------------------------------------------------------------------------------


def test_how_an_image_is_degraded_is_a_function_of_its_position(vqvae):
    codeformer, images = task(vqvae), images_of(6, 1, 8, 8)
    whole = codeformer.draws({"images": images, "first_position": 10})
    assert whole.keys() == {"images", "degraded"} and torch.equal(whole["images"], images)
    halves = [codeformer.draws({"images": images[i : i + 3], "first_position": 10 + i})["degraded"] for i in (0, 3)]
    assert torch.equal(whole["degraded"], torch.cat(halves))
    elsewhere = codeformer.draws({"images": images, "first_position": 0})["degraded"]
    held_out = codeformer.degraded("validation", {"images": images, "first_position": 10})
    assert (whole["degraded"] != elsewhere).any() and (whole["degraded"] != held_out).any()


def test_the_ranges_are_those_of_the_options(vqvae):
    options = {"blur_sigma": [1.0, 1.5], "downsampling": [2.0, 3.0], "noise_level": [5.0, 6.0]}
    codeformer, images = task(vqvae, **options, jpeg_quality=[10, 12]), images_of(2, 1, 8, 8)
    shares = codeformer.randomness.uniform("degradation, training", 0, 2, (4,))
    noise = codeformer.randomness.normal("noise of the degradation, training", 0, 2, (1, 8, 8))
    ranges = DegradationRanges((1.0, 1.5), (2.0, 3.0), (5.0, 6.0), (10, 12))
    degraded = codeformer.draws({"images": images, "first_position": 0})["degraded"]
    assert torch.equal(degraded, degrade(images, ranges.parameters(shares), noise))


# ---- what is measured -----------------------------------------------------------------------------------------------


def test_validation_measures_codes_and_images(vqvae):
    codeformer = task(vqvae)
    objective = speaking(codeformer.build()).eval()
    with torch.no_grad():
        values = codeformer.validate(objective, Accelerator())
    (batch,) = validation_batches(codeformer.data, 64, max_samples=20)
    good, network = batch["images"], objective.network
    bad = codeformer.degraded("validation", batch)
    codes = network.vqvae.encode(good).indices

    def mean_psnr(images):
        error = (images.clamp(-1, 1) - good).double().square().mean((1, 2, 3))
        return (20 * torch.log10(2 / error.sqrt())).mean().item()

    with torch.no_grad():
        output = network(bad, good)
        expected = {
            "psnr_degraded": mean_psnr(bad),
            "psnr_vqvae": mean_psnr(network.vqvae(bad).sample),
            "psnr_nearest": mean_psnr(network.vqvae(bad).sample),  # the second encoder is still the first
            "psnr_codes": mean_psnr(network.vqvae.decode_indices(codes).sample),
            "accuracy": (output.indices == codes).double().mean().item(),
            "token": output.token.mean().item(),
            "images": 20,
        }
        for w in (0, 0.5, 1):
            expected[f"psnr_w_{w}"] = mean_psnr(network(bad, fidelity_weight=w).sample)
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, rel=1e-5), name
    assert len({values[f"psnr_w_{w}"] for w in (0, 0.5, 1)}) == 3


def test_what_is_nearest_to_a_trained_encoder_is_not_what_the_vqvae_finds(vqvae):
    codeformer = task(vqvae)
    objective = codeformer.build().eval()
    torch.nn.init.normal_(objective.network.encoder.conv_out.weight, std=0.3)
    with torch.no_grad():
        values = codeformer.validate(objective, Accelerator())
    assert values["psnr_nearest"] != values["psnr_vqvae"]


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_weight": -1.0}, "token_weight must not be negative, got -1.0"),
        ({"adversarial_weight": float("nan")}, "adversarial_weight must not be negative, got nan"),
        ({"stage": 2, "stage2": "somewhere"}, "of stage 3, got somewhere, None and 0.0"),
        ({"stage": 2, "feature_network": "somewhere"}, "of stage 3, got None, somewhere"),
        ({"stage": 2, "adversarial_weight": 0.8}, "of stage 3, got None, None and 0.8"),
        ({"adversarial_weight": 0.8, "compile": True}, "no --compile with an adversary"),
        ({"blur_sigma": [2.0, 1.0]}, r"blur_sigma must be a range \(low, high\)"),
        ({"sample_columns": 0}, "sample_columns must be at least 1, got 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CodeFormerConfig(**options)


def test_a_vqvae_of_other_images_is_refused(tmp_path):
    VQVAEPriorPipeline(vqvae_of(channels=3)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"have 1 channels and 8 pixels a side, those of the VQ-VAE 3 and 8 x 8"):
        task(tmp_path)
