"""Which files beside a live page are served."""

from __future__ import annotations

from pathlib import Path

import pytest

from dreamlora.report.served import file_for, kind_of


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/grid.png", True),
        ("/samples", True),
        ("/samples/step_000001/a.png", True),
        ("/samples/../secret", False),
        ("/samples/../samples/step_000001/a.png", False),
        ("/../secret", False),
        ("//etc/passwd", False),
        ("/secret", False),
        ("/samples/.hidden", False),
        ("/samples/out/secret", False),
        ("/samples/in", True),
        ("/samples/beside", False),
        ("/samples/missing", False),
        ("/samples/a\0b", False),
        ("/samples/" + "a" * 300, False),
        ("/samples/\ud800", False),
        ("/", False),
        ("", False),
    ],
)
def test_only_what_the_page_links_to_is_served(path: str, found: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "samples" / "step_000001").mkdir(parents=True)
    for name in ("grid.png", "secret", "samples/.hidden", "samples/step_000001/a.png"):
        (folder / name).write_text("x", encoding="utf-8")
    (tmp_path / "secret").write_text("x", encoding="utf-8")
    (folder / "samples" / "out").symlink_to(tmp_path)
    (folder / "samples" / "in").symlink_to("../grid.png")
    (folder / "samples" / "beside").symlink_to("../secret")
    assert (file_for(folder, path, ("samples", "grid.png")) is not None) == found


def test_only_pictures_and_weights_are_not_text() -> None:
    assert kind_of(Path("a.PNG")) == "image/png" and kind_of(Path("a.safetensors")) == "application/octet-stream"
    assert {kind_of(Path(f"a{suffix}")) for suffix in (".svg", ".html", ".gif", "", ".yaml")} == {"text/plain"}
