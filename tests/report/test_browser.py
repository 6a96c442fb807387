"""The pages in headless Chromium: without complaints, by keyboard, on a telephone, without scripts, live."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from dreamlora.report import document_of, write_compare_report, write_report
from dreamlora.report.live import LivePage, LiveServer
from dreamlora.runfolder import RunFolder
from tests.report.browser import EXECUTABLE, Browser
from tests.report.conftest import PROMPTS, write_comparison, write_run

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium here (Debian: apt install chromium)")

WIDTH = "document.documentElement.scrollWidth"  # innerWidth would grow with it, as telephones zoom out
SHOWN = "[...document.querySelectorAll('.row')].filter(row => row.checkVisibility()).map(row => row.dataset.step)"
FIRST_COLUMN = "[...document.querySelectorAll('#table-results tbody tr')].map(row => row.cells[0].textContent)"
OUTLINED = (
    "((style) => style.outlineStyle === 'none' ? 0 : parseFloat(style.outlineWidth))"
    "(getComputedStyle(document.activeElement))"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses of a run's and of a comparison's page."""
    folder = tmp_path_factory.mktemp("pages")
    run, comparison = write_run(folder / "run"), write_comparison(folder / "comparison")
    return {"run": write_report(run).as_uri(), "comparison": write_compare_report(comparison).as_uri()}


@pytest.fixture
def page(browser: Browser) -> Browser:
    """The browser as it was at first."""
    browser.scripts(True)
    browser.size(1280, 900)
    browser.complaints.clear()
    browser.requested.clear()
    return browser


def nothing_odd(page: Browser) -> bool:
    return page.complaints == [] and all(address.startswith(("file://", "data:")) for address in page.requested)


def focus_by_tab(page: Browser, selector: str, most: int = 60) -> None:
    for _ in range(most):
        if page.ask(f"document.activeElement.matches({selector!r})"):
            return
        page.press("Tab")
    raise AssertionError(f"the Tab key does not lead to {selector}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_a_page_fits_and_loads_without_complaints(
    kind: str, width: int, scheme: str, page: Browser, pages: dict[str, str], tmp_path: Path
) -> None:
    page.size(width, 740, scheme)
    page.open(pages[kind])
    page.ask("document.querySelectorAll('details').forEach(element => { element.open = true; })")
    assert page.ask(WIDTH) == width
    assert page.ask("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    page.screenshot(tmp_path / "page.png", whole=False)
    with Image.open(tmp_path / "page.png") as shot:
        assert shot.size == (width, 740)
        left_edge = shot.convert("L").getpixel((2, 300))
    assert (left_edge > 200) == (scheme == "light")
    assert nothing_odd(page)


def test_tables_are_sorted_by_keyboard(page: Browser, pages: dict[str, str]) -> None:
    page.open(pages["comparison"])
    before = page.ask(FIRST_COLUMN)
    assert before == ["adamw", "scaled_adamw:variant=split", "sgd"]
    heading = "#table-results th:nth-child(3)"
    focus_by_tab(page, f"{heading} button")
    assert page.ask(OUTLINED) >= 2
    page.press("Enter")
    assert page.ask(FIRST_COLUMN) == ["scaled_adamw:variant=split", "sgd", "adamw"]  # a gap goes last
    assert page.ask(f"document.querySelector('{heading}').ariaSort") == "ascending"
    page.press(" ")
    assert page.ask(FIRST_COLUMN) == ["sgd", "scaled_adamw:variant=split", "adamw"]
    assert page.ask(f"document.querySelector('{heading}').ariaSort") == "descending"
    page.ask("document.querySelector('#table-results th:nth-child(1) button').click()")
    assert page.ask(FIRST_COLUMN) == before
    assert page.ask("document.querySelectorAll('#table-results [aria-sort=none]').length") == 7
    assert nothing_odd(page)


def test_the_slider_goes_through_the_steps(page: Browser, pages: dict[str, str]) -> None:
    page.open(pages["comparison"])
    assert page.ask(SHOWN) == ["150", "150"]
    focus_by_tab(page, "#step")
    assert page.ask(OUTLINED) >= 2
    last = page.ask("document.querySelector('.row:not([hidden]) img').src")
    page.press("ArrowLeft")
    assert page.ask(SHOWN) == ["75", "75"]
    assert page.ask("document.querySelector('.row:not([hidden]) img').src") != last
    page.press("Home")
    assert page.ask(SHOWN) == ["0", "0"]
    assert page.ask("document.getElementById('step').getAttribute('aria-valuetext')") == "base model"
    assert page.ask("document.getElementById('step-told').textContent") == "base model"
    assert nothing_odd(page)


def test_one_prompt_and_all_steps_can_be_chosen(page: Browser, pages: dict[str, str]) -> None:
    page.open(pages["comparison"])
    page.ask(
        "{const field = document.getElementById('prompt'); field.value = '1'; field.dispatchEvent(new Event('input'))}"
    )
    assert page.ask(SHOWN) == ["150"]
    focus_by_tab(page, "#all-steps")
    page.press(" ")
    assert page.ask(SHOWN) == ["0", "75", "150"]
    assert page.ask("document.getElementById('step').disabled")


def test_without_scripts_everything_is_there(page: Browser, pages: dict[str, str]) -> None:
    page.scripts(False)
    page.size(360, 740)
    page.open(pages["comparison"])
    assert page.ask(SHOWN) == ["0", "75", "150"] * 2
    assert not page.ask("document.getElementById('controls').checkVisibility()")
    assert page.ask("document.querySelectorAll('th button').length") == 0
    assert page.ask(WIDTH) == 360


def test_prompts_stay_text(page: Browser, pages: dict[str, str]) -> None:
    page.open(pages["run"])
    assert page.ask("document.querySelector('img.grid').alt").endswith("; ".join(PROMPTS))
    assert page.ask("document.scripts.length") == 0


def test_a_live_page_follows_its_run_and_keeps_its_place(page: Browser, make_run: Callable[..., RunFolder]) -> None:
    folder = make_run(steps=120, summary=None)
    with LiveServer(LivePage(document_of(folder.path), 0, math.inf)) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            page.size(1280, 500)
            page.open(server.url)
            page.ask("document.querySelector('details').open = true; scrollTo(0, 700)")
            assert page.ask("scrollY") == 700
            assert "at step 120 of 300" in page.ask("document.body.textContent")
            folder.log_all(150, {"train/loss": 0.3})
            page.wait_for_load()
            assert "at step 150 of 300" in page.ask("document.body.textContent")
            assert page.ask("[scrollY, document.querySelector('details').open]") == [700, True]
            focus_by_tab(page, "#live button")
            page.press("Enter")
            assert page.ask("document.querySelector('#live span').textContent").startswith("Paused")
        finally:
            server.stop()
            thread.join()
    assert page.complaints == []
    assert all(address.startswith((server.url.partition("?")[0], "data:")) for address in page.requested)


def test_files_beside_a_live_page_are_looked_at_and_run_nothing(
    page: Browser, make_run: Callable[..., RunFolder]
) -> None:
    folder = make_run()
    (folder.samples / "x.svg").write_text(
        "<svg xmlns='http://www.w3.org/2000/svg' onload='document.title=1'/>", "utf-8"
    )
    (folder.samples / "x.html").write_text("<title>0</title><script>document.title = 1</script>", encoding="utf-8")
    with LiveServer(LivePage(document_of(folder.path))) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            page.open(server.url)
            assert page.ask("location.pathname + location.search") == "/" and page.ask("document.cookie") == ""
            page.ask("document.querySelector('a[href=samples]').click()")
            page.wait_for_load()
            for name in ("x.svg", "x.html"):
                page.ask(f"document.querySelector('a[href$=\"{name}\"]').click()")
                page.wait_for_load()
                assert page.ask("[document.contentType, document.title]") == ["text/plain", ""]
                page.open(server.url.partition("?")[0] + "samples")
            page.open(server.url.partition("?")[0] + "grid.png")
            assert page.ask("document.images[0].naturalWidth") > 0
        finally:
            server.stop()
            thread.join()
