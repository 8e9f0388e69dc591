"""The hosts on which tests rely: they are isolated from each other, a cut is silent, and they leave nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from host import Host, Names, inner
from host_network import Network, host_network
from patience import done, end, wait_until

SERVER = (sys.executable, "-m", "http.server", "8000")
ASK = """
import sys, urllib.request
try:
    print(urllib.request.urlopen(sys.argv[1], timeout=2).status)
except OSError as error:
    print(getattr(error, "reason", error))
"""
KILLED = """
import sys, time
from pathlib import Path
from host_network import host_network
with host_network(Path(sys.argv[1])) as network:
    host = network.add("alone", interface="eth0")
    host.start("sleep", "3600")
    print(network.switch.pid, host.pid, flush=True)
    time.sleep(3600)
"""


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    with host_network(tmp_path) as network:
        yield network


def ask(host: Host, url: str) -> str:
    """The answer that a host gets."""
    return done(host.start(sys.executable, "-c", ASK, url))[0].strip()


def test_hosts_have_names_files_processes_and_interfaces_of_their_own(network: Network) -> None:
    before = psutil.net_if_addrs().keys()
    one = network.add("one", interface="eth0", names=Names.DEBIAN)
    two = network.add("two", interface="enp3s0", has_code=False)
    own = "hostname; ip -br link | sed 's/[ @].*//'; touch /tmp/mine; ls /tmp | grep mine; "
    own += "ps -A -o comm= | grep -c python || true"
    both = [host.run(own).split() for host in (one, two)]

    assert both == [["one", "lo", "eth0", "mine", "0"], ["two", "lo", "enp3s0", "mine", "0"]]
    resolve = "import socket, sys; print(socket.gethostbyname(sys.argv[1]))"
    assert one.run(f"{sys.executable} -c '{resolve}' one") == "127.0.1.1\n"
    assert two.run(f"{sys.executable} -c '{resolve}' two.cluster.internal") == f"{two.address}\n"
    done(one.start(sys.executable, "-c", resolve, "two"), code=1)
    code = ("-c", "import jobs.recipe.recipe")
    done(one.start(sys.executable, *code))
    assert "No module named 'jobs.recipe'" in done(two.start(sys.executable, *code), code=1)[1]
    assert psutil.net_if_addrs().keys() == before and socket.gethostname() not in {"one", "two"}


def test_a_cut_is_silent_and_ends(network: Network) -> None:
    web, near, far = (network.add(name, interface="eth0") for name in ("web", "near", "far"))
    web.serve("web", *SERVER)
    wait_until("the server", lambda: web.listens(8000), 20)
    url, door = "http://web:8000", web.door(8000)
    assert ask(near, url) == ask(far, url) == "200"

    with network.without(far, seconds=0):
        assert (ask(near, url), ask(far, url)) == ("200", "timed out")
    network.separate(web, near)
    assert (ask(near, url), ask(far, url)) == ("timed out", "200")
    network.cut(web)
    with urllib.request.urlopen(door, timeout=10) as answer:
        assert answer.status == 200, "past the cut"
    network.reunite(web, near)
    network.join(web)
    assert ask(near, url) == ask(far, url) == "200"
    network.power_off(web)
    assert ask(near, url) != "200"


def test_a_command_is_signalled_and_ended_with_its_children(network: Network) -> None:
    host = network.add("host", interface="eth0")
    sleeps = host.start("sh", "-c", "trap 'echo interrupted; exit 3' INT; sleep 3600 & wait")
    wait_until("its child", lambda: len(host.matching("sleep 3600")) == 2, 20)
    inner(sleeps).send_signal(signal.SIGINT)
    assert sleeps.wait(timeout=20) == 3
    assert host.kill("sleep 3600") == 1
    stubborn = host.start("sh", "-c", "trap '' TERM INT; sleep 3600; sleep 3600")
    wait_until("its child", lambda: len(host.matching("sleep 3600")) == 2, 20)
    end(stubborn)
    wait_until("its end", lambda: not host.processes(), 20)


def test_hosts_end_with_the_process_that_made_them_even_by_sigkill(tmp_path: Path) -> None:
    path = str(Path(__file__).parents[2] / "benchmarks")
    maker = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert maker.stdout
    firsts = [psutil.Process(int(pid)) for pid in maker.stdout.readline().split()]
    assert len(firsts) == 2 and all(process.is_running() for process in firsts)

    maker.kill()
    maker.communicate()

    wait_until("the end of the hosts", lambda: not any(process.is_running() for process in firsts), 20)
    assert str(tmp_path) not in Path("/proc/mounts").read_text()
