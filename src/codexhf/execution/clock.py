"""The same time of day for every program: it starts at EPOCH and runs on from there.

Programs that ask what year it is are common, and their results must not change with the year.
Sleeping, `monotonic` and `perf_counter` stay real. Patched in Python, by zygote.py before anything
else is imported: it makes results repeatable and is not a wall.
"""

import ctypes
import datetime
import gc
import time

EPOCH = 1_704_067_200  # 2024-01-01 00:00:00 UTC

_real_ns = time.time_ns
_gettime, _gmtime, _localtime = time.clock_gettime, time.gmtime, time.localtime
_strftime, _asctime, _ctime = time.strftime, time.asctime, time.ctime
_shift_ns = 0


def start() -> None:
    """Set the clock to EPOCH, in a child, as its program begins."""
    global _shift_ns
    _shift_ns = EPOCH * 10**9 - _real_ns()


def _now_ns() -> int:
    return _real_ns() + _shift_ns


def _now() -> float:
    return _now_ns() / 1e9


def install() -> None:
    """Replace what reads the time of day in `time` and `datetime`."""
    time.time, time.time_ns = _now, _now_ns
    time.gmtime = lambda seconds=None: _gmtime(_now() if seconds is None else seconds)
    time.localtime = lambda seconds=None: _localtime(_now() if seconds is None else seconds)
    time.ctime = lambda seconds=None: _ctime(_now() if seconds is None else seconds)
    time.asctime = lambda *when: _asctime(*when or (time.localtime(),))
    time.strftime = lambda form, *when: _strftime(form, *when or (time.localtime(),))
    time.clock_gettime = lambda clock: _now() if clock == time.CLOCK_REALTIME else _gettime(clock)

    def now(cls: type, tz: datetime.tzinfo | None = None) -> datetime.datetime:
        return cls.fromtimestamp(_now(), tz)

    def utcnow(cls: type) -> datetime.datetime:
        return cls.fromtimestamp(_now(), datetime.UTC).replace(tzinfo=None)

    # `today` asks time.time() already; these two read the system's clock in C, and a type of the
    # interpreter takes new attributes only through the dict behind its __dict__
    (attributes,) = gc.get_referents(datetime.datetime.__dict__)
    attributes["now"], attributes["utcnow"] = classmethod(now), classmethod(utcnow)
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(datetime.datetime))
