"""What a loss says of its schedule: each mistake once, and nothing of a training as it should be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from dal_kernels import (
    DynamicsAwareLoss,
    DynamicsAwareSchedule,
    GeneralizedCrossEntropyLoss,
    LinearDynamicsAwareLoss,
    LinearLoss,
    Ramp,
    ScheduleWarning,
    SelfPacedSchedule,
    watch,
)
from support.watched import CLASSES, TARGET, epochs_without_a_step, evaluate, fixed, logits, past_one, train

# --- never stepped

LOSSES: dict[str, Callable[[], Any]] = {
    "fixed": fixed,
    "auto": lambda: DynamicsAwareLoss(total_steps=10),
    "layer": lambda: LinearDynamicsAwareLoss(CLASSES, CLASSES, total_steps=10),
    "form": lambda: LinearLoss(fixed(), CLASSES, CLASSES),
    "family": lambda: GeneralizedCrossEntropyLoss(schedule=Ramp(10, q=(0.2, 0.9))),
}
every_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)


@every_loss
def test_a_schedule_that_is_never_stepped_is_told_once(make: Any, said: list[str]) -> None:
    criterion = make()
    for epoch in range(9):
        train(criterion)
        assert len(said) == (epoch >= 5)  # the sixth begins, after half of total_steps
        evaluate(criterion)
    assert "step() was never called on the loss in 16 training calls" in said[0]
    assert "total_steps=10" in said[0]


@pytest.mark.parametrize(("total_steps", "rounds"), [(2, 5), (10, 5), (16, 8), (300, 10)])
def test_validations_within_the_first_epoch_are_let_pass(total_steps: int, rounds: int, said: list[str]) -> None:
    criterion = fixed(total_steps)
    for validations in range(rounds + 1):
        assert len(said) == 0, validations
        train(criterion)
        evaluate(criterion)
    assert len(said) == 1


@every_loss
def test_a_mode_of_evaluation_is_one_too(make: Any, said: list[str]) -> None:
    criterion = make()
    for _ in range(6):
        train(criterion.train())
        train(criterion.eval())
    assert len(said) == 1


@pytest.mark.parametrize(("total_steps", "most"), [(10, 50), (60, 60)], ids=["epochs", "iterations"])
def test_more_calls_than_an_epoch_can_have_tell_it_too(
    total_steps: int, most: int, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "MOST_CALLS_OF_AN_EPOCH", 50)
    monkeypatch.setattr(watch, "MOST_EPOCHS", 60)
    criterion = fixed(total_steps)
    train(criterion, most)
    assert not said
    train(criterion, 2)
    assert len(said) == 1


def test_a_loss_of_ten_epochs_is_told_in_its_first_training(said: list[str]) -> None:
    """Ten thousand calls are a tenth of an epoch of a data set that hardly anybody has."""
    criterion = fixed(10)
    criterion._watch.calls = 10_000
    train(criterion, 1)
    assert "(if the first epoch is longer than that, all is well)" in said[0]


MOVES: dict[str, Callable[[Any], Any]] = {
    "step": lambda criterion: criterion.step(),
    "step to 0": lambda criterion: criterion.step(0),
    "schedule": lambda criterion: criterion.schedule.step(0),
    "assignment": lambda criterion: setattr(criterion.schedule, "position", 0),
    "state": lambda criterion: criterion.load_state_dict(criterion.state_dict()),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("kind", ["fixed", "auto", "family"])
def test_whatever_moves_the_schedule_is_a_step(kind: str, move: Any, said: list[str]) -> None:
    criterion = LOSSES[kind]()
    move(criterion)
    epochs_without_a_step(criterion)
    assert not said


def test_a_restart_is_a_step(said: list[str]) -> None:
    criterion = fixed()
    criterion.schedule.restart()
    epochs_without_a_step(criterion)
    assert not said


@pytest.mark.parametrize(
    "make",
    [
        lambda: fixed(q_start=0.7, q_end=0.7),
        lambda: GeneralizedCrossEntropyLoss(schedule=Ramp(10, q=(0.7, 0.7))),
        GeneralizedCrossEntropyLoss,
    ],
    ids=["fixed", "family", "no schedule"],
)
def test_a_constant_schedule_need_not_be_stepped(make: Any, said: list[str]) -> None:
    criterion = make()
    epochs_without_a_step(criterion)
    assert not said


def test_a_trial_run_and_the_first_epoch_say_nothing(said: list[str]) -> None:
    criterion = fixed()
    for _ in range(5):
        evaluate(criterion)
    train(criterion, 50)
    evaluate(criterion)
    evaluate(criterion)
    train(criterion, 50)
    assert not said


def under_grad(criterion: Any) -> Any:
    return torch.func.grad(criterion)(logits().detach(), TARGET)


def under_make_fx(criterion: Any) -> Any:
    return make_fx(criterion)(logits(), TARGET)


@pytest.mark.parametrize("call", [under_grad, under_make_fx], ids=["torch.func", "make_fx"])
def test_what_is_transformed_or_recorded_is_not_counted(call: Any, said: list[str]) -> None:
    criterion = fixed()
    for _ in range(12):
        call(criterion)
        evaluate(criterion)
    assert not said


# --- the unit of the steps


@every_loss
def test_epochs_that_are_stepped_once_a_call_are_told_once(make: Any, said: list[str]) -> None:
    criterion = make()
    for _ in range(40):
        train(criterion, 1)
        criterion.step()
    (text,) = said
    assert "total_steps=10 looks like epochs" in text
    assert "(13 of them)" in text
    assert "total_steps=epochs * len(loader)" in text


def test_a_schedule_that_is_stepped_by_itself_is_watched_in_the_calls(said: list[str]) -> None:
    criterion = fixed()
    for _ in range(40):
        train(criterion, 1)
        criterion.schedule.step()
    assert len(said) == 1


@every_loss
def test_a_schedule_twice_past_its_end_is_told_once(make: Any, said: list[str]) -> None:
    criterion = make()
    for epoch in range(30):
        train(criterion)
        assert len(said) == (epoch > 21)
        criterion.step()
    assert "stepped to 22, past its end at total_steps=10 twice over" in said[0]


@pytest.mark.parametrize("make", [LOSSES["fixed"], LOSSES["auto"], LOSSES["family"]], ids=["fixed", "auto", "family"])
@pytest.mark.parametrize(
    ("total_steps", "calls_a_step", "size"),
    [(10, 3, 1.0), (10, 1, 1.0), (30, 4, 1.0), (1, 1, 1 / 30), (1, 3, 1 / 10), (5000, 1, 150.0)],
    ids=["epochs", "iterations", "accumulated", "share of iterations", "share of epochs", "many iterations"],
)
@pytest.mark.parametrize("resumed", [0.0, 0.9], ids=["whole", "resumed"])
def test_a_training_as_it_should_be_is_not_spoken_of(
    make: Any, total_steps: float, calls_a_step: int, size: float, resumed: float, said: list[str]
) -> None:
    criterion = make()
    criterion.schedule.total_steps = total_steps
    criterion.step(resumed * total_steps)
    while criterion.schedule.position < total_steps:
        train(criterion, calls_a_step)
        criterion.step(criterion.schedule.position + size)
        evaluate(criterion)
    train(criterion)  # what comes after the end
    assert not said


# --- where it is not


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints_are_no_evaluations_and_compute_again(reentrant: bool, said: list[str]) -> None:
    """A first forward may be without a gradient; the second is no call of its own, and must save the same."""
    criterion = fixed()
    for _ in range(5):
        checkpoint(criterion, logits(), TARGET, use_reentrant=reentrant).backward()
    assert not said
    for _ in range(12):
        checkpoint(criterion, logits(0.0), TARGET, use_reentrant=reentrant).backward()
        criterion.step()
    assert not said


def test_a_compiled_loss_is_not_watched_and_not_compiled_again(said: list[str]) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    criterion = fixed()
    compiled = torch.compile(criterion, fullgraph=True, backend=counter)
    for _ in range(5):
        train(compiled)
        evaluate(compiled)
    assert counter.frame_count == 2  # with a gradient and without
    assert not said


def never_stepped(criterion: Any) -> None:
    epochs_without_a_step(criterion)


@pytest.mark.parametrize(
    "mistake",
    [never_stepped, lambda criterion: past_one(criterion, 0.0), lambda criterion: past_one(criterion, 6.0, 40)],
)
@pytest.mark.parametrize(
    "make",
    [
        lambda watched: fixed(watch=watched),
        lambda watched: DynamicsAwareLoss(schedule=DynamicsAwareSchedule(0.6, 1.5, 10), watch=watched),
        lambda watched: LinearDynamicsAwareLoss(
            CLASSES, CLASSES, schedule=SelfPacedSchedule(0.6, 1.5, 10), watch=watched
        ),
        lambda watched: GeneralizedCrossEntropyLoss(schedule=Ramp(10, q=(0.2, 0.9)), watch=watched),
    ],
    ids=["module", "schedule", "layer", "family"],
)
def test_one_argument_turns_it_off(make: Any, mistake: Any, said: list[str]) -> None:
    mistake(make(False))
    assert not said
    with pytest.raises(TypeError, match=r"^watch must be True or False, got str$"):
        make("no")


def test_the_warning_names_the_line_of_the_user() -> None:
    criterion = fixed(3)
    criterion(logits(), TARGET)
    with pytest.warns(ScheduleWarning, match="twice over") as warned:
        criterion.step(30)
    assert [warning.filename for warning in warned] == [__file__]
    criterion = fixed(3)
    criterion.step(3)
    with pytest.warns(ScheduleWarning, match="stalled") as warned:
        criterion(logits(0.0), TARGET)
    assert [warning.filename for warning in warned] == [__file__]
