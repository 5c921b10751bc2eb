r"""Classifier-free guidance with one scale for the predictor and another for the corrector.

A corrector that runs on eps_w = eps_u + w (eps_c - eps_u) holds the state at the sharpened law p_t(x)^{1-w} p_t(x|c)^w
of each level, which is no law of noised data; so a guidance scale has a meaning of its own there. One choice makes the
two together what is known: a deterministic predictor at w = 1 and one correction per level at w', with the step size
rule "reversal", are ancestral sampling guided with w = (w' + 1) / 2, in the limit of small steps.

Source: Bradley & Nakkiran 2024, "Classifier-Free Guidance is a Predictor-Corrector", arXiv:2408.09000, Theorem 3.
"""

import math
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.callbacks import PipelineCallback

# Pipelines of Diffusers drop the unconditional half of the batch where guidance_scale <= 1
JUST_ABOVE_ONE = math.nextafter(1.0, 2.0)


class CorrectorGuidanceCallback(PipelineCallback):
    """Sets the guidance scale before each network call: one for predictions, another for corrections.

    For any pipeline that takes `callback_on_step_end` and reads its `_guidance_scale` at each call, with a
    `PredictorCorrectorScheduler`. The first call comes before the callback: the pipeline is to be given
    `guidance_scale=callback.guidance_scale`, or the corrector's scale if it begins with a correction, as it does with
    layout="full" and without a predictor.

    Args:
        predictor: w of the calls that predict the next level, >= 1 in a pipeline of Diffusers.
        corrector: w of the calls that correct, likewise.

    Raises:
        ValueError: When called for another scheduler, with a scale below 1 in a pipeline that cannot, or after a first
            call that was guided by neither of the two.

    Example:
        >>> from annealers.pipelines import CorrectorGuidanceCallback
        >>> callback = CorrectorGuidanceCallback(predictor=1.0, corrector=5.0)
        >>> # pipeline(prompt, guidance_scale=callback.guidance_scale, callback_on_step_end=callback)
    """

    tensor_inputs = []

    def __init__(self, predictor: float, corrector: float) -> None:
        super().__init__()
        self.predictor = predictor
        self.corrector = corrector

    @property
    def guidance_scale(self) -> float:
        """What to pass to the pipeline, whose first call is a prediction."""
        return JUST_ABOVE_ONE if self.predictor == 1 else self.predictor

    def callback_fn(
        self, pipeline: DiffusionPipeline, step_index: int, timesteps: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        scheduler = pipeline.scheduler
        if not hasattr(type(scheduler), "is_correction_due"):
            raise ValueError(
                f"guidance of the corrector needs a PredictorCorrectorScheduler, got {type(scheduler).__name__}"
            )
        if scheduler.num_corrections == 0:
            raise ValueError(f"there is no correction to guide: corrector_steps={scheduler.config.corrector_steps}")
        lowest = -math.inf
        if hasattr(pipeline, "do_classifier_free_guidance"):
            lowest = JUST_ABOVE_ONE
            if min(self.predictor, self.corrector) < 1:
                raise ValueError(
                    f"{type(pipeline).__name__} has no guidance below 1, got scales of {self.predictor} for the "
                    f"predictor and {self.corrector} for the corrector"
                )
        scales = max(self.predictor, lowest), max(self.corrector, lowest)
        if step_index == 0 and pipeline._guidance_scale not in (*scales, self.guidance_scale):
            raise ValueError(
                f"the first network call was guided by {pipeline._guidance_scale}, not by one of {scales}: give the "
                "pipeline guidance_scale=callback.guidance_scale"
            )
        scale = scales[1] if scheduler.is_correction_due else scales[0]
        pipeline._guidance_scale = scale
        return callback_kwargs
