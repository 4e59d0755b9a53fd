"""How log records look and where they go: one line each to standard error, as text or as JSON.

It must not know who logs. A record carries the device it is about (from the task that wrote it) and whatever `extra`
fields the writer gave, `migration` and `phase` first among them.
"""

import logging
import os
import select
import time
from contextvars import ContextVar

DEVICE: ContextVar[str] = ContextVar("vfu_server_device", default="")
"""Name of the device that the current task serves."""

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")

_STANDARD = frozenset(logging.LogRecord("", 0, "", 0, "", (), None).__dict__) | {
    "message",
    "asctime",
    "taskName",
    "device",
}
_SHOWN_FIRST = ("migration", "phase")
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)}
_WRITE_DEADLINE_MS = 50
_PIPE_BUF = 4096


def configure(level: str, form: str) -> None:
    """Send all records of `level` and above to standard error."""
    handler = StderrHandler()
    if form == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(TextFormatter(journal=_is_journal(2)))
    handler.addFilter(_add_device)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def _add_device(record: logging.LogRecord) -> bool:
    if not hasattr(record, "device"):
        record.device = DEVICE.get()
    return True


def _is_journal(fd: int) -> bool:
    """Whether `fd` leads to systemd's journal, which has its own time stamps and understands priorities."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _extras(record: logging.LogRecord) -> dict[str, object]:
    given = {key: value for key, value in record.__dict__.items() if key not in _STANDARD}
    first = {key: given.pop(key) for key in _SHOWN_FIRST if key in given}
    return first | given


def plain(text: str) -> str:
    """`text` without control characters: what a client says must not forge a line of the log."""
    return text.translate(_CONTROL)


class TextFormatter(logging.Formatter):
    """`time level device: message (key=value ...)`; in the journal a priority instead of time and level."""

    _PRIORITY = ((logging.ERROR, "<3>"), (logging.WARNING, "<4>"), (logging.INFO, "<6>"), (0, "<7>"))

    def __init__(self, *, journal: bool = False) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback adds its own."""
        device = getattr(record, "device", "")
        line = plain(f"{device}: {record.getMessage()}" if device else record.getMessage())
        extras = " ".join(f"{key}={plain(str(value))}" for key, value in _extras(record).items())
        if extras:
            line = f"{line} ({extras})"
        if not self._journal:
            line = f"{_timestamp(record.created)} {record.levelname.lower():7} {line}"
        if record.exc_info:
            line = f"{line}\n{self.formatException(record.exc_info)}"
        if self._journal:
            priority = next(text for level, text in self._PRIORITY if record.levelno >= level)
            line = "\n".join(priority + part for part in line.splitlines())
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, device, message, `extra` fields, and `error` with a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """One line in any case."""
        import json

        entry: dict[str, object] = {
            "time": _timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "device": getattr(record, "device", ""),
            "message": record.getMessage(),
        }
        for key, value in _extras(record).items():
            entry[f"{key}_" if key in entry else key] = value
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def _timestamp(created: float) -> str:
    """UTC, RFC 3339, milliseconds."""
    milliseconds = int(created * 1000)
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(milliseconds // 1000))
    return f"{seconds}.{milliseconds % 1000:03}Z"


class StderrHandler(logging.Handler):
    """Writes to standard error without waiting for a reader that has stopped: lost records are counted, told later."""

    def __init__(self, fd: int = 2) -> None:
        super().__init__()
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Called with the handler's lock held, from any thread."""
        if self._lost and self._write(self._loss(), 0):
            self._lost = 0
        if self._lost or not self._write(record, _WRITE_DEADLINE_MS):
            self._lost += 1

    def _loss(self) -> logging.LogRecord:
        text = f"{self._lost} log records were lost: nobody read them"
        return logging.makeLogRecord(
            {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING", "msg": text}
        )

    def _write(self, record: logging.LogRecord, deadline_ms: int) -> bool:
        try:
            data = self.format(record).encode(errors="backslashreplace") + b"\n"
        except Exception:  # noqa: BLE001 - a record that cannot be formatted must not end what it tells about
            self.handleError(record)
            return True
        try:
            for start in range(0, len(data), _PIPE_BUF):
                if not self._poll.poll(deadline_ms):
                    return False
                os.write(self._fd, data[start : start + _PIPE_BUF])
        except OSError:
            return False
        return True
