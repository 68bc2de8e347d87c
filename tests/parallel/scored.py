"""One rank that scores the same requests on every cut of the same processes, while it trains and without an engine.

A main of `tests.ranks`. What the requests are, and what they are to score, is in the folder that it is handed.
"""

import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from model.config import ModelConfig
from model.init import initial_value
from model.transformer import full_shapes
from parallel import scoring
from parallel.layout import Layout, Recompute
from parallel.schedules import Schedule, placement_of
from parallel.scoring import Request
from parallel.stages import split_for
from tests.parallel.sweep import OPTIMIZER, SEED, SEQ_LEN
from tests.ranks import report
from tests.shapes import small
from train.data.documents import batch_of
from train.optimizer import adamw

MICRO_BATCH = 4
MODEL = small(2, n_layers=6, n_heads=8)


@dataclass(frozen=True)
class Case:
    """A layout of four processes, and how its stages run."""

    dp: int = 1
    pp: int = 1
    tp: int = 1
    sequence_parallel: bool = False
    schedule: str = "1f1b"
    virtual: int | None = None
    head_pieces: int = 1
    recompute: str = "none"
    bf16: bool = False
    trained: bool = False
    """Whether it trains as well, once with scores between the steps and once without."""


CASES = [
    *[Case(dp=4), Case(dp=2, pp=2, trained=True), Case(pp=4), Case(pp=4, head_pieces=3, recompute="full")],
    *[Case(pp=4, schedule="zbv", trained=True), Case(dp=2, pp=2, schedule="interleaved", virtual=3)],
    *[Case(dp=2, tp=2), Case(tp=4, sequence_parallel=True), Case(pp=2, tp=2, head_pieces=2)],
    Case(pp=2, tp=2, sequence_parallel=True, schedule="zbv", trained=True),
    Case(pp=2, tp=2, sequence_parallel=True, bf16=True),
]
LOADED = [Layout(1, 4, 1), Layout(1, 2, 2), Layout(1, 1, 4)]


class DrawnWeights:
    """The weights that engines begin with, in the place of those in a file."""

    config: ModelConfig = MODEL

    def __init__(self) -> None:
        self._shapes = full_shapes(MODEL)

    def read(self, name: str) -> torch.Tensor:
        """The whole parameter."""
        return initial_value(name, self._shapes[name], SEED, MODEL.init_std)


def built(case, device):
    """The engine of this rank."""
    from parallel.engine import EngineSettings, build_engine

    placement = placement_of(Schedule[case.schedule], case.pp, case.virtual)
    settings = EngineSettings(
        *[MICRO_BATCH, 4 // case.dp, 1.0, case.bf16, SEED, SEQ_LEN],
        recompute=Recompute(case.recompute),
        head_pieces=case.head_pieces,
        schedule=Schedule[case.schedule],
        placement=placement,
        bucket=1000,
    )
    layout = Layout(case.dp, case.pp, case.tp, case.sequence_parallel)
    stages = split_for(MODEL.layer_flops(SEQ_LEN), placement)
    return build_engine(MODEL, layout, stages, settings, partial(adamw, settings=OPTIMIZER), device)


def steps(engine, scored):
    """The losses and norms of two steps, and the sum and count of an evaluation; requests are scored before each."""
    generator, dp, own = torch.Generator().manual_seed(1), engine.ranks.layout.dp, engine.ranks.dp_rank
    curve = []
    for _ in range(3):
        rows = torch.randint(MODEL.vocab_size, (4, MICRO_BATCH, SEQ_LEN + 1), generator=generator)[own::dp]
        batches = iter([batch_of(one.numpy(), eos_id=1, document_mask=True) for one in rows])
        if scored:
            engine.score(scored)
        if len(curve) < 2:
            result = engine.step(batches, OPTIMIZER.lr)
            curve.append((result.loss, result.grad_norm))
    evaluated = engine.evaluate(batches, len(rows))
    return torch.tensor([*curve, (evaluated.total, evaluated.count)], dtype=torch.float64)


def told(scores):
    return torch.tensor([(one.log_likelihood, one.greedy) for one in scores], dtype=torch.float64)


def scored_on(case, requests, device):
    print(case, flush=True)  # into the rank's log: where it stood if it hangs
    engine = built(case, device)
    return {
        "case": asdict(case),
        "scores": told(engine.score(requests)),
        "one": told(engine.score(requests[:1])),
        "none": engine.score([]),
        "steps": steps(engine, requests[:3]) if case.trained else None,
        "steps alone": steps(built(case, device), []) if case.trained else None,
    }


def loaded_on(layout, requests, device):
    scorer = scoring.load_scorer(DrawnWeights(), layout, device, torch.float32, tokens=100)
    prompts = [list(request.tokens[: request.first]) for request in requests[:3]]
    with scorer.decoder(prompts, MODEL.max_seq_len) as decoder:
        logits = decoder.prefill()
    return {"layout": asdict(layout), "scores": told(scorer.score(requests)), "logits": logits}


def main():
    from parallel.deepspeed_engine import start_process_group

    device = start_process_group()
    scoring._ROUND = 2  # several rounds of a few micro-batches
    requests = [Request(*one) for one in torch.load(Path(sys.argv[1], "requests.pt"))]
    return {
        "engines": [scored_on(case, requests, device) for case in CASES],
        "loaded": [loaded_on(layout, requests, device) for layout in LOADED],
    }


if __name__ == "__main__":
    report(main)
