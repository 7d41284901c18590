"""What a module around a model of open_clip needs to write it for open_clip."""

from collections.abc import Mapping
from copy import deepcopy
from os import PathLike
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor, nn

from lightning_itm.export.exportable import Exportable, write_card
from lightning_itm.export.open_clip_folder import describe_model, save_open_clip
from lightning_itm.export.scale import trained_scale


class ExportsToOpenCLIP(Exportable):
    """Write ``model``, a model of open_clip, with the scale that ``loss`` has trained."""

    library_name = "open_clip"
    model: Any
    loss: nn.Module
    transforms: dict[str, Any]
    hparams: Any
    merged: Any  # a method: the model with its adapters merged
    exported_shapes: dict[str, torch.Size]
    """The weights that open_clip makes of the configuration. Others could not be loaded from the folder."""

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write the trained model to a folder that ``open_clip.create_model("local-dir:FOLDER")`` loads.

        It holds the weights with the trained temperature and bias (``open_clip_model.safetensors``), how the model is built
        and how its images are prepared (``open_clip_config.json``), and a tokenizer of Hugging Face. The file of the weights
        is also what ``open_clip.create_model(model_name, pretrained=FILE)`` takes.

        In a fit in which Lightning averages weights (``WeightAveraging``), this method writes those that are trained. After
        the fit, and for its checkpoints, the averaged ones are written.

        Args:
            folder: A folder that is new or empty. In a run on several devices, one process writes.

        Raises:
            FileExistsError: if there is anything in the folder.
            ValueError: if the weights are not those that open_clip makes, such as with adapters among them, if this process
                has a part of them, or if the tokenizer is not that of the model.

        Example:
            >>> import open_clip
            >>> from lightning_itm import OpenCLIPDualEncoder
            >>> model = OpenCLIPDualEncoder("ViT-B-32")  # doctest: +SKIP
            >>> model.save_pretrained("exported")  # doctest: +SKIP
            >>> theirs, _, preprocess = open_clip.create_model_and_transforms("local-dir:exported")  # doctest: +SKIP
        """
        self._save_open_clip(folder, self.hparams["config"])

    def save_for_hub(self, folder: str | PathLike[str], repo_id: str) -> None:
        """Write what ``push_to_hub`` uploads: the folder, whose tokenizer is found in the repository, and a model card."""
        config = deepcopy(self.hparams["config"])
        if config["model_cfg"]["text_cfg"].get("hf_tokenizer_name"):
            config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = repo_id
        self._save_open_clip(folder, config)
        write_card(folder, self.model_card(repo_id))

    def example_inputs(self) -> tuple[Tensor, Tensor]:
        """Return two images and two texts as the towers take them, for :func:`~lightning_itm.export.export_onnx`."""
        size = self.model.visual.preprocess_cfg["size"]
        height, width = (size, size) if isinstance(size, int) else size
        return torch.zeros(2, 3, height, width), self.transforms["tokenizer"](["a", "b"])

    def model_card(self, repo_id: str) -> str:
        """Return the text of the model card. Override it to say what the model was trained on, and its license."""
        return (
            "---\nlibrary_name: open_clip\npipeline_tag: zero-shot-image-classification\ntags:\n- clip\n---\n\n"
            f"# {repo_id.split('/')[-1]}\n\n{self.hparams['model_name']}, fine-tuned with lightning_itm.\n\n"
            "```python\nimport open_clip\n\n"
            f'model, _, preprocess = open_clip.create_model_and_transforms("hf-hub:{repo_id}")\n'
            f'tokenizer = open_clip.get_tokenizer("hf-hub:{repo_id}")\n```\n'
        )

    @classmethod
    def options_for_export(cls, hyper_parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments with which a checkpoint is loaded: without ``pretrained``, and not compiled."""
        config = hyper_parameters.get("config")
        if config is None:  # an older checkpoint, which does not say how images are prepared for its weights
            config = describe_model(hyper_parameters["model_name"], hyper_parameters.get("pretrained"))
        return {"config": config, "compile": False}

    @rank_zero_only
    def _save_open_clip(self, folder: str | PathLike[str], config: Mapping[str, Any]) -> None:
        # `torch.compile(module)` puts its name between those of the weights.
        merged: Any = self.merged() if self.hparams.get("lora") is not None else self.model
        weights = {name.replace("_orig_mod.", ""): value for name, value in merged.state_dict().items()}
        self._check_weights(weights)
        bias = trained_scale(self.loss).get("logit_bias")
        if bias is not None and "logit_bias" not in weights:
            weights["logit_bias"] = bias
            config = {**config, "model_cfg": {**config["model_cfg"], "init_logit_bias": float(bias)}}
            name = self.hparams["model_name"]
            rank_zero_warn(
                f"{type(self.loss).__name__} has trained a `logit_bias`, which open_clip's {name!r} does not have. It is "
                f"written, too. So load the folder as 'local-dir:…' and not as `create_model({name!r}, pretrained=FILE)`."
            )
        save_open_clip(folder, weights, config, self.transforms["tokenizer"])

    def _check_weights(self, weights: Mapping[str, Tensor]) -> None:
        for name, value in weights.items():
            if hasattr(value, "device_mesh") or value.is_meta:
                raise ValueError(
                    f"Expected all weights on this process, got a part of {name!r}: the strategy shards them. Save a "
                    "checkpoint with whole weights, such as FSDPStrategy(state_dict_type='full') writes, and export that."
                )
        ours, theirs = shapes_of(weights), self.exported_shapes
        odd = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if odd:
            raise ValueError(
                f"Expected the weights that open_clip makes for {self.hparams['model_name']!r}, got {len(odd)} others, such "
                f"as {odd[0]!r}: {_shape(ours, odd[0])}, not {_shape(theirs, odd[0])}. Merge adapters into the weights first, "
                "and do not replace parts of `model.model`."
            )


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Return the shape of each weight."""
    return {name: value.shape for name, value in weights.items()}


def _shape(shapes: Mapping[str, torch.Size], name: str) -> str:
    return str(tuple(shapes[name])) if name in shapes else "nothing"
