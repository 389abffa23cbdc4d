"""Predictions of what was trained, settings from files, and what else a trainer is expected to have."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dal_kernels.training import TrainingConfig, UsageError, main, parse, progress
from dal_kernels.training.data import DataSet, load_data
from dal_kernels.training.loader import evaluation_loader, held_out
from dal_kernels.training.metrics import count_hits
from dal_kernels.training.predict import find_checkpoint, load_trained
from dal_kernels.training.recipes import recipe_for
from dal_kernels.training.train import Trainer
from support.trainings import ALONE, needs_training, rows_of

needs_training()


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return load_data("digits")


def trainer_on(data: DataSet, loss: str = "gce", **changes: Any) -> Trainer:
    return Trainer(recipe_for("digits", **changes), data, data.train_labels, loss, 0, 0, ALONE)


# --- predict


@pytest.mark.parametrize("settings", ["", "--ema-decay 0.98", "--val-fraction 0.2"])
def test_what_is_predicted_is_what_the_training_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: str
) -> None:
    command = ["train", "--data", "digits", "--epochs", "4", "--output", str(tmp_path), *settings.split()]
    assert main(command) == 0
    assert f"Written: {tmp_path / 'digits'}" in capsys.readouterr().out
    assert main(["predict", "--data", "digits", "--output", str(tmp_path)]) == 0
    (run,) = tmp_path.glob("digits/*")
    metrics = rows_of(run / "metrics.csv")
    if "val" in settings:  # the best epoch's, by the validation
        metrics.sort(key=lambda row: float(row["validation_accuracy"]))
    rows, data = rows_of(tmp_path / "predictions.csv"), load_data("digits")
    assert tuple(rows[0]) == ("path", "predicted", "confidence")
    assert [int(row["path"]) for row in rows] == list(range(450))
    right = sum(int(row["predicted"]) == label for row, label in zip(rows, data.test_labels.tolist(), strict=True))
    assert right / 450 == float(metrics[-1]["test_accuracy"])
    assert all(0.1 <= float(row["confidence"]) <= 1 for row in rows)
    assert f"{right / 450:.1%} as their labels say" in capsys.readouterr().out
    classes = rows_of(tmp_path / "predicted-classes.csv")
    assert sum(int(row["right"]) for row in classes) == right
    if "val" not in settings:
        assert classes == rows_of(run / "classes.csv")
        assert rows_of(tmp_path / "predicted-confusion.csv") == rows_of(run / "confusion.csv")


def test_images_without_labels_are_predicted_by_the_names_of_their_files(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "val"):
        for shade, name in ((30, "dark"), (220, "light")):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for i in range(20):
                picture = image.new("RGB", (16, 16), (shade + i,) * 3)
                picture.save(tmp_path / "data" / part / name / f"{i}.png")
    (tmp_path / "new" / "deep").mkdir(parents=True)
    for shade, name in ((35, "a.png"), (230, "deep/b.png")):
        image.new("RGB", (30, 20), (shade,) * 3).save(tmp_path / "new" / name)
    (tmp_path / "new" / "c.png").write_bytes(b"")
    out = str(tmp_path / "out")
    command = ["train", "--data", f"folder:{tmp_path / 'data'}", "--epochs", "10", "--batch-size", "8"]
    assert main([*command, "--output", out]) == 0
    assert main(["predict", "--data", f"folder:{tmp_path / 'new'}", "--output", out]) == 0
    found = {row["path"]: row["predicted"] for row in rows_of(tmp_path / "out" / "predictions.csv")}
    assert found == {str(tmp_path / "new" / "a.png"): "dark", str(tmp_path / "new" / "deep" / "b.png"): "light"}
    (skipped,) = rows_of(tmp_path / "out" / "predicted-skipped.csv")
    assert skipped["path"].endswith("c.png")
    table = tmp_path / "list.csv"
    table.write_text("path\nnew/a.png\nnew/deep/b.png\n", encoding="utf-8")
    assert main(["predict", "--data", f"csv:{table}", "--output", out]) == 0
    found = {row["path"]: row["predicted"] for row in rows_of(tmp_path / "out" / "predictions.csv")}
    assert found == {"new/a.png": "dark", "new/deep/b.png": "light"}


def test_features_without_labels_are_predicted(tmp_path: Path) -> None:
    import numpy

    labels = numpy.arange(200) % 2
    features = numpy.random.default_rng(0).normal(size=(200, 3)) + 6 * labels[:, None]
    numpy.savez(tmp_path / "f.npz", features=features, labels=numpy.where(labels, "yes", "no"))
    numpy.savez(tmp_path / "new.npz", features=[[0.0, 0, 0], [6, 6, 6]])
    out = str(tmp_path / "out")
    assert main(["train", "--data", f"npz:{tmp_path / 'f.npz'}", "--learning-rate", "0.05", "--output", out]) == 0
    assert main(["predict", "--data", f"npz:{tmp_path / 'new.npz'}", "--output", out]) == 0
    assert [row["predicted"] for row in rows_of(tmp_path / "out" / "predictions.csv")] == ["no", "yes"]


def test_the_newest_run_predicts_unless_another_is_named(tmp_path: Path) -> None:
    for hour, name in ((2, "b"), (1, "a")):
        (tmp_path / "digits" / name).mkdir(parents=True)
        (tmp_path / "digits" / name / "checkpoint.pt").write_bytes(b"")
        os.utime(tmp_path / "digits" / name / "checkpoint.pt", (3600 * hour, 3600 * hour))
    assert find_checkpoint(tmp_path).parent.name == "b"
    (tmp_path / "digits" / "b" / "best.pt").write_bytes(b"")
    assert find_checkpoint(tmp_path).name == "best.pt"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "predict needs a checkpoint: none was given, and there is no run below"),
        (["--checkpoint", "nowhere.pt"], "nowhere.pt cannot be used"),
        (["--checkpoint", __file__], "cannot be used"),
        (["--data", "tar:x"], "data must be one of"),
    ],
)
def test_predict_says_what_is_missing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", *arguments, "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_samples_of_another_shape_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy

    assert main(["train", "--epochs", "1", "--output", str(tmp_path)]) == 0
    numpy.savez(tmp_path / "new.npz", features=[[0.0, 0, 0]])
    assert main(["predict", "--data", f"npz:{tmp_path / 'new.npz'}", "--output", str(tmp_path)]) == 2
    assert re.search(r"takes samples of shape \(8, 8\), got \(3,\)", capsys.readouterr().err)


# --- settings from files


def test_a_run_is_trained_again_from_the_settings_it_left(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    command = ["train", "--noise", "0.2", "--losses", "gce", "--epochs", "3", "--nesterov", "--momentum", "0.5"]
    assert main([*command, "--widths", "16", "8", "--output", str(tmp_path / "a")]) == 0
    (config,) = tmp_path.glob("a/digits/*/config.yaml")
    assert main(["train", "--config", str(config), "--output", str(tmp_path / "b")]) == 0
    first, again = (
        [{k: v for k, v in row.items() if k not in ("seconds", "loss_time_share")} for row in rows_of(path)]
        for path in (config.with_name("metrics.csv"), next(tmp_path.glob("b/digits/*/metrics.csv")))
    )
    assert first == again


LISTS = "noise: [0.2, asymmetric:0.3]\nwidths: []\n"
TABLES = 'noise = [0.2, "asymmetric:0.3"]\nwidths = []\n'
OPTIONS = {"epochs": 7, "learning-rate": 0.5, "nesterov": True, "momentum": 0.9}
FILES = {
    "a.yaml": LISTS + "epochs: 7\nlearning-rate: 0.5\nnesterov: true\nmomentum: 0.9\n",
    "a.toml": TABLES + "epochs = 7\nlearning_rate = 0.5\nnesterov = true\nmomentum = 0.9\n",
    "a.json": json.dumps({"noise": [0.2, "asymmetric:0.3"], "widths": [], **OPTIONS}),
}


@pytest.mark.parametrize("name", FILES)
def test_settings_from_a_file_are_overridden_by_the_command_line(name: str, tmp_path: Path) -> None:
    if name.endswith("yaml"):
        pytest.importorskip("yaml")
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    config = parse(["compare", "--config", str(tmp_path / name), "--epochs", "9", "--seeds", "4"])
    assert config.recipe.epochs == 9
    assert config.recipe.learning_rate == 0.5
    assert config.recipe.nesterov
    assert config.recipe.widths == ()
    assert config.noise == ("0.2", "asymmetric:0.3")
    assert config.seeds == (4,)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "cannot be read"),
        ("a.json", "[1]", "must be a table of options, got list"),
        ("a.json", '{"epochs": {"a": 1}}', "epochs must be a value or a list of values"),
        ("a.json", '{"nesterov": "yes"}', "nesterov must be true or false, got 'yes'"),
        ("a.ini", "", r"config must be a file \.yaml, \.toml or \.json"),
        ("a.toml", "epochs = ", "cannot be read"),
    ],
)
def test_a_wrong_file_of_settings_is_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        parse(["train", "--config", str(tmp_path / name)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"epoches": 3}', "a.json: epoches is no option, do you mean epochs?"),
        ('{"epoch": 3}', "a.json: epoch is no option, do you mean epochs?"),
        ('{"config": "b.json"}', "a.json: config is no option"),
        ('{"to_do": "inspect"}', "a.json: to_do is no option"),
        ('{"resume": 1}', "a.json: resume must be true or false, got 1"),
    ],
)
def test_an_unknown_setting_in_a_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    assert main(["train", "--config", str(tmp_path / "a.json")]) == 2
    error = capsys.readouterr().err
    assert error.endswith(f"{message}\n")
    assert error.count("\n") == 1


def test_a_file_may_say_whether_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"resume": true, "overwrite": false, "logger": "csv"}', encoding="utf-8")
    config = parse(["train", "--config", str(tmp_path / "a.json")])
    assert (config.resume, config.overwrite, config.loggers) == (True, False, ("csv",))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": 0}, r"seeds must be tuple\[int, ...\], got 0"),
        ({"noise": "0.4"}, r"noise must be tuple\[str, ...\], got '0.4'"),
        ({"seeds": (True,)}, r"seeds must be tuple\[int, ...\], got \(True,\)"),
        ({"out": "there"}, r"out must be Path \| None, got 'there'"),
        ({"workers": 1.0}, "workers must be int, got 1.0"),
        ({"changes": {"epochs": "3"}}, "epochs must be int, got '3'"),
        ({"changes": {"nesterov": 1}}, "nesterov must be bool, got 1"),
        ({"changes": {"learning_rate": "fast"}}, "learning_rate must be float, got 'fast'"),
    ],
)
def test_settings_from_python_are_of_their_types(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainingConfig(**settings)
    assert TrainingConfig(changes={"learning_rate": 1}).recipe.learning_rate == 1, "an int is a float"


def test_help_shows_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for choices in ("{sgd,adamw}", "{none,bf16,fp16}", "{cosine,constant,step,exponential}", "{skip,error}"):
        assert choices in said


# --- validation


def test_the_validation_is_held_out_and_by_the_labels_given(digits: DataSet) -> None:
    held, kept = held_out(1347, 0.2, seed=0)
    assert len(held) == round(0.2 * 1347)
    assert sorted([*held.tolist(), *kept.tolist()]) == list(range(1347))
    trainer = trainer_on(digits, val_fraction=0.2, epochs=2)
    trained = {i for _, indices in trainer.batches for i in indices.tolist()}
    assert trained == set(kept.tolist())
    metrics = trainer.run_epoch(lambda: None)
    loader = evaluation_loader(digits.train, held, 64, 0, ALONE)
    agreed, seen = count_hits(trainer.network, loader, digits.train_labels).tolist()
    assert metrics.validation_accuracy == agreed / seen
    assert trainer.best_epoch == 1


def test_training_stops_when_the_validation_becomes_no_better(digits: DataSet) -> None:
    trainer = trainer_on(digits, val_fraction=0.2, patience=3, epochs=60)
    while not trainer.done:
        trainer.run_epoch(lambda: None)
    accuracies = [epoch.validation_accuracy for epoch in trainer.history]
    assert len(accuracies) < 60
    assert accuracies.index(max(accuracies)) + 1 == trainer.best_epoch == len(accuracies) - 3


def test_the_best_epoch_is_kept(tmp_path: Path) -> None:
    command = ["train", "--noise", "0.6", "--losses", "cross-entropy", "--epochs", "15", "--val-fraction", "0.2"]
    assert main([*command, "--output", str(tmp_path)]) == 0
    (metrics,) = tmp_path.glob("digits/*/metrics.csv")
    accuracies = [float(row["validation_accuracy"]) for row in rows_of(metrics)]
    best = accuracies.index(max(accuracies)) + 1
    assert best < 15, "cross-entropy begins to memorise"
    assert load_trained(metrics.with_name("best.pt")).epoch == best


# --- how a step is made


def parameters(trainer: Trainer) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(trainer.evaluated.parameters()).detach()


def test_a_batch_in_parts_gives_the_step_of_the_whole(digits: DataSet) -> None:
    whole, parts = (trainer_on(digits, batch_size=100, accumulate=count, epochs=1) for count in (1, 3))
    metrics = [trainer.run_epoch(lambda: None) for trainer in (whole, parts)]
    torch.testing.assert_close(parameters(parts), parameters(whole), rtol=1e-4, atol=1e-5)
    assert metrics[1].train_loss == pytest.approx(metrics[0].train_loss, rel=1e-5)
    assert metrics[1].target_prob == pytest.approx(metrics[0].target_prob, rel=1e-5)


def test_averaged_weights_are_measured_and_resumed(digits: DataSet) -> None:
    trainer = trainer_on(digits, ema_decay=0.9, batch_size=450, epochs=2)
    average = parameters(trainer)
    step = trainer.optimizer.step
    seen = []

    def watched(*arguments: Any, **options: Any) -> Any:
        result = step(*arguments, **options)
        seen.append(torch.nn.utils.parameters_to_vector(trainer.network.parameters()).detach().clone())
        return result

    trainer.optimizer.step = watched  # type: ignore[method-assign]
    trainer.run_epoch(lambda: None)
    average = seen[0]  # the first is taken as it is
    for weights in seen[1:]:
        average = 0.9 * average + 0.1 * weights
    torch.testing.assert_close(parameters(trainer), average)
    resumed = trainer_on(digits, ema_decay=0.9, batch_size=450, epochs=2)
    resumed.restore(trainer.state())
    assert torch.equal(parameters(resumed), parameters(trainer))


def test_lines_say_how_far_a_training_is_where_no_bar_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0)
    assert main(["train", "--epochs", "3", "--output", str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "all done in" in line]
    assert len(lines) == 3
    assert re.search(r"dal, epoch 1 of 3: loss [\d.]+, test accuracy [\d.]+%; all done in 0:00:\d\d", lines[0])
