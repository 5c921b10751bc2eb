"""The run loop of every training script.

A script describes a `Task`: what is trained (an `nn.Module` whose `forward` returns named per-sample terms), what is
drawn at random for a batch, how it is validated, pictured and turned into a pipeline. The loop does the rest, the same
way for one process and for many:

    for step in steps:                                  # one optimizer step, batch_size images over all processes
        for micro_batch in the accumulation of it:
            terms = objective(**draws(micro_batch))     # {"loss": (B,), ...}
            backward(mean of terms["loss"])
        clip each group of parameters, optimizer step, learning-rate step, what the task learns from the terms, EMA

Rows, flips, noise and timesteps of a batch are functions of (seed, position in the run), so one process, several
processes and any accumulation train the same weights, and a resumed run continues bit for bit.
"""

import json
import math
import platform
import shlex
import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import ProjectConfiguration, gather_object, is_wandb_available
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from annealers.checkpoint import Checkpoints, whole_folder
from annealers.configuration import RunConfig, check_same_run, config_to_dict, save_config
from annealers.data import ImageData, load_data, train_batches, validation_batches
from annealers.ema import EMA
from annealers.hub import model_card, push_folder, without_secrets
from annealers.randomness import PositionalRandomness

Batch = dict[str, Any]
Terms = dict[str, torch.Tensor]


class NonFiniteLossError(RuntimeError):
    """The loss of a step was infinite or not a number."""


class Task(ABC):
    """What a training script adds to the loop."""

    pipeline_tag = "unconditional-image-generation"
    tags: tuple[str, ...] = ()

    def __init__(self, config: RunConfig, data: ImageData, randomness: PositionalRandomness) -> None:
        self.config, self.data, self.randomness = config, data, randomness

    @property
    def shown_data(self) -> ImageData:
        """The data with held-out rows, which are those of training if none are held out."""
        return self.data if self.data.validation is not None else replace(self.data, validation=self.data.train)

    def shown_batch(self, count: int) -> Batch:
        """At most `count` images for a picture, the same each time and on every process."""
        (batch,) = validation_batches(self.shown_data, count, max_samples=count)
        return batch

    @abstractmethod
    def build(self) -> nn.Module:
        """A new objective: a module with the network as `.network`, whose `forward(**draws)` returns terms (B,)."""

    @abstractmethod
    def draws(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The arguments of the objective for a batch of data, with everything that is random in them."""

    def parameter_groups(self, objective: nn.Module) -> list[dict[str, Any]]:
        """Groups of parameters as `torch.optim` takes them, with options of their own; each is clipped on its own.

        Two players of a game are two groups, so that the gradient of one does not shorten the steps of the other.
        """
        return [{"params": list(objective.parameters())}]

    def before_first_step(self, objective: nn.Module, accelerator: Accelerator) -> None:  # noqa: B027 (as below)
        """Called by all processes with the prepared objective when a run begins, but not when one is resumed.

        What starts from the data is set here, the same on every process: a codebook, say.
        """

    def after_step(  # noqa: B027 (most tasks do nothing here)
        self, step: int, terms: list[Terms], accelerator: Accelerator
    ) -> None:
        """Called by all processes after optimizer step k = 0, 1, ...; by default nothing happens.

        What is learnt here must be in buffers of the objective, to be part of the checkpoint, and depend on the terms
        only by way of `in_order_of_positions`, to be the same on every process.

        Args:
            step: k.
            terms: The detached terms of each of this process's micro-batches, (b,) each.
            accelerator: To communicate with the other processes.
        """

    def before_saving(self, objective: nn.Module, accelerator: Accelerator) -> None:  # noqa: B027 (as above)
        """Called by all processes at the end, with the averaged weights in place, in evaluation mode, ungraded.

        What is measured here for the pipeline, a scale of the latents, say, is kept by the task: `pipeline` is called
        next, in the main process, with an objective built anew from the weights.
        """

    @abstractmethod
    def validate(self, objective: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """Named numbers on the held-out split; called by all processes, each does its share."""

    @abstractmethod
    def picture(self, objective: nn.Module, accelerator: Accelerator) -> Image.Image:
        """A grid of samples from fixed noise; called by all processes, each draws its share."""

    @abstractmethod
    def pipeline(self, objective: nn.Module) -> DiffusionPipeline:
        """The pipeline around a trained objective."""

    @abstractmethod
    def example(self) -> str:
        """The line of Python that makes `images` with the `pipeline`, for the card."""


class Run:
    """One run: its folder, processes, checkpoints, metrics and record.

    Args:
        config: The options.
        task_class: The script's `Task`.
    """

    losses: tuple[str, ...] = ("loss",)  # beside the progress bar

    def __init__(self, config: RunConfig, task_class: type[Task]) -> None:
        self.config = config
        self.folder = Path(config.output_dir)
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            step_scheduler_with_optimizer=False,  # the schedule counts optimizer steps, on any number of processes
            log_with=trackers(config.report_to),
            project_config=ProjectConfiguration(project_dir=str(self.folder), logging_dir=str(self.folder / "logs")),
        )
        self.is_main = self.accelerator.is_main_process
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.accelerator.main_process_first():  # the others find the data set prepared
            self.data = load_data(config)
        self.randomness = PositionalRandomness(config.seed)
        self.task = task_class(config, self.data, self.randomness)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.accelerator, keep=config.keep_checkpoints)
        self.seconds = 0.0

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def train(self) -> Path:
        """Trains, validates, draws and saves; returns the folder of the pipeline."""
        config, accelerator = self.config, self.accelerator
        torch.manual_seed(config.seed)  # the initial weights
        optimizers = self._prepare()
        objective = self.objective
        ema = EMA(objective, decay=config.ema_decay, warmup=config.ema_warmup)
        first_step = self._resume(ema)
        if first_step == 0:
            self.task.before_first_step(objective, accelerator)
            ema = EMA(objective, decay=config.ema_decay, warmup=config.ema_warmup)
        lr_schedulers = [
            get_scheduler(
                config.lr_scheduler,
                optimizer.optimizer,
                num_warmup_steps=config.lr_warmup_steps,
                num_training_steps=config.max_steps,
                last_epoch=first_step - 1,
            )
            for optimizer in optimizers
        ]
        self._start_logs(first_step)

        batches = self._batches(first_step)
        meter, guard = Meter(accelerator), FiniteGuard()
        started = time.perf_counter() - self.seconds
        steps = range(first_step, config.max_steps)
        bar = tqdm(steps, "training", initial=first_step, total=config.max_steps, disable=not self.is_main)
        objective.train()
        for step in bar:
            torch.manual_seed(self.randomness.step_seed(step, accelerator.process_index))  # what dropout draws from
            step_terms = self._take_step(step, batches, optimizers, meter, guard)
            for lr_scheduler in lr_schedulers:
                lr_scheduler.step()
            self.task.after_step(step, step_terms, accelerator)
            ema.update()

            done, last = step + 1, step + 1 == config.max_steps
            self.seconds = time.perf_counter() - started
            if is_due(done, config.log_every, last):
                guard.check()
                values = meter.means()
                self._log(
                    done, {**values, "learning_rate": lr_schedulers[0].get_last_lr()[0], "seconds": self.seconds}
                )
                bar.set_postfix({name: f"{values[name]:.4f}" for name in self.losses})
            if self.data.validation is not None and is_due(done, config.validate_every, last):
                guard.check()
                with evaluating(objective, ema):
                    values = self.task.validate(objective, accelerator)
                self._log(done, {f"validation/{name}": value for name, value in values.items()})
            if is_due(done, config.sample_every, last):
                guard.check()
                with evaluating(objective, ema):
                    self._save_picture(done, self.task.picture(objective, accelerator))
            if is_due(done, config.checkpoint_every, last):
                guard.check()
                self.checkpoints.save(done, self._record(done), ema)

        pipeline_folder = self.folder / "pipeline"
        with evaluating(objective, ema):
            self.task.before_saving(objective, accelerator)
            state = accelerator.get_state_dict(objective)  # may be the live tensors themselves: use them in here
            if self.is_main:
                self._save_pipeline(state, pipeline_folder)
        accelerator.wait_for_everyone()
        accelerator.end_training()
        return pipeline_folder

    def _prepare(self) -> list[AcceleratedOptimizer]:
        """Builds what is trained and averaged, `self.objective`; returns the optimizers of a step."""
        objective = self._laid_out(self.task.build())
        if self.config.compile:
            objective.network.compile()
        optimizer = self._optimizer(self.task.parameter_groups(objective), self.config.learning_rate)
        self.objective, optimizer = self.accelerator.prepare(objective, optimizer)
        return [optimizer]

    def _take_step(
        self,
        step: int,
        batches: Iterator[Batch],
        optimizers: list[AcceleratedOptimizer],
        meter: "Meter",
        guard: "FiniteGuard",
    ) -> list[Terms]:
        """One optimizer step; returns the detached terms of each of this process's micro-batches."""
        accelerator, objective, (optimizer,) = self.accelerator, self.objective, optimizers
        taken: list[Batch] = []
        step_terms: list[Terms] = []
        for _ in range(self.config.gradient_accumulation_steps):
            taken.append(next(batches))
            draws = self._to_device(self.task.draws(taken[-1]))
            with accelerator.accumulate(objective):
                terms = objective(**draws)
                accelerator.backward(terms["loss"].mean())
                if accelerator.sync_gradients and self.config.max_grad_norm > 0:
                    self._clip(optimizer, meter)
                optimizer.step()
                optimizer.zero_grad()
            step_terms.append({name: term.detach() for name, term in terms.items()})
        note(step_terms, taken, step, meter, guard)
        return step_terms

    def _laid_out(self, objective: nn.Module) -> nn.Module:
        return objective.to(memory_format=torch.channels_last) if self.config.channels_last else objective

    def _optimizer(self, groups: list[dict[str, Any]], learning_rate: float) -> torch.optim.Optimizer:
        config = self.config
        return torch.optim.AdamW(
            groups,
            lr=learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )

    def _clip(self, optimizer: AcceleratedOptimizer, meter: "Meter") -> None:
        self.accelerator.unscale_gradients(optimizer)  # once: a gradient scaler refuses a second time
        for group in optimizer.param_groups:
            norm = nn.utils.clip_grad_norm_(group["params"], self.config.max_grad_norm or math.inf)
            meter.add(f"grad_norm_{group['name']}" if "name" in group else "grad_norm", norm)

    def _batches(self, first_step: int) -> Iterator[Batch]:
        """This process's micro-batches, from the first of `first_step` to the last of the run."""
        batches = train_batches(
            self.data,
            self.config,
            seed=self.config.seed,
            batch_size=self.config.batch_size,
            accumulation=self.config.gradient_accumulation_steps,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            first_step=first_step * self._batches_per_step,
            last_step=self.config.max_steps * self._batches_per_step,
        )
        return iter(batches)

    @property
    def _batches_per_step(self) -> int:
        """Batches of `batch_size` images that a step takes."""
        return 1

    def _to_device(self, draws: dict[str, Any]) -> dict[str, Any]:
        moved = {
            name: value.to(self.accelerator.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in draws.items()
        }
        if self.config.channels_last:
            for name, value in moved.items():
                if isinstance(value, torch.Tensor) and value.ndim == 4:
                    moved[name] = value.to(memory_format=torch.channels_last)
        return moved

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def _resume(self, ema: EMA) -> int:
        """Loads the checkpoint that was asked for; returns the step to go on with."""
        if self.config.resume is None:
            return 0
        record = self.checkpoints.load(self.config.resume, ema)
        if record is None:
            self.accelerator.print(f"no checkpoint in {self.checkpoints.folder} yet: starting from the beginning")
            return 0
        check_same_run(self.config, record["config"])
        if record["step"] > self.config.max_steps:
            raise ValueError(f"the checkpoint is at step {record['step']}, beyond max_steps={self.config.max_steps}")
        self.seconds = record["seconds"]
        self.accelerator.print(f"resuming from step {record['step']}")
        return record["step"]

    def _record(self, step: int) -> dict[str, Any]:
        """What is known of the run: enough to resume it and to write its card."""
        accelerator = self.accelerator
        device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else platform.processor() or "CPU"
        return {
            "step": step,
            "seconds": self.seconds,
            "config": config_to_dict(self.config),
            "command": command_line(sys.argv),
            "dataset": self.data.name,
            "dataset_hub_id": self.data.hub_id,
            "processes": accelerator.num_processes,
            "hardware": f"{accelerator.num_processes} x {device}, {torch.get_num_threads()} threads",
            "mixed_precision": accelerator.mixed_precision,
            "versions": {name: version(name) for name in ("annealers", "torch", "diffusers", "accelerate")},
        }

    # ---- what is written --------------------------------------------------------------------------------------------

    def _start_logs(self, first_step: int) -> None:
        if self.is_main:
            save_config(self.config, self.folder / "config.json")
            self.metrics = MetricsFile(self.folder / "metrics.jsonl", first_step)
        if self.config.report_to != "none":
            flat = {
                k: v if isinstance(v, (int, float, str, bool)) else str(v)
                for k, v in config_to_dict(self.config).items()
            }
            self.accelerator.init_trackers("annealers", config=flat)

    def _log(self, step: int, values: dict[str, float]) -> None:
        if self.is_main:
            self.metrics.write(step, values)
        self.accelerator.log(values, step=step)

    def _save_picture(self, step: int, picture: Image.Image) -> None:
        if self.is_main:
            folder = self.folder / "samples"
            folder.mkdir(exist_ok=True)
            picture.save(folder / f"step-{step:08d}.png")
            picture.save(self.folder / "samples.png")

    def _save_pipeline(self, state: dict[str, torch.Tensor], folder: Path) -> None:
        """Writes pipeline and card beside and renames, so that the folder is never half of one; pushes if asked."""
        objective = self.task.build()
        objective.load_state_dict(state)
        pipeline = self.task.pipeline(objective.eval())
        samples = self.folder / "samples.png"  # not there if a finished run was resumed into another folder
        record = self._record(self.config.max_steps) | {
            "pipeline": type(pipeline).__name__,
            "pipeline_tag": self.task.pipeline_tag,
            "tags": self.task.tags,
            "samples": samples.name if samples.is_file() else None,
            "metrics": self._validation_metrics(),
        }
        (self.folder / "run.json").write_text(json.dumps(record, indent=2) + "\n")
        repo_id = (self.config.hub_model_id or self.folder.name) if self.config.push_to_hub else None
        card = model_card(record, repo_id, example=self.task.example())
        with whole_folder(folder) as unfinished:
            pipeline.save_pretrained(unfinished)
            if samples.is_file():
                shutil.copy(samples, unfinished)
            card.save(unfinished / "README.md")
        print(f"pipeline: {folder}\nsamples:  {samples}")
        if repo_id is not None:
            commit = push_folder(folder, repo_id, private=self.config.hub_private or None, token=self.config.hub_token)
            print(f"pushed:   {commit}")

    def _validation_metrics(self) -> list[dict[str, Any]]:
        """The last validation as the card lists it."""
        values = self.metrics.last("validation/")
        n = values.pop("images", 0)
        return [{"name": name, "value": value, "split": "validation", "n": int(n)} for name, value in values.items()]


def trackers(report_to: str) -> list[str] | None:
    """The trackers to use; Accelerate would leave out one that is not installed without a word."""
    if report_to == "wandb" and not is_wandb_available():
        raise ValueError("report_to='wandb' needs Weights & Biases, which is not installed: pip install wandb")
    if report_to == "all":
        return ["tensorboard", "wandb"] if is_wandb_available() else ["tensorboard"]
    return None if report_to == "none" else [report_to]


def my_share(count: int, accelerator: Accelerator) -> range:
    """The contiguous part of 0 .. count - 1 that is this process's; never empty, so that all take part in calls."""
    share = -(-count // accelerator.num_processes)
    first = accelerator.process_index * share
    return range(first, min(first + share, count)) if first < count else range(1)


def gathered_images(images: torch.Tensor, count: int, accelerator: Accelerator) -> torch.Tensor:
    """The images of all processes' shares in order, (count, C, H, W), on the CPU."""
    share = -(-count // accelerator.num_processes)
    padding = images.new_zeros(share - len(images), *images.shape[1:])
    return accelerator.gather(torch.cat([images, padding]))[:count].cpu()


def in_order_of_positions(terms: list[torch.Tensor], accelerator: Accelerator) -> torch.Tensor:
    """One term of a whole optimizer step, (G,), from the (b,) of each micro-batch of each process."""
    mine = torch.stack(terms)  # (A, b)
    everyone = accelerator.gather(mine).unflatten(0, (-1, len(terms)))  # (P, A, b)
    return everyone.transpose(0, 1).flatten()  # position (m P + r) b + i


def held_out_means(
    data: ImageData,
    config: RunConfig,
    accelerator: Accelerator,
    terms_of: Callable[[Batch], Terms],
) -> dict[str, float]:
    """Means over the held-out images of named terms (b,) of a batch; every process sees its share of the batches.

    Args:
        data, config: Of the run; `config.validation_samples` limits the images.
        accelerator: To sum over the processes.
        terms_of: Terms of a batch of `validation_batches`, whose tensors are on the CPU.

    Returns:
        The mean of each term and, as "images", their number.
    """
    sums: dict[str, torch.Tensor] = {}
    images = 0
    for batch in validation_batches(
        data,
        config.batch_size,
        accelerator.process_index,
        accelerator.num_processes,
        max_samples=config.validation_samples,
        num_workers=config.num_workers,
    ):
        images += len(batch["images"])
        for name, term in terms_of(batch).items():
            sums[name] = sums.get(name, 0) + term.detach().double().sum().cpu()
    everyone = gather_object([({name: total.item() for name, total in sums.items()}, images)])
    count = sum(n for _, n in everyone)
    names = dict.fromkeys(name for totals, _ in everyone for name in totals)
    return {
        **{name: sum(totals.get(name, 0.0) for totals, _ in everyone) / count for name in names},
        "images": count,
    }


def is_due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)


@contextmanager
def evaluating(objective: nn.Module, ema: EMA) -> Iterator[None]:
    """The averaged weights, in evaluation mode, without gradients; then everything as before."""
    objective.eval()
    with torch.no_grad(), ema.swapped_in():
        yield
    objective.train()


def command_line(arguments: list[str]) -> str:
    """The command as it can be run again, without tokens."""
    return without_secrets("python " + shlex.join([relative(arguments[0]), *arguments[1:]]))


def relative(script: str) -> str:
    path = Path(script).resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


class Meter:
    """Means of named numbers since the last reading, kept on the device so that adding one waits for nothing."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, value: torch.Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0) + value.detach().float()
        self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Means over the steps and processes since the last call."""
        names = list(self.sums)
        local = torch.stack([self.sums[name] / self.counts[name] for name in names])
        values = self.accelerator.reduce(local, reduction="mean").tolist()
        self.sums, self.counts = {}, {}
        return dict(zip(names, values, strict=True))


class FiniteGuard:
    """Stops a run whose loss is not finite, and names the step and the rows that made it so.

    The losses are looked at when a log entry is due or something is to be saved, so the device does not wait for a
    check at every step, and nothing that came after a non-finite loss is ever saved.
    """

    def __init__(self) -> None:
        self.watched: list[tuple[int, torch.Tensor, torch.Tensor, str]] = []

    def watch(self, step: int, rows: torch.Tensor, losses: torch.Tensor, name: str = "loss") -> None:
        self.watched.append((step, rows, losses.detach(), name))

    def check(self) -> None:
        watched, self.watched = self.watched, []
        for step, rows, losses, name in watched:
            finite = losses.isfinite().cpu()
            if not finite.all():
                raise NonFiniteLossError(
                    f"the {name} is not finite at step {step} for the data rows {rows[~finite].tolist()}; "
                    "nothing from this step on was saved"
                )


def note(
    step_terms: list[Terms], batches: list[Batch], step: int, meter: Meter, guard: FiniteGuard, prefix: str = ""
) -> None:
    """Takes down the terms of each micro-batch of a step, by their names with a prefix."""
    for terms, batch in zip(step_terms, batches, strict=True):
        guard.watch(step, batch["rows"], terms["loss"], name=f"{prefix}loss")
        for name, term in terms.items():
            meter.add(prefix + name, term.mean())


class MetricsFile:
    """metrics.jsonl: one line per entry; a resumed run drops the lines after the step it starts from."""

    def __init__(self, path: Path, first_step: int) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() and first_step > 0 else []
        kept = [line for line in lines if json.loads(line)["step"] <= first_step]
        path.write_text("".join(line + "\n" for line in kept))

    def write(self, step: int, values: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def last(self, prefix: str) -> dict[str, float]:
        """The last value of each metric whose name starts with `prefix`."""
        found: dict[str, float] = {}
        for line in self.path.read_text().splitlines():
            found |= {k.removeprefix(prefix): v for k, v in json.loads(line).items() if k.startswith(prefix)}
        return found
