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
from launch.trainings.written import say_aside
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


def made(
    what: str,
    found: Found,
    make: Callable[[Section, Found], Any],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Return what is made of each section that has findings, by its name, without those where that fails.

    Args:
        what: is made, in a word.
        found: the result of `findings`.
        make: makes it of a section and its findings.
        say: is told what could not be made, and why.
    """
    whole = {}
    for name, section in found["sections"].items():
        if FAILED not in section:
            one = attempted(partial(_named, what, partial(make, Section(name), section)))
            if FAILED in one:
                say(f"{name}: its {what} cannot be made: {one[FAILED]}; its numbers and the other sections are kept")
            else:
                whole[name] = one[what]
    return whole


def _named(what: str, make: Callable[[], Any]) -> dict[str, Any]:
    return {what: make()}


def as_text(found: Found, parts: Mapping[Section, Part] = PARTS, say: Callable[[str], None] = say_aside) -> str:
    """Render `findings` as text: what the study is of, and each section under a heading.

    Args:
        found: the result of `findings`.
        parts: what sections are made of.
        say: is told which section has no text, and why; that stands in its place too.
    """
    blocks, faults = ["\n".join(_head(found))], list[str]()
    texts = made("text", found, lambda name, section: parts[name].text(section, found), faults.append)
    for fault in faults:
        say(fault)
    for name, section in found["sections"].items():
        part = parts[Section(name)]
        why = next((fault for fault in faults if fault.startswith(f"{name}: ")), "")
        text = f"failed: {section[FAILED]}" if FAILED in section else texts.get(name, why)
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


def tables(
    found: Found, parts: Mapping[Section, Part] = PARTS, say: Callable[[str], None] = say_aside
) -> dict[str, Table]:
    """Return the tables of all sections by name; `say` is told which section has none, and why."""
    of_sections = made("tables", found, lambda name, section: parts[name].tables(section), say)
    return {name: table for of in of_sections.values() for name, table in of.items()}
