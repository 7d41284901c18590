# %% [markdown]
# # Look at what is mined
#
# Hard negatives can be wrong ones. Before you train with them, look at them. This notebook trains a small model on emoji, mines the
# whole training set, and shows what was found with and without a guard.
#
# ```bash
# pip install "lightning_itm[demo]"
# ```

# %%
import sys

import lightning as L
import torch
from torch import nn

from lightning_itm import ImageTextDataModule, InfoNCELoss, OfflineHardNegativeMining
from lightning_itm.mining import compose_batches

sys.path.insert(0, "../../examples")  # the small model and the pictures of the example
from emoji_data import small_pictures
from train_on_emoji import Small

train, val, test = small_pictures()
silent = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)

# %% [markdown]
# A model that has learned something. Mining with random weights finds random negatives.

# %%
L.seed_everything(0)
model = Small(InfoNCELoss(), learning_rate=3e-3)
data = ImageTextDataModule(train, val, batch_size=64, num_workers=0)
L.Trainer(max_epochs=10, **silent).fit(model, datamodule=data)

# %% [markdown]
# ## Mine, and look
#
# Each row is a pair. Beside its picture stand the texts that the model takes for the best matches among those of other pictures,
# and the pictures that it takes for the best matches of its text.

# %%
mining = OfflineHardNegativeMining(inject="batches", relative_margin=None, texts_per_image=60, images_per_text=60)
model.learning_rate = 3e-4
trainer = L.Trainer(max_epochs=1, callbacks=[mining], **silent)
trainer.fit(model, datamodule=data)
mining.plot(6, seed=1)

# %% [markdown]
# Some of them are right: the same thing in another skin tone has nearly the same name. To push such pairs apart would teach the
# model something wrong.
#
# ## With a guard
#
# `relative_margin=0.05` drops candidates that are nearly as similar as the pair itself.

# %%
guarded = OfflineHardNegativeMining(inject="batches", relative_margin=0.05, texts_per_image=60, images_per_text=60)
trainer = L.Trainer(max_epochs=1, callbacks=[guarded], **silent)
trainer.fit(model, datamodule=data)
print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items() if name.startswith("mining")})
guarded.plot(6, seed=1)

# %% [markdown]
# - `mining/gap` is how much more similar matching pairs are than their hardest negatives. Below 0 the negatives win.
# - `mining/rejected_share` is how many candidates the guard dropped.
# - `mining/grouped_share` is how many pairs share their group with another one.

# %% [markdown]
# ## How hard are the batches?
#
# The mean similarity of the hardest negative in a batch, in random order and in hard batches.


# %%
def hardest(order):
    """Return the mean similarity of the hardest text in the batch, over all images."""
    model.eval()
    with torch.no_grad():
        images = nn.functional.normalize(torch.cat([model.encode_image(b) for b in pictures.split(256)]), dim=1)
        texts = nn.functional.normalize(model.encode_text(tokens), dim=1)
    values = []
    for batch in order.long().split(64):
        scores = images[batch] @ texts[batch].T
        values.append(scores.fill_diagonal_(-1).amax(dim=1))
    return torch.cat(values).mean().item()


view = train.evaluation()
pictures = torch.stack([view[i]["image"] for i in range(len(train))])
tokens = torch.stack([view[i]["text"] for i in range(len(train))])
print("random order:", round(hardest(torch.randperm(len(train))), 3))
composed = compose_batches(guarded.table.texts, guarded.table.images, train.text_image_id, group_size=4, batch_size=64)
print("hard batches:", round(hardest(composed.order), 3))
