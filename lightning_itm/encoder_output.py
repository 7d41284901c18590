"""What an encoder returned, checked before anything is computed from it."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor

from lightning_itm.sharded_weights import gathering

Kind = Literal["image", "text"]


def returning_vectors(encode: Callable[[Any], Any], kind: Kind) -> Callable[[Any], Tensor]:
    """Return the same encoder with its output checked, as :func:`vectors_of` does it.

    Where FSDP2 splits weights over the ranks, the encoder gathers those that its own module holds directly.

    Args:
        encode: ``encode_image`` or ``encode_text`` of a :class:`~lightning_itm.DualEncoder`.
        kind: ``"image"`` or ``"text"``, for the message.

    Raises:
        RuntimeError: at a call, if the encoder meets weights that are split.
    """
    gathers = gathering(encode)

    def checked(inputs: Any) -> Tensor:
        try:
            return vectors_of(gathers(inputs), kind)
        except RuntimeError as error:
            if "DTensor" not in str(error):
                raise
            raise RuntimeError(
                f"Expected `encode_{kind}` to call modules that gather their weights, got weights that FSDP2 has split: "
                f"{error} Only a call of the module that `fully_shard` got gathers them, as in `self.{kind}_encoder(inputs)`. "
                "For another method of it, use `torch.distributed.fsdp.register_fsdp_forward_method(module, 'method')`."
            ) from error

    return checked


def vectors_of(output: Any, kind: Kind) -> Tensor:
    """Return the vectors that an encoder returned, one per pair.

    Most encoders return a tensor. The models of ``transformers`` may return an object that holds one: ``image_embeds`` or
    ``text_embeds`` is taken if there is one, and ``pooler_output`` otherwise.

    Args:
        output: What ``encode_image`` or ``encode_text`` returned.
        kind: ``"image"`` or ``"text"``, for the message.

    Returns:
        A floating-point tensor `(pairs, dim)`.

    Raises:
        TypeError: if there is no tensor in it, if it can't be known which one is meant, or if it holds integers.
        ValueError: if the tensor has another number of dimensions than two.

    Example:
        >>> import torch
        >>> from lightning_itm.encoder_output import vectors_of
        >>> vectors_of({"pooler_output": torch.ones(2, 3), "last_hidden_state": torch.ones(2, 5, 3)}, "image").shape
        torch.Size([2, 3])
        >>> vectors_of(torch.ones(2, 5, 3), "text")
        Traceback (most recent call last):
        ValueError: Expected `encode_text` to return one vector per pair, (pairs, dim), got the shape (2, 5, 3). ...
    """
    vectors = _tensor_in(output, kind)
    if vectors.ndim != 2:
        way_out = (
            "Pool over the tokens, such as `tokens[:, 0]`." if vectors.ndim == 3 else "Flatten them to that shape."
        )
        raise ValueError(
            f"Expected `encode_{kind}` to return one vector per pair, (pairs, dim), got the shape {tuple(vectors.shape)}. "
            f"{way_out}"
        )
    if not vectors.is_floating_point():
        raise TypeError(
            f"Expected `encode_{kind}` to return floating-point numbers, got {vectors.dtype}. Return what the last layer "
            "computes."
        )
    return vectors


def _tensor_in(output: Any, kind: Kind) -> Tensor:
    if isinstance(output, Tensor):
        return output
    names = (f"{kind}_embeds", "pooler_output")
    # The outputs of `transformers` are mappings that leave out what is None.
    if isinstance(output, Mapping):
        found = [output[name] for name in names if isinstance(output.get(name), Tensor)]
        if found:
            return found[0]  # type: ignore[no-any-return]
        got = f"{type(output).__name__} with {list(output)}"
    elif isinstance(output, tuple | list):
        got = f"{type(output).__name__} of {len(output)}"
    else:
        got = type(output).__name__
    raise TypeError(
        f"Expected `encode_{kind}` to return a tensor (pairs, dim), or an object of transformers with `{names[0]}` or "
        f"`{names[1]}`, got {got}. Return the one tensor that holds one vector per pair."
    )
