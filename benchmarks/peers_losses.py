"""The parts of peers.py that compute: the loss of a batch, the loss over a memory bank, and recall."""

from typing import Any

import open_clip
import torch
from peers_compare import DIM, Way, compare, print_versions, unit
from torch import Tensor
from torch.nn.functional import normalize

from lightning_itm import FalseNegativeSampler, ImageTextRetrieval, InfoNCELoss
from lightning_itm.embeddings import EmbeddingPairs
from lightning_itm.memory_bank import Agreement, MemoryBank, MemoryCandidates

BATCH_SIZE, QUEUE_SIZE, TEMPERATURE = 128, 8192, 0.07


def loss(runs: int) -> None:
    """Forward and backward of CLIP's loss."""
    print_versions("open_clip_torch")
    loss_of_batch(512, runs)
    loss_of_batch(4096, max(3, runs // 3))


def loss_of_batch(batch_size: int, runs: int) -> None:
    """Forward and backward of CLIP's loss, for one size of a batch."""
    image, text, ids = unit(batch_size).requires_grad_(), unit(batch_size).requires_grad_(), torch.arange(batch_size)
    scale, pairs = torch.tensor(2.66, requires_grad=True), EmbeddingPairs(image, text, ids, ids)
    theirs, plain, hard = open_clip.ClipLoss(), InfoNCELoss(), InfoNCELoss(hardness=9)
    ways: dict[str, Way] = {
        "InfoNCELoss": lambda: plain(pairs)["loss"].backward(),
        "InfoNCELoss(hardness=9)": lambda: hard(pairs)["loss"].backward(),
    }
    peer = ("open_clip.ClipLoss", lambda: theirs(image, text, scale.exp()).backward())
    compare(f"Loss, forward and backward, {batch_size} pairs", peer, ways, runs)


def metric(runs: int) -> None:
    """Recall of a model that has learned something, on 5,000 images with five texts each (COCO's test set)."""
    print_versions()
    images = 5000
    owner, centre = torch.arange(images).repeat_interleave(5), unit(images)
    noise = 0.15  # R@1 near 8, as of a model that begins to learn
    image = normalize(centre + noise * torch.randn_like(centre), dim=1)
    text = normalize(centre[owner] + noise * torch.randn(len(owner), DIM), dim=1)

    def ours() -> object:
        metric = ImageTextRetrieval()
        metric.update(image[owner], text, owner, torch.arange(len(owner)))
        return metric.compute()

    peer = ("one float32 product", lambda: image @ text.T)
    compare("Recall in both directions, 5,000 x 25,000", peer, {"ImageTextRetrieval": ours}, runs)


def made_up_pairs(number: int, first_id: int) -> EmbeddingPairs:
    """Return pairs whose image and text are similar, so that the sampler has something to tell apart."""
    thing, ids = unit(number), torch.arange(first_id, first_id + number)
    image, text = (normalize(thing + 0.7 * unit(number), dim=1) for _ in range(2))
    return EmbeddingPairs(image, text, ids, ids)


def bank(runs: int) -> None:
    """One step with a memory bank: the loss in both directions, its gradient, and the batch into the queue.

    With one positive per anchor, both losses of the peer are InfoNCE over the queue. Our loss has the term of the batch itself
    and the posteriors of false negatives, too. The peer has neither.
    """
    try:
        from pytorch_metric_learning.losses import CrossBatchMemory, NTXentLoss, SupConLoss
    except ImportError as error:
        raise SystemExit("The part `bank` needs its peer: pip install pytorch-metric-learning") from error
    print_versions("pytorch-metric-learning")
    live = made_up_pairs(BATCH_SIZE, QUEUE_SIZE)
    slow = EmbeddingPairs(live.image_embeddings.clone(), live.text_embeddings.clone(), live.image_id, live.text_id)
    image, text = inputs = live.image_embeddings.requires_grad_(), live.text_embeddings.requires_grad_()
    queue, earlier = MemoryBank(QUEUE_SIZE, DIM), made_up_pairs(QUEUE_SIZE, 0)
    queue.enqueue(earlier)
    info_nce, sampler, agreement = InfoNCELoss(), FalseNegativeSampler(), Agreement()

    def ours(*options: Any) -> Way:
        def step() -> None:
            memory = MemoryCandidates(*queue.with_batch(slow), slow, sampler, *options)
            torch.autograd.grad(info_nce(live, memory=memory)["loss"], inputs)
            queue.enqueue(slow)

        return step

    def theirs(kind: type) -> Way:
        sides = [(image, slow.text_embeddings, earlier.text_embeddings)]
        sides.append((text, slow.image_embeddings, earlier.image_embeddings))
        labels, is_stored = live.image_id.repeat(2), torch.arange(2 * BATCH_SIZE) >= BATCH_SIZE
        memories = []
        for _, _, stored in sides:
            memory = CrossBatchMemory(kind(temperature=TEMPERATURE), DIM, memory_size=QUEUE_SIZE)
            memory.add_to_memory(stored, earlier.image_id, QUEUE_SIZE)
            memories.append(memory)

        def step() -> None:
            for memory, (anchor, partner, _) in zip(memories, sides, strict=True):
                value: Tensor = memory(torch.cat([anchor, partner]), labels, enqueue_mask=is_stored)
                torch.autograd.grad(value, anchor)

        return step

    ways: dict[str, Way] = {
        "InfoNCELoss with a MemoryBank": ours(),
        "InfoNCELoss with a MemoryBank and its agreement": ours(agreement),
    }
    title = f"Memory bank, queue {QUEUE_SIZE}, batch {BATCH_SIZE}"
    compare(title, ("CrossBatchMemory(SupConLoss)", theirs(SupConLoss)), ways, runs)
    # Its own matrix of all positives by all negatives takes many seconds per step.
    few = max(1, runs // 5)
    compare(title, ("CrossBatchMemory(NTXentLoss), the same value", theirs(NTXentLoss)), ways, few)
