"""What a table says of the machine."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import _results

ZEN2 = {"architecture": "x86_64", "avx": True, "avx2": True, "fma3": True, "avx512_f": False, "l2_cache_size": 524288}


@pytest.mark.parametrize(
    ("capabilities", "told", "vnni"),
    [
        (ZEN2, "avx avx2 fma3, no VNNI", False),
        (ZEN2 | {"avx512_f": True, "avx512_vnni": True}, "avx avx2 avx512_f avx512_vnni fma3", True),
        (ZEN2 | {"avx_vnni": True}, "avx avx2 avx_vnni fma3", True),
        ({"architecture": "aarch64", "neon": True, "dot": True, "cpu_name": "N1"}, "dot neon", True),
    ],
)
def test_instructions(monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, Any], told: str, vnni: bool) -> None:
    monkeypatch.setattr(_results, "_capabilities", lambda: capabilities)
    assert _results.has_vnni() is vnni
    assert _results.machine_facts()["instructions"] == told


def test_torch_tells_of_this_machine() -> None:
    assert "architecture" in _results._capabilities()
    assert isinstance(_results.has_vnni(), bool)
