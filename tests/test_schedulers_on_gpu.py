"""Runs on a GPU, where waiting for the device in `step` would cost more than the step: PyTorch raises at each wait."""

import pytest
import torch

from annealers import AnnealedLangevinScheduler, ModifiedEulerMaruyamaScheduler, PredictorCorrectorScheduler

SCHEDULERS = {
    "annealed langevin": lambda: AnnealedLangevinScheduler(steps_per_level=2, step_size=0.2),
    "modified euler-maruyama": ModifiedEulerMaruyamaScheduler,
    "flow": lambda: PredictorCorrectorScheduler(prediction_type="flow_prediction", predictor="reverse_diffusion"),
    "secant": lambda: PredictorCorrectorScheduler(predictor="secant", corrector_steps=0, last_step_noise=True),
    **{
        f"corrector {corrector}, {rule}": lambda corrector=corrector, rule=rule: PredictorCorrectorScheduler(
            corrector=corrector, step_size_rule=rule, corrector_steps=2
        )
        for corrector in ("langevin", "leimkuhler_matthews")
        for rule in ("sigma", "norm", "batch_norm", "reversal")
    },
    **{
        f"{variance_type}, {steps} corrections": lambda variance_type=variance_type, steps=steps: (
            PredictorCorrectorScheduler(variance_type=variance_type, corrector_steps=steps)
        )
        for variance_type in ("self_estimated", "self_estimated_isotropic")
        for steps in (0, 1)
    },
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:.*Langevin steps")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_run_on_a_gpu_never_waits_for_it(name, dtype):
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(10, device="cuda")
    x = torch.randn(2, 3, 8, 8, dtype=dtype, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in scheduler.timesteps:
            x = scheduler.step(torch.sin(x), t, x).prev_sample
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.dtype is dtype
    assert x.isfinite().all()
