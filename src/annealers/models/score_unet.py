r"""Score networks of a variance-exploding ladder, y = x_0 + s eps, in the coordinates of this library.

Such a network is fed the unscaled y and the level s, and returns the score of y,

    score(y, s) = grad log p_s(y) = -E[eps | y] / s.

The schedulers here keep the ladder s_t = sigma_min (sigma_max / sigma_min)^(t / (T - 1)) in variance-preserving
coordinates x_t = y / sqrt(1 + s_t^2) and call a network as (x_t, t). `ScoreUNetModel` stands in between:

    y = sqrt(1 + s_t^2) x_t,        eps-hat = -s_t score(y, s_t).

Inside is a `UNet2DModel` with Fourier features of log s, whose output Diffusers divides by s, so that what its layers
compute is -eps-hat, of the same size at all levels (Song & Ermon 2020, Technique 3; Song et al. 2021, App. C.2).

Published networks were trained on pixels in [0, 1]. With data_range="zero_to_one" the network inside sees
y' = (y + 1) / 2 and s' = s / 2; eps is the same. `sigma_min` and `sigma_max` are always in units of [-1, 1], so they
are twice the published ones.

    symbol     code         shape           meaning
    x_t        sample       (B, C, H, W)    state, in variance-preserving coordinates
    t          timestep     (), (B,)        train timestep, 0 .. T - 1, may be fractional
    s_t        levels       (B, 1, 1, 1)    standard deviation of the noise, in units of the data
    eps-hat                 (B, C, H, W)    output

Sources: Song & Ermon 2020, "Improved Techniques for Training Score-Based Generative Models", arXiv:2006.09011; Song,
Sohl-Dickstein, Kingma, Kumar, Ermon, Poole 2021, "Score-Based Generative Modeling through Stochastic Differential
Equations", arXiv:2011.13456.
"""

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput

DATA_RANGES = ("minus_one_to_one", "zero_to_one")
READ_BY_PIPELINES = ("sample_size", "in_channels", "out_channels", "num_class_embeds")  # off the config of a network


class ScoreUNetModel(ModelMixin, ConfigMixin):
    """A noise-prediction network made of a `UNet2DModel` that returns the score of y = x_0 + s eps.

    It takes the place of any network that predicts noise on the geometric ladder of the same `sigma_min`, `sigma_max`
    and `num_train_timesteps`. Its `config` also shows `sample_size`, `in_channels`, `out_channels` and
    `num_class_embeds` of the UNet, which pipelines ask a network for.

    Args:
        unet: Config of the `UNet2DModel`, with time_embedding_type="fourier".
        sigma_min, sigma_max: Ends of the ladder, in units of data in [-1, 1].
        num_train_timesteps: T, levels of the ladder.
        data_range: "minus_one_to_one" or "zero_to_one": the range of the data that the UNet itself is fed.

    Raises:
        ValueError: If the ladder is none, the data range is unknown, or the UNet does not return one score per value.

    Example:
        >>> model = ScoreUNetModel(
        ...     unet=dict(sample_size=8, in_channels=1, out_channels=1, time_embedding_type="fourier",
        ...               block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)),
        ...     sigma_min=0.01, sigma_max=50.0)
        >>> model(torch.zeros(2, 1, 8, 8), timestep=999).sample.shape
        torch.Size([2, 1, 8, 8])
    """

    __module__ = "annealers"  # the name that model_index.json records

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        unet: dict[str, Any],
        sigma_min: float,
        sigma_max: float,
        num_train_timesteps: int = 1000,
        data_range: str = "minus_one_to_one",
    ) -> None:
        super().__init__()
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
        if (
            isinstance(num_train_timesteps, bool)
            or not isinstance(num_train_timesteps, int)
            or num_train_timesteps < 1
        ):
            raise ValueError(f"num_train_timesteps must be a positive integer, got {num_train_timesteps!r}")
        if data_range not in DATA_RANGES:
            raise ValueError(f"data_range must be one of {DATA_RANGES}, got {data_range!r}")
        # not self.unet: Diffusers would look the name up among the settings, where it is this dict
        self.network: Any = UNet2DModel.from_config(unet)
        inside = self.network.config
        if inside.time_embedding_type != "fourier":
            raise ValueError(
                "a score network is told the level s by time_embedding_type='fourier', got "
                f"{inside.time_embedding_type!r}; a network that is told the timestep needs no ScoreUNetModel"
            )
        if inside.out_channels != inside.in_channels:
            raise ValueError(
                f"a score has as many channels as the data, got out_channels={inside.out_channels} and "
                f"in_channels={inside.in_channels}"
            )

    @classmethod
    def from_unet(
        cls,
        unet: UNet2DModel,
        sigma_min: float,
        sigma_max: float,
        num_train_timesteps: int = 1000,
        data_range: str = "minus_one_to_one",
    ) -> "ScoreUNetModel":
        """Wraps a score network, which is shared and not copied; the arguments are those of the class."""
        settings = {name: value for name, value in unet.config.items() if not name.startswith("_")}
        with torch.device("meta"):  # weights of its own are not needed
            model = cls(settings, sigma_min, sigma_max, num_train_timesteps, data_range)
        model.network = unet
        return model.train(unet.training)

    # ---- config -----------------------------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        """The settings of the class, and those of the UNet that pipelines read off a network."""
        return FrozenDict({**self._internal_dict, **{name: self.network.config[name] for name in READ_BY_PIPELINES}})

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """As in Diffusers, for a config that comes from `config` too."""
        other = (*READ_BY_PIPELINES, "_use_default_values")
        own = {name: value for name, value in config_dict.items() if name not in other}
        return super().extract_init_dict(own, **kwargs)

    # ---- from the timestep to the level, and from the score to the noise --------------------------------------------

    def noise_levels(self, timestep: int | float | torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """s_t in units of data in [-1, 1], of the shape and on the device of `timestep`.

        Raises:
            ValueError: For a timestep off the ladder, where that can be read without waiting for a device.
        """
        config, t = self.config, torch.as_tensor(timestep)
        last = config.num_train_timesteps - 1
        if t.device.type == "cpu" and t.numel() > 0 and not 0 <= t.min().item() <= t.max().item() <= last:
            raise ValueError(f"timesteps must lie in 0 .. {last}, got {t.min().item()} .. {t.max().item()}")
        return config.sigma_min * (config.sigma_max / config.sigma_min) ** (t.to(dtype) / max(last, 1))

    def forward(
        self,
        sample: torch.Tensor,
        timestep: int | float | torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Predicts the noise in `sample`.

        y and the score, which are large at the ends of the ladder, are computed in float32 at least, and the UNet in
        its own precision.

        Args:
            sample: x_t, (B, C, H, W).
            timestep: t, a number, () or (B,).
            class_labels: Class ids, (B,), of a UNet that has classes.
            return_dict: Whether to return a `UNet2DOutput` rather than a tuple.

        Returns:
            eps-hat, (B, C, H, W), in the dtype of `sample`.

        Raises:
            ValueError: For timesteps that are off the ladder, or neither one nor one per sample.
        """
        dtype = torch.promote_types(sample.dtype, torch.float32)
        levels = self.noise_levels(timestep, dtype).to(sample.device).reshape(-1)
        if len(levels) not in (1, len(sample)):
            raise ValueError(f"need one timestep or one per sample, {len(sample)}, got {len(levels)}")
        levels = levels.expand(len(sample)).reshape(-1, 1, 1, 1)
        y = (1 + levels**2).sqrt() * sample.to(dtype)
        if self.config.data_range == "zero_to_one":
            y, levels = (y + 1) / 2, levels / 2
        score = self.network(y.to(self.network.dtype), levels.flatten(), class_labels, return_dict=False)[0]
        noise = (-levels * score).to(sample.dtype)
        return UNet2DOutput(noise) if return_dict else (noise,)
