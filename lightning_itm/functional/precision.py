"""Products of embeddings in float32, whatever autocast and the settings of the process say."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def products(a: Float[Tensor, "rows dim"], b: Float[Tensor, "columns dim"]) -> Float[Tensor, "rows columns"]:
    """Multiply every row of one matrix with every row of another, in float32 (float64 stays float64).

    Autocast, ``torch.set_float32_matmul_precision`` and ``torch.backends`` may allow TF32 or bfloat16 for the towers. Such
    products would round differences of 0.001, which decide what is hardest. Here they change nothing, neither the products nor
    their gradients.

    Args:
        a: Embeddings, one per row, of any floating dtype.
        b: Embeddings of the same width.

    Example:
        >>> import torch
        >>> from lightning_itm.functional.precision import products
        >>> products(torch.eye(2), torch.tensor([[0.6, 0.8]]))
        tensor([[0.6000],
                [0.8000]])
    """
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    result: Tensor = _multiply(a.to(dtype), b.to(dtype))
    return result


@contextmanager
def full_precision_products() -> Iterator[None]:
    """Multiply float32 as float32, whatever ``torch.set_float32_matmul_precision`` and ``torch.backends`` say."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # before torch 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    # The newer settings, because the older ones raise as soon as anyone has touched these. Each inherits from a parent.
    backends: Any = torch.backends
    settings = ((backends.cuda.matmul, backends), (backends.mkldnn.matmul, backends.mkldnn))
    lowered = [(part, parent, part.fp32_precision) for part, parent in settings if part.fp32_precision not in _FULL]
    for part, _, _ in lowered:
        part.fp32_precision = "ieee"
    try:
        yield
    finally:
        for part, parent, value in lowered:
            # What was inherited is inherited again, so that a later change of the parent still counts.
            part.fp32_precision = "none" if parent.fp32_precision == value else value


class _Products(torch.autograd.Function):
    # A function of its own, because the gradient is computed later, under the settings of that time.
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with torch.autocast(a.device.type, enabled=False), full_precision_products():
            return a @ b.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        # (rows, columns) @ (columns, dim), and (columns, rows) @ (rows, dim). Stored candidates need no gradient.
        grad_a = products(grad, b.T) if ctx.needs_input_grad[0] else None
        grad_b = products(grad.T, a.T) if ctx.needs_input_grad[1] else None
        return grad_a, grad_b


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiler cannot trace a change of settings
def _multiply(a: Tensor, b: Tensor) -> Any:
    return _Products.apply(a, b)


_FULL = ("ieee", "none")
