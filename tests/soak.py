"""``python -m tests.soak --minutes 60 --seed 1``: a run with faults at random times.

The baseline trains on two processes with workers. At random times a recording vanishes and comes
back, the disk of the run's folder fills up and is emptied, a worker or a process is killed, or the
run is asked to stop. A run that ended is started again. Afterwards a run without faults trains the
same number of steps, without the utterances that the first run reports as left out. Each loss, norm
and rate of both runs must be bitwise equal. The first run must report each step without a line.
After each fault it must end soon, with a status and the cause in one line.

Exit status: 0 all checks passed, 1 a check failed, 2 wrong usage.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy
import soundfile

from fastguard.speech.cli import train
from fastguard.speech.data.batching import SpeechDataset
from fastguard.speech.data.readers import Rejected
from fastguard.speech.training.parallel import leave
from tests.recordings import write_manifest

REPOSITORY = Path(__file__).parent.parent
OPTIONS = [
    "--model", "baseline", "--stable", "--precision", "fp32", "--batch-size", "2",
    "--num-workers", "1", "--augment.speeds", "[0.9,1.0,1.1]", "--checkpoint.steps", "4",
    "--checkpoint.keep_best", "1", "--epochs", "100000",
]  # fmt: skip
SOON = 60  # seconds in which a run must have ended; the machine may be busy
DISK = 900  # MiB of the run's folder: space for six states; the run keeps two


def corpus(folder: Path, draw: random.Random) -> str:
    """32 chords of about a second, of which 8 are dev: no batch of an epoch comes twice."""
    rows = []
    for i in range(32):
        seconds = numpy.arange(int(16_000 * draw.uniform(0.8, 1.5))) / 16_000
        tones = [300 + 40 * i, 500 + 40 * i, 700 + 40 * i]
        samples = 0.1 * sum(numpy.sin(2 * numpy.pi * tone * seconds) for tone in tones)
        soundfile.write(folder / f"chord{i}.wav", samples, 16_000)
        text = "".join(draw.choice("ab") for _ in range(4))
        split = "dev" if i >= 24 else "train"
        rows.append({"audio_filepath": f"chord{i}.wav", "text": text, "split": split})
    return write_manifest(folder / "chords.jsonl", rows)


@contextlib.contextmanager
def small_disk(folder: Path, size: int = DISK):
    """Mount a disk of `size` MiB; returns whether that is allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:  # not every system has mount
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Soak:
    def __init__(self, work: Path, seed: int):
        self.draw = random.Random(seed)
        self.sounds = work / "sounds"
        self.sounds.mkdir()
        self.data = corpus(self.sounds, self.draw)
        self.run, self.log = work / "disk" / "run", work / "log"
        self.faults: list[str] = []
        self.wrong: list[str] = []
        self.starts = 0

    def say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)

    def fail(self, text: str) -> None:
        self.wrong.append(text)
        self.say(f"WRONG: {text}")

    # --- the run ----------------------------------------------------------------------------------

    def start(self, run: Path, log: Path, *options: str, replay: str = "[]") -> subprocess.Popen:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        program = ["-m", "tests.soak", "--replay", replay, *OPTIONS, *options]
        self.starts += 1
        with log.open("a", encoding="utf-8") as file:
            return subprocess.Popen(
                [sys.executable, *launcher, *program, "--data", self.data, "--run-dir", str(run)],
                cwd=REPOSITORY,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
                stdout=file,
                stderr=file,
            )

    def said(self, since: int = 0) -> str:
        with self.log.open("rb") as file:
            file.seek(since)
            return file.read().decode("utf-8", "replace")

    def trains(self, process: subprocess.Popen, since: int) -> bool:
        """Wait for a step; returns whether there was one before the end."""
        while process.poll() is None and "\nBatch " not in self.said(since):
            time.sleep(0.2)
        return process.poll() is None

    def ends(self, process: subprocess.Popen, what: str, start: float) -> None:
        try:
            process.wait(timeout=SOON)
        except subprocess.TimeoutExpired:
            self.fail(f"{what}: the run has not ended after {SOON} s")
            for pid in (*descendants(process.pid), process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
        self.say(f"  ended with {process.returncode} after {time.monotonic() - start:.1f} s")

    # --- the faults -------------------------------------------------------------------------------

    def vanish(self, process: subprocess.Popen) -> None:
        """Let recordings vanish for a while; the run continues."""
        gone = [self.sounds / f"chord{i}.wav" for i in self.draw.sample(range(24), 4)]
        self.say(f"{', '.join(path.stem for path in gone)} vanish for a while")
        for path in gone:
            path.rename(path.with_suffix(".away"))
        time.sleep(self.draw.uniform(2, 6))
        for path in gone:
            path.with_suffix(".away").rename(path)

    def fill(self, process: subprocess.Popen) -> None:
        """Fill the disk; the run continues and reports what it could not write."""
        self.say("the disk is full for a while")
        ballast = self.run.parent / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 20))
        time.sleep(self.draw.uniform(4, 10))
        ballast.unlink()

    def kill(self, process: subprocess.Popen) -> None:
        """Kill a worker or a process; the run ends."""
        ranks = children(process.pid)
        workers = [pid for rank in ranks for pid in children(rank)]
        what, pids = self.draw.choice([("worker", workers), ("process", ranks)])
        if not pids:  # between two passes there are none
            what, pids = "process", ranks
        if not pids:
            return
        since, start = self.log.stat().st_size, time.monotonic()
        self.say(f"a {what} is killed")
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.draw.choice(pids), signal.SIGKILL)
        if what == "worker":  # it may have been at its end, with nothing left to load
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=SOON / 2)
            if process.poll() is None:
                self.say("  it was at its end: the run goes on")
                return
        self.ends(process, f"a {what} killed", start)
        if process.returncode == 0 or "ERROR - " not in self.said(since):
            self.fail(f"a {what} killed: status {process.returncode}, and no cause in a line")
            print(f"--- what was logged since ---\n{self.said(since)[-6000:]}", file=sys.stderr)

    def stop(self, process: subprocess.Popen) -> None:
        """Send SIGTERM to all processes, as a scheduler does; the run ends."""
        start = time.monotonic()
        self.say("all are asked to stop")
        for pid in (*descendants(process.pid), process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        self.ends(process, "asked to stop", start)

    def disturb(self, minutes: float, disk: bool) -> None:
        kinds = [self.vanish, self.kill, *([self.fill] if disk else []), self.kill, self.stop]
        end = time.monotonic() + 60 * minutes
        process, turn = None, []
        while time.monotonic() < end:
            if process is None or process.poll() is not None:
                since = self.log.stat().st_size if self.log.exists() else 0
                process = self.start(self.run, self.log)
                if not self.trains(process, since):
                    self.fail(f"the run did not start again: status {process.returncode}")
                    return
            turn = turn or self.draw.sample(kinds, len(kinds))
            time.sleep(self.draw.uniform(0.5, 8))
            if process.poll() is not None:
                self.fail(f"the run ended by itself with {process.returncode}")
                continue
            kind = turn.pop()
            self.faults.append(kind.__name__)
            kind(process)
        if process is not None and process.poll() is None:
            self.stop(process)

    # --- the verdict ------------------------------------------------------------------------------

    def compare(self) -> None:
        most = max(step["step"] for step in steps(self.run)) + 4
        process = self.start(self.run, self.log, "--max-steps", str(most))
        if status := process.wait():
            self.fail(f"left in peace, the run ended with {status}")
        self.say(f"the disturbed run ended at step {most}; now one that nothing disturbs")
        found = {step["step"]: step for step in steps(self.run)}
        left_out = [
            [step["epoch"], id]
            for step in found.values()
            for id in step.get("left_out_utterances", [])
        ]
        calm = self.sounds.parent / "calm"
        options = ("--max-steps", str(most))
        process = self.start(calm, self.log, *options, replay=json.dumps(left_out))
        if status := process.wait():
            self.fail(f"the undisturbed run ended with {status}")
        missing = different = 0
        for step in steps(calm):
            ours = found.get(step["step"])
            missing += ours is None
            if ours and any(ours[key] != step[key] for key in ("loss", "grad_norm", "lr", "batch")):
                different += 1
                if different == 1:
                    self.fail(f"the first step that differs: {ours}, undisturbed {step}")
        if missing and "metrics.jsonl is not complete" not in self.said():
            self.fail(f"{missing} steps have no line in metrics.jsonl, and it is not told")
        self.say(
            f"{most} steps, {self.starts - 1} starts; {len(left_out)} utterances were left out of "
            f"steps, and named; {missing} steps have no line, and it is told; {different} differ"
        )


def steps(run: Path) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["kind"] == "step"]


def children(pid: int) -> list[int]:
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8")
    except OSError:
        return []
    return [int(child) for child in found.split()]


def descendants(pid: int) -> list[int]:
    return [below for child in children(pid) for below in (*descendants(child), child)]


def replay(left_out: list[list]) -> None:
    """Reject the utterances of these epochs that the disturbed run left out."""
    known = {(epoch, id) for epoch, id in left_out}
    whole = SpeechDataset.__getitem__

    def get(self, draw):
        id = self.utterances[draw.index].id
        return Rejected(id, "replayed") if (draw.epoch, id) in known else whole(self, draw)

    SpeechDataset.__getitem__ = get


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="of disturbance")
    parser.add_argument("--seed", type=int, default=0, help="of what happens when")
    args = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as work, small_disk(Path(work) / "disk") as disk:
        soak = Soak(Path(work), args.seed)
        if not disk:
            soak.say("no disk of its own can be mounted: it will not be filled")
        soak.disturb(args.minutes, disk)
        soak.compare()
        if soak.wrong:
            print(f"--- the last of the log ---\n{soak.said()[-6000:]}", file=sys.stderr)
        told = dict.fromkeys(re.findall(r"^(?:ERROR|error)\W.*$", soak.said(), re.M))
        for line in told:
            soak.say(f"told: {line}")
        counts = {kind: soak.faults.count(kind) for kind in sorted(set(soak.faults))}
        soak.say(f"faults {counts} in {(time.monotonic() - start) / 60:.1f} min, seed {args.seed}")
        soak.say("FAILED: " + "; ".join(soak.wrong) if soak.wrong else "all of it held")
        return int(bool(soak.wrong))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--replay"]:
        replay(json.loads(sys.argv[2]))
        leave(train.main(sys.argv[3:]))
    sys.exit(main())
