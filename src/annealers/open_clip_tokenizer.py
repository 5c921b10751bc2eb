"""The tokenizers of open_clip as a component of Diffusers' pipelines, called and saved as those of transformers.

open_clip's own tokenizer cleans a text (repairs Unicode, resolves HTML entities, joins white space, lowers case),
splits it by CLIP's byte pair encoding, puts it between a start and an end token, cuts what is too long before the end
token, and fills up with zeros:

    "a cat"  ->  49406 320 2368 49407 0 0 ... 0

CLIPTokenizer of transformers cleans less and fills up with the end token. Zero is also the first piece of the
vocabulary, "!"; so padding is no special token here, or texts would be split at their exclamation marks. The other
tokenizers of open_clip are fast ones of transformers behind a cleaning of open_clip's; they are kept as one file.

Sources: Sennrich et al. 2016, arXiv:1508.07909, byte pair encoding; Radford et al. 2021, arXiv:2103.00020, Sec. 2.4.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol, Self

import open_clip
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer, get_clean_fn
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizer

from annealers.open_clip_config import open_clip_config

CLEANINGS = ("lower", "canonicalize", "whitespace")
VOCABULARY_FILE = "open_clip_vocabulary.json"


class Vocabulary(Protocol):
    """Texts to pieces, pieces to numbers, and back."""

    numbers: dict[str, int]
    names: dict[int, str]

    def pieces(self, text: str) -> list[str]:
        """The pieces of a text, which is cleaned first."""
        ...

    def text(self, numbers: Sequence[int]) -> str:
        """The text of pieces."""
        ...

    def save(self, file: str) -> tuple[str, ...]:
        """Writes what a package does not bring along, and says where."""
        ...


@lru_cache
def byte_pair_encoding(clean: str) -> SimpleTokenizer:
    """open_clip's own, of which only what does not depend on the length is used; it takes long to read."""
    return SimpleTokenizer(clean=clean)


class BytePairVocabulary:
    """CLIP's 49,408 pieces, which come with the package open_clip."""

    def __init__(self, clean: str) -> None:
        self.encoding = byte_pair_encoding(clean)
        self.numbers, self.names = self.encoding.encoder, self.encoding.decoder

    def pieces(self, text: str) -> list[str]:
        return [self.names[number] for number in self.encoding.encode(text)]

    def text(self, numbers: Sequence[int]) -> str:
        return self.encoding.decode(numbers)

    def save(self, file: str) -> tuple[str, ...]:
        return ()


def without_limits(encoding: Tokenizer) -> Tokenizer:
    """Neither cuts texts nor fills them up, which is done in Python."""
    encoding.no_truncation()
    encoding.no_padding()
    return encoding


class FileVocabulary:
    """A fast tokenizer of transformers, in the file that the library tokenizers writes."""

    def __init__(self, file: str, clean: str) -> None:
        self.encoding = without_limits(Tokenizer.from_file(file))
        self.numbers = self.encoding.get_vocab(with_added_tokens=True)
        self.names = {number: piece for piece, number in self.numbers.items()}
        self.clean = get_clean_fn(clean)

    def pieces(self, text: str) -> list[str]:
        numbers = self.encoding.encode(self.clean(text), add_special_tokens=False).ids
        return [self.names[number] for number in numbers]

    def text(self, numbers: Sequence[int]) -> str:
        return self.encoding.decode(list(numbers), skip_special_tokens=False)

    def save(self, file: str) -> tuple[str, ...]:
        self.encoding.save(file)
        return (file,)


class OpenCLIPTokenizer(PreTrainedTokenizer):
    """Makes of texts the tokens that open_clip makes of them, by the calls and with the folder of transformers.

    Make one with `from_open_clip`; without arguments it is that of most models of open_clip, CLIP's.

    Args:
        model_max_length: Longest text in tokens, with those at its ends; open_clip's `context_length`.
        clean: What is done to a text first: "lower" (for CLIP's vocabulary), "canonicalize" (removes punctuation too)
            or "whitespace" (keeps upper case).
        vocabulary_file: Another vocabulary than CLIP's, a `tokenizer.json` of the library tokenizers.
        prefix_tokens: Numbers before each text; None is CLIP's start token.
        suffix_tokens: Numbers after each text; None is CLIP's end token.
        padding_number: What fills up a text.
        zeroed_number: A number that becomes 0 wherever it stands; None is none.
        **kwargs: Those of `PreTrainedTokenizer`.

    Raises:
        ValueError: If the cleaning is unknown, or another vocabulary comes without its numbers at the ends.

    Example:
        >>> from annealers import OpenCLIPTokenizer
        >>> tokenizer = OpenCLIPTokenizer(model_max_length=6)
        >>> tokenizer(["a cat", "A &amp; B!"], padding="max_length", truncation=True, return_tensors="pt").input_ids
        tensor([[49406,   320,  2368, 49407,     0,     0],
                [49406,   320,   261,   321,   256, 49407]])
    """

    __module__ = "annealers"  # its public name
    vocab_files_names = {"vocabulary_file": VOCABULARY_FILE}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        model_max_length: int = 77,
        clean: str = "lower",
        vocabulary_file: str | None = None,
        prefix_tokens: Sequence[int] | None = None,
        suffix_tokens: Sequence[int] | None = None,
        padding_number: int = 0,
        zeroed_number: int | None = None,
        **kwargs: Any,
    ) -> None:
        if clean not in CLEANINGS:
            raise ValueError(f"clean must be one of {CLEANINGS}, got {clean!r}")
        self.vocabulary: Vocabulary
        if vocabulary_file is None:
            self.vocabulary = BytePairVocabulary(clean)
            start, end = byte_pair_encoding(clean).all_special_ids
            prefix_tokens = [start] if prefix_tokens is None else prefix_tokens
            suffix_tokens = [end] if suffix_tokens is None else suffix_tokens
        elif prefix_tokens is None or suffix_tokens is None:
            raise ValueError("a vocabulary_file needs prefix_tokens and suffix_tokens, which may be empty")
        else:
            self.vocabulary = FileVocabulary(vocabulary_file, clean)
        self.clean = clean
        self.prefix_tokens, self.suffix_tokens = list(prefix_tokens), list(suffix_tokens)
        self.padding_number, self.zeroed_number = padding_number, zeroed_number
        if self.prefix_tokens:
            kwargs["bos_token"] = self.vocabulary.names[self.prefix_tokens[0]]
        if self.suffix_tokens:
            kwargs["eos_token"] = self.vocabulary.names[self.suffix_tokens[-1]]
        super().__init__(
            model_max_length=model_max_length,
            clean=clean,
            prefix_tokens=self.prefix_tokens,
            suffix_tokens=self.suffix_tokens,
            padding_number=padding_number,
            zeroed_number=zeroed_number,
            special_tokens_pattern="prefix_suffix",
            **kwargs,
        )

    @classmethod
    def from_open_clip(cls, name: str, context_length: int | None = None, cache_dir: str | None = None) -> Self:
        """The tokenizer of a model of open_clip.

        Args:
            name: As in `OpenCLIPTextModel.from_open_clip`: "ViT-B-32", "hf-hub:user/name" or "local-dir:path".
            context_length: Longest text in tokens; None is that of the model.
            cache_dir: Where the tokenizers that transformers loads are kept; None is its choice.

        Raises:
            ValueError: If open_clip knows no such model, or its tokenizer does what this class does not: draws which
                words it keeps, takes further special tokens, puts a class token at the end of the padding, or has no
                fast form.
        """
        name, config = open_clip_config(name)  # open_clip itself would take CLIP's for an unknown name
        text = config["text_cfg"]
        options = text.get("tokenizer_kwargs") or {}
        refused = sorted(set(options) - {"clean", "strip_sep_token", "language"})
        if refused or text.get("tokenizer_mode"):
            raise ValueError(
                f"the tokenizer of {name} is made with {refused or ''}{text.get('tokenizer_mode') or ''}, "
                f"which OpenCLIPTokenizer does not know"
            )
        tokenizer = open_clip.get_tokenizer(name, context_length=context_length, cache_dir=cache_dir)
        if isinstance(tokenizer, SimpleTokenizer):
            return cls(tokenizer.context_length, options.get("clean", "lower"))
        if not isinstance(tokenizer, HFTokenizer) or not tokenizer.tokenizer.is_fast:
            raise ValueError(f"the tokenizer of {name} has no fast form: {tokenizer}")
        return cls._from_fast(tokenizer, options.get("clean", "whitespace"))

    @classmethod
    def _from_fast(cls, tokenizer: HFTokenizer, clean: str) -> Self:
        """The same tokenizer, as one file and the numbers that transformers would put around and behind a text."""
        fast = tokenizer.tokenizer
        encoding = without_limits(Tokenizer.from_str(fast.backend_tokenizer.to_str()))
        word = encoding.encode("a")
        own = [place for place, special in enumerate(word.special_tokens_mask) if not special]
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, VOCABULARY_FILE)
            encoding.save(file)
            return cls(
                tokenizer.context_length,
                clean,
                vocabulary_file=file,
                prefix_tokens=word.ids[: own[0]],
                suffix_tokens=word.ids[own[-1] + 1 :],
                padding_number=fast.pad_token_id,
                zeroed_number=fast.sep_token_id if tokenizer.strip_sep_token else None,
                padding_side=fast.padding_side,
                truncation_side=fast.truncation_side,
            )

    # ---- what transformers asks of a tokenizer ----------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return len(self.vocabulary.numbers)

    def get_vocab(self) -> dict[str, int]:
        """The number of each piece."""
        return dict(self.vocabulary.numbers)

    @property
    def pad_token(self) -> str:
        """The piece that has the number of padding, which it may have in a text as well."""
        return self.vocabulary.names[self.padding_number]

    @property
    def pad_token_id(self) -> int:
        """The number that fills up a text."""
        return self.padding_number

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Refused: a text is pooled at its highest number, which is to be that of the end token.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"the vocabulary of open_clip's tokenizers is fixed, got the new tokens {new_tokens!r}")

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Puts a text, or two as one, between the start and the end."""
        numbers = super().build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        return [0 if number == self.zeroed_number else number for number in numbers]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text that pieces make."""
        return self.vocabulary.text([self.vocabulary.numbers[token] for token in tokens])

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Writes the vocabulary unless it is CLIP's, which comes with the package open_clip."""
        prefix = "" if filename_prefix is None else filename_prefix + "-"
        return self.vocabulary.save(os.path.join(save_directory, prefix + VOCABULARY_FILE))

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        """The text of numbers, without the padding behind it."""
        numbers = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        while numbers and numbers[-1] == self.padding_number:
            numbers.pop()
        return super()._decode(numbers, skip_special_tokens, clean_up_tokenization_spaces, **kwargs)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return self.vocabulary.pieces(text)

    def _update_trie(self, unique_no_split_tokens: list[str] | None = None) -> None:
        """Nothing is split off before the vocabulary sees a text: open_clip cleans whole texts."""

    def _convert_token_to_id(self, token: str) -> int:
        return self.vocabulary.numbers[token]

    def _convert_id_to_token(self, index: int) -> str:
        return self.vocabulary.names[index]
