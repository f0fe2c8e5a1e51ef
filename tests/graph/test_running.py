import pytest
import torch
from torch import nn

from fxcompress.capture import capture
from fxcompress.errors import VerificationError
from fxcompress.graph.running import max_relative_error
from fxcompress.passes import Numerics, Pass, PassContext, PassManager, PassResult, Rewrite


class Masked(nn.Module):
    """Scores with the lowest number there is at places that are masked."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.fc(x).masked_fill(mask, torch.finfo(torch.float32).min)


class WrongWeight(Pass):
    name = "wrong_weight"
    numerics = Numerics.EXACT

    def run(self, graph_module, context):
        layer = graph_module.get_submodule("fc")
        layer.weight = nn.Parameter(layer.weight.detach() * 1.5)
        return PassResult(graph_module, (Rewrite("fc", "wrong"),))


def test_marks_of_a_mask_do_not_hide_a_wrong_pass():
    args = (torch.randn(2, 4), torch.tensor([[True, False, False, False]]).expand(2, 4))
    graph_module = capture(Masked().eval(), args)
    with pytest.raises(VerificationError, match="wrong_weight"):
        PassManager([WrongWeight()]).run(graph_module, PassContext(example_inputs=list(args)))


@pytest.mark.parametrize(
    ("expected", "actual", "error"),
    [
        ([1.0, -4.0], [1.0, -3.0], 0.25),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [0.0, 1e-9], float("inf")),
        ([float("nan"), 2.0], [float("nan"), 1.0], 0.5),
        ([float("nan"), 2.0], [1.0, 2.0], float("inf")),
        ([float("inf"), 2.0], [float("-inf"), 2.0], float("inf")),
        ([-3e38, 2.0], [-3e38, 1.0], 0.5),
        ([1 + 1j, 4.0], [1 + 1j, 4 + 1j], 0.25),
    ],
)
def test_max_relative_error(expected, actual, error):
    assert max_relative_error([torch.tensor(expected)], [torch.tensor(actual)])[0] == error


def test_what_is_no_number_or_has_another_form_is_equal_or_infinitely_wrong():
    assert max_relative_error([1, torch.tensor([1])], [1, torch.tensor([1])]) == (0.0, 0)
    assert max_relative_error([1, torch.tensor([1])], [1, torch.tensor([2])]) == (float("inf"), 1)
    assert max_relative_error([torch.ones(2)], [torch.ones(3)])[0] == float("inf")
    assert max_relative_error([torch.ones(2)], [torch.ones(2, dtype=torch.float64)])[0] == float("inf")
    assert max_relative_error([1], [1, 2]) == (float("inf"), 1)


def test_conjugates_that_nobody_has_computed_yet():
    x = torch.randn(4, dtype=torch.complex64)
    assert max_relative_error([x.conj()], [x.conj()]) == (0.0, 0)
    assert max_relative_error([x.conj()], [x])[0] > 0.1
