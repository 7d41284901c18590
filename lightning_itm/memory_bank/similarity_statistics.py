"""How similar matching pairs and their hardest negatives are."""

import torch
from torch import Tensor, nn

from lightning_itm.embeddings import EmbeddingPairs
from lightning_itm.functional.false_negatives import SimilarityFit
from lightning_itm.functional.precision import products
from lightning_itm.functional.similarity import full_precision, negative_mask

CHUNK_ELEMENTS = {"cpu": 1 << 19}  # what fits its caches: three times as fast as all at once
DEFAULT_CHUNK_ELEMENTS = 1 << 26


class SimilarityStatistics(nn.Module):
    r"""Running mean and variance of the similarity of matching pairs, and of their hardest negatives, in float64.

    Only pairs count that are the best match of each other in their batch, because those are matches that the model has
    understood. Such a pair gives one positive value, and two negative ones, the hardest of each direction.

    Moments are merged exactly (Chan et al., 1979).

    Example:
        >>> import torch
        >>> from lightning_itm.embeddings import EmbeddingPairs
        >>> from lightning_itm.memory_bank import SimilarityStatistics
        >>> statistics = SimilarityStatistics()
        >>> ids = torch.arange(2)
        >>> statistics.update(EmbeddingPairs(torch.eye(2), torch.eye(2), ids, ids))
        >>> statistics.fit().positive_mean, statistics.count
        (tensor(1., dtype=torch.float64), tensor([2., 4.], dtype=torch.float64))

    References:
        arXiv 2308.04380 (2023). The published variance takes each batch's deviation from the mean *so far* and comes out some
        percent too small. Its hardest negative is never below 0, and may be of the same image.
    """

    count: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("count", "mean", "deviation"):  # of positives and negatives; the last is the sum of squares
            self.register_buffer(name, torch.zeros(2, dtype=torch.float64))

    def reset(self) -> None:
        """Forget everything."""
        for buffer in self.buffers():
            buffer.zero_()

    @torch.no_grad()
    def update(self, pairs: EmbeddingPairs) -> None:
        """Take in the pairs of a batch, of all ranks. Values that are not finite do not count."""
        image, text = full_precision(pairs.image_embeddings), full_precision(pairs.text_embeddings)
        positive = (image * text).sum(dim=1)
        hardest = _hardest(image, text, pairs)
        mutual = (positive > hardest).all(dim=0) & hardest.isfinite().all(dim=0)
        # (2, 2 * pairs): a pair has one positive, which counts once, and two negatives.
        values = torch.stack([torch.stack([positive, positive]), hardest]).flatten(1)
        counts = torch.stack([mutual, torch.zeros_like(mutual), mutual, mutual]).view(2, -1)
        self.merge(values, counts)

    @torch.no_grad()
    def merge(self, values: Tensor, counts: Tensor) -> None:
        """Take in values.

        Args:
            values: Similarities of positives in the first row and of negatives in the second, `(2, values)`.
            counts: True for the values that count, bool `(2, values)`.
        """
        values, counts = values.to(self.mean.dtype), counts & values.isfinite()
        number = counts.sum(dim=1).to(self.mean.dtype)
        mean = values.where(counts, 0).sum(dim=1) / number.clamp_min(1)
        deviation = (values - mean[:, None]).square().where(counts, 0).sum(dim=1)
        total = self.count + number
        shift, share = mean - self.mean, number / total.clamp_min(1)
        self.deviation += deviation + shift.square() * self.count * share
        self.mean += shift * share
        self.count.copy_(total)

    def fit(self) -> SimilarityFit:
        """Return means and variances (with n − 1). They are 0 before there is anything to compute them from."""
        variance = self.deviation / (self.count - 1).clamp_min(1)
        return SimilarityFit(self.mean[0], variance[0], self.mean[1], variance[1])


def _hardest(image: Tensor, text: Tensor, pairs: EmbeddingPairs) -> Tensor:
    """Return the hardest negative of each image and of each text, `(2, pairs)`."""
    ids, captions = pairs.image_id, pairs.caption_id
    # Some rows of similarities at a time: all of them would not fit the caches, nor memory where batches are large.
    of_image, of_text = [], image.new_full((len(text),), -torch.inf)
    for rows in row_chunks(len(image), len(text), image.device):
        mask = negative_mask(ids[rows], ids, None if captions is None else captions[rows], captions)
        similarity = products(image[rows], text).masked_fill_(~mask, -torch.inf)
        of_image.append(similarity.amax(dim=1))
        of_text = torch.maximum(of_text, similarity.amax(dim=0))
    return torch.stack([torch.cat(of_image), of_text])


def row_chunks(num_rows: int, num_columns: int, device: torch.device) -> list[slice]:
    """Split rows of scores so that each part fits the caches."""
    rows = max(1, CHUNK_ELEMENTS.get(device.type, DEFAULT_CHUNK_ELEMENTS) // max(1, num_columns))
    return [slice(start, start + rows) for start in range(0, num_rows, rows)]
