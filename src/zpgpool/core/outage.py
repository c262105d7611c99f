"""What a failed connect says of the server: whether it may be back in a moment.

Knows texts and SQLSTATEs (PostgreSQL documentation, "PostgreSQL Error Codes").
"""

from __future__ import annotations

import errno
import os
import re
from enum import Enum

import psycopg2


class Diagnosis(Enum):
    """What stops a connect."""

    #: No server answers, or one that starts, stops or recovers: it may be over in a moment.
    OUTAGE = 1
    #: The server has as many clients as it takes (53300): it is over when one of them leaves.
    FULL = 2
    #: A wrong password, an unknown database: it stays until somebody fixes it.
    REFUSAL = 3
    #: The server takes connections, but it, or the user's `check`, has refused this one: the next one may do.
    CHANCE = 4


class Unfit(psycopg2.OperationalError):
    """The user's `check` has refused a new connection."""


TOO_MANY_CONNECTIONS = "53300"

#: What a unix socket says when as many have knocked as the server lets wait.
BACKLOG_IS_FULL = os.strerror(errno.EAGAIN)

#: Class 08, "Connection Exception", which poolers answer with; the server is shutting down, has crashed, is starting.
TEMPORARY = ("08", "57P01", "57P02", "57P03")

#: Two blanks follow the severity, in whatever language, in what a server says, and in nothing that libpq says itself.
SERVERS = re.compile(r"\S:  \S")

#: What psycopg2 says of the use of a connection that was lost before.
LOST = "connection already closed"

SQLSTATE = re.compile(r":  ([0-9A-Z]{5}): ")

#: What PgBouncer says with a code of class 08 all the same.
POOLERS_REFUSAL = re.compile(r"no such (database|user)|not allowed", re.IGNORECASE)

#: What libpq itself says of a setting that is wrong; not what it says of a connection that ended meanwhile.
LIBPQS_REFUSAL = re.compile(
    r"\b(SSL|TLS|certificate|GSS|GSSAPI|SASL|password|authentication|private key)\b"
    r"(?! SYSCALL| connection has been closed| negotiation packet)",
    re.IGNORECASE,
)


def is_temporary(error: psycopg2.Error) -> bool:
    """Whether an error says that a connection was lost, or could not be opened, for a reason that may pass."""
    if error.pgcode is not None:
        return error.pgcode.startswith(TEMPORARY)
    if isinstance(error, psycopg2.InterfaceError):  # it was lost before; a cursor that was closed is a mistake
        return str(error) == LOST
    # A plain DatabaseError is what libpq has no message for.
    is_plain = type(error).__module__ != "psycopg2.errors"  # those are of one SQLSTATE each
    return is_plain and (isinstance(error, psycopg2.OperationalError) or type(error) is psycopg2.DatabaseError)


def is_servers(text: str) -> bool:
    """Whether an error's text has something that a server has said."""
    return SERVERS.search(text) is not None


def diagnose_code(code: str | None) -> Diagnosis:
    """Return what an error says that came after the connect: when the session was set up. None: the answer is lost."""
    return Diagnosis.OUTAGE if code is None or code.startswith(TEMPORARY) else Diagnosis.REFUSAL


def diagnose(text: str) -> Diagnosis:
    """Return what the text of a connect's error says; that of a server must have its SQLSTATE in it."""
    codes = SQLSTATE.findall(text)
    if TOO_MANY_CONNECTIONS in codes or BACKLOG_IS_FULL in text:
        return Diagnosis.FULL
    if any(code.startswith(TEMPORARY) for code in codes):
        return Diagnosis.REFUSAL if POOLERS_REFUSAL.search(text) else Diagnosis.OUTAGE
    return Diagnosis.REFUSAL if codes or LIBPQS_REFUSAL.search(text) else Diagnosis.OUTAGE
