"""Files are old or new, never half; what goes wrong is said with the file's name, and nothing is left lying about."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import pytest

from nasbench.files import atomic_write, sha256

ROOT = Path(__file__).parents[2]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "result.json"
    path.parent.mkdir()
    path.write_text("old")
    return path


def fails_with(code: int) -> Any:
    def fail(*args: Any, **kwargs: Any) -> NoReturn:
        raise OSError(code, os.strerror(code))

    return fail


def write(path: Path, text: str, error: BaseException | None = None) -> None:
    """Write a file, failing at the end of the block if an error is given."""
    with atomic_write(path) as temporary:
        temporary.write_text(text)
        if error is not None:
            raise error


def only(path: Path) -> bool:
    """Whether nothing else lies in the file's folder."""
    return list(path.parent.iterdir()) == [path]


def test_the_file_is_replaced_when_the_block_ends(target: Path) -> None:
    with atomic_write(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert only(target)


def test_missing_folders_are_made_and_paths_may_be_strings(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "weights.bin"
    with atomic_write(str(path)) as temporary:
        temporary.write_bytes(b"\x00\x01")
        assert not path.exists()
    assert path.read_bytes() == b"\x00\x01"
    assert only(path)


def test_the_temporary_file_lies_beside_the_target_with_its_suffix(target: Path) -> None:
    # The same folder: a rename within one file system is one step. The same suffix: np.savez would append its own.
    with atomic_write(target) as temporary:
        temporary.write_text("new")
        assert temporary.parent == target.parent
        assert temporary.suffix == target.suffix
        assert temporary.name.startswith(".")


def test_others_may_read_the_file(target: Path) -> None:
    write(target, "new")
    assert target.stat().st_mode & 0o777 == 0o644  # temporary files are made for their owner alone


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_a_block_that_raises_leaves_the_old_file(target: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        write(target, "half", error)
    assert caught.value is error
    assert target.read_text() == "old"
    assert only(target)


def test_a_block_that_raises_makes_no_file_where_none_was(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no"):
        write(tmp_path / "new.txt", "half", RuntimeError("no"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_is_named(target: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, step, fails_with(errno.ENOSPC))
    expected = r"cannot write .*result\.json: No space left on device\. Free some space there"
    with pytest.raises(OSError, match=expected) as caught:
        write(target, "new")
    assert caught.value.errno == errno.ENOSPC
    assert target.read_text() == "old"
    assert only(target)


def test_a_disk_that_fills_up_while_writing_leaves_the_old_file(target: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match=r"cannot write .*result\.json: No space left") as caught:
        write(target, "half", full)
    assert caught.value.errno == errno.ENOSPC
    assert target.read_text() == "old"
    assert only(target)


def test_a_read_only_folder_is_named(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Permission bits do not bind root, who may be running the tests.
    monkeypatch.setattr(tempfile, "mkstemp", fails_with(errno.EACCES))
    expected = r"cannot write .*result\.json: Permission denied\. .*name a folder you can write to"
    with pytest.raises(PermissionError, match=expected), atomic_write(target):
        pytest.fail("the block must not run: nothing could be kept")
    assert target.read_text() == "old"
    assert only(target)


def test_a_file_in_place_of_the_folder_is_named(target: Path) -> None:
    with pytest.raises(OSError, match=r"cannot write .*result\.json.inner\.txt: "), atomic_write(target / "inner.txt"):
        pytest.fail("the block must not run: nothing could be kept")
    assert target.read_text() == "old"


def test_a_folder_in_place_of_the_file_is_named(target: Path) -> None:
    with pytest.raises(OSError, match=r"cannot write .*folder: "):
        write(target.parent, "new")
    assert target.read_text() == "old"
    assert list(target.parent.parent.iterdir()) == [target.parent]


def test_contents_are_on_disk_before_the_name_is(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The other way round, a power cut could leave the new name on an empty file.
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        assert steps or os.fstat(handle).st_size == len("new")
        steps.append("fsync")
        fsync(handle)

    def replaced(source: Path, destination: Path) -> None:
        steps.append("replace")
        replace(source, destination)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write(target, "new")
    assert steps[:2] == ["fsync", "replace"]


def test_two_writers_do_not_mix(target: Path) -> None:
    with atomic_write(target) as first:
        first.write_text("fi")
        with atomic_write(target) as second:
            assert second != first
            second.write_text("second")
        assert target.read_text() == "second"
        first.write_text("first")
    assert target.read_text() == "first"
    assert only(target)


def test_a_killed_process_leaves_the_old_file(target: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from nasbench.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, target], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert target.read_text() == "old"


@pytest.mark.parametrize(
    ("content", "digest"),
    [
        (b"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        (b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
    ],
    ids=["empty", "abc"],
)
def test_sha256_of_the_standard_test_messages(tmp_path: Path, content: bytes, digest: str) -> None:
    path = tmp_path / "message"
    path.write_bytes(content)
    assert sha256(path) == sha256(str(path)) == digest


def test_sha256_of_a_missing_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        sha256(tmp_path / "nowhere")
