"""A datamodule of tests of composition, for ``lightning-itm validate``."""

from typing import Any

from torch.utils.data import DataLoader

from lightning_itm.data.compositional.dataset import CompositionalDataset
from lightning_itm.data.files_datamodule import ImageTextFilesDataModule


class CompositionalFilesDataModule(ImageTextFilesDataModule):
    r"""Validate or test on SugarCrepe, or on files of its form, in Python or on the command line.

    ::

        lightning-itm validate --model.model_name ViT-B-32 --model.pretrained openai \
            --data lightning_itm.data.CompositionalFilesDataModule --data.val sugarcrepe/data --data.image_root val2017

    It logs ``val/compositional_accuracy`` over all items, and ``val/compositional_<category>`` for each file, in percent.

    Args:
        val: A JSON file, a list of such files, or a folder of them, for ``validate``. See
            :meth:`~lightning_itm.data.CompositionalDataset.from_json`.
        test: What ``test`` reads, in the same form. It logs under ``test/``.
        image_root: The folder of the images. SugarCrepe's are COCO's ``val2017``.
        encoding: The encoding of the files. Default: UTF-8, or UTF-16 if a file begins with its mark.
        model_name: The open_clip model whose transforms and tokenizer are used, such as ``"ViT-B-32"``. Default: those of the
            module that is evaluated (``module.transforms``).
        pretrained: The tag of its weights, if ``model_name`` is given. Some weights need other transforms.
        batch_size: Number of items per batch on each rank.
        num_workers: Number of processes per loader. Default: the usable cores, at most 8.

    Raises:
        MisconfigurationException: if the Trainer asks for a set that was not given, or fits, or if there are no transforms.
    """

    def __init__(
        self,
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        *,
        image_root: str = ".",
        encoding: str | None = None,
        model_name: str | None = None,
        pretrained: str | None = None,
        batch_size: int = 128,
        num_workers: int | None = None,
    ) -> None:
        models = {"model_name": model_name, "pretrained": pretrained}
        files = {"image_root": image_root, "encoding": encoding}
        super().__init__(val=val, test=test, batch_size=batch_size, num_workers=num_workers, **models, **files)  # type: ignore[arg-type]

    def prepare_data(self) -> None:
        """Index nothing: a list of files is no list of shards here."""

    def _read(self, split: str) -> Any:
        options = {**self.transforms, "encoding": self.options["encoding"]}
        return CompositionalDataset.from_json(self.sources[split], self.options["image_root"], **options)

    def _evaluation_loader(self, dataset: Any) -> DataLoader[Any]:
        options = {**self._loader_options(), "collate_fn": dataset.collate}
        return DataLoader(dataset, batch_size=self.eval_batch_size, **options)
