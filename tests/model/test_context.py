"""A document that is packed with others is computed as if it were alone."""

import pytest
import torch
from torch.nn import functional as F

from model.batch import Batch
from model.cache import KVCache
from model.config import AttentionBackend, Kernels
from model.context import Context
from model.documents import documents_of
from model.init import initialise
from model.kernels import FLASH, causal_attention, chosen, obstacle, which_and_why
from model.loss import cross_entropy
from model.transformer import Transformer
from model.varlen import varlen
from tests.shapes import small

BACKENDS = [AttentionBackend.reference, AttentionBackend.sdpa, AttentionBackend.auto]
PACKINGS = {
    "two rows": [[13, 19], [32]],
    "of one token": [[1, 1, 30], [31, 1]],
    "a border at every position": [[1] * 32, [16, 16]],
}


def built(kv_heads, backend=AttentionBackend.auto, kernels=Kernels.auto):
    model = Transformer(small(kv_heads, attention=backend, kernels=kernels))
    initialise(model, "", 3, 0.2)
    return model


def packed(lengths, vocab_size=300):
    """Rows of documents of these lengths: tokens, labels, and where documents begin."""
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(vocab_size, (2, len(lengths), sum(lengths[0])), generator=generator)
    begins = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, of_row in enumerate(lengths):
        begins[row, torch.tensor([0, *of_row]).cumsum(0)[:-1]] = True
    return tokens, labels, documents_of(begins)


def each_alone(model, tokens, labels, lengths):
    """The logits of each document, (B, L, V), and the gradients of all labels, one document at a time."""
    logits, total = [], 0.0
    for row, expected, of_row in zip(tokens, labels, lengths, strict=True):
        parts = [model(document.unsqueeze(0))[0] for document in row.split(of_row)]
        logits.append(torch.cat(parts))
        total += F.cross_entropy(logits[-1], expected, reduction="sum")
    return torch.stack(logits), total, torch.autograd.grad(total, list(model.parameters()))


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_have_the_losses_and_gradients_that_they_have_alone(backend, lengths, kv_heads):
    model = built(kv_heads, backend)
    tokens, labels, documents = packed(lengths)
    expected, expected_total, expected_gradients = each_alone(model, tokens, labels, lengths)
    logits = model(tokens, Context(documents))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    total = cross_entropy(logits, labels).total
    torch.testing.assert_close(total, expected_total.double(), rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(total, list(model.parameters()))
    for (name, _), got, want in zip(model.named_parameters(), gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item(), msg=name)


def test_what_comes_before_a_document_does_not_reach_it_and_its_own_tokens_do():
    model = built(2)
    tokens, _, documents = packed([[13, 19], [32]])
    before = model(tokens, Context(documents))
    tokens[0, 12] += 1
    after = model(tokens, Context(documents))
    assert torch.equal(after[0, 13:], before[0, 13:]) and torch.equal(after[1], before[1])
    assert not torch.allclose(after[0, 12], before[0, 12])
    assert not torch.allclose(model(tokens)[0, 13:], before[0, 13:], atol=1e-2)  # without borders it does


@pytest.mark.parametrize("kernels", [Kernels.plain, Kernels.compiled])
def test_rotary_positions_begin_anew_with_each_document(kernels):
    # Rotary angles act on attention by their differences alone, so that the loss could not tell: the rotated keys can.
    model = built(2, kernels=kernels)
    tokens, _, documents = packed([[13, 19], [32]])
    rotated = []
    attend = causal_attention

    def keeping(q, k, *rest):
        rotated.append(k.detach())
        return attend(q, k, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.attention.causal_attention", keeping)
        model(tokens, Context(documents))
        model(tokens[:1, 13:])
    first, alone = rotated[0], rotated[len(model.blocks)]
    torch.testing.assert_close(first[:1, 13:], alone, rtol=1e-5, atol=1e-6)


def test_documents_by_where_they_begin():
    begins = torch.tensor([[False, False, True, False], [True, True, False, True]])
    documents = documents_of(begins)
    assert documents.positions_BL.tolist() == [[0, 1, 0, 1], [0, 0, 1, 0]]
    assert documents.borders.tolist() == [0, 2, 4, 5, 7, 8] and documents.borders.dtype is torch.int32
    assert documents.lengths == (2, 2, 1, 2, 1)
    assert documents.longest == 2
    assert not begins[0, 0]  # the argument is the caller's


@pytest.mark.parametrize("backend", list(FLASH))
def test_a_flash_backend_takes_documents_where_its_varlen_kernel_runs(monkeypatch, backend):
    """And where that one fails, though it runs without documents, its name is refused and auto goes on to the next."""
    monkeypatch.setattr(
        "torch.cuda.get_device_capability", lambda device: (9, 0) if backend.name != "flash2" else (8, 0)
    )
    device, dtype = torch.device("cuda", 0), torch.bfloat16
    fails = True

    def pretended(one, device, dtype, documents=False, window=False):
        return None if one is backend and not (documents and fails) else f"{one.name} fails"

    monkeypatch.setattr("model.kernels.obstacle", pretended)
    assert chosen(AttentionBackend.auto, device, dtype)[0] is backend
    assert chosen(AttentionBackend.auto, device, dtype, documents=True)[0] is AttentionBackend.sdpa
    with pytest.raises(
        RuntimeError, match=f"model.attention={backend.name}: {backend.name} fails; model.attention=auto"
    ):
        which_and_why(small(attention=backend), device, dtype, documents=True)
    fails = False
    assert chosen(AttentionBackend.auto, device, dtype, documents=True)[0] is backend
    said = which_and_why(small(attention=backend, kernels=Kernels.plain), device, dtype, documents=True)
    assert said.startswith(f"attention: {backend.name}, documents by its varlen kernel (")


@pytest.mark.parametrize("sees", ["documents", "window"])
def test_what_pytorch_would_mask_is_flash_attn_2s_on_hopper_too(monkeypatch, sees):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("model.kernels.obstacle", lambda b, *_: None if b.name == "flash2" else f"{b.name} fails")
    asked = AttentionBackend.auto, torch.device("cuda"), torch.bfloat16
    for missing, taken in (("is missing", AttentionBackend.flash2), (None, AttentionBackend.sdpa)):
        monkeypatch.setattr("model.kernels._no_varlen", lambda *_, missing=missing: missing)
        backend, why = chosen(*asked, **{sees: True})
        assert backend is taken and "flash3 fails; flash4 fails" in why
    monkeypatch.setattr("model.kernels._no_varlen", lambda *_: "is missing")
    assert chosen(*asked)[0] is AttentionBackend.sdpa


@pytest.mark.parametrize("told", [True, False])
def test_grouped_queries_are_said_to_a_varlen_kernel_that_asks(monkeypatch, told):
    """PyTorch 2.11's has no such argument."""
    asked = []

    def newer(q, k, v, *borders, window_size, enable_gqa=False):
        asked.append(enable_gqa)
        return q

    def older(q, k, v, *borders, window_size):
        asked.append(None)
        return q

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", newer if told else older)
    q, documents = torch.zeros(1, 4, 4, 8), documents_of(torch.zeros(1, 4, dtype=torch.bool))
    varlen(q, q[:, :, :2], q[:, :, :2], documents)
    varlen(q, q, q, documents)
    assert asked == ([True, False] if told else [None, None])


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        (None, "by PyTorch's varlen kernel ("),
        ("is missing", "by a mask of all pairs, since PyTorch's varlen kernel is"),
    ],
)
def test_sdpa_on_a_gpu_says_how_it_stops_at_borders(monkeypatch, fails, said):
    monkeypatch.setattr("model.kernels._no_varlen", lambda *_: fails)
    config = small(attention=AttentionBackend.sdpa, kernels=Kernels.plain)
    assert f"attention: sdpa, documents {said}" in which_and_why(config, torch.device("cuda"), torch.bfloat16, True)
    on_cpu = which_and_why(config, torch.device("cpu"), torch.float32, True)
    assert "documents one after another" in on_cpu
    assert "documents" not in which_and_why(config, torch.device("cpu"), torch.float32)


def test_a_whole_model_takes_no_cache():
    cache = KVCache(torch.tensor([0]), 4)
    with pytest.raises(AssertionError, match="one block"):
        built(2, AttentionBackend.sdpa)(torch.zeros(1, 4, dtype=torch.int64), Context(cache=cache))


@pytest.mark.parametrize("documents", [None, documents_of(torch.zeros(2, 3, dtype=torch.bool))])
def test_a_batch_moves_as_one(documents):
    tokens = torch.arange(6).reshape(2, 3)
    batch = Batch(tokens, tokens + 1, documents).to(torch.device("meta"))
    assert batch.tokens.is_meta and batch.labels.is_meta and batch.lengths == (3, 3)
    if documents is None:
        assert batch.documents is None
    else:
        assert batch.documents.positions_BL.is_meta and batch.documents.borders.is_meta
        assert batch.documents.lengths == (3, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", [*FLASH, AttentionBackend.sdpa])
def test_gpu_backends_stop_at_borders_as_the_definition_does(backend, dtype):
    device = torch.device("cuda", 0)
    if reason := obstacle(backend, device, dtype, True):
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(0)
    heads = (8, 2, 2, 8)
    *qkv, weights = (torch.randn(2, 300, n, 64, generator=generator).to(device, dtype) for n in heads)
    begins = torch.zeros(2, 300, dtype=torch.bool)
    begins[0, [1, 2, 70, 290]] = begins[1, 150] = True
    documents = documents_of(begins).to(device)

    def attend(backend, dtype):
        inputs = [x.detach().to(dtype).requires_grad_() for x in qkv]
        out = causal_attention(*inputs, backend, documents)
        (out * weights.to(dtype)).sum().backward()
        return [x.double() for x in (out, *(x.grad for x in inputs))]

    exact = attend(AttentionBackend.reference, torch.float64)
    near = 2e-2 if dtype is torch.bfloat16 else 1e-4
    for got, want in zip(attend(backend, dtype), exact, strict=True):
        torch.testing.assert_close(got, want, rtol=near, atol=near * want.abs().max().item())
