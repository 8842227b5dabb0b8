"""The trainer's wiring: each setting reaches its part, each part is used in the right mode."""

import json
import shutil
import signal
from fractions import Fraction

import pytest
import torch

import fastguard
from fastguard import thresholds
from fastguard.guard import GradGuard
from fastguard.speech.data.sampler import Draw
from fastguard.speech.recognition.evaluation import Evaluation, score
from fastguard.speech.reporting.run_history import read
from fastguard.speech.storage import checkpoint
from fastguard.speech.training import agreement
from fastguard.speech.training.run_folder import RunError
from fastguard.speech.training.stepper import PlainClip
from tests.recordings import tones, write_manifest

from .folders import of_wer
from .test_train import metrics


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
        (20, 200, 40 / 60)
    }
    assert epochs[0]["wer_long"] == epochs[0]["wer"]
    seconds = [s["seconds"] for s in metrics(run_dir, "step")]
    assert sum(seconds) <= sum(e["seconds"] for e in epochs)

    kept = [checkpoint.load(path) for path in made.folder.best()]
    by_loss = sorted(epochs[2:], key=lambda e: e["loss"])
    assert [state["step"] for state in kept] == [e["step"] for e in by_loss]
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
    micro_batches = [next(iter(made.loader))]

    def averaged():
        return {name: v.clone() for name, v in made.learner.ema.module.state_dict().items()}

    for _ in range(2):  # the first only copies
        made._train_step(micro_batches, 0.0)
    before = averaged()
    assert not torch.equal(before["head.weight"], made.learner.model.head.weight)
    healthy = micro_batches[0].features.clone()
    micro_batches[0].features[0, 0, 0] = float("nan")
    made._train_step(micro_batches, 0.0)
    assert all(torch.equal(v, before[name]) for name, v in averaged().items())
    micro_batches[0].features.copy_(healthy)
    made._train_step(micro_batches, 0.0)
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


def test_a_warm_up_longer_than_a_fifth_of_the_run_is_cut_and_said(make, caplog):
    caplog.set_level("INFO", "fastguard")
    options = ("--optim.warmup", "500", "--optim.lr", "1", "--epochs", "10", "--batch-size", "1")
    for more, steps in (
        ((), 40),
        (("--max-steps", "15"), 15),
        (("--grad-accumulation", "3"), 20),
    ):
        caplog.clear()
        made = make(*options, *more)
        warmup = steps // 5
        made.progress.step = warmup - 2
        made._set_learning_rate()
        assert made.optimizer.param_groups[0]["lr"] == pytest.approx((warmup - 1) / warmup)
        text = f"Warm-up of {warmup} steps, not optim.warmup=500: at most a fifth of the run's"
        assert f"{text} {steps} steps" in caplog.text
    caplog.clear()
    made = make(*options, "--optim.warmup", "8")
    made.progress.step = 3
    made._set_learning_rate()
    assert made.optimizer.param_groups[0]["lr"] == 0.5
    assert "Warm-up" not in caplog.text


def test_averaged_weights_soon_forget_the_initial_ones(make):
    made = make("--ema", "0.999", "--stable", "--optim.lr", "0.1", "--optim.warmup", "0")
    weight = made.learner.model.head.weight
    micro_batches = [next(iter(made.loader))]
    for number, decay in enumerate((0.0, 2 / 11, 3 / 12)):
        before = made.learner.ema.module.head.weight.clone()
        made._train_step(micro_batches, 0.0)
        expected = decay * before + (1 - decay) * weight
        torch.testing.assert_close(made.learner.ema.module.head.weight, expected)
        assert made.learner.ema.n_averaged == number + 1


def test_an_epoch_that_recognises_no_whole_word_is_not_best_where_later_ones_have_fewer_errors(
    make, monkeypatch
):
    """With two dev utterances the WER is 1 in all four epochs."""
    made = make("--epochs", "4", "--checkpoint.keep_best", "1")
    texts = iter(["", "xx xx", "xx xb", "ax xx"])

    def evaluate(model):
        recognised = next(texts)
        return Evaluation([score(f"utt{i}", "ab ab", recognised) for i in range(2)])

    monkeypatch.setattr(made, "evaluate", evaluate)
    made.fit()
    epochs = metrics(made.folder.path, "epoch")
    assert [e["wer"] for e in epochs] == [1.0] * 4
    assert epochs[2]["cer"] == epochs[3]["cer"] < epochs[1]["cer"] < epochs[0]["cer"]
    expected = min(epochs[2:], key=lambda e: e["loss"])
    assert checkpoint.load(made.folder.path / "best.pt")["step"] == expected["step"]
    assert read(made.folder.path).best.metrics.epoch == expected["epoch"]


def test_a_dev_split_that_says_little_is_told(make, tmp_path, caplog):
    make()
    text = "best.pt is chosen by the CER of 2 dev utterances with 2 words, because fewer than 20"
    assert text in caplog.text
    caplog.clear()
    rows = [{"audio_filepath": "tone0.wav", "text": "ab", "split": "train"}]
    for i in range(20):
        shutil.copy(tmp_path / "tone1.wav", tmp_path / f"dev{i}.wav")
        rows.append({"audio_filepath": f"dev{i}.wav", "text": "ba", "split": "dev"})
    make(data=write_manifest(tmp_path / "many.jsonl", rows))
    assert "best.pt is chosen" not in caplog.text


def test_accumulated_batches_take_the_step_of_one_large_batch(make):
    """The same loss per frame, up to the statistics of BatchNorm, which are held here."""
    moments, steps = [], []
    for options in (("--batch-size", "4"), ("--batch-size", "1", "--grad-accumulation", "4")):
        for guard in ("true", "false"):
            made = make(*options, "--guard.enabled", guard, "--guard.max_norm", "1e9",
                        "--network.dropout", "0", "--augment.freq_masks", "0",
                        "--augment.time_masks", "0", "--optim.lr", "1e-12")  # fmt: skip
            made.learner.model.eval()
            micro_batches = list(made.loader)
            made._train_step(micro_batches, 0.0)
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
    with pytest.raises(RunError, match=r"--teacher .*absent\.pt cannot be read"):
        make("--teacher", str(tmp_path / "absent.pt"))


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
