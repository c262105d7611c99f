"""The status page in Zope's Control Panel, under Zope's own permission."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from Products.Five.browser import BrowserView
from webob import Request
from zope.interface import implementer
from zope.publisher.interfaces import IPublishTraverse

from ..status import StatusApp


if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment
    from ZPublisher.HTTPRequest import HTTPRequest


NAME = "zpgpool"


class PanelStatus(StatusApp):
    """The status page for whom Zope lets in."""

    def _is_open_to(self, environ: WSGIEnvironment) -> bool:
        return True


#: One for the process, made when it is asked for first: from then on the pools keep a history for it.
panel_status = cache(PanelStatus)


@implementer(IPublishTraverse)
class Pools(BrowserView):
    """The page `Control_Panel/zpgpool`, and the files below it."""

    path = ""

    def publishTraverse(self, request: HTTPRequest, name: str) -> Pools:
        """Take the rest of the path: it is the status page's."""
        self.path += f"/{name}"
        return self

    def __call__(self) -> bytes:
        root = f"{self.context.absolute_url_path()}/{NAME}"
        environ = {**self.request.environ, "SCRIPT_NAME": root, "PATH_INFO": self.path or "/"}
        answer = Request(environ).get_response(panel_status())
        response = self.request.response
        response.setStatus(answer.status_code)
        for name, value in answer.headerlist:
            response.setHeader(name, value)
        return answer.body
