"""The framing between pool.py and zygote.py: what both sides of the wall must agree on.

Standard library only, no relative import: it is loaded inside the sandbox too.
"""

import errno
import struct

# kind, seconds, bytes of memory, of report and output that come back, of a file at most
HEADER = struct.Struct("!cdQQQQ")
# what happened, two exit codes, seconds, sizes of report, output and error, all that was written
REPLY = struct.Struct("!BiidIIHQ")
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
RECORD_BYTES = 9 + MAX_BODY_BYTES + MAX_TEXT_BYTES
# A program may take its seconds of processor time, however long it waits for a processor: up to
# this many times as long on the clock. Time that it sleeps counts as if it had computed.
MAX_WAITING = 20


def tag_of(error: BaseException) -> bytes:
    """Return the record's tag for an exception: which limit it means, or ERROR."""
    if isinstance(error, OSError):
        return _ERROR_NUMBERS.get(error.errno, ERROR)
    if isinstance(error, RecursionError):
        return b"r"
    no_thread = type(error) is RuntimeError and error.args == ("can't start new thread",)
    return b"x" if no_thread or isinstance(error, MemoryError) else ERROR


def pack_record(tag: bytes, body: bytes, text: str) -> bytes:
    """Return one record of a report: a tag byte, canonical bytes, a line for people."""
    line = text.encode("utf-8", "backslashreplace")[:MAX_TEXT_BYTES]
    return struct.pack("!cII", tag, len(body), len(line)) + body + line


def unpack_records(report: bytes, count: int) -> list[tuple[bytes, bytes, str]]:
    """Return at most `count` whole records from a report's start; what is cut short is left out."""
    records, at = [], 0
    while at + 9 <= len(report) and len(records) < count:
        tag, body_size, text_size = struct.unpack_from("!cII", report, at)
        middle, end = at + 9 + body_size, at + 9 + body_size + text_size
        if end > len(report):
            break
        text = report[middle : min(end, middle + MAX_TEXT_BYTES)].decode("utf-8", "replace")
        records.append((tag, report[at + 9 : middle], text))
        at = end
    return records
