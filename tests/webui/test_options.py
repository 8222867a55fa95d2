from pathlib import Path

import pytest

from ldm.errors import InputError
from ldm.webui.options import PageOptions, password_check, read_users


def test_the_page_is_this_machines_own() -> None:
    assert PageOptions().host == "127.0.0.1"
    for host in ("::1", "localhost"):
        PageOptions(host=host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "somewhere.example"])
def test_another_host_needs_users(host: str) -> None:
    with pytest.raises(InputError, match=f"{host} can be reached from other machines: give auth_file"):
        PageOptions(host=host)
    PageOptions(host=host, auth_file="users.txt")


def test_users_are_read(tmp_path: Path) -> None:
    path = tmp_path / "users.txt"
    path.write_text("# who\n\nann: s:ecret \nbob:höhe\n", encoding="utf-8")
    users = read_users(str(path))
    assert users == {"ann": "s:ecret", "bob": "höhe"}
    check = password_check(users)
    assert check("ann", "s:ecret")
    assert check("bob", "höhe")
    for user, password in (("ann", ""), ("ann", "höhe"), ("eve", ""), ("eve", "eve "), ("", "")):
        assert not check(user, password)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no line USER:PASSWORD"),
        ("ann", "line 1: give USER:PASSWORD"),
        ("ann:", "line 1"),
        ("a:1\na:2", "line 2"),
    ],
)
def test_a_file_with_a_mistake_is_refused_without_its_passwords(
    tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "users.txt").write_text(text)
    with pytest.raises(InputError, match=words):
        read_users(str(tmp_path / "users.txt"))
    with pytest.raises(InputError, match="No such file"):
        read_users(str(tmp_path / "missing"))
