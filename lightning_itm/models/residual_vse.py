"""RVSE++: visual semantic embedding of region features, with a residual block and generalized pooling."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_itm.data.batch import PaddedSequence
from lightning_itm.functional.similarity import full_precision
from lightning_itm.losses.triplet import TripletLoss
from lightning_itm.models.dual_encoder import DualEncoder

PADDING_SCORE = -10_000.0  # fits fp16


class BidirectionalGRU(nn.Module):
    """A GRU forward and one backward, averaged. Each reads its sequence from its own end; no length is read by the host.

    Args:
        input_dim: Width of the input.
        hidden_dim: Width of the output.
    """

    def __init__(self, input_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.forward_gru = nn.GRU(input_dim, hidden_dim, batch_first=True)
        self.backward_gru = nn.GRU(input_dim, hidden_dim, batch_first=True)

    def forward(self, values: Tensor, lengths: Tensor) -> Tensor:
        """Return `(sequences, longest, hidden_dim)` from `(sequences, longest, input_dim)`; past the lengths, anything."""
        ahead, _ = self.forward_gru(values)
        behind, _ = self.backward_gru(_reversed(values, lengths))
        return (ahead + _reversed(behind, lengths)) / 2  # type: ignore[no-any-return]


class GeneralizedPooling(nn.Module):
    r"""Pool a set by a learned weighting of its sorted values (GPO).

    .. math:: \sum_{k=1}^{n} \theta_k(n) \max{}_k(x_1, \dots, x_n)

    where :math:`\max_k` is the k-th largest value, dimension by dimension, and θ comes from a small GRU over codes of the
    positions 1 … n.

    Args:
        code_dim: Width of the sinusoidal codes.
        hidden_dim: Width of the GRU.
        temperature: Of the softmax over positions.

    Example:
        >>> pooling = GeneralizedPooling()
        >>> pooled = pooling(torch.tensor([[[2.0], [2.0], [0.0]]]), torch.tensor([2]))  # the third is padding
        >>> pooled.detach().round(decimals=4)  # the weights, which are random, sum to 1
        tensor([[2.]])

    References:
        Chen et al., *Learning the Best Pooling Strategy for Visual Semantic Embedding*, CVPR 2021, arXiv 2011.04305.
    """

    def __init__(self, code_dim: int = 32, hidden_dim: int = 32, temperature: float = 0.1) -> None:
        super().__init__()
        self.code_dim, self.temperature = code_dim, temperature
        self.gru = BidirectionalGRU(code_dim, hidden_dim)
        self.linear = nn.Linear(hidden_dim, 1, bias=False)

    def forward(self, values: Tensor, lengths: Tensor) -> Tensor:
        """Return `(sets, dim)` from `(sets, longest, dim)` and the number of items of each set."""
        is_padding = (torch.arange(values.shape[1], device=values.device) >= lengths[:, None])[:, :, None]
        ordered = values.masked_fill(is_padding, PADDING_SCORE).sort(dim=1, descending=True).values
        weights = self.weights(values.shape[1])[lengths - 1]
        return (ordered.masked_fill(is_padding, 0) * weights[:, :, None]).sum(dim=1)

    def weights(self, longest: int) -> Tensor:
        """Return θ for sets of 1 to ``longest`` items, `(longest, longest)`; row n − 1 is for n items."""
        like = self.linear.weight
        sizes = torch.arange(1, longest + 1, device=like.device)
        is_padding = torch.arange(longest, device=like.device) >= sizes[:, None]
        codes = _position_codes(longest, self.code_dim, like).expand(longest, -1, -1)
        scores = self.linear(self.gru(codes.masked_fill(is_padding[:, :, None], 0), sizes)).squeeze(2)
        scores = scores.float() if scores.dtype != torch.float64 else scores
        weights: Tensor = (scores.masked_fill(is_padding, PADDING_SCORE) / self.temperature).softmax(dim=1)
        return weights


class RegionEncoder(nn.Module):
    """Project each region, add a two-layer residual, pool, normalise. Also a head over the patch tokens of an image tower.

    Args:
        image_dim: Width of a region's features.
        embed_dim: Width of the embedding.
    """

    def __init__(self, image_dim: int = 2048, embed_dim: int = 1024) -> None:
        super().__init__()
        self.fc = nn.Linear(image_dim, embed_dim)
        self.down, self.norm = nn.Linear(embed_dim, embed_dim // 2), nn.BatchNorm1d(embed_dim // 2)
        self.up = nn.Linear(embed_dim // 2, embed_dim)
        self.pooling = GeneralizedPooling()
        nn.init.xavier_uniform_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, regions: PaddedSequence) -> Tensor:
        """Return `(images, embed_dim)`. As published, padding takes part in the batch statistics."""
        hidden = self.fc(regions.values)
        inner = self.norm(self.down(hidden).flatten(0, 1)).relu().unflatten(0, hidden.shape[:2])
        return _unit_norm(self.pooling(self.up(inner) + hidden, regions.lengths))


class WordEncoder(nn.Module):
    """Embed words, read them both ways, pool, normalise.

    Args:
        vocab_size: Number of words.
        word_dim: Width of a word.
        embed_dim: Width of the embedding.
    """

    def __init__(self, vocab_size: int, word_dim: int = 300, embed_dim: int = 1024) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, word_dim)
        self.rnn = BidirectionalGRU(word_dim, embed_dim)
        self.pooling = GeneralizedPooling()
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)

    def forward(self, words: PaddedSequence) -> Tensor:
        """Return `(texts, embed_dim)`."""
        hidden = self.rnn(self.embed(words.values), words.lengths)
        return _unit_norm(self.pooling(hidden, words.lengths))


class ResidualVSE(DualEncoder):
    """Match sets of region features with sentences: RVSE++, with selective hard negatives unless told otherwise.

    ``image`` and ``text`` of a batch are :class:`~lightning_itm.data.PaddedSequence`, as
    :class:`~lightning_itm.RegionFeatureDataset` makes them: values `(images, regions, image_dim)`, and word ids `(texts,
    words)`.

    Args:
        vocab_size: Number of words, ``len(vocabulary)``.
        image_dim: Width of a region's features.
        embed_dim: Width of the embeddings.
        word_dim: Width of a word.
        loss: As in :class:`DualEncoder`; default: ``TripletLoss(negatives="selective")``.
        learning_rate: As published.
        **kwargs: As in :class:`DualEncoder`.

    References:
        arXiv 2303.00181 (2023). Its images drop a fifth of their regions in training, which is the data's part here.
    """

    def __init__(
        self,
        vocab_size: int,
        image_dim: int = 2048,
        embed_dim: int = 1024,
        word_dim: int = 300,
        loss: nn.Module | None = None,
        *,
        learning_rate: float = 5e-4,
        **kwargs: Any,
    ) -> None:
        kwargs = {"warmup_steps": 0, **kwargs}
        loss = TripletLoss(negatives="selective") if loss is None else loss
        super().__init__(loss, learning_rate=learning_rate, **kwargs)
        self.save_hyperparameters("vocab_size", "image_dim", "embed_dim", "word_dim")
        self.image_encoder = RegionEncoder(image_dim, embed_dim)
        self.text_encoder = WordEncoder(vocab_size, word_dim, embed_dim)

    def encode_image(self, image: PaddedSequence) -> Tensor:
        """Encode sets of regions."""
        return self.image_encoder(image)  # type: ignore[no-any-return]

    def encode_text(self, text: PaddedSequence) -> Tensor:
        """Encode sentences of word ids."""
        return self.text_encoder(text)  # type: ignore[no-any-return]

    @classmethod
    def from_published(cls, state: Mapping[str, Tensor], **kwargs: Any) -> "ResidualVSE":
        """Build the model from weights under the published names (``image_encoder.fc.weight``, …), of their widths and dtype.

        Args:
            state: The weights of both encoders in one mapping.
            **kwargs: As for the class: ``loss``, ``learning_rate``, …

        Raises:
            ValueError: Weights are missing, or there are others.
        """
        renamed = {_our_name(name): value for name, value in state.items() if ".mlp.bns.1." not in name}  # never used
        sizes = {"text_encoder.embed.weight", "image_encoder.fc.weight"}
        if not sizes <= renamed.keys():
            raise ValueError(f"Expected the published names, {sorted(sizes)} among them, got {sorted(state)[:6]} …")
        (vocab_size, word_dim), (embed_dim, image_dim) = (renamed[name].shape for name in sorted(sizes, reverse=True))
        model = cls(vocab_size, image_dim, embed_dim, word_dim, **kwargs)
        expected = {name for name in model.state_dict() if not name.startswith("loss.")}
        if expected != renamed.keys():
            raise ValueError(
                f"Expected the weights of RVSE++, got {sorted(renamed.keys() - expected)} that it has not, and without "
                f"{sorted(expected - renamed.keys())}."
            )
        model.to(renamed["image_encoder.fc.weight"].dtype)
        model.load_state_dict({**model.loss.state_dict(prefix="loss."), **renamed})
        return model


def _our_name(name: str) -> str:
    for theirs, ours in _RENAMED:
        name = name.replace(theirs, ours)
    for gru in (".gru.", ".rnn."):
        if gru in name:
            way = "backward_gru" if name.endswith("_reverse") else "forward_gru"
            name = name.replace(gru, f"{gru}{way}.").removesuffix("_reverse")
    return name


_RENAMED = (
    (".mlp.layers.0.", ".down."),
    (".mlp.layers.1.", ".up."),
    (".mlp.bns.0.", ".norm."),
    (".gpool.", ".pooling."),
)


def _reversed(values: Tensor, lengths: Tensor) -> Tensor:
    """Turn each sequence around within its length."""
    place = torch.arange(values.shape[1], device=values.device)
    index = torch.where(place < lengths[:, None], lengths[:, None] - 1 - place, place)
    return values.gather(1, index[:, :, None].expand_as(values))


def _position_codes(length: int, dim: int, like: Tensor) -> Tensor:
    """Return sinusoidal codes `(length, dim)`, sines at even places; in float32, as published, whatever comes after."""
    rate = torch.exp(torch.arange(0, dim, 2, device=like.device) * (-math.log(10_000.0) / dim))
    angle = torch.arange(length, device=like.device)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1).to(like.dtype)


def _unit_norm(x: Tensor) -> Tensor:
    x = full_precision(x)
    scaled: Tensor = x / (x.norm(dim=1, keepdim=True) + 1e-8)
    return scaled
