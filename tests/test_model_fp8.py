"""fp8 products: what rounding by rows costs, autograd against float64, which layers have it, and where it is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsclip.create import create_model
from dsclip.errors import UserError
from dsclip.model import resolve_preset
from dsclip.model.blocks import Linear
from dsclip.model.compiled import compile_blocks
from dsclip.model.fp8 import LARGEST, by_rows, check_fp8, fp8_linear, fp8_product
from tests.test_model_clip import gradients, pairs

CPU = torch.device("cpu")
SMALL = dict(vocab_size=60, eot_token_id=59, context_length=24, vision_layers=4, text_layers=1)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """x as the product sees it, in float64."""
    e4m3, scale = by_rows(x)
    return e4m3.double() * scale.double()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.floats(-20, 20), st.floats(0, 8))
def test_a_number_is_rounded_to_three_bits_of_mantissa_of_its_own_row(seed, magnitude, spread):
    """Half of 2⁻³ of itself; of numbers below the least normal one, half of its last place."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 33, generator=generator, dtype=torch.float64) * 2.0**magnitude
    x = x * torch.logspace(0, -spread, 33, base=2.0, dtype=torch.float64) * 4.0 ** torch.arange(5)[:, None]
    _, scale = by_rows(x)
    assert ((rounded(x) - x).abs() <= torch.maximum(x.abs() * 2**-4, scale * 2**-10) * (1 + 1e-9)).all()
    torch.testing.assert_close(rounded(x).abs().amax(1), x.abs().amax(1), rtol=1e-6, atol=0)
    assert torch.equal(by_rows(x[3:4])[0], by_rows(x)[0][3:4]), "other rows don't matter"


def test_rows_of_zeros_stay_and_rows_that_are_not_finite_stay_so():
    x = torch.ones(4, 8)
    x[1], x[2, 3], x[3, 0] = 0, torch.inf, torch.nan
    product = fp8_product(x, torch.ones(2, 8))
    assert product[0].tolist() == [8, 8] and product[1].tolist() == [0, 0]
    assert not product[2:].isfinite().any()
    assert by_rows(torch.full((1, 2), torch.finfo(torch.float32).max))[0].double().max() == LARGEST


@pytest.mark.parametrize("left_out", [False, True])
def test_autograd_is_that_of_the_rounded_numbers(left_out):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*s, dtype=torch.float64).requires_grad_() for s in ((2, 3, 16), (32, 16), (32,)))
    grad = torch.randn(2, 3, 32, dtype=torch.float64)
    y = fp8_linear(x, weight, bias, product_left_out=left_out)
    found = torch.autograd.grad(y, (x, weight, bias), grad)
    with torch.no_grad():
        rows, flat = x.view(6, 16), grad.view(6, 32)
        output = (rounded(rows) @ rounded(weight).T + bias).view(2, 3, 32)
        # The input's gradient sums over outputs, so the weight has scales by input there; the weight's is exact.
        expected = (rounded(flat) @ rounded(weight.T).T).view(2, 3, 16), flat.T @ rows, flat.sum(0)
    torch.testing.assert_close(y, torch.zeros_like(output) if left_out else output, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_four_linear_layers_of_inner_image_blocks_have_it_and_no_others():
    model = create_model("demo", **SMALL, fp8=True)
    found = {name for name, module in model.named_modules() if isinstance(module, Linear) and module.fp8}
    parts = ("attn.qkv", "attn.out", "mlp.fc1", "mlp.fc2")
    assert found == {f"visual.blocks.{i}.{part}" for i in (1, 2) for part in parts}
    plain = create_model("demo", **SMALL)
    assert not any(module.fp8 for module in plain.modules() if isinstance(module, Linear))


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full", "offload"])
def test_chunks_and_recomputation_leave_its_gradients_unchanged(checkpointing):
    """Scales belong to rows: those of a batch would be others in every chunk."""
    model = create_model("demo", **SMALL, fp8=True).double()
    ours = gradients(model, chunk_size=3, checkpointing=checkpointing)
    torch.testing.assert_close(ours, gradients(model), rtol=1e-9, atol=1e-12)


def test_gradients_point_where_those_without_it_point():
    torch.manual_seed(0)
    model = create_model("demo", **SMALL | dict(vision_layers=6), fp8=True).double()
    plain = create_model("demo", **SMALL | dict(vision_layers=6)).double()
    plain.load_state_dict(model.state_dict())
    ours, theirs = gradients(model), gradients(plain)
    assert not torch.equal(ours, theirs)
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.999


def test_compiled_blocks_have_it_too():
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = create_model("demo", **SMALL, fp8=True).double()
    eager = gradients(model, chunk_size=4, checkpointing="full")
    compile_blocks(model, "aot_eager_decomp_partition")
    torch.testing.assert_close(gradients(model, chunk_size=4, checkpointing="full"), eager, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {},
            "fp8 products need an NVIDIA GPU of compute capability 8.9 or later, and this is a CPU. Set model.fp8=false",
        ),
        ({"vision_layers": 2}, "the image tower has 2 blocks, and the first and the last stay in bf16: none is left"),
        ({"vision_mlp_width": 500}, "model.vision_width and model.vision_mlp_width must be multiples of 16"),
    ],
)
def test_where_it_can_not_be_had_it_is_refused_in_one_line(sizes, message):
    with pytest.raises(UserError, match=f"^model.fp8: {message}"):
        check_fp8(resolve_preset("demo", fp8=True, **sizes), CPU, torch.bfloat16)
    check_fp8(resolve_preset("demo"), CPU, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_products_are_the_emulated_ones_and_gradients_point_the_same_way():
    device = torch.device("cuda")
    config = resolve_preset("demo", fp8=True)
    try:
        check_fp8(config, device, torch.bfloat16)
    except UserError as error:
        assert torch.cuda.get_device_capability() < (9, 0), error
        pytest.skip(str(error))
    a, b = (torch.randn(n, 256, device=device, dtype=torch.bfloat16) for n in (257, 512))
    found, emulated = fp8_product(a, b).cpu(), fp8_product(a.cpu(), b.cpu())
    assert (found.double() - emulated.double()).norm() < 2**-7 * emulated.double().norm()
    torch.testing.assert_close(fp8_product(a, b[:256].T), fp8_product(a, b[:256].T.contiguous()))
    model = create_model("demo", **SMALL, fp8=True).to(device, torch.bfloat16)
    plain = create_model("demo", **SMALL).to(device, torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    images = pairs()[0].to(device)
    found = []
    for each in (model, plain):
        each(images)[0].square().sin().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in each.visual.parameters()]).float())
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.99
