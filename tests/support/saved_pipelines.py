"""Tiny pipelines with random weights and a sample of each, for tests that save, push and load them.

annealers is imported by those that build a pipeline, because one test draws where it cannot be imported.
"""

import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel, UNet2DModel


def guided_pipeline():
    """Ours: a class-conditional network and our scheduler."""
    from annealers import DDPMAncestralScheduler, GuidedDiffusionPipeline

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        add_attention=False,
        num_class_embeds=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    scheduler = DDPMAncestralScheduler(variance_type="fixed_large")
    return GuidedDiffusionPipeline(unet.eval(), scheduler, {0: "cat", 1: "dog", 2: "emu"}, null_label=3)


def pipeline_of_diffusers():
    """Diffusers' latent pipeline with our scheduler."""
    from annealers import DDPMAncestralScheduler

    torch.manual_seed(1)
    transformer = DiTTransformer2DModel(
        sample_size=4,
        num_layers=1,
        patch_size=2,
        attention_head_dim=4,
        num_attention_heads=2,
        in_channels=4,
        out_channels=4,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    return DiTPipeline(transformer.eval(), vae.eval(), DDPMAncestralScheduler())


def guided_images(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"class_labels": ["emu", "cat"], "guidance_scale": 2.0, "num_inference_steps": 3}
    return pipeline(**arguments, generator=torch.Generator().manual_seed(0), output_type="pt").images


def images_of_diffusers(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(0)  # this pipeline does not pass its generator on to the scheduler
    return torch.as_tensor(pipeline(class_labels=[3], num_inference_steps=3, output_type="np").images)
