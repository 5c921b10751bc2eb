r"""Classifier guidance: the gradient of a classifier of noisy images leads any diffusion model to a class.

By Bayes' rule the score of a class is that of all data plus the gradient of a classifier, and a weight w sharpens it:

    grad log p_t(x | y) = s(x) + g(x),      g(x) = grad_x log p(y | x_t = x)
    guided score        = s(x) + w g(x)     the score of p_t(x) p(y | x_t = x)^w, which w > 1 draws towards y

What a network predicts is affine in the score along x_t = alpha x_0 + sigma eps, so each prediction gets its share:

    score    s                                         s    <- s    + w g
    noise    eps = -sigma s                            eps  <- eps  - w sigma g
    data     x_0 = (x_t + sigma^2 s) / alpha           x_0  <- x_0  + w sigma^2 / alpha g
    v        v = alpha eps - sigma x_0                 v    <- v    - w (alpha sigma + sigma^3 / alpha) g
    flow     u = eps - x_0                             u    <- u    - w (sigma + sigma^2 / alpha) g

The last two factors are sigma / alpha on the paths that these predictions are of, where alpha^2 + sigma^2 = 1 and
alpha + sigma = 1.

Sources: Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", arXiv:2105.05233, Eq. 14 and
Algorithm 2 (eps); Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations",
arXiv:2011.13456, Eq. 14 (score). The others follow: Tweedie's formula for x_0 (Efron 2011), the definitions of v
(Salimans & Ho 2022, arXiv:2202.00512, App. D) and of u (Lipman et al. 2023, arXiv:2210.02747, with time reversed).

Their Algorithm 1 and the `condition_mean` of their code shift the mean of an ancestral step instead, by w Sigma g. To
first order in the step that is the same, but Sigma is not the factor of the score in the mean, beta / sqrt(1 - beta):
a class is pulled at more weakly by sqrt(1 - beta) Sigma / beta, and not at all in a step without variance, as the last
one. So it is not offered. Here w = 1 and an exact classifier give the exact law of the class, with any sampler.

Where x_t has no signal, as at t = T of a flow, it tells nothing of the class: g = 0, but g / alpha has a limit. It is
read one train timestep nearer to the data.

    symbol           code            shape           meaning
    x_t              sample          (B, C, H, W)    what the networks see: unit noise at first, also for samplers that
                                                     keep x_t / alpha_t
    alpha, sigma     alpha, sigma    ()              signal and noise coefficients of its timestep
    g                gradient        (B, C, H, W)    grad_x log p(y | x_t)
    y                labels          (B,)            class ids
    w                                                weight; 0 is no guidance
"""

from contextlib import nullcontext

import torch
from diffusers import ModelMixin, SchedulerMixin
from torch.nn.attention import SDPBackend, sdpa_kernel


def classifier_guidance(
    classifier: ModelMixin,
    scheduler: SchedulerMixin,
    sample: torch.Tensor,
    timestep: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    """What guidance with w = 1 adds to the prediction of a network of this scheduler.

    Args:
        classifier: Called as `classifier(x_t, t, return_dict=False)`, it returns logits (B, K) first.
        scheduler: Says what is predicted, and the path: of annealers, or any of Diffusers but the EDM family.
        sample: x_t as the networks see it, after `scale_model_input`, (B, C, H, W).
        timestep: Train timestep, ().
        labels: y, class ids, (B,).

    Returns:
        (B, C, H, W), in the dtype of the sample; half precision is computed in float32.

    Raises:
        ValueError: If the scheduler's path or prediction type is not known.
    """
    alpha, _ = coefficients_at(scheduler, timestep)
    timestep = torch.where(alpha > 0, timestep, timestep - 1)
    gradient = log_likelihood_gradient(classifier, sample, timestep, labels)
    factor = change_per_score(predicted_quantity(scheduler), *coefficients_at(scheduler, timestep))
    return (factor.to(gradient) * gradient).to(sample.dtype)


def log_likelihood_gradient(
    classifier: ModelMixin, sample: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """grad_x log p(y | x_t = x), also where gradients are off; (B, C, H, W), float32 or better.

    Where they are on and x has one, the result can be differentiated again.
    """
    again = torch.is_grad_enabled() and sample.requires_grad
    dtype = torch.promote_types(sample.dtype, torch.float32)
    attention = sdpa_kernel(SDPBackend.MATH) if again else nullcontext()  # no other kernel has a second derivative
    with torch.inference_mode(False), torch.enable_grad(), attention:
        x = sample.to(dtype) if again else sample.detach().to(dtype, copy=True).requires_grad_()
        logits = classifier(x.to(classifier.dtype), timestep.clone(), return_dict=False)[0]
        log_likelihood = torch.log_softmax(logits.to(x.dtype), dim=1).gather(1, labels.clone()[:, None])  # (B, 1)
        return torch.autograd.grad(log_likelihood.sum(), x, create_graph=again)[0]  # no image depends on another


def change_per_score(prediction_type: str | None, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """How much an ideal prediction at the path point (alpha, sigma) changes for each unit of score.

    Raises:
        ValueError: If the prediction type is unknown.
    """
    eps, x_0 = -sigma, sigma**2 / alpha
    changes = {
        "score": torch.ones_like(sigma),
        "epsilon": eps,
        "sample": x_0,
        "v_prediction": alpha * eps - sigma * x_0,
        "flow_prediction": eps - x_0,
    }
    if prediction_type not in changes:
        raise ValueError(f"classifier guidance knows predictions of {', '.join(changes)}, got {prediction_type!r}")
    return changes[prediction_type]


def coefficients_at(scheduler: SchedulerMixin, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(alpha, sigma) of x_t as a network sees it at train timesteps of any shape, float64, on their device.

    The tables of Diffusers have a row for each whole timestep. Its samplers that keep x_t / alpha_t also visit
    timesteps in between, of which `exact.path_point` knows nothing; both coefficients are interpolated there.

    Raises:
        ValueError: If the scheduler is neither ours, nor has `alphas_cumprod`, nor follows a flow.
    """
    signal_and_noise = getattr(scheduler, "signal_and_noise", None)
    if signal_and_noise is not None:
        return signal_and_noise(timesteps)
    if predicted_quantity(scheduler) == "flow_prediction":
        sigma = timesteps.double() / scheduler.config.num_train_timesteps
        return 1 - sigma, sigma
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise ValueError(f"{type(scheduler).__name__} does not say which alpha and sigma a timestep stands for")
    alpha_bar = table.to(timesteps.device, torch.float64)
    row = timesteps.double()
    below, above = row.floor().long(), row.ceil().long()
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    return torch.lerp(alpha[below], alpha[above], row - below), torch.lerp(sigma[below], sigma[above], row - below)


def predicted_quantity(scheduler: SchedulerMixin) -> str | None:
    """What a network of this scheduler predicts; Diffusers' flow schedulers do not say so, but have a `shift`."""
    flow = "flow_prediction" if "shift" in scheduler.config else None
    return scheduler.config.get("prediction_type", flow)
