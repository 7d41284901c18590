import pytest
import torch

from lightning_itm.functional import OfflineScores, quintuplet_cost

POSITIVE, ONLINE_NEGATIVE, ONLINE_COST = torch.tensor([0.6, 0.6]), torch.tensor([0.5, 0.5]), torch.tensor([0.1, 0.1])


def offline(anchored, unanchored, *, mined=True, both_mined=True, matched=False):
    flags = (torch.tensor([flag, flag]) for flag in (mined, both_mined, matched))
    return OfflineScores(torch.tensor(anchored), torch.tensor(unanchored), *flags)


def cost(scores, **options):
    return quintuplet_cost(ONLINE_COST, scores, positive=POSITIVE, online_negative=ONLINE_NEGATIVE, **options)


def test_closed_form():
    """The weight is 1.5 where both negatives are equally hard, and 0.5 where the mined one is harder by `alpha`."""
    found = cost(offline([0.5, 0.8], [0.4, 0.7]))
    torch.testing.assert_close(found, torch.tensor([1.5 * 0.1, 0.5 * 0.1 + 0.2 + 0.1]))


def test_offline_margin():
    torch.testing.assert_close(
        cost(offline([0.5, 0.8], [0.4, 0.7]), offline_margin=0.3)[0], torch.tensor(0.15 + 0.2 + 0.1)
    )


@pytest.mark.parametrize(("as_published", "expected"), [(False, 0.0), (True, -0.05)])
def test_a_weight_below_zero(as_published, expected):
    """A mined negative that is far harder than that of the batch."""
    found = cost(offline([1.1, 1.1], [0.0, 0.0]), as_published=as_published)
    torch.testing.assert_close(found, torch.full((2,), expected + 0.5))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"mined": False, "both_mined": False}, 0.1),
        ({"both_mined": False}, 0.05 + 0.2),
        ({"matched": True}, 0.05 + 0.2),
        ({}, 0.05 + 0.2 + 0.3),
    ],
)
def test_what_was_not_mined_and_what_matches_has_no_term(flags, expected):
    torch.testing.assert_close(cost(offline([0.8, 0.8], [0.9, 0.9], **flags)), torch.full((2,), expected))
    if flags.get("matched"):
        found = cost(offline([0.8, 0.8], [0.9, 0.9], **flags), mask_matched=False)
        torch.testing.assert_close(found, torch.full((2,), 0.05 + 0.2 + 0.3))


def test_without_an_online_negative_the_weight_is_beta():
    scores = offline([0.8, 0.8], [0.0, 0.0])
    found = quintuplet_cost(
        ONLINE_COST, scores, positive=POSITIVE, online_negative=torch.full((2,), -torch.inf), beta=2.0
    )
    torch.testing.assert_close(found, torch.full((2,), 2.0 * 0.1 + 0.2))
