"""One rank of the layout sweep: the same training on every cut of the same processes."""

import hashlib
import sys
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed as dist

from conf.train_settings import OptimizerConfig
from model.config import AttentionBackend
from model.context import Context
from model.init import initialise
from model.loss import cross_entropy
from model.transformer import Transformer
from parallel.layout import Balance, Layout, Recompute
from parallel.schedules import Schedule, placement_of
from parallel.stages import split_for
from tests.ranks import report
from tests.shapes import matrices_and_vectors, small
from train.data.documents import batch_of
from train.optimizer import adamw

STEPS, BATCH, SEQ_LEN, SEED = 2, 12, 24, 3
"""After these steps comes one more at a rate of 0, which changes no weight: on the first batch, of the first size."""
OTHER_SIZES = {1: (2 * BATCH, 32)}
"""Steps with a larger batch of longer sequences, after which both are smaller again."""
EOS = 1
PROMPTS = (5, 13, 1)
"""Tokens of each sequence that is decoded."""
OPTIMIZER = OptimizerConfig(lr=1e-3)


@dataclass(frozen=True)
class Case:
    """One training run of the sweep."""

    dp: int = 1
    pp: int = 1
    tp: int = 1
    sequence_parallel: bool = False
    kv_heads: int = 2
    n_layers: int = 3
    vocab_size: int = 300
    clip: float | None = 1.0
    bf16: bool = False
    micro_batch: int = 1
    recompute: str = "none"
    head_pieces: int = 1
    schedule: str = "1f1b"
    virtual: int | None = None
    documents: bool = True
    """Whether attention stops at the borders of documents."""
    window: int | None = None
    """Tokens that every other block sees, the first one among them."""
    bucket: int = 1000
    """Elements: many buckets, as a large model has."""
    tolerance: float = 1e-5
    """Of losses and norms in fp32."""

    @property
    def layout(self):
        return Layout(self.dp, self.pp, self.tp, self.sequence_parallel)

    @property
    def placement(self):
        return placement_of(Schedule[self.schedule], self.pp, self.virtual)

    @property
    def model(self):
        slides = {"window": self.window, "window_pattern": "sf"} if self.window else {}
        return small(self.kv_heads, n_heads=8, n_layers=self.n_layers, vocab_size=self.vocab_size, **slides)


def both(**case):
    """With and without sequence parallelism; three micro-batches, which two stages do not divide."""
    case = {"n_layers": 2, "micro_batch": BATCH // 3 // case.get("dp", 1), **case}
    return [Case(**case, sequence_parallel=on) for on in (False, True)]


# Multi-head, grouped and multi-query; 8 query heads.
ATTENTIONS = (8, 2, 1)
SCHEDULES = [
    *[("interleaved", 2), ("interleaved", 3), ("zero_bubble", 1), ("zero_bubble", 2), ("zero_bubble", 3)],
    *[("zbv", None), ("dualpipev", None)],
]
TWO = ["interleaved", "zero_bubble", "zbv", "dualpipev"]
RECOMPUTED = ["selective", "ffn", "full"]
ANY_NUMBER = [("zero_bubble", 1), ("zero_bubble", 2), ("zbv", None)]
CASES = {
    "4 ranks": [
        # Pipelines alone, against clipping and micro-batches.
        *[Case(pp=pp, dp=4 // pp, n_layers=7, clip=clip) for pp, clip in [(1, 0.05), (2, 1.0), (4, 0.05)]],
        *[Case(pp=pp, dp=4 // pp, n_layers=7, bf16=True) for pp in (1, 2, 4)],
        Case(pp=2, dp=2, n_layers=7, clip=None, micro_batch=3),
        *[Case(pp=2, dp=2, recompute=how, micro_batch=2) for how in RECOMPUTED],
        # One bucket of each kind, whatever their size.
        Case(pp=2, dp=2, n_layers=4, micro_batch=3, bucket=2**25, documents=False),
        *[Case(pp=2, dp=2, head_pieces=3, bf16=bf16) for bf16 in (False, True)],
        # Tensor parallelism: two ranks share a key/value head where 2 heads lie on 4 ranks, all four where it is 1.
        *both(pp=2, tp=2, kv_heads=8, recompute="selective", head_pieces=2),
        *both(pp=2, tp=2, kv_heads=2, vocab_size=1003),
        *both(pp=2, tp=2, kv_heads=1, recompute="ffn"),
        *[case for kv in ATTENTIONS[:2] for case in both(tp=4, kv_heads=kv, documents=False, micro_batch=6)],
        *both(tp=4, kv_heads=1, clip=0.05, micro_batch=6),
        *both(tp=4, kv_heads=2, bf16=True, micro_batch=6),
        *[case for kv in ATTENTIONS[1:] for case in both(dp=2, tp=2, kv_heads=kv)],
        *both(dp=2, tp=2, kv_heads=1, bf16=True),
        Case(pp=2, tp=2, sequence_parallel=True, recompute="full", n_layers=2, micro_batch=4),
        # Windows shorter than documents and prompts; the second stage begins with a block that has none.
        Case(pp=2, tp=2, sequence_parallel=True, recompute="selective", n_layers=3, micro_batch=3, window=6),
    ],
    "4 ranks, schedules": [
        # 12 micro-batches over 4 ranks, 6 over 2; 7 and 11 layers, which no stages divide.
        *[Case(pp=4, schedule=name, virtual=v, n_layers=11) for name, v in SCHEDULES],
        *[Case(pp=2, dp=2, schedule=name, virtual=2, n_layers=7) for name in TWO],
        # Three micro-batches, which neither four ranks nor two divide.
        *[Case(pp=4, schedule=name, virtual=v, n_layers=7, micro_batch=4) for name, v in ANY_NUMBER],
        *[
            Case(pp=2, tp=2, sequence_parallel=True, schedule=name, virtual=2, n_layers=4, micro_batch=3)
            for name in TWO
        ],
        Case(pp=2, tp=2, schedule="zero_bubble", n_layers=4, micro_batch=2),
        *[
            Case(pp=2, dp=2, schedule=name, n_layers=4, micro_batch=2, recompute=how)
            for name in TWO[1:3]
            for how in RECOMPUTED
        ],
        Case(pp=2, tp=2, sequence_parallel=True, schedule="zbv", recompute="full", n_layers=4, micro_batch=3),
        *[Case(pp=2, dp=2, schedule=name, n_layers=7, micro_batch=2, bf16=True) for name in TWO[1:3]],
        *[
            Case(pp=2, tp=2, sequence_parallel=True, schedule=name, virtual=2, n_layers=4, micro_batch=3, bf16=True)
            for name in TWO[1:2]
        ],
    ],
    "6 ranks": [*both(pp=3, tp=2, n_layers=7), *both(pp=3, tp=2, n_layers=7, kv_heads=1, vocab_size=1003, clip=0.05)],
    "8 ranks": [
        *[case for kv in ATTENTIONS for case in both(pp=2, tp=2, dp=2, kv_heads=kv)],
        *both(pp=2, tp=4, kv_heads=2, vocab_size=1003),
        *both(pp=2, tp=2, dp=2, bf16=True),
    ],
}


GPU_CASES = {
    1: [
        *[Case(bf16=True, recompute=how, micro_batch=3) for how in ("none", *RECOMPUTED)],
        Case(bf16=True, head_pieces=3, micro_batch=3),
        Case(bf16=True, window=6, micro_batch=3),
        Case(micro_batch=3, tolerance=1e-4),
    ],
    2: [
        *[Case(pp=2, schedule=name, virtual=v, n_layers=7, bf16=True) for name, v in [("1f1b", None), *SCHEDULES]],
        Case(pp=2, n_layers=7, tolerance=1e-4),
        Case(dp=2, bf16=True, micro_batch=3),
        *both(tp=2, bf16=True),
        *both(tp=2, kv_heads=1, tolerance=1e-4),
    ],
    8: [
        *[Case(pp=8, schedule=name, n_layers=14, bf16=True) for name in ("1f1b", "zero_bubble", "zbv")],
        *[case for name in ("1f1b", *TWO) for case in both(pp=2, tp=2, dp=2, schedule=name, n_layers=4, bf16=True)],
        *both(pp=2, tp=4, kv_heads=2, bf16=True),
        Case(pp=2, tp=2, dp=2, sequence_parallel=True, n_layers=4, micro_batch=2, tolerance=1e-4),
    ],
}
"""By number of GPUs: what NCCL carries, with the tolerances of bf16 where it is."""
CASES |= {f"{number} GPUs": cases for number, cases in GPU_CASES.items()}


def rows(step, vocab_size):
    """Sequences of two or three documents, one of which begins with its sequence, and one has a single token."""
    generator = torch.Generator().manual_seed(100 + step)
    number, seq_len = OTHER_SIZES.get(step, (BATCH, SEQ_LEN))
    tokens = torch.randint(vocab_size, (number, seq_len + 1), generator=generator)
    tokens[torch.rand(tokens.shape, generator=generator) < 0.06] = EOS
    tokens[0, 0] = tokens[1, 5] = tokens[1, 6] = EOS
    return tokens


def batch(case, step, chosen=slice(None)):
    chosen = rows(step, case.vocab_size)[chosen]
    return batch_of(chosen.numpy(), eos_id=EOS, document_mask=case.documents)


@cache
def plain_loop(case):
    """Single-process PyTorch, no DeepSpeed: what every layout has to equal. Its layout fields are not read.

    Where documents are apart, attention is the definition's, with a mask of all pairs.
    """
    attention = AttentionBackend.reference if case.documents else case.model.attention
    model = Transformer(replace(case.model, attention=attention))
    initialise(model, "", SEED, case.model.init_std)
    optimizer = adamw(*matrices_and_vectors(model), OPTIMIZER)
    curve = []
    for step in (*range(STEPS), 0):
        whole = batch(case, step)
        loss = cross_entropy(model(whole.tokens, Context(whole.documents)), whole.labels).mean
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.double().square().sum() for p in model.parameters()]).sum().sqrt().float()
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), case.clip or float("inf"), norm)
        if len(curve) < STEPS:
            optimizer.step()
        curve.append((loss.item(), norm.item()))
    return model, torch.tensor(curve)


def micro_batches(case, step):
    replica = case.layout.replica(dist.get_rank())
    number, _ = OTHER_SIZES.get(step, (BATCH, SEQ_LEN))
    chosen = torch.arange(number).reshape(-1, case.dp, case.micro_batch)[:, replica]
    return [batch(case, step, one) for one in chosen]


def digest(tensor):
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def masters(engine, parameters):
    """Every fp32 master weight of this rank's layers, whole."""
    found = {}
    for bucket in engine.zero.buckets:
        whole = bucket.master.detach()
        if engine.ranks.dp:
            whole = torch.empty_like(bucket.gradients)
            dist.all_gather_into_tensor(whole, bucket.master.detach(), group=engine.ranks.dp)
        found.update({slot.parameter: slot.of(whole).clone().cpu() for slot in bucket.slots})
    return {name: found[p] for name, p in parameters.items()}


def train(case):
    """Train as a case says; what this rank held and saw."""
    from parallel.engine import EngineSettings, build_engine

    print(case, flush=True)  # into the rank's log: where it stood if it hangs
    model, accumulation = case.model, BATCH // (case.micro_batch * case.dp)
    settings = EngineSettings(
        *[case.micro_batch, accumulation, case.clip, case.bf16, SEED, SEQ_LEN],
        recompute=Recompute(case.recompute),
        head_pieces=case.head_pieces,
        schedule=Schedule[case.schedule],
        placement=case.placement,
        bucket=case.bucket,
    )
    stages = split_for(model.layer_flops(SEQ_LEN), case.placement)
    engine = build_engine(model, case.layout, stages, settings, partial(adamw, settings=OPTIMIZER))
    parameters = {
        f"{layer}.{name}": parameter
        for layer, module in engine.layers.items()
        for name, parameter in module.named_parameters()
    }
    start = {name: p.detach().clone().cpu() for name, p in parameters.items()}
    curve, digests, attention_flops = [], [], []
    for step in range(STEPS):
        read = micro_batches(case, step)
        result = engine.step(iter(read), OPTIMIZER.lr, len(read))
        curve.append((result.loss, result.grad_norm))
        attention_flops.append(result.attention_flops)
        engine.wait()
        digests.append({name: digest(p) for name, p in parameters.items()})
    evaluated = engine.evaluate(iter(micro_batches(case, 99)), accumulation).mean
    tokens = rows(98, case.vocab_size)[:3, :13].contiguous()
    weights = masters(engine, parameters)
    prompts = [row[:n].tolist() for row, n in zip(tokens, PROMPTS, strict=True)]
    with engine.decoder(prompts, 16) as decoder:
        logits = [decoder.prefill()]
        for step in range(2):
            logits.append(decoder.step(tokens[:, step]))
    read = micro_batches(case, 0)
    result = engine.step(iter(read), 0.0, len(read))
    curve.append((result.loss, result.grad_norm))
    after = masters(engine, parameters)
    return {
        "case": asdict(case),
        "curve": torch.tensor(curve),
        "attention_flops": attention_flops,
        "start": start,
        "digests": digests,
        "weights": weights,
        "eval": evaluated,
        "logits": torch.stack(logits).cpu(),
        "moved_at_rate_0": [name for name in parameters if not torch.equal(after[name], weights[name])],
    }


def sweep():
    from parallel.costs import layer_costs
    from parallel.deepspeed_engine import start_process_group

    device = start_process_group()
    runs = [train(case) for case in CASES[Path(sys.argv[1], "cases").read_text()]]
    shape, batch = Case().model, {"seq_len": SEQ_LEN, "micro_batch": 1}
    measured = layer_costs(shape, Balance.measured, **batch, device=device, dtype=torch.float32)
    return {"runs": runs, "measured": measured}


if __name__ == "__main__":
    report(sweep)
