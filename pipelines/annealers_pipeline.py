"""The base of the annealers pipelines: what constructing, loading and pushing mean for all of them.

Diffusers 0.42 refuses a component of another library when a pipeline is named by its Hub id, whether or not that
library is imported. A repository is therefore brought to this machine first and then loaded as a folder.

`model_index.json` names our components in one of two ways, and both are read here without running code of the folder:

    ["annealers", "DDPMAncestralScheduler"]                                   written by `save_pretrained`
    ["annealers_ddpm_ancestral_scheduler_v0_1_0_1a2b3c4d", "DDPM..."]         written by `annealers.hub.export`
"""

import importlib
import os
import tempfile
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from huggingface_hub import CommitInfo, HfApi, ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError

DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


class AnnealersPipeline(DiffusionPipeline):
    """Loads from a folder or from a Hub id, and pushes exactly what it is made of.

    `AnnealersPipeline.from_pretrained` itself returns whatever pipeline the folder holds, also one of Diffusers that
    carries our components; a subclass insists on its own components.
    """

    __module__ = "annealers"  # its public name

    id2label: dict[int, str] | None  # of a pipeline whose classes may have names

    def __init__(self, **components: Any) -> None:
        """Registers the components by the names of a subclass's arguments; an absent optional one is None."""
        super().__init__()
        self.register_modules(**components)
        self.image_processor = VaeImageProcessor()

    def __setattr__(self, name: str, value: Any) -> None:
        """Diffusers 0.42 would leave out of `save_pretrained` what is set where there was none before."""
        super().__setattr__(name, value)
        if name in self._optional_components and value is not None and self.config[name][0] is None:
            self.register_modules(**{name: value})

    def _register_class_names(self, id2label: dict[int, str] | None) -> None:
        """Keeps and saves the name of each class id."""
        self.id2label = id2label
        self.register_to_config(id2label=id2label)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> DiffusionPipeline:
        """Loads a pipeline written by `save_pretrained`, `push_to_hub` or `annealers.hub.export`.

        Args:
            pretrained_model_name_or_path: A folder, or a Hub id such as "user/name".
            **kwargs: `revision`, `token`, `cache_dir`, `force_download` and `local_files_only` go to the download; the
                rest is that of `DiffusionPipeline.from_pretrained`: `dtype`, `variant`, or a component by its name,
                such as `scheduler=...`, which then is used instead of the saved one.

        Raises:
            FileNotFoundError: If there is no such folder, or it is not a saved pipeline.
            ValueError: If the folder holds a pipeline whose components are not those of this class.
        """
        name = os.fspath(pretrained_model_name_or_path)
        download = {option: kwargs.pop(option) for option in DOWNLOAD_OPTIONS if option in kwargs}
        folder = name if os.path.isdir(name) else _downloaded(name, **download)
        if not os.path.isfile(os.path.join(folder, cls.config_name)):
            content = ", ".join(sorted(os.listdir(folder))[:8]) or "nothing"
            raise FileNotFoundError(f"{name} is not a saved pipeline: it has no {cls.config_name}, it holds {content}")

        index = AnnealersPipeline.load_config(folder)
        if cls is AnnealersPipeline:
            pipeline = _pipeline_class(index["_class_name"]).from_pretrained(folder, **kwargs)
        else:
            _check_components(cls, index, passed=set(kwargs), name=name)
            pipeline = super().from_pretrained(folder, **kwargs)
        pipeline.register_to_config(_name_or_path=name)
        return pipeline

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Reads `model_index.json`; what `annealers.hub.export` wrote is read as what `save_pretrained` writes."""
        loaded = super().load_config(pretrained_model_name_or_path, **kwargs)
        if isinstance(loaded, tuple):  # Diffusers returns a tuple when asked for more than the config
            return _native_index(loaded[0]), *loaded[1:]
        return _native_index(loaded)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        *,
        with_code: bool = False,
        card: ModelCard | str | None = None,
    ) -> CommitInfo:
        """Uploads the pipeline, and nothing else, in one commit.

        Args:
            repo_id: "user/name"; the repository is created if need be.
            commit_message: First line of the commit.
            private: Whether a new repository is private; None is the default of the account.
            token: Used for every call; None is the token of `hf auth login`.
            create_pr: Opens a pull request instead of committing to the main branch.
            with_code: Adds the code of our classes, so that the repository loads with
                `DiffusionPipeline.from_pretrained(repo_id, trust_remote_code=True)` where annealers is not installed.
                (For a private one Diffusers 0.42 needs `hf auth login` or HF_TOKEN: it fetches code without `token=`.)
            card: The README.md. None keeps the one of the repository, or writes a short one if it has none.

        Returns:
            The commit; as a string it is its address.

        Raises:
            ValueError: If `private=True` and the repository exists and is public.
        """
        # In this form, because Diffusers looks for lines `from x import` in exported files and warns of a missing x.
        import annealers.hub as hub

        with tempfile.TemporaryDirectory() as folder:
            if with_code:
                hub.export(self, folder)
            else:
                self.save_pretrained(folder)
            hub.create_repository(repo_id, private=private, token=token)
            if card is not None or not HfApi(token=token).file_exists(repo_id, "README.md"):
                text = hub.short_card(self, repo_id, with_code=with_code) if card is None else card
                (Path(folder) / "README.md").write_text(str(text), encoding="utf-8")
            return hub.push_folder(
                folder, repo_id, private=private, token=token, commit_message=commit_message, create_pr=create_pr
            )


def _downloaded(repo_id: str, **download: Any) -> str:
    """The folder of the local cache that holds the pipeline of a Hub repository: its index and its components."""
    try:
        index_file = hf_hub_download(repo_id, AnnealersPipeline.config_name, **download)
    except HFValidationError as error:
        raise FileNotFoundError(f"{repo_id!r} is neither a folder on this machine nor a Hub id 'user/name'") from error
    index = AnnealersPipeline.load_config(os.path.dirname(index_file))
    download["revision"] = os.path.basename(os.path.dirname(index_file))  # the commit that the index came from
    patterns = ["*.py", *(f"{name}/*" for name in _components(index))]
    return snapshot_download(repo_id, allow_patterns=patterns, **download)


def _native_index(index: dict[str, Any]) -> dict[str, Any]:
    """Writes every entry [exported file, class] as `save_pretrained` would have."""

    def native(key: str, value: Any) -> Any:
        if not isinstance(value, list) or not isinstance(value[0], str) or not value[0].startswith("annealers_"):
            return value
        return value[1] if key == "_class_name" else ["annealers", value[1]]

    return {key: native(key, value) for key, value in index.items()}


def _components(index: dict[str, Any]) -> dict[str, list[str]]:
    """The components that a `model_index.json` lists, without the empty ones."""
    return {key: value for key, value in index.items() if key[0] != "_" and isinstance(value, list) and value[0]}


def _check_components(
    pipeline_class: type[DiffusionPipeline], index: dict[str, Any], passed: set[str], name: str
) -> None:
    """Accepts a pipeline of another class, as Diffusers does, if its components are those that this class needs."""
    expected = set(pipeline_class._get_signature_keys(pipeline_class)[0])
    needed = expected - set(pipeline_class._optional_components) - passed
    found = set(_components(index))
    if index["_class_name"] != pipeline_class.__name__ and not needed <= found <= expected:
        raise ValueError(
            f"{name} holds a {index['_class_name']} with the components {sorted(found)}; "
            f"{pipeline_class.__name__} has {sorted(expected)}. Load it with AnnealersPipeline.from_pretrained"
        )


def _pipeline_class(class_name: str) -> type[DiffusionPipeline]:
    """The class of ours, or else of Diffusers, that a `model_index.json` names."""
    for library in (importlib.import_module("annealers"), diffusers):
        pipeline_class = getattr(library, str(class_name), None)
        if pipeline_class is not None:
            return pipeline_class
    raise ValueError(f"neither annealers nor diffusers has a pipeline class named {class_name!r}")
