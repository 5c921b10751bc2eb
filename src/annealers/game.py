r"""The run loop of two players: a generator G, and a discriminator D that tells its images from real ones.

    for step in steps:                              # one step of the generator
        for k steps of the discriminator:
            for micro_batch in the accumulation of it:
                backward(mean of D's terms["loss"])
            optimizer step of D
        for micro_batch in the accumulation of the last of them:
            backward(mean of G's terms["loss"])
        optimizer step of G, EMA of G

It is the loop of `annealers.run` with another step, so everything else holds here too: one process, several processes
and any accumulation train the same weights, and a resumed run continues bit for bit.

- Each player is a module of its own, and called as a whole, so gradients are averaged over processes by its own
  wrapper: in the last micro-batch only, under `no_sync` in the others. `Accelerator.accumulate` counts the steps of
  both players in one counter, and would skip those of one.
- Each player calls the other as it is (`annealers.adversarial.frozen`): no gradient reaches the opponent's weights,
  and its batch statistics do not move.
- The power iteration of a spectral norm is made once in each step of its player, not in each forward pass, the number
  of which is that of the micro-batches.
- Batch normalisation is over all processes on GPUs. On several CPU processes, where PyTorch has no such layer, it is
  refused. So are weights that are split over processes (FSDP, DeepSpeed): each player needs the whole of the other.
- A step in float16 whose gradient overflows is skipped, of that player alone; their share is logged as
  "skipped_steps_generator" and "skipped_steps_discriminator".

Source: Goodfellow et al. 2014, "Generative Adversarial Nets", arXiv:1406.2661, Alg. 1.
"""

import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import is_parametrized

from annealers.checkpoint import whole_folder
from annealers.configuration import LearningRateShape, RunConfig, option
from annealers.run import Batch, FiniteGuard, Meter, Run, Task, Terms, note

SPLIT = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)  # the weights over processes


@dataclass
class GameConfig(RunConfig):
    """Options of the loop; those of `RunConfig` that are of a player, as the learning rate, are the generator's."""

    discriminator_steps: int = option(1, "k, steps of the discriminator to one of the generator.")
    discriminator_learning_rate: float | None = option(None, "Its peak learning rate; unset, the generator's.")
    adam_beta1: float = option(0.5, "AdamW's decay of the first moment, of both players.")
    adam_beta2: float = option(0.999, "AdamW's decay of the second moment, of both players.")
    max_grad_norm: float = option(0.0, "Largest norm of the gradient of each player; 0 does not clip.")
    lr_scheduler: LearningRateShape = option("constant", "Shape of the learning rates over the generator's steps.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.discriminator_steps < 1:
            raise ValueError(f"discriminator_steps must be at least 1, got {self.discriminator_steps}")
        if self.discriminator_learning_rate is not None and self.discriminator_learning_rate <= 0:
            raise ValueError(f"discriminator_learning_rate must be positive, got {self.discriminator_learning_rate}")
        if self.compile:
            raise ValueError("--compile is not for games: a player is called with weights that are not its own")


class GameTask(Task):
    """What a script adds to the loop: both players.

    Each is a module with its network as `.network`, whose `forward(opponent, **draws)` returns terms (B,), "loss"
    among them; `opponent` is the network of the other. The discriminator's are logged as "discriminator_NAME".
    """

    config: GameConfig

    @abstractmethod
    def build(self) -> nn.Module:
        """A new generator's objective. It holds the generator alone, for it is what is averaged and saved."""

    @abstractmethod
    def build_discriminator(self) -> nn.Module:
        """A new discriminator's objective."""

    @abstractmethod
    def draws(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The arguments of the generator's objective; the batch is that of the discriminator's last step."""

    @abstractmethod
    def discriminator_draws(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The arguments of the discriminator's objective for a batch of data, with everything random in them."""

    def after_discriminator_step(self, network: nn.Module) -> None:  # noqa: B027 (most tasks do nothing here)
        """Called by all processes after each optimizer step of the discriminator, to clip its weights, say."""


class GameRun(Run):
    """One run of a game; see `annealers.run.Run`. The discriminator is saved beside the pipeline, not in it."""

    config: GameConfig
    task: GameTask
    losses = ("loss", "discriminator_loss")

    def train(self) -> Path:
        pipeline_folder = super().train()
        if self.is_main:
            with whole_folder(self.folder / "discriminator") as unfinished:
                self.networks["discriminator"].save_pretrained(unfinished)
        return pipeline_folder

    def _prepare(self) -> list[AcceleratedOptimizer]:
        config = self.config
        if self.accelerator.distributed_type in SPLIT:
            kind = self.accelerator.distributed_type.value
            raise ValueError(
                f"a game needs all weights of both players on each process, which {kind} splits: choose plain data "
                "parallelism in `accelerate config`"
            )
        rates = {
            "generator": config.learning_rate,
            "discriminator": config.discriminator_learning_rate or config.learning_rate,
        }
        players = {"generator": self.task.build(), "discriminator": self.task.build_discriminator()}
        players = {name: self._laid_out(self._synchronized(player)) for name, player in players.items()}
        optimizers = [
            self._optimizer([{"name": name, **group} for group in self.task.parameter_groups(player)], rates[name])
            for name, player in players.items()
        ]
        self.networks = {name: player.network for name, player in players.items()}
        self.objective, self.discriminator, *prepared = self.accelerator.prepare(*players.values(), *optimizers)
        return prepared

    def _synchronized(self, player: nn.Module) -> nn.Module:
        """The player with batch statistics of all processes.

        Raises:
            ValueError: If they would be each process's own.
        """
        if not any(isinstance(module, _BatchNorm) for module in player.modules()):
            return player
        if self.config.gradient_accumulation_steps > 1:
            count = self.config.batch_size // self.config.gradient_accumulation_steps
            warnings.warn(
                f"batch normalisation sees micro-batches of {count} images, so this run depends on "
                "--gradient_accumulation_steps; group normalisation does not",
                stacklevel=2,
            )
        if self.accelerator.num_processes == 1:
            return player
        if self.accelerator.device.type != "cuda":
            raise ValueError(
                f"batch normalisation over {self.accelerator.num_processes} processes needs GPUs: on "
                f"{self.accelerator.device.type} each would take the statistics of its own images. Choose group "
                "normalisation, or one process"
            )
        return nn.SyncBatchNorm.convert_sync_batchnorm(player)

    @property
    def _batches_per_step(self) -> int:
        return self.config.discriminator_steps

    def _take_step(
        self,
        step: int,
        batches: Iterator[Batch],
        optimizers: list[AcceleratedOptimizer],
        meter: Meter,
        guard: FiniteGuard,
    ) -> list[Terms]:
        generator_optimizer, discriminator_optimizer = optimizers
        generator, discriminator = self.networks.values()
        hold_spectral_norms(generator, discriminator)
        for _ in range(self.config.discriminator_steps):
            taken = [next(batches) for _ in range(self.config.gradient_accumulation_steps)]
            draws = map(self.task.discriminator_draws, taken)
            terms = self._player_step(self.discriminator, generator, draws, discriminator_optimizer, meter)
            self.task.after_discriminator_step(discriminator)
            note(terms, taken, step, meter, guard, prefix="discriminator_")
        draws = map(self.task.draws, taken)
        terms = self._player_step(self.objective, discriminator, draws, generator_optimizer, meter)
        note(terms, taken, step, meter, guard)
        return terms

    def _player_step(
        self,
        player: nn.Module,
        opponent: nn.Module,
        micro_batches: Iterator[dict[str, torch.Tensor]],
        optimizer: AcceleratedOptimizer,
        meter: Meter,
    ) -> list[Terms]:
        """One optimizer step of a player, whose gradient is that of its own loss alone."""
        accelerator, last = self.accelerator, self.config.gradient_accumulation_steps - 1
        iterate_spectral_norms(player)
        step_terms: list[Terms] = []
        for i, draws in enumerate(micro_batches):
            with nullcontext() if i == last else accelerator.no_sync(player):
                terms = player(opponent, **self._to_device(draws))
                accelerator.backward(terms["loss"].mean())  # which divides by the number of micro-batches
            step_terms.append({name: term.detach() for name, term in terms.items()})
        self._clip(optimizer, meter)
        optimizer.step()
        optimizer.zero_grad()
        if accelerator.scaler is not None:
            skipped = torch.tensor(float(optimizer.step_was_skipped), device=accelerator.device)
            meter.add(f"skipped_steps_{optimizer.param_groups[0]['name']}", skipped)
        return step_terms


def spectral_norms(network: nn.Module) -> Iterator[tuple[nn.Module, str, _SpectralNorm]]:
    """The spectral norms of a network: module, name of the weight, and parametrisation."""
    for module in network.modules():
        if is_parametrized(module):
            for name, parametrizations in module.parametrizations.items():
                yield from ((module, name, part) for part in parametrizations if isinstance(part, _SpectralNorm))


def hold_spectral_norms(*networks: nn.Module) -> None:
    """Lets no forward pass iterate: the parametrisations are in evaluation mode."""
    for network in networks:
        for _, _, norm in spectral_norms(network):
            norm.eval()


@torch.no_grad()
def iterate_spectral_norms(network: nn.Module) -> None:
    """One step of the power iteration of each spectral norm, whose vectors then hold until the next."""
    for module, name, norm in spectral_norms(network):
        norm.train()
        getattr(module, name)
        norm.eval()
