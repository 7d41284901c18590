"""Strings in one tensor, which also reach other processes."""

from multiprocessing.reduction import ForkingPickler

import pytest
import torch

from lightning_itm.data.inputs.packed_strings import PackedStrings

STRINGS = [f"caption {i} \N{SNOWMAN}" for i in range(2_000)]


@pytest.mark.parametrize("is_mapped", [False, True])
def test_are_read_by_the_process_that_sent_them(tmp_path, is_mapped):
    """Sending moves tensors into shared memory and frees what held them."""
    packed = PackedStrings.pack(STRINGS)
    if is_mapped:
        torch.save((packed.data, packed.end), tmp_path / "packed.pt")
        packed = PackedStrings(*torch.load(tmp_path / "packed.pt", mmap=True))
    assert packed[5] == STRINGS[5]
    ForkingPickler.dumps(packed)
    _others = [torch.full((len(packed.data),), 255, dtype=torch.uint8) for _ in range(50)]  # takes over what was freed
    assert [packed[i] for i in range(len(STRINGS))] == STRINGS == list(packed)
