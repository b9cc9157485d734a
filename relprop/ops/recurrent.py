"""Recurrent layers, as the linear maps, gates and activations that they are made of, one position after the other.

References: Arras et al. 2017 (Explaining recurrent neural network predictions in sentiment analysis): the gate, a
sigmoid, is the factor that lets through, and what it lets through is the signal.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UnruledOp
from .call import Call
from .mul import GATE
from .split import Split

State = tuple[Tensor, ...]
Step = Callable[[Tensor, Tensor, State], State]


def lstm(call: Call | Split, input: Tensor, hx: Sequence[Tensor], params: Sequence[Tensor], *options: Any) -> State:
    """`torch.lstm`: c' = f c + i g and h' = o tanh c', with gates i, f and o; as separate calls."""
    return _run(call, _lstm_step, input, hx, params, *options)


def gru(call: Call | Split, input: Tensor, hx: Tensor, params: Sequence[Tensor], *options: Any) -> State:
    """`torch.gru`: h' = (1 - z) n + z h with n = tanh(x W + r (h U)) and gates r and z; as separate calls."""
    return _run(call, _gru_step, input, (hx,), params, *options)


def rnn(call: Call | Split, input: Tensor, hx: Tensor, params: Sequence[Tensor], *options: Any) -> State:
    """`torch.rnn_tanh`, `torch.rnn_relu`: h' = f(x W + h U), as separate calls."""
    act = torch.relu if "relu" in call.func.__name__ else torch.tanh
    return _run(call, lambda x, h, state: (act(x + h),), input, (hx,), params, *options)


def _lstm_step(x: Tensor, h: Tensor, state: State) -> State:
    i, f, g, o = (x + h).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * _signal(torch.tanh(g))
    return torch.sigmoid(o) * _signal(torch.tanh(c)), c


def _gru_step(x: Tensor, h: Tensor, state: State) -> State:
    (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, -1), h.chunk(3, -1)
    z = x_z + h_z
    n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return (torch.sigmoid(-z) * _signal(n) + torch.sigmoid(z) * state[0],)  # 1 - z is a gate too


def _signal(x: Tensor) -> Tensor:
    """An activation that is let through, and no gate."""
    setattr(x, GATE, False)
    return x


def _run(call: Call | Split, step: Step, input: Tensor, hx: Sequence[Tensor], params: Sequence[Tensor],
         biased: bool, layers: int, dropout: float, train: bool, both: bool, batch_first: bool) -> State:
    """Every layer in each direction: the output, and the last states of each, as torch gives them."""
    if not hx[0].is_floating_point():  # the lengths of packed sequences stand in its place
        raise UnruledOp(f"no rule for torch.{call.func.__name__} of packed sequences in module "
                        f"{call.path or '(the model itself)'!r}; give the model a padded batch")

    def unrolled() -> State:
        directions, states = 1 + both, []
        each = len(params) // (layers * directions)
        x = input if batch_first else input.transpose(0, 1)  # (B, T, D): the rows of the batch first
        for layer in range(layers):
            outputs = []
            for way in range(directions):
                place = layer * directions + way
                weights = params[place * each:(place + 1) * each]
                given = tuple(state[place] for state in hx)
                output, last = _layer(step, x, given, weights, biased, back=way == 1)
                outputs.append(output)
                states.append(last)
            x = torch.cat(outputs, -1) if both else outputs[0]
            if dropout and train and layer < layers - 1:
                x = F.dropout(x, dropout)
        return x if batch_first else x.transpose(0, 1), *(torch.stack(ones) for ones in zip(*states, strict=True))

    return call.retrace(unrolled)


def _layer(step: Step, x: Tensor, state: State, weights: Sequence[Tensor], biased: bool, *,
           back: bool) -> tuple[Tensor, State]:
    """One layer in one direction, over x (B, T, D): what it gives at each position, and its last states."""
    W, U, *rest = weights
    b, d = rest[:2] if biased else (None, None)
    project = rest[2 * biased] if len(rest) > 2 * biased else None
    outputs, inputs = [], F.linear(x, W, b).unbind(1)
    for x_t in inputs[::-1] if back else inputs:
        starts = not outputs and d is not None and not state[0].any()  # then a bias is all that comes of the state
        h, *others = step(x_t, d if starts else F.linear(state[0], U, d), state)
        state = (h if project is None else F.linear(h, project), *others)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if back else outputs, 1), state
