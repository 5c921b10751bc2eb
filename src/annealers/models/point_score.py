r"""A small network for points of the plane and other small events: what the theory of score matching is tried on.

A point is an image of one pixel, (B, 2, 1, 1), so every scheduler and pipeline takes it. The prediction is

    eps-hat = g(t) x_t + F(x_t, t),

F a residual network whose layers are scaled and shifted by an embedding of t, and g a number that depends on t alone
(and on the class). For Gaussian data of mean 0 and variance v the exact prediction is sigma_t / (alpha_t^2 v +
sigma_t^2) x_t, and that of any data comes to x_t at high noise: g has the easy part, and F what is left. The last
layers of F and g start at zero, and so eps-hat does.

    symbol    code       shape      meaning
    x_t       points     (B, D)     state, the event as one vector
    t         timestep   (), (B,)   train timestep, embedded as sinusoids of 1000 t / T
    F                    (B, D)     residual network

Sources: Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762, Sec. 3.5 (sinusoids); Perez et al. 2018,
"FiLM: Visual Reasoning with a General Conditioning Layer", arXiv:1709.07871 (scale and shift); Karras et al. 2022,
"Elucidating the Design Space of Diffusion-Based Generative Models", arXiv:2206.00364, Sec. 5 (linear part).
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

EMBEDDED_RANGE = 1000.0  # of the sinusoids, in which t / T is counted


class PointScoreModel(ModelMixin, ConfigMixin):
    """A noise-prediction network for small events, a residual perceptron.

    Args:
        in_channels, sample_size: Events have the shape (in_channels, sample_size, sample_size).
        hidden: Width of the layers, an even number.
        layers: Residual blocks.
        num_train_timesteps: T of the path that the network is trained on.
        num_class_embeds: Number of class ids, the null class among them; None for an unconditional network.

    Raises:
        ValueError: If a size is not a positive integer, or `hidden` is odd.

    Example:
        >>> model = PointScoreModel(hidden=32, layers=2)
        >>> model(torch.randn(5, 2, 1, 1), timestep=10).sample.shape
        torch.Size([5, 2, 1, 1])
    """

    __module__ = "annealers"  # the name that model_index.json records

    @register_to_config
    def __init__(
        self,
        in_channels: int = 2,
        sample_size: int = 1,
        hidden: int = 128,
        layers: int = 4,
        num_train_timesteps: int = 1000,
        num_class_embeds: int | None = None,
    ) -> None:
        super().__init__()
        sizes = {"in_channels": in_channels, "sample_size": sample_size, "hidden": hidden, "layers": layers}
        sizes["num_train_timesteps"] = num_train_timesteps
        if num_class_embeds is not None:
            sizes["num_class_embeds"] = num_class_embeds
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if hidden % 2:
            raise ValueError(f"hidden must be even, half sines and half cosines, got {hidden}")
        size = in_channels * sample_size**2
        self.time_proj = Timesteps(hidden, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(hidden, hidden)
        self.class_embedding = None if num_class_embeds is None else nn.Embedding(num_class_embeds, hidden)
        self.gate = _zeroed(nn.Linear(hidden, 1))
        self.layer_in = nn.Linear(size, hidden)
        self.blocks = nn.ModuleList(ModulatedBlock(hidden) for _ in range(layers))
        self.layer_out = _zeroed(nn.Linear(hidden, size))

    def forward(
        self,
        sample: torch.Tensor,
        timestep: int | float | torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Predicts the noise in `sample`.

        Args:
            sample: x_t, (B, C, H, W), of the event that the network is for.
            timestep: t, a number, () or (B,); may be fractional.
            class_labels: Class ids, (B,), for a network that has classes.
            return_dict: Whether to return a `UNet2DOutput` rather than a tuple.

        Returns:
            eps-hat, (B, C, H, W).

        Raises:
            ValueError: For another event, timesteps that are neither one nor one per sample, or labels that
                are missing or have no use.
        """
        config = self.config
        event = (config.in_channels, config.sample_size, config.sample_size)
        if tuple(sample.shape[1:]) != event:
            raise ValueError(f"sample must have shape (B, {', '.join(map(str, event))}), got {tuple(sample.shape)}")
        if (class_labels is None) != (self.class_embedding is None):
            raise ValueError(f"num_class_embeds={config.num_class_embeds}, but class_labels={class_labels}")
        embedding = self._embedded(timestep, sample)  # (B, hidden)
        if self.class_embedding is not None:
            embedding = embedding + self.class_embedding(class_labels)
        points = sample.flatten(1)  # (B, D)
        hidden = self.layer_in(points)
        for block in self.blocks:
            hidden = block(hidden, embedding)
        noise = self.gate(nn.functional.silu(embedding)) * points + self.layer_out(nn.functional.silu(hidden))
        noise = noise.reshape(sample.shape)
        return UNet2DOutput(noise) if return_dict else (noise,)

    def _embedded(self, timestep: int | float | torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        t = torch.as_tensor(timestep).to(sample.device, torch.float32).reshape(-1)
        if len(t) not in (1, len(sample)):
            raise ValueError(f"need one timestep or one per sample, {len(sample)}, got {len(t)}")
        sinusoids = self.time_proj(t.expand(len(sample)) * (EMBEDDED_RANGE / self.config.num_train_timesteps))
        return self.time_embedding(sinusoids.to(sample.dtype))


class ModulatedBlock(nn.Module):
    """h + W_2 silu((1 + scale) W_1 silu(h) + shift), scale and shift from the embedding of the level."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layer_1 = nn.Linear(hidden, hidden)
        self.layer_2 = nn.Linear(hidden, hidden)
        self.modulation = nn.Linear(hidden, 2 * hidden)

    def forward(self, hidden: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        scale, shift = self.modulation(nn.functional.silu(embedding)).chunk(2, dim=1)  # (B, hidden) each
        inner = (1 + scale) * self.layer_1(nn.functional.silu(hidden)) + shift
        return hidden + self.layer_2(nn.functional.silu(inner))


def _zeroed(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
