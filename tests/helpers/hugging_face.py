"""Small models of transformers with random weights, their tokenizers, and data for them. Nothing is downloaded."""

import string

import pytest

transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors  # noqa: E402

from lightning_itm import HFDualEncoder, ImageTextDataModule, ImageTextDataset  # noqa: E402
from tests.helpers.pictures import captions, cut_outs  # noqa: E402

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48}
IMAGE = {**LAYERS, "image_size": 32, "patch_size": 16}
CONFIGS = {
    "clip": {
        "model_type": "clip",
        "projection_dim": 24,
        "vision_config": IMAGE,
        "text_config": {
            **LAYERS,
            "max_position_embeddings": 20,
            "vocab_size": 260,
            "bos_token_id": 256,
            "eos_token_id": 257,
        },
    },
    "siglip": {
        "model_type": "siglip",
        "vision_config": IMAGE,
        "text_config": {
            **LAYERS,
            "max_position_embeddings": 20,
            "vocab_size": 260,
            "bos_token_id": 256,
            "eos_token_id": 257,
        },
    },
    "siglip2": {
        "model_type": "siglip2",
        "vision_config": {**LAYERS, "num_patches": 4, "patch_size": 8},
        "text_config": {
            **LAYERS,
            "max_position_embeddings": 20,
            "vocab_size": 260,
            "bos_token_id": 2,
            "eos_token_id": 1,
        },
    },
}
FAMILIES = [name for name in CONFIGS if hasattr(transformers, {"siglip2": "Siglip2Model"}.get(name, "CLIPModel"))]


def tokenizer(family):
    """A tokenizer as the family has it. CLIP pads with the end sign, the others with one of their own."""
    if family == "siglip2" and hasattr(transformers, "Siglip2Tokenizer"):  # since transformers 5; Gemma's before
        signs = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.ascii_lowercase, *string.digits, "-"]
        vocabulary = {sign: number for number, sign in enumerate(signs)}
        made = transformers.Siglip2Tokenizer(vocab=vocabulary, merges=[], padding_side="right")
        made.backend_tokenizer.post_processor = _template("$A <eos>", vocabulary)
        return made
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {sign: number for number, sign in enumerate([*alphabet, "<start>", "<end>", "<pad>"])}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.post_processor = _template("<start> $A <end>" if family == "clip" else "$A <end>", vocabulary)
    pad = {"pad_token": "<end>" if family == "clip" else "<pad>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<start>", eos_token="<end>", clean_up_tokenization_spaces=False, **pad
    )


def _template(single, vocabulary):
    special = [(sign, vocabulary[sign]) for sign in single.split() if sign in vocabulary]
    return processors.TemplateProcessing(single=single, special_tokens=special)


def hf_model(family="clip", loss=None, **kwargs):
    return HFDualEncoder(config=CONFIGS[family], loss=loss, tokenizer=tokenizer(family), **kwargs)


def data_for(model, number=16, **kwargs):
    pairs = ImageTextDataset(cut_outs(number, 40), captions(number), **model.transforms)
    return ImageTextDataModule(pairs, pairs, pairs, **{"batch_size": 8, "num_workers": 0, **kwargs})
