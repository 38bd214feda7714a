"""Seconds and dates as people read them."""

import time


def duration(seconds: float) -> str:
    """Seconds below two minutes, else days, hours and minutes, such as '2 d 3 h 1 min'."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    days, hours = divmod(minutes // 60, 24)
    shown = [(days, "d"), (hours, "h"), (minutes % 60, "min")]
    while not shown[0][0]:
        del shown[0]
    return " ".join(f"{number} {unit}" for number, unit in shown)


def date(epoch_s: float) -> str:
    """A moment in this machine's time zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(epoch_s))
