"""What leaves this machine: model cards, pushed folders, and pipelines exported together with their code.

A card's `library_name` decides which code the Hub shows for loading. It is "diffusers" for a repository that contains
its code, which Diffusers loads by itself, and "annealers" for one that needs this library installed, so that the Hub
shows no code that would fail; both names are always among the tags.
"""

import hashlib
import importlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from huggingface_hub import CommitInfo, EvalResult, HfApi, ModelCard, ModelCardData

from annealers.single_file import single_file

INDEX = "model_index.json"
BESIDE_COMPONENTS = (INDEX, "README.md", "LICENSE")
PICTURES = (".png", ".gif", ".jpg", ".webp")
EXTERNAL_LIBRARIES = ("diffusers", "transformers")

# ---- model cards ----------------------------------------------------------------------------------------------------

NAMED_SECRET = re.compile(r"(--[\w-]*(?:token|password|api[_-]key)[ =]+)\S+", re.IGNORECASE)
SECRET_NAME = re.compile(r"token|password|api_key", re.IGNORECASE)
HUB_TOKEN = re.compile(r"\bhf_\w{8,}")


def model_card(
    record: Mapping[str, Any], repo_id: str | None = None, with_code: bool = False, example: str | None = None
) -> ModelCard:
    """Fills `model_cards/template.md` from the record of a run.

    Args:
        record: `pipeline`, the name of the class, is required. Of the rest, what is missing is left out of the card:

            pipeline_tag              task of the Hub, such as "unconditional-image-generation"
            tags, license             list; identifier such as "apache-2.0"
            description               a paragraph
            dataset, dataset_hub_id   its name; its id on the Hub, which goes into the metadata
            metrics                   list of {"name", "value", and "dataset", "split", "n", ... as far as known}
            samples                   file name of a picture of samples, beside the card
            command, config           the exact command line, the settings it stood for (a dict)
            step, hardware, seconds   optimizer steps, description of the machine, wall time
            versions                  {library: version}
        repo_id: "user/name" on the Hub.
        with_code: Whether the repository contains the code of the pipeline, as `export` writes it.
        example: Line of Python that makes `images` with `pipeline`; None is the plain call.

    Returns:
        The card; its metadata holds the metrics as a model-index. Tokens and passwords are blotted out of the command
        and left out of the settings.

    Raises:
        ValueError: If the record names no pipeline, or a metric has no name, value or dataset.
    """
    if not record.get("pipeline"):
        raise ValueError(f"the run record must name the class of the pipeline as 'pipeline', it has {sorted(record)}")
    name = (repo_id or record["pipeline"]).split("/")[-1]
    metrics = [_complete(metric, record) for metric in record.get("metrics") or ()]

    metadata = ModelCardData(
        model_name=name,
        library_name="diffusers" if with_code else "annealers",
        pipeline_tag=record.get("pipeline_tag"),
        license=record.get("license"),
        tags=list(dict.fromkeys(["annealers", "diffusers", *(record.get("tags") or ())])),
        datasets=[record["dataset_hub_id"]] if record.get("dataset_hub_id") else None,
        eval_results=[_eval_result(metric, record) for metric in metrics] or None,
    )
    return ModelCard.from_template(
        metadata,
        template_str=(resources.files("annealers.model_cards") / "template.md").read_text(encoding="utf-8"),
        record=record,
        name=name,
        location=repo_id or "path/to/this/folder",
        with_code=with_code,
        example=example or "images = pipeline().images",
        command=without_secrets(record.get("command") or ""),
        config={key: value for key, value in (record.get("config") or {}).items() if not SECRET_NAME.search(key)},
        metrics=metrics,
    )


def short_card(pipeline: DiffusionPipeline, repo_id: str, with_code: bool = False) -> ModelCard:
    """The card of a pipeline that comes without the record of a run."""
    return model_card({"pipeline": type(pipeline).__name__}, repo_id, with_code)


def _complete(metric: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """The metric with the data set of the run, unless it names its own, and all its details in its title."""
    complete = {"dataset": record.get("dataset"), "split": None, "n": None, **metric}
    missing = [key for key in ("name", "value", "dataset") if complete.get(key) is None]
    if missing:
        raise ValueError(f"a metric of the run record lacks {missing}: {dict(metric)}")
    details = {key: value for key, value in complete.items() if key not in ("name", "value", "dataset", "split")}
    complete["title"] = complete["name"] + "".join(f", {k}={v}" for k, v in details.items() if v is not None)
    return complete


def _eval_result(metric: dict[str, Any], record: Mapping[str, Any]) -> EvalResult:
    return EvalResult(
        task_type=record.get("pipeline_tag") or "other",
        dataset_type=metric["dataset"],
        dataset_name=metric["dataset"],
        dataset_split=metric["split"],
        metric_type=re.sub(r"\W+", "_", metric["name"]).lower(),
        metric_name=metric["title"],
        metric_value=metric["value"],
    )


def without_secrets(command: str) -> str:
    """The command line with $HF_TOKEN in the place of tokens, keys and passwords."""
    return HUB_TOKEN.sub("$HF_TOKEN", NAMED_SECRET.sub(r"\1$HF_TOKEN", command))


# ---- pushing --------------------------------------------------------------------------------------------------------


def create_repository(repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Creates a model repository unless it exists, and returns its full id.

    Raises:
        ValueError: If `private=True` and the repository exists and is public; the Hub would not have said so.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise ValueError(f"private=True, but {repo_id} exists and is public: change its visibility or push elsewhere")
    return repo_id


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    also: Sequence[str] = (),
) -> CommitInfo:
    """Uploads the pipeline that a folder holds, in one commit.

    Only what `model_index.json` lists is sent, with the card, the license and the pictures beside it. So whatever a
    training run keeps in the same folder, optimizer states, checkpoints and logs, stays here.

    Args:
        folder: Written by `save_pretrained` or `export`.
        repo_id: "user/name"; created if need be.
        private: Whether a new repository is private; None is the default of the account.
        token: Used for every call; None is the token of `hf auth login`.
        commit_message: First line of the commit.
        create_pr: Opens a pull request instead of committing to the main branch.
        also: Patterns of further files, relative to the folder.

    Returns:
        The commit; as a string it is its address.

    Raises:
        FileNotFoundError: If the folder holds no pipeline.
        ValueError: If `private=True` and the repository exists and is public.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder} is not a saved pipeline: it has no {INDEX}")
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    components = [f"{name}/*" for name, entry in index.items() if name != "_class_name" and isinstance(entry, list)]
    class_name, code = index["_class_name"], []
    if isinstance(class_name, list):
        code, class_name = [f"{class_name[0]}.py"], class_name[1]
    pictures = [path.name for path in folder.iterdir() if path.suffix in PICTURES]

    return HfApi(token=token).upload_folder(
        repo_id=create_repository(repo_id, private, token),
        folder_path=folder,
        allow_patterns=[*BESIDE_COMPONENTS, *components, *code, *pictures, *also],
        commit_message=commit_message or f"Upload {class_name}",
        create_pr=create_pr,
    )


# ---- exporting with code --------------------------------------------------------------------------------------------


def export(pipeline: DiffusionPipeline, folder: str | os.PathLike) -> Path:
    """Saves a pipeline with the code of our classes, so that it loads where annealers is not installed:

        DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)

    Works for our pipelines and for those of Diffusers that carry our components. Each class becomes one file with all
    it needs of annealers: Diffusers loads code into one flat package, where files that import each other can get hold
    of another folder's copy. The file name therefore contains the class, the version and a hash of the content. Where
    annealers is installed, the file hands its class out instead of its own copy. `annealers` pipelines load the folder
    without running the code in it.

    Args:
        pipeline: The pipeline to save.
        folder: Where to; created if need be.

    Raises:
        ValueError: If a component is of neither annealers, Diffusers nor Transformers, or its code cannot be merged.
    """
    ours = [name for name in pipeline.components if _is_ours(name, pipeline.config[name][0])]
    folder = Path(folder)
    pipeline.save_pretrained(folder)
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    for name in ours:
        index[name] = _write_code(index[name][1], folder / name)
    if _is_ours("the pipeline", type(pipeline).__module__.split(".")[0]):
        index["_class_name"] = _write_code(index["_class_name"], folder)
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def _is_ours(name: str, library: str | None) -> bool:
    """Whether the code of a component must be exported; Diffusers' name for its own pipeline folders counts as its."""
    if library is None or library in EXTERNAL_LIBRARIES or hasattr(diffusers.pipelines, library):
        return False
    if library != "annealers":
        raise ValueError(f"cannot export {name}: its class is of {library}, not of annealers, diffusers, transformers")
    return True


def _write_code(class_name: str, folder: Path) -> list[str]:
    """Writes the single file of a class and returns its entry for `model_index.json`."""
    code = single_file(class_name)
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", class_name).lower()
    version = re.sub(r"\W", "_", importlib.import_module("annealers").__version__)
    stem = f"annealers_{words}_v{version}_{hashlib.sha256(code.encode()).hexdigest()[:8]}"
    for old in folder.glob("annealers_*.py"):
        old.unlink()
    (folder / f"{stem}.py").write_text(code, encoding="utf-8")
    return [stem, class_name]
