"""Runs Diffusers' own tests of models and autoencoders on the models of annealers.

    git clone --depth 1 https://github.com/huggingface/diffusers DIFFUSERS
    python benchmarks/diffusers_model_tests.py DIFFUSERS

The tests are mixins in the repository of Diffusers, which its package does not contain; options after the folder go
to pytest. Tests that need an accelerator or the Hub are skipped by Diffusers itself where there is none.
"""

import sys
from pathlib import Path

import pytest
import torch

from annealers import AutoencoderModel, HierarchicalVAEModel, VAEModel, VQVAEModel

if __name__ != "__main__":
    from tests.models.autoencoders.testing_utils import AutoencoderTesterMixin
    from tests.models.testing_utils import (
        BaseModelTesterConfig,
        LayerwiseCastingTesterMixin,
        ModelTesterMixin,
        TrainingTesterMixin,
    )

    NETWORK = {"in_channels": 3, "sample_size": 32, "block_out_channels": (16, 32), "norm_num_groups": 8}

    class OnImages(BaseModelTesterConfig):
        """Four images of 32 x 32 pixels."""

        main_input_name = "sample"
        output_shape = (3, 32, 32)

        def get_init_dict(self):
            return {**NETWORK, **self.options}

        def get_dummy_inputs(self):
            sample = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
            return {"sample": sample, **self.more_inputs()}

        def more_inputs(self):
            return {}

    class FromNoise(OnImages):
        """Models that draw their latents."""

        def more_inputs(self):
            return {"generator": torch.Generator().manual_seed(0)}

    class Autoencoder(OnImages):
        model_class = AutoencoderModel
        options = {"out_channels": 3, "latent_channels": 4}

    class VAE(FromNoise):
        model_class = VAEModel
        options = {"latent_channels": 4, "likelihood": "gaussian", "learn_sigma": True}

    class HierarchicalVAE(FromNoise):
        model_class = HierarchicalVAEModel
        options = {"likelihood": "gaussian"}

    class VQVAE(OnImages):
        model_class = VQVAEModel
        options = {"latent_channels": 4, "num_vq_embeddings": 16}

    # pyright: reportGeneralTypeIssues=false
    class TestAutoencoder(Autoencoder, ModelTesterMixin, TrainingTesterMixin, AutoencoderTesterMixin):
        pass

    class TestVAE(
        VAE, ModelTesterMixin, TrainingTesterMixin, LayerwiseCastingTesterMixin, AutoencoderTesterMixin
    ):
        pass

    class TestHierarchicalVAE(HierarchicalVAE, ModelTesterMixin, TrainingTesterMixin):
        pass

    class TestVQVAE(VQVAE, ModelTesterMixin, TrainingTesterMixin, AutoencoderTesterMixin):
        pass


def main() -> None:
    checkout, *options = sys.argv[1:]
    if not (Path(checkout) / "tests" / "models" / "testing_utils").is_dir():
        raise SystemExit(f"{checkout} is not a clone of the repository of diffusers: it has no tests/models/testing_utils")
    sys.path.insert(0, str(Path(checkout).resolve()))
    here = Path(__file__).resolve()
    arguments = ["-c", "/dev/null", "--rootdir", str(here.parent), "--import-mode=importlib", "-q", "-rs", *options]
    sys.exit(pytest.main([*arguments, str(here)]))


if __name__ == "__main__":
    main()
