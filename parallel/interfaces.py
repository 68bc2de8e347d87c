"""Network interfaces of this host: whether those that a run is to use are there, and whether others can reach it.

Gloo listens where the host's own name leads to, unless GLOO_SOCKET_IFNAME names an interface; NCCL takes whatever
interface it finds, unless NCCL_SOCKET_IFNAME does.
"""

import socket
from collections.abc import Mapping
from contextlib import suppress

import psutil

_GLOO, _NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


def problems(environment: Mapping[str, str], several_hosts: bool) -> list[str]:
    """Say what other hosts would wait for in vain, one sentence each with what would work.

    Args:
        environment: of a rank on this host.
        several_hosts: whether the run has ranks elsewhere.
    """
    found = [_absent(name, wanted) for name, wanted in _named(environment) if not _exists(wanted)]
    if several_hosts and not environment.get(_GLOO) and not _is_loopback(environment.get("MASTER_ADDR", "")):
        found += _own_name()
    return found


def others() -> list[str]:
    """Return the interfaces of this host that have an address and are up, without the loopback."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    return [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if name in up and any(one.family == socket.AF_INET and not _is_loopback(one.address) for one in addresses)
    ]


def _own_name() -> list[str]:
    name = socket.gethostname()
    address = None
    with suppress(OSError):
        address = socket.gethostbyname(name)
    if address is not None and not _is_loopback(address):
        return []
    leads = "cannot be looked up" if address is None else f"is {address}, where no other host reaches it"
    works = f"{_GLOO}={(others() or ['eth0'])[0]}, or the address of its network behind that name in /etc/hosts"
    return [f"{name}: the own name of this host {leads} (/etc/hosts), and Gloo listens there; {works}, would work"]


def _named(environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """List the interfaces that an environment asks for: Gloo's by their names, NCCL's by how they begin."""
    found = [(_GLOO, name) for name in environment.get(_GLOO, "").split(",") if name]
    asked = environment.get(_NCCL, "")
    if asked and not asked.startswith("^"):  # those not to be used
        exact = asked.startswith("=")
        found += [(_NCCL, name if exact else f"{name}*") for name in asked.removeprefix("=").split(",") if name]
    return found


def _exists(wanted: str) -> bool:
    names = psutil.net_if_addrs()
    if not wanted.endswith("*"):
        return wanted in names
    return any(name.startswith(wanted[:-1]) for name in names)


def _absent(key: str, wanted: str) -> str:
    name = wanted.removesuffix("*")
    works = " or ".join(others()) or "none, but for the loopback,"
    return f"{key}={name}: this host has no such interface; {works} would work"


def _is_loopback(address: str) -> bool:
    return address == "localhost" or address.startswith("127.") or address == "::1"
