"""The socket of the server."""

import pytest

from trainer.errors import UserError
from trainer.serving import server


def test_a_port_in_use_is_a_user_error():
    with server.listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port={port}: cannot listen there \(Address already in use\)"):
            server.listen("127.0.0.1", port)
