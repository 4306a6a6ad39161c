#!/usr/bin/python3
"""policyd-rate-limit: limit how many mails a user of Postfix may send.

Postfix asks this daemon about each mail (postconf(5), check_policy_service;
SMTPD_POLICY_README).  It counts the mail for a SASL user, a sender or a
client address, in sliding windows "at most N mails in any S seconds", and
answers what Postfix is to do.

The path of one request:

    bytes -> Request -> claims -> [ usage -> verdict -> charge ] -> action
             parse      policy          one transaction            reply

    1 Vocabulary   2 Settings   3 Protocol   4 Policy   5 Storage
    6 Service   7 Server   8 Reports   9 Configuration file   10 Process
    11 Command line

Exit status: 0 done, or stopped by a signal; 1 --get-config: no such
setting; 2 no such user or group, or a usage error; 3 another instance is
running; 4 SOCKET is malformed; 5 no configuration file, or one that cannot
be used; 6 anything that fails at run time; 8 --clean failed.

Try it by hand:

    policyd_rate_limit.py --standalone /tmp/try &
    printf 'request=smtpd_access_policy\\nprotocol_state=DATA\\n%s\\n\\n' \\
        sasl_username=joe | nc -N -U /tmp/try/policy
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import difflib
import errno
import fcntl
import functools
import grp
import hashlib
import importlib
import io
import ipaddress
import itertools
import json
import logging
import math
import operator
import os
import pwd
import queue
import random
import re
import reprlib
import resource
import shutil
import signal
import smtplib
import socket
import socketserver
import ssl
import stat
import struct
import subprocess
import sys
import threading
import time
import unicodedata
import urllib.parse
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from email.message import EmailMessage
from email.utils import format_datetime, localtime, make_msgid
from typing import Any, NamedTuple, NoReturn, TypeVar, Union

T = TypeVar("T")

# ---------------------------------------------------------------------------
# 1. Vocabulary
#
# The words that all sections share: constants, values, errors.
# ---------------------------------------------------------------------------

VERSION = "2.0.0"
PROGRAM = "policyd-rate-limit"
CONFIG_FILES = (
    "~/.config/policyd-rate-limit.conf",
    "~/.config/policyd-rate-limit.yaml",
    "/etc/policyd-rate-limit.conf",
    "/etc/policyd-rate-limit.yaml",
)
MAX_REQUEST = 32768  # bytes; the largest that Postfix sent in tests is 6 kB
MAX_ATTRIBUTES = 1000  # Postfix 3.12 sends 32
MAX_NUMBER = 2**31 - 1  # what a column of type int holds
MAX_TOLD = 100  # characters of a value in the log; a queue id has 20
MAX_IDENTITY = 190  # characters; of 4 bytes each they fit MySQL's index
CLOCK_SKEW = 600  # seconds that the clocks of two hosts may differ
CLEAN_STEP = 1000  # rows looked at in one transaction of cleaning
CLEAN_PAUSE = 10  # seconds between two such steps while the daemon works
NOTICE = 25  # the log level of what is said even with debug: False
SELDOM = {"seldom": True}  # marks a log record that a stranger can provoke
COUNTED_STATES = (  # by count_mode, the states at which a mail is counted
    ("RCPT",), ("DATA", "END-OF-MESSAGE"), ("DATA", "END-OF-MESSAGE"))


class Seldom(logging.Filter):
    """Lets each message that is marked SELDOM through once a minute."""

    def __init__(self) -> None:
        super().__init__()
        self.said: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether to let a record through."""
        if not hasattr(record, "seldom"):
            return True
        if 0 <= record.created - self.said.get(record.msg, 0) < 60:
            return False
        self.said[record.msg] = record.created
        return True


log = logging.getLogger(PROGRAM)
log.addFilter(Seldom())


class Limit(NamedTuple):
    """At most so many mails in any so many seconds."""

    mails: int
    seconds: int


class PolicydError(Exception):
    """Something failed at run time."""
    exit_code = 6


class UnknownSetting(PolicydError):
    """--get-config was asked for a setting that there is not."""
    exit_code = 1


class UnknownUser(PolicydError):
    """The user or group to run as does not exist."""
    exit_code = 2


class AlreadyRunning(PolicydError):
    """Another instance has the pidfile or the socket."""
    exit_code = 3


class SocketMalformed(PolicydError):
    """SOCKET is neither a path nor [address, port]."""
    exit_code = 4


class ConfigError(PolicydError):
    """The configuration is missing or cannot be understood."""
    exit_code = 5


class CleanError(PolicydError):
    """--clean could not do its work."""
    exit_code = 8


class LedgerError(PolicydError):
    """The database is away, or refuses."""


class BadRequest(PolicydError):
    """What came is not a request of the policy protocol."""


def fold(identity: str) -> str:
    """Return the one spelling under which an identity is counted.

    Names are compared without regard to case (RFC 8265, 3.3), addresses by
    value.  A name too long for a database's key ends in its hash instead.
    """
    folded = identity.lower()
    if len(folded) <= 512:  # normalizing takes the square of the length
        folded = unicodedata.normalize("NFC", folded)
    folded = folded.rstrip() or "<>"
    address = None if "@" in folded else parse_address(folded)
    if address is not None:
        return str(address)
    if len(folded) <= MAX_IDENTITY:
        return folded
    digest = hashlib.sha256(folded.encode()).hexdigest()
    return folded[:MAX_IDENTITY - len(digest) - 1] + "#" + digest


def parse_address(
        text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the IP address that text spells, IPv4 inside IPv6 as IPv4."""
    if "%" in text or not (text[:1].isdigit() or ":" in text):
        return None  # a zone after % would be any text of any length
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


# ---------------------------------------------------------------------------
# 2. Settings
#
# One entry a setting: name, default, check.  A check takes what a file holds
# and returns it typed, or raises ValueError or TypeError; its docstring
# tells the admin what was expected.
# ---------------------------------------------------------------------------

Limits = tuple[Limit, ...]
Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]


def as_whole(value: object, least: int = 0, most: float = math.inf) -> int:
    """Check a whole number."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not least <= value <= most:
        raise ValueError
    return value


def as_text(value: object) -> str:
    """text (in quotes, if it looks like a number)"""
    if not isinstance(value, str) or not value or "\0" in value:
        raise TypeError
    return value


def as_action(value: object) -> str:
    """an action of access(5), such as "dunno\""""
    text = str(value) if type(value) is int else as_text(value)  # 450
    if not text.isprintable():  # a newline ends the reply
        raise ValueError
    return as_text(text.strip())


def as_a(kind: type | tuple[type, ...], value: object) -> Any:
    """Check a value's type."""
    if not isinstance(value, kind):
        raise TypeError
    return value


def as_pair(value: object, first: Callable[[Any], Any],
            second: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Check a list of two."""
    one, two = as_list(value)
    return first(one), second(two)


def as_limits_by_id(value: object) -> Mapping[str, Limits]:
    """identities, each with a list of [mails, seconds]"""
    entries = as_a(dict, value).items()
    if any(isinstance(key, (bool, type(None))) for key, _ in entries):
        raise TypeError  # YAML reads a user called yes as True
    return {fold(str(key)): as_limits(limits) for key, limits in entries}


def expect(expected: str, check: Callable[[Any], T]) -> Callable[[Any], T]:
    """Give a check its docstring."""
    check.__doc__ = expected
    return check


as_list = functools.partial(as_a, (list, tuple))
as_bool = expect("True or False",  # which equal 1 and 0
                 lambda value: bool((0, 1).index(value)))
as_seconds = expect("a number of seconds, 1 or more",  # 68 years: for ever
                    lambda value: min(as_whole(value, 1), MAX_NUMBER))
as_permission = expect("a file mode such as 0666", lambda value: as_whole(
    int(value, 8) if isinstance(value, str) else value, most=0o7777))
as_backend = expect("0 (SQLite), 1 (MySQL) or 2 (PostgreSQL)",
                    lambda value: as_whole(value, most=2))
as_count_mode = expect(
    "0 (each RCPT), 1 (recipients at DATA) or 2 (mails at DATA)",
    lambda value: as_whole(value, most=2))
as_text_or_none = expect("text, or null",
                         lambda value: as_text(value) if value else None)
as_texts = expect("text or a list of texts", lambda value: tuple(
    map(as_text, [value] if value and isinstance(value, str)
        else as_list(value or ()))))
as_windows = expect("a list of seconds, such as [86400]",
                    lambda value: tuple(map(as_seconds, as_list(value))))
as_limits = expect(
    "a list of [mails, seconds], such as [[10, 60], [150, 86400]]",
    lambda value: tuple(Limit(as_whole(mails), as_seconds(seconds))
                        for mails, seconds in as_list(value)))
as_networks = expect(
    'a list of networks such as [10.0.0.0/8, "::/0"]',
    lambda value: tuple(ipaddress.ip_network(as_text(item), strict=False)
                        for item in as_list(value)))
as_mapping = expect("names with values", lambda value: as_a(dict, value))
as_sqlite = expect(
    "names with values, among them database, a path", lambda value: {
        **as_a(dict, value), "database": as_text(value.get("database"))})
as_socket = expect(
    'a path, or [address, port] such as ["127.0.0.1", 8552]',
    lambda value: as_text(value) if isinstance(value, str) else as_pair(
        value, lambda host: str(ipaddress.ip_address(as_text(host))),
        lambda port: as_whole(port, most=65535)))
as_smtp_server = expect('["host", port] or a host', lambda value: as_pair(
    [value, 25] if isinstance(value, str) else value,
    as_text, lambda port: as_whole(int(port), most=65535)))
as_credentials = expect('["user", "password"] or null', lambda value: as_pair(
    value, as_text, lambda word: as_text(str(word))) if value else None)


def setting(default: object, check: Callable[[Any], Any], meaning: str,
            error: type[PolicydError] = ConfigError) -> Any:
    """Make an entry of the table; error is what a bad value raises."""
    return field(default_factory=lambda: check(default), metadata={
        "default": default, "check": check, "meaning": meaning,
        "error": error})


@dataclass(frozen=True)
class Settings:
    """All settings; names and defaults are the original's."""

    debug: bool = setting(True, as_bool, "log each decision")
    log_requests: bool = setting(
        False, as_bool, "log all that Postfix tells of each mail")
    user: str = setting(PROGRAM, as_text, "the user that root becomes")
    group: str = setting(PROGRAM, as_text, "the group that root becomes")
    pidfile: str = setting(
        "/var/run/policyd-rate-limit/policyd-rate-limit.pid", as_text,
        "the file with the process id")
    SOCKET: str | tuple[str, int] = setting(
        "/var/spool/postfix/ratelimit/policy", as_socket,
        "where to listen: a path, or [address, port]", SocketMalformed)
    socket_permission: int = setting(
        0o666, as_permission, "the mode of the unix socket")
    delay_to_close: int = setting(
        300, as_seconds, "seconds after which an idle connection is closed")
    backend: int = setting(
        0, as_backend, "where to count: 0 SQLite, 1 MySQL, 2 PostgreSQL")
    sqlite_config: Mapping[str, Any] = setting(
        {"database": "/var/lib/policyd-rate-limit/db.sqlite3"}, as_sqlite,
        "how to open the SQLite database")
    mysql_config: Mapping[str, Any] = setting(
        {"user": "username", "passwd": "*****",
         "db": "database", "host": "localhost", "charset": "utf8"}, as_mapping,
        "how to connect to MariaDB or MySQL")
    pgsql_config: Mapping[str, Any] = setting(
        {"database": "database", "user": "username",
         "password": "*****", "host": "localhost"}, as_mapping,
        "how to connect to PostgreSQL")
    db_timeout: int = setting(
        5, as_seconds, "seconds to wait for the database")
    limits: Limits = setting(
        [(10, 60), (150, 86400)], as_limits,
        "at most so many mails in so many seconds, for each identity")
    limits_by_id: Mapping[str, Limits] = setting(
        {}, as_limits_by_id, "other limits for some identities; [] for none")
    sql_limits_by_id: str | None = setting(
        "", as_text_or_none, "a query for the limits of an identity")
    limit_by_sasl: bool = setting(
        True, as_bool, "the SASL user name is the identity")
    limit_by_sender: bool = setting(False, as_bool, "else the sender address")
    limit_by_ip: bool = setting(False, as_bool, "else the client address")
    limited_networks: tuple[Network, ...] = setting(
        [], as_networks, "but only client addresses in these networks")
    count_mode: int = setting(
        1, as_count_mode,
        "what counts: 0 each RCPT, 1 the recipients at DATA, 2 the mail")
    success_action: str = setting(
        "dunno", as_action, "the action for a mail within the limits")
    fail_action: str = setting(
        "defer_if_permit Rate limit reach, retry later", as_action,
        "the action for a mail too many")
    db_error_action: str = setting(
        "dunno", as_action, "the action while the database is away")
    report: bool = setting(
        False, as_bool, "--clean mails a report of who hit a limit")
    report_from: str | None = setting(
        None, as_text_or_none, "the sender of reports")
    report_to: tuple[str, ...] = setting(
        None, as_texts, "who gets reports: one address or a list")
    report_subject: str = setting(
        "policyd-rate-limit report", as_text, "the subject of reports")
    report_limits: tuple[int, ...] = setting(
        [86400], as_windows, "the windows, in seconds, to report")
    report_only_if_needed: bool = setting(
        True, as_bool, "no report if nobody hit a limit")
    smtp_server: tuple[str, int] = setting(
        ("localhost", 25), as_smtp_server, "where to send reports")
    smtp_starttls: bool = setting(
        False, as_bool, "encrypt the connection to smtp_server")
    smtp_tls_verify: bool = setting(
        True, as_bool, "check smtp_server's certificate, unless it is local")
    smtp_credentials: tuple[str, str] | None = setting(
        None, as_credentials, "user and password for smtp_server")
    alert: bool = setting(
        False, as_bool, "mail report_to at once when somebody hits a limit")
    alert_command: tuple[str, ...] = setting(
        None, as_texts, "a program to run in place of mailing an alert")

    @property
    def longest_window(self) -> int:
        """Return the longest window of the file's limits, in seconds."""
        limits = itertools.chain(self.limits, *self.limits_by_id.values())
        return max((limit.seconds for limit in limits), default=86400)

    @property
    def noted_windows(self) -> tuple[int, ...]:
        """Return the windows whose refusals are kept for the report."""
        return self.report_limits if self.report else ()


# ---------------------------------------------------------------------------
# 3. Protocol
#
# What Postfix sends, as values (SMTPD_POLICY_README).  Pure: it is handed
# bytes, it opens nothing.
# ---------------------------------------------------------------------------


class Request(NamedTuple):
    """What Postfix tells of one mail; what it does not know is empty."""

    protocol_state: str
    queue_id: str
    instance: str  # the same for all requests of one mail
    sasl_username: str
    sender: str
    client_address: str
    recipient_count: int
    attributes: Mapping[str, str]  # all that was sent


def read_requests(receive: Callable[[], bytes]) -> Iterator[Request]:
    """Yield requests until receive() brings nothing, or raise BadRequest."""
    buffer = b""
    while data := receive():
        *heads, buffer = (buffer + data).split(b"\n\n")
        del data  # nothing of what is answered is kept while it waits
        while heads:
            yield parse_request(heads.pop(0))
        if len(buffer) > MAX_REQUEST:
            raise BadRequest(f"a request longer than {MAX_REQUEST} bytes")
    if buffer:
        raise BadRequest("the connection ended inside a request")


def parse_request(head: bytes) -> Request:
    """Parse the lines name=value of a request, or raise BadRequest."""
    if head.count(b"\n") >= MAX_ATTRIBUTES or b"\0" in head:
        raise BadRequest("too many attributes, or binary rubbish")
    text = head.decode("utf-8", "backslashreplace")  # any bytes may come
    try:
        given = dict(line.split("=", 1) for line in text.split("\n"))
    except ValueError:
        raise BadRequest("a line that is not name=value") from None
    get = given.get
    if get("request") != "smtpd_access_policy":
        raise BadRequest("no request=smtpd_access_policy")
    return Request(
        get("protocol_state", "")[:MAX_TOLD], get("queue_id", "")[:MAX_TOLD],
        get("instance", "")[:MAX_TOLD], get("sasl_username", ""),
        get("sender", ""), get("client_address", "")[:MAX_TOLD],
        parse_count(get("recipient_count", "")), given)


def parse_count(text: str) -> int:
    """Return the number that text spells, 0 if none, with a bound."""
    if not (text.isascii() and text.isdigit()):
        return 0
    digits = text.lstrip("0")
    return int(digits or "0") if len(digits) < 10 else MAX_NUMBER


# ---------------------------------------------------------------------------
# 4. Policy
#
# Whose mail is it, and may it pass?  Functions of their arguments alone: no
# input, no output, no clock.
# ---------------------------------------------------------------------------


class Claim(NamedTuple):
    """An identity, what the mail costs it, and the limits it must keep."""

    identity: str
    cost: int
    limits: Limits


class Usage(NamedTuple):
    """What a mail's identity has used of one limit before it."""

    identity: str
    used: int
    cost: int
    limit: Limit


class Verdict(NamedTuple):
    """What was found for each limit, and the first that would be broken."""

    usage: tuple[Usage, ...]
    broken: Usage | None


def claims_of(request: Request, settings: Settings) -> list[Claim]:
    """Return what a request claims: nothing if it is not to be counted."""
    if request.protocol_state not in COUNTED_STATES[settings.count_mode]:
        return []
    identity = identify(request, settings)
    if identity is None:
        return []
    limits = settings.limits_by_id.get(identity, settings.limits)
    if not limits and not settings.sql_limits_by_id:
        return []
    cost = request.recipient_count if settings.count_mode == 1 else 1
    return [Claim(identity, cost or 1, limits)]


def identify(request: Request, settings: Settings) -> str | None:
    """Return the identity whose mail it is: user, sender or address."""
    if settings.limit_by_sasl and request.sasl_username:
        return fold(request.sasl_username)
    if settings.limit_by_sender and request.sender:
        return fold(request.sender)
    if not settings.limit_by_ip:
        return None
    address = parse_address(request.client_address)
    inside = address is not None and any(
        address in network for network in settings.limited_networks)
    return str(address) if inside else None


def judge(usage: Sequence[Usage]) -> Verdict:
    """Say whether a mail keeps all its limits: a cost has to fit whole."""
    for one in usage:
        if one.used + one.cost > one.limit.mails:
            return Verdict(tuple(usage), one)
    return Verdict(tuple(usage), None)


def parse_limits(text: str) -> Limits:
    """Parse limits as a database holds them: [[10, 60], [150, 86400]]."""
    try:
        return as_limits(json.loads(text.translate({40: "[", 41: "]"})))
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f"found {text[:200]!r}, expected"
                         f" {as_limits.__doc__}") from None


# ---------------------------------------------------------------------------
# 5. Storage
#
# The ledger: read usage, judge, write the charge, with nobody in between.
#
# The table mail_count is the original's with a running total: the sum of
# recipient_count over the identity's rows up to this one.  What a window
# holds is the newest total less the total before the window's first row: two
# look-ups in an index, however full the window.  Dates are whole seconds; an
# identity's rows never go back in time, whatever the clocks do.
# ---------------------------------------------------------------------------

Connection = Any  # of the DB-API (PEP 249)
Cursor = Any

COLUMNS = {  # of mail_count; total is the last that an update adds
    "id": "{identity} NOT NULL",
    "date": "bigint NOT NULL",
    "recipient_count": "int DEFAULT 1",
    "instance": "varchar(40) NOT NULL DEFAULT ''",
    "protocol_state": "varchar(20) NOT NULL DEFAULT ''",
    "total": "bigint",  # NULL in a row that the original wrote
}
TABLES = (
    "CREATE TABLE IF NOT EXISTS mail_count"
    f" (id {COLUMNS['id']}, date {COLUMNS['date']})",
    "CREATE TABLE IF NOT EXISTS limit_report (id {identity} NOT NULL,"
    " delta int NOT NULL, hit int NOT NULL DEFAULT 0,"
    " PRIMARY KEY (id, delta))",
    "CREATE TABLE IF NOT EXISTS report_owed (address {identity} NOT NULL,"
    " id {identity} NOT NULL, delta int NOT NULL, hit int NOT NULL)",
    "CREATE TABLE IF NOT EXISTS mail_turn"
    " (id {identity} NOT NULL PRIMARY KEY, turn bigint NOT NULL)",
)
RATE_LIMITS = ("CREATE TABLE rate_limits"
               " (id integer NOT NULL PRIMARY KEY, limits varchar(255))")
INDEX = ("CREATE INDEX mail_count_total"
         " ON mail_count (id, date, total, recipient_count)")
RENAME = "UPDATE mail_count SET id = ? WHERE id = ?"
NEWEST = ("SELECT {} FROM mail_count WHERE id = who"
          " ORDER BY date DESC, total DESC LIMIT 1")
BEFORE = ("SELECT total - recipient_count FROM mail_count"
          " WHERE id = who AND date > {} ORDER BY date, total LIMIT 1")
ROWS = ("SELECT date, recipient_count, instance, protocol_state"
        " FROM mail_count WHERE id = ? ORDER BY date, total")
INSERT = f"INSERT INTO mail_count ({', '.join(COLUMNS)}) VALUES {{}}"
FORGET = "DELETE FROM mail_count WHERE id = ?"
STEP = ("SELECT id FROM mail_count WHERE id > ? ORDER BY id"
        f" LIMIT 1 OFFSET {CLEAN_STEP}")
LAST = "SELECT max(id) FROM mail_count"
OLD = ("SELECT DISTINCT id FROM mail_count"
       " WHERE id > ? AND id <= ? AND date <= ?")
FORGET_OLD = "DELETE FROM mail_count WHERE id = ? AND date <= ?"
FORGET_TURNS = ("DELETE FROM mail_turn WHERE id > ? AND id <= ? AND NOT"
                " EXISTS (SELECT 1 FROM mail_count c"
                " WHERE c.id = mail_turn.id)")
NOTED = "SELECT id, delta, hit FROM limit_report"
OWED = ("SELECT id, delta, SUM(hit) FROM report_owed WHERE address = ?"
        " GROUP BY id, delta")
OWE = "INSERT INTO report_owed (address, id, delta, hit) VALUES {}"
PAY = "DELETE FROM report_owed WHERE address NOT IN ({})"
TELL = "UPDATE limit_report SET hit = hit - ? WHERE id = ? AND delta = ?"
TOLD = "DELETE FROM limit_report WHERE id = ? AND delta = ? AND hit <= 0"
NEWEST_OF = "SELECT id, MAX(date) FROM mail_count {} GROUP BY id"
USED = "SELECT id, {} FROM mail_count {} GROUP BY id"
LEAVING = ("SELECT date, {} FROM mail_count WHERE id = ? AND date > ?"
           " ORDER BY date LIMIT ?")
RECORDED = "SELECT SUM(recipient_count) FROM mail_count WHERE id = ?"

Hits = dict[tuple[str, int], int]  # refusals by identity and window


class Window(NamedTuple):
    """A limit, and what an identity has used of it."""

    mails: int
    seconds: int
    used: int
    room_at: int | None  # when a mail passes again; None: now, or never
    noted: int  # refusals for the next report


class Standing(NamedTuple):
    """What an identity has used."""

    identity: str
    last_mail: int  # 0: none that is recorded
    source: str  # the setting that its limits come from
    limits: tuple[Window, ...]


class Charge:
    """One mail on its way through the ledger: claims in, verdict out."""

    def __init__(self, claims: Sequence[Claim], now: int,
                 instance: str = "", protocol_state: str = "") -> None:
        """Take the claims of a mail at the time now, in epoch seconds."""
        self.claims = claims
        self.now = now
        self.mark = (instance[:40] if instance.isascii() else "",
                     protocol_state)
        self.verdict: Verdict | None = None
        self.abandoned = False  # nobody waits for the verdict any more


class Batch:
    """The charges that one transaction settles."""

    def __init__(self) -> None:
        self.charges: list[Charge] = []
        self.lock = threading.Lock()  # of who settles it, then of who waited
        self.closed = False  # its transaction has begun
        self.error: LedgerError | None = None


class Account:
    """What an identity has used, as the transaction in hand sees it."""

    def __init__(self, identity: str, limits: Limits) -> None:
        self.identity = identity
        self.limits = limits
        self.date = self.total = 0
        self.before: tuple[int, ...] = ()  # for each limit's window

    def read(self, now: int, total: int | None,
             before: Sequence[int | None]) -> None:
        """Take what the ledger holds; None stands for no row."""
        self.date = now
        self.total = total or 0
        self.before = tuple(
            self.total if each is None else each for each in before)

    def usage(self, cost: int) -> list[Usage]:
        """Return the use of each limit's window, for a mail of a cost."""
        return [Usage(self.identity, self.total - before, cost, limit)
                for limit, before in zip(self.limits, self.before)]

    def charge(self, cost: int, mark: tuple[str, str]) -> tuple[object, ...]:
        """Count a mail and return its row."""
        self.total += cost
        return (self.identity, self.date, cost, *mark, self.total)


class Ledger:
    """The counts of all identities, for any number of threads.

    Many requests, one commit: while one batch is on its way to the disk, all
    that come join the next, and whoever came first settles it.  So nobody
    settles more than one batch, no thread is needed for it, each answer is
    given after its own commit, and one connection alone pays nothing.
    """

    def __init__(self, backend: Backend, query: str | None = None,
                 noted: tuple[int, ...] = ()) -> None:
        """Open nothing yet; query is the setting sql_limits_by_id.

        Refusals in the windows noted are kept for the report.
        """
        self.backend = backend
        self.query = query
        self.noted = noted
        self._open = Batch()
        self._lock = threading.Lock()  # of the connection
        self._connection: Connection = None
        self._ahead: tuple[str, tuple[object, ...]] = "", ()  # see _run
        self._begun = False  # a statement of the transaction succeeded
        self._committed = False  # its last one was sent with COMMIT

    def charge(self, charge: Charge) -> Verdict:
        """Settle a mail: all its claims are charged, or none.

        Returns when that is on disk.  Raises LedgerError.
        """
        deadline = time.monotonic() + self.backend.timeout
        while charge.verdict is None:  # or the batch was closed before us
            batch = self._open
            batch.charges.append(charge)
            try:
                with hold(batch.lock, deadline):
                    if not batch.closed:
                        self._settle(batch, deadline)
            except LedgerError:
                charge.abandoned = True
                raise
            if batch.error is not None:
                raise LedgerError(str(batch.error)) from batch.error
        return charge.verdict

    def transact(self, work: Callable[[Cursor], T]) -> T:
        """Run work in a transaction of its own and return its result."""
        deadline = time.monotonic() + self.backend.timeout
        with hold(self._lock, deadline):
            return self._transact(work, deadline)

    def close(self) -> None:
        """Close the connection; the next use opens another."""
        with contextlib.suppress(LedgerError), hold(
                self._lock, time.monotonic() + self.backend.timeout):
            self._roll_back(False)

    def clean(self, after: str, now: int, keep: int) -> tuple[str | None, int]:
        """Delete rows that no limit sees, of the identities after one.

        Looks at some CLEAN_STEP rows.  Rows of the last keep seconds stay,
        as do those that a limit of the query may still see.  Returns the last
        identity looked at, None if that was all, and the rows deleted.
        """
        def work(cursor: Cursor) -> tuple[str | None, int]:
            more = self._run(cursor, STEP, after).fetchone()
            [last] = more or self._run(cursor, LAST).fetchone()
            deleted = 0
            old = self._run(cursor, OLD, after, last or "", now - keep)
            for [identity] in old.fetchall():
                account = Account(identity, ())
                self._ask_limits(cursor, account)
                longest = max((s for _, s in account.limits), default=0)
                self._run(cursor, FORGET_OLD, identity,
                          now - max(keep, 2 * longest))
                deleted += cursor.rowcount
            if self.backend.turn:
                self._run(cursor, FORGET_TURNS, after, last or "")
            return more[0] if more else None, deleted

        return self.transact(work)

    def hits(self, address: str) -> tuple[Hits, Hits]:
        """Return the refusals noted, and older ones an address is owed."""
        return self.transact(lambda cursor: (
            self._hits(cursor, NOTED), self._hits(cursor, OWED, address)))

    def tell(self, noted: Hits, others: Sequence[str]) -> None:
        """Forget what an address was told; the others are owed it.

        What was noted meanwhile stays.  Short transactions, since they lock
        rows that the daemon may want to write.
        """
        def pay(cursor: Cursor) -> None:
            keep = ("", *others)
            self._run(cursor, PAY.format(", ".join("?" * len(keep))), *keep)

        def move(some: Sequence[tuple[Any, int]], cursor: Cursor) -> None:
            for key, hit in some:
                self._run(cursor, TELL, hit, *key)
                self._run(cursor, TOLD, *key)
            self._write(cursor, OWE, [(address, *key, hit) for key, hit in some
                                      for address in others])

        self.transact(pay)
        for some in chunks(sorted(noted.items()), 100):
            self.transact(functools.partial(move, some))

    def forget(self, identity: str) -> int:
        """Forget the mails of an identity; return how many were recorded."""
        def work(cursor: Cursor) -> int:
            if self.backend.turn:
                self._write(cursor, self.backend.turn, [(identity, 1)])
            [mails] = self._run(cursor, RECORDED, identity).fetchone()
            self._run(cursor, FORGET, identity)
            return int(mails or 0)

        return self.transact(work)

    def survey(self, settings: Settings, now: int,
               identity: str | None = None) -> list[Standing]:
        """Read what an identity has used, or all that used anything.

        Writes nothing, and needs no totals: it reads the original's tables.
        """
        try:
            with contextlib.closing(self.backend.look()) as connection:
                return self._survey(
                    connection.cursor(), settings, now, identity)
        except Exception as error:
            raise LedgerError(self.backend.explain(error)) from error

    def _survey(self, cursor: Cursor, settings: Settings, now: int,
                identity: str | None) -> list[Standing]:
        """Read it in two scans of the index, however many there are."""
        cursor.execute("SELECT * FROM mail_count LIMIT 0")
        counted = "recipient_count" in (one[0] for one in cursor.description)
        count = "COALESCE(recipient_count, 1)" if counted else "1"
        noted = columns_of(cursor, "limit_report")
        hits = self._hits(cursor, NOTED) if noted else {}
        chosen = () if identity is None else (identity,)
        where = "WHERE id = ?" if chosen else ""
        newest = dict.fromkeys(chosen, 0)
        newest.update(self._run(
            cursor, NEWEST_OF.format(where), *chosen).fetchall())
        ruled = self._rule(cursor, settings, newest)
        windows = sorted({limit.seconds for limits, _ in ruled.values()
                          for limit in limits})
        sums = ["0"] + [f"SUM(CASE WHEN date > ? THEN {count} ELSE 0 END)"
                        for _ in windows]
        used = {one: dict(zip(windows, map(int, row))) for one, _, *row in
                self._run(cursor, USED.format(", ".join(sums), where), *(
                    now - window for window in windows), *chosen).fetchall()}
        standings = []
        for one, (limits, source) in ruled.items():
            of = [used.get(one, {}).get(limit.seconds, 0) for limit in limits]
            if chosen or any(of):
                standings.append(Standing(one, newest[one], source, tuple(
                    Window(*limit, use, self._room_at(
                        cursor, LEAVING.format(count), one, limit, use, now),
                        hits.get((one, limit.seconds), 0))
                    for limit, use in zip(limits, of))))
        return standings

    def _hits(self, cursor: Cursor, statement: str, *values: object) -> Hits:
        """Read refusals by identity and window."""
        return {(identity, window): int(hit) for identity, window, hit in
                self._run(cursor, statement, *values).fetchall()}

    def _rule(self, cursor: Cursor, settings: Settings,
              identities: Iterable[str]) -> dict[str, tuple[Limits, str]]:
        """Return identities with limits and the setting these are from."""
        ruled = {}
        cursor.execute("BEGIN")
        for identity in identities:
            own = settings.limits_by_id.get(fold(identity))
            source = "limits" if own is None else "limits_by_id"
            account = Account(
                identity, settings.limits if own is None else own)
            if self._ask_limits(cursor, account):
                source = "sql_limits_by_id"
            if self.query:
                cursor.execute("RELEASE SAVEPOINT limits")
            ruled[identity] = account.limits, source
        cursor.execute("ROLLBACK")
        return ruled

    def _room_at(self, cursor: Cursor, statement: str, identity: str,
                 limit: Limit, used: int, now: int) -> int | None:
        """Return when a mail passes again; None: it does now, or never."""
        over = used + 1 - limit.mails
        if over <= 0 or limit.mails == 0:
            return None
        leaving = self._run(
            cursor, statement, identity, now - limit.seconds, over)
        for date, count in leaving.fetchall():
            over -= count
            if over <= 0:
                return int(date) + limit.seconds
        return None

    def _settle(self, batch: Batch, deadline: float) -> None:
        """Settle all charges of a batch in one transaction."""
        with hold(self._lock, deadline):
            if batch.closed:  # it failed with the batch before
                return
            self._open, began = Batch(), time.monotonic()
            batch.closed = True
            charges = [one for one in batch.charges if not one.abandoned]
            try:
                verdicts = self._transact(
                    lambda cursor: self._decide(cursor, charges), deadline,
                    self.backend.begin_with)
            except LedgerError as error:
                batch.error = error
                if time.monotonic() - began > self.backend.timeout / 2:
                    waited, self._open = self._open, Batch()
                    waited.error, waited.closed = error, True
                return
        for charge, verdict in zip(charges, verdicts):
            charge.verdict = verdict

    def _transact(self, work: Callable[[Cursor], T], deadline: float,
                  begin: str | None = None) -> T:
        """Run work in a transaction; needs the lock.

        begin, if given, goes before work's first statement and saves a round
        trip.  The first statement is the ping: if it finds an old connection
        dead, all is done on another.  Where another host was first with an
        identity, all is done again.
        """
        while True:
            old, began = self._connection is not None, time.monotonic()
            self._ahead, self._begun, self._committed = ("", ()), False, False
            self.backend.deadline = deadline
            try:
                cursor = self._connect().cursor()
                self._ahead, self._begun = (begin or "", ()), False
                if begin is None:
                    self._run(cursor, self.backend.begin)
                result = work(cursor)
                if not self._committed:
                    cursor.execute("COMMIT")
                self.backend.finish(cursor)
                return result
            except Exception as error:  # drivers raise more than their Error
                past = time.monotonic()
                dead = (old and not self._begun
                        and past - began < self.backend.timeout / 2)
                conflict = self.backend.is_conflict(error)
                self._roll_back(conflict)
                if not dead and (not conflict or past > deadline):
                    raise LedgerError(self.backend.explain(error)) from error
                if conflict:
                    time.sleep(random.uniform(0, 0.01))
            finally:
                self.backend.deadline = math.inf

    def _connect(self) -> Connection:
        """Return the connection, or make one and see to the tables."""
        if self._connection is None or self.backend.is_stale():
            self._roll_back(False)
            self._connection = self.backend.connect(self.backend.timeout)
            cursor = self._connection.cursor()
            self._prepare(cursor)
            for statement in self.backend.ready:
                cursor.execute(statement)
        return self._connection

    def _roll_back(self, keep: bool) -> None:
        """Undo what is half done; keep the connection, or close it."""
        connection = self._connection
        if not keep:
            self._connection = None
        if connection is None:
            return
        with contextlib.suppress(Exception):  # a lock outlives close() alone
            connection.cursor().execute("ROLLBACK")
        with contextlib.suppress(Exception):
            if not keep:
                connection.close()

    def _prepare(self, cursor: Cursor) -> None:
        """Make the tables, or bring those of the original up to date."""
        for again in (True, True, False):
            if "total" in columns_of(cursor, "mail_count"):
                break
            self.backend.deadline = math.inf  # large tables take long
            patient = self.backend.connect(3600)
            try:
                self._update(patient.cursor())
            except Exception:
                if not again:  # else another daemon may have been first
                    raise
            finally:
                patient.close()
        if self.query and not columns_of(cursor, "rate_limits"):
            with contextlib.suppress(Exception):  # the query may not need it
                cursor.execute(RATE_LIMITS)

    def _update(self, cursor: Cursor) -> None:
        """Bring the tables up to date; the column total comes last."""
        cursor.execute(self.backend.begin)
        for statement in TABLES:
            cursor.execute(statement.format(identity=self.backend.identity))
        present = columns_of(cursor, "mail_count")
        for name, kind in COLUMNS.items():
            if name not in (*present, "total"):
                cursor.execute(
                    f"ALTER TABLE mail_count ADD COLUMN {name} {kind}")
        for statement in self.backend.widen:
            cursor.execute(statement)
        cursor.execute("SELECT DISTINCT id FROM mail_count")
        for [identity] in cursor.fetchall():
            if fold(identity) != identity:
                self._run(cursor, RENAME, fold(identity), identity)
        if "total" not in present:
            for statement in self.backend.add_total:
                cursor.execute(statement)
        cursor.execute("COMMIT")

    def _decide(self, cursor: Cursor, charges: list[Charge]) -> list[Verdict]:
        """Judge mails and charge those that pass, one after the other."""
        accounts = {claim.identity: Account(claim.identity, claim.limits)
                    for charge in charges for claim in charge.claims}
        if self.backend.turn:
            self._write(cursor, self.backend.turn, [
                (identity, 1) for identity in sorted(accounts)], ahead=True)
        for account in accounts.values():
            self._ask_limits(cursor, account)
        now = max((charge.now for charge in charges), default=0)
        self._read(cursor, list(accounts.values()), now)
        verdicts, rows = [], []
        for charge in charges:
            verdict = judge([
                usage for claim in charge.claims
                for usage in accounts[claim.identity].usage(claim.cost)])
            verdicts.append(verdict)
            if verdict.broken is None:
                rows += [accounts[claim.identity].charge(
                    claim.cost, charge.mark) for claim in charge.claims
                    if accounts[claim.identity].limits]
        self._note(cursor, verdicts)
        self._write(cursor, INSERT, rows, self.backend.end_with)
        return verdicts

    def _note(self, cursor: Cursor, verdicts: Sequence[Verdict]) -> None:
        """Note refusals for the report; that must not cost the verdicts."""
        hits = Counter((one.broken.identity, one.broken.limit.seconds)
                       for one in verdicts if one.broken is not None
                       and one.broken.limit.seconds in self.noted)
        if not hits:
            return
        cursor.execute("SAVEPOINT note")
        try:
            self._write(cursor, self.backend.note,
                        [(*key, hit) for key, hit in sorted(hits.items())])
        except Exception as error:
            if self.backend.is_conflict(error):
                raise
            cursor.execute("ROLLBACK TO SAVEPOINT note")
            log.warning("a refusal is missing in the report: %s",
                        self.backend.explain(error), extra=SELDOM)

    def _ask_limits(self, cursor: Cursor, account: Account) -> bool:
        """Let the query sql_limits_by_id override an account's limits.

        Returns whether it did.
        """
        if not self.query:
            return False
        self._run(cursor, "SAVEPOINT limits")
        try:
            cursor.execute(self.query, (account.identity,))
            row = cursor.fetchone()
            if row is not None and row[0] is not None:
                account.limits = parse_limits(row[0])
                return True
        except Exception as error:
            if self.backend.is_conflict(error):
                raise
            cursor.execute("ROLLBACK TO SAVEPOINT limits")
            log.warning("sql_limits_by_id: %s; the file's limits hold",
                        self.backend.explain(error), extra=SELDOM)
        return False

    def _read(self, cursor: Cursor, accounts: list[Account],
              now: int) -> None:
        """Read what accounts have used, some with each statement."""
        width = max((len(account.limits) for account in accounts), default=0)
        for some in chunks(accounts, self.backend.chunk):
            parameters: list[object] = []
            for account in some:
                since = [now - limit.seconds for limit in account.limits]
                parameters += [account.identity, *since,
                               *[now] * (width - len(since))]
            joined = bool(self._ahead[1])
            self._run(cursor, usage_statement(
                len(some), width, self.backend.text), *parameters)
            if joined:
                self.backend.go_to_last(cursor)
            for n, *row in cursor.fetchall():
                self._take(cursor, some[n], now, row)

    def _take(self, cursor: Cursor, account: Account, now: int,
              row: Sequence[Any]) -> None:
        """Take what was read, unless it has to be read again."""
        date, total, *before = row
        if date is not None and (total is None or date > now + CLOCK_SKEW):
            self._mend(cursor, account.identity, now)
            self._read(cursor, [account], now)
        elif date is not None and date > now:  # another host's clock is ahead
            self._read(cursor, [account], date)
        else:
            account.read(now, total, before[:len(account.limits)])

    def _mend(self, cursor: Cursor, identity: str, now: int) -> None:
        """Write an identity's rows anew: with totals, none after now.

        The original wrote them, or the clock has been set back far.
        """
        rows, total = [], 0
        for date, count, *mark in self._run(cursor, ROWS, identity).fetchall():
            count = 1 if count is None else count
            total += count
            rows.append((identity, min(date, now), count, *mark, total))
        self._run(cursor, FORGET, identity)
        self._write(cursor, INSERT, rows)

    def _write(self, cursor: Cursor, statement: str,
               rows: Sequence[tuple[object, ...]], end: str = "",
               ahead: bool = False) -> None:
        """Write rows, some with each statement, which says VALUES {}.

        If that is one statement, end goes with it to end the transaction, or
        it goes ahead with the next one.
        """
        for some in chunks(rows, self.backend.chunk):
            place = "(" + ", ".join("?" * len(some[0])) + ")"
            text = statement.format(", ".join([place] * len(some)))
            values = tuple(itertools.chain(*some))
            if ahead and len(some) == len(rows):
                self._ahead = f"{self._ahead[0]}{text}; ", values
                return
            self._committed = bool(end) and len(some) == len(rows)
            self._run(cursor, text + (end if self._committed else ""), *values)

    def _run(self, cursor: Cursor, statement: str, *values: object) -> Cursor:
        """Execute a statement with the driver's placeholders.

        What was to go ahead goes with it: that saves a round trip.
        """
        (text, before), self._ahead = self._ahead, ("", ())
        cursor.execute((text + statement).replace("?", self.backend.mark),
                       (*before, *values))
        self._begun = True
        return cursor


@contextlib.contextmanager
def hold(lock: threading.Lock, deadline: float) -> Iterator[None]:
    """Hold a lock, or raise LedgerError when the deadline is past."""
    if not lock.acquire(timeout=max(0, deadline - time.monotonic())):
        raise LedgerError("the database is too slow")
    try:
        yield
    finally:
        lock.release()


def columns_of(cursor: Cursor, table: str) -> list[str]:
    """Return the names of a table's columns, none if there is no table."""
    try:
        cursor.execute(f"SELECT * FROM {table} LIMIT 0")
    except Exception:
        cursor.execute("SELECT 1")  # raises if it was the connection
        return []
    return [column[0] for column in cursor.description]


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Cut a list into lists of at most size."""
    return (items[i:i + size] for i in range(0, len(items), size))


@functools.cache
def usage_statement(accounts: int, windows: int, text: str = "?") -> str:
    """Return the query for so many accounts with so many windows each.

    It takes identity and begin of each window, for each account, and yields
    the account's place, newest date, newest total, and for each window the
    total before its first row.
    """
    since = [f"since{n}" for n in range(windows)]
    asked = " UNION ALL ".join(
        f"SELECT {n}, {text}{', ?' * windows}" for n in range(accounts))
    columns = ", ".join(f"({query})" for query in (
        NEWEST.format("date"), NEWEST.format("total"),
        *map(BEFORE.format, since)))
    return (f"WITH asked ({', '.join(['n', 'who', *since])}) AS ({asked})"
            f" SELECT n, {columns} FROM asked")


class Backend:
    """What differs between databases; this is what most of them have."""

    name: str
    drivers: tuple[tuple[str, str], ...]  # modules with Debian's packages
    mark = "%s"  # the driver's placeholder
    text = "?"  # a value that is text
    begin = "BEGIN"
    begin_with: str | None = None  # the same before another statement
    end_with = ""  # COMMIT behind another statement
    ready: tuple[str, ...] = ()  # for a connection, once the tables are there
    chunk = 50  # rows a statement: each costs a round trip
    identity = f"varchar({MAX_IDENTITY})"  # the type of an identity
    widen: tuple[str, ...] = ()  # the original's columns
    add_total: tuple[str, ...] = (
        f"ALTER TABLE mail_count ADD COLUMN total {COLUMNS['total']}", INDEX)
    turn = ""  # how an identity's turn is taken where many hosts may write
    note = ("INSERT INTO limit_report (id, delta, hit) VALUES {} ON CONFLICT"
            " (id, delta) DO UPDATE SET hit = limit_report.hit + excluded.hit")
    conflicts: tuple[object, ...] = ()  # codes of errors to be tried again

    def __init__(self, settings: Settings) -> None:
        """Take how to connect; raise ConfigError if there is no driver."""
        self.timeout = min(settings.db_timeout, 90)  # Postfix waits 100 s
        self.deadline = math.inf  # of the transaction in hand
        self.config = self.choose(settings)
        self.driver = import_driver(self.drivers)

    def choose(self, settings: Settings) -> dict[str, Any]:
        """Return the arguments of the driver's connect()."""
        raise NotImplementedError

    def connect(self, timeout: int) -> Connection:
        """Connect; no answer may take longer than timeout, in seconds."""
        raise NotImplementedError

    def look(self) -> Connection:
        """Connect to read only, a large table for as long as it takes."""
        return self.connect(3600)

    def is_stale(self) -> bool:
        """Say whether the connection leads nowhere, if that can be told."""
        return False

    def go_to_last(self, cursor: Cursor) -> None:
        """Go to the result of the last of statements sent together."""

    def finish(self, cursor: Cursor) -> None:
        """Wait for the last of statements sent together."""

    def is_conflict(self, error: Exception) -> bool:
        """Say whether another transaction was first, so try again."""
        codes = {*error.args[:1], getattr(error, "pgcode", None),
                 getattr(error, "sqlstate", None)}
        return bool(codes.intersection(self.conflicts))

    def explain(self, error: Exception) -> str:
        """Return the text of an error in one line."""
        return f"{self.name}: {' '.join(str(error).split())}"

    def probe(self) -> str:
        """Try the database, changing nothing; return what it is."""
        try:
            with contextlib.closing(self.connect(self.timeout)) as connection:
                cursor = connection.cursor()
                cursor.execute("SELECT version()")
                [version] = cursor.fetchone()
        except Exception as error:
            raise LedgerError(self.explain(error)) from error
        return f"{version}, through {self.driver.__name__}"


class SQLite(Backend):
    """SQLite: one file, one host."""

    name = "SQLite"
    drivers = (("sqlite3", "libpython3-stdlib"),)
    mark = "?"
    begin = "BEGIN IMMEDIATE"
    chunk = 1  # a statement costs no round trip, and is prepared but once
    add_total = ("DROP INDEX IF EXISTS mail_count_index", *Backend.add_total)

    def choose(self, settings: Settings) -> dict[str, Any]:
        """Return the arguments of sqlite3.connect()."""
        return {"timeout": self.timeout, **settings.sqlite_config}

    def connect(self, timeout: int) -> Connection:
        """Open the file, so that a commit outlives a power cut."""
        connection = self.driver.connect(
            isolation_level=None, check_same_thread=False, **self.config)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        self._file = self._identify()
        return connection

    def look(self) -> Connection:
        """Open the file to read; a missing one is not made."""
        path = urllib.parse.quote(os.path.abspath(self.config["database"]))
        return self.driver.connect(**{
            **self.config, "database": f"file:{path}?mode=rw", "uri": True})

    def is_stale(self) -> bool:
        """Say whether the file is no longer the one that was opened."""
        return self._identify() != self._file

    def probe(self) -> str:
        """Try the file, if there is one, and its lock."""
        path = str(self.config["database"])
        if os.path.exists(path):
            try:
                with contextlib.closing(self.driver.connect(
                        path, timeout=self.timeout)) as connection:
                    connection.execute("BEGIN IMMEDIATE")
            except self.driver.Error as error:
                raise LedgerError(self.explain(error)) from error
        return f"SQLite {self.driver.sqlite_version}, {path}"

    def explain(self, error: Exception) -> str:
        """Return the text of an error with the file."""
        return f"{self.config.get('database')}: {error}"

    def _identify(self) -> tuple[int, int]:
        """Return what tells this file from another of its name."""
        try:
            status = os.stat(self.config["database"])
        except OSError:
            return -1, -1
        return status.st_dev, status.st_ino


class MySQL(Backend):
    """MariaDB and MySQL, also Galera."""

    name = "MySQL"
    drivers = (("MySQLdb", "python3-mysqldb"), ("pymysql", "python3-pymysql"))
    identity = (f"varchar({MAX_IDENTITY}) CHARACTER SET utf8mb4"
                " COLLATE utf8mb4_bin")
    widen = (
        f"ALTER TABLE mail_count MODIFY id {identity} NOT NULL,"
        f" MODIFY protocol_state {COLUMNS['protocol_state']},"
        " ENGINE=InnoDB, ROW_FORMAT=DYNAMIC",
        f"ALTER TABLE limit_report MODIFY id {identity} NOT NULL,"
        " ENGINE=InnoDB, ROW_FORMAT=DYNAMIC",
    )
    add_total = (  # in one statement, since none can be rolled back
        f"ALTER TABLE mail_count ADD COLUMN total {COLUMNS['total']},"
        " ADD INDEX mail_count_total (id, date, total, recipient_count)",)
    turn = ("INSERT INTO mail_turn (id, turn) VALUES {}"
            " ON DUPLICATE KEY UPDATE turn = turn + 1")
    note = ("INSERT INTO limit_report (id, delta, hit) VALUES {}"
            " ON DUPLICATE KEY UPDATE hit = hit + VALUES(hit)")
    conflicts = (1213,)  # deadlock, or on Galera another node was first
    text = "? COLLATE utf8mb4_bin"
    begin_with = ""  # since autocommit is off
    end_with = "; COMMIT"
    ready = ("SET autocommit = 0",)

    def choose(self, settings: Settings) -> dict[str, Any]:
        """Return the arguments of connect(); utf8 cannot hold all names."""
        charset = str(settings.mysql_config.get("charset", "utf8"))
        if charset.startswith("utf8"):
            charset = "utf8mb4"
        flags = settings.mysql_config.get("client_flag", 0) | 1 << 16
        return {**settings.mysql_config, "charset": charset,
                "client_flag": flags}  # MULTI_STATEMENTS

    def connect(self, timeout: int) -> Connection:
        """Connect with a bound on each answer."""
        connection = self.driver.connect(**{
            "connect_timeout": self.timeout, "read_timeout": timeout,
            "write_timeout": timeout, **self.config})
        connection.autocommit(True)
        return connection

    def go_to_last(self, cursor: Cursor) -> None:
        """Go to the second result: two are sent together at most."""
        cursor.nextset()

    def finish(self, cursor: Cursor) -> None:
        """Wait for COMMIT, whose result is the second of its statement."""
        while cursor.nextset():
            pass


class PostgreSQL(Backend):
    """PostgreSQL."""

    name = "PostgreSQL"
    drivers = (("psycopg2", "python3-psycopg2"),
               ("psycopg", "python3-psycopg"))
    widen = (
        f"ALTER TABLE mail_count ALTER COLUMN id TYPE {Backend.identity},"
        " ALTER COLUMN protocol_state TYPE varchar(20)",
        f"ALTER TABLE limit_report ALTER COLUMN id TYPE {Backend.identity}",
    )
    add_total = SQLite.add_total
    turn = ("INSERT INTO mail_turn (id, turn) VALUES {}"
            " ON CONFLICT (id) DO UPDATE SET turn = mail_turn.turn + 1")
    conflicts = ("40001", "40P01")  # serialization failure, deadlock
    begin_with = "BEGIN; "
    end_with = "; COMMIT"

    def choose(self, settings: Settings) -> dict[str, Any]:
        """Return the arguments of connect(), whose dbname has two names."""
        config = dict(settings.pgsql_config)
        if "database" in config:
            config["dbname"] = config.pop("database")
        return config

    def __init__(self, settings: Settings) -> None:
        """Start to watch the time, since libpq waits for ever."""
        super().__init__(settings)
        threading.Thread(target=self._watch, daemon=True).start()

    def connect(self, timeout: int) -> Connection:
        """Connect; if timeout is that of the setting, cut what hangs."""
        connection = self.driver.connect(**{
            "connect_timeout": self.timeout, **self.config})
        connection.autocommit = True
        if hasattr(self.driver, "ClientCursor"):  # psycopg 3: ours join two
            connection.cursor_factory = self.driver.ClientCursor
        if timeout == self.timeout:
            self._watched = connection
        return connection

    def go_to_last(self, cursor: Cursor) -> None:
        """Go to the last result; psycopg2 has no other."""
        if hasattr(self.driver, "ClientCursor"):
            while cursor.nextset():
                pass

    def _watch(self) -> None:
        """Cut the line of a transaction whose deadline is past."""
        while True:
            time.sleep(self.timeout / 20)
            if time.monotonic() < self.deadline:
                continue
            with contextlib.suppress(Exception), socket.socket(
                    fileno=os.dup(self._watched.fileno())) as line:
                line.shutdown(socket.SHUT_RDWR)


BACKENDS = (SQLite, MySQL, PostgreSQL)


def import_driver(drivers: Sequence[tuple[str, str]]) -> Any:
    """Return the first driver that is installed, or raise ConfigError."""
    for module, _ in drivers:
        with contextlib.suppress(ImportError):
            return importlib.import_module(module)
    raise ConfigError("no database driver: install "
                      + " or ".join(package for _, package in drivers))


def open_ledger(settings: Settings) -> Ledger:
    """Return the ledger that the settings name; it connects when used."""
    return Ledger(BACKENDS[settings.backend](settings),
                  settings.sql_limits_by_id, settings.noted_windows)


# ---------------------------------------------------------------------------
# 6. Service
#
# A request in, an action out: what the daemon is for.
# ---------------------------------------------------------------------------


class Service:
    """Answers requests under settings that may be replaced at any time."""

    def __init__(self, settings: Settings, ledger: Ledger,
                 clock: Callable[[], float] = time.time,
                 alarm: Callable[..., None] = lambda *_: None) -> None:
        """Take a clock, and an alarm, which is told of each refusal."""
        self.settings = settings
        self.tally = Tally(settings.pidfile)
        self._ledger = ledger
        self._clock = clock
        self._alarm = alarm
        self._counted = -math.inf  # when a mail was last counted
        self._away = False  # the database
        self._news = threading.Lock()  # for _away, when that changes
        self._cleaned = ""  # the identity where cleaning goes on

    def answer(self, request: Request, told: dict[str, str]) -> str:
        """Return the action for a request, having counted its mail.

        told is the connection's memory: the action that the mail of an
        instance was given at DATA, for when END-OF-MESSAGE asks again.
        """
        settings = self.settings  # the same ones from here to the answer
        now, queue_id = self._clock(), printable(request.queue_id) or "NOQUEUE"
        self.tally.count("requests")
        if settings.log_requests:
            log.log(NOTICE, "%s: %s", queue_id, printable(", ".join(
                f"{name[:MAX_TOLD]}={value[:MAX_TOLD]}"
                for name, value in request.attributes.items() if value)))
        self._watch_state(request, settings, now)
        if (request.protocol_state == "END-OF-MESSAGE"
                and request.instance in told):
            return told.pop(request.instance)
        told.clear()
        claims = claims_of(request, settings)
        if not claims:
            log.info("%s: protocol_state=%s, not counted, action=%s", queue_id,
                     printable(request.protocol_state),
                     settings.success_action)
            return settings.success_action
        try:
            verdict = self._charge(request, claims, settings, int(now))
        except LedgerError:
            return settings.db_error_action
        level, action = ((logging.INFO, settings.success_action)
                         if verdict.broken is None else
                         (NOTICE, settings.fail_action))
        if log.isEnabledFor(level):
            log.log(level, "%s: %s, action=%s", queue_id, describe(verdict),
                    action)
        if request.protocol_state == "DATA" and request.instance:
            told[request.instance] = action
        return action

    def reload(self, settings: Settings) -> None:
        """Take new settings, for the next request of each connection."""
        self.settings = settings
        self._ledger.query = settings.sql_limits_by_id
        self._ledger.noted = settings.noted_windows

    def clean(self) -> None:
        """Drop a few rows that no limit sees, so that nobody has to."""
        try:
            last, deleted = self._ledger.clean(
                self._cleaned, int(self._clock()),
                2 * self.settings.longest_window)
        except LedgerError as error:
            self._tell_database(error)
            return
        self._cleaned = last or ""
        if deleted:
            log.info("%d old records deleted", deleted)

    def _charge(self, request: Request, claims: list[Claim],
                settings: Settings, now: int) -> Verdict:
        """Return the ledger's verdict, having told whom it concerns."""
        began, result = time.perf_counter(), "database_errors"
        try:
            verdict = self._ledger.charge(Charge(
                claims, now, request.instance, request.protocol_state))
            result = "passed" if verdict.broken is None else "refused"
        except LedgerError as error:
            self._tell_database(error)
            raise
        finally:
            self.tally.count(result, time.perf_counter() - began)
        if verdict.broken is not None:
            with contextlib.suppress(Exception):  # the answer comes first
                self._alarm(
                    verdict.broken, request.client_address, settings, now)
        elif self._away:  # a refusal writes nothing: it may be full
            self._tell_database(None)
        return verdict

    def _watch_state(self, request: Request, settings: Settings,
                     now: float) -> None:
        """Warn if Postfix asks only where count_mode never counts."""
        states = COUNTED_STATES[settings.count_mode]
        if request.protocol_state in states:
            self._counted = now
        elif not self._counted <= now < self._counted + 3600:
            log.warning(
                "Postfix asks at protocol_state=%s, but count_mode %d counts"
                " at %s: nothing is limited; put this into main.cf: %s",
                printable(request.protocol_state), settings.count_mode,
                states[0], main_cf(settings.count_mode, settings.SOCKET),
                extra=SELDOM)

    def _tell_database(self, error: LedgerError | None) -> None:
        """Say once that the database is away, and once that it is back."""
        away = error is not None
        with self._news:
            if away == self._away:
                return
            self._away = away
        if away:
            log.error("the database is away, the answer is %s: %s",
                      self.settings.db_error_action, error)
        else:
            log.warning("the database is back: counting again")


class Tally:
    """What the daemon has done since its start; any thread may count.

    --prometheus finds it in a file beside the pidfile: that needs no
    database, whose errors it counts, and no protocol for strangers to ask by.
    """

    def __init__(self, pidfile: str) -> None:
        self._path = pidfile + ".tally"
        self._lock = threading.Lock()
        self._counts: dict[str, float] = dict.fromkeys((
            "requests", "passed", "refused", "database_errors",
            "decision_seconds"), 0)
        self._last = self._counts.copy()  # an hour ago
        self._began = time.monotonic()  # the hour

    def count(self, name: str, seconds: float = 0) -> None:
        """Count a request, or a decision and the time it took."""
        with self._lock:
            self._counts[name] += 1
            self._counts["decision_seconds"] += seconds

    def publish(self, asked: bool = False) -> None:
        """Write the file, and log a summary each hour or when asked."""
        with self._lock:
            counts = self._counts.copy()
        with contextlib.suppress(OSError):  # the daemon must go on
            with open(self._path + ".new", "w", encoding="utf-8") as file:
                json.dump(counts, file)
            os.replace(self._path + ".new", self._path)
        past = time.monotonic() - self._began
        new = {name: counts[name] - self._last[name] for name in counts}
        if asked or (past >= 3600 and new["requests"]):
            seconds = new.pop("decision_seconds")
            decided = new["passed"] + new["refused"] + new["database_errors"]
            log.log(NOTICE, "in %d minutes: %s; %.1f ms a decision", past / 60,
                    ", ".join(f"{new[name]} {name}" for name in new),
                    1000 * seconds / (decided or 1))
        if past >= 3600:
            self._last, self._began = counts, time.monotonic()

    def read(self) -> dict[str, float]:
        """Return what a running daemon has written, nothing if none runs."""
        try:
            with open(self._path, encoding="utf-8") as file:
                written = os.fstat(file.fileno()).st_mtime
                return json.load(file) if time.time() < written + 60 else {}
        except (OSError, ValueError) as error:
            log.warning("no counters of the daemon: %s", error)
            return {}

    def close(self) -> None:
        """Remove the file."""
        with contextlib.suppress(OSError):
            os.unlink(self._path)


def main_cf(count_mode: int, address: str | tuple[str, int]) -> str:
    """Return the line of main.cf that makes Postfix ask at an address."""
    stage = "data" if count_mode else "recipient"
    kind = "unix" if isinstance(address, str) else "inet"
    where = format_address(address).replace("/var/spool/postfix/", "", 1)
    return (f"smtpd_{stage}_restrictions = check_policy_service"
            f" {{ {kind}:{where}, default_action=DUNNO }}")


def format_address(address: str | tuple[str, int]) -> str:
    """Return the path of a socket, or host:port as Postfix writes it."""
    if isinstance(address, str):
        return address
    host, port, *_ = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def describe(verdict: Verdict) -> str:
    """Return a verdict in Postfix's key=value style."""
    if not verdict.usage:
        return "no limits"
    passed = verdict.broken is None
    identity, _, cost, _ = verdict.broken or verdict.usage[0]
    use = " ".join(
        f"{used + cost if passed else used}/{limit.mails}/{limit.seconds}s"
        for _, used, cost, limit in verdict.usage)
    return f"identity=<{printable(identity)}>, cost={cost}, used={use}"


def printable(text: str) -> str:
    """Return text without what could forge a line of the log."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else "?" for c in text)


# ---------------------------------------------------------------------------
# 7. Server
#
# Sockets and threads: one thread a connection, and a bound on everything
# that a stranger can send or keep open.
# ---------------------------------------------------------------------------


class PolicyHandler(socketserver.BaseRequestHandler):
    """One connection: any number of requests, each answered in turn."""

    server: PolicyServer
    request: socket.socket

    def setup(self) -> None:
        """Bound the time, and tell the server that this is open."""
        self.asked = False  # has a whole request come?
        self.active = time.monotonic()  # when it was last answered; inf: busy
        self.patience = self.server.service.settings.delay_to_close
        for option, seconds in ((socket.SO_RCVTIMEO, self.patience),
                                (socket.SO_SNDTIMEO, 2)):  # Postfix reads
            # settimeout() would poll() before each call: a fifth slower
            self.request.setsockopt(socket.SOL_SOCKET, option,
                                    struct.pack("ll", seconds, 0))
        self.thread = threading.current_thread()
        self.server.handlers.add(self)

    def handle(self) -> None:
        """Answer until the client has no more to ask."""
        answer, told = self.server.service.answer, dict[str, str]()
        try:
            for request in read_requests(self.receive):
                self.asked, self.active = True, math.inf
                action = answer(request, told)
                self.request.sendall(f"action={action}\n\n".encode())
                self.active = time.monotonic()
                del request  # it may be large, and the next one far
        except BadRequest as error:
            log.warning("hung up on a client: %s", error, extra=SELDOM)
        except OSError:
            pass  # it went away, or was silent for too long

    def finish(self) -> None:
        """Tell the server that this is closed."""
        self.server.handlers.discard(self)

    def receive(self) -> bytes:
        """Return some bytes, none at the end or when time is up."""
        if time.monotonic() - self.active > 2 * self.patience:
            return b""  # a request that comes byte by byte
        return self.request.recv(8192)

    def hang_up(self) -> None:
        """End it from another thread, once what has come is answered."""
        with contextlib.suppress(OSError):
            self.request.shutdown(socket.SHUT_RD)


class PolicyServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Listens where SOCKET says."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 1024  # Postfix's processes come all at once
    most = 4000  # connections; Postfix's default_process_limit is 100
    path: str | None = None  # of the unix socket, once it is ours

    def __init__(self, service: Service) -> None:
        """Bind and listen; raise AlreadyRunning, or OSError."""
        self.service = service
        self.handlers: set[PolicyHandler] = set()
        address = service.settings.SOCKET
        self.address_family = (
            socket.AF_UNIX if isinstance(address, str) else
            socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
        with free_path(address):
            super().__init__(
                address, PolicyHandler)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        """Bind, a unix socket with socket_permission from its first moment."""
        settings = self.service.settings
        before = os.umask(0o777 & ~settings.socket_permission)
        try:
            super().server_bind()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise AlreadyRunning(f"{error}: {settings.SOCKET}") from None
        finally:
            os.umask(before)
        if isinstance(settings.SOCKET, str):
            self.path, self.made = settings.SOCKET, os.lstat(settings.SOCKET)
        else:  # each connection inherits it
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection; make room where there is none."""
        if len(self.handlers) >= self.most and not self.evict():
            raise OSError("all are busy")  # it waits where it is
        try:
            return super().get_request()
        except OSError as error:
            log.error("cannot accept a connection: %s", error, extra=SELDOM)
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                self.evict()
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread; make room where no more can be had."""
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # TasksMax of systemd, RLIMIT_NPROC
            self.evict()
            super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what is a fault of ours; the client is hung up on."""
        log.error("fault in a connection", exc_info=True, extra=SELDOM)

    def evict(self) -> bool:
        """Hang up on who asked nothing for a second, else is idle longest.

        Never on who waits for an answer; say whether there is room now.
        """
        log.warning("too many connections: idle ones are closed",
                    extra=SELDOM)
        recent = time.monotonic() - 1
        idle = sorted(
            (one for one in list(self.handlers) if one.active < math.inf),
            key=lambda one: (one.asked or one.active > recent, one.active))
        for handler in idle[:1 + len(idle) // 64]:  # sorting is for many
            handler.hang_up()
        if not idle:
            time.sleep(0.05)
            return False
        idle[0].thread.join(0.05)
        return not idle[0].thread.is_alive()

    def stop(self, seconds: float) -> None:
        """Take no new connections, answer what has come, then close."""
        self.shutdown()
        self.server_close()
        deadline = time.monotonic() + seconds
        handlers = list(self.handlers)
        for handler in handlers:
            handler.hang_up()
        for handler in handlers:
            handler.thread.join(max(0, deadline - time.monotonic()))

    def server_close(self) -> None:
        """Close the listening socket and remove its path, if still ours."""
        super().server_close()
        with contextlib.suppress(OSError):
            if self.path is not None and os.path.samestat(
                    os.lstat(self.path), self.made):
                os.unlink(self.path)


@contextlib.contextmanager
def free_path(address: str | tuple[str, int]) -> Iterator[None]:
    """Free a path; keep others from judging ours stale until it listens."""
    if not isinstance(address, str):
        yield
        return
    with hold_lock(address):
        if os.path.lexists(address):
            remove_stale_socket(address)
        yield


@contextlib.contextmanager
def hold_lock(path: str) -> Iterator[None]:
    """Hold a path until the end, or raise AlreadyRunning.

    Who may read a file may lock it: this one is for its owner alone.
    """
    with open(path + ".lock", "w", opener=lambda name, flags: os.open(
            name, flags | os.O_NOFOLLOW, 0o600)) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(
                os.fstat(file.fileno()), os.lstat(file.name))
        except (BlockingIOError, FileNotFoundError):
            held = False  # or the one that had it is about to end
        if not held:
            raise AlreadyRunning(f"{path}: another instance is running")
        if os.geteuid() == 0:  # tomorrow another user may start it
            folder = os.stat(os.path.dirname(file.name) or ".")
            os.fchown(file.fileno(), folder.st_uid, folder.st_gid)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(file.name)


def remove_stale_socket(path: str) -> None:
    """Remove a socket on which nobody listens; never one in use."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise FileExistsError(errno.EEXIST, "is not a socket", path)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # it listens, but is busy
    raise AlreadyRunning(f"{path}: another process listens there")


# ---------------------------------------------------------------------------
# 8. Reports
#
# What people and other programs are told: reports, alerts, what was counted,
# who has used how much.  No answer to Postfix waits for any of it.
# ---------------------------------------------------------------------------

MAIL_PATIENCE = 30  # seconds for a step of the mail server, or for a program
ALERTS_AN_HOUR = 20
ALERTS_KNOWN = 10000  # identities and windows remembered, of 200 bytes each


def send_reports(ledger: Ledger, settings: Settings) -> None:
    """Mail each address the refusals that it was not told of yet.

    What an address does not take it is owed, in a table of its own: so its
    next report tells it, and nobody is told anything twice.
    """
    warn_unaddressed(settings)
    addresses = {fold(address): address for address in settings.report_to}
    failed: dict[str, list[str]] = {}
    for key, address in addresses.items():
        try:
            noted, owed = ledger.hits(key)
            hits = Counter(noted) + Counter(owed)
            if hits or not settings.report_only_if_needed:
                mail(settings, address, settings.report_subject, report(hits))
                ledger.tell(noted, [one for one in addresses if one != key])
        except Exception as error:  # a strange address raises many kinds
            failed.setdefault(reason(error), []).append(address)
    if failed:
        raise CleanError("no report to " + "; ".join(
            f"{', '.join(some)}: {why}" for why, some in failed.items()))


def warn_unaddressed(settings: Settings) -> None:
    """Warn if nobody is named to get reports or alerts."""
    alert = settings.alert and not settings.alert_command
    if (settings.report or alert) and not settings.report_to:
        log.warning("report_to: nobody is named to get reports and alerts")


def report(hits: Hits) -> str:
    """Return the text of a report, most hits first."""
    rows = [("identity", "window", "hits")]
    rows += [(printable(identity), f"{window} s", str(hit))
             for (identity, window), hit in
             sorted(hits.items(), key=lambda item: (-item[1], item[0]))]
    width = max(len(identity) for identity, _, _ in rows)
    return "Mails refused since the last report:\n\n" + "".join(
        f"{identity:{width}} {window:>12} {hit:>10}\n"
        for identity, window, hit in rows)


def mail(settings: Settings, address: str, subject: str, text: str) -> None:
    """Mail a text; return when the server has taken it, or raise."""
    host = socket.getfqdn()
    message = EmailMessage()
    message["From"] = settings.report_from or f"{PROGRAM}@{host}"
    message["To"] = address
    message["Subject"] = printable(subject)
    message["Date"] = format_datetime(localtime())
    message["Message-ID"] = make_msgid(domain=host)
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(text, cte="quoted-printable")
    with contextlib.closing(smtplib.SMTP(
            *settings.smtp_server, timeout=MAIL_PATIENCE)) as smtp:
        secure(smtp, settings)
        smtp.send_message(message)
        with contextlib.suppress(OSError):  # it has the mail already
            smtp.quit()


def secure(smtp: smtplib.SMTP, settings: Settings) -> None:
    """Encrypt and log in as the settings say; no password in the clear."""
    assert smtp.sock is not None
    peer = parse_address(smtp.sock.getpeername()[0].partition("%")[0])
    local = peer is not None and peer.is_loopback
    if settings.smtp_starttls:
        context = ssl.create_default_context()
        if local or not settings.smtp_tls_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        smtp.starttls(context=context)
    elif settings.smtp_credentials and not local:
        raise OSError("smtp_credentials are sent encrypted only: set"
                      " smtp_starttls: True")
    if settings.smtp_credentials:
        smtp.login(*settings.smtp_credentials)


def reason(error: Exception) -> str:
    """Return in one line why a mail was not taken."""
    text: Any = getattr(error, "smtp_error", "") or str(error) or repr(error)
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        [(_, text), *_] = error.recipients.values()
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    return printable(" ".join(text.split()))


class Alarm:
    """Tells at once who hits a limit, from a thread of its own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._queue: queue.Queue[tuple[Settings, dict[str, str]]] = (
            queue.Queue(2 * ALERTS_AN_HOUR))
        self._lock = threading.Lock()  # of _known: when told, refused since
        self._known: dict[tuple[str, int], tuple[float, int]] = {}

    def refused(self, broken: Usage, client: str, settings: Settings,
                now: float) -> None:
        """Take note of a refusal: by a look-up only, for mail waits."""
        identity, _, _, (mails, window) = broken
        if not settings.alert or window not in settings.report_limits:
            return
        key = identity, window
        with self._lock:
            told, refused = self._known.pop(key, (-math.inf, 0))
            due = abs(now - told) >= window  # the clock may be set back
            self._known[key] = (now, 0) if due else (told, refused + 1)
            if len(self._known) > ALERTS_KNOWN:
                del self._known[next(iter(self._known))]
        if not due:
            return
        facts = {"identity": printable(identity),
                 "limit": f"{mails} mails in {window} s",
                 "since": moment(now),
                 "client_address": printable(client),
                 "refused_since_last_alert": str(refused + 1)}
        with contextlib.suppress(queue.Full):  # the report will tell
            self._queue.put_nowait((settings, facts))

    def run(self) -> None:
        """Send alerts for ever, but not too many within an hour."""
        sent = deque([-math.inf] * ALERTS_AN_HOUR, ALERTS_AN_HOUR)
        silent = -math.inf  # when it was told that no more come
        while True:
            settings, facts = self._queue.get()
            now = self._clock()
            if now >= sent[0] + 3600:
                sent.append(now)
            elif now >= silent + 3600:
                silent = now
                facts = {"notice": f"{ALERTS_AN_HOUR} alerts within an hour:"
                                   " the rest is left to the report"}
            else:
                continue
            send_alert(settings, facts)


def send_alert(settings: Settings, facts: Mapping[str, str]) -> None:
    """Run alert_command, or mail an alert to each address; never raise."""
    subject = f"{PROGRAM} alert: {next(iter(facts.values()))}"
    text = "".join(f"{name}: {fact}\n" for name, fact in facts.items())
    for target in settings.alert_command[:1] or settings.report_to:
        try:
            if settings.alert_command:
                run_program(settings.alert_command, facts)
            else:
                mail(settings, target, subject, text)
        except Exception as error:  # the next one may take it
            log.warning("no alert to %s: %s", target, reason(error),
                        extra=SELDOM)


def run_program(command: Sequence[str], facts: Mapping[str, str],
                patience: float = MAIL_PATIENCE) -> None:
    """Run a program with facts in its environment; kill it if it hangs."""
    environment = {f"POLICYD_{name.upper()}": fact
                   for name, fact in facts.items()}
    with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, **environment}) as child:
        try:
            code = child.wait(patience)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # and what it started
            code = child.wait()
    if code:
        raise OSError(f"exit status {code}")


def show_metrics(settings: Settings, ledger: Ledger) -> Iterator[str]:
    """Yield the lines of --prometheus: of the daemon, then of identities."""
    counts = Tally(settings.pidfile).read()
    yield from show_metric("up", {"": int(bool(counts))})
    for name, value in counts.items():
        yield from show_metric(f"{name}_total", {"": value})
    used, limit = {}, {}
    for one in ledger.survey(settings, int(time.time())):
        name = re.sub(r'(["\\])', r"\\\1", printable(one.identity))
        for window in sorted(one.limits, reverse=True):  # the narrowest last
            labels = f'{{identity="{name}",window="{window.seconds}"}}'
            used[labels], limit[labels] = window.used, window.mails
    yield from show_metric("used", used)
    yield from show_metric("limit", limit)


def show_metric(name: str, values: Mapping[str, float]) -> Iterator[str]:
    """Yield a metric, with a value for each labels."""
    name = f"policyd_rate_limit_{name}"
    yield f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}"
    for labels, value in values.items():
        yield f"{name}{labels} {value}"


def fullness(standing: Standing) -> tuple[float, int]:
    """Return how full the fullest window is, and what is used of one."""
    return max(((one.used / max(one.mails, 1), one.used)
                for one in standing.limits), default=(0, 0))


def show_most(standings: Sequence[Standing], colour: bool) -> Iterator[str]:
    """Yield the lines that show the first 20, for a terminal."""
    shown = standings[:20]
    room = max(16, shutil.get_terminal_size().columns - 58)
    width = min(room, max((len(one.identity) for one in shown), default=0))
    for one in shown:
        name = printable(one.identity)
        name = name if len(name) <= width else name[:width - 3] + "..."
        for window in one.limits:
            yield f"{name:{width}} {show_window(window, colour)}"
            name = ""
    if len(standings) > len(shown):
        yield (f"and {len(standings) - len(shown)} more: --status ID shows"
               " one, --json all")


def show_one(standing: Standing, colour: bool) -> Iterator[str]:
    """Yield the lines that tell all about one identity."""
    last = standing.last_mail
    yield printable(standing.identity)
    yield f"last mail: {moment(last) if last else 'none'}"
    yield f"limits, from {standing.source}:"
    for window in standing.limits:
        yield "  " + show_window(window, colour)
        if window.noted:
            yield f"       {window.noted} refusals for the next report"


def show_window(window: Window, colour: bool) -> str:
    """Return a limit with a bar of what is used, and when there is room."""
    mails, seconds, used, room_at, _ = window
    bar = f"{'#' * min(10, math.ceil(10 * used / max(mails, 1))):.<10}"
    if colour and used >= mails:
        bar = f"\033[31m{bar}\033[0m"
    size, unit = next((size, unit) for size, unit in (
        (86400, "d"), (3600, "h"), (60, "m"), (1, "s")) if seconds % size == 0)
    room = f"room at {moment(room_at)}" if room_at else ""
    return (f"{seconds // size:>3}{unit} [{bar}] {f'{used}/{mails}':<11}"
            f" {room}").rstrip()


def moment(date: float) -> str:
    """Return a time as people write it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(date))


# ---------------------------------------------------------------------------
# 9. Configuration file
#
# YAML, as much of it as such files hold, or the assignments of an old .conf;
# then -o; then the checks of the Settings table.
# ---------------------------------------------------------------------------


class Config(NamedTuple):
    """What the configuration says, before it is checked."""

    path: str | None
    values: dict[str, Any]
    places: dict[str, str]  # of a setting: its file and line


class MissingFile(ConfigError):
    """No configuration file was found."""


def read_config(path: str | None) -> Config:
    """Read a configuration file, the first that there is if path is None."""
    names = map(os.path.expanduser, CONFIG_FILES)
    path = path or next(filter(os.path.exists, names), None)
    if path is None:
        raise MissingFile("no configuration file found; looked for "
                          + ", ".join(CONFIG_FILES))
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except FileNotFoundError:
        raise MissingFile(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    parse = read_conf if path.endswith(".conf") else read_yaml
    values, lines = parse(text, path)
    if "limited_netword" in values:  # as the original once spelt it
        values.setdefault("limited_networks", values.pop("limited_netword"))
        lines.setdefault("limited_networks", lines.get("limited_netword", 0))
    places = {name: f"{path}:{line}" for name, line in lines.items() if line}
    known = default_values()
    for name in map(str, values):  # old files carry old names: only warn
        if name not in known and name != "config_file":
            close = difflib.get_close_matches(name, known, 1)
            log.warning("%s: %s: no such setting%s", places.get(name, path),
                        name, f"; is {close[0]} meant?" if close else "")
    return Config(path, values, places)


def read_yaml(text: str, path: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Read settings from YAML, and the line of each.

    What our reader refuses is read with PyYAML, if that is installed.
    """
    try:
        values, lines = parse_yaml(text)
    except YamlError as refused:
        try:
            import yaml
            values = yaml.safe_load(text)
        except Exception:  # our reader's message names the line just as well
            raise ConfigError(f"{path}:{refused.line}: {refused}") from None
        lines = {key: number for number, line in enumerate(
            text.splitlines(), 1) for key in re.findall(r"^(\w+) *:", line)}
    if not isinstance(values, (dict, type(None))):
        raise ConfigError(f"{path}: found {show(values)},"
                          " expected lines NAME: VALUE")
    return values or {}, lines


def read_conf(text: str, path: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Read the assignments of an old .conf, which is Python; run nothing."""
    log.warning("%s: this format is obsolete; write YAML", path)
    try:
        body: list[Any] = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None) or 1
        raise ConfigError(f"{path}:{line}: not Python: {error}") from None
    known: dict[str, Any] = {"SQLITE_DB": 0, "MYSQL_DB": 1, "PGSQL_DB": 2}
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for node in body:
        try:
            [target] = node.targets
            values[target.id] = evaluate(node.value, known | values)
            lines[target.id] = node.lineno
        except Exception:  # it may be any statement of Python
            log.warning("%s:%d: skipped: it is not NAME = VALUE: %s",
                        path, node.lineno,
                        text.split("\n")[node.lineno - 1].strip()[:60])
    return values, lines


ARITHMETIC: Mapping[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv,
    ast.USub: operator.neg,
}


def evaluate(node: Any, known: Mapping[str, Any]) -> Any:
    """Return the value of a literal, a known name, or arithmetic, or raise."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return known[node.id]
    if isinstance(node, ast.Dict):
        return {evaluate(key, known): evaluate(value, known)
                for key, value in zip(node.keys, node.values)}
    parts = [evaluate(part, known) for part in ast.iter_child_nodes(node)
             if isinstance(part, ast.expr)]
    if isinstance(node, (ast.List, ast.Tuple)):
        return parts if isinstance(node, ast.List) else tuple(parts)
    for part in parts:  # text times a number could fill the memory
        if not isinstance(part, (int, float)) or abs(part) >= 2**63:
            raise ValueError
    return ARITHMETIC[type(node.op)](*parts)


def override(config: Config, text: str) -> None:
    """Apply -o NAME=VALUE to a configuration; the value is YAML."""
    name, equals, value = text.partition("=")
    top = name.split(".")[0]
    defaults = default_values()
    if not equals or top not in defaults:
        raise ConfigError(f"-o {text}: expected NAME=VALUE"
                          " with the name of a setting")
    try:
        parsed, _ = parse_yaml(value)
    except YamlError as error:
        raise ConfigError(f"-o {text}: {error}") from None
    if config.values.get(top) is None:
        config.values[top] = defaults[top]
    mapping, key = descend(config.values, name)
    if mapping is config.values and key != top:
        raise ConfigError(f"-o {text}: {top} holds no names")
    mapping[key] = parsed
    config.places[top] = f"-o {text}"


def descend(values: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
    """Return the mapping and the key in it that a dotted name means."""
    head, _, rest = name.partition(".")
    if name in values or not isinstance(values.get(head), dict):
        return values, name
    return descend(values[head], rest)


def default_values() -> dict[str, Any]:
    """Return all settings' defaults, as a file would have them."""
    return {one.name: copy.copy(one.metadata["default"])
            for one in fields(Settings)}


def check_settings(config: Config) -> Settings:
    """Return the settings, or raise what says which one is wrong."""
    values = {}
    for one in fields(Settings):
        value, check = config.values.get(one.name), one.metadata["check"]
        if value is None:
            continue  # left out or left empty: the default holds
        try:
            values[one.name] = check(value)
        except (OverflowError, TypeError, ValueError):
            raise one.metadata["error"](
                f"{config.places.get(one.name, config.path)}: {one.name}:"
                f" found {show(value)}, expected {check.__doc__}") from None
    return Settings(**values)


def show(value: object) -> str:
    """Return a value as a message shows it."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python refuses to write out so long a number
        return "a huge number"


YAML_DEPTH = 50  # levels of nesting
YAML_KEY = 1024  # characters in a key, PyYAML's own bound
YAML_WORDS = {"yes": True, "true": True, "on": True, "no": False,
              "false": False, "off": False, "null": None, "~": None}
YAML_FLOAT = re.compile(r"[-+]?[0-9]{1,15}\.[0-9]{0,15}")
YAML_INT = re.compile(r"[-+]?(?:(0[0-7]{0,20})|[1-9][0-9]{0,17})")
YAML_ODD = re.compile(r"""  # not simply text, at least to some readers
    (?! (?:[0-9]{1,4}:){7}[0-9]+$ )  # an IPv6 address is text to us
    [-+]? \.?[0-9][0-9_]* (?: :[0-9]{1,2} )*  # 1_0 08, and 1:30 is 90
          (?: \.[0-9_]* )? (?: [eE][-+]?[0-9]+ )?  # 1.5 1e5
  | [-+]? (?: 0[bx][0-9a-fA-F_]+ | \.(?i:inf|nan) )  # 0x1F .inf
  | [0-9]{4} - [0-9]{1,2} - [0-9]{1,2} (?: [Tt\ ].* )?  # 2024-12-31
  | << | =
""", re.VERBOSE)

# Control characters, half characters, line ends few would expect, and marks
# of where a document starts or ends; but one --- may come first.
YAML_BAD = re.compile(
    r"[^\t\n -~\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
    r"|[\u2028\u2029\ufeff]|^(?:---|\.\.\.)(?=[ \t\n])", re.MULTILINE)
YAML_START = re.compile(r"\A((?: *(?:#.*)?\n)*)---(?=(?: +#.*| *)\n)")
YAML_GAP = re.compile(r"(?: *(?:#.*)?\n)* *")  # to the next thing to read
YAML_EOL = re.compile(r"(?: *(?:#.*)?\n)+ *")  # the same, on a later line

# A text, quoted or words with spaces between them, and a key's colon.  A
# colon before a space ends a text; inside brackets, more characters do.
YAML_QUOTED = (r'"(?:[^"\\\n]|\\(?:["\\/nt]|x[0-9A-Fa-f]{2}'
               r'|u(?![Dd][89A-Fa-f])[0-9A-Fa-f]{4}))*"'
               r"|'(?:[^'\n]|'')*'(?!')")
YAML_ESCAPE = re.compile(r"\\(?:x(..)|u(....)|(.))")
YAML_FIRST = r"(?![][{},#&*!|>'\"%@`]|[-?][ \t\n])"
YAML_WORD = r"(?:[^ \t\n:]|:(?![ \t\n]))+"
FLOW_WORD = r"(?:[^][{},? \t\n:]|:(?![][{},? \t\n]))+"
YAML_TEXT = re.compile(rf"({YAML_QUOTED}|{YAML_FIRST}{YAML_WORD}"
                       rf"(?: +(?!\#){YAML_WORD})*)( *:(?=[ \t\n]))?")
FLOW_TEXT = re.compile(rf"({YAML_QUOTED}|(?!:){YAML_FIRST}{FLOW_WORD}"
                       rf"(?: +(?!\#){FLOW_WORD})*)( *:)?")


class YamlError(Exception):
    """Say what in a document cannot be read, and on which line."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


def parse_yaml(text: str) -> tuple[object, dict[str, int]]:
    """Return the document's value and the line of each top-level key."""
    reader = YamlReader(text)
    value = reader.read(YAML_TEXT, nest=True) if reader.column() >= 0 else None
    if reader.column() >= 0:
        reader.refuse("wrong indentation, or several lines of text:")
    return value, reader.lines


class YamlReader:
    """Read a document; each method goes on from the position reached."""

    def __init__(self, text: str) -> None:
        """Check the characters, blank out --- and find the start."""
        text = text.removeprefix("\ufeff").replace("\r\n", "\n")
        self.text = YAML_START.sub(r"\1   ", text.rstrip("\n") + "\n")
        self.pos, self.line, self.depth = 0, 1, 0
        self.lines: dict[str, int] = {}  # of the top-level keys
        bad = YAML_BAD.search(self.text)
        if bad:
            line = self.text.count("\n", 0, bad.start()) + 1
            raise YamlError(f"{ascii(bad[0])} is not allowed here", line)
        self.skip(YAML_GAP)

    def skip(self, gap: re.Pattern[str]) -> None:
        """Go over spaces, comments and ends of lines."""
        found = gap.match(self.text, self.pos)
        if not found:
            self.refuse("cannot read this (no quotes?):")
        self.line += found[0].count("\n")
        self.pos = found.end()

    def column(self) -> int:
        """Tell the column reached; the end of the text is left of all."""
        start = self.text.rfind("\n", 0, self.pos) + 1
        return self.pos - start if self.pos < len(self.text) else -1

    def at(self, *signs: str) -> bool:
        """Tell whether one of the signs comes next."""
        return self.text.startswith(signs, self.pos)

    def at_dash(self) -> bool:
        """Tell whether a dash comes next that starts an item."""
        return self.at("- ", "-\t", "-\n")

    def read(self, like: re.Pattern[str], nest: bool = False) -> Any:
        """Read a value and, if it may nest, all lines that belong to it."""
        self.depth += 1
        if self.depth > YAML_DEPTH:
            self.refuse(f"more than {YAML_DEPTH} levels of nesting:")
        text = like.match(self.text, self.pos)
        block = nest and bool(self.at_dash() or text and text[2])
        if block:
            value = self.read_block()
        elif self.at("[", "{"):
            value = self.read_flow()
        elif text and not text[2]:
            value = self.read_text(text[1])
            self.pos = text.end()
        else:
            self.refuse("put quotes around")
        if like is YAML_TEXT and not block:
            self.skip(YAML_EOL)
        self.depth -= 1
        return value

    def read_block(self) -> Any:
        """Read the lines that start with a dash, or a key, in this column."""
        pairs: list[tuple[Any, Any]] = []  # a dash is a key of None
        column, dash = self.column(), self.at_dash()
        while self.column() == column and self.at_dash() == dash:
            key = None if dash else self.read_key(YAML_TEXT)
            self.pos += 1  # over the dash or colon
            line, value = self.line, None
            self.skip(YAML_GAP)
            least = column if self.at_dash() and not dash else column + 1
            if self.line == line:
                value = self.read(YAML_TEXT, nest=dash)
            elif self.column() >= least:
                value = self.read(YAML_TEXT, nest=True)
            pairs.append((key, value))
        return [value for _, value in pairs] if dash else dict(pairs)

    def read_flow(self) -> Any:
        """Read [a, b] or {a: b, c: d}, on one line or more."""
        pairs: list[tuple[Any, Any]] = []  # in [a, b], the keys are None
        close, key, more = "]" if self.at("[") else "}", None, True
        while more:
            self.pos += 1  # over the bracket or comma
            self.skip(YAML_GAP)
            if self.at(close):
                break
            if close == "}":
                key = self.read_key(FLOW_TEXT)
                self.pos += 1
                self.skip(YAML_GAP)
            empty = close == "}" and self.at(",", "}")
            pairs.append((key, None if empty else self.read(FLOW_TEXT)))
            self.skip(YAML_GAP)
            more = self.at(",")
        if not self.at(close):
            self.refuse(f"no , or {close} before")
        self.pos += 1
        return [value for _, value in pairs] if close == "]" else dict(pairs)

    def read_key(self, like: re.Pattern[str]) -> Any:
        """Read a key, up to its colon."""
        text = like.match(self.text, self.pos)
        if not text or not text[2] or len(text[0]) > YAML_KEY + 1:
            self.refuse("not `key: value` (no quotes?):")
        if text[1].endswith(":") and not text[1].endswith("::"):
            self.refuse("put quotes around")  # as in `- fe80::`
        key = self.read_text(text[1])
        if self.depth == 1:
            self.lines[str(key)] = self.line
        self.pos = text.end() - 1
        return key

    def read_text(self, text: str) -> Any:
        """Turn a text, quoted or not, into its value."""
        if text[0] == "'":
            return text[1:-1].replace("''", "'")
        if text[0] == '"':
            return YAML_ESCAPE.sub(lambda found: (
                chr(int(found[1] or found[2], 16)) if not found[3] else
                {"n": "\n", "t": "\t"}.get(found[3], found[3])), text[1:-1])
        word = text.lower()
        if word in YAML_WORDS and text in (word, word.title(), word.upper()):
            return YAML_WORDS[word]
        number = YAML_INT.fullmatch(text)
        if number:
            return int(text, 8 if number[1] else 10)
        if YAML_FLOAT.fullmatch(text):
            return float(text)
        if YAML_ODD.fullmatch(text):
            self.refuse("put quotes around")
        return text

    def refuse(self, why: str) -> NoReturn:
        """Refuse what stands here, for the reason given or a better one."""
        rest = self.text[self.pos:self.pos + 60].split("\n")[0]
        if self.at("\t"):
            why = "write spaces instead of a tab:"
        elif self.at("'", '"') and not YAML_TEXT.match(self.text, self.pos):
            why = "close the quotes on the same line, write \\ as \\\\:"
        raise YamlError(f"{why} {rest or 'the end'}",
                        min(self.line, self.text.count("\n")))


# ---------------------------------------------------------------------------
# 10. Process
#
# What root does before it stops being root, the pidfile, signals, systemd.
# ---------------------------------------------------------------------------

# What a reload cannot change, since it was used up at the start.
FIXED = ("user", "group", "pidfile", "SOCKET", "socket_permission", "backend",
         "sqlite_config", "mysql_config", "pgsql_config", "db_timeout")


FOR_POSTFIX = 0o711  # a folder's mode until group postfix has it: then 0750


class Owner(NamedTuple):
    """Whom root becomes."""

    name: str
    uid: int
    gid: int
    home: str


def find_owner(settings: Settings, standalone: str | None) -> Owner | None:
    """Return whom root becomes, None to stay; raise UnknownUser."""
    if standalone or os.geteuid() != 0:
        return None
    try:
        user = pwd.getpwnam(settings.user)
        group = grp.getgrnam(settings.group)
    except KeyError:
        raise UnknownUser(
            f"no user {settings.user} or no group {settings.group}; make them:"
            f" adduser --system --group --home /run/{PROGRAM}"
            f" --no-create-home {settings.user}") from None
    return Owner(settings.user, user.pw_uid, group.gr_gid, user.pw_dir)


def become(owner: Owner | None) -> None:
    """Give up root's rights for good, and check that they are gone."""
    os.umask(0o077)
    if owner is None:
        return
    os.initgroups(owner.name, owner.gid)
    os.setgid(owner.gid)
    os.setuid(owner.uid)
    if (os.getresuid() != (owner.uid,) * 3
            or os.getresgid() != (owner.gid,) * 3):
        raise PolicydError("could not give up the rights of root")
    os.environ["HOME"] = owner.home  # where database drivers look for files


def folders(settings: Settings) -> Mapping[str, int]:
    """Return the folders that a start needs, and the modes to make them."""
    modes = {settings.pidfile: 0o755}
    if settings.backend == 0:
        modes[settings.sqlite_config["database"]] = 0o750
    if isinstance(settings.SOCKET, str):
        modes[settings.SOCKET] = FOR_POSTFIX
    return {os.path.dirname(os.path.abspath(path)): mode
            for path, mode in modes.items()}


def make_folders(settings: Settings, owner: Owner | None) -> None:
    """Make the folders that are missing, and hand them to their owner."""
    os.umask(0o022)
    for folder, mode in folders(settings).items():
        if os.path.isdir(folder):
            continue
        os.makedirs(folder, mode)
        if owner is not None:
            os.chown(folder, owner.uid, owner.gid, follow_symlinks=False)
        if mode == FOR_POSTFIX:
            with contextlib.suppress(KeyError, PermissionError):
                postfix = grp.getgrnam("postfix").gr_gid
                os.chown(folder, -1, postfix, follow_symlinks=False)
                os.chmod(folder, 0o750)


def is_open(settings: Settings) -> bool:
    """Say whether any account of this host may connect."""
    if not isinstance(settings.SOCKET, str):
        return True
    path, way = os.path.abspath(settings.SOCKET), 0o1
    while way and path != "/":
        path = os.path.dirname(path)
        way = os.path.isdir(path) and os.stat(path).st_mode & 0o1
    return bool(way and settings.socket_permission & 0o2)


@contextlib.contextmanager
def hold_pidfile(path: str, owner: Owner | None) -> Iterator[None]:
    """Write the pidfile and hold it until the end; raise AlreadyRunning.

    A file that nobody holds is stale, whatever process has that id today.
    """
    if path == os.devnull:
        yield  # there is to be no pidfile
        return
    with hold_lock(path):
        with open(path, "w", opener=lambda name, flags: os.open(
                name, flags | os.O_NOFOLLOW, 0o644)) as file:
            file.write(f"{os.getpid()}\n")
            if owner is not None:
                os.fchown(file.fileno(), owner.uid, owner.gid)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)


def serve(settings: Settings, owner: Owner | None,
          announce: Callable[[Any], None],
          read: Callable[[], Settings]) -> None:
    """Run the daemon until a signal ends it.

    announce is told the address once clients can come; read returns the
    settings anew for a reload.
    """
    make_folders(settings, owner)
    warn_unaddressed(settings)
    alarm = Alarm()
    ledger = open_ledger(settings)
    service = Service(settings, ledger, alarm=alarm.refused)
    ended: list[int] = []  # by which signals
    with catch_signals() as signals, contextlib.closing(ledger), \
            PolicyServer(service) as server, \
            hold_pidfile(settings.pidfile, owner):
        if owner is not None and server.path is not None:
            os.chown(server.path, owner.uid, owner.gid, follow_symlinks=False)
        become(owner)
        keep_to_one_processor()
        server.most = max(16, min(server.most, raise_file_limit() - 64))
        service.clean()  # opens the ledger, and says so if it cannot
        for number in signal.SIGINT, signal.SIGTERM, signal.SIGUSR1:
            signal.signal(number, lambda number, _: ended.append(number))
        threading.stack_size(512 * 1024)  # address space, not memory
        threading.Thread(target=server.serve_forever, args=(0.1,),
                         daemon=True).start()
        threading.Thread(target=alarm.run, daemon=True).start()
        announce(server.server_address)
        notify("READY=1")
        obey(signals, ended, service, read)
        notify("STOPPING=1")
        server.stop(2 * settings.db_timeout + 2)
        service.tally.close()


def catch_signals() -> socket.socket:
    """Return a socket from which signals' numbers come.

    Whatever thread the kernel gives a signal to, this wakes the main one.
    """
    signals, sender = socket.socketpair()
    signals.settimeout(CLEAN_PAUSE)
    sender.setblocking(False)
    signal.set_wakeup_fd(  # open until the end; full: it wakes all the same
        sender.detach(), warn_on_full_buffer=False)
    for number in signal.SIGHUP, signal.SIGUSR2:
        signal.signal(number, lambda *_: None)
    return signals


def keep_to_one_processor() -> None:
    """Keep all threads on one processor, where the system lets us.

    Python runs one of them at a time; to hand over to a thread on another
    processor takes longer than most of them work: a third to a half of the
    speed at 16 connections.  Many daemons on a host take different ones.
    """
    with contextlib.suppress(AttributeError, OSError):  # Linux has it
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {allowed[os.getpid() % len(allowed)]})


def raise_file_limit() -> int:
    """Raise the soft limit on open files to the hard one; return it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def obey(signals: socket.socket, ended: Sequence[int], service: Service,
         read: Callable[[], Settings]) -> None:
    """Reload at HUP, sum up at USR2 until ended; clean meanwhile."""
    while not ended:
        service.tally.publish()
        try:
            numbers = signals.recv(4096)  # a storm of them is one
        except socket.timeout:
            service.clean()
            continue
        if signal.SIGUSR2 in numbers:
            service.tally.publish(asked=True)
        if signal.SIGHUP in numbers:
            now = time.monotonic_ns() // 1000
            notify(f"RELOADING=1\nMONOTONIC_USEC={now}")
            reload(service, read)
            notify("READY=1")


def reload(service: Service, read: Callable[[], Settings]) -> None:
    """Replace the settings; a broken file leaves the old ones in force."""
    try:
        new = read()
    except PolicydError as error:
        log.error("not reloaded, the old settings stay: %s", error)
        return
    for name in FIXED:
        if getattr(new, name) != getattr(service.settings, name):
            log.warning("%s: a change takes effect at the next start", name)
    warn_unaddressed(new)
    service.reload(new)
    log.log(NOTICE, "configuration reloaded")


def notify(state: str) -> None:
    """Tell systemd a state (sd_notify(3)), where there is a systemd."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address.startswith("@"):  # the abstract namespace
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as message, \
            contextlib.suppress(OSError):
        message.sendto(state.encode(), address)


# ---------------------------------------------------------------------------
# 11. Command line
#
# The options, what each of them does, and the exit status.
# ---------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    sys.stdout = sys.stdout or io.StringIO()  # None: the caller closed it
    logging.basicConfig(format="%(levelname)s%(message)s", level=NOTICE)
    logging.raiseExceptions = False  # a full disk under the log stops nothing
    journal = "JOURNAL_STREAM" in os.environ and os.environ[
        "JOURNAL_STREAM"] == "{0.st_dev}:{0.st_ino}".format(os.fstat(2))
    for level, priority, label in (  # as sd-daemon(3) has it
            (logging.INFO, "<6>", ""), (NOTICE, "<5>", ""),
            (logging.WARNING, "<4>", "warning: "),
            (logging.ERROR, "<3>", "error: ")):
        logging.addLevelName(level, priority * journal + label)
    for stream in (sys.stdout, sys.stderr):  # whatever the locale can show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        options = parse_options(argv)
        options.command(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as head(1) does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (PolicydError, OSError, RuntimeError) as error:  # no more threads
        log.error("%s", error)
        return getattr(error, "exit_code", PolicydError.exit_code)
    return 0


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; a usage error ends with exit status 2."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Limit how many mails users of Postfix may"
        " send.  Without an option, run the daemon in the foreground.")
    parser.set_defaults(command=run)
    one_of = parser.add_mutually_exclusive_group().add_argument
    one_of("--clean", dest="command", action="store_const", const=clean,
           help="clean old records from the database, and send the report")
    one_of("--check", dest="command", action="store_const", const=check_start,
           help="check the configuration, the folders and the database")
    one_of("--prometheus", dest="command", action="store_const",
           const=show_prometheus, help="show who has used how much, and what"
           " the daemon has counted, for node_exporter")
    one_of("--get-config", metavar="PARAMETER_NAME",
           help="return the value of a config parameter")
    one_of("--status", metavar="ID", nargs="?", const="",
           help="show who has used how much, or all about one identity")
    one_of("--reset", metavar="ID", help="forget what an identity has used")
    also = parser.add_argument
    also("--json", action="store_true", help="show --status as JSON")
    also("--file", "-f", metavar="CONFIG_PATH", help="path to a config file")
    also("-o", dest="overrides", metavar="NAME=VALUE", action="append",
         default=[], help="override a setting; may be repeated")
    also("--standalone", metavar="DIR", type=os.path.abspath,
         help="run from a directory, without a configuration file and as"
         " whoever calls: socket, database and pidfile are in DIR")
    also("--version", action="version", version=f"{PROGRAM} {VERSION}")
    options = parser.parse_args(argv)
    for name, command in (("get_config", get_config), ("reset", reset),
                          ("status", show_status)):
        if getattr(options, name) is not None:
            options.command = command
    if options.json and options.command is run:
        options.command, options.status = show_status, ""
    if options.json and options.command is not show_status:
        parser.error("--json goes with --status")
    return options


def load_settings(options: argparse.Namespace) -> Settings:
    """Return the settings of a command, and log as they say."""
    config = configure(options)
    options.file = options.file or config.path  # a reload has another $HOME
    settings = check_settings(config)
    if options.command in (run, check_start) and config.path is not None \
            and "count_mode" not in config.values:
        log.warning("%s: count_mode is not set: 1 holds, mails count at DATA;"
                    " the original 1.2.0 counted at RCPT (0)", config.path)
    log.setLevel(logging.INFO if settings.debug else NOTICE)
    return settings


def configure(options: argparse.Namespace) -> Config:
    """Return the configuration: the file, --standalone, then each -o."""
    config = Config(None, {}, {})
    try:
        if options.file is not None or not options.standalone:
            config = read_config(options.file)
    except MissingFile as error:
        if options.get_config is None:
            raise
        log.warning("%s", error)
    if options.standalone:
        config.values.update(
            SOCKET=os.path.join(options.standalone, "policy"), backend=0,
            pidfile=os.path.join(options.standalone, f"{PROGRAM}.pid"),
            sqlite_config={
                "database": os.path.join(options.standalone, "db.sqlite3")})
    for text in options.overrides:
        override(config, text)
    return config


def run(options: argparse.Namespace) -> None:
    """Run the daemon."""
    settings = load_settings(options)

    def announce(address: Any) -> None:
        log.log(NOTICE, "listening on %s", format_address(address))
        if options.standalone:
            print(f"Listening on {format_address(address)}; for main.cf:")
            print(main_cf(settings.count_mode, address), flush=True)

    serve(settings, find_owner(settings, options.standalone), announce,
          lambda: load_settings(options))


def clean(options: argparse.Namespace) -> None:
    """Delete what no limit can see any more, and send the report."""
    settings, ledger = enter(options)
    after: str | None = ""
    deleted = 0
    try:
        while after is not None:
            after, some = ledger.clean(
                after, int(time.time()), 2 * settings.longest_window)
            deleted += some
            time.sleep(0.005)  # the daemon's turn
    except LedgerError as error:
        raise CleanError(str(error)) from error
    finally:
        ledger.close()
    print(f"{deleted} records deleted")
    if settings.report:
        send_reports(ledger, settings)


def enter(options: argparse.Namespace,
          make: bool = True) -> tuple[Settings, Ledger]:
    """Make the folders if so told, give up root's rights, open the ledger."""
    settings = load_settings(options)
    owner = find_owner(settings, options.standalone)
    if make:
        make_folders(settings, owner)
    ledger = open_ledger(settings)
    become(owner)
    return settings, ledger


def show_status(options: argparse.Namespace) -> None:
    """Show who has used how much."""
    settings, ledger = enter(options, make=False)
    now = int(time.time())
    identity = fold(options.status) if options.status else None
    standings = sorted(ledger.survey(settings, now, identity),
                       key=fullness, reverse=True)
    if options.json:
        print(json.dumps({"time": now, "identities": [
            {**one._asdict(), "limits": [w._asdict() for w in one.limits]}
            for one in standings]}))
        return
    colour = (sys.stdout.isatty() and not os.environ.get("NO_COLOR")
              and os.environ.get("TERM") != "dumb")
    for line in (show_most(standings, colour) if identity is None else
                 show_one(standings[0], colour)):
        print(line)


def show_prometheus(options: argparse.Namespace) -> None:
    """Show it for node_exporter's textfile collector, which reads UTF-8."""
    settings, ledger = enter(options, make=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    for line in show_metrics(settings, ledger):
        print(line)


def reset(options: argparse.Namespace) -> None:
    """Forget what an identity has used, and say how much that was."""
    _, ledger = enter(options)
    identity = fold(options.reset)
    print(f"{printable(identity)}: {ledger.forget(identity)} recorded mails"
          " forgotten")


def check_start(options: argparse.Namespace) -> None:
    """Say whether a start would work, or what is wrong; change nothing."""
    settings = load_settings(options)
    owner = find_owner(settings, options.standalone)
    needed = folders(settings)
    makeable = [name for name in needed  # as long as it is root
                if not os.path.isdir(name) and can_write(name)]
    check_socket(settings.SOCKET)
    if is_open(settings):
        log.warning("any account of this host may connect to SOCKET, and use"
                    " up anybody's limits")
    backend = BACKENDS[settings.backend](settings)
    become(owner)
    unusable = [name for name in needed
                if name not in makeable and not can_write(name)]
    if os.path.isdir(settings.pidfile):
        unusable.append(settings.pidfile)
    if unusable:
        raise PolicydError(f"{unusable[0]}: cannot be written")
    print(backend.probe(), "OK", sep="\n")


def can_write(folder: str) -> bool:
    """Say whether this user could make files in a folder, or the folder."""
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


def check_socket(address: str | tuple[str, int]) -> None:
    """Raise OSError if a socket could not be bound to an address."""
    if not isinstance(address, str):
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        socket.create_server((address[0], 0), family=family).close()
    elif len(os.fsencode(address)) > 107:  # unix(7), sun_path
        raise OSError(errno.ENAMETOOLONG, "too long a path", address)
    elif (os.path.lexists(address)
          and not stat.S_ISSOCK(os.lstat(address).st_mode)):
        raise FileExistsError(errno.EEXIST, "is not a socket", address)


def get_config(options: argparse.Namespace) -> None:
    """Print the value of a setting; dotted names go into mappings."""
    config, name = configure(options), options.get_config
    mapping, key = descend({**default_values(), **config.values,
                            "config_file": config.path}, name)
    if key not in mapping:
        raise UnknownSetting(f"{name} not found")
    value = mapping[key]
    if name == "SOCKET" and isinstance(value, list):
        value = tuple(value)  # as the original prints it
    print(value, end="")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: no traceback
    sys.exit(main())
