"""Passes by name, with options from text."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from fxcompress.errors import OptionError
from fxcompress.passes import FactorizeLinear, FuseModules, Numerics, Pass, PassResult, registry
from fxcompress.passes.registry import make_pass, parse_pass, pass_names, resolve_passes


@dataclass(frozen=True)
class Scale(Pass):
    """A pass with options of several types."""

    name: ClassVar[str] = "scale"
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    ratio: float = 0.5
    ignore: tuple[str, ...] = ()
    scope: str = "local"

    def run(self, graph_module, context):
        return PassResult(graph_module)


@pytest.fixture
def scale(monkeypatch):
    monkeypatch.setattr(registry, "_BUILT_IN", {**registry._BUILT_IN, "scale": f"{__name__}:Scale"})
    monkeypatch.setattr(registry, "import_module", lambda name: __import__("sys").modules[name])


def test_a_name_alone_is_the_pass_with_its_defaults():
    assert parse_pass("fuse_modules") == FuseModules()
    assert "fuse_modules" in pass_names()


def test_options_are_literals(scale):
    made = parse_pass("scale(ratio=0.25, ignore=['fc', 'head'], scope='global')")
    assert made == Scale(ratio=0.25, ignore=("fc", "head"), scope="global")
    assert parse_pass("scale(ratio=1)").ratio == 1
    assert str(made) == "scale(ratio=0.25, ignore=('fc', 'head'), scope='global')"
    assert made.options == {"ratio": 0.25, "ignore": ["fc", "head"], "scope": "global"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fuse_module", "did you mean 'fuse_modules'"),
        ("no_such_thing_at_all", "known: "),
        ("scale(ration=0.5)", "did you mean 'ratio'"),
        ("scale(0.5)", "write a name"),
        ("scale(ratio=", "write a name"),
        ("scale(ratio=open('x'))", "no literal"),
        ("scale(**{})", "write a name"),
        ("__import__('os').system('true')", "write a name"),
        ("scale(ratio='half')", "number"),
        ("scale(ignore=3)", "tuple"),
    ],
)
def test_what_is_wrong_is_said(scale, text, said):
    with pytest.raises(OptionError) as caught:
        parse_pass(text)
    assert said in str(caught.value)


def test_of_data_it_is_told_how_much_there_is():
    x = torch.zeros(2, 3)
    for data, told in (
        ([x] * 12, "12 batches"),
        ((x,), "1 batch"),
        ([(x, x), (x, x)], "2 batches"),
        ([{"ids": x}], "1 batch"),
        (torch.zeros(8, 3).split(2), "4 batches"),
    ):
        made = FactorizeLinear(ratio=0.25, calibration=data)
        assert str(made) == f"factorize_linear(ratio=0.25, calibration=<{told}>)"
        assert made.options["calibration"] == told
    assert FactorizeLinear(calibration=iter([x])).options["calibration"] == "list_iterator"


def test_options_are_checked_when_constructed():
    with pytest.raises(OptionError, match="ratio='half'"):
        Scale(ratio="half")
    with pytest.raises(OptionError, match="no option"):
        make_pass(Scale, {"rate": 1})


@pytest.mark.parametrize("passes", [3, [3], [FuseModules], ["fuse_modules", None]])
def test_a_list_of_something_else_is_refused(passes):
    with pytest.raises(OptionError):
        resolve_passes(passes)


def test_resolving_takes_names_instances_and_nothing():
    assert resolve_passes(None) == ()
    assert resolve_passes([]) == ()
    assert resolve_passes("fuse_modules") == (FuseModules(),)
    assert resolve_passes([FuseModules(), "fuse_modules"]) == (FuseModules(), FuseModules())


def test_a_third_party_pass_comes_by_entry_point(monkeypatch):
    class Point:
        name, value = "third", "package:Third"

        def load(self):
            return Scale

    monkeypatch.setattr(registry, "entry_points", lambda group: [Point()])
    assert parse_pass("third(ratio=0.75)") == Scale(ratio=0.75)
    assert "third" in pass_names()


def test_a_broken_entry_point_says_whose_it_is(monkeypatch):
    class Point:
        name, value = "third", "package:Third"

        def load(self):
            raise ImportError("no package")

    monkeypatch.setattr(registry, "entry_points", lambda group: [Point()])
    with pytest.raises(OptionError, match="package:Third"):
        parse_pass("third")
