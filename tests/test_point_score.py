"""A small network for points: its shape, its conditioning, what it can learn, and where it can be used."""

import json
import math

import pytest
import torch

from annealers import (
    AnnealedLangevinScheduler,
    DDPMAncestralScheduler,
    GuidedDiffusionPipeline,
    PointScoreModel,
    PredictorCorrectorScheduler,
    exact,
)
from annealers.hub import export
from annealers.models.point_score import ModulatedBlock
from annealers.single_file import single_file


def small(seed=0, awake=True, **settings):
    """A small network; awake, its last layers are not zero."""
    torch.manual_seed(seed)
    model = PointScoreModel(**({"hidden": 16, "layers": 2} | settings)).eval()
    if awake:
        for layer in (model.gate, model.layer_out):
            torch.nn.init.normal_(layer.weight)
            torch.nn.init.normal_(layer.bias)
    return model


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the prediction -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", [(2, 1), (1, 1), (3, 2), (1, 4)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_prediction_has_the_shape_and_the_dtype_of_the_event(event, dtype):
    model = small(in_channels=event[0], sample_size=event[1]).to(dtype)
    x = draw(5, event[0], event[1], event[1]).to(dtype)
    output = model(x, 7)
    assert output.sample.shape == x.shape and output.sample.dtype is dtype
    assert torch.equal(model(x, 7, return_dict=False)[0], output.sample)


def test_a_new_network_predicts_nothing_and_learns_from_the_first_step_on():
    model = small(awake=False)
    x = draw(4, 2, 1, 1)
    assert torch.equal(model(x, 3).sample, torch.zeros(4, 2, 1, 1))
    (model(x, 3).sample - 1).square().mean().backward()
    assert model.gate.weight.grad.abs().sum() > 0 and model.layer_out.weight.grad.abs().sum() > 0


def test_the_linear_part_is_one_number_per_level_times_the_state():
    model = small()
    torch.nn.init.zeros_(model.layer_out.weight)
    torch.nn.init.zeros_(model.layer_out.bias)
    x, timesteps = draw(4, 2, 1, 1), torch.tensor([0, 0, 500, 999])
    ratio = (model(x, timesteps).sample / x).flatten(1)
    torch.testing.assert_close(ratio[:, 0], ratio[:, 1])
    torch.testing.assert_close(ratio[0], ratio[1])
    assert len(ratio[:, 0].round(decimals=4).unique()) == 3


def test_the_rest_sees_every_value_of_the_event_and_each_block_and_the_level():
    model = small(in_channels=2, sample_size=2)
    torch.nn.init.zeros_(model.gate.weight)
    torch.nn.init.zeros_(model.gate.bias)
    x = draw(1, 2, 2, 2).double()
    jacobian = torch.autograd.functional.jacobian(lambda x: model.double()(x, 10).sample, x).reshape(8, 8)
    assert (jacobian != 0).all()
    x = x.expand(2, 2, 2, 2)
    before = model(x, torch.tensor([10, 900])).sample
    assert not torch.allclose(before[0], before[1])
    for block in model.blocks:
        weight = block.layer_2.weight.detach().clone()
        torch.nn.init.zeros_(block.layer_2.weight)
        assert not torch.allclose(model(x, torch.tensor([10, 900])).sample, before)
        block.layer_2.weight.data = weight


def test_a_block_adds_to_its_input_what_the_level_scales_and_shifts():
    torch.manual_seed(0)
    block, hidden, embedding = ModulatedBlock(8).double(), draw(5, 8).double(), draw(5, 8, seed=1).double()
    torch.nn.init.zeros_(block.modulation.weight)
    block.modulation.bias.data = torch.tensor([-1.0] * 8 + [0.3] * 8).double()  # scaled by 0 and shifted by 0.3
    added = block(hidden, embedding) - hidden
    silu = 0.3 / (1 + math.exp(-0.3))
    torch.testing.assert_close(added, (block.layer_2.weight.sum(1) * silu + block.layer_2.bias).expand(5, 8))
    block.modulation.bias.data[:8] = 0.0  # scaled by 1: what is added depends on the input
    assert (block(hidden, embedding) - hidden - added).abs().min() > 1e-6
    torch.nn.init.zeros_(block.layer_2.weight)
    torch.nn.init.zeros_(block.layer_2.bias)
    assert torch.equal(block(hidden, embedding), hidden)


def test_each_sample_has_its_own_timestep_and_does_not_depend_on_the_others():
    model, x, timesteps = small(), draw(3, 2, 1, 1), torch.tensor([0, 999, 400])
    together = model(x, timesteps).sample
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], model(x[i : i + 1], timesteps[i]).sample)


def test_every_form_of_a_timestep_says_the_same():
    model, x = small(), draw(3, 2, 1, 1)
    expected = model(x, torch.tensor([40, 40, 40])).sample
    for timestep in (40, 40.0, torch.tensor(40), torch.tensor([40]), torch.tensor([40.0, 40.0, 40.0])):
        assert torch.equal(model(x, timestep).sample, expected)


def test_a_level_is_known_by_its_share_of_the_train_timesteps():
    x = draw(3, 2, 1, 1)
    fine, coarse = small(num_train_timesteps=1000), small(num_train_timesteps=50)
    torch.testing.assert_close(fine(x, 400).sample, coarse(x, 20).sample)
    torch.testing.assert_close(fine(x, 410).sample, coarse(x, 20.5).sample)
    assert not torch.allclose(fine(x, 410).sample, coarse(x, 20).sample, rtol=1e-3)


def test_labels_change_the_prediction_of_their_sample_alone():
    model, x = small(num_class_embeds=3), draw(3, 2, 1, 1)
    one = model(x, 5, class_labels=torch.tensor([0, 1, 2])).sample
    other = model(x, 5, class_labels=torch.tensor([0, 2, 2])).sample
    assert torch.equal(one[0], other[0]) and torch.equal(one[2], other[2])
    assert not torch.allclose(one[1], other[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": 15}, "hidden must be even.*got 15"),
        ({"hidden": 0}, "hidden must be a positive integer, got 0"),
        ({"layers": -1}, "layers must be a positive integer, got -1"),
        ({"in_channels": 2.0}, "in_channels must be a positive integer, got 2.0"),
        ({"sample_size": True}, "sample_size must be a positive integer, got True"),
        ({"num_train_timesteps": 0}, "num_train_timesteps must be a positive integer, got 0"),
        ({"num_class_embeds": 0}, "num_class_embeds must be a positive integer, got 0"),
    ],
)
def test_sizes_that_make_no_network_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PointScoreModel(**settings)


@pytest.mark.parametrize(
    ("shape", "timestep", "labels", "message"),
    [
        ((3, 2), 0, None, r"\(B, 2, 1, 1\), got \(3, 2\)"),
        ((3, 1, 2, 1), 0, None, r"\(B, 2, 1, 1\), got \(3, 1, 2, 1\)"),
        ((3, 2, 1, 1), torch.tensor([1, 2]), None, "one timestep or one per sample, 3, got 2"),
        ((3, 2, 1, 1), 0, torch.zeros(3, dtype=torch.long), "num_class_embeds=None, but class_labels"),
    ],
)
def test_what_does_not_fit_the_network_is_refused(shape, timestep, labels, message):
    with pytest.raises(ValueError, match=message):
        small()(torch.zeros(shape), timestep, class_labels=labels)


def test_a_class_conditional_network_asks_for_labels():
    with pytest.raises(ValueError, match="num_class_embeds=3, but class_labels=None"):
        small(num_class_embeds=3)(torch.zeros(1, 2, 1, 1), 0)


# ---- what it can learn ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [{}, {"beta_schedule": "geometric", "sigma_min": 0.02, "sigma_max": 20.0}], ids=str)
def test_it_learns_the_exact_noise_of_two_modes(path):
    scheduler = DDPMAncestralScheduler(clip_sample=False, **path)
    law = exact.GaussianMixture([0.7, 0.3], [[[[1.0]], [[1.0]]], [[[-1.0]], [[-0.5]]]], [0.05, 0.05])
    model, generator = small(awake=False, hidden=48).train(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)

    def batch(count):
        timesteps = torch.randint(1000, (count,), generator=generator)
        x_0, noise = law.sample(count, generator=generator).float(), torch.randn(count, 2, 1, 1, generator=generator)
        x_t = scheduler.add_noise(x_0, noise, timesteps)
        return x_t, timesteps, law.as_model(scheduler)(x_t, timesteps).sample

    for _ in range(300):  # regression on the exact noise: the network, not the noise of its training, is on trial
        x_t, timesteps, target = batch(256)
        optimizer.zero_grad()
        (model(x_t, timesteps).sample - target).square().mean().backward()
        optimizer.step()
    x_t, timesteps, target = batch(4096)
    with torch.no_grad():
        error = (model.eval()(x_t, timesteps).sample - target).square().mean()
    linear = (target * x_t).mean() / x_t.square().mean()
    assert error < 0.02 * target.square().mean()
    assert error < 0.2 * (target - linear * x_t).square().mean()  # and not by the linear part alone


# ---- its place ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DDPMAncestralScheduler, PredictorCorrectorScheduler, AnnealedLangevinScheduler])
def test_pipelines_draw_points_with_any_scheduler(kind, recwarn):
    pipeline = GuidedDiffusionPipeline(small(), kind(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    points = pipeline(batch_size=6, num_inference_steps=5, output_type="latent").images
    assert points.shape == (6, 2, 1, 1) and points.isfinite().all()


def test_saving_and_loading_is_lossless(tmp_path):
    pipeline = GuidedDiffusionPipeline(small(num_class_embeds=3), DDPMAncestralScheduler(), null_label=2)
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["unet"] == ["annealers", "PointScoreModel"]
    loaded = GuidedDiffusionPipeline.from_pretrained(tmp_path).unet
    assert isinstance(loaded, PointScoreModel)
    x, labels = draw(4, 2, 1, 1), torch.tensor([0, 1, 2, 0])
    assert torch.equal(loaded(x, 30, labels).sample, pipeline.unet(x, 30, labels).sample)


def test_it_is_exported_with_its_code(tmp_path):
    export(GuidedDiffusionPipeline(small(), DDPMAncestralScheduler()), tmp_path)
    module, name = json.loads((tmp_path / "model_index.json").read_text())["unet"]
    assert name == "PointScoreModel" and (tmp_path / "unet" / f"{module}.py").is_file()


def test_its_code_stands_alone():
    source = single_file("PointScoreModel").split("# Where annealers is installed")[0]
    assert not any(line.startswith(("import annealers", "from annealers")) for line in source.splitlines())
    alone = {"__name__": "alone"}
    exec(compile(source, "alone", "exec"), alone)  # noqa: S102
    assert alone["PointScoreModel"](hidden=8, layers=1)(draw(3, 2, 1, 1), 3).sample.shape == (3, 2, 1, 1)
