"""The arguments of each verb of the `deepnarrow` command."""

import argparse

from launch.manners import a_path, takes_overrides

OVERRIDES = "Hydra overrides, such as model=7b parallel.pp=4 train.max_steps=100"


def add_arguments(verb: argparse.ArgumentParser, name: str) -> None:
    """Add the arguments of a verb to its parser.

    Args:
        verb: the parser.
        name: of the verb.
    """
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
    if name == "roofline":
        _roofline_arguments(verb)
    if name == "depth-study":
        verb.add_argument("--plan", action="store_true", help="print shapes, costs and pipelines, and train nothing")
    if name in ("check", "launch"):
        a_path(verb, "--hostfile", metavar="FILE", help="DeepSpeed's: a line `HOST slots=N` for each machine")
    if name in ("launch", "scaling"):
        kinds = ("slurm", "k8s", "hostfile") if name == "launch" else ("slurm",)
        what = "the run" if name == "launch" else "the runs to train next, as a job array"
        verb.add_argument("--print", choices=kinds, help=f"print {what} for a cluster instead of starting it")
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


def _roofline_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--device", metavar="DEVICE", help="a preset or a YAML file (the key cluster, or h100)")
    verb.add_argument("--kv-heads", metavar="N,N", help="to compare (as many as heads, the model's own or GQA-8, 1)")
    verb.add_argument("--contexts", metavar="N,N", help="tokens of a sequence (1024,4096,16384,65536)")
    verb.add_argument("--batches", metavar="N,N", help="sequences at the same time (1,16,64)")
    verb.add_argument("--dtype", choices=["bfloat16", "float32"], help="(bfloat16; float32 for a cluster of CPUs)")
    verb.add_argument("--tp", type=int, default=1, help="ranks that share every matrix; figures are of one (1)")
    verb.add_argument("--achieved", action="store_true", help="best rates of kernels, not those of the data sheet")
    verb.add_argument("--measure", action="store_true", help="measure it on this machine as well, beside its roofline")
    a_path(verb, "--out", metavar="DIR", help="a folder for the tables, pictures and JSON")
    _prints_json(verb)


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
        methods = ["mean", "first", "random", "similar", "aligned", "svd"]
        verb.add_argument("--method", choices=methods, default="mean", help="of making one head of several (mean)")
        a_path(verb, "--calibrate", metavar="FILE", help="text on which heads are compared (their weights are)")
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
