"""Reading bundles: nothing damaged, altered, foreign or too new gets through."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fxcompress.backends.bundle import FORMAT_VERSION, MANIFEST, Manifest, PassRecord, read_manifest
from fxcompress.backends.bundle_writer import BundleWriter
from fxcompress.backends.signature import TensorSpec
from fxcompress.errors import BundleError
from fxcompress.graph.structure import Structure

LEAF = Structure("leaf")
CALL = Structure("tuple", children=(Structure("tuple", ("x",), (LEAF,)), Structure("dict")))


def manifest() -> Manifest:
    x = TensorSpec("x", ("batch", 3), "int64", (2, 3), 0, 7)
    options = {"threads": None, "providers": ("A",)}
    return Manifest(
        "engine",
        "onnxruntime",
        (x,),
        (TensorSpec("y", (2,), "float32"),),
        CALL,
        LEAF,
        options=options,
        passes=(PassRecord("fuse_modules", {"rounds": 2}),),
        measurements={"error": 1e-6},
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    with BundleWriter(tmp_path / "engine") as writer:
        (writer.directory / "model.onnx").write_bytes(b"the model")
        (writer.directory / "data").mkdir()
        (writer.directory / "data" / "weights").write_bytes(b"the weights")
        path, _ = writer.commit(manifest())
    return path


def edit(bundle: Path, **changes: Any) -> None:
    file = bundle / MANIFEST
    told = json.loads(file.read_text())
    for key, value in changes.items():
        if value is ...:
            del told[key]
        else:
            told[key] = value
    file.write_text(json.dumps(told))


def refused(bundle: Path, message: str, where: str | None = None) -> BundleError:
    with pytest.raises(BundleError, match=message) as caught:
        read_manifest(bundle)
    assert caught.value.where == str(bundle / where if where else bundle)
    assert caught.value.remedy
    return caught.value


def test_what_was_written_is_read(bundle: Path) -> None:
    read = read_manifest(bundle, kind="engine")
    wrote = manifest()
    for name in (
        "kind",
        "backend",
        "inputs",
        "outputs",
        "input_structure",
        "output_structure",
        "passes",
        "measurements",
    ):
        assert getattr(read, name) == getattr(wrote, name)
    assert read.options == {"threads": None, "providers": ["A"]}
    assert set(read.files) == {"model.onnx", "data/weights"}
    assert read.files["data/weights"].bytes == len(b"the weights") and len(read.files["model.onnx"].sha256) == 64
    assert {"python", "platform", "torch"} <= read.versions.keys()
    assert read.created.endswith("+00:00") and read.fxcompress and read.format_version == FORMAT_VERSION


def test_no_directory(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "there is no such directory")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "no bundle here: this is a file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "manifest.json is missing", MANIFEST)


def test_another_kind(bundle: Path) -> None:
    with pytest.raises(BundleError, match="does not hold a graph") as caught:
        read_manifest(bundle, kind="graph")
    assert "load_engine" in str(caught.value)


def test_tampered_file_of_the_same_size(bundle: Path) -> None:
    (bundle / "model.onnx").write_bytes(b"THE model")
    refused(bundle, "model.onnx was altered: its sha256 differs", "model.onnx")


def test_truncated_file(bundle: Path) -> None:
    (bundle / "data" / "weights").write_bytes(b"the")
    refused(bundle, "weights has 3 bytes instead of 11", "data/weights")


def test_missing_file(bundle: Path) -> None:
    (bundle / "data" / "weights").unlink()
    refused(bundle, "weights is missing", "data/weights")


def test_unlisted_file(bundle: Path) -> None:
    (bundle / "data" / "extra").touch()
    refused(bundle, "does not list this file", "data/extra")


@pytest.mark.parametrize("keep", [0, 1, 100, -3])
def test_truncated_manifest(bundle: Path, keep: int) -> None:
    file = bundle / MANIFEST
    file.write_bytes(file.read_bytes()[:keep])
    refused(bundle, "manifest.json cannot be read", MANIFEST)


@pytest.mark.parametrize("text", [b"\xff\xfe\x00", b"[" * 100_000, b"{'single': 1}"])
def test_manifest_that_is_not_json(bundle: Path, text: bytes) -> None:
    (bundle / MANIFEST).write_bytes(text)
    refused(bundle, "manifest.json cannot be read", MANIFEST)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"text"'])
def test_manifest_that_is_not_an_object(bundle: Path, text: str) -> None:
    (bundle / MANIFEST).write_text(text)
    refused(bundle, "manifest.json is damaged at the whole", MANIFEST)


def test_newer_format(bundle: Path) -> None:
    edit(bundle, format_version=FORMAT_VERSION + 1, fxcompress="9.9", unheard_of=1)
    error = refused(bundle, "has format 2; this fxcompress reads up to 1", MANIFEST)
    assert "9.9" in str(error.remedy)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"inputs": ...}, "inputs"),
        ({"kind": ...}, "kind"),
        ({"kind": "weights"}, "kind"),
        ({"backend": 3}, "backend"),
        ({"format_version": "1"}, "format_version"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"inputs": [{"name": "x", "shape": [1.5], "dtype": "float32"}]}, "inputs.0.shape.0"),
        ({"inputs": [{"name": "x", "shape": [1]}]}, "inputs.0.dtype"),
        ({"input_structure": {"kind": "set"}}, "input_structure"),
        ({"files": {"model.onnx": {"sha256": "00"}}}, r"files.model.onnx.bytes"),
        ({"files": ["model.onnx"]}, "files"),
    ],
    ids=str,
)
def test_fields_missing_or_of_the_wrong_type(bundle: Path, changes: dict[str, Any], place: str) -> None:
    edit(bundle, **changes)
    refused(bundle, f"manifest.json is damaged at {place}", MANIFEST)


@pytest.mark.parametrize("version", [0, -1])
def test_impossible_format(bundle: Path, version: int) -> None:
    edit(bundle, format_version=version)
    refused(bundle, "impossible format", MANIFEST)


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc/hostname", "data/../../outside", "data/../model.onnx", "./model.onnx", "", ".", "..", "a//b",
     "C:\\windows", "data\\weights", "c:file", "nul\0byte", MANIFEST],
)  # fmt: skip
def test_paths_that_climb_out(bundle: Path, name: str) -> None:
    (bundle.parent / "outside").write_bytes(b"secret")
    files = json.loads((bundle / MANIFEST).read_text())["files"]
    edit(bundle, files={**files, name: {"sha256": "00", "bytes": 6}})
    refused(bundle, "no plain path inside the bundle", MANIFEST)


def test_symbolic_links_to_outside(bundle: Path) -> None:
    outside = bundle.parent / "outside"
    outside.mkdir()
    (bundle / "data" / "weights").rename(outside / "weights")
    (bundle / "data" / "weights").symlink_to(outside / "weights")
    refused(bundle, "this is a symbolic link", "data/weights")
    (bundle / "data" / "weights").unlink()
    (bundle / "data").rmdir()
    (bundle / "data").symlink_to(outside, target_is_directory=True)
    refused(bundle, "this is a symbolic link", "data")


def test_symbolic_link_inside_and_dangling(bundle: Path) -> None:
    (bundle / "twin").symlink_to("model.onnx")
    refused(bundle, "this is a symbolic link", "twin")
    (bundle / "twin").unlink()
    (bundle / "twin").symlink_to("nowhere")
    refused(bundle, "this is a symbolic link", "twin")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this platform")
def test_a_pipe_does_not_hang_the_reader(bundle: Path) -> None:
    (bundle / "model.onnx").unlink()
    os.mkfifo(bundle / "model.onnx")
    refused(bundle, "this is not a regular file", "model.onnx")


def test_a_link_to_the_bundle_itself_is_fine(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(bundle, target_is_directory=True)
    assert read_manifest(tmp_path / "current").kind == "engine"
