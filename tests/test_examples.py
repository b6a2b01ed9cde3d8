# SPDX-License-Identifier: MIT
"""The examples run, and show what they say they show."""

from __future__ import annotations

import diabetes
import mlp_head
import plain_loop
import pytest
import torch


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """Results of a short training, and the picture it drew."""
    picture = tmp_path_factory.mktemp("demo") / "not" / "yet" / "diabetes.png"
    return diabetes.main(["--rounds", "4", "--epochs", "2", "--output", str(picture)]), picture


def test_all_ways_train_alike(quick_run):
    results, _ = quick_run
    plain = results[0]
    assert len(plain.losses) == 4 * 2 * 12  # 354 rows in batches of 32
    for result in results[1:]:
        # Every loss is a mean of 32 squares of sums of 11 terms; a step's rounding error fades
        # with the momentum's memory of about 10 steps.
        rounding = 64 * 10 * torch.finfo(torch.float32).eps
        assert result.largest_difference <= rounding
        assert abs(result.r2 - plain.r2) <= rounding


def test_training_nears_the_closed_form(quick_run):
    results, _ = quick_run
    closed_form = diabetes.solve(diabetes.load_data())
    assert closed_form.r2 - 0.1 < results[0].r2 < closed_form.r2 + 0.1


def test_times_and_ratios_are_of_that_run(quick_run):
    results, _ = quick_run
    assert results[0].ratio == 1
    assert all(result.microseconds > 0 and result.ratio > 0 for result in results)


def test_picture_is_a_png(quick_run):
    _, picture = quick_run
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")


def test_output_names_the_losses_and_the_picture(tmp_path, capsys):
    picture = tmp_path / "diabetes.png"
    diabetes.main(["--rounds", "1", "--epochs", "1", "--output", str(picture)])
    output = capsys.readouterr().out
    before, after = (
        [float(word) for word in line.split(":")[1].split()]
        for line in output.splitlines()
        if line.startswith(("Loss before backward:", "Loss after one step:"))
    )
    assert before[0] > after[0]
    assert before[0] == pytest.approx(before[1], rel=1e-6)
    assert after[0] == pytest.approx(after[1], rel=1e-6)
    assert str(picture) in output


def test_validation_rows_are_not_learnt_from():
    data = diabetes.load_data()
    assert (len(data.x), len(data.x_validation)) == (354, 88)
    learnt = {tuple(row) for row in data.x.tolist()}
    assert not learnt & {tuple(row) for row in data.x_validation.tolist()}
    # Standardised by the training rows alone: exact there, near it elsewhere.
    assert data.x.mean(dim=0).abs().max() < 1e-6
    assert data.x_validation.mean(dim=0).abs().max() > 1e-3


def test_fused_head_trains_as_the_plain_network(capsys):
    plain, *fused = mlp_head.main(["--epochs", "5"])
    assert len(fused) == 2
    assert len(plain.losses) == 5 * 6  # 354 rows in batches of 64
    assert plain.losses[-6:].mean() < plain.losses[:6].mean()
    # A loss is a mean of 64 squares of sums of 33 terms, whose rounding 30 steps carry on.
    rounding = 64 * 30 * torch.finfo(torch.float32).eps
    for result in fused:
        assert ((result.losses - plain.losses) / plain.losses).abs().max() <= rounding
        assert abs(result.r2 - plain.r2) <= rounding
    assert "the plan of TrainStep: head" in capsys.readouterr().out


def test_plain_loop_has_the_same_losses_under_either_optimizer():
    theirs, ours = plain_loop.main(["--epochs", "5"])
    assert len(theirs.losses) == 5 * 6  # 354 rows in batches of 64
    assert theirs.losses[-6:].mean() < theirs.losses[:6].mean()
    assert torch.equal(ours.losses, theirs.losses)
    assert ours.r2 == theirs.r2
