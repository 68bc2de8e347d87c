"""What lies between the matrices: every way of running it against the definition, in value and gradient."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from model.config import Kernels
from model.fused import add_rms_norm, chosen, compiled, rms_norm, rotary, silu_mul
from model.layers import rotary_tables

EPS = 1e-6
# (B, L, D or F): odd in every dimension, and one token.
SHAPES = [(2, 7, 48), (1, 1, 34), (3, 33, 130)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=[Kernels.plain, Kernels.compiled, Kernels.liger])
def way(request, monkeypatch):
    if request.param is Kernels.liger:
        pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
        if not torch.cuda.is_available():
            interpreted(monkeypatch)
    torch.compiler.reset()  # it gives up on a function that has met many shapes
    return request.param


def interpreted(monkeypatch):
    """What Triton's interpreter lacks: scalars, where it hands kernels a Python float, and CUDA's functions."""
    import numpy as np
    import triton.language as tl
    from liger_kernel.ops import fused_add_rms_norm as add_norm
    from liger_kernel.ops import rms_norm as norm_alone
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def converted(value):
        if isinstance(value, float):
            return tl.tensor(interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
        return convert(value)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    for module in (norm_alone, add_norm):
        monkeypatch.setattr(module, "rsqrt", lambda x: 1 / tl.sqrt(x))


def norm(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def turned(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def compared(definition, ours, inputs, dtype):
    """Both in value and in the gradient of a sum whose terms differ; the definition in fp64."""

    def run(function, inputs):
        inputs = [one.detach().clone().requires_grad_() for one in inputs]
        outputs = function(*[one * 1 for one in inputs])  # not leaves: some kernels write where they read
        total = sum(
            (out.double() * torch.arange(out.numel(), device=out.device).view_as(out).cos()).sum() for out in outputs
        )
        values = [out.detach().clone() for out in outputs]
        return values + list(torch.autograd.grad(total, inputs))

    inputs = [one.to(dtype) for one in inputs]
    expected = run(definition, [one.double() for one in inputs])
    for got, want in zip(run(ours, inputs), expected, strict=True):
        assert got.dtype == dtype
        largest = want.abs().max().item()
        rounding = (
            dict(rtol=1e-5, atol=1e-5 * largest) if dtype == torch.float32 else dict(rtol=2e-2, atol=1e-2 * largest)
        )
        torch.testing.assert_close(got.double(), want, **rounding)


def drawn(*shapes, device):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_all_agree_with_their_definitions(way, shape, dtype, device):
    if way is Kernels.liger and dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter has no bf16 of its own")
    B, L, D = shape
    x, y, weight = drawn(shape, shape, (D,), device=device)
    compared(lambda x, w: [norm(x, w)], lambda x, w: [rms_norm(x, w, EPS, way)], [x, weight], dtype)
    compared(
        lambda x, y, w: [x + y, norm(x + y, w)], lambda x, y, w: add_rms_norm(x, y, w, EPS, way), [x, y, weight], dtype
    )
    compared(lambda g, u: [F.silu(g) * u], lambda g, u: [silu_mul(g, u, way)], [x, y], dtype)
    q, k = drawn((B, L, 4, 16), (B, L, 2, 16), device=device)
    cos, sin = rotary_tables(L + 3, 16, 10000.0, torch.device(device))
    exact = [table[:L].double().unsqueeze(1) for table in (cos, sin)]
    compared(
        lambda q, k: [turned(q, *exact), turned(k, *exact)], lambda q, k: rotary(q, k, cos, sin, way), [q, k], dtype
    )
    positions = torch.randint(L + 3, (B, L), generator=torch.Generator().manual_seed(1)).to(device)
    exact = [table[positions].double().unsqueeze(2) for table in (cos, sin)]
    compared(
        lambda q, k: [turned(q, *exact), turned(k, *exact)],
        lambda q, k: rotary(q, k, cos, sin, way, positions),
        [q, k],
        dtype,
    )


def older(real, backend):
    """`torch.compile` before it took a limit of its own."""

    def compile(function, *, fullgraph, dynamic):
        return real(function, fullgraph=fullgraph, dynamic=dynamic, backend=backend)

    return compile


@pytest.mark.parametrize("version", ["with a limit", "without"])
def test_every_width_is_compiled_for_itself_however_many_and_on_whatever_thread(monkeypatch, version):
    shapes = []

    def backend(graph, inputs):
        assert all(isinstance(size, int) for one in inputs for size in one.shape)
        shapes.append(tuple(inputs[0].shape))
        return graph

    real = torch.compile
    monkeypatch.setattr(
        "torch.compile", partial(real, backend=backend) if version != "without" else older(real, backend)
    )
    torch.compiler.reset()
    function = compiled(lambda x: x * 2)
    widths = range(2, 2 + 3 * torch._dynamo.config.recompile_limit // 2)

    def run():
        for width in widths:
            for length in (3, 3):
                assert torch.equal(function(torch.ones(length, width)), torch.full((length, width), 2.0))

    with ThreadPoolExecutor(1) as pool:  # as autograd does; PyTorch's settings belong to the thread that changed them
        pool.submit(run).result()
    assert shapes == [(3, width) for width in widths]
    torch.compiler.reset()


def test_what_auto_takes_and_why(monkeypatch):
    assert chosen(Kernels.plain, "cpu") == (Kernels.plain, "model.kernels=plain")
    way, reason = chosen(Kernels.auto, "cpu")
    assert way is Kernels.plain and "CPU" in reason
    if find_spec("triton"):
        assert chosen(Kernels.auto, "cuda")[0] is Kernels.compiled
    monkeypatch.setattr("model.fused.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"model.kernels=liger: .* not installed"):
        chosen(Kernels.liger, "cuda")


def test_without_gradients_all_run_plain_and_the_same():
    x, weight = drawn((2, 5, 16), (16,), device="cpu")
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, EPS, Kernels.compiled), F.rms_norm(x, (16,), weight, EPS))
