"""Tests of policyd_rate_limit: python3 -m unittest

First what the tests are made with, then the tests, in the order of the
program's sections.  What is real is used for real: the daemon as a process,
Postfix, the database servers.
"""

from __future__ import annotations

import ast
import atexit
import base64
import collections
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import email.message
import email.policy
import fcntl
import functools
import gc
import glob
import grp
import importlib.util
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import pty
import pwd
import py_compile
import random
import re
import resource
import shlex
import shutil
import signal
import smtplib
import socket
import sqlite3
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import textwrap
import threading
import time
import tracemalloc
import unittest
import urllib.parse
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any, NoReturn
from unittest.mock import patch

import policyd_rate_limit as prl

try:
    import yaml
except ImportError:
    yaml = None  # type: ignore[assignment]

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "policyd_rate_limit.py")
TEMPORARY = os.path.join(tempfile.gettempdir(),
                         f"policyd-{uuid.uuid4().hex[:8]}")
# The same, compiled once: to start a script is to compile all of it, which
# would take half of the processor time of all the processes of these tests.
COMPILED = os.path.join(TEMPORARY, "policyd_rate_limit.pyc")
# What --check sees in place of this host's Postfix, but for PostfixCheckTest.
NO_POSTFIX = os.path.join(TEMPORARY, "no-postfix")
PATIENCE = 60  # seconds before a test gives up waiting
QUICK = bool(os.environ.get("POLICYD_TEST_QUICK"))
NO_SKIP = bool(os.environ.get("POLICYD_TEST_NO_SKIP"))
PASS = "dunno"
REFUSED = "defer_if_permit Rate limit reach, retry later"
BLOCKED = "defer_if_permit Sending is blocked, contact your postmaster"
AWAY = "warn no database"  # an action that lets the mail pass
DB_AWAY = "warn the database is unavailable"
CHECK_OK = r"\nOK(, with \d+ warnings?)?\n$"  # how --check ends
WIDE = "limits: [[100000, 86400]]\ndebug: False\n"  # limits that nobody hits
Answers = list[tuple[dict[str, Any], str]]  # to some mails
slow = unittest.skipIf(QUICK, "POLICYD_TEST_QUICK is set")


class Suite(unittest.TestSuite):
    """All tests; names in the end what was skipped, also without -v."""

    def run(self, result: unittest.TestResult,
            debug: bool = False) -> unittest.TestResult:
        """Run them, and name the skipped below the summary."""
        super().run(result, debug)
        skipped = collections.defaultdict(list)
        for test, why in result.skipped:
            name = test.id().rstrip(")").rpartition(".")[2]
            skipped[why].append(name)
        for why, names in skipped.items():
            atexit.register(print, f"skipped, {why}: {', '.join(names)}",
                            file=sys.stderr)
        return result


def load_tests(_loader: unittest.TestLoader, tests: unittest.TestSuite,
               _pattern: str | None) -> Suite:
    """Have unittest run the tests by way of Suite."""
    return Suite(tests)


LEAKS: list[str] = []  # what was left open, or failed where nobody catches it


def setUpModule() -> None:
    """Let every warning be an error, here and in what the tests start."""
    warnings.simplefilter("error")
    os.environ["PYTHONWARNINGS"] = "error"
    os.environ["MAIL_CONFIG"] = NO_POSTFIX
    sys.unraisablehook = lambda leak: LEAKS.append(repr(leak.exc_value))
    threading.excepthook = lambda leak: LEAKS.append(repr(leak.exc_value))
    logging.getLogger().addHandler(logging.NullHandler())  # not to stderr
    os.mkdir(TEMPORARY)
    os.chmod(TEMPORARY, 0o755)
    tempfile.tempdir = TEMPORARY
    unittest.addModuleCleanup(os.rmdir, TEMPORARY)
    py_compile.compile(PROGRAM, COMPILED, doraise=True)
    unittest.addModuleCleanup(os.unlink, COMPILED)


def tearDownModule() -> None:
    """Check that nothing is left open."""
    gc.collect()
    check_leaks()


def check_leaks() -> None:
    """Raise AssertionError if something was left open."""
    found = LEAKS[:]
    LEAKS.clear()
    if found:
        raise AssertionError("\n".join(found))


def skip(why: str) -> NoReturn:
    """Skip the test, or fail it where the environment forbids skips."""
    if NO_SKIP:
        raise AssertionError(f"skipping is forbidden here: {why}")
    raise unittest.SkipTest(why)


def readme_section(section: str = "") -> str:
    """Return the text of README, or of the section with a heading."""
    text = open_and_read(os.path.join(HERE, "README.md"))
    if section:
        text = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return text


def readme_blocks(section: str = "") -> list[tuple[str, str]]:
    """Return the language and text of each fenced block of a section."""
    return re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", readme_section(section))


def is_root() -> bool:
    """Say whether the tests run as root."""
    return os.geteuid() == 0


def open_terminal() -> tuple[int, int]:
    """Return both ends of a new terminal, if the system has any."""
    try:
        return pty.openpty()
    except OSError as error:
        skip(f"no terminals: {error}")


def wait_for(ready: Callable[[], Any], what: str) -> Any:
    """Poll until ready() returns something true, and return that."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        result = ready()
        if result:
            return result
        time.sleep(0.01)
    raise AssertionError(f"waited {PATIENCE} s for {what}")


def at_once(work: Callable[[Any], Any], given: Iterable[Any]) -> list[Any]:
    """Call work with each of some things, in threads that set off together.

    Return what it returned, in order; raise what it raised.
    """
    things = list(given)
    gate = threading.Barrier(len(things))

    def begin(thing: Any) -> Any:
        gate.wait(PATIENCE)
        return work(thing)

    with concurrent.futures.ThreadPoolExecutor(len(things)) as pool:
        return list(pool.map(begin, things))


def in_background(work: Callable[..., object],
                  *given: object) -> threading.Thread:
    """Start a thread that may be left behind."""
    thread = threading.Thread(target=work, args=given, daemon=True)
    thread.start()
    return thread


def run(*arguments: str, program: str = COMPILED,
        **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the program as a command and return what it said."""
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
             "text": True, "timeout": PATIENCE, "check": False, **options}
    return subprocess.run([sys.executable, program, *arguments], **given)


def command(*arguments: str) -> tuple[int, str, str]:
    """Run main here; return the exit status, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    root = logging.getLogger()
    handlers, level, mask = root.handlers[:], prl.log.level, os.umask(0o022)
    root.handlers[:] = []  # so that main makes one for our stderr
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = prl.main(list(arguments))
    except SystemExit as stop:  # argparse
        status = int(stop.code or 0)
    finally:
        root.handlers[:] = handlers
        prl.log.setLevel(level)
        os.umask(mask)
    return status, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def quiet() -> Iterator[list[str]]:
    """Keep what is logged off the terminal, and yield it."""
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    for each in prl.log.filters:
        if isinstance(each, prl.Seldom):
            each.said.clear()  # what other tests made it say
    handler = Keep()
    prl.log.addHandler(handler)
    prl.log.propagate = False
    try:
        yield said
    finally:
        prl.log.removeHandler(handler)
        prl.log.propagate = True


def settings_of(values: dict[str, Any]) -> prl.Settings:
    """Return settings as a file with these values would give them."""
    return prl.check_settings(prl.Config("test", values, {}))


def request_text(**attributes: object) -> bytes:
    """Return the bytes of a request; sasl_username is joe by default."""
    given = {
        "request": "smtpd_access_policy", "protocol_state": "DATA",
        "queue_id": "8045F2AB23", "instance": "123.456.7",
        "sender": "joe@example.org", "recipient_count": 1,
        "client_address": "192.0.2.7", "sasl_username": "joe", **attributes}
    return "".join(f"{name}={value}\n" for name, value in given.items()
                   ).encode("utf-8", "surrogateescape") + b"\n"


def requests_in(*pieces: bytes) -> list[prl.Request]:
    """Return the requests that some reads bring."""
    reads = iter([*pieces, b""])
    return list(prl.read_requests(lambda: next(reads)))


def request(**attributes: object) -> prl.Request:
    """Return a request."""
    return requests_in(request_text(**attributes))[0]


def clean(database: prl.Database, settings: prl.Settings, now: int,
          ) -> list[int]:
    """Clean as the only host, there for long; return what each step did."""
    with database.lock:
        database.transact(prl.Transaction.run, "DELETE FROM mail_window")
        database.transact(prl.store_window, prl.own_window(settings))
        database.transact(
            prl.Transaction.run, "UPDATE mail_window SET since = 0")
        return list(prl.clean(database, settings, now))


class Client:
    """A connection to the daemon, as Postfix holds it."""

    def __init__(self, address: Any) -> None:
        """Connect to a path or to (host, port)."""
        family = (socket.AF_UNIX if isinstance(address, str) else
                  socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
        self.socket = socket.socket(family)
        try:
            self.socket.connect(address)  # waits where the backlog is full
        except OSError:
            self.socket.close()
            raise
        self.socket.settimeout(PATIENCE)
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
                 program: str = COMPILED) -> None:
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

    def wait_log(self, text: str, after: int = 0) -> str:
        """Wait until a text stands in the log, and return the log."""
        try:
            wait_for(lambda: text in self.log()[after:],
                     f"{text!r} in the log")
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
        try:  # wait() with a time looks too seldom
            wait_for(lambda: self.process.poll() is not None, "its end")
        except AssertionError:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"it does not stop:\n{self.log()}") from None
        if "Warning: " in self.log():  # Python's: it left something open
            raise AssertionError(self.log())
        return self.process.wait()


class SystemDaemon(Daemon):
    """The program as root starts it: with nothing but -f."""

    def __init__(self, folder: str, config: str) -> None:
        """Start it with folders of its own that do not exist yet."""
        os.makedirs(folder)
        self.folder, self.program = folder, PROGRAM
        self.socket, self.database, self.pidfile = (
            os.path.join(folder, *names) for names in (
                ("socket", "policy"), ("lib", "db"), ("run", "deep", "pid")))
        self.config = os.path.join(folder, "test.yaml")
        with open(self.config, "w", encoding="utf-8") as file:
            file.write(f"SOCKET: {self.socket}\npidfile: {self.pidfile}\n"
                       f"sqlite_config: {{database: {self.database}}}\n"
                       + config)
        self.options = ["-f", self.config]
        self.start()


def program_without(modules: Sequence[str], folder: str) -> str:
    """Return the program as it is where some modules are not installed."""
    path = os.path.join(folder, "program.py")
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"""import runpy, sys
sys.modules.update(dict.fromkeys({modules!r}))
runpy.run_path({COMPILED!r}, run_name="__main__")
""")
    return path


def hurried(folder: str, pause: float, modules: Sequence[str] = ()) -> str:
    """Return the program as it is with another pause between cleanings."""
    assert prl.CLEAN_PAUSE <= 10
    path = os.path.join(folder, "hurried.py")
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"""import sys
sys.modules.update(dict.fromkeys({modules!r}))
sys.path.insert(0, {TEMPORARY!r})
import policyd_rate_limit
policyd_rate_limit.CLEAN_PAUSE = {pause}
sys.exit(policyd_rate_limit.main())
""")
    return path


def asks(address: Any, times: int) -> list[str]:
    """Ask some times on a connection of its own."""
    with Client(address) as client:
        return [client.ask() for _ in range(times)]


def flood(daemons: list[Daemon], mails: Iterable[dict[str, Any]],
          connections: int = 16) -> Answers:
    """Send mails through some connections to each daemon at once."""
    source, lock, answers = iter(mails), threading.Lock(), Answers()

    def send(daemon: Daemon) -> None:
        with daemon.client() as client:
            while True:
                with lock:
                    mail = next(source, None)
                if mail is None:
                    return
                answers.append((mail, client.ask(**mail)))

    at_once(send, daemons * connections)
    return answers


def numbered(count: int, **attributes: object) -> list[dict[str, Any]]:
    """Return so many different mails."""
    return [{"instance": f"1.{n}", **attributes} for n in range(count)]


def counted(path: str) -> dict[str, int]:
    """Return what the database at a path holds of each identity."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return dict(connection.execute(
            "SELECT id, sum(recipient_count) FROM mail_count GROUP BY id"))


def open_and_read(path: str) -> str:
    """Return the text of a file."""
    with open(path, encoding="utf-8") as file:
        return file.read()


def wait_until_open(process: subprocess.Popen[str], path: str) -> None:
    """Wait until a process has opened a file."""
    path = os.path.realpath(path)

    def is_open() -> bool:
        with contextlib.suppress(FileNotFoundError):  # one just closed
            return path in map(
                os.readlink, glob.glob(f"/proc/{process.pid}/fd/*"))
        return False

    wait_for(is_open, f"{path} to be opened")


def status(daemon: Daemon, name: str) -> list[int]:
    """Return the numbers of a line of /proc/PID/status."""
    with open(f"/proc/{daemon.process.pid}/status") as file:
        [line] = [line for line in file if line.startswith(name + ":")]
    return [int(word) for word in line.split()[1:] if word.isdigit()]


def cpu_seconds(daemon: Daemon) -> float:
    """Return the processor time that a daemon has used."""
    with open(f"/proc/{daemon.process.pid}/stat") as file:
        words = file.read().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def tcp_address(daemon: Daemon) -> tuple[str, int]:
    """Return the address and port where a daemon says that it listens."""
    found = re.search(r"listening on \[?(.*?)\]?:(\d+)\n", daemon.log())
    assert found, daemon.log()
    return found[1], int(found[2])


@contextlib.contextmanager
def locked(path: str, timeout: float = 30) -> Iterator[None]:
    """Hold the lock of a database as another process would."""
    with contextlib.closing(sqlite3.connect(
            path, isolation_level=None, timeout=timeout)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")


def let_clean(path: str) -> None:
    """Have hosts on a SQLite database stored their windows for long."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE mail_window SET since = 0")
        database.commit()


@contextlib.contextmanager
def moved_away(path: str) -> Iterator[None]:
    """Let a folder, or a database, be missing for a while."""
    names = [path + end for end in ("", "-wal", "-shm")
             if os.path.exists(path + end)]
    for name in names:
        os.rename(name, name + ".moved")
    yield
    for name in names:
        os.rename(name + ".moved", name)


@contextlib.contextmanager
def locked_folder(path: str) -> Iterator[None]:
    """Put a folder in the place of a file, so that no such file is made."""
    os.mkdir(path)
    yield
    os.rmdir(path)


@contextlib.contextmanager
def replaced(path: str, content: bytes | None, mode: int) -> Iterator[None]:
    """Put another file in a file's place, or a folder, for a while."""
    with moved_away(path):
        if content is None:
            os.mkdir(path)
        else:
            with open(path, "wb", opener=lambda name, flags: os.open(
                    name, flags, mode)) as file:
                file.write(content)
        yield
        os.rename(path, path + ".rubbish")
        for end in "-wal", "-shm":
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path + end)


@contextlib.contextmanager
def disk_full(daemon: Daemon) -> Iterator[None]:
    """Let no file of a daemon grow."""
    pid, kind = daemon.process.pid, resource.RLIMIT_FSIZE
    soft, hard = resource.prlimit(pid, kind)
    resource.prlimit(pid, kind, (8192, hard))  # two pages do not fit
    yield
    resource.prlimit(pid, kind, (soft, hard))


class FolderTest(unittest.TestCase):
    """A test with a temporary folder, and daemons that end with it."""

    def setUp(self) -> None:
        """Make the folder; other users may look into it."""
        self.addCleanup(check_leaks)
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


class NetTest(FolderTest):
    """What the tests of this part share."""

    def passes(self, daemon: Daemon, *users: str) -> None:
        """Check that the daemon counts a mail of each user."""
        before = counted(daemon.database)
        for user in users or ("honest",):
            self.assertEqual(daemon.ask(sasl_username=user), PASS)
            name = user.lower()
            self.assertEqual(counted(daemon.database)[name],
                             before.get(name, 0) + 1)

    def crowd(self, daemon: Daemon, size: int) -> list[Client]:
        """Open many connections, which end with the test."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard < size + 100:
            skip(f"a hard limit of {size + 100} open files")
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self.addCleanup(
            resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(daemon.client())
                       for _ in range(size)]
            self.addCleanup(stack.pop_all().close)
        return clients

    def check_crowded(self, daemon: Daemon, size: int) -> None:
        """Check that who asks is served while many others only connect."""
        self.crowd(daemon, size)
        self.passes(daemon)
        used, start = cpu_seconds(daemon), time.monotonic()
        wait_for(lambda: time.monotonic() > start + 1.1, "a while")
        with daemon.client() as old:
            self.assertEqual(old.ask(), PASS)
            self.crowd(daemon, size // 8)
            self.assertEqual(old.ask(), PASS)  # those who ask are kept
        self.assertLess(cpu_seconds(daemon) - used, 0.25)
        self.assertLess(len(daemon.log().splitlines()), 8, daemon.log())

    def few_files(self, files: int) -> str:
        """Write a program that runs the daemon with few descriptors."""
        return self.write(f"few{files}.py", (
            "import resource, runpy\n"
            f"resource.setrlimit(resource.RLIMIT_NOFILE, ({files},) * 2)\n"
            f"runpy.run_path({COMPILED!r}, run_name='__main__')\n"))


def here_as_ourselves(test: FolderTest) -> list[str]:
    """Return options that put a daemon's files into a test's folder."""
    overrides = {
        "user": pwd.getpwuid(os.geteuid()).pw_name,
        "group": grp.getgrgid(os.getegid()).gr_name,
        "pidfile": test.path("pid"), "SOCKET": test.path("socket"),
        "sqlite_config.database": test.path("db.sqlite3")}
    return [word for name, value in overrides.items()
            for word in ("-o", f"{name}={value}")]


# Database servers of our own: new data in a temporary folder, on loopback.

SERVER_PATH = os.pathsep.join([
    os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin",
    *sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)])


SERVER_ENV = {"PATH": SERVER_PATH, "LC_ALL": "C", "TZ": "UTC"}
GALERA = next(iter(glob.glob("/usr/lib*/galera*/libgalera_smm.so")), "")


def memory_folder() -> str | None:
    """Return a folder in memory, if there is one with room for servers."""
    folder = "/dev/shm"
    if os.path.isdir(folder) and shutil.disk_usage(folder).free > 2**30:
        return folder
    return None


def free_port() -> int:
    """Choose a port that is free, below those of outgoing connections."""
    for port in random.SystemRandom().sample(range(20000, 32000), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def process_state(pid: int) -> str:
    """Return the letter for a process's state, nothing if it has ended."""
    try:
        with open(f"/proc/{pid}/stat", encoding="latin-1") as file:
            state = file.read().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if state in "ZX" else state


def children_of(pid: int) -> list[int]:
    """Return the children of a process that has one thread."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


class Server:
    """A database server as its own user, with a user test in it."""

    package: str  # Debian's
    programs: tuple[str, ...]
    user: str  # of the system
    backend: int  # the setting
    config_name: str  # of the setting that says how to connect
    config: dict[str, object]  # its value
    on_socket: dict[str, object]  # what changes for its unix socket
    command: list[str]  # that runs it
    client: list[str]  # the command before a statement
    # The administrator's statements:
    probe: str  # works once all is ready
    empty: str  # makes the database as if new
    connected: str  # how many connections the user test has
    disconnect: str  # ends them
    hurry: str  # ends those to come when idle for a second, if it can
    can_hurry = True  # not where the program sets that time for itself
    relax: str  # no longer
    grant: str  # lets the user weak read and write all tables, no more

    @classmethod
    def missing(cls) -> str:
        """Return the package that is not installed, or nothing."""
        found = all(shutil.which(program, path=SERVER_PATH)
                    for program in cls.programs)
        return "" if found else cls.package

    def __init__(self, folder: str) -> None:
        """Prepare a folder in one that the server may look into."""
        self.home = tempfile.mkdtemp(dir=folder, prefix=self.user + "-")
        self.data = os.path.join(self.home, "data")
        self.log = os.path.join(self.home, "log")
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.identity: dict[str, Any] = {}
        if is_root():
            owner = pwd.getpwnam(self.user)
            os.chown(self.home, owner.pw_uid, owner.pw_gid)
            self.identity = {"user": owner.pw_uid, "group": owner.pw_gid,
                             "extra_groups": []}

    def create(self) -> None:
        """Make the data, start, make the database and its users."""
        raise NotImplementedError

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        """Start it; it ends with the thread that calls, if not before."""
        self.process = self.spawn(
            "setpriv", "--pdeathsig", "KILL", *self.command)

    def wait_ready(self) -> None:
        """Wait until it answers; a failure shows the end of its log."""
        process = self.process
        assert process is not None

        def is_ready() -> bool:
            with contextlib.suppress(subprocess.SubprocessError):
                return bool(self.sql(self.probe))
            return process.poll() is not None

        wait_for(is_ready, "a server")
        if process.poll() is not None:
            raise AssertionError(f"the server ended:\n{self.said()}")

    def said(self) -> str:
        """Return the end of its log."""
        with open(self.log, encoding="utf-8", errors="replace") as log:
            return log.read()[-4000:]

    def kill(self) -> None:
        """End it as kill -9 does, and its children."""
        children = self.signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
            self.process = None
        wait_for(lambda: not any(map(process_state, children)),
                 "the server's children to end")

    def signal(self, number: int) -> list[int]:
        """Signal it and its children, none of whom gets away."""
        if self.process is None or self.process.poll() is not None:
            return []
        pid = self.process.pid
        os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: process_state(pid) in "T", "the server to stop")
        children = children_of(pid)
        for one in (*children, pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, number)
        return children

    def sql(self, statement: str) -> str:
        """Run a statement as administrator and return what it prints."""
        return subprocess.run(
            [*self.client, statement], env=SERVER_ENV, check=True,
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=PATIENCE).stdout.strip()

    def spawn(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a command as the server's user, its output to the log."""
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                command, cwd=self.home, env=SERVER_ENV, stdout=log,
                stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True, **self.identity)

    def run(self, *command: str) -> None:
        """Run a command as the server's user."""
        if self.spawn(*command).wait(PATIENCE):
            raise AssertionError(f"{command[0]}:\n{self.said()}")


class MariaDB(Server):
    """One MariaDB server."""

    package = "mariadb-server"
    programs: tuple[str, ...] = ("mariadbd", "mariadb-install-db", "mariadb")
    user = "mysql"
    backend = 1
    config_name = "mysql_config"
    probe = "SELECT max(user) FROM mysql.user"
    empty = "DROP DATABASE test; CREATE DATABASE test"
    connected = ("SELECT count(*) FROM information_schema.processlist"
                 " WHERE user = 'test'")
    disconnect = "KILL USER test"
    hurry = "SET GLOBAL wait_timeout = 1"
    relax = "SET GLOBAL wait_timeout = DEFAULT"
    grant = "GRANT SELECT, INSERT, UPDATE, DELETE ON test.* TO weak"
    users = ("CREATE USER test IDENTIFIED BY 'secret';"
             " CREATE USER weak IDENTIFIED BY 'secret';"
             " GRANT ALL ON test.* TO test; CREATE DATABASE test")

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        path = os.path.join(self.home, "socket")
        self.config = {
            "host": "127.0.0.1", "port": self.port, "user": "test",
            "passwd": "secret", "db": "test", "charset": "utf8"}
        self.on_socket = {"host": "localhost", "unix_socket": path}
        self.client = [
            "mariadb", "--no-defaults", f"--socket={path}", "--user=root",
            "--batch", "--skip-column-names", "--execute"]
        self.command = [
            "mariadbd", "--no-defaults", f"--datadir={self.data}",
            f"--socket={path}", f"--port={self.port}",
            f"--pid-file={self.home}/pid", f"--tmpdir={self.home}",
            "--bind-address=127.0.0.1", "--skip-name-resolve",
            "--innodb-buffer-pool-size=64M", "--innodb-log-file-size=8M"]

    def create(self) -> None:
        self.run("mariadb-install-db", "--no-defaults", "--skip-test-db",
                 f"--datadir={self.data}", f"--tmpdir={self.home}",
                 "--auth-root-authentication-method=normal",
                 "--innodb-log-file-size=8M")
        self.start()
        self.sql(self.users)


class MySQL(MariaDB):
    """One server of MySQL itself; Debian has it in sid alone."""

    package = "mysql-server-core"
    programs = ("mysqld", "mysql")
    can_hurry = False  # its wait_timeout bounds transactions, too
    user = "nobody"  # the package makes none
    connected = ("SELECT count(*) FROM performance_schema.processlist"
                 " WHERE user = 'test'")
    disconnect = ("SELECT concat('KILL ', max(id)) INTO @kill FROM"
                  " performance_schema.processlist WHERE user = 'test';"
                  " PREPARE kill_it FROM @kill; EXECUTE kill_it")

    @classmethod
    def missing(cls) -> str:
        """Return the package that is not installed, or nothing."""
        if super().missing():
            return cls.package
        version = subprocess.run(
            ["mysqld", "--version"], env=SERVER_ENV, check=True,
            capture_output=True, text=True).stdout
        return cls.package if "MariaDB" in version else ""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.client[0] = "mysql"
        self.command = [
            "mysqld", *[option for option in self.command[1:]
                        if "log-file-size" not in option],
            "--mysqlx=OFF", "--secure-file-priv=NULL",
            "--log-error-verbosity=3", "--innodb-redo-log-capacity=16M"]

    def create(self) -> None:
        self.run("mysqld", "--no-defaults", "--initialize-insecure",
                 f"--datadir={self.data}")
        self.start()
        self.sql(self.users)


class PostgreSQL(Server):
    """One PostgreSQL server."""

    package = "postgresql"
    programs = ("initdb", "postgres", "psql")
    user = "postgres"
    backend = 2
    config_name = "pgsql_config"
    probe = "SELECT 1"
    empty = ("DROP SCHEMA public CASCADE;"
             " CREATE SCHEMA public AUTHORIZATION test")
    connected = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'test'"
    disconnect = ("SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                  " WHERE usename = 'test'")
    hurry = "ALTER ROLE test SET idle_session_timeout = '1s'"
    relax = "ALTER ROLE test RESET idle_session_timeout"
    grant = ("GRANT USAGE ON SCHEMA public TO weak; GRANT SELECT, INSERT,"
             " UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO weak")

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.config = {
            "host": "127.0.0.1", "port": self.port, "user": "test",
            "password": "secret", "database": "postgres"}
        self.on_socket = {"host": self.home}
        self.client = [
            "psql", "-XqAt", "-h", self.home, "-p", str(self.port),
            "-U", "postgres", "-v", "ON_ERROR_STOP=1", "-c"]
        self.command = [
            "postgres", "-D", self.data, "-p", str(self.port),
            "-k", self.home, "-h", "127.0.0.1", "-B", "64MB",
            "-c", "dynamic_shared_memory_type=mmap"]

    def create(self) -> None:
        self.run("initdb", f"--pgdata={self.data}", "--no-sync",
                 "--username=postgres", "--encoding=UTF8", "--locale=C",
                 "--auth-local=trust", "--auth-host=scram-sha-256")
        self.start()
        self.sql("CREATE USER test PASSWORD 'secret';"
                 " CREATE USER weak PASSWORD 'secret'")


class Galera:
    """Three MariaDB servers, each with all the data."""

    def __init__(self, folder: str) -> None:
        """Prepare the nodes."""
        self.nodes = [MariaDB(folder) for _ in range(3)]
        ports = [free_port() for _ in self.nodes]
        cluster = ",".join(f"127.0.0.1:{port}" for port in ports)
        for node, port in zip(self.nodes, ports):
            provider = {
                "base_host": "127.0.0.1", "base_port": port,
                "gmcast.listen_addr": f"tcp://127.0.0.1:{port}",
                "ist.recv_addr": f"127.0.0.1:{free_port()}",
                "gcache.size": "4M"}  # no shorter time to suspect a busy node
            node.command += [
                "--wsrep-on=ON", f"--wsrep-provider={GALERA}",
                f"--wsrep-cluster-address=gcomm://{cluster}",
                f"--wsrep-node-address=127.0.0.1:{port}",
                f"--wsrep-sst-receive-address=127.0.0.1:{free_port()}",
                "--wsrep-sst-method=rsync", "--binlog-format=ROW",
                "--innodb-autoinc-lock-mode=2", "--wsrep-provider-options="
                + ";".join(f"{key}={provider[key]}" for key in provider)]

    @staticmethod
    def missing() -> str:
        """Return the package that is not installed, or nothing."""
        return MariaDB.missing() or ("" if GALERA else "galera-4")

    def create(self) -> None:
        """Make one node's data, and start all from it.

        They are told that they were a cluster when they ended: to copy the
        data from one that runs to the others would take longer.
        """
        first = self.nodes[0]
        first.command.append("--wsrep-new-cluster")
        first.create()
        first.command.pop()
        assert first.process is not None
        first.process.terminate()
        first.process.wait(PATIENCE)
        os.unlink(os.path.join(first.data, "galera.cache"))
        members = sorted(str(uuid.uuid1()) for _ in self.nodes)
        for node, member in zip(self.nodes, members):
            if node is not first:
                node.run("cp", "-a", first.data, node.data)
            view = os.path.join(node.data, "gvwstate.dat")
            with open(view, "w", encoding="ascii") as file:
                print(f"my_uuid: {member}", "#vwbeg",
                      f"view_id: 3 {members[0]} 3", "bootstrap: 0",
                      *(f"member: {one} 0" for one in members), "#vwend",
                      sep="\n", file=file)
            os.chmod(view, 0o666)
            node.launch()
        for node in self.nodes:
            node.wait_ready()

    def kill(self) -> None:
        """Kill all nodes."""
        for node in self.nodes:
            node.kill()


class Fault:
    """What is to happen to the next statement that has a text in it."""

    def __init__(self, text: str, error: Exception, is_sent: bool,
                 before: Callable[[], Any], after: str) -> None:
        self.text = text
        self.error = error
        self.is_sent = is_sent  # does the database get it first?
        self.before = before  # what is done ahead of it
        self.after = after  # a text that has to come first

    def is_met(self, statement: str) -> bool:
        """Say whether this is the statement."""
        if self.after in statement:
            self.after = ""
        return not self.after and self.text in statement


class Faults:
    """A database that fails on command: it stands between it and a ledger."""

    def __init__(self, ledger: prl.Ledger) -> None:
        self.planned: list[Fault] = []
        backend: Any = ledger.database.backend
        connect = backend.connect
        backend.connect = lambda timeout: FaultyConnection(
            connect(timeout), self)
        self.conflict = OSError(*backend.conflicts[:1] or ["locked"])
        is_conflict = backend.is_conflict
        backend.is_conflict = lambda error: (
            error is self.conflict or is_conflict(error))
        ledger.database.close()  # the next connection is ours

    def plan(self, text: str, error: Exception | None = None,
             is_sent: bool = False, before: Callable[[], Any] = int,
             after: str = "") -> None:
        """Let the next statement fail that has a text in it."""
        self.planned.append(Fault(
            text, error or OSError("the line is cut"), is_sent, before,
            after))

    def lose_commit(self, is_sent: bool = True, **more: Any) -> None:
        """Let nobody know what became of the next mails that are written."""
        self.plan("COMMIT", None, is_sent, after=prl.INSERT[:22], **more)
        if not is_sent:
            self.plan("ROLLBACK", None, True, after="COMMIT")

    def meet(self, statement: str) -> Fault | None:
        """Return what was planned for a statement, which it is no longer."""
        for fault in self.planned:
            if fault.is_met(statement):
                self.planned.remove(fault)
                fault.before()
                return fault
        return None


class FaultyConnection:
    """A connection whose cursors fail on command."""

    def __init__(self, connection: Any, faults: Faults) -> None:
        self.__dict__.update(
            connection=connection, faults=faults, cursors=[])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.connection, name, value)

    def cursor(self) -> Any:
        """Return a cursor that asks what is planned."""
        self.cursors.append(self.connection.cursor())
        return FaultyCursor(self.cursors[-1], self)

    def close(self) -> None:
        """Close the connection, and what tracebacks still hold of it."""
        for cursor in self.cursors:
            with contextlib.suppress(Exception):
                cursor.close()
        self.connection.close()


class FaultyCursor:
    """A cursor that fails on command; a cut line stays cut."""

    def __init__(self, cursor: Any, line: FaultyConnection) -> None:
        self.cursor, self.line = cursor, line

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cursor, name)

    def execute(self, statement: str, *values: Any) -> Any:
        """Execute a statement, or fail."""
        fault = self.line.faults.meet(statement)
        if fault is None or fault.is_sent:
            result = self.cursor.execute(statement, *values)
        if fault is None:
            return result
        if fault.is_sent:
            self.line.close()
        if fault.error.args:
            raise fault.error
        return self.cursor.execute(statement, *values)

    def executemany(self, statement: str, rows: Any) -> Any:
        """Execute a statement many times, or fail."""
        fault = self.line.faults.meet(statement)
        if fault is not None and fault.error.args:
            raise fault.error
        return self.cursor.executemany(statement, rows)


def settled(ledger: prl.Ledger, mails: Sequence[prl.Mail],
            query: str | None = None) -> list[prl.Verdict]:
    """Settle some mails in one transaction; return the verdicts."""
    settlement = prl.Settlement(mails, {}, {}, max(
        mail.now for mail in mails))
    ledger.database.transact(prl.settle, settlement, query)
    return settlement.verdicts


class Relay:
    """Passes TCP connections on, each round trip slower by a delay."""

    def __init__(self, port: int, delay: float) -> None:
        """Listen, and pass on to a port; the delay is in seconds."""
        self.target = ("127.0.0.1", port)
        self.delay = delay
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        in_background(self.accept)

    def close(self) -> None:
        """Accept no more."""
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def accept(self) -> None:
        """Join each connection with one to the target."""
        with contextlib.suppress(OSError):
            while True:
                near = self.listener.accept()[0]
                far = socket.create_connection(self.target)
                in_background(self.join, near, far)

    def join(self, near: socket.socket, far: socket.socket) -> None:
        """Pass on what comes from either, until one ends."""
        with near, far:
            for one in (near, far):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            back = in_background(self.carry, far, near)
            self.carry(near, far)
            back.join()

    def carry(self, source: socket.socket, sink: socket.socket) -> None:
        """Pass on what comes, each piece after half the delay."""
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                time.sleep(self.delay / 2)
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


class Pooler(Relay):
    """Lets one log in to PostgreSQL, but is silent about statements."""

    silent = True

    def carry(self, source: socket.socket, sink: socket.socket) -> None:
        """Pass on what comes, no statement while it is silent."""
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not self.silent or data[:1] not in (b"P", b"Q"):
                    sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


MAIN_CF = """\
compatibility_level = 3.6
queue_directory = {0}/queue
data_directory = {0}/data
maillog_file = {0}/log
maillog_file_prefixes = {0}
inet_interfaces = 127.0.0.1
myhostname = mx.test
mynetworks = 0.0.0.0/0 [::]/0
smtpd_authorized_xclient_hosts = 127.0.0.1
smtpd_peername_lookup = no
smtpd_error_sleep_time = 0
smtpd_relay_restrictions = permit_mynetworks reject_unauth_destination
local_recipient_maps =
local_transport = discard:
relay_transport = discard:
default_transport = discard:
"""
MASTER_CF = """\
127.0.0.1:{} inet n - n - - smtpd
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
discard unix - - n - - discard
postlog unix-dgram n - n - 1 postlogd
"""
POSTCONF = "/usr/sbin/postconf"


class Postfix:
    """A Postfix of our own in a folder; it discards what it takes."""

    def __init__(self, folder: str, **main_cf: str) -> None:
        """Start it, for half an hour at most, and wait for its banner."""
        self.folder = folder
        for name in ("config", "queue/pid", "data", *(
                f"queue/{queue}" for queue in (
                    "active", "defer", "deferred", "incoming", "private",
                    "public"))):
            os.makedirs(os.path.join(folder, name))
            if name not in ("config", "queue/pid"):
                shutil.chown(os.path.join(folder, name), "postfix")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        settings = "".join(f"{k} = {v}\n" for k, v in main_cf.items())
        self.write("log", "")
        self.write("config/master.cf", MASTER_CF.format(self.port))
        path = self.write("config/main.cf", MAIN_CF.format(folder) + settings)
        os.utime(path, (1, 1))  # Postfix waits while it is young
        programs = subprocess.check_output(
            [POSTCONF, "-dh", "daemon_directory"], text=True,
            stderr=subprocess.DEVNULL).strip()
        self.master = subprocess.Popen(
            [f"{programs}/master", "-e", "1800", "-c", f"{folder}/config"],
            start_new_session=True)
        try:
            wait_for(self.is_up, "Postfix to answer")
        except AssertionError as error:
            self.stop()
            raise AssertionError(f"{error}:\n{self.log()}") from None

    @staticmethod
    def missing() -> str | None:
        """Name what this machine lacks to run Postfix, if anything."""
        if not os.access(POSTCONF, os.X_OK):
            return "Postfix"
        return None if is_root() else "the rights of root, for Postfix"

    def write(self, name: str, text: str) -> str:
        """Write a file in the folder and return its path."""
        path = os.path.join(self.folder, name)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return path

    def is_up(self) -> bool:
        """Tell whether smtpd answers."""
        with contextlib.suppress(OSError), socket.create_connection(
                ("127.0.0.1", self.port), PATIENCE) as client:
            return client.recv(512).startswith(b"220 ")
        return False

    def log(self) -> str:
        """Return what Postfix has logged so far."""
        with open(os.path.join(self.folder, "log"), "rb") as log:
            return log.read().decode("utf-8", "replace")

    def wait_log(self, text: str) -> None:
        """Wait until a text stands in the log, which Postfix writes late."""
        wait_for(lambda: text in self.log(), f"{text!r} in Postfix's log")

    def stop(self) -> None:
        """Kill all of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.master.pid, signal.SIGKILL)
        self.master.wait()

    def connect(self, login: str = "", address: str = "") -> smtplib.SMTP:
        """Connect as a client with this SASL name and address."""
        smtp = smtplib.SMTP("127.0.0.1", self.port, "client.test", PATIENCE)
        smtp.command_encoding = "utf-8"
        smtp.ehlo()
        name = urllib.parse.quote(login, "@").replace("%", "+")
        family = "IPV6:" if ":" in address else ""
        xclient = (f" LOGIN={name}" if name else "") + (
            f" ADDR={family}{address}" if address else "")
        if xclient:
            code, reply = smtp.docmd("XCLIENT" + xclient)
            if code != 220:
                raise AssertionError(f"XCLIENT{xclient}: {code} {reply!r}")
            smtp.ehlo()
        return smtp

    def send(self, login: str = "", recipients: int = 1,
             address: str = "", sender: str = "s@a.test") -> list[int]:
        """Send a mail on a connection of its own, as mail() does."""
        with self.connect(login, address) as smtp:
            return mail(smtp, recipients, sender)


def mail(smtp: smtplib.SMTP, recipients: int = 1,
         sender: str = "s@a.test") -> list[int]:
    """Send a mail; return the codes for each RCPT and the last for DATA."""
    utf8 = "" if sender.isascii() else " SMTPUTF8"
    code, reply = smtp.docmd(f"MAIL FROM:<{sender}>{utf8}")
    if code != 250:
        raise AssertionError(f"MAIL FROM {sender}: {code} {reply!r}")
    codes = [smtp.docmd(f"RCPT TO:<r{n}@b.test>")[0]
             for n in range(recipients)]
    try:
        if 250 in codes:
            codes.append(smtp.data("Subject: test\n\n")[0])
    except smtplib.SMTPDataError as error:
        codes.append(error.smtp_code)
    smtp.docmd("RSET")
    return codes


# A mail host of our own.  The first script makes a control group for it, and
# ends it when its standard input ends, so also when the tests are killed.
HOST_KEEPER = """
mount -t tmpfs tmpfs /mnt
mkdir /mnt/cgroup
mount -t cgroup2 cgroup2 /mnt/cgroup
group=/mnt/cgroup/$1
mkdir "$group"
exec 3<&0
(while read -r _; do :; done; echo 1 >"$group/cgroup.kill") <&3 &
unshare --mount --pid --net --uts --ipc --fork sh -euc '
    echo 0 >"$2/cgroup.procs"
    exec unshare --cgroup sh -euc "$1" - "$3"' - "$3" "$group" "$2" || :
find "$group" -depth -type d -exec rmdir {} +
"""
# The second one becomes the host's first process.  All that this machine has
# on its disk is there; what is written goes to a layer in memory.
HOST_BOOT = """
mount -t tmpfs tmpfs /mnt
mkdir /mnt/upper /mnt/work /mnt/root
mount -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work \\
    overlay /mnt/root
cd /mnt/root
mkdir -p "./$1"
mount --bind "$1" "./$1"
mount -o remount,bind,ro "./$1"
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=755 tmpfs dev
while read -r name number; do
    mknod -m 666 "dev/$name" c $number
done <<END
null 1 3
zero 1 5
full 1 7
random 1 8
urandom 1 9
tty 5 0
END
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
pivot_root . mnt
umount -l /mnt
find /etc/systemd/system -type l -delete  # this machine's own services
container=policyd-test exec setpriv \\
    --bounding-set -sys_module,-sys_rawio,-sys_time,-syslog \\
    /lib/systemd/systemd --unit=basic.target --show-status=no
"""
# What Debian's Postfix begins with; nobody listens on the relayhost's port.
HOST_POSTFIX = """
grep -q '^overlay / ' /proc/mounts  # never on this machine itself
rm -rf /etc/policyd-rate-limit.* /var/lib/policyd-rate-limit \\
    /var/spool/postfix/ratelimit /etc/init.d/policyd-rate-limit \\
    /etc/systemd/system/policyd-rate-limit.service  # if this machine has it
cp /usr/share/postfix/main.cf.debian /etc/postfix/main.cf
cp /usr/share/postfix/master.cf.dist /etc/postfix/master.cf
postconf -e 'myhostname = mx.test' 'relayhost = [127.0.0.1]:9' \\
    'smtpd_authorized_xclient_hosts = 127.0.0.1' \\
    'smtpd_peername_lookup = no' 'smtpd_error_sleep_time = 0'
systemctl start postfix
"""


class Host(Postfix):
    """A mail host with systemd and Postfix, as Debian sets it up.

    It has this machine's files, but processes and a network of its own, and
    nothing of it is left in the end.  Its Postfix defers all that it takes.
    """

    ENVIRONMENT = {"HOME": "/root", "LC_ALL": "C", "PATH": (
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")}
    PROGRAMS = ("/lib/systemd/systemd", "adduser", "dpkg-deb", "jq", "pgrep",
                "setfacl", "sqlite3", "unshare")

    def __init__(self, folder: str) -> None:
        """Boot it, and start its Postfix."""
        os.mkdir(folder)
        self.folder, self.port, self.init = folder, 25, 0
        with open(os.path.join(folder, "console"), "wb") as console:
            self.keeper = subprocess.Popen(
                ["unshare", "--mount", "sh", "-euc", HOST_KEEPER, "-",
                 f"policyd-{uuid.uuid4().hex}", HERE, HOST_BOOT],
                stdin=subprocess.PIPE, stdout=console, stderr=console)
        try:
            wait_for(self.is_booted, "systemd to be up")
            done = self.shell(HOST_POSTFIX)
            if done.returncode:
                raise AssertionError(f"no Postfix there: {done.stdout}")
            wait_for(self.is_up, "Postfix to answer")
        except BaseException:
            self.stop()
            raise

    @classmethod
    def missing(cls) -> str | None:
        """Name what this machine lacks to run a host, if anything."""
        path = cls.ENVIRONMENT["PATH"]
        return Postfix.missing() or next(
            (name for name in cls.PROGRAMS
             if not shutil.which(name, path=path)), None)

    def is_booted(self) -> bool:
        """Tell whether systemd is up; skip the test if it cannot be."""
        if self.keeper.poll() is not None:
            with open(os.path.join(self.folder, "console")) as console:
                said = " ".join(console.read().split())
            # Not by skip(): .ci/run accepts that a machine allows no host.
            raise unittest.SkipTest(f"no host boots here: {said}")
        with contextlib.suppress(OSError):
            for child in children_of(self.keeper.pid):
                for self.init in children_of(child):
                    return self.is_systemd_up()
        return False

    def is_systemd_up(self) -> bool:
        """Tell whether the first process there is systemd, and is ready."""
        with open(f"/proc/{self.init}/comm") as name:
            if name.read() != "systemd\n":
                return False
        state = self.shell("systemctl is-system-running --wait").stdout
        return state in ("running\n", "degraded\n")

    def shell(self, text: str) -> subprocess.CompletedProcess[str]:
        """Run commands there as root, in this repository.

        They stop at the first that fails.  What they print to stderr stands
        in stdout.
        """
        return subprocess.run(
            ["nsenter", "--target", str(self.init), "--all", "sh", "-euc",
             f"cd {shlex.quote(HERE)}\n{text}"],
            env=self.ENVIRONMENT, stdin=subprocess.DEVNULL, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=PATIENCE, check=False)

    def within(self, work: Callable[..., Any], *given: object) -> Any:
        """Call something in a thread that is in the host's network.

        A socket that it makes stays in that network.
        """
        setns = ctypes.CDLL(None, use_errno=True).setns

        def enter() -> None:
            with open(f"/proc/{self.init}/ns/net") as network:
                if setns(network.fileno(), 0):
                    raise OSError(ctypes.get_errno(), "setns")

        with concurrent.futures.ThreadPoolExecutor(1, "", enter) as pool:
            return pool.submit(work, *given).result(PATIENCE)

    def is_up(self) -> bool:
        """Tell whether smtpd answers."""
        return bool(self.within(super().is_up))

    def connect(self, login: str = "", address: str = "") -> smtplib.SMTP:
        """Connect as a client with this SASL name and address."""
        smtp: smtplib.SMTP = self.within(super().connect, login, address)
        return smtp

    def log(self) -> str:
        """Return what Postfix has logged so far."""
        return self.shell("journalctl -u 'postfix@-' -o cat").stdout

    def stop(self) -> None:
        """Kill all of it."""
        self.keeper.communicate()


class Sink:
    """A mail server in a thread, which keeps what it takes."""

    def __init__(self, certificate: str = "", login: str = "",
                 refuse: tuple[str, ...] = (), silent: bool = False,
                 mechanism: str = "PLAIN",
                 taking: Callable[[], object] = lambda: None) -> None:
        """Offer STARTTLS with a certificate, AUTH with a user:password."""
        self.certificate, self.login = certificate, login
        self.refuse, self.silent = set(refuse), silent
        self.mechanism, self.taking = mechanism, taking
        self.mails: list[email.message.EmailMessage] = []
        self.to: list[str] = []
        self.raw: list[bytes] = []
        self.said: list[str] = []  # all commands, TLS marked by a star
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self.socket.getsockname()
        in_background(self.accept)

    def accept(self) -> None:
        """Serve each connection in a thread until the socket is closed."""
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.socket.accept()
                in_background(self.guard, client)

    def guard(self, client: socket.socket) -> None:
        """Serve a connection that may break."""
        with contextlib.suppress(OSError), client:
            if self.silent:
                client.recv(1)
                return
            client.sendall(b"220 sink\r\n")
            self.serve(client, "")

    def serve(self, client: socket.socket, star: str) -> None:
        """Obey the commands of a client."""
        stream = client.makefile("rb")
        to = ""
        for line in stream:
            text = line.decode().strip()
            self.said.append(star + text)
            verb = text.upper().split(":")[0].split()[0]
            answer = "250 ok"
            if verb == "EHLO":
                offers = ["sink", "8BITMIME"]
                offers += ["STARTTLS"] if self.certificate and not star else []
                offers += [f"AUTH {self.mechanism}"] if self.login else []
                answer = "\r\n".join(
                    f"250{' ' if one == offers[-1] else '-'}{one}"
                    for one in offers)
            elif verb == "STARTTLS":
                client.sendall(b"220 go\r\n")
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(self.certificate)
                with context.wrap_socket(client, server_side=True) as secret:
                    self.serve(secret, "*")
                return
            elif verb == "QUIT":
                answer = "221 bye"
            elif verb == "AUTH":
                answer = self.authenticate(client, stream, text.split()[2:])
            elif verb == "RCPT":
                to = text.split("<")[1].split(">")[0]
                answer = "550 5.1.1 no such" if to in self.refuse else answer
            elif verb == "DATA":
                client.sendall(b"354 go\r\n")
                data = b"".join(iter(stream.readline, b".\r\n"))
                self.taking()
                if "data" in self.refuse:
                    answer = "452 4.3.1 full"
                else:
                    self.raw.append(data.replace(b"\r\n", b"\n"))
                    self.to.append(to)
                    self.mails.append(email.message_from_bytes(
                        self.raw[-1], policy=email.policy.default))
            client.sendall(answer.encode() + b"\r\n")

    def authenticate(self, client: socket.socket, stream: Any,
                     first: list[str]) -> str:
        """Check a login by PLAIN or LOGIN."""
        def ask(prompt: str) -> str:
            client.sendall(f"334 {prompt}\r\n".encode())
            return base64.b64decode(stream.readline()).decode()

        if self.mechanism == "LOGIN":
            user = (base64.b64decode(first[0]).decode() if first
                    else ask("VXNlcm5hbWU6"))
            given = f"{user}:{ask('UGFzc3dvcmQ6')}"
        else:
            given = ":".join(
                base64.b64decode(first[0]).decode().split("\0")[1:])
        return ("235 welcome" if given == self.login
                else "535 5.7.8 wrong password")

    def wait(self, mails: int) -> None:
        """Wait for some mails, and say if there are more."""
        wait_for(lambda: len(self.mails) >= mails, f"{mails} mails")
        assert len(self.mails) == mails, self.mails

    def texts(self) -> list[list[list[str]]]:
        """Return for each mail the rows of its table."""
        return [[line.split() for line in mail.get_content().splitlines()[3:]]
                for mail in self.mails]


def make_certificate(folder: str) -> str:
    """Make a certificate that nobody signed, with its key in one file."""
    if not shutil.which("openssl"):
        skip("no openssl")
    path = os.path.join(folder, "sink.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days",
         "2", "-subj", "/CN=sink", "-keyout", path, "-out", path + ".crt"],
        check=True, capture_output=True)
    with open(path, "a") as whole, open(path + ".crt") as part:
        whole.write(part.read())
    return path


class ShapeTest(unittest.TestCase):
    """The file keeps the promises of its header and of its sections."""

    source: str
    tree: ast.Module
    starts: list[tuple[int, str]]

    @classmethod
    def setUpClass(cls) -> None:
        with open(PROGRAM, encoding="utf-8") as file:
            cls.source = file.read()
        cls.tree = ast.parse(cls.source)
        cls.starts = [
            (number, match[1]) for number, line in enumerate(
                cls.source.splitlines(), 1)
            if (match := re.match(r"# (\d+\. .*)$", line))]

    def section(self, line: int) -> int:
        """Return the place of the section in which a line stands."""
        return sum(start <= line for start, _ in self.starts)

    def test_lines_have_79_columns_at_most(self) -> None:
        for number, line in enumerate(self.source.splitlines(), 1):
            self.assertLessEqual(len(line), 79, f"line {number}")

    def test_functions_are_short_and_flat(self) -> None:
        blocks = (ast.If, ast.For, ast.While, ast.Try, ast.With)

        def depth(node: ast.AST) -> int:
            inner = [depth(child) for child in ast.iter_child_nodes(node)]
            own = int(isinstance(node, blocks))
            if isinstance(node, ast.If) and len(node.orelse) == 1:
                # What follows an "else", as "elif" does, is no deeper.
                inner[-1] = max(0, inner[-1] - own)
            return max(inner, default=0) + own

        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                length = node.end_lineno - node.lineno + 1
                self.assertLessEqual(length, 50, node.name)
                self.assertLessEqual(depth(node), 3, node.name)

    def test_the_map_in_the_docstring_names_the_sections(self) -> None:
        described = re.findall(r"(\d+) ([A-Z][a-z ]+[a-z])",
                               ast.get_docstring(self.tree) or "")
        self.assertEqual([f"{n}. {name}" for n, name in described],
                         [title for _, title in self.starts])

    def test_imports_are_the_standard_library_alone(self) -> None:
        known = getattr(sys, "stdlib_module_names", None)
        if known is None:
            return  # Python 3.9 has no such list; the others do the test
        for node in self.tree.body:
            names = ([alias.name for alias in node.names]
                     if isinstance(node, ast.Import) else
                     [node.module or ""] if isinstance(node, ast.ImportFrom)
                     else [])
            for name in names:
                self.assertIn(name.partition(".")[0], known)

    def test_a_section_uses_only_those_above_it(self) -> None:
        defined: dict[str, int] = {}
        for top in self.tree.body:
            if isinstance(top, (ast.FunctionDef, ast.ClassDef)):
                defined[top.name] = self.section(top.lineno)
            elif isinstance(top, ast.Assign):
                for target in top.targets:
                    if isinstance(target, ast.Name):
                        defined[target.id] = self.section(top.lineno)
        for node in ast.walk(self.tree):
            if (isinstance(node, ast.Name) and node.id in defined
                    and isinstance(node.ctx, ast.Load)):
                self.assertLessEqual(
                    defined[node.id], self.section(node.lineno),
                    f"line {node.lineno}: {node.id}")

    def test_the_first_five_sections_are_pure(self) -> None:
        impure = {"os", "socket", "time", "threading", "open", "print"}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Name) and node.id in impure:
                self.assertGreater(self.section(node.lineno), 5,
                                   f"line {node.lineno}: {node.id}")

    def test_only_main_decides_on_the_exit(self) -> None:
        self.assertEqual(self.source.count("sys.exit("), 1)

    def test_public_names_have_docstrings(self) -> None:
        classes = [node for node in self.tree.body
                   if isinstance(node, ast.ClassDef)]
        for named in itertools.chain(
                self.tree.body, *(one.body for one in classes)):
            if (isinstance(named, (ast.FunctionDef, ast.ClassDef))
                    and not named.name.startswith("_")):
                self.assertIsNotNone(ast.get_docstring(named), named.name)


class DocsTest(unittest.TestCase):
    """README, sample file, --help and program say the same."""

    readme: str

    @classmethod
    def setUpClass(cls) -> None:
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
            cls.readme = file.read()

    def test_readme_has_each_setting_with_its_default(self) -> None:
        for one in fields(prl.Settings):
            row = re.search(rf"^\| `{one.name}` \| `(.*?)` \| (.*) \|$",
                            self.readme, re.MULTILINE)
            assert row is not None, one.name
            value, _ = prl.parse_yaml(row[1])
            if value is not None:
                value = one.metadata["check"](value)
            self.assertEqual(value or None, getattr(
                prl.Settings(), one.name) or None, one.name)

    def test_the_sample_file_holds_each_setting_with_its_default(self) -> None:
        config = prl.read_config(os.path.join(HERE, "policyd-rate-limit.yaml"))
        self.assertEqual(list(config.values.keys() ^ prl.default_values()), [])
        self.assertEqual(prl.check_settings(config), prl.Settings())

    def test_the_reader_refuses_what_readers_read_differently(self) -> None:
        for example in ("&a 1", "*a", "!!str 1", "1_000", "0x1F", "1e5",
                        ".inf", "2024-12-31"):
            for text in (example, f"a: {example}"):
                with self.subTest(text=text), \
                        self.assertRaises(prl.YamlError):
                    prl.parse_yaml(text)

    def test_readme_has_each_option_and_exit_code(self) -> None:
        for option in set(re.findall(
                r"(?<![\w-])--?[a-z][a-z-]*", run("-h").stdout)):
            self.assertRegex(self.readme, f"`{option}[ `]")
        codes = [error.exit_code
                 for error in prl.PolicydError.__subclasses__()]
        for code in {0, 6, *codes}:
            self.assertRegex(self.readme, rf"\n\| {code} \|")

    def test_the_program_runs_with_the_system_s_python(self) -> None:
        with open(PROGRAM, encoding="utf-8") as file:
            self.assertEqual(file.readline(), "#!/usr/bin/python3\n")

    def test_the_docstring_tells_the_exit_codes(self) -> None:
        told = re.search(r"Exit status:(.*?)\n\n", prl.__doc__ or "", re.S)
        assert told is not None
        self.assertEqual(set(re.findall(r"\b(\d)\b", told[1])),
                         set("01234568"))


class UnitTest(FolderTest):
    """The unit file is sound, and shuts the daemon in."""

    def analyze(self, *what: str) -> subprocess.CompletedProcess[str]:
        """Let systemd-analyze look at the unit, with a program that is."""
        with open(os.path.join(HERE, "policyd-rate-limit.service"),
                  encoding="utf-8") as file:
            unit = file.read().replace(
                "/usr/local/bin/policyd-rate-limit", "/bin/true")
        for text in "[Service]\nExecStart=/bin/true\n", unit:
            path = self.write("policyd-rate-limit.service", text)
            try:
                done = subprocess.run(
                    ["systemd-analyze", *what, path], capture_output=True,
                    text=True, timeout=PATIENCE, check=False)
            except OSError as error:
                skip(f"no systemd-analyze: {error}")
            if text is not unit and done.stderr:  # a chroot, an old version
                skip(f"systemd-analyze cannot work here: {done.stderr}")
        return done

    def test_it_verifies_without_a_word(self) -> None:
        done = self.analyze("verify")
        self.assertEqual((done.returncode, done.stdout + done.stderr),
                         (0, ""))

    def test_it_is_started_again_unless_that_cannot_help(self) -> None:
        with open(os.path.join(HERE, "policyd-rate-limit.service"),
                  encoding="utf-8") as file:
            lines = file.read().splitlines()
        fatal = sorted(error.exit_code for error in (
            prl.UnknownUser, prl.AlreadyRunning, prl.SocketMalformed,
            prl.ConfigError))
        self.assertEqual(fatal, [2, 3, 4, 5])
        for line in ("Restart=on-failure", "RestartSec=5s",
                     "RestartPreventExitStatus=2 3 4 5",
                     "StartLimitIntervalSec=0"):
            self.assertIn(line, lines)

    def test_it_has_what_a_mail_host_needs(self) -> None:
        with open(os.path.join(HERE, "policyd-rate-limit.service"),
                  encoding="utf-8") as file:
            unit = file.read()
        for text in ("\nSyslogFacility=mail\n", "\nTimeoutStartSec=1h\n",
                     "\nLimitCORE=0\n", "\nWatchdogSec=2min\n",
                     "\nProtectSystem=full\n",
                     "-g postfix -m 0750 /var/spool/postfix/ratelimit ||"):
            self.assertIn(text, unit)
        self.assertNotIn("ReadWritePaths", unit)
        tasks, = re.findall("(?m)^TasksMax=([0-9]+)$", unit)
        self.assertGreater(int(tasks), prl.PolicyServer.max_connections)

    def test_its_exposure_is_1_4_at_most(self) -> None:
        done = self.analyze("security", "--offline=yes", "--threshold=14")
        self.assertEqual(done.returncode, 0, done.stdout[-200:])

    def test_a_reload_fails_with_a_bad_file_but_not_without_database(self
                                                                     ) -> None:
        with open(os.path.join(HERE, "policyd-rate-limit.service")) as file:
            line, = re.findall("(?m)^ExecReload=(/bin/sh .*)$", file.read())
        program = self.write("program", "")
        os.chmod(program, 0o755)
        words = shlex.split(line.replace("$$", "$").replace(
            "/usr/local/bin/policyd-rate-limit", program))
        for override, status, failed in (
                ("count_mode=1", 0, 0), ("limits=5", 5, 5),
                ("SOCKET=[x,1]", 4, 5),
                (f"sqlite_config.database={self.folder}", 6, 0)):
            self.write("program", (
                f'#!/bin/sh\nexec {sys.executable} {PROGRAM} "$@"'
                f" --standalone {self.path('daemon')} -o '{override}'\n"))
            with self.subTest(override):
                self.assertEqual(
                    [subprocess.run(command, check=False, timeout=PATIENCE,
                                    capture_output=True).returncode
                     for command in ([program, "--check"], words)],
                    [status, failed])


RECIPES = (  # of README
    """quotas:
- by: sasl_domain
  limits: [[1000, 3600]]
  limits_by_id: {big.example: [[9000, 3600]], ".example.net": []}
""", """quotas:
- by: client_address
  when:
    {sasl_username: "", client_address: ["!10.0.0.0/8", "0.0.0.0/0", "::/0"]}
  limits: [[100, 60]]
  fail_action: "defer_if_permit 4.7.1 $identity: room again in $room_in"
""", """quotas:
- {name: many_places, by: sasl_username, count: client_network, limits: [8/h]}
- {name: mails_a_day, by: sender_domain, count: mails, limits: [[500, 86400]]}
- {name: size, by: server, count: bytes, limits: [[86400000, 60], [86400, 61]]}
- {by: server, limits: [9/h], when: {sasl_username: "!", server_port: [25, 2]}}
- {by: recipient, limits: [9/h], when: {protocol_state: RCPT}}
- {by: [sasl_username, helo_name], limits: [9/h], limits_by_id: {"joe|mx": []}}
""", """limits_by_id:
  joe@example.org: []
  newsletter: [[5000, 3600], [20000, 86400]]
  192.0.2.25: [[1000, 86400]]
  2001:db8::25: []
  10.0.0.0/8: []
  "@example.org": [[500, 86400]]
  "@.example.org": [[50, 86400]]
  a=b: []
""")


class SettingsTest(FolderTest):
    """Each setting: what it takes, and what it says of the rest."""

    ACCEPTED: tuple[tuple[str, str, object], ...] = (
        ("debug", "no", False), ("debug", "", False), ("debug", "1", True),
        ("log_requests", "on", True), ("user", "joe", "joe"),
        ("group", '"0"', "0"), ("pidfile", "/run/é.pid", "/run/é.pid"),
        ("SOCKET", "ratelimit/policy", "ratelimit/policy"),
        ("SOCKET", "[127.0.0.1, 8552]", ("127.0.0.1", 8552)),
        ("SOCKET", '["::1", 8552]', ("::1", 8552)),
        ("SOCKET", "[0:0::1, 0]", ("0:0::1", 0)),
        ("SOCKET", "/run/a:b@c", "/run/a:b@c"),
        ("socket_permission", "0666", 0o666),
        ("socket_permission", '"0666"', 0o666),
        ("socket_permission", "0o660", 0o660),
        ("socket_permission", "438", 0o666),
        ("socket_permission", '"777"', 0o777),
        ("delay_to_close", "10.0", 10), ("db_timeout", "1", 1),
        ("delay_to_close", "99999999999", 2**31 - 1),
        ("backend", "0", 0),
        ("sqlite_config", "{database: db, timeout: 3}",
         {"database": "db", "timeout": 3}),
        ("mysql_config", "{passwd: 0123}", {"passwd": "0123"}),
        ("pgsql_config", "{a: {b: 1}}", {"a": {"b": 1}}),
        ("limits", "[]", ()), ("limits", "[[0, 60]]", ((0, 60),)),
        ("limits", "\n  - [10, 60]\n  - [150, 86400.0]",
         ((10, 60), (150, 86400))),
        ("limits_by_id", "", {}), ("limits_by_id", "{}", {}),
        ("limits_by_id", "{Joe@X.org: [], 12: [[1, 2]], 012: [], 0817: []}",
         {"joe@x.org": (), "12": ((1, 2),), "012": (), "0817": ()}),
        ("limits_by_id", "\n  192.168.0.254: []\n  0:0::1: [[1, 2]]",
         {"192.168.0.254": (), "::1": ((1, 2),)}),
        ("sql_limits_by_id", "", None), ("sql_limits_by_id", '""', None),
        ("sql_limits_by_id", "SELECT ?", "SELECT ?"),
        ("limit_by_sasl", "False", False), ("limit_by_ip", "yes", True),
        ("limit_by_sender", "TRUE", True), ("limited_networks", "", None),
        ("quotas", "[]", ()), ("dry_run", "True", True),
        ("count_mode", "auto", "auto"), ("count_mode", "0", 0),
        ("count_mode", "2", 2),
        ("success_action", "DUNNO ", "DUNNO"),
        ("fail_action", '"450 4.7.1 é"', "450 4.7.1 é"),
        ("block_action", "450 $identity", "450 $identity"),
        ("block_for", "86400", 86400), ("block_for", "0", 0),
        ("db_error_action", "reject", "reject"),
        ("report", "True", True), ("report_from", "null", None),
        ("report_to", "a@b.c", ("a@b.c",)), ("report_to", "", ()),
        ("report_to", "[a@b.c, d@e.f]", ("a@b.c", "d@e.f")),
        ("report_to", '"a@b.c, d@e.f"', ("a@b.c", "d@e.f")),
        ("report_subject", "''", ""), ("report_subject", "Hello", "Hello"),
        ("report_limits", "[60]", (60,)),
        ("report_limits", "null", None), ("report_limits", "[]", ()),
        ("report_only_if_needed", "off", False), ("smtp_starttls", "0", False),
        ("smtp_tls_verify", "False", False), ("alert", "True", True),
        ("alert_command", "null", ()),
        ("alert_command", "/bin/x", ("/bin/x",)),
        ("alert_command", "[/bin/x, -v]", ("/bin/x", "-v")),
        ("smtp_server", "mail", ("mail", 25)),
        ("smtp_server", "[mail, 587]", ("mail", 587)),
        ("smtp_server", "[mail]", ("mail", 25)),
        ("smtp_credentials", "[joe, x]", ("joe", "x")),
        ("smtp_credentials", "[joe, 0123]", ("joe", "0123")),
        ("smtp_credentials", "null", None),
    )

    EXPECTED = (  # names, what is expected, what is refused
        ("debug log_requests limit_by_sasl limit_by_sender limit_by_ip report"
         " report_only_if_needed smtp_starttls smtp_tls_verify alert dry_run",
         "True or False",
         ("1.5", "'no'", "[]", "{}")),
        ("user group pidfile", "text (in quotes, if it looks like a number)",
         ("5", "True", "''", "['x']")),
        ("SOCKET", 'a path, or [address, port] such as ["127.0.0.1", 8552]',
         ("['toto', 1234]", "['localhost', 25]", "['127.0.0.1']", "5",
          "['127.0.0.1', 65536]", "['127.0.0.1', -1]", "['127.0.0.1', '1']",
          "['127.0.0.1', 1, 2]", "['', 1]", "''", "[]", "[5, 5]", "{}",
          "['127.0.0.1', True]", "'inet:127.0.0.1:8552'", "'unix:/run/s'",
          "'127.0.0.1:8552'", "'inet:[::1]:8552'", "'@name'")),
        ("socket_permission", "a file mode such as 0666",
         ("'999'", "-1", "4096", "'01000'", "'rw'", "True")),
        ("socket_permission", "a file mode such as 0777", ("777",)),
        ("socket_permission", "a file mode such as 0666", ("666",)),
        ("delay_to_close db_timeout", "a number of seconds, 1 or more",
         ("0", "-1", "'5'", "True", "[]")),
        ("backend", "0 (SQLite), 1 (MySQL) or 2 (PostgreSQL)",
         ("3", "-1", "'sqlite'", "True")),
        ("count_mode", "auto, 0 (each RCPT), 1 (recipients at DATA) or"
         " 2 (mails at DATA)", ("3", "-1", "'3'", "'Auto'")),
        ("sqlite_config", "names with values, among them database, a path",
         ("'db'", "5", "['db']", "False", "{}")),
        ("limits",
         'a list such as [[10, 60], [150, 86400]] or ["10/min", "150/day"]',
         ("[2, 500]", "5", "[[2]]", "[[2, 500, 3]]", "[[-1, 60]]",
          "[[1, 0]]", "[[1, -60]]", "[['2', '500']]", "[[True, 60]]",
          "{2: 500}", "'x'", "[None]", "['ab']")),
        ("limits_by_id",
         "identities or patterns, each with a list of limits",
         ("[]", "'x'", "5")),
        ("limited_networks",
         'a list of networks such as [10.0.0.0/8, "!10.1.0.0/16", "::/0"]',
         ("['foo']", "'10.0.0.0/8'", "['10.0.0.0/33']", "[5]", "[[]]",
          "['10.0.0.']", "['fe80::/129']")),
        ("quotas", "a list of quotas, each with by and limits",
         ("5", "[5]", "'x'")),
        ("success_action db_error_action",
         'an action of access(5), such as "dunno"',
         ("True", "''", "[]", r"'a\nb'", r"'a\x07'")),
        ("block_for", "a number of seconds, or 0 to block nobody",
         ("-1", "1.5", "True", "[1]")),
        ("fail_action block_action", "an action, in which $identity, $used,"
         " ... stand for what was found",
         ("True", "''", r"'a\nb'", "'$x'", "'1 $ and'")),
        ("sql_limits_by_id report_from", "text, or null", ("5", "['x']")),
        ("report_to alert_command", "text or a list of texts",
         ("5", "[5]", "['']", "[None]", "{'a': 1}")),
        ("report_subject", "text", ("5", "['x']")),
        ("report_limits", "a list of seconds, such as [86400]",
         ("['60']", "[0]", "[-1]", "[[60]]", "'x'")),
        ("smtp_server", '["host", port] or a host',
         ("['mail', 'x']", "[]", "['mail', 70000]", "['', 25]", "5")),
    )
    SECRET = (  # names, what is expected, what is refused and not shown
        ("mysql_config pgsql_config", "names with values",
         ("'secret'", "5", "['secret']", "False")),
        ("smtp_credentials", '["user", "password"] or null',
         ("['secret']", "'secret'", "['joe', 'secret', 'y']",
          "[None, 'secret']")),
    )

    def settings(self, text: str) -> prl.Settings:
        """Return the settings of a YAML file with this text."""
        path = self.write("test.yaml", text)
        return prl.check_settings(prl.read_config(path))

    def test_every_setting_takes_its_forms(self) -> None:
        for name, text, value in self.ACCEPTED:
            with self.subTest(name=name, text=text):
                settings = self.settings(f"{name}: {text}\n")
                found = getattr(settings, name)
                self.assertEqual(getattr(found, "texts", found), value)
        self.assertEqual({name for name, *_ in self.ACCEPTED}
                         | {"limited_networks"},
                         {one.name for one in fields(prl.Settings)})

    def test_networks_may_have_host_bits_and_both_families(self) -> None:
        settings = self.settings(
            'limited_networks: [10.1.2.3/8, "::/0", "::ffff:192.0.2.7"]\n')
        assert settings.limited_networks and settings.limited_networks.wanted
        self.assertEqual(
            {str(one) for one
             in settings.limited_networks.wanted.each_network()},
            {"192.0.2.7/32", "10.0.0.0/8", "::/0"})

    def test_refusal_names_file_line_setting_found_and_expected(self) -> None:
        seen = {name for names, *_ in (*self.EXPECTED, *self.SECRET)
                for name in names.split()}
        self.assertEqual(seen, {one.name for one in fields(prl.Settings)})
        for names, expected, values in self.EXPECTED:
            for name in names.split():
                for found in values:
                    with self.subTest(name=name, found=found):
                        self.check_refusal(
                            name, found, f"found {found}, expected {expected}")

    def test_a_refusal_never_shows_a_password(self) -> None:
        for names, expected, values in self.SECRET:
            for name in names.split():
                for found in values:
                    with self.subTest(name=name, found=found):
                        self.check_refusal(
                            name, found, f"expected {expected}; the value may"
                            " contain a password and is not shown")
                        status, out, err = command(
                            "--check", "--standalone", self.folder, "-o",
                            f"{name}={found.replace('None', 'null')}")
                        self.assertEqual((status, out), (5, ""))
                        self.assertIn(f"error: -o {name}: {name}: ", err)
                        self.assertNotIn("secret", err)
        for name, text in (
                ("a.yaml", "mysql_config:\n  passwd: secret: word\n"),
                ("a.yaml", "smtp_credentials: [joe, 'secret\n"),
                ("a.yaml", "pgsql_config: {password: @secret}\n"),
                ("a.conf", "mysql_config['passwd'] = 'secret'\n"),
                ("a.conf", "smtp_credentials = 'joe', f('secret')\n")):
            with self.subTest(text):
                got = command("-f", self.write(name, text), "--check",
                              "--standalone", self.folder)
                self.assertIn(self.path(name), got[2])
                self.assertNotIn("secret", got[2])
        for option in ("smtp_credentials=[a, 'secret", "mysql_config.passwd="
                       "@secret", "mysql_config={passwd: 'secret"):
            got = command("--check", "--standalone", self.folder, "-o", option)
            self.assertEqual(got[0], 5)
            self.assertNotIn("secret", got[2])

    def check_refusal(self, name: str, found: str, why: str) -> None:
        """Let the program refuse a value, given as Python writes it."""
        text = found.replace("None", "null")
        if "\\" in text:
            text = text.replace("'", '"')
        path = self.write("test.yaml", f"# a file\n\n{name}: {text}\n")
        with self.assertRaises(prl.PolicydError) as caught:
            prl.check_settings(prl.read_config(path))
        self.assertEqual(str(caught.exception), f"{path}:3: {name}: {why}")
        self.assertEqual(caught.exception.exit_code,
                         4 if name == "SOCKET" else 5)

    def test_a_wrong_entry_is_named_with_its_line(self) -> None:
        expected = f"expected {prl.as_limits.__doc__}"
        for value, line, message in (
                ("\n  joe: []\n  ann: 5\n", 3, f"ann: found 5, {expected}"),
                ("\n  joe:\n", 2, f"joe: found None, {expected}"),
                ('{joe: [],\n "::1": [[-1, 2]]}\n', 2,
                 f"::1: found [[-1, 2]], {expected}"),
                ("\n  ann: []\n  no: []\n", 3, 'the key "no", like "off",'
                 " means False in YAML; quote it"),
                ("\n  Joe: []\n  '::1': []\n  joe: []\n", 4,
                 "joe and Joe are the same ({}:2)"),
                ("\n  ::1: []\n  0::01: []\n  a: [[1, 1_0]]", 3,
                 "0::01 and ::1 are the same ({}:2)")):
            with self.subTest(value=value):
                if "_" in value and yaml is None:
                    skip("PyYAML is not installed")
                with self.assertRaises(prl.ConfigError) as caught:
                    self.settings(f"limits_by_id: {value}")
                path = self.path("test.yaml")
                self.assertEqual(
                    str(caught.exception), f"{path}:{line}: limits_by_id: "
                    + message.format(path))

    def test_an_empty_value_is_the_default_but_for_a_boolean(self) -> None:
        for name, value in prl.default_values().items():
            with self.subTest(name), quiet() as said:
                path = self.write("test.yaml", f"# empty\n{name}:\n")
                expected, warnings = prl.Settings(), []
                if isinstance(value, bool):
                    off: dict[str, Any] = {name: False}
                    expected = dataclasses.replace(expected, **off)
                    warnings = [f"{path}:2: {name}: left empty, taken as"
                                " False; write False or True"]
                self.assertEqual(
                    prl.check_settings(prl.read_config(path)), expected)
                self.assertEqual(said, warnings)

    def test_unusual_files_start(self) -> None:
        for text in (
                "", "# nothing\n", "report: True\n", "limits_by_id:\n",
                "user: nosuch\n", "limits:\n- [1, 2]\n",
                "---\ndebug: no\n", "mysql_config:\n", "a: {b: [c]}\n",
                "1: 2\n"):
            with self.subTest(text=text):
                status, out, err = command(
                    "-f", self.write("test.yaml", text), "--check",
                    "--standalone", self.path("sa"))
                self.assertEqual(status, 0, err)
                self.assertRegex(out, CHECK_OK)

    def test_what_the_original_works_with_starts(self) -> None:
        for name, text, value in (
                ("fail_action", "450", "450"),
                ("smtp_server", '["localhost", "25"]', ("localhost", 25)),
                ("smtp_server", "", ("localhost", 25)),
                ("report_subject", "", "policyd-rate-limit report"),
                ("report_limits", "", None), ("smtp_credentials", "[]", None),
                ("smtp_credentials", "False", None),
                ("smtp_credentials", "[joe, 12345]", ("joe", "12345"))):
            with self.subTest(name=name, text=text):
                self.assertEqual(getattr(
                    self.settings(f"{name}: {text}\n"), name), value)

    def test_a_quota_that_means_nothing_is_refused(self) -> None:
        for quota in (
                "{by: joe}", "{by: []}", "{by: server, limts: []}",
                "{by: server, limits: 5}", "{by: server, count: minds}",
                "{by: [[server]]}", "{by: server, name: A}",
                "{by: server, name: 'a=b'}", "{by: server, when: 5}",
                "{by: server, when: {x: y}}",
                "{by: server, when: {sender: []}}",
                "{by: server, limits: [], when: {sender: }}",
                "{by: server, limits: [], when: {sender: [yes]}}",
                "{by: server, limits: [], when: {sender: {joe: []}}}",
                "{by: server, fail_action: '$x'}",
                "{by: server, dry_run: maybe}",
                "{by: sender}, {by: server, name: sender}",
                "{by: client_address, limits_by_id: {1.2.3.4/99: []}}"):
            with self.subTest(quota), \
                    self.assertRaisesRegex(prl.ConfigError, "yaml:2: quotas"):
                self.settings(f"limits: []\nquotas: [{quota}]\n")

    def test_what_has_no_effect_is_told(self) -> None:
        self.check_told(0, CHECK_OK, "warning", (
            ("limit_by_sender: True\nlimits_by_id: {joe@x.org: []}", 3,
             "limits_by_id: joe@x.org: since limit_by_sender is True, this"
             " entry also holds for anybody who writes such a sender address"
             " without a login"),
            ("limit_by_ip: True", 0, "limited_networks: empty, so no address"
                                     " is limited"),
            ('limit_by_ip: True\nlimited_networks: ["!10.0.0.0/8", 10.1.0.0/16'
             ", 10.2.3.4]", 3, 'limited_networks: those with "!" exclude all'
             " others, so no address is limited"),
            ('limit_by_ip: True\nlimited_networks: ["!0.0.0.0/1", "!::/0",'
             ' "!128.0.0.0/1"]', 3, 'limited_networks: those with "!" exclude'
             " all others, so no address is limited"),
            ("report: True", 0, "report_to: empty, so nobody gets reports"
                                " and alerts"),
            ("alert: True", 0, "report_to: empty, so nobody gets reports"
                               " and alerts"),
            ("report: True\nreport_to: a@b.c\nreport_limits: [60, 61]", 4,
             "report_limits: no limit has the window 61"),
            ("report: True\nreport_to: a@b.c\nreport_limits: []", 4,
             "report_limits: empty, so no refusal is reported"),
            ("report: True\nreport_to: a@b.c\nsmtp_credentials: [joe, '*']\n"
             "smtp_server: mail.example.org", 4, "smtp_credentials: they are"
             " only sent encrypted to another host; set smtp_starttls: True"),
            ("dry_run: True", 2, "dry_run: True, so no mail is refused"),
            ("limits: [[86400, 150]]", 2, "limits: [86400, 150] lets 576 mails"
             " pass in a second; is [150, 86400] meant?"),
            ("limits_by_id:\n  joe: [[3600, 1000]]", 3,
             "limits_by_id: joe: [3600, 1000] lets 3 mails pass in a second;"
             " is [1000, 3600] meant?"),
            *((f"fail_action: '{action}'\nquotas: [{{by: server, limits:"
               ' ["9/h"], fail_action: 450}]', 2,
               f"fail_action: {action.split()[0]} lets the mail pass, so none"
               " is refused; to try limits, set dry_run: True") for action in (
                   "DUNNO", "permit", "ok", "warn Too many", "info Too many",
                   "prepend X-Too-Many: 1", "permit_mynetworks", "bcc a@b.c",
                   "warn_if_reject reject")),
            ('quotas: [{by: server, limits: ["9/h"], fail_action: OK then}]',
             2, "quotas: server: fail_action: OK lets the mail pass, so none"
             " is refused; to try limits, set dry_run: True"),
            *((f"{name}: {word} x", 2, f"{name}: after {word} Postfix skips"
               " all restrictions that come later; write dunno")
              for name in ("success_action", "db_error_action")
              for word in ("OK", "permit", "permit_mynetworks")),
            *((f"success_action: {word} x", 2, f"success_action: {word} stops"
               " the mail that is within its limits; write dunno")
              for word in ("REJECT", "450", "defer_if_permit", "discard")),
            ("fail_action: dunnno x", 2,
             "fail_action: access(5) has no action dunnno"),
            ("fail_action: 4xx", 2,
             "fail_action: access(5) has no action 4xx"),
            ("quotas: [{by: server, limits: [[1, 60]], fail_action: hol}]", 2,
             "quotas: server: fail_action: access(5) has no action hol"),
            ("db_error_action: 4.7.1 x", 2,
             "db_error_action: access(5) has no action 4.7.1"),
            ("quotas:\n- by: server\n  limits: []", 2,
             "quotas: server: it has no limits, so it never refuses mail"),
            ("quotas: [{by: sender, limits_by_id: {joe@example.org: []}}]", 2,
             "quotas: sender: it has no limits, so it never refuses mail"),
            (f"alert: True\nalert_command: {self.folder}/no", None,
             f"alert_command: {self.folder}/no: missing or not"
             " executable")))

    def test_a_pattern_that_can_match_nobody_is_told(self) -> None:
        wildcard = "there is no wildcard; write "
        networks = "networks are compared; write one, such as 192.0.2.0/24"
        joe = "quotas:\n- by: sasl_username\n  limits: [9/h]\n  "
        self.check_told(0, CHECK_OK, "warning", (
            *((f'limits_by_id:\n  joe: []\n  "{pattern}": []', 4,
               f"limits_by_id: {pattern}: {why}") for pattern, why in (
                   ("*@example.org", f'{wildcard}"@example.org"'),
                   ("*@*.example.org", f'{wildcard}"@.example.org"'),
                   ("*", f'{wildcard}"@example.org"'),
                   ("10.0.0.300", "this is not an IP address"),
                   ("sasl_domain=example.org", "it looks like the key of a"
                    ' quota; write "example.org" into limits_by_id of the'
                    " quota sasl_domain"),
                   ("", "mail with an empty value is not counted"))),
            *((f"quotas:\n- by: {by}\n  limits: [9/h]\n  limits_by_id:\n"
               f'    "{pattern}": []', 6,
               f"quotas: {by}: limits_by_id: {pattern}: {why}")
              for by, pattern, why in (
                  ("sasl_domain", "@example.org",
                   'domains are compared; write "example.org"'),
                  ("sender_domain", "joe@example.org",
                   'domains are compared; write "example.org"'),
                  ("recipient_domain", "*.example.org",
                   f'{wildcard}".example.org"'),
                  ("server", "mx1", 'the only value of server is "all"'),
                  ("server", "server=all", 'leave out "server="'),
                  ("client_address", "mx1", "this is not an IP address"),
                  ("client_network", "192.0.2.7", networks),
                  ("sender", "10.0.0.1", "a client can choose this value, so"
                   " no address matches"),
                  ("server_port", "smtp", "Postfix writes this as a number"),
                  ("server_port", "0587", 'Postfix writes this as a number;'
                   ' write "587"'))),
            ("quotas:\n- by: sender\n  limits: [9/h]\n"
             "  limits_by_id: {10.0.0.0/8: []}", 5,
             "quotas: sender: limits_by_id: networks match no sender"),
            ("quotas:\n- by: [sender, helo_name]\n  limits: [9/h]\n"
             "  limits_by_id: {joe@x.org: []}", 5, "quotas: sender+helo_name:"
             " limits_by_id: joe@x.org: values of sender, helo_name are joined"
             ' by "|"'),
            (joe + "when: {server_port: [587, 465, 025]}", 5,
             "quotas: sasl_username: when: server_port: 025: Postfix writes"
             ' this as a number; write "25"'),
            (joe + 'when: {sender_domain: ["!a@x.org"]}', 5, "quotas:"
             " sasl_username: when: sender_domain: a@x.org: domains are"
             ' compared; write "x.org"'),
            *((f"count_mode: {mode}\n{joe}when: {{{when}}}", 6,
               f"quotas: sasl_username: when: {when.partition(':')[0]}: no"
               " mail that is counted can match") for mode, when in (
                   (1, "protocol_state: RCPT"), (0, "protocol_state: DATA"),
                   ("auto", "protocol_state: VRFY"),
                   ("auto", 'sasl_username: ""'), ("auto", 'server: "!all"'),
                   ("auto", "sender: 10.0.0.0/8"),
                   ("auto", 'helo_name: [joe, "!joe"]'),
                   ("auto", "client_address: [10.0.0.0/8,"
                    ' "!0.0.0.0/1"]')))))

    def test_where_nothing_is_limited_a_check_ends_with_5(self) -> None:
        none = "limit_by_sasl: False\nquotas:\n"
        self.check_told(5, "^$", "error", (
            ("limit_by_sasl: False", 2, "limit_by_sasl, limit_by_sender,"
             " limit_by_ip: all are False, so nothing is limited"),
            ("limit_by_sasl: False\nlimit_by_ip: True", 0,
             "limited_networks: empty, so no address is limited"),
            ("limit_by_sasl: False\nlimit_by_ip: True\n"
             'limited_networks: ["!10.0.0.0/7", 10.0.0.0/8]', 4,
             'limited_networks: those with "!" exclude all others, so no'
             " address is limited"),
            ("limits: []\nlimits_by_id: {joe: []}", 2,
             "limits: none here or in limits_by_id, quotas or"
             " sql_limits_by_id, so nothing is limited"),
            ("block_action: dunno\nblock_for: 60", 2, "block_action: dunno"
             " lets the mail of whoever is blocked pass"),
            ("fail_action: warn Too many", 2, "fail_action: warn lets the mail"
             " pass, so none is refused; to try limits, set dry_run: True"),
            (f"{none}- by: server\n  limits: []", 3,
             "quotas: server: it has no limits, so it never refuses mail"),
            (f"{none}- by: server\n  limits: [9/h]\n  fail_action: info x", 6,
             "quotas: server: fail_action: info lets the mail pass, so none is"
             " refused; to try limits, set dry_run: True"),
            (f"{none}- by: sender\n  limits: [9/h]\n  when: {{sender: ''}}", 6,
             "quotas: sender: when: sender: no mail that is counted can"
             " match"),
            ("sql_limits_by_id: SELECT x FROM y WHERE id = lower(%s)", 2,
             "sql_limits_by_id: write ? instead of %s, for SQLite")))

    def test_the_user_root_is_told(self) -> None:
        path = self.write("test.yaml", "socket_permission: 0600\nuser: root\n")
        self.assertEqual(
            command("-f", path, "--check", "--standalone", self.folder)[::2],
            (0, f"warning: {path}:2: user: the daemon does not need"
             " root; use its own account, such as policyd-rate-limit\n"))

    def test_a_query_is_told_its_placeholder(self) -> None:
        for backend, query, meant in (
                (1, "SELECT x FROM y WHERE id = ?",
                 "write %s instead of ?, for MariaDB and MySQL"),
                (2, "SELECT x FROM y WHERE id = ?",
                 "write %s instead of ?, for PostgreSQL"),
                (2, "SELECT x FROM y WHERE id = %s AND z ? 'a'", None),
                (0, "SELECT x FROM y WHERE id = ? AND z = '%s'", None),
                (1, "SELECT x FROM y WHERE id = %s AND z = '?'", None)):
            with self.subTest(backend=backend, query=query):
                found = [doubt.message for doubt in prl.doubts(settings_of({
                    "backend": backend, "sql_limits_by_id": query}))]
                self.assertEqual(
                    found, [f"sql_limits_by_id: {meant}"] if meant else [])

    def test_a_relative_socket_is_told(self) -> None:
        os.mkdir(self.path("in"))
        done = run("--check", "--standalone", self.folder, "-o",
                   "SOCKET=ratelimit/policy", cwd=self.path("in"))
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn(
            "warning: -o SOCKET=ratelimit/policy: SOCKET: ratelimit/policy is"
            " relative to where the daemon is started; is"
            " /var/spool/postfix/ratelimit/policy meant?\n", done.stderr)

    def test_a_password_that_others_can_read_is_told(self) -> None:
        for text, mode, told in (
                ("mysql_config: {user: joe, passwd: secret}", 0o644, True),
                ("pgsql_config: {password: secret}", 0o604, True),
                ("smtp_credentials: [joe, secret]", 0o644, True),
                ("smtp_credentials: [joe, secret]", 0o640, False),
                ("mysql_config: {user: joe, passwd: '*****'}", 0o644, False),
                ("mysql_config: {user: joe}", 0o644, False)):
            with self.subTest(text=text, mode=mode):
                path = self.write("test.yaml", f"socket_permission: 0600\n"
                                               f"{text}\n")
                os.chmod(path, mode)
                name = text.partition(":")[0]
                self.assertEqual(command(
                    "-f", path, "--check", "--standalone", self.folder)[::2],
                    (0, f"warning: {path}:2: {name}: any account on this host"
                     f" can read the password; chmod o= {path}\n"
                     if told else ""))
        os.chmod(path, 0o644)
        os.chmod(self.folder, 0o750)
        self.write("test.yaml", "smtp_credentials: [joe, secret]\n")
        self.assertNotIn("password", command(
            "-f", path, "--check", "--standalone", self.folder)[2])

    def test_of_many_warnings_some_are_shown(self) -> None:
        path = self.write("test.yaml", "socket_permission: 0600\nlimits_by_id:"
                          "\n" + "".join(f"  '*{i}': []\n" for i in range(99)))
        got = command("-f", path, "--check", "--standalone", self.folder)
        self.assertEqual((got[0], len(got[2].splitlines())), (0, 21))
        self.assertIn("warning: 79 more warnings like these\n", got[2])

    def check_told(self, status: int, out: str, level: str,
                   table: Iterable[tuple[str, int | None, str]]) -> None:
        """Look for a line in what --check, a start and a reload say.

        Each case has the text of a file, the line that is to be named (0: the
        file alone; None: nothing), and the message.
        """
        daemon = None
        path = self.path("daemon/test.yaml")
        for text, number, message in table:
            place = "" if number is None else f"{path}:{number}: ".replace(
                ":0: ", ": ")
            line, text = f"{level}: {place}{message}\n", f"{text}\n"
            with self.subTest(text):
                if daemon is None:
                    daemon = self.daemon(f"socket_permission: 0600\n{text}")
                    told, *_ = daemon.log().partition("listening on")
                    self.assertEqual(told, line)
                self.write("daemon/test.yaml",
                           f"socket_permission: 0600\n{text}")
                os.chmod(path, 0o600)  # some have a password
                said = len(daemon.log())
                daemon.send(signal.SIGHUP)
                daemon.wait_log("reloaded\n", said)
                self.assertEqual(
                    daemon.log()[said:], f"{line}configuration reloaded\n")
                got = command("--check", *daemon.options)
                self.assertEqual((got[0], got[2]), (status, line))
                self.assertRegex(got[1], out)

    def test_blocks_of_the_innocent_are_told(self) -> None:
        forging = "anyone can have a sender blocked by forging its address"
        self.check_told(0, CHECK_OK, "warning", (
            ("limit_by_sasl: no\nlimit_by_sender: yes\nblock_for: 60", 4,
             f"block_for: {forging}"),
            ("quotas:\n- by: sender_domain\n  limits: [9/h]\n"
             "  block_for: 60", 5,
             f"quotas: sender_domain: block_for: {forging}"),
            ("quotas:\n- by: server\n  limits: [9/h]\n  block_for: 60", 5,
             "quotas: server: block_for: one sender can have the whole server"
             " blocked"),
            ("quotas:\n- by: sasl_username\n  limits: [9/h]\n"
             "  dry_run: True\n  block_for: 60", 6, "quotas: sasl_username:"
             " block_for: with dry_run, nobody is blocked"),
            ("block_action: defr x", 2,
             "block_action: access(5) has no action defr")))

    def test_what_has_an_effect_is_not_told(self) -> None:
        for text in (
                "limits: []\nlimits_by_id: {joe: [[1, 2]]}\n",
                "limits: []\nsql_limits_by_id: SELECT '[]' WHERE 'x' = ?\n",
                "limit_by_sasl: no\nlimit_by_ip: yes\n"
                "limited_networks: ['::/0']\n", "report_limits: [7]\n",
                'limit_by_ip: yes\nlimited_networks: ["!10.0.0.0/8"]\n',
                "limit_by_ip: yes\nlimited_networks: ['!10.0.0.0/8',"
                " 192.168.0.0/16, 10.0.0.0/7]\n",
                "alert: True\nalert_command: [logger, x]\n",
                "report: yes\nreport_to: a@b.c\nlimits: [[1, 7]]\n",
                "limits: []\nlimit_by_sasl: no\n"
                "quotas: [{by: server, limits: [[1, 60]]}]\n",
                "fail_action: 450\nsuccess_action: dunno\ndb_error_action:"
                " reject_unauth_destination\n",
                "fail_action: hold\n", "fail_action: '550 5.7.1 No'\n",
                "limits: [[50, 1], [600, 60], [3600, 3600], [86400, 86400]]\n",
                "limits: [[3600, 60], [20000, 60], [1000, 1]]\n",
                "smtp_credentials: [joe, '*']\nreport: yes\n"
                "report_to: a@b.c\n", *RECIPES):
            with self.subTest(text=text):
                path = self.write(
                    "test.yaml", f"socket_permission: 0600\n{text}")
                os.chmod(path, 0o600)
                self.assertEqual(command(
                    "-f", path, "--check", "--standalone", self.folder)[::2],
                    (0, ""))

    def test_defaults_and_examples_print_no_warning(self) -> None:
        with open(os.path.join(HERE, "policyd-rate-limit.yaml"),
                  encoding="utf-8") as file:
            sample = file.read()
        examples = re.findall(r"(?m)^#   \w+:.*\n(?:#     .*\n)*", sample)
        self.assertGreater(len(examples), 10)
        for text in (sample, *(re.sub("(?m)^#   ", "", example)
                               for example in examples)):
            with self.subTest(text[:60]), quiet() as said:
                settings = self.settings(text)
                self.assertEqual(list(prl.doubts(settings)), [])
                self.assertEqual(said, [])
        self.assertEqual(list(prl.doubts(prl.Settings())), [])

    MEANT = (  # what only the original took, and what is taken instead
        ("limits", "[[3, 3600.5], [10.5, 60]]",
         "[[3, 3601], [10, 60]]", ((3, 3601), (10, 60))),
        ("delay_to_close", "0.5", "1", 1),
        ("report_limits", "[86399.5]", "[86400]", (86400,)),
        ("count_mode", "True", "1", 1), ("count_mode", "False", "0", 0),
        ("count_mode", "'2'", "2", 2), ("debug", "2", "True", True),
        ("limit_by_sender", "'Yes'", "True", True),
        ("SOCKET", "['127.1', 8552]", "['127.0.0.1', 8552]",
         ("127.0.0.1", 8552)),
        ("SOCKET", "['10.1.2', 8552]", "['10.1.0.2', 8552]",
         ("10.1.0.2", 8552)),
        ("socket_permission", "'01777'", "'0777'", 0o777),
        ("socket_permission", "'0o1666'", "'0666'", 0o666),
        ("socket_permission", "1023", "'0777'", 0o777),
        ("fail_action", r"'450 Too\tmany'", "'450 Too many'", "450 Too many"),
        ("success_action", r"'dunno\tx'", "'dunno x'", "dunno x"),
        ("db_error_action", r"'450\tx'", "'450 x'", "450 x"),
        ("smtp_server", "'mail:587'", "['mail', 587]", ("mail", 587)),
        ("smtp_server", "'[::1]:25'", "['::1', 25]", ("::1", 25)))

    def test_what_the_original_took_is_taken_as_it_is_meant(self) -> None:
        for name, given, shown, value in self.MEANT:
            text = given.replace("'", '"') if "\\" in given else given
            with self.subTest(name=name, given=given), quiet() as said:
                settings = self.settings(f"# a file\n{name}: {text}\n")
                self.assertEqual(getattr(settings, name), value)
                self.assertEqual(said, [
                    f"{self.path('test.yaml')}:2: {name}: found {given}, taken"
                    f" as {shown}; write it like that"])
        with quiet() as said:
            settings = self.settings(
                "limits_by_id:\n  ann: [[2, 60.0]]\n  Joe:\n  - [1, 0.2]\n")
        self.assertEqual(settings.limits_by_id.texts,
                         {"ann": ((2, 60),), "joe": ((1, 1),)})
        self.assertEqual(said, [
            f"{self.path('test.yaml')}:3: limits_by_id: Joe: found [[1, 0.2]],"
            " taken as [[1, 1]]; write it like that"])
        daemon = self.daemon("socket_permission: 01777\ncount_mode: True\n"
                             "limits: [[1, 3600.5]]\nlimit_by_sender:\n")
        self.assertEqual(daemon.ask(), PASS)
        self.assertEqual(daemon.ask(), REFUSED)

    def test_limits_can_be_written_in_words(self) -> None:
        for text, limits in (
                ('["10/min", "500/day"]', ((10, 60), (500, 86400))),
                ("[10/min, 500/day]", ((10, 60), (500, 86400))),
                ("[[10, 60], 500/day]", ((10, 60), (500, 86400))),
                ("10/min, 500/d", ((10, 60), (500, 86400))),
                ('"9/2h"', ((9, 7200),)), ("[0/90s]", ((0, 90),)),
                ("\n- 10 / minute\n- [500, 86400]",
                 ((10, 60), (500, 86400)))):
            with self.subTest(text=text):
                self.assertEqual(
                    self.settings(f"limits: {text}\n").limits, limits)
        settings = self.settings(
            "limits_by_id: {joe: [9/h]}\n"
            "quotas: [{by: server, limits: 5/s, limits_by_id: {all: [7/w]}}]")
        self.assertEqual(settings.limits_by_id.texts["joe"], ((9, 3600),))
        self.assertEqual(settings.quotas[0].limits, ((5, 1),))
        for text in ("10", "10/", "/h", "10/fortnight", "-1/h", "1.5/h",
                     "10/0s", "10/min,", "1/h/h", "٣/h", "1_0/h"):
            with self.subTest(text=text), \
                    self.assertRaisesRegex(prl.ConfigError, "limits: found"):
                self.settings(f'limits: ["{text}"]\n')

    def test_the_query_and_limit_take_the_same_words(self) -> None:
        daemon = self.daemon(
            "sql_limits_by_id: SELECT limits FROM my_limits WHERE id = ?\n")
        with contextlib.closing(sqlite3.connect(daemon.database)) as database:
            database.execute("CREATE TABLE my_limits (id, limits)")
            database.executemany(
                "INSERT INTO my_limits VALUES (?, ?)",
                [("joe", "1/h,5/day"), ("ann", "['1/h', [5, 86400]]"),
                 ("sue", "[[1, 3600]]")])
            database.commit()
        for user in ("joe", "ann", "sue"):
            self.assertEqual([daemon.ask(sasl_username=user) for _ in "12"],
                             [PASS, REFUSED])
        limit = ("--standalone", daemon.folder, "--limit", "bob")
        for words in ("1/h", "['1/h']", "[[1, 3600]]", "[[1, 3600], '9/d']"):
            self.assertEqual(command(*limit, words)[0], 0, words)
            self.assertIn("1/3600s", command(*limit, words)[1])
        self.assertIn("LIMITS: found '1/fortnight', expected limits such as",
                      command(*limit, "1/fortnight")[2])

    def test_too_much_is_refused(self) -> None:
        many = ", ".join(f"[1, {n}]" for n in range(1, 102))
        quotas = ", ".join(f"{{by: server, name: n{n}, limits: [1/h]}}"
                           for n in range(101))
        for text, message in (
                (f"limits: [{many}]", "limits: found 101 limits, 100 are"),
                (f"limits_by_id: {{a: [{many}]}}", "limits_by_id: a: found 101"
                                                   " limits, 100 are"),
                (f"quotas: [{quotas}]", "quotas: found 101 quotas, 100 are"),
                ("limits: [[10, 60], [9999999999999999, 60]]", "limits:"
                 " 9999999999999999 is too large; write [] for no limit")):
            with self.subTest(text[:30]), \
                    self.assertRaises(prl.ConfigError) as caught:
                self.settings(f"# a file\n{text}\n")
            self.assertIn(f"test.yaml:2: {message}", str(caught.exception))
        fits = ", ".join(f"[1, {n}]" for n in range(1, 101))
        self.assertEqual(len(self.settings(f"limits: [{fits}]\n").limits), 100)
        with self.assertRaisesRegex(ValueError, "101 limits"):
            prl.parse_limits(",".join(["1/h"] * 101))

    def test_a_misspelt_name_is_told_which_one_is_meant(self) -> None:
        limits = "limits: [1/h]"
        for quota, message in (
                ("by: sasl_user", "by: found 'sasl_user', expected an"
                 " attribute that Postfix sends, such as sasl_username; is"
                 " sasl_username meant?"),
                ("by: server, count: recipient_counts", "count: found"
                 " 'recipient_counts', expected recipients, mails, bytes, or"
                 " an attribute that Postfix sends; is recipient_count"
                 " meant?"),
                ("by: server, limts: []", "limts: no such entry; is limits"
                 " meant?")):
            with self.subTest(quota), \
                    self.assertRaises(prl.ConfigError) as caught:
                self.settings(f"quotas: [{{{quota}, {limits}}}]\n")
            self.assertEqual(
                str(caught.exception),
                f"{self.path('test.yaml')}:1: quotas: {message}")

    def test_the_rules_are_described_in_words(self) -> None:
        always = "; a mail to more than {} recipients is always refused"
        login = ("each login: 10 mails per minute, 150 per day"
                 + always.format(10))
        for text, lines in (
                ("", [login]), ("count_mode: 0", [login.partition(";")[0]]),
                ("count_mode: 2", [login.partition(";")[0]]),
                ("limits: [[5, 90], [7, 604800], [9, 7200]]", [
                    "each login: 5 mails in 90 seconds, 7 per week, 9 in 2"
                    " hours" + always.format(5)]),
                ("limits: []\nlimits_by_id: {joe: [1/h], 10.0.0.0/8: []}",
                 ["each login: no limits; 2 in limits_by_id have other"
                  " limits"]),
                ("limit_by_sender: yes\nlimit_by_ip: yes\ndry_run: yes\n"
                 "limited_networks: ['::/0']\nlimits: [0/h]", [
                     "each login, else each sender, else each client address"
                     " in limited_networks: 0 mails per hour; dry_run: nothing"
                     " is refused"]),
                ("limits: [9/s]\nsql_limits_by_id: SELECT 1 WHERE ''=?", [
                    "each login: 9 mails per second" + always.format(9)
                    + "; sql_limits_by_id may give others"]),
                ("limit_by_sasl: no\nquotas:\n"
                 "- {by: sasl_domain, limits: [1000/h], limits_by_id:"
                 " {big.example: [9000/h]}}\n"
                 "- {by: server, limits: [20000/d], count: mails}\n"
                 "- {name: many_places, by: sasl_username, count:"
                 " client_network, limits: [8/h], dry_run: yes}\n"
                 "- {by: [sender, recipient], count: bytes, limits: [5/d],"
                 " when: {sasl_username: '', server_port: 25}}", [
                     "each sasl_domain: 1000 mails per hour"
                     + always.format(1000)
                     + "; 1 in limits_by_id has other limits",
                     "all mail together: 20000 mails per day",
                     "many_places: each sasl_username: 8 different values of"
                     " client_network per hour; dry_run: nothing is refused",
                     "each sender+recipient: 5 bytes per day; only where its"
                     ' "when" matches (sasl_username, server_port)'])):
            with self.subTest(text):
                path = self.write("test.yaml", f"{text}\n")
                out = command("-f", path, "--check", "--standalone",
                              self.folder)[1]
                self.assertEqual(out.splitlines()[:-4], lines)

    def test_unknown_setting_is_a_warning_with_a_guess(self) -> None:
        for name, guess in (
                ("limts", "; is limits meant?"),
                ("LIMITS", "; is limits meant?"),
                ("limit_by_user", "; is limit_by_sender meant?"),
                ("socket", "; is SOCKET meant?"), ("12", ""), ("xyzzy", "")):
            with self.subTest(name=name):
                path = self.write(
                    "test.yaml", f"socket_permission: 0600\n{name}: 1\n")
                status, _, err = command(
                    "-f", path, "--check", "--standalone", self.folder)
                self.assertEqual((status, err), (
                    0, f"warning: {path}:2: {name}: no such setting{guess}\n"))

    def test_backend_never_ends_in_a_traceback(self) -> None:
        for number in "12":
            for what in ("--check", "--clean"):
                with self.subTest(backend=number, command=what):
                    path = self.write("test.yaml", f"backend: {number}\n"
                                      "mysql_config: {client_flag: x}\n")
                    done = run("-f", path, what, *here_as_ourselves(self))
                    self.assertIn(done.returncode, (5, 6, 8), done.stderr)
                    self.assertNotIn("Traceback", done.stderr)

    def test_database_without_a_path_is_refused(self) -> None:
        for text in ("{}", "{database: 5}", "{database: null}",
                     "{timeout: 3}"):
            with self.subTest(text=text), self.assertRaises(prl.ConfigError):
                self.settings(f"sqlite_config: {text}\n")


class ProtocolTest(unittest.TestCase):
    """Bytes in, requests out."""

    def test_a_request_is_read_whatever_the_reads(self) -> None:
        data = request_text(sender="jörg=a b@example.org") * 3
        whole = requests_in(data)
        self.assertEqual([one.sender for one in whole],
                         ["jörg=a b@example.org"] * 3)
        for size in (1, 2, 3, 7, 100, 599, 600, 601):
            pieces = [data[i:i + size] for i in range(0, len(data), size)]
            self.assertEqual(requests_in(*pieces), whole, size)

    def test_a_request_has_nothing_of_the_one_before(self) -> None:
        _, second = requests_in(
            request_text() + b"request=smtpd_access_policy\n\n")
        self.assertEqual(second[:-1], ("", "", "", "", "", "", 0))

    def test_bytes_that_are_not_utf8_stay_different(self) -> None:
        one, two = requests_in(request_text(sender="\udce9@x"),
                               request_text(sender="\udce8@x"))
        self.assertNotEqual(one.sender, two.sender)
        one.sender.encode()  # and can be stored

    def test_what_is_no_request_is_refused(self) -> None:
        for data in (b"\n\n", b"GET / HTTP/1.1\n\n", b"\n" * 9,
                     b"request=smtpd_access_policy\nrubbish\n\n",
                     b"request=smtpd_access_policy\na=\0\n\n",
                     b"request=junk\n\n", b"request=smtpd_access_policy\n",
                     b"a=" + b"x" * prl.MAX_REQUEST, b"\x16\x03\x01",
                     b"request=smtpd_access_policy\n" + b"a=b\n" * 1000
                     + b"\n"):
            with self.subTest(data[:40]), self.assertRaises(prl.BadRequest):
                requests_in(data)

    def test_a_probe_made_by_hand_needs_no_request_line(self) -> None:
        [probe] = requests_in(b"protocol_state=data\nsasl_username=joe\n\n")
        self.assertEqual((probe.protocol_state, probe.sasl_username),
                         ("DATA", "joe"))

    def test_a_long_request_within_the_bound_is_read(self) -> None:
        [request] = requests_in(request_text(helo_name="x" * 30000))
        self.assertEqual(len(request.attributes["helo_name"]), 30000)

    def test_nothing_of_an_answered_request_is_kept(self) -> None:
        reads = iter([request_text(helo_name="x" * 30000) * 2, b"r", b""])
        kept: list[int] = []

        def receive() -> bytes:
            variables = requests.gi_frame.f_locals.values()  # type: ignore
            kept.append(sum(len(value) for value in variables
                            if isinstance(value, (bytes, list, tuple))))
            return next(reads)

        requests = prl.read_requests(receive)
        with self.assertRaises(prl.BadRequest):
            for _ in requests:
                pass
        self.assertEqual(kept, [0, 0, 1])
        one = request(**dict.fromkeys((
            "queue_id", "instance", "protocol_state", "client_address"),
            "x" * 30000))
        self.assertLess(len("".join(map(str, one[:-1]))), 500)

    def test_recipient_count_is_a_number_whatever_is_sent(self) -> None:
        for text, count in (
                ("", 0), ("0", 0), ("7", 7), ("007", 7), ("-1", 0), ("+1", 0),
                ("x", 0), ("²", 0), ("٣", 0), ("1 ", 0), ("1.5", 0),
                ("9" * 9, 999999999), ("9" * 10, 2147483647),
                ("9" * 400, 2147483647), ("0" * 5000 + "1", 1)):
            self.assertEqual(prl.parse_count(text), count, text[:20])


class PolicyTest(unittest.TestCase):
    """Whose mail it is, what it costs, whether it may pass."""

    def test_names_are_folded(self) -> None:
        for text, folded in (
                ("Alice@Example.ORG", "alice@example.org"), ("", "<>"),
                ("ÄÖÜ@x", "äöü@x"), ("A\u0308", "ä"), ("straße", "straße"),
                ("192.0.2.7", "192.0.2.7"), ("2001:DB8:0::1", "2001:db8::1"),
                ("::FFFF:192.0.2.7", "192.0.2.7"), ("1:2@x", "1:2@x"),
                ("joe ", "joe"), ("12345", "12345"), ("1.2.3", "1.2.3"),
                ("joe@x.org.", "joe@x.org"), ("joe.", "joe."),
                ("joe@ｅxａmple。org", "joe@example.org"),
                ("joe@ex\u00adample.org", "joe@example.org"),
                ("joe@XN--bcher-kva.de", "joe@bücher.de"),
                ("xn--bcher-kva.de", "bücher.de"),
                ("joe@STRAßE.de", "joe@straße.de"), ("ｊoe", "ｊoe"),
                ("joe@xn--zzz\u00e9", "joe@xn--zzz\u00e9"),
                ("joe@a..\u00e9", "joe@a..\u00e9"),
                ("joe@evil\uff20x.org", "joe@evil\uff20x.org")):
            self.assertEqual(prl.fold(text), folded, text)
            self.assertEqual(prl.fold(folded), folded, text)

    def test_long_names_fit_and_stay_different(self) -> None:
        names = {prl.fold("x" * 1900 + end) for end in "abc"}
        self.assertEqual(len(names), 3)
        self.assertLessEqual(len(prl.fold("fe80::1%" + "x" * 1900)), 190)
        self.assertIsNone(prl.parse_address("fe80::1%eth0"))
        self.assertEqual({len(name) for name in names}, {prl.MAX_IDENTITY})
        self.assertEqual({prl.fold(name) for name in names}, names)

    def test_identity_is_user_then_sender_then_address(self) -> None:
        everything: dict[str, Any] = {
            "limit_by_sasl": True, "limit_by_sender": True,
            "limit_by_ip": True, "limited_networks":
            prl.as_networks(["192.0.2.0/24", "2001:db8::/32"])}
        cases: Any = (
                ({}, {}, "joe"),
                ({}, {"sasl_username": ""}, "joe@example.org"),
                ({"limit_by_sasl": False}, {}, "joe@example.org"),
                ({}, {"sasl_username": "", "sender": ""}, "192.0.2.7"),
                ({"limit_by_sender": False}, {"sasl_username": ""},
                 "192.0.2.7"),
                ({"limit_by_sasl": False, "limit_by_sender": False,
                  "limit_by_ip": False}, {}, None),
                ({"limit_by_sasl": False, "limit_by_sender": False},
                 {"client_address": "198.51.100.1"}, None),
                ({"limit_by_sasl": False, "limit_by_sender": False},
                 {"client_address": "unknown"}, None),
                ({"limit_by_sasl": False, "limit_by_sender": False},
                 {"client_address": "2001:DB8::0:7"}, "2001:db8::7"),
                ({"limit_by_sasl": False, "limit_by_sender": False},
                 {"client_address": "::ffff:192.0.2.9"}, "192.0.2.9"))
        for switches, attributes, identity in cases:
            settings = prl.Settings(**{**everything, **switches})
            _, found = prl.identify(request(**attributes), settings)
            self.assertEqual(found, identity, (switches, attributes))

    def test_count_mode_says_when_and_what_is_counted(self) -> None:
        for mode, state, recipients, cost in (
                (0, "RCPT", 0, 1), (0, "RCPT", 9, 1), (0, "DATA", 3, None),
                (0, "END-OF-MESSAGE", 3, None), (1, "RCPT", 0, None),
                (1, "DATA", 3, 3), (1, "DATA", 0, 1), (1, "DATA", "", 1),
                (1, "END-OF-MESSAGE", 3, 3), (2, "RCPT", 0, None),
                (2, "DATA", 3, 1), (2, "END-OF-MESSAGE", 3, 1),
                (1, "VRFY", 0, None), (1, "", 0, None), (1, "data", 3, 3),
                ("auto", "RCPT", 3, 1), ("auto", "DATA", 3, 3),
                ("auto", "END-OF-MESSAGE", 3, 3), ("auto", "MAIL", 0, None)):
            claims = prl.claims_of(
                request(protocol_state=state, recipient_count=recipients),
                prl.Settings(count_mode=mode))
            self.assertEqual([claim.cost for claim in claims],
                             [] if cost is None else [cost], (mode, state))

    def test_limits_by_id_replace_the_limits(self) -> None:
        settings = prl.Settings(limits_by_id=prl.as_limits_by_id(
            {"Joe": [[5, 60]], "free": [], "::1": [[6, 60]], 12: [[7, 60]]}))
        for user, limits in (("JOE", ((5, 60),)), ("free", ()),
                             ("0:0::1", ((6, 60),)), ("12", ((7, 60),)),
                             ("else", ((10, 60), (150, 86400)))):
            claims = prl.claims_of(request(sasl_username=user), settings)
            self.assertEqual([claim.limits for claim in claims], [limits],
                             user)

    def test_the_most_specific_pattern_gives_the_limits(self) -> None:
        patterns = ("joe@a.example.org", "@a.example.org", "@.example.org",
                    "@.org", "10.0.0.0/255.0.0.0", "::ffff:10.1.0.0/112",
                    "10.1.2.3", "2001:db8::/32", ".example.net",
                    "@EXAMPLE.com", "example")
        found = prl.as_patterns({name: name for name in patterns})
        for value, pattern in (
                ("joe@a.example.org", "joe@a.example.org"),
                ("ann@a.example.org", "@a.example.org"),
                ("ann@b.a.example.org", "@.example.org"),
                ("ann@example.org", "@.example.org"), ("ann@org", "@.org"),
                ("x@y@a.example.org", "@a.example.org"),
                ("10.1.2.3", "10.1.2.3"), ("10.1.2.4", "::ffff:10.1.0.0/112"),
                ("10.2.0.1", "10.0.0.0/255.0.0.0"), ("11.0.0.1", None),
                ("10.1.9.0/24", "::ffff:10.1.0.0/112"), ("11.0.0.0/24", None),
                ("2001:db8:0:7::/64", "2001:db8::/32"),
                ("2001:db8::7", "2001:db8::/32"), ("a.example.net",
                ".example.net"), ("example.net", ".example.net"),
                ("a.org", None), ("joe@a.example.net", None),
                ("joe@example.com", "@EXAMPLE.com"),
                ("example", "example"), ("", None),
                ("10.1.2.3/x@a.example.org", "@a.example.org"),
                ("::1/@example.com", "@EXAMPLE.com"),
                ("10.1.2.3/x.example.net", ".example.net"),
                ("x" * 190 + "@a.example.org", "@a.example.org"),
                ("x@" + "y." * 90 + "b.example.org", "@.example.org"),
                ("y." * 99 + "example.net", ".example.net"),
                ("y" * 190 + "@" + "z" * 190, None)):
            self.assertEqual(found.find(value), pattern, value)
            self.assertEqual(found.find(prl.fold(value)), pattern, value)
            if "@" in value:  # whoever chose it
                self.assertEqual(found.find(value, False), pattern, value)

    def test_the_longest_network_wins_as_in_a_plain_search(self) -> None:
        rng = random.Random(1)
        names = ["0.0.0.0/0", "::/0"]
        for _ in range(300):
            four, six = rng.getrandbits(8), rng.getrandbits(8)
            names += [f"10.{four}.0.0/{rng.randrange(33)}",
                      f"2001:db8:{six:x}::/{rng.randrange(129)}"]
        networks = {ipaddress.ip_network(name, strict=False) for name in names}
        found = prl.as_patterns({str(one): str(one) for one in networks})
        self.assertEqual(set(found.each_network()), networks)
        self.assertEqual(set(found.entries()), set(map(str, networks)))
        for _ in range(2000):
            address: Any = ipaddress.ip_address(rng.choice([
                f"10.{rng.getrandbits(8)}.0.{rng.getrandbits(2)}",
                f"2001:db8:{rng.getrandbits(8):x}::{rng.getrandbits(2)}"]))
            best = max((one for one in networks if address in one),
                       key=lambda one: one.prefixlen)
            self.assertEqual(found.find(str(address)), str(best))

    def test_many_networks_take_no_longer_than_few(self) -> None:
        def spent(count: int) -> float:
            patterns = prl.as_limits_by_id({
                f"10.{n >> 8}.{n & 255}.0/{24 + n % 9}": []
                for n in range(count)})
            settings = prl.Settings(limits_by_id=patterns)
            mail = request(sasl_username="192.0.2.7")
            start = time.process_time()
            for _ in range(200):
                prl.claims_of(mail, settings)
            return time.process_time() - start

        # One by one they would take a thousand times as long.
        self.assertTrue(any(spent(30000) < 5 * spent(30) for _ in range(5)))

    def test_windows_are_found_once(self) -> None:
        settings = prl.Settings(limits_by_id=prl.as_limits_by_id(
            {"10.0.0.0/8": [[1, 7]], "joe": [[1, 9]]}),
            quotas=prl.as_quotas([{"by": "server", "limits": [[1, 200000]]}]))
        self.assertEqual(settings.windows, {7, 9, 60, 86400, 200000})
        self.assertIs(settings.windows, settings.windows)
        self.assertEqual(settings.longest_window, 200000)

    def test_a_client_network_is_found_once(self) -> None:
        for address, network in (
                ("198.51.100.9", "198.51.100.0/24"),
                ("2001:db8:0:7:ffff::1", "2001:db8:0:7::/64"),
                ("::ffff:198.51.100.9", "198.51.100.0/24"), ("unknown", ""),
                ("198.51.100.9" + " " * 50, ""), ("", "")):
            for _ in "12":
                self.assertEqual(prl.attribute_of(
                    request(client_address=address), "client_network"),
                    network)

    def test_a_name_that_a_client_chose_is_no_address(self) -> None:
        settings = prl.Settings(
            limit_by_sasl=False, limit_by_sender=True,
            limits_by_id=prl.as_limits_by_id(
                {"10.0.0.0/8": [], "::1": [], "192.0.2.1": []}),
            quotas=prl.as_quotas([{"by": "sender", "when": {
                "sender": "10.0.0.0/8"}, "limits": []}]))
        for sender in ("10.6.6.6", "10.6.6.6/x", "10.0.0.0/8", "::1",
                       "192.0.2.1", "0::1/64"):
            claims = prl.claims_of(request(sender=sender), settings)
            self.assertEqual([claim.limits for claim in claims],
                             [settings.limits], sender)

    def test_a_choice_fits_by_one_pattern_and_never_by_an_unwanted(self
                                                                   ) -> None:
        for patterns, fitting, others in (
                ("joe", ("joe",), ("ann", "")), ("", ("",), ("joe",)),
                (["joe", "@x.org"], ("joe", "a@x.org"), ("x.org", "a@y.org")),
                (["!10.0.0.0/8", "0.0.0.0/0"], ("1.1.1.1",), ("10.0.0.1",
                 "::1", "")), (["!joe"], ("ann", ""), ("joe",)),
                (["@.x.org", "!@a.x.org"], ("j@b.x.org", "j@x.org"),
                 ("j@a.x.org", "j@ax.org")),
                (587, ("587",), ("25",)), (["!", ], ("joe",), ("",))):
            choice = prl.as_choice(patterns)
            for values, fits in ((fitting, True), (others, False)):
                for value in values:
                    self.assertEqual(choice.fits(value), fits,
                                     (patterns, value))

    def claimed(self, *quotas: dict[str, Any], **attributes: object,
                ) -> dict[str, int]:
        """Return what a request costs by key, but for the first rule's."""
        settings = prl.Settings(limit_by_sasl=False, quotas=prl.as_quotas([
            {"limits": [[9, 60]], **quota} for quota in quotas]))
        return {claim.identity: claim.cost for claim in prl.claims_of(
            request(recipient_count=3, **attributes), settings)}

    def test_a_quota_counts_by_attributes(self) -> None:
        for by, attributes, key in (
                ("sasl_username", {"sasl_username": "Joe"},
                 "sasl_username=joe"),
                ("sasl_domain", {"sasl_username": "Joe@X.org"},
                 "sasl_domain=x.org"), ("sasl_domain", {}, None),
                ("sender_domain", {}, "sender_domain=example.org"),
                ("sender_domain", {"sender": ""}, None),
                ("recipient_domain", {"recipient": "ann@X.org."},
                 "recipient_domain=x.org"),
                ("recipient_domain", {"recipient": "ann@ｘ.org"},
                 "recipient_domain=x.org"),
                ("recipient_domain", {"recipient": "ann@. "}, None),
                ("server", {"sasl_username": ""}, "server=all"),
                ("client_address", {}, "client_address=192.0.2.7"),
                ("client_network", {}, "client_network=192.0.2.0/24"),
                ("client_network", {"client_address": "2001:db8::1:2:3:4"},
                 "client_network=2001:db8::/64"),
                ("client_network", {"client_address": "unknown"}, None),
                ("server_port", {"server_port": 587}, "server_port=587"),
                ("server_port", {}, None), (["sender", "helo_name"], {}, None),
                (["sender", "helo_name"], {"helo_name": "a|b%"},
                 "sender+helo_name=joe@example.org|a%7cb%25")):
            self.assertEqual(list(self.claimed({"by": by}, **attributes)),
                             [] if key is None else [key], by)

    def test_a_quota_counts_what_it_says(self) -> None:
        for count, attributes, cost in (
                ("recipients", {}, 3), ("mails", {}, 1),
                ("bytes", {"size": 12345}, 12345), ("bytes", {}, 0),
                ("bytes", {"size": 10**12}, 2**31 - 1),
                ("recipients", {"protocol_state": "RCPT"}, 1),
                ("client_network", {}, 1), ("helo_name", {}, 0)):
            self.assertEqual(
                list(self.claimed({"by": "server", "count": count},
                                  **attributes).values()),
                [cost], (count, attributes))

    def test_a_quota_concerns_whom_it_names(self) -> None:
        stranger = {"sasl_username": "", "client_address":
                    ["!10.0.0.0/8", "0.0.0.0/0", "::/0"]}
        for attributes, concerned in (
                ({"sasl_username": ""}, True), ({}, False),
                ({"sasl_username": "", "client_address": "10.0.0.1"}, False),
                ({"sasl_username": "", "client_address": "::1"}, True),
                ({"sasl_username": "", "client_address": "unknown"}, False)):
            self.assertEqual(bool(self.claimed(
                {"by": "server", "when": stranger}, **attributes)),
                concerned, attributes)

    def test_an_identity_is_never_a_quota_s_key(self) -> None:
        quotas = prl.as_quotas([{"by": "sasl_domain", "limits": [[1, 60]]}])
        settings = prl.Settings(quotas=quotas)
        keys = []
        for user in ("x@example.org", "sasl_domain=example.org",
                     "=sasl_domain=example.org", "a=b", "=a=b"):
            keys += [claim.identity for claim in prl.claims_of(
                request(sasl_username=user), settings)]
        self.assertEqual(keys, [
            "x@example.org", "sasl_domain=example.org",
            "=sasl_domain=example.org", "==sasl_domain=example.org",
            "a=b", "=a=b"])

    def test_what_is_only_tried_never_refuses(self) -> None:
        tried, strict = prl.Settings(dry_run=True).rules * 1 + \
            prl.Settings().rules
        limit = (prl.Limit(1, 60),)
        claims = [prl.Claim("tried", 2, limit, tried),
                  prl.Claim("strict", 1, limit, strict)]
        accounts = {claim.identity: prl.Account({60: 0})
                    for claim in claims}
        verdicts, charges = prl.decide(
            [prl.Mail(claims, 1000), prl.Mail(claims, 1000)], accounts)
        self.assertEqual([(one.broken and one.broken.claim.identity,
                           [use.claim.identity for use in one.tried])
                          for one in verdicts],
                         [(None, ["tried"]), ("strict", ["tried"])])
        self.assertEqual([charge.claim.identity for charge in charges],
                         ["strict"])

    def test_a_mail_passes_that_fits_whole(self) -> None:
        day, minute = prl.Limit(150, 86400), prl.Limit(10, 60)
        for used, cost, broken in (
                ((9, 9), 1, None), ((10, 10), 1, minute), ((9, 9), 2, minute),
                ((0, 150), 1, day), ((10, 150), 1, minute),
                ((0, 0), 11, minute), ((0, 0), 10, None),
                ((0, 141), 10, day)):
            claim = prl.Claim("joe", cost, (minute, day))
            verdict = prl.judge(prl.Account(
                dict(zip((60, 86400), used))).usage(claim))
            self.assertEqual(verdict.broken and verdict.broken.limit, broken)
            self.assertEqual(len(verdict.usage), 2)

    def test_limits_are_read_as_a_database_holds_them(self) -> None:
        for text in ("[[10, 60], [150, 86400]]", "[(10, 60), (150, 86400)]",
                     "((10,60),(150,86400))", " [[10,60],[150,86400]]\n",
                     "[[10, 60], (150, 86400),]  # per day"):
            self.assertEqual(prl.parse_limits(text), prl.Settings().limits)
        self.assertEqual(prl.parse_limits("((2, 3600),)"), ((2, 3600),))
        self.assertEqual(prl.parse_limits("[]"), ())
        for text in ("", "rubbish", "[10, 60]", "[[10]]", "[[-1, 60]]",
                     "[[1, 0]]", "__import__('os')", "{}", "None", "[" * 9999,
                     "[[10, 060]]", "-" * 99999 + "1", "[[1]*2]", "\0"):
            with self.subTest(text[:20]), self.assertRaises(ValueError):
                prl.parse_limits(text)


class StoreContract:
    """What every backend keeps to; a subclass opens the ledger."""

    LIMITS = (prl.Limit(10, 60), prl.Limit(15, 600))
    SHORT = prl.Settings(limits=(prl.Limit(1, 1),))  # keeps rows for 601 s

    assertEqual: Any
    assertLess: Any
    assertLessEqual: Any
    assertIn: Any
    assertIsNone: Any
    assertAlmostEqual: Any
    assertRaises: Any
    assertIsNotNone: Any
    assertTrue: Any
    assertFalse: Any
    assertNotIn: Any
    subTest: Any

    explain = "EXPLAIN "
    analyze: tuple[str, ...] = ()  # what it needs to know before

    def open(self, query: str | None = None) -> prl.Ledger:
        """Open a ledger on the database of the test."""
        raise NotImplementedError

    def assert_indexed(self, plan: list[str]) -> None:
        """Check that a plan has no scan of mail_count but by the index."""
        raise NotImplementedError

    def execute(self, ledger: prl.Ledger, statement: str,
                *values: object) -> list[tuple[Any, ...]]:
        """Run a statement with ? as placeholder and return its rows."""
        def work(transaction: Any) -> list[tuple[Any, ...]]:
            cursor = transaction.run(statement, *values)
            rows = cursor.fetchall() if cursor.description else []
            return [tuple(row) for row in rows]
        return ledger.database.transact(work)

    def passes(self, ledger: prl.Ledger, now: float, identity: str = "joe",
               cost: int = 1, limits: prl.Limits = LIMITS) -> bool:
        """Charge a mail at a time and say whether it passed."""
        verdict = ledger.decide(prl.Mail(
            [prl.Claim(identity, cost, limits)], now, "1.2", "DATA"))
        return verdict.broken is None

    def used(self, ledger: prl.Ledger, now: int, identity: str = "joe") -> int:
        """Return what an identity has used, by a mail that cannot pass."""
        verdict = ledger.decide(prl.Mail(
            [prl.Claim(identity, 10**6, (prl.Limit(0, 600),))], now))
        assert verdict.broken is not None
        return verdict.broken.used

    def test_at_most_the_limit_passes_in_any_window(self) -> None:
        ledger = self.open()
        passed = [now for now in range(1000, 1200)
                  if self.passes(ledger, now)]
        self.assertEqual(passed, [*range(1000, 1010), *range(1060, 1065)])

    def test_refused_mail_is_not_charged(self) -> None:
        ledger = self.open()
        self.assertEqual(self.passes(ledger, 1000, cost=11), False)
        self.assertEqual(self.used(ledger, 1000), 0)
        self.assertEqual(self.passes(ledger, 1000, cost=10), True)
        self.assertEqual(self.passes(ledger, 1000), False)
        self.assertEqual(self.used(ledger, 1000), 10)

    def test_a_mail_whose_commit_was_in_doubt_is_counted_once(self) -> None:
        one, other = self.open(), self.open()
        faults, claims = Faults(one), [prl.Claim("joe", 1, self.LIMITS)]
        self.passes(one, 1000)
        for instance, is_stored in (
                ("a", True), ("b", True), ("c", False), ("", True),
                ("", False), ("d", True)):
            faults.lose_commit(is_stored)
            mail = prl.Mail(claims, 1010, instance, "DATA")
            self.assertIsNone(one.decide(mail).broken)
            self.assertIsNotNone(mail.error)
        self.assertEqual(other.decide(prl.Mail(claims, 1010)).usage[0].used, 7)
        one.store_remembered(1020)
        self.assertEqual(one.memory.unstored_identities(), [])
        self.assertEqual(self.used(other, 1020), 8)
        self.assertEqual(sorted(self.execute(
            one, "SELECT instance, count(*) FROM mail_count"
            " WHERE instance <> '' GROUP BY instance")),
            [("1.2", 1), ("a", 1), ("b", 1), ("c", 1), ("d", 1)])

    def test_a_refused_mail_whose_commit_was_lost_is_not_counted(self) -> None:
        ledger = self.open()
        faults, claims = Faults(ledger), [prl.Claim("joe", 1, self.LIMITS)]
        for action, used in ("450 later", 1), ("dunno", 2):
            self.passes(ledger, 1000)
            faults.lose_commit(False)
            mail = prl.Mail(claims, 1010, "a", "DATA",
                            settings=prl.Settings(db_error_action=action))
            ledger.decide(mail)
            self.assertIsNotNone(mail.error)
            ledger.store_remembered(1020)
            self.assertEqual(self.used(ledger, 1020), used)
            ledger.database.transact(prl.forget, "joe")

    def test_two_commits_in_doubt_in_a_row_forget_no_mail(self) -> None:
        ledger = self.open()
        faults, claims = Faults(ledger), [prl.Claim("joe", 2, self.LIMITS)]
        self.passes(ledger, 1000)
        for instance in "a", "b":  # with b, a is found stored
            faults.lose_commit()
            ledger.decide(prl.Mail(claims, 1010, instance, "DATA"))
        faults.plan("WHERE id = who")  # so memory has to know of all three
        mail = prl.Mail(claims, 1010, "c", "DATA")
        self.assertEqual(ledger.decide(mail).usage[0].used, 5)
        self.assertIsNotNone(mail.error)
        ledger.store_remembered(1020)
        self.assertEqual(self.used(ledger, 1020), 7)

    def test_a_value_s_date_never_goes_back(self) -> None:
        one, other, limits = self.open(), self.open(), (prl.Limit(1, 60),)
        faults = Faults(one)

        def passes(value: str, now: int, fails: bool = False,
                   ledger: prl.Ledger = one) -> bool:
            for _ in range(2 * fails):  # again on another connection
                faults.plan("FROM mail_value WHERE")
            mail = prl.Mail([prl.Claim("key", 1, limits, value=value)], now)
            broken = ledger.decide(mail).broken
            faults.planned.clear()
            self.assertEqual(mail.error is not None, fails)
            return broken is None

        self.assertTrue(passes("a", 1100))
        self.assertTrue(passes("a", 1050, fails=True))  # the clock is behind
        self.assertFalse(passes("b", 1130, fails=True))
        self.assertTrue(passes("a", 1120, ledger=other))
        one.store_remembered(1130)
        self.assertFalse(passes("b", 1170, fails=True))
        self.assertFalse(passes("b", 1170))
        self.assertTrue(passes("b", 1180))

    def test_a_mail_in_doubt_is_found_though_totals_were_made_anew(
            self) -> None:
        ledger = self.open()
        faults = Faults(ledger)
        for now in range(1000, 1005):
            self.passes(ledger, now)
        self.execute(ledger, "DELETE FROM mail_count WHERE date < 1003")
        faults.lose_commit()
        self.passes(ledger, 1005)
        for date in (1006, 1007):  # the original was here meanwhile
            self.execute(self.open(), "INSERT INTO mail_count (id, date,"
                         " instance, protocol_state) VALUES ('joe', ?, 'x',"
                         " 'DATA')", date)
        ledger.store_remembered(1010)
        self.assertEqual(self.used(ledger, 1010), 5)

    def test_mails_remembered_while_others_are_sent_are_not_among_them(
            self) -> None:
        ledger = self.open()
        faults, claims = Faults(ledger), [prl.Claim("joe", 1, self.LIMITS)]

        def remember(instance: str) -> None:
            self.assertIsNone(ledger.memory.decide(
                prl.Mail(claims, 1000, instance, "DATA")).broken)

        remember("a")
        faults.lose_commit(before=lambda: remember("b"))
        ledger.store_remembered(1000)
        ledger.store_remembered(1000)
        self.assertEqual(self.execute(
            ledger, "SELECT instance FROM mail_count ORDER BY total"),
            [("a",), ("b",)])

    def test_each_table_that_is_missing_is_made_at_the_next_connection(
            self) -> None:
        ledger = self.open()
        for table in prl.TABLES:
            self.execute(ledger, f"DROP TABLE {table}")
            ledger.database.close()
            self.assertEqual(self.execute(
                ledger, f"SELECT * FROM {table}"), [], table)

    def test_a_value_is_kept_if_a_conflict_and_a_failure_meet(self) -> None:
        ledger = self.open()

        def passes(value: str) -> bool:
            claim = prl.Claim("key", 1, (prl.Limit(1, 60),), value=value)
            return ledger.decide(prl.Mail([claim], 1000)).broken is None

        faults = Faults(ledger)
        faults.plan("INSERT INTO mail_value", faults.conflict)
        faults.plan("INSERT INTO mail_value", OSError("full"))
        self.assertTrue(passes("a"))
        self.assertEqual(passes("b"), False)

    def test_the_date_of_a_value_never_goes_back(self) -> None:
        ledger = self.open()
        add_values = ledger.database.backend.add_values
        for rows in ([("key", "a", 1000), ("key", "b", 1001)],
                     [("key", "a", 999), ("key", "b", 1002)]):
            ledger.database.transact(
                prl.Transaction.write, add_values, rows)
        self.assertEqual(self.execute(
            ledger, "SELECT value, date FROM mail_value ORDER BY value"),
            [("a", 1000), ("b", 1002)])

    def test_a_value_s_date_heeds_other_hosts_and_a_wrong_clock(self) -> None:
        one, other = self.open(), self.open()

        def charge(value: str, now: float) -> prl.Mail:
            return prl.Mail([prl.Claim(
                "key", 1, (prl.Limit(3, 60),), value=value)], now)

        one.decide(charge("a", 1000))
        for value in "ab":  # the database is away, for one of the hosts
            self.assertIsNone(one.memory.decide(charge(value, 1010)).broken)
        other.decide(charge("a", 1050))
        one.store_remembered(1051)
        dates = "SELECT value, date FROM mail_value ORDER BY value"
        self.assertEqual(self.execute(one, dates), [("a", 1050), ("b", 1010)])
        for value in "cde":
            one.decide(charge(value, 999000))
        for now, passed in (1100, False), (1159, False), (1160, True):
            verdict = one.decide(charge("f", now))
            self.assertEqual(verdict.broken is None, passed, now)
        self.assertEqual([date for value, date in self.execute(one, dates)
                          if value > "b"], [1100, 1100, 1100, 1160])

    def test_a_mail_of_several_claims_charges_all_or_none(self) -> None:
        ledger = self.open()
        tight = (prl.Limit(1, 60),)
        both = [prl.Claim("joe", 1, self.LIMITS), prl.Claim("x.org", 1, tight)]
        for expected in (None, "x.org"):
            verdict = ledger.decide(prl.Mail(both, 1000))
            self.assertEqual(verdict.broken and verdict.broken.claim.identity,
                             expected)
        self.assertEqual(self.used(ledger, 1000), 1)

    def test_different_values_are_counted_exactly(self) -> None:
        ledger = self.open()
        limit = (prl.Limit(2, 60), prl.Limit(3, 600))

        def passes(now: int, value: str) -> bool:
            return ledger.decide(prl.Mail([prl.Claim(
                "places=joe", 1, limit, value=value)], now)).broken is None

        for now, value, passed in (
                (1000, "a", True), (1001, "a", True), (1010, "b", True),
                (1011, "c", False), (1012, "a", True), (1069, "c", False),
                (1070, "c", True), (1071, "d", False), (1080, "a", True),
                (1130, "a", True), (1140, "d", False), (1609, "d", False),
                (1610, "d", True), (1670, "e", True), (1671, "b", False)):
            self.assertEqual(passes(now, value), passed, (now, value))
        self.assertEqual(self.execute(
            ledger, "SELECT count(*) FROM mail_count"), [(0,)])

    def test_the_time_of_room_is_exact(self) -> None:
        wanting = prl.Settings(fail_action="450 $room_in").rules[0]
        chance = random.Random(5)
        ledger, now = self.open(), 1000
        for _ in range(60):
            now += chance.choice((0, 1, 7, 30))
            self.passes(ledger, now, cost=chance.choice((1, 2, 3)))
            cost = chance.choice((4, 8, 11))
            verdict = ledger.decide(prl.Mail(
                [prl.Claim("joe", cost, self.LIMITS[:1], wanting)], now))
            if verdict.broken is None:
                continue
            if cost > 10:
                self.assertIsNone(verdict.room_at)
                continue
            assert verdict.room_at is not None
            for at, fits in ((verdict.room_at - 1, False),
                             (verdict.room_at, True)):
                [[used]] = self.execute(
                    ledger, "SELECT coalesce(sum(recipient_count), 0) FROM"
                    " mail_count WHERE id = 'joe' AND date > ?", at - 60)
                self.assertEqual(used + cost <= 10, fits, (now, at))

    def test_there_is_room_when_all_limits_have_it(self) -> None:
        ledger, limits = self.open(), (prl.Limit(2, 60), prl.Limit(3, 600))
        wanting = prl.Settings(fail_action="450 $room_in").rules[0]
        tried = dataclasses.replace(wanting, dry_run=True)
        for now in (1000, 1550, 1551):
            self.passes(ledger, now, limits=limits)
        for now, cost, blocked, room in (
                (1552, 1, tried, 1610), (1552, 2, tried, 2150),
                (1552, 3, tried, None), (1552, 1, wanting, None),
                (1600, 2, tried, 2150), (1605, 1, tried, 1610)):
            verdict = ledger.decide(prl.Mail([
                prl.Claim("joe", cost, limits, wanting),
                prl.Claim("d=x", 1, (prl.Limit(0, 60),), blocked)], now))
            self.assertEqual(verdict.room_at, room, (now, cost, blocked))
        verdict = ledger.decide(prl.Mail([prl.Claim(
            "joe", 1, (prl.Limit(2, 600), prl.Limit(3, 900)), wanting)], 1605))
        self.assertEqual(verdict.room_at, 2150)

    def test_a_window_covers_its_seconds_of_real_time(self) -> None:
        ledger, limit = self.open(), (prl.Limit(2, 2),)
        chance, now = random.Random(11), 1000.0
        for identity in ("joe", "ann"):
            passed: list[float] = []
            for _ in range(150):
                now += chance.random() / 2
                if self.passes(ledger, now, identity, limits=limit):
                    self.assertLess(
                        sum(now - sent < 2 for sent in passed), 2, now)
                    passed.append(now)
            for first, second, third in zip(passed, passed[1:], passed[2:]):
                self.assertLess(third - first, 4, (first, second))

    def test_counts_outlive_the_connection(self) -> None:
        ledger = self.open()
        self.passes(ledger, 1000, cost=7)
        self.assertEqual(self.used(self.open(), 1000), 7)

    def test_identities_stay_apart(self) -> None:
        ledger = self.open()
        names = ["joe", "jöe", "joé", "joè", "josé", "jose", "j\U0001f600",
                 "j\U0001f601", "straße", "strasse", "joe'; --", "jo%e", "?",
                 "jo\\e", prl.fold("x" * 900), prl.fold("x" * 901),
                 prl.fold("é" * 190), prl.fold("\U0001f600" * 190)]
        for count, name in enumerate(names, 1):
            for _ in range(count % 7 + 1):
                self.passes(ledger, 1000, name)
        for count, name in enumerate(names, 1):
            with self.subTest(name):
                self.assertEqual(self.used(ledger, 1000, name), count % 7 + 1)
        verdicts = settled(ledger, [prl.Mail(  # MariaDB's cache takes é for e
            [prl.Claim(name, 1, self.LIMITS)], 1000) for name in names])
        self.assertEqual(
            [verdict.usage[0].used for verdict in verdicts],
            [count % 7 + 1 for count in range(1, len(names) + 1)])

    def test_a_clock_that_is_behind_makes_no_room(self) -> None:
        ahead, behind = self.open(), self.open()
        passed = sum(self.passes(ledger, now - back)
                     for now in range(1000, 1060)
                     for ledger, back in ((ahead, 0), (behind, 30)))
        self.assertEqual(passed, 10)

    def test_a_clock_set_far_back_blocks_nobody_for_long(self) -> None:
        ledger = self.open()
        self.passes(ledger, 10**6, cost=10)
        with quiet() as said:
            self.assertEqual(self.passes(ledger, 1000), False)  # as just sent
        self.assertEqual(said, [
            "recorded mails are dated 999000 seconds in the future; check the"
            " clocks of all hosts"])
        self.assertEqual(self.passes(ledger, 1059), False)
        self.assertEqual(self.passes(ledger, 1060), True)
        self.assertEqual(self.used(ledger, 1060), 11)

    def test_the_rows_tell_what_was_counted(self) -> None:
        ledger = self.open()
        self.passes(ledger, 1000, cost=2)
        self.passes(ledger, 1001, cost=3)
        columns = ", ".join(prl.COLUMNS)
        self.assertEqual(
            self.execute(ledger, f"SELECT {columns} FROM mail_count"
                         " ORDER BY date"),
            [("joe", 1000, 2, "1.2", "DATA", 2),
             ("joe", 1001, 3, "1.2", "DATA", 5)])

    def test_rows_without_a_total_are_counted(self) -> None:
        ledger = self.open()
        self.passes(ledger, 1000)
        for date in (1001, 1002):  # the original was here in between
            self.execute(
                ledger, "INSERT INTO mail_count (id, date, recipient_count,"
                " instance, protocol_state) VALUES (?, ?, 2, 'a', 'DATA')",
                "joe", date)
        self.assertEqual(self.used(ledger, 1003), 5)

    def go_back(self, ledger: prl.Ledger, columns: int, *more: str) -> None:
        """Run README's statements for an original of so many columns."""
        backend = ledger.database.backend
        ledger.database.close()
        target = "1.0.x or older" if columns == 2 else "1.1 or 1.2"
        text, = [body for language, body in readme_blocks()
                 if language == "sql" and f"Back to {target}\n" in body]
        text = text.partition("\n")[2]
        with contextlib.closing(backend.connect(PATIENCE)) as connection:
            for statement in (*filter(str.strip, text.split(";")), *more):
                connection.cursor().execute(statement)
            connection.commit()

    def test_the_way_back_and_there_again_keeps_the_counts(self) -> None:
        ledger = self.open()
        self.passes(ledger, 1000)
        for turn, columns in enumerate((5, 2, 5, 2)):
            row = ("joe", 1000, 1, "a", "RCPT")[:columns]
            with self.subTest(turn=turn, columns=columns):
                self.go_back(  # and let the original write there
                    ledger, columns, f"INSERT INTO mail_count VALUES {row}",
                    *["CREATE INDEX mail_count_total ON mail_count (id)"]
                    * (turn > 1))  # as if dropping the column left it
                self.assertEqual(self.used(ledger, 1001), turn + 2)

    def test_mails_of_an_outage_come_after_those_of_another_host(self) -> None:
        here, there = self.open(), self.open()
        limits = (prl.Limit(9, 600),)
        self.passes(here, 1000, limits=limits)
        here.database.lock.acquire()  # as if it hung
        here.database.backend.timeout = 0
        for now in (1001, 1003, 1003):
            mail = prl.Mail([prl.Claim("joe", 1, limits)], now)
            at_once(here.decide, [mail])
            self.assertIsNotNone(mail.error)
            assert mail.verdict is not None
            self.assertIsNone(mail.verdict.broken)
        here.database.lock.release()
        here.database.backend.timeout = 5
        for now in (1002, 1003, 1004):
            self.passes(there, now, cost=2, limits=limits)
        self.assertEqual(self.passes(here, 1004, limits=limits), False)
        self.assertEqual(self.execute(
            here, "SELECT date, recipient_count, total FROM mail_count"
            " ORDER BY date, total"), [
                (1000, 1, 1), (1002, 2, 3), (1003, 2, 5), (1004, 2, 7),
                (1004, 1, 8), (1004, 1, 9), (1004, 1, 10)])

    def test_a_doubtful_mail_comes_ahead_of_those_since_it_was_sent(
            self) -> None:
        ledger = self.open()
        faults, claims = Faults(ledger), [
            prl.Claim("joe", 1, (prl.Limit(3, 10),))]

        def remember() -> None:
            ledger.memory.decide(prl.Mail(claims, 1008, "b", "DATA"))

        faults.lose_commit(is_sent=False, before=remember)
        ledger.decide(prl.Mail(claims, 1000, "a", "DATA"))
        self.assertEqual(ledger.memory.decide(
            prl.Mail(claims, 1011, "c", "DATA")).usage[0].used, 1)
        ledger.store_remembered(1012)
        self.assertEqual(self.execute(
            ledger, "SELECT instance, date FROM mail_count ORDER BY total"),
            [("a", 1000), ("b", 1008), ("c", 1011)])

    def test_what_is_remembered_is_stored_once_whoever_stores_it(self) -> None:
        ledger = self.open()
        claims = [prl.Claim("joe", 1, (prl.Limit(10**6, 600),))]

        def remember() -> None:
            ledger.memory.decide(prl.Mail(claims, 1000, "a", "DATA"))

        def store() -> None:
            ledger.store_remembered(1000)

        def decide() -> None:
            ledger.decide(prl.Mail(claims, 1000, "b", "DATA"))

        decide()  # there are tables
        works = [remember, store, decide, store] * 60
        at_once(lambda work: work(), works)
        store()
        self.assertEqual(sorted(self.execute(
            ledger, "SELECT instance, count(*) FROM mail_count"
            " GROUP BY instance")), [("a", 60), ("b", 61)])

    def test_limits_hold_from_the_first_mail_of_an_outage(self) -> None:
        ledger = self.open()
        values = [prl.Claim("key", 1, (prl.Limit(2, 600),), value=value)
                  for value in "abc"]
        self.passes(ledger, 1000, cost=9)
        ledger.decide(prl.Mail(values[:1], 1000))
        faults = Faults(ledger)
        for _ in range(9):
            faults.plan("SELECT")
        self.assertEqual([self.passes(ledger, 1001) for _ in "abc"],
                         [True, False, False])
        self.assertEqual([ledger.decide(prl.Mail([claim], 1001)).broken is None
                          for claim in (*values, values[1])],
                         [True, True, False, True])
        faults.planned.clear()
        self.assertEqual(self.used(ledger, 1002), 10)
        self.assertIsNotNone(ledger.decide(prl.Mail(values[2:], 1003)).broken)

    def test_memory_knows_the_windows_of_all_limits_that_may_hold(
            self) -> None:
        """Of --limit, of the configuration, and of what is not known."""
        asked = (prl.Limit(10, 60), prl.Limit(150, 86400))
        for text, ends, now, limits, left in (
                ("[[20, 3600]]", 10**6, 5000, asked, 0),  # 100 were used
                ("[[400, 3600]]", 5100, 5200, asked, 10),  # of a minute
                ("[[400, 3600]]", 5100, 5200, asked[1:], 50),
                ("[[120, 600]]", 10**6, 5000, asked, 116),
                ("[]", 1, 5000, (prl.Limit(120, 3600),), 20)):
            ledger = self.open()
            self.execute(ledger, "DELETE FROM mail_count")
            for at in range(2500, 4500, 20):
                self.passes(ledger, at, limits=(prl.Limit(1000, 86400),))
            self.execute(ledger, "DELETE FROM mail_limit")
            self.execute(ledger, "INSERT INTO mail_limit (id, limits, ends,"
                         " made) VALUES ('joe', ?, ?, 1)", text, ends)
            for at, known in ((4900, asked), (5000, limits)):
                self.passes(ledger, at, cost=10**6, limits=known)
            faults = Faults(ledger)
            for _ in range(1000):
                faults.plan("SELECT")
            passed = sum(self.passes(ledger, now, limits=limits)
                         for _ in range(200))
            self.assertEqual(passed, left, text)
            faults.planned.clear()

    def test_claims_of_one_identity_keep_their_own_limits(self) -> None:
        """A sender may be spelled like a client address."""
        ledger = self.open()
        for limits in ((prl.Limit(1, 60),), (prl.Limit(3, 600),)), \
                ((prl.Limit(3, 600),), (prl.Limit(1, 60),)):
            self.execute(ledger, "DELETE FROM mail_count")
            verdicts = settled(ledger, [
                prl.Mail([prl.Claim("10.0.0.1", 2, each)], 1000)
                for each in limits])
            self.assertEqual(
                [verdict.broken is None for verdict in verdicts],
                [limits[0][0].mails == 3, limits[1][0].mails == 3])

    def test_what_was_rolled_back_is_not_taken_for_sent(self) -> None:
        ledger = self.open()
        self.passes(ledger, 1000)
        faults = Faults(ledger)
        for _ in range(2):  # the second brings the first, in vain
            faults.plan("INSERT INTO mail_count")
            mail = prl.Mail(
                [prl.Claim("joe", 1, self.LIMITS)], 1000, "a", "RCPT")
            self.assertIsNone(ledger.decide(mail).broken)
            self.assertIsNotNone(mail.error)
        self.assertEqual(self.used(self.open(), 1000), 1)
        ledger.store_remembered(1000)
        self.assertEqual(self.used(ledger, 1000), 3)

    def test_a_stop_writes_what_memory_has_even_if_it_hung_before(self
                                                                  ) -> None:
        ledger = self.open()
        ledger.memory.decide(prl.Mail(
            [prl.Claim("joe", 1, self.LIMITS)], 1000))
        ledger.database.backend.timeout = 0
        with ledger.database.lock:
            at_once(ledger.decide, [prl.Mail(
                [prl.Claim("joe", 1, self.LIMITS)], 1000)])
        ledger.database.backend.timeout = 5
        self.assertTrue(ledger.is_in_outage())
        ledger.store_remembered(1000)
        self.assertEqual(self.used(ledger, 1000), 2)

    def test_an_override_holds_in_an_outage_for_as_long_as_given(self) -> None:
        ledger = self.open()
        service = prl.Service(prl.Settings(), ledger, lambda: 1000)
        ledger.database.transact(
            prl.set_override, "joe",
            prl.Override((prl.Limit(0, 60),), 2000))
        prl.Housekeeping(service).do_step()
        self.assertEqual([
            ledger.memory.decide(prl.Mail(
                [prl.Claim("joe", 1, self.LIMITS)], now)).broken is None
            for now in (1000, 1999, 2000)], [False, False, True])

    def test_cleaning_heeds_the_query_and_the_override(self) -> None:
        ledger = self.open()
        mark = ledger.database.backend.placeholder
        limits = "[[100, 20000]]"
        works = f"SELECT '{limits}' WHERE {mark} <> ''"
        for query, now, left in (
                (f"SELECT nothing, {mark} FROM nowhere", 90000,
                 ["ann", "joe"]),
                (works, 40999, ["ann", "joe"]), (works, 41000, ["joe"]),
                ("", 50999, ["joe"]), ("", 51000, [])):
            with self.subTest(query, now=now), quiet():
                if query and now < 41000 or now == 90000:
                    self.fill_tables(ledger, "ann", "joe")
                    self.override(ledger, "joe", prl.Limit(9, 25000),
                                  ends=2000)
                clean(ledger.database, dataclasses.replace(
                    self.SHORT, sql_limits_by_id=query), now)
                for table in ("mail_count", "mail_value"):
                    self.assertEqual(self.names(ledger, table), left)

    def test_refusals_stay_for_five_weeks_or_twice_the_window(self) -> None:
        ledger, day = self.open(), 86400
        for window, limits, now, left in (
                (1, [], 1000 + 35 * day - 1, True),
                (1, [], 1000 + 35 * day, False),
                (20 * day, [], 1000 + 40 * day - 1, True),
                (20 * day, [], 1000 + 40 * day, False),
                (1, [prl.Limit(9, 30 * day)], 1000 + 60 * day - 1, True),
                (1, [prl.Limit(9, 30 * day)], 1000 + 60 * day, False)):
            with self.subTest(window=window, now=now):
                self.fill_tables(ledger, "joe")
                self.override(ledger, "joe", *limits)
                clean(ledger.database, prl.Settings(
                    limits=(prl.Limit(1, window),), report=True,
                    report_to=("a@x.org",)), now)  # it may never be told
                self.assertEqual(
                    self.names(ledger, "mail_refused"), ["joe"] * left)

    def fill_tables(self, ledger: prl.Ledger, *names: str) -> None:
        """Have one row of time 1000 for each name, in each table."""
        for table in ("mail_count", "mail_value", "mail_refused"):
            self.execute(ledger, f"DELETE FROM {table}")
        ledger.database.transact(prl.Transaction.write, prl.INSERT, [
            (name, 1000, 1, "", "DATA", 1) for name in names])
        ledger.database.transact(
            prl.Transaction.write, ledger.database.backend.add_values,
            [(name, "x", 1000) for name in names])
        ledger.database.transact(
            prl.Transaction.write, ledger.database.backend.add_refusals,
            [(name, 60, 9, 1, 1000, 1000, "", 0) for name in names])

    def names(self, ledger: prl.Ledger, table: str) -> list[str]:
        """Return the identities in a table."""
        return [name for [name] in self.execute(
            ledger, f"SELECT DISTINCT id FROM {table} ORDER BY id")]

    def test_cleaning_forgets_nothing_that_a_limit_sees(self) -> None:
        ledger = self.open()
        for now in range(1000, 1100):
            for identity in ("ann", "bob", "eve"):
                self.passes(ledger, now, identity, limits=(
                    prl.Limit(1000, 60),))
        self.assertEqual(sum(clean(ledger.database, self.SHORT, 1650)), 150)
        self.assertEqual(self.execute(
            ledger, "SELECT min(date), count(*) FROM mail_count"),
            [(1050, 150)])
        for identity in ("ann", "bob", "eve"):
            verdict = ledger.decide(prl.Mail([prl.Claim(
                identity, 9, (prl.Limit(0, 60),))], 1109))
            self.assertEqual(verdict.usage[0].used, 50)

    def test_cleaning_keeps_what_another_host_can_see(self) -> None:
        ledger, now = self.open(), int(time.time())
        other = prl.HostWindow("other", 86400, "")
        for age, left in ((0, True), (prl.STORED_FOR - 99, True),
                          (prl.STORED_FOR + 1, False)):
            with self.subTest(age=age):
                self.fill_tables(ledger, "joe")
                self.execute(ledger, "DELETE FROM mail_window")
                for host in (other, prl.own_window(self.SHORT)):
                    ledger.database.transact(prl.store_window, host)
                self.execute(ledger, "UPDATE mail_window SET since = 0")
                self.execute(ledger, "UPDATE mail_window SET date = ?"
                             " WHERE host = 'other'", now - age)
                for clock in (87400, 3000):  # twice the window
                    list(prl.clean(ledger.database, self.SHORT, clock))
                    self.assertEqual(self.names(ledger, "mail_count"),
                                     ["joe"] * left)
                    self.assertEqual(self.names(ledger, "mail_value"),
                                     ["joe"] * left)
                self.assertEqual(self.passes(ledger, 87399, limits=(
                    prl.Limit(1, 86400),)), not left)

    def test_two_hosts_on_one_database_keep_what_the_other_sees(self) -> None:
        narrow, wide = self.open(), self.open()
        limits = prl.Limit(2, 60), prl.Limit(5, 86400)
        services = [prl.Service(prl.Settings(limits=some), ledger,
                                lambda: 9000) for some, ledger in (
                                    (limits[:1], narrow), (limits[1:], wide))]
        keepers = [prl.Housekeeping(service) for service in services]
        for keeper in keepers:
            keeper.do_step()
        self.execute(narrow, "UPDATE mail_window SET since = 0")
        self.assertEqual([self.passes(wide, 1000, limits=limits[1:])
                          for _ in range(6)], [True] * 5 + [False])
        for _ in range(9):
            keepers[0].do_step()
        self.assertEqual(self.passes(wide, 9000, limits=limits[1:]), False)

    def test_hosts_that_differ_are_told_once(self) -> None:
        ledger = self.open()
        for other, told in (
                (prl.HostWindow("mx2", 2 * 86400, ""), "the longest window is"
                 " 1 day here and 2 days on mx2; records are kept for the"
                 " longest window"),
                (prl.HostWindow("mx2", 86400, "x"), "sql_limits_by_id is not"
                 " the same here and on mx2; until it is, this host deletes no"
                 " records"),
                (prl.HostWindow("mx2", 86400, ""), None)):
            with self.subTest(other), quiet() as said:
                self.execute(ledger, "DELETE FROM mail_window")
                ledger.database.transact(prl.store_window, other)
                service = prl.Service(prl.Settings(), ledger, lambda: 9000)
                keeper = prl.Housekeeping(service)
                for _ in range(3):  # each reload looks again
                    service.reload(prl.Settings())
                    keeper.do_step()
                self.assertEqual(len(said), told is not None)
                self.assertIn(told or "", "".join(said))

    def test_nothing_is_deleted_until_each_host_had_time_to_store(
            self) -> None:
        ledger, now = self.open(), int(time.time())
        self.fill_tables(ledger, "joe")
        for since, date, left in (
                (0, 0, True), (now, now, True),  # after an upgrade
                (0, now - prl.STORED_FOR - 99, True),  # all were down
                (now + 10**9, now + 10**9, True),  # the server's clock was off
                (now - prl.STORED_FOR + 99, now, True),
                (now - prl.STORED_FOR - 1, now, False)):
            with self.subTest(since=since, date=date):
                self.execute(ledger, "DELETE FROM mail_window")
                own = prl.own_window(self.SHORT)
                if since:
                    self.execute(ledger, f"{prl.STORE_WINDOW}".replace(
                        "VALUES (?, ?, ?", "VALUES ('" + own.host + "', 1, ''"
                        ), since, date)
                for _ in range(2):
                    list(prl.clean(ledger.database, self.SHORT, now))
                    self.assertEqual(
                        self.names(ledger, "mail_count"), ["joe"] * left)
                    ledger.database.transact(prl.store_window, own)

    def test_a_clock_that_is_ahead_deletes_nothing(self) -> None:
        ledger, now = self.open(), int(time.time())
        self.passes(ledger, now)
        self.override(ledger, "joe", prl.Limit(0, 60), ends=now + 60)
        clean(ledger.database, self.SHORT, now + 10**8)
        for table in ("mail_count", "mail_limit"):
            self.assertEqual(self.names(ledger, table), ["joe"])

    def test_only_who_knows_the_query_of_all_hosts_cleans(self) -> None:
        ledger = self.open()
        mark = ledger.database.backend.placeholder
        query = f"SELECT '[]' WHERE {mark} = 'joe'"
        for others, own, left in (
                ((query,), "", True), (("SELECT 1", ""), query, True),
                (("", query.replace(" ", "\n ")), query, False)):
            with self.subTest(others=others, own=own):
                self.fill_tables(ledger, "ann")
                settings = dataclasses.replace(
                    self.SHORT, sql_limits_by_id=own)
                self.execute(ledger, "DELETE FROM mail_window")
                for each in (own, *others):
                    ledger.database.transact(
                        prl.store_window, prl.own_window(dataclasses.replace(
                            self.SHORT, sql_limits_by_id=each)))
                self.execute(ledger, "UPDATE mail_window SET since = 0")
                list(prl.clean(ledger.database, settings, 99999))
                self.assertEqual(
                    self.names(ledger, "mail_count"), ["ann"] * left)

    def test_a_shorter_window_counts_two_days_after_a_reload(self) -> None:
        ledger = self.open()
        service = prl.Service(prl.Settings(), ledger, lambda: 9000)
        keeper = prl.Housekeeping(service)
        for settings in (prl.Settings(), self.SHORT, self.SHORT):
            service.reload(settings)
            keeper.do_step()
        self.assertEqual(self.execute(
            ledger, "SELECT seconds FROM mail_window ORDER BY seconds"),
            [(1,), (86400,)])
        self.execute(ledger, "UPDATE mail_window SET date = date - ?"
                     " WHERE seconds > 1", prl.STORED_FOR + 1)
        prl.Housekeeping(service).do_step()  # of another start
        self.assertEqual(self.execute(
            ledger, "SELECT seconds FROM mail_window"), [(1,)])

    def test_unused_turns_are_deleted(self) -> None:
        ledger = self.open()
        self.execute(ledger, "INSERT INTO mail_value (id, value, date)"
                     " VALUES ('k=x', 'v', 9000)")
        self.passes(ledger, 9000, "ann")
        turns = sorted([f"{first}{n}" for first in "az"
                        for n in range(prl.CLEAN_STEP)] + ["ann", "k=x"])
        self.execute(ledger, "DELETE FROM mail_turn")
        ledger.database.transact(
            prl.Transaction.write, "INSERT INTO mail_turn (id, turn)"
            " VALUES {}", [(name, 1) for name in turns])
        clean(ledger.database, self.SHORT, 9000)
        self.assertEqual(self.names(ledger, "mail_turn"), ["ann", "k=x"])

    def test_many_values_are_cleaned_in_small_steps(self) -> None:
        ledger, step = self.open(), prl.CLEAN_STEP
        values = [(f"k{key}", f"v{n:05}", 1000 + n % 2) for key, count in
                  enumerate((5 * step, 3, 0, step, step // 2, step // 3))
                  for n in range(count)]
        ledger.database.transact(
            prl.Transaction.write, ledger.database.backend.add_values, values)
        steps = clean(ledger.database, self.SHORT, 1601)
        self.assertEqual(sum(steps), len(values) // 2 + 1)
        self.assertLessEqual(max(steps), 2.5 * step)  # of one second
        self.assertEqual(self.execute(
            ledger, "SELECT id, min(date), count(*) FROM mail_value"
            " GROUP BY id ORDER BY id"), [
                ("k0", 1001, 5 * step // 2), ("k1", 1001, 1),
                ("k3", 1001, step // 2), ("k4", 1001, step // 4),
                ("k5", 1001, step // 6)])

    def test_many_rows_of_an_identity_are_cleaned_in_small_steps(self) -> None:
        ledger, step = self.open(), prl.CLEAN_STEP
        for begin in range(0, 3500, 500):
            ledger.database.transact(prl.Transaction.write, prl.INSERT, [
                ("joe", 1000 + n, 1, "", "DATA", n + 1)
                for n in range(begin, begin + 500)])
        self.passes(ledger, 9000, "zoe")
        steps = clean(ledger.database, prl.Settings(
            limits=(prl.Limit(1, 2500),)), 9000)
        self.assertEqual(steps[:4], [step, step, step, 1])
        self.assertEqual(sum(steps), 3 * step + 1)
        self.assertEqual(self.execute(
            ledger, "SELECT min(date) FROM mail_count"), [(4001,)])

    def test_many_identities_are_cleaned_in_small_steps(self) -> None:
        ledger = self.open()
        ledger.database.transact(prl.Transaction.write, prl.INSERT, [
            (f"u{n:05}", 1000, 1, "", "DATA", 1) for n in range(2500)])
        steps = clean(ledger.database, self.SHORT, 9999)
        self.assertEqual(sum(steps), 2500)
        self.assertLessEqual(max(steps), prl.CLEAN_STEP)

    def test_cleaning_ends_however_many_identities_are_added(self) -> None:
        ledger = self.open()
        self.fill_tables(ledger, "m")
        steps = prl.clean(ledger.database, self.SHORT, 99999)
        for step, _ in enumerate(steps):
            self.assertLess(step, 99)
            self.passes(ledger, 99999, f"n{step:03}")

    def test_refusals_are_summed_up_by_identity_and_window(self) -> None:
        ledger = self.open()
        for now, window, who in ((1000, 60, ("joe", "joé", "joe")),
                                 (1001, 60, ("joe", "joé", "joe")),
                                 (1000, 900, ("joe",)), (1001, 900, ("joe",))):
            settled(ledger, [prl.Mail(
                [prl.Claim(one, 1, (prl.Limit(0, window),))], now,
                client=f"::{now}") for one in who])
        self.assertEqual(self.passes(ledger, 1002, "joe", 3, (
            prl.Limit(2, 60),)), False)
        self.assertEqual(
            sorted(ledger.database.transact(prl.read_refusals)),
            [("joe", 60, 2, 5, 1000, 1002, "", 0),
             ("joe", 900, 0, 2, 1000, 1001, "::1001", 0),
             ("joé", 60, 0, 2, 1000, 1001, "::1001", 0)])
        self.assertEqual(self.used(ledger, 1003), 0)

    def override(self, ledger: prl.Ledger, identity: str, *limits: prl.Limit,
                 ends: int | None = None) -> None:
        """Set the limits of an identity."""
        ledger.database.transact(
            prl.set_override, identity,
            prl.Override(limits, ends, 1000))

    def test_limits_set_by_hand_win_at_once_until_they_end(self) -> None:
        here, there = self.open(), self.open()
        self.assertEqual(self.passes(here, 1000, cost=9), True)
        self.override(here, "joe", prl.Limit(12, 30), prl.Limit(14, 900),
                      prl.Limit(99, 9000), ends=1100)
        self.override(here, "Joe", prl.Limit(0, 1))  # is somebody else
        self.assertEqual(self.passes(there, 1001, cost=3), True)
        self.assertEqual(self.passes(there, 1001), False)
        self.assertEqual(self.passes(there, 1030, cost=2), True)
        self.assertEqual(self.passes(there, 1099), False)
        self.assertEqual(self.passes(there, 1100), True)  # its own limits
        self.override(here, "joe")
        self.assertEqual(self.passes(there, 1100, cost=99), True)
        self.override(here, "joe", prl.Limit(0, 60))
        for limits in ((), self.LIMITS):
            self.assertEqual(self.passes(there, 1700, limits=limits), False)
        for had in (1, 0):
            self.assertEqual(there.database.transact(
                prl.drop_override, "joe"), had)
        self.assertEqual(self.passes(there, 1700, cost=10), True)

    def test_who_exceeds_a_limit_with_block_for_is_blocked_on_all_hosts(
            self) -> None:
        here, there = self.open(), self.open()
        blocking = prl.Settings(limits=(prl.Limit(2, 60),), block_for=500)
        rule = blocking.rules[0]
        tried = dataclasses.replace(rule, dry_run=True)

        def decide(ledger: prl.Ledger, now: int, identity: str = "joe",
                   rule: prl.Rule = rule) -> prl.Verdict:
            return ledger.decide(prl.Mail([prl.Claim(
                identity, 1, rule.limits, rule)], now))

        for now in (1000, 1001):
            self.assertIsNone(decide(here, now).broken)
        self.assertIsNone(decide(here, 1002).block)  # this one exceeds it
        for ledger, now in ((here, 1003), (there, 1100), (there, 1501)):
            verdict = decide(ledger, now)
            self.assertIsNotNone(verdict.broken)
            self.assertEqual(verdict.block, prl.Override(
                prl.BLOCKED, 1502, 1002, "2/60s"), now)
            self.assertEqual(verdict.room_at, 1502)
        self.assertIsNone(decide(there, 1502).broken)
        for now in (1503, 1504):
            verdict = decide(there, now)
        self.assertIsNotNone(verdict.broken)
        here.database.transact(prl.drop_override, "joe")
        self.assertIsNone(decide(there, 1570).broken)
        for now in range(1000, 1005):
            self.assertIsNone(decide(here, now, "ann", tried).broken)

    def test_block_for_replaces_no_limit_that_was_set_by_hand(self) -> None:
        ledger = self.open()
        rule = prl.Settings(
            limits=(prl.Limit(1, 60),), block_for=500).rules[0]
        self.override(ledger, "joe", prl.Limit(2, 60))
        verdicts = [ledger.decide(prl.Mail([prl.Claim(
            "joe", 1, rule.limits, rule)], now)) for now in (
                1000, 1001, 1002, 1061)]
        self.assertEqual([verdict.broken is None for verdict in verdicts],
                         [True, True, False, True])

    def test_a_block_by_block_for_holds_in_an_outage(self) -> None:
        ledger = self.open()
        rule = prl.Settings(
            limits=(prl.Limit(1, 60),), block_for=500).rules[0]
        claims = [prl.Claim("joe", 1, rule.limits, rule)]
        for now in (1000, 1001):  # the second exceeds it: no other is needed
            ledger.decide(prl.Mail(claims, now))
        faults = Faults(ledger)
        for now, is_blocked in ((1200, True), (1502, False)):
            for _ in range(9):
                faults.plan("SELECT")
            mail = prl.Mail(claims, now)
            verdict = ledger.decide(mail)
            self.assertIsNotNone(mail.error)
            self.assertEqual(verdict.block is not None, is_blocked, now)
            faults.planned.clear()

    def test_limits_set_by_hand_are_kept_by_threads_and_wins(self) -> None:
        ledger = self.open(f"SELECT '[[3, 60]]' WHERE 'joe' = "
                           f"{self.open().database.backend.placeholder}")
        self.override(ledger, "joe", prl.Limit(7, 60))
        passed = at_once(lambda _: [self.passes(ledger, 1000, limits=())
                                    for _ in range(9)], range(8))
        self.assertEqual(sum(map(sum, passed)), 7)

    def test_rubbish_among_limits_set_by_hand_does_not_hold(self) -> None:
        ledger = self.open()
        self.override(ledger, "joe", prl.Limit(0, 60))
        self.execute(ledger, "UPDATE mail_limit SET limits = '5 a day'")
        with quiet() as said:
            self.assertEqual([self.passes(ledger, 1000) for _ in range(11)],
                             [True] * 10 + [False])
            clean(ledger.database, self.SHORT, 9999)
        self.assertEqual(len(said), 1)

    def test_limits_set_by_hand_are_deleted_two_days_after_they_end(
            self) -> None:
        ledger, end = self.open(), 2000 + prl.STORED_FOR
        for who, ends in (("ann", 2000), ("joe", None)):
            self.override(ledger, who, prl.Limit(9, 60), ends=ends)
        for now, left in ((end - 1, ["ann", "joe"]), (end, ["joe"])):
            clean(ledger.database, self.SHORT, now)
            self.assertEqual(self.names(ledger, "mail_limit"), left)

    def test_the_refusals_of_the_original_are_imported(self) -> None:
        old = self.open()
        self.passes(old, 1000, cost=7)
        identity = old.database.backend.identity
        for statement in (
                "DROP TABLE mail_refused", "DROP TABLE mail_limit",
                f"CREATE TABLE limit_report (id {identity}, delta int,"
                " hit int)",
                "INSERT INTO limit_report VALUES ('Joe', 60, 3),"
                " ('joe', 60, 1), ('ann', 60, 4)"):
            self.execute(old, statement)
        old.database.close()
        new = self.open()
        self.assertEqual(self.used(new, 1000), 7)
        self.assertEqual(self.passes(new, 1000, limits=(prl.Limit(1, 60),)),
                         False)
        for _ in range(2):
            new.database.transact(prl.import_old_refusals, 1000)
        rows = new.database.transact(prl.read_refusals)
        self.assertEqual(sorted(
            (row.identity, row.hits) for row in rows if row.seconds == 60),
            [("ann", 4), ("joe", 5)])
        self.assertEqual(self.execute(new, "SELECT * FROM limit_report"), [])

    def test_refusals_recorded_before_reports_were_are_reported(self) -> None:
        old = self.open()
        self.passes(old, 1000, limits=(prl.Limit(0, 60),))
        name = old.database.backend.identity
        for statement in (  # SQLite drops a column since 3.35 only
                "CREATE TABLE older AS SELECT id, seconds, mails, hits, first,"
                " last, client FROM mail_refused",
                "DROP TABLE mail_refused",
                f"CREATE TABLE mail_refused (id {name} NOT NULL, seconds"
                " bigint NOT NULL, mails bigint NOT NULL, hits bigint NOT NULL"
                ", first bigint NOT NULL, last bigint NOT NULL, client"
                f" {name} NOT NULL, PRIMARY KEY (id, seconds))",
                "INSERT INTO mail_refused SELECT * FROM older"):
            self.execute(old, statement)
        old.database.close()
        new = self.open()
        for hits in 2, 3:
            self.passes(new, 1000, limits=(prl.Limit(0, 60),))
            [row] = new.database.transact(prl.read_refusals)
            self.assertEqual((row.hits, row.told), (hits, hits - 2))
            new.database.transact(
                prl.record_told, [row._replace(hits=hits - 1)])
            [row] = new.database.transact(prl.read_refusals)
            self.assertEqual(row.told, hits - 1)

    def test_a_query_gives_limits_that_hold_at_once(self) -> None:
        ledger = self.open("SELECT rule FROM rules WHERE who = "
                           + self.open().database.backend.placeholder)
        self.execute(ledger, "CREATE TABLE rules"
                     " (who varchar(99), rule varchar(99))")
        self.assertEqual(self.passes(ledger, 1000, cost=10), True)
        self.execute(ledger, "INSERT INTO rules VALUES ('joe', '[[12, 60]]')")
        self.assertEqual(self.passes(ledger, 1000, cost=2), True)
        self.assertEqual(self.passes(ledger, 1000), False)
        self.execute(ledger, "UPDATE rules SET rule = '[]'")
        self.assertEqual(self.passes(ledger, 1000, cost=99), True)
        self.execute(ledger, "UPDATE rules SET rule = 'rubbish'")
        self.execute(ledger, "INSERT INTO rules VALUES (?, '5')", "100%s")
        with quiet() as said:
            for who in ("joe", "100%s", "joe", "100%s"):  # once a minute
                self.passes(ledger, 1000, who)
            self.assertEqual(self.passes(ledger, 1000), False)
        self.assertEqual([line.partition(": found")[0] for line in said], [
            "sql_limits_by_id: joe", "sql_limits_by_id: 100%s"])
        self.execute(ledger, "DROP TABLE rules")
        self.assertEqual(self.passes(ledger, 1000), False)

    def test_a_note_that_fails_costs_no_verdict(self) -> None:
        ledger = self.open()
        self.assertTrue(self.passes(ledger, 1000, cost=9))
        self.execute(ledger, "DROP TABLE mail_refused")
        with quiet() as said:
            refused, passed = settled(ledger, [prl.Mail(
                [prl.Claim("joe", cost, self.LIMITS)], 1000)
                for cost in (5, 1)])
            used = self.used(ledger, 1000)
        self.assertIn("not recorded", said[0])
        self.assertIsNone(passed.broken)
        self.assertIsNotNone(refused.broken)
        self.assertEqual(used, 10)

    def test_a_reset_forgets_all_mails_of_an_identity(self) -> None:
        ledger = self.open()
        for who, cost in (("joe", 2), ("joe", 5), ("ann", 1)):
            self.assertTrue(self.passes(ledger, 1000, who, cost))
        self.assertEqual([ledger.database.transact(prl.forget, "joe")
                          for _ in range(2)], [7, 0])
        self.assertEqual([self.used(ledger, 1000, who)
                          for who in ("joe", "ann")], [0, 1])

    def test_a_conflict_past_the_deadline_is_an_error(self) -> None:
        ledger = self.open()
        faults, tries = Faults(ledger), []
        self.passes(ledger, 1000)  # so that the connection is an old one
        deadline = time.monotonic() + 0.05
        faults.plan("SELECT 2", faults.conflict, before=lambda: wait_for(
            lambda: time.monotonic() > deadline, "the deadline"))

        def work(transaction: prl.Transaction) -> None:
            tries.append(transaction)
            transaction.run("SELECT 2")

        with self.assertRaises(prl.LedgerError):
            ledger.database.transact(work, deadline=deadline)
        self.assertEqual(len(tries), 1)

    def test_hosts_go_by_the_clock_of_the_server(self) -> None:
        real = time.time
        databases = [self.open().database for _ in range(2)]
        if not databases[0].backend.clock:
            self.assertAlmostEqual(databases[0].clock(), real(), delta=1)
            return  # a database that one host alone has
        times = []
        for ahead, database in zip((60, -60), databases):
            with patch.object(time, "time", lambda by=ahead: real() + by), \
                    quiet() as said:
                database.compare_clocks()
                times.append(database.clock() - real())
            self.assertIn("mails are counted by the server's", said[0])
        self.assertAlmostEqual(times[0], times[1], delta=0.2)
        self.assertAlmostEqual(times[0], 0, delta=1)

    def test_the_last_mail_is_the_newest(self) -> None:
        ledger = self.open()
        for now in (1000, 1300):
            self.assertTrue(self.passes(ledger, now))
        [standing] = ledger.database.read(
            prl.survey, prl.Settings(limits=self.LIMITS), 1310, "joe")
        self.assertEqual(standing.last_mail, 1300)

    def test_all_identities_are_surveyed_in_any_order(self) -> None:
        ledger, names = self.open(), [
            f"{n}{rest}" for n in "aAéÉ-_=.z9 ~😀дß" for rest in
            ("", "=x", "-x", "é", "E", *map(str, range(prl.SURVEY_STEP // 9)))
            if n + rest != " "]  # to MariaDB that is ""
        ledger.database.transact(prl.Transaction.write, prl.INSERT, [
            (name, 1000, 3, "", "DATA", 3) for name in names])
        statuses = ledger.database.read(
            prl.survey, prl.Settings(limits=self.LIMITS,
                                     limit_by_sender=True), 1010)
        self.assertEqual(sorted(status.identity for status in statuses),
                         sorted(names))
        self.assertEqual({status.limits[0].used for status in statuses}, {3})

    def test_a_window_is_read_through_the_index(self) -> None:
        ledger = self.open()
        mails = [("user", n, 1, "", "DATA", n) for n in range(1, 1500)]
        mails += [(f"u{n}", 1, 1, "", "DATA", 1) for n in range(1500)]
        ledger.database.transact(prl.Transaction.write, prl.INSERT, mails)
        for statement in self.analyze:
            self.execute(ledger, statement)
        plan = self.execute(ledger, self.explain + prl.usage_statement(
            2, 2, ledger.database.backend.asks_singly),
            "user", 1400, 1400, 1300, "u12", 1400, 1400, 1300)
        self.assert_indexed([" ".join(map(str, row)) for row in plan])

    def test_threads_share_a_limit_exactly(self) -> None:
        ledger = self.open()
        passed = at_once(lambda _: [self.passes(ledger, 1000)
                                    for _ in range(20)], range(16))
        self.assertEqual([len(each) for each in passed], [20] * 16)
        self.assertEqual(sum(map(sum, passed)), 10)

    def test_hosts_share_several_limits_of_a_mail_exactly(self) -> None:
        """Two domains, ten hosts, 64 connections: never one too many."""
        ledgers = [self.open() for _ in range(10)]
        most = {"d=x.org": 30, "d=y.org": 30, "server=all": 50}
        passed: list[str] = []

        def send(number: int) -> None:
            for turn in range(3):
                user = f"u{number % 5}@{'xy'[(number + turn) % 2]}.org"
                keys = user, f"d={user[-5:]}", "server=all"
                claims = [prl.Claim(key, 1, (prl.Limit(
                    most.get(key, 9), 600),)) for key in keys]
                if ledgers[number % 10].decide(prl.Mail(
                        claims, 1000)).broken is None:
                    passed.extend(keys)

        at_once(send, range(64))
        found = collections.Counter(passed)
        self.assertEqual(found["server=all"], 50)
        for key, count in found.items():
            self.assertLessEqual(count, most.get(key, 9), key)
        self.assertEqual({key: int(used) for key, used in self.execute(
            ledgers[0], "SELECT id, SUM(recipient_count) FROM mail_count"
            " GROUP BY id")}, found)

    def test_random_mails_agree_with_a_plain_list(self) -> None:
        """The model: mails with times, counted one by one."""
        steps = 300 if QUICK else 1500
        chance = random.Random(7)
        ledgers = [self.open(), self.open()]
        mails: dict[str, list[tuple[int, int]]] = {"a": [], "b": []}
        now = 10**6
        for step in range(steps):
            now += chance.choice((0, 0, 0, 1, 1, 5, 30, 200, -1, -20))
            name = chance.choice("ab")
            sent = mails[name]
            cost = chance.choice((1, 1, 1, 2, 3, 11))
            at = max([now, *(date for date, _ in sent[-1:])])
            second = now if at == now else at - 1  # a clock was ahead
            fits = all(cost + sum(
                c for date, c in sent if date > second - limit.seconds)
                <= limit.mails for limit in self.LIMITS)
            passed = self.passes(chance.choice(ledgers), now, name, cost)
            self.assertEqual(passed, fits, f"step {step}")
            if fits:
                sent.append((at, cost))
            if step % 97 == 0:
                clean(ledgers[0].database, prl.Settings(
                    limits=(prl.Limit(1, 600),)), at)

    def test_a_simulation_agrees_with_a_naive_model(self) -> None:
        ledger = self.open()
        self.execute(ledger, "CREATE TABLE rules"
                     " (who varchar(99), rule varchar(99))")
        self.execute(ledger, "INSERT INTO rules VALUES ('joe', '[[3, 30]]')")
        chance = random.Random(3)
        names = ("joe", "ann", "Ann", "é", "é@x.org", "it's %s")
        rows = sorted(((chance.choice(names), 1000 + chance.randrange(90),
                        chance.choice((1, 1, 2, None))) for _ in range(200)),
                      key=lambda row: row[:2])
        totals = collections.Counter[str]()
        for name, date, cost in rows:
            totals[name] += cost or 1
            self.execute(
                ledger, "INSERT INTO mail_count VALUES (?, ?, ?, '', '', ?)",
                name, date, cost, None if date < 1010 else totals[name])
        query = "SELECT rule FROM rules WHERE who = "
        limits = [[2, 1], [5, 20]]
        settings = prl.Settings(
            limits=prl.as_limits(limits), sql_limits_by_id=query
            + ledger.database.backend.placeholder)
        for step in (3, 50, 5000):
            with self.subTest(step=step), \
                    patch.object(prl, "SIMULATE_STEP", step):
                result = prl.simulation_as_json(ledger.database.read(
                    prl.simulate, settings, settings, 1000))
                expected = PastModel(limits, {"joe": [[3, 30]]}).judge(
                    rows)
                self.assertEqual(result["refused"], expected["refused"])
                self.assertEqual(result["windows"][:2],
                                 expected["windows"][:2])
                self.assertEqual(result["identities"], len(names))


class SQLiteTest(StoreContract, FolderTest):
    """The contract on SQLite."""

    def open(self, query: str | None = None) -> prl.Ledger:
        ledger = prl.open_ledger(prl.Settings(
            sqlite_config={"database": self.path("db")}, db_timeout=5,
            sql_limits_by_id=query))
        self.addCleanup(ledger.database.close)
        return ledger

    def test_its_own_arguments_of_connect_win(self) -> None:
        daemon = self.daemon("limits: [[1, 60]]", "-o",
                             "sqlite_config.check_same_thread=True", "-o",
                             "sqlite_config.isolation_level=DEFERRED")
        self.assertEqual([daemon.ask(), daemon.ask()], [PASS, REFUSED])
        self.assertIn("[##########]  1/1", run("--status", *daemon.options
                                              ).stdout)

    explain = "EXPLAIN QUERY PLAN "

    def assert_indexed(self, plan: list[str]) -> None:
        """Check that all look-ups are by id (and date)."""
        using = [line for line in plan if "mail_count" in line]
        self.assertEqual(len(using), 4, plan)
        for line in using:
            self.assertRegex(line, r"SEARCH .*mail_count_total \(id=\?")

    def test_what_is_committed_outlives_a_power_cut(self) -> None:
        ledger = self.open()
        for pragma, value in (("synchronous", 2), ("journal_mode", "wal"),
                              ("journal_size_limit", 2**24)):
            self.assertEqual(self.execute(ledger, f"PRAGMA {pragma}"),
                             [(value,)])

    def test_the_timeout_of_sqlite_config_wins(self) -> None:
        for more, timeout in (({}, 7), ({"timeout": 0.5}, 0.5)):
            backend = prl.SQLite(prl.Settings(db_timeout=7, sqlite_config={
                "database": self.path("db"), **more}))
            self.assertEqual(backend.config["timeout"], timeout)


class SQLiteFilesTest(NetTest):
    """What becomes of SQLite's files if they are replaced while in use."""

    def setUp(self) -> None:
        """Start a daemon, copy its database, and count some more mails."""
        super().setUp()
        self.restart("daemon")

    def restart(self, name: str) -> None:
        """Start a daemon with new files."""
        self.host = self.daemon("limits: [[1000, 3600]]\ndebug: False\n",
                                name=name)
        self.database = self.host.database
        self.copy = self.database + ".copy"
        for _ in range(2):  # the copy's pages are in another order
            flood([self.host], numbered(200, sasl_username="old") + [
                {"sasl_username": f"user{n}"} for n in range(300)])
        with contextlib.closing(sqlite3.connect(self.database)) as there:
            there.execute("VACUUM INTO ?", [self.copy])
            there.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with contextlib.closing(sqlite3.connect(self.copy)) as copy:
            copy.execute("PRAGMA journal_mode = WAL")
            copy.execute("DELETE FROM mail_count WHERE id LIKE 'user%'")
            copy.commit()
            copy.execute("VACUUM")
        flood([self.host], numbered(30, sasl_username="old"))

    def replace(self) -> None:
        """Put the copy in the place of the database."""
        os.replace(self.copy, self.database)

    def replace_all(self) -> None:
        """Put the copy there with a -wal and a -shm of its own."""
        one = sqlite3.connect(self.copy)
        self.addCleanup(one.close)
        one.execute("DELETE FROM mail_count WHERE id = 'user1'")
        one.commit()
        for suffix in prl.SQLITE_FILES:
            os.replace(self.copy + suffix, self.database + suffix)

    def remove(self, *suffixes: str) -> None:
        """Remove some of the files."""
        for suffix in suffixes:
            os.unlink(self.database + suffix)

    def passes_ann(self, times: int) -> None:
        """Check that so many mails of ann pass."""
        for _ in range(times):
            self.assertEqual(self.host.ask(sasl_username="ann"), PASS)

    def block(self, *others: int) -> None:
        """Block joe; the status may be one of some others than success."""
        done = run("--block", "joe", *self.host.options)
        self.assertIn(done.returncode, (0, *others), done.stderr)

    def test_commands_leave_a_log_alone_that_is_another_s(self) -> None:
        self.replace()
        before = prl.identify_files(self.database)
        for option, exit_code in (
                ("--status", 6), ("--check", 6), ("--clean", 8)):
            done = run(option, *self.host.options)
            self.assertEqual(done.returncode, exit_code, done)
            self.assertIn("the file was replaced", done.stderr)
        self.assertEqual(prl.identify_files(self.database), before)

    def check(self, old: int | None) -> None:
        """Check what is told, that joe is blocked and all else is on disk."""
        self.assertEqual(self.host.ask(sasl_username="joe"), BLOCKED)
        self.host.wait_log("was replaced or removed while in use")
        self.host.stop(signal.SIGKILL)
        with contextlib.closing(sqlite3.connect(self.database)) as there:
            self.assertEqual(
                there.execute("PRAGMA integrity_check").fetchall(), [("ok",)])
        rows = counted(self.database)
        self.assertEqual((rows.get("old"), rows["ann"]), (old, 20))

    def harm(self) -> Iterator[tuple[str, Callable[[], None], int | None]]:
        """Yield what is done to the files, and what is left of 430 mails."""
        for what, harm, left in (
                ("replace", self.replace, 400),
                ("replace all", self.replace_all, 400),
                ("remove all", lambda: self.remove(*prl.SQLITE_FILES), None),
                ("log, index", lambda: self.remove("-wal", "-shm"), 430),
                ("log", lambda: self.remove("-wal"), 430),
                ("index", lambda: self.remove("-shm"), 430)):
            yield what, harm, left
            self.restart(uuid.uuid4().hex)

    def test_a_mail_is_the_first_to_meet_replaced_files(self) -> None:
        for what, harm, left in self.harm():
            with self.subTest(what):
                harm()
                self.passes_ann(10)
                self.block()
                self.passes_ann(10)
                self.check(left)

    def test_a_command_is_the_first_to_meet_replaced_files(self) -> None:
        for what, harm, left in self.harm():
            with self.subTest(what):
                harm()
                self.block(6)  # or it says that it failed
                self.passes_ann(20)
                self.block()
                self.check(400 if what.startswith("log") else left)


class DatabaseTest(FolderTest):
    """A test with a server, which its class starts, and an empty database."""

    kind: Any  # of the server
    driver: str
    before: tuple[str, ...] = ()  # the drivers that are preferred to it
    servers: Any  # what was started
    server: Server  # with which the tests speak

    @classmethod
    def setUpClass(cls) -> None:
        """Start the server."""
        if cls.kind.missing():
            skip(f"{cls.kind.missing()} is not installed")
        if importlib.util.find_spec(cls.driver) is None:
            skip(f"the driver {cls.driver} is not installed")
        folder = tempfile.mkdtemp(prefix="policyd-", dir=memory_folder())
        cls.addClassCleanup(shutil.rmtree, folder, ignore_errors=True)
        os.chmod(folder, 0o755)
        cls.servers = cls.kind(folder)
        cls.addClassCleanup(cls.servers.kill)
        cls.servers.create()
        cls.server = getattr(cls.servers, "nodes", [cls.servers])[0]

    def setUp(self) -> None:
        """Empty the database, and let the driver be chosen."""
        super().setUp()
        self.server.sql(self.server.empty)
        for each in prl.log.filters:
            if isinstance(each, prl.Seldom):
                each.said.clear()  # what other tests made it say
        hide = patch.dict(sys.modules, dict.fromkeys(self.before))
        hide.start()
        self.addCleanup(hide.stop)
        self.program = program_without(self.before, self.folder)

    def settings(self, **settings: Any) -> dict[str, Any]:
        """Return settings: this server, and a limit of 100."""
        return {"backend": self.server.backend, "debug": False,
                "socket_permission": 0o600,
                "limits": [[100, 3600]], "db_error_action": DB_AWAY,
                **self.connecting(), **settings}

    def connecting(self, **changes: object) -> dict[str, Any]:
        """Return the setting that says how to connect, with changes."""
        return {self.server.config_name: {**self.server.config, **changes}}

    def config(self, **settings: Any) -> str:
        """Return the text of a configuration."""
        return "".join(f"{name}: {json.dumps(value)}\n" for name, value
                       in self.settings(**settings).items())

    def command(self, option: str, **settings: Any
                ) -> subprocess.CompletedProcess[str]:
        """Run the program as a command."""
        path = self.write("test.yaml", self.config(**settings))
        os.chmod(path, 0o600)  # it has a password
        return run(
            option, "--standalone", self.folder, "-o",
            f"backend={self.server.backend}", "-f", path,
            program=self.program)

    def host(self, name: str = "host", **settings: Any) -> Daemon:
        """Start the daemon of a mail host."""
        return self.daemon(self.config(**settings), "-o",
                           f"backend={self.server.backend}",
                           name=name, program=self.program)

    def hosts(self, *settings: dict[str, Any]) -> list[Daemon]:
        """Start the daemons of some mail hosts, all at once."""
        def start(number: int) -> Daemon:
            return self.host(f"host{number}", **settings[number])

        hosts = at_once(start, range(len(settings)))
        for host in hosts:
            self.assertNotIn("unavailable", host.log())
        return hosts

    def execute_all(self, *statements: str) -> list[tuple[Any, ...]]:
        """Run statements as the user test; return the rows of the last."""
        backend = prl.BACKENDS[self.server.backend](prl.Settings(
            **self.connecting()))
        with contextlib.closing(backend.connect(PATIENCE)) as connection:
            cursor = connection.cursor()
            for statement in statements:
                cursor.execute(statement)
            rows = cursor.fetchall() if cursor.description else []
            connection.commit()
        return [tuple(row) for row in rows]

    def counted(self, identity: str = "joe") -> int:
        """Return what the database holds for an identity."""
        [[number]] = self.execute_all(
            "SELECT coalesce(sum(recipient_count), 0) FROM mail_count"
            f" WHERE id = '{identity}'")
        return int(number)

    def assert_exact(self, answers: Answers, passed: int) -> None:
        """Check that so many mails of joe passed, and the others not."""
        actions = collections.Counter(action for _, action in answers)
        expected = {PASS: passed, REFUSED: len(answers) - passed}
        self.assertEqual(actions, +collections.Counter(expected))


class DriverTest(StoreContract, DatabaseTest):
    """What every driver keeps to; the contract of the store first."""

    hostile: tuple[dict[str, Any], ...]  # what could upset a session

    def open(self, query: str | None = None) -> prl.Ledger:
        ledger = prl.open_ledger(prl.Settings(
            **self.settings(sql_limits_by_id=query)))
        self.assertEqual(ledger.database.backend.driver.__name__, self.driver)
        self.addCleanup(ledger.database.close)
        return ledger

    def test_hosts_share_one_limit_exactly(self) -> None:
        answers = flood(self.hosts({}, {}, {}, {}), numbered(1000))
        self.assertEqual(len(answers), 1000)
        self.assert_exact(answers, 100)
        self.assertEqual(self.counted(), 100)

    def test_no_variable_of_a_session_changes_what_is_counted(self) -> None:
        for number, hostile in enumerate(self.hostile):
            with self.subTest(**hostile):
                self.server.sql(self.server.empty)
                host = self.host(
                    str(number), **self.connecting(**hostile), quotas=[
                        {"by": "server", "limits": [[60, 3600]]}])
                mails = numbered(120, sasl_username="jos\u00e9")
                self.assert_exact(flood([host], mails), 60)
                self.assertEqual(self.counted("jos\u00e9"), 60)

    @slow
    def test_daemons_that_start_at_once_make_the_tables_together(self) -> None:
        query = "SELECT limits FROM rate_limits WHERE id = 1 AND %s = 'joe'"
        for _ in range(25):
            self.server.sql(self.server.empty)
            databases = [self.open(query).database
                         for query in (None, query) * 3]
            at_once(lambda one: one.transact(lambda _: None), databases)
            for one in databases:
                one.close()

    @slow
    def test_a_request_on_a_dead_connection_is_counted(self) -> None:
        host = self.host()

        def ask(total: int) -> None:
            wait_for(lambda: self.server.sql(self.server.connected) == "0",
                     "the connection to end")
            self.assertEqual(host.ask(), PASS)
            self.assertEqual(self.counted(), total)

        self.server.kill()
        self.server.start()
        ask(1)
        self.addCleanup(self.server.sql, self.server.relax)
        self.server.sql(self.server.hurry)
        self.server.sql(self.server.disconnect)
        ask(2)  # on a connection that ends when idle
        if not self.server.can_hurry:
            self.server.sql(self.server.disconnect)
        ask(3)
        self.assertNotIn("unavailable", host.log())

    @slow
    def test_a_host_that_dies_in_a_transaction_delays_few_mails(self) -> None:
        other = self.host(db_timeout=2, limits=[[10**6, 3600]])
        self.assertEqual(other.ask(), PASS)
        backend = prl.open_ledger(settings_of(
            self.settings(db_timeout=2))).database.backend
        dead = backend.connect(backend.timeout)
        self.addCleanup(dead.close)
        transaction = prl.Transaction(backend, dead, math.inf)
        backend.set_up(transaction, backend.timeout)
        if backend.begin:
            transaction.later(backend.begin)
        prl.take_turns(transaction, ["joe"])
        transaction.flush()  # and nothing more comes of it
        wait_for(lambda: other.ask() == PASS, "the others to go on")

    @slow
    def test_a_server_that_hangs_holds_nobody_up_for_long(self) -> None:
        patience = {"db_timeout": 2, "limits": [[1000, 3600]]}
        staying, leaving = self.hosts(patience, patience)
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(host.client())
                       for host in (staying, leaving) for _ in range(64)]
            self.assertEqual({one.ask() for one in clients}, {PASS})
            self.addCleanup(self.server.signal, signal.SIGCONT)
            self.server.signal(signal.SIGSTOP)
            for asked in (clients, clients[:64]):
                began = time.monotonic()
                for one in asked:
                    one.socket.sendall(request_text())
                leaving.send(signal.SIGTERM)
                self.assertEqual({one.read() for one in asked}, {DB_AWAY})
                self.assertLess(time.monotonic() - began, 40)
                self.assertEqual(leaving.process.wait(PATIENCE), 0)
            began = time.monotonic()  # few wait, however many there are
            self.assertEqual([clients[0].ask() for _ in range(200)],
                             [DB_AWAY] * 200)
            self.assertLess(time.monotonic() - began, 60)
        self.server.signal(signal.SIGCONT)
        wait_for(lambda: staying.ask(sasl_username="ann") == PASS,
                 "the database to be back")
        counted = self.counted("ann")
        self.assertEqual(staying.ask(sasl_username="ann"), PASS)
        self.assertEqual(self.counted("ann"), counted + 1)

    @slow
    def test_limits_hold_while_the_server_is_away(self) -> None:
        self.addCleanup(self.server.signal, signal.SIGCONT)
        self.program = hurried(self.folder, 1, self.before)
        for away, back in (
                (lambda: self.server.signal(signal.SIGSTOP),
                 lambda: self.server.signal(signal.SIGCONT)),
                (self.server.kill, self.server.start)):
            self.server.sql(self.server.empty)
            hosts = self.hosts({"db_timeout": 2}, {"db_timeout": 2})
            self.check_limits(hosts, {40: away, 440: back})
            for host in hosts:
                host.stop()

    def check_limits(self, hosts: list[Daemon],
                     events: dict[int, Callable[[], object]]) -> None:
        """Send mails, with events at some; look at the answers and the rows.

        The first sender tries three times as many as he may.
        """
        gate = threading.Barrier(len(hosts) + 1)

        def send(place: int) -> Answers:
            return flood([hosts[place]], mails(place), 8)

        def rows() -> list[str]:
            with contextlib.suppress(Exception):  # it is hardly awake
                return sorted(name for [name] in self.execute_all(
                    "SELECT instance FROM mail_count"))
            return []

        def mails(place: int) -> Iterator[dict[str, Any]]:
            for n in range(600):
                if n in events:
                    gate.wait(PATIENCE)
                yield {"instance": f"{place}.{n}", "sasl_username":
                       f"honest{n % 14}" if n % 2 else "greedy"}

        passed = []
        with concurrent.futures.ThreadPoolExecutor(len(hosts)) as pool:
            sent = pool.map(send, range(len(hosts)))
            for event in events.values():  # a server ends with its thread
                gate.wait(PATIENCE)
                event()
        for answers in sent:
            self.assertEqual(len(answers), 600)
            self.assertIn(DB_AWAY, {action for _, action in answers})
            good = [mail for mail, action in answers if action != REFUSED]
            greedy = [mail for mail in good
                      if mail["sasl_username"] == "greedy"]
            self.assertLessEqual(len(greedy), 100)
            self.assertEqual(len(good) - len(greedy), 300)
            passed += [mail["instance"] for mail in good]
        wait_for(lambda: len(rows()) >= len(passed), "all rows")
        self.assertEqual(rows(), sorted(passed))
        for identity in ("greedy", "honest1"):  # totals rise with the dates
            found = self.execute_all(
                "SELECT recipient_count, total FROM mail_count"
                f" WHERE id = '{identity}' ORDER BY date, total")
            self.assertEqual([total for _, total in found], list(
                itertools.accumulate(count for count, _ in found)))

    @slow
    def test_check_names_the_server_and_the_driver(self) -> None:
        for more in ({}, self.server.on_socket):
            done = self.command("--check", count_mode=1,
                                **self.connecting(**more))
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertRegex(
                done.stdout, rf"\d+\.\d+.*, through {self.driver}\nOK\n")
        self.assertEqual(self.execute_all(
            "SELECT table_name FROM information_schema.tables"
            " WHERE table_schema IN ('test', 'public')"), [])


class HostsTest(DriverTest):
    """What several mail hosts on one database keep to."""

    original: tuple[str, ...]  # how it made its tables
    weak: tuple[str, str, str]  # what lets commits be lost, undoes it; is told

    @slow
    def test_hosts_share_many_limits_exactly(self) -> None:
        chance = random.Random(3)
        mails = [{**mail, "sasl_username": chance.choice("abcdefghij"),
                  "recipient_count": chance.randint(1, 5)}
                 for mail in numbered(1000)]
        answers = flood(self.hosts({}, {}, {}, {}), mails)
        self.assertEqual({action for _, action in answers}, {PASS, REFUSED})
        self.assertEqual(len(answers), 1000)
        for identity in "abcdefghij":
            costs = {told: [mail["recipient_count"] for mail, action
                            in answers if action == told
                            and mail["sasl_username"] == identity]
                     for told in (PASS, REFUSED)}
            used = sum(costs[PASS])
            self.assertEqual(self.counted(identity), used)
            self.assertLessEqual(used, 100)
            self.assertGreater(used + min(costs[REFUSED]), 100)

    @slow
    def test_nothing_is_lost_when_the_server_is_killed(self) -> None:
        sent: list[int] = []
        answers: Answers = []
        enough = threading.Event()

        def mails() -> Iterator[dict[str, Any]]:
            while not enough.is_set():
                sent.append(len(sent))
                yield {"instance": f"1.{len(sent)}"}
                time.sleep(0.002)  # else memory takes more than merges bring

        def wait_for_more() -> None:
            more = len(sent) + 300
            wait_for(lambda: len(sent) > more, "requests")

        both = {"limits": [[10**8, 3600]]}
        hosts = self.hosts(both, both)
        clients = in_background(
            lambda: answers.extend(flood(hosts, mails())))
        for _ in range(3):
            wait_for_more()
            self.server.kill()
            self.server.start()
        wait_for(  # for a connection that took long passes for hung
            lambda: {host.ask(sasl_username="ann") for host in hosts}
            == {PASS}, "the database to be back")
        wait_for_more()
        enough.set()
        clients.join()
        self.assertEqual(len(answers), len(sent))
        self.assertLessEqual({action for _, action in answers},
                             {PASS, DB_AWAY})
        self.assertEqual({action for _, action in answers[-150:]}, {PASS})
        passed = sum(action == PASS for _, action in answers)
        self.assertGreaterEqual(self.counted(), passed)

    @slow
    def test_clocks_that_differ_let_no_mail_too_many_through(self) -> None:
        def send(one: tuple[prl.Ledger, int]) -> list[bool]:
            ledger, now = one
            return [self.passes(ledger, now + n) for n in range(20)]

        ledgers = [(self.open(), 1000), (self.open(), 970)]
        passed = at_once(send, ledgers * 8)
        self.assertEqual([len(each) for each in passed], [20] * 16)
        self.assertEqual(sum(map(sum, passed)), 10)

    @slow
    def test_large_counts_of_the_original_have_totals_at_once(self) -> None:
        self.execute_all(*self.original)
        for begin in range(0, 24000, 1000):
            self.execute_all("INSERT INTO mail_count VALUES " + ", ".join(
                f"('{'joe' if n % 2 else f'u{n}'}', {n}, 1, '1.{n}', 'DATA')"
                for n in range(begin, begin + 1000)))
        self.open().database.transact(lambda _: None)
        self.assertEqual(self.execute_all(
            "SELECT id, count(*), max(total) FROM mail_count"
            " WHERE total IS NOT NULL GROUP BY id"), [("joe", 12000, 12000)])

    @slow
    def test_the_originals_tables_are_taken_over_by_all_at_once(self) -> None:
        now = int(time.time())
        names = [("Joe", 50), ("JOE", 30), ("joe", 15), ("José", 7),
                 ("jose", 3), ("x" * 40, 9)]
        rows = ", ".join(
            f"('{name}', {now - number % 60}, 1, '1.{number}', 'DATA')"
            for name, count in names for number in range(count))
        self.execute_all(
            *self.original, f"INSERT INTO mail_count VALUES {rows}",
            "INSERT INTO limit_report VALUES ('Joe', 60, 3), ('ann', 60, 4)")
        hosts = self.hosts({}, {}, {}, {})
        for name, count in (("joe", 95), ("josé", 7), ("jose", 3),
                            ("x" * 40, 9)):
            self.assertEqual(self.counted(name), count)
        self.assert_exact(flood(hosts, numbered(200)), 5)
        for name, used in (("JOSÉ", 7), ("jose", 3), ("x" * 40, 9),
                           ("x" * 41, 0), ("\U0001f600" * 99, 0)):
            answers = flood(hosts, numbered(100, sasl_username=name))
            self.assert_exact(answers, 100 - used)
        self.assertEqual(self.execute_all(
            "SELECT id, hit FROM limit_report ORDER BY hit"),
            [("Joe", 3), ("ann", 4)])

    def test_check_compares_the_clocks(self) -> None:
        real = time.time
        for ahead, told in ((0, ""), (60, "60 seconds behind this host's"),
                            (-60, "seconds ahead of this host's")):
            with self.subTest(ahead=ahead), patch.object(
                    time, "time", lambda by=ahead: real() + by):
                status, _, err = command(
                    "--check", "--standalone", self.folder, "-o",
                    f"backend={self.server.backend}", "-f",
                    self.write("test.yaml", self.config()))
                self.assertEqual(status, 0, err)
                self.assertIn(told, err)
                self.assertEqual(err.count("the clock of the database"),
                                 bool(told))

    def test_check_tells_when_a_commit_is_not_on_disk(self) -> None:
        name = self.server.config_name
        if self.server.backend == 1:
            setting = "innodb_flush_log_at_trx_commit"
            values = ("2", "0", "3", "1")
            statement = f"SET GLOBAL {setting} = {{}}"
            durable: tuple[str, ...] = ("1", "3")
        else:
            setting = "synchronous_commit"
            values = ("off", "remote_write", "local", "on")
            statement = f"ALTER ROLE test SET {setting} = {{}}"
            durable = ("on", "local", "remote_write")
        for value in values:
            with self.subTest(name, value=value):
                self.server.sql(statement.format(value))
                done = self.command("--check")
                self.assertEqual(done.returncode, 0)
                self.assertEqual(
                    f"warning: {setting} is {value} on the database server"
                    in done.stderr, value not in durable)

    def test_check_finds_tables_that_cannot_be_written(self) -> None:
        self.assertEqual(self.host().ask(), PASS)
        self.server.sql(self.server.grant)
        _, _, tables = self.server.grant.rpartition(" ON ")
        self.server.sql("REVOKE INSERT, UPDATE, DELETE ON "
                        + tables.replace(" TO ", " FROM "))
        done = self.command("--check", **self.connecting(user="weak"))
        self.assertEqual((done.returncode, done.stdout), (6, ""))
        self.assertIn("denied", done.stderr)

    @slow
    def test_check_tells_what_would_count_nothing(self) -> None:
        self.execute_all(*self.original)
        self.server.sql(self.server.grant)
        before = self.execute_all("SELECT * FROM mail_count")
        for changes, message in (
                ({}, ""),
                ({"sql_limits_by_id": "SELECT nosuch(%s)"}, "nosuch"),
                ({"sql_limits_by_id": "SELECT '[[1]]' WHERE %s <> 'x'"},
                 "found '[[1]]'"),
                ({"sql_limits_by_id": "SELECT l FROM rate_limits"}, ""),
                (self.connecting(nosuch=1), "nosuch"),
                (self.connecting(user="weak"), "denied")):
            with self.subTest(changes=changes):
                done = self.command("--check", **changes)
                self.assertEqual(done.returncode, 6 if message else 0)
                self.assertIn(message, done.stderr.replace("owner", "denied"))
                self.assertEqual(len(done.stderr.splitlines()), bool(message))
        self.assertEqual(self.execute_all("SELECT * FROM mail_count"), before)

    @slow
    def test_check_tells_that_tables_cannot_be_made(self) -> None:
        def check(user: str, denied: str = "") -> None:
            done = self.command("--check", **self.connecting(user=user))
            self.assertEqual(done.returncode, 6 if denied else 0, done.stdout)
            self.assertIn(denied, done.stderr)

        def tables() -> list[Any]:
            return self.execute_all(
                "SELECT table_name FROM information_schema.tables"
                " WHERE table_schema IN ('test', 'public')")

        self.server.sql(self.server.grant)
        check("weak", "denied")
        check("test")
        self.assertEqual(tables(), [])
        self.host().stop()
        self.server.sql(self.server.grant)
        check("weak")
        self.execute_all("DROP TABLE mail_limit")
        there = tables()
        check("weak", "denied")
        check("test")
        self.assertEqual(tables(), there)

    def test_a_user_with_no_right_to_alter_needs_none(self) -> None:
        self.hosts({"sql_limits_by_id": "SELECT %s"})[0].stop()
        self.server.sql(self.server.grant)
        for query in ("", "SELECT limits FROM rate_limits WHERE %s = 'x'"):
            [host] = self.hosts({**self.connecting(user="weak"),
                                 "sql_limits_by_id": query})
            self.assertEqual(host.ask(), PASS)
            host.stop()
        self.assertEqual(self.counted(), 2)

    @slow
    def test_a_query_of_another_table_needs_no_rate_limits(self) -> None:
        self.host().stop()
        self.execute_all("CREATE TABLE mine (who varchar(9))")
        self.server.sql(self.server.grant)
        host = self.host(
            sql_limits_by_id="SELECT '[[3, 60]]' FROM mine WHERE who = %s",
            **self.connecting(user="weak"))
        self.assertEqual(host.ask(), PASS)
        self.assertEqual(self.counted(), 1)

    @slow
    def test_the_table_rate_limits_is_made_for_the_query(self) -> None:
        hosts = self.hosts(*[{"sql_limits_by_id":
            "SELECT limits FROM rate_limits WHERE id = 7 AND %s = 'joe'"}] * 4)
        self.execute_all("INSERT INTO rate_limits (id, limits)"
                         " VALUES (7, '[[30, 60]]')")
        self.assert_exact(flood(hosts, numbered(99)), 30)
        self.assert_exact(
            flood(hosts, numbered(99, sasl_username="ann")), 99)

    @slow
    def test_clean_deletes_what_is_old_while_hosts_count(self) -> None:
        hosts = self.hosts({"limits": [[100, 60]]})
        ledger, now = self.open(), int(time.time())
        for age, count in ((0, 1), (60, 2), (700, 3), (10**6, 4)):
            self.execute(ledger, "INSERT INTO mail_count (id, date, total)"
                         " VALUES " + ", ".join(
                             [f"('ann', {now - age}, 1)"] * count * 1000))
        self.execute(ledger, "UPDATE mail_window SET since = 0")
        done = self.command("--clean", limits=[[100, 60]])
        self.assertEqual((done.returncode, done.stdout, done.stderr),
                         (0, "7000 records deleted\n", ""))
        self.assertEqual(self.execute(
            ledger, "SELECT count(*) FROM mail_count"), [(3000,)])
        self.assert_exact(flood(hosts, numbered(200)), 100)

    @slow
    def test_turns_of_names_without_mails_are_cleaned(self) -> None:
        ledger = self.open()
        self.passes(ledger, int(time.time()))
        ledger.database.transact(prl.take_turns, [
            f"{first}{n}" for first in "az" for n in range(3000)])
        done = self.command("--clean")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual(
            self.execute(ledger, "SELECT id FROM mail_turn"), [("joe",)])

    @slow
    @slow
    def test_hosts_far_from_the_server_share_a_limit(self) -> None:
        relay = Relay(self.server.port, 0.001)
        self.addCleanup(relay.close)
        far = self.connecting(port=relay.port)
        self.assert_exact(flood(self.hosts(far, {}), numbered(500)), 100)


class MySQLdbTest(HostsTest):
    """MariaDB through MySQLdb."""

    kind = MariaDB
    driver = "MySQLdb"
    original = (
        "CREATE TABLE mail_count (id varchar(40) NOT NULL,"
        " date bigint NOT NULL, recipient_count int DEFAULT 1,"
        " instance varchar(40) NOT NULL, protocol_state varchar(10) NOT NULL)"
        " CHARACTER SET utf8 COLLATE utf8_general_ci",
        "CREATE INDEX mail_count_index ON mail_count (id, date)",
        "CREATE TABLE limit_report (id varchar(40) NOT NULL,"
        " delta int NOT NULL, hit int NOT NULL DEFAULT 0)"
        " CHARACTER SET utf8 COLLATE utf8_general_ci",
        "CREATE UNIQUE INDEX limit_report_index ON limit_report (id, delta)")

    analyze = ("ANALYZE TABLE mail_count",)
    weak = ("SET GLOBAL innodb_flush_log_at_trx_commit = 2",
            "SET GLOBAL innodb_flush_log_at_trx_commit = 1",
            "innodb_flush_log_at_trx_commit = 2, not")
    hostile = tuple({"init_command": f"SET {variable}"} for variable in (
        "sql_select_limit = 1", "autocommit = 1, completion_type = 'CHAIN'",
        "sql_safe_updates = 1, max_join_size = 1, sql_big_selects = 0",
        "sql_mode = 'ANSI,NO_BACKSLASH_ESCAPES'", "NAMES latin1",
        "SESSION TRANSACTION READ ONLY", "default_storage_engine = MyISAM",
        "SESSION TRANSACTION ISOLATION LEVEL READ UNCOMMITTED",
        "SESSION TRANSACTION ISOLATION LEVEL SERIALIZABLE"))
    modes: tuple[str, ...] = (
        "ORACLE", "EMPTY_STRING_IS_NULL", "ANSI,NO_ZERO_DATE")

    def assert_indexed(self, plan: list[str]) -> None:
        """Check that all look-ups are by id (and date)."""
        using = [line for line in plan if " mail_count " in line]
        for line in using:
            self.assertRegex(  # MySQL tells a partition, too
                line, " mail_count (None )?(ref|range) .*_total")
        # Each window by its begin; to look up "ref" is to read all rows.
        self.assertEqual(sum(" range " in line for line in using), 4, plan)

    @slow
    def test_the_first_start_needs_no_rights_but_those_in_readme(self) -> None:
        self.execute_all(*self.original)
        self.server.sql(
            "CREATE USER first IDENTIFIED BY 'secret'; GRANT SELECT, INSERT,"
            " UPDATE, DELETE, CREATE, ALTER, INDEX ON test.* TO first")
        host = self.host(**self.connecting(user="first"))
        self.assertEqual(host.ask(), PASS)
        self.assertEqual(self.counted(), 1)

    @slow
    def test_rate_limits_counts_its_ids_up_as_the_originals_does(self) -> None:
        ledger = self.open("SELECT limits FROM rate_limits WHERE id = %s")
        self.assertEqual(self.passes(ledger, 1000), True)
        self.assertEqual(self.execute_all(
            *["INSERT INTO rate_limits (limits) VALUES ('[]')"] * 2,
            "SELECT id, limits FROM rate_limits"), [(1, "[]"), (2, "[]")])


    def setting(self, name: str, value: str) -> None:
        """Give the server a setting for this test."""
        try:
            self.server.sql(f"SET GLOBAL {name} = {value}")
        except subprocess.CalledProcessError:
            skip(f"this server has no {name}")
        self.addCleanup(self.server.sql, f"SET GLOBAL {name} = DEFAULT")

    def test_the_server_s_sql_mode_changes_nothing(self) -> None:
        for mode in self.modes:
            with self.subTest(mode):
                self.server.sql(self.server.empty)
                self.setting("sql_mode", f"'{mode}'")
                mails = numbered(120, instance="")
                self.assert_exact(flood([self.host(mode)], mails), 100)

    @slow
    def test_clean_works_where_snapshots_are_isolated(self) -> None:
        if self.kind is MariaDB:
            self.setting("innodb_snapshot_isolation", "ON")
        hosts = self.hosts({"limits": [[10**6, 60]]})
        ledger, enough = self.open(), threading.Event()

        def mails() -> Iterator[dict[str, Any]]:
            while not enough.is_set():
                yield {"sasl_username": random.choice("abcdefgh")}

        load = in_background(flood, hosts, mails())
        for _ in range(10):
            for name in "abcdefgh":
                self.execute(ledger, "INSERT INTO mail_count (id, date, total)"
                             f" VALUES ('{name}', 1000, 1)")
            done = self.command("--clean")
            self.assertEqual((done.returncode, done.stderr), (0, ""))
        enough.set()
        load.join()


class PyMySQLTest(DriverTest):
    """MariaDB through pymysql."""

    kind = MariaDB
    analyze = MySQLdbTest.analyze
    hostile = MySQLdbTest.hostile
    assert_indexed = MySQLdbTest.assert_indexed
    driver = "pymysql"
    before = ("MySQLdb",)

    def test_a_charset_that_cannot_hold_all_names_does_no_harm(self) -> None:
        host = self.host(**self.connecting(charset="latin1"))
        self.assertEqual(host.ask(sasl_username="дима😀"), PASS)
        self.assertEqual(self.counted("дима😀"), 1)


class MySQLByMySQLdbTest(MySQLdbTest):
    """MySQL itself through MySQLdb."""

    kind = MySQL
    explain = "EXPLAIN FORMAT = TRADITIONAL "
    modes = ("ANSI,NO_BACKSLASH_ESCAPES", "PAD_CHAR_TO_FULL_LENGTH")

    def test_nothing_that_mysql_has_deprecated_is_used(self) -> None:
        host = self.host(quotas=[{"by": "server", "count": "helo_name",
                                  "limits": [[3, 3600]]}])
        flood([host], numbered(120))  # refusals are noted, too
        self.assertEqual(self.server.sql(
            "SELECT error_name FROM performance_schema"
            ".events_errors_summary_by_user_by_error WHERE user = 'test'"
            " AND error_name LIKE '%DEPRECATED%' AND sum_error_raised > 0"),
            "")


class MySQLByPyMySQLTest(PyMySQLTest):
    """MySQL itself through pymysql."""

    kind = MySQL
    explain = MySQLByMySQLdbTest.explain


if NO_SKIP and MySQL.missing():  # where it is, CI runs them by name
    del MySQLByMySQLdbTest, MySQLByPyMySQLTest


class Psycopg2Test(HostsTest):
    """PostgreSQL through psycopg2."""

    kind = PostgreSQL
    driver = "psycopg2"
    original = tuple(statement.partition(" CHARACTER SET")[0]
                     for statement in MySQLdbTest.original)

    analyze = ("ANALYZE mail_count",)
    weak = ("ALTER ROLE test SET synchronous_commit = off",
            "ALTER ROLE test RESET synchronous_commit",
            "synchronous_commit = off, not")
    hostile = tuple({"options": f"-c {option}"} for option in (
        "default_transaction_isolation=serializable",
        "default_transaction_isolation=repeatable\\ read",
        "default_transaction_read_only=on", "statement_timeout=1",
        "standard_conforming_strings=off", "client_encoding=LATIN1"))

    def assert_indexed(self, plan: list[str]) -> None:
        """Check that all look-ups are by id (and date)."""
        text = "\n".join(plan)
        self.assertEqual(text.count("using mail_count_total"), 4, text)
        self.assertEqual(len(re.findall(r"Index Cond: \(+id =", text)), 4)
        self.assertNotIn("Seq Scan on mail_count", text)

    def test_what_a_long_outage_left_is_written_in_the_end(self) -> None:
        ledger = self.open()
        ledger.database.backend.timeout = 1
        claim = prl.Claim("server=all", 1, (prl.Limit(10**6, 86400),))
        ledger.decide(prl.Mail([claim], 999))  # there are tables
        for n in range(100_000):
            ledger.memory.decide(prl.Mail(
                [claim], 1000 + n // 99, str(n), "DATA"))
        last = prl.Mail([claim], 9000)
        ledger.decide(last)
        self.assertIsNone(last.error)
        self.assertEqual(ledger.memory.unstored_identities(), [])
        self.assertEqual(self.counted(claim.identity), 100_002)

    @slow
    def test_a_clock_set_back_locks_out_no_identity_with_many_rows(self
                                                                   ) -> None:
        ledger = self.open()
        self.passes(ledger, 1000)
        self.execute_all(
            "INSERT INTO mail_count SELECT 'joe', 9000 + n, 1, '', '', n"
            " FROM generate_series(2, 100000) AS rows (n)")
        ledger.database.backend.timeout = 1
        charge = prl.Mail(
            [prl.Claim("joe", 1, (prl.Limit(10**6, 86400),))], 2000)
        ledger.decide(charge)
        self.assertIsNone(charge.error)
        self.assertEqual(self.used(ledger, 2000), 10**5)

    def test_the_mail_that_finds_old_tables_has_a_transaction(self) -> None:
        self.execute_all(
            *self.original,
            "INSERT INTO mail_count VALUES ('JOE', 1000, 1, 'a', 'DATA')")
        ledger = self.open()
        self.passes(ledger, 1000)
        self.assertEqual(self.used(ledger, 1000), 2)
        self.assertEqual(  # such as: there is no transaction in progress
            [notice for notice in ledger.database._connection.notices
             if "WARNING" in notice],
            [])


    def test_a_pooler_whose_server_is_away_holds_nobody_up(self) -> None:
        pooler = Pooler(self.server.port, 0)
        self.addCleanup(pooler.close)
        host = self.host(db_timeout=1, **self.connecting(port=pooler.port))
        self.assertEqual(host.ask(), DB_AWAY)
        self.assertEqual(self.command("--check", db_timeout=1, **(
            self.connecting(port=pooler.port))).returncode, 6)
        pooler.silent = False
        wait_for(lambda: host.ask() == PASS, "the database to be back")

    @slow
    def test_a_locked_table_leaves_no_server_process_behind(self) -> None:
        host = self.host(db_timeout=1, limits=[[10**6, 3600]])
        self.assertEqual(host.ask(), PASS)
        backend = prl.PostgreSQL(prl.Settings(**self.connecting()))
        with contextlib.closing(backend.connect(PATIENCE)) as other:
            other.cursor().execute("BEGIN; LOCK TABLE mail_count")
            until = time.monotonic() + 5  # some tries
            while time.monotonic() < until:
                self.assertEqual(host.ask(), DB_AWAY)
                time.sleep(0.01)
            self.assertLessEqual(
                int(self.server.sql(self.server.connected)), 3)
        wait_for(lambda: host.ask() == PASS, "the table")

    def is_fsync(self, value: str) -> bool:
        """Say whether the server has read that value."""
        return self.server.sql("SHOW fsync") == value

    def test_check_tells_that_fsync_is_off(self) -> None:
        for value, told in (("off", 1), ("on", 0)):
            self.server.sql(f"ALTER SYSTEM SET fsync = {value}")
            self.server.sql("SELECT pg_reload_conf()")
            wait_for(functools.partial(self.is_fsync, value), "a reload")
            done = self.command("--check")
            self.assertEqual(done.stderr.count("warning: fsync is off"), told)
            self.assertEqual(done.returncode, 0)

    def test_a_name_is_counted_whatever_the_encoding(self) -> None:
        names = ("jos\u00e9", "\u20ac", "\U0001f600" * 47,
                 "\U0001f600" * 190, "joe")
        for encoding in ("LATIN1", "SQL_ASCII", "WIN1252", "EUC_JP"):
            with self.subTest(encoding):
                name = encoding.lower()
                self.server.sql(f"CREATE DATABASE {name} OWNER test TEMPLATE"
                                f" template0 ENCODING '{encoding}'")
                self.addCleanup(
                    self.server.sql, f"DROP DATABASE {name} WITH (FORCE)")
                there = self.connecting(database=name)
                host = self.host(encoding, limits=[[3, 3600]], quotas=[{
                    "by": "server", "count": "helo_name",
                    "limits": [[1, 3600]]}], **there)
                mails = [{"sasl_username": who, "helo_name": "\u0434"}
                         for who in names * 5]
                answers = flood([host], mails)
                for who in names:
                    self.assert_exact([one for one in answers if one[0][
                        "sasl_username"] == who], 3)
                stored = subprocess.run(
                    [*self.server.client, "SELECT DISTINCT id FROM mail_count",
                     "-d", name], env=SERVER_ENV, check=True, text=True,
                    capture_output=True).stdout.split()
                self.assertTrue(all(map(str.isascii, stored)), stored)
                done = self.command("--check", **there)
                self.assertEqual(done.returncode, 0)
                self.assertIn(f"the database is {encoding}, not", done.stderr)


class PsycopgTest(DriverTest):
    """PostgreSQL through psycopg (3)."""

    test_a_pooler_whose_server_is_away_holds_nobody_up = (
        Psycopg2Test.test_a_pooler_whose_server_is_away_holds_nobody_up)
    test_a_name_is_counted_whatever_the_encoding = (
        Psycopg2Test.test_a_name_is_counted_whatever_the_encoding)

    kind = PostgreSQL
    analyze = Psycopg2Test.analyze
    hostile = Psycopg2Test.hostile
    assert_indexed = Psycopg2Test.assert_indexed
    driver = "psycopg"
    before = ("psycopg2",)


class GaleraTest(DatabaseTest):
    """Three mail hosts, each with a node of a Galera cluster."""

    kind = Galera
    driver = "MySQLdb"

    def on_nodes(self) -> list[Daemon]:
        """Start a host on each node that lives, with much patience."""
        return self.hosts(*[{"mysql_config": node.config, "db_timeout": 80}
                            for node in self.servers.nodes if node.process])

    def execute_all(self, *statements: str) -> list[tuple[Any, ...]]:
        """Run statements on a node when it has all that others committed."""
        return super().execute_all(
            "SET SESSION wsrep_sync_wait = 1", *statements)

    def test_hosts_on_all_nodes_share_one_limit_exactly(self) -> None:
        self.assert_exact(flood(self.on_nodes(), numbered(1000)), 100)
        self.assertEqual(self.counted(), 100)

    @slow
    def test_sixty_identities_raced_on_all_nodes_keep_their_limits(self
                                                                   ) -> None:
        """One identity shows too seldom what BEGIN would let through."""
        names = [f"user{n}" for n in range(60)]
        mails = [{"instance": f"{name}.{n}", "sasl_username": name}
                 for name in names for n in range(40)]  # all at one at a time
        hosts = self.hosts(*[
            {"mysql_config": node.config, "limits": [[20, 3600]]}
            for node in self.servers.nodes if node.process])
        answers = flood(hosts, mails)
        self.assertEqual({action for _, action in answers}, {PASS, REFUSED})
        passed = collections.Counter(
            mail["sasl_username"] for mail, action in answers
            if action == PASS)
        self.assertEqual(passed, dict.fromkeys(names, 20))
        self.assertEqual(dict(self.execute_all(
            "SELECT id, CAST(SUM(recipient_count) AS SIGNED) FROM mail_count"
            " GROUP BY id")), dict(passed))

    @slow
    def test_a_quota_of_600_identities_is_exact_on_all_nodes(self) -> None:
        names = [f"user{n}" for n in range(600)]
        mails = [{"instance": f"{name}.{n}", "sasl_username": name}
                 for n in range(3) for name in names]
        random.Random(7).shuffle(mails)
        answers = flood(self.hosts(*[
            {"mysql_config": node.config, "limits": [[2, 3600]],
             "db_timeout": 80,
             "quotas": [{"by": "server", "limits": [[1000, 3600]]}]}
            for node in self.servers.nodes if node.process]), mails)
        self.assert_exact(answers, 1000)
        passed = collections.Counter(
            mail["sasl_username"] for mail, action in answers
            if action == PASS)
        self.assertLessEqual(max(passed.values()), 2)
        self.assertEqual(dict(self.execute_all(
            "SELECT id, CAST(SUM(recipient_count) AS SIGNED) FROM mail_count"
            " GROUP BY id")), {**passed, "server=all": 1000})

    @slow
    def test_when_a_node_is_killed_the_others_go_on(self) -> None:
        *living, doomed = self.on_nodes()
        node = self.servers.nodes[-1]
        lost: Answers = []
        begun = threading.Event()

        def until_the_end() -> Iterator[dict[str, Any]]:
            begun.wait(PATIENCE)  # else it may use up the limit alone
            while node.process is not None:
                yield {}

        def mails() -> Iterator[dict[str, Any]]:
            for number, mail in enumerate(numbered(600)):
                if number == 33:  # of 32 connections: one is answered
                    begun.set()
                if number == 66:  # with the others under way
                    node.kill()
                yield mail

        clients = in_background(
            lambda: lost.extend(flood([doomed], until_the_end())))
        answers = flood(living, mails())
        clients.join()
        self.assertEqual({action for _, action in answers}, {PASS, REFUSED})
        self.assertLessEqual({action for _, action in lost},
                             {PASS, REFUSED, DB_AWAY})
        passed = sum(action == PASS for _, action in answers + lost)
        self.assertEqual(self.counted(), 100)
        self.assertLessEqual(passed, 100)
        self.assertGreater(passed, 100 - 16)  # who asked the dead node
        self.assertLessEqual(  # it counts on in memory
            sum(action != REFUSED for _, action in lost), 100)


del DriverTest, HostsTest  # their subclasses run the tests


class Model:
    """What the ledger has to do, with a list of (date, cost) for each key."""

    limits: dict[str, list[tuple[int, int]]] = {
        "": [(5, 60), (9, 600)], "sasl_domain": [(7, 60)],
        "server": [(15, 100)], "tried": [(4, 60)]}
    file = {"limits": limits[""], "quotas": [
        {"by": "sasl_domain", "limits": limits["sasl_domain"]},
        {"by": "server", "limits": limits["server"]},
        {"by": "server", "name": "tried", "limits": limits["tried"],
         "dry_run": True}]}

    def __init__(self) -> None:
        self.rows: dict[str, list[tuple[int, int]]] = {}

    def keys(self, user: str) -> dict[str, str]:
        """Return the keys of a user's mail, by the rule of each."""
        return {"": user, "server": "server=all", "tried": "tried=all",
                "sasl_domain": f"sasl_domain={user.split('@')[1]}"}

    def has_room(self, key: str, rule: str, cost: int, now: float) -> bool:
        """Say whether a mail keeps the limits of a rule."""
        second, _ = self.times(key, now)
        return all(cost + sum(
            spent for date, spent in self.rows[key] if date > second - seconds)
            <= mails for mails, seconds in self.limits[rule])

    def times(self, key: str, now: float) -> tuple[int, int]:
        """Return the second that ends windows, and the date of a new row."""
        rows = self.rows.setdefault(key, [])
        newest = max((date for date, _ in rows), default=0)
        if newest > now + 600:  # the clock was set back
            rows[:] = [(min(date, math.ceil(now)), cost)
                       for date, cost in rows]
        elif newest > math.ceil(now):  # it goes on from there
            return newest - 1, newest
        return math.floor(now), math.ceil(now)

    def judge(self, user: str, cost: int, now: float) -> str:
        """Count a mail where it has room, or nowhere; say what it is."""
        keys = self.keys(user)
        room = {rule: self.has_room(key, rule, cost, now)
                for rule, key in keys.items()}
        passed = all(room[rule] for rule in room if rule != "tried")
        for rule, key in keys.items() if passed else ():
            if room[rule]:
                self.rows[key].append((self.times(key, now)[1], cost))
        return ("refused" if not passed else
                "passed" if room["tried"] else "tried")

    def clean(self, now: int, keep: int) -> None:
        """Forget what is older."""
        for rows in self.rows.values():
            rows[:] = [row for row in rows if row[0] > now - keep]


class RandomTest(FolderTest):
    """Whatever is done in whatever order, the ledger agrees with a model."""

    seeds = 1000 if NO_SKIP else 100  # all of them where nothing is skipped

    def test_random_work_agrees_with_the_model(self) -> None:
        folder = tempfile.mkdtemp(prefix="policyd-", dir=memory_folder())
        self.addCleanup(shutil.rmtree, folder)
        settings = settings_of({**Model.file, "sqlite_config": {
            "database": os.path.join(folder, "db")}})
        ledgers = [prl.open_ledger(settings) for _ in range(2)]
        for ledger in ledgers:
            self.addCleanup(ledger.database.close)
        for seed in range(self.seeds):
            ledgers[0].database.transact(
                prl.Transaction.run, "DELETE FROM mail_count")
            with self.subTest(seed=seed):
                self.work(random.Random(seed), ledgers, settings)

    def work(self, chance: random.Random, ledgers: list[prl.Ledger],
             settings: prl.Settings) -> None:
        """Do this and that at times that go on and, at times, back."""
        model, now, users = Model(), 1e6, ("a@x.org", "b@x.org", "c@y.org")
        for step in range(25):
            now += chance.choice((0, 0, .25, 1, 5, 30, 61, 400, 1200, -1, -20,
                                  -2000) if step % 5 else (0, .5, 10))
            ledger = chance.choice(ledgers)
            database = ledger.database
            what = chance.random()
            if what < .05:
                user = chance.choice(users)
                self.assertEqual(
                    database.transact(prl.forget, user),
                    sum(cost for _, cost in model.rows.pop(user, [])), step)
            elif what < .1:
                keep = chance.choice((1200, 4000))
                model.clean(int(now), keep)
                clean(database, prl.Settings(
                    limits=(prl.Limit(1, keep // 2),)), int(now))
            else:
                self.charge(chance, ledger, settings, model, now, [
                    (chance.choice(users), chance.choice((1, 1, 2, 3, 10)))
                    for _ in range(chance.choice((1, 1, 2, 5)))])

    def charge(self, chance: random.Random, ledger: prl.Ledger,
               settings: prl.Settings, model: Model, now: float,
               mails: list[tuple[str, int]]) -> None:
        """Settle some mails at once, and compare the verdicts."""
        waiting = [prl.Mail(prl.claims_of(request(
            sasl_username=user, recipient_count=cost), settings),
            now - chance.choice((0, 0, 3))) for user, cost in mails]
        latest = max(mail.now for mail in waiting)
        verdicts = settled(ledger, waiting)
        self.assertEqual(
            ["refused" if verdict.broken else
             "tried" if verdict.tried else "passed"
             for verdict in verdicts],
            [model.judge(user, cost, latest) for user, cost in mails])


class NoDriverTest(FolderTest):
    """A machine without the driver for the setting backend."""

    def test_the_package_to_install_is_named(self) -> None:
        for backend, modules, packages in (
                (1, ("MySQLdb", "pymysql"),
                 "python3-mysqldb or python3-pymysql"),
                (2, ("psycopg2", "psycopg"),
                 "python3-psycopg2 or python3-psycopg")):
            program = program_without(modules, self.folder)
            for option in ([], ["--clean"], ["--check"]):
                done = run(
                    "--standalone", self.folder, "-f",
                    self.write("test.yaml", ""), *option, "-o",
                    f"backend={backend}", program=program)
                self.assertEqual(done.returncode, 5)
                self.assertIn(packages, done.stderr)


class AwayTest(NetTest):
    """What the tests of a database that fails share."""

    config = (f"limits: [[1000, 600]]\ndb_timeout: 1\n"
              f"db_error_action: {AWAY}\ndebug: False\n")

    def check_away(self, daemon: Daemon,
                   broken: contextlib.AbstractContextManager[None]) -> None:
        """Check the answers and the log while it is broken, and after."""
        for _ in range(10):
            daemon.ask()
        before = counted(daemon.database)["joe"]
        with broken:
            for _ in range(2):
                start = time.monotonic()
                self.assertEqual(daemon.ask(), AWAY)
                self.assertLess(time.monotonic() - start, 9)
            self.assertEqual(daemon.ask(recipient_count=989), REFUSED)
            self.assertEqual(daemon.ask(recipient_count=980), AWAY)
        wait_for(lambda: daemon.ask(sasl_username="ann") == PASS, "it")
        self.assertEqual(daemon.ask(recipient_count=9), REFUSED)
        self.assertEqual([daemon.ask(), daemon.ask()], [PASS, PASS])
        self.assertEqual(counted(daemon.database)["joe"], before + 984)
        log = daemon.log()
        self.assertEqual(log.count("the database is unavailable"), 1, log)
        self.assertEqual(log.count("the database is available again"), 1,
                         log)
        self.assertNotIn("Traceback", log)

    def service(self, path: str, limits: list[list[int]],
                ) -> Callable[[float, str, int], str]:
        """Return what answers (time, user, cost) from a database."""
        clock = [0.0]
        settings = settings_of(
            {"limits": limits, "sqlite_config": {"database": path}})
        ledger = prl.open_ledger(settings)
        self.addCleanup(ledger.database.close)
        service = prl.Service(settings, ledger, lambda: clock[0])

        def ask(now: float, user: str = "joe", cost: int = 1) -> str:
            clock[0] = now
            head = request_text(sasl_username=user, recipient_count=cost,
                                instance="")
            return service.answer(
                prl.parse_request(head[:-2]), prl.MailSoFar())

        return ask


class DatabaseFailureTest(AwayTest):
    """While the database is unavailable, limits hold by what was seen here."""

    def test_a_folder_that_is_missing_for_a_while(self) -> None:
        os.mkdir(self.path("lib"))
        daemon = self.daemon(self.config, "-o", "sqlite_config.database="
                             + self.path("lib/db"))
        daemon.database = self.path("lib/db")
        self.check_away(daemon, moved_away(self.path("lib")))

    def test_another_file_in_its_place(self) -> None:
        for name, content, mode in (
                ("corrupt", b"rubbish" * 9999, 0o600),
                ("damaged", b"SQLite format 3\0" + b"\x7f" * 9999, 0o600),
                ("a folder", None, 0), ("unreadable", b"", 0)):
            with self.subTest(name):
                if name == "unreadable" and is_root():
                    continue  # root reads all
                daemon = self.daemon(self.config, name=name)
                self.check_away(
                    daemon, replaced(daemon.database, content, mode))

    def test_a_database_that_is_deleted_is_made_anew(self) -> None:
        daemon = self.daemon(self.config)
        self.passes(daemon)
        for suffix in "", "-wal", "-shm":
            os.unlink(daemon.database + suffix)
        self.assertEqual(daemon.ask(), PASS)
        self.assertEqual(counted(daemon.database), {"joe": 1})

    def test_a_table_that_is_dropped_is_made_anew(self) -> None:
        daemon = self.daemon(self.config)
        self.passes(daemon)
        with contextlib.closing(sqlite3.connect(daemon.database)) as other:
            other.execute("DROP TABLE mail_count")
        wait_for(lambda: daemon.ask() == PASS, "a table")
        self.passes(daemon)

    def test_refusals_do_not_call_a_database_back(self) -> None:
        daemon = self.daemon(self.config.replace("1000", "1"))
        self.passes(daemon, "greedy")
        with contextlib.closing(sqlite3.connect(daemon.database)) as other:
            other.execute(  # as on a full disk: what is there can be read
                "CREATE TRIGGER full BEFORE INSERT ON mail_count"
                " BEGIN SELECT RAISE(ABORT, 'full'); END")
        for number in range(5):
            self.assertEqual(daemon.ask(sasl_username=number), AWAY)
            with locked(daemon.database, 0):  # nothing is left half done
                pass
            self.assertEqual(daemon.ask(sasl_username="greedy"), REFUSED)
        self.assertLess(daemon.log().count("database is"), 4, daemon.log())

    def test_who_is_blocked_stays_so_in_an_outage(self) -> None:
        daemon = self.daemon(self.config)
        self.assertEqual(run(*daemon.options, "--block", "joe").returncode, 0)
        self.assertEqual(daemon.ask(), BLOCKED)
        with moved_away(daemon.database):
            os.mkdir(daemon.database)
            self.assertEqual(daemon.ask(), BLOCKED)
            self.assertEqual(daemon.ask(sasl_username="ann"), AWAY)
            os.rmdir(daemon.database)

    def test_a_stop_writes_what_is_in_memory_alone(self) -> None:
        daemon = self.daemon(self.config)
        with moved_away(daemon.database):
            os.mkdir(daemon.database)
            self.assertEqual([daemon.ask(), daemon.ask()], [AWAY, AWAY])
            os.rmdir(daemon.database)
        self.assertEqual(daemon.stop(), 0)
        self.assertEqual(counted(daemon.database), {"joe": 2})

    def test_a_mail_s_rows_are_written_once_whatever_a_commit_said(
            self) -> None:
        """The commit comes in, but what says so does not."""
        settings = settings_of({"limits": [[9, 600]], "sqlite_config": {
            "database": self.path("db")}})
        ledger = prl.open_ledger(settings)
        self.addCleanup(ledger.database.close)
        faults, claims = Faults(ledger), [
            prl.Claim("joe", 1, settings.limits)]
        for total in range(1, 8):
            # Every other mail is sent twice, as is what was sent before.
            if total % 3:
                faults.lose_commit()
            mail = prl.Mail(claims, 1000, f"1.{total}", "DATA")
            verdict = ledger.decide(mail)
            self.assertEqual(verdict.usage[0].used, total - 1)
            self.assertEqual(mail.error is None, total % 3 == 0)
        ledger.store_remembered(1000)
        self.assertEqual(counted(self.path("db")), {"joe": 7})

    def test_many_slow_statements_end_at_the_deadline(self) -> None:
        ledger = prl.open_ledger(settings_of({"db_timeout": 1, "sqlite_config":
            {"database": self.path("slow")}}))
        self.addCleanup(ledger.database.close)
        backend: Any = ledger.database.backend
        connect = backend.connect

        def connect_slowly(timeout: int) -> Any:
            connection = connect(timeout)
            connection.set_trace_callback(lambda _: time.sleep(0.4))
            return connection

        backend.connect = connect_slowly
        mail = prl.Mail([prl.Claim("joe", 1, (prl.Limit(1, 60),))], 1000)
        began = time.monotonic()
        self.assertIsNone(ledger.decide(mail).broken)
        self.assertIsNotNone(mail.error)
        self.assertLess(time.monotonic() - began, 4)  # not for 30 statements

    def test_memory_forgets_what_is_stored_first_and_tells_the_rest(
            self) -> None:
        memory, limits = prl.Memory(100_000), (prl.Limit(9, 600),)
        settlement = prl.Settlement((), {}, {}, 1000)
        for n in range(60):
            page = prl.Page(prl.Claim(f"stored{n}", 1, limits))
            page.account = prl.Account({600: 0})
            settlement.pages[page.claim.identity] = page

        def count(names: Iterable[str]) -> list[str]:
            with quiet() as said:
                for name in names:
                    memory.decide(prl.Mail([prl.Claim(name, 1, limits)], 1000))
            return [line for line in said if "memory is full" in line]

        self.assertEqual(count(f"u{n}" for n in range(30)), [])
        memory.take(settlement)
        self.assertEqual(count(f"v{n}" for n in range(60)), [])
        self.assertEqual(len(memory.unstored_identities()), 90)
        self.assertEqual(len(count(f"w{n}" for n in range(60))), 1)

    def test_memory_is_bounded_and_forgets_who_is_idle_longest(self) -> None:
        memory, limits = prl.Memory(100_000), (prl.Limit(1, 600),)

        def passes(name: str) -> bool:
            verdict = memory.decide(prl.Mail(
                [prl.Claim(name, 1, limits)], 1000))
            return verdict.broken is None

        self.assertEqual([passes(f"u{n}") for n in range(150)],
                         [True] * 150)
        self.assertEqual([passes(f"u{n}") for n in (149, 100, 49, 100)],
                         [False, False, True, False])

    @slow
    def test_memory_is_bounded_whatever_the_names_and_values(self) -> None:
        def peak(fill: Callable[[prl.Memory, int], None], count: int) -> int:
            memory = prl.Memory(2_000_000)
            tracemalloc.start()
            for n in range(count):
                fill(memory, n)
            size, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            return size

        many = (prl.Limit(10**6, 600),)

        def by_name(memory: prl.Memory, n: int) -> None:
            memory.decide(prl.Mail([prl.Claim(
                f"{n:06}" + "\U0001f600" * 184, 1, many)], 1000, f"{n}"))

        def by_mail(memory: prl.Memory, n: int) -> None:
            memory.decide(prl.Mail([prl.Claim(
                f"{n % 9}", 1, many)], 1000, f"{n:040}", "END-OF-MESSAGE"))

        def by_value(memory: prl.Memory, n: int) -> None:
            memory.decide(prl.Mail([prl.Claim(
                f"{n % 400}", 1, many,
                value=f"{n:06}" + "\U0001f600" * 184)], 1000))

        for fill in by_name, by_mail, by_value:
            with self.subTest(fill.__name__):
                self.assertLess(peak(fill, 12_000), 3_000_000)

    def test_what_the_database_confirmed_is_bounded_too(self) -> None:
        ledger = prl.open_ledger(settings_of(
            {"sqlite_config": {"database": self.path("db")}}))
        self.addCleanup(ledger.database.close)
        ledger.memory = prl.Memory(30_000)
        for n in range(200):
            ledger.decide(prl.Mail([prl.Claim(
                f"{n % 20}", 1, (prl.Limit(10**6, 600),), value=f"{n}")],
                1000))
        with moved_away(self.path("db")):
            os.mkdir(self.path("db"))
            used = [ledger.decide(prl.Mail([prl.Claim(
                f"{n}", 1, (prl.Limit(10**6, 600),), value="x")],
                1000)).usage[0].used for n in range(20)]
            os.rmdir(self.path("db"))
        self.assertEqual(used[-1], 10)
        self.assertEqual(used[0], 0)

    def test_random_faults_lose_no_mail_and_count_none_twice(self) -> None:
        folder = tempfile.mkdtemp(prefix="policyd-", dir=memory_folder())
        self.addCleanup(shutil.rmtree, folder)
        for seed in range(10 if QUICK else 40):
            chance = random.Random(seed)
            settings = settings_of({"db_timeout": 1, "sqlite_config": {
                "database": os.path.join(folder, f"db{seed}")}})
            ledger = prl.open_ledger(settings)
            faults, passed, now = Faults(ledger), [], 1000
            limits = (prl.Limit(12, 60), prl.Limit(40, 600))
            for number in range(120):
                now += chance.choice((0, 0, 1, 3, 20))
                what = chance.random()
                if what < .15:
                    faults.lose_commit(chance.random() < .5)
                elif what < .3:
                    faults.plan(chance.choice((
                        "SELECT", "INSERT INTO mail_count", "BEGIN", "COMMIT",
                        "ROLLBACK", "mail_value")), chance.choice((
                            None, faults.conflict)))
                elif what < .35:
                    ledger.store_remembered(now)
                claims = [prl.Claim(who, chance.choice((1, 1, 2)), limits)
                          for who in ("joe", "server=all")[
                              :chance.choice((1, 2))]]
                mail = prl.Mail(claims, now, f"{number}", "DATA")
                if ledger.decide(mail).broken is None:
                    passed += [(claim.identity, f"{number}", claim.cost)
                               for claim in claims]
                elif chance.random() < .5:
                    faults.planned.clear()
            faults.planned.clear()
            ledger.store_remembered(now)
            with self.subTest(seed=seed):
                found = ledger.database.transact(
                    lambda transaction: transaction.run(
                        "SELECT id, instance, recipient_count, date, total"
                        " FROM mail_count ORDER BY id, date, total"
                        ).fetchall())
                self.assertEqual(sorted(row[:3] for row in found),
                                 sorted(passed))
                for who in "joe", "server=all":
                    rows = [row for row in found if row[0] == who]
                    totals = [row[4] for row in rows]
                    self.assertEqual(totals, list(itertools.accumulate(
                        row[2] for row in rows)))
            ledger.database.close()

    def test_memory_is_bounded_without_an_outage(self) -> None:
        ledger = prl.open_ledger(settings_of(
            {"sqlite_config": {"database": self.path("db")}}))
        self.addCleanup(ledger.database.close)
        ledger.memory = prl.Memory(50_000)
        claims = [prl.Claim(f"{n}", 1, (prl.Limit(10**6, 600),))
                  for n in range(200)]
        for claim in claims:
            ledger.decide(prl.Mail([claim], 1000))
        used = [ledger.memory.decide(prl.Mail([claim], 1000)).usage[0].used
                for claim in (claims[0], claims[-1])]
        self.assertEqual(used, [0, 1])

    def test_one_identity_that_cannot_be_stored_keeps_back_no_other(
            self) -> None:
        ledger = prl.open_ledger(settings_of(
            {"sqlite_config": {"database": self.path("db")}}))
        self.addCleanup(ledger.database.close)
        ledger.database.transact(
            prl.Transaction.run, "CREATE TRIGGER bad BEFORE INSERT ON"
            " mail_count WHEN NEW.id = 'bad' BEGIN SELECT RAISE(ABORT, 'no');"
            " END")
        names = ["bad", *(f"u{n}" for n in range(60))]
        for name in names:
            ledger.memory.decide(prl.Mail([prl.Claim(
                name, 1, (prl.Limit(9, 600),))], 1000, "a", "DATA"))
        ledger.store_remembered(1000)
        self.assertEqual(ledger.memory.unstored_identities(), ["bad"])
        self.assertEqual(set(counted(self.path("db"))), set(names[1:]))

    def test_a_long_outage_makes_no_mail_slow(self) -> None:
        def spent(mails: int) -> float:
            memory = prl.Memory()
            claim = prl.Claim("joe", 1, (prl.Limit(10**6, 600),))
            mail = prl.Mail([claim], 1000)
            for _ in range(mails):
                memory.decide(mail)
            start = time.process_time()
            for n in range(200):
                verdict = memory.decide(mail)
                self.assertEqual(verdict.usage[0].used, mails + n)
            return time.process_time() - start

        self.assertTrue(any(
            spent(20_000) < 5 * spent(20) + 0.05 for _ in range(5)))

    def test_on_a_full_disk_who_is_over_a_limit_stays_refused(self) -> None:
        daemon = self.daemon(self.config.replace("1000", "1")
                             + "limits_by_id: {free: []}\n")
        self.passes(daemon, "greedy")
        with disk_full(daemon):
            for user in "abc":
                self.assertEqual(daemon.ask(sasl_username=user), AWAY)
                for who, answer in (("greedy", REFUSED), ("free", PASS)):
                    self.assertEqual(daemon.ask(sasl_username=who), answer)
        self.assertEqual(daemon.ask(), PASS)
        self.assertEqual(daemon.log().count("the database is"), 2)
        daemon.ask(sasl_username="greedy")
        shown = run(*daemon.options, "--status", "greedy").stdout
        self.assertRegex(shown, r"(?m)^1 +1/600s ")

    def test_the_columns_are_those_of_the_original_and_a_total(self) -> None:
        daemon = self.daemon(self.config)
        self.assertEqual(daemon.ask(sasl_username="Ann", recipient_count=3),
                         PASS)
        with contextlib.closing(sqlite3.connect(daemon.database)) as other:
            cursor = other.execute("SELECT * FROM mail_count")
            names = [column[0] for column in cursor.description]
            [(identity, date, *rest)] = cursor.fetchall()
        self.assertEqual(names, ["id", "date", "recipient_count", "instance",
                                 "protocol_state", "total"])
        self.assertEqual([identity, *rest],
                         ["ann", 3, "123.456.7", "DATA", 3])
        self.assertAlmostEqual(date, time.time(), delta=60)

    def test_an_old_database_keeps_every_count(self) -> None:
        now = int(time.time())
        for name, columns, rows, used in (
                ("five", "id varchar(40) NOT NULL, date bigint NOT NULL,"
                 " recipient_count int DEFAULT 1, instance varchar(40) NOT"
                 " NULL, protocol_state varchar(10) NOT NULL",
                 [("Ann", now - 5, 3, "i", "DATA"), ("ANN", now, 4, "i", "D"),
                  ("ann", now - 9, None, "i", "DATA"),
                  ("2001:DB8::1", now - 9, 5, "i", "DATA"),
                  ("ann", now - 9999, 9, "i", "DATA")],
                 {"ann": 17, "2001:db8::1": 5}),
                ("two", "id varchar(40) NOT NULL, date bigint NOT NULL",
                 [("Ann", now), ("ann", now - 1), ("Ann", now + 50)],
                 {"ann": 3})):
            path = self.path(name)
            with contextlib.closing(sqlite3.connect(path)) as old, old:
                old.execute(f"CREATE TABLE mail_count ({columns})")
                old.execute("CREATE INDEX mail_count_index"
                            " ON mail_count (id, date)")
                old.executemany("INSERT INTO mail_count VALUES ("
                                + ", ".join("?" * len(rows[0])) + ")", rows)
            visible = used["ann"] - (9 if name == "five" else 0)
            with self.subTest(name):
                ask = self.service(path, [[visible + 2, 600]])
                self.assertEqual(ask(now, "ANN", 3), REFUSED)
                self.assertEqual(ask(now, "Ann", 2), PASS)
                self.assertEqual(ask(now, "ann", 1), REFUSED)
                self.assertEqual(ask(now, "2001:DB8:0::1", 1), PASS)
                found = counted(path)
                self.assertEqual(found["ann"], used["ann"] + 2)


class ServiceTest(FolderTest):
    """A request in, an action out."""

    def service(self, **settings: Any) -> prl.Service:
        self.now = 1000.0
        given = prl.Settings(
            sqlite_config={"database": self.path("db")},
            **{"limits": (prl.Limit(3, 60),), **settings})
        ledger = prl.open_ledger(given)
        self.addCleanup(ledger.database.close)
        return prl.Service(given, ledger, clock=lambda: self.now)

    def answers(self, service: prl.Service, *requests: dict[str, Any],
                told: prl.MailSoFar | None = None) -> list[str]:
        """Return the actions for requests of one connection, shortened."""
        told = prl.MailSoFar() if told is None else told
        return [service.answer(request(**one), told).split()[0]
                for one in requests]

    def test_what_fits_passes_and_the_rest_is_refused(self) -> None:
        mail = {"recipient_count": 1}
        self.assertEqual(self.answers(self.service(), *[mail] * 4),
                         ["dunno"] * 3 + ["defer_if_permit"])

    def test_data_and_end_of_message_count_once(self) -> None:
        data = [{"instance": f"1.{i}"} for i in range(5)]
        end = [{**one, "protocol_state": "END-OF-MESSAGE"} for one in data]
        both = [one for pair in zip(data, end) for one in pair]
        self.assertEqual(self.answers(self.service(), *both),
                         ["dunno"] * 6 + ["defer_if_permit"] * 4)
        self.assertEqual(self.answers(self.service(), *end[:4]),
                         ["defer_if_permit"] * 4)

    def test_end_of_message_alone_counts_each_time(self) -> None:
        end = {"protocol_state": "END-OF-MESSAGE"}
        self.assertEqual(self.answers(self.service(), *[end] * 4),
                         ["dunno"] * 3 + ["defer_if_permit"])

    def test_an_end_of_message_without_instance_is_counted(self) -> None:
        data = {"instance": ""}
        end = {"instance": "", "protocol_state": "END-OF-MESSAGE"}
        self.assertEqual(self.answers(self.service(), data, end, data, end),
                         ["dunno"] * 3 + ["defer_if_permit"])

    def test_another_connection_is_told_nothing(self) -> None:
        service = self.service()
        end = {"protocol_state": "END-OF-MESSAGE"}
        for _ in range(3):
            self.assertEqual(self.answers(service, {}), ["dunno"])
        self.assertEqual(self.answers(service, end), ["defer_if_permit"])

    def test_recipients_accepted_at_rcpt_stay_counted(self) -> None:
        service = self.service(count_mode=0)
        rcpt = {"protocol_state": "RCPT"}
        for _ in range(2):
            said = self.answers(service, *[rcpt] * 4)
            self.assertEqual(said[-1], "defer_if_permit")
        self.assertEqual(said, ["defer_if_permit"] * 4)

    def test_a_mail_counts_where_postfix_first_asks(self) -> None:
        """README tells to put the check into either list."""
        for states, accepted, passed in (
                (("RCPT", "RCPT", "DATA", "END-OF-MESSAGE"), 2, [1, 1, 1, 1]),
                (("RCPT", "RCPT", "RCPT", "RCPT", "DATA"), 3, [1, 1, 1, 0, 1]),
                (("DATA", "END-OF-MESSAGE"), 3, [1, 1]),
                (("END-OF-MESSAGE",), 3, [1])):
            service, last = self.service(), prl.MailSoFar()
            said = self.answers(service, *[
                {"protocol_state": state, "recipient_count": 0
                 if state == "RCPT" else accepted} for state in states],
                told=last)
            self.assertEqual([one == "dunno" for one in said],
                             list(map(bool, passed)), states)
            used = sum(counted(self.path("db")).values())
            self.assertEqual(used, accepted, states)
            os.unlink(self.path("db"))

    def test_mails_and_bytes_count_once_at_rcpt(self) -> None:
        quotas = prl.as_quotas([
            {"by": "server", "name": count, "count": count,
             "limits": [[10**6, 60]]} for count in ("mails", "bytes")])
        service = self.service(quotas=quotas, limit_by_sasl=False)
        rcpt = {"protocol_state": "RCPT", "size": 1000}
        for instance in "ab":
            self.answers(service, *[{**rcpt, "instance": instance}] * 3,
                         told=prl.MailSoFar())
        self.assertEqual(counted(self.path("db")),
                         {"mails=all": 2, "bytes=all": 2000})

    def test_at_rcpt_each_recipient_s_quota_counts_the_mail(self) -> None:
        """A decoy ahead of the recipient must not spare it."""
        service = self.service(limit_by_sasl=False, quotas=prl.as_quotas([
            {"by": "recipient_domain", "count": "mails", "limits": [[1, 60]]},
            {"by": "server", "count": "bytes", "limits": [[9999, 60]]}]))
        for instance, action in ("a", "dunno"), ("b", "defer_if_permit"):
            said = self.answers(service, *[
                {"protocol_state": "RCPT", "size": 9, "instance": instance,
                 "recipient": recipient} for recipient in (
                     f"x@{instance}.org", "j@x.org", "k@x.org")],
                told=prl.MailSoFar())
            self.assertEqual(said, ["dunno", action, action])
        self.assertEqual(counted(self.path("db")), {
            "recipient_domain=a.org": 1, "recipient_domain=b.org": 1,
            "recipient_domain=x.org": 1, "server=all": 18})

    def test_all_quotas_are_charged_or_none(self) -> None:
        service = self.service(quotas=prl.as_quotas([
            {"by": "sasl_domain", "limits": [[4, 60]],
             "fail_action": "reject $identity: $used of $mails in $window,"
             " room $room_in, at $room_at, 5$$"},
            {"by": "server", "limits": [[5, 60]]}]))
        said = self.answers(service, *[
            {"sasl_username": f"{user}@x.org"} for user in "aaabbb"],
            {"sasl_username": "c@y.org"}, {"sasl_username": "d@z.org"})
        self.assertEqual(said, ["dunno"] * 4 + ["reject"] * 2 + [
            "dunno", "defer_if_permit"])
        self.assertEqual(counted(self.path("db")), {
            "a@x.org": 3, "b@x.org": 1, "c@y.org": 1, "server=all": 5,
            "sasl_domain=x.org": 4, "sasl_domain=y.org": 1})
        self.now = 1010
        self.assertEqual(service.answer(
            request(sasl_username="b@x.org"), prl.MailSoFar()),
            "reject sasl_domain=x.org: 4 of 4 in 1 minute,"
            " room 50 seconds, at " + prl.moment(1060) + ", 5$")

    def test_the_reply_to_a_blocked_identity_is_block_action(self) -> None:
        service = self.service(
            block_for=500, block_action="reject $identity until $room_at",
            quotas=prl.as_quotas([{"by": "sasl_domain", "limits": [[9, 60]],
                                   "block_for": 700}]))
        for user, count in (("joe@x.org", 5), ("ann@x.org", 4),
                            ("eve@x.org", 3), ("bob@x.org", 2)):
            said = self.answers(service, *[{"sasl_username": user}] * count)
        self.assertEqual(said, ["defer_if_permit", "reject"])
        for user, seconds, name in (("joe@x.org", 500, "joe@x.org"),
                                    ("zoe@x.org", 700, "sasl_domain=x.org")):
            self.assertEqual(
                service.answer(request(sasl_username=user), prl.MailSoFar()),
                f"reject {name} until {prl.moment(1000 + seconds)}")
        self.assertEqual(self.answers(service, {"sasl_username": "x@y.org"}),
                         ["dunno"])

    def test_mail_without_the_value_that_counts_is_blocked_too(self) -> None:
        """Else who is blocked goes on with MAIL FROM:<>, or without SIZE=."""
        quotas = [{"by": "sasl_username", "count": "sender",
                   "limits": [[1, 60]], "block_for": 500},
                  {"by": "sasl_domain", "count": "bytes",
                   "limits": [[1000, 60]], "block_for": 500}]
        service = self.service(limits=(prl.Limit(1000, 60),),
                               quotas=prl.as_quotas(quotas))
        null = {"sender": "", "recipient_count": 50}
        told = prl.MailSoFar()
        self.assertEqual(self.answers(
            service, {"sender": "a@x"}, null, {"sender": "b@x"}, null),
            ["dunno", "dunno", "defer_if_permit", "defer_if_permit"])
        self.assertEqual(self.answers(service, {
            "sasl_username": "ann@x", "size": 900}, {
            "sasl_username": "ann@x", "size": 900}, {
            "sasl_username": "ann@x", "size": ""}),
            ["dunno", "defer_if_permit", "defer_if_permit"])
        self.assertEqual(self.answers(
            service, {**null, "sasl_username": "eve"},
            {**null, "sasl_username": "eve", "size": 900,
             "protocol_state": "END-OF-MESSAGE"}, told=told), ["dunno"] * 2)
        self.assertEqual(counted(self.path("db"))["eve"], 50)

    def test_one_mail_that_can_never_pass_blocks_nobody(self) -> None:
        service = self.service(
            limits=(prl.Limit(9, 60),), block_for=500, quotas=prl.as_quotas([
                {"by": "sasl_domain", "limits": [[10, 60]],
                 "block_for": 500}]))
        self.assertEqual(self.answers(
            service, {"sasl_username": "eve@x.org", "recipient_count": 11},
            {"sasl_username": "bob@x.org"}, {"sasl_username": "eve@x.org"}),
            ["defer_if_permit", "dunno", "dunno"])

    def test_data_charges_recipients_that_rcpt_did_not(self) -> None:
        """Where a restriction ahead of ours has accepted them."""
        service = self.service(
            limits=(prl.Limit(10, 60),), quotas=prl.as_quotas([
                {"by": "server", "count": "bytes", "limits": [[9999, 60]]}]))
        rcpt = {"protocol_state": "RCPT"}
        data = {"protocol_state": "DATA", "recipient_count": 7}
        end = {"protocol_state": "END-OF-MESSAGE", "recipient_count": 7,
               "size": 1000}
        told = prl.MailSoFar()
        self.assertEqual(self.answers(
            service, rcpt, rcpt, data, end, told=told), ["dunno"] * 4)
        self.assertEqual(counted(self.path("db")),
                         {"joe": 7, "server=all": 1000})
        second = [{**one, "instance": "second"} for one in (rcpt, data)]
        self.assertEqual(self.answers(service, *second, told=told),
                         ["dunno", "defer_if_permit"])

    def test_a_sender_cannot_use_up_the_limit_of_a_login(self) -> None:
        service = self.service(limit_by_sender=True)
        forged = {"sasl_username": "", "sender": "joe@e.org"}
        self.assertEqual(self.answers(service, *[forged] * 4), [
            "dunno", "dunno", "dunno", "defer_if_permit"])
        self.assertEqual(self.answers(
            service, {"sasl_username": "joe@e.org"}), ["dunno"])
        self.assertEqual(counted(self.path("db")), {
            "sender=joe@e.org": 3, "joe@e.org": 1})

    def test_what_never_passes_is_told(self) -> None:
        service = self.service(fail_action="450 $room_in $room_at")
        with self.assertLogs(prl.log, prl.NOTICE) as logged:
            self.assertEqual(service.answer(
                request(recipient_count=4), prl.MailSoFar()),
                "450 never never"
                " (too many recipients in one message: 4, at most 3)")
        self.assertIn("too many recipients in one message: 4, at most 3",
                      logged.output[0])

    def test_an_answer_is_short_and_printable_whatever_a_client_says(self
                                                                     ) -> None:
        rule = dataclasses.replace(
            prl.Settings().rules[0], fail_action="450 $identity" + ", no" * 99)
        usage = prl.Usage(prl.Claim("a\u2028\u202eb\x7f", 1, (), rule),
                          prl.Limit(1, 60), 1)
        said = prl.explain(prl.Verdict((usage,), usage), "", 1000)
        self.assertEqual((said[:14], len(said)), ("450 a??b?, no,", 400))

    def test_a_reply_has_no_more_bytes_than_smtp_allows(self) -> None:
        service = self.service(fail_action="450 $identity $identity")
        said = service.answer(request(
            sasl_username="\U0001f600" * 190, recipient_count=4),
            prl.MailSoFar())
        self.assertEqual(said, "450 " + "\U0001f600" * 99)

    def test_a_dry_run_counts_and_logs_and_refuses_nothing(self) -> None:
        service = self.service(dry_run=True)
        with self.assertLogs(prl.log, prl.NOTICE) as logged:
            self.assertEqual(self.answers(service, *[{}] * 5), ["dunno"] * 5)
        self.assertEqual(sum("would refuse for <joe> 3/60s" in line
                             for line in logged.output), 2)
        self.assertEqual(counted(self.path("db")), {"joe": 3})

    def test_times_are_spelled_as_people_do(self) -> None:
        for seconds, text in ((1, "1 second"), (59, "59 seconds"),
                              (60, "1 minute"), (61, "61 seconds"),
                              (601, "11 minutes"), (3600, "1 hour"),
                              (5400, "90 minutes"), (86400, "1 day"),
                              (90000, "25 hours"), (7 * 86400, "7 days")):
            self.assertEqual(prl.spell(seconds), text)

    def test_the_wrong_restriction_list_is_told_once_a_minute(self) -> None:
        service = self.service(count_mode=1)
        with quiet() as said:
            self.answers(service, *[{"protocol_state": "RCPT"}] * 9)
        [warning] = said
        self.assertIn("smtpd_data_restrictions = check_policy_service {"
                      " unix:ratelimit/policy, default_action=DUNNO }",
                      warning)
        with quiet() as said:
            self.answers(service, {}, {"protocol_state": "RCPT"})
        self.assertEqual(said, [])

    def test_reload_takes_effect_at_the_next_request(self) -> None:
        service = self.service()
        self.answers(service, {"recipient_count": 3})
        service.reload(dataclasses.replace(
            service.settings, fail_action="reject go away"))
        self.assertEqual(self.answers(service, {}), ["reject"])
        service.reload(dataclasses.replace(
            service.settings, limits=(prl.Limit(4, 60),)))
        self.assertEqual(self.answers(service, {}), ["dunno"])

    def test_a_window_moves_with_the_clock(self) -> None:
        service = self.service()
        self.answers(service, {"recipient_count": 3})
        for now, action in ((1059.9, "defer_if_permit"), (1060, "dunno")):
            self.now = now
            self.assertEqual(self.answers(service, {}), [action])

    def test_no_database_gives_db_error_action_until_it_is_back(self) -> None:
        service = self.service(db_error_action="warn no database",
                               limits_by_id=prl.as_limits_by_id({"free": []}))
        os.mkdir(self.path("db"))  # no file can be opened there
        with quiet() as said:
            self.assertEqual(self.answers(service, {}, {}), ["warn"] * 2)
            self.assertEqual(self.answers(
                service, {"sasl_username": "free"}), ["dunno"])
            os.rmdir(self.path("db"))
            self.assertEqual(self.answers(service, {}, {}),
                             ["dunno", "defer_if_permit"])
        self.assertEqual([("unavailable" in line, "again" in line)
                          for line in said if "database" in line],
                         [(True, False), (False, True)])

    def test_the_log_costs_no_answer_and_no_decision_its_time(self) -> None:
        service, clock = self.service(), [0]

        def log_slowly(mails: Sequence[prl.Mail]) -> None:
            clock[0] += 5
            raise ValueError("no such line")

        with quiet() as said, patch.object(
                prl, "log_within_limits", log_slowly), patch.object(
                time, "perf_counter", lambda: clock[0]):
            self.addCleanup(prl.log.setLevel, prl.log.level)
            prl.log.setLevel(logging.INFO)
            self.assertEqual(self.answers(service, {}), ["dunno"])
        self.assertEqual(clock, [5])
        self.assertEqual(service.counts["decision_seconds"], 0)
        self.assertIn("mails were not logged", "".join(said))

    def test_a_reload_changes_no_mail_that_waits(self) -> None:
        """What passes by the db_error_action of before is counted."""
        service = self.service(db_error_action="450 try later")
        before = dataclasses.replace(service.settings, db_error_action="warn")
        os.mkdir(self.path("db"))
        ledger, used = service.ledger, []
        claims = [prl.Claim("joe", 1, before.limits)]
        for settings in before, service.settings, before:
            with quiet():
                verdict = ledger.decide(prl.Mail(
                    claims, self.now, settings=settings))
            used.append(verdict.usage[0].used)
        self.assertEqual(used, [0, 1, 1])


class ServerTest(NetTest):
    """Connections: whatever their number and their pieces."""

    def test_it_listens_on_unix_ipv4_and_ipv6_sockets(self) -> None:
        self.passes(self.daemon())
        for host in "127.0.0.1", "::1":
            with self.subTest(host):
                if host == "::1" and not os.path.exists("/proc/net/if_inet6"):
                    skip("IPv6")
                daemon = self.daemon(
                    WIDE, "-o", f'SOCKET=["{host}", 0]', name=f"at{host}")
                self.assertEqual(asks(tcp_address(daemon), 2), [PASS, PASS])
                self.assertEqual(counted(daemon.database), {"joe": 2})

    def test_requests_may_come_in_any_pieces(self) -> None:
        daemon = self.daemon("limit_by_sasl: no\nlimit_by_sender: yes\n")
        wire = request_text(sender="zoë@example.org")
        cut = wire.index(b"\xc3") + 1  # inside the character
        for pieces in ([wire + wire], [wire[:cut], wire[cut:] + wire],
                       [wire[i:i + 1] for i in range(len(wire))] + [wire],
                       [wire[:-1], wire[-1:] + wire[:5], wire[5:]]):
            with self.subTest(pieces=len(pieces)), daemon.client() as client:
                for piece in pieces:
                    client.socket.sendall(piece)
                self.assertEqual([client.read(), client.read()], [PASS] * 2)
        self.assertEqual(counted(daemon.database), {"zoë@example.org": 8})

    def test_attributes_are_not_left_over_for_the_next_request(self) -> None:
        daemon = self.daemon("limits: [[1, 60]]\n")
        with daemon.client() as client:
            self.assertEqual(client.ask(), PASS)
            client.socket.sendall(b"request=smtpd_access_policy\n"
                                  b"protocol_state=DATA\n\n")
            self.assertEqual(client.read(), PASS)  # nobody's mail
            self.assertEqual(client.ask(sasl_username="ann"), PASS)
        self.assertEqual(counted(daemon.database), {"joe": 1, "ann": 1})

    def test_a_request_that_trickles_in_for_ever_is_hung_up_on(self) -> None:
        with self.daemon("delay_to_close: 1\n").client() as client:
            client.socket.settimeout(0.2)

            def cut_off() -> bool:
                try:
                    client.socket.sendall(b"a")
                    return client.socket.recv(1) == b""
                except socket.timeout:
                    return False
                except OSError:
                    return True

            wait_for(cut_off, "the daemon to hang up")

    def test_a_burst_of_connections_waits_in_the_backlog(self) -> None:
        daemon = self.daemon(WIDE)
        daemon.send(signal.SIGSTOP)
        clients = self.crowd(daemon, 200)
        for client in clients:
            client.socket.sendall(request_text())
        daemon.send(signal.SIGCONT)
        self.assertEqual({client.read() for client in clients}, {PASS})
        self.assertEqual(counted(daemon.database), {"joe": 200})

    def test_a_hundred_clients_at_once_get_exactly_the_limit(self) -> None:
        daemon = self.daemon("limits: [[150, 600]]\ndebug: False\n")
        answers: list[str] = sum(at_once(
            lambda _: asks(daemon.socket, 3), range(100)), [])
        self.assertEqual(answers.count(PASS), 150)
        self.assertEqual(answers.count(REFUSED), 150)
        self.assertEqual(counted(daemon.database), {"joe": 150})

    def test_two_daemons_share_one_limit(self) -> None:
        config = "limits: [[100, 600]]\ndebug: False\n"
        shared = "sqlite_config.database=" + self.path("shared")
        pair = [self.daemon(config, "-o", shared, name=name)
                for name in ("one", "two")]
        answers: list[str] = sum(at_once(
            lambda each: asks(each.socket, 10), pair * 10), [])
        self.assertEqual(answers.count(PASS), 100)
        self.assertEqual(answers.count(REFUSED), 100)
        self.assertEqual(counted(self.path("shared")), {"joe": 100})

    def test_data_and_end_of_message_count_a_mail_once(self) -> None:
        table = (  # requests as state, instance, recipients; who has used
            ("D1 E1", [PASS] * 2, 1), ("D1 E1 E1", [PASS] * 3, 2),
            ("E1", [PASS], 1), ("D1 E2", [PASS] * 2, 2),
            ("D1 D2 E2 E1", [PASS] * 4, 3), ("D1 R1 E1", [PASS] * 3, 2),
            ("D D E E", [PASS] * 4, 4),  # without an instance: four mails
            ("D1 E1 D2 E2 D3 E3 D4 E4 D5 E5 D6 E6 D7 E7",
             [PASS] * 10 + [REFUSED] * 4, 5))
        states = {"D": "DATA", "E": "END-OF-MESSAGE", "R": "RCPT"}
        daemon = self.daemon("limits: [[5, 600]]\n")
        for n, (dialogue, answers, used) in enumerate(table):
            with self.subTest(dialogue), daemon.client() as client:
                self.assertEqual(answers, [
                    client.ask(sasl_username=f"user{n}", instance=word[1:],
                               protocol_state=states[word[0]])
                    for word in dialogue.split()])
                self.assertEqual(counted(daemon.database)[f"user{n}"], used)


class Cycle:
    """What counting references does not free."""

    def __init__(self) -> None:
        self.itself = self


class DaemonTest(NetTest):
    """What the daemon does by itself, at a quicker pace than it has."""

    def hurried(self, config: str = WIDE, *options: str) -> Daemon:
        """Start a daemon that cleans all the time."""
        return self.daemon(config, *options,
                           program=hurried(self.folder, 0.05))

    def test_it_cleans_the_whole_table_step_by_step(self) -> None:
        daemon = self.hurried("limits: [[9, 3600]]\n")
        now = int(time.time())
        rows = [(f"{kind}{n:04}", now - age, 1, "", "DATA", 1)
                for kind, age in (("new", 0), ("old", 9000))
                for n in range(2 * prl.CLEAN_STEP)]
        with contextlib.closing(sqlite3.connect(daemon.database)) as other:
            other.executemany(prl.INSERT.format("(?, ?, ?, ?, ?, ?)"), rows)
            other.commit()
        let_clean(daemon.database)
        wait_for(lambda: "old1999" not in counted(daemon.database),
                 "the last to be cleaned")
        self.assertEqual(len(counted(daemon.database)), 2 * prl.CLEAN_STEP)

    def test_no_signal_keeps_it_from_cleaning(self) -> None:
        daemon = self.daemon("limits: [[9, 3600]]\n",
                             program=hurried(self.folder, 0.5))
        with contextlib.closing(sqlite3.connect(daemon.database)) as other:
            other.execute(prl.INSERT.format("(?, ?, ?, ?, ?, ?)"), (
                "old", int(time.time()) - 9000, 1, "", "DATA", 1))
            other.commit()
        let_clean(daemon.database)

        def is_clean() -> bool:
            daemon.send(signal.SIGUSR2)  # far more often than it cleans
            return not counted(daemon.database)

        wait_for(is_clean, "the old row to go")

    def test_no_collection_looks_at_all_that_it_remembers(self) -> None:
        self.addCleanup(gc.callbacks.remove, prl.freeze_survivors)
        self.addCleanup(gc.unfreeze)
        gc.callbacks.append(prl.freeze_survivors)
        remembered: list[Any] = [[[]] for _ in range(1000)]
        gc.collect()
        self.assertLess(len(gc.get_objects()), 1000)
        reference = weakref.ref(Cycle())
        self.assertIsNotNone(reference())
        gc.collect()  # what is garbage by now is not hidden
        self.assertIsNone(reference())
        cycle = Cycle()
        reference = weakref.ref(cycle)
        gc.collect()  # what is in use is, until all is looked at again
        del cycle, remembered
        self.assertIsNotNone(reference())
        gc.unfreeze()
        gc.collect()
        self.assertIsNone(reference())

    def test_it_publishes_what_it_counted_time_and_again(self) -> None:
        daemon = self.hurried()
        for number in (1, 2):
            daemon.ask()
            line = f"policyd_rate_limit_requests_total {number}"
            wait_for(lambda: line in prl.read_counters(  # noqa: B023
                daemon.pidfile), "the counters")

    def test_a_tally_that_cannot_be_written_ends_nothing(self) -> None:
        daemon = self.hurried()

        def stand_in_the_way() -> bool:
            try:
                os.makedirs(daemon.pidfile + ".prom.new/full")
            except (FileExistsError, NotADirectoryError):
                return False  # it is being written
            return True

        wait_for(stand_in_the_way, "the place")
        daemon.ask(sasl_username="ann")
        daemon.send(signal.SIGUSR2)
        daemon.wait_log("1 requests")
        self.passes(daemon)

    def test_it_keeps_to_one_processor(self) -> None:
        daemon = self.daemon()
        self.assertEqual(len(os.sched_getaffinity(daemon.process.pid)), 1)

    def test_a_tcp_port_can_be_had_again_at_once(self) -> None:
        address = ("127.0.0.1", free_port())
        daemon = self.daemon(WIDE, "-o", f"SOCKET={list(address)}")
        with Client(address) as client:
            self.assertEqual(client.ask(), PASS)
            self.assertEqual(daemon.stop(), 0)  # it closes first: TIME_WAIT
            self.assertEqual(client.read(), "")
        daemon.start()
        self.assertEqual(asks(address, 1), [PASS])

    def test_a_client_that_never_reads_is_hung_up_on(self) -> None:
        daemon = self.daemon(WIDE + "delay_to_close: 1\n")
        threads = status(daemon, "Threads")
        with daemon.client() as deaf:
            deaf.socket.settimeout(0.3)
            with contextlib.suppress(OSError):
                while True:  # until all buffers are full, and it waits
                    deaf.socket.sendall(request_text(protocol_state="RCPT"))
            wait_for(lambda: status(daemon, "Threads") == threads,
                     "its thread to end")


class HostileTest(NetTest):
    """What a stranger can send: it harms nobody else."""

    def test_tls_and_http_hellos_end_with_the_patience(self) -> None:
        daemon = self.daemon("delay_to_close: 1\n")
        tls, http = self.crowd(daemon, 2)
        tls.socket.sendall(b"\x16\x03\x01\x02\0\x01")
        http.socket.sendall(b"GET / HTTP/1.1\r\n\r\n")
        self.assertEqual([tls.read(), http.read()], ["", ""])

    def test_a_thousand_half_open_clients_do_no_harm(self) -> None:
        daemon = self.daemon("debug: False\n")
        for client in self.crowd(daemon, 1000):
            client.socket.sendall(b"request=smtpd_acc")
        self.passes(daemon)

    def test_who_sends_byte_by_byte_is_closed_and_wakes_few(self) -> None:
        daemon = self.daemon(WIDE)
        clients = self.crowd(daemon, 1100)  # more than a quarter of the room
        closed: set[int] = set()
        used, start = cpu_seconds(daemon), time.monotonic()

        def all_closed() -> bool:
            for number, client in enumerate(clients):
                try:
                    client.socket.send(b"a", socket.MSG_DONTWAIT)
                except BlockingIOError:
                    pass  # more than it reads
                except OSError:
                    closed.add(number)
            return len(closed) > 50

        wait_for(all_closed, "the daemon to hang up")
        self.assertGreater(time.monotonic() - start, 2)
        self.passes(daemon)
        self.assertLess(cpu_seconds(daemon) - used, 3)

    def test_500_idle_connections_take_under_64_mb(self) -> None:
        daemon = self.daemon(WIDE)
        clients = self.crowd(daemon, 500)
        self.assertEqual({client.ask() for client in clients}, {PASS})
        self.assertLess(status(daemon, "VmRSS")[0], 64_000)

    def test_an_honest_client_gets_in_when_descriptors_run_out(self) -> None:
        daemon = self.daemon(WIDE)
        resource.prlimit(  # the cap on connections is far above it now
            daemon.process.pid, resource.RLIMIT_NOFILE, (60, 60))
        self.check_crowded(daemon, 80)

    def test_strangers_cost_nobody_a_mail(self) -> None:
        daemon = self.daemon(WIDE, program=self.few_files(192))
        for client in self.crowd(daemon, 200):
            with contextlib.suppress(OSError):  # it is hung up on already
                client.ask(sasl_username="stranger")

        def honest(user: str) -> list[str]:
            answers: list[str] = []
            for _ in range(50):  # on a connection of its own, and one try
                answers.append("")
                with contextlib.suppress(OSError):
                    answers[-1] = daemon.ask(sasl_username=user)
            return answers

        answers = [*itertools.chain(*at_once(honest, ["joe"] * 10))]
        self.assertEqual(set(answers), {PASS})
        self.assertEqual(counted(daemon.database)["joe"], 500)
        over = threading.Event()

        def churn() -> None:
            clients: collections.deque[Client] = collections.deque()
            while not over.is_set():
                clients.append(daemon.client())
                if len(clients) % 2:
                    with contextlib.suppress(OSError):
                        clients[-1].ask(sasl_username="stranger")
                while len(clients) > 200 * (not over.is_set()):
                    clients.popleft().__exit__()

        with contextlib.ExitStack() as stack:
            for thread in [in_background(churn) for _ in range(3)]:
                stack.callback(thread.join)
            stack.callback(over.set)
            answers = [*itertools.chain(*at_once(honest, ["ann"] * 10))]
        self.assertGreaterEqual(answers.count(PASS), 495)
        self.assertEqual(
            counted(daemon.database)["ann"], answers.count(PASS))

    def test_the_busy_and_the_young_are_not_hung_up_on(self) -> None:
        daemon = self.daemon(WIDE, program=self.few_files(64))  # takes 16
        self.passes(daemon)
        with daemon.client() as busy:
            with locked(daemon.database):
                busy.socket.sendall(request_text())
                self.crowd(daemon, 100)
            self.assertEqual(busy.read(), PASS)
            for _ in range(14):  # idle since before the young one came
                self.crowd(daemon, 1)[0].ask()
            with daemon.client() as young:
                for _ in range(10):
                    self.crowd(daemon, 1)[0].ask()
                self.assertEqual(young.ask(), PASS)

    def test_an_honest_client_gets_in_when_threads_run_out(self) -> None:
        daemon = self.daemon(WIDE, program=self.write("few.py", (
            "import runpy, threading\n"
            "class Few(threading.Thread):\n"
            "    def start(self):\n"
            "        if threading.active_count() > 20:\n"
            "            raise RuntimeError('cannot start a thread')\n"
            "        super().start()\n"
            "threading.Thread = Few\n"
            f"runpy.run_path({COMPILED!r}, run_name='__main__')\n")))
        self.crowd(daemon, 100)
        self.passes(daemon)
        self.assertNotIn("internal error", daemon.log())

    def test_very_few_descriptors_still_serve_two_clients(self) -> None:
        daemon = self.daemon(WIDE, program=self.few_files(64))
        with daemon.client() as one, daemon.client() as two:
            self.assertEqual([one.ask(), two.ask()] * 2, [PASS] * 4)
            self.assertEqual([one.ask(), two.ask()] * 2, [PASS] * 4)

    def test_a_client_that_reads_no_answer_stops_nobody(self) -> None:
        daemon = self.daemon(WIDE + "db_timeout: 600\n")
        with daemon.client() as deaf:
            deaf.socket.settimeout(0.3)
            with contextlib.suppress(socket.timeout):
                deaf.socket.sendall(request_text() * 5000)
            self.passes(daemon)
            self.assertEqual(daemon.stop(), 0)  # not after 20 minutes

    def test_an_odd_recipient_count_gains_no_room(self) -> None:
        daemon = self.daemon("limits: [[1000, 600]]\n")
        for count, cost in (("", 1), ("0", 1), ("-5", 1), ("x", 1), ("²", 1),
                            ("٣", 1), ("1e3", 1), (" 7", 1), ("1_0", 1),
                            ("+7", 1), ("7", 7), ("007", 7), ("1" * 9, 0),
                            ("9" * 400, 0), (2**31, 0), (2**63, 0)):
            with self.subTest(str(count)[:20]):
                before = counted(daemon.database).get("joe", 0)
                answer = daemon.ask(recipient_count=count)
                self.assertTrue(answer.startswith(PASS if cost else REFUSED))
                after = counted(daemon.database)["joe"]
                self.assertEqual(after - before, cost)

    def test_a_request_may_lack_any_attribute(self) -> None:
        daemon = self.daemon("limit_by_sender: True\nlimit_by_ip: True\n"
                             "limited_networks: ['0.0.0.0/0', '::/0']\n")
        lines = request_text(client_address="unknown").splitlines(True)
        for n, line in enumerate(lines[1:-1], 1):
            with self.subTest(line), daemon.client() as client:
                client.socket.sendall(b"".join(lines[:n] + lines[n + 1:]))
                self.assertEqual(client.read(), PASS)
        for address in "unknown", "", "999.1.1.1", "::g", "1" * 1900:
            with self.subTest(address[:20]):
                self.assertEqual(PASS, daemon.ask(
                    sasl_username="", sender="", client_address=address))
        self.assertNotIn("unknown", counted(daemon.database))

    def test_any_sender_is_counted_as_one_identity(self) -> None:
        daemon = self.daemon("limits: [[2, 600]]\nlimit_by_sasl: no\n"
                             "limit_by_sender: yes\n")
        for n, sender in enumerate((
                "a" * 1900, "é" * 900, "a=b=c@example.org", "=", "'\"; --",
                "%s{0}\\x00", "\udcff\udcfe@example.org", "😀@例え.jp", "?",
                "x" * 189 + "😀" * 3, " ", "\r\x1b[2J", "NULL", "\u202etxe")):
            with self.subTest(sender[:20]):
                self.assertEqual(
                    [daemon.ask(sender=sender, helo_name=sender,
                                recipient=sender) for _ in range(3)],
                    [PASS, PASS, REFUSED])
                table = counted(daemon.database)
                self.assertEqual(set(table.values()), {2})
                self.assertEqual(len(table), n + 1)
                self.assertLessEqual(max(map(len, table)), 190)

    def test_long_senders_with_one_beginning_are_two_identities(self) -> None:
        daemon = self.daemon("limits: [[1, 600]]\nlimit_by_sasl: no\n"
                             "limit_by_sender: yes\n")
        for tail in "a", "b":
            self.assertEqual(daemon.ask(sender="x" * 1900 + tail), PASS)
            self.assertEqual(daemon.ask(sender="X" * 1900 + tail), REFUSED)

    def test_another_spelling_is_the_same_identity(self) -> None:
        daemon = self.daemon(
            "limits: [[1, 600]]\nlimit_by_ip: yes\nlimit_by_sender: yes\n"
            "limited_networks: ['0.0.0.0/0', '::/0']\n")
        nobody = {"sasl_username": "", "sender": ""}
        for name, first, *others in (
                ("sasl_username", "Ann@Example.org", "ann@EXAMPLE.ORG"),
                ("sasl_username", "Zo\u00eb", "zoe\u0308", "ZO\u00cb"),
                ("sender", "ÉVA@x.org", "éva@X.org"),
                ("client_address", "2001:db8::a", "2001:DB8:0:0:0:0:0:A",
                 "2001:0db8:0000:0000:0000:0000:0000:000a"),
                ("client_address", "192.0.2.1", "::ffff:192.0.2.1",
                 "::FFFF:c000:201", "0:0:0:0:0:ffff:192.0.2.1")):
            with self.subTest(first):
                self.assertEqual(daemon.ask(**{**nobody, name: first}), PASS)
                for other in others:
                    self.assertEqual(
                        daemon.ask(**{**nobody, name: other}), REFUSED, other)

    def test_control_characters_never_reach_the_log_raw(self) -> None:
        daemon = self.daemon("limits: [[1, 60]]\nlog_requests: True\n"
                             "limit_by_sasl: no\nlimit_by_sender: yes\n")
        rubbish = "x\r\x1b[2J\x01\x7f\x85\u2028\u202e\x0b\udcff<,\t"
        for state in "DATA", "DATA", "RCPT", rubbish:
            daemon.ask(sender=rubbish, queue_id=rubbish, helo_name=rubbish,
                       protocol_state=state, **{"\x1bname": rubbish})
        with open(os.path.join(daemon.folder, "log"), "rb") as file:
            text = file.read().decode()  # strictly
        self.assertIn("action=", text)
        self.assertEqual(
            [], [c for c in text if not c.isprintable() and c != "\n"])

    def test_names_of_marks_or_dots_take_no_time(self) -> None:
        daemon = self.daemon(WIDE)  # normalising is quadratic in their number
        used = cpu_seconds(daemon)
        for number in range(50):  # of the bytes that a request may have
            for name in ("\u0301" * 4000 + "\u0316" * 4000,
                         "@" + "." * 30000 + "x"):
                self.assertEqual(
                    daemon.ask(sasl_username=f"{number}{name}"), PASS)
        self.assertLess(cpu_seconds(daemon) - used, 0.5)

    def test_3900_large_requests_take_under_400_mb(self) -> None:
        daemon = self.daemon(WIDE)
        clients = self.crowd(daemon, 500 if QUICK else 3900)
        wire = request_text(helo_name="x" * 32000)
        for client in clients:
            client.socket.sendall(wire)
        self.assertEqual({client.read() for client in clients}, {PASS})
        for client in clients:  # the whole request but for its end
            client.socket.sendall(wire[:-1])
        self.passes(daemon)
        self.assertLess(status(daemon, "VmRSS")[0], 400_000)

    def test_a_log_line_is_short_whatever_is_sent(self) -> None:
        daemon = self.daemon("limits: [[1, 60]]\nlog_requests: True\n")
        names = ("queue_id", "protocol_state", "client_address", "instance",
                 "helo_name")
        for name, state in itertools.product(names, ("DATA", "RCPT")):
            daemon.ask(**{"protocol_state": state, name: "x" * 30000})
        self.assertLess(max(map(len, daemon.log().splitlines())), 800)
        daemon.ask(**{f"new{number}": "x" * 20 for number in range(900)})
        self.assertLess(max(map(len, daemon.log().splitlines())), 4100)


class PastModel:
    """What limits would have done, found by looking at all pairs of mails."""

    def __init__(self, limits: list[list[int]],
                 by_id: dict[str, list[list[int]]] | None = None) -> None:
        self.limits = limits
        self.by_id = by_id or {}

    def judge(self, rows: Iterable[tuple[str, int, int | None]],
              ) -> dict[str, Any]:
        """Return what --json prints for rows of identity, date and cost."""
        mails: dict[str, list[tuple[int, int]]] = {}
        for name, date, cost in rows:
            mails.setdefault(name, []).append(
                (date, 1 if cost is None else cost))
        windows = sorted({seconds for limits in (
            self.limits, *self.by_id.values()) for _, seconds in limits})
        busiest = {seconds: {name: max(
            self.within(sent[:end], sent[end - 1][0], seconds)
            for end in range(1, len(sent) + 1))
            for name, sent in mails.items()} for seconds in windows}
        refused = [one for name, sent in mails.items()
                   for one in self.refuse(name, sorted(
                       sent, key=lambda mail: mail[0]), busiest)]
        refused.sort(key=lambda one: (-one["refused"], one["identity"]))
        return {
            "mails": sum(cost for sent in mails.values() for _, cost in sent),
            "identities": len(mails),
            "since": min((date for sent in mails.values()
                          for date, _ in sent), default=None),
            "refused": refused,
            "windows": [{"seconds": seconds, **{
                name: self.share(list(found.values()), percent)
                for name, percent in (("p50", 50), ("p90", 90), ("p99", 99),
                                      ("max", 100))}}
                for seconds, found in busiest.items() if found]}

    def refuse(self, name: str, sent: list[tuple[int, int]],
               busiest: dict[int, dict[str, int]]) -> list[dict[str, Any]]:
        """Return what was refused of an identity, if anything was."""
        passed: list[tuple[int, int]] = []
        blamed: list[tuple[list[int], int]] = []
        for date, cost in sent:
            broken = [limit for limit in self.by_id.get(name, self.limits)
                      if self.within(passed, date, limit[1]) + cost > limit[0]]
            if broken:
                blamed.append((broken[0], cost))
            else:
                passed.append((date, cost))
        if not blamed:
            return []
        sums = {tuple(limit): sum(cost for other, cost in blamed
                                  if other == limit) for limit, _ in blamed}
        most, seconds = next(limit for limit in sums
                             if sums[limit] == max(sums.values()))
        return [{"identity": name, "mails": sum(cost for _, cost in sent),
                 "refused": sum(sums.values()),
                 "limit": {"mails": most, "seconds": seconds},
                 "peak": busiest[seconds][name]}]

    @staticmethod
    def within(mails: list[tuple[int, int]], now: int, seconds: int) -> int:
        """Return the cost of mails in a window that ends now."""
        return sum(cost for date, cost in mails if now - date < seconds)

    @staticmethod
    def share(numbers: list[int], percent: int) -> int:
        """Return the least number which so many percent do not exceed."""
        return min(number for number in numbers if 100 * sum(
            other <= number for other in numbers) >= percent * len(numbers))


class SimulateTest(FolderTest):
    """Limits are tried on the mail that is recorded."""

    def setUp(self) -> None:
        super().setUp()
        self.database = self.path("db.sqlite3")
        self.config = self.write("test.yaml", "")

    def service(self, name: str, now: list[float],
                **settings: Any) -> prl.Service:
        """Return a service with a database and a clock of its own."""
        given = settings_of({
            **settings, "sqlite_config": {"database": self.path(name)}})
        ledger = prl.open_ledger(given)
        self.addCleanup(ledger.database.close)
        return prl.Service(given, ledger, clock=lambda: now[0])

    def record(self, rows: Sequence[tuple[str, int, int | None]]) -> None:
        """Let these rows be all that the database holds."""
        if not os.path.exists(self.database):
            ledger = prl.open_ledger(prl.Settings(
                sqlite_config={"database": self.database}))
            ledger.database.transact(prl.read_overrides, 0)  # makes tables
            ledger.database.close()
        totals: collections.Counter[str] = collections.Counter()
        with contextlib.closing(sqlite3.connect(self.database)) as database:
            database.execute("PRAGMA synchronous = OFF")
            database.execute("DELETE FROM mail_count")
            for name, date, cost in rows:
                totals[name] += 1 if cost is None else cost
                database.execute(
                    "INSERT INTO mail_count VALUES (?, ?, ?, '', 'DATA', ?)",
                    (name, date, cost, totals[name]))
            database.commit()

    def simulate(self, *options: str, **settings: Any) -> tuple[str, str]:
        """Return what the command prints, and its warnings."""
        given = [word for name, value in settings.items()
                 for word in ("-o", f"{name}={json.dumps(value)}")]
        status, out, err = command(
            "--simulate", "--standalone", self.folder, "-f", self.config,
            *given, *options)
        self.assertEqual(status, 0, err)
        return out, err

    def found(self, **settings: Any) -> dict[str, Any]:
        """Return what the command prints for programs."""
        return dict(json.loads(self.simulate("--json", **settings)[0]))

    @staticmethod
    def read_all(terminal: int) -> str:
        """Return what was written to a terminal whose other end is closed."""
        text = b""
        with contextlib.suppress(OSError):  # that is its end
            while some := os.read(terminal, 4096):
                text += some
        os.close(terminal)
        return text.decode()

    def test_it_agrees_with_a_naive_model_on_random_tables(self) -> None:
        chance = random.Random(16)
        for table in range(100 if QUICK else 1000):
            span = chance.choice((5, 60, 300))
            rows = sorted(((
                chance.choice(("ann", "joe@x.org", "é", "192.0.2.7")),
                1000 + chance.randrange(span),
                chance.choice((1, 1, 1, 2, 3, 0, None)))
                for _ in range(chance.randrange(40))),
                key=lambda row: row[:2])
            limits, *others = ([[chance.randrange(9), chance.choice(
                (1, 2, 7, 60, 200, 86400))] for _ in range(
                    chance.randrange(1, 4))] for _ in range(3))
            by_id = dict(zip(("joe@x.org", "é"), others[:table % 3]))
            self.record(rows)
            with self.subTest(table=table), patch.object(
                    prl, "SIMULATE_STEP", chance.choice((1, 2, 3, 7, 5000))):
                self.assertEqual(
                    self.found(limits=limits, limits_by_id=by_id),
                    PastModel(limits, by_id).judge(rows))

    def test_it_agrees_with_the_daemon_that_is_sent_the_same(self) -> None:
        chance = random.Random(5)
        wide: dict[str, Any] = {"limits": [[1000, 60]]}
        for name, tight in (
                ("limits", {"limits": [[3, 10], [20, 300]]}),
                ("limits_by_id", {"limits": [[4, 60]], "limits_by_id": {
                    "joe@x.org": [[1, 20]], "@y.org": [[9, 60], [1, 1]]}}),
                ("quotas", {"limits": [[1000, 60]], "quotas": [{
                    "by": "sasl_domain", "limits": [[5, 30]]}]})):
            if name == "quotas":  # their keys have to be recorded
                wide["quotas"] = [{
                    "by": "sasl_domain", "limits": [[1000, 30]]}]
            now = [1000.0]
            first, second = (
                self.service(f"{name}.{host}", now, **settings)
                for host, settings in (("first", wide), ("second", tight)))
            told = prl.MailSoFar(), prl.MailSoFar()
            refused: collections.Counter[str] = collections.Counter()
            for mail in range(150 if QUICK else 400):
                now[0] += chance.choice((0, 0, 1, 1, 2, 5, 10, 20, 60))
                one = request(
                    sasl_username=chance.choice(
                        ("joe@x.org", "Ann@x.org", "eve@y.org")),
                    recipient_count=chance.choice((1, 1, 2, 3)),
                    instance=f"1.{mail}")
                self.assertEqual(first.answer(one, told[0]), PASS)
                if second.answer(one, told[1]) != PASS:
                    user = one.sasl_username.lower()
                    refused[user if name != "quotas" else
                            "sasl_domain=" + user[-5:]] += one.recipient_count
            os.replace(self.path(f"{name}.first"), self.database)
            os.replace(self.path(f"{name}.first-wal"), self.database + "-wal")
            with self.subTest(name):
                self.assertGreater(len(refused), 1)
                self.assertEqual({
                    one["identity"]: one["refused"]
                    for one in self.found(**tight)["refused"]}, refused)

    def test_a_person_sees_who_would_have_been_refused(self) -> None:
        self.record([
            *(("newsletter@example.org", 10**9, 1) for n in range(61)),
            *(("newsletter@example.org", 10**9 + n * 900, 1)
              for n in range(1, 1940)),
            *(("joe@example.org", 10**9 + n * 60, 1) for n in range(240)),
            *(("ann", 10**9 + n * 3600, 1) for n in range(3)),
            ("a b=\n" + "c" * 99, 10**9 + 7, 7)])
        out, err = self.simulate(limits=[[5, 60], [100, 86400]])
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(10**9))
        name = "a b=?" + "c" * 99
        self.assertEqual(err, "")
        self.assertEqual(out.splitlines(), [
            f"2,250 mails of 4 identities since {since}",
            f"{'identity':104}  mails  refused  at most",
            f"{'joe@example.org':104}    240      140"
            "  240 in a day (limit 100)",
            f"{'newsletter@example.org':104}  2,000       56"
            "  61 in a minute (limit 5)",
            f"{name:104}      7        7  7 in a minute (limit 5)",
            "3 identities would have had mail refused, 203 mails in all",
            "busiest minute of an identity: median 1, 90% 61, 99% 61, most"
            " 61",
            "busiest day of an identity: median 7, 90% 240, 99% 240, most"
            " 240"])
        self.record([("joe", 1000, 1)])
        for seconds, words in ((1, "second"), (3600, "hour"), (90, "90 sec"),
                               (7200, "2 hours"), (604800, "7 days")):
            out, _ = self.simulate(limits=[[0, seconds]])
            self.assertIn(f"\nbusiest {words}", out)
            self.assertRegex(out, rf"\njoe +1 +1  1 in (an? )?{words}.* \("
                             r"limit 0\)\n1 identity would have had mail"
                             r" refused, 1 mail in all\n")

    def test_what_is_shown_fits_the_terminal(self) -> None:
        self.record([(f"somebody-{n}@mail.a-very-long-name.example.org",
                      1000 + n, 5 + n % 7) for n in range(50)])
        for rows, columns in ((24, 80), (10, 60), (3, 40), (70, 120)):
            ours, theirs = open_terminal()
            fcntl.ioctl(theirs, termios.TIOCSWINSZ,
                        struct.pack("4H", rows, columns, 0, 0))
            run("--simulate", "--standalone", self.folder, "-f", self.config,
                "-o", "limits=[[4, 60]]", stdout=theirs, check=True)
            os.close(theirs)
            shown = self.read_all(ours).splitlines()
            with self.subTest(rows=rows, columns=columns):
                table = [line for line in shown if line.startswith("some")]
                self.assertLessEqual(max(map(len, table)), columns)
                self.assertRegex(
                    table[0], r"[\w-](\.\.\.)? +11 +11  11 in a mi")
                if rows > 9:
                    self.assertLess(len(shown), rows)
                self.assertGreaterEqual(len(table), 3)
                if len(table) < 50:
                    self.assertIn(f"and {50 - len(table)} more; see --json",
                                  shown)

    def test_it_changes_nothing(self) -> None:
        self.record([("joe", 1000 + n, 1) for n in range(10)])
        old = self.path("old")
        os.mkdir(old)
        for folder in (self.folder, old):
            path = os.path.join(folder, "db.sqlite3")
            with contextlib.closing(sqlite3.connect(path)) as database:
                if folder == old:  # the original's
                    database.execute("CREATE TABLE mail_count (id varchar(40)"
                                     " NOT NULL, date bigint NOT NULL)")
                database.commit()
                dump = list(database.iterdump())
            with open(path, "rb") as file:
                content = file.read()
            names = sorted(os.listdir(folder))
            for option in ("--simulate", "--json"):
                with self.subTest(folder=folder, option=option):
                    run("--simulate", option, "--standalone", folder,
                        "-f", self.config, "-o", "limits=[[1, 60]]",
                        check=True)
                    self.assertEqual(sorted(os.listdir(folder)), names)
                    with open(path, "rb") as file:
                        self.assertEqual(file.read(), content)
                    with contextlib.closing(sqlite3.connect(path)) as database:
                        self.assertEqual(list(database.iterdump()), dump)

    def test_the_original_s_tables_are_read(self) -> None:
        for columns, cost in ((", recipient_count int DEFAULT 1, instance"
                               " varchar(40), protocol_state varchar(10)", 3),
                              ("", 1)):
            with contextlib.closing(sqlite3.connect(self.database)) as old, \
                    patch.object(prl, "SIMULATE_STEP", 2):
                old.execute("DROP TABLE IF EXISTS mail_count")
                old.execute("CREATE TABLE mail_count (id varchar(40) NOT NULL,"
                            f" date bigint NOT NULL{columns})")
                names = "id, date" + ", recipient_count" * bool(columns)
                old.executemany(
                    f"INSERT INTO mail_count ({names}) VALUES"
                    f" (?, ?{', ?' * bool(columns)})",
                    [row[:3 if columns else 2] for row in (
                        ("Joe", 1060, None), ("Joe", 1000, cost),
                        ("Joe", 1059, 1), ("", 1000, 1), ("Joe", 1059, 1))])
                old.commit()
                found = self.found(limits=[[2, 60]])
            with self.subTest(columns=columns):
                self.assertEqual(
                    found, PastModel([[2, 60]]).judge(
                        [("<>", 1000, 1), ("joe", 1000, cost),
                         ("joe", 1059, 1), ("joe", 1059, 1),
                         ("joe", 1060, 1)]))

    def test_no_mail_waits_for_it(self) -> None:
        """Where a reader stops all writers: not even in the journal's mode."""
        self.record([("joe", 1000 + n, 1) for n in range(20)])
        with contextlib.closing(sqlite3.connect(
                self.database, timeout=0, isolation_level=None)) as writer:
            writer.execute("PRAGMA journal_mode = DELETE")
            settings = prl.Settings(sqlite_config={"database": self.database})
            database = prl.open_ledger(settings).database
            told = []

            def write(rows: int) -> None:
                told.append(rows)
                writer.execute("INSERT INTO mail_count VALUES ('zoe', 1000, 1,"
                               " '', '', 1)")

            with patch.object(prl, "SIMULATE_STEP", 8):
                result = database.read(
                    prl.simulate, settings, settings, 1000, write)
        self.assertEqual(told, [8, 16, 22])
        self.assertEqual(result.mails, 22)

    def progress(self, wait: float) -> str:
        """Hold the command up for a while; return what its terminal shows."""
        ours, theirs = open_terminal()
        with locked(self.database):
            process = subprocess.Popen(
                [sys.executable, COMPILED, "--simulate", "--standalone",
                 self.folder, "-f", self.config],
                stdout=subprocess.PIPE, stderr=theirs, text=True)
            self.addCleanup(process.kill)
            os.close(theirs)
            wait_until_open(process, self.database)
            since = time.monotonic()
            wait_for(lambda: time.monotonic() > since + wait, "a while")
        out, _ = process.communicate(timeout=PATIENCE)
        shown = self.read_all(ours)
        self.assertEqual(process.returncode, 0, shown)
        self.assertIn("1,234 mails of 1 identity since", out)
        return shown

    def test_progress_is_shown_on_a_terminal_after_a_second(self) -> None:
        with contextlib.closing(sqlite3.connect(self.database)) as old:
            old.execute("CREATE TABLE mail_count (id varchar(40) NOT NULL,"
                        " date bigint NOT NULL)")
            old.executemany("INSERT INTO mail_count VALUES ('joe', ?)",
                            [(1000,)] * 1234)
            old.commit()
        for wait, told in ((1.2, "\r1,234 records judged\r" + 20 * " " + "\r"),
                           (0, "")):
            with self.subTest(wait=wait):
                self.assertEqual(self.progress(wait), told)
        self.assertEqual(run("--simulate", "--standalone", self.folder,
                             "-f", self.config).stderr, "")

    def test_what_it_cannot_know_is_told(self) -> None:
        rows = [(name, 1000 + n, 1) for name in (
            "joe", "sasl_domain=x.org", "sender=a@x.org", "server=all")
            for n in range(4)]
        self.record(rows)
        quotas = [{"by": "sasl_domain", "limits": [[3, 60]]},
                  {"by": "sender", "limits": [[3, 60]]},
                  {"by": "server", "limits": [[9, 60]]},
                  {"by": "sasl_username", "name": "places",
                   "count": "client_network", "limits": [[3, 60]]},
                  {"by": "helo_name", "limits": [[3, 60]]}]
        self.config = self.write("test.yaml", json.dumps({
            "limits": [[5, 60]], "quotas": quotas,
            "limits_by_id": {"boss": [], "10.0.0.0/8": [], "free": []}}))
        no_quotas = [f"quota {name}: removed here" for name in (
            "sasl_domain", "sender", "server", "places", "helo_name")]
        for told, settings in (
                ({"places: not judged: only the", "helo_name: not judged:"
                  " nothing is recorded", "judged separately"},
                 {"limits": [[3, 60]]}),
                ({"quota sender: not judged: its by", "quota server: removed",
                  "quota places: removed", "quota helo_name: removed",
                  "judged separately"},
                 {"quotas": [quotas[0], {**quotas[1], "count": "bytes"}]}),
                ({"limit_by_sender: a change", "count_mode: a change",
                  *no_quotas}, {"quotas": [],
                                "limit_by_sender": True, "count_mode": 2}),
                ({"the file has no limits for 10.0.0.0/8, boss", *no_quotas},
                 {"limits_by_id": {"boss": [[1, 60]], "free": []},
                  "quotas": []}),
                ({"these limits are looser than those of the file for 1",
                  "places: not judged", "helo_name: not judged",
                  "judged separately"},
                 {"limits": [[5, 59], [100, 90]]})):
            with self.subTest(settings=settings):
                out, err = self.simulate(**settings)
                notes = out[out.rindex("most "):].splitlines()[1:]
                self.assertEqual(err, "")
                self.assertEqual(len(notes), len(told), notes)
                for text in told:
                    self.assertTrue(
                        any(text in note for note in notes), (text, notes))
                err = self.simulate("--json", **settings)[1]
                self.assertEqual(err.splitlines(), [
                    f"warning: {note}" for note in notes])

    def test_keys_of_quotas_are_judged_apart(self) -> None:
        self.record([(name, 1000 + n, 1) for name in (
            "joe", "sender=boss@x.org", "server=all") for n in range(4)])
        found = self.found(limits=[[4, 60]], quotas=[
            {"by": "server", "limits": [[3, 60]]},
            {"by": "sender", "limits": [[1, 60]],
             "limits_by_id": {"@x.org": [[2, 50]]}}])
        self.assertEqual((found["mails"], found["identities"]), (4, 1))
        self.assertEqual(
            [(one["identity"], one["refused"], one["limit"]["seconds"])
             for one in found["refused"]],
            [("sender=boss@x.org", 2, 50), ("server=all", 1, 60)])
        self.assertEqual(
            [(one["seconds"], one["max"], one.get("quota"))
             for one in found["windows"]],
            [(60, 4, None), (50, 4, "sender"), (60, 4, "sender"),
             (60, 4, "server")])
        out, _ = self.simulate(quotas=[{"by": "server", "limits": [[3, 60]]}])
        self.assertIn("8 mails of 2 identities and 1 quota key since", out)
        self.assertIn("busiest minute of a key of quota server: median 4",
                      out)

    def test_refusals_and_limits_set_by_hand_are_told(self) -> None:
        self.record([("joe", 1000, 5)])
        self.assertEqual(command("--block", "joe", "--standalone", self.folder,
                                 "-f", self.config)[0], 0)
        with contextlib.closing(sqlite3.connect(self.database)) as database:
            database.execute("INSERT INTO mail_refused VALUES"
                             " ('joe', 60, 5, 1234, 1, 2, '', 0)")
            database.commit()
        out, _ = self.simulate(limits=[[6, 60]])
        self.assertIn("\nno mail would have been refused\n", out)
        looser, by_hand = out.splitlines()[-2:]
        self.assertIn("1 identity", looser)
        self.assertIn("(1,234 refusals counted)", looser)
        self.assertIn("--limit or --block, now in force for 1 identity",
                      by_hand)
        out, _ = self.simulate(limits=[[5, 60], [151, 86400]])
        self.assertIn("looser", out)  # it is 150 a day where none is given
        out, _ = self.simulate(limits=[[5, 60], [150, 86400], [1, 1]])
        self.assertNotIn("looser", out)

    def test_limits_that_are_only_tried_are_judged_too(self) -> None:
        self.record([("joe", 1000, 1)] * 3)
        self.config = self.write("test.yaml", "limits: [[1, 60]]\n")
        self.assertEqual(self.found(dry_run=True), self.found())
        self.assertEqual(self.found()["refused"], [{
            "identity": "joe", "mails": 3, "refused": 2,
            "limit": {"mails": 1, "seconds": 60}, "peak": 3}])
        for options in (("--simulate", "--status"), ("--simulate", "x"),
                        ("--simulate", "--for", "1d")):
            self.assertEqual(command(*options)[0], 2)

    def test_an_identity_with_an_equals_sign_is_found(self) -> None:
        """It has one more in front where a quota has its name."""
        self.record([("=server=x", 1000, 2), ("a=b", 1000, 2)])
        self.assertEqual(
            [one["identity"] for one in self.found(
                limits=[[1, 60]], limits_by_id={"server=x": [], "a=b": []},
                quotas=[{"by": "server", "limits": [[1, 60]]}])["refused"]],
            [])

    def test_an_empty_table_and_none(self) -> None:
        self.record([])
        self.assertEqual(self.simulate()[0],
                         "no recorded mail can be judged\n")
        self.assertEqual(self.found(), {
            "mails": 0, "identities": 0, "since": None, "refused": [],
            "windows": []})
        os.mkdir(self.path("none"))
        status, out, err = command(
            "--simulate", "--standalone", self.path("none"))
        self.assertEqual((status, out, err.count("\n")), (6, "", 1))
        self.assertEqual(os.listdir(self.path("none")), [])

    def test_odd_rows_do_no_harm(self) -> None:
        future = int(time.time()) + 10**8
        rows: list[tuple[str, int, int | None]] = [
            ("joe", future, 2), ("joe", future, None), ("joe", 0, 0),
            ("x' OR 1=1 --", 5, 1), ("\u202e\x00\x1b[31m", 5, 2**31 - 1)]
        self.record(sorted(rows[:3], key=lambda row: row[1]) + rows[3:])
        self.assertEqual(self.found(limits=[[2, 60]]),
                         PastModel([[2, 60]]).judge(sorted(
                             rows, key=lambda row: row[1])))
        out, _ = self.simulate(limits=[[2, 60]])
        self.assertIn("\n???[31m ", out)
        self.assertIn(" 2,147,483,647 in a minute (limit 2)", out)

    @slow
    def test_a_million_mails_take_20_seconds_and_little_memory(self) -> None:
        """A tenth of them, in a tenth of the time."""
        self.record([("zoe", 1000 + n // 3, 1) for n in range(50_000)] + [
            (f"user{n % 500}@x.org", 1000 + n, 1) for n in range(50_000)])
        limits = [[5, 60], [100, 86400]]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        self.assertEqual(self.found(limits=limits)["mails"], 100_000)
        took = resource.getrusage(resource.RUSAGE_SELF).ru_utime - before
        self.assertLess(took, 2)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        self.found(limits=limits)
        self.assertLess(tracemalloc.get_traced_memory()[1], 2**23)


class ReportsTest(FolderTest):
    """A folder with a ledger, and mail servers that end with the test."""

    def setUp(self) -> None:
        super().setUp()
        self.ledger = self.open(report=True, report_limits=(60, 900))

    def open(self, **settings: Any) -> prl.Ledger:
        """Open the ledger under some settings."""
        ledger = prl.open_ledger(prl.Settings(
            sqlite_config={"database": self.path("db.sqlite3")}, **settings))
        self.addCleanup(ledger.database.close)
        return ledger

    def refuse(self, identity: str, times: int = 1, window: int = 60,
               ledger: prl.Ledger | None = None) -> None:
        """Let the ledger refuse some mails."""
        for _ in range(times):
            (ledger or self.ledger).decide(prl.Mail([prl.Claim(
                identity, 5, (prl.Limit(4, window),))], int(time.time()),
                client="192.0.2.7"))

    def spend(self, identity: str, mails: int, date: float = 0,
              limit: int = 10**6) -> bool:
        """Charge a mail of some recipients; say whether it passed."""
        return self.ledger.decide(prl.Mail(
            [prl.Claim(identity, mails, (prl.Limit(limit, 60),))],
            int(date or time.time()))).broken is None

    def untold(self) -> dict[tuple[str, int], int]:
        """Return the refusals that no report told of."""
        return {(row.identity, row.seconds): row.hits - row.told for row in
                self.ledger.database.transact(prl.read_refusals)
                if row.hits > row.told}

    def sink(self, **options: Any) -> Sink:
        """Start a mail server."""
        sink = Sink(**options)
        self.addCleanup(sink.socket.close)
        return sink

    def command(self, *options: str, config: str = "",
                **more: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on the folder's database, here if that will do."""
        given = ("--standalone", self.folder, "-f",
                 self.write("test.yaml", config), *options)
        if more:
            return run(*given, **more)
        return subprocess.CompletedProcess(given, *command(*given))

    def clean(self, sink: Sink | None, *to: str, **settings: object
              ) -> subprocess.CompletedProcess[str]:
        """Run --clean with reports to some addresses."""
        address = sink.address if sink else ("127.0.0.1", 1)
        given = {"report": True, "report_to": list(to),
                 "report_limits": [60, 900], "smtp_server": list(address),
                 **settings}
        return self.command("--clean", config=json.dumps(given))


class ReportTest(ReportsTest):
    """--clean mails who was refused, and forgets what was taken."""

    def test_only_the_reported_windows_are_told(self) -> None:
        for window in (60, 900, 61):
            self.refuse("joe", 2, window)
        sink = self.sink()
        self.clean(sink, "a@x.org")
        self.assertEqual([row[:3] for row in sink.texts()[0]],
                         [["joe", "4/60s", "2"], ["joe", "4/900s", "2"]])
        self.assertEqual(self.untold(), {("joe", 61): 2})

    def test_left_out_the_reported_windows_are_a_day_s_or_all(self) -> None:
        for limits, query, windows in (
                ([[9, 60], [9, 86400]], "", ["4/86400s"]),
                ([[9, 60]], "", ["4/60s", "4/86400s"]),
                ([], "SELECT ?", ["4/60s", "4/86400s"])):
            with self.subTest(limits=limits):
                sink = self.sink()
                for window in (60, 86400):
                    self.refuse(str(len(limits)), 1, window)
                self.clean(sink, f"{len(limits)}@x.org", report_limits=None,
                           limits=limits, sql_limits_by_id=query)
                self.assertEqual([row[1] for row in sink.texts()[0] if
                                  row[0] == str(len(limits))], windows)

    def test_the_mail_is_well_formed(self) -> None:
        self.refuse("jo\u00e9@example.org", 2)
        self.refuse("ann", 11)
        sink = self.sink()
        result = self.clean(sink, "admin@example.org", report_from="p@x.org",
                            report_subject="Who \u00e0")
        self.assertEqual(result.returncode, 0, result.stderr)
        [mail] = sink.mails
        for name, value in (
                ("From", "p@x.org"), ("To", "admin@example.org"),
                ("Subject", "Who \u00e0"), ("MIME-Version", "1.0"),
                ("Auto-Submitted", "auto-generated")):
            self.assertEqual(mail[name], value)
        self.assertTrue(mail["Date"].datetime and mail["Message-ID"])
        self.assertEqual(mail.get_content_type(), "text/plain")
        self.assertEqual([[*row[:3], row[-1]] for row in sink.texts()[0]], [
            ["ann", "4/60s", "11", "192.0.2.7"],
            ["jo\u00e9@example.org", "4/60s", "2", "192.0.2.7"]])

    def test_what_was_taken_is_forgotten(self) -> None:
        self.refuse("joe")
        sink = self.sink()
        for _ in range(2):
            self.assertEqual(self.clean(sink, "a@x.org").returncode, 0)
        self.assertEqual((len(sink.mails), self.untold()), (1, {}))
        self.assertIn("policyd-rate-limit@", sink.mails[0]["From"])
        self.clean(sink, "a@x.org", report_only_if_needed=False)
        self.assertEqual(sink.texts()[1], [])

    def test_what_a_dry_run_let_pass_is_no_refusal(self) -> None:
        sink = self.sink()
        quota = {"by": "server", "limits": [[9, 60]], "dry_run": True}
        for who, told in (("joe", ["joe"]), ("server=all", [])):
            self.refuse("server=all")
            self.refuse(who)
            self.clean(sink, "a@x.org", quotas=[quota])
            self.assertEqual(self.untold(), {})  # nor is it in later reports
            self.assertEqual([row[0] for text in sink.texts()
                              for row in text], told)
            sink.mails.clear()

    def test_a_hit_noted_meanwhile_is_in_the_next_report(self) -> None:
        self.refuse("joe", 2)
        sink = self.sink(taking=lambda: self.refuse("joe", 3))
        self.clean(sink, "a@x.org")
        self.assertEqual(self.untold(), {("joe", 60): 3})

    def test_all_are_told_again_what_one_address_did_not_accept(self) -> None:
        self.refuse("joe", 2)
        sink = self.sink(refuse=("b@x.org",))
        everyone = "a@x.org", "b@x.org", "c@x.org"
        for more in 0, 3:
            self.refuse("joe", more)
            result = self.clean(sink, *everyone)
            self.assertEqual(result.returncode, 8)
            self.assertIn("not accepted for b@x.org: 5.1.1 no such; the next"
                          " one repeats it to every address", result.stderr)
        sink.refuse.clear()
        for _ in range(2):
            result = self.clean(sink, *everyone)
            self.assertEqual(result.returncode, 0, result.stderr)
        told = list(zip(sink.to, [rows[0][2] for rows in sink.texts()]))
        self.assertEqual(told, [
            ("a@x.org", "2"), ("c@x.org", "2"), ("a@x.org", "5"),
            ("c@x.org", "5"), ("a@x.org", "5"), ("b@x.org", "5"),
            ("c@x.org", "5")])

    def test_it_is_one_message_to_all_with_a_delivery_for_each(self) -> None:
        self.refuse("joe")
        sink = self.sink()
        everyone = "a@x.org", "b@x.org", "j\u00f6@x.org"
        result = self.clean(sink, *everyone)
        self.assertEqual(result.returncode, 8)  # the sink has no SMTPUTF8
        self.assertIn("j\u00f6@x.org: ", result.stderr)
        self.assertEqual(sink.to, ["a@x.org", "b@x.org"])
        for name in "Message-ID", "To":
            self.assertEqual(len({mail[name] for mail in sink.mails}), 1)
        self.assertEqual([sum(one.upper().startswith(verb) for one in
                              sink.said) for verb in ("EHLO", "DATA")], [1, 2])

    def test_a_report_has_a_thousand_lines_at_most(self) -> None:
        self.ledger.database.transact(
            prl.Transaction.write, self.ledger.database.backend.add_refusals,
            [prl.Refusal(f"user{n:04}", 60, 1, n + 1, 1000, 1000, "::1")
             for n in range(1007)])
        sink = self.sink()
        self.assertEqual(self.clean(sink, "a@x.org").returncode, 0)
        [rows] = sink.texts()
        self.assertEqual(len(rows), 1001)
        self.assertEqual([rows[0][0], rows[999][0]], ["user1006", "user0007"])
        self.assertEqual(rows[1000][:3], ["and", "7", "more:"])
        self.assertEqual(self.untold(), {})

    def test_what_fails_is_one_line_and_loses_nothing(self) -> None:
        self.refuse("joe", 2)
        login = ["joe", "wrong"]
        for sink, settings, why in (
                (None, {}, "refused"),
                (self.sink(), {"smtp_starttls": True}, "STARTTLS"),
                (self.sink(login="joe:right"), {"smtp_credentials": login},
                 "wrong password"),
                (self.sink(), {"smtp_credentials": login}, "AUTH"),
                (self.sink(refuse=("data",)), {}, "full")):
            with self.subTest(why):
                result = self.clean(sink, "a@x.org", "b@x.org", **settings)
                self.assertEqual(result.returncode, 8)
                [line] = [line for line in result.stderr.splitlines()
                          if "no limit has the window" not in line]
                self.assertIn(why, line)
                self.assertEqual(self.untold(), {("joe", 60): 2})

    def test_a_table_of_the_original_that_is_odd_fails_as_clean_does(
            self) -> None:
        for columns, status in (
                ("'joe' AS id, 60 AS delta, NULL AS hit", 0),
                ("'joe' AS id", 8)):
            with contextlib.closing(sqlite3.connect(
                    self.path("db.sqlite3"))) as other:
                other.execute("DROP TABLE IF EXISTS limit_report")
                other.execute(f"CREATE TABLE limit_report AS SELECT {columns}")
                other.commit()
            self.assertEqual(self.clean(None, "a@x.org").returncode, status)

    def test_without_an_address_hits_are_kept(self) -> None:
        self.refuse("joe")
        result = self.clean(None)
        self.assertEqual((result.returncode, self.untold()),
                         (0, {("joe", 60): 1}))
        self.assertIn("nobody gets reports", result.stderr)
        self.assertIn("nobody gets reports", self.daemon("report: True").log())

    def test_a_login_goes_through_tls(self) -> None:
        certificate = make_certificate(self.folder)
        for mechanism in ("PLAIN", "LOGIN"):
            self.refuse("joe")
            sink = self.sink(certificate=certificate, login="joe:secret",
                             mechanism=mechanism)
            result = self.clean(sink, "a@x.org", smtp_starttls=True,
                                smtp_credentials=["joe", "secret"])
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertTrue(any(one.startswith(f"*AUTH {mechanism}")
                                for one in sink.said))

    def far(self, sink: Sink) -> smtplib.SMTP:
        """Connect to a sink that seems to be on another host."""
        class Far(socket.socket):
            def getpeername(self) -> Any:
                return "192.0.2.1", 25

        smtp = smtplib.SMTP(*sink.address)
        self.addCleanup(smtp.close)
        smtp.file.close()  # type: ignore[union-attr]
        assert smtp.sock is not None
        smtp.sock, smtp.file = Far(fileno=smtp.sock.detach()), None
        return smtp

    def test_a_certificate_is_checked_unless_told_otherwise(self) -> None:
        sink = self.sink(certificate=make_certificate(self.folder))
        with self.assertRaises(ssl.SSLCertVerificationError):
            prl.start_tls_and_login(
                self.far(sink), prl.Settings(smtp_starttls=True))
        prl.start_tls_and_login(self.far(sink), prl.Settings(
            smtp_starttls=True, smtp_tls_verify=False))

    def test_no_password_goes_to_another_host_in_the_clear(self) -> None:
        sink = self.sink(login="joe:secret")
        given = prl.Settings(smtp_credentials=("joe", "secret"))
        with self.assertRaisesRegex(OSError, "only sent encrypted"):
            prl.start_tls_and_login(self.far(sink), given)
        self.assertEqual(sink.said, [])
        with smtplib.SMTP(*sink.address) as near:
            prl.start_tls_and_login(near, given)
        self.assertTrue(sink.said[1].startswith("AUTH"))


class WordingTest(ReportsTest):
    """What the log says can be relied on, whatever a client says."""

    def test_no_value_passes_for_another_field_of_the_log(self) -> None:
        daemon = self.daemon(json.dumps({
            "limits": [[1, 60]], "limit_by_sender": True,
            "log_requests": True, "fail_action": "450 $identity is full",
            "quotas": [{"by": ["sender", "helo_name"], "limits": [[1, 60]],
                        "when": {"sasl_username": "by-quota"}}],
            "limits_by_id": {"by-quota": []}}))
        for forged in (
                "joe>, cost=0, client=198.51.100.9, broken=1/1s",
                "client=198.51.100.9", "a Client=198.51.100.9 x@e.org",
                "xclient=198.51.100.9, broken=1/1s, attempts=9",
                "client_address=198.51.100.9", "\\x3e, identity=<ann",
                "<client=198.51.100.9@e.org"):
            for login in "", "by-quota":
                with self.subTest(forged, login=login):
                    mark = len(daemon.log())
                    for _ in range(2):
                        daemon.ask(sasl_username=login, sender=forged,
                                   helo_name=forged)
                    log = daemon.log()[mark:].lower()
                    for name in "client", "client_address":
                        self.assertEqual(
                            {*re.findall(rf"{name}=(\S*?),?\s", log)},
                            {"192.0.2.7"}, log)
                    [line] = [line for line in log.splitlines()
                              if "attempts=" in line]
                    for field in "broken=", "attempts=", "used=", "identity=":
                        self.assertEqual(line.count(field), 1, line)

    def test_usual_values_are_written_as_they_are(self) -> None:
        daemon = self.daemon("{limit_by_sender: True, log_requests: True}")
        for sender in ("srs0=hhh=tt=e.org=joe@x.org", "joe smith", "jo\u00e9",
                       "bounce+ann=e.org@x.org", "o'neil/#!$%&*{}|~?^`@e.org"):
            daemon.ask(sasl_username="", sender=sender)
            self.assertIn(f"identity=<sender={sender}>, cost=1", daemon.log())
            self.assertIn(f"sender={sender}, ", daemon.log())

    def test_a_database_s_error_is_printable(self) -> None:
        path = self.path("a\nb\u202e")
        done = self.command(
            "--status", "-o", "sqlite_config=" + json.dumps(
                {"database": path}))
        self.assertEqual(done.returncode, 6)
        self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
        self.assertIn("a?b?: ", done.stderr)

    def test_too_many_recipients_are_named_in_log_and_reply(self) -> None:
        for action, said in (
                ("defer_if_permit Retry", "defer_if_permit Retry (too many"
                 " recipients in one message: 5, at most 3)"),
                ("reject", "reject (too many recipients in one message: 5,"
                 " at most 3)"),
                ("HOLD", "HOLD"), ("redirect a@x.org", "redirect a@x.org")):
            daemon = self.daemon(json.dumps(
                {"limits": [[3, 60]], "fail_action": action}),
                name=action.split()[0])
            self.assertEqual(daemon.ask(recipient_count=5), said)
            self.assertIn("attempts=1, too many recipients in one message: 5,"
                          " at most 3, action=", daemon.log())
            self.assertEqual(daemon.ask(recipient_count=3), PASS)
            self.assertEqual(daemon.ask(recipient_count=3), action)


class AlertTest(ReportsTest):
    """Who hits a limit is told of at once, and no mail waits for it."""

    def alarm(self, now: list[float]) -> prl.Alarm:
        """Start an alarm with a clock."""
        for each in prl.log.filters:
            if isinstance(each, prl.Seldom):
                each.said.clear()  # what other tests made it say
        alarm = prl.Alarm(clock=lambda: now[0])
        in_background(alarm.send)
        return alarm

    def settings(self, sink: Sink, **more: Any) -> prl.Settings:
        """Return settings that alert somebody."""
        return prl.Settings(**{"alert": True, "report_to": ("a@x.org",),
                               "smtp_server": sink.address, **more})

    def verdict(self, identity: str, window: int = 86400) -> prl.Verdict:
        """Return the verdict on a mail whose limit is full."""
        use = prl.Usage(prl.Claim(identity, 1, ()), prl.Limit(5, window), 5)
        return prl.Verdict((use,), use)

    def facts(self, mail: email.message.EmailMessage) -> dict[str, str]:
        """Return what an alert says."""
        return dict(line.split(": ", 1)
                    for line in mail.get_content().splitlines())

    def test_the_daemon_alerts_once_a_window(self) -> None:
        sink = self.sink()
        daemon = self.daemon(json.dumps({
            "limits": [[1, 60], [9, 86400]], "alert": True,
            "report_to": "a@x.org", "smtp_server": list(sink.address)}))
        with daemon.client() as client:
            for who in ("joe", "ann"):
                said = [client.ask(sasl_username=who) for _ in range(4)]
                self.assertEqual(said, [PASS] + [REFUSED] * 3)
        sink.wait(2)
        self.assertIn("joe", sink.mails[0]["Subject"])
        facts, host = self.facts(sink.mails[0]), socket.gethostname()
        self.assertIn(f" alert on {host}: joe", sink.mails[0]["Subject"])
        self.assertTrue(facts.pop("since").startswith("20"))
        self.assertEqual(facts, {
            "identity": "joe", "limit": "at most 1 recipient in 1 minute",
            "host": host, "client_address": "192.0.2.7",
            "refusals_since_last_alert": "1",
            "to_block_the_sender": "policyd-rate-limit --block joe"})

    def test_an_alert_names_the_unit_and_the_sender_of_a_quota(self) -> None:
        sink = self.sink()
        quota = {"by": "server", "limits": [[1, 3600]]}
        daemon = self.daemon(json.dumps({
            "alert": True, "report_to": "a@x.org", "quotas": [
                {**quota, "name": "places", "count": "client_network",
                 "dry_run": True},
                {**quota, "name": "size", "count": "bytes"}],
            "smtp_server": list(sink.address)}))
        for n in 0, 1:
            daemon.ask(sasl_username="-jo e$(x)", size=1,
                       client_address=f"192.0.{n}.7")
        sink.wait(2)
        for facts, key, limit, is_tried in zip(
                map(self.facts, sink.mails), ("size=all", "places=all"),
                ("1 byte in", "1 different value of client_network in"),
                (False, True)):
            self.assertEqual(facts["identity"], key)
            self.assertEqual(facts["limit"], f"at most {limit} 1 hour")
            self.assertEqual("only tried" in facts.get("dry_run", ""),
                             is_tried)
            self.assertEqual(
                shlex.split(facts["to_block_the_sender"]),
                ["policyd-rate-limit", "--block=-jo e$(x)"])

    def test_a_dry_run_alerts_too(self) -> None:
        sink = self.sink()
        daemon = self.daemon(json.dumps({
            "limits": [[1, 60]], "alert": True, "dry_run": True,
            "report_to": "a@x.org", "smtp_server": list(sink.address)}))
        self.assertEqual(asks(daemon.socket, 2), [PASS, PASS])
        sink.wait(1)
        self.assertIn("only tried", self.facts(sink.mails[0])["dry_run"])

    def test_an_outage_and_its_end_are_told(self) -> None:
        sink = self.sink()
        daemon = self.daemon(json.dumps({
            "limits": [[1, 60]], "alert": True, "db_timeout": 1,
            "report_to": "a@x.org", "smtp_server": list(sink.address)}))
        daemon.ask(sasl_username="ann")
        with moved_away(daemon.database), locked_folder(daemon.database):
            for _ in range(2):
                daemon.ask(sasl_username="bob")
            sink.wait(2)  # one of them is for bob
        daemon.ask(sasl_username="eve")
        sink.wait(3)
        notices = [facts["notice"] for facts in map(self.facts, sink.mails)
                   if "notice" in facts]
        self.assertTrue(notices[0].startswith(
            "the database is unavailable: "))
        self.assertEqual(notices[1:], ["the database is available again"])

    def test_a_flood_of_refusals_silences_no_outage(self) -> None:
        sink = self.sink()
        alarm, given = self.alarm([0.0]), self.settings(sink)
        for n in range(70):
            alarm.refused(self.verdict(str(n)), "", given, 1000)
        alarm.outage(OSError("gone\nFrom: x"), given)
        wait_for(lambda: any("gone?From: x" in mail.get_content()
                             for mail in sink.mails), "the outage")
        self.assertLessEqual(len(sink.mails), 22)

    def test_an_alert_of_a_blocked_identity_says_why(self) -> None:
        block = prl.Override(prl.BLOCKED, 2000, 1000, "2/60s")
        usage = prl.Usage(prl.Claim("joe", 1, ()), prl.BLOCKED[0], 0)
        facts = prl.facts_of(usage, prl.Verdict((usage,), usage, block=block),
                             "192.0.2.7", prl.Settings(), 1500, 0)
        self.assertEqual((facts["limit"], facts["blocked"]), (
            "blocked", f"until {prl.moment(2000)}, since {prl.moment(1000)},"
            " for exceeding 2/60s"))

    def test_a_client_cannot_write_headers_or_text_into_an_alert(self) -> None:
        sink = self.sink()
        forged = ("=?utf-8?q?x=0afrom=3a=20ceo=40bank.example=0a=0aPay=20now"
                  "?=@e.org")
        daemon = self.daemon(json.dumps({
            "limits": [[1, 60]], "alert": True, "limit_by_sender": True,
            "report_to": "a@x.org", "smtp_server": list(sink.address)}))
        for sender in (forged, "=" * 60 + forged, forged + "\u00e9" * 99,
                       "=?utf-8?b?" + "QUFB" * 40 + "?=@e.org"):
            for _ in range(2):
                daemon.ask(sasl_username="", sender=sender)
            wait_for(lambda: sink.raw, "the alert")
            [[header, _, body]] = [raw.partition(b"\n\n")
                                   for raw in sink.raw]
            with self.subTest(sender):
                parsed = email.message_from_bytes(
                    sink.raw[0], policy=email.policy.default)
                self.assertEqual(parsed.get_all("From"), [
                    f"policyd-rate-limit@{socket.getfqdn()}"])
                self.assertNotIn("\n", parsed["Subject"])
                self.assertNotIn("ceo@bank", parsed["Subject"])
                self.assertNotIn("AAA", parsed["Subject"])
                self.assertIn("= ?utf-8?", parsed["Subject"])
                self.assertNotRegex(body.decode(), r"(?i)=\?utf-8|Pay now")
                self.assertEqual(self.facts(parsed)["identity"],  # as it is
                                 "sender=" + prl.fold(sender))
            sink.raw.clear()

    def test_a_report_from_this_host_is_not_counted(self) -> None:
        config = {"limits": [[0, 60]], "alert": True, "count_mode": "auto",
                  "report_to": ["root", "Admin@x.org"], "limit_by_sender":
                  True, "report_from": "Daemon <d@x.org>",
                  "smtp_credentials": ["mailer", "x"], "smtp_starttls": True}
        report = {"sasl_username": "", "sender": "d@x.org",
                  "recipient": "admin@x.org", "client_address": "127.0.0.1"}
        daemon = self.daemon(json.dumps(config))
        for change, counted in (
                ({}, False), ({"protocol_state": "RCPT"}, False),
                ({"recipient": "root", "client_address": "::1"}, False),
                ({"sasl_username": "mailer"}, False),
                ({"client_address": "192.0.2.1",
                  "server_address": "192.0.2.1"}, False),
                ({"client_address": "192.0.2.1"}, True),
                ({"client_address": "192.0.2.1", "server_address": ""}, True),
                ({"client_address": "unknown", "server_address": "unknown"},
                 True),
                ({"sender": "e@x.org"}, True), ({"sender": "x.d@x.org"}, True),
                ({"sasl_username": "joe"}, True),
                ({"recipient": "joe@x.org"}, True), ({"recipient": ""}, True),
                ({"recipient_count": 2}, True)):
            with self.subTest(change):
                self.assertEqual(
                    daemon.ask(**{**report, **change, "instance": ""}),
                    REFUSED if counted else PASS)
        daemon.stop()
        for extra, sender, counted in (
                ({}, "policyd-rate-limit@any.host", False),
                ({}, "policyd-rate-limit.x@any.host", True),
                ({"alert": False}, "policyd-rate-limit@any.host", True)):
            daemon = self.daemon(json.dumps(
                {**config, "report_from": "", **extra}), name=sender + str(
                    len(extra)))
            self.assertEqual(daemon.ask(**{**report, "sender": sender}),
                             REFUSED if counted else PASS, sender)

    def test_a_mail_server_that_hangs_delays_no_answer(self) -> None:
        sink = self.sink(silent=True)
        daemon = self.daemon(json.dumps({
            "limits": [[0, 60]], "report_limits": [60], "alert": True,
            "report_to": "a@x.org", "smtp_server": list(sink.address)}))
        began = time.monotonic()
        with daemon.client() as client:
            for n in range(200):
                self.assertEqual(client.ask(sasl_username=n), REFUSED)
        self.assertLess(time.monotonic() - began, prl.MAIL_PATIENCE / 2)

    def test_the_next_window_tells_how_many_were_refused(self) -> None:
        sink = self.sink()
        alarm = self.alarm([0.0])
        given = self.settings(sink, report_limits=(86400,))
        for now in (1000, 1001, 87399, 87400, 87401):
            alarm.refused(self.verdict("joe"), "192.0.2.7", given, now)
            alarm.refused(self.verdict("joe", 60), "192.0.2.7", given, now)
        sink.wait(2)
        self.assertIn("last_alert: 3\n", sink.mails[1].get_content())

    def test_twenty_an_hour_and_one_that_says_so(self) -> None:
        sink, now = self.sink(), [0.0]
        alarm, given = self.alarm(now), self.settings(sink)
        for hour in range(2):
            for n in range(30):
                alarm.refused(self.verdict(f"{hour}.{n}"), "", given, 1000)
            sink.wait(21 * (hour + 1))
            self.assertIn("only in the report", sink.mails[-1].get_content())
            # The last of them is dealt with once this one went out.
            alarm.outage(None, given)
            sink.wait(21 * (hour + 1) + 1)
            sink.mails.pop()
            now[0] += 3601

    def test_a_refusal_tells_how_many_there_were_in_this_window(self) -> None:
        for alert in (False, True):
            alarm = prl.Alarm()
            given = prl.Settings(alert=alert, report_limits=(60,))
            told = [alarm.refused(self.verdict("joe", 60), "::1", given, now)
                    for now in (1000, 1059, 1118, 1178, 1178, 500)]
            self.assertEqual(told, [1, 2, 3, 1, 2, 1])
            self.assertEqual(
                alarm.refused(self.verdict("joe"), "::1", given, 1178), 1)

    def test_what_an_alarm_remembers_is_bounded(self) -> None:
        alarm, given = prl.Alarm(), prl.Settings(alert=True)  # sends nothing

        def refuse(identity: str) -> int:
            return alarm.refused(self.verdict(identity), "", given, 1000)

        self.assertEqual([refuse("first"), refuse("first")], [1, 2])
        for n in range(prl.MAX_STREAKS - 1):
            refuse(str(n))
        self.assertEqual([refuse("first"), refuse("new")], [3, 1])
        self.assertEqual([refuse("1"), refuse("0")], [2, 1])

    def test_a_program_finds_the_facts_in_its_environment(self) -> None:
        alarm, out = self.alarm([0.0]), self.path("out")
        given = self.settings(self.sink(), alert_command=(
            "/bin/sh", "-c", f"env > {out}.new; mv {out}.new {out}"))
        with quiet() as said:
            alarm.refused(self.verdict("ann"), "", self.settings(
                self.sink(), alert_command=("/nonexistent",)), 1000)
            alarm.refused(self.verdict("jo\u00e9 $(x)"), "::1", given, 1000)
            wait_for(lambda: os.path.exists(out), "the program")
        self.assertIn("nonexistent", said[0])
        with open(out, encoding="utf-8") as file:
            text = file.read()
        for fact in ("IDENTITY=jo\u00e9 $(x)",
                     "LIMIT=at most 5 recipients in 1 day",
                     "CLIENT_ADDRESS=::1", "REFUSALS_SINCE_LAST_ALERT=1",
                     "TO_BLOCK_THE_SENDER=policyd-rate-limit --block"
                     " 'jo\u00e9 $(x)'"):
            self.assertIn(f"POLICYD_{fact}\n", text)

    def test_an_alert_that_fails_is_left_to_the_report(self) -> None:
        sink = self.sink(refuse=("a@x.org",))
        alarm, given = self.alarm([0.0]), self.settings(sink)
        with quiet() as said:
            alarm.refused(self.verdict("joe"), "", given, 1000)
            wait_for(lambda: said, "a warning")
            sink.refuse.clear()
            alarm.refused(self.verdict("joe"), "", given, 1001)
            alarm.refused(self.verdict("ann"), "", given, 1001)
            sink.wait(1)
        self.assertEqual(said, [
            "alert not sent to a@x.org: 5.1.1 no such"])
        self.assertEqual(self.facts(sink.mails[0])["identity"], "ann")

    def test_a_program_that_hangs_is_killed(self) -> None:
        with self.assertRaisesRegex(OSError, "exit status -9"):
            prl.run_program(["/bin/sh", "-c", "sleep 60 & wait"], {}, 0.1)

    def test_counts_are_logged_and_shown_while_it_runs(self) -> None:
        daemon = self.daemon("{count_mode: 1, limits: [[1, 60]]}")
        path = daemon.pidfile + ".prom"
        for state in ("DATA", "DATA", "RCPT"):
            daemon.ask(protocol_state=state)
        daemon.send(signal.SIGUSR2)
        log = daemon.wait_log("per decision")
        self.assertIn("3 requests, 1 passed, 1 refused, 0 database", log)
        shown = run(*daemon.options, "--prometheus").stdout
        for line in ("up 1", "requests_total 3", "refused_total 1",
                     'used{identity="joe",window="60"} 1'):
            self.assertIn(f"\npolicyd_rate_limit_{line}\n", shown)
        self.assertEqual(daemon.stop(), 0)
        self.assertFalse(os.path.exists(path))
        done = run(*daemon.options, "--prometheus")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn("policyd_rate_limit_up 0\n", done.stdout)

    def test_counts_are_shown_without_a_database(self) -> None:
        daemon = self.daemon("{db_timeout: 1, db_error_action: dunno}")
        daemon.ask()
        os.unlink(daemon.database)
        os.mkdir(daemon.database)  # no file can be opened there
        daemon.ask()
        daemon.send(signal.SIGUSR2)
        daemon.wait_log("per decision")
        done = run(*daemon.options, "--prometheus")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
        for line in "up 1", "database_errors_total 1":
            self.assertIn(f"\npolicyd_rate_limit_{line}\n", done.stdout)

    def test_the_file_of_counts_follows_no_link(self) -> None:
        tally = prl.Tally(self.path("pid"), dict.fromkeys(prl.COUNTED, 0))
        precious = self.write("precious", "text")
        for name in "pid.prom.new", "pid.prom":
            os.symlink(precious, self.path(name))
        tally.publish()
        with open(precious) as file:
            self.assertEqual(file.read(), "text")
        self.assertEqual(
            [line.split()[0] for line in prl.read_counters(self.path("pid"))
             if line[0] != "#"],
            [f"policyd_rate_limit_{name}_total" for name in prl.COUNTED])
        os.symlink(precious, self.path("pid.prom.new"))
        with patch("os.unlink"):  # somebody made it just behind that
            tally.publish()
        with open(precious) as file:
            self.assertEqual(file.read(), "text")

    def test_a_summary_each_hour_if_there_was_anything(self) -> None:
        counts, now = dict.fromkeys(prl.COUNTED, 0), [5.0]
        tally = prl.Tally(self.path("pid"), counts, clock=lambda: now[0])
        with self.assertLogs(prl.log, prl.NOTICE) as logged:
            for requests in (0, 2, 0):
                counts["requests"] += requests
                now[0] += 3600
                tally.publish()
        [said] = logged.output
        self.assertIn("in 60 minutes: 2 requests", said)


class StatusTest(ReportsTest):
    """A person sees who has used how much."""

    config = json.dumps({
        "limits": [[10, 60], [100, 86400]], "limits_by_id": {
            "Boss": [[1000, 3600]], "free": [], "@x.org": [[9, 60]]}})

    def show(self, *options: str, **more: Any) -> str:
        """Run a command and return what it shows."""
        result = self.command(*options, config=self.config, **more)
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        return result.stdout

    def test_who_is_refused_comes_first_then_the_most_used(self) -> None:
        for who, mails in (("ann", 3), ("joe", 10), ("boss", 20), ("x", 0)):
            self.spend(who, mails)
        self.spend("old", 5, time.time() - 90000)
        self.refuse("few", 2)
        self.refuse("many", 3, 86400)
        self.ledger.database.transact(
            prl.Transaction.write, self.ledger.database.backend.add_refusals,
            [("early", 60, 10, 99, 1000, 2000, "", 0)])
        self.show("--limit", "boss", "900/h", "--for", "3w")
        lines = self.show("--status").splitlines()
        self.assertEqual(
            [line.split()[0] for line in lines],
            ["identity", "many", "1d", "few", "1d", "boss", "joe", "1d",
             "ann", "1d", "early", "1d"])
        clock, date = r"\d\d:\d\d", r"\d{4}-\d\d-\d\d"
        for line, shown in (
                (0, "identity +used refusals +last +room +until"),
                (1, rf"many +1m \[\.{{10}}\] +0/10 +3 +{clock}"),
                (5, rf"boss +1h \[#\.{{9}}\] +20/900 +{date}"),
                (6, rf"joe +1m \[#{{10}}\] +10/10 +({clock}|{date})"),
                (10, r"early .* 0/10 +99 1970-01-01")):
            self.assertRegex(lines[line], f"^{shown}$")

    def test_the_worst_fit_the_terminal(self) -> None:
        for n in range(20):
            name = f"a-very-long-name-{n}@mail.example.org"
            self.spend(name, n % 10 + 1)
            self.refuse(name, n if n in (7, 13) else 0)
        config = self.write("test.yaml", self.config)
        here = {**os.environ, "TERM": "dumb"}
        for lines, columns, known in ((24, 80, True), (30, 100, True),
                                      (0, 0, False), (12, 60, False)):
            with self.subTest(lines=lines, columns=columns):
                ours, theirs = open_terminal()
                fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack(
                    "4H", lines * known, columns * known, 0, 0))
                size = {} if known or not lines else {
                    "LINES": str(lines), "COLUMNS": str(columns)}
                result = run("--standalone", self.folder, "-f", config,
                             "--status", env={**here, **size},
                             stdout=theirs if known else subprocess.PIPE)
                os.close(theirs)
                text = (os.read(ours, 9999).decode() if known
                        else result.stdout)
                os.close(ours)
                shown = text.splitlines()
                self.assertRegex(shown[1], r"^a-very-long-n.* 4/10 +13 ")
                self.assertRegex(shown[3], r"^a-very-long-n.* 8/10 +7 ")
                self.assertLessEqual(max(map(len, shown)), columns or 80)
                names = [line for line in shown if line[0] == "a"
                         and line[:4] != "and "]
                if not lines:
                    self.assertEqual((len(names), len(shown)), (20, 41))
                    continue
                self.assertIn(len(shown), (lines - 1, lines - 2))
                self.assertEqual(shown[-1][:12].split()[1],
                                 str(20 - len(names)))

    def test_names_are_whole_in_a_pipe(self) -> None:
        name = "a-very-long-name" * 5 + "@mail.example.org"
        self.spend(name, 3)
        self.assertIn(f"\n{name} 1m [###.......]", self.show(
            "--status", env={"PATH": os.environ["PATH"]}))

    def test_one_identity_with_where_its_limits_come_from(self) -> None:
        self.spend("boss", 20)
        self.refuse("boss", 2, 900)
        shown = self.show("--status", "BOSS")
        place = self.path("test.yaml:1")
        self.assertIn(f"limits, from limits_by_id ({place}):\n    1h", shown)
        self.assertIn("last mail: 2", shown)
        unknown = self.command("--status", "new", config=self.config).stdout
        self.assertIn("last mail: none\n", unknown)
        self.assertIn(f"limits, from limits ({place}):", unknown)
        self.assertNotIn("[", self.show("--status", "free"))
        shown = self.show(
            "--status", "boss", "-o",
            "sql_limits_by_id=SELECT '[[9, 900]]' WHERE %s = 'boss'".replace(
                "%s", "?"))
        self.assertIn("limits, from sql_limits_by_id (-o", shown)
        self.assertIn("):\n   15m", shown)
        self.assertRegex(shown, r"\nrefusals +by +since +last +client\n2 +4/"
                         r"900s +20\d\d-.* 20\d\d-.* 192.0.2.7\n$")
        result = run("--standalone", self.folder, "--status", "new")
        self.assertIn("limits, from limits (the default):", result.stdout)

    def test_json_has_stable_keys(self) -> None:
        self.spend("joe", 4, 1000)
        self.spend("ann", 4)
        self.refuse("joe", 2, 86400)
        self.show("--block", "joe")
        for options in (["--json"], ["--status", "--json"]):
            shown = json.loads(self.show(*options))
            self.assertEqual(list(shown), ["time", "identities"])
            joe, one = shown["identities"]
            self.assertEqual((one["identity"], one["source"], one["until"]),
                             ("ann", "limits", None))
            self.assertEqual((joe["source"], joe["until"], joe["limits"]), (
                "--limit", None, [{"mails": 0, "seconds": 86400, "used": 0,
                                   "room_at": None, "refusals": 2}]))
            [refusal] = joe["refused_by"]
            self.assertLessEqual(refusal.pop("first"), refusal.pop("last"))
            self.assertEqual(refusal, {
                "seconds": 86400, "mails": 4, "refusals": 2,
                "client": "192.0.2.7"})
            self.assertEqual(one["limits"][0], {
                "mails": 10, "seconds": 60, "used": 4, "room_at": None,
                "refusals": 0})
        [one] = json.loads(
            self.show("--status", "joe", "--json"))["identities"]
        self.assertEqual((one["last_mail"], one["limits"][0]["used"]),
                         (1000, 0))

    def test_there_is_room_when_it_says_so_and_not_before(self) -> None:
        random_ = random.Random(1)
        given = prl.Settings(limits=(prl.Limit(10, 60),))
        for n in range(30):
            who, now = f"user{n}", 1000
            while self.spend(who, random_.randint(1, 3), now, 10):
                now += random_.randint(0, 5)
            [standing] = self.ledger.database.read(
                prl.survey, given, now, who)
            [window] = standing.limits
            if window.room_at is None:
                self.assertLess(window.used, 10)
                continue
            for at, passes in ((window.room_at - 1, False),
                               (window.room_at, True)):
                self.assertIs(self.spend(who, 1, at, 10), passes)

    def test_a_quota_of_values_has_room_when_the_oldest_leaves(self) -> None:
        rule = prl.Rule(name="places", by=("sasl_username",),
                        count="client_address", limits=(prl.Limit(2, 60),))
        for n, date in enumerate((1000, 1000, 1010)):
            self.ledger.decide(prl.Mail([prl.Claim(
                "places=joe", 1, rule.limits, rule, str(n))], date))
        [standing] = self.ledger.database.read(
            prl.survey, prl.Settings(quotas=(rule,)), 1020, "places=joe")
        self.assertEqual(standing.limits, (prl.LimitUse(2, 60, 2, 1060, 1),))

    def test_prometheus_can_read_any_name(self) -> None:
        self.spend('a"b\\c\u00e9', 1)
        self.refuse('a"b\\c\u00e9', 5, 60)
        self.show("--limit", 'a"b\\c\u00e9', "[(10, 60)]")
        result = self.command("--prometheus", config=self.config,
                              encoding="utf-8")
        self.assertIn('{identity="a\\"b\\\\c\u00e9",window="60"} 1\n',
                      result.stdout)
        self.assertIn("refusals_total counter\npolicyd_rate_limit_refusals_"
                      'total{identity="a\\"b\\\\c\u00e9",window="60"} 5\n',
                      result.stdout)
        self.assertIn('_limit_ends{identity="a\\"b\\\\c\u00e9"} +Inf\n',
                      result.stdout)
        self.assertEqual(result.stderr, "")

    def test_a_limit_holds_at_once_on_a_daemon_that_runs(self) -> None:
        daemon = self.daemon("limits: [[2, 60]]\nlimits_by_id: {free: []}\n")
        for options, said, answers in (
                ((), "", [PASS, PASS, REFUSED]),
                (("--limit", "JOE", "4/min, 9/days"),
                 "joe: 4/60s, 9/86400s permanently", [PASS, PASS, REFUSED]),
                (("--limit", "joe", "[[5, 60]]", "--for", "2h"),
                 "joe: 5/60s until 20", [PASS, REFUSED]),
                (("--limit", "joe", "[]"), "joe: no limits permanently",
                 [PASS]),
                (("--block", "joe", "--for=30m"), "joe: blocked until 2",
                 [BLOCKED]),
                (("--unlimit", "joe"), "joe: its usual limits apply again",
                 [REFUSED]),
                (("--unlimit", "joe"), "joe: already has its usual limits",
                 [REFUSED]),
                (("--reset", "joe"), "joe: 5 ", [PASS, PASS, REFUSED])):
            with self.subTest(options):
                if options:
                    result = run(*daemon.options, *options)
                    self.assertEqual((result.returncode, result.stderr),
                                     (0, ""))
                    self.assertIn(said, result.stdout)
                self.assertEqual([daemon.ask() for _ in answers], answers)
        self.assertEqual(daemon.ask(sasl_username="free"), PASS)
        self.assertEqual(counted(daemon.database), {"joe": 2})
        self.assertEqual(run(*daemon.options, "--block", "free").stderr, "")
        self.assertEqual(daemon.ask(sasl_username="free"), BLOCKED)
        shown = run(*daemon.options, "--status", "free").stdout
        self.assertIn("limits, from --limit (permanently, since 20", shown)
        self.assertIn(" blocked\n", shown)
        self.assertRegex(shown, "\n1 +blocked +20")
        self.assertRegex(run(*daemon.options, "--status").stdout,
                         r"free +1d \[#{10}\] blocked +1 .* permanent\n")
        self.assertRegex(daemon.log(), "no limits, action=dunno\n(.*\n)*.*"
                         "identity=<free>, cost=1, used=blocked,"
                         " client=192.0.2.7, broken=blocked, attempts=1, ")

    def test_quotas_show_how_they_stand_and_can_be_blocked(self) -> None:
        daemon = self.daemon(json.dumps({
            "limits": [[100, 60]], "quotas": [
                {"by": "sasl_domain", "limits": [[3, 3600]], "limits_by_id":
                 {"free.example": []}},
                {"by": "client_address", "limits": [[9, 60]]},
                {"name": "places", "by": "sasl_username", "dry_run": True,
                 "count": "client_address", "limits": [[2, 60]]}]}))
        for who, n, expected in (
                ("ann@x.org", 1, PASS), ("joe@x.org", 2, PASS),
                ("joe@x.org", 3, PASS), ("joe@x.org", 4, REFUSED),
                ("joe@free.example", 5, PASS)):
            self.assertEqual(daemon.ask(
                sasl_username=who, client_address=f"192.0.2.{n}"), expected)
        shown = run(*daemon.options, "--status").stdout
        for line in (r"sasl_domain=x.org +1h \[#{10}\] 3/3 +1 ..:.. .*",
                     r"places=joe@x.org +1m \[#{10}\] 2/2 +..:.. +dry_run"):
            self.assertRegex(re.sub(" +", " ", shown),
                             f"(?m)^{line.replace(' +', ' ')}$")
        shown = run(*daemon.options, "--status", "places=joe@x.org").stdout
        self.assertRegex(shown, r"limits, from quotas \(.*\), only tried:")
        shown = run(*daemon.options, "--prometheus").stdout
        self.assertIn('_dry_run{identity="places=joe@x.org"} 1\n', shown)
        done = run(*daemon.options, "--block", "sasl_domain=free.example")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual(
            daemon.ask(sasl_username="joe@free.example"), BLOCKED)
        spelt, address = "Client_Address=2001:DB8:0::1", "2001:db8::1"
        for option, expected in (("--block", BLOCKED), ("--unlimit", PASS)):
            done = run(*daemon.options, option, spelt)
            self.assertEqual(done.returncode, 0)
            self.assertIn(f"client_address={address}: ", done.stdout)
            self.assertEqual(daemon.ask(client_address=address), expected)
        self.assertIn(" 1/9\n", run(*daemon.options, "--status", spelt).stdout)

    def test_a_name_s_page_shows_every_limit_that_judges_its_mail(
            self) -> None:
        attribute = "sasl_username"
        daemon = self.daemon(json.dumps({
            "limits": [[9, 60]], "quotas": [
                {"by": "sasl_domain", "limits": [[2, 3600]]},
                {"by": "server", "limits": [[90, 60]],
                 "when": {"server_port": "587"}},
                {"by": "server", "name": "anonymous", "limits": [[1, 60]],
                 "when": {attribute: "!ann@x.org"}},
                {"by": "sender", "limits": [[70, 60]]},
                {"by": "helo_name", "limits": [[70, 60]]},
                {"by": attribute, "name": "places", "count":
                 "client_network", "limits": [[3, 60]]},
                {"by": attribute, "name": "to", "count": "recipient_domain",
                 "limits": [[4, 60]]}]}))
        for n, who in enumerate(("ann@x.org", "joe@x.org", "ann@x.org")):
            daemon.ask(sasl_username=who, sender=who,
                       client_address=f"198.51.{n}.1")
        shown = run(*daemon.options, "--status", "Ann@X.org").stdout
        pages = [page.split("\n") for page in shown.split("\n\n")]
        self.assertEqual([page[0] for page in pages], [
            "ann@x.org", "sasl_domain=x.org", "server=all",
            "sender=ann@x.org", "places=ann@x.org", "to=ann@x.org",
            "anonymous=all"])
        self.assertRegex(pages[0][2], r"^last refusal: 20.* by sasl_domain="
                         r"x\.org 2/3600s, client 198\.51\.2\.1$")
        self.assertIn("[##########] 2/2", pages[1][3])
        self.assertIn("the mail's server_port matches `when`", pages[2][2])
        self.assertRegex("\n".join(pages[4]),
                         r"value +last seen\n198\.51\.0\.0/24 +20\d\d-")
        shown = run(*daemon.options, "--status", "ann@x.org", "--json").stdout
        places = json.loads(shown)["identities"][4]
        self.assertEqual([value["value"] for value in places["values"]],
                         ["198.51.0.0/24"])
        self.assertIn("broken=sasl_domain=x.org 2/3600s, attempts=1",
                      daemon.log())
        shown = run(*daemon.options, "--status", "to=ann@x.org").stdout
        self.assertEqual(shown.count("last mail"), 1)

    def test_what_judges_a_page_is_what_judges_a_mail(self) -> None:
        for settings, name, keys in (
                ({}, "joe", "joe"), ({"limit_by_sasl": False}, "joe", ""),
                ({"limit_by_sasl": False, "limit_by_sender": True},
                 "joe@x.org", "joe@x.org"),
                ({"limit_by_ip": True, "limited_networks": ["192.0.2.0/24"]},
                 "192.0.2.9", "192.0.2.9"),
                ({"count_mode": 0}, "joe", "joe"),
                ({"quotas": [{"by": "client_network", "limits": [[1, 60]]}]},
                 "192.0.2.9", "client_network=192.0.2.0/24"),
                ({"quotas": [{"by": "sasl_username", "count": "bytes",
                              "limits": [[1, 60]]}]},
                 "joe", "joe sasl_username=joe")):
            with self.subTest(settings=settings):
                self.assertEqual(
                    list(prl.related_keys(settings_of(settings), name)),
                    keys.split())

    def test_no_queue_id_or_address_forges_a_field_of_the_log(self) -> None:
        daemon = self.daemon("limits: [[0, 60]]\n")
        forged = "X, identity=<eve>, action=dunno"
        daemon.ask(queue_id=forged, client_address=forged)
        for text in "identity=<eve>", "action=dunno":
            self.assertNotIn(text, daemon.log())
        self.assertIn("identity=<joe>, ", daemon.log())

    def test_the_log_says_why_a_mail_is_not_counted(self) -> None:
        for options, attributes, why in (
                ((), {"sasl_username": ""},
                 "no limit_by_... setting and no quota applies"),
                (("-o", "count_mode=0"), {},
                 "count_mode 0 does not count at this state")):
            daemon = self.daemon("", *options, name=f"d{len(options)}")
            self.assertEqual(daemon.ask(**attributes), PASS)
            self.assertIn(f"protocol_state=DATA, not counted ({why}),"
                          " action=dunno\n", daemon.log())

    def test_a_name_that_is_not_counted_has_no_limits(self) -> None:
        self.spend("other", 1)
        for name, config, limits in (
                ("192.0.2.1", "limit_by_ip: False", False),
                ("joe", "limit_by_sasl: False", False),
                ("192.0.2.1", "{limit_by_ip: True, limited_networks:"
                 " [192.0.2.0/24]}", True)):
            shown = self.command("--status", name, config=config).stdout
            self.assertIs("limits, from limits (" in shown, limits)
            self.assertIs("limits: none; the configuration" in shown,
                          not limits)
        self.command("--block", "192.0.2.1")
        self.assertIn("blocked", self.show("--status", "192.0.2.1"))

    def test_a_pattern_lists_the_recorded_identities_that_fit(self) -> None:
        for who in ("joe@x.org", "ann@x.org", "joe@y.org", "10.1.2.3",
                    "11.1.2.3", "sasl_domain=x.org", "places=tom@x.org",
                    "client_network=10.9.0.0/24"):
            self.spend(who, 1, time.time() - 10**6)
        config = json.dumps({"quotas": [
            {"by": by, "limits": [[1, 60]]}
            for by in ("sasl_domain", "client_network")]})
        for pattern, names in (
                ("@X.org", "joe@x.org ann@x.org sasl_domain=x.org"
                 " places=tom@x.org"),
                ("10.0.0.0/8", "10.1.2.3 client_network=10.9.0.0/24"),
                ("@none.org", "")):
            for option in (), ("--json",):
                done = self.command("--status", pattern, *option,
                                    config=config)
                self.assertEqual(done.stderr, "")
                if option:
                    found = [one["identity"] for one in
                             json.loads(done.stdout)["identities"]]
                else:
                    found = [line.split()[0] for line in
                             done.stdout.splitlines()[1:] if line[0] != " "]
                self.assertEqual(sorted(found), sorted(names.split()))

    def test_keys_of_quotas_that_are_gone_are_judged_by_none(self) -> None:
        keys = "sasl_domain=x.org", "places=joe@x.org", "sender+helo_name=a|b"
        senders = "bounce=joe=x@y.org", "uid=joe,dc=x"
        for name in (*keys, *senders):
            self.spend(name, 3)
            self.refuse(name, 1)
        config = "limit_by_sender: False"
        shown = self.command("--prometheus", config=config).stdout
        for name in keys:
            self.assertNotIn(f'used{{identity="{name}"', shown)
            self.assertIn(f'refusals_total{{identity="{name}"', shown)
            page = self.command("--status", name, config=config).stdout
            self.assertIn("limits: none; the configuration counts no", page)
            self.assertIn("last mail: 20", page)
        for name, config in zip(senders, (
                "limit_by_sender: True", "limit_by_sender: False")):
            self.assertIn(f'used{{identity="{name}"', self.command(
                "--prometheus", config=config).stdout)

    def test_it_is_read_in_steps(self) -> None:
        for n in range(2 * prl.SURVEY_STEP):
            self.spend(f"user{n:04}", 1)
        steps = 0

        def wanted(name: str) -> bool:
            nonlocal steps
            if steps == 0 or name == "zoe":
                steps += 1
                self.spend("zoe", 1)  # seen by a later transaction alone
            return True

        statuses = self.ledger.database.read(
            lambda work: prl.survey(work, prl.Settings(), int(time.time()),
                                    wanted=wanted))
        names = [status.identity for status in statuses]
        self.assertEqual((steps, names[-1]), (2, "zoe"))
        self.assertEqual(len({*names}), 2 * prl.SURVEY_STEP + 1)
        self.assertEqual(len(names), len({*names}))

    def test_prometheus_is_bounded_and_explained(self) -> None:
        for n in range(prl.MAX_FULLEST + 20):
            self.spend(f"user{n:03}", n + 1)
        for n in range(3):
            self.refuse(f"refused{n}")
        self.show("--block", "user000", "--for", "1h")
        shown = self.show("--prometheus")
        names = {*re.findall(r'_used{identity="(\w+)"', shown)}
        self.assertEqual(names, {
            *(f"refused{n}" for n in range(3)), "user000",
            *(f"user{n + 20:03}" for n in range(prl.MAX_FULLEST))})
        metrics = re.findall(r"# TYPE policyd_rate_limit_(\w+)", shown)
        self.assertEqual(
            metrics, re.findall(r"# HELP policyd_rate_limit_(\w+) .", shown))
        self.assertEqual({*metrics}.union(
            f"{name}_total" for name in prl.COUNTED), {*prl.METRICS})

    def test_a_typo_is_told(self) -> None:
        self.spend("joe", 1)
        self.refuse("ann")
        for options in (("--limit", "jo", "3/h"), ("--block", "jo"),
                        ("--reset", "jo")):
            for name, warned in (("jo", True), ("joe", False),
                                 ("ann", False), ("free", False),
                                 ("jo@x.org", True)):
                result = self.command(
                    options[0], name, *options[2:], config=self.config)
                self.assertEqual(result.returncode, 0)
                self.assertEqual("check the spelling" in result.stderr,
                                 warned, (options, name))
            for name in "jo", "jo@x.org":
                self.show("--unlimit", name)

    def test_a_limit_that_is_only_tried_is_told(self) -> None:
        config = json.dumps({"quotas": [
            {"by": "server", "limits": [[9, 60]], "dry_run": True}]})
        for key, override, told in (
                ("server=all", "dry_run=no", True),
                ("joe", "dry_run=no", False), ("joe", "dry_run=yes", True)):
            for options in ("--block", key), ("--limit", key, "3/h"):
                with self.subTest(options, override=override):
                    result = self.command(
                        *options, "-o", override, config=config)
                    self.assertEqual(result.returncode, 0)
                    self.assertEqual(
                        f"warning: {key}: dry_run is set, so none of its mail"
                        " is refused\n" in result.stderr, told)

    def test_reset_forgets_and_says_how_much(self) -> None:
        self.spend("joe", 7)
        self.spend("ann", 1)
        self.assertIn("joe: 7 ", self.show("--reset", "Joe"))
        self.assertIn("ann: 1 ", self.show("--reset", "ann"))
        self.assertNotIn("joe", self.show("--status"))

    def test_the_original_s_table_is_read_and_not_changed(self) -> None:
        os.makedirs(self.path("old"))
        path = self.path("old/db.sqlite3")
        with contextlib.closing(sqlite3.connect(path)) as old:
            old.execute("CREATE TABLE mail_count (id varchar(40) NOT NULL,"
                        " date bigint NOT NULL)")
            old.executemany("INSERT INTO mail_count VALUES ('Joe', ?)",
                            [(int(time.time()),)] * 10)
            old.commit()
        with open(path, "rb") as file:
            before = file.read()
        shown = run("--standalone", self.path("old"), "--status").stdout
        self.assertRegex(shown, r"Joe +1m \[#{10}\] +10/10\n")
        with open(path, "rb") as file:
            self.assertEqual(file.read(), before)
        self.assertEqual(os.listdir(self.path("old")), ["db.sqlite3"])

    def test_a_missing_database_is_not_made(self) -> None:
        os.makedirs(self.path("none"))
        for command, status in (
                ("--status", 6), ("--json", 6), ("--prometheus", 0)):
            result = run("--standalone", self.path("none"), command)
            self.assertEqual(result.returncode, status)
            self.assertEqual(result.stderr.count("\n"), 1, result.stderr)
        self.assertEqual(os.listdir(self.path("none")), [])

    def test_a_closed_pipe_is_no_traceback(self) -> None:
        self.spend("joe", 1)
        end, out = os.pipe()
        os.close(end)
        with os.fdopen(out, "wb") as closed:
            result = run("--standalone", self.folder, "--status",
                         stdout=closed)
        self.assertEqual((result.returncode, result.stderr), (0, ""))

    def test_colours_are_for_terminals(self) -> None:
        self.spend("joe", 10)
        config = self.write("test.yaml", self.config)
        for extra, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
            ours, theirs = open_terminal()
            run("--standalone", self.folder, "-f", config, "--status",
                stdout=theirs, check=True, env={
                    **os.environ, "NO_COLOR": "", "TERM": "xterm", **extra})
            os.close(theirs)
            self.assertIs(b"\033[31m" in os.read(ours, 1000), coloured)
            os.close(ours)
        self.assertNotIn("\033", self.show("--status"))

    def test_usage_errors_are_argparse_s(self) -> None:
        for options in (["--json", "--clean"], ["--status", "--reset", "x"],
                        ["--reset"], ["--limit", "x"], ["--for", "1d"],
                        ["--limit", "x", "5"], ["--limit", "x", "1/fortnight"],
                        ["--limit", "x", "-1/h"], ["--limit", "x", "[5]"],
                        ["--limit", "x", "/h"], ["--limit", "x", "1/h,"],
                        ["--limit", "x", "1/0s"], ["--status", "--for", "1d"],
                        ["--block", "x", "--for", "long"],
                        ["--block", "x", "--for", "0"],
                        ["--block", "x", "--for", ""],
                        ["--block", "x", "--unlimit", "x"],
                        ["--block", ""], ["--limit", "", "3/h"],
                        ["--unlimit", ""], ["--reset="]):
            # Without a command it would be a daemon, which has no place here.
            more: Any = {"timeout": 9} if options[0] == "--for" else {}
            result = self.command(*options, **more)
            self.assertEqual((result.returncode, result.stdout), (2, ""))
            self.assertIn("Usage:", result.stderr)

    @slow
    def test_five_times_the_identities_take_five_times_as_long(self) -> None:
        took = [self.cpu_seconds_with(count) for count in (20_000, 100_000)]
        self.assertLess(took[1], 10 * took[0])

    identities = 0  # in the table

    def cpu_seconds_with(self, identities: int) -> float:
        """Return what --status takes with so many identities."""
        now = int(time.time())
        self.ledger.database.transact(lambda work: work.cursor.executemany(
            "INSERT INTO mail_count VALUES (?, ?, 1, '', 'DATA', ?)",
            ((f"user{n}@{identities}.org", now - 40 + i * 20, i + 1)
             for n in range(identities - self.identities) for i in range(3))))
        self.identities = identities
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        self.assertIn(f"and {identities - 10} more", self.show(
            "--status", env={**os.environ, "LINES": "24"}))
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


YAML_READ: list[tuple[str, Any]] = [
    ("", None), ("# c\n---  # c\n", None), ("[1]", [1]), ("---#", "---#"),
    ("\ufeffa: 1\r\nb: 2\r\n", {"a": 1, "b": 2}),
    ("---\n  a: 1\n  b: 2", {"a": 1, "b": 2}),
    ("a: 1\n...", {"a": 1}), ("a\n...  # c\n\n# d\n", "a"), ("...", None),
    ("a: b\n  #c", {"a": "b"}), ("a\nb", "a b"), ("'\nb'", " b"),
    ("a:\n  b\n\n  c  # d\ne: f\n \n\n g\n h", {
        "a": "b\nc", "e": "f\n\ng h"}),
    ("- a b \n  - c :d\n -e\n- - 1\n   2", ["a b - c :d -e", ["1 2"]]),
    ("a: 'b  \n\n   c''\n \\\n d'\ne: 'f\n '", {"a": "b\nc' \\ d", "e": "f "}),
    ('- "a\\\n  \\ b\\t\n  \\  c  d\\n\n\n  e\\"\n "', [
        "a b\t   c  d\n\ne\" "]),
    ("[a\n b, 'c\n  d', {e: f\n\n g}]", ["a b", "c d", {"e": "f\ng"}]),
    ("a:\n- [1, 2]\n-\nb:", {"a": [[1, 2], None], "b": None}),
    ("a:\n  - 1\n\n  # c\n  -   2", {"a": [1, 2]}),
    ("- - 1\n  - 2\n- - - 3", [[1, 2], [[3]]]),
    ("- k: 1\n  l:\n  - 2\n  m:\n    3\n-\n  n: 4", [
        {"k": 1, "l": [2], "m": 3}, {"n": 4}]),
    ("a: {b: 1, c: [2,\n3, # c\n], 'd':e,}", {
        "a": {"b": 1, "c": [2, 3], "d": "e"}}),
    ("{b: , c:\n1, 'd' :}", {"b": None, "c": 1, "d": None}),
    ("'it''s': \"\\t\\\\\\\"\\/\\n\\x41\\u00e9\"", {"it's": "\t\\\"/\nA\xe9"}),
    ("'a: b': 1\n\"c\" : 2", {"a: b": 1, "c": 2}),
    ("u: http://x/y#z\nv: a b # c", {"u": "http://x/y#z", "v": "a b"}),
    ("::1: a\nfe80::1:\n  - ::/0\nx@y: -z\n1.2.3.4: .git\nfe80::: .", {
        "::1": "a", "fe80::1": ["::/0"], "x@y": "-z", "1.2.3.4": ".git",
        "fe80::": "."}),
    ("1:2:3:4:5:6:7:8: [1:2:3:4:5:6:7:8]", {
        "1:2:3:4:5:6:7:8": ["1:2:3:4:5:6:7:8"]}),
    ("[yes, Yes, YES, yEs, y, off, True]", [
        True, True, True, "yEs", "y", False, True]),
    ("[~, null, Null, NULL, nUll]", [None, None, None, None, "nUll"]),
    ("[0, -0, +7, 0666, 08, 12, 0o666]", [0, 0, 7, "0666", "08", 12, "0o666"]),
    ("1: a\n~: c\n'<<': '='", {1: "a", None: "c", "<<": "="}),
]
ODD = """
0x1F 0b1 1_000 .5 1e5 1.5e+3 .inf -.INF .nan -08 2024-12-31 << =
1111111111111111111 @b `b &b *b !!str %b | > |- ? - :
"""
YAML_REFUSED = [
    *((f"\na: {odd}\n", 2, odd) for odd in ODD.split()),
    ("<<: {a: 1}", 1, "put quotes around <<"), ("[::1]", 1, "around ::1"),
    ("a: 2024-12-31 10:00:00", 1, "put quotes around 2024-12-31 10:00:00"),
    ("- fe80::", 1, "put quotes around fe80::"), ("a: b: c", 1, "around b: c"),
    ("'a''", 1, "same line"), ("[a: 1]", 1, "put quotes around a: 1"),
    ("a: 'b' c", 1, "cannot read"),
    ("a:\n  c: 1\n\tb: 1", 3, "tab"), ("a:\tb", 1, ""), ("a: b\t", 1, "tab"),
    ("a: b\nc", 2, "not `key: value`"), ("a: b # c\n  d", 2, "several lines"),
    ("a: b\n  c: d", 2, "indentation"), ("a: b\n c d: e", 2, "cannot read"),
    ("a: 'b\nc'", 1, "same line"), ("\n\"b", 2, "same line"),
    ("a:\n  b: 'c\n  d'", 2, "same line"), ("- 'b\n  c", 1, "same line"),
    ("'a\n b': c", 1, "not `key: value`"), ("[a\n b: c]", 2, "missing , or ]"),
    ("a: 1\nb: 2\n'a': 3", 3, "a is given twice, first in line 1"),
    ("- a:\n    b:\n    b:\n", 3, "b is given twice, first in line 2"),
    ("a: {b: 1, 1: 2,\n\"1\": 3}", 2, "1 is given twice, first in line 1"),
    *((f'a: "\\{wrong}"', 1, "write \\ as \\\\") for wrong in (
        "q", "x4", "u123", "ud800", "U00000041", "e")),
    ("%YAML 1.1\n---\na: 1", 2, "'---' is not"), ("--- a", 1, "'---' is not"),
    ("a: 1\n---\nb: 2", 2, "'---' is not"), ("a\n...\n...", 2, "'...' is"),
    ("...\na", 1, "'...' is not"),
    *((f"a:\n {bad}", 2, "not allowed") for bad in "\a\r\u2028\ud800\ufeff"),
    ("a: [1, 2\n\n", 1, "missing , or ] before the end"), ("{", 1, "the end"),
    ("\na: [1, 2\nb: 1\n", 3, "missing , or ] before b: 1"),
    ("a: {b: ]}", 1, "around ]}"), ("[,]", 1, "around ,]"),
    ("[a]: b", 1, "cannot read"), ("{[a]: b}", 1, "not `key: value`"),
    ("{a}", 1, "not `key: value`"), ("{a:1}", 1, "not `key: value`"),
    ("a: 1\n b: 2", 2, "indentation"), ("a:\n  b: 1\n c: 2", 3, "indent"),
    ("- 1\nb: 2", 2, "indentation"), ("a: 1\nb", 2, "not `key: value`"),
    ("a: 1\nb: [10, 99999999999999999999]", 2, "this number is too large:"
     " 99999999999999999999"), ("{1: a,\n1.0: b}", 2, "1.0 is given twice"),
    ("1: a\n1.0: b", 2, "1.0 is given twice, first in line 1"),
    ("yes: a\nb:\ntrue: b", 3, "True is given twice, first in line 1"),
    ("[" * 51 + "]" * 51, 1, "levels"), ("- " * 51 + "a", 1, "levels"),
    ("a" * 1025 + ": b", 1, ""), ("9" * 5000, 1, ""),
]
RUBBISH = [
    "[", "{", "- ", "- a: ", "{a: ", "'", '"', "\\", "a ", "a:", " ", "\n",
    "# \n", "a: 1\n", "- 1\n", "[],", "[a, ", "1:", "1_", "'' ", "\t", ": ",
    '"\\x', "---\n", "a b\n", " a\n", "0", "- - -\n", "''", "? ", "a  ",
    "a\n ", "a\n\n ", "a \n", "\\\n ", "\\ ", "a  \n  ", "...\n", "...\n#\n"]
GOOD = """
a b 1 0 -0 +5 0666 no ON y null Null 'q' "d" ::1 x@y 10.0.0.1 a:b a~b [] {}
"""
RARE = r"""
00 1.2.3 - -- --- ... ?a :a : :: fe80:: http://x a#b #c ~ / , a,b a[b a]b é
a{b a?b a'b a"b 'it''s' '' "" "\t" "\x41" "\q" "\u00e9" 'a~"b' a:~b a~#b -a
[~a,~b~] {a:~b} {a} [a:~b] {"a":1} 1:30.5 +.1_ \ "a'~ \t \ufeff --- ...
""" + GOOD + ODD


def block(rng: random.Random, indent: int, depth: int) -> str:
    """Make lines of a sequence or mapping in a column, or a scalar."""
    words = (RARE if rng.random() < .1 else GOOD).replace("\n", " ")
    few = [word.replace("~", " ") for word in rng.choices(words.split(), k=3)]
    if depth == 0 or rng.random() < .2:
        gap = rng.choice([", ", ",", ",\n", " ,", ", # c\n "])
        few += [f"[{gap.join(few)}]", f"{{{few[0]} : {few[1]}{gap}}}"]
        line = rng.choice(["\n", " \n", "\n\n", "\\\n"]) + " " * (indent + 1)
        few += [line.join(few[:2]), f'"{line.join(few[:2])}"',
                f"'{line.join(few[:2])}'"]
        return rng.choice(few) + rng.choice(["\n", "\n", " \n", " # c\n"])
    text, dash = "", rng.random() < .5
    for key in few[:rng.randrange(1, 4)]:
        text += " " * indent if text else ""
        text += "-" if dash else key + rng.choice([":", ":", " :"])
        more = indent + rng.choice([1, 2, 4] if dash else [0, 1, 2, 4])
        text += rng.choice([
            "\n" + " " * more + block(rng, more, depth - 1), "\n", " # c\n",
            " " * (more - indent or 1)
            + block(rng, more + 1, depth - 1 if dash else 0)])
    return text


def document(rng: random.Random) -> str:
    """Make a document that is likely to be nearly right."""
    text = rng.choice(["", "", "", "---\n", "\ufeff", "# c\n", "  "])
    text += block(rng, 0, rng.randrange(5))
    while rng.random() < .3:
        at = rng.randrange(len(text) + 1)
        text = (text[:at] + rng.choice(list(" \n\t:-#'\",[]{}?&a\\") + [
            "", "", ": ", "- ", "\n  ", "\n...\n", "\r\n"])
            + text[at + rng.randrange(3):])
    return text


ACTION = ("defer_if_permit Rate limit reached for your account, please retry"
          " later or contact the postmaster")
LONG = {
    "fail_action": ACTION, "subject": f"{ACTION}: see http://x/y # 'no'",
    "sql": "SELECT limits FROM my_limits WHERE id = lower(?) AND enabled = 'y'"
           " AND \"x\" = 1 OR something = '%s' OR y",
    "tabs": "a\tb " * 30, "lines": f"a\nb\n\nc {ACTION}", "umlauts": "é " * 60,
    "list": [ACTION, ACTION.replace(",", ""), [10, 60]], "in": {"x": ACTION}}
RUAMEL = r"""
fail_action: defer_if_permit Rate limit reached for your account,~
  please retry later or contact the postmaster
subject: "defer_if_permit Rate limit reached for your account, please retry
  later or contact the postmaster: see http://x/y # 'no'"
sql: SELECT limits FROM my_limits WHERE id = lower(?) AND enabled =~
  'y' AND "x" = 1 OR something = '%s' OR y
tabs: "a\tb a\tb a\tb a\tb a\tb a\tb a\tb a\tb a\tb a\tb a\tb a\tb a\tb
  a\tb a\tb a\tb a\tb a\tb a\tb a\tb a\tb a\tb a\tb a\tb a\tb a\tb a\tb
  a\tb a\tb a\tb "
lines: "a\nb\n\nc defer_if_permit Rate limit reached for your account, please
  retry later or contact the postmaster"
umlauts: 'é é é é é é é é é é é é é é é é é é é é é é é é é é é é é é é
  é é é é é é é é é é é é é é é é é é é é é é é é é é é é é '
list:
- defer_if_permit Rate limit reached for your account, please retry~
  later or contact the postmaster
- defer_if_permit Rate limit reached for your account please retry~
  later or contact the postmaster
- - 10
  - 60
in:
  x: defer_if_permit Rate limit reached for your account, please retry
    later or contact the postmaster
""".replace("~\n", " \n")


class TestReader(unittest.TestCase):
    """What is read and what is refused."""

    def test_a_document_of_the_subset_is_read(self) -> None:
        for text, value in YAML_READ:
            with self.subTest(text=text):
                self.assertEqual(repr(prl.parse_yaml(text)[0]), repr(value))

    def test_anything_else_is_refused_with_its_line_and_advice(self) -> None:
        for text, line, message in YAML_REFUSED:
            with self.subTest(text=text[:60]):
                with self.assertRaises(prl.YamlError) as caught:
                    prl.parse_yaml(text)
                self.assertEqual(caught.exception.line, line)
                self.assertIn(message, str(caught.exception))

    def test_the_lines_of_keys_are_told(self) -> None:
        for text, lines in (
                ("\n# c\na:\n  b: 1\nc: 'd\n e'\n1: 3", {
                    ("a",): 3, ("a", "b"): 4, ("c",): 5, ("1",): 7}),
                ("{a: 1,\n b: {c: 1}}", {("a",): 1, ("b",): 2, ("b", "c"): 2}),
                ("- a:\n- a: 1", {("0", "a"): 1, ("1", "a"): 2}),
                ("q:\n  - a: [1]\n    b: {c: [{d: 1},\n      {d: 2}]}", {
                    ("q",): 1, ("q", "0", "a"): 2, ("q", "0", "b"): 3,
                    ("q", "0", "b", "c"): 3, ("q", "0", "b", "c", "0", "d"): 3,
                    ("q", "0", "b", "c", "1", "d"): 4})):
            with self.subTest(text=text):
                self.assertEqual(prl.parse_yaml(text)[1], lines)
                if yaml is not None:
                    self.assertEqual(prl.parse_with_pyyaml(text)[1], lines)

    def test_a_key_given_twice_is_refused_wherever_it_stands(self) -> None:
        for text, line in (
                ("a: 1\nb: 2\na: 3", 3), ("a: {b: 1,\n b: 2}", 2),
                ("quotas:\n- limits: []\n  by: x\n  limits: [1]", 4),
                ("- [[1], {a: {b: {c: 1,\n c: 2}}}]", 2)):
            with self.subTest(text=text):
                # The anchor is one that only PyYAML reads.
                for whole in (text, "- &x" + text[1:] if text[0] == "-" else
                              text.replace(": ", ": &x ", 1)):
                    with self.assertRaisesRegex(
                            prl.ConfigError, f"^f:{line}: .* is given twice"
                            if yaml or whole == text else ""):
                        prl.read_yaml(whole, "f")

    def test_keys_are_compared_as_what_they_mean(self) -> None:
        for text, line in (
                ("{1: [], 1.0: []}", 1), ("1: []\n1.0: []", 2),
                ("no: []\nfalse: []", 2), ("a: {no: 1,\nOFF: 2}", 2),
                ("1: []\nyes: []", 2), ("~: []\nnull: []", 2),
                ("- - 12: a\n    '12': b", 2)):
            with self.subTest(text=text):
                with self.assertRaises(prl.YamlError) as caught:
                    prl.parse_yaml(text)
                self.assertEqual(caught.exception.line, line)
                if yaml is not None:
                    with self.assertRaises(prl.YamlError) as caught:
                        prl.parse_with_pyyaml(text)
                    self.assertEqual(caught.exception.line, line)
        if yaml is not None:  # 0x10 is a number to PyYAML alone
            with self.assertRaisesRegex(prl.YamlError, "16 is given twice"):
                prl.parse_with_pyyaml("0x10: a\n16: b")

    def test_numbers_with_colons_are_text(self) -> None:
        for text in ("2001:10:20:30:40:50:1:2", "1:30", "-1:30", "190:20:30",
                     "190:20:30.15", "1_0:30"):
            for whole, value in ((f"{text}: a", {text: "a"}),
                                 (f"a: {text}", {"a": text}),
                                 (f"[{text}]", [text])):
                with self.subTest(whole=whole):
                    self.assertEqual(prl.parse_yaml(whole)[0], value)
                    if yaml is not None:
                        self.assertEqual(
                            prl.parse_with_pyyaml(whole)[0], value)
                        self.assertEqual(prl.parse_with_pyyaml(
                            f"- &x 1\n- {whole}\n- *x")[0], [1, value, 1])

    def test_aliases_of_aliases_are_read_once(self) -> None:
        if yaml is None:
            skip("PyYAML is missing")
        text = "a0: &a0 {b: 1}\n" + "".join(
            f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n"
            for n in range(1, 30))
        self.assertEqual(len(prl.read_yaml(text, "f")[1]), 31)

    def test_rubbish_is_refused_or_read_quickly(self) -> None:
        size = 40_000 if QUICK else 100_000

        def spent(size: int) -> float:
            start = time.process_time()
            with contextlib.suppress(prl.YamlError):
                prl.parse_yaml(head + piece * (size // len(piece)))
            return time.process_time() - start

        for piece in RUBBISH:
            for head in ("", "a: ", "- ", "[", '"'):
                with self.subTest(piece=piece, head=head):
                    # Of eight times the size; its square would take 64 times.
                    # A busy machine may stand still in one of some tries.
                    self.assertTrue(any(
                        spent(size) < 24 * spent(size // 8) + 0.1
                        for _ in range(5)))

    def test_what_ruamel_folds_is_read(self) -> None:
        self.assertEqual(prl.parse_yaml(RUAMEL)[0], LONG)

    def test_what_pyyaml_dumps_is_read(self) -> None:
        if yaml is None:
            skip("PyYAML is missing")
        for options in (
                {}, {"default_flow_style": None}, {"default_flow_style": True},
                {"indent": 4, "allow_unicode": True}, {"explicit_end": True},
                {"explicit_start": True, "width": 20}):
            with self.subTest(options=options):
                text = str(yaml.safe_dump(LONG, **options))
                self.assertEqual(prl.parse_yaml(text)[0], LONG, text)

    def test_each_pattern_takes_what_stands_beside_it(self) -> None:
        with open(PROGRAM, encoding="utf-8") as file:
            source = file.read()
        beside = dict(re.findall(
            r'^(YAML_\w+) = re.*# (".*", not "[^"]*")', source, re.M))
        [beside["YAML_TEXT"]] = re.findall(
            r"^@functools.cache  # (.*)\ndef text_pattern", source, re.M)
        patterns = {**vars(prl), "YAML_TEXT": prl.text_pattern(False, 0)}
        for name, pattern in patterns.items():
            if name.startswith("YAML_") and isinstance(pattern, re.Pattern):
                with self.subTest(name=name):
                    taken, refused = map(
                        ast.literal_eval, beside[name].split(", not "))
                    self.assertTrue(pattern.fullmatch(taken))
                    self.assertFalse(pattern.fullmatch(refused))

    def test_what_is_read_is_read_as_pyyaml_reads_it(self) -> None:
        if yaml is None:
            skip("PyYAML is missing")
        rng, read = random.Random(1), 0
        tries = 2000 if QUICK else 6000
        for _ in range(tries):
            text = document(rng)
            with contextlib.suppress(prl.YamlError):
                value = prl.parse_yaml(text)[0]
                odd = [yaml.YAMLError] if value is None else []  # "..." alone
                with contextlib.suppress(*odd):
                    self.assertEqual(repr(value), repr(
                        prl.parse_with_pyyaml(text)[0]), text)
                read += 1
        self.assertGreater(read, tries * .3)


class ConfFileTest(FolderTest):
    """Which file is read, and how."""

    def read(self, text: str, name: str = "test.conf") -> dict[str, Any]:
        """Return the values of a file with this text."""
        return prl.read_config(self.write(name, text)).values

    def test_first_of_four_files_is_read(self) -> None:
        self.assertEqual(prl.CONFIG_FILES, (
            "~/.config/policyd-rate-limit.conf",
            "~/.config/policyd-rate-limit.yaml",
            "/etc/policyd-rate-limit.conf", "/etc/policyd-rate-limit.yaml"))
        names = tuple(name.replace("/etc", self.path("etc"))
                      for name in prl.CONFIG_FILES)
        os.makedirs(self.path(".config"))
        os.makedirs(self.path("etc"))
        with patch.object(prl, "CONFIG_FILES", names), \
                patch.dict(os.environ, HOME=self.folder):
            paths = [os.path.expanduser(name) for name in names]
            for path in paths:
                self.write(os.path.relpath(path, self.folder), "")
            for path in paths:
                self.assertEqual(
                    command("--get-config", "config_file")[:2], (0, path))
                os.unlink(path)
            status, out, err = command("--get-config", "config_file")
            self.assertEqual((status, out), (0, "None"))
            for options in ((), ("--check",), ("--clean",)):
                status, out, err = command(*options)
                self.assertEqual((status, out), (5, ""))
                self.assertEqual(err, "error: no configuration file found; "
                                 f"looked for {', '.join(paths)}\n")

    def test_what_cannot_be_read_on_the_search_path_is_skipped(self) -> None:
        good = self.write("good.yaml", "debug: no\n")
        with patch.object(prl, "CONFIG_FILES", (self.folder, good)):
            self.assertEqual(command("--get-config", "config_file"), (
                0, good, f"warning: skipped: {self.folder}: cannot be read:"
                f" [Errno 21] Is a directory: '{self.folder}'\n"))
        with patch.object(prl, "CONFIG_FILES", (self.folder,)):
            self.assertEqual(command("--check")[0], 5)

    def test_file_that_cannot_be_used_ends_with_5(self) -> None:
        os.mkdir(self.path("folder.yaml"))
        with open(self.path("bytes.yaml"), "wb") as file:
            file.write(b"debug: no\nuser: Ren\xe9\nuser: \xff\n")
        for name, text, message in (
                ("none.yaml", None, "no configuration file found; looked "
                                    "for {}"),
                ("folder.yaml", None, "{}: cannot be read: .*directory"),
                ("bytes.yaml", None, "{}:2: byte 0xE9 is not UTF-8; convert "),
                ("list.yaml", "- 1\n", r"{}:1: found \[1\], expected lines "),
                ("word.yaml", "limits\n", "{}:1: found 'limits', expected "),
                ("tab.yaml", "a:\n\tb: 1\n", "{}:2: write spaces instead"),
                ("twice.yaml", "a: 1\nb: 2\na: 3\n",
                 "{}:3: a is given twice, first in line 1"),
                ("odd.yaml", "a: 1\nb: [\n", "{}:[23]: "),
                ("odd.conf", "a = 1\nb = = 2\n", "{}:2: not Python: ")):
            with self.subTest(name=name):
                path = self.path(name)
                if text is not None:
                    self.write(name, text)
                for option in (("--check",), ("--clean",), ()):
                    status, out, err = command("-f", path, *option)
                    self.assertEqual((status, out), (5, ""))
                    self.assertRegex(err.splitlines()[-1], "^error: "
                                     + message.format(re.escape(path)))

    def test_an_assignment_in_yaml_is_told_what_to_write(self) -> None:
        for text, line in (
                ("limits = [[10, 60]]\n", 1),
                ("debug: no\nlimits = [[10, 60]]\n\nuser: joe\n", 2),
                ("limits=[[10, 60]]\n" + "# c\n" * 16 + "user: joe\n", 1)):
            with self.subTest(text=text), \
                    self.assertRaises(prl.ConfigError) as caught:
                self.read(text, "test.yaml")
            self.assertEqual(
                str(caught.exception), f"{self.path('test.yaml')}:{line}:"
                ' limits: write "limits: VALUE" instead of "limits = VALUE"')
        self.assertEqual(self.read("user: 'a\n\n  limits = b'\n", "a.yaml"),
                         {"user": "a\nlimits = b"})

    def test_a_fifo_does_not_hang_a_start_or_a_reload(self) -> None:
        daemon = self.daemon("limits: [[1, 60]]\n")
        os.unlink(daemon.config)
        os.mkfifo(daemon.config)
        line = (f"{daemon.config}: cannot be read: it is a FIFO; write the"
                " configuration to a file\n")
        daemon.send(signal.SIGHUP)
        daemon.wait_log(line)
        self.assertEqual([daemon.ask() for _ in "12"], [PASS, REFUSED])
        for options in (("--check",), ("--status",), ()):
            done = run("-f", daemon.config, *options)
            self.assertEqual((done.returncode, done.stderr),
                             (5, f"error: {line}"))

    def test_a_shell_may_pipe_a_file_in(self) -> None:
        done = run("-f", "/dev/stdin", "--get-config", "limits",
                   input="limits: [[1, 2]]\n")
        self.assertEqual((done.returncode, done.stdout), (0, "[[1, 2]]"))
        done = run("-f", "/dev/stdin", "--check", input="")
        self.assertEqual((done.returncode, done.stderr), (
            5, "error: /dev/stdin: cannot be read: the pipe is empty\n"))

    def test_a_file_without_end_is_refused(self) -> None:
        got = command("-f", "/dev/zero", "--check")
        self.assertEqual(got, (
            5, "", "error: /dev/zero: cannot be read: it is larger than"
            f" {prl.MAX_FILE} bytes\n"))

    def test_assignments_of_a_conf_are_read(self) -> None:
        for text, value in (
                ("1", 1), ("-1.5", -1.5), ("'a' 'b'", "ab"), ("None", None),
                ("(1, 'x')", (1, "x")), ("[[1, 2], (3, 4)]", [[1, 2], (3, 4)]),
                ("{'a': [], 1: (2,)}", {"a": [], 1: (2,)}),
                ("60 * 60 * 24", 86400), ("(7 - 1) // 2 + 6 / 4", 4.5),
                ("0o666", 0o666), ("SQLITE_DB", 0), ("MYSQL_DB", 1),
                ("PGSQL_DB", 2), ("before * 2", 6), ("u'x'", "x"),
                ("[\n  1,  # one\n]", [1]), ("True", True)):
            with self.subTest(text=text):
                values = self.read(f"before = 3\nx = {text}\n")
                self.assertEqual(values["x"], value)
                self.assertIs(type(values["x"]), type(value))

    def test_rest_of_a_conf_is_skipped_and_never_run(self) -> None:
        made = self.path("made")
        for text in (
                f"open({made!r}, 'w')", f"x = open({made!r}, 'w')",
                f"x = [open({made!r}, 'w')]", "import os", "x = y", "x.y = 1",
                f"x = __import__('os').mkdir({made!r})", "x += 1",
                f"def f(a=open({made!r}, 'w')): pass", "x['y'] = 1",
                f"x = f\"{{open({made!r}, 'w')}}\"", "x, y = 1, 2",
                f"class A:\n    open({made!r}, 'w')", "x = y = 1",
                f"x = [open({made!r}, 'w') for _ in 'a']", "x = lambda: 1",
                f"if True:\n    open({made!r}, 'w')", "x = not 1",
                "x = 9**9**9", "x = 'a' * 10**9", "x = 1 << 10**9",
                "x = [0] * 10**9", "x = 1 / 0", "x = {[]: 1}", "x = {**{}}",
                "x = 'a' + 'b'", "x = 'a' % 1", "'a doc'", "x = 1, *[2]"):
            with self.subTest(text=text), self.assertLogs(prl.log) as logs:
                values = self.read(f"debug = 0\n{text}\nuser = 'joe'\n")
                self.assertEqual(values, {"debug": 0, "user": "joe"})
                path = self.path("test.conf")
                self.assertEqual([one.getMessage() for one in logs.records], [
                    f"{path}: this format is obsolete; write YAML",
                    f"{path}:2: skipped: it is not NAME = VALUE: "
                    + text.split("\n")[0][:60]])
        self.assertFalse(os.path.exists(made))

    def test_any_line_end_of_a_conf_counts(self) -> None:
        for end in ("\r", "\r\n", "\n"):
            with self.subTest(end=end), self.assertLogs(prl.log) as logs, \
                    open(self.path("a.conf"), "w", newline="") as file:
                file.write(f"debug = 0{end}{end}import os{end}user = 'joe'")
                file.flush()
                config = prl.read_config(self.path("a.conf"))
            self.assertEqual(config.values, {"debug": 0, "user": "joe"})
            self.assertEqual(config.place("user"), self.path("a.conf:4"))
            self.assertIn("a.conf:3: skipped: it is not NAME = VALUE: import"
                          " os", logs.output[-1])

    def test_bombs_are_refused_in_time_and_memory(self) -> None:
        def bound() -> None:
            resource.setrlimit(resource.RLIMIT_CPU, (3, 3))
            resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))

        nines = "9" * 4000
        for name, text in (
                ("squares.conf", f"a = {nines}\n" + "a = a * a\n" * 40),
                ("twice.conf", "a = [1]\n" + "a = [a, a]\n" * 60
                 + "limits = a\n"),
                ("long.conf", f"a = {nines}\nuser = a * a\n"),
                ("digits.conf", f"user = {nines}{nines}\n"),
                ("brackets.conf", "limits = " + "[" * 5000 + "]" * 5000),
                ("minus.conf", "limits = " + "-" * 990 + "1\n"),
                ("minuses.conf", "limits = " + "-" * 5000 + "1\n"),
                ("plus.conf", "limits = " + "1+" * 20000 + "1\n"),
                ("nul.conf", "user = 1\0\n"),
                ("brackets.yaml", "limits: " + "[" * 5000 + "]" * 5000),
                ("hex.yaml", f"user: 0x{nines}\n"),
                ("self.yaml", "limits: &a [*a]\n"),
                ("big.yaml", "# x\n" * 300000 + "user: 5\n"),
                ("wide.yaml", "limits: [" + "[1, 2, 3],\n" * 50000 + "]\n")):
            with self.subTest(name=name):
                done = run("-f", self.write(name, text), "--check",
                           "--standalone", self.folder, preexec_fn=bound)
                self.assertNotIn("Traceback", done.stderr)
                self.assertIn(done.returncode, (0, 5), done.stderr[-300:])
                self.assertLess(len(done.stderr), 10000)

    def test_refused_conf_has_a_line_number_or_none(self) -> None:
        for text in ("a = 1\0\n", "a = " + "[" * 5000, "a = =\n"):
            with self.subTest(text=text[:10]), \
                    self.assertRaises(prl.ConfigError) as raised, \
                    self.assertLogs(prl.log):
                self.read(text)
            self.assertRegex(str(raised.exception),
                             r"\.conf(:[1-9][0-9]*)?: not Python: ")

    def test_original_spelling_limited_netword_is_read(self) -> None:
        for name, equals in (("a.conf", "="), ("a.yaml", ":")):
            with self.subTest(name=name):
                path = self.write(name, f'limited_netword {equals} ["::/0"]\n')
                status, out, err = command(
                    "-f", path, "--get-config", "limited_networks")
                self.assertEqual((status, out), (0, "['::/0']"))
                self.assertNotIn("such setting", err)

    def test_odd_yaml_is_refused_with_its_line_without_pyyaml(self) -> None:
        for text, why in (
                ("1_000", "put quotes around 1_000"),
                ("0x1F", "put quotes around 0x1F"),
                ("2024-12-31", "put quotes around 2024-12-31"),
                ("&a x", "put quotes around &a x"),
                ("!!str x", "put quotes around !!str x"),
                ('"a', "close the quotes on the same line, write \\ as \\\\:"
                 ' "a')):
            with self.subTest(text=text), \
                    patch.dict(sys.modules, {"yaml": None}):
                path = self.write("test.yaml", f"debug: no\nuser: {text}\n")
                status, _, err = command("-f", path, "--check")
                self.assertEqual((status, err),
                                 (5, f"error: {path}:2: {why}\n"))

    def test_pyyaml_reads_what_ours_refuses(self) -> None:
        if importlib.util.find_spec("yaml") is None:
            skip("PyYAML is not installed")
        for text, value in (("1_000", 1000), ("1:30", "1:30"), ("0x1F", 31),
                            ("!!str 5", "5"), ("|\n  a\n", "a\n"),
                            ('"a\n  b"', "a b"), ("&a [*a]", None),
                            ("[!!str a, 0666]", ["a", "0666"])):
            with self.subTest(text=text):
                values = self.read(f"x: {text}\n", "test.yaml")
                if value is not None:
                    self.assertEqual(values["x"], value)
        with self.assertRaisesRegex(
                prl.ConfigError, "yaml:4: c is given twice, first in line 3"):
            self.read("a: !!str 1\nb:\n  c: 1\n  c: 2\n", "test.yaml")
        with self.assertRaisesRegex(prl.ConfigError, r"yaml:2: .*!!python/"):
            self.read("a: 1\nx: !!python/tuple [1]\n", "test.yaml")

    def test_line_is_named_also_when_pyyaml_read_the_file(self) -> None:
        if importlib.util.find_spec("yaml") is None:
            skip("PyYAML is not installed")
        path = self.write("test.yaml", "db_timeout: 1_0\nlimits: 5\n")
        self.assertIn(f"{path}:2: limits: ", command("-f", path, "--check")[2])


class ProcessTest(NetTest):
    """Signals, the pidfile, the socket's path, root's rights."""

    def test_a_signal_ends_it_in_peace(self) -> None:
        for number in signal.SIGINT, signal.SIGTERM, signal.SIGUSR1:
            with self.subTest(number):
                daemon = self.daemon(WIDE, name=f"signal{number}")
                self.passes(daemon)
                self.assertEqual(daemon.stop(number), 0)
                self.assertFalse(os.path.exists(daemon.pidfile))
                self.assertFalse(os.path.exists(daemon.socket))

    def test_a_signal_while_it_starts_ends_it_in_peace(self) -> None:
        for number, where, then in itertools.product(
                (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1),
                ("PolicyServer.server_activate", "Housekeeping.do_step"),
                ("pass", f"time.sleep({2 * PATIENCE})")):
            if "server" in where and then != "pass":
                continue  # there it only takes a moment
            program = self.write("early.py", (
                "import os, sys, time\n"
                f"sys.path.insert(0, {TEMPORARY!r})\n"
                "import policyd_rate_limit\n"
                f"usual = policyd_rate_limit.{where}\n"
                "def early(self):\n"
                "    usual(self)\n"
                f"    os.kill(os.getpid(), {int(number)})\n"
                f"    {then}\n"
                f"policyd_rate_limit.{where} = early\n"
                "sys.exit(policyd_rate_limit.main())\n"))
            with self.subTest(number, where=where, then=then):
                done = run("--standalone", self.path("daemon"),
                           program=program)
                self.assertEqual(done.returncode, 0, done.stderr)
                self.assertNotIn("Traceback", done.stderr)
                self.assertEqual(
                    [name for name in os.listdir(self.path("daemon"))
                     if not name.startswith("db.")], [])

    def test_an_interrupt_while_modules_load_is_no_traceback(self) -> None:
        self.write("argparse.py", "import os, signal\n"
                   "os.kill(os.getpid(), signal.SIGINT)\n")
        done = run("--version", program=PROGRAM, env={
            **os.environ, "PYTHONPATH": self.folder})
        self.assertEqual((done.returncode, done.stderr),
                         (-signal.SIGINT, ""))

    def test_a_file_with_a_second_name_is_left_alone(self) -> None:
        os.mkdir(self.path("daemon"))
        precious = self.write("precious", "text")
        for name in ("policyd-rate-limit.pid", "policyd-rate-limit.pid.lock",
                     "policy.lock"):
            with self.subTest(name):
                path = self.path(f"daemon/{name}")
                os.link(precious, path)
                done = run("--standalone", self.path("daemon"))
                self.assertEqual(done.returncode, 6, done.stderr)
                self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
                self.assertIn(path, done.stderr)
                with open(precious, encoding="utf-8") as file:
                    self.assertEqual(file.read(), "text")
                self.assertEqual(os.stat(precious).st_uid, os.geteuid())
                os.unlink(path)

    def test_root_follows_no_link_in_another_s_folder(self) -> None:
        if not is_root():
            skip("root")
        folder, target = self.path("theirs"), self.path("target")
        os.mkdir(folder)
        os.chown(folder, pwd.getpwnam("nobody").pw_uid, -1)
        for name, option in itertools.product(
                ("db.sqlite3", "db.sqlite3-wal"), (None, "--clean")):
            with self.subTest(name, option=option):
                os.symlink(target, os.path.join(folder, name))
                done = run("--standalone", folder, *filter(None, [option]))
                self.assertEqual(done.returncode, 6, done.stderr)
                self.assertIn(name, done.stderr)
                self.assertFalse(os.path.exists(target))
                os.unlink(os.path.join(folder, name))
        daemon = Daemon(folder, WIDE)  # without links that is no offence
        self.addCleanup(daemon.stop)
        self.passes(daemon)

    def test_a_storm_of_hups_loses_no_term(self) -> None:
        daemon = self.daemon(WIDE + "limits_by_id:\n" + "".join(
            f"    user{n}: [[1, 60]]\n" for n in range(2000)))
        for _ in range(3000):
            daemon.send(signal.SIGHUP)
        self.assertEqual(daemon.stop(), 0)
        self.assertNotIn("Traceback", daemon.log())
        self.assertLess(daemon.log().count("reloaded"), 1000)

    def test_a_log_whose_reader_is_gone_stops_nothing(self) -> None:
        reader, writer = os.pipe()
        daemon = Daemon.__new__(Daemon)
        daemon.folder = self.path("daemon")
        daemon.socket = os.path.join(daemon.folder, "policy")
        daemon.database = os.path.join(daemon.folder, "db.sqlite3")
        with subprocess.Popen(
                [sys.executable, COMPILED, "--standalone", daemon.folder],
                stdout=subprocess.DEVNULL, stderr=writer) as process:
            self.addCleanup(process.kill)
            os.close(writer)
            self.assertIn(b"listening on", os.read(reader, 4096))
            os.close(reader)
            wait_for(lambda: os.path.exists(daemon.database), "the ledger")
            self.passes(daemon, "joe", "ann")
            process.terminate()
            self.assertEqual(process.wait(PATIENCE), 0)

    def test_a_full_log_that_does_not_block_stops_nothing(self) -> None:
        reader, writer = os.pipe()
        for descriptor in reader, writer:
            self.addCleanup(os.close, descriptor)
        os.set_blocking(writer, False)
        folder = self.path("daemon")
        with subprocess.Popen(
                [sys.executable, COMPILED, "--standalone", folder],
                stdout=subprocess.DEVNULL, stderr=writer) as process:
            self.addCleanup(process.kill)
            self.assertIn(b"listening on", os.read(reader, 4096))
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(writer, b"x" * 4096)
            with Client(os.path.join(folder, "policy")) as client:
                self.assertEqual([client.ask(), client.ask()], [PASS, PASS])
                os.set_blocking(reader, False)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        os.read(reader, 65536)
                self.assertEqual(client.ask(), PASS)
            process.terminate()
            self.assertEqual(process.wait(PATIENCE), 0)
        self.assertIn(b"identity=<joe>, cost=1, used=3/", os.read(reader, 999))

    def test_a_start_with_closed_streams_ends_in_peace(self) -> None:
        good = f"--standalone {self.folder} "
        for arguments, status in (
                (good + "--clean >&-", 0), (good + "--clean >&- 2>&-", 0),
                (good + "--status >&-", 0), (good + "--check >&- 2>&-", 0),
                (f"--standalone {PROGRAM} >&- 2>&-", 6),
                (f"--standalone {PROGRAM}", 6), ("-f /missing >&-", 5),
                (good + "-o SOCKET=[192.0.2.1,99]", 6),
                ("--standalone x", 6)):
            with self.subTest(arguments):
                gone = "cd $(mktemp -d); rmdir $(pwd);"  # what x is in
                done = subprocess.run(
                    ["sh", "-c", f"{gone * (arguments[-1] == 'x')} "
                     f"{sys.executable} -W error {PROGRAM} {arguments}"],
                    stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                    text=True, timeout=PATIENCE, check=False,
                    env={**os.environ, "JOURNAL_STREAM": "1:2"})
                self.assertEqual(done.returncode, status, done.stderr)
                self.assertEqual(done.stderr.count("\n"),
                                 int(status > 0 and "2>" not in arguments))

    def test_the_journal_is_told_priorities(self) -> None:
        with open(self.path("journal"), "w+", encoding="utf-8") as journal:
            found = os.fstat(journal.fileno())
            with patch.dict(os.environ, JOURNAL_STREAM=(
                    f"{found.st_dev}:{found.st_ino}")):
                run("-f", "/missing", stderr=journal)
            journal.seek(0)
            self.assertRegex(journal.read(), r"\A<3>error: .*\n\Z")

    def test_mails_of_one_commit_are_lines_of_their_own_in_the_log(
            self) -> None:
        names = [f"user{n}" for n in range(6)]
        os.mkdir(self.path("daemon"))
        found = os.stat(self.write("daemon/log", ""))
        with patch.dict(os.environ, JOURNAL_STREAM=(
                f"{found.st_dev}:{found.st_ino}")):
            daemon = self.daemon("limits: [[1, 60]]\n")
        self.passes(daemon)
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(daemon.client()) for _ in names]
            with locked(daemon.database):
                for client, name in zip(clients, names):
                    client.socket.sendall(request_text(sasl_username=name))
                client.socket.sendall(request_text(sasl_username=name))
                time.sleep(0.3)  # for all of them to wait for the database
            for client in clients:
                self.assertEqual(client.read(), PASS)
            self.assertNotEqual(client.read(), PASS)
        lines = sorted(re.findall(r"<.>\w+: identity=<user.*", daemon.log()))
        self.assertEqual([line.partition(",")[0] for line in lines], [
            f"<5>8045F2AB23: identity=<{names[-1]}>",
            *(f"<6>8045F2AB23: identity=<{name}>" for name in names)])

    def test_many_lines_are_written_at_once_but_none_in_two_parts(
            self) -> None:
        names = [f"{n}{'x' * 150}" for n in range(40)]  # over 4096 bytes
        reader, writer = os.pipe2(os.O_DIRECT)  # each read returns one write
        written: list[bytes] = []
        folder = self.path("daemon")
        with subprocess.Popen(
                [sys.executable, COMPILED, "--standalone", folder],
                stdout=subprocess.DEVNULL, stderr=writer) as process:
            self.addCleanup(process.kill)
            os.close(writer)
            reading = in_background(lambda: written.extend(
                iter(lambda: os.read(reader, 65536), b"")))
            database = os.path.join(folder, "db.sqlite3")
            wait_for(lambda: b"listening" in b"".join(written), "the daemon")
            wait_for(lambda: os.path.exists(database), "the ledger")
            with contextlib.ExitStack() as stack:
                clients = [stack.enter_context(Client(
                    os.path.join(folder, "policy"))) for _ in names]
                with locked(database):
                    for client, name in zip(clients, names):
                        client.socket.sendall(request_text(sasl_username=name))
                    time.sleep(0.5)  # for all of them to wait for the database
                for client in clients:
                    self.assertEqual(client.read(), PASS)
            process.terminate()
        reading.join(PATIENCE)
        os.close(reader)
        self.assertEqual([end for end in written if end[-1:] != b"\n"], [])
        self.assertGreater(max(lines.count(b"\n") for lines in written), 9)
        text = b"".join(written).decode()
        self.assertEqual([text.count(f"<{name}>") for name in names],
                         [1] * len(names))

    def test_the_unit_s_daemon_needs_no_chown(self) -> None:
        daemon = self.daemon(WIDE, program=self.write("no.py", (
            "import os, runpy\n"
            "def refuse(*arguments, **options):\n"
            "    raise PermissionError('as SystemCallFilter says')\n"
            "os.chown = os.fchown = refuse\n"
            "os.geteuid = lambda: 1\n"
            f"runpy.run_path({COMPILED!r}, run_name='__main__')\n")))
        self.passes(daemon)

    def test_a_request_that_waits_for_the_database_is_answered(self) -> None:
        daemon = self.daemon(WIDE)
        self.passes(daemon)
        wait_for(lambda: status(daemon, "Threads") == [3], "its thread's end")
        with daemon.client() as client:
            with locked(daemon.database):
                client.socket.sendall(request_text())
                wait_for(lambda: status(daemon, "Threads") == [4], "a thread")
                daemon.send(signal.SIGTERM)
                wait_for(lambda: not os.path.exists(daemon.socket), "the end")
            self.assertEqual(client.read(), PASS)
        self.assertEqual(daemon.stop(), 0)
        self.assertEqual(counted(daemon.database)["joe"], 1)

    def test_hup_takes_new_settings_for_open_connections(self) -> None:
        daemon = self.daemon("limits: [[1, 600]]\nfail_action: first\n")
        with daemon.client() as client:
            self.assertEqual([client.ask(), client.ask()], [PASS, "first"])
            self.write("daemon/test.yaml",
                       "limits: [[2, 600]]\nfail_action: second\n")
            daemon.send(signal.SIGHUP)
            daemon.wait_log("configuration reloaded")
            self.assertEqual([client.ask(), client.ask()], [PASS, "second"])

    def test_an_original_that_runs_keeps_its_pidfile(self) -> None:
        os.mkdir(self.path("daemon"))
        path = self.write("daemon/policyd-rate-limit.pid", f"{os.getpid()}\n")
        for kind, address, status_ in (
                (socket.AF_UNIX, self.path("daemon/policy"), 3),
                (socket.AF_INET, ("127.0.0.1", 0), 6)):  # anybody's: retry
            with self.subTest(kind), socket.socket(kind) as original:
                original.bind(address)  # which holds no lock
                original.listen()
                done = run("--standalone", self.path("daemon"), "-o",
                           f"SOCKET={json.dumps(original.getsockname())}")
                self.assertEqual(done.returncode, status_, done.stderr)
                self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
                with open(path) as file:
                    self.assertEqual(file.read(), f"{os.getpid()}\n")

    def test_a_lock_that_any_account_can_take_decides_nothing(self) -> None:
        os.mkdir(self.path("daemon"))
        self.write("daemon/policyd-rate-limit.pid", "")
        for name in "daemon", "daemon/policyd-rate-limit.pid":
            file = os.open(self.path(name), os.O_RDONLY)
            self.addCleanup(os.close, file)
            fcntl.flock(file, fcntl.LOCK_SH)
        daemon = self.daemon(WIDE)
        self.passes(daemon)
        lock = daemon.pidfile + ".lock"
        self.assertEqual(stat.S_IMODE(os.stat(lock).st_mode), 0o600)
        self.assertEqual(daemon.stop(), 0)
        self.assertFalse(os.path.exists(lock))

    def test_of_daemons_that_start_at_once_one_runs(self) -> None:
        def start(number: int) -> tuple[Any, str]:
            process = subprocess.Popen(
                [sys.executable, PROGRAM, "--standalone", self.folder, "-o",
                 "pidfile=" + self.path(f"pid{number % 2}")],
                stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
            assert process.stderr is not None
            self.addCleanup(process.stderr.close)
            return process, process.stderr.readline()

        for _ in range(1 if QUICK else 3):
            with socket.socket(socket.AF_UNIX) as stale:
                stale.bind(self.path("policy"))
            started = at_once(start, range(6))
            [runs] = [process for process, line in started
                      if line.startswith("listening on")]
            self.assertEqual(asks(self.path("policy"), 1), [PASS])
            runs.terminate()
            self.assertEqual(sorted(process.wait(PATIENCE)
                                    for process, _ in started), [0, *[3] * 5])
            self.assertFalse(os.path.exists(self.path("policy")))

    def test_stale_files_do_not_block_a_start(self) -> None:
        os.mkdir(self.path("daemon"))
        for pid in (f"{os.getpid()}\n", "1\n", "rubbish", ""):
            with self.subTest(pid):
                path = self.write("daemon/policyd-rate-limit.pid", pid)
                with socket.socket(socket.AF_UNIX) as stale:
                    stale.bind(self.path("daemon/policy"))
                daemon = self.daemon(WIDE)
                self.passes(daemon)
                with open(path) as file:
                    self.assertEqual(file.read(), f"{daemon.process.pid}\n")
                self.assertEqual(daemon.stop(), 0)

    def test_a_file_that_is_no_socket_is_left_alone(self) -> None:
        os.mkdir(self.path("full"))
        precious = self.write("precious", "text")
        os.symlink(precious, self.path("link"))
        os.symlink(self.path("nothing"), self.path("dangling"))
        for name in "precious", "full", "link", "dangling":
            with self.subTest(name):
                done = run("--standalone", self.path("daemon"),
                           "-o", "SOCKET=" + self.path(name))
                self.assertEqual(done.returncode, 6, done.stderr)
                self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
                self.assertTrue(os.path.lexists(self.path(name)))
        with open(precious) as file:
            self.assertEqual(file.read(), "text")

    def test_a_socket_that_is_not_its_own_is_not_removed(self) -> None:
        old = self.daemon(WIDE)
        old.send(signal.SIGSTOP)
        os.unlink(old.socket)  # an admin's mistake, and another instance
        new = self.daemon(WIDE, "-o", f"SOCKET={old.socket}", name="new")
        old.send(signal.SIGCONT)
        old.wait_log("another process is listening there")
        self.assertEqual(old.stop(), 0)
        self.assertTrue(os.path.exists(old.socket))
        with Client(old.socket) as client:
            self.assertEqual(client.ask(), PASS)
        self.assertEqual(new.stop(), 0)

    def test_a_socket_between_bind_and_listen_is_not_stolen(self) -> None:
        path = self.path("policy")
        config = {"SOCKET": path, "sqlite_config": {"database": "x"}}
        service = prl.Service(settings_of(config), prl.open_ledger(
            settings_of(config)))

        class Slow(prl.PolicyServer):
            def server_activate(self) -> None:
                with contextlib.suppress(prl.PolicydError):
                    prl.PolicyServer(service).server_close()
                super().server_activate()

        with Slow(service) as first, Client(path):
            first.path = None  # nothing is left for it to remove

    def test_a_socket_that_is_lost_is_made_again(self) -> None:
        daemon = self.daemon(WIDE, "-o", "socket_permission=0620")
        began = time.monotonic()

        def no_listener() -> None:
            with socket.socket(socket.AF_UNIX) as stale:
                stale.bind(daemon.socket)

        with daemon.client() as old:
            self.assertEqual(old.ask(), PASS)
            for replace in str, no_listener:
                with self.subTest(replace):
                    said = len(daemon.log())
                    os.unlink(daemon.socket)
                    replace()
                    self.write("daemon/test.yaml", "SOCKET: /elsewhere\n")
                    daemon.send(signal.SIGHUP)  # changes nothing of it
                    daemon.wait_log("created again", said)
                    mode = os.stat(daemon.socket).st_mode
                    self.assertEqual(stat.S_IMODE(mode), 0o620)
                    self.assertEqual(daemon.ask(), PASS)
                    self.assertEqual(old.ask(), PASS)
        self.assertLess(time.monotonic() - began, 20)
        self.assertEqual(daemon.stop(), 0)
        self.assertFalse(os.path.exists(daemon.socket))

    def test_a_socket_that_cannot_be_made_again_is_logged(self) -> None:
        daemon = self.daemon(WIDE)
        with moved_away(daemon.folder):
            os.mkdir(daemon.folder)
            self.write("daemon/policy", "no socket")
            log = self.path("daemon.moved/log")
            wait_for(lambda: "SOCKET is lost" in open_and_read(log),
                     "the log")
            os.unlink(self.path("daemon/policy"))
            os.rmdir(daemon.folder)
        daemon.ask()

    def test_a_pidfile_is_held_by_one_process_at_a_time(self) -> None:
        path, holders, most = self.path("pid"), [0], [0]

        def hold(_: int) -> None:
            for _ in range(2000):
                with contextlib.suppress(prl.AlreadyRunning), \
                        prl.hold_pidfile(path, None):
                    holders[0] += 1
                    most[0] = max(most[0], holders[0])
                    time.sleep(0)
                    holders[0] -= 1

        at_once(hold, range(4))
        self.assertEqual(most, [1])

    def test_a_pidfile_that_cannot_be_written_is_exit_6(self) -> None:
        os.mkdir(self.path("full"))
        self.write("file", "")
        for name in "full", "file/pid":
            with self.subTest(name):
                done = run("--standalone", self.path("daemon"),
                           "-o", "pidfile=" + self.path(name))
                self.assertEqual(done.returncode, 6, done.stderr)
                self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
                self.assertFalse(os.path.exists(self.path("daemon/policy")))

    def test_a_start_does_not_wait_at_a_fifo(self) -> None:
        for name in "pid", "pid.lock":
            with self.subTest(name):
                os.mkfifo(self.path(name))
                done = run("--standalone", self.folder, "-o",
                           "pidfile=" + self.path("pid"))
                self.assertEqual(done.returncode, 6, done.stderr)
                self.assertIn(f"{self.path(name)}'\n", done.stderr)
                os.unlink(self.path(name))

    def test_a_pidfile_that_is_no_file_is_left_alone(self) -> None:
        path = self.path("fifo")  # it could as well be /dev/null
        os.mkfifo(path)
        run("--standalone", self.path("daemon"), "-o", f"pidfile={path}",
            "-o", f"SOCKET={self.folder}")  # does not start in any case
        self.assertTrue(os.path.exists(path))

    def test_systemd_is_told_each_state(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.settimeout(30)
            manager.bind(self.path("notify"))
            os.environ["NOTIFY_SOCKET"] = self.path("notify")
            self.addCleanup(os.environ.pop, "NOTIFY_SOCKET")
            daemon = self.daemon(WIDE)
            self.assertEqual(manager.recv(999), (
                b"READY=1\nSTATUS=0 mails in the last hour, 0 of them"
                b" refused; the database is available"))
            daemon.send(signal.SIGHUP)
            self.assertRegex(manager.recv(99),
                             rb"\ARELOADING=1\nMONOTONIC_USEC=\d+\Z")
            self.assertEqual(manager.recv(99), b"READY=1")
            daemon.stop()
            self.assertEqual(manager.recv(99), b"STOPPING=1")

    def test_systemd_is_told_in_the_abstract_namespace_too(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.settimeout(PATIENCE)
            manager.bind(f"\0{self.folder}")
            with patch.dict(os.environ, NOTIFY_SOCKET=f"@{self.folder}"):
                self.daemon(WIDE)
            self.assertRegex(manager.recv(999), rb"\AREADY=1\n")

    def test_systemd_is_told_that_it_answers_and_what_it_does(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.settimeout(PATIENCE)
            manager.bind(self.path("notify"))
            with patch.dict(os.environ, NOTIFY_SOCKET=self.path("notify"),
                            WATCHDOG_USEC="400000"):
                daemon = self.daemon("limits: [[1, 600]]\n"
                                     "db_error_action: away\n")

            def wait_told(text: bytes) -> None:
                wait_for(lambda: text in manager.recv(999), repr(text))

            wait_told(b"WATCHDOG=1")
            self.assertEqual([daemon.ask(), daemon.ask()], [PASS, REFUSED])
            wait_told(b"STATUS=2 mails in the last hour, 1 of them refused;"
                      b" the database is available")
            with replaced(daemon.database, None, 0):
                self.assertEqual(daemon.ask(sasl_username="ann"), "away")
                wait_told(b"STATUS=3 mails in the last hour, 1 of them"
                          b" refused; the database is unavailable")
                wait_told(b"WATCHDOG=1")  # that is no reason to restart
            with socket.socket(socket.AF_UNIX) as other:
                os.unlink(daemon.socket)
                other.bind(daemon.socket)
                other.listen()
                daemon.wait_log("another process is listening there")
                manager.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        manager.recv(999)
                manager.settimeout(1)
                with self.assertRaises(socket.timeout):
                    manager.recv(999)
            os.unlink(daemon.socket)
            manager.settimeout(PATIENCE)
            wait_told(b"WATCHDOG=1")  # it has its socket again

    def test_a_watchdog_of_another_process_is_not_ours(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.settimeout(PATIENCE)
            manager.bind(self.path("notify"))
            with patch.dict(os.environ, NOTIFY_SOCKET=self.path("notify"),
                            WATCHDOG_USEC="100000", WATCHDOG_PID="1"):
                daemon = self.daemon(WIDE)
            self.assertIn(b"READY=1", manager.recv(999))
            manager.settimeout(1)
            with self.assertRaises(socket.timeout):
                manager.recv(999)
            self.passes(daemon)

    def test_a_path_of_107_bytes_is_the_longest(self) -> None:
        room = 107 - len(os.fsencode(self.path("")))
        for name, status_ in (("x" * room, 0), ("x" * (room + 1), 6)):
            path = self.path(name)
            done = run("--check", "--standalone", self.folder,
                       "-o", f"SOCKET={path}")
            self.assertEqual(done.returncode, status_, done.stderr)
        self.assertIn("path too long for a socket", done.stderr)
        self.daemon(WIDE, "-o", f"SOCKET={self.path('x' * room)}")
        self.assertEqual(asks(self.path("x" * room), 1), [PASS])

    def test_home_is_the_user_s_that_root_becomes(self) -> None:
        if not is_root():
            skip("root")
        out = self.path("out")
        os.chmod(self.folder, 0o777)
        group = grp.getgrgid(pwd.getpwnam("nobody").pw_gid).gr_name
        daemon = SystemDaemon(self.path("daemon"), (
            f"user: nobody\ngroup: {group}\nlimits: [[0, 60]]\nalert: True\n"
            "alert_command: [/bin/sh, -c, 'echo $HOME >"
            f"{out}.new; mv {out}.new {out}']\n"))
        self.addCleanup(daemon.stop)
        daemon.ask()
        wait_for(lambda: os.path.exists(out), "the alert")
        with open(out, encoding="utf-8") as file:
            self.assertEqual(file.read().strip(),
                             pwd.getpwnam("nobody").pw_dir)

    def test_root_makes_the_folders_and_becomes_the_user(self) -> None:
        if not is_root():
            skip("root")
        group = "nogroup" if "nogroup" in {
            entry.gr_name for entry in grp.getgrall()} else "nobody"
        ids = pwd.getpwnam("nobody").pw_uid, grp.getgrnam(group).gr_gid
        daemon = SystemDaemon(self.path("daemon"), (
            f"user: nobody\ngroup: {group}\nsocket_permission: 0660\n"))
        self.addCleanup(daemon.stop)
        self.passes(daemon)
        self.assertEqual(status(daemon, "Uid"), [ids[0]] * 4)
        self.assertEqual(status(daemon, "Gid"), [ids[1]] * 4)
        groups = set(os.getgrouplist("nobody", ids[1]))
        self.assertEqual(set(status(daemon, "Groups")), groups)
        for path, mode in ((daemon.socket, 0o660), (daemon.database, 0o600),
                           (daemon.database + "-wal", 0o600),
                           (daemon.pidfile, 0o644),
                           (os.path.dirname(daemon.pidfile), 0o755),
                           (os.path.dirname(daemon.database), 0o750)):
            with self.subTest(path):
                found = os.stat(path)
                self.assertEqual(oct(stat.S_IMODE(found.st_mode)), oct(mode))
                self.assertEqual((found.st_uid, found.st_gid), ids)
        folder = os.stat(os.path.dirname(daemon.socket))
        with contextlib.suppress(KeyError):
            postfix = grp.getgrnam("postfix").gr_gid
            self.assertEqual((stat.S_IMODE(folder.st_mode), folder.st_uid,
                              folder.st_gid), (0o750, ids[0], postfix))
        self.assertEqual(daemon.stop(), 0)
        self.assertFalse(os.path.exists(daemon.socket))
        self.assertFalse(os.path.exists(daemon.pidfile))

    def test_an_empty_folder_of_root_is_handed_to_the_user(self) -> None:
        if not is_root():
            skip("root")
        daemon = SystemDaemon(self.path("daemon"), "user: nobody\n"
                              "group: root\ndb_error_action: 'away'\n")
        self.addCleanup(daemon.stop)
        nobody = pwd.getpwnam("nobody").pw_uid
        volume = os.path.dirname(daemon.database)
        for mode, entry, owner, answer in (
                (0o755, "", nobody, PASS), (0o755, "mine", 0, "away"),
                (0o1777, "", 0, PASS)):
            self.assertEqual(daemon.stop(), 0)
            shutil.rmtree(volume)
            os.makedirs(os.path.join(volume, entry))
            os.chmod(volume, mode)
            with self.subTest(mode=mode, entry=entry):
                checked = run("--check", "-f", daemon.config)
                self.assertEqual(checked.returncode, 6 * (answer != PASS))
                daemon.start()
                self.assertEqual(daemon.ask(), answer)
                self.assertEqual(os.stat(volume).st_uid, owner)

    def test_a_folder_of_root_behind_a_link_is_left_as_it_is(self) -> None:
        if not is_root():
            skip("root")
        link, target = self.path("link"), self.path("target")
        nobody = pwd.getpwnam("nobody")
        settings = settings_of({"SOCKET": f"{link}/policy", "sqlite_config": {
            "database": f"{link}/db"}, "pidfile": f"{link}/pid"})
        self.addCleanup(os.umask, os.umask(0o022))
        os.mkdir(target, 0o755)
        os.symlink(target, link)
        prl.make_folders(settings, nobody)
        with patch.object(prl, "is_volume", lambda folder: True), \
                self.assertRaises(OSError):  # planted just behind that
            prl.make_folders(settings, nobody)
        found = os.stat(target)
        self.assertEqual((found.st_uid, stat.S_IMODE(found.st_mode)),
                         (0, 0o755))

    def test_an_unknown_user_is_exit_2_for_root(self) -> None:
        if not is_root():
            skip("root")
        done = run("-f", self.write("test.yaml", "user: no-such-user\n"))
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertIn("adduser", done.stderr)


class PingTest(NetTest):
    """--ping: is there a daemon that answers?"""

    def test_it_says_how_long_an_answer_took(self) -> None:
        for options in (), ("-o", f'SOCKET=["127.0.0.1", {free_port()}]'):
            daemon = self.daemon(WIDE, *options, name=f"daemon{len(options)}")
            with self.subTest(options):
                done = run("--ping", *daemon.options)
                self.assertEqual(done.returncode, 0, done.stderr)
                self.assertRegex(
                    done.stdout,
                    r"\Apolicyd-rate-limit answered in [0-9.]+ ms\n\Z")

    def test_it_is_counted_nowhere_and_needs_no_database(self) -> None:
        for mode in 0, 1, 2, "auto":
            daemon = self.daemon(f"count_mode: {mode}\n"
                                 "log_requests: True\n", name=f"mode{mode}")
            with self.subTest(mode), locked(daemon.database):
                done = run("--ping", *daemon.options)
                self.assertEqual(done.returncode, 0, done.stderr)
                daemon.send(signal.SIGUSR2)
                said = daemon.wait_log(": 0 requests")
                self.assertEqual(len(said.splitlines()), 4, said)
            self.assertEqual(counted(daemon.database), {})

    def test_a_log_that_nobody_reads_is_noticed(self) -> None:
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        daemon = self.daemon("debug: True\nlimits: [[100000, 60]]\n")
        folder = self.path("stuck")
        process = subprocess.Popen(
            [sys.executable, PROGRAM, "--standalone", folder, "-f",
             daemon.config], stderr=writer, stdout=subprocess.DEVNULL)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        os.close(writer)
        wait_for(lambda: os.path.exists(f"{folder}/policy"), "the socket")
        self.assertEqual(run("--ping", "--standalone", folder).returncode, 0)
        with Client(f"{folder}/policy") as client:
            client.socket.settimeout(2)
            with self.assertRaises(OSError):
                for _ in range(10_000):
                    client.ask()
        done = run("--ping", "--standalone", folder)
        self.assertEqual(done.returncode, 6)
        self.assertIn("timed out", done.stderr)

    def test_no_answer_is_exit_6_with_the_reason(self) -> None:
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(self.path("stale"))
        for name, reason in (("stale", "Connection refused"),
                             ("missing", "No such file")):
            with self.subTest(name):
                done = run("--ping", "--standalone", self.folder, "-o",
                           f"SOCKET={self.path(name)}")
                self.assertEqual(done.returncode, 6, done.stderr)
                self.assertIn(reason, done.stderr)
                self.assertEqual(done.stderr.count("\n"), 1, done.stderr)

    def test_a_server_that_is_none_is_told_apart_in_time(self) -> None:
        def reply(server: socket.socket, pieces: Iterable[bytes]) -> None:
            with contextlib.suppress(OSError):
                client, _ = server.accept()
                with client:
                    client.recv(9999)
                    for piece in pieces:
                        client.sendall(piece)
                        time.sleep(0.01)

        for name, pieces, reason in (
                ("mute", None, "timed out"),
                ("slow", itertools.repeat(b"x", 500), "timed out"),
                ("gone", (), "closed without"),
                ("smtp", [b"220 hi\n\n"], "220 hi")):
            with self.subTest(name), socket.socket(socket.AF_UNIX) as server:
                server.bind(self.path(name))
                server.listen()
                if pieces is not None:
                    in_background(reply, server, pieces)
                began = time.monotonic()
                with self.assertRaisesRegex(prl.PolicydError, reason):
                    prl.ping(settings_of({"SOCKET": self.path(name)}), 1)
                self.assertLess(time.monotonic() - began, 3)


class CommandLineTest(FolderTest):
    """Each option and command, and its exit status."""

    def get(self, name: str, *options: str) -> tuple[int, str]:
        """Return the status and output of --get-config."""
        return command("--get-config", name, *options)[:2]

    def database(self, *rows: tuple[str, int]) -> str:
        """Make an original's database of (id, age); return its path."""
        path = self.path("db.sqlite3")
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute(
                "CREATE TABLE mail_count (id varchar(40) NOT NULL, date bigint"
                " NOT NULL, recipient_count int DEFAULT 1, instance"
                " varchar(40) NOT NULL DEFAULT '0', protocol_state varchar(10)"
                " NOT NULL DEFAULT '0')")
            now = int(time.time())
            connection.executemany(
                "INSERT INTO mail_count (id, date) VALUES (?, ?)",
                [(identity, now - age) for identity, age in rows])
            connection.commit()
        return path

    def test_get_config_prints_str_as_the_original_does(self) -> None:
        path = self.write("test.yaml", """
            debug: no
            limits: [[10, 60], [150, 86400]]
            limits_by_id: {a: [], 192.168.0.254: [[1, 2]], "::1": []}
            report_to:
            socket_permission: 0666
            foo: {a: {b: 1.50, c: ~, d: [x, 'y"']}}
            fail_action: é
            """)
        for name, value in (
                ("debug", "False"), ("limits", "[[10, 60], [150, 86400]]"),
                ("limits_by_id", "{'a': [], '192.168.0.254': [[1, 2]],"
                 " '::1': []}"), ("limits_by_id.a", "[]"),
                ("limits_by_id.192.168.0.254", "[[1, 2]]"),
                ("limits_by_id.::1", "[]"), ("report_to", "None"),
                ("socket_permission", "438"), ("user", "policyd-rate-limit"),
                ("foo.a", "{'b': 1.5, 'c': None, 'd': ['x', 'y\"']}"),
                ("foo.a.b", "1.5"), ("fail_action", "é"),
                ("config_file", path), ("mysql_config.user", "username"),
                ("pgsql_config.host", "localhost"), ("delay_to_close", "300"),
                ("smtp_server", "('localhost', 25)")):
            with self.subTest(name=name):
                self.assertEqual(self.get(name, "-f", path), (0, value))
        for name, guess in (
                ("nope", ""), ("debug.x", "; is debug meant?"),
                ("limits.0", "; is limits meant?"), ("sqlite_config.nope",
                                                     "; is sqlite_config"),
                ("foo.", ""), (".", ""), ("", ""), ("foo.a.b.c", ""),
                ("LIMITS", "; is limits meant?")):
            with self.subTest(name=name):
                status, out, err = command("--get-config", name, "-f", path)
                self.assertEqual((status, out), (1, ""))
                self.assertIn(f"error: {name}: no such setting{guess}", err)

    def test_get_config_prints_socket_as_the_original_does(self) -> None:
        path = self.write("test.yaml", 'SOCKET: ["127.0.0.1", 8552]\n')
        self.assertEqual(
            self.get("SOCKET", "-f", path), (0, "('127.0.0.1', 8552)"))

    def test_get_config_works_with_no_file_and_bad_values(self) -> None:
        none, bad = self.path("none.yaml"), self.write("b.yaml", "limits: 5\n")
        for options, name, status, out in (
                ((none,), "limits", 0, "[(10, 60), (150, 86400)]"),
                ((none,), "count_mode", 0, "auto"),
                ((none,), "config_file", 0, "None"), ((none,), "x", 1, ""),
                ((bad,), "limits", 0, "5"), ((bad,), "debug", 0, "True"),
                ((bad, "-o", "socket_permission=x"), "socket_permission", 0,
                 "x"),
                ((bad, "-o", "user=nosuch"), "user", 0, "nosuch")):
            with self.subTest(name=name):
                self.assertEqual(self.get(name, "-f", *options), (status, out))

    def test_override_wins_over_the_file(self) -> None:
        path = self.write("test.yaml", "limits: [[1, 2]]\nlimits_by_id:\n"
                          "  joe.doe@x.org: [[1, 1]]\nmysql_config:\n")
        for name, overrides, value in (
                ("limits", ("limits=[[3, 4]]",), "[[3, 4]]"),
                ("limits", ("limits=[]", "limits=[[5, 6]]"), "[[5, 6]]"),
                ("limits_by_id", ("limits_by_id.192.168.0.254=[]",),
                 "{'joe.doe@x.org': [[1, 1]], '192.168.0.254': []}"),
                ("limits_by_id", ("limits_by_id.joe.doe@x.org=[]",),
                 "{'joe.doe@x.org': []}"),
                ("limits_by_id", ("limits_by_id={}", "limits_by_id.::1=[]"),
                 "{'::1': []}"),
                ("mysql_config.host", ("mysql_config.host=db",), "db"),
                ("debug", ("debug=off",), "False"), ("debug", ("debug=",),
                                                     "None"),
                ("fail_action", ("fail_action=a=b c",), "a=b c"),
                ("socket_permission", ("socket_permission=0600",), "384")):
            with self.subTest(overrides=overrides):
                options = [w for one in overrides for w in ("-o", one)]
                self.assertEqual(
                    self.get(name, "-f", path, *options), (0, value))
        self.assertEqual(prl.default_values()["limits_by_id"], {})

    def test_bad_override_ends_with_5_and_says_which(self) -> None:
        file = self.write(
            "test.yaml", "limits: [[1, 2]]\nlimits_by_id:\n  ann: []\n")
        for text, status, message in (
                ("debug", 5, "expected NAME=VALUE\n"),
                ("nope=1", 5, "nope: no such setting\n"),
                ("limts=3", 5, "limts: no such setting; is limits meant?\n"),
                ("=1", 5, ": no such setting\n"),
                ("config_file=x", 5, "config_file: no such setting"),
                ("debug.x=1", 5, "debug has no named entries"),
                ("limits.0=1", 5, "limits has no named entries"),
                ("user=1_0", 5, "put quotes around 1_0"),
                ("limits=[", 5, ""), ("user='x", 5, "close the quotes on"),
                ("limits=5", 5, "limits: found 5, expected a list such as"),
                ("limits_by_id.joe=5", 5, "limits_by_id: joe: found 5, expec"),
                ("limits_by_id={Ann: [], joe: 5}", 5, "limits_by_id: joe: "),
                ("limits_by_id.Ann=[]", 5, "limits_by_id: Ann and ann are the"
                 f" same ({self.path('test.yaml')}:3)"),
                ("SOCKET=[toto, 1]", 4, "SOCKET: found ['toto', 1], expec")):
            with self.subTest(text=text):
                got = command("-f", file, "--check", "-o", text)
                self.assertEqual(got[:2], (status, ""))
                self.assertTrue(got[2].startswith(
                    f"error: -o {text}: {message}"), got[2])

    def test_check_says_ok_and_changes_nothing(self) -> None:
        self.database(("Joe", 5))
        file = self.write("test.yaml", "count_mode: 1\n")
        before = self.contents()
        for options in (
                ["--standalone", self.folder], here_as_ourselves(self),
                ["--standalone", self.path("missing/too")]):
            with self.subTest(options=options):
                done = run("-f", file, "--check", *options)
                self.assertEqual(done.returncode, 0, done.stderr)
                shuts = is_root() and "postfix" in {
                    group.gr_name for group in grp.getgrall()}
                self.assertEqual(
                    "any account" in done.stderr,  # once it is made
                    "missing" not in options[1] or not shuts)
                self.assertRegex(done.stdout, (
                    r"^each login: 10 mails per .*\n"
                    r"the daemon is not running\nPostfix: not checked: .*\n"
                    r"SQLite \S+, /\S+3" + CHECK_OK))
                self.assertEqual(self.contents(), before)

    def test_check_says_when_any_account_may_connect(self) -> None:
        config = self.write("test.yaml", "count_mode: 1\n")
        os.mkdir(self.path("in"))
        for modes, override, told in (
                ((0o755, 0o755), "socket_permission=0666", True),
                ((0o711, 0o711), "socket_permission=0602", True),
                ((0o755, 0o750), "socket_permission=0666", False),
                ((0o750, 0o755), "socket_permission=0666", False),
                ((0o755, 0o755), "socket_permission=0660", False),
                ((0o750, 0o750), 'SOCKET=["127.0.0.1", 0]', True)):
            with self.subTest(modes=modes, override=override):
                os.chmod(self.folder, modes[0])
                os.chmod(self.path("in"), modes[1])
                done = run("-f", config, "--check", "--standalone",
                           self.path("in"), "-o", override)
                self.assertEqual(done.returncode, 0, done.stderr)
                self.assertEqual("any account" in done.stderr, told)
        os.chmod(self.folder, 0o755)  # what is made there will be open
        with patch.object(grp, "getgrall", return_value=[]):
            self.assertTrue(prl.anyone_may_connect(settings_of(
                {"SOCKET": self.path("missing/policy")})))

    def contents(self) -> dict[str, bytes]:
        """Return the files in the folder."""
        found = {}
        for name in os.listdir(self.folder):
            found[name] = b""
            if not os.path.isdir(self.path(name)):
                with open(self.path(name), "rb") as file:
                    found[name] = file.read()
        return found

    def test_check_says_what_is_wrong(self) -> None:
        os.mkdir(self.path("locked"), 0o555)
        os.chmod(self.folder, 0o777)
        file = self.write("test.yaml", "debug: no\n")
        bad = self.write("bad.sqlite3", "rubbish" * 1000)
        good = self.database(("joe", 5))
        for path in (bad, good):
            os.chmod(path, 0o666)
        options = [*here_as_ourselves(self), "-o",
                   f"sqlite_config.database={good}"]
        if is_root():
            nobody = pwd.getpwnam("nobody")
            options += ["-o", "user=nobody", "-o", "group="
                        + grp.getgrgid(nobody.pw_gid).gr_name]
        locked = self.path("locked")
        cases = [
            (f"SOCKET={locked}/s", 6, f"{locked}: cannot be written"),
            (f"pidfile={locked}/p", 6, f"{locked}: cannot be written"),
            (f"sqlite_config.database={locked}/db", 6, f"{locked}: cannot be"),
            (f"sqlite_config.database={bad}", 6, f"{bad}: file is not a data"),
            (f"sqlite_config.database={locked}", 6, f"{locked}: unable to op"),
            ("sqlite_config.nosuch=1", 6, f"{good}: "),
            ("sqlite_config.timeout=x", 6, f"{good}: "),
            (f"sqlite_config={{database: {self.folder}/none, nosuch: 1}}", 6,
             f"{self.folder}/none: "),
            *((f"sql_limits_by_id={query}", 6, f"{good}: sql_limits_by_id: ")
              for query in ("SELECT ? FROM nosuch", "rubbish", "SELECT '[1'",
                            "SELECT ? || '[['"))]
        if is_root():
            cases += [("user=nosuch", 2, "no user nosuch or no group "),
                      ("group=nosuch", 2, "no user nobody or no group nosuc")]
        for override, status, message in cases:
            with self.subTest(override=override):
                done = run("-f", file, "--check", *options, "-o", override)
                self.assertEqual(done.returncode, status, done.stderr)
                self.assertIn(f"error: {message}", done.stderr)
                self.assertNotIn("OK", done.stdout)

    def test_check_tries_the_query_before_the_first_start(self) -> None:
        for query, status in (("rubbish", 6), ("SELECT x FROM y WHERE ?", 6),
                              ("SELECT '[[1, 60]]' WHERE 'x' = ?", 0),
                              ("SELECT limits FROM rate_limits", 0)):
            with self.subTest(query):
                self.assertEqual(status, command(
                    "--check", "--standalone", self.path("none"), "-o",
                    f"sql_limits_by_id={query}")[0])

    def test_check_fails_where_a_start_would(self) -> None:
        file = self.write("a.yaml", "debug: no\n")
        long, other = self.path("x" * 200), self.write("other", "")
        for override in (
                f"SOCKET={long}", f"pidfile={self.folder}",
                f"SOCKET={file}/sub/policy", f"pidfile={file}/sub/pid",
                f"SOCKET={other}",
                'SOCKET=["192.0.2.1", 8552]', 'SOCKET=["192.168::1", 1234]'):
            with self.subTest(override=override):
                options = [*here_as_ourselves(self), "-o", override]
                done = run("-f", file, "--check", *options)
                self.assertEqual((done.returncode, done.stdout[-3:]), (6, ""))
                started = run("-f", file, *options)
                self.assertEqual(started.returncode, 6)
                for said in done.stderr, started.stderr:
                    self.assertRegex(
                        said, rf"(?m)^error: .*({self.folder}|192\.)")

    def as_nobody(self) -> str:
        """Write a program that is the daemon's, run as nobody by root."""
        nobody = pwd.getpwnam("nobody")
        return self.write("nobody.py", f"""import os, sqlite3, sys
import encodings.ascii, encodings.utf_8_sig  # nobody may not look there
import locale, smtplib, ssl
sys.path.insert(0, {TEMPORARY!r})
import policyd_rate_limit
os.setgroups([])
os.setgid({nobody.pw_gid})
os.setuid({nobody.pw_uid})
sys.exit(policyd_rate_limit.main())
""")

    def test_check_finds_the_files_that_stop_a_start(self) -> None:
        options = [*here_as_ourselves(self), "-o", "debug=False"]
        other = self.write("other", "not ours\n")
        pid, lock = self.path("pid"), self.path("pid.lock")

        def link(path: str) -> None:
            os.symlink(other, path)

        for path, make in (
                (pid, link), (pid, os.mkdir), (pid, os.mkfifo),
                (lock, link), (lock, os.mkdir),
                (self.path("socket.lock"), link),
                (self.path("socket.lock"), os.mkdir)):
            with self.subTest(path=path, make=make.__name__):
                make(path)
                file = self.write("test.yaml", "")
                done = run("--check", "-f", file, *options)
                self.assertEqual((done.returncode, done.stdout), (6, ""))
                self.assertRegex(done.stderr, f"(?m)^error: {path}: ")
                self.assertNotEqual(
                    run("-f", file, *options).returncode, 0)
                if os.path.isdir(path):
                    os.rmdir(path)
                else:
                    os.unlink(path)
        with open(other) as file_of_others:
            self.assertEqual(file_of_others.read(), "not ours\n")

    def test_check_finds_a_second_name_of_the_pidfile(self) -> None:
        os.link(self.write("other", ""), self.path("pid"))
        status, out, err = command(
            "--check", "-f", self.write("test.yaml", ""),
            *here_as_ourselves(self))
        self.assertEqual((status, out), (6, ""))
        self.assertIn(f"error: {self.path('pid')}: has a second hard link",
                      err)

    def test_check_finds_that_a_database_s_link_leads_nowhere(self) -> None:
        os.symlink(self.path("gone/db"), self.path("db.sqlite3"))
        options = ["-f", self.write("test.yaml", ""),
                   *here_as_ourselves(self)]
        status, out, err = command("--check", *options)
        self.assertEqual((status, out), (6, ""))
        self.assertIn("the folder that it links to is missing", err)
        os.mkdir(self.path("gone"))
        self.assertEqual(command("--check", *options)[0], 0)

    def test_check_finds_what_another_user_left(self) -> None:
        if not is_root():
            skip("only root becomes another user")
        nobody = pwd.getpwnam("nobody")
        os.chmod(self.folder, 0o1777)
        left, as_nobody = self.path("socket"), self.as_nobody()
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(left)
        os.chmod(left, 0o666)
        file = self.write("test.yaml", "debug: False\n")
        options = [*here_as_ourselves(self), "-o", "user=nobody", "-o",
                   f"group={grp.getgrgid(nobody.pw_gid).gr_name}"]
        for path in (left, self.path("pid"), self.path("pid.lock")):
            with self.subTest(path=path):
                if path != left:
                    self.write(os.path.basename(path), "")
                for program, status in ((as_nobody, 6), (COMPILED, 0)):
                    done = run("--check", "-f", file, *options,
                               program=program)
                    self.assertEqual(done.returncode, status, done.stderr)
                    said = "error" if status else "warning"
                    self.assertRegex(done.stderr, f"(?m)^{said}: {path}: ")
                started = run("-f", file, *options, program=as_nobody)
                self.assertEqual(started.returncode, 6, started.stderr)
                os.unlink(path)
        done = run("--check", "-f", file, *options, program=as_nobody)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stdout, CHECK_OK)

    def test_check_finds_a_database_that_cannot_be_written(self) -> None:
        if not is_root():
            skip("only root becomes another user")
        daemon = self.daemon(WIDE)
        self.assertEqual(daemon.ask(), PASS)
        daemon.stop()
        nobody = pwd.getpwnam("nobody")
        os.chmod(self.folder, 0o777)
        base = self.path("db.sqlite3")
        shutil.copy(daemon.database, base)
        file = self.write("test.yaml", "debug: False\n")
        options = [*here_as_ourselves(self), "-o", "user=nobody", "-o",
                   f"group={grp.getgrgid(nobody.pw_gid).gr_name}"]
        os.chmod(base, 0o644)
        done = run("--check", "-f", file, *options)
        self.assertEqual((done.returncode, done.stdout), (6, ""))
        self.assertIn(f"error: {base}: ", done.stderr)
        os.chown(base, nobody.pw_uid, nobody.pw_gid)
        self.assertEqual(run("--check", "-f", file, *options).returncode, 0)
        for name in ("db.sqlite3-wal", "db.sqlite3-shm"):
            os.chmod(self.write(name, "x" * 5000), 0o600)
            done = run("--check", "-f", file, *options)
            self.assertEqual((done.returncode, done.stdout), (6, ""), name)
            self.assertIn(f"error: {base}: ", done.stderr)
            os.unlink(self.path(name))

    def test_a_folder_that_root_alone_can_make_is_a_warning(self) -> None:
        if not is_root():
            skip("only root becomes another user")
        nobody = pwd.getpwnam("nobody")
        missing = self.path("missing")
        options = [*here_as_ourselves(self), "-o", "user=nobody", "-o",
                   f"group={grp.getgrgid(nobody.pw_gid).gr_name}"]
        os.chmod(self.folder, 0o777)
        for setting in ("SOCKET", "pidfile", "sqlite_config.database"):
            with self.subTest(setting=setting):
                done = run(
                    "--check", "-f", self.write("test.yaml", ""), *options,
                    "-o", f"{setting}={missing}/file")
                self.assertEqual((done.returncode, done.stderr.count(
                    f"warning: {missing}: missing")), (0, 0))
        os.chmod(self.folder, 0o755)
        given = self.path("given")
        os.mkdir(given)
        os.chown(given, nobody.pw_uid, nobody.pw_gid)
        options += ["-o", f"SOCKET={given}/s", "-o", f"pidfile={given}/p",
                    "-o", f"sqlite_config.database={given}/d"]
        for setting in ("SOCKET", "pidfile", "sqlite_config.database"):
            with self.subTest(setting=setting):
                done = run(
                    "--check", "-f", self.write("test.yaml", ""), *options,
                    "-o", f"{setting}={missing}/file")
                self.assertEqual(done.returncode, 0, done.stderr)
                self.assertIn(f"warning: {missing}: missing, or not writable"
                              " for nobody", done.stderr)
                self.assertIn(f"install -d -o nobody {missing}\n",
                              done.stderr)

    def test_check_tells_a_daemon_from_others_at_its_port(self) -> None:
        file = self.write("test.yaml", "debug: False\n")
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            options = ["-f", file, "--standalone", self.path("daemon"), "-o",
                       f'SOCKET=["127.0.0.1", {port}]']
            status, out, err = command("--check", *options)
            self.assertEqual((status, out), (6, ""))
            self.assertIn(f"error: 127.0.0.1:{port}: in use by another"
                          " program", err)
            self.assertNotEqual(run(*options).returncode, 0)
        self.assertIn("is not running\n", command("--check", *options)[1])
        daemon = self.daemon(WIDE, *options[4:])
        status, out, _ = command("--check", *daemon.options)
        self.assertEqual(status, 0)
        self.assertIn("\nthe daemon is running\n", out)

    def test_check_tells_a_daemon_from_others_at_its_path(self) -> None:
        options = ["-f", self.write("test.yaml", "debug: False\n"),
                   "--standalone", self.path("daemon")]
        os.mkdir(self.path("daemon"))
        path = self.path("daemon/policy")
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(path)
            other.listen()
            status, out, err = command("--check", *options)
            self.assertEqual((status, out), (6, ""))
            self.assertIn(f"error: {path}: in use by another program", err)
            self.assertEqual(run(*options).returncode, 3)

    def test_check_says_who_may_reach_a_port(self) -> None:
        port = free_port()
        for host, part in (("127.0.0.1", "any account"),
                           ("127.0.0.9", "any account"),
                           ("0.0.0.0", f"reach 0.0.0.0:{port} can exhaust")):
            with self.subTest(host=host):
                status, _, err = command(
                    "--check", "--standalone", self.folder, "-f",
                    self.write("test.yaml", "debug: False\n"), "-o",
                    f'SOCKET=["{host}", {port}]')
                self.assertEqual(status, 0, err)
                [warning] = err.splitlines()
                self.assertIn(part, warning)

    def test_an_sqlite_database_may_be_given_as_a_uri(self) -> None:
        os.mkdir(self.path("a b"))
        for number, (database, path) in enumerate((
                (f"file:{self.path('plain')}", self.path("plain")),
                (f"file:{self.path('new/folder/db')}?mode=rwc",
                 self.path("new/folder/db")),
                (f"file://{self.path('a%20b/c')}", self.path("a b/c")),
                (f"file://localhost{self.path('d')}?cache=private#x",
                 self.path("d")))):
            with self.subTest(database=database):
                config = (f"sqlite_config: {{database: {json.dumps(database)},"
                          " uri: true}\nlimits: [[2, 3600]]\n")
                options = ["-f", self.write("test.yaml", config), "-o",
                           "SOCKET=" + self.path("socket"), "-o",
                           "pidfile=" + self.path("pid")]
                if is_root():
                    options += here_as_ourselves(self)[:4]
                done = run("--check", *options)
                self.assertEqual(done.returncode, 0, done.stderr)
                self.assertRegex(
                    done.stdout, re.escape(f", {path}") + CHECK_OK)
                self.assertFalse(os.path.exists(path))
                daemon = self.daemon(
                    config, "-o", "sqlite_config="
                    f"{{database: {json.dumps(database)}, uri: true}}",
                    name=f"daemon{number}")
                for answer in (PASS, PASS, REFUSED):
                    self.assertEqual(daemon.ask(), answer)
                self.assertEqual(counted(path), {"joe": 2})
                self.assertIn("joe", run(
                    "--status", *daemon.options).stdout)
                self.assertFalse(os.path.exists("file:"))

    def test_a_uri_that_forbids_to_make_the_file_is_told(self) -> None:
        path = self.path("db")
        for mode in ("rw", "ro"):
            options = [
                "--standalone", self.folder, "-f",
                self.write("test.yaml", "debug: False\n"), "-o",
                f'sqlite_config={{database: "file:{path}?mode={mode}",'
                ' uri: true}']
            status, out, err = command("--check", *options)
            self.assertEqual((status, out), (6, ""), mode)
            self.assertIn("unable to open database file", err)

    def test_a_database_in_memory_needs_no_folder(self) -> None:
        locked = self.path("locked")
        os.mkdir(locked, 0o555)
        for database in (":memory:", "file::memory:", "file:x?mode=memory",
                         "file::memory:?cache=shared"):
            with self.subTest(database=database):
                text = f'{{database: "{database}", uri: true}}'
                program = self.as_nobody() if is_root() else COMPILED
                os.chmod(self.folder, 0o777)
                done = run("--check", "--standalone", self.folder, "-f",
                           self.write("test.yaml", ""), "-o",
                           f"sqlite_config={text}", cwd=locked,
                           program=program)
                self.assertEqual(done.returncode, 0, done.stderr)
                self.assertRegex(done.stdout, f", in memory{CHECK_OK}")
                daemon = self.daemon(
                    "limits: [[2, 3600]]", "-o", f"sqlite_config={text}",
                    name=f"daemon{len(os.listdir(self.folder))}")
                for answer in (PASS, PASS, REFUSED):
                    self.assertEqual(daemon.ask(), answer)
                self.assertNotIn("unavailable", daemon.log())
                done = run("--status", *daemon.options)
                self.assertEqual(done.returncode, 6)
                self.assertIn("in the daemon's memory", done.stderr)

    def test_a_file_that_only_root_can_read_is_told(self) -> None:
        if not is_root():
            skip("only root becomes another user")
        nobody = pwd.getpwnam("nobody")
        daemon = SystemDaemon(self.path("daemon"), (
            "user: nobody\ngroup: "
            f"{grp.getgrgid(nobody.pw_gid).gr_name}\ncount_mode: 1\n"))
        self.addCleanup(daemon.stop)
        self.assertEqual(run("--check", "-f", daemon.config).returncode, 0)
        self.assertNotIn("error", daemon.log())
        private = self.write("private", "#!/bin/sh\n")
        os.chmod(private, 0o700)
        for override, told in (("pidfile=/dev/null", 0),
                               ("alert_command=/bin/sh", 0),
                               (f"alert_command={private}", 1)):
            done = run("--check", "-f", daemon.config, "-o", "alert=True",
                       "-o", override, "-o", "report_to=a@b.c")
            self.assertEqual((done.returncode, done.stderr.count(
                "not executable")), (0, told), done.stderr)
        daemon.stop()
        os.chmod(daemon.config, 0o600)
        line = (f"{daemon.config}: nobody cannot read it, so a reload will"
                " fail, and so will a start by systemd; run: chgrp nogroup"
                f" {daemon.config} && chmod g+r {daemon.config}\n")
        done = run("--check", "-f", daemon.config)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stdout, CHECK_OK)
        self.assertIn(f"warning: {line}", done.stderr)
        daemon.start()
        daemon.wait_log(f"error: {line}")

    def test_start_that_fails_removes_nothing_of_others(self) -> None:
        file = self.write("a.yaml", "limits: [[1, 60]]\n")
        run("-f", file, *here_as_ourselves(self), "-o", f"SOCKET={file}")
        self.assertTrue(os.path.exists(file))
        daemon = self.daemon()
        done = run("--standalone", self.path("second"), "-o",
                   f"SOCKET={daemon.socket}")
        self.assertEqual(done.returncode, 3, done.stderr)
        self.assertEqual(daemon.ask(), PASS)

    def test_clean_deletes_only_what_no_limit_can_see(self) -> None:
        rows = (("joe", 150000), ("joe", 300000), ("ann", 150000),
                ("joe", 7100), ("joe", 7300), ("ann", 100), ("ann", 130))
        query = ("sql_limits_by_id: SELECT '[[1, 100000]]' WHERE 'joe' = ?\n")
        for config, deleted in (
                ("limits: [[1, 60]]\n", 5), ("limits: [[9, 3600]]\n", 4),
                ("limits: [[1, 1], [9, 3600], [2, 60]]\n", 4),
                ("limits: [[1, 60]]\nlimits_by_id: {x: [[1, 3600]]}\n", 4),
                ("limits: []\n", 1), ("limits: [[1, 160000]]\n", 0),
                ("limits: [[1, 60]]\n" + query, 2),
                ("limits: [[1, 999999999999]]\n", 0)):
            with self.subTest(config=config):
                for suffix in ("", "-wal", "-shm"):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(self.path("db.sqlite3" + suffix))
                path = self.database(*rows)
                clean = ("--clean", "-f", self.write("test.yaml", config),
                         "--standalone", self.folder)
                status, out, err = command(*clean)
                self.assertEqual((status, err), (0, ""))
                self.assertRegex(out, "0 records deleted\nnothing is deleted"
                                 " before 20.*: each host that shares")
                let_clean(path)
                self.assertEqual(command(*clean), (
                    0, f"{deleted} records deleted\n", ""))
                self.assertEqual(command(*clean)[1], "0 records deleted\n")
                with contextlib.closing(sqlite3.connect(path)) as connection:
                    left, = connection.execute(
                        "SELECT count(*) FROM mail_count").fetchone()
                self.assertEqual(left, len(rows) - deleted)

    def test_clean_works_while_a_daemon_works(self) -> None:
        daemon = self.daemon("limits: [[3, 60]]\ndebug: no\n")
        self.assertEqual(daemon.ask(recipient_count=2), PASS)
        now = int(time.time())
        with contextlib.closing(sqlite3.connect(daemon.database)) as database:
            database.executemany(
                "INSERT INTO mail_count (id, date) VALUES (?, ?)",
                [(f"user{n}", now - 1000) for n in range(5000)])
            database.commit()
        let_clean(daemon.database)
        cleaner = subprocess.Popen(
            [sys.executable, PROGRAM, "--clean", *daemon.options],
            stdout=subprocess.PIPE, text=True)
        with daemon.client() as client:
            while cleaner.poll() is None:
                self.assertEqual(client.ask(recipient_count=2), REFUSED)
            self.assertEqual(client.ask(recipient_count=1), PASS)
        out, _ = cleaner.communicate()
        self.assertEqual((cleaner.returncode, out), (0, "5000 records "
                                                     "deleted\n"))
        self.assertNotIn("database", daemon.log())

    def test_clean_that_fails_ends_with_8(self) -> None:
        with open(self.path("db.sqlite3"), "wb") as file:
            file.write(b"rubbish" * 1000)
        status, out, err = command("--clean", "--standalone", self.folder)
        self.assertEqual((status, out), (8, ""))
        self.assertEqual(err, f"error: {self.path('db.sqlite3')}: "
                         "file is not a database\n")

    def test_standalone_needs_only_its_folder(self) -> None:
        os.makedirs(self.path("home/.config"))
        os.mkdir(self.path("empty"))
        self.write("home/.config/policyd-rate-limit.yaml", "limits: broken\n")
        sa = self.path("new/sa")
        process = subprocess.Popen(
            [sys.executable, PROGRAM, "--standalone", "../new/sa"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            cwd=self.path("empty"), env={**os.environ, "HOME": self.path(
                "home"), "PYTHONDONTWRITEBYTECODE": "1"})
        self.addCleanup(process.kill)
        assert process.stdout is not None
        with process.stdout as stdout:
            told = [stdout.readline(), stdout.readline()]
        self.assertEqual(told, [
            "For main.cf:\n",
            "smtpd_data_restrictions = check_policy_service"
            f" {{ unix:{sa}/policy, default_action=DUNNO }}\n"])
        with Client(f"{sa}/policy") as client:
            self.assertEqual(client.ask(recipient_count=10), PASS)
            self.assertEqual(client.ask(), REFUSED)
        for name in ("policy", "db.sqlite3", "policyd-rate-limit.pid"):
            self.assertEqual(os.stat(f"{sa}/{name}").st_uid, os.geteuid())
        self.assertEqual(run("--standalone", sa).returncode, 3)
        process.terminate()
        self.assertEqual(process.wait(30), 0)
        self.assertEqual(os.listdir(self.path("empty")), [])
        self.assertEqual(sorted(os.listdir(self.folder)),
                         ["empty", "home", "new"])
        self.assertEqual(os.listdir(sa), ["db.sqlite3"])

    def test_standalone_takes_the_rest_from_a_file_and_o(self) -> None:
        daemon = self.daemon(
            "count_mode: 0\nuser: nosuch\nSOCKET: /nowhere/s\nbackend: 2\n"
            "limits: [[9, 9]]\n", "-o", "limits=[[1, 60]]",
            "-o", 'SOCKET=["127.0.0.1", 0]')
        found = re.search(r"smtpd_recipient_restrictions = "
                          r"check_policy_service { inet:127\.0\.0\.1:(\d+), "
                          r"default_action=DUNNO }\n",
                          daemon.wait_log("main.cf:\nsmtpd_recipient"))
        assert found is not None
        with Client(("127.0.0.1", int(found[1]))) as client:
            actions = [client.ask(protocol_state="RCPT") for _ in "12"]
        self.assertEqual(actions, [PASS, REFUSED])

    def test_main_cf_line_suits_count_mode_and_socket(self) -> None:
        for mode, address, stage, where in (
                (0, "/var/spool/postfix/ratelimit/policy", "recipient",
                 "unix:ratelimit/policy"),
                (1, "/run/p", "data", "unix:/run/p"),
                (2, ("::1", 8552), "data", "inet:[::1]:8552")):
            with self.subTest(address=address):
                self.assertEqual(
                    prl.main_cf(mode, address),
                    f"smtpd_{stage}_restrictions = check_policy_service"
                    f" {{ {where}, default_action=DUNNO }}")

    def test_usage_version_and_help(self) -> None:
        for arguments, status, text in (
                ("--version", 0, f"policyd-rate-limit {prl.VERSION}\n"),
                ("--bogus", 2, "unrecognized arguments: --bogus"),
                ("foo", 2, "unrecognized arguments: foo"),
                ("--block x --for bogus", 2, "argument --for: found 'bogus',"
                 " expected seconds, or a number with s, min, h, d or w, such"
                 " as 90s, 30min, 2h"),
                ("--get-config", 2, "expected one argument"),
                ("-f", 2, "expected one argument"),
                ("--clean --check", 2, "not allowed with argument"),
                ("--status --get-config debug", 2, "cannot be combined"),
                ("--ping --clean", 2, "not allowed with argument"),
                ("-h", 0, "Usage: policyd-rate-limit "), ("--help", 0, "")):
            with self.subTest(arguments=arguments):
                got, out, err = command(*arguments.split())
                self.assertEqual(got, status)
                self.assertIn(text, err if status else out)
        for option in ("-h", "--help", "--clean", "--get-config", "--check",
                       "--file", "-f", "-o", "--standalone", "--version"):
            self.assertRegex(command("-h")[1], rf"(?<![\w-]){option}\b")

    def test_what_readme_says_to_try_works(self) -> None:
        start, ask = [
            body.replace("/tmp/policyd", self.path("try")).strip()
            for _, body in readme_blocks()[:2]]
        refused = f"action={REFUSED}"
        with subprocess.Popen(
                ["sh", "-c", f"exec {start}"], cwd=HERE, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as daemon:
            self.addCleanup(daemon.kill)
            assert daemon.stdout is not None
            self.assertEqual(daemon.stdout.readline(), "For main.cf:\n")
            for answer in "action=dunno\n", refused:
                done = subprocess.run(
                    ["sh", "-c", ask], timeout=PATIENCE, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
                self.assertEqual(done.stdout.rstrip(), answer.rstrip())
            daemon.send_signal(signal.SIGINT)  # Ctrl-C
            self.assertEqual(daemon.wait(PATIENCE), 0)

    def test_old_ways_to_write_options_work(self) -> None:
        path = self.write("test.yaml", "debug: no\n")
        for line in (f"--file={path} --get-config=debug",
                     f"-f{path} --get debug", f"--get-config debug -f {path}",
                     f"--fil {path} --get-config debug",
                     f"--f {path} --g debug", f"--f={path} --get-c=debug",
                     f"--clean --get-config debug -f {path}",
                     f"--g debug --c --fi {path}"):  # which cleans nothing
            with self.subTest(line=line):
                self.assertEqual(command(*line.split())[:2], (0, "False"))
        here = here_as_ourselves(self)
        for option in "--c", "--cl", "--cle", "--clea", "--clean":
            with self.subTest(option):
                status, out, _ = command("--f", path, option, *here)
                self.assertEqual(status, 0)
                self.assertIn("0 records deleted\n", out)
        self.assertEqual(command("--h")[:2], command("--help")[:2])

    def test_unknown_user_ends_with_2_after_the_file(self) -> None:
        if not is_root():
            skip("only root looks for the user")
        file = self.write("test.yaml", "user: nosuch\n")
        bad = self.write("bad.yaml", "user: nosuch\nlimits: 5\n")
        for path, option, status in (
                (file, "--clean", 2), (file, "--check", 2),
                (bad, "--check", 5), (self.path("none"), "--clean", 5)):
            with self.subTest(path=path, option=option):
                status_, _, err = command("-f", path, option)
                self.assertEqual(status_, status)
                self.assertEqual("adduser --system" in err, status == 2)
        done = run("-f", file)
        self.assertEqual((done.returncode, done.stdout), (2, ""))
        self.assertEqual(self.get("user", "-f", file), (0, "nosuch"))

    def test_reload_reads_the_file_of_the_start(self) -> None:
        if not is_root():
            skip("only root's HOME changes with the user")
        os.makedirs(self.path("home/.config"))
        os.makedirs(self.path("run"), 0o755)
        os.chown(self.path("run"), pwd.getpwnam("nobody").pw_uid, -1)
        self.write(
            "home/.config/policyd-rate-limit.yaml", "user: nobody\n"
            f"group: {grp.getgrgid(pwd.getpwnam('nobody').pw_gid).gr_name}\n"
            f"SOCKET: {self.path('run/s')}\npidfile: {self.path('run/p')}\n"
            f"sqlite_config: {{database: {self.path('run/db')}}}\n")
        with patch.dict(os.environ, HOME=self.path("home")):
            daemon = Daemon.__new__(Daemon)
            daemon.folder, daemon.program = self.folder, PROGRAM
            daemon.options = []
            daemon.start()
        self.addCleanup(daemon.stop)
        daemon.send(signal.SIGHUP)
        wait_for(lambda: "reloaded" in daemon.log(), "the reload")
        self.assertIn("configuration reloaded", daemon.log())


class CommandsTest(FolderTest):
    """The commands of an emergency: --block, --limit, --unlimit, --reset."""

    config = """
        limits: [[100, 3600]]
        debug: False
        quotas: [{by: sasl_domain, limits: [[1000, 3600]]}]
        """

    def command(self, *options: str, config: str = "",
                ) -> tuple[int, str, str]:
        """Run a command on the test's database."""
        return command("--standalone", self.folder, "-f", self.write(
            "test.yaml", textwrap.dedent(config or self.config)), *options)

    def record(self, *names: str) -> None:
        """Have a mail recorded for each name."""
        self.assertEqual(self.command("--clean")[0], 0)  # makes the tables
        with contextlib.closing(sqlite3.connect(
                self.path("db.sqlite3"))) as database, database:
            database.executemany(prl.INSERT.format("(?, ?, ?, ?, ?, ?)"), [
                (name, int(time.time()), 1, "", "DATA", 1) for name in names])

    def test_what_blocks_nobody_is_refused(self) -> None:
        self.record("*x@y.org")
        for name, told in (
                ("@example.org", "then use sasl_domain=example.org"),
                ("*@x.org", "then use sasl_domain=x.org"),
                ("10.0.0.0/8", "limits_by_id"), ("joe*", "limits_by_id"),
                ("client_address=10.0.0.1", "no quota client_address")):
            for options in (f"--block={name}",), ("--limit", name, "5/min"):
                with self.subTest(options):
                    status, out, err = self.command(*options)
                    self.assertEqual((status, out), (2, ""))
                    self.assertIn(told, err)
        for name in ("joe", "10.0.0.1", "sasl_domain=example.org", "a/b",
                     "sender=joe@x.org", "*x@y.org"):
            with self.subTest(name):
                config = self.config + "limit_by_sender: True\n"
                self.assertEqual(self.command(
                    "--block", name, config=config)[0], 0)

    def test_an_unknown_name_is_told_with_similar_ones(self) -> None:
        self.record("joe@example.org", "joey@example.org", "ann@example.org")
        for options, result in (
                (("--block", "joe"), "the block applies to exactly this name"),
                (("--limit", "joe@exmple.org", "5/min"),
                 "the limit applies to exactly this name"),
                (("--status", "jo"),
                 "if it sent mail, these limits would apply"),
                (("--reset", "jo"), "nothing was recorded")):
            status, _, err = self.command(*options)
            self.assertEqual(status, 0)
            self.assertIn(f"warning: {options[1]}: no record of this identity;"
                          " check the spelling (recorded: joe@example.org,"
                          f" joey@example.org): {result}\n", err)
        for option in "--block", "--status":
            self.assertEqual(self.command(option, "ann@example.org")[2], "")

    def test_no_name_is_called_unknown_that_cannot_be_recorded(self) -> None:
        self.record("sender=joe@example.org", "sasl_username=joe")
        quota = "quotas: [{by: sasl_username, limits: [3/h]}]\n"
        for name, config in (
                ("joe@example.org", "limit_by_sender: True\n"),
                ("joe", "limits: []\n" + quota), ("joe", quota),
                ("ann@staff.org", 'limits_by_id: {"@staff.org": []}\n')):
            with self.subTest(config):
                self.assertEqual(
                    self.command("--status", name, config=config)[2], "")

    def test_a_sender_of_the_same_name_is_told(self) -> None:
        name, config = "joe@x.org", self.config + "limit_by_sender: True\n"
        told = ("warning: sender=joe@x.org is another identity, which stays as"
                " it is: the mail with this envelope sender of clients that"
                " have not logged in\n")
        self.record(name, f"sender={name}")
        for options in (("--block", name), ("--limit", name, "5/min"),
                        ("--reset", name), ("--unlimit", name)):
            with self.subTest(options):
                self.assertEqual(self.command(*options, config=config)[2],
                                 told)
                self.assertEqual(self.command(*options)[2], "")
        for options in (("--block", f"sender={name}"), ("--block", "ann")):
            with self.subTest(options):
                self.assertNotIn(
                    told, self.command(*options, config=config)[2])
        shown = self.command("--status", f"sender={name}", config=config)[1]
        self.assertEqual(re.findall("(?m)^(.*)\nlast mail", shown),
                         [f"sender={name}"])

    def test_swapped_numbers_of_a_limit_are_told(self) -> None:
        self.record("joe")
        for limits, told in (
                ("[[86400, 150]]", "warning: LIMITS: [86400, 150] lets 576"
                 " mails pass in a second; is [150, 86400] meant?\n"),
                ("[[150, 86400]]", "")):
            self.assertEqual(self.command("--limit", "joe", limits)[2], told)

    def test_no_limits_are_shown_as_such(self) -> None:
        self.record("joe")
        self.command("--limit", "joe", "[]")
        self.assertRegex(self.command("--status")[1],
                         r"(?m)^joe +no limits .*permanent$")
        self.assertRegex(self.command("--status", "joe")[1],
                         r"from --limit \(.*\):\n  no limits\n")

    def test_what_standalone_ignores_of_a_file_is_told(self) -> None:
        path = self.write("other.yaml", "backend: 1\nSOCKET: /run/x\n"
                          "limits: [[7, 60]]\n")
        status, out, err = command(
            "--standalone", self.folder, "-f", path, "--check")
        self.assertEqual(status, 0, err)
        for number, name in enumerate(("backend", "SOCKET"), 1):
            self.assertIn(f"warning: {path}:{number}: {name} has no effect"
                          f" with --standalone; use -o {name}=VALUE\n", err)
        self.assertIn("7 mails per minute", out)

    def test_they_work_though_another_setting_is_wrong(self) -> None:
        for line, place in (("limits: nonsense", ":2: limits"),
                            ("quotas: [{by: nobody}]", ":2: "),
                            ("smtp_server: [1, 2, 3]", ":2: smtp_server")):
            for options in (("--block", "joe"), ("--unlimit", "joe"),
                            ("--limit", "joe", "3/h"), ("--reset", "joe")):
                with self.subTest(line=line, options=options):
                    status, _, err = self.command(
                        *options, config=f"\n{line}\n")
                    self.assertEqual(status, 0, err)
                    self.assertRegex(err, f"{place}.*; this command ignores")
        self.assertEqual(self.command(
            "--block", "joe", config="db_timeout: x\n")[0], 5)
        self.assertEqual(self.command(  # it may be the key of one of them
            "--block", "sasl_domain=x.org", config="quotas: [5]\n")[0], 0)

    def test_without_the_database_they_say_what_to_do(self) -> None:
        os.mkdir(self.path("db.sqlite3"))
        status, out, err = self.command("--block", "joe")
        self.assertEqual((status, out), (6, ""))
        for part in ("nothing was changed: repeat this when",
                     "To stop joe now, change its password"):
            self.assertIn(part, err)

    def test_an_id_may_begin_with_a_dash(self) -> None:
        for name in "-x@y.org", "--", "-", "-f", "--json":
            for option in "--block", "--status", "--unlimit", "--reset":
                with self.subTest(option=option, name=name):
                    status, out, err = self.command(f"{option}={name}")
                    self.assertEqual(status, 0, err)
                    self.assertIn(f"{name}", out)
        for options in (("--limit", "-x@y", "5/min"), ("--block", "-x@y"),
                        ("--unlimit", "-x@y"), ("--reset", "-x@y")):
            with self.subTest(options):
                status, out, err = self.command(*options)
                self.assertEqual(status, 0, err)
                self.assertIn("-x@y: ", out)

    def test_what_ends_a_block_is_told_and_what_was_ended(self) -> None:
        self.record("joe")
        _, out, _ = self.command("--block", "joe", "--for", "1h")
        self.assertRegex(out, r"^joe: blocked until 20.*\nTo end that:"
                         r" policyd-rate-limit --unlimit=joe\n$")
        self.assertIn("It is still blocked; to end that: policyd-rate-limit"
                      " --unlimit=joe\n", self.command("--reset", "joe")[1])
        self.assertRegex(self.command("--unlimit", "joe")[1], (
            "^joe: its usual limits apply again; it had blocked until 20.*,"
            " since 20"))
        self.assertEqual(self.command("--unlimit", "joe")[1],
                         "joe: already has its usual limits\n")


class FailuresTest(AwayTest):
    """What happens when things fail: README has a table of it."""

    def start_that_waits(self, *options: str) -> subprocess.Popen[str]:
        """Start a process and wait until it has opened its database."""
        process = subprocess.Popen(
            [sys.executable, "-W", "error", PROGRAM, "-o", "db_timeout=600",
             "--standalone", self.path("daemon"), *options],
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        wait_until_open(process, self.path("daemon/db.sqlite3"))
        return process

    def test_limits_hold_while_the_database_is_away(self) -> None:
        """The database is unavailable, locked, full, unreadable or corrupt"""
        for name, broken in (
                ("locked", lambda daemon: locked(daemon.database)),
                ("full", disk_full)):
            with self.subTest(name):
                daemon = self.daemon(self.config, name=name)
                self.check_away(daemon, broken(daemon))

    def test_it_starts_without_a_database(self) -> None:
        """The database fails at once"""
        path = self.write("db", "rubbish" * 999)
        daemon = self.daemon(
            self.config, "-o", f"sqlite_config.database={path}")
        daemon.database = path
        self.assertEqual([daemon.ask(), daemon.ask()], [AWAY, AWAY])
        os.unlink(path)
        self.assertEqual(daemon.ask(), PASS)
        self.assertEqual(counted(path), {"joe": 3})
        self.assertEqual(daemon.log().count(
            "the database is unavailable"), 1)

    def test_what_is_refused_in_an_outage_is_not_counted(self) -> None:
        """The database is unavailable, and db_error_action refuses"""
        for action in ("defer_if_permit try later", "451 4.3.0 try later"):
            with self.subTest(action):
                self.check_refused_in_outage(action)

    def check_refused_in_outage(self, action: str) -> None:
        """Check that nothing is counted that db_error_action refused."""
        daemon = self.daemon(
            f"limits: [[3, 600]]\ndb_timeout: 1\ndb_error_action: {action}\n"
            "quotas: [{by: sasl_username, count: sender, limits: [3/h]}]",
            name=action[:3])
        answers = []

        def ask(**attributes: object) -> str:
            answers.append(daemon.ask(**attributes))
            return answers[-1]

        self.assertEqual([ask(), ask()], [PASS, PASS])
        with moved_away(daemon.database):
            os.mkdir(daemon.database)
            self.assertEqual([ask(sender=f"{n}@example.org")
                              for n in range(9)], [action] * 9)
            self.assertEqual(ask(recipient_count=2), REFUSED)
            os.rmdir(daemon.database)
        with locked(daemon.database):  # the daemon waits, and gives up
            self.assertEqual(ask(sender="x@example.org"), action)
        wait_for(lambda: ask(sasl_username="ann") == PASS, "it")
        self.assertEqual(ask(sender="y@example.org"), PASS)
        self.assertEqual(ask(), REFUSED)
        self.assertEqual(counted(daemon.database)["joe"], 3)
        logged = re.findall(", action=(.*)", daemon.log())
        self.assertEqual(logged, answers)
        self.assertLess(daemon.log().index("the database is unavailable"),
                        daemon.log().index(f", action={action}\n"))

    def test_a_mail_refused_in_an_outage_is_charged_once_it_is_over(
            self) -> None:
        """RCPT is refused, and DATA of the other recipients comes after."""
        daemon = self.daemon(
            "limits: [[9, 600]]\ndb_error_action: 450 try later\n")
        with daemon.client() as client:
            with moved_away(daemon.database):
                os.mkdir(daemon.database)
                self.assertEqual(
                    client.ask(protocol_state="RCPT"), "450 try later")
                os.rmdir(daemon.database)
            self.assertEqual(client.ask(protocol_state="RCPT"), PASS)
            self.assertEqual(client.ask(recipient_count=1), PASS)
        self.assertEqual(counted(daemon.database), {"joe": 1})

    def test_a_wait_of_many_for_a_lock_is_bounded(self) -> None:
        """The database hangs"""
        daemon = self.daemon(self.config)
        waits: list[float] = []

        def ask(number: int) -> str:
            with daemon.client() as client:
                wait_for(lambda: time.monotonic() > start + number / 20, "")
                asked = time.monotonic()
                answer = client.ask()
                waits.append(time.monotonic() - asked)
            return answer

        self.passes(daemon)
        with locked(daemon.database):
            start = time.monotonic()
            self.assertEqual(set(at_once(ask, range(20))), {AWAY})
        self.assertLess(max(waits), 4)

    def test_an_outage_s_mails_are_counted_and_its_requests_told(self) -> None:
        """The database is back"""
        daemon = self.daemon(self.config.replace("1000", "3"),
                             program=hurried(self.folder, 1))
        self.assertEqual(daemon.ask(), PASS)
        with moved_away(daemon.database):
            os.mkdir(daemon.database)
            self.assertEqual([daemon.ask() for _ in range(4)],
                             [AWAY, AWAY, REFUSED, REFUSED])
            os.rmdir(daemon.database)
        daemon.send(signal.SIGUSR2)
        self.assertIn("1 passed, 2 refused, 2 database_errors,"
                      " 4 judged_in_memory", daemon.wait_log("in 0 minutes"))
        wait_for(lambda: counted(daemon.database).get("joe") == 3,
                 "the rows, without another mail")
        daemon.wait_log("the database is available again")

    def test_an_end_is_told_though_memory_has_nothing_to_store(self) -> None:
        """The database is back"""
        daemon = self.daemon(
            "limits: [[3, 600]]\ndb_error_action: 450 later\n",
            program=hurried(self.folder, 1))
        self.assertEqual(daemon.ask(), PASS)
        with moved_away(daemon.database):
            os.mkdir(daemon.database)
            self.assertEqual(daemon.ask(), "450 later")
            os.rmdir(daemon.database)
        daemon.wait_log("the database is available again")

    def test_what_was_counted_in_memory_ends_with_the_daemon(self) -> None:
        """The daemon ends while the database is unavailable"""
        daemon = self.daemon(self.config)
        self.passes(daemon)
        with locked(daemon.database):
            self.assertEqual(daemon.ask(), AWAY)
            self.assertEqual(daemon.stop(), 0)
        daemon.start()
        self.passes(daemon)
        self.assertEqual(counted(daemon.database), {"honest": 2})

    def test_one_mail_s_failure_is_no_other_s(self) -> None:
        """The database refuses one mail"""
        daemon = self.daemon(self.config.replace("1000", "30").replace(
            "db_timeout: 1", "db_timeout: 60"))  # a slow disk is no outage
        self.passes(daemon)
        with contextlib.closing(sqlite3.connect(daemon.database)) as other:
            other.execute(
                "CREATE TRIGGER bad BEFORE INSERT ON mail_count"
                " WHEN new.id = 'bad' BEGIN SELECT RAISE(ABORT, 'bad'); END")
        mails = [{**mail, "sasl_username": name} for mail in numbered(20)
                 for name in ("bad", "bad", "ann", "bob", "eve")]
        told = collections.Counter(
            (mail["sasl_username"], action)
            for mail, action in flood([daemon], mails))
        self.assertEqual(told, {
            ("bad", AWAY): 30, ("bad", REFUSED): 10,
            ("ann", PASS): 20, ("bob", PASS): 20, ("eve", PASS): 20})

    def test_a_query_that_fails_leaves_the_limits_of_the_file(self) -> None:
        """The query of sql_limits_by_id fails, or yields nonsense"""
        for name, query in (("fails", "SELECT limits FROM nosuch"),
                            ("nonsense", "SELECT 'rubbish' WHERE ? <> ''")):
            with self.subTest(name):
                daemon = self.daemon("limits: [[2, 600]]\n", "-o",
                                     f"sql_limits_by_id={query}", name=name)
                self.assertEqual([daemon.ask() for _ in "abc"],
                                 [PASS, PASS, REFUSED])
                self.assertIn("warning: sql_limits_by_id: ", daemon.log())

    def test_requests_in_hand_are_answered_before_the_end(self) -> None:
        """The daemon is stopped"""
        for options in (), ("-o", 'SOCKET=["127.0.0.1", 0]'):
            daemon = self.daemon(WIDE, *options, name=f"d{len(options)}")
            address = tcp_address(daemon) if options else daemon.socket
            with contextlib.ExitStack() as stack:
                clients = [stack.enter_context(Client(address))
                           for _ in range(20)]
                self.assertEqual({c.ask() for c in clients}, {PASS})
                daemon.send(signal.SIGSTOP)
                for client in clients:
                    client.socket.sendall(request_text())
                start = time.monotonic()
                self.assertEqual(daemon.stop(), 0)
                self.assertLess(time.monotonic() - start, 15)  # at once
                self.assertEqual({c.read() for c in clients}, {PASS})
            self.assertEqual(counted(daemon.database), {"joe": 40})

    def test_kill_9_forgets_no_mail_that_was_let_through(self) -> None:
        """It is killed, or the power fails"""
        daemon = self.daemon(WIDE)
        passed: list[str] = []

        def load(_: int) -> None:
            with daemon.client() as client, contextlib.suppress(OSError):
                while client.ask() == PASS:
                    passed.append(PASS)
                    if len(passed) == 1000:
                        daemon.process.kill()

        at_once(load, range(16))
        daemon.process.wait()
        self.assertGreaterEqual(len(passed), 1000)
        found = counted(daemon.database)["joe"]
        self.assertLessEqual(len(passed), found)
        self.assertLessEqual(found, len(passed) + 16)  # those in flight
        daemon.start()
        self.passes(daemon)

    def test_a_clock_that_is_set_gains_no_room_and_locks_nobody(self) -> None:
        """The clock is set back"""
        start = 1_700_000_000
        for step in 0, 1, 300, 599, 601, 86400, 10**8:
            with self.subTest(step):
                ask = self.service(self.path(f"back{step}"), [[3, 60]])
                self.assertEqual([ask(start + step, "joe", 1) for _ in "abc"],
                                 [PASS] * 3)
                for later in range(0, 60, 20):  # set back: all still count
                    self.assertEqual(ask(start + later, "joe", 1), REFUSED)
                wait = step if step <= 600 else 0
                self.assertEqual(ask(start + wait + 60, "joe", 3), PASS)
                self.assertEqual(ask(start + wait + 61, "joe", 1), REFUSED)

    def test_windows_empty_sooner_when_the_clock_is_set_forward(self) -> None:
        """The clock is set forward"""
        start = 1_700_000_000
        for step in 1, 300, 86400:
            with self.subTest(step):
                ask = self.service(self.path(f"on{step}"), [[3, 60]])
                self.assertEqual(ask(start, "joe", 3), PASS)
                late = start + step + 60
                self.assertEqual(ask(late, "joe", 3), PASS)
                self.assertEqual(ask(late + 59, "joe", 1), REFUSED)

    def test_rubbish_is_hung_up_on_with_one_line_of_log(self) -> None:
        """A request cannot be read (not Postfix's, over 32 kB, over 1,000
        lines)
        """
        head = b"request=smtpd_access_policy\nprotocol_state=DATA\n"
        table = (
            head + b"a=" + b"x" * 70000, b"a" * 10_000_000,
            head + b"a=b\n" * 1000 + b"\n", b"a=b\n" * 100_000,
            head + b"no equals sign\n\n", head + b"a=\0\n\n", b"\0" * 99999,
            b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(range(256)),
            b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n", b"\n\n", b"\n",
            b"request=other\n\n", b"sasl_username\n\n")
        daemon = self.daemon(WIDE)
        start, log = status(daemon, "VmRSS")[0], daemon.log()
        for rubbish in table:
            with self.subTest(rubbish[:40]), daemon.client() as client:
                with contextlib.suppress(ConnectionError):
                    client.socket.sendall(rubbish)
                    client.socket.shutdown(socket.SHUT_WR)
                self.assertEqual(client.read(), "")
                self.passes(daemon)
        said = daemon.log()[len(log):].splitlines()
        self.assertEqual(len(said), 1, said)
        self.assertLess(status(daemon, "VmRSS")[0], start + 8000)

    def test_an_honest_client_gets_in_when_connections_run_out(self) -> None:
        """More than 4,000 connections, or than the limits on open files and
        threads allow
        """
        daemon = self.daemon(WIDE, program=self.few_files(128))
        self.check_crowded(daemon, 300)

    def test_an_idle_connection_is_closed(self) -> None:
        """A client is silent"""
        with self.daemon("delay_to_close: 1\n").client() as client:
            start = time.monotonic()
            self.assertEqual(client.ask(), PASS)
            self.assertEqual(client.read(), "")
        self.assertGreater(time.monotonic() - start, 0.9)

    def test_a_broken_configuration_is_told_at_the_start(self) -> None:
        """The configuration is broken at a start"""
        for text, status_, place in (
                ("limits: [[1, 60]\n", 5, "test.yaml:1: "),
                ("\n\nlimits: 5\n", 5, "test.yaml:3: limits: "),
                ("SOCKET: [1, 2, 3]\n", 4, "test.yaml:1: SOCKET: ")):
            with self.subTest(text):
                done = run("-f", self.write("test.yaml", text))
                self.assertEqual(done.returncode, status_)
                self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
                self.assertIn(place, done.stderr)

    def test_hup_with_a_broken_file_keeps_the_settings(self) -> None:
        """The configuration is broken at a reload"""
        daemon = self.daemon("limits: [[1, 600]]\n")
        with daemon.client() as client:
            for text in ("limits: [2, 500]\n", "limits: [[", "\0", "- 1",
                         "[" * 500, "user: {1: 2", "limits: 1:3"):
                said = len(daemon.log())
                self.write("daemon/test.yaml", text)
                with self.subTest(text[:20]):
                    daemon.send(signal.SIGHUP)
                    daemon.wait_log("reload failed", said)
            os.unlink(daemon.config)
            daemon.send(signal.SIGHUP)
            daemon.wait_log("no configuration file found")
            self.assertEqual([client.ask(), client.ask()], [PASS, REFUSED])

    def test_what_a_reload_cannot_change_is_told(self) -> None:
        """A setting is changed that a reload cannot change (user, group,
        pidfile, SOCKET, database)
        """
        changes = {
            "user": "joe", "group": "joe", "socket_permission": 0o600,
            "mysql_config": {}, "pgsql_config": {}, "db_timeout": 7}
        self.assertLessEqual(set(changes), set(prl.FIXED))
        daemon = self.daemon("limits: [[1, 600]]\n")
        self.write("daemon/test.yaml", json.dumps(
            {**changes, "limits": [[2, 600]]}))
        daemon.send(signal.SIGHUP)
        log = daemon.wait_log("configuration reloaded")
        for name in prl.FIXED:
            self.assertEqual(
                log.count(f"warning: {name}: a change takes effect at the"
                          " next start"), name in changes, name)
        self.assertEqual([daemon.ask() for _ in range(3)],
                         [PASS, PASS, REFUSED])

    def test_another_instance_does_the_first_no_harm(self) -> None:
        """A second daemon is started"""
        daemon = self.daemon(WIDE)
        for options in (), ("-o", "pidfile=" + self.path("other.pid")):
            with self.subTest(options), open(daemon.pidfile) as file:
                inode = os.stat(daemon.socket).st_ino
                done = run("--standalone", daemon.folder, *options)
                self.assertEqual(done.returncode, 3, done.stderr)
                self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
                self.assertEqual(file.read(), f"{daemon.process.pid}\n")
                self.assertTrue(os.path.samestat(
                    os.stat(daemon.pidfile), os.fstat(file.fileno())))
                self.assertTrue(os.path.exists(daemon.socket))
                self.assertEqual(os.stat(daemon.socket).st_ino, inode)
                self.passes(daemon)
        self.assertFalse(os.path.exists(self.path("other.pid")))

    def test_a_signal_ends_a_start_or_a_cleaning_that_takes_long(self) -> None:
        """It is stopped while it starts or updates an old table"""
        for options, number in itertools.product(
                ((), ("--clean",)), (signal.SIGTERM, signal.SIGINT)):
            self.daemon(WIDE).stop()
            with self.subTest(options=options, number=number):
                with locked(self.path("daemon/db.sqlite3")):
                    process = self.start_that_waits(*options)
                    process.send_signal(number)
                    self.assertEqual(process.wait(PATIENCE),
                                     -number if options else 0)
                assert process.stderr is not None
                self.assertEqual(process.stderr.read(), "")
        self.passes(self.daemon(WIDE))


SENDERS = (
    "joe@example.org", "jörg@exämple.org", '"j ö"@example.org',
    "a=b@example.org", '"a b=c"@example.org', '"a\\"b\\\\"@example.org',
    "a" * 1900 + "@example.org")
RAW = (  # what a mail client may say at EHLO and MAIL FROM
    (b"EHLO a\xff\xfeb", b"<x@a.test>"), (b"EHLO a b=c", b"<>"),
    (b"EHLO " + b"h" * 1900, b"<" + b"s" * 1900 + b"@a.test>"),
    (b"HELO \xc3\xb6", b"<a\xff\xfe@a.test>"), (b"EHLO a\tb\x01\x00c", b"<>"),
    (b"EHLO x", b"<a\xff\xfe@a.test> SMTPUTF8"),
    (b"EHLO x", b"<j\xc3\xb6@a.test> SMTPUTF8"),
    (b"EHLO x", b'<"a\tb\x01\rc"@a.test>'), (b"EHLO x", b"<a@b\xff.test>"),
    (b"EHLO x", b'<"a\\=\\ \\\x00"@a.test>'))


DEBIAN = """\
debug: True
user: "policyd-rate-limit"
group: "policyd-rate-limit"
pidfile: "/var/run/policyd-rate-limit/policyd-rate-limit.pid"
backend: 0
sqlite_config:
    database: "/var/lib/policyd-rate-limit/db.sqlite3"
mysql_config:
    {user: "username", passwd: "*****", db: "database", host: "localhost",
     charset: 'utf8'}
pgsql_config:
    {database: "database", user: "username", password: "*****",
     host: "localhost"}
SOCKET: "/var/spool/postfix/ratelimit/policy"
socket_permission: 0666
limits:
    - [10, 60] # in a minute
    - [150, 86400] # in a day
limits_by_id: {}
limit_by_sasl: True
limit_by_sender: False
limit_by_ip: False
limited_networks: []
success_action: "dunno"
fail_action: "defer_if_permit Rate limit reach, retry later"
db_error_action: "dunno"
report: False
report_from: null
report_to: null
report_subject: "policyd-rate-limit report"
report_limits: [86400]
report_only_if_needed: True
smtp_server: ["localhost", 25]
smtp_starttls: False
smtp_credentials: null
delay_to_close: 300
"""  # what 1.0.1.1 of Debian 11 and 12 comes with, which has no count_mode
DEBIAN_TABLES = """
CREATE TABLE mail_count (id varchar(40) NOT NULL, date bigint NOT NULL);
CREATE INDEX mail_count_index ON mail_count (id, date);
CREATE TABLE limit_report (id varchar(40) NOT NULL, delta int NOT NULL,
                           hit int NOT NULL DEFAULT 0);
CREATE UNIQUE INDEX limit_report_index ON limit_report (id, delta);
"""


class PostfixTest(FolderTest):
    """The daemon under a real Postfix, which is told who its clients are."""

    def setUp(self) -> None:
        """Skip where there is no Postfix."""
        super().setUp()
        if Postfix.missing():
            skip(f"missing: {Postfix.missing()}")

    def start(self, config: str, *stages: str, name: str = "mx",
              **main_cf: str) -> Postfix:
        """Start a daemon, and a Postfix that asks it at these stages."""
        self.policy = self.daemon(config, name=f"{name}-daemon")
        self.addCleanup(self.check_log, self.policy)
        check = ("check_policy_service"
                 f" {{ unix:{self.policy.socket}, default_action=DUNNO }}")
        return self.postfix(name, **main_cf, **{
            f"smtpd_{stage}_restrictions": check
            for stage in stages or ("data",)})

    def check_log(self, policy: Daemon) -> None:
        """Whatever Postfix sent, the daemon could read it."""
        for text in ("bad request", "internal error", "Traceback",
                     "is unavailable"):
            self.assertNotIn(text, policy.log())

    def postfix(self, name: str, **main_cf: str) -> Postfix:
        """Start a Postfix that ends with the test."""
        postfix = Postfix(self.path(name), **main_cf)
        self.addCleanup(postfix.stop)
        return postfix

    def test_who_is_over_the_limit_gets_450_and_others_go_on(self) -> None:
        postfix = self.start("limits: [[2, 3600]]")
        with postfix.connect("joe") as smtp:
            self.assertEqual([250, 250], mail(smtp))
            self.assertEqual([250, 250], mail(smtp))
            self.assertEqual([250, 450], mail(smtp))
        self.assertEqual([250, 450], postfix.send("JOE"))
        self.assertEqual([250, 250], postfix.send("ann"))
        postfix.wait_log("450 4.7.1 <DATA>: Data command rejected: Rate limit"
                         " reach, retry later")
        self.assertIn("identity=<joe>, cost=1, used=2/2/3600s",
                      self.policy.log())

    def test_recipients_of_a_mail_pass_all_or_none(self) -> None:
        postfix = self.start("limits: [[10, 3600]]")
        self.assertEqual([250] * 9, postfix.send("joe", 8))
        self.assertEqual([250] * 3 + [450], postfix.send("joe", 3))
        self.assertEqual([250] * 3, postfix.send("joe", 2))
        self.assertEqual([250, 450], postfix.send("joe"))

    def test_a_domain_s_quota_tells_when_there_is_room(self) -> None:
        postfix = self.start("""
            limits: [[100, 3600]]
            quotas:
                - by: sasl_domain
                  limits: [[3, 3600]]
                  fail_action: "450 4.7.1 $identity: room again in $room_in"
            """)
        for user in ("joe", "ann", "eve"):
            self.assertEqual([250, 250], postfix.send(f"{user}@X.example"))
        self.assertEqual([250, 450], postfix.send("bob@x.example"))
        self.assertEqual([250, 250], postfix.send("bob@y.example"))
        postfix.wait_log("450 4.7.1 <DATA>: Data command rejected:"
                         " sasl_domain=x.example: room again in ")
        self.assertEqual(counted(self.policy.database), {
            "joe@x.example": 1, "ann@x.example": 1, "eve@x.example": 1,
            "bob@y.example": 1, "sasl_domain=x.example": 3,
            "sasl_domain=y.example": 1})

    def test_a_stolen_password_is_blocked_until_it_is_unlimited(self) -> None:
        """README's recipe: many places, and block_for."""
        postfix = self.start("""
            limits: [[100, 3600]]
            block_for: 86400
            quotas:
                - name: many_places
                  by: sasl_username
                  count: client_network
                  limits: [[2, 3600]]
                  block_for: 86400
            """)
        for n in 1, 2, 1, 2:
            self.assertEqual([250, 250], postfix.send(
                "joe", address=f"192.0.{n}.7"))
        self.assertEqual([250, 450], postfix.send("joe", address="192.0.3.7"))
        self.assertEqual([250, 450], postfix.send("joe", address="192.0.1.7"))
        self.assertEqual([250, 250], postfix.send("ann", address="192.0.3.7"))
        postfix.wait_log("Sending is blocked, contact your postmaster")
        shown = run(*self.policy.options, "--status", "joe").stdout
        self.assertRegex(shown, r"\nmany_places=joe\n(.*\n)*limits, from"
                         r" --limit \(until .*, since .*, for exceeding"
                         r" 2/3600s\):\n +1d .* blocked\n")
        self.assertEqual(run(*self.policy.options, "--unlimit",
                             "many_places=joe").returncode, 0)
        self.assertEqual([250, 250], postfix.send("joe", address="192.0.1.7"))

    def test_data_charges_recipients_that_were_permitted_before(self) -> None:
        config = "limits: [[10, 3600]]"
        postfix = self.start(config, "data", smtpd_recipient_restrictions=(
            "check_recipient_access regexp:{ {/^r[2-9]/ OK} },"
            " check_policy_service { unix:"
            f"{self.path('mx-daemon/policy')}, default_action=DUNNO }}"))
        self.assertEqual([250] * 10, postfix.send("joe", 9))
        log = self.policy.log()
        self.assertEqual([log.count(f"identity=<joe>, cost={cost}, ")
                          for cost in (1, 7, 9)], [2, 1, 0], log)
        self.assertEqual(counted(self.policy.database), {"joe": 9})
        self.assertIn(450, postfix.send("joe", 9))

    def test_a_full_limit_silences_no_alert_or_report(self) -> None:
        to = ("r0@b.test", "r1@b.test")
        for stage in "recipient", "data", "end_of_data":
            postfix = self.start(json.dumps({
                "alert": True, "report_to": to, "limit_by_sasl": False,
                "quotas": [{"by": "server", "limits": [[1, 3600]]}]}),
                stage, name=stage)
            self.assertEqual(postfix.send(), [250, 250])
            self.assertIn(450, postfix.send())
            settings = prl.Settings(
                report_to=to, smtp_server=("127.0.0.1", postfix.port))
            self.assertEqual(prl.send_mail(settings, "subject", "text\n"), {})
            self.assertIn(450, postfix.send(
                address="198.51.100.1",
                sender=f"policyd-rate-limit@{socket.getfqdn()}"))
            postfix.stop()

    def test_one_recipient_too_many_gives_none_back(self) -> None:
        postfix = self.start("{count_mode: 0, limits: [[10, 3600]]}",
                             "recipient")
        self.assertEqual([250] * 10 + [450, 250], postfix.send("joe", 11))
        self.assertEqual([450] * 11, postfix.send("joe", 11))
        self.assertEqual([250, 250], postfix.send("ann"))

    def test_an_upgrade_from_debian_s_package_stops_at_the_limit(self) -> None:
        os.mkdir(self.path("mx-daemon"))
        earlier = int(time.time()) - 3600
        with contextlib.closing(sqlite3.connect(
                self.path("mx-daemon/db.sqlite3"))) as old, old:
            old.executescript(DEBIAN_TABLES)
            old.executemany("INSERT INTO mail_count VALUES (?, ?)", [
                (name, earlier) for name in ["joe"] * 100 + ["Joe"] * 45])
        postfix = self.start(DEBIAN, "recipient")
        self.assertEqual([250] * 5 + [450] * 15 + [250],
                         postfix.send("joe", 20))
        self.assertEqual([450], postfix.send("Joe"))
        self.assertEqual([250, 250], postfix.send("ann"))

    def test_mail_flows_while_the_daemon_is_stopped(self) -> None:
        postfix = self.start("limits: [[1, 3600]]")
        with postfix.connect("joe") as smtp:
            self.assertEqual([250, 250], mail(smtp))
            self.assertEqual([250, 450], mail(smtp))
            self.policy.stop()
            self.assertEqual([250, 250], mail(smtp))
            self.policy.start()
            self.assertEqual([250, 450], mail(smtp))

    def test_a_mail_asked_about_twice_counts_once(self) -> None:
        postfix = self.start("{count_mode: 2, limits: [[2, 3600]]}",
                             "data", "end_of_data")
        with postfix.connect("joe") as smtp:
            self.assertEqual([250, 250], mail(smtp))
            self.assertEqual([250, 250], mail(smtp))
            self.assertEqual([250, 450], mail(smtp))
        self.assertEqual(3, self.policy.log().count("identity=<joe>"))

    def test_a_mail_is_refused_at_its_end(self) -> None:
        postfix = self.start("limits: [[3, 3600]]", "end_of_data")
        self.assertEqual([250, 250, 250], postfix.send("joe", 2))
        self.assertEqual([250, 250, 450], postfix.send("joe", 2))
        postfix.wait_log(
            "<END-OF-MESSAGE>: End-of-data rejected: Rate limit reach")

    def test_any_sender_is_counted(self) -> None:
        postfix = self.start("{limit_by_sender: True, limits: [[1, 3600]]}")
        for sender in SENDERS:
            with self.subTest(sender[:40]):
                self.assertEqual([250, 250], postfix.send(sender=sender))
                self.assertEqual([250, 450], postfix.send(sender=sender))

    def test_any_bytes_of_a_client_are_counted(self) -> None:
        postfix = self.start("limits: [[1000, 3600]]", smtputf8_enable="no")
        taken = 0
        for helo, sender in RAW:
            with self.subTest(helo + sender), postfix.connect("joe") as smtp:
                for line in (helo, b"MAIL FROM:" + sender,
                             b"RCPT TO:<r@b.test>", b"DATA"):
                    smtp.send(line + b"\r\n")
                    code, _ = smtp.getreply()
                taken += code == 354
                smtp.close()
        log = self.policy.wait_log(f" used={taken}/1000/3600s")
        self.assertEqual(taken, log.count("identity=<joe>"))
        self.assertGreaterEqual(taken, 5, postfix.log())

    def test_client_addresses_are_counted_by_value(self) -> None:
        postfix = self.start(
            "{limit_by_ip: True, limits: [[1, 3600]],"
            ' limited_networks: [192.0.2.0/24, "2001:db8::/32"]}')
        for address, again in (
                ("192.0.2.7", "192.0.2.7"),
                ("2001:db8::ab", "2001:DB8:0:0:0000:0:0:AB")):
            self.assertEqual([250, 250], postfix.send(address=address))
            self.assertEqual([250, 450], postfix.send(address=again))
        self.assertIn("identity=<2001:db8::ab>", self.policy.log())
        for _ in range(2):
            self.assertEqual([250, 250], postfix.send(address="203.0.113.7"))

    def test_the_wrong_restriction_list_is_told_the_right_line(self) -> None:
        for mode, stage, over in ((0, "data", [450]),
                                  (1, "recipient", [250, 450])):
            with self.subTest(count_mode=mode):
                postfix = self.start(
                    f"{{count_mode: {mode}, limits: [[1, 3600]]}}", stage,
                    name=stage)
                self.assertEqual([250, 250], postfix.send("joe"))
                self.assertEqual([250, 250], postfix.send("joe"))
                log = self.policy.wait_log("nothing is limited")
                line = log.partition("put this into main.cf: ")[2]
                name, _, value = line.partition("\n")[0].partition(" = ")
                other = self.postfix(f"not-{stage}", **{name: value})
                self.assertEqual([250, 250], other.send("joe"))
                self.assertEqual(over, other.send("joe"))


CHECK = "check_policy_service { unix:ratelimit/policy, default_action=DUNNO }"
SMTP = "smtp inet n - y - - smtpd"
SUBMISSION = "submission inet n - y - - smtpd"


class PostconfTest(unittest.TestCase):
    """What --check makes of the text that postconf prints."""

    def told(self, main: str, services: str = SMTP, overrides: str = "",
             **settings: Any) -> list[str]:
        """Return the warnings about a Postfix."""
        postfix = prl.parse_postfix(
            "queue_directory = /var/spool/postfix\n"
            f"config_directory = /etc/postfix\n{main}", services, overrides)
        return list(prl.warn_of_postfix(postfix, settings_of(settings)))

    def test_who_asks_rightly_is_not_warned(self) -> None:
        data = f"smtpd_data_restrictions = {CHECK}"
        tcp = {"SOCKET": ["127.0.0.1", 8552]}
        tcp6 = {"SOCKET": ["::1", 8552]}
        bare = "smtpd_data_restrictions = check_policy_service"
        cases: list[tuple[str, dict[str, Any]]] = [
            (data, {}), (data, {"count_mode": 1}), (data, {"count_mode": 2}),
            (data.replace(",", ""), {}),
            (data.upper().replace("SMTPD_DATA_RESTRICTIONS", (
                "smtpd_data_restrictions")).replace(
                    "UNIX:RATELIMIT/POLICY", "unix:ratelimit/policy"), {}),
            (f"{bare} unix:ratelimit/policy", {}),
            (f"{bare} unix:ratelimit/policy, permit", {}),
            (f"{bare} local:ratelimit/policy", {}),
            (f"{bare} unix:ratelimit/./policy", {}),
            (f"{bare} {{ unix:ratelimit/policy }}", {}),
            (f"{bare} {{unix:ratelimit/policy,{{timeout = 9s}}}}", {}),
            ("smtpd_data_restrictions = permit_auth_destination,\n"
             f"   {CHECK}", {}),
            (f"smtpd_data_restrictions=warn_if_reject reject, {CHECK}", {}),
            (f"smtpd_recipient_restrictions = reject_unlisted_recipient,"
             f" {CHECK}, permit_mynetworks", {"count_mode": 0}),
            (f"smtpd_relay_restrictions = {CHECK}", {"count_mode": 0}),
            (f"smtpd_sender_restrictions = {CHECK}", {}),
            (f"smtpd_client_restrictions = {CHECK}", {"count_mode": 0}),
            (f"smtpd_end_of_data_restrictions = {CHECK}", {"count_mode": 1}),
            (f"{data}\nsmtpd_end_of_data_restrictions = {CHECK}", {}),
            (f"{data}\nsmtpd_recipient_restrictions = check_policy_service"
             " inet:127.0.0.1:10023", {}),  # another policy server
            (f"{data}\nsmtpd_recipient_restrictions = check_policy_service"
             " unix:ratelimit/policy", {"count_mode": 1}),
            (f"{bare} inet:127.0.0.1:8552", tcp),
            (f"{bare} inet:localhost:8552", tcp), (f"{bare} inet:8552", tcp),
            (f"{bare} inet:mx.example.org:8552", tcp),
            (f"{bare} inet:[127.0.0.1]:8552", tcp),
            (f"{bare} inet:[::1]:8552", tcp6),
            (f"{bare} inet:[0:0:0:0:0:0:0:1]:8552", tcp6),
            (f"{bare} inet:localhost:8552", tcp6),
            *([(f"{bare} inet:localhost:smtp", {"SOCKET": ["127.0.0.1", 25]})]
              if os.path.exists("/etc/services") else []),
            (f"{bare} inet:10.0.0.7:8552", {"SOCKET": ["0.0.0.0", 8552]}),
            ("", {"SOCKET": ["192.0.2.7", 8552]}),  # other hosts may ask
            # A class may be the result of a look-up, in any list.
            ("smtpd_restriction_classes = limited\nlimited ="
             f" permit_auth_destination {CHECK}\nsmtpd_client_restrictions ="
             " check_client_access hash:/x", {"count_mode": 1}),
            ("smtpd_restriction_classes = outer, limited\n"
             f"limited = {CHECK}\nouter = reject_unauth_pipelining limited\n"
             "smtpd_data_restrictions = outer", {"count_mode": 1}),
            (data, {"quotas": [{"by": "sasl_domain", "limits": [[1, 60]]}]}),
            (f"smtpd_recipient_restrictions = {CHECK}", {"quotas": [
                {"by": "recipient_domain", "limits": [[1, 60]]}]}),
            (f"smtpd_end_of_data_restrictions = {CHECK}", {"quotas": [
                {"by": "server", "count": "bytes", "limits": [[1, 60]]}]})]
        for main, settings in cases:
            with self.subTest(main=main, settings=settings):
                self.assertEqual(self.told(main, **settings), [])

    def test_a_service_that_need_not_ask_is_not_warned(self) -> None:
        data = f"smtpd_data_restrictions = {CHECK}"
        for main, services, overrides in (
                (data, f"{SMTP}\n127.0.0.1:10025 inet n - n - - smtpd",
                 "127.0.0.1:10025/inet/smtpd_data_restrictions ="),
                (data, f"{SMTP}\n[::1]:10025 inet n - n - - smtpd",
                 "[::1]:10025/inet/smtpd_data_restrictions ="),
                ("", f"{SMTP}\n{SUBMISSION}",
                 f"submission/inet/{data}"),  # only users who log in
                (data, SUBMISSION, f"submission/inet/{data}"),
                ("", "smtp inet n - y - 1 postscreen\nsmtpd pass - - y - -"
                 " smtpd\npickup unix n - y 60 1 pickup",
                 f"smtpd/pass/{data}"),
                ("", "qmgr unix n - n 300 1 qmgr", "")):  # takes no mail
            with self.subTest(overrides=overrides):
                self.assertEqual(self.told(main, services, overrides), [])

    def test_what_turns_limits_off_is_told(self) -> None:
        data = "smtpd_data_restrictions ="
        bare = f"{data} check_policy_service"
        fix = f"write into /etc/postfix/main.cf: {data} {CHECK}"
        tcp = {"SOCKET": ["127.0.0.1", 8552]}
        cases: list[tuple[str, dict[str, Any], Sequence[str]]] = [
            ("", {}, ["Postfix never asks at SOCKET", fix]),
            ("", {"count_mode": 0}, [
                "never", fix.replace("data", "recipient")]),
            (f"{bare} unix:other/policy", {}, [
                f"put this first in {data[:-2]} in /etc/postfix/main.cf:"
                f" {CHECK}", "asks at unix:other/policy"]),
            (f"{bare} inet:127.0.0.1:8552", {}, ["asks at inet:127.0.0.1:85"]),
            (f"{bare} unix:ratelimit/policy", tcp, [
                "never", "check_policy_service { inet:127.0.0.1:8552, defau"]),
            (f"{bare} inet:127.0.0.1:8553", tcp, ["never"]),
            (f"{bare} inet:localhost:8552", {"SOCKET": ["127.0.0.1", 8553]},
             ["never"]),
            (f"{bare} inet:[::1]:8552", tcp, ["never"]),
            (f"{bare} unix:/var/spool/postfix/ratelimit/policy", {}, [
                "never", "which smtp/inet cannot reach, since it is chrooted"
                " in /var/spool/postfix"]),
            (f"{bare} unix:/run/policy", {"SOCKET": "/run/policy"}, [
                "and move SOCKET below /var/spool/postfix, since smtpd is"]),
            (f"{data} reject, {CHECK}", {}, ["never"]),
            (f"smtpd_etrn_restrictions = {CHECK}", {}, ["asks at ETRN"]),
            (f"{data} {CHECK}", {"count_mode": 0}, [
                "/etc/postfix/main.cf: smtpd_data_restrictions asks at DATA,"
                " where count_mode 0 counts nothing: write into",
                f"smtpd_recipient_restrictions = {CHECK}"]),
            (f"smtpd_recipient_restrictions = {CHECK}", {"count_mode": 1},
             ["asks at RCPT", fix]),
            (f"smtpd_sender_restrictions = {CHECK}\nsmtpd_delay_reject = no",
             {}, ["asks at MAIL", fix]),
            (f"{data} warn_if_reject {CHECK}", {}, ["no mail is refused"]),
            (f"{data} {CHECK}\nsmtpd_end_of_data_restrictions ="
             " check_policy_service unix:ratelimit/policy", {},
             ["every mail is counted twice", "unix:ratelimit/policy"]),
            ("smtpd_sasl_auth_enable = yes\n"
             f"{data} permit_sasl_authenticated, {CHECK}", {},
             ["from users who have logged in is not"]),
            (f"{data} permit_mynetworks, {CHECK}", {},
             ["so mail from mynetworks is not limited: put the check first"]),
            (f"{data} {CHECK}", {"quotas": [
                {"by": "recipient", "limits": [[1, 60]]}]},
             ["quotas: recipient: Postfix names every recipient only at"]),
            (f"{data} {CHECK}", {"count_mode": 1, "quotas": [
                {"by": "server", "when": {"recipient_domain": "x.org"},
                 "limits": [[1, 60]]}]},
             ["quotas: server: Postfix names", "set count_mode: auto"]),
            (f"{data} {CHECK}", {"quotas": [
                {"by": "server", "count": "bytes", "limits": [[1, 60]]}]},
             ["quotas: server: the real size", "smtpd_end_of_data_restr"])]
        for main, settings, parts in cases:
            with self.subTest(main=main, settings=settings):
                [warning] = self.told(main, **settings)
                for part in parts:
                    self.assertIn(part, warning)

    def test_a_service_that_overrides_the_list_is_told(self) -> None:
        data = f"smtpd_data_restrictions = {CHECK}"
        for services, overrides, part in (
                (f"{SMTP}\n{SUBMISSION}",
                 "submission/inet/smtpd_data_restrictions =",
                 "/etc/postfix/master.cf: submission/inet: -o"
                 " smtpd_data_restrictions overrides the list of main.cf, so"
                 " mail that arrives there is not limited"),
                (SMTP, "smtp/inet/smtpd_data_restrictions = permit",
                 "never asks"),
                (f"{SMTP}\nsmtpd pass - - n - - smtpd",
                 "smtpd/pass/smtpd_data_restrictions = reject_unauth_pipelin"
                 "ing", "smtpd/pass: -o smtpd_data_restrictions overrides the"
                 " list of main.cf, so mail that arrives there is not limited:"
                 f" write -o {{ smtpd_data_restrictions = {CHECK},"
                 " reject_unauth_pipelining }"),
                (f"smtp inet n - n - - smtpd\n{SUBMISSION}",
                 "submission/inet/smtpd_data_restrictions ="
                 " check_policy_service"
                 " unix:/var/spool/postfix/ratelimit/policy",
                 "submission/inet")):
            with self.subTest(overrides=overrides):
                self.assertIn(part, self.told(data, services, overrides)[0])

    def test_chroot_has_the_default_of_postfix_s_version(self) -> None:
        absolute = ("smtpd_data_restrictions = check_policy_service"
                    " unix:/var/spool/postfix/ratelimit/policy\n")
        for column, level, chrooted in (
                ("y", "3.6", True), ("n", "0", False), ("-", "3.6", False),
                ("-", "2", False), ("-", "0", True)):
            with self.subTest(column=column, level=level):
                told = self.told(f"{absolute}compatibility_level = {level}",
                                 f"smtp inet n - {column} - - smtpd")
                self.assertEqual(bool(told), chrooted)

    def test_lists_are_split_as_postfix_does(self) -> None:
        for text, words in (
                ("", []), ("a,b  c,\td", ["a", "b", "c", "d"]),
                ("{ a, b } c", ["{ a, b }", "c"]),
                ("x {a {b, c}} ,y", ["x", "{a {b, c}}", "y"]),
                ("a } b", ["a", "}", "b"]), ("{ a, b", ["{ a, b"])):
            with self.subTest(text=text):
                self.assertEqual(prl.split_list(text), words)


class OptionPostfix(Postfix):
    """A Postfix whose smtpd has a line of its own in master.cf."""

    def __init__(self, folder: str, smtpd: str, **main_cf: str) -> None:
        """Take the columns from chroot on."""
        self.smtpd = smtpd
        super().__init__(folder, **main_cf)

    def write(self, name: str, text: str) -> str:
        """Write a file; master.cf as it was given."""
        if name == "config/master.cf":
            text = text.replace("n - - smtpd", self.smtpd, 1)
        return super().write(name, text)


class PostfixCheckTest(FolderTest):
    """What --check says of a real Postfix, and what this really does."""

    def setUp(self) -> None:
        """Skip where there is no Postfix."""
        super().setUp()
        if Postfix.missing():
            skip(f"missing: {Postfix.missing()}")
        self.config = "limits: [[1, 3600]]"

    def start(self, options: Sequence[str] = (), smtpd: str = "n - - smtpd",
              **main_cf: str) -> tuple[Postfix, Daemon]:
        """Start a Postfix, and a daemon with a socket in its queue."""
        home = tempfile.mkdtemp(dir=self.folder)
        os.chmod(home, 0o755)
        postfix = OptionPostfix(home, smtpd, **main_cf)
        self.addCleanup(postfix.stop)
        folder = f"{home}/queue/ratelimit"
        os.mkdir(folder)
        shutil.chown(folder, group="postfix")
        os.chmod(folder, 0o750)
        daemon = self.daemon(
            self.config, "-o", f"SOCKET={folder}/policy", *options,
            name=os.path.basename(home) + "-daemon")
        return postfix, daemon

    def check(self, postfix: Postfix, daemon: Daemon
              ) -> tuple[str, list[str]]:
        """Return what --check prints, and its warnings."""
        with patch.dict(os.environ, MAIL_CONFIG=f"{postfix.folder}/config"):
            status, out, err = command("--check", *daemon.options)
        self.assertEqual(status, 0, err)
        self.assertRegex(out, CHECK_OK)
        return out, err.splitlines()

    def test_a_right_set_up_has_no_warning_and_limits(self) -> None:
        for stage, over in (("recipient", [450]), ("data", [250, 450]),
                            ("end_of_data", [250, 450]), ("sender", [450])):
            with self.subTest(stage=stage):
                postfix, daemon = self.start(
                    **{f"smtpd_{stage}_restrictions": CHECK})
                out, warnings = self.check(postfix, daemon)
                self.assertEqual(warnings, [])
                self.assertIn("the daemon is running\nPostfix: asks about"
                              " mail that arrives at"
                              f" 127.0.0.1:{postfix.port}/inet\n", out)
                self.assertEqual(postfix.send("joe"), [250, 250])
                self.assertEqual(postfix.send("joe"), over)

    def test_a_list_in_master_cf_asks_as_advised(self) -> None:
        lists = (f"{CHECK}, reject_unauth_pipelining",
                 f"permit_mynetworks, {CHECK}")
        for number, words in enumerate(lists):
            with self.subTest(words):
                postfix, daemon = self.start(smtpd=(
                    f"n - - smtpd -o {{ smtpd_data_restrictions = {words} }}"))
                warnings = self.check(postfix, daemon)[1]
                self.assertEqual(len(warnings), number, warnings)
                self.assertEqual(postfix.send("joe"), [250, 250])
                self.assertEqual(postfix.send("joe"), [
                    250, 250 if number else 450])

    def test_a_syntax_error_in_master_cf_is_told(self) -> None:
        postfix, daemon = self.start(smtpd_data_restrictions=CHECK)
        with open(f"{postfix.folder}/config/master.cf", "a") as file:
            file.write(f"2525 inet n - n - - smtpd\n"
                       f"  -o smtpd_data_restrictions={CHECK},permit\n")
        warnings = self.check(postfix, daemon)[1]
        self.assertTrue([line for line in warnings if "syntax error" in line],
                        warnings)

    def test_a_chrooted_service_finds_the_socket(self) -> None:
        postfix, daemon = self.start(smtpd="y - - smtpd",
                                     smtpd_data_restrictions=CHECK)
        self.assertEqual(self.check(postfix, daemon)[1], [])
        self.assertEqual(postfix.send("joe"), [250, 250])
        self.assertEqual(postfix.send("joe"), [250, 450])

    def test_each_way_not_to_ask_is_told(self) -> None:
        data = "smtpd_data_restrictions"
        other = CHECK.replace("ratelimit/", "other/")
        inet = CHECK.replace("unix:ratelimit/policy", "inet:127.0.0.1:9")
        absolute = CHECK.replace("unix:", f"unix:{self.folder}/")
        plain = "n - - smtpd"
        for main_cf, smtpd, options, part in (
                ({}, plain, (), "Postfix never asks at SOCKET"),
                ({data: other}, plain, (), "asks at unix:other/policy"),
                ({data: inet}, plain, (), "asks at inet:127.0.0.1:9"),
                ({data: absolute}, "y - - smtpd", (), "never asks"),
                ({data: CHECK}, f"{plain} -o {data}=", (),
                 f"overrides {data}"),
                ({data: CHECK}, plain, ("-o", "count_mode=0"),
                 "asks at DATA, where count_mode 0 counts nothing"),
                ({"smtpd_recipient_restrictions": CHECK}, plain,
                 ("-o", "count_mode=1"), "asks at RCPT, where count_mode 1"),
                ({"smtpd_sender_restrictions": CHECK, "smtpd_delay_reject":
                  "no"}, plain, (), "asks at MAIL, where count_mode auto"),
                ({data: CHECK}, plain, ("-o", "socket_permission=0600"),
                 "with 0600, Postfix's user postfix cannot connect"),
                ({data: f"warn_if_reject {CHECK}"}, plain, (),
                 "no mail is refused")):
            with self.subTest(part=part):
                postfix, daemon = self.start(options, smtpd, **main_cf)
                for _ in range(3):
                    self.assertEqual(postfix.send("joe"), [250, 250])
                [warning] = self.check(postfix, daemon)[1]
                self.assertIn(part, warning)

    def test_a_folder_that_shuts_postfix_out_is_told(self) -> None:
        postfix, daemon = self.start(smtpd_data_restrictions=CHECK)
        folder = f"{postfix.folder}/queue/ratelimit"
        os.chmod(folder, 0o700)
        for _ in range(2):
            self.assertEqual(postfix.send("joe"), [250, 250])
        [warning] = self.check(postfix, daemon)[1]
        self.assertIn(f"{folder}: Postfix's user postfix may not enter",
                      warning)
        rights = [(0x01, 7, 0xFFFFFFFF), (0x02, 1, pwd.getpwnam(
            "postfix").pw_uid), (0x04, 0, 0xFFFFFFFF),
            (0x10, 1, 0xFFFFFFFF), (0x20, 0, 0xFFFFFFFF)]  # as acl(5) has it
        shutil.chown(folder, group="root")
        try:  # setfacl -m u:postfix:x
            os.setxattr(folder, "system.posix_acl_access", struct.pack(
                "<I", 2) + b"".join(struct.pack("<HHI", *right)
                                    for right in rights))
        except OSError as error:
            skip(f"no access control lists: {error}")
        self.assertEqual(self.check(postfix, daemon)[1], [])
        self.assertEqual(postfix.send("joe"), [250, 250])
        self.assertEqual(postfix.send("joe"), [250, 450])

    def test_a_check_in_two_spellings_counts_twice(self) -> None:
        self.config = "{count_mode: 2, limits: [[2, 3600]]}"
        postfix, daemon = self.start(
            smtpd_data_restrictions=CHECK, smtpd_end_of_data_restrictions=(
                "check_policy_service unix:ratelimit/policy"))
        [warning] = self.check(postfix, daemon)[1]
        self.assertIn("every mail is counted twice", warning)
        self.assertEqual(postfix.send("joe"), [250, 250])
        self.assertEqual(counted(daemon.database), {"joe": 2})
        self.assertEqual(postfix.send("joe"), [250, 450])

    def test_that_the_daemon_does_not_run_is_told(self) -> None:
        postfix, daemon = self.start(smtpd_data_restrictions=CHECK)
        daemon.stop()
        out, warnings = self.check(postfix, daemon)
        self.assertIn("the daemon is not running\n", out)
        self.assertEqual(warnings, [
            "warning: Postfix asks, but the daemon is not running"])

    def test_variables_classes_and_long_lines_are_read(self) -> None:
        folder = self.path("config")
        os.mkdir(folder)
        os.makedirs(self.path("queue/ratelimit"))
        for master, main in (
                ("smtp inet n - y - - smtpd", """
                    policy = check_policy_service
                        # a comment
                        { unix:ratelimit/policy,
                          default_action=DUNNO }
                    smtpd_data_restrictions =
                        reject_unauth_pipelining, ${policy}"""),
                ("smtp inet n - y - - smtpd", """
                    limited = yes
                    smtpd_data_restrictions = ${limited?{CHECK}:{permit}}"""),
                ("smtp inet n - y - - smtpd", """
                    smtpd_restriction_classes = outside limited
                    limited = CHECK
                    outside = limited
                    smtpd_client_restrictions =
                        check_client_access inline:{{ 192.0.2.1 = outside }}
                    """),
                ("""
                 smtp inet n - - - - smtpd
                     -o { smtpd_data_restrictions = reject_unauth_pipelining,
                          $mine }
                 submission inet n - y - - smtpd
                     -o mine=permit_auth_destination
                     -o smtpd_data_restrictions=$limits
                 """, "mine = CHECK\nlimits = reject_unauth_pipelining, $mine"
                 " CHECK\nsmtpd_data_restrictions = CHECK")):
            with self.subTest(main=main):
                text = textwrap.dedent(main).replace("CHECK", CHECK)
                self.write("config/main.cf", (
                    f"queue_directory = {self.path('queue')}\n"
                    f"compatibility_level = 3.6\n{text}\n"))
                self.write("config/master.cf",
                           textwrap.dedent(master).strip() + "\n")
                with patch.dict(os.environ, MAIL_CONFIG=folder):
                    status, out, err = command(
                        "--check", "--standalone", self.folder, "-o", "SOCKET="
                        + self.path("queue/ratelimit/policy"))
                self.assertEqual(status, 0, err)
                self.assertEqual([
                    line for line in err.splitlines()
                    if "any account" not in line and "running" not in line],
                    [])
                self.assertIn("Postfix: asks about mail that arrives at smtp",
                              out)

    def test_what_cannot_be_looked_at_is_told_in_one_line(self) -> None:
        daemon = self.daemon(self.config, "-o", "socket_permission=0600")
        os.mkdir(self.path("empty"))
        os.chmod(self.write("postconf", "#!/bin/sh\nexit 3\n"), 0o755)
        for environment in (
                {"MAIL_CONFIG": self.path("empty")},
                {"PATH": self.folder + os.pathsep + os.environ["PATH"]}):
            with patch.dict(os.environ, environment):
                status, out, err = command("--check", *daemon.options)
            self.assertEqual((status, err), (0, ""))
            self.assertRegex(out, r"\nPostfix: not checked: .*\n")


class ReadmeTest(FolderTest):
    """Every fenced block of README does what README says."""

    # The first line of each shell block, and what its output must match.
    SHELL = {
        "python3 policyd_rate_limit.py --standalone /tmp/policyd": None,
        "python3 -c '": r"^action=(dunno|defer_if_permit .*)\n$",
        "policyd-rate-limit --status":
            r"(?s)joe +1m \[.*6/10 +1 .*joe@example\.org: blocked permanently",
        "postqueue -j | jq -r 'select(.sender | ascii_downcase =="
        ' "joe@example.org") | "\\(.queue_id) \\(.recipients[0].address)"\''
        "  # from package jq": r"^8045F2AB23( ann@example\.org)?\n$",
        "postqueue -j | jq -r 'select(.sender | ascii_downcase =="
        " \"joe@example.org\") | .queue_id' | postsuper -d -":
            r"^postsuper -d - 8045F2AB23\n$",
        "journalctl -u 'postfix*' -o cat --since yesterday | sed -n"
        r" 's/^\(\w*\): client=.*sasl_username=joe@example.org\(,.*\)*$/\1/p'"
        " | postsuper -d -": r"^postsuper -d -\n$",
        "policyd-rate-limit --unlimit joe@example.org": "usual limits apply",
        "adduser --system --group --home /run/policyd-rate-limit"
        " --no-create-home policyd-rate-limit":
            r"(?s)^adduser --system.*\nOK.*\nsystemctl enable --now policyd",
        "postconf smtpd_data_restrictions":
            r"(?s)^smtpd_data_restrictions =.*postfix reload\n.*\nOK",
        "dpkg-divert --local --rename --add /usr/bin/policyd-rate-limit":
            r"(?s)^dpkg-divert .*\nOK.*systemctl restart",
        "rm -rf /usr/bin/policyd-rate-limit"
        " /etc/systemd/system/policyd-rate-limit.service"
        " /var/spool/postfix/ratelimit":
            "^dpkg-divert --rename --remove",
        "postconf -X smtpd_data_restrictions": r"postfix reload\nsystemctl",
    }
    ON_SERVERS = (
        "-- MariaDB or MySQL: backend 1, package python3-mysqldb",
        "-- PostgreSQL: backend 2, package python3-psycopg2")
    STAND_INS = ("adduser", "chgrp", "deluser", "systemctl", "postfix",
                 "dpkg-divert")

    def setUp(self) -> None:
        """Make a root directory, and stand-ins for what needs a machine."""
        super().setUp()
        for name in ("bin", "etc/systemd/system", "usr/bin", "tmp",
                     "usr/local/bin", "var/lib/prometheus/node-exporter",
                     "postfix"):
            os.makedirs(self.path(name))
        for name in self.STAND_INS:
            self.script(name, f'echo {name} "$@"')
        self.script("python3", f'exec {sys.executable} "$@"')
        self.script("policyd-rate-limit", (
            f"exec {sys.executable} {PROGRAM}"
            f' --standalone {self.path("tmp/policyd")} "$@"'))
        self.script("install", (
            'for word; do shift; case $word in -o|-g) skip=1;; *)'
            ' test "$skip" || set -- "$@" "$word"; skip=;; esac; done\n'
            'exec /usr/bin/install "$@"'))
        self.script("postqueue", (
            "echo '{\"queue_id\": \"8045F2AB23\","
            " \"sender\": \"joe@example.org\","
            " \"recipients\": [{\"address\": \"ann@example.org\"}]}'"))
        self.script("postsuper", 'echo postsuper "$@" $(cat)')
        if not shutil.which("jq"):
            self.script("jq", "sed 's/.*: \"\\([0-9A-F]*\\)\".*/\\1/'")
        if not shutil.which("postconf", path=SERVER_PATH):
            self.script("postconf", 'echo "smtpd_data_restrictions ="')
        self.write("postfix/main.cf", "compatibility_level = 3.6\n")
        self.write("postfix/master.cf", "")

    def script(self, name: str, text: str) -> None:
        """Write a shell script that stands in for a command."""
        os.chmod(self.write(f"bin/{name}", f"#!/bin/sh\n{text}\n"), 0o755)

    def below(self, text: str) -> str:
        """Move the absolute paths in a block into the test's directory."""
        return re.sub(r"(?<![\w.~|!/])/(?=(?:etc|usr|var|tmp)/)",
                      self.folder + "/", text)

    def shell(self, text: str) -> str:
        """Run commands that must succeed; return what they print."""
        path = f"{self.path('bin')}:{SERVER_PATH}:{os.environ['PATH']}"
        done = subprocess.run(
            ["sh", "-e"], input=text, cwd=HERE, text=True, timeout=PATIENCE,
            capture_output=True, check=False,
            env={**os.environ, "PATH": path,
                 "MAIL_CONFIG": self.path("postfix")})
        self.assertEqual(done.returncode, 0, f"{text}\n{done.stderr}")
        return done.stdout

    def run_sh(self, text: str) -> None:
        """Run a shell block; the first one is the daemon of the trial."""
        expected = self.SHELL[text.partition("\n")[0]]
        text = self.below(text)
        if expected is None:
            daemon = subprocess.Popen(
                ["sh", "-c", f"exec {text}"], cwd=HERE, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            self.addCleanup(daemon.communicate)
            self.addCleanup(daemon.terminate)
            assert daemon.stdout is not None
            self.assertEqual(daemon.stdout.readline(), "For main.cf:\n")
            return
        said = self.shell(text)
        if text.startswith("python3 -c"):
            self.assertEqual(said, "action=dunno\n")
            said = self.shell(text)
            self.assertEqual(said, f"action={REFUSED}\n")
        self.assertRegex(said, expected)
        if text.startswith("dpkg-divert"):
            unit = self.path("etc/systemd/system/policyd-rate-limit.service")
            with open(unit, encoding="utf-8") as file:
                self.assertIn("\nExecStart=/usr/bin/policyd-rate-limit\n",
                              file.read())

    def run_cron(self, text: str) -> None:
        """Run the lines of a file in /etc/cron.d."""
        for line in text.splitlines():
            self.run_cron_line(line)

    def run_cron_line(self, line: str) -> None:
        """Run a line of /etc/cron.d with the PATH that cron gives it."""
        *_, user, task = line.split(None, 6)
        self.assertIn(user, ("root", "policyd-rate-limit"))
        self.assertIn("/usr/local/bin/policyd-rate-limit ", task)
        self.shell("PATH=/usr/bin:/bin\n" + self.below(task.replace(
            "/usr/local/bin/policyd-rate-limit",
            self.path("bin/policyd-rate-limit"))).replace(
                self.folder + self.folder, self.folder))
        if "policyd.prom" in task:
            with open(self.path("var/lib/prometheus/node-exporter/"
                                "policyd.prom"), encoding="utf-8") as file:
                self.assertIn("policyd_rate_limit_up 1", file.read())

    def run_yaml(self, text: str) -> None:
        """Let --check look at a configuration file."""
        path = self.write("readme.yaml", text)
        self.assertRegex(
            self.shell(f"policyd-rate-limit --check -f {path}"), CHECK_OK)

    def run_sql(self, text: str) -> None:
        """Run statements on the trial's database, or on a copy of it."""
        title, _, text = text.partition("\n")
        if title in self.ON_SERVERS:
            return
        path = self.path("tmp/policyd/db.sqlite3")
        if "Back to" in title:
            copy = self.path(f"copy{len(title)}")
            with contextlib.closing(sqlite3.connect(path)) as source, \
                    contextlib.closing(sqlite3.connect(copy)) as target:
                source.backup(target)
            path = copy
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.executescript(text)
            connection.commit()
            columns = len(connection.execute(
                "SELECT * FROM mail_count").description)
        expected = {"-- Back to 1.1 or 1.2": 5,
                    "-- Back to 1.0.x or older": 2,
                    "-- Plans of customers": 6}
        self.assertEqual(columns, expected[title])

    def test_every_block_does_what_readme_says(self) -> None:
        run_block = {"sh": self.run_sh, "cron": self.run_cron,
                     "yaml": self.run_yaml, "sql": self.run_sql}
        for language, text in readme_blocks():
            with self.subTest(language=language, block=text[:60]):
                run_block[language](text)

    def test_help_makes_a_man_page_without_a_warning(self) -> None:
        for program in "help2man", "man":
            if not shutil.which(program):
                skip(f"no {program}")
        page = self.path("page.8")
        self.shell(f"help2man -N -s 8 policyd-rate-limit > {page}")
        done = subprocess.run(
            ["man", "--warnings", "-l", page], capture_output=True,
            text=True, timeout=PATIENCE, check=False,
            env={**os.environ, "LC_ALL": "C.UTF-8", "MANWIDTH": "99"})
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        words = " ".join(done.stdout.split())
        for text in ("SYNOPSIS policyd-rate-limit [OPTION]...", "EXAMPLES",
                     "policyd-rate-limit --block joe@example.org --for 2h"):
            self.assertIn(text, words)


DEBIAN_UNIT = """\
[Unit]
Description=Postfix policyd rate limiter

[Service]
ExecStart=/usr/bin/policyd-rate-limit
KillSignal=SIGINT

[Install]
WantedBy=multi-user.target
"""
DEBIAN_PROGRAM = """\
#!/usr/bin/python3
# Stands in for 1.0.1.1: its folders, its table, and a limit of 10 mails.
import os, pwd, socketserver, sqlite3, time

DATABASE = "/var/lib/policyd-rate-limit/db.sqlite3"
SOCKET = "/var/spool/postfix/ratelimit/policy"

class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        asked = {}
        for line in self.rfile:
            name, _, value = line.decode().strip().partition("=")
            asked[name] = value
            if not name:
                action = judge(asked.get("sasl_username", ""))
                self.wfile.write(b"action=" + action + b"\\n\\n")

def judge(name):
    with sqlite3.connect(DATABASE) as database:
        [(used,)] = database.execute(
            "SELECT count(*) FROM mail_count WHERE id = ?", (name,))
        if used >= 10:
            return b"defer_if_permit Rate limit reach, retry later"
        database.execute("INSERT INTO mail_count VALUES (?, ?)",
                         (name, int(time.time())))
    return b"dunno"

os.umask(0)
user = pwd.getpwnam("policyd-rate-limit")
for path in DATABASE, SOCKET:
    os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
    os.chown(os.path.dirname(path), user.pw_uid, user.pw_gid)
if os.path.exists(SOCKET):
    os.unlink(SOCKET)
os.setgroups([])
os.setgid(user.pw_gid)
os.setuid(user.pw_uid)
with sqlite3.connect(DATABASE) as database:
    database.executescript(
        "CREATE TABLE IF NOT EXISTS mail_count"
        " (id varchar(40) NOT NULL, date bigint NOT NULL);"
        "CREATE INDEX IF NOT EXISTS mail_count_index"
        " ON mail_count (id, date);")
socketserver.ThreadingUnixStreamServer(SOCKET, Handler).serve_forever()
"""
DEBIAN_PACKAGE = f"""
mkdir -p /root/deb/DEBIAN /root/deb/usr/bin /root/deb/lib/systemd/system
cat >/root/deb/DEBIAN/control <<'END'
Package: policyd-rate-limit
Version: 1.0.1.1-2
Architecture: all
Maintainer: nobody <nobody@example.org>
Description: stand-in for Debian's package
END
cat >/root/deb/usr/bin/policyd-rate-limit <<'END'
{DEBIAN_PROGRAM}END
chmod 755 /root/deb/usr/bin/policyd-rate-limit
cat >/root/deb/lib/systemd/system/policyd-rate-limit.service <<'END'
{DEBIAN_UNIT}END
dpkg-deb --root-owner-group --build /root/deb /root/1.0.1.1-2.deb
sed -i 's/^Version: .*/Version: 1.0.1.1-3/' /root/deb/DEBIAN/control
dpkg-deb --root-owner-group --build /root/deb /root/1.0.1.1-3.deb

dpkg --install /root/1.0.1.1-2.deb
adduser --system --group --home /run/policyd-rate-limit --no-create-home \\
    policyd-rate-limit
cat >/etc/policyd-rate-limit.yaml <<'END'
{DEBIAN}END
chmod 640 /etc/policyd-rate-limit.yaml
chgrp policyd-rate-limit /etc/policyd-rate-limit.yaml
systemctl daemon-reload
systemctl enable --now policyd-rate-limit
until [ -S {prl.Settings().SOCKET} ]; do sleep 0.1; done
postconf -e 'smtpd_recipient_restrictions = {CHECK}'
postfix reload
"""  # builds the package and a later one; what it and then its admin do


@slow
class HostTest(FolderTest):
    """README's commands do on a real mail host what README says.

    Its blocks are run by a shell on a host that has a systemd, a Postfix and
    mail of its own.  Nothing stands in for a command.
    """

    INSTALL = "Install on a mail host"
    SPAM = "An account is sending spam"
    UPGRADE = "Upgrade from 1.x"
    UPDATE = "Update and uninstall"

    def setUp(self) -> None:
        """Boot a host."""
        super().setUp()
        if Host.missing():
            skip(f"missing: {Host.missing()}")
        self.host = Host(self.path("host"))
        self.addCleanup(self.host.stop)

    def shell(self, text: str) -> str:
        """Run commands that must succeed; return what they print."""
        done = self.host.shell(text)
        if done.returncode:
            journal = self.host.shell("journalctl -o cat -n 20").stdout
            self.fail(f"exit status {done.returncode} of:\n{text}\n"
                      f"It printed:\n{done.stdout}\nThe log:\n{journal}")
        return done.stdout

    def block(self, section: str, *parts: str, language: str = "sh") -> str:
        """Return the one block in a section of README with these texts."""
        found = [text for name, text in readme_blocks(section)
                 if name == language and all(part in text for part in parts)]
        if len(found) != 1:
            self.fail(f"README's section {section!r} has {len(found)} blocks"
                      f" of {language} with {' and '.join(parts)}, not one")
        return found[0]

    def quoted(self, section: str, part: str) -> str:
        """Return the one command in the sentences of a section with a text."""
        text = re.sub(r"(?ms)^```.*?^```$", "", readme_section(section))
        [command] = [command for command in re.findall(r"`([^`]+)`", text)
                     if part in command]
        return " ".join(command.split())

    def paste(self, section: str, *parts: str) -> str:
        """Run such a block, which must succeed; return what it prints."""
        text = self.block(section, *parts)
        said = self.shell(text)
        if "postfix reload" in text:
            self.wait_reloaded()
        return said

    def wait_reloaded(self) -> None:
        """Wait until no smtpd with earlier settings is left."""
        wait_for(lambda: self.host.shell("pgrep -x smtpd").returncode == 1,
                 "smtpd to end after Postfix was reloaded")

    def wait_decision(self, text: str) -> None:
        """Wait until the log's last line about a mail has a text."""
        last = ("journalctl -u policyd-rate-limit -o cat --grep identity="
                " -n 1")
        wait_for(lambda: text in self.host.shell(last).stdout,
                 f"{text!r} in the daemon's last line about a mail")

    def complaints(self) -> list[str]:
        """Return what Postfix said of a daemon that it cannot reach."""
        return [line for line in self.host.log().splitlines()
                if "warning: problem talking to server" in line]

    def queued(self) -> list[str]:
        """Return the senders of the mail in Postfix's queue, sorted."""
        return sorted(self.shell("postqueue -j | jq -r .sender").split())

    def test_from_the_install_to_the_uninstall(self) -> None:
        self.check_install()
        self.check_count_and_refusal()
        self.check_reload()
        self.check_one_more_account()
        self.check_spam_night()
        self.check_update()
        self.check_uninstall()

    def check_install(self) -> None:
        """Install the daemon; in the end --check is content."""
        said = self.paste(self.INSTALL, "adduser", "systemctl enable")
        self.assertIn("warning: Postfix never asks at SOCKET", said)
        self.assertEqual(said.count("warning:"), 1, said)
        self.assertEqual([250] * 21, self.host.send("joe", 20))
        said = self.paste(self.INSTALL, "postconf -e")
        self.assertNotIn("warning:", said)
        self.assertRegex(said, r"\nthe daemon is running\nPostfix: asks about"
                         r" mail that arrives at smtp/inet\n(.*\n)*OK\n$")

    def check_count_and_refusal(self) -> None:
        """Mail is counted and logged, and refused over the limit."""
        self.assertEqual([250] * 3, self.host.send("joe", 2))
        self.wait_decision("identity=<joe>")
        self.assertRegex(
            self.shell(self.quoted(self.INSTALL, "journalctl")),
            r"[0-9A-F]{6,}: identity=<joe>, cost=2, used=2/10/60s"
            r" 2/150/86400s, action=dunno\n")
        self.assertEqual([250] * 9 + [450], self.host.send("joe", 9))
        self.assertEqual([250] * 9, self.host.send("joe", 8))
        self.assertEqual([250, 450], self.host.send("joe"))
        self.assertEqual([250, 250], self.host.send("ann"))
        self.host.wait_log("Data command rejected: "
                           + REFUSED.partition(" ")[2])

    def check_reload(self) -> None:
        """A reload brings new limits; a broken file does not pass it."""
        reload = self.quoted(self.INSTALL, "systemctl reload")
        config = "/etc/policyd-rate-limit.yaml"
        self.shell(f"sed -i 's/- .150, 86400./- [5, 86400]/' {config}"
                   f" && {reload}")
        self.assertEqual([250] * 6 + [450], self.host.send("bob", 6))
        self.shell(f"cp {config} /root && echo 'limits: x' >>{config}")
        self.assertEqual(1, self.host.shell(reload).returncode)
        self.assertEqual([250] * 6, self.host.send("bob", 5))
        self.shell(f"cp /root/policyd-rate-limit.yaml {config} && {reload}")

    def check_one_more_account(self) -> None:
        """Nobody else can connect but whom setfacl lets in."""
        connect = ("setpriv --reuid nobody --clear-groups python3 -c 'import"
                   " socket; socket.socket(socket.AF_UNIX).connect("
                   f'"{prl.Settings().SOCKET}")\'')
        self.assertIn("PermissionError", self.host.shell(connect).stdout)
        self.shell(self.quoted(self.INSTALL, "setfacl").replace(
            "NAME", "nobody"))
        self.shell(connect)

    def check_spam_night(self) -> None:
        """An account is found, blocked, its mail deleted; it may go on."""
        joe, eve = "joe@example.org", "eve@example.org"
        self.shell("postsuper -d ALL")
        for one in joe, eve, joe:
            self.assertEqual([250, 250], self.host.send(one, sender=one))
        said = self.paste(self.SPAM, "--block")
        self.assertRegex(said, rf"(?m)^{joe} +1m \[.*\] +2/10$")
        self.assertIn(f"{joe}: blocked permanently\n", said)
        self.assertEqual([250, 450], self.host.send(joe, sender=joe))
        self.assertEqual([250, 250], self.host.send(eve, sender=eve))
        self.host.wait_log("Data command rejected: "
                           + BLOCKED.partition(" ")[2])
        wait_for(lambda: self.shell("postqueue -j | jq -r .queue_name").split()
                 == ["deferred"] * 4, "Postfix to defer the mail")
        self.assertEqual([eve, eve, joe, joe], self.queued())
        said = self.paste(self.SPAM, "postqueue", "recipients")
        listed = re.findall(r"(?m)^(\w+) r0@b\.test$", said)
        self.assertEqual(len(listed), 2, said)
        said = self.paste(self.SPAM, "postqueue", "postsuper")
        self.assertEqual(re.findall(r"(\w+): removed\n", said), listed)
        self.assertEqual([eve, eve], self.queued())
        self.paste(self.SPAM, "--unlimit")
        self.assertEqual([250, 250], self.host.send(joe, sender="forged@x"))
        self.wait_decision("identity=<joe@example.org>, cost=1, used=1/10/")
        self.assertEqual([eve, eve, "forged@x"], self.queued())
        self.paste(self.SPAM, "journalctl")
        self.assertEqual([eve, eve], self.queued())
        self.assertEqual([250, 250], self.host.send(joe, sender="forged@x"))
        self.shell("journalctl -o short >/var/log/mail.log")
        _, bar, rest = self.block(self.SPAM, "journalctl").partition("|")
        self.shell(self.quoted(self.SPAM, "mail.log").rstrip("|") + bar + rest)
        self.assertEqual([eve, eve], self.queued())

    def check_update(self) -> None:
        """Another process runs after an update, and remembers the counts."""
        process = "systemctl show --property MainPID policyd-rate-limit"
        before = self.shell(process)
        self.shell("install -m 755 policyd_rate_limit.py"
                   " /usr/local/bin/policyd-rate-limit")
        self.shell(self.quoted(self.UPDATE, "systemctl restart"))
        self.assertNotEqual(before, self.shell(process))
        self.assertEqual([250, 250], self.host.send("joe@example.org"))
        self.wait_decision("identity=<joe@example.org>, cost=1, used=3/10/")

    def check_uninstall(self) -> None:
        """Mail flows without the daemon, and none of its files is left."""
        found = ("find /etc /run /usr/local /var -newer /etc/postfix/master.cf"
                 " '(' -name '*policyd-rate-limit*' -o -name ratelimit ')'")
        self.assertIn("/etc/policyd-rate-limit.yaml\n", self.shell(found))
        self.paste(self.UPDATE, "systemctl disable")
        self.assertNotEqual(0, self.host.shell(
            "systemctl is-active policyd-rate-limit").returncode)
        self.assertEqual([250] * 21, self.host.send("joe", 20))
        self.assertEqual([], self.complaints())
        self.assertEqual("", self.shell(found))

    def test_an_upgrade_from_debian_s_package_and_the_way_back(self) -> None:
        self.shell(DEBIAN_PACKAGE)
        self.wait_reloaded()
        for _ in range(4):
            self.assertEqual([250, 250], self.host.send("joe"))
        self.check_upgrade()
        self.check_way_back()

    def check_upgrade(self) -> None:
        """The new program goes on with the counts; it stays the one."""
        self.assertRegex(
            self.paste(self.UPGRADE, "dpkg-divert", "--add"),
            r"\nPostfix: asks about mail that arrives at smtp/inet\n(.*\n)*"
            r"OK, with 1 warning\n$")
        self.assertEqual([250, 250], self.host.send("joe"))
        self.wait_decision("identity=<joe>, cost=1, used=5/10/60s")
        self.assertEqual([250] * 5 + [450] * 2 + [250],
                         self.host.send("joe", 7))
        self.shell("dpkg --install /root/1.0.1.1-3.deb")
        self.shell("cmp policyd_rate_limit.py /usr/bin/policyd-rate-limit")

    def check_way_back(self) -> None:
        """The package's program is there again, and knows the counts."""
        sql = self.block(self.UPGRADE, "Back to 1.0.x", language="sql")
        self.shell("systemctl stop policyd-rate-limit\n"
                   "sqlite3 /var/lib/policyd-rate-limit/db.sqlite3"
                   f" <<'END'\n{sql}END")
        self.paste(self.UPGRADE, "dpkg-divert", "--remove")
        self.shell("cmp /root/deb/usr/bin/policyd-rate-limit"
                   " /usr/bin/policyd-rate-limit")
        self.shell(f"until [ -S {prl.Settings().SOCKET} ]; do"
                   " sleep 0.1; done")
        self.assertEqual([450], self.host.send("joe"), self.complaints())
        self.assertEqual([250, 250], self.host.send("ann"))


if __name__ == "__main__":
    unittest.main()
