# SPDX-License-Identifier: MIT
"""Linear regression on real data, by the plain PyTorch loop and by fused_step.

Run it with ``make demo``. First one step on three rows, to see that it is the same step. Then a
whole training on scikit-learn's diabetes data: 442 patients, 10 measurements each, and how far the
disease progressed within a year. Every figure it prints is measured in that run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LinearRegression
from torch import Tensor, nn

import fused_step

BATCH_SIZE = 32
LEARNING_RATE = 0.002
MOMENTUM = 0.9

NOTES = """\
Loss difference: the largest over all steps, relative to the plain loop's. R²: on the validation
rows; the closed form is scikit-learn's LinearRegression. Times: medians over the rounds; those of
run() hold shuffling and batching as well.
"""

Train = Callable[[int], tuple[Tensor, float]]  # epochs -> losses [steps], seconds


# --- one step, both ways ------------------------------------------------------------------------


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, t: Tensor) -> Tensor:
    """One training step as every PyTorch tutorial writes it; returns the loss before it."""
    output = model(x)
    loss = F.mse_loss(output, t)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def new_model(inputs: int) -> tuple[nn.Linear, torch.optim.Optimizer]:
    """A linear model with the same initial weights at each call, and its optimizer."""
    torch.manual_seed(0)
    model = nn.Linear(inputs, 1)
    return model, torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)


def show_one_step(console: Console) -> None:
    """Three rows, one step: the loss before and after it, plain and fused side by side."""
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    t = torch.tensor([[3.0], [7.0], [11.0]])

    torch.manual_seed(0)
    plain_model = nn.Linear(2, 1)
    plain_optimizer = torch.optim.SGD(plain_model.parameters(), lr=0.01)
    torch.manual_seed(0)
    fused_model = nn.Linear(2, 1)
    fused_optimizer = torch.optim.SGD(fused_model.parameters(), lr=0.01)
    step = fused_step.TrainStep(fused_model, F.mse_loss, fused_optimizer)

    before = plain_step(plain_model, plain_optimizer, x, t), step(x, t)
    with torch.no_grad():
        after = F.mse_loss(plain_model(x), t), F.mse_loss(fused_model(x), t)

    console.print(f"{'':22}{'plain':>12}{'fused':>12}", style="bold")
    console.print(f"Loss before backward: {before[0]:12.6f}{before[1]:12.6f}")
    console.print(f"Loss after one step:  {after[0]:12.6f}{after[1]:12.6f}")


# --- the data -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Rows to learn from and rows to judge by, standardised with the former's mean and spread."""

    x: Tensor  # [B, 10] float32
    t: Tensor  # [B, 1]
    x_validation: Tensor  # [V, 10]
    t_validation: Tensor  # [V, 1]


def load_data() -> Data:
    """scikit-learn's diabetes, one row in five held back for validation."""
    measurements, progression = load_diabetes(return_X_y=True, scaled=False)
    x = torch.from_numpy(measurements)
    t = torch.from_numpy(progression).unsqueeze(1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    validation, training = order.split([len(x) // 5, len(x) - len(x) // 5])

    def standardised(values: Tensor) -> tuple[Tensor, Tensor]:
        mean, spread = values[training].mean(dim=0), values[training].std(dim=0)
        values = ((values - mean) / spread).float()
        return values[training], values[validation]

    (x_training, x_validation), (t_training, t_validation) = standardised(x), standardised(t)
    return Data(x_training, t_training, x_validation, t_validation)


def r2(output: Tensor, target: Tensor) -> float:
    """Share of the target's variance that the output explains."""
    unexplained = (target - output).square().sum()
    return float(1 - unexplained / (target - target.mean()).square().sum())


# --- three ways to train ------------------------------------------------------------------------


@dataclass
class Way:
    """One way to train: what it is called, its model, and what was measured of it."""

    name: str
    model: nn.Module
    train: Train
    losses: list[Tensor] = field(default_factory=list)  # one tensor [steps] a round
    microseconds: list[float] = field(default_factory=list)  # per step, one number a round


def step_by_step(step: Callable[[Tensor, Tensor], Tensor], data: Data) -> Train:
    """Trains by calling `step` for each batch. Only the steps are timed, not the batches."""
    generator = torch.Generator().manual_seed(1)

    def train(epochs: int) -> tuple[Tensor, float]:
        batches = []
        for _ in range(epochs):
            order = torch.randperm(len(data.x), generator=generator)
            batches += [(data.x[rows], data.t[rows]) for rows in order.split(BATCH_SIZE)]
        start = time.perf_counter()
        losses = [step(x, t) for x, t in batches]
        return torch.stack(losses), time.perf_counter() - start

    return train


def many_at_once(step: fused_step.TrainStep, data: Data) -> Train:
    """Trains by one call for all steps. Timed with all it does: shuffling and batching too."""
    generator = torch.Generator().manual_seed(1)

    def train(epochs: int) -> tuple[Tensor, float]:
        start = time.perf_counter()
        losses = step.run(
            data.x,
            data.t,
            epochs=epochs,
            batch_size=BATCH_SIZE,
            shuffle=True,
            generator=generator,
        )
        return losses, time.perf_counter() - start

    return train


def three_ways(data: Data) -> list[Way]:
    """The plain loop, fused_step step by step, and fused_step's run()."""
    inputs = data.x.shape[1]
    ways = []

    model, optimizer = new_model(inputs)
    plain = step_by_step(lambda x, t, m=model, o=optimizer: plain_step(m, o, x, t), data)
    ways.append(Way("plain PyTorch loop", model, plain))

    model, optimizer = new_model(inputs)
    step = fused_step.TrainStep(model, F.mse_loss, optimizer)
    ways.append(Way("TrainStep, step()", model, step_by_step(step, data)))

    model, optimizer = new_model(inputs)
    step = fused_step.TrainStep(model, F.mse_loss, optimizer)
    ways.append(Way("TrainStep, run()", model, many_at_once(step, data)))
    return ways


def train(ways: list[Way], rounds: int, epochs: int, console: Console) -> None:
    """Trains all ways, a round each in turn, so that a busy moment of the machine hits all."""
    with Progress(console=console) as progress:
        task = progress.add_task("training", total=rounds)
        for _ in range(rounds):
            for way in ways:
                losses, seconds = way.train(epochs)
                way.losses.append(losses)
                way.microseconds.append(1e6 * seconds / len(losses))
            progress.advance(task)


# --- the results --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """A row of the table."""

    name: str
    losses: Tensor  # [steps]
    largest_difference: float  # of a loss, relative to the plain loop's
    r2: float  # on the validation rows
    microseconds: float  # per step, median over rounds
    ratio: float  # the plain loop's time over this one's, median over rounds


def evaluate(ways: list[Way], data: Data) -> list[Result]:
    """Compares each way with the first."""
    plain = ways[0]
    plain_losses = torch.cat(plain.losses)
    results = []
    for way in ways:
        losses = torch.cat(way.losses)
        with torch.no_grad():
            output = way.model(data.x_validation)
        ratios = [a / b for a, b in zip(plain.microseconds, way.microseconds, strict=True)]
        results.append(
            Result(
                name=way.name,
                losses=losses,
                largest_difference=float(((losses - plain_losses) / plain_losses).abs().max()),
                r2=r2(output, data.t_validation),
                microseconds=statistics.median(way.microseconds),
                ratio=statistics.median(ratios),
            )
        )
    return results


@dataclass(frozen=True)
class ClosedForm:
    """What least squares gives without any steps."""

    loss: float  # on the training rows
    r2: float  # on the validation rows


def solve(data: Data) -> ClosedForm:
    """scikit-learn's LinearRegression on the same rows."""
    solution = LinearRegression().fit(data.x.numpy(), data.t.numpy())
    output = torch.from_numpy(solution.predict(data.x.numpy()))
    r2_validation = solution.score(data.x_validation.numpy(), data.t_validation.numpy())
    return ClosedForm(float(F.mse_loss(output, data.t)), float(r2_validation))


def table(results: list[Result], closed_form: ClosedForm) -> Table:
    """All results, and the closed form's R² below them."""
    table = Table(title="Linear regression on the diabetes data")
    table.add_column("")
    for heading in ("loss difference", "R²", "µs per step", "ratio"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            result.name,
            "" if result is results[0] else f"{result.largest_difference:.1e}",
            f"{result.r2:.4f}",
            f"{result.microseconds:.2f}",
            f"{result.ratio:.1f}×",
        )
    table.add_section()
    table.add_row("closed form", "", f"{closed_form.r2:.4f}", "", "")
    return table


def epoch_losses(losses: Tensor, rows: int) -> Tensor:
    """[epochs] mean loss over all `rows` of an epoch; its last batch is short and weighs less."""
    batches = torch.arange(rows).split(BATCH_SIZE)
    weights = torch.tensor([len(batch) / rows for batch in batches])
    return losses.reshape(-1, len(batches)) @ weights


def plot(results: list[Result], closed_form: ClosedForm, rows: int, path: Path) -> None:
    """Draws the loss of each epoch and the time per step into a PNG at `path`."""
    import matplotlib

    matplotlib.use("Agg")  # draws without a screen
    from matplotlib import pyplot as plt

    figure, (curves, bars) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    styles = [("tab:gray", "-", 5), ("tab:blue", "-", 2), ("tab:orange", ":", 2)]
    for result, (color, line, width) in zip(results, styles, strict=True):
        losses = epoch_losses(result.losses, rows)
        epochs = range(1, len(losses) + 1)
        curves.plot(epochs, losses, label=result.name, color=color, ls=line, lw=width)
    curves.axhline(closed_form.loss, label="closed form", color="black", linewidth=0.8)
    curves.set(title="Training loss", ylabel="mean squared error")
    curves.set(xlabel="epoch, logarithmic", xscale="log")
    curves.legend()

    drawn = bars.barh(
        [result.name for result in results],
        [result.microseconds for result in results],
        color=[color for color, _, _ in styles],
    )
    labels = [f" {result.microseconds:.2f} µs  ({result.ratio:.1f}×)" for result in results]
    bars.bar_label(drawn, labels)
    bars.set(title="Time per step", xlabel="µs, logarithmic", xscale="log")
    bars.set_xlim(0.1, 20 * results[0].microseconds)  # room for the labels
    bars.invert_yaxis()
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Runs the demo; returns what the table shows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo-output/diabetes.png"))
    parser.add_argument("--rounds", type=int, default=60, help="how often to time each way")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of a round")
    options = parser.parse_args(arguments)
    console = Console()

    console.print("\n[bold]One step[/bold]: Linear(2, 1), three rows, learning rate 0.01\n")
    show_one_step(console)

    data = load_data()
    console.print(
        f"\n[bold]A whole training[/bold]: {len(data.x)} rows to learn from, "
        f"{len(data.x_validation)} to judge by, {data.x.shape[1]} inputs, batches of {BATCH_SIZE}, "
        f"{options.rounds * options.epochs} epochs, {torch.get_num_threads()} threads\n",
        soft_wrap=True,
    )
    ways = three_ways(data)
    train(ways, options.rounds, options.epochs, console)
    results, closed_form = evaluate(ways, data), solve(data)

    console.print(table(results, closed_form))
    console.print(NOTES, soft_wrap=True)
    plot(results, closed_form, len(data.x), options.output)
    console.print(f"Loss curves and times: {options.output}", soft_wrap=True)
    return results


if __name__ == "__main__":
    main()
