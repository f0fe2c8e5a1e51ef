"""What the cost tests share: small models of one function, and torch's own counter to compare with."""

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fxcompress.analysis.cost import cost, node_costs
from fxcompress.capture import capture


class Call(nn.Module):
    """A model of one function and the layers or parameters that it reads."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args):
        return self.function(self, *args)


def counted(model, inputs, device):
    """MACs by torch's counter. On the meta device attention and recurrences are taken apart, so that it knows them."""
    model = model.to(device)
    inputs = [tensor.to(device) for tensor in inputs]
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*inputs)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


def check(model, *inputs, batches=(1, 3), device="meta"):
    """The graph costs what torch counts, at every batch size, and the table adds up."""
    graph_module = capture(model.eval(), inputs)
    costs = {batch: cost(graph_module, batch=batch) for batch in batches}
    for batch, found in costs.items():
        table = node_costs(graph_module, batch=batch)
        assert sum(row.macs for row in table) == found.macs
        assert sum(row.parameters for row in table) == found.parameters
        assert sum(row.bytes for row in table) == found.bytes
    assert costs[batches[0]].parameters == sum(p.numel() for p in model.parameters())
    resized = {b: [x[:1].expand(b, *x.shape[1:]) for x in inputs] for b in batches}
    for batch, found in costs.items():
        assert found.macs == counted(model, resized[batch], device)
    return graph_module
