# %% [markdown]
# # Look at what is mined
#
# Hard negatives can be wrong ones. Before you train with them, look at them. This notebook trains a small model on emoji, mines the
# whole training set, and shows what was found with and without a guard.
#
# In a clone of the repository:
#
# ```bash
# pip install -e ".[demo]"
# ```
#
# Pictures: Twemoji, copyright Twitter, Inc. and other contributors, CC-BY 4.0.

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

# %matplotlib inline

train, val, test = small_pictures()
silent = dict(accelerator="cpu", logger=False, enable_checkpointing=False)
silent |= dict(enable_progress_bar=False, enable_model_summary=False)
print(len(train), "pictures with one name each, such as", train.texts[1])

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
# and the pictures that it takes for the best matches of its text. The pictures are as the model sees them, 24 pixels wide.


# %%
def mine(**guard):
    """Train one more epoch, in batches of what is mined before it."""
    mining = OfflineHardNegativeMining(inject="batches", texts_per_image=60, images_per_text=60, **guard)
    model.learning_rate = 3e-4
    trainer = L.Trainer(max_epochs=1, callbacks=[mining], **silent)
    trainer.fit(model, datamodule=data)
    for name in ("gap", "rejected_share", "grouped_share"):
        print(f"mining/{name:16}{float(trainer.callback_metrics['mining/' + name]):.3f}")
    return mining


mining = mine(relative_margin=None)

# %% alt="Six rows without a guard: a picture, its text, the hardest texts in red, and the hardest pictures."
mining.plot(6, seed=1)

# %% [markdown]
# Some of these "negatives" match: the same thing in another skin tone has nearly the same name. To push such pairs apart would
# teach the model something wrong.
#
# Three numbers are logged when something is mined:
#
# - `mining/gap` is how much more similar matching pairs are than their hardest negatives. Below 0 the negatives win.
# - `mining/rejected_share` is the share of candidates that the guard dropped.
# - `mining/grouped_share` is the share of pairs that have a hard partner in their batch.
#
# ## With a guard
#
# `relative_margin=0.05`, the default in this mode, drops candidates whose similarity is above 95 % of that of the pair itself. Emoji
# have many near twins, so here we take 0.2.

# %%
guarded = mine(relative_margin=0.2)

# %% alt="The same six rows with a guard of 0.2: fewer near twins."
guarded.plot(6, seed=1)

# %% [markdown]
# Fewer of them match. A guard that is too large leaves out what would be worth learning, so look at both pictures before you choose.
#
# ## How hard are the batches?
#
# For each image, we look for the most similar text of another image in its batch. First with batches in random order, then with
# hard batches: four pairs that are hard for each other form a group, and a batch of 64 holds 16 groups.


# %%
model.eval()
view = train.evaluation()
with torch.no_grad():
    pictures = torch.stack([view[i]["image"] for i in range(len(view))])
    images = torch.cat([nn.functional.normalize(model.encode_image(some), dim=1) for some in pictures.split(256)])
    texts = nn.functional.normalize(model.encode_text(torch.stack([view[i]["text"] for i in range(len(view))])), dim=1)


def hardest(order):
    """Return the mean similarity of an image and its hardest text in the batch."""
    values = []
    for batch in order.long().split(64):
        similarity = images[batch] @ texts[batch].T
        values.append(similarity.fill_diagonal_(-1).amax(dim=1))
    return torch.cat(values).mean().item()


table = guarded.table
composed = compose_batches(table.texts, table.images, train.text_image_id, group_size=4, batch_size=64)
print(f"matching pairs  {(images * texts).sum(dim=1).mean():.3f}")
print(f"random batches  {hardest(torch.randperm(len(train))):.3f}")
print(f"hard batches    {hardest(composed.order):.3f}")

# %% [markdown]
# In hard batches the hardest negative is closer to the matching pair, so there is more to learn from each batch.
#
# Next: [false negatives and the memory bank](3_false_negatives.ipynb).
