import lightning as L
import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from lightning_itm import (
    EmbeddingWriter,
    FalseNegativeElimination,
    GradientNormMonitor,
    OfflineHardNegativeMining,
    TripletLoss,
)
from lightning_itm.callbacks._strategies import check_reachable_weights, check_whole_weights
from tests.helpers.sharded import Split, in_two_processes, needs_fsdp2, strategy
from tests.helpers.tiny import SILENT, Tiny, tiny_data


def trainer_with(strategy):
    trainer = L.Trainer(**SILENT)
    trainer._accelerator_connector.strategy = (
        strategy  # by themselves they start on CUDA alone, or in a launcher's processes
    )
    return trainer


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_the_memory_bank_refuses_sharded_weights(strategy):
    message = f"whose ranks hold all weights, got {strategy.__name__}: the slow copy is of the whole module"
    with pytest.raises(MisconfigurationException, match=message):
        FalseNegativeElimination().setup(trainer_with(strategy()), Tiny(), "fit")


@pytest.mark.parametrize("callback", [OfflineHardNegativeMining, GradientNormMonitor])
def test_the_others_name_the_way_out(callback):
    message = r"or FSDP2, got FSDPStrategy: .* Use 'ddp'\. If .*`ModelParallelStrategy\(data_parallel_size=1, tensor"
    with pytest.raises(MisconfigurationException, match=message):
        callback().setup(trainer_with(FSDPStrategy()), Tiny(TripletLoss()), "fit")


def test_whole_weights_pass():
    check_whole_weights(L.Trainer(**SILENT), "the slow copy is of the whole module")
    check_reachable_weights(L.Trainer(**SILENT), "mining encodes with the whole module")


def _fit_tensor_parallel(rank):
    for callbacks in ([OfflineHardNegativeMining()], [GradientNormMonitor()], []):
        parallel = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
        trainer = L.Trainer(devices=2, strategy=parallel, callbacks=callbacks, max_epochs=1, **SILENT)
        message = r"tensor_parallel_size=1\), got 2: pairs .* alone: data_parallel_size=2, tensor_parallel_size=1"
        with pytest.raises(MisconfigurationException, match=message):
            trainer.fit(Split(TripletLoss()), datamodule=tiny_data())


@needs_fsdp2
@pytest.mark.forks
def test_tensor_parallel_ranks_are_refused():
    in_two_processes(_fit_tensor_parallel)


def _predict(rank):
    for size in (6, 11):  # rank 0 has 12 images, and rank 1 has 11
        data, options = (
            tiny_data(eval_batch_size=size),
            {**SILENT, "callbacks": [EmbeddingWriter(f"embeddings-{size}")]},
        )
        trainer = L.Trainer(devices=2, strategy=strategy("fsdp2"), **options)
        if size == 6:
            trainer.predict(Split(), datamodule=data, return_predictions=False)
        else:
            with pytest.raises(MisconfigurationException, match=r"got \[\[2, 1\], \[3, 3\]\] .* another `eval_batch"):
                trainer.predict(Split(), datamodule=data, return_predictions=False)


@needs_fsdp2
@pytest.mark.forks
def test_ranks_that_predict_unequal_batches_are_refused():
    in_two_processes(_predict)
