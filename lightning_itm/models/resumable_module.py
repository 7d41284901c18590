"""A LightningModule whose checkpoints hold the random streams, and what the module is made of."""

import inspect
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from lightning_itm.data.datamodule import ImageTextDataModule
from lightning_itm.data.position import mend_broken_epoch
from lightning_itm.losses.contrastive import InfoNCELoss
from lightning_itm.losses.settings import loss_settings, make_loss
from lightning_itm.models.equal_replicas import EqualReplicas
from lightning_itm.randomness import part_random_streams, random_streams, restore_random_streams, stream_key


class ResumableModule(EqualReplicas):
    """Save the random streams in checkpoints, so that a resumed run draws what the uninterrupted one would have drawn.

    A checkpoint also names the class of the module, and the settings of its loss where it is one of ours.
    """

    loss: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self._restored_rng: dict[str, Any] | None = None
        self._restored_step = 0
        self._stream_key: int | None = None  # of this run, the same on all ranks

    def default_loss(self) -> nn.Module:
        """Return the loss of a module that was given none. Override it for another one."""
        return InfoNCELoss()

    def set_loss(self, loss: nn.Module | None) -> None:
        """Take the loss that was given, or the default."""
        self.loss = self.default_loss() if loss is None else loss
        self._default_loss = [self.loss] if loss is None else []  # in a list, where it is no second submodule

    def save_settings(self, settings: dict[str, Any]) -> None:
        """Save arguments of the constructor as hyperparameters, by their values.

        By their names, Lightning would look for them among the arguments that the command line gave to the subclass. Those
        that the subclass sets by itself are not there.
        """
        # The outermost frame: Lightning compares with the arguments that it finds in it, which fails for arrays.
        frame = inspect.currentframe()
        while frame is not None and frame.f_back is not None:
            frame = frame.f_back
        self.save_hyperparameters(settings, frame=frame)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the random streams, the name of the class and the settings of the loss, which Lightning does not."""
        # Called for every checkpoint, also one in the middle of an epoch, when the streams stand where the next step begins.
        checkpoint["rng"] = {**random_streams(), "key": self._stream_key}
        checkpoint["class_path"] = f"{type(self).__module__}.{type(self).__qualname__}"
        # Beside the hyperparameters: as one of them, it would meet the loss that a subclass gives to the base by itself.
        checkpoint["loss"] = loss_settings(self.loss)
        # Only rank 0 writes a file. To gather the streams of the others here would hang where a rank saves after an error.
        if self._stream_key is not None:
            part_random_streams(self.global_rank, self._stream_key, checkpoint["global_step"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the random streams of a resumed run until training starts, and make a loss of ours again.

        ``load_from_checkpoint`` gives the module the loss that was trained, unless it or the subclass has given one.
        """
        is_default = any(self.loss is made for made in self._default_loss)
        if self._trainer is None and is_default and checkpoint.get("loss") is not None:
            self.loss = make_loss(checkpoint["loss"])
        # Not restored here: building the loaders and the sanity check draw numbers after this hook.
        # Only in a fit: a validation of a checkpoint must not change the streams of the program around it.
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self._restored_rng = checkpoint.get("rng")
            self._restored_step = checkpoint["global_step"]
            datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
            if isinstance(datamodule, ImageTextDataModule):  # which finds its place in the middle of an epoch again
                mend_broken_epoch(checkpoint)
            for name in getattr(datamodule, "earlier_names", ()):
                if name in checkpoint:  # Lightning looks for the present name alone
                    datamodule.load_state_dict(checkpoint[name])

    def on_train_start(self) -> None:
        """Continue with the random streams of the checkpoint."""
        # The last hook before the first batch is read, and the first after the sanity check.
        if self._restored_rng is not None:
            restore_random_streams(self._restored_rng)
            self._stream_key = self._restored_rng.get("key")  # None: of an older checkpoint
        self._stream_key = self.trainer.strategy.broadcast(self._stream_key or stream_key())
        if self._restored_rng is not None:
            part_random_streams(self.global_rank, self._stream_key, self._restored_step)
            self._restored_rng = None
