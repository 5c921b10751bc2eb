r"""Laws p(x | lambda) of an image, given the output lambda of a decoder.

    bernoulli                   x in {-1, 1}, P(x = 1) = sigmoid(l)
    gaussian                    x ~ N(m, sigma^2), one sigma for all values, fixed or learnt; a density, see below
    discretized_logistic        P(x = k) = F((x_k - m + h) / s) - F((x_k - m - h) / s), with F the logistic function;
                                the outer two values reach to infinity
    discretized_mix_logistic    a mixture of M of these for each pixel, whose means depend on the channels before:
                                m_c(x) = m_c + sum_{b < c} a_{cb} x_b                       Salimans et al. 2017, Eq. 3

Images lie in [-1, 1]; those with `num_levels` = 256 values have the values x_k = 2 k / 255 - 1, of which each owns an
interval of half-width h = 1 / 255. Log-likelihoods are sums over all values of an image, in nats.

A density is no probability. Of y = x + u, u uniform on (-h, h), with the density p, the image has the probability

    -log P(x) <= E_u[-log p(x + u)] + D log(1 / (2 h))                                     Theis et al. 2016, Eq. 4

D being the number of its values; `nats_per_value` is log(1 / (2 h)) for the Gaussian and 0 for the others.

Sources: Kingma & Welling 2014, "Auto-Encoding Variational Bayes", arXiv:1312.6114, App. C (Bernoulli, Gaussian);
Salimans, Karpathy, Chen & Kingma 2017, "PixelCNN++", arXiv:1701.05517, Sec. 2.1-2.2 (logistic laws); Theis, van den
Oord & Bethge 2016, "A note on the evaluation of generative models", arXiv:1511.01844, Sec. 3.1.

    symbol    code             shape                    meaning
    x         sample           (B, C, H, W)             image in [-1, 1]
    lambda    parameters       (B, P, H, W)             what the decoder says of it, P = `parameter_channels`
    m, s      mean, scale      (B, [M,] C, H, W)        of each component
    a         coefficients     (B, M, C, C, H, W)       strictly lower triangular
"""

import math
from abc import ABC, abstractmethod

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from torch.nn.functional import logsigmoid, one_hot, softplus

Generators = torch.Generator | list[torch.Generator]

LIKELIHOODS = ("bernoulli", "gaussian", "discretized_logistic", "discretized_mix_logistic")
SMALLEST_LOG_SCALE = -7.0  # Salimans et al. 2017, their code; a scale of 1e-3, an eighth of the width of a value


class PixelLikelihood(nn.Module, ABC):
    """The law of an image, given parameters at each pixel.

    Args:
        channels: C, of the images.
        num_levels: Number of values on the grid from -1 to 1 that the images are made of.
    """

    def __init__(self, channels: int, num_levels: int = 256) -> None:
        super().__init__()
        if channels < 1 or num_levels < 2:
            raise ValueError(f"need channels >= 1 and num_levels >= 2, got {channels} and {num_levels}")
        self.channels, self.num_levels = channels, num_levels

    @property
    @abstractmethod
    def parameter_channels(self) -> int:
        """P, the channels that the decoder has to give."""

    @property
    def nats_per_value(self) -> float:
        """What is added to the negative log-likelihood for each value, to make it one of images of `num_levels`."""
        return 0.0

    def log_prob(self, parameters: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """log p(x | lambda) in nats, (B, P, H, W) and (B, C, H, W) -> (B,), in at least float32.

        Raises:
            ValueError: If the shapes do not fit, or the law does not allow a value.
        """
        batch, _, height, width = parameters.shape
        if parameters.shape[1] != self.parameter_channels or sample.shape != (batch, self.channels, height, width):
            raise ValueError(
                f"need parameters (B, {self.parameter_channels}, H, W) and a sample (B, {self.channels}, H, W), got "
                f"{tuple(parameters.shape)} and {tuple(sample.shape)}"
            )
        return self.log_prob_of_values(at_least_float32(parameters), at_least_float32(sample)).flatten(1).sum(dim=1)

    @abstractmethod
    def log_prob_of_values(self, parameters: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The terms of `log_prob`, one for each value or pixel, (B, *)."""

    @abstractmethod
    def mean(self, parameters: torch.Tensor) -> torch.Tensor:
        """E[x | lambda], (B, C, H, W), inside [-1, 1] for a law of values there."""

    @abstractmethod
    def draw(self, parameters: torch.Tensor, generator: Generators | None = None) -> torch.Tensor:
        """x ~ p(x | lambda), (B, C, H, W); a list of generators gives each image its own."""


class BernoulliLikelihood(PixelLikelihood):
    """Black or white: -1 or 1."""

    @property
    def parameter_channels(self) -> int:
        return self.channels

    def log_prob_of_values(self, parameters: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            check_binary(sample)
        return -softplus(-sample * parameters)  # log sigmoid(+-l)

    def mean(self, parameters: torch.Tensor) -> torch.Tensor:
        return 2 * parameters.sigmoid() - 1

    def draw(self, parameters: torch.Tensor, generator: Generators | None = None) -> torch.Tensor:
        u = uniform_like(parameters, generator)
        return 2 * (u < at_least_float32(parameters).sigmoid()).to(parameters.dtype) - 1


class GaussianLikelihood(PixelLikelihood):
    """A normal law with one standard deviation for all values.

    Args:
        channels, num_levels: As above.
        sigma: The standard deviation, or that at first, in the units of images in [-1, 1].
        learn_sigma: Whether log sigma is a parameter.
    """

    def __init__(self, channels: int, num_levels: int = 256, sigma: float = 1.0, learn_sigma: bool = False) -> None:
        super().__init__(channels, num_levels)
        if not sigma > 0:
            raise ValueError(f"need sigma > 0, got {sigma}")
        log_sigma = torch.tensor(math.log(sigma))
        if learn_sigma:
            self.log_sigma = nn.Parameter(log_sigma)
        else:
            self.register_buffer("log_sigma", log_sigma)

    @property
    def parameter_channels(self) -> int:
        return self.channels

    @property
    def nats_per_value(self) -> float:
        return math.log((self.num_levels - 1) / 2)

    def log_prob_of_values(self, parameters: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        log_sigma = self.log_sigma.to(parameters.dtype)
        z = (sample - parameters) * (-log_sigma).exp()
        return -0.5 * z**2 - log_sigma - 0.5 * math.log(2 * math.pi)

    def mean(self, parameters: torch.Tensor) -> torch.Tensor:
        return parameters

    def draw(self, parameters: torch.Tensor, generator: Generators | None = None) -> torch.Tensor:
        noise = normal_numbers(parameters.shape, generator, parameters.device, parameters.dtype)
        return parameters + self.log_sigma.exp().to(parameters.dtype) * noise


class DiscretizedLogisticLikelihood(PixelLikelihood):
    """A logistic law for each value, rounded to the grid of values."""

    @property
    def parameter_channels(self) -> int:
        return 2 * self.channels

    def log_prob_of_values(self, parameters: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        mean, log_scale = parameters.chunk(2, dim=1)
        return discretized_logistic_log_prob(sample, mean, log_scale, self.num_levels)

    def mean(self, parameters: torch.Tensor) -> torch.Tensor:
        """m, which is E[x] but for what rounding to the grid and its ends change."""
        return parameters.chunk(2, dim=1)[0].clamp(-1, 1)

    def draw(self, parameters: torch.Tensor, generator: Generators | None = None) -> torch.Tensor:
        mean, log_scale = at_least_float32(parameters).chunk(2, dim=1)
        return draw_logistic(mean, log_scale, self.num_levels, generator).to(parameters.dtype)


class DiscretizedMixLogisticLikelihood(PixelLikelihood):
    """A mixture of logistic laws for each pixel, rounded to the grid of values.

    The channels of the parameters are M logits, then M C means, M C logarithms of scales and M C (C - 1) / 2
    coefficients before tanh, those of each component beside each other.

    Args:
        channels, num_levels: As above.
        num_mixtures: M.
    """

    def __init__(self, channels: int, num_levels: int = 256, num_mixtures: int = 10) -> None:
        super().__init__(channels, num_levels)
        if num_mixtures < 1:
            raise ValueError(f"need num_mixtures >= 1, got {num_mixtures}")
        self.num_mixtures = num_mixtures

    @property
    def parameter_channels(self) -> int:
        return self.num_mixtures * (1 + 2 * self.channels + self.channels * (self.channels - 1) // 2)

    def log_prob_of_values(self, parameters: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        logits, mean, log_scale, coefficients = self.components(parameters)
        mean = self.shifted(mean, coefficients, sample.unsqueeze(1))
        values = discretized_logistic_log_prob(sample.unsqueeze(1), mean, log_scale, self.num_levels)
        return torch.logsumexp(logits.log_softmax(dim=1) + values.sum(dim=2), dim=1)  # (B, H, W)

    def mean(self, parameters: torch.Tensor) -> torch.Tensor:
        """E[x], but for what rounding to the grid and its ends change: each channel's by the means of those before."""
        logits, mean, _, coefficients = self.components(at_least_float32(parameters))
        means: list[torch.Tensor] = []  # of each component, (B, M, H, W)
        for c in range(self.channels):
            before = [coefficients[:, :, c, b] * means[b] for b in range(c)]
            means.append(mean[:, :, c] + sum(before))
        mixture = (logits.softmax(dim=1).unsqueeze(2) * torch.stack(means, dim=2)).sum(dim=1)
        return mixture.clamp(-1, 1).to(parameters.dtype)

    def draw(self, parameters: torch.Tensor, generator: Generators | None = None) -> torch.Tensor:
        logits, mean, log_scale, coefficients = self.components(at_least_float32(parameters))
        gumbel = -torch.log(-torch.log(uniform_like(logits, generator)))
        chosen = one_hot((logits + gumbel).argmax(dim=1), self.num_mixtures).movedim(-1, 1).to(mean.dtype)
        values: list[torch.Tensor] = []  # (B, H, W)
        for c in range(self.channels):
            shift = sum(coefficients[:, :, c, b] * values[b].unsqueeze(1) for b in range(c))
            mean_c = ((mean[:, :, c] + shift) * chosen).sum(dim=1)
            log_scale_c = (log_scale[:, :, c] * chosen).sum(dim=1)
            values.append(draw_logistic(mean_c, log_scale_c, self.num_levels, generator))
        return torch.stack(values, dim=1).to(parameters.dtype)

    def components(self, parameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits (B, M, H, W), means and log-scales (B, M, C, H, W), coefficients (B, M, C, C, H, W)."""
        M, C = self.num_mixtures, self.channels
        pairs = C * (C - 1) // 2
        logits, mean, log_scale, raw = parameters.split([M, M * C, M * C, M * pairs], dim=1)
        mean, log_scale = mean.unflatten(1, (M, C)), log_scale.unflatten(1, (M, C))
        coefficients = parameters.new_zeros(len(parameters), M, C, C, *parameters.shape[2:])
        if pairs > 0:
            later, earlier = torch.tril_indices(C, C, offset=-1, device=parameters.device)
            coefficients[:, :, later, earlier] = raw.unflatten(1, (M, pairs)).tanh()
        return logits, mean, log_scale, coefficients

    @staticmethod
    def shifted(mean: torch.Tensor, coefficients: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """m_c + sum_{b < c} a_{cb} x_b, (B, M, C, H, W)."""
        return mean + (coefficients * sample.unsqueeze(2)).sum(dim=3)


def make_likelihood(
    kind: str,
    channels: int,
    num_levels: int = 256,
    sigma: float = 1.0,
    learn_sigma: bool = False,
    num_mixtures: int = 10,
) -> PixelLikelihood:
    """The law of that name, one of `LIKELIHOODS`.

    Raises:
        ValueError: If there is none of that name, or an option is out of range.
    """
    if kind == "bernoulli":
        return BernoulliLikelihood(channels, num_levels=2)
    if kind == "gaussian":
        return GaussianLikelihood(channels, num_levels, sigma, learn_sigma)
    if kind == "discretized_logistic":
        return DiscretizedLogisticLikelihood(channels, num_levels)
    if kind == "discretized_mix_logistic":
        return DiscretizedMixLogisticLikelihood(channels, num_levels, num_mixtures)
    raise ValueError(f"likelihood must be one of {LIKELIHOODS}, got {kind!r}")


def bits_per_dim(nats: torch.Tensor, likelihood: PixelLikelihood, shape: tuple[int, ...]) -> torch.Tensor:
    """Negative log-likelihoods of images of a shape (C, H, W), in bits for each value; for a density, a bound."""
    return (nats / math.prod(shape) + likelihood.nats_per_value) / math.log(2)


def discretized_logistic_log_prob(
    x: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor, num_levels: int = 256
) -> torch.Tensor:
    """Log-probability in nats of the value x under a logistic law rounded to the grid, elementwise.

    With F the logistic function and a < b, F(b) - F(a) = F(b) F(-a) (1 - exp(a - b)), of which each factor keeps its
    precision and its gradient however far x is from the mean.

    Args:
        x: Values on the grid of `num_levels` from -1 to 1, (B, *).
        mean, log_scale: Broadcastable to x; log-scales below -7 count as -7.
        num_levels: Number of values.
    """
    half_width = 1 / (num_levels - 1)
    inverse_scale = (-log_scale.clamp(min=SMALLEST_LOG_SCALE)).exp()
    upper, lower = (x - mean + half_width) * inverse_scale, (x - mean - half_width) * inverse_scale
    below, above = logsigmoid(upper), logsigmoid(-lower)
    inside = below + above + torch.log(-torch.expm1(-2 * half_width * inverse_scale))
    return torch.where(x < -1 + half_width, below, torch.where(x > 1 - half_width, above, inside))


def draw_logistic(
    mean: torch.Tensor, log_scale: torch.Tensor, num_levels: int, generator: Generators | None = None
) -> torch.Tensor:
    """Values of the grid, drawn as the law of `discretized_logistic_log_prob` says, in the shape of the mean."""
    u = uniform_like(mean, generator)
    x = mean + log_scale.clamp(min=SMALLEST_LOG_SCALE).exp() * (u.log() - torch.log1p(-u))
    return levels_to_values(values_to_levels(x, num_levels), num_levels, x.dtype)


def values_to_levels(x: torch.Tensor, num_levels: int) -> torch.Tensor:
    """The nearest of the levels k = 0 .. num_levels - 1 of values in [-1, 1], int64 of the same shape."""
    return ((at_least_float32(x) + 1) / 2 * (num_levels - 1)).round().clamp(0, num_levels - 1).long()


def levels_to_values(k: torch.Tensor, num_levels: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """x_k = 2 k / (num_levels - 1) - 1, in [-1, 1]."""
    return 2 * k.to(dtype) / (num_levels - 1) - 1


def uniform_like(values: torch.Tensor, generator: Generators | None = None) -> torch.Tensor:
    """Uniform numbers inside (0, 1) in at least float32, of the shape of `values`; drawn where the generator lives."""
    dtype, shape = torch.promote_types(values.dtype, torch.float32), tuple(values.shape)
    check_generators(generator, len(values))
    if isinstance(generator, list):
        return torch.cat([uniform_like(row, one) for row, one in zip(values.split(1), generator, strict=True)])
    device = values.device if generator is None else generator.device
    u = torch.rand(shape, generator=generator, device=device, dtype=dtype).to(values.device)
    return u.clamp(torch.finfo(dtype).tiny, 1 - torch.finfo(dtype).eps / 2)


def normal_numbers(
    shape: tuple[int, ...], generator: Generators | None, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Standard normal numbers of a shape (B, *), drawn where the generator lives."""
    check_generators(generator, shape[0])  # Diffusers would draw everything with a single one, or leave some unused
    return randn_tensor(shape, generator=generator, device=device, dtype=dtype)


def check_generators(generator: Generators | None, count: int) -> None:
    """Raises ValueError if there is a list of generators, but not one for each of so many samples."""
    if isinstance(generator, list) and len(generator) != count:
        raise ValueError(f"need one generator for each of {count} samples, got {len(generator)}")


def check_binary(sample: torch.Tensor) -> None:
    """Raises ValueError if a value is neither -1 nor 1."""
    grey = sample[(sample.abs() != 1)]
    if grey.numel() > 0:
        raise ValueError(
            f"a Bernoulli likelihood is of images with the values -1 and 1 only, got {grey[0].item():.4g}; binarise "
            "them (`annealers.data.binarize`, `--binarize dynamic`) or take another likelihood"
        )


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
