import pytest

from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.files import atomic_write, remove, sha256_file
from tests.support.data import listing
from tests.support.power_loss import assert_lasts, noted_operations


def test_a_failed_write_keeps_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    with atomic_write(path) as file:
        file.write(b"abc")
        assert not path.exists()
    assert sha256_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

    def fail_half_way():
        with atomic_write(path) as file:
            file.write(b"x")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert path.read_bytes() == b"abc"
    assert listing(tmp_path) == ["deep", "deep/a.txt"]


def test_a_written_file_survives_a_power_loss(tmp_path, monkeypatch):
    calls = noted_operations(monkeypatch)
    with atomic_write(tmp_path / "a.txt") as file:
        file.write(b"abc")
    assert_lasts(calls, tmp_path / "a.txt")


def test_two_that_write_one_file_at_once_both_leave_it_whole(tmp_path):
    path = tmp_path / "a"
    with atomic_write(path) as slow:
        slow.write(b"first half, ")
        slow.flush()
        with atomic_write(path) as fast:
            fast.write(b"whole")
        assert path.read_bytes() == b"whole"
        slow.write(b"second half")
    assert path.read_bytes() == b"first half, second half"
    assert listing(tmp_path) == ["a"]


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write in .*file"), atomic_write(tmp_path / "file" / "a"):
        pass


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    remove(tmp_path / "link")
    assert listing(tmp_path) == ["folder", "folder/a"]
    remove(tmp_path / "folder")
    remove(tmp_path / "folder")  # where nothing is
    assert listing(tmp_path) == []
