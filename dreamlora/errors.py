"""The exception types for mistakes a person can mend, and sentences for what the system and other libraries say."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dreamlora.credentials import masked


def numbers(*names: str) -> tuple[int, ...]:
    """Error numbers by their names; systems lack some."""
    return tuple(getattr(errno, name) for name in names if hasattr(errno, name))


DISK_FULL = numbers("ENOSPC", "EDQUOT")
"""Numbers of the ``OSError`` of a disk, or a share of one, that is used up."""


def _advice(by_names: Mapping[str, str]) -> dict[int, str]:
    return {number: advice for names, advice in by_names.items() for number in numbers(*names.split())}


_ADVICE = _advice(
    {
        "ENOSPC EDQUOT": "Free some space there",
        "EFBIG": "Files may not become so large there: see `ulimit -f`, or choose another disk",
        "EROFS EACCES EPERM": "Choose another folder, or have this one made writable for you",
        "ENOTDIR EISDIR EEXIST": "Something else lies in its place: move that away, or choose another folder",
        "ENOTEMPTY EBUSY ETXTBSY": "Another program works there: end that, or choose another folder",
        "EIO ESTALE ENXIO ENODEV ENOTCONN ETIMEDOUT": "See whether the disk or the network share is all right",
        "EMFILE ENFILE": "Close other programs, or raise the limit (`ulimit -n`)",
        "ENAMETOOLONG": "Choose a shorter name",
        "ELOOP": "A link lies there that is not followed: remove it, or choose another folder",
    }
)
"""What to do about an ``OSError``, by its number: what lies with the system and never with this program."""
_ADVICE_WHILE_WRITING = _ADVICE | _advice(
    {
        "ENOENT": "The folder has gone: see whether somebody removed or unmounted it",
        "EINVAL EILSEQ": "The disk does not take such a name: choose another",
    }
)
_NUMBER = re.compile(r"\((?:os error|errno:?) (\d+)\)|\[[Ee]rrno (\d+)\]")
_SQLITE = {
    "database or disk is full": errno.ENOSPC,
    "disk I/O error": errno.EIO,
    "attempt to write a readonly database": errno.EROFS,
    "unable to open database file": errno.EACCES,
}
_PARTNER = re.compile(r"Connection (?:closed|reset) by peer|Broken pipe|Connection was likely closed|remote process")
"""What gloo, torch's store and NCCL say in a process of a run when another one is there no more."""
_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|OUT_OF_MEMORY|ALLOC_FAILED|alloc_cpu\.cpp"
    r"|killed by signal: Killed|out of shared memory"
    r"|Storage size calculation overflowed|integer multiplication overflow",
    re.IGNORECASE,
)


class UserError(Exception):
    """A bad flag, file, image, checkpoint or model.

    The message names what is wrong, what was expected and what to do. The command line prints it without a
    traceback and exits with status 2. Secrets in it are masked: what others say, and what was given, may hold some.
    """

    def __str__(self) -> str:
        return masked(super().__str__())


class DivergedError(UserError):
    """A loss, a gradient, or what an update made, is not finite. A comparison of optimizers records it and goes on."""


class LackOfMemoryError(UserError):
    """Memory does not suffice: the message says for what, and which flags take less. The exit status is 1."""


class WriteError(UserError):
    """Something could not be written, for a reason that lies with the system; the exit status is 1.

    Attributes:
        reason: as a phrase, such as "the disk is full".
        disk_full: whether it is that.
    """

    def __init__(self, message: str, reason: str = "", disk_full: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.disk_full = disk_full

    @classmethod
    def of(cls, path: Path, error: OSError, advice: str | None = None) -> WriteError:
        """For a path that the system refused.

        Args:
            advice: what to do, if it is not what the kind of error says.
        """
        reason, number = _reason(error), error.errno or 0
        if advice is None:
            advice = f"{_ADVICE_WHILE_WRITING.get(number, 'Mend that, or choose another folder')}. {_GO_ON}"
        return cls(f"cannot write {path}: {reason}. {advice}", reason, number in DISK_FULL)


_GO_ON = "What was written before is whole: a training run goes on with --resume_from_checkpoint latest"


def os_error(error: BaseException) -> OSError | None:
    """What the system said, if that is why an exception was raised: by this program or by a library that writes.

    Libraries tell it in ways of their own: behind an exception of theirs, or in words alone.
    """
    for one in _chain(error):
        if isinstance(one, OSError) and one.errno is not None:
            return one
        text = str(one)
        if found := _NUMBER.search(text):
            number = int(found[1] or found[2])
            return OSError(number, os.strerror(number))
        if type(one).__module__ == "sqlite3" and text in _SQLITE:
            return OSError(_SQLITE[text], text)
    return None


def explained(error: BaseException) -> str | None:
    """A sentence for an exception that the person can mend and the program has no words of its own for; else None."""
    if is_of_memory(error):
        return lack_of_memory(error, "", [_LESS_MEMORY])
    if isinstance(error, FileNotFoundError) and "temporary directory" in str(error):
        return f"{error.strerror}. Free some space there, or name another folder in TMPDIR"
    if isinstance(error, FileNotFoundError) and not _has_working_folder():
        return "the folder that this was started in is there no more: change into another one, and start again"
    if isinstance(error, UnicodeEncodeError):
        return f"a name or a text cannot be said in this system's encoding ({error}). Set PYTHONUTF8=1 and start again"
    if isinstance(error, RuntimeError) and _PARTNER.search(str(error)):
        return f"another process of this run has ended: see what it said, or who ended it. {_GO_ON}"
    found = os_error(error)
    if found is None or found.errno not in _ADVICE:
        return None
    where = f"{found.filename}: " if found.filename else ""
    return f"{where}{_reason(found)}. {_ADVICE[found.errno]}. {_GO_ON}"


_LESS_MEMORY = (
    "What takes less: of a training a smaller --resolution, --rank or --train_batch_size (with more "
    "--gradient_accumulation_steps), --gradient_checkpointing, --mixed_precision bf16, or smaller --sample_batch_size "
    "and --eval_batch_size; of other commands a smaller --resolution or batch size"
)


def lack_of_memory(error: BaseException, stage: str, told: Sequence[str]) -> str:
    """What every program says where memory does not suffice.

    Args:
        error: as it was raised.
        stage: of the program; "": none is known.
        told: sentences without their ends: what is held, what to do.
    """
    where = f" in the stage '{stage}'" if stage else ""
    return ". ".join([f"memory does not suffice{where} ({_first_line(error)})", *told])


def is_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice: torch, CUDA, cuBLAS, Apple's Metal and numpy each say it their own way."""
    if isinstance(error, MemoryError | OverflowError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return (isinstance(error, OSError) and error.errno == errno.ENOMEM) or (
        isinstance(error, RuntimeError) and _MEMORY.search(str(error)) is not None
    )


def _has_working_folder() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return False
    return True


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def _reason(error: OSError) -> str:
    if error.errno in DISK_FULL:
        return "the disk is full" if error.errno == errno.ENOSPC else "the disk quota is used up"
    return error.strerror or str(error)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and those that it was raised from or after."""
    following: BaseException | None = error
    seen: set[int] = set()
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        # torch raises errors of its own after those of the file that it writes to
        following = following.__cause__ or (following.__context__ if isinstance(following, RuntimeError) else None)
