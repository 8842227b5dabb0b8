"""Drawn bytes for the readers of recordings and manifests: samples of the right length, or a line
that says what is wrong. Nothing else, and not forever."""

import io
import json

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastguard.speech.data.audio import AudioError, header_duration, read_mono
from fastguard.speech.data.corpora import CorpusError, load_corpus
from tests.speech.conftest import tones

RATE = 16_000
LONGEST = 60.0  # seconds
pytestmark = pytest.mark.slow
drawn = settings(
    max_examples=1500,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def recordings():
    """One second in each format that is read."""
    samples = tones(1.0, RATE)[:, 0]
    formats = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "OGG", "MP3", "NIST")
    for form in formats:
        file = io.BytesIO()
        soundfile.write(file, samples, RATE, format=form)
        yield file.getvalue()
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="OGG", subtype="OPUS")
    yield file.getvalue()


WHOLE = list(recordings())
# Changes near the start, where the headers are, as often as anywhere.
places = st.one_of(st.integers(0, 120), st.floats(0, 1, exclude_max=True))
changes = st.one_of(
    st.tuples(st.just("set"), places, st.binary(min_size=1, max_size=8)),
    st.tuples(
        st.just("set"), places, st.sampled_from([bytes(4), b"\xff" * 4, b"\x7f" + b"\xff" * 3])
    ),
    st.tuples(st.just("insert"), places, st.binary(max_size=40)),
    st.tuples(st.just("cut"), places, st.just(b"")),
    st.tuples(st.just("repeat"), places, st.just(b"")),
)


def changed(content, kind, place, new):
    at = min(len(content), place if isinstance(place, int) else int(place * len(content)))
    if kind == "set":
        return content[:at] + new + content[at + len(new) :]
    if kind == "insert":
        return content[:at] + new + content[at:]
    return content[:at] if kind == "cut" else content + content[at:]


@drawn
@given(st.sampled_from(WHOLE), st.lists(changes, max_size=4))
def test_recordings(tmp_path, content, edits):
    for edit in edits:
        content = changed(content, *edit)
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    try:
        claimed = header_duration(path)
    except AudioError as error:
        assert_one_line(error)
        claimed = None
    try:
        samples, rate = read_mono(path, LONGEST, finite=False)
    except AudioError as error:
        assert_one_line(error)
        assert edits
        return
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert len(samples) <= LONGEST * rate
    if claimed is not None:
        assert len(samples) / rate >= claimed - 0.15
    if not edits:
        assert len(samples) / rate == pytest.approx(1.0, abs=0.1)


@drawn
@given(st.binary(max_size=400))
def test_bytes_that_are_no_recording(tmp_path, content):
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(AudioError) as error:
        read_mono(tmp_path / "a.wav", LONGEST)
    assert_one_line(error.value)


def assert_one_line(error):
    assert "a.wav'" in str(error)
    assert "\n" not in str(error)
    assert len(str(error)) < 800


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
keys = st.sampled_from(
    ["audio_filepath", "text", "duration", "offset", "split", "path", "channel", "start", "audio"]
)
names = st.sampled_from(["good.wav", "torn.wav", "gone.wav", ".", "/dev/zero", "a\x1b[2J.wav"])
rows = st.dictionaries(keys, values, max_size=5) | st.fixed_dictionaries(
    {"audio_filepath": names, "text": st.text(max_size=60)},
    optional={
        "split": st.sampled_from(["train", "dev", "validation", "x", None, 3]),
        "duration": st.one_of(values, st.sampled_from(["1.0", "1e3", " 2 ", "nan", 0])),
        "offset": st.sampled_from([0, 0.0, None, "0", 0.5, "0.25", 1, 1e300, "x", True]),
        "channel": st.sampled_from([0, "left", 1, "9", None, "x", -1, True]),
    },
)
a_line = rows.map(lambda row: json.dumps(row).encode()) | st.binary(max_size=80)


@drawn
@given(st.lists(a_line, max_size=5))
def test_manifests(tmp_path, lines):
    for name, content in (("good.wav", WHOLE[0]), ("torn.wav", WHOLE[0][:9000])):
        (tmp_path / name).write_bytes(content)
    good = b'{"audio_filepath": "./good.wav", "text": "all is well", "split": "train"}'
    (tmp_path / "corpus.jsonl").write_bytes(b"\n".join([good, *lines]))
    listed = io.StringIO()
    try:
        corpus = load_corpus(f"manifest:{tmp_path}/corpus.jsonl", changed=listed)
    except CorpusError as error:
        assert "corpus.jsonl" in str(error) and "\n" not in str(error)  # another encoding
        return
    assert "./good.wav" in {utterance.id for utterance in corpus.utterances}
    written = b"\n".join(lines).replace(b"\r\n", b"\n").split(b"\n")
    assert len(corpus.utterances) + len(corpus.rejected) == 1 + sum(
        bool(w.strip()) for w in written
    )
    summary = corpus.summary()
    assert len(summary.splitlines()) == (
        4 + len({row.kind for row in corpus.rejected}) + len(corpus.changes)
    )
    assert all(char.isprintable() or char == "\n" for char in summary)
    assert all(json.loads(line)["changed"] for line in listed.getvalue().splitlines())


cells = st.text(max_size=10) | st.sampled_from(
    ["good.wav", "torn.wav", "train", "0", "0.5", "1e300", '"', '"a, ""b"""', "left", "a\tb", "\0"]
)


@drawn
@given(
    st.sampled_from([".csv", ".tsv"]),
    st.lists(st.lists(cells, max_size=6), max_size=4),
    st.lists(keys, max_size=5),
)
def test_tables(tmp_path, suffix, lines, columns):
    (tmp_path / "good.wav").write_bytes(WHOLE[0])
    (tmp_path / "torn.wav").write_bytes(WHOLE[0][:9000])
    separator = "," if suffix == ".csv" else "\t"
    table = [columns, *lines]
    path = tmp_path / f"corpus{suffix}"
    path.write_bytes(
        "\n".join(separator.join(line) for line in table).encode("utf-8", "surrogatepass")
    )
    try:
        corpus = load_corpus(f"manifest:{path}", needed=("train", "dev", "test"))
    except CorpusError as error:
        assert "\n" not in str(error)
        assert path.name in str(error)
        return
    assert {u.audio.name for u in corpus.utterances} == {"good.wav"}
