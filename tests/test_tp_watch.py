"""The watch between ranks, in processes that do nothing else: who is missed, when, who says so, and who is let be."""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from tests.processes import lives
from tp.place import Place
from tp.watch import INPUT, PERIOD, Watch

TIMEOUT = 3.0
"""Of stalls; a busy machine may keep a process waiting for a while."""

WORKING = "for _ in range(2000): watch.at('decode'); sleep(0.02)"
"""Steps for 40 s, which is longer than any test takes."""

WAITING = "watch.at('decode'); sleep(40)"


class Crew:
    """Processes that watch each other, by rank; their messages are in files."""

    def __init__(self, folder: Path, codes: Sequence[str], timeout: float) -> None:
        self.folder = folder
        self.processes = []
        for rank, code in enumerate(codes):
            command = [sys.executable, "-m", "tests.watch_worker", str(folder), str(timeout), code]
            environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(len(codes)), "LOCAL_RANK": str(rank)}
            with (folder / f"told{rank}").open("w") as file:
                self.processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file))

    def told(self) -> list[str]:
        """What every rank wrote."""
        return [(self.folder / f"told{rank}").read_text() for rank in range(len(self.processes))]

    def ended(self) -> list[int]:
        """Every rank's exit status, once all have ended."""
        return [process.wait(timeout=30) for process in self.processes]

    def wait(self, is_so: Callable[[], bool]) -> None:
        """Return once something is so."""
        deadline = time.monotonic() + 30
        while not is_so():
            assert time.monotonic() < deadline, self.told()
            time.sleep(0.01)


@contextlib.contextmanager
def crew(folder: Path, *codes: str, timeout: float = TIMEOUT) -> Iterator[Crew]:
    """Start a process for every code."""
    started = Crew(folder, codes, timeout)
    try:
        yield started
    finally:
        for process in started.processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_is_told_by_the_lowest_that_lives(victim: int, tmp_path: Path) -> None:
    codes = [WAITING] * 3
    codes[victim] = "watch.at('prefill'); sleep(0.5); import os; os.kill(os.getpid(), 9)"
    with crew(tmp_path, *codes) as ranks:
        statuses = ranks.ended()
        assert statuses == [-9 if rank == victim else 6 for rank in range(3)]
        told = [""] * 3
        told[1 - victim] = f"fastgen: rank {victim} of 3 died in prefill: all processes end\n"
        assert ranks.told() == told


def test_of_ranks_that_die_together_one_that_lives_tells(tmp_path: Path) -> None:
    """Whoever would have told, by its number, is one of the dead."""
    waiting = f"(folder / f'begun{{rank}}').touch(); {WAITING}"
    with crew(tmp_path, *[waiting] * 4) as ranks:
        ranks.wait(lambda: all((tmp_path / f"begun{rank}").exists() for rank in range(4)))
        for process in ranks.processes[:2]:
            process.kill()
        assert ranks.ended() == [-9, -9, 6, 6]
        told = ranks.told()
        assert told[2] in [f"fastgen: rank {rank} of 4 died in decode: all processes end\n" for rank in range(2)]
        assert told[:2] + told[3:] == ["", "", ""]


def test_a_rank_that_is_told_to_end_ends_all(tmp_path: Path) -> None:
    begun = f"(folder / f'begun{{rank}}').touch(); {WAITING}"
    with crew(tmp_path, *[begun] * 3, timeout=60) as ranks:
        ranks.wait(lambda: all((tmp_path / f"begun{rank}").exists() for rank in range(3)))
        ranks.processes[1].terminate()
        assert ranks.ended() == [6, 143, 6]
        assert ranks.told() == ["fastgen: rank 1 of 3 was told to end in decode: all processes end\n", "", ""]


def test_ranks_that_are_all_told_to_end_say_nothing(tmp_path: Path) -> None:
    begun = f"(folder / f'begun{{rank}}').touch(); {WAITING}"
    with crew(tmp_path, *[begun] * 2) as ranks:
        ranks.wait(lambda: all((tmp_path / f"begun{rank}").exists() for rank in range(2)))
        for process in ranks.processes:
            process.terminate()
        assert ranks.ended() == [143, 143] and ranks.told() == ["", ""]


def test_a_failure_is_told_by_the_lowest_that_does_not_share_it(tmp_path: Path) -> None:
    failing = "watch.at('load'); watch.fail(3, 'no such file')"
    with crew(tmp_path, failing, WAITING, failing) as ranks:
        assert ranks.ended() == [3, 3, 3]
        assert ranks.told() == ["", "fastgen: rank 0 of 3 failed in load: no such file\n", ""]


def test_two_that_live_on_tell_of_a_failure_once(tmp_path: Path) -> None:
    """The second hears that the first has said it and ends, and does not take the first for dead."""
    with crew(tmp_path, WAITING, WAITING, "watch.at('load'); watch.fail(3, 'no such file')") as ranks:
        assert ranks.ended() == [3, 3, 3]
        assert ranks.told() == ["fastgen: rank 2 of 3 failed in load: no such file\n", "", ""]


def test_a_failure_when_the_first_rank_is_through_is_told(tmp_path: Path) -> None:
    with crew(tmp_path, "", "sleep(0.5); watch.at('report'); watch.fail(3, 'no room')") as ranks:
        assert ranks.ended() == [0, 3]
        assert ranks.told() == ["", "fastgen: rank 1 of 2 failed in report: no room\n"]


def test_a_failure_is_told_though_the_first_rank_leaves_meanwhile(tmp_path: Path) -> None:
    failing = "watch.at('load'); sleep(0.5); watch.fail(3, 'no such file: bad\\udcff')"
    with crew(tmp_path, "sleep(0.9)", failing, WAITING) as ranks:
        assert ranks.ended() == [0, 3, 3]
        assert ranks.told() == ["", "", "fastgen: rank 1 of 3 failed in load: no such file: bad\\udcff\n"]


def test_before_the_ranks_are_connected_the_first_of_another_machine_tells_its_failure(tmp_path: Path) -> None:
    watch = Watch()
    watch.place, watch._silenced = Place(rank=2, world=4, local=0), True
    with (tmp_path / "told").open("wb") as file:
        watch._messages = file.fileno()
        assert watch.fail(2, "one GPU")
        watch.place = Place(rank=3, world=4, local=1)
        assert watch.fail(2, "one GPU")
    assert (tmp_path / "told").read_text() == "fastgen: rank 2 of 4: one GPU\n"


def test_a_failure_of_all_is_for_each_to_tell(tmp_path: Path) -> None:
    with crew(tmp_path, *["print(watch.fail(3, 'no'), flush=True); raise SystemExit(3)"] * 3) as ranks:
        assert ranks.ended() == [3, 3, 3]
        assert ranks.told() == ["True\n"] * 3


def test_a_rank_that_others_leave_behind_has_stalled(tmp_path: Path) -> None:
    with crew(tmp_path, WORKING, "watch.at('decode'); sleep(40)", WORKING) as ranks:
        assert ranks.ended() == [6, -9, 6]
        assert ranks.told() == ["fastgen: rank 1 of 3 has not come on for 3 s, in decode: all processes end\n", "", ""]


def test_a_rank_that_is_stopped_is_killed(tmp_path: Path) -> None:
    stopping = "watch.at('load'); import os; os.kill(os.getpid(), 19)"
    with crew(tmp_path, stopping, "watch.at('load'); sleep(40)") as ranks:
        assert ranks.ended() == [-9, 6]
        assert ranks.told() == ["", "fastgen: rank 0 of 2 has not answered for 3 s, in load: all processes end\n"]


def test_of_ranks_that_are_equally_far_the_one_that_is_stopped_has_stalled(tmp_path: Path) -> None:
    stopping = "watch.at('decode'); sleep(0.9); import os; os.kill(os.getpid(), 19)"
    with crew(tmp_path, WAITING, WAITING, stopping) as ranks:
        assert ranks.ended() == [6, 6, -9]
        assert ranks.told() == ["fastgen: rank 2 of 3 has not come on for 3 s, in decode: all processes end\n", "", ""]


def test_all_that_are_stopped_are_killed(tmp_path: Path) -> None:
    stopping = "watch.at('decode'); sleep(0.5); import os; os.kill(os.getpid(), 19)"
    with crew(tmp_path, stopping, WAITING, stopping) as ranks:
        assert ranks.ended() == [-9, 6, -9]


def test_all_that_stand_still_in_a_step_have_stalled_and_in_loading_they_have_not(tmp_path: Path) -> None:
    with crew(tmp_path, *["watch.at('decode'); sleep(40)"] * 2) as ranks:
        assert ranks.ended() == [6, 6]
        assert ranks.told() == ["fastgen: no rank has come on for 3 s, in decode: all processes end\n", ""]
    slow = tmp_path / "slow"
    slow.mkdir()
    with crew(slow, *["watch.at('load'); sleep(2.5)"] * 2, timeout=1.0) as ranks:
        assert ranks.ended() == [0, 0] and ranks.told() == ["", ""]


def test_a_rank_that_does_not_come_to_where_the_others_wait_has_stalled(tmp_path: Path) -> None:
    meeting = "import tp.watch; tp.watch.JOIN_SECONDS = 1.5; watch.at('load')\nwith watch.waiting(): sleep(40)"
    with crew(tmp_path, meeting, "watch.at('load'); sleep(40)", timeout=1.0) as ranks:
        assert ranks.ended() == [6, -9]
        assert ranks.told() == ["fastgen: rank 1 of 2 has not come on for 1 s, in load: all processes end\n", ""]
    together = tmp_path / "together"
    together.mkdir()
    with crew(together, meeting, meeting, timeout=1.0) as ranks:
        assert ranks.ended() == [6, 6]
        assert ranks.told() == ["fastgen: no rank has come on for 1.5 s, in join: all processes end\n", ""]


def test_steps_of_less_than_the_timeout_are_no_stalls(tmp_path: Path) -> None:
    """Of another rank one knows how far it was half a second ago."""
    stepping = "for _ in range(5): watch.at('decode'); sleep(0.8)"
    with crew(tmp_path, stepping, stepping, timeout=1.0) as ranks:
        assert ranks.ended() == [0, 0] and ranks.told() == ["", ""]


def test_a_rank_for_which_nobody_waits_takes_as_long_as_it_likes(tmp_path: Path) -> None:
    """The first writes what all have made, to somebody who reads slowly, say."""
    with crew(tmp_path, "watch.at('decode'); sleep(3)", "watch.at('decode')", timeout=1.0) as ranks:
        assert ranks.ended() == [0, 0] and ranks.told() == ["", ""]


def test_a_person_may_think_for_as_long_as_they_like(tmp_path: Path) -> None:
    asking = f"watch.at('{INPUT}'); sleep(2.5); watch.share('hello')"
    waiting = "watch.at('decode'); watch.at('load'); print(watch.share(None))"
    with crew(tmp_path, asking, waiting, timeout=1.0) as ranks:
        assert ranks.ended() == [0, 0] and ranks.told() == ["", "hello\n"]


def test_a_rank_says_how_far_it_is_every_half_second_and_not_whenever_it_hears_another(tmp_path: Path) -> None:
    """Ranks that answered each other kept two threads busy and took two thirds of a step's time on two cores."""
    counting = "said, send = [], watch._send; watch._send = lambda m: (said.append(m), send(m))"
    counting += "; beats, beat = [], watch._guard.beat; watch._guard.beat = lambda: (beats.append(0), beat())"
    counting += "; import time; began = time.monotonic(); sleep(2.2); seconds = time.monotonic() - began"
    counting += "; print(seconds, len(said), len(beats))"
    with crew(tmp_path, counting, counting) as ranks:
        assert ranks.ended() == [0, 0]
        for told in ranks.told():
            seconds, *counts = map(float, told.split())
            assert all(3 <= count <= seconds / PERIOD + 1 for count in counts), told


def test_what_is_shared_comes_in_order_to_all(tmp_path: Path) -> None:
    code = "print(*[watch.share([rank, n, 'text']) for n in range(50)])"
    with crew(tmp_path, *[code] * 3) as ranks:
        assert ranks.ended() == [0, 0, 0]
        assert set(ranks.told()) == {" ".join(f"[0, {n}, 'text']" for n in range(50)) + "\n"}


def test_values_of_any_size_are_shared_and_a_damaged_line_ends_all(tmp_path: Path) -> None:
    large = "print(len(watch.share('x' * 50_000_000)))"
    with crew(tmp_path, large, large) as ranks:
        assert ranks.ended() == [0, 0] and ranks.told() == ["50000000\n"] * 2
    busy = tmp_path / "busy"
    busy.mkdir()
    importing = "import ctypes; ctypes.PyDLL(None).usleep(2_500_000); print(len(watch.share(None)))"
    with crew(busy, "sleep(0.3); print(len(watch.share('x' * 50_000_000)))", importing) as ranks:
        assert ranks.ended() == [0, 0] and ranks.told() == ["50000000\n"] * 2
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    garbling = "sleep(0.5); watch._peers[0].connection.sendall(b'{]\\n'); sleep(40)"
    with crew(damaged, WAITING, garbling) as ranks:
        assert ranks.ended() in ([-9, 6], [6, 6]), "the second may be sooner than the first"
        said = "".join(ranks.told())
        assert said.count("\n") == 1 and "rank 0 of 2 failed to watch the others (JSONDecodeError" in said


def test_ranks_that_were_all_stopped_together_go_on(tmp_path: Path) -> None:
    timeout = 6.0
    going = "for _ in range(200): watch.at('decode'); sleep(0.02)"
    with crew(tmp_path, going, going, timeout=timeout) as ranks:
        ranks.wait(lambda: all((tmp_path / f"rank{rank}").exists() for rank in range(2)))
        time.sleep(1)
        first, second = ranks.processes
        for process, number, pause in (
            (second, signal.SIGSTOP, 0.5),  # until the first has read all that the second said
            (first, signal.SIGSTOP, timeout),
            (first, signal.SIGCONT, 0.3),
            (second, signal.SIGCONT, 0),
        ):
            process.send_signal(number)
            time.sleep(pause)
        assert ranks.ended() == [0, 0] and ranks.told() == ["", ""]


LOCKED = (
    "lock = ctypes.PyDLL(None).pthread_mutex_lock; twice = ctypes.create_string_buffer(64); lock(twice); lock(twice)"
)
STUCK = f"import ctypes; watch.at('decode'); {LOCKED}"
"""Holds the interpreter's lock for ever, as a library may that waits for a GPU: its watch does not run either."""

FAILING = "watch.at('decode'); sleep(1); raise ValueError('no')"


@pytest.mark.parametrize(
    ("codes", "statuses", "speaker", "message"),
    [
        ([STUCK, FAILING, STUCK], [-9, 1, -9], 1, "rank 1 of 3 failed in decode: ValueError: no"),
        ([STUCK, FAILING, WAITING], [-9, 1, 1], 2, "rank 1 of 3 failed in decode: ValueError: no"),
        ([STUCK, FAILING, f"sleep(0.3); {FAILING}"], [-9, 1, 1], 1, "rank 1 of 3 failed in decode: ValueError: no"),
        (
            [STUCK, WAITING, "watch.at('decode'); sleep(3); import os; os.kill(os.getpid(), 9)"], [-9, 6, -9], 1,
            "rank 2 of 3 died in decode: all processes end",
        ),
        (
            [f"sleep(2.6); {STUCK}", WAITING, "watch.at('decode'); sleep(3); import os; os.kill(os.getpid(), 9)"],
            [-9, 6, -9], 1, "rank 2 of 3 died in decode: all processes end",
        ),
    ],
)  # fmt: skip
def test_who_is_stuck_ends_with_the_others_one_of_whom_says_why(
    codes: list[str], statuses: list[int], speaker: int, message: str, tmp_path: Path
) -> None:
    with crew(tmp_path, *codes, timeout=60.0) as ranks:
        assert ranks.ended() == statuses
        told = [""] * 3
        told[speaker] = f"fastgen: {message}\n"
        assert ranks.told() == told


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_who_is_stuck_ends_with_a_rank_that_a_signal_ends(number: int, status: int, tmp_path: Path) -> None:
    with crew(tmp_path, f"sleep(2.5); (folder / 'begun').touch(); {WAITING}", STUCK, timeout=60.0) as ranks:
        ranks.wait((tmp_path / "begun").exists)
        ranks.processes[0].send_signal(number)
        assert ranks.ended() == [status, -9] and ranks.told() == ["", ""]


def test_ranks_that_are_all_stuck_are_ended_by_their_guards_and_the_first_ones_says_so(tmp_path: Path) -> None:
    with crew(tmp_path, STUCK, STUCK) as ranks:
        assert ranks.ended() == [-9, -9]
        assert ranks.told() == ["fastgen: rank 0 of 2 has given no sign of life for 3 s: it is ended\n", ""]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no file that is full")
@pytest.mark.parametrize("code", [STUCK, WAITING])
def test_ranks_that_cannot_say_why_end_all_the_same(code: str, tmp_path: Path) -> None:
    (tmp_path / "told0").symlink_to("/dev/full")
    dying = "watch.at('decode'); sleep(0.5); import os; os.kill(os.getpid(), 9)" if code == WAITING else STUCK
    with crew(tmp_path, code, dying) as ranks:
        assert ranks.ended() == [-9 if code == STUCK else 6, -9]


def test_a_rank_whose_words_nobody_reads_ends_all_the_same(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "told0")
    reader = os.open(tmp_path / "told0", os.O_RDWR | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while os.write(reader, b"x" * 4096):
            pass
    with crew(tmp_path, WAITING, "watch.at('decode'); sleep(0.5); import os; os.kill(os.getpid(), 9)") as ranks:
        assert ranks.ended() == [6, -9]
    os.close(reader)


AGENT = f"""
import os, subprocess, sys
rank = '''
import ctypes, os, signal
from tp.guard import Guard
signal.signal(signal.SIGTERM, lambda number, frame: None)
guard = Guard(os.getppid(), 60.0, "a rank", None)
print("stuck", flush=True)
{LOCKED}
'''
with subprocess.Popen([sys.executable, "-c", rank], stdout=subprocess.PIPE, start_new_session=True) as process:
    process.stdout.readline()
    print(process.pid, flush=True)
"""


@pytest.mark.parametrize("how", ["the agent dies", "torchrun ends its ranks"])
def test_a_stuck_rank_is_ended_for_the_agent(how: str) -> None:
    with subprocess.Popen([sys.executable, "-c", AGENT], stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout
        rank = int(agent.stdout.readline())
        begin = time.monotonic()
        try:
            if how == "the agent dies":
                agent.kill()
            else:
                os.killpg(rank, signal.SIGTERM)
            while lives(rank):
                assert time.monotonic() - begin < 8, "three seconds, on a busy machine"
                time.sleep(0.05)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank, signal.SIGKILL)
        assert time.monotonic() - begin > 2.9, "the watch is given time to say why"


def test_ranks_and_guards_that_were_all_stopped_go_on(tmp_path: Path) -> None:
    """As a container that is paused, or a machine that is."""
    going = "for _ in range(200): watch.at('decode'); sleep(0.02)"
    with crew(tmp_path, going, going) as ranks:
        ranks.wait(lambda: all((tmp_path / f"rank{rank}").exists() for rank in range(2)))
        time.sleep(1)
        frozen = [psutil.Process(process.pid) for process in ranks.processes]
        frozen += [guard for rank in frozen for guard in rank.children()]
        assert len(frozen) == 4
        for process in reversed(frozen):
            process.suspend()
        time.sleep(TIMEOUT + 4)
        for process in frozen:
            process.resume()
        assert ranks.ended() == [0, 0] and ranks.told() == ["", ""]


def test_a_rank_does_not_say_that_it_stood_still_while_it_was_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch()
    said = []

    class Turns:
        """Has nothing to read for five turns."""

        left = 5

        def select(self, period: float) -> list[object]:
            self.left -= 1
            if not self.left:
                raise StopIteration
            return []

    monkeypatch.setattr(time, "monotonic", itertools.count(0, 10).__next__)  # stopped wherever the clock is read
    monkeypatch.setattr(watch, "_selector", Turns(), raising=False)
    monkeypatch.setattr(watch, "_timeout", 3.0, raising=False)
    monkeypatch.setattr(watch, "_send", lambda message: said.append(message["at"][2]))
    with pytest.raises(StopIteration):
        watch._run()
    assert said == [0] * 4


def test_an_interrupt_reaches_all_at_the_same_step(tmp_path: Path) -> None:
    code = """
steps = 0
with watch.interruptible():
    try:
        while True:
            watch.at('decode'); steps += 1; (folder / f'begun{rank}').touch(); watch.check_interrupt(); sleep(0.01)
    except KeyboardInterrupt:
        print(steps, flush=True)
"""
    with crew(tmp_path, code, code) as ranks:
        ranks.wait(lambda: all((tmp_path / f"begun{rank}").exists() for rank in range(2)))
        for process in ranks.processes:
            process.send_signal(signal.SIGINT)
        assert ranks.ended() == [0, 0]
        steps, same = ranks.told()
        assert steps == same and int(steps) > 0


def test_an_interrupt_that_torchrun_passes_on_is_no_second_one(tmp_path: Path) -> None:
    code = """
try:
    with watch.interruptible():
        while True:
            watch.at('decode'); (folder / f'begun{rank}').touch(); watch.check_interrupt(); sleep(0.01)
except KeyboardInterrupt:
    sleep(0.6); print('figures', flush=True)
"""
    with crew(tmp_path, code, code) as ranks:
        ranks.wait(lambda: all((tmp_path / f"begun{rank}").exists() for rank in range(2)))
        for pause in (0.3, 0.0):
            for process in ranks.processes:
                process.send_signal(signal.SIGINT)
            time.sleep(pause)
        assert ranks.ended() == [0, 0] and ranks.told() == ["figures\n"] * 2


def test_an_answer_that_ends_after_an_interrupt_forgets_that_alone() -> None:
    watch = Watch()
    with watch.interruptible():
        watch.at("decode")
        watch._on_signals(bytes([signal.SIGINT]))
        watch._on_signals(bytes([signal.SIGTERM]))
        watch.at(INPUT)
        assert watch._deadline and watch._deadline[1] == 143 and not watch._interrupted


def test_an_interrupt_that_nobody_looks_for_ends_all_after_two_seconds(tmp_path: Path) -> None:
    code = f"(folder / f'begun{{rank}}').touch()\nwith watch.interruptible(): {WAITING}"
    with crew(tmp_path, code, code, timeout=60.0) as ranks:
        ranks.wait(lambda: all((tmp_path / f"begun{rank}").exists() for rank in range(2)))
        ranks.processes[0].send_signal(signal.SIGINT)
        assert ranks.ended() == [130, 130] and ranks.told() == ["", ""]


def test_when_the_first_rank_is_through_the_others_have_five_seconds_and_not_the_other_way_round(
    tmp_path: Path,
) -> None:
    with crew(tmp_path, "", "sleep(40)") as ranks:
        assert ranks.ended() == [0, 0]
    other = tmp_path / "other"
    other.mkdir()
    with crew(other, "sleep(6); print('through')", "") as ranks:
        assert ranks.ended() == [0, 0] and ranks.told() == ["through\n", ""]


def test_an_interrupt_that_comes_when_an_answer_has_ended_ends_nothing() -> None:
    watch = Watch()
    with watch.interruptible():
        watch.at("decode")
        watch._on_signals(bytes([signal.SIGINT]))
        assert watch._deadline, "for an answer that goes on"
        watch.at(INPUT)
        assert not watch._deadline and not watch._interrupted


def test_an_interrupt_ends_all_where_nothing_is_to_be_kept(tmp_path: Path) -> None:
    begun = f"(folder / f'begun{{rank}}').touch(); {WAITING}"
    with crew(tmp_path, begun, begun) as ranks:
        ranks.wait(lambda: all((tmp_path / f"begun{rank}").exists() for rank in range(2)))
        for process in ranks.processes:
            process.send_signal(signal.SIGINT)
        assert ranks.ended() == [130, 130] and ranks.told() == ["", ""]


@pytest.mark.parametrize("words", [b"", b"GET / HTTP/1.0\n", b"[]\n", b'{"rank": 1, "key": "guessed"}\n'])
def test_a_stranger_at_the_port_is_not_taken_for_a_rank(words: bytes) -> None:
    watch = Watch()
    watch.place = Place(rank=0, world=2)

    def exchange(text: str) -> Sequence[str]:
        with socket.create_connection(tuple(json.loads(text)["address"])) as stranger:
            stranger.sendall(words)
        return [text, text]

    with pytest.raises(TimeoutError):  # the other rank never comes
        watch.connect(exchange, "127.0.0.1", 0.5)
