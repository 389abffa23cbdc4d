"""Settings from files and from Python, beside those of the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dal_kernels.training import TrainingConfig, UsageError, main, parse
from support.trainings import needs_training, rows_of

needs_training()


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
