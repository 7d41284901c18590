"""A small model on small real pictures, with all that a resumed run could get wrong: dropout, batch statistics, noise."""

import random

import numpy as np
import torch
from torch import nn
from torchvision import transforms

from lightning_itm import DualEncoder, ImageTextDataModule, ImageTextDataset, InfoNCELoss
from tests.helpers.pictures import captions, cut_outs

NUM_IMAGES = 23
AUGMENTED = transforms.Compose(
    [transforms.RandomCrop(16), transforms.RandomHorizontalFlip(), transforms.ColorJitter(0.2), transforms.ToTensor()]
)
PLAIN = transforms.Compose([transforms.CenterCrop(16), transforms.ToTensor()])


def tokenize(texts):
    return torch.tensor([list(text.encode().ljust(24)[:24]) for text in texts])


class Tiny(DualEncoder):
    def __init__(self, loss=None, learning_rate=1e-2, warmup_steps=3, **kwargs):
        super().__init__(loss, learning_rate=learning_rate, warmup_steps=warmup_steps, **kwargs)
        self.image_encoder = nn.Sequential(nn.Flatten(), nn.Linear(768, 16), nn.BatchNorm1d(16), nn.Dropout(0.3))
        self.text_encoder = nn.EmbeddingBag(256, 16)

    def encode_image(self, image):
        noise = 1 + 0.01 * (random.random() + np.random.rand()) if self.training else 1
        return self.image_encoder(image) * noise

    def encode_text(self, text):
        return self.text_encoder(text)


class Linear(Tiny):
    """Without batch statistics, dropout and noise, which differ between ranks."""

    def __init__(self):
        super().__init__(InfoNCELoss(), warmup_steps=0)
        self.image_encoder = nn.Sequential(nn.Flatten(), nn.Linear(768, 16))

    def encode_image(self, image):
        return self.image_encoder(image)


def tiny_pairs(num_images=NUM_IMAGES, **kwargs):
    kwargs = {"transform": AUGMENTED, "eval_transform": PLAIN, "tokenizer": tokenize, **kwargs}
    return ImageTextDataset(cut_outs(num_images), captions(num_images), **kwargs)


def tiny_data(**kwargs):
    kwargs = {"batch_size": 4, "num_workers": 0, "drop_last": False, "seed": 5, **kwargs}
    return ImageTextDataModule(tiny_pairs(), tiny_pairs(), tiny_pairs(), **kwargs)


SILENT = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
