"""Small open_clip models with random weights, tokenizers of transformers made here, and a pipeline that has them.

annealers is imported by those that build with it, because one process draws where it cannot be imported.
"""

import json
from functools import lru_cache

import open_clip
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from open_clip.tokenizer import SimpleTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

VISION = {"image_size": 8, "layers": 1, "width": 16, "patch_size": 4, "head_width": 8}
SMALL = {"context_length": 12, "vocab_size": 64, "width": 16, "heads": 2, "layers": 3}
WORDS = {"vocab_size": 49408}  # for texts rather than made up tokens
END = 63
TEXTS = [
    "a cat",
    "A Cat!! !wow ! ?!",
    "café ☕ 😀👩‍👩‍👧 naïve Ünïcödé",
    "日本語のテキスト",
    "one two three four five six seven eight nine ten eleven twelve thirteen",
    "",
    " \n\t tab\r\n",
    "<start_of_text> hi <end_of_text> <END_OF_TEXT>",
    "a &amp; b &lt;3 <b> &amp;amp; it's don't 123",
    "âœ” mojibake, ﬁ ligature, \u200b, a\u0301",
    "!?!?!!! a!b",
]

# What differs from CLIP, as open_clip's configs say it.
TOWERS = {
    "CLIP": {},
    "OpenAI's CLIP": {"quick_gelu": True},
    "CLIP with a tower of its own": {"custom_text": True},
    "SigLIP": {
        "custom_text": True,
        "text_cfg": {
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
            "act_kwargs": {"approximate": "tanh"},
        },
    },
    "pooled at the first token": {"custom_text": True, "text_cfg": {"no_causal_mask": True, "pool_type": "first"}},
    "pooled at the end token": {"custom_text": True, "text_cfg": {"pool_type": "eos", "eos_id": END}},
    "no projection": {"custom_text": True, "embed_dim": 16, "text_cfg": {"proj_type": "none"}},
    "blocks of another kind": {
        "custom_text": True,
        "text_cfg": {"qk_norm": True, "scale_attn": True, "scale_fc": True, "ls_init_value": 0.3, "mlp_ratio": 2.0},
    },
    "CoCa": {
        "custom_text": True,
        "text_cfg": {"embed_cls": True, "output_tokens": True, "pad_id": 3},
        "vision_cfg": {
            "attentional_pool": True,
            "attn_pooler_queries": 4,
            "attn_pooler_heads": 2,
            "output_tokens": True,
        },
        "multimodal_cfg": {"context_length": 12, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
    },
}


def config_of(tower="CLIP", **text_options):
    """A model config of open_clip."""
    special = TOWERS[tower]
    return {
        "embed_dim": 8,
        **special,
        "vision_cfg": {**VISION, **special.get("vision_cfg", {})},
        "text_cfg": {**SMALL, **special.get("text_cfg", {}), **text_options},
    }


def clip_of(config, seed=0):
    """The model that open_clip makes of it, with weights that leave no part of the tower at its neutral value."""
    torch.manual_seed(seed)
    options = {name: value for name, value in config.items() if name != "custom_text"}
    kinds = {"multimodal_cfg" in config: open_clip.CoCa, "custom_text" not in config: open_clip.CLIP}
    clip = kinds.get(True, open_clip.CustomTextCLIP)(**options).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return clip


@lru_cache
def open_clip_tokenizer(clean="lower"):
    return SimpleTokenizer(clean=clean)


def tokens_of(texts=TEXTS, length=12, clean="lower"):
    """By open_clip itself, (B, length)."""
    return open_clip_tokenizer(clean)(texts, context_length=length)


def made_up_tokens():
    """Texts of several lengths, (5, 12): start 62, words, end 63, padding 0; one is full, one has an end in it."""
    tokens = torch.randint(1, 62, (5, 12), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 62
    for row, end in enumerate((3, 6, 11, 1, 8)):
        tokens[row, end], tokens[row, end + 1 :] = END, 0
    tokens[4, 4] = END
    return tokens


def write_local_dir(folder, config, clip=None, preprocess=None):
    """A folder as open_clip reads it under the name "local-dir:folder"."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess or {}})
    )
    if clip is not None:
        torch.save(clip.state_dict(), folder / "open_clip_pytorch_model.bin")
    return f"local-dir:{folder}"


def word_pieces(**sides):
    """As BERT's: [CLS] text [SEP], lower case, fills up with [PAD]."""
    letters = list("abcdefghijklmnopqrstuvwxyz!?'")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *("##" + letter for letter in letters), "cat", "##ow"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        **sides,
    )


def sentence_pieces():
    """As T5's in SigLIP: text </s>, and fills up with </s> as well."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), ("▁cat", -3.0)]
    pieces += [(letter, -4.0 - i / 10) for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz123")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_truncation(3)  # as a file may say it, and transformers overrules it
    tokenizer.enable_padding(length=4)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="</s>", eos_token="</s>", unk_token="<unk>", model_max_length=9
    )


def stable_diffusion(tower="CLIP"):
    """Diffusers' pipeline around one of our towers."""
    from annealers import OpenCLIPTextModel, OpenCLIPTokenizer

    config = config_of(tower, **WORDS)
    torch.manual_seed(2)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(4,), norm_num_groups=2).eval(),
        text_encoder=OpenCLIPTextModel.from_clip(clip_of(config), config),
        tokenizer=OpenCLIPTokenizer(model_max_length=12),
        unet=unet.eval(),
        scheduler=DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def drawn(pipeline, prompt="a cat on a mat", **more):
    """Images (B, 3, 8, 8)."""
    pipeline.set_progress_bar_config(disable=True)
    seeded = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 2, "output_type": "pt"}
    return pipeline(prompt, **seeded, **more).images
