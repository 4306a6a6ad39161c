"""Tests of policyd_rate_limit: python3 -m unittest

The classes stand in the order of the program's sections.  What is real is
used for real: the daemon as a process, Postfix, the database servers.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import dataclasses
import email.message
import email.policy
import itertools
import json
import logging
import os
import pty
import random
import re
import shutil
import signal
import smtplib
import socket
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Callable, Iterator
from typing import Any

import policyd_rate_limit as prl

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "policyd_rate_limit.py")
PATIENCE = 30  # seconds before a test gives up waiting
QUICK = bool(os.environ.get("POLICYD_TEST_QUICK"))
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
            inner = max(map(depth, ast.iter_child_nodes(node)), default=0)
            return inner + isinstance(node, blocks)

        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                length = node.end_lineno - node.lineno + 1
                self.assertLessEqual(length, 40, node.name)
                self.assertLessEqual(depth(node), 4, node.name)

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
        for node in self.tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined[node.name] = self.section(node.lineno)
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        defined[target.id] = self.section(node.lineno)
        for node in ast.walk(self.tree):
            if (isinstance(node, ast.Name) and node.id in defined
                    and isinstance(node.ctx, ast.Load)):
                self.assertLessEqual(
                    defined[node.id], self.section(node.lineno),
                    f"line {node.lineno}: {node.id}")

    def test_the_first_four_sections_are_pure(self) -> None:
        impure = {"os", "socket", "time", "threading", "open", "print"}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Name) and node.id in impure:
                self.assertGreater(self.section(node.lineno), 4,
                                   f"line {node.lineno}: {node.id}")

    def test_only_main_decides_on_the_exit(self) -> None:
        self.assertEqual(self.source.count("sys.exit("), 1)

    def test_public_names_have_docstrings(self) -> None:
        classes = [node for node in self.tree.body
                   if isinstance(node, ast.ClassDef)]
        nodes: Iterator[ast.stmt] = itertools.chain(
            self.tree.body, *(one.body for one in classes))
        for node in nodes:
            if (isinstance(node, (ast.FunctionDef, ast.ClassDef))
                    and not node.name.startswith("_")):
                self.assertIsNotNone(ast.get_docstring(node), node.name)


class DocsTest(unittest.TestCase):
    """README, sample file, --help and program say the same."""

    readme: str

    @classmethod
    def setUpClass(cls) -> None:
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
            cls.readme = file.read()

    def test_readme_has_each_setting_with_its_default(self) -> None:
        for name, default in prl.default_values().items():
            shown = json.dumps(default) if default is not None else "null"
            shown = {"true": "True", "false": "False"}.get(shown, shown)
            if name == "socket_permission":
                shown = "0666"
            self.assertIn(f"| `{name}` | `{shown}` |", self.readme)

    def test_the_sample_file_holds_each_setting_with_its_default(self) -> None:
        config = prl.read_config(os.path.join(HERE, "policyd-rate-limit.yaml"))
        self.assertEqual(list(config.values.keys() ^ prl.default_values()), [])
        self.assertEqual(prl.check_settings(config), prl.Settings())

    def test_readme_has_each_option_and_exit_code(self) -> None:
        for option in set(re.findall(r"--?[a-z][a-z-]*", run("-h").stdout)):
            self.assertIn(f"`{option}", self.readme)
        codes = [error.exit_code
                 for error in prl.PolicydError.__subclasses__()]
        for code in {0, 6, *codes}:
            self.assertRegex(self.readme, rf"\n\| {code} \|")

    def test_readme_names_the_file_s_length(self) -> None:
        with open(PROGRAM, encoding="utf-8") as file:
            lines = sum(1 for _ in file)
        match = re.search(r"read the source: ([\d,]+) lines", self.readme)
        assert match is not None
        self.assertAlmostEqual(int(match[1].replace(",", "")), lines, delta=50)

    def test_the_docstring_tells_the_exit_codes(self) -> None:
        told = re.search(r"Exit status:(.*?)\n\n", prl.__doc__ or "", re.S)
        assert told is not None
        self.assertEqual(set(re.findall(r"\b(\d)\b", told[1])),
                         set("01234568"))


def requests_in(*pieces: bytes) -> list[prl.Request]:
    """Return the requests that some reads bring."""
    reads = iter([*pieces, b""])
    return list(prl.read_requests(lambda: next(reads)))


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
        for data in (b"\n\n", b"GET / HTTP/1.1\n\n", b"a=b\n\n", b"\n" * 9,
                     b"request=smtpd_access_policy\nrubbish\n\n",
                     b"request=smtpd_access_policy\na=\0\n\n",
                     b"request=junk\n\n", b"request=smtpd_access_policy\n",
                     b"a=" + b"x" * prl.MAX_REQUEST, b"\x16\x03\x01",
                     b"request=smtpd_access_policy\n" + b"a=b\n" * 1000
                     + b"\n"):
            with self.subTest(data[:40]), self.assertRaises(prl.BadRequest):
                requests_in(data)

    def test_a_long_request_within_the_bound_is_read(self) -> None:
        [request] = requests_in(request_text(helo_name="x" * 60000))
        self.assertEqual(len(request.attributes["helo_name"]), 60000)

    def test_recipient_count_is_a_number_whatever_is_sent(self) -> None:
        for text, count in (
                ("", 0), ("0", 0), ("7", 7), ("007", 7), ("-1", 0), ("+1", 0),
                ("x", 0), ("²", 0), ("٣", 0), ("1 ", 0), ("1.5", 0),
                ("9" * 9, 999999999), ("9" * 10, prl.MAX_NUMBER),
                ("9" * 400, prl.MAX_NUMBER), ("0" * 5000 + "1", 1)):
            self.assertEqual(prl.parse_count(text), count, text[:20])


def request(**attributes: object) -> prl.Request:
    """Return a request."""
    return requests_in(request_text(**attributes))[0]


class PolicyTest(unittest.TestCase):
    """Whose mail it is, what it costs, whether it may pass."""

    def test_names_are_folded(self) -> None:
        for text, folded in (
                ("Alice@Example.ORG", "alice@example.org"), ("", "<>"),
                ("ÄÖÜ@x", "äöü@x"), ("A\u0308", "ä"), ("straße", "straße"),
                ("192.0.2.7", "192.0.2.7"), ("2001:DB8:0::1", "2001:db8::1"),
                ("::FFFF:192.0.2.7", "192.0.2.7"), ("1:2@x", "1:2@x"),
                ("joe ", "joe"), ("12345", "12345"), ("1.2.3", "1.2.3")):
            self.assertEqual(prl.fold(text), folded, text)
            self.assertEqual(prl.fold(folded), folded, text)

    def test_long_names_fit_and_stay_different(self) -> None:
        names = {prl.fold("x" * 1900 + end) for end in "abc"}
        self.assertEqual(len(names), 3)
        self.assertEqual({len(name) for name in names}, {prl.MAX_IDENTITY})
        self.assertEqual({prl.fold(name) for name in names}, names)

    def test_identity_is_user_then_sender_then_address(self) -> None:
        everything: dict[str, Any] = {"limit_by_sasl": True, "limit_by_sender": True,
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
            self.assertEqual(prl.identify(request(**attributes), settings),
                             identity, (switches, attributes))

    def test_count_mode_says_when_and_what_is_counted(self) -> None:
        for mode, state, recipients, cost in (
                (0, "RCPT", 0, 1), (0, "RCPT", 9, 1), (0, "DATA", 3, None),
                (0, "END-OF-MESSAGE", 3, None), (1, "RCPT", 0, None),
                (1, "DATA", 3, 3), (1, "DATA", 0, 1), (1, "DATA", "", 1),
                (1, "END-OF-MESSAGE", 3, 3), (2, "RCPT", 0, None),
                (2, "DATA", 3, 1), (2, "END-OF-MESSAGE", 3, 1),
                (1, "VRFY", 0, None), (1, "", 0, None), (1, "data", 3, None)):
            claims = prl.claims_of(
                request(protocol_state=state, recipient_count=recipients),
                prl.Settings(count_mode=mode))
            self.assertEqual([claim.cost for claim in claims],
                             [] if cost is None else [cost], (mode, state))

    def test_limits_by_id_replace_the_limits(self) -> None:
        settings = prl.Settings(limits_by_id=prl.as_limits_by_id(
            {"Joe": [[5, 60]], "free": [], "::1": [[6, 60]], 12: [[7, 60]]}))
        for user, limits in (("JOE", ((5, 60),)), ("free", None),
                             ("0:0::1", ((6, 60),)), ("12", ((7, 60),)),
                             ("else", ((10, 60), (150, 86400)))):
            claims = prl.claims_of(request(sasl_username=user), settings)
            self.assertEqual([claim.limits for claim in claims],
                             [] if limits is None else [limits], user)

    def test_a_mail_passes_that_fits_whole(self) -> None:
        day, minute = prl.Limit(150, 86400), prl.Limit(10, 60)
        for used, cost, broken in (
                ((9, 9), 1, None), ((10, 10), 1, minute), ((9, 9), 2, minute),
                ((0, 150), 1, day), ((10, 150), 1, minute),
                ((0, 0), 11, minute), ((0, 0), 10, None),
                ((0, 141), 10, day)):
            verdict = prl.judge([
                prl.Usage("joe", use, cost, limit)
                for use, limit in zip(used, (minute, day))])
            self.assertEqual(verdict.broken and verdict.broken.limit, broken)
            self.assertEqual(len(verdict.usage), 2)

    def test_limits_are_read_as_a_database_holds_them(self) -> None:
        for text in ("[[10, 60], [150, 86400]]", "[(10, 60), (150, 86400)]",
                     "((10,60),(150,86400))", " [[10,60],[150,86400]]\n"):
            self.assertEqual(prl.parse_limits(text), prl.Settings().limits)
        self.assertEqual(prl.parse_limits("[]"), ())
        for text in ("", "rubbish", "[10, 60]", "[[10]]", "[[-1, 60]]",
                     "[[1, 0]]", "__import__('os')", "{}", "null", "[" * 9999):
            with self.subTest(text[:20]), self.assertRaises(ValueError):
                prl.parse_limits(text)


class StoreContract:
    """What every backend keeps to; a subclass opens the ledger."""

    LIMITS = (prl.Limit(10, 60), prl.Limit(15, 600))

    assertEqual: Any
    assertLessEqual: Any
    assertIsNone: Any
    assertNotIn: Any
    subTest: Any

    def open(self, query: str | None = None) -> prl.Ledger:
        """Open a ledger on the database of the test."""
        raise NotImplementedError

    def execute(self, ledger: prl.Ledger, statement: str,
                *values: object) -> list[tuple[Any, ...]]:
        """Run a statement with ? as placeholder and return its rows."""
        def work(cursor: Any) -> list[tuple[Any, ...]]:
            cursor.execute(statement.replace("?", ledger.backend.mark), values)
            rows = cursor.fetchall() if cursor.description else []
            return [tuple(row) for row in rows]
        return ledger.transact(work)

    def passes(self, ledger: prl.Ledger, now: int, identity: str = "joe",
               cost: int = 1, limits: prl.Limits = LIMITS) -> bool:
        """Charge a mail at a time and say whether it passed."""
        verdict = ledger.charge(prl.Charge(
            [prl.Claim(identity, cost, limits)], now, "1.2", "DATA"))
        return verdict.broken is None

    def used(self, ledger: prl.Ledger, now: int, identity: str = "joe") -> int:
        """Return what an identity has used, by a mail that cannot pass."""
        verdict = ledger.charge(prl.Charge(
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

    def test_a_mail_of_several_claims_charges_all_or_none(self) -> None:
        ledger = self.open()
        tight = (prl.Limit(1, 60),)
        both = [prl.Claim("joe", 1, self.LIMITS), prl.Claim("x.org", 1, tight)]
        for expected in (None, "x.org"):
            verdict = ledger.charge(prl.Charge(both, 1000))
            self.assertEqual(verdict.broken and verdict.broken.identity,
                             expected)
        self.assertEqual(self.used(ledger, 1000), 1)

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

    def test_a_clock_that_is_behind_makes_no_room(self) -> None:
        ahead, behind = self.open(), self.open()
        passed = sum(self.passes(ledger, now - back)
                     for now in range(1000, 1060)
                     for ledger, back in ((ahead, 0), (behind, 30)))
        self.assertEqual(passed, 10)

    def test_a_clock_set_far_back_blocks_nobody_for_long(self) -> None:
        ledger = self.open()
        self.passes(ledger, 10**6, cost=10)
        self.assertEqual(self.passes(ledger, 1000), False)  # as if just sent
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

    def test_cleaning_forgets_nothing_that_a_limit_sees(self) -> None:
        ledger = self.open()
        for now in range(1000, 1100):
            for identity in ("ann", "bob", "eve"):
                self.passes(ledger, now, identity, limits=(
                    prl.Limit(1000, 60),))
        after: str | None = ""
        deleted = 0
        while after is not None:
            after, some = ledger.clean(after, 1109, 60)
            deleted += some
        self.assertEqual(deleted, 150)
        self.assertEqual(self.execute(
            ledger, "SELECT min(date), count(*) FROM mail_count"),
            [(1050, 150)])
        for identity in ("ann", "bob", "eve"):
            verdict = ledger.charge(prl.Charge([prl.Claim(
                identity, 9, (prl.Limit(0, 60),))], 1109))
            self.assertEqual(verdict.usage[0].used, 50)

    def test_many_identities_are_cleaned_in_small_steps(self) -> None:
        ledger = self.open()
        charges = [prl.Charge([prl.Claim(f"u{i:05}", 1, self.LIMITS)], 1000)
                   for i in range(2500)]
        ledger.transact(lambda cursor: ledger._decide(cursor, charges))
        steps, after = [], ""
        while after is not None:
            after, some = ledger.clean(after or "", 9999, 600)  # type: ignore
            steps.append(some)
        self.assertEqual(sum(steps), 2500)
        self.assertLessEqual(max(steps), prl.CLEAN_STEP + 1)

    def test_a_query_gives_limits_that_hold_at_once(self) -> None:
        ledger = self.open("SELECT rule FROM rules WHERE who = "
                           + self.open().backend.mark)
        self.execute(ledger, "CREATE TABLE rules"
                     " (who varchar(99), rule varchar(99))")
        self.assertEqual(self.passes(ledger, 1000, cost=10), True)
        self.execute(ledger, "INSERT INTO rules VALUES ('joe', '[[12, 60]]')")
        self.assertEqual(self.passes(ledger, 1000, cost=2), True)
        self.assertEqual(self.passes(ledger, 1000), False)
        self.execute(ledger, "UPDATE rules SET rule = '[]'")
        self.assertEqual(self.passes(ledger, 1000, cost=99), True)
        self.execute(ledger, "UPDATE rules SET rule = 'rubbish'")
        with quiet() as said:
            self.assertEqual(self.passes(ledger, 1000), False)
        self.assertEqual(len(said), 1)
        self.execute(ledger, "DROP TABLE rules")
        self.assertEqual(self.passes(ledger, 1000), False)

    def test_threads_share_a_limit_exactly(self) -> None:
        ledger = self.open()
        passed: list[bool] = []

        def send() -> None:
            passed.extend(self.passes(ledger, 1000) for _ in range(20))

        threads = [threading.Thread(target=send) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual((len(passed), sum(passed)), (320, 10))

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
            fits = all(cost + sum(
                c for date, c in sent if date > at - limit.seconds)
                <= limit.mails for limit in self.LIMITS)
            passed = self.passes(chance.choice(ledgers), now, name, cost)
            self.assertEqual(passed, fits, f"step {step}")
            if fits:
                sent.append((at, cost))
            if step % 97 == 0:
                ledgers[0].clean("", at, 1200)


@contextlib.contextmanager
def quiet() -> Iterator[list[str]]:
    """Keep what is logged off the terminal, and yield it."""
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler = Keep()
    prl.log.addHandler(handler)
    prl.log.propagate = False
    try:
        yield said
    finally:
        prl.log.removeHandler(handler)
        prl.log.propagate = True


class SQLiteTest(StoreContract, FolderTest):
    """The contract on SQLite."""

    def open(self, query: str | None = None) -> prl.Ledger:
        ledger = prl.open_ledger(prl.Settings(
            sqlite_config={"database": self.path("db")}, db_timeout=5,
            sql_limits_by_id=query))
        self.addCleanup(ledger._roll_back, False)
        return ledger

    def test_a_window_is_read_through_the_index(self) -> None:
        ledger = self.open()
        plan = self.execute(ledger, "EXPLAIN QUERY PLAN "
                            + prl.usage_statement(1, 2), *"aaa1a2")
        for *_, detail in plan:
            self.assertNotIn("SCAN mail_count", detail)


class ServiceTest(FolderTest):
    """A request in, an action out."""

    def service(self, **settings: Any) -> prl.Service:
        self.now = 1000.0
        given = prl.Settings(
            sqlite_config={"database": self.path("db")},
            limits=(prl.Limit(3, 60),), **settings)
        ledger = prl.open_ledger(given)
        self.addCleanup(ledger._roll_back, False)
        return prl.Service(given, ledger, clock=lambda: self.now)

    def answers(self, service: prl.Service, *requests: dict[str, Any],
                told: dict[str, str] | None = None) -> list[str]:
        """Return the actions for requests of one connection, shortened."""
        told = {} if told is None else told
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

    def test_the_wrong_restriction_list_is_told_once_a_minute(self) -> None:
        service = self.service()
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
        service = self.service(db_error_action="reject no database")
        os.mkdir(self.path("db"))  # no file can be opened there
        with quiet() as said:
            self.assertEqual(self.answers(service, {}, {}), ["reject"] * 2)
            os.rmdir(self.path("db"))
            self.assertEqual(self.answers(service, {}, {}), ["dunno"] * 2)
        self.assertEqual([("away" in line, "back" in line) for line in said],
                         [(True, False), (False, True)])



if __name__ == "__main__":
    unittest.main()


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
        self.said: list[str] = []  # all commands, TLS marked by a star
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self.socket.getsockname()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        """Serve each connection in a thread until the socket is closed."""
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.socket.accept()
                threading.Thread(target=self.guard, args=(client,),
                                 daemon=True).start()

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
                    self.mails.append(email.message_from_bytes(
                        data.replace(b"\r\n", b"\n"),
                        policy=email.policy.default))
                    self.to.append(to)
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


class ReportsTest(FolderTest):
    """A folder with a ledger, and mail servers that end with the test."""

    def setUp(self) -> None:
        super().setUp()
        self.ledger = self.open(report=True, report_limits=(60, 900))

    def open(self, **settings: Any) -> prl.Ledger:
        """Open the ledger under some settings."""
        ledger = prl.open_ledger(prl.Settings(
            sqlite_config={"database": self.path("db.sqlite3")}, **settings))
        self.addCleanup(ledger._roll_back, False)
        return ledger

    def refuse(self, identity: str, times: int = 1, window: int = 60,
               ledger: prl.Ledger | None = None) -> None:
        """Let the ledger refuse some mails."""
        for _ in range(times):
            (ledger or self.ledger).charge(prl.Charge([prl.Claim(
                identity, 1, (prl.Limit(0, window),))], int(time.time())))

    def spend(self, identity: str, mails: int, date: float = 0,
              limit: int = 10**6) -> bool:
        """Charge a mail of some recipients; say whether it passed."""
        return self.ledger.charge(prl.Charge(
            [prl.Claim(identity, mails, (prl.Limit(limit, 60),))],
            int(date or time.time()))).broken is None

    def noted(self) -> dict[tuple[str, int], int]:
        """Return what is noted for the next report."""
        return self.ledger.hits("")[0]

    def sink(self, **options: Any) -> Sink:
        """Start a mail server."""
        sink = Sink(**options)
        self.addCleanup(sink.socket.close)
        return sink

    def command(self, *options: str, config: str = "",
                **more: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on the folder's database."""
        return run("--standalone", self.folder, "-f",
                   self.write("test.yaml", config), *options, **more)

    def clean(self, sink: Sink | None, *to: str, **settings: object
              ) -> subprocess.CompletedProcess[str]:
        """Run --clean with reports to some addresses."""
        address = sink.address if sink else ("127.0.0.1", 1)
        given = {"report": True, "report_to": list(to),
                 "smtp_server": list(address), **settings}
        return self.command("--clean", config=json.dumps(given))


class ReportTest(ReportsTest):
    """--clean mails who was refused, and forgets what was taken."""

    def test_refusals_in_the_reported_windows_are_noted(self) -> None:
        self.refuse("joe", 3)
        self.refuse("joe", 2, 900)
        self.refuse("joe", 1, 61)
        self.assertEqual(self.noted(), {("joe", 60): 3, ("joe", 900): 2})
        self.refuse("ann", ledger=self.open(report_limits=(60,)))
        self.assertEqual(len(self.noted()), 2)

    def test_a_batch_notes_each_of_its_refusals(self) -> None:
        charges = [prl.Charge([prl.Claim(who, 1, (prl.Limit(0, 60),))], 1000)
                   for who in ("joe", "ann", "joe")]
        self.ledger.transact(
            lambda cursor: self.ledger._decide(cursor, charges))
        self.assertEqual(self.noted(), {("joe", 60): 2, ("ann", 60): 1})

    def test_a_note_that_fails_does_not_cost_the_verdict(self) -> None:
        self.assertTrue(self.spend("joe", 1))
        self.ledger.transact(lambda c: c.execute("DROP TABLE limit_report"))
        with quiet() as said:
            self.refuse("joe")
            self.assertTrue(self.spend("joe", 1))
        self.assertIn("missing in the report", said[0])

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
        self.assertEqual(sink.texts(), [[
            ["ann", "60", "s", "11"],
            ["jo\u00e9@example.org", "60", "s", "2"]]])

    def test_what_was_taken_is_forgotten(self) -> None:
        self.refuse("joe")
        sink = self.sink()
        for _ in range(2):
            self.assertEqual(self.clean(sink, "a@x.org").returncode, 0)
        self.assertEqual((len(sink.mails), self.noted()), (1, {}))
        self.assertIn("policyd-rate-limit@", sink.mails[0]["From"])
        self.clean(sink, "a@x.org", report_only_if_needed=False)
        self.assertEqual(sink.texts()[1], [])

    def test_a_hit_noted_meanwhile_is_in_the_next_report(self) -> None:
        self.refuse("joe", 2)
        sink = self.sink(taking=lambda: self.refuse("joe", 3))
        self.clean(sink, "a@x.org")
        self.assertEqual(self.noted(), {("joe", 60): 3})

    def test_nobody_is_told_a_hit_twice(self) -> None:
        self.refuse("joe", 2)
        sink = self.sink(refuse=("b@x.org",))
        for more in (0, 3, 0):
            self.refuse("joe", more)
            result = self.clean(sink, "a@x.org", "b@x.org", "c@x.org")
            self.assertEqual(result.returncode, 8)
            self.assertIn("b@x.org: 5.1.1 no such", result.stderr)
            self.assertNotIn("a@x.org", result.stderr)
        sink.refuse.clear()
        for _ in range(2):
            result = self.clean(sink, "a@x.org", "b@x.org", "c@x.org")
            self.assertEqual(result.returncode, 0, result.stderr)
        told = list(zip(sink.to, [rows[0][-1] for rows in sink.texts()]))
        self.assertEqual(told, [
            ("a@x.org", "2"), ("c@x.org", "2"), ("a@x.org", "3"),
            ("c@x.org", "3"), ("b@x.org", "5")])

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
                self.assertEqual(result.stderr.count("\n"), 1, result.stderr)
                self.assertIn(why, result.stderr)
                self.assertEqual(self.noted(), {("joe", 60): 2})

    def test_without_an_address_hits_are_kept(self) -> None:
        self.refuse("joe")
        result = self.clean(None)
        self.assertEqual((result.returncode, self.noted()),
                         (0, {("joe", 60): 1}))
        self.assertIn("nobody is named", result.stderr)
        self.assertIn("nobody is named", self.daemon("report: True").log())

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
            prl.secure(self.far(sink), prl.Settings(smtp_starttls=True))
        prl.secure(self.far(sink), prl.Settings(
            smtp_starttls=True, smtp_tls_verify=False))

    def test_no_password_goes_to_another_host_in_the_clear(self) -> None:
        sink = self.sink(login="joe:secret")
        given = prl.Settings(smtp_credentials=("joe", "secret"))
        with self.assertRaisesRegex(OSError, "encrypted only"):
            prl.secure(self.far(sink), given)
        self.assertEqual(sink.said, [])
        with smtplib.SMTP(*sink.address) as near:
            prl.secure(near, given)
        self.assertTrue(sink.said[1].startswith("AUTH"))


class AlertTest(ReportsTest):
    """Who hits a limit is told of at once, and no mail waits for it."""

    def alarm(self, now: list[float]) -> prl.Alarm:
        """Start an alarm with a clock."""
        alarm = prl.Alarm(clock=lambda: now[0])
        threading.Thread(target=alarm.run, daemon=True).start()
        return alarm

    def settings(self, sink: Sink, **more: Any) -> prl.Settings:
        """Return settings that alert somebody."""
        return prl.Settings(**{"alert": True, "report_to": ("a@x.org",),
                               "smtp_server": sink.address, **more})

    def usage(self, identity: str, window: int = 86400) -> prl.Usage:
        """Return the use of a limit that is full."""
        return prl.Usage(identity, 5, 1, prl.Limit(5, window))

    def test_the_daemon_alerts_once_a_window(self) -> None:
        sink = self.sink()
        daemon = self.daemon(json.dumps({
            "limits": [[1, 60]], "report_limits": [60], "alert": True,
            "report_to": "a@x.org", "smtp_server": list(sink.address)}))
        with daemon.client() as client:
            for who in ("joe", "ann"):
                said = [client.ask(sasl_username=who) for _ in range(4)]
                self.assertEqual(said, [PASS] + [REFUSED] * 3)
        sink.wait(2)
        self.assertIn("joe", sink.mails[0]["Subject"])
        text = sink.mails[0].get_content()
        for fact in ("identity: joe", "limit: 1 mails in 60 s", "since: 20",
                     "client_address: 192.0.2.7", "last_alert: 1\n"):
            self.assertIn(fact, text)

    def test_a_mail_server_that_hangs_delays_no_answer(self) -> None:
        sink = self.sink(silent=True)
        daemon = self.daemon(json.dumps({
            "limits": [[0, 60]], "report_limits": [60], "alert": True,
            "report_to": "a@x.org", "smtp_server": list(sink.address)}))
        began = time.monotonic()
        with daemon.client() as client:
            for n in range(200):
                self.assertEqual(client.ask(sasl_username=n), REFUSED)
        self.assertLess(time.monotonic() - began, 5)

    def test_the_next_window_tells_how_many_were_refused(self) -> None:
        sink = self.sink()
        alarm, given = self.alarm([0.0]), self.settings(sink)
        for now in (1000, 1001, 87399, 87400, 87401):
            alarm.refused(self.usage("joe"), "192.0.2.7", given, now)
            alarm.refused(self.usage("joe", 60), "192.0.2.7", given, now)
        sink.wait(2)
        self.assertIn("last_alert: 3\n", sink.mails[1].get_content())

    def test_twenty_an_hour_and_one_that_says_so(self) -> None:
        sink, now = self.sink(), [0.0]
        alarm, given = self.alarm(now), self.settings(sink)
        for hour in range(2):
            for n in range(30):
                alarm.refused(self.usage(f"{hour}.{n}"), "", given, 1000)
            wait_for(lambda: alarm._queue.empty(), "the queue's end")
            sink.wait(21 * (hour + 1))
            self.assertIn("left to the report", sink.mails[-1].get_content())
            now[0] += 3601

    def test_the_queue_is_bounded(self) -> None:
        alarm, given = prl.Alarm(), prl.Settings(alert=True)
        for n in range(prl.ALERTS_KNOWN + 5):
            alarm.refused(self.usage(str(n)), "", given, 1000)
        self.assertEqual(alarm._queue.qsize(), 2 * prl.ALERTS_AN_HOUR)
        self.assertEqual(len(alarm._known), prl.ALERTS_KNOWN)

    def test_a_program_finds_the_facts_in_its_environment(self) -> None:
        alarm, out = self.alarm([0.0]), self.path("out")
        given = self.settings(self.sink(), alert_command=(
            "/bin/sh", "-c", f"env > {out}.new; mv {out}.new {out}"))
        with quiet() as said:  # one that fails stops nothing
            alarm.refused(self.usage("ann"), "", self.settings(
                self.sink(), alert_command=("/nonexistent",)), 1000)
            alarm.refused(self.usage("jo\u00e9 $(x)"), "::1", given, 1000)
            wait_for(lambda: os.path.exists(out), "the program")
        self.assertIn("nonexistent", said[0])
        with open(out, encoding="utf-8") as file:
            text = file.read()
        for fact in ("IDENTITY=jo\u00e9 $(x)", "LIMIT=5 mails in 86400 s",
                     "CLIENT_ADDRESS=::1", "REFUSED_SINCE_LAST_ALERT=1"):
            self.assertIn(f"POLICYD_{fact}\n", text)

    def test_a_program_that_hangs_is_killed(self) -> None:
        with self.assertRaisesRegex(OSError, "exit status -9"):
            prl.run_program(["/bin/sh", "-c", "sleep 60 & wait"], {}, 0.1)

    def test_counts_are_logged_and_shown_while_it_runs(self) -> None:
        daemon = self.daemon("limits: [[1, 60]]")
        path = daemon.pidfile + ".tally"
        for state in ("DATA", "DATA", "RCPT"):
            daemon.ask(protocol_state=state)
        daemon.send(signal.SIGUSR2)
        log = daemon.wait_log("a decision")
        self.assertIn("3 requests, 1 passed, 1 refused, 0 database", log)
        shown = run(*daemon.options, "--prometheus").stdout
        for line in ("up 1", "requests_total 3", "refused_total 1",
                     'used{identity="joe",window="60"} 1'):
            self.assertIn(f"\npolicyd_rate_limit_{line}\n", shown)
        self.assertEqual(daemon.stop(), 0)
        self.assertFalse(os.path.exists(path))
        shown = run(*daemon.options, "--prometheus").stdout
        self.assertIn("policyd_rate_limit_up 0\n", shown)

    def test_a_summary_each_hour_if_there_was_anything(self) -> None:
        counters = prl.Counters()
        bulletin = prl.Bulletin(counters, self.path("pid"))
        with self.assertLogs(prl.log, prl.NOTICE) as logged:
            for requests in (0, 2, 0):
                for _ in range(requests):
                    counters.count("requests")
                bulletin._began -= 3600
                bulletin.publish()
        [said] = logged.output
        self.assertIn("in 60 minutes: 2 requests", said)


class StatusTest(ReportsTest):
    """A person sees who has used how much."""

    config = json.dumps({
        "limits": [[10, 60], [100, 86400]], "limits_by_id": {
            "Boss": [[1000, 3600]], "free": []}})

    def show(self, *options: str, **more: Any) -> str:
        """Run a command and return what it shows."""
        result = self.command(*options, config=self.config, **more)
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        return result.stdout

    def test_the_most_used_come_first(self) -> None:
        for who, mails in (("ann", 3), ("joe", 10), ("boss", 20), ("x", 0)):
            self.spend(who, mails)
        self.spend("old", 5, time.time() - 90000)
        lines = self.show("--status").splitlines()
        self.assertEqual([line.split()[0] for line in lines],
                         ["joe", "1d", "ann", "1d", "boss"])
        self.assertRegex(lines[0], r"1m \[#{10}\] 10/10 +room at 2")
        self.assertRegex(lines[4], r"1h \[#\.{9}\] 20/1000$")

    def test_long_lists_and_names_fit_the_terminal(self) -> None:
        for n in range(22):
            self.spend(f"a-very-long-name-{n}@mail.example.org", 10)
        shown = self.show("--status", env={**os.environ, "COLUMNS": "76"})
        self.assertIn("and 2 more", shown)
        for line in shown.splitlines():
            self.assertLessEqual(len(line), 76)

    def test_one_identity_with_where_its_limits_come_from(self) -> None:
        self.spend("boss", 20)
        self.refuse("boss", 2, 900)
        shown = self.show("--status", "BOSS")
        self.assertIn("limits, from limits_by_id:\n    1h", shown)
        self.assertIn("limits, from limits:", self.show("--status", "new"))
        self.assertNotIn("[", self.show("--status", "free"))
        shown = self.show(
            "--status", "boss", "-o",
            "sql_limits_by_id=SELECT '[[9, 900]]' WHERE %s = 'boss'".replace(
                "%s", "?"))
        self.assertIn("limits, from sql_limits_by_id:\n   15m", shown)
        self.assertIn("2 refusals for the next report", shown)

    def test_json_has_stable_keys(self) -> None:
        self.spend("joe", 4, 1000)
        self.spend("ann", 4)
        for options in (["--json"], ["--status", "--json"]):
            shown = json.loads(self.show(*options))
            self.assertEqual(list(shown), ["time", "identities"])
            [one] = shown["identities"]
            self.assertEqual((one["identity"], one["source"]),
                             ("ann", "limits"))
            self.assertEqual(one["limits"][0], {
                "mails": 10, "seconds": 60, "used": 4, "room_at": None,
                "noted": 0})
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
            [standing] = self.ledger.survey(given, now, who)
            [window] = standing.limits
            if window.room_at is None:
                self.assertLess(window.used, 10)
                continue
            for at, passes in ((window.room_at - 1, False),
                               (window.room_at, True)):
                self.assertIs(self.spend(who, 1, at, 10), passes)

    def test_prometheus_can_read_any_name(self) -> None:
        self.spend('a"b\\c\u00e9', 1)
        result = self.command("--prometheus", config=self.config,
                              encoding="utf-8")
        self.assertIn('{identity="a\\"b\\\\c\u00e9",window="60"} 1\n',
                      result.stdout)
        self.assertIn("no counters", result.stderr)

    def test_reset_forgets_and_says_how_much(self) -> None:
        self.spend("joe", 7)
        self.spend("ann", 1)
        self.assertIn("joe: 7 ", self.show("--reset", "Joe"))
        self.assertIn("joe: 0 ", self.show("--reset", "joe"))
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
        self.assertRegex(shown, r"Joe +1m \[#{10}\] 10/10 +room at")
        with open(path, "rb") as file:
            self.assertEqual(file.read(), before)
        self.assertEqual(os.listdir(self.path("old")), ["db.sqlite3"])

    def test_a_missing_database_is_not_made(self) -> None:
        os.makedirs(self.path("none"))
        for command in ("--status", "--json", "--prometheus"):
            result = run("--standalone", self.path("none"), command)
            self.assertEqual(result.returncode, 6)
            self.assertNotIn("Traceback", result.stderr)
        self.assertEqual(os.listdir(self.path("none")), [])

    def test_a_closed_pipe_is_no_traceback(self) -> None:
        self.spend("joe", 1)
        end, out = os.pipe()
        os.close(end)
        with os.fdopen(out, "wb") as closed:
            result = subprocess.run(
                [sys.executable, PROGRAM, "--standalone", self.folder,
                 "--status"], stdout=closed, stderr=subprocess.PIPE,
                timeout=PATIENCE, check=False)
        self.assertEqual((result.returncode, result.stderr), (0, b""))

    def test_colours_are_for_terminals(self) -> None:
        self.spend("joe", 10)
        config = self.write("test.yaml", self.config)
        for extra, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
            ours, theirs = pty.openpty()
            subprocess.run(
                [sys.executable, PROGRAM, "--standalone", self.folder, "-f",
                 config, "--status"], stdout=theirs, check=True,
                timeout=PATIENCE, env={**os.environ, "NO_COLOR": "",
                                       "TERM": "xterm", **extra})
            os.close(theirs)
            self.assertIs(b"\033[31m" in os.read(ours, 1000), coloured)
            os.close(ours)
        self.assertNotIn("\033", self.show("--status"))

    def test_usage_errors_are_argparse_s(self) -> None:
        for options in (["--json", "--clean"], ["--status", "--reset", "x"],
                        ["--reset"]):
            result = self.command(*options)
            self.assertEqual((result.returncode, result.stdout), (2, ""))
            self.assertIn("usage:", result.stderr)

    def test_a_hundred_thousand_identities_take_two_seconds(self) -> None:
        now = int(time.time())
        self.spend("joe", 1)
        self.ledger.transact(lambda cursor: cursor.executemany(
            "INSERT INTO mail_count VALUES (?, ?, 1, '', 'DATA', ?)",
            ((f"user{n}@example.org", now - 40 + i * 20, i + 1)
             for n in range(100000) for i in range(3))))
        began = time.monotonic()
        self.assertIn("and 99981 more", self.show("--status"))
        self.assertLess(time.monotonic() - began, 2)
