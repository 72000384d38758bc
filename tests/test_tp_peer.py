"""What is heard of another rank: lines however they come, and whether it has told why all end."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from tp.peer import Peer, machine


@pytest.fixture
def ends() -> Iterator[tuple[Peer, socket.socket]]:
    """A peer, and the other end of its connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        other = socket.create_connection(server.getsockname())
        connection, _ = server.accept()
    with other, connection:
        yield Peer(connection, "another machine", 0), other


def test_lines_come_whole_however_they_are_cut(ends: tuple[Peer, socket.socket]) -> None:
    peer, other = ends
    for part, lines in ((b'{"a"', []), (b": 1}\n{", [b'{"a": 1}']), (b"}\n{}\n", [b'{"a": 1}', b"{}", b"{}"])):
        other.sendall(part)
        assert peer.receive() and list(peer.lines) == lines
    other.close()
    assert not peer.receive()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (b'{"lost": [2, "died"]}\n{"said": 6}\n', True),
        (b'{"share": ["said"]}\n', False),
        (b'{"said": 6}', False),
        (b"", False),
    ],
)
def test_who_has_told_the_user_says_so(words: bytes, said: bool, ends: tuple[Peer, socket.socket]) -> None:
    peer, other = ends
    other.sendall(words)
    other.close()
    assert peer.has_said(5.0) is said


def test_a_word_that_was_heard_before_counts_and_a_silent_peer_has_its_time(ends: tuple[Peer, socket.socket]) -> None:
    peer, other = ends
    assert not peer.has_said(0.05), "it lives, but says nothing"
    other.sendall(b'{"said": 6}\n')
    peer.connection.settimeout(5.0)
    assert peer.receive() and peer.has_said(0.0)


def test_a_message_is_sent_for_as_long_as_somebody_reads(ends: tuple[Peer, socket.socket]) -> None:
    peer, other = ends
    received = []

    def read() -> None:
        while data := other.recv(1 << 20):
            received.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    message = {"share": "x" * 20_000_000}
    peer.send(message, 5.0)
    peer.connection.shutdown(socket.SHUT_WR)
    reader.join()
    assert json.loads(b"".join(received)) == message


def test_only_a_process_of_this_machine_that_has_not_left_is_killed(ends: tuple[Peer, socket.socket]) -> None:
    peer, _ = ends
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(40)"]) as process:
        peer.pid = process.pid
        peer.kill()
        peer.machine, peer.gone = machine(), True
        peer.kill()
        time.sleep(0.1)
        assert process.poll() is None
        peer.gone = False
        peer.kill()
        assert process.wait() == -signal.SIGKILL


def test_who_reads_nothing_is_given_up(ends: tuple[Peer, socket.socket]) -> None:
    peer, other = ends
    with pytest.raises(TimeoutError):
        peer.send({"share": "x" * 50_000_000}, 0.5)
    while other.recv(1 << 20):
        pass  # and hears the end of the connection
