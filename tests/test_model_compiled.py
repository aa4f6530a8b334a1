"""Compiled layers: what blocks keep and compute again by the words users set, beside eager ones and beside the plan."""

import threading
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsclip.create import create_model
from dsclip.errors import UserError
from dsclip.model import Clip, resolve_preset
from dsclip.model.compiled import UncompiledWarning, compile_blocks, compile_embedding
from dsclip.model.layer_major import ChunkedPass
from dsclip.plan.estimate import recomputed
from dsclip.plan.memory import towers

# torch's partitioner without its code generator: the same graphs, run operation by operation.
PARTITIONED = "aot_eager_decomp_partition"
WORDS = ["none", "selective", "full", "offload"]
# More than 256 tokens: attention is torch's fused one, as on a GPU.
CONFIG = resolve_preset(
    "demo", image_size=272, patch_size=16, vision_width=256, vision_heads=4, vision_mlp_width=1024, vision_layers=1,
    text_layers=1, vocab_size=60, eot_token_id=59,
)  # fmt: skip
TOKENS, WIDTH = 1 + CONFIG.patches, 256


def clip(**sizes) -> Clip:
    torch.manual_seed(0)
    torch._dynamo.reset()
    return create_model("demo", vocab_size=60, eot_token_id=59, **sizes)


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products; attention's own are in an operator of its own."""

    multiplied = 0

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # otherwise torch runs nothing compiled beneath it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.multiplied += result.numel() * args[-1].shape[0]
        return result


def kept_and_recomputed(checkpointing: str, compiled: bool) -> tuple[float, float]:
    """Of one chunk through an image block: numbers kept a token, and products of weights computed again, of a forward's."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Clip(CONFIG)
    if compiled:
        compile_blocks(model, PARTITIONED)
    block = model.visual.blocks[0]
    chunks = [torch.randn(1, TOKENS, WIDTH).requires_grad_() for _ in range(2)]  # one chunk alone runs plainly
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    outputs = block(None, *chunks, chunked=ChunkedPass(checkpointing))
    torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])  # compiles
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = block(None, *chunks, chunked=ChunkedPass(checkpointing))
    with Products() as products:
        torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
    forward = 2 * TOKENS * 12 * WIDTH**2
    return sum(kept.values()) / (2 * TOKENS), products.multiplied / forward - 2


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpointing", WORDS)
def test_the_plan_knows_what_is_kept_and_computed_again(checkpointing, compiled):
    kept, again = kept_and_recomputed(checkpointing, compiled)
    device = "cuda" if compiled else "cpu"  # blocks are compiled on a GPU
    planned = towers(CONFIG, None)[0].block(checkpointing, device) / TOKENS
    if checkpointing == "offload":
        planned = 0  # copies aren't saved tensors
    assert kept == pytest.approx(planned, rel=0.05)
    assert again == pytest.approx(recomputed(checkpointing, device), abs=0.01)


@pytest.mark.parametrize("checkpointing", WORDS)
def test_compiled_gradients_are_those_of_eager_blocks(checkpointing):
    images, tokens = torch.randn(4, 3, 64, 64).double(), torch.randint(0, 58, (4, 24))
    tokens[torch.arange(4), torch.arange(4) + 9] = 59
    found = []
    for compiled in (False, True):
        model = clip(vision_layers=1, text_layers=1, context_length=24).double()
        if compiled:
            compile_blocks(model, PARTITIONED)
        image, text = model(images, tokens, chunk_size=2, checkpointing=checkpointing)
        (image @ text.T).sin().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-13)


def embeddings(model: Clip, dtype: torch.dtype) -> list[torch.Tensor]:
    """What a run does with an embedding: training with and without patch dropout, evaluation, chunks of several sizes."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for samples in (6, 5, 3, 8):
        images = torch.randint(0, 256, (samples, 3, 64, 64), dtype=torch.uint8, generator=generator)
        if dtype != torch.uint8:
            images = (images / 127.5 - 1).to(dtype)
        scores = torch.rand(samples, 16, generator=generator)
        for visible in (None, scores.topk(8).indices.sort().values):
            model.zero_grad()
            tokens = model.visual.embed(images, visible)
            tokens.sin().sum().backward()
            found += [tokens.detach(), *(p.grad for p in model.visual.embed.parameters())]
            with torch.no_grad():
                found.append(model.visual.embed(images, visible))
    return found


@pytest.mark.parametrize(
    ("pool", "dtype", "tolerance"), [("class", torch.uint8, 1e-6), ("average", torch.float64, 1e-12)]
)
def test_the_compiled_embedding_of_images_is_the_eager_one_in_a_few_versions(pool, dtype, tolerance):
    model = clip(vision_layers=1, text_layers=1, vision_pool=pool).double()
    eager = embeddings(model, dtype)
    compile_embedding(model.visual.embed, "inductor")
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UncompiledWarning)
        compiled = embeddings(model, dtype)
    # Each of training and evaluation, with patch dropout and without: for the first size, and for all others.
    assert 4 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


def text_lengths(model: Clip) -> int:
    """Captions of many lengths through the text tower, in training and without gradient; graphs compiled for them."""
    torch._dynamo.utils.counters.clear()
    for length in (8, 16, 32, 56, 77):
        tokens = torch.zeros(4, 77, dtype=torch.int64)
        tokens[:, length - 1] = 59
        model(None, tokens, chunk_size=2)[1].sum().backward()
        with torch.no_grad():
            model(None, tokens, chunk_size=2)
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_text_lengths_share_compiled_code():
    """One graph for the first length and one for all others, with and without gradient: both blocks, all five lengths."""
    model = clip(context_length=77)
    compile_blocks(model, PARTITIONED)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UncompiledWarning)
        assert text_lengths(model) <= 6


def test_a_limit_that_is_reached_is_told_and_the_numbers_stay():
    model = clip(context_length=77)
    compile_blocks(model, PARTITIONED, versions=1)
    with pytest.warns(UncompiledWarning, match="text_forward has been compiled for 1 kinds of input"):
        text_lengths(model)


def test_the_limit_holds_in_the_threads_in_which_a_gpu_runs_backward():
    model = clip(context_length=77)
    compile_blocks(model, PARTITIONED, versions=1)
    tokens = torch.zeros(4, 77, dtype=torch.int64)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for length in (8, 16, 32):
            tokens[:, length - 1] = 59
            loss = model(None, tokens, chunk_size=2, checkpointing="full")[1].sum()
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
            tokens.zero_()
    assert "text_forward_again has been compiled for 1 kinds" in " ".join(str(w.message) for w in said)


def test_without_a_compiler_blocks_run_as_they_are_unless_they_must_be_compiled():
    broken = torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",), "force_disable_caches": True})
    tokens = torch.zeros(4, 24, dtype=torch.int64)
    tokens[:, 7] = 59
    eager = clip(context_length=24)
    model = clip(context_length=24)
    compile_blocks(model)
    with broken, pytest.warns(UncompiledWarning, match="blocks run uncompiled.*C compiler"):
        found = model(None, tokens)[1]
    with warnings.catch_warnings():  # told once
        warnings.simplefilter("error")
        model(None, tokens)[1].sum().backward()
    assert torch.equal(found, eager(None, tokens)[1])
    torch._dynamo.reset()
    compile_blocks(model, required=True)
    with broken, pytest.raises(UserError, match="train.compile=on: torch.compile failed"):
        model(None, tokens)
