"""A text tower of open_clip as a model of Diffusers: it sits in a pipeline, and in its folder, as CLIPTextModel does.

The tower is open_clip's own and computes what it computes there; around it are the outputs by the names that pipelines
use, a config that says all of the architecture, and loading without open_clip's cache or the network. Per token and
for the whole text, with causal or free attention:

    h_0 = E[ids] + P        h_n = block_n(h_{n-1})        last = LayerNorm(h_N)
    pooled = last at one position of the text        e = pooled W

Sources: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
arXiv:2103.00020, Sec. 2.4; Cherti et al. 2022, "Reproducible scaling laws for contrastive language-image learning",
arXiv:2212.07143, for open_clip's; Yu et al. 2022, "CoCa: Contrastive Captioners are Image-Text Foundation Models",
arXiv:2205.01917, Sec. 3.2, for the tower that appends a class token to each text and pools that.

    symbol    code                 shape               meaning
    ids       input_ids            (B, L)              tokens, L <= max_position_embeddings
    h_n       hidden_states[n]     (B, L, width)       before the final LayerNorm; n = 0 is the embedding
    last      last_hidden_state    (B, L, width)       one state per token
    pooled    pooler_output        (B, width)
    e         text_embeds          (B, projection)     what images are compared with, not normalised
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Self

import open_clip
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from open_clip.transformer import LayerNorm, QuickGELU, TextTransformer, text_global_pool
from torch import nn

from annealers.open_clip_config import SCHEMAS, open_clip_config

# What `CLIPTextCfg` of open_clip calls otherwise than the configs of transformers, whose names pipelines ask for.
NAMES_IN_OPEN_CLIP = {
    "max_position_embeddings": "context_length",
    "hidden_size": "width",
    "num_attention_heads": "heads",
    "num_hidden_layers": "layers",
}
SAME_NAMES = (
    *("vocab_size", "mlp_ratio", "ls_init_value", "embed_cls", "pad_id", "eos_id", "no_causal_mask", "pool_type"),
    *("proj_type", "proj_bias", "act_kwargs", "norm_kwargs", "block_type", "qk_norm", "scaled_cosine_attn"),
    *("scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"),
)
POOLINGS = ("argmax", "eos", "first", "last")
PROJECTIONS = ("linear", "none")
OUTPUTS = ("last_hidden_state", "text_embeds")


@dataclass
class OpenCLIPTextOutput(BaseOutput):
    """What the tower returns, in the dtype of its weights; as a tuple, what is None is left out.

    Args:
        last_hidden_state: (B, L, hidden_size), one state per token, after the final LayerNorm.
        pooler_output: (B, hidden_size), the state that stands for the text, after the final LayerNorm.
        text_embeds: (B, projection_dim), its projection into the space shared with images; not normalised. The same
            as `pooler_output` in a tower that does not project.
        hidden_states: num_hidden_layers + 1 tensors (B, L, hidden_size), before the final LayerNorm: the embedding and
            what each block made of it. [-1] is the last, [-2] the penultimate. None unless asked for.
    """

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor
    text_embeds: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class OpenCLIPProjectedTextOutput(BaseOutput):
    """An `OpenCLIPTextOutput` whose first entry is the projection, as that of CLIPTextModelWithProjection."""

    text_embeds: torch.Tensor
    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None = None


class OpenCLIPTextModel(ModelMixin, ConfigMixin):
    """A text encoder with the architecture and the weights of an open_clip tower.

    Make one with `from_open_clip`, or with `from_clip` of a model that open_clip holds in memory.

    Args:
        projection_dim: Size of the shared space; open_clip's `embed_dim`.
        max_position_embeddings: Longest text in tokens; `context_length`.
        vocab_size: Number of tokens.
        hidden_size: `width`.
        num_attention_heads: `heads`.
        num_hidden_layers: `layers`.
        mlp_ratio: Width of the perceptrons over `hidden_size`.
        ls_init_value: Initial layer scale; None is without.
        embed_cls: Append a class token to every text and pool it, as CoCa does.
        pad_id: Token that is not looked at by the class token.
        eos_id: Token that "eos" pools at.
        no_causal_mask: Let a token look at later ones too.
        pool_type: Where the text is pooled: at its token of the highest id ("argmax", the end of a text in CLIP's
            vocabulary), at the first `eos_id` ("eos"), "first" or "last".
        proj_type: "linear" or "none".
        proj_bias: Whether the projection has a bias.
        quick_gelu: x sigmoid(1.702 x) as activation, as OpenAI's weights need it, rather than GELU.
        act_kwargs: Arguments of the activation, such as {"approximate": "tanh"}.
        norm_kwargs: Arguments of the LayerNorms, such as {"eps": 1e-6}.
        block_type: "default" or "custom"; None is "custom" if one of the following is set.
        qk_norm: See `open_clip.CLIPTextCfg` for this and the rest.
        scaled_cosine_attn: Cosine attention.
        scale_heads: A learnt scale of each head.
        scale_attn_inner: A LayerNorm before the output projection of the attention.
        scale_attn: A LayerNorm after the attention.
        scale_fc: A LayerNorm inside the perceptron.
        first_output: What comes first in the output: "last_hidden_state", as StableDiffusionPipeline needs it, or
            "text_embeds", as text_encoder_2 of StableDiffusionXLPipeline.

    Raises:
        ValueError: If a pooling, projection or output is unknown, or the heads do not divide the width.

    Example:
        >>> from annealers import OpenCLIPTextModel
        >>> model = OpenCLIPTextModel(projection_dim=8, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
        >>> model(torch.tensor([[49406, 320, 2368, 49407]])).text_embeds.shape
        torch.Size([1, 8])
    """

    __module__ = "annealers"  # its public name
    _supports_gradient_checkpointing = True
    _supports_group_offloading = False  # nn.MultiheadAttention reads the weights of its parts, past their hooks
    _no_split_modules = ["ResidualAttentionBlock", "CustomResidualAttentionBlock"]
    _repeated_blocks = ["ResidualAttentionBlock", "CustomResidualAttentionBlock"]

    @register_to_config
    def __init__(
        self,
        projection_dim: int = 512,
        max_position_embeddings: int = 77,
        vocab_size: int = 49408,
        hidden_size: int = 512,
        num_attention_heads: int = 8,
        num_hidden_layers: int = 12,
        mlp_ratio: float = 4.0,
        ls_init_value: float | None = None,
        embed_cls: bool = False,
        pad_id: int = 0,
        eos_id: int = 2,
        no_causal_mask: bool = False,
        pool_type: str = "argmax",
        proj_type: str = "linear",
        proj_bias: bool = False,
        quick_gelu: bool = False,
        act_kwargs: dict[str, Any] | None = None,
        norm_kwargs: dict[str, Any] | None = None,
        block_type: str | None = None,
        qk_norm: bool = False,
        scaled_cosine_attn: bool = False,
        scale_heads: bool = False,
        scale_attn_inner: bool = False,
        scale_attn: bool = False,
        scale_fc: bool = False,
        first_output: str = "last_hidden_state",
    ) -> None:
        super().__init__()
        _check_architecture(pool_type, proj_type, first_output, hidden_size, num_attention_heads)
        self.gradient_checkpointing = False
        self.tower = TextTransformer(
            context_length=max_position_embeddings,
            vocab_size=vocab_size,
            width=hidden_size,
            heads=num_attention_heads,
            layers=num_hidden_layers,
            mlp_ratio=mlp_ratio,
            ls_init_value=ls_init_value,
            output_dim=projection_dim,
            embed_cls=embed_cls,
            pad_id=pad_id,
            eos_id=eos_id,
            no_causal_mask=no_causal_mask,
            pool_type=pool_type,
            proj_type=proj_type,
            proj_bias=proj_bias,
            act_layer=partial(QuickGELU if quick_gelu else nn.GELU, **(act_kwargs or {})),
            norm_layer=partial(LayerNorm, **(norm_kwargs or {})),
            block_type=block_type,
            qk_norm=qk_norm,
            scaled_cosine_attn=scaled_cosine_attn,
            scale_heads=scale_heads,
            scale_attn_inner=scale_attn_inner,
            scale_attn=scale_attn,
            scale_fc=scale_fc,
        )

    # ---- from open_clip ---------------------------------------------------------------------------------------------

    @classmethod
    def from_open_clip(
        cls,
        name: str,
        pretrained: str | None = None,
        cache_dir: str | None = None,
        first_output: str = "last_hidden_state",
    ) -> Self:
        """The text tower of a model that open_clip makes.

        Args:
            name: As in `open_clip.create_model`: a name of `open_clip.list_models()` such as "ViT-B-32", a repository
                "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K", or a folder "local-dir:/path".
            pretrained: Weights of a named model: a tag such as "laion2b_s34b_b79k", or a file. None draws random ones.
                A repository or a folder brings its own.
            cache_dir: Where downloads go; None is open_clip's choice. Nothing of it is needed after saving.
            first_output: What comes first in the output, see the class.

        Returns:
            The model in evaluation mode, in float32.

        Raises:
            ValueError: If open_clip knows no such model, its text tower is one of transformers (XLM-RoBERTa, mT5), or
                `pretrained` is given for a repository or a folder.
            RuntimeError: If there are no weights where there should be.
        """
        name, config = open_clip_config(name)
        _options(config)  # before a download
        with_weights = name.startswith(SCHEMAS)
        if with_weights and pretrained is not None:
            raise ValueError(f"{name} brings its own weights, pretrained must be None, got {pretrained!r}")
        clip = open_clip.create_model(
            name, pretrained, cache_dir=cache_dir, require_pretrained=with_weights or pretrained is not None
        )
        return cls.from_clip(clip, config, first_output)

    @classmethod
    def from_clip(cls, clip: nn.Module, config: Mapping[str, Any], first_output: str = "last_hidden_state") -> Self:
        """The text tower, with its present weights copied, of a model in memory.

        Args:
            clip: `open_clip.CLIP`, `CustomTextCLIP` or `CoCa`.
            config: What it was built from: "embed_dim", "text_cfg" (a dict or `open_clip.CLIPTextCfg`) and maybe
                "quick_gelu", as in `open_clip.get_model_config`; the rest is not read.
            first_output: What comes first in the output, see the class.

        Raises:
            ValueError: If the tower is one of transformers.
            RuntimeError: If the config is not that of the model.
        """
        weights = getattr(clip, "text", clip).state_dict()  # CLIP has the parts of its tower among its own
        model = cls(**_options(config), first_output=first_output).to(next(clip.parameters()).device)
        names = model.tower.state_dict().keys()
        model.tower.load_state_dict({name: weights[name] for name in names if name in weights})
        return model.eval()

    # ---- as pipelines use it ----------------------------------------------------------------------------------------

    @property
    def text_model(self) -> SimpleNamespace:
        """Where pipelines look for the LayerNorm that they put on an earlier layer for `clip_skip`."""
        return SimpleNamespace(final_layer_norm=self.tower.ln_final)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> OpenCLIPTextOutput | OpenCLIPProjectedTextOutput | tuple[Any, ...]:
        """Encodes texts.

        Args:
            input_ids: (B, L). A text may be shorter than the longest if neither attention nor pooling could tell: the
                attention is causal, the pooling not "last", and there is no class token.
            attention_mask: (B, L), 0 where a token is not looked at. open_clip, and None, look at padding too, which a
                causal tower never sees from a text that is padded on the right.
            output_hidden_states: Return the states of every layer too; None is False.
            return_dict: Return an output object rather than a tuple; None is True.

        Raises:
            ValueError: If the shape of the tokens or of the mask does not fit.
        """
        self._check_inputs(input_ids, attention_mask)
        x, mask = self.tower._embeds(input_ids)  # with the class token, if any, at the end
        mask = self._attention_mask(mask, attention_mask, x)
        states = [x]
        for block in self.tower.transformer.resblocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(partial(block, attn_mask=mask), x)
            else:
                x = block(x, attn_mask=mask)
            states.append(x)

        length, config = input_ids.shape[1], self.config
        last = self.tower.ln_final(x)
        if config.embed_cls:
            pooled, last = last[:, -1], last[:, :-1]
        else:
            pooled = text_global_pool(last, input_ids, config.pool_type, eos_token_id=config.eos_id)

        kind = OpenCLIPProjectedTextOutput if config.first_output == "text_embeds" else OpenCLIPTextOutput
        output = kind(
            last_hidden_state=last,
            pooler_output=pooled,
            text_embeds=self._project(pooled),
            hidden_states=tuple(state[:, :length] for state in states) if output_hidden_states else None,
        )
        return output.to_tuple() if return_dict is False else output

    def _project(self, pooled: torch.Tensor) -> torch.Tensor:
        projection = self.tower.text_projection
        if projection is None:
            return pooled
        return projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection

    def _attention_mask(
        self, mask: torch.Tensor | None, attention_mask: torch.Tensor | None, x: torch.Tensor
    ) -> torch.Tensor | None:
        """The tower's additive mask, (L, L) or (B * heads, L, L), cut to the length, with padding left out."""
        batch, length, _ = x.shape
        mask = None if mask is None else mask[..., :length, :length].to(x.dtype)
        if attention_mask is None:
            return mask
        looked_at = torch.ones(batch, length, dtype=torch.bool, device=x.device)
        looked_at[:, : attention_mask.shape[1]] = attention_mask.to(x.device, torch.bool)
        padding = torch.zeros(batch, 1, length, dtype=x.dtype, device=x.device)
        padding = padding.masked_fill(~looked_at[:, None], float("-inf"))
        padding = padding.expand(-1, length, -1).repeat_interleave(self.config.num_attention_heads, dim=0)
        return padding if mask is None else padding + mask

    def _check_inputs(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        config, longest = self.config, self.config.max_position_embeddings
        if input_ids.ndim != 2 or not 0 < input_ids.shape[1] <= longest:
            raise ValueError(f"input_ids must be (B, L) with 1 <= L <= {longest}, got {tuple(input_ids.shape)}")
        sees_padding = config.no_causal_mask or config.embed_cls or config.pool_type == "last"
        if sees_padding and input_ids.shape[1] != longest:
            raise ValueError(
                f"this tower sees padding, its texts must be padded to {longest} tokens, got {input_ids.shape[1]}: "
                f"call the tokenizer with padding='max_length'"
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must be as input_ids, {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}"
            )


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `OpenCLIPTextModel` for a model config of open_clip, with its defaults filled in."""
    text = config["text_cfg"]
    text = text if isinstance(text, open_clip.CLIPTextCfg) else open_clip.CLIPTextCfg(**text)
    if text.hf_model_name:
        raise ValueError(
            f"the text tower is {text.hf_model_name!r} of transformers, whose architecture open_clip's config lacks: "
            f"OpenCLIPTextModel takes open_clip's own towers, those without 'hf_model_name' in their text_cfg"
        )
    return {
        "projection_dim": config["embed_dim"],
        "quick_gelu": config.get("quick_gelu", False),
        **{ours: getattr(text, theirs) for ours, theirs in NAMES_IN_OPEN_CLIP.items()},
        **{name: getattr(text, name) for name in SAME_NAMES},
    }


def _check_architecture(
    pool_type: str, proj_type: str, first_output: str, hidden_size: int, num_attention_heads: int
) -> None:
    for name, value, known in (
        ("pool_type", pool_type, POOLINGS),
        ("proj_type", proj_type, PROJECTIONS),
        ("first_output", first_output, OUTPUTS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, got {value!r}")
    if hidden_size % num_attention_heads != 0:
        raise ValueError(f"num_attention_heads must divide hidden_size, got {num_attention_heads} and {hidden_size}")
