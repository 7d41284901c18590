from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_itm import DualEncoder, OpenCLIPDualEncoder
from lightning_itm.cli import main
from lightning_itm.export import export_onnx
from tests.helpers.open_clip_models import CONFIGS, TIMM, register
from tests.helpers.pictures import cut_outs
from tests.helpers.tiny import Tiny

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

WARNINGS = [
    "ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning",
    "ignore:The feature will be removed:DeprecationWarning",
    "ignore:.*:torch.jit.TracerWarning",
    "ignore:Exporting aten.*index operator",  # where an index is negative, which none is here
    "ignore:# The axis name. batch will not be used",  # both inputs of a dict have the same one
]
pytestmark = [pytest.mark.filterwarnings(warning) for warning in WARNINGS]


@pytest.fixture(scope="module", autouse=True)
def _registered(tmp_path_factory):
    register(CONFIGS | TIMM, tmp_path_factory.mktemp("configs"))


class Plain(DualEncoder):
    """Whose texts are a dict, as those of transformers are."""

    def __init__(self):
        super().__init__()
        self.image_encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
        self.words, self.text_encoder = nn.Embedding(9, 6), nn.Linear(6, 5)

    def example_inputs(self):
        return torch.zeros(2, 3, 8, 8), {"ids": torch.zeros(2, 4).long(), "mask": torch.ones(2, 4)}

    def encode_image(self, image):
        return 7 * self.image_encoder(image)

    def encode_text(self, text):
        mask = text["mask"].unsqueeze(-1)
        return self.text_encoder((self.words(text["ids"]) * mask).sum(1) / mask.sum(1))


def run(path, inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run([f"{path.stem}_embeddings"], {name: value.numpy() for name, value in inputs.items()})[0]


def check_same(model, folder, batches):
    """In batches of other sizes than that of the export, and of norm 1."""
    for kind, inputs in batches:
        found = run(folder / f"{kind}.onnx", inputs)
        value = inputs.get(kind, inputs)
        with torch.no_grad():
            expected = nn.functional.normalize(getattr(model.eval(), f"encode_{kind}")(value), dim=-1)
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
        assert found.dtype == np.float32


@pytest.mark.parametrize(
    ("name", "dynamo"),
    [
        pytest.param("tiny-vit", None, marks=pytest.mark.slow),
        ("tiny-vit", False),
        ("tiny-rn", False),
        pytest.param("tiny-timm", None, marks=pytest.mark.slow),
    ],
)
def test_towers_of_open_clip(name, dynamo, tmp_path):
    model = OpenCLIPDualEncoder(name)
    before = deepcopy(model.state_dict())
    export_onnx(model, tmp_path / "onnx", dynamo=dynamo)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == ["image.onnx", "text.onnx"]
    pictures = torch.stack([model.transforms["eval_transform"](picture) for picture in cut_outs(5, 80)])
    tokens = model.transforms["tokenizer"](["a cat", "a longer text, of more words", "a", "b", "c"])
    batches = [(kind, {kind: value[:n]}) for kind, value in (("image", pictures), ("text", tokens)) for n in (1, 5)]
    check_same(model, tmp_path / "onnx", batches)


@pytest.mark.parametrize("dynamo", [None, False])
def test_a_module_of_ones_own(dynamo, tmp_path):
    model = Plain()
    export_onnx(model, tmp_path / "onnx", *model.example_inputs(), dynamo=dynamo)
    mask = torch.tensor([[1, 1, 0, 0.0], [1, 0, 0, 0], [1, 1, 1, 1]])
    texts = {"ids": torch.randint(0, 9, (3, 4)), "mask": mask}
    check_same(model, tmp_path / "onnx", [("image", {"image": torch.randn(7, 3, 8, 8)}), ("text", texts)])


def test_the_command_for_a_module_of_ones_own(save, tmp_path, capsys):
    """Which has no format of its own: the towers are all there is."""
    model = Plain()
    main(["export", "--ckpt_path", str(save(model)), "--output", "out", "--onnx", "true"])
    assert capsys.readouterr().out == "out: onnx\n"
    check_same(model, tmp_path / "out" / "onnx", [("image", {"image": torch.randn(3, 3, 8, 8)})])


@pytest.mark.slow
def test_the_command(save, tmp_path, capsys):
    model = OpenCLIPDualEncoder("tiny-vit")
    main(["export", "--ckpt_path", str(save(model)), "--output", "out", "--onnx", "true"])
    said = capsys.readouterr().out
    assert said == "out: onnx, open_clip_config.json, open_clip_model.safetensors\n"
    check_same(model, tmp_path / "out" / "onnx", [("image", {"image": torch.randn(3, 3, 32, 32)})])


@pytest.mark.parametrize(
    ("image", "text", "error", "message"),
    [
        (torch.zeros(2, 3), None, ValueError, r"an example for each tower, got none for `text`. Pass `text`, two rows"),
        (torch.zeros(1, 3), torch.zeros(2, 3), ValueError, r"at least two rows .* `image`, got the shape \(1, 3\)"),
        (torch.zeros(2, 3), {"ids": [1, 2]}, TypeError, r"`text` to be .* dict of tensors, got list under 'ids'"),
        ([1, 2], torch.zeros(2, 3), TypeError, r"`image` to be a tensor or a dict of tensors, got list\."),
    ],
)
def test_examples_that_are_none(image, text, error, message, tmp_path):
    with pytest.raises(error, match=message):
        export_onnx(Tiny(), tmp_path / "onnx", image, text)
