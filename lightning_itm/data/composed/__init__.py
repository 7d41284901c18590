"""Sets that are made of other sets."""

from lightning_itm.data.composed.joins import Joinable, concatenate, split

__all__ = ["Joinable", "concatenate", "split"]
