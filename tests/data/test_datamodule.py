import lightning as L
import torch
from torch.utils.data import Subset

from lightning_itm import ImageTextDataModule
from tests.helpers.resume import NUM_PAIRS, Watch
from tests.helpers.tiny import NUM_IMAGES, PLAIN, SILENT, Tiny, tiny_data, tiny_pairs


class TestOtherDatasets:
    def test_a_subset_is_augmented_anew_each_epoch_and_not_in_evaluation(self):
        half = Subset(tiny_pairs(), range(0, NUM_PAIRS, 2))
        data = ImageTextDataModule(half, half, batch_size=NUM_IMAGES, num_workers=0)
        watch = Watch()
        L.Trainer(callbacks=[watch], max_epochs=2, **SILENT).fit(Tiny(warmup_steps=0), datamodule=data)
        assert watch.seen[0][3] != watch.seen[1][3]
        batch = next(iter(data.val_dataloader()))
        assert torch.equal(batch["image"][0], PLAIN(tiny_pairs().images[0]))

    def test_a_loader_without_a_trainer_is_a_plain_one(self):
        loader = tiny_data().train_dataloader()
        orders = [[pair for batch in loader for pair in batch["text_id"].tolist()] for _ in range(2)]
        assert orders[0] != orders[1]
        assert sorted(orders[0]) == list(range(NUM_PAIRS))
