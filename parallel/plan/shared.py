"""A pipeline's step where ranks share devices: more ranks than cores, of which each waiting one leaves its core free.

All ranks that have something to compute share the devices evenly, as an operating system's scheduler has it, so that
each is slower while others compute: a step takes no less than the work of all ranks over the devices. While some
devices rest, the others are faster, by what they share besides (`Cluster.crowded_share`). The replicas of a rank and
those that share its matrices compute at the same times, and are counted as so many ranks. Messages take the time that
they were measured to take among ranks that share devices, and leave them free.
"""

from collections.abc import Sequence

from parallel.plan.costs import PassTime
from parallel.plan.steps import RankTime, Step, StepTime, kind_of
from parallel.schedules import Action, orders, source_of, split_off


def shared_step_time(step: Step, copies: int, devices: float, crowded_share: float = 1.0) -> StepTime:
    """Return the seconds of a step whose ranks share devices.

    Args:
        step: what decides the seconds; nothing of it is overlapped with messages.
        copies: the ranks that do the same as each rank of the pipeline, itself included.
        devices: how many of all ranks compute at full speed at the same time.
        crowded_share: the share of the speed of a device that computes alone with which all compute together, as the
            passes of `step` are given.
    """
    machine = devices, crowded_share
    ranks = step.placement.num_ranks
    free, quiet = [0.0] * len(step.links), [RankTime()] * ranks
    alone = _Shared(step, free, quiet, copies, *machine).seconds()
    linked = _Shared(step, step.links, quiet, copies, *machine).seconds()
    whole = _Shared(step, step.links, step.ranks, copies, *machine).seconds() + step.agreement
    # Of a core's time the parts are as long as if it were the rank's alone; what others take of it is waiting.
    busy = PassTime()
    for order in orders(step.schedule, step.placement, step.micro_batches):
        split = split_off(order)
        for action in order:
            time = step.stages[action.stage][kind_of(action, split)]
            busy.add(time)
            busy.host += time.host
    optimizer = sum(rank.optimizer for rank in step.ranks) / ranks
    parts = [part / ranks for part in (busy.products, busy.attention, busy.traffic, busy.host, busy.exposed)]
    products, attention, traffic, host, tp = parts
    pp, dp = linked - alone, whole - linked - optimizer
    return StepTime(whole, products, attention, traffic, host, tp, pp, dp, optimizer, alone - sum(parts))


class _Shared:
    """A step in progress: what each rank still has to do of what it is at.

    Each rank has a list of things to do: (work, seconds of messages after it, the pass or None).
    """

    def __init__(
        self,
        step: Step,
        links: Sequence[float],
        ranks: Sequence[RankTime],
        copies: int,
        devices: float,
        crowded_share: float,
    ):
        self._placement, self._links, self._copies, self._devices = step.placement, links, copies, devices
        self._gain = (1 / crowded_share - 1) / (devices - 1) if devices > 1 else 0.0  # by each device that rests
        self._todo: list[list[tuple[float, float, Action | None]]] = []
        for order, around in zip(orders(step.schedule, step.placement, step.micro_batches), ranks, strict=True):
            split = split_off(order)
            rows: list[tuple[float, float, Action | None]] = [
                (around.optimizer, sum(one.gather for one in around.exchanges), None)
            ]
            for action in order:
                time = step.stages[action.stage][kind_of(action, split)]
                rows.append((time.seconds - time.exposed, time.exposed, action))
            rows.append((0.0, sum(one.reduce for one in around.exchanges), None))
            rows.append((around.after, 0.0, None))
            self._todo.append(rows)
        self._ended: dict[Action, float] = {}

    def seconds(self) -> float:
        """Run the step and return its seconds."""
        now, ranks = 0.0, range(len(self._todo))
        at = [0] * len(self._todo)
        left = [rows[0][0] for rows in self._todo]  # of the work of what each rank is at
        until = [0.0] * len(self._todo)  # when each rank's messages are through
        while any(at[rank] < len(self._todo[rank]) for rank in ranks):
            begins = [self._begins(rank, at[rank], until[rank]) for rank in ranks]
            active = [rank for rank in ranks if begins[rank] is not None and begins[rank] <= now]  # type: ignore[operator]
            later = [begin for begin in begins if begin is not None and begin > now]
            speed = self._speed(len(active) * self._copies)
            events = [*later, *(now + left[rank] / speed for rank in active)]
            if not events:
                raise ValueError("the ranks wait for each other without end")
            then = min(events)
            for rank in active:
                left[rank] -= (then - now) * speed
                if left[rank] <= 1e-12 * max(then, 1.0):  # less than this, and no time passes
                    _, messages, action = self._todo[rank][at[rank]]
                    until[rank] = then + messages
                    if action is not None:
                        self._ended[action] = until[rank]
                    at[rank] += 1
                    left[rank] = self._todo[rank][at[rank]][0] if at[rank] < len(self._todo[rank]) else 0.0
            now = then
        return max(until)

    def _speed(self, computing: int) -> float:
        """Return the speed of each of so many ranks that compute; 1 is that of a device while all compute."""
        resting = max(self._devices - max(computing, 1), 0.0)
        return min(1.0, self._devices / max(computing, 1)) * (1 + self._gain * resting)

    def _begins(self, rank: int, at: int, until: float) -> float | None:
        """Return when a rank can begin what it is at; None where that is not known yet, or it has done all."""
        if at == len(self._todo[rank]):
            return None
        action = self._todo[rank][at][2]
        source = None if action is None else source_of(action, self._placement)
        if action is None or source is None:
            return until
        if source not in self._ended:
            return None
        across = self._placement.rank_of(source.stage) != rank
        return max(until, self._ended[source] + (self._links[min(source.stage, action.stage)] if across else 0.0))
