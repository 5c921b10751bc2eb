r"""Restoration of bad images by looking up the codes of good ones: a VQ-VAE, a second encoder, and a transformer.

    Z_l = E_L(x_l)                                              features of a bad image
    s_hat = argmax T(Z_l)                                       their codes, by a transformer that sees all of them
    x_hat = D(Z_hat),  Z_hat = (e_{s_hat_i})_i                  the decoder of good images

Looking for the nearest vector of the codebook, as a VQ-VAE does, is unreliable for a bad image, since its features
have moved away; so a transformer predicts the codes s that the good image x_h has. Between the layers of the decoder,
whatever is to be faithful to x_l comes back in, as much as w in [0, 1] says:

    F_d <- F_d + w (alpha * F_d + beta),    alpha, beta = P_theta(F_e, F_d)                     Sec. 3.3

with F_e and F_d the features of E_L and D at the same resolution. The decoder, the codebook and the encoder of x_h are
a trained `VQVAEModel` and stay as they are. The losses, for each image:

    token      -log p(s | x_l), mean over the positions, by the logits of T                     Sec. 3.2
    distance   ||Z_l - sg(Z_c)||^2, mean over the positions, Z_c = (e_{s_i})_i                  Sec. 3.2

Stage II of the paper trains E_L and T with lambda token + distance, lambda = 0.5. Stage III adds losses of x_hat at
w = 1, for P_theta. Codes are chosen by an argmax and F_e is detached here, so that these losses reach P_theta and
nothing else: E_L and T learn in stage III exactly what they learn in stage II, whether or not there was one before.

The last layers of alpha and beta begin at zero, so that an untrained P_theta changes nothing.

Source: Zhou, Chan, Li, Loy 2022, "Towards Robust Blind Face Restoration with Codebook Lookup Transformer",
arXiv:2206.11253, Sec. 3. Written from the paper. How bad images are made of good ones for training is in
`annealers.image_degradations`.

    symbol    code               shape               meaning
    x_l       sample             (B, C, H, W)        bad image in [-1, 1]
    x_h       target             (B, C, H, W)        the good one that it was made of
    Z_l       latents            (B, D, h, w)        features of x_l
    s         codes              (B, h, w)           0 .. K - 1, of x_h
    s_hat     indices            (B, h, w)           predicted codes
    w         fidelity_weight    ()                  0: codes alone; 1: as much of x_l as P_theta lets in
    F_e       features           (B, C_j, H_j, W_j)  of each level j, 0 being that of the image
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.resnet import ResnetBlock2D
from diffusers.utils import BaseOutput
from torch import nn
from torch.nn.functional import cross_entropy

from annealers.models.code_transformer import CodeTransformerModel
from annealers.models.vqvae import VQVAEModel

RESIDUAL_BLOCKS = {"DownEncoderBlock2D", "UpDecoderBlock2D"}  # the default ones


@dataclass
class CodeFormerOutput(BaseOutput):
    """What the restorer returns.

    Args:
        sample: x_hat, (B, C, H, W) in [-1, 1], where the mean of a Gaussian may lie beyond; None if no fidelity
            weight was given.
        indices: s_hat, (B, h, w).
        logits: log p(s | x_l) up to a constant of each position, (B, K, h, w).
        token: Cross-entropy of the codes, nats, (B,), in float32 at least; None without a target, as what follows.
        distance: ||Z_l - Z_c||^2, averaged over positions, (B,), in float32 at least.
        accuracy: Share of the codes that are right, (B,).
        nearest_accuracy: The same of the vectors of the codebook that are nearest to Z_l, (B,).
    """

    sample: torch.Tensor | None
    indices: torch.Tensor
    logits: torch.Tensor
    token: torch.Tensor | None = None
    distance: torch.Tensor | None = None
    accuracy: torch.Tensor | None = None
    nearest_accuracy: torch.Tensor | None = None


class CodeFormerModel(ModelMixin, ConfigMixin):
    """Restores images by the codes of a VQ-VAE.

    Args:
        vqvae_config: Config of the `VQVAEModel`, which becomes a part of this model; None for its defaults. See
            `load_vqvae` for its weights.
        hidden_size: Channels of the transformer.
        num_layers: Its layers.
        num_heads: Its attention heads.
        mlp_ratio: Channels of its hidden layers, in units of `hidden_size`.
        dropout: Dropout of the transformer.
        fusion_levels: Resolution levels of the decoder where features of the encoder come in, 0 being that of the
            image; None for all but the coarsest, which is that of the codes, or for that one if there is no other.

    Raises:
        ValueError: If a fusion level is none of the decoder, or the VQ-VAE has blocks with attention (other than in
            the middle) or spatial normalisation.

    Example:
        >>> from annealers import CodeFormerModel, VQVAEModel
        >>> vqvae = VQVAEModel(in_channels=1, sample_size=8, num_vq_embeddings=16, block_out_channels=(8, 16))
        >>> model = CodeFormerModel(vqvae_config=vqvae.config, hidden_size=16, num_layers=1, num_heads=2)
        >>> model.load_vqvae(vqvae)
        >>> bad, good = torch.zeros(3, 1, 8, 8), torch.zeros(3, 1, 8, 8)
        >>> output = model(bad, good, fidelity_weight=0.5)
        >>> output.sample.shape, output.token.shape
        (torch.Size([3, 1, 8, 8]), torch.Size([3]))
    """

    __module__ = "annealers"  # its public name
    _keep_in_fp32_modules = ["quantize"]  # noqa: RUF012 (Diffusers asks for a list)
    _skip_layerwise_casting_patterns = ["row_embedding", "column_embedding"]  # noqa: RUF012 (as CodeTransformerModel)

    @register_to_config
    def __init__(
        self,
        vqvae_config: dict[str, Any] | None = None,
        hidden_size: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        fusion_levels: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        settings = _without_private(vqvae_config or {})
        self.register_to_config(vqvae_config=settings)
        self.vqvae = VQVAEModel(**settings)
        self.encoder = deepcopy(self.vqvae.encoder)  # E_L
        self.quant_conv = deepcopy(self.vqvae.quant_conv)
        self.vqvae.requires_grad_(False)
        vqvae = self.vqvae.config
        self.transformer = CodeTransformerModel(
            num_embeddings=vqvae.num_vq_embeddings,
            sample_size=self.vqvae.latent_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            dropout=dropout,
            causal=False,
            feature_channels=self.quant_conv.out_channels,
        )
        blocks = {*(vqvae.down_block_types or ()), *(vqvae.up_block_types or ())}
        if not blocks <= RESIDUAL_BLOCKS or vqvae.norm_type != "group":
            raise ValueError(
                "features are exchanged between residual blocks alone: need a VQ-VAE with the default block types and "
                f"norm_type='group', got {vqvae.down_block_types}, {vqvae.up_block_types} and {vqvae.norm_type!r}"
            )
        levels = len(vqvae.block_out_channels)
        if fusion_levels is None:
            fusion_levels = tuple(range(max(1, levels - 1)))
        if not fusion_levels or not all(0 <= level < levels for level in fusion_levels):
            raise ValueError(f"fusion_levels must be one or several of 0 .. {levels - 1}, got {fusion_levels}")
        self.fusions = nn.ModuleDict(
            {
                str(level): FeatureTransformation(vqvae.block_out_channels[level], vqvae.norm_num_groups)
                for level in fusion_levels
            }
        )

    @property
    def in_channels(self) -> int:
        """C."""
        return self.vqvae.config.in_channels

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images, of which there is one size, since each place of the codes has its position learnt."""
        size = self.vqvae.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height, width

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight nearest to the image that the losses of x_hat reach; to weigh them against each other."""
        finest = min(self.fusions, key=int)
        return self.fusions[finest].shift[-1].weight

    def load_vqvae(self, vqvae: VQVAEModel) -> None:
        """Copies the weights of a VQ-VAE of the same config, and begins E_L as its encoder.

        Raises:
            ValueError: If its config is another.
        """
        theirs = _without_private(vqvae.config)
        if theirs != _without_private(self.vqvae.config):
            raise ValueError(f"the VQ-VAE has the config {theirs}, this model was made for {dict(self.vqvae.config)}")
        self.vqvae.load_state_dict(vqvae.state_dict())
        self.encoder.load_state_dict(vqvae.encoder.state_dict())
        self.quant_conv.load_state_dict(vqvae.quant_conv.state_dict())

    def train(self, mode: bool = True) -> CodeFormerModel:
        """As of every module, but the VQ-VAE stays in evaluation mode: no dropout, no statistics of its codebook."""
        super().train(mode)
        self.vqvae.eval()
        return self

    # ---- the parts --------------------------------------------------------------------------------------------------

    def encode(self, sample: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Z_l, (B, D, h, w), and F_e of each level, those of the image's resolution first.

        Raises:
            ValueError: If the shape is none of an image of this model.
        """
        self._check_images(sample, "sample")
        features = []
        h = self.encoder.conv_in(sample)
        for block in self.encoder.down_blocks:
            for resnet in block.resnets:
                h = resnet(h, temb=None)
            features.append(h)
            for downsampler in block.downsamplers or ():
                h = downsampler(h)
        h = self.encoder.mid_block(h)
        h = self.encoder.conv_out(self.encoder.conv_act(self.encoder.conv_norm_out(h)))
        return self.quant_conv(h), features

    def decode(self, indices: torch.Tensor, features: list[torch.Tensor], fidelity_weight: float) -> torch.Tensor:
        """x_hat of codes (B, h, w), with what F_e adds to them at each level; (B, C, H, W).

        With w = 0 it is `vqvae.decode_indices`, bit for bit. F_e is detached.

        Raises:
            ValueError: If the weight is outside [0, 1].
        """
        if not 0 <= fidelity_weight <= 1:
            raise ValueError(f"fidelity_weight must lie in [0, 1], got {fidelity_weight}")
        decoder = self.vqvae.decoder
        h = self.vqvae.post_quant_conv(self.vqvae.quantize.lookup(indices).to(self.dtype))
        h = decoder.mid_block(decoder.conv_in(h))
        for level, block in zip(reversed(range(len(decoder.up_blocks))), decoder.up_blocks, strict=True):
            for resnet in block.resnets:
                h = resnet(h, temb=None)
            if fidelity_weight > 0 and str(level) in self.fusions:
                h = self.fusions[str(level)](h, features[level].detach(), fidelity_weight)
            for upsampler in block.upsamplers or ():
                h = upsampler(h)
        parameters = decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(h)))
        return self.vqvae.likelihood.mean(parameters)

    @torch.no_grad()
    def codes(self, target: torch.Tensor) -> torch.Tensor:
        """s of good images (B, C, H, W), by the VQ-VAE: (B, h, w); under autocast in the precision of its weights."""
        self._check_images(target, "target")
        with torch.autocast(target.device.type, enabled=False):
            return self.vqvae.encode(target.to(self.dtype)).indices

    # ---- training and use -------------------------------------------------------------------------------------------

    def forward(
        self,
        sample: torch.Tensor,
        target: torch.Tensor | None = None,
        fidelity_weight: float | None = 0.5,
        return_dict: bool = True,
    ) -> CodeFormerOutput | tuple:
        """Predicts the codes, decodes them and, with a target, compares.

        Args:
            sample: x_l, (B, C, H, W).
            target: x_h, (B, C, H, W), of which the codes are those to be predicted; None outside of training.
            fidelity_weight: w in [0, 1]; None leaves the image out, which stage II does without.
            return_dict: Return a `CodeFormerOutput` rather than a tuple.

        Raises:
            ValueError: If the shapes do not fit the model or each other, or w is outside [0, 1].
        """
        if target is not None and target.shape != sample.shape:
            raise ValueError(
                f"the target must have the shape of the sample, {tuple(sample.shape)}, got {tuple(target.shape)}"
            )
        latents, features = self.encode(sample)
        logits = self.transformer.forward_features(latents)
        indices = logits.argmax(dim=1)
        restored = None if fidelity_weight is None else self.decode(indices, features, fidelity_weight)
        terms = {} if target is None else self._compared(latents, logits, self.codes(target))
        output = CodeFormerOutput(sample=restored, indices=indices, logits=logits, **terms)
        return output if return_dict else output.to_tuple()

    def _compared(self, latents: torch.Tensor, logits: torch.Tensor, codes: torch.Tensor) -> dict[str, torch.Tensor]:
        """The terms of an output that need the codes s, (B,) each."""
        nearest = self.vqvae.quantize.indices(latents.detach())
        with torch.autocast(latents.device.type, enabled=False):
            away = latents - self.vqvae.quantize.lookup(codes)  # of vectors that are never in half precision
            token = cross_entropy(logits, codes, reduction="none")  # (B, h, w)
        return {
            "token": token.flatten(1).mean(dim=1),
            "distance": (away**2).sum(dim=1).flatten(1).mean(dim=1),
            "accuracy": (logits.argmax(dim=1) == codes).float().flatten(1).mean(dim=1),
            "nearest_accuracy": (nearest == codes).float().flatten(1).mean(dim=1),
        }

    def _check_images(self, images: torch.Tensor, name: str) -> None:
        expected = (self.in_channels, *self.image_size)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(f"{name} must be (B, {', '.join(map(str, expected))}), got {tuple(images.shape)}")


class FeatureTransformation(nn.Module):
    """Controllable feature transformation: F_d + w (alpha * F_d + beta), alpha, beta = P_theta(F_e, F_d).

    Args:
        channels: Of F_e and of F_d.
        norm_num_groups: Groups of the normalisation.
    """

    def __init__(self, channels: int, norm_num_groups: int) -> None:
        super().__init__()
        self.joint = ResnetBlock2D(
            in_channels=2 * channels, out_channels=channels, temb_channels=None, groups=norm_num_groups, eps=1e-6
        )
        self.scale = _head(channels)
        self.shift = _head(channels)

    def forward(
        self, decoder_features: torch.Tensor, encoder_features: torch.Tensor, fidelity_weight: float
    ) -> torch.Tensor:
        joint = self.joint(torch.cat([encoder_features, decoder_features], dim=1), temb=None)
        alpha, beta = self.scale(joint), self.shift(joint)
        return decoder_features + fidelity_weight * (alpha * decoder_features + beta)


def _head(channels: int) -> nn.Sequential:
    """Two convolutions, of which the last one begins at zero."""
    last = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Conv2d(channels, channels, kernel_size=3, padding=1), nn.SiLU(), last)


def _without_private(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a model, without what Diffusers adds to its config: class, version, origin."""
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
