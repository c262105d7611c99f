"""A middleware of Django's: a request that got no connection is answered with 503 Service Unavailable."""

from __future__ import annotations

import logging
import sys

from django.core.signals import got_request_exception
from django.http import HttpRequest
from django.http import HttpResponse
from django.utils.deprecation import MiddlewareMixin

from . import Unavailable


log = logging.getLogger("zpgpool")


class UnavailableMiddleware(MiddlewareMixin):
    """Answers 503, with Retry-After, in the place of 500, when no connection came free or the server gave none.

    The first of MIDDLEWARE answers for all others, too: for sessions, say, which are stored after the view. A view that
    handles the error gives its own answer.
    """

    #: Told with the 503, in seconds.
    retry_after = 5

    def process_exception(self, request: HttpRequest, exception: BaseException) -> HttpResponse | None:
        """Answer for a view."""
        error = _find(exception)
        return None if error is None else self.answer(request, error)

    def process_response(self, request: HttpRequest, response: HttpResponse) -> HttpResponse:
        """Answer for a middleware inside of this one: Django has made a 500 of what it raised."""
        error = request.__dict__.pop(FAILED, None)
        return response if error is None or response.status_code != 500 else self.answer(request, error)

    def answer(self, request: HttpRequest, error: Unavailable) -> HttpResponse:
        """Return the answer; a subclass may have a page of its own."""
        log.error("%s %s: 503 Service Unavailable: %s", request.method, request.path, error, exc_info=error)
        return HttpResponse(
            "The database is not available just now. Please try again in a moment.\n",
            status=503,
            content_type="text/plain; charset=utf-8",
            headers={"Retry-After": str(self.retry_after), "Cache-Control": "no-store"},
        )


#: Where a request has the error that Django makes a 500 of.
FAILED = "_zpgpool_failed"


def _find(error: BaseException | None) -> Unavailable | None:
    # By `__cause__` only: a view that handles the error, and raises Http404, has answered.
    while error is not None and not isinstance(error, Unavailable):
        error = error.__cause__
    return error


def _remember(sender: object, request: HttpRequest | None = None, **named: object) -> None:
    error = _find(sys.exc_info()[1])
    if request is not None and error is not None:
        request.__dict__[FAILED] = error


got_request_exception.connect(_remember)
