"""port/README.md knows every file of C, and none that is gone."""

from __future__ import annotations

import re
from pathlib import Path

PORT = Path(__file__).parents[3] / "snapfs/port"


def listed() -> list[str]:
    text = (PORT / "README.md").read_text().split("## Which file does what")[1].split("\n## ")[0]
    return re.findall(r"^    (\w+\.[ch])  +\S", text, re.MULTILINE)


def test_each_file_is_listed_once_and_headers_with_their_source():
    sources = {path.name for path in PORT.glob("*.c")}
    lone = {path.name for path in PORT.glob("*.h") if not path.with_suffix(".c").exists()}
    assert sorted(sources | lone) == sorted(listed())


def test_every_name_in_the_text_exists():
    text = (PORT / "README.md").read_text()
    files = {path.name for path in PORT.iterdir()}
    for name in re.findall(r"(?<![\w/.])(\w+\.[ch])\b", text):
        assert name in files
    root = PORT.parents[1]
    for name in re.findall(r"(?<![\w/])((?:fuse|engine|storage|tests)/[\w/]*(?:\.py)?)", text):
        assert (root / name).exists() or (root / "snapfs" / name).exists(), name


def test_functions_in_the_text_exist():
    text = (PORT / "README.md").read_text()
    code = "".join(path.read_text() for path in PORT.glob("*.[ch]"))
    names = re.findall(r"`(\w+)(?:\(\))?`", text)
    for name in names:
        if not name.startswith("_") and name != "no_fastpath":
            assert re.search(rf"\b{name}\b", code), name
