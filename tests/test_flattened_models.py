# SPDX-License-Identifier: MIT
"""TrainStep and models that make [*] of their last layer's output [*, 1], as their targets are."""

from __future__ import annotations

import copy

import pytest
import torch
from device import DEVICE
from oracle import DTYPES, plain_run, plain_step
from torch import Tensor, nn

import fused_step

B, I, HIDDEN = 40, 6, 9
OF_LAYER = ("tiny", "one-pass")
HEAD = ("head",)
LOWER = ("optimizer",)


class Layer(nn.Module):
    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.last = nn.Linear(I, outputs)


class Squeezed(Layer):
    def forward(self, x):
        return self.last(x).squeeze(-1)


class SqueezedOne(Layer):
    def forward(self, x):
        return self.last(x).squeeze(1)


class Flattened(Layer):
    def forward(self, x):
        return self.last(x).flatten()


class FlattenedFirst(Layer):
    def forward(self, x):
        return self.last(x).flatten(0)


class Viewed(Layer):
    def forward(self, x):
        return self.last(x).view(-1)


class Reshaped(Layer):
    def forward(self, x):
        return self.last(x).reshape(-1)


class SqueezedByKeyword(Layer):
    def forward(self, x):
        return self.last(x).squeeze(dim=-1)


class SqueezedOneByKeyword(Layer):
    def forward(self, x):
        return self.last(x).squeeze(dim=1)


class Column(Layer):
    def forward(self, x):
        return self.last(x)[:, 0]


class LastColumn(Layer):
    def forward(self, x):
        y = self.last(x)
        return y[..., 0]


class AllSqueezed(Layer):
    def forward(self, x):
        return self.last(x).squeeze()


class NamedFirst(Layer):
    def forward(self, x):
        out = self.last(x)
        return out.squeeze(-1)


class NamedTwice(Layer):
    def forward(self, x):
        out = self.last(x)
        y_pred = out.squeeze(-1)
        return y_pred


class Renamed(Layer):
    def forward(self, x):
        x = self.last(x)
        x = x.view(-1)
        result = x
        return result


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(I, 1))

    def forward(self, x):
        return self.net(x).squeeze(-1)


OF_TWO_DIMENSIONS = {
    "squeeze(1)": SqueezedOne,
    "flatten()": Flattened,
    "flatten(0)": FlattenedFirst,
    "view(-1)": Viewed,
    "reshape(-1)": Reshaped,
    "renamed": Renamed,
    "squeeze(dim=1)": SqueezedOneByKeyword,
    "[:, 0]": Column,
    "nn.Flatten(0)": lambda: nn.Sequential(nn.Linear(I, 1), nn.Flatten(0)),
    "nn.Flatten(0, 1)": lambda: nn.Sequential(nn.Linear(I, 1), nn.Flatten(0, 1)),
}
ONE_LAYER = OF_TWO_DIMENSIONS | {
    "squeeze(-1)": Squeezed,
    "squeeze(dim=-1)": SqueezedByKeyword,
    "[..., 0]": LastColumn,
    "squeeze()": AllSqueezed,
    "named": NamedFirst,
    "named twice": NamedTwice,
    "around": Around,
    "within": lambda: nn.Sequential(Squeezed()),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(I, HIDDEN), nn.Linear(HIDDEN, 1)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        return self.last(hidden).squeeze(-1)


class OfNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(I)
        self.net = nn.Sequential(nn.Linear(I, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))

    def forward(self, x):
        out = self.net(self.norm(x))
        out = out.flatten()
        return out


NETS = {
    "own": Net,
    "of a Sequential": OfNet,
    "Sequential": lambda: nn.Sequential(
        nn.Linear(I, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1), nn.Flatten(0, 1)
    ),
    "frozen body": lambda: nn.Sequential(nn.Flatten(), nn.Linear(I, 1), nn.Flatten(0)),
}

# --- not flattened as it is known ----------------------------------------------------------------


class Twice(Layer):
    def forward(self, x):
        return self.last(x).squeeze(-1).flatten()


class TwiceByModules(Around):
    def __init__(self) -> None:
        super().__init__()
        self.net.append(nn.Flatten(0))


class Other(Layer):
    def forward(self, x):
        return self.last(x).view(x.shape[0])


class Transposed(Layer):
    def forward(self, x):
        return self.last(x).mT.squeeze(0)


class Kept(Layer):
    def forward(self, x):
        out = self.last(x)
        self.out = [out]
        return out.squeeze(-1)


class Seen(Layer):
    def forward(self, x):
        out = self.last(x)
        self.see = lambda: out
        return out.squeeze(-1)


class OfVariable(Layer):
    def forward(self, x):
        column = 0
        return self.last(x)[:, column]


class OwnFlatten(nn.Flatten):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


OTHERS = {
    "twice": Twice,
    "twice, by modules": TwiceByModules,
    "other sizes": Other,
    "transposed": Transposed,
    "kept": Kept,
    "seen": Seen,
    "of a variable": OfVariable,
    "subclass": lambda: nn.Sequential(nn.Linear(I, 1), OwnFlatten(0)),
}


def batch(*rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, t = torch.randn(*rows, I, generator=generator), torch.randn(*rows, generator=generator)
    return x.to(DEVICE, dtype), t.to(DEVICE, dtype)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def made(make, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(5)
    return make().to(DEVICE, dtype)


def assert_trains_like_plain(model: nn.Module, plans: tuple[str, ...], x, t) -> None:
    other = copy.deepcopy(model)
    ours, theirs = sgd(model), sgd(other)
    step = fused_step.TrainStep(model, nn.MSELoss(), ours)
    eps = torch.finfo(x.dtype).eps
    for _ in range(3):
        loss = step(x, t)
        assert step.plan in plans, step.explain(x, t)
        expected = plain_step(other, nn.MSELoss(), theirs, x, t)
        torch.testing.assert_close(loss, expected, rtol=B * eps, atol=8 * eps)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=B * eps, atol=8 * eps)


@pytest.mark.parametrize("make", ONE_LAYER.values(), ids=ONE_LAYER)
def test_flattened_layer_has_the_bits_of_the_layer(make):
    model = made(make)
    weight, bias = model.parameters()
    layer = nn.Linear(I, 1).to(DEVICE)
    layer.load_state_dict({"weight": weight, "bias": bias})
    x, t = batch(B)
    step = fused_step.TrainStep(model, nn.MSELoss(), sgd(model))
    step_of_layer = fused_step.TrainStep(layer, nn.MSELoss(), sgd(layer))
    for _ in range(3):
        assert torch.equal(step(x, t), step_of_layer(x, t[:, None]))
        assert step.plan in OF_LAYER
    losses = step.run(x, t, epochs=2, batch_size=12)
    assert torch.equal(losses, step_of_layer.run(x, t[:, None], epochs=2, batch_size=12))
    assert torch.equal(weight, layer.weight)
    assert torch.equal(bias, layer.bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [Squeezed, Flattened, ONE_LAYER["nn.Flatten(0, 1)"]])
def test_flattened_layer_trains_like_the_plain_loop(make, dtype):
    assert_trains_like_plain(made(make, dtype), OF_LAYER, *batch(B, dtype=dtype))


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_flattened_network_has_the_plan_head(make):
    assert_trains_like_plain(made(make), HEAD, *batch(B))


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_what_is_not_known_is_done_as_it_is(make):
    assert_trains_like_plain(made(make), LOWER, *batch(B))


def test_leading_dimensions_are_rows_where_only_the_last_one_goes():
    assert_trains_like_plain(made(Squeezed), OF_LAYER, *batch(4, 10))


@pytest.mark.parametrize("make", OF_TWO_DIMENSIONS.values(), ids=OF_TWO_DIMENSIONS)
def test_more_than_two_dimensions_are_not_fused_where_all_become_one(make):
    model = made(make)
    x, _ = batch(4, 10)
    t = torch.zeros_like(model(x).detach())
    assert_trains_like_plain(model, LOWER, x, t)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("make", OF_TWO_DIMENSIONS.values(), ids=OF_TWO_DIMENSIONS)
def test_target_of_the_rows_shape_is_not_taken_where_all_dimensions_become_one(make):
    model = made(make)
    other = copy.deepcopy(model)
    x, t = batch(4, 10)

    def outcome(step):
        try:
            return step(x, t).item()
        except RuntimeError as error:
            return str(error)

    ours = outcome(fused_step.TrainStep(model, nn.MSELoss(), sgd(model)))
    theirs = sgd(other)
    assert ours == outcome(lambda x, t: plain_step(other, nn.MSELoss(), theirs, x, t))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [(1,), (1, 5), (5, 1)])
def test_squeeze_of_all_is_not_fused_where_rows_are_one(rows):
    x, t = batch(*rows)
    assert_trains_like_plain(made(AllSqueezed), LOWER, x, t.squeeze())


def test_run_does_not_squeeze_a_last_batch_of_one_row():
    model = made(AllSqueezed)
    other = copy.deepcopy(model)
    x, t = batch(9)
    step = fused_step.TrainStep(model, nn.MSELoss(), sgd(model))
    with pytest.warns(UserWarning, match="target size"):
        losses = step.run(x, t, batch_size=4)
    with pytest.warns(UserWarning, match="target size"):
        expected = plain_run(other, nn.MSELoss(), sgd(other), x, t, batch_size=4)
    torch.testing.assert_close(losses, torch.as_tensor(expected).to(losses))


@pytest.mark.parametrize("make", [Squeezed, Net], ids=["layer", "network"])
def test_target_of_the_layers_shape_gives_the_warning_of_the_plain_loop(make):
    model = made(make)
    other = copy.deepcopy(model)
    x, t = batch(B)
    step = fused_step.TrainStep(model, nn.MSELoss(), sgd(model))
    with pytest.warns(UserWarning, match="target size"):
        loss = step(x, t[:, None])
    assert step.plan in LOWER
    with pytest.warns(UserWarning, match="target size"):
        expected = plain_step(other, nn.MSELoss(), sgd(other), x, t[:, None])
    torch.testing.assert_close(loss, expected)
    if make is Squeezed:
        assert "target is not [*], as the model makes it" in step.explain(x, t[:, None])


def test_more_outputs_are_not_squeezed():
    model = made(lambda: Squeezed(3))
    x, _ = batch(B)
    assert_trains_like_plain(model, LOWER, x, x[:, :3].clone())


@pytest.mark.parametrize("make", [Column, LastColumn])
def test_first_of_more_outputs_is_no_flattening(make):
    assert_trains_like_plain(made(lambda: make(3)), LOWER, *batch(B))


class Replacing(nn.Module):
    """Calls another module than the one that was read, which would have flattened by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Squeezed()
        self.other = nn.Sequential(nn.Linear(I, 1), nn.Flatten(0))

    def swapped(self, x):
        self.inner, self.other = self.other, self.inner
        return x

    def forward(self, x):
        x = self.swapped(x)
        return self.inner(x)


class ReplacingWithin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(I, 1))
        self.other = nn.Sequential(nn.Linear(I, 1), nn.Identity())

    swapped = Replacing.swapped

    def forward(self, x):
        x = self.swapped(x)
        return self.inner(x).squeeze(-1)


@pytest.mark.parametrize("kind", [Replacing, ReplacingWithin])
def test_module_that_forward_replaces_is_flattened_as_python_does(kind):
    assert_trains_like_plain(made(kind), (*LOWER, *HEAD), *batch(B))


@pytest.mark.parametrize("change", ["start_dim", "hook"])
def test_flatten_that_changes_is_seen(change):
    model = made(ONE_LAYER["nn.Flatten(0)"])
    other = copy.deepcopy(model)
    x, t = batch(B)
    step = fused_step.TrainStep(model, nn.MSELoss(), sgd(model))
    theirs = sgd(other)
    for number in range(4):
        if number == 3:
            for m in (model, other):
                if change == "start_dim":
                    m[1].start_dim = 1
                    t = torch.ones_like(model(x).detach())
                else:
                    m[1].register_forward_hook(lambda module, args, output: output + 1)
        loss = step(x, t)
        torch.testing.assert_close(loss, plain_step(other, nn.MSELoss(), theirs, x, t))
    assert step.plan in LOWER


HUGE = [(0, 10**30), (0, -(10**30)), (10**30, -1)]


@pytest.mark.parametrize("dims", HUGE, ids=str)
def test_flatten_of_a_dimension_beyond_64_bits_fails_as_in_the_plain_loop(dims):
    model = made(lambda: nn.Sequential(nn.Linear(I, 1), nn.Flatten(*dims)))
    step = fused_step.TrainStep(model, nn.MSELoss(), sgd(model))
    x, t = batch(B)
    for _ in range(3):
        with pytest.raises(Exception) as expected:  # noqa: PT011  # whatever it is
            model(x)
        with pytest.raises(type(expected.value), match="unpacking"):
            step(x, t)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(I, 1), nn.Flatten(0)),
        Squeezed,
        Net,
    ],
    ids=["frozen body", "layer", "network"],
)
def test_target_that_needs_a_gradient_gets_it(make):
    model = made(make)
    other = copy.deepcopy(model)
    x, t = batch(B)
    ours, theirs = t.clone().requires_grad_(), t.clone().requires_grad_()
    step = fused_step.TrainStep(model, nn.MSELoss(), sgd(model))
    loss = step(x, ours)
    torch.testing.assert_close(loss, plain_step(other, nn.MSELoss(), sgd(other), x, theirs))
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("make", [Squeezed, Net], ids=["layer", "network"])
def test_replaced_method_of_tensors_is_called(monkeypatch, make):
    model = made(make)
    other = copy.deepcopy(model)
    ours, theirs = sgd(model), sgd(other)
    x, t = batch(B)
    step = fused_step.TrainStep(model, nn.MSELoss(), ours)
    for number in range(5):
        if number == 3:
            monkeypatch.setattr(Tensor, "squeeze", lambda a, dim: a.flatten() + 1)
        loss = step(x, t)
        torch.testing.assert_close(loss, plain_step(other, nn.MSELoss(), theirs, x, t))
    assert step.plan in LOWER
    assert "a method of torch.Tensor has been replaced" in step.explain(x, t)
