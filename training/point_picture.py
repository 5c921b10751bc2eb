"""What a score network of points of the plane has learnt: its samples, and its score beside the exact one."""

import numpy as np
import torch
from diffusers import ModelMixin
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from annealers.exact import Law
from annealers.schedulers.gaussian_path import GaussianPathScheduler

SHOWN_LEVELS = (0.1, 0.3, 1.0)  # sigma_t / alpha_t over the standard deviation of the law
ARROWS = 17  # per side
LEARNT, EXACT, TRUTH = "#0072b2", "#e69f00", "#bbbbbb"


def point_picture(
    points: torch.Tensor, law: Law, network: ModelMixin, scheduler: GaussianPathScheduler
) -> Image.Image:
    """Draws samples over those of the law, and at three noise levels the learnt over the exact score.

    The levels are shown in the coordinates of the data, y = x_t / alpha_t = x_0 + s eps. An arrow is s grad log p(y),
    the expected noise with its sign turned round, shortened to a / (1 + |a|) so that far ones stay apart.

    Args:
        points: Samples, (N, 2, 1, 1), on the CPU.
        law: The law that they should have.
        network: Predicts eps from (x_t, t).
        scheduler: Of the path that the network is trained on.
    """
    truth = law.sample(len(points), generator=torch.Generator().manual_seed(0)).flatten(1)
    centre, radius = truth.mean(0), 1.2 * float((truth - truth.mean(0)).abs().max())
    figure = Figure(figsize=(13.6, 3.6), dpi=90, layout="constrained")
    axes = figure.subplots(1, 1 + len(SHOWN_LEVELS))
    axes[0].scatter(*truth.T, s=5, color=TRUTH, label="data")
    axes[0].scatter(*points.flatten(1).T, s=5, color=LEARNT, label="samples")
    axes[0].set_title("samples", fontsize=10)
    axes[0].legend(loc="upper right", fontsize=8)
    for level, panel in zip(SHOWN_LEVELS, axes[1:], strict=True):
        _draw_fields(panel, level * float(truth.std(0).mean()), centre, radius, law, network, scheduler)
    for panel in axes:
        panel.set_xlim(centre[0] - radius, centre[0] + radius)
        panel.set_ylim(centre[1] - radius, centre[1] + radius)
        panel.set_aspect("equal")
        panel.tick_params(labelsize=8)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _draw_fields(
    panel: Axes,
    level: float,
    centre: torch.Tensor,
    radius: float,
    law: Law,
    network: ModelMixin,
    scheduler: GaussianPathScheduler,
) -> None:
    """The learnt and the exact score of y at the level of the path that is nearest to `level`."""
    alphas, sigmas = scheduler.signal_and_noise(torch.arange(len(scheduler)))
    t = int(((sigmas / alphas).log() - np.log(level)).abs().argmin())
    alpha, sigma = float(alphas[t]), float(sigmas[t])
    marks = torch.linspace(-1, 1, ARROWS) * 0.95 * radius
    y = (centre + torch.cartesian_prod(marks, marks)).float()
    x_t = (alpha * y).reshape(-1, *law.event_shape)
    with torch.no_grad():
        predicted = network(x_t.to(network.device), t).sample.cpu()
    for noise, colour, width, label in (
        (law.noise(x_t, alpha, sigma), EXACT, 0.008, "exact"),
        (predicted, LEARNT, 0.004, "learnt"),
    ):
        arrows = -noise.flatten(1)
        arrows = arrows / (1 + arrows.norm(dim=1, keepdim=True))
        panel.quiver(
            *y.T, *arrows.T, color=colour, width=width, angles="xy", scale_units="xy", scale=8 / radius, label=label
        )
    panel.set_title(f"score at noise {sigma / alpha:.2g}", fontsize=10)
    panel.legend(loc="upper right", fontsize=8)
