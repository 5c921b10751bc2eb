"""Cards, pushes and pulls; the latter through huggingface_hub against a stand-in for the Hub on this machine."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub
from huggingface_hub import ModelCard
from saved_pipelines import guided_images, guided_pipeline, images_of_diffusers, pipeline_of_diffusers

from annealers.hub import model_card, push_folder, short_card

CHILD = Path(__file__).parent / "support" / "push_and_pull.py"

RECORD = {
    "pipeline": "GuidedDiffusionPipeline",
    "pipeline_tag": "unconditional-image-generation",
    "tags": ["digits", "diffusers"],
    "license": "apache-2.0",
    "dataset": "digits",
    "dataset_hub_id": "uci/digits",
    "metrics": [
        {"name": "label agreement", "value": 0.968, "split": "test", "n": 1000, "guidance_scale": 2.0},
        {"name": "FID", "value": 12.3456789, "dataset": "cifar10", "split": "train", "n": 500},
    ],
    "samples": "samples.png",
    "command": "python training/train_ddpm.py --dataset digits",
    "config": {"learning_rate": 0.001, "down_blocks": "A|B"},
    "step": 1500,
    "hardware": "2 CPU cores",
    "seconds": 203.4,
    "versions": {"torch": "2.15.0", "diffusers": "0.42.1"},
}


# ---- through the stand-in -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """The Hub after one process has pushed to it and pulled from it, and the folder of what that process reports."""
    folder = tmp_path_factory.mktemp("session")
    with FakeHub() as hub:
        child = subprocess.run(
            [sys.executable, CHILD, folder, hub.token],
            env=hub.environment(),
            capture_output=True,
            text=True,
        )
    assert child.returncode == 0, child.stderr
    return hub, folder


@pytest.fixture(scope="module")
def report(session):
    return json.loads((session[1] / "report.json").read_text())


def test_every_request_carried_the_token(session):
    hub, _ = session
    assert len(hub.requests) > 30
    assert [request for request in hub.requests if request.token != hub.token] == []


def test_what_is_pulled_has_the_same_weights_and_draws_the_same_image(session, report):
    assert report["plain"] == [None, "me/plain", True] and report["equal weights"]
    assert torch.equal(torch.load(session[1] / "plain.pt"), guided_images(guided_pipeline()))


def test_a_private_push_makes_a_private_repository(session):
    hub, _ = session
    assert {name: repository.private for name, repository in hub.repositories.items()} == {
        "me/plain": True,
        "me/run": False,
        "me/coded": False,
        "me/theirs": False,
    }


def test_private_is_refused_where_the_repository_is_public_and_nothing_is_sent(session, report):
    hub, _ = session
    assert report["refused"].startswith("private=True, but me/run exists and is public")
    assert "Never" not in hub.repositories["me/run"].messages


def test_the_commit_has_the_given_message_and_its_address_is_returned(session, report):
    hub, _ = session
    messages = hub.repositories["me/plain"].messages
    assert messages[0] == "First" and messages[2] == "Upload GuidedDiffusionPipeline" and len(messages) == 3
    assert hub.repositories["me/coded"].messages == ["Upload GuidedDiffusionPipeline"]
    assert report["commit"].startswith(f"{hub.endpoint}/me/plain/commit/")


def test_a_card_edited_on_the_hub_is_kept(session):
    assert session[0].files("me/plain")["README.md"] == b"# Mine\n"


def test_a_cached_pipeline_loads_without_the_hub(report):
    assert report["cached"] == "GuidedDiffusionPipeline"


def test_exactly_the_pipeline_is_pushed_from_the_folder_of_a_run(session):
    hub, _ = session
    assert sorted(hub.files("me/run")) == [
        "README.md",
        "model_index.json",
        "s.png",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    sent = [path for request in hub.requests for path in paths_in(request.body)]
    assert sent and not [path for path in sent if re.search("optimizer|random_states|checkpoint|samples/", path)]


def paths_in(body):
    """The paths that an upload announces or sends."""
    if isinstance(body, dict):
        return [file["path"] for file in body.get("files", ())]
    return [line["value"]["path"] for line in body or () if line["key"] == "file"]


def test_the_token_of_the_command_line_is_not_on_the_card(session):
    hub, _ = session
    assert hub.token not in hub.files("me/run")["README.md"].decode()


def test_a_repository_with_code_loads_by_diffusers_alone_and_by_us(session, report):
    hub, folder = session
    assert report["coded"] == [True, True]
    assert torch.equal(torch.load(folder / "coded.pt"), guided_images(guided_pipeline()))
    assert ModelCard(hub.files("me/coded")["README.md"].decode()).data.library_name == "diffusers"
    assert len([path for path in hub.files("me/coded") if path.endswith(".py")]) == 2


def test_a_pipeline_of_diffusers_with_our_scheduler_loads_by_its_hub_id(session, report):
    assert report["theirs"] == ["DiTPipeline", "DDPMAncestralScheduler"]
    assert torch.equal(torch.load(session[1] / "theirs.pt"), images_of_diffusers(pipeline_of_diffusers()))


# ---- cards ----------------------------------------------------------------------------------------------------------


def test_the_metadata_says_what_the_record_says():
    data = ModelCard(str(model_card(RECORD, "me/digits"))).data  # through YAML and back
    assert data.library_name == "annealers" and data.tags == ["annealers", "diffusers", "digits"]
    assert data.pipeline_tag == "unconditional-image-generation" and data.license == "apache-2.0"
    assert data.datasets == ["uci/digits"] and data.model_name == "digits"


def test_the_metrics_become_a_model_index_with_their_data_and_number_of_samples():
    agreement, fid = ModelCard(str(model_card(RECORD, "me/digits"))).data.eval_results
    assert (agreement.dataset_name, agreement.dataset_split, agreement.metric_value) == ("digits", "test", 0.968)
    assert agreement.metric_name == "label agreement, n=1000, guidance_scale=2.0"
    assert (fid.dataset_name, fid.dataset_split, fid.metric_value) == ("cifar10", "train", 12.3456789)
    assert fid.task_type == "unconditional-image-generation" and fid.metric_type == "fid"


def test_the_text_has_the_picture_the_command_and_the_settings():
    text = model_card(RECORD, "me/digits").text
    for line in (
        "![Samples](samples.png)",
        "```bash\npython training/train_ddpm.py --dataset digits\n```",
        "| FID, n=500 | 12.3457 | cifar10 | train |",
        "- Optimizer steps: 1500",
        "- Hardware: 2 CPU cores",
        "- Wall time: 203 s",
        "- Versions: torch 2.15.0, diffusers 0.42.1",
        "| `learning_rate` | 0.001 |",
        "| `down_blocks` | A\\|B |",
    ):
        assert f"\n{line}\n" in text


@pytest.mark.parametrize(
    ("with_code", "library", "loader"),
    [
        (False, "annealers", 'GuidedDiffusionPipeline.from_pretrained("me/digits")'),
        (True, "diffusers", 'DiffusionPipeline.from_pretrained("me/digits", trust_remote_code=True)'),
    ],
)
def test_the_card_shows_the_code_that_loads_the_repository(with_code, library, loader):
    card = model_card(RECORD, "me/digits", with_code=with_code, example="images = pipeline(class_labels=3).images")
    assert card.data.library_name == library
    assert f"pipeline = {loader}\nimages = pipeline(class_labels=3).images\n```" in card.text


def test_a_short_record_makes_a_short_card():
    card = short_card(guided_pipeline(), "me/digits")
    assert card.data.eval_results is None and card.data.datasets is None
    assert "# digits" in card.text and "## Use" in card.text
    assert not any(word in card.text for word in ("None", "## Training", "## Evaluation", "Settings", "!["))


def test_secrets_are_blotted_out():
    record = RECORD | {
        "command": "python t.py --hub_token=abc123 --hub-token abc123 --wandb_api_key abc123 --name hf_abc123abc123",
        "config": {"hub_token": "abc123", "seed": 7},
    }
    text = str(model_card(record))
    assert "abc123" not in text and "`seed`" in text
    assert "--hub_token=$HF_TOKEN --hub-token $HF_TOKEN" in text


def test_a_folder_is_not_taken_for_a_data_set_of_the_hub():
    assert model_card(RECORD | {"dataset": "photos", "dataset_hub_id": None}).data.datasets is None


def test_a_record_without_pipeline_and_a_metric_without_value_are_refused():
    with pytest.raises(ValueError, match=r"class of the pipeline as 'pipeline', it has \['dataset'\]"):
        model_card({"dataset": "digits"})
    with pytest.raises(ValueError, match=r"lacks \['value', 'dataset'\]: {'name': 'FID'}"):
        model_card({"pipeline": "P", "metrics": [{"name": "FID"}]})


def test_a_folder_without_pipeline_is_not_pushed(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a saved pipeline"):
        push_folder(tmp_path, "me/nothing")
