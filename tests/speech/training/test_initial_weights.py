"""Fine-tuning with --init-from: what is taken, what begins anew, and what is refused."""

import functools
import math
import re
import shutil

import pytest
import torch

from fastguard.speech.cli.train import main
from fastguard.speech.recognition.recognizer import Recognizer
from fastguard.speech.storage import checkpoint, weights
from fastguard.speech.training.options import parse
from fastguard.speech.training.run_folder import RunError
from tests.recordings import MEMORISING, eight_prompts, tones, write_manifest

from .test_resume import Killed, kill_at, story
from .test_train import metrics

FP32 = ["--precision", "fp32", "--batch-size", "2"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The folder of a finished run on tones, with features that are not the default."""
    folder = tmp_path_factory.mktemp("source")
    options = ["--model", "baseline", "--features.n_mels", "40", "--optim.lr", "1e-3", *FP32]
    data = tones(folder)
    assert main([*options, "--data", data, "--epochs", "1", "--run-dir", str(folder / "run")]) == 0
    return folder / "run"


def other_corpus(folder, *texts):
    """The spec of tones with these texts, each in train and the first in dev."""
    tones(folder, 4)
    rows = [{"audio_filepath": f"tone{i}.wav", "text": t, "split": "train"}
            for i, t in enumerate(texts)]  # fmt: skip
    rows.append({"audio_filepath": "tone3.wav", "text": texts[0], "split": "dev"})
    return write_manifest(folder / "other.jsonl", rows)


def exported(source, folder):
    recognizer = Recognizer.load(source / "best.pt")
    path = folder / "model.safetensors"
    config = recognizer.config.to_dict()
    weights.save(path, recognizer.model, recognizer.tokenizer.to_dict(), config)
    return path


@pytest.mark.parametrize("kind", ["folder", "best.pt", "last.pt", "safetensors"])
def test_weights_and_statistics_are_taken_and_the_rest_begins_anew(
    make, source, tmp_path, caplog, kind
):
    caplog.set_level("INFO", "fastguard")
    given = {"folder": source, "safetensors": exported(source, tmp_path)}.get(kind, source / kind)
    made = make("--init-from", str(given))
    read = source / ("last.pt" if kind == "last.pt" else "best.pt")
    theirs, ours = checkpoint.load(read)["model"], made.learner.model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert ours["norm.num_batches_tracked"] > 0
    assert not made.optimizer.state
    assert (made.progress.step, made.progress.epoch) == (0, 1)
    assert made.stepper.state_dict()["steps"] == 0
    assert made.config.init_from == given
    (line,) = [message for message in caplog.messages if message.startswith("Weights of")]
    path = source / "best.pt" if kind == "folder" else given
    encoder = sum(not name.startswith("head.") for name in theirs)
    assert line.startswith(f"Weights of {path} (SHA-256 ")
    assert f"all {encoder} tensors of the encoder and the rows of 29 of the head's 29" in line
    assert "new are" not in line


def test_symbols_that_both_have_keep_their_rows(make, source, tmp_path, caplog):
    caplog.set_level("INFO", "fastguard")
    data = other_corpus(tmp_path, "äb", "b ß", "ab")
    made = make("--init-from", str(source), "--epochs", "1", data=data)
    theirs = Recognizer.load(source / "best.pt")
    assert made.tokenizer.symbols == [*theirs.tokenizer.symbols, "ß", "ä"]
    trained, head = theirs.model.head, made.learner.model.head
    assert torch.equal(head.weight[:29], trained.weight)
    assert torch.equal(head.bias[:29], trained.bias)
    torch.testing.assert_close(head.bias[29:], trained.bias[1:].mean().expand(2))
    spread = head.weight[29:] - trained.weight[1:].mean(0)
    assert spread.std().item() == pytest.approx(made.config.init.linear_std, rel=0.2)
    assert "the rows of 29 of the head's 31 symbols are taken, new are ß ä;" in caplog.text
    made.fit()
    assert "ß" in checkpoint.load(made.folder.path / "last.pt")["tokenizer"]["symbols"]
    # A corpus with fewer symbols keeps those of its source, and so all that was learnt.
    again = make("--init-from", str(made.folder.path))
    assert again.tokenizer.symbols == made.tokenizer.symbols


def test_pieces_are_kept_as_long_as_they_spell_the_texts(make, source, tmp_path):
    pieces = ("--tokenizer.kind", "bpe", "--tokenizer.vocab_size", "6")
    first = make("--init-from", str(source), "--epochs", "1", *pieces)
    letters = {s: i for i, s in enumerate(Recognizer.load(source / "best.pt").tokenizer.symbols)}
    known = [(row, letters[s]) for row, s in enumerate(first.tokenizer.symbols) if s in letters]
    assert len(known) >= 3  # the blank, a and b
    trained = Recognizer.load(source / "best.pt").model.head.weight
    for row, old in known:
        assert torch.equal(first.learner.model.head.weight[row], trained[old])
    first.fit()
    same = make("--init-from", str(first.folder.path), data=other_corpus(tmp_path, "ab", "baba"))
    assert same.config.tokenizer == first.config.tokenizer
    assert same.tokenizer.symbols == first.tokenizer.symbols
    other = make("--init-from", str(first.folder.path), "--tokenizer.vocab_size", "7",
                 data=other_corpus(tmp_path, "ab", "cab"))  # fmt: skip
    assert "c" in other.tokenizer.symbols


def test_model_features_and_tokenizer_are_those_of_the_source_unless_given(source, tmp_path):
    config = parse(["--init-from", str(source), "--guarded"])
    assert (config.model, config.features.n_mels) == ("baseline", 40)
    assert config.features.normalization == "speech"  # which guarded.yaml alone would change
    assert config.optim.lr == parse(["--model", "baseline", "--guarded"]).optim.lr
    assert config.init_from == source
    given = parse(["--init-from", str(source), "--tokenizer.kind", "bpe", "--model", "teacher"])
    assert (given.model, given.tokenizer.kind) == ("teacher", "bpe")
    (tmp_path / "mine.yaml").write_text(f"init_from: {source}\nfeatures: {{n_mels: 80}}\n")
    in_file = parse(["--config", str(tmp_path / "mine.yaml")])
    assert (in_file.model, in_file.features.n_mels) == ("baseline", 80)
    (tmp_path / "saved.yaml").write_text(config.to_yaml())
    assert parse(["--config", str(tmp_path / "saved.yaml")]) == config


@pytest.mark.parametrize(
    "options, message",
    [
        (["--features.n_mels", "80"],
         r"trained on features\.n_mels=40, and these settings say 80: .* --features\.n_mels 40"),
        (["--features.normalization", "level"], r"features\.normalization=speech, and .* level"),
        (["--model", "teacher"],
         r"is a baseline of 15\.\d M parameters, and these settings train a teacher of 41\.\d M "),
    ],
)  # fmt: skip
def test_a_model_or_features_that_do_not_fit_are_refused(make, source, options, message):
    with pytest.raises(RunError, match=message):
        make("--init-from", str(source), *options)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("absent.pt", None, r"--init-from .*absent\.pt cannot be read"),
        ("empty", "folder", r"--init-from .*empty has no checkpoint"),
        ("text.pt", "text", r"--init-from .*text\.pt cannot be read"),
        ("text.safetensors", "text", r"--init-from .*text\.safetensors cannot be read"),
    ],
)
def test_a_source_that_can_not_be_read_is_named(tmp_path, capsys, name, content, message):
    if content == "folder":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit, match="2"):
        parse(["--init-from", str(tmp_path / name)])
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert "Traceback" not in error


def test_a_run_goes_on_without_its_source(source, tmp_path, monkeypatch):
    """Also over the epoch from which on the encoder learns, bit for bit."""
    shutil.copy(source / "best.pt", tmp_path / "source.pt")
    data = other_corpus(tmp_path, "ä", "b", "ab")
    options = ["--init-from", str(tmp_path / "source.pt"), "--freeze-encoder", "1", "--epochs", "2",
               "--stable", "--checkpoint.steps", "1", "--data", data, *FP32]  # fmt: skip
    assert main([*options, "--run-dir", str(tmp_path / "whole")]) == 0
    assert len(metrics(tmp_path / "whole", "step")) == 4
    killed = [*options, "--run-dir", str(tmp_path / "killed")]
    for step in (0, 1, -1, 2, 3):
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            with pytest.raises(Killed):
                main(killed)
        if step == 1:
            (tmp_path / "source.pt").unlink()
    assert main(killed) == 0
    assert story(tmp_path / "killed") == story(tmp_path / "whole")


@pytest.mark.parametrize("guarded", ["true", "false"])
def test_a_frozen_encoder_keeps_its_weights_and_statistics(make, source, caplog, guarded):
    caplog.set_level("INFO", "fastguard")
    options = ("--init-from", str(source), "--freeze-encoder", "1", "--optim.lr", "0.01")
    made = make(*options, "--epochs", "1", "--guard.enabled", guarded)
    theirs = checkpoint.load(source / "best.pt")["model"]

    def changed():
        ours = made.learner.model.state_dict()
        return {name for name, value in theirs.items() if not torch.equal(ours[name], value)}

    made.fit()
    assert changed() == {"head.weight", "head.bias"}
    assert len(made.optimizer.state) == 2
    assert "Only the head learns until the end of epoch 1" in caplog.text
    made.config.epochs = 2
    made.fit()
    assert changed() == set(theirs)
    assert "The whole model learns from now on" in caplog.text
    if guarded == "true":  # the norms of the head alone are forgotten
        assert made.stepper.state_dict()["statistics"]["seen"] == 2
        assert made.stepper.state_dict()["steps"] == 4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_model_is_frozen_and_thawed_too(make, source, monkeypatch, precision):
    """Its weights after each epoch are those of the model that is not compiled, bit for bit.

    The graphs are those of torch.compile; they run without Inductor, whose C++ takes minutes.
    """
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    # Products of another library, which only eager training has, round in another way.
    monkeypatch.setattr("fastguard.speech.models.linear.has_faster_products", lambda: False)
    options = ["--init-from", str(source), "--freeze-encoder", "1", "--epochs", "2",
               "--precision", precision]  # fmt: skip
    plain = weights_of_epochs(make(*options))
    assert not graphs
    compiled = weights_of_epochs(make(*options, "--compile", "true"))
    assert len(graphs) >= 2  # with and without gradients of the encoder
    theirs = checkpoint.load(source / "best.pt")["model"]
    for name, before in theirs.items():
        assert torch.equal(compiled[0][name], before) != name.startswith("head.")
        assert not torch.equal(compiled[1][name], before)
    for ours, expected in zip(compiled, plain, strict=True):
        assert all(torch.equal(ours[name], expected[name]) for name in theirs)


def weights_of_epochs(made):
    """The weights after each epoch of a whole run."""
    kept, evaluate = [], made.evaluate

    def evaluated(model):
        kept.append({name: value.clone() for name, value in model.state_dict().items()})
        return evaluate(model)

    made.evaluate = evaluated
    made.config.checkpoint.keep_best = 1  # without an evaluation of their mean
    made.fit()
    return kept


def test_a_frozen_encoder_has_no_dropout(make, source):
    made = make("--init-from", str(source), "--freeze-encoder", "1", "--network.dropout", "0.5")
    made._set_frozen()
    made.learner.train()
    batch = next(iter(made.loader))
    model = made.learner.model
    first, again = (model(batch.features, batch.feature_lengths)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert model.head.training
    made.learner.freeze_encoder(False)
    made.learner.train()
    assert all(part.training for part in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "options, message",
    [
        (["--freeze-encoder", "2"], "freeze_encoder=2 needs a trained encoder: add --init-from"),
        (["--freeze-encoder", "-1"], "freeze_encoder must be at least 0, got -1"),
        (["--init-from", "SOURCE", "--resume", "runs/a"], "--resume runs/a continues one"),
    ],
)
def test_options_that_contradict_each_other(source, capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        parse([word.replace("SOURCE", str(source)) for word in options])
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_recorded_prompts_are_learnt_in_fewer_steps_than_from_scratch(tmp_path):
    """After 150 steps on synthetic speech of other voices and sentences."""

    def steps_to_learn(run_dir):
        learnt = [epoch["step"] for epoch in metrics(run_dir, "epoch") if epoch["cer"] < 0.3]
        return min(learnt, default=math.inf)

    source, tuned, scratch = (tmp_path / name for name in ("source", "tuned", "scratch"))
    synthetic = ["--data", "synthetic", "--batch-size", "4", "--max-steps", "150"]
    assert main([*MEMORISING, *synthetic, "--run-dir", str(source)]) == 0
    prompts = ["--data", eight_prompts(tmp_path), "--batch-size", "2", "--epochs", "10"]
    assert main([*MEMORISING, *prompts, "--run-dir", str(scratch)]) == 0
    tuning = [*prompts, "--init-from", str(source)]
    assert main([*MEMORISING, *tuning, "--run-dir", str(tuned)]) == 0
    assert steps_to_learn(tuned) < steps_to_learn(scratch)
