"""Captions as vectors: a frozen text encoder, what it says of a caption, and captions that are of other images.

A caption is embedded by itself, not in a batch, so that its vector is a function of the caption alone, to the last
bit; each is kept in memory and embedded once.

    symbol    code           shape
    y         text_embeds    (B, D)    pooled: the text as a whole
"""

import importlib
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

import annealers
from annealers.data import ImageData, ImageRows
from annealers.pipelines.text_embeddings import pooled_text
from annealers.randomness import PositionalRandomness

LIBRARIES = ("annealers", "transformers")  # that a component may be of: loading one runs its code
OPEN_CLIP = ("hf-hub:", "local-dir:")  # how names of open_clip begin that bring their own weights


class Captions:
    """The captions of a data set, as a frozen text encoder sees them.

    Args:
        text_encoder: Its weights no longer require gradients.
        tokenizer: That belongs to it.
    """

    def __init__(self, text_encoder: nn.Module, tokenizer: Any) -> None:
        self.text_encoder = text_encoder.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.known: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def embeddings(self, captions: list[str]) -> torch.Tensor:
        """Pooled embeddings, float32 (B, D), on the CPU."""
        for caption in captions:
            if caption not in self.known:
                self.text_encoder.to(PartialState().device)
                self.known[caption] = pooled_text(self.tokenizer, self.text_encoder, [caption])[0].float().cpu()
        return torch.stack([self.known[caption] for caption in captions])

    @property
    def width(self) -> int:
        """D."""
        return self.embeddings([""]).shape[1]


class OtherCaptions:
    """For each image a caption that is not its own, drawn evenly from all different ones of the training data.

    Raises:
        ValueError: If the data is a stream, whose captions are not known before they are read, or has one caption.
    """

    def __init__(self, data: ImageData, randomness: PositionalRandomness) -> None:
        rows = data.train
        if not isinstance(rows, ImageRows):
            raise ValueError(
                f"captions of other images are drawn from all of {data.name}: load it without --streaming, or leave "
                "them out, --no_matching"
            )
        column = rows.table.select(rows.row_numbers)[rows.reader.columns.caption]
        self.captions = sorted({caption for caption in column if isinstance(caption, str)})  # others cannot be read
        if len(self.captions) < 2:
            raise ValueError(f"the images of {data.name} have one caption, {self.captions}: none does not match")
        self.numbers = {caption: number for number, caption in enumerate(self.captions)}
        self.randomness = randomness

    def draw(self, captions: list[str], first_position: int) -> list[str]:
        """One for each of the images from a position on, whose captions are given."""
        count = len(self.captions) - 1
        others = self.randomness.integers("caption of another image", first_position, len(captions), count).tolist()
        own = [self.numbers[caption] for caption in captions]
        return [self.captions[other + (other >= mine)] for other, mine in zip(others, own, strict=True)]


def load_text_encoder(name: str) -> tuple[nn.Module, Any]:
    """The text encoder and the tokenizer of a pipeline, Stable Diffusion's, say, or of a model of open_clip.

    Args:
        name: Folder or Hub id of the pipeline; "hf-hub:user/name" or "local-dir:path" of a model of open_clip.

    Raises:
        OSError: If there is no such pipeline.
        ValueError: If it has no text encoder, or one of another library than transformers or annealers.
    """
    if name.startswith(OPEN_CLIP):
        model = annealers.OpenCLIPTextModel.from_open_clip(name)
        return model, annealers.OpenCLIPTokenizer.from_open_clip(name)
    try:
        index = annealers.AnnealersPipeline.load_config(name)  # also of a folder with code
    except OSError as error:
        raise OSError(
            f"found no pipeline in {name!r}: name one with a text_encoder and a tokenizer, a folder or a Hub id"
        ) from error
    parts = []
    for part in ("text_encoder", "tokenizer"):
        library, class_name = index.get(part) or (None, None)
        if library not in LIBRARIES:
            raise ValueError(
                f"need a {part} of {' or '.join(LIBRARIES)} in {name!r}, got {class_name!r} of {library!r}"
            )
        part_class = getattr(importlib.import_module(library), class_name)
        parts.append(part_class.from_pretrained(name, subfolder=part))
    return parts[0], parts[1]
