"""A process that dies takes the others with it, in bounded time, instead of leaving them waiting for ever."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

SCRIPT = textwrap.dedent(
    """
    import os, signal, sys
    from datetime import timedelta
    import lightning as L
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.strategies import DDPStrategy
    from lightning_itm import FalseNegativeElimination, OfflineHardNegativeMining, QuintupletLoss
    from tests.helpers.tiny import SILENT, Tiny, tiny_data

    class Die(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_rank == 1 and trainer.global_step == 7:
                how = sys.argv[1]
                print("dies", flush=True)
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if how == "raises":
                    raise RuntimeError("out of memory, say")
                if how == "hangs":
                    signal.pause()

    callbacks = [Die(), OfflineHardNegativeMining(texts_per_image=6, images_per_text=4, inject="embeddings")]
    callbacks.append(FalseNegativeElimination(16, min_count=4, start_epoch=0))
    trainer = L.Trainer(
        **SILENT, devices=2, max_epochs=4, callbacks=callbacks,
        strategy=DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=20)),
    )
    trainer.fit(Tiny(QuintupletLoss(), warmup_steps=0), datamodule=tiny_data(batch_size=4))
    print("finished", flush=True)
    """
)


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "raises", "hangs"])
def test_the_other_rank_ends_with_an_error(how, tmp_path, request):
    """Each rank is started as a cluster would; the one that lives must end by itself, and say why."""
    (tmp_path / "train.py").write_text(SCRIPT)
    environment = {
        **os.environ,
        "PYTHONPATH": str(request.config.rootpath),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    start = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, "train.py", how]
    ranks = []
    for rank in ("0", "1"):
        of_rank = {**environment, "RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
        ranks.append(subprocess.Popen(command, env=of_rank, cwd=tmp_path, **start))
    try:
        begin = time.monotonic()
        said, _ = ranks[0].communicate(timeout=120)  # the whole of it, with two imports of torch
        assert ranks[0].returncode not in (0, None), said
        assert "finished" not in said
        assert "rror" in said
        print(f"{how}: ended after {time.monotonic() - begin:.0f} s")
        if how != "hangs":
            heard, _ = ranks[1].communicate(timeout=60)
            assert "dies" in heard
            assert ranks[1].returncode == (-signal.SIGKILL if how == "killed" else 1)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
            rank.stdout.close()
