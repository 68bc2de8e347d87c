"""The settings of `launch/`: how a run is kept going by the command that has started it."""

from dataclasses import dataclass


@dataclass
class LaunchConfig:
    """What `deepnarrow train` does about a run that fails or does not move; a bare launcher has nobody who would."""

    restarts: int = 10
    """Restarts within 24 hours, after which the run ends as failed. Each goes on from the newest sound checkpoint,
    after a wait that doubles from one second to five minutes as long as no step is gained. What would fail again is
    not started again: bad input, a run that has diverged, one that fails by itself before its first step, and what has
    failed alike at the same step three times."""
    stall_seconds: float | None = None
    """Seconds without a heartbeat of any rank after which the run is ended, with the rank that the others wait for
    named and the stacks of all ranks in RUN/stalls, and started again. Null is five times the median step, 30 seconds
    at least, and 10 minutes before three steps are taken. Saves, loads, profiles, the preparation at the start and the
    end of a run may take six hours, as long as no rank is stopped."""
    host_wait_minutes: float = 30.0
    """Minutes that `deepnarrow launch` waits, before it starts a run again, for a host that was lost to answer, or for
    another one in its place in the hostfile, which is read again meanwhile. Where the others can have a layout of a
    smaller dp (parallel.dp=null), it waits for one minute at most, and goes on with them. 0 does not wait."""
    force: bool = False
    """true starts a run that by its plan does not fit the memory of the GPUs that are there."""


def problems(settings: LaunchConfig) -> list[str]:
    """Say what cannot be, one sentence each with what would work."""
    found = []
    if settings.restarts < 0:
        found.append(f"launch.restarts={settings.restarts}: must be at least 0, which never restarts; 10 would work")
    if settings.stall_seconds is not None and not 0 < settings.stall_seconds < float("inf"):
        works = "null, which goes by the median step, or 120 would work"
        found.append(f"launch.stall_seconds={settings.stall_seconds}: not a time above 0; {works}")
    if not 0 <= settings.host_wait_minutes < float("inf"):
        works = "0, which does not wait, or 30 would work"
        found.append(f"launch.host_wait_minutes={settings.host_wait_minutes}: not a time from 0 up; {works}")
    return found
