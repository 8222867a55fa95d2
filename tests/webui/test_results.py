import stat
from pathlib import Path

import pytest

from ldm.webui.results import Results


def test_a_session_has_what_it_shows_and_nothing_once_it_is_over(tmp_path: Path) -> None:
    """Finished images stayed until the page ended."""
    results = Results(tmp_path)
    old, new, other = results.add("a", "1"), results.add("a", "2"), results.add("b", "3")
    (old / "7.png").touch()
    results.keep("a", {new})
    assert sorted(tmp_path.iterdir()) == [new, other]
    results.keep("a", ())
    results.keep("nobody", ())
    assert sorted(tmp_path.iterdir()) == [other]
    assert stat.S_IMODE(other.stat().st_mode) == 0o700


def test_a_folder_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    """A job that finished while the page ended left a folder behind that others could read."""
    with pytest.raises(FileNotFoundError):
        Results(tmp_path / "gone").add("a", "1")
    assert list(tmp_path.iterdir()) == []
