"""Limits of an analysis: from when it begins, no more than the machine has, and against code that calls nothing."""

from __future__ import annotations

import gc
import math
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from vpdeploy.surgery.limit import OWN_AT_REST, Limit, LimitError


def test_it_begins_with_the_analysis_not_when_it_is_made(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("vpdeploy.surgery.limit.time", SimpleNamespace(monotonic=lambda: clock[0]))
    limit = Limit(seconds=3)
    clock[0] = 3.5
    limit.check("")  # begins here
    clock[0] = 6.4
    limit.check("")
    with limit.enforced() as another:  # of its own
        clock[0] = 9.3
        another.check("")
        with pytest.raises(LimitError, match=r"after 6 s \(the limit is 3 s\), when layer was called"):
            limit.check("layer")


def test_equal_limits_are_equal_whenever_they_began():
    limit = Limit(3, 4)
    limit.check("")
    assert limit == Limit(3, 4) and repr(limit) == "Limit(seconds=3, gib=4)"


@pytest.mark.parametrize(("machine", "gib"), [(64, 24), (10, 9)])
def test_it_is_less_than_a_small_machine_has(monkeypatch, machine, gib):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=machine * 2**30))
    assert Limit().gib == pytest.approx(gib)


def test_the_message_says_what_can_be_done_at_the_command_line_and_in_python():
    with pytest.raises(LimitError) as e, Limit(gib=-1).enforced() as limit:
        limit.check("")
    for advice in ("--size", "input.canvas_size", "--limit-seconds", "--limit-gib", "limit=Limit(...)"):
        assert advice in str(e.value)


timers = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no interval timers")


def spin(seconds: float) -> None:
    """Calls no module, and catches what stops it once, as user code may."""
    end = time.monotonic() + seconds
    caught = 0
    while time.monotonic() < end:
        try:
            time.sleep(0.01)
        except Exception:
            caught += 1
            if caught > 1:
                raise


@timers
def test_code_without_calls_is_stopped_and_the_timer_is_put_back():
    before, began = signal.getsignal(signal.SIGALRM), time.monotonic()
    with pytest.raises(LimitError, match=r"stopped after 0 s \(the limit is 0\.2 s\); analyse"), Limit(0.2).enforced():
        spin(20)
    assert time.monotonic() - began < 10
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@timers
def test_what_others_set_is_left_alone():
    heard = []
    handler = signal.signal(signal.SIGALRM, lambda *_: heard.append(1))
    try:
        with Limit(0.05).enforced():
            assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            spin(0.2)
        assert heard == [1]
    finally:
        signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        with Limit(0.05).enforced():
            spin(0.2)
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 900
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@timers
@pytest.mark.parametrize("seconds", [0.0, math.inf])
def test_a_limit_that_no_timer_takes_has_none(seconds):
    with Limit(seconds).enforced():
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_other_threads_have_checks_alone():
    problems = []

    def work() -> None:
        try:
            with Limit(0.05).enforced() as limit:
                spin(0.2)
                limit.check("")
        except Exception as e:
            problems.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [type(problem) for problem in problems] == [LimitError]
    assert "when the network was called" in str(problems[0])


def test_torch_is_not_needed_for_it():
    code = "import sys, vpdeploy.surgery.limit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_old_objects_are_at_rest_meanwhile_and_those_of_others_stay_so():
    gc.unfreeze()
    with Limit().enforced():
        assert gc.get_freeze_count() > OWN_AT_REST
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        with Limit().enforced():
            pass
        assert gc.get_freeze_count() > OWN_AT_REST
    finally:
        gc.unfreeze()
