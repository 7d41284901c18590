"""Compare the formulas of scale.py with what is measured on a few thousand pairs.

python benchmarks/scale.py --check
"""

import io
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import open_clip
import torch
from scale import LIST_BYTES, Plan
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from lightning_itm.functional import top_k_negatives
from lightning_itm.mining import NegativeTable, compose_batches
from lightning_itm.mining.training_embeddings import TrainingEmbeddings

SMALL = Plan(pairs=4096, gpus=4, dim=64)


def check() -> None:
    """Print formula and measurement side by side, and raise if one is off by more than it may be."""
    torch.manual_seed(0)
    print(f"{SMALL.pairs} pairs on {SMALL.gpus} ranks, dimension {SMALL.dim}")
    print(f"{'':48}{'formula':>16}{'measured':>16}")
    wrong = []
    for what, formula, measured, tolerance in measurements():
        print(f"{what:48}{formula:16,.0f}{measured:16,.0f}", flush=True)
        if abs(measured - formula) > tolerance * formula:
            wrong.append(what)
    if wrong:
        raise SystemExit(f"Expected the formulas to agree with what is measured, got others for: {', '.join(wrong)}.")
    print("All formulas agree with what was measured.")


def measurements() -> Iterator[tuple[str, float, float, float]]:
    """Yield what is measured, the value of its formula, the measured one, and the relative difference that is allowed."""
    image, text = (normalize(torch.randn(SMALL.pairs, SMALL.dim), dim=1) for _ in range(2))
    ids = torch.arange(SMALL.pairs)
    rows = TrainingEmbeddings(ids, SMALL.pairs)
    rows.update(image, text, ids)
    stored = rows.state_dict()
    yield "embeddings, half precision", SMALL.half_bytes(), stored["rows"].nbytes, 0
    yield "traffic per rank, keys in blocks", SMALL.traffic_bytes(), traffic(image, text), 0
    yield "operations of the products", SMALL.search_flops(), flops_of_products(image, text), 0
    yield "operations of top_k_negatives, twice", SMALL.search_flops(), flops_of_search(image, text), 0.05
    yield "operations of both towers, in 10^6", SMALL.pair_gflops * 1e3, flops_of_towers() / 1e6, 0.01
    first, second = SMALL.places
    table = NegativeTable(SMALL.pairs, SMALL.pairs, texts_per_image=first, images_per_text=second)
    yield "table, as a file", SMALL.table_bytes(), Path(table.path).stat().st_size, 0.001
    table.publish(*(near(places) for places in SMALL.places))
    order, lists = composed(table)
    yield "hard batches: order and groups", SMALL.order_bytes(), sum(part.nbytes for part in order), 0
    yield "hard batches: lists", LIST_BYTES * SMALL.pairs, lists, 0.05
    state = {"texts": table.texts, "images": table.images, "order": order[0]}
    yield "in a checkpoint: table and order", SMALL.checkpoint_bytes(), saved(state), 0.01
    yield "in a checkpoint: training embeddings", SMALL.training_rows_bytes(), saved(stored), 0.01


def near(places: int) -> Tensor:
    """Return a table of near pairs, int32 `(pairs, places)`."""
    step = torch.randint(1, 200, (SMALL.pairs, places))
    return ((torch.arange(SMALL.pairs)[:, None] + step) % SMALL.pairs).int()


def composed(table: NegativeTable) -> tuple[tuple[Tensor, Tensor], int]:
    """Return an epoch of hard batches, and the most bytes that its lists took at once."""
    tracemalloc.start()
    made = compose_batches(table.texts, table.images, torch.arange(SMALL.pairs), group_size=4, batch_size=64, epoch=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return (made.order, made.group), peak


def traffic(image: Tensor, text: Tensor) -> int:
    """Let the keys of both directions go round the ranks in blocks, and return the bytes that the first rank receives.

    Raises:
        RuntimeError: if the blocks together find other neighbours than a search of everything.
    """
    received = 0
    for anchors, keys in ((image, text), (text, image)):
        blocks, own = keys.half().chunk(SMALL.gpus), anchors.chunk(SMALL.gpus)[0]
        scores, index = torch.empty(len(own), 0), torch.empty(len(own), 0, dtype=torch.int64)
        for number, block in enumerate(blocks):
            received += block.nbytes if number else 0  # its own block is there
            values, places = (own @ block.float().T).topk(10)
            scores = torch.cat([scores, values], dim=1)
            index = torch.cat([index, places + number * len(block)], dim=1)
        merged = index.gather(1, scores.topk(10).indices)
        if not torch.equal(merged.sort().values, (own @ keys.half().float().T).topk(10).indices.sort().values):
            raise RuntimeError("Expected blocks to find what a search of everything finds, got other neighbours.")
    return received


def flops_of_products(image: Tensor, text: Tensor) -> int:
    """Count the operations of both similarity matrices."""
    with FlopCounterMode(display=False) as counter:
        image @ text.T
        text @ image.T
    return int(counter.get_total_flops())


def flops_of_search(image: Tensor, text: Tensor) -> int:
    """Count the operations of our search in both directions, the second looks of close calls among them."""
    with FlopCounterMode(display=False) as counter:
        top_k_negatives(image, text, SMALL.places[0])
        top_k_negatives(text, image, SMALL.places[1])
    return int(counter.get_total_flops())


def flops_of_towers() -> int:
    """Count the operations of a forward pass of ViT-B-32 and its text tower. No weights are needed for that."""
    model = open_clip.create_model("ViT-B-32", device="meta", load_weights=False)
    image, text = torch.zeros(1, 3, 224, 224, device="meta"), torch.zeros(1, 77, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(image, text)
    return int(counter.get_total_flops())


def saved(state: dict[str, Tensor]) -> int:
    """Return the bytes of a saved state."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.tell()
