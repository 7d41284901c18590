"""What stands in for a module and a Trainer where there is none: any two encoders, and the processes that share the work."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from lightning.fabric import is_wrapped
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from torch import Tensor, nn

from lightning_itm.checks import check_choice
from lightning_itm.distributed import world_size
from lightning_itm.sharded_weights import gathering

Encode = Callable[[Any], Any]
PrecisionName = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"]


class Encoders(nn.Module):
    """Hold the two encoders of a model, and check what they return.

    Args:
        model: An object with ``encode_image`` and ``encode_text``, or a pair of functions.
        device: Where the inputs go. Default: where the weights are, or the CPU.

    Raises:
        TypeError: if the model is neither.
        ValueError: if its weights are on another device.
    """

    def __init__(self, model: Any, device: str | torch.device | None) -> None:
        super().__init__()
        self._encode = [gathering(encode) for encode in _pair_of(model)]
        # Only for their modes. Held by a list, so that nothing of the model is renamed or registered twice.
        found = [part for encode in self._encode for part in _modules_of(encode)]
        self.parts = nn.ModuleList(found)
        there = next((parameter.device for parameter in self.parts.parameters()), None)
        wanted = torch.device(device) if device is not None else there or torch.device("cpu")
        if there is not None and (there.type != wanted.type or wanted.index not in (None, there.index)):
            raise ValueError(
                f"Expected the model to be on `device`, {wanted}, got weights on {there}. Move it there: "
                f"`model.to({str(wanted)!r})`, or leave `device` out."
            )
        self.device = wanted if there is None else there
        self._width: int | None = None

    def encode_image(self, images: Any) -> Tensor:
        """Encode a batch of images, `(batch, dim)`."""
        return self._checked("image", self._encode[0](images), images)

    def encode_text(self, texts: Any) -> Tensor:
        """Encode a batch of texts, `(batch, dim)`."""
        return self._checked("text", self._encode[1](texts), texts)

    def _checked(self, kind: str, returned: Any, inputs: Any) -> Tensor:
        if not hasattr(returned, "shape") or not hasattr(returned, "dtype"):  # a tensor or an array has both
            raise TypeError(
                f"Expected the encoder of the {kind}s to return a tensor or an array (batch, dim), got "
                f"{type(returned).__name__}. Return its embeddings, such as `lambda batch: model(batch).pooler_output`."
            )
        vectors = torch.as_tensor(returned, device=self.device)
        rows = _num_rows(inputs)
        if vectors.ndim != 2 or (rows is not None and len(vectors) != rows) or not vectors.is_floating_point():
            raise ValueError(
                f"Expected the encoder of the {kind}s to return one vector of floats for each of {rows} {kind}s, got "
                f"{tuple(vectors.shape)} of {vectors.dtype}. Pool what it has per word or per patch into one vector."
            )
        self._width = vectors.shape[1] if self._width is None else self._width
        if vectors.shape[1] != self._width:
            raise ValueError(
                f"Expected image and text embeddings of one width, {self._width}, got {vectors.shape[1]} for {kind}s. "
                "Project both to the same width."
            )
        return vectors


@dataclass(frozen=True)
class WithoutTrainer:
    """Stand in for the Trainer where there is none: :class:`~lightning_itm.mining.encode.Runner`.

    Args:
        precision_plugin: Lightning's plugin of the precision.
        progress_bar_callback: None where no progress is shown.
    """

    precision_plugin: Precision
    progress_bar_callback: Any = None

    @property
    def world_size(self) -> int:
        """The number of processes in the process group, or 1."""
        return world_size()

    @property
    def global_rank(self) -> int:
        """The number of this process, from 0."""
        return dist.get_rank() if world_size() > 1 else 0

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the process that writes."""
        return self.global_rank == 0


def _pair_of(model: Any) -> tuple[Encode, Encode]:
    if isinstance(model, tuple | list) and len(model) == 2 and all(callable(encode) for encode in model):
        return model[0], model[1]
    # What Fabric and DDP wrap has the methods of the model behind `module`. A call of these needs no wrapper without gradient.
    while is_wrapped(model) or isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    encoders = [getattr(model, f"encode_{kind}", None) for kind in ("image", "text")]
    if not (callable(encoders[0]) and callable(encoders[1])):
        raise TypeError(
            "Expected `model` to have `encode_image` and `encode_text`, or to be a pair of functions (images, texts), got "
            f"{type(model).__name__}. Give two functions, such as `(model.get_image_features, model.get_text_features)`."
        )
    return encoders[0], encoders[1]


def _modules_of(encode: Any) -> Iterator[nn.Module]:
    while isinstance(encode, functools.partial):
        encode = encode.func
    for part in (encode, getattr(encode, "__self__", None)):  # a module, or a method of one
        if isinstance(part, nn.Module):
            yield part


def _num_rows(inputs: Any) -> int | None:
    """Return the number of inputs of a batch, where it can be told."""
    if isinstance(inputs, Mapping):
        inputs = next(iter(inputs.values()), None)
    return len(inputs) if isinstance(inputs, Sized) else None


def plugin_of(name: str, device: torch.device) -> Precision:
    """Return Lightning's plugin for a precision."""
    check_choice("precision", name, get_args(PrecisionName))
    if name.endswith("mixed"):
        return MixedPrecision(name, device.type)  # type: ignore[arg-type]
    if name == "32-true":
        return Precision()
    return DoublePrecision() if name == "64-true" else HalfPrecision(name)  # type: ignore[arg-type]
