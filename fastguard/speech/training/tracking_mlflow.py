"""Sends curves to MLflow: to files in the run's folder, or to the server of the environment."""

import os
import time
from pathlib import Path

from fastguard._extras import require

from .config import Config
from .tracker_ids import keep_id, known_id
from .tracking import Tracker

_WAIT = 2.0  # seconds between two messages: one for each step would slow a run with a server
_LARGEST = 900  # points of a message; MLflow takes 1000


class MLflow(Tracker):
    """A run of MLflow, in ``mlruns/`` of the run's folder or where ``MLFLOW_TRACKING_URI`` says.

    ``MLFLOW_EXPERIMENT_NAME`` names the experiment, by default fastguard. A resumed run continues
    its run of MLflow.

    Args:
        folder: of the run.
        config: the settings, which become parameters.
        skips: number of skipped steps so far.
    """

    title = "MLflow"

    def __init__(self, folder: Path, config: Config, skips: int):
        super().__init__(skips)
        # MLflow tells its makers about its use, unless this is set before it is imported.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self._mlflow = require("mlflow", "mlflow")
        self._points: list = []
        self._sent = time.monotonic()
        self._try(self._open, folder, config)

    def _open(self, folder: Path, config: Config) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            # MLflow 3 writes files only if told so. Its databases need further packages.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = (folder.resolve() / "mlruns").as_uri()
        self._client = self._mlflow.MlflowClient(tracking_uri=uri)
        self._id = known_id(folder, "mlflow")
        if self._id is None or not self._is_there():
            self._id = self._create(folder.resolve().name)
            self._log_settings(config)
        keep_id(folder, "mlflow", self._id)
        self._client.update_run(self._id, status="RUNNING")

    def _is_there(self) -> bool:
        try:
            self._client.get_run(self._id)
        except self._mlflow.MlflowException:
            return False
        return True

    def _create(self, name: str) -> str:
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fastguard")
        known = self._client.get_experiment_by_name(title)
        number = self._client.create_experiment(title) if known is None else known.experiment_id
        return self._client.create_run(number, run_name=name).info.run_id

    def _log_settings(self, config: Config) -> None:
        for name, value in _dotted(config.to_dict()):
            self._client.log_param(self._id, name, value)

    def _send(self, values: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metric = self._mlflow.entities.Metric
        self._points += [metric(name, value, now, step) for name, value in values.items()]
        if time.monotonic() - self._sent > _WAIT or len(self._points) > _LARGEST:
            self._flush()

    def _flush(self) -> None:
        for start in range(0, len(self._points), _LARGEST):
            self._client.log_batch(self._id, metrics=self._points[start : start + _LARGEST])
        self._points, self._sent = [], time.monotonic()

    def _end(self, failed: bool) -> None:
        self._flush()
        self._client.set_terminated(self._id, status="FAILED" if failed else "FINISHED")


def _dotted(values: dict, prefix: str = ""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
