"""Rankings by id, and what the evaluations of COCO make of them."""

import json
import random
import sys
import warnings

import pytest
import torch
from torch.nn.functional import normalize

from lightning_itm import ImageTextDataset, ImageTextRetrieval
from lightning_itm.embeddings import EmbeddingPairs
from lightning_itm.metrics import coco_ranking, ranked_ids
from tests.helpers.karpathy import write_karpathy


def random_pairs(num_images=7, texts_per_image=3, dim=4, *, noise=1.0, dtype=torch.float32):
    """Pairs in another order than that of their ids, as a shuffled loader gives them."""
    owner = torch.arange(num_images).repeat_interleave(texts_per_image)
    image = normalize(torch.randn(num_images, dim, dtype=dtype), dim=1)
    text = normalize(image[owner] + noise * torch.randn(len(owner), dim, dtype=dtype), dim=1)
    order = torch.randperm(len(owner))
    return EmbeddingPairs(image[owner][order], text[order], owner[order], torch.arange(len(owner))[order])


def test_equals_a_slow_ranking():
    pairs = random_pairs()
    ranked = ranked_ids(pairs, k=5)
    image = {int(i): row for i, row in zip(pairs.image_id, pairs.image_embeddings.double(), strict=True)}
    text = {int(i): row for i, row in zip(pairs.text_id, pairs.text_embeddings.double(), strict=True)}
    assert ranked.image_id.tolist() == sorted(image)
    assert ranked.text_id.tolist() == sorted(text)
    for i, found in zip(ranked.image_id.tolist(), ranked.texts.tolist(), strict=True):
        assert found == sorted(text, key=lambda t: -float(image[i] @ text[t]))[:5]
    for t, found in zip(ranked.text_id.tolist(), ranked.images.tolist(), strict=True):
        assert found == sorted(image, key=lambda i: -float(image[i] @ text[t]))[:5]


def recalls_of(ranked, owner, k):
    i2t = (owner[ranked.texts[:, :k]] == ranked.image_id[:, None]).any(dim=1).double().mean()
    t2i = (ranked.images[:, :k] == owner[ranked.text_id][:, None]).any(dim=1).double().mean()
    return 100 * float(i2t), 100 * float(t2i)


@pytest.mark.parametrize("kind", ["random", "collapsed", "two points"])
def test_recalls_are_those_of_the_metric_also_with_ties(kind):
    pairs = random_pairs(20, 2)
    if kind != "random":
        number = 1 if kind == "collapsed" else 2
        points = normalize(torch.randn(number, 4), dim=1)
        pairs = EmbeddingPairs(
            points[pairs.image_id % number], points[pairs.image_id % number], pairs.image_id, pairs.text_id
        )
    metric = ImageTextRetrieval()
    metric.update(pairs)
    values, owner = metric.compute(), torch.arange(20).repeat_interleave(2)
    for k in (1, 5, 10):
        expected = float(values[f"i2t_r{k}"]), float(values[f"t2i_r{k}"])
        assert recalls_of(ranked_ids(metric, 10), owner, k) == pytest.approx(expected)
    if kind == "collapsed":
        assert values["rsum"] == 0


def test_chunks_change_nothing(monkeypatch):
    pairs = random_pairs()
    expected = ranked_ids(pairs)
    # By its module: the package has the function under the same name.
    monkeypatch.setattr(sys.modules["lightning_itm.metrics.ranked_ids"], "CHUNK", 1)
    assert all(torch.equal(one, other) for one, other in zip(ranked_ids(pairs), expected, strict=True))


def test_errors():
    with pytest.raises(ValueError, match="`k` to be a positive integer, got 0"):
        ranked_ids(random_pairs(), 0)
    with pytest.raises(TypeError, match="EmbeddingPairs or an ImageTextRetrieval, got dict"):
        ranked_ids({})
    with pytest.raises(ValueError, match="has seen pairs, got one without"):
        ranked_ids(ImageTextRetrieval())
    ranked = ranked_ids(random_pairs(2, 2))
    with pytest.raises(ValueError, match=r"`image_ids`, COCO's own ids, got None. `ImageTextDataset.from_karpathy`"):
        coco_ranking(ranked, None, None)
    with pytest.raises(ValueError, match="`caption_ids` to hold one integer for each of our ids, 4 or more"):
        coco_ranking(ranked, [1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="`image_ids` to be unique, got 1 of them twice"):
        coco_ranking(ranked, [1, 1], [1, 2, 3, 4])


class TestCocoIds:
    def test_are_read_with_their_images_and_captions(self, tmp_path):
        pairs = ImageTextDataset.from_karpathy(write_karpathy(tmp_path), tmp_path, "test")
        content = json.loads((tmp_path / "dataset.json").read_text())
        entries = [entry for entry in content["images"] if entry["split"] == "test"]
        assert pairs.coco_image_id == [entry["cocoid"] for entry in entries]
        assert pairs.coco_caption_id == [name for entry in entries for name in entry["sentids"]]
        assert pairs.evaluation().coco_image_id == pairs.coco_image_id

    def test_what_is_no_text_takes_its_id_with_it(self, tmp_path):
        path = write_karpathy(tmp_path)
        content = json.loads(path.read_text())
        entry = next(entry for entry in content["images"] if entry["split"] == "test")
        entry["sentences"][1]["raw"], entry["sentences"][3]["raw"] = "", ["two", "texts"]
        path.write_text(json.dumps(content))
        with pytest.warns(UserWarning, match="what is no text is left out"):
            pairs = ImageTextDataset.from_karpathy(path, tmp_path, "test")
        texts = {one["sentid"]: one["raw"] for some in content["images"] for one in some["sentences"]}
        assert [texts[name] for name in pairs.coco_caption_id] == list(pairs.texts)

    def test_other_sets_have_none(self, tmp_path):
        pairs = ImageTextDataset.from_karpathy(write_karpathy(tmp_path, style="flickr"), tmp_path, "test")
        assert pairs.coco_image_id is None
        assert pairs.coco_caption_id is None


class TestEccvCaption:
    @pytest.fixture(scope="class")
    def metrics(self):
        eccv_caption = pytest.importorskip("eccv_caption")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return eccv_caption.Metrics()

    @pytest.fixture(scope="class")
    def coco(self, metrics):
        """Embeddings for all images and captions of COCO's test set, and the names of both in the order of our ids."""
        torch.manual_seed(0)
        images = sorted(metrics.coco_gts["i2t"])
        random.Random(0).shuffle(images)
        captions = [name for image in images for name in metrics.coco_gts["i2t"][image]]
        pairs = random_pairs(len(images), 5, 16, noise=0.15)
        return pairs, images, captions

    @pytest.mark.slow
    def test_recalls_of_coco_5k_are_ours(self, metrics, coco):
        pairs, images, captions = coco
        metric = ImageTextRetrieval()
        metric.update(pairs)
        values, (i2t, t2i) = metric.compute(), coco_ranking(ranked_ids(pairs, 10), images, captions)
        scores = metrics.compute_all_metrics(i2t, t2i, ("coco_5k_recalls",), Ks=(1, 5, 10))
        for k in (1, 5, 10):
            for way in ("i2t", "t2i"):
                assert 100 * scores[f"coco_5k_r{k}"][way] == pytest.approx(float(values[f"{way}_r{k}"]), abs=1e-4)
        assert 1 < float(values["t2i_r1"]) < 99

    @pytest.mark.slow
    def test_a_perfect_ranking_scores_one_in_all(self, metrics):
        i2t, t2i = dict(metrics.coco_gts["i2t"]), dict(metrics.coco_gts["t2i"])
        i2t |= metrics.eccv_gts["i2t"]
        t2i |= metrics.eccv_gts["t2i"]
        scores = metrics.compute_all_metrics(i2t, t2i, ("eccv_map_at_r", "cxc_r1"))
        assert scores["eccv_map_at_r"] == {"i2t": 1, "t2i": 1}

    @pytest.mark.slow
    def test_mean_average_precision_on_eccv_is_that_of_its_definition(self, metrics, coco):
        pairs, images, captions = coco
        i2t, t2i = coco_ranking(ranked_ids(pairs, 48), images, captions)
        scores = metrics.compute_all_metrics(i2t, t2i, ("eccv_map_at_r",))["eccv_map_at_r"]
        for way, ranking in (("i2t", i2t), ("t2i", t2i)):
            expected = []
            for name, right in metrics.eccv_gts[way].items():
                first = ranking[name][: len(set(right))]
                hits = [found in set(right) for found in first]
                expected.append(sum(sum(hits[: r + 1]) / (r + 1) for r in range(len(hits)) if hits[r]) / len(hits))
            assert scores[way] == pytest.approx(sum(expected) / len(expected))
            assert 0.01 < scores[way] < 0.99
