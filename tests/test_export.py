"""An exported pipeline loads, and draws the same images, where annealers cannot be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from saved_pipelines import guided_images, guided_pipeline, images_of_diffusers, pipeline_of_diffusers

import annealers
from annealers.hub import export
from annealers.pipelines import AnnealersPipeline
from annealers.single_file import single_file

CHILD = Path(__file__).parent / "support" / "load_without_annealers.py"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with two exports, after another process has loaded them without annealers."""
    folder = tmp_path_factory.mktemp("exports")
    export(guided_pipeline(), folder / "ours")
    export(pipeline_of_diffusers(), folder / "theirs")
    environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    child = subprocess.run([sys.executable, CHILD, folder], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return folder


@pytest.fixture(scope="module")
def report(exported):
    return json.loads((exported / "report.json").read_text())


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """The place where Diffusers puts the code that it runs, empty and ours."""
    monkeypatch.setattr(diffusers.utils.dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    yield tmp_path / "modules"
    for name in [name for name in sys.modules if name.startswith("diffusers_modules")]:
        del sys.modules[name]


# ---- without annealers ----------------------------------------------------------------------------------------------


def test_the_other_process_had_no_annealers(report):
    assert report["annealers"] == []
    assert report["ours"] == ["GuidedDiffusionPipeline", "DDPMAncestralScheduler"]
    assert report["theirs"] == ["DiTPipeline", "DDPMAncestralScheduler"]


def test_our_pipeline_draws_the_same_images_without_us(exported):
    expected = guided_images(guided_pipeline())
    assert torch.equal(torch.load(exported / "ours.pt"), expected)
    assert torch.equal(torch.load(exported / "ours again.pt"), expected)


def test_a_pipeline_of_diffusers_with_our_scheduler_draws_the_same_images_without_us(exported):
    assert torch.equal(torch.load(exported / "theirs.pt"), images_of_diffusers(pipeline_of_diffusers()))


def test_loading_warns_of_nothing_but_of_running_code(report):
    assert [message for message in report["warnings"] if "trust_remote_code" not in message] == []


def test_what_is_saved_without_us_loads_with_us(exported):
    """The copy names the classes as annealers does, not as modules that only that process had."""
    loaded = AnnealersPipeline.from_pretrained(exported / "ours saved")
    assert type(loaded) is annealers.GuidedDiffusionPipeline
    assert torch.equal(guided_images(loaded), guided_images(guided_pipeline()))


# ---- with annealers -------------------------------------------------------------------------------------------------


def test_where_annealers_is_installed_the_code_yields_its_classes(exported, modules_cache):
    loaded = DiffusionPipeline.from_pretrained(exported / "ours", trust_remote_code=True)
    assert type(loaded) is annealers.GuidedDiffusionPipeline
    assert type(loaded.scheduler) is annealers.DDPMAncestralScheduler
    assert list(modules_cache.rglob("annealers_*.py"))
    assert torch.equal(guided_images(loaded), guided_images(guided_pipeline()))


@pytest.mark.parametrize("loader", [AnnealersPipeline, annealers.GuidedDiffusionPipeline])
def test_our_loaders_take_an_export_without_running_its_code(exported, modules_cache, loader):
    loaded = loader.from_pretrained(exported / "ours")
    assert type(loaded) is annealers.GuidedDiffusionPipeline
    assert torch.equal(guided_images(loaded), guided_images(guided_pipeline()))
    assert not modules_cache.exists()


def test_an_export_is_loaded_by_diffusers_only_if_its_code_is_trusted(exported, modules_cache):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(exported / "ours")
    assert not list(modules_cache.rglob("annealers_*.py"))


# ---- the folder -----------------------------------------------------------------------------------------------------


def test_only_our_classes_get_a_file_and_each_file_is_named_after_its_content(exported):
    index = json.loads((exported / "ours" / "model_index.json").read_text())
    files = {str(path.relative_to(exported / "ours")) for path in (exported / "ours").rglob("*.py")}
    assert files == {f"{index['_class_name'][0]}.py", f"scheduler/{index['scheduler'][0]}.py"}
    assert index["_class_name"][0].startswith("annealers_guided_diffusion_pipeline_v0_1_0_")
    assert index["scheduler"][0].startswith("annealers_ddpm_ancestral_scheduler_v0_1_0_")
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    assert all(stem.isidentifier() for stem in (index["_class_name"][0], index["scheduler"][0]))


def test_exporting_twice_leaves_one_version_of_the_code(tmp_path):
    stale = tmp_path / "scheduler" / "annealers_ddpm_ancestral_scheduler_v0_0_9_00000000.py"
    stale.parent.mkdir()
    stale.write_text("")
    export(guided_pipeline(), tmp_path)
    assert len(list(tmp_path.rglob("*.py"))) == 2 and not stale.exists()


def test_a_component_of_an_unknown_library_is_refused_before_anything_is_written(tmp_path):
    class Mine(diffusers.DDIMScheduler):
        pass

    pipeline = guided_pipeline()
    pipeline.scheduler = Mine()
    with pytest.raises(ValueError, match="cannot export scheduler: its class is of .*test_export"):
        export(pipeline, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- the merged module ----------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes modules of annealers and exposes `Public` of the last one as annealers.Public."""

    def write(**sources):
        init = tmp_path / "annealers_init.py"
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(source)
            module = type(annealers)(f"annealers.{name}")
            module.__file__ = str(tmp_path / f"{name}.py")
            monkeypatch.setitem(sys.modules, f"annealers.{name}", module)
            for line in source.replace("from __future__ import annotations\n", "").splitlines():
                for word in ("Public", "helper", "LIMIT", "renamed"):
                    if line.startswith((f"class {word}", f"def {word}", f"{word} =")) or line.endswith(f"as {word}"):
                        setattr(module, word, object())
        init.write_text(f"from annealers.{name} import Public\n")
        monkeypatch.setattr(annealers, "__file__", str(init))
        return single_file("Public")

    return write


def run(source):
    """The names of a module with this source, in a world where annealers has no class `Public`."""
    names = {"__name__": "merged"}
    exec(compile(source, "merged", "exec"), names)
    return names


def test_modules_are_merged_in_the_order_of_their_imports(package):
    source = package(
        low="LIMIT = 3\n\n\ndef helper():\n    return LIMIT\n",
        high=(
            '"""Docstring."""\n\nfrom __future__ import annotations\n\nimport math\n\n'
            "from annealers.low import (\n    LIMIT,\n    helper as renamed,\n)\n\n__all__ = ['Public']\n\n\n"
            "class Public:\n    value: missing_name = math.floor(renamed() + LIMIT)\n"
        ),
    )
    assert run(source)["Public"].value == 6
    assert "from annealers" not in source and "__all__" not in source


def test_an_import_inside_a_function_stays(package):
    source = package(
        alone="class Public:\n    def f(self):\n        import annealers.hub as hub\n\n        return hub.export\n"
    )
    assert run(source)["Public"]().f() is export


def test_one_name_for_two_things_is_refused(package):
    with pytest.raises(ValueError, match="annealers.low and annealers.high both define 'LIMIT', differently"):
        package(
            low="LIMIT = 3\n\n\ndef helper():\n    return LIMIT\n",
            high="from annealers.low import helper\n\nLIMIT = 4\n\n\nclass Public:\n    value = helper()\n",
        )


def test_one_name_for_the_same_import_is_merged(package):
    source = package(
        low="import math\n\n\ndef helper():\n    return math.floor(2.5)\n",
        high="import math\n\nfrom annealers.low import helper\n\nclass Public:\n    value = helper() + math.ceil(0)\n",
    )
    assert run(source)["Public"].value == 2


@pytest.mark.parametrize(
    "line",
    [
        "import annealers.low",
        "import annealers.low as low",
        "from .low import helper",
        "if True:\n    from annealers.low import helper",
        "try:\n    from annealers.low import helper\nexcept ImportError:\n    pass",
    ],
)
def test_an_import_that_cannot_be_merged_is_refused_with_its_place(package, line):
    with pytest.raises(ValueError, match="cannot export annealers.high, line [12]: .*must be a plain line"):
        package(low="def helper():\n    return 1\n", high=f"{line}\n\n\nclass Public:\n    pass\n")


def test_a_class_that_annealers_does_not_have_is_refused():
    with pytest.raises(ValueError, match="'NoSuchClass' is not defined"):
        single_file("NoSuchClass")
