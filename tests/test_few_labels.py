"""Properties of examples/few_labels.py: what is drawn, what each classifier begins with, and what is written."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.utils import logging
from sklearn.linear_model import LogisticRegression

from annealers import AutoencoderModel, DenoisingAutoencoderPipeline
from annealers.data import load_digits_split
from annealers.training import train_autoencoder

SCRIPT = str(Path(__file__).resolve().parents[1] / "examples" / "few_labels.py")
NAMES = ["pixels", "from scratch", "linear probe", "fine-tuned"]


@pytest.fixture(autouse=True)
def without_progress_bars():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def autoencoder_of(seed=0):
    torch.manual_seed(seed)
    sizes = {"sample_size": 8, "latent_channels": 6, "block_out_channels": (8,), "flat_latent": True, "noise_std": 0.5}
    return AutoencoderModel(in_channels=1, out_channels=1, mid_block_add_attention=False, **sizes).eval()


def run(*arguments):
    before = sys.argv
    sys.argv = [SCRIPT, *map(str, arguments)]
    try:
        runpy.run_path(SCRIPT, run_name="__main__")
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    DenoisingAutoencoderPipeline(autoencoder_of()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory, pipeline):
    folder = tmp_path_factory.mktemp("few_labels")
    run("--pipeline", pipeline, "--out", folder, "--labels", 2, 10, "--draws", 3, "--steps", 2)
    return folder


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(SCRIPT, run_name="read")


@pytest.fixture(scope="module")
def digits(script):
    split = load_digits_split()
    return script["Labelled"](split.train_images / 127.5 - 1, split.train_labels)


# ---- what is written ------------------------------------------------------------------------------------------------


def test_the_table_has_means_with_standard_errors_of_accuracies_and_of_paired_gains(written):
    table = json.loads((written / "few_labels.json").read_text())
    assert list(table["accuracies"]) == NAMES and table["draws"] == 3
    scratch = table["accuracies"]["from scratch"]
    for name in NAMES:
        for count in ("2", "10"):
            values = np.array(table["accuracies"][name][count])
            assert len(values) == 3 and ((values >= 0) & (values <= 1)).all()
            assert np.allclose(values * 355, np.round(values * 355))  # of all test digits
            assert table["accuracy"][name][count] == pytest.approx([values.mean(), values.std(ddof=1) / 3**0.5])
            if name != "from scratch":
                gains = values - scratch[count]
                assert table["gain over training from scratch"][name][count] == pytest.approx(
                    [gains.mean(), gains.std(ddof=1) / 3**0.5]
                )
    assert "from scratch" not in table["gain over training from scratch"]


def test_the_figure_is_drawn_and_small_enough_for_a_page(written):
    picture = written / "few_labels.png"
    assert picture.stat().st_size < 100_000
    assert len(PIL.Image.open(picture).convert("RGB").getcolors(maxcolors=2**24)) > 100


def test_more_labels_are_better_where_nothing_is_learnt_but_a_linear_layer(written):
    accuracy = json.loads((written / "few_labels.json").read_text())["accuracy"]
    assert accuracy["pixels"]["10"][0] > accuracy["pixels"]["2"][0] + 0.05
    assert accuracy["pixels"]["10"][0] > 0.8


def test_without_a_pipeline_an_autoencoder_is_trained_in_the_folder(tmp_path, monkeypatch, capsys):
    def main(arguments):
        folder = Path(arguments[arguments.index("--output_dir") + 1])
        assert folder == tmp_path / "autoencoder"
        DenoisingAutoencoderPipeline(autoencoder_of()).save_pretrained(folder / "pipeline")

    monkeypatch.setattr(train_autoencoder, "main", main)
    run("--out", tmp_path, "--labels", 2, "--steps", 1, "--choose")
    found = json.loads(capsys.readouterr().out)
    assert list(found) == NAMES
    for choice in found.values():
        accuracies = {float(setting): accuracy for setting, accuracy in choice["accuracies"].items()}
        assert all(0 <= accuracy <= 1 for accuracy in accuracies.values())
        assert accuracies[choice["best"]] == max(accuracies.values())
    assert not (tmp_path / "few_labels.json").exists()  # the test digits choose nothing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--draws", 1], "--draws of 2 or more, got 1"), (["--labels", 5, 500], "must lie in 1 .. 139, got [5, 500]")],
)
def test_a_table_that_cannot_be_made_is_refused_before_anything_is_trained(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run(*arguments)
    assert message in capsys.readouterr().err


# ---- what is drawn --------------------------------------------------------------------------------------------------


def test_a_draw_has_as_many_labels_of_each_digit_and_none_twice(script, digits):
    rows = script["drawn_rows"](digits.labels, 90, seed=3)
    assert len(rows.unique()) == 900
    assert torch.bincount(digits.labels[rows]).tolist() == [90] * 10
    assert torch.equal(rows, script["drawn_rows"](digits.labels, 90, seed=3))
    assert (rows != script["drawn_rows"](digits.labels, 90, seed=4)).any()


# ---- what each classifier begins with -------------------------------------------------------------------------------


def test_latents_are_of_one_size_and_the_autoencoder_is_not_touched_by_training(script, digits):
    autoencoder = autoencoder_of()
    before = {name: value.clone() for name, value in autoencoder.state_dict().items()}
    classifier = script["EncoderClassifier"](autoencoder, digits.images)
    with torch.no_grad():
        latents = classifier.latents(digits.images)
        assert (classifier(digits.images[:5]) == 0).all()
    torch.testing.assert_close(latents.mean(dim=0), torch.zeros(6), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.std(dim=0), torch.ones(6), rtol=1e-4, atol=0)
    encoder = {name: value.clone() for name, value in classifier.encoder.state_dict().items()}
    script["trained"](classifier, digits.at(torch.arange(100)), rate=1e-2, steps=3, seed=0)
    assert any((value != encoder[name]).any() for name, value in classifier.encoder.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in autoencoder.state_dict().items())


def test_the_probe_is_the_logistic_regression_on_the_latents(script, digits):
    classifier = script["EncoderClassifier"](autoencoder_of(), digits.images)
    labelled = digits.at(script["drawn_rows"](digits.labels, 20, seed=0))
    classifier.fit_head(labelled, 0.5)
    with torch.no_grad():
        latents, logits = classifier.latents(digits.images).numpy(), classifier(digits.images).numpy()
        regression = LogisticRegression(C=0.5, max_iter=5000).fit(
            classifier.latents(labelled.images).numpy(), labelled.labels.numpy()
        )
    assert np.abs(logits - regression.decision_function(latents)).max() < 1e-3


def test_fine_tuning_begins_at_the_probe_and_training_from_scratch_knows_nothing_of_the_autoencoder(script, digits):
    labelled = digits.at(script["drawn_rows"](digits.labels, 10, seed=0))
    asked = digits.at(torch.arange(300))

    def accuracy(name, seed_of_autoencoder, setting, steps):
        autoencoder = autoencoder_of(seed_of_autoencoder)
        return script["accuracy_of"](name, autoencoder, digits.images, labelled, asked, setting, steps, seed=1)

    penalty = script["PENALTIES"]["linear probe"]
    assert accuracy("fine-tuned", 0, 0.0, 2) == accuracy("linear probe", 0, penalty, 2)
    assert accuracy("fine-tuned", 0, 3e-3, 20) != accuracy("linear probe", 0, penalty, 2)
    assert accuracy("from scratch", 0, 3e-3, 20) == accuracy("from scratch", 1, 3e-3, 20)
    assert accuracy("linear probe", 0, penalty, 2) != accuracy("linear probe", 1, penalty, 2)


def test_training_from_scratch_fits_its_labels(script, digits):
    labelled = digits.at(script["drawn_rows"](digits.labels, 3, seed=0))
    arguments = (autoencoder_of(), digits.images, labelled, labelled)
    assert script["accuracy_of"]("from scratch", *arguments, 1e-2, 60, seed=0) > 0.9
