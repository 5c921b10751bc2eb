"""Images from a diffusion model: unconditional, class-conditional, guided by a classifier or without one.

In the pixels of images or, with a `vae`, in its latents, from which it decodes the images.

**Classifier-free guidance.** One network is trained with its class label and, now and then, with a null label in its
place. At each step it is asked both questions, and the answers are extrapolated,

    eps_w = eps_u + w (eps_c - eps_u),        w = 0: unconditional,   w = 1: conditional,   w > 1: guided.

Source: Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", arXiv:2207.12598, Eq. 6. Beware: their w is ours - 1.

**Classifier guidance.** Any network, conditional or not, is led to a class y by the gradient of a classifier
p(y | x_t) of noisy images; see `classifier_guidance`. The two add up:

    eps_w - w_y sigma_t grad log p(y | x_t)

Source: Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", arXiv:2105.05233, Eq. 14.

**Latent diffusion.** The network draws x_0 = f (z - b), the scaled latents of an autoencoder, and the image is
decoder(x_0 / f + b); see `latent_space`.

Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv:2112.10752, Sec. 3.

    symbol    code                      shape           meaning
    x_t       sample                    (B, C, H, W)    state; noise at first, the image in [-1, 1] or latents at last
    eps_c     conditional               (B, C, H, W)    prediction given the class
    eps_u     unconditional             (B, C, H, W)    prediction given the null class
    w         guidance_scale            ()
    w_y       classifier_scale          ()
    x̂_0       pred_original_sample      (B, C, H, W)    the scheduler's prediction of the last state at a step

"eps" stands for what the network was trained to predict: noise, x_0, velocity or score. All are affine in eps_u and
eps_c with the same coefficients, so classifier-free guidance is the same for each. What a classifier adds is not.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from annealers.pipelines.annealers_pipeline import AnnealersPipeline
from annealers.pipelines.class_labels import ClassLabels, common_batch_size, label_ids, with_integer_ids
from annealers.pipelines.classifier_guidance import classifier_guidance
from annealers.pipelines.image_inputs import check_output_type
from annealers.pipelines.latent_space import images_of_latents, latent_channels

LEARNED_VARIANCES = ("learned", "learned_range", "posterior")
CLASS_COUNTS = {
    "network": "unet.config.num_class_embeds",
    "classifier": "classifier.config.num_classes",
    "vae": "vae.config.num_class_embeds",
}

Generators = torch.Generator | list[torch.Generator]


@dataclass
class Trajectory:
    """The states that a run went through, on the CPU: in the range [-1, 1] of images, or latents.

    Args:
        samples: x_t before the first step, then after each: (N + 1, B, C, H, W).
        predictions: x̂_0 as each step saw it: (N, B, C, H, W). None if the scheduler does not return it.
        timesteps: The train timestep of each step: (N,).
    """

    samples: torch.Tensor
    predictions: torch.Tensor | None
    timesteps: torch.Tensor


@dataclass
class GuidedDiffusionPipelineOutput(BaseOutput):
    """What the pipeline returns.

    Args:
        images: A list of B PIL images, or an array (B, H, W, C) or tensor (B, C, H, W) in [0, 1], or the final state.
        trajectory: The states on the way, if they were asked for.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    trajectory: Trajectory | None = None


class GuidedDiffusionPipeline(AnnealersPipeline):
    """Draws images with any scheduler of annealers or Diffusers.

    Args:
        unet: A network called as `unet(x_t, t, class_labels=...)`, such as `UNet2DModel`. For K classes and guidance
            it has `num_class_embeds = K + 1`. If it has 2C output channels the second half is a learned variance.
        scheduler: The sampler.
        id2label: Name of each class id.
        null_label: Id that stands for "no class" in training, usually K; None if the network knows none.
        classifier: A classifier of noisy images, such as `NoisyClassifierModel`, called as
            `classifier(x_t, t, return_dict=False)`, with `config.num_classes`; only needed for `classifier_scale`.
        vae: The autoencoder whose scaled latents the network draws, such as `VAEModel` or Diffusers' `AutoencoderKL`
            or, with a codebook to which it rounds what it decodes, `VQVAEModel` or Diffusers' `VQModel`. One that has
            classes, `config.num_class_embeds`, is told those of the images. None if the network draws images.

    Raises:
        ValueError: If `id2label` or `null_label` are not among the classes of the network, or, where that has none,
            of the classifier. Without either, names mean nothing, and are kept for the classifier to come.

    Example:
        >>> from diffusers import UNet2DModel
        >>> import annealers
        >>> unet = UNet2DModel(
        ...     sample_size=8, in_channels=1, out_channels=1, num_class_embeds=3, block_out_channels=(32, 32),
        ...     layers_per_block=1,
        ...     down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"))
        >>> names = {0: "cat", 1: "dog"}
        >>> pipeline = annealers.GuidedDiffusionPipeline(unet, annealers.DDPMAncestralScheduler(), names, null_label=2)
        >>> pipeline.set_progress_bar_config(disable=True)
        >>> images = pipeline(class_labels=["dog", "cat"], guidance_scale=2.0, num_inference_steps=4).images
        >>> len(images), images[0].size
        (2, (8, 8))
    """

    __module__ = "annealers"  # its public name

    model_cpu_offload_seq = "unet->classifier->vae"
    _optional_components = ["classifier", "vae"]
    _callback_tensor_inputs = ["latents", "class_labels"]

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        id2label: dict[int, str] | dict[str, str] | None = None,
        null_label: int | None = None,
        classifier: ModelMixin | None = None,
        vae: ModelMixin | None = None,
    ) -> None:
        super().__init__(unet=unet, scheduler=scheduler, classifier=classifier, vae=vae)
        num_embeds = unet.config.get("num_class_embeds") or 0
        if id2label is not None:
            id2label = with_integer_ids(id2label)
            num_classes, whose = self._classes  # None if it was saved with a classifier, as may be
            if num_classes is not None and not all(0 <= label < num_classes for label in id2label):
                raise ValueError(f"id2label names {sorted(id2label)}, but {CLASS_COUNTS[whose]}={num_classes}")
        if null_label is not None and not 0 <= null_label < num_embeds:
            raise ValueError(f"null_label={null_label} is not below unet.config.num_class_embeds={num_embeds}")
        self._register_class_names(id2label)
        self.null_label = null_label
        self.register_to_config(null_label=null_label)

    # ---- the settings of the current run, which a callback may read or change ---------------------------------------

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def classifier_scale(self) -> float:
        return self._classifier_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    # ---- arguments --------------------------------------------------------------------------------------------------

    def label_ids(self, class_labels: ClassLabels) -> list[int]:
        """Class ids of one or several labels, each an id or a name.

        Raises:
            ValueError: If a label is not a class of this model; the null label is not one.
        """
        num_classes, whose = self._classes
        names = self.id2label or self._names_of_classifier
        return label_ids(class_labels, names, num_classes, self.null_label, whose)

    @property
    def _classes(self) -> tuple[int | None, str]:
        """The number of class ids, and whose: the network's or, if it has none, the classifier's or the vae's."""
        num_classes = self.unet.config.get("num_class_embeds")
        if num_classes is not None:
            return num_classes, "network"
        if self.classifier is not None:
            return self.classifier.config.num_classes, "classifier"
        return self._classes_of_vae, "vae" if self._classes_of_vae is not None else "network"

    @property
    def _classes_of_vae(self) -> int | None:
        return None if self.vae is None else self.vae.config.get("num_class_embeds")

    @property
    def _names_of_classifier(self) -> dict[int, str]:
        names = None if self.classifier is None else self.classifier.config.get("id2label")
        return with_integer_ids(names or {})

    def _run_size(
        self,
        batch_size: int | None,
        class_labels: ClassLabels | None,
        generator: Generators | None,
        latents: torch.Tensor | None,
    ) -> int:
        """B, which every argument that has a length must agree on; 1 if none has."""
        return common_batch_size(
            class_labels,
            batch_size,
            generator=len(generator) if isinstance(generator, list) else None,
            latents=None if latents is None else len(latents),
        )

    def _check_guidance(
        self, class_labels: ClassLabels | None, guidance_scale: float, classifier_scale: float
    ) -> None:
        if not (math.isfinite(guidance_scale) and math.isfinite(classifier_scale)):
            raise ValueError(f"guidance scales must be finite, got {guidance_scale} and {classifier_scale}")
        conditional = self._network_is_conditional
        if class_labels is None and guidance_scale not in (0, 1):
            raise ValueError(f"guidance_scale={guidance_scale} needs class_labels to guide towards")
        if conditional and self.null_label is None and (class_labels is None or guidance_scale != 1):
            raise ValueError(
                f"the network is class-conditional and has no null label: it needs class_labels and guidance_scale=1, "
                f"got class_labels={class_labels} and guidance_scale={guidance_scale}"
            )

        if not conditional and class_labels is not None:
            if guidance_scale not in (0, 1):
                raise ValueError(f"guidance_scale={guidance_scale} needs a network with classes, this one has none")
            if classifier_scale == 0 and self._classes_of_vae is None:
                raise ValueError(
                    f"class_labels={class_labels} mean nothing here: the network has no classes "
                    "(num_class_embeds=None), and classifier_scale=0"
                )
        if classifier_scale != 0:
            self._check_classifier(class_labels, classifier_scale)

    def _check_classifier(self, class_labels: ClassLabels | None, classifier_scale: float) -> None:
        if self.classifier is None:
            raise ValueError(f"classifier_scale={classifier_scale} needs a classifier, and this pipeline has none")
        if class_labels is None:
            raise ValueError(f"classifier_scale={classifier_scale} needs class_labels to guide towards")
        ids, num_classes = self.label_ids(class_labels), self.classifier.config.num_classes
        if max(ids, default=0) >= num_classes:
            raise ValueError(f"class label {max(ids)} is not one of the {num_classes} classes of the classifier")
        ours, theirs = self.id2label or {}, self._names_of_classifier
        different = {i: (ours[i], theirs[i]) for i in ours.keys() & theirs.keys() if ours[i] != theirs[i]}
        if different:
            raise ValueError(f"the pipeline and its classifier name classes differently, as (ours, its): {different}")

    def _check_vae(self, class_labels: ClassLabels | None, output_type: str) -> None:
        if self.vae is None:
            return
        drawn, decoded = self.unet.config.in_channels, latent_channels(self.vae)
        if drawn != decoded:
            raise ValueError(f"the network draws latents of {drawn} channels, and the vae decodes those of {decoded}")
        if self.scheduler.config.get("clip_sample"):
            raise ValueError(
                f"the {type(self.scheduler).__name__} clips x̂_0 as that of an image, and latents have no such range: "
                "make it with clip_sample=False"
            )
        num_classes = self._classes_of_vae
        if num_classes is None or output_type == "latent":
            return
        if class_labels is None:
            raise ValueError(f"the vae has {num_classes} classes: it needs class_labels, or output_type='latent'")
        ids = self.label_ids(class_labels)
        if max(ids, default=0) >= num_classes:
            raise ValueError(f"class label {max(ids)} is not one of the {num_classes} classes of the vae")

    @property
    def _network_is_conditional(self) -> bool:
        return self.unet.config.get("num_class_embeds") is not None

    def _check_output_type(self, output_type: str) -> None:
        channels, whose = self.unet.config.in_channels, "network"
        if self.vae is not None:
            channels, whose = self.vae.config.in_channels, "vae"
        check_output_type(output_type, channels, whose)

    def _initial_sample(
        self, batch_size: int, generator: Generators | None, latents: torch.Tensor | None
    ) -> torch.Tensor:
        """Where the chain starts, as a rule unit noise; a half-precision network is still sampled in float32."""
        channels, size = self.unet.config.in_channels, self.unet.config.sample_size
        device, dtype = self._execution_device, torch.promote_types(self.unet.dtype, torch.float32)
        if latents is None:
            if size is None:
                raise ValueError("unet.config.sample_size is None: pass the initial noise as latents=(B, C, H, W)")
            height, width = (size, size) if isinstance(size, int) else size
            shape = (batch_size, channels, height, width)
            draw = getattr(self.scheduler, "terminal_sample", randn_tensor)  # of a process that does not end in noise
            latents = draw(shape, generator=generator, device=device, dtype=dtype)
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(f"latents must have the shape (B, {channels}, H, W), got {tuple(latents.shape)}")
        return latents.to(device, dtype) * getattr(self.scheduler, "init_noise_sigma", 1.0)  # a flow has none

    def _set_timesteps(self, num_inference_steps: int, timesteps: Sequence[int] | None) -> int:
        """Sets the scheduler up and returns the number of noise levels; `order` entries of its schedule make one."""
        if timesteps is None:
            self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
            return num_inference_steps
        if "timesteps" not in inspect.signature(self.scheduler.set_timesteps).parameters:
            raise ValueError(f"{type(self.scheduler).__name__}.set_timesteps takes no timesteps, got {timesteps}")
        self.scheduler.set_timesteps(timesteps=timesteps, device=self._execution_device)
        return math.ceil(len(self.scheduler.timesteps) / self.scheduler.order)

    # ---- sampling ---------------------------------------------------------------------------------------------------

    def guided_prediction(
        self,
        sample: torch.Tensor,
        t: torch.Tensor,
        class_labels: torch.Tensor | None,
        null_labels: torch.Tensor | None,
    ) -> torch.Tensor:
        """eps_u + w (eps_c - eps_u) at x_t, and what the classifier adds to it.

        One network call if w is 0 or 1, else one call on the doubled batch; no call of the classifier if w_y is 0.

        Args:
            sample: x_t as the scheduler keeps it, (B, C, H, W).
            t: Train timestep, ().
            class_labels: Class ids, (B,); None if neither network nor classifier is asked for a class.
            null_labels: The null label B times, (B,); None for a network without one.

        Returns:
            (B, C, H, W), or (B, 2C, H, W) for a scheduler that takes the learned variance. The variance is never
            extrapolated: it is that of the conditional answer, or of the only one.
        """
        w, C = self.guidance_scale, sample.shape[1]
        x_t = self._as_seen(sample, t)
        x = x_t.to(self.unet.dtype)
        if w == 1:
            labels = class_labels if self._network_is_conditional else None
            output = self._network(x, t, labels).to(sample.dtype)
        elif w == 0:
            output = self._network(x, t, null_labels).to(sample.dtype)
        else:
            labels = torch.cat([null_labels, class_labels])  # (2B,)
            unconditional, conditional = self._network(torch.cat([x, x]), t, labels).to(sample.dtype).chunk(2)
            eps_u, eps_c = unconditional[:, :C], conditional[:, :C]
            output = torch.cat([eps_u + w * (eps_c - eps_u), conditional[:, C:]], dim=1)

        if self.classifier_scale != 0:
            guidance = classifier_guidance(self.classifier, self.scheduler, x_t, t, class_labels)
            output = torch.cat([output[:, :C] + self.classifier_scale * guidance, output[:, C:]], dim=1)
        return output if self.scheduler.config.get("variance_type") in LEARNED_VARIANCES else output[:, :C]

    def _as_seen(self, sample: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t for the networks. Schedulers of flows in Diffusers have no `scale_model_input`: it is the state."""
        scale_model_input = getattr(self.scheduler, "scale_model_input", None)
        return sample if scale_model_input is None else scale_model_input(sample, t)

    def _network(self, x: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        """One call, checked: a scheduler would broadcast wrong channels without complaint."""
        output = self.unet(x, t, class_labels=class_labels, return_dict=False)[0]
        C, variance_type = x.shape[1], self.scheduler.config.get("variance_type")
        allowed = (2 * C,) if variance_type in LEARNED_VARIANCES else (C, 2 * C)
        if output.shape[1] not in allowed:
            raise ValueError(
                f"the network returned {output.shape[1]} channels for {C} input channels; a scheduler with "
                f"variance_type={variance_type!r} needs {' or '.join(map(str, allowed))}"
            )
        return output

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: ClassLabels | None = None,
        guidance_scale: float = 1.0,
        classifier_scale: float = 0.0,
        num_inference_steps: int = 50,
        timesteps: Sequence[int] | None = None,
        generator: Generators | None = None,
        latents: torch.Tensor | None = None,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
        return_trajectory: bool = False,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> GuidedDiffusionPipelineOutput | tuple:
        """Draws a batch of images.

        Args:
            batch_size: Number of images, B. Taken from `class_labels`, `generator` or `latents` if they have a length;
                1 if none does.
            class_labels: One label for all images or one per image, each a class id or a name of `id2label`. None
                draws from the null class. They are also what the classifier and a conditional vae are asked for.
            guidance_scale: w. 1 follows the condition and 0 ignores it, both with one network call per step.
            classifier_scale: w_y. 0 does without the classifier; with guidance_scale=0 or an unconditional network, 1
                follows the class as the classifier knows it, and more exaggerates it.
            num_inference_steps: Number of noise levels, N.
            timesteps: Train timesteps to use instead, decreasing.
            generator: One for the batch, or a list with one per image; with a list no image depends on the others.
            latents: Initial state, (B, C, H, W), by Diffusers' name for it: standard normal noise or, of cold
                diffusion, degraded images. Drawn if None.
            eta: Passed to schedulers that have it, as `DDIMScheduler`; the others ignore it.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W), both in [0, 1], or "latent", the state itself,
                which a vae does not decode.
            return_dict: Return a `GuidedDiffusionPipelineOutput` rather than a tuple.
            return_trajectory: Also return the states on the way; those of latents are for `decode_latents`.
            callback_on_step_end: Called as `callback(pipeline, i, t, tensors)` after each entry of the schedule; it
                returns the dict of tensors to go on with, and may set `pipeline._interrupt = True`.
            callback_on_step_end_tensor_inputs: Names of those tensors, of "latents" and "class_labels".

        Returns:
            The images, and the trajectory if it was asked for.

        Raises:
            ValueError: If the arguments disagree on B, a label is unknown, guidance is asked of a model without a null
                label or classifier, or the output type does not exist for this number of channels.
        """
        callback_inputs = self._callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self._check_output_type(output_type)
        self._check_guidance(class_labels, guidance_scale, classifier_scale)
        self._check_vae(class_labels, output_type)
        batch_size = self._run_size(batch_size, class_labels, generator, latents)

        self._keep_settings(guidance_scale, classifier_scale)
        class_labels, null_labels = self._label_tensors(class_labels, batch_size)

        num_levels = self._set_timesteps(num_inference_steps, timesteps)
        schedule = self.scheduler.timesteps
        self._num_timesteps = len(schedule)
        num_warmup_steps = len(schedule) - num_levels * self.scheduler.order

        sample = self._initial_sample(batch_size, generator, latents)
        offered = {"generator": generator, "eta": eta}
        accepted = inspect.signature(self.scheduler.step).parameters
        step_kwargs = {name: value for name, value in offered.items() if name in accepted}

        states, predictions = [sample], []
        with self.progress_bar(total=num_levels) as progress_bar:
            for i, t in enumerate(schedule):
                if self.interrupt:
                    continue
                model_output = self.guided_prediction(sample, t, class_labels, null_labels)
                step = self.scheduler.step(model_output, t, sample, **step_kwargs)
                sample = step.prev_sample

                if callback_on_step_end is not None:
                    tensors = {"latents": sample, "class_labels": class_labels}
                    tensors |= callback_on_step_end(self, i, t, {name: tensors[name] for name in callback_inputs})
                    sample, class_labels = tensors["latents"], tensors["class_labels"]

                if return_trajectory:
                    states.append(sample.cpu())
                    if "pred_original_sample" in step:  # the schedulers that know x̂_0 say so
                        predictions.append(step.pred_original_sample.cpu())

                if i == len(schedule) - 1 or (i + 1 > num_warmup_steps and (i + 1) % self.scheduler.order == 0):
                    progress_bar.update()

        if self.vae is not None and output_type != "latent":
            sample = self.decode_latents(sample, class_labels)
        images = self.image_processor.postprocess(sample, output_type=output_type)
        self.maybe_free_model_hooks()

        trajectory = _trajectory(states, predictions, schedule) if return_trajectory else None
        if not return_dict:
            return (images, trajectory) if return_trajectory else (images,)
        return GuidedDiffusionPipelineOutput(images=images, trajectory=trajectory)

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor, class_labels: ClassLabels | None = None) -> torch.Tensor:
        """Images (B, C, H, W) in [-1, 1] of scaled latents, such as the states and predictions of a trajectory.

        Args:
            latents: As the network draws them, (B, C_z, h, w).
            class_labels: Of a vae that has classes: one label for all or one each.

        Raises:
            ValueError: If there is no vae, or a label is unknown.
        """
        if self.vae is None:
            raise ValueError("this pipeline draws images: it has no vae to decode latents with")
        latents, labels = latents.to(self._execution_device), None
        if self._classes_of_vae is not None and class_labels is not None:
            labels = self._label_tensor(self.label_ids(class_labels), len(latents))
        return images_of_latents(self.vae, latents, labels)

    def _callback_inputs(self, callback: object, names: Sequence[str]) -> Sequence[str]:
        """The names of the tensors that the callback is given."""
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            names = callback.tensor_inputs
        unknown = set(names) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(f"callback tensors must be of {self._callback_tensor_inputs}, got {sorted(unknown)}")
        return names

    def _keep_settings(self, guidance_scale: float, classifier_scale: float) -> None:
        """Where a callback finds them."""
        self._guidance_scale, self._classifier_scale, self._interrupt = guidance_scale, classifier_scale, False

    def _label_tensors(
        self, class_labels: ClassLabels | None, batch_size: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The class ids of a run and its null labels, (B,) each; without class labels both are the null label."""
        null_labels = self._label_tensor(self.null_label, batch_size)
        if class_labels is None:
            return null_labels, null_labels
        return self._label_tensor(self.label_ids(class_labels), batch_size), null_labels

    def _label_tensor(self, label_ids: int | list[int] | None, batch_size: int) -> torch.Tensor | None:
        """(B,) class ids on the device of the network, from one for all or one each."""
        if label_ids is None:
            return None
        return torch.tensor(label_ids, device=self._execution_device).reshape(-1).expand(batch_size)


def _trajectory(states: list[torch.Tensor], predictions: list[torch.Tensor], schedule: torch.Tensor) -> Trajectory:
    steps = len(states) - 1
    return Trajectory(
        samples=torch.stack([state.cpu() for state in states]),  # (N + 1, B, C, H, W)
        predictions=torch.stack(predictions) if steps > 0 and len(predictions) == steps else None,  # (N, B, C, H, W)
        timesteps=schedule[:steps].cpu(),
    )
