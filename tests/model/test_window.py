"""Sliding windows: what a query sees, in every backend, with documents, and from a cache that holds no more."""

import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import kernels, varlen
from model.cache import KVCache
from model.config import AttentionBackend, ModelConfig, seen_pairs
from model.context import Context
from model.documents import documents_of
from model.generate import Decoder
from model.init import initialise
from model.kernels import FLASH, causal_attention, obstacle, which_and_why
from model.transformer import Transformer
from tests.shapes import small

BACKENDS = [AttentionBackend.reference, AttentionBackend.sdpa, AttentionBackend.auto]
LENGTHS = {"shorter than the window": 5, "the window": 7, "longer": 23, "longer than several": 61}
HEADS = {"MHA": (4, 4), "GQA": (6, 2), "MQA": (4, 1)}
WINDOW = 7


def drawn(length, heads, number=2, width=8):
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(number, length, n, width, generator=generator) for n in (heads[0], heads[1], heads[1], heads[0])
    ]


def by_definition(q, k, v, window, document_BL):
    """Attention pair by pair: a query sees itself, and of its document the window - 1 tokens before it."""
    L, H, K = q.shape[1:]
    seen = torch.tensor(
        [
            [[row[query] == row[key] and query - window < key <= query for key in range(L)] for query in range(L)]
            for row in document_BL.tolist()
        ]
    )
    k, v = (x.repeat_interleave(H // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("blhk,bmhk->bhlm", q, k) / math.sqrt(K)
    return torch.einsum("bhlm,bmhk->blhk", scores.masked_fill(~seen.unsqueeze(1), -math.inf).softmax(-1), v)


def with_gradients(attend, q, k, v, weights):
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = attend(q, k, v)
    (out * weights).sum().backward()
    return [out.detach(), q.grad, k.grad, v.grad]


def assert_alike(got, want, near=1e-5):
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=near, atol=near)


def begins(*rows, length):
    found = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, starts in zip(found, rows, strict=True):
        row[list(starts)] = True
    return found


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("window", [1, 2, WINDOW, 30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_see_the_window_by_definition_in_value_and_gradient(monkeypatch, backend, window, length, heads):
    monkeypatch.setattr(varlen, "_FEWEST_QUERIES", 4)  # several pieces, the last of which is shorter
    tensors = drawn(length, heads)
    one = torch.zeros(2, length)
    expected = with_gradients(lambda q, k, v: by_definition(q, k, v, window, one), *tensors)
    assert_alike(with_gradients(lambda q, k, v: causal_attention(q, k, v, backend, None, window), *tensors), expected)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("window", [1, WINDOW])
@pytest.mark.parametrize("backend", BACKENDS)
def test_both_the_window_and_the_documents_borders_hold(monkeypatch, backend, window, heads):
    monkeypatch.setattr(varlen, "_FEWEST_QUERIES", 4)
    tensors = drawn(41, heads)
    begin = begins([3, 4, 11, 33], [20], length=41)  # documents shorter than the window, as long, and longer
    documents, document_BL = documents_of(begin), begin.cumsum(1)
    expected = with_gradients(lambda q, k, v: by_definition(q, k, v, window, document_BL), *tensors)
    got = with_gradients(lambda q, k, v: causal_attention(q, k, v, backend, documents, window), *tensors)
    assert_alike(got, expected)
    masked = with_gradients(lambda q, k, v: kernels.sdpa_masked(q, k, v, documents, window), *tensors)
    assert_alike(masked, expected)


def test_pieces_of_their_usual_size_see_the_window():
    """129 queries are two pieces, the first of which a window of 130 begins before; one of 600 makes longer pieces."""
    for length, window in ((129, 5), (300, 130), (700, 600)):
        tensors = drawn(length, (2, 1), number=1)
        one = torch.zeros(1, length)
        expected = with_gradients(lambda q, k, v, w=window, d=one: by_definition(q, k, v, w, d), *tensors)
        assert_alike(with_gradients(lambda q, k, v, w=window: varlen.in_window(q, k, v, w), *tensors), expected)


def test_on_a_cpu_a_token_is_multiplied_with_little_more_than_its_window():
    q, k, v, _ = drawn(4096, (2, 1), number=1)
    sizes = []
    attend = torch.nn.functional.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "torch.nn.functional.scaled_dot_product_attention",
            lambda q, k, *rest, **more: sizes.append(q.shape[2] * k.shape[2]) or attend(q, k, *rest, **more),
        )
        causal_attention(q, k, v, AttentionBackend.sdpa, None, 256)
    assert 256 * 4096 * 15 / 16 < sum(sizes) <= (256 + 128) * 4096


def flash_calls(monkeypatch, attend):
    """What flash-attn 2 and PyTorch's varlen kernel are called with."""
    asked = []

    def called(q, *rest, **options):
        asked.append((len(rest), options["window_size"]))
        return q

    module = SimpleNamespace(flash_attn_func=called, flash_attn_varlen_func=called)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", called)
    monkeypatch.setattr(kernels, "_activate", lambda name: None)
    attend()
    return asked


@pytest.mark.parametrize("backend", list(FLASH))
def test_flash_kernels_take_the_window_themselves(monkeypatch, backend):
    """The tokens to the left of a query are one less than the window, and none are to its right."""
    q, k, v, _ = drawn(20, (4, 2))
    documents = documents_of(begins([3], [], length=20))
    kernel = kernels.KERNELS[backend]
    found = flash_calls(
        monkeypatch, lambda: [kernel(q, k, v, of, window) for of in (None, documents) for window in (1, 7)]
    )
    whole = 2 if backend is AttentionBackend.flash2 else 6
    assert found == [(whole, (0, 0)), (whole, (6, 0)), (6, (0, 0)), (6, (6, 0))]
    assert flash_calls(monkeypatch, lambda: kernel(q, k, v, documents, None)) == [(6, (-1, 0))]


def test_whole_sequences_are_documents_where_only_their_kernel_takes_a_window():
    with torch.inference_mode():
        documents = kernels._whole_sequences(torch.zeros(3, 20, 4, 8))
    assert documents.borders.tolist() == [0, 20, 40, 60] and documents.longest == 20
    assert not documents.borders.is_inference()


def test_how_windows_are_kept_is_said(monkeypatch):
    config = small(window=7)
    said = which_and_why(config, torch.device("cpu"), torch.float32)
    assert "attention: sdpa, a window of 7 tokens in pieces of a sequence (" in said
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    asked = []
    monkeypatch.setattr(kernels, "obstacle", lambda one, device, dtype, documents, window: asked.append(window))
    said = which_and_why(config, torch.device("cuda"), torch.bfloat16, documents=True)
    assert "flash2, documents by its varlen kernel, a window of 7 tokens by its own kernel (" in said
    assert asked == [True]  # a flash-attn that runs, and fails with a window, is none


# ---- the model ----


def built(**changes):
    model = Transformer(small(2, **{"n_layers": 3, "window": 5, "window_pattern": "sf", **changes}))
    initialise(model, "", 3, 0.2)
    return model


def test_blocks_have_the_windows_of_the_pattern():
    def windows(pattern, n_layers=7):
        return small(n_layers=n_layers, window=5, window_pattern=pattern).windows

    assert windows(None) == (5,) * 7
    assert windows("ssf") == (5, 5, None, 5, 5, None, 5)
    assert windows("ffsssss") == (None, None, 5, 5, 5, 5, 5)
    assert small().windows == (None, None)
    assert [block.attention.window for block in built().blocks] == [5, None, 5]


def test_a_token_reaches_as_far_as_the_windows_of_all_blocks_together():
    model = built(n_layers=2, window_pattern=None, attention=AttentionBackend.sdpa)
    tokens = torch.arange(40).reshape(1, 40)
    with torch.no_grad():
        before = model(tokens)
        tokens[0, 10] += 1
        moved = (model(tokens) - before).abs().amax(-1)[0] > 0
    assert moved.nonzero().flatten().tolist() == list(range(10, 10 + 2 * 4 + 1))


def test_a_packed_document_is_computed_as_if_it_were_alone():
    model = built()
    tokens = torch.randint(300, (1, 40), generator=torch.Generator().manual_seed(0))
    packed = model(tokens, Context(documents_of(begins([12, 30], length=40))))
    alone = torch.cat([model(part) for part in tokens.split([12, 18, 10], dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", [None, "sf"])
@pytest.mark.parametrize("window", [1, 5, 11, 30])
@torch.no_grad()
def test_logits_from_a_cache_are_those_without(window, pattern):
    """Of prompts shorter than the window, as long, and longer, and of tokens that pass it afterwards."""
    model = built(window=window, window_pattern=pattern, max_seq_len=31)  # rotary positions have no end
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(300, (length,), generator=generator).tolist() for length in (3, 11, 5, 1, 20)]
    decoder = Decoder([model.embedding, *model.blocks, model.head], rows, 40)
    logits_BV = decoder.prefill()
    for step in range(14):
        for row, logits_V in zip(rows, logits_BV, strict=True):
            torch.testing.assert_close(logits_V, model(torch.tensor([row]))[0, -1], rtol=1e-5, atol=1e-5)
            row.append(7 * step % 300)
        logits_BV = decoder.step(torch.full((len(rows),), 7 * step % 300))
    held = sum(cache._k_BGMK.nbytes + cache._v_BGMK.nbytes for cache in decoder.caches)
    assert held == len(rows) * model.config.kv_cache_bytes(40, bytes_per_value=4)


def test_the_cache_of_a_window_holds_the_window_and_no_more():
    lengths_B = torch.tensor([2, 30])
    cache = KVCache(lengths_B, 10_000, window=8)
    cache.add(*torch.zeros(2, 2, 30, 2, 4, dtype=torch.bfloat16))
    for _ in range(20):
        cache.add(*torch.zeros(2, 2, 1, 2, 4, dtype=torch.bfloat16))
        lengths_B += 1
    assert cache._k_BGMK.nbytes + cache._v_BGMK.nbytes == 2 * 2 * 8 * 2 * 4 * 2
    assert KVCache(lengths_B, 6, window=8).size == 6


def test_the_cache_keeps_the_last_tokens_whatever_the_length_of_the_prompt():
    """The values are the positions; a row's places count from its beginning until the window is full."""
    lengths_B = torch.tensor([2, 4, 9, 13])
    cache = KVCache(lengths_B, 40, window=4)
    tokens = torch.arange(13.0).view(1, 13, 1, 1).expand(4, 13, 1, 1)
    cache.add(tokens, tokens)
    for _ in range(3):
        new = lengths_B.float().view(4, 1, 1, 1)
        cache.add(new, new)
        keys, values, there_B = cache.held()
        assert torch.equal(keys, values)
        for row, length in enumerate((lengths_B + 1).tolist()):
            held = sorted(keys[row, 0, : there_B[row], 0].tolist())
            assert held == list(range(max(0, length - 4), length))
        lengths_B += 1


# ---- arithmetic ----


def test_pairs_by_area_are_those_one_by_one_but_for_half_of_the_diagonal():
    for length, window in ((9, None), (9, 1), (9, 4), (9, 9), (9, 40), (1, 3)):
        pairs = sum(1 for query in range(length) for key in range(query + 1) if window is None or query - key < window)
        half = length / 2 if window is None or window >= length else window / 2
        assert seen_pairs(length, window) == pairs - half, (length, window)
    assert seen_pairs(0, 4) == seen_pairs(0) == 0


def test_flops_are_those_of_the_pairs_that_each_block_sees():
    config = ModelConfig(n_layers=3, d_model=64, n_heads=4, n_kv_heads=2, d_ff=160, vocab_size=300, max_seq_len=64)
    slid = replace(config, window=16, window_pattern="ssf")
    assert config.flops_per_token(16) == slid.flops_per_token(16)  # no sequence of 16 tokens feels it
    assert config.flops_per_token_whole_attention(16) == slid.flops_per_token_whole_attention(16)
    saved = config.flops_per_token(64) - slid.flops_per_token(64)
    assert saved == 3 * 2 * 4 * 4 * 16 * (64**2 / 2 - (16 * 64 - 16**2 / 2)) / 64
    assert slid.layer_flops(64)[1] == slid.layer_flops(64)[2] < slid.layer_flops(64)[3] == config.layer_flops(64)[3]
    whole = config.flops_per_token_whole_attention(64) - slid.flops_per_token_whole_attention(64)
    assert whole == 3 * 2 * 4 * 4 * 16 * (64 - 16)
    halved, counted_whole = slid.attention_flops([64, 64, 10])
    without = slid.flops_per_token(0)
    assert halved == 128 * (slid.flops_per_token(64) - without) + 10 * (slid.flops_per_token(10) - without)
    ends = [length * (slid.flops_per_token_whole_attention(length) - without) for length in (64, 64, 10)]
    assert counted_whole == sum(ends)
    assert slid.scaling_m(64) == config.scaling_m(64)


def test_flops_of_a_window_are_what_the_pieces_multiply_less_what_their_masks_hide():
    """A whole window for each token, forward and backward, in the cut that has nothing but window and mask."""
    config = small(2, n_layers=1, window=16, vocab_size=64, attention=AttentionBackend.reference)
    tokens = torch.zeros(1, 64, dtype=torch.int64, device="meta")
    with torch.device("meta"):
        model = Transformer(config)
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    masked = 12 * config.n_heads * config.d_head * (64 * 64 - 64 * 16)  # the reference multiplies all pairs
    assert counter.get_total_flops() - masked == 64 * config.flops_per_token_whole_attention(64)


def test_the_cache_is_counted_block_by_block():
    config = small(2, n_layers=3, window=16, window_pattern="ssf")
    each = 2 * 2 * 16 * 2
    assert config.kv_cache_bytes(64) == each * (16 + 16 + 64)
    assert config.kv_cache_bytes(10) == 10 * config.kv_cache_bytes_per_token() == each * 3 * 10


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(window=0), "model.window=0: must be at least 1"),
        (dict(window=64), "model.window=64: hides nothing in a context of model.max_seq_len=64"),
        (dict(window_pattern="sf"), "model.window_pattern=sf: says which blocks slide, and model.window=null"),
        (dict(window=4, window_pattern="sl"), "model.window_pattern=sl: is no word of s (sliding) and f (full)"),
        (dict(window=4, window_pattern=""), "model.window_pattern=: is no word"),
        (dict(window=4, window_pattern="ff"), "model.window_pattern=ff: has no s"),
        (
            dict(window=4, window_pattern="ffs"),
            "model.window_pattern=ffs: has 3 letters, and model.n_layers=2; 2 letters or fewer would work",
        ),
    ],
)
def test_impossible_windows_say_what_would_work(change, said):
    (problem,) = small(**change).problems()
    assert said in problem
    with pytest.raises(ValueError, match=r"model\.window"):
        Transformer(small(**change))


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", [*FLASH, AttentionBackend.sdpa])
def test_gpu_backends_see_the_window_as_the_definition_does(backend, dtype, documents):
    device = torch.device("cuda", 0)
    if reason := obstacle(backend, device, dtype, documents, True):
        pytest.skip(reason)
    tensors = [x.to(device, dtype) for x in drawn(300, (8, 2), width=64)]
    borders = documents_of(begins([1, 2, 70, 290], [150], length=300)).to(device) if documents else None
    for window in (1, 33, 128, 299):

        def attend(q, k, v, backend=backend, window=window):
            return causal_attention(q, k, v, backend, borders, window)

        exact = with_gradients(
            lambda q, k, v, run=attend: run(q, k, v, AttentionBackend.reference), *(x.double() for x in tensors)
        )
        near = 2e-2 if dtype is torch.bfloat16 else 1e-4
        largest = max(one.abs().max().item() for one in exact)  # a window of 1 gives queries no gradient
        for got, want in zip(with_gradients(attend, *tensors), exact, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=near, atol=near * largest)
