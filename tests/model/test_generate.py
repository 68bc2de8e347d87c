"""Tokens from a cache are those of the full forward pass."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from model.cache import KVCache
from model.generate import Decoder, Sampling, complete, drawing, generate
from model.init import initialise
from model.kernels import cached_attention, in_splits, reference
from model.problems import BadInput
from model.step_graph import StepGraph
from model.transformer import Transformer, layer_builders
from tests.model.test_huggingface import SHAPES, Drawn, written
from tests.shapes import small

GREEDY = Sampling(temperature=0)
DRAWS = [GREEDY, Sampling(), Sampling(top_k=2), Sampling(top_p=0.5)]
LENGTHS = [3, 11, 7, 1]


def prompts(config):
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(config.vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]


def loaded(config):
    model = Transformer(config)
    initialise(model, "", 4, 0.2)
    return model, [model.embedding, *model.blocks, model.head]


def finish(layers, prompts, num_tokens, ends=()):
    return complete(Decoder(layers, prompts, max(map(len, prompts)) + num_tokens), num_tokens, ends, GREEDY)


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_of_prompts_of_different_lengths_are_those_without_a_cache(shape):
    config = SHAPES[shape]
    model, layers = loaded(config)
    made = finish(layers, prompts(config), 20)
    for prompt, tokens in zip(prompts(config), made, strict=True):
        so_far = list(prompt)
        for _ in range(20):
            with torch.no_grad():
                so_far.append(int(model(torch.tensor([so_far]))[0, -1].argmax()))
        assert tokens == so_far[len(prompt) :]


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_without_a_cache(shape):
    config = SHAPES[shape]
    model, layers = loaded(config)
    decoder = Decoder(layers, prompts(config), 40)
    rows = prompts(config)
    logits_BV = decoder.prefill()
    for token in (5, 9, 200, 17):
        for row, logits_V in zip(rows, logits_BV, strict=True):
            with torch.no_grad():
                torch.testing.assert_close(logits_V, model(torch.tensor([row]))[0, -1], rtol=1e-5, atol=1e-5)
            row.append(token)
        logits_BV = decoder.step(torch.full((len(rows),), token))
    assert decoder.lengths_B.tolist() == [length + 4 for length in LENGTHS]


@pytest.mark.parametrize("shape", ["MHA", "GQA", "MQA"])
def test_greedy_tokens_are_those_of_transformers(shape, tmp_path):
    weights = Drawn(SHAPES[shape])
    theirs = AutoModelForCausalLM.from_pretrained(written(weights, tmp_path / "out"), dtype=torch.float32)
    layers = []
    for name, build in layer_builders(weights.config).items():
        layer = build()
        layer.load_state_dict({inner: weights.read(f"{name}.{inner}") for inner, _ in layer.named_parameters()})
        layers.append(layer)
    tokens_BL = torch.tensor([prompts(weights.config)[1]] * 2)
    generated = theirs.generate(tokens_BL, max_new_tokens=16, do_sample=False, eos_token_id=-1)
    ours = finish(layers, tokens_BL.tolist(), 16)
    assert ours == generated[:, tokens_BL.shape[1] :].tolist()


def test_a_sequence_ends_at_its_eos_and_the_others_go_on():
    config = small()
    _, layers = loaded(config)
    free = finish(layers, prompts(config), 12)
    eos = free[0][4]
    stopped = finish(layers, prompts(config), 12, [eos])
    for tokens, whole in zip(stopped, free, strict=True):
        assert tokens == (whole[: whole.index(eos)] if eos in whole else whole)
    only = [prompts(config)[0]]
    steps = list(generate(Decoder(layers, only, 20), 12, [free[0][0]], GREEDY))
    assert steps == []


def test_whichever_end_comes_first_ends_a_sequence():
    config = small()
    _, layers = loaded(config)
    free = finish(layers, prompts(config), 12)
    ends = {free[0][4], free[0][7], free[1][2]}
    for tokens, whole in zip(finish(layers, prompts(config), 12, ends), free, strict=True):
        assert tokens == whole[: next((at for at, token in enumerate(whole) if token in ends), None)]


class PretendedGraph:
    """A CUDA graph that a CPU can record: it runs the same again, and counts no token."""

    def replay(self):
        longest = [cache.longest for cache in self.caches]
        self.logits.copy_(self.run())
        for cache, before in zip(self.caches, longest, strict=True):
            cache.longest = before


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_recorded_until_more_places_are_in_view(monkeypatch, caplog, shape, fails):
    config = SHAPES[shape]
    _, layers = loaded(config)
    plain, graphed = (Decoder(layers, prompts(config), 40) for _ in range(2))
    recorded = []

    def record(self, run, tokens_B1):
        if fails:
            graphed.caches[0].longest += 1
            raise RuntimeError("operation not permitted when stream is capturing")
        self._tokens_B1, graph = tokens_B1.clone(), PretendedGraph()
        graph.caches, graph.run = self._caches, lambda: run(self._tokens_B1)
        graph.logits = self._logits_BV = run(self._tokens_B1)
        recorded.append(graphed.caches[0].longest)
        return graph

    monkeypatch.setattr(StepGraph, "_record", record)
    graphed._graph = StepGraph(graphed.caches)
    for cache in graphed.caches:
        cache._step = 8
    assert torch.equal(plain.prefill(), graphed.prefill())
    replayed, replay = [], PretendedGraph.replay
    monkeypatch.setattr(PretendedGraph, "replay", lambda graph: replayed.append(replay(graph)))
    for token in range(18):
        tokens_B = torch.full((len(LENGTHS),), token)
        torch.testing.assert_close(graphed.step(tokens_B), plain.step(tokens_B), rtol=1e-5, atol=1e-5)
    assert [cache.longest for cache in graphed.caches] == [cache.longest for cache in plain.caches]
    if fails:
        assert caplog.text.count("steps are not recorded as a CUDA graph: operation not permitted") == 1
    elif None in config.windows:
        assert recorded == [13, 18, 26]  # the second token of those for which 16, 24 and 32 places are in view
        assert len(replayed) == 18 - 3
    else:  # a window is full, and in view, from the first token on
        assert recorded == [13] and len(replayed) == 18 - 1


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_a_gpus_graphs_give_what_its_kernels_give_one_after_another(monkeypatch, caplog, shape):
    monkeypatch.setattr("model.cache._STEP", 8)
    config = SHAPES[shape]
    _, layers = loaded(config)
    layers = [layer.to("cuda", torch.bfloat16) for layer in layers]
    plain, graphed = (Decoder(layers, prompts(config), 40) for _ in range(2))
    plain._graph = None
    assert torch.equal(plain.prefill(), graphed.prefill())
    for token in range(18):
        tokens_B = torch.full((len(LENGTHS),), token)
        torch.testing.assert_close(graphed.step(tokens_B), plain.step(tokens_B), rtol=1e-2, atol=1e-2)
    assert graphed._graph._graph is not None and "not recorded" not in caplog.text


def test_the_cache_holds_key_value_heads_and_no_more():
    lengths_B = torch.tensor([2, 3])
    cache = KVCache(lengths_B, 10)
    cache.add(*torch.zeros(2, 2, 3, 2, 4, dtype=torch.bfloat16))
    held = cache._k_BGMK.nbytes + cache._v_BGMK.nbytes
    assert held == 2 * 10 * small(2, head_dim=4, n_layers=1).kv_cache_bytes_per_token()


def test_attention_in_splits_is_that_of_all_keys_at_once(monkeypatch):
    monkeypatch.setattr("model.kernels.SPLIT", 8)
    q, k, v = (torch.randn(3, heads, rows, 16) for heads, rows in ((2, 4), (2, 24), (2, 24)))
    seen = torch.arange(24) < torch.tensor([[1], [13], [24]])  # splits of which none, some and all are seen
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen[:, None, None])
    torch.testing.assert_close(in_splits(q, k, v, seen), want, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(8, 1), (8, 2), (16, 16)])
def test_a_gpu_attends_to_a_cache_in_splits_as_by_definition(heads):
    (H, G), M = heads, 1024
    tensors = [torch.randn(3, rows, n, 64, device="cuda", dtype=torch.bfloat16) for rows, n in ((1, H), (M, G), (M, G))]
    lengths = torch.tensor([1, 300, M], device="cuda")
    q, k, v = tensors
    got = cached_attention(q, k.transpose(1, 2), v.transpose(1, 2), lengths)
    for row, length in enumerate(lengths.tolist()):
        whole = q[row : row + 1].expand(1, length, H, 64)
        want = reference(whole.double(), k[row : row + 1, :length].double(), v[row : row + 1, :length].double(), None)
        torch.testing.assert_close(got[row].double(), want[0, -1:], rtol=2e-2, atol=2e-2)


def test_cached_attention_is_the_last_row_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 9, heads, 8, generator=generator) for heads in (6, 2, 2))
    lengths_B = torch.tensor([9, 4, 1])
    last = q[torch.arange(3), lengths_B - 1].unsqueeze(1)
    out = cached_attention(last, k.transpose(1, 2), v.transpose(1, 2), lengths_B)
    for row, length in enumerate(lengths_B):
        whole = reference(q[row : row + 1, :length], k[row : row + 1, :length], v[row : row + 1, :length], None)
        torch.testing.assert_close(out[row, 0], whole[0, -1], rtol=1e-5, atol=1e-6)


LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(4000, 1)


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(temperature=1.0), [0, 1, 2, 3]),
        (Sampling(temperature=1.0, top_k=2), [0, 1]),
        (Sampling(temperature=1.0, top_p=0.6), [0]),  # the likeliest alone has 0.64
        (Sampling(temperature=1.0, top_p=0.7), [0, 1]),
        (Sampling(temperature=0.5), [0, 1, 2, 3]),
        (Sampling(temperature=1.0, top_k=3, top_p=0.9), [0, 1]),  # of three, two have 0.91
        (Sampling(temperature=0), [0]),
    ],
)
def test_draws_have_the_probabilities_of_what_is_allowed(sampling, allowed):
    drawn = drawing(sampling)(LOGITS)
    expected = torch.zeros(4)
    expected[allowed] = (LOGITS[0, allowed] / (sampling.temperature or 1.0)).softmax(-1)
    found = drawn.bincount(minlength=4) / len(drawn)
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)
    assert set(drawn.tolist()) <= set(allowed)


def test_a_seed_decides_the_draws():
    one, same, other = (drawing(Sampling(temperature=1.0, seed=seed))(LOGITS) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        (Sampling(temperature=-1), "--temperature=-1: must be 0"),
        (Sampling(temperature=float("nan")), "--temperature=nan"),
        (Sampling(top_k=0), "--top-k=0: must be at least 1"),
        (Sampling(top_p=0), "--top-p=0: must be above 0"),
        (Sampling(top_p=1.5), "--top-p=1.5"),
    ],
)
def test_impossible_sampling_is_said(sampling, said):
    (problem,) = sampling.problems()
    assert problem.startswith(said)


@pytest.mark.parametrize("sampling", DRAWS, ids=["greedy", "all", "top k", "top p"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_of_logits_that_are_not_finite_no_token_is_drawn(number, sampling):
    logits = torch.zeros(2, 5)
    drawing(sampling)(logits)
    logits[1, 3] = number
    with pytest.raises(BadInput, match="logits that are not finite"):
        drawing(sampling)(logits)
