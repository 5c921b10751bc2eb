"""Pipelines of Diffusers, unmodified, from tiny random components, with their network replaced by an exact law.

`for case in PIPELINES` runs a scheduler through all of them:

    pipeline = case.build()
    pipeline.scheduler = Scheduler.from_config(pipeline.scheduler.config)
    with exact_network(pipeline, LAW) as calls:
        samples = case.sample(pipeline, steps=12, batch=16)

The samples then have the law that the scheduler makes of LAW, whatever the pipeline does around it: guidance that
doubles the batch, learned-variance channels it cuts off, masks, or a start from noised data.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    LDMTextToImagePipeline,
    MotionAdapter,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SchedulerMixin,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.autoencoders.vae import DecoderOutput
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from annealers.exact import Gaussian, Law, path_point

SIDE = 16  # of the latents; the autoencoders below do not shrink the image
WIDTH = 8  # of the text embeddings
MEAN, STD = 0.3, 0.15
# Within +-1 up to 4.6 standard deviations, because DDPM, DiT and LDM pipelines clip what they return.
LAW = Gaussian(MEAN, variance=STD**2)
TO_THE_RIGHT = slice(SIDE // 2, None)  # the half that inpainting generates


@dataclass(frozen=True)
class PipelineCase:
    """A pipeline and how to call it.

    Args:
        name: Name of the pipeline's class, and what is special.
        build: Makes the pipeline, with a scheduler of Diffusers.
        call: `call(pipeline, num_inference_steps=, batch=, generator=, **more)` returns latents or pixels in [-1, 1].
        strength: 1: the chain starts from pure noise; less: from noised data, that far up the schedule.
    """

    name: str
    build: Callable[[], DiffusionPipeline]
    call: Callable[..., torch.Tensor]
    strength: float = 1.0

    def sample(
        self, pipeline: DiffusionPipeline, steps: int, batch: int, seed: int = 0, **more: object
    ) -> torch.Tensor:
        """Draws a batch; `more` goes to the pipeline."""
        pipeline.set_progress_bar_config(disable=True)
        torch.manual_seed(
            seed + 1000
        )  # DiT and LDM pipelines pass no generator to `step`; other noise than the latents
        generator = torch.Generator().manual_seed(seed)
        if self.strength < 1:
            more = {"strength": self.strength, **more}
        return self.call(pipeline, num_inference_steps=steps, batch=batch, generator=generator, **more)


# ---- the exact network ----------------------------------------------------------------------------------------------


class NetworkCall(NamedTuple):
    """A call of the network: its timestep, and where the scheduler believed to be (None before the first step)."""

    timestep: float
    position: int | None


@contextmanager
def exact_network(pipeline: DiffusionPipeline, law: Law) -> Iterator[list[NetworkCall]]:
    """Makes the pipeline's network predict exactly, at the timestep it is called with, and lists its calls."""
    network = pipeline.components.get("unet") or pipeline.components["transformer"]
    inputs, outputs = network.config.in_channels, network.config.out_channels or network.config.in_channels
    channels = min(inputs, outputs)
    channel_axis = -1 if isinstance(network, FluxTransformer2DModel) else 1  # Flux packs pixels into tokens
    time_unit = 1000 if isinstance(network, FluxTransformer2DModel) else 1  # and tells its network t / 1000
    calls: list[NetworkCall] = []

    def forward(sample=None, timestep=None, *_, hidden_states=None, return_dict=True, **__):
        sample = hidden_states if sample is None else sample
        assert sample.shape[channel_axis] == inputs
        assert torch.as_tensor(timestep).unique().numel() == 1
        scheduler = pipeline.scheduler
        position = scheduler.begin_index if scheduler.step_index is None else scheduler.step_index
        timestep = torch.as_tensor(timestep).flatten()[0] * time_unit
        calls.append(NetworkCall(timestep.item(), position))
        state = sample.narrow(channel_axis, 0, channels)  # the others are a mask and a masked image
        output = law.prediction(_prediction_type(scheduler), state, *path_point(scheduler, timestep))
        if outputs == 2 * channels:  # the others are a learned variance
            output = torch.cat([output, torch.zeros_like(output)], dim=1)
        return DecoderOutput(sample=output) if return_dict else (output,)

    replaced = {network: forward}
    if "controlnet" in pipeline.components:
        replaced[pipeline.controlnet] = lambda *_, **__: ([], None)  # nothing it could add to an exact prediction
    for each, stand_in in replaced.items():
        each.forward = stand_in
    try:
        yield calls
    finally:
        for each in replaced:
            del each.forward


def _prediction_type(scheduler: SchedulerMixin) -> str:
    """That of a flow-matching scheduler of Diffusers goes without saying."""
    return scheduler.config.get("prediction_type", "flow_prediction")


class Recorded(NamedTuple):
    """A law that keeps what it was asked to predict from: states with their alpha and sigma."""

    law: Law
    seen: list

    def prediction(self, prediction_type: str, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor):
        self.seen.append((x, float(alpha), float(sigma)))
        return self.law.prediction(prediction_type, x, alpha, sigma)


# ---- tiny random components -----------------------------------------------------------------------------------------


def latent_scheduler():
    """Stable Diffusion's, complete, so that nothing of it is left to a default."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def tokenizer():
    letters = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocabulary = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def text_config(hidden_act="quick_gelu"):
    return CLIPTextConfig(
        vocab_size=54,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_attention_heads=2,
        num_hidden_layers=2,
        projection_dim=WIDTH,
        hidden_act=hidden_act,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def autoencoder():
    return AutoencoderKL(
        block_out_channels=(4,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        latent_channels=4,
        norm_num_groups=1,
        scaling_factor=1.0,
        sample_size=SIDE,
    )


def transparent_autoencoder():
    """For pipelines that cannot return latents: what it decodes is what it is given."""
    vae = autoencoder()
    vae.decode = lambda z, **_: DecoderOutput(sample=z)
    return vae


def conditional_unet(in_channels=4, cross_attention_dim=WIDTH, **more):
    return UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=2,
        norm_num_groups=2,
        **more,
    )


# ---- the pipelines --------------------------------------------------------------------------------------------------


def stable_diffusion(pipeline_class=StableDiffusionPipeline, in_channels=4, **more):
    return pipeline_class(
        unet=conditional_unet(in_channels),
        scheduler=latent_scheduler(),
        vae=autoencoder(),
        text_encoder=CLIPTextModel(text_config()),
        tokenizer=tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **more,
    )


def stable_diffusion_xl(pipeline_class=StableDiffusionXLPipeline):
    unet = conditional_unet(
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,  # six numbers on sizes and crops
    )
    return pipeline_class(
        unet=unet,
        scheduler=latent_scheduler(),
        vae=autoencoder(),
        text_encoder=CLIPTextModel(text_config("gelu")),
        tokenizer=tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(text_config("gelu")),
        tokenizer_2=tokenizer(),
        add_watermarker=False,
    )


def stable_diffusion_controlnet():
    controlnet = ControlNetModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        conditioning_embedding_out_channels=(4,),
        norm_num_groups=2,
    )
    return stable_diffusion(StableDiffusionControlNetPipeline, controlnet=controlnet)


def dit():
    transformer = DiTTransformer2DModel(
        sample_size=SIDE,
        num_layers=1,
        patch_size=4,
        attention_head_dim=4,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,  # a learned variance, as published
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    return DiTPipeline(transformer=transformer, vae=transparent_autoencoder(), scheduler=latent_scheduler())


def pixart_alpha():
    transformer = PixArtTransformer2DModel(
        sample_size=SIDE,
        num_layers=1,
        patch_size=4,
        attention_head_dim=4,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=8,
        caption_channels=WIDTH,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
    )
    return PixArtAlphaPipeline(
        transformer=transformer, vae=autoencoder(), scheduler=latent_scheduler(), text_encoder=None, tokenizer=None
    )


def latent_diffusion():
    return LDMTextToImagePipeline(
        vqvae=transparent_autoencoder(),
        bert=CLIPTextModel(text_config()),
        tokenizer=tokenizer(),
        unet=conditional_unet(),
        scheduler=latent_scheduler(),
    )


def ddpm():
    unet = UNet2DModel(
        sample_size=SIDE,
        block_out_channels=(4,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=1,
        attention_head_dim=2,
    )
    return DDPMPipeline(unet=unet, scheduler=DDPMScheduler(clip_sample=False))


def animate_diff():
    adapter = MotionAdapter(
        block_out_channels=(4, 8), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=2
    )
    return AnimateDiffPipeline(
        vae=autoencoder(),
        text_encoder=CLIPTextModel(text_config()),
        tokenizer=tokenizer(),
        unet=conditional_unet(),
        motion_adapter=adapter,
        scheduler=latent_scheduler(),
    )


# ---- how each is called ---------------------------------------------------------------------------------------------

# Guidance is on, so the batch is doubled; as the law knows no condition, it changes nothing.
TEXT = {"prompt": "a cat", "guidance_scale": 3.0, "output_type": "latent"}
SIZE = {"height": SIDE, "width": SIDE}


def data(batch):
    """Latents (B, 4, SIDE, SIDE) from the law, in the place of an image."""
    return LAW.sample((batch, 4, SIDE, SIDE), generator=torch.Generator().manual_seed(99))


def from_text(pipeline, batch, **arguments):
    return pipeline(**TEXT, **SIZE, num_images_per_prompt=batch, **arguments).images


def from_image(pipeline, batch, **arguments):
    return pipeline(**TEXT, image=data(batch), num_images_per_prompt=batch, **arguments).images


def inpainted(pipeline, batch, **arguments):
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., TO_THE_RIGHT] = 1
    image = data(batch)
    return pipeline(
        **TEXT,
        **SIZE,
        image=image,
        mask_image=mask,
        masked_image_latents=image * (1 - mask),
        num_images_per_prompt=batch,
        **arguments,
    ).images


def inpainted_half(pipeline, batch, **arguments):
    return inpainted(pipeline, batch, **arguments)[..., TO_THE_RIGHT]


def from_text_and_edges(pipeline, batch, **arguments):
    edges = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(98))
    return from_text(pipeline, batch, image=edges, **arguments)


def from_class(pipeline, batch, **arguments):
    images = pipeline(class_labels=[7] * batch, guidance_scale=3.0, output_type="pt", **arguments).images
    return 2 * images - 1


def from_embeddings(pipeline, batch, **arguments):
    embeddings = torch.zeros(batch, 5, WIDTH)
    names = ("prompt_embeds", "negative_prompt_embeds")
    masks = ("prompt_attention_mask", "negative_prompt_attention_mask")
    return pipeline(
        prompt=None,
        negative_prompt=None,
        guidance_scale=3.0,
        output_type="latent",
        use_resolution_binning=False,
        **SIZE,
        **dict.fromkeys(names, embeddings),
        **dict.fromkeys(masks, torch.ones(batch, 5)),
        **arguments,
    ).images


def from_text_by_latent_diffusion(pipeline, batch, **arguments):
    size = {"height": 8 * SIDE, "width": 8 * SIDE}  # this pipeline divides by 8 whatever its autoencoder does
    return 2 * pipeline(["a cat"] * batch, guidance_scale=3.0, output_type="pt", **size, **arguments).images - 1


def from_nothing(pipeline, batch, **arguments):
    images = pipeline(batch_size=batch, output_type="np", **arguments).images
    return 2 * torch.from_numpy(images).permute(0, 3, 1, 2) - 1


def video(pipeline, batch, **arguments):
    return pipeline(**TEXT, **SIZE, num_frames=batch, **arguments).frames


PIPELINES = [
    PipelineCase("StableDiffusionPipeline", stable_diffusion, from_text),
    PipelineCase("StableDiffusionXLPipeline", stable_diffusion_xl, from_text),
    PipelineCase(
        "StableDiffusionImg2ImgPipeline",
        lambda: stable_diffusion(StableDiffusionImg2ImgPipeline),
        from_image,
        strength=0.5,
    ),
    PipelineCase(
        "StableDiffusionXLImg2ImgPipeline",
        lambda: stable_diffusion_xl(StableDiffusionXLImg2ImgPipeline),
        from_image,
        strength=0.5,
    ),
    PipelineCase(
        "StableDiffusionInpaintPipeline, 4 channels",
        lambda: stable_diffusion(StableDiffusionInpaintPipeline),
        inpainted_half,
    ),
    PipelineCase(
        "StableDiffusionInpaintPipeline, 9 channels",
        lambda: stable_diffusion(StableDiffusionInpaintPipeline, in_channels=9),
        inpainted_half,
    ),
    PipelineCase("StableDiffusionControlNetPipeline", stable_diffusion_controlnet, from_text_and_edges),
    PipelineCase("DiTPipeline", dit, from_class),
    PipelineCase("PixArtAlphaPipeline", pixart_alpha, from_embeddings),
    PipelineCase("LDMTextToImagePipeline", latent_diffusion, from_text_by_latent_diffusion),
    PipelineCase("DDPMPipeline", ddpm, from_nothing),
    PipelineCase("AnimateDiffPipeline", animate_diff, video),
]
