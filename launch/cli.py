"""The `deepnarrow` command: everything besides the cluster's `deepspeed train/pretrain.py`."""

import argparse
import json
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module

from launch.arguments import add_arguments
from launch.help_texts import HELP
from launch.manners import (
    ShowCompletion,
    ShowVersions,
    judge_texts_and_paths,
    unknown_options,
    unknown_verb,
)
from model.problems import BadInput


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 2 with one line per problem where the input cannot work."""
    given = _written_out(sys.argv[1:] if arguments is None else arguments)
    parser, verbs = make_parser()
    if problem := unknown_verb(given, parser, verbs):
        print(problem, file=sys.stderr)
        return 2
    # Whatever is no option of ours is Hydra's (--cfg job, --config-name ...), and only training passes it on.
    known, unknown = parser.parse_known_args(given)
    # argparse takes the overrides on one side of an option only: describe 67b --json parallel.pp=12.
    if "overrides" in known:
        known.overrides += [word for word in unknown if not word.startswith("-")]
        unknown = [word for word in unknown if word.startswith("-")]
        for name in ("like", "config_dir", "config_name", "config_path"):
            known.overrides += [f"--{name.replace('_', '-')}={value}" for value in getattr(known, name, None) or []]
    if unknown and known.verb != "train":
        verbs[known.verb].error(unknown_options(unknown, verbs[known.verb]))
    if known.verb == "train":
        known.overrides = given[given.index("train") + 1 :]
    # A launcher may start these, and `runs` starts nothing, not even PyTorch; the others start processes themselves.
    if known.verb not in ("generate", "eval", "check", "runs"):
        from parallel.processes import forget_launcher

        forget_launcher(os.environ)
    try:
        if problems := judge_texts_and_paths(known, verbs[known.verb]):
            raise BadInput(problems)
        code = known.run(known)
        sys.stdout.flush()
        return code
    except BadInput as error:
        from parallel.processes import a_later_rank

        if not a_later_rank(os.environ):  # of the ranks of a launcher, one says it
            print("\n".join(error.problems), file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # while it checks or prepares; a launched run has its own way
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        if not _reader_has_left():
            raise
        return 128 + signal.SIGPIPE


def _reader_has_left() -> bool:
    """Tell whether nobody reads the output any more, as after ``| head``; what is left of it is dropped then."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(what & select.POLLERR for _, what in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would fail at it again as it ends
    return True


def make_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Make the parser of the command, and those of its verbs by name."""
    parser = argparse.ArgumentParser(
        prog="deepnarrow",
        description="Pretrain deep, narrow, grouped-query transformers.",
        epilog="deepnarrow VERB --help says more about a verb.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=ShowVersions, help="print the versions of this and of what it stands on")
    parser.add_argument("--completion", action=ShowCompletion, help="print a script that completes it in this shell")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    made = {}
    for name, run in VERBS.items():
        summary, details = HELP[name]
        verb = verbs.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}. {details}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        add_arguments(verb, name)
        verb.set_defaults(run=run)
        made[name] = verb
    return parser, made


def train(options: argparse.Namespace) -> int:
    """Check everything, prepare the data, then start DeepSpeed's launcher and stay with it."""
    from launch.persistence import Persistence
    from launch.supervise import launch
    from train import pretrain
    from train.like import take_over
    from train.preflight import preflight

    arguments = options.overrides
    if pretrain.asks_hydra(arguments):
        pretrain.main(arguments)
        return 0
    prepared = preflight(take_over(arguments, goes_on=True))
    if prepared.complete:
        print(prepared.complete, file=sys.stderr)
        return 0
    arguments = pretrain.for_ranks(prepared.arguments, prepared.run_dir)
    again = pretrain.for_ranks([*prepared.arguments, *pretrain.goes_on(prepared)], prepared.run_dir)
    config, run_dir = prepared.config, prepared.run_dir.absolute()
    persistence = Persistence(prepared.layout, run_dir, config.launch, again, alerting=config.alerts)
    return launch(arguments, prepared.layout.world_size, prepared.run_dir, persistence)


def prepare(options: argparse.Namespace) -> int:
    """Tokenise a corpus ahead of a run."""
    if options.ray:
        from launch.ray_nodes import prepare_on_nodes

        return prepare_on_nodes(options.ray, options.overrides)
    from conf.validate import Machine
    from train.data.sources import shares, table
    from train.like import take_over
    from train.preflight import preflight

    # Nothing is started here, so the GPUs of this machine are no limit: it may be a login node.
    run = preflight(take_over(options.overrides), machine=Machine(gpus=0, elsewhere=True), writes=False, verify=True)
    for name, data in run.data.by_name.items():
        said = f"{name}: " if len(run.data.by_name) > 1 else ""
        print(
            f"{said}{data.num_train_tokens:,} training and {data.num_val_tokens:,} held-out tokens in {data.folder}\n"
            f"{said}tokenizer: {data.tokenizer_path}"
        )
    for name, data in run.sets.by_name.items():
        print(f"eval.sets.{name}: {data.num_train_tokens:,} tokens in {data.folder}")
    print("".join(f"{line}\n" for line in run.data.packed(run.config)), end="")
    taken = shares(run.config, run.data)
    print(f"a run of {sum(share.tokens for share in taken):,} tokens takes\n{table(taken)}")
    return 0


def refine(options: argparse.Namespace) -> int:
    """Deduplicate and filter a corpus."""
    from launch.refine.run import run
    from train.like import take_over

    return run(take_over(options.overrides))


def tokenizer(options: argparse.Namespace) -> int:
    """Report on a tokenizer."""
    from launch.tokenizer_report import run
    from train.like import take_over

    return run(take_over(options.overrides), options.against, options.out, options.json, options.sample_mb)


def describe(options: argparse.Namespace) -> int:
    """Print what a model costs and how it is cut."""
    from launch.describe import as_json, as_text, draw_step, settings

    config = settings(options.overrides)
    if options.picture:
        draw_step(config, options.picture)
    print(as_json(config) if options.json else as_text(config))
    return 0


def export_weights(options: argparse.Namespace) -> int:
    """Write a Hugging Face directory."""
    from launch import convert

    return convert.export(options)


def import_weights(options: argparse.Namespace) -> int:
    """Take in a Hugging Face directory."""
    from launch import convert

    return convert.import_(options)


def regroup(options: argparse.Namespace) -> int:
    """Make fewer key/value heads of many."""
    from launch import convert

    return convert.regroup(options)


def _written_out(arguments: Sequence[str]) -> list[str]:
    """Write Hydra's short options out, ``-cd`` and ``-cn``."""
    if not any(word.startswith(("-cd", "-cn", "-cp")) for word in arguments):
        return list(arguments)
    from conf.search import long_options

    return long_options(arguments)


def gqa_study(options: argparse.Namespace) -> int:
    """Measure what fewer key/value heads cost and buy."""
    from launch.study.run import run
    from train.like import take_over

    return run(take_over(options.overrides))


def bench(options: argparse.Namespace) -> int:
    """Run a benchmark."""
    from launch.bench.suite import run
    from train.like import take_over

    run(options.subject, take_over(options.overrides), options.out, options.json, options.save)
    return 0


def inspect(options: argparse.Namespace) -> int:
    """Say what is in checkpoints; 1 if one is damaged."""
    from launch.checkpoints import as_text, found_at, inspect

    findings = [inspect(path) for given in options.paths for path in found_at(given)]
    print(json.dumps(findings, indent=2) if options.json else "\n".join(as_text(found) for found in findings))
    return 0 if all(found["sound"] for found in findings) else 1


def _run_of(module: str) -> Callable[[argparse.Namespace], int]:
    """Return the `run` of a module, which is imported when it is called; it can be handed to other processes."""
    return partial(_run, module)


def _run(module: str, options: argparse.Namespace) -> int:
    return int(import_module(module).run(options))


VERBS = {
    "train": train,
    "launch": _run_of("launch.cluster.command"),
    "prepare": prepare,
    "refine": refine,
    "tokenizer": tokenizer,
    "describe": describe,
    "dry-run": _run_of("launch.dry_run.command"),
    "plan": _run_of("launch.plan.command"),
    "export": export_weights,
    "import": import_weights,
    "regroup": regroup,
    "gqa-study": gqa_study,
    "scaling": _run_of("launch.scaling.command"),
    "depth-study": _run_of("launch.depth.command"),
    "roofline": _run_of("launch.study.roofline.command"),
    "generate": _run_of("launch.generate"),
    "eval": _run_of("launch.evaluation"),
    "bench": bench,
    "check": _run_of("launch.check.run"),
    "runs": _run_of("launch.runs"),
    "compare": _run_of("launch.compare.command"),
    "report": _run_of("launch.report.command"),
    "dashboard": _run_of("launch.dashboard"),
    "timeline": _run_of("launch.timeline"),
    "rerun": _run_of("launch.rerun.run"),
    "inspect": inspect,
}


if __name__ == "__main__":
    raise SystemExit(main())
