#!/usr/bin/python3
"""policyd-rate-limit: limit how many mails a user of Postfix may send.

Postfix asks this daemon about each mail (postconf(5), check_policy_service;
SMTPD_POLICY_README).  It counts the mail for a SASL user, a sender or a
client address, in sliding windows "at most N mails in any S seconds", and
answers what Postfix is to do.

The path of one request:

    bytes -> Request -> claims -> [ usage -> verdict -> charge ] -> action
             parse      policy        one ledger transaction       reply

    1 Vocabulary   2 Settings   3 Protocol   4 Policy   5 Wording
    6 Database   7 Schema   8 Ledger   9 Batches and outages   10 Service
    11 Server   12 Upkeep   13 Reports and alerts   14 Status
    15 Configuration file   16 Process   17 Command line

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
import bisect
import contextlib
import copy
import difflib
import errno
import fcntl
import functools
import glob
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
import pathlib
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
import string
import struct
import subprocess
import sys
import threading
import time
import unicodedata
import urllib.parse
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from email.message import EmailMessage
from email.utils import format_datetime, localtime, make_msgid
from typing import Any, NamedTuple, NoReturn, Optional, TypeVar, Union

T = TypeVar("T")

# ---------------------------------------------------------------------------
# 1. Vocabulary
#
# The words that all sections share: constants, values, errors.
# ---------------------------------------------------------------------------

PROGRAM = "policyd-rate-limit"
VERSION = "2.0.0"
MAX_REQUEST = 32768  # bytes; the largest that Postfix sent in tests is 6 kB
MAX_ATTRIBUTES = 1000  # Postfix 3.12 sends 32
MAX_NUMBER = 2**31 - 1  # what a column of type int holds
MAX_TOLD = 100  # characters of a value in the log; a queue id has 20
MAX_IDENTITY = 190  # characters; of 4 bytes each they fit MySQL's index
CLOCK_SKEW = 600  # seconds that the clocks of two hosts may differ
NOTICE = 25  # the log level of what is said even with debug: False
SELDOM = {"seldom": True}  # marks a log record that a stranger can provoke
log = logging.getLogger(PROGRAM)


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

    def __init__(self, message: str, undone: bool = False) -> None:
        super().__init__(message)
        self.undone = undone  # it answers, and for certain wrote nothing


class BadRequest(PolicydError):
    """What came is not a request of the policy protocol."""


class Seldom(logging.Filter):
    """Lets each message that is marked SELDOM through once a minute."""

    said: dict[str, float] = {}  # when each was let through

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether to let a record through."""
        seldom = hasattr(record, "seldom")
        if seldom and 0 <= record.created - self.said.get(record.msg, 0) < 60:
            return False
        if seldom:
            self.said[record.msg] = record.created
        return True


log.addFilter(Seldom())


def fold(identity: str) -> str:
    """Return the one spelling under which an identity is counted.

    Names are compared without regard to case (RFC 8265, 3.3), addresses by
    value.  A name too long for a database's key ends in its hash instead.
    """
    folded = identity.lower()
    if not folded.isascii() and len(folded) <= 512:  # it takes the square
        folded = unicodedata.normalize("NFC", folded)
    folded = folded.rstrip() or "<>"
    if "@" in folded:  # mail for example.org. goes to example.org
        return shorten(folded.rstrip(". "))
    return shorten(str(parse_address(folded) or folded))


def shorten(key: str) -> str:
    """Return a key as it fits into a database, too long a one with its hash.

    The domain of an address stays, or as many of its parents as fit.
    """
    if len(key) <= MAX_IDENTITY:
        return key
    _, at, domain = key.rpartition("@")
    parent = domain  # label by label this would take the square, too
    if len(domain) >= 100:
        parent = domain[-100:].partition(".")[2]
    end = "#" + hashlib.sha256(key.encode()).hexdigest()
    if parent:
        end += at + (domain if parent == domain else "." + parent)
    return key[:MAX_IDENTITY - len(end)] + end


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

ATTRIBUTES = (  # SMTPD_POLICY_README
    "protocol_state", "protocol_name", "helo_name", "queue_id", "sender",
    "recipient", "recipient_count", "client_address", "client_name",
    "reverse_client_name", "instance", "sasl_method", "sasl_username",
    "sasl_sender", "size", "ccert_subject", "ccert_issuer",
    "ccert_fingerprint", "ccert_pubkey_fingerprint", "encryption_protocol",
    "encryption_cipher", "encryption_keysize", "etrn_domain", "stress",
    "client_port", "policy_context", "server_address", "server_port",
    "compatibility_level", "mail_version", "tls_sni")
DERIVED = {  # what is made of such an attribute
    "sasl_domain": "sasl_username", "sender_domain": "sender",
    "recipient_domain": "recipient", "client_network": "client_address",
    "server": ""}
ADDRESSES = (  # what may mean a host's address: no client chooses these
    ("client_address",), ("client_network",), ("server_address",),
    ("sasl_username",))
FACTS = ("identity", "used", "mails", "seconds", "window", "room_at",
         "room_in")  # what fail_action may name
ANY_WINDOW = range(1, MAX_NUMBER + 1)
ACTIONS = re.compile(  # of access(5), and restrictions of postconf(5)
    r"(?i:ok|[45]\d\d|dunno|defer|defer_if_(?:permit|reject)|bcc|discard"
    r"|filter|hold|info|prepend|redirect|sleep|warn|warn_if_reject"
    r"|(?:permit|reject)(?:_\w+)?|check_\w+)")
Limits = tuple[Limit, ...]
Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]


class Wrong(ValueError):
    """Says why, and where: for each place the names that lead there."""


def show(value: object) -> str:
    """Return a value as a message shows it."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python refuses to write out so long a number
        return "a huge number"


def check_entry(check: Callable[[Any], T], value: object, *names: str) -> T:
    """Check the value that the names lead to, or raise Wrong."""
    try:
        return check(value)
    except Wrong as error:
        why, *entries = error.args
    except (KeyError, OverflowError, TypeError, ValueError):
        why, entries = f"found {show(value)}, expected {check.__doc__}", [()]
    raise Wrong(f"{names[-1]}: {why}", *((*names, *more) for more in entries))


def as_whole(value: object, least: int = 0, most: float = math.inf) -> int:
    """Check a whole number."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not least <= value <= most:
        raise ValueError
    return value


def as_list(value: object) -> Sequence[Any]:
    """Check a list."""
    if not isinstance(value, (list, tuple)):
        raise TypeError
    return value


def as_mapping(value: object) -> dict[Any, Any]:
    """names with values"""
    if not isinstance(value, dict):
        raise TypeError
    return value


def as_bool(value: object) -> bool:
    """True or False"""
    if value not in (0, 1):  # which equal False and True
        raise ValueError
    return bool(value)


def as_text(value: object) -> str:
    """text (in quotes, if it looks like a number)"""
    if not isinstance(value, str) or not value or "\0" in value:
        raise TypeError
    return value


def as_texts(value: object) -> tuple[str, ...]:
    """text or a list of texts"""
    texts = [value] if isinstance(value, str) else as_list(value or ())
    return tuple(map(as_text, texts)) if value else ()


def as_addresses(value: object) -> tuple[str, ...]:
    """text or a list of texts"""
    listed = ",".join(as_texts(value)).split(",")
    return tuple(filter(None, map(str.strip, listed)))


def as_action(value: object) -> str:
    """an action of access(5), such as "dunno\""""
    text = str(value) if type(value) is int else as_text(value)  # 450
    if not text.isprintable():  # a newline ends the reply
        raise ValueError
    return as_text(text.strip())


def as_permission(value: object) -> int:
    """a file mode such as 0666"""
    mode = as_whole(int(value, 8) if isinstance(value, str) else value)
    if mode > 0o777:  # 666 is 01232
        meant = f"0{value}" if re.fullmatch("[1-7]..", str(value)) else "0666"
        raise Wrong(f"found {show(value)}, expected a file mode such as"
                    f" {meant}", ())
    return mode


def as_sqlite(value: object) -> dict[Any, Any]:
    """names with values, among them database, a path"""
    config = as_mapping(value)
    as_text(config.get("database"))
    return config


def as_limits(value: object) -> Limits:
    """a list of [mails, seconds], such as [[10, 60], [150, 86400]]"""
    return tuple(Limit(as_whole(mails), as_seconds(seconds))
                 for mails, seconds in map(as_list, as_list(value)))


class Patterns(NamedTuple):
    """Texts and networks by which a value is looked up."""

    texts: Mapping[str, Any]  # a name, "", "@example.org", "@.example.org"
    networks: tuple[tuple[Network, Any], ...] = ()  # the longest first

    def find(self, value: str, is_address: bool = True) -> Any:
        """Return the entry of the pattern that fits best, or None.

        That is the value itself, the longest network, @domain, or @. and it or
        the nearest above; for a value that is a domain, the same without @.
        A value that a client chose is no address, however it is spelt.
        """
        if not self.texts and not self.networks:
            return None
        host, _, bits = value.partition("/")  # it may be a network
        address = None if bits.strip("0123456789") else parse_address(host)
        if address and not is_address:
            return None  # a sender 127.0.0.1 is not this host
        if value in self.texts:
            return self.texts[value]
        for network, entry in self.networks if address else ():
            if address in network:
                return entry
        _, at, domain = value.rpartition("@")
        pattern = at + domain
        while pattern not in self.texts and domain:
            pattern = f"{at}.{domain}"
            domain = domain.partition(".")[2]
        return self.texts.get(pattern)


class Choice(NamedTuple):
    """The patterns of which one has to fit, and those that must not."""

    wanted: Patterns | None  # None: all that is not unwanted
    unwanted: Patterns

    def fits(self, value: str, is_address: bool = True) -> bool:
        """Say whether a value is chosen."""
        if self.unwanted.find(value, is_address):
            return False
        return (self.wanted is None
                or bool(self.wanted.find(value, is_address)))


@dataclass(frozen=True)
class Rule:
    """Limits for each key that mails are counted under."""

    by: tuple[str, ...] = ()  # attributes; none: as limit_by_... say
    name: str = ""  # the key's prefix; the first rule's keys have none
    when: tuple[tuple[str, Choice], ...] = ()
    count: str = ""  # as count_mode says; recipients, mails, bytes, or what
    limits: Limits = ()
    limits_by_id: Patterns = Patterns({})
    fail_action: str = ""
    dry_run: bool = False


def as_network(text: str) -> Network:
    """a network such as 10.0.0.0/8"""
    network = ipaddress.ip_network(text, strict=False)
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    bits = network.prefixlen - 96
    return ipaddress.ip_network((mapped, bits)) if mapped else network


def as_patterns(entries: Mapping[Any, Any]) -> Patterns:
    """Sort entries by the kind of their patterns."""
    texts: dict[str, Any] = {}
    networks: dict[Network, Any] = {}
    names: dict[object, str] = {}
    for key, entry in entries.items():
        if isinstance(key, (bool, type(None))):  # a user called yes
            raise Wrong(f"put quotes around {key}", (str(key),))
        name = str(key)
        pattern: Any = fold(name) if name else ""
        if re.fullmatch(r"[0-9a-f.:]+/[0-9.]+", pattern):
            pattern = as_network(pattern)
            networks[pattern] = entry
        else:
            texts[pattern] = entry
        other = names.setdefault(pattern, name)
        if other != name:
            raise Wrong(f"{name} and {other} are the same", (name,), (other,))
    return Patterns(texts, tuple(sorted(
        networks.items(), key=lambda item: -item[0].prefixlen)))


def as_choice(value: object) -> Choice:
    """a pattern or a list of patterns"""
    texts = value if isinstance(value, list) else [value]
    if not texts:
        raise ValueError
    unwanted = {str(text)[1:]: True for text in texts if str(text)[:1] == "!"}
    wanted = {text: True for text in texts if str(text)[:1] != "!"}
    return Choice(as_patterns(wanted) if wanted else None,
                  as_patterns(unwanted))


def as_limits_by_id(value: object) -> Patterns:
    """identities or patterns, each with a list of [mails, seconds]"""
    return as_patterns({key: check_entry(as_limits, limits, str(key))
                        for key, limits in as_mapping(value).items()})


def as_networks(value: object) -> Choice | None:
    """a list of networks such as [10.0.0.0/8, "!10.1.0.0/16", "::/0"]"""
    texts = []
    for text in map(as_text, as_list(value)):
        sign, bare = ("!", text[1:]) if text[0] == "!" else ("", text)
        texts.append(f"{sign}{ipaddress.ip_network(bare, strict=False)}")
    return as_choice(texts) if texts else None


def as_attribute(value: object) -> str:
    """an attribute that Postfix sends, such as sasl_username"""
    if value not in ATTRIBUTES and value not in DERIVED:
        raise ValueError
    return str(value)


def as_by(value: object) -> tuple[str, ...]:
    """an attribute that Postfix sends, or a list of them"""
    names = value if isinstance(value, list) else [value]
    if not names:
        raise ValueError
    return tuple(map(as_attribute, names))


def as_when(value: object) -> tuple[tuple[str, Choice], ...]:
    """attributes that Postfix sends, each with patterns"""
    return tuple((as_attribute(attribute), as_choice(patterns))
                 for attribute, patterns in as_mapping(value).items())


def as_counted(value: object) -> str:
    """recipients, mails, bytes, or an attribute that Postfix sends"""
    if value in ("recipients", "mails", "bytes"):
        return str(value)
    return as_attribute(value)


def as_name(value: object) -> str:
    """a name in lower case, without spaces and ="""
    name = as_text(value)
    if name != fold(name) or re.search(r"[\s=]", name):
        raise ValueError
    return name


def as_fail_action(value: object) -> str:
    """an action, in which $identity, $used, ... stand for what was found"""
    action = as_action(value)
    string.Template(action).substitute(dict.fromkeys(FACTS, ""))  # or raise
    return action


QUOTA: Mapping[str, Callable[[Any], Any]] = {
    "by": as_by, "name": as_name, "when": as_when, "count": as_counted,
    "limits": as_limits, "limits_by_id": as_limits_by_id,
    "fail_action": as_fail_action, "dry_run": as_bool}


def as_quotas(value: object) -> tuple[Rule, ...]:
    """a list of quotas, each with by and limits"""
    rules: dict[str, Rule] = {}
    for number, quota in enumerate(as_list(value)):
        parts = {}
        for name, item in as_mapping(quota).items():
            if name not in QUOTA:
                raise Wrong(f"{name}: no such entry", (str(number), str(name)))
            parts[name] = check_entry(QUOTA[name], item, str(number), name)
        if "by" not in parts or not {"limits", "limits_by_id"} & {*parts}:
            raise Wrong("a quota needs by and limits", (str(number),))
        rule = Rule(**{"name": "+".join(parts["by"]), **parts})
        if rules.setdefault(rule.name, rule) is not rule:
            raise Wrong(f"two are called {rule.name}", (str(number), "name"))
    return tuple(rules.values())


def as_socket(value: object) -> str | tuple[str, int]:
    """a path, or [address, port] such as ["127.0.0.1", 8552]"""
    if isinstance(value, str):
        if ":" in value.split("/")[0] or value.startswith("@"):
            raise ValueError  # inet:127.0.0.1:8552, unix:/path, @name
        return as_text(value)
    host, port = as_list(value)
    if ":" not in as_text(host):  # else bind() tells, with exit status 6
        ipaddress.ip_address(host)
    return host, as_whole(port, most=65535)


def as_smtp_server(value: object) -> tuple[str, int]:
    """["host", port] or a host"""
    given = [value] if isinstance(value, str) else as_list(value)
    host, port = given if len(given) != 1 else (*given, 25)
    return as_text(host), as_whole(int(port), most=65535)


def as_credentials(value: object) -> tuple[str, str] | None:
    """["user", "password"] or null"""
    if not value:
        return None
    user, password = as_list(value)
    return as_text(user), as_text(str(password))


def expect(expected: str, check: Callable[[Any], T]) -> Callable[[Any], T]:
    """Give a short check its docstring."""
    check.__doc__ = expected
    return check


as_seconds = expect("a number of seconds, 1 or more",  # 68 years: for ever
                    lambda value: min(as_whole(value, 1), MAX_NUMBER))
as_windows = expect("a list of seconds, such as [86400]",
                    lambda value: None if value is None else tuple(
                        map(as_seconds, as_list(value))))
as_backend = expect("0 (SQLite), 1 (MySQL) or 2 (PostgreSQL)",
                    lambda value: as_whole(value, most=2))
as_count_mode = expect(
    "auto, 0 (each RCPT), 1 (recipients at DATA) or 2 (mails at DATA)",
    lambda value: value if value == "auto" else as_whole(value, most=2))
as_text_or_none = expect("text, or null",
                         lambda value: as_text(value) if value else None)
as_subject = expect("text",
                    lambda value: as_text(value) if value != "" else "")


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
        {"database": "database", "user": "username", "password": "*****",
         "host": "localhost"}, as_mapping, "how to connect to PostgreSQL")
    db_timeout: int = setting(
        10, as_seconds, "seconds to wait for the database")
    limits: Limits = setting(
        [(10, 60), (150, 86400)], as_limits,
        "at most so many mails in so many seconds, for each identity")
    limits_by_id: Patterns = setting(
        {}, as_limits_by_id, "other limits for some identities; [] for none")
    sql_limits_by_id: str | None = setting(
        "", as_text_or_none, "a query for the limits of an identity")
    limit_by_sasl: bool = setting(
        True, as_bool, "the SASL user name is the identity")
    limit_by_sender: bool = setting(False, as_bool, "else the sender address")
    limit_by_ip: bool = setting(False, as_bool, "else the client address")
    limited_networks: Choice | None = setting(
        [], as_networks, "but only client addresses in these networks")
    quotas: tuple[Rule, ...] = setting(
        [], as_quotas, "further limits that hold at the same time")
    dry_run: bool = setting(
        False, as_bool, "count and log, but refuse nothing")
    count_mode: str | int = setting(
        "auto", as_count_mode, "what counts: auto the recipients where Postfix"
        " asks first, 0 each RCPT, 1 the recipients at DATA, 2 the mail")
    success_action: str = setting(
        "dunno", as_action, "the action for a mail within the limits")
    fail_action: str = setting(
        "defer_if_permit Rate limit reach, retry later", as_fail_action,
        "the action for a mail too many")
    db_error_action: str = setting(
        "dunno", as_action,
        "the action for a mail within the limits while the database is away")
    report: bool = setting(
        False, as_bool, "--clean mails a report of who hit a limit")
    report_from: str | None = setting(
        None, as_text_or_none, "the sender of reports")
    report_to: tuple[str, ...] = setting(
        None, as_addresses, "who gets reports: one address or a list")
    report_subject: str = setting(
        "policyd-rate-limit report", as_subject, "the subject of reports")
    report_limits: tuple[int, ...] | None = setting(
        None, as_windows,
        "the windows, in seconds, to report; null: 86400, or all without it")
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

    @functools.cached_property
    def rules(self) -> tuple[Rule, ...]:
        """Return the rule of the settings themselves, then the quotas."""
        first = Rule(limits=self.limits, limits_by_id=self.limits_by_id,
                     fail_action=self.fail_action, dry_run=self.dry_run)
        return (first, *(replace(
            quota, fail_action=quota.fail_action or self.fail_action,
            dry_run=quota.dry_run or self.dry_run) for quota in self.quotas))

    @property
    def windows(self) -> set[int]:
        """Return the windows of the file's limits, in seconds."""
        return {limit.seconds for rule in self.rules for limits in (
            rule.limits, *rule.limits_by_id.texts.values(),
            *dict(rule.limits_by_id.networks).values()) for limit in limits}

    @property
    def longest_window(self) -> int:
        """Return the longest of these."""
        return max(self.windows, default=86400)

    @property
    def noted_windows(self) -> Sequence[int]:
        """Return the windows whose refusals the report tells of."""
        if not self.report:
            return ()
        if self.report_limits is not None:
            return self.report_limits
        return [86400] if 86400 in self.windows else ANY_WINDOW


def doubts(settings: Settings) -> Iterator[tuple[bool, str]]:
    """Yield what has no effect, with True if that means: nothing counts."""
    named = bool(settings.limit_by_sasl or settings.limit_by_sender
                 or settings.quotas)
    windows = ANY_WINDOW if settings.sql_limits_by_id else settings.windows
    mails_alert = settings.alert and not settings.alert_command
    if not named and not settings.limit_by_ip:
        yield True, ("limit_by_sasl, limit_by_sender, limit_by_ip: all are"
                     " False, so nothing is limited")
    if settings.limit_by_ip and not settings.limited_networks:
        yield not named, "limited_networks: empty, so no address is limited"
    if not windows:
        yield True, ("limits: none here, in limits_by_id, quotas or by"
                     " sql_limits_by_id, so nothing is limited")
    if settings.dry_run or settings.fail_action.lower() in ("dunno", "ok"):
        yield False, "fail_action, dry_run: as they are, no mail is refused"
    if (settings.report or mails_alert) and not settings.report_to:
        yield False, "report_to: nobody is named to get reports and alerts"
    if settings.report_limits == () and (settings.report or settings.alert):
        yield False, "report_limits: empty, so nobody is told of a refusal"
    for window in settings.report_limits or ():
        if (settings.report or settings.alert) and window not in windows:
            yield False, f"report_limits: no limit has the window {window}"
    for name, action in dict.fromkeys([
            ("success_action", settings.success_action),
            ("db_error_action", settings.db_error_action),
            *(("fail_action", rule.fail_action) for rule in settings.rules)]):
        if not ACTIONS.fullmatch(action.split()[0]):
            yield False, f"{name}: access(5) knows no {action.split()[0]}"


@functools.lru_cache(1000)  # it takes as long as a third of a decision
def parse_limits(text: str) -> Limits:
    """Parse limits as Python writes lists: [[10, 60], [150, 86400]]."""
    try:
        # Its parser's recursion kills the process: no more than can be meant.
        return as_limits(ast.literal_eval(str(text)[:1000].strip()))
    except (TypeError, ValueError, SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"found {str(text)[:200]!r}, expected"
                         f" {as_limits.__doc__}") from None


UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def parse_given(text: str) -> Limits:
    """Parse LIMITS: as in the file, or such as 10/min,500/day."""
    if text.strip().startswith(("[", "(")):
        return parse_limits(text)
    try:
        return as_limits([[int(mails), duration(span)] for mails, _, span in
                          (part.partition("/") for part in text.split(","))])
    except ValueError:
        raise ValueError(f"LIMITS: found {text!r}, expected such as 500/day,"
                         " 10/min,90/h, [[10, 60]]") from None


def duration(text: str) -> int:
    """Parse a time such as 90s, 2h, day or 60; return seconds."""
    found = re.fullmatch(r"(?=.)(\d{0,9})(|s|sec|second|m|min|minute|h|hour"
                         r"|d|day|w|week)s?", text.strip().lower())
    if not found:
        raise ValueError
    return as_seconds(int(found[1] or 1) * UNITS[found[2][:1]])


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
    given = {}
    for line in head.decode("utf-8", "backslashreplace").split("\n"):
        name, equals, value = line.partition("=")
        if not equals:
            raise BadRequest("a line that is not name=value")
        given[name] = value
    get = given.get
    if get("request", "smtpd_access_policy") != "smtpd_access_policy":
        raise BadRequest("it is not request=smtpd_access_policy")
    return Request(
        get("protocol_state", "")[:MAX_TOLD].upper(),
        get("queue_id", "")[:MAX_TOLD], get("instance", "")[:MAX_TOLD],
        get("sasl_username", ""), get("sender", ""),
        get("client_address", "")[:MAX_TOLD],
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

STATES = ("RCPT", "DATA", "END-OF-MESSAGE")  # in the order of a mail's
Row = tuple[Any, ...]  # of mail_count: see COLUMNS


class Claim(NamedTuple):
    """An identity, what the mail costs it, and the limits it must keep."""

    identity: str  # or a quota's key: name=value
    cost: int
    limits: Limits
    rule: Rule = Rule()  # that it comes from
    value: str | None = None  # where different values are counted


class Usage(NamedTuple):
    """What a claim's identity has used of one limit before the mail."""

    claim: Claim
    limit: Limit
    used: int


class Verdict(NamedTuple):
    """What was found for each limit, and the first that would be broken."""

    usage: tuple[Usage, ...]
    broken: Usage | None
    tried: tuple[Usage, ...] = ()  # the first broken of each dry_run
    room_at: int | None = None  # when it passes, if that was asked; 0: never


class Refusal(NamedTuple):
    """How often a limit refused mail: a row of mail_refused."""

    identity: str
    seconds: int
    mails: int  # -1 where only the number of refusals was kept
    hits: int  # since first
    first: int
    last: int
    client: str  # the address that the last one came from


@dataclass
class Charge:
    """One mail on its way through the ledger: claims in, verdict out."""

    claims: Sequence[Claim]
    now: float  # epoch seconds
    instance: str = ""
    protocol_state: str = ""
    client: str = ""  # its address
    others: Sequence[Claim] = ()  # whose mails in memory are to be written
    verdict: Verdict | None = None
    error: LedgerError | None = None  # it was judged in memory


class Account:
    """What an identity has used, mail by mail, within one transaction."""

    own: Limits | None = None  # of the query sql_limits_by_id
    override: Limits | None = None  # of --limit
    seen: Mapping[str, int] = {}  # see Variety

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.identity = claim.identity
        self.limits = claim.limits  # unless others hold
        self.now = 0  # the second in which windows end
        self.date = 0  # of the mails to come: rounded up
        self.total = 0
        self.before: Sequence[int] = ()  # the total ahead of each window

    def usage(self, claim: Claim) -> list[Usage]:
        """Return the use of each limit's window, for a claim."""
        return [Usage(claim, limit, self.total - before)
                for limit, before in zip(self.limits, self.before)]

    def charge(self, claim: Claim, charge: Charge) -> list[Row]:
        """Count a mail and return its row of mail_count."""
        if not self.limits:
            return []
        self.total += claim.cost
        instance = charge.instance[:40] if charge.instance.isascii() else ""
        return [(self.identity, self.date, claim.cost, instance,
                 charge.protocol_state, self.total)]


class Variety(Account):
    """What an identity has used, where different values are counted."""

    def __init__(self, claim: Claim) -> None:
        super().__init__(claim)
        self.seen: dict[str, int] = {}  # values, and when each was last seen
        self.new: dict[str, int] = {}  # those that have to be written

    def usage(self, claim: Claim) -> list[Usage]:
        """Return how many other values each limit's window has."""
        return [Usage(claim, limit, sum(
            date > self.now - limit.seconds
            for value, date in self.seen.items() if value != claim.value))
            for limit in self.limits]

    def charge(self, claim: Claim, charge: Charge) -> list[Row]:
        """Count a mail's value; that is no row of mail_count."""
        if claim.value is not None and self.limits:
            self.seen[claim.value] = self.new[claim.value] = self.date
        return []


ONCE = ("mails", "bytes")  # what a mail counts but once, at RCPT too


def claims_of(request: Request, settings: Settings,
              counted: frozenset[str] = frozenset()) -> list[Claim]:
    """Return what a request claims: nothing if it is not to be counted.

    counted: under which keys this very mail counted before, of those ONCE.
    """
    if not is_counted(request.protocol_state, settings.count_mode):
        return []
    claims = []
    for rule in settings.rules:
        by, name = ((rule.by, value_of(request, rule.by)) if rule.by else
                    identify(request, settings))
        cost, value = cost_of(request, rule, settings.count_mode)
        if not name or not cost or any(
                not choice.fits(attribute_of(request, attribute),
                                (attribute,) in ADDRESSES)
                for attribute, choice in rule.when):
            continue
        limits = rule.limits_by_id.find(name, by in ADDRESSES)
        limits = rule.limits if limits is None else limits
        key = shorten(f"{rule.name}={name}" if rule.by
                      else escape(name, settings))
        if key not in counted:
            claims.append(Claim(key, cost, limits, rule, value))
    return claims


def is_counted(protocol_state: str, count_mode: str | int) -> bool:
    """Say whether mail counts at a state, once Postfix asks there."""
    if count_mode == "auto":
        return protocol_state in STATES
    return protocol_state in (STATES[1:] if count_mode else STATES[:1])


def identify(request: Request, settings: Settings,
             ) -> tuple[tuple[str, ...], str | None]:
    """Return whose mail it is, user, sender or address, and which of them."""
    if settings.limit_by_sasl and request.sasl_username:
        return ("sasl_username",), fold(request.sasl_username)
    if settings.limit_by_sender and request.sender:
        return ("sender",), fold(request.sender)
    if not settings.limit_by_ip or settings.limited_networks is None:
        return (), None
    address = parse_address(request.client_address)
    if address is None or not settings.limited_networks.fits(str(address)):
        return (), None
    return ("client_address",), str(address)


def escape(identity: str, settings: Settings) -> str:
    """Return an identity so that it is no quota's key, name=value."""
    name, equals, _ = identity.lstrip("=").partition("=")
    if equals and any(quota.name == name for quota in settings.quotas):
        return "=" + identity
    return identity


def value_of(request: Request, by: Sequence[str]) -> str | None:
    """Return what a quota counts a mail by, None if that is not known."""
    values = [attribute_of(request, name) for name in by]
    if len(values) > 1:  # so that no client can move the bars
        values = [value.replace("%", "%25").replace("|", "%7c")
                  for value in values]
    return "|".join(values) if all(values) else None


def attribute_of(request: Request, name: str) -> str:
    """Return an attribute as it is compared, "" if it is not known."""
    if name == "server":
        return "all"
    value = request.attributes.get(DERIVED.get(name, name), "")
    if name == "client_network":
        address = parse_address(value)
        return "" if address is None else str(ipaddress.ip_network(
            (address, 24 if address.version == 4 else 64), strict=False))
    if name in DERIVED:
        value = value.rpartition("@")[2].rstrip(". ") if "@" in value else ""
    return fold(value) if value else ""


def cost_of(request: Request, rule: Rule, count_mode: str | int,
            ) -> tuple[int, str | None]:
    """Return what a mail costs, and its value where these are counted."""
    count = rule.count or ("mails" if count_mode == 2 else "recipients")
    if count == "recipients":
        at_rcpt = request.protocol_state == "RCPT"
        return 1 if at_rcpt else request.recipient_count or 1, None
    if count == "mails":
        return 1, None
    if count == "bytes":
        return parse_count(request.attributes.get("size", "")), None
    value = attribute_of(request, count)
    return int(bool(value)), value


def decide(charges: Sequence[Charge], accounts: Mapping[str, Account],
           ) -> tuple[list[Verdict], list[Row]]:
    """Judge mails one after the other; return verdicts, and rows to add.

    A mail counts for all its claims, or for none; but a claim that is only
    tried, and has no room, is left out.
    """
    verdicts, rows = [], []
    for charge in charges:
        verdict = judge([
            usage for claim in charge.claims
            for usage in accounts[claim.identity].usage(claim)])
        verdicts.append(verdict)
        if verdict.broken is None:
            without = {usage.claim.identity for usage in verdict.tried}
            for claim in charge.claims:
                if claim.identity not in without:
                    rows += accounts[claim.identity].charge(claim, charge)
    return verdicts, rows


def judge(usage: Sequence[Usage]) -> Verdict:
    """Say whether a mail keeps all its limits: a cost has to fit whole."""
    tried: dict[str, Usage] = {}
    for use in usage:
        claim = use.claim
        if use.used + claim.cost <= use.limit.mails:
            continue
        if not claim.rule.dry_run:
            return Verdict(tuple(usage), use, tuple(tried.values()))
        tried.setdefault(claim.identity, use)
    return Verdict(tuple(usage), None, tuple(tried.values()))


def rule_of(settings: Settings, identity: str) -> Rule:
    """Return the rule that an identity is counted for."""
    name, equals, _ = identity.partition("=")
    quotas = [rule for rule in settings.rules[1:] if rule.name == name]
    return quotas[0] if equals and quotas else settings.rules[0]


def key_of(settings: Settings, spelt: str) -> str:
    """Return the identity, or the quota's key, that an admin has spelt."""
    name, _, value = spelt.partition("=")
    if rule_of(settings, fold(spelt)).by:
        return shorten(f"{fold(name)}={fold(value)}")
    return fold(spelt)


# ---------------------------------------------------------------------------
# 5. Wording
#
# How a time, a limit, a verdict or an address is written, and what a line of
# the log may contain.  Pure.
# ---------------------------------------------------------------------------

MAX_ACTION = 400  # bytes; a reply of SMTP has 512 (RFC 5321, 4.5.3.1.5)


def describe(verdict: Verdict, client: str = "", refused: int = 0) -> str:
    """Return a verdict in Postfix's key=value style."""
    broken, parts = verdict.broken, []
    for claim, group in itertools.groupby(
            verdict.usage, operator.attrgetter("claim")):
        cost = 0 if broken else claim.cost
        used = " ".join(f"{usage.used + cost}/{ratio(usage.limit)}"
                        for usage in group)
        parts.append(f"identity=<{printable(claim.identity)}>,"
                     f" cost={claim.cost}, used={used}")
    parts += [f"would refuse for <{printable(usage.claim.identity)}>"
              f" {ratio(usage.limit)}" for usage in verdict.tried]
    if broken:
        parts.append(f"client={client}, broken={ratio(broken.limit)},"
                     f" refused={refused}")
        if broken.claim.cost > broken.limit.mails:
            parts.append("it can never pass")
    return ", ".join(parts) or "no limits"


def explain(broken: Usage, room: int | None, now: float) -> str:
    """Return the rule's fail_action with what was found in it."""
    claim, limit = broken.claim, broken.limit
    action = claim.rule.fail_action
    if "$" not in action:
        return action
    never = room == 0 or claim.cost > limit.mails
    at = within = "never" if never else "unknown"
    if room:
        at, within = moment(room), spell(max(room - math.ceil(now), 1))
    text = string.Template(action).substitute(
        identity=printable(claim.identity), used=broken.used,
        mails=limit.mails, seconds=limit.seconds, window=spell(limit.seconds),
        room_at=at, room_in=within)
    return text.encode()[:MAX_ACTION].decode(errors="ignore")


def ratio(limit: Limit | Refusal) -> str:
    """Return a limit as the log shows it."""
    return f"{limit.mails}/{limit.seconds}s".replace("-1/", "")


def spell(seconds: int) -> str:
    """Return a time in words, rounded up: 1 hour, 90 minutes."""
    size, unit = next((size, unit) for size, unit in (
        (86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))
        if seconds % size == 0 or seconds >= 10 * size)
    number = math.ceil(seconds / size)
    return f"{number} {unit}{'s' if number > 1 else ''}"


def moment(date: float) -> str:
    """Return a time as people write it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(date))


def term(ends: int | None) -> str:
    """Return until when limits of --limit hold."""
    return "permanently" if ends is None else f"until {moment(ends)}"


def main_cf(count_mode: str | int, address: str | tuple[str, int]) -> str:
    """Return the line of main.cf that makes Postfix ask at an address."""
    stage = "recipient" if count_mode == 0 else "data"
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


def printable(text: str) -> str:
    """Return text without what could forge a line of the log."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else "?" for c in text)


def align(rows: Sequence[Sequence[str]], columns: int = 999) -> Iterator[str]:
    """Yield a table's lines: the first column makes room, empty ones go."""
    width, *widths = [max(map(len, column)) * any(column[1:])
                      for column in zip(*rows)]
    room = columns - sum(widths) - len(widths) + widths.count(0)
    width = max(12, min(width, room))
    for name, *cells in rows:
        name = name if len(name) <= width else name[:width - 3] + "..."
        yield " ".join([f"{name:{width}}", *(
            f"{cell:>{wide}}" for cell, wide in zip(cells, widths) if wide)
            ])[:columns].rstrip()


# ---------------------------------------------------------------------------
# 6. Database
#
# One connection, statements in few round trips, and what differs between
# the three databases.
# ---------------------------------------------------------------------------

Connection = Any  # of the DB-API (PEP 249)
Cursor = Any
COLUMNS = {  # of mail_count; total is the last that an update adds
    "id": "{name}",
    "date": "{number}",
    "recipient_count": "int DEFAULT 1",
    "instance": "varchar(40) NOT NULL DEFAULT ''",
    "protocol_state": "varchar(20) NOT NULL DEFAULT ''",
    "total": "bigint",  # NULL in a row that the original wrote
}
TABLES = {
    "mail_count": f"id {COLUMNS['id']}, date {COLUMNS['date']}",
    "mail_value": "id {name}, value {name}, date {number},"
                  " PRIMARY KEY (id, value)",
    "mail_turn": "id {name} PRIMARY KEY, turn {number}",
    "mail_refused": "id {name}, seconds {number}, mails {number},"
                    " hits {number}, first {number}, last {number},"
                    " client {name}, PRIMARY KEY (id, seconds)",
    "report_told": "id {name}, seconds {number}, address {name},"
                   " hits {number}, PRIMARY KEY (id, seconds, address)",
    "mail_limit": "id {name} PRIMARY KEY, limits text NOT NULL,"
                  " ends {number}, made {number}",
    "mail_window": "host {name}, seconds {number}, query {name},"
                   " since {number}, date {number},"
                   " PRIMARY KEY (host, seconds, query)",
}
INSERT = f"INSERT INTO mail_count ({', '.join(COLUMNS)}) VALUES {{}}"
MAX_JOINED = 100  # statements in one round trip: servers bound its bytes
TOO_SLOW = "the database is too slow"
MULTI_STATEMENTS = 0x10000  # MySQL's flag: statements may be joined
RATE_LIMITS = ("CREATE TABLE rate_limits (id integer NOT NULL PRIMARY KEY {},"
               " limits varchar(255) NOT NULL)")
INDEX = ("CREATE INDEX mail_count_total"
         " ON mail_count (id, date, total, recipient_count)")
REFUSED = ("INSERT INTO mail_refused"
           " (id, seconds, mails, hits, first, last, client) VALUES {}")
STORE_WINDOW = ("INSERT INTO mail_window (host, seconds, query, since, date)"
                " VALUES (?, ?, ?, ?, ?)")


class Backend:
    """What differs between databases; this is what most of them have."""

    name: str
    drivers: tuple[tuple[str, str], ...]  # modules with Debian's packages
    placeholder = "%s"  # for a value, in the driver's statements
    text = "?"  # a value that is text
    joins = True  # may statements go out together?
    encoding = "UTF8"  # of all text: see PostgreSQL
    first: tuple[str, ...] = ()  # of the statements on a connection
    begin = begin_reading = "BEGIN"
    chunk = 50  # rows a statement: each costs a round trip
    identity = f"varchar({MAX_IDENTITY})"  # the type of an identity
    numbered = ""  # makes ids of rate_limits count up, as the original's do
    alter_original: tuple[str, ...] = ()  # its tables, to ours
    add_total: tuple[str, ...] = (
        f"ALTER TABLE mail_count ADD COLUMN total {COLUMNS['total']}", INDEX)
    try_total = ""  # fails without the right to do so, and changes nothing
    try_table = "{}"  # so does this, for a statement that makes a table
    turn = ""  # how an identity's turn is taken where many hosts may write
    note = (f"{REFUSED} ON CONFLICT (id, seconds) DO UPDATE SET"
            " mails = excluded.mails, hits = mail_refused.hits + excluded.hits"
            ", last = excluded.last, client = excluded.client")
    see = ("INSERT INTO mail_value (id, value, date) VALUES {} ON CONFLICT"
           " (id, value) DO UPDATE SET date = excluded.date")
    store_window = (f"{STORE_WINDOW} ON CONFLICT (host, seconds, query)"
                    " DO UPDATE SET date = ?")
    clock: str  # its time, in whole seconds since 1970
    conflicts: tuple[object, ...] = ()  # codes of errors to be tried again

    def __init__(self, settings: Settings) -> None:
        """Take how to connect; raise ConfigError if there is no driver."""
        self.timeout = min(settings.db_timeout, 90)  # Postfix waits 100 s
        self.deadline = math.inf  # of the transaction in hand
        self.wants_rate_limits = bool(settings.sql_limits_by_id)
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

    def skip_results(self, cursor: Cursor, count: int) -> None:
        """Go on from the first result of statements that went together."""
        for _ in range(count):
            cursor.nextset()

    def fit(self, values: Sequence[object]) -> Sequence[object]:
        """Return values as the database can hold them."""
        return values

    def is_conflict(self, error: Exception) -> bool:
        """Say whether another transaction was first, so try again."""
        codes = {*error.args[:1], getattr(error, "pgcode", None),
                 getattr(error, "sqlstate", None)}
        return bool(codes.intersection(self.conflicts))

    def explain(self, error: Exception) -> str:
        """Return the text of an error in one line."""
        return f"{self.name}: {' '.join(str(error).split())}"

    def probe(self, examine: Callable[[Transaction], None]) -> str:
        """Examine the database, changing nothing; return what it is."""
        self.deadline = time.monotonic() + self.timeout
        try:
            with contextlib.closing(self.connect(self.timeout)) as connection:
                transaction = Transaction(self, connection, self.begin)
                [version] = transaction.run("SELECT version()").fetchone()
                examine(transaction)
        except Exception as error:
            raise LedgerError(self.explain(error)) from error
        if self.encoding != "UTF8":
            log.warning("the database is in %s: what that cannot hold is"
                        " counted under a hash", self.encoding)
        return f"{version}, through {self.driver.__name__}"


class SQLite(Backend):
    """SQLite: one file, one host."""

    name = "SQLite"
    drivers = (("sqlite3", "libpython3-stdlib"),)
    placeholder = "?"
    joins = False
    clock = "CAST(strftime('%s', 'now') AS integer)"
    first = (  # so that a commit outlives a power cut
        "PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL",
        f"PRAGMA journal_size_limit = {2**24}")  # else its log stays large
    begin = "BEGIN IMMEDIATE"
    chunk = 1  # a statement costs no round trip, and is prepared but once
    add_total = ("DROP INDEX IF EXISTS mail_count_index",
                 "DROP INDEX IF EXISTS mail_count_total", *Backend.add_total)

    def choose(self, settings: Settings) -> dict[str, Any]:
        """Return the arguments of sqlite3.connect()."""
        return {"timeout": self.timeout, **settings.sqlite_config,
                "isolation_level": None, "check_same_thread": False}

    def connect(self, timeout: int) -> Connection:
        """Open the file."""
        connection = self.driver.connect(**self.config)
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

    def probe(self, examine: Callable[[Transaction], None]) -> str:
        """Examine the file, if there is one, holding its lock."""
        path = str(self.config["database"])
        there = os.path.exists(path)
        try:
            with contextlib.closing(self.driver.connect(**{
                    **self.config, "database": path if there else ":memory:",
                    })) as connection:
                transaction = Transaction(self, connection, self.begin)
                examine(transaction)  # in memory: would the query work?
        except Exception as error:  # a TypeError is connect()'s
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
    numbered = "AUTO_INCREMENT"
    alter_original = (
        f"ALTER TABLE mail_count MODIFY id {identity} NOT NULL,"
        f" MODIFY protocol_state {COLUMNS['protocol_state']},"
        " ENGINE=InnoDB, ROW_FORMAT=DYNAMIC",
    )
    add_total = (  # in one ALTER, which fails whole if another host was first
        "SET @alter = (SELECT CONCAT('ALTER TABLE mail_count ',"
        " IF(COUNT(*), 'DROP INDEX mail_count_total, ', ''),"
        f" 'ADD COLUMN total {COLUMNS['total']}, ADD INDEX mail_count_total"
        " (id, date, total, recipient_count)')"
        " FROM information_schema.statistics WHERE table_schema = DATABASE()"
        " AND table_name = 'mail_count' AND index_name = 'mail_count_total')",
        "PREPARE add_total FROM @alter", "EXECUTE add_total")
    try_total = "ALTER TABLE mail_count"
    try_table = "PREPARE try_table FROM '{}'"
    turn = ("INSERT INTO mail_turn (id, turn) VALUES {}"
            " ON DUPLICATE KEY UPDATE turn = turn + 1")
    note = (f"{REFUSED} ON DUPLICATE KEY UPDATE mails = VALUES(mails),"
            " hits = hits + VALUES(hits), last = VALUES(last),"
            " client = VALUES(client)")
    see = ("INSERT INTO mail_value (id, value, date) VALUES {}"
           " ON DUPLICATE KEY UPDATE date = VALUES(date)")
    store_window = f"{STORE_WINDOW} ON DUPLICATE KEY UPDATE date = ?"
    clock = "UNIX_TIMESTAMP()"
    # Changed since it was read; deadlock; a table that another host alters.
    conflicts = (1020, 1213, 1412)
    text = "? COLLATE utf8mb4_bin"  # or sub-queries' cache takes é for e
    # Not BEGIN, but autocommit off: with BEGIN a Galera cluster let 101 to 116
    # mails of 100 pass, for one in six identities that all nodes counted.
    begin = begin_reading = ""

    def choose(self, settings: Settings) -> dict[str, Any]:
        """Return the arguments of connect(); no other charset holds all."""
        return {**settings.mysql_config, "charset": "utf8mb4"}

    def connect(self, timeout: int) -> Connection:
        """Connect with a bound on each answer."""
        connection = self.driver.connect(**{
            "connect_timeout": self.timeout, "read_timeout": timeout,
            "write_timeout": timeout, **self.config, "client_flag":
            (self.config.get("client_flag") or 0) | MULTI_STATEMENTS})
        connection.autocommit(False)
        with contextlib.closing(connection.cursor()) as cursor:  # an empty
            cursor.execute("SET sql_mode = 'STRICT_ALL_TABLES'")  # text is one
        return connection


class PostgreSQL(Backend):
    """PostgreSQL."""

    name = "PostgreSQL"
    drivers = (("psycopg2", "python3-psycopg2"),
               ("psycopg", "python3-psycopg"))
    alter_original = (
        f"ALTER TABLE mail_count ALTER COLUMN id TYPE {Backend.identity},"
        " ALTER COLUMN protocol_state TYPE varchar(20)",
    )
    add_total = SQLite.add_total
    try_total = Backend.add_total[0]  # it is rolled back
    turn = ("INSERT INTO mail_turn (id, turn) VALUES {}"
            " ON CONFLICT (id) DO UPDATE SET turn = mail_turn.turn + 1")
    clock = "CAST(EXTRACT(EPOCH FROM CURRENT_TIMESTAMP) AS bigint)"
    conflicts = (  # serialization failure, deadlock, lock_timeout
        "40001", "40P01", "55P03")

    def choose(self, settings: Settings) -> dict[str, Any]:
        """Return the arguments of connect(), whose dbname has two names."""
        return {"dbname" if name == "database" else name: value
                for name, value in settings.pgsql_config.items()}

    def __init__(self, settings: Settings) -> None:
        """Start to watch the time, since libpq waits for ever."""
        super().__init__(settings)
        threading.Thread(target=self._watch, daemon=True).start()

    def connect(self, timeout: int) -> Connection:
        """Connect; if timeout is that of the setting, cut what hangs."""
        connection = self.driver.connect(**{
            "connect_timeout": self.timeout, **self.config,
            "client_encoding": "UTF8"})
        connection.autocommit = True
        if timeout == self.timeout:
            self._watched = connection
        connection.cursor().execute(  # or each cut leaves one that waits on
            f"SET lock_timeout = {timeout * 900}")
        self.encoding = connection.info.parameter_status("server_encoding")
        if hasattr(self.driver, "ClientCursor"):  # psycopg 3: ours join two
            connection.cursor_factory = self.driver.ClientCursor
        return connection

    def fit(self, values: Sequence[object]) -> Sequence[object]:
        """Return values with a hash for what the encoding cannot hold."""
        if self.encoding == "UTF8":
            return values
        return [hashed(value, self.encoding) if isinstance(value, str)
                and not value.isascii() else value for value in values]

    def skip_results(self, cursor: Cursor, count: int) -> None:
        """Go on to the last result; psycopg2 has no other."""
        if hasattr(self.driver, "ClientCursor"):
            super().skip_results(cursor, count)

    def _watch(self) -> None:
        """Cut the line of a transaction whose deadline is past."""
        while True:
            time.sleep(self.timeout / 20)
            if time.monotonic() < self.deadline:
                continue
            with contextlib.suppress(Exception), socket.socket(
                    fileno=os.dup(self._watched.fileno())) as line:
                line.shutdown(socket.SHUT_RDWR)


def hashed(text: str, encoding: str) -> str:
    """Return a text if an encoding of PostgreSQL's holds it, else its hash."""
    if encoding == "SQL_ASCII":  # any bytes, each counted as a character
        encoding = "UTF8"
    with contextlib.suppress(LookupError, UnicodeEncodeError):
        if len(text.encode(encoding.replace("WIN", "cp"))) <= MAX_IDENTITY:
            return text
    return (text.encode("ascii", "ignore").decode()[:100] + "#"
            + hashlib.sha256(text.encode()).hexdigest())


BACKENDS = (SQLite, MySQL, PostgreSQL)


def import_driver(drivers: Sequence[tuple[str, str]]) -> Any:
    """Return the first driver that is installed, or raise ConfigError."""
    for module, _ in drivers:
        with contextlib.suppress(ImportError):
            return importlib.import_module(module)
    raise ConfigError("no database driver: install "
                      + " or ".join(package for _, package in drivers))


class Transaction:
    """Statements in few round trips; Database begins and commits."""

    def __init__(self, backend: Backend, connection: Connection,
                 statement: str) -> None:
        """Begin on a connection, by a statement unless that is empty."""
        self.backend = backend
        self.cursor: Cursor = connection.cursor()
        self.answered = False  # has any statement succeeded?
        self._waiting: list[tuple[str, Sequence[object]]] = []
        if statement:
            self.later(statement)

    def run(self, statement: str, *values: object) -> Cursor:
        """Execute what waits, and a statement; return that one's result."""
        waited, self._waiting = self._waiting, []
        if waited:
            statement = "; ".join([*(text for text, _ in waited), statement])
            before = [value for _, given in waited for value in given]
            values = (*before, *values)
        self.cursor.execute(
            statement.replace("?", self.backend.placeholder),
            self.backend.fit(values))
        if waited:
            self.backend.skip_results(self.cursor, len(waited))
        self.answered = True
        return self.cursor

    def later(self, statement: str, *values: object) -> None:
        """Let a statement wait for the next, if the driver joins them."""
        if self.backend.joins and len(self._waiting) < MAX_JOINED:
            self._waiting.append((statement, values))
        else:
            self.run(statement, *values)

    def flush(self) -> None:
        """Execute what waits."""
        if self._waiting:
            statement, values = self._waiting.pop()
            self.run(statement, *values)

    def write(self, statement: str, rows: Sequence[Row]) -> None:
        """Write rows later, some with each statement, which ends in {}."""
        place = "(" + ", ".join("?" * len(rows[0])) + ")" if rows else ""
        if rows and not self.backend.joins:
            self.cursor.executemany(statement.format(place), rows)
            return
        for some in chunks(rows, self.backend.chunk):
            self.later(statement.format(", ".join([place] * len(some))),
                       *itertools.chain(*some))

    def attempt(self, warning: str, work: Callable[..., T], *given: Any,
                ) -> T | None:
        """Return work(self, *given); if it fails, warn and undo just that."""
        # For what must not cost the verdicts; some of it needs no warning.
        self.later("SAVEPOINT attempt")
        try:
            result = work(self, *given)
            self.flush()
        except Exception as error:
            if self.backend.is_conflict(error):
                raise
            self._waiting.clear()
            self.run("ROLLBACK TO SAVEPOINT attempt")
            if warning:
                log.warning(warning, self.backend.explain(error), extra=SELDOM)
            return None
        self.later("RELEASE SAVEPOINT attempt")
        return result


class Database:
    """One connection for all threads, made anew when it is dead."""

    def __init__(self, backend: Backend,
                 prepare: Callable[[Backend, Connection], None]) -> None:
        """Take what prepares the tables on a connection; open nothing yet."""
        self.backend = backend
        self._prepare = prepare
        self.lock = threading.RLock()  # of the connection
        self._connection: Connection = None

    def transact(self, work: Callable[..., T], *given: Any,
                 deadline: float | None = None, reading: bool = False) -> T:
        """Return work(transaction, *given), committed; raise LedgerError.

        If it only reads, it waits for no other process, even on SQLite.

        The first statement is the ping: if it finds an old connection dead,
        all is done on another.  Where another host was first with an
        identity, all is done again, until the deadline (time.monotonic()).
        """
        if deadline is None:
            deadline = time.monotonic() + self.backend.timeout
        left = deadline - time.monotonic()
        if left < 0 or not self.lock.acquire(timeout=left):
            raise LedgerError(TOO_SLOW)
        try:
            while True:
                self.backend.deadline = deadline
                old, began = self._connection is not None, time.monotonic()
                transaction = None
                try:
                    if self._connection is None or self.backend.is_stale():
                        self._connect()
                    transaction = Transaction(
                        self.backend, self._connection,
                        self.backend.begin_reading if reading
                        else self.backend.begin)
                    result = work(transaction, *given)
                    transaction.run("COMMIT")
                    return result
                except Exception as error:  # drivers raise more than their own
                    quick = time.monotonic() - began < self.backend.timeout / 2
                    answered = transaction and transaction.answered
                    self._recover(error, dead=old and quick and not answered)
        finally:
            self.backend.deadline = math.inf
            self.lock.release()

    def _recover(self, error: Exception, dead: bool) -> None:
        """Undo what failed; raise LedgerError unless it may be done again."""
        now = time.monotonic()
        conflict = self.backend.is_conflict(error)
        undone = self._roll_back(keep=conflict)
        if conflict and now <= self.backend.deadline:
            time.sleep(random.uniform(0, 0.01))
        elif not dead:
            raise LedgerError(self.backend.explain(error), undone) from error

    def look(self, work: Callable[..., T], *given: Any) -> T:
        """Return work(transaction, *given), which reads tables as they are."""
        try:
            with contextlib.closing(self.backend.look()) as connection:
                return work(Transaction(
                    self.backend, connection, self.backend.begin_reading),
                    *given)
        except Exception as error:
            raise LedgerError(self.backend.explain(error)) from error

    def close(self) -> None:
        """Close the connection; the next use opens another."""
        if self.lock.acquire(timeout=self.backend.timeout):
            try:
                self._roll_back(keep=False)
            finally:
                self.lock.release()

    def _roll_back(self, keep: bool) -> bool:
        """Undo what is half done; return whether the database says it is."""
        connection, undone = self._connection, False
        with contextlib.suppress(Exception):  # a lock outlives close() alone
            connection.cursor().execute("ROLLBACK")
            undone = True
        if not keep:
            self._connection = None
            with contextlib.suppress(Exception):  # there may be none
                connection.close()
        return undone

    def _connect(self) -> None:
        """Connect; what fails on the way leaves no connection behind."""
        self._roll_back(keep=False)
        self._connection = self.backend.connect(self.backend.timeout)
        try:
            for statement in self.backend.first:
                self._connection.execute(statement)
            self._prepare(self.backend, self._connection)
        except Exception:
            self._roll_back(keep=False)
            raise


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Cut a list into lists of at most size."""
    return (items[i:i + size] for i in range(0, len(items), size))


# ---------------------------------------------------------------------------
# 7. Schema
#
# How the tables are made, and brought up to date from the original's.
# ---------------------------------------------------------------------------

LARGE = 10_000  # rows whose totals take longer than a mail should wait


def prepare_tables(backend: Backend, connection: Connection) -> None:
    """See that the tables are there, as an update makes them."""
    for again in (True, True, False):
        looking = Transaction(
            backend, connection, backend.begin_reading)
        present = are_complete(looking)
        if (backend.wants_rate_limits
                and not columns_of(looking, "rate_limits")):
            with contextlib.suppress(Exception):  # if the query needs it
                looking.run(RATE_LIMITS.format(backend.numbered))
        looking.run("COMMIT")
        if present:
            break
        backend.deadline = math.inf  # large tables take long
        with contextlib.closing(backend.connect(3600)) as patient:
            try:
                updating = Transaction(
                    backend, patient, backend.begin)
                update_tables(updating)
                updating.run("COMMIT")
            except Exception:
                if not again:  # else another daemon may have been first
                    raise
        backend.deadline = time.monotonic() + backend.timeout


def columns_of(transaction: Transaction, table: str) -> list[str]:
    """Return the names of a table's columns, none if there is no table."""
    return transaction.attempt("", lambda _: [
        column[0] for column in transaction.run(
            f"SELECT * FROM {table} LIMIT 0").description]) or []


def are_complete(transaction: Transaction) -> bool:
    """Say whether all tables are there, as an update makes them."""
    return ("total" in columns_of(transaction, "mail_count")
            and all(columns_of(transaction, table) for table in TABLES))


def update_tables(transaction: Transaction) -> None:
    """Make the tables, or bring those of the original up to date."""
    backend = transaction.backend
    for statement in creations(backend):
        transaction.run(statement)
    present = columns_of(transaction, "mail_count")
    if "total" in present:
        return
    for name, kind in COLUMNS.items():
        if name not in (*present, "total"):
            transaction.run(f"ALTER TABLE mail_count ADD COLUMN {name} {kind}")
    for statement in backend.alter_original:
        transaction.run(statement)
    for [identity] in transaction.run(
            "SELECT DISTINCT id FROM mail_count").fetchall():
        if fold(identity) != identity:
            transaction.run("UPDATE mail_count SET id = ? WHERE id = ?",
                            fold(identity), identity)
    for statement in backend.add_total:  # once it is there, so is all else
        transaction.run(statement)
    for [identity] in transaction.run(
            "SELECT id FROM mail_count GROUP BY id HAVING COUNT(*) > ?",
            LARGE).fetchall():
        retotal(transaction, identity, math.inf)


def creations(backend: Backend) -> Iterator[str]:
    """Return the statements that make the tables which are missing."""
    for table, columns in TABLES.items():
        columns = columns.format(name=f"{backend.identity} NOT NULL",
                                 number="bigint NOT NULL")
        yield f"CREATE TABLE IF NOT EXISTS {table} ({columns})"


def retotal(transaction: Transaction, identity: str, now: float) -> None:
    """Write an identity's rows anew, with totals and no date after now."""
    rows, total = [], 0
    for date, count, *origin in transaction.run(
            "SELECT date, recipient_count, instance, protocol_state"
            " FROM mail_count WHERE id = ? ORDER BY date, total",
            identity).fetchall():
        transaction.backend.deadline += 0.001  # each row has to be written
        count = 1 if count is None else count
        total += count
        rows.append((identity, min(date, now), count, *origin, total))
        if date > now + CLOCK_SKEW:
            log.warning("mails are dated %d seconds ahead: see that all"
                        " clocks are right", date - now, extra=SELDOM)
    transaction.later("DELETE FROM mail_count WHERE id = ?", identity)
    transaction.write(INSERT, rows)


# ---------------------------------------------------------------------------
# 8. Ledger
#
# Read what was used, judge, write the charge, with nobody in between.
#
# The table mail_count is the original's with a running total: the sum of
# recipient_count over the identity's rows up to this one.  What a window
# holds is the newest total less the total before the window's first row: two
# look-ups in an index, however full the window.  Dates are whole seconds,
# rounded up, so that no window is shorter than it says; an identity's rows
# never go back in time, whatever the clocks do.
# ---------------------------------------------------------------------------

QUERY_FAILED = "sql_limits_by_id: %s; the file's limits hold"
PERMANENT = 10**12  # in the column ends, which cannot be NULL: year 33658


class Override(NamedTuple):
    """Limits of --limit or --block, which win over all others."""

    limits: Limits
    ends: int | None  # None: they are permanent

    def holds_at(self, now: float) -> bool:
        """Say whether they are in force at a time."""
        return self.ends is None or self.ends > now


Overrides = dict[str, Override]  # by identity


def settle(transaction: Transaction, batch: Batch, query: str | None,
           standby: Standby) -> None:
    """Judge mails and charge those that pass, one after the other."""
    charges, accounts = tuple(batch.charges), batch.accounts
    batch.verdicts, batch.rows = [], []  # of a conflict's: it wrote nothing
    for charge in charges if transaction.backend.encoding != "UTF8" else ():
        values: Sequence[Any] = transaction.backend.fit(
            [claim.value for claim in charge.claims])
        charge.claims = [claim._replace(value=value)  # as they are read
                         for claim, value in zip(charge.claims, values)]
    claims = {claim.identity: claim for charge in charges
              for claim in charge.claims or charge.others}
    for name, claim in claims.items():
        kind = Account if claim.value is None else Variety
        accounts[name] = kind(claim)
    take_turns(transaction, accounts)
    standby.bring(transaction, batch)
    for name, claim in claims.items() if query else ():
        if not claim.rule.by:  # no quota's
            own = transaction.attempt(QUERY_FAILED, ask_limits, query, name)
            accounts[name].own = own
            accounts[name].limits = claim.limits if own is None else own
    now = max((charge.now for charge in charges), default=0)
    read_accounts(transaction, list(accounts.values()), now)
    varied = [account for account in accounts.values()
              if isinstance(account, Variety)]
    for variety in varied:
        read_values(transaction, variety, now)
    batch.verdicts, batch.rows = decide(charges, accounts)
    note_refusals(transaction, batch)
    transaction.write(INSERT, batch.rows)
    for variety in varied:
        transaction.write(transaction.backend.see, [
            (variety.identity, *seen) for seen in variety.new.items()])
    for place, verdict in enumerate(batch.verdicts):
        if verdict.broken is not None:
            batch.verdicts[place] = with_room(transaction, verdict, accounts)


def merge(transaction: Transaction, rows: Sequence[Row]) -> list[Row]:
    """Add rows of an identity under their dates; return them with totals.

    A row that has a total was sent before: it may be there.
    """
    identity, first = min(row[:2] for row in rows)
    query = (f"SELECT {', '.join(COLUMNS)} FROM mail_count WHERE id = ? AND"
             " date >= COALESCE((SELECT MAX(date) FROM mail_count WHERE id = ?"
             " AND date <= ?), 0) ORDER BY date, total")
    there = transaction.run(query, identity, identity, first).fetchall()
    transaction.backend.deadline += (len(rows) + len(there)) / 1000
    if None in (row[-1] for row in there):  # the original's
        retotal(transaction, identity, there[-1][1])
        there = transaction.run(query, identity, identity, first).fetchall()
    found, new = find_sent(rows, there)
    total = there[0][-1] - there[0][2] if there else 0
    rewrite = bool(new and there) and there[-1][1] > first
    if rewrite:  # another host was quicker
        transaction.later("DELETE FROM mail_count WHERE id = ? AND date >= ?",
                          identity, there[0][1])
    ours, written = [], []
    for row in sorted([*there, *new], key=operator.itemgetter(1)):
        total += row[2]
        with_total = (*row[:-1], total)
        if row[-1] is None or row[1:] in found:
            ours.append(with_total)
        if row[-1] is None or rewrite:
            written.append(with_total)
    transaction.write(INSERT, written)
    return ours


def find_sent(rows: Sequence[Row], there: Sequence[Row],
              ) -> tuple[set[Row], list[Row]]:
    """Return which rows there were sent by us, and ours that are not there.

    Another host may have raised the total of one, but lowers none.
    """
    totals: dict[Row, deque[int]] = {}
    for row in there:
        totals.setdefault(row[1:-1], deque()).append(row[-1])
    found, new = set(), []
    for row in rows:
        total, like = row[-1], totals.get(row[1:-1], deque())
        while total is not None and like and like[0] < total:
            like.popleft()
        if total is not None and like and (like[0] == total or row[3]):
            found.add((*row[1:-1], like.popleft()))
        else:
            new.append((*row[:-1], None))
    return found, new


def note_refusals(transaction: Transaction, batch: Batch) -> None:
    """Note refusals, one row for each identity and window of a batch."""
    found: dict[tuple[str, int], Refusal] = {}
    for charge, verdict in zip(batch.charges, batch.verdicts):
        for usage in filter(None, (verdict.broken, *verdict.tried)):
            limit, now = usage.limit, int(charge.now)
            key = usage.claim.identity, limit.seconds
            hits = found[key].hits + 1 if key in found else 1
            found[key] = Refusal(
                *key, limit.mails, hits, now, now, charge.client)
    if found:
        transaction.attempt("a refusal is not noted: %s", Transaction.write,
                            transaction.backend.note,
                            [found[key] for key in sorted(found)])


def with_room(transaction: Transaction, verdict: Verdict,
              accounts: Mapping[str, Account]) -> Verdict:
    """Add to a verdict when such a mail passes again, if that is asked."""
    broken = verdict.broken
    if (broken is None
            or "$room" not in broken.claim.rule.fail_action.replace("{", "")):
        return verdict
    full = [use for use in verdict.usage if not use.claim.rule.dry_run
            and use.used + use.claim.cost > use.limit.mails]
    never = any(use.claim.cost > use.limit.mails for use in full)
    return verdict._replace(room_at=0 if never else max(
        room_in(transaction, use, accounts) for use in full))


def room_in(transaction: Transaction, full: Usage,
            accounts: Mapping[str, Account]) -> int:
    """Return when a limit that is full has room again."""
    claim, (mails, seconds) = full.claim, full.limit
    account = accounts[claim.identity]
    if isinstance(account, Variety):
        dates = sorted(date for value, date in account.seen.items()
                       if value != claim.value)
        date = dates[-mails]
    else:
        [date] = transaction.run(  # reads no more rows than have to leave
            "SELECT date FROM mail_count WHERE id = ? AND date > ?"
            " AND total >= ? ORDER BY date, total LIMIT 1", account.identity,
            account.now - seconds, account.total + claim.cost - mails,
            ).fetchone() or [account.date]
    return int(date) + seconds


def take_turns(transaction: Transaction, identities: Iterable[str]) -> None:
    """Keep other hosts from these identities until the transaction ends."""
    if transaction.backend.turn:
        # In one order, so that none waits for another in a circle.
        transaction.write(transaction.backend.turn, [
            (identity, 1) for identity in sorted(identities)])


def ask_limits(transaction: Transaction, query: str, identity: str,
               ) -> Limits | None:
    """Return the limits that the query sql_limits_by_id has, or None."""
    transaction.flush()
    transaction.cursor.execute(query, transaction.backend.fit((identity,)))
    row = transaction.cursor.fetchone()
    return None if row is None or row[0] is None else parse_limits(row[0])


def read_accounts(transaction: Transaction, accounts: Sequence[Account],
                  now: float) -> None:
    """Read what accounts have used, many with each statement."""
    second, date_now = math.floor(now), math.ceil(now)
    width = max((len(account.limits) for account in accounts), default=0)
    for some in chunks(accounts, transaction.backend.chunk):
        values: list[object] = []
        for account in some:
            since = [second - limit.seconds for limit in account.limits]
            values += [account.identity, *since,
                       *[second] * (width - len(since))]
        statement = usage_statement(
            len(some), width, transaction.backend.text)
        others = []
        for n, own, date, total, *before in transaction.run(
                statement, *values, second).fetchall():
            account = some[n]
            limits = None if own is None else parse_override(own)
            if limits is not None and limits != account.limits:
                account.limits = account.override = limits
                others.append(account)  # it has other windows
                continue
            if date is not None and (total is None
                                     or date > now + CLOCK_SKEW):
                retotal(transaction, account.identity, date_now)
                read_accounts(transaction, [account], now)
            elif date is not None and date > date_now:
                # Another host's clock is ahead: that is the time here, too.
                read_accounts(transaction, [account], date - 0.5)
            else:
                account.now, account.date = second, date_now
                account.total = total or 0
                account.before = [
                    account.total if sum_before is None else sum_before
                    for sum_before in before]
        if others:
            read_accounts(transaction, others, now)


def read_values(transaction: Transaction, account: Variety,
                now: float) -> None:
    """Read the values that an account has had.

    Those dated far ahead move to now: the clock has been set back far.
    """
    longest = max((limit.seconds for limit in account.limits), default=0)
    account.now = math.floor(now)
    account.date = date_now = math.ceil(now)
    account.seen.update(account.new)  # from memory
    for value, date in transaction.run(
            "SELECT value, date FROM mail_value WHERE id = ? AND date > ?",
            account.identity, account.now - longest).fetchall():
        if date > now + CLOCK_SKEW:
            account.new[value] = date = date_now
        elif date >= account.new.get(value, date):
            account.new.pop(value, None)  # another host saw it later
        account.seen[value] = account.new.get(value, date)
        account.date = max(account.date, date)


@functools.cache
def usage_statement(accounts: int, windows: int, text: str = "?") -> str:
    """Return the query for so many accounts with so many windows each.

    It takes identity and begin of each window, for each account, then the
    time, and yields an account's place, the limits that --limit set, newest
    date and total, and the total before each window's first row, or NULLs.
    """
    # Plain sub-selects in place of WITH cost PostgreSQL a quarter to a half
    # of the speed, MariaDB up to half.
    since = [f"since{n}" for n in range(windows)]
    asked = " UNION ALL ".join(
        f"SELECT {n}, {text}{', ?' * windows}" for n in range(accounts))
    own = "(SELECT limits FROM mail_limit WHERE id = who AND ends > ?)"
    newest = ("(SELECT {} FROM mail_count WHERE id = who"
              " ORDER BY date DESC, total DESC LIMIT 1)")
    before = ("(SELECT total - recipient_count FROM mail_count WHERE id = who"
              " AND date > {} ORDER BY date, total LIMIT 1)")
    columns = ", ".join([own, newest.format("date"), newest.format("total"),
                         *map(before.format, since)])
    return (f"WITH asked ({', '.join(['n', 'who', *since])})"
            f" AS ({asked}) SELECT n, {columns} FROM asked")


def read_refusals(transaction: Transaction, which: str = "", *values: object,
                  ) -> list[Refusal]:
    """Return refusals, all or some."""
    return [Refusal(*row) for row in transaction.run(
        "SELECT id, seconds, mails, hits, first, last, client"
        f" FROM mail_refused {which}", *values).fetchall()]


def read_overrides(transaction: Transaction, now: int) -> Overrides:
    """Return all limits of --limit that are in force."""
    overrides = {}
    for identity, text, ends in transaction.run(
            "SELECT id, limits, ends FROM mail_limit"
            " WHERE ends > ? ORDER BY id", now).fetchall():
        limits = parse_override(text)
        if limits is not None:
            overrides[identity] = Override(
                limits, None if ends == PERMANENT else ends)
    return overrides


def parse_override(text: str) -> Limits | None:
    """Parse limits of mail_limit; what others wrote there may be rubbish."""
    try:
        return parse_limits(text)
    except ValueError as error:
        log.warning("mail_limit: %s; it does not hold", error, extra=SELDOM)
        return None


# ---------------------------------------------------------------------------
# 9. Batches and outages
#
# Many requests, one commit; and what happens while the database is away.
# ---------------------------------------------------------------------------

MERGE_STEP = 50  # identities whose mails one transaction brings from memory
MAX_KEPT = 100_000  # identities kept in memory, and five mails of each


class Batch:
    """The charges that one transaction settles, and what becomes of them."""

    def __init__(self, charges: Iterable[Charge] = ()) -> None:
        self.charges = list(charges)
        self.lock = threading.Lock()  # of who settles it, then of who waited
        self.accounts: dict[str, Account] = {}
        self.merged: list[tuple[Tab, list[Row], dict[str, int]]] = []
        self.verdicts: list[Verdict] = []
        self.rows: list[Row] = []


class Tab(NamedTuple):
    """Mails of an identity that were counted in memory alone."""

    claim: Claim
    rows: list[Row]  # one with a total was sent: it may be in the table
    sums: list[tuple[int, int]]  # dates, costs so far: ahead, at each row
    new: dict[str, int]  # as of a Variety

    def used(self, since: int) -> int:
        """Return what the mails after a date cost."""
        first = bisect.bisect_left(self.sums, (since + 1,), 1)
        return self.sums[-1][1] - self.sums[first - 1][1]


class Standby:
    """Judges mails while the database is away, by what this host has seen.

    That is what the identity had used when its last mail was settled, until
    the window has passed, its mails since then, and those under way.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._accounts: OrderedDict[str, Account] = OrderedDict()  # as settled
        self.tabs: OrderedDict[str, Tab] = OrderedDict()
        self.flying: Sequence[Charge] = ()  # in the transaction under way
        self.overrides: Overrides = {}  # when they were last looked at
        self._values = self._size = 0  # of all accounts; in all tabs

    def judge(self, charge: Charge) -> Verdict:
        """Judge a mail, and keep its rows for the table."""
        batch = Batch([charge])
        with self.lock:
            batch.accounts = {
                claim.identity: self._account(claim, charge.now)
                for claim in charge.claims}
            [verdict], batch.rows = decide([charge], batch.accounts)
            self.keep(batch, sent=False)
        return verdict

    def keep(self, batch: Batch, sent: bool) -> None:
        """Keep what a batch did not write, or may have if it was sent."""
        new = {name: account.new for name, account in batch.accounts.items()
               if isinstance(account, Variety) and account.new}
        with self.lock:
            for tab, rows, _ in batch.merged if sent else ():
                tab.rows[:len(rows)] = rows
            for name in {*new, *(row[0] for row in batch.rows)}:
                tab = self.tabs.setdefault(
                    name, Tab(batch.accounts[name].claim, [], [(0, 0)], {}))
                self.tabs.move_to_end(name)
                self._size -= len(tab.new)
                tab.new.update(new.get(name, {}))
                self._size += len(tab.new)
            for row in batch.rows:
                tab = self.tabs[row[0]]
                tab.rows.append(row if sent else (*row[:-1], None))
                tab.sums.append((row[1], tab.sums[-1][1] + row[2]))
            self._size += len(batch.rows)
            while self._size > 5 * MAX_KEPT or len(self.tabs) > MAX_KEPT:
                _, tab = self.tabs.popitem(last=False)
                self._size -= len(tab.rows) + len(tab.new)

    def charges(self, now: float) -> Iterator[Charge]:
        """Return an empty mail for each identity that has mails here."""
        with self.lock:
            tabs = list(self.tabs.values())
        return (Charge((), now, others=[tab.claim]) for tab in tabs)

    def bring(self, transaction: Transaction, batch: Batch) -> None:
        """Write what is kept of a batch's identities."""
        if not self.tabs:
            return
        with self.lock:
            tabs = map(self.tabs.get, batch.accounts)
            kept = [(tab, tab.rows[:], tab.new.copy())
                    for tab in tabs if tab is not None]
        batch.merged = []
        for tab, rows, new in kept:
            if rows:
                rows = merge(transaction, rows)
            batch.merged.append((tab, rows, new))
            account = batch.accounts[tab.claim.identity]
            getattr(account, "new", {}).update(new)

    def settled(self, batch: Batch) -> None:
        """Note the accounts of a batch that is committed."""
        with self.lock:
            for name, account in batch.accounts.items():
                before = self._accounts.pop(name, None)
                self._accounts[name] = account
                self._values += len(account.seen)
                self._values -= len(before.seen) if before else 0
                limits, _ = self.overrides.get(name, (None, 0))
                if account.override is None:
                    self.overrides.pop(name, None)
                elif account.override != limits:  # until it is looked up
                    self.overrides[name] = Override(account.override, None)
            while (len(self._accounts) > MAX_KEPT
                   or self._values > 5 * MAX_KEPT):
                _, account = self._accounts.popitem(last=False)
                self._values -= len(account.seen)
            for tab, rows, new in batch.merged:
                if self.tabs.get(tab.claim.identity) is not tab:
                    continue  # it has been forgotten
                del tab.rows[:len(rows)], tab.sums[:len(rows)]
                self._size -= len(rows)
                if tab.new == new:
                    self._size -= len(new)
                    tab.new.clear()
                if not tab.rows and not tab.new:
                    del self.tabs[tab.claim.identity]

    def _account(self, claim: Claim, now: float) -> Account:
        """Return what a claim's identity has used, as far as is known."""
        known = self._accounts.get(claim.identity, Account(claim))
        tab = self.tabs.get(claim.identity, Tab(claim, [], [(0, 0)], {}))
        now = max([now, *(row[1] - 0.5 for row in tab.rows[-1:])])
        flying = [other for charge in self.flying for other in charge.claims
                  if other.identity == claim.identity]
        account = Account(claim)
        if claim.value is not None:
            account = Variety(claim)
            account.seen = {**known.seen, **tab.new, **{
                str(other.value): math.ceil(now) for other in flying}}
        override = self.overrides.get(claim.identity)
        holds = override is not None and override.holds_at(now)
        own = override.limits if override and holds else known.own
        account.limits = claim.limits if own is None else own
        account.now, account.date = math.floor(now), math.ceil(now)
        account.total = sum(other.cost for other in flying)
        used = {limit.seconds: known.total - before for limit, before
                in zip(known.limits, known.before)
                if known.date > account.now - limit.seconds}
        account.before = tuple(
            -used.get(limit.seconds, 0) - tab.used(account.now - limit.seconds)
            for limit in account.limits)
        return account


class Ledger:
    """The counts of all identities, for any number of threads.

    Many requests, one commit: while one batch is on its way to the disk, all
    that come join the next, and whoever came first settles it.  So nobody
    settles more than one batch, no thread is needed for it, each answer is
    given after its own commit, and one connection alone pays nothing.

    A mail that the database does not take is judged in memory.  Once it hung,
    all are, but for one every timeout that tries whether it is back.
    """

    def __init__(self, database: Database, query: str | None = None) -> None:
        """Take the setting sql_limits_by_id."""
        self.database = database
        self.query = query
        self.standby = Standby()
        self._open = Batch()
        self._hung: LedgerError | None = None
        self._try_at = 0.0  # if it hung

    def charge(self, charge: Charge) -> Verdict:
        """Settle a mail: all its claims are charged, or none.

        Returns when that is on disk; else charge.error says why it is not,
        and the verdict is from memory.
        """
        while charge.verdict is None:  # or the batch was closed before us
            if self._hung is not None and not self.is_open(charge.now):
                with self.standby.lock:
                    if self._hung is not None:  # nobody was quicker
                        charge.error = self._hung
                        charge.verdict = self.standby.judge(charge)
                continue
            batch = self._open
            batch.charges.append(charge)
            with batch.lock:
                if batch is self._open:
                    self._settle(batch)
        return charge.verdict

    def is_open(self, now: float) -> bool:
        """Say whether the database does not hang; try that if it is time."""
        with self.standby.lock:
            if self._hung is None or time.monotonic() < self._try_at:
                return self._hung is None
            self._try_at = time.monotonic() + 5 * self.database.backend.timeout
        charges = self.standby.charges(now)
        self._settle(Batch(itertools.islice(charges, MERGE_STEP)))
        return self._hung is None

    def catch_up(self, now: float) -> None:
        """Write what was counted in memory, in steps, as long as that works.

        What is left has to wait: for its next mail, or the next call.
        """
        left, charges = math.inf, self.standby.charges(now)
        while 0 < len(self.standby.tabs) < left:
            left = len(self.standby.tabs)
            self._settle(Batch(itertools.islice(charges, MERGE_STEP)))

    def _settle(self, batch: Batch) -> None:
        """Settle a batch when the one before is done."""
        timeout, lock = self.database.backend.timeout, self.database.lock
        deadline = time.monotonic() + timeout
        held = lock.acquire(timeout=timeout)
        waited = batch is self._open
        if waited:  # from now on mails join the next
            self._open = Batch()
        try:
            if not held:
                self._finish(batch, LedgerError(TOO_SLOW), hung=True)
            elif self._hung is not None and waited:  # for one that hung
                self._finish(batch, self._hung, hung=True)
            else:
                self._transact(batch, deadline)
        finally:
            if held:
                lock.release()

    def _transact(self, batch: Batch, deadline: float) -> None:
        """Settle a batch in one transaction, or else singly."""
        half = time.monotonic() + self.database.backend.timeout / 2
        self.standby.flying = batch.charges
        try:
            self.database.transact(settle, batch, self.query, self.standby,
                                   deadline=deadline)
        except LedgerError as error:
            hung = time.monotonic() > min(half, deadline)
            if not error.undone or hung or len(batch.charges) < 2:
                self._finish(batch, error, hung)
                return
            for charge in batch.charges:  # one's failure must be no other's
                self._transact(Batch([charge]), deadline)
        else:
            self._finish(batch)

    def _finish(self, batch: Batch, error: LedgerError | None = None,
                hung: bool = False) -> None:
        """Hand out verdicts; judge in memory what the database did not."""
        with self.standby.lock:
            self._hung = error if hung else None
            if self.standby.flying is batch.charges:
                self.standby.flying = ()
            if error is None:
                self.standby.settled(batch)
            else:
                self._try_at = time.monotonic() + self.database.backend.timeout
                self.standby.keep(batch, sent=not error.undone)
                for charge in batch.charges[len(batch.verdicts):]:
                    batch.verdicts.append(self.standby.judge(charge))
        for charge, verdict in zip(batch.charges, batch.verdicts):
            charge.error, charge.verdict = error, verdict


def open_ledger(settings: Settings) -> Ledger:
    """Return the ledger that the settings name; it connects when used."""
    return Ledger(Database(
        BACKENDS[settings.backend](settings), prepare_tables),
        settings.sql_limits_by_id)


# ---------------------------------------------------------------------------
# 10. Service
#
# A request in, an action out: what the daemon is for.
# ---------------------------------------------------------------------------

COUNTED = ("requests", "passed", "refused", "database_errors",
           "judged_in_memory", "decision_seconds")


class Service:
    """Answers requests under settings that may be replaced at any time."""

    def __init__(self, settings: Settings, ledger: Ledger,
                 clock: Callable[[], float] = time.time,
                 alarm: Callable[..., int] = lambda *_: 1) -> None:
        """Take a clock, and an alarm, which counts the refusals."""
        self.settings = settings
        self.counts: dict[str, float] = dict.fromkeys(COUNTED, 0)
        self.ledger = ledger
        self.clock = clock
        self._alarm = alarm
        self._counted = -math.inf  # when a mail was last counted
        self._away = False  # the database
        self._lock = threading.Lock()  # of counts, and a change of _away

    def answer(self, request: Request, last: Last) -> str:
        """Return the action for a request, having counted its mail."""
        settings, now = self.settings, self.clock()  # until the answer
        queue_id = printable(request.queue_id) or "NOQUEUE"
        self._count("requests")
        if settings.log_requests:
            log.log(NOTICE, "%s: %s", queue_id, printable(", ".join(
                f"{name[:MAX_TOLD]}={value[:MAX_TOLD]}"
                for name, value in request.attributes.items() if value
                )[:40 * MAX_TOLD]))
        self._watch_state(request, settings, now)
        if last.covers(request):
            return last.action
        claims = claims_of(request, settings, last.counted)
        if not claims:
            log.info("%s: protocol_state=%s, not counted, action=%s", queue_id,
                     printable(request.protocol_state),
                     settings.success_action)
            return settings.success_action
        client, refused = printable(request.client_address)[:45], 0
        verdict, action = self._charge(Charge(
            claims, now, request.instance, request.protocol_state, client),
            settings)
        broken = verdict.broken
        usual = broken is None and not verdict.tried
        if broken is not None:
            action = explain(broken, verdict.room_at, now)
            with contextlib.suppress(Exception):  # the answer comes first
                refused = self._alarm(broken, client, settings, now)
        level = logging.INFO if usual else NOTICE
        if log.isEnabledFor(level):
            log.log(level, "%s: %s, action=%s", queue_id,
                    describe(verdict, client, refused), action)
        last.note(request, () if broken else claims, settings.success_action
                  if request.protocol_state == "RCPT" else action)
        return action

    def reload(self, settings: Settings) -> None:
        """Take new settings, for the next request of each connection."""
        self.settings = settings
        self.ledger.query = settings.sql_limits_by_id

    def _charge(self, charge: Charge, settings: Settings,
                ) -> tuple[Verdict, str]:
        """Return the ledger's verdict, and the action if the mail passes."""
        began = time.perf_counter()
        verdict = self.ledger.charge(charge)
        self._count("refused" if verdict.broken is not None else
                    "passed" if charge.error is None else
                    "database_errors", time.perf_counter() - began)
        if charge.error is not None:
            self._count("judged_in_memory")
            self.log_outage(charge.error)
            if verdict.usage or settings.sql_limits_by_id:
                return verdict, settings.db_error_action
        elif self._away and verdict.usage and verdict.broken is None:
            self.log_outage(None)  # what writes nothing tells nothing
        return verdict, settings.success_action

    def _count(self, name: str, seconds: float = 0) -> None:
        """Count a request, or a decision and the time it took."""
        with self._lock:
            self.counts[name] += 1
            self.counts["decision_seconds"] += seconds

    def _watch_state(self, request: Request, settings: Settings,
                     now: float) -> None:
        """Warn if Postfix asks only where count_mode never counts."""
        if is_counted(request.protocol_state, settings.count_mode):
            self._counted = now
        elif not self._counted <= now < self._counted + 3600:
            log.warning(
                "Postfix asks at protocol_state=%s, where count_mode %s counts"
                " nothing: nothing is limited; put this into main.cf: %s",
                printable(request.protocol_state), settings.count_mode,
                main_cf(settings.count_mode, settings.SOCKET), extra=SELDOM)

    def log_outage(self, error: LedgerError | None) -> None:
        """Say once that the database is away, and once that it is back."""
        away = error is not None
        with self._lock:
            if away == self._away:
                return
            self._away = away
        if away:
            log.error("the database is away: counting in memory, within the"
                      " limits the answer is %s: %s",
                      self.settings.db_error_action, error)
        else:
            log.warning("the database is back: counting again")


class Last:
    """What a connection was told of its last mail.

    Postfix may ask at RCPT, at DATA and at END-OF-MESSAGE of one mail; it
    counts where it first asks, and then is not counted again.
    """

    instance = state = action = ""
    counted: frozenset[str] = frozenset()  # keys of what counts ONCE, at RCPT

    def covers(self, request: Request) -> bool:
        """Say whether a mail was counted at an earlier state."""
        if not request.instance or request.instance != self.instance:
            self.counted = frozenset()
            return False
        if self.state != "RCPT" or len(self.counted) >= MAX_ATTRIBUTES:
            self.counted = frozenset()
        earlier, state = STATES.index(self.state), request.protocol_state
        if state == STATES[-1]:
            self.instance = ""  # this was its end
        return state in STATES[earlier + 1:]

    def note(self, request: Request, passed: Sequence[Claim],
             action: str) -> None:
        """Note the action for the states to come."""
        self.counted = self.counted.union([
            claim.identity for claim in passed if claim.rule.count in ONCE])
        self.instance, self.state, self.action = (
            request.instance, request.protocol_state, action)


# ---------------------------------------------------------------------------
# 11. Server
#
# Sockets and threads: one thread a connection, and a bound on everything
# that a stranger can send or keep open.
# ---------------------------------------------------------------------------

PLAIN = os.O_NOFOLLOW | os.O_NONBLOCK  # follow no link, wait at no FIFO


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
        answer, last = self.server.service.answer, Last()
        try:
            for request in read_requests(self.receive):
                self.asked, self.active = True, math.inf
                action = answer(request, last)
                self.request.sendall(f"action={action}\n\n".encode())
                self.active = time.monotonic()
                del request  # it may be large, and the next one far
        except BadRequest as error:
            log.warning("hung up on a client: %s", error, extra=SELDOM)
        except OSError:
            pass  # it went away, or was silent for too long
        finally:
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
    request_queue_size = 4096  # where it is full, Postfix is refused
    max_connections = 4000  # Postfix's default_process_limit is 100
    path: str | None = None  # of the unix socket, once it is ours

    def __init__(self, service: Service) -> None:
        """Bind and listen; raise AlreadyRunning, or OSError."""
        self.service = service
        self.handlers: set[PolicyHandler] = set()
        address = service.settings.SOCKET
        self.address_family = (
            socket.AF_UNIX if isinstance(address, str) else
            socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
        with (hold_lock(address) if isinstance(address, str)
              else contextlib.nullcontext()):  # others judge it stale
            super().__init__(address, PolicyHandler)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        """Bind, a unix socket with socket_permission from its first moment."""
        settings = self.service.settings
        if isinstance(settings.SOCKET, str):
            remove_stale_socket(settings.SOCKET)
        before = os.umask(0o777 & ~settings.socket_permission)
        try:
            super().server_bind()
        except OSError as error:  # which does not name it
            used = error.errno == errno.EADDRINUSE
            raise (AlreadyRunning if used else PolicydError)(
                f"{format_address(settings.SOCKET)}: {error}") from None
        finally:
            os.umask(before)
        if isinstance(settings.SOCKET, str):
            self.path, self.made = settings.SOCKET, os.lstat(settings.SOCKET)
        else:  # each connection inherits it
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection; make room where there is none."""
        if len(self.handlers) >= self.max_connections and not self.evict():
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
        for _ in range(10):
            try:
                return super().process_request(request, client_address)
            except RuntimeError:  # TasksMax of systemd, RLIMIT_NPROC
                self.evict()
                time.sleep(0.01)  # a thread that ended is not gone at once
        return self.shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what is a fault of ours; the client is hung up on."""
        log.error("fault in a connection", exc_info=True, extra=SELDOM)

    def evict(self) -> bool:
        """Hang up on who asked nothing for a second, else is idle longest.

        Never on who waits for an answer; say whether there is room now.
        """
        log.warning("too many connections: idle ones are closed", extra=SELDOM)
        recent = time.monotonic() - 1
        idle = [handler for handler in list(self.handlers)
                if handler.active < math.inf]
        idle.sort(key=lambda handler: (
            handler.asked or handler.active > recent, handler.active))
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
                self.path = None  # what comes there is another daemon's


@contextlib.contextmanager
def hold_lock(path: str) -> Iterator[None]:
    """Hold a path until the end, or raise AlreadyRunning.

    Who may read a file may lock it: this one is for its owner alone.
    """
    with open(path + ".lock", "w", opener=lambda name, flags: os.open(
            name, flags | PLAIN, 0o600)) as file:
        held = False  # stays so too while the one that had it ends
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(
                os.fstat(file.fileno()), os.lstat(file.name))
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


def check_socket(address: str | tuple[str, int]) -> None:
    """Raise OSError if a socket could not be bound to an address."""
    if not isinstance(address, str):
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        try:
            socket.create_server((address[0], 0), family=family).close()
        except OSError as error:  # which does not name it
            raise PolicydError(f"{format_address(address)}: {error}") from None
    elif len(os.fsencode(address)) > 107:  # unix(7), sun_path
        raise OSError(errno.ENAMETOOLONG, "too long a path", address)
    elif (os.path.lexists(address)
          and not stat.S_ISSOCK(os.lstat(address).st_mode)):
        raise FileExistsError(errno.EEXIST, "is not a socket", address)


def remove_stale_socket(path: str) -> None:
    """Remove a socket on which nobody listens; never one in use."""
    check_socket(path)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        error = probe.connect_ex(path)
    if error == errno.ECONNREFUSED:
        os.unlink(path)
    elif error in (0, errno.EAGAIN):  # the latter: it is busy
        raise AlreadyRunning(f"{path}: another process listens there")
    elif error != errno.ENOENT:
        raise OSError(error, os.strerror(error), path)


# ---------------------------------------------------------------------------
# 12. Upkeep
#
# Cleaning, and what an admin changes by hand: --limit, --block, --reset.
# ---------------------------------------------------------------------------

CLEAN_STEP = 1000  # rows that a transaction reads or deletes: some 10 ms
ASK_STEP = 20  # identities that one asks the query for: some 1 ms each
STORED_FOR = 2 * 86400  # seconds for which a window that a host stored counts
STORE_EVERY = 6 * 3600  # seconds; seven of these may fail


class HostWindow(NamedTuple):
    """The longest window of a host's limits, a row of mail_window."""

    host: str
    seconds: int
    query: str  # the hash of its sql_limits_by_id, "" if it has none
    since: int = 0  # when it was first stored, by the database's clock
    date: int = 0  # and when it was last stored


class Aging(NamedTuple):
    """A table whose rows belong to identities and are deleted when old."""

    table: str
    date: str  # the column
    least: int  # seconds for which rows are kept, whatever the limits


class Oldest(NamedTuple):
    """What one step of reading saw of an identity."""

    identity: str
    date: int
    rows: int


class Found(NamedTuple):
    """What a step of cleaning is to delete, and where the next one starts."""

    until: Mapping[str, int]  # for each identity the newest date to delete
    place: str | None  # the next identity is the one after it; None: no more


AGING = (
    Aging("mail_count", "date", 0), Aging("mail_value", "date", 0),
    Aging("mail_refused", "last", 35 * 86400))  # for monthly reports


def clean(database: Database, settings: Settings, now: int) -> Iterator[int]:
    """Delete what nobody needs; after each step yield how many records.

    No mail waits long for a step: it finds old rows by reading, which locks
    nothing, and then locks only what it deletes.  It goes through a table
    from identity to identity, up to the last that there was at the start, so
    that it ends however many are added meanwhile.
    """
    own = own_window(settings)  # outside of transactions: there may be many
    for aging in AGING:
        yield from clean_aging(database, settings, aging, own, now)
    yield from clean_turns(database)
    database.transact(delete_ended_limits, now)
    yield 0


def clean_aging(database: Database, settings: Settings, aging: Aging,
                own: HostWindow, now: int) -> Iterator[int]:
    """Delete rows that no limit of any host can see, step by step."""
    place: str | None = ""
    end = database.transact(last_identity, aging.table, reading=True)
    while place is not None and end is not None:
        found = database.transact(
            find_old, settings, aging, own, (place, end), now, reading=True)
        deleted = 0
        if found.until:
            deleted = database.transact(delete_old, aging, found.until)
        yield deleted
        place = found.place


def last_identity(transaction: Transaction, table: str) -> str | None:
    """Return the last identity in a table, None if that is empty."""
    [identity] = transaction.run(f"SELECT MAX(id) FROM {table}").fetchone()
    return None if identity is None else str(identity)


def find_old(transaction: Transaction, settings: Settings, aging: Aging,
             own: HostWindow, between: tuple[str, str], now: int) -> Found:
    """Find which of the next identities have rows that no limit sees."""
    server_now = server_time(transaction)
    now = min(now, server_now)  # if either clock is ahead, nothing is lost
    hosts = read_windows(transaction, server_now)
    if reason_to_wait(own, hosts, server_now):
        return Found({}, None)
    kept = max(aging.least, kept_for(max(
        [own.seconds, *(host.seconds for host in hosts)])))
    step = read_step(transaction, aging, between)
    if not step:
        return Found({}, None)
    old = [row.identity for row in step if row.date <= now - kept]
    place = step[-1].identity
    if settings.sql_limits_by_id and len(old) > ASK_STEP:
        old = old[:ASK_STEP]
        place = old[-1]
    overrides = read_limits_between(transaction, between[0], place)
    until = {}
    for identity in old:
        limits = ask_own_limits(
            transaction, settings.sql_limits_by_id, identity, overrides)
        if limits is not None:
            until[identity] = now - max([kept, *(
                kept_for(limit.seconds) for limit in limits)])
    if until and step[0].rows >= CLEAN_STEP:  # then there is no other
        return find_first_old(transaction, aging, Found(until, place), between)
    return Found(until, place)


def read_step(transaction: Transaction, aging: Aging,
              between: tuple[str, str]) -> list[Oldest]:
    """Read the next rows of a table; return their identities.

    The last identity is left to the next step if this one may have only a
    part of its rows; if it has more than a step can read, it stands alone.
    """
    step = [Oldest(*row) for row in transaction.run(
        "SELECT id, MIN(date), COUNT(*) FROM"
        f" (SELECT id, {aging.date} AS date FROM {aging.table}"
        " WHERE id > ? AND id <= ? ORDER BY id LIMIT ?) AS step"
        " GROUP BY id ORDER BY id", *between, CLEAN_STEP).fetchall()]
    if sum(row.rows for row in step) < CLEAN_STEP:
        return step
    if len(step) > 1:
        return step[:-1]
    [date] = transaction.run(
        f"SELECT MIN({aging.date}) FROM {aging.table} WHERE id = ?",
        step[0].identity).fetchone()
    return [step[0]._replace(date=date)]


def find_first_old(transaction: Transaction, aging: Aging, found: Found,
                   between: tuple[str, str]) -> Found:
    """Cut what was found of a large identity to as much as a step deletes."""
    [(identity, until)] = found.until.items()
    row = transaction.run(
        f"SELECT {aging.date} FROM {aging.table} WHERE id = ?"
        f" AND {aging.date} <= ? ORDER BY {aging.date} LIMIT 1 OFFSET ?",
        identity, until, CLEAN_STEP - 1).fetchone()
    if row is None:
        return found
    return Found({identity: row[0]}, between[0])  # the same identity again


def delete_old(transaction: Transaction, aging: Aging,
               until: Mapping[str, int]) -> int:
    """Delete old rows of identities; return how many."""
    by_date: dict[int, list[str]] = {}
    for identity, date in until.items():
        by_date.setdefault(date, []).append(identity)
    deleted = 0
    for date, identities in by_date.items():
        for some in chunks(identities, 100):  # as long a list as all drivers
            marks = ", ".join("?" * len(some))  # and servers take
            deleted += int(transaction.run(
                f"DELETE FROM {aging.table} WHERE id IN ({marks})"
                f" AND {aging.date} <= ?", *some, date).rowcount)
    return deleted


def kept_for(window: int) -> int:
    """Return for how long rows are kept, longer than any clock is ahead."""
    return max(2 * window, window + CLOCK_SKEW)  # twice as the original


def read_limits_between(transaction: Transaction, after: str, last: str,
                        ) -> dict[str, Limits | None]:
    """Return what --limit has set for some identities, even if it ended."""
    return {identity: parse_override(text) for identity, text in
            transaction.run("SELECT id, limits FROM mail_limit WHERE id > ?"
                            " AND id <= ?", after, last).fetchall()}


def ask_own_limits(transaction: Transaction, query: str | None, identity: str,
                   overrides: Mapping[str, Limits | None]) -> Limits | None:
    """Return what --limit and the query say; None if the query fails."""
    limits = overrides.get(identity) or ()
    if not query:
        return limits
    answer = transaction.attempt(
        QUERY_FAILED, lambda *given: [ask_limits(*given)], query, identity)
    if answer is None:
        return None
    return (*limits, *(answer[0] or ()))


def clean_turns(database: Database) -> Iterator[int]:
    """Delete turns of identities of which nothing is left, step by step."""
    place: str | None = ""
    end = database.transact(last_identity, "mail_turn", reading=True)
    while place is not None and end is not None:
        unused, place = database.transact(
            find_unused_turns, place, end, reading=True)
        if unused:  # one that is used by now is only made again
            database.transact(
                Transaction.write, "DELETE FROM mail_turn WHERE id IN ({})",
                [(identity,) for identity in unused])
        yield 0


def find_unused_turns(transaction: Transaction, place: str, end: str,
                      ) -> tuple[list[str], str | None]:
    """Return which of the next turns are unused, and the last one seen."""
    rows = transaction.run(
        "SELECT id, EXISTS (SELECT 1 FROM mail_count WHERE id = step.id)"
        " OR EXISTS (SELECT 1 FROM mail_value WHERE id = step.id)"
        " FROM (SELECT id FROM mail_turn WHERE id > ? AND id <= ?"
        " ORDER BY id LIMIT ?) AS step ORDER BY id",
        place, end, CLEAN_STEP).fetchall()
    last = rows[-1][0] if rows else None
    return [identity for identity, used in rows if not used], last


def delete_ended_limits(transaction: Transaction, now: int) -> None:
    """Delete limits of --limit that ended by whatever host's clock."""
    now = min(now, server_time(transaction))
    transaction.run("DELETE FROM mail_limit WHERE ends <= ?", now - STORED_FOR)


def own_window(settings: Settings) -> HostWindow:
    """Return what this host has to tell the others that share a database."""
    query = " ".join((settings.sql_limits_by_id or "").split())
    if query:
        query = hashlib.sha256(query.encode()).hexdigest()
    return HostWindow(
        shorten(socket.gethostname()), settings.longest_window, query)


def server_time(transaction: Transaction) -> int:
    """Return the database's time, which is the same for all hosts."""
    [now] = transaction.run(
        f"SELECT {transaction.backend.clock}").fetchone()
    return int(now)


def store_window(transaction: Transaction, own: HostWindow) -> None:
    """Store this host's longest window, and forget what no longer counts."""
    now = server_time(transaction)
    transaction.run("DELETE FROM mail_window WHERE date <= ? OR date > ?",
                    now - STORED_FOR, now + STORED_FOR)
    transaction.run(transaction.backend.store_window,
                    *own._replace(since=now, date=now), now)


def read_windows(transaction: Transaction, now: int) -> list[HostWindow]:
    """Return the windows that hosts stored in time, the last stored last."""
    return [HostWindow(*row) for row in transaction.run(
        "SELECT host, seconds, query, since, date FROM mail_window"
        " WHERE date > ? ORDER BY date, since", now - STORED_FOR).fetchall()]


def reason_to_wait(own: HostWindow, hosts: Sequence[HostWindow],
                   now: int) -> str:
    """Return why nothing can be deleted yet, "" if it can.

    After an upgrade, or when all hosts were down, each of them first needs
    the time to store its window.
    """
    start = min((host.since for host in hosts), default=now) + STORED_FOR
    if start > now:
        return (f"nothing is deleted before {moment(start)}: until then each"
                " host that shares this database can store its longest window")
    for host in hosts:
        if host.query not in ("", own.query):
            return (f"nothing is deleted: {printable(host.host)} has had"
                    " another sql_limits_by_id within two days, and only"
                    " that query knows which mails it needs")
    return ""


def read_reason_to_wait(transaction: Transaction, own: HostWindow) -> str:
    """Return the same, of the windows that are stored now."""
    now = server_time(transaction)
    return reason_to_wait(own, read_windows(transaction, now), now)


def describe_difference(own: HostWindow, hosts: Sequence[HostWindow]) -> str:
    """Return how the limits of other hosts differ, "" if they do not."""
    newest = {host.host: host for host in hosts if host.host != own.host}
    for host in newest.values():
        if host.query not in ("", own.query):
            return (f"sql_limits_by_id is not the same here and on"
                    f" {printable(host.host)}: as long as that is so, no"
                    " records are deleted by this host")
        if host.seconds != own.seconds:
            return ("hosts that share this database have different limits:"
                    f" the longest window is {spell(own.seconds)} here and"
                    f" {spell(host.seconds)} on {printable(host.host)};"
                    " records are kept for the longest")
    return ""


class Housekeeping:
    """What the daemon does between requests, a step at a time."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._settings: Settings | None = None  # whose window is stored
        self._store_at = 0.0  # when it is due again (time.monotonic())
        self._difference = ""  # between hosts, as it was last logged
        self._cleaning: Iterator[int] = iter(())

    def do_step(self) -> None:
        """Write what memory holds; drop a few rows that no limit sees."""
        service, ledger = self._service, self._service.ledger
        settings, now = service.settings, int(service.clock())
        if not ledger.is_open(now):
            return
        ledger.catch_up(now)
        try:
            ledger.standby.overrides = ledger.database.transact(
                read_overrides, now, reading=True)
            if (settings is not self._settings
                    or time.monotonic() >= self._store_at):
                self._store_window(ledger.database, settings)
            self._clean(ledger.database, settings, now)
        except LedgerError as error:
            service.log_outage(error)

    def _store_window(self, database: Database, settings: Settings) -> None:
        """Tell other hosts the longest window; log if theirs differ."""
        own = own_window(settings)
        database.transact(store_window, own)
        hosts = database.transact(
            lambda transaction: read_windows(
                transaction, server_time(transaction)), reading=True)
        difference = describe_difference(own, hosts)
        if difference and difference != self._difference:
            log.warning("%s", difference)
        self._difference = difference
        if settings is not self._settings:
            self._settings = settings
            self._cleaning = iter(())  # start anew, under these settings
        self._store_at = time.monotonic() + STORE_EVERY

    def _clean(self, database: Database, settings: Settings, now: int) -> None:
        """Do the next step of cleaning; after the last start again."""
        deleted = next(self._cleaning, None)
        if deleted is None:
            self._cleaning = clean(database, settings, now)
            deleted = next(self._cleaning)
        if deleted:
            log.info("%d old records deleted", deleted)


def set_override(transaction: Transaction, identity: str, override: Override,
                 now: int) -> None:
    """Give an identity other limits."""
    ends = PERMANENT if override.ends is None else override.ends
    drop_override(transaction, identity)
    transaction.run(
        "INSERT INTO mail_limit (id, limits, ends, made) VALUES (?, ?, ?, ?)",
        identity, json.dumps(override.limits), ends, now)


def drop_override(transaction: Transaction, identity: str) -> int:
    """Delete the other limits of an identity; return how many rows it had."""
    return int(transaction.run(
        "DELETE FROM mail_limit WHERE id = ?", identity).rowcount)


def forget(transaction: Transaction, identity: str) -> int:
    """Delete the mails of an identity; return how many were recorded."""
    take_turns(transaction, [identity])
    [mails] = transaction.run(
        "SELECT SUM(recipient_count) FROM mail_count WHERE id = ?",
        identity).fetchone()
    transaction.run("DELETE FROM mail_count WHERE id = ?", identity)
    values = transaction.run(
        "DELETE FROM mail_value WHERE id = ?", identity).rowcount
    return int(mails or 0) + int(values)


def check_counting(transaction: Transaction, query: str | None) -> None:
    """Raise an error where mails could not be counted; for --check."""
    backend = transaction.backend
    present = columns_of(transaction, "mail_count")
    if not are_complete(transaction):
        for statement in creations(backend):
            transaction.run(backend.try_table.format(statement))
    if present and "total" not in present and backend.try_total:
        transaction.run(backend.try_total)
    if query and (columns_of(transaction, "rate_limits")
                  or "rate_limits" not in query):  # else a start makes it
        try:
            ask_limits(transaction, query, "Zoë дима 😀")
        except Exception as error:
            raise LedgerError(f"sql_limits_by_id: {error}") from error


# ---------------------------------------------------------------------------
# 13. Reports and alerts
#
# What people are told.  No answer to Postfix waits for any of it.
# ---------------------------------------------------------------------------

MAIL_PATIENCE = 30  # seconds for a step of the mail server, or for a program
ALERTS_AN_HOUR = 20
ALERT_PAUSE = 3  # seconds before one that failed is tried again
ALERTS_KNOWN = 10000  # identities and windows remembered, of 300 bytes each


def send_reports(database: Database, settings: Settings) -> None:
    """Mail each address the refusals that it was not told of yet."""
    failed: dict[str, list[str]] = {}
    for key, address in {fold(to): to for to in settings.report_to}.items():
        try:
            owed = [(row, new) for row, new in database.transact(owed_to, key)
                    if new > 0 and row.seconds in settings.noted_windows]
            refused = [(row, new) for row, new in owed
                       if not rule_of(settings, row.identity).dry_run]
            if refused or not settings.report_only_if_needed:
                mail(settings, address, settings.report_subject,
                     report(refused))
            for some in chunks(owed, 100):  # the daemon waits for each
                database.transact(tell, [
                    (*row[:2], key, row.hits) for row, _ in some])
        except Exception as error:  # a strange address raises many kinds
            failed.setdefault(smtp_reason(error), []).append(address)
    if failed:
        raise CleanError("no report to " + "; ".join(
            f"{', '.join(some)}: {why}" for why, some in failed.items()))


def owed_to(transaction: Transaction, address: str,
            ) -> list[tuple[Refusal, int]]:
    """Return refusals, each with how many hits an address was not told."""
    told = {(identity, seconds): hits for identity, seconds, hits in
            transaction.run("SELECT id, seconds, hits FROM report_told"
                            " WHERE address = ?", address).fetchall()}
    return [(row, row.hits - told.get(row[:2], 0))
            for row in read_refusals(transaction)]


def tell(transaction: Transaction, rows: Sequence[Row]) -> None:
    """Keep the hits that addresses were told: rows of report_told."""
    for row in rows:
        transaction.later("DELETE FROM report_told WHERE id = ?"
                          " AND seconds = ? AND address = ?", *row[:3])
    transaction.write("INSERT INTO report_told (id, seconds, address, hits)"
                      " VALUES {}", rows)


def take_over(transaction: Transaction, now: int) -> None:
    """Take over the refusals that the original and 2.0.0 noted elsewhere."""
    hits: Counter[tuple[str, int]] = Counter()
    if columns_of(transaction, "report_owed"):
        # As if the one address had been told less than nothing.
        owed = transaction.run(
            "SELECT id, delta, address, -SUM(hit) FROM report_owed"
            " GROUP BY id, delta, address").fetchall()
        hits.update({(identity, window): 0 for identity, window, *_ in owed})
        tell(transaction, owed)
        transaction.run("DELETE FROM report_owed")
    if columns_of(transaction, "limit_report"):
        for identity, window, hit in transaction.run(
                "SELECT id, delta, hit FROM limit_report").fetchall():
            hits[fold(identity), window] += hit or 0
        transaction.run("DELETE FROM limit_report")
    transaction.write(transaction.backend.note, [
        (*key, -1, hits[key], now, now, "") for key in sorted(hits)])


def report(owed: Sequence[tuple[Refusal, int]]) -> str:
    """Return the text of a report, most hits first."""
    rows = [("identity", "limit", "hits", "last", "client")]
    rows += [(printable(row.identity), ratio(row), str(new), moment(row.last),
              row.client) for row, new in
             sorted(owed, key=lambda pair: (-pair[1], pair[0]))]
    return "Mails refused since the last report:\n\n" + "\n".join(
        (*align(rows), ""))


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
        start_tls_and_login(smtp, settings)
        smtp.send_message(message)
        with contextlib.suppress(OSError):  # it has the mail already
            smtp.quit()


def start_tls_and_login(smtp: smtplib.SMTP, settings: Settings) -> None:
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


def smtp_reason(error: Exception) -> str:
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
        self._queue: queue.Queue[tuple[
            Settings, tuple[str, int], dict[str, str]]] = queue.Queue(
                2 * ALERTS_AN_HOUR)
        self._lock = threading.Lock()
        # Of an identity and window: when refused last, how often since there
        # was a whole window without; when alerted, how often since then.
        self._known: dict[tuple[str, int], tuple[float, int, float, int]] = {}

    def refused(self, broken: Usage, client: str, settings: Settings,
                now: float) -> int:
        """Count a refusal; return how many there were in this window."""
        (mails, window), named = broken.limit, settings.report_limits
        key = broken.claim.identity, window
        with self._lock:
            last, count, alerted, since = self._known.pop(
                key, (-math.inf, 0, -math.inf, 0))
            count = count + 1 if abs(now - last) < window else 1
            due = (settings.alert and (named is None or window in named)
                   and abs(now - alerted) >= window)  # it may be set back
            self._known[key] = (now, count, *(
                (now, 0) if due else (alerted, since + 1)))
            if len(self._known) > ALERTS_KNOWN:
                del self._known[next(iter(self._known))]
        if not due:
            return count
        facts = {"identity": printable(broken.claim.identity),
                 "limit": f"{mails} mails in {window} s",
                 "since": moment(now),
                 "client_address": printable(client),
                 "refused_since_last_alert": str(since + 1)}
        with contextlib.suppress(queue.Full):  # the report will tell
            self._queue.put_nowait((settings, key, facts))
        return count

    def send(self) -> None:
        """Send alerts for ever, but not too many within an hour."""
        sent = deque([-math.inf] * ALERTS_AN_HOUR, ALERTS_AN_HOUR)
        silent = -math.inf  # when the notice went out that no more come
        while True:
            settings, key, facts = self._queue.get()
            now = self._clock()
            if now >= sent[0] + 3600:
                sent.append(now)
                if not send_alert(settings, facts):
                    self._take_back(key, facts)
            elif now >= silent + 3600:
                silent = now
                send_alert(settings, {
                    "notice": f"{ALERTS_AN_HOUR} alerts within an hour:"
                              " the rest is left to the report"})

    def _take_back(self, key: tuple[str, int], facts: dict[str, str]) -> None:
        """Let the next refusal alert, since nobody was told of these."""
        with self._lock:
            if key in self._known:
                last, count, _, since = self._known[key]
                since += int(facts["refused_since_last_alert"])
                self._known[key] = last, count, -math.inf, since


def send_alert(settings: Settings, facts: Mapping[str, str]) -> bool:
    """Alert all, once more whom it did not reach; say if it reached any."""
    targets = missed = settings.alert_command[:1] or settings.report_to
    for pause in (0, ALERT_PAUSE):
        if missed:
            time.sleep(pause)
        missed = tuple(target for target in missed
                       if not reach(target, settings, facts))
    return len(missed) < len(targets) or not targets


def reach(target: str, settings: Settings, facts: Mapping[str, str]) -> bool:
    """Run alert_command, or mail an address; say whether that worked."""
    subject = f"{PROGRAM} alert: {next(iter(facts.values()))}"
    text = "".join(f"{name}: {fact}\n" for name, fact in facts.items())
    try:
        if settings.alert_command:
            run_program(settings.alert_command, facts)
        else:
            mail(settings, target, subject, text)
    except Exception as error:  # the next one may take it
        log.warning("no alert to %s: %s", target, smtp_reason(error),
                    extra=SELDOM)
        return False
    return True


def run_program(command: Sequence[str], facts: Mapping[str, str],
                patience: float = MAIL_PATIENCE) -> None:
    """Run a program with facts in its environment; kill it if it hangs."""
    told = {f"POLICYD_{name.upper()}": fact for name, fact in facts.items()}
    with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, **told}) as child:
        try:
            code = child.wait(patience)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # and what it started
            code = child.wait()
    if code:
        raise OSError(f"exit status {code}")


# ---------------------------------------------------------------------------
# 14. Status
#
# What people see: who has used how much, and what the daemon counted.
# ---------------------------------------------------------------------------

FULL = "[##########]"  # of --status


class Window(NamedTuple):
    """A limit, and what an identity has used of it."""

    mails: int
    seconds: int
    used: int
    room_at: int | None  # when a mail passes again; None: now, or never
    noted: int  # refusals


class Standing(NamedTuple):
    """What an identity has used, and how often it was refused."""

    identity: str
    last_mail: int  # 0: none that is recorded
    source: str  # where its limits come from
    until: int | None  # when those of --limit end; None: they do not
    dry_run: bool  # are they only tried?
    limits: tuple[Window, ...]
    refusals: tuple[Refusal, ...]


def survey(transaction: Transaction, settings: Settings, now: int,
           *chosen: str) -> list[Standing]:
    """Read how identities stand: one, or all that there is something of."""
    # In two scans of the index, and without totals: the original has none.
    counted = "recipient_count" in columns_of(transaction, "mail_count")
    cost = "COALESCE(recipient_count, 1)" if counted else "1"
    tables = [f"(SELECT id, date, {cost} AS cost FROM mail_count) AS mails"]
    if columns_of(transaction, "mail_value"):
        tables.append("(SELECT id, date, 1 AS cost FROM mail_value) AS seen")
    where = "WHERE id = ?" if chosen else ""
    overrides, refused = read_notes(transaction, now, where, chosen)

    def read(*columns: str) -> Iterator[Row]:
        select = f"SELECT {', '.join(['id', *columns])} FROM"
        for table in tables:
            yield from transaction.run(
                f"{select} {table} {where} GROUP BY id", *chosen).fetchall()

    newest = dict.fromkeys(chosen or (*refused, *overrides), 0)
    newest.update(read("MAX(date)"))
    limited = {name: limits_of(transaction, settings, name, overrides)
               for name in newest}
    windows = sorted({limit.seconds for limits, *_ in limited.values()
                      for limit in limits})
    used = {name: dict(zip(windows, map(int, sums))) for name, *sums in read(
        *(f"SUM(CASE WHEN date > {now - window} THEN cost ELSE 0 END)"
          for window in windows))}
    standings = []
    for name, (limits, source, until, dry_run) in limited.items():
        uses = [used.get(name, {}).get(limit.seconds, 0) for limit in limits]
        rows = refused.get(name, ())
        hits = {row.seconds: row.hits for row in rows}
        if rows or name in overrides or chosen or any(uses):
            standings.append(Standing(
                name, newest[name], source, until, dry_run, tuple(
                    Window(*limit, use, room_at(
                        transaction, tables, name, limit, use, now),
                        hits.get(limit.seconds, 0))
                    for limit, use in zip(limits, uses)), rows))
    return standings


def read_notes(transaction: Transaction, now: int, where: str,
               chosen: Sequence[str],
               ) -> tuple[Overrides, dict[str, tuple[Refusal, ...]]]:
    """Read limits of --limit, and refusals: the original has neither."""
    if not columns_of(transaction, "mail_limit"):
        return {}, {}
    rows = read_refusals(transaction, f"{where} ORDER BY id, seconds", *chosen)
    return read_overrides(transaction, now), {
        name: tuple(some) for name, some in itertools.groupby(
            rows, operator.attrgetter("identity"))}


def limits_of(transaction: Transaction, settings: Settings, identity: str,
              overrides: Overrides) -> tuple[Limits, str, int | None, bool]:
    """Return limits, where from, until when, and if they are only tried."""
    rule = rule_of(settings, identity)
    if identity in overrides:
        limits, ends = overrides[identity]
        return limits, "--limit", ends, rule.dry_run
    query, own = settings.sql_limits_by_id, None
    if query and not rule.by:
        own = transaction.attempt(QUERY_FAILED, ask_limits, query, identity)
    if own is not None:
        return own, "sql_limits_by_id", None, rule.dry_run
    own = rule.limits_by_id.find(
        identity.partition("=")[2] if rule.by else fold(identity))
    source = "limits" if own is None else "limits_by_id"
    return (rule.limits if own is None else own,
            "quotas" if rule.by else source, None, rule.dry_run)


def room_at(transaction: Transaction, tables: Sequence[str], identity: str,
            limit: Limit, used: int, now: int) -> int | None:
    """Return when a mail passes again; None: it does now, or never."""
    over = used + 1 - limit.mails
    if over <= 0 or limit.mails == 0:
        return None
    rows = [row for table in tables for row in transaction.run(
        f"SELECT date, cost FROM {table} WHERE id = ? AND date > ?"
        " ORDER BY date LIMIT ?", identity, now - limit.seconds,
        over).fetchall()]
    for date, freed in sorted(rows):
        over -= freed
        if over <= 0:
            return int(date) + limit.seconds
    return None


class Tally:
    """Tells what the daemon counts: in the log, and in a file.

    --prometheus finds that beside the pidfile: it needs no database, whose
    errors it tells, and no protocol for strangers to ask by.
    """

    def __init__(self, pidfile: str, counts: Mapping[str, float]) -> None:
        """Take counts that go on."""
        self.path = pidfile + ".tally"
        self._counts = counts
        self._last = dict(counts)  # an hour ago
        self._began = time.monotonic()  # the hour

    def publish(self, asked: bool = False) -> None:
        """Write the file, and log a summary each hour or when asked."""
        counts, path = dict(self._counts), self.path + ".new"
        with contextlib.suppress(OSError):
            os.unlink(path)
        with contextlib.suppress(OSError):  # the daemon must go on
            with open(path, "x", encoding="utf-8") as file:  # follows no link
                json.dump(counts, file)
            os.replace(path, self.path)
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


def read_counts(pidfile: str) -> dict[str, float]:
    """Return what a running daemon has written, nothing if none runs."""
    try:
        with open(pidfile + ".tally", encoding="utf-8") as file:
            written = os.fstat(file.fileno()).st_mtime
            return json.load(file) if time.time() < written + 60 else {}
    except (OSError, ValueError) as error:
        if not isinstance(error, FileNotFoundError):
            log.warning("no counters of the daemon: %s", error)
        return {}


def show_metrics(database: Database, settings: Settings) -> Iterator[str]:
    """Yield the lines of --prometheus: of the daemon, then of identities."""
    counts, standings = read_counts(settings.pidfile), []
    metrics: dict[str, dict[str, float | str]] = {
        "up": {"": int(bool(counts))},
        **{f"{name}_total": {"": value} for name, value in counts.items()},
        "used": {}, "limit": {}, "refusals_total": {}, "limit_ends": {},
        "dry_run": {}}
    try:
        standings = database.look(survey, settings, int(time.time()))
    except LedgerError as error:
        log.warning("only the daemon's counters: %s", error)
    for standing in standings:
        for window in sorted(standing.limits, reverse=True):  # narrowest last
            labels = labels_of(standing, window.seconds)
            metrics["used"][labels] = window.used
            metrics["limit"][labels] = window.mails
        for row in standing.refusals:
            labels = labels_of(standing, row.seconds)
            metrics["refusals_total"][labels] = row.hits
        if standing.source == "--limit":
            metrics["limit_ends"][labels_of(standing)] = (
                "+Inf" if standing.until is None else standing.until)
        if standing.dry_run:
            metrics["dry_run"][labels_of(standing)] = 1
    for metric, values in metrics.items():
        name = f"policyd_rate_limit_{metric}"
        kind = "counter" if name.endswith("_total") else "gauge"
        yield f"# TYPE {name} {kind}"
        for labels, value in values.items():
            yield f"{name}{labels} {value}"


def labels_of(standing: Standing, *window: int) -> str:
    """Return the labels of a metric of an identity, or of its window."""
    name = re.sub(r'(["\\])', r"\\\1", printable(standing.identity))
    return f'{{identity="{name}"' + "".join(
        f',window="{seconds}"' for seconds in window) + "}"


def urgency(standing: Standing, now: int) -> tuple[float, ...]:
    """Return what puts an identity ahead of others: refused now, then full."""
    refused = max((row.hits for row in standing.refusals
                   if row.last + row.seconds > now), default=0)
    fullest = max([(window.used / (window.mails or 1), window.used)
                   for window in standing.limits], default=(0, 0))
    return refused, standing.source == "--limit", *fullest


def show_most(standings: Sequence[Standing], now: int) -> Iterator[str]:
    """Yield lines that show the first: what fits the terminal, or all."""
    columns, lines = shutil.get_terminal_size(
        (80 if sys.stdout.isatty() else 999, 0))
    rows: list[tuple[str, ...]] = [
        ("identity", "", "", "used", "refused", "last", "room", "until")]
    left = len(standings)
    for standing in standings:
        more = list(show_rows(standing, now))
        if lines and len(rows) + len(more) > lines - 2:  # and a prompt
            break
        rows += more
        left -= 1
    yield from align(rows, columns or 80)
    if left:
        yield f"and {left} more: --status ID shows one, --json all"


def show_rows(standing: Standing, now: int) -> Iterator[tuple[str, ...]]:
    """Yield the cells that show an identity, its refusals in the first row."""
    hits = sum(row.hits for row in standing.refusals)
    last = max((row.last for row in standing.refusals), default=0)
    first = [str(hits or ""), short(last, now)]
    until = "dry_run" if standing.dry_run else ""
    if standing.source == "--limit":
        until = ("permanent" if standing.until is None
                 else short(standing.until, now))
    name = printable(standing.identity)
    for window in standing.limits or [None]:
        yield (name, *(show_window(window) if window else ("", "", "")),
               *first, short(window and window.room_at, now), until)
        name, first, until = "", ["", ""], ""


def show_one(standing: Standing, places: Mapping[tuple[str, ...], str],
             ) -> Iterator[str]:
    """Yield the lines that tell all about one identity."""
    last = standing.last_mail
    yield printable(standing.identity)
    yield f"last mail: {moment(last) if last else 'none'}"
    found = [names for names in places if names[:1] == (standing.source,)
             and fold(names[-1]) in (standing.source, standing.identity)]
    where = (term(standing.until) if standing.source == "--limit" else
             places[max(found, key=len)] if found else "the default")
    yield (f"limits, from {standing.source} ({where})"
           f"{', only tried' if standing.dry_run else ''}:")
    for window in standing.limits:
        span, bar, used = show_window(window)
        room = f"room at {moment(window.room_at)}" if window.room_at else ""
        yield f"  {span:>4} {bar} {used:<11} {room}".rstrip()
    if standing.refusals:
        yield from align([("refused", "by", "since", "last", "client"), *(
            (str(row.hits), ratio(row), moment(row.first), moment(row.last),
             row.client) for row in standing.refusals)])


def show_window(window: Window) -> tuple[str, str, str]:
    """Return a limit's window, a bar of what is used, and the figures."""
    mails, seconds, used = window.mails, window.seconds, window.used
    bar = f"[{'#' * min(10, math.ceil(10 * used / max(mails, 1))):.<10}]"
    size, unit = next((size, unit) for size, unit in (
        (86400, "d"), (3600, "h"), (60, "m"), (1, "s")) if seconds % size == 0)
    return f"{seconds // size}{unit}", bar, f"{used}/{mails}"


def short(date: int | None, now: int) -> str:
    """Return a time as a table shows it: of today the time, else the date."""
    if not date:
        return ""
    day, today = time.localtime(date), time.localtime(now)
    return time.strftime("%H:%M" if day[:3] == today[:3] else "%Y-%m-%d", day)


# ---------------------------------------------------------------------------
# 15. Configuration file
#
# YAML, as much of it as such files hold, or the assignments of an old .conf;
# then -o; then the checks of the Settings table.
# ---------------------------------------------------------------------------

CONFIG_FILES = (
    "~/.config/policyd-rate-limit.conf", "~/.config/policyd-rate-limit.yaml",
    "/etc/policyd-rate-limit.conf", "/etc/policyd-rate-limit.yaml")
Lines = dict[tuple[str, ...], int]  # of a setting, or of an entry in one


class Config(NamedTuple):
    """What the configuration says, before it is checked."""

    path: str | None
    values: dict[str, Any]
    places: dict[tuple[str, ...], str]  # the file and line, or the option

    def place(self, *names: str) -> str:
        """Return where a setting is, or an entry in it."""
        while names and names not in self.places:
            names = names[:-1]
        return self.places.get(names) or str(self.path)


class MissingFile(ConfigError):
    """No configuration file was found."""


def read_config(path: str | None) -> Config:
    """Read a configuration file, the first that there is if path is None."""
    path, text = read_first([path] if path else [
        os.path.expanduser(name) for name in CONFIG_FILES])
    parse = read_conf if path.endswith(".conf") else read_yaml
    values, lines = parse(text, path)
    if "limited_netword" in values:  # as the original once spelt it
        values.setdefault("limited_networks", values.pop("limited_netword"))
        lines.setdefault(("limited_networks",), lines["limited_netword",])
    config = Config(path, values, {
        names: f"{path}:{line}" for names, line in lines.items()})
    known = default_values()
    for name in map(str, values):  # old files carry old names: only warn
        if name not in known and name != "config_file":
            close = difflib.get_close_matches(name, known, 1)
            log.warning("%s: %s: no such setting%s", config.place(name), name,
                        f"; is {close[0]} meant?" if close else "")
    return config


def read_first(paths: Sequence[str]) -> tuple[str, str]:
    """Return the first path with a file that can be read, and its text."""
    for path in paths:
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                return path, file.read()
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            if len(paths) == 1:
                raise ConfigError(f"{path}: cannot be read: {error}") from None
            log.warning("%s: skipped, it cannot be read: %s", path, error)
    raise MissingFile(
        f"no configuration file found; looked for {', '.join(paths)}")


def read_yaml(text: str, path: str) -> tuple[dict[str, Any], Lines]:
    """Read YAML; what our reader refuses, PyYAML reads if it is there."""
    try:
        values, lines = parse_yaml(text)
    except YamlError as refused:
        try:
            values, lines = parse_with_pyyaml(text)
        except Exception as error:  # else ours names the line just as well
            why = error if isinstance(error, YamlError) else refused
            raise ConfigError(f"{path}:{why.line}: {why}") from None
    if not isinstance(values, (dict, type(None))):
        raise ConfigError(f"{path}: found {show(values)},"
                          " expected lines NAME: VALUE")
    return values or {}, lines


def parse_with_pyyaml(text: str) -> tuple[object, Lines]:
    """Do the same as parse_yaml; raise any error."""
    import yaml
    loader: Any = yaml.SafeLoader(text)
    known = loader.yaml_implicit_resolvers
    loader.yaml_implicit_resolvers = {
        **known, "0": [("tag:yaml.org,2002:str", YAML_ZERO), *known["0"]]}
    root, lines = loader.get_single_node(), Lines()
    nodes: list[tuple[tuple[str, ...], Any]] = [((), root)]
    seen: set[int] = set()  # or aliases of aliases are without end
    for names, node in nodes:  # which grows
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                nodes.append(((*names, str(key.value)), value))
                note_line(lines, nodes[-1][0], key.start_mark.line + 1)
        elif isinstance(node, yaml.SequenceNode):
            nodes += [((*names, str(place)), item)
                      for place, item in enumerate(node.value)]
    return root and loader.construct_document(root), lines


def note_line(lines: Lines, names: tuple[str, ...], line: int) -> None:
    """Note where a key is; refuse the second of two that are the same."""
    if names in lines:
        raise YamlError(f"{names[-1]} is given twice, in line {lines[names]}"
                        " before", line)
    lines[names] = line


def read_conf(text: str, path: str) -> tuple[dict[str, Any], Lines]:
    """Read the assignments of an old .conf, which is Python; run nothing."""
    log.warning("%s: this format is obsolete; write YAML", path)
    text = re.sub("\r\n?", "\n", text)  # as Python counts lines
    try:
        body: list[Any] = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None) or 1
        raise ConfigError(f"{path}:{line}: not Python: {error}") from None
    known: dict[str, Any] = {"SQLITE_DB": 0, "MYSQL_DB": 1, "PGSQL_DB": 2}
    values: dict[str, Any] = {}
    lines: Lines = {}
    for node in body:
        try:
            [target] = node.targets
            values[target.id] = evaluate(node.value, known | values)
            lines[(target.id,)] = node.lineno
        except Exception:  # it may be any statement of Python
            log.warning("%s:%d: skipped: it is not NAME = VALUE: %s",
                        path, node.lineno,
                        text.split("\n")[node.lineno - 1].strip()[:60])
    return values, lines


ARITHMETIC: Mapping[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv,
    ast.USub: operator.neg}


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
    place = f"-o {text}"
    if not equals or top not in default_values():
        raise ConfigError(
            f"{place}: expected NAME=VALUE with the name of a setting")
    try:
        parsed, _ = parse_yaml(value)
    except YamlError as error:
        raise ConfigError(f"{place}: {error}") from None
    if config.values.get(top) is None:
        config.values[top] = default_values()[top]
    mapping, key = descend(config.values, name)
    if mapping is config.values and key != top:
        raise ConfigError(f"{place}: {top} holds no names")
    mapping[key] = parsed
    changed = (top,) if key == top else (top, key)
    for names in config.places:
        if names[:len(changed)] == changed:
            config.places[names] = place
    config.places[top,] = config.places[changed] = place


def descend(values: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
    """Return the mapping and the key in it that a dotted name means."""
    head, _, rest = name.partition(".")
    if name in values or not isinstance(values.get(head), dict):
        return values, name
    return descend(values[head], rest)


def default_values() -> dict[str, Any]:
    """Return all settings' defaults, as a file would have them."""
    return {entry.name: copy.copy(entry.metadata["default"])
            for entry in fields(Settings)}


def check_settings(config: Config) -> Settings:
    """Return the settings, or raise what says which one is wrong."""
    values = {}
    for entry in fields(Settings):
        value = config.values.get(entry.name)
        if value is None:
            continue  # left out or left empty: the default holds
        try:
            values[entry.name] = check_entry(
                entry.metadata["check"], value, entry.name)
        except Wrong as error:
            place, *others = [config.place(*names) for names in error.args[1:]]
            also = "".join(f" ({other})" for other in others)
            raise entry.metadata["error"](
                f"{place}: {error.args[0]}{also}") from None
    return Settings(**values)


YAML_DEPTH = 50  # levels of nesting
YAML_DASH = ("- ", "-\t", "-\n")  # starts an item
YAML_KEY = 1024  # characters in a key, PyYAML's own bound
YAML_WORDS = {"yes": True, "true": True, "on": True, "no": False,
              "false": False, "off": False, "null": None, "~": None}
# Beside each pattern: an example that it takes, and one that it does not.
YAML_FLOAT = re.compile(r"[-+]?[0-9]{1,15}\.[0-9]{0,15}")  # "1.5", not "1e5"
YAML_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,17})")  # "-12", not "1_0"
YAML_ZERO = re.compile(r"0[0-9]+\Z")  # "0666", not "0": text
YAML_ODD = re.compile(r"""  # "1:30", not "1.2.3": text, but not to all readers
    (?! (?:[0-9]{1,4}:){7}[0-9]+$ )  # an IPv6 address is text to us
    [-+]? \.?[0-9][0-9_]* (?: :[0-9]{1,2} )*  # 1_0 and 1:30, which is 90
          (?: \.[0-9_]* )? (?: [eE][-+]?[0-9]+ )?  # 1.5 1e5
  | [-+]? (?: 0[bx][0-9a-fA-F_]+ | \.(?i:inf|nan) )  # 0x1F .inf
  | [0-9]{4} - [0-9]{1,2} - [0-9]{1,2} (?: [Tt\ ].* )?  # 2024-12-31
  | << | =
""", re.VERBOSE)
# Control characters, half characters, line ends few would expect, and marks
# of where a document starts or ends; but one --- may come first, ... last.
YAML_BAD = re.compile(  # "\a", not "a"
    r"[^\t\n -~\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
    r"|[\u2028\u2029\ufeff]|^(?:---|\.\.\.)(?=[ \t\n])", re.MULTILINE)
YAML_START = re.compile(  # "# a\n---\n", not "a\n---\n"
    r"\A(?P<before>(?: *(?:#.*)?\n)*)---(?: +#.*| *)\n")
YAML_END = re.compile(  # "...\n# a\n", not "...\na\n"
    r"^\.\.\.(?: +#.*| *)\n(?: *(?:#.*)?\n)*\Z", re.MULTILINE)
# To the next thing to read, and the same to one on a later line.
YAML_GAP = re.compile(r"(?: *(?:#.*)?\n)* *")  # " # a\n ", not "a"
YAML_EOL = re.compile(r"(?: *(?:#.*)?\n)+ *")  # " # a\n ", not " "
YAML_ESCAPE = re.compile(  # "\\x41", not "A": also space, and a line's end
    r"\\(?:(?P<code>x..|u....)|\n[ \t]*|(?P<sign>.))"
    r"|[ \t]*\n(?P<blank>(?:[ \t]*\n)*)[ \t]*|[ \t]+")


@functools.cache  # "it's\n  a:b", not "a: b"
def text_pattern(flow: bool, indent: int) -> re.Pattern[str]:
    """Return what matches a text, quoted or words, and a key's colon.

    Its further lines are indented by more than a number of spaces.  A colon
    before a space ends a text; inside brackets, more characters do.
    """
    deeper = f" {{{indent + 1},}}"
    line = rf"\n(?=[ \t]*\n|{deeper})"
    double = (rf'"(?:[^"\\\n]|{line}|\\\n(?={deeper}[^ \t\n])|\\(?:["\\/nt ]'
              r'|x[0-9A-Fa-f]{2}|u(?![Dd][89A-Fa-f])[0-9A-Fa-f]{4}))*"')
    single = rf"'(?:[^'\n]|''|{line})*'(?!')"
    first = r"(?![][{},#&*!|>'\"%@`]|[-?][ \t\n])"
    char, colon = r"(?:[^ \t\n:]|:(?![ \t\n]))", r" *:(?=[ \t\n])"
    if flow:
        first = "(?!:)" + first
        char, colon = r"(?:[^][{},? \t\n:]|:(?![][{},? \t\n]))", " *:"
    words = rf"{char}+(?: +(?!\#){char}+)*"
    more = rf" *\n(?: *\n)*{deeper}(?!\#){words}(?!{char}|{colon})"
    return re.compile(rf"(?P<text>{double}|{single}|{first}{words}(?:{more})*)"
                      rf"(?P<colon>{colon})?")


class YamlError(Exception):
    """Say what in a document cannot be read, and on which line."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


def parse_yaml(text: str) -> tuple[object, Lines]:
    """Return the document's value and the line of each key by its path."""
    reader = YamlReader(text)
    value = reader.read(nest=True) if reader.column() >= 0 else None
    if reader.column() >= 0:
        reader.refuse("wrong indentation, or several lines of text:")
    return value, reader.lines


def unescape(found: re.Match[str]) -> str:
    """Return what an escape means, or the end of a line; space stays."""
    sign, code = found["sign"], found["code"]
    if sign or code:
        return (chr(int(code[1:], 16)) if code else
                {"n": "\n", "t": "\t"}.get(sign, sign))
    if found["blank"] is None:
        return "" if "\n" in found[0] else found[0]
    return "\n" * found["blank"].count("\n") or " "


class YamlReader:
    """Read a document; each method goes on from the position reached."""

    def __init__(self, text: str) -> None:
        """Check the characters, blank out --- and ..., find the start."""
        text = text.removeprefix("\ufeff").replace("\r\n", "\n")
        text = YAML_START.sub(r"\g<before>\n", text.rstrip("\n") + "\n")
        self.text = YAML_END.sub("\n", text)
        self.pos, self.line = 0, 1
        self.indent = -1  # the column of the keys or dashes around
        self.names: list[str] = []  # the keys of what is being read
        self.lines: Lines = {}
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

    def at_text(self, flow: bool) -> re.Match[str] | None:
        """Return the text that comes next, with the colon behind it."""
        return text_pattern(flow, self.indent).match(self.text, self.pos)

    def read(self, flow: bool = False, nest: bool = False) -> Any:
        """Read a value and, if it may nest, all lines that belong to it."""
        if len(self.names) == YAML_DEPTH:
            self.refuse(f"more than {YAML_DEPTH} levels of nesting:")
        text = self.at_text(flow)
        if nest and (self.at(*YAML_DASH) or text and text["colon"]):
            return self.read_block()
        if self.at("[", "{"):
            value = self.read_flow()
        elif text and not text["colon"]:
            value = self.read_text(text["text"])
            self.skip(text.re)  # over this text
        else:
            self.refuse("put quotes around")
        if not flow:
            self.skip(YAML_EOL)
        return value

    def read_block(self) -> Any:
        """Read the lines that start with a dash, or a key, in this column."""
        found: dict[Any, Any] = {}  # the keys of a list are its places
        column, dash = self.column(), self.at(*YAML_DASH)
        around, self.indent = self.indent, column
        while self.column() == column and self.at(*YAML_DASH) == dash:
            key = len(found) if dash else self.read_key(flow=False)
            self.names.append(str(key))
            self.pos += 1  # over the dash or colon
            line = self.line
            self.skip(YAML_GAP)
            below = self.line > line
            least = column + (dash or not self.at(*YAML_DASH))
            empty = below and self.column() < least
            found[key] = None if empty else self.read(nest=dash or below)
            self.names.pop()
        self.indent = around
        return list(found.values()) if dash else found

    def read_flow(self) -> Any:
        """Read [a, b] or {a: b, c: d}, on one line or more."""
        found: dict[Any, Any] = {}
        close, more = "]" if self.at("[") else "}", True
        while more:
            self.pos += 1  # over the bracket or comma
            self.skip(YAML_GAP)
            if self.at(close):
                break
            key, empty = len(found), False
            if close == "}":
                key = self.read_key(flow=True)
                self.pos += 1
                self.skip(YAML_GAP)
                empty = self.at(",", "}")
            self.names.append(str(key))
            found[key] = None if empty else self.read(flow=True)
            self.names.pop()
            self.skip(YAML_GAP)
            more = self.at(",")
        if not self.at(close):
            self.refuse(f"no , or {close} before")
        self.pos += 1
        return list(found.values()) if close == "]" else found

    def read_key(self, flow: bool) -> Any:
        """Read a key, up to its colon."""
        found = self.at_text(flow)
        if (not found or not found["colon"] or "\n" in found[0]
                or len(found[0]) > YAML_KEY + 1):
            self.refuse("not `key: value` (no quotes?):")
        if found["text"].endswith(":") and not found["text"].endswith("::"):
            self.refuse("put quotes around")  # as in `- fe80::`
        key = self.read_text(found["text"])
        note_line(self.lines, (*self.names, str(key)), self.line)
        self.pos = found.end() - 1
        return key

    def read_text(self, text: str) -> Any:
        """Turn a text, quoted or not, into its value."""
        if text[0] == '"':
            return YAML_ESCAPE.sub(unescape, text[1:-1])
        text = YAML_ESCAPE.sub(unescape, text.replace("\\", "\\\\"))
        if text[0] == "'":
            return text[1:-1].replace("''", "'")
        word = text.lower()
        if word in YAML_WORDS and text in (word, word.title(), word.upper()):
            return YAML_WORDS[word]
        if YAML_INT.fullmatch(text):
            return int(text)
        if YAML_FLOAT.fullmatch(text):
            return float(text)
        if YAML_ODD.fullmatch(text) and not YAML_ZERO.fullmatch(text):
            self.refuse("put quotes around")
        return text

    def refuse(self, why: str) -> NoReturn:
        """Refuse what stands here, for the reason given or a better one."""
        rest = self.text[self.pos:self.pos + 60].split("\n")[0]
        if self.at("\t"):
            why = "write spaces instead of a tab:"
        elif self.at("'", '"') and not self.at_text(flow=False):
            why = "close the quotes on the same line, write \\ as \\\\:"
        raise YamlError(f"{why} {rest or 'the end'}",
                        min(self.line, self.text.count("\n")))


# ---------------------------------------------------------------------------
# 16. Process
#
# What root does before it stops being root, the pidfile, signals, systemd.
# ---------------------------------------------------------------------------

CLEAN_PAUSE = 10  # seconds between two steps of the daemon's cleaning
# What a reload cannot change, since it was used up at the start.
FIXED = ("user", "group", "pidfile", "SOCKET", "socket_permission", "backend",
         "sqlite_config", "mysql_config", "pgsql_config", "db_timeout")
FOR_POSTFIX = 0o711  # a folder's mode until group postfix has it: then 0750
Owner = Optional[pwd.struct_passwd]  # whom root becomes, None to stay


def find_owner(settings: Settings, standalone: str | None) -> Owner:
    """Return the user, with the group of the settings; raise UnknownUser."""
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
    return pwd.struct_passwd((*user[:3], group.gr_gid, *user[4:]))


def drop_root(owner: Owner) -> None:
    """Give up root's rights for good, and check that they are gone."""
    os.umask(0o077)
    if owner is None:
        return
    uid, gid = owner.pw_uid, owner.pw_gid
    os.initgroups(owner.pw_name, gid)
    os.setgid(gid)
    os.setuid(uid)
    if os.getresuid() != (uid,) * 3 or os.getresgid() != (gid,) * 3:
        raise PolicydError("could not give up the rights of root")
    os.environ["HOME"] = owner.pw_dir  # where database drivers look for files


def folders(settings: Settings) -> Mapping[str, int]:
    """Return the folders that a start needs, and the modes to make them."""
    modes = {path: 0o755 for path in [settings.pidfile]
             if path != os.devnull}
    if settings.backend == 0:
        modes[settings.sqlite_config["database"]] = 0o750
    if isinstance(settings.SOCKET, str):
        modes[settings.SOCKET] = FOR_POSTFIX
    return {os.path.dirname(os.path.abspath(path)): mode
            for path, mode in modes.items()}


def make_folders(settings: Settings, owner: Owner) -> None:
    """Make the folders that are missing, and hand them to their owner."""
    os.umask(0o022)
    for folder, mode in folders(settings).items():
        if not os.path.isdir(folder):
            os.makedirs(folder, mode)
        elif owner is None or not is_volume(folder):
            continue
        # The daemon's user may put a link there at any moment.
        opened = os.open(folder, os.O_DIRECTORY | os.O_NOFOLLOW)
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, opened)
            if owner is not None:
                os.fchown(opened, owner.pw_uid, owner.pw_gid)
            if mode == FOR_POSTFIX:
                stack.enter_context(
                    contextlib.suppress(KeyError, PermissionError))
                os.fchown(opened, -1, grp.getgrnam("postfix").gr_gid)
                os.fchmod(opened, 0o750)


def is_open(settings: Settings) -> bool:
    """Say whether any account of this host may connect."""
    if not isinstance(settings.SOCKET, str):
        return True
    above = pathlib.Path(os.path.abspath(settings.SOCKET)).parents
    shuts = os.geteuid() == 0 and any(  # what it is going to make
        group.gr_name == "postfix" for group in grp.getgrall())
    return bool(settings.socket_permission & 0o2) and all(
        os.stat(path).st_mode & 0o1 if os.path.isdir(path) else not shuts
        for path in above)


def is_volume(folder: str) -> bool:
    """Say whether a folder is root's and empty, as a container's volume."""
    status = os.lstat(folder)  # of a link too, which is no folder
    return (stat.S_ISDIR(status.st_mode) and status.st_uid == 0
            and status.st_mode & 0o222 == 0o200  # else as /tmp has, or shut
            and not os.listdir(folder))


@contextlib.contextmanager
def hold_pidfile(path: str, owner: Owner) -> Iterator[None]:
    """Write the pidfile and hold it until the end; raise AlreadyRunning."""
    if path == os.devnull:
        yield  # there is to be no pidfile
        return
    with hold_lock(path):  # else it is stale, whatever process has its id
        with open(path, "w", opener=lambda name, flags: os.open(
                name, flags | PLAIN, 0o644)) as file:
            file.write(f"{os.getpid()}\n")
            if owner is not None:
                os.fchown(file.fileno(), owner.pw_uid, owner.pw_gid)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)


def serve(settings: Settings, owner: Owner,
          announce: Callable[[Any], None],  # an address for clients
          read: Callable[[], Settings]) -> None:
    """Run the daemon until a signal ends it."""
    make_folders(settings, owner)
    alarm = Alarm()
    ledger = open_ledger(settings)
    service = Service(settings, ledger, alarm=alarm.refused)
    tally = Tally(settings.pidfile, service.counts)
    ended: list[int] = []  # by which signals
    with catch_signals() as signals, \
            contextlib.closing(ledger.database), \
            PolicyServer(service) as server, \
            hold_pidfile(settings.pidfile, owner):
        if owner is not None and server.path is not None:
            os.lchown(server.path, owner.pw_uid, owner.pw_gid)
        drop_root(owner)
        tell_command(settings)
        keep_to_one_processor()
        server.max_connections = max(16, min(
            server.max_connections, raise_file_limit() - 64))
        housekeeping = Housekeeping(service)
        housekeeping.do_step()  # opens the ledger, and says if it cannot
        for number in signal.SIGINT, signal.SIGTERM, signal.SIGUSR1:
            signal.signal(number, lambda number, _: ended.append(number))
        threading.stack_size(512 * 1024)  # address space, not memory
        threading.Thread(target=server.serve_forever, args=(0.1,),
                         daemon=True).start()
        threading.Thread(target=alarm.send, daemon=True).start()
        announce(server.server_address)
        notify("READY=1")
        run_until_signal(signals, ended, service, housekeeping, tally,
                         read)
        notify("STOPPING=1")
        server.stop(2 * settings.db_timeout + 2)
        ledger.catch_up(time.time())
        with contextlib.suppress(OSError):
            os.unlink(tally.path)


def catch_signals() -> socket.socket:
    """Return a socket from which signals' numbers come.

    Whatever thread the kernel gives a signal to, this wakes the main one at
    once; with a queue it would see it when the next cleaning is due.
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

    Python runs one of them at a time; to hand over to another processor costs
    a third to a half of the speed at 16 connections.
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


def run_until_signal(signals: socket.socket, ended: Sequence[int],
                     service: Service, housekeeping: Housekeeping,
                     tally: Tally,
                     read: Callable[[], Settings]) -> None:
    """Reload at HUP, sum up at USR2 until ended; clean meanwhile."""
    numbers = b""
    while not ended:
        tally.publish(asked=signal.SIGUSR2 in numbers)
        numbers = b""
        try:
            numbers = signals.recv(4096)  # a storm of them is one
        except socket.timeout:
            housekeeping.do_step()
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
    tell_command(new)
    service.reload(new)
    log.log(NOTICE, "configuration reloaded")


def tell_command(settings: Settings) -> None:
    """Warn if this user, no longer root, cannot run alert_command."""
    for program in settings.alert_command[:settings.alert]:
        if not shutil.which(program):
            log.warning("alert_command: %s: not there or not executable",
                        program)


def notify(state: str) -> None:
    """Tell systemd a state (sd_notify(3)), where there is a systemd."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address.startswith("@"):  # the abstract namespace
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as message, \
            contextlib.suppress(OSError):
        message.sendto(state.encode(), address)


# ---------------------------------------------------------------------------
# 17. Command line
#
# The options, what each of them does, and the exit status.
# ---------------------------------------------------------------------------

UNIT = f"/etc/systemd/system/{PROGRAM}.service"
NO_RELOAD = ("%s: %s cannot read it, so a reload will fail, or a start by"
             " systemd")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    sys.stdout = sys.stdout or io.StringIO()  # None: the caller closed it
    logging.basicConfig(format="%(levelname)s%(message)s", level=NOTICE)
    logging.raiseExceptions = False  # a full disk under the log stops nothing
    journal = sys.stderr is not None and os.environ.get(
        "JOURNAL_STREAM") == "{0.st_dev}:{0.st_ino}".format(os.fstat(2))
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
        with contextlib.ExitStack() as options.at_end:
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
    one_of = parser.add_mutually_exclusive_group().add_argument
    one_of("--clean", action="store_true",
           help="clean old records from the database, and send the report")
    one_of("--check", action="store_true",
           help="check the configuration, the folders and the database")
    one_of("--prometheus", action="store_true", help="show who has used how"
           " much, and what the daemon has counted, for node_exporter")
    one_of("--get-config", metavar="PARAMETER_NAME",
           help="return the value of a config parameter")
    one_of("--status", metavar="ID", nargs="?", const="",
           help="show who has used how much, or all about one identity")
    one_of("--reset", metavar="ID", help="forget what an identity has used")
    one_of("--limit", nargs=2, metavar=("ID", "LIMITS"), help="give an"
           " identity other limits at once, such as 500/day or 10/min,90/h")
    one_of("--block", metavar="ID", help="let no mail of an identity pass")
    one_of("--unlimit", metavar="ID", help="end --limit or --block")
    also = parser.add_argument
    also("--for", dest="term", metavar="TIME", type=duration, help="how long"
         " --limit or --block holds, such as 90s, 30m, 2h, 1d; else for good")
    also("--json", action="store_true", help="show --status as JSON")
    also("--file", "-f", metavar="CONFIG_PATH", help="path to a config file")
    also("-o", dest="overrides", metavar="NAME=VALUE", action="append",
         default=[], help="override a setting; may be repeated")
    also("--standalone", metavar="DIR", type=os.path.abspath,
         help="run from a directory, without a configuration file and as"
         " whoever calls: socket, database and pidfile are in DIR")
    also("--version", action="version", version=f"{PROGRAM} {VERSION}")
    options = parser.parse_args(argv)
    try:
        choose_command(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def choose_command(options: argparse.Namespace) -> None:
    """Set the command that options mean; ValueError: they go not together."""
    options.command = run_daemon
    for name, command in COMMANDS.items():  # --json may stand alone
        if getattr(options, name) not in (None, False):
            options.command = command
    if options.json and options.command is not show_status:
        raise ValueError("--json goes with --status")
    if options.term and options.command is not set_limit:
        raise ValueError("--for goes with --limit and --block")
    identities = [options.reset, options.block, options.unlimit]
    if "" in (*identities, *(options.limit or ())[:1]):
        raise ValueError("ID is empty")
    if options.limit is not None:
        options.limit[1] = parse_given(options.limit[1])


BLOCKED = (Limit(0, 86400),)  # one alert a day, not one for each mail


def load_settings(options: argparse.Namespace) -> Settings:
    """Return the settings of a command, and log as they say."""
    config = configure(options)
    options.file = options.file or config.path  # a reload has another $HOME
    options.places = config.places
    settings = check_settings(config)
    log.setLevel(logging.INFO if settings.debug else NOTICE)
    if options.command in (run_daemon, check_start):
        tell_doubts(settings, options.command is check_start)
    return settings


def tell_doubts(settings: Settings, strict: bool) -> None:
    """Log what has no effect; if strict, raise where nothing is limited."""
    for nothing_counts, message in doubts(settings):
        if nothing_counts and strict:
            raise ConfigError(message)
        log.log(logging.ERROR if nothing_counts else logging.WARNING,
                "%s", message)


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
    folder = options.standalone
    if folder:
        config.values.update(
            SOCKET=f"{folder}/policy", pidfile=f"{folder}/{PROGRAM}.pid",
            backend=0, sqlite_config={"database": f"{folder}/db.sqlite3"})
    for text in options.overrides:
        override(config, text)
    return config


def run_daemon(options: argparse.Namespace) -> None:
    """Run the daemon."""
    settings = load_settings(options)

    def announce(address: Any) -> None:
        log.log(NOTICE, "listening on %s", format_address(address))
        if options.standalone:
            print(f"Listening on {format_address(address)}; for main.cf:")
            print(main_cf(settings.count_mode, address), flush=True)
        if not can_reload(options):
            log.error(NO_RELOAD, options.file, settings.user)

    serve(settings, find_owner(settings, options.standalone), announce,
          lambda: load_settings(options))


def clean_all(options: argparse.Namespace) -> None:
    """Delete what no limit can see any more, and send the report."""
    settings, database = open_as_owner(options)
    own, deleted = own_window(settings), 0
    try:
        database.transact(store_window, own)
        reason = database.transact(read_reason_to_wait, own, reading=True)
        for some in clean(database, settings, int(time.time())):
            deleted += some
            if some:
                time.sleep(0.005)  # the daemon's turn
        if settings.report:
            database.transact(take_over, int(time.time()))
    except LedgerError as error:
        raise CleanError(str(error)) from error
    print(f"{deleted} records deleted")
    if reason:
        print(reason)
    if settings.report:
        tell_doubts(settings, strict=False)
        send_reports(database, settings)


def open_as_owner(options: argparse.Namespace,
                  make: bool = True) -> tuple[Settings, Database]:
    """Make the folders if so told, give up root's rights; open nothing."""
    settings = load_settings(options)
    owner = find_owner(settings, options.standalone)
    if make:
        make_folders(settings, owner)
    database = open_ledger(settings).database
    options.at_end.callback(database.close)
    drop_root(owner)
    return settings, database


def show_status(options: argparse.Namespace) -> None:
    """Show who has used how much."""
    settings, database = open_as_owner(options, make=False)
    now = int(time.time())
    chosen = [key_of(settings, options.status)] if options.status else []
    standings = sorted(
        database.look(survey, settings, now, *chosen),
        key=lambda standing: urgency(standing, now), reverse=True)
    if options.json:
        print(json.dumps({"time": now, "identities": [
            {**standing._asdict(),
             "limits": [window._asdict() for window in standing.limits],
             "refusals": [row._asdict() for row in standing.refusals]}
            for standing in standings]}))
        return
    colour = (sys.stdout.isatty() and not os.environ.get("NO_COLOR")
              and os.environ.get("TERM") != "dumb")
    for line in (show_one(standings[0], options.places) if chosen else
                 show_most(standings, now)):
        print(line.replace(FULL, f"\033[31m{FULL}\033[0m") if colour else line)


def show_prometheus(options: argparse.Namespace) -> None:
    """Show it for node_exporter's textfile collector, which reads UTF-8."""
    settings, database = open_as_owner(options, make=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    for line in show_metrics(database, settings):
        print(line)


def reset(options: argparse.Namespace) -> None:
    """Forget what an identity has used, and say how much that was."""
    settings, database = open_as_owner(options)
    identity = key_of(settings, options.reset)
    check_known(settings, database, identity)
    mails = database.transact(forget, identity)
    print(f"{printable(identity)}: {mails} recorded mails forgotten")


def set_limit(options: argparse.Namespace) -> None:
    """Give an identity other limits at once, on every host."""
    settings, database = open_as_owner(options)
    identity, limits = options.limit or (options.block, BLOCKED)
    key, now = key_of(settings, identity), int(time.time())
    ends = now + options.term if options.term else None
    if check_known(settings, database, key).dry_run:
        log.warning("%s: dry_run: no mail of it is refused", printable(key))
    database.transact(set_override, key, Override(limits, ends), now)
    given = ", ".join(map(ratio, limits)) or "no limits"
    print(f"{printable(key)}: {given} {term(ends)}")


def unlimit(options: argparse.Namespace) -> None:
    """Let the limits of file or query hold for an identity again."""
    settings, database = open_as_owner(options)
    key = key_of(settings, options.unlimit)
    had = database.transact(drop_override, key)
    print(f"{printable(key)}:",
          "its usual limits hold again" if had else "it has its usual limits")


def check_known(settings: Settings, database: Database, identity: str,
                ) -> Standing:
    """Return how an identity stands; warn if nothing is known of it."""
    [found] = database.transact(survey, settings, int(time.time()), identity)
    named = {f"{rule.name}={text}" if rule.by else text
             for rule in settings.rules for text in rule.limits_by_id.texts
             if text[:1] not in ("@", ".")}  # no mail is counted for these
    if not (found.last_mail or found.refusals or identity in named
            or found.source in ("--limit", "sql_limits_by_id")):
        log.warning("%s: nothing is recorded of it: is it spelt right?",
                    printable(identity))
    return found


def check_start(options: argparse.Namespace) -> None:
    """Say whether a start would work, or what is wrong; change nothing."""
    settings = load_settings(options)
    owner = find_owner(settings, options.standalone)
    needed = folders(settings)
    makeable = [name for name in needed  # as long as it is root
                if (owner and is_volume(name) if os.path.isdir(name)
                    else can_write(name))]
    check_socket(settings.SOCKET)
    if is_open(settings):
        log.warning("any account of this host may connect to SOCKET, and use"
                    " up anybody's limits")
    backend = BACKENDS[settings.backend](settings)
    drop_root(owner)
    tell_command(settings)
    unusable = [name for name in needed
                if name not in makeable and not can_write(name)]
    if os.path.isdir(settings.pidfile):
        unusable.append(settings.pidfile)
    if unusable:
        raise PolicydError(f"{unusable[0]}: cannot be written")
    if not can_reload(options):
        raise ConfigError(NO_RELOAD % (options.file, settings.user))
    for folder in barred(needed) if owner else ():
        log.warning("%s: the unit lets nobody write there: systemctl edit %s,"
                    " add ReadWritePaths=%s", folder, PROGRAM, folder)
    print(backend.probe(functools.partial(
        check_counting, query=settings.sql_limits_by_id)), "OK", sep="\n")


def can_write(folder: str) -> bool:
    """Say whether this user could make files in a folder, or the folder."""
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


def can_reload(options: argparse.Namespace) -> bool:
    """Say whether the file, which root has read, is for this user too."""
    return options.file is None or os.access(options.file, os.R_OK)


def barred(needed: Iterable[str]) -> list[str]:
    """Return the folders that the unit, if it is installed, protects."""
    unit = ""
    for name in [UNIT, *glob.glob(f"{UNIT}.d/*.conf")]:
        with contextlib.suppress(OSError), open(name) as file:
            unit += file.read()
    if "ProtectSystem=strict" not in unit:
        return []
    allowed = (f"/run/{PROGRAM}/", f"/var/lib/{PROGRAM}/", *(
        f"{path}/" for path in re.findall(r"[ =]-?(/\S+)", unit)))
    return [folder for folder in map(os.path.realpath, needed)
            if not f"{folder}/".startswith(allowed)]


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
    with contextlib.suppress(TypeError, ValueError):
        if name == "socket_permission":
            value = as_permission(value)
    print(value, end="")


COMMANDS = {"json": show_status, "clean": clean_all, "check": check_start,
            "status": show_status, "prometheus": show_prometheus,
            "get_config": get_config, "reset": reset, "limit": set_limit,
            "block": set_limit, "unlimit": unlimit}

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: no traceback
    sys.exit(main())
