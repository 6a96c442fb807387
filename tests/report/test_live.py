"""The live report: follows the files, serves nothing else, ends when it should."""

from __future__ import annotations

import contextlib
import http.client
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.cookiejar import CookieJar
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamlora.__main__ import main
from dreamlora.errors import UserError
from dreamlora.report import document_of
from dreamlora.report import live as live_module
from dreamlora.report.document import PAGE, Document
from dreamlora.report.live import LivePage, LiveServer
from dreamlora.report.visitors import HOST
from dreamlora.runfolder import RunFolder
from tests.fuzzing import fuzzed
from tests.report.conftest import write_run
from tests.report.test_page import checked


def counting_document(folder: Path) -> tuple[Document, Path, list[str]]:
    """A document with one source, whose text the page shows, and the texts it was rendered from."""
    source, rendered = folder / "numbers", list[str]()

    def render() -> dict[str, str]:
        if not source.exists():
            raise UserError("there are no numbers")
        rendered.append(source.read_text(encoding="utf-8"))
        return {PAGE: f"<html><body><p>{rendered[-1]}</p></body></html>"}

    return Document(folder, (source,), ("samples", "grid.png"), render), source, rendered


@pytest.fixture
def serve() -> Iterator[Callable[[Document], LiveServer]]:
    with_ends: list[tuple[LiveServer, threading.Thread]] = []

    def start(document: Document) -> LiveServer:
        server = LiveServer(LivePage(document))
        thread = threading.Thread(target=server.serve)
        thread.start()
        with_ends.append((server, thread))
        return server

    yield start
    for server, thread in with_ends:
        server.stop()
        thread.join()
        server.__exit__(None, None, None)


def port_of(server: LiveServer) -> int:
    return urlsplit(server.url).port or 0


def cookie_of(server: LiveServer) -> str:
    """What a browser keeps after its first visit."""
    return f"dreamlora-{port_of(server)}={token_of(server)}"


def token_of(server: LiveServer) -> str:
    return urlsplit(server.url).query.removeprefix("token=")


def get(
    server: LiveServer, path: str, host: str = "localhost", method: str = "GET", **headers: str
) -> http.client.HTTPResponse:
    """An answer to whoever has the cookie, unless ``headers`` say otherwise."""
    connection = http.client.HTTPConnection(HOST, port_of(server), timeout=5)
    told = {"Host": host, "Cookie": cookie_of(server), **{key.replace("_", "-"): text for key, text in headers.items()}}
    connection.request(method, path, headers=told)
    return connection.getresponse()


def ask(server: LiveServer, request: bytes) -> bytes:
    """All that is answered to these bytes."""
    with socket.create_connection((HOST, port_of(server)), timeout=5) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def test_a_page_is_rendered_when_its_files_have_changed_and_not_otherwise(tmp_path: Path) -> None:
    document, source, rendered = counting_document(tmp_path)
    source.write_text("one", encoding="utf-8")
    live = LivePage(document, least_pause=0, share=math.inf)
    first = live.version()
    assert rendered == []
    page = live.page()
    assert "<p>one</p>" in page and f'data-version="{first}"' in page and page.endswith("</body></html>")
    assert live.page() == page and live.version() == first and rendered == ["one"]
    source.write_text("two, longer", encoding="utf-8")
    assert live.version() != first
    assert "<p>two, longer</p>" in live.page() and rendered == ["one", "two, longer"]


@pytest.mark.parametrize("pause", [(3600, math.inf), (0, 1e-9)])
def test_between_two_renderings_lies_a_pause(pause: tuple[float, float], tmp_path: Path) -> None:
    document, source, rendered = counting_document(tmp_path)
    source.write_text("one", encoding="utf-8")
    live = LivePage(document, *pause)
    page, version = live.page(), live.version()
    source.write_text("two, longer", encoding="utf-8")
    assert live.version() == version and live.page() == page and rendered == ["one"]


def test_while_a_source_is_away_the_last_page_is_shown(tmp_path: Path) -> None:
    document, source, _ = counting_document(tmp_path)
    live = LivePage(document, least_pause=0, share=math.inf)
    with pytest.raises(UserError, match="there are no numbers"):
        live.page()
    source.write_text("one", encoding="utf-8")
    page = live.page()
    source.unlink()
    assert live.page() == page
    source.write_text("three", encoding="utf-8")
    assert "<p>three</p>" in live.page()


def test_a_run_is_shown_with_its_files(make_run: Callable[..., RunFolder], serve: Callable) -> None:
    folder = make_run(steps=120, summary=None)
    server = serve(document_of(folder.path))
    page = get(server, "/")
    text = page.read().decode()
    assert page.status == 200 and "at step 120 of 300" in text and 'id="live"' in text
    assert (
        page.headers["Cache-Control"] == "no-store" and "connect-src 'self'" in page.headers["Content-Security-Policy"]
    )
    assert not folder.report_html.exists()
    version = re.search(r'data-version="(\w+)"', text)
    assert version is not None and version[1] in get(server, "/live").read().decode()
    assert server.url not in text and token_of(server) not in text
    assert get(server, "/grid.png").read() == folder.grid_file.read_bytes()
    assert get(server, "/metrics.jsonl").headers["Content-Type"] == "text/plain; charset=utf-8"
    assert 'href="/samples/samples.jsonl"' in get(server, "/samples").read().decode()
    assert get(server, "/%2e%2e/%2e%2e/etc/passwd").status == 404
    assert get(server, "/eval_items.npz").status == 404
    head = get(server, "/grid.png", method="HEAD")
    assert head.status == 200 and head.read() == b"" and int(head.headers["Content-Length"]) > 0


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *(
            (host, 200)
            for host in ("127.0.0.1:9000", "localhost", "LOCALHOST:1", "localhost.", "localhost.:80", "[::1]:1")
        ),
        *(
            (host, 403)
            for host in ("evil.example:8000", "evil.example", "127.0.0.1.evil.example", "127.0.0.2", "[::2]")
        ),
        *((host, 403) for host in ("", "[", "localhost:x", "localhost:99999", "x@localhost", "localhost/x", "[::1")),
        *((host, 403) for host in ("localhost evil.example", "0.0.0.0", "localhost..", "local\thost")),
    ],
)
def test_other_names_for_this_machine_are_refused(
    host: str, status: int, shown: LiveServer, capfd: pytest.CaptureFixture[str]
) -> None:
    """A page from elsewhere may have a name of its own for 127.0.0.1."""
    assert get(shown, "/config.yaml", host=host).status == status
    assert capfd.readouterr().err == ""


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A run's page for tests that change nothing."""
    document = document_of(write_run(tmp_path_factory.mktemp("shown") / "run").path)
    with LiveServer(LivePage(document)) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        yield server
        server.stop()
        thread.join()


PATHS = ("/", "/report.html", "/live", "/config.yaml", "/samples", "/missing")


@pytest.mark.parametrize("path", PATHS)
def test_who_does_not_know_the_token_sees_nothing(path: str, shown: LiveServer) -> None:
    port, token = port_of(shown), token_of(shown)
    cookies = [
        "",
        "x",
        f"dreamlora-{port}=",
        f"dreamlora-{port}={token[:-1]}",
        f"dreamlora-{port + 1}={token}",
        "é",
        ";=;",
    ]
    for cookie in cookies:
        for query in ("", "?token=", f"?token={token[:-1]}", f"?token={token}x", "?token=%ff"):
            answer = get(shown, path + query, Cookie=cookie)
            told = answer.read().decode()
            assert answer.status == 403 and "in the terminal" in told and "Set-Cookie" not in answer.headers
            assert token not in told and "creature" not in told and "rank" not in told
    assert len(token) >= 40, "nobody guesses it"


def test_the_first_visit_leaves_a_cookie_and_an_address_without_the_token(shown: LiveServer) -> None:
    address = urlsplit(shown.url)
    answer = get(shown, f"/?{address.query}", Cookie="")
    assert answer.status == 303 and answer.headers["Location"] == "/" and answer.read() == b""
    cookie, *rules = answer.headers["Set-Cookie"].split("; ")
    assert cookie == cookie_of(shown) and sorted(rules) == ["HttpOnly", "Path=/", "SameSite=Strict"]
    assert answer.headers["Referrer-Policy"] == "no-referrer" and answer.headers["Cache-Control"] == "no-store"
    assert get(shown, "/", Cookie=f"other=1; {cookie}; more").status == 200
    assert get(shown, f"/config.yaml?{address.query}", Cookie="").status == 403, "one door is enough"


def test_two_pages_have_a_token_and_a_cookie_each(
    make_run: Callable[..., RunFolder], serve: Callable, shown: LiveServer
) -> None:
    other = serve(document_of(make_run().path))
    both = f"{cookie_of(shown)}; {cookie_of(other)}"
    assert get(shown, "/live", Cookie=both).status == get(other, "/live", Cookie=both).status == 200
    assert token_of(shown) != token_of(other) and get(other, "/live", Cookie=cookie_of(shown)).status == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://localhost"}, 200),
        *(
            ({"Origin": origin}, 403)
            for origin in ("http://evil.example", "null", "https://localhost", "http://localhost:1")
        ),
        *(({"Sec-Fetch-Site": site}, 200) for site in ("none", "same-origin")),
        *(({"Sec-Fetch-Site": site}, 403) for site in ("cross-site", "same-site", "")),
    ],
)
def test_other_sites_cannot_ask(headers: dict[str, str], status: int, shown: LiveServer) -> None:
    """Also of another port of this machine, whose page has the cookie."""
    for path in ("/", "/live", "/grid.png"):
        answer = get(shown, path, **headers)
        assert answer.status == status
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert not any(name.lower().startswith("access-control") for name in answer.headers)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "CONNECT", "TRACE", "PATCH", "evil<b>"])
def test_nothing_can_be_sent(method: str, shown: LiveServer, capfd: pytest.CaptureFixture[str]) -> None:
    answer = get(shown, "/", method=method)
    assert answer.status == 405 and b"evil" not in answer.read() and capfd.readouterr().err == ""
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"


TARGETS = [
    *(
        "//evil.example/config.yaml",
        "http://evil.example/config.yaml",
        "http://127.0.0.1/config.yaml",
        "*",
        "x",
        "//[",
        "?",
    ),
    *(
        "/%00",
        "/samples/%00",
        "/..%2f..%2fetc/passwd",
        "/samples/..%2fsummary.json",
        "/samples/..%5csummary.json",
        "/%ff",
    ),
    *("/samples%2f..%2f.git", "/./summary.json", "/samples/../../x", "/" + "a" * 5000, "/samples/" + "b/" * 3000, "/%"),
    *(
        "/samples/x:y",
        "/samples/C:%5cWindows",
        "/summary.json",
        "/samples/%2e%2e/summary.json",
        "/[",
        "/live/",
        "/\x7f",
    ),
]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target[:30])
def test_odd_addresses_find_nothing(target: str, shown: LiveServer, capfd: pytest.CaptureFixture[str]) -> None:
    head = f"Host: localhost\r\nCookie: {cookie_of(shown)}\r\n\r\n"
    answer = ask(shown, f"GET {target} HTTP/1.1\r\n{head}".encode("latin-1"))
    assert re.match(rb"HTTP/1\.[01] 4\d\d ", answer)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "request_",
    [
        b"\r\n",
        b"GET\r\n\r\n", b"\x16\x03\x01\x02\n\n", b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/x\r\n\r\n", b"GET /\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: \xff\r\nCookie: \xff=\xfe\r\n\r\n",
    ],
    ids=range(11),
)  # fmt: skip
def test_what_is_no_request_is_refused_in_plain_text(
    request_: bytes, shown: LiveServer, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        answer = ask(shown, request_)
    except ConnectionError:  # what was not read of it, is thrown away with the connection
        answer = b""
    assert b"200 OK" not in answer and b"<" not in answer
    assert capfd.readouterr().err == ""


@fuzzed
@given(st.text(st.characters(max_codepoint=255, exclude_characters="\r\n"), max_size=60), st.booleans())
def test_fuzz_requests(shown: LiveServer, text: str, with_cookie: bool) -> None:
    """Nothing that is not linked is found, nothing is shown without the cookie, and there is always an answer."""
    cookie = f"Cookie: {cookie_of(shown)}\r\n" if with_cookie else ""
    answer = ask(shown, f"GET /{text} HTTP/1.1\r\nHost: localhost\r\n{cookie}\r\n".encode("latin-1"))
    status = int(answer.split()[1]) if answer.startswith(b"HTTP/") else 0
    assert status in (200, 400, 403, 404, 505)
    assert with_cookie or status >= 400


def test_whoever_sends_a_request_letter_by_letter_is_left(
    shown: LiveServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(live_module, "_PATIENCE", 0.2)
    with socket.create_connection((HOST, port_of(shown)), timeout=5) as slow:
        slow.sendall(b"GET / HT")
        assert slow.recv(1) == b""
    assert get(shown, "/live").status == 200 and capfd.readouterr().err == ""


def test_connections_are_counted(
    make_run: Callable[..., RunFolder], serve: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_module, "_MOST_VISITORS", 3)
    server = serve(document_of(make_run().path))
    idle = [socket.create_connection((HOST, port_of(server)), timeout=5) for _ in range(4)]
    assert idle[-1].recv(1) == b"", "there is no thread for it"
    for connection in idle:
        connection.close()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with contextlib.suppress(ConnectionError, http.client.HTTPException):
            if get(server, "/live").status == 200:
                return
    raise AssertionError("the places are not given back")


PAGE_LIKE = (
    "x.html",
    "x.HTM",
    "x.svg",
    "x.xhtml",
    "x.xml",
    "x.js",
    "x.css",
    "x.pdf",
    "x.json",
    "x.png.html",
    "x.swf",
    "x",
)


@pytest.mark.parametrize("suffix", PAGE_LIKE)
def test_what_is_not_ours_is_plain_text_in_which_nothing_runs(
    suffix: str, make_run: Callable[..., RunFolder], serve: Callable
) -> None:
    folder = make_run()
    (folder.samples / f"x.{suffix}").write_text("<script>alert(1)</script>", encoding="utf-8")
    answer = get(serve(document_of(folder.path)), f"/samples/x.{suffix}")
    assert answer.status == 200 and answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    rules = answer.headers["Content-Security-Policy"].split("; ")
    assert "default-src 'none'" in rules and "sandbox" in rules and "frame-ancestors 'none'" in rules
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(("name", "kind"), [("a.png", "image/png"), ("a.JPG", "image/jpeg"), ("a.webp", "image/webp")])
def test_pictures_are_pictures_whatever_they_hold(
    name: str, kind: str, make_run: Callable[..., RunFolder], serve: Callable
) -> None:
    folder = make_run()
    (folder.samples / name).write_text("<script>alert(1)</script>", encoding="utf-8")
    answer = get(serve(document_of(folder.path)), f"/samples/{name}")
    assert answer.headers["Content-Type"] == kind and "sandbox" in answer.headers["Content-Security-Policy"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_the_page_runs_our_scripts_alone(shown: LiveServer) -> None:
    rules = get(shown, "/").headers["Content-Security-Policy"]
    assert "script-src 'sha256-" in rules and "unsafe-inline" not in rules.partition("script-src")[2]
    assert "default-src 'none'" in rules and "frame-ancestors 'none'" in rules and "img-src data:;" in rules


def test_names_in_a_listing_stay_names(make_run: Callable[..., RunFolder], serve: Callable) -> None:
    folder = make_run()
    names = [
        "<script>.txt",
        "50%#?.txt",
        "java\nscript:x.txt",
        'a" onclick="x.txt',
        "caf\udce9.txt",
        "\x1b[2J.txt",
        ".x",
    ]
    for name in names:
        (folder.samples / name).write_text(f"this is {name!a}", encoding="utf-8")
    server = serve(document_of(folder.path))
    page = get(server, "/samples").read().decode()
    checked(page)
    assert "<script>.txt" not in page and r"java\nscript:x.txt" in page and r"caf\udce9.txt" in page
    links = re.findall(r'href="(/samples/[^"]*txt)"', page)
    assert sorted(get(server, link).read().decode() for link in links) == sorted(
        f"this is {name!a}" for name in names[:-1]
    )
    assert get(server, "/samples/.x").status == 404


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_pipes_and_links_that_lead_out_are_not_served(
    make_run: Callable[..., RunFolder], serve: Callable, tmp_path: Path
) -> None:
    folder = make_run()
    (tmp_path / "key").write_text("secret", encoding="utf-8")
    (folder.path / ".hidden").write_text("secret", encoding="utf-8")
    os.mkfifo(folder.samples / "pipe")
    for name, target in (("out", tmp_path / "key"), ("up", ".."), ("hidden", "../.hidden"), ("loop", "loop")):
        (folder.samples / name).symlink_to(target)
    (folder.samples / "inner").symlink_to("samples.jsonl")
    server = serve(document_of(folder.path))
    for name in ("pipe", "out", "up", "up/summary.json", "hidden", "loop"):
        assert get(server, f"/samples/{name}").status == 404
    assert get(server, "/samples/inner").status == 200


def test_a_page_with_text_that_is_no_text_is_shown(make_run: Callable[..., RunFolder], serve: Callable) -> None:
    folder = make_run(summary={"warnings": ["caf\udce9 \ud800 \x1b"]})
    answer = get(serve(document_of(folder.path)), "/")
    assert answer.status == 200 and r"caf\udce9 \ud800 \x1b" in answer.read().decode()


def test_readers_who_leave_are_not_worth_a_word(
    make_run: Callable[..., RunFolder], serve: Callable, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = make_run()
    folder.lora_file.write_bytes(bytes(30_000_000))
    server = serve(document_of(folder.path))
    with socket.create_connection((HOST, port_of(server))) as hasty:
        cookie = cookie_of(server)
        hasty.sendall(f"GET /{folder.lora_file.name} HTTP/1.0\r\nHost: localhost\r\nCookie: {cookie}\r\n\r\n".encode())
        hasty.recv(100)
    assert get(server, "/config.yaml").status == 200
    time.sleep(0.1)
    assert capfd.readouterr().err == ""


def test_a_taken_port_is_a_clear_error(make_run: Callable[..., RunFolder], capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["report", "--live", str(make_run().path), "--port", str(port)]) == 2
    assert capsys.readouterr().err == (
        f"error: --port {port} is in use: give another, or leave --port out for a free one\n"
    )


def test_the_command_serves_until_ctrl_c(make_run: Callable[..., RunFolder]) -> None:
    folder = make_run()
    command = [sys.executable, "-m", "dreamlora", "report", "--live", str(folder.path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    ) as program:
        assert program.stdout is not None and program.stderr is not None
        try:
            address = program.stdout.readline().split()[0]
            browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
            with browser.open(address, timeout=30) as page:
                assert "creature-scaled_adamw" in page.read().decode() and page.url == address.partition("?")[0]
            program.send_signal(signal.SIGINT)
            assert program.wait(30) == 0
        finally:
            program.kill()  # else leaving the block would wait for ever
        assert program.stderr.read() == ""


def test_a_folder_without_a_run_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--live", str(tmp_path)]) == 2
    assert "there is no run in" in capsys.readouterr().err
