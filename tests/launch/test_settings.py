from dataclasses import dataclass, field
from typing import Any

import pytest

from launch.settings import settings_of


@dataclass
class Inner:
    size: int = 1


@dataclass
class Outer:
    names: list[str] = field(default_factory=lambda: ["a"])
    path: str | None = None
    inner: Inner = field(default_factory=Inner)
    free: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(
    "override, key, value",
    [
        ("own.names=[no,on]", "names", ["no", "on"]),  # no booleans, which YAML makes of them
        ("own.names=[]", "names", []),
        ("own.path=/my corpus, it's [new]", "path", "/my corpus, it's [new]"),
        ("own.path='a b'", "path", "a b"),
        ("own.path=null", "path", None),
        ("own.inner.size=3", "inner", Inner(3)),
        ("own.free={time: '1:00:00'}", "free", {"time": "1:00:00"}),
        ("own.path=a,b", "path", "a,b"),  # no sweep
        ("own.free.time=12:00:00", "free", {"time": "12:00:00"}),
    ],
)
def test_overrides_are_read_as_those_of_a_run(override, key, value):
    settings, problems = settings_of(Outer, "own.", [override])
    assert problems == [] and getattr(settings, key) == value


@pytest.mark.parametrize(
    "override, said",
    [
        ("own.name=x", "no such key; there are own.names, own.path, own.inner, own.free"),
        ("own.inner.sizes=x", "no such key; there are own.inner.size"),
        ("own.inner.size=x", "could not be converted to Integer"),
        ("own.names=a,b", "a list stands in brackets; own.names=[a,b] would work"),
    ],
)
def test_what_cannot_be_applied_is_said_and_left_out(override, said):
    settings, problems = settings_of(Outer, "own.", [override, "own.path=there"])
    assert settings == Outer(path="there")
    assert len(problems) == 1 and problems[0].startswith(f"{override}: ") and said in problems[0]
