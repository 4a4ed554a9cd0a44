//! A hub on a local port that misbehaves as it is told.

use nibble_models::hub::HubOptions;
use sha1::Sha1;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub const REPO: &str = "org/tiny-model";

/// How the server treats one file.
#[derive(Clone, Default)]
pub struct Behaviour {
    /// Large files: the endpoint redirects to the store, whose answers have no hash.
    pub lfs: bool,
    /// Drop the connection after that many bytes of each answer, this many times.
    pub drops: usize,
    pub after: usize,
    /// Answer a range with the whole file.
    pub ignores_ranges: bool,
    /// Answer a range with another one.
    pub wrong_ranges: bool,
    /// Flip a bit of this byte, this many times.
    pub corrupt: usize,
    /// Announce another size in `x-linked-size`.
    pub claims: Option<usize>,
    /// Send no ETag, or this one.
    pub etag: Option<&'static str>,
    /// Answer with this status and error code.
    pub refuses: Option<(u16, &'static str)>,
    /// Answer 503 this many times first.
    pub busy: usize,
}

#[derive(Default)]
pub struct State {
    pub files: HashMap<String, (Vec<u8>, Behaviour)>,
    /// What was asked: path, range, whether a token came along.
    pub log: Vec<(String, Option<String>, bool)>,
    pub token: Option<&'static str>,
    pub api: Option<(u16, &'static str)>,
}

/// A hub on a port, and its store on another.
pub struct Server {
    pub endpoint: String,
    pub state: Arc<Mutex<State>>,
}

pub fn content(seed: u32, len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 13) as u8).collect()
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

pub fn etag(content: &[u8], lfs: bool) -> String {
    if lfs {
        return hex(&Sha256::digest(content));
    }
    hex(&Sha1::new_with_prefix(format!("blob {}\0", content.len())).chain_update(content).finalize())
}

impl Server {
    pub fn start() -> Self {
        let (hub, store) = (TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
        let address = |l: &TcpListener| format!("http://{}", l.local_addr().unwrap());
        let (endpoint, store_address) = (address(&hub), address(&store));
        let state = Arc::new(Mutex::new(State::default()));
        for (listener, is_store) in [(hub, false), (store, true)] {
            let (state, store_address) = (state.clone(), store_address.clone());
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let (state, store_address) = (state.clone(), store_address.clone());
                    std::thread::spawn(move || answer(stream, &state, is_store, &store_address));
                }
            });
        }
        let server = Self { endpoint, state };
        server.put("config.json", b"{\"model_type\": \"llama\"}".to_vec(), Behaviour::default());
        server.put("tokenizer.json", content(1, 5000), Behaviour::default());
        server.put("model.safetensors", content(2, 300_000), Behaviour { lfs: true, ..Behaviour::default() });
        server.put("pytorch_model.bin", content(3, 100), Behaviour::default());
        server
    }

    pub fn put(&self, name: &str, content: Vec<u8>, behaviour: Behaviour) {
        self.state.lock().unwrap().files.insert(name.to_owned(), (content, behaviour));
    }

    /// Changes how the weights are served.
    pub fn weights(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.state.lock().unwrap().files.get_mut("model.safetensors").unwrap().1);
    }

    pub fn remove(&self, name: &str) {
        self.state.lock().unwrap().files.remove(name);
    }

    pub fn file(&self, name: &str) -> Vec<u8> {
        self.state.lock().unwrap().files[name].0.clone()
    }

    /// What was asked since the last call.
    pub fn log(&self) -> Vec<(String, Option<String>, bool)> {
        std::mem::take(&mut self.state.lock().unwrap().log)
    }

    pub fn options(&self, cache: &Path) -> HubOptions {
        HubOptions {
            endpoint: self.endpoint.clone(),
            cache: cache.to_path_buf(),
            token: None,
            offline: false,
            retry_pause: Duration::from_millis(1),
        }
    }
}

/// One request, one answer.
fn answer(mut stream: TcpStream, state: &Mutex<State>, is_store: bool, store: &str) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let (mut path, mut range, mut token) = (String::new(), None, None);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 || line == "\r\n" {
            break;
        }
        let lower = line.to_ascii_lowercase();
        if path.is_empty() {
            path = line.split(' ').nth(1).unwrap_or_default().to_owned();
        } else if let Some(value) = lower.strip_prefix("range:") {
            range = Some(value.trim().to_owned());
        } else if lower.starts_with("authorization:") {
            token = line.split_once(':').map(|(_, value)| value.trim().to_owned());
        }
    }
    let mut reply = |status: u16, headers: &str, body: &[u8]| {
        let head = format!("HTTP/1.1 {status} X\r\nConnection: close\r\n{headers}\r\n");
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
    };
    let mut state = state.lock().unwrap();
    state.log.push((path.clone(), range.clone(), token.is_some()));
    if is_store && token.is_some() {
        return reply(400, "Content-Length: 0\r\n", b"");
    }
    if !is_store && state.token.is_some_and(|t| token != Some(format!("Bearer {t}"))) {
        return reply(401, "Content-Length: 0\r\n", b"");
    }
    if path.starts_with("/api/") {
        if let Some((status, code)) = state.api {
            return reply(status, &format!("X-Error-Code: {code}\r\nContent-Length: 0\r\n"), b"");
        }
        if path == "/api/whoami-v2" {
            return reply(200, "Content-Length: 20\r\n", b"{\"name\": \"somebody\"}");
        }
        let mut names: Vec<String> = state.files.keys().map(|n| format!("{{\"rfilename\": {n:?}}}")).collect();
        names.sort();
        let body = format!("{{\"sha\": \"{COMMIT}\", \"siblings\": [{}]}}", names.join(", "));
        return reply(200, &format!("Content-Length: {}\r\n", body.len()), body.as_bytes());
    }
    let resolve = format!("/{REPO}/resolve/{COMMIT}/");
    // The hub first moves to another path of its own, as for a renamed repository.
    if let Some(name) = path.strip_prefix(&resolve).filter(|n| *n == "tokenizer.json") {
        return reply(307, &format!("Location: /moved{resolve}{name}\r\nContent-Length: 0\r\n"), b"");
    }
    let name = path.split('?').next().unwrap().rsplit('/').next().unwrap().to_owned();
    let Some((content, behaviour)) = state.files.get_mut(&name) else {
        return reply(404, "X-Error-Code: EntryNotFound\r\nContent-Length: 0\r\n", b"");
    };
    if let Some((status, code)) = behaviour.refuses {
        return reply(status, &format!("X-Error-Code: {code}\r\nContent-Length: 0\r\n"), b"");
    }
    if behaviour.busy > 0 {
        behaviour.busy -= 1;
        return reply(503, "Content-Length: 0\r\n", b"");
    }
    let etag = behaviour.etag.map_or_else(|| etag(content, behaviour.lfs), str::to_owned);
    let etag = if etag.is_empty() { String::new() } else { format!("ETag: \"{etag}\"\r\n") };
    if behaviour.lfs && !is_store {
        let size = behaviour.claims.unwrap_or(content.len());
        let headers = format!(
            "Location: {store}/{name}?Signature=secret\r\nX-Linked-{etag}X-Linked-Size: {size}\r\nContent-Length: 0\r\n"
        );
        return reply(302, &headers, b"");
    }
    let mut body = content.clone();
    if behaviour.corrupt > 0 {
        behaviour.corrupt -= 1;
        let middle = body.len() / 2;
        body[middle] ^= 4;
    }
    let start: usize = range.and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()).unwrap_or(0);
    let (mut status, mut headers) = (200, if is_store { "ETag: \"other\"\r\n".to_owned() } else { etag });
    if start > 0 && !behaviour.ignores_ranges {
        let shift = usize::from(std::mem::take(&mut behaviour.wrong_ranges));
        status = 206;
        headers += &format!("Content-Range: bytes {}-{}/{}\r\n", start + shift, body.len() - 1, body.len());
        body.drain(..start);
    }
    headers += &format!("Content-Length: {}\r\n", body.len());
    if behaviour.drops > 0 {
        behaviour.drops -= 1;
        body.truncate(behaviour.after);
    }
    reply(status, &headers, &body);
}
