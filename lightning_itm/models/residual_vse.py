"""RVSE++: visual semantic embeddings of region features, with a residual block and generalized pooling."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_itm.data.batch import PaddedSequence
from lightning_itm.functional.similarity import full_precision
from lightning_itm.losses.triplet import TripletLoss
from lightning_itm.models.dual_encoder import DualEncoder
from lightning_itm.models.generalized_pooling import BidirectionalGRU, GeneralizedPooling


class RegionEncoder(nn.Module):
    """Embed an image from the features of its regions: project each, add a two-layer residual, pool, normalise.

    It can also be a head over the patch tokens of an image tower.

    Args:
        image_dim: The width of a region's features, 2048 for the usual bottom-up features.
        embed_dim: The width of the embedding. The default, 1024, is the paper's.
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
        # BatchNorm1d takes rows, so images and regions are one dimension for it: (images * regions, embed_dim / 2).
        inner = self.norm(self.down(hidden).flatten(0, 1)).relu().unflatten(0, hidden.shape[:2])
        return _unit_norm(self.pooling(self.up(inner) + hidden, regions.lengths))


class WordEncoder(nn.Module):
    """Embed a sentence from its word ids: look the words up, read them both ways, pool, normalise.

    Args:
        vocab_size: The number of words, ``len(vocabulary)``.
        word_dim: The width of a word's vector. The default, 300, is the paper's.
        embed_dim: The width of the embedding. It must be that of the images.
    """

    def __init__(self, vocab_size: int, word_dim: int = 300, embed_dim: int = 1024) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, word_dim)
        self.rnn = BidirectionalGRU(word_dim, embed_dim)
        self.pooling = GeneralizedPooling()
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)

    def forward(self, words: PaddedSequence) -> Tensor:
        """Return one unit vector per text, `(texts, embed_dim)`."""
        hidden = self.rnn(self.embed(words.values), words.lengths)
        return _unit_norm(self.pooling(hidden, words.lengths))


class ResidualVSE(DualEncoder):
    """Match sets of region features with sentences (RVSE++), by default with selective hard negatives.

    Use it to reproduce the papers on precomputed region features. To fine-tune a pretrained model on pictures, use
    :class:`~lightning_itm.OpenCLIPDualEncoder`.

    ``image`` and ``text`` of a batch are :class:`~lightning_itm.data.PaddedSequence`, as
    :class:`~lightning_itm.RegionFeatureDataset` makes them: values `(images, regions, image_dim)`, and word ids `(texts,
    words)`.

    Args:
        vocab_size: The number of words, ``len(vocabulary)`` of the dataset.
        image_dim: The width of a region's features, 2048 for the usual bottom-up features.
        embed_dim: The width of the embeddings. The default, 1024, is the paper's.
        word_dim: The width of a word's vector. The default, 300, is the paper's.
        loss: The loss of a batch, a module. Default: ``TripletLoss(negatives="selective")``.
        learning_rate: The learning rate of AdamW. The default, 5e-4, is the paper's, for training from scratch.
        **kwargs: Further options of :class:`DualEncoder`, such as ``weight_decay``. ``warmup_steps`` is 0 by default here.

    References:
        arXiv 2303.00181 (2023). Its images drop a fifth of their regions in training. Here the dataset does that.
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
        super().__init__(loss, learning_rate=learning_rate, **kwargs)
        self.save_settings(
            {"vocab_size": vocab_size, "image_dim": image_dim, "embed_dim": embed_dim, "word_dim": word_dim}
        )
        self.image_encoder = RegionEncoder(image_dim, embed_dim)
        self.text_encoder = WordEncoder(vocab_size, word_dim, embed_dim)

    def default_loss(self) -> nn.Module:
        """Return the selective triplet loss."""
        return TripletLoss(negatives="selective")

    def encode_image(self, image: PaddedSequence) -> Tensor:
        """Encode sets of region features into one vector per image."""
        return self.image_encoder(image)  # type: ignore[no-any-return]

    def encode_text(self, text: PaddedSequence) -> Tensor:
        """Encode sentences of word ids into one vector per text."""
        return self.text_encoder(text)  # type: ignore[no-any-return]

    @classmethod
    def from_published(cls, state: Mapping[str, Tensor], **kwargs: Any) -> "ResidualVSE":
        """Build the model from published weights. Widths and dtype are taken from them.

        Args:
            state: The weights of both encoders in one mapping, under the published names (``image_encoder.fc.weight``, …).
            **kwargs: Options of the class, such as ``loss`` and ``learning_rate``, but no widths.

        Raises:
            ValueError: if weights are missing, or if there are others.
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


def _unit_norm(x: Tensor) -> Tensor:
    x = full_precision(x)
    # As published, the 1e-8 is added to the norm. `functional.unit_norm` would differ in the last digits.
    scaled: Tensor = x / (x.norm(dim=1, keepdim=True) + 1e-8)
    return scaled
