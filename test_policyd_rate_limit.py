"""Tests of policyd_rate_limit: python3 -m unittest

The classes stand in the order of the program's sections.  What is real is
used for real: the daemon as a process, Postfix, the database servers.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import Callable, Iterator
from typing import Any

import policyd_rate_limit as prl

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "policyd_rate_limit.py")
PATIENCE = 30  # seconds before a test gives up waiting
NO_SKIP = bool(os.environ.get("POLICYD_TEST_NO_SKIP"))


def skip(why: str) -> None:
    """Skip the test, or fail it where the environment forbids skips."""
    if NO_SKIP:
        raise AssertionError(f"skipping is forbidden here: {why}")
    raise unittest.SkipTest(why)


def wait_for(ready: Callable[[], Any], what: str) -> Any:
    """Poll until ready() returns something true, and return that."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        result = ready()
        if result:
            return result
        time.sleep(0.01)
    raise AssertionError(f"waited {PATIENCE} s for {what}")


def request_text(**attributes: object) -> bytes:
    """Return the bytes of a request; sasl_username is joe by default."""
    given = {
        "request": "smtpd_access_policy", "protocol_state": "DATA",
        "queue_id": "8045F2AB23", "instance": "123.456.7",
        "sender": "joe@example.org", "recipient_count": 1,
        "client_address": "192.0.2.7", "sasl_username": "joe", **attributes}
    return "".join(f"{name}={value}\n" for name, value in given.items()
                   ).encode("utf-8", "surrogateescape") + b"\n"


class Client:
    """A connection to the daemon, as Postfix holds it."""

    def __init__(self, address: Any) -> None:
        """Connect to a path or to (host, port)."""
        family = (socket.AF_UNIX if isinstance(address, str) else
                  socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
        self.socket = socket.socket(family)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(address)
        self.stream = self.socket.makefile("rb")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stream.close()
        self.socket.close()

    def ask(self, **attributes: object) -> str:
        """Send a request and return the action, "" if the daemon hung up."""
        self.socket.sendall(request_text(**attributes))
        return self.read()

    def read(self) -> str:
        """Return the next action, "" if the daemon hung up."""
        try:
            line = self.stream.readline().decode()
            self.stream.readline()
        except ConnectionError:
            return ""
        return line.rstrip("\n").partition("=")[2]


class Daemon:
    """The program as a process, in a folder of its own."""

    def __init__(self, folder: str, config: str = "", *options: str,
                 program: str = PROGRAM) -> None:
        """Start it with --standalone and wait until it listens."""
        self.folder = folder
        self.socket = os.path.join(folder, "policy")
        self.database = os.path.join(folder, "db.sqlite3")
        self.pidfile = os.path.join(folder, "policyd-rate-limit.pid")
        self.config = os.path.join(folder, "test.yaml")
        os.makedirs(folder, exist_ok=True)
        with open(self.config, "w", encoding="utf-8") as file:
            file.write(config)
        self.options = ["-f", self.config, "--standalone", folder, *options]
        self.program = program
        self.start()

    def start(self) -> None:
        """Start the process and wait until it listens."""
        with open(os.path.join(self.folder, "log"), "ab") as log:
            self.mark = log.tell()  # of this start, in the log
            self.process = subprocess.Popen(
                [sys.executable, self.program, *self.options],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_for(lambda: "listening on" in self.log().lower()
                 or self.process.poll() is not None, "the daemon to listen")
        if self.process.poll() is not None:
            raise AssertionError(f"the daemon ended:\n{self.log()}")

    def log(self) -> str:
        """Return what the daemon said since it was started."""
        with open(os.path.join(self.folder, "log"), "rb") as log:
            log.seek(self.mark)
            return log.read().decode("utf-8", "replace")

    def wait_log(self, text: str) -> str:
        """Wait until a text stands in the log, and return the log."""
        try:
            wait_for(lambda: text in self.log(), f"{text!r} in the log")
        except AssertionError as error:
            raise AssertionError(f"{error}:\n{self.log()}") from None
        return self.log()

    def client(self) -> Client:
        """Connect as Postfix does."""
        return Client(self.socket)

    def ask(self, **attributes: object) -> str:
        """Ask on a connection of its own."""
        with self.client() as client:
            return client.ask(**attributes)

    def send(self, number: int) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Stop the process and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
            self.process.send_signal(signal.SIGCONT)
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"it does not stop:\n{self.log()}") from None


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the program as a command and return what it said."""
    return subprocess.run(
        [sys.executable, PROGRAM, *arguments], capture_output=True,
        text=True, timeout=PATIENCE, check=False, **options)


class FolderTest(unittest.TestCase):
    """A test with a temporary folder, and daemons that end with it."""

    def setUp(self) -> None:
        """Make the folder; other users may look into it."""
        self.folder = tempfile.mkdtemp(prefix="policyd-")
        os.chmod(self.folder, 0o755)
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)

    def path(self, name: str) -> str:
        """Return a path in the folder."""
        return os.path.join(self.folder, name)

    def write(self, name: str, text: str) -> str:
        """Write a file in the folder and return its path."""
        with open(self.path(name), "w", encoding="utf-8") as file:
            file.write(text)
        return self.path(name)

    def daemon(self, config: str = "", *options: str,
               name: str = "daemon", **more: Any) -> Daemon:
        """Start a daemon that ends with the test."""
        daemon = Daemon(self.path(name), config, *options, **more)
        self.addCleanup(daemon.stop)
        return daemon


PASS = "dunno"
REFUSED = "defer_if_permit Rate limit reach, retry later"

