"""The dead-channel rule, from outside: the user's model with everything zeroed that a removal took."""

import copy

import torch


def dead_channels(model, kept):
    """A copy of ``model`` with all indices zero that ``kept`` (name → dimension → indices) does not list."""
    model = copy.deepcopy(model)
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for name, dims in kept.items():
            for dim, indices in dims.items():
                gone = torch.ones(state[name].shape[dim], dtype=torch.bool)
                gone[indices] = False
                state[name].index_fill_(dim, gone.nonzero().flatten(), 0)
    return model
