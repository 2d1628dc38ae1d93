"""How TLS is spoken by a probe."""

import pytest

from exporter.probe.module import ProbeTLS
from exporter.probe.tls import context


@pytest.mark.parametrize(
    "options",
    [
        ProbeTLS(ca_file="/none/ca.pem"),
        ProbeTLS(ca_file="~no-such-user/ca.pem"),
        ProbeTLS(cert_file="~no-such-user/cert.pem", key_file="/none/key.pem"),
    ],
)
def test_files_that_are_not_there(options: ProbeTLS) -> None:
    """A file that cannot be read is an OSError, which a probe has a reason for, whatever its path looks like."""
    with pytest.raises(OSError, match="No such file"):
        context(options)
