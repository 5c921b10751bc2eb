"""Properties of CodeFormerModel: what w does, what is frozen, which loss reaches which part, what a folder holds."""

import doctest
import math
import warnings

import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate

import annealers
from annealers import CodeFormerModel, VQVAEModel
from annealers.data import load_digits_split, to_model_space
from annealers.models.code_former import FeatureTransformation

VQVAE = {
    "in_channels": 1,
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "latent_channels": 8,
    "norm_num_groups": 4,
    "num_vq_embeddings": 12,
}
LEARNING = ("encoder.", "quant_conv.", "transformer.")


def vqvae_of(seed=0, **options):
    torch.manual_seed(seed)
    return VQVAEModel(**{**VQVAE, **options}).eval()


def model_of(vqvae=None, seed=1, silent=False, **options):
    """A model around a VQ-VAE; unless `silent`, its feature transformations do something, as trained ones do."""
    vqvae = vqvae_of() if vqvae is None else vqvae
    torch.manual_seed(seed)
    small = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
    model = CodeFormerModel(vqvae_config=vqvae.config, **{**small, **options})
    model.load_vqvae(vqvae)
    if not silent:
        for parameter in model.fusions.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def images_of(*shape, seed=2):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def gradients(model, prefixes=("",)):
    """Which parameters with these prefixes have a gradient that is not zero, and which have not."""
    has = {
        name: parameter.grad is not None and parameter.grad.abs().max() > 0
        for name, parameter in model.named_parameters()
        if name.startswith(tuple(prefixes))
    }
    return [name for name, value in has.items() if value], [name for name, value in has.items() if not value]


# ---- the fidelity weight --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"likelihood": "discretized_mix_logistic", "num_mixtures": 2, "in_channels": 3},
        {"block_out_channels": (8, 16, 16), "mid_block_add_attention": False, "layers_per_block": 2},
        {"sample_size": (8, 12), "vq_embed_dim": 4, "decay": None, "restart_threshold": 0.0},
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_at_weight_zero_the_image_is_the_decoder_of_the_codes_bit_for_bit(options, training):
    vqvae = vqvae_of(**options)
    model = model_of(vqvae).train(training)
    for parameter in model.fusions.parameters():
        torch.nn.init.constant_(parameter, float("nan"))  # whatever they would say
    size = options.get("sample_size", (8, 8))
    output = model(images_of(3, options.get("in_channels", 1), *size), fidelity_weight=0.0)
    assert torch.equal(output.sample, vqvae.decode_indices(output.indices).sample)
    assert torch.equal(output.indices, output.logits.argmax(dim=1))


def test_a_feature_transformation_that_was_not_trained_changes_nothing_at_any_weight():
    model = model_of(silent=True)
    x = images_of(2, 1, 8, 8)
    assert torch.equal(model(x, fidelity_weight=1.0).sample, model(x, fidelity_weight=0.0).sample)
    assert (model_of()(x, fidelity_weight=1.0).sample != model(x, fidelity_weight=0.0).sample).any()


def test_the_transformation_is_alpha_times_the_features_plus_beta_times_w():
    fusion = FeatureTransformation(8, 4).double()
    decoder, encoder = images_of(2, 8, 4, 4).double(), images_of(2, 8, 4, 4, seed=3).double()
    with torch.no_grad():
        fusion.scale[-1].bias.copy_(torch.linspace(-1, 1, 8))  # with weights of zero, what the heads say
        fusion.shift[-1].bias.copy_(torch.linspace(3, 4, 8))
    alpha, beta = (torch.linspace(*ends, 8).double().view(8, 1, 1) for ends in ((-1, 1), (3, 4)))
    expected = decoder + (alpha * decoder + beta) * 0.3
    torch.testing.assert_close(fusion(decoder, encoder, 0.3), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("head", ["scale", "shift"])
def test_alpha_and_beta_depend_on_both_kinds_of_features(head):
    fusion = FeatureTransformation(8, 4)  # whose other head says zero
    for parameter in (*fusion.joint.parameters(), *getattr(fusion, head).parameters()):
        torch.nn.init.normal_(parameter, std=0.2)
    decoder, encoder, others = (images_of(2, 8, 4, 4, seed=seed) for seed in (2, 3, 4))

    def said(decoder, encoder):
        added = fusion(decoder, encoder, 1.0) - decoder
        return added / decoder if head == "scale" else added

    assert (said(decoder, encoder) - said(decoder, others)).abs().max() > 0.1
    assert (said(decoder, encoder) - said(others, encoder)).abs().max() > 0.1


def test_the_transformation_is_linear_in_the_weight():
    fusion = FeatureTransformation(8, 4)
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    decoder, encoder = images_of(2, 8, 4, 4), images_of(2, 8, 4, 4, seed=3)
    one, half, none = (fusion(decoder, encoder, w) for w in (1.0, 0.5, 0.0))
    torch.testing.assert_close(half, (one + none) / 2)
    assert torch.equal(none, decoder)


def test_features_come_in_at_the_chosen_levels_and_by_default_at_all_but_that_of_the_codes():
    vqvae = vqvae_of(block_out_channels=(8, 16, 24), norm_num_groups=8)
    _, features = model_of(vqvae).encode(images_of(2, 1, 8, 8))
    assert [tuple(f.shape[1:]) for f in features] == [(8, 8, 8), (16, 4, 4), (24, 2, 2)]
    assert list(model_of(vqvae).fusions) == ["0", "1"]
    assert list(model_of(vqvae_of(block_out_channels=(8,))).fusions) == ["0"]

    model = model_of(vqvae, fusion_levels=(2,))
    seen = []
    model.fusions["2"].register_forward_hook(lambda _, inputs, __: seen.append([tuple(x.shape) for x in inputs[:2]]))
    model(images_of(2, 1, 8, 8), fidelity_weight=0.1)
    assert list(model.fusions) == ["2"] and seen == [[(2, 24, 2, 2), (2, 24, 2, 2)]]


def test_the_features_are_those_of_the_encoder_of_bad_images():
    model, x = model_of(), images_of(2, 1, 8, 8)
    latents, features = model.encode(x)
    torch.testing.assert_close(latents, model.vqvae.encode(x).latents, rtol=0, atol=0)  # which it begins as
    torch.nn.init.normal_(model.encoder.conv_in.weight)
    changed_latents, changed = model.encode(x)
    assert (changed_latents != latents).any() and all((a != b).any() for a, b in zip(features, changed, strict=True))
    assert torch.equal(model.vqvae.encode(x).latents, latents)


def digits(count):
    """Good and bad digits."""
    good = to_model_space(load_digits_split().train_images[:count])
    return good, interpolate(avg_pool2d(good, 2), scale_factor=2, mode="bilinear")


def test_the_more_weight_the_closer_is_a_trained_restorer_to_the_good_image():
    good, bad = digits(32)
    model = model_of(silent=True).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(25):
        output = model(bad, good, fidelity_weight=1.0)
        loss = 0.5 * output.token + output.distance + (output.sample - good).abs().mean((1, 2, 3))
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        errors = [(model(bad, fidelity_weight=w).sample - good).square().mean() for w in (0, 0.25, 0.5, 0.75, 1)]
    psnr = 10 * torch.log10(4 / torch.stack(errors))
    assert (psnr.diff() > 0).all() and psnr[-1] > psnr[0] + 2, psnr


# ---- what is frozen, and what learns --------------------------------------------------------------------------------


def test_the_vqvae_is_bit_identical_after_a_step_of_an_optimizer_that_was_given_everything():
    model = model_of().train()
    before = {name: value.clone() for name, value in model.vqvae.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    output = model(images_of(4, 1, 8, 8), images_of(4, 1, 8, 8, seed=3), fidelity_weight=1.0)
    (output.token + output.distance + output.sample.square().mean((1, 2, 3))).mean().backward()
    optimizer.step()
    model.vqvae.update_codebook()  # nothing was noted for it
    after = model.vqvae.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert {"quantize.embedding.weight", "quantize.counts", "decoder.conv_in.weight"} <= before.keys()
    assert all(p.grad is None for p in model.vqvae.parameters())


def test_the_vqvae_stays_in_evaluation_mode_and_without_gradients():
    model = model_of().train()
    assert model.training and model.encoder.training and model.transformer.training and model.fusions.training
    assert not any(module.training for module in model.vqvae.modules())
    assert not any(p.requires_grad for p in model.vqvae.parameters())
    assert not model.eval().training


def test_every_weight_but_those_of_the_vqvae_learns():
    model = model_of().train()
    output = model(images_of(8, 1, 8, 8), images_of(8, 1, 8, 8, seed=3), fidelity_weight=1.0)
    (output.token + output.distance + output.sample.square().mean((1, 2, 3))).mean().backward()
    _, silent = gradients(model, (*LEARNING, "fusions."))
    # softmax ignores a shift of all keys of the encoder's attention; with few groups a bias may only shift a group
    assert [name for name in silent if "to_k.bias" not in name] == []


def test_in_stage_two_the_feature_transformation_gets_no_gradient():
    model = model_of().train()
    output = model(images_of(4, 1, 8, 8), images_of(4, 1, 8, 8, seed=3), fidelity_weight=None)
    assert output.sample is None
    (output.token + output.distance).mean().backward()
    assert all(p.grad is None for p in model.fusions.parameters())
    heard, _ = gradients(model)
    assert {name.split(".")[0] for name in heard} == {"encoder", "quant_conv", "transformer"}


def test_losses_of_the_codes_are_the_same_with_and_without_an_image():
    model, x, y = model_of(), images_of(4, 1, 8, 8), images_of(4, 1, 8, 8, seed=3)
    with_image, without = model(x, y, fidelity_weight=1.0), model(x, y, fidelity_weight=None)
    for name in ("token", "distance", "accuracy", "nearest_accuracy"):
        assert torch.equal(with_image[name], without[name])


def test_a_loss_of_the_image_reaches_the_feature_transformation_alone():
    """The features of the encoder are detached, and codes are chosen: without this the encoder would hear of it."""
    model = model_of().train()
    model(images_of(4, 1, 8, 8), images_of(4, 1, 8, 8, seed=3), fidelity_weight=1.0).sample.square().sum().backward()
    heard, _ = gradients(model)
    assert {name.split(".")[0] for name in heard} == {"fusions"}
    assert all(p.grad is None for name, p in model.named_parameters() if name.startswith(LEARNING))


def test_the_last_layer_is_the_last_weight_that_a_loss_of_the_image_reaches():
    model = model_of(vqvae_of(block_out_channels=(8, 16, 16)), fusion_levels=(2, 0, 1))
    order = []
    for module in model.fusions.modules():
        module.register_forward_hook(lambda module, _, __: order.append(module))
    loss = model(images_of(2, 1, 8, 8), fidelity_weight=1.0).sample.square().sum()
    convolutions = [module for module in order if isinstance(module, torch.nn.Conv2d)]
    assert convolutions[-1].weight is model.last_layer
    assert torch.autograd.grad(loss, model.last_layer)[0].abs().max() > 0


# ---- what is compared -----------------------------------------------------------------------------------------------


def test_the_codes_to_be_predicted_are_those_of_the_good_image():
    model, bad, good = model_of(), images_of(3, 1, 8, 8), images_of(3, 1, 8, 8, seed=3)
    output = model(bad, good)
    codes = model.vqvae.encode(good).indices
    assert (codes != model.vqvae.encode(bad).indices).any()
    assert torch.equal(model.codes(good), codes)
    log_p = output.logits.double().log_softmax(dim=1)
    token = -log_p.gather(1, codes.unsqueeze(1)).mean((1, 2, 3))
    torch.testing.assert_close(output.token.double(), token)
    vectors = model.vqvae.quantize.embedding.weight[codes].movedim(-1, 1)  # (B, D, h, w)
    away = ((model.encode(bad)[0] - vectors) ** 2).sum(1).mean((1, 2))
    torch.testing.assert_close(output.distance, away)
    torch.testing.assert_close(output.accuracy, (output.indices == codes).double().mean((1, 2)).float())
    nearest = (model.vqvae.encode(bad).indices == codes).double().mean((1, 2))  # the encoders are still the same
    torch.testing.assert_close(output.nearest_accuracy, nearest.float())


def test_the_vectors_of_the_codes_get_no_gradient():
    """Of a codebook that is learnt by gradient elsewhere, too: Z_c is what Z_l is led to."""
    model = model_of(vqvae_of(decay=None, restart_threshold=0.0)).train()
    model(images_of(2, 1, 8, 8), images_of(2, 1, 8, 8, seed=3)).distance.sum().backward()
    assert model.vqvae.quantize.embedding.weight.grad is None


def test_on_a_good_image_nearest_lookup_in_place_of_the_transformer_finds_all_codes():
    """What is lost between a good and a bad image is then all that there is to learn."""
    vqvae = vqvae_of()
    model, x = model_of(vqvae), images_of(4, 1, 8, 8)

    def nearest(latents):
        apart = latents.unsqueeze(1) - vqvae.quantize.embedding.weight[None, :, :, None, None]
        return -apart.square().sum(dim=2)  # (B, K, h, w)

    model.transformer.forward_features = nearest
    output = model(x, x, fidelity_weight=0.0)
    assert output.accuracy.tolist() == output.nearest_accuracy.tolist() == [1.0] * 4
    assert torch.equal(output.sample, vqvae(x).sample)
    torch.testing.assert_close(output.distance, vqvae(x).commitment)
    bad = model(images_of(4, 1, 8, 8, seed=5), x)
    assert bad.accuracy.max() < 1


def test_an_image_is_restored_by_itself():
    model = model_of().double()
    x, y = images_of(3, 1, 8, 8).double(), images_of(3, 1, 8, 8, seed=3).double()
    together = model(x, y, fidelity_weight=0.7)
    alone = [model(x[i : i + 1], y[i : i + 1], fidelity_weight=0.7) for i in range(3)]
    for name in together:
        torch.testing.assert_close(together[name], torch.cat([one[name] for one in alone]), rtol=1e-9, atol=1e-9)


def test_without_a_target_nothing_is_compared():
    output = model_of()(images_of(2, 1, 8, 8))
    assert list(output) == ["sample", "indices", "logits"] and output.token is None
    as_tuple = model_of()(images_of(2, 1, 8, 8), return_dict=False)
    assert len(as_tuple) == 3 and torch.equal(as_tuple[0], output.sample)


def test_at_first_the_codes_are_guessed_evenly():
    output = model_of()(images_of(8, 1, 8, 8), images_of(8, 1, 8, 8, seed=3))
    assert output.token.mean().item() == pytest.approx(math.log(12), abs=0.05)


# ---- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_codebook_exact_and_the_losses_nearly(dtype):
    model, x, y = model_of(), images_of(4, 1, 8, 8), images_of(4, 1, 8, 8, seed=3)
    expected = model(x, y, fidelity_weight=1.0)
    output = model.to(dtype)(x.to(dtype), y.to(dtype), fidelity_weight=1.0)
    assert model.vqvae.quantize.embedding.weight.dtype == output.token.dtype == output.distance.dtype == torch.float32
    assert output.sample.dtype == dtype
    torch.testing.assert_close(output.token, expected.token, rtol=0, atol=0.05)
    torch.testing.assert_close(output.distance, expected.distance, rtol=0.05, atol=0.02)
    at_zero = model(x.to(dtype), fidelity_weight=0.0)
    assert torch.equal(at_zero.sample, model.vqvae.decode_indices(at_zero.indices).sample)


def test_losses_are_in_single_precision_under_autocast():
    model, x, y = model_of(), images_of(4, 1, 8, 8), images_of(4, 1, 8, 8, seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x, y, fidelity_weight=1.0)
    assert output.token.dtype == output.distance.dtype == torch.float32
    torch.testing.assert_close(output.token, model(x, y).token, rtol=0, atol=0.05)


def test_under_autocast_the_codes_to_be_predicted_are_the_same():
    model, good = model_of(), images_of(64, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        codes, rounded = model.codes(good), model.vqvae.encode(good).indices
    assert torch.equal(codes, model.codes(good)) and (rounded != codes).any()


def test_the_whole_call_is_one_graph():
    torch._dynamo.reset()
    model = model_of(vqvae_of(block_out_channels=(8,), mid_block_add_attention=False))
    x, y = images_of(2, 1, 8, 8), images_of(2, 1, 8, 8, seed=3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for name, value in compiled(x, y, fidelity_weight=0.5).items():
        torch.testing.assert_close(value, model(x, y, fidelity_weight=0.5)[name])


# ---- weights and folders --------------------------------------------------------------------------------------------


def test_a_vqvae_is_taken_into_both_its_places():
    vqvae = vqvae_of(seed=7)
    model = model_of(vqvae)
    ours = model.state_dict()
    for name, value in vqvae.state_dict().items():
        assert torch.equal(ours[f"vqvae.{name}"], value)
        if name.startswith(("encoder.", "quant_conv.")):
            assert torch.equal(ours[name], value)
    with torch.no_grad():
        model.encoder.conv_in.weight.add_(1)
    assert torch.equal(model.vqvae.encoder.conv_in.weight, vqvae.encoder.conv_in.weight)


def test_a_vqvae_of_another_config_is_refused():
    with pytest.raises(
        ValueError, match="the VQ-VAE has the config .*'num_vq_embeddings': 13.* this model was made for"
    ):
        model_of().load_vqvae(vqvae_of(num_vq_embeddings=13))


def test_weights_may_be_stored_in_eight_bits_but_for_the_codebook():
    model, x = model_of(), images_of(2, 1, 8, 8)
    codebook = model.vqvae.quantize.embedding.weight.clone()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.encoder.conv_in.weight.dtype == torch.float8_e4m3fn
    assert torch.equal(model.vqvae.quantize.embedding.weight, codebook)
    assert model(x).sample.isfinite().all()


def test_a_saved_model_comes_back_whole_and_frozen(tmp_path):
    vqvae = vqvae_of()
    vqvae.save_pretrained(tmp_path / "vqvae")
    vqvae = VQVAEModel.from_pretrained(tmp_path / "vqvae")  # whose config has lists, and where it came from
    model = model_of(vqvae, fusion_levels=(0,), dropout=0.1)
    model.save_pretrained(tmp_path / "model")
    loaded = CodeFormerModel.from_pretrained(tmp_path / "model")
    x = images_of(2, 1, 8, 8)
    assert torch.equal(loaded(x, fidelity_weight=1.0).sample, model(x, fidelity_weight=1.0).sample)
    assert not any(p.requires_grad for p in loaded.vqvae.parameters())
    assert all(p.requires_grad for name, p in loaded.named_parameters() if not name.startswith("vqvae."))
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()
    loaded.load_vqvae(vqvae)
    again = CodeFormerModel.from_config(loaded.config)
    again.load_state_dict(loaded.state_dict())
    assert torch.equal(again.eval()(x).sample, loaded(x).sample)


def test_a_model_loaded_in_half_precision_keeps_the_codebook(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path)
    loaded = CodeFormerModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.vqvae.quantize.embedding.weight, model.vqvae.quantize.embedding.weight)


def test_building_and_loading_warn_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model_of().save_pretrained(tmp_path)
        CodeFormerModel.from_pretrained(tmp_path)


def test_it_is_named_by_the_package_alone():
    assert CodeFormerModel.__module__ == "annealers" and "CodeFormerModel" in annealers.__all__


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [-0.1, 1.01, float("nan")])
def test_a_weight_outside_of_its_range_is_refused(weight):
    with pytest.raises(ValueError, match=rf"fidelity_weight must lie in \[0, 1\], got {weight}"):
        model_of()(images_of(1, 1, 8, 8), fidelity_weight=weight)


@pytest.mark.parametrize(
    ("sample", "target", "message"),
    [
        ((2, 3, 8, 8), None, r"sample must be \(B, 1, 8, 8\), got \(2, 3, 8, 8\)"),
        ((2, 1, 16, 16), None, r"sample must be \(B, 1, 8, 8\), got \(2, 1, 16, 16\)"),
        ((1, 8, 8), None, r"sample must be \(B, 1, 8, 8\), got \(1, 8, 8\)"),
        ((2, 1, 8, 8), (1, 1, 8, 8), r"shape of the sample, \(2, 1, 8, 8\), got \(1, 1, 8, 8\)"),
    ],
)
def test_images_that_do_not_fit_are_refused(sample, target, message):
    with pytest.raises(ValueError, match=message):
        model_of()(images_of(*sample), None if target is None else images_of(*target))


@pytest.mark.parametrize("levels", [(), (2,), (-1,)])
def test_levels_that_are_none_are_refused(levels):
    with pytest.raises(ValueError, match=r"fusion_levels must be one or several of 0 .. 1, got"):
        model_of(fusion_levels=levels)


@pytest.mark.parametrize(
    "options",
    [
        {"norm_type": "spatial", "block_out_channels": (32, 32), "latent_channels": 32, "norm_num_groups": 32},
        {"down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")},
        {"up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D")},
    ],
)
def test_a_vqvae_of_other_blocks_is_refused(options):
    with pytest.raises(ValueError, match="between residual blocks alone: need a VQ-VAE with the default block types"):
        model_of(vqvae_of(**options))


def test_a_vqvae_that_names_the_default_blocks_is_taken():
    """As one with the weights of Diffusers' `VQModel` does."""
    named = vqvae_of(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    vqvae = VQVAEModel.from_vqmodel(named.to_vqmodel())
    output = model_of(vqvae)(images_of(2, 1, 8, 8), fidelity_weight=0.0)
    assert torch.equal(output.sample, vqvae.decode_indices(output.indices).sample)


def test_the_example_in_the_docstring_runs():
    example = doctest.DocTestParser().get_doctest(CodeFormerModel.__doc__, {"torch": torch}, "example", None, 0)
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(failed=0, attempted=len(example.examples))
    assert example.examples
