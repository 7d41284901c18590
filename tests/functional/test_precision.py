import pytest
import torch
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_itm import FalseNegativeSampler, InfoNCELoss, QuintupletLoss, SigmoidLoss, TripletLoss
from lightning_itm.embeddings import EmbeddingPairs, HardNegatives
from lightning_itm.functional import direction_scores, top_k_negatives
from lightning_itm.functional.precision import full_precision_products, products
from lightning_itm.memory_bank.agreement import Agreement
from lightning_itm.memory_bank.candidates import MemoryCandidates, MemoryDirection

NUM_ROWS, DIM = 128, 256
MKLDNN = getattr(torch.backends.mkldnn, "matmul", None)  # older PyTorch has no setting of its own there
ERROR = 1e-6  # of a float32 sum of a few hundred terms; products in bfloat16 are off by 1e-3


def low(name):
    """Allow products of less than float32, by the older or the newer setting."""
    if name == "older":
        torch.set_float32_matmul_precision("medium")
    elif not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this PyTorch has the older setting only")
    elif name == "inherited":
        torch.backends.cuda.matmul.fp32_precision = MKLDNN.fp32_precision = "none"
        torch.backends.fp32_precision = "tf32"
    else:
        torch.backends.cuda.matmul.fp32_precision, MKLDNN.fp32_precision = "tf32", "bf16"


def settings():
    try:
        older = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # once the newer ones are used
        older = None
    backends = torch.backends.cuda.matmul, MKLDNN
    return older, [getattr(part, "fp32_precision", None) for part in backends]


@pytest.fixture(params=["older", "newer", "inherited"])
def low_precision(request):
    before = [(part, part.fp32_precision) for part in _parts()]
    low(request.param)
    yield request.param
    torch.set_float32_matmul_precision("highest")
    for part, value in before:
        part.fp32_precision = value


def _parts():
    parts = torch.backends, torch.backends.cuda.matmul, MKLDNN
    return [part for part in parts if hasattr(part, "fp32_precision")]


def embeddings(dtype=torch.float32):
    a, b = (normalize(torch.randn(NUM_ROWS, DIM, dtype=torch.float64), dim=1) for _ in range(2))
    return a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()


DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@DEVICES
@pytest.mark.usefixtures("low_precision")
def test_products_and_their_gradients_are_float32(device):
    a, b = (part.detach().to(device).requires_grad_() for part in embeddings())
    wide_a, wide_b = (part.detach().double().requires_grad_() for part in (a, b))
    weight = normalize(torch.randn(NUM_ROWS, NUM_ROWS, device=device), dim=1)
    with torch.autocast(device, dtype=torch.bfloat16):
        result = products(a, b)
        (result * weight).sum().backward()
    expected = wide_a @ wide_b.T
    (expected * weight.double()).sum().backward()
    assert result.dtype == torch.float32
    for got, right in ((result, expected), (a.grad, wide_a.grad), (b.grad, wide_b.grad)):
        torch.testing.assert_close(got.double(), right, atol=ERROR, rtol=0)


class Watch(TorchDispatchMode):
    """Note what each product of matrices is allowed to be. Not every processor makes use of what it is allowed."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.mv.default, torch.ops.aten.bmm.default):
            self.seen.append((str(args[0].dtype), args[0].dtype == torch.float64 or is_full()))
        return func(*args, **(kwargs or {}))


def is_full():
    older, newer = settings()
    return older == ("highest", False) if newer[0] is None else set(newer) <= {"ieee", "none"}


@pytest.mark.parametrize("loss", [TripletLoss, QuintupletLoss, InfoNCELoss, SigmoidLoss])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.usefixtures("low_precision")
def test_every_product_of_a_loss_is_float32(loss, autocast):
    """Forward and backward, with negatives that were mined."""
    ids = torch.arange(NUM_ROWS)
    pairs = EmbeddingPairs(*embeddings(), ids, ids)
    texts, images = (part.detach().roll(1, 0) for part in (pairs.text_embeddings, pairs.image_embeddings))
    mined = HardNegatives(texts, images, ids.roll(1), images, texts, ids.roll(1))
    with Watch() as watch, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss()(pairs, hard=mined)["loss"].backward()
    assert set(watch.seen) == {("torch.float32", True)}
    assert len(watch.seen) >= 3  # a product for both directions, and two gradients of it


@pytest.mark.usefixtures("low_precision")
def test_every_product_of_the_memory_bank_is_float32():
    """Of what is learned from a batch, and of what is drawn for it."""
    ids = torch.arange(NUM_ROWS)
    pairs = EmbeddingPairs(*embeddings(), ids, ids)
    stored = EmbeddingPairs(*(part.detach() for part in embeddings()), ids, ids)
    valid = torch.ones_like(ids, dtype=torch.bool)
    memory = MemoryCandidates(
        *(stored.image_embeddings, stored.text_embeddings, ids, valid),
        positive=stored,
        sampler=FalseNegativeSampler(min_count=0),
        agreement=Agreement(),
    )
    for loss in (TripletLoss(), InfoNCELoss()):
        with Watch() as watch:
            loss(pairs, memory=memory)["loss"].backward()
        assert set(watch.seen) == {("torch.float32", True)}
        assert len(watch.seen) >= 10  # 3 of the loss, 1 of the statistics, 4 of the agreement, 2 of the candidates


@DEVICES
@pytest.mark.usefixtures("low_precision")
def test_scores_are_float32(device):
    """Those of the losses, and those of what draws from a memory bank."""
    a, b = (part.detach().to(device) for part in embeddings())
    ids = torch.arange(NUM_ROWS, device=device)
    expected = a.double() @ b.double().T
    of_batch = direction_scores(a, b, b, anchor_id=ids, candidate_id=ids).similarity
    of_bank = MemoryDirection(a, b, b, ids, ids, ids, 0).similarity()
    for scores in (of_batch, of_bank):
        torch.testing.assert_close(scores.double(), expected, atol=ERROR, rtol=0)


def test_the_settings_are_as_before(low_precision):
    before = settings()
    with full_precision_products():
        assert set(settings()[1]) <= {"ieee", "none", None}
    assert settings() == before
    if low_precision == "inherited":
        torch.backends.fp32_precision = "ieee"
        assert settings()[1] == ["ieee", "ieee"]


@DEVICES
@pytest.mark.usefixtures("low_precision")
@pytest.mark.parametrize("method", ["chunked", "grouped"])
def test_a_search_takes_every_setting(device, method):
    """Some raise when they are read after newer ones were set."""
    a, b = (part.detach().to(device) for part in embeddings())
    for guard in ({}, {"max_score": 2.0}):
        found = top_k_negatives(a, b, 5, method=method, **guard)
        expected = (a.double() @ b.double().T).topk(5, dim=1).values
        torch.testing.assert_close(found.scores.double(), expected, atol=ERROR, rtol=0)


def test_wider_and_narrower_types():
    """float64 stays, all others become float32, and a gradient has the type of its embedding."""
    for dtype, other, expected in (
        (torch.float64, torch.float32, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
    ):
        a, b = embeddings(dtype)[0], embeddings(other)[1]
        result = products(a, b)
        result.sum().backward()
        assert (result.dtype, a.grad.dtype, b.grad.dtype) == (expected, dtype, other)


def test_gradients_of_gradients():
    a, b = (part.detach()[:3, :4].clone().requires_grad_() for part in embeddings(torch.float64))
    assert torch.autograd.gradcheck(products, (a, b))
    assert torch.autograd.gradgradcheck(products, (a, b))
    assert torch.autograd.gradcheck(lambda x: products(x, x), a)


@pytest.mark.slow
@pytest.mark.usefixtures("low_precision")
def test_a_loss_may_be_compiled():
    ids = torch.arange(NUM_ROWS)
    pairs = EmbeddingPairs(*embeddings(), ids, ids)
    loss = InfoNCELoss()
    expected = loss(pairs)["loss"]
    assert torch.equal(torch.compile(loss, backend="eager")(pairs)["loss"], expected)
