"""The output file of a batch: one line per answer, in OpenAI's format, in the order of completion.

Each line is written at once and as a whole, so that an interrupted batch can go on: answers that
the file holds already are not computed again, and an incomplete last line is cut off.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import io
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import msgspec
from msgspec import Raw

from compiledllm.config import ConfigError
from compiledllm.log import log

STANDARD_STREAM = "-"
_ID = "batch_req_"
_START = b'{"id":"' + _ID.encode()
_DIGEST_BYTES = 16


class Response(msgspec.Struct):
    """An answer as HTTP would give it. body: JSON."""

    status_code: int
    request_id: str
    body: Raw


class Refusal(msgspec.Struct):
    """Why a line is no request, as in OpenAI's list of a batch's errors."""

    code: str
    message: str
    param: str | None
    line: int


class Record(msgspec.Struct):
    """A line of the output: a response, or an error where there was no request."""

    id: str
    custom_id: str | None
    response: Response | None
    error: Refusal | None


class _OldResponse(msgspec.Struct):
    status_code: int


class _OldRefusal(msgspec.Struct):
    line: int


class _OldRecord(msgspec.Struct):
    """The fields that are needed of a line that the output holds already."""

    id: str
    custom_id: str | None
    response: _OldResponse | None
    error: _OldRefusal | None


def digest(*parts: bytes) -> bytes:
    """A fingerprint of these bytes."""
    return hashlib.blake2b(b"\0".join(parts), digest_size=_DIGEST_BYTES).digest()


class AnswerFile:
    """Appends records to a file, or to standard output.

    Attributes: `earlier` (the request ids of answers that the file held at first, by the digest of
    custom_id), `failed` (the keys in `earlier` of answers that are errors), `refused` (the numbers
    of input lines that were no requests).

    Raises ConfigError if the file cannot be opened, is in use by another batch or holds anything
    but answers of a batch; such a file is not changed.
    """

    def __init__(self, path: str, overwrite: bool = False) -> None:
        self.path = path
        self.earlier: dict[bytes, bytes] = {}
        self.failed: set[bytes] = set()
        self.refused: set[int] = set()
        self._writer = ThreadPoolExecutor(1, "answers")  # one: lines must not mix
        self._failure: OSError | None = None
        self._is_regular = False
        try:
            self._fd = os.dup(1) if path == STANDARD_STREAM else self._open(overwrite)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}") from None

    def _open(self, overwrite: bool) -> int:
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(os.stat(self.path).st_mode):  # a pipe, a device: nothing to read
                return os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._is_regular = True
        try:
            self._lock(fd)
            end = 0 if overwrite else self._read(fd)
            os.ftruncate(fd, end)
            os.lseek(fd, end, os.SEEK_SET)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _lock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another batch writes to {self.path}") from None
        except OSError as error:  # not every file system has locks
            log.debug("%s has no lock: %s", self.path, error.strerror)

    # -- earlier answers -----------------------------------------------------------------------

    def _read(self, fd: int) -> int:
        """Note the answers that the file holds; return where the last whole line ends."""
        end = 0
        with open(fd, "rb", closefd=False) as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    self._check_torn(line.rstrip(b"\0"), number)
                    return end
                end += len(line)
                if not line.isspace():
                    self._note(line, number)
        return end

    def _note(self, line: bytes, number: int) -> None:
        try:
            record = msgspec.json.decode(line, type=_OldRecord)
            request_id = bytes.fromhex(record.id.removeprefix(_ID))
        except ValueError:
            raise self._foreign(number) from None
        if not record.id.startswith(_ID):
            raise self._foreign(number)
        if record.error is not None:
            self.refused.add(record.error.line)
        elif record.custom_id is None or record.response is None:
            raise self._foreign(number)
        else:
            key = digest(record.custom_id.encode())
            self.earlier[key] = request_id
            if record.response.status_code != 200:
                self.failed.add(key)

    def _check_torn(self, line: bytes, number: int) -> None:
        """Raise ConfigError unless the incomplete line may be the beginning of a record."""
        if not (line.startswith(_START) or _START.startswith(line)):
            raise self._foreign(number)

    def _foreign(self, number: int) -> ConfigError:
        return ConfigError(
            f"{self.path}, line {number}, is not an answer of a batch; give another output file, "
            "or --overwrite"
        )

    # -- new answers ---------------------------------------------------------------------------

    async def write(self, record: Record) -> None:
        """Append a record; return once the system has it.

        Raises OSError; after an error, every later call raises the same error.
        """
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._writer, self._write, record)

    def _write(self, record: Record) -> None:
        if self._failure is not None:
            raise self._failure
        try:
            rest = memoryview(msgspec.json.encode(record) + b"\n")
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            self._failure = error
            raise

    def close(self) -> None:
        """Wait until the last line is written, and until the file is on the disk."""
        self._writer.shutdown()
        if self._is_regular:
            with suppress(OSError):
                os.fsync(self._fd)
        os.close(self._fd)


def record_id(request_id: bytes) -> str:
    return _ID + request_id.hex()


def open_input(path: str, output: str) -> io.FileIO:
    """A batch file, or standard input, unbuffered. Raises ConfigError."""
    if path.startswith(("http://", "https://")):
        raise ConfigError(f"{path} must be a file; use: curl {path} | compiledllm run-batch -i -")
    try:
        file = open(0 if path == STANDARD_STREAM else path, "rb", buffering=0)  # noqa: SIM115
        info = os.fstat(file.fileno())
        if os.path.exists(output) and os.path.samestat(info, os.stat(output)):
            raise ConfigError(f"{path} is both input and output")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    return file
