"""Both towers as ONNX files, for a search engine or a phone that has no PyTorch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from importlib.util import find_spec
from inspect import signature
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_itm.export.exportable import whole_folder

NEWER_EXPORTER = (2, 9)
"""The release of PyTorch from which ``torch.onnx.export`` goes by ``torch.export`` by itself."""
MOST_BYTES = 1_900_000_000
"""What a file of ONNX may hold, less some room for the graph. The weights of larger towers lie beside it."""


def export_onnx(
    model: Any,
    folder: str | PathLike[str],
    image: Tensor | Mapping[str, Tensor] | None = None,
    text: Tensor | Mapping[str, Tensor] | None = None,
    *,
    dynamo: bool | None = None,
) -> None:
    """Write both towers of a module as ``image.onnx`` and ``text.onnx``.

    In plain terms: each file takes a batch of any size, as ``encode_image`` and ``encode_text`` take it, and returns one
    embedding per row, float32. The embeddings have the norm 1, so that a product of two is their cosine. They are
    ``image_embeddings`` and ``text_embeddings``. The transform of images and the tokenizer are not in the files.

    Args:
        model: A :class:`~lightning_itm.DualEncoder`. A copy of it in float32, eval mode and on the CPU is written.
        folder: A folder that is new or empty.
        image: At least two images as ``encode_image`` takes them: a tensor `(images, ...)`, or a dict of tensors for an
            encoder that takes one. The first dimension may have any size later, all others stay as they are. The input has
            the name ``image``, or the names in the dict. Default: those of ``model.example_inputs()``, which models of
            open_clip have.
        text: At least two texts as ``encode_text`` takes them, likewise. The input is ``text``.
        dynamo: Whether to export by ``torch.export`` or by the older tracing. Default: as the installed PyTorch does by
            itself, which is ``torch.export`` from 2.9 on. Try the other one where one stops at an operator.

    Raises:
        ModuleNotFoundError: if onnx is not installed, which comes with ``pip install "lightning_itm[onnx]"``.
        ValueError: if there is no example for a tower, or if it has fewer than two rows.
        TypeError: if an example is neither a tensor nor a dict of tensors.
        FileExistsError: if there is anything in the folder.

    Example:
        >>> import torch
        >>> from lightning_itm.export import export_onnx
        >>> export_onnx(model, "onnx", torch.zeros(2, 3, 224, 224), torch.zeros(2, 77).long())  # doctest: +SKIP
    """
    dynamo = tuple(map(int, torch.__version__.split(".")[:2])) >= NEWER_EXPORTER if dynamo is None else dynamo
    for name in ("onnx", "onnxscript") if dynamo else ("onnx",):
        if find_spec(name) is None:
            raise ModuleNotFoundError(f'Expected {name}, to write ONNX: pip install "lightning_itm[onnx]".')
    if (image is None or text is None) and hasattr(model, "example_inputs"):
        defaults = model.example_inputs()
        image, text = (
            given if given is not None else default for given, default in zip((image, text), defaults, strict=True)
        )
    examples = {"image": _check_example("image", image), "text": _check_example("text", text)}
    copy = deepcopy(model).cpu().float().eval().requires_grad_(False)
    with whole_folder(folder) as part, torch.no_grad(), _without_fast_path():
        for kind, example in examples.items():
            _export(_Tower(copy, kind, example).eval(), part / f"{kind}.onnx", example, dynamo)


class _Tower(nn.Module):
    """One encoder with the normalisation, called with one tensor per input."""

    def __init__(self, module: Any, kind: str, example: dict[str, Tensor]) -> None:
        super().__init__()
        self.module, self.kind = module, kind
        self.names = None if list(example) == [kind] else list(example)

    def forward(self, *inputs: Tensor) -> Tensor:
        value = inputs[0] if self.names is None else dict(zip(self.names, inputs, strict=True))
        return nn.functional.normalize(getattr(self.module, f"encode_{self.kind}")(value).float(), dim=-1)


def _export(tower: _Tower, path: Path, example: dict[str, Tensor], dynamo: bool) -> None:
    options: dict[str, Any] = {"input_names": list(example), "output_names": [f"{tower.kind}_embeddings"]}
    inputs = tuple(example.values())
    if not dynamo:
        options["dynamic_axes"] = {name: {0: "batch"} for name in (*options["input_names"], *options["output_names"])}
        if "dynamo" in signature(torch.onnx.export).parameters:  # from 2.5 on
            options["dynamo"] = False
        torch.onnx.export(tower, inputs, str(path), **options)
        return
    batch = torch.export.Dim("batch")
    size = sum(weight.numel() * weight.element_size() for weight in tower.state_dict().values())
    options |= {"dynamic_shapes": {"inputs": tuple({0: batch} for _ in inputs)}, "external_data": size > MOST_BYTES}
    torch.onnx.export(tower, inputs, str(path), dynamo=True, verbose=False, **options)


def _check_example(kind: str, example: Any) -> dict[str, Tensor]:
    if example is None:
        raise ValueError(
            f"Expected an example for each tower, got none for `{kind}`. Pass `{kind}`, two rows as `encode_{kind}` takes "
            "them, or define `example_inputs` in the module, which returns both."
        )
    inputs = dict(example) if isinstance(example, Mapping) else {kind: example}
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"Expected `{kind}` to be a tensor or a dict of tensors, got {type(value).__name__}"
                + (f" under {name!r}." if isinstance(example, Mapping) else ".")
            )
        if value.ndim == 0 or len(value) < 2:  # one row would become a constant of the graph
            raise ValueError(
                f"Expected at least two rows in the example of `{kind}`, got the shape {tuple(value.shape)}."
            )
    return {name: value.cpu() for name, value in inputs.items()}


@contextmanager
def _without_fast_path() -> Iterator[None]:
    # Attention in eval mode would take one fused operator, which ONNX does not have.
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
