"""Clusters by size, preset and file."""

import pytest

from conf.clusters import cluster_from_file, cluster_of, presets
from model.problems import BadInput


def test_a_size_and_a_preset():
    found = cluster_of("32x4xh100")
    assert (found.nodes, found.gpus_per_node, found.world_size, found.name) == (32, 4, 128, "H100 SXM")
    assert cluster_of("h100").world_size == 8


def test_every_preset_is_sound_and_says_its_shares():
    assert {"a100", "h100", "h200", "h800", "b200", "mi300x"} <= set(presets())
    for name in presets():
        found = cluster_of(name)
        assert not found.problems() and not found.measured and found.has_gpus
        # Attention is slower than the products of which it consists, and backward slower than forward.
        assert found.attention_backward_share < found.attention_forward_share < found.product_share
        assert found.allocatable_gib == found.memory_gib - found.reserved_gib > 70


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("0x8xh100", "'0' is no number of machines; 1 or more would work"),
        ("2xeightxh100", "'eight' is no number of GPUs"),
        ("2x8xh101", "no such preset as 'h101'; h100 would work"),
        ("nothing", "one of these or a file FILE.yaml would work"),
        ("absent.yaml", "No such file"),
    ],
)
def test_what_is_none_is_said_with_what_would_work(spec, said):
    with pytest.raises(BadInput) as error:
        cluster_of(spec)
    assert any(said in problem for problem in error.value.problems)
    assert all(problem.startswith(f"--cluster={spec}: ") for problem in error.value.problems)


def test_all_problems_of_a_size_are_said_at_once():
    with pytest.raises(BadInput) as error:
        cluster_of("0x0xh101")
    assert len(error.value.problems) == 3


def test_a_file_builds_on_a_preset_and_can_be_sized(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("preset: h100\nnodes: 4\ninter_gb_per_s: 25\nmeasured: [inter_gb_per_s]\n")
    found = cluster_of(str(file))
    assert (found.nodes, found.inter_gb_per_s, found.name, found.measured) == (4, 25, "H100 SXM", ["inter_gb_per_s"])
    assert cluster_of(f"2x4x{file}").world_size == 8


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("hbm_share: 2\n", "hbm_share=2.0: is a share"),
        ("hbm_shares: 1\n", "hbm_shares: is no key of a cluster; key=hbm_share"),
        ("nodes: many\n", "a file that begins with `preset: h100`"),
        ("- 1\n", "is no mapping"),
        ("preset: z9\n", "no such preset as 'z9'"),
        ("preset: mine.yaml\n", "no such preset as 'mine.yaml'"),
        ("memory_gib: 3\n", "memory_gib=3.0: is above --cluster="),
        ("protocols: []\n", "messages need one"),
        ("products: [[1, 2, 3]]\n", "is [m, k, n, TFLOP/s]"),
        ("devices_per_node: 9\n", "at most the ranks of a machine"),
    ],
)
def test_what_a_file_has_that_no_cluster_has_is_said(tmp_path, content, said):
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(BadInput) as error:
        cluster_from_file(file)
    assert said in str(error.value)
