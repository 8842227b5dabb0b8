"""The trainer's wiring: each setting reaches its part, each part is used in the right mode."""

import logging
import signal

import pytest
import torch
import torch.nn.functional as F

import fastguard
from fastguard import checkpoint, trainer
from fastguard.guard import GradGuard
from fastguard.options import parse
from fastguard.speech.batching import Draw
from fastguard.speech.decoding import ErrorRates
from fastguard.speech.loss import ctc_loss
from fastguard.trainer import PlainClip, Trainer

from .recordings import tones, write_manifest
from .test_train import metrics


@pytest.fixture
def make(tmp_path):
    """make("--option", ...) -> a Trainer of the baseline on tones, in fp32 unless told so."""

    def build(*options, data=None):
        run_dir = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        run_dir.mkdir()
        options = ["--model", "baseline", "--precision", "fp32", "--batch-size", "2", *options]
        return Trainer(parse([*options, "--data", data or tones(tmp_path)]), run_dir)

    return build


def test_every_setting_reaches_its_part(make):
    made = make(
        "--stable", "--model", "teacher", "--optim.lr", "0.5", "--optim.betas", "[0.1,0.2]",
        "--optim.eps", "0.3", "--optim.weight_decay", "0.4", "--guard.max_norm", "0.6",
        "--guard.skip_norm", "7", "--guard.patience", "8", "--network.dropout", "0.25",
        "--network.attention_clamp", "9", "--init.linear_std", "0.05",
        "--augment.freq_masks", "3", "--augment.time_ratio", "0.11", "--features.n_mels", "40",
    )  # fmt: skip
    group = made.optimizer.param_groups[0]
    assert [group[k] for k in ("lr", "eps", "weight_decay")] == [0.5, 0.3, 0.4]
    assert tuple(group["betas"]) == (0.1, 0.2)
    assert isinstance(made.stepper, GradGuard)
    assert isinstance(made.optimizer, fastguard.AdamW)
    assert (made.stepper.max_norm, made.stepper.skip_norm, made.stepper.patience) == (0.6, 7, 8)
    assert made.model.config.dropout == 0.25
    assert made.model.blocks[3].attention.clamp == 9
    assert made.model.head.weight.std().item() == pytest.approx(0.05, rel=0.1)
    train, dev = made.train_loader.dataset, made._loader("dev", 1)[1].dataset
    assert (train.augment.spec.freq_masks, train.augment.spec.time_ratio) == (3, 0.11)
    assert dev.augment.spec is None
    assert [len(train), len(dev)] == [4, 2]
    assert train[Draw(0, 1)].features.shape[1] == 40


def test_convolutions_start_scaled(make):
    torch.manual_seed(0)
    plain = make("--init.conv_scale", "1.0").model.layers[0].conv.weight
    half = make("--init.conv_scale", "0.5").model.layers[0].conv.weight
    torch.testing.assert_close(half, plain / 2)


def test_without_the_guard_torch_clips(make):
    made = make("--guard.max_norm", "0.001", "--optim.lr", "1e-9")
    assert isinstance(made.stepper, PlainClip)
    assert type(made.optimizer) is torch.optim.AdamW
    report = made._train_step(next(iter(made.train_loader)), 0)[1]
    grads = [p.grad for p in made.model.parameters()]
    assert torch.nn.utils.get_total_norm(grads).item() == pytest.approx(0.001, rel=1e-3)
    assert report.clip_coef == pytest.approx(0.001 / report.total_norm, rel=1e-3)


def test_rows_that_can_not_be_trained_on_are_left_out(make, tmp_path):
    tones(tmp_path)
    data = write_manifest(tmp_path / "m.jsonl", [
        {"audio_filepath": "tone0.wav", "text": "ab", "split": "train"},
        {"audio_filepath": "tone1.wav", "text": "a" * 20, "split": "train"},  # 26 frames, needs 39
    ])  # fmt: skip
    made = make(data=data)
    assert [r.kind for r in made.corpus.rejected] == ["infeasible target"]
    assert "needs 39 frames" in made.corpus.rejected[0].reason
    assert "has 26" in made.corpus.rejected[0].reason
    with pytest.raises(ValueError, match=r"too long: 1.00 s, over 0.5 s"):
        make("--max-duration", "0.5", data=data)


def test_without_a_dev_split_the_training_split_is_scored_and_said(make, tmp_path, caplog):
    tones(tmp_path)
    logging.getLogger("fastguard").propagate = True
    row = {"audio_filepath": "tone0.wav", "text": "ab", "split": "train"}
    made = make(data=write_manifest(tmp_path / "m.jsonl", [row]))
    assert made.evaluation_split == "train"
    assert "has no dev split" in caplog.text


def test_evaluation_reads_the_dev_split_in_eval_mode_and_training_goes_on_in_train_mode(
    make, monkeypatch
):
    made = make("--epochs", "2")
    modes, scored = [], []
    made.model.register_forward_hook(lambda m, i, o: modes.append((m.training, o[1].tolist())))
    decode = trainer.greedy_decode
    monkeypatch.setattr(
        trainer, "greedy_decode", lambda p, n: scored.append(n.tolist()) or decode(p, n)
    )
    references = []
    rates = trainer.error_rates
    monkeypatch.setattr(trainer, "error_rates", lambda r, h: references.append(r) or rates(r, h))
    made.fit()
    assert [training for training, _ in modes] == [True, True, False] * 2
    assert scored == [lengths for training, lengths in modes if not training]
    assert sorted(references[0]) == sorted(u.text for u in made.corpus.split("dev"))
    assert made.sampler.epoch == 2


def test_best_is_the_lowest_wer_and_last_is_the_last(make, monkeypatch):
    made = make("--epochs", "4", "--stable")
    wers = iter([0.5, 0.7, 0.3, 0.3])
    monkeypatch.setattr(made, "evaluate", lambda split: ErrorRates(next(wers), 0.25, 1, 0, 0, 0))
    made.fit()
    last = checkpoint.load(made.run_dir / "last.pt")
    assert last["step"] == 8
    assert last["epoch"] == 4
    assert last["optimizer"]["state"]
    assert last["guard"]["steps"] == 8
    assert checkpoint.load(made.run_dir / "best.pt")["step"] == 6
    epochs = metrics(made.run_dir, "epoch")
    assert [e["wer"] for e in epochs] == [0.5, 0.7, 0.3, 0.3]
    assert {e["cer"] for e in epochs} == {0.25}
    seconds = [s["seconds"] for s in metrics(made.run_dir, "step")]
    assert sum(seconds) <= sum(e["seconds"] for e in epochs)


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision(make, precision, dtype):
    made = make("--precision", precision)
    seen = []
    made.model.head.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    made._train_step(next(iter(made.train_loader)), 0)
    made.evaluate("dev")
    assert set(seen) == {dtype}


def test_signals_stop_once_and_interrupt_twice(make):
    made = make()
    before = signal.getsignal(signal.SIGINT)
    with made._stop_on_interrupt():
        signal.raise_signal(signal.SIGINT)
        assert made.stopping
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
