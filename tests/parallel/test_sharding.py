import pytest
import torch

from model.transformer import Transformer
from parallel import sharding
from parallel.sharding import Cut, assemble, cut_of, shard
from tests.shapes import preset, small


def parameters(config):
    with torch.device("meta"):
        return {name: p.shape for name, p in Transformer(config).named_parameters()}


@pytest.mark.parametrize("kv_heads", [8, 4, 2, 1])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_the_parts_of_all_ranks_make_the_parameter_again(tp, kv_heads):
    config = small(kv_heads, n_heads=8, vocab_size=1003)
    for name, shape in parameters(config).items():
        whole = torch.randn(shape)
        parts = [shard(name, shape, config, tp, rank).of(whole) for rank in range(tp)]
        assert torch.equal(assemble(name, parts, shape, config), whole), name
        counted = sum(
            part.numel() for rank, part in enumerate(parts) if shard(name, shape, config, tp, rank).counts(rank)
        )
        assert counted == whole.numel(), name


def test_each_rank_has_the_key_value_heads_that_its_query_heads_read():
    config = small(2, n_heads=8, d_model=64)  # heads of 8; query heads 0-3 read kv head 0, 4-7 read 1
    for name, width in (("q", 64), ("k", 16), ("v", 16)):
        parts = [
            shard(f"blocks.0.attention.qkv.{name}_proj.weight", torch.Size((width, 64)), config, 4, rank)
            for rank in range(4)
        ]
        rows = [(part.start, part.stop, part.copies) for part in parts]
        if name == "q":
            assert rows == [(0, 16, 1), (16, 32, 1), (32, 48, 1), (48, 64, 1)]
        else:
            assert rows == [(0, 8, 2), (0, 8, 2), (8, 16, 2), (8, 16, 2)]


def test_a_vocabulary_that_does_not_divide_is_not_padded():
    parts = [shard("head.proj.weight", torch.Size((1003, 64)), small(vocab_size=1003), 2, rank) for rank in (0, 1)]
    assert [(part.start, part.stop) for part in parts] == [(0, 502), (502, 1003)]


@pytest.mark.parametrize("name", ["7b", "67b"])
def test_the_table_knows_every_parameter(name):
    config = preset(name).model
    config.n_layers = 2
    cuts = {parameter: cut_of(parameter) for parameter in parameters(config)}
    assert {parameter for parameter, cut in cuts.items() if cut is Cut.WHOLE} == {p for p in cuts if "norm" in p}


def test_a_parameter_that_the_table_does_not_know_is_an_error():
    with pytest.raises(KeyError, match=r"blocks\.0\.attention\.gate\.weight"):
        cut_of("blocks.0.attention.gate.weight")


@pytest.mark.parametrize(
    ("changes", "tp", "said"),
    [
        ({}, 0, ["parallel.tp=0", "at least 1"]),
        ({}, 3, ["parallel.tp=3", "model.n_heads=8", "parallel.tp=2 or parallel.tp=4"]),
        ({"kv_heads": 3, "n_heads": 12, "d_model": 96}, 2, ["parallel.tp=2", "model.n_kv_heads=3"]),
        ({"d_ff": 150}, 4, ["parallel.tp=4", "model.d_ff=150"]),
        ({"vocab_size": 5}, 4, ["parallel.tp=4", "model.vocab_size=5"]),
    ],
)
def test_a_cut_that_does_not_fit_says_why(changes, tp, said):
    text = "\n".join(sharding.problems(small(**{"n_heads": 8, **changes}), tp))
    assert all(part in text for part in said), text


def test_the_67b_goes_on_eight_and_its_eight_heads_on_sixteen():
    config = preset("67b").model
    assert sharding.problems(config, 8) == [] and sharding.problems(config, 16) == []
