"""What a run has trained on, as its checkpoints keep it: a resumed run goes on exactly there, whatever it changes.

As long as its settings are the same, a run's samples are a function of their numbers, and nothing has to be kept. Once
it is resumed with another batch, length, mixture or stages, it goes on from what was really trained on; that is from
then on in its checkpoints.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from conf.ramp import rungs
from conf.schema import Config, to_jsonable
from train import passed_over
from train.checkpoint.manifest import Manifest
from train.length import Consumed, Steps


def as_json(
    begun: Consumed, now: Consumed, fingerprints: Mapping[str, str], window: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return what a manifest keeps.

    Args:
        begun: what was trained on before the settings of the run held.
        now: what is by the step of the checkpoint.
        fingerprints: of the sources, by name.
        window: of losses and norms, by which the next steps are judged (`train.spikes`).
    """
    return {"begun": begun.as_json(), "now": now.as_json(), "sources": dict(fingerprints), "window": window}


def window(found: Manifest | None) -> Mapping[str, Any] | None:
    """Return the window of losses and norms that a checkpoint holds; None where it holds none."""
    return ((found.history if found else None) or {}).get("window")


def begun(config: Config, found: Manifest | None, fingerprints: Mapping[str, str] | None = None) -> Consumed:
    """Return what was trained on before a run's settings held.

    Args:
        config: of the run.
        found: the checkpoint that it goes on from; None for a run from the beginning.
        fingerprints: of the sources, by which one that has another name now is known; None where only steps and tokens
            matter.
    """
    if found is None:
        return Consumed(skip=config.train.skip_samples)
    kept = found.history or _of_before(found)
    if not changed(config, found):
        return Consumed.from_json(kept["begun"])
    now = Consumed.from_json(kept["now"])
    ours = list(_course(to_jsonable(asdict(config)))["weights"])
    names = _names(ours, fingerprints or {}, kept["sources"], {name for of in now.positions.values() for name in of})

    def renamed(places: Mapping[str, int]) -> dict[str, int]:
        """Name places as they are called now; of a source that is left out, the place stays for when it comes back."""
        left = {then: place for then, place in places.items() if then not in {*names.values(), *ours}}
        return left | {name: places[then] for name, then in names.items() if then in places}

    return replace(
        now,
        positions={seq_len: renamed(places) for seq_len, places in now.positions.items()},
        skip=config.train.skip_samples - found.config["train"].get("skip_samples", 0),
    )


def changed(config: Config, found: Manifest) -> bool:
    """Tell whether a run's batches, lengths, mixture or stages are others than those of a checkpoint."""
    return _course(to_jsonable(asdict(config))) != _course(found.config)


def problems(config: Config, found: Manifest, earlier: Iterable[tuple[Path, Manifest]] = ()) -> list[str]:
    """Say why a run cannot go on in the data where a checkpoint stands, in a sentence each.

    Args:
        config: of the run, whose ranges can be read.
        found: the checkpoint.
        earlier: those before it with their paths, newest first, one of which may do.
    """
    lines = passed_over.problems(config, found, _now(found), ((path, one, _now(one)) for path, one in earlier))
    then = found.config["train"].get("skip_samples", 0)
    if config.train.skip_samples >= then:
        return lines
    return [
        *lines,
        f"train.skip_samples={config.train.skip_samples}: the run has passed over {then:,} samples already; "
        f"train.skip_samples={then} or more would work",
    ]


def said(config: Config, found: Manifest, since: Consumed) -> list[str]:
    """Say where a run with other batches, lengths, mixture or stages than its checkpoint goes on, in a sentence.

    Args:
        config: of the run.
        found: the checkpoint.
        since: from `begun`.
    """
    if not changed(config, found):
        return []
    ours = _course(to_jsonable(asdict(config)))["weights"]
    places = [
        f"{name} at sequence {place:,} of {seq_len} tokens"
        for seq_len, of in since.positions.items()
        for name, place in of.items()
        if name in ours
    ]
    known = {name for of in since.positions.values() for name in of}
    new = [f"{name} at its beginning" for name in ours if name not in known]
    return [
        f"batches, lengths or mixture are others than up to step {found.step:,}: the run goes on from the "
        f"{since.samples:,} samples and {since.tokens:,} tokens that it has trained on, {', '.join(places + new)}"
    ]


def _course(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a configuration, as JSON, decides the samples of each step; shares for weights."""
    train, data = config["train"], config["data"]
    sources, stages = data.get("sources") or {}, data.get("stages") or []
    own = {name: source["weight"] for name, source in sources.items()} or {data["source"]: 1.0}

    def shares(weights: Mapping[str, float] | None) -> dict[str, float]:
        weights = own if weights is None else weights
        whole = sum(weights.values())
        return {name: weight / whole for name, weight in sorted(weights.items()) if weight}

    each = [(shares(stage["weights"]), stage["seq_len"] or train["seq_len"]) for stage in stages]
    return {
        "ramp": rungs(train["global_batch"]),
        "stages": each or [(shares(None), train["seq_len"])],
        "borders": [stage["until"] for stage in stages[:-1]],
        "skip": train.get("skip_samples", 0),
        "weights": dict.fromkeys(own),
    }


def _now(found: Manifest) -> Consumed:
    """Return what had been trained on by a checkpoint."""
    return Consumed.from_json((found.history or _of_before(found))["now"])


def _of_before(found: Manifest) -> dict[str, Any]:
    """Return the history of a checkpoint that keeps none: one corpus, and all steps alike."""
    train, source = found.config["train"], found.config["data"]["source"]
    steps, skip = Steps(found.step, train["global_batch"], train["seq_len"]), train.get("skip_samples", 0)
    now = Consumed((steps,))
    positions = {steps.seq_len: {source: skip + now.samples}}
    now = Consumed((steps,), positions, 0, {source: now.tokens})
    return as_json(Consumed(skip=skip), now, {source: found.data})


def _names(now: list[str], fingerprints: Mapping[str, str], then: Mapping[str, str], known: set[str]) -> dict[str, str]:
    """Find the name that each source had: the same documents' first, then the same name, then the only one's.

    Args:
        now: names of the sources.
        fingerprints: of those.
        then: fingerprints of the sources that the checkpoint trained on, by name.
        known: names of all sources that the run has ever trained on.
    """
    by_fingerprint = {fingerprint: name for name, fingerprint in then.items()}
    found = {name: by_fingerprint[print_] for name, print_ in fingerprints.items() if print_ in by_fingerprint}
    for name in now:
        if name not in found and name in known and name not in found.values():
            found[name] = name
    if len(now) == len(then) == 1:
        found = {now[0]: next(iter(then))}
    return found
