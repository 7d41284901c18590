"""Adapters in the attention layer of torch. Import it only where ``peft`` is needed: it is optional."""

from typing import Any

from peft.tuners.lora.layer import MultiheadAttention
from torch import Tensor, nn
from torch.func import functional_call


class AdaptedAttention(MultiheadAttention):
    """Compute an attention layer of torch with adapters of ``peft`` at its packed projections and at its output projection.

    The layer of ``peft`` adds the adapters to the frozen weights before each pass and subtracts them afterwards, which moves
    these weights by rounding. At the output projection it adds them twice, once without a gradient (peft 0.21). Here the sum
    is a new tensor for the pass, and the frozen weights stay as they are.
    """

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute the attention. The arguments are those of ``torch.nn.MultiheadAttention``."""
        return functional_call(self.get_base_layer(), self.adapted_weights(), (query, *args), kwargs)

    def adapted_weights(self) -> dict[str, Tensor]:
        """Return the weights with the adapters added, by their names in the frozen layer."""
        layer: Any = self.get_base_layer()
        (adapter,) = self.lora_A  # one, which `add_adapters` has put in
        out = layer.out_proj
        return {
            "in_proj_weight": layer.in_proj_weight + self.get_delta_weight(adapter),
            "out_proj.base_layer.weight": out.get_base_layer().weight + out.get_delta_weight(adapter),
        }

    def merge_into_plain(self) -> nn.MultiheadAttention:
        """Add the adapters to the weights of the frozen layer, and return it without them."""
        layer: Any = self.get_base_layer()
        weights = {name: value.detach() for name, value in self.adapted_weights().items()}
        layer.out_proj = layer.out_proj.get_base_layer()
        layer.in_proj_weight.data.copy_(weights["in_proj_weight"])
        layer.out_proj.weight.data.copy_(weights["out_proj.base_layer.weight"])
        return layer  # type: ignore[no-any-return]

    def _restore_weights(self) -> None:
        """Do nothing, since the weights are never taken out. In ``peft``, each ``state_dict()`` makes them anew."""
