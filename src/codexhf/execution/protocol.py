"""What both sides of the wall must agree on: requests and replies, and the records of a report.

Standard library only, no relative import: it is loaded inside the sandbox too.
"""

import errno
import os
import struct

# kind, seconds, bytes of memory, of report and output that come back, of a file at most
HEADER = struct.Struct("!cdQQQQ")
# what happened, two exit codes, seconds, sizes of report, output and error, all that was written
REPLY = struct.Struct("!BiidIIHQ")
_RECORD = struct.Struct("!cII")  # tag, sizes of body and text
REPORT, CHANNEL = 3, 4  # a child's descriptors: its report; the line from candidate to checker
# Where each program in a zygote with namespaces gets an empty file system of its own. The Landlock
# rule that lets it write is on the folder above, because a rule does not see through a later mount.
SCRATCH = "/private/tmp"
CALLS, PROGRAM, ASSERTS, TOGETHER = b"c", b"s", b"a", b"g"  # kinds of request
DONE, TIMED_OUT, SETUP_FAILED = 0, 1, 2  # what happened
PASSED, FAILED, BROKEN_TESTS, OUT_OF_REACH = 42, 1, 43, 45  # exit codes
LOADED, VALUE, DIGEST, ERROR = b"o", b"v", b"d", b"e"  # tags of a report's records
LIMITS = {b"x": "memory", b"r": "recursion", b"w": "output", b"f": "files"}
"""Tags of errors by which a program met a limit -> the verdict that each is."""
_ERROR_NUMBERS = {errno.EFBIG: b"w", errno.ENOSPC: b"w", errno.EMFILE: b"f"}
MAX_TEXT_BYTES = 1000
MAX_BODY_BYTES = 1024  # a longer body is replaced by its digest
RECORD_BYTES = _RECORD.size + MAX_BODY_BYTES + MAX_TEXT_BYTES
# A program may take its seconds of processor time, however long it waits for a processor: up to
# this many times as long on the clock. Time that it sleeps counts as if it had computed.
MAX_WAITING = 20


def write_all(fd: int, data: bytes) -> None:
    """Write all of the data."""
    while data:
        data = data[os.write(fd, data) :]


def read_exactly(fd: int, size: int) -> bytes:
    """Read as many bytes; EOFError where there are fewer."""
    chunks = []
    while size:
        chunk = os.read(fd, min(size, 1 << 20))
        if not chunk:
            raise EOFError("the other process ended")
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def message_of(error: BaseException) -> str:
    """Return an exception's message, whatever its `__str__` does."""
    try:
        return str(error)[:300]
    except BaseException:
        return "(its message cannot be shown)"


def describe(error: BaseException) -> str:
    """Return the type and message of an exception."""
    name, text = type(error).__name__, message_of(error)
    return f"{name}: {text}"[:300] if text else name


def report(tag: bytes, body: bytes, text: str) -> None:
    """Add a record to the child's report: a tag byte, canonical bytes, a line for people."""
    line = text.encode("utf-8", "backslashreplace")[:MAX_TEXT_BYTES]
    write_all(REPORT, _RECORD.pack(tag, len(body), len(line)) + body + line)


def tag_of(error: BaseException) -> bytes:
    """Return the record's tag for an exception: which limit it means, or ERROR."""
    if isinstance(error, OSError):
        return _ERROR_NUMBERS.get(error.errno, ERROR)
    if isinstance(error, RecursionError):
        return b"r"
    no_thread = type(error) is RuntimeError and error.args == ("can't start new thread",)
    return b"x" if no_thread or isinstance(error, MemoryError) else ERROR


def report_error(error: BaseException, text: str | None = None) -> None:
    """Add an exception to the child's report."""
    report(tag_of(error), b"", describe(error) if text is None else text)


def unpack_records(data: bytes, count: int) -> list[tuple[bytes, bytes, str]]:
    """Return at most `count` whole records from a report's start; what is cut short is left out."""
    records, at = [], 0
    while at + _RECORD.size <= len(data) and len(records) < count:
        tag, body_size, text_size = _RECORD.unpack_from(data, at)
        begin = at + _RECORD.size
        middle, at = begin + body_size, begin + body_size + text_size
        if at > len(data):
            break
        text = data[middle : min(at, middle + MAX_TEXT_BYTES)].decode("utf-8", "replace")
        records.append((tag, data[begin:middle], text))
    return records
