"""Where a run is: which epoch is read next, and how many of its batches are done.

Lightning saves neither the position in the data nor the state of a loader's random numbers. So the order of an epoch is a
function of (seed, epoch), the datamodule's state says where the run stopped, and both loaders, ``ResumableLoader`` and
``StreamLoader``, ask for the position whenever an iterator is made. Three numbers are involved:

* ``epoch``: the epoch that the next batch belongs to;
* ``batch``: how many batches of this epoch are done, on each rank;
* ``total``: how many batches were ever trained on. It tells whether training has moved on since the checkpoint was loaded:
  until then the position is the checkpoint's, afterwards Lightning's own counts say it.
"""

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException


class Position:
    """Where a run is; it is saved with the datamodule's state, and restored from it."""

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    def forget(self) -> None:
        """Forget where an earlier run was resumed."""
        self._restored = None

    def next_batch(self, trainer: Any) -> tuple[int, int]:
        """Return the epoch of the iterator that is about to be made, and how many of its batches are done."""
        fit_loop, restored = trainer.fit_loop, self._restored
        # Until a batch is trained on; at first, Lightning makes an iterator before it has restored its own counts.
        if restored is not None and fit_loop.epoch_loop.batch_progress.total.processed <= restored["total"]:
            return restored["epoch"], restored["batch"]
        return fit_loop.epoch_progress.current.processed, 0

    def state_dict(self, trainer: Any, settings: dict[str, Any]) -> dict[str, Any]:
        """Return where training is, and what the order of its batches depends on.

        Args:
            trainer: Whose progress is asked.
            settings: ``batch_size``, ``num_workers`` and ``stream``, the settings of a stream or None.
        """
        epoch, batches = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop.batch_progress
        num_done, num_batches = batches.current.processed, trainer.num_training_batches
        is_between_epochs = epoch.started == epoch.processed
        if 0 < num_done < num_batches:
            # An epoch that `max_steps` broke off counts as processed, and goes on all the same.
            position = epoch.processed - is_between_epochs, num_done
        else:
            position = epoch.processed + (not is_between_epochs and num_done >= num_batches), 0
        return {
            "epoch": int(position[0]),
            "batch": int(position[1]),
            "total": batches.total.processed,
            "world_size": trainer.world_size,
            **settings,
        }

    def load_state_dict(self, state: dict[str, Any], trainer: Any, settings: dict[str, Any]) -> None:
        """Start where the checkpoint was written.

        Args:
            state: What :meth:`state_dict` returned.
            trainer: Who resumes.
            settings: As for :meth:`state_dict`, of now.

        Raises:
            MisconfigurationException: The checkpoint is of the middle of an epoch, and batches are others now.
        """
        then = state["batch_size"], state["world_size"]
        now = settings["batch_size"], trainer.world_size
        if state["batch"] > 0 and then != now:
            raise MisconfigurationException(
                f"Expected `batch_size` {then[0]} on {then[1]} process(es), as when the run stopped after batch "
                f"{state['batch']} of epoch {state['epoch']}, got {now[0]} on {now[1]}: pairs would be left out or "
                "come twice. Resume with the same, or from the end of an epoch."
            )
        if state["batch"] > 0 and state.get("stream") is not None:
            _check_stream(state, settings)
        self._restored = dict(state)


def _check_stream(state: dict[str, Any], settings: dict[str, Any]) -> None:
    """Compare what the order of a stream depends on with the checkpoint of the middle of an epoch."""
    then = {**state["stream"], "num_workers": max(1, state["num_workers"])}
    now = {**(settings["stream"] or {}), "num_workers": max(1, settings["num_workers"])}
    other = [name for name, value in then.items() if now.get(name) != value]
    if other:
        raise MisconfigurationException(
            f"Expected a stream with the `{other[0]}` {then[other[0]]}, as when the run stopped after batch "
            f"{state['batch']} of epoch {state['epoch']}, got {now.get(other[0])}: other pairs would follow. "
            "Resume with the same, or from the end of an epoch."
        )
