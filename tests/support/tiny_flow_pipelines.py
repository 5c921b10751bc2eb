"""Flow-matching pipelines of Diffusers, unmodified, from tiny random components; used as those of `tiny_pipelines`.

Their schedulers are those of the published models. Text comes as embeddings, so there are no text encoders.
"""

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tiny_pipelines import SIDE, WIDTH, PipelineCase

from annealers.exact import Gaussian

MEAN, STD = 0.3, 0.5
LAW = Gaussian(MEAN, variance=STD**2)  # of latents, which nothing clips
NO_TEXT_ENCODERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")


# ---- tiny random components -----------------------------------------------------------------------------------------


def autoencoder():
    return AutoencoderKL(
        block_out_channels=(4,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        latent_channels=4,
        norm_num_groups=1,
        scaling_factor=1.0,
        shift_factor=0.0,
        sample_size=SIDE,
    )


def stable_diffusion_3(pipeline_class=StableDiffusion3Pipeline):
    transformer = SD3Transformer2DModel(
        sample_size=SIDE,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=SIDE,
    )
    return pipeline_class(
        transformer=transformer,
        vae=autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **dict.fromkeys(NO_TEXT_ENCODERS),
    )


def flux(pipeline_class=FluxPipeline):
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,  # 2 x 2 pixels of 4 channels
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    return pipeline_class(
        transformer=transformer, vae=autoencoder(), scheduler=scheduler, **dict.fromkeys(NO_TEXT_ENCODERS[:4])
    )


def wan():
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=1,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=WIDTH,
        freq_dim=8,
        ffn_dim=8,
        num_layers=1,
        rope_max_seq_len=SIDE,
    )
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(transformer=transformer, vae=vae, scheduler=scheduler, **dict.fromkeys(NO_TEXT_ENCODERS[:2]))


# ---- how each is called ---------------------------------------------------------------------------------------------

SIZE = {"height": SIDE, "width": SIDE}
# Guidance is on where a pipeline has it; as the law knows no condition, it changes nothing.
LATENT = {"guidance_scale": 3.0, "output_type": "latent"}


def embeddings(batch, names, pooled=()):
    sequences = {name: torch.zeros(batch, 5, WIDTH) for name in names}
    return sequences | {name: torch.zeros(batch, WIDTH) for name in pooled}


def sd3_embeddings(batch):
    names, pooled = (
        ("prompt_embeds", "negative_prompt_embeds"),
        ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
    )
    return embeddings(batch, names, pooled)


def data(batch):
    """Latents (B, 4, SIDE, SIDE) from the law, in the place of an image."""
    return LAW.sample((batch, 4, SIDE, SIDE), generator=torch.Generator().manual_seed(99))


def sd3_from_text(pipeline, batch, **arguments):
    return pipeline(**sd3_embeddings(batch), **{**LATENT, **SIZE, **arguments}).images


def sd3_from_image(pipeline, batch, **arguments):
    return sd3_from_text(pipeline, batch, image=data(batch), **arguments)


def flux_from_text(pipeline, batch, **arguments):
    text = embeddings(batch, ["prompt_embeds"], ["pooled_prompt_embeds"])
    return pipeline(**text, **{**LATENT, **SIZE, **arguments}).images


def flux_from_image(pipeline, batch, **arguments):
    return flux_from_text(pipeline, batch, image=data(batch), **arguments)


def wan_from_text(pipeline, batch, **arguments):
    text = embeddings(batch, ["prompt_embeds", "negative_prompt_embeds"])
    size = {"height": 4 * SIDE, "width": 4 * SIDE, "num_frames": 5}  # two frames of 8 x 8 latents
    return pipeline(**text, **{**LATENT, **size, **arguments}).frames


FLOW_PIPELINES = [
    PipelineCase("StableDiffusion3Pipeline", stable_diffusion_3, sd3_from_text),
    PipelineCase(
        "StableDiffusion3Img2ImgPipeline",
        lambda: stable_diffusion_3(StableDiffusion3Img2ImgPipeline),
        sd3_from_image,
        strength=0.5,
    ),
    PipelineCase("FluxPipeline", flux, flux_from_text),
    PipelineCase("FluxImg2ImgPipeline", lambda: flux(FluxImg2ImgPipeline), flux_from_image, strength=0.5),
    PipelineCase("WanPipeline", wan, wan_from_text),
]
