"""Scores of requests: packed and on every layout as of each alone on the whole model, while it trains and after."""

import random
from dataclasses import asdict

import pytest
import torch

from model.init import initialise
from model.transformer import Transformer
from parallel import scoring
from parallel.layout import Layout
from parallel.scoring import Request, load_scorer
from tests.parallel.scored import CASES, LOADED, MICRO_BATCH, MODEL, SEED, SEQ_LEN, DrawnWeights
from tests.ranks import run_ranks

every_case = pytest.mark.parametrize("index", range(len(CASES)), ids=map(repr, CASES))
CONTEXT, VOCABULARY = MODEL.max_seq_len, MODEL.vocab_size
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    """The whole model, with the weights that every engine begins with."""
    whole = Transformer(MODEL)
    initialise(whole, "", SEED, MODEL.init_std)
    return whole


@torch.no_grad()
def plain(model, request):
    """The log-likelihood of a request alone, by the definition, and whether its tokens are the likeliest."""
    log_softmax_LV = model(torch.tensor([request.tokens[:-1]]))[0].double().log_softmax(-1)[request.first - 1 :]
    labels_L = torch.tensor(request.tokens[request.first :])
    return [
        log_softmax_LV.gather(1, labels_L.unsqueeze(1)).sum().item(),
        float(torch.equal(log_softmax_LV.argmax(1), labels_L)),
    ]


def likeliest_after(model, tokens, number):
    tokens = list(tokens)
    for _ in range(number):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens


@pytest.fixture(scope="module")
def requests(model):
    """Of all lengths to the longest, in no order; answers of a token and of several, and what is the likeliest."""
    draw = random.Random(5)

    def tokens(number):
        return [draw.randrange(VOCABULARY) for _ in range(number)]

    found = [Request(tokens(CONTEXT + 1), 1), Request(tokens(2), 1)]
    for length in [*draw.sample(range(3, CONTEXT), 12), *[3] * 4]:
        found.append(Request(tokens(length), draw.randrange(1, length)))
    for length in (5, 20, CONTEXT):
        question = tokens(length)
        found += [Request([*question, answer], length) for answer in tokens(4)]
        found += [Request([*question[:-1], answer, *tokens(1)], length - 1) for answer in (*tokens(2), question[-1])]
        greedy = likeliest_after(model, question[:-2], 3)
        found += [Request(greedy, length - 2), Request(greedy[:-1], 1), Request(greedy[:-1], length - 2)]
    draw.shuffle(found)
    return found


@pytest.fixture(scope="module")
def expected(model, requests):
    return torch.tensor([plain(model, request) for request in requests], dtype=torch.float64)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, requests):
    """What each of four ranks reports."""
    folder = tmp_path_factory.mktemp("scored")
    torch.save([(one.tokens, one.first) for one in requests], folder / "requests.pt")
    return run_ranks("tests.parallel.scored", 4, folder)


def same(scores, expected):
    """The sums of up to 64 log-probabilities to 1e-5 nats, and the same verdict on what is likeliest."""
    torch.testing.assert_close(scores[:, 0], expected[:, 0], rtol=0, atol=1e-5)
    assert torch.equal(scores[:, 1], expected[:, 1])


def test_some_requests_are_the_likeliest_and_some_are_not(expected):
    assert 6 <= expected[:, 1].sum() < len(expected) / 2


@every_case
def test_every_layout_scores_as_the_whole_model_does_on_every_rank(ranks, expected, index):
    for rank in ranks:
        found = rank["engines"][index]
        assert found["case"] == asdict(CASES[index])
        assert torch.equal(found["scores"], ranks[0]["engines"][index]["scores"])
        if CASES[index].bf16:
            torch.testing.assert_close(found["scores"][:, 0], expected[:, 0], rtol=2e-2, atol=0.1)
            assert (found["scores"][:, 1] != expected[:, 1]).sum() <= 2
        else:
            same(found["scores"], expected)
            same(found["one"], expected[:1])
        assert found["none"] == []


TRAINED = [index for index, case in enumerate(CASES) if case.trained]


@pytest.mark.parametrize("index", TRAINED, ids=[repr(CASES[index]) for index in TRAINED])
def test_training_does_not_notice(ranks, index):
    """To the bit, and nor does an evaluation, which tells its sum and its count."""
    for rank in ranks:
        found = rank["engines"][index]
        assert torch.equal(found["steps"], found["steps alone"])
        total, count = found["steps"][-1].tolist()
        assert count == 4 * MICRO_BATCH * SEQ_LEN
        assert 5 < total / count < 6.5  # ln 300 is 5.7


@pytest.mark.parametrize("index", range(len(LOADED)), ids=map(str, LOADED))
def test_weights_are_scored_and_decoded_without_an_engine(ranks, model, requests, expected, index):
    first = [request.tokens[: request.first] for request in requests[:3]]
    with torch.no_grad():
        logits = torch.stack([model(torch.tensor([tokens]))[0, -1] for tokens in first])
    for rank in ranks:
        found = rank["loaded"][index]
        same(found["scores"], expected)
        torch.testing.assert_close(found["logits"], logits, rtol=1e-4, atol=1e-5)


# ---- in this process ----


@pytest.fixture(scope="module")
def scorer():
    return load_scorer(DrawnWeights(), Layout(1, 1), CPU, torch.float32, tokens=200)


def test_a_request_scores_the_same_alone_and_among_others(scorer, requests, expected):
    alone = torch.tensor([[*vars(scorer.score([one])[0]).values()] for one in requests], dtype=torch.float64)
    same(alone, expected)
    same(torch.tensor([[*vars(one).values()] for one in scorer.score(requests)], dtype=torch.float64), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_scores_the_same(requests, expected, dtype):
    scorer = load_scorer(DrawnWeights(), Layout(1, 1), torch.device("cuda"), dtype, tokens=200)
    found = torch.tensor([[*vars(one).values()] for one in scorer.score(requests)], dtype=torch.float64)
    rounding = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.1}
    torch.testing.assert_close(found[:, 0], expected[:, 0], **rounding)
    assert (found[:, 1] != expected[:, 1]).sum() <= 2


def test_no_more_is_computed_than_what_differs(scorer, monkeypatch):
    """Long requests among short ones pad little, and answers of one token to a question are one document."""
    draw = random.Random(0)
    lengths = [draw.choice([2, 5, 9, CONTEXT]) for _ in range(400)]
    requests = [Request([draw.randrange(VOCABULARY) for _ in range(length + 1)], length) for length in lengths]
    requests += [Request([*one.tokens[:-1], token], one.first) for one in requests for token in range(3)]
    batches = []
    monkeypatch.setattr(scorer._pipeline, "forward", lambda given, number, last: batches.extend(given) or [])
    scorer.score(requests)
    computed = sum(batch.tokens.numel() for batch in batches)
    assert sum(lengths) <= computed < 1.02 * sum(lengths)
    assert max(batch.tokens.numel() for batch in batches) <= 200
    assert max(max(batch.documents.lengths) for batch in batches) <= CONTEXT


def test_rows_are_longer_than_in_training_only_for_a_request_that_is(requests):
    """In training a row has 24 tokens here; a micro-batch of one row may hold the longest request."""
    spec = scoring.ActivationSpec((2, 24, MODEL.d_model), torch.float32, CPU, 24)
    short = [request for request in requests if len(request.tokens) <= 25]
    assert scoring._Plan(short, spec, Layout(1, 1)).batch([[0]]).tokens.shape == (2, 24)
    assert scoring._Plan(requests, spec, Layout(1, 1)).batch([[0]]).tokens.shape == (1, CONTEXT)
    uneven = [Request([1] * 24, 1)]
    assert scoring._Plan(uneven, spec, Layout(1, 1, 4, sequence_parallel=True)).batch([[0]]).tokens.shape == (1, 24)


def test_requests_that_cannot_be_scored_are_all_named(scorer):
    bad = [
        *[Request([1, 2], 1), Request([1], 1), Request([1, 2], 0), Request([1, 2], 2)],
        *[Request([1] * (CONTEXT + 2), 1), Request([1, VOCABULARY], 1), Request([-1, 1], 1)],
    ]
    with pytest.raises(ValueError, match="would work") as raised:
        scorer.score(bad)
    named = [line.partition(":")[0] for line in str(raised.value).splitlines()]
    assert named == [f"request {number}" for number in range(1, len(bad))]
