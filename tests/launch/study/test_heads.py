"""What heads hold, of models whose heads are made so that it is known."""

import math
from dataclasses import replace

import pytest
import torch

from launch.study import heads
from launch.study.heads import attention_maps, draw_heads, effective_number, head_findings, head_table
from model.attention import GroupedQueryAttention
from model.config import AttentionBackend
from model.context import Context
from model.documents import documents_of
from model.loss import IGNORED
from model.regroup import Method, Regrouped
from model.transformer import Transformer
from tests.launch.study.made import Made, held_out
from tests.shapes import small

QUIET = str


def found(weights, batches=None, **options):
    batches = batches or [held_out(2, 24), held_out(1, 24, seed=1)]
    return head_findings({"one": weights}, batches, QUIET, **options)["models"][0]


def copied(weight):
    """Every head is the first."""
    first = weight.unflatten(0, (4, -1))[:1]
    return first.expand(4, -1, -1).flatten(0, 1).clone()


def zero(weight):
    """Queries that are zero attend to all alike."""
    return torch.zeros_like(weight)


def naive(q, k, document_L, window):
    """Attention weights pair by pair, (H, L, L)."""
    L, H, K = q.shape
    maps = torch.zeros(H, L, L)
    for head in range(H):
        of = head // (H // k.shape[1])
        for query in range(L):
            keys = [
                key
                for key in range(query + 1)
                if document_L[key] == document_L[query] and (window is None or query - key < window)
            ]
            scores = torch.tensor([float(q[query, head] @ k[key, of]) / math.sqrt(K) for key in keys])
            maps[head, query, keys] = scores.softmax(0)
    return maps


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("window", "pattern"), [(None, None), (5, "sf")])
@pytest.mark.parametrize("borders", [None, [7, 9]])
def test_maps_are_those_of_softmax_over_what_is_seen(monkeypatch, kv_heads, window, pattern, borders):
    """Of every block, by the queries and keys of a forward pass; their product with the values is the pass's own."""
    config = small(kv_heads, window=window, window_pattern=pattern)
    monkeypatch.setattr(heads, "_ROOM", 4 * 20 * 3)  # three queries at a time
    calls, outs = [], []
    call = heads._Watch.__call__
    monkeypatch.setattr(heads._Watch, "__call__", lambda watch, *of: outs.append(call(watch, *of)) or outs[-1])
    monkeypatch.setattr(
        heads, "attention_maps", lambda *of: calls.append((of, list(attention_maps(*of)))) or iter(calls[-1][1])
    )
    begins = torch.zeros(2, 20, dtype=torch.bool)
    begins[:, borders or []] = True
    batch = held_out(2, 20)
    batch = replace(batch, documents=documents_of(begins)) if borders else batch
    found(Made(config), [batch], queries=20)
    assert len(calls) == 4  # two rows of two blocks
    for number, ((q, k, _, seen, _), parts) in enumerate(calls):
        assert seen == config.windows[number // 2]
        expected = naive(q, k, begins[number % 2].cumsum(0), seen)
        places, maps = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts], dim=1)
        alone = [0, *(borders or [])]
        assert places.tolist() == [place for place in range(20) if place not in alone]
        torch.testing.assert_close(maps, expected[:, places], rtol=1e-5, atol=1e-6)
    model = Transformer(config)
    model.load_state_dict({name: Made(config).read(name) for name, _ in model.named_parameters()})
    asked = []
    monkeypatch.setattr(GroupedQueryAttention, "forward", watched(GroupedQueryAttention.forward, asked))
    with torch.no_grad():
        model(batch.tokens, Context(documents=batch.documents))
        for attention, x, out in zip([block.attention for block in model.blocks], asked, outs, strict=True):
            torch.testing.assert_close(attention.o_proj(out.flatten(2)), x)


def watched(forward, outputs):
    def run(module, *of):
        outputs.append(forward(module, *of))
        return outputs[-1]

    return run


def test_heads_with_the_same_queries_and_keys_have_one_pattern():
    one = found(Made(small(4), {"q_proj.weight": copied, "k_proj.weight": copied}))
    for layer in one["layers"]:
        assert layer["patterns"] == pytest.approx(1, abs=1e-4)
        torch.testing.assert_close(torch.tensor(layer["similarity"]), torch.ones(4, 4), atol=1e-5, rtol=0)
        for pairs in layer["distance"].values():
            assert all(bits is None or bits == pytest.approx(0, abs=1e-5) for bits in pairs.values())
        assert layer["values"] > 2  # their values still differ
    assert found(Made(small(4)))["mean"]["patterns"] > 1.2


def test_heads_that_look_at_different_tokens_have_as_many_patterns_as_heads():
    """By hand: head h attends to the token h before a query alone, so no two maps have a key in common."""
    maps = torch.zeros(4, 10, 20)
    for head in range(4):
        for query in range(10):
            maps[head, query, query + 10 - head] = 1
    bits = heads.divergences(maps) / 10
    torch.testing.assert_close(bits, 1 - torch.eye(4, dtype=torch.float64))
    assert effective_number(1 - bits) == pytest.approx(4)
    # Two heads of each of two patterns are two; half of what each attends to in common is half a bit.
    pairs = maps[[0, 0, 1, 1]]
    assert effective_number(1 - heads.divergences(pairs) / 10) == pytest.approx(2)
    half = torch.tensor([[[0.5, 0.5, 0.0]], [[0.5, 0.0, 0.5]]])
    assert heads.divergences(half)[0, 1] == pytest.approx(0.5)


def test_divergence_is_that_of_its_definition():
    maps = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0)).softmax(2)
    mixed = (maps[0] + maps[2]) / 2
    expected = sum((one * (one / mixed).log2()).sum() for one in (maps[0], maps[2])) / 2
    assert heads.divergences(maps)[0, 2] == pytest.approx(float(expected), rel=1e-4)


def test_subspaces_from_orthogonal_to_the_same_have_the_cosines_of_their_angles():
    basis = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    mixing = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    turned = math.cos(0.3) * basis[:8] + math.sin(0.3) * basis[8:16]
    zero, thin = torch.zeros(8, 32), torch.cat([basis[:4], basis[:4]])
    found = heads.subspace_similarity(torch.stack([basis[:8], mixing @ basis[:8], basis[8:16], turned, zero, thin]))
    expected = [1, 1, 0, math.cos(0.3) ** 2, 0, 4 / math.sqrt(32)]
    assert found[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert found.diagonal().tolist() == [1] * 6


def test_value_heads_are_as_many_as_differ():
    """Orthogonal row spaces of a layer without them in common are 0 alike, copies 1; a constant head is like none."""

    def orthogonal(weight):
        return torch.linalg.qr(weight.T)[0].T.contiguous()

    four, same = found(Made(small(4), {"v_proj.weight": orthogonal})), found(Made(small(4), {"v_proj.weight": copied}))
    assert [layer["subspace"] for layer in four["layers"]] == pytest.approx([0, 0], abs=1e-6)
    assert [layer["subspace"] for layer in same["layers"]] == pytest.approx([1, 1])
    assert same["mean"]["cka"] == pytest.approx(1) and same["mean"]["values"] == pytest.approx(1, abs=1e-4)
    assert four["mean"]["values"] > 3.5 and four["subspace_by_chance"] == 16 / 64
    none = found(Made(small(2), {"v_proj.weight": torch.zeros_like}))["mean"]
    assert (none["cka"], none["values"], none["subspace"]) == (0, pytest.approx(2), 0)


def test_cka_is_that_of_its_definition():
    values = torch.randn(50, 2, 3, generator=torch.Generator().manual_seed(0)) + 2
    watch = heads._Watch(4)
    for row in values.split(25):
        watch._add(torch.zeros(25, 2, 3), torch.zeros(25, 2, 3), row, torch.arange(25), None)
    x, y = (values[:, head].double() - values[:, head].double().mean(0) for head in range(2))
    expected = (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
    assert watch._cka(2)[0, 1] == pytest.approx(float(expected))


def test_even_attention_has_the_entropy_and_the_reach_of_what_is_seen():
    even = {"q_proj.weight": zero}
    for window, seen in ((None, range(2, 25)), (5, [2, 3, 4] + [5] * 20)):
        layer = found(Made(small(2, window=window), even), [held_out(2, 24)], queries=24)["mean"]
        assert layer["entropy"] == pytest.approx(sum(math.log2(n) for n in seen) / 23, rel=1e-5)
        assert layer["reach"] == pytest.approx(sum((n - 1) / 2 for n in seen) / 23, rel=1e-5)
    blind = found(Made(small(2, window=1)), [held_out(2, 24)])  # every query sees itself alone: there is one map
    assert blind["mean"]["patterns"] == pytest.approx(1) and blind["mean"]["reach"] == 0


def test_pairs_that_share_a_head_are_those_of_the_model_and_of_every_other():
    wide = Made(small(4))
    models = {"MHA": wide, **{f"GQA-{n}": Regrouped(wide, n, Method.mean) for n in (2, 1)}}
    result = head_findings(models, [held_out(2, 24)], QUIET, queries=8)
    assert result["rows"] == 2 and result["queries"] == 2 * 7  # the first sees itself alone
    for model in result["models"]:
        for layer in model["layers"]:
            bits = 1 - torch.tensor(layer["similarity"])
            pairs = {"sharing": [bits[0, 1], bits[2, 3]], "apart": [bits[i, j] for i in (0, 1) for j in (2, 3)]}
            expected = {kind: float(sum(of) / len(of)) for kind, of in pairs.items()}
            assert layer["distance"]["2"] == pytest.approx(expected, rel=1e-4)
            assert layer["distance"]["4"]["sharing"] is None and layer["distance"]["1"]["apart"] is None
    columns, rows = head_table(result)
    assert all(len(row) == len(columns) for row in rows) and [row[0] for row in rows] == list(models)
    assert result["models"][2]["mean"]["cka"] is None and result["models"][2]["mean"]["values"] == pytest.approx(1)


def test_padding_is_not_measured_and_the_reference_is_watched_as_well():
    both, first = held_out(2, 24), held_out(2, 24)
    first.labels[1] = IGNORED
    alone = replace(both, tokens=both.tokens[:1], labels=both.labels[:1])
    by_definition = Made(small(2, attention=AttentionBackend.reference))
    assert found(by_definition, [first]) == found(Made(small(2)), [first])
    assert found(Made(small(2)), [first])["mean"]["entropy"] == pytest.approx(
        found(Made(small(2)), [alone])["mean"]["entropy"]
    )
    assert found(Made(small(2)), [first])["mean"]["entropy"] != pytest.approx(
        found(Made(small(2)), [both])["mean"]["entropy"], rel=1e-3
    )


def test_no_more_rows_are_measured_than_asked_for():
    batches = [held_out(3, 24, seed=seed) for seed in range(3)]
    batches[0].labels[1] = IGNORED
    result = head_findings({"one": Made(small(2))}, batches, QUIET, rows=3, queries=24)
    assert (result["rows"], result["queries"]) == (3, 3 * 23)
    batches[1] = replace(batches[1], tokens=batches[1].tokens[:1], labels=batches[1].labels[:1])
    assert result["models"][0]["mean"]["entropy"] == pytest.approx(
        found(Made(small(2)), batches[:2], queries=24)["mean"]["entropy"]
    )


@pytest.mark.gpu
def test_a_gpu_finds_what_a_cpu_does(monkeypatch):
    on_gpu = found(Made(small(2, window=5, window_pattern="sf")))["mean"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    on_cpu = found(Made(small(2, window=5, window_pattern="sf")))["mean"]
    for key in ("patterns", "entropy", "reach", "values", "cka", "subspace"):
        assert on_gpu[key] == pytest.approx(on_cpu[key], rel=1e-3)


def test_pictures_have_a_line_and_a_matrix_for_each_model(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    plot, imshow = Axes.plot, Axes.imshow
    monkeypatch.setattr(Axes, "plot", lambda axes, x, y, **how: drawn.append(list(y)) or plot(axes, x, y, **how))
    monkeypatch.setattr(Axes, "imshow", lambda axes, of, **how: drawn.append(of) or imshow(axes, of, **how))
    wide = Made(small(4))
    models = {"MHA": wide, "MQA": Regrouped(wide, 1, Method.mean)}
    seeds = [head_findings(models, [held_out(1, 24, seed=seed)], QUIET) for seed in (1, 2)]
    pictures = draw_heads(seeds, tmp_path)
    assert [path.name for path in pictures] == ["heads.png", "head-similarity.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    first = [sum(seed["models"][0]["layers"][layer]["patterns"] for seed in seeds) / 2 for layer in (0, 1)]
    assert [float(value) for value in drawn[0]] == pytest.approx(first) and len(drawn) == 6
    assert drawn[4] in [layer["similarity"] for layer in seeds[0]["models"][0]["layers"]]
