"""Runs Diffusers' own tests of models on the autoencoders, the autoregressive models and the GANs of annealers.

    git clone --depth 1 https://github.com/huggingface/diffusers DIFFUSERS
    python benchmarks/diffusers_model_tests.py DIFFUSERS

The tests are mixins in the repository of Diffusers, which its package does not contain; options after the folder go
to pytest, `-k TestVAE` for one model, say. What needs an accelerator, several of them or the Hub, Diffusers skips
where there is none. What is left out here has its reason beside it.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from annealers import (
    AutoencoderModel,
    CodeFormerModel,
    CodeTransformerModel,
    GANDiscriminator,
    GANGenerator,
    HierarchicalVAEModel,
    PixelCNNModel,
    VAEModel,
    VQVAEModel,
)

if __name__ != "__main__":
    from tests.models.autoencoders.testing_utils import AutoencoderTesterMixin
    from tests.models.testing_utils import (
        BaseModelTesterConfig,
        GroupOffloadTesterMixin,
        LayerwiseCastingTesterMixin,
        ModelTesterMixin,
        TrainingTesterMixin,
    )
    from tests.testing_utils import torch_device

    # Those of offloading fail where there is nothing to offload from. CPU offload is of `_no_split_modules`: of none.
    OFFLOADING = () if torch_device == "cpu" else (GroupOffloadTesterMixin,)

    class AnyModel(ModelTesterMixin, TrainingTesterMixin, LayerwiseCastingTesterMixin, *OFFLOADING):
        """What holds of each model."""

        checkpointed: set[str] = set()  # classes of modules that forget what they can compute again

        def test_gradient_checkpointing_is_applied(self):
            super().test_gradient_checkpointing_is_applied(self.checkpointed)

    class OnImages(BaseModelTesterConfig):
        """Models of images, of which a batch has four of 32 x 32 pixels."""

        main_input_name = "sample"
        output_shape = (3, 32, 32)
        options: dict[str, Any]

        def get_init_dict(self):
            network = {"in_channels": 3, "sample_size": 32, "block_out_channels": (16, 32), "norm_num_groups": 8}
            return network | self.options

        def get_dummy_inputs(self):
            sample = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
            return {"sample": sample.to(torch_device), **self.more_inputs()}

        def more_inputs(self):
            return {}

    class FromNoise(OnImages):
        """Models that draw their latents, given the class."""

        def more_inputs(self):
            labels = torch.arange(4, device=torch_device)
            return {"class_labels": labels, "generator": torch.Generator().manual_seed(0)}

        @pytest.mark.skip("Among the outputs are distributions, and it compares tensors alone.")
        def test_outputs_equivalence(self):
            pass

    class OnCodes(BaseModelTesterConfig):
        """Models of codes, of which a batch has four pictures of 8 x 8 with 16 values, given the class."""

        main_input_name = "sample"
        output_shape = (16, 1, 8, 8)  # logits
        options: dict[str, Any]

        def get_init_dict(self):
            return {"num_embeddings": 16, "in_channels": 1, "sample_size": 8, "num_class_embeds": 4} | self.options

        def get_dummy_inputs(self):
            sample = torch.randint(16, (4, 1, 8, 8), generator=torch.Generator().manual_seed(0))
            return {"sample": sample.to(torch_device), "class_labels": torch.arange(4, device=torch_device)}

    class TestAutoencoder(OnImages, AnyModel, AutoencoderTesterMixin):
        model_class = AutoencoderModel
        options = {"out_channels": 3, "latent_channels": 4}
        checkpointed = {"Encoder", "Decoder", "UNetMidBlock2D"}

    class TestVAE(FromNoise, AnyModel, AutoencoderTesterMixin):
        model_class = VAEModel
        options = {"latent_channels": 4, "likelihood": "gaussian", "learn_sigma": True, "num_class_embeds": 4}
        checkpointed = {"Encoder", "Decoder", "UNetMidBlock2D"}

    class TestHierarchicalVAE(FromNoise, AnyModel, AutoencoderTesterMixin):
        model_class = HierarchicalVAEModel
        options = {"latent_channels": (8, 4), "latent_levels": (1, 0), "likelihood": "gaussian", "num_class_embeds": 4}
        checkpointed = {"HierarchicalVAEModel", "Encoder", "Decoder", "UNetMidBlock2D"}

    class TestVQVAE(OnImages, AnyModel, AutoencoderTesterMixin):
        model_class = VQVAEModel
        options = {"latent_channels": 4, "num_vq_embeddings": 16}
        checkpointed = {"Encoder", "Decoder", "UNetMidBlock2D"}

    class TestCodeFormer(OnImages, AnyModel):
        model_class = CodeFormerModel
        options: dict[str, Any] = {}

        def get_init_dict(self):
            vqvae = {"latent_channels": 4, "num_vq_embeddings": 16} | super().get_init_dict()
            return {"vqvae_config": vqvae, "hidden_size": 32, "num_layers": 2}

    class TestPixelCNN(OnCodes, AnyModel):
        model_class = PixelCNNModel
        options = {"channels": 8, "num_layers": 2}
        checkpointed = {"GatedTrunk"}

    class TestCodeTransformer(OnCodes, AnyModel):
        model_class = CodeTransformerModel
        options = {"hidden_size": 32, "num_layers": 2}
        checkpointed = {"CodeTransformerModel"}

    class OfGAN(OnImages):
        """Both players, given class and text: the generator makes what the discriminator judges."""

        def get_init_dict(self):
            conditions = {"num_class_embeds": 4, "text_embed_dim": 8}
            network = {"sample_size": 32, "block_out_channels": (16, 32), "norm": "group", "norm_num_groups": 8}
            return network | conditions | self.options

        def texts(self):
            return torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).to(torch_device)

    class TestGANGenerator(OfGAN, AnyModel):
        model_class = GANGenerator
        main_input_name = "latents"
        options = {"out_channels": 3, "latent_dim": 16, "arch": "dcgan"}

        def get_dummy_inputs(self):
            latents = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).to(torch_device)
            labels = torch.arange(4, device=torch_device)
            return {"latents": latents, "class_labels": labels, "encoder_hidden_states": self.texts()}

    class TestGANGeneratorResNet(TestGANGenerator):
        options = TestGANGenerator.options | {"arch": "resnet", "norm": "batch"}

    class TestGANDiscriminator(OfGAN, AnyModel):
        model_class = GANDiscriminator
        output_shape = (1,)
        options = {"in_channels": 3, "arch": "dcgan"}

        def more_inputs(self):
            return {"class_labels": torch.arange(4, device=torch_device), "text_embeds": self.texts()}

    class TestGANDiscriminatorResNet(TestGANDiscriminator):
        options = TestGANDiscriminator.options | {"arch": "resnet", "norm": "spectral"}

        @pytest.mark.skip(
            "Each use of a weight computes its spectral norm, which numbers of 8 bits have no division for."
        )
        def test_layerwise_casting_memory(self):
            pass

        @pytest.mark.skip(
            "Each use of a weight computes its spectral norm, which numbers of 8 bits have no division for."
        )
        def test_layerwise_casting_training(self):
            pass


def main() -> None:
    checkout, *options = sys.argv[1:] or [""]
    if not (Path(checkout) / "tests" / "models" / "testing_utils").is_dir():
        raise SystemExit(
            f"{checkout!r} is not a clone of the repository of diffusers: it has no tests/models/testing_utils"
        )
    sys.path.insert(0, str(Path(checkout).resolve()))
    here = Path(__file__).resolve()
    arguments = ["-c", "/dev/null", "--rootdir", str(here.parent), "--import-mode=importlib", "-q", "-rs", *options]
    sys.exit(pytest.main([*arguments, str(here)]))


if __name__ == "__main__":
    main()
