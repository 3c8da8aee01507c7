"""What the tests of all methods share."""

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """One for all tests, so that models of the zoo are trained once."""
    monkeypatch.setenv("RVLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
