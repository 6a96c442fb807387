"""Files beside a live page: which of them are served, and as what. What is not ours is data: nothing in it runs."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from dreamlora.escapes import one_line, url_path
from dreamlora.report.document import filled

_PICTURES = {".png": "image/png", ".webp": "image/webp", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
_NO_TEXTS = {".safetensors", ".npz", ".bin", ".pt", ".zip"}


def kind_of(file: Path) -> str:
    """The type that a file is served as: a picture, something to keep, or plain text, whatever it says."""
    suffix = file.suffix.lower()
    return _PICTURES.get(suffix) or ("application/octet-stream" if suffix in _NO_TEXTS else "text/plain")


def file_for(folder: Path, path: str, beside: tuple[str, ...]) -> Path | None:
    """The file or folder that a request's path means, if it may be served.

    Args:
        folder: the document's.
        path: decoded, such as "/samples/step_000100/p00_s42.png".
        beside: names in ``folder`` that may be served, with all that is below them.

    Returns:
        None for what is missing, hidden, not among ``beside``, or leads out of ``folder``.
    """
    parts = PurePosixPath(path).parts[1:]
    try:
        root = folder.resolve()
        file = root.joinpath(*parts).resolve()
        inner = file.relative_to(root).parts if file.exists() else ()
    except (OSError, RuntimeError, ValueError):  # too long, links in a circle, a zero, or outside
        return None
    for names in (parts, inner):  # as it is asked for, and where links lead
        if not names or names[0] not in beside or any(name.startswith(".") for name in names):
            return None
    return file


def listing(path: str, folder: Path) -> str:
    """A page with links to all in a folder.

    Args:
        path: as it was asked for.
        folder: that it means.
    """
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    shown = path.strip("/")
    entries = [(url_path(f"/{shown}/{name}"), one_line(name)) for name in names]
    return filled("listing.html.j2", {"name": shown, "entries": entries})
