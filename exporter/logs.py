"""Log lines as logfmt or JSON, one event a line, to standard error.

`logger.info("event", extra={"app": "x"})` becomes `ts=… level=info logger=… msg=event app=x`.
"""

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
FORMATS = ("logfmt", "json")
LEVELS = ("debug", "info", "warn", "error")


class Lines(logging.Formatter):
    """Writes a record in one of FORMATS."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self._json = form == "json"

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, whatever is in the record."""
        fields: dict[str, object] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": "warn" if record.levelno == logging.WARNING else record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
        }
        fields |= {key: value for key, value in record.__dict__.items() if key not in _STANDARD}
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        if self._json:
            return json.dumps(fields, default=str)
        return logfmt(fields)


def logfmt(fields: Mapping[str, object]) -> str:
    """Return fields as one line, with quotes around the values that need them."""
    return " ".join(f"{key}={_value(value)}" for key, value in fields.items())


def _value(value: object) -> str:
    text = str(value)
    if text and text.isprintable() and not any(char in text for char in ' "=\\'):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


def configure(*, level: str, form: str) -> None:
    """Send every logger's lines to standard error from `level` on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines(form))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper().replace("WARN", "WARNING"))
    for chatty in ("asyncio", "pymongo", "aiohttp.access"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
