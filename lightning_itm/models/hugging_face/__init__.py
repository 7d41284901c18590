"""Models of ``transformers``: read, trained as a DualEncoder, and written in the format of Hugging Face."""

from lightning_itm.models.hugging_face.hf_dual_encoder import HFDualEncoder

__all__ = ["HFDualEncoder"]
