r"""A VQ-VAE: an autoencoder whose latent image is made of K codes.

    z_e = E(x)  ->  k = argmin_i ||z_e - e_i||^2, z_q = e_k  ->  p(x | z_q) = likelihood(D(z_q))

    loss = -log p(x | z_q) / V + ||sg[z_e] - e_k||^2 + beta ||z_e - sg[e_k]||^2     V: values of an image

with the last two averaged over positions, and the middle one only where the codebook learns by gradient; `forward`
returns the three terms, and the training script weighs them. With a prior on the codes an image costs

    [-log p(x | z_q) - log p(k)] / (V log 2) bits per value,          -log p(k) = h w log K without one

which is why the first is a likelihood and no mean squared error. Networks and names of weights are those of Diffusers'
`VQModel`, whose weights can be taken (`from_vqmodel`) and given (`to_vqmodel`).

Sources: van den Oord, Vinyals & Kavukcuoglu 2017, "Neural Discrete Representation Learning", arXiv:1711.00937, Eq. 3
and App. A.1; the networks, Rombach et al. 2022, arXiv:2112.10752, App. G. See `annealers.models.vector_quantizer` for
the codebook.

    symbol    code       shape           meaning
    x         sample     (B, C, H, W)    image in [-1, 1]
    z_e       latents    (B, D, h, w)    before quantisation
    k         indices    (B, h, w)       codes 0 .. K - 1
    lambda    parameters (B, P, H, W)    of the likelihood
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin, VQModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, Decoder, DecoderOutput, Encoder
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from annealers.models.convolutional import feature_size, reduction_factor
from annealers.models.pixel_likelihood import Generators, PixelLikelihood, make_likelihood
from annealers.models.vector_quantizer import VectorQuantizer, perplexity

OPTIONS_OF_VQMODEL = (
    "in_channels",
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "act_fn",
    "latent_channels",
    "sample_size",
    "num_vq_embeddings",
    "norm_num_groups",
    "vq_embed_dim",
    "scaling_factor",
    "norm_type",
    "mid_block_add_attention",
    "lookup_from_codebook",
    "force_upcast",
)


@dataclass
class VQVAEEncoderOutput(BaseOutput):
    """An encoded batch.

    Args:
        latents: z_e, (B, D, h, w), before quantisation, as of `VQModel`.
        indices: Their codes, int64 (B, h, w).
    """

    latents: torch.Tensor
    indices: torch.Tensor


@dataclass
class VQVAEOutput(BaseOutput):
    """A batch that was encoded and decoded.

    Args:
        sample: E[x | z_q], (B, C, H, W).
        indices: Codes, int64 (B, h, w).
        nll: -log p(x | z_q) in nats, (B,); of a density for the Gaussian, see `annealers.models.pixel_likelihood`.
        commitment: ||z_e - sg[e]||^2, averaged over positions, (B,).
        codebook: ||sg[z_e] - e||^2, averaged over positions, (B,); without gradient under a moving average.
        perplexity: Of the codes of this batch on this process, ().
    """

    sample: torch.Tensor
    indices: torch.Tensor
    nll: torch.Tensor
    commitment: torch.Tensor
    codebook: torch.Tensor
    perplexity: torch.Tensor


class VQVAEModel(ModelMixin, AutoencoderMixin, ConfigMixin):
    """An autoencoder with a codebook.

    Args:
        in_channels: C.
        sample_size: Side of the images it is trained on, or (H, W); it takes others that the levels can halve.
        block_out_channels: Channels of each resolution level; each level but the last halves the image.
        layers_per_block: Residual blocks per level of the encoder; the decoder has one more.
        latent_channels: Channels between the networks and the 1 x 1 convolutions around the codebook.
        vq_embed_dim: D; None is `latent_channels`.
        num_vq_embeddings: K.
        beta: Weight of the commitment, for who weighs the terms.
        decay: gamma of the codebook as a moving average over optimizer steps; None learns it by gradient.
        restart_threshold: tau; a code that is chosen less often per optimizer step, on average, becomes one of the
            latents of the step. 0 restarts none.
        likelihood: "gaussian", "discretized_logistic", "discretized_mix_logistic" or "bernoulli".
        num_levels, sigma, learn_sigma, num_mixtures: Of the likelihood, see `make_likelihood`.
        down_block_types, up_block_types: Blocks of Diffusers for each level; None are convolutional ones.
        act_fn, norm_num_groups, mid_block_add_attention: Of the networks.
        norm_type: "group", or "spatial" for a decoder that is normalised by the codes.
        scaling_factor: What pipelines of latent diffusion multiply latents by, and divide by before `decode`.
        lookup_from_codebook: Whether `decode(force_not_quantize=True)` takes codes, as masked-token pipelines do.
        force_upcast: Tells pipelines to decode in float32.

    Raises:
        ValueError: If an option is out of range, or the levels do not fit the size.

    Example:
        >>> from annealers import VQVAEModel
        >>> model = VQVAEModel(in_channels=1, sample_size=8, block_out_channels=(8, 16), num_vq_embeddings=32)
        >>> codes = model.encode(torch.rand(2, 1, 8, 8) * 2 - 1).indices
        >>> codes.shape, model.decode_indices(codes).sample.shape
        (torch.Size([2, 4, 4]), torch.Size([2, 1, 8, 8]))
    """

    __module__ = "annealers"  # its public name
    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules = ["quantize", "pixel_likelihood"]
    _skip_layerwise_casting_patterns = ["quantize"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        sample_size: int | tuple[int, int] = 32,
        block_out_channels: tuple[int, ...] = (64, 128),
        layers_per_block: int = 1,
        latent_channels: int = 64,
        vq_embed_dim: int | None = None,
        num_vq_embeddings: int = 512,
        beta: float = 0.25,
        decay: float | None = 0.99,
        restart_threshold: float = 0.1,
        likelihood: str = "gaussian",
        num_levels: int = 256,
        sigma: float = 1.0,
        learn_sigma: bool = False,
        num_mixtures: int = 10,
        down_block_types: tuple[str, ...] | None = None,
        up_block_types: tuple[str, ...] | None = None,
        act_fn: str = "silu",
        norm_num_groups: int = 8,
        mid_block_add_attention: bool = True,
        norm_type: str = "group",
        scaling_factor: float = 1.0,
        lookup_from_codebook: bool = False,
        force_upcast: bool = False,
    ) -> None:
        super().__init__()
        feature_size(sample_size, block_out_channels)  # raises if the levels do not fit it
        if norm_type not in ("group", "spatial"):
            raise ValueError(f"norm_type must be 'group' or 'spatial', got {norm_type!r}")
        if beta < 0:
            raise ValueError(f"beta must not be negative, got {beta}")
        levels = len(block_out_channels)
        vq_embed_dim = latent_channels if vq_embed_dim is None else vq_embed_dim
        shared = {
            "block_out_channels": tuple(block_out_channels),
            "layers_per_block": layers_per_block,
            "act_fn": act_fn,
            "norm_num_groups": norm_num_groups,
            "mid_block_add_attention": mid_block_add_attention,
        }
        self.pixel_likelihood = make_likelihood(likelihood, in_channels, num_levels, sigma, learn_sigma, num_mixtures)
        self.encoder = Encoder(
            in_channels,
            latent_channels,
            down_block_types=down_block_types or ("DownEncoderBlock2D",) * levels,
            double_z=False,
            **shared,
        )
        self.quant_conv = nn.Conv2d(latent_channels, vq_embed_dim, kernel_size=1)
        self.quantize = VectorQuantizer(num_vq_embeddings, vq_embed_dim, decay, restart_threshold)
        self.post_quant_conv = nn.Conv2d(vq_embed_dim, latent_channels, kernel_size=1)
        self.decoder = Decoder(
            latent_channels,
            self.pixel_likelihood.parameter_channels,
            up_block_types=up_block_types or ("UpDecoderBlock2D",) * levels,
            norm_type=norm_type,
            **shared,
        )

    @property
    def likelihood(self) -> PixelLikelihood:
        """p(x | lambda); a submodule of that name would be hidden by the option."""
        return self.pixel_likelihood

    @property
    def latent_size(self) -> tuple[int, int]:
        """(h, w) of the codes of an image of `sample_size`."""
        return feature_size(self.config.sample_size, self.config.block_out_channels)

    # ---- training ---------------------------------------------------------------------------------------------------

    def forward(
        self, sample: torch.Tensor, restart_priority: torch.Tensor | None = None, return_dict: bool = True
    ) -> VQVAEOutput | tuple[torch.Tensor, ...]:
        """Encodes, quantises and decodes images, and says what that costs.

        In training mode it takes notes for the codebook; call `update_codebook` after each optimizer step.

        Args:
            sample: x, (B, C, H, W) in [-1, 1].
            restart_priority: Random numbers >= 0, (B, h, w): the latents with the highest of an optimizer step take
                the place of unused codes. None draws them; give them, and the codebook does not depend on how a step
                is split into batches.
            return_dict: Return a `VQVAEOutput` rather than a tuple.

        Raises:
            ValueError: If the shape does not fit.
        """
        self._check_sample(sample)
        quantized, indices, commitment, codebook = self.quantize(
            self.quant_conv(self.encoder(sample)), restart_priority
        )
        parameters = self.decoder_parameters(quantized)
        output = VQVAEOutput(
            sample=self.likelihood.mean(parameters),
            indices=indices,
            nll=-self.likelihood.log_prob(parameters, sample),
            commitment=commitment,
            codebook=codebook,
            perplexity=perplexity(code_counts(indices, self.config.num_vq_embeddings)),
        )
        return output if return_dict else output.to_tuple()

    def update_codebook(self) -> None:
        """Moves a codebook that is a moving average by the batches since the last call; all processes must call it."""
        self.quantize.update()

    # ---- images to codes and back -----------------------------------------------------------------------------------

    @apply_forward_hook
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> VQVAEEncoderOutput | tuple[torch.Tensor, ...]:
        """Latents and codes of images (B, C, H, W) in [-1, 1].

        Raises:
            ValueError: If the shape does not fit.
        """
        self._check_sample(x)
        latents = self.quant_conv(self.encoder(x))
        output = VQVAEEncoderOutput(latents=latents, indices=self.quantize.indices(latents))
        return output if return_dict else output.to_tuple()

    @apply_forward_hook
    def decode(
        self,
        h: torch.Tensor,
        force_not_quantize: bool = False,
        return_dict: bool = True,
        shape: tuple[int, ...] | None = None,
        generator: Generators | None = None,
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """The mean image of latents, which are quantised first, so that those of a diffusion model need not be codes.

        Args:
            h: z_e, (B, D, h, w); or, with `lookup_from_codebook` and `force_not_quantize`, integer codes.
            force_not_quantize: Decode the latents as they are.
            return_dict: Return a `DecoderOutput` rather than a tuple.
            shape: (B, h, w, D), where codes are looked up that have lost their shape.
            generator: For pipelines that pass one; nothing is drawn.

        Returns:
            Images in [-1, 1], (B, C, H, W); of a Gaussian they may lie beyond.
        """
        if not force_not_quantize:
            h = self.quantize.lookup(self.quantize.indices(h)).to(h.dtype)
        elif self.config.lookup_from_codebook:
            h = self.quantize.lookup(h if shape is None else h.reshape(shape[:3])).to(self.dtype)
        sample = self.likelihood.mean(self.decoder_parameters(h))
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    @apply_forward_hook
    def decode_indices(self, indices: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """The mean image of codes, int64 (B, h, w) of 0 .. K - 1.

        Raises:
            ValueError: If they are none.
        """
        vectors = self.quantize.lookup(indices).to(self.dtype)
        sample = self.likelihood.mean(self.decoder_parameters(vectors))
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    @apply_forward_hook
    def decoder_parameters(self, quantized: torch.Tensor) -> torch.Tensor:
        """lambda of p(x | lambda), (B, P, H, W), of vectors (B, D, h, w)."""
        latents = self.post_quant_conv(quantized)
        return self.decoder(latents, quantized if self.config.norm_type == "spatial" else None)

    def _check_sample(self, sample: torch.Tensor) -> None:
        factor = reduction_factor(self.config.block_out_channels)
        fits = sample.ndim == 4 and sample.shape[1] == self.config.in_channels
        if not fits or sample.shape[2] % factor != 0 or sample.shape[3] % factor != 0:
            raise ValueError(
                f"sample must be (B, {self.config.in_channels}, H, W) with sides that are multiples of {factor}, got "
                f"{tuple(sample.shape)}"
            )

    # ---- VQModel ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_vqmodel(cls, vqmodel: VQModel, decay: float | None = None, restart_threshold: float = 0.0) -> VQVAEModel:
        """A model with the weights of Diffusers' `VQModel` and a Gaussian likelihood.

        Args:
            vqmodel: Of images to images with as many channels.
            decay, restart_threshold: How the codebook goes on learning.

        Raises:
            ValueError: If the numbers of channels differ.
        """
        config = vqmodel.config
        if config.in_channels != config.out_channels:
            raise ValueError(
                "a likelihood is of the image that was encoded: need in_channels == out_channels, got "
                f"{config.in_channels} and {config.out_channels}"
            )
        options = {name: config[name] for name in OPTIONS_OF_VQMODEL}
        model = cls(**options, decay=decay, restart_threshold=restart_threshold)
        weights = {name: weight.clone() for name, weight in vqmodel.state_dict().items()}
        codebook = weights.pop("quantize.embedding.weight")
        model.load_state_dict(model.state_dict() | weights, assign=True)  # in the precision that they have
        model.quantize.set_codebook(codebook)
        return model.to(vqmodel.device).train(vqmodel.training)

    def to_vqmodel(self) -> VQModel:
        """Diffusers' `VQModel` with these weights, which makes the same images.

        Raises:
            ValueError: If the decoder gives more than the mean of an image.
        """
        if self.config.likelihood != "gaussian":
            raise ValueError(
                "the decoder of a VQModel gives an image, which that of a Gaussian likelihood does; this one's is "
                f"{self.config.likelihood!r}"
            )
        config, levels = self.config, len(self.config.block_out_channels)
        options = {name: config[name] for name in OPTIONS_OF_VQMODEL} | {
            "down_block_types": config.down_block_types or ("DownEncoderBlock2D",) * levels,
            "up_block_types": config.up_block_types or ("UpDecoderBlock2D",) * levels,
        }
        vqmodel = VQModel(**options, out_channels=config.in_channels)
        weights = self.state_dict()
        copies = {name: weights[name].to(self.dtype, copy=True) for name in vqmodel.state_dict()}
        vqmodel.load_state_dict(copies, assign=True)
        return vqmodel.train(self.training)


def code_counts(indices: torch.Tensor, num_embeddings: int) -> torch.Tensor:
    """How often each code occurs, int64 (K,)."""
    counts = torch.zeros(num_embeddings, dtype=torch.long, device=indices.device)
    return counts.index_add(0, indices.flatten(), torch.ones_like(indices.flatten()))
