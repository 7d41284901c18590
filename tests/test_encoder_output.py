import pytest
import torch
from torch import nn

from lightning_itm import DualEncoder
from lightning_itm.encoder_output import vectors_of
from tests.helpers.hugging_face import transformers


class Returning(DualEncoder):
    """Its image tower returns what a test says."""

    def __init__(self, output):
        super().__init__()
        self.layer, self.output = nn.Linear(3, 3), output

    def encode_image(self, image):
        return self.output(self.layer(image))

    def encode_text(self, text):
        return self.layer(text)


def batch():
    ids = torch.arange(4)
    return {"image": torch.randn(4, 3), "text": torch.randn(4, 3), "image_id": ids, "text_id": ids}


def pooling(vectors):
    return transformers.modeling_outputs.BaseModelOutputWithPooling(
        last_hidden_state=vectors[:, None].expand(len(vectors), 5, 3), pooler_output=vectors
    )


@pytest.mark.parametrize(
    "output", [pooling, lambda v: {"image_embeds": v, "pooler_output": v + 1}, lambda v: {"pooler_output": v}]
)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_the_vectors_are_found(output, chunk_size):
    model = Returning(output)
    model.chunk_size = chunk_size
    inputs = batch()
    expected = nn.functional.normalize(model.layer(inputs["image"]), dim=-1)
    torch.testing.assert_close(model.embed(inputs).image_embeddings, expected)


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (
            lambda v: (v, v),
            TypeError,
            r"`encode_image` to return a tensor \(pairs, dim\), .* got tuple of 2\. Return the one",
        ),
        (lambda v: {"logits": v}, TypeError, r"`image_embeds` or `pooler_output`, got dict with \['logits'\]"),
        (lambda v: None, TypeError, r"got NoneType\. Return the one tensor"),
        (lambda v: v[:, None].expand(4, 5, 3), ValueError, r"got the shape \(4, 5, 3\)\. Pool over the tokens"),
        (lambda v: v[:, 0], ValueError, r"got the shape \(4,\)\. Flatten"),
        (lambda v: v.long(), TypeError, r"floating-point numbers, got torch.int64\."),
    ],
)
def test_what_is_no_vector_is_refused(output, error, message):
    with pytest.raises(error, match=message):
        Returning(output).training_step(batch(), 0)


def test_the_text_has_its_own_name():
    output = transformers.models.clip.modeling_clip.CLIPOutput(
        text_embeds=torch.ones(2, 3), image_embeds=torch.zeros(2, 3)
    )
    assert vectors_of(output, "text").sum() == 6
