"""The findings of a study: a section for each question, each with its numbers, its text and its tables."""

import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from launch.study import measurements, tradeoff, uptrained, warm_starts, windows
from launch.study.part import Found, Part
from launch.study.results import Results
from launch.study.settings import Section
from launch.trainings.wandb_of_study import Table
from model.problems import BadInput

PARTS: dict[Section, Part] = {
    Section.uptraining: uptrained.PART,
    Section.decode: tradeoff.DECODE,
    Section.smaller: tradeoff.SMALLER,
    Section.heads: measurements.HEADS,
    Section.long_range: measurements.LONG_RANGE,
    Section.windows: windows.PART,
    Section.warm_starts: warm_starts.PART,
    Section.roofline: measurements.ROOFLINE,
}
FAILED = "failed"
"""The key of a section that has no findings, with the reason."""


def findings(results: Results, failed: Mapping[Section, str], parts: Mapping[Section, Part] = PARTS) -> dict[str, Any]:
    """Measure every section, and return all numbers of a study.

    Args:
        results: of the trainings.
        failed: why trainings of a section have failed, by section.
        parts: what sections are made of.

    Returns:
        A dict for JSON: ``shape``, ``data``, ``tokens``, ``rate``, ``alpha``, ``seeds`` and what they are ``seeds_of``,
        and ``sections``, the findings of each by its name; one that failed has ``failed`` alone, with the reason.
    """
    sections: dict[str, dict[str, Any]] = {}
    for section in results.study.sections:
        if section in failed:
            sections[section.value] = {FAILED: failed[section]}
            continue
        results.say(f"{section.value}: {parts[section].title}")
        sections[section.value] = attempted(partial(parts[section].findings, results, sections))
        if reason := sections[section.value].get(FAILED):
            results.say(f"{section.value}: {reason}; the other sections go on")
    return {**facts(results), "sections": sections}


def attempted(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a section measures, or why it cannot: it takes no other section with it."""
    try:
        return measure()
    except BadInput as error:
        return {FAILED: "; ".join(error.problems)}
    except Exception as error:  # a fault of this code, or of the machine: it is shown as such, and costs no results
        traceback.print_exc()
        return {FAILED: f"{type(error).__name__}: {error}"}


def facts(results: Results) -> dict[str, Any]:
    """Return what the study is of."""
    study, model = results.study, results.study.model
    return {
        "shape": f"{model.n_layers} layers of {model.d_model}, {model.n_heads} query heads of {model.d_head}",
        "data": study.config.data.source.name,
        "tokens": study.tokens,
        "rate": study.rate.name,
        "alpha": f"{study.settings.alpha:g}",
        "seeds": results.seeds,
        "seeds_of": "order" if study.source else "pretraining",
    }


def as_text(found: Found, parts: Mapping[Section, Part] = PARTS) -> str:
    """Render `findings` as text: what the study is of, and each section under a heading."""
    blocks = ["\n".join(_head(found))]
    for name, section in found["sections"].items():
        part = parts[Section(name)]
        text = f"failed: {section[FAILED]}" if FAILED in section else part.text(section, found)
        heading = f"{name}: {part.title}"
        blocks.append(f"{heading}\n{'-' * len(heading)}\n{text}")
    return "\n\n".join(blocks)


def _head(found: Found) -> list[str]:
    seeds = ", ".join(str(seed) for seed in found["seeds"])
    how = "that it ended with" if found["rate"] == "end" else "of its whole schedule, run again"
    lines = [
        f"{found['shape']}, trained on {found['tokens']:,} tokens of {found['data']}; uptraining at the rate {how}, "
        f"compared after alpha = {found['alpha']}."
    ]
    if len(found["seeds"]) == 1:
        return [*lines, f"One seed, {seeds}: figures have no spread, and orderings stand for this seed alone."]
    lines.append(
        f"{len(found['seeds'])} seeds ({seeds}), each a pretraining of its own: initial weights and the order of data."
        if found["seeds_of"] == "pretraining"
        else f"{len(found['seeds'])} seeds ({seeds}) of the uptrainings' order of data; the original is one, so that "
        "spreads are smaller than those of models trained anew."
    )
    lines.append(
        f"Figures are means over seeds ± their standard deviation. Shares above alpha = {found['alpha']}, and times, "
        "are of the first seed. An ordering is stated where all seeds have it."
    )
    return lines


def tables(found: Found, parts: Mapping[Section, Part] = PARTS) -> dict[str, Table]:
    """Return the tables of all sections by name."""
    return {
        name: table
        for section, of in found["sections"].items()
        if FAILED not in of
        for name, table in parts[Section(section)].tables(of).items()
    }
