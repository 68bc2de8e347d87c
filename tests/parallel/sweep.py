"""One rank of the layout sweep: the same training on every cut of the same processes."""

from functools import partial

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param

from conf.settings import OptimizerConfig
from model.init import initialise
from model.loss import cross_entropy
from model.transformer import Transformer
from parallel.costs import layer_costs
from parallel.engine import EngineSettings, build_engine, named_parameters, start_process_group
from parallel.forward import next_token_logits
from parallel.layout import Balance, Layout
from parallel.stages import split
from tests.ranks import report
from tests.shapes import small
from train.optimizer import adamw

STEPS, BATCH, SEQ_LEN, SEED = 5, 8, 24, 3
OPTIMIZER = OptimizerConfig(lr=5e-3)
MODEL = small(n_layers=7)


def batches(step):
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(MODEL.vocab_size, (BATCH, SEQ_LEN + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def plain_loop(clip, model_config=MODEL):
    """Single-process PyTorch, no DeepSpeed: what every layout has to equal."""
    model = Transformer(model_config)
    initialise(model, "", SEED, model_config.init_std)
    optimizer = adamw(model.parameters(), OPTIMIZER)
    curve = []
    for step in range(STEPS):
        tokens, labels = batches(step)
        loss = cross_entropy(model(tokens), labels)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))
        optimizer.step()
        curve.append((loss.item(), norm.item()))
    return model, curve


def engine_for(layout, clip, *, bf16=False, micro_batch=1, stages=None):
    accumulation = BATCH // (micro_batch * layout.dp)
    return build_engine(
        MODEL,
        layout,
        stages or split(MODEL.layer_flops(SEQ_LEN), layout.pp),
        EngineSettings(micro_batch, accumulation, clip, bf16, SEED),
        partial(adamw, settings=OPTIMIZER),
    )


def micro_batches(layout, tensors, micro_batch):
    rows = torch.arange(BATCH).reshape(-1, layout.dp, micro_batch)[:, layout.replica(dist.get_rank())]
    return iter([tuple(tensor[row] for tensor in tensors) for row in rows])


def sweep():
    start_process_group()
    world = dist.get_world_size()
    results = []
    for clip, bf16, micro_batch in [(1.0, False, 1), (None, False, 2), (0.05, False, 1), (1.0, True, 1)]:
        for pp in (1, 2, 4):
            layout = Layout(dp=world // pp, pp=pp)
            engine = engine_for(layout, clip, bf16=bf16, micro_batch=micro_batch)
            start = {name: p.detach().float().tolist() for name, p in named_parameters(engine, MODEL)}
            curve = []
            for step in range(STEPS):
                loss = engine.train_batch(micro_batches(layout, batches(step), micro_batch))
                curve.append((float(loss), float(engine.get_global_grad_norm())))
            evaluated = float(
                engine.eval_batch(
                    micro_batches(layout, batches(99), micro_batch), num_micro_batches=BATCH // micro_batch // layout.dp
                )
            )
            lengths = torch.tensor([5, 12, 1])
            logits = next_token_logits(engine, MODEL, batches(98)[0][:3, :12].contiguous(), lengths)
            weights = {n: safe_get_full_fp32_param(p).tolist() for n, p in named_parameters(engine, MODEL)}
            results.append(
                {
                    "clip": clip,
                    "bf16": bf16,
                    "pp": pp,
                    "curve": curve,
                    "eval": evaluated,
                    "logits": logits.tolist(),
                    "start": start if clip == 1.0 else None,
                    "weights": weights,
                    "stage": layout.stage(dist.get_rank()),
                }
            )
    measured = layer_costs(
        MODEL, Balance.measured, seq_len=SEQ_LEN, micro_batch=1, device=torch.device("cpu"), dtype=torch.float32
    )
    return {"runs": results, "measured": measured}


if __name__ == "__main__":
    report(sweep)
