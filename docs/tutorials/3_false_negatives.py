# %% [markdown]
# # False negatives and the memory bank
#
# A memory bank gives each pair thousands of negatives. Among thousands, some match in truth. This notebook makes a set in which we
# know them, and looks at how the bank finds them.
#
# In a clone of the repository:
#
# ```bash
# pip install -e ".[demo]"
# ```

# %%
import re
import sys

import lightning as L
import torch

from lightning_itm import (
    FalseNegativeElimination,
    FalseNegativeSampler,
    ImageTextDataModule,
    ImageTextDataset,
    InfoNCELoss,
)

sys.path.insert(0, "../../examples")  # the small model and the pictures of the example
from emoji_data import small_pictures, tokenize
from train_on_emoji import Small

# %matplotlib inline

train, val, test = small_pictures()

# %% [markdown]
# ## A set with known false negatives
#
# Emoji come in five skin tones. Without the tone, their names are equal: *waving hand* belongs to six pictures. By default, equal
# captions are never negatives of each other. Here we turn that off (`equal_captions="keep"`), to see whether the bank notices.

# %%
tone = re.compile(r" (medium-light|medium-dark|medium|light|dark) skin tone")
plain = [tone.sub("", text) for text in train.texts]
pairs = ImageTextDataset(train.images, plain, tokenizer=tokenize, equal_captions="keep")
number = {text: i for i, text in enumerate(sorted(set(plain)))}
caption = torch.tensor([number[text] for text in plain])
is_shared = torch.bincount(caption)[caption] > 1
example = plain[is_shared.nonzero()[0, 0]]
print(f"{int(is_shared.sum())} of {len(pairs)} pictures share their name, such as {example!r}")

# %% [markdown]
# ## Train with a bank

# %%
L.seed_everything(0)
model = Small(InfoNCELoss(), learning_rate=3e-3)
bank = FalseNegativeElimination(queue_size=1024, sampler=FalseNegativeSampler(weighting="drop"))
data = ImageTextDataModule(pairs, val, batch_size=64, num_workers=0)
silent = dict(accelerator="cpu", logger=False, enable_checkpointing=False)
silent |= dict(enable_progress_bar=False, enable_model_summary=False)
trainer = L.Trainer(max_epochs=12, callbacks=[bank], **silent)
trainer.fit(model, datamodule=data)
for name in ("in_loss", "live_in_stored", "stored_in_stored"):
    print(f"memory/{name:18}{float(trainer.callback_metrics['memory/' + name]):.3f}")

# %% [markdown]
# `memory/in_loss` is 1 where the bank takes part. It stays out until its stored embeddings find matches as well as those of the
# live model. The two numbers below it compare that, and are about 1 when all is well.
#
# ## How the similarities lie
#
# Bars show what is in the queue: matching pairs in blue, all others in red. Curves are fitted to the matching pairs and to the
# *hardest* negatives that the loss has seen in this epoch. The dashed line is the probability that a candidate of a given
# similarity matches (axis on the right). Above the dotted line it is dropped.

# %% alt="Histograms of the similarities of matching pairs (blue) and of all others (red), and the posterior as a dashed line."
bank.plot()

# %% [markdown]
# ## Does it recognise them?
#
# We know which pairs share a name. So we can count: of the pairs with equal names in the bank, how many are dropped, and how many
# of the others?

# %%
queue, sampler = bank.bank, bank.sampler
there = queue.valid.nonzero().squeeze(1)
image, text, ids = queue.image[there], queue.text[there], queue.image_id[there]
posterior = sampler.posterior(image @ text.T)
is_other = ids[:, None] != ids
same_name = is_other & (caption[ids][:, None] == caption[ids])
other_name = is_other & ~same_name
dropped = posterior > sampler.threshold
print(f"dropped of pairs with the same name:  {100 * dropped[same_name].float().mean():5.1f} %")
print(f"dropped of pairs with another name:   {100 * dropped[other_name].float().mean():5.2f} %")

# %% [markdown]
# A lower threshold drops more of both: `FalseNegativeSampler(weighting="drop", threshold=0.1)`.

# %%
for threshold in (0.1, 0.3, 0.5, 0.7, 0.9):
    found, lost = ((posterior > threshold)[part].float().mean() for part in (same_name, other_name))
    print(f"threshold {threshold}: {100 * found:5.1f} % found, {100 * lost:5.2f} % lost")

# %% [markdown]
# Next: [the losses in plain PyTorch](4_plain_pytorch.ipynb).
