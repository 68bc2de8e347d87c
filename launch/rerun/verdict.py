"""What follows from a step that was computed several times on several devices: whether hardware or data is at fault."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launch.rerun.notes import RECEIVED


@dataclass(frozen=True)
class Attempt:
    """A step as one rank has computed it once.

    Attributes:
        rank: whose part of the step it is.
        device: that has computed it.
        loss, grad_norm: of the whole step.
        notes: checksums by name, in the order in which they were computed.
    """

    rank: int
    device: str
    loss: float
    grad_norm: float
    notes: Mapping[str, int]


@dataclass(frozen=True)
class Verdict:
    """What is at fault.

    Attributes:
        hardware: whether something was computed otherwise than elsewhere, or than it was recorded.
        devices: that are at fault, or of which one is.
        lines: to print.
    """

    hardware: bool
    devices: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Difference:
    """The first thing that a rank has not computed alike each time."""

    rank: int
    name: str
    values: dict[str, set[int]]
    """By device."""

    @property
    def wavering(self) -> list[str]:
        """Devices that have computed it in several ways."""
        return [device for device, values in self.values.items() if len(values) > 1]

    @property
    def outvoted(self) -> list[str]:
        """Devices that have computed it otherwise than most others; none where no value has most."""
        by_value: dict[int, list[str]] = {}
        for device, values in self.values.items():
            for value in values:
                by_value.setdefault(value, []).append(device)
        most = max(by_value.values(), key=len)
        if len(most) < 2 or sum(len(devices) == len(most) for devices in by_value.values()) > 1:
            return []
        return [device for device in self.values if device not in most]


def judge(attempts: Sequence[Attempt], recorded: tuple[float, float] | None, tolerance: tuple[float, float]) -> Verdict:
    """Tell whether hardware or data is at fault.

    Each part of a step is compared over all attempts at it, on whichever device. Where they differ, the rank that
    computed otherwise from what was alike is where it begins; what other ranks made of it follows. A device is at fault
    that computes the same part now so and now so, or otherwise than most others do.

    Args:
        attempts: of all ranks, each on as many devices as there were placements, and several times on each.
        recorded: loss and gradient norm in the run's record of the step; None where it has none.
        tolerance: by how much, relatively, loss and norm may differ from the record in what a run computes in
            another order.
    """
    differences = _differences(attempts)
    if differences:
        return _of_hardware(differences)
    now, devices = (attempts[0].loss, attempts[0].grad_norm), {one.device for one in attempts}
    alike = f"all {len(attempts)} attempts agree to the last bit, on {len(devices)} devices"
    innocent = "data or optimisation are at fault, not hardware"
    if recorded is None:
        return Verdict(False, [], [f"{alike}; the run has no record of the step: as far as can be told, {innocent}"])
    if same(recorded, now):
        return Verdict(False, [], [f"{alike}, and with what the run has recorded: {innocent}"])
    figures = [f"loss {loss:.8g} and norm {norm:.8g}" for loss, norm in (now, recorded)]
    said = f"{figures[0]} against {figures[1]} in the record"
    if all(map(_close, recorded, now, tolerance)):
        return Verdict(False, [], [f"{alike}, and but for rounding with the run ({said}): {innocent}"])
    return Verdict(
        True,
        [],
        [
            f"{alike}, but not with what the run has recorded ({said}): some device has computed wrongly then, and did "
            "not now; more --repeats may catch it, and deepnarrow check measures each (a run of other settings or "
            "software would differ as well)"
        ],
    )


def first_difference(replays: Sequence[Sequence[tuple[int, float, float]]]) -> int | None:
    """Return the first step before the one in question on which replays differ; None where they are alike.

    Args:
        replays: of each placement, step, loss and norm of each step since the checkpoint.
    """
    for steps in zip(*replays, strict=True):
        if any(not same(one[1:], steps[0][1:]) for one in steps):
            return steps[0][0]
    return None


def _differences(attempts: Sequence[Attempt]) -> list[_Difference]:
    """Find the first difference of each rank that has any."""
    found = []
    for rank in sorted({one.rank for one in attempts}):
        own = [one for one in attempts if one.rank == rank]
        names = dict.fromkeys(name for one in own for name in one.notes)
        for name in names:
            values: dict[str, set[int]] = {}
            for one in own:
                values.setdefault(one.device, set()).add(one.notes.get(name, 0))
            if len(set().union(*values.values())) > 1:
                found.append(_Difference(rank, name, values))
                break
    return found


def _of_hardware(differences: list[_Difference]) -> Verdict:
    begins = [one for one in differences if not one.name.startswith((RECEIVED, "reduced "))]
    if not begins:
        ranks = ", ".join(str(one.rank) for one in differences)
        devices = sorted({device for one in differences for device in one.values})
        return Verdict(True, devices, [f"every rank computes alike each time, but what reaches rank {ranks} does not "
                                       f"({differences[0].name}): a link between {', '.join(devices)} is at fault, or "
                                       "the memory that it ends in"])  # fmt: skip
    named = sorted({device for one in begins for device in one.wavering or one.outvoted})
    where = "; ".join(f"the part of rank {one.rank}, from {one.name} on" for one in begins)
    if named:
        how = "not alike each time" if any(one.wavering for one in begins) else "otherwise than all others"
        which = f"{', '.join(named)} {'computes' if len(named) == 1 else 'compute'} {how}"
        return Verdict(True, named, [f"hardware is at fault: {which} ({where})"])
    shared = set.intersection(*(set(one.values) for one in begins))
    suspects = sorted(shared or {device for one in begins for device in one.values})
    if len(suspects) == 1:
        return Verdict(True, suspects, [f"hardware is at fault: {suspects[0]} is part of every difference ({where})"])
    return Verdict(True, suspects, [f"hardware is at fault: one of {', '.join(suspects)} computes wrongly ({where}); "
                                    "a third device would tell which"])  # fmt: skip


def same(one: Sequence[float], other: Sequence[float]) -> bool:
    """Tell whether figures are the same to the last bit, NaN among them."""
    return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(one, other, strict=True))


def _close(one: float, other: float, tolerance: float) -> bool:
    if not (math.isfinite(one) and math.isfinite(other)):
        return not (math.isfinite(one) or math.isfinite(other))
    return math.isclose(one, other, rel_tol=tolerance)
