"""Tests of composition: each image comes with a right caption and with a wrong one that is nearly the same."""

from lightning_itm.data.compositional.datamodule import CompositionalFilesDataModule
from lightning_itm.data.compositional.dataset import CompositionalDataset

__all__ = ["CompositionalDataset", "CompositionalFilesDataModule"]
