"""A report on localhost that follows a run: rendered anew when its files have changed and somebody looks at it."""

from __future__ import annotations

import errno
import hashlib
import html
import json
import mimetypes
import shutil
import sys
import threading
import time
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from dreamlora.errors import UserError
from dreamlora.report.document import PAGE, TEXT, Document, filled

HOST = "127.0.0.1"
_LEAST_PAUSE = 2.0
_SHARE = 0.05
"""Rendering takes at most this share of the time, so that watching hardly slows the training down."""
_SAFE = (
    "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TEXTS = {".jsonl", ".yaml", ".md", ".log"}


class LivePage:
    """The page of a document, as new as its sources, but for a pause after each rendering.

    Args:
        document: what is shown.
        least_pause: seconds between two renderings at least.
        share: of the time that rendering may take.
    """

    def __init__(self, document: Document, least_pause: float = _LEAST_PAUSE, share: float = _SHARE) -> None:
        self.document = document
        self._least_pause = least_pause
        self._share = share
        self._lock = threading.Lock()
        self._version = ""
        self._page = ""
        self._next = 0.0

    def version(self) -> str:
        """Changes when a newer page can be had; asking for it renders nothing."""
        now = self._fingerprint()
        return now if not self._version or time.monotonic() >= self._next else self._version

    def page(self) -> str:
        """The page, which asks for newer versions of itself.

        Raises:
            UserError: there is nothing to show yet, and why.
        """
        with self._lock:
            version = self.version()
            if version != self._version:
                self._render(version)
            return self._page

    def _render(self, version: str) -> None:
        began = time.monotonic()
        try:
            page = self.document.render()[PAGE]
        except UserError:
            if not self._page:
                raise
            return  # a source is being replaced: the page before is shown, and the next question tries again
        body, end, rest = page.rpartition("</body>")
        self._page = body + filled("live.html.j2", {"version": version}) + end + rest
        self._version = version
        ended = time.monotonic()
        self._next = ended + max(self._least_pause, (ended - began) / self._share)

    def _fingerprint(self) -> str:
        states = []
        for file in self.document.sources:
            try:
                status = file.stat()
            except OSError:
                states.append("missing")
            else:
                states.append(f"{status.st_mtime_ns} {status.st_size} {status.st_ino}")
        return hashlib.sha256("\n".join(states).encode()).hexdigest()[:16]


class LiveServer:
    """Serves a page to this machine alone; use it in a ``with`` statement.

    Args:
        live: the page; what lies beside its document is served as well.
        port: on 127.0.0.1; 0 takes a free one.

    Raises:
        UserError: the port is taken or not allowed.
    """

    def __init__(self, live: LivePage, port: int = 0) -> None:
        try:
            self._server = _Server((HOST, port), _Handler)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            why = "is in use" if error.errno == errno.EADDRINUSE else "is not allowed to you"
            raise UserError(f"--port {port} {why}: give another, or leave --port out for a free one") from None
        self._server.live = live

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{HOST}:{self._server.server_port}/"

    def serve(self) -> None:
        """Answer until ``stop`` is called or the user presses Ctrl-C."""
        self._server.serve_forever(poll_interval=0.1)

    def stop(self) -> None:
        """End ``serve``, from another thread."""
        self._server.shutdown()

    def __enter__(self) -> LiveServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # an open connection does not hold up the end
    live: LivePage

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what went wrong, unless it is only that the reader has gone, as with every reload in mid-answer."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "dreamlora"
    timeout = 30

    @cached_property
    def _path(self) -> str:
        return unquote(urlsplit(self.path).path)

    def do_GET(self) -> None:
        """The page, whether it is out of date, or a file beside it."""
        # A page from elsewhere can point a name of its own at 127.0.0.1, but not forge the name it is asked by.
        if urlsplit(f"//{self.headers.get('Host', '')}").hostname not in ("localhost", HOST):
            self._answer(HTTPStatus.FORBIDDEN, "Only for localhost.\n", "text/plain")
        elif self._path in ("/", f"/{PAGE}"):
            self._show_page()
        elif self._path == "/live":
            self._answer(HTTPStatus.OK, json.dumps({"version": self.server.live.version()}), "application/json")
        else:
            self._show_file()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the terminal may be the training's."""

    def _show_page(self) -> None:
        try:
            page = self.server.live.page()
        except UserError as error:
            page = filled("live.html.j2", {"version": ""})
            page = f'<!DOCTYPE html><html lang="en"><title>dreamlora</title><p>{html.escape(str(error))}</p>{page}'
        self._answer(HTTPStatus.OK, page, "text/html")

    def _show_file(self) -> None:
        document = self.server.live.document
        file = file_for(document.folder, self._path, (*document.beside, TEXT))
        if file is None:
            self._answer(HTTPStatus.NOT_FOUND, f"There is no {self._path} here.\n", "text/plain")
        elif file.is_dir():
            self._answer(HTTPStatus.OK, _listing(self._path.strip("/"), file), "text/html")
        else:
            kind = "text/plain" if file.suffix in _TEXTS else mimetypes.guess_type(file)[0]
            with file.open("rb") as content:
                self._start(HTTPStatus.OK, kind or "application/octet-stream", file.stat().st_size)
                if self.command == "GET":
                    shutil.copyfileobj(content, self.wfile)

    def _answer(self, status: HTTPStatus, text: str, kind: str) -> None:
        content = text.encode()
        self._start(status, kind, len(content))
        if self.command == "GET":
            self.wfile.write(content)

    def _start(self, status: HTTPStatus, kind: str, size: int) -> None:
        textual = kind.startswith("text/") or kind == "application/json"
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8" if textual else kind)
        self.send_header("Content-Length", str(size))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", _SAFE)
        self.end_headers()


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
    if not parts or parts[0] not in beside or any(part.startswith(".") or "\0" in part for part in parts):
        return None
    root = folder.resolve()
    file = root.joinpath(*parts).resolve()
    return file if file.is_relative_to(root) and file.exists() else None


def _listing(path: str, folder: Path) -> str:
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    links = "".join(
        f'<li><a href="/{quote(f"{path}/{entry.name}")}">{html.escape(entry.name)}</a></li>\n' for entry in entries
    )
    title = html.escape(path)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" '
        f'content="light dark">\n<title>{title}</title>\n<h1>{title}</h1>\n'
        f'<p><a href="/">back to the report</a></p>\n<ul>\n{links}</ul>\n</html>\n'
    )
