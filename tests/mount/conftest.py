"""What several files of mount tests use."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import sanitized


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with snapfs in it, its C under sanitizers; built once."""
    return sanitized.build(tmp_path_factory.mktemp("sanitized"))
