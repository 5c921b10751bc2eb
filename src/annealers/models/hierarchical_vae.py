r"""A variational autoencoder with a hierarchy of latents, inferred from the top down.

    p(x, z) = p(z_1) prod_{l > 1} p(z_l | z_<l) p(x | z)            z_1 at the top, p(z_1) = N(0, I)
    q(z | x) = q(z_1 | x) prod_{l > 1} q(z_l | x, z_<l)
    -ELBO = E_q[-log p(x | z)] + sum_l E_q[KL(q(z_l | x, z_<l) || p(z_l | z_<l))]

A ladder: one network goes up from the image to features d_l of each resolution and to q(z_1 | x); another one goes
down from z_1 to the image, and on its way, at a state h_l, meets the other layers. There it says what it expects, and
what it has seen on the way up corrects that, in units of the prior:

    p(z_l | z_<l) = N(m_p, s_p^2)                              m_p, s_p of h_l
    q(z_l | x, z_<l) = N(m_p + s_p m_c, (s_p s_c)^2)           m_c, s_c of (h_l, d_l)
    KL_l = 1/2 sum (m_c^2 + s_c^2 - 1 - log s_c^2)

Sonderby et al. (Sec. 2.2) read a normal law off the features and multiply it with the prior. Then the mean of a layer
that says little hardly moves with what it says, and such layers stayed silent when tried on MNIST. The correction has
no such gate; but here, too, the layers below the top are heard only if the weight of the divergence grows from 0 in
the first steps of training, or with free bits.

Nobody but the posterior goes up: sampling is the way down alone.

The way up and the way down are the encoder and the decoder of `VAEModel`, and the layers stand at the ends of the
decoder's levels. So with one layer this is a `VAEModel`, weight for weight.

Sources: Sonderby, Raiko, Maaloe, Sonderby & Winther 2016, "Ladder Variational Autoencoders", arXiv:1602.02282, who
number the layers from the image up; Vahdat & Kautz 2020, "NVAE: A Deep Hierarchical Variational Autoencoder",
arXiv:2007.03898, Eq. 2 (the correction; their shift is not in units of the prior); Kingma, Salimans et al. 2016,
"Improving Variational Inference with Inverse Autoregressive Flow", arXiv:1606.04934 (free bits); Child 2021, "Very
Deep VAEs Generalize Autoregressive Models", arXiv:2011.10650 (residual way down, a posterior that is told the state,
ends of residual branches scaled by 1 / sqrt(L)).

    symbol         code            shape                   meaning
    x              sample          (B, C, H, W)            images in [-1, 1]
    z_l            latents[l - 1]  (B, C_l, h_l, w_l)      of the layer l = 1 .. L, from the top down
    d_l            features        (B, channels, h_l, w_l) of the image, on the way up
    h_l            state           (B, channels, h_l, w_l) on the way down
    KL_l           kl_per_layer    (L, B)                  nats
                   noise           (B, N)                  standard normal, all layers one after the other
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.resnet import ResnetBlock2D
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from annealers.models.convolutional import (
    ConvolutionalDecoder,
    ConvolutionalEncoder,
    Size,
    check_images,
    feature_size,
    with_class_planes,
)
from annealers.models.importance_weighting import importance_weighted_bound
from annealers.models.pixel_likelihood import (
    Generators,
    PixelLikelihood,
    at_least_float32,
    make_likelihood,
    normal_numbers,
)


class LadderLayer(nn.Module):
    """One layer of latents below the top: its prior, its posterior, and what they add to the state.

    Args:
        channels: Of the state and of the features.
        latent_channels: C_l.
        norm_num_groups: Groups of the normalisation.
        branch_scale: Factor of the last weights of each residual branch at first, 1 / sqrt(L).
    """

    def __init__(self, channels: int, latent_channels: int, norm_num_groups: int, branch_scale: float) -> None:
        super().__init__()
        self.prior_block = residual_block(channels, channels, norm_num_groups)
        self.prior_head = head(channels, 2 * latent_channels, norm_num_groups)
        self.correction_block = residual_block(2 * channels, channels, norm_num_groups)
        self.correction_head = head(channels, 2 * latent_channels, norm_num_groups)
        self.from_latents = nn.Conv2d(latent_channels, channels, kernel_size=1)
        # prior and posterior are standard normal at first
        for last in (self.prior_head[-1], self.correction_head[-1]):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        with torch.no_grad():
            self.prior_block.conv2.weight.mul_(branch_scale)
            self.from_latents.weight.mul_(branch_scale)

    def prior(self, state: torch.Tensor) -> tuple[torch.Tensor, DiagonalGaussianDistribution]:
        """p(z_l | z_<l), and the state after the block that leads to it."""
        state = self.prior_block(state, temb=None)
        return state, DiagonalGaussianDistribution(at_least_float32(self.prior_head(state)))

    def posterior(
        self, state: torch.Tensor, features: torch.Tensor, prior: DiagonalGaussianDistribution
    ) -> DiagonalGaussianDistribution:
        """q(z_l | x, z_<l): the prior, corrected by what the features say of the image."""
        hidden = self.correction_block(torch.cat([state, features], dim=1), temb=None)
        m_c, log_s_c_squared = at_least_float32(self.correction_head(hidden)).chunk(2, dim=1)
        mean, logvar = prior.mean + prior.std * m_c, prior.logvar + log_s_c_squared
        return DiagonalGaussianDistribution(torch.cat([mean, logvar], dim=1))

    def forward(
        self, state: torch.Tensor, features: torch.Tensor | None, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draws z_l with given noise, from the posterior, or from the prior if there are no features of an image.

        Returns:
            The state with z_l, z_l, and the parameters (mean, log-variance) of what it was drawn from and the prior.
        """
        state, prior = self.prior(state)
        drawn_from = prior if features is None else self.posterior(state, features, prior)
        z = drawn_from.mean + drawn_from.std * noise
        state = state + self.from_latents(z.to(state.dtype))
        return state, z, drawn_from.parameters, prior.parameters


@dataclass
class DrawnLayer:
    """What was drawn in a layer, what it was drawn from (the posterior, or the prior itself), and the prior."""

    latents: torch.Tensor
    posterior: DiagonalGaussianDistribution
    prior: DiagonalGaussianDistribution


@dataclass
class HierarchicalVAEOutput(BaseOutput):
    """What the model returns of images.

    Args:
        sample: Mean of p(x | z), (B, C, H, W).
        latent_dist: q(z_l | x, z_<l) of each layer, given the latents above that were drawn.
        prior_dist: p(z_l | z_<l) of each layer.
        latents: z_l of each layer, (B, C_l, h_l, w_l).
        nll: -log p(x | z), (B,), in nats.
        kl: The sum of `kl_per_layer` over the layers, (B,); `nll + kl` estimates -ELBO, without free bits.
        kl_per_layer: KL(q(z_l | x, z_<l) || p(z_l | z_<l)), (L, B), in nats.
    """

    sample: torch.Tensor
    latent_dist: tuple[DiagonalGaussianDistribution, ...]
    prior_dist: tuple[DiagonalGaussianDistribution, ...]
    latents: tuple[torch.Tensor, ...]
    nll: torch.Tensor
    kl: torch.Tensor
    kl_per_layer: torch.Tensor


class HierarchicalVAEModel(ModelMixin, ConfigMixin):
    """A ladder variational autoencoder.

    Args:
        in_channels: C.
        sample_size: Of the images, (H, W) or one side of a square.
        latent_channels: C_l of each layer, from the top down.
        latent_levels: Resolution level of each layer, from the top down: the level i has H / 2^i pixels a side. The
            first is the last level, `len(block_out_channels) - 1`, and they never grow.
        block_out_channels: Channels of each resolution level.
        layers_per_block: Residual blocks per level of the encoder; the decoder has one more.
        norm_num_groups: Groups of the normalisation.
        mid_block_add_attention: Self-attention at the lowest resolution.
        flat_latent: Whether z_1 is a vector, kept as (C_1, 1, 1).
        likelihood: Law of the pixels, one of `annealers.models.pixel_likelihood.LIKELIHOODS`.
        num_levels: Number of values of a pixel.
        sigma, learn_sigma: Of the Gaussian likelihood.
        num_mixtures: Of the mixture of logistic laws.
        num_class_embeds: Number of classes of a conditional model.

    Raises:
        ValueError: If the layers do not fit the levels, the image does not fit the levels, or an option is unknown.

    Example:
        >>> from annealers import HierarchicalVAEModel
        >>> model = HierarchicalVAEModel(in_channels=1, sample_size=8, latent_channels=(16, 4), latent_levels=(1, 1),
        ...                              block_out_channels=(16, 32))
        >>> x = torch.where(torch.rand(5, 1, 8, 8) < 0.5, -1.0, 1.0)
        >>> model(x).kl_per_layer.shape
        torch.Size([2, 5])
        >>> model.generate(batch_size=3).shape
        torch.Size([3, 1, 8, 8])
    """

    __module__ = "annealers"  # its public name
    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules = ["pixel_likelihood"]  # log sigma counts once for every value of an image

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        sample_size: Size = 28,
        latent_channels: tuple[int, ...] = (32, 4, 4),
        latent_levels: tuple[int, ...] = (2, 2, 1),
        block_out_channels: tuple[int, ...] = (16, 32, 64),
        layers_per_block: int = 1,
        norm_num_groups: int = 8,
        mid_block_add_attention: bool = True,
        flat_latent: bool = True,
        likelihood: str = "bernoulli",
        num_levels: int = 256,
        sigma: float = 1.0,
        learn_sigma: bool = False,
        num_mixtures: int = 10,
        num_class_embeds: int | None = None,
    ) -> None:
        super().__init__()
        check_layers(latent_channels, latent_levels, len(block_out_channels))
        if num_class_embeds is not None and num_class_embeds < 1:
            raise ValueError(f"need num_class_embeds >= 1 or None, got {num_class_embeds}")
        self.pixel_likelihood = make_likelihood(likelihood, in_channels, num_levels, sigma, learn_sigma, num_mixtures)
        label_planes = 0 if num_class_embeds is None else block_out_channels[0]
        self.class_embedding = None if num_class_embeds is None else nn.Embedding(num_class_embeds, label_planes)
        shared = (
            sample_size,
            tuple(block_out_channels),
            layers_per_block,
            norm_num_groups,
            mid_block_add_attention,
            flat_latent,
        )
        self.encoder = ConvolutionalEncoder(in_channels + label_planes, 2 * latent_channels[0], *shared)
        self.decoder = ConvolutionalDecoder(
            latent_channels[0] + label_planes, self.pixel_likelihood.parameter_channels, *shared
        )
        self.layers = nn.ModuleList(
            LadderLayer(block_out_channels[level], channels, norm_num_groups, len(latent_channels) ** -0.5)
            for channels, level in zip(latent_channels[1:], latent_levels[1:], strict=True)
        )
        self.latent_shapes = latent_shapes(
            sample_size, latent_channels, latent_levels, block_out_channels, flat_latent
        )
        self.gradient_checkpointing = False

    @property
    def likelihood(self) -> PixelLikelihood:
        """p(x | lambda); the submodule has another name, since the config has one of this name."""
        return self.pixel_likelihood

    @property
    def noise_shape(self) -> tuple[int]:
        """(N,): how many latents an image has, over all layers."""
        return (sum(math.prod(shape) for shape in self.latent_shapes),)

    # ---- the way up and the way down --------------------------------------------------------------------------------

    def _run(self, module: nn.Module, *inputs: Any) -> Any:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(module, *inputs)
        return module(*inputs)

    @apply_forward_hook
    def go_up(
        self, x: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> tuple[DiagonalGaussianDistribution, list[torch.Tensor]]:
        """q(z_1 | x), and the features of each resolution level, (B, channels, H / 2^i, W / 2^i)."""
        self._check_images(x)
        trunk, features = self.encoder.trunk, []
        x = trunk.conv_in(self._with_class_planes(x, class_labels))
        for block in trunk.down_blocks:
            for resnet in block.resnets:
                x = self._run(resnet, x, None)
            features.append(x)
            for downsampler in block.downsamplers or ():
                x = downsampler(x)
        x = trunk.mid_block(x)
        x = trunk.conv_out(trunk.conv_act(trunk.conv_norm_out(x)))
        if self.encoder.to_flat is not None:
            x = self.encoder.to_flat(x.flatten(1))[:, :, None, None]
        return DiagonalGaussianDistribution(at_least_float32(x)), features

    @apply_forward_hook
    def go_down(
        self,
        noise: torch.Tensor,
        posterior: DiagonalGaussianDistribution | None = None,
        features: list[torch.Tensor] | None = None,
        class_labels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[DrawnLayer]]:
        """Draws the latents with given noise, from the posterior of an image, or from the prior.

        Args:
            noise: (B, N).
            posterior, features: Of `go_up`; neither for the prior.
            class_labels: y, (B,), of a model with classes.

        Returns:
            lambda, what the likelihood needs, (B, P, H, W), and the layers from the top down.

        Raises:
            ValueError: If shapes do not fit the model, or there is only one of posterior and features.
        """
        if (posterior is None) != (features is None):
            raise ValueError("need both the posterior and the features of go_up, or neither to draw from the prior")
        if noise.ndim != 2 or noise.shape[1:] != self.noise_shape:
            raise ValueError(f"noise must be (B, {self.noise_shape[0]}), got {tuple(noise.shape)}")
        parts = at_least_float32(noise).split([math.prod(shape) for shape in self.latent_shapes], dim=1)
        eps = [part.unflatten(1, shape) for part, shape in zip(parts, self.latent_shapes, strict=True)]
        if posterior is None:
            posterior = standard_normal_like(eps[0])
        z = posterior.mean + posterior.std * eps[0]
        drawn = [DrawnLayer(z, posterior, standard_normal_like(z))]

        state = self._with_class_planes(z, class_labels)
        if self.decoder.from_flat is not None:
            state = self.decoder.from_flat(state.flatten(1)).unflatten(1, self.decoder.feature_shape)
        trunk = self.decoder.trunk
        state = trunk.mid_block(trunk.conv_in(state))
        for level, block in zip(range(len(trunk.up_blocks) - 1, -1, -1), trunk.up_blocks, strict=True):
            for resnet in block.resnets:
                state = self._run(resnet, state, None)
            for layer, layer_level, layer_eps in zip(self.layers, self.config.latent_levels[1:], eps[1:], strict=True):
                if layer_level == level:
                    of_image = None if features is None else features[level]
                    state, z, q, p = self._run(layer, state, of_image, layer_eps)
                    drawn.append(DrawnLayer(z, DiagonalGaussianDistribution(q), DiagonalGaussianDistribution(p)))
            for upsampler in block.upsamplers or ():
                state = upsampler(state)
        return trunk.conv_out(trunk.conv_act(trunk.conv_norm_out(state))), drawn

    # ---- the bounds -------------------------------------------------------------------------------------------------

    def forward(
        self,
        sample: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        sample_posterior: bool = True,
        noise: torch.Tensor | None = None,
        generator: Generators | None = None,
        return_dict: bool = True,
    ) -> HierarchicalVAEOutput | tuple:
        """The terms of the bound at one z for each image.

        Args:
            sample: x in [-1, 1], (B, C, H, W).
            class_labels: y, (B,), of a model with classes.
            sample_posterior: Draw the latents; otherwise each is the mean of its posterior, and nll + kl is no bound.
            noise: (B, N); drawn if None.
            generator: What it is drawn with; a list gives each image its own.
            return_dict: Return a `HierarchicalVAEOutput` rather than a tuple.

        Raises:
            ValueError: If shapes do not fit the model or each other, or the likelihood does not allow a value.
        """
        posterior, features = self.go_up(sample, class_labels)
        if not sample_posterior:
            noise = torch.zeros(len(sample), *self.noise_shape, device=sample.device, dtype=posterior.mean.dtype)
        elif noise is None:
            noise = self._noise(len(sample), generator, posterior.mean.dtype)
        if len(noise) != len(sample):
            raise ValueError(f"need noise for each of {len(sample)} images, got {len(noise)}")
        parameters, drawn = self.go_down(noise, posterior, features, class_labels)
        with torch.autocast(sample.device.type, enabled=False):
            nll = -self.likelihood.log_prob(parameters, sample)
            first, *others = drawn
            kl_per_layer = torch.stack([first.posterior.kl(), *(one.posterior.kl(one.prior) for one in others)])
            mean = self.likelihood.mean(parameters)
        output = HierarchicalVAEOutput(
            sample=mean,
            latent_dist=tuple(one.posterior for one in drawn),
            prior_dist=tuple(one.prior for one in drawn),
            latents=tuple(one.latents for one in drawn),
            nll=nll,
            kl=kl_per_layer.sum(dim=0),
            kl_per_layer=kl_per_layer,
        )
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    @apply_forward_hook
    def log_prob(
        self,
        x: torch.Tensor,
        num_samples: int,
        chunk_size: int = 10,
        class_labels: torch.Tensor | None = None,
        generator: Generators | None = None,
    ) -> torch.Tensor:
        """The importance-weighted bound of log p(x) in nats, (B,), in at least float32; tighter the larger k is.

        log 1/k sum_{i=1}^k p(x | z^i) prod_l p(z_l^i | z_<l^i) / q(z_l^i | x, z_<l^i), all layers of z^i being drawn
        together: Burda et al. 2016, arXiv:1509.00519, Eq. 8.

        Args:
            x: Images in [-1, 1], (B, C, H, W).
            num_samples: k, for each image.
            chunk_size: How many of them are decoded at once; nothing but memory and time depends on it.
            class_labels: y, (B,), of a model with classes.
            generator: What the latents are drawn with; a list gives each image its own.

        Raises:
            ValueError: If a number is below one, or see `forward`.
        """
        posterior, features = self.go_up(x, class_labels)

        def log_weights(c: int) -> torch.Tensor:
            # One draw at a time: what they are does not depend on the size of the chunks.
            noise = torch.cat([self._noise(len(x), generator, posterior.mean.dtype) for _ in range(c)])
            parameters, drawn = self.go_down(
                noise,
                DiagonalGaussianDistribution(posterior.parameters.repeat(c, 1, 1, 1)),
                [of_level.repeat(c, 1, 1, 1) for of_level in features],
                None if class_labels is None else class_labels.repeat(c),
            )
            with torch.autocast(x.device.type, enabled=False):
                log_weight = self.likelihood.log_prob(parameters, x.repeat(c, 1, 1, 1))
                for one in drawn:
                    log_weight = log_weight + one.posterior.nll(one.latents) - one.prior.nll(one.latents)
            return log_weight.unflatten(0, (c, -1))

        return importance_weighted_bound(log_weights, num_samples, chunk_size)

    # ---- sampling ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    @apply_forward_hook
    def generate(
        self,
        batch_size: int,
        class_labels: torch.Tensor | None = None,
        generator: Generators | None = None,
        temperature: float = 1.0,
    ) -> torch.Tensor:
        """E[x | z] of latents from the prior, (B, C, H, W), in [-1, 1].

        Args:
            batch_size: B.
            class_labels: y, (B,), of a model with classes.
            generator: What the latents are drawn with; a list gives each image its own.
            temperature: Factor of the standard deviation of each layer's prior, 0 for its mean.

        Raises:
            ValueError: If the temperature is negative, or the labels do not fit.
        """
        if not temperature >= 0:
            raise ValueError(f"need temperature >= 0, got {temperature}")
        noise = self._noise(batch_size, generator, torch.promote_types(self.dtype, torch.float32))
        parameters, _ = self.go_down(temperature * noise, class_labels=class_labels)
        return self.likelihood.mean(parameters)

    # ---- noise, labels, shapes --------------------------------------------------------------------------------------

    def _noise(self, batch_size: int, generator: Generators | None, dtype: torch.dtype) -> torch.Tensor:
        return normal_numbers((batch_size, *self.noise_shape), generator, self.device, dtype)

    def _with_class_planes(self, x: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        # Only here does an image become one of half precision: the likelihood wants the values that it has.
        return with_class_planes(x.to(self.dtype), class_labels, self.class_embedding)

    def _check_images(self, x: torch.Tensor) -> None:
        config = self.config
        check_images(x, config.in_channels, config.sample_size, config.block_out_channels, only_this_size=True)


def free_bits(kl_per_layer: torch.Tensor, minimum: float) -> torch.Tensor:
    """sum_l max(lambda, KL_l) of each image, (L, B) -> (B,): below lambda nats, a layer's divergence costs no more.

    To be trained in the place of `kl`, and never to be reported. Kingma et al. 2016 compare the mean of KL_l
    over a minibatch with lambda. Here each image is compared by itself, so that neither the size of a minibatch nor
    how it is split over processes changes the loss.

    Raises:
        ValueError: If lambda is negative.
    """
    if not minimum >= 0:
        raise ValueError(f"need free bits >= 0 nats per layer, got {minimum}")
    return kl_per_layer.clamp(min=minimum).sum(dim=0)


def standard_normal_like(z: torch.Tensor) -> DiagonalGaussianDistribution:
    return DiagonalGaussianDistribution(torch.zeros_like(z).repeat(1, 2, 1, 1))


def residual_block(in_channels: int, out_channels: int, norm_num_groups: int) -> ResnetBlock2D:
    """As those of the encoder and the decoder."""
    return ResnetBlock2D(
        in_channels=in_channels, out_channels=out_channels, temb_channels=None, groups=norm_num_groups, eps=1e-6
    )


def head(in_channels: int, out_channels: int, norm_num_groups: int) -> nn.Sequential:
    norm = nn.GroupNorm(norm_num_groups, in_channels, eps=1e-6)
    return nn.Sequential(norm, nn.SiLU(), nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1))


def latent_shapes(
    sample_size: Size,
    latent_channels: tuple[int, ...],
    latent_levels: tuple[int, ...],
    block_out_channels: tuple[int, ...],
    flat_latent: bool,
) -> list[tuple[int, int, int]]:
    """(C_l, h_l, w_l) of each layer, from the top down."""
    shapes = [
        (channels, *feature_size(sample_size, block_out_channels[: level + 1]))
        for channels, level in zip(latent_channels, latent_levels, strict=True)
    ]
    return [(latent_channels[0], 1, 1), *shapes[1:]] if flat_latent else shapes


def check_layers(latent_channels: tuple[int, ...], latent_levels: tuple[int, ...], num_levels: int) -> None:
    if len(latent_channels) != len(latent_levels) or min(latent_channels, default=0) < 1:
        raise ValueError(
            "need latent_channels >= 1 and one of latent_levels for each of them, at least one, got "
            f"{tuple(latent_channels)} and {tuple(latent_levels)}"
        )
    downwards = sorted(latent_levels, reverse=True)
    if latent_levels[0] != num_levels - 1 or list(latent_levels) != downwards or latent_levels[-1] < 0:
        raise ValueError(
            f"latent_levels must begin with the last of {num_levels} levels, {num_levels - 1}, and go down to no less "
            f"than 0, got {tuple(latent_levels)}"
        )
