"""Parts for runs without a Trainer: in a plain PyTorch loop, with Fabric, or with a model of another library.

Losses, metrics and the memory bank need no Trainer anyway: ``examples/plain_pytorch.py`` has them in one loop.
"""

from lightning_itm.standalone.mine import mine

__all__ = ["mine"]
