"""The loss in place, whole and in pieces, against PyTorch's."""

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Barrier

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.config import Kernels
from model.loss import VocabularyShard, cross_entropy, head_loss, label_scores

EXECUTION_KEYS = [Kernels.plain, Kernels.compiled, Kernels.liger]
SHAPES = [(1, 5), (255, 37), (600, 1003)]


class Largest(TorchDispatchMode):
    """The most values in any tensor that was newly made."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.values = max(self.values, x.numel())
        return out


def logits_and_labels(rows, vocab_size, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, rows, vocab_size, generator=generator).mul(3).to(dtype)
    labels = torch.randint(vocab_size, (1, rows), generator=generator)
    labels[0, ::7] = -100
    return logits, labels


def pytorchs(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum") / labels.numel()


def of_all(loss, labels):
    """Over the number of all labels, ignored ones included, as `pytorchs`."""
    assert loss.total.dtype == torch.float64 and loss.count.dtype == torch.int64
    assert int(loss.count) == int((labels != -100).sum())
    return (loss.total / labels.numel()).float()


@pytest.mark.parametrize(("rows", "vocab_size"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", EXECUTION_KEYS)
def test_the_loss_and_its_gradient_are_pytorchs(way, rows, vocab_size, dtype):
    logits, labels = logits_and_labels(rows, vocab_size, dtype)
    results = []
    for loss in (pytorchs, lambda x, y: of_all(cross_entropy(x, y, kernels=way), y)):
        source = logits.clone().requires_grad_()
        value = loss(source * 1, labels)
        (value * 0.5).backward()
        results.append((value.detach(), source.grad.float()))
    (plain, plain_grad), (ours, our_grad) = results
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    rounding = {} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-8}
    torch.testing.assert_close(our_grad.to(dtype), plain_grad.to(dtype), **rounding)


@pytest.mark.parametrize(("rows", "vocab_size"), SHAPES)
@pytest.mark.parametrize("pieces", [1, 2, 4, 5])
@pytest.mark.parametrize("way", EXECUTION_KEYS)
def test_the_loss_in_pieces_is_the_same(way, pieces, rows, vocab_size):
    _, labels = logits_and_labels(rows, vocab_size)
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(1, rows, 12, generator=generator), torch.randn(vocab_size, 12, generator=generator)
    results = []
    for loss in (
        lambda x, w: pytorchs(x @ w.T, labels),
        lambda x, w: of_all(head_loss(x, w, labels, pieces, kernels=way), labels),
    ):
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        value = loss(*inputs)
        (value * 0.5).backward()
        results.append((value.detach(), *(one.grad for one in inputs)))
    for ours, plain in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", EXECUTION_KEYS)
def test_the_gradient_of_the_sum_is_softmax_less_one_hot_and_none_where_a_label_is_ignored(way):
    logits, labels = logits_and_labels(20, 31)
    whole, pieces = (logits.clone().requires_grad_() for _ in range(2))
    cross_entropy(whole * 1, labels, kernels=way).total.mul(3).backward()
    head_loss(pieces, torch.eye(31).requires_grad_(), labels, 4, kernels=way).total.mul(3).backward()
    counts = labels != -100
    expected = (logits.softmax(-1) - F.one_hot(labels.where(counts, 0), 31)) * 3 * counts.unsqueeze(-1)
    for gradient in (whole.grad, pieces.grad):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
        assert gradient[~counts].abs().max() == 0


def test_sums_and_counts_of_micro_batches_make_the_mean_of_all_that_count():
    logits, labels = logits_and_labels(40, 31)
    labels[0, 20:38] = -100
    halves = [cross_entropy(x, y) for x, y in zip(logits.split(20, 1), labels.split(20, 1), strict=True)]
    mean = sum(half.total for half in halves) / sum(half.count for half in halves)
    torch.testing.assert_close(mean.float(), F.cross_entropy(logits[0], labels[0]), rtol=1e-6, atol=0)
    torch.testing.assert_close(cross_entropy(logits, labels).mean, mean, rtol=1e-12, atol=0)
    nothing = cross_entropy(logits, torch.full_like(labels, -100))
    assert nothing.total.item() == 0 and nothing.count.item() == 0 and nothing.mean.isnan()


def test_a_long_sum_is_exact():
    logits = torch.zeros(1, 2**20, 2)
    total = cross_entropy(logits, torch.zeros(1, 2**20, dtype=torch.int64)).total.item()
    assert total == pytest.approx(2**20 * float(torch.tensor(2.0).log()), rel=1e-12)


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[[1e4, -1e4, 9.99e3]]])
    assert cross_entropy(logits, torch.tensor([[0]])).mean.item() == pytest.approx(4.54e-5, rel=1e-2)


def test_no_second_tensor_of_the_logits_size_is_made_and_the_gradient_overwrites_them():
    source, labels = logits_and_labels(4096, 200, torch.bfloat16)
    logits = source.requires_grad_() * 1
    before = logits.detach().clone()
    with Largest() as largest:
        loss = cross_entropy(logits, labels).mean
        (gradient,) = torch.autograd.grad(loss, logits)
    assert 0 < largest.values <= logits.numel() // 3
    assert gradient.data_ptr() == logits.data_ptr() and not torch.equal(logits.detach(), before)


def test_a_second_backward_pass_would_find_the_gradient_in_the_place_of_the_logits():
    source, labels = logits_and_labels(3, 5)
    loss = cross_entropy(source.requires_grad_() * 1, labels).total
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="one backward pass"):
        loss.backward()


def test_in_pieces_only_one_piece_of_the_logits_exists():
    _, labels = logits_and_labels(1024, 4000)
    x, weight = torch.randn(1, 1024, 8), torch.randn(4000, 8).requires_grad_()
    with Largest() as largest:
        head_loss(x.requires_grad_(), weight, labels, 8).mean.backward()
    assert largest.values == 1024 * 500


def test_in_pieces_large_logits_do_not_overflow_wherever_they_are():
    labels = torch.tensor([[3, 0]])
    for large in range(4):
        weight = torch.zeros(4, 1)
        weight[large] = 500.0
        x = torch.ones(1, 2, 1, requires_grad=True)
        loss = head_loss(x, weight.requires_grad_(), labels, 4).mean.float()
        torch.testing.assert_close(loss, pytorchs(x @ weight.T, labels))
        loss.backward()
        assert x.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "vocab_size"), [*SHAPES, (2048, 102400)])
@pytest.mark.parametrize("way", EXECUTION_KEYS)
def test_on_a_gpu_the_loss_in_bf16_is_pytorchs(way, rows, vocab_size):
    logits, labels = (one.cuda() for one in logits_and_labels(rows, vocab_size, torch.bfloat16))
    results = []
    for loss in (pytorchs, lambda x, y: of_all(cross_entropy(x, y, kernels=way), y)):
        source = logits.clone().requires_grad_()
        value = loss(source * 1, labels)
        value.backward()
        results.append((value.detach(), source.grad))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[1][1], results[0][1])


def of_all_shards(run, cuts):
    """What each shard finds, in a thread of its own; they meet wherever one reduces over all of them."""
    met, given = Barrier(len(cuts)), {}

    def reduced(index, how):
        def reduce(values):
            given[index] = values
            met.wait()
            result = how(torch.stack([given[other] for other in range(len(cuts))]))
            met.wait()
            return result

        return reduce

    def of(index):
        sums = reduced(index, lambda stacked: stacked.sum(0))
        return run(cuts[index], VocabularyShard(cuts[index].start, reduced(index, lambda x: x.amax(0)), sums))

    with ThreadPoolExecutor(len(cuts)) as threads:
        return list(threads.map(of, range(len(cuts))))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_labels_have_their_log_probability_and_are_the_likeliest_or_not(monkeypatch, shards, dtype):
    """On shards that each compute their own, in several pieces; of tokens that are equally likely, the first one is."""
    monkeypatch.setattr("model.loss._LOGITS", 1000)
    generator = torch.Generator().manual_seed(2)
    # Of small integers, so that logits are exact, and often the same.
    x, weight = (torch.randint(-3, 4, (rows, 8), generator=generator).to(dtype) for rows in (300, 301))
    logits = F.linear(x, weight).float()
    ties = (logits == logits.amax(1, keepdim=True)).sum(1) > 1
    assert ties.sum() > 30
    labels = logits.argmax(1).where(torch.arange(300) % 5 > 0, torch.randint(301, (300,), generator=generator))
    last_of_ties = 300 - logits.flip(1).argmax(1)
    labels = labels.where(~ties | (torch.arange(300) % 2 == 0), last_of_ties)
    starts = [0, 100, 200, 301] if shards > 1 else [0, 301]
    cuts = [slice(start, stop) for start, stop in pairwise(starts)]
    for scores, likeliest in of_all_shards(lambda cut, shard: label_scores(x, weight[cut], labels, shard), cuts):
        expected = logits.log_softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
        assert scores.dtype == torch.float32
        assert torch.equal(likeliest, logits.argmax(1) == labels)


def test_no_token_is_the_likeliest_where_logits_are_no_numbers():
    x = torch.full((2, 8), math.nan)
    scores, likeliest = label_scores(x, torch.ones(5, 8), torch.tensor([0, 3]))
    assert scores.isnan().all() and not likeliest.any()
