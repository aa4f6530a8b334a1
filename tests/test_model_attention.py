"""Attention by backend: the same numbers from each, the one that was asked for, and a refusal where it can't run."""

import contextlib
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsclip.create import create_model
from dsclip.errors import UserError
from dsclip.model import resolve_preset
from dsclip.model.attention import BACKENDS, attention, check_attention
from dsclip.model.attention_pool import AttentionPool
from dsclip.model.blocks import Attention
from dsclip.model.compiled import compile_blocks
from dsclip.plan.memory import towers
from tests.distributed.exactness_worker import ContrastiveEngine, Recipe, ds_config
from tests.distributed.launch import alone

CPU = torch.device("cpu")
ON_CPU = ["auto", "flash", "math"]
SMALL = dict(vocab_size=60, eot_token_id=59, context_length=24, vision_layers=2)
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def inputs(tokens: int, dtype=torch.float64, device="cpu", width=8):
    generator = torch.Generator().manual_seed(tokens)
    numbers = torch.randn(4, 2, 3, tokens, width, generator=generator, dtype=torch.float64)
    q, k, v, gradient = numbers.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32).to(device, dtype)
    return [x.detach().requires_grad_() for x in (q, k, v)], gradient


def reference(q, k, v, causal):
    """Vaswani et al. 2017, equation 1."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1) @ v


def output_and_gradients(function, qkv, gradient):
    output = function(*qkv)
    return [output, *torch.autograd.grad(output, qkv, gradient)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 300])  # `auto` on a CPU is plain products up to 256, then torch's kernel
@pytest.mark.parametrize("backend", ON_CPU)
def test_every_backend_is_softmax_attention(backend, tokens, causal):
    qkv, gradient = inputs(tokens)
    expected = output_and_gradients(lambda q, k, v: reference(q, k, v, causal), qkv, gradient)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        qkv, gradient = inputs(tokens, dtype)
        found = output_and_gradients(lambda q, k, v: attention(q, k, v, causal=causal, backend=backend), qkv, gradient)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [24, 256, 257])
@pytest.mark.parametrize("backend", [pytest.param(b, marks=needs_gpu) for b in BACKENDS])
def test_on_a_gpu_every_backend_is_softmax_attention(backend, tokens, causal):
    qkv, gradient = inputs(tokens, torch.bfloat16, "cuda", width=64)
    found = output_and_gradients(lambda q, k, v: attention(q, k, v, causal=causal, backend=backend), qkv, gradient)
    qkv = [x.detach().double().requires_grad_() for x in qkv]
    expected = output_and_gradients(lambda q, k, v: reference(q, k, v, causal), qkv, gradient.double())
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs).norm() < 2e-2 * theirs.norm()


class Fused(TorchDispatchMode):
    """The fused attention operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # otherwise torch runs nothing compiled beneath it

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(function):
            self.names.add(str(function).removeprefix("aten._scaled_dot_product_").split(".")[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", ["flash", "math"])
def test_the_towers_use_the_backend_that_the_model_says_and_keep_their_numbers(backend, compiled):
    torch._dynamo.reset()
    images, tokens = torch.randn(4, 3, 64, 64).double(), torch.randint(0, 58, (4, 24))
    tokens[:, 9] = 59
    found = []
    for name in ("auto", backend):
        torch.manual_seed(0)
        model = create_model("demo", **SMALL, attention=name).double()
        if compiled and name == backend:  # the other is the eager model that it must equal
            compile_blocks(model, "aot_eager_decomp_partition")
        with Fused() as fused:
            image, text = model(images, tokens, chunk_size=2, checkpointing="full")
            (image @ text.T).sin().sum().backward()
        found.append(torch.cat([image.flatten(), *(p.grad.flatten() for p in model.parameters())]))
    kernels = {"flash_attention_for_cpu", "flash_attention_for_cpu_backward"}
    assert fused.names == (kernels if backend == "flash" else set())
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("backend", [pytest.param(b, marks=needs_gpu) for b in ("auto", *BACKENDS)])
def test_on_a_gpu_pooling_by_attention_is_that_of_a_cpu(backend):
    torch.manual_seed(0)
    pool = AttentionPool(resolve_preset("demo", vision_width=256, vision_heads=4, vision_mlp_width=512))
    tokens, found = torch.randn(4, 49, 256), []
    for device, dtype, kernel in (("cpu", torch.float64, "auto"), ("cuda", torch.bfloat16, backend)):
        pool, x = pool.to(device, dtype), tokens.to(device, dtype).requires_grad_()
        pool.backend = kernel
        output = pool(x)
        (gradient,) = torch.autograd.grad(output.sin().sum(), x)
        found.append((output.detach().double().cpu(), gradient.double().cpu()))
    for exact, ours in zip(*found, strict=True):
        assert (ours - exact).norm() <= 0.03 * exact.norm()


@pytest.mark.parametrize("backend", ["cudnn", "efficient"])
def test_a_backend_that_can_not_run_is_refused_in_one_line(backend):
    config = resolve_preset("demo", attention=backend)
    with warnings.catch_warnings(), pytest.raises(UserError) as refused:
        warnings.simplefilter("error")
        check_attention(config, CPU, torch.float32)
    assert str(refused.value) == (
        f"model.attention={backend} can't compute the image tower's attention (17 tokens, heads of 32, float32) on a CPU: "
        "No viable backend for scaled_dot_product_attention was found. Choose another backend, or auto"
    )
    recipe = Recipe()
    with alone(), pytest.raises(UserError, match=f"model.attention={backend} can't"):
        ContrastiveEngine(recipe, ds_config(1, False, 1), resolve_preset("demo", attention=backend))


@pytest.mark.parametrize("backend", [*ON_CPU, *(pytest.param(b, marks=needs_gpu) for b in ("cudnn", "efficient"))])
def test_a_backend_that_can_run_is_not_refused(backend):
    device = CPU if backend in ON_CPU else torch.device("cuda")
    with contextlib.nullcontext() if device == CPU else torch.cuda.device(0):
        check_attention(resolve_preset("demo", attention=backend), device, torch.bfloat16)


def test_an_unknown_backend_is_named():
    with pytest.raises(UserError, match="model.attention is `flush`; choose from auto, flash, cudnn, efficient, math"):
        resolve_preset("demo", attention="flush")


@pytest.mark.parametrize("backend", ON_CPU)
def test_the_plan_knows_what_a_backend_saves(backend):
    config = resolve_preset("demo", attention=backend)
    tokens, width = 1 + config.patches, config.vision_width
    module = Attention(width, config.vision_heads, causal=False, text_layers=None, backend=backend).bfloat16()
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() // 2
        return tensor

    x = torch.randn(1, tokens, width, dtype=torch.bfloat16)
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()} | {x.untyped_storage().data_ptr()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module.mixed(x)
    found = sum(size for place, size in kept.items() if place not in weights) / tokens
    # Counted with the rest of the block: query, key and value, and a fourth tensor of their width, mostly the output.
    others = 3 * width if backend == "math" else 4 * width
    assert found - others == pytest.approx(towers(config, None)[0]._scores("cpu"), rel=0.02)
