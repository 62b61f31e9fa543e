"""A hub on this machine."""

import pytest
from fake_hub import BASE, serving, use

from repeng import tiny


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with a base model, an empty cache, and an empty working folder."""
    with serving() as one:
        one.add(BASE, tiny.WEIGHTS)
        use(monkeypatch, one, tmp_path / "hub-cache")
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        yield one
