"""The `deepnarrow` command: everything besides the cluster's `deepspeed train/pretrain.py`."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence

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
    if known.verb != "generate":  # the one verb that a launcher may start; the others start their processes themselves
        from parallel.processes import forget_launcher

        forget_launcher(os.environ)
    try:
        if problems := judge_texts_and_paths(known, verbs[known.verb]):
            raise BadInput(problems)
        return known.run(known)
    except BadInput as error:
        print("\n".join(error.problems), file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # while it checks or prepares; a launched run has its own way
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT


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
    for name, (run, summary, details) in VERBS.items():
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
        verb.add_argument("--pp", type=int, default=1, help="pipeline stages to cut the model into (1)")
        verb.add_argument("--tp", type=int, default=1, help="ranks that share every matrix of a stage (1)")
    elif name == "timeline":
        a_path(verb, "source", help="a run folder")
        verb.add_argument("--step", type=int, help="of those that are kept (the last)")
        a_path(verb, "--out", help="a .png or .svg to draw (timeline-STEP.svg in the run folder)")
    elif name in ("export", "import", "regroup"):
        _conversion_arguments(verb, name)
    else:
        takes_overrides(verb, help=OVERRIDES)
        _options_of_overrides(verb)
    if name == "describe":
        a_path(verb, "--picture", metavar="FILE", help="draw a step of the pipeline, as .png or .svg")
    if name in ("describe", "inspect", "bench"):
        verb.add_argument("--json", action="store_true", help="print JSON, for scripts")


def train(options: argparse.Namespace) -> int:
    """Check everything, prepare the data, then start DeepSpeed's launcher and stay with it."""
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
    return launch(arguments, prepared.layout.world_size, prepared.run_dir)


def prepare(options: argparse.Namespace) -> int:
    """Tokenise a corpus ahead of a run."""
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
    taken = shares(run.config, run.data)
    print(f"a run of {sum(share.tokens for share in taken):,} tokens takes\n{table(taken)}")
    return 0


def refine(options: argparse.Namespace) -> int:
    """Deduplicate and filter a corpus."""
    from launch.refine.run import run

    return run(options.overrides)


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


def generate(options: argparse.Namespace) -> int:
    """Complete prompts."""
    from launch.generate import run

    return run(options)


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


def gqa_study(options: argparse.Namespace) -> int:
    """Measure what fewer key/value heads cost and buy."""
    from launch.study.run import run
    from train.like import take_over

    return run(take_over(options.overrides))


def bench(options: argparse.Namespace) -> int:
    """Run a benchmark."""
    from launch.bench.suite import run
    from train.like import take_over

    run(options.subject, take_over(options.overrides), options.out, options.json)
    return 0


def timeline(options: argparse.Namespace) -> int:
    """Draw a step."""
    from launch.timeline import run

    return run(options)


def inspect(options: argparse.Namespace) -> int:
    """Say what is in checkpoints; 1 if one is damaged."""
    from launch.checkpoints import as_text, found_at, inspect

    findings = [inspect(path) for given in options.paths for path in found_at(given)]
    print(json.dumps(findings, indent=2) if options.json else "\n".join(as_text(found) for found in findings))
    return 0 if all(found["sound"] for found in findings) else 1


VERBS = {
    "train": (
        train,
        "pretrain on this machine",
        "Takes Hydra overrides.\n\n"
        "  deepnarrow train model=tiny parallel.pp=2\n"
        "  deepnarrow train model=7b parallel.pp=4 data=files data.path='/corpus/*.jsonl.zst' wandb.mode=online\n\n"
        "The whole configuration is checked and the data prepared before any process is started. Then as many\n"
        "ranks as the layout asks for run under DeepSpeed's launcher; none is left behind, and the exit code is\n"
        "theirs. --cfg job prints the composed configuration.\n\n"
        "The same command started again goes on from the newest sound checkpoint, on whatever layout it now has.\n"
        "Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 save and end it with 0; a second one ends it at once.\n\n"
        "On several machines, use the launcher itself: deepspeed --hostfile HOSTS train/pretrain.py OVERRIDES",
    ),
    "prepare": (
        prepare,
        "tokenise a corpus and keep it for every later run",
        "Takes the overrides of the run that it is for.\n\n"
        "  deepnarrow prepare model=7b data=files data.path='/corpus/*.jsonl.zst' data.tokenizer=tokenizer.json\n\n"
        "A run prepares its data itself where nobody has; for a large corpus do it ahead, without holding GPUs.",
    ),
    "refine": (
        refine,
        "deduplicate a corpus, filter it, and say what went",
        "Takes the overrides of the corpus, and refine.… of its own, which launch/refine/plan.py describes.\n\n"
        "  deepnarrow refine data=files data.path='/raw/*.jsonl.zst' refine.out=/refined\n"
        "  deepnarrow refine 'data.sources={web: {path: /web}, code: {path: /code}}' refine.out=/refined \\\n"
        "      refine.unfiltered=[code] refine.executor=slurm refine.slurm='{partition: cpu, time: \"9:00:00\"}'\n\n"
        "DeepSeek LLM's recipe (arXiv 2401.02954, section 2.1) through datatrove's blocks: one copy of each document\n"
        "over all sources (the same text, then MinHash), filters of length, language, repetition and quality, and a\n"
        "data.sources with the shares to paste. refine.json says what each step removed, removed.md shows samples.\n"
        "The same command goes on after an interruption, and does nothing twice.",
    ),
    "describe": (
        describe,
        "print parameters, FLOPs, KV cache and the split into stages",
        "Takes a preset or any Hydra overrides.\n\n"
        "  deepnarrow describe 67b parallel.pp=12\n"
        "  deepnarrow describe 7b model.n_kv_heads=8 --json",
    ),
    "export": (
        export_weights,
        "write a Hugging Face directory of a run's weights",
        "transformers and vLLM load it as Llama. Ends by comparing its logits with the source's.\n\n"
        "  deepnarrow export runs/7b-files-5e0c2f1 7b-hf --dtype bfloat16",
    ),
    "import": (
        import_weights,
        "take in a Llama-shaped Hugging Face directory",
        "Writes weights without an optimizer's state, for init_from.\n\n  deepnarrow import deepseek-llm-7b-base 7b",
    ),
    "regroup": (
        regroup,
        "make fewer key/value heads of many: MHA to GQA or MQA",
        "Takes a run, a checkpoint or a Hugging Face directory, and writes its weights in the format of the source.\n\n"
        "  deepnarrow regroup runs/7b-files-5e0c2f1 7b-gqa8 --kv-heads 8",
    ),
    "gqa-study": (
        gqa_study,
        "measure what fewer key/value heads cost in quality and buy at inference",
        "Pretrains a multi-head model, regroups it to fewer and fewer heads by each method, uptrains every one of\n"
        "them, times decoding, and ends with tables, two pictures and which of the paper's orderings came out.\n\n"
        "  deepnarrow gqa-study                              a model of 1.8 million parameters, minutes on two cores\n"
        "  deepnarrow gqa-study init_from=runs/7b-files-5e0c2f1 parallel.pp=4 study.kv_heads=[8,4,1]\n\n"
        "Takes overrides of the pretraining, and study.kv_heads, study.methods, study.alphas, study.alpha,\n"
        "study.contexts, study.batches, study.dir. The same command goes on where it was stopped.",
    ),
    "generate": (
        generate,
        "complete prompts",
        "Takes a run, a checkpoint or a Hugging Face directory. One prompt streams; several run as a batch.\n\n"
        "  deepnarrow generate runs/tiny-stdlib-574187f --prompt 'def ' --temperature 0.7 --top-p 0.9\n"
        "  deepnarrow generate runs/67b-files-f6aa340 --prompt 'def ' --pp 2 --tp 4\n\n"
        "A model that is too large for one device is cut over --pp x --tp processes, which are started here, or which\n"
        "a launcher has started: torchrun --nproc-per-node 8 --no-python deepnarrow generate RUN --tp 8 ...",
    ),
    "bench": (
        bench,
        "measure what things cost on this machine",
        "Takes overrides, with a subject. Without one: the first five, minutes in all, findings in bench.json.\n\n"
        "  deepnarrow bench stage           training a pipeline stage of the 7B and the 67B (on a CPU a smaller one):\n"
        "                                   tokens/s, MFU, peak memory against what is predicted\n"
        "  deepnarrow bench kernels         attention, loss, norms, rotary positions and SwiGLU, each way they run\n"
        "  deepnarrow bench peers           a forward and backward pass, against transformers, litgpt and torchtitan\n"
        "                                   where they are installed, by turns\n"
        "  deepnarrow bench pipeline        two stages with a core each against one process with both, by turns, and\n"
        "                                   what the bubble allows\n"
        "  deepnarrow bench data            tokens/s of preparation and of loading, against a cluster's consumption\n"
        "  deepnarrow bench checkpoint      seconds that training stands still for a save, in the background and\n"
        "                                   waited for by turns; bytes per parameter on disk\n"
        "  deepnarrow bench decode          a token of 8 sequences of 2048, against transformers' generate\n"
        "  deepnarrow bench schedules       every pipeline schedule by turns, and its bubble against theory\n"
        "  deepnarrow bench start           seconds before the first step: of one process, measured, and an estimate\n"
        "                                   for 512 and 4,096 with what it assumes",
    ),
    "timeline": (
        timeline,
        "draw what every stage of a pipeline did in a step, and what its schedule would have it do",
        "Takes a run folder; train.timeline_at=[10,1000] says which steps a run keeps.\n\n"
        "  deepnarrow timeline runs/tiny-stdlib-574187f --step 10 --out timeline.svg",
    ),
    "inspect": (
        inspect,
        "print what is in checkpoints and whether they are sound",
        "Takes run folders or checkpoints; reads every file.\n\n"
        "  deepnarrow inspect runs/67b-files-f6aa340\n"
        "  deepnarrow inspect runs/67b-files-f6aa340/checkpoints/latest --json",
    ),
}


if __name__ == "__main__":
    raise SystemExit(main())
