from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import normalize

from lightning_itm.embeddings import EmbeddingPairs
from lightning_itm.memory_bank.agreement import BEGUN, JOIN, LEAVE, MIN_STEPS, SMOOTHING, Agreement
from tests.helpers.memory import make_pairs, unit

NUM_PAIRS, DIM = 16, 32
IMAGE_ID = [0, 0, 1, 1, 2, 3, 4, 5]


def rotated(pairs, angle):
    """Another model that matches as well as the first, in a space of its own. Small angles: nearly the first."""
    skew = torch.zeros(DIM, DIM, dtype=torch.float64)
    skew[0::2, 1::2].fill_diagonal_(angle)
    turn = torch.matrix_exp(skew - skew.T)
    return EmbeddingPairs(pairs.image_embeddings @ turn, pairs.text_embeddings @ turn, pairs.image_id, pairs.text_id)


def strangers(pairs):
    """A model that knows nothing: images and texts anywhere."""
    return EmbeddingPairs(unit(len(pairs), DIM), unit(len(pairs), DIM), pairs.image_id, pairs.text_id)


def batch():
    return make_pairs(NUM_PAIRS, DIM, noise=0.05)


def followed(num_steps, make_stored, agreement=None):
    agreement = Agreement().double() if agreement is None else agreement
    for _ in range(num_steps):
        live = batch()
        agreement.update(live, make_stored(live))
    return agreement


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def hits_by_loops(queries, keys, image_id):
    """How often a query finds its own key before all keys of other images, in both directions."""
    found, ids = [], image_id.tolist()
    for a, b in ((queries, keys), (keys, queries)):
        for i, query in enumerate(a):
            others = [float(query @ b[j]) for j in range(len(b)) if ids[j] != ids[i]]
            found.append(all(float(query @ b[i]) > other for other in others))
    return sum(found) / len(found)


class TestUpdate:
    def test_one_step_equals_loops(self):
        live = make_pairs(8, DIM, image_id=IMAGE_ID, noise=1.2)
        stored = make_pairs(8, DIM, image_id=IMAGE_ID, noise=1.2)
        stored = EmbeddingPairs(
            normalize(live.image_embeddings + 0.2 * stored.image_embeddings, dim=1),
            normalize(live.text_embeddings + 0.2 * stored.text_embeddings, dim=1),
            live.image_id,
            live.text_id,
        )
        agreement = Agreement().double()
        agreement.update(live, stored)
        image, text, ids = live.image_embeddings, live.text_embeddings, live.image_id
        crossed = [
            hits_by_loops(image, stored.text_embeddings, ids),
            hits_by_loops(text, stored.image_embeddings, ids),
        ]
        expected = [
            hits_by_loops(image, text, ids),
            sum(crossed) / 2,
            hits_by_loops(stored.image_embeddings, stored.text_embeddings, ids),
        ]
        assert 0 < expected[0] < 1
        averaged = (1 - SMOOTHING) * torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(agreement.hits, averaged, atol=1e-7, rtol=0)
        torch.testing.assert_close(agreement.ratios(), averaged[1:] / averaged[0], atol=1e-6, rtol=0)
        cosine = torch.stack([(image * stored.image_embeddings).sum(1), (text * stored.text_embeddings).sum(1)]).mean()
        torch.testing.assert_close(agreement.mean_cosine(), cosine, atol=1e-6, rtol=0)

    def test_texts_of_the_same_image_are_no_rivals(self):
        """Two captions per image, equal to each other: neither is found first, and both count as found."""
        live = make_pairs(8, DIM, image_id=IMAGE_ID, noise=0.0)
        for embeddings in (live.image_embeddings, live.text_embeddings):
            embeddings[1], embeddings[3] = embeddings[0], embeddings[2]
        agreement = Agreement().double()
        agreement.update(live, live)
        torch.testing.assert_close(agreement.hits / agreement.weight, torch.ones(3, dtype=torch.float64))

    def test_texts_of_the_same_caption_are_no_rivals(self):
        """Two images of one caption, which a perfect model embeds alike."""
        pairs = make_pairs(8, DIM, noise=0.0)
        pairs.image_embeddings[1], pairs.text_embeddings[1] = pairs.image_embeddings[0], pairs.text_embeddings[0]
        captioned, agreements = replace(pairs, caption_id=torch.tensor([0, 0, 2, 3, 4, 5, 6, 7])), []
        for live in (pairs, captioned):
            agreements.append(Agreement().double())
            agreements[-1].update(live, pairs)
        kept, excluded = ((agreement.hits / agreement.weight).tolist() for agreement in agreements)
        assert kept == pytest.approx([6 / 8] * 3)
        assert excluded == pytest.approx([1] * 3)

    def test_values_that_are_not_finite_change_nothing(self):
        agreement = followed(MIN_STEPS, lambda live: live)
        before = {name: value.clone() for name, value in agreement.named_buffers()}
        for part in ("image_embeddings", "text_embeddings"):
            for value in (torch.nan, torch.inf):
                for spoils_live in (True, False):
                    live, stored = batch(), batch()
                    getattr(live if spoils_live else stored, part)[3, 1] = value
                    agreement.update(live, stored)
        assert all(torch.equal(value, before[name]) for name, value in agreement.named_buffers())
        assert agreement.is_met

    def test_under_autocast_it_compares_in_float32(self):
        live = make_pairs(NUM_PAIRS, DIM, dtype=torch.float32, noise=1.2)
        plain, autocast = Agreement(), Agreement()
        plain.update(live, live)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            autocast.update(live, live)
        assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), autocast.buffers(), strict=True))


class TestDecision:
    def test_joins_where_the_slow_copy_agrees(self):
        """After ``MIN_STEPS``, and no step earlier."""
        agreement = followed(MIN_STEPS - 1, lambda live: rotated(live, 0.05))
        assert not agreement.is_met
        agreement.update(live := batch(), rotated(live, 0.05))
        assert agreement.is_met
        assert not agreement.was_lost
        assert 0.9 < agreement.mean_cosine() < 1

    def test_stays_out_where_the_slow_copy_knows_nothing(self):
        agreement = followed(5 * MIN_STEPS, strangers)
        assert not agreement.is_met
        assert not agreement.was_lost  # it never was in
        assert (agreement.ratios() < 0.5).all()

    def test_stays_out_where_the_slow_copy_matches_in_a_space_of_its_own(self):
        """Stored pairs find each other, but live anchors do not find them."""
        agreement = followed(5 * MIN_STEPS, lambda live: rotated(live, 1.5))
        assert agreement.ratios()[1] > JOIN[1]
        assert agreement.ratios()[0] < LEAVE[0]
        assert not agreement.is_met

    def test_stays_out_while_the_live_model_finds_nothing(self):
        """The slow copy is as good as the model, so that both ratios are met. Both know nothing."""
        agreement = Agreement().double()
        for _ in range(5 * MIN_STEPS):
            live = EmbeddingPairs(unit(NUM_PAIRS, DIM), unit(NUM_PAIRS, DIM), *[torch.arange(NUM_PAIRS)] * 2)
            agreement.update(live, live)
        assert (agreement.ratios() == 1).all()
        assert agreement.hits[0] / agreement.weight < BEGUN
        assert not agreement.is_met

    def test_leaves_where_stored_embeddings_stop_matching(self):
        agreement = followed(MIN_STEPS, lambda live: live)
        assert agreement.is_met
        steps = 0
        while agreement.is_met:
            followed(1, strangers, agreement)
            steps += 1
            assert steps <= MIN_STEPS
        assert steps > 1  # one bad batch is no reason to leave
        assert agreement.was_lost
        followed(5 * MIN_STEPS, lambda live: live, agreement)
        assert agreement.is_met  # it comes back,
        assert agreement.was_lost  # and what happened stays on record

    def test_between_the_bounds_it_stays_as_it_is(self):
        """A bank that just joined must not leave with the next step, or the loss would flicker."""
        inside, outside = followed(MIN_STEPS, lambda live: live), followed(MIN_STEPS, strangers)
        for agreement in (inside, outside):
            ratios = [(join + leave) / 2 for join, leave in zip(JOIN, LEAVE, strict=True)]
            agreement.hits.copy_(agreement.weight * torch.tensor([1.0, *ratios]))
            agreement.update(live := batch(), live)  # a step later, both ratios are still between the bounds
            assert ((agreement.ratios() > torch.tensor(LEAVE)) & (agreement.ratios() < torch.tensor(JOIN))).all()
        assert inside.is_met
        assert not outside.is_met


def test_state_dict_round_trip():
    """A resumed run goes on bit for bit, also where the bank is just about to join."""
    first, other = followed(MIN_STEPS - 1, lambda live: rotated(live, 0.3)), Agreement().double()
    other.load_state_dict(first.state_dict())
    for each in (first, other):
        torch.manual_seed(1)
        followed(3, lambda live: rotated(live, 0.3), each)
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), other.buffers(), strict=True))
    assert other.is_met


def follow_on_rank(rank, folder, num_agreeing):
    """Stored embeddings agree on the first ranks alone."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(rank)
    agreement = followed(MIN_STEPS, (lambda live: live) if rank < num_agreeing else strangers)
    torch.save(agreement.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.forks
@pytest.mark.parametrize(("num_agreeing", "is_met"), [(1, False), (2, True)])
def test_two_ranks_decide_alike(num_agreeing, is_met, tmp_path):
    """Each sees its own pairs, and both act on the mean over the ranks."""
    mp.start_processes(follow_on_rank, (str(tmp_path), num_agreeing), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert bool(first["is_met"]) == is_met
    if num_agreeing == 1:
        assert first["hits"][1] / first["hits"][0] == pytest.approx(0.5, abs=0.1)


def test_matches_found_by_chance_are_no_agreement():
    """Four pairs of a model that knows nothing: one in four is found, and found again in its own copy."""
    agreement = Agreement().double()
    for _ in range(2 * MIN_STEPS):
        live = strangers(make_pairs(4, DIM))
        agreement.update(live, live)
    assert agreement.hits[0] / agreement.weight > BEGUN
    assert not agreement.is_met
