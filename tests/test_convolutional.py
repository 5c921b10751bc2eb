"""The shared encoder and decoder: what fits what, and that an image is treated by itself."""

import pytest
import torch

from annealers.models.convolutional import (
    ConvolutionalDecoder,
    ConvolutionalEncoder,
    feature_size,
    reduction_factor,
)

NETWORK = {"block_out_channels": (8, 16), "norm_num_groups": 4}


def pair(sample_size=8, channels=1, latent=3, flat=False, number=0, **options):
    """An encoder and the decoder of its latents."""
    torch.manual_seed(number)
    network = {**NETWORK, **options}
    return (
        ConvolutionalEncoder(channels, latent, sample_size, flat=flat, **network).eval(),
        ConvolutionalDecoder(latent, channels, sample_size, flat=flat, **network).eval(),
    )


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("sample_size", "channels", "levels"), [(8, 1, 2), ((8, 12), 3, 3), (28, 1, 3), (5, 2, 1)])
def test_a_latent_is_a_vector_or_a_map_as_much_smaller_as_levels_halve_and_decodes_to_the_size(
    flat, sample_size, channels, levels
):
    encoder, decoder = pair(sample_size, channels, flat=flat, block_out_channels=(8, 16, 16)[:levels])
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    x = images(2, channels, height, width)
    z = encoder(x)
    factor = 2 ** (levels - 1)
    assert z.shape == ((2, 3, 1, 1) if flat else (2, 3, height // factor, width // factor))
    assert decoder(z).shape == x.shape


def test_the_factor_counts_the_levels_that_halve():
    assert [reduction_factor((8,) * levels) for levels in (1, 2, 3, 4)] == [1, 2, 4, 8]
    assert feature_size(28, (8, 8, 8)) == (7, 7) and feature_size((12, 20), (8, 8, 8)) == (3, 5)


@pytest.mark.parametrize("sample_size", [28, (32, 28), (28, 32)])
@pytest.mark.parametrize("build", [ConvolutionalEncoder, ConvolutionalDecoder])
def test_sides_that_cannot_be_halved_so_often_are_refused(build, sample_size):
    with pytest.raises(ValueError, match="halve the image 3 times, which .*28.* pixels .*multiples of 8"):
        build(1, 4, sample_size, (8, 8, 8, 8))


def test_a_spatial_latent_takes_images_of_another_size_too():
    encoder, decoder = pair(sample_size=8)
    z = encoder(images(1, 1, 12, 16))
    assert z.shape == (1, 3, 6, 8) and decoder(z).shape == (1, 1, 12, 16)


@pytest.mark.parametrize("flat", [False, True])
def test_an_image_is_encoded_and_decoded_by_itself(flat):
    encoder, decoder = (network.double() for network in pair(flat=flat))
    x = images(3, 1, 8, 8).double()
    z = encoder(x)
    torch.testing.assert_close(z, torch.cat([encoder(one) for one in x.split(1)]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(decoder(z), torch.cat([decoder(one) for one in z.split(1)]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("attention", [False, True])
def test_every_weight_learns(flat, attention):
    encoder, decoder = pair(flat=flat, mid_block_add_attention=attention)
    (decoder(encoder(images(4, 1, 8, 8))) * images(4, 1, 8, 8)).sum().backward()
    for network in (encoder, decoder):
        silent = [name for name, p in network.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
        assert [name for name in silent if not name.endswith("to_k.bias")] == []  # softmax ignores a shift of all keys
        assert any("attentions" in name for name, _ in network.named_parameters()) == attention


def test_a_flat_latent_knows_where_things_are_in_the_image():
    """A mean over the pixels would not: the linear layers see the whole feature map."""
    encoder, decoder = pair(flat=True, mid_block_add_attention=False)
    x = torch.zeros(1, 1, 8, 8)
    x[..., :4] = 1
    assert (encoder(x) - encoder(x.flip(-1))).abs().max() > 1e-3
    maps = []
    decoder.trunk.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
    decoder(images(1, 3, 1, 1))
    assert maps[0].shape == (1, 16, 4, 4) and (maps[0].std(dim=(2, 3)) > 1e-3).all()


def test_a_latent_and_a_feature_map_need_not_be_zero_where_the_others_are():
    encoder, decoder = pair(flat=True)
    with torch.no_grad():
        encoder.to_flat.weight.zero_(), decoder.from_flat.weight.zero_()
    assert (encoder(images(1, 1, 8, 8)) != 0).all()
    maps = []
    decoder.trunk.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
    decoder(images(1, 3, 1, 1))
    assert (maps[0] != 0).all()


@pytest.mark.parametrize("layers", [1, 3])
def test_levels_have_as_many_residual_blocks_as_asked_for_and_those_of_the_decoder_one_more(layers):
    encoder, decoder = pair(layers_per_block=layers)
    assert [len(block.resnets) for block in encoder.trunk.down_blocks] == [layers, layers]
    assert [len(block.resnets) for block in decoder.trunk.up_blocks] == [layers + 1, layers + 1]


def test_groups_of_the_normalisation_are_those_asked_for():
    encoder, decoder = pair(norm_num_groups=2)
    norms = [m for network in (encoder, decoder) for m in network.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert len(norms) > 4 and {norm.num_groups for norm in norms} == {2}
