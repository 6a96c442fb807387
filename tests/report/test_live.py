"""The live report: follows the files, serves nothing else, ends when it should."""

from __future__ import annotations

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
from pathlib import Path

import pytest

from dreamlora.__main__ import main
from dreamlora.errors import UserError
from dreamlora.report import document_of
from dreamlora.report.document import PAGE, Document
from dreamlora.report.live import HOST, LivePage, LiveServer, file_for
from dreamlora.runfolder import RunFolder


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
    return int(server.url.rstrip("/").rpartition(":")[2])


def get(server: LiveServer, path: str, host: str = "localhost", method: str = "GET") -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(HOST, port_of(server), timeout=5)
    connection.request(method, path, headers={"Host": host})
    return connection.getresponse()


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


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/grid.png", True),
        ("/samples", True),
        ("/samples/step_000001/a.png", True),
        ("/samples/../secret", False),
        ("/../secret", False),
        ("//etc/passwd", False),
        ("/secret", False),
        ("/samples/.hidden", False),
        ("/samples/out/secret", False),
        ("/samples/missing", False),
        ("/samples/a\0b", False),
        ("/", False),
    ],
)
def test_only_what_the_page_links_to_is_served(path: str, found: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "samples" / "step_000001").mkdir(parents=True)
    for name in ("grid.png", "secret", "samples/.hidden", "samples/step_000001/a.png"):
        (folder / name).write_text("x", encoding="utf-8")
    (tmp_path / "secret").write_text("x", encoding="utf-8")
    (folder / "samples" / "out").symlink_to(tmp_path)
    assert (file_for(folder, path, ("samples", "grid.png")) is not None) == found


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
    assert get(server, "/grid.png").read() == folder.grid_file.read_bytes()
    assert get(server, "/metrics.jsonl").headers["Content-Type"] == "text/plain; charset=utf-8"
    assert 'href="/samples/samples.jsonl"' in get(server, "/samples").read().decode()
    assert get(server, "/%2e%2e/%2e%2e/etc/passwd").status == 404
    assert get(server, "/eval_items.npz").status == 404
    head = get(server, "/grid.png", method="HEAD")
    assert head.status == 200 and head.read() == b"" and int(head.headers["Content-Length"]) > 0


def test_other_names_for_this_machine_are_refused(make_run: Callable[..., RunFolder], serve: Callable) -> None:
    server = serve(document_of(make_run().path))
    assert get(server, "/config.yaml", host="evil.example:8000").status == 403
    assert get(server, "/config.yaml", host="127.0.0.1:9000").status == 200


def test_readers_who_leave_are_not_worth_a_word(
    make_run: Callable[..., RunFolder], serve: Callable, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = make_run()
    folder.lora_file.write_bytes(bytes(30_000_000))
    server = serve(document_of(folder.path))
    with socket.create_connection((HOST, port_of(server))) as hasty:
        hasty.sendall(f"GET /{folder.lora_file.name} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
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
            with urllib.request.urlopen(address, timeout=30) as page:
                assert "creature-scaled_adamw" in page.read().decode()
            program.send_signal(signal.SIGINT)
            assert program.wait(30) == 0
        finally:
            program.kill()  # else leaving the block would wait for ever
        assert program.stderr.read() == ""


def test_a_folder_without_a_run_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--live", str(tmp_path)]) == 2
    assert "there is no run in" in capsys.readouterr().err
