"""Documents and positions: a document that is packed with others is computed as if it were alone."""

import pytest
import torch

from model.batch import Batch
from model.cache import KVCache
from model.config import AttentionBackend
from model.context import Context
from model.init import initialise
from model.kernels import FLASH, causal_attention, chosen, which_and_why
from model.loss import cross_entropy
from model.transformer import Transformer
from tests.shapes import small

LENGTHS = [13, 19]
MASKING = [AttentionBackend.reference, AttentionBackend.sdpa]


def built(kv_heads, backend):
    config = small(kv_heads, attention=backend)
    model = Transformer(config)
    initialise(model, "", 3, 0.2)
    return model


def packed(config):
    """Two documents one after the other, and two that take turns, where a position is not one more than the last."""
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(config.vocab_size, (length,), generator=generator) for length in LENGTHS]
    short, long = LENGTHS
    numbers = torch.tensor([[0] * short + [1] * long, [0, 1] * short + [1] * (long - short)], dtype=torch.int32)
    tokens, positions = torch.empty(2, 2, sum(LENGTHS), dtype=torch.int64)
    for i, document in enumerate(documents):
        for row in range(2):
            tokens[row, numbers[row] == i] = document
            positions[row, numbers[row] == i] = torch.arange(len(document))
    return documents, tokens, Context(documents_BL=numbers, positions_BL=positions)


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("backend", MASKING)
def test_packed_documents_have_the_logits_and_gradients_that_they_have_alone(backend, kv_heads):
    model = built(kv_heads, backend)
    documents, tokens, context = packed(model.config)
    logits = model(tokens, context)
    alone = [model(document.unsqueeze(0))[0] for document in documents]
    for row, numbers in zip(logits, context.documents_BL, strict=True):
        for i, expected in enumerate(alone):
            torch.testing.assert_close(row[numbers == i], expected, rtol=1e-5, atol=1e-5)

    parameters = list(model.parameters())
    labels = tokens.roll(-1, 1)
    got = torch.autograd.grad(cross_entropy(logits, labels).total, parameters)
    numbers = context.documents_BL.flatten()
    total = sum(
        cross_entropy(torch.cat([alone[i]] * 2).unsqueeze(0), labels.flatten()[numbers == i].unsqueeze(0)).total
        for i in range(len(documents))
    )
    for one, other, parameter in zip(
        got, torch.autograd.grad(total, parameters), model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * other.abs().max().item(), msg=parameter[0])


@pytest.mark.parametrize("backend", MASKING)
def test_documents_without_positions_are_masked_and_keep_the_positions_of_the_sequence(backend):
    model = built(2, backend)
    _, tokens, context = packed(model.config)
    counted = torch.arange(tokens.shape[1]).expand_as(tokens)
    masked = model(tokens, Context(documents_BL=context.documents_BL))
    torch.testing.assert_close(masked, model(tokens, Context(context.documents_BL, counted)), rtol=0, atol=0)
    whole = model(tokens)
    border = LENGTHS[0]
    torch.testing.assert_close(masked[0, :border], whole[0, :border], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(masked[0, border:], whole[0, border:], atol=1e-2)


def test_documents_that_are_not_neighbours_are_told_apart_by_their_number_alone():
    # The same number after another document's is the same document, which an interval could not say.
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 6, heads, 8, generator=generator) for heads in (4, 2, 2))
    numbers = torch.tensor([[0, 0, 1, 0, 1, 1]])
    for backend in MASKING:
        out = causal_attention(q, k, v, backend, numbers)
        for number in (0, 1):
            own = numbers[0] == number
            alone = causal_attention(q[:, own], k[:, own], v[:, own], backend)
            torch.testing.assert_close(out[:, own], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", list(FLASH))
def test_flash_backends_refuse_documents_in_a_sentence_and_auto_takes_sdpa(backend):
    said = f"model.attention={backend.name}: .*; model.attention=sdpa would work"
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match=said):
        causal_attention(q, q, q, backend, torch.zeros(1, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match=said):
        which_and_why(small(attention=backend), torch.device("cuda"), torch.bfloat16, documents=True)
    taken, why = chosen(AttentionBackend.auto, torch.device("cuda"), torch.bfloat16, documents=True)
    assert taken is AttentionBackend.sdpa and "documents" in why


def test_a_whole_model_takes_no_cache():
    cache = KVCache(torch.tensor([0]), 4)
    with pytest.raises(AssertionError, match="one block"):
        built(2, AttentionBackend.sdpa)(torch.zeros(1, 4, dtype=torch.int64), Context(cache=cache))


@pytest.mark.parametrize("documents", [None, torch.zeros(2, 3, dtype=torch.int32)])
def test_a_batch_moves_as_one(documents):
    tokens = torch.arange(6).reshape(2, 3)
    batch = Batch(tokens, tokens + 1, documents).to(torch.device("meta"))
    assert batch.tokens.is_meta and batch.labels.is_meta
    assert batch.documents is None if documents is None else batch.documents.is_meta


@pytest.mark.gpu
def test_on_a_gpu_sdpa_masks_documents_as_the_definition_does():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 300, heads, 64, generator=generator).to("cuda", torch.bfloat16) for heads in (8, 2, 2))
    numbers = torch.arange(300, device="cuda").div(70, rounding_mode="floor").expand(2, 300)
    got = causal_attention(q, k, v, AttentionBackend.sdpa, numbers)
    exact = causal_attention(q.double(), k.double(), v.double(), AttentionBackend.reference, numbers)
    torch.testing.assert_close(got.double(), exact, rtol=2e-2, atol=2e-2)
