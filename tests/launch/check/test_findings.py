"""Who is slow by what ranks have measured, and the links of a cluster that follow from it."""

import json
import random
from collections import Counter
from dataclasses import asdict, replace

import pytest

from launch.check.calibrate import links_of, slowest_of
from launch.check.findings import judge, table
from launch.check.measure import LinkTime, RankFindings, Request
from launch.check.rank import Lines, as_lines
from parallel.layout import Layout
from parallel.plan.cluster import Cluster
from parallel.plan.costs import Prices, Reach
from parallel.schedules import Placement

SIZES = (2**12, 2**20, 2**26)
BASE, STEP, ACROSS = 8e-6, 3e-6, 14e-6
WITHIN_BYTES, ACROSS_BYTES = 360e9, 45e9


def seconds(operation, ranks, size, hosts, across):
    """As `parallel.plan.costs` has it."""
    on_host = Counter(hosts[rank] for rank in ranks)
    protocols = [[1.0, 1e6 * BASE, 1e6 * STEP, 1e6 * across]]
    links = dict(intra_gb_per_s=WITHIN_BYTES / 1e9, inter_gb_per_s=ACROSS_BYTES / 1e9, intra_share=1.0, inter_share=1.0)
    prices = Prices(Cluster(protocols=protocols, **links))
    return prices.message(operation, size, Reach(len(ranks), max(on_host.values())))


def cluster(across=ACROSS):
    """Two machines of four GPUs: pp 2 over the machines, dp 2, tp 2."""
    hosts = {rank: f"node{rank // 4 + 1}" for rank in range(8)}
    found = []
    for rank in range(8):
        groups = [
            ("tp", (rank // 2 * 2, rank // 2 * 2 + 1)),
            ("dp", (rank // 4 * 4 + rank % 2, rank // 4 * 4 + rank % 2 + 2)),
        ]
        links = [
            LinkTime(kind, operation, ranks, size, seconds(operation, ranks, size, hosts, across))
            for kind, ranks in groups
            for operation in ("all_gather", "reduce_scatter", "all_reduce")
            for size in SIZES
        ]
        pair = (rank % 4, rank % 4 + 4)
        links += [LinkTime("pp", "send", pair, size, seconds("send", pair, size, hosts, across)) for size in SIZES]
        found.append(RankFindings(rank, hosts[rank], "H100", 7e14, 2.8e12, links))
    return found


def with_slow_links(found, ranks, times):
    def slowed(link):
        return replace(link, seconds=times * link.seconds) if set(ranks) <= set(link.ranks) else link

    return [replace(one, links=[slowed(link) for link in one.links]) for one in found]


def test_ranks_that_are_alike_are_not_named():
    verdict = judge(cluster(), 20)
    assert verdict.odd == [] and verdict.alone == [] and verdict.shared == []


def test_a_slow_device_is_named_with_its_host():
    found = cluster()
    found[5] = replace(found[5], product_flops=0.7 * found[5].product_flops)
    found[6] = replace(found[6], copy_bytes=0.85 * found[6].copy_bytes)
    assert judge(found, 20).odd == ["rank 5 on node2: its matrix product is 30 % slower than the median of 8"]
    assert "rank 6 on node2: its memory is 15 % slower than the median of 8" in judge(found, 10).odd
    assert judge(found, 31).odd == []


def test_another_device_is_compared_with_its_own_kind():
    found = [replace(one, device="H200", copy_bytes=4e12) if one.rank == 3 else one for one in cluster()]
    verdict = judge(found, 20)
    assert verdict.odd == []
    assert verdict.alone == ["the matrix product of rank 3 (H200)", "the memory of rank 3 (H200)"]


def test_a_slow_link_is_named_with_its_ranks_and_not_for_being_between_machines():
    odd = judge(with_slow_links(cluster(), (1, 5), 2.0), 20).odd
    assert odd == [
        "ranks 1, 5 on node1, node2: pp send of 4 KiB between machines is 50 % slower than the median of 4",
        "ranks 1, 5 on node1, node2: pp send of 64 MiB between machines is 50 % slower than the median of 4",
    ]


def test_a_rank_that_all_slow_groups_have_is_named():
    found = with_slow_links(cluster(), (3,), 3.0)
    odd = judge(found, 20).odd
    assert odd[-1] == "rank 3 on node1 is in all of the slow groups"
    assert any(said.startswith("ranks 2, 3 on node1: tp gather of 64 MiB in a machine is 67 % slower") for said in odd)


def test_a_group_is_as_slow_as_its_slowest_rank_says():
    found = cluster()
    links = [replace(link, seconds=5 * link.seconds) if link.kind == "tp" else link for link in found[0].links]
    found[0] = replace(found[0], links=links)
    assert any("ranks 0, 1 on node1: tp" in said for said in judge(found, 20).odd)


def test_two_are_compared_with_the_faster_one():
    first, second = cluster()[:2]
    odd = judge([replace(first, links=[]), replace(second, links=[], product_flops=5e14)], 20).odd
    assert odd == ["rank 1 on node1: its matrix product is 29 % slower than the median of 2"]


def test_a_single_rank_has_no_like():
    first, second = ([link for link in one.links if link.kind == "tp"] for one in cluster()[:2])
    found = [replace(one, links=links) for one, links in zip(cluster()[:2], (first, second), strict=True)]
    verdict = judge([found[0], replace(found[1], device="H200")], 20)
    assert verdict.odd == [] and verdict.alone[0] == "the matrix product of rank 0 (H100)"
    assert "tp gather of 64 MiB in a machine of ranks 0, 1" in verdict.alone


def test_ranks_that_share_cores_are_said_to():
    found = [replace(one, host="vm", cores=2, links=[]) for one in cluster()[:4]]
    assert judge(found, 20).shared == ["4 ranks on vm share 2 cores, and some were slower for the others' work"]
    assert judge(found[:2], 20).shared == []


def test_the_table_has_a_row_for_each_rank_and_its_figures():
    text = table(cluster(across=ACROSS - BASE))
    rows = [line for line in text.splitlines() if line.startswith("│")]
    assert len(rows) == 8 and sum("node2" in row for row in rows) == 1
    cells = [cell.strip() for cell in rows[0].split("│")[1:-1]]
    assert cells[:4] == ["node1", "0", "700", "2800"]
    # All-gathers, reduce-scatters and all-reduces of two ranks in a machine; and messages between machines.
    assert cells[4:6] == ["322/322/335", "11/11/14"] and cells[-2:] == ["44.6", "14"]


def test_a_rank_between_two_stages_has_a_line_for_each_neighbour():
    found = cluster(across=ACROSS - BASE)
    more = [replace(link, ranks=(4, 9), seconds=2 * link.seconds) for link in found[0].links if link.kind == "pp"]
    text = table([replace(found[0], links=[link for link in found[0].links if link.kind == "pp"] + more)])
    assert [line.split("│")[-3].strip() for line in text.splitlines() if line.startswith("│")] == ["44.6", "22.3"]


def test_links_are_fitted_to_what_was_measured():
    values = links_of(cluster())
    assert values["intra_gb_per_s"] == pytest.approx(360, rel=1e-3) and values["intra_share"] == 1.0
    assert values["inter_gb_per_s"] == pytest.approx(45, rel=1e-3) and values["inter_share"] == 1.0
    ((share, base, within, across),) = values["protocols"]
    assert share == 1.0 and across == pytest.approx(14, rel=1e-3)
    # With groups of two ranks alone, an all-reduce has two steps and the others one.
    assert (base, within) == (pytest.approx(8, rel=1e-2), pytest.approx(3, rel=1e-2))


def over_machines(ranks, per_host, operations):
    """What ranks of one group over several machines have measured."""
    hosts = {rank: f"node{rank // per_host}" for rank in range(ranks)}
    group = tuple(range(ranks))
    links = [
        LinkTime("dp", operation, group, size, seconds(operation, group, size, hosts, ACROSS))
        for operation in operations
        for size in SIZES
    ]
    return [RankFindings(rank, hosts[rank], "H100", 7e14, 2.8e12, links) for rank in range(ranks)]


def test_ranks_of_one_machine_share_what_a_group_sends_to_others():
    within = [link for one in cluster() for link in one.links if link.kind == "tp"]
    found = over_machines(16, 8, ("all_gather", "reduce_scatter"))
    inside = RankFindings(16, "node0", "H100", 7e14, 2.8e12, [replace(link, ranks=(0, 1)) for link in within])
    values = links_of([*found, inside])
    assert values["inter_gb_per_s"] == pytest.approx(45, rel=0.02)
    assert values["protocols"][0][3] == pytest.approx(14, rel=0.05)


def test_where_every_machine_has_one_gpu_a_step_within_it_is_as_long_as_between_two():
    values = links_of(over_machines(4, 1, ("send", "all_gather", "all_reduce")))
    assert "intra_gb_per_s" not in values and values["inter_gb_per_s"] == pytest.approx(45, rel=0.05)
    ((_, base, step, across),) = values["protocols"]
    assert base == 0.0 and step == across > 0


def test_quick_messages_between_two_ranks_do_not_make_collectives_quick():
    def changed(link):
        if link.operation == "send" or (link.operation == "all_reduce" and link.num_bytes > SIZES[0]):
            return replace(link, seconds=0.1 * link.seconds)
        return link

    found = [replace(one, host="node1", links=[changed(link) for link in one.links]) for one in cluster()]
    of_sends = [replace(one, links=[link for link in one.links if link.operation == "send"]) for one in found]
    assert links_of(found)["intra_gb_per_s"] == pytest.approx(360, rel=1e-3)
    assert links_of(of_sends)["intra_gb_per_s"] == pytest.approx(450, rel=1e-3)


def test_the_slowest_device_is_told_by_the_median_but_not_of_shared_cores():
    found = cluster()
    found[5] = replace(found[5], product_flops=0.93 * found[5].product_flops)
    assert slowest_of(found) == {"slowest_share": 0.93}
    assert slowest_of([replace(one, cores=2) for one in found]) == {} == slowest_of(found[:1])


def test_links_that_are_disturbed_are_fitted_roughly():
    draw = random.Random(1)
    found = [
        replace(one, links=[replace(link, seconds=link.seconds * draw.uniform(0.9, 1.1)) for link in one.links])
        for one in cluster()
    ]
    values = links_of(found)
    assert values["intra_gb_per_s"] == pytest.approx(360, rel=0.15)
    assert values["inter_gb_per_s"] == pytest.approx(45, rel=0.15)


def test_no_part_of_a_message_takes_less_than_nothing():
    found = [replace(one, links=[replace(link, seconds=1e-3) for link in one.links]) for one in cluster()]
    values = links_of(found)
    assert values["intra_gb_per_s"] > 0 and all(part >= 0 for part in values["protocols"][0])


def test_one_machine_says_nothing_of_the_network():
    found = [replace(one, host="node1") for one in cluster()]
    assert set(links_of(found)) == {"intra_gb_per_s", "intra_share", "protocols"}
    assert links_of([replace(found[0], links=[])]) == {}


def test_what_ranks_found_passes_through_a_launchers_output():
    draw = random.Random(1)
    found = [asdict(replace(one, product_flops=draw.random())) for one in cluster() * 40]
    lines, reader = [*as_lines(found)], Lines()
    assert len(lines) > 2 and max(map(len, lines)) < 4096
    assert reader.value() is None
    taken = [reader.takes(line) for line in [f"node1: {lines[0]}\n", "warning: something else", *lines[1:]]]
    assert taken == [True, False] + [True] * (len(lines) - 1)
    value = reader.value()
    assert value == json.loads(json.dumps(found))


def test_lines_that_are_lost_are_no_findings():
    reader = Lines()
    for line in [*as_lines(list(range(3000)))][1:]:
        reader.takes(line)
    assert reader.value() is None


def test_a_request_passes_as_json():
    request = Request(Layout(2, 4, 2, True), Placement(4, 2, True), kv_copies=2, bf16=True)
    assert Request.from_json(request.as_json()) == request
