"""Products of tiles: split ones err less than features rounded to bf16 do, by the bound that is documented."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dsclip.losses import Pairs, sigmoid, softmax
from dsclip.losses.cross_entropy import CrossEntropy
from dsclip.losses.fused import split
from dsclip.losses.group import ALONE
from dsclip.losses.late_interaction import LateInteraction
from dsclip.losses.pairs import PLAIN
from dsclip.losses.products import Products, best_precision
from dsclip.losses.similarity import PRODUCTS, Cosine, row_products
from dsclip.losses.tiled import tiled_loss
from tests.test_losses import Case, unit

BOUND, BF16_BOUND, TF32_BOUND = 2**-15, 2**-7, 2**-10
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def summation(k):
    """What a float32 sum of 3·k products may round, of Σ|x·y|."""
    return 3 * k * 2**-24


def matrices(rows, inner, cols, seed, spread):
    """Entries over `spread` powers of two, of both signs."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        exponent = spread * (torch.rand(shape, generator=generator) - 0.5)
        return torch.randn(shape, generator=generator) * torch.exp2(exponent)

    return draw(rows, inner), draw(inner, cols)


@given(
    rows=st.integers(1, 40), inner=st.integers(1, 300), cols=st.integers(1, 40), seed=st.integers(0, 999),
    spread=st.sampled_from([0, 8, 60]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_a_split_product_errs_by_its_bound_and_less_than_rounded_features(rows, inner, cols, seed, spread):
    x, y = matrices(rows, inner, cols, seed, spread)
    exact, size = x.double() @ y.double(), x.double().abs() @ y.double().abs()
    products = Products("split")
    found = products.multiply(products.operand(x), products.operand(y)).double()
    assert ((found - exact).abs() <= (BOUND + summation(inner)) * size).all()
    transposed = products.multiply(products.operand(y).T, products.operand(x).T).double().T
    assert ((transposed - exact).abs() <= (BOUND + summation(inner)) * size).all()
    rounded = (x.bfloat16().double() @ y.bfloat16().double() - exact).norm()
    if spread == 0 and rows * cols >= 64:  # a few entries, or a few that outweigh the others, may be bf16 by chance
        assert (found - exact).norm() <= rounded / 16


def test_what_is_high_and_low_gives_the_whole_compiled_or_not():
    x = matrices(200, 50, 1, 0, 40)[0]
    for high, low in (split(x), torch.compile(split.__globals__["_split"])(x)):
        assert high.dtype == low.dtype == torch.bfloat16 and torch.equal(high, x.bfloat16())
        assert ((high.double() + low.double() - x).abs() <= 2**-17 * x.abs()).all()


class Counted(TorchDispatchMode):
    """Multiplications and additions of matrix products in this thread."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is torch.ops.aten.mm:
            self.operations += args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "similarity"), [("softmax", Cosine), ("filip", LateInteraction)])
def test_features_that_travelled_in_bf16_take_two_products_for_three_and_lose_nothing(name, similarity):
    case = Case(name, 1, 30, width=8, extras=False, dtype=torch.bfloat16)
    case.log_scale = case.log_scale.float()
    pairs = case.pairs(0)
    wide = replace(pairs, image=pairs.image.float(), text=pairs.text.float())
    exact = loss(replace(wide, image=wide.image.double(), text=wide.text.double()), "plain", similarity)
    operations = []
    for features in (pairs, wide):
        with Counted() as counted:
            found = loss(features, "split", similarity)
        operations.append(counted.operations)
        assert all(error(found, exact, field) <= 20 * BOUND for field in ("d_image", "d_text", "d_log_scale"))
    assert 3 * operations[0] == 2 * operations[1]


def test_products_are_added_to_what_is_there():
    x, y = matrices(5, 70, 6, 1, 8)
    total, before = torch.ones(5, 6), torch.ones(5, 6)
    products = Products("split")
    products.add(total, products.operand(x), products.operand(y))
    torch.testing.assert_close(total, before + products.multiply(products.operand(x), products.operand(y)))


def loss(pairs, precision, similarity=Cosine):
    return tiled_loss(
        pairs, similarity=lambda scratch: similarity(scratch, precision), criterion=CrossEntropy, negatives=PLAIN,
        group=ALONE, tile_entries=3000,
    )  # fmt: skip


def error(found, exact, name):
    x, y = getattr(found, name).double(), getattr(exact, name).double()
    return float((x - y).norm() / y.norm())


NAMES = ("loss", "d_image", "d_text", "d_log_scale")


@pytest.mark.parametrize("scale", [14.3, 100.0])
@pytest.mark.parametrize("width", [64, 512])
@pytest.mark.parametrize("seed", range(3))
def test_gradients_of_features_and_temperature_are_better_than_those_of_rounded_features(scale, width, seed):
    """A logit is off by at most s·2⁻¹⁵, so a weight by that share of itself; 64 times less than with rounded features."""
    image = unit(96, width, seed=seed, dtype=torch.float32)
    text = torch.nn.functional.normalize(image + 6 * unit(96, width, seed=seed + 9, dtype=torch.float32), dim=1)
    log_scale = torch.tensor(math.log(scale))
    pairs = Pairs(image, text, log_scale)
    exact = loss(Pairs(image.double(), text.double(), log_scale.double()), "plain")
    found, rounded = loss(pairs, "split"), loss(replace(pairs, image=image.bfloat16(), text=text.bfloat16()), "plain")
    assert abs(found.loss - exact.loss) <= scale * BOUND
    for name in ("d_image", "d_text", "d_log_scale"):
        assert error(found, exact, name) <= 2 * scale * BOUND
    for name in ("d_image", "d_text"):
        assert error(found, exact, name) <= error(rounded, exact, name) / 16


def test_token_wise_similarities_go_through_the_same_products():
    case = Case("filip", 1, 6, extras=False, dtype=torch.float32)
    exact = loss(Case("filip", 1, 6, extras=False).pairs(0), "plain", LateInteraction)
    plain = loss(case.pairs(0), "plain", LateInteraction)
    found = loss(case.pairs(0), "split", LateInteraction)
    assert not torch.equal(found.d_image, plain.d_image)
    assert all(error(found, exact, name) <= 10 * BOUND for name in NAMES)


def test_a_cpu_multiplies_plainly_and_float64_is_never_rounded():
    assert best_precision(torch.device("cpu")) == "plain"
    x, y = matrices(7, 30, 9, 3, 8)
    out = torch.empty(7, 9)
    products = Products()
    assert products.multiply(products.operand(x), products.operand(y), out=out) is out
    assert torch.equal(out, torch.mm(x, y))
    assert Products("split").operand(x.double()).dtype == torch.float64
    with pytest.raises(ValueError, match="the other isn't"):
        Products("split").multiply(Products("split").operand(x), y)


@pytest.mark.parametrize("precision", [pytest.param(p, marks=GPU) for p in ("plain", "tf32", "split")])
def test_on_a_gpu_every_precision_holds_its_bound(precision):
    x, y = (m.cuda() for m in matrices(500, 768, 700, 0, 8))
    exact, size = x.double() @ y.double(), x.double().abs() @ y.double().abs()
    products = Products(precision)
    bound = {"plain": 0, "tf32": 2 * TF32_BOUND, "split": BOUND}[precision] + summation(768)  # tf32 may cut, not round
    for out in (None, torch.empty(500, 700, device="cuda")):
        found = products.multiply(products.operand(x), products.operand(y), out).double()
        assert ((found - exact).abs() <= bound * size).all()
    total = torch.zeros(500, 700, device="cuda")
    products.add(total, products.operand(x), products.operand(y))
    assert ((total.double() - exact).abs() <= bound * size).all()
    long = products.multiply(products.operand(y.T.contiguous()), products.operand(y)).double()  # longer sums than rows
    assert ((long - y.double().T @ y.double()).abs() <= bound * (y.double().abs().T @ y.double().abs())).all()
    assert torch.backends.cuda.matmul.fp32_precision != "tf32", "put back"


@pytest.mark.parametrize("function", [pytest.param(f, marks=GPU) for f in (softmax, sigmoid)])
def test_on_a_gpu_a_loss_is_better_than_that_of_rounded_features(function):
    image, text = (unit(3001, 512, seed=seed, dtype=torch.float32).cuda() for seed in (0, 1))
    scalars = torch.tensor(math.log(100.0), device="cuda"), torch.tensor(-10.0, device="cuda")
    assert best_precision(image.device) == "split" or torch.cuda.get_device_capability() < (8, 0)
    found = function(Pairs(image, text, *scalars))
    exact = function(Pairs(image.double(), text.double(), *(x.double() for x in scalars)))
    rounded = function(Pairs(image.bfloat16(), text.bfloat16(), *scalars))
    for name in ("d_image", "d_text"):
        assert error(found, exact, name) <= error(rounded, exact, name) / 16
    assert error(found, exact, "d_log_scale") <= 200 * BOUND


@pytest.mark.parametrize("rows", [1, PRODUCTS, 2 * PRODUCTS + 3])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_products_of_more_rows_than_a_grid_has_places_are_those_of_each_row(rows, device):
    x, y = (torch.randn(rows, 2, 2, device=device, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(row_products(x, y), (x * y).sum((1, 2)))
    torch.testing.assert_close(row_products(x.float(), y.float()).double(), (x * y).sum((1, 2)), rtol=1e-5, atol=1e-5)
