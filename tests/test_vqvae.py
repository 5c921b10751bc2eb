"""Properties of VQVAEModel: likelihoods, codes, Diffusers' VQModel, precision, compiling, what a folder gives back."""

import doctest
import itertools
import math
import warnings

import pytest
import torch
from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel, VQModel

import annealers
from annealers import VQVAEModel
from annealers.models.pixel_likelihood import LIKELIHOODS

SMALL = {"block_out_channels": (8, 16), "latent_channels": 4, "num_vq_embeddings": 16, "norm_num_groups": 4}


def model_of(seed=0, **options):
    torch.manual_seed(seed)
    model = VQVAEModel(**{"in_channels": 1, "sample_size": 8, **SMALL, **options}).eval()
    with torch.no_grad():  # as spread out as what is encoded, or one code would be the nearest to all
        latents = model.encode(images(64, model.config.in_channels)).latents.movedim(1, -1).flatten(0, -2)
        model.quantize.set_codebook(latents[torch.randperm(len(latents))[: model.config.num_vq_embeddings]])
    return model


def images(count=3, channels=1, size=8, binary=False):
    u = torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(1))
    return (2 * u - 1).sign() if binary else (255 * u).round() / 127.5 - 1


# ---- images, codes and their likelihood -----------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_forward_says_what_encoding_and_decoding_say_and_what_it_costs(likelihood):
    model, x = (
        model_of(likelihood=likelihood, in_channels=3, sigma=0.3),
        images(3, 3, binary=likelihood == "bernoulli"),
    )
    output = model(x)
    encoded = model.encode(x)
    assert torch.equal(output.indices, encoded.indices) and output.indices.shape == (3, 4, 4)
    assert output.indices.unique().numel() > 3
    vectors = model.quantize.embedding.weight[output.indices].movedim(-1, 1)
    parameters = model.decoder(model.post_quant_conv(vectors))
    assert torch.equal(output.sample, model.likelihood.mean(parameters)) and output.sample.shape == x.shape
    assert torch.equal(output.nll, -model.likelihood.log_prob(parameters, x)) and output.nll.shape == (3,)
    distance = (encoded.latents - vectors).square().sum(dim=1).mean(dim=(1, 2))
    torch.testing.assert_close(output.commitment, distance)
    torch.testing.assert_close(output.codebook, distance)
    p = torch.bincount(output.indices.flatten()) / output.indices.numel()
    assert output.perplexity.item() == pytest.approx(math.exp(-sum(q * math.log(q) for q in p.tolist() if q > 0)))
    for sample in (
        model.decode_indices(output.indices).sample,
        model.decode_indices(output.indices, return_dict=False)[0],
        model.decode(encoded.latents).sample,
        model.decode(vectors, force_not_quantize=True).sample,
        model.decode(encoded.latents, return_dict=False, generator=torch.Generator())[0],
    ):
        assert torch.equal(sample, output.sample)
    assert all(torch.equal(a, b) for a, b in zip(model(x, return_dict=False), output.to_tuple(), strict=True))
    assert torch.equal(model.encode(x, return_dict=False)[1], encoded.indices)


def test_the_two_stages_with_even_codes_are_a_bound_of_the_likelihood():
    """Over all 16 binary images of 2 x 2, the sum of p(k) p(x | k), k being the codes of x, is at most 1."""
    model = model_of(sample_size=2, likelihood="bernoulli", num_vq_embeddings=3)
    x = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4))).reshape(16, 1, 2, 2)
    output = model(x)
    codes = {tuple(k.flatten().tolist()) for k in output.indices}
    assert math.prod(model.latent_size) == 1 and len(codes) > 1
    assert (-output.nll - math.log(3)).exp().sum() <= 1
    for k in range(3):  # and given any codes the images have the probability 1
        parameters = model.decoder_parameters(model.quantize.lookup(torch.full((16, 1, 1), k)))
        assert model.likelihood.log_prob(parameters, x).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_an_image_is_coded_and_decoded_by_itself():
    model, x = model_of().double(), images(4).double()
    together = model(x)
    for i in range(4):
        alone = model(x[i : i + 1])
        assert torch.equal(alone.indices[0], together.indices[i])
        torch.testing.assert_close(alone.nll[0], together.nll[i], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("size", "levels", "expected"), [(8, 1, (8, 8)), (8, 3, (2, 2)), ((6, 10), 2, (3, 5)), (28, 3, (7, 7))]
)
def test_each_level_but_the_last_halves_the_image(size, levels, expected):
    model = model_of(sample_size=size, block_out_channels=(8,) * levels)
    height, width = (size, size) if isinstance(size, int) else size
    codes = model.encode(torch.zeros(2, 1, height, width)).indices
    assert model.latent_size == expected == tuple(codes.shape[1:])
    assert model.decode_indices(codes).sample.shape == (2, 1, height, width)


def test_every_weight_learns_and_the_codebook_loss_is_of_the_codebook():
    model = model_of(decay=None, restart_threshold=0.0, learn_sigma=True).train()
    output = model(images(8))
    (output.nll / 64 + output.codebook + 0.25 * output.commitment).mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    # softmax ignores a shift of all keys, and the normalisation that follows a constant of a whole channel
    assert [name for name in silent if not name.endswith("to_k.bias")] == []
    for term, learns in (("nll", False), ("commitment", False), ("codebook", True)):
        model.zero_grad()
        model(images(8))[term].mean().backward()
        assert (model.quantize.embedding.weight.grad is not None) == learns
        assert (model.encoder.conv_in.weight.grad is not None) != learns


def test_a_moving_average_moves_when_it_is_told_to_and_in_training_alone():
    model = model_of(decay=0.5)
    before = model.quantize.embedding.weight.clone()
    model(images())
    model.update_codebook()
    assert torch.equal(model.quantize.embedding.weight, before)
    model.train().requires_grad_(False)
    model(images())
    model.update_codebook()
    assert torch.equal(model.quantize.embedding.weight, before)
    model.requires_grad_(True)
    model(images())
    assert torch.equal(model.quantize.embedding.weight, before)
    model.update_codebook()
    assert not torch.equal(model.quantize.embedding.weight, before)


def test_the_priorities_of_restarts_reach_the_codebook():
    def restarted(priority):
        model = model_of(decay=0.01, restart_threshold=0.5).train()
        model(images(2), priority)
        model.update_codebook()
        return model.quantize.embedding.weight

    rising = torch.arange(32.0).reshape(2, 4, 4)
    assert torch.equal(restarted(rising), restarted(rising))
    assert not torch.equal(restarted(rising), restarted(31 - rising))


# ---- Diffusers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"vq_embed_dim": 6, "mid_block_add_attention": False},
        {"norm_type": "spatial", "block_out_channels": (32, 32)},
        {
            "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        },
    ],
)
def test_weights_go_to_a_vqmodel_and_come_back(options):
    model, x = model_of(**options), images()
    vqmodel = model.to_vqmodel()
    assert type(vqmodel) is VQModel and not vqmodel.training
    torch.testing.assert_close(vqmodel(x).sample, model(x).sample, atol=1e-5, rtol=1e-5)
    assert torch.equal(vqmodel.encode(x).latents, model.encode(x).latents)
    back = VQVAEModel.from_vqmodel(vqmodel)
    assert torch.equal(back(x).sample, model(x).sample) and back.config.decay is None
    assert back.quantize.embedding.weight.requires_grad
    averaged = VQVAEModel.from_vqmodel(vqmodel, decay=0.9, restart_threshold=0.2)
    assert torch.equal(averaged(x).sample, model(x).sample)
    assert torch.equal(averaged.quantize.sums, averaged.quantize.embedding.weight)
    shared = vqmodel.state_dict()
    assert shared.keys() <= back.state_dict().keys() <= {*shared, "pixel_likelihood.log_sigma"}
    assert {name for name in averaged.state_dict() if name not in shared} == {
        "pixel_likelihood.log_sigma",
        "quantize.counts",
        "quantize.sums",
    }
    with torch.no_grad():
        shared["decoder.conv_out.bias"].add_(1)
    assert torch.equal(back(x).sample, model(x).sample)  # a copy


def test_a_half_precision_vqmodel_keeps_its_precision_but_for_the_codebook():
    vqmodel = model_of().to_vqmodel().half()
    model = VQVAEModel.from_vqmodel(vqmodel)
    assert model.dtype == torch.float16 and model.quantize.embedding.weight.dtype == torch.float32
    assert {p.dtype for p in model.to_vqmodel().parameters()} == {torch.float16}


def test_a_decoder_of_more_than_the_mean_does_not_fit_a_vqmodel():
    with pytest.raises(ValueError, match="this one's is 'discretized_logistic'"):
        model_of(likelihood="discretized_logistic").to_vqmodel()
    with pytest.raises(ValueError, match="in_channels == out_channels, got 3 and 1"):
        VQVAEModel.from_vqmodel(VQModel(out_channels=1))


def test_a_latent_diffusion_pipeline_decodes_with_it(tmp_path):
    vqvae = model_of(scaling_factor=0.5)
    unet = UNet2DModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    seen = []
    vqvae.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    LDMPipeline(vqvae, unet, DDIMScheduler()).save_pretrained(tmp_path)
    pipeline = LDMPipeline(vqvae, unet, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np")
    codes = vqvae.quantize.embedding.weight
    vectors = vqvae.post_quant_conv(codes[:, :, None, None])[:, :, 0, 0]
    assert all((vectors - v).abs().sum(1).min() < 1e-5 for v in seen[0].movedim(1, -1).flatten(0, -2))  # re-quantised
    loaded = LDMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    again = loaded(generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np")
    assert type(loaded.vqvae) is VQVAEModel and (again[0] == images[0]).all()


def test_codes_can_be_looked_up_as_pipelines_of_masked_tokens_do():
    model = model_of(lookup_from_codebook=True)
    codes = model.encode(images()).indices
    flat = model.decode(codes.flatten(), force_not_quantize=True, shape=(3, 4, 4, 4)).sample
    assert torch.equal(flat, model.decode_indices(codes).sample)
    assert torch.equal(model.decode(codes, force_not_quantize=True).sample, flat)


# ---- precision, memory, compilation ---------------------------------------------------------------------------------


def test_loaded_in_half_precision_the_statistics_stay_in_single_precision(tmp_path):
    model = model_of(decay=0.9).train()
    model(images())
    model.update_codebook()
    model.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        for loaded in (
            VQVAEModel.from_pretrained(tmp_path, torch_dtype=dtype),
            VQVAEModel.from_pretrained(tmp_path).to(dtype),
        ):
            assert loaded.dtype == loaded.encoder.conv_in.weight.dtype == dtype
            for name, value in model.quantize.state_dict().items():
                assert torch.equal(loaded.quantize.state_dict()[name], value), name
            output = loaded(images().to(dtype))
            assert output.sample.dtype == dtype and output.nll.dtype == torch.float32
            assert loaded.decode_indices(output.indices).sample.dtype == dtype


def test_half_precision_costs_little():
    model, x = model_of(), images(8)
    output = model(x)
    half = model_of().bfloat16()(x.bfloat16())
    assert (half.indices == output.indices).float().mean() > 0.7
    decoded = model_of().bfloat16().decode_indices(output.indices).sample
    torch.testing.assert_close(decoded.float(), output.sample, atol=0.05, rtol=0)


def test_it_compiles_as_one_graph_and_learns_the_same():
    small = {"decay": 0.5, "restart_threshold": 0.3, "block_out_channels": (8, 8), "mid_block_add_attention": False}
    x, priority = images(4), torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(2))
    states = []
    for compiled in (False, True):
        model = model_of(**small).train()
        call = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        for part in (slice(0, 2), slice(2, 4)):
            output = call(x[part], priority[part])
            (output.nll / 64 + output.commitment).mean().backward()
        model.update_codebook()
        gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
        states.append(model.state_dict() | gradients)
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_changes_neither_gradient_nor_codebook():
    results = []
    for checkpointing in (False, True):
        model = model_of(decay=0.5).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
            assert model.encoder.gradient_checkpointing and model.decoder.gradient_checkpointing
        output = model(images(), torch.zeros(3, 4, 4))
        (output.nll / 64 + output.commitment).mean().backward()
        model.update_codebook()
        results.append([*(p.grad for p in model.parameters()), *model.buffers()])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain)


# ---- folders, names, refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"decay": None, "restart_threshold": 0.0, "likelihood": "discretized_logistic"}]
)
def test_a_saved_model_comes_back_whole(tmp_path, options):
    model = model_of(**options).train()
    model(images()).nll.sum().backward()
    model.update_codebook()
    model.eval().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = VQVAEModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(images()).nll, model(images()).nll)
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for name, value in model.config.items():
        if not name.startswith("_"):
            assert loaded.config[name] == (list(value) if isinstance(value, tuple) else value), name


def test_it_is_named_by_the_package_alone():
    assert VQVAEModel.__module__ == "annealers" and "VQVAEModel" in annealers.__all__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_size": 7}, "multiples of 2"),
        ({"norm_type": "batch"}, "norm_type must be 'group' or 'spatial', got 'batch'"),
        ({"beta": -0.1}, "beta must not be negative, got -0.1"),
        ({"likelihood": "laplace"}, "got 'laplace'"),
        ({"decay": None}, "need restart_threshold=0, got 0.1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VQVAEModel(**{"in_channels": 1, "sample_size": 8, **SMALL, **options})


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 7, 8), (2, 1, 8, 9), (1, 8, 8)])
def test_shapes_that_do_not_fit_are_refused(shape):
    model = model_of()
    for call in (model, model.encode):
        with pytest.raises(ValueError, match=r"sample must be \(B, 1, H, W\) with sides that are multiples of 2"):
            call(torch.zeros(shape))


def test_the_example_in_the_docstring_runs():
    example = doctest.DocTestParser().get_doctest(VQVAEModel.__doc__, {"torch": torch}, "example", None, 0)
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(failed=0, attempted=len(example.examples))
    assert example.examples
