"""Files and folders are written here: whole or not at all, with the modes that the person's umask gives, in UTF-8.

What the system refuses becomes a ``WriteError`` that names the file. Nothing of this program writes in another way.

A folder to write to may have been prepared by somebody else. So no file is written through a link that lies in its
place: it takes the link's place, or is refused if it is to be continued. A link on the way there, such as outputs/ on a
larger disk, counts if this user or root has placed it, or where nobody but the owner of the folder around it can.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dreamlora.errors import UserError, WriteError, os_error

_CONTINUED = os.O_RDWR | os.O_CREAT | os.O_APPEND
for _name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):  # systems lack some
    _CONTINUED |= getattr(os, _name, 0)
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_MOST_LINKS = 40
"""In one another, as Linux has it."""
_TEMPORARY = re.compile(r"\..+\.(\d+)\.[0-9a-f]{8}\.tmp(\..*)?", re.DOTALL)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """For a block that writes to, makes or removes ``path``, itself or through a library.

    Raises:
        WriteError: the system refused, or a link that somebody else has placed leads there.
    """
    try:
        check_links_to(path.parent)
        yield
    except UserError:
        raise
    except Exception as error:
        refused = os_error(error)
        if refused is None:
            raise
        raise WriteError.of(path, refused) from error


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary file beside ``file`` to write to; it takes the file's place at the end, or vanishes on an error.

    Its mode in the end is that of a file that is simply opened: some libraries make files that nobody else may read.

    Raises:
        WriteError: the system refused.
    """
    temporary = _temporary(file)
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as empty:
                mode = os.fstat(empty.fileno()).st_mode & 0o7777
            yield temporary
            temporary.chmod(mode)
            temporary.replace(file)
        except OSError as error:
            if error.errno is None:
                _provoke(temporary)
            raise
        finally:
            temporary.unlink(missing_ok=True)


def _provoke(file: Path) -> None:
    """Write more, to learn why something could not be written: Pillow does not tell.

    Raises:
        OSError: that is why.
    """
    with file.open("ab") as more:
        more.write(bytes(2**20))


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """The same for a folder: at any moment it is whole or not there. Files in it are written by ``replacing``.

    Raises:
        WriteError: the system refused.
    """
    temporary = _temporary(folder)
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            yield temporary
            for file in (path for path in temporary.rglob("*") if path.is_file()):
                with file.open("r+b") as handle:
                    os.fsync(handle.fileno())  # else a power cut could leave a renamed folder of empty files
            if folder.is_symlink():
                folder.unlink()
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def open_at_end(file: Path) -> BinaryIO:
    """A file to write on at its end, made if it is not there; it can be read too. The writing itself is ``writing``'s.

    Raises:
        WriteError: the system refused; or a link, a pipe or a device lies there, or a file with a second name, where
            what it holds would change as well.
    """
    with writing(file):
        descriptor = os.open(file, _CONTINUED, 0o666)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            os.close(descriptor)
            second = "it has a second name somewhere else, a hard link"
            raise OSError(errno.EEXIST, second if stat.S_ISREG(status.st_mode) else "it is a pipe or a device")
        return os.fdopen(descriptor, "a+b")


def write_atomically(file: Path, text: str) -> None:
    """Write ``text`` so that a reader sees the old file or the new one, never a half.

    Raises:
        WriteError: the system refused.
    """
    with replacing(file) as temporary:
        # file names whose bytes are no text are parts of strings that UTF-8 has no bytes for
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def make_folder(folder: Path) -> Path:
    """The folder, made with its parents if it is not there.

    Raises:
        WriteError: the system refused.
    """
    with writing(folder):
        check_links_to(folder)
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def remove(path: Path) -> None:
    """Remove a file, or a folder with all in it; nothing if it is not there.

    Raises:
        WriteError: the system refused.
    """
    with writing(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove, in a folder and below, what writers have left that were killed. Links are not followed."""
    for place, folders, names in os.walk(folder):
        left = [name for name in (*folders, *names) if _is_leftover(name)]
        folders[:] = [name for name in folders if name not in left]
        for name in left:
            with suppress(WriteError):
                remove(Path(place, name))


def check_links_to(folder: Path, depth: int = 0) -> None:
    """Nothing, if all links on the way to a folder, and in its own place, count.

    Raises:
        OSError: one does not.
    """
    user = this_user()
    if user is None:
        return
    way = folder.absolute()
    for place in (*reversed(way.parents), way):
        try:
            status = place.lstat()
        except (FileNotFoundError, NotADirectoryError):  # from here on it is made, or refused
            return
        if not stat.S_ISLNK(status.st_mode):
            continue
        foreign = status.st_uid not in (user, 0)
        if (foreign and place.parent.stat().st_mode & _OTHERS_MAY_WRITE) or depth == _MOST_LINKS:
            raise OSError(errno.ELOOP, f"somebody else has placed the link {place}", str(place))
        check_links_to(place.parent / place.readlink(), depth + 1)


def this_user() -> int | None:
    """The number of the user that this process runs as; None on Windows, which has none."""
    number: int | None = getattr(os, "getuid", lambda: None)()
    return number


def _temporary(path: Path) -> Path:
    """A name beside ``path`` that is not taken, and that nobody can guess and take before.

    Process ids are not enough: containers that share a folder often have the same ones.
    """
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp{path.suffix}")


def _is_leftover(name: str) -> bool:
    """Whether this is a temporary name of a process that has ended."""
    found = _TEMPORARY.fullmatch(name)
    if found is None or os.name == "nt":  # there, to ask is to kill
        return False
    try:
        os.kill(int(found[1]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # somebody else's
        return False
    return int(found[1]) == os.getpid()  # of a container that was started again: this process writes nothing yet
