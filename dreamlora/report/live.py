"""A report on localhost that follows a run: rendered anew when its files have changed and somebody looks at it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from dreamlora import reading
from dreamlora.errors import UserError
from dreamlora.escapes import path_of_url
from dreamlora.report.document import PAGE, TEXT, Document, filled, policy
from dreamlora.report.served import file_for, kind_of, listing
from dreamlora.report.visitors import HOST, Door, is_foreign

_LEAST_PAUSE = 2.0
_SHARE = 0.05
"""Rendering takes at most this share of the time, so that watching hardly slows the training down."""
_MOST_VISITORS = 64
"""Connections at once; a browser opens six."""
_PATIENCE = 10.0
"""Seconds that a request may take to arrive."""
_NOTHING_RUNS = "default-src 'none'; sandbox; frame-ancestors 'none'"
"""For what is not this program's own."""
_ALWAYS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_NO_TOKEN = (
    "This page needs its token: the full address stands in the terminal where `dreamlora report --live` runs. Copy it "
    "from there into the address bar.\n"
)


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
    """Serves a page to those on this machine who have its address; use it in a ``with`` statement.

    Args:
        live: the page; what lies beside its document is served as well.
        port: on 127.0.0.1; 0 takes a free one.

    Raises:
        UserError: the port is taken or not allowed.
    """

    def __init__(self, live: LivePage, port: int = 0) -> None:
        try:
            self._server = _Server(live, port)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            why = "is in use" if error.errno == errno.EADDRINUSE else "is not allowed to you"
            raise UserError(f"--port {port} {why}: give another, or leave --port out for a free one") from None

    @property
    def url(self) -> str:
        """Address of the page, with the token that opens it: for the person alone who started this."""
        return f"http://{HOST}:{self._server.server_port}/?token={self._server.door.token}"

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

    def __init__(self, live: LivePage, port: int) -> None:
        super().__init__((HOST, port), _Handler)
        self.live = live
        self.door = Door(self.server_port)
        self._places = threading.BoundedSemaphore(_MOST_VISITORS)

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread, unless there are too many."""
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The whole of a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what went wrong, unless it is only that the reader has gone, as with every reload in mid-answer."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "dreamlora"
    sys_version = ""
    timeout = 30

    def setup(self) -> None:
        """Hang up on whoever sends a request letter by letter."""
        super().setup()
        self._hurry = threading.Timer(_PATIENCE, self._hang_up)
        self._hurry.daemon = True
        self._hurry.start()

    def finish(self) -> None:
        """The end of the connection."""
        self._hurry.cancel()
        super().finish()

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self) -> None:
        """The page, whether it is out of date, or a file beside it; to those who may see it."""
        self._hurry.cancel()
        address, _, query = self.path.partition("?")
        path, door = path_of_url(address), self.server.door
        if not address.startswith("/"):
            self._refuse(HTTPStatus.BAD_REQUEST)
        elif is_foreign(self.headers):
            self._answer(HTTPStatus.FORBIDDEN, "Only for pages of localhost itself.\n", "text/plain")
        elif path == "/" and door.has_token(query):  # out of the address, which histories and screens show
            self._answer(HTTPStatus.SEE_OTHER, "", "text/plain", {"Location": "/", "Set-Cookie": door.cookie})
        elif not door.has_cookie(self.headers):
            self._answer(HTTPStatus.FORBIDDEN, _NO_TOKEN, "text/plain")
        elif path in ("/", f"/{PAGE}"):
            self._show_page()
        elif path == "/live":
            self._answer(HTTPStatus.OK, json.dumps({"version": self.server.live.version()}), "application/json")
        else:
            self._show_file(path)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the terminal may be the training's."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses, without what was asked."""
        self._refuse(HTTPStatus.METHOD_NOT_ALLOWED if code == HTTPStatus.NOT_IMPLEMENTED else HTTPStatus(code))

    def _refuse(self, status: HTTPStatus) -> None:
        self._answer(status, f"{status.phrase}.\n", "text/plain")

    def _show_page(self) -> None:
        try:
            page = self.server.live.page()
        except UserError as error:
            page = filled("waiting.html.j2", {"version": "", "reason": error})
        self._answer(HTTPStatus.OK, page, "text/html")

    def _show_file(self, path: str) -> None:
        document = self.server.live.document
        file = file_for(document.folder, path, (*document.beside, TEXT))
        if file is None:
            return self._refuse(HTTPStatus.NOT_FOUND)
        if file.is_dir():
            return self._answer(HTTPStatus.OK, listing(path, file), "text/html")
        try:
            with reading.opened(file, inside=document.folder) as content:
                self._start(HTTPStatus.OK, kind_of(file), os.fstat(content.fileno()).st_size)
                if self.command == "GET":
                    shutil.copyfileobj(content, self.wfile)
        except (FileNotFoundError, reading.UnreadableError):
            self._refuse(HTTPStatus.NOT_FOUND)

    def _answer(self, status: HTTPStatus, text: str, kind: str, headers: dict[str, str] | None = None) -> None:
        content = text.encode()
        self._start(status, kind, len(content), headers or {})
        if self.command != "HEAD":
            self.wfile.write(content)

    def _start(self, status: HTTPStatus, kind: str, size: int, headers: dict[str, str] | None = None) -> None:
        textual = kind.startswith("text/") or kind == "application/json"
        ours = f"{policy()}; frame-ancestors 'none'" if kind == "text/html" else _NOTHING_RUNS
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8" if textual else kind)
        self.send_header("Content-Length", str(size))
        for name, value in {**_ALWAYS, "Content-Security-Policy": ours, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
