"""A callback that changes the loss to selective hard negatives while the gradients vanish."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_itm.callbacks._figures import log_figure
from lightning_itm.callbacks._monitor_checks import check_can_be_watched
from lightning_itm.data.batch import check_batch
from lightning_itm.distributed import gather
from lightning_itm.gradient_monitor.figure import plot_gradients
from lightning_itm.gradient_monitor.switch import GradientSwitch, measure_gradient, restored_switch
from lightning_itm.sharded_weights import split_again

VERSION = 2  # of the callback's state
ROWS_AT_ONCE = 256  # The history is stacked when it has more rows than this, or each step would keep a small tensor.


class GradientNormMonitor(Callback):
    r"""Change the loss to selective hard negatives while the gradients vanish, and back when they recover.

    In plain terms: training with the hardest negatives can collapse a model. All embeddings run into one point, the loss stays
    at the margin, and the gradient goes to zero. The monitor sees this, and turns a rule of the loss on (the *selective* rule:
    where the hardest negative is as similar as the positive, the mean over all negatives is used instead). The mean pushes the
    embeddings apart. When they are apart, the monitor turns the rule off.

    A model that has converged has a small gradient, too, but a small loss as well. So the monitor tracks one number per tower:
    if one weight matrix changes by 1 %, by how many percent can the loss change?

    .. math:: \kappa = \frac{1}{\ell} \max_k \|\nabla_{W_k} \ell\| \, \|W_k\|

    It has no unit: it does not depend on the scale or the reduction of the loss, and little on the size of the network. A
    healthy model has about 5 to 850, and in a collapse it goes to zero (``benchmarks/relative_gradient.py``). Gradient and
    loss are exponential averages.

    When does the rule go on? Either of two tests is enough, for any tower:

    1. The *level* is below ``low``. It is κ over its healthy value, and the lowest of the towers counts. The healthy value is
       a slow average of log κ over about 100 healthy steps with the rule off, kept between 3 and 300. It forgets. After the
       first 100 steps, a spike moves it by 0.7 % at most.
    2. κ is below 3 while the loss is at least 0.8 of the margin. So a model that is collapsed from the start is found, too.

    The rule goes off when the level is above ``high`` and the second test no longer holds, or when the loss is below half of
    the margin. A fit starts with the rule off, unless it resumes.

    The rule works with ``TripletLoss(negatives="hardest")`` and ``"selective"``, alone or in ``QuintupletLoss``. It travels in
    the batch as ``selective``, a tensor on the device, so the host never waits for it.

    Args:
        low: The level below which the rule goes on. The default is half of the healthy value. Lower it if the rule
            goes on in a healthy run.
        high: The level above which the rule goes off. It is larger than ``low``, so that noise does not turn the
            rule on and off.
        smoothing: The fraction of the old value that an average keeps at an optimizer step. The default, 0.9, averages over
            about ten steps. Raise it for very small batches.
        min_steps: The smallest number of optimizer steps before the first turn, and between two turns.
        log_figures: After each epoch, send :meth:`plot` to the loggers that take it: TensorBoard, W&B, MLflow and Comet.

    Logs ``gradient/<tower>_norm`` (the L2 norm, unscaled and before clipping), ``gradient/<tower>_relative`` (κ),
    ``gradient/level``, ``gradient/selective`` (1 where the rule is on) and ``gradient/num_skipped``. The last counts the steps
    whose gradient or loss was not finite. Such a step changes nothing else.

    Raises:
        ValueError: if an argument is out of its range, if all parameters are frozen, or if a checkpoint has other towers or is
            of a newer version.
        MisconfigurationException: if the loss has no selective rule, if the module is not a ``DualEncoder``, if it steps its
            optimizers itself, or if the strategy is FSDP1, DeepSpeed or tensor parallel.

    References:
        The selective rule: arXiv 2303.00181 (2023), where it is always on. Turning it on and off is not in the paper.
    """

    def __init__(
        self,
        low: float = 0.5,
        high: float = 0.8,
        *,
        smoothing: float = 0.9,
        min_steps: int = 5,
        log_figures: bool = True,
    ) -> None:
        self.options: dict[str, Any] = {"low": low, "high": high, "smoothing": smoothing, "min_steps": min_steps}
        GradientSwitch(1, **self.options)  # The switch of the fit is made later. An option out of its range fails here.
        self.log_figures = log_figures
        self.towers: dict[str, list[nn.Parameter]] = {}
        self.switch: GradientSwitch | None = None
        self._restored: dict[str, Any] | None = None
        self._is_fitting = False
        self._measured: Tensor | None = None
        self._loss: Tensor | None = None  # the sum over the batches of this optimizer step so far
        self._num_batches = 0
        self._history: list[Tensor] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the strategy, the module and the loss have what the callback needs."""
        # `setup` comes before the loading of a checkpoint, which must know whether a fit is going on.
        self._is_fitting = stage == "fit"
        if not self._is_fitting:
            return
        check_can_be_watched(trainer, pl_module)
        self.switch, self._restored, self._history, self._measured = None, None, [], None
        self._loss, self._num_batches = None, 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start with the rule off, or go on with the state of a checkpoint."""
        # Here, not in `setup`: the parameters are on their device now, and other callbacks have frozen what they freeze.
        split_again(pl_module)  # gradients come to the parts
        modules: dict[str, nn.Module] = pl_module.towers()  # type: ignore[operator]
        self.towers = {name: [*module.parameters()] for name, module in modules.items()}
        trained = {name for name, parameters in self.towers.items() if any(one.requires_grad for one in parameters)}
        if not trained:
            raise ValueError(
                f"Expected a parameter that is trained in one of the towers {list(self.towers)}, got none: all are frozen. "
                "Leave one tower unlocked."
            )
        self.switch = GradientSwitch(len(self.towers), **self.options).to(pl_module.device)
        self._take_restored()

    def _take_restored(self) -> None:
        restored, self._restored = self._restored, None
        if restored is None:
            return
        switch = self._switch()
        switch.load_state_dict(restored_switch(restored, list(self.towers), VERSION))
        self._history = [restored["history"].to(switch.is_on.device)] if len(restored["history"]) else []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Put the switch into the batch, where the loss reads it."""
        check_batch(batch)
        self._measured = None
        # One value per pair, (pairs,), by `expand` of the tensor itself: reading the value would wait for the device.
        batch["selective"] = self._switch().is_on.expand(len(batch["image_id"]))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Measure the gradients. Here they are summed over the window and unscaled, but not yet clipped."""
        # (2, towers): the norms, and the sensitivities.
        self._measured = torch.stack(
            [measure_gradient(parameters, pl_module.device) for parameters in self.towers.values()], dim=1
        )
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            # A fused optimizer unscales inside its own step, after this hook. `get_scale` would wait for the device.
            scale = scaler.scale(torch.ones((), device=self._measured.device))
            self._measured = torch.where(self._measured < 0, self._measured, self._measured / scale)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Decide after an optimizer step. All ranks decide alike."""
        # Only this hook has the loss. It follows the optimizer step, so the decision holds from the next batch on.
        if not isinstance(outputs, dict) or outputs.get("loss") is None:
            return  # the module skipped this batch
        loss = outputs["loss"].detach().float()
        self._loss = loss if self._loss is None else self._loss + loss
        self._num_batches += 1
        if self._measured is None:
            return  # Gradients are accumulated, and the optimizer did not step.
        # Lightning divides by the number of batches of a full window, also in the last one of an epoch.
        correction = trainer.accumulate_grad_batches / self._num_batches
        loss, self._loss, self._num_batches = self._loss * correction, None, 0
        self._measured = torch.where(self._measured < 0, self._measured, self._measured * correction)
        # Every rank takes the mean of the same numbers, so the switches of all ranks stay equal.
        values = gather(torch.cat([self._measured.flatten(), loss.view(1)])[None]).mean(dim=0)
        (norms, sensitivities), loss, self._measured = values[:-1].view(2, -1), values[-1], None
        switch = self._switch()
        is_on = switch.is_on.float()  # before the update: what held in this step
        level = switch.update(sensitivities, loss, self._margin(pl_module, len(batch["image_id"]) * trainer.world_size))
        norms = norms.clamp_min(0)  # −1 means that the tower is not trained.
        logged = {f"gradient/{name}_norm": norm for name, norm in zip(self.towers, norms, strict=True)}
        logged |= {f"gradient/{name}_relative": one for name, one in zip(self.towers, switch.relative(), strict=True)}
        logged |= {"gradient/level": level, "gradient/selective": is_on}
        logged["gradient/num_skipped"] = switch.num_skipped.float()
        pl_module.log_dict(logged, batch_size=len(batch["image_id"]))
        step = torch.full_like(loss, trainer.global_step)
        self._history.append(torch.stack([step, loss, level, is_on, *norms])[None])
        if len(self._history) > ROWS_AT_ONCE:
            self._history = [self._rows()]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the figure."""
        if self.log_figures and self._history:
            log_figure(trainer, "gradient/norms", self.plot)

    def curves(self) -> dict[str, list[float]]:
        """Return one list per curve, with a value for each optimizer step.

        Returns:
            The lists ``step``, ``loss``, ``level`` and ``selective``, and ``<tower>_norm`` for each tower.
        """
        names = ("step", "loss", "level", "selective", *(f"{name}_norm" for name in self.towers))
        rows = self._rows().cpu()
        return {name: column.tolist() for name, column in zip(names, rows.T, strict=True)}

    def plot(self) -> Any:
        """Draw loss, norms and level over the steps. The spans where the rule was on are shaded.

        Returns:
            A matplotlib figure.

        Raises:
            RuntimeError: if no step was watched yet.
        """
        if not self._history:
            raise RuntimeError("Expected steps to draw, got none. Plot during a fit or after it.")
        return plot_gradients(self.curves(), low=self.options["low"], high=self.options["high"])

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, the switch and the history."""
        if self.switch is None:
            return {}
        switch = {name: value.clone() for name, value in self.switch.state_dict().items()}
        return {"version": VERSION, "switch": switch, "history": self._rows().cpu(), "towers": list(self.towers)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for ``on_fit_start``. A checkpoint that is loaded for evaluation is ignored."""
        if self._is_fitting and state_dict:
            self._restored = state_dict
            if self.switch is not None:  # strategies that shard the weights restore after `on_fit_start`
                self._take_restored()

    def _margin(self, pl_module: Any, num_anchors: int) -> float:
        """Return the margin of the hinge in the units of the loss, which a collapsed model has as its loss."""
        loss = pl_module.loss
        margin = float(getattr(loss, "online", loss).margin)
        # A sum runs over the anchors of both directions.
        return margin * 2 * num_anchors if loss.reduction == "sum" else margin

    def _rows(self) -> Tensor:
        return torch.cat(self._history) if self._history else torch.zeros(0, 4 + len(self.towers))

    def _switch(self) -> GradientSwitch:
        if self.switch is None:
            raise RuntimeError("Expected a switch, got none. `on_fit_start` makes it, and has not run.")
        return self.switch
