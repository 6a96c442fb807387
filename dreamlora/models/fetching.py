"""Files of models: from a folder, or from the hub at one commit. Their names are ours alone to choose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dreamlora.errors import DISK_FULL, UserError
from dreamlora.models.fingerprint import fingerprint
from dreamlora.models.local import local_file


@dataclass(frozen=True)
class Place:
    """Where one part of a model lies: a folder, or one of a hub repository at one commit.

    All that is loaded is fetched here first, file by file and under names that we know: the libraries are given files
    and folders, so that nothing in a model can make them ask for another.

    Attributes:
        path: folder or hub repository.
        commit: of the repository, since a branch may move between two of its files; None for a folder.
        cache_dir: where downloads are kept.
        folder: of the part, below ``path``; "" for that itself.
    """

    path: str
    commit: str | None
    cache_dir: Path | None
    folder: str = ""

    def __str__(self) -> str:
        return f"{self.path}/{self.folder}" if self.folder else self.path

    def file(self, name: str) -> Path:
        """A file of the part; fetched if it is not here yet.

        Raises:
            UserError: see ``find_file``.
        """
        return find_file(self.path, self._below(name), self.commit, self.cache_dir)

    def optional(self, name: str) -> Path | None:
        """The same, or None if there is no such file, or none that can be had now."""
        if Path(self.path).is_dir():
            file = Path(self.path, self._below(name))
            return file if file.is_file() else None
        known = try_to_load_from_cache(self.path, self._below(name), self.cache_dir, self.commit)
        if known is not None:  # a path, or a mark that the commit is known to have no such file
            return Path(known) if isinstance(known, str) else None
        try:
            return Path(hf_hub_download(self.path, self._below(name), revision=self.commit, cache_dir=self.cache_dir))
        except EntryNotFoundError:
            return None
        except OSError as error:
            raise _told(error, self.path, self._below(name), self.commit) from error

    def downloaded(self, name: str) -> Path | None:
        """A file that was fetched from the hub before."""
        known = try_to_load_from_cache(self.path, self._below(name), self.cache_dir, self.commit)
        return Path(known) if isinstance(known, str) else None

    def listing(self) -> dict[str, int]:
        """Names and sizes in bytes of the part's files on the hub.

        Raises:
            UserError: it cannot be reached, or does not give them.
        """
        try:
            files = HfApi().model_info(self.path, revision=self.commit, files_metadata=True).siblings or []
        except Exception as error:  # of the hub's library, or of the one that it reaches the network by
            raise _told(error, self.path, self._below("*"), self.commit) from error
        beginning = self._below("")
        inside = ((file.rfilename, file.size or 0) for file in files if file.rfilename.startswith(beginning))
        return {name.removeprefix(beginning): size for name, size in inside}

    def header_of(self, name: str) -> tuple[int, dict[str, int]]:
        """How many tensors a safetensors file on the hub holds, and how many numbers by their type.

        Raises:
            UserError: see ``listing``.
        """
        try:
            header = HfApi().parse_safetensors_file_metadata(self.path, self._below(name), revision=self.commit)
        except Exception as error:
            raise _told(error, self.path, self._below(name), self.commit) from error
        return len(header.tensors), {str(kind): count for kind, count in header.parameter_count.items()}

    def _below(self, name: str) -> str:
        return f"{self.folder}/{name}" if self.folder else name


def find_file(path: str, name: str, revision: str | None, cache_dir: Path | None) -> Path:
    """A file of a folder or hub repository; fetched if it is not here yet.

    Raises:
        UserError: no such folder, repository or file, or the hub cannot be reached.
    """
    file = local_file(path, name)
    if file is not None:
        return file
    try:
        return Path(hf_hub_download(path, name, revision=revision, cache_dir=cache_dir))
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        raise _told(error, path, name, revision) from error


def commit_of(path: str, file: str, revision: str | None, cache_dir: Path | None) -> str | None:
    """The commit that a revision of a hub repository stands for now; None for a folder, which has none.

    Offline it is the one that was downloaded last.

    Args:
        path: folder or hub repository.
        file: one that must be there.
        revision: branch, tag or commit; None: the default branch.
        cache_dir: where downloads are kept.

    Raises:
        UserError: as ``find_file``.
    """
    found = find_file(path, file, revision, cache_dir)
    return None if Path(path).is_dir() else found.parents[file.count("/")].name


def identity(name: str, path: str, commit: str | None) -> str:
    """A short name and what the files hold: ``name@fingerprint`` for folders, ``name@commit`` for the hub.

    Args:
        name: as the user gave it.
        path: folder or hub repository that it stands for.
        commit: of the repository; None for a folder.
    """
    return f"{name}@{commit}" if commit else f"{Path(name).resolve().name}@{fingerprint(Path(path))}"


def _told(error: Exception, repository: str, name: str, revision: str | None) -> Exception:
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return error
    return UserError(_explain(error, repository, name, revision))


def _explain(error: Exception, repository: str, name: str, revision: str | None) -> str:
    nowhere = f"there is no folder {repository}"
    match error:
        case GatedRepoError():
            return (
                f"{repository} is gated: accept its terms at https://huggingface.co/{repository}, "
                "then log in with `hf auth login`"
            )
        case RepositoryNotFoundError():
            return f"{nowhere} and no such public hub repository; for a private one log in with `hf auth login`"
        case RevisionNotFoundError():
            return f"hub repository {repository} has no revision {revision!r}: check --revision"
        case LocalEntryNotFoundError():
            return (
                f"{nowhere}, and the hub cannot be reached (or HF_HUB_OFFLINE is set) and {name} of such a repository "
                "was not downloaded before: check the name, or the network"
            )
        case EntryNotFoundError():
            return f"hub repository {repository} has no {name}: a repository in the format of save_pretrained is needed"
        case HFValidationError():
            return f"{nowhere}, and it is not a hub name (owner/name) either"
        case _:
            return f"{nowhere}, and the hub did not deliver {name} of a repository of that name: {error}"
