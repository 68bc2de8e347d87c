"""Fewer key/value heads: the arithmetic written out, and the head order of the files."""

import pytest
import torch

from model.regroup import Method, Regrouped, regroup_heads
from model.transformer import Transformer, full_shapes
from tests.model.test_huggingface import Drawn, tokens
from tests.shapes import small

K = 16


def attention_output(model, tokens_BL, k_weight, v_weight, group):
    """The first block's attention with every query head given its key and value head, as the definition says."""
    block = model.blocks[0]
    x_BLD = block.attention_norm(model.embedding(tokens_BL))
    q, k, v = (x_BLD @ w.T for w in (block.attention.qkv.q_proj.weight, k_weight, v_weight))
    B, L, _ = x_BLD.shape
    angle_LK = torch.outer(torch.arange(L).float(), 10000.0 ** (-torch.arange(0, K, 2).float() / K))

    def turned(x_LK):
        a, b = x_LK[:, : K // 2], x_LK[:, K // 2 :]
        return torch.cat((a * angle_LK.cos() - b * angle_LK.sin(), b * angle_LK.cos() + a * angle_LK.sin()), dim=1)

    heads = []
    for h in range(4):
        g = h // group
        q_BLK, k_BLK, v_BLK = q[..., h * K : (h + 1) * K], k[..., g * K : (g + 1) * K], v[..., g * K : (g + 1) * K]
        rows = []
        for b in range(B):
            scores = turned(q_BLK[b]) @ turned(k_BLK[b]).T / K**0.5
            rows.append(scores.masked_fill(torch.ones(L, L).triu(1).bool(), -torch.inf).softmax(-1) @ v_BLK[b])
        heads.append(torch.stack(rows))
    return torch.cat(heads, dim=-1) @ block.attention.o_proj.weight.T


def loaded(weights):
    model = Transformer(weights.config)
    model.load_state_dict({name: weights.read(name) for name in full_shapes(weights.config)})
    return model


@pytest.mark.parametrize("kv_heads", [1, 2])
@torch.no_grad()
def test_a_regrouped_layer_is_the_mean_of_its_groups_heads(kv_heads):
    source = Drawn(small(4))
    model = loaded(Regrouped(source, kv_heads, Method.mean))
    group = 4 // kv_heads
    by_hand = {}
    for which in "kv":
        old = source.read(f"blocks.0.attention.qkv.{which}_proj.weight")
        rows = []
        for g in range(kv_heads):
            for row in range(K):  # row `row` of head h is row h * K + row of the matrix
                rows.append(sum(old[(g * group + r) * K + row] for r in range(group)) / group)
        by_hand[which] = torch.stack(rows)
    tokens_BL = tokens(small())
    block = model.blocks[0]
    torch.testing.assert_close(block.attention.qkv.k_proj.weight, by_hand["k"])
    torch.testing.assert_close(block.attention.qkv.v_proj.weight, by_hand["v"])
    computed = block.attention(block.attention_norm(model.embedding(tokens_BL)))
    expected = attention_output(model, tokens_BL, by_hand["k"], by_hand["v"], group)
    torch.testing.assert_close(computed, expected, rtol=1e-4, atol=1e-5)


def test_heads_that_are_all_alike_lose_nothing():
    """Where every head of a group is the same already, mean and first change no logit."""
    one = Drawn(small(2))

    class Repeated:
        config = small(4)

        def read(self, name):
            weight = one.read(name)
            if not name.endswith(("k_proj.weight", "v_proj.weight")):
                return weight
            return weight.unflatten(0, (2, K)).repeat_interleave(2, dim=0).flatten(0, 1)

    tokens_BL = tokens(small())
    with torch.no_grad():
        expected = loaded(Repeated())(tokens_BL)
        for method in (Method.mean, Method.first):
            torch.testing.assert_close(loaded(Regrouped(Repeated(), 2, method))(tokens_BL), expected)


def test_first_takes_the_first_of_each_group():
    weight = torch.arange(8.0).repeat_interleave(3 * K).reshape(8 * K, 3)  # head h holds h everywhere
    heads = regroup_heads(weight, K, 2, Method.first).reshape(2, -1)
    assert heads[0].eq(0).all() and heads[1].eq(4).all()
    assert regroup_heads(weight, K, 1, Method.mean).eq(3.5).all()


@pytest.mark.parametrize("method", Method)
def test_as_many_heads_as_before_are_the_same_bit_for_bit(method):
    source = Drawn(small(4))
    same = Regrouped(source, 4, method)
    assert all(torch.equal(same.read(name), source.read(name)) for name in full_shapes(source.config))


def test_grouped_queries_become_multi_query_and_what_is_no_key_or_value_stays():
    source = Drawn(small(2, window=5, window_pattern="fs"))
    fewer = Regrouped(source, 1, Method.mean)
    assert fewer.config.n_kv_heads == 1 and fewer.config.n_heads == 4
    assert fewer.config.windows == source.config.windows == (None, 5)
    for name in full_shapes(source.config):
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            assert fewer.read(name).shape == (K, 64)
        else:
            assert torch.equal(fewer.read(name), source.read(name))


def test_random_is_drawn_from_the_seed_and_the_name():
    source, name = Drawn(small(4)), "blocks.1.attention.qkv.v_proj.weight"
    drawn = Regrouped(source, 2, Method.random, seed=5).read(name)
    assert drawn.shape == (2 * K, 64) and abs(drawn.std().item() - 0.05) < 0.005
    assert torch.equal(drawn, Regrouped(source, 2, Method.random, seed=5).read(name))
    assert not torch.equal(drawn, Regrouped(source, 2, Method.random, seed=6).read(name))


def test_the_mean_is_taken_in_fp32():
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0 + 2**-7]).bfloat16().repeat_interleave(2).reshape(8, 1)
    mean = regroup_heads(weight, 2, 1, Method.mean)
    assert mean.dtype == torch.bfloat16
    assert mean.eq(torch.tensor(1.0 + 2**-9).bfloat16()).all()


@pytest.mark.parametrize("kv_heads", [3, 0, 8, -1])
def test_heads_that_do_not_divide_say_what_would_work(kv_heads):
    with pytest.raises(ValueError, match=f"--kv-heads={kv_heads}: does not divide the 4 key/value heads") as error:
        Regrouped(Drawn(small(4)), kv_heads, Method.mean)
    assert "--kv-heads=4 would work" in str(error.value) or "--kv-heads=2 would work" in str(error.value)
