//! Requests to the hub: redirects by hand, so that the token goes to the endpoint's host alone, and refusals in words.

use std::io::Read;
use std::time::Duration;

use ureq::http::{HeaderMap, Response, Uri};
use ureq::{Agent, Body};

use super::HubOptions;
use crate::error::{ModelError, Result};

/// Redirects followed in a row.
const MAX_REDIRECTS: usize = 10;
/// Largest answer that is read into memory: a list of files.
const MAX_SMALL_BYTES: u64 = 64 << 20;
/// How long a connection may take, and may stand still.
const PATIENCE: Duration = Duration::from_secs(60);

/// How a request ended when it ended badly.
#[derive(Debug)]
pub(super) enum Failure {
    /// Trying again may help: the connection broke, or the server is busy.
    Transient(String),
    /// Trying again won't help.
    Final(String),
}

/// A client of one hub.
#[derive(Debug)]
pub(super) struct Client<'a> {
    agent: Agent,
    options: &'a HubOptions,
}

impl<'a> Client<'a> {
    pub(super) fn new(options: &'a HubOptions) -> Self {
        Self::with_patience(options, PATIENCE)
    }

    pub(super) fn with_patience(options: &'a HubOptions, patience: Duration) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .user_agent(concat!("nibble/", env!("CARGO_PKG_VERSION")))
            // A compressed answer would have neither the size nor the ranges of the file.
            .accept_encoding("identity")
            .timeout_connect(Some(patience))
            .timeout_recv_response(Some(patience))
            .timeout_per_read(Some(patience))
            .build();
        Self { agent: config.into(), options }
    }

    /// The whole of a small answer.
    pub(super) fn get_small(&self, what: &str, url: &str) -> Result<Vec<u8>> {
        let refuse = |why: String| ModelError::Hub { what: what.to_owned(), why };
        let (response, _) = self.get(url, 0).map_err(|f| refuse(f.into_words()))?;
        let mut body = Vec::new();
        let mut reader = response.into_body().into_reader().take(MAX_SMALL_BYTES + 1);
        reader.read_to_end(&mut body).map_err(|e| refuse(format!("{url}: {e}")))?;
        if body.len() as u64 > MAX_SMALL_BYTES {
            return Err(refuse(format!("{url}: more than {MAX_SMALL_BYTES} bytes")));
        }
        Ok(body)
    }

    /// An answer with success, wherever redirects lead, from byte `start` on if the server can, and what the endpoint
    /// itself says about the file on the way.
    pub(super) fn get(&self, url: &str, start: u64) -> Result<(Response<Body>, Linked), Failure> {
        let mut url = url.to_owned();
        let mut linked = Linked::default();
        for _ in 0..=MAX_REDIRECTS {
            let ours = same_host(&url, &self.options.endpoint);
            let mut request = self.agent.get(&url);
            if let Some(token) = self.options.token.as_ref().filter(|_| ours) {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            if start > 0 {
                request = request.header("range", format!("bytes={start}-"));
            }
            let response = request.call().map_err(|e| failure(&url, e))?;
            if ours {
                linked.read(response.headers());
            }
            match response.status().as_u16() {
                301 | 302 | 303 | 307 | 308 => {
                    let location = header(response.headers(), "location");
                    url = resolve(&url, location.unwrap_or_default()).map_err(Failure::Final)?;
                }
                200 | 206 => return Ok((response, linked)),
                // The range starts where the file ends, or beyond: the caller begins anew.
                416 if start > 0 => return Ok((response, linked)),
                status => return Err(self.refusal(status, &url, response.headers())),
            }
        }
        Err(Failure::Final(format!("more than {MAX_REDIRECTS} redirects, the last to {}", without_query(&url))))
    }

    fn refusal(&self, status: u16, url: &str, headers: &HeaderMap) -> Failure {
        let code = header(headers, "x-error-code").unwrap_or_default();
        let token = match self.options.token {
            Some(_) => "the token in use may not read it",
            None => "set HF_TOKEN if it is private",
        };
        let why = match (status, code) {
            (401 | 403, _) if url.ends_with("/whoami-v2") => format!("the token is refused ({status})"),
            (_, "GatedRepo") => {
                format!("gated ({status}): accept its conditions on {}, then set HF_TOKEN", self.options.endpoint)
            }
            (404, "RevisionNotFound") => "no such revision (404)".to_owned(),
            (404, "EntryNotFound") => "no such file (404)".to_owned(),
            (_, "RepoNotFound") | (404, _) => format!("no such repository ({status}); {token}"),
            (401, _) => format!("not authorized (401): there is no such repository, or it is private; {token}"),
            (403, _) => format!("forbidden (403); {token}"),
            (status, _) => format!("the server answers {status} at {}", without_query(url)),
        };
        if matches!(status, 408 | 429 | 500 | 502 | 503 | 504) { Failure::Transient(why) } else { Failure::Final(why) }
    }
}

impl Failure {
    pub(super) fn into_words(self) -> String {
        match self {
            Self::Transient(why) | Self::Final(why) => why,
        }
    }
}

/// What the endpoint says about a file before it sends the reader elsewhere for the bytes.
#[derive(Debug, Default)]
pub(super) struct Linked {
    pub(super) etag: Option<String>,
    pub(super) bytes: Option<u64>,
}

impl Linked {
    /// The endpoint's own word counts: the first answer that has an ETag.
    fn read(&mut self, headers: &HeaderMap) {
        if self.etag.is_none() {
            let etag = header(headers, "x-linked-etag").or(header(headers, "etag"));
            self.etag = etag.map(|etag| etag.trim_start_matches("W/").trim_matches('"').to_owned());
        }
        if self.bytes.is_none() {
            self.bytes = header(headers, "x-linked-size").and_then(|n| n.parse().ok());
        }
    }
}

pub(super) fn header<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

/// Percent-encodes a file's name, its slashes excepted.
pub(super) fn escape(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'/' | b'-' | b'_' | b'.' | b'~') {
            out.push(byte as char);
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

fn failure(url: &str, error: ureq::Error) -> Failure {
    use ureq::Error as E;
    let why = format!("can't reach {}: {error}", without_query(url));
    match error {
        E::Io(_) | E::Timeout(_) | E::ConnectionFailed | E::Protocol(_) => Failure::Transient(why),
        _ => Failure::Final(why),
    }
}

/// An address without what follows the question mark: that may be a signature that grants access.
fn without_query(url: &str) -> &str {
    url.split('?').next().unwrap_or(url)
}

fn same_host(url: &str, endpoint: &str) -> bool {
    let origin = |text: &str| {
        let uri: Uri = text.parse().ok()?;
        Some((uri.scheme_str()?.to_owned(), uri.authority()?.to_string()))
    };
    origin(url).is_some_and(|o| Some(o) == origin(endpoint))
}

/// Where a redirect leads: a whole address, or a path on the same host.
fn resolve(from: &str, location: &str) -> Result<String, String> {
    let bad = |why: &str| format!("a redirect from {} to `{}` {why}", without_query(from), without_query(location));
    let base: Uri = from.parse().map_err(|_| bad("can't be followed"))?;
    let scheme = base.scheme_str().unwrap_or("https");
    if location.starts_with("https://") || (location.starts_with("http://") && scheme == "http") {
        return Ok(location.to_owned());
    }
    if location.starts_with("http://") {
        return Err(bad("would give up encryption"));
    }
    match base.authority() {
        Some(host) if location.starts_with('/') && !location.starts_with("//") => {
            Ok(format!("{scheme}://{host}{location}"))
        }
        _ => Err(bad("can't be followed")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_stay_on_the_host_or_name_a_whole_address() {
        let from = "https://hub.example/a/b?x=1";
        assert_eq!(resolve(from, "/c/d?y").unwrap(), "https://hub.example/c/d?y");
        assert_eq!(resolve(from, "https://cdn.example/f").unwrap(), "https://cdn.example/f");
        assert!(resolve(from, "http://cdn.example/f").unwrap_err().contains("encryption"));
        for bad in ["", "//cdn.example/f", "f", "file:///etc/passwd"] {
            assert!(resolve(from, bad).is_err(), "{bad}");
        }
        assert!(!resolve("https://h/a?secret", "x?token").unwrap_err().contains("secret"));
    }

    #[test]
    fn the_token_is_for_the_endpoint_alone() {
        assert!(same_host("https://hub.example/a", "https://hub.example"));
        for other in ["https://hub.example:8443/a", "http://hub.example/a", "https://hub.example.evil/a", "nonsense"] {
            assert!(!same_host(other, "https://hub.example"), "{other}");
        }
    }

    #[test]
    fn names_are_escaped_byte_by_byte() {
        assert_eq!(escape("a b/ü?#.json"), "a%20b/%C3%BC%3F%23.json");
    }
}
