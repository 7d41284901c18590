"""Configurations of small open_clip models, one per kind of tower, and data for them."""

import json
import math

import open_clip

from lightning_itm import ImageTextDataModule, ImageTextDataset
from tests.helpers.pictures import captions, cut_outs

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
MULTIMODAL = {"context_length": 16, "width": 32, "heads": 2, "layers": 1}
CONFIGS = {
    "tiny-coca": {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 32,
            "layers": 1,
            "width": 32,
            "patch_size": 16,
            "head_width": 16,
            "attentional_pool": True,
            "attn_pooler_heads": 2,
            "output_tokens": True,
        },
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": MULTIMODAL,
        "custom_text": True,
    },
    "tiny-vit": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16},
        "text_cfg": TEXT,
    },
    "tiny-rn": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
        "text_cfg": TEXT,
    },
    "tiny-bias": {
        "embed_dim": 24,
        "init_logit_scale": math.log(20),
        "init_logit_bias": -7.0,
        "custom_text": True,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16},
        "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    },
}
TIMM = {  # whose batch norms are activations, too
    "tiny-timm": {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 64,
            "timm_model_name": "test_efficientnet",
            "timm_pool": "avg",
            "timm_proj": "linear",
        },
        "text_cfg": TEXT,
    },
}


def write_hugging_face(folder):
    """Write a small BERT and a tokenizer to a folder, and return the configuration of a model with this text tower."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[SEP]", "a", "the", "red", "square", "cat", ",", "and", "cup", "of", "coffee", "number"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    text = {"context_length": 12, "hf_model_name": str(folder), "hf_tokenizer_name": str(folder)}
    text |= {"hf_proj_type": "linear", "hf_pooler_type": "mean_pooler"}
    return {"embed_dim": 24, "vision_cfg": CONFIGS["tiny-vit"]["vision_cfg"], "text_cfg": text}


def register(configs, folder):
    """Let open_clip find these configurations by their names. It reads them from files, which are written to ``folder``."""
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")


def data_for(model, **kwargs):
    pairs = ImageTextDataset(cut_outs(16, 40), captions(16), **model.transforms)
    return ImageTextDataModule(pairs, pairs, pairs, **{"batch_size": 8, "num_workers": 0, **kwargs})
