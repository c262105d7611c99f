"""Z SQL Methods over a pool: a database connection object for the Zope Management Interface.

It has what users of `Products.ZPsycopgDA` know, and a pool's name in place of a connection string: the pool is
configured in ZCML or in the ini file. Statements run on the transaction's connection, see `zpgpool.datamanager`.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import localtime
from time import monotonic
from time import strftime
from typing import Any
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import psycopg2
from psycopg2 import DATETIME
from psycopg2 import NUMBER
from psycopg2 import ROWID
from psycopg2.extensions import BOOLEAN
from psycopg2.extensions import DATE
from psycopg2.extensions import INTEGER
from psycopg2.extensions import LONGINTEGER
from psycopg2.extensions import new_type
from psycopg2.extensions import PYDATETIMETZ
from psycopg2.extensions import register_type
from psycopg2.extensions import TIME
from zope.interface.interfaces import ComponentLookupError

from ..core import NoAnswer
from ..core import query
from ..datamanager import get_connection
from ..interfaces import IPoolInternals
from ..monitor import list_pools
from ..registry import get_pool
from ..registry import query_pool


try:
    from AccessControl.class_init import InitializeClass
    from AccessControl.Permissions import change_database_connections
    from AccessControl.Permissions import use_database_methods
    from AccessControl.Permissions import view_management_screens
    from AccessControl.SecurityInfo import ClassSecurityInfo
    from AccessControl.SecurityManagement import getSecurityManager
    from App.ApplicationManager import ApplicationManager
    from DateTime import DateTime
    from OFS.SimpleItem import Item
    from Products.PageTemplates.PageTemplateFile import PageTemplateFile
    from Shared.DC.ZRDB.Connection import Connection as ConnectionBase
    from zExceptions import BadRequest
except ImportError as error:
    raise ImportError(f"zpgpool.zsql needs the extra zpgpool[zsql]: {error}") from None


if TYPE_CHECKING:
    from App.ProductContext import ProductContext
    from OFS.ObjectManager import ObjectManager
    from psycopg2.extensions import Column
    from ZPublisher.HTTPRequest import HTTPRequest

    from ..types import Pool


#: See `panel`.
PANEL = {"label": "Connection pools", "action": "zpgpool"}

ADD_PERMISSION = "Add zpgpool Database Connections"

#: How long a page of the management interface waits for the server, in seconds, and how long it believes the answer: a
#: folder may list many objects.
PATIENCE = 1.0
ANSWER_LASTS = 2.0

#: The letters by which Z SQL Methods tell types, the first that knows a type decides.
LETTERS = (
    (INTEGER, "i"),
    (LONGINTEGER, "i"),
    (NUMBER, "n"),
    (BOOLEAN, "n"),
    (ROWID, "i"),
    (DATETIME, "d"),
    (PYDATETIMETZ, "d"),
    (DATE, "d"),
    (TIME, "d"),
)

#: What users see of a database: neither the server's own tables nor other sessions' temporary ones.
TABLES = """
    SELECT relname, pg_get_userbyid(relowner), CASE WHEN relkind IN ('v', 'm') THEN 'VIEW' ELSE 'TABLE' END
    FROM pg_class
    WHERE relkind IN ('r', 'p', 'f', 'v', 'm') AND pg_table_is_visible(oid)
        AND relnamespace NOT IN ('pg_catalog'::regnamespace, 'information_schema'::regnamespace)
    ORDER BY relname
"""

COLUMNS = """
    SELECT attname, format_type(atttypid, atttypmod), typname
    FROM pg_attribute JOIN pg_type ON pg_type.oid = atttypid
    WHERE attrelid = to_regclass(quote_ident(%s)) AND attnum > 0 AND NOT attisdropped
    ORDER BY attnum
"""


def _date_time(text: Any, cursor: object) -> DateTime | str | None:
    return text if text is None or text.endswith("infinity") else DateTime(text)


def _time(text: Any, cursor: object) -> DateTime | None:
    return None if text is None else DateTime(f"{strftime('%Y-%m-%d', localtime())} {text}")


#: In place of Python's own: for connection objects that are asked for Zope's DateTime.
ZOPE_TYPES = (
    new_type((1114, 1184), "ZDATETIME", _date_time),
    new_type((1082,), "ZDATE", _date_time),
    new_type((1083,), "ZTIME", _time),
)


class Database:
    """What Z SQL Methods talk to, on behalf of one connection object."""

    def __init__(self, pool_name: str, zdatetime: bool) -> None:
        self.pool_name = pool_name
        self.zdatetime = zdatetime

    def query(
        self, query_string: str, max_rows: int | None = None, query_data: Sequence[object] | None = None
    ) -> tuple[list[dict[str, object]], list[tuple[object, ...]]]:
        r"""Run statements, separated by `\0`; return the description of the columns, and the rows of the one SELECT.

        At most `max_rows` of them (all: None or 0). `query_data` are psycopg2's parameters.

        Raises psycopg2's errors as they are: those that a retry may fix are `TransientError`s, too, which Zope
        retries. After any other the transaction cannot commit: nothing is rolled back, and then half committed.
        """
        description = None
        rows: list[tuple[object, ...]] = []
        with get_connection(self.pool_name).cursor() as cursor:
            if self.zdatetime:
                for each in ZOPE_TYPES:
                    register_type(each, cursor)
            for statement in filter(None, query_string.split("\0")):
                cursor.execute(statement, query_data or None)
                if cursor.description is None:
                    continue
                if description is not None and cursor.description != description:
                    raise psycopg2.ProgrammingError("several SELECTs with different columns in one Z SQL Method")
                description = cursor.description
                rows = cursor.fetchmany(max_rows) if max_rows else cursor.fetchall()
        return [_column(column) for column in description or ()], rows

    def tables(self, rdb: int = 0) -> list[dict[str, str]]:
        """Return the tables and views that can be named without a schema."""
        return [{"table_name": name, "owner": owner, "table_type": kind} for name, owner, kind in self._fetch(TABLES)]

    def columns(self, table_name: str) -> list[dict[str, str]]:
        """Return the columns of a table; none when there is no such table."""
        return [
            {"name": name, "type": kind, "owner": "", "short_type": short}
            for name, kind, short in self._fetch(COLUMNS, table_name)
        ]

    def _fetch(self, sql: str, *args: str) -> list[tuple[str, ...]]:
        with get_connection(self.pool_name).cursor() as cursor:
            cursor.execute(sql, args or None)
            return cursor.fetchall()


def _column(column: Column) -> dict[str, object]:
    return {
        "name": column.name,
        "type": next((letter for type_, letter in LETTERS if column.type_code in type_.values), "s"),
        "width": column.internal_size,
        "precision": column.precision,
        "scale": column.scale,
        "null": column.null_ok,
    }


#: What the server of each pool has answered, and until when (monotonic seconds) that counts.
_answers: WeakKeyDictionary[Pool, tuple[str, float]] = WeakKeyDictionary()


def ask(pool_name: str) -> str:
    """Return why the pool cannot be used; nothing if it is there, and its server answers."""
    pool = query_pool(pool_name)
    if pool is None:
        return f"no pool is registered as {pool_name!r}"
    if pool.closed or not IPoolInternals.providedBy(pool):  # another class of pool tells no more
        return "the pool is closed" if pool.closed else ""
    why, until = _answers.get(pool, ("", 0.0))
    if monotonic() >= until:
        try:
            query(pool, "zpgpool zmi", "SELECT 1", (), monotonic() + PATIENCE)
            why = ""
        except NoAnswer as error:
            why = str(error)
        _answers[pool] = (why, monotonic() + ANSWER_LASTS)
    return why


class Connection(ConnectionBase):
    """A database connection object: the name of a pool, and how its rows are shown."""

    meta_type = "zpgpool Database Connection"
    database_type = "zpgpool"
    zmi_icon = "fas fa-database"
    security = ClassSecurityInfo()
    _isAnSQLConnection = True
    connect_on_load = False

    manage_options = (
        {"label": "Properties", "action": "manage_main"},
        *(tab for tab in ConnectionBase.manage_options if tab["label"] not in ("Status", "Properties")),
        {"label": "Browse", "action": "manage_browse"},
    )
    security.declareProtected(view_management_screens, "manage_main")
    manage_main = PageTemplateFile("edit.pt", globals())
    security.declareProtected(view_management_screens, "manage_properties")
    manage_properties = PageTemplateFile("edit.pt", globals())  # Zope wants one for each name
    security.declareProtected(view_management_screens, "manage_browse")
    manage_browse = PageTemplateFile("browse.pt", globals())

    def __init__(self, id: str, title: str = "", pool_name: str = "", zdatetime: bool = False) -> None:
        self.id = id
        self.edit(title, pool_name, zdatetime)

    @security.protected(change_database_connections)
    def edit(self, title: str, pool_name: str = "", zdatetime: bool = False) -> None:
        """Change the properties."""
        self.title, self.pool_name, self.zdatetime = title, pool_name.strip(), bool(zdatetime)

    @security.protected(change_database_connections)
    def manage_edit(
        self,
        title: str,
        pool_name: str = "",
        zdatetime: bool = False,
        REQUEST: HTTPRequest | None = None,
    ) -> None:
        """Change the properties, from the form. Raises BadRequest when there is no such pool."""
        if REQUEST is not None and pool_name.strip() != self.pool_name:
            _check_known(pool_name)
        self.edit(title, pool_name, zdatetime)
        if REQUEST is not None:
            REQUEST.RESPONSE.redirect(f"{self.absolute_url()}/manage_main?manage_tabs_message=Saved.")

    @security.protected(use_database_methods)
    def __call__(self, v: object = None) -> Database:
        return Database(self.pool_name, self.zdatetime)

    def connect(self, s: str = "") -> Connection:  # of "Open connection"; the pool connects when it is used
        if why := ask(self.pool_name):
            raise BadRequest(why)
        return self

    # No docstrings, with which Zope would publish these three: any visitor could ask the server a question.

    def connected(self) -> bool:
        return not ask(self.pool_name)

    def title_or_id(self) -> str:
        return f"{Item.title_or_id(self)}{self._state(' ({})')}"

    def title_and_id(self) -> str:
        return f"{Item.title_and_id(self)}{self._state(', which is {}')}"

    def _state(self, form: str) -> str:
        """Return what lists of the management interface show; nothing on a page of the site's visitors."""
        user = getSecurityManager().getUser()
        if user is None or not user.has_permission(view_management_screens, self):
            return ""
        return form.format("connected" if self.connected() else "not connected")

    @security.protected(view_management_screens)
    def pool_state(self) -> str:
        """Return one line about the pool."""
        pool, why = query_pool(self.pool_name), ask(self.pool_name)
        return why if pool is None else f"{pool!r}, {f'not connected: {why}' if why else 'connected'}"

    @security.protected(view_management_screens)
    def pool_names(self) -> list[str]:
        """Return the pools that may be chosen: its own, if that is gone, too."""
        return sorted({self.pool_name, *pool_names()})

    @security.protected(view_management_screens)
    def browse(self) -> list[dict[str, object]]:
        """Return the tables with their columns, for the tab of that name; none without a pool."""
        try:
            database = self()
            return [table | {"columns": database.columns(table["table_name"])} for table in database.tables()]
        except ComponentLookupError:
            return []


InitializeClass(Connection)


def pool_names(self: object = None) -> list[str]:  # no docstring, with which Zope would publish it
    return [name for name, _ in list_pools(None)]


def _check_known(pool_name: str) -> None:
    try:
        get_pool(pool_name.strip())
    except ComponentLookupError as error:
        raise BadRequest(str(error)) from None


add_form = PageTemplateFile("add.pt", globals())


def add_connection(
    self: ObjectManager,
    id: str,
    title: str = "",
    pool_name: str = "",
    zdatetime: bool = False,
    REQUEST: HTTPRequest | None = None,
) -> object:
    """Add a connection object to a folder, from the form or a script.

    Raises BadRequest when the form names no pool; a script may run where the server's pools are not.
    """
    if REQUEST is not None:
        _check_known(pool_name)
    self._setObject(id, Connection(id, title, pool_name, zdatetime))
    return None if REQUEST is None else self.manage_main(self, REQUEST)


def initialize(context: ProductContext) -> None:
    """Register the class with Zope (`five:registerPackage` in configure.zcml), and a tab of the Control Panel."""
    if PANEL not in ApplicationManager.manage_options:
        ApplicationManager.manage_options += (PANEL,)
    context.registerClass(
        Connection,
        permission=ADD_PERMISSION,
        constructors=(("add_form", add_form), ("add_connection", add_connection), ("pool_names", pool_names)),
    )
