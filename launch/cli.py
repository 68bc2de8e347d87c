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

from launch.help_texts import HELP
from launch.manners import (
    ShowCompletion,
    ShowVersions,
    a_path,
    judge_texts_and_paths,
    takes_overrides,
    unknown_options,
    unknown_verb,
)
from model.problems import BadInput

OVERRIDES = "Hydra overrides, such as model=7b parallel.pp=4 train.max_steps=100"


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
    # A launcher may start these; the others start processes themselves.
    if known.verb not in ("generate", "eval", "check"):
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
        _arguments_of(verb, name)
        verb.set_defaults(run=run)
        made[name] = verb
    return parser, made


def _arguments_of(verb: argparse.ArgumentParser, name: str) -> None:
    if name == "bench":
        # Without `choices`: an override in its place gets a better answer from the benchmarks.
        verb.add_argument(
            "subject", nargs="?", metavar="SUBJECT", help="what to measure; without one, what is said above"
        )
        a_path(verb, "--out", metavar="FILE", help="findings as JSON (bench.json without a subject)")
        a_path(verb, "--save", metavar="FILE", help="the cluster file to write what `bench cluster` measures into")
    if name == "inspect":
        a_path(verb, "paths", nargs="+", metavar="PATH", help="a run folder or a checkpoint")
    elif name == "generate":
        a_path(verb, "source", help="a run folder, a checkpoint, or a Hugging Face directory")
        verb.add_argument("--prompt", action="append", required=True, help="text to go on from; may be repeated")
        verb.add_argument("--max-tokens", type=int, default=128, help="at most so many more (128)")
        verb.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (0.8)")
        verb.add_argument("--top-k", type=int, help="draw from so many of the likeliest")
        verb.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest of this share (1.0)")
        verb.add_argument("--seed", type=int, default=1, help="of the draws (1)")
        _replica_arguments(verb)
    elif name == "eval":
        _evaluation_arguments(verb)
    elif name == "rerun":
        a_path(verb, "source", help="a run folder")
        verb.add_argument("--step", type=int, required=True, help="the step to compute again")
        verb.add_argument("--repeats", type=int, default=3, help="how often each placement computes it (3)")
        verb.add_argument("--placements", type=int, default=3, help="of the ranks on devices (3, or one for each GPU)")
    elif name == "timeline":
        a_path(verb, "source", help="a run folder")
        verb.add_argument("--step", type=int, help="of those that are kept (the last)")
        a_path(verb, "--out", help="a .png or .svg to draw (timeline-STEP.svg in the run folder)")
    elif name == "runs":
        a_path(verb, "folders", nargs="*", metavar="FOLDER", help="in which runs are, at any depth (runs)")
        verb.add_argument("--watch", nargs="?", type=float, const=5.0, metavar="SECONDS", help="look again and again")
    elif name == "compare":
        a_path(verb, "runs", nargs="+", metavar="RUN", help="run folders; the first is what the others are set against")
        verb.add_argument("--x", choices=["tokens", "step", "hours"], default="tokens", help="of the curves (tokens)")
        a_path(verb, "--out", metavar="FILE", help="draw the curves, as .png or .svg")
    elif name in ("report", "dashboard"):
        _report_arguments(verb, name)
    elif name in ("export", "import", "regroup"):
        _conversion_arguments(verb, name)
    else:
        takes_overrides(verb, help=OVERRIDES)
        _options_of_overrides(verb)
    if name == "describe":
        a_path(verb, "--picture", metavar="FILE", help="draw a step of the pipeline, as .png or .svg")
    if name == "dry-run":
        verb.add_argument("--device-gib", type=float, default=80.0, metavar="GIB", help="memory of a GPU (80)")
        verb.add_argument(
            "--ranks", default="distinct", metavar="RANKS", help="distinct, all, or numbers such as 0,512 (distinct)"
        )
    if name == "plan":
        _plan_arguments(verb)
    if name in ("check", "launch"):
        a_path(verb, "--hostfile", metavar="FILE", help="DeepSpeed's: a line `HOST slots=N` for each machine")
    if name == "launch":
        kinds = ("slurm", "k8s", "hostfile")
        verb.add_argument("--print", choices=kinds, help="print the run for a cluster instead of starting it")
        verb.add_argument("--gpus-per-node", type=int, metavar="N", help="ranks of each node (Slurm's; to print 8)")
    if name == "check":
        a_path(verb, "--save", metavar="FILE", help="a cluster file in which to write the links as measured")
        verb.add_argument("--percent", type=float, default=20.0, help="slower than the median that is named (20)")
    if name == "prepare":
        verb.add_argument("--ray", metavar="ADDRESS", help="start it on every node of a Ray cluster, such as auto")
    if name == "tokenizer":
        verb.add_argument("--against", action="append", default=[], help="another tokenizer, a path or a hub name")
        verb.add_argument("--sample-mb", type=float, default=4.0, help="megabytes to measure on, of each source (4)")
        a_path(verb, "--out", metavar="FILE", help="the report as JSON")
    if name in ("describe", "dry-run", "plan", "inspect", "bench", "check", "rerun", "tokenizer", "runs", "compare"):
        _prints_json(verb)


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


def _options_of_overrides(verb: argparse.ArgumentParser) -> None:
    """Add what says where a configuration is composed from; with a value each, and handed on as they are."""
    group = verb.add_argument_group("where the configuration comes from")
    for option, value, text in (
        ("--like", "RUN", "the overrides of an earlier run, by its folder; those of this command win"),
        ("--config-dir", "DIR", "your own YAML: DIR/experiment/mine.yaml for +experiment=mine, DIR/model/mine.yaml"),
        ("--config-name", "NAME", "a configuration of your own, DIR/NAME.yaml, on top of the package's"),
    ):
        group.add_argument(option, action="append", metavar=value, help=text)
    group.add_argument("--config-path", action="append", help=argparse.SUPPRESS)


def _replica_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--pp", type=int, default=1, help="pipeline stages to cut the model into (1)")
    verb.add_argument("--tp", type=int, default=1, help="ranks that share every matrix of a stage (1)")


def _evaluation_arguments(verb: argparse.ArgumentParser) -> None:
    a_path(verb, "source", help="a run folder, a checkpoint, or a Hugging Face directory")
    verb.add_argument("--tasks", action="append", help="files, folders and names, with commas between them")
    verb.add_argument("--sets", action="append", help="held-out, a name of eval.sets, or NAME=PATH; may be repeated")
    verb.add_argument("--limit", type=int, help="the most questions of each task (the run's eval.limit)")
    verb.add_argument("--shots", type=int, help="examples before each question (the run's eval.shots)")
    a_path(verb, "--include-path", metavar="DIR", help="a folder of tasks of your own for lm-eval")
    a_path(verb, "--out", metavar="FILE", help="write the findings to it, as JSON")
    _replica_arguments(verb)
    _prints_json(verb)


def _prints_json(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="print JSON, for scripts")


def _plan_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--cluster", metavar="CLUSTER", help="NODESxGPUSxPRESET, such as 32x8xh100, or a YAML file")
    verb.add_argument("--price", type=float, help="of an hour of a GPU, in any currency (the cluster's)")
    verb.add_argument("--top", type=int, default=10, help="layouts to print (10)")
    verb.add_argument("--dry-runs", type=int, default=3, help="of the best so many; 0 leaves the formula's memory (3)")
    verb.add_argument("--explain", metavar="OVERRIDES", help="a layout of yours in one word: where it stands, and why")
    a_path(verb, "--write", metavar="FILE", help="the best as DIR/NAME.yaml, for --config-dir DIR --config-name NAME")
    a_path(verb, "--picture", metavar="FILE", help="draw the best's step and its memory, as .png or .svg")


def _written_out(arguments: Sequence[str]) -> list[str]:
    """Write Hydra's short options out, ``-cd`` and ``-cn``."""
    if not any(word.startswith(("-cd", "-cn", "-cp")) for word in arguments):
        return list(arguments)
    from conf.search import long_options

    return long_options(arguments)


def _conversion_arguments(verb: argparse.ArgumentParser, name: str) -> None:
    ours = "a run folder, a checkpoint, or a Hugging Face directory"
    a_path(verb, "source", help="a Hugging Face directory" if name == "import" else ours)
    a_path(verb, "out", help="a folder that is not there yet")
    verb.add_argument("--max-shard-gb", type=float, default=5.0, help="largest file to write, in GB (5)")
    if name == "export":
        dtypes = ["float32", "bfloat16", "float16"]
        verb.add_argument("--dtype", choices=dtypes, default="float32", help="of the written weights (float32)")
    if name == "regroup":
        verb.add_argument("--kv-heads", type=int, required=True, help="key/value heads of the result; 1 is multi-query")
        verb.add_argument("--method", choices=["mean", "first", "random"], default="mean", help="(mean)")
        verb.add_argument("--seed", type=int, default=1, help="for --method random (1)")


def _report_arguments(verb: argparse.ArgumentParser, name: str) -> None:
    if name == "report":
        a_path(verb, "runs", nargs="+", metavar="RUN", help="run folders, in the order of their colours")
        verb.add_argument("--x", choices=["tokens", "step", "hours"], default="tokens", help="of the curves (tokens)")
        a_path(verb, "--out", metavar="FILE", help="the page (report.html, of one run in its folder)")
        return
    verb.add_argument("--project", default="deepnarrow", help="W&B's (deepnarrow)")
    verb.add_argument("--entity", help="the team or user that has it (the account's own)")
    verb.add_argument("--print", action="store_true", help="print what would be saved, as JSON; no account is needed")
    a_path(verb, "--out", metavar="FILE", help="write it to a file instead")


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
    "generate": _run_of("launch.generate"),
    "eval": _run_of("launch.evaluation"),
    "bench": bench,
    "check": _run_of("launch.check.run"),
    "report": _run_of("launch.report.command"),
    "dashboard": _run_of("launch.dashboard"),
    "runs": _run_of("launch.runs"),
    "compare": _run_of("launch.compare.command"),
    "timeline": _run_of("launch.timeline"),
    "rerun": _run_of("launch.rerun.run"),
    "inspect": inspect,
}


if __name__ == "__main__":
    raise SystemExit(main())
