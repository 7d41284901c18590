"""One call for the run that most tests of callbacks and of data need: a small model, a small set, a quiet Trainer."""

from dataclasses import dataclass
from typing import Any

import lightning as L
from torch import nn

from tests.helpers.tiny import SILENT, Tiny, tiny_data


@dataclass(frozen=True)
class Run:
    """What took part in a fit, after it."""

    trainer: L.Trainer
    module: Any
    data: Any

    @property
    def metrics(self):
        """The last value of what was logged, as numbers: ``{"train/loss": 0.4, ...}``."""
        return {name: value.item() for name, value in self.trainer.callback_metrics.items()}

    def callback(self, kind):
        """The first callback of this class."""
        return next(callback for callback in self.trainer.callbacks if isinstance(callback, kind))


def fit(module=None, data=None, *callbacks, seed=None, resume_from=None, **trainer_options):
    """Fit ``module`` (default: ``Tiny()``) on ``data`` (default: ``tiny_data()``) and return the ``Run``.

    ``module`` may be a function that makes one, such as a class: it is called after ``seed`` is set, so that two runs in one
    test begin with the same weights. ``data`` is a data module or a loader. ``trainer_options`` are added to ``SILENT`` or
    replace its entries, and ``max_epochs`` is 2 where they do not say.
    """
    if seed is not None:
        L.seed_everything(seed, verbose=False)
    module = module if isinstance(module, nn.Module) else (module or Tiny)()
    data = tiny_data() if data is None else data
    trainer = L.Trainer(callbacks=list(callbacks), **{**SILENT, "max_epochs": 2, **trainer_options})
    # Lightning takes a data module in the place of a loader, too.
    trainer.fit(module, data, ckpt_path=resume_from, weights_only=True if resume_from else None)
    return Run(trainer, module, data)
