import stat
from pathlib import Path

import pytest

from ldm.webui.results import Results


def added(results: Results, session: str, name: str) -> Path:
    results.enter(session)
    with results.adding(session, name) as folder:
        return folder


def test_a_session_has_what_it_shows_and_nothing_once_it_is_over(tmp_path: Path) -> None:
    """Finished images stayed until the page ended."""
    results = Results(tmp_path)
    old, new, other = added(results, "a", "1"), added(results, "a", "2"), added(results, "b", "3")
    (old / "7.png").touch()
    results.keep("a", {new})
    assert sorted(tmp_path.iterdir()) == [new, other]
    results.leave("a")
    results.leave("nobody")
    assert sorted(tmp_path.iterdir()) == [other]
    assert stat.S_IMODE(other.stat().st_mode) == 0o700


def test_a_folder_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    """A job that finished while the page ended left a folder behind that others could read."""
    with pytest.raises(FileNotFoundError):
        added(Results(tmp_path / "gone"), "a", "1")
    assert list(tmp_path.iterdir()) == []


def test_what_is_added_for_a_session_that_has_left_is_removed(tmp_path: Path) -> None:
    """Results of a tab that was closed while they were written stayed until the page ended."""
    results = Results(tmp_path)
    results.enter("a")
    with results.adding("a", "1") as during:
        results.leave("a")
        (during / "7.png").touch()
    with results.adding("a", "2") as after:
        pass
    assert not during.exists()
    assert not after.exists()
    assert added(results, "a", "3").exists()  # the tab was there all the time, and the connection is again
