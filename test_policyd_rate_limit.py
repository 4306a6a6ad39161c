"""Tests of policyd_rate_limit: python3 -m unittest

The classes stand in the order of the program's sections.  What is real is
used for real: the daemon as a process, Postfix, the database servers.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
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
