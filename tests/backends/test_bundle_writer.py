"""Writing bundles: at once and complete, or nothing at all."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fxcompress.backends.bundle import MANIFEST, Manifest, PassRecord, read_manifest
from fxcompress.backends.bundle_writer import BundleWriter, check_output
from fxcompress.errors import BundleError
from fxcompress.graph.structure import Structure

LEAF = Structure("leaf")
CALL = Structure("tuple", children=(Structure("tuple"), Structure("dict")))
MANIFEST_OF_NOTHING = Manifest("graph", None, (), (), CALL, LEAF)


def write(output: Path | None, manifest: Manifest = MANIFEST_OF_NOTHING) -> tuple[Path, Manifest, Path | None]:
    with BundleWriter(output) as writer:
        (writer.directory / "file").write_bytes(b"content")
        path, written = writer.commit(manifest)
    return path, written, writer.temporary


def interrupted(output: Path, error: BaseException) -> None:
    with BundleWriter(output) as writer:
        (writer.directory / "file").write_bytes(b"content")
        raise error


def test_nothing_is_seen_before_the_commit(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "er" / "bundle"
    with BundleWriter(output) as writer:
        (writer.directory / "file").write_bytes(b"content")
        assert not output.exists()
        path, written = writer.commit(MANIFEST_OF_NOTHING)
        assert path == output and sorted(os.listdir(output)) == ["file", MANIFEST]
    assert os.listdir(output.parent) == ["bundle"], "no scratch directory is left"
    assert read_manifest(output) == written


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_nothing_is_left_after_a_failure(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "kept").mkdir()
    for output in (tmp_path / "new" / "er" / "bundle", tmp_path / "kept" / "bundle"):
        with pytest.raises(type(error)):
            interrupted(output, error)
    assert os.listdir(tmp_path) == ["kept"] and os.listdir(tmp_path / "kept") == []


def test_directories_made_on_the_way_stay_if_another_uses_them(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "a" / "b" / "bundle"):
        (tmp_path / "a" / "other").touch()
    assert os.listdir(tmp_path / "a") == ["other"]


def test_without_a_commit_nothing_is_written(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_failing_rename_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(BundleError, match="cannot be written here: No space left on device"):
        write(tmp_path / "bundle")
    assert os.listdir(tmp_path) == []


def test_output_that_gets_filled_meanwhile(tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    with BundleWriter(output) as writer:
        output.mkdir()
        (output / "theirs").write_bytes(b"theirs")
        with pytest.raises(BundleError, match="cannot be written here"):
            writer.commit(MANIFEST_OF_NOTHING)
    assert os.listdir(tmp_path) == ["bundle"] and os.listdir(output) == ["theirs"]


def test_an_empty_directory_is_fine(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    write(tmp_path / "bundle")
    assert read_manifest(tmp_path / "bundle").kind == "graph"


def test_an_empty_directory_reached_by_a_link_is_filled(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    path, *_ = write(tmp_path / "link")
    assert path == tmp_path / "link" and path.is_symlink() and read_manifest(path).kind == "graph"


def test_others_may_read_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    path, *_ = write(tmp_path / "bundle")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_occupied_outputs(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name, what in (("file", "a file"), ("full", "a directory that is not empty"), ("dangling", "leads nowhere")):
        for attempt in (check_output, BundleWriter):
            with pytest.raises(BundleError, match=what) as caught:
                attempt(tmp_path / name)
            assert caught.value.where == str(tmp_path / name)
            assert "choose another output, or delete" in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["dangling", "file", "full"]


def test_unwritable_outputs(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="cannot be written here"):
        check_output(tmp_path / "file" / "bundle")
    with pytest.raises(BundleError, match="cannot be written here"):
        check_output(tmp_path / ("n" * 300))
    with pytest.raises(BundleError, match="cannot be written here"):
        check_output(tmp_path / ("n" * 300) / "bundle")
    with pytest.raises(BundleError, match="null byte"):
        check_output(f"{tmp_path}/a\0b")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_parent(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(BundleError, match="cannot be written here: Permission denied"):
        check_output(tmp_path / "locked" / "bundle")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_file_systems_that_take_no_directories() -> None:
    with pytest.raises(BundleError, match="cannot be written here"):
        check_output("/proc/bundle")


def test_check_output_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_output("a/b") == tmp_path / "a" / "b"
    assert os.listdir(tmp_path) == []


def test_temporary_bundles() -> None:
    path, written, temporary = write(None)
    assert temporary is not None and path.is_relative_to(temporary)
    assert read_manifest(path) == written
    for file in (path / "file", path / MANIFEST):
        file.unlink()
    path.rmdir()
    temporary.rmdir()


def test_figures_of_other_libraries_become_json(tmp_path: Path) -> None:
    measured: dict[Any, Any] = {
        "numpy": np.float32(0.5),
        "torch": torch.tensor(3),
        "nan": float("nan"),
        "inf": [np.inf, 1.0],
        "dtype": torch.float16,
        "path": Path("a/b"),
        "set": {2, 1},
        1: (True, None),
    }
    passes = (PassRecord("prune", {"ignore": ("a", "b")}),)
    path, written, _ = write(tmp_path / "bundle", replace(MANIFEST_OF_NOTHING, measurements=measured, passes=passes))
    told = json.loads((path / MANIFEST).read_text())
    assert told["measurements"] == {
        "numpy": 0.5,
        "torch": 3,
        "nan": None,
        "inf": [None, 1.0],
        "dtype": "torch.float16",
        "path": "a/b",
        "set": [1, 2],
        "1": [True, None],
    }
    assert told["passes"] == [{"name": "prune", "options": {"ignore": ["a", "b"]}}]
    assert read_manifest(path) == written


def test_what_json_cannot_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot hold a object") as caught:
        write(tmp_path / "bundle", replace(MANIFEST_OF_NOTHING, options={"a": [1, object()]}))
    assert caught.value.where == "options.a[1]"
    assert os.listdir(tmp_path) == []


def test_links_are_not_written(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as writer:
        (writer.directory / "link").symlink_to("/etc/hostname")
        with pytest.raises(BundleError, match="this is a symbolic link"):
            writer.commit(MANIFEST_OF_NOTHING)
    assert os.listdir(tmp_path) == []
