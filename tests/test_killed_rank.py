"""A process that dies takes the others with it, in bounded time, instead of leaving them waiting for ever."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

LONGEST = 120
"""Seconds after which a rank counts as one that waits for ever. Most of it is for the imports on a busy machine."""

SCRIPT = textwrap.dedent(
    """
    import gc, json, os, signal, sys, time
    from datetime import timedelta
    import lightning as L
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.strategies import DDPStrategy
    from lightning_itm import FalseNegativeElimination, FalseNegativeSampler, OfflineHardNegativeMining, QuintupletLoss
    from tests.helpers.tiny import SILENT, Tiny, tiny_data

    class Die(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_rank == 1 and trainer.global_step == 7:
                print("dies", flush=True)
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if how == "raises":
                    raise RuntimeError("out of memory, say")
                if how == "hangs":
                    signal.pause()

    def fork_ranks():
        # Fork two ranks for each line of stdin. A rank returns; this process reports how its ranks ended, until stdin ends.
        for line in sys.stdin:
            how, port = line.split()
            begin, pids = time.monotonic(), []
            for rank in ("0", "1"):
                pids.append(os.fork())
                if pids[-1] == 0:
                    for stream in (1, 2):
                        os.dup2(os.open(f"{how}-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
                    of_rank = {"MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": "0"}
                    os.environ.update(of_rank, TORCHELASTIC_RUN_ID="test")
                    return how
            ended = [os.waitpid(pids[0], 0)[1]]
            seconds = time.monotonic() - begin
            if how == "hangs":
                os.kill(pids[1], signal.SIGKILL)
            ended.append(os.waitpid(pids[1], 0)[1])
            print(json.dumps([seconds, *map(os.waitstatus_to_exitcode, ended)]), flush=True)

    gc.collect()
    gc.freeze()  # else each rank copies all that was imported when it ends, which takes longer than its training
    how = fork_ranks()
    if how is not None:
        callbacks = [Die(), OfflineHardNegativeMining(texts_per_image=6, images_per_text=4, inject="embeddings")]
        callbacks.append(FalseNegativeElimination(16, start_epoch=0, sampler=FalseNegativeSampler(min_count=4)))
        trainer = L.Trainer(
            **SILENT, devices=2, max_epochs=4, callbacks=callbacks,
            strategy=DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=8)),
        )
        trainer.fit(Tiny(QuintupletLoss(), warmup_steps=0), datamodule=tiny_data(batch_size=4))
        print("finished", flush=True)
    """
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, request):
    """A process that has imported what ranks need, once, and forks them. Each ends as a script of its own does."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "train.py").write_text(SCRIPT)
    environment = {
        **os.environ,
        "PYTHONPATH": str(request.config.rootpath),
        "MASTER_ADDR": "127.0.0.1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    start = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, "train.py"], env=environment, cwd=folder, **start) as process:
        yield process, folder
        process.stdin.close()


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.slow
@pytest.mark.forks
@pytest.mark.parametrize("how", ["killed", "raises", "hangs"])
def test_the_other_rank_ends_with_an_error(how, ranks):
    """Each rank has the environment that a cluster gives; the one that lives must end by itself, and say why."""
    process, folder = ranks
    process.stdin.write(f"{how} {free_port()}\n")
    process.stdin.flush()
    watchdog = threading.Timer(LONGEST, os.killpg, (process.pid, signal.SIGKILL))  # the ranks are in its group
    watchdog.start()
    answer = process.stdout.readline()
    watchdog.cancel()
    said, heard = (Path(folder, f"{how}-{rank}.txt").read_text() for rank in (0, 1))
    assert answer, said
    seconds, *codes = json.loads(answer)
    assert codes[0] != 0, said
    assert "finished" not in said
    assert "rror" in said
    print(f"{how}: ended after {seconds:.0f} s")
    assert "dies" in heard
    assert codes[1] == {"killed": -signal.SIGKILL, "raises": 1, "hangs": -signal.SIGKILL}[how]
