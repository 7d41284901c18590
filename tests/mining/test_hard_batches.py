import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_itm.data import EpochSampler, SeededDataset, random_order
from lightning_itm.mining import compose_batches
from lightning_itm.mining.hard_batches import check_group_size
from tests.helpers.tiny import NUM_IMAGES, tiny_pairs


@st.composite
def mined_sets(draw):
    """A set of images with one to three texts each, and a table of random negatives, in which rows may be short or empty."""
    counts = draw(st.lists(st.integers(1, 3), min_size=2, max_size=20))
    text_image_id = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    if draw(st.booleans()):
        text_image_id = text_image_id[torch.randperm(len(text_image_id), generator=torch.Generator().manual_seed(1))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    width, kept = draw(st.integers(1, 6)), draw(st.floats(0, 1))

    def rows(anchor_id, key_id):
        scores = torch.rand(len(anchor_id), len(key_id), generator=generator)
        scores[(anchor_id[:, None] == key_id) | (scores > kept)] = -1  # the own image, and what a guard leaves out
        best = scores.topk(min(width, len(key_id)))
        return torch.where(best.values < 0, -1, best.indices).int()

    image_id = torch.arange(len(counts))
    return rows(image_id, text_image_id), rows(text_image_id, image_id), text_image_id


@st.composite
def epochs(draw):
    texts, images, text_image_id = draw(mined_sets())
    group_size = draw(st.integers(1, 5))
    num_groups = draw(st.integers(1, max(1, len(text_image_id) // group_size)))
    batch_size = min(group_size * num_groups, len(text_image_id) // group_size * group_size)
    if batch_size < group_size:
        group_size = batch_size = 1
    key = {"seed": draw(st.integers(0, 99)), "epoch": draw(st.integers(0, 99))}
    if num_captions := draw(st.sampled_from([0, 2, 9])):
        generator = torch.Generator().manual_seed(num_captions)
        key["caption_id"] = torch.randint(0, num_captions, (len(text_image_id),), generator=generator)
    return (texts, images, text_image_id), {"group_size": group_size, "batch_size": batch_size, **key}


def is_own(owner, caption_id, text, other):
    """Whether the text equals a caption of the image of another text."""
    if caption_id is None:
        return False
    return int(caption_id[text]) in [int(caption_id[t]) for t in range(len(owner)) if owner[t] == owner[other]]


def slow_groups(texts, images, text_image_id, group_size, visited, caption_id=None):
    """As the docstring says it, pair by pair."""
    owner, free, groups = text_image_id.tolist(), set(range(len(text_image_id))), []
    rank = {pair: i for i, pair in enumerate(visited)}
    for pair in visited:
        if pair not in free:
            continue
        free.remove(pair)
        group = [pair]
        hard_texts = [text for text in texts[owner[pair]].tolist() if text in free]
        hard_images = [image for image in images[pair].tolist() if any(owner[text] == image for text in free)]
        for place in range(max(len(hard_texts), len(hard_images))):
            choices = [hard_texts[place : place + 1]]
            choices += [
                [text for text in range(len(owner)) if owner[text] == i] for i in hard_images[place : place + 1]
            ]
            for choice in choices:
                unused = [t for t in choice if t in free and owner[t] not in [owner[u] for u in group]]
                if unused and len(group) < group_size:
                    new = min(unused, key=rank.get)
                    if any(is_own(owner, caption_id, new, u) or is_own(owner, caption_id, u, new) for u in group):
                        continue
                    group.append(new)
                    free.remove(new)
        groups.append(group)
    return groups


@settings(max_examples=200, deadline=None)
@given(epochs())
def test_properties(epoch):
    (texts, images, owner), options = epoch
    order, group = compose_batches(texts, images, owner, **options)
    size, batch_size = options["group_size"], options["batch_size"]
    assert sorted(order.tolist()) == list(range(len(owner))), "every pair once"
    assert (group.diff() >= 0).all()
    assert (group.diff() <= 1).all(), "groups stand side by side"
    for number in range(int(group.max()) + 1):
        (positions,) = (group == number).nonzero(as_tuple=True)
        pairs = order[positions].long()
        assert len(pairs) <= size
        assert len(set(owner[pairs].tolist())) == len(pairs), "no image twice"
        assert len({int(position) // batch_size for position in positions}) == 1, "a batch has whole groups"
        for other in pairs[1:]:
            for earlier in pairs[: pairs.tolist().index(other)]:
                assert not is_own(owner, options.get("caption_id"), other, earlier), "no caption of another image"
                assert not is_own(owner, options.get("caption_id"), earlier, other)
        first = pairs[0]
        for other in pairs[1:]:
            assert other in texts[owner[first]] or owner[other] in images[first], "nothing that a guard left out"
    assert torch.equal(order, compose_batches(texts, images, owner, **options).order), "a function of its arguments"


@settings(max_examples=100, deadline=None)
@given(epochs())
def test_groups_are_those_of_a_slow_loop(epoch):
    """Only where groups are put together, one may be cut: its rest comes pair by pair."""
    (texts, images, owner), options = epoch
    order, group = compose_batches(texts, images, owner, **options)
    found = [order[group == number].tolist() for number in range(int(group.max()) + 1)]
    visited = random_order(len(owner), options["seed"], options["epoch"]).tolist()
    expected = slow_groups(texts, images, owner, options["group_size"], visited, options.get("caption_id"))
    is_cut = [slow for slow in expected if slow not in found]
    for slow in is_cut:
        assert any(slow[: len(part)] == part for part in found)
        assert len(slow) < options["group_size"], "a full group is never cut"


def test_a_group_takes_the_hardest_in_turn():
    """A text that is hard for the image, then an image that is hard for the text, whose first unused text comes."""
    text_image_id = torch.tensor([0, 1, 2, 3, 4])
    texts, images = torch.full((5, 2), -1, dtype=torch.int32), torch.full((5, 2), -1, dtype=torch.int32)
    first = int(random_order(5, 0, 0)[0])
    others = [pair for pair in range(5) if pair != first]
    texts[first], images[first] = torch.tensor(others[:2]), torch.tensor(others[2:])
    order, group = compose_batches(texts, images, text_image_id, group_size=4, batch_size=4)
    assert order[group == 0].tolist() == [first, others[0], others[2], others[1]]


def test_all_captions_of_an_image_are_compared():
    """The text of pair 2 equals the *other* caption of image 0: text 1, which is not in the group."""
    text_image_id, caption_id = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 3])
    texts, images = torch.tensor([[2, 3], [-1, -1], [-1, -1]]), torch.full((4, 1), -1)
    options = {"group_size": 2, "batch_size": 2}
    epochs = [compose_batches(texts, images, text_image_id, **options, seed=seed) for seed in range(20)]
    assert any({0, 2} <= set(epoch.order[epoch.group == 0].tolist()) for epoch in epochs)
    for seed in range(20):
        order, group = compose_batches(texts, images, text_image_id, **options, caption_id=caption_id, seed=seed)
        for number in range(int(group.max()) + 1):
            assert not {2} < {*order[group == number].tolist()}, "pair 2 is not hard for image 0 or pair 0"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_global_batch_holds_whole_groups_whatever_the_number_of_ranks(world_size):
    owner = torch.arange(NUM_IMAGES).repeat_interleave(2)
    texts = (2 * torch.arange(NUM_IMAGES)[:, None] + torch.tensor([2, 5, 9])) % len(owner)
    images = (owner[:, None] + torch.tensor([1, 4, 6])) % NUM_IMAGES
    _, group = compose_batches(texts, images, owner, group_size=3, batch_size=6)
    dataset, own_size = SeededDataset(tiny_pairs()), 6 // world_size
    options = {"shuffle": False, "num_replicas": world_size}
    ranks = [list(EpochSampler(dataset, own_size, lambda: (0, 0), rank=r, **options)) for r in range(world_size)]
    for batch in range(len(owner) // 6):
        positions = sorted(p for rank in ranks for p in rank[batch * own_size : (batch + 1) * own_size])
        numbers = group[positions]
        for number in set(numbers.tolist()):
            assert (numbers == number).sum() == (group == number).sum()
    assert (torch.bincount(group) == 3).any()


def test_groups_of_one_are_the_random_order():
    owner = torch.arange(NUM_IMAGES).repeat_interleave(2)
    table = torch.zeros(NUM_IMAGES, 1), torch.zeros(len(owner), 1)
    order, _ = compose_batches(*table, owner, group_size=1, batch_size=4, seed=3, epoch=2)
    sampler = EpochSampler(SeededDataset(tiny_pairs()), 4, lambda: (2, 0), seed=3)
    assert order.tolist() == list(sampler)


def test_where_nothing_was_mined_the_order_is_random_and_nobody_is_grouped():
    owner = torch.arange(9)
    nothing = torch.full((9, 2), -1)
    composed = compose_batches(nothing, nothing, owner, group_size=3, batch_size=3, seed=1, epoch=5)
    assert torch.equal(composed.order.long(), random_order(9, 1, 5))
    assert composed.grouped_fraction() == 0


class TestBadInput:
    @pytest.mark.parametrize(
        ("numbers", "message"),
        [
            ((0, 8, 99), "`group_size` to be at least 1, got 0"),
            ((9, 8, 99), r"`group_size` to divide 8, .* got 9. Choose one of \[1, 2, 4, 8\]"),
            ((3, 8, 99), r"`group_size` to divide 8, .* got 3"),
            ((4, 8, 7), "at least one batch of 8 pairs on all ranks together, got 7 pairs"),
        ],
    )
    def test_groups_that_do_not_fit(self, numbers, message):
        with pytest.raises(ValueError, match=message):
            check_group_size(*numbers)

    def test_a_table_of_another_set(self):
        with pytest.raises(ValueError, match="rows for 4 images and 4 texts, got 4 and 3"):
            compose_batches(torch.zeros(4, 2), torch.zeros(3, 2), torch.arange(4), group_size=2, batch_size=2)
