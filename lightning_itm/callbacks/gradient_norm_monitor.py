"""Watch the gradients, and switch selective hard negatives on where they vanish."""

from collections.abc import MutableMapping
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_itm.callbacks.whole_weights import check_whole_weights
from lightning_itm.distributed import gather
from lightning_itm.modules.gradient_plot import plot_gradients
from lightning_itm.modules.gradient_switch import GradientSwitch

ROWS_AT_ONCE = 256  # of the history; stacked, or there would be a small tensor for each step


class GradientNormMonitor(Callback):
    r"""Switch selective hard negatives on where the gradient vanishes while the loss does not, and off again.

    Where hard negatives collapse a model, all embeddings run into one point, the loss stays at the margin, and the gradient
    goes to zero. In a model that has converged, both are small. So the norm is judged relative to the loss, and to the
    weights, matrix by matrix:

    .. math:: \kappa = \frac{1}{\ell} \sqrt{\frac{1}{M} \sum_{k=1}^{M} \|\nabla_{W_k} \ell\|^2 \|W_k\|^2}

    is, per tower, by how many percent the loss can change with one percent of a weight matrix. It has no unit: a network of
    another size, a loss of another scale or reduction, a layer with larger weights have the same κ. Both its parts are
    exponential averages. The *level* of a tower is κ over its healthy value: the highest seen so far, but at least 3 and at
    most 30. The lowest level of the towers decides: below ``low`` the rule goes on for all pairs, above ``high`` it goes off.

    The switch travels in the batch as ``selective``; it rules ``TripletLoss(negatives="hardest")`` and ``"selective"`` alike,
    alone or in ``QuintupletLoss``. It is a tensor, and no host waits for it.

    Args:
        low: The level below which the rule goes on.
        high: The level above which it goes off.
        smoothing: Share of the old values that an average keeps at an optimizer step.
        min_steps: The least number of optimizer steps before the first turn, and between two.

    Logs ``gradient/<tower>_norm`` (L2, unscaled, before clipping), ``gradient/<tower>_relative`` (κ), ``gradient/level``,
    ``gradient/selective`` (1 where the rule is on) and ``gradient/num_skipped``: steps whose gradient was not finite, which
    count for nothing else.

    Raises:
        ValueError: An argument out of its range; all parameters frozen; a checkpoint with other towers.
        MisconfigurationException: A loss without a selective rule, a module that is no ``DualEncoder``, or a strategy that
            shards the weights.

    References:
        The rule: arXiv 2303.00181 (2023), where it is always on. The switch is ours.
    """

    def __init__(self, low: float = 0.5, high: float = 0.8, *, smoothing: float = 0.9, min_steps: int = 5) -> None:
        self.options: dict[str, Any] = {"low": low, "high": high, "smoothing": smoothing, "min_steps": min_steps}
        GradientSwitch(1, **self.options)  # says at once if one is out of its range
        self.towers: dict[str, list[nn.Parameter]] = {}
        self.switch: GradientSwitch | None = None
        self._restored: dict[str, Any] | None = None
        self._is_fitting = False
        self._measured: Tensor | None = None
        self._history: list[Tensor] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check what the callback needs."""
        self._is_fitting = stage == "fit"
        if not self._is_fitting:
            return
        check_whole_weights(trainer, "the norms are of the whole gradient")
        if not hasattr(pl_module, "towers"):
            raise MisconfigurationException(
                f"Expected a `DualEncoder`, got {type(pl_module).__name__}: its `towers()` are what is watched."
            )
        loss = getattr(pl_module, "loss", None)
        if not getattr(loss, "has_selective_rule", False):
            raise MisconfigurationException(
                f"Expected a loss with a selective rule to switch, got {type(loss).__name__}. "
                "Use `TripletLoss(negatives='hardest')` or 'selective', or `QuintupletLoss` around one."
            )
        self._restored, self._history, self._measured = None, [], None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start with the rule off, or go on as a checkpoint says."""
        modules: dict[str, nn.Module] = pl_module.towers()  # type: ignore[operator]
        self.towers = {name: [*module.parameters()] for name, module in modules.items()}
        trained = {name for name, parameters in self.towers.items() if any(one.requires_grad for one in parameters)}
        if not trained:
            raise ValueError(
                f"Expected a parameter that is trained in one of the towers {list(self.towers)}, got none: all are frozen. "
                "Leave one tower unlocked."
            )
        self.switch = GradientSwitch(len(self.towers), **self.options).to(pl_module.device)
        restored, self._restored = self._restored, None
        if restored is None:
            return
        if restored["towers"] != list(self.towers):
            raise ValueError(
                f"Expected the checkpoint to have the towers {list(self.towers)}, got {restored['towers']}. "
                "Resume with the same module."
            )
        self.switch.load_state_dict(restored["switch"])
        self._history = [restored["history"].to(pl_module.device)] if len(restored["history"]) else []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Put the switch into the batch."""
        if not isinstance(batch, MutableMapping) or "image_id" not in batch:
            raise TypeError(f"Expected the batch to be a dict with `image_id`, got {type(batch).__name__}.")
        batch["selective"] = self._switch().is_on.expand(len(batch["image_id"]))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Measure: after unscaling, before clipping."""
        self._measured = torch.stack([measure_gradient(parameters) for parameters in self.towers.values()], dim=1)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            # Such an optimizer unscales for itself, later. Asking for the scale by its name would wait for the device.
            self._measured = self._measured / scaler.scale(torch.ones((), device=self._measured.device))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step, decide; all ranks alike."""
        if self._measured is None or not isinstance(outputs, dict) or outputs.get("loss") is None:
            return
        loss = outputs["loss"].detach().float() * trainer.accumulate_grad_batches
        values = gather(torch.cat([self._measured.flatten(), loss.view(1)])[None]).mean(dim=0)
        (norms, sizes), loss, self._measured = values[:-1].view(2, -1), values[-1], None
        switch = self._switch()
        is_on = switch.is_on.float()  # as it was in this step
        level = switch.update(sizes, loss)
        logged = {f"gradient/{name}_norm": norm for name, norm in zip(self.towers, norms, strict=True)}
        logged |= {f"gradient/{name}_relative": one for name, one in zip(self.towers, switch.relative(), strict=True)}
        logged |= {
            "gradient/level": level,
            "gradient/selective": is_on,
            "gradient/num_skipped": switch.num_skipped.float(),
        }
        pl_module.log_dict(logged, batch_size=len(batch["image_id"]))
        step = torch.full_like(loss, trainer.global_step)
        self._history.append(torch.stack([step, loss, level, is_on, *norms])[None])
        if len(self._history) > ROWS_AT_ONCE:
            self._history = [self._rows()]

    def curves(self) -> dict[str, list[float]]:
        """Return what was seen at each optimizer step: ``step``, ``loss``, ``level``, ``selective``, and each tower's norm."""
        names = ("step", "loss", "level", "selective", *(f"{name}_norm" for name in self.towers))
        rows = self._rows().cpu()
        return {name: column.tolist() for name, column in zip(names, rows.T, strict=True)}

    def plot(self) -> Any:
        """Draw norms, loss and level over the steps, the spans where the rule was on shaded.

        Returns:
            A matplotlib figure.

        Raises:
            RuntimeError: There is nothing to draw yet.
        """
        if not self._history:
            raise RuntimeError("Expected steps to draw, but none was watched. Plot after, or in, a fit.")
        return plot_gradients(self.curves(), low=self.options["low"], high=self.options["high"])

    def state_dict(self) -> dict[str, Any]:
        """Return averages, switch and history."""
        if self.switch is None:
            return {}
        return {"switch": self.switch.state_dict(), "history": self._rows().cpu(), "towers": list(self.towers)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a run that goes on needs."""
        if self._is_fitting and state_dict:
            self._restored = state_dict

    def _rows(self) -> Tensor:
        return torch.cat(self._history) if self._history else torch.zeros(0, 4 + len(self.towers))

    def _switch(self) -> GradientSwitch:
        if self.switch is None:
            raise RuntimeError("Expected a switch; it is made in `on_fit_start`, which did not run.")
        return self.switch


def measure_gradient(parameters: list[nn.Parameter]) -> Tensor:
    """Return the norm of a tower's gradient, and the RMS over its matrices of gradient norm times weight norm."""
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    if not trained:
        return torch.zeros(2, device=parameters[0].device if parameters else None)
    # Without any matrix, as where biases alone are trained, all of them.
    matrices = [parameter for parameter in trained if parameter.ndim >= 2] or trained
    others = [parameter for parameter in trained if parameter.ndim < 2] if matrices is not trained else []
    of_matrices = _norms([one.grad for one in matrices])
    size, norm = (of_matrices * _norms(matrices)).square().mean().sqrt(), of_matrices.norm()
    if others:
        norm = torch.hypot(norm, _norms([one.grad for one in others]).norm())
    return torch.stack([norm, size])


def _norms(tensors: list[Any]) -> Tensor:
    return torch.stack(torch._foreach_norm([tensor.detach() for tensor in tensors])).float()
