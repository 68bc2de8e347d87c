"""Files of other file systems, through fsspec: s3://, gs://, hf://, memory:// and all that are installed."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, BinaryIO

from model.problems import BadInput

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*(::.*)?://")
_STAMPS = ("ETag", "etag", "md5Hash", "crc32c", "blob_id", "checksum", "mtime", "LastModified", "last_modified",
           "updated", "created")  # fmt: skip
"""What file systems tell of a file that changes with its content, the surest first."""
_BLOCK = 1 << 22
"""Bytes that are asked for at a time."""


def is_url(path: str) -> bool:
    """Tell whether a path is of another file system, such as s3://bucket/key."""
    return bool(_URL.match(path))


@dataclass(frozen=True)
class RemotePath:
    """A file of another file system, with what a `pathlib.Path` has of use here."""

    url: str
    """Its path with the protocol in front."""
    size: int
    """Its bytes."""
    stamp: str
    """What changes when its content does, as far as the file system tells."""

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.url.rpartition("/")[2]

    def __str__(self) -> str:
        return self.url

    def exists(self) -> bool:
        """Return True: it has been listed."""
        return True

    def stat(self) -> os.stat_result:
        """Return its size in the form of a local file's."""
        return os.stat_result((0o100644, 0, 0, 1, 0, 0, self.size, 0, 0, 0))

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open it; reading asks for ranges of it, and nothing is written to a disk.

        Raises:
            OSError: it cannot be opened, whatever its file system raises for that.
        """
        with _as_oserror(self.url):
            opened: BinaryIO = _filesystem(self.url).open(self.url, mode, block_size=_BLOCK)
        return opened


def list_remote(
    pattern: str, companions_of: Callable[[str], Sequence[str]] = lambda _: ()
) -> list[tuple[str, RemotePath]]:
    """List the files that a URL stands for: a file, a folder with all below it, or a glob; sorted by name.

    Args:
        pattern: the URL.
        companions_of: names the files that belong to a file or to a name, which are listed where they are there.

    Returns:
        Name relative to the folder or to what stands before the first wildcard, and the file. Hidden files are left
        out.

    Raises:
        BadInput: the package for the protocol is not installed, access is refused, or the service cannot be reached.
    """
    with _as_bad_input(pattern):
        fs = _filesystem(pattern)
        path = fs._strip_protocol(pattern)
        if any(char in path for char in "*?["):
            root = re.split(r"[*?\[]", path)[0].rpartition("/")[0]
            infos: dict[str, Any] = fs.glob(path, detail=True)
            others = {other for each in infos for other in companions_of(each)} - set(infos)
            infos |= {other: fs.info(other) for other in others if fs.isfile(other)}
        elif ones := [one for one in (path, *(() if fs.isdir(path) else companions_of(path))) if fs.isfile(one)]:
            root, infos = path.rpartition("/")[0], {one: fs.info(one) for one in ones}
        else:
            root, infos = path.rstrip("/"), fs.find(path, detail=True)
        found = []
        for full, info in infos.items():
            name = full[len(root) :].lstrip("/") if full.startswith(root) else full
            hidden = any(fnmatch(part, ".*") for part in name.split("/"))
            if info.get("type", "file") == "file" and not hidden:
                found.append((name, RemotePath(fs.unstrip_protocol(full), int(info["size"] or 0), _stamp(info))))
    return sorted(found, key=lambda each: each[0])


def _filesystem(url: str) -> "AbstractFileSystem":
    import fsspec

    return fsspec.core.url_to_fs(url)[0]


def _stamp(info: Mapping[str, Any]) -> str:
    return next((f"{key} {info[key]}" for key in _STAMPS if info.get(key)), "")


@contextmanager
def _as_bad_input(url: str) -> Iterator[None]:
    """Say in one sentence why a file system cannot be used."""
    said = f"data.path={url}"
    try:
        yield
    except ImportError as error:  # fsspec names the package: "Install s3fs to access S3"
        raise BadInput([f"{said}: {error}; with that package installed it would work"]) from error
    except FileNotFoundError as error:
        raise BadInput([f"{said}: no such file or folder ({error}); a path that exists would work"]) from error
    except (NameError, TypeError):
        raise
    except Exception as error:  # every service raises kinds of its own for credentials, names and networks
        raise BadInput([f"{said}: cannot be read ({type(error).__name__}: {error}); a path that exists, credentials "
                        "in the environment that may read it, and network to it would work"]) from error  # fmt: skip


@contextmanager
def _as_oserror(url: str) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{url}: {type(error).__name__}: {error}") from error
