"""Functions that write in place, every way that models do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

T = torch.Tensor


class Of(nn.Module):
    """A model of one function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: T) -> Any:
        return self.function(x)


def fresh(x: T) -> T:
    return x * 1.0


def relu_(x: T) -> T:
    return F.relu_(fresh(x))


def chain(x: T) -> T:
    y = fresh(x)
    y += x
    y *= 2
    y.sub_(1).clamp_(min=-1).div_(3)
    return y


def written_then_read(x: T) -> tuple[T, T]:
    y = fresh(x)
    z = y
    y.add_(1)
    return y, z * 2


def old_value_kept(x: T) -> T:
    y = fresh(x)
    before = y + 0.5
    y.mul_(3)
    return before + y


def slice_write(x: T) -> T:
    y = torch.zeros_like(x)
    y[:, 1:3] = 1.0
    y[:, :, 0] = x[:, :, 1]
    y[:, -1] += 5
    return y + x


def swin_mask(x: T) -> T:
    mask = x.new_zeros((4, 4))
    count = 0
    for rows in (slice(0, -2), slice(-2, -1), slice(-1, None)):
        for columns in (slice(0, -2), slice(-2, -1), slice(-1, None)):
            mask[rows, columns] = count
            count += 1
    mask = mask.view(2, 2, 2, 2).permute(0, 2, 1, 3).reshape(4, 4)
    difference = mask.unsqueeze(1) - mask.unsqueeze(2)
    difference = difference.masked_fill(difference != 0, -100.0).masked_fill(difference == 0, 0.0)
    return x.unsqueeze(1) + difference


def through_view(x: T) -> T:
    y = fresh(x)
    y.view(y.shape[0], 16).mul_(2)
    return y


def through_transpose(x: T) -> T:
    y = fresh(x)
    y.transpose(1, 2)[:, 0].add_(1)
    y.permute(2, 0, 1)[1].zero_()
    y.movedim(0, 2)[2].add_(x.movedim(0, 2)[2])
    return y


def through_select(x: T) -> T:
    y = fresh(x)
    y.select(1, 2).fill_(7)
    y[:, 0].copy_(x[:, 1])
    return y


def through_pieces(x: T) -> T:
    y = fresh(x)
    left, right = y.chunk(2, dim=1)
    left.add_(1)
    right *= 2
    first, *_ = y.split([1, 3], dim=2)
    first.zero_()
    y.unbind(1)[3].fill_(9)
    return y


def through_reshape(x: T) -> T:
    y = fresh(x)
    y.reshape(-1, 4)[1:].add_(1)
    y.flatten(1)[:, ::2].mul_(3)
    y.unsqueeze(1).squeeze(1).add_(1)
    return y


def reshape_that_copies(x: T) -> T:
    y = fresh(x)
    y.transpose(1, 2).reshape(-1).add_(100)  # of a copy: y stays
    return y


def through_diagonal(x: T) -> T:
    y = fresh(x)
    y.diagonal(dim1=1, dim2=2).fill_(3)
    return y


def other_view_sees_it(x: T) -> tuple[T, T]:
    y = fresh(x)
    rows, columns = y[:, 0], y[:, :, 0]
    rows.add_(1)
    return columns * 2, y


def view_of_view(x: T) -> T:
    y = fresh(x)
    y[:, 1:][:, :2].transpose(1, 2)[..., 0].add_(4)
    return y


def keeps_dtype(x: T) -> T:
    y = (x > 0).to(torch.int32)
    y += 2
    z = x.half()
    z.add_(x)
    z[:, 0] = x[:, 0]
    return y + z


def bool_write(x: T) -> T:
    mask = x > 0
    mask &= x < 0.5
    mask[:, 0] = True
    return x.masked_fill(mask, 0)


def index_put(x: T) -> T:
    y = fresh(x)
    y[x > 0] = 0
    y[:, torch.tensor([0, 2])] = 1.5
    return y


def masked_fill_(x: T) -> T:
    return fresh(x).masked_fill_(x > 0, 2).tril_()


def clone_first(x: T) -> tuple[T, T]:
    y = x.clone()
    y.add_(1)
    return x, y


def contiguous_alias(x: T) -> T:
    y = fresh(x)
    y.contiguous().add_(1)  # y is contiguous: this is y
    return y


def same_dtype_alias(x: T) -> T:
    y = fresh(x)
    y.to(torch.float32).add_(1)
    y.detach().mul_(2)
    return y


def out_argument(x: T) -> T:
    y = torch.empty_like(x)
    torch.add(x, 1, out=y)
    return y


def constant_written(x: T) -> T:
    table = torch.tensor([1.0, 2, 3, 4])
    table[0] = 5
    table.mul_(2)
    return x * table


def double_use(x: T) -> T:
    y = fresh(x)
    return y.add_(y).mul_(y)


def inplace_activations(x: T) -> T:
    y = fresh(x)
    for activation in (F.relu6, F.silu, F.hardswish, F.leaky_relu, F.elu, F.hardtanh, F.hardsigmoid, F.mish, F.celu):
        y = activation(y, inplace=True)
    return F.dropout(y, 0.5, training=False, inplace=True)


WRITES = [
    *(relu_, chain, written_then_read, old_value_kept, slice_write, swin_mask, through_view, through_transpose),
    *(through_select, through_pieces, through_reshape, reshape_that_copies, through_diagonal, other_view_sees_it),
    *(view_of_view, keeps_dtype, bool_write, masked_fill_, clone_first, contiguous_alias, same_dtype_alias),
    *(double_use, inplace_activations, index_put, out_argument, constant_written),
]
