"""Where numbers go: JSON lines, TensorBoard events, W&B, and the progress on the screen."""

import contextlib
import dataclasses
import json
import logging
import os
import socket
import struct
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboardX import summary as summaries
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c
from tqdm import tqdm

log = logging.getLogger("bivl")


@dataclasses.dataclass
class Timings:
    """Sums over the updates since the last line, on the host: arrays of the devices would wait for
    the update that runs, and where 32 programs wait so, XLA's CPU client stands still for ever."""

    updates: int = 0
    step_seconds: float = 0.0
    data_wait_seconds: float = 0.0
    replaced: int = 0
    """Records."""

    def add(self, step_seconds: float, data_wait_seconds: float, replaced: int) -> None:
        """Counts one update."""
        self.updates += 1
        self.step_seconds += step_seconds
        self.data_wait_seconds += data_wait_seconds
        self.replaced += replaced

    def means(self) -> dict[str, float]:
        """`step_seconds` and `data_wait_seconds` of an update."""
        names = ("step_seconds", "data_wait_seconds")
        return {name: getattr(self, name) / self.updates for name in names}


def cut(path: Path, step: int) -> None:
    """Drops the lines of `metrics.jsonl` after `step`, and a torn last line."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


def last_step(path: Path, limit: int) -> int:
    """The last step up to `limit` that has a line in `path`; -1 where there is none."""
    steps = [-1]
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            steps.append(json.loads(line)["step"])
    return max(step for step in steps if step <= limit)


def summary(scalars: dict[str, float]) -> str:
    """`name value` pairs on one line."""
    return " ".join(f"{name}={value:.4f}" for name, value in sorted(scalars.items()))


def save_picture(folder: Path, name: str, image: np.ndarray) -> None:
    """uint8 [H, W, 3] -> FOLDER/pictures/NAME.png."""
    path = folder / "pictures" / f"{name.removeprefix('pictures/')}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


class Lines:
    """A file that grows: what is written is the system's before the call returns, so that a kill
    of the process loses nothing."""

    def __init__(self, path: Path):
        self._path, self._new = path, False
        self._file = open(path, "ab")  # noqa: SIM115

    def write(self, data: bytes) -> None:
        """Appends, and raises where the disk is full."""
        self._new = True
        self._file.write(data)
        self._file.flush()

    def keep(self) -> None:
        """A loss of the host loses nothing either.

        In a bucket the file is there when it is closed: gcsfuse, from version 3 on, keeps what
        fsync was asked for to itself.
        """
        if self._new:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file, self._new = open(self._path, "ab"), False  # noqa: SIM115

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class Events:
    """TensorBoard events.

    tensorboardX's SummaryWriter would hand them to a thread that dies on a full disk and then
    blocks the run for good, and its file writer waits for the disk at every line of numbers.
    """

    def __init__(self, workdir: Path, step: int):
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self.file = Lines(workdir / name)
        self._write(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))
        if step:  # a resumed run: what earlier files have from here on does not count
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(self._event(step + 1, session_log=start))

    def _event(self, step: int, **content) -> event_pb2.Event:
        return event_pb2.Event(wall_time=time.time(), step=step, **content)

    def _write(self, *events: event_pb2.Event) -> None:
        """As TFRecords: each its length and its bytes, with a checksum of either."""
        records = b""
        for event in events:
            data = event.SerializeToString()
            length = struct.pack("<Q", len(data))
            sums = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
            records += length + next(sums) + data + next(sums)
        self.file.write(records)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One event for each number."""
        numbers = values.items()
        self._write(*(self._event(step, summary=summaries.scalar(k, v)) for k, v in numbers))

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """uint8 [H, W, 3]."""
        summary = summaries.image(name, image, dataformats="HWC")
        self._write(self._event(step, summary=summary))


class Writer:
    """Writes scalars and pictures of a run; only the process that holds `workdir` makes one."""

    def __init__(self, workdir: Path, step: int, config):
        self.workdir = workdir
        self._files = {}
        for name in ("metrics", "evaluations"):
            cut(workdir / f"{name}.jsonl", step)
            self._files[name] = Lines(workdir / f"{name}.jsonl")
        self._events = Events(workdir, step)
        self._files["events"] = self._events.file
        self._wandb = None
        if config.wandb:
            import wandb

            self._wandb = wandb.init(
                project=config.wandb, dir=str(workdir), config=config.to_dict(), resume="allow"
            )

    def scalars(self, step: int, values: dict[str, float], file: str = "metrics") -> None:
        """One line of metrics.jsonl or evaluations.jsonl (non-finite numbers become null), and
        one event for each number."""
        finite = {k: v if np.isfinite(v) else None for k, v in values.items()}
        self._files[file].write(json.dumps({"step": step} | finite).encode() + b"\n")
        self._events.scalars(step, values)
        if self._wandb:
            self._wandb.log(values, step=step)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """uint8 [H, W, 3] -> pictures/NAME.png (the newest) and an event."""
        save_picture(self.workdir, name, image)
        self._events.picture(step, name, image)

    def keep(self) -> None:
        """What is written so far outlasts the host, and is in the bucket."""
        for file in self._files.values():
            file.keep()

    def close(self) -> None:
        """Flushes everything."""
        self.keep()
        for file in self._files.values():
            file.close()
        if self._wandb:
            self._wandb.finish()


class Progress:
    """A live bar with ETA on a terminal; elsewhere a plain line, at most one every 10 seconds."""

    def __init__(self, first: int, total: int):
        self._live = sys.stdout.isatty()
        self._total, self._first, self._start, self._last = total, first, time.monotonic(), 0.0
        if self._live:
            self._bar = tqdm(total=total, initial=first, file=sys.stdout, unit="step")

    def show(self, step: int, values: dict[str, float]) -> None:
        """Shows the numbers of update `step`."""
        text = " ".join(
            f"{name}={values[name]:.4g}"
            for name in ("loss", "target_std", "examples_per_second", "accuracy")
            if name in values
        )
        if self._live:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last >= 10 or step == self._total:
            pace = (now - self._start) / max(step - self._first, 1)
            log.info("step %d/%d %s eta=%ds", step, self._total, text, pace * (self._total - step))
            self._last = now

    def close(self) -> None:
        """Ends the bar's line."""
        if self._live:
            self._bar.close()


# Peak dense bfloat16 FLOP/s of a device, by the start of its `device_kind` (vendors' data sheets).
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
}


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of the longest matching name, None for a chip that is not in the table (a CPU)."""
    names = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(names, key=len)] if names else None
