"""Watch the gradients, and switch selective hard negatives on where they vanish."""

from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_itm.callbacks._strategies import check_whole_weights
from lightning_itm.data.batch import check_batch
from lightning_itm.distributed import gather
from lightning_itm.gradient_monitor.figure import plot_gradients
from lightning_itm.gradient_monitor.switch import GradientSwitch, measure_gradient

ROWS_AT_ONCE = 256  # of the history; stacked, or there would be a small tensor for each step


class GradientNormMonitor(Callback):
    r"""Switch selective hard negatives on where the gradient vanishes while the loss does not, and off again.

    Where hard negatives collapse a model, all embeddings run into one point, the loss stays at the margin, and the gradient
    goes to zero. In a model that has converged, both are small. So the norm is judged relative to the loss, and to the
    weights, matrix by matrix:

    .. math:: \kappa = \frac{1}{\ell} \max_k \|\nabla_{W_k} \ell\| \, \|W_k\|

    is, per tower, by how many percent the loss changes at most with one percent of a weight matrix. It has no unit: a loss of
    another scale or reduction, or a layer with larger weights, has the same κ, and networks of very different sizes have
    similar ones (``benchmarks/relative_gradient.py``). Both its parts are exponential averages. The *level* of a tower is κ
    over its healthy value: the highest seen so far, but at least 3 and at most 300. The lowest level of the towers decides:
    below ``low`` the rule goes on for all pairs, above ``high`` it goes off, as where the loss is below half of the margin.

    The switch travels in the batch as ``selective``; it rules ``TripletLoss(negatives="hardest")`` and ``"selective"`` alike,
    alone or in ``QuintupletLoss``. It is a tensor, and no host waits for it.

    Args:
        low: The level below which the rule goes on.
        high: The level above which it goes off.
        smoothing: Share of the old values that an average keeps at an optimizer step.
        min_steps: The least number of optimizer steps before the first turn, and between two.

    Logs ``gradient/<tower>_norm`` (L2, unscaled, before clipping), ``gradient/<tower>_relative`` (κ), ``gradient/level``,
    ``gradient/selective`` (1 where the rule is on) and ``gradient/num_skipped``: steps whose gradient or loss was not
    finite, which count for nothing else. A fit starts with the rule off, unless it resumes.

    Raises:
        ValueError: An argument out of its range; all parameters frozen; a checkpoint with other towers.
        MisconfigurationException: A loss without a selective rule, a module that is no ``DualEncoder`` or steps its optimizers
            itself, or a strategy that shards the weights.

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
        self._loss: Tensor | None = None  # of the batches of a step so far
        self._num_batches = 0
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
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"Expected automatic optimization, got a {type(pl_module).__name__} that steps its optimizers itself: no step "
                "would say which gradients belong to it. Leave `automatic_optimization` True."
            )
        self._restored, self._history, self._measured = None, [], None
        self._loss, self._num_batches = None, 0

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
        check_batch(batch)
        self._measured = None
        batch["selective"] = self._switch().is_on.expand(len(batch["image_id"]))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Measure: after unscaling, before clipping."""
        self._measured = torch.stack(
            [measure_gradient(parameters, pl_module.device) for parameters in self.towers.values()], dim=1
        )
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            # Such an optimizer unscales for itself, later. Asking for the scale by its name would wait for the device.
            scale = scaler.scale(torch.ones((), device=self._measured.device))
            self._measured = torch.where(self._measured < 0, self._measured, self._measured / scale)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step, decide; all ranks alike."""
        if not isinstance(outputs, dict) or outputs.get("loss") is None:
            return
        loss = outputs["loss"].detach().float()
        self._loss = loss if self._loss is None else self._loss + loss
        self._num_batches += 1
        if self._measured is None:
            return
        # Lightning divides by the number of batches of a full window, also in the last one of an epoch.
        correction = trainer.accumulate_grad_batches / self._num_batches
        loss, self._loss, self._num_batches = self._loss * correction, None, 0
        self._measured = torch.where(self._measured < 0, self._measured, self._measured * correction)
        values = gather(torch.cat([self._measured.flatten(), loss.view(1)])[None]).mean(dim=0)
        (norms, sensitivities), loss, self._measured = values[:-1].view(2, -1), values[-1], None
        switch = self._switch()
        is_on = switch.is_on.float()  # as it was in this step
        level = switch.update(sensitivities, loss, self._margin(pl_module, len(batch["image_id"]) * trainer.world_size))
        norms = norms.clamp_min(0)
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
        switch = {name: value.clone() for name, value in self.switch.state_dict().items()}
        return {"switch": switch, "history": self._rows().cpu(), "towers": list(self.towers)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a run that goes on needs."""
        if self._is_fitting and state_dict:
            self._restored = state_dict

    def _margin(self, pl_module: Any, num_anchors: int) -> float:
        """Return the margin of the hinge in the units of the loss."""
        loss = pl_module.loss
        margin = float(getattr(loss, "online", loss).margin)
        return margin * 2 * num_anchors if loss.reduction == "sum" else margin

    def _rows(self) -> Tensor:
        return torch.cat(self._history) if self._history else torch.zeros(0, 4 + len(self.towers))

    def _switch(self) -> GradientSwitch:
        if self.switch is None:
            raise RuntimeError("Expected a switch; it is made in `on_fit_start`, which did not run.")
        return self.switch
