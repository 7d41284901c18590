"""Mining with any two encoders and without a Trainer."""

import random
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from lightning_itm import HardNegativeDataset, ImageTextDataset, NegativeWriter, OfflineHardNegativeMining, mine
from lightning_itm.data import collate_pairs
from tests.helpers.fit import fit
from tests.helpers.pictures import captions, cut_outs
from tests.helpers.tiny import AUGMENTED, NUM_IMAGES, PLAIN, SILENT, Tiny, tiny_data, tiny_pairs, tokenize

TABLE = {"texts_per_image": 5, "images_per_text": 4}
FILES = ("texts_of_images", "images_of_texts")


def functions_of(model):
    """The encoders of a model, in two functions that hide it."""
    return (lambda images: model.encode_image(images)), (lambda texts: model.encode_text(texts))


class TestTable:
    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    def test_is_that_of_the_callback(self, precision):
        model, data = Tiny(), tiny_data()
        mined = mine(model, data.train_dataset, precision=precision, **TABLE)
        callback = OfflineHardNegativeMining(inject="embeddings", every_n_epochs=None, **TABLE)
        fit(model, data, callback, max_epochs=1, precision=precision)
        assert torch.equal(mined.texts, callback.table.texts)
        assert torch.equal(mined.images, callback.table.images)
        assert mined.texts.dtype == torch.int32

    @pytest.mark.parametrize("format", ["jsonl", "parquet"])
    def test_files_are_those_of_the_writer(self, format):
        model, data, guards = Tiny(), tiny_data(), {"rank_min": 1, "max_score": 0.9}
        writer = NegativeWriter("theirs", format=format, **TABLE, **guards)
        L.Trainer(callbacks=[writer], **SILENT).predict(model, datamodule=data, return_predictions=False)
        mine(model, data.test_dataset, output="ours/new", format=format, batch_size=4, **TABLE, **guards)
        for name in FILES:
            ours, theirs = (Path(folder, f"{name}.{format}").read_bytes() for folder in ("ours/new", "theirs"))
            assert ours == theirs

    def test_trains_through_the_dataset(self):
        pairs = tiny_pairs()
        mined, hard = mine(Tiny(), pairs), HardNegativeDataset(pairs)
        hard.table.publish(mined.texts, mined.images)
        batch = collate_pairs([hard[0], hard[1]])
        assert (batch["hard"]["image_id_of_text"] >= 0).all()

    def test_text_scores_belong_to_the_texts(self):
        model, view = Tiny(), tiny_pairs().evaluation()
        mined = mine(model, tiny_pairs(), **TABLE)
        model.eval()
        with torch.no_grad():
            image = nn.functional.normalize(model.encode_image(view.load_image(3)[None]))
            text = nn.functional.normalize(model.encode_text(view.load_text(int(mined.texts[3, 0]))[None]))
        assert float(image @ text.T) == pytest.approx(float(mined.text_scores[3, 0]), abs=1e-6)


class TestModels:
    @pytest.mark.parametrize("as_array", [False, True])
    def test_two_functions(self, as_array):
        model = Tiny().eval()
        expected = mine(model, tiny_pairs(), **TABLE)
        images, texts = functions_of(model)
        given = (
            ((lambda batch: images(batch).numpy()), (lambda batch: texts(batch).numpy()))
            if as_array
            else (images, texts)
        )
        assert torch.equal(mine(given, tiny_pairs(), **TABLE).texts, expected.texts)

    def test_two_modules(self):
        model = Tiny()
        expected = mine(model, tiny_pairs(), **TABLE)
        assert torch.equal(mine((model.image_encoder, model.text_encoder), tiny_pairs(), **TABLE).texts, expected.texts)

    def test_wrapped_by_fabric(self):
        model = Tiny()
        expected = mine(model, tiny_pairs(), **TABLE)
        wrapped = L.Fabric(accelerator="cpu", devices=1).setup(model)
        assert torch.equal(mine(wrapped, tiny_pairs(), **TABLE).texts, expected.texts)

    def test_bfloat16_weights(self):
        model = Tiny().bfloat16()
        assert torch.isfinite(mine(model, tiny_pairs(), precision="bf16-true", **TABLE).text_scores).all()
        assert torch.get_default_dtype() == torch.float32

    def test_models_that_prepare_their_inputs_get_pictures_and_strings(self):
        seen = {}

        def encode(kind, batch):
            seen[kind] = type(batch), {type(one).__name__ for one in batch}
            return torch.randn(len(batch), 4)

        pairs = ImageTextDataset(cut_outs(6), captions(6), transform=lambda image: image)
        mine((lambda batch: encode("image", batch), lambda batch: encode("text", batch)), pairs, **TABLE)
        assert seen == {"image": (list, {"Image"}), "text": (list, {"str"})}

    def test_sentence_transformers(self):
        sentence_transformers = pytest.importorskip("sentence_transformers")
        from sentence_transformers.sentence_transformer.modules import StaticEmbedding
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import Whitespace

        words = sorted({word for texts in captions(NUM_IMAGES) for text in texts for word in text.split()})
        tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(["?", *words])}, unk_token="?"))
        tokenizer.pre_tokenizer = Whitespace()
        text_model = sentence_transformers.SentenceTransformer(
            modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu"
        )
        text_model.train()
        image_model, pairs = Tiny().image_encoder, tiny_pairs(tokenizer=None)
        mined = mine((image_model, text_model.encode), pairs, **TABLE)
        with torch.no_grad():
            images = image_model.eval()(torch.stack([pairs.evaluation().load_image(i) for i in range(NUM_IMAGES)]))
        image = nn.functional.normalize(images)
        text = nn.functional.normalize(torch.as_tensor(text_model.encode(list(pairs.texts))))
        scores = image @ text.T
        scores[torch.arange(NUM_IMAGES)[:, None] == pairs.text_image_id] = -2
        torch.testing.assert_close(mined.text_scores, scores.topk(5).values, atol=1e-5, rtol=0)


class TestLeavesAsItWas:
    def test_modes_gradients_and_random_streams(self):
        model = Tiny()
        model.text_encoder.eval()
        flags, states = (
            [part.training for part in model.modules()],
            (torch.get_rng_state(), random.getstate(), np.random.get_state()[1]),
        )
        mine(model, tiny_pairs(), **TABLE)
        assert [part.training for part in model.modules()] == flags
        assert all(parameter.grad is None for parameter in model.parameters())
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert (np.random.get_state()[1] == states[2]).all()

    def test_streams_also_where_functions_draw(self):
        state = torch.get_rng_state(), random.getstate()

        def draw(batch):
            return torch.randn(len(batch), 4) + random.random()

        mine((draw, draw), tiny_pairs(), **TABLE)
        assert torch.equal(torch.get_rng_state(), state[0])
        assert random.getstate() == state[1]

    def test_modes_of_a_method_and_after_an_error(self):
        model, was_training = Tiny(), []

        def encode_text(texts):
            was_training.append(model.image_encoder.training)
            raise KeyError("of the user's")

        with pytest.raises(KeyError):
            mine((model.encode_image, encode_text), tiny_pairs(), **TABLE)
        assert was_training == [False]
        assert model.image_encoder.training


class TestErrors:
    def fails(self, match, model=None, error=ValueError, pairs=None, **options):
        with pytest.raises(error, match=match):
            mine(Tiny() if model is None else model, tiny_pairs() if pairs is None else pairs, **{**TABLE, **options})

    def test_what_encoders_return(self):
        def good(batch):
            return torch.ones(len(batch), 4)

        for bad, error, match in (
            (
                lambda batch: [torch.ones(4)] * len(batch),
                TypeError,
                "encoder of the texts to return a tensor or an array",
            ),
            (
                lambda batch: torch.ones(len(batch), 3, 4),
                ValueError,
                r"one vector of floats for each of 46 texts, got \(46, 3, 4\)",
            ),
            (lambda batch: torch.ones(1, 4), ValueError, r"each of 46 texts, got \(1, 4\)"),
            (lambda batch: torch.ones(len(batch), 4).long(), ValueError, "got .* of torch.int64"),
            (lambda batch: torch.ones(len(batch), 5), ValueError, "of one width, 4, got 5 for texts"),
            (
                lambda batch: torch.full((len(batch), 4), torch.nan),
                ValueError,
                "finite text embeddings when mining on rank 0",
            ),
        ):
            self.fails(match, (good, bad), error)

    def test_no_model(self):
        self.fails("to have `encode_image` and `encode_text`.*got Linear", nn.Linear(1, 1), TypeError)

    def test_another_device(self):
        self.fails("on `device`, meta, got weights on cpu.*model.to", device="meta")

    def test_arguments(self):
        self.fails("`precision` to be one of", precision="8")
        self.fails("`texts_per_image` to be at least 1, got 0", texts_per_image=0)
        self.fails("`format` to be one of", format="csv", output="mined")

    def test_folder_with_results(self):
        mine(Tiny(), tiny_pairs(), output="mined", **TABLE)
        self.fails("folder without results, got mined with texts_of_images", error=FileExistsError, output="mined")

    def test_what_can_not_be_read_is_left_out(self):
        images = cut_outs(6)
        images[2] = b"no image"
        pairs = ImageTextDataset(images, captions(6), transform=AUGMENTED, eval_transform=PLAIN, tokenizer=tokenize)
        with pytest.warns(UserWarning, match="1 of 6 images and 2 of 12 texts are left out"):
            mined = mine(Tiny(), pairs, **TABLE)
        assert (mined.texts[2] == -1).all()
        assert not (mined.images == 2).any()


def share(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Tiny())
    mined = mine(model, tiny_pairs(), output=f"{folder}/two", **TABLE)
    torch.save(mined.texts, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.forks
@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    torch.manual_seed(0)
    mine(Tiny(), tiny_pairs(), output=tmp_path / "one", **TABLE)
    torch.multiprocessing.start_processes(share, (str(tmp_path),), nprocs=2, start_method="fork")
    for name in FILES:
        one, two = (Path(tmp_path, folder, f"{name}.jsonl").read_text() for folder in ("one", "two"))
        assert one == two
    assert torch.equal(torch.load(tmp_path / "0.pt"), torch.load(tmp_path / "1.pt"))
