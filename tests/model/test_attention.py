import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl

from model import kernels
from model.config import AttentionBackend
from model.documents import documents_of
from model.kernels import FLASH, causal_attention, chosen, obstacle

SHAPES = [(2, 17, 4, 4, 16), (2, 64, 6, 2, 32), (1, 130, 8, 1, 64), (3, 1, 4, 2, 16)]


def attend(backend, q, k, v, weights):
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = causal_attention(q, k, v, backend)
    (out.float() * weights).sum().backward()
    return [x.detach().float() for x in (out, q.grad, k.grad, v.grad)]


def inputs(shape, device="cpu", dtype=torch.float32):
    B, L, H, G, K = shape
    generator = torch.Generator().manual_seed(0)
    q, k, v, weights = (torch.randn(B, L, heads, K, generator=generator).to(device, dtype) for heads in (H, G, G, H))
    return q, k, v, weights.float()


@pytest.mark.parametrize("shape", SHAPES, ids=["mha", "gqa", "mqa", "one-token"])
@pytest.mark.parametrize("backend", [AttentionBackend.sdpa, AttentionBackend.auto])
def test_backends_agree_with_the_definition_in_value_and_gradient(backend, shape):
    tensors = inputs(shape)
    expected = attend(AttentionBackend.reference, *tensors)
    for got, want in zip(attend(backend, *tensors), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_the_definition_on_numbers_done_by_hand():
    # Two query heads share one key/value head. Position 0 sees itself; position 1 weighs both by softmax(q.k).
    q = torch.tensor([[[[0.0], [0.0]], [[1.0], [-1.0]]]])
    k = torch.tensor([[[[0.0]], [[1.0]]]])
    v = torch.tensor([[[[10.0]], [[20.0]]]])
    up = 1 / (1 + torch.exp(torch.tensor(-1.0)))  # softmax of (0, 1) on the second
    out = causal_attention(q, k, v, AttentionBackend.reference)
    expected = torch.tensor([[[[10.0], [10.0]], [[0.0], [0.0]]]])
    expected[0, 1, 0, 0] = 10 * (1 - up) + 20 * up
    expected[0, 1, 1, 0] = 10 * up + 20 * (1 - up)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("backend", [AttentionBackend.reference, AttentionBackend.sdpa])
def test_no_position_sees_a_later_one(backend):
    q, k, v, _ = inputs((1, 12, 4, 2, 16))
    before = causal_attention(q, k, v, backend)
    k[:, 7:] += 1.0
    v[:, 7:] += 1.0
    after = causal_attention(q, k, v, backend)
    torch.testing.assert_close(after[:, :7], before[:, :7])
    assert not torch.allclose(after[:, 7:], before[:, 7:])


def test_flash_where_it_cannot_run_says_why_and_auto_does_without():
    q, k, v, _ = inputs((1, 8, 4, 2, 16))
    for backend in FLASH:
        with pytest.raises(RuntimeError, match=rf"model.attention={backend.name}: .*GPU.*model.attention=auto"):
            causal_attention(q, k, v, backend)
    assert causal_attention(q, k, v, AttentionBackend.auto).shape == q.shape
    assert "16 bits" in (obstacle(AttentionBackend.flash2, torch.device("cuda"), torch.float32) or "")


@pytest.mark.parametrize(
    ("capability", "runs", "taken", "why"),
    [
        ((9, 0), {"flash2", "flash3", "flash4"}, "flash3", "fastest"),
        ((9, 0), {"flash2", "flash4"}, "flash4", "flash3 is not there"),
        ((9, 0), {"flash2"}, "sdpa", "flash3 is not there; flash4 is not there"),  # cuDNN's is faster there
        ((8, 0), {"flash2", "flash3", "flash4"}, "flash2", "fastest"),
        ((8, 0), set(), "sdpa", "flash2 is not there"),
    ],
)
def test_what_auto_takes_on_a_gpu_and_why(monkeypatch, capability, runs, taken, why):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr("model.kernels.obstacle", lambda b, *_: None if b.name in runs else f"{b.name} is not there")
    backend, reason = chosen(AttentionBackend.auto, torch.device("cuda"), torch.bfloat16)
    assert backend.name == taken and why in reason


def test_a_flash_attention_that_is_installed_and_fails_is_passed_over(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("model.kernels.find_spec", lambda name: name)  # there is no GPU to run it on
    reason = obstacle(AttentionBackend.flash3, torch.device("cuda", 0), torch.bfloat16)
    assert reason and reason.startswith("flash-attn 3 is installed and fails (")


@pytest.fixture
def pretended_flash3(monkeypatch):
    """A flash-attn 3 that can be registered with PyTorch on a machine without a GPU; a list of its removals."""
    removed = []
    handle = SimpleNamespace(remove=lambda: removed.append("FA3"))
    monkeypatch.setitem(torch.nn.attention._registry._FLASH_ATTENTION_IMPLS, "FA3", lambda: handle)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("model.kernels.find_spec", lambda name: name)
    randn = torch.randn
    monkeypatch.setattr("torch.randn", lambda *shape, device, **rest: randn(*shape, **rest))
    yield removed
    kernels._activate(None)


@pytest.mark.parametrize("fails", [True, False])
def test_a_probe_leaves_nothing_registered_in_the_place_of_pytorchs_own(pretended_flash3, monkeypatch, fails):
    registered = []

    def attention(q, k, v):
        registered.append(current_flash_attention_impl())
        if fails:
            raise RuntimeError("built for another GPU")
        return q

    monkeypatch.setattr("model.kernels._pytorchs", attention)
    reason = obstacle.__wrapped__(AttentionBackend.flash3, torch.device("cuda", 0), torch.bfloat16)
    assert ("built for another GPU" in reason) if fails else reason is None
    assert registered == ["FA3"] and pretended_flash3 == ["FA3"]
    assert current_flash_attention_impl() is None


def on_a_gpu():
    tensor = MagicMock(is_cuda=True, shape=(1, 2, 8, 16))
    tensor.transpose.return_value = tensor
    return tensor


@pytest.mark.parametrize("deterministic", [True, False])
def test_where_algorithms_must_be_deterministic_attention_is_asked_to_be(pretended_flash3, monkeypatch, deterministic):
    asked = {}

    def flash_attn_func(q, k, v, **options):
        asked["flash2"] = options["deterministic"]

    def flash_attn_varlen_func(q, k, v, *borders, **options):
        asked["flash2, documents"] = options["deterministic"]
        assert options["causal"] and borders == (documents.borders, documents.borders, 5, 5)
        return q

    def pytorchs(q, *given, **options):
        asked["sdpa"] = not torch.backends.cuda.cudnn_sdp_enabled()
        asked["own"] = current_flash_attention_impl() is None
        return q

    documents = documents_of(torch.arange(8).view(1, 8) == 3)
    flash2 = {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(**flash2))
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", pytorchs)
    monkeypatch.setattr("torch.are_deterministic_algorithms_enabled", lambda: deterministic)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    activate_flash_attention_impl("FA3")
    kernels.flash2(on_a_gpu(), on_a_gpu(), on_a_gpu(), None)
    kernels.flash2(on_a_gpu(), on_a_gpu(), on_a_gpu(), documents)
    kernels.sdpa(on_a_gpu(), on_a_gpu(), on_a_gpu(), None)
    assert asked == {"flash2": deterministic, "flash2, documents": deterministic, "sdpa": deterministic, "own": True}
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 128, 32, 32, 128), (1, 1000, 64, 8, 128), (1, 513, 8, 1, 64)])
@pytest.mark.parametrize("backend", [*FLASH, AttentionBackend.sdpa])
def test_gpu_backends_agree_with_the_definition_in_bf16(backend, shape):
    if reason := obstacle(backend, torch.device("cuda", 0), torch.bfloat16):
        pytest.skip(reason)
    tensors = inputs(shape, "cuda", torch.bfloat16)
    exact = attend(AttentionBackend.reference, *(x.double() for x in tensors))
    for got, want in zip(attend(backend, *tensors), exact, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * want.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [*FLASH, AttentionBackend.sdpa])
def test_gpu_backends_repeat_their_bits_where_algorithms_must_be_deterministic(backend):
    if reason := obstacle(backend, torch.device("cuda", 0), torch.bfloat16):
        pytest.skip(reason)
    tensors = inputs((2, 1000, 16, 2, 128), "cuda", torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        first = attend(backend, *tensors)
        for _ in range(5):
            assert all(torch.equal(one, other) for one, other in zip(attend(backend, *tensors), first, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_a_kernel_is_tried_backward_whoever_asks(without):
    with without():
        kernels._run_once(kernels.sdpa, torch.device("cpu"), torch.float32, True, True)
