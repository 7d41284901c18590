import torch

from lightning_itm import FalseNegativeSampler
from lightning_itm.memory_bank import Agreement, MemoryBank
from lightning_itm.memory_bank.diagnostics import memory_diagnostics
from tests.helpers.memory import make_pairs

NUM_PAIRS, DIM = 12, 32


def make_parts():
    torch.manual_seed(0)
    bank, sampler, agreement = MemoryBank(2 * NUM_PAIRS, DIM), FalseNegativeSampler(), Agreement()
    pairs = make_pairs(NUM_PAIRS, DIM, dtype=torch.float32, noise=0.1)
    bank.enqueue(pairs)
    sampler.observe(pairs)
    agreement.update(pairs, pairs)
    return bank, sampler, agreement


def test_values_are_those_of_the_parts():
    bank, sampler, agreement = make_parts()
    found = memory_diagnostics(bank, sampler, agreement, is_always_in=False)
    fit = sampler.statistics.fit()
    assert found["fill"] == 0.5
    assert found["in_loss"] == agreement.is_met
    assert found["live_in_stored"] == found["stored_in_stored"] == 1
    torch.testing.assert_close(found["cosine"], torch.tensor(1.0))
    assert found["num_positives"] == NUM_PAIRS
    for kind in ("positive", "negative"):
        assert found[f"{kind}_mean"] == getattr(fit, f"{kind}_mean")
        torch.testing.assert_close(found[f"{kind}_std"].square(), getattr(fit, f"{kind}_var"))
    assert found["positive_mean"] > found["negative_mean"]
    assert all(value.shape == () for value in found.values())


def test_a_bank_that_is_always_in():
    assert memory_diagnostics(*make_parts(), is_always_in=True)["in_loss"]


def test_what_is_logged_stays_what_it_was_at_its_step():
    """Loggers read values later, when the parts have gone on."""
    bank, sampler, agreement = make_parts()
    found = memory_diagnostics(bank, sampler, agreement, is_always_in=False)
    before = {name: value.clone() for name, value in found.items()}
    pairs = make_pairs(NUM_PAIRS, DIM, dtype=torch.float32, noise=1.0)
    bank.enqueue(pairs)
    sampler.observe(pairs)
    agreement.update(pairs, make_pairs(NUM_PAIRS, DIM, dtype=torch.float32))
    agreement.is_met.fill_(True)
    assert all(torch.equal(value, before[name]) for name, value in found.items())
