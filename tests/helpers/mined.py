"""What a fit mined, kept for a comparison with another fit."""

import torch
from lightning.pytorch.callbacks import Callback

from lightning_itm import OfflineHardNegativeMining


class SaveMined(Callback):
    """Save the tables of all epochs and the weights of each rank at the end."""

    def __init__(self, name):
        self.name, self.tables = name, []

    def on_train_epoch_start(self, trainer, pl_module):
        table = next(part for part in trainer.callbacks if isinstance(part, OfflineHardNegativeMining)).table
        self.tables.append((table.texts.clone(), table.images.clone()))

    def on_train_end(self, trainer, pl_module):
        weights = {name: value.clone() for name, value in pl_module.state_dict().items()}
        torch.save({"tables": self.tables, "weights": weights}, f"{self.name}-{trainer.global_rank}.pt")
