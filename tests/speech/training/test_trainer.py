"""The trainer's wiring: each setting reaches its part, each part is used in the right mode."""

import json
import signal
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fastguard
from fastguard import thresholds
from fastguard.guard import GradGuard
from fastguard.speech.data.batching import collate
from fastguard.speech.data.readers import Rejected
from fastguard.speech.data.sampler import Draw
from fastguard.speech.storage import checkpoint
from fastguard.speech.training import agreement, journal
from fastguard.speech.training.distillation import distillation_loss
from fastguard.speech.training.loss import ctc_loss
from fastguard.speech.training.metrics import StepMetrics
from fastguard.speech.training.options import parse
from fastguard.speech.training.parallel import Parallel
from fastguard.speech.training.run_folder import RunError, RunFolder
from fastguard.speech.training.stepper import PlainClip
from fastguard.speech.training.tracking import Curves
from fastguard.speech.training.trainer import Trainer
from tests.recordings import tones, write_manifest

from .test_run_folder import of_wer
from .test_train import metrics


@pytest.fixture
def make(tmp_path):
    """make("--option", ...) -> a Trainer of the baseline on tones, in fp32 unless told so."""

    def build(*options, data=None):
        run_dir = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        run_dir.mkdir()
        options = ["--model", "baseline", "--precision", "fp32", "--batch-size", "2", *options]
        config = parse([*options, "--data", data or tones(tmp_path)])
        folder = RunFolder(run_dir, config)
        folder.begin()
        return Trainer(config, folder, Parallel())

    return build


def train_step(made):
    """The report of a step with the first batch."""
    reports, step = [], made.stepper.step
    made.stepper.step = lambda *a, **k: reports.append(step(*a, **k)) or reports[-1]
    made._train_step([next(iter(made.loader))], 0.0)
    return reports[0]


def test_every_setting_reaches_its_part(make):
    made = make(
        "--stable", "--model", "teacher", "--optim.lr", "0.5", "--optim.betas", "[0.1,0.2]",
        "--optim.eps", "0.3", "--optim.weight_decay", "0.4", "--guard.max_norm", "0.6",
        "--guard.skip_norm", "7", "--guard.patience", "8", "--network.dropout", "0.25",
        "--network.attention_clamp", "9", "--init.linear_std", "0.05",
        "--augment.freq_masks", "3", "--augment.time_ratio", "0.11", "--features.n_mels", "40",
        "--network.attention_dropout", "0.125", "--guard.threshold", "median", "--seed", "9",
        "--augment.speeds", "[0.8]", "--ema", "0.75", "--features.normalization", "level",
        "--augment.warmup", "3", "--consistency.weight", "0.2",
    )  # fmt: skip
    group = made.optimizer.param_groups[0]
    assert [group[k] for k in ("lr", "eps", "weight_decay")] == [0.5, 0.3, 0.4]
    assert tuple(group["betas"]) == (0.1, 0.2)
    assert isinstance(made.stepper, GradGuard)
    assert isinstance(made.optimizer, fastguard.AdamW)
    assert (made.stepper.max_norm, made.stepper.skip_norm, made.stepper.patience) == (0.6, 7, 8)
    assert made.learner.model.config.dropout == 0.25
    assert made.learner.model.blocks[3].attention.clamp == 9
    assert made.learner.model.head.weight.std().item() == pytest.approx(0.05, rel=0.1)
    assert made.learner.model.blocks[3].attention.dropout == 0.125
    assert isinstance(made.stepper.threshold, thresholds.RunningMedian)
    train = made.loader.dataset
    dev = made.data.evaluation_loader("dev", made.parallel).dataset
    assert [train.seed, train.augment.speed.ratios] == [9, [Fraction(4, 5)]]
    assert (train.augment.spec.freq_masks, train.augment.spec.time_ratio) == (3, 0.11)
    assert (train.augment.warmup, train.augment.two_views) == (3, True)
    assert [train[Draw(0, epoch)].second_view is None for epoch in (3, 4)] == [True, False]
    assert dev.augment.spec is None
    assert not dev.augment.two_views
    assert train.log_mel.normalization == dev.log_mel.normalization == "level"
    assert [len(train), len(dev)] == [4, 2]
    assert train[Draw(0, 1)].features.shape[1] == 40


def test_convolutions_start_scaled(make):
    torch.manual_seed(0)
    plain = make("--init.conv_scale", "1.0").learner.model.layers[0].conv.weight
    half = make("--init.conv_scale", "0.5").learner.model.layers[0].conv.weight
    torch.testing.assert_close(half, plain / 2)


def test_without_the_guard_torch_clips(make):
    made = make("--guard.max_norm", "0.001", "--optim.lr", "1e-9")
    assert isinstance(made.stepper, PlainClip)
    assert type(made.optimizer) is torch.optim.AdamW
    report = train_step(made)
    grads = [p.grad for p in made.learner.model.parameters()]
    assert torch.nn.utils.get_total_norm(grads).item() == pytest.approx(0.001, rel=1e-3)
    assert report.clip_coef == pytest.approx(0.001 / report.total_norm, rel=1e-3)


def test_rows_that_can_not_be_trained_on_are_left_out(make, tmp_path):
    tones(tmp_path)
    data = write_manifest(tmp_path / "m.jsonl", [
        {"audio_filepath": "tone0.wav", "text": "ab", "split": "train"},
        {"audio_filepath": "tone1.wav", "text": "a" * 20, "split": "train"},  # 26 frames, needs 39
    ])  # fmt: skip
    made = make(data=data)
    assert [r.kind for r in made.data.corpus.rejected] == ["infeasible target"]
    assert "needs 39 frames" in made.data.corpus.rejected[0].reason
    assert "has 26" in made.data.corpus.rejected[0].reason
    with pytest.raises(ValueError, match=r"too long: 1.00 s, over 0.5 s"):
        make("--max-duration", "0.5", data=data)


def test_without_a_dev_split_the_training_split_is_scored_and_said(make, tmp_path, caplog):
    tones(tmp_path)
    row = {"audio_filepath": "tone0.wav", "text": "ab", "split": "train"}
    made = make(data=write_manifest(tmp_path / "m.jsonl", [row]))
    assert made.evaluator.split == "train"
    assert "has no dev split" in caplog.text


def test_evaluation_reads_the_dev_split_in_eval_mode_and_training_goes_on_in_train_mode(
    make, monkeypatch
):
    made = make("--epochs", "2", "--checkpoint.keep_best", "1")
    modes, found = [], []
    made.learner.model.register_forward_hook(lambda m, i, o: modes.append(m.training))
    evaluate = made.evaluate
    monkeypatch.setattr(made, "evaluate", lambda m: found.append(evaluate(m)) or found[-1])
    made.fit()
    assert modes == [True, True, False] * 2
    dev = {u.id: u for u in made.data.corpus.split("dev")}
    assert {row.id: row.reference for row in found[0].rows} == {i: u.text for i, u in dev.items()}
    assert {row.id: row.duration for row in found[0].rows} == dict.fromkeys(dev, 1.0)
    assert made.sampler.epoch == 2


@pytest.mark.parametrize("mean", [0.2, 0.4])
def test_best_is_the_lowest_wer_and_last_is_the_last(make, monkeypatch, mean):
    made = make("--epochs", "4", "--stable", "--checkpoint.keep_best", "2")
    wers = iter([0.5, 0.7, 0.3, 0.3, mean])
    monkeypatch.setattr(made, "evaluate", lambda model: of_wer(next(wers)))
    made.fit()
    run_dir = made.folder.path
    last = checkpoint.load(run_dir / "last.pt")
    assert last["step"] == 8
    assert last["epoch"] == 4
    assert last["optimizer"]["state"]
    assert last["guard"]["steps"] == 8
    epochs = metrics(run_dir, "epoch")
    assert [e["wer"] for e in epochs] == pytest.approx([0.5, 0.7, 0.3, 0.3])
    assert {(e["dev_utterances"], e["dev_words"], e["dev_minutes"]) for e in epochs} == {
        (1, 10, 2 / 60)
    }
    assert epochs[0]["wer_long"] == epochs[0]["wer"]
    seconds = [s["seconds"] for s in metrics(run_dir, "step")]
    assert sum(seconds) <= sum(e["seconds"] for e in epochs)

    kept = [checkpoint.load(path) for path in made.folder.best()]
    assert [state["step"] for state in kept] == [6, 8]
    averaged, best = (checkpoint.load(run_dir / f"{n}.pt") for n in ("averaged", "best"))
    expected = (kept[0]["model"]["head.weight"] + kept[1]["model"]["head.weight"]) / 2
    torch.testing.assert_close(averaged["model"]["head.weight"], expected)
    chosen = averaged if mean < 0.3 else kept[0]
    assert torch.equal(best["model"]["head.weight"], chosen["model"]["head.weight"])
    rates = json.loads((run_dir / "rates.json").read_text())
    assert rates["wer"] == pytest.approx(min(mean, 0.3))


def test_the_averaged_weights_are_evaluated_and_kept(make):
    made = make("--epochs", "1", "--ema", "0.5", "--stable", "--optim.lr", "0.1")
    made.fit()
    best = checkpoint.load(made.folder.path / "best.pt")["model"]
    for name, value in made.learner.ema.module.state_dict().items():
        assert torch.equal(best[name], value)
    assert not torch.equal(best["head.weight"], made.learner.model.head.weight)


def test_a_skipped_step_does_not_move_the_averaged_weights(make):
    made = make("--ema", "0.5", "--stable", "--optim.lr", "0.1", "--optim.warmup", "0")
    window = [next(iter(made.loader))]

    def averaged():
        return {name: v.clone() for name, v in made.learner.ema.module.state_dict().items()}

    for _ in range(2):  # the first only copies
        made._train_step(window, 0.0)
    before = averaged()
    assert not torch.equal(before["head.weight"], made.learner.model.head.weight)
    healthy = window[0].features.clone()
    window[0].features[0, 0, 0] = float("nan")
    made._train_step(window, 0.0)
    assert all(torch.equal(v, before[name]) for name, v in averaged().items())
    window[0].features.copy_(healthy)
    made._train_step(window, 0.0)
    assert not torch.equal(averaged()["head.weight"], before["head.weight"])


def test_cosine_comes_down_with_the_epochs_and_with_the_steps(make):
    """Whichever ends the run."""
    options = ("--optim.schedule", "cosine", "--optim.lr", "1", "--optim.warmup", "0")

    def rate(made, epoch, number, step):
        made.progress.step, made.progress.batches = step, number
        made.progress.epochs = [None] * (epoch - 1)
        made._set_learning_rate()
        return made.optimizer.param_groups[0]["lr"]

    by_epochs = make(*options, "--epochs", "50", "--max-steps", "1000000")
    last = len(by_epochs.sampler) - 1
    assert rate(by_epochs, 1, 0, 0) == pytest.approx(1.0)
    assert rate(by_epochs, 26, 0, 25 * (last + 1)) == pytest.approx(0.5)
    assert rate(by_epochs, 50, last, 50 * (last + 1) - 1) < 1e-3
    by_steps = make(*options, "--epochs", "1000", "--max-steps", "100")
    assert rate(by_steps, 1, 0, 50) == pytest.approx(0.5)
    assert rate(by_steps, 1, 0, 99) < 1e-3


def test_accumulated_batches_take_the_step_of_one_large_batch(make):
    """The same loss per frame, up to the statistics of BatchNorm, which are held here."""
    moments, steps = [], []
    for options in (("--batch-size", "4"), ("--batch-size", "1", "--grad-accumulation", "4")):
        for guard in ("true", "false"):
            made = make(*options, "--guard.enabled", guard, "--guard.max_norm", "1e9",
                        "--network.dropout", "0", "--augment.freq_masks", "0",
                        "--augment.time_masks", "0", "--optim.lr", "1e-12")  # fmt: skip
            made.learner.model.eval()
            window = list(made.loader)
            made._train_step(window, 0.0)
            moments.append(made.optimizer.state[made.learner.model.head.weight]["exp_avg"])
            steps.append(made.progress.totals)
    for totals in steps[1:]:
        assert totals.losses == pytest.approx(steps[0].losses, rel=1e-5)
        assert totals.norms == pytest.approx(steps[0].norms, rel=1e-4)
    for exp_avg in moments[1:]:
        torch.testing.assert_close(exp_avg, moments[0], rtol=1e-3, atol=1e-6)


def test_a_recording_that_breaks_after_the_check_is_left_out_and_named(make, tmp_path, caplog):
    made = make("--epochs", "1", "--batch-size", "1")
    (tmp_path / "tone0.wav").unlink()
    made.fit()
    assert "Left out tone0.wav" in caplog.text
    assert made.progress.step == 3
    assert len(metrics(made.folder.path, "step")) == 3
    made = make("--epochs", "1", "--batch-size", "4")
    (tmp_path / "tone0.wav").unlink()
    made.fit()
    (step,) = metrics(made.folder.path, "step")
    assert step["left_out_utterances"] == ["tone0.wav"]


def test_the_student_learns_from_the_teacher_too(make, tmp_path):
    teacher = make("--epochs", "1", "--seed", "5")
    teacher.fit()
    options = ("--network.dropout", "0", "--augment.freq_masks", "0", "--augment.time_masks", "0")
    path = str(teacher.folder.path)
    losses = {}
    for weight in ("0", "0.25", "1"):
        made = make("--teacher", path, "--distill.weight", weight, *options)
        made.learner.model.eval()
        batch = next(iter(made.loader))
        losses[weight] = made.learner.loss(batch)[0].item()
        ours, lengths = made.learner.model(batch.features, batch.feature_lengths)
        theirs, _ = made.learner.teacher(batch.features, batch.feature_lengths)
    distance = distillation_loss(ours, theirs, lengths, 2.0).item()
    ctc = ctc_loss(ours, lengths, batch.targets, batch.target_lengths).item()
    assert losses["0"] == pytest.approx(ctc)
    assert losses["1"] == pytest.approx(distance)
    assert losses["0.25"] == pytest.approx(0.75 * ctc + 0.25 * distance)
    assert distance > 0


def test_two_views_are_to_be_heard_alike(make):
    losses = {}
    for weight in ("0.5", "2"):
        made = make("--consistency.weight", weight, "--network.dropout", "0")
        made.learner.model.eval()
        batch = next(iter(made.loader))
        losses[weight], frames = made.learner.loss(batch)
        log_probs, lengths = made.learner.model(batch.features, batch.feature_lengths)
    assert batch.views == 2
    assert frames == lengths.sum()
    ctc = ctc_loss(log_probs, lengths, batch.targets, batch.target_lengths).item()
    first, second = log_probs.chunk(2)
    there = distillation_loss(first, second, lengths.chunk(2)[0]).item()
    back = distillation_loss(second, first, lengths.chunk(2)[0]).item()
    assert there > 0
    for weight, loss in losses.items():
        assert loss.item() == pytest.approx(ctc + float(weight) * (there + back) / 2)
    assert next(iter(make().loader)).views == 1


def test_a_teacher_of_other_features_is_refused(make, tmp_path):
    teacher = make("--epochs", "1", "--features.n_mels", "40")
    teacher.fit()
    with pytest.raises(RunError, match="n_mels=40"):
        make("--teacher", str(teacher.folder.path))
    with pytest.raises(RunError, match=r"trained on texts by .*numbers='keep'.*numbers='reject'"):
        make(
            "--teacher",
            str(teacher.folder.path),
            "--features.n_mels",
            "40",
            "--text.numbers",
            "reject",
        )
    with pytest.raises(RunError, match=r"--teacher .*absent\.pt can not be read"):
        make("--teacher", str(tmp_path / "absent.pt"))


def test_curves_for_tensorboard(make, monkeypatch):
    made = make("--epochs", "1", "--stable", "--batch-size", "1")
    monkeypatch.setattr(journal, "_NORMS_EVERY", 1)
    made.fit()
    events = EventAccumulator(str(made.folder.path / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    steps = metrics(made.folder.path, "step")
    for name in ("loss", "norm_before_clip", "norm_after_clip", "clip_coef", "skips", "lr",
                 "seconds_per_step"):  # fmt: skip
        assert f"train/{name}" in tags
    before = [e.value for e in events.Scalars("train/norm_before_clip")]
    after = [e.value for e in events.Scalars("train/norm_after_clip")]
    assert before == pytest.approx([s["grad_norm"] for s in steps], rel=1e-6)
    assert after == pytest.approx([0.5] * len(steps), rel=1e-4)  # all are clipped here
    assert {"epoch/wer", "epoch/cer", "norms/head.weight"} <= set(tags)


def test_curves_of_a_run_that_goes_on(tmp_path):
    step = StepMetrics(3, 1, 2, 1.0, 1.0, 1.0, "skip_nonfinite", 0.1, 0.1)
    for skips in (0, 5):  # the first was killed before it had a state
        curves = Curves(tmp_path, 0 if skips == 0 else 2, skips)
        curves.write(step)
        curves.close()
        if skips == 0:  # of one second and one process, files are read in the order of ".10", ".9"
            (file,) = tmp_path.iterdir()
            file.rename(file.with_name(file.name.replace("tfevents.", "tfevents.0")))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.value for e in events.Scalars("train/skips")] == [6]


def test_a_batch_of_nothing_teaches_nothing(make):
    made = make()
    made.learner.model.train()
    before = {name: value.clone() for name, value in made.learner.model.state_dict().items()}
    loss, frames = made.learner.loss(collate([Rejected("a", "gone")], n_mels=80))
    loss.backward()
    assert (loss.item(), frames) == (0.0, 0)
    assert made.learner.model.training
    assert all(not p.grad.any() for p in made.learner.model.parameters())
    for name, value in made.learner.model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision(make, precision, dtype):
    made = make("--precision", precision)
    seen = []
    made.learner.model.head.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    train_step(made)
    made.evaluate(made.learner.model)
    assert set(seen) == {dtype}


@pytest.mark.parametrize("guarded", ["true", "false"])
def test_a_search_for_a_loss_scale_is_in_the_metrics(make, guarded):
    made = make("--precision", "fp16", "--guard.enabled", guarded)
    made.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    recorded = []
    made.journal.write = recorded.append
    report = train_step(made)
    assert report.scale_search == (guarded == "true")
    assert recorded[0].scale_search == report.scale_search
    assert recorded[0].loss_scale == (2.0**40 if guarded == "true" else None)
    assert made.scaler.get_scale() == 2.0**39


def test_signals_stop_once_and_interrupt_twice(make, monkeypatch):
    made = make()
    before = signal.getsignal(signal.SIGINT)
    with made.agreement.stop_on_signals():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # torchrun sends one more
        made.agreement.agree()
        assert made.stopping
        monkeypatch.setattr(agreement, "_ONE_SIGNAL", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctc_loss_is_per_frame_in_fp32_and_infinite_where_no_alignment_exists():
    torch.manual_seed(0)
    log_probs = torch.randn(2, 9, 5).log_softmax(-1)
    lengths, targets = torch.tensor([9, 6]), torch.tensor([1, 2, 2, 4])
    target_lengths = torch.tensor([3, 1])
    with torch.autocast("cpu", torch.bfloat16):
        loss = ctc_loss(log_probs, lengths, targets, target_lengths)
    one = F.ctc_loss(
        log_probs[0, :9, None].double(), targets[None, :3], (9,), (3,), reduction="sum"
    )
    two = F.ctc_loss(
        log_probs[1, :6, None].double(), targets[None, 3:], (6,), (1,), reduction="sum"
    )
    assert loss.item() == pytest.approx(((one + two) / 15).item(), rel=1e-5)
    assert ctc_loss(log_probs, torch.tensor([3, 6]), targets, target_lengths).item() == float("inf")
