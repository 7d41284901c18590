from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_itm.embeddings import EmbeddingPairs
from lightning_itm.memory_bank import MemoryBank
from lightning_itm.memory_bank.queue import in_order_of_one_process


def numbered(ids, dim=2):
    ids = torch.as_tensor(ids)
    return EmbeddingPairs(ids[:, None].expand(-1, dim).float(), -ids[:, None].expand(-1, dim).float(), ids, ids)


class TestMemoryBank:
    @given(size=st.integers(1, 9), batches=st.lists(st.integers(1, 9), max_size=8))
    def test_keeps_the_last_pairs(self, size, batches):
        bank, number = MemoryBank(size, 2), 0
        for batch in batches:
            batch = min(batch, size)
            bank.enqueue(numbered(range(number, number + batch)))
            number += batch
        kept = sorted(bank.image_id[bank.valid].tolist())
        assert kept == list(range(max(0, number - size), number))
        assert torch.equal(bank.image[bank.valid][:, 0].long(), bank.image_id[bank.valid])
        assert torch.equal(bank.text[bank.valid][:, 1].long(), -bank.image_id[bank.valid])
        assert bank.fill() == pytest.approx(len(kept) / size)

    def test_the_batch_comes_before_the_queue(self):
        bank = MemoryBank(3, 2)
        bank.enqueue(numbered([7, 8]))
        image, text, image_id, valid = bank.with_batch(numbered([4]))
        assert image_id.tolist() == [4, 7, 8, -1]
        assert valid.tolist() == [True, True, True, False]
        assert image[:, 0].tolist() == [4, 7, 8, 0]
        assert text[:, 0].tolist() == [-4, -7, -8, 0]

    def test_what_is_not_finite_stays_out(self):
        bank, pairs = MemoryBank(4, 2), numbered([1, 2, 3])
        bank.enqueue(numbered([9, 9, 9, 9]))
        pairs.image_embeddings[0, 1], pairs.text_embeddings[2, 0] = torch.nan, torch.inf
        *_, valid = bank.with_batch(pairs)
        assert valid.tolist() == [False, True, False, True, True, True, True]
        bank.enqueue(pairs)
        assert bank.image_id[bank.valid].tolist() == [2, 9]
        assert bank.image.isfinite().all()
        assert bank.text.isfinite().all()
        assert bank.num_refused == 2

    def test_holds_no_graph(self):
        bank = MemoryBank(4, 2)
        pairs = numbered([1, 2])
        pairs.image_embeddings.requires_grad_()
        bank.enqueue(pairs)
        assert not bank.image.requires_grad
        assert not bank.with_batch(pairs)[0].requires_grad

    def test_state_goes_on_where_it_was(self):
        bank, other = MemoryBank(5, 2), MemoryBank(5, 2)
        bank.enqueue(numbered(range(3)))
        other.load_state_dict(bank.state_dict())
        for each in (bank, other):
            each.enqueue(numbered(range(3, 7)))
        assert all(torch.equal(value, getattr(other, name)) for name, value in bank.named_buffers())

    def test_keeps_the_captions(self):
        bank, pairs = MemoryBank(3, 2), replace(numbered([4, 5]), caption_id=torch.tensor([7, 8]))
        bank.enqueue(pairs)
        assert bank.captions_with_batch(pairs).tolist() == [7, 8, 7, 8, -1]
        bank.enqueue(numbered([1, 2]))  # of a batch without captions: the places of 4 are taken
        assert bank.caption_id.tolist() == [-1, 8, -1]
        assert bank.captions_with_batch(numbered([1])) is None

    def test_a_state_of_an_older_version_has_no_captions(self):
        bank, other = MemoryBank(3, 2), MemoryBank(3, 2)
        bank.enqueue(numbered([4, 5]))
        other.enqueue(replace(numbered([1, 2]), caption_id=torch.tensor([7, 8])))
        state = bank.state_dict()
        del state["caption_id"]
        other.load_state_dict(state)
        assert other.image_id.tolist() == [4, 5, -1]
        assert other.caption_id.tolist() == [-1, -1, -1]
        del state["image_id"]
        with pytest.raises(RuntimeError, match="image_id"):
            other.load_state_dict(state)

    def test_bad_input(self):
        with pytest.raises(ValueError, match="`size` to be positive, got 0"):
            MemoryBank(0, 2)
        with pytest.raises(
            ValueError, match=r"at least one batch of all processes, 4 pairs, got a size of 3.*Raise `queue"
        ):
            MemoryBank(3, 2).enqueue(numbered(range(4)))
        with pytest.raises(ValueError, match="as wide as the queue's, 2, got 3"):
            MemoryBank(3, 2).enqueue(numbered([1], dim=3))


class TestInOrderOfOneProcess:
    @pytest.mark.parametrize("world_size", [1, 2, 3])
    def test_undoes_the_split_of_a_distributed_sampler(self, world_size):
        order = list(range(12))
        data = [
            torch.utils.data.DistributedSampler(order, world_size, rank, shuffle=False) for rank in range(world_size)
        ]
        gathered = numbered([index for rank in data for index in rank])
        pairs = in_order_of_one_process(replace(gathered, caption_id=gathered.image_id + 5), world_size)
        assert pairs.caption_id.tolist() == [index + 5 for index in order]
        assert pairs.image_id.tolist() == pairs.text_id.tolist() == order
        assert torch.equal(pairs.image_embeddings, numbered(order).image_embeddings)
        assert torch.equal(pairs.text_embeddings, numbered(order).text_embeddings)
