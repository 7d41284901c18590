"""Embeddings that are split over processes: what is mined is what one process mines with all of them, bit for bit."""

import pytest
import torch
from torch.nn.functional import normalize

from lightning_itm.mining import EncodedPairs, NegativeTable, find_negatives
from lightning_itm.mining.encoded import Division, SplitPairs, SplitRows
from lightning_itm.mining.search import fill_table, find_split_negatives, split

NUM_IMAGES, NUM_TEXTS, DIM = 83, 250, 6  # tiles of 16 rows: with 4 processes some have one more than others
GUARDS = [
    {},
    {"max_score": 0.6},
    {"rank_min": 3},
    {"absolute_margin": 0.1},
    {"relative_margin": 0.05, "rank_min": 2, "max_score": 0.8},
]
NAMES = "texts", "images", "text_scores", "image_scores"


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setitem(Division.blocks.__globals__["BLOCK_ROWS"], "cpu", 40)  # end in the middle of tiles and ranks


def rows_of_a_set(*, has_captions=False):
    """Return what EncodedPairs takes, rounded to half precision. Some vectors come many times, so that scores are equal."""
    text_image_id = torch.cat([torch.arange(NUM_IMAGES), torch.randint(0, NUM_IMAGES, (NUM_TEXTS - NUM_IMAGES,))])
    text_image_id = text_image_id[torch.randperm(NUM_TEXTS)]
    images, texts = (normalize(torch.randn(number, DIM)) for number in (NUM_IMAGES, NUM_TEXTS))
    images[50:60], texts[200:220], texts[7] = images[:10], texts[20:40], texts[20]
    image_is_valid, text_is_valid = torch.ones(NUM_IMAGES) > 0, torch.ones(NUM_TEXTS) > 0
    image_is_valid[[3, 51]] = text_is_valid[8] = False
    text_is_valid[80:120] = False  # a whole block
    caption_id = torch.randint(0, 90, (NUM_TEXTS,)) if has_captions else None
    return images.half(), texts.half(), text_image_id, image_is_valid, text_is_valid, caption_id


def whole(rows):
    images, texts, *rest = rows
    return EncodedPairs(images.float(), texts.float(), *rest)


def part(rows, rank=0, world_size=1):
    images, texts, *rest = rows
    divisions = Division(NUM_IMAGES, rank, world_size), Division(NUM_TEXTS, rank, world_size)
    return SplitPairs(*(SplitRows(side[d.own], d) for side, d in zip((images, texts), divisions, strict=True)), *rest)


def check_equal(mined, expected):
    for name in NAMES:
        values = getattr(expected, name)
        assert torch.equal(getattr(mined, name), values.int() if name in NAMES[:2] else values), name
    assert (mined.gap, mined.rejected_fraction) == (expected.gap, expected.rejected_fraction)


class TestDivision:
    @pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
    @pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 83, 250, 5000])
    def test_each_row_is_of_one_rank(self, num_rows, world_size):
        divisions = [Division(num_rows, rank, world_size) for rank in range(world_size)]
        tiles = [tile for division in divisions for tile in division.tiles(division.rank)]
        assert [row for tile in tiles for row in range(num_rows)[tile]] == list(range(num_rows))
        assert [row for division in divisions for row in range(num_rows)[division.own]] == list(range(num_rows))
        assert tiles == Division(num_rows).tiles(0), "the tiles are those of one process"
        blocks = Division(num_rows).blocks(torch.device("cpu"))
        assert [row for block in blocks for row in range(num_rows)[block]] == list(range(num_rows))

    def test_large_sets_have_tiles_for_many_ranks(self):
        rows = [len(range(10**8)[Division(10**8, rank, 8).own]) for rank in range(8)]
        assert max(rows) - min(rows) <= 16_384


@pytest.mark.parametrize("has_captions", [False, True])
@pytest.mark.parametrize("guards", GUARDS)
def test_one_process_mines_what_the_whole_search_does(guards, has_captions):
    rows = rows_of_a_set(has_captions=has_captions)
    check_equal(find_split_negatives(part(rows), 9, 5, **guards), find_negatives(whole(rows), 9, 5, **guards))


def test_more_negatives_than_there_are():
    rows = rows_of_a_set()
    expected = find_negatives(whole(rows), NUM_TEXTS + 3, NUM_IMAGES + 3, rank_min=2)
    assert (expected.texts[:, -1] == -1).all()
    check_equal(find_split_negatives(part(rows), NUM_TEXTS + 3, NUM_IMAGES + 3, rank_min=2), expected)


def test_several_rounds_of_anchors(monkeypatch):
    monkeypatch.setattr(split, "ROUND_BYTES", 1)  # one tile at a time
    rows = rows_of_a_set()
    check_equal(find_split_negatives(part(rows), 9, 5), find_negatives(whole(rows), 9, 5))


class TestFillTable:
    def table(self, num_images=NUM_IMAGES, num_texts=NUM_TEXTS):
        return NegativeTable(num_images, num_texts, texts_per_image=9, images_per_text=5)

    def test_writes_and_logs_what_the_whole_search_does(self):
        rows, tables = rows_of_a_set(), (self.table(), self.table())
        tables[1].is_pending = True
        for guards in ({}, {"rank_min": 1}, {"rank_min": 1}):  # the second changes a part, the third nothing
            expected = fill_table(tables[0], whole(rows), **guards)
            assert fill_table(tables[1], part(rows), rank=0, world_size=1, **guards) == expected
            assert torch.equal(tables[1].texts, tables[0].texts)
            assert torch.equal(tables[1].images, tables[0].images)
        assert expected["mining/changed_share"] == 0
        assert not tables[1].is_pending

    def test_rows_that_were_not_searched_are_empty(self):
        table = self.table(NUM_IMAGES + 5, NUM_TEXTS + 9)
        table.copy_(table.texts + 3, table.images + 3)
        fill_table(table, part(rows_of_a_set()))
        assert (table.texts[NUM_IMAGES:] == -1).all()
        assert (table.images[NUM_TEXTS:] == -1).all()


def _mine_in_process(rank, world_size, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    split.ROUND_BYTES = 2000  # some ranks have no tile in the last round
    for has_captions in (False, True):
        torch.manual_seed(0)
        rows = rows_of_a_set(has_captions=has_captions)
        for guards in GUARDS:
            mined = find_split_negatives(part(rows, rank, world_size), 9, 5, **guards)
            check_equal(mined, find_negatives(whole(rows), 9, 5, **guards))
            table = NegativeTable(NUM_IMAGES, NUM_TEXTS, texts_per_image=9, images_per_text=5)
            logs = fill_table(table, part(rows, rank, world_size), **guards)
            assert logs["mining/gap"] == mined.gap
            assert torch.equal(table.texts, mined.texts)
            assert torch.equal(table.images, mined.images)
    torch.distributed.destroy_process_group()


@pytest.mark.forks
@pytest.mark.parametrize("world_size", [2, 4])
def test_several_processes_mine_the_table_of_one(tmp_path, world_size):
    context = torch.multiprocessing.get_context("fork")
    arguments = [(rank, world_size, tmp_path) for rank in range(world_size)]
    processes = [context.Process(target=_mine_in_process, args=part) for part in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * world_size
