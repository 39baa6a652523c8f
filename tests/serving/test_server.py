"""The socket and the log of the server."""

import logging

import pytest

from trainer.errors import UserError
from trainer.serving import server


def test_a_port_in_use_is_a_user_error():
    with server.listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port={port}: cannot listen there \(Address already in use\)"):
            server.listen("127.0.0.1", port)


def test_repeated_log_lines_are_dropped_and_counted():
    rate_limit = server.LogRateLimit()
    rate_limit.INTERVAL_SECS = 10**9

    def record(line: int) -> logging.LogRecord:
        return logging.LogRecord("name", logging.INFO, "module.py", line, "%d: text", (7,), None)

    assert [rate_limit.filter(record(1)) for _ in range(60)] == [True] * 50 + [False] * 10
    assert rate_limit.filter(record(2))
    rate_limit._interval -= 1  # time passes
    after = record(1)
    assert rate_limit.filter(after)
    assert after.getMessage() == "(10 lines like earlier ones were not logged.) 7: text"
