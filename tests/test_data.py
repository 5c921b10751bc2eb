"""Data: what an image becomes, which row is seen at which position, and one clear sentence for every mistake.

The image of row i carries i in its top left pixel, so that tests read rows, order and flips off the images themselves.
"""

import ast
import io
from collections import Counter
from dataclasses import fields
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import HfArgumentParser

import annealers.data
from annealers.data import (
    DataConfig,
    DataError,
    PositionBatches,
    load_data,
    load_digits_split,
    to_images,
    to_model_space,
    train_batches,
    validation_batches,
)
from annealers.data.batches import _shuffled
from annealers.randomness import PositionalRandomness

CLASSES = ["ant", "bee", "cat"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def marked(row, size=4):
    """Grey image of row `row`: `row` at the top left, 255 at the top right."""
    pixels = np.zeros((size, size), np.uint8)
    pixels[0, 0], pixels[0, -1] = row, 255
    return pixels


def encoded(pixels, format="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return {"bytes": buffer.getvalue(), "path": None}


def image_table(images, labels=None, label_feature=None, **columns):
    features = {"image": datasets.Image()}
    data = {"image": images}
    if labels is not None:
        features["label"] = label_feature or datasets.ClassLabel(names=CLASSES)
        data["label"] = labels
    for name, values in columns.items():
        features[name] = datasets.Value("string")
        data[name] = values
    return datasets.Dataset.from_dict(data, features=datasets.Features(features))


def marked_table(length, first=0):
    rows = range(first, first + length)
    return image_table([encoded(marked(row)) for row in rows], [row % 3 for row in rows])


def saved(folder, **splits):
    datasets.DatasetDict(splits).save_to_disk(folder / "saved")
    return str(folder / "saved")


def load(folder, /, **options):
    return load_data(DataConfig(dataset=str(folder), **options))


@pytest.fixture
def marked_folder(tmp_path):
    return saved(tmp_path, train=marked_table(11), test=marked_table(7, first=100))


def rows_seen(batch):
    """The row of each image, read off whichever top corner does not hold the 255."""
    corners = to_images(batch["images"])[:, 0, 0][:, [0, -1]].long()
    return corners.sum(dim=1) - 255


def flipped(batch):
    return to_images(batch["images"])[:, 0, 0, 0] == 255


def equal_batches(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key], key


def only_image(folder, **options):
    """The single training image that `folder` holds, uint8 (C, H, W)."""
    return load(folder, holdout=0.0, **options).train[0]["image"]


# -- model space ------------------------------------------------------------------------------------------------------


def test_every_level_survives_the_way_to_model_space_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    x = to_model_space(levels)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, torch.linspace(-1, 1, 256), rtol=0, atol=1e-6)
    assert torch.equal(to_images(x), levels)
    assert torch.equal(to_images(x + 0.49 / 127.5), levels)  # to the nearest level
    assert torch.equal(to_images(x - 0.49 / 127.5), levels)


def test_what_lies_outside_model_space_is_clamped():
    assert to_images(torch.tensor([-1.3, 1.3])).tolist() == [0, 255]


# -- digits -----------------------------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn_in_a_stratified_split_that_no_seed_changes():
    from sklearn.datasets import load_digits

    torch.manual_seed(1)
    np.random.seed(1)
    split = load_digits_split()
    torch.manual_seed(2)
    np.random.seed(2)
    for one, other in zip(split, load_digits_split(), strict=True):
        assert torch.equal(one, other)
    digits = load_digits()
    stored = Counter((image.tobytes(), label) for image, label in zip(digits.images, digits.target, strict=True))
    images = torch.cat([split.train_images, split.test_images])
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.uint8
    assert set(images.unique().tolist()) == {round(255 * value / 16) for value in range(17)}
    values = torch.round(images[:, 0].double() * 16 / 255).numpy()
    labels = torch.cat([split.train_labels, split.test_labels]).tolist()
    assert Counter((value.tobytes(), label) for value, label in zip(values, labels, strict=True)) == stored
    share = torch.bincount(split.test_labels) / torch.bincount(torch.tensor(digits.target))
    assert ((share > 0.19) & (share <= 0.2)).all()


def test_digits_are_the_default_and_need_nothing_else():
    split, data = load_digits_split(), load_data(DataConfig())
    assert (data.name, data.hub_id, data.channels, data.resolution) == ("digits", None, 1, 8)
    assert data.id2label == {digit: str(digit) for digit in range(10)}
    assert torch.equal(torch.stack([item["image"] for item in data.train]), split.train_images)
    assert [item["label"] for item in data.train] == split.train_labels.tolist()
    assert torch.equal(torch.stack([item["image"] for item in data.validation]), split.test_images)
    assert [item["label"] for item in data.validation] == split.test_labels.tolist()


def test_digits_come_in_other_sizes_and_with_three_channels():
    data = load_data(DataConfig(resolution=16, channels=3, max_train_samples=5, label_column="none"))
    assert len(data.train) == 5 and data.id2label is None
    assert data.train[0].keys() == {"image", "row"}
    assert data.train[4]["image"].shape == (3, 16, 16)


def test_digits_can_be_split_otherwise_and_validated_in_part():
    split, data = load_digits_split(), load_data(DataConfig())
    (batch,) = validation_batches(data, batch_size=50, max_samples=50)
    assert len(set(batch["rows"].tolist())) == 50 and batch["rows"].max() >= 50
    assert torch.equal(to_images(batch["images"]), split.test_images[batch["rows"]])
    assert torch.equal(batch["labels"], split.test_labels[batch["rows"]])
    only_test = load_data(DataConfig(train_split="test", holdout=0.0))
    assert len(only_test.train) == 355 and only_test.validation is None


def test_digits_cannot_be_streamed():
    with pytest.raises(DataError, match="embedded"):
        load_data(DataConfig(streaming=True))


# -- what a stored image becomes --------------------------------------------------------------------------------------


def solid(mode, colour):
    return Image.new(mode, (4, 4), colour)


def transparent_palette():
    image = solid("P", 0)
    image.putpalette([10, 20, 30])
    image.info["transparency"] = 0
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (solid("L", 7), [7]),
        (solid("1", 1), [255]),
        (solid("LA", (50, 51)), [255 - 51 * (255 - 50) // 255]),
        (solid("RGB", (10, 20, 30)), [10, 20, 30]),
        (solid("RGBA", (10, 20, 30, 255)), [10, 20, 30]),
        (solid("RGBA", (10, 20, 30, 0)), [255, 255, 255]),
        (solid("RGBA", (0, 100, 255, 51)), [204, 224, 255]),
        (solid("RGB", (10, 20, 30)).quantize(2), [10, 20, 30]),
        (transparent_palette(), [255, 255, 255]),
    ],
    ids=["grey", "binary", "grey-alpha", "rgb", "opaque", "transparent", "a-fifth-opaque", "palette", "clear-palette"],
)
def test_pil_images_of_any_mode_become_grey_or_rgb_on_white(tmp_path, image, expected):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    pixels = only_image(saved(tmp_path, train=image_table([{"bytes": buffer.getvalue(), "path": None}])))
    assert pixels.dtype == torch.uint8
    assert pixels.tolist() == [[[level] * 4] * 4 for level in expected]


def test_cmyk_images_become_rgb(tmp_path):
    buffer = io.BytesIO()
    solid("CMYK", (0, 255, 255, 0)).save(buffer, "TIFF")
    pixels = only_image(saved(tmp_path, train=image_table([{"bytes": buffer.getvalue(), "path": None}])))
    assert pixels[:, 0, 0].tolist() == [255, 0, 0]


def test_the_orientation_a_camera_noted_is_applied(tmp_path):
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(marked(9)).save(buffer, "PNG", exif=exif)
    pixels = only_image(saved(tmp_path, train=image_table([{"bytes": buffer.getvalue(), "path": None}])))
    assert pixels[0, -1, -1] == 9 and pixels[0, -1, 0] == 255


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_images_of_more_than_8_bits_are_refused(tmp_path, mode):
    buffer = io.BytesIO()
    solid(mode, 1).save(buffer, "TIFF")
    with pytest.raises(DataError, match=f"row 0 .*mode '{mode}' is not supported"):
        only_image(saved(tmp_path, train=image_table([{"bytes": buffer.getvalue(), "path": None}])))


@pytest.mark.parametrize("shape", [(6, 6), (6, 6, 1), (6, 6, 3), (6, 6, 5)], ids=str)
@pytest.mark.parametrize("kind", ["uint8", "float32", "float64"])
@pytest.mark.parametrize("streaming", [False, True])
def test_arrays_of_any_number_of_channels_keep_every_level(tmp_path, shape, kind, streaming):
    levels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    array = levels if kind == "uint8" else levels.astype(kind) / 255
    table = datasets.Dataset.from_dict({"pixels": [array]})
    data = load(saved(tmp_path, train=table), holdout=0.0, streaming=streaming)
    assert data.channels == (shape[2] if len(shape) == 3 else 1)
    (item,) = list(data.train) if streaming else [data.train[0]]
    expected = torch.from_numpy(levels.reshape(6, 6, -1)).permute(2, 0, 1)  # (C, H, W)
    assert item["image"].dtype == torch.uint8 and torch.equal(item["image"], expected)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.full((4, 4), 1.5), r"floats must lie in \[0, 1\], got 1.5 to 1.5"),
        (np.full((4, 4), -0.5), r"floats must lie in \[0, 1\]"),
        (np.full((4, 4), np.nan), r"floats must lie in \[0, 1\]"),
        (np.full((4, 4), 256), "integers are levels 0 to 255, got 256 to 256"),
        (np.full((4, 4), -1), "integers are levels 0 to 255"),
        (np.zeros((4, 4), bool), "neither uint8 levels nor floats"),
        (np.zeros((3, 4, 4), np.uint8), "it is 4x3 .*not square"),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path, array, reason):
    with pytest.raises(DataError, match=f"row 0 of split 'train' .*'pixels'.*{reason}"):
        only_image(saved(tmp_path, train=datasets.Dataset.from_dict({"pixels": [array]})))


def test_arrays_are_resized_like_images_and_channel_by_channel(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 5)).astype(np.uint8)
    array = only_image(saved(tmp_path / "5", train=datasets.Dataset.from_dict({"x": [pixels]})), resolution=4)
    rgb = only_image(saved(tmp_path / "3", train=datasets.Dataset.from_dict({"x": [pixels[..., :3]]})), resolution=4)
    image = only_image(saved(tmp_path / "i", train=image_table([encoded(pixels[..., :3])])), resolution=4)
    grey = only_image(saved(tmp_path / "g", train=image_table([encoded(pixels[..., 4])])), resolution=4)
    assert torch.equal(array[:3], image) and torch.equal(rgb, image)
    assert torch.equal(array[4:], grey)


def test_shrinking_averages_the_pixels(tmp_path):
    checks = (np.indices((16, 16)).sum(0) % 2 * 255).astype(np.uint8)
    inner = only_image(saved(tmp_path, train=image_table([encoded(checks)])), resolution=4)[0, 1:-1, 1:-1]
    assert ((inner > 110) & (inner < 145)).all()


def three_blocks(wide):
    """Blocks of grey 10, 20, 30, one after another."""
    blocks = np.repeat(np.array([10, 20, 30], np.uint8), 8)
    pixels = np.tile(blocks, (8, 1))
    return pixels if wide else pixels.T.copy()


@pytest.mark.parametrize("wide", [True, False])
def test_the_middle_of_a_longer_image_is_taken(tmp_path, wide):
    pixels = only_image(saved(tmp_path, train=image_table([encoded(three_blocks(wide))])), resolution=8)
    assert pixels.shape == (1, 8, 8) and (pixels == 20).all()


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("streaming", [False, True])
def test_random_crops_cover_the_image_and_depend_on_the_position_alone(tmp_path, wide, streaming):
    folder = saved(tmp_path, train=image_table([encoded(three_blocks(wide))]))
    config = DataConfig(dataset=folder, resolution=8, crop="random", holdout=0.0, streaming=streaming)
    data = load_data(config)
    whole = next(train_batches(data, config, seed=3, batch_size=60))
    means = to_images(whole["images"]).float().mean(dim=(1, 2, 3))
    assert means.min() < 13 and means.max() > 27 and len(means.unique()) > 10
    uniform = PositionalRandomness(3).uniform("crop", 0, 60, (2,))[:, 0 if wide else 1]
    torch.testing.assert_close(means.double(), 10 + 20 * uniform, rtol=0, atol=1.5)  # left edge of the crop: 16 u
    parts = list(train_batches(data, config, seed=3, batch_size=15, last_step=4))
    assert torch.equal(torch.cat([part["images"] for part in parts]), whole["images"])
    other_seed = next(train_batches(data, config, seed=4, batch_size=60))
    assert not torch.equal(other_seed["images"], whole["images"])


def test_images_of_mixed_sizes_need_a_resolution(tmp_path):
    folder = saved(tmp_path, train=image_table([encoded(marked(0)), encoded(np.zeros((5, 3), np.uint8))]))
    data = load(folder, holdout=0.0)
    with pytest.raises(DataError, match="row 1 of split 'train' .*it is 3x5 .*4x4: set --resolution"):
        data.train[1]
    assert load(folder, holdout=0.0, resolution=6).train[1]["image"].shape == (1, 6, 6)


def test_images_that_are_not_square_need_a_resolution(tmp_path):
    folder = saved(tmp_path, train=image_table([encoded(np.zeros((5, 3), np.uint8))]))
    with pytest.raises(DataError, match="it is 3x5 .*not square: set --resolution"):
        load(folder, holdout=0.0)


def test_grey_among_colour_is_free_and_colour_among_grey_must_be_asked_for(tmp_path):
    grey, colour = encoded(np.full((4, 4), 9, np.uint8)), encoded(np.full((4, 4, 3), 9, np.uint8))
    colour_first = load(saved(tmp_path / "c", train=image_table([colour, grey])), holdout=0.0)
    assert colour_first.channels == 3
    assert torch.equal(colour_first.train[1]["image"], torch.full((3, 4, 4), 9, dtype=torch.uint8))
    folder = saved(tmp_path / "g", train=image_table([grey, colour]))
    with pytest.raises(DataError, match="row 1 .*it has 3 channels, and 1 were expected: set --channels"):
        load(folder, holdout=0.0).train[1]
    assert torch.equal(
        load(folder, holdout=0.0, channels=1).train[1]["image"], torch.full((1, 4, 4), 9, dtype=torch.uint8)
    )
    assert load(folder, holdout=0.0, channels=3).train[1]["image"].shape == (3, 4, 4)
    with pytest.raises(DataError, match="it has 1 channels, and 5 were expected$"):
        load(folder, holdout=0.0, channels=5).train[0]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_corrupt_image_is_named_by_row_column_and_file(tmp_path, streaming, num_workers):
    for row in range(6):
        pixels = np.random.default_rng(row).integers(0, 256, (32, 32, 3)).astype(np.uint8)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{row}.jpg")
    broken = tmp_path / "photos" / "4.jpg"
    broken.write_bytes(broken.read_bytes()[:400])
    config = DataConfig(
        dataset=str(tmp_path / "photos"), holdout=0.0, streaming=streaming, shuffle_buffer=1, num_workers=num_workers
    )
    batches = train_batches(load_data(config), config, seed=0, batch_size=2, last_step=3)
    with pytest.raises(
        DataError, match=r"^cannot use the image in row 4 of split 'train' \(column 'image', file '.*4.jpg'\): OSError"
    ):
        list(batches)


def test_a_missing_image_is_named(tmp_path):
    data = load(saved(tmp_path, train=image_table([encoded(marked(0)), None])), holdout=0.0)
    with pytest.raises(DataError, match="row 1 of split 'train' .*missing"):
        data.train[1]


# -- columns, labels and captions -------------------------------------------------------------------------------------


def test_the_only_image_column_is_found_and_other_arrays_do_not_disturb_it(tmp_path):
    table = marked_table(3).rename_column("image", "photo").add_column("embedding", [[[0.5]]] * 3)
    data = load(saved(tmp_path, train=table), holdout=0.0)
    assert data.train[2]["image"][0, 0, 0] == 2


def test_one_of_several_image_columns_must_be_chosen(tmp_path):
    images = [encoded(marked(row)) for row in range(3)]
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    folder = saved(tmp_path, train=datasets.Dataset.from_dict({"image": images, "mask": images}, features=features))
    with pytest.raises(DataError, match="2 columns of images among its columns image, mask: .*--image_column"):
        load(folder)
    assert load(folder, image_column="mask", holdout=0.0).train[0]["image"].shape == (1, 4, 4)


@pytest.mark.parametrize("option", ["image_column", "label_column", "caption_column"])
def test_a_missing_column_is_named_with_those_there_are(marked_folder, option):
    with pytest.raises(DataError, match="no column 'picture' in .*its columns are image, label"):
        load(marked_folder, **{option: "picture"})


def test_a_column_missing_in_the_validation_split_is_named(tmp_path):
    folder = tmp_path / "f"
    marked_table(3).save_to_disk(folder / "train")
    marked_table(3).remove_columns("label").save_to_disk(folder / "test")
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match="no column 'label' in split 'test' of .*its columns are image$"):
        load(folder)


def test_a_column_of_text_is_no_image_column(tmp_path):
    folder = saved(tmp_path, train=image_table([encoded(marked(0))], text=["a"]))
    with pytest.raises(DataError, match="column 'text' of .* holds Value.*neither images nor arrays"):
        load(folder, image_column="text")


@pytest.mark.parametrize(
    ("feature", "stored", "ids", "id2label"),
    [
        (None, [2, 0, 2], [2, 0, 2], {0: "ant", 1: "bee", 2: "cat"}),
        (datasets.Value("string"), ["pig", "cow", "pig"], [1, 0, 1], {0: "cow", 1: "pig"}),
        (datasets.Value("int64"), [10, 9, 10], [1, 0, 1], {0: "9", 1: "10"}),
        (datasets.Value("bool"), [True, False, True], [1, 0, 1], {0: "False", 1: "True"}),
    ],
    ids=["classes", "strings", "integers", "booleans"],
)
def test_labels_of_any_kind_become_ids_from_zero(tmp_path, feature, stored, ids, id2label):
    folder = saved(tmp_path, train=image_table([encoded(marked(i)) for i in range(3)], stored, feature))
    data = load(folder, holdout=0.0)
    assert data.id2label == id2label
    assert [item["label"] for item in data.train] == ids


def test_the_only_column_of_classes_is_found_by_its_kind_and_one_of_several_must_be_chosen(tmp_path):
    table = marked_table(4).rename_column("label", "fine")
    assert load(saved(tmp_path / "1", train=table), holdout=0.0).train[2]["label"] == 2
    table = table.add_column("coarse", [0, 0, 1, 1], feature=datasets.ClassLabel(names=["a", "b"]))
    folder = saved(tmp_path / "2", train=table)
    with pytest.raises(DataError, match="several columns of classes, fine, coarse: .*--label_column, or none"):
        load(folder)
    assert load(folder, holdout=0.0, label_column="coarse").train[2]["label"] == 1
    assert load(folder, label_column="none").id2label is None


def test_data_without_labels_is_unconditional(tmp_path):
    config = DataConfig(dataset=saved(tmp_path, train=image_table([encoded(marked(0))] * 4)))
    data = load_data(config)
    assert data.id2label is None
    assert next(train_batches(data, config, seed=0, batch_size=2)).keys() == {
        "images",
        "positions",
        "first_position",
        "rows",
    }


def test_numbers_that_are_no_classes_are_refused_as_labels(tmp_path):
    folder = saved(tmp_path, train=image_table([encoded(marked(0))], [0.5], datasets.Value("float32")))
    with pytest.raises(DataError, match="label column 'label' .*float32.*not classes: .*--label_column, or none"):
        load(folder)


def test_labels_of_validation_are_matched_by_name(tmp_path):
    images = [encoded(marked(i)) for i in range(3)]
    other_order = image_table(images, [0, 1, 2], datasets.ClassLabel(names=["cat", "bee", "ant"]))
    names = image_table(images, ["cat", "bee", "ant"], datasets.Value("string"))
    train = marked_table(3)
    for test in (other_order, names):
        folder = tmp_path / test.features["label"].dtype
        train.save_to_disk(folder / "train")
        test.save_to_disk(folder / "test")
        (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
        assert [item["label"] for item in load(folder).validation] == [2, 1, 0]


def test_a_label_that_training_does_not_know_is_named(tmp_path):
    images = [encoded(marked(i)) for i in range(3)]
    folder = saved(
        tmp_path,
        train=image_table(images, ["cow", "pig", "cow"], datasets.Value("string")),
        test=image_table(images, ["cow", "yak", "yak"], datasets.Value("string")),
    )
    with pytest.raises(
        DataError,
        match="label 'yak' in row 1 of split 'test' .*'label'.* is not one of the 2 training labels: cow, pig",
    ):
        load(folder)


@pytest.mark.parametrize("bad", [None, -1])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_without_label_is_named(tmp_path, bad, streaming):
    images = [encoded(marked(i)) for i in range(3)]
    folder = saved(tmp_path, train=image_table(images, [0, 1, bad]))
    with pytest.raises(DataError, match=f"label {bad} in row 2 of split 'train'"):
        list(load(folder, holdout=0.0, streaming=streaming).train)


def test_captions_are_read_when_asked_for(tmp_path):
    captions = ["an ant", "a bee", None]
    config = DataConfig(
        dataset=saved(tmp_path, train=image_table([encoded(marked(i)) for i in range(3)], text=captions)),
        caption_column="text",
        holdout=0.0,
    )
    data = load_data(config)
    assert data.train[1]["caption"] == "a bee"
    with pytest.raises(DataError, match="caption in row 2 of split 'train' .*'text'.* is None, not a text"):
        next(train_batches(data, config, seed=0, batch_size=3))
    config = DataConfig(**{**vars(config), "max_train_samples": 1})
    batch = next(train_batches(load_data(config), config, seed=0, batch_size=2))
    assert batch["captions"] == [captions[row] for row in batch["rows"].tolist()]


# -- opening a data set -----------------------------------------------------------------------------------------------


def test_a_folder_of_class_folders_is_a_data_set(tmp_path):
    for row, name in enumerate(["dog", "cat", "dog", "cat"]):
        (tmp_path / "pets" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(marked(row)).save(tmp_path / "pets" / name / f"{row}.png")
    data = load(tmp_path / "pets", holdout=0.0)
    assert (data.name, data.hub_id) == ("pets", None)
    assert data.id2label == {0: "cat", 1: "dog"}
    assert {(int(item["image"][0, 0, 0]), item["label"]) for item in data.train} == {(0, 1), (1, 0), (2, 1), (3, 0)}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_parquet_files_is_a_data_set(tmp_path, streaming):
    (tmp_path / "p").mkdir()
    marked_table(5).to_parquet(tmp_path / "p" / "train-0.parquet")
    marked_table(3, first=5).to_parquet(tmp_path / "p" / "validation-0.parquet")
    data = load(tmp_path / "p", streaming=streaming)
    assert data.id2label == dict(enumerate(CLASSES))
    assert [int(item["image"][0, 0, 0]) for item in data.train] == [0, 1, 2, 3, 4]
    assert [int(item["image"][0, 0, 0]) for item in data.validation] == [5, 6, 7]


def test_a_single_saved_table_is_a_training_split(tmp_path):
    marked_table(5).save_to_disk(tmp_path / "saved")
    assert len(load(tmp_path / "saved", holdout=0.0).train) == 5


def test_the_validation_split_is_the_one_asked_for_else_validation_else_test(tmp_path):
    splits = {name: marked_table(1, first) for first, name in enumerate(["test", "train", "validation", "extra"])}
    folder = saved(tmp_path / "4", **splits)
    assert load(folder).validation[0]["image"][0, 0, 0] == 2
    assert load(folder, validation_split="extra").validation[0]["image"][0, 0, 0] == 3
    assert load(folder, train_split="validation").validation[0]["image"][0, 0, 0] == 0
    with pytest.raises(DataError, match="no split 'dev'; it has test, train, validation, extra"):
        load(folder, validation_split="dev")
    with pytest.raises(DataError, match="no split 'dev'; it has test, train, validation, extra"):
        load(folder, train_split="dev")


def test_rows_are_held_out_where_there_is_no_validation_split(tmp_path):
    folder = saved(tmp_path, train=marked_table(40))
    data = load(folder, holdout=0.25)
    train, held = ([item["row"] for item in rows] for rows in (data.train, data.validation))
    assert held == sorted(held) and train == sorted(train)
    assert len(held) == 10 and sorted(train + held) == list(range(40))
    assert held != list(range(10)) and held != list(range(30, 40))  # rows are often stored by class
    assert [int(item["image"][0, 0, 0]) for item in data.validation] == held
    assert [item["row"] for item in load(folder, holdout=0.25).validation] == held
    assert len(load(folder, holdout=0.001).validation) == 1
    assert load(folder, holdout=0.0).validation is None
    with pytest.raises(DataError, match="loaded without validation rows"):
        validation_batches(load(folder, holdout=0.0), batch_size=2)


def test_a_holdout_must_leave_rows_to_train_on(tmp_path):
    with pytest.raises(DataError, match="holdout=0.05 leaves none of the 1 rows"):
        load(saved(tmp_path, train=marked_table(1)))


def test_fewer_training_rows_are_a_fixed_choice_from_all_over_the_data(tmp_path):
    folder = saved(tmp_path, train=marked_table(100))
    rows = [item["row"] for item in load(folder, holdout=0.1, max_train_samples=20).train]
    held = [item["row"] for item in load(folder, holdout=0.1).validation]
    assert len(rows) == 20 and not set(rows) & set(held)
    assert min(rows) < 25 and max(rows) >= 75
    assert len(load(folder, holdout=0.1, max_train_samples=1000).train) == 90


def test_a_folder_that_does_not_exist_or_is_empty_is_named(tmp_path):
    with pytest.raises(DataError, match="the folder '.*nowhere' does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"the folder './nowhere' does not exist"):
        load("./nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the folder '.*empty' is empty"):
        load(tmp_path / "empty")
    (tmp_path / "empty" / "class").mkdir()
    with pytest.raises(DataError, match="cannot open the data set '.*empty': .*any data files"):
        load(tmp_path / "empty")
    (tmp_path / "file.parquet").touch()
    with pytest.raises(DataError, match="'.*file.parquet' is a file: give the folder"):
        load(tmp_path / "file.parquet")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_truncated_parquet_file_is_named(tmp_path, streaming):
    (tmp_path / "p").mkdir()
    file = tmp_path / "p" / "train.parquet"
    marked_table(5).to_parquet(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DataError, match="cannot open the data set '.*/p': .*Parquet"):
        load(tmp_path / "p", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("parquet", [False, True])
def test_a_split_without_rows_is_named(tmp_path, streaming, parquet):
    if parquet:
        (tmp_path / "saved").mkdir()
        marked_table(0).to_parquet(tmp_path / "saved" / "train.parquet")
    else:
        saved(tmp_path, train=marked_table(0))
    with pytest.raises(DataError, match="(the split 'train' of|the saved table) '.*saved.*' has 0 rows"):
        load(tmp_path / "saved", holdout=0.0, streaming=streaming)


def test_a_hub_that_cannot_be_reached_is_explained(monkeypatch):
    def unreachable(*args):
        raise ConnectionError("Couldn't reach 'someone/pets' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    with pytest.raises(
        DataError,
        match="cannot open the data set 'someone/pets': ConnectionError: Couldn't reach .*offline.*takes a folder",
    ):
        load("someone/pets")


def test_a_hub_name_is_kept_for_the_card(tmp_path, monkeypatch):
    (tmp_path / "p").mkdir()
    marked_table(5).to_parquet(tmp_path / "p" / "train.parquet")
    build, asked = datasets.load_dataset_builder, []
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda *args: (asked.append(args), build(str(tmp_path / "p")))[1]
    )
    data = load("someone/pets", dataset_config="small")
    assert (data.name, data.hub_id) == ("someone/pets", "someone/pets")
    assert asked == [("someone/pets", "small")]


@pytest.mark.parametrize(
    "option", [{"holdout": 1.0}, {"holdout": -0.1}, {"resolution": 0}, {"shuffle_buffer": 0}, {"num_workers": -1}]
)
def test_options_out_of_range_are_refused(option):
    (name,) = option
    with pytest.raises(DataError, match=f"need .*{name}.* got {option[name]}"):
        DataConfig(**option)


def test_the_options_are_a_command_line():
    words = ["--dataset", "x", "--resolution=16", "--flip", "--crop=random", "--holdout=0.2", "--label_column=none"]
    (config,) = HfArgumentParser(DataConfig).parse_args_into_dataclasses(words)
    assert config == DataConfig("x", resolution=16, flip=True, crop="random", holdout=0.2, label_column="none")
    assert all(option.metadata["help"] for option in fields(DataConfig))


@pytest.mark.parametrize("file", sorted(Path(annealers.data.__file__).parent.glob("*.py")), ids=lambda file: file.stem)
def test_importing_the_package_imports_no_heavy_library(file):
    top = [node for node in ast.parse(file.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {name for node in top for name in ([a.name for a in node.names] + [getattr(node, "module", "")])}
    assert not {m for m in modules if m.split(".")[0] in {"datasets", "sklearn", "PIL", "transformers"}}


# -- the order of training --------------------------------------------------------------------------------------------


def test_every_epoch_is_another_permutation_of_all_rows():
    rows = PositionBatches(11, seed=5, batch_size=1).rows(range(44)).reshape(4, 11)
    assert torch.equal(rows.sort(dim=1).values, torch.arange(11).expand(4, 11))
    assert len({tuple(epoch) for epoch in rows.tolist()}) == 4
    for epoch, order in enumerate(rows):
        assert torch.equal(order, PositionalRandomness(5).permutation("rows", epoch, 11))
    assert not torch.equal(rows, PositionBatches(11, seed=6, batch_size=1).rows(range(44)).reshape(4, 11))


def test_the_row_at_a_position_does_not_depend_on_what_was_asked_before():
    whole = PositionBatches(11, seed=5, batch_size=1).rows(range(100))
    for positions in (range(95, 100), range(8, 14), [3]):
        assert torch.equal(PositionBatches(11, seed=5, batch_size=1).rows(positions), whole[list(positions)])
    assert PositionBatches(11, seed=5, batch_size=1).rows(60) == whole[60]


def test_a_process_reads_the_contiguous_positions_of_the_formula():
    batches = PositionBatches(
        100, 0, batch_size=24, process_index=1, num_processes=3, accumulation=2, first_step=2, last_step=4
    )
    assert list(batches) == [range(52, 56), range(64, 68), range(76, 80), range(88, 92)]
    assert len(batches) == 4


def test_a_batch_that_cannot_be_shared_out_is_refused(marked_folder):
    config = DataConfig(dataset=marked_folder)
    with pytest.raises(ValueError, match="batch_size=10, num_processes=3, accumulation=2"):
        train_batches(load_data(config), config, seed=0, batch_size=10, num_processes=3, accumulation=2)
    with pytest.raises(ValueError, match="batch_size=0"):
        PositionBatches(10, 0, batch_size=0)
    with pytest.raises(ValueError, match="process_index < 2, got 2"):
        PositionBatches(10, 0, batch_size=2, process_index=2, num_processes=2)
    with pytest.raises(ValueError, match="first_step <= last_step, got 5 and 4"):
        PositionBatches(10, 0, batch_size=2, first_step=5, last_step=4)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_batch_is_what_it_says(marked_folder, streaming):
    config = DataConfig(dataset=marked_folder, streaming=streaming)
    batch = next(train_batches(load_data(config), config, seed=0, batch_size=4, first_step=2, last_step=3))
    assert batch["images"].shape == (4, 1, 4, 4) and batch["images"].dtype == torch.float32
    assert batch["images"].min() == -1 and batch["images"].max() == 1
    assert batch["positions"].tolist() == [8, 9, 10, 11] and batch["first_position"] == 8
    assert batch["rows"].dtype == batch["labels"].dtype == batch["positions"].dtype == torch.int64
    assert torch.equal(batch["rows"], rows_seen(batch))
    assert torch.equal(batch["labels"], batch["rows"] % 3)


def test_training_visits_the_rows_in_the_order_of_the_permutations(marked_folder):
    config = DataConfig(dataset=marked_folder)
    batches = train_batches(load_data(config), config, seed=7, batch_size=4, last_step=9)
    seen = torch.cat([rows_seen(batch) for batch in batches])
    assert torch.equal(seen, PositionBatches(11, seed=7, batch_size=4).rows(range(36)))


def test_rows_are_numbered_as_they_are_stored_when_some_are_held_out(tmp_path):
    config = DataConfig(dataset=saved(tmp_path, train=marked_table(20)), holdout=0.5)
    for batch in train_batches(load_data(config), config, seed=0, batch_size=4, last_step=3):
        assert torch.equal(batch["rows"], rows_seen(batch))


SPLITS = [(1, 1), (1, 3), (2, 1), (3, 2), (6, 2)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("num_processes", "accumulation"), SPLITS)
def test_processes_and_micro_batches_split_the_batch_of_one_process(
    marked_folder, streaming, num_processes, accumulation
):
    config = DataConfig(dataset=marked_folder, flip=True, streaming=streaming, shuffle_buffer=5)
    data = load_data(config)
    whole = train_batches(data, config, seed=1, batch_size=12, last_step=3)
    shares = [
        train_batches(
            data,
            config,
            seed=1,
            batch_size=12,
            accumulation=accumulation,
            process_index=process,
            num_processes=num_processes,
            last_step=3,
        )
        for process in range(num_processes)
    ]
    for batch in whole:
        parts = [next(share) for _ in range(accumulation) for share in shares]
        for key in ("images", "labels", "positions", "rows"):
            assert torch.equal(torch.cat([part[key] for part in parts]), batch[key])
        assert [part["first_position"] for part in parts] == [part["positions"][0] for part in parts]
    assert all(next(share, None) is None for share in shares)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("first_step", [1, 3, 8])
def test_a_resumed_run_sees_the_rest_of_the_uninterrupted_one(marked_folder, streaming, first_step):
    config = DataConfig(dataset=marked_folder, flip=True, streaming=streaming, shuffle_buffer=5)
    data = load_data(config)
    whole = list(train_batches(data, config, seed=1, batch_size=6, accumulation=2, last_step=9))
    rest = list(train_batches(data, config, seed=1, batch_size=6, accumulation=2, first_step=first_step, last_step=9))
    assert len(rest) == 2 * (9 - first_step)
    for one, other in zip(whole[2 * first_step :], rest, strict=True):
        equal_batches(one, other)


@pytest.mark.parametrize("streaming", [False, True])
def test_workers_change_nothing(marked_folder, streaming):
    runs = []
    for num_workers in (0, 2):
        config = DataConfig(dataset=marked_folder, flip=True, streaming=streaming, num_workers=num_workers)
        runs.append(list(train_batches(load_data(config), config, seed=1, batch_size=4, last_step=5)))
    for one, other in zip(*runs, strict=True):
        equal_batches(one, other)


def test_loading_leaves_the_global_generators_alone(marked_folder):
    config = DataConfig(dataset=marked_folder, flip=True, crop="random")
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    data = load_data(config)
    list(train_batches(data, config, seed=1, batch_size=4, last_step=5))
    list(validation_batches(data, batch_size=4))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_a_batch_larger_than_the_data_set_goes_on_with_the_next_epochs(marked_folder):
    config = DataConfig(dataset=marked_folder)
    batch = next(train_batches(load_data(config), config, seed=0, batch_size=33))
    assert Counter(batch["rows"].tolist()) == {row: 3 for row in range(11)}


def test_flips_mirror_images_as_a_function_of_the_position_alone(marked_folder):
    config = DataConfig(dataset=marked_folder, flip=True)
    data = load_data(config)
    whole = next(train_batches(data, config, seed=2, batch_size=60))
    parts = list(train_batches(data, config, seed=2, batch_size=15, first_step=1, last_step=4))
    assert torch.equal(torch.cat([flipped(part) for part in parts]), flipped(whole)[15:])
    assert 15 < flipped(whole).sum() < 45
    uniform = PositionalRandomness(2).uniform("flip", 0, 60)
    assert torch.equal(flipped(whole), uniform < 0.5)
    plain = DataConfig(dataset=marked_folder)
    straight = next(train_batches(data, plain, seed=2, batch_size=60))
    assert not flipped(straight).any()
    mirrored = torch.where(flipped(whole)[:, None, None, None], straight["images"].flip(-1), straight["images"])
    assert torch.equal(whole["images"], mirrored)


# -- streaming --------------------------------------------------------------------------------------------------------


def stream_rows(folder, steps, seed=1, **options):
    config = DataConfig(dataset=folder, streaming=True, **options)
    batches = train_batches(load_data(config), config, seed=seed, batch_size=4, last_step=steps)
    return torch.cat([rows_seen(batch) for batch in batches]).tolist()


def test_an_unshuffled_stream_has_the_stored_order_and_starts_again(marked_folder):
    assert stream_rows(marked_folder, 8, shuffle_buffer=1) == [position % 11 for position in range(32)]


@pytest.mark.parametrize("shuffle_buffer", [4, 11, 1000])
def test_a_shuffled_stream_shows_every_row_once_per_pass_in_changing_order(marked_folder, shuffle_buffer):
    rows = np.array(stream_rows(marked_folder, 11, shuffle_buffer=shuffle_buffer)).reshape(4, 11)
    assert (np.sort(rows, axis=1) == np.arange(11)).all()
    assert len({tuple(one_pass) for one_pass in rows.tolist()} | {tuple(range(11))}) == 5
    assert stream_rows(marked_folder, 11, seed=2, shuffle_buffer=shuffle_buffer) != rows.flatten().tolist()
    places = np.arange(11)
    assert (rows - places < shuffle_buffer).all()  # no row leaves the buffer before it has entered


def test_a_shuffle_buffer_as_large_as_the_stream_shuffles_evenly():
    draws = iter(PositionalRandomness(0).uniform("test", 0, 5 * 4000).tolist())
    orders = Counter(tuple(_shuffled(iter(range(3)), 5, draws)) for _ in range(3000))
    assert len(orders) == 6
    standard_error = (3000 * 1 / 6 * 5 / 6) ** 0.5
    assert all(abs(times - 500) < 4 * standard_error for times in orders.values())


def test_every_row_of_a_full_shuffle_buffer_is_as_likely_to_leave_it():
    draws = iter(PositionalRandomness(0).uniform("test", 0, 3000).tolist())
    first = Counter(next(_shuffled(iter(range(9)), 3, draws)) for _ in range(3000))
    standard_error = (3000 * 1 / 3 * 2 / 3) ** 0.5
    assert all(abs(first[row] - 1000) < 4 * standard_error for row in range(3))


def test_fewer_training_samples_are_the_first_rows_of_a_stream(marked_folder):
    assert set(stream_rows(marked_folder, 5, max_train_samples=3)) == {0, 1, 2}


def test_a_process_does_not_decode_the_rows_of_others(tmp_path):
    images = [encoded(marked(row)) for row in range(8)]
    images[5] = {"bytes": b"broken", "path": None}
    config = DataConfig(
        dataset=saved(tmp_path, train=image_table(images)), streaming=True, shuffle_buffer=1, holdout=0.0
    )

    def share(process_index):
        return list(train_batches(load_data(config), config, 0, 4, 1, process_index, 2, last_step=2))

    assert [batch["rows"].tolist() for batch in share(1)] == [[2, 3], [6, 7]]
    with pytest.raises(DataError, match="row 5"):
        share(0)


def test_resuming_a_stream_reads_at_most_one_pass_before_the_begun_one(marked_folder, monkeypatch):
    config = DataConfig(dataset=marked_folder, streaming=True, shuffle_buffer=4)
    data = load_data(config)
    passes, stored_rows = [], data.train.stored_rows
    monkeypatch.setattr(data.train, "stored_rows", lambda: (passes.append(1), stored_rows())[1])
    late = next(train_batches(data, config, seed=1, batch_size=4, first_step=30, last_step=31))  # position 120 of 11s
    assert len(passes) <= 3
    whole = list(train_batches(data, config, seed=1, batch_size=4, last_step=31))
    equal_batches(late, whole[30])


def test_a_stream_needs_its_own_validation_split(tmp_path):
    folder = saved(tmp_path, train=marked_table(4))
    with pytest.raises(DataError, match="no split to validate on .it has train.*--validation_split, or --holdout 0"):
        load(folder, streaming=True)
    assert load(folder, streaming=True, holdout=0.0).validation is None


def test_a_stream_needs_declared_classes(tmp_path):
    table = image_table([encoded(marked(0))], ["cow"], datasets.Value("string"))
    folder = saved(tmp_path, train=table)
    with pytest.raises(DataError, match="'label' of the stream .*not a ClassLabel.*--label_column none"):
        load(folder, streaming=True, holdout=0.0)
    assert load(folder, streaming=True, holdout=0.0, label_column="none").id2label is None


def test_a_stream_that_breaks_off_is_explained(marked_folder, monkeypatch):
    config = DataConfig(dataset=marked_folder, streaming=True, shuffle_buffer=1)
    data = load_data(config)

    def breaking():
        yield {"image": encoded(marked(0)), "label": 0}
        raise OSError("connection lost")

    monkeypatch.setattr(data.train, "table", breaking())
    with pytest.raises(
        DataError, match="cannot read row 1 of split 'train' from the stream: OSError: connection lost"
    ):
        list(train_batches(data, config, seed=0, batch_size=2))


# -- validation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_processes", [1, 2, 3, 5])
def test_validation_shows_every_row_once_in_the_same_batches_for_any_number_of_processes(
    marked_folder, streaming, num_processes
):
    data = load(marked_folder, streaming=streaming, flip=True, crop="random")
    batches = [
        batch
        for process in range(num_processes)
        for batch in validation_batches(data, batch_size=2, process_index=process, num_processes=num_processes)
    ]
    batches.sort(key=lambda batch: batch["first_position"])
    assert [batch["rows"].tolist() for batch in batches] == [[0, 1], [2, 3], [4, 5], [6]]
    for batch in batches:
        assert torch.equal(rows_seen(batch), 100 + batch["rows"])
        assert torch.equal(batch["labels"], (100 + batch["rows"]) % 3)
        assert torch.equal(batch["positions"], batch["rows"])
        assert batch["first_position"] == batch["positions"][0]
        assert not flipped(batch).any()


@pytest.mark.parametrize("streaming", [False, True])
def test_fewer_validation_rows_are_a_fixed_choice_or_the_first_of_a_stream(marked_folder, streaming):
    data = load(marked_folder, streaming=streaming)

    def rows(max_samples, num_processes):
        batches = [
            batch
            for process in range(num_processes)
            for batch in validation_batches(data, 2, process, num_processes, max_samples=max_samples)
        ]
        assert sorted(p for batch in batches for p in batch["positions"].tolist()) == list(range(min(max_samples, 7)))
        return sorted(row for batch in batches for row in batch["rows"].tolist())

    assert rows(5, 1) == rows(5, 2) == rows(5, 3)
    assert len(set(rows(5, 2))) == 5
    assert rows(99, 2) == list(range(7))
    if streaming:
        assert rows(3, 2) == [0, 1, 2]


@pytest.mark.parametrize("streaming", [False, True])
def test_validation_with_workers_is_the_same(marked_folder, streaming):
    data = load(marked_folder, streaming=streaming)
    for one, other in zip(
        validation_batches(data, batch_size=3), validation_batches(data, batch_size=3, num_workers=2), strict=True
    ):
        equal_batches(one, other)
