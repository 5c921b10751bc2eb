"""The options of a run: one dataclass is the command line, the `--config` file, the saved JSON and the card's table.

Every field carries its help text. A script extends `RunConfig` with the options of its model family.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from annealers.data.config import DataConfig, option

Config = TypeVar("Config", bound=DataConfig)
LearningRateShape = Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial"]

# A resumed run may change these; anything else would make it another run.
FREE_ON_RESUME = frozenset(
    {
        "config",
        "output_dir",
        "resume",
        "max_steps",
        "gradient_accumulation_steps",
        "num_workers",
        "log_every",
        "validate_every",
        "sample_every",
        "checkpoint_every",
        "keep_checkpoints",
        "report_to",
        "push_to_hub",
        "hub_model_id",
        "hub_private",
        "hub_token",
    }
)


@dataclass
class RunConfig(DataConfig):
    """What every training script can be told."""

    config: str | None = option(None, "YAML file of options; the command line overrides it.")
    output_dir: str = option("runs/run", "Folder of the run: pipeline, samples, metrics, checkpoints.")
    seed: int = option(0, "Seed of everything random in the run.")

    max_steps: int = option(1000, "Optimizer steps.")
    batch_size: int = option(128, "Images per optimizer step, over all processes and accumulation steps.")
    gradient_accumulation_steps: int = option(1, "Micro-batches that an optimizer step is split into.")
    learning_rate: float = option(1e-3, "Peak learning rate of AdamW.")
    lr_scheduler: LearningRateShape = option("cosine", "Shape of the learning rate over the optimizer steps.")
    lr_warmup_steps: int = option(0, "Optimizer steps of linear warm-up.")
    adam_beta1: float = option(0.9, "AdamW's decay of the first moment.")
    adam_beta2: float = option(0.99, "AdamW's decay of the second moment.")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.")
    weight_decay: float = option(0.0, "AdamW's weight decay.")
    max_grad_norm: float = option(1.0, "Largest norm of the gradient; 0 does not clip.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "Precision of the network; unset, what `accelerate config` says."
    )
    compile: bool = option(False, "Compile the network with torch.compile.")
    channels_last: bool = option(False, "Keep weights and images in channels-last memory format.")
    ema_decay: float = option(0.999, "Decay of the exponential moving average of the weights.")
    ema_warmup: bool = option(True, "Let the decay grow as (1 + n) / (10 + n) in the first updates.")

    log_every: int = option(20, "Optimizer steps between log entries.")
    validate_every: int = option(500, "Optimizer steps between validations; 0 only at the end.")
    sample_every: int = option(500, "Optimizer steps between pictures of samples; 0 only at the end.")
    checkpoint_every: int = option(500, "Optimizer steps between checkpoints; 0 only at the end.")
    keep_checkpoints: int = option(2, "Newest checkpoints to keep.")
    validation_samples: int = option(1024, "Held-out images per validation.")
    resume: str | None = option(None, "Checkpoint folder to continue from, or 'latest' of the output folder.")
    report_to: Literal["tensorboard", "wandb", "all", "none"] = option(
        "tensorboard", "Tracker of the curves, 'all' being all installed ones; metrics.jsonl is written in any case."
    )

    push_to_hub: bool = option(False, "Upload the pipeline to the Hub at the end.")
    hub_model_id: str | None = option(
        None, "Repository on the Hub; unset, the output folder's name.", of="push_to_hub"
    )
    hub_private: bool = option(False, "Make the repository private.", of="push_to_hub")
    hub_token: str | None = option(None, "Token for the Hub; unset, the one you are logged in with.")

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "gradient_accumulation_steps", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("validate_every", "sample_every", "checkpoint_every", "lr_warmup_steps", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        self._check_options_of_others()

    def _check_options_of_others(self) -> None:
        """Raises ValueError for an option that would do nothing, as another is not set to what makes use of it."""
        for field in dataclasses.fields(self):
            of = getattr(field.metadata.get("help"), "of", ())
            if not of or getattr(self, field.name) == _default(field):
                continue
            other, *values = of
            found = getattr(self, other)
            if found not in values if values else not found:
                wanted = f"{other}={' or '.join(map(str, values))}" if values else other
                raise ValueError(
                    f"{field.name}={getattr(self, field.name)} is an option of {wanted}, and {other} is {found}"
                )


def parse_config(config_class: type[Config], arguments: list[str] | None = None, description: str = "") -> Config:
    """Reads the options from the command line and, below it, from the `--config` file.

    Args:
        config_class: The script's dataclass.
        arguments: Command line, without the script's name; None for `sys.argv`.
        description: First line of `--help`.

    Raises:
        SystemExit: With a usage message, for an unknown option or a value that does not fit.
    """
    from transformers import HfArgumentParser

    arguments = sys.argv[1:] if arguments is None else arguments
    parser = HfArgumentParser(config_class, description=description, allow_abbrev=False)
    config_file = None
    for position, argument in enumerate(arguments):
        if argument == "--config" and position + 1 < len(arguments):
            config_file = arguments[position + 1]
        elif argument.startswith("--config="):
            config_file = argument.removeprefix("--config=")
    if config_file is not None:
        # The file's options are put in front of the command line's, so that argparse checks both and the latter win.
        arguments = [*yaml_arguments(config_class, config_file, parser), *arguments]
    try:
        (config,) = parser.parse_args_into_dataclasses(args=arguments)
    except ValueError as error:
        parser.error(str(error))
    return config


def yaml_arguments(config_class: type[DataConfig], config_file: str, parser: Any) -> list[str]:
    """The options of a YAML file as command-line arguments."""
    import yaml

    if not Path(config_file).is_file():
        parser.error(f"--config: there is no file {config_file!r}")
    options = yaml.safe_load(Path(config_file).read_text()) or {}
    if not isinstance(options, dict):
        parser.error(f"--config: {config_file!r} must hold `option: value` lines, got {type(options).__name__}")
    known = {config_field.name for config_field in dataclasses.fields(config_class)}
    arguments = []
    for name, value in options.items():
        name = str(name).replace("-", "_")
        if name not in known:
            parser.error(f"--config: {config_file!r} has the unknown option {name!r}")
        if value is None:
            continue
        arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


def config_to_dict(config: DataConfig) -> dict[str, Any]:
    """The options as JSON-able values, without the token."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name != "hub_token"}


def save_config(config: RunConfig, path: Path) -> None:
    path.write_text(json.dumps(config_to_dict(config), indent=2) + "\n")


def check_same_run(config: RunConfig, recorded: dict[str, Any]) -> None:
    """Raises ValueError if a checkpoint's options are not those of this run.

    An option that is newer than the checkpoint counts as its default, which is what there was before it.
    """
    recorded = {field.name: _default(field) for field in dataclasses.fields(config)} | recorded
    differences = [
        f"{name}: {recorded[name]!r} in the checkpoint, {value!r} now"
        for name, value in config_to_dict(config).items()
        if name not in FREE_ON_RESUME and recorded[name] != value
    ]
    if differences:
        raise ValueError("the checkpoint belongs to a run with other options: " + "; ".join(differences))


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
