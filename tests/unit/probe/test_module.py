"""The grammar of modules: blackbox_exporter's are read as they are, and what is wrong is told with its rule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.grammar import ConfigError, Duration, Secret, Size, Strict, decode, json_schema
from exporter.probe.module import HttpProber, JsonAssertion, ProbeModule, expression, steps


class Modules(Strict, frozen=True, kw_only=True):
    """A file of modules only, as blackbox_exporter's is."""

    modules: dict[str, ProbeModule]


def read(text: str) -> ProbeModule:
    """Read one module, written as the body of `modules: m:`."""
    body = "".join(f"    {line}\n" for line in text.strip("\n").splitlines())
    return decode(f"modules:\n  m:\n{body}", Modules, file="blackbox.yml", environ={}).modules["m"]


EVERYTHING = """
prober: http
timeout: 1m30s
http:
  valid_status_codes: [200, 204]
  valid_http_versions: [HTTP/1.1, HTTP/2.0]
  preferred_ip_protocol: ip4
  ip_protocol_fallback: false
  method: POST
  headers:
    Host: vhost.example.com
    Accept-Language: en-US
  http_headers:
    X-Many:
      values: [a, b]
      secrets: [c]
  body: '{}'
  body_size_limit: 1MiB
  compression: gzip
  follow_redirects: false
  fail_if_ssl: false
  fail_if_not_ssl: true
  fail_if_body_matches_regexp: ["Could not connect to database"]
  fail_if_body_not_matches_regexp: ["Download the latest version here"]
  fail_if_header_matches:
    - header: Set-Cookie
      regexp: '.*'
      allow_missing: true
  fail_if_header_not_matches:
    - header: Access-Control-Allow-Origin
      regexp: '(\\*|example\\.com)'
  tls_config:
    insecure_skip_verify: false
    ca_file: /etc/ca.pem
    cert_file: /etc/cert.pem
    key_file: /etc/key.pem
    server_name: example.com
    min_version: TLS12
    max_version: TLS13
  basic_auth:
    username: someone
    password_file: /etc/password
  enable_http2: true
  json:
    - path: status
      equals: healthy
"""


def test_everything() -> None:
    """Every key of blackbox_exporter's HTTP prober that can be had is read, with its type."""
    module = read(EVERYTHING)
    assert module.timeout == 90
    assert isinstance(module.timeout, Duration)
    assert module.http.valid_status_codes == (200, 204)
    assert module.http.headers["Host"] == Secret("vhost.example.com")
    assert module.http.body_size_limit == 1024**2
    assert not module.http.follows
    assert module.http.fail_if_header_matches[0].allow_missing
    assert module.http.tls_config.max_version == "TLS13"


def test_defaults() -> None:
    """A module that says nothing is a GET that wants a 2xx, prefers IPv6, follows redirects and verifies certificates."""
    module = read("prober: http")
    assert module == ProbeModule()
    assert module.timeout == 0
    http = module.http
    assert (http.method, http.valid_status_codes, http.preferred_ip_protocol) == ("GET", (), "ip6")
    assert http.ip_protocol_fallback
    assert http.follows
    assert http.body_size_limit == Size(10 * 1024**2)
    assert not http.tls_config.insecure_skip_verify
    assert not http.reads_body


def test_old_names() -> None:
    """The old names of keys still serve."""
    assert not read("http:\n  no_follow_redirects: true").http.follows
    assert read("http:\n  no_follow_redirects: false").http.follows
    assert read("http:\n  bearer_token: abc").http.bearer_token == Secret("abc")


WRONG = {
    "prober: tcp": "prober: 'tcp' is not built in; only http is (for others run blackbox_exporter)",
    "prober: tcp\ntcp:\n  tls: true": "prober: 'tcp' is not built in",
    "prober: icmp\nicmp:\n  ttl: 5": "prober: 'icmp' is not built in",
    "dns:\n  query_name: example.com": "dns: only the http prober is built in",
    "prober: grpc\ngrpc:\n  tls: true": "prober: 'grpc' is not built in",
    "timeout: 5": "expected a duration with its unit",
    "http:\n  proxy_url: http://proxy:3128": "proxy_url: probes do not go through a proxy",
    "http:\n  proxy_from_environment: true": "proxy_from_environment: probes do not go through a proxy",
    "http:\n  oauth2: {client_id: x}": "oauth2: probes do not fetch OAuth 2.0 tokens; use authorization",
    "http:\n  fail_if_body_json_matches_cel: body.x": "fail_if_body_json_matches_cel: CEL is not spoken here; use json",
    "http:\n  compression: br": "compression: br cannot be decompressed here; there are: gzip, deflate, identity",
    "http:\n  compression: lzw": "Invalid enum value 'lzw'",
    "http:\n  valid_http_versions: [HTTP/2.0]": "HTTP/1.1 is spoken, so it or HTTP/1.0 must be among them",
    "http:\n  method: G E T": "method: 'G E T' is no HTTP method",
    "http:\n  headers: {'A B': x}": "headers: 'A B' is no header name",
    'http:\n  headers: {A: "x\\r\\nB: y"}': "headers: 'A' is no header name, or its value has a line break",
    'http:\n  http_headers: {A: {values: ["x\\ny"]}}': "http_headers: 'A' is no header name, or a value has a line break",
    "http:\n  body: x\n  body_file: y": "body and body_file cannot be set together",
    "http:\n  fail_if_body_matches_regexp: ['(']": "fail_if_body_matches_regexp: '(' is no regular expression",
    "http:\n  fail_if_body_not_matches_regexp: ['(?=a)']": "'(?=a)' is no regular expression in RE2's syntax",
    "http:\n  fail_if_header_matches: [{header: X}]": "the key 'regexp' is required",
    "http:\n  fail_if_header_matches: [{header: X, regexp: '['}]": "'[' is no regular expression in RE2's syntax",
    "http:\n  basic_auth: {username: a, password: b, password_file: c}": "password and password_file cannot be set",
    "http:\n  basic_auth: {}\n  bearer_token: x": "at most one of basic_auth, authorization, bearer_token",
    "http:\n  authorization: {type: basic}": "authorization: for the type Basic there is basic_auth",
    "http:\n  authorization: {credentials: a, credentials_file: b}": "credentials and credentials_file cannot",
    "http:\n  tls_config: {cert_file: a}": "cert_file and key_file must be set together",
    "http:\n  tls_config: {min_version: SSL3}": "Invalid enum value 'SSL3'",
    "http:\n  preferred_ip_protocol: ipv4": "Invalid enum value 'ipv4'",
    "http:\n  valid_status_code: [200]": "unknown key; did you mean 'valid_status_codes'?",
    "http:\n  json: [{path: status}]": "path 'status': exactly one of equals, one_of and matches must be set",
    "http:\n  json: [{path: a..b, equals: 1}]": "path 'a..b' is no path such as",
    "http:\n  json: [{path: s, equals: 1, matches: x}]": "exactly one of equals, one_of and matches must be set",
    "http:\n  json: [{path: s, matches: '*'}]": "'*' is no regular expression in RE2's syntax",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong(text: str) -> None:
    """Each mistake is one error that names the module and the rule."""
    with pytest.raises(ConfigError) as wrong:
        read(text)
    assert WRONG[text] in str(wrong.value)
    assert wrong.value.key.startswith("modules.m")
    assert wrong.value.line > 0


def test_secrets_are_hidden() -> None:
    """No secret of a module shows itself."""
    module = read("http:\n  basic_auth: {username: u, password: hush}\n  headers: {Cookie: hush}")
    assert "hush" not in repr(module)


def test_schema() -> None:
    """The grammar has a JSON Schema for editors."""
    schema = json_schema(Modules, title="modules")
    assert {"ProbeModule", "HttpProber", "ProbeTLS", "HeaderMatch", "JsonAssertion"} <= schema["$defs"].keys()


PATHS = {
    "": (),
    "status": ("status",),
    "checks.mongodb[0].ok": ("checks", "mongodb", 0, "ok"),
    "[0]": (0,),
    "[-1].x": (-1, "x"),
    '["a.b"].c': ("a.b", "c"),
    'a["b c"][2]["d"]': ("a", "b c", 2, "d"),
    "a-b.c d": ("a-b", "c d"),
    "0.x": ("0", "x"),
}


@pytest.mark.parametrize("path", PATHS)
def test_paths(path: str) -> None:
    """A path is keys and positions, keys with odd characters in quotes."""
    assert steps(path) == PATHS[path]


@pytest.mark.parametrize("path", [".", ".a", "a.", "a..b", "a[", "a[x]", "a]", 'a["b]', "a[0]b", "a[1.5]", "[]", '["a"]b'])
def test_no_paths(path: str) -> None:
    """What is no path is refused, not guessed at."""
    with pytest.raises(ValueError, match="is no path such as"):
        steps(path)


@given(st.lists(st.one_of(st.integers(-999, 999), st.text(st.characters(codec="utf-8", exclude_characters='"')))))
def test_every_path_can_be_written(wanted: list[str | int]) -> None:
    """Any sequence of keys without quotes and positions can be written as a path."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f'["{step}"]' for step in wanted)
    assert steps(text) == tuple(wanted)


@given(st.text(max_size=40))
def test_expressions_never_crash(text: str) -> None:
    """Any text is a regular expression or a ValueError that quotes it."""
    try:
        compiled = expression(text)
    except ValueError as error:
        assert "RE2" in str(error) or "surrogates" in str(error)
    else:
        compiled.search(b"some \xff body")


def test_prober_can_be_made_in_code() -> None:
    """The healer makes modules without a file."""
    assert HttpProber(json=(JsonAssertion(path="status", one_of=("ok", None)),)).reads_body
