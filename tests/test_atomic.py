"""A folder that appears whole or not at all; failures are provoked at every step."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepspec.atomic import atomic_file, atomic_folder, write_text


def write(final: Path, text: str) -> None:
    with atomic_folder(final) as folder:
        (folder / "file").write_text(text)


def test_appears_and_is_replaced(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "out"
    write(final, "one")
    write(final, "two")
    assert (final / "file").read_text() == "two"
    assert [path.name for path in final.parent.iterdir()] == ["out"]


def test_the_current_folder_and_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "through")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "through"
    monkeypatch.chdir(tmp_path / "real")
    write(Path("."), "here")
    assert (tmp_path / "real" / "file").read_text() == "here"
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}


def test_nothing_appears_when_writing_fails(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write(tmp_path / "out", "half \ud800")
    assert list(tmp_path.iterdir()) == []


def test_the_old_folder_comes_back_when_the_last_step_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "out", "one")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == ".out.partial":
            raise OSError("the disk went away")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="went away"):
        write(tmp_path / "out", "two")
    assert (tmp_path / "out" / "file").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_a_killed_process_do_no_harm(tmp_path: Path) -> None:
    for name in (".out.partial", ".out.previous"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").write_text("left over")
    write(tmp_path / "out", "one")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", [".out.partial", ".out.previous"])
@pytest.mark.parametrize("folder", [True, False])
def test_links_under_hidden_names_are_not_followed(name: str, folder: bool, tmp_path: Path) -> None:
    """They are removed; what they lead to stays as it was."""
    other = tmp_path / "other"
    if folder:
        write(tmp_path / "out", "before")
        other.mkdir()
        (other / "file").write_text("theirs")
    else:
        (tmp_path / "out").write_text("before")
        other.write_text("theirs")
    (tmp_path / name).symlink_to("other")
    if folder:
        write(tmp_path / "out", "mine")
        found = [(each / "file").read_text() for each in (tmp_path / "out", other)]
    else:
        write_text(tmp_path / "out", "mine")
        found = [each.read_text() for each in (tmp_path / "out", other)]
    assert found == ["mine", "theirs"]
    assert not (tmp_path / "out").is_symlink()
    left = {path.name for path in tmp_path.iterdir()}
    assert left - {".out.previous"} == {"out", "other"}  # a file has no previous one


def test_a_link_put_there_while_writing_is_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("theirs")
    other.chmod(0o600)

    def swapped() -> None:
        with atomic_file(tmp_path / "out") as partial:
            partial.unlink()
            partial.symlink_to("other")

    with pytest.raises(OSError, match="symbolic"):
        swapped()
    assert (other.read_text(), other.stat().st_mode & 0o777) == ("theirs", 0o600)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_folder_left_under_the_hidden_name_of_a_file(tmp_path: Path) -> None:
    (tmp_path / ".out.partial" / "deep").mkdir(parents=True)
    write_text(tmp_path / "out", "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
