# %% [markdown]
# # Losses in plain PyTorch
#
# You do not need Lightning to use the losses. They take embeddings and numbers, and return a dict.

# %%
import torch
from torch import nn
from torch.nn.functional import normalize

from lightning_itm import ImageTextRetrieval, InfoNCELoss, SigmoidLoss, TripletLoss
from lightning_itm.embeddings import EmbeddingPairs
from lightning_itm.functional import DirectionScores

# %% [markdown]
# ## A batch
#
# Four pairs. Pairs 0 and 3 are two captions of the same image, so they have the same `image_id`, and are never negatives of each
# other.

# %%
torch.manual_seed(0)
image = normalize(torch.randn(4, 8), dim=1)
image[3] = image[0]
text = normalize(image + 0.4 * torch.randn(4, 8), dim=1)
image_id, text_id = torch.tensor([0, 1, 2, 0]), torch.arange(4)
pairs = EmbeddingPairs(image.requires_grad_(), text.requires_grad_(), image_id, text_id)
(image @ text.T).detach()

# %% [markdown]
# ## Three losses
#
# `loss` is what you minimise. The rest is for your log.

# %%
for loss in (InfoNCELoss(), SigmoidLoss(), TripletLoss(margin=0.2), TripletLoss(margin=0.2, negatives="selective")):
    values = loss(pairs)
    print(type(loss).__name__, {name: round(value.item(), 4) for name, value in values.items()})

# %% [markdown]
# ## Where the gradient goes
#
# With the hardest negative, each anchor moves away from one candidate. With InfoNCE it moves away from all of them, and from similar
# ones the most. Hardness weights make that steeper.
#
# One row per image, one column per text. Columns 0 and 3 are captions of the same image, so row 0 leaves column 3 out. With the
# hardest negative, a row of zeros is an image whose hardest text is more than the margin away.


# %%
def pull(loss):
    """Return how strongly each image is moved towards (−) or away from (+) each text."""
    similarity = (image.detach() @ text.detach().T).requires_grad_()
    scores = loss.direction_cost(
        DirectionScores(similarity, similarity.diagonal(), image_id[:, None] != image_id), None
    )
    return torch.autograd.grad(scores.cost.sum(), similarity)[0]


torch.set_printoptions(precision=2, sci_mode=False)
for name, loss in {
    "hardest": TripletLoss(margin=0.2),
    "InfoNCE": InfoNCELoss(),
    "InfoNCE, hardness 9": InfoNCELoss(hardness=9),
}.items():
    print(name, pull(loss).detach(), sep="\n")

# %% [markdown]
# ## A loop
#
# Two towers, a loss, an optimizer. The temperature is a parameter of the loss, so it goes to the optimizer, too.

# %%
features = torch.randn(512, 32)
captions = features @ torch.randn(32, 24) + 4 * torch.randn(512, 24)
towers, loss = nn.ModuleList([nn.Linear(32, 16), nn.Linear(24, 16)]), InfoNCELoss()
optimizer = torch.optim.AdamW([*towers.parameters(), *loss.parameters()], lr=1e-2)
for step in range(200):
    rows = torch.randint(512, (64,))
    image, text = (normalize(tower(x[rows]), dim=1) for tower, x in zip(towers, (features, captions)))
    values = loss(EmbeddingPairs(image, text, rows, rows))
    optimizer.zero_grad()
    values["loss"].backward()
    optimizer.step()
    if step % 50 == 49:
        print(step + 1, round(values["loss"].item(), 3))

# %% [markdown]
# ## Recall
#
# A torchmetrics metric over a whole set. These are the pairs that were trained on, so it is high. By chance `i2t_r1` would be 0.2.

# %%
metric, ids = ImageTextRetrieval(), torch.arange(512)
with torch.no_grad():
    image, text = (normalize(tower(x), dim=1) for tower, x in zip(towers, (features, captions)))
metric.update(EmbeddingPairs(image, text, ids, ids))
{name: round(float(value), 1) for name, value in metric.compute().items()}
