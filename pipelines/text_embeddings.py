"""What a text encoder makes of prompts: one vector each, as a conditional generator takes it.

Any tokenizer and text encoder that the pipelines of Diffusers call alike will do, such as `CLIPTokenizer` with
`CLIPTextModel` or `CLIPTextModelWithProjection` of transformers.
"""

import warnings
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_base import LARGE_INTEGER


@torch.no_grad()
def pooled_text(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: torch.nn.Module,
    prompts: Sequence[str],
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """The embedding of each prompt, (B, D), in the dtype of the encoder: projected if it projects, else pooled.

    What of a prompt is beyond the longest sequence of the tokenizer is cut off, and a warning says what.

    Args:
        tokenizer: Called as `tokenizer(prompts, padding=..., max_length=..., truncation=..., return_tensors="pt")`,
            with `model_max_length` and `decode`.
        text_encoder: Called as `text_encoder(input_ids, attention_mask=...)`; returns `text_embeds`, the embedding in
            the space that text shares with images, or else `pooler_output`. The mask is given to an encoder whose
            config has `use_attention_mask`, as in the pipelines of Diffusers.
        prompts: B texts, at least one.
        device: Where to compute; None is where the encoder is.

    Raises:
        ValueError: If there is no prompt, one is no text, the tokenizer knows no longest sequence, or the encoder
            returns no embedding of a whole text.

    Example:
        >>> from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
        >>> tokenizer = CLIPTokenizer({"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}, [], model_max_length=77)
        >>> config = CLIPTextConfig(
        ...     vocab_size=3, hidden_size=8, num_attention_heads=2, num_hidden_layers=1, bos_token_id=0,
        ...     eos_token_id=1)
        >>> pooled_text(tokenizer, CLIPTextModel(config), ["a", "a a"]).shape
        torch.Size([2, 8])
    """
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts must be a list of at least one text, got {prompts!r}")
    if device is None:
        device = next(text_encoder.parameters()).device
    longest = tokenizer.model_max_length
    if longest > LARGE_INTEGER:  # what transformers sets where a tokenizer has none
        raise ValueError(f"a {type(tokenizer).__name__} does not know the longest sequence: set its model_max_length")
    tokens = tokenizer(
        list(prompts), padding="max_length", max_length=longest, truncation=True, return_tensors="pt"
    )  # input_ids (B, L)
    _warn_of_cut_text(tokenizer, prompts, longest)
    masked = getattr(text_encoder.config, "use_attention_mask", False)
    mask = tokens.attention_mask.to(device) if masked else None
    encoded = text_encoder(tokens.input_ids.to(device), attention_mask=mask)
    for name in ("text_embeds", "pooler_output"):
        if encoded.get(name) is not None:
            return encoded[name]
    raise ValueError(
        f"a text encoder must return text_embeds or pooler_output, (B, D); a {type(text_encoder).__name__} returns "
        f"{', '.join(encoded.keys())}"
    )


def _warn_of_cut_text(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], longest: int) -> None:
    """The last token of a sequence, cut or not, says that it ends."""
    for prompt in dict.fromkeys(prompts):
        ids = tokenizer([prompt], padding="longest", return_tensors="pt").input_ids[0]
        if len(ids) > longest:
            cut = tokenizer.decode(ids[longest - 1 : -1])
            warnings.warn(f"a prompt has {len(ids)} tokens, {longest} are read; cut off: {cut!r}", stacklevel=4)
