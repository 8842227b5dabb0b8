"""Whether a run may begin or continue in a folder, and what it overwrites there."""

import dataclasses
import os
import shutil

import pytest

from fastguard.speech.training import run_folder
from fastguard.speech.training.config import CheckpointConfig, Config
from fastguard.speech.training.run_folder import RunError, RunFolder

from .folders import begun, names, of_wer, state


def test_a_new_folder_has_settings_and_no_state(tmp_path):
    folder = begun(tmp_path / "a" / "b")
    assert folder.find_state() is None
    assert (tmp_path / "a" / "b" / "config.yaml").read_text() == Config().to_yaml()


def test_other_settings_do_not_go_on_in_a_folder_and_are_named(tmp_path):
    config = Config()
    begun(tmp_path).save(state(1))
    other = dataclasses.replace(
        config, seed=3, optim=dataclasses.replace(config.optim, lr=0.5), epochs=99
    )
    with pytest.raises(RunError) as caught:
        RunFolder(tmp_path, other).begin()
    assert "optim.lr was 0.0001 and is 0.5; seed was 0 and is 3" in str(caught.value)
    assert "epochs" not in str(caught.value)
    RunFolder(tmp_path, dataclasses.replace(config, epochs=99, num_workers=2)).begin()


def test_a_run_that_failed_before_its_first_step_claims_nothing(tmp_path):
    begun(tmp_path, data="manifest:absent.jsonl")
    begun(tmp_path, data="asterisk", resume="never")
    assert "asterisk" in (tmp_path / "config.yaml").read_text()


def test_never_refuses_a_folder_with_a_run(tmp_path):
    begun(tmp_path).save(state(1))
    with pytest.raises(RunError, match="already has a run"):
        RunFolder(tmp_path, Config(resume="never")).begin()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("precious")
    with pytest.raises(RunError, match=r"without a config\.yaml"):
        RunFolder(tmp_path, Config()).begin()
    (tmp_path / "config.yaml").write_text("trainer: somebody else's")
    with pytest.raises(RunError, match="was not written by fastguard"):
        RunFolder(tmp_path, Config()).begin()
    assert (tmp_path / "metrics.jsonl").read_text() == "precious"
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("resume", ["auto", "never", "X"])
@pytest.mark.parametrize("with_log", [False, True])
def test_a_state_that_lies_in_a_new_folder_is_not_taken(tmp_path, resume, with_log):
    begun(tmp_path / "other").save(state(9))
    shutil.copytree(tmp_path / "other" / "checkpoints", tmp_path / "new" / "checkpoints")
    if with_log:
        (tmp_path / "new" / "train.log").touch()
    begun(tmp_path / "X").save(state(7))
    resume = str(tmp_path / "X") if resume == "X" else resume
    with pytest.raises(RunError, match=r"not the folder of a run, and has files .*checkpoints"):
        begun(tmp_path / "new", resume=resume)
    assert not (tmp_path / "new" / "config.yaml").exists()


def test_that_state_is_taken_and_no_other(tmp_path, caplog):
    """The newest one of the folder, where --resume names an older one."""
    old = begun(tmp_path / "old")
    for step in (7, 9):
        old.save(state(step))
    older = tmp_path / "old" / "checkpoints" / "step_000000007.pt"
    folder = begun(tmp_path / "new", resume=str(older))
    assert names(folder) == ["step_000000007.pt"]
    assert folder.find_state()["step"] == 7
    assert not (tmp_path / "new" / "checkpoints" / "step_000000007.pt").samefile(older)


def test_auto_says_which_state_it_goes_on_from(tmp_path, caplog):
    begun(tmp_path).save(state(3))
    folder = begun(tmp_path)
    caplog.set_level("INFO", "fastguard")
    assert folder.find_state()["step"] == 3
    assert f"state: {tmp_path / 'checkpoints' / 'step_000000003.pt'}" in caplog.messages


def test_a_state_without_rules_for_texts_is_told(tmp_path, caplog):
    folder = begun(tmp_path)
    folder.save(state(1))
    folder.find_state()
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    folder.save({**state(2), "config": {}})
    folder.find_state()
    (record,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert "step_000000002.pt was written before the settings text.*" in record.getMessage()


def test_a_run_killed_between_its_settings_and_the_state_of_another_takes_that_again(tmp_path):
    begun(tmp_path / "old").save(state(7))
    folder = begun(tmp_path / "new", resume=str(tmp_path / "old"))
    (tmp_path / "new" / "checkpoints" / "step_000000007.pt").unlink()
    folder.close()
    assert begun(tmp_path / "new", resume=str(tmp_path / "old")).find_state()["step"] == 7


def test_only_files_that_a_run_wrote_are_deleted(tmp_path):
    folder = begun(tmp_path, checkpoint=CheckpointConfig(keep_last=1, keep_best=1))
    folder.save(state(1))
    folder.close()
    mine = ["a.tmp", "notes.tmp", "config.yaml.tmp", "checkpoints/a.tmp", "checkpoints/step_x.pt",
            "checkpoints/step_final.pt", "checkpoints/best_one.pt", "checkpoints/best_0.1_3.pt",
            "checkpoints/step_1.pt.tmp", "fastguard-x.tmp"]  # fmt: skip
    for name in mine:
        (tmp_path / name).write_text("precious")
    (tmp_path / "checkpoints" / "step_000000999.pt").symlink_to(tmp_path / "a.tmp")
    (tmp_path / "checkpoints" / "fastguard-0123456789abcdef.tmp").write_text("half")
    folder = begun(tmp_path, checkpoint=CheckpointConfig(keep_last=1, keep_best=1))
    for step in (2, 3):
        folder.save(state(step))
        folder.save_best(state(step), of_wer(0.5))
    assert all((tmp_path / name).read_text() == "precious" for name in mine)
    assert (tmp_path / "checkpoints" / "step_000000999.pt").is_symlink()
    assert not (tmp_path / "checkpoints" / "fastguard-0123456789abcdef.tmp").exists()
    assert folder.find_state()["step"] == 3


def test_a_folder_that_is_no_run_keeps_its_temporary_files(tmp_path):
    (tmp_path / "fastguard-0123456789abcdef.tmp").write_text("precious")
    (tmp_path / "notes.tmp").write_text("precious")
    begun(tmp_path)
    assert len(list(tmp_path.glob("*.tmp"))) == 2


@pytest.mark.parametrize("there", ["train.log", "best.pt", "rates.json", "bad_step_000001.json",
                                   "left_out.jsonl", "checkpoints/mine.txt", "tensorboard/events",
                                   "config.yaml"])  # fmt: skip
def test_what_no_run_wrote_is_not_overwritten(tmp_path, there):
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_text("epochs: 3  # a comment of mine\n")
    with pytest.raises(
        RunError, match=f"has files that a run would overwrite .{there.split('/')[0]}"
    ):
        begun(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [there.split("/")[0]]
    assert (tmp_path / there).read_text() == "epochs: 3  # a comment of mine\n"


def test_a_folder_with_files_of_other_names_takes_a_run(tmp_path):
    (tmp_path / "notes.txt").write_text("precious")
    begun(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "precious"


@pytest.mark.parametrize(
    "name",
    ["checkpoints", "tensorboard", "train.log", "metrics.jsonl", "best.pt", "config.yaml",
     "rates.json", "checkpoints/lock", "wandb", "mlruns", "loggers.json"],
)  # fmt: skip
def test_links_out_of_the_folder_are_refused(tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "step_000000001.pt").write_text("precious")
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    (tmp_path / "run" / name).symlink_to(outside if "." not in name else outside / "new")
    with pytest.raises(RunError, match=f"{name} is a symbolic link.* choose another --run-dir"):
        begun(tmp_path / "run")
    assert [p.name for p in outside.iterdir()] == ["step_000000001.pt"]


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "last.pt", "checkpoints"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(RunError, match=f"{name} is a FIFO"):
        begun(tmp_path)


def test_a_folder_that_is_a_link_itself_takes_a_run(tmp_path):
    """Of a larger disk: that is where the user wants it."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to("disk")
    begun(tmp_path / "run").save(state(1))
    assert (tmp_path / "disk" / "last.pt").exists()


def test_links_in_the_place_of_results_are_replaced(tmp_path):
    (tmp_path / "mine").write_text("precious")
    folder = begun(tmp_path / "run")
    for name in ("hypotheses.jsonl", "alignments.txt", "rates.json", "best.pt"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    folder.save_best(state(1), of_wer(0.5))
    assert (tmp_path / "mine").read_text() == "precious"
    assert not any(p.is_symlink() for p in (tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    "settings",
    ["a: &a [1]\nb: *a", "epochs: [1]", "epochs: 1.5", "[]", "a", "optim: 3",
     "seed: " + "9" * 100_000, "optim: {lr: 'x'}"],
)  # fmt: skip
def test_settings_that_no_run_wrote_are_named(tmp_path, settings):
    begun(tmp_path).save(state(1))
    (tmp_path / "config.yaml").write_text(settings)
    with pytest.raises(RunError, match="was not written by fastguard: ") as caught:
        begun(tmp_path)
    assert len(str(caught.value)) < 500


def test_another_runs_state_goes_on_in_a_new_folder(tmp_path):
    begun(tmp_path / "old").save(state(7))
    sources = ("old", "old/last.pt", "old/checkpoints/step_000000007.pt")
    for i, source in enumerate(sources):
        folder = begun(tmp_path / f"new{i}", resume=str(tmp_path / source))
        assert folder.find_state()["step"] == 7


@pytest.mark.parametrize("again", ["auto", "the same"])
def test_what_was_resumed_from_is_needed_once(tmp_path, again):
    """The new run may be killed before its first state."""
    begun(tmp_path / "old").save(state(7))
    source = str(tmp_path / "old")
    begun(tmp_path / "new", resume=source)
    shutil.rmtree(source)
    folder = begun(tmp_path / "new", resume="auto" if again == "auto" else source)
    assert folder.find_state()["step"] == 7


def test_two_processes_do_not_train_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "_WAIT", 0.0)
    first = begun(tmp_path)
    half_written = tmp_path / "checkpoints" / "step_000000001.pt.tmp"
    half_written.touch()
    with pytest.raises(RunError, match="another process trains in"):
        begun(tmp_path)
    assert half_written.exists()
    first.close()
    begun(tmp_path)


@pytest.mark.parametrize(
    "name, message", [("absent.pt", "cannot be read"), (".", "the folder has no state")]
)
def test_nothing_to_resume_from_is_an_error(tmp_path, name, message):
    with pytest.raises(RunError, match=message):
        RunFolder(tmp_path / "new", Config(resume=str(tmp_path / name))).begin()


def test_weights_alone_are_nothing_to_go_on_with(tmp_path):
    folder = begun(tmp_path / "old")
    weights = {key: state(3)[key] for key in ("model", "config", "tokenizer", "step", "loss")}
    folder.save_best(weights, of_wer(0.5))
    with pytest.raises(RunError, match="has weights, but no state to continue from"):
        begun(tmp_path / "new", resume=str(tmp_path / "old" / "best.pt"))


def test_the_folder_describes_what_it_holds(tmp_path):
    """The list in the module's docstring is that of a run; see also test_train."""
    folder = begun(tmp_path)
    folder.save(state(1))
    folder.save_best(state(1), of_wer(0.5))
    folder.save_averaged(state(1), of_wer(0.5))
    for name in ("config.yaml", "last.pt", "best.pt", "averaged.pt", "checkpoints"):
        assert (tmp_path / name).exists()
        assert name in run_folder.__doc__
