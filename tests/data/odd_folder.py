"""A data folder of odd entries, each with what becomes of it; and folders that stop a run, each with its message."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

COLUMNS = ("use", "from", "text")


class Expected(NamedTuple):
    """What the table says of an entry: its use, where an image's captions are from, and words of the rest."""

    use: str
    source: str
    text: str


def picture(file: Path, number: int = 0) -> None:
    """A small image; every number is another one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 12), (number % 256, 100, 50)).save(file)


NFC, NFD = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))

IMAGES = {
    # image: its caption files with their content, what they say, and where it is said
    "photo.jpg": ({"photo.txt": "a photo"}, "a photo", "photo.txt"),
    "Upper.JPG": ({"upper.TXT": "another case"}, "another case", "upper.TXT"),
    "photo 2.png": ({"photo 2.png.txt": "with the ending"}, "with the ending", "photo 2.png.txt"),
    "b.webp": ({"b.caption": "a caption file"}, "a caption file", "b.caption"),
    "c.bmp": ({"c.json": '{"caption": "of JSON", "tags": ["x"]}'}, "of JSON", "c.json"),
    "d.tif": ({"d.json": '{"text": ["first of two", "second of two"]}'}, "first of two", "d.json"),
    "s.tif": ({"s.json": '"JSON that is a text"'}, "JSON that is a text", "s.json"),
    "g.jpeg": ({"g.txt": "the same  twice", "g.caption": "the same\ntwice"}, "the same twice", "g.txt"),
    "h.png": ({"h.txt": " \n"}, "a row for h", "metadata.jsonl, line 3"),
    f"{NFC}.png": ({f"{NFD}.txt": "accents of macOS"}, "accents of macOS", f"{NFD}.txt"),
    "日本.png": ({"日本.txt": "日本の写真"}, "日本の写真", "日本.txt"),
    "dot.in.name.png": ({"dot.in.name.txt": "dots"}, "dots", "dot.in.name.txt"),
    "LOUD.PNG": ({"loud.png.CAPTION": "both odd"}, "both odd", "loud.png.CAPTION"),
    "i.png": ({"i.txt": "\ufeffa mark at the beginning"}, "a mark at the beginning", "i.txt"),
    "j.png": ({"j.txt": "two\r\n\r\nlines\n"}, "two lines", "j.txt"),
    "k.jpg.png": ({"k.jpg.txt": "two endings"}, "two endings", "k.jpg.txt"),
    "a, b.png": ({"a, b.txt": 'a comma, and a "quote"'}, 'a comma, and a "quote"', "a, b.txt"),
    "e.gif": ({}, "one of a list", "metadata.jsonl, line 1"),
    "f.tiff": ({}, "only a row", "metadata.jsonl, line 2"),
    "img10.png": ({}, "ten", "metadata.jsonl, line 4"),
    "img2.png": ({"img2.txt": "the row says so too"}, "the row says so too", "img2.txt"),
    "more/named.png": ({}, "of a sub-folder", "metadata.jsonl, line 6"),
    ".named.png": ({}, "hidden, but named", "metadata.jsonl, line 7"),
}

ROWS = [
    {"file_name": "e.gif", "text": ["one of a list", "another of a list"]},
    {"file_name": "./f.tiff", "text": "only a row"},
    {"file_name": "h.png", " Text ": "a row for h"},
    {"file_name": "./img10.png", "text": "ten"},
    {"File_Name": "img2.png", "text": "the row says so too"},
    {"file_name": "more/named.png", "text": "of a sub-folder"},
    {"file_name": ".named.png", "text": "hidden, but named"},
]

NO_ROLE, STRAY = "no image, caption or metadata", "there is no image of this name"
UNUSED = {
    "Thumbs.db": "a file of the operating system",
    "desktop.ini": "a file of the operating system",
    "notes.pdf": NO_ROLE,
    "movie.mov": NO_ROLE,
    "README.md": NO_ROLE,
    "README.txt": STRAY,
    "no ending": NO_ROLE,
    "photo.jpg.bak": NO_ROLE,
    "photo.jpg~": NO_ROLE,
    "archive.zip": NO_ROLE,
    "stray.txt": STRAY,
    "old.caption": STRAY,
    "dataset.json": STRAY,
    "captions.csv": NO_ROLE,
    "metadata.jsonl.txt": STRAY,
    "table.xlsx": NO_ROLE,
}
HIDDEN = (".DS_Store", ".hidden.png", "._photo.jpg")


def make(folder: Path) -> dict[str, Expected]:
    """Fill ``folder``; every entry with what the table must say of it."""
    expected: dict[str, Expected] = {}
    for number, (name, (files, text, source)) in enumerate(IMAGES.items()):
        picture(folder / name, number)
        expected[name] = Expected("image", source, text)
        for file, content in files.items():
            (folder / file).write_text(content, encoding="utf-8", newline="")
            expected[file] = Expected("caption", "", f"of {name}")
    expected["g.caption"] = Expected("not used", "", "g.txt is the caption of g.jpeg")
    expected["h.txt"] = Expected("not used", "", "an empty caption file")
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    expected["metadata.jsonl"] = Expected("metadata", "", "7 rows")
    for name, reason in UNUSED.items():
        (folder / name).write_text("x", encoding="utf-8")
        expected[name] = Expected("not used", "", reason)
    for name in HIDDEN:
        (folder / name).write_bytes(b"")
    (folder / ".git").mkdir()
    expected["4 hidden"] = Expected("not used", "", "begin with a dot")
    return expected | _shared(folder) | _links(folder) | _folders(folder)


def _shared(folder: Path) -> dict[str, Expected]:
    picture(folder / "shared.jpg", 60)
    picture(folder / "shared.png", 61)
    (folder / "shared.txt").write_text("one for two", encoding="utf-8")
    shutil.copy(folder / "photo.jpg", folder / "copy.jpg")
    (folder / "copy.txt").write_text("a copy", encoding="utf-8")
    image = Expected("image", "shared.txt", "one for two")
    return {
        "shared.jpg": image,
        "shared.png": image,
        "shared.txt": Expected("caption", "", "of shared.jpg, shared.png"),
        "copy.jpg": Expected("image", "copy.txt", "a copy"),
        "copy.txt": Expected("caption", "", "of copy.jpg"),
    }


def _links(folder: Path) -> dict[str, Expected]:
    outside = folder.parent / "elsewhere"
    picture(outside / "photo.png", 70)
    (folder / "link.png").symlink_to(outside / "photo.png")
    (folder / "link.txt").write_text("a link", encoding="utf-8")
    (folder / "linked folder").symlink_to(outside)
    (folder / "round").symlink_to(folder)
    (folder / "gone.link").symlink_to(outside / "gone")
    (folder / "itself").symlink_to(folder / "itself")
    os.mkfifo(folder / "pipe")
    gone = Expected("not used", "", "a link to something that is not there")
    return {
        "link.png": Expected("image", "link.txt", "a link"),
        "link.txt": Expected("caption", "", "of link.png"),
        "linked folder": Expected("not used", "", "a folder, whose images (1) are not used"),
        "round": Expected("not used", "", "a link to the folder itself"),
        "gone.link": gone,
        "itself": gone,
        "pipe": Expected("not used", "", "a pipe"),
    }


def _folders(folder: Path) -> dict[str, Expected]:
    (folder / "empty").mkdir()
    picture(folder / "10_sks dog" / "a.png", 80)
    picture(folder / "10_sks dog" / "deeper" / "b.png", 81)
    picture(folder / "more" / "not named.png", 82)
    return {
        "empty": Expected("not used", "", "a folder without images"),
        "10_sks dog": Expected("not used", "", 'give --repeats 10 --instance_prompt "sks dog"'),
        "more": Expected("not used", "", "a folder, whose images (1) are not used"),
    }


class Stopper(NamedTuple):
    """A folder that stops the run.

    Attributes:
        make: fills it, beside an image a.png.
        message: what is told, as a regular expression.
        flags: of the run, besides folder and prompt.
    """

    make: Callable[[Path], object]
    message: str
    flags: tuple[str, ...] = ()


def _file(name: str, content: str | bytes = "x") -> Callable[[Path], object]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def _all(*makers: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [maker(folder) for maker in makers]


def _csv(text: str | bytes, message: str, *flags: str) -> Stopper:
    return Stopper(_file("metadata.csv", text), message, flags)


def _rows(*rows: object, message: str) -> Stopper:
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    return Stopper(_file("metadata.jsonl", text), message)


def _link(name: str, target: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).symlink_to(target)


def _picture(name: str, number: int = 5) -> Callable[[Path], object]:
    return lambda folder: picture(folder / name, number)


STOPPERS = {
    # metadata.csv
    "unquoted comma": _csv(
        "file_name,text\na.png,red, on a table\n",
        r'metadata\.csv, line 2: 3 cells, but the first line names 2 columns.*a\.png,"red, on a table"$',
    ),
    "unquoted comma, header with a comma": _csv(
        "file_name,text,\na.png,red, on a table\n", r'a\.png,"red, on a table"$'
    ),
    "too few cells": _csv("file_name,text,n\na.png,red\n", r"line 2: 2 cells, but the first line names 3 columns"),
    "name alone": _csv("file_name,text\na.png\n", r"line 2: 1 cells, but .* write every cell"),
    "column twice": _csv("file_name,text,text\na.png,x,y\n", r"has the column text twice"),
    "column twice but for case": _csv("file_name,text,Text \na.png,x,y\n", r"has the column text twice.*'Text '"),
    "semicolons": _csv("file_name;text\na.png;red\n", r"metadata\.csv has semicolons between its columns"),
    "tabs": _csv("file_name\ttext\na.png\tred\n", r"has tabs between its columns"),
    "open quote": _csv('file_name,text\na.png,"red\n', r"line 2: unexpected end of data.*quotation mark"),
    "quote swallows a row": Stopper(
        _all(_picture("b.png"), _file("metadata.csv", 'file_name,text\na.png,"red\nb.png,blue"\n')),
        r"line 2: the row goes on over the line of b\.png",
    ),
    "huge cell": _csv(f'file_name,text\na.png,"{"x" * 200_000}"\n', r"line 2: field larger than field limit"),
    "NUL": _csv("file_name,text\na.png,r\0ed\n", r"metadata\.csv is not UTF-8 text \(it seems to be UTF-16, or no"),
    "UTF-16": _csv("file_name,text\na.png,red\n".encode("utf-16"), r"is not UTF-8 text \(it seems to be UTF-16\)"),
    "latin-1": _csv("file_name,text\na.png,café\n".encode("latin-1"), r"metadata\.csv is not UTF-8 text: save it"),
    "no file_name": _csv("filename,text\na.png,red\n", r"no column file_name in its first line: it has filename, text"),
    "captions of another name": _csv(
        "file_name,prompt\na.png,red\n", r"has no column text or caption: it has file_name, prompt.*--caption_column"
    ),
    "two caption columns": _csv("file_name,text,caption\na.png,x,y\n", r"the columns 'text' and 'caption': say which"),
    "a list in a cell": _csv(
        'file_name,text\na.png,"[""x"", ""y""]"\n', r"line 2: .*several captions.*metadata\.jsonl"
    ),
    "no rows": _csv("file_name,text\n", r"metadata\.csv has no rows"),
    "empty metadata": _csv("", r"metadata\.csv has no rows"),
    "wrong column": _csv(
        "file_name,text\na.png,x\n", r"no column 'words'.*file_name, text", "--caption_column", "words"
    ),
    # metadata.jsonl
    "caption is a number": _rows({"file_name": "a.png", "text": 3}, message=r"line 1: a caption is a text.*\(got 3\)"),
    "caption is an object": _rows({"file_name": "a.png", "text": {"a": 1}}, message=r"line 1: a caption is a text"),
    "number in a list": _rows({"file_name": "a.png", "text": ["x", 3]}, message=r"line 1: a caption is a text.*got 3"),
    "row without a name": _rows(
        {"file_name": "a.png", "text": "x"}, {"text": "y"}, message=r"line 2: no file_name \(columns: text\)"
    ),
    "name is a number": _rows({"file_name": 3, "text": "y"}, message=r"line 1: no file_name"),
    "key twice": _rows('{"file_name": "a.png", "text": "x", "text": "y"}', message=r"line 1 has the column text twice"),
    "no JSON": _rows('{"file_name"', message=r"line 1: not JSON"),
    "no such file": _rows({"file_name": "gone.png"}, message=r"line 1: there is no file .*gone\.png: correct the row"),
    "Windows path": Stopper(
        _all(_picture("sub/b.png"), _file("metadata.jsonl", r'{"file_name": "sub\\b.png", "text": "x"}')),
        r"there is no file .*\(there is sub/b\.png\)",
    ),
    "blank around a name": _rows(
        {"file_name": " a.png", "text": "x"}, message=r"there is no file .*\(there is a\.png\)"
    ),
    "outside": _rows({"file_name": "../x.png", "text": "x"}, message=r"line 1: \.\./x\.png lies outside of the folder"),
    "absolute": _rows({"file_name": "/x/y.png", "text": "x"}, message=r"/x/y\.png lies outside of the folder"),
    "no image": Stopper(
        _all(_file("b.pdf"), _file("metadata.jsonl", '{"file_name": "b.pdf", "text": "x"}')),
        r"b\.pdf has no ending of an image",
    ),
    "no name": _rows({"file_name": "\ud800.png", "text": "x"}, message=r"there is no file"),
    "named twice": _rows(
        {"file_name": "a.png", "text": "x"},
        {"file_name": "././a.png", "text": "y"},
        message=r"line 2: a\.png was named before, in line 1",
    ),
    "named twice by its path": Stopper(
        lambda folder: (folder / "metadata.jsonl").write_text(
            '{"file_name": "a.png"}\n' + json.dumps({"file_name": str((folder / "a.png").absolute())}), encoding="utf-8"
        ),
        r"line 2: a\.png was named before, in line 1",
    ),
    "named twice in Unicode": Stopper(
        _all(
            _picture(f"{NFD}.png"),
            _file("metadata.jsonl", "\n".join(f'{{"file_name": "{name}.png", "text": "x"}}' for name in (NFC, NFD))),
        ),
        r"line 2: .* was named before, in line 1",
    ),
    "named twice in case": _rows(
        {"file_name": "a.png", "text": "x"}, {"file_name": "A.PNG", "text": "y"}, message=r"line 2: a\.png was named"
    ),
    "two metadata files": Stopper(
        _all(_file("metadata.csv", ""), _file("Metadata.JSONL", "")), r"has metadata\.csv and Metadata\.JSONL: keep one"
    ),
    "column without metadata": Stopper(
        lambda folder: None, r"--caption_column text: .* has no metadata\.jsonl", ("--caption_column", "text")
    ),
    # files with captions
    "two captions": Stopper(
        _all(_file("a.txt", "red"), _file("a.caption", "blue")),
        r'a\.png has two captions: "red" \(a\.txt\) and "blue" \(a\.caption\)\. Keep one',
    ),
    "two captions by endings": Stopper(
        _all(_file("a.txt", "red"), _file("a.png.txt", "blue")), r"a\.png has two captions: .*a\.png\.txt"
    ),
    "two captions by case": Stopper(
        _all(_file("a.txt", "red"), _file("A.TXT", "blue")), r"a\.png has two captions: .*A\.TXT"
    ),
    "caption and row": Stopper(
        _all(_file("a.txt", "red"), _file("metadata.csv", "file_name,text\na.png,blue\n")),
        r'two captions: "red" \(a\.txt\) and "blue" \(metadata\.csv, line 2\)',
    ),
    "two images that differ in case": Stopper(
        _all(
            _picture("B.png"),
            _picture("b.png", 6),
            _file("B.Txt"),
            _picture("cD.png", 7),
            _picture("Cd.png", 8),
            _file("cd.txt"),
        ),
        r"cd\.txt differs in case from (cD\.png and Cd\.png|Cd\.png and cD\.png): name it as its image",
    ),
    "caption of no image": Stopper(
        _file("renamed.txt", "red"), r"renamed\.txt seems to hold captions, but belongs to no image \(1 such file\)"
    ),
    "table of captions": Stopper(_file("captions.csv"), r"captions\.csv seems to hold captions"),
    "metadata of another name": Stopper(_file("metadata.json", "[]"), r"metadata\.json seems to hold captions"),
    "metadata with another ending": Stopper(_file("metadata.jsonl.txt", "{}"), r"metadata\.jsonl\.txt seems to hold"),
    "JSON without a caption": Stopper(
        _file("a.json", '{"title": "x", "tags": ["y"]}'), r"a\.json has no text or caption: it has title, tags"
    ),
    "JSON with both": Stopper(_file("a.json", '{"text": "x", "caption": "y"}'), r"the columns 'text' and 'caption'"),
    "JSON with a number": Stopper(_file("a.json", '{"text": 3}'), r"a\.json: a caption is a text or a list of texts"),
    "JSON number alone": Stopper(_file("a.json", "3"), r"a\.json: a caption is a text or a list of texts"),
    "broken JSON": Stopper(_file("a.json", "{"), r"a\.json is not JSON"),
    "caption in UTF-16": Stopper(_file("a.txt", "red".encode("utf-16")), r"a\.txt is not UTF-8.*UTF-16\)"),
    "caption in latin-1": Stopper(_file("a.txt", "café".encode("latin-1")), r"a\.txt is not UTF-8 text: save it"),
    # what is no file
    "dangling image": Stopper(_link("b.jpg", "gone.jpg"), r"b\.jpg is a link to something that is not there"),
    "image that points to itself": Stopper(_link("b.jpg", "b.jpg"), r"b\.jpg is a link to something that is not there"),
    "folder named like an image": Stopper(lambda folder: (folder / "b.jpg").mkdir(), r"b\.jpg is a folder, not a file"),
    "pipe named like an image": Stopper(lambda folder: os.mkfifo(folder / "b.png"), r"b\.png is a pipe, not a file"),
    "dangling caption": Stopper(_link("a.txt", "gone.txt"), r"a\.txt is a link to something that is not there"),
    "pipe named like a caption": Stopper(lambda folder: os.mkfifo(folder / "a.txt"), r"a\.txt is a pipe"),
    "folder named like metadata": Stopper(
        lambda folder: (folder / "metadata.csv").mkdir(), r"metadata\.csv is a folder"
    ),
    "link to another photo": Stopper(_link("b.png", "a.png"), r"a\.png and b\.png are one file \(a link\)"),
    "hard link": Stopper(lambda folder: os.link(folder / "a.png", folder / "b.png"), r"a\.png and b\.png are one file"),
    "unreadable format": Stopper(_file("b.jxl"), r"the installed Pillow cannot read b\.jxl"),
    "no image at all": Stopper(_file("b.png", "no image"), r"b\.png: its content is no known image format"),
}
"""By what is wrong. All are run with --instance_prompt, which a caption that does not count would give way to."""
