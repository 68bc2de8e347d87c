"""Every layout over 4, 6 and 8 real processes against a plain PyTorch loop in one."""

from dataclasses import replace

import pytest
import torch

from model.context import Context
from model.init import initialise
from model.loss import cross_entropy
from model.transformer import Transformer
from parallel.sharding import Cut, assemble, cut_of
from tests.parallel.sweep import CASES, PROMPTS, SEED, STEPS, Case, batch, plain_loop, rows
from tests.ranks import run_ranks

ALL = [
    pytest.param(name, index, id=f"{name} {index}")
    for name in CASES
    for index in range(len(CASES[name]))
    if "GPUs" not in name  # tests/parallel/test_nccl.py
]


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    """What every rank of every launch reported; each launch is made once, when it is first asked for."""
    made = {}

    def of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("sweep")
            (folder / "cases").write_text(name)
            made[name] = run_ranks("tests.parallel.sweep", CASES[name][0].layout.world_size, folder)
        return made[name]

    return of


@pytest.fixture
def run(request, launches):
    """A case, and the reports of its ranks in order."""
    name, index = request.param
    reports = [rank["runs"][index] for rank in launches(name)]
    return Case(**reports[0]["case"]), reports


every_run = pytest.mark.parametrize("run", [param.values for param in ALL], indirect=True, ids=[p.id for p in ALL])


def reference(case):
    shape = ("kv_heads", "n_layers", "vocab_size", "clip", "documents", "window")
    return plain_loop(Case(**{key: getattr(case, key) for key in shape}))


def gathered(case, reports, what):
    """The whole parameters from the parts that the ranks of the first replica hold, by full name."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Transformer(case.model).named_parameters()}
    whole = {}
    for stage in range(case.pp):  # each rank's, however many stages of the model that is
        ranks = [
            report
            for rank, report in enumerate(reports)
            if case.layout.stage(rank) == stage and case.layout.replica(rank) == 0
        ]
        for name in ranks[0][what]:
            assert name not in whole, f"{name} is in two stages"
            whole[name] = assemble(name, [report[what][name] for report in ranks], shapes[name], case.model)
    assert whole.keys() == shapes.keys()
    return whole


@every_run
def test_loss_and_gradient_norm_are_those_of_a_plain_loop_on_every_rank(run):
    case, reports = run
    _, expected = reference(case)
    if not case.bf16:
        for report in reports:
            torch.testing.assert_close(report["curve"], expected, rtol=case.tolerance, atol=case.tolerance)
    else:
        torch.testing.assert_close(reports[0]["curve"][:, 0], expected[:, 0], rtol=2e-3, atol=0)
        torch.testing.assert_close(reports[0]["curve"][:, 1], expected[:, 1], rtol=3e-2, atol=0)
    flops = [case.model.attention_flops(batch(case, step).lengths) for step in range(STEPS)]
    assert all(report["attention_flops"] == flops for report in reports)


@every_run
def test_initial_weights_are_bitwise_the_same(run):
    case, reports = run
    model = Transformer(case.model)
    initialise(model, "", SEED, case.model.init_std)
    if case.bf16:
        model.bfloat16()
    whole = gathered(case, reports, "start")
    for name, parameter in model.named_parameters():
        assert torch.equal(whole[name], parameter.data), name


@every_run
def test_updated_weights_are_those_of_the_plain_loop(run):
    case, reports = run
    model, _ = reference(case)
    whole = gathered(case, reports, "weights")
    for name, parameter in model.named_parameters():
        # by norm: Adam turns the rounding of a gradient near zero into a step of its own
        off = (whole[name] - parameter.data).norm() / parameter.data.norm()
        assert off < (1e-2 if case.bf16 else 10 * case.tolerance), name


@every_run
def test_what_ranks_share_stays_bitwise_the_same_after_every_step(run):
    case, reports = run
    layout = case.layout
    seen = {}
    for rank, report in enumerate(reports):
        for step, digests in enumerate(report["digests"]):
            for name, value in digests.items():
                cut, tp_rank = cut_of(name), layout.tp_rank(rank)
                copies = case.tp if cut is Cut.WHOLE else 1
                if cut is Cut.KV_HEADS and case.tp > case.kv_heads:
                    copies = case.tp // case.kv_heads
                part = tp_rank // copies
                assert seen.setdefault((step, name, part), value) == value, (step, name, rank)
    weights = {name for _, name, _ in seen}
    assert all(seen[0, name, 0] != seen[STEPS - 1, name, 0] for name in weights), "a parameter did not train"


@every_run
def test_evaluation_and_decoding_see_the_trained_model(run):
    case, reports = run
    model, _ = reference(case)
    held_out = batch(case, 99)
    fed = rows(98, case.vocab_size)[:3]
    texts = [row[:n] for row, n in zip(fed, PROMPTS, strict=True)]
    logits = []
    with torch.no_grad():
        loss = cross_entropy(model(held_out.tokens, Context(held_out.documents)), held_out.labels).mean.item()
        for step in range(3):
            logits.append(torch.stack([model(text.unsqueeze(0))[0, -1] for text in texts]))
            texts = [torch.cat([text, token.unsqueeze(0)]) for text, token in zip(texts, fed[:, step], strict=True)]
    logits = torch.stack(logits)
    for report in reports:
        assert report["eval"] == pytest.approx(loss, rel=2e-3 if case.bf16 else case.tolerance)
        assert (report["logits"] - logits).norm() / logits.norm() < (5e-2 if case.bf16 else 10 * case.tolerance)
        assert torch.equal(report["logits"], reports[0]["logits"])


@every_run
def test_the_rate_that_the_trainer_sets_is_the_one_that_is_used(run):
    _, reports = run
    assert all(report["moved_at_rate_0"] == [] for report in reports)


def test_bf16_differs_over_pipelines_and_replicas_by_less_than_a_rounding(launches):
    """Gradients are accumulated and reduced in fp32: in bf16 the first norms would differ by 1e-5 already."""
    runs = [
        run
        for run in launches("4 ranks")[0]["runs"]
        if run["case"]["bf16"] and run["case"]["tp"] == 1 and run["case"]["head_pieces"] == 1
    ]
    assert len(runs) == 3
    for other in runs[1:]:
        torch.testing.assert_close(other["curve"][0], runs[0]["curve"][0], rtol=1e-6, atol=0)


def test_documents_that_do_not_see_each_other_make_another_loss():
    """Else the runs with documents would hold with masks that hide nothing."""
    _, apart = reference(Case(n_layers=7))
    _, together = reference(Case(n_layers=7, documents=False))
    assert (apart[:, 0] - together[:, 0]).abs().min() > 1e-4 * together[0, 0]


def test_clipping_clips():
    """Else the runs with it would hold with clipping that does nothing."""
    _, clipped = reference(Case(n_layers=7, clip=0.05))
    _, free = reference(replace(Case(n_layers=7), clip=None))
    assert free[:, 1].min() > 0.05
    assert (clipped[:, 1] / free[:, 1] - 1).abs().max() > 1e-3


def test_measured_costs_are_one_list_for_all_ranks(launches):
    ranks = launches("4 ranks")
    costs = ranks[0]["measured"]
    assert all(rank["measured"] == costs for rank in ranks)
    assert len(costs) == Case().n_layers + 2 and min(costs) > 0
    assert len(set(costs[1:-1])) == 1
