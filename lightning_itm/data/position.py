"""Where a run is: which epoch is read next, and how many of its batches are done. This page explains the epoch.

**Why draws are functions.** Lightning saves neither the position in the data nor the random state of a loader. So nothing
here depends on a stream of random numbers that a stopped run would lose. The order of an epoch is a function of
(seed, epoch), and the augmentation of a pair is one of (seed, epoch, id). The same numbers come with any number of workers,
in whichever process, and after a resume. What is left to know is the position: the epoch, and how many batches are done.

**Which hooks run when.** With two batches per epoch, a fit that starts anew runs::

    setup                      the datamodule forgets where an earlier run was resumed
    load_state_dict            only with `ckpt_path`
    on_fit_start
    on_sanity_check_start, on_validation_*, on_sanity_check_end
    (an iterator is made)      for epoch 0
    on_train_start
    on_train_epoch_start
    on_train_batch_start, on_train_batch_end     twice
    on_validation_*
    on_train_epoch_end
    on_train_epoch_start       of epoch 1
    (an iterator is made)      for epoch 1, and so on

Two surprises. Workers fetch the first batches as soon as the iterator is made, which for the first epoch is before
`on_train_epoch_start`. If `configure_optimizers` asks for `trainer.estimated_stepping_batches`, it is even made before
`on_fit_start`, when Lightning has not restored its own counts. So no hook is early enough to tell a loader its epoch. Both
loaders, ``ResumableLoader`` and ``StreamLoader``, ask :meth:`Position.next_batch` when their iterator is made. Strategies that
shard the weights restore everything after `on_fit_start`. There, both ask when the first batch is asked for.

**What a resume skips.** A checkpoint of

- the end of an epoch skips nothing. `on_train_epoch_start` of the next epoch comes first.
- the middle of an epoch skips `on_train_epoch_start` of that epoch. The rest of the epoch follows.
- the last batch of an epoch (saved in `on_train_batch_end`) skips the validation and `on_train_epoch_end` of that epoch.
  Without :func:`mend_broken_epoch`, it skips `on_train_epoch_start` of the next one, too. Lightning then never counts that
  start, and the middle of each later epoch looks like one that was broken off.

So what happens once per epoch must ask for `trainer.current_epoch`, and not wait for a hook.

**What a stop within an epoch leaves behind.** Where `max_steps`, `max_time` or `trainer.should_stop` ends a run in the middle
of an epoch, Lightning runs `on_train_epoch_end` and counts the epoch as processed. Resumed from such a checkpoint, it would
give the rest of this epoch the next number, and leave the order of that next epoch out. So :func:`mend_broken_epoch` takes the
count back before Lightning restores it. The run then goes on as one that was killed at that batch.

**What the state holds.** Three numbers, on each rank the same:

- ``epoch``: the epoch that the next batch belongs to.
- ``batch``: how many batches of this epoch are done.
- ``total``: how many batches were ever trained on. It tells whether training has moved on since the checkpoint was loaded.
  Until then the position is the checkpoint's. Afterwards Lightning's own counts tell it.

Beside them stand the settings that the batches of an epoch depend on: ``batch_size``, ``world_size``, ``num_workers``,
``seed``, the identity of the training set and the settings of a stream. In the middle of an epoch they must be what they were.
"""

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_itm.identity import set_difference


class Position:
    """Answer where a run is, for both loaders. It is saved with the datamodule's state, and restored from it."""

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    def forget(self) -> None:
        """Forget where an earlier run was resumed."""
        self._restored = None

    def next_batch(self, trainer: Any) -> tuple[int, int]:
        """Return the epoch of the iterator that is about to be made, and how many of its batches are done.

        Args:
            trainer: The Trainer that runs, or None where someone looks at the batches without one. Then it is the start of
                epoch 0. With its ``overfit_batches``, each epoch has the batches of epoch 0.
        """
        if trainer is None:
            return 0, 0
        fit_loop, restored = trainer.fit_loop, self._restored
        epoch, num_done = fit_loop.epoch_progress.current.processed, 0
        # Until a batch is trained on, the checkpoint knows best: at first, Lightning has not restored its own counts.
        if restored is not None and fit_loop.epoch_loop.batch_progress.total.processed <= restored["total"]:
            epoch, num_done = restored["epoch"], restored["batch"]
        return (0 if trainer.overfit_batches > 0 else epoch), num_done

    def state_dict(self, trainer: Any, settings: dict[str, Any]) -> dict[str, Any]:
        """Return where training is, and what the order of its batches depends on.

        Args:
            trainer: The Trainer whose progress is saved.
            settings: What the order depends on beside ranks: ``batch_size``, ``seed``, ``set``, which says which pairs there
                are, ``num_workers``, ``stream``, which is None where the training set is no stream, and ``is_composed``,
                whether a callback composes the order.
        """
        epoch, batches = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop.batch_progress
        num_done, is_over = batches.current.processed, batches.is_last_batch
        is_between_epochs = epoch.started == epoch.processed
        # A checkpoint is written in `on_train_batch_end`, after validation, or in `on_train_epoch_end`, where Lightning has
        # already counted the epoch as processed.
        if num_done > 0 and not is_over:
            # An epoch that was broken off counts as processed, and goes on all the same: `mend_broken_epoch`.
            position = epoch.processed - is_between_epochs, num_done
        else:
            position = epoch.processed + (not is_between_epochs and is_over), 0
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
            trainer: The Trainer that resumes.
            settings: The settings of this run, with the same names as in :meth:`state_dict`.

        Raises:
            MisconfigurationException: if the checkpoint was written in the middle of an epoch, and the rest of that epoch
                would have other batches now.
        """
        then = state["batch_size"], state["world_size"]
        now = settings["batch_size"], trainer.world_size
        # At the end of an epoch all may change: no pair is left out, and none comes twice.
        if state["batch"] > 0 and then != now:
            raise MisconfigurationException(
                f"Expected `batch_size` {then[0]} on {then[1]} process(es), as when the run stopped after batch "
                f"{state['batch']} of epoch {state['epoch']}, got {now[0]} on {now[1]}: pairs would be left out or "
                "come twice. Resume with the same, or from the end of an epoch."
            )
        if state["batch"] > 0 and state.get("is_composed", False) != settings["is_composed"]:
            orders = {True: "composed by OfflineHardNegativeMining(inject='batches')", False: "random"}
            raise MisconfigurationException(
                f"Expected an order of pairs that is {orders[not settings['is_composed']]}, as when the run stopped after "
                f"batch {state['batch']} of epoch {state['epoch']}, got one that is {orders[settings['is_composed']]}: pairs "
                "would be left out or come twice. Resume with the same callbacks, or from the end of an epoch."
            )
        if state["batch"] > 0:
            _check_set(state, settings)
        if state["batch"] > 0 and state.get("stream") is not None:
            _check_stream(state, settings)
        self._restored = dict(state)


def _check_set(state: dict[str, Any], settings: dict[str, Any]) -> None:
    """Compare seed and training set with the checkpoint of the middle of an epoch. Older checkpoints have neither."""
    place = f"as when the run stopped after batch {state['batch']} of epoch {state['epoch']}"
    way_out = "pairs would be left out or come twice. Resume with the same, or from the end of an epoch."
    if state.get("seed", settings["seed"]) != settings["seed"]:
        raise MisconfigurationException(f"Expected `seed` {state['seed']}, {place}, got {settings['seed']}: {way_out}")
    difference = set_difference(state.get("set", {}), settings["set"])
    if difference is not None:
        raise MisconfigurationException(
            f"Expected the training set to be the same, {place}, got {difference}: {way_out}"
        )


def mend_broken_epoch(checkpoint: dict[str, Any]) -> None:
    """Let a resumed run finish the epoch that `max_steps`, `max_time` or `trainer.should_stop` broke off.

    Args:
        checkpoint: A checkpoint of Lightning, before its counts are restored. Its epoch is no longer counted as processed. One
            of the last batch of an epoch is taken to the end of that epoch. Others are left as they are.
    """
    progress = _progress(checkpoint)
    if progress is None:
        return
    epoch, batches = progress["epoch_progress"], progress["epoch_loop.batch_progress"]
    is_broken_off = batches["current"]["processed"] > 0 and not batches["is_last_batch"]
    # Written in `on_train_batch_end` of the last batch, before Lightning counts the batch as completed.
    is_at_last_batch = batches["is_last_batch"] and batches["current"]["completed"] < batches["current"]["processed"]
    if epoch["current"]["processed"] < epoch["current"]["started"] and not is_at_last_batch:
        return
    for count in (epoch["total"], epoch["current"]):
        count["processed"] = count["completed"] = count["started"] - is_broken_off
    if not is_broken_off:
        # With `max_steps`, Lightning goes on in the epoch that is over, finds no batch left, and counts one epoch too many.
        batches["total"]["completed"] = batches["total"]["processed"]
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False


def epoch_to_resume(checkpoint: dict[str, Any]) -> int:
    """Return the epoch of the batch that a run reads first after it is resumed.

    Args:
        checkpoint: A checkpoint of Lightning, after :func:`mend_broken_epoch` where that is called.
    """
    progress = _progress(checkpoint)
    if progress is None:
        return int(checkpoint.get("epoch", 0))
    epoch, batches = progress["epoch_progress"]["current"], progress["epoch_loop.batch_progress"]
    is_within = epoch["started"] > epoch["processed"]
    # A checkpoint of the last batch of an epoch: Lightning has not counted the epoch yet, but nothing of it is left.
    return int(epoch["processed"] + (is_within and batches["is_last_batch"]))


def _progress(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    progress: dict[str, Any] | None = checkpoint.get("loops", {}).get("fit_loop")
    return progress


def _check_stream(state: dict[str, Any], settings: dict[str, Any]) -> None:
    """Compare what the order of a stream depends on with the checkpoint of the middle of an epoch."""
    # Each worker reads a part of its own. The main process reads as one worker would, so 0 counts as 1.
    then = {**state["stream"], "num_workers": max(1, state["num_workers"])}
    now = {**(settings["stream"] or {}), "num_workers": max(1, settings["num_workers"])}
    other = [name for name, value in then.items() if now.get(name) != value]
    if other:
        raise MisconfigurationException(
            f"Expected a stream with the `{other[0]}` {then[other[0]]}, as when the run stopped after batch "
            f"{state['batch']} of epoch {state['epoch']}, got {now.get(other[0])}: other pairs would follow. "
            "Resume with the same, or from the end of an epoch."
        )
