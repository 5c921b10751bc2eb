"""Evaluates a diffusion pipeline on held-out images.

    python training/evaluate.py --bits-per-dim --pipeline runs/ddpm/pipeline                  # the embedded digits
    accelerate launch training/evaluate.py --bits-per-dim --likelihoods vlb ode --pipeline FOLDER_OR_ID \
        --dataset FOLDER_OR_NAME --steps 1000 100 10 --spacings linspace optimal --variance-types fixed_large optimal

Any pipeline made of a `unet` that sees pixels and a `scheduler`, of annealers or Diffusers. Each process takes its
share of the images, and what is random about an image is a function of (seed, row of the image in the data set). So
the numbers are the same for any number of processes, and the rows of a table meet the same noise where they can.

A metric is asked for by its option:

    --bits-per-dim    negative log-likelihood, by the variational bound or the probability-flow ODE, see
                      `annealers.likelihood`
"""

import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from diffusers import DiffusionPipeline
from diffusers.utils.logging import disable_progress_bar

from annealers import AnnealersPipeline, DDPMAncestralScheduler
from annealers.calibration import calibrate_spacing
from annealers.configuration import config_to_dict, option, parse_config
from annealers.data import DataConfig, ImageData, load_data, train_batches, validation_batches
from annealers.data.config import DataError
from annealers.data.toys import TOY
from annealers.divergence import PROBE_KINDS
from annealers.likelihood import chain_scheduler, log_information, probability_flow_bits, variational_bounds
from annealers.metrics import mean_and_standard_error
from annealers.randomness import PositionalRandomness
from annealers.run import command_line
from annealers.schedulers.gaussian_path import TIMESTEP_SPACINGS
from annealers.schedulers.reverse_variance import TWO_HEADED, VARIANCE_TYPES

LIKELIHOODS = ("vlb", "ode")
EVALUATED_VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range", "optimal")


@dataclass
class EvaluateConfig(DataConfig):
    """What to evaluate, on which data, and by which metrics."""

    config: str | None = option(None, "YAML file of options; the command line overrides it.")
    pipeline: str | None = option(None, "The pipeline: a folder or a name on the Hub. Required.")
    output: str = option("runs/evaluation.json", "File for the results, with the values of each image.")
    seed: int = option(0, "Seed of everything random.")
    samples: int = option(1024, "Held-out images, at most: a fixed choice.")
    batch_size: int = option(64, "Images per network call.")
    class_labels: Literal["data", "null"] = option(
        "data", "What a conditional network is told: the labels of the data, or its null label."
    )

    bits_per_dim: bool = option(False, "Metric: bits per dimension.")
    likelihoods: list[str] = option(["vlb"], f"Which: {', '.join(LIKELIHOODS)}.")
    steps: list[int] = option([], "Bound: numbers of steps; unset, the whole chain.")
    spacings: list[str] = option(["linspace"], "Bound: spacings of fewer steps than the whole chain.")
    variance_types: list[str] = option([], "Bound: variances; unset, that of the scheduler.")
    evaluated_steps: int = option(100, "Bound: steps to compute per image and schedule, besides the last; 0: all.")
    calibration_samples: int = option(128, "Bound: training images to measure 'optimal' spacing and variance on.")
    calibration_timesteps: int = option(100, "Bound: timesteps to measure them at.")
    probes: int = option(1, "Flow: probes per image; 0: the exact divergence.")
    probe_kind: str = option("rademacher", f"Flow: {' or '.join(PROBE_KINDS)}.")
    tolerances: list[float] = option([1e-4], "Flow: relative and absolute tolerances of the solver.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(getattr(self, name) for name in METRICS):
            options = ", ".join(f"--{name.replace('_', '-')}" for name in METRICS)
            raise ValueError(f"no metric is asked for; there are: {options}")
        if self.pipeline is None:
            raise ValueError("--pipeline is required: a folder or a name on the Hub")
        for name, known in (
            ("likelihoods", LIKELIHOODS),
            ("spacings", TIMESTEP_SPACINGS),
            ("variance_types", EVALUATED_VARIANCES),
        ):
            unknown = [value for value in getattr(self, name) if value not in known]
            if unknown:
                raise ValueError(f"{name} must be among {', '.join(known)}, got {', '.join(unknown)}")
        if self.bits_per_dim and self.dataset.startswith(TOY):
            raise ValueError(f"bits per dimension are of images of 256 levels, and {self.dataset} has points")
        if self.probe_kind not in PROBE_KINDS:
            raise ValueError(f"probe_kind must be one of {', '.join(PROBE_KINDS)}, got {self.probe_kind}")
        for name, least in {
            "samples": 2,
            "batch_size": 1,
            "calibration_samples": 2,
            "calibration_timesteps": 2,
        }.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("evaluated_steps", "probes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


class Images(NamedTuple):
    """Held-out images of this process, on its device, and what the network is told of them."""

    rows: list[int]
    images: torch.Tensor
    conditions: dict[str, torch.Tensor]


class Evaluation:
    """What each metric is given: the network, the data, the processes and the randomness."""

    def __init__(self, config: EvaluateConfig) -> None:
        self.config = config
        self.accelerator = Accelerator(mixed_precision="no")
        if not self.accelerator.is_main_process:
            disable_progress_bar()
        self.randomness = PositionalRandomness(config.seed)
        with self.accelerator.main_process_first():  # the others find everything downloaded and prepared
            self.pipeline = AnnealersPipeline.from_pretrained(config.pipeline)
            self.unet, self.scheduler = network_and_scheduler(self.pipeline, config.pipeline)
            self.data = matching_data(config, self.unet)
        self.unet.to(self.accelerator.device).eval().requires_grad_(False)

    @property
    def is_conditional(self) -> bool:
        return self.unet.config.get("num_class_embeds") is not None

    def held_out(self) -> Iterator[Images]:
        """This process's share of the held-out images, in batches that do not depend on the number of processes."""
        config, accelerator = self.config, self.accelerator
        batches = validation_batches(
            self.data,
            config.batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            max_samples=config.samples,
            num_workers=config.num_workers,
        )
        for batch in batches:
            yield Images(batch["rows"].tolist(), batch["images"].to(accelerator.device), self.conditions(batch))

    def training_images(self, count: int) -> Images:
        """A random choice of training images, the same for all processes."""
        batch = next(train_batches(self.data, self.config, self.config.seed, count, last_step=1))
        device = self.accelerator.device
        return Images(batch["rows"].tolist(), batch["images"].to(device), self.conditions(batch))

    def conditions(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        if not self.is_conditional:
            return {}
        null_label = self.pipeline.config.get("null_label")
        if self.config.class_labels == "null":
            if null_label is None:
                raise ValueError("class_labels='null', but the pipeline has no null label: use 'data'")
            labels = torch.full((len(batch["images"]),), null_label)
        elif "labels" not in batch:
            raise ValueError(
                f"the network is class-conditional and {self.data.name!r} has no labels: give --label_column, or "
                "--class_labels null if it has a null label"
            )
        else:
            labels = torch.tensor([self.label_of_network(label) for label in batch["labels"].tolist()])
        return {"class_labels": labels.to(self.accelerator.device)}

    def label_of_network(self, label: int) -> int:
        """The network's id of a class of the data, by name if the pipeline knows names."""
        names = self.pipeline.config.get("id2label")
        if not names:
            classes = self.unet.config["num_class_embeds"]
            if label >= classes:
                raise ValueError(
                    f"class {label} of the data is not one of the network's, which are 0 .. {classes - 1}"
                )
            return label
        ids = {name: int(known) for known, name in names.items()}
        name = (self.data.id2label or {})[label]
        if name not in ids:
            raise ValueError(f"class {name!r} of the data is not one of the network's: {', '.join(ids)}")
        return ids[name]

    def generators(self, rows: list[int], purpose: int) -> list[torch.Generator]:
        """One per image, a function of (seed, row, purpose)."""
        return [torch.Generator().manual_seed(self.randomness.step_seed(row, purpose)) for row in rows]

    def gathered(self, rows: list[int], values: list[torch.Tensor]) -> tuple[list[int], torch.Tensor]:
        """The rows and values, (metrics, n), of all processes, in the order of the rows."""
        mine = list(zip(rows, torch.cat(values, dim=1).T.tolist() if values else [], strict=True))
        everything = sorted(gather_object(mine))
        return [row for row, _ in everything], torch.tensor([value for _, value in everything], dtype=torch.float64).T


def network_and_scheduler(pipeline: DiffusionPipeline, name: str | None) -> tuple[Any, Any]:
    modules = {key for key, component in pipeline.components.items() if isinstance(component, torch.nn.Module)}
    if modules - {"classifier"} != {"unet"} or "scheduler" not in pipeline.components:
        raise ValueError(
            f"need a pipeline of a 'unet' that sees pixels and a 'scheduler', and {name!r} is a "
            f"{type(pipeline).__name__} with {', '.join(sorted(pipeline.components))}"
        )
    return pipeline.components["unet"], pipeline.components["scheduler"]


def matching_data(config: EvaluateConfig, unet: Any) -> ImageData:
    """The data, resized for the network unless `resolution` says otherwise, without labels that it does not take."""
    size = unet.config.get("sample_size")
    if config.resolution is None and isinstance(size, int):
        config = replace(config, resolution=size)
    if unet.config.get("num_class_embeds") is None:
        config = replace(config, label_column="none")
    data = load_data(config)
    if isinstance(size, (list, tuple)):
        size = size[0] if len(set(size)) == 1 else size
    if size not in (None, data.resolution):
        raise DataError(f"the network's images are of size {size}, those of {data.name!r} {data.resolution}")
    if data.channels != unet.config.in_channels:
        raise DataError(
            f"the network's images have {unet.config.in_channels} channels, those of {data.name!r} {data.channels}: "
            f"set --channels {unet.config.in_channels} if they can be converted"
        )
    return data


# ---- bits per dimension ---------------------------------------------------------------------------------------------


@dataclass
class Result:
    """One row of a table: a metric with its settings and its value for each image, by row of the data set."""

    metric: str
    settings: dict[str, Any]
    kind: str
    rows: list[int]
    values: torch.Tensor
    details: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        mean, standard_error = mean_and_standard_error(self.values)
        return {
            "metric": self.metric,
            **self.settings,
            "kind": self.kind,
            "mean": mean,
            "standard_error": standard_error,
            "n": len(self.values),
            **self.details,
            "rows": self.rows,
            "values": self.values.tolist(),
        }


def bits_per_dim(evaluation: Evaluation) -> list[Result]:
    results = []
    if "vlb" in evaluation.config.likelihoods:
        results += bounds(evaluation)
    if "ode" in evaluation.config.likelihoods:
        results += flows(evaluation)
    return results


def bounds(evaluation: Evaluation) -> list[Result]:
    """The variational bound on each schedule with each variance, from the same states where they share levels."""
    config = evaluation.config
    settings, chains = chains_to_evaluate(evaluation)
    rows: list[int] = []
    values: list[torch.Tensor] = []
    kinds = [""] * len(chains)
    for batch in evaluation.held_out():
        computed = variational_bounds(
            evaluation.unet,
            chains,
            batch.images,
            config.evaluated_steps or None,
            evaluation.generators(batch.rows, purpose=0),
            **batch.conditions,
        )
        rows += batch.rows
        parts = [part for bound in computed for part in (bound.values, bound.prior, bound.steps, bound.decoder)]
        values.append(torch.stack(parts).double().cpu())
        kinds = [bound.kind for bound in computed]
    rows, gathered = evaluation.gathered(rows, values)
    results = []
    for setting, kind, (total, *parts) in zip(settings, kinds, gathered.unflatten(0, (-1, 4)), strict=True):
        names = ("prior", "divergences", "decoder")
        means = {name: part.mean().item() for name, part in zip(names, parts, strict=True)}
        results.append(Result("bits_per_dim", setting, kind, rows, total, means))
    add_differences(results)
    return results


def chains_to_evaluate(evaluation: Evaluation) -> tuple[list[dict[str, Any]], list[DDPMAncestralScheduler]]:
    """Each variance on each schedule; a schedule of all train timesteps has no spacing."""
    config, own = evaluation.config, evaluation.scheduler.config.get("variance_type")
    variances = config.variance_types or [VARIANCE_TYPES[own]]
    check_variances(variances, evaluation.unet, VARIANCE_TYPES[own])
    base = chain_scheduler(evaluation.scheduler)
    calibrate(evaluation, base, variance="optimal" in variances, spacing="optimal" in config.spacings)

    settings, chains = [], []
    for steps in config.steps or [len(base)]:
        for spacing in ["all"] if steps == len(base) else config.spacings:
            timesteps = torch.as_tensor(base.train_timesteps[::-1].copy())
            if spacing != "all":
                placed = chain_scheduler(base, timestep_spacing=spacing)
                placed.set_timesteps(steps)
                timesteps = placed.timesteps
            for variance in variances:
                chain = chain_scheduler(base, variance_type=variance)
                chain.set_timesteps(timesteps=timesteps)
                chains.append(chain)
                settings.append({"likelihood": "vlb", "steps": steps, "spacing": spacing, "variance_type": variance})
    return settings, chains


def check_variances(variances: list[str], unet: Any, own: str) -> None:
    """A learned variance is what the second half of the channels was trained as."""
    C, out = unet.config.in_channels, unet.config.out_channels
    for variance in variances:
        if variance in TWO_HEADED and out != 2 * C:
            raise ValueError(f"variance {variance!r} needs a network with {2 * C} output channels, this one has {out}")
        if variance in TWO_HEADED and own in TWO_HEADED and variance != own:
            raise ValueError(f"variance {variance!r} is not what the network was trained for, which is {own!r}")


def calibrate(evaluation: Evaluation, base: DDPMAncestralScheduler, variance: bool, spacing: bool) -> None:
    """Measures on training images what "optimal" needs, by the main process for all; keeps what is in the config."""
    variance = variance and base.config.mean_squared_noise is None
    spacing = spacing and base.config.denoising_error is None
    if not (variance or spacing):
        return
    config = evaluation.config
    if evaluation.accelerator.is_main_process:
        training = evaluation.training_images(config.calibration_samples)
        timesteps = timesteps_to_measure(base, config.calibration_timesteps)
        network = in_batches(evaluation.unet, config.batch_size, training.images.shape[1])
        generator = torch.Generator().manual_seed(evaluation.randomness.step_seed(0, 2))
        plain = chain_scheduler(base, variance_type="fixed_small")
        if spacing:
            calibrate_spacing(plain, network, training.images, timesteps, generator, **training.conditions)
        if variance:
            plain.calibrate_variance(network, training.images, timesteps, generator, **training.conditions)
        measured = [plain.config.mean_squared_noise, plain.config.denoising_error]
    else:
        measured = [None, None]
    mean_squared_noise, denoising_error = broadcast_object_list(measured)
    base.register_to_config(mean_squared_noise=mean_squared_noise, denoising_error=denoising_error)


def timesteps_to_measure(chain: DDPMAncestralScheduler, count: int) -> list[int]:
    """About `count` train timesteps, half of them even in t and half in log(1 + SNR), with both ends."""
    everywhere = chain.train_timesteps
    even = np.linspace(everywhere[0], everywhere[-1], max(2, count // 2))
    information = log_information(chain, torch.as_tensor(everywhere))[::-1]  # increasing
    wanted = np.linspace(information[0], information[-1], count - count // 2)
    informative = np.interp(wanted, information, everywhere[::-1])
    return sorted({int(t) for t in np.concatenate([even, informative]).round()})


def in_batches(network: Callable[..., Any], size: int, channels: int) -> Callable[..., torch.Tensor]:
    """The network, called on `size` images at a time, without a learned variance."""

    def predict(x: torch.Tensor, t: torch.Tensor, **conditions: torch.Tensor) -> torch.Tensor:
        outputs = []
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            told = {name: condition[part] for name, condition in conditions.items()}
            outputs.append(network(x[part], t, **told).sample[:, :channels])
        return torch.cat(outputs)

    return predict


def flows(evaluation: Evaluation) -> list[Result]:
    """The probability-flow ODE with each tolerance, on the same dequantised images with the same probes."""
    config, results = evaluation.config, []
    for tolerance in config.tolerances:
        rows: list[int] = []
        values: list[torch.Tensor] = []
        kind = ""
        for batch in evaluation.held_out():
            computed = probability_flow_bits(
                evaluation.unet,
                evaluation.scheduler,
                batch.images,
                config.probes or None,
                config.probe_kind,
                tolerance,
                tolerance,
                evaluation.generators(batch.rows, purpose=1),
                **batch.conditions,
            )
            rows += batch.rows
            values.append(torch.stack([computed.values, computed.calls]).double().cpu())
            kind = computed.kind
        rows, (bits, calls) = evaluation.gathered(rows, values)
        settings = {"likelihood": "ode", "tolerance": tolerance, "probes": config.probes}
        results.append(Result("bits_per_dim", settings, kind, rows, bits, {"calls": calls.mean().item()}))
    return results


METRICS: dict[str, Callable[[Evaluation], list[Result]]] = {"bits_per_dim": bits_per_dim}


# ---- what is printed and written ------------------------------------------------------------------------------------


def add_differences(results: list[Result]) -> None:
    """Compares each bound with that of the most steps and the same variance, image by image."""
    longest: dict[str, Result] = {}
    for result in results:
        if result.settings.get("likelihood") == "vlb":
            known = longest.setdefault(result.settings["variance_type"], result)
            if result.settings["steps"] > known.settings["steps"]:
                longest[result.settings["variance_type"]] = result
    for result in results:
        reference = longest.get(result.settings.get("variance_type", ""))
        if reference is not None and reference is not result:
            mean, standard_error = mean_and_standard_error(result.values - reference.values)
            result.details["difference"] = {
                "to_steps": reference.settings["steps"],
                "mean": mean,
                "standard_error": standard_error,
            }


def table(results: list[Result]) -> str:
    """One line per result: settings, mean ± standard error, and the difference to the bound of the most steps."""
    lines = []
    for result in results:
        mean, standard_error = mean_and_standard_error(result.values)
        settings = " ".join(f"{name}={value}" for name, value in result.settings.items())
        line = f"{result.metric}  {settings:<75} {mean:8.4f} ± {standard_error:.4f}  n={len(result.values)}"
        difference = result.details.get("difference")
        if difference is not None:
            line += "  {mean:+.4f} ± {standard_error:.4f} to {to_steps} steps".format(**difference)
        lines.append(line)
    return "\n".join(lines)


def record(evaluation: Evaluation, results: list[Result], seconds: float) -> dict[str, Any]:
    config, accelerator, data = evaluation.config, evaluation.accelerator, evaluation.data
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else platform.processor() or "CPU"
    return {
        "pipeline": config.pipeline,
        "dataset": data.name,
        "resolution": data.resolution,
        "channels": data.channels,
        "command": command_line(sys.argv),
        "config": config_to_dict(config),
        "seconds": seconds,
        "hardware": f"{accelerator.num_processes} x {device}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("annealers", "torch", "diffusers", "accelerate")},
        "results": [result.as_dict() for result in results],
    }


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(EvaluateConfig, arguments, __doc__.splitlines()[0])
    started = time.perf_counter()
    evaluation = Evaluation(config)
    results = [result for name, metric in METRICS.items() if getattr(config, name) for result in metric(evaluation)]
    if evaluation.accelerator.is_main_process:
        output = Path(config.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        written = record(evaluation, results, time.perf_counter() - started)
        output.write_text(json.dumps(written, indent=1) + "\n")
        print(f"{table(results)}\nresults: {output}")
    evaluation.accelerator.wait_for_everyone()
    evaluation.accelerator.end_training()


if __name__ == "__main__":
    main()
