"""Images for the fast path."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.fastpaths import HELPED, OLD


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(OLD)
    return path


@pytest.fixture
def large(tmp_path):
    image = tmp_path / "large.img"
    image.write_bytes(os.urandom(4 * HELPED))
    return image
