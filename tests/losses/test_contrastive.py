import numpy as np
import open_clip
import pytest
import torch

from lightning_itm import InfoNCELoss, SigmoidLoss
from tests.helpers.pairs import make_pairs


def test_info_nce_equals_open_clip():
    _, pairs = make_pairs(16)
    expected = open_clip.ClipLoss()(pairs.image_embeddings, pairs.text_embeddings, torch.tensor(10.0))
    torch.testing.assert_close(InfoNCELoss(np.log(10)).double()(pairs)["loss"], expected)


def test_sigmoid_equals_open_clip():
    _, pairs = make_pairs(16)
    expected = open_clip.loss.SigLipLoss()(
        pairs.image_embeddings, pairs.text_embeddings, torch.tensor(10.0), torch.tensor(-10.0)
    )
    torch.testing.assert_close(SigmoidLoss().double()(pairs)["loss"], expected)


def test_a_step_out_of_range_is_undone():
    loss = InfoNCELoss()
    with torch.no_grad():
        loss.logit_scale.fill_(7.0)
    _, pairs = make_pairs(4)
    outputs = loss(pairs)
    outputs["loss"].backward()
    assert outputs["logit_scale"].item() == pytest.approx(100)
    assert loss.logit_scale.grad != 0, "the scale can come back"


def test_a_start_out_of_range():
    with pytest.raises(ValueError, match=r"in \[0, ln 100 = 4.605\], got 14.3"):
        InfoNCELoss(init_logit_scale=14.3)
