"""What a user says about adapters, checked and made complete."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KINDS = ("image", "text")


@dataclass(frozen=True)
class LoraOptions:
    """Say which adapters a tower gets.

    Args:
        rank: The rank of each adapter, such as 8. A higher one has more weights and learns more.
        alpha: What an adapter does to a layer is multiplied with ``alpha / rank``. Default: twice the rank.
        dropout: The probability with which an input of an adapter is dropped in training, such as 0.1 for little data.
            ``peft`` does not use it in attention layers of ``torch.nn.MultiheadAttention``.
        target_modules: The layers that are adapted, by their names or the ends of their names, such as
            ``["q_proj", "v_proj"]``. Default: all attention and linear layers in the blocks of the tower.

    Raises:
        ValueError: if ``rank`` is not a positive integer, ``alpha`` is not positive, or ``dropout`` is outside [0, 1).
    """

    rank: int
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"Expected the rank of `lora` to be a positive integer, such as 8, got {self.rank!r}.")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"Expected `alpha` of `lora` to be positive, got {self.alpha!r}. Typical: twice the rank.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"Expected `dropout` of `lora` to be in [0, 1), got {self.dropout!r}. Typical: 0 to 0.1.")


def lora_options(lora: Any) -> dict[str, LoraOptions]:
    """Return the options of each tower that gets adapters.

    Args:
        lora: A rank for both towers. Or a dict of the options of :class:`LoraOptions`, for both. Or a dict with ``"image"``,
            ``"text"`` or both, and a rank or such a dict for each. ``None``: no adapters.

    Raises:
        TypeError: if it is something else.
        ValueError: if a dict has other keys.

    Example:
        >>> from lightning_itm.models.pretrained.lora_options import lora_options
        >>> lora_options({"image": 8, "text": {"rank": 4, "dropout": 0.1}})["text"].rank
        4
    """
    if lora is None:
        return {}
    if isinstance(lora, Mapping) and lora and set(lora) <= set(KINDS):
        return {kind: _options(lora[kind]) for kind in KINDS if kind in lora}  # images first, whatever the order
    return {kind: _options(lora) for kind in KINDS}


def _options(given: Any) -> LoraOptions:
    if isinstance(given, int):
        return LoraOptions(given)
    if not isinstance(given, Mapping):
        raise TypeError(
            f"Expected `lora` to be a rank, or a dict such as {{'image': 8, 'text': 8}}, got {given!r}. Leave it out to train "
            "all weights."
        )
    fields = LoraOptions.__dataclass_fields__
    unknown = sorted(str(key) for key in given if key not in fields)
    if unknown or "rank" not in given:
        raise ValueError(
            f"Expected `lora` to be a dict with 'image' and 'text', or with a 'rank' and perhaps {list(fields)[1:]}, got "
            f"{list(given)}. Rename or remove {unknown or 'nothing, and add a rank'}."
        )
    targets = given.get("target_modules")
    targets = (targets,) if isinstance(targets, str) else targets
    return LoraOptions(**{**given, "target_modules": None if targets is None else tuple(targets)})
