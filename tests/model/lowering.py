"""What torch.compile makes of a formula for an H100, on a machine without a GPU. Run it in a process of its own.

`model.fused.compiled` runs as it does in training, on fake tensors of a fake H100: Dynamo, AOTAutograd and Inductor, up
to the Triton code that Inductor would compile; `assembled` hands that to Triton and ptxas. Left out are Inductor's
pattern matcher, whose patterns (of attention) are traced on a real device, and the choice between configurations, which
is timed.
"""

import importlib.util
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses import FakeTensorMode

from model import fused, loss

BF16, FP32, INT64 = torch.bfloat16, torch.float32, torch.int64
# The 67B model (arXiv 2401.02954, table 2) on a micro-batch of one sequence.
B, L, D, F, H, G, K, V = 1, 4096, 8192, 22016, 64, 8, 128, 102400
N = B * L
Shape = tuple[tuple[int, ...], torch.dtype]


def _x(*shape: int, dtype: torch.dtype = BF16) -> Shape:
    return shape, dtype


def _of_tokens(x: Shape, dtype: torch.dtype = FP32) -> Shape:
    return (x[0][0],), dtype


X, W, RSTD, WIDE = _x(B, L, D), _x(D), _x(B, L, 1, dtype=FP32), _x(B, L, F)
LOGITS, TABLE = _x(N, V), _x(L, K // 2, dtype=FP32)
TOKENS, LABELS = _of_tokens(LOGITS), _of_tokens(LOGITS, INT64)
HEADS = _x(B, L, H, K), _x(B, L, G, K), TABLE, TABLE
POSITIONS = _x(B, L, dtype=INT64)

CASES: dict[str, tuple[Callable, Sequence]] = {
    "norm": (fused._normed, (X, W, 1e-6)),
    "norm backward": (fused._normed_gradient, (X, X, W, RSTD)),
    "add, norm": (fused._add_normed, (X, X, W, 1e-6)),
    "add, norm backward": (fused._add_normed_gradient, (X, X, X, W, RSTD)),
    "rotary": (fused._rotated, (*HEADS, None, False)),
    "rotary backward": (fused._rotated, (*HEADS, None, True)),
    "rotary at positions": (fused._rotated, (*HEADS, POSITIONS, False)),
    "SwiGLU": (fused._silu_mul, (WIDE, WIDE)),
    "SwiGLU backward": (fused._silu_mul_gradient, (WIDE, WIDE, WIDE)),
    "loss": (loss._row_sums, (LOGITS, LABELS)),
    "loss backward": (loss._overwrite, (LOGITS, LABELS, TOKENS, TOKENS, TOKENS)),
}
"""The formulas of a block and of the loss, with shapes of their tensors in the 67B."""

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 2**30,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    warp_size=32,
    shared_memory_per_block=48 * 2**10,
    shared_memory_per_block_optin=227 * 2**10,
    shared_memory_per_multiprocessor=228 * 2**10,
    L2_cache_size=50 * 2**20,
    is_integrated=False,
    clock_rate=1980000,
    memory_clock_rate=2619000,
    memory_bus_width=5120,
    gcnArchName="",
)


class _Driver:
    """What Triton asks of a device when it compiles for it."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_active_torch_device(self):
        return torch.device("cuda", 0)


class _Lowered(BaseException):
    """Carries Inductor's code out of the compilation, before it would be run."""

    def __init__(self, code: str):
        self.code = code


@contextmanager
def _h100():
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import compile_fx
    from triton.runtime.driver import driver

    driver.set_active(_Driver())
    of_cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: H100,
        "get_device_capability": lambda device=None: (9, 0),
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device="cuda": None,
        "synchronize": lambda device=None: None,
        "is_current_stream_capturing": lambda: False,
        "_lazy_init": lambda: None,
    }
    of_interface = {
        "is_available": lambda: True,
        "get_compute_capability": lambda device=None: 90,
        "get_device_properties": lambda device=None: H100,
        "current_device": lambda: 0,
    }
    of_worker = {name: of_interface[name] for name in ("get_device_properties", "current_device")}
    with ExitStack() as stack:

        def replaced(target, name, value):
            stack.enter_context(mock.patch.object(target, name, value))

        for name, value in of_cuda.items():
            replaced(torch.cuda, name, value)
        for target, functions in ((CudaInterface, of_interface), (CudaInterface.Worker, of_worker)):
            for name, value in functions.items():
                replaced(target, name, staticmethod(value))
        replaced(compile_fx, "get_cuda_device_context", lambda graph: nullcontext())
        # A PyTorch that is built for CUDA would ask the driver, which there is none of.
        replaced(torch.accelerator, "is_available", lambda: False)
        replaced(torch.accelerator, "current_device_index", lambda: 0)
        # Its Python binding looks for a device; the operator does not.
        replaced(torch.Tensor, "copy_", lambda self, src, _=False: torch.ops.aten.copy_.default(self, src))
        yield


def lowered(formula: Callable, inputs: Sequence, way: Callable = fused.compiled) -> str:
    """Inductor's code for a formula.

    Args:
        formula: of tensors and other values.
        inputs: its arguments, with a `Shape` in the place of each tensor.
        way: makes the compiled function.
    """
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    def stop(graph):
        found = graph.codegen()
        code = found[0] if isinstance(found, tuple) else found
        raise _Lowered(getattr(code, "value", code))

    settings = {
        "fx_graph_cache": False,
        "compile_threads": 1,
        "use_joint_graph_passes": False,
        "pattern_matcher": False,
    }
    with (
        _h100(),
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(GraphLowering, "compile_to_module", stop),
        config.patch(settings),
        torch.no_grad(),
    ):
        given = [torch.empty(one[0], dtype=one[1], device="cuda") if isinstance(one, tuple) else one for one in inputs]
        try:
            way(formula)(*given)
        except BaseException as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, _Lowered):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            return cause.code
    raise AssertionError("nothing was lowered")


def described(code: str) -> dict:
    """Of Inductor's code the names of its Triton kernels, the bytes of its buffers, and all that is not a kernel."""
    body = code[code.index("def call(") : code.index("runner = Runner")]
    buffers = {
        name: torch.Size(map(int, re.findall(r"\d+", shape))).numel() * getattr(torch, dtype).itemsize
        for name, shape, dtype in re.findall(r"(buf\d+) = empty_strided_cuda\(\((.*?)\), .*?, torch\.(\w+)\)", body)
    }
    returned = re.findall(r"buf\d+", body[body.rindex("return (") :])
    return {
        "kernels": re.findall(r"^\s+(triton_\w+)\.run\(", body, re.M),
        "scratch": sum(size for name, size in buffers.items() if name not in returned),
        "returned": [buffers[name] for name in returned if name in buffers],
        "others": re.findall(r"extern_kernels\.\w+|torch\.ops\.[\w.]+|aten\.\w+\(|\.copy_\(", body),
        "symbols": sorted(set(re.findall(r"\b[su]\d+\b", body))),
    }


def assembled(code: str) -> dict[str, int]:
    """Bytes of sm_90 machine code of each Triton kernel, in the first of its configurations."""
    import triton
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found = {}
    with (
        _h100(),
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None),
    ):
        for name, source in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.S):
            path = os.path.join(folder, f"{name}.py")
            with open(path, "w", encoding="utf-8") as file:
                file.write(source)
            spec = importlib.util.spec_from_file_location(name, path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            kernel = getattr(module, name)
            config, names = kernel.configs[0], kernel.fn.arg_names
            constants = {one: value for one, value in config.kwargs.items() if one in names}
            types = kernel.triton_meta["signature"]
            ast = ASTSource(
                kernel.fn,
                {one: "constexpr" if one in constants else types[one] for one in names},
                {(names.index(one),): value for one, value in constants.items()},
                dict(kernel.triton_meta["configs"][0]),
            )
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            made = triton.compile(ast, target=GPUTarget("cuda", 90, 32), options=options)
            found[name] = len(made.asm["cubin"])
    return found


# ---- formulas that are not as they should be, to see that this is noticed ----


def _two_passes(gate_BLF: torch.Tensor, up_BLF: torch.Tensor) -> torch.Tensor:
    return fused._silu_mul(gate_BLF, up_BLF) / up_BLF.abs().amax()


def _with_a_product(x_BLD: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
    return torch.mm(x_BLD.flatten(0, 1), weight_D.unsqueeze(1)) * 2


def _symbolic(formula: Callable) -> Callable:
    return torch.compile(formula, fullgraph=True)


def main(assemble: Sequence[str]) -> None:
    """Print what becomes of every case, and of those that are not as they should be, as JSON."""
    found = {}
    for name, (formula, inputs) in CASES.items():
        code = lowered(formula, inputs)
        found[name] = described(code)
        if name in assemble:
            found[name]["assembled"] = assembled(code)
    half = [(*one[0][:-1], one[0][-1] // 2) for one in (X, W)]
    narrow = [(shape, BF16) for shape in half]
    found["a second width"] = described(lowered(fused._normed, (*narrow, 1e-6)))
    found["two passes"] = described(lowered(_two_passes, (WIDE, WIDE)))
    found["with a product"] = described(lowered(_with_a_product, (X, W)))
    lowered(_two_passes, (X, X), _symbolic)
    found["a second width, symbolic"] = described(lowered(_two_passes, (WIDE, WIDE), _symbolic))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
