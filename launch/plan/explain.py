"""Where a layout of the user's stands among all others, and why it is slower or does not run (`--explain`)."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from conf.compose import compose_overrides
from conf.overrides import key_of
from launch.plan.request import KEYS, Request, below_one, overrides_of, value_of
from launch.plan.rows import gib, parts_of
from model.problems import BadInput
from parallel.layout import Recompute, layout_for
from parallel.memory import Memory
from parallel.plan.predict import Prediction, predict
from parallel.plan.search import HEAD_PIECES, Choice, Found, fullest


@dataclass(frozen=True)
class Explanation:
    """Where a layout stands.

    Attributes:
        text: it, as it was given.
        choice: what it means on the cluster; None where it cannot be laid out there.
        refused: why it would not run, one sentence each.
        memory: of its fullest rank, by the formula, and that rank; None where it is refused.
        fits: whether that is within what a plan may fill.
        prediction: of its step, whether it fits or not; None where it is refused.
        place: the number of layouts that fit and are faster, plus one; None where it is refused.
        lost: seconds that it takes more than the fastest layout by where they go, most first.
        changes: what each key alone changes, set as the fastest layout has it: its override and a sentence.
        would_fit: the fastest of the layouts that differ in recomputation or micro-batch alone and fit; None where it
            fits itself, or none of them does.
    """

    text: str
    choice: Choice | None
    refused: list[str]
    memory: tuple[int, Memory] | None = None
    fits: bool = False
    prediction: Prediction | None = None
    place: int | None = None
    lost: dict[str, float] | None = None
    changes: list[tuple[str, str]] | None = None
    would_fit: tuple[Choice, Prediction] | None = None


def explain(request: Request, found: Found, text: str) -> Explanation:
    """Judge a layout of the user's beside those that were found.

    Args:
        request: what is planned.
        found: the outcome of the search, with at least one candidate.
        text: overrides of the keys that a plan chooses, in one word, as a shell would split it.

    Raises:
        BadInput: they cannot be read, or set other keys.
    """
    choice, refused = choice_of(request, text)
    refused = refused or request.problems(choice) if choice else refused
    if refused or choice is None:
        return Explanation(text, choice, refused)
    task, best = request.task, found.candidates[0]
    rank, memory = fullest(task.job(choice))
    prediction = predict(task.job(choice), request.cluster)
    here, there = (parts_of(task, *one) for one in ((choice, prediction), (best.choice, best.prediction)))
    lost = {name: here[name] - there[name] for name in here}
    fits = _fits(request, memory)
    return Explanation(
        text,
        choice,
        [],
        (rank, memory),
        fits,
        prediction,
        1 + sum(one.seconds < prediction.seconds for one in found.candidates),
        dict(sorted(lost.items(), key=lambda part: -part[1])),
        [_change(request, choice, prediction, name, best.choice) for name in _differing(choice, best.choice)],
        None if fits else _that_fits(request, choice),
    )


def choice_of(request: Request, text: str) -> tuple[Choice | None, list[str]]:
    """Read the layout; the problems are those for which the GPUs cannot be laid out so.

    Raises:
        BadInput: it cannot be read, or sets other keys than a plan chooses.
    """
    composition = compose_overrides([*request.arguments, *words_of(text)])
    if composition.problems:
        raise BadInput([f"--explain: {problem}" for problem in composition.problems])
    config = composition.config
    values = {name: value_of(config, name) for name in KEYS}
    if problems := below_one(values):
        return None, problems
    try:
        layout = layout_for(config.parallel, request.cluster.world_size)
    except ValueError as error:
        return None, [str(error)]
    placement = config.parallel.placement
    return Choice(**{**values, "dp": layout.dp, "virtual_stages": placement.virtual}), []


def words_of(text: str) -> list[str]:
    """Split the overrides of a layout as a shell would.

    Raises:
        BadInput: they cannot be split, or set other keys than a plan chooses.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise BadInput([f"--explain={text}: {str(error).lower()}; --explain 'parallel.pp=8' would work"]) from None
    others = [word for word in words if key_of(word) not in KEYS.values()]
    if others or not words:
        said = f"{' '.join(others)} is none of these" if others else "is empty"
        raise BadInput([f"--explain={text}: {said}; it takes {', '.join(KEYS.values())}"])
    return words


def _fits(request: Request, memory: Memory) -> bool:
    return memory.peak <= request.cluster.allocatable_bytes


def _differing(choice: Choice, best: Choice) -> list[str]:
    """List the keys that differ, but for those that follow: dp from pp and tp, the stages from another schedule."""
    follow = {"dp", *(["virtual_stages"] if choice.schedule is not best.schedule else [])}
    return [name for name in KEYS if name not in follow and getattr(choice, name) != getattr(best, name)]


def _change(request: Request, choice: Choice, now: Prediction, name: str, best: Choice) -> tuple[str, str]:
    """Say what one key alone would change, set as the fastest layout has it; dp takes what pp and tp leave."""
    values: dict[str, Any] = {name: getattr(best, name)}
    override = f"{KEYS[name]}={getattr(values[name], 'name', values[name])}"
    if name == "schedule":
        values["virtual_stages"] = best.virtual_stages
        override += f" parallel.virtual_stages={best.virtual_stages}" * (best.virtual_stages != choice.virtual_stages)
    if name in ("pp", "tp"):
        pipeline = {"pp": choice.pp, "tp": choice.tp, **values}
        values["dp"], left = divmod(request.cluster.world_size, pipeline["pp"] * pipeline["tp"])
        if left:
            return override, "does not lay out all GPUs"
        override += f" parallel.dp={values['dp']}"
    other = replace(choice, **values)
    if problems := request.problems(other):
        return override, f"is refused: {problems[0]}"
    rank, memory = fullest(request.task.job(other))
    if not _fits(request, memory):
        return override, f"does not fit: {gib(memory.peak)} GiB on rank {rank}"
    seconds = predict(request.task.job(other), request.cluster).seconds
    return override, f"{seconds:,.3g} s a step, {seconds - now.seconds:+,.2g} s"


def _that_fits(request: Request, choice: Choice) -> tuple[Choice, Prediction] | None:
    """Find the fastest that fits and differs in recomputation, or else in a smaller micro-batch too."""
    task, micro_batch = request.task, choice.micro_batch
    while micro_batch >= 1:
        fitting = [
            other
            for recompute in Recompute
            for pieces in sorted({choice.head_pieces, *HEAD_PIECES})
            if not request.problems(
                other := replace(choice, recompute=recompute, head_pieces=pieces, micro_batch=micro_batch)
            )
            and _fits(request, fullest(task.job(other))[1])
        ]
        if fitting:
            timed = [(other, predict(task.job(other), request.cluster)) for other in fitting]
            return min(timed, key=lambda one: one[1].seconds)
        micro_batch //= 2
    return None


def as_text(request: Request, found: Found, of: Explanation) -> str:
    """Render an explanation."""
    if of.refused:
        return "\n".join([f"{of.text}: would be refused", *(f"  {problem}" for problem in of.refused)])
    assert of.choice and of.memory and of.prediction and of.lost is not None and of.changes is not None
    best, seconds = found.candidates[0], of.prediction.seconds
    lines = [f"{of.text}: {' '.join(overrides_of(of.choice))}"]
    if not of.fits:
        lines += _does_not_fit(request, of)
    slower = seconds / best.seconds - 1
    compared = f"{abs(slower):.1%} {'more' if slower > 0 else 'less'} than the first" if slower else "as the first"
    equal = ", within the error of predictions" if slower and abs(slower) <= of.prediction.error else ""
    would = "takes" if of.fits else "would take"
    lines.append(
        f"  {would} {seconds:,.4g} s a step, {compared}{equal}: place {of.place:,} of {len(found.candidates):,}"
    )
    for name, more in of.lost.items():
        if abs(more) >= 0.002 * seconds:
            lines.append(f"  {more:>+10,.3g} s  {name}{_reason(name, of.choice, best.choice, of, found)}")
    lines += [f"  with {override}: {said}" for override, said in of.changes]
    return "\n".join(lines)


def _does_not_fit(request: Request, of: Explanation) -> Sequence[str]:
    assert of.memory
    rank, memory = of.memory
    lines = [
        f"  does not fit: rank {rank} of its pipeline needs {gib(memory.peak)} GiB (state {gib(memory.state)}, "
        f"activations {gib(memory.activations)}, workspace {gib(memory.workspace)}), and a plan may fill "
        f"{gib(request.cluster.allocatable_bytes)}"
    ]
    if of.would_fit:
        other, prediction = of.would_fit
        said = " ".join(text for text in overrides_of(other) if text not in overrides_of(of.choice or other))
        lines.append(f"  {said} would, at {prediction.seconds:,.4g} s a step")
    else:
        lines.append(
            "  no recomputation and no smaller micro-batch makes it fit: more of parallel.pp or parallel.tp would"
        )
    return lines


def _reason(name: str, choice: Choice, best: Choice, of: Explanation, found: Found) -> str:
    """Say what a part of a step hangs on, here and in the fastest layout."""
    assert of.prediction is not None
    here, there = (one.job.settings.accumulation for one in (of.prediction, found.candidates[0].prediction))
    why = {
        "bubble": (
            f"{here:,} micro-batches through pp{choice.pp} x {choice.virtual_stages} stages by {choice.schedule.name}, "
            f"against {there:,} through pp{best.pp} x {best.virtual_stages} by {best.schedule.name}"
        ),
        "exposed tp": f"activations of every block travel among tp{choice.tp}, against tp{best.tp}",
        "exposed pp": f"pp{choice.pp} x {choice.virtual_stages} stages pass activations on, against pp{best.pp} x "
        f"{best.virtual_stages}",
        "exposed dp": f"gradients and weights travel among dp{choice.dp}, against dp{best.dp}",
        "recomputed": f"recompute {choice.recompute.name}, head pieces {choice.head_pieces}, against "
        f"{best.recompute.name}, {best.head_pieces}",
        "optimizer": f"a rank's share of the state is one of dp{choice.dp}, against dp{best.dp}",
        "products": f"matrices are cut over tp{choice.tp} and have {choice.micro_batch} sequences, against tp{best.tp} "
        f"and {best.micro_batch}",
    }
    return f": {why[name]}" if name in why else ""


def as_json(of: Explanation) -> dict[str, Any]:
    """Return an explanation for `deepnarrow plan --json`."""
    rank, memory = of.memory or (None, None)
    return {
        "given": of.text,
        "overrides": overrides_of(of.choice) if of.choice else None,
        "refused": of.refused,
        "fits": of.fits,
        "memory": {"rank": rank, "peak": memory.peak} if memory else None,
        "seconds": of.prediction.seconds if of.prediction else None,
        "place": of.place,
        "lost": of.lost,
        "changes": dict(of.changes or []),
        "would_fit": overrides_of(of.would_fit[0]) if of.would_fit else None,
    }
