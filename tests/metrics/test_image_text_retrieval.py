import inspect
from dataclasses import fields, replace

import matplotlib as mpl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize
from torchmetrics import MetricCollection
from torchmetrics.wrappers import MetricTracker

from lightning_itm import ImageTextRetrieval
from lightning_itm.embeddings import EmbeddingPairs
from tests.reference import retrieval as reference

mpl.use("Agg")
EYE = torch.eye(9)


def make_pairs(texts_of_image, *, dim=4, integers=False):
    """Some texts for each image, as a loader would give them: the image once for each of its texts."""
    owner = torch.repeat_interleave(torch.tensor(texts_of_image))
    if integers:
        image, text = (torch.randint(-2, 3, (n, dim)).float() for n in (len(texts_of_image), len(owner)))
    else:
        image, text = (normalize(torch.randn(n, dim), dim=-1) for n in (len(texts_of_image), len(owner)))
    return image, text, owner, EmbeddingPairs(image[owner], text, owner, torch.arange(len(owner)))


def rows(pairs, index):
    return pairs.map(lambda part: part[index])


def measured(metric, pairs, batch_size=5):
    for index in torch.arange(len(pairs)).split(batch_size):
        metric.update(rows(pairs, index))
    return {name: value.item() for name, value in metric.compute().items()}


@given(st.lists(st.integers(1, 7), min_size=1, max_size=12), st.booleans(), st.integers(0, 1000))
def test_equals_the_loop(texts_of_image, integers, seed):
    """One to seven texts per image, negative cosines, and with integers many ties."""
    torch.manual_seed(seed)
    image, text, owner, pairs = make_pairs(texts_of_image, integers=integers)
    assert measured(ImageTextRetrieval(), pairs) == pytest.approx(reference.retrieval(image, text, owner), abs=1e-4)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=9), st.booleans(), st.integers(1, 6), st.integers(0, 1000))
def test_equal_captions_are_right_where_asked_for(texts_of_image, integers, num_captions, seed):
    """Several captions per image, so that sharing one is not transitive. Image ids with gaps, in any order of the rows."""
    torch.manual_seed(seed)
    image, text, owner, pairs = make_pairs(texts_of_image, integers=integers)
    captions = torch.randint(0, num_captions, (len(text),))
    pairs = replace(pairs, image_id=3 * pairs.image_id + 2, caption_id=captions)
    pairs = rows(pairs, torch.randperm(len(text)))
    expected = reference.retrieval(image, text, owner, caption_id=captions)
    assert measured(ImageTextRetrieval(equal_captions="right"), pairs) == pytest.approx(expected, abs=1e-4)
    assert measured(ImageTextRetrieval(), pairs) == pytest.approx(reference.retrieval(image, text, owner), abs=1e-4)


@pytest.mark.parametrize("folds", [None, 3])
def test_without_captions_none_is_equal_to_another(folds):
    *_, pairs = make_pairs([1, 2, 3, 2, 1])
    metrics = [ImageTextRetrieval(folds=folds, equal_captions=option) for option in ("wrong", "right")]
    assert measured(metrics[0], pairs) == measured(metrics[1], pairs)


def test_captions_beside_tensors():
    """Two images of one caption, and a model that knows it: no result is wrong."""
    metric, ids = ImageTextRetrieval((1,), equal_captions="right"), torch.arange(3)
    vectors = torch.eye(3)[[0, 0, 2]]
    metric.update(vectors, vectors, ids, ids, torch.tensor([7, 7, 8]))
    assert metric.compute()["rsum"] == 200
    with pytest.raises(TypeError, match="an EmbeddingPairs alone, got caption_id beside it"):
        metric.update(EmbeddingPairs(vectors, vectors, ids, ids), caption_id=ids)
    with pytest.raises(ValueError, match="`equal_captions` to be one of 'wrong', 'right', got 'keep'"):
        ImageTextRetrieval(equal_captions="keep")


def test_an_embedding_of_zeros_is_that_of_itself():
    """It has no cosine with itself, and came once for each of its image's texts."""
    ids = torch.arange(2)
    pairs = EmbeddingPairs(torch.zeros(2, 4), torch.eye(2, 4), torch.zeros_like(ids), ids)
    assert measured(ImageTextRetrieval(), pairs)["i2t_r10"] == 100


@given(st.lists(st.integers(1, 3), min_size=1, max_size=23), st.integers(0, 1000))
def test_folds_are_the_mean_over_parts(texts_of_image, seed):
    torch.manual_seed(seed)
    image, text, owner, pairs = make_pairs(texts_of_image)
    parts = torch.arange(len(image)).tensor_split(min(5, len(image)))
    results = [
        reference.retrieval(image[part], text[torch.isin(owner, part)], owner[torch.isin(owner, part)] - part[0])
        for part in parts
    ]
    expected = {name: sum(result[name] for result in results) / len(results) for name in results[0]}
    assert measured(ImageTextRetrieval(folds=5), pairs) == pytest.approx(expected, abs=1e-4)


@given(st.integers(11, 300))
def test_a_collapsed_model_scores_nothing(num_images):
    vector = normalize(torch.randn(1, 64), dim=-1).expand(num_images, 64)
    ids = torch.arange(num_images)
    assert measured(ImageTextRetrieval(), EmbeddingPairs(vector, vector, ids, ids))["rsum"] == 0


def test_order_and_repetition_do_not_matter():
    """A distributed sampler pads with pairs that were there already."""
    *_, pairs = make_pairs([3, 1, 2, 5])
    shuffled = rows(pairs, torch.cat([torch.randperm(11), torch.tensor([0, 4, 4])]))
    assert measured(ImageTextRetrieval(), shuffled) == measured(ImageTextRetrieval(), pairs)


@pytest.mark.parametrize(("field", "bad"), [("text_id", 0), ("image_id", 0)])
def test_one_id_for_two_things_is_an_error(field, bad):
    pairs = EmbeddingPairs(torch.eye(3), torch.eye(3), torch.arange(3), torch.arange(3))
    getattr(pairs, field)[1] = bad
    metric = ImageTextRetrieval()
    metric.update(pairs)
    with pytest.raises(ValueError, match=rf"one embedding for each `{field}`, .*\(cosine 0.00\) for {field} 0"):
        metric.compute()


def test_one_text_of_two_images_is_an_error():
    metric = ImageTextRetrieval()
    metric.update(EmbeddingPairs(torch.eye(3), torch.ones(3, 3), torch.arange(3), torch.tensor([0, 1, 0])))
    with pytest.raises(ValueError, match="every text to belong to one image, got two for text_id 0"):
        metric.compute()


def test_a_dead_tower_is_no_wrong_id():
    ids = torch.arange(3)
    assert measured(ImageTextRetrieval(), EmbeddingPairs(torch.zeros(3, 2), torch.zeros(3, 2), ids, ids))["i2t_r1"] == 0


@pytest.mark.parametrize("field", ["image", "text"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_embedding_that_is_not_finite_is_an_error(field, value):
    """Every score with it counts against the model: one bad text would make every image miss."""
    *_, pairs = make_pairs([1] * 12)
    metric = ImageTextRetrieval()
    for row in (3, 7):
        getattr(pairs, f"{field}_embeddings")[row, 1] = value
    metric.update(pairs)
    message = (
        rf"`{field}_embeddings` to be finite, got NaN or infinity in 2 of 12 for {field}_id 3, 7\. .*{field} tower"
    )
    with pytest.raises(ValueError, match=message):
        metric.compute()


def test_of_many_that_are_not_finite_the_first_are_named():
    ids = torch.arange(40)
    metric = ImageTextRetrieval()
    metric.update(torch.full((40, 2), torch.nan), torch.ones(40, 2), ids, ids)
    with pytest.raises(ValueError, match=r"in 40 of 40 for image_id 0, 1, 2, 3, 4, …\."):
        metric.compute()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_ids_of_fewer_bits(dtype):
    *_, pairs = make_pairs([2, 1, 3, 1])
    narrow = pairs.image_id.to(dtype), pairs.text_id.to(dtype)
    metric = ImageTextRetrieval()
    metric.update(pairs.image_embeddings, pairs.text_embeddings, *narrow)
    assert metric.compute() == measured(ImageTextRetrieval(), pairs)


def test_nothing_seen():
    metric = ImageTextRetrieval()
    with (
        pytest.warns(UserWarning, match="before the ``update`` method"),
        pytest.raises(ValueError, match="at least one batch before `compute`"),
    ):
        metric.compute()


def test_tensors_and_pairs_are_taken_alike():
    """By position, by name, and both in one collection, which hands each metric the names that it knows."""
    *_, pairs = make_pairs([2, 1, 3, 1])
    tensors = {field.name: getattr(pairs, field.name) for field in fields(pairs)}
    by_position, by_name, collection = (
        ImageTextRetrieval(),
        ImageTextRetrieval(),
        MetricCollection([ImageTextRetrieval()]),
    )
    by_position.update(*tensors.values())
    by_name.update(**tensors)
    collection.update(**tensors, something_else=1)
    expected = measured(ImageTextRetrieval(), pairs)
    assert by_position.compute() == by_name.compute() == expected
    assert collection.compute() == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda pairs: (pairs, pairs.text_embeddings), "EmbeddingPairs alone, got text_embeddings beside it"),
        (lambda pairs: (pairs.image_embeddings, pairs.text_embeddings), "without image_id, text_id. Call `update"),
        (lambda pairs: (pairs.image_embeddings,), "without text_embeddings, image_id, text_id"),
        (lambda pairs: ({"image": 1},), "a tensor or an EmbeddingPairs, got dict"),
        (lambda pairs: (*[pairs.image_embeddings] * 3, pairs.text_id), "`image_id` to be an int64 tensor"),
    ],
)
def test_a_wrong_mix_of_pairs_and_tensors(arguments, message):
    *_, pairs = make_pairs([1, 1])
    with pytest.raises(TypeError, match=message):
        ImageTextRetrieval().update(*arguments(pairs))


class TestHigherIsBetter:
    def test_every_entry_says_its_own(self):
        *_, pairs = make_pairs([1] * 4)
        metric = ImageTextRetrieval(recall_at=(1, 3))
        assert list(measured(metric, pairs)) == list(metric.higher_is_better_by_name)
        falling = {name for name, higher in metric.higher_is_better_by_name.items() if not higher}
        assert falling == {name for name in metric.higher_is_better_by_name if "rank" in name}

    def test_a_tracker_asks_and_finds_the_best_of_either_kind(self):
        good, bad = (EmbeddingPairs(EYE, text, torch.arange(9), torch.arange(9)) for text in (EYE, EYE.roll(1, 0)))
        if inspect.signature(MetricTracker).parameters["maximize"].default is None:  # older ones maximise, unasked
            with pytest.raises(AttributeError, match=r"does not have a 'higher_is_better'.*`maximize` argument"):
                MetricTracker(ImageTextRetrieval())
        for maximize, name in ((True, "rsum"), (False, "i2t_mean_rank")):
            tracker = MetricTracker(MetricCollection([ImageTextRetrieval()]), maximize=maximize)
            for pairs in (bad, good, bad):
                tracker.increment()
                tracker.update(pairs)
            best, step = tracker.best_metric(return_step=True)
            assert best[name] == {"rsum": 600, "i2t_mean_rank": 1}[name]
            assert step[name] == 1


@pytest.mark.parametrize("arguments", [{"recall_at": ()}, {"recall_at": (0, 5)}, {"folds": 0}])
def test_wrong_arguments(arguments):
    with pytest.raises(ValueError, match="positive integer"):
        ImageTextRetrieval(**arguments)


def test_plot_shows_both_directions():
    *_, pairs = make_pairs([1] * 30)
    metric = ImageTextRetrieval()
    metric.update(pairs)
    figure, ax = metric.plot()
    assert [label.get_text() for label in ax.get_legend().get_texts()] == ["image to text", "text to image"]
    heights = [bar.get_height() for bar in ax.patches]
    assert heights == pytest.approx(
        [metric.compute()[f"{way}_r{k}"].item() for way in ("i2t", "t2i") for k in (1, 5, 10)]
    )
    mpl.pyplot.close(figure)
