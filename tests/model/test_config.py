import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig
from model.transformer import Transformer
from tests.shapes import preset


@pytest.mark.parametrize(("name", "count"), [("7b", 6_910_365_696), ("67b", 67_425_001_472)])
def test_the_papers_models_have_exactly_their_parameters(name, count):
    config = preset(name).model
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == count
    assert config.num_params == count


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_parameters_by_part_are_those_of_the_module(kv_heads):
    config = ModelConfig(n_layers=3, d_model=96, n_heads=6, n_kv_heads=kv_heads, d_ff=256, vocab_size=500, head_dim=32)
    with torch.device("meta"):
        model = Transformer(config)
    counted = {part: 0 for part in config.params_by_part()}
    for name, parameter in model.named_parameters():
        part = next(
            part
            for part, mark in [
                ("norms", "norm"),
                ("attention", "attention."),
                ("feed-forward", "ffn."),
                ("embedding", "embedding."),
                ("head", "head."),
            ]
            if mark in name
        )
        counted[part] += parameter.numel()
    assert counted == config.params_by_part()
    assert sum(p.numel() for p in model.blocks[0].parameters()) == config.block_params


@pytest.mark.parametrize("kv_heads", [1, 4, 8])
def test_flops_per_token_are_those_that_a_forward_and_backward_pass_makes(kv_heads):
    seq_len = 64
    config = ModelConfig(n_layers=2, d_model=128, n_heads=8, n_kv_heads=kv_heads, d_ff=384, vocab_size=512)
    config.attention = config.attention.reference  # counted as plain matrix products, the square whole
    with torch.device("meta"):
        model = Transformer(config)
        tokens = torch.zeros(1, seq_len, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    with FlopCounterMode(display=False) as by_document:
        for length in (24, 40):
            model(tokens[:, :length]).sum().backward()
    without = seq_len * config.flops_per_token(0)
    assert by_document.get_total_flops() == without + config.attention_flops([24, 40])[1]
    attention_other_half = 3 * config.n_layers * 2 * config.n_heads * config.d_head * seq_len
    assert counter.get_total_flops() == seq_len * (config.flops_per_token(seq_len) + attention_other_half)
    assert counter.get_total_flops() == seq_len * config.flops_per_token_whole_attention(seq_len)
    in_sequence = config.flops_per_token(seq_len), config.flops_per_token_whole_attention(seq_len)
    assert config.attention_flops([seq_len]) == tuple(seq_len * flops - without for flops in in_sequence)


def test_grouped_queries_leave_flops_and_cache_out():
    def of(kv_heads):
        return ModelConfig(n_layers=2, d_model=128, n_heads=8, n_kv_heads=kv_heads, d_ff=384, vocab_size=512)

    saved_weights = of(8).num_params - of(2).num_params
    assert of(8).flops_per_token(64) - of(2).flops_per_token(64) == 6 * saved_weights
    assert of(8).kv_cache_bytes_per_token() == 4 * of(2).kv_cache_bytes_per_token()
    # keys and values of every layer, 16 wide, in two bytes
    assert of(2).kv_cache_bytes_per_token() == 2 * 2 * 2 * 16 * 2


def test_m_of_the_scaling_laws():
    # arXiv 2401.02954, section 3.2, by hand for the 7B at 4096
    assert preset("7b").model.scaling_m(4096) == 72 * 30 * 4096**2 + 12 * 30 * 4096 * 4096


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_heads": 7}, ["model.n_heads=7", "model.d_model=128", "model.n_heads=4 or model.n_heads=8"]),
        ({"n_kv_heads": 3}, ["model.n_kv_heads=3", "model.n_heads=8", "model.n_kv_heads=2 or model.n_kv_heads=4"]),
        ({"n_layers": 0}, ["model.n_layers=0", "at least 1"]),
        ({"head_dim": 15}, ["model.head_dim=15", "even"]),
        ({"norm_eps": 0.0}, ["model.norm_eps=0.0", "above 0"]),
    ],
)
def test_an_impossible_shape_says_what_would_work(change, said):
    config = ModelConfig(
        **{"n_layers": 2, "d_model": 128, "n_heads": 8, "n_kv_heads": 2, "d_ff": 384, "vocab_size": 512, **change}
    )
    text = "\n".join(config.problems())
    assert all(part in text for part in said), text
    with pytest.raises(ValueError, match=said[0]):
        Transformer(config)


def test_all_that_is_wrong_is_said_at_once():
    config = ModelConfig(n_layers=2, d_model=100, n_heads=8, n_kv_heads=3, d_ff=384, vocab_size=512)
    assert len(config.problems()) == 2


def test_the_readmes_tokens_per_second_are_what_its_mfu_says():
    for name, share, tokens_per_second in [("7b", 0.55, 12_962), ("7b", 0.6, 14_141), ("67b", 0.55, 1_299)]:
        assert round(share * 989e12 / preset(name).model.flops_per_token(4096)) == tokens_per_second
    ratios = [
        preset(name).model.flops_per_token_whole_attention(4096) / preset(name).model.flops_per_token(4096)
        for name in ("7b", "67b")
    ]
    assert ratios == pytest.approx([1.07, 1.05], abs=0.005)
