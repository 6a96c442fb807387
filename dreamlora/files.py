"""Files and folders are written here: whole or not at all, with the modes that the person's umask gives, in UTF-8.

What the system refuses becomes a ``WriteError`` that names the file. Nothing of this program writes in another way.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dreamlora.errors import UserError, WriteError, os_error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """For a block that writes to, makes or removes ``path``, itself or through a library.

    Raises:
        WriteError: the system refused.
    """
    try:
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
    # process ids are not enough: containers that share a folder often have the same ones
    temporary = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp{file.suffix}")
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
    temporary = folder.with_name(f".{folder.name}.tmp")
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.iterdir():
                with file.open("r+b") as handle:
                    os.fsync(handle.fileno())  # else a power cut could leave a renamed folder of empty files
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


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
