"""Small models of several tokenizers, asked by lm-eval: a main of `tests.ranks` whose four ranks hold each of them."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from conf.eval_settings import task_specs
from parallel.layout import Layout
from parallel.scoring import Scorer, load_scorer
from tests.ranks import report
from tests.train.evaluate.local_tasks import NAMES
from train.agreement import control_group
from train.data.tokenizer import Encoder, eos_id, load_tokenizer
from train.evaluate.lead import Leader, led
from train.evaluate.tasks import Asked, Speech, Task, open_task
from train.pretrained import open_source


def speech_of(checkpoint: Path) -> Speech:
    source = open_source(checkpoint)
    tokenizer = load_tokenizer(source.tokenizer)
    end = eos_id(tokenizer, source.tokenizer)
    context = source.weights.config.max_seq_len
    return Speech(tokenizer, str(source.tokenizer), Encoder(tokenizer).encode, end, context)


def scorer_of(checkpoint: Path, layout: Layout) -> Scorer:
    return load_scorer(open_source(checkpoint).weights, layout, torch.device("cpu"), torch.float32)


def opened(name: str, tasks: Path, speech: Speech, **asked: Any) -> Task:
    (spec,), problems = task_specs([f"lm_eval/{name}"])
    assert not problems
    return open_task(spec, Asked(include_path=str(tasks), **asked), speech)


def by_lm_eval(lm: Any, tasks: Path, names: tuple[str, ...] = NAMES, **settings: Any) -> dict[str, dict[str, Any]]:
    """What lm-eval's own entry makes of tasks, and what the model has answered to each question."""
    import lm_eval.evaluator
    from lm_eval.tasks import TaskManager

    lm_eval.evaluator.add_env_info = lambda storage: None  # it asks pip and git, for seconds
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=lm, tasks=[*names], task_manager=manager, bootstrap_iters=0, log_samples=True, **settings
    )
    results = {
        task: {metric: float(value) for metric, value in of_task.items() if isinstance(value, float)}
        for task, of_task in found["results"].items()
    }
    samples = {
        task: [[list(one) if isinstance(one, tuple) else one for (one,) in sample["resps"]] for sample in of_task]
        for task, of_task in found["samples"].items()
    }
    return {"results": results, "samples": samples}


def ours(leader: Leader, checkpoint: Path, tasks: Path) -> dict[str, Any]:
    """What the adapter answers to lm-eval, and what tasks that are opened by it say."""
    from train.evaluate.harness_model import HarnessModel  # on one rank alone: lm-eval takes seconds to import

    speech = speech_of(checkpoint)
    model = HarnessModel(speech)
    model.scorer = leader
    found = by_lm_eval(model, tasks)
    return {**found, "figures": {name: opened(name, tasks, speech).evaluate(leader) for name in NAMES}}


def main() -> dict[str, Any]:
    dist.init_process_group("gloo")
    folder, group, found = Path(sys.argv[1]), control_group(), {}
    for kind in sorted(path.parent for path in folder.glob("*/step-00000000")):
        checkpoint, tasks = kind / "step-00000000", kind / "tasks"
        config, scorer = open_source(checkpoint).weights.config, scorer_of(checkpoint, Layout(1, 2, 2))
        work = lambda leader, checkpoint=checkpoint, tasks=tasks: ours(leader, checkpoint, tasks)  # noqa: E731
        found[kind.name] = led(scorer, config, group, work) or {}
    return found


if __name__ == "__main__":
    report(main)
