import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_itm import FalseNegativeElimination, ImageTextDataset, InfoNCELoss, OfflineHardNegativeMining
from lightning_itm.data import collate_pairs
from lightning_itm.identity import set_difference
from tests.helpers import resume
from tests.helpers.fit import fit
from tests.helpers.pictures import captions, cut_outs
from tests.helpers.tiny import NUM_IMAGES, Tiny, tiny_data, tiny_pairs, tokenize


def wrong(number=NUM_IMAGES):
    """From no to three wrong captions per image."""
    return [[f"wrong {i} of {j}" for j in range(i % 4)] for i in range(number)]


def hard_data(**kwargs):
    data = tiny_data(**kwargs)
    data.train_dataset = tiny_pairs(hard_captions=wrong(), num_hard_captions=2)
    return data


def test_one_list_per_image():
    pairs = ImageTextDataset(cut_outs(4), captions(4), hard_captions=wrong(4), num_hard_captions=2)
    for index in range(8):
        sample = pairs[index]
        drawn, mask = sample["hard_captions"]["text"], sample["hard_captions"]["mask"].tolist()
        there = wrong(4)[sample["image_id"]]
        assert mask == [number < len(there) for number in range(2)]
        own = [text for text, is_there in zip(drawn, mask, strict=True) if is_there]
        assert len(set(own)) == len(own)
        assert set(own) <= set(there)
        assert all(text == sample["text"] for text, is_there in zip(drawn, mask, strict=True) if not is_there)
    assert "hard_captions" not in pairs.evaluation()[0]


def test_one_list_per_text():
    lists = [[f"wrong {number}"] for number in range(8)]
    pairs = ImageTextDataset(cut_outs(4), captions(4), hard_captions=lists)
    assert [pairs[number]["hard_captions"]["text"] for number in range(8)] == lists


def test_every_one_is_drawn():
    pairs = ImageTextDataset(cut_outs(4), captions(4), hard_captions=wrong(4))
    assert {pairs[6]["hard_captions"]["text"][0] for _ in range(60)} == set(wrong(4)[3])


@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize("tokenizer", [tokenize, None])
def test_batches(tokenizer, num):
    """With strings and with token ids, the vectors are those of the captions, in the rows of their pairs."""
    pairs = ImageTextDataset(
        cut_outs(4), captions(4), hard_captions=wrong(4), num_hard_captions=num, tokenizer=tokenizer
    )

    class Model(Tiny):
        def encode_text(self, text):
            return self.text_encoder(text if isinstance(text, torch.Tensor) else tokenize(text))

    torch.manual_seed(0)
    samples = [pairs[index] for index in range(8)]
    model = Model().eval()
    hard = model.embed_hard_captions(collate_pairs(samples)["hard_captions"])
    for row, sample in enumerate(samples):
        texts = sample["hard_captions"]["text"]
        expected = nn.functional.normalize(model.encode_text(texts))
        torch.testing.assert_close(hard.text_embeddings[row], expected)
        assert torch.equal(hard.mask[row], sample["hard_captions"]["mask"])


def test_what_is_no_wrong_caption_is_left_out():
    lists = [["Cut-out  NUMBER 0", "wrong"], ["the 1th square"], [" ", "wrong, too"], []]
    with pytest.warns(UserWarning, match=r"3 of 5 hard captions .*, the first in entry 0: 'Cut-out  NUMBER 0'") as seen:
        pairs = ImageTextDataset(cut_outs(4), captions(4), hard_captions=lists)
    assert seen[0].filename == __file__
    assert [pairs.hard_captions.of(2 * number, number) for number in range(4)] == [["wrong"], [], ["wrong, too"], []]


@pytest.mark.parametrize(
    ("lists", "options", "error", "message"),
    [
        ([["a"]] * 5, {}, ValueError, "one list for each of the 8 texts, or 4 images, got 5 lists"),
        ([[]] * 4, {}, ValueError, "at least one caption, got none"),
        (["a"] * 4, {}, TypeError, "a list of strings, got 'a' as entry 0"),
        ([["a"], [None], [], []], {}, TypeError, r"a list of strings, got \[None\] as entry 1"),
        ([["a"]] * 4, {"num_hard_captions": 0}, ValueError, "`num_hard_captions` to be at least 1, got 0"),
    ],
)
def test_refused(lists, options, error, message):
    with pytest.raises(error, match=message):
        ImageTextDataset(cut_outs(4), captions(4), hard_captions=lists, **options)


def test_joined_sets():
    pairs = ImageTextDataset(cut_outs(4), captions(4), hard_captions=wrong(4))
    with pytest.raises(ValueError, match="sets without `hard_captions`"):
        pairs.split(0.5)


def test_a_loss_that_takes_none():
    class Own(nn.Module):
        def forward(self, pairs, candidates, *, hard=None):
            return {"loss": pairs.image_embeddings.sum()}

    with pytest.raises(
        TypeError, match=r"a loss that takes `hard_captions`, which the batch has, got Own. Use InfoNCELoss"
    ):
        fit(Tiny(Own()), hard_data(), max_epochs=1)


def test_they_change_the_training():
    one, other = (fit(Tiny, data, seed=0, max_epochs=1, limit_val_batches=0) for data in (tiny_data(), hard_data()))
    assert one.metrics["train/loss"] != other.metrics["train/loss"]


def test_beside_mining_and_a_memory_bank():
    callbacks = OfflineHardNegativeMining(texts_per_image=12, images_per_text=8), FalseNegativeElimination(16)
    run = fit(Tiny(InfoNCELoss()), hard_data(), *callbacks, seed=0)
    assert run.metrics["train/loss"] > 0
    assert run.metrics["train/memory_cost"] > 0


@pytest.mark.parametrize("workers", [{}, {"num_workers": 2}])
def test_resume(workers, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "tiny_data", hard_data)
    whole, _ = resume.fit(Tiny, {}, tmp_path, save={"every_n_train_steps": 17}, limit_val_batches=0)
    path = str(tmp_path / "step=17.ckpt")
    resumed, _ = resume.fit(Tiny, workers, tmp_path / "again", limit_val_batches=0, resume_from=path)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_identity():
    sets = [tiny_pairs(hard_captions=lists) for lists in (wrong(), [["another"]] * NUM_IMAGES)]
    assert set_difference(sets[0].identity(), sets[1].identity()) == "other hard captions"


@pytest.mark.slow
def test_spawned_workers():
    pairs = tiny_pairs(hard_captions=wrong())
    loader = DataLoader(pairs, 4, collate_fn=collate_pairs, num_workers=1, multiprocessing_context="spawn")
    assert next(iter(loader))["hard_captions"]["mask"].shape == (4, 1)
