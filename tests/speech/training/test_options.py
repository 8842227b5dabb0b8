"""Settings: files, --stable and options in their order, and errors that name the value."""

import os

import pytest
import torch

from fastguard.speech.training.config import MODELS, Config
from fastguard.speech.training.options import config_file, parse

#: The right and the left column of the table in shared/DESIGN.md.
STABLE = {"lr": 1e-5, "betas": (0.9, 0.98), "max_norm": 0.5, "linear_std": 0.001, "conv_scale": 0.5}
BEFORE = {"lr": 1e-4, "betas": (0.9, 0.999), "max_norm": 1.0, "linear_std": 0.01, "conv_scale": 1.0}


def table(config):
    return {
        "lr": config.optim.lr,
        "betas": tuple(config.optim.betas),
        "max_norm": config.guard.max_norm,
        "linear_std": config.init.linear_std,
        "conv_scale": config.init.conv_scale,
    }


@pytest.mark.parametrize("model", MODELS)
def test_the_two_columns(model):
    before, stable = parse(["--model", model]), parse(["--model", model, "--stable"])
    assert before.model == stable.model == model
    assert table(before) == BEFORE
    assert not before.guard.enabled
    assert before.network.attention_clamp is None
    assert table(stable) == STABLE
    assert stable.guard.enabled
    assert stable.guard.skip_norm == 10.0
    assert (before.epochs, stable.epochs) == (10, 50)
    assert stable.network.attention_clamp == 10.0
    assert before.batch_size == stable.batch_size == {"teacher": 2, "baseline": 4}[model]


def test_the_default_is_the_teacher():
    assert parse([]) == parse(["--model", "teacher"])


@pytest.mark.parametrize("model", MODELS)
def test_guarded_takes_full_steps_under_a_guard_that_adapts(model):
    config = parse(["--model", model, "--guarded"])
    assert config.guard.enabled
    assert config.guard.threshold != "fixed"
    assert config.optim.schedule == "cosine"
    assert config.optim.lr > 100 * parse(["--stable"]).optim.lr / 10
    assert config.network.attention_clamp == 10.0
    assert config.augment.speeds
    assert config.consistency.weight > 0
    assert config.augment.warmup > 0
    assert config.checkpoint.keep_best > 1


def test_guarded_gives_each_model_its_own_rate():
    teacher, baseline = (parse(["--model", model, "--guarded"]) for model in MODELS)
    assert (teacher.model, baseline.model) == MODELS
    assert teacher.optim.lr < baseline.optim.lr
    assert parse(["--guarded", "--optim.lr", "0.25"]).optim.lr == 0.25
    assert parse(["--guarded"]).optim.schedule == baseline.optim.schedule == "cosine"


@pytest.mark.parametrize(
    "name", [*MODELS, "stable", "guarded", "guarded_teacher", "guarded_baseline"]
)
def test_every_config_file_is_found_and_loads(name):
    assert config_file(name).is_file()
    assert isinstance(parse(["--config", str(config_file(name))]), Config)


def test_options_override_stable_overrides_config_overrides_model(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: baseline\nseed: 5\noptim:\n  lr: 0.5\n  weight_decay: 0.3\n")
    config = parse(["--optim.lr", "0.25", "--config", str(mine), "--stable"])
    assert config.model == "baseline"
    assert config.batch_size == 4
    assert config.seed == 5
    assert config.optim.weight_decay == 0.3
    assert config.optim.betas == (0.9, 0.98)
    assert config.optim.lr == 0.25
    assert parse(["--config", str(mine), "--stable"]).optim.lr == 1e-5
    assert parse(["--config", str(mine), "--model", "teacher"]).model == "teacher"


def test_hyphens_and_underscores_are_the_same():
    assert parse(["--run-dir", "a-b", "--max-steps=7"]) == parse(
        ["--run_dir=a-b", "--max_steps", "7"]
    )
    assert str(parse(["--run-dir", "a-b"]).run_dir) == "a-b"


def test_saved_settings_read_back_and_fit_a_checkpoint(tmp_path):
    config = parse(["--stable", "--run-dir", "somewhere", "--max-steps", "3"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert parse(["--config", str(tmp_path / "config.yaml")]) == config
    torch.save(config.to_dict(), tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt", weights_only=True) == config.to_dict()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--model", "student"], "--model student: choose one of teacher, baseline"),
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--optim.lr", "-1"], "optim.lr must be above 0, got -1.0"),
        (["--epocs", "3"], "unknown option --epocs; did you mean --epochs?"),
        (["--lr=3"], "unknown option --lr; did you mean --optim.lr?"),
        (["--optim.learning-rate", "3"], "did you mean --optim.lr?"),
        (["--epochs", "three"], "epochs"),
        (["--guard.skip_norm", "3"], "guard.skip_norm=3 and guard.threshold=fixed need the guard"),
        (["--stable", "--guarded"], "--stable and --guarded exclude each other"),
        (["--optim.schedule", "noam"], "noam needs a warm-up"),
        (
            ["--compile", "true", "--parallel", "fsdp"],
            "do not work with --parallel fsdp",
        ),
        (["--batch-duration", "nan"], "batch_duration must be above 0, got nan"),
        (["--ema", "1.5"], "ema must lie between 0 and 1, got 1.5"),
        (["--optim.betas", "[0.9,1.0]"], "optim.betas must be at least 0 and below 1"),
        (["--augment.speeds", "[0.01]"], "augment.speeds must lie between 0.5 and 2"),
        (["--precision", "fp8"], "fp8"),
        (["--ema", "1"], "ema must be below 1, got 1.0"),
        (["--optim.lr", "inf"], "optim.lr must be finite, got inf"),
        (["--init.linear_std", "-1"], "init.linear_std must be at least 0, got -1.0"),
        (["--init.conv_scale", "nan"], "init.conv_scale must be at least 0, got nan"),
        (["--network.attention_clamp", "0"], "network.attention_clamp must be above 0, got 0.0"),
        (["--features.sample_rate", "1000000000"], "features.sample_rate must lie between 1000"),
        (["--features.n_mels", "100000"], "features.n_mels must lie between 1 and 512"),
        (
            ["--loggers", "wandbb"],
            "loggers: 'wandbb' is not known; give tensorboard, wandb, mlflow",
        ),
        (["--loggers", "wandb,none"], "loggers: 'none' is not known"),
        (["--log-every", "0"], "log_every must be at least 1, got 0"),
        (["--seed", "-1"], "seed must lie between 0 and"),
        (["--seed", "99999999999999999999"], "seed must lie between 0 and"),
        (["--guarded=1"], "usage: python -m fastguard.train"),
        (["--config", "/not/there.yaml"], "/not/there.yaml: the file does not exist"),
    ],
)
def test_wrong_usage_exits_2_and_names_it(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(argv)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message",
    [
        ("optim:\n  weight_decai: 1\n", "did you mean optim.weight_decay?"),
        ("epocs: 1\n", "unknown setting epocs; did you mean epochs?"),
        ("optim: 3\n", "optim is a group"),
        ("- 1\n", "has no settings"),
        ("", "has no settings"),
        ("a: [1\n", "while parsing"),
        ("epochs: many\n", "epochs"),
        ("optim:\n  learning_rate: 1\n", "there are optim.lr, optim.schedule, optim.warmup"),
        ("epochs: 3\nseed: 1\nepochs: 5\n", "the key epochs occurs twice"),
        ("optim:\n  lr: 1\n  lr: 2\n", "the key lr occurs twice"),
        ("[" * 10_000, "nested too deep"),
        ("seed: 1\n" * 10_000, "over 65536 bytes"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(text, message, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(SystemExit) as caught:
        parse(["--config", str(tmp_path / "mine.yaml")])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("number", ["9" * 60_000, "0x" + "f" * 60_000], ids=["digits", "hex"])
@pytest.mark.parametrize("name", ["epochs", "seed", "guard.patience", "optim.lr", "max_duration"])
def test_a_number_without_end_is_a_wrong_setting(tmp_path, capsys, name, number):
    group, _, inner = name.rpartition(".")
    line = f"{inner}: {number}"
    (tmp_path / "a.yaml").write_text(f"{group}:\n  {line}" if group else line)
    with pytest.raises(SystemExit, match="2"):
        parse(["--config", str(tmp_path / "a.yaml")])
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_a_config_that_is_a_fifo_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "a.yaml")
    with pytest.raises(SystemExit, match="2"):
        parse(["--config", str(tmp_path / "a.yaml")])
    assert "a.yaml is a FIFO" in capsys.readouterr().err


def test_a_config_with_aliases_is_not_unrolled(tmp_path, capsys):
    """Each line of the file names the one above it nine times: 9 ** 30 numbers in 2 KB."""
    lines = ["a0: &a0 [1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 31)]
    (tmp_path / "bomb.yaml").write_text("\n".join([*lines, "augment: {speeds: *a30}"]))
    with pytest.raises(SystemExit):
        parse(["--config", str(tmp_path / "bomb.yaml")])
    assert "*a0 is an alias: write the value itself" in capsys.readouterr().err


def test_infinity_is_a_number():
    assert parse(["--stable", "--guard.skip_norm", "inf"]).guard.skip_norm == float("inf")
    assert parse(["--stable", "--guard.skip-norm=inf"]).guard.skip_norm == float("inf")


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for word in (
        "--stable",
        "--config",
        "--run_dir",
        "--optim.lr",
        "--guard.skip_norm",
        "Consecutive skips that end the run with an error",
    ):
        assert word in text
