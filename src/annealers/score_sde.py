r"""Published variance-exploding score networks, as Diffusers stores them, for the schedulers of this library.

A folder of Diffusers' `ScoreSdeVePipeline` holds a `UNet2DModel`, which is fed y = x_0 + s eps with x_0 in [0, 1] and
returns a score, and a scheduler whose settings are a ladder and a predictor-corrector sampler (Song et al. 2021,
Algorithm 2). Both have their counterparts here:

    unet                      `ScoreUNetModel` around it, data_range="zero_to_one"
    sigma_min, sigma_max      the same ladder in units of [-1, 1]: twice as large
    num_train_timesteps       T, on levels that are those of their sampler for N = T
    snr, correct_steps        `snr` and `corrector_steps` of a `PredictorCorrectorScheduler` that predicts by
                              "reverse_diffusion" and corrects every level, the first among them

The published sampler measures its corrector's step by norms that are averaged over the batch. Here a sample does not
depend on those it is drawn with: the step is 2 (snr s)^2, to which the measured one comes down for images of many
pixels, where |z| and s |score| are both near sqrt(D). The published rule is one setting away,

    pipeline.scheduler = PredictorCorrectorScheduler.from_config(
        pipeline.scheduler.config, step_size_rule="batch_norm")

and with it the two chains are the same, noise for noise, but for two details of theirs: the network is told the level
s^(1 - 1e-5 i / (N - 1)) and not s itself, from i = 0 to N - 1, and a run starts from s_max z without the 1 of
sqrt(1 + s_max^2).

Source: Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole 2021, "Score-Based Generative Modeling through Stochastic
Differential Equations", arXiv:2011.13456.
"""

import json
import os
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from annealers.models import ScoreUNetModel
from annealers.pipelines import GuidedDiffusionPipeline
from annealers.schedulers import PredictorCorrectorScheduler

SCHEDULER_CLASS = "ScoreSdeVeScheduler"
SCHEDULER_FILE = "scheduler/scheduler_config.json"
SETTINGS = ("num_train_timesteps", "sigma_min", "sigma_max", "snr", "correct_steps")
PIXEL_RANGES = 2.0  # units of [0, 1] in [-1, 1]


def load_score_sde_ve(pretrained_model_name_or_path: str | os.PathLike, **download: Any) -> GuidedDiffusionPipeline:
    """Loads a published variance-exploding score network; no code of the folder is run.

    Args:
        pretrained_model_name_or_path: A folder with `unet/` and `scheduler/`, as `ScoreSdeVePipeline` of Diffusers has
            them, or a Hub id.
        **download: Of a Hub id: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.

    Returns:
        A pipeline that draws with the published settings (see above for the corrector's step) and takes any scheduler
        that is made `from_config(pipeline.scheduler.config)`.

    Raises:
        FileNotFoundError: If there is no such folder, or it holds no scheduler.
        ValueError: If the scheduler is another, a setting of it is missing, or the network does not return scores.
    """
    name = os.fspath(pretrained_model_name_or_path)
    folder = Path(name) if os.path.isdir(name) else _downloaded(name, **download)
    published = _published_settings(folder, name)
    T = published["num_train_timesteps"]
    ladder = {end: PIXEL_RANGES * published[end] for end in ("sigma_min", "sigma_max")}
    unet = UNet2DModel.from_pretrained(folder / "unet")
    scheduler = PredictorCorrectorScheduler(
        num_train_timesteps=T,
        beta_schedule="geometric",
        predictor="reverse_diffusion",
        corrector_steps=published["correct_steps"],
        snr=published["snr"],
        layout="full",
        clip_sample=False,
        timestep_spacing="geometric",
        **ladder,
    )
    model = ScoreUNetModel.from_unet(unet, **ladder, num_train_timesteps=T, data_range="zero_to_one")
    return GuidedDiffusionPipeline(model, scheduler)


def _downloaded(repo_id: str, **download: Any) -> Path:
    try:
        return Path(snapshot_download(repo_id, allow_patterns=["unet/*", "scheduler/*"], **download))
    except HFValidationError as error:
        raise FileNotFoundError(f"{repo_id!r} is neither a folder on this machine nor a Hub id 'user/name'") from error


def _published_settings(folder: Path, name: str) -> dict[str, Any]:
    file = folder / SCHEDULER_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{name} is not a ScoreSdeVePipeline: it has no {SCHEDULER_FILE}")
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("_class_name") != SCHEDULER_CLASS:
        raise ValueError(f"{name} has a {config.get('_class_name')}, not a {SCHEDULER_CLASS}")
    missing = [setting for setting in SETTINGS if setting not in config]
    if missing:
        raise ValueError(f"{SCHEDULER_FILE} of {name} does not say {', '.join(missing)}")
    return {setting: config[setting] for setting in SETTINGS}
