#!/usr/bin/python3
"""policyd-rate-limit: limit how many mails a user of Postfix may send.

Postfix asks this daemon about each mail (postconf(5), check_policy_service;
SMTPD_POLICY_README).  It counts the mail for a SASL user, a sender or a
client address, in sliding windows ("at most N mails in any S seconds"), and
answers with the action that Postfix is to take.

The path of one request, by the names of the functions:

    receive -> read_requests -> Service.answer -> claims_of -> Ledger.decide
        -> [ settle: take_turns, read_pages, decide, write ] COMMIT
        -> explain -> sendall

While the database is unavailable, Ledger.decide calls Memory.decide, which
runs the same decide() on what this host remembers.  settle() later adds the
mails counted in this way to the tables (append_unstored).

Sections 1 to 4, 6 and 8 to 11 judge mail.  The others need not be read to
trust the program: they read the settings, report what was counted, and look
after the tables and the process.

    1 Vocabulary   2 Settings   3 Protocol   4 Policy   5 Wording
    6 Database   7 Schema   8 Ledger   9 Batches and outages   10 Service
    11 Server   12 Upkeep   13 Reports and alerts   14 Status
    15 Configuration file   16 Process   17 Checks   18 Command line

Exit status: 0 done, or stopped by a signal; 1 --get-config: no such
setting; 2 no such user or group, or a usage error; 3 another instance is
running; 4 SOCKET is malformed; 5 no usable configuration file; 6 any other
failure; 8 --clean failed.

Try it by hand:

    policyd_rate_limit.py --standalone /tmp/try &
    printf 'request=smtpd_access_policy\\nprotocol_state=DATA\\n%s\\n\\n' \\
        sasl_username=joe | nc -N -U /tmp/try/policy
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # Ctrl-C while modules load: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import ast
import bisect
import contextlib
import copy
import difflib
import errno
import fcntl
import functools
import gc
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
import select
import shlex
import shutil
import socket
import socketserver
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
from datetime import datetime
from types import MappingProxyType
from typing import (
    TYPE_CHECKING,
    Any,
    NamedTuple,
    NoReturn,
    Optional,
    TextIO,
    TypeVar,
    Union,
)

if TYPE_CHECKING:
    import smtplib
    from email.message import EmailMessage

T = TypeVar("T")

# ---------------------------------------------------------------------------
# 1. Vocabulary
#
# What all sections share: constants, exceptions, and how identities are
# compared.
# ---------------------------------------------------------------------------

PROGRAM = "policyd-rate-limit"
VERSION = "2.0.0"
MAX_REQUEST = 32768  # bytes; the largest that Postfix sent in tests is 6 kB
MAX_ATTRIBUTES = 1000  # Postfix 3.12 sends 32
MAX_NUMBER = 2**31 - 1  # the largest value of an SQL int column
MAX_DATE = 2**62  # later than any date
MAX_TOLD = 100  # characters of a value in the log; a queue id has 20
MAX_IDENTITY = 190  # characters; at 4 bytes each they fit MySQL's index
MAX_ADDRESS = 45  # characters of an IP address: IPv6 that ends in IPv4
CLOCK_SKEW = 600  # seconds by which the clocks of two hosts may differ
NOTICE = 25  # the log level of messages shown even with debug: False
MAX_SAID = 1000  # messages whose last time in the log is remembered
SELDOM = {"seldom": True}  # marks log records that a stranger can provoke
log = logging.getLogger(PROGRAM)


class Limit(NamedTuple):
    """At most so many mails in any so many seconds."""

    mails: int
    seconds: int


class PolicydError(Exception):
    """Something failed at run time."""
    exit_code = 6


class UnknownSetting(PolicydError):
    """--get-config was asked for a setting that does not exist."""
    exit_code = 1


class UsageError(PolicydError):
    """A command was given an argument that it cannot use."""
    exit_code = 2


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
    """The database is unavailable or refused a statement."""

    def __init__(self, message: str, undone: bool = False) -> None:
        super().__init__(message)
        self.undone = undone  # it answered, and certainly wrote nothing


class BadRequest(PolicydError):
    """The bytes received are not a request of the policy protocol."""


class Seldom(logging.Filter):
    """Lets each message that is marked SELDOM through once a minute."""

    said: dict[str, float] = {}  # when each was let through, oldest first

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether to log a record."""
        seldom = hasattr(record, "seldom")
        if seldom and 0 <= record.created - self.said.get(record.msg, 0) < 60:
            return False
        if seldom:
            self.said.pop(record.msg, None)
            self.said[record.msg] = record.created
            if len(self.said) > MAX_SAID:
                del self.said[next(iter(self.said))]
        return True


log.addFilter(Seldom())


def fold(identity: str) -> str:
    """Return the spelling under which an identity is counted.

    Names are compared without regard to case (RFC 8265, 3.3), addresses by
    value.  The end of a name too long for a database key is replaced by a
    hash of the name.
    """
    if len(identity) <= MAX_IDENTITY:
        return fold_short(identity)
    return fold_any(identity)


def fold_any(identity: str) -> str:
    """Fold an identity of any length."""
    folded = identity.lower()
    if not folded.isascii() and len(folded) <= 512:  # normalize() is quadratic
        folded = unicodedata.normalize("NFC", folded)
    folded = folded.rstrip() or "<>"
    if "@" in folded or "xn--" in folded:
        name, at, domain = folded.rpartition("@")
        # example.org. is the same domain as example.org
        return shorten(name + at + fold_domain(domain.rstrip(". ")))
    return shorten(str(parse_address(folded) or folded))


def fold_domain(domain: str) -> str:
    """Return the one spelling of a domain, in Unicode if it has any.

    Mail to a domain in full-width letters, or in the ASCII form xn--..., goes
    to the same host (RFC 3490).
    """
    plain = domain.isascii() and "xn--" not in domain
    if plain or len(domain) > 253 or "\xdf" in domain:  # that is no longer ss
        return domain
    try:
        found = domain.encode("idna").decode("idna")
    except UnicodeError:  # such a domain does not exist
        return domain
    return domain if "@" in found else found  # nor does one with a wide "@"


fold_short = functools.lru_cache(10_000)(fold_any)  # 3 MB; 0.4 us, not 2 us


def shorten(key: str) -> str:
    """Return a key that fits the database: the end of a long one is a hash.

    The domain of an address is kept, or as many of its parents as fit.
    """
    if len(key) <= MAX_IDENTITY:
        return key
    _, at, domain = key.rpartition("@")
    parent = domain  # cut at once: label by label would be quadratic, too
    if len(domain) >= 100:
        parent = domain[-100:].partition(".")[2]
    end = "#" + hashlib.sha256(key.encode()).hexdigest()
    if parent:
        end += at + (domain if parent == domain else "." + parent)
    return key[:MAX_IDENTITY - len(end)] + end


def parse_address(
        text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the IP address in text, or None; ::ffff:192.0.2.1 as IPv4."""
    if "%" in text or not (text[:1].isdigit() or ":" in text):
        return None  # the zone after "%" could be text of any length
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


# ---------------------------------------------------------------------------
# 2. Settings
#
# The table of all settings: name, default, check and meaning.  A check takes
# a value from a file and returns it typed, or raises ValueError or TypeError;
# messages quote its docstring as what was expected.  At the end, the doubts:
# settings that pass the checks, but cannot be meant.
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
DERIVED = {  # computed from the attribute named on the right
    "sasl_domain": "sasl_username", "sender_domain": "sender",
    "recipient_domain": "recipient", "client_network": "client_address",
    "server": ""}
ADDRESSES = (  # may hold a host's address, which no client can choose
    ("client_address",), ("client_network",), ("server_address",),
    ("sasl_username",))
FORGED = {"sender", "sender_domain", "helo_name"}  # as a client likes
COUNTS = ("recipients", "mails", "bytes")  # or an attribute's different values
FACTS = ("identity", "used", "mails", "seconds", "window", "room_at",
         "room_in")  # the variables of fail_action
ANY_WINDOW = range(1, MAX_NUMBER + 1)
MAX_LIMITS = 100  # per identity: each is a column of an SQL statement
MAX_QUOTAS = 100  # each writes at least one row for every mail
MAX_MAILS = 10**15  # of a limit, also in bytes: sums stay below SQL's 2**63
UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
ACTIONS = re.compile(  # of access(5), and restrictions of postconf(5)
    r"(?i:ok|[45]\d\d|dunno|defer|defer_if_(?:permit|reject)|bcc|discard"
    r"|filter|hold|info|prepend|redirect|sleep|warn|warn_if_reject"
    r"|(?:permit|reject)(?:_\w+)?|check_\w+)")
PASSES = re.compile(  # those that let the mail pass
    r"(?i:ok|dunno|bcc|info|prepend|sleep|warn|warn_if_reject|permit(?:_\w+)?)"
    r"|(?![45]\d\d$)\d+")
STOPS = re.compile(  # those that stop it
    r"(?i:[45]\d\d|defer|defer_if_permit|discard|hold|reject)")
KEEPS = re.compile("(?i:discard|hold)")  # these, without telling the client
Names = tuple[str, ...]  # the path to a setting or to an entry in it
Limits = tuple[Limit, ...]
Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]


class Wrong(ValueError):
    """A value cannot be used: why, and the paths to the wrong entries."""

    def __init__(self, why: str, *places: Names) -> None:
        super().__init__(why)
        self.why = why
        self.places = places or ((),)


def show(value: object) -> str:
    """Return a value as a message shows it, shortened."""
    try:
        return reprlib.repr(value)
    except ValueError:  # more digits than sys.get_int_max_str_digits()
        return "a huge number"


def suggest(name: object, known: Iterable[str]) -> str:
    """Return the end of a message: "; is X meant?" for a similar name."""
    spelt = {one.lower(): one for one in known}
    close = difflib.get_close_matches(str(name)[:50].lower(), spelt, 1)
    return f"; is {spelt[close[0]]} meant?" if close else ""


def check_entry(check: Callable[[Any], T], value: object, *names: str,
                secret: bool = False) -> T:
    """Return a value as its check returns it; raise Wrong, naming its place.

    names: the path to the value.  secret: the message must not show it.
    """
    places: tuple[Names, ...] = ((),)
    try:
        return check(value)
    except Wrong as error:
        why, places = error.why, error.places
    except (KeyError, OverflowError, TypeError, ValueError):
        why = f"found {show(value)}, expected {check.__doc__}"
    if secret:
        why = (f"expected {check.__doc__}; the value may contain a"
               " password and is not shown")
    raise Wrong(f"{names[-1]}: {why}", *((*names, *more) for more in places))


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
    if not value:
        return ()
    texts = [value] if isinstance(value, str) else as_list(value)
    return tuple(map(as_text, texts))


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
                    f" {meant}")
    return mode


def as_sqlite(value: object) -> dict[Any, Any]:
    """names with values, among them database, a path"""
    config = as_mapping(value)
    as_text(config.get("database"))
    return config


def as_limits(value: object) -> Limits:
    """a list such as [[10, 60], [150, 86400]] or ["10/min", "150/day"]"""
    listed = value.split(",") if isinstance(value, str) else as_list(value)
    if len(listed) > MAX_LIMITS:
        raise Wrong(f"found {len(listed)} limits, {MAX_LIMITS} are allowed")
    return tuple(map(as_limit, listed))


def as_limit(value: object) -> Limit:
    """[mails, seconds], or text such as 10/min"""
    if isinstance(value, str):
        found = re.fullmatch(r"\s*([0-9]{1,15})\s*/(.*)", value)
        if not found:
            raise ValueError
        return Limit(int(found[1]), duration(found[2]))
    mails, seconds = as_list(value)
    if as_whole(mails) > MAX_MAILS:
        raise Wrong(f"{show(mails)} is too large; write [] for no limit")
    return Limit(as_whole(mails), as_seconds(seconds))


def duration(text: str) -> int:
    """Parse a time such as 90s, 2h, day or 60; return seconds.

    Raise ValueError with a message for the admin.
    """
    found = re.fullmatch(r"(?=.)([0-9]{0,9})(|s|sec|second|m|min|minute|h|hour"
                         r"|d|day|w|week)s?", text.strip().lower())
    seconds = int(found[1] or 1) * UNITS[found[2][:1]] if found else 0
    if seconds < 1:
        raise ValueError(f"found {show(text)}, expected seconds, or a number"
                         " with s, min, h, d or w, such as 90s, 30min, 2h")
    return min(seconds, MAX_NUMBER)


@functools.lru_cache(1000)  # parsing takes a third as long as a decision
def parse_limits(text: str) -> Limits:
    """Parse limits as text: 10/min,500/day or [[10, 60], "500/day"].

    Raise ValueError with a message for the admin.
    """
    # Deep nesting can crash Python's parser (ast), so the length is bounded.
    text = str(text)[:1000].strip()
    is_list = text.startswith(("[", "("))
    try:
        return as_limits(ast.literal_eval(text) if is_list else text)
    except Wrong as error:
        raise ValueError(error.why) from None
    except (TypeError, ValueError, SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"found {show(text)}, expected limits such as"
                         " 10/min,500/day or [[10, 60], [500, 86400]]"
                         ) from None


def parse_given(text: str) -> Limits:
    """Parse the LIMITS of --limit."""
    try:
        return parse_limits(text)
    except ValueError as error:
        raise ValueError(f"LIMITS: {error}") from None


class Prefixes(NamedTuple):
    """Networks of one prefix length: entries by their prefix bits."""

    version: int  # of IP: 4 or 6
    shift: int  # the number of host bits, which a lookup ignores
    entries: Mapping[int, Any]


class Patterns(NamedTuple):
    """Entries that a value is matched against: texts and networks."""

    texts: Mapping[str, Any]  # a name, "", "@example.org", "@.example.org"
    networks: tuple[Prefixes, ...] = ()  # the longest prefix first

    def find(self, value: str, is_address: bool = True) -> Any:
        """Return the entry of the most specific pattern, or None.

        The order is: the value itself, the longest network, "@domain",
        "@.domain", then "@." with each parent domain.  A value that is itself
        a domain is matched without the "@".
        is_address: whether the value may be an address; one that a client
        chose never is, whatever it looks like.
        """
        if not self.texts and not self.networks:
            return None
        host, _, bits = value.partition("/")  # the value may be a network
        address = None if bits.strip("0123456789") else parse_address(host)
        if address and not is_address:
            return None  # a sender 127.0.0.1 is not this host
        if value in self.texts:
            return self.texts[value]
        entry = self.find_network(address) if address else None
        if entry is not None or not self.texts:
            return entry
        _, at, domain = value.rpartition("@")
        pattern = at + domain
        while pattern not in self.texts and domain:
            pattern = f"{at}.{domain}"
            domain = domain.partition(".")[2]
        return self.texts.get(pattern)

    def find_network(self, address: Address) -> Any:
        """Return the entry of the longest network that has an address."""
        number, version = int(address), address.version
        for networks in self.networks:
            if networks.version == version:
                entry = networks.entries.get(number >> networks.shift)
                if entry is not None:
                    return entry
        return None

    def entries(self) -> Iterator[Any]:
        """Yield the entries of all patterns."""
        yield from self.texts.values()
        for networks in self.networks:
            yield from networks.entries.values()

    def each_network(self) -> Iterator[Network]:
        """Yield all networks."""
        for version, shift, entries in self.networks:
            kind = ipaddress.IPv4Network if version == 4 else (
                ipaddress.IPv6Network)
            bits = (32 if version == 4 else 128) - shift
            for number in entries:
                yield kind((number << shift, bits))


class Choice(NamedTuple):
    """Patterns of which one must match, and those that must not match."""

    wanted: Patterns | None  # None: everything that is not unwanted
    unwanted: Patterns

    def fits(self, value: str, is_address: bool = True) -> bool:
        """Say whether a value matches; is_address: see Patterns.find()."""
        if self.unwanted.find(value, is_address):
            return False
        return (self.wanted is None
                or bool(self.wanted.find(value, is_address)))


@dataclass(frozen=True)
class Rule:
    """Limits for each key that mails are counted under."""

    by: tuple[str, ...] = ()  # attributes; empty: as limit_by_... say
    name: str = ""  # the prefix of keys; those of the first rule have none
    when: tuple[tuple[str, Choice], ...] = ()
    count: str = ""  # one of COUNTS or an attribute; "": as count_mode says
    limits: Limits = ()
    limits_by_id: Patterns = Patterns({})
    fail_action: str = ""
    dry_run: bool = False
    block_for: int = 0  # seconds; 0: nobody is blocked

    def all_limits(self) -> Iterator[Limit]:
        """Yield the limits and those of limits_by_id."""
        yield from self.limits
        for limits in self.limits_by_id.entries():
            yield from limits


def as_network(text: str) -> Network:
    """a network such as 10.0.0.0/8"""
    network = ipaddress.ip_network(text, strict=False)
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    bits = network.prefixlen - 96
    return ipaddress.ip_network((mapped, bits)) if mapped else network


@functools.lru_cache(1000)  # computing it takes ten times as long
def network_around(address: str) -> str:
    """Return the client_network of an address, "" if it is not an address."""
    found = parse_address(address)
    if found is None:
        return ""
    bits = 24 if found.version == 4 else 64  # what one customer is assigned
    return str(ipaddress.ip_network((found, bits), strict=False))


def as_pattern(key: object) -> str | Network:
    """Return the text or the network that a YAML key stands for."""
    words = {True: '"yes", like "on"', False: '"no", like "off"',
             None: '"null", like "~"'}
    if isinstance(key, (bool, type(None))):  # a user may be called "no"
        raise Wrong(f"the key {words[key]}, means {key} in YAML; quote it",
                    (str(key),))
    pattern = fold(str(key)) if key != "" else ""
    if re.fullmatch(r"[0-9a-f.:]+/[0-9.]+", pattern):
        return as_network(pattern)
    return pattern


def as_patterns(entries: Mapping[Any, Any]) -> Patterns:
    """Index entries by their patterns; raise Wrong for equal patterns."""
    texts: dict[str, Any] = {}
    networks: dict[Network, Any] = {}
    names: dict[object, str] = {}
    for key, entry in entries.items():
        name, pattern = str(key), as_pattern(key)
        if pattern in names:
            raise Wrong(f"{name} and {names[pattern]} are the same",
                        (name,), (names[pattern],))
        names[pattern] = name
        if isinstance(pattern, str):
            texts[pattern] = entry
        else:
            networks[pattern] = entry
    return Patterns(texts, index_networks(networks))


def index_networks(entries: Mapping[Network, Any]) -> tuple[Prefixes, ...]:
    """Index networks so that each prefix length takes one lookup."""
    lengths: dict[tuple[int, int], dict[int, Any]] = {}
    for network, entry in entries.items():
        shift = network.max_prefixlen - network.prefixlen
        first = int(network.network_address) >> shift
        lengths.setdefault((network.version, shift), {})[first] = entry
    return tuple(Prefixes(version, shift, lengths[version, shift])
                 for version, shift in sorted(lengths))


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
    """identities or patterns, each with a list of limits"""
    return as_patterns({key: check_entry(as_limits, limits, str(key))
                        for key, limits in as_mapping(value).items()})


def as_networks(value: object) -> Choice | None:
    """a list of networks such as [10.0.0.0/8, "!10.1.0.0/16", "::/0"]"""
    texts = []
    for text in map(as_text, as_list(value)):
        sign, bare = ("!", text[1:]) if text[0] == "!" else ("", text)
        texts.append(f"{sign}{ipaddress.ip_network(bare, strict=False)}")
    return as_choice(texts) if texts else None


def as_known(value: object, known: Sequence[str], expected: str) -> str:
    """Check that a value is one of the known names."""
    if value not in known:
        raise Wrong(f"found {show(value)}, expected {expected}"
                    + suggest(value, known))
    return str(value)


def as_attribute(value: object) -> str:
    """an attribute that Postfix sends, such as sasl_username"""
    return as_known(value, (*ATTRIBUTES, *DERIVED), str(as_attribute.__doc__))


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
    return as_known(value, (*COUNTS, *ATTRIBUTES, *DERIVED),
                    str(as_counted.__doc__))


def as_name(value: object) -> str:
    """a name in lower case, without spaces and ="""
    name = as_text(value)
    if name != fold(name) or re.search(r"[\s=]", name):
        raise ValueError
    return name


def as_block_for(value: object) -> int:
    """a number of seconds, or 0 to block nobody"""
    return min(as_whole(value), MAX_NUMBER)


def as_fail_action(value: object) -> str:
    """an action, in which $identity, $used, ... stand for what was found"""
    action = as_action(value)
    string.Template(action).substitute(dict.fromkeys(FACTS, ""))  # or raise
    return action


QUOTA: Mapping[str, Callable[[Any], Any]] = {
    "by": as_by, "name": as_name, "when": as_when, "count": as_counted,
    "limits": as_limits, "limits_by_id": as_limits_by_id,
    "fail_action": as_fail_action, "dry_run": as_bool,
    "block_for": as_block_for}


def as_quotas(value: object) -> tuple[Rule, ...]:
    """a list of quotas, each with by and limits"""
    rules: dict[str, Rule] = {}
    if len(as_list(value)) > MAX_QUOTAS:
        raise Wrong(f"found {len(as_list(value))} quotas, {MAX_QUOTAS} are"
                    " allowed")
    for number, quota in enumerate(as_list(value)):
        rule = as_quota(as_mapping(quota), str(number))
        if rule.name in rules:
            raise Wrong(f"two are named {rule.name}", (str(number), "name"))
        rules[rule.name] = rule
    return tuple(rules.values())


def as_quota(entries: Mapping[Any, Any], number: str) -> Rule:
    """Return the rule of a quota; number: its index, for messages."""
    parts: dict[str, Any] = {}
    for name, item in entries.items():
        if name not in QUOTA:
            raise Wrong(f"{name}: no such entry{suggest(name, QUOTA)}",
                        (number, str(name)))
        parts[name] = check_entry(QUOTA[name], item, number, name)
    if "by" not in parts or not ("limits" in parts or "limits_by_id" in parts):
        raise Wrong("a quota needs by and limits", (number,))
    return Rule(**{"name": "+".join(parts["by"]), **parts})


def as_socket(value: object) -> str | tuple[str, int]:
    """a path, or [address, port] such as ["127.0.0.1", 8552]"""
    if isinstance(value, str):
        if ":" in value.split("/")[0] or value.startswith("@"):
            raise ValueError  # inet:127.0.0.1:8552, unix:/path, @name
        return as_text(value)
    host, port = as_list(value)
    if ":" not in as_text(host):  # IPv6: bind() reports it, exit status 6
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
    """Give a check that is a lambda its docstring."""
    check.__doc__ = expected
    return check


as_seconds = expect("a number of seconds, 1 or more",  # 68 years: forever
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
            error: type[PolicydError] = ConfigError,
            secret: bool = False) -> Any:
    """Return an entry of the table.

    error: raised for a wrong value.  secret: no message may show the value.
    """
    return field(default_factory=lambda: check(default), metadata={
        "default": default, "check": check, "meaning": meaning,
        "error": error, "secret": secret})


@dataclass(frozen=True)
class Settings:
    """All settings.  The original's keep their names, and most defaults."""

    debug: bool = setting(True, as_bool, "log each decision")
    log_requests: bool = setting(
        False, as_bool, "log all that Postfix says about each mail")
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
        "how to connect to MariaDB or MySQL", secret=True)
    pgsql_config: Mapping[str, Any] = setting(
        {"database": "database", "user": "username", "password": "*****",
         "host": "localhost"}, as_mapping, "how to connect to PostgreSQL",
        secret=True)
    db_timeout: int = setting(
        10, as_seconds, "seconds to wait for the database")
    limits: Limits = setting(
        [(10, 60), (150, 86400)], as_limits,
        "at most so many recipients in so many seconds, for each identity")
    limits_by_id: Patterns = setting(
        {}, as_limits_by_id, "other limits for some identities; [] for none")
    sql_limits_by_id: str | None = setting(
        "", as_text_or_none, "a query for the limits of an identity")
    limit_by_sasl: bool = setting(
        True, as_bool, "the SASL user name is the identity")
    limit_by_sender: bool = setting(
        False, as_bool, "else the sender address is the identity")
    limit_by_ip: bool = setting(
        False, as_bool, "else the client address is the identity")
    limited_networks: Choice | None = setting(
        [], as_networks, "the networks whose addresses limit_by_ip limits")
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
        "the action for a mail over a limit")
    block_for: int = setting(
        0, as_block_for, "seconds for which an identity that exceeds a limit"
        " is blocked; 0: not at all")
    block_action: str = setting(
        "defer_if_permit Sending is blocked, contact your postmaster",
        as_fail_action, "the action for a mail of a blocked identity")
    db_error_action: str = setting(
        "dunno", as_action,
        "the action for a mail within the limits while the database is"
        " unavailable")
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
        None, as_credentials, "user and password for smtp_server",
        secret=True)
    alert: bool = setting(
        False, as_bool, "mail report_to at once when somebody hits a limit")
    alert_command: tuple[str, ...] = setting(
        None, as_texts, "a program to run instead of mailing an alert")

    @functools.cached_property
    def rules(self) -> tuple[Rule, ...]:
        """Return the settings' own limits as a rule, then the quotas."""
        first = Rule(limits=self.limits, limits_by_id=self.limits_by_id,
                     fail_action=self.fail_action, dry_run=self.dry_run,
                     block_for=self.block_for)
        return (first, *(replace(
            quota, fail_action=quota.fail_action or self.fail_action,
            dry_run=quota.dry_run or self.dry_run) for quota in self.quotas))

    @functools.cached_property
    def windows(self) -> frozenset[int]:
        """Return the windows of the file's limits, in seconds."""
        return frozenset(limit.seconds for rule in self.rules
                         for limit in rule.all_limits())

    @functools.cached_property
    def longest_window(self) -> int:
        """Return the longest window, in seconds; 86400 if there is none."""
        return max(self.windows, default=86400)

    @property
    def reported_windows(self) -> Sequence[int]:
        """Return the windows whose refusals are reported, in seconds."""
        if not self.report:
            return ()
        if self.report_limits is not None:
            return self.report_limits
        return [86400] if 86400 in self.windows else ANY_WINDOW


def mend_limits(value: object) -> object:
    """Round the fractions that 1.x accepted: [[3, 3600.5]]."""
    if not isinstance(value, (list, tuple)):
        return value
    mended = [mend_limit(limit) for limit in value]
    return value if mended == list(value) else mended


def mend_limit(limit: object) -> object:
    """Round the fractions of one limit to the stricter whole numbers."""
    if not isinstance(limit, (list, tuple)) or len(limit) != 2:
        return limit
    mails, seconds = limit
    if not is_fraction(mails) and not is_fraction(seconds):
        return limit
    if is_fraction(mails):
        mails = math.floor(mails)
    return [mails, mend_seconds(seconds)]


def is_fraction(value: object) -> bool:
    """Say whether a value is a number that is not whole."""
    return (isinstance(value, float) and math.isfinite(value)
            and not value.is_integer())


def mend_seconds(value: Any) -> object:
    """Round up to a whole second: 0.5."""
    return math.ceil(value) if is_fraction(value) else value


def mend_windows(value: object) -> object:
    """Round up to whole seconds, as in limits: [3600.5]."""
    if not isinstance(value, (list, tuple)):
        return value
    mended = list(map(mend_seconds, value))
    return value if mended == list(value) else mended


def mend_bool(value: object) -> object:
    """Turn into True what 1.x took for it, except words for no: 2, "yes"."""
    if type(value) is int and value not in (0, 1):
        return True
    if isinstance(value, str) and value.lower() in ("true", "yes", "on"):
        return True
    return value


def mend_count_mode(value: object) -> object:
    """Turn into a number what 1.x took for one: True, "1"."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str) and re.fullmatch("[012]", value):
        return int(value)
    return value


def mend_socket(value: object) -> object:
    """Write an abbreviated IPv4 address in full: ["127.1", 8552]."""
    if not isinstance(value, (list, tuple)) or not value:
        return value
    parts = str(value[0]).split(".")
    if len(parts) not in (2, 3) or not all(map(str.isdecimal, parts)):
        return value
    *first, last = parts  # the last one stays last: inet_aton(3)
    zeros = ["0"] * (4 - len(parts))
    return [".".join([*first, *zeros, last]), *value[1:]]


def mend_permission(value: object) -> object:
    """Remove bits without meaning for a socket, such as sticky: 01777."""
    octal = str(value).replace("o", "", 1) if value != 0o1777 else "01777"
    found = re.fullmatch("0[1-7]([0-7]{3})", octal)
    return f"0{found[1]}" if found and found[1] != "000" else value


def mend_action(value: object) -> object:
    """Replace tabs by spaces, which Postfix treats alike."""
    return value.replace("\t", " ") if isinstance(value, str) else value


def mend_smtp_server(value: object) -> object:
    """Split "mail.example.org:587" into host and port."""
    if not isinstance(value, str) or parse_address(value):
        return value
    host, _, port = value.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port):
        return value
    return [host.strip("[]"), int(port)]


# Corrections of values that 1.x accepted and the checks refuse, where the
# meaning is clear: an upgrade must not leave a mail host without the daemon.
# Each returns the same object that it was given if nothing has to be mended.
MENDS: Mapping[str, Callable[[Any], object]] = {
    "limits": mend_limits, "delay_to_close": mend_seconds,
    "report_limits": mend_windows, "count_mode": mend_count_mode,
    "SOCKET": mend_socket, "socket_permission": mend_permission,
    "success_action": mend_action, "fail_action": mend_action,
    "db_error_action": mend_action, "smtp_server": mend_smtp_server}


class Doubt(NamedTuple):
    """A setting that passes the checks, but cannot be meant."""

    fatal: bool  # --check fails; for example, nothing at all is limited
    message: str
    names: Names  # the path to the setting


class Placed(NamedTuple):
    """A rule, and how messages name it."""

    rule: Rule
    names: Names = ()  # the path to it
    label: str = ""


# Common windows, in seconds.
SPANS = (3600, 7200, 21600, 43200, 86400, 172800, 604800, 2592000)
COUNTED_AT: Mapping[str | int, Sequence[str]] = {  # by count_mode
    "auto": ("rcpt", "data", "end-of-message"), 0: ("rcpt",),
    1: ("data", "end-of-message"), 2: ("data", "end-of-message")}
NUMBERS = ("recipient_count", "size", "encryption_keysize", "client_port",
           "server_port")  # attributes that Postfix writes as numbers
EVERYWHERE = (ipaddress.IPv4Network("0.0.0.0/0"),
              ipaddress.IPv6Network("::/0"))


def doubts(settings: Settings) -> Iterator[Doubt]:
    """Yield a doubt for each setting with no effect or an unlikely one."""
    for find in DOUBTS:
        yield from find(settings)


def place_rules(settings: Settings) -> list[Placed]:
    """Return the rules with their places."""
    first, *quotas = settings.rules
    return [Placed(first), *(
        Placed(rule, ("quotas", str(number)), f"quotas: {rule.name}: ")
        for number, rule in enumerate(quotas))]


def limits_nothing(settings: Settings) -> bool:
    """Say whether no rule could ever refuse a mail, even without dry_run."""
    return not any(is_effective(settings, rule) for rule in settings.rules)


def is_effective(settings: Settings, rule: Rule) -> bool:
    """Say whether a rule could ever refuse a mail, leaving dry_run aside."""
    has_limits = any(rule.all_limits())
    if passes(rule.fail_action):
        return False
    if rule.by:
        return has_limits and not any(
            never_matches(settings, rule, *condition)
            for condition in rule.when)
    return (has_limits or bool(settings.sql_limits_by_id)) and bool(
        settings.limit_by_sasl or settings.limit_by_sender
        or (settings.limit_by_ip and settings.limited_networks
            and not excludes_all(settings.limited_networks)))


def passes(action: str) -> bool:
    """Say whether an action makes Postfix let a mail pass."""
    return bool(PASSES.fullmatch(action.split()[0]))


def refuses(action: str) -> bool:
    """Say whether an action tells the client that its mail is refused."""
    word = action.split()[0]
    return bool(STOPS.fullmatch(word)) and not KEEPS.fullmatch(word)


def excludes_all(networks: Choice) -> bool:
    """Say whether the networks with "!" cover all the others."""
    if not networks.unwanted.networks:
        return False
    wanted = (EVERYWHERE if networks.wanted is None
              else networks.wanted.each_network())
    unwanted = index_networks(dict.fromkeys(
        join_networks(networks.unwanted.each_network()), True))
    return all(is_inside(network, unwanted) for network in wanted)


def join_networks(networks: Iterable[Network]) -> Iterator[Network]:
    """Yield networks, with adjacent ones joined to larger ones."""
    found: list[Any] = list(networks)
    for version in (4, 6):
        yield from ipaddress.collapse_addresses([
            network for network in found if network.version == version])


def is_inside(network: Network, others: Sequence[Prefixes]) -> bool:
    """Say whether a network is contained in one of the others."""
    number = int(network.network_address)
    shift = network.max_prefixlen - network.prefixlen
    return any(other.version == network.version and other.shift >= shift
               and number >> other.shift in other.entries for other in others)


def doubt_identities(settings: Settings) -> Iterator[Doubt]:
    """Yield why no mail would have an identity."""
    nothing, networks = limits_nothing(settings), settings.limited_networks
    if not (settings.limit_by_sasl or settings.limit_by_sender
            or settings.limit_by_ip or settings.quotas):
        yield Doubt(True, "limit_by_sasl, limit_by_sender, limit_by_ip: all"
                    " are False, so nothing is limited", ("limit_by_sasl",))
    if not settings.limit_by_ip:
        return
    if not networks:
        yield Doubt(nothing, "limited_networks: empty, so no address is"
                    " limited", ("limited_networks",))
    elif excludes_all(networks):
        yield Doubt(nothing, "limited_networks: those with \"!\" exclude all"
                    " others, so no address is limited",
                    ("limited_networks",))


def doubt_limits(settings: Settings) -> Iterator[Doubt]:
    """Yield where limits are missing."""
    if not settings.windows and not settings.sql_limits_by_id:
        yield Doubt(True, "limits: none here or in limits_by_id, quotas or"
                    " sql_limits_by_id, so nothing is limited", ("limits",))
    for rule, names, label in place_rules(settings):
        if rule.by and not any(rule.all_limits()):
            yield Doubt(limits_nothing(settings), f"{label}it has no limits,"
                        " so it never refuses mail", names)


def doubt_numbers(settings: Settings) -> Iterator[Doubt]:
    """Yield limits whose numbers seem to be swapped."""
    for rule, names, label in place_rules(settings):
        listed: list[tuple[Names, Limits]] = [(("limits",), rule.limits)]
        for text, limits in rule.limits_by_id.texts.items():
            listed.append((("limits_by_id", text), limits))
        for place, limits in listed:
            swapped = [limit for limit in limits if look_swapped(*limit)]
            if swapped and rule.count != "bytes":
                mails, seconds = swapped[0]
                yield Doubt(
                    False, f"{label}{': '.join(place)}:"
                    f" {doubt_swapped(mails, seconds)}", (*names, *place))


def doubt_swapped(mails: int, seconds: int) -> str:
    """Return the doubt about a limit whose numbers seem to be swapped."""
    return (f"[{mails}, {seconds}] lets {mails // seconds} mails pass in a"
            f" second; is [{seconds}, {mails}] meant?")


def look_swapped(mails: int, seconds: int) -> bool:
    """Say whether the mails of a limit look like its seconds."""
    if mails not in SPANS or not 1 < seconds < mails:
        return False  # [3600, 1] limits the recipients per mail
    return seconds % 60 != 0 or (mails >= 86400 and seconds < 3600)


def doubt_patterns(settings: Settings) -> Iterator[Doubt]:
    """Yield entries of limits_by_id that cannot match anybody."""
    for rule, names, label in place_rules(settings):
        patterns, place = rule.limits_by_id, (*names, "limits_by_id")
        for text in patterns.texts:
            why = why_no_key(settings, rule, text)
            if why:
                yield Doubt(False, f"{label}limits_by_id: {text}: {why}",
                            (*place, text))
        if rule.by and rule.by not in ADDRESSES and patterns.networks:
            yield Doubt(False, f"{label}limits_by_id: networks match no"
                        f" {'+'.join(rule.by)}", place)


def why_no_key(settings: Settings, rule: Rule, text: str) -> str:
    """Return why a text in limits_by_id cannot match anybody, or ""."""
    name, equals, value = text.partition("=")
    if equals and name == rule.name:
        return f'leave out "{name}="'
    if equals and not rule.by and name in (
            *(quota.name for quota in settings.quotas), *ATTRIBUTES, *DERIVED):
        return (f'it looks like the key of a quota; write "{value}" into'
                f" limits_by_id of the quota {name}")
    if text == "":
        return "mail with an empty value is not counted"
    if len(rule.by) == 1:
        return why_no_value(rule.by[0], text)
    if rule.by and text[0] not in "@." and (
            text.count("|") != len(rule.by) - 1):
        return f'values of {", ".join(rule.by)} are joined by "|"'
    return why_no_value("", text)


def why_no_value(attribute: str, text: str) -> str:
    """Return why an attribute cannot match a text, or ""."""
    if "*" in text:
        bare = text.replace("*@*.", "@.").replace("*@", "@").replace("*.", ".")
        meant = bare if "*" not in bare and bare[:1] in ("@", ".") else (
            "@example.org")
        return f'there is no wildcard; write "{meant}"'
    is_address = parse_address(text) is not None
    if re.fullmatch(r"[0-9]+(?:\.[0-9]+){3}", text) and not is_address:
        return "this is not an IP address"
    if text == "" and attribute != "server":
        return ""
    if attribute == "server" and text != "all":
        return 'the only value of server is "all"'
    if attribute.endswith("_domain") and "@" in text:
        return f'domains are compared; write "{text.rpartition("@")[2]}"'
    if attribute == "client_network":
        return "networks are compared; write one, such as 192.0.2.0/24"
    if attribute in ("client_address", "server_address") and not (
            is_address or text == "unknown"):
        return "this is not an IP address"
    if is_address and attribute and (attribute,) not in ADDRESSES:
        return "a client can choose this value, so no address matches"
    if attribute in NUMBERS and not re.fullmatch("0|[1-9][0-9]*", text):
        number = f'; write "{text.lstrip("0")}"' if text.isdecimal() else ""
        return f"Postfix writes this as a number{number}"
    return ""


def doubt_conditions(settings: Settings) -> Iterator[Doubt]:
    """Yield conditions in `when` that cannot match any mail."""
    for placed in place_rules(settings):
        for attribute, choice in placed.rule.when:
            yield from doubt_condition(settings, placed, attribute, choice)


def doubt_condition(settings: Settings, placed: Placed, attribute: str,
                    choice: Choice) -> Iterator[Doubt]:
    """Yield patterns of one attribute in `when` that cannot match."""
    names = (*placed.names, "when", attribute)
    label = f"{placed.label}when: {attribute}: "
    wanted = choice.wanted.texts if choice.wanted else ()
    for text in (*wanted, *choice.unwanted.texts):
        why = why_no_value(attribute, text)
        if why:
            yield Doubt(False, f"{label}{text}: {why}", names)
    if never_matches(settings, placed.rule, attribute, choice):
        yield Doubt(limits_nothing(settings), f"{label}no mail that is counted"
                    " can match", names)


def never_matches(settings: Settings, rule: Rule, attribute: str,
                  choice: Choice) -> bool:
    """Say whether a condition of a rule can match no mail."""
    if attribute == "server":
        return not choice.fits("all")
    if attribute == "protocol_state":
        return not any(map(choice.fits, COUNTED_AT[settings.count_mode]))
    if choice.wanted is None:
        return False
    counted = {*rule.by, rule.count}  # mail that lacks one is not counted
    needed = counted | {DERIVED.get(name, name) for name in counted}
    if (choice.wanted.networks and (attribute,) in ADDRESSES
            and not excludes_all(choice)):
        return False
    return not any(
        not why_no_value(attribute, text)
        and (text[:1] in ("@", ".")
             or choice.fits(text, (attribute,) in ADDRESSES))
        and (text != "" or attribute not in needed)
        for text in choice.wanted.texts)


def doubt_actions(settings: Settings) -> Iterator[Doubt]:
    """Yield actions that do not do what their setting is for."""
    if settings.dry_run:
        yield Doubt(False, "dry_run: True, so no mail is refused",
                    ("dry_run",))
    for name in ("success_action", "db_error_action"):
        action = getattr(settings, name)
        word = action.split()[0]
        yield from doubt_word(word, name, (name,))
        if re.fullmatch(r"(?i:ok|permit\w*)", word):
            yield Doubt(False, f"{name}: after {word} Postfix skips all"
                        " restrictions that come later; write dunno", (name,))
    word = settings.success_action.split()[0]
    if STOPS.fullmatch(word):
        yield Doubt(False, f"success_action: {word} stops the mail that is"
                    " within its limits; write dunno", ("success_action",))
    yield from doubt_refusal(settings, settings.fail_action, "",
                             ("fail_action",))
    word = settings.block_action.split()[0]
    yield from doubt_word(word, "block_action", ("block_action",))
    if passes(settings.block_action):
        blocks = any(rule.block_for for rule in settings.rules)
        yield Doubt(blocks, f"block_action: {word} lets the mail of whoever"
                    " is blocked pass", ("block_action",))
    for number, quota in enumerate(settings.quotas):
        if quota.fail_action:
            yield from doubt_refusal(
                settings, quota.fail_action, f"quotas: {quota.name}: ",
                ("quotas", str(number), "fail_action"))


def doubt_blocks(settings: Settings) -> Iterator[Doubt]:
    """Yield where block_for blocks nobody, or somebody who did nothing."""
    for rule, names, label in place_rules(settings):
        if not rule.block_for:
            continue
        place = (*names, "block_for")
        if rule.dry_run:
            yield Doubt(False, f"{label}block_for: with dry_run, nobody is"
                        " blocked", place)
        if FORGED.intersection(rule.by) or (
                not rule.by and settings.limit_by_sender):
            yield Doubt(False, f"{label}block_for: anyone can have a sender"
                        " blocked by forging its address", place)
        if rule.by == ("server",):
            yield Doubt(False, f"{label}block_for: one sender can have the"
                        " whole server blocked", place)


def doubt_refusal(settings: Settings, action: str, label: str, names: Names,
                  ) -> Iterator[Doubt]:
    """Yield that a fail_action refuses no mail, if so."""
    word = action.split()[0]
    yield from doubt_word(word, f"{label}fail_action", names)
    if passes(action):
        yield Doubt(limits_nothing(settings), f"{label}fail_action: {word}"
                    " lets the mail pass, so none is refused; to try limits,"
                    " set dry_run: True", names)


def doubt_word(word: str, label: str, names: Names) -> Iterator[Doubt]:
    """Yield that an action is unknown, if it is."""
    if not ACTIONS.fullmatch(word):
        yield Doubt(False, f"{label}: access(5) has no action {word}", names)


def doubt_query(settings: Settings) -> Iterator[Doubt]:
    """Yield that the query has the placeholder of another backend."""
    query = re.sub("'(?:[^']|'')*'", "", settings.sql_limits_by_id or "")
    right, other = ("?", "%s") if settings.backend == 0 else ("%s", "?")
    if other in query and right not in query:
        backend = ("SQLite", "MariaDB and MySQL", "PostgreSQL")
        yield Doubt(True, f"sql_limits_by_id: write {right} instead of"
                    f" {other}, for {backend[settings.backend]}",
                    ("sql_limits_by_id",))


def doubt_reports(settings: Settings) -> Iterator[Doubt]:
    """Yield why reports and alerts reach nobody."""
    mails_alert = settings.alert and not settings.alert_command
    mails = settings.report or mails_alert
    if mails and not settings.report_to:
        yield Doubt(False, "report_to: empty, so nobody gets reports and"
                    " alerts", ("report_to",))
    if (mails and settings.smtp_credentials and not settings.smtp_starttls
            and not is_this_host(settings.smtp_server[0])):
        yield Doubt(False, "smtp_credentials: they are only sent encrypted to"
                    " another host; set smtp_starttls: True",
                    ("smtp_credentials",))
    if not settings.report and not settings.alert:
        return
    if settings.report_limits == ():
        yield Doubt(False, "report_limits: empty, so no refusal is"
                    " reported", ("report_limits",))
    windows = ANY_WINDOW if settings.sql_limits_by_id else settings.windows
    for window in settings.report_limits or ():
        if window not in windows:
            yield Doubt(False, "report_limits: no limit has the window"
                        f" {window}", ("report_limits",))


def is_this_host(host: str) -> bool:
    """Say whether a name or address certainly means this host."""
    address = parse_address(host)
    return host.lower() == "localhost" or (
        address is not None and address.is_loopback)


def doubt_process(settings: Settings) -> Iterator[Doubt]:
    """Yield a relative path of SOCKET, and root as the daemon's user."""
    path = settings.SOCKET
    if isinstance(path, str) and not path.startswith("/"):
        yield Doubt(False, f"SOCKET: {path} is relative to where the daemon"
                    f" is started; is /var/spool/postfix/{path} meant?",
                    ("SOCKET",))
    if settings.user in ("root", "0"):
        yield Doubt(False, "user: the daemon does not need root; use its own"
                    f" account, such as {PROGRAM}", ("user",))


def both_count(settings: Settings) -> bool:
    """Say whether logins count, and mail without a login by its sender."""
    return settings.limit_by_sasl and settings.limit_by_sender


def doubt_senders(settings: Settings) -> Iterator[Doubt]:
    """Yield that forged senders get limits that are meant for a login."""
    if not both_count(settings):
        return
    addresses = [name for name in settings.limits_by_id.texts if "@" in name]
    if addresses:
        yield Doubt(False, f"limits_by_id: {addresses[0]}: since"
                    " limit_by_sender is True, this entry also holds for"
                    " anybody who writes such a sender address without a"
                    " login", ("limits_by_id", addresses[0]))


DOUBTS: Sequence[Callable[[Settings], Iterator[Doubt]]] = (
    doubt_identities, doubt_senders, doubt_limits, doubt_numbers,
    doubt_patterns, doubt_conditions, doubt_actions, doubt_blocks, doubt_query,
    doubt_reports, doubt_process)


# ---------------------------------------------------------------------------
# 3. Protocol
#
# Parses what Postfix sends (SMTPD_POLICY_README).  Pure: takes bytes, opens
# nothing.
# ---------------------------------------------------------------------------


class Request(NamedTuple):
    """What Postfix says about one mail; unknown attributes are empty."""

    protocol_state: str
    queue_id: str
    instance: str  # the same in all requests about one mail
    sasl_username: str
    sender: str
    client_address: str
    recipient_count: int
    attributes: Mapping[str, str]  # all that was sent


def read_requests(receive: Callable[[], bytes]) -> Iterator[Request]:
    """Yield requests until receive() returns b""; raise BadRequest."""
    buffer = b""
    while data := receive():
        *heads, buffer = (buffer + data).split(b"\n\n")
        del data  # keep no answered request in memory while waiting
        while heads:
            yield parse_request(heads.pop(0))
        if len(buffer) > MAX_REQUEST:
            raise BadRequest(f"a request longer than {MAX_REQUEST} bytes")
    if buffer:
        raise BadRequest("the connection ended inside a request")


def parse_request(head: bytes) -> Request:
    """Parse the name=value lines of a request, or raise BadRequest."""
    if head.count(b"\n") >= MAX_ATTRIBUTES or b"\0" in head:
        raise BadRequest("too many attributes, or a NUL byte")
    given = {}
    for line in head.decode("utf-8", "backslashreplace").split("\n"):
        name, equals, value = line.partition("=")
        if not equals:
            raise BadRequest("a line is not name=value")
        given[name] = value
    get = given.get
    if get("request", "smtpd_access_policy") != "smtpd_access_policy":
        raise BadRequest("not request=smtpd_access_policy")
    return Request(
        get("protocol_state", "")[:MAX_TOLD].upper(),
        get("queue_id", "")[:MAX_TOLD], get("instance", "")[:MAX_TOLD],
        get("sasl_username", ""), get("sender", ""),
        get("client_address", "")[:MAX_TOLD],
        parse_count(get("recipient_count", "")), given)


def parse_count(text: str) -> int:
    """Return the number in text, at most MAX_NUMBER; 0 if it is none."""
    if not (text.isascii() and text.isdigit()):
        return 0
    digits = text.lstrip("0")
    return int(digits or "0") if len(digits) < 10 else MAX_NUMBER


# ---------------------------------------------------------------------------
# 4. Policy
#
# Whose mail is it, and may it pass?  Pure functions: no input, no output, no
# clock.
# ---------------------------------------------------------------------------

STATES = ("RCPT", "DATA", "END-OF-MESSAGE")  # in the order of SMTP
SENDER_KEY = "sender="  # prefix of a sender's key if logins are limited, too
ONCE = ("mails", "bytes")  # counted once per mail, not for each RCPT


class Claim(NamedTuple):
    """An identity, what a mail costs it, and the limits that apply."""

    identity: str  # or a quota's key: name=value
    cost: int  # 0: only a block applies; the mail has no value or size
    limits: Limits
    rule: Rule = Rule()  # the rule that makes this claim
    value: str | None = None  # if different values are counted


class Usage(NamedTuple):
    """What a claim's identity has used of one limit before the mail."""

    claim: Claim
    limit: Limit
    used: int


class Verdict(NamedTuple):
    """The usage of each limit, and the first one that the mail exceeds."""

    usage: tuple[Usage, ...]
    broken: Usage | None  # None: the mail passes
    tried: tuple[Usage, ...] = ()  # the first exceeded of each dry_run claim
    block: Override | None = None  # by --block or block_for, if that refused
    room_at: int | None = None  # when the mail would pass, if looked up

    def is_within_limits(self) -> bool:
        """Say whether no limit is exceeded, not even one with dry_run."""
        return self.broken is None and not self.tried


class Override(NamedTuple):
    """Limits set by --limit, --block or block_for: they override others."""

    limits: Limits
    ends: int | None  # epoch seconds; None: permanent
    made: int = 0  # epoch seconds; 0: unknown
    reason: str = ""  # the limit that was exceeded, if block_for set it

    def holds_at(self, now: float) -> bool:
        """Say whether it is in force at a time."""
        return self.ends is None or self.ends > now

    def as_text(self) -> str:
        """Return it as stored in mail_limit: limits, then # and a reason."""
        text = json.dumps(self.limits)
        return f"{text}  # {self.reason}" if self.reason else text

    def is_block(self) -> bool:
        """Say whether it lets no mail pass at all."""
        return any(limit.mails == 0 for limit in self.limits)


class Refusal(NamedTuple):
    """How often a limit refused mail: a row of mail_refused."""

    identity: str
    seconds: int
    mails: int  # the limit's; -1: unknown, in rows of the original
    hits: int  # refusals since first
    first: int
    last: int
    client: str  # the client address of the last one
    told: int = 0  # how many of the hits have been reported


@dataclass
class Mail:
    """One mail on its way through the ledger: claims in, verdict out."""

    claims: Sequence[Claim]
    now: float  # epoch seconds
    instance: str = ""
    protocol_state: str = ""
    client: str = ""  # its address
    queue_id: str = ""  # as in Postfix's own log
    settings: Settings = Settings()  # those of its request
    verdict: Verdict | None = None
    error: LedgerError | None = None  # why it was judged from memory
    decided: float = 0  # when (time.perf_counter())


class Charge(NamedTuple):
    """A mail that is counted for a claim's identity."""

    mail: Mail
    claim: Claim


class Account:
    """What an identity has used of each window, and its individual limits."""

    def __init__(self, used: dict[int, int], queried: Limits | None = None,
                 override: Override | None = None) -> None:
        """Take {window in seconds: used} and the identity's own limits.

        queried: the limits of sql_limits_by_id, which replace those of the
        file.  override: those of --limit, which replace both.
        """
        self.used = used
        self.own = queried if override is None else override.limits
        self.block: Override | None = None
        if override is not None and override.is_block():
            self.block = override

    def limits_of(self, claim: Claim) -> Limits:
        """Return the limits that apply to a claim."""
        return claim.limits if self.own is None else self.own

    def usage(self, claim: Claim) -> list[Usage]:
        """Return what was used of each limit before a claim."""
        return [Usage(claim, limit, self.used[limit.seconds])
                for limit in self.limits_of(claim)]

    def add(self, claim: Claim) -> None:
        """Count a claim's cost in every window."""
        for seconds in self.used:
            self.used[seconds] += claim.cost


class DistinctValues(Account):
    """An account that counts different values instead of mails."""

    def __init__(self, seen: dict[str, int], now: int,
                 queried: Limits | None = None,
                 override: Override | None = None) -> None:
        """Take {value: last seen} and the time, both in epoch seconds."""
        super().__init__({}, queried, override)
        self.seen = seen
        self.now = now
        self.date = now  # given to values that are added

    def usage(self, claim: Claim) -> list[Usage]:
        """Return how many values besides the claim's each window has."""
        return [Usage(claim, limit, sum(
            date > self.now - limit.seconds
            for value, date in self.seen.items() if value != claim.value))
            for limit in self.limits_of(claim)]

    def add(self, claim: Claim) -> None:
        """Record that the claim's value was seen."""
        assert claim.value is not None
        self.seen[claim.value] = self.date


def claims_of(request: Request, settings: Settings,
              charged: Mapping[str, int] = MappingProxyType({}),
              ) -> list[Claim]:
    """Return the claims of a request, none if it is not counted.

    charged: what earlier requests about the same mail were charged, by
    identity; only the difference is claimed.
    """
    if not is_counted(request.protocol_state, settings.count_mode):
        return []
    if is_own_report(request, settings):
        return []
    claims = []
    for rule in settings.rules:
        by, name = ((rule.by, value_of(request, rule.by)) if rule.by else
                    identify(request, settings))
        if not name or (rule.when and not is_wanted(request, rule)):
            continue
        key = shorten(f"{rule.name}={name}" if rule.by
                      else key_of_identity(by, name, settings))
        cost, value = cost_of(request, rule, settings.count_mode)
        if key in charged:
            cost = rest_of(cost, value, request, rule, charged[key])
            if not cost:
                continue
        claims.append(Claim(
            key, cost, limits_under(rule, by, name), rule, value))
    return claims


def is_counted(protocol_state: str, count_mode: str | int) -> bool:
    """Say whether count_mode counts mail in this protocol_state."""
    if count_mode == "auto":
        return protocol_state in STATES
    return protocol_state in (STATES[1:] if count_mode else STATES[:1])


def why_not_counted(request: Request, settings: Settings) -> str:
    """Return why claims_of() finds no claims in a request."""
    if not is_counted(request.protocol_state, settings.count_mode):
        return f"count_mode {settings.count_mode} does not count at this state"
    if is_own_report(request, settings):
        return "it is a report to report_to"
    return "no limit_by_... setting and no quota applies"


def is_wanted(request: Request, rule: Rule) -> bool:
    """Say whether a request matches a rule's `when`."""
    return all(choice.fits(attribute_of(request, attribute),
                           (attribute,) in ADDRESSES)
               for attribute, choice in rule.when)


def identify(request: Request, settings: Settings,
             ) -> tuple[tuple[str, ...], str | None]:
    """Return which attribute identifies a mail, and its folded value.

    The value is None if no identity is limited.
    """
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


def key_of_identity(by: Sequence[str], name: str, settings: Settings) -> str:
    """Return the key under which an identity is counted outside quotas.

    Anyone can forge a sender address.  If both logins and senders are
    limited, a sender has a separate key, so that no forger uses up the limit
    of the login with that name.
    """
    if by == ("sender",) and settings.limit_by_sasl:
        name = SENDER_KEY + name
    return escape(name, settings)


def escape(identity: str, settings: Settings) -> str:
    """Return an identity, changed if it looks like a quota's name=value."""
    name, equals, _ = identity.lstrip("=").partition("=")
    if equals and any(quota.name == name for quota in settings.quotas):
        return "=" + identity
    return identity


def value_of(request: Request, by: Sequence[str]) -> str | None:
    """Return the value of a quota's key, None if an attribute is unknown."""
    values = [attribute_of(request, name) for name in by]
    if len(values) > 1:  # escape the separator in what clients choose
        values = [value.replace("%", "%25").replace("|", "%7c")
                  for value in values]
    return "|".join(values) if all(values) else None


def attribute_of(request: Request, name: str) -> str:
    """Return an attribute, folded for comparison; "" if it is unknown."""
    if name == "server":
        return "all"
    value = request.attributes.get(DERIVED.get(name, name), "")
    if name == "client_network":
        return network_around(value) if len(value) <= MAX_ADDRESS else ""
    if name in DERIVED:
        _, at, domain = value.rpartition("@")
        return fold(at + domain)[1:] if at and domain.rstrip(". ") else ""
    return fold(value) if value else ""


def cost_of(request: Request, rule: Rule, count_mode: str | int,
            ) -> tuple[int, str | None]:
    """Return a mail's cost, and its value if different values are counted."""
    count = unit_of(rule, count_mode)
    if count == "recipients":
        at_rcpt = request.protocol_state == "RCPT"
        return 1 if at_rcpt else request.recipient_count or 1, None
    if count == "mails":
        return 1, None
    if count == "bytes":
        return parse_count(request.attributes.get("size", "")), None
    value = attribute_of(request, count)
    return int(bool(value)), value


def unit_of(rule: Rule, count_mode: str | int) -> str:
    """Return what a rule counts: recipients, mails, bytes or an attribute."""
    return rule.count or ("mails" if count_mode == 2 else "recipients")


def rest_of(cost: int, value: str | None, request: Request, rule: Rule,
            charged: int) -> int:
    """Return what is left to charge of a mail that was charged before.

    At RCPT each request is about another recipient.  In later states, fewer
    recipients may have been charged than the mail has: if an earlier
    restriction accepted some of them, Postfix did not ask about these.
    """
    if request.protocol_state == "RCPT" and rule.count not in ONCE:
        return cost
    return 0 if value is not None else max(0, cost - charged)


def decide(mails: Sequence[Mail], accounts: Mapping[str, Account],
           ) -> tuple[list[Verdict], list[Charge]]:
    """Judge mails one after the other; return verdicts and charges.

    A mail is counted for all of its claims, or for none; only a claim with
    dry_run that exceeds a limit is left out.  A claim that costs nothing is
    refused only if its identity is blocked.  The accounts are updated.
    """
    verdicts, charges = [], []
    for mail in mails:
        usage: list[Usage] = []
        for claim in mail.claims:
            account = accounts[claim.identity]
            if claim.cost or account.block is not None:
                usage += account.usage(claim)
        verdict = judge(usage)
        if verdict.broken is not None:
            block = accounts[verdict.broken.claim.identity].block
            verdicts.append(verdict._replace(block=block))
            continue
        verdicts.append(verdict)
        without = [use.claim.identity for use in verdict.tried]
        for claim in mail.claims:
            account = accounts[claim.identity]
            if (claim.cost and claim.identity not in without
                    and account.limits_of(claim)):
                account.add(claim)
                charges.append(Charge(mail, claim))
    return verdicts, charges


def judge(usage: Sequence[Usage]) -> Verdict:
    """Return the verdict on a mail, given what was used of each limit.

    A limit is exceeded if the mail's whole cost does not fit.  A limit of 0
    mails, which is a block, refuses every mail.
    """
    tried: dict[str, Usage] = {}
    for use in usage:
        claim, most = use.claim, use.limit.mails
        if most > 0 and use.used + claim.cost <= most:
            continue
        if not claim.rule.dry_run:
            return Verdict(tuple(usage), use, tuple(tried.values()))
        tried.setdefault(claim.identity, use)
    return Verdict(tuple(usage), None, tuple(tried.values()))


def action_unless_refused(mail: Mail) -> str:
    """Return the action for a decided mail that no limit refuses."""
    assert mail.verdict is not None
    if mail.error is not None and (
            mail.verdict.usage or mail.settings.sql_limits_by_id):
        return mail.settings.db_error_action
    return mail.settings.success_action


def passes_unstored(mail: Mail) -> bool:
    """Say whether db_error_action lets a mail pass that cannot be stored.

    If not, the mail is refused, and so it is not counted.
    """
    return not refuses(mail.settings.db_error_action)


def is_own_report(request: Request, settings: Settings) -> bool:
    """Say whether a mail is a report or an alert that this host sends.

    If it were counted, an exhausted limit would suppress its own alert.  The
    envelope can be forged, so three conditions ensure that nobody gains by
    that: the client is this host, it has not logged in as someone else, and
    the only recipient is one of report_to.
    """
    if not (settings.report or settings.alert):
        return False
    attributes = request.attributes
    address = parse_address(request.client_address)
    if address is None or not (
            address.is_loopback
            or address == parse_address(attributes.get("server_address", ""))):
        return False
    login, _ = settings.smtp_credentials or ("", "")
    if request.sasl_username not in ("", login):
        return False
    if request.recipient_count > 1:
        return False
    wanted = {fold(address) for address in settings.report_to}
    return (fold(attributes.get("recipient", "")) in wanted
            and is_report_sender(fold(request.sender), settings.report_from))


def is_report_sender(sender: str, report_from: str | None) -> bool:
    """Say whether a folded sender is that of reports."""
    if report_from:
        from email.utils import parseaddr

        return sender == fold(parseaddr(report_from)[1])
    return sender.startswith(f"{PROGRAM}@")  # the host name may vary


def limits_under(rule: Rule, by: tuple[str, ...], name: str) -> Limits:
    """Return a rule's limits for a name; by: the attributes it is from."""
    limits: Limits | None = rule.limits_by_id.find(name, by in ADDRESSES)
    return rule.limits if limits is None else limits


def named_by(settings: Settings, rule: Rule, identity: str,
             ) -> tuple[tuple[str, ...], str]:
    """Return which attributes an identity is from, and their value."""
    if rule.by:
        return rule.by, identity.partition("=")[2]
    name = identity[1:] if identity.startswith("=") else identity
    if not settings.limit_by_sasl and "@" in name:
        return ("sender",), fold(name)
    prefix, _, sender = name.partition("=")
    if prefix == "sender" and settings.limit_by_sender:
        return ("sender",), sender
    return ("sasl_username",), fold(name)  # or an address, matched likewise


def rule_of(settings: Settings, identity: str) -> Rule:
    """Return the rule that an identity is counted for."""
    name, equals, _ = identity.partition("=")
    quotas = [rule for rule in settings.rules[1:] if rule.name == name]
    return quotas[0] if equals and quotas else settings.rules[0]


def key_of(settings: Settings, spelt: str) -> str:
    """Return the identity or the quota's key that an admin means."""
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

MAX_ACTION = 400  # bytes; an SMTP reply has up to 512 (RFC 5321, 4.5.3.1.5)
TAKES_TEXT = re.compile(  # actions of access(5) that end with a reply's text
    r"(?i:[45]\d\d|reject|defer|defer_if_permit|defer_if_reject)")
PLAIN_VALUE = re.compile(r"[\w.@+:/-]*")  # needs no quoting: most values
FIELDS = re.compile(  # names of fields in the log, with their "="
    "(identity|cost|used|client|broken|attempts|action|"
    + "|".join(ATTRIBUTES) + ")=", re.IGNORECASE)


def describe(verdict: Verdict, client: str = "", attempts: int = 0) -> str:
    """Return a verdict for the log, in Postfix's key=value style."""
    broken, parts = verdict.broken, []
    for claim, group in itertools.groupby(
            verdict.usage, operator.attrgetter("claim")):
        cost = 0 if broken else claim.cost
        used = " ".join(describe_use(usage, cost) for usage in group)
        parts.append(f"identity=<{quote_key(claim)}>, cost={claim.cost},"
                     f" used={used}")
    parts += [f"would refuse for <{quote_key(usage.claim)}>"
              f" {ratio(usage.limit)}" for usage in verdict.tried]
    if broken:
        key = f"{quote_key(broken.claim)} " if broken.claim.rule.by else ""
        parts.append(f"client={client}, broken={key}{ratio(broken.limit)},"
                     f" attempts={attempts}")
        excess = describe_excess(broken)
        if excess:
            parts.append(excess)
        if verdict.block is not None and verdict.block.reason:
            parts.append(f"blocked since {moment(verdict.block.made)} for"
                         f" exceeding {verdict.block.reason}")
    return ", ".join(parts) or "no limits"


def describe_use(usage: Usage, cost: int) -> str:
    """Return what is used of a limit, including a mail's cost."""
    limit = ratio(usage.limit)
    return limit if is_block(usage.limit) else f"{usage.used + cost}/{limit}"


def describe_excess(broken: Usage) -> str:
    """Return that one mail alone exceeds a limit, "" if it does not."""
    cost, most = broken.claim.cost, broken.limit.mails
    if is_block(broken.limit) or cost <= most:
        return ""
    unit = "bytes" if broken.claim.rule.count == "bytes" else "recipients"
    return f"too many {unit} in one message: {cost}, at most {most}"


def explain(verdict: Verdict, block_action: str, now: float) -> str:
    """Return the action for a refused mail, its variables replaced."""
    assert verdict.broken is not None
    claim, limit, used = verdict.broken
    action, excess = claim.rule.fail_action, describe_excess(verdict.broken)
    if verdict.block is not None:
        action = block_action
    if "$" in action:
        at = within = "never"
        if verdict.room_at is not None:
            at = moment(verdict.room_at)
            within = spell(max(verdict.room_at - math.ceil(now), 1))
        action = string.Template(action).substitute(
            identity=quote_key(claim), used=used, mails=limit.mails,
            seconds=limit.seconds, window=spell(limit.seconds),
            room_at=at, room_in=within)
    if excess and TAKES_TEXT.fullmatch(action.split()[0]):
        action += f" ({excess})"
    return action.encode()[:MAX_ACTION].decode(errors="ignore")


def ratio(limit: Limit | Refusal) -> str:
    """Return a limit as the log shows it: 10/60s."""
    if is_block(limit):
        return "blocked"
    if limit.mails < 0:  # the original did not record the number
        return f"{limit.seconds}s"
    return f"{limit.mails}/{limit.seconds}s"


def is_block(limit: Limit | Refusal) -> bool:
    """Say whether a limit lets no mail pass, like the one of --block."""
    return limit.mails == 0


def limit_in_words(limit: Limit, rule: Rule, count_mode: str | int) -> str:
    """Return a limit in words: at most 10 mails in 1 minute."""
    if is_block(limit):
        return "blocked"
    unit = rule.count or ("mails" if count_mode == 2 else "recipients")
    of = ""
    if unit not in ("mails", "recipients", "bytes"):
        unit, of = "different values", f" of {unit}"
    if limit.mails == 1:
        unit = unit[:-1]
    return f"at most {limit.mails} {unit}{of} in {spell(limit.seconds)}"


def spell(seconds: int) -> str:
    """Return a number of seconds in words, rounded up: 1 hour, 90 minutes."""
    size, unit = next((size, unit) for size, unit in (
        (86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))
        if seconds % size == 0 or seconds >= 10 * size)
    number = math.ceil(seconds / size)
    return f"{number} {unit}{'s' if number > 1 else ''}"


def describe_rules(settings: Settings) -> Iterator[str]:
    """Yield what is limited, in words: a line for each rule."""
    first, *quotas = settings.rules
    subjects = []
    if settings.limit_by_sasl:
        subjects.append("login")
    if settings.limit_by_sender:
        subjects.append("sender")
    if settings.limit_by_ip and settings.limited_networks:
        subjects.append("client address in limited_networks")
    if subjects:
        words = describe_rule(settings, first)
        if settings.sql_limits_by_id:
            words += "; sql_limits_by_id may give others"
        yield f"each {', else each '.join(subjects)}: {words}"
    for rule in quotas:
        by = "+".join(rule.by)
        subject = "all mail together" if by == "server" else f"each {by}"
        name = "" if rule.name == by else f"{printable(rule.name)}: "
        yield f"{name}{subject}: {describe_rule(settings, rule)}"


def describe_rule(settings: Settings, rule: Rule) -> str:
    """Return a rule's limits in words, with its exceptions and conditions."""
    what = rule.count or "mails"
    if what not in COUNTS:
        what = f"different values of {what}"
    limits = [f"{limit.mails} {per(limit.seconds)}" for limit in rule.limits]
    if limits:
        limits[0] = limits[0].replace(" ", f" {what} ", 1)
    words = [", ".join(limits) or "no limits"]
    most = min((limit.mails for limit in rule.limits), default=0)
    by_recipients = rule.count == "recipients" or (
        not rule.count and settings.count_mode != 2)
    if most and by_recipients and settings.count_mode != 0:
        words.append(f"a mail to more than {most} recipients is always"
                     " refused")
    exceptions = sum(1 for _ in rule.limits_by_id.entries())
    if exceptions:
        words.append(f"{exceptions} in limits_by_id "
                     f"{'has' if exceptions == 1 else 'have'} other limits")
    if rule.when:
        names = ", ".join(attribute for attribute, _ in rule.when)
        words.append(f"only where its \"when\" matches ({names})")
    if rule.dry_run:
        words.append("dry_run: nothing is refused")
    return "; ".join(words)


def per(seconds: int) -> str:
    """Return a limit's window in words: per hour, in 90 seconds."""
    size, unit = next((size, unit) for size, unit in (
        (604800, "week"), (86400, "day"), (3600, "hour"), (60, "minute"),
        (1, "second")) if seconds % size == 0)
    number = seconds // size
    return f"per {unit}" if number == 1 else f"in {number} {unit}s"


def moment(date: float) -> str:
    """Return a date, in epoch seconds, as local time: 2026-01-31 23:59:59."""
    return datetime.fromtimestamp(date).strftime("%Y-%m-%d %H:%M:%S")


def term(ends: int | None) -> str:
    """Return how long an override applies, in words."""
    return "permanently" if ends is None else f"until {moment(ends)}"


def describe_override(override: Override) -> str:
    """Return until when an override applies, since when, and why."""
    words = term(override.ends)
    if override.made:
        words += f", since {moment(override.made)}"
    if override.reason:
        words += f", for exceeding {override.reason}"
    return words


def main_cf(count_mode: str | int, address: str | tuple[str, int]) -> str:
    """Return the line for main.cf that makes Postfix ask at an address."""
    stage = "recipient" if count_mode == 0 else "data"
    return f"smtpd_{stage}_restrictions = {policy_check(address)}"


def policy_check(address: str | tuple[str, int],
                 queue: str = "/var/spool/postfix") -> str:
    """Return the restriction by which Postfix asks at an address.

    A path below Postfix's queue directory is written relative to it, so that
    a chrooted smtpd finds it, too.
    """
    kind = "unix" if isinstance(address, str) else "inet"
    where = format_address(address)
    if isinstance(address, str) and address.startswith(f"{queue}/"):
        where = address[len(queue) + 1:]
    return f"check_policy_service {{ {kind}:{where}, default_action=DUNNO }}"


def format_address(address: str | tuple[str, int]) -> str:
    """Return the path of a socket, or host:port as Postfix writes it."""
    if isinstance(address, str):
        return address
    host, port, *_ = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def printable(text: str) -> str:
    """Return text with "?" for each control or other unprintable character.

    So no text can forge a line of the log.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else "?" for c in text)


def quote(text: str) -> str:
    """Return a value escaped, so that it cannot forge a field of the log."""
    if PLAIN_VALUE.fullmatch(text):
        return text
    text = re.sub(r"[\\<>,]", lambda found: f"\\x{ord(found[0]):02x}",
                  printable(text))
    return FIELDS.sub(r"\1\\x3d", text)


def quote_key(claim: Claim) -> str:
    """Return the identity or key of a claim, its value escaped by quote()."""
    name, equals, value = claim.identity.partition("=")
    if equals and (claim.rule.by or name + equals == SENDER_KEY):
        return f"{name}={quote(value)}"
    return quote(claim.identity)


def undecodable(text: str) -> str:
    """Return text for a header, without encoded words (RFC 2047).

    A client chose some of the text; a decoded line break would begin a new
    header.
    """
    return text.replace("=?", "= ?")


def align(rows: Sequence[Sequence[str]], columns: int = 999) -> Iterator[str]:
    """Yield a table's lines; shorten the first column to fit, if necessary.

    Columns that are empty below their heading are left out.  Escape codes
    that colour a cell are not counted as width.
    """
    widths = [max(map(shown_width, column)) if any(column[1:]) else 0
              for column in zip(*rows)]
    others = [width for width in widths[1:] if width]
    room = columns - sum(others) - len(others)
    width = max(12, min(widths[0], room))
    for name, *cells in rows:
        name = name if len(name) <= width else name[:width - 3] + "..."
        line = f"{name:{width}}"
        for cell, wide in zip(cells, widths[1:]):
            if wide:
                line += " " * (1 + wide - shown_width(cell)) + cell
        yield line.rstrip() if "\033" in line else line[:columns].rstrip()


def shown_width(cell: str) -> int:
    """Return the columns that a cell takes on a terminal."""
    return len(re.sub(r"\033\[\d*m", "", cell))


# ---------------------------------------------------------------------------
# 6. Database
#
# The differences between the three databases, a transaction that needs few
# round trips, and one connection for all threads.
# ---------------------------------------------------------------------------

Connection = Any  # of the DB-API (PEP 249)
Row = tuple[Any, ...]
Cursor = Any
COLUMNS = {  # of mail_count; an update adds total last
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
                    " client {name}, told {number} DEFAULT 0,"
                    " PRIMARY KEY (id, seconds)",
    "mail_limit": "id {name} PRIMARY KEY, limits text NOT NULL,"
                  " ends {number}, made {number}",
    "mail_window": "host {name}, seconds {number}, query {name},"
                   " since {number}, date {number},"
                   " PRIMARY KEY (host, seconds, query)",
}


class MailRow(NamedTuple):
    """A row of mail_count, in the order of COLUMNS."""

    identity: str
    date: int  # epoch seconds, rounded up
    cost: int  # recipient_count
    instance: str
    state: str  # protocol_state
    total: int | None  # None: not computed yet


INSERT = f"INSERT INTO mail_count ({', '.join(COLUMNS)}) VALUES {{}}"
PATIENCE = 3600  # seconds allowed for reading or updating whole tables
MAX_CLOCK_DIFFERENCE = 2  # seconds; more than this is logged
MAX_JOINED = 100  # statements per round trip: servers limit its bytes
TOO_SLOW = "the database is too slow"
MULTI_STATEMENTS = 0x10000  # MySQL's flag: statements may be joined
RATE_LIMITS = ("CREATE TABLE rate_limits (id integer NOT NULL PRIMARY KEY {},"
               " limits varchar(255) NOT NULL)")
INDEX = ("CREATE INDEX mail_count_total"
         " ON mail_count (id, date, total, recipient_count)")
REFUSED = ("INSERT INTO mail_refused"
           " (id, seconds, mails, hits, first, last, client, told) VALUES {}")
ADD_TOLD = ("ALTER TABLE mail_refused"
            " ADD COLUMN told bigint NOT NULL DEFAULT 0")
STORE_WINDOW = ("INSERT INTO mail_window (host, seconds, query, since, date)"
                " VALUES (?, ?, ?, ?, ?)")


class Backend:
    """What differs between databases; the defaults suit most of them."""

    name: str
    drivers: tuple[tuple[str, str], ...]  # modules and Debian's packages
    placeholder = "%s"  # for a value, in the driver's statements
    asks_singly = False  # whether each row needs a separate query
    joins = True  # whether one call may execute several statements
    encoding = "UTF8"  # of the database
    waits_for_ever = False  # whether the driver has no timeout for answers
    clock = ""  # SQL for the server's epoch seconds; "": this host's clock
    begin = begin_reading = "BEGIN"
    chunk = 50  # rows per statement: each statement costs a round trip
    identity = f"varchar({MAX_IDENTITY})"  # the type of an identity
    numbered = ""  # makes ids of rate_limits increment, like the original's
    alter_original: tuple[str, ...] = ()  # adapts the original's tables
    add_total: tuple[str, ...] = (
        f"ALTER TABLE mail_count ADD COLUMN total {COLUMNS['total']}", INDEX)
    try_total = ""  # changes nothing; fails without the right for add_total
    try_table = "{}"  # likewise, for a statement that creates a table
    # Server variables that decide whether a commit is on disk: the name, a
    # query for the value, and the values with which commits are durable.
    durable: tuple[tuple[str, str, tuple[str, ...]], ...] = ()
    take_turn = ""  # takes an identity's turn if several hosts may write
    add_refusals = (
        f"{REFUSED} ON CONFLICT (id, seconds) DO UPDATE SET"
        " mails = excluded.mails, hits = mail_refused.hits + excluded.hits,"
        " last = excluded.last, client = excluded.client")
    add_values = (
        "INSERT INTO mail_value (id, value, date) VALUES {} ON CONFLICT"
        " (id, value) DO UPDATE SET date = excluded.date"
        " WHERE mail_value.date < excluded.date")  # dates never decrease
    store_window = (f"{STORE_WINDOW} ON CONFLICT (host, seconds, query)"
                    " DO UPDATE SET date = ?")
    conflicts: tuple[object, ...] = ()  # error codes after which to try again

    def __init__(self, settings: Settings) -> None:
        """Read how to connect; raise ConfigError if there is no driver."""
        self.timeout = min(settings.db_timeout, 90)  # Postfix waits 100 s
        self.wants_rate_limits = bool(settings.sql_limits_by_id)
        self.config = self.choose(settings)
        self.driver = import_driver(self.drivers)

    def choose(self, settings: Settings) -> dict[str, Any]:
        """Return the arguments of the driver's connect()."""
        raise NotImplementedError

    def connect(self, timeout: int) -> Connection:
        """Connect; no answer may take longer than timeout, in seconds.

        Raise the driver's exceptions.
        """
        raise NotImplementedError

    def close(self, connection: Connection) -> None:
        """Close a connection, even one that is dead."""
        connection.close()

    def connect_to_read(self) -> Connection:
        """Connect only to read, with time enough for large tables."""
        return self.connect(PATIENCE)

    def set_up(self, transaction: Transaction, timeout: int) -> None:
        """Run the statements that every connection needs first."""

    def set_up_file(self, transaction: Transaction) -> None:
        """Run the statements that are needed before the first write."""

    def note_files(self, transaction: Transaction) -> None:
        """Remember which files were opened, if the database has files."""

    def cut(self, connection: Connection) -> None:
        """End a wait for an answer on a connection, from another thread."""
        raise NotImplementedError

    @contextlib.contextmanager
    def patience(self, connection: Connection) -> Iterator[None]:
        """Cut the connection if the block does not end in time."""
        if not self.waits_for_ever:
            yield
            return
        timer = threading.Timer(self.timeout, self.cut, [connection])
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def is_stale(self) -> bool:
        """Say whether the connection is known to be outdated."""
        return False

    def skip_results(self, cursor: Cursor, count: int) -> None:
        """Skip the results of the first statements of a joined call."""
        for _ in range(count):
            cursor.nextset()

    def fit(self, values: Sequence[object]) -> Sequence[object]:
        """Return values, changed where the database cannot store them."""
        return values

    def is_conflict(self, error: Exception) -> bool:
        """Say whether another transaction caused an error: try again."""
        codes = (*error.args[:1], getattr(error, "pgcode", None),
                 getattr(error, "sqlstate", None))
        return any(code in self.conflicts for code in codes)

    def explain(self, error: Exception) -> str:
        """Return the text of an error in one line, with the database."""
        return printable(f"{self.name}: {' '.join(str(error).split())}")

    def describe_for_check(
            self, examine: Callable[[Transaction], None]) -> str:
        """Examine the database; return its version and driver in words.

        Change nothing.  Raise LedgerError if mail could not be counted.
        """
        try:
            with contextlib.closing(self.connect(
                    self.timeout)) as connection, self.patience(connection):
                transaction = Transaction(self, connection, math.inf)
                self.set_up(transaction, self.timeout)
                if self.begin:
                    transaction.later(self.begin)
                [version] = transaction.run("SELECT version()").fetchone()
                examine(transaction)
        except Exception as error:
            raise LedgerError(self.explain(error)) from error
        if self.encoding != "UTF8":
            log.warning("the encoding of the database is %s, not UTF8: names"
                        " that are not ASCII are counted under their hash",
                        self.encoding)
        return f"{version}, through {self.driver.__name__}"


SQLITE_FILES = ("", "-wal", "-shm")  # the database, its WAL and WAL index
# A process that has the database, or the WAL index, open holds locks on these
# bytes (SHARED_FIRST and UNIX_SHM_DMS in SQLite's os.h and os_unix.c).
SHARED_BYTES = (0x40000002, 510)
INDEX_BYTES = (128, 1)
FileIdentities = list[Optional[tuple[int, int]]]  # device and inode of each
NOTHING_OPENED: tuple[str, FileIdentities] = ("", [])  # or it is in memory
REPLACED = ("the file was replaced, and the daemon has not noticed yet; try"
            " again in a minute, or restart it")


class SQLite(Backend):
    """SQLite: one file, one host."""

    _looking = threading.Lock()
    _looked_at: set[str] = set()  # paths that _check_log() has checked
    _opened = NOTHING_OPENED  # the path, and the files that were there
    _folder = ""  # of the path
    _settled_at = 0  # mtime of the folder, in ns, when nothing was replaced

    name = "SQLite"
    drivers = (("sqlite3", "libpython3-stdlib"),)
    placeholder = "?"
    joins = False
    begin = "BEGIN IMMEDIATE"
    chunk = 1  # a statement costs no round trip and is prepared only once
    add_total = ("DROP INDEX IF EXISTS mail_count_index",
                 "DROP INDEX IF EXISTS mail_count_total", *Backend.add_total)

    def choose(self, settings: Settings) -> dict[str, Any]:
        """Return the arguments of sqlite3.connect()."""
        config = {"timeout": self.timeout, **settings.sqlite_config,
                  "isolation_level": None, "check_same_thread": False}
        if database_path(config) is None:  # one database, all connections
            config["database"] = f"file:{id(self)}?mode=memory&cache=shared"
            config["uri"] = True
        return config

    def connect(self, timeout: int) -> Connection:
        """Open the file."""
        self._check_log()
        return self.driver.connect(**self.config)

    def set_up_file(self, transaction: Transaction) -> None:
        """Make commits survive a power failure; limit the WAL's size."""
        self._use_log(transaction)
        transaction.run("PRAGMA synchronous = FULL")
        transaction.run(f"PRAGMA journal_size_limit = {2**24}")
        transaction.run("PRAGMA schema_version")  # creates -wal and -shm

    def note_files(self, transaction: Transaction) -> None:
        """Remember which files were opened, for is_stale()."""
        [[_, _, path]] = transaction.run("PRAGMA database_list").fetchall()
        self._opened = path, identify_files(path)
        self._folder = os.path.dirname(path) or "."
        self._settled_at = 0

    def _use_log(self, transaction: Transaction) -> None:
        """Switch to WAL mode; retry while other processes do the same.

        SQLite's busy timeout does not apply to this statement.
        """
        while True:
            try:
                transaction.run("PRAGMA journal_mode = WAL")
                return
            except self.driver.OperationalError as error:
                is_late = time.monotonic() > transaction.deadline
                if is_late or "locked" not in str(error):
                    raise
            time.sleep(0.01)

    def connect_to_read(self) -> Connection:
        """Open the file only to read; do not create a missing one."""
        self._check_log()
        path = database_path(self.config)
        if path is None:
            raise PolicydError("the database is in the daemon's memory, which"
                               " no other process can read")
        if not self.config.get("uri") or not os.path.exists(path):
            path = urllib.parse.quote(os.path.abspath(path))
            return self.driver.connect(**{**self.config, "uri": True,
                                          "database": f"file:{path}?mode=rw"})
        return self.driver.connect(**self.config)

    def is_stale(self) -> bool:
        """Say whether the files are no longer those that were opened.

        Files are only replaced when their folder changes, so its mtime is
        checked first: one stat() instead of three.
        """
        path, files = self._opened
        try:
            changed = os.stat(self._folder).st_mtime_ns
        except OSError:
            changed = 0
        if changed and changed == self._settled_at:
            return False
        if identify_files(path) != files:
            return True
        if time.time_ns() - changed > 10**9:  # a later change changes mtime
            self._settled_at = changed
        return False

    def close(self, connection: Connection) -> None:
        """Close the file; do not touch files that have replaced it."""
        (path, old), self._opened = self._opened, NOTHING_OPENED
        new = identify_files(path)
        if new == old:
            connection.close()
            return
        lost = new[0] != old[0] or are_foreign(new, old)
        log.error("%s, or its -wal or -shm, was replaced or removed while in"
                  " use%s; stop the daemon before you do that", path,
                  ": the last mails counted may be lost" if lost else "")
        if new[0] != old[0]:
            leave_moved(connection, path, new, old)
        elif are_foreign(new, old):
            leave_logged(connection, path)
        connection.close()

    def describe_for_check(
            self, examine: Callable[[Transaction], None]) -> str:
        """Examine the file, if there is one, while holding its lock."""
        config, path = dict(self.config), database_path(self.config)
        missing = path is not None and not os.path.exists(path)
        only_existing = re.search("[?&]mode=r[ow](&|#|$)", config["database"])
        if missing and not only_existing:  # a start creates the file
            config["database"] = ":memory:"
        try:
            self._check_log()
            with contextlib.closing(
                    self.driver.connect(**config)) as connection:
                transaction = Transaction(self, connection, math.inf)
                transaction.run(self.begin)
                examine(transaction)  # in memory: tests the query
        except Exception as error:  # connect() may raise TypeError
            raise LedgerError(self.explain(error)) from error
        where = "in memory" if path is None else path
        return f"SQLite {self.driver.sqlite_version}, {where}"

    def explain(self, error: Exception) -> str:
        """Return the text of an error with the path of the database."""
        return printable(f"{self.config.get('database')}: {error}")

    def _check_log(self) -> None:
        """Raise OSError if -wal belongs to a file that this one replaced.

        SQLite would apply it to this file and corrupt it.
        """
        path, is_other = database_path(self.config), False
        with self._looking:
            if path is None or path in self._looked_at:
                return  # closing a file drops this process's locks (fcntl(2))
            with contextlib.suppress(OSError), open(path, "rb") as file, open(
                    f"{path}-shm", "rb") as index:
                is_other = (is_locked(index.fileno(), *INDEX_BYTES)
                            and not is_locked(file.fileno(), *SHARED_BYTES))
            if is_other:
                raise OSError(REPLACED)
            self._looked_at.add(path)


def identify_files(path: str) -> FileIdentities:
    """Return device and inode of each of a database's files, None: missing."""
    found: FileIdentities = []
    for suffix in SQLITE_FILES if path else ():
        try:
            status = os.stat(path + suffix)
        except OSError:
            found.append(None)
        else:
            found.append((status.st_dev, status.st_ino))
    return found


def are_foreign(new: FileIdentities, old: FileIdentities) -> bool:
    """Say whether -wal or -shm now belongs to another database."""
    return any(now and now != then for now, then in zip(new[1:], old[1:]))


def leave_moved(connection: Connection, path: str, new: FileIdentities,
                old: FileIdentities) -> None:
    """Finish with a database that was moved; remove its WAL from the path.

    Closing does neither, so SQLite would take the WAL for the new file's.
    """
    with contextlib.suppress(Exception):
        connection.execute("PRAGMA wal_checkpoint")
    for suffix, now, then in zip(SQLITE_FILES[1:], new[1:], old[1:]):
        if now and now == then:
            os.unlink(path + suffix)


def leave_logged(connection: Connection, path: str) -> None:
    """Close a database that other processes have opened with another WAL.

    SQLite would checkpoint our WAL into it and remove theirs by its name.  A
    lock that looks like another process's prevents both.
    """
    with open(path, "rb") as file:
        with contextlib.suppress(AttributeError, OSError):  # only on Linux
            fcntl.fcntl(file, fcntl.F_OFD_SETLK,
                        flock(fcntl.F_RDLCK, *SHARED_BYTES))
        connection.close()


def is_locked(file: int, start: int, length: int) -> bool:
    """Say whether another process has locked bytes of a file."""
    with contextlib.suppress(AttributeError):  # only on Linux
        found = fcntl.fcntl(file, fcntl.F_OFD_GETLK,
                            flock(fcntl.F_WRLCK, start, length))
        return found != flock(fcntl.F_UNLCK, start, length)
    return False


def flock(kind: int, start: int, length: int) -> bytes:
    """Return a struct flock for fcntl(2), as Linux defines it."""
    return struct.pack("hhqqi", kind, os.SEEK_SET, start, length, 0)


# The values that an upsert wanted to insert: MySQL 8.0.20 has deprecated
# VALUES(), MariaDB has no row alias.  Each server executes the comments that
# are marked for it and ignores the others.
UPSERT = "/*!80020 AS new */ ON DUPLICATE KEY UPDATE"
NEW = "/*!80020 new.{0} */ /*M! VALUE({0}) */"
SESSION = (  # needed for counting, whatever init_command or the server sets
    # Else a host that dies in a transaction keeps its identities locked.
    # MySQL has no limit for transactions, but one for all idle connections.
    "SET /*M!100300 idle_transaction_timeout = {0}, */"
    " /*!80000 wait_timeout = {1}, */"
    " autocommit = 0, completion_type = 'NO_CHAIN',"
    " sql_mode = 'STRICT_ALL_TABLES',"  # without EMPTY_STRING_IS_NULL
    f" sql_select_limit = {2**64 - 1}, sql_big_selects = 1,"
    " sql_safe_updates = 0, default_storage_engine = InnoDB,"
    " lock_wait_timeout = {0}, innodb_lock_wait_timeout = {0}",
    # The first SELECT takes the snapshot, which is after the turn.
    "SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ WRITE",
    "SET NAMES utf8mb4 COLLATE utf8mb4_bin",
)


def database_path(config: Mapping[str, Any]) -> str | None:
    """Return the path of an SQLite database, None if it is in memory.

    config: sqlite_config; with uri: True, its database is a URI
    (https://www.sqlite.org/uri.html).
    """
    name = str(config["database"])
    if name == ":memory:":
        return None
    if not config.get("uri") or not name.startswith("file:"):
        return name
    path, _, query = name[len("file:"):].partition("#")[0].partition("?")
    if path.startswith("//"):  # an authority, empty or localhost
        path = "/" + path[2:].partition("/")[2]
    path = urllib.parse.unquote(path)
    in_memory = urllib.parse.parse_qs(query).get("mode") == ["memory"]
    return None if in_memory or path in ("", ":memory:") else path


class MySQL(Backend):
    """MariaDB and MySQL, including Galera clusters."""

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
    add_total = (  # one ALTER, which fails as a whole if it is already done
        "SET @alter = (SELECT CONCAT('ALTER TABLE mail_count ',"
        " IF(COUNT(*), 'DROP INDEX mail_count_total, ', ''),"
        f" 'ADD COLUMN total {COLUMNS['total']}, ADD INDEX mail_count_total"
        " (id, date, total, recipient_count)')"
        " FROM information_schema.statistics WHERE table_schema = DATABASE()"
        " AND table_name = 'mail_count' AND index_name = 'mail_count_total')",
        "PREPARE add_total FROM @alter", "EXECUTE add_total")
    try_total = "ALTER TABLE mail_count"
    try_table = "PREPARE try_table FROM '{}'"
    durable = (  # 3: only on MariaDB
        ("innodb_flush_log_at_trx_commit",
         "SELECT @@innodb_flush_log_at_trx_commit", ("1", "3")),)
    take_turn = ("INSERT INTO mail_turn (id, turn) VALUES {}"
                 " ON DUPLICATE KEY UPDATE turn = turn + 1")
    add_refusals = (
        f"{REFUSED} {UPSERT} mails = {NEW.format('mails')},"
        f" hits = mail_refused.hits + {NEW.format('hits')},"
        f" last = {NEW.format('last')}, client = {NEW.format('client')}")
    add_values = (
        f"INSERT INTO mail_value (id, value, date) VALUES {{}} {UPSERT}"
        f" date = GREATEST(mail_value.date, {NEW.format('date')})")
    # ER_CHECKREAD; ER_LOCK_DEADLOCK; ER_TABLE_DEF_CHANGED; and a table, a
    # column or an index that another host has created first.
    conflicts = (1020, 1213, 1412, 1050, 1060, 1061)
    clock = ("TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(6))"
             " / 1000000")
    asks_singly = True
    store_window = f"{STORE_WINDOW} ON DUPLICATE KEY UPDATE date = ?"
    # Not BEGIN, but autocommit off: with BEGIN a Galera cluster let 101 to 116
    # mails of 100 pass, for one in six identities that all nodes counted.
    begin = begin_reading = ""

    def choose(self, settings: Settings) -> dict[str, Any]:
        """Return the arguments of connect(); utf8mb4 is all of Unicode."""
        renamed = {"db": "database", "passwd": "password"}  # in PyMySQL 1.2
        return {**{renamed.get(name, name): value for name, value
                   in settings.mysql_config.items()}, "charset": "utf8mb4"}

    def connect(self, timeout: int) -> Connection:
        """Connect with a timeout for each answer."""
        connection = self.driver.connect(**{
            "connect_timeout": self.timeout, "read_timeout": timeout,
            "write_timeout": timeout, **self.config, "client_flag":
            (self.config.get("client_flag") or 0) | MULTI_STATEMENTS})
        connection.autocommit(False)
        with contextlib.closing(connection.cursor()) as cursor:
            for statement in SESSION:  # lock waits end before the timeout
                cursor.execute(statement.format(
                    max(1, timeout - 1), max(30, 2 * timeout)))
        return connection


class PostgreSQL(Backend):
    """PostgreSQL."""

    name = "PostgreSQL"
    waits_for_ever = True  # libpq has no such timeout
    clock = "EXTRACT(EPOCH FROM clock_timestamp())"
    drivers = (("psycopg2", "python3-psycopg2"),
               ("psycopg", "python3-psycopg"))
    alter_original = (
        f"ALTER TABLE mail_count ALTER COLUMN id TYPE {Backend.identity},"
        " ALTER COLUMN protocol_state TYPE varchar(20)",
    )
    add_total = SQLite.add_total
    try_total = Backend.add_total[0]  # the transaction is rolled back
    durable = (
        ("synchronous_commit", "SELECT current_setting('synchronous_commit')",
         ("on", "local", "remote_write", "remote_apply")),
        ("fsync", "SELECT current_setting('fsync')", ("on",)))
    take_turn = (
        "INSERT INTO mail_turn (id, turn) VALUES {}"
        " ON CONFLICT (id) DO UPDATE SET turn = mail_turn.turn + 1")
    conflicts = (  # serialization failure, deadlock, lock_timeout
        "40001", "40P01", "55P03",
        # created by another host: table, column, index; unique_violation
        "42P07", "42701", "42710", "23505")

    def choose(self, settings: Settings) -> dict[str, Any]:
        """Return the arguments of connect(), database as dbname."""
        return {"dbname" if name == "database" else name: value
                for name, value in settings.pgsql_config.items()}

    def connect(self, timeout: int) -> Connection:
        """Connect; only this first answer has a timeout."""
        connection = self.driver.connect(**{
            "connect_timeout": self.timeout, **self.config,
            "client_encoding": "UTF8"})
        connection.autocommit = True
        self.encoding = connection.info.parameter_status("server_encoding")
        if hasattr(self.driver, "ClientCursor"):  # psycopg 3: joins statements
            connection.cursor_factory = self.driver.ClientCursor
        return connection

    def set_up(self, transaction: Transaction, timeout: int) -> None:
        """Set what counting needs.

        lock_timeout: without it, a statement goes on waiting on the server
        after cut().
        """
        transaction.run(  # whatever options or the role set
            "SET default_transaction_isolation = 'read committed';"
            " SET default_transaction_read_only = off;"
            " SET standard_conforming_strings = on; SET statement_timeout = 0;"
            f" SET lock_timeout = {timeout * 900};"
            # Else a host that dies here keeps its identities locked.
            f" SET idle_in_transaction_session_timeout = {timeout * 1000}")

    def cut(self, connection: Connection) -> None:
        """Shut down the socket, so that the driver reports a lost server."""
        with contextlib.suppress(Exception), socket.socket(
                fileno=os.dup(connection.fileno())) as line:
            line.shutdown(socket.SHUT_RDWR)

    def fit(self, values: Sequence[object]) -> Sequence[object]:
        """Return values; if not all of Unicode fits, some as a hash."""
        if self.encoding == "UTF8":
            return values
        return [hashed(value) if isinstance(value, str)
                and not value.isascii() else value for value in values]

    def skip_results(self, cursor: Cursor, count: int) -> None:
        """Skip to the last result, the only one that psycopg2 keeps."""
        if hasattr(self.driver, "ClientCursor"):
            super().skip_results(cursor, count)


def hashed(text: str) -> str:
    """Return the ASCII characters of a text, followed by its hash."""
    return (text.encode("ascii", "ignore").decode()[:100] + "#"
            + hashlib.sha256(text.encode()).hexdigest())


BACKENDS = (SQLite, MySQL, PostgreSQL)


def import_driver(drivers: Sequence[tuple[str, str]]) -> Any:
    """Return the first driver that is installed, or raise ConfigError."""
    for module, _ in drivers:
        with contextlib.suppress(ImportError):
            return importlib.import_module(module)
    raise ConfigError("no database driver found; install "
                      + " or ".join(package for _, package in drivers))


class Transaction:
    """Executes statements in few round trips; Database begins and commits."""

    def __init__(self, backend: Backend, connection: Connection,
                 deadline: float) -> None:
        """Take a connection and a deadline (time.monotonic())."""
        self.backend = backend
        self.deadline = deadline  # Database gives up then; see extend()
        self.answered = False  # whether any statement has succeeded
        self.cursor: Cursor = connection.cursor()
        self._waiting: list[tuple[str, Sequence[object]]] = []

    def extend(self, seconds: float) -> None:
        """Allow more seconds, for more work than one mail needs."""
        self.deadline += seconds

    def run(self, statement: str, *values: object) -> Cursor:
        """Execute waiting statements and this one; return its cursor."""
        if time.monotonic() > self.deadline:
            raise TimeoutError(TOO_SLOW)
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
        """Execute a statement with the next run(), if the driver can."""
        if self.backend.joins and len(self._waiting) < MAX_JOINED:
            self._waiting.append((statement, values))
        else:
            self.run(statement, *values)

    def flush(self) -> None:
        """Execute the waiting statements."""
        if self._waiting:
            statement, values = self._waiting.pop()
            self.run(statement, *values)

    def write(self, statement: str, rows: Sequence[Sequence[object]]) -> None:
        """Write rows with the next run(), several with each statement.

        statement: has {} in place of the rows' placeholders.
        """
        if not rows:
            return
        place = "(" + ", ".join("?" * len(rows[0])) + ")"
        if not self.backend.joins:
            self.cursor.executemany(statement.format(place), rows)
            return
        for some in chunks(rows, self.backend.chunk):
            self.later(statement.format(", ".join([place] * len(some))),
                       *itertools.chain(*some))

    def attempt(self, warning: str, work: Callable[..., T], *given: Any,
                ) -> T | None:
        """Return work(self, *given); if it fails, undo it and return None.

        Conflicts are raised.  warning: a format for the error's text, or "".
        """
        # For work whose failure must not cost the verdicts.
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
    """One connection for all threads, reopened when it is dead."""

    def __init__(self, backend: Backend,
                 prepare: Callable[[Database, float], float]) -> None:
        """Open nothing yet.

        prepare: called with this and a deadline after connecting; prepares
        the tables and returns the new deadline.
        """
        self.backend = backend
        self.lock = threading.RLock()  # guards the connection
        self._prepare = prepare
        self._connection: Connection = None
        self._under_way: Transaction | None = None
        self._clock_offset = 0.0  # seconds that the server's clock is ahead

    def clock(self) -> float:
        """Return the time by the server's clock, in epoch seconds.

        All hosts that share a database agree on it.
        """
        return time.time() + self._clock_offset

    def transact(self, work: Callable[..., T], *given: Any,
                 deadline: float | None = None, reading: bool = False) -> T:
        """Return work(transaction, *given), committed; raise LedgerError.

        reading: the work only reads, so it waits for no other process, even
        on SQLite.  deadline: of time.monotonic(); default: the timeout.

        If the first statement finds an old connection dead, everything is
        repeated on a new one.  Work that conflicts with another host's is
        repeated until the deadline.
        """
        begin = self.backend.begin_reading if reading else self.backend.begin
        if deadline is None:
            deadline = time.monotonic() + self.backend.timeout
        left = deadline - time.monotonic()
        if left < 0 or not self.lock.acquire(timeout=left):
            raise LedgerError(TOO_SLOW)
        try:
            return self._try_until(deadline, begin, work, *given)
        finally:
            self._under_way = None
            self.lock.release()

    def _try_until(self, deadline: float, begin: str, work: Callable[..., T],
                   *given: Any) -> T:
        """Do the work of transact() while holding the lock."""
        while True:
            transaction = None
            began = time.monotonic()
            was_open = self._connection is not None
            try:
                deadline = self._connect(deadline)
                transaction = self.begin(begin, deadline)
                result = work(transaction, *given)
                transaction.run("COMMIT")
                return result
            except Exception as error:  # drivers raise many kinds
                now = time.monotonic()
                conflict = self.backend.is_conflict(error)
                undone = self._roll_back(keep=conflict)
                if conflict and now <= latest(transaction, deadline):
                    time.sleep(random.uniform(0, 0.01))
                    continue
                quick = now - began < self.backend.timeout / 2
                answered = transaction is not None and transaction.answered
                if was_open and quick and not answered and not conflict:
                    continue
                raise LedgerError(
                    self.backend.explain(error), undone) from error

    def begin(self, statement: str, deadline: float) -> Transaction:
        """Begin a transaction; _watch() enforces its deadline."""
        transaction = Transaction(self.backend, self._connection, deadline)
        self._under_way = transaction
        if statement:
            transaction.later(statement)
        return transaction

    def read(self, work: Callable[..., T], *given: Any) -> T:
        """Return work(transaction, *given) on a separate connection.

        The work only reads; tables are neither created nor updated.  Raise
        LedgerError.
        """
        try:
            with contextlib.closing(
                    self.backend.connect_to_read()) as connection:
                transaction = Transaction(self.backend, connection, math.inf)
                self.backend.set_up(transaction, PATIENCE)
                if self.backend.begin_reading:
                    transaction.later(self.backend.begin_reading)
                return work(transaction, *given)
        except Exception as error:
            raise LedgerError(self.backend.explain(error)) from error

    def compare_clocks(self) -> None:
        """Measure the server's clock against this host's; see clock()."""
        difference = self.transact(ask_clock_difference, reading=True)
        if difference is not None:
            self._clock_offset = difference
            warn_if_clocks_differ(difference)

    def close(self) -> None:
        """Close the connection unless it stays busy for two seconds.

        The next use opens a new one.
        """
        if self.lock.acquire(timeout=min(2, self.backend.timeout)):
            try:
                with contextlib.suppress(Exception):  # there may be none open
                    self.begin("", time.monotonic() + 2)  # closing may hang
                self._roll_back(keep=False)
            finally:
                self.lock.release()

    def _connect(self, deadline: float) -> float:
        """Make sure that there is a connection and the tables are prepared.

        Return the deadline, which is later if the tables had to be updated.
        """
        if self._connection is not None and not self.backend.is_stale():
            return deadline
        self._roll_back(keep=False)
        connection = self._connection = self.backend.connect(
            self.backend.timeout)
        if self.backend.waits_for_ever:
            threading.Thread(
                target=self._watch, args=(connection,), daemon=True).start()
        try:
            transaction = self.begin("", deadline)
            self.backend.set_up(transaction, self.backend.timeout)
            self.backend.set_up_file(transaction)
            self.backend.note_files(transaction)
            return self._prepare(self, deadline)
        except Exception:
            self._roll_back(keep=False)  # keep no half-prepared connection
            raise

    def _watch(self, connection: Connection) -> None:
        """Cut a connection whose transaction is past its deadline."""
        while self._connection is connection:
            time.sleep(self.backend.timeout / 20)
            transaction = self._under_way
            if (transaction is not None
                    and time.monotonic() > transaction.deadline):
                self.backend.cut(connection)

    def _roll_back(self, keep: bool) -> bool:
        """Roll back; return whether the database confirmed it.

        keep: keep the connection open, if so.
        """
        connection, undone = self._connection, False
        with contextlib.suppress(Exception):  # close() may leave locks behind
            connection.cursor().execute("ROLLBACK")
            undone = True
        if not keep or not undone:
            self._connection = None
            if self._under_way is not None:
                # An unfinished SQLite statement would survive close().
                self._under_way.cursor = None
            with contextlib.suppress(Exception):  # there may be none open
                self.backend.close(connection)
        return undone


def ask_clock_difference(transaction: Transaction) -> float | None:
    """Return by how many seconds the server's clock is ahead of this host's.

    0: it is the same clock.  None: the answer took too long to be exact.
    """
    if not transaction.backend.clock:
        return 0.0
    asked = time.time()
    [told] = transaction.run(
        f"SELECT {transaction.backend.clock}").fetchone()
    answered = time.time()
    if not 0 <= answered - asked < 0.5:
        return None
    return float(told) - (asked + answered) / 2


def warn_if_clocks_differ(difference: float | None) -> None:
    """Warn if the server's clock and this host's differ too much."""
    if difference is not None and abs(difference) > MAX_CLOCK_DIFFERENCE:
        log.warning(
            "the clock of the database server is %.0f seconds %s this host's:"
            " mails are counted by the server's; synchronize both with NTP",
            abs(difference), "ahead of" if difference > 0 else "behind",
            extra=SELDOM)


def latest(transaction: Transaction | None, deadline: float) -> float:
    """Return the deadline, as extended by the transaction if there is one."""
    return deadline if transaction is None else transaction.deadline


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Return the parts of a list, of at most size items each."""
    return (items[i:i + size] for i in range(0, len(items), size))


# ---------------------------------------------------------------------------
# 7. Schema
#
# Creates the tables and updates those of the original.
# ---------------------------------------------------------------------------

LARGE = 10_000  # rows; totals of more take longer than a mail should wait
MAX_TRIES = 50  # of an update: at each conflict another daemon has progressed


def prepare_tables(database: Database, deadline: float) -> float:
    """Make sure that the tables exist; return the deadline of later work.

    Raise LedgerError or the driver's exceptions.
    """
    backend = database.backend
    for tries in range(MAX_TRIES):
        looking = database.begin(backend.begin_reading, deadline)
        present = are_complete(looking)
        if (backend.wants_rate_limits
                and not columns_of(looking, "rate_limits")):
            with contextlib.suppress(Exception):  # the query may not need it
                looking.run(RATE_LIMITS.format(backend.numbered))
        looking.run("COMMIT")
        looking.extend(math.inf)  # it has ended: _watch() must not cut it
        if present:
            break
        try:
            update_with_patience(backend)
        except Exception as error:
            if not backend.is_conflict(error) or tries == MAX_TRIES - 1:
                raise
        deadline = time.monotonic() + backend.timeout
    return deadline


def update_with_patience(backend: Backend) -> None:
    """Update the tables on a separate connection that may take hours."""
    with contextlib.closing(backend.connect(PATIENCE)) as connection:
        transaction = Transaction(backend, connection, math.inf)
        backend.set_up(transaction, PATIENCE)
        backend.set_up_file(transaction)
        if backend.begin:
            transaction.later(backend.begin)
        update_tables(transaction)
        transaction.run("COMMIT")


def columns_of(transaction: Transaction, table: str) -> list[str]:
    """Return the names of a table's columns; empty if there is no table."""
    return transaction.attempt("", lambda _: [
        column[0] for column in transaction.run(
            f"SELECT * FROM {table} LIMIT 0").description]) or []


def are_complete(transaction: Transaction) -> bool:
    """Say whether all tables exist and are up to date."""
    return ("total" in columns_of(transaction, "mail_count")
            and "told" in columns_of(transaction, "mail_refused")
            and all(columns_of(transaction, table) for table in TABLES))


def update_tables(transaction: Transaction) -> None:
    """Create the tables, or update those of the original."""
    backend = transaction.backend
    for statement in creations(backend):
        transaction.run(statement)
    if "told" not in columns_of(transaction, "mail_refused"):
        transaction.run(ADD_TOLD)
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
    for statement in backend.add_total:  # last: total marks what is complete
        transaction.run(statement)
    for [identity] in transaction.run(
            "SELECT id FROM mail_count GROUP BY id HAVING COUNT(*) > ?",
            LARGE).fetchall():
        retotal(transaction, identity, MAX_DATE)


def creations(backend: Backend) -> Iterator[str]:
    """Yield the statements that create the missing tables."""
    for table, columns in TABLES.items():
        columns = columns.format(name=f"{backend.identity} NOT NULL",
                                 number="bigint NOT NULL")
        yield f"CREATE TABLE IF NOT EXISTS {table} ({columns})"


def retotal(transaction: Transaction, identity: str, now: int) -> None:
    """Rewrite an identity's rows, with totals and with no date after now.

    No total decreases, since a mail whose commit was in doubt is recognized
    by its total.
    """
    rows = [MailRow(*row) for row in transaction.run(
        f"SELECT {', '.join(COLUMNS)} FROM mail_count WHERE id = ?"
        " ORDER BY date, total", identity).fetchall()]
    transaction.extend(0.001 * len(rows))  # seconds to write each row
    costs = [1 if row.cost is None else row.cost for row in rows]
    totals = list(itertools.accumulate(costs))
    higher = max((row.total - total for row, total in zip(rows, totals)
                  if row.total is not None), default=0)
    newest = max((row.date for row in rows), default=0)
    if newest > now + CLOCK_SKEW:
        log.warning("recorded mails are dated %d seconds in the future; check"
                    " the clocks of all hosts", newest - now, extra=SELDOM)
    transaction.later("DELETE FROM mail_count WHERE id = ?", identity)
    transaction.write(INSERT, [
        row._replace(date=min(row.date, now), cost=cost,
                     total=total + max(higher, 0))
        for row, cost, total in zip(rows, costs, totals)])


# ---------------------------------------------------------------------------
# 8. Ledger
#
# Reads what was used, judges, and writes the charges, as one transaction that
# nobody else can interrupt.
#
# The table mail_count is the original's with a running total: the sum of
# recipient_count over the identity's rows up to this one.  The usage of a
# window is the newest total minus the total before the window's first row:
# two index lookups, however full the window is.  Dates are whole seconds,
# rounded up, so that no window is shorter than it should be; an identity's
# dates never decrease, whatever the clocks do.
# ---------------------------------------------------------------------------

BLOCKED: Limits = (Limit(0, 86400),)  # the window: one alert per day
QUERY_FAILED = "sql_limits_by_id: %s; the file's limits apply"
PERMANENT = 10**12  # in the column ends, which is NOT NULL: year 33658


Overrides = dict[str, Override]  # by identity


class Page:
    """An identity's page of the ledger: what was read, and what to write.

    It is valid within one transaction, which has taken the identity's turn.
    """

    queried: Limits | None = None  # the limits of sql_limits_by_id
    override: Override | None = None  # set by --limit or --block
    known_override: Override | None = None  # the same, as remembered
    account: Account  # by which the policy judges
    second = 0  # now, rounded down: the end of all windows
    date = 0  # now, rounded up: the date of new mails
    newest = 0  # the date of the last row, 0 if there is none
    total = 0  # the total of the last row

    def __init__(self, claim: Claim) -> None:
        """Take any claim on the identity."""
        self.claim = claim
        self.windows: list[int] = []  # in seconds, each once
        self.values: dict[str, int] = {}  # {value: date} to write
        self.add_windows(claim.limits)

    def add_windows(self, limits: Limits) -> None:
        """Add the windows of limits to those to read."""
        for limit in limits:
            if limit.seconds not in self.windows:
                self.windows.append(limit.seconds)

    def enter(self, mail: Mail, claim: Claim) -> MailRow:
        """Return the next row, for a mail that is judged now."""
        self.newest = max(self.newest, self.date)
        self.total += claim.cost
        return row_of(mail, claim, self.newest, self.total)

    def append(self, row: MailRow) -> MailRow:
        """Return a remembered row as the next one, with date and total."""
        self.newest = max(self.newest, row.date)
        self.total += row.cost
        return row._replace(date=self.newest, total=self.total)


def row_of(mail: Mail, claim: Claim, date: int, total: int | None) -> MailRow:
    """Return the row of a mail; total: None if it is not known yet."""
    instance = mail.instance[:40] if mail.instance.isascii() else ""
    return MailRow(claim.identity, date, claim.cost, instance,
                   mail.protocol_state, total)


class InDoubt(NamedTuple):
    """A mail whose commit the database did not confirm."""

    row: MailRow

    @property
    def date(self) -> int:
        """Return the date of its row."""
        return self.row.date

    @property
    def cost(self) -> int:
        """Return the cost of its row."""
        return self.row.cost


class Unstored(NamedTuple):
    """What is remembered of an identity but not stored in the database."""

    claim: Claim
    mails: Sequence[MailRow | InDoubt]  # oldest first; rows without a total
    values: Mapping[str, int]  # {value: date}, if values are counted
    record: object  # the Record of memory that this was copied from


class Settlement:
    """The input of a transaction on some mails, and its results.

    If a conflict undoes the transaction, the results are computed again.
    """

    def __init__(self, mails: Sequence[Mail], unstored: Mapping[str, Unstored],
                 overrides: Overrides, now: float) -> None:
        """Take mails and what is to be stored, of their identities or others.

        overrides: those known already, so that their windows are read, too.
        """
        self.mails = mails
        self.unstored = unstored
        self.overrides = overrides
        self.now = now  # epoch seconds
        self.start_again()

    def start_again(self) -> None:
        """Forget the results of a transaction that was undone."""
        self.pages: dict[str, Page] = {}
        self.verdicts: list[Verdict] = []
        self.rows: list[MailRow] = []  # written for the mails
        self.appended: dict[str, list[InDoubt]] = {}  # for unstored mails


def settle(transaction: Transaction, settlement: Settlement,
           query: str | None) -> None:
    """Judge mails and write those that pass, in one transaction.

    Unstored mails of their identities are written first.  The results are in
    the settlement.
    """
    if settlement.pages:
        settlement.start_again()
    mails = fit_values(transaction.backend, settlement.mails)
    pages = settlement.pages = open_pages(mails, settlement.unstored)
    take_turns(transaction, pages)
    find_own_limits(transaction, pages, query, settlement.overrides)
    read_pages(transaction, pages, settlement.now)
    append_unstored(transaction, settlement)
    settlement.verdicts, charges = decide(
        mails, {name: page.account for name, page in pages.items()})
    settlement.rows = enter_charges(pages, charges)  # before any write fails
    transaction.write(INSERT, settlement.rows)
    write_values(transaction, pages)
    if not all(verdict.is_within_limits()
               for verdict in settlement.verdicts):
        note_exceeded(transaction, mails, settlement)


def open_pages(mails: Sequence[Mail], unstored: Mapping[str, Unstored],
               ) -> dict[str, Page]:
    """Return a page for each identity with a claim or unstored mails."""
    pages = {identity: Page(found.claim)
             for identity, found in unstored.items()}
    for mail in mails:
        for claim in mail.claims:
            page = pages.get(claim.identity)
            if page is None:
                pages[claim.identity] = Page(claim)
            else:
                page.add_windows(claim.limits)
    return pages


def fit_values(backend: Backend, mails: Sequence[Mail]) -> Sequence[Mail]:
    """Return mails whose values are spelt as the database returns them."""
    if backend.encoding == "UTF8":
        return mails
    fitting = []
    for mail in mails:
        values: Sequence[Any] = backend.fit(
            [claim.value for claim in mail.claims])
        fitting.append(replace(mail, claims=[
            claim._replace(value=value)
            for claim, value in zip(mail.claims, values)]))
    return fitting


def take_turns(transaction: Transaction, identities: Iterable[str]) -> None:
    """Lock these identities against other hosts for this transaction."""
    if transaction.backend.take_turn:
        # Sorted: all hosts lock in the same order, so there is no deadlock.
        transaction.write(transaction.backend.take_turn, [
            (identity, 1) for identity in sorted(identities)])


def find_own_limits(transaction: Transaction, pages: Mapping[str, Page],
                    query: str | None, overrides: Overrides) -> None:
    """Run the query for limits; add the windows of all that may apply."""
    if not query and not overrides:
        return
    for name, page in pages.items():
        if name in overrides:
            page.known_override = overrides[name]
            page.add_windows(page.known_override.limits)
        if query and not page.claim.rule.by:  # not for quotas
            page.queried = query_limits(transaction, query, name)
            page.add_windows(page.queried or ())


def query_limits(transaction: Transaction, query: str, identity: str,
                 ) -> Limits | None:
    """Return the limits of sql_limits_by_id; None: no row, or it failed.

    Log a warning if it fails.
    """
    text = transaction.attempt(QUERY_FAILED, ask_query, query, identity)
    if text is None:
        return None
    try:
        return parse_limits(text)
    except ValueError as error:
        # In the format, so that each identity is logged once a minute.
        named = printable(identity).replace("%", "%%")
        log.warning(f"sql_limits_by_id: {named}: %s; the file's limits apply",
                    error, extra=SELDOM)
        return None


def ask_limits(transaction: Transaction, query: str, identity: str,
               ) -> Limits | None:
    """Return the limits of sql_limits_by_id, None if there is no row.

    Raise ValueError or the driver's exceptions.
    """
    text = ask_query(transaction, query, identity)
    return None if text is None else parse_limits(text)


def ask_query(transaction: Transaction, query: str, identity: str,
              ) -> str | None:
    """Return the text that sql_limits_by_id yields, None if there is none."""
    transaction.flush()
    transaction.cursor.execute(query, transaction.backend.fit((identity,)))
    row = transaction.cursor.fetchone()
    return None if row is None or row[0] is None else str(row[0])


def read_pages(transaction: Transaction, pages: Mapping[str, Page],
               now: float) -> None:
    """Read what identities have used, and open their accounts.

    An identity is read again if more windows are needed or rows were mended.
    """
    unread = list(pages.values())
    second, date_now = math.floor(now), math.ceil(now)
    for page in unread:
        page.second, page.date = second, date_now
    while unread:
        again = []
        for page, [override, date, total, *before] in ask_usage(
                transaction, unread):
            asked = len(page.windows)
            if override is not None:
                take_override(transaction, page, override)
            is_whole = len(page.windows) == asked  # else --limit added some
            if is_whole and is_right(transaction, page, date, total, now):
                fill_page(transaction, page, now, date, total, before)
            else:
                again.append(page)
        unread = again


def ask_usage(transaction: Transaction, pages: Sequence[Page],
              ) -> Iterator[tuple[Page, Sequence[Any]]]:
    """Yield each page with its row of usage_statement(), without the place.

    One statement reads many identities.
    """
    for some in chunks(pages, transaction.backend.chunk):
        width = max([len(page.windows) for page in some])
        values: list[object] = []
        for page in some:
            second = page.second
            values += page.claim.identity, second
            values += [second - seconds for seconds in page.windows]
            values += [second] * (width - len(page.windows))
        statement = usage_statement(
            len(some), width, transaction.backend.asks_singly)
        for place, *found in transaction.run(statement, *values).fetchall():
            yield some[place], found


def take_override(transaction: Transaction, page: Page, text: str) -> None:
    """Set a page's override, whose limits were read as text."""
    page.override = page.known_override
    if page.override is None or page.override.as_text() != text:
        ends, made = transaction.run(
            "SELECT ends, made FROM mail_limit WHERE id = ?",
            page.claim.identity).fetchone() or (PERMANENT, 0)
        page.override = parse_override(text, ends, made)
        page.known_override = page.override
    if page.override is not None:
        page.add_windows(page.override.limits)


def is_right(transaction: Transaction, page: Page, date: int | None,
             total: int | None, now: float) -> bool:
    """Say whether the newest row has a total and a plausible date.

    If not, rewrite the rows or adjust the page's time; then read it again.
    """
    if date is None:
        return True  # there is no row
    if total is None or date > now + CLOCK_SKEW:
        # The original wrote that row, or the clock was set back by a lot.
        retotal(transaction, page.claim.identity, math.ceil(now))
        return False
    if date > page.date:
        # Another host's clock is ahead: use its time here, too.
        page.second, page.date = date - 1, date
        return False
    return True


def fill_page(transaction: Transaction, page: Page, now: float,
              date: int | None, total: int | None,
              before: Sequence[int | None]) -> None:
    """Open the account of an identity with what was read.

    date, total: of its newest row.  before: for each window, the total before
    its first row, None if the window is empty.
    """
    page.newest, page.total = date or 0, total or 0
    if page.claim.value is None:
        page.account = Account(
            {seconds: 0 if ahead is None else page.total - ahead
             for seconds, ahead in zip(page.windows, before)},
            page.queried, page.override)
    else:
        seen = read_values(transaction, page, now)
        page.account = DistinctValues(
            seen, page.second, page.queried, page.override)
        page.account.date = page.date


def read_values(transaction: Transaction, page: Page, now: float,
                ) -> dict[str, int]:
    """Return {value: date} of an identity, within its longest window."""
    identity, longest = page.claim.identity, max(page.windows, default=0)
    seen = {value: int(date) for value, date in transaction.run(
        "SELECT value, date FROM mail_value WHERE id = ? AND date > ?",
        identity, page.second - longest).fetchall()}
    if max(seen.values(), default=0) > now + CLOCK_SKEW:
        # The clock was set back by a lot: date these values now.
        seen = {value: min(date, page.date) for value, date in seen.items()}
        transaction.run("UPDATE mail_value SET date = ? WHERE id = ?"
                        " AND date > ?", page.date, identity, page.date)
    page.date = max(page.date, *seen.values(), 0)
    return seen


@functools.cache
def usage_statement(identities: int, windows: int, singly: bool = False,
                    ) -> str:
    """Return the query for so many identities with so many windows each.

    Its parameters are, for each identity: the identity, the time, and the
    start of each window.  It yields a row for each: its place among them, the
    limits set by --limit, date and total of the newest row, and the total
    before the first row of each window; NULL where there is none.
    """
    # Plain subqueries instead of WITH would cost PostgreSQL a quarter to a
    # half of the speed.  MariaDB and MySQL need a single-row table for each
    # lookup: with several rows they would read all rows of each identity.
    since = [f"since{n}" for n in range(windows)]
    newest = ("(SELECT {} FROM mail_count WHERE id = who"
              " ORDER BY date DESC, total DESC LIMIT 1)")
    before = ("(SELECT total - recipient_count FROM mail_count WHERE id = who"
              " AND date > {} ORDER BY date, total LIMIT 1)")
    columns = ", ".join([
        "(SELECT limits FROM mail_limit WHERE id = who AND ends > at)",
        newest.format("date"), newest.format("total"),
        *map(before.format, since)])
    if singly:
        each = ", ".join(f"? AS {name}" for name in ("at", *since))
        return " UNION ALL ".join(
            f"SELECT n, {columns} FROM (SELECT {n} AS n,"
            # else the subquery cache takes é for e
            f" ? COLLATE utf8mb4_bin AS who, {each}) AS asked{n}"
            for n in range(identities))
    asked = " UNION ALL ".join(
        f"SELECT {n}, ?, ?{', ?' * windows}" for n in range(identities))
    return (f"WITH asked ({', '.join(['n', 'who', 'at', *since])})"
            f" AS ({asked}) SELECT n, {columns} FROM asked")


def append_unstored(transaction: Transaction, settlement: Settlement) -> None:
    """Write remembered mails and values after the rows in the tables."""
    for identity, unstored in settlement.unstored.items():
        transaction.extend(0.001 * len(unstored.mails))
        page = settlement.pages[identity]
        rows, settlement.appended[identity] = append_mails(
            transaction, page, unstored.mails)
        if isinstance(page.account, DistinctValues):
            page.values.update(unstored.values)
            for value, date in unstored.values.items():
                seen = page.account.seen.get(value, 0)
                page.account.seen[value] = max(date, seen)
        transaction.write(INSERT, rows)


def append_mails(transaction: Transaction, page: Page,
                 mails: Sequence[MailRow | InDoubt],
                 ) -> tuple[list[MailRow], list[InDoubt]]:
    """Count mails that were decided from memory; return their rows.

    Also return what memory has to keep if this commit is in doubt: these
    rows, and mails that an earlier commit in doubt turned out to have stored.
    """
    rows, in_doubt = [], []
    for mail in mails:
        if isinstance(mail, InDoubt):
            if is_stored(transaction, mail.row):
                in_doubt.append(mail)
                continue
            mail = mail.row
        row = page.append(mail)
        rows.append(row)
        in_doubt.append(InDoubt(row))
        for seconds in page.account.used:
            if row.date > page.second - seconds:
                page.account.used[seconds] += row.cost
    page.date = max(page.date, page.newest)
    return rows, in_doubt


def is_stored(transaction: Transaction, row: MailRow) -> bool:
    """Say whether a row whose commit was in doubt was stored after all.

    Its total may have increased, but not decreased: see retotal().  Without
    an instance, only the total distinguishes it from other mails.
    """
    same = "total >= ?" if row.instance else "total = ?"
    [count] = transaction.run(
        "SELECT COUNT(*) FROM mail_count WHERE id = ? AND date = ?"
        f" AND instance = ? AND {same}", row.identity, row.date,
        row.instance, row.total).fetchone()
    return bool(count)


def enter_charges(pages: Mapping[str, Page], charges: Sequence[Charge],
                  ) -> list[MailRow]:
    """Enter charges into their pages; return the rows of mail_count."""
    rows = []
    for mail, claim in charges:
        page = pages[claim.identity]
        if claim.value is None:
            rows.append(page.enter(mail, claim))
        else:
            page.values[claim.value] = page.date
    return rows


def write_values(transaction: Transaction, pages: Mapping[str, Page]) -> None:
    """Write the new values of identities whose values are counted."""
    for identity, page in pages.items():
        if page.values:
            transaction.write(transaction.backend.add_values, [
                (identity, value, date)
                for value, date in page.values.items()])


def note_exceeded(transaction: Transaction, mails: Sequence[Mail],
                  settlement: Settlement) -> None:
    """Write refusals and blocks, and find out when there is room again."""
    verdicts, pages = settlement.verdicts, settlement.pages
    write_refusals(transaction, mails, verdicts)
    write_blocks(transaction, mails, verdicts, pages)
    for place, verdict in enumerate(verdicts):
        if verdict.broken is not None:
            verdicts[place] = with_room(transaction, verdict, pages)


def write_refusals(transaction: Transaction, mails: Sequence[Mail],
                   verdicts: Sequence[Verdict]) -> None:
    """Write refusals, one row for each identity and window."""
    found: dict[tuple[str, int], Refusal] = {}
    for mail, verdict in zip(mails, verdicts):
        if verdict.is_within_limits():
            continue
        for usage in filter(None, (verdict.broken, *verdict.tried)):
            limit, now = usage.limit, int(mail.now)
            key = usage.claim.identity, limit.seconds
            hits = found[key].hits + 1 if key in found else 1
            found[key] = Refusal(
                *key, limit.mails, hits, now, now, mail.client)
    if found:
        transaction.attempt("refusals not recorded: %s", Transaction.write,
                            transaction.backend.add_refusals,
                            [found[key] for key in sorted(found)])


def write_blocks(transaction: Transaction, mails: Sequence[Mail],
                 verdicts: Sequence[Verdict], pages: Mapping[str, Page],
                 ) -> None:
    """Block identities that have exceeded a limit with block_for.

    An identity with an override of --limit or --block keeps it.  One message
    that alone exceeds a limit is no reason: it has used up nothing.
    """
    for mail, verdict in zip(mails, verdicts):
        if verdict.broken is None:
            continue
        claim, limit, _ = verdict.broken
        page, now = pages[claim.identity], int(mail.now)
        if not claim.rule.block_for or page.override is not None:
            continue
        if claim.cost > limit.mails:
            continue
        page.override = Override(
            BLOCKED, now + claim.rule.block_for, now,
            f"{limit.mails}/{limit.seconds}s")
        transaction.attempt("block_for: an identity was not blocked: %s",
                            set_override, claim.identity, page.override)


def with_room(transaction: Transaction, verdict: Verdict,
              pages: Mapping[str, Page]) -> Verdict:
    """Add to a verdict when the mail would pass, if fail_action names it."""
    assert verdict.broken is not None
    if verdict.block is not None:
        return verdict._replace(room_at=verdict.block.ends)
    action = verdict.broken.claim.rule.fail_action
    if "$room" not in action.replace("{", ""):
        return verdict
    full = [use for use in verdict.usage if not use.claim.rule.dry_run
            and use.used + use.claim.cost > use.limit.mails]
    if any(use.claim.cost > use.limit.mails for use in full):
        return verdict  # never
    return verdict._replace(room_at=max(
        next_free(transaction, use, pages[use.claim.identity])
        for use in full))


def next_free(transaction: Transaction, full: Usage, page: Page) -> int:
    """Return the earliest date at which an exceeded limit admits a claim."""
    claim, limit, used = full
    over = used + claim.cost - limit.mails
    if isinstance(page.account, DistinctValues):
        dates = sorted(date for value, date in page.account.seen.items()
                       if value != claim.value)
        return dates[-limit.mails] + limit.seconds
    date = find_last_to_leave(transaction, claim.identity, page.second
                              - limit.seconds, page.total - used + over)
    return (page.date if date is None else date) + limit.seconds


def find_last_to_leave(transaction: Transaction, identity: str, since: int,
                       total: int) -> int | None:
    """Return the date of the first row in a window to reach a total.

    When that row leaves the window, everything up to that total has left.
    since: the date after which the window begins.
    """
    row = transaction.run(
        "SELECT date FROM mail_count WHERE id = ? AND date > ?"
        " AND total >= ? ORDER BY date, total LIMIT 1",
        identity, since, total).fetchone()
    return None if row is None else int(row[0])


def read_refusals(transaction: Transaction, which: str = "", *values: object,
                  ) -> list[Refusal]:
    """Return the rows of mail_refused; which: an SQL clause, such as WHERE."""
    return [Refusal(*row) for row in transaction.run(
        "SELECT id, seconds, mails, hits, first, last, client, told"
        f" FROM mail_refused {which}", *values).fetchall()]


def read_overrides(transaction: Transaction, now: int) -> Overrides:
    """Return all overrides that are in force."""
    overrides = {}
    for identity, text, ends, made in transaction.run(
            "SELECT id, limits, ends, made FROM mail_limit"
            " WHERE ends > ? ORDER BY id", now).fetchall():
        override = parse_override(text, ends, made)
        if override is not None:
            overrides[identity] = override
    return overrides


def parse_override(text: str, ends: int, made: int) -> Override | None:
    """Return the override that a row of mail_limit means, None if malformed.

    The text is a list of limits; what comes after # is the reason.  Admins
    can write to the table, too.
    """
    try:
        limits = parse_limits(text)
    except ValueError as error:
        log.warning("mail_limit: %s; row ignored", error, extra=SELDOM)
        return None
    return Override(limits, None if ends == PERMANENT else ends, made,
                    text.partition("#")[2].strip())


def set_override(transaction: Transaction, identity: str, override: Override,
                 ) -> None:
    """Set the override of an identity, in place of any other."""
    ends = PERMANENT if override.ends is None else override.ends
    drop_override(transaction, identity)
    transaction.run(
        "INSERT INTO mail_limit (id, limits, ends, made) VALUES (?, ?, ?, ?)",
        identity, override.as_text(), ends, override.made)


def drop_override(transaction: Transaction, identity: str) -> int:
    """Delete the override of an identity; return the number of rows."""
    return int(transaction.run(
        "DELETE FROM mail_limit WHERE id = ?", identity).rowcount)


# ---------------------------------------------------------------------------
# 9. Batches and outages
#
# Many requests share a commit; what happens while the database is unavailable.
# ---------------------------------------------------------------------------

MAX_FAILED = 3  # identities that cannot be stored; then all others wait
STORE_STEP = 50  # identities whose mails one transaction stores from memory
MAX_MEMORY = 100_000_000  # bytes, estimated, of everything remembered
RECORD_SIZE = 700  # bytes per identity, without its name and its values
MAX_PASSED_OVER = 50  # unstored records, to find one that is stored
ENTRY_SIZE = 250  # bytes per mail or value, without its text


class Record:
    """What is remembered of one identity.

    That is its usage when it was last stored, and its mails since then.
    """

    def __init__(self, claim: Claim) -> None:
        """Remember nothing yet; the claim says what is counted."""
        self.claim = claim
        self.queried: Limits | None = None  # of sql_limits_by_id
        self.used: Mapping[int, int] = {}  # of each window, as last stored
        self.newest = 0  # the date of the last mail in these windows
        self.values: dict[str, int] = {}  # {value: date}, stored or not
        self.unstored_values: dict[str, int] = {}  # {value: date}
        self.mails: list[MailRow | InDoubt] = []  # not stored; oldest first
        self.size = RECORD_SIZE + sys.getsizeof(claim.identity)  # bytes
        self._dates: list[int] = []  # of the mails, never decreasing
        self._sums = [0]  # item n: the cost of the first n mails

    def take(self, page: Page) -> None:
        """Remember an identity's usage after it was stored."""
        self.claim, self.queried = page.claim, page.queried
        self.used, self.newest = page.account.used, page.newest
        if page.claim.value is not None:
            assert isinstance(page.account, DistinctValues)
            self.size -= sum(map(value_size, self.values))
            self.values = page.account.seen
            for value, date in self.unstored_values.items():  # since then
                self.values[value] = max(date, self.values.get(value, 0))
            self.size += sum(map(value_size, self.values))

    def add_mail(self, mail: MailRow | InDoubt) -> None:
        """Remember a mail that is not stored yet."""
        self.mails.append(mail)
        self._dates.append(max([mail.date, *self._dates[-1:]]))
        self._sums.append(self._sums[-1] + mail.cost)
        self.size += ENTRY_SIZE

    def add_value(self, value: str, date: int) -> None:
        """Remember a value that is not stored yet."""
        if value not in self.values:
            self.size += value_size(value)
        if value not in self.unstored_values:
            self.size += value_size(value)
        date = max(date, self.values.get(value, 0))  # never decreases
        self.values[value] = self.unstored_values[value] = date

    def replace_first(self, count: int,
                      mails: Sequence[MailRow | InDoubt]) -> None:
        """Replace the first mails by others, or by none."""
        self.size += ENTRY_SIZE * (len(mails) - count)
        self.mails[:count] = mails
        self._dates = list(itertools.accumulate(
            (mail.date for mail in self.mails), max))
        self._sums = [0, *itertools.accumulate(
            mail.cost for mail in self.mails)]

    def drop_values(self, stored: Mapping[str, int]) -> None:
        """Mark values as stored, except those that were seen again since."""
        for value, date in stored.items():
            if self.unstored_values.get(value) == date:
                del self.unstored_values[value]
                self.size -= value_size(value)

    def used_of(self, window: int, now: int) -> int:
        """Return what was used of a window, in seconds, that ends now.

        What was stored counts until all of it has left the window.  For a
        window that was not read then, the next longer one is used.
        """
        stored = 0
        if self.used and self.newest > now - window:
            longer = [seconds for seconds in self.used if seconds >= window]
            stored = self.used[min(longer, default=max(self.used))]
        before = bisect.bisect_right(self._dates, now - window)
        return stored + self._sums[-1] - self._sums[before]

    def latest(self, now: float) -> float:
        """Return the time, but no earlier than that of the last mail."""
        return max(now, self._dates[-1] - 0.5) if self._dates else now


def value_size(value: str) -> int:
    """Return an estimate of the bytes that a value takes."""
    return ENTRY_SIZE + sys.getsizeof(value)


class Memory:
    """What this host remembers of identities, to decide by in an outage.

    The lock guards all of it.  Code that also needs the database's lock takes
    that one first.
    """

    def __init__(self, most: int = MAX_MEMORY) -> None:
        """Take the bytes it may use; beyond, it drops the longest unused."""
        self.lock = threading.RLock()
        self.overrides: Overrides = {}  # as last read from the database
        self._most = most
        self._size = 0
        self._records: OrderedDict[str, Record] = OrderedDict()
        self._unstored: dict[str, Record] = {}  # those with something to store

    def decide(self, mail: Mail) -> Verdict:
        """Judge a mail; if it passes, remember to store it."""
        with self.lock:
            accounts = {claim.identity: self._account(claim, mail.now)
                        for claim in mail.claims}
            [verdict], charges = decide([mail], accounts)
            if passes_unstored(mail):
                for charge in charges:
                    self._add_charge(charge)
        return verdict

    def unstored(self, identities: Iterable[str]) -> dict[str, Unstored]:
        """Return a copy of what has to be stored, of these identities."""
        if not self._unstored:
            return {}
        with self.lock:
            records = {identity: self._unstored[identity]
                       for identity in {*identities}
                       if identity in self._unstored}
            return {identity: Unstored(
                record.claim, record.mails[:], record.unstored_values.copy(),
                record) for identity, record in records.items()}

    def unstored_identities(self) -> list[str]:
        """Return all identities with something to store."""
        with self.lock:
            return list(self._unstored)

    def take(self, settlement: Settlement) -> None:
        """Remember the results of a transaction that was committed."""
        with self.lock:
            for identity, page in settlement.pages.items():
                record = self._record(page.claim)
                before = record.size
                record.take(page)
                if record.size != before:
                    self._resized(record, before)
                if page.override is not None:
                    self.overrides[identity] = page.override
                elif identity in self.overrides:
                    del self.overrides[identity]
            for unstored in settlement.unstored.values():
                self._settle_record(unstored)

    def keep(self, settlement: Settlement, in_doubt: bool) -> None:
        """Remember to store what a failed transaction may not have stored.

        in_doubt: its commit was sent, but the outcome is unknown.
        """
        written: dict[str, list[MailRow]] = {}
        values: dict[str, Mapping[str, int]] = {}
        if any(map(passes_unstored, settlement.mails)):
            for row in settlement.rows:
                written.setdefault(row.identity, []).append(row)
            values = {identity: page.values
                      for identity, page in settlement.pages.items()}
        with self.lock:
            for identity, page in settlement.pages.items():
                unstored = settlement.unstored.get(identity)
                first = unstored.mails if unstored else []
                if in_doubt and identity in settlement.appended:
                    first = settlement.appended[identity]
                rows = [InDoubt(row) if in_doubt else row._replace(total=None)
                        for row in written.get(identity, ())]
                self._replace(page.claim, unstored, [*first, *rows])
                for value, date in values.get(identity, {}).items():
                    self._add_value(page.claim, value, date)

    def _account(self, claim: Claim, now: float) -> Account:
        """Return the account of a claim's identity, as far as is known."""
        record = self._records.get(claim.identity) or Record(claim)
        now = record.latest(now)
        override = self.overrides.get(claim.identity)
        if override is not None and not override.holds_at(now):
            override = None
        second = math.floor(now)
        if claim.value is not None:
            return DistinctValues(
                dict(record.values), second, record.queried, override)
        account = Account({}, record.queried, override)
        for limit in account.limits_of(claim):
            account.used[limit.seconds] = record.used_of(limit.seconds, second)
        return account

    def _add_charge(self, charge: Charge) -> None:
        """Remember that a mail was charged."""
        mail, claim = charge
        record = self._record(claim)
        date = math.ceil(record.latest(mail.now))
        if claim.value is not None:
            self._add_value(claim, claim.value, date)
        else:
            self._add_mail(claim, row_of(mail, claim, date, None))

    def _add_mail(self, claim: Claim, mail: MailRow | InDoubt) -> None:
        """Remember to store a mail."""
        record = self._record(claim)
        before = record.size
        record.add_mail(mail)
        self._unstored[claim.identity] = record
        self._resized(record, before)

    def _add_value(self, claim: Claim, value: str, date: int) -> None:
        """Remember to store a value."""
        record = self._record(claim)
        before = record.size
        record.add_value(value, date)
        self._unstored[claim.identity] = record
        self._resized(record, before)

    def _replace(self, claim: Claim, unstored: Unstored | None,
                 mails: Sequence[MailRow | InDoubt]) -> None:
        """Replace the mails that were copied to be stored by these.

        Mails remembered since then follow after them.
        """
        record = self._record(claim)
        count, before = 0, record.size
        if unstored is not None and record is unstored.record:
            count = len(unstored.mails)  # else the record was dropped since
        record.replace_first(count, mails)
        if mails:
            self._unstored[claim.identity] = record
        self._resized(record, before)

    def _settle_record(self, unstored: Unstored) -> None:
        """Mark as stored what was copied of an identity."""
        identity = unstored.claim.identity
        record = self._records.get(identity)
        if record is None or record is not unstored.record:
            return  # the record was dropped since
        before = record.size
        record.replace_first(len(unstored.mails), [])
        record.drop_values(unstored.values)
        if not record.mails and not record.unstored_values:
            self._unstored.pop(identity, None)
        self._resized(record, before)

    def _record(self, claim: Claim) -> Record:
        """Return the record of an identity; mark it as most recently used."""
        record = self._records.get(claim.identity)
        if record is None:
            record = self._records[claim.identity] = Record(claim)
            self._resized(record, 0)
        self._records.move_to_end(claim.identity)
        return record

    def _resized(self, record: Record, before: int) -> None:
        """Account for a record's new size; drop old records if necessary."""
        self._size += record.size - before
        while self._size > self._most and len(self._records) > 1:
            identity = self._least_needed(record)
            self._size -= self._records.pop(identity).size
            if self._unstored.pop(identity, None):
                log.warning("memory is full: mail that was counted while the"
                            " database was unavailable is forgotten, of the"
                            " identities that were idle longest", extra=SELDOM)

    def _least_needed(self, spared: Record) -> str:
        """Return the identity to forget: an idle one, stored if possible."""
        for identity, record in itertools.islice(
                self._records.items(), MAX_PASSED_OVER):
            if identity not in self._unstored and record is not spared:
                return identity
        return next(iter(self._records))


class Batch:
    """The mails that wait for one commit."""

    def __init__(self) -> None:
        self.mails: list[Mail] = []
        self.lock = threading.Lock()  # the first to get it settles the batch


class Outage(NamedTuple):
    """The database did not answer in time."""

    error: LedgerError
    retry_at: float  # when to try it again (time.monotonic())


class Ledger:
    """The counts of all identities, for any number of threads.

    Many requests share one commit: while one batch is being committed, new
    mails join the next, and the thread of the first one settles it.  So no
    thread settles more than one batch, no extra thread is needed, each answer
    is given after its own commit, and a single connection is not slower.

    A mail that the database does not accept is decided from memory.  After a
    timeout all mail is, and once per db_timeout one request tries the
    database again.

    on_decided is called with mails that were decided on together, before
    their threads go on; it must not raise.

    The order of locks: a batch's, then the database's, then memory's.
    on_decided is called with a batch's lock alone.
    """

    def __init__(self, database: Database, query: str | None = None) -> None:
        """Take a database; query: the setting sql_limits_by_id."""
        self.database = database
        self.query = query
        self.on_decided: Callable[[Sequence[Mail]], None] = lambda mails: None
        self.memory = Memory()
        self._open = Batch()
        self._outage: Outage | None = None

    def decide(self, mail: Mail) -> Verdict:
        """Decide on a mail: all of its claims are charged, or none.

        Return when the charges are on disk; otherwise mail.error says why
        they are not, and the verdict is from memory.
        """
        while mail.verdict is None:
            if self._outage is not None:
                self.retry_if_due(mail.now)
                self._decide_in_outage(mail)
                self._hand_over([mail])
                continue
            batch = self._open
            batch.mails.append(mail)
            with batch.lock:
                if batch is self._open:
                    self._lead(batch)
            # No verdict: the batch had been closed, so join the next.
        return mail.verdict

    def is_in_outage(self) -> bool:
        """Say whether the database did not answer when it was last tried."""
        return self._outage is not None

    def retry_if_due(self, now: float) -> None:
        """In an outage, try the database again if that is due."""
        timeout = self.database.backend.timeout
        with self.memory.lock:
            outage = self._outage
            if outage is None or time.monotonic() < outage.retry_at:
                return
            # No other thread tries for as long as this may take.
            self._outage = outage._replace(
                retry_at=time.monotonic() + 5 * timeout)
        with contextlib.suppress(LedgerError):  # the outage goes on
            self._store(self.memory.unstored_identities()[:STORE_STEP], now)

    def store_remembered(self, now: float) -> None:
        """Store remembered mails, in steps, until that fails.

        The rest is stored with an identity's next mail, or by the next call.
        """
        left = deque(chunks(self.memory.unstored_identities(), STORE_STEP))
        failed = 0
        while left and failed < MAX_FAILED:
            some = left.popleft()
            try:
                self._store(some, now)
            except LedgerError as error:
                if self._outage is not None or not error.undone:
                    return
                if len(some) == 1:
                    failed += 1
                else:
                    # One identity's failure must not affect the others.
                    left.extendleft([identity] for identity in some)

    def _decide_in_outage(self, mail: Mail) -> None:
        """Decide on a mail from memory, unless the outage is over."""
        with self.memory.lock:
            if self._outage is not None:
                mail.error = self._outage.error
                mail.verdict = self.memory.decide(mail)

    def _lead(self, batch: Batch) -> None:
        """Settle a batch as soon as the previous one is done."""
        timeout, lock = self.database.backend.timeout, self.database.lock
        deadline = time.monotonic() + timeout
        held = lock.acquire(timeout=timeout)
        self._open = Batch()  # which new mails join from now on
        mails = tuple(batch.mails)
        try:
            if not held:
                self._fall_back(self._prepare(mails), LedgerError(TOO_SLOW),
                                hung=True)
            elif self._outage is not None:  # began while these waited
                for mail in mails:
                    self._decide_in_outage(mail)
            else:
                self._settle(mails, deadline)
        finally:
            if held:
                lock.release()
        self._hand_over(mails)

    def _hand_over(self, mails: Sequence[Mail]) -> None:
        """Call on_decided with those mails that were decided on."""
        decided = [mail for mail in mails if mail.verdict is not None]
        if decided:  # else the outage had just ended: they join a batch
            self.on_decided(decided)

    def _settle(self, mails: Sequence[Mail], deadline: float) -> None:
        """Settle mails in one transaction; if that fails, each separately."""
        left = [mails]
        while left:
            settlement, began = self._prepare(left.pop(0)), time.monotonic()
            try:
                self.database.transact(
                    settle, settlement, self.query, deadline=deadline)
            except LedgerError as error:
                hung = self._has_hung(began, deadline)
                if error.undone and not hung and len(settlement.mails) > 1:
                    # One mail's failure must not affect the others.
                    left = [[mail] for mail in settlement.mails]
                else:
                    self._fall_back(settlement, error, hung)
            else:
                self._accept(settlement)

    def _store(self, identities: Sequence[str], now: float) -> None:
        """Store remembered mails of identities, or raise LedgerError.

        The database's lock is held from the copy until the result is
        remembered, so that no other thread stores the same.
        """
        began = time.monotonic()
        timeout, lock = self.database.backend.timeout, self.database.lock
        if not lock.acquire(timeout=timeout):
            self._begin_outage(LedgerError(TOO_SLOW))
            raise LedgerError(TOO_SLOW)
        try:
            settlement = Settlement((), self.memory.unstored(identities),
                                    self.memory.overrides, now)
            deadline = began + timeout
            try:
                self.database.transact(
                    settle, settlement, self.query, deadline=deadline)
            except LedgerError as error:
                self._fall_back(
                    settlement, error, self._has_hung(began, deadline))
                raise
            self._accept(settlement)
        finally:
            lock.release()

    def _begin_outage(self, error: LedgerError) -> None:
        """Decide all mail from memory until the database is tried again."""
        retry_at = time.monotonic() + self.database.backend.timeout
        with self.memory.lock:
            self._outage = Outage(error, retry_at)

    def _prepare(self, mails: Sequence[Mail]) -> Settlement:
        """Return the input of a transaction on mails."""
        unstored = self.memory.unstored(
            claim.identity for mail in mails for claim in mail.claims)
        return Settlement(mails, unstored, self.memory.overrides,
                          max([mail.now for mail in mails]))

    def _has_hung(self, began: float, deadline: float) -> bool:
        """Say whether a failed transaction waited long, or too long."""
        long = self.database.backend.timeout / 2
        return time.monotonic() > min(began + long, deadline)

    def _accept(self, settlement: Settlement) -> None:
        """Hand out the verdicts of a transaction that was committed."""
        with self.memory.lock:
            self._outage = None
            self.memory.take(settlement)
        for mail, verdict in zip(settlement.mails, settlement.verdicts):
            mail.verdict = verdict

    def _fall_back(self, settlement: Settlement, error: LedgerError,
                   hung: bool) -> None:
        """Decide from memory the mails that a failed transaction did not."""
        verdicts = list(settlement.verdicts)
        retry_at = time.monotonic() + self.database.backend.timeout
        with self.memory.lock:
            self._outage = Outage(error, retry_at) if hung else None
            self.memory.keep(settlement, in_doubt=not error.undone)
            for mail in settlement.mails[len(verdicts):]:
                verdicts.append(self.memory.decide(mail))
        for mail, verdict in zip(settlement.mails, verdicts):
            mail.error, mail.verdict = error, verdict


def open_ledger(settings: Settings) -> Ledger:
    """Return a ledger for the settings; it connects when first used."""
    return Ledger(Database(
        BACKENDS[settings.backend](settings), prepare_tables),
        settings.sql_limits_by_id)


# ---------------------------------------------------------------------------
# 10. Service
#
# Takes a request and returns an action: what the daemon is for.
# ---------------------------------------------------------------------------

COUNTED = ("requests", "passed", "refused", "database_errors",
           "judged_in_memory", "decision_seconds")


class Service:
    """Answers requests under settings that may be replaced at any time."""

    def __init__(self, settings: Settings, ledger: Ledger,
                 clock: Callable[[], float] = time.time,
                 alarm: Callable[..., int] = lambda *_: 1,
                 outage: Callable[..., None] = lambda *_: None) -> None:
        """Take what depends on the process.

        clock: returns the time in seconds since the epoch.
        alarm: called with each refusal; returns how many there were in a row.
        outage: called with the error when the database becomes unavailable,
        and with None when it is available again.
        """
        self.settings = settings
        self.counts: dict[str, float] = dict.fromkeys(COUNTED, 0)
        self.ledger = ledger
        ledger.on_decided = self._on_decided
        self.clock = clock
        self._alarm, self._outage = alarm, outage
        self._counted = -math.inf  # when Postfix last asked where mail counts
        self._unavailable = False  # whether the database is unavailable
        self._lock = threading.Lock()  # guards counts and _unavailable

    def answer(self, request: Request, mail: MailSoFar) -> str:
        """Count the mail of a request and return the action.

        mail: what this connection has asked so far about the same mail.
        """
        settings, now = self.settings, self.clock()  # for the whole request
        self._count("requests")
        if settings.log_requests:
            log.log(NOTICE, "%s: %s", queue_id_of(request), ", ".join(
                f"{quote(name[:MAX_TOLD])}={quote(value[:MAX_TOLD])}"
                for name, value in request.attributes.items() if value
                )[:40 * MAX_TOLD])
        self._watch_state(request, settings, now)
        mail.begin(request)
        claims = claims_of(request, settings, mail.charged)
        if mail.was_asked_before(request) and not any(
                claim.cost for claim in claims):
            return mail.go_on(request)
        if claims:
            return self._decide(request, claims, settings, now, mail)
        if log.isEnabledFor(logging.INFO):
            log.info("%s: protocol_state=%s, not counted (%s), action=%s",
                     queue_id_of(request), printable(request.protocol_state),
                     why_not_counted(request, settings),
                     settings.success_action)
        return settings.success_action

    def reload(self, settings: Settings) -> None:
        """Use new settings from the next request of each connection on."""
        self.settings = settings
        self.ledger.query = settings.sql_limits_by_id

    @property
    def is_database_unavailable(self) -> bool:
        """Say whether mail is being judged from memory now."""
        return self._unavailable

    def _decide(self, request: Request, claims: Sequence[Claim],
                settings: Settings, now: float, so_far: MailSoFar) -> str:
        """Let the ledger decide on a mail; log it and return the action."""
        client, attempts = quote(request.client_address)[:45], 0
        mail = Mail(claims, now, request.instance, request.protocol_state,
                    client, queue_id_of(request), settings)
        began = time.perf_counter()
        verdict = self.ledger.decide(mail)  # calls _on_decided()
        self._count_decision(mail, verdict, mail.decided - began)
        if verdict.broken is None:
            action = action_unless_refused(mail)
        else:
            action = explain(verdict, settings.block_action, now)
        if not verdict.is_within_limits():
            with contextlib.suppress(Exception):  # Postfix must get an answer
                attempts = self._alarm(verdict, client, settings, now)
            log.log(NOTICE, "%s: %s, action=%s", mail.queue_id,
                    describe(verdict, client, attempts), action)
        is_charged = verdict.broken is None and (
            mail.error is None or passes_unstored(mail))
        so_far.remember(
            request, claims if is_charged else (), settings, action)
        return action

    def _on_decided(self, mails: Sequence[Mail]) -> None:
        """Log mails that were decided on together and exceed no limit.

        The others are logged by their own threads.
        """
        now = time.perf_counter()
        for mail in mails:
            mail.decided = now
        try:
            for mail in mails:
                self._notice_outage(mail)
            if log.isEnabledFor(logging.INFO):
                log_within_limits(mails)
        except Exception:  # the mails of other threads must be answered, too
            log.exception("mails were not logged")

    def _count(self, name: str) -> None:
        """Add one to a counter of --prometheus."""
        with self._lock:
            self.counts[name] += 1

    def _count_decision(self, mail: Mail, verdict: Verdict, seconds: float,
                        ) -> None:
        """Count a decision and the time that it took."""
        outcome = "passed"
        if verdict.broken is not None:
            outcome = "refused"
        elif mail.error is not None:
            outcome = "database_errors"
        with self._lock:
            self.counts[outcome] += 1
            self.counts["decision_seconds"] += seconds
            if mail.error is not None:
                self.counts["judged_in_memory"] += 1

    def _notice_outage(self, mail: Mail) -> None:
        """Log the start of an outage, or its end once a mail is stored."""
        verdict = mail.verdict
        if mail.error is not None:
            self.log_outage(mail.error)
        elif (self._unavailable and verdict is not None and verdict.usage
                and verdict.broken is None):
            self.log_outage(None)

    def _watch_state(self, request: Request, settings: Settings,
                     now: float) -> None:
        """Warn if Postfix asks only in states that count_mode ignores."""
        if is_counted(request.protocol_state, settings.count_mode):
            self._counted = now
        elif not self._counted <= now < self._counted + 3600:
            log.warning(
                "Postfix asks at protocol_state=%s, where count_mode %s counts"
                " nothing, so nothing is limited; put this into main.cf: %s",
                printable(request.protocol_state), settings.count_mode,
                main_cf(settings.count_mode, settings.SOCKET), extra=SELDOM)

    def log_outage(self, error: LedgerError | None) -> None:
        """Log and report, once each, the start and the end of an outage."""
        unavailable = error is not None
        with self._lock:
            if unavailable == self._unavailable:
                return
            self._unavailable = unavailable
        if unavailable:
            log.error("the database is unavailable: counting in memory,"
                      " answering %s to mail within the limits: %s",
                      self.settings.db_error_action, error)
        else:
            log.warning("the database is available again")
        with contextlib.suppress(Exception):
            self._outage(error, self.settings)


def log_within_limits(mails: Sequence[Mail]) -> None:
    """Log those mails that exceed no limit, with one call.

    Each write lets another thread run, which costs twice as much as the line.
    """
    lines = [f"{mail.queue_id}: {describe(mail.verdict)},"
             f" action={action_unless_refused(mail)}" for mail in mails
             if mail.verdict is not None and mail.verdict.is_within_limits()]
    if lines:
        log.info("%s", "\n".join(lines))


class MailSoFar:
    """What a connection has asked about its latest mail, and the answer.

    Postfix may ask at RCPT, at DATA and at END-OF-MESSAGE of one mail.  The
    mail is charged where Postfix asks first; later requests are charged only
    what exceeds that.
    """

    charged: dict[str, int]  # identity: what the mail was charged so far
    action: str  # the last answer

    def __init__(self) -> None:
        self._forget()

    def begin(self, request: Request) -> None:
        """Forget the previous mail if a request is about another one."""
        if request.protocol_state not in STATES:
            return  # it is not about a mail
        goes_on = (request.protocol_state == "RCPT" == self._state
                   or self.was_asked_before(request))
        if (not request.instance or request.instance != self._instance
                or not goes_on):
            self._forget()

    def was_asked_before(self, request: Request) -> bool:
        """Say whether this mail was decided on in an earlier state."""
        if not self._state or request.protocol_state not in STATES:
            return False
        return (STATES.index(request.protocol_state)
                > STATES.index(self._state))

    def go_on(self, request: Request) -> str:
        """Note the mail's new state; return the action answered before."""
        self._state = request.protocol_state
        return self.action

    def remember(self, request: Request, charged: Sequence[Claim],
                 settings: Settings, action: str) -> None:
        """Remember what a request was charged, and its answer."""
        self._instance = request.instance
        self._state = request.protocol_state
        self.action = action
        if request.protocol_state == "RCPT":
            self.action = settings.success_action  # refusal: one recipient
        for claim in charged:
            if claim.cost:  # move to the end: the oldest is dropped first
                before = self.charged.pop(claim.identity, 0)
                self.charged[claim.identity] = before + claim.cost
        while len(self.charged) > MAX_ATTRIBUTES:
            del self.charged[next(iter(self.charged))]

    def _forget(self) -> None:
        """Start with a mail about which nothing was asked."""
        self.charged = {}
        self.action = ""
        self._instance = self._state = ""


def queue_id_of(request: Request) -> str:
    """Return the queue id as Postfix's own log writes it."""
    return quote(request.queue_id) or "NOQUEUE"


# ---------------------------------------------------------------------------
# 11. Server
#
# Sockets and threads: one thread per connection, and a bound on everything
# that a stranger can send or keep open.
# ---------------------------------------------------------------------------

PLAIN = os.O_NOFOLLOW | os.O_NONBLOCK  # no symlinks, no waiting for a FIFO
PIECE = 8192  # bytes per recv(); the largest real request is 6 kB
FREE_PIECES = 3  # pieces of one request that are read without a pause
SLOW = 3  # seconds; any real client sends a request faster than this
SOCKET_PAUSE = 5  # seconds between checks; a lost socket is back within ten
# policy_context marks a request from --ping or the watchdog.  Postfix takes
# its value from main.cf (smtpd_policy_service_policy_context), so no client
# can set it.
PING_PATIENCE = 10  # seconds; monitoring does not wait as long as Postfix
PING_CONTEXT = f"{PROGRAM} ping"
PING = (f"request=smtpd_access_policy\nprotocol_state=VRFY\n"
        f"policy_context={PING_CONTEXT}\n\n").encode()


class PolicyHandler(socketserver.BaseRequestHandler):
    """One connection: any number of requests, each answered in turn."""

    server: PolicyServer
    request: socket.socket

    def setup(self) -> None:
        """Set the timeouts and register with the server."""
        self.asked = False  # whether a complete request has arrived
        self.active = time.monotonic()  # time of the last answer; inf: busy
        self.pieces = 0  # short reads so far for the next request
        self.began = math.inf  # when the wait for the second of these began
        self.patience = self.server.service.settings.delay_to_close
        for option, seconds in ((socket.SO_RCVTIMEO, self.patience),
                                (socket.SO_SNDTIMEO, 2)):  # Postfix reads
            # settimeout() would poll() before each call: 20 % slower
            self.request.setsockopt(socket.SOL_SOCKET, option,
                                    struct.pack("ll", seconds, 0))
        self.thread = threading.current_thread()
        self.server.handlers.add(self)

    def handle(self) -> None:
        """Answer requests until the client closes the connection."""
        mail = MailSoFar()
        try:
            for request in read_requests(self.receive):
                self.asked, self.active = True, math.inf
                action = self.answer(request, mail)
                self.request.sendall(f"action={action}\n\n".encode())
                self.active = time.monotonic()
                self.pieces, self.began = 0, math.inf
                del request  # it may be large, and the next one a long wait
        except BadRequest as error:
            log.warning("bad request, connection closed: %s", error,
                        extra=SELDOM)
        except OSError:
            pass  # the client disconnected or timed out
        finally:
            self.server.handlers.discard(self)

    def answer(self, request: Request, mail: MailSoFar) -> str:
        """Return the action for a request; a ping is never counted."""
        service = self.server.service
        if request.attributes.get("policy_context") == PING_CONTEXT:
            wait_for_log()
            return service.settings.success_action
        return service.answer(request, mail)

    def receive(self) -> bytes:
        """Return some bytes, or b"" at end of file or when time is up.

        Raise OSError when delay_to_close expires (SO_RCVTIMEO).
        """
        now = time.monotonic()
        if now - self.active > 2 * self.patience:
            return b""  # a request that arrives byte by byte
        if self.pieces > 0:
            self.began = min(self.began, now)
            if self.is_slow(now) and self.server.is_crowded():
                return b""
            self.let_bytes_gather()
        data = self.request.recv(PIECE)
        if len(data) < PIECE:
            self.pieces += 1
        return data

    def is_slow(self, now: float) -> bool:
        """Say whether this client is taking too long over one request."""
        return now - self.began > SLOW

    def let_bytes_gather(self) -> None:
        """Pause, longer for each piece, unless either side hangs up.

        Without this a thread would wake up for each byte that a client sends.
        """
        if self.pieces < FREE_PIECES:
            return
        end = select.poll()
        end.register(self.request, select.POLLRDHUP)  # not woken by data
        end.poll(min(1000, 10 * 2 ** (self.pieces - FREE_PIECES)))

    def hang_up(self) -> None:
        """End the connection from another thread.

        Requests that have already arrived are still answered.
        """
        with contextlib.suppress(OSError):
            self.request.shutdown(socket.SHUT_RD)


def wait_for_log() -> None:
    """Wait until a line of the log could be written.

    A log that nobody reads stops all answers, so a ping must notice it.
    """
    for handler in logging.getLogger().handlers:
        handler.acquire()
        handler.release()


class PolicyServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Listens on SOCKET, with one thread per connection."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 4096  # when the backlog is full, Postfix is refused
    max_connections = 4000  # Postfix's default_process_limit is 100
    path: str | None = None  # of the unix socket, once it is ours
    look_at = math.inf  # when to check that the path still exists

    def __init__(self, service: Service) -> None:
        """Bind and listen.

        Raise AlreadyRunning, PolicydError or OSError if that fails.
        """
        self.service = service
        self.handlers: set[PolicyHandler] = set()
        settings = service.settings  # kept: a reload cannot change these
        self.address = address = settings.SOCKET
        self.permission = settings.socket_permission
        self.address_family = (
            socket.AF_UNIX if isinstance(address, str) else
            socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
        with (hold_lock(address) if isinstance(address, str)
              else contextlib.nullcontext()):  # stale to others until listen()
            super().__init__(address, PolicyHandler)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        """Bind; a unix socket is created with mode socket_permission."""
        if isinstance(self.address, str):
            remove_stale_socket(self.address)
        before = os.umask(0o777 & ~self.permission)
        try:
            super().server_bind()
        except OSError as error:  # its text does not name the address
            reason = f"{format_address(self.address)}: {error}"
            if (error.errno == errno.EADDRINUSE
                    and isinstance(self.address, str)):
                raise AlreadyRunning(reason) from None
            raise PolicydError(reason) from None  # a port may become free
        finally:
            os.umask(before)
        if isinstance(self.address, str):
            self.path, self.made = self.address, os.lstat(self.address)
            self.look_at = time.monotonic() + SOCKET_PAUSE
        else:  # accepted connections inherit this option
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection, closing another one if there are too many."""
        if len(self.handlers) >= self.max_connections and not self.evict():
            raise OSError("all are busy")  # it waits in the backlog
        try:
            return super().get_request()
        except OSError as error:
            log.error("cannot accept a connection: %s", error, extra=SELDOM)
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                self.evict()
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread, closing connections if no thread can be started."""
        for _ in range(10):
            try:
                return super().process_request(request, client_address)
            except RuntimeError:  # TasksMax of systemd, RLIMIT_NPROC
                self.evict()
                time.sleep(0.01)  # an ended thread takes a moment to go
        return self.shutdown_request(request)

    def is_crowded(self) -> bool:
        """Say whether slow clients must go, for want of connections."""
        return len(self.handlers) > self.max_connections // 4

    def service_actions(self) -> None:
        """Check the socket's path, every SOCKET_PAUSE seconds.

        serve_forever() calls this after each poll.
        """
        now = time.monotonic()
        if now < self.look_at:
            return
        if not self.has_path() and select.select([self.socket], [], [], 0)[0]:
            return  # first accept those who connected to the old socket
        self.look_at = now + SOCKET_PAUSE
        if self.has_path():
            return
        try:
            self.listen_again()
        except (PolicydError, OSError) as error:
            log.error("SOCKET is lost and cannot be created again, so Postfix"
                      " cannot connect: %s", error, extra=SELDOM)
        else:
            log.warning("SOCKET was lost and has been created again: %s",
                        self.path)

    def has_path(self) -> bool:
        """Say whether clients that connect to the path reach this server."""
        if self.path is None:
            return True  # it is not a unix socket
        try:
            return os.path.samestat(os.lstat(self.path), self.made)
        except OSError:
            return False

    def listen_again(self) -> None:
        """Replace the listening socket by a new one at the same path.

        Open connections have their own sockets and are not affected.
        """
        assert self.path is not None
        old, self.socket = self.socket, socket.socket(self.address_family)
        new = self.socket
        try:
            with hold_lock(self.path):
                self.server_bind()
                self.server_activate()
            os.dup2(new.fileno(), old.fileno())  # serve_forever() polls this
        finally:
            self.socket = old
            new.close()

    def answers_itself(self, patience: float) -> bool:
        """Say whether a client of SOCKET is answered in patience seconds."""
        if not self.has_path():
            return False
        try:
            answer = ask_at(self.server_address, PING,
                            time.monotonic() + patience)
        except PermissionError:
            return True  # socket_permission excludes the daemon's own user
        except OSError:
            return False
        return answer.startswith(b"action=")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a bug of ours with its traceback; the connection is closed."""
        log.error("internal error in a connection", exc_info=True,
                  extra=SELDOM)

    def evict(self) -> bool:
        """Close some connections; say whether there is room now.

        First those that are slow to send a request, then those that have not
        sent one for a second, then the longest idle; never one that is
        waiting for an answer.
        """
        log.warning("too many connections, closing idle ones", extra=SELDOM)
        now = time.monotonic()
        idle = [handler for handler in list(self.handlers)
                if handler.active < math.inf]
        idle.sort(key=lambda handler: (
            not handler.is_slow(now),
            handler.asked or handler.active > now - 1, handler.active))
        for handler in idle[:1 + len(idle) // 64]:  # several for each sort
            handler.hang_up()
        if not idle:
            time.sleep(0.05)
            return False
        idle[0].thread.join(0.05)
        return not idle[0].thread.is_alive()

    def stop(self, seconds: float) -> None:
        """Stop accepting, answer the requests that have arrived, then close.

        Wait at most the given number of seconds.
        """
        self.shutdown()
        self.server_close()
        deadline = time.monotonic() + seconds
        handlers = list(self.handlers)
        for handler in handlers:
            handler.hang_up()
        for handler in handlers:
            handler.thread.join(max(0, deadline - time.monotonic()))

    def server_close(self) -> None:
        """Close the listening socket; remove its path if it is still ours."""
        super().server_close()
        if self.path is not None and self.has_path():
            with contextlib.suppress(OSError):
                os.unlink(self.path)
                self.path = None  # a later file there is another daemon's


@contextlib.contextmanager
def hold_lock(path: str) -> Iterator[None]:
    """Hold the lock file of a path, or raise AlreadyRunning.

    Anyone who may read a file may flock() it, so this one has mode 0600.
    """
    with open_own_file(path + ".lock", 0o600) as file:
        held = False  # also if the previous holder is just removing the file
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(
                os.fstat(file.fileno()), os.lstat(file.name))
        if not held:
            raise AlreadyRunning(f"{path}: another instance is running")
        if os.geteuid() == 0:  # the next start may not be as root
            folder = os.stat(os.path.dirname(file.name) or ".")
            os.fchown(file.fileno(), folder.st_uid, folder.st_gid)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(file.name)


@contextlib.contextmanager
def open_own_file(path: str, mode: int) -> Iterator[TextIO]:
    """Open a file for writing and empty it; refuse links with OSError.

    Otherwise another account could put a link there and have root empty the
    file it points to and give that file to the daemon's user.
    """
    with open(path, "a", opener=lambda name, flags: os.open(
            name, flags | PLAIN, mode)) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            raise OSError(errno.EEXIST, "not a regular file, or it has a"
                          " second hard link; remove it", path)
        file.truncate(0)
        yield file


def check_socket(address: str | tuple[str, int]) -> None:
    """Raise OSError or PolicydError if an address cannot be bound."""
    if not isinstance(address, str):
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        try:
            socket.create_server((address[0], 0), family=family).close()
        except OSError as error:  # its text does not name the address
            raise PolicydError(f"{format_address(address)}: {error}") from None
    elif len(os.fsencode(address)) > 107:  # unix(7), sun_path
        raise OSError(errno.ENAMETOOLONG, "path too long for a socket",
                      address)
    elif (os.path.lexists(address)
          and not stat.S_ISSOCK(os.lstat(address).st_mode)):
        raise FileExistsError(errno.EEXIST, "is not a socket", address)


def remove_stale_socket(path: str) -> None:
    """Remove a socket on which no process listens.

    Raise AlreadyRunning if one does, OSError if the path is not a socket.
    """
    check_socket(path)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        error = probe.connect_ex(path)
    if error == errno.ECONNREFUSED:
        os.unlink(path)
    elif error in (0, errno.EAGAIN):  # EAGAIN: its backlog is full
        raise AlreadyRunning(f"{path}: another process is listening there")
    elif error != errno.ENOENT:
        raise OSError(error, os.strerror(error), path)


def ping(settings: Settings, patience: float) -> float:
    """Return how many seconds the daemon at SOCKET took to answer.

    Raise PolicydError if it does not answer within patience seconds.
    """
    address, began = settings.SOCKET, time.monotonic()
    try:
        line = ask_at(address, PING, began + patience)
    except OSError as error:
        reason = error.strerror or "timed out"
        raise PolicydError(f"no answer from {format_address(address)}:"
                           f" {reason}; is the daemon running?") from None
    if not line.startswith(b"action="):
        raise PolicydError(f"{format_address(address)} is not a policy"
                           " server: it answered"
                           f" {printable(repr(line[:MAX_TOLD]))}")
    return time.monotonic() - began


def ask_at(address: Any, request: bytes,
           deadline: float) -> bytes:
    """Send a request to an address and return the answer.

    Raise OSError if none arrives before the deadline (time.monotonic()).
    """
    family = (socket.AF_UNIX if isinstance(address, str) else
              socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    with socket.socket(family) as client:
        connect_until(deadline, client, address)
        client.settimeout(time_left(deadline))
        client.sendall(request)
        answer = b""
        while b"\n\n" not in answer and len(answer) < PIECE:
            client.settimeout(time_left(deadline))
            data = client.recv(PIECE)
            if not data:
                raise ConnectionResetError(
                    errno.ECONNRESET, "connection closed without an answer")
            answer += data
        return answer


def connect_until(deadline: float, client: socket.socket,
                  address: Any) -> None:
    """Connect; retry until the deadline while the backlog is full."""
    while True:
        client.settimeout(time_left(deadline))
        try:
            return client.connect(address)
        except BlockingIOError:  # unix(7): the backlog is full
            time.sleep(0.05)


def time_left(deadline: float) -> float:
    """Return the seconds until a deadline; raise socket.timeout after it."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise socket.timeout
    return left


# ---------------------------------------------------------------------------
# 12. Upkeep
#
# Cleaning; what an admin changes by hand (--limit, --block, --reset); and
# trying limits on recorded mail (--simulate).
# ---------------------------------------------------------------------------

CLEAN_STEP = 1000  # rows read or deleted in one transaction: about 10 ms
ASK_STEP = 20  # queries for limits in one transaction: about 1 ms each
STORED_FOR = 2 * 86400  # seconds for which a host's stored window is valid
STORE_EVERY = 6 * 3600  # seconds; seven attempts in a row may fail


class HostWindow(NamedTuple):
    """The longest window of a host's limits, a row of mail_window."""

    host: str
    seconds: int
    query: str  # the hash of its sql_limits_by_id, "" if it has none
    since: int = 0  # when it was first stored, by the database's clock
    date: int = 0  # when it was last stored


class Aging(NamedTuple):
    """A table whose rows belong to identities and are deleted when old."""

    table: str
    date: str  # the column that holds a row's date
    least: int  # seconds for which rows are kept, whatever the limits are


class Oldest(NamedTuple):
    """What one step read of an identity: its oldest date, its rows."""

    identity: str
    date: int
    rows: int


class Found(NamedTuple):
    """What a step of cleaning is to delete, and where the next one starts."""

    until: Mapping[str, int]  # identity: the newest date to delete
    place: str | None  # the last identity that is done; None: all are done


AGING = (
    Aging("mail_count", "date", 0), Aging("mail_value", "date", 0),
    Aging("mail_refused", "last", 35 * 86400))  # for monthly reports


def clean(database: Database, settings: Settings, now: int) -> Iterator[int]:
    """Delete old rows; after each step yield how many were deleted.

    No mail waits long for a step: reading the old rows locks nothing, and
    deleting locks only the deleted rows.  Each table is read in the order of
    its identities, up to the last one that it held at the start, so that this
    ends however many are added meanwhile.  Raise LedgerError.
    """
    own = own_window(settings)  # computed once, not in each transaction
    for aging in AGING:
        yield from clean_aging(database, settings, aging, own, now)
    yield from clean_turns(database)
    database.transact(delete_ended_limits, now)
    yield 0


def clean_aging(database: Database, settings: Settings, aging: Aging,
                own: HostWindow, now: int) -> Iterator[int]:
    """Delete, step by step, rows too old for any limit of any host."""
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
    """Return the last identity in a table, or None if it is empty."""
    [identity] = transaction.run(f"SELECT MAX(id) FROM {table}").fetchone()
    return None if identity is None else str(identity)


def find_old(transaction: Transaction, settings: Settings, aging: Aging,
             own: HostWindow, between: tuple[str, str], now: int) -> Found:
    """Find rows of the next identities that are too old for any limit."""
    server_now = server_time(transaction)
    now = min(now, server_now)  # one clock that is ahead deletes nothing
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
    if until and step[0].rows >= CLEAN_STEP:  # then it is the only one
        return find_first_old(transaction, aging, Found(until, place), between)
    return Found(until, place)


def read_step(transaction: Transaction, aging: Aging,
              between: tuple[str, str]) -> list[Oldest]:
    """Read the next rows of a table; return their identities.

    The last identity is left to the next step, because some of its rows may
    not have been read; one with more rows than a step reads is returned alone.
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
    """Reduce what was found of a large identity to what one step deletes."""
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
        for some in chunks(identities, 100):  # a list that every driver and
            marks = ", ".join("?" * len(some))  # server accepts
            deleted += int(transaction.run(
                f"DELETE FROM {aging.table} WHERE id IN ({marks})"
                f" AND {aging.date} <= ?", *some, date).rowcount)
    return deleted


def kept_for(window: int) -> int:
    """Return for how many seconds rows are kept for a limit's window.

    That allows for a clock that is CLOCK_SKEW ahead.
    """
    return max(2 * window, window + CLOCK_SKEW)  # twice: as the original did


def read_limits_between(transaction: Transaction, after: str, last: str,
                        ) -> dict[str, Limits | None]:
    """Return the limits that --limit has set for the identities of a range.

    Those that have ended are included; None means that they are malformed.
    """
    found: dict[str, Limits | None] = {}
    for identity, text, ends, made in transaction.run(
            "SELECT id, limits, ends, made FROM mail_limit WHERE id > ?"
            " AND id <= ?", after, last).fetchall():
        override = parse_override(text, ends, made)
        found[identity] = None if override is None else override.limits
    return found


def ask_own_limits(transaction: Transaction, query: str | None, identity: str,
                   overrides: Mapping[str, Limits | None]) -> Limits | None:
    """Return the limits of --limit and of the query, None if that fails."""
    limits = overrides.get(identity) or ()
    if not query:
        return limits
    answer = transaction.attempt(
        QUERY_FAILED, lambda *given: [ask_limits(*given)], query, identity)
    if answer is None:
        return None
    return (*limits, *(answer[0] or ()))


def clean_turns(database: Database) -> Iterator[int]:
    """Delete, step by step, the turns of identities without any records."""
    place: str | None = ""
    end = database.transact(last_identity, "mail_turn", reading=True)
    while place is not None and end is not None:
        unused, place = database.transact(
            find_unused_turns, place, end, reading=True)
        if unused:  # one that is used again meanwhile is simply recreated
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
    """Delete limits of --limit that have ended by the clock of every host."""
    now = min(now, server_time(transaction))
    transaction.run("DELETE FROM mail_limit WHERE ends <= ?", now - STORED_FOR)


def own_window(settings: Settings) -> HostWindow:
    """Return what this host tells the others that share the database."""
    query = " ".join((settings.sql_limits_by_id or "").split())
    if query:
        query = hashlib.sha256(query.encode()).hexdigest()
    return HostWindow(
        shorten(socket.gethostname()), settings.longest_window, query)


def server_time(transaction: Transaction) -> int:
    """Return the database server's time, which all hosts share.

    SQLite has no server: its time is that of this host.
    """
    if not transaction.backend.clock:
        return int(time.time())
    [now] = transaction.run(
        f"SELECT {transaction.backend.clock}").fetchone()
    return int(now)


def store_window(transaction: Transaction, own: HostWindow) -> None:
    """Store this host's longest window and delete outdated ones."""
    now = server_time(transaction)
    transaction.run("DELETE FROM mail_window WHERE date <= ? OR date > ?",
                    now - STORED_FOR, now + STORED_FOR)
    transaction.run(transaction.backend.store_window,
                    *own._replace(since=now, date=now), now)


def read_windows(transaction: Transaction, now: int) -> list[HostWindow]:
    """Return the windows of hosts that are still valid, the newest last."""
    return [HostWindow(*row) for row in transaction.run(
        "SELECT host, seconds, query, since, date FROM mail_window"
        " WHERE date > ? ORDER BY date, since", now - STORED_FOR).fetchall()]


def reason_to_wait(own: HostWindow, hosts: Sequence[HostWindow],
                   now: int) -> str:
    """Return why nothing can be deleted yet, "" if rows can be deleted.

    After an upgrade, or when all hosts were down, each host first needs time
    to store its window.
    """
    start = min((host.since for host in hosts), default=now) + STORED_FOR
    if start > now:
        return (f"nothing is deleted before {moment(start)}: each host that"
                " shares this database first has to store its longest window")
    for host in hosts:
        if host.query not in ("", own.query):
            return (f"nothing is deleted: {printable(host.host)} had a"
                    " different sql_limits_by_id in the last two days, and"
                    " only that query knows for how long to keep records")
    return ""


def read_reason_to_wait(transaction: Transaction, own: HostWindow) -> str:
    """Return reason_to_wait() for the windows that are stored now."""
    now = server_time(transaction)
    return reason_to_wait(own, read_windows(transaction, now), now)


def describe_difference(own: HostWindow, hosts: Sequence[HostWindow]) -> str:
    """Return how the limits of other hosts differ, "" if they do not."""
    newest = {host.host: host for host in hosts if host.host != own.host}
    for host in newest.values():
        if host.query not in ("", own.query):
            return (f"sql_limits_by_id is not the same here and on"
                    f" {printable(host.host)}; until it is, this host"
                    " deletes no records")
        if host.seconds != own.seconds:
            return ("hosts that share this database have different limits:"
                    f" the longest window is {spell(own.seconds)} here and"
                    f" {spell(host.seconds)} on {printable(host.host)};"
                    " records are kept for the longest window")
    return ""


class Housekeeping:
    """The daemon's background work, one step at a time."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._settings: Settings | None = None  # those whose window is stored
        self._store_at = 0.0  # when to store it again (time.monotonic())
        self._difference = ""  # between hosts, as last logged
        self._cleaning: Iterator[int] = iter(())

    def do_step(self) -> None:
        """Store remembered mails, read overrides, delete some old rows."""
        service, ledger = self._service, self._service.ledger
        settings, now = service.settings, int(service.clock())
        ledger.retry_if_due(now)
        if ledger.is_in_outage():
            return
        ledger.store_remembered(now)
        try:
            ledger.database.compare_clocks()
            overrides = ledger.database.transact(
                read_overrides, now, reading=True)
            with ledger.memory.lock:
                ledger.memory.overrides = overrides
            unavailable = service.is_database_unavailable
            if (settings is not self._settings or unavailable
                    or time.monotonic() >= self._store_at):
                self._store_window(ledger.database, settings)
            if unavailable and not ledger.memory.unstored_identities():
                service.log_outage(None)  # a row could be written
            self._clean(ledger.database, settings, now)
        except LedgerError as error:
            service.log_outage(error)

    def _store_window(self, database: Database, settings: Settings) -> None:
        """Store this host's longest window; log if other hosts' differ."""
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
            self._cleaning = iter(())  # start again with these settings
        self._store_at = time.monotonic() + STORE_EVERY

    def _clean(self, database: Database, settings: Settings, now: int) -> None:
        """Do the next step of cleaning; after the last, start again."""
        deleted = next(self._cleaning, None)
        if deleted is None:
            self._cleaning = clean(database, settings, now)
            deleted = next(self._cleaning)
        if deleted:
            log.info("%d old records deleted", deleted)


def forget(transaction: Transaction, identity: str) -> int:
    """Delete the records of an identity; return how much they counted."""
    take_turns(transaction, [identity])
    [mails] = transaction.run(
        "SELECT SUM(recipient_count) FROM mail_count WHERE id = ?",
        identity).fetchone()
    transaction.run("DELETE FROM mail_count WHERE id = ?", identity)
    values = transaction.run(
        "DELETE FROM mail_value WHERE id = ?", identity).rowcount
    return int(mails or 0) + int(values)


SIMULATE_STEP = 10_000  # rows read in one transaction: 20 ms on SQLite
COUNTING = ("limit_by_sasl", "limit_by_sender", "limit_by_ip",
            "limited_networks", "count_mode")  # settings that shape the rows
SUMMED = ("", "recipients", "mails", "bytes")  # values of count in mail_count


class PastMail(NamedTuple):
    """A row of mail_count, as far as limits are concerned."""

    identity: str
    date: int  # in seconds, rounded up
    cost: int


class Place(NamedTuple):
    """Where a step of reading begins."""

    identity: str = ""
    date: int = 0
    skip: int = 0  # rows of that identity and date that were already read


class Terms(NamedTuple):
    """The limits by which an identity is judged."""

    quota: str  # its name; "": the settings' own limits
    limits: Limits
    in_force: Limits  # when its mail was recorded, as far as is known


class Trial(NamedTuple):
    """What limits would have done to the mail of one identity."""

    since: int  # the date of its first mail
    mails: int  # in the units of the limits, like the numbers below
    refused: Counter[Limit]  # by the first limit that each mail exceeded
    peaks: Mapping[int, int]  # window: the most that was sent within one


class Offender(NamedTuple):
    """An identity whose mail limits would have refused."""

    identity: str
    mails: int
    refused: int
    limit: Limit  # that refused most of them
    peak: int  # the most that was sent within its window


@dataclass
class Simulation:
    """What limits would have done to all recorded mail.

    Keys of quotas count the same mail as identities do, so they are counted
    separately.
    """

    mails: int = 0
    identities: int = 0
    keys: int = 0
    since: int | None = None  # None: nothing is recorded
    refused: list[Offender] = field(default_factory=list)  # the most first
    peaks: dict[tuple[str, int], Counter[int]] = field(  # by quota and window
        default_factory=dict)  # how many identities have each peak
    looser: int = 0  # identities and keys whose limits are looser than before
    notes: list[str] = field(default_factory=list)  # what limits its accuracy

    def add(self, identity: str, terms: Terms, trial: Trial) -> None:
        """Add the trial of one identity or of a quota's key."""
        if terms.quota:
            self.keys += 1
        else:
            self.identities += 1
            self.mails += trial.mails
        if self.since is None or trial.since < self.since:
            self.since = trial.since
        if trial.refused:
            limit, _ = trial.refused.most_common(1)[0]
            self.refused.append(Offender(
                identity, trial.mails, sum(trial.refused.values()), limit,
                trial.peaks[limit.seconds]))
        for seconds, peak in trial.peaks.items():
            self.peaks.setdefault((terms.quota, seconds), Counter())[peak] += 1
        if is_looser(terms.limits, terms.in_force):
            self.looser += 1


def simulate(transaction: Transaction, settings: Settings,
             in_force: Settings, now: int,
             tell: Callable[[int], None] = lambda rows: None) -> Simulation:
    """Judge all recorded mail under settings; change nothing.

    in_force: the settings under which it was recorded, as far as is known.
    tell: called after each step with the number of rows judged so far.
    """
    result = Simulation()
    columns = columns_of(transaction, "mail_count")
    refusals, overrides = read_hints(transaction, now)
    transaction.run("COMMIT")
    windows = {rule.name: windows_of(rule) for rule in settings.rules}
    for identity, mails in itertools.groupby(
            read_mails(transaction, columns, tell),
            operator.attrgetter("identity")):
        terms = find_terms(transaction, settings, in_force, identity)
        if terms is not None:
            needed = {limit.seconds for limit in terms.limits}
            trial = try_limits(mails, terms.limits, sorted(
                needed | windows[terms.quota]))
            result.add(identity, terms, trial)
    result.refused.sort(key=lambda one: (-one.refused, one.identity))
    result.notes += [*note_limits(result, refusals, overrides),
                     *note_changes(settings, in_force),
                     *note_quotas(settings, in_force, result)]
    return result


def read_mails(transaction: Transaction, columns: Sequence[str],
               tell: Callable[[int], None]) -> Iterator[PastMail]:
    """Yield all recorded mail by identity and date, read in short steps."""
    spell_id = str if "total" in columns else fold  # as the update will do
    place, done = Place(), 0
    while True:
        with brief_read(transaction):
            rows = read_mails_from(transaction, columns, place)
        mails = [PastMail(spell_id(identity), date, cost)
                 for identity, date, cost in rows]
        yield from mails
        done += len(mails)
        tell(done)
        if len(mails) < SIMULATE_STEP:
            return
        last = mails[-1]
        skip = count_last(mails)
        if skip == len(mails) and place.date == last.date and (
                spell_id(place.identity) == last.identity):
            skip += place.skip  # one second has more rows than a step reads
        place = Place(rows[-1][0], last.date, skip)


def read_mails_from(transaction: Transaction, columns: Sequence[str],
              place: Place) -> list[Row]:
    """Read the next rows, in the order of the index mail_count_total."""
    cost = "1"  # early versions of the original had no such column
    if "recipient_count" in columns:
        cost = "COALESCE(recipient_count, 1)"
    select = f"SELECT id, date, {cost} FROM mail_count WHERE"
    order = ", ".join(column for column in ("date", "total", "recipient_count")
                      if column in columns)
    rows = list(transaction.run(
        f"{select} id = ? AND date >= ? ORDER BY {order} LIMIT ? OFFSET ?",
        *place[:2], SIMULATE_STEP, place.skip).fetchall())
    if len(rows) < SIMULATE_STEP:
        rows += transaction.run(
            f"{select} id > ? ORDER BY id, {order} LIMIT ?",
            place.identity, SIMULATE_STEP - len(rows)).fetchall()
    return rows


def count_last(mails: Sequence[PastMail]) -> int:
    """Count the mails with the identity and date of the last one."""
    identity, date, _ = mails[-1]
    for count, mail in enumerate(reversed(mails)):
        if (mail.identity, mail.date) != (identity, date):
            return count
    return len(mails)


@contextlib.contextmanager
def brief_read(transaction: Transaction) -> Iterator[None]:
    """Read in a separate transaction, so that no writer waits for it."""
    if transaction.backend.begin_reading:
        transaction.later(transaction.backend.begin_reading)
    yield
    transaction.run("COMMIT")


def find_terms(transaction: Transaction, settings: Settings,
               in_force: Settings, identity: str) -> Terms | None:
    """Return the terms for an identity, or None if it cannot be judged."""
    rule, former = rule_of(settings, identity), rule_of(in_force, identity)
    if rule.count not in SUMMED or (
            former.by and not counts_alike(rule, former)):
        return None
    if settings.sql_limits_by_id and not rule.by:
        with brief_read(transaction):
            asked = transaction.attempt(
                QUERY_FAILED, ask_limits, settings.sql_limits_by_id, identity)
        if asked is not None:
            return Terms(rule.name, asked, asked)
    in_file: Limits = ()  # for a new quota
    if former.by == rule.by:
        in_file = limits_in(in_force, former, identity)
    return Terms(rule.name, limits_in(settings, rule, identity), in_file)


def counts_alike(rule: Rule, other: Rule) -> bool:
    """Say whether two rules count the same mail under the same keys."""
    return (rule.by, rule.when, rule.count) == (
        other.by, other.when, other.count)


def limits_in(settings: Settings, rule: Rule, identity: str) -> Limits:
    """Return the limits that the file has for an identity or a key."""
    return limits_under(rule, *named_by(settings, rule, identity))


def windows_of(rule: Rule) -> set[int]:
    """Return the windows of a rule's limits, in seconds."""
    return {limit.seconds for limit in rule.all_limits()}


def is_looser(limits: Limits, others: Limits) -> bool:
    """Say whether limits could let mail pass that others refuse."""
    return not all(any(
        limit.mails <= other.mails and limit.seconds >= other.seconds
        for limit in limits) for other in others)


def try_limits(mails: Iterable[PastMail], limits: Limits,
               windows: Iterable[int]) -> Trial:
    """Judge the mail of one identity in its order; count no refused mail.

    A mail's date is its time rounded up to a second; the daemon, which knew
    the exact time, may have counted one second more.
    windows: the seconds to return peaks for, including those of the limits.
    """
    sent = {seconds: SlidingSum(seconds) for seconds in windows}
    passed = {limit.seconds: SlidingSum(limit.seconds) for limit in limits}
    peaks = dict.fromkeys(sent, 0)
    refused: Counter[Limit] = Counter()
    since, total = None, 0
    for identity, date, cost in mails:
        since = date if since is None else since
        total += cost
        for seconds, window in sent.items():
            window.add(date, cost)
            peaks[seconds] = max(peaks[seconds], window.used(date))
        claim = Claim(identity, cost, limits)
        usage = [Usage(claim, limit, passed[limit.seconds].used(date))
                 for limit in limits if cost]  # as decide() does
        broken = judge(usage).broken
        if broken is not None:
            refused[broken.limit] += cost
            continue
        for window in passed.values():
            window.add(date, cost)
    return Trial(since or 0, total, refused, peaks)


class SlidingSum:
    """The sum of what was sent within a window, added in order of date.

    It keeps one number for each second in which there was mail.
    """

    def __init__(self, seconds: int) -> None:
        self._seconds = seconds
        self._dates: deque[int] = deque()
        self._costs: deque[int] = deque()  # at each of these dates
        self._sum = 0

    def add(self, date: int, cost: int) -> None:
        """Add a mail."""
        if self._dates and self._dates[-1] == date:
            self._costs[-1] += cost
        else:
            self._dates.append(date)
            self._costs.append(cost)
        self._sum += cost

    def used(self, now: int) -> int:
        """Return the sum within the window that ends now."""
        oldest = now - self._seconds  # just outside, as in the ledger
        while self._dates and self._dates[0] <= oldest:
            self._dates.popleft()
            self._sum -= self._costs.popleft()
        return self._sum


def read_hints(transaction: Transaction, now: int) -> tuple[int, int]:
    """Return how many refusals are recorded and overrides are in force."""
    refusals, overrides = 0, 0
    if columns_of(transaction, "mail_refused"):  # the original lacks both
        [refusals] = transaction.run(
            "SELECT COALESCE(SUM(hits), 0) FROM mail_refused").fetchone()
    if columns_of(transaction, "mail_limit"):
        overrides = len(read_overrides(transaction, now))
    return int(refusals), overrides


def note_limits(result: Simulation, refusals: int, overrides: int,
                ) -> Iterator[str]:
    """Yield where the limits in force differed from those that were tried."""
    if result.looser:
        yield (f"these limits are looser than those of the file for"
               f" {quantity(result.looser, 'identity')}: refused mail is not"
               f" recorded ({quantity(refusals, 'refusal')} counted), so more"
               " would have been sent than is shown")
    if overrides:
        yield (f"limits of --limit or --block, now in force for"
               f" {quantity(overrides, 'identity')}, are ignored here")


def note_changes(settings: Settings, in_force: Settings) -> Iterator[str]:
    """Yield changes whose effect recorded mail cannot show."""
    for name in COUNTING:
        if getattr(settings, name) != getattr(in_force, name):
            yield (f"{name}: a change has no effect here: recorded mail stays"
                   " as it was counted")
    newly_limited = unlimited_in(in_force) - unlimited_in(settings)
    if newly_limited:
        names = ", ".join(sorted(newly_limited))
        yield (f"only mail with limits is recorded, and the file has"
               f" no limits for {printable(names[:MAX_TOLD])}")


def unlimited_in(settings: Settings) -> set[str]:
    """Return the names and patterns that have no limits in the file."""
    first, *_ = settings.rules
    patterns = first.limits_by_id
    names = {name for name, limits in patterns.texts.items() if not limits}
    names.update(
        str(network) for network, limits in zip(
            patterns.each_network(), list(patterns.entries())[
                len(patterns.texts):]) if not limits)
    return names if first.limits else {*names, "all others"}


def note_quotas(settings: Settings, in_force: Settings,
                result: Simulation) -> Iterator[str]:
    """Yield which quotas could not be judged, or only separately."""
    formers = {rule.name: rule for rule in in_force.rules[1:]}
    found = {quota for quota, _ in result.peaks}
    for rule in settings.rules[1:]:
        former = formers.pop(rule.name, rule)
        if rule.count not in SUMMED:
            yield (f"quota {rule.name}: not judged: only the last time of each"
                   " different value is recorded")
        elif not counts_alike(rule, former):
            yield (f"quota {rule.name}: not judged: its by, when or count is"
                   " not that of the file")
        elif rule.name not in found:
            yield f"quota {rule.name}: not judged: nothing is recorded for it"
    for name in formers:
        yield (f"quota {name}: removed here, but mail that it refused is not"
               " recorded")
    if result.keys:
        yield ("identities and quota keys are judged separately: mail"
               " refused for one still counts for the others here")


def percentile(found: Counter[int], percent: int) -> int:
    """Return the value that so many percent of the counted do not exceed."""
    left = -(-sum(found.values()) * percent // 100)  # rounded up
    for value in sorted(found):
        left -= found[value]
        if left <= 0:
            return value
    return 0


def simulation_as_json(result: Simulation) -> dict[str, Any]:
    """Return what --json prints."""
    return {
        "mails": result.mails, "identities": result.identities,
        "since": result.since, "refused": [
            {**offender._asdict(), "limit": offender.limit._asdict()}
            for offender in result.refused],
        "windows": [
            {"seconds": seconds, "p50": percentile(found, 50),
             "p90": percentile(found, 90), "p99": percentile(found, 99),
             "max": max(found), **({"quota": quota} if quota else {})}
            for (quota, seconds), found in sorted(result.peaks.items())]}


def show_simulation(result: Simulation, columns: int, lines: int,
                    ) -> Iterator[str]:
    """Yield lines that show the result: as many as fit, or all.

    columns, lines: the size of the terminal; lines 0: all.
    """
    if result.since is None:
        yield "no recorded mail can be judged"
        yield from result.notes
        return
    mails = sum(offender.refused for offender in result.refused)
    sum_up = "no mail would have been refused"
    if mails:
        sum_up = (f"{quantity(len(result.refused), 'identity')} would have"
                  f" had mail refused, {quantity(mails, 'mail')} in all")
    keys = f" and {quantity(result.keys, 'quota key')}" if result.keys else ""
    yield (f"{quantity(result.mails, 'mail')} of"
           f" {quantity(result.identities, 'identity')}{keys}"
           f" since {moment(result.since)[:-3]}")
    below = [sum_up, *(show_peaks(*key, found) for key, found
                       in sorted(result.peaks.items())), *result.notes]
    shown = result.refused
    if lines:
        taken = sum(-(-len(line) // columns) for line in below)
        shown = shown[:max(3, lines - taken - 4)]  # headings and prompt
    if shown:
        yield from align(list(show_offenders(shown)), columns)
    if len(shown) < len(result.refused):
        yield f"and {len(result.refused) - len(shown):,} more; see --json"
    yield from below


def show_offenders(offenders: Iterable[Offender],
                   ) -> Iterator[tuple[str, ...]]:
    """Yield the cells of a table of those who would have been refused."""
    rows = [("identity", "mails", "refused", "at most")]
    rows += [
        (printable(one.identity), f"{one.mails:,}", f"{one.refused:,}",
         f"{one.peak:,} in {span(one.limit.seconds, 'a ')}"
         f" (limit {one.limit.mails:,})") for one in offenders]
    widest = max(len(at_most) for *_, at_most in rows)
    for identity, mails, refused, at_most in rows:  # pad; last column left
        yield identity, f" {mails}", f" {refused}", f" {at_most:<{widest}}"


def show_peaks(quota: str, seconds: int, found: Counter[int]) -> str:
    """Return a line that shows how much is usual within a window."""
    whose = f"a key of quota {quota}" if quota else "an identity"
    return (f"busiest {span(seconds)} of {whose}:"
            f" median {percentile(found, 50):,},"
            f" 90% {percentile(found, 90):,},"
            f" 99% {percentile(found, 99):,}, most {max(found):,}")


def span(seconds: int, article: str = "") -> str:
    """Return a window in words, not rounded: "a minute", "2 hours"."""
    size, unit = next((size, unit) for size, unit in (
        (86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))
        if seconds % size == 0)
    if seconds == size:
        return f"{article}{unit}".replace("a hour", "an hour")
    return quantity(seconds // size, unit)


def quantity(count: int, noun: str) -> str:
    """Return a number with its noun: "1 mail", "2 identities"."""
    if count == 1:
        return f"1 {noun}"
    plural = noun[:-1] + "ies" if noun.endswith("ty") else noun + "s"
    return f"{count:,} {plural}"


# ---------------------------------------------------------------------------
# 13. Reports and alerts
#
# What is sent to people.  No answer to Postfix waits for it.  Modules that
# only this section needs are imported where they are used, because loading
# them would take a sixth of the startup time.
# ---------------------------------------------------------------------------

MAIL_PATIENCE = 30  # seconds to wait for each SMTP reply, or for a program
REPORT_LINES = 1000  # lines of a report: nobody reads more
ALERTS_AN_HOUR = 20
MAX_STREAKS = 10000  # remembered, one per identity and window, 300 bytes each


def send_reports(database: Database, settings: Settings) -> None:
    """Mail a report of the refusals that have not been reported yet.

    Raise CleanError if an address does not accept the report; all addresses
    then get the same refusals again with the next one.
    """
    if not settings.report_to:
        return
    untold = [row for row in database.read(read_refusals, "WHERE hits > told")
              if row.seconds in settings.reported_windows]
    refused = [row for row in untold
               if not rule_of(settings, row.identity).dry_run]
    if refused or not settings.report_only_if_needed:
        failed = send_mail(settings, settings.report_subject, report(refused))
        if failed:
            raise CleanError(
                f"the report was not accepted for {failures(failed)}; the next"
                " one repeats it to every address in report_to")
    for some in chunks(untold, 100):  # the daemon has to wait for each write
        database.transact(record_told, some)


def report(refusals: Sequence[Refusal]) -> str:
    """Return the text of a report, the most refusals first."""
    cells = [("identity", "limit", "refusals", "last", "client")]
    by_number = sorted(refusals, key=lambda row: (row.told - row.hits, row))
    for row in by_number[:REPORT_LINES]:
        cells.append((printable(row.identity), ratio(row),
                      str(row.hits - row.told), moment(row.last), row.client))
    lines = ["Mails refused since the last report:", "", *align(cells)]
    if len(by_number) > REPORT_LINES:
        lines.append(f"and {len(by_number) - REPORT_LINES} more:"
                     f" {PROGRAM} --status shows all")
    return "\n".join([*lines, ""])


def record_told(transaction: Transaction, rows: Sequence[Refusal]) -> None:
    """Record as reported the refusals that were read, not later ones."""
    for row in rows:
        transaction.later(
            "UPDATE mail_refused SET told = ? WHERE id = ? AND seconds = ?"
            " AND told < ?", row.hits, row.identity, row.seconds, row.hits)
    transaction.flush()


def import_old_refusals(transaction: Transaction, now: int) -> None:
    """Move the refusals that the original recorded into mail_refused."""
    if not columns_of(transaction, "limit_report"):
        return
    hits: Counter[tuple[str, int]] = Counter()
    for identity, window, hit in transaction.run(
            "SELECT id, delta, hit FROM limit_report").fetchall():
        hits[fold(identity), window] += hit or 0
    transaction.run("DELETE FROM limit_report")
    transaction.write(transaction.backend.add_refusals, [
        Refusal(*key, -1, hits[key], now, now, "") for key in sorted(hits)])


def send_mail(settings: Settings, subject: str, text: str) -> dict[str, str]:
    """Mail a text to all of report_to; return {address: why it failed}.

    The message is delivered to each address separately, because Postfix
    tells a policy service the recipient at DATA only if there is just one
    (SMTPD_POLICY_README), and is_own_report() has to see it.
    """
    import smtplib

    addresses = {fold(address): address for address in settings.report_to}
    try:
        message = compose(settings, subject, text)
        with contextlib.closing(smtplib.SMTP(
                *settings.smtp_server, timeout=MAIL_PATIENCE)) as smtp:
            start_tls_and_login(smtp, settings)
            reasons = {address: deliver(smtp, message, address)
                       for address in addresses.values()}
            with contextlib.suppress(OSError):  # the mail is delivered
                smtp.quit()
    except Exception as error:  # from the network, TLS or the login
        return dict.fromkeys(addresses.values(), smtp_reason(error))
    return {address: reason for address, reason in reasons.items() if reason}


def compose(settings: Settings, subject: str, text: str) -> EmailMessage:
    """Return a message to all of report_to."""
    from email.message import EmailMessage
    from email.utils import format_datetime, localtime, make_msgid

    host = socket.getfqdn()
    message = EmailMessage()
    message["From"] = settings.report_from or f"{PROGRAM}@{host}"
    message["To"] = ", ".join(settings.report_to)
    message["Subject"] = printable(subject)
    message["Date"] = format_datetime(localtime())
    message["Message-ID"] = make_msgid(domain=host)
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(text, cte="quoted-printable")
    return message


def deliver(smtp: smtplib.SMTP, message: EmailMessage, address: str) -> str:
    """Send a message to one address; return why that failed, or ""."""
    try:
        smtp.send_message(message, to_addrs=[address])
    except Exception as error:  # odd addresses raise many kinds
        return smtp_reason(error)
    return ""


def failures(failed: Mapping[str, str]) -> str:
    """Return in one line which deliveries failed, and why."""
    addresses: dict[str, list[str]] = {}
    for address, reason in failed.items():
        addresses.setdefault(reason, []).append(address)
    return "; ".join(f"{', '.join(some)}: {reason}"
                     for reason, some in addresses.items())


def start_tls_and_login(smtp: smtplib.SMTP, settings: Settings) -> None:
    """Encrypt and log in as set; send no password over a network in clear.

    Raise OSError or smtplib.SMTPException if that fails.
    """
    import ssl

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
        raise OSError("smtp_credentials are only sent encrypted; set"
                      " smtp_starttls: True")
    if settings.smtp_credentials:
        smtp.login(*settings.smtp_credentials)


def smtp_reason(error: Exception) -> str:
    """Return in one line why a mail was not accepted."""
    text: Any = getattr(error, "smtp_error", "") or str(error) or repr(error)
    recipients = getattr(error, "recipients", None)
    if recipients:  # SMTPRecipientsRefused has the reply for each
        [(_, text), *_] = recipients.values()
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    return printable(" ".join(text.split()))


@dataclass
class Streak:
    """Successive refusals of an identity by the limit of one window."""

    last: float  # when it was refused last
    attempts: int = 0  # refused since a whole window passed without any
    alerted: float | None = None  # when the last alert was sent
    since_alert: int = 0  # refusals since then


class Alert(NamedTuple):
    """What an alert says, and the settings by which it is sent."""

    settings: Settings
    facts: Mapping[str, str]
    is_outage: bool = False


class Alarm:
    """Sends alerts about refusals and outages from a separate thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Take the clock by which alerts per hour are counted."""
        self._clock = clock
        # Refusals may fill two thirds, so that there is room for outages.
        self._queue: queue.Queue[Alert] = queue.Queue(3 * ALERTS_AN_HOUR)
        self._lock = threading.Lock()
        self._streaks: OrderedDict[tuple[str, int], Streak] = OrderedDict()

    def refused(self, verdict: Verdict, client: str, settings: Settings,
                now: float) -> int:
        """Count a refused mail, and queue an alert if one is due.

        Return how many attempts were refused since a whole window passed
        without a refusal.  Mail over a limit with dry_run can cause an alert,
        but is not counted as an attempt.
        """
        attempts = 0
        for use in filter(None, (verdict.broken, *verdict.tried)):
            with self._lock:
                streak = self._count(use, now)
                if use is verdict.broken:
                    attempts = streak.attempts
                since_alert = streak.since_alert
                due = is_due(streak, use.limit.seconds, settings, now)
                if due:
                    streak.alerted, streak.since_alert = now, 0
            if due and self._queue.qsize() < 2 * ALERTS_AN_HOUR:
                self._put(Alert(settings, facts_of(
                    use, verdict, client, settings, now, since_alert)))
        return attempts

    def outage(self, error: Exception | None, settings: Settings) -> None:
        """Queue an alert about an outage; no error: it is over."""
        if settings.alert:
            state = (f"is unavailable: {error}" if error
                     else "is available again")
            notice = printable(f"the database {state}")
            self._put(Alert(settings, {
                "notice": notice, "host": socket.gethostname()}, True))

    def send(self) -> None:
        """Send queued alerts forever, at most ALERTS_AN_HOUR of each kind."""
        never = [-math.inf] * ALERTS_AN_HOUR
        refusals, outages = deque(never, len(never)), deque(never, len(never))
        silent = -math.inf  # when the notice of this limit was last sent
        while True:
            alert, now = self._queue.get(), self._clock()
            sent = outages if alert.is_outage else refusals
            if now >= sent[0] + 3600:
                sent.append(now)
                send_alert(alert.settings, alert.facts)
            elif now >= silent + 3600 and not alert.is_outage:
                silent = now
                send_alert(alert.settings, {
                    "notice": f"{ALERTS_AN_HOUR} alerts within an hour;"
                              " further refusals are only in the report",
                    "host": socket.gethostname()})

    def _count(self, use: Usage, now: float) -> Streak:
        """Count a refusal and return the streak that it belongs to."""
        window = use.limit.seconds
        key = use.claim.identity, window
        streak = self._streaks.setdefault(key, Streak(now))
        self._streaks.move_to_end(key)
        if abs(now - streak.last) >= window:  # the clock may be set back
            streak.attempts = 0
        streak.last = now
        streak.attempts += 1
        streak.since_alert += 1
        if len(self._streaks) > MAX_STREAKS:
            self._streaks.popitem(last=False)
        return streak

    def _put(self, alert: Alert) -> None:
        """Hand an alert to the thread that sends it."""
        with contextlib.suppress(queue.Full):  # the report will include it
            self._queue.put_nowait(alert)


def is_due(streak: Streak, window: int, settings: Settings, now: float,
           ) -> bool:
    """Say whether an alert is due: at most one per window."""
    named = settings.report_limits
    if not settings.alert or (named is not None and window not in named):
        return False
    return streak.alerted is None or abs(now - streak.alerted) >= window


def facts_of(use: Usage, verdict: Verdict, client: str, settings: Settings,
             now: float, since_alert: int) -> dict[str, str]:
    """Return what an alert says about a refusal, {name: text}."""
    claim, limit = use.claim, use.limit
    facts = {
        "identity": printable(claim.identity),
        "limit": limit_in_words(limit, claim.rule, settings.count_mode),
        "since": moment(now),
        "host": socket.gethostname(),
        "client_address": printable(client),
        "refusals_since_last_alert": str(since_alert)}
    if verdict.block is not None and verdict.block.reason:
        facts["blocked"] = describe_override(verdict.block)
    if use is not verdict.broken:
        facts["dry_run"] = "this limit is only tried; nothing was refused"
    if limit.mails > 0:
        facts["to_block_the_sender"] = block_command(use, verdict)
    return facts


def block_command(use: Usage, verdict: Verdict) -> str:
    """Return the command that blocks the sender of a mail."""
    senders = [usage.claim.identity for usage in verdict.usage
               if not usage.claim.rule.by]  # not everyone who shares a quota
    sender = printable(senders[0] if senders else use.claim.identity)
    separator = "=" if sender.startswith("-") else " "
    return f"{PROGRAM} --block{separator}{shlex.quote(sender)}"


def send_alert(settings: Settings, facts: Mapping[str, str]) -> None:
    """Run alert_command, or else mail report_to; log a failure."""
    about = facts.get("identity") or facts["notice"]
    subject = f"{PROGRAM} alert on {facts['host']}: {about}"
    text = "".join(f"{name}: {fact}\n" for name, fact in facts.items())
    failed = {}
    try:
        if settings.alert_command:
            run_program(settings.alert_command, facts)
        elif settings.report_to:
            failed = send_mail(settings, undecodable(subject), text)
    except Exception as error:  # the next alert may work
        failed = {settings.alert_command[0]: smtp_reason(error)}
    if failed:
        log.warning("alert not sent to %s", failures(failed), extra=SELDOM)


def run_program(command: Sequence[str], facts: Mapping[str, str],
                patience: float = MAIL_PATIENCE) -> None:
    """Run a program with facts in its environment.

    Kill it after patience seconds.  Raise OSError if it fails.
    """
    told = {f"POLICYD_{name.upper()}": fact for name, fact in facts.items()}
    with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, **told}) as child:
        try:
            code = child.wait(patience)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # also its children
            code = child.wait()
    if code:
        raise OSError(f"exit status {code}")


# ---------------------------------------------------------------------------
# 14. Status
#
# What people look up: usage per identity and the daemon's counters.
# ---------------------------------------------------------------------------

SURVEY_STEP = 200  # identities read per transaction: a few milliseconds
MAX_VALUES = 100  # different values shown of an identity, the latest
MAX_FULLEST = 100  # identities in --prometheus only because of their usage
RED, PLAIN_COLOUR = "\033[31m", "\033[0m"


class LimitUse(NamedTuple):
    """A limit, and what an identity has used of it."""

    mails: int
    seconds: int
    used: int
    room_at: int | None  # when a mail passes again; None: now or never
    refusals: int


class Status(NamedTuple):
    """What an identity has used, and how often it was refused."""

    identity: str
    last_mail: int | None  # None: no mail is recorded
    source: str  # where its limits come from, "" if it is not counted
    override: Override | None  # set by --limit or --block
    dry_run: bool  # whether the limits are only tried
    limits: tuple[LimitUse, ...]
    refused_by: tuple[Refusal, ...]
    values: tuple[tuple[str, int], ...] = ()  # (counted value, last seen)
    when: tuple[str, ...] = ()  # attributes in `when` that are not known

    @property
    def is_overridden(self) -> bool:
        """Say whether its limits were set by --limit or --block."""
        return self.override is not None

    @property
    def until(self) -> int | None:
        """Return when its override ends, None if it does not or is none."""
        return None if self.override is None else self.override.ends

    @property
    def refusals(self) -> int:
        """Return the number of refusals by all of its limits."""
        return sum(row.hits for row in self.refused_by)


class Judged(NamedTuple):
    """The rule and the limits that judge the mail of an identity."""

    rule: Rule | None  # None: its quota is no longer in the file
    limits: Limits
    source: str
    override: Override | None = None  # set by --limit or --block


def survey(transaction: Transaction, settings: Settings, now: int,
           *chosen: str, wanted: Callable[[str], bool] | None = None,
           ) -> list[Status]:
    """Return the status of the chosen identities, or of all that matter.

    wanted: says of an identity whether it matters; without it, those matter
    that have used anything, were refused or have an override.
    """
    surveyor = Surveyor(transaction, settings, now)
    if chosen:
        return [surveyor.read([name])[0]._replace(
            values=surveyor.read_values(name)) for name in chosen]
    statuses = []
    for names in surveyor.read_names():
        if wanted is not None:
            names = list(filter(wanted, names))
        statuses += [status for status in surveyor.read(names)
                     if wanted is not None or matters(status)]
    return statuses


def matters(status: Status) -> bool:
    """Say whether an identity belongs in the list of all."""
    return bool(status.is_overridden or status.refused_by
                or any(use.used for use in status.limits))


class Surveyor:
    """Reads the status of identities, some at a time."""

    def __init__(self, transaction: Transaction, settings: Settings,
                 now: int) -> None:
        """Look up which tables exist: the original has only mail_count."""
        self._transaction = transaction
        self._settings = settings
        self._now = now
        self._tables = [
            table for table in (
                "mail_count", "mail_value", "mail_refused", "mail_limit")
            if columns_of(transaction, table)]
        cost, columns = "1", columns_of(transaction, "mail_count")
        if "recipient_count" in columns:
            cost = "COALESCE(recipient_count, 1)"
        self._has_totals = "total" in columns
        self._mails = f"(SELECT id, date, {cost} AS cost FROM mail_count) AS m"
        self._values = ""
        if "mail_value" in self._tables:
            self._values = "(SELECT id, date, 1 AS cost FROM mail_value) AS v"
        self._overrides: Overrides = {}
        if "mail_limit" in self._tables:
            self._overrides = read_overrides(transaction, now)

    def read_names(self) -> Iterator[list[str]]:
        """Yield the names of all identities, some at a time, each once.

        Each step has a transaction of its own: while one reads, SQLite cannot
        reset its WAL (sqlite.org/wal.html), whose growth delays mail later.
        """
        seen: set[str] = set()
        for table in self._tables:
            names = [""]
            while names:
                names = [name for [name] in self._transaction.run(
                    f"SELECT DISTINCT id FROM {table} WHERE id > ?"
                    " ORDER BY id LIMIT ?", names[-1], SURVEY_STEP).fetchall()]
                yield [name for name in names if name not in seen]
                seen.update(names)
                self._start_anew()

    def read(self, names: Sequence[str]) -> list[Status]:
        """Return the status of some identities."""
        if not names:
            return []
        judged = {name: self._judge(name) for name in names}
        used, newest = self._read_used(judged)
        refused = self._read_refused(names)
        statuses = []
        for name, one in judged.items():
            rows = refused.get(name, ())
            uses = [self._use_of(name, one, limit, used.get(name, {}), rows)
                    for limit in one.limits]
            statuses.append(Status(
                identity=name, last_mail=newest.get(name), source=one.source,
                override=one.override, limits=tuple(uses), refused_by=rows,
                dry_run=one.rule is not None and one.rule.dry_run))
        return statuses

    def read_values(self, name: str) -> tuple[tuple[str, int], ...]:
        """Return the different values of an identity, the latest first."""
        if not self._values:
            return ()
        return tuple((value, int(date)) for value, date in
                     self._transaction.run(
                         "SELECT value, date FROM mail_value WHERE id = ?"
                         " ORDER BY date DESC, value LIMIT ?",
                         name, MAX_VALUES).fetchall())

    def _judge(self, name: str) -> Judged:
        """Return which limits apply to an identity and where they were set."""
        rule = judging_rule(self._settings, name)
        if name in self._overrides:
            override = self._overrides[name]
            return Judged(rule, override.limits, "--limit", override)
        if rule is None:
            return Judged(None, (), "")
        query = self._settings.sql_limits_by_id
        if query and not rule.by:
            queried = query_limits(self._transaction, query, name)
            if queried is not None:
                return Judged(rule, queried, "sql_limits_by_id")
        limits = limits_under(rule, *named_by(self._settings, rule, name))
        if rule.by:
            return Judged(rule, limits, "quotas")
        usual = limits is rule.limits
        return Judged(rule, limits, "limits" if usual else "limits_by_id")

    def _read_used(self, judged: Mapping[str, Judged],
                   ) -> tuple[dict[str, dict[int, int]], dict[str, int]]:
        """Return {identity: {window: used}} and {identity: last date}."""
        windows = sorted({limit.seconds for one in judged.values()
                          for limit in one.limits})
        sums = "".join(f", SUM(CASE WHEN date > {self._now - window}"
                       " THEN cost ELSE 0 END)" for window in windows)
        used: dict[str, dict[int, int]] = {}
        newest: dict[str, int] = {}
        for table in filter(None, (self._mails, self._values)):
            names = [name for name, one in judged.items()
                     if one.rule is None or table == self._table_of(one.rule)]
            if not names:
                continue
            for name, date, *spent in self._transaction.run(
                    f"SELECT id, MAX(date){sums} FROM {table}"
                    f" WHERE id IN ({placeholders(names)}) GROUP BY id",
                    *names).fetchall():
                newest[name] = max(int(date), newest.get(name, 0))
                used[name] = dict(zip(windows, map(int, spent)))
        return used, newest

    def _read_refused(self, names: Sequence[str],
                      ) -> dict[str, tuple[Refusal, ...]]:
        """Return the refusals of some identities."""
        if "mail_refused" not in self._tables:
            return {}
        rows = read_refusals(
            self._transaction, f"WHERE id IN ({placeholders(names)})"
            " ORDER BY id, seconds", *names)
        return {name: tuple(some) for name, some in itertools.groupby(
            rows, operator.attrgetter("identity"))}

    def _table_of(self, rule: Rule) -> str:
        """Return the subquery of what a rule counts."""
        counts_mails = rule.count in ("", "recipients", "mails", "bytes")
        return self._mails if counts_mails else self._values

    def _use_of(self, name: str, judged: Judged, limit: Limit,
                used: Mapping[int, int],
                refused: Sequence[Refusal]) -> LimitUse:
        """Return what an identity has used of a limit."""
        use = used.get(limit.seconds, 0)
        hits = sum(row.hits for row in refused if row.seconds == limit.seconds)
        room_at = None
        if judged.rule is not None and 0 < limit.mails <= use:
            table = self._table_of(judged.rule)
            room_at = self._room_at(table, name, limit, use)
        return LimitUse(*limit, use, room_at, hits)

    def _room_at(self, table: str, name: str, limit: Limit, used: int,
                 ) -> int | None:
        """Return when a mail for one recipient passes an exhausted limit.

        None: unknown, since the original's tables hold no totals.
        """
        over, since = used + 1 - limit.mails, self._now - limit.seconds
        if table == self._values:
            [date] = self._transaction.run(
                "SELECT date FROM mail_value WHERE id = ? AND date > ?"
                " ORDER BY date LIMIT 1 OFFSET ?",
                name, since, over - 1).fetchone() or [None]
        elif not self._has_totals:
            return None
        else:
            [total] = self._transaction.run(
                "SELECT total FROM mail_count WHERE id = ?"
                " ORDER BY date DESC, total DESC LIMIT 1", name).fetchone()
            date = None if total is None else find_last_to_leave(
                self._transaction, name, since, total - used + over)
        return None if date is None else int(date) + limit.seconds

    def _start_anew(self) -> None:
        """End the transaction and begin another."""
        self._transaction.run("COMMIT")
        time.sleep(0.002)  # let the daemon write
        begin = self._transaction.backend.begin_reading
        if begin:
            self._transaction.later(begin)


def placeholders(values: Sequence[object]) -> str:
    """Return as many SQL placeholders as there are values."""
    return ", ".join("?" * len(values))


def judging_rule(settings: Settings, identity: str) -> Rule | None:
    """Return the rule that judges what is recorded under an identity.

    None: it is the key of a quota that is no longer in the file.  A sender
    may look like such a key; with limit_by_sender, only the names of
    attributes are taken for a quota's.
    """
    rule = rule_of(settings, identity)
    prefix, equals, value = identity.partition("=")
    if rule.by or not equals or not prefix:
        return rule
    known = all(part in ATTRIBUTES or part in DERIVED
                for part in prefix.split("+"))
    if settings.limit_by_sender and (not known or prefix == "sender"):
        return rule
    is_name = re.fullmatch(r"[a-z][a-z0-9_.-]*", prefix) and "," not in value
    return None if known or is_name else rule


def related_keys(settings: Settings, name: str) -> dict[str, tuple[str, ...]]:
    """Return {key: unknown} for each key under which a name's mail counts.

    The keys are those of the claims that claims_of() makes, as far as they
    follow from the name.  unknown: the attributes in the quota's `when` that
    do not.
    """
    known = [{"sasl_username": name}]
    if "@" in name:  # with a login of this name, or without a login
        known = [{"sasl_username": name, "sender": name}, {"sender": name}]
    if name.startswith(SENDER_KEY) and both_count(settings):
        known = [{"sender": name.removeprefix(SENDER_KEY)}]
    if parse_address(name):
        known = [{"client_address": name}]
    found: dict[str, tuple[str, ...]] = {}
    for attributes in known:
        for claim, unknown in likely_claims(settings, attributes):
            found.setdefault(claim.identity, unknown)
    return found


def likely_claims(settings: Settings, known: Mapping[str, str],
                  ) -> Iterator[tuple[Claim, tuple[str, ...]]]:
    """Yield the claims of a mail of which only some attributes are known.

    With each come the attributes on which it depends that are unknown.
    """
    for claim in claims_of(mail_from(known), at_data(settings)):
        if not claim.rule.by:
            yield claim, ()
    for quota in settings.quotas:
        one, unknown = without_unknown(quota, known)
        request = mail_from(known, quota)
        for claim in claims_of(request, at_data(settings, one)):
            if claim.rule.by:
                yield claim, unknown


def at_data(settings: Settings, *quotas: Rule) -> Settings:
    """Return settings that count at DATA, with the quotas given, if any."""
    return replace(settings, count_mode=1, quotas=quotas or settings.quotas)


def without_unknown(quota: Rule, known: Mapping[str, str],
                    ) -> tuple[Rule, tuple[str, ...]]:
    """Return a quota without conditions on unknown attributes, and these."""
    kept, unknown = [], []
    for name, choice in quota.when:
        source = DERIVED.get(name, name)
        if source in (*known, "sasl_username", ""):  # unknown means no login
            kept.append((name, choice))
        else:
            unknown.append(name)
    return replace(quota, when=tuple(kept)), tuple(unknown)


def mail_from(known: Mapping[str, str], quota: Rule = Rule()) -> Request:
    """Return a request about a mail of which only some attributes are known.

    If the quota counts another attribute, that gets an arbitrary value.
    """
    attributes = {**known, "size": "1"}
    counted = DERIVED.get(quota.count, quota.count)
    if counted in ATTRIBUTES and counted not in known:
        is_address = counted == "client_address"
        attributes[counted] = "0.0.0.0" if is_address else "any@example"
    return Request(
        "DATA", "", "", known.get("sasl_username", ""),
        known.get("sender", ""), known.get("client_address", ""), 1,
        attributes)


def matcher_of(text: str) -> Callable[[str], bool] | None:
    """Return a test for identities that a pattern matches.

    None: the text is a name, not a pattern.
    """
    if not (text.startswith("@") or "/" in text and "=" not in text):
        return None
    try:
        patterns = as_patterns({text: True})
    except ValueError:
        return None
    if not text.startswith("@") and not patterns.networks:
        return None

    def fits(identity: str) -> bool:
        """Say whether an identity, or a value in a key, matches."""
        values = [identity]
        for value in identity.partition("=")[2].split("|"):
            values += [value, f"@{value}"]  # the value may be a domain
        return any(map(patterns.find, values))

    return fits


class Tally:
    """Publishes the daemon's counters: in the log and in a file.

    --prometheus reads the file, beside the pidfile.  So the counters can be
    read during an outage of the database, and no network protocol exposes
    them.
    """

    def __init__(self, pidfile: str, counts: Mapping[str, float],
                 clock: Callable[[], float] = time.monotonic) -> None:
        """Take the counters, which go on changing, and a monotonic clock."""
        self.path = pidfile + ".prom"
        self._counts = counts
        self._clock = clock
        self._last = dict(counts)  # at the start of this hour
        self._began = clock()  # the start of this hour

    def publish(self, asked: bool = False) -> None:
        """Write the file; log a summary every hour, or now if asked."""
        counts, path = dict(self._counts), self.path + ".new"
        lines = [line for name, value in counts.items()
                 for line in metric_lines(f"{name}_total", {"": value})]
        with contextlib.suppress(OSError):
            os.unlink(path)
        with contextlib.suppress(OSError):  # the daemon must go on
            with open(path, "x", encoding="utf-8") as file:  # follow no link
                file.write("\n".join([*lines, ""]))
            os.replace(path, self.path)
        past = self._clock() - self._began
        new = {name: counts[name] - self._last[name] for name in counts}
        if asked or (past >= 3600 and new["requests"]):
            seconds = new.pop("decision_seconds")
            decided = new["passed"] + new["refused"] + new["database_errors"]
            log.log(NOTICE, "in %d minutes: %s; %.1f ms per decision",
                    past / 60,
                    ", ".join(f"{new[name]} {name}" for name in new),
                    1000 * seconds / (decided or 1))
        if past >= 3600:
            self._last, self._began = counts, self._clock()


METRICS = {  # names without policyd_rate_limit_: HELP text of --prometheus
    "up": "Whether the daemon answers.",
    "requests_total": "Requests that Postfix has sent.",
    "passed_total": "Mails that were counted and let through.",
    "refused_total": "Mails that were refused.",
    "database_errors_total":
        "Mails given db_error_action while the database was unavailable.",
    "judged_in_memory_total":
        "Mails judged in memory while the database was unavailable.",
    "decision_seconds_total": "Seconds spent on decisions.",
    "used": "What an identity has used within the window, in seconds.",
    "limit": "What an identity may use within the window.",
    "refusals_total": "Recorded refusals by the limit of the window.",
    "limit_ends": "When --limit or --block ends, in seconds since the epoch.",
    "dry_run": "1 if the limits of an identity are only tried (dry_run).",
}


def metric_lines(metric: str, values: Mapping[str, object]) -> Iterator[str]:
    """Yield a metric's lines: HELP, TYPE and a value for each label set."""
    name = f"policyd_rate_limit_{metric}"
    kind = "counter" if metric.endswith("_total") else "gauge"
    yield f"# HELP {name} {METRICS[metric]}"
    yield f"# TYPE {name} {kind}"
    for labels, value in values.items():
        yield f"{name}{labels} {value}"


def read_counters(pidfile: str) -> list[str]:
    """Return the lines that a running daemon wrote; none if none runs."""
    try:
        with open(pidfile + ".prom", encoding="utf-8") as file:
            is_fresh = time.time() < os.fstat(file.fileno()).st_mtime + 60
            return file.read().splitlines() if is_fresh else []
    except (OSError, ValueError) as error:
        if not isinstance(error, FileNotFoundError):
            log.warning("cannot read the daemon's counters: %s", error)
        return []


def show_metrics(database: Database, settings: Settings, answered: bool,
                 ) -> Iterator[str]:
    """Yield the lines of --prometheus: the daemon's, then the identities'.

    answered: whether the daemon has just answered a request.
    """
    yield from metric_lines("up", {"": int(answered)})
    yield from read_counters(settings.pidfile)
    now, statuses = int(time.time()), []
    try:
        statuses = database.read(survey, settings, now)
    except LedgerError as error:
        log.warning("printing only the daemon's counters: %s", error)
    for metric, values in measure(most_urgent(statuses, now)).items():
        yield from metric_lines(metric, values)


def most_urgent(statuses: Sequence[Status], now: int) -> list[Status]:
    """Return those refused or overridden, and the fullest of the others."""
    noted = [status for status in statuses
             if status.refused_by or status.is_overridden]
    others = [status for status in statuses
              if not status.refused_by and not status.is_overridden]
    others.sort(key=lambda status: urgency(status, now), reverse=True)
    return noted + others[:MAX_FULLEST]


def measure(statuses: Sequence[Status]) -> dict[str, dict[str, object]]:
    """Return {metric: {labels: value}} for the metrics of identities."""
    used: dict[str, object] = {}
    limits: dict[str, object] = {}
    refusals: dict[str, object] = {}
    ends: dict[str, object] = {}
    dry_run: dict[str, object] = {}
    for status in statuses:
        for use in sorted(status.limits, reverse=True):  # narrowest last
            labels = labels_of(status, use.seconds)
            used[labels], limits[labels] = use.used, use.mails
        for row in status.refused_by:
            refusals[labels_of(status, row.seconds)] = row.hits
        if status.is_overridden:
            forever = status.until is None
            ends[labels_of(status)] = "+Inf" if forever else status.until
        if status.dry_run:
            dry_run[labels_of(status)] = 1
    return {"used": used, "limit": limits, "refusals_total": refusals,
            "limit_ends": ends, "dry_run": dry_run}


def labels_of(status: Status, window: int | None = None) -> str:
    """Return the labels of an identity's metric, with its window if any."""
    name = re.sub(r'(["\\])', r"\\\1", printable(status.identity))
    seconds = "" if window is None else f',window="{window}"'
    return f'{{identity="{name}"{seconds}}}'


def urgency(status: Status, now: int) -> tuple[float, ...]:
    """Return a sort key: refused now, then overridden, then the fullest."""
    refused = max((row.hits for row in status.refused_by
                   if row.last + row.seconds > now), default=0)
    fullest = max([(use.used / (use.mails or 1), use.used)
                   for use in status.limits], default=(0, 0))
    return refused, status.is_overridden, *fullest


def as_json(status: Status) -> dict[str, object]:
    """Return what --json shows about an identity."""
    return {
        "identity": status.identity, "last_mail": status.last_mail,
        "source": status.source or None, "until": status.until,
        "since": status.override and (status.override.made or None),
        "reason": status.override and (status.override.reason or None),
        "dry_run": status.dry_run,
        "limits": [use._asdict() for use in status.limits],
        "refused_by": [
            {"mails": None if row.mails < 0 else row.mails,
             "seconds": row.seconds, "refusals": row.hits,
             "first": row.first, "last": row.last, "client": row.client}
            for row in status.refused_by],
        "values": [{"value": value, "last": date}
                   for value, date in status.values],
        "when": status.when}


def show_most(statuses: Sequence[Status], now: int, colour: bool,
              ) -> Iterator[str]:
    """Yield a table of the first identities: as many as fit, or all."""
    columns, lines = shutil.get_terminal_size(
        (80 if sys.stdout.isatty() else 999, 0))
    rows: list[tuple[str, ...]] = [
        ("identity", "", "", "used", "refusals", "last", "room", "until")]
    left = len(statuses)
    for status in statuses:
        more = list(show_rows(status, now, colour))
        if lines and len(rows) + len(more) > lines - 2:  # "and ...", prompt
            break
        rows += more
        left -= 1
    yield from align(rows, columns or 80)
    if left:
        yield f"and {left} more: --status ID shows one, --json all"


def show_rows(status: Status, now: int, colour: bool,
              ) -> Iterator[tuple[str, ...]]:
    """Yield the rows of an identity; the first one has its refusals."""
    last = max((row.last for row in status.refused_by), default=None)
    first = [str(status.refusals or ""), short(last, now)]
    until = "dry_run" if status.dry_run else ""
    if status.is_overridden:
        until = short(status.until, now) or "permanent"
    name = printable(status.identity)
    if not status.limits:
        yield (name, "", "", "no limits", *first, "", until)
    for use in status.limits:
        yield (name, *show_use(use, colour), *first,
               short(use.room_at, now), until)
        name, first, until = "", ["", ""], ""


def show_identity(statuses: Sequence[Status],
                  origins: Mapping[tuple[str, ...], str], colour: bool,
                  ) -> Iterator[str]:
    """Yield the lines that show all about an identity.

    The first status is its own; the others are those of quotas that also
    judge its mail.  origins: where the file sets each setting.
    """
    last = max((row for status in statuses for row in status.refused_by),
               key=operator.attrgetter("last"), default=None)
    for status in statuses:
        if status is not statuses[0]:
            yield ""
        yield printable(status.identity)
        at = moment(status.last_mail) if status.last_mail else "none"
        yield f"last mail: {at}"
        if status is statuses[0] and last is not None and len(statuses) > 1:
            key = printable(last.identity)
            yield (f"last refusal: {moment(last.last)} by {key} {ratio(last)},"
                   f" client {last.client or 'unknown'}")
        yield from show_one(status, origins, colour)


def show_one(status: Status, origins: Mapping[tuple[str, ...], str],
             colour: bool) -> Iterator[str]:
    """Yield the lines with the limits, values and refusals of one status."""
    if status.source:
        tried = ", only tried" if status.dry_run else ""
        when = ""
        if status.when:
            named = " and ".join(status.when)
            when = f", if the mail's {named} matches `when`"
        yield (f"limits, from {status.source} ({origin_of(status, origins)})"
               f"{tried}{when}:")
    else:
        yield "limits: none; the configuration counts no mail of this name"
    if status.source and not status.limits:
        yield "  no limits"
    for use in status.limits:
        span, bar, used = show_use(use, colour)
        room = f"room at {moment(use.room_at)}" if use.room_at else ""
        yield f"  {span:>4} {bar} {used:<11} {room}".rstrip()
    if status.values:
        yield from align([("value", "last seen"), *(
            (printable(value), moment(date))
            for value, date in status.values)])
    if status.refused_by:
        yield from align([("refusals", "by", "since", "last", "client"), *(
            (str(row.hits), ratio(row), moment(row.first), moment(row.last),
             row.client) for row in status.refused_by)])


def origin_of(status: Status, origins: Mapping[tuple[str, ...], str]) -> str:
    """Return where limits were set: in which line, or by which command."""
    if status.override is not None:
        return describe_override(status.override)
    found = [names for names in origins if names[:1] == (status.source,)
             and fold(names[-1]) in (status.source, status.identity)]
    return origins[max(found, key=len)] if found else "the default"


def show_use(use: LimitUse, colour: bool) -> tuple[str, str, str]:
    """Return a limit's window, a bar of its usage, and "used/mails"."""
    filled = min(10, math.ceil(10 * use.used / max(use.mails, 1)))
    bar = f"[{'#' * filled:.<10}]"
    size, unit = next((size, unit) for size, unit in (
        (86400, "d"), (3600, "h"), (60, "m"), (1, "s"))
        if use.seconds % size == 0)
    figures = f"{use.used}/{use.mails}"
    if use.mails == 0:
        filled, bar, figures = 10, f"[{'#' * 10}]", "blocked"
    if colour and filled == 10:
        bar = f"{RED}{bar}{PLAIN_COLOUR}"
    return f"{use.seconds // size}{unit}", bar, figures


def short(date: int | None, now: int) -> str:
    """Return a date for a table: the time if it is today, else the day."""
    if not date:
        return ""
    day, today = time.localtime(date), time.localtime(now)
    return time.strftime("%H:%M" if day[:3] == today[:3] else "%Y-%m-%d", day)


# ---------------------------------------------------------------------------
# 15. Configuration file
#
# Reads the YAML that ordinary configuration files contain, or the assignments
# of an old .conf file; then applies each -o, then the checks of the Settings
# table.
# ---------------------------------------------------------------------------

CONFIG_FILES = (
    "~/.config/policyd-rate-limit.conf", "~/.config/policyd-rate-limit.yaml",
    "/etc/policyd-rate-limit.conf", "/etc/policyd-rate-limit.yaml")
MAX_FILE = 2**26  # bytes; a file with a million limits_by_id has 2**25
SECRET = re.compile("(?i)pass|credential")  # names whose values are secret
Lines = dict[Names, int]  # the line of a setting, or of an entry in one


class Config(NamedTuple):
    """A configuration before its values are checked."""

    path: str | None
    values: dict[str, Any]
    places: dict[Names, str]  # "file:line", or the option

    def place(self, *names: str) -> str:
        """Return where a setting, or an entry in it, was set."""
        while names and names not in self.places:
            names = names[:-1]
        return self.places.get(names) or self.path or "the defaults"


class MissingFile(ConfigError):
    """No configuration file was found."""


def read_config(path: str | None) -> Config:
    """Read a configuration file; if path is None, the first one found.

    Raise MissingFile or ConfigError.
    """
    path, text = read_first([path] if path else [
        os.path.expanduser(name) for name in CONFIG_FILES])
    parse = read_conf if path.endswith(".conf") else read_yaml
    values, lines = parse(text, path)
    if "limited_netword" in values:  # a misspelling of the original
        values.setdefault("limited_networks", values.pop("limited_netword"))
        lines.setdefault(("limited_networks",), lines["limited_netword",])
    config = Config(path, values, {
        names: f"{path}:{line}" for names, line in lines.items()})
    known = default_values()
    for name in map(str, values):  # old files have old names: only warn
        if name not in known and name != "config_file":
            log.warning("%s: %s: no such setting%s", config.place(name), name,
                        suggest(name, known))
    return config


def read_first(paths: Sequence[str]) -> tuple[str, str]:
    """Return the first path whose file can be read, and its text."""
    for path in paths:
        try:
            return path, read_file(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            why = f"{path}: cannot be read: {error}"
        except ConfigError as error:
            why = str(error)
        if len(paths) == 1:
            raise ConfigError(why)
        log.warning("skipped: %s", why)
    raise MissingFile(
        f"no configuration file found; looked for {', '.join(paths)}")


def read_file(path: str) -> str:
    """Return the text of a file, without waiting for a FIFO's writer."""
    with open(path, "rb", opener=open_at_once) as file:
        is_fifo = stat.S_ISFIFO(os.fstat(file.fileno()).st_mode)
        if is_fifo and not path.startswith(("/dev/fd/", "/dev/stdin")):
            raise ConfigError(f"{path}: cannot be read: it is a FIFO; write"
                              " the configuration to a file")
        os.set_blocking(file.fileno(), True)  # for a pipe from a shell
        content = bytearray()
        while len(content) <= MAX_FILE and (more := file.read(65536)):
            content += more
    if is_fifo and not content:  # on reload the pipe has already been read
        raise ConfigError(f"{path}: cannot be read: the pipe is empty")
    if len(content) > MAX_FILE:
        raise ConfigError(f"{path}: cannot be read: it is larger than"
                          f" {MAX_FILE} bytes")
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: byte 0x{content[error.start]:02X} is not UTF-8;"
            " convert the file, for example with iconv -f latin1 -t utf-8"
            ) from None


def open_at_once(path: str, flags: int) -> int:
    """Open a file; return at once even if it is a FIFO without a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def read_yaml(text: str, path: str) -> tuple[dict[str, Any], Lines]:
    """Read YAML; use PyYAML, if installed, for what our parser refuses."""
    try:
        values, lines = parse_with_either(text)
        if not isinstance(values, (dict, type(None))):
            raise YamlError(
                f"found {show(values)}, expected lines NAME: VALUE", 1)
    except YamlError as error:
        error = find_assignment(text) or error
        raise ConfigError(f"{path}:{error.line}: {error}") from None
    return values or {}, lines


def parse_with_either(text: str) -> tuple[object, Lines]:
    """Parse YAML with our parser, else with PyYAML, or raise YamlError."""
    try:
        return parse_yaml(text)
    except YamlError as refused:
        try:
            return parse_with_pyyaml(text)
        except YamlError:
            raise
        except Exception:  # our own error names the line, too
            raise refused from None


def find_assignment(text: str) -> YamlError | None:
    """Return an error for the first line such as "limits = []", or None."""
    found = re.search(rf"^[ \t]*({'|'.join(default_values())})[ \t]*=", text,
                      re.MULTILINE)
    if not found:
        return None
    return YamlError(f"{found[1]}: write \"{found[1]}: VALUE\" instead of"
                     f" \"{found[1]} = VALUE\"",
                     text.count("\n", 0, found.start(1)) + 1)


def parse_with_pyyaml(text: str) -> tuple[object, Lines]:
    """Do the same as parse_yaml(); raise any kind of exception."""
    import yaml
    loader: Any = yaml.SafeLoader(text)
    loader.yaml_implicit_resolvers = {
        **loader.yaml_implicit_resolvers,
        **{first: [("tag:yaml.org,2002:str", YAML_PLAIN),
                   *loader.yaml_implicit_resolvers[first]]
           for first in "-+0123456789"}}
    root, lines = loader.get_single_node(), Lines()
    nodes: list[tuple[Names, Any]] = [((), root)]
    seen: set[int] = set()  # nodes; aliases could repeat them endlessly
    for names, node in nodes:  # this list grows meanwhile
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            nodes += pyyaml_entries(loader, node, names, lines)
        elif isinstance(node, yaml.SequenceNode):
            nodes += [((*names, str(place)), item)
                      for place, item in enumerate(node.value)]
    return root and loader.construct_document(root), lines


def pyyaml_entries(loader: Any, node: Any, names: Names, lines: Lines,
                   ) -> Iterator[tuple[Names, Any]]:
    """Yield the names and values of a mapping; record their lines."""
    keys: dict[Any, int] = {}
    for key, value in node.value:
        found = key.value
        if key.tag != "tag:yaml.org,2002:merge":  # <<
            found = loader.construct_object(key, deep=True)
        place = (*names, str(found))
        record_line(lines, place, key.start_mark.line + 1, found, keys)
        yield place, value


def record_line(lines: Lines, names: Names, line: int, key: Any,
                keys: dict[Any, int]) -> None:
    """Record a key's line; raise YamlError if the key is there already.

    keys: the earlier keys of its mapping with their lines; 1 equals 1.0.
    """
    before = keys.get(key) or lines.get(names)
    if before:
        raise YamlError(
            f"{names[-1]} is given twice, first in line {before}", line)
    lines[names] = keys[key] = line


def read_conf(text: str, path: str) -> tuple[dict[str, Any], Lines]:
    """Read the assignments of an old .conf file without running its Python."""
    log.warning("%s: this format is obsolete; write YAML", path)
    text = re.sub("\r\n?", "\n", text)  # count lines as Python does
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
        except Exception:  # it may be any Python statement
            shown = text.split("\n")[node.lineno - 1].strip()[:60]
            if SECRET.search(shown):
                shown = shown.partition("=")[0]
            log.warning("%s:%d: skipped: it is not NAME = VALUE: %s",
                        path, node.lineno, shown)
    return values, lines


ARITHMETIC: Mapping[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv,
    ast.USub: operator.neg}


def evaluate(node: Any, known: Mapping[str, Any]) -> Any:
    """Return the value of a literal, a known name, or arithmetic.

    Raise any kind of exception for other expressions.
    """
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return known[node.id]
    if isinstance(node, ast.Dict):
        return {evaluate(key, known): evaluate(value, known)
                for key, value in zip(node.keys, node.values)}
    parts = [evaluate(part, known) for part in ast.iter_child_nodes(node)
             if isinstance(part, ast.expr)]
    if isinstance(node, ast.List):
        return parts
    if isinstance(node, ast.Tuple):
        return tuple(parts)
    for part in parts:  # a text times a number could fill the memory
        if not isinstance(part, (int, float)) or abs(part) >= 2**63:
            raise ValueError
    return ARITHMETIC[type(node.op)](*parts)


def apply_option(config: Config, text: str) -> None:
    """Apply -o NAME=VALUE to a configuration; the value is YAML.

    Raise ConfigError if it cannot be applied.
    """
    name, equals, value = text.partition("=")
    top, known = name.split(".")[0], default_values()
    is_secret = bool(SECRET.search(name)) or top in secret_settings()
    place = f"-o {name}" if is_secret else f"-o {text}"
    if not equals:
        raise ConfigError(f"{place}: expected NAME=VALUE")
    if top not in known:
        raise ConfigError(
            f"{place}: {top}: no such setting{suggest(top, known)}")
    try:
        parsed, _ = parse_yaml(value)
    except YamlError as error:
        why = "the value is not YAML" if is_secret else str(error)
        raise ConfigError(f"{place}: {why}") from None
    if config.values.get(top) is None:
        config.values[top] = known[top]
    mapping, key = descend(config.values, name)
    if mapping is config.values and key != top:
        raise ConfigError(f"{place}: {top} has no named entries")
    mapping[key] = parsed
    changed = (top,) if key == top else (top, key)
    for names in config.places:
        if names[:len(changed)] == changed:
            config.places[names] = place
    config.places[top,] = config.places[changed] = place


def descend(values: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
    """Return the mapping, and the key in it, that a dotted name means."""
    head, _, rest = name.partition(".")
    while name not in values and isinstance(values.get(head), dict):
        values, name = values[head], rest
        head, _, rest = name.partition(".")
    return values, name


def default_values() -> dict[str, Any]:
    """Return the defaults of all settings, as a file would write them."""
    return {entry.name: copy.copy(entry.metadata["default"])
            for entry in fields(Settings)}


def secret_settings() -> list[str]:
    """Return the names of the settings that may hold a password."""
    return [entry.name for entry in fields(Settings)
            if entry.metadata["secret"]]


def check_settings(config: Config) -> Settings:
    """Return the checked settings.

    Raise ConfigError, or SocketMalformed for SOCKET, naming the place.
    """
    values, checked = mend_values(config), {}
    for entry in fields(Settings):
        value, known = values.get(entry.name), entry.metadata
        if value is None:
            continue  # left out or left empty: the default applies
        try:
            checked[entry.name] = check_entry(
                known["check"], value, entry.name, secret=known["secret"])
        except Wrong as error:
            place, *others = [config.place(*names) for names in error.places]
            also = "".join(f" ({other})" for other in others)
            raise known["error"](f"{place}: {error.why}{also}") from None
    return Settings(**checked)


def mend_values(config: Config) -> dict[str, Any]:
    """Return the values; correct those that only 1.x accepted."""
    values = dict(config.values)
    for name, mend in MENDS.items():
        if name in values:
            values[name] = mend_entry(config, mend, values[name], name)
    if isinstance(values.get("limits_by_id"), dict):
        values["limits_by_id"] = {
            key: mend_entry(config, mend_limits, limits,
                            "limits_by_id", str(key))
            for key, limits in values["limits_by_id"].items()}
    for name in values:
        if not is_boolean(name):
            continue
        values[name] = mend_entry(config, mend_bool, values[name], name)
        if values[name] is None:
            values[name] = False
            log.warning("%s: %s: left empty, taken as False; write False or"
                        " True", config.place(name), name)
    return values


def is_boolean(name: object) -> bool:
    """Say whether this is the name of a setting that is True or False."""
    return any(entry.name == name and entry.metadata["check"] is as_bool
               for entry in fields(Settings))


def mend_entry(config: Config, mend: Callable[[Any], object], value: object,
               *names: str) -> object:
    """Return a value as mend() corrects it; warn if that changes it."""
    mended = mend(value)
    if mended is not value:
        log.warning("%s: %s: found %s, taken as %s; write it like that",
                    config.place(*names), ": ".join(names), show(value),
                    show(mended))
    return mended


YAML_DEPTH = 50  # levels of nesting
YAML_DASH = ("- ", "-\t", "-\n")  # start an item
YAML_KEY = 1024  # characters in a key (YAML 1.2, implicit keys)
YAML_WORDS = {"yes": True, "true": True, "on": True, "no": False,
              "false": False, "off": False, "null": None, "~": None}
# Beside each pattern: an example that it matches, and one that it does not.
YAML_FLOAT = re.compile(r"[-+]?[0-9]{1,15}\.[0-9]{0,15}")  # "1.5", not "1e5"
YAML_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,17})")  # "-12", not "1_0"
YAML_HUGE = re.compile(  # "1000000000000000000", not "1"
    r"[-+]?[1-9][0-9]{18,}")
# Read as text: a login 0123 stays as it is, and 1:30 does not become 90.
YAML_PLAIN = re.compile(  # "0666", not "0"
    r"0[0-9]+\Z|[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?\Z")
YAML_ODD = re.compile(r"""  # "1_0", not "1.2.3": parsers disagree on these
    [-+]? \.?[0-9][0-9_]* (?: \.[0-9_]* )? (?: [eE][-+]?[0-9]+ )?  # 1_0 1e5
  | [-+]? (?: 0[bx][0-9a-fA-F_]+ | \.(?i:inf|nan) )  # 0x1F .inf
  | [0-9]{4} - [0-9]{1,2} - [0-9]{1,2} (?: [Tt\ ].* )?  # 2024-12-31
  | << | =
""", re.VERBOSE)
# Control characters, surrogates, unusual line breaks, and document markers;
# one --- at the start and one ... at the end are removed before.
YAML_BAD = re.compile(  # "\a", not "a"
    r"[^\t\n -~\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
    r"|[\u2028\u2029\ufeff]|^(?:---|\.\.\.)(?=[ \t\n])", re.MULTILINE)
YAML_START = re.compile(  # "# a\n---\n", not "a\n---\n"
    r"\A(?P<before>(?: *(?:#.*)?\n)*)---(?: +#.*| *)\n")
YAML_END = re.compile(  # "...\n# a\n", not "...\na\n"
    r"^\.\.\.(?: +#.*| *)\n(?: *(?:#.*)?\n)*\Z", re.MULTILINE)
# The gap before the next token, and a gap that includes an end of line.
YAML_GAP = re.compile(r"(?: *(?:#.*)?\n)* *")  # " # a\n ", not "a"
YAML_EOL = re.compile(r"(?: *(?:#.*)?\n)+ *")  # " # a\n ", not " "
YAML_ESCAPE = re.compile(  # "\\x41", not "A": also spaces and line ends
    r"\\(?:(?P<code>x..|u....)|\n[ \t]*|(?P<sign>.))"
    r"|[ \t]*\n(?P<blank>(?:[ \t]*\n)*)[ \t]*|[ \t]+")


@functools.cache  # "it's\n  a:b", not "a: b"
def text_pattern(flow: bool, indent: int) -> re.Pattern[str]:
    """Return the pattern of a scalar, quoted or plain, and a key's colon.

    flow: the scalar is inside brackets, where more characters end it.
    indent: its continuation lines must be indented by more spaces than this.
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
    """A document cannot be read: why, and on which line."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


def parse_yaml(text: str) -> tuple[object, Lines]:
    """Return a document's value, and the line of each key by its path.

    Raise YamlError.
    """
    reader = YamlReader(text)
    value = reader.read(nest=True) if reader.column() >= 0 else None
    if reader.column() >= 0:
        reader.refuse("wrong indentation, or several lines of text:")
    return value, reader.lines


def unescape(found: re.Match[str]) -> str:
    """Return what a match of YAML_ESCAPE means: folds lines, keeps spaces."""
    sign, code = found["sign"], found["code"]
    if sign or code:
        return (chr(int(code[1:], 16)) if code else
                {"n": "\n", "t": "\t"}.get(sign, sign))
    if found["blank"] is None:
        return "" if "\n" in found[0] else found[0]
    return "\n" * found["blank"].count("\n") or " "


class YamlReader:
    """Parses a document; each method continues at the current position."""

    def __init__(self, text: str) -> None:
        """Remove --- and ..., check the characters, skip to the start."""
        text = text.removeprefix("\ufeff").replace("\r\n", "\n")
        text = YAML_START.sub(r"\g<before>\n", text.rstrip("\n") + "\n")
        self.text = YAML_END.sub("\n", text)
        self.pos, self.line = 0, 1
        self.indent = -1  # the column of the enclosing keys or dashes
        self.names: list[str] = []  # the path of keys to what is being read
        self.lines: Lines = {}
        bad = YAML_BAD.search(self.text)
        if bad:
            line = self.text.count("\n", 0, bad.start()) + 1
            raise YamlError(f"{ascii(bad[0])} is not allowed here", line)
        self.skip(YAML_GAP)

    def skip(self, gap: re.Pattern[str]) -> None:
        """Skip spaces, comments and line ends; refuse anything else."""
        found = gap.match(self.text, self.pos)
        if not found:
            self.refuse("cannot read this (no quotes?):")
        self.line += found[0].count("\n")
        self.pos = found.end()

    def column(self) -> int:
        """Return the current column, or -1 at the end of the text."""
        start = self.text.rfind("\n", 0, self.pos) + 1
        return self.pos - start if self.pos < len(self.text) else -1

    def at(self, *signs: str) -> bool:
        """Say whether one of the signs comes next."""
        return self.text.startswith(signs, self.pos)

    def at_text(self, flow: bool) -> re.Match[str] | None:
        """Match the text that comes next and the colon after it."""
        return text_pattern(flow, self.indent).match(self.text, self.pos)

    def read(self, flow: bool = False, nest: bool = False) -> Any:
        """Read a value; nest: it may be a block of several lines."""
        if len(self.names) == YAML_DEPTH:
            self.refuse(f"more than {YAML_DEPTH} levels of nesting:")
        text = self.at_text(flow)
        if nest and (self.at(*YAML_DASH) or text and text["colon"]):
            return self.read_block()
        if self.at("[", "{"):
            value = self.read_flow()
        elif text and not text["colon"]:
            value = self.read_text(text["text"])
            self.skip(text.re)  # skip this text
        else:
            self.refuse("put quotes around")
        if not flow:
            self.skip(YAML_EOL)
        return value

    def read_block(self) -> Any:
        """Read the lines that start with a dash, or a key, in this column."""
        found: dict[Any, Any] = {}  # the keys of a list are its indices
        keys: dict[Any, int] = {}  # the line of each key
        column, dash = self.column(), self.at(*YAML_DASH)
        around, self.indent = self.indent, column
        while self.column() == column and self.at(*YAML_DASH) == dash:
            key = len(found) if dash else self.read_key(False, keys)
            self.names.append(str(key))
            self.pos += 1  # skip the dash or colon
            line = self.line
            self.skip(YAML_GAP)
            below = self.line > line
            least = column + 1  # the leftmost column of a value below
            if not dash and self.at(*YAML_DASH):
                least = column  # a list below a key need not be indented
            empty = below and self.column() < least
            found[key] = None if empty else self.read(nest=dash or below)
            self.names.pop()
        self.indent = around
        return list(found.values()) if dash else found

    def read_flow(self) -> Any:
        """Read [a, b] or {a: b, c: d}, on one line or more."""
        found: dict[Any, Any] = {}  # the keys of a list are its indices
        keys: dict[Any, int] = {}  # the line of each key
        close, more = "]" if self.at("[") else "}", True
        while more:
            self.pos += 1  # skip the bracket or comma
            self.skip(YAML_GAP)
            if self.at(close):
                break
            key, empty = len(found), False
            if close == "}":
                key = self.read_key(True, keys)
                self.pos += 1
                self.skip(YAML_GAP)
                empty = self.at(",", "}")
            self.names.append(str(key))
            found[key] = None if empty else self.read(flow=True)
            self.names.pop()
            self.skip(YAML_GAP)
            more = self.at(",")
        if not self.at(close):
            self.refuse(f"missing , or {close} before")
        self.pos += 1
        return list(found.values()) if close == "]" else found

    def read_key(self, flow: bool, keys: dict[Any, int]) -> Any:
        """Read a key, up to its colon; keys: the earlier ones, by line."""
        found = self.at_text(flow)
        if (not found or not found["colon"] or "\n" in found[0]
                or len(found[0]) > YAML_KEY + 1):
            self.refuse("not `key: value` (no quotes?):")
        if found["text"].endswith(":") and not found["text"].endswith("::"):
            self.refuse("put quotes around")  # as in `- fe80::`
        key = self.read_text(found["text"])
        record_line(self.lines, (*self.names, str(key)), self.line, key, keys)
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
        if YAML_HUGE.fullmatch(text):
            self.refuse("this number is too large:")
        if YAML_ODD.fullmatch(text) and not YAML_PLAIN.fullmatch(text):
            self.refuse("put quotes around")
        return text

    def refuse(self, why: str) -> NoReturn:
        """Raise YamlError at this position, for this or a better reason."""
        rest = self.text[self.pos:self.pos + 60].split("\n")[0] or "the end"
        if any(map(SECRET.search, self.names)):
            rest = f"the value of {self.names[-1]}"
        if self.at("\t"):
            why = "write spaces instead of a tab:"
        elif self.at("'", '"') and not self.at_text(flow=False):
            why = "close the quotes on the same line, write \\ as \\\\:"
        raise YamlError(f"{why} {rest}",
                        min(self.line, self.text.count("\n")))


# ---------------------------------------------------------------------------
# 16. Process
#
# What the daemon does as root before it drops privileges; the pidfile;
# signals; systemd.
# ---------------------------------------------------------------------------

CLEAN_PAUSE = 10  # seconds between two steps of the daemon's cleaning
# What a reload cannot change, since it is used only at startup.
FIXED = ("user", "group", "pidfile", "SOCKET", "socket_permission", "backend",
         "sqlite_config", "mysql_config", "pgsql_config", "db_timeout")
COLLECT_PAUSE = 3600  # seconds between full garbage collections; 50 ms each
OLDEST_GENERATION = 2  # of the garbage collector (gc): a full collection
STATUS_PAUSE = 10  # seconds between two lines for systemctl status
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
Owner = Optional[pwd.struct_passwd]  # the user that root becomes; None: none


class Folder(NamedTuple):
    """How to create a folder that the daemon needs."""

    mode: int
    for_postfix: bool = False  # give it to group postfix, if there is one


def find_owner(settings: Settings, standalone: str | None) -> Owner:
    """Return the user that root becomes, with the group of the settings.

    None: keep the current user.  Raise UnknownUser, or PolicydError for
    unsafe links (see refuse_planted_links).
    """
    if os.geteuid() != 0:
        return None
    if standalone:
        refuse_planted_links(settings)
        return None
    try:
        user = pwd.getpwnam(settings.user)
        group = grp.getgrnam(settings.group)
    except KeyError:
        raise UnknownUser(
            f"no user {settings.user} or no group {settings.group};"
            f" create them: adduser --system --group --home /run/{PROGRAM}"
            f" --no-create-home {settings.user}") from None
    return pwd.struct_passwd((*user[:3], group.gr_gid, *user[4:]))


def refuse_planted_links(settings: Settings) -> None:
    """Raise PolicydError if root would write through another user's link.

    With --standalone root stays root, in a folder that may be someone else's.
    """
    database = os.path.abspath(settings.sqlite_config["database"])
    with contextlib.suppress(FileNotFoundError):
        folder = os.stat(os.path.dirname(database))
        if folder.st_uid == 0 and not folder.st_mode & 0o022:
            return  # nobody else can put a link there
    for path in (database + end for end in ("", "-wal", "-shm", "-journal")):
        with contextlib.suppress(FileNotFoundError):
            found = os.lstat(path)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
                raise PolicydError(
                    f"{path}: is a link in a folder that is not root's alone;"
                    " remove it, or run this as the folder's owner")


def drop_root(owner: Owner) -> None:
    """Drop root privileges permanently; raise PolicydError if any remain."""
    os.umask(0o077)
    if owner is None:
        return
    uid, gid = owner.pw_uid, owner.pw_gid
    os.initgroups(owner.pw_name, gid)
    os.setgid(gid)
    os.setuid(uid)
    if os.getresuid() != (uid,) * 3 or os.getresgid() != (gid,) * 3:
        raise PolicydError("could not drop root privileges")
    os.environ["HOME"] = owner.pw_dir  # database drivers look for files there


def folders(settings: Settings) -> Mapping[str, Folder]:
    """Return the folders that the daemon needs, and how to create them."""
    needed = {}
    if settings.pidfile != os.devnull:
        needed[settings.pidfile] = Folder(0o755)
    database = database_path(settings.sqlite_config)
    if settings.backend == 0 and database is not None:
        needed[database] = Folder(0o750)
    if isinstance(settings.SOCKET, str):
        needed[settings.SOCKET] = Folder(0o711, for_postfix=True)
    return {os.path.dirname(os.path.abspath(path)): folder
            for path, folder in needed.items()}


def make_folders(settings: Settings, owner: Owner) -> None:
    """Create the folders that are missing and give them to their owner."""
    os.umask(0o022)
    for path, folder in folders(settings).items():
        if not os.path.isdir(path):
            os.makedirs(path, folder.mode)
        elif owner is None or not is_volume(path):
            continue
        # O_NOFOLLOW: the daemon's user may put a link there at any moment.
        opened = os.open(path, os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            hand_over(opened, folder, owner)
        finally:
            os.close(opened)


def hand_over(opened: int, folder: Folder, owner: Owner) -> None:
    """Give an open folder to its owner, and to group postfix if wanted."""
    if owner is not None:
        os.fchown(opened, owner.pw_uid, owner.pw_gid)
    if folder.for_postfix:
        with contextlib.suppress(KeyError, PermissionError):
            os.fchown(opened, -1, grp.getgrnam("postfix").gr_gid)
            os.fchmod(opened, 0o750)


def is_volume(folder: str) -> bool:
    """Say whether a folder is root's and empty, like a container's volume."""
    status = os.lstat(folder)  # a link is not a folder
    return (stat.S_ISDIR(status.st_mode) and status.st_uid == 0
            and status.st_mode & 0o222 == 0o200  # not like /tmp, not readonly
            and not os.listdir(folder))


@contextlib.contextmanager
def hold_pidfile(path: str, owner: Owner) -> Iterator[None]:
    """Write the pidfile; lock it, or raise AlreadyRunning; remove it."""
    if path == os.devnull:
        yield  # the settings ask for no pidfile
        return
    with hold_lock(path):  # an unlocked pidfile is stale, whatever its id
        with open_own_file(path, 0o644) as file:
            file.write(f"{os.getpid()}\n")
            if owner is not None:
                os.fchown(file.fileno(), owner.pw_uid, owner.pw_gid)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)


def serve(settings: Settings, owner: Owner,
          announce: Callable[[Any], None],  # called with the address bound
          read: Callable[[], Settings]) -> None:  # called for each reload
    """Run the daemon until a signal ends it."""
    make_folders(settings, owner)
    alarm = Alarm()
    ledger = open_ledger(settings)
    service = Service(settings, ledger, ledger.database.clock,
                      alarm.refused, alarm.outage)
    tally = Tally(settings.pidfile, service.counts)
    with contextlib.closing(Signals()) as signals, \
            contextlib.closing(ledger.database), \
            PolicyServer(service) as server, \
            hold_pidfile(settings.pidfile, owner):
        if owner is not None and server.path is not None:
            os.lchown(server.path, owner.pw_uid, owner.pw_gid)
        drop_root(owner)
        warn_if_alert_command_missing(settings)
        keep_to_one_processor()
        server.max_connections = max(16, min(
            server.max_connections, raise_file_limit() - 64))
        housekeeping = Housekeeping(service)
        gc.callbacks.append(freeze_survivors)
        # Opens the ledger and logs an outage; updating one can take hours.
        signals.run(housekeeping.do_step)
        if signals.ended:
            return
        threading.stack_size(512 * 1024)  # bytes of address space per thread
        threading.Thread(target=server.serve_forever, args=(0.1,),
                         daemon=True).start()
        threading.Thread(target=alarm.send, daemon=True).start()
        systemd = Systemd(server)
        announce(server.server_address)
        notify(f"READY=1\n{systemd.status()}")
        if "NOTIFY_SOCKET" in os.environ:
            threading.Thread(target=systemd.inform, daemon=True).start()
        run_until_signal(signals, service, housekeeping, tally, read)
        notify("STOPPING=1")
        server.stop(2 * settings.db_timeout + 2)
        ledger.store_remembered(service.clock())
        with contextlib.suppress(OSError):
            os.unlink(tally.path)


class Signals:
    """Delivers signals to the main thread; created before the pidfile.

    Whichever thread the kernel interrupts, a socket wakes the main thread at
    once; waiting on a queue, it would notice only when cleaning is next due.
    """

    def __init__(self) -> None:
        """Catch signals from now on."""
        self.ended = False  # whether a signal of ENDING has arrived
        self._numbers, sender = socket.socketpair()
        sender.setblocking(False)
        signal.set_wakeup_fd(  # never closed; if it is full, the main thread
            sender.detach(), warn_on_full_buffer=False)  # wakes up anyway
        for number in ENDING:
            signal.signal(number, self._end)
        for number in signal.SIGHUP, signal.SIGUSR2:
            signal.signal(number, lambda *_: None)

    def close(self) -> None:
        """Close the socket."""
        self._numbers.close()

    def wait(self, seconds: float) -> bytes:
        """Return the numbers of the signals received, b"" after a timeout."""
        self._numbers.settimeout(max(0.001, seconds))
        try:
            return self._numbers.recv(4096)  # many signals count as one
        except socket.timeout:
            return b""

    def run(self, work: Callable[[], object]) -> None:
        """Do some work until it is done or a signal ends the daemon.

        It runs in a separate thread, because Python handles no signal while
        the main thread waits for SQLite.  Exceptions are raised here.
        """
        failures: list[Exception] = []

        def attempt() -> None:
            try:
                work()
            except Exception as error:
                failures.append(error)

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        while thread.is_alive() and not self.ended:
            thread.join(0.05)
        if failures:
            raise failures[0]

    def _end(self, *_: object) -> None:
        """Handle a signal of ENDING."""
        self.ended = True


def keep_to_one_processor() -> None:
    """Keep all threads on one processor, where the system allows that.

    Python runs one thread at a time (the GIL); passing it between processors
    costs a third to a half of the speed with 16 connections.
    """
    with contextlib.suppress(AttributeError, OSError):  # only on Linux
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {allowed[os.getpid() % len(allowed)]})


def raise_file_limit() -> int:
    """Raise the soft limit on open files to the hard one; return it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def freeze_survivors(phase: str, info: Mapping[str, int]) -> None:
    """Exclude objects that survived a full garbage collection from the next.

    Otherwise each one would stop all threads for 50 ms with 100,000
    identities in memory.  Reference counting still frees frozen objects.
    """
    if phase == "stop" and info["generation"] == OLDEST_GENERATION:
        gc.freeze()


def run_until_signal(signals: Signals, service: Service,
                     housekeeping: Housekeeping, tally: Tally,
                     read: Callable[[], Settings]) -> None:
    """Reload on HUP, log a summary on USR2, clean, until a signal ends it."""
    tally.publish()
    due = time.monotonic() + CLEAN_PAUSE  # signals do not postpone cleaning
    collect_at = time.monotonic() + COLLECT_PAUSE
    while not signals.ended:
        numbers = signals.wait(due - time.monotonic())
        if signal.SIGHUP in numbers:
            now = time.monotonic_ns() // 1000
            notify(f"RELOADING=1\nMONOTONIC_USEC={now}")
            reload(service, read)
            notify("READY=1")
        if time.monotonic() >= due and not signals.ended:
            housekeeping.do_step()
            due = time.monotonic() + CLEAN_PAUSE
        if time.monotonic() >= collect_at:
            gc.unfreeze()
            gc.collect()  # also cycles that were in use when frozen
            collect_at = time.monotonic() + COLLECT_PAUSE
        tally.publish(asked=signal.SIGUSR2 in numbers)


def reload(service: Service, read: Callable[[], Settings]) -> None:
    """Replace the settings; keep the old ones if the file is broken."""
    try:
        new = read()
    except PolicydError as error:
        log.error("reload failed, keeping the old settings: %s", error)
        return
    for name in FIXED:
        if getattr(new, name) != getattr(service.settings, name):
            log.warning("%s: a change takes effect at the next start", name)
    warn_if_alert_command_missing(new)
    service.reload(new)
    log.log(NOTICE, "configuration reloaded")


def warn_if_alert_command_missing(settings: Settings) -> None:
    """Warn if this user, no longer root, cannot run alert_command."""
    if not settings.alert:
        return
    for program in settings.alert_command[:1]:
        if not shutil.which(program):
            log.warning("alert_command: %s: missing or not executable",
                        program)


class Systemd:
    """Reports the daemon's status to systemd and keeps its watchdog alive.

    It has a separate thread: the main one may wait for the database, which is
    no reason to restart the daemon.
    """

    def __init__(self, server: PolicyServer) -> None:
        """Take the server to watch; it need not run yet."""
        self._server, self._service = server, server.service
        seconds = watchdog_seconds()
        self._watched = seconds is not None
        # Four attempts before systemd's timeout.
        self._pause = min(STATUS_PAUSE, (seconds or math.inf) / 4)
        self._hour = deque([dict(self._service.counts)],
                           math.ceil(3600 / self._pause))  # oldest first

    def inform(self) -> None:
        """Keep systemd informed forever."""
        told = ""
        while True:
            time.sleep(self._pause)
            self._hour.append(dict(self._service.counts))
            status = self.status()
            if status != told:
                notify(status)
                told = status
            if self._watched and self._server.answers_itself(self._pause):
                notify("WATCHDOG=1")

    def status(self) -> str:
        """Return the line that systemctl status shows."""
        counts, before = self._hour[-1], self._hour[0]
        new = {name: counts[name] - before[name] for name in counts}
        mails = new["passed"] + new["refused"] + new["database_errors"]
        database = ("unavailable: mail is judged from memory"
                    if self._service.is_database_unavailable else "available")
        return (f"STATUS={mails} mails in the last hour, {new['refused']} of"
                f" them refused; the database is {database}")


def watchdog_seconds() -> float | None:
    """Return the seconds that systemd waits for a keep-alive message.

    None: it does not watch this process (sd_watchdog_enabled(3)).
    """
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    watched = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    if not microseconds.isdigit() or watched != str(os.getpid()):
        return None
    return int(microseconds) / 1_000_000


def notify(state: str) -> None:
    """Send a state to systemd (sd_notify(3)), if it started this process."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address.startswith("@"):  # unix(7): an abstract socket address
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as message, \
            contextlib.suppress(OSError):
        message.sendto(state.encode(), address)


# ---------------------------------------------------------------------------
# 17. Checks
#
# What --check looks at besides the settings: whether the daemon could start,
# and whether Postfix asks it at the right stage and place.  Changes nothing.
# ---------------------------------------------------------------------------

CONNECT_PATIENCE = 2  # seconds; a daemon that is not busy takes 1 ms
TAKEN = "in use by another program, or by a daemon that does not answer"
Endpoint = Union[str, tuple[str, int]]  # a path, or a host and a port


def is_running(settings: Settings) -> bool:
    """Say whether the daemon answers at SOCKET."""
    try:
        ping(settings, CONNECT_PATIENCE)
    except PolicydError:
        return False
    return True


def find_obstacles(settings: Settings, running: bool,
                   makeable: Sequence[str] = ()) -> Iterator[str]:
    """Yield what would prevent this user from starting the daemon.

    makeable: the folders that a start creates or gives to this user.
    Raise OSError or PolicydError for an address that cannot be bound at all.
    """
    own = []
    if settings.pidfile != os.devnull:
        own += [settings.pidfile, f"{settings.pidfile}.lock"]
    if isinstance(settings.SOCKET, str):
        own.append(f"{settings.SOCKET}.lock")
    for path in own:
        if os.path.dirname(os.path.abspath(path)) not in makeable:
            yield from find_file_obstacle(path)
    database = database_path(settings.sqlite_config)
    if settings.backend == 0 and database and os.path.islink(database):
        folder = os.path.dirname(os.path.realpath(database))
        if not os.path.isdir(folder):
            yield f"{database}: the folder that it links to is missing"
    check_socket(settings.SOCKET)
    if not running:
        yield from find_address_obstacle(settings.SOCKET)


def find_file_obstacle(path: str) -> Iterator[str]:
    """Yield why the daemon could not write one of its files, if so."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return  # check_folders() says whether it can be created
    except OSError as error:
        yield f"{path}: {error.strerror}"
        return
    if not stat.S_ISREG(status.st_mode):
        yield f"{path}: is not a regular file"
    elif status.st_nlink > 1:
        yield f"{path}: has a second hard link; remove it"
    elif not os.access(path, os.W_OK):
        yield f"{path}: cannot be written; remove it"


def find_address_obstacle(address: str | tuple[str, int]) -> Iterator[str]:
    """Yield why an address cannot be bound, if so; no daemon is running."""
    if not isinstance(address, str):
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        with socket.socket(family) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                server.bind(address)
            except OSError as error:
                taken = error.errno == errno.EADDRINUSE
                reason = TAKEN if taken else error.strerror
                yield f"{format_address(address)}: {reason}"
        return
    with socket.socket(socket.AF_UNIX) as client:
        client.setblocking(False)
        error_number = client.connect_ex(address)
    if error_number in (0, errno.EAGAIN):
        yield f"{address}: {TAKEN}"
    elif error_number == errno.ECONNREFUSED:  # stale: a start removes it
        yield from find_removal_obstacle(address)
    elif error_number not in (errno.ENOENT, errno.ENOTDIR):
        yield f"{address}: {os.strerror(error_number)}"


def find_removal_obstacle(path: str) -> Iterator[str]:
    """Yield why a stale socket could not be removed, if so."""
    folder = os.stat(os.path.dirname(os.path.abspath(path)))
    owners = (0, folder.st_uid, os.lstat(path).st_uid)
    if folder.st_mode & stat.S_ISVTX and os.geteuid() not in owners:
        yield f"{path}: belongs to another user; remove it"


def find_makeable(settings: Settings, owner: Owner) -> list[str]:
    """Return the folders that a start creates or gives to its user."""
    return [folder for folder in folders(settings)
            if (owner is not None and is_volume(folder)
                if os.path.isdir(folder) else can_write(folder))]


def check_folders(settings: Settings, makeable: Sequence[str],
                  owner: Owner) -> None:
    """Raise PolicydError for a folder that this user could not use."""
    usual = folders(Settings())  # the systemd unit creates these
    for folder in folders(settings):
        if can_write(folder):
            continue
        if folder not in makeable:
            raise PolicydError(f"{folder}: cannot be written")
        if owner is not None and folder not in usual:
            log.warning(
                "%s: missing, or not writable for %s; a start as root fixes"
                " that, but not one by systemd as %s: install -d -o %s"
                " %s", folder, *[owner.pw_name] * 3, folder)


def can_write(folder: str) -> bool:
    """Say whether this user could create files in a folder, or the folder."""
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


def can_reload(options: argparse.Namespace) -> bool:
    """Say whether this user, too, can read the file that root has read."""
    return options.file is None or os.access(options.file, os.R_OK)


def no_reload(options: argparse.Namespace, settings: Settings) -> str:
    """Return what follows if can_reload() is false, and what helps."""
    path = shlex.quote(options.file)
    return (f"{options.file}: {settings.user} cannot read it, so a reload will"
            f" fail, and so will a start by systemd; run: chgrp"
            f" {settings.group} {path} && chmod g+r {path}")


def warn_of_strangers(settings: Settings) -> None:
    """Warn if not only Postfix can send requests and exhaust limits."""
    if not is_local(settings.SOCKET):
        log.warning(
            "SOCKET: every host that can reach %s can exhaust someone's"
            " limits; let a firewall admit only your mail hosts",
            format_address(settings.SOCKET))
    elif anyone_may_connect(settings):
        log.warning("SOCKET: any account on this host can connect and"
                    " exhaust someone's limits")


def is_local(address: str | tuple[str, int]) -> bool:
    """Say whether only this host can reach an address."""
    if isinstance(address, str):
        return True
    host = parse_address(address[0])
    return address[0] == "localhost" or bool(host and host.is_loopback)


def anyone_may_connect(settings: Settings) -> bool:
    """Say whether any account on this host may connect."""
    if not isinstance(settings.SOCKET, str):
        return True
    above = pathlib.Path(os.path.abspath(settings.SOCKET)).parents
    shuts = os.geteuid() == 0 and any(  # a missing folder gets mode 0750
        group.gr_name == "postfix" for group in grp.getgrall())
    return bool(settings.socket_permission & 0o2) and all(
        os.stat(path).st_mode & 0o1 if os.path.isdir(path) else not shuts
        for path in above)


def examine_database(transaction: Transaction, query: str | None) -> None:
    """Raise an error if mail could not be counted; warn of lesser problems."""
    check_counting(transaction, query)
    warn_if_clocks_differ(ask_clock_difference(transaction))
    for name, value_query, durable in transaction.backend.durable:
        [value] = transaction.run(value_query).fetchone()
        if str(value) not in durable:
            log.warning(
                "%s is %s on the database server, so a crash can lose the"
                " count of accepted mail; set it to %s",
                name, value, durable[0])


def check_counting(transaction: Transaction, query: str | None) -> None:
    """Raise an error if mail could not be counted."""
    backend = transaction.backend
    present = columns_of(transaction, "mail_count")
    if not are_complete(transaction):
        for statement in creations(backend):
            transaction.run(backend.try_table.format(statement))
    for table in TABLES:
        if columns_of(transaction, table):  # try each right; change no row
            transaction.run(f"INSERT INTO {table} SELECT * FROM {table}"
                            " WHERE 1 = 0")
            column, *_ = TABLES[table].split()
            transaction.run(
                f"UPDATE {table} SET {column} = {column} WHERE 1 = 0")
            transaction.run(f"DELETE FROM {table} WHERE 1 = 0")
    if present and "total" not in present and backend.try_total:
        transaction.run(backend.try_total)
    if query and (columns_of(transaction, "rate_limits")
                  or "rate_limits" not in query):  # else a start creates it
        try:
            ask_limits(transaction, query, "Zoë дима 😀")
        except Exception as error:
            raise LedgerError(f"sql_limits_by_id: {error}") from error


# How Postfix is configured.  postconf(1) reads its files; except for
# read_postfix(), the functions depend only on its output, the settings and
# the folders that these name.

POSTCONF_PATIENCE = 10  # seconds; it takes 10 ms
DELAYED = {  # lists that smtpd_delay_reject postpones until RCPT (postconf(5))
    "smtpd_client_restrictions": "CONNECT",
    "smtpd_helo_restrictions": "HELO",
    "smtpd_sender_restrictions": "MAIL"}
LISTS = {  # the protocol_state of the requests that a list makes
    **DELAYED,
    "smtpd_relay_restrictions": "RCPT",
    "smtpd_recipient_restrictions": "RCPT",
    "smtpd_data_restrictions": "DATA",
    "smtpd_end_of_data_restrictions": "END-OF-MESSAGE",
    "smtpd_etrn_restrictions": "ETRN"}
ENDS = ("permit", "reject", "defer")  # nothing after them is reached
LOGIN = ("sasl_username", "sasl_domain", "sasl_method", "sasl_sender")
TO = ("recipient", "recipient_domain")


class Smtpd(NamedTuple):
    """An smtpd service of master.cf with its parameters."""

    name: str  # such as submission/inet
    chroot: bool
    parameters: Mapping[str, str]  # of main.cf, overridden by its own
    own: Mapping[str, str] = {}  # those set by -o in master.cf


class Postfix(NamedTuple):
    """The configuration of the Postfix on this host, as postconf prints it."""

    main: Mapping[str, str]  # parameters of main.cf, and needed defaults
    services: Sequence[Smtpd]

    @property
    def queue(self) -> str:
        """Return the queue directory, the root of chrooted services."""
        return self.main.get("queue_directory", "/var/spool/postfix")

    def file(self, name: str) -> str:
        """Return the path of one of its configuration files."""
        folder = self.main.get("config_directory", "/etc/postfix")
        return os.path.join(folder, name)


class PolicyCheck(NamedTuple):
    """A check_policy_service in a restriction list of a Postfix service."""

    name: str  # of the list, or of a restriction class
    text: str  # its argument; Postfix has a connection for each different one
    state: str  # the protocol_state of its requests; "": unknown
    endpoint: Endpoint
    behind: frozenset[str]  # the permit_... that precede it
    only_warns: bool  # warn_if_reject precedes it


def read_postfix() -> Postfix:
    """Return Postfix's configuration; raise PolicydError or OSError."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath),
                            "/usr/sbin", "/usr/local/sbin"])
    program = shutil.which("postconf", path=path)
    if program is None:
        raise PolicydError("there is no postconf on this host")
    config = os.environ.get("MAIL_CONFIG")
    if config and not os.path.exists(f"{config}/main.cf"):
        # postconf would report this, too, but only after a second.
        raise PolicydError(f"there is no {config}/main.cf")
    of_main_cf = run_postconf(program, "-nx") + run_postconf(
        program, "-x", "queue_directory", "config_directory", "mail_owner",
        "smtpd_delay_reject", "compatibility_level")
    return parse_postfix(of_main_cf, run_postconf(program, "-M"),
                         run_postconf(program, "-Px"))


def run_postconf(program: str, *options: str) -> str:
    """Return what postconf prints, or raise PolicydError."""
    try:
        done = subprocess.run(
            [program, *options], stdin=subprocess.DEVNULL, check=False,
            capture_output=True, timeout=POSTCONF_PATIENCE)
    except subprocess.TimeoutExpired:
        raise PolicydError("postconf timed out") from None
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise PolicydError(printable(said[-1]) if said else "postconf failed")
    for line in done.stderr.decode(errors="replace").splitlines():
        if "syntax error" in line:  # with that, master(8) does not start
            log.warning("%s", printable(line), extra=SELDOM)
    return done.stdout.decode(errors="replace")


def parse_postfix(main_cf: str, services: str, overrides: str) -> Postfix:
    """Parse the output of postconf -nx, postconf -M and postconf -Px."""
    common = parse_parameters(main_cf)
    own = parse_parameters(overrides)
    level = common.get("compatibility_level", "0").partition(".")[0]
    chroot_by_default = not level.isdigit() or int(level) < 1
    found = []
    for line in unfold(services).splitlines():
        columns = line.split()
        if len(columns) < 8 or os.path.basename(columns[7]) != "smtpd":
            continue
        name = "/".join(columns[:2])
        ours = {full.rpartition("/")[2]: value for full, value in own.items()
                if full.rpartition("/")[0] == name}
        chroot = columns[4] == "y" or columns[4] == "-" and chroot_by_default
        found.append(Smtpd(name, chroot, {**common, **ours}, ours))
    return Postfix(common, found)


def parse_parameters(text: str) -> dict[str, str]:
    """Parse lines of the form "name = value"."""
    parameters = {}
    for line in unfold(text).splitlines():
        name, equals, value = line.partition("=")
        if equals:
            parameters[name.strip()] = value.strip()
    return parameters


def unfold(text: str) -> str:
    """Join each line with its continuation lines, which begin with a space."""
    return re.sub(r"\n[ \t]+", " ", text)


def split_list(text: str) -> list[str]:
    """Split at commas and spaces, except inside braces."""
    words, depth = [""], 0
    for character in text:
        if depth <= 0 and (character == "," or character.isspace()):
            words.append("")
            continue
        words[-1] += character
        depth += (character == "{") - (character == "}")
    return [word for word in words if word]


def words_of(text: str, classes: Mapping[str, str]) -> list[str]:
    """Split a restriction list; expand the restriction classes in it."""
    words = []
    for word in split_list(text):
        if word in classes:  # a class cannot contain itself
            others = {name: text for name, text in classes.items()
                      if name != word}
            words += words_of(classes[word], others)
        else:
            words.append(word)
    return words


def find_checks(smtpd: Smtpd, queue: str) -> Iterator[PolicyCheck]:
    """Yield each check_policy_service that a service reaches.

    A restriction class that no list names may be the result of a table
    lookup in any list, so its state is unknown.
    """
    given = smtpd.parameters
    classes = {name: given.get(name, "") for name in split_list(
        given.get("smtpd_restriction_classes", ""))}
    delayed = given.get("smtpd_delay_reject", "yes").lower() != "no"
    named: set[str] = set()
    for name, state in LISTS.items():
        named.update(split_list(given.get(name, "")))
        if delayed and name in DELAYED:
            state = "RCPT"
        words = words_of(given.get(name, ""), classes)
        yield from checks_in(words, name, state, smtpd.chroot, queue)
    for name, text in classes.items():
        if name not in named:
            words = words_of(text, classes)
            yield from checks_in(words, name, "", smtpd.chroot, queue)


def checks_in(words: Sequence[str], name: str, state: str, chroot: bool,
              queue: str) -> Iterator[PolicyCheck]:
    """Yield each check_policy_service that a list reaches."""
    behind: set[str] = set()
    before = ""
    for word, text in zip(words, [*words[1:], ""]):
        lowered = word.lower()
        only_warns = before == "warn_if_reject"
        if lowered in ENDS and not only_warns:
            return
        if lowered.startswith("permit_") and not only_warns:
            behind.add(lowered)
        if lowered == "check_policy_service" and text:
            yield PolicyCheck(name, text, state, parse_endpoint(
                text, chroot, queue), frozenset(behind), only_warns)
        before = lowered


def parse_endpoint(text: str, chroot: bool, queue: str) -> Endpoint:
    """Return where check_policy_service connects to.

    A path is relative to the queue directory, which is also the root
    directory of a chrooted service.
    """
    inner = text[1:-1] if text.startswith("{") else text
    kind, _, where = (split_list(inner) or [""])[0].partition(":")
    if kind != "inet":
        inside = where.lstrip("/") if chroot else where
        return os.path.normpath(os.path.join(queue, inside))
    host, _, port = where.rpartition(":")
    with contextlib.suppress(OSError):  # it may be a name in /etc/services
        port = str(socket.getservbyname(port, "tcp"))
    return host.strip("[]").lower() or "localhost", parse_count(port)


def leads_to(endpoint: Endpoint, address: str | tuple[str, int]) -> bool:
    """Say whether connecting to an endpoint reaches an address."""
    if isinstance(endpoint, str) or isinstance(address, str):
        return (isinstance(endpoint, str) and isinstance(address, str)
                and os.path.realpath(endpoint) == os.path.realpath(address))
    if endpoint[1] != address[1]:
        return False
    asked, ours = parse_address(endpoint[0]), parse_address(address[0])
    if ours is None or ours.is_unspecified:  # it listens everywhere
        return True
    if asked is None:  # a host name, which is not looked up
        return endpoint[0] != "localhost" or ours.is_loopback
    return asked == ours


class Asking(NamedTuple):
    """A service of Postfix and the policy services that it asks."""

    smtpd: Smtpd
    ours: Sequence[PolicyCheck]  # the checks that lead to SOCKET
    others: Sequence[PolicyCheck]
    lost: Sequence[str]  # lists with our check in main.cf that it overrides


def sort_checks(smtpd: Smtpd, postfix: Postfix, settings: Settings) -> Asking:
    """Return which policy services a service asks."""
    def is_ours(check: PolicyCheck) -> bool:
        return leads_to(check.endpoint, settings.SOCKET)

    checks = list(find_checks(smtpd, postfix.queue))
    ours = [check for check in checks if is_ours(check)]
    others = [check for check in checks if not is_ours(check)]
    plain = smtpd._replace(parameters=postfix.main)
    lost = [check.name for check in find_checks(plain, postfix.queue)
            if is_ours(check) and check.name in smtpd.own]
    return Asking(smtpd, ours, others, [] if ours else lost)


def warn_of_postfix(postfix: Postfix, settings: Settings) -> Iterator[str]:
    """Yield what in Postfix's configuration prevents limits from working."""
    services = [sort_checks(smtpd, postfix, settings)
                for smtpd in postfix.services]
    if not any(service.ours for service in services):
        if is_local(settings.SOCKET) and services:  # else other hosts may ask
            yield nobody_asks(postfix, settings, services)
        return
    for service in services:
        yield from warn_of_override(postfix, settings, service)
        yield from warn_of_unreachable(postfix, settings, service)
        if service.ours:
            yield from warn_of_stage(postfix, settings, service)
    yield from warn_of_quotas(postfix, settings, services)


def describe_postfix(postfix: Postfix, settings: Settings) -> str:
    """Return one line that says which services ask."""
    asking: list[str] = []
    silent: list[str] = []
    for smtpd in postfix.services:
        ours = sort_checks(smtpd, postfix, settings).ours
        (asking if ours else silent).append(smtpd.name)
    if not postfix.services:
        return "Postfix: accepts no mail by SMTP on this host"
    if not asking:
        return "Postfix: does not ask on this host"
    text = f"Postfix: asks about mail that arrives at {', '.join(asking)}"
    return text + (f", not at {', '.join(silent)}" if silent else "")


def nobody_asks(postfix: Postfix, settings: Settings,
                services: Sequence[Asking]) -> str:
    """Return the warning for a Postfix that never asks."""
    found = []
    for service in services:
        found += [f"{place_of(postfix, service, check)} asks at"
                  f" {address_in(check)}"
                  + why_unreachable(postfix, settings, service, check)
                  for check in service.others]
        found += [f"{postfix.file('master.cf')}: {service.smtpd.name}"
                  f" overrides {name}" for name in service.lost]
    text = ("Postfix never asks at SOCKET, so nothing is limited:"
            f" {remedy(postfix, settings)}")
    if not is_reachable(postfix, settings, services):
        text += (f", and move SOCKET below {postfix.queue}, since smtpd is"
                 " chrooted there")
    if found:
        text += (f"; found: {'; '.join(dict.fromkeys(found))} (correct what is"
                 " meant for this daemon)")
    return text


def is_reachable(postfix: Postfix, settings: Settings,
                 services: Sequence[Asking]) -> bool:
    """Say whether any service could connect to SOCKET."""
    check = split_list(policy_check(settings.SOCKET, postfix.queue))[1]
    return any(leads_to(
        parse_endpoint(check, service.smtpd.chroot, postfix.queue),
        settings.SOCKET) for service in services)


def place_of(postfix: Postfix, service: Asking, check: PolicyCheck) -> str:
    """Return where a check is: the file, and the list in it."""
    if check.name in service.smtpd.own:
        return (f"{postfix.file('master.cf')}: {service.smtpd.name}:"
                f" {check.name}")
    return f"{postfix.file('main.cf')}: {check.name}"


def address_in(check: PolicyCheck) -> str:
    """Return the address in a check, as Postfix's files write it."""
    return printable(split_list(check.text.strip("{}"))[0])


def remedy(postfix: Postfix, settings: Settings, stage: str = "") -> str:
    """Return what to write into main.cf so that Postfix asks the daemon."""
    name, _, _ = main_cf(settings.count_mode, "").partition(" = ")
    if stage:
        name = f"smtpd_{stage}_restrictions"
    check = policy_check(settings.SOCKET, postfix.queue)
    file = postfix.file("main.cf")
    if postfix.main.get(name):
        return f"put this first in {name} in {file}: {check}"
    return f"write into {file}: {name} = {check}"


def why_unreachable(postfix: Postfix, settings: Settings, service: Asking,
                    check: PolicyCheck) -> str:
    """Return why a chrooted service cannot reach SOCKET, "" if it can."""
    meant = parse_endpoint(check.text, False, postfix.queue)
    if not service.smtpd.chroot or not leads_to(meant, settings.SOCKET):
        return ""
    return (f", which {service.smtpd.name} cannot reach, since it is"
            f" chrooted in {postfix.queue}")


def warn_of_override(postfix: Postfix, settings: Settings,
                     service: Asking) -> Iterator[str]:
    """Yield where master.cf overrides a list that has the check.

    A service on a loopback address is left alone: mail that a content filter
    returns there must not be counted again.
    """
    name = service.smtpd.name
    host = name.rpartition("/")[0].rpartition(":")[0].strip("[]")
    if host and is_local((host, 0)):
        return
    check = policy_check(settings.SOCKET, postfix.queue)
    for lost in service.lost:
        # Only in braces may the value of an option have spaces (master(5)).
        value = ", ".join(filter(None, [check, service.smtpd.own[lost]]))
        yield (f"{postfix.file('master.cf')}: {name}: -o {lost}"
               " overrides the list of main.cf, so mail that arrives there is"
               f" not limited: write -o {{ {lost} = {value} }}")


def warn_of_unreachable(postfix: Postfix, settings: Settings,
                        service: Asking) -> Iterator[str]:
    """Yield the checks whose path a chrooted service cannot reach."""
    for check in service.others:
        reason = why_unreachable(postfix, settings, service, check)
        if reason:
            yield (f"{place_of(postfix, service, check)} asks at"
                   f" {address_in(check)}{reason}: write"
                   f" {policy_check(settings.SOCKET, postfix.queue)}")


def warn_of_stage(postfix: Postfix, settings: Settings,
                  service: Asking) -> Iterator[str]:
    """Yield why mail of a service that asks is not limited, or wrongly."""
    counted = [check for check in service.ours
               if is_asked_in_time(check, settings)]
    for check in service.ours:
        if not counted:
            yield (f"{place_of(postfix, service, check)} asks at"
                   f" {check.state}, where count_mode {settings.count_mode}"
                   f" counts nothing: {remedy(postfix, settings)}")
        if check.only_warns:
            yield (f"{place_of(postfix, service, check)}: warn_if_reject"
                   " stands before the check, so no mail is refused: remove"
                   " it")
    texts = {check.text: place_of(postfix, service, check)
             for check in counted if check.state}
    if len(texts) > 1:
        found = [f"{place} {text}" for text, place in texts.items()]
        yield ("every mail is counted twice, since the check is not written"
               f" the same everywhere; make these equal: {'; '.join(found)}")
    exempt = {"permit_mynetworks": "mail from mynetworks"}
    logs_in = service.smtpd.parameters.get("smtpd_sasl_auth_enable") == "yes"
    if logs_in and counts_logins(settings):
        exempt["permit_sasl_authenticated"] = (
            "mail from users who have logged in")
    for permit, mail in exempt.items():
        if permit in permitted_before(counted):
            yield (f"{place_of(postfix, service, counted[0])}: {permit}"
                   f" stands before the check, so {mail} is not limited: put"
                   " the check first")


def permitted_before(checks: Sequence[PolicyCheck]) -> frozenset[str]:
    """Return the permit_... that precede every one of some checks."""
    if not checks:
        return frozenset()
    return frozenset.intersection(*(check.behind for check in checks))


def is_asked_in_time(check: PolicyCheck, settings: Settings) -> bool:
    """Say whether what a check asks is counted, as far as is known."""
    return not check.state or is_counted(check.state, settings.count_mode)


def counts_logins(settings: Settings) -> bool:
    """Say whether any limit applies to logins."""
    return settings.limit_by_sasl or any(
        name in LOGIN for quota in settings.quotas for name in quota.by)


def warn_of_quotas(postfix: Postfix, settings: Settings,
                   services: Sequence[Asking]) -> Iterator[str]:
    """Yield the quotas for which Postfix has to ask at another stage."""
    states = {check.state for service in services for check in service.ours
              if is_asked_in_time(check, settings)}
    if "" in states or not states:
        return  # unknown, or warned about already
    auto = "" if settings.count_mode == "auto" else "; set count_mode: auto"
    for quota in settings.quotas:
        of = {*quota.by, quota.count, *(name for name, _ in quota.when)}
        if of.intersection(TO) and "RCPT" not in states:
            yield (f"quotas: {quota.name}: Postfix names every recipient only"
                   " at RCPT, so mail to several recipients is not counted:"
                   f" {remedy(postfix, settings, 'recipient')}{auto}")
        if quota.count == "bytes" and states != {"END-OF-MESSAGE"}:
            yield (f"quotas: {quota.name}: the real size is known only at"
                   " END-OF-MESSAGE, so ask only there; before, it is"
                   " what the client declares:"
                   f" {remedy(postfix, settings, 'end_of_data')}{auto}")


# Whether Postfix may connect.

OVERFLOW_ID = 65534  # user_namespaces(7): the id of unmapped users


def warn_of_closed_folders(postfix: Postfix, settings: Settings, owner: Owner,
                       makeable: Sequence[str]) -> Iterator[str]:
    """Yield what prevents Postfix's user from connecting to a unix socket."""
    try:
        user = pwd.getpwnam(postfix.main.get("mail_owner", "postfix"))
    except KeyError:
        return
    if not isinstance(settings.SOCKET, str):
        return
    path = os.path.realpath(settings.SOCKET)
    queue = pathlib.Path(os.path.realpath(postfix.queue))
    above = list(pathlib.Path(path).parents)
    if queue in above:  # smtpd's working directory is the queue
        above = above[:above.index(queue)]
    for folder in map(str, reversed(above)):
        if folder not in makeable and not may_enter(user, folder):
            yield (f"{folder}: Postfix's user {user.pw_name} may not enter"
                   " it, so Postfix cannot ask: admit its group, or chmod"
                   " o+x")
            return
    uid, gid = os.geteuid(), os.getegid()
    if owner is not None:
        uid, gid = owner.pw_uid, owner.pw_gid
    mode = settings.socket_permission
    if (not has_acl(os.path.dirname(path))
            and not may_use(user, uid, gid, mode, stat.S_IWOTH)):
        yield (f"socket_permission: with {mode:04o}, Postfix's user"
               f" {user.pw_name} cannot connect, so Postfix cannot ask: write"
               " 0666")


def may_enter(user: pwd.struct_passwd, folder: str) -> bool:
    """Say whether a user may enter a folder; True if that is unknown."""
    try:
        status = os.stat(folder)
    except OSError:
        return True
    return (has_acl(folder)
            or OVERFLOW_ID in (status.st_uid, status.st_gid)
            or may_use(user, status.st_uid, status.st_gid, status.st_mode,
                       stat.S_IXOTH))


def may_use(user: pwd.struct_passwd, uid: int, gid: int, mode: int,
            right: int) -> bool:
    """Say whether a user has a right on a file of uid, gid and mode.

    right: the bit for others, such as stat.S_IXOTH.
    """
    if user.pw_uid == 0:
        return True
    if user.pw_uid == uid:
        return bool(mode >> 6 & right)
    if gid in os.getgrouplist(user.pw_name, user.pw_gid):
        return bool(mode >> 3 & right)
    return bool(mode & right)


def has_acl(path: str) -> bool:
    """Say whether a path has an access control list (acl(5))."""
    with contextlib.suppress(AttributeError, OSError):  # only on Linux
        return "system.posix_acl_access" in os.listxattr(path)
    return False


# ---------------------------------------------------------------------------
# 18. Command line
#
# The options, what each of them does, and the exit status.
# ---------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    sys.stdout = sys.stdout or io.StringIO()  # None: the caller closed it
    for stream in (sys.stdout, sys.stderr):  # escape what the locale lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    log_to_stderr()
    try:
        options = parse_options(argv)
        with contextlib.ExitStack() as options.at_end:
            options.command(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has ended, as head(1) does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (PolicydError, OSError, RuntimeError) as error:  # no thread
        log.error("%s", error)
        return getattr(error, "exit_code", PolicydError.exit_code)
    return 0


def log_to_stderr() -> None:
    """Log to stderr, with priorities if stderr is the journal."""
    logging.basicConfig(format="%(levelname)s%(message)s", level=NOTICE,
                        handlers=[stderr_handler()])
    logging.raiseExceptions = False  # a log that cannot be written is ignored
    logging._srcfile = None  # faster: no call stack (Python's logging HOWTO)
    logging.setLogRecordFactory(LineRecord)
    journal = sys.stderr is not None and os.environ.get(
        "JOURNAL_STREAM") == "{0.st_dev}:{0.st_ino}".format(os.fstat(2))
    for level, priority, label in (  # the prefixes of sd-daemon(3)
            (logging.INFO, "<6>", ""), (NOTICE, "<5>", ""),
            (logging.WARNING, "<4>", "warning: "),
            (logging.ERROR, "<3>", "error: ")):
        logging.addLevelName(level, (priority if journal else "") + label)


def stderr_handler() -> logging.Handler:
    """Return a handler that logs to stderr, even if it is not a real file."""
    try:
        return LineHandler(sys.stderr.fileno(), sys.stderr.encoding)
    except (AttributeError, OSError):  # closed by the caller; replaced
        return logging.StreamHandler()


class LineRecord(logging.LogRecord):
    """A log record with only what a line of the log needs.

    Looking up the rest, such as the thread's name, takes longer than writing
    the line.
    """

    def __init__(self, name: str, level: int, pathname: str, lineno: int,
                 msg: object, args: Any, exc_info: Any, *_: object) -> None:
        self.name, self.levelno, self.msg = name, level, str(msg)
        self.levelname = logging.getLevelName(level)
        self.args, self.exc_info = args, exc_info
        self.exc_text = self.stack_info = None
        self.created = time.time()


LOG_PATIENCE = 0.1  # seconds for a slow reader, if stderr does not block


class LineHandler(logging.Handler):
    """Writes the log to stderr, many lines with one system call."""

    def __init__(self, descriptor: int, encoding: str) -> None:
        """Take an open file descriptor and its encoding."""
        super().__init__()
        self._descriptor, self._encoding = descriptor, encoding
        self._patience = LOG_PATIENCE

    def emit(self, record: logging.LogRecord) -> None:
        """Write each line of a record; wait for a slow reader."""
        if record.exc_info:
            lines = [self.format(record)]
        else:
            lines = [record.levelname + line
                     for line in record.getMessage().split("\n")]
        block = b""
        with contextlib.suppress(OSError):  # no reader, or the disk is full
            for line in lines:
                data = f"{line}\n".encode(self._encoding, "backslashreplace")
                if len(block) + len(data) > select.PIPE_BUF:
                    self._write(block)  # another writer cannot split it
                    block = b""
                block += data
            self._write(block)

    def _write(self, data: bytes) -> None:
        """Write some bytes; give up if stderr does not block but is full."""
        while data:
            try:
                data = data[os.write(self._descriptor, data):]
                self._patience = LOG_PATIENCE
            except BlockingIOError:  # another process set O_NONBLOCK
                _, ready, _ = select.select(
                    [], [self._descriptor], [], self._patience)
                if not ready:
                    self._patience = 0  # until somebody reads again
                    return


class WarningCounter(logging.Handler):
    """Counts the warnings in the log."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Count a record if it is a warning."""
        self.count += record.levelno >= logging.WARNING

    def last_line(self) -> str:
        """Return the last line of --check."""
        if not self.count:
            return "OK"
        return f"OK, with {self.count} warning{'s' if self.count > 1 else ''}"


EXAMPLES = """\
Examples:
  policyd-rate-limit --status  show who is refused and who has sent most
  policyd-rate-limit --status joe@example.org  show all about one sender
  policyd-rate-limit --block joe@example.org --for 2h  refuse all joe's mail
  policyd-rate-limit --unlimit joe@example.org  end the block
  policyd-rate-limit --reset joe@example.org  forget what joe has used
"""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Writes the usage as help2man(1) expects it."""

    def add_usage(self, usage: Any, actions: Any, groups: Any,
                  prefix: str | None = None) -> None:
        """Begin with a capital letter."""
        super().add_usage(usage, actions, groups, prefix or "Usage: ")


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; a usage error ends with exit status 2."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, usage="%(prog)s [OPTION]...", epilog=EXAMPLES,
        formatter_class=HelpFormatter,
        description="Limit how many mails users of Postfix may send.\n"
        "Without an option, run the daemon in the foreground.")
    one_of = parser.add_mutually_exclusive_group().add_argument
    one_of("--clean", action="store_true",
           help="delete old records from the database and send the report")
    one_of("--check", action="store_true",
           help="check the configuration, the folders, the database and"
           " Postfix; change nothing")
    one_of("--prometheus", action="store_true",
           help="show usage and the daemon's counters, for node_exporter")
    one_of("--ping", action="store_true",
           help="show how long the running daemon takes to answer")
    one_of("--status", metavar="ID", nargs="?", const="",
           help="show usage per identity, or all about one identity")
    one_of("--simulate", action="store_true", help="show what the limits,"
           " including those of -o, would have done to recorded mail")
    one_of("--reset", metavar="ID", help="forget what an identity has used")
    one_of("--limit", nargs=2, metavar=("ID", "LIMITS"), help="give an"
           " identity other limits at once, such as 500/day or 10/min,90/h")
    one_of("--block", metavar="ID", help="refuse all mail from an identity,"
           " until --unlimit or for the time of --for")
    one_of("--unlimit", metavar="ID", help="end --limit or --block")
    also = parser.add_argument
    also("--get-config", metavar="NAME", help="print a setting's value")
    also("--for", dest="term", metavar="TIME", type=parse_term, help="how long"
         " --limit or --block holds: a number with s, min, h, d or w, such as"
         " 90s, 30min, 2h; without a unit, seconds; default: permanently")
    also("--json", action="store_true",
         help="print --status or --simulate as JSON")
    also("--file", "-f", metavar="CONFIG_PATH",
         help="path of the configuration file")
    also("-o", dest="overrides", metavar="NAME=VALUE", action="append",
         default=[], help="override a setting; may be repeated")
    also("--standalone", metavar="DIR", type=os.path.abspath,
         help="keep socket, database and pidfile in DIR; run as the calling"
         " user, without a configuration file unless -f names one")
    also("--version", action="version", version=f"{PROGRAM} {VERSION}")
    words = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(mark_ids([spell_out(word) for word in words]))
    try:
        choose_command(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def parse_term(text: str) -> int:
    """Parse the TIME of --for; argparse shows this error's own message."""
    try:
        return duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


# The settings that a command needs to reach the database as the right user.
DATABASE_SETTINGS = (
    "user", "group", "pidfile", "SOCKET", "backend", "sqlite_config",
    "mysql_config", "pgsql_config", "db_timeout")
TAKES_ID = ("--status", "--reset", "--block", "--unlimit")
NEEDS_ID = ("--limit", "--reset", "--block", "--unlimit")
ID_MARK = "\0"  # precedes an ID whose dash argparse must not see
# Cron jobs may abbreviate these in ways that new options made ambiguous.
ORIGINAL_OPTIONS = ("--clean", "--file", "--get-config", "--help")


def spell_out(word: str) -> str:
    """Return an option that is abbreviated as 1.x allowed, else the word.

    An ID after "=" is marked with ID_MARK.
    """
    name, equals, value = word.partition("=")
    if equals and name in TAKES_ID:
        return f"{name}={ID_MARK}{value}"
    for option in ORIGINAL_OPTIONS:
        if len(name) > len("--") and option.startswith(name):
            return option + equals + value
    return word


def mark_ids(words: Sequence[str]) -> list[str]:
    """Mark IDs that begin with a dash, which argparse takes for options."""
    marked = list(words[:1])
    for option, word in zip(words, words[1:]):
        if option in NEEDS_ID and word.startswith("-"):
            word = ID_MARK + word
        marked.append(word)
    return marked


def choose_command(options: argparse.Namespace) -> None:
    """Set options.command; raise ValueError for a wrong combination."""
    for option in TAKES_ID:
        given = getattr(options, option[2:])
        if given is not None:
            setattr(options, option[2:], given.removeprefix(ID_MARK))
    if options.limit is not None:
        options.limit[0] = options.limit[0].removeprefix(ID_MARK)
    chosen = [name for name in COMMANDS
              if getattr(options, name) not in (None, False)]
    if "get_config" in chosen:
        if not {"get_config", "clean"}.issuperset(chosen):
            raise ValueError("--get-config cannot be combined with another"
                             " command")
        chosen = ["get_config"]  # with --clean: like the original
    options.command = run_daemon
    for name in chosen:  # the last one; --json alone means --status
        options.command = COMMANDS[name]
    if options.json and options.command not in (
            show_status, show_simulated):
        raise ValueError("--json only works with --status and --simulate")
    if options.term and options.command is not set_limit:
        raise ValueError("--for only works with --limit and --block")
    identities = [options.reset, options.block, options.unlimit]
    if "" in (*identities, *(options.limit or ())[:1]):
        raise ValueError("ID is empty")
    if options.limit is not None:
        options.limit[1] = parse_given(options.limit[1])


MAX_DOUBTS = 20  # lines; a file may have 100,000 patterns that match nobody


def load_settings(options: argparse.Namespace) -> Settings:
    """Return the settings for a command; set the log level, log doubts.

    Raise ConfigError or SocketMalformed.
    """
    config = configure(options)
    options.file = options.file or config.path  # $HOME changes before reloads
    options.config, options.places = config, config.places
    settings = check_settings(config)
    log.setLevel(logging.INFO if settings.debug else NOTICE)
    if options.command in (run_daemon, check_start):
        log_doubts(options, [*doubts(settings),
                             *doubt_readers(settings, config)])
    return settings


def log_doubts(options: argparse.Namespace, found: Iterable[Doubt]) -> None:
    """Log doubts, fatal ones first; --check raises ConfigError for these."""
    found = sorted(found, key=lambda doubt: not doubt.fatal)
    for doubt in found[:MAX_DOUBTS]:
        place = options.config.place(*doubt.names)
        message = f"{place}: {printable(doubt.message)}"
        if doubt.fatal and options.command is check_start:
            raise ConfigError(message)
        log.log(logging.ERROR if doubt.fatal else logging.WARNING,
                "%s", message)
    if len(found) > MAX_DOUBTS:
        log.warning("%d more warnings like these", len(found) - MAX_DOUBTS)


def doubt_readers(settings: Settings, config: Config) -> Iterator[Doubt]:
    """Yield each password in the file that other accounts can read."""
    passwords = {"smtp_credentials": settings.smtp_credentials}
    for name in ("mysql_config", "pgsql_config"):
        passwords[name] = next((
            value for key, value in getattr(settings, name).items()
            if SECRET.search(str(key)) and value and value != "*****"), None)
    for name, password in passwords.items():
        in_file = config.path and config.place(name).startswith(config.path)
        if password and in_file and can_all_read(str(config.path)):
            yield Doubt(False, f"{name}: any account on this host can read"
                        f" the password; chmod o= {config.path}", (name,))


def can_all_read(path: str) -> bool:
    """Say whether any account on this host can read a file."""
    path = os.path.abspath(path)
    return bool(os.stat(path).st_mode & 0o4) and all(
        os.stat(folder).st_mode & 0o1 for folder in pathlib.Path(path).parents)


def configure(options: argparse.Namespace) -> Config:
    """Return the configuration: the file, then --standalone, then each -o."""
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
        values = {
            "SOCKET": f"{folder}/policy", "backend": 0,
            "sqlite_config": {"database": f"{folder}/db.sqlite3"},
            "pidfile": f"{folder}/{PROGRAM}.pid"}
        given = {text.partition("=")[0].partition(".")[0]
                 for text in options.overrides}
        for name, value in values.items():
            ignored = config.values.get(name, value) != value
            if ignored and name not in given:
                log.warning("%s: %s has no effect with --standalone; use"
                            " -o %s=VALUE", config.place(name), name, name)
        config.values.update(values)
        config.places.update({(name,): "--standalone" for name in values})
    options.without_overrides = copy.deepcopy(config)
    for text in options.overrides:
        apply_option(config, text)
    return config


def run_daemon(options: argparse.Namespace) -> None:
    """Run the daemon."""
    settings = load_settings(options)

    def announce(address: Any) -> None:
        log.log(NOTICE, "listening on %s", format_address(address))
        if options.standalone:
            print("For main.cf:")
            print(main_cf(settings.count_mode, address), flush=True)
        if not can_reload(options):
            log.error("%s", no_reload(options, settings))

    serve(settings, find_owner(settings, options.standalone), announce,
          lambda: load_settings(options))


def ping_daemon(options: argparse.Namespace) -> None:
    """Print how long the running daemon took to answer."""
    seconds = ping(load_settings(options), PING_PATIENCE)
    print(f"{PROGRAM} answered in {1000 * seconds:.1f} ms")


def clean_all(options: argparse.Namespace) -> None:
    """Delete records that no limit needs any more, and send the report."""
    settings, database = open_as_owner(options)
    own, deleted = own_window(settings), 0
    try:
        database.transact(store_window, own)
        reason = database.transact(read_reason_to_wait, own, reading=True)
        for some in clean(database, settings, int(time.time())):
            deleted += some
            if some:
                time.sleep(0.005)  # let the daemon write
        if settings.report:
            database.transact(import_old_refusals, int(time.time()))
    except LedgerError as error:
        raise CleanError(str(error)) from error
    print(f"{deleted} records deleted")
    if reason:
        print(reason)
    if settings.report:
        log_doubts(options, doubt_reports(settings))
        send_reports(database, settings)


def open_as_owner(options: argparse.Namespace,
                  make: bool = True) -> tuple[Settings, Database]:
    """Load the settings, drop root, return a database not yet opened.

    make: create the missing folders first.
    """
    return open_with(options, load_settings(options), make)


def open_with(options: argparse.Namespace, settings: Settings,
              make: bool) -> tuple[Settings, Database]:
    """Do what open_as_owner() does with settings that are loaded already."""
    owner = find_owner(settings, options.standalone)
    if make:
        make_folders(settings, owner)
    database = open_ledger(settings).database
    options.at_end.callback(database.close)
    drop_root(owner)
    return settings, database


def show_status(options: argparse.Namespace) -> None:
    """Print the usage of all identities, or all about one."""
    settings, database = open_as_owner(options, make=False)
    now, spelt = int(time.time()), options.status or ""
    fits = matcher_of(spelt)
    if spelt and fits is None:
        statuses = read_related(settings, database, spelt, now)
        own, *others = statuses
        if own.limits and not any(
                status.last_mail or status.refused_by for status in others
                if status.identity.endswith(f"={own.identity}")):
            warn_if_unknown(settings, database.read, own,
                            "if it sent mail, these limits would apply")
    else:
        statuses = sorted(
            database.read(functools.partial(survey, wanted=fits),
                          settings, now),
            key=lambda status: urgency(status, now), reverse=True)
    if options.json:
        print(json.dumps({"time": now,
                          "identities": [*map(as_json, statuses)]}))
        return
    colour = (sys.stdout.isatty() and not os.environ.get("NO_COLOR")
              and os.environ.get("TERM") != "dumb")
    lines = (show_identity(statuses, options.places, colour)
             if spelt and fits is None else show_most(statuses, now, colour))
    for line in lines:
        print(line)


def read_related(settings: Settings, database: Database, spelt: str,
                 now: int) -> list[Status]:
    """Return the status of an identity, then those of its quotas."""
    key = key_of(settings, spelt)
    if rule_of(settings, key).by:
        return database.read(survey, settings, now, key)
    related = related_keys(settings, fold(spelt))
    keys = [key, *(other for other in related if other != key)]
    own, *others = database.read(survey, settings, now, *keys)
    if key not in related and not own.is_overridden:
        own = own._replace(source="", limits=())  # not counted
    return [own, *(status._replace(when=related[status.identity])
                   for status in others)]


def show_simulated(options: argparse.Namespace) -> None:
    """Print what limits would have done to recorded mail."""
    settings, database = open_as_owner(options, make=False)
    in_force = check_settings(options.without_overrides)
    with contextlib.closing(Progress()) as progress:
        result = database.read(
            simulate, settings, in_force, int(time.time()), progress.tell)
    if options.json:
        print(json.dumps(simulation_as_json(result)))
        for note in result.notes:
            log.warning("%s", note)
        return
    columns, lines = shutil.get_terminal_size(
        (80 if sys.stdout.isatty() else 999, 0))
    for line in show_simulation(result, columns or 80, lines):
        print(line)


class Progress:
    """Shows progress on a terminal if the work takes more than a second."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._shown = ""

    def tell(self, rows: int) -> None:
        """Show how many rows have been judged."""
        if time.monotonic() > self._since + 1:
            self._show(f"{rows:,} records judged")

    def close(self) -> None:
        """Clear the line on the terminal."""
        if self._shown:
            self._show("")

    def _show(self, text: str) -> None:
        """Overwrite the text that is shown."""
        if sys.stderr is None or not sys.stderr.isatty():
            return
        with contextlib.suppress(OSError):  # progress is not essential
            print("\r" + text.ljust(len(self._shown)),
                  end="" if text else "\r", file=sys.stderr, flush=True)
        self._shown = text


def show_prometheus(options: argparse.Namespace) -> None:
    """Print metrics for node_exporter's textfile collector, in UTF-8."""
    settings, database = open_as_owner(options, make=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    answered = is_running(settings)
    for line in show_metrics(database, settings, answered):
        print(line)


def reset(options: argparse.Namespace) -> None:
    """Forget what an identity has used; print how much that was."""
    settings, database = open_for_change(options)
    key = key_of(settings, options.reset)
    with advice_for_outage(key):
        status = find_status(settings, database, key)
        warn_if_unknown(settings, database.transact, status,
                        "nothing was recorded")
        warn_of_sender(settings, database, key)
        mails = database.transact(forget, key)
    print(f"{printable(key)}: {mails} recorded mails forgotten")
    if status.override is not None and status.override.is_block():
        print(f"It is still blocked; to end that: {unlimit_command(key)}")


def set_limit(options: argparse.Namespace) -> None:
    """Give an identity other limits at once, on every host."""
    settings, database = open_for_change(options)
    spelt, limits = options.limit or (options.block, BLOCKED)
    key, now = key_of(settings, spelt), int(time.time())
    override = Override(
        limits, now + options.term if options.term else None, now)
    with advice_for_outage(key):
        status = find_status(settings, database, key)
        if status.last_mail is None and "quotas" not in options.ignored:
            refuse_pattern(settings, spelt, key)
        what = "block" if override.is_block() else "limit"
        warn_if_unknown(settings, database.transact, status,
                        f"the {what} applies to exactly this name")
        warn_of_sender(settings, database, key)
        for limit in limits:
            if look_swapped(*limit):
                log.warning("LIMITS: %s", doubt_swapped(*limit))
        if status.dry_run:
            log.warning("%s: dry_run is set, so none of its mail is refused",
                        printable(key))
        database.transact(set_override, key, override)
    given = ", ".join(map(ratio, limits)) or "no limits"
    print(f"{printable(key)}: {given} {term(override.ends)}")
    if override.is_block():
        print(f"To end that: {unlimit_command(key)}")


def unlimit(options: argparse.Namespace) -> None:
    """End --limit or --block for an identity."""
    settings, database = open_for_change(options)
    key = key_of(settings, options.unlimit)
    with advice_for_outage(key):
        override = find_status(settings, database, key).override
        warn_of_sender(settings, database, key)
        database.transact(drop_override, key)
    if override is None:
        print(f"{printable(key)}: already has its usual limits")
        return
    given = ", ".join(map(ratio, override.limits)) or "no limits"
    print(f"{printable(key)}: its usual limits apply again; it had {given}"
          f" {describe_override(override)}")


def open_for_change(options: argparse.Namespace) -> tuple[Settings, Database]:
    """Do as open_as_owner(), but ignore wrong settings that are not needed.

    In an emergency, an unrelated mistake in the file must not prevent a
    block.
    """
    config = configure(options)
    options.ignored = set()
    for name in [*config.values]:
        if name in DATABASE_SETTINGS or name not in default_values():
            continue
        try:
            check_settings(config._replace(values={name: config.values[name]}))
        except PolicydError as error:
            log.warning("%s; this command ignores the setting", error)
            del config.values[name]
            options.ignored.add(name)
    settings = check_settings(config)
    log.setLevel(logging.INFO if settings.debug else NOTICE)
    return open_with(options, settings, make=True)


@contextlib.contextmanager
def advice_for_outage(key: str) -> Iterator[None]:
    """Add advice to a LedgerError: what can be done meanwhile."""
    try:
        yield
    except LedgerError as error:
        raise LedgerError(
            f"{error}; nothing was changed: repeat this when the database is"
            f" available.  To stop {printable(key)} now, change its password,"
            " or give it [[0, 60]] in limits_by_id and reload"
            ) from error


def warn_of_sender(settings: Settings, database: Database, key: str) -> None:
    """Warn if a sender of this name is another identity, with records."""
    if (not both_count(settings) or key.startswith(SENDER_KEY)
            or rule_of(settings, key).by):
        return
    sender = find_status(settings, database, shorten(SENDER_KEY + key))
    if sender.last_mail or sender.refused_by or sender.override:
        log.warning(
            "%s is another identity, which stays as it is: the mail with this"
            " envelope sender of clients that have not logged in",
            printable(sender.identity))


def unlimit_command(key: str) -> str:
    """Return the command that ends --limit and --block."""
    return f"{PROGRAM} --unlimit={shlex.quote(printable(key))}"


def refuse_pattern(settings: Settings, spelt: str, key: str) -> None:
    """Raise UsageError for a name under which no mail can be counted."""
    if judging_rule(settings, key) is None:
        name = key.partition("=")[0]
        raise UsageError(f"{spelt}: the configuration has no quota {name};"
                         f" add one to quotas, by: {name}, to limit or block"
                         " its keys")
    if rule_of(settings, key).by:
        return  # a quota's key, whatever its value looks like
    if "*" in spelt or matcher_of(spelt) is not None:
        domain = spelt.rpartition("@")[2]
        instead = "limits_by_id limits what a pattern matches"
        if "@" in spelt:
            instead = (f"for a whole domain, add a quota by: sasl_domain, then"
                       f" use sasl_domain={domain}")
        raise UsageError(f"{spelt}: this is a pattern, so nobody would"
                         f" be limited; name an identity, or configure it:"
                         f" {instead}")


def find_status(settings: Settings, database: Database, key: str) -> Status:
    """Return the status of an identity."""
    [status] = database.transact(survey, settings, int(time.time()), key)
    return status


def warn_if_unknown(settings: Settings, ask: Callable[..., list[str]],
                    status: Status, result: str) -> None:
    """Warn if an identity has no records; suggest similar names.

    ask: the database's transact() or read().  result: what the command does
    nevertheless, for the message.
    """
    named = {f"{rule.name}={text}" if rule.by else text
             for rule in settings.rules for text in rule.limits_by_id.texts
             if text[:1] not in ("@", ".")}  # no mail is counted for these
    if (status.last_mail or status.refused_by or status.identity in named
            or status.source in ("--limit", "sql_limits_by_id")):
        return
    similar = ask(find_similar, status.identity)
    known = f" (recorded: {', '.join(map(printable, similar))})"
    log.warning("%s: no record of this identity; check the spelling%s: %s",
                printable(status.identity), known if similar else "", result)


def find_similar(transaction: Transaction, identity: str) -> list[str]:
    """Return up to five recorded names that begin with this local part."""
    begin = identity.partition("@")[0]
    names = [str(name) for [name] in transaction.run(
        "SELECT DISTINCT id FROM mail_count WHERE id >= ? ORDER BY id"
        " LIMIT 50", begin).fetchall()]
    return [name for name in names if name.startswith(begin)][:5]


def check_start(options: argparse.Namespace) -> None:
    """Check whether the daemon could start and would be asked; change nothing.

    Print the limits in words and OK, or raise for what is wrong.
    """
    warnings = WarningCounter()
    log.addHandler(warnings)
    options.at_end.callback(log.removeHandler, warnings)
    settings = load_settings(options)
    owner = find_owner(settings, options.standalone)
    backend = BACKENDS[settings.backend](settings)
    running = is_running(settings)
    makeable = find_makeable(settings, owner)  # before root is dropped
    for obstacle in find_obstacles(settings, running):
        raise PolicydError(obstacle)
    warn_of_strangers(settings)
    about_postfix = check_postfix(settings, owner, makeable, running)
    drop_root(owner)
    warn_if_alert_command_missing(settings)
    check_folders(settings, makeable, owner)
    if owner is not None:
        for obstacle in find_obstacles(settings, running, makeable):
            log.warning("%s; a start by systemd as %s will fail, unless its"
                        " unit mends that", obstacle, owner.pw_name)
    if not can_reload(options):
        log.warning("%s", no_reload(options, settings))
    database = backend.describe_for_check(functools.partial(
        examine_database, query=settings.sql_limits_by_id))
    state = "is running" if running else "is not running"
    print(*describe_rules(settings), f"the daemon {state}", about_postfix,
          database, warnings.last_line(), sep="\n")


def check_postfix(settings: Settings, owner: Owner, makeable: Sequence[str],
                  running: bool) -> str:
    """Warn if Postfix does not ask as it should; return a summary line.

    running: whether the daemon answers.
    """
    try:
        postfix = read_postfix()
    except (PolicydError, OSError) as error:
        return f"Postfix: not checked: {error}"
    for warning in dict.fromkeys([
            *warn_of_postfix(postfix, settings),
            *warn_of_closed_folders(postfix, settings, owner, makeable)]):
        log.warning("%s", printable(warning))
    if not running and any(sort_checks(smtpd, postfix, settings).ours
                           for smtpd in postfix.services):
        log.warning("Postfix asks, but the daemon is not running")
    return describe_postfix(postfix, settings)


def get_config(options: argparse.Namespace) -> None:
    """Print the value of a setting; a dotted name leads into a mapping."""
    config, name = configure(options), options.get_config
    mapping, key = descend({**default_values(), **config.values,
                            "config_file": config.path}, name)
    if key not in mapping:
        known = [*default_values(), "config_file"]
        raise UnknownSetting(f"{name}: no such setting{suggest(name, known)}")
    value = mapping[key]
    if name == "SOCKET" and isinstance(value, list):
        value = tuple(value)  # as the original prints it
    with contextlib.suppress(TypeError, ValueError):
        if name == "socket_permission":
            value = as_permission(value)
    print(value, end="")


COMMANDS = {"json": show_status, "clean": clean_all, "check": check_start,
            "status": show_status, "prometheus": show_prometheus,
            "simulate": show_simulated, "ping": ping_daemon,
            "get_config": get_config, "reset": reset,
            "limit": set_limit, "block": set_limit, "unlimit": unlimit}

if __name__ == "__main__":
    sys.exit(main())
