"""Networks that Diffusers lacks."""

from annealers.models.noisy_classifier import NoisyClassifierModel, NoisyClassifierOutput
from annealers.models.point_score import PointScoreModel
from annealers.models.score_unet import ScoreUNetModel

__all__ = ["NoisyClassifierModel", "NoisyClassifierOutput", "PointScoreModel", "ScoreUNetModel"]
