"""The manners of the `deepnarrow` command: its versions, completion in a shell, what a mistyped word was to be, and
whether its arguments are texts and paths that can be."""

import argparse
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from conf.paths import expanded, path_problems
from model.problems import not_utf8

_SHELLS = ("bash", "zsh")
_IS_PATH, _IS_OVERRIDE = "is_path", "is_override"
"""Marks of an action of argparse, which has no place for what its argument stands for."""


def a_path(parser: argparse.ArgumentParser, name: str, **how: Any) -> None:
    """Add an argument that is a path: `judge_texts_and_paths` judges and expands it, and shells complete files."""
    setattr(parser.add_argument(name, **how), _IS_PATH, True)


def takes_overrides(parser: argparse.ArgumentParser, **how: Any) -> None:
    """Add the positional argument ``overrides``; shells complete groups, their presets, and keys."""
    setattr(parser.add_argument("overrides", nargs="*", **how), _IS_OVERRIDE, True)


def judge_texts_and_paths(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """Judge all texts and paths among the arguments of a verb, overrides excepted, and make a `Path` of each path.

    Args:
        options: of a command; a path in it is replaced by the one that it stands for.
        parser: of its verb.

    Returns:
        One sentence for each that cannot be.
    """
    problems = []
    for action in parser._actions:
        given = getattr(options, action.dest, None)
        if given is None or hasattr(action, _IS_OVERRIDE):
            continue
        name = action.option_strings[-1] if action.option_strings else action.metavar or action.dest.upper()
        texts = [text for text in (given if isinstance(given, list) else [given]) if isinstance(text, str)]
        found = [problem for text in texts for problem in not_utf8(str(name), text)]
        if hasattr(action, _IS_PATH):
            found = found or [problem for text in texts for problem in path_problems(str(name), text)]
            paths = [expanded(text) for text in texts]
            setattr(options, action.dest, paths if isinstance(given, list) else paths[0])
        problems += found
    return problems


def unknown_verb(arguments: Sequence[str], parser: argparse.ArgumentParser, verbs: Iterable[str]) -> str | None:
    """Say what the first word of a command may have been meant to be; None where it is a verb or a known option."""
    if not arguments:
        return f"no verb; deepnarrow has {', '.join(verbs)}, and deepnarrow --help says what each does"
    word = arguments[0]
    if word.startswith("-"):
        known = [*parser._option_string_actions]
        return None if word.partition("=")[0] in known else unknown_options([word], parser)
    known = [*verbs]
    if word in known:
        return None
    if "=" in word:
        return f"{word}: an override stands behind a verb; deepnarrow train {word} would work"
    return f"{word}: no such verb; {_meant(word, known)}deepnarrow has {', '.join(known)}"


def unknown_options(words: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """Say of each option that is not known which one it may have been meant to be."""
    known = [name for name, action in parser._option_string_actions.items() if action.help != argparse.SUPPRESS]
    said = []
    for word in words:
        option = word.partition("=")[0]
        said.append(f"{word}: no such option; {_meant(option, known)}--help lists them all")
    return "\n".join(said)


def _meant(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=2, cutoff=0.6)
    return f"did you mean {' or '.join(near)}? " if near else ""


class ShowVersions(argparse.Action):
    """The option ``--version``, which prints and ends."""

    def __init__(self, **how: Any):
        super().__init__(nargs=0, **how)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print the versions."""
        from train.version import versions

        print(versions())
        parser.exit()


class ShowCompletion(argparse.Action):
    """The option ``--completion bash`` or ``--completion zsh``, which prints a script for that shell and ends."""

    def __init__(self, **how: Any):
        super().__init__(choices=_SHELLS, **how)

    def __call__(self, parser: argparse.ArgumentParser, _: Any, shell: Any, *rest: Any) -> None:
        """Print the script."""
        print(completion(parser, shell))
        parser.exit()


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """Write the script that completes a command: verbs, options, files, presets and keys.

    Args:
        parser: of the command, with subparsers.
        shell: bash or zsh.
    """
    import shtab

    for action in _actions(parser):
        if hasattr(action, _IS_PATH):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.dest in ("like", "config_dir"):
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif hasattr(action, _IS_OVERRIDE):
            action.complete = dict.fromkeys(_SHELLS, "_deepnarrow_overrides")  # type: ignore[attr-defined]
    words = " ".join(_overrides())
    return str(shtab.complete(parser, shell=shell, preamble=_PREAMBLE[shell].replace("@WORDS@", words)))


_PREAMBLE = {
    # Bash takes = for the end of a word, and replaces what follows it only.
    "bash": """_deepnarrow_overrides() {
  local line="${COMP_LINE:0:COMP_POINT}"
  local word="${line##* }" before=""
  [[ "$word" == *=* && "$COMP_WORDBREAKS" == *=* ]] && before="${word%%=*}="
  local found=() one
  while IFS= read -r one; do found+=("${one#"$before"}"); done < <(compgen -W "@WORDS@" -- "$word")
  compopt -o nospace 2>/dev/null
  printf '%s\\n' "${found[@]}"
}""",
    "zsh": """_deepnarrow_overrides() {
  compadd -S '' -- @WORDS@
}""",
}


def _actions(parser: argparse.ArgumentParser) -> Iterable[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action.choices, Mapping):
            for below in {id(one): one for one in action.choices.values()}.values():
                yield from _actions(below)


def _overrides() -> list[str]:
    """List the beginnings of overrides: ``model=67b`` for each preset of each group, ``parallel.pp=`` for each key."""
    from conf.schema import Config

    folder = Path(__file__).resolve().parent.parent / "conf"
    presets = [f"{path.parent.name}={path.stem}" for path in sorted(folder.glob("*/*.yaml"))]
    return [*presets, *(f"{key}=" for key in _keys(Config()))]


def _keys(settings: Any) -> Iterable[str]:
    for one in fields(settings):
        inner = getattr(settings, one.name)
        if is_dataclass(inner):
            yield from (f"{one.name}.{key}" for key in _keys(inner))
        else:
            yield one.name
