"""The framing between executor.py and zygote.py: what both sides of the wall must agree on.

Standard library only, no relative import: it is loaded inside the sandbox too.
"""

import struct

HEADER = struct.Struct("!cdQ")  # kind, seconds, bytes of memory
REPLY = struct.Struct(
    "!BiidIIH"
)  # what happened, two exit codes, seconds, sizes of report, output, error
# Where each child of a zygote with namespaces gets an empty file system of its own. The Landlock
# rule that lets it write is on the folder above, because a rule does not see through a later mount.
SCRATCH = "/private/tmp"
CALLS, PROGRAM, ASSERTS = b"c", b"s", b"a"  # kinds of request
DONE, TIMED_OUT, SETUP_FAILED = 0, 1, 2  # what happened
PASSED, FAILED, BROKEN_TESTS, OUT_OF_MEMORY = 42, 1, 43, 44  # the checker's exit codes
LOADED, VALUE, ERROR, NO_MEMORY = b"o", b"v", b"e", b"x"  # tags of a report's records


def pack_record(tag: bytes, body: bytes, text: str) -> bytes:
    """Return one record of a report: a tag byte, canonical bytes, a line for people."""
    line = text.encode("utf-8", "backslashreplace")[:1000]
    return struct.pack("!cII", tag, len(body), len(line)) + body + line


def unpack_records(report: bytes) -> list[tuple[bytes, bytes, str]]:
    """Return the whole records at the start of a report; what is cut short is left out."""
    records, at = [], 0
    while at + 9 <= len(report):
        tag, body_size, text_size = struct.unpack_from("!cII", report, at)
        middle, end = at + 9 + body_size, at + 9 + body_size + text_size
        if end > len(report):
            break
        text = report[middle:end].decode("utf-8", "replace")
        records.append((tag, report[at + 9 : middle], text))
        at = end
    return records
