"""A run that trains a classifier: what it sees is the noise of its pipeline, and nothing depends on the processes."""

import json
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, EulerDiscreteScheduler, UNet2DModel
from PIL import Image, ImageChops
from safetensors.torch import load_file
from torch import nn
from two_processes import train_on_two_processes

from annealers import DDPMAncestralScheduler, GuidedDiffusionPipeline, NoisyClassifierModel
from annealers.data import load_data, validation_batches
from annealers.models import NoisyClassifierOutput
from annealers.randomness import PositionalRandomness
from annealers.training.train_classifier import ClassifierConfig, ClassifierObjective, ClassifierTask, main

TINY = [
    *("--block_out_channels", "32", "32", "--attention_levels", "1", "--batch_size", "16"),
    *("--validation_samples", "20", "--num_inference_steps", "2", "--sample_columns", "1"),
    *("--report_to", "none", "--log_every", "2"),
    # With Adam's usual epsilon the first steps are the gradient's signs, which turn rounding into steps of full size.
    *("--adam_epsilon", "0.01", "--learning_rate", "0.01", "--lr_scheduler", "constant"),
]


def network_of(classes=11, size=8, channels=1):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        add_attention=False,
        num_class_embeds=classes,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()


NAMES = {i: str(i) for i in range(10)}


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    """Folder of a class-conditional diffusion pipeline of digits, untrained."""
    folder = tmp_path_factory.mktemp("diffusion")
    GuidedDiffusionPipeline(network_of(), DDPMAncestralScheduler(), NAMES, null_label=10).save_pretrained(folder)
    return folder


def arguments(folder, diffusion, *more):
    run = ["--pipeline", str(diffusion), "--output_dir", str(folder), "--max_steps", "6", "--checkpoint_every", "3"]
    return [*TINY, *run, *map(str, more)]


def weights(folder, kind="pipeline"):
    if kind == "pipeline":
        return load_file(folder / "pipeline" / "classifier" / "diffusion_pytorch_model.safetensors")
    return load_file(folder / "checkpoints" / "checkpoint-00000006" / "model.safetensors")


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, diffusion):
    folder = tmp_path_factory.mktemp("one")
    main(arguments(folder, diffusion))
    return folder


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, diffusion):
    """The same on two processes, with accumulation."""
    folder = tmp_path_factory.mktemp("two")
    train_on_two_processes("train_classifier", [arguments(folder, diffusion, "--gradient_accumulation_steps", 2)])
    return folder


def task_of(pipeline, **options):
    """The task of a run, with the options of its command line."""
    config = ClassifierConfig(pipeline=str(pipeline), **options)
    return ClassifierTask(config, load_data(config), PositionalRandomness(0))


# ---- the run --------------------------------------------------------------------------------------------------------


def test_two_processes_with_accumulation_train_the_weights_of_one(one_process, two_processes):
    assert largest_difference(weights(one_process, "live"), weights(two_processes, "live")) < 1e-5
    assert largest_difference(weights(one_process), weights(two_processes)) < 1e-5


def test_losses_and_validation_are_the_same_on_two_processes(one_process, two_processes):
    for ours, theirs in zip(metrics(one_process), metrics(two_processes), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"seconds", "grad_norm"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_samples_are_the_same_picture_on_two_processes(one_process, two_processes):
    pictures = [Image.open(folder / "samples.png") for folder in (one_process, two_processes)]
    assert ImageChops.difference(*pictures).getextrema()[1] <= 2


def test_a_stopped_and_resumed_run_is_the_uninterrupted_one_bit_for_bit(one_process, diffusion, tmp_path):
    main(arguments(tmp_path, diffusion, "--resume", one_process / "checkpoints" / "checkpoint-00000003"))
    assert largest_difference(weights(one_process, "live"), weights(tmp_path, "live")) == 0
    assert largest_difference(weights(one_process), weights(tmp_path)) == 0


def test_what_is_saved_is_the_pipeline_with_the_averaged_classifier_in_it(one_process, diffusion):
    pipeline = GuidedDiffusionPipeline.from_pretrained(one_process / "pipeline")
    given = GuidedDiffusionPipeline.from_pretrained(diffusion)
    assert largest_difference(pipeline.unet.state_dict(), given.unet.state_dict()) == 0
    assert pipeline.scheduler.config == given.scheduler.config
    assert type(pipeline.classifier) is NoisyClassifierModel and pipeline.classifier.id2label == NAMES
    averaged = load_file(one_process / "checkpoints" / "checkpoint-00000006" / "ema.safetensors")
    assert all(torch.equal(value, averaged[f"network.{name}"]) for name, value in weights(one_process).items())
    images = pipeline(class_labels=["3", "7"], classifier_scale=2.0, guidance_scale=0.0, num_inference_steps=2).images
    assert [image.size for image in images] == [(8, 8), (8, 8)]


def test_the_card_says_how_to_draw_with_the_classifier(one_process):
    card = (one_process / "pipeline" / "README.md").read_text()
    assert "class_labels=['0', '1', '2', '3'], guidance_scale=0.0, classifier_scale=2.0" in card
    assert "accuracy_quarter_1" in card and "classifier-guidance" in card


def test_it_learns_to_read_held_out_digits_and_best_those_with_little_noise(diffusion, tmp_path):
    options = ["--max_steps", 40, "--learning_rate", 0.002, "--adam_epsilon", 1e-8, "--batch_size", 48]
    main(arguments(tmp_path, diffusion, *options, "--ema_decay", 0, "--validation_samples", 100))
    last = metrics(tmp_path)[-1]
    assert last["validation/accuracy_quarter_1"] > 0.2  # a tenth is chance, with a standard error of 0.02
    assert last["validation/accuracy_quarter_1"] > last["validation/accuracy_quarter_4"]
    assert last["validation/cross_entropy_quarter_1"] < math.log(10)


# ---- the objective --------------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """Answers with the same logits and keeps what it was asked."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, sample, timestep):
        self.sample, self.timestep = sample, timestep
        return NoisyClassifierOutput(self.logits[: len(sample)])


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_loss_is_the_cross_entropy_with_the_smoothed_label(smoothing):
    logits = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])
    objective = ClassifierObjective(Fixed(logits), DDIMScheduler(), smoothing)
    images = torch.zeros(2, 1, 8, 8)
    terms = objective(images, images, torch.tensor([3, 700]), torch.tensor([0, 2]))
    for i, label in enumerate([0, 2]):
        probabilities = logits[i].softmax(0)
        target = torch.full((3,), smoothing / 3)
        target[label] += 1 - smoothing
        assert terms["loss"][i].item() == pytest.approx(-(target * probabilities.log()).sum().item(), rel=1e-5)
    assert terms["accuracy"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    "scheduler",
    [DDPMAncestralScheduler(beta_schedule="squaredcos_cap_v2"), DDPMScheduler(), EulerDiscreteScheduler()],
    ids=["ours", "DDPM", "Euler"],
)
def test_the_classifier_sees_what_the_network_would(scheduler):
    """Euler's own add_noise is in other coordinates, and its scale_model_input leads to these."""
    network = Fixed(torch.zeros(3, 10))
    images, noise, timesteps = torch.rand(3, 1, 8, 8), torch.randn(3, 1, 8, 8), torch.tensor([0, 400, 999])
    ClassifierObjective(network, scheduler, 0.0)(images, noise, timesteps, torch.tensor([0, 1, 2]))
    alpha_bar = scheduler.alphas_cumprod[timesteps].view(3, 1, 1, 1).float()
    torch.testing.assert_close(network.sample, alpha_bar.sqrt() * images + (1 - alpha_bar).sqrt() * noise)
    assert torch.equal(network.timestep, timesteps)


def test_timesteps_are_even_over_the_path_and_those_of_a_flow_are_no_integers(diffusion):
    n = 20_000
    batch = {"images": torch.zeros(n, 1, 1, 1), "labels": torch.zeros(n, dtype=torch.long), "first_position": 0}
    task = task_of(diffusion)
    timesteps = task.draws(batch)["timesteps"]
    assert timesteps.dtype == torch.long and timesteps.min() == 0 and timesteps.max() == 999
    counts = torch.bincount(timesteps // 100, minlength=10)
    assert ((counts - n / 10).abs() < 4 * (n * 0.09) ** 0.5).all()
    task.diffusion.scheduler = DDPMAncestralScheduler(prediction_type="flow_prediction")
    assert task.timesteps(torch.tensor([0.0, 0.33335, 0.9999999999])).tolist() == pytest.approx([0, 333.35, 1000])


def test_validation_counts_right_answers_by_quarter_over_every_image(diffusion, monkeypatch):
    """A classifier that is right below t = 250 and below 600 answers 0, and otherwise doubts all."""
    task = task_of(diffusion, validation_samples=37, batch_size=16)
    labels = torch.cat([batch["labels"] for batch in validation_batches(task.data, 16, max_samples=37)])
    objective = task.build().eval()
    asked = []

    def forward(self, images, noise, timesteps, labels):
        asked.append((timesteps, labels))
        logits = torch.where(timesteps[:, None] < 250, nn.functional.one_hot(labels, 10) * 4.0, torch.zeros(10))
        logits[(timesteps >= 250) & (timesteps < 600), 0] = 4.0
        loss = -logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
        return {"loss": loss, "accuracy": (logits.argmax(1) == labels).float()}

    monkeypatch.setattr(ClassifierObjective, "forward", forward)
    values = task.validate(objective, Accelerator())
    assert values["images"] == 37 and sum(len(t) for t, _ in asked) == 8 * 37
    timesteps, seen = (torch.cat(column) for column in zip(*asked, strict=True))
    quarters = timesteps * 4 // 1000
    assert torch.bincount(quarters).tolist() == [74] * 4
    zero = (seen == 0).double()
    assert torch.equal(torch.bincount(seen, minlength=10), 8 * torch.bincount(labels, minlength=10))
    assert values["accuracy_quarter_1"] == 1
    for quarter in (2, 3, 4):
        assert values[f"accuracy_quarter_{quarter}"] == pytest.approx(zero[quarters == quarter - 1].mean().item())
    certain, doubt = -math.log(math.exp(4) / (math.exp(4) + 9)), math.log(10)
    assert values["cross_entropy_quarter_1"] == pytest.approx(certain)
    assert values["cross_entropy_quarter_4"] == pytest.approx(doubt)
    for name in ("accuracy", "cross_entropy"):
        assert values[name] == pytest.approx(np.mean([values[f"{name}_quarter_{i}"] for i in (1, 2, 3, 4)]))


def test_the_options_describe_the_network(diffusion):
    task = task_of(
        diffusion,
        block_out_channels=[32, 64, 32],
        attention_levels=[0, 2],
        layers_per_block=2,
        pooling="average",
        dropout=0.1,
    )
    network = task.build().network.config
    assert tuple(network.block_out_channels) == (32, 64, 32)
    assert tuple(network.down_block_types) == ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D")
    assert (network.layers_per_block, network.pooling, network.dropout) == (2, "average", 0.1)
    assert (network.sample_size, network.in_channels, network.num_classes) == (8, 1, 10)


# ---- which pipelines ------------------------------------------------------------------------------------------------


def test_a_pipeline_of_diffusers_gets_a_classifier_and_with_it_classes(tmp_path):
    DDPMPipeline(network_of(classes=None), DDPMScheduler()).save_pretrained(tmp_path / "theirs")
    main(arguments(tmp_path / "run", tmp_path / "theirs", "--max_steps", 1))
    pipeline = GuidedDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert type(pipeline.scheduler) is DDPMScheduler and pipeline.id2label == NAMES
    assert len(pipeline(class_labels="7", classifier_scale=1.0, num_inference_steps=2).images) == 1


def test_a_network_that_cannot_leave_the_class_open_is_asked_for_it_in_the_pictures(tmp_path):
    GuidedDiffusionPipeline(network_of(10), DDPMScheduler(), NAMES).save_pretrained(tmp_path / "conditional")
    task = task_of(tmp_path / "conditional", classifier_scale=3.0)
    assert task.guidance_scale == 1.0 and "guidance_scale=1.0, classifier_scale=3.0" in task.example()
    main(arguments(tmp_path / "run", tmp_path / "conditional", "--max_steps", 1))
    assert (tmp_path / "run" / "samples.png").is_file()


def test_pictures_without_guidance_have_no_classes_and_a_network_may_have_a_size_for_each_axis(tmp_path):
    DDPMPipeline(network_of(classes=None, size=(8, 8)), DDPMScheduler()).save_pretrained(tmp_path / "theirs")
    main(arguments(tmp_path / "run", tmp_path / "theirs", "--max_steps", 1, "--classifier_scale", 0))
    assert (tmp_path / "run" / "samples.png").is_file()
    pipeline = GuidedDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    line = task_of(tmp_path / "theirs", classifier_scale=0.0).example()
    assert line == "images = pipeline(batch_size=4).images"
    assert len(pipeline(batch_size=4, num_inference_steps=2).images) == 4


@pytest.mark.parametrize(
    ("network", "names", "null_label", "message"),
    [
        ({"classes": 8}, None, 7, "are not the 7 of the diffusion model"),
        ({"classes": 11}, {i: "abcdefghij"[i] for i in range(10)}, 10, "are not the 10 of the diffusion model, .*'a'"),
        ({"size": 16}, None, 10, "resolution 8, those of the diffusion model 16"),
        ({"channels": 3}, None, 10, "channels 1, those of the diffusion model 3"),
    ],
)
def test_a_diffusion_model_of_other_images_or_classes_is_refused(tmp_path, network, names, null_label, message):
    GuidedDiffusionPipeline(network_of(**network), DDPMScheduler(), names, null_label).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        task_of(tmp_path)


def test_data_without_labels_is_refused(diffusion):
    with pytest.raises(ValueError, match="a classifier needs labels, and digits has none; see --label_column"):
        task_of(diffusion, label_column="none")


def test_a_pipeline_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        main(arguments(tmp_path, tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--block_out_channels", "32", "44"], "multiples of norm_groups"),
        (["--attention_levels", "2"], "attention_levels must lie in 0 .. 1"),
        (["--label_smoothing", "1"], "label_smoothing must lie in"),
        (["--sample_columns", "0"], "sample_columns must be at least 1"),
    ],
)
def test_an_option_out_of_range_ends_with_a_usage_message(tmp_path, diffusion, options, named, capsys):
    with pytest.raises(SystemExit):
        main(arguments(tmp_path, diffusion, *options))
    assert named in capsys.readouterr().err
