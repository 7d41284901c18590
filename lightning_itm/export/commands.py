"""What ``lightning-itm export`` does. ``--help`` shows this docstring."""

from pathlib import Path

from lightning_itm.export.checkpoint import load_module
from lightning_itm.export.exportable import Exportable
from lightning_itm.export.onnx_towers import export_onnx


def export(
    ckpt_path: str, output: str, *, model: str | None = None, onnx: bool = False, weights_only: bool = True
) -> None:
    """Write the model of a checkpoint so that its library loads it: for open_clip, by "local-dir:FOLDER".

    Neither the pretrained weights nor the data of the run are read again.

    Args:
        ckpt_path: The checkpoint, a file of Lightning's Trainer.
        output: The folder for the model. It is made, and must be empty.
        model: The class of the module, such as own.Own for a class in own.py. By default, the class of lightning_itm that the
            checkpoint names.
        onnx: Also write both towers as ONNX, into the folder "onnx" of the output. Their embeddings have the norm 1. A module
            of one's own needs a method `example_inputs`, and gets these files alone.
        weights_only: Load tensors and plain numbers only. Turn it off only for a file that you trust.
    """
    module = load_module(ckpt_path, model, weights_only=weights_only)
    # A module without a format of its own can be written as ONNX; without `--onnx` it raises the error that says so.
    if not onnx or type(module).save_pretrained is not Exportable.save_pretrained:
        module.save_pretrained(output)
    if onnx:
        export_onnx(module, Path(output, "onnx"))
    print(f"{output}: {', '.join(sorted(path.name for path in Path(output).iterdir()))}")
