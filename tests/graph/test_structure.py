"""Structures: from pytree specs to JSON and back, values in and out, names."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from fxcompress.errors import PreconditionError
from fxcompress.graph.structure import Record, Structure

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Detection:
    boxes: Any
    scores: Any = None


torch.export.register_dataclass(Detection)


class ModelOutputLike(OrderedDict[str, Any]):
    """As transformers' ModelOutput: a mapping with attributes whose context is the list of its keys."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


pytree.register_pytree_node(
    ModelOutputLike,
    lambda output: (list(output.values()), list(output)),
    lambda values, keys: ModelOutputLike(zip(keys, values, strict=True)),
)


class Opaque:
    def __init__(self, part: Any) -> None:
        self.part = part


pytree.register_pytree_node(Opaque, lambda o: ([o.part], None), lambda parts, _: Opaque(parts[0]))


def structure_of(value: Any, constants: dict[int, Any] | None = None) -> Structure:
    return Structure.from_spec(pytree.tree_structure(value), constants)


def through_json(structure: Structure) -> Structure:
    return Structure.from_json(json.loads(json.dumps(structure.to_json(), allow_nan=False)))


@pytest.mark.parametrize(
    "value",
    [
        1,
        (1,),
        (1, [2, 3], ()),
        {"a": 1, "b": (2, {"c": [3]})},
        {0: 1, 1.5: 2, None: 3},
        OrderedDict(b=1, a=2),
        [],
        ((1, 2), {"k": {"z": 3}}),
    ],
    ids=repr,
)
def test_builtin_containers_round_trip(value: Any) -> None:
    structure = structure_of(value)
    assert through_json(structure) == structure
    leaves = pytree.tree_leaves(value)
    assert structure.flatten(value) == leaves
    rebuilt = through_json(structure).unflatten(leaves)
    assert rebuilt == value and type(rebuilt) is type(value)
    assert structure.leaf_count == len(leaves)


@pytest.mark.parametrize("value", [Detection(1, 2), ModelOutputLike(left=1, right=2)], ids=lambda v: type(v).__name__)
def test_objects_come_back_as_records(value: Any) -> None:
    structure = through_json(structure_of(value))
    assert structure.kind == "record" and structure.type_name == f"{__name__}.{type(value).__name__}"
    assert structure.flatten(value) == [1, 2]
    record = structure.unflatten([1, 2])
    assert isinstance(record, Record)
    first, second = map(str, structure.keys)
    assert getattr(record, first) == record[first] == record[0] == 1
    assert getattr(record, second) == record[-1] == 2
    assert record[:] == (1, 2)
    assert structure.flatten(record) == [1, 2], "a record is read as the original type was"


@pytest.mark.parametrize("value", [Pair(1, 2), torch.return_types.topk((1, 2))], ids=lambda v: type(v).__name__)
def test_namedtuples_come_back_as_namedtuples(value: Any) -> None:
    structure = through_json(structure_of(value))
    assert structure.flatten(value) == [1, 2]
    rebuilt = structure.unflatten([1, 2])
    left, right = rebuilt
    assert (left, right) == rebuilt == (1, 2)
    assert type(rebuilt).__name__ == type(value).__name__ and rebuilt._fields == structure.keys
    assert structure.flatten(rebuilt) == [1, 2]
    assert structure.leaf_names() == list(structure.keys)


def test_a_field_called_as_a_method_of_dict() -> None:
    record = Record({"values": 1, "items": 2})
    assert record.values == 1 and record["items"] == 2 and record[0] == 1
    assert {**record} == dict(record) == {"values": 1, "items": 2}
    assert pytree.tree_leaves(record) == [1, 2]
    assert copy.deepcopy(record).values == copy.copy(record).values == 1


def test_absent_fields_of_a_dataclass_read_as_none() -> None:
    structure = through_json(structure_of(Detection(1)))
    record = structure.unflatten([5])
    assert record.scores is None and list(record) == ["boxes"]
    assert structure.flatten(Detection(7)) == [7]
    with pytest.raises(AttributeError, match="no field 'nothing'"):
        record.nothing  # noqa: B018
    with pytest.raises(PreconditionError, match="expected a record with keys 'boxes'"):
        structure.flatten(Detection(7, 8))


def test_a_record_is_a_pytree_and_copies() -> None:
    record = Record({"a": 1, "b": (2, 3)}, absent=("c",))
    doubled = pytree.tree_map(lambda leaf: leaf * 2, record)
    assert isinstance(doubled, Record) and doubled == {"a": 2, "b": (4, 6)} and doubled.c is None
    for twin in (copy.copy(record), copy.deepcopy(record)):
        assert twin == record and twin.c is None


def test_real_model_output() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    value = outputs.SequenceClassifierOutput(logits=1, hidden_states=(2, 3))
    structure = through_json(structure_of(value))
    assert structure.leaf_names() == ["logits", "hidden_states_0", "hidden_states_1"]
    assert structure.flatten(value) == [1, 2, 3]
    record = structure.unflatten([1, 2, 3])
    assert record.hidden_states == (2, 3) and record.loss is None and record[0] == 1


def test_deque_and_defaultdict_become_list_and_dict() -> None:
    assert structure_of(deque([1, 2])).unflatten([3, 4]) == [3, 4]
    assert structure_of(deque([1, 2])).flatten(deque([3, 4])) == [3, 4]
    assert structure_of(defaultdict(list, a=1)).unflatten([3]) == {"a": 3}


@pytest.mark.parametrize("constant", [None, True, 3, 2.5, "mean", float("inf"), float("-inf")])
def test_constants_are_kept_and_checked(constant: Any) -> None:
    structure = through_json(structure_of((1, constant, 2), {1: constant}))
    assert structure.leaf_count == 2
    assert structure.unflatten([7, 8]) == (7, constant, 8)
    assert structure.flatten((7, constant, 8)) == [7, 8]
    assert structure.leaf_names() == ["output_0", "output_2"]
    with pytest.raises(PreconditionError, match=r"which capture made part of the graph, got 'other'") as caught:
        structure.flatten((7, "other", 8), "output")
    assert caught.value.where == "output[1]"


def test_nan_constant_equals_itself() -> None:
    structure = through_json(structure_of([1.0], {0: float("nan")}))
    assert structure.flatten([float("nan")]) == []


def test_constants_that_json_cannot_keep_are_refused() -> None:
    with pytest.raises(PreconditionError, match=r"torch\.dtype, which an engine cannot keep"):
        structure_of((1, torch.float32), {1: torch.float32})


def test_types_that_tell_no_names_are_refused() -> None:
    with pytest.raises(PreconditionError, match="Opaque, which does not tell the names") as caught:
        structure_of({"a": Opaque(1)})
    assert "register_dataclass" in str(caught.value)
    with pytest.raises(PreconditionError, match=r"has keys \(1, 2\)"):
        structure_of({(1, 2): 3})


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (1, ["output"]),
        ((1, 2), ["output_0", "output_1"]),
        ({"logits": 1, "aux": (2, 3)}, ["logits", "aux_0", "aux_1"]),
        (((1,), {"k": 2}), ["output_0_0", "output_1_k"]),
        ({"a b": 1, "a_b": 2, "a.b": 3}, ["a_b", "a_b_1", "a_b_2"]),
        ({"a": {"b": 1}, "a_b": 2}, ["a_b", "a_b_1"]),
        ({"1x": 1, "class": 2, "": 3, 0: 4}, ["output_1x", "output_class", "output_", "output_0"]),
        ({"größe": 1}, ["größe"]),
    ],
    ids=repr,
)
def test_leaf_names(value: Any, names: list[str]) -> None:
    assert structure_of(value).leaf_names() == names
    assert all(name.isidentifier() for name in names)


def test_leaf_names_avoid_those_taken() -> None:
    assert structure_of({"x": 1, "y": 2}).leaf_names(taken=["x", "x_1"]) == ["x_2", "y"]
    assert structure_of(1).leaf_names("input") == ["input"]


@pytest.mark.parametrize(
    ("value", "message", "where"),
    [
        ((1,), "expected a tuple of 2, got tuple of 1", "out"),
        ({"a": 1}, "expected a tuple of 2, got dict of 1", "out"),
        ((1, 2), "expected a dict with keys 'a', 'b', got 2", "out[1]"),
        ((1, {"a": 1}), "got keys 'a'", "out[1]"),
        ((1, {"a": 1, "b": [2], "c": 3}), "got keys 'a', 'b', 'c'", "out[1]"),
        ((1, {"a": 1, "b": 2}), "expected a list of 1, got 2", "out[1]['b']"),
        ((1, {"a": (1,), "b": [2]}), "expected a tensor, got tuple of 1", "out[1]['a']"),
        ((None, {"a": 1, "b": [2]}), "expected a tensor, got None", "out[0]"),
    ],
)
def test_mismatches_name_the_place(value: Any, message: str, where: str) -> None:
    structure = structure_of((1, {"a": 2, "b": [3]}))
    with pytest.raises(PreconditionError) as caught:
        structure.flatten(value, "out")
    assert message in caught.value.problem
    assert caught.value.where == where


def test_lists_and_tuples_pass_for_each_other_and_dict_order_is_free() -> None:
    structure = structure_of(([1], {"a": 2, "b": 3}))
    assert structure.flatten([(1,), {"b": 3, "a": 2}]) == [1, 2, 3]


def test_unflatten_counts() -> None:
    with pytest.raises(PreconditionError, match="holds 2 tensors, 3 were given"):
        structure_of((1, 2)).unflatten([1, 2, 3])


@pytest.mark.parametrize(
    "told",
    [
        None,
        [],
        {},
        {"kind": "set", "children": []},
        {"kind": "tuple"},
        {"kind": "dict", "keys": ["a"], "children": []},
        {"kind": "dict", "children": [{"kind": "leaf"}]},
        {"kind": "dict", "keys": ["a", "a"], "children": [{"kind": "leaf"}, {"kind": "leaf"}]},
        {"kind": "dict", "keys": [["a"]], "children": [{"kind": "leaf"}]},
        {"kind": "constant"},
        {"kind": "constant", "value": [1]},
        {"kind": "constant", "float": "many"},
        {"kind": "list", "children": 3},
        {"kind": "namedtuple", "keys": ["not a name"], "children": [{"kind": "leaf"}]},
    ],
    ids=repr,
)
def test_damaged_json_is_refused(told: Any) -> None:
    with pytest.raises(PreconditionError, match="not the JSON of a structure"):
        Structure.from_json(told)


def test_deep_json_is_refused_rather_than_overflowing() -> None:
    told: dict[str, Any] = {"kind": "leaf"}
    for _ in range(5000):
        told = {"kind": "tuple", "children": [told]}
    with pytest.raises(PreconditionError, match="not the JSON of a structure"):
        Structure.from_json(told)
