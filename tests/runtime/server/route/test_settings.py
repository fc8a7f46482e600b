"""What `edje route` is told is checked before anything is asked."""

from __future__ import annotations

import pytest

from edje.errors import RequestError
from edje.runtime.server.route.settings import RouteSettings


def test_all_that_is_wrong_is_told_at_once():
    wrong = RouteSettings([["ftp://a", "http://b:1"], ["http://b:1/"]], model="")
    with pytest.raises(RequestError) as caught:
        wrong.check()
    assert len(caught.value.faults) == 3
    assert "'ftp://a' is no URL" in str(caught.value)
    assert "http://b:1 is named twice" in str(caught.value)


def test_no_shards_are_refused():
    with pytest.raises(RequestError, match="no shards"):
        RouteSettings([]).check()


@pytest.mark.parametrize("url", ["a:8000", "http://", "http://a:99999", "http://a?x=1"])
def test_what_is_no_url_is_refused(url: str):
    with pytest.raises(RequestError, match="is no URL"):
        RouteSettings([[url]]).check()
