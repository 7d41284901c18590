"""What others load: a model in the format of its library, and the hub."""

from lightning_itm.export.checkpoint import load_module
from lightning_itm.export.exportable import Exportable
from lightning_itm.export.onnx_towers import export_onnx
from lightning_itm.export.open_clip_folder import save_open_clip

__all__ = ["Exportable", "export_onnx", "load_module", "save_open_clip"]
