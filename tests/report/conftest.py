import pytest


@pytest.fixture(autouse=True)
def _places(tmp_path, monkeypatch):
    """A workspace and published results of each test's own."""
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MOELAB_RESULTS", str(tmp_path / "results"))
    monkeypatch.delenv("MOELAB_PUBLICATION", raising=False)
