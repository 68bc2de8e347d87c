"""Heads grouped by what they hold: a model's function before they are merged, and what is lost when they are."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from model.head_groups import equal_groups, moments_of_rows, moments_of_weights, pairs, unpaired
from model.head_merge import Keys, Merge, Values
from model.regroup import Method, Regrouped, shares_of, steps_of
from model.transformer import Transformer, full_shapes
from tests.model.test_huggingface import Drawn, tokens
from tests.shapes import small

K = 16
BY_SIMILARITY = [method for method in Method if method.by_similarity]
SHAPES = {
    "MHA": small(8, n_heads=8, d_model=128),
    "GQA": small(4, n_heads=8, d_model=128),
    "windows": small(4, n_heads=8, d_model=128, window=9, window_pattern="sf"),
    "wide heads": small(4, head_dim=24),
}


class Changed:
    """Weights after a function of their names, such as `Merge.apply` of some blocks."""

    def __init__(self, source, change, **changes):
        self._source, self._change = source, change
        self.config = replace(source.config, **changes)

    def read(self, name):
        return self._change(name, self._source.read(name))


@torch.no_grad()
def logits(weights, rows_BL=None):
    model = Transformer(weights.config)
    model.load_state_dict({name: weights.read(name) for name in full_shapes(weights.config)})
    return model(tokens(weights.config) if rows_BL is None else rows_BL)


def orthogonal(generator, *shape):
    return torch.linalg.qr(torch.randn(*shape, generator=generator, dtype=torch.float64))[0]


def gauge(groups, d_head, generator, scaled=True):
    """A merge of groups of one head each that changes no function: turned and scaled pairs of keys, mapped values."""
    keys, values = [], []
    for _ in groups:
        made_RP = torch.randn(1, d_head // 2, generator=generator, dtype=torch.complex128)
        made_RP = made_RP + torch.sgn(made_RP) if scaled else torch.sgn(made_RP)
        keys.append(Keys(made_RP, 1 / made_RP))
        made_RKK = orthogonal(generator, 1, d_head, d_head) * (1.7 if scaled else 1.0)
        values.append(Values(made_RKK, torch.linalg.inv(made_RKK)))
    return Merge(groups, tuple(keys), tuple(values), 0.0, 0.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_heads_in_another_order_turned_and_mapped_compute_the_same(shape):
    """Queries, o_proj included, follow key/value heads wherever they go, through blocks with windows and without."""
    source, generator = Drawn(SHAPES[shape]), torch.Generator().manual_seed(3)
    config = source.config
    blocks = []
    for _ in range(config.n_layers):
        order = torch.randperm(config.n_kv_heads, generator=generator).tolist()
        assert order != sorted(order)
        blocks.append(gauge(tuple((head,) for head in order), config.d_head, generator))

    def change(name, weight):
        matrix = name.split(".")[-2]
        if matrix not in ("q_proj", "k_proj", "v_proj", "o_proj"):
            return weight
        return blocks[int(name.split(".")[1])].apply(matrix, weight, config.d_head)

    changed = Changed(source, change)
    assert not torch.equal(
        changed.read("blocks.1.attention.o_proj.weight"), source.read("blocks.1.attention.o_proj.weight")
    )
    torch.testing.assert_close(logits(changed), logits(source), rtol=1e-5, atol=3e-5)


def scrambled(kind, one, copies=2, seed=5):
    """A model whose key/value heads are those of another, each repeated and all of them shuffled, other in each block.

    The copies are equal, or differ by an orthogonal map of values and turns of pairs of keys, or by a scale as well.
    """
    generator, old = torch.Generator().manual_seed(seed), one.config.n_kv_heads
    new, blocks = old * copies, []
    for _ in range(one.config.n_layers):
        order = torch.randperm(new, generator=generator).tolist()
        merge = gauge(tuple((head,) for head in order), one.config.d_head, generator, scaled=kind is Method.svd)
        if kind is Method.similar:
            ones = torch.ones(1, one.config.d_head // 2, dtype=torch.complex128)
            eye = torch.eye(one.config.d_head, dtype=torch.float64)[None]
            merge = Merge(merge.groups, (Keys(ones, ones),) * new, (Values(eye, eye),) * new, 0.0, 0.0)
        blocks.append(merge)

    def change(name, weight):
        matrix = name.split(".")[-2]
        if matrix in ("k_proj", "v_proj"):
            weight = weight.unflatten(0, (old, -1)).repeat_interleave(copies, dim=0).flatten(0, 1)
        if matrix in ("q_proj", "k_proj", "v_proj", "o_proj"):
            return blocks[int(name.split(".")[1])].apply(matrix, weight, one.config.d_head)
        return weight

    return Changed(one, change, n_kv_heads=new), [merge.groups for merge in blocks]


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("copies", [2, 4])
@pytest.mark.parametrize("method", BY_SIMILARITY)
def test_copies_in_scrambled_order_are_found_and_merged_without_loss(method, copies, by_rows):
    """Where the mean of neighbours, and the next simpler method, lose."""
    source, orders = scrambled(method, Drawn(small(8 // copies, n_heads=8, d_model=128)), copies)
    rows_BL = tokens(source.config)
    expected, new = logits(source), 8 // copies
    merged = Regrouped(source, new, method, rows_BL=rows_BL if by_rows else None)
    for merge, order in zip(merged.merges, orders, strict=True):
        of_copy = [head // copies for (head,) in order]  # whose copy the source's head at each place is
        assert all(len({of_copy[head] for head in group}) == 1 for group in merge.groups)
        assert merge.lost_keys < 1e-6 and merge.lost_values < 1e-6
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    simpler = {Method.similar: Method.mean, Method.aligned: Method.similar, Method.svd: Method.aligned}[method]
    for other in (Method.mean, simpler):
        assert (logits(Regrouped(source, new, other)) - expected).abs().max() > 0.02


@pytest.mark.parametrize("method", BY_SIMILARITY)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_merged_and_what_is_no_attention_stays(shape, method):
    source = Drawn(SHAPES[shape])
    for kv_heads in steps_of(source.config.n_kv_heads, 1):
        merged = Regrouped(source, kv_heads, method)
        for name, size in full_shapes(merged.config).items():
            weight = merged.read(name)
            assert weight.shape == size and weight.isfinite().all()
            if ".attention." not in name:
                assert torch.equal(weight, source.read(name))
        for merge in merged.merges:
            assert sorted(head for group in merge.groups for head in group) == [*range(source.config.n_kv_heads)]
            assert 0 < merge.lost_keys < 1 and 0 < merge.lost_values < 1


def test_the_mean_of_alike_heads_is_the_mean_of_neighbours_after_the_heads_have_moved():
    """In bf16 too: moving rounds nothing."""
    drawn = Drawn(small(4))
    source = Changed(drawn, lambda name, weight: weight.bfloat16())
    merged = Regrouped(source, 2, Method.similar)
    for block, merge in enumerate(merged.merges):
        order = [head for group in merge.groups for head in group]
        for which, dim in (("qkv.q", 0), ("qkv.k", 0), ("qkv.v", 0), ("o", 1)):
            name = f"blocks.{block}.attention.{which}_proj.weight"
            moved = source.read(name).unflatten(dim, (4, K)).index_select(dim, torch.tensor(order))
            if which[-1] in "kv":
                moved = moved.unflatten(0, (2, 2)).float().mean(1).bfloat16()
            assert torch.equal(merged.read(name), moved.flatten(dim, dim + 1))


def test_each_method_loses_less_of_what_heads_hold_than_the_simpler_one():
    source, rows_BL = Drawn(SHAPES["MHA"]), tokens(SHAPES["MHA"])
    for rows in (None, rows_BL):
        for kv_heads in (4, 2, 1):
            merges = [Regrouped(source, kv_heads, method, rows_BL=rows).merges for method in BY_SIMILARITY]
            for similar, aligned, svd in zip(*merges, strict=True):
                assert similar.lost_keys > aligned.lost_keys > svd.lost_keys
                assert similar.lost_values > aligned.lost_values > svd.lost_values


def test_what_is_said_to_be_lost_is_lost():
    """The moments' arithmetic against the keys and values of the weights themselves."""
    source = Drawn(SHAPES["GQA"])
    for method in BY_SIMILARITY:
        merged = Regrouped(source, 2, method)
        for block, merge in enumerate(merged.merges):
            lost, whole = torch.zeros(2), torch.zeros(2)
            k, v, new_k, new_v = (
                weights.read(f"blocks.{block}.attention.qkv.{which}_proj.weight").unflatten(0, (-1, K))
                for weights in (source, merged)
                for which in "kv"
            )
            for new, (group, keys, values) in enumerate(zip(merge.groups, merge.keys, merge.values, strict=True)):
                for at, head in enumerate(group):
                    read_k = unpaired(keys.read_RP[at].to(torch.complex64)[:, None] * pairs(new_k[new]))
                    read_v = values.read_RKK[at].float() @ new_v[new]
                    lost += torch.stack([(k[head] - read_k).square().sum(), (v[head] - read_v).square().sum()])
                    whole += torch.stack([k[head].square().sum(), v[head].square().sum()])
            assert (lost / whole).tolist() == pytest.approx([merge.lost_keys, merge.lost_values], rel=1e-4)


def test_svd_errs_as_little_as_any_matrix_of_that_rank():
    """In what o_proj makes of values, and in the scores of each rotary pair, by Eckart and Young's theorem."""

    def uneven(name, weight):  # queries of one head are larger than those of another
        return weight * torch.arange(1.0, 129.0)[:, None] if "q_proj" in name else weight

    source = Changed(Drawn(SHAPES["GQA"]), uneven)
    merged = Regrouped(source, 1, Method.svd)
    shape = {"q": (4, 2, K, 128), "k": (4, K, 128), "v": (4, K, 128)}
    for block, merge in enumerate(merged.merges):
        where = f"blocks.{block}.attention"
        q, k, v = (source.read(f"{where}.qkv.{which}_proj.weight").reshape(shape[which]) for which in "qkv")
        o_DGSK, new_o_DGSK = (one.read(f"{where}.o_proj.weight").reshape(128, 4, 2, K) for one in (source, merged))
        new_k, new_v = (merged.read(f"{where}.qkv.{which}_proj.weight") for which in "kv")
        products = torch.einsum("dgsk,gkc->gsdc", o_DGSK, v).reshape(-1, 128)
        made = torch.einsum("dgsk,kc->gsdc", new_o_DGSK, new_v)  # one group keeps the order of its heads
        error = products - made.reshape(-1, 128)
        least = torch.linalg.svdvals(products)[K:].square().sum()
        torch.testing.assert_close(error.square().sum(), least, rtol=1e-4, atol=0)
        weight_GP1 = pairs(q).abs().square().sum((1, 3)).sqrt()[:, :, None]
        scores_PGD = (weight_GP1 * pairs(k)).transpose(0, 1)
        read_GPD = merge.keys[0].read_RP.to(torch.complex64)[:, :, None] * pairs(new_k)
        error = scores_PGD - (weight_GP1 * read_GPD).transpose(0, 1)
        least = torch.linalg.svdvals(scores_PGD)[:, 1:].square().sum()
        torch.testing.assert_close(error.abs().square().sum(), least, rtol=1e-4, atol=0)


def test_new_heads_of_svd_are_as_large_as_the_old():
    """Weight decay and Adam's steps go by size: what queries and o_proj read them with neither grows nor shrinks."""
    for merge in Regrouped(Drawn(SHAPES["MHA"]), 2, Method.svd, rows_BL=tokens(SHAPES["MHA"])).merges:
        for keys, values in zip(merge.keys, merge.values, strict=True):
            torch.testing.assert_close(keys.read_RP.abs().square().mean(0), torch.ones(8, dtype=torch.float64))
            torch.testing.assert_close(
                (values.read_RKK.mT @ values.read_RKK).mean(0), torch.eye(16, dtype=torch.float64)
            )


@pytest.mark.parametrize("method", BY_SIMILARITY)
def test_heads_of_nothing_are_merged_into_nothing(method):
    """An o_proj of zeros, and keys and values of zeros, give no NaN."""
    source = Changed(Drawn(small(4)), lambda name, weight: weight * 0 if ".attention." in name else weight)
    merged = Regrouped(source, 2, method)
    assert all(merged.read(name).isfinite().all() for name in full_shapes(merged.config))
    torch.testing.assert_close(logits(merged), logits(source))


def test_rows_are_summed_over_whatever_they_are_cut_into_and_reach_every_block():
    source, rows_BL = Drawn(SHAPES["GQA"]), tokens(SHAPES["GQA"])
    model = Transformer(source.config)
    model.load_state_dict({name: source.read(name) for name in full_shapes(source.config)})
    x_BLD = model.embedding(rows_BL)
    with torch.no_grad():
        for block, moments in zip(model.blocks, moments_of_rows(source, rows_BL), strict=True):
            _, k_NF, v_NF = (x.flatten(0, 1) for x in block.attention.qkv(block.attention_norm(x_BLD)))
            x_BLD = block(x_BLD)
            torch.testing.assert_close(moments.values_GKGK.reshape(64, 64).float(), v_NF.T @ v_NF)
            # a trace over the keys as they are rotated is the same as before: pairs of two heads turn alike
            traces = torch.einsum("ngk,nhk->gh", *[k_NF.unflatten(1, (4, K))] * 2)
            torch.testing.assert_close(moments.keys_PGG.real.sum(0).float(), traces, rtol=1e-4, atol=1e-4)
    weights = next(iter(moments_of_weights(source)))
    k_FD = source.read("blocks.0.attention.qkv.k_proj.weight")
    torch.testing.assert_close(
        weights.keys_PGG.abs().sum(0).diagonal().float(), k_FD.unflatten(0, (4, K)).square().sum((1, 2))
    )


def best_by_force(similarity, size):
    """The largest sum over pairs within groups of a size, by trying all groupings."""

    def best(heads):
        if not heads:
            return 0.0
        return max(
            sum(similarity[a][b] for a, b in combinations((heads[0], *others), 2))
            + best([head for head in heads[1:] if head not in others])
            for others in combinations(heads[1:], size - 1)
        )

    return best([*range(len(similarity))])


def score(similarity, groups):
    return sum(similarity[a][b] for group in groups for a, b in combinations(group, 2))


@pytest.mark.parametrize(("heads", "groups"), [(6, 3), (8, 4), (8, 2), (9, 3)])
def test_groups_of_equal_size_are_nearly_always_the_best_there_are(heads, groups):
    generator, found = torch.Generator().manual_seed(heads + groups), 0
    for _ in range(25):
        similarity = torch.rand(heads, heads, generator=generator, dtype=torch.float64)
        similarity = similarity + similarity.T
        cut = equal_groups(similarity, groups)
        assert [len(group) for group in cut] == [heads // groups] * groups
        assert sorted(sum(cut, ())) == [*range(heads)] and cut == equal_groups(similarity, groups)
        got, best = score(similarity.tolist(), cut), best_by_force(similarity.tolist(), heads // groups)
        assert best * 0.97 < got < best + 1e-9
        found += got > best - 1e-9
    assert found >= 24


def test_neighbours_stay_where_nothing_is_better_and_many_heads_are_no_matter():
    assert equal_groups(torch.ones(6, 6), 3) == ((0, 1), (2, 3), (4, 5))
    of = torch.randperm(128, generator=torch.Generator().manual_seed(1)) % 16
    cut = equal_groups((of[:, None] == of[None, :]).double(), 16)
    assert sorted(cut) == sorted(tuple((of == group).nonzero().flatten().tolist()) for group in range(16))


def test_steps_halve_where_they_can_and_shares_add_up():
    assert steps_of(8, 1) == (4, 2, 1) and steps_of(32, 8) == (16, 8) and steps_of(12, 2) == (6, 2)
    assert steps_of(6, 1) == (3, 1) and steps_of(5, 1) == (1,) and steps_of(4, 4) == ()
    assert steps_of(12, 4) == (4,) and steps_of(36, 6) == (18, 6)
    assert shares_of(23, 3) == (7, 8, 8) and shares_of(2, 3) == (0, 1, 1) and sum(shares_of(1000, 7)) == 1000
